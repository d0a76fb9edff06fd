"""The three ONNX graphs, written node by node with onnx-ir, without torch.

One file per graph, mirroring the file of the same name in sfexport/model. May import sfexport.checkpoint,
facts, towers and errors.
"""
