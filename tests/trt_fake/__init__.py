"""A stand-in for the module `tensorrt`: offers what one version offers, builds nothing, records every call.

recorder.py is what tests use. Behind it:
    guard.py          classes that offer what a version offers (trt_bindings/surface.py) and nothing else
    fakes.py, parsing.py, plugins.py, engines.py    what the stand-ins do
    execution.py, host_cuda.py                      engines computed by ONNX Runtime in host memory
    small.py          a graph of one node, for tests of the recorder
"""
