"""Checkpoint -> bundle: the three graphs, side files and manifest in one directory. No torch.

Weights stay where they are unless the bundle cannot point at them (see `WEIGHTS`). A quantised bundle has a weights
file of its own (see weights_layout).
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from sfexport.artifacts.atomic import new_directory
from sfexport.artifacts.bundle import GRAPHS, QUANTIZATIONS, Bundle, describe_embedding
from sfexport.artifacts.identity import describe_shard
from sfexport.artifacts.manifest_files import BUNDLE_FILE, describe_files, place, write_manifest
from sfexport.checkpoint.added_tokens import TOKENIZER_FILE
from sfexport.checkpoint.checkpoint import INDEX_FILE, Checkpoint, Shard, Tensor
from sfexport.checkpoint.config_fields import MAX_FRAMES
from sfexport.checkpoint.gptq_awq import PrequantizedMatrix, read_prequantized
from sfexport.checkpoint.tokenizer_files import has_tokenizer
from sfexport.checkpoint.tokenizer_making import write_tokenizer
from sfexport.dtypes import PRECISIONS, Precision
from sfexport.errors import InputError, SfexportError
from sfexport.exporting.description import describe_graph
from sfexport.exporting.weights_file import summary, write_weights
from sfexport.exporting.weights_layout import HEADS, layout_weights
from sfexport.graphs.compressor import build_compressor
from sfexport.graphs.decoder import build_decoder
from sfexport.graphs.initializers import Packed, Weights, external_to_inputs
from sfexport.graphs.vision_encoder import build_vision_encoder
from sfexport.printable import size_text, sizes_text
from sfexport.progress import OnStep, no_step
from sfexport.values import as_output, one_of, whole_number

WEIGHTS = ("auto", "reference", "copy")
DIGESTS = ("sampled", "full")
# 'auto' copies up to this many bytes: a small bundle that any ONNX tool can open and that can be moved is
# worth more than the disk; a large one points into the checkpoint.
COPY_LIMIT = 64 << 20
DEFAULT_FRAMES = 64


@dataclass(frozen=True)
class ExportOptions:
    """How to export a checkpoint.

    Attributes:
        frames: frames sampled from a video by default; None: the config's mm_training_video_frames, else 64.
        weights: 'reference' points into the checkpoint's shards (nothing is copied; other ONNX tools must be
            told where they are); 'copy' takes the shards along; 'auto' copies small ones.
        precision: type the graphs compute in, 'fp32', 'fp16' or 'bf16', whatever type the weights are stored in.
        quantize: 'int4' rounds the decoder's linear weights and writes all weights into the bundle; None: nothing.
        lm_head: format of a quantised bundle's language-model head: 'int8' (also None), or 'fp16' for 16 bits.
        split_lm_head: number of pieces the head is computed in.
        digest: what the digests of referenced weights cover: 'sampled' blocks, or 'full' for every byte too.
    """

    frames: int | None = None
    weights: str = "auto"
    precision: str = "fp32"
    quantize: str | None = None
    lm_head: str | None = None
    split_lm_head: int = 1
    digest: str = "sampled"

    def __post_init__(self) -> None:
        self._check_quantization()
        whole_number(self.split_lm_head, "--split-lm-head")
        one_of(self.weights, "--weights", WEIGHTS)
        one_of(self.digest, "--digest", DIGESTS)
        one_of(self.precision, "--precision", PRECISIONS)
        if self.frames is not None:
            whole_number(self.frames, "--frames", maximum=MAX_FRAMES)

    def _check_quantization(self) -> None:
        if self.quantize is not None:
            one_of(self.quantize, "--quantize", QUANTIZATIONS)
        if self.lm_head is not None:
            one_of(self.lm_head, "--lm-head", HEADS)
        if self.lm_head is not None and self.quantize is None:
            raise InputError("--lm-head says how a quantised bundle keeps its head.", "Use it with --quantize int4.")
        if self.quantize is not None:
            self.check_own_weights()

    def check_own_weights(self) -> None:
        """Raises InputError if a bundle of integer weights is to point at the checkpoint's."""
        if self.weights == "reference":
            raise InputError(
                "A bundle with weights in 4 bits has all its weights itself: --weights reference cannot be.",
                "Leave --weights out.",
            )


@dataclass(frozen=True)
class Source:
    """Where the graphs' weights lie: in the checkpoint's shards, in copies of them, or in a quantised bundle's file.

    Attributes:
        tensors: places of the weights, by the model's names.
        shards: the files.
        in_bundle: the files are in the bundle itself.
        whole: the files hold all that the checkpoint had, so that PyTorch can load it.
        packed: quantised matrices by name.
        quantization: the manifest's account of the rounding; None: nothing was quantised.
    """

    tensors: Mapping[str, Tensor]
    shards: tuple[Shard, ...]
    in_bundle: bool
    whole: bool
    packed: Mapping[str, Packed] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, in_bundle: bool = False) -> Source:
        return cls(checkpoint.tensors, checkpoint.shards, in_bundle, whole=True)


