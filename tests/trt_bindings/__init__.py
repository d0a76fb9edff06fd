"""TensorRT's real Python bindings on a machine without GPU and without TensorRT's libraries.

stubs.py       shared objects that let the bindings be imported, and the layout that makes them `tensorrt`
venvs.py       throw-away environments with the bindings of each version, from the package index
surface.py     what each version offers (surface_*.json), written once by dump_surface.py from the real bindings
usage.py       what a source file uses of TensorRT, read from its syntax tree
expressions.py dimension expressions and the calls a builder makes on a plugin; runs inside an environment
guard.py       classes that offer what a version offers and nothing else; fakes.py and engines.py fill them

The folder is not called tensorrt_bindings: that is the name of the real package, which it must not hide.
"""
