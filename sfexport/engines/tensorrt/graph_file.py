"""Write the graphs that TensorRT builds from: the decoder in the form that TensorRT fuses, the others as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx
import onnx_ir as ir

from sfexport.artifacts.bundle import Bundle
from sfexport.dtypes import Precision
from sfexport.errors import CheckpointError
from sfexport.graphs.decoder import build_decoder
from sfexport.graphs.initializers import Weights
from sfexport.progress import OnStep, no_step


def tensorrt_graph(bundle: Bundle, name: str, on_step: OnStep = no_step) -> onnx.ModelProto:
    """Return the graph `name` of a bundle for TensorRT. Its weights are where the bundle's are.

    The bundle's decoder is ONNX Runtime's: attention in its form takes memory for all scores, and an 8-bit head is
    expanded at every token. So it is written anew, from the bundle's configuration and the weights of its graph. A
    decoder that differs from what this version writes, such as an edited one, is returned as it is.
    """
    model = onnx.load(bundle.graph_file(name), load_external_data=False)
    if name != "decoder":
        return model
    weights = Weights.of_graph(model, bundle.weights_directory)
    parts, dtype = bundle.content["options"]["split_lm_head"], Precision(bundle.precision).onnx
    write = partial(build_decoder, bundle.config, weights, dtype, parts)
    if not _is_written_by(write, model):
        on_step(
            "warning: the bundle's decoder is not as this version of sfexport writes it, so it is built as it is, "
            "slower and with more memory than need be. Export again to change that."
        )
        return model
    return ir.to_proto(write(for_tensorrt=True))


def _is_written_by(write: Callable[[], ir.Model], model: onnx.ModelProto) -> bool:
    try:
        written = ir.to_proto(write())
    except CheckpointError:  # a weight that a decoder needs is not among the graph's
        return False
    return bool(written.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True))