def build_graphs(
    checkpoint: Checkpoint, precision: str = "fp32", source: Source | None = None, head_parts: int = 1
) -> dict[str, Callable[[], ir.Model]]:
    """Return a builder per graph, so that a caller can show progress between them.

    Args:
        source: where the weights are; None: in the checkpoint.
    """
    source = source or Source.of(checkpoint)
    weights, config, dtype = Weights(source.tensors, source.packed), checkpoint.config, Precision(precision).onnx
    tower, size = checkpoint.tower, checkpoint.image.crop
    return {
        "vision_encoder": lambda: build_vision_encoder(config, tower, size, weights, dtype),
        "compressor": lambda: build_compressor(config, weights, dtype),
        "decoder": lambda: build_decoder(config, weights, dtype, head_parts),
    }


def export(checkpoint: Checkpoint, out: Path, options: ExportOptions, on_step: OnStep = no_step) -> Bundle:
    """Write a bundle; it appears whole or not at all.

    Args:
        on_step: takes one line per step.

    Raises:
        CheckpointError: a missing or misshapen tensor, an unusable configuration, a weight that cannot be rounded.
        InputError: the output cannot be written or holds something else, or the disk is too small.
    """
    out = as_output(out)
    checkpoint, prequantized = read_prequantized(checkpoint)
    checkpoint.validate()
    _check_parts(checkpoint, options)
    _refuse_replacing_weights(checkpoint, out, options)
    with new_directory(out, BUNDLE_FILE) as directory:
        for note in checkpoint.notes():
            on_step(note)
        for file in checkpoint.side_files():
            shutil.copyfile(file, directory / file.name)
        if has_tokenizer(checkpoint.path):
            marked = bool(checkpoint.raw_config.get("mm_use_im_start_end"))
            write_tokenizer(checkpoint.path, directory / TOKENIZER_FILE, marked, checkpoint.config.text.vocab_size)
        source = _source(checkpoint, prequantized, directory, options, on_step)
        for name, build in build_graphs(checkpoint, options.precision, source, options.split_lm_head).items():
            on_step(f"writing {name}.onnx")
            ir.save(build(), directory / f"{name}.onnx")
            _check_graph(directory / f"{name}.onnx", checked_by_path=source.in_bundle)
        _write_manifest(checkpoint, source, directory, out, options)
        bundle = Bundle.open(directory)  # as the next command will, while an earlier bundle still stands
    return Bundle(out, bundle.content)


def _check_parts(checkpoint: Checkpoint, options: ExportOptions) -> None:
    vocabulary = checkpoint.config.text.vocab_size
    if options.split_lm_head > vocabulary:
        raise InputError(f"--split-lm-head {options.split_lm_head} is more than the head's {vocabulary} rows.")


def _source(
    checkpoint: Checkpoint,
    prequantized: Mapping[str, PrequantizedMatrix],
    directory: Path,
    options: ExportOptions,
    on_step: OnStep,
) -> Source:
    if options.quantize is not None or prequantized:
        return _quantize_weights(checkpoint, prequantized, directory, options, on_step)
    if _copies_weights(checkpoint, options):
        return Source.of(_copy_weights(checkpoint, directory, on_step), in_bundle=True)
    return Source.of(checkpoint)


def _quantize_weights(
    checkpoint: Checkpoint,
    prequantized: Mapping[str, PrequantizedMatrix],
    directory: Path,
    options: ExportOptions,
    on_step: OnStep,
) -> Source:
    """Write the bundle's own weights file.

    Without --quantize, keep the checkpoint's own 4-bit weights and quantize nothing else.
    """
    options.check_own_weights()
    head = options.lm_head or (HEADS[0] if options.quantize else HEADS[1])
    scale_type, rounds = Precision(options.precision).safetensors, options.quantize is not None
    layout = layout_weights(checkpoint, directory, scale_type, head, options.split_lm_head, prequantized, rounds)
    _check_disk(directory, layout.size, "The quantised weights take", "Free some space, or write it elsewhere with -o.")
    on_step(f"writing {layout.shard().name} ({size_text(layout.size)})")
    method = next((matrix.method for matrix in prequantized.values()), options.quantize)
    about = {"method": method, "lm_head": head, **write_weights(layout, on_step)}
    on_step(summary(about))
    if any(packed.zeros for packed in layout.packed().values()):
        on_step("warning: TensorRT takes no zero points; with --quantize int4 these weights are rounded again without.")
    return Source(layout.tensors(), (layout.shard(),), True, False, layout.packed(), about)


