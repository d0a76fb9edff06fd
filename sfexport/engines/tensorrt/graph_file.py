"""Write the graphs that TensorRT builds from: the decoder in the form that TensorRT fuses, the others as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx
import onnx_ir as ir

from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.artifacts.engines import decoder_files
from sfexport.checkpoint.config import TextConfig
from sfexport.dtypes import Precision
from sfexport.engines.profiles import Profile
from sfexport.errors import CheckpointError, InputError
from sfexport.graphs import names
from sfexport.graphs.decoder import build_decoder
from sfexport.graphs.initializers import Weights
from sfexport.progress import OnStep, no_step


@dataclass(frozen=True)
class EngineGraph:
    """What one engine is built from. Its weights are where the bundle's are.

    Attributes:
        name: the engine's; parts of a decoder have names of their own.
        model: without the weights.
        profiles: the shapes of its inputs.
    """

    name: str
    model: onnx.ModelProto
    profiles: list[Profile]


def engine_graphs(
    bundle: Bundle, profiles: Mapping[str, Sequence[Profile]], parts: int = 1, on_step: OnStep = no_step
) -> Iterator[EngineGraph]:
    """Yield the graphs that a bundle's engines are built from.

    Args:
        profiles: as resolve_profiles returns them.
        parts: engines that the decoder is split into.

    Raises:
        InputError: the decoder cannot be split so.
    """
    for name in GRAPHS:
        if name != "decoder" or parts == 1:
            yield EngineGraph(name, tensorrt_graph(bundle, name, on_step), list(profiles[name]))
            continue
        for part, model in zip(decoder_files(parts), _decoder_parts(bundle, parts), strict=True):
            yield EngineGraph(part, model, [_of_part(profile, model) for profile in profiles[name]])


def tensorrt_graph(bundle: Bundle, name: str, on_step: OnStep = no_step) -> onnx.ModelProto:
    """Return the graph `name` of a bundle for TensorRT.

    The bundle's decoder is ONNX Runtime's: attention in its form takes memory for all scores, and an 8-bit head is
    expanded at every token. So it is written anew, from the bundle's configuration and the weights of its graph. A
    decoder that differs from what this version writes, such as an edited one, is returned as it is.
    """
    model = onnx.load(bundle.graph_file(name), load_external_data=False)
    if name != "decoder":
        return model
    write = _writer(bundle, model)
    if _is_written_by(write, model):
        return ir.to_proto(write(for_tensorrt=True))
    on_step(
        "warning: the bundle's decoder is not as this version of sfexport writes it, so it is built as it is, slower "
        "and with more memory than need be. Export again to change that."
    )
    return model


def split_layers(text: TextConfig, parts: int) -> list[range]:
    """Split the decoder's layers into consecutive parts of about as many weights; the last has the head too.

    Raises:
        InputError: there are fewer layers than parts.
    """
    layers = text.num_layers
    if parts > layers:
        raise InputError(f"--split-decoder {parts} is more than the decoder's {layers} layers.")
    attention = 2 * (text.num_heads + text.num_kv_heads) * text.head_dim
    head = text.vocab_size / (attention + 3 * text.intermediate_size)  # in layers
    starts = [round(k * (layers + head) / parts) for k in range(parts)]
    # At least one layer in each part.
    starts = [min(max(start, k), layers - parts + k) for k, start in enumerate(starts)]
    ends = [*starts[1:], layers]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def _decoder_parts(bundle: Bundle, parts: int) -> Iterator[onnx.ModelProto]:
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    spans, write = split_layers(bundle.config.text, parts), _writer(bundle, model)
    if not _is_written_by(write, model):
        raise InputError(
            f"The decoder in {bundle.path} is not as this version of sfexport writes it, so it cannot be split.",
            "Export again, or build with --split-decoder 1.",
        )
    for layers in spans:
        yield ir.to_proto(write(for_tensorrt=True, layers=layers))


def _writer(bundle: Bundle, model: onnx.ModelProto) -> Callable[..., ir.Model]:
    """Return what writes the bundle's decoder anew."""
    weights = Weights.of_graph(model, bundle.weights_directory)
    parts, dtype = bundle.content["options"]["split_lm_head"], Precision(bundle.precision).onnx
    return partial(build_decoder, bundle.config, weights, dtype, parts)


def _is_written_by(write: Callable[..., ir.Model], model: onnx.ModelProto) -> bool:
    try:
        written = ir.to_proto(write())
    except CheckpointError:  # a weight that a decoder needs is not among the graph's
        return False
    return bool(written.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True))


def _of_part(profile: Profile, model: onnx.ModelProto) -> Profile:
    """Return the profile of a part of the decoder, whose hidden states have the shape of the embeddings."""
    embeds = next(t for t in profile.tensors if t.name == names.EMBEDS)
    known = {t.name: t for t in profile.tensors}
    inputs = [known.get(v.name) or replace(embeds, name=v.name) for v in model.graph.input]
    return replace(profile, tensors=tuple(inputs))
