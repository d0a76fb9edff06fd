"""The three ONNX graphs, written node by node with onnx-ir, without torch.

One file per graph, mirroring the file of the same name in sfexport/model. Inputs and outputs listed there without a
type have the graph's own: float32, float16 or bfloat16.
"""