def _refuse_replacing_weights(checkpoint: Checkpoint, out: Path, options: ExportOptions) -> None:
    """A bundle without all of a checkpoint's weights must not replace the directory that holds them."""
    inside = any(shard.path.is_relative_to(os.path.realpath(out)) for shard in checkpoint.shards)
    if inside and (options.quantize is not None or not _copies_weights(checkpoint, options)):
        raise InputError(
            f"The output {out} holds the checkpoint's weights, and the new bundle would not.",
            "Choose another with -o, or use --weights copy without --quantize.",
        )


def _copies_weights(checkpoint: Checkpoint, options: ExportOptions) -> bool:
    size = sum(shard.size for shard in checkpoint.shards)
    copies = options.weights == "copy" or (options.weights == "auto" and size <= COPY_LIMIT)
    if not copies and len({shard.path.parent for shard in checkpoint.shards}) > 1:
        raise InputError(
            f"The shards of {checkpoint.path} ({size_text(size)}) are links into several directories, which one "
            "bundle cannot point to.",
            "Use --weights copy.",
        )
    return copies


def _copy_weights(checkpoint: Checkpoint, directory: Path, on_step: OnStep) -> Checkpoint:
    size = sum(shard.size for shard in checkpoint.shards)
    _check_disk(directory, size, "Copying the weights takes", "Free some space, or use --weights reference.")
    for shard in checkpoint.shards:
        on_step(f"copying {shard.name} ({size_text(shard.size)})")
        shutil.copyfile(shard.path, directory / shard.name)
    if checkpoint.weight_files is not None and checkpoint.weight_files.indexed:
        shutil.copyfile(checkpoint.path / INDEX_FILE, directory / INDEX_FILE)
    return Checkpoint.open(directory)


def _check_disk(directory: Path, size: int, what: str, hint: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        needs, has = sizes_text(size, free)
        raise InputError(f"{what} {needs} and {directory.parent} has {has} free.", hint)


def _check_graph(file: Path, checked_by_path: bool) -> None:
    """Run onnx's full check; by path it also checks that the external data is there, beside the file."""
    try:
        if checked_by_path:
            onnx.checker.check_model(str(file), full_check=True)
        else:
            # The checker refuses shards that lie in another directory. With inputs in their place, every node is still
            # checked and every shape inferred.
            model = onnx.load(file, load_external_data=False)
            external_to_inputs(model)
            onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SfexportError(
            f"The graph {file.name} does not pass onnx's checker: {error}",
            "This is a bug in sfexport; please report it.",
        ) from None


def _write_manifest(checkpoint: Checkpoint, source: Source, directory: Path, out: Path, options: ExportOptions) -> None:
    """The bundle being written at `directory` is known as `out` later."""
    weights = out if source.in_bundle else source.shards[0].path.parent
    full = source.in_bundle or options.digest == "full"
    shards = [describe_shard(shard, full) for shard in source.shards]
    names = [file.name for file in checkpoint.side_files()] + [f"{name}.onnx" for name in GRAPHS]
    if has_tokenizer(checkpoint.path) and TOKENIZER_FILE not in names:
        names.append(TOKENIZER_FILE)
    if (directory / INDEX_FILE).is_file():
        names.append(INDEX_FILE)
    frames = options.frames or checkpoint.fields.mm_training_video_frames or DEFAULT_FRAMES
    side, pooling = checkpoint.tower.grid(checkpoint.image.crop), checkpoint.config.slow_fast.video_pooling_stride
    content = {
        "model": {**asdict(checkpoint.config), "tower": asdict(checkpoint.tower)},
        "image": asdict(checkpoint.image),
        "tokens_per_frame": {"image": side**2, "video": (side // pooling) ** 2},
        "options": {
            "precision": options.precision,
            "frames": frames,
            "weights": "copy" if source.in_bundle else "reference",
            "quantize": options.quantize,
            "split_lm_head": options.split_lm_head,
        },
        "graphs": {name: describe_graph(directory / f"{name}.onnx") for name in GRAPHS},
        "checkpoint": {
            **place(out if source.in_bundle and source.whole else checkpoint.path, out),
            "shards": shards if source.whole else [describe_shard(shard, full=False) for shard in checkpoint.shards],
        },
        "original": place(checkpoint.path, out),
        "weights": {
            "directory": place(weights, out),
            "shards": shards,
            "parameters": _parameters(checkpoint),
            "embedding": describe_embedding(source.tensors["model.embed_tokens.weight"]),
        },
        "quantization": source.quantization,
        "files": describe_files(directory, names),
        "tools": {"python": platform.python_version(), "onnx": onnx.__version__, "onnx-ir": ir.__version__},
    }
    write_manifest(directory / BUNDLE_FILE, content)


def _parameters(checkpoint: Checkpoint) -> int:
    """Parameters in the graphs: all but the embedding table, unless it is the head too."""
    names = set(checkpoint.expected_tensors())
    if not checkpoint.config.text.tie_word_embeddings:
        names.discard("model.embed_tokens.weight")
    return sum(math.prod(checkpoint.tensors[name].shape) for name in names)
