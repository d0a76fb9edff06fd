"""Compute a Plan: memory and speed of a checkpoint on targets.

No engine is built or run: graphs are exported to a temporary directory and read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config_fields import MAX_FRAMES
from sfexport.engines.memory import MemoryEstimate, estimate_memory, memory_sources, physical_memory, with_decoder_parts
from sfexport.engines.profiles import Limits, resolve_profiles
from sfexport.engines.tensorrt.build import memory_needs
from sfexport.errors import InputError
from sfexport.exporting.export import ExportOptions, export
from sfexport.machines.machine import detect_machine
from sfexport.machines.targets import Target, find_target, load_targets, match_machine
from sfexport.planning.flops import (
    Lengths,
    Storage,
    call_flops,
    prefill_calls,
    prompt_lengths,
    slow_key_value_flops,
    storages,
    vision_flops,
    weight_bytes,
)
from sfexport.planning.memory import CPU_STORAGES, cpu_memory, cpu_weight_bytes, with_quantized
from sfexport.planning.speed import Efficiency, Speed, efficiency_on, estimate_speed, speed_sources
from sfexport.values import whole_number
from sfexport.versions import maps_weights

CPU, ALL = "cpu", "all"
# Text tokens of the timed prompt: the template before the video; a question of about twelve words and what follows it.
BEFORE_TOKENS, QUESTION_TOKENS = 14, 30
SYSTEM_BYTES = 1_500_000_000  # memory that the system of a board without a desktop uses, where CPU and GPU share it


@dataclass(frozen=True)
class Figures:
    """Memory and speed of one Storage on one target.

    Attributes:
        storage: format of the weights.
        weights: bytes by part (flops.PARTS).
        memory: bytes to build and to answer.
        builds: the target's memory suffices to build; None: its size is not known.
        answers: the target's memory suffices to answer; None: its size is not known.
        speed: None for the CPU, whose rates are not known.
    """

    storage: Storage
    weights: dict[str, int]
    memory: MemoryEstimate
    builds: bool | None
    answers: bool | None
    speed: Speed | None


@dataclass(frozen=True)
class TargetPlan:
    """The part of a Plan about one target.

    Attributes:
        name: the target's name, or 'cpu'.
        jetpack: the target's JetPack; None: not a Jetson.
        memory: bytes of the target's memory; None: not known.
        efficiency: assumed for the speed in `figures`; None for the CPU.
        figures: one for each Storage, widest first.
    """

    name: str
    jetpack: str | None
    memory: int | None
    efficiency: Efficiency | None
    figures: tuple[Figures, ...]


@dataclass(frozen=True)
class Plan:
    """The result of `sfexport plan`: memory and speed of a checkpoint on each target.

    Attributes:
        checkpoint: the checkpoint's directory.
        lengths: frames and tokens of the prompt that is timed.
        limits: largest frames and tokens that memory is reserved for.
        flops: FLOPs by stage: vision, compressor and each prefill call.
        decode_mode: the checkpoint's decode mode.
        targets: one TargetPlan for each target.
    """

    checkpoint: Path
    lengths: Lengths
    limits: Limits
    flops: dict[str, int]
    decode_mode: str
    targets: tuple[TargetPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a document of plain values; bytes, FLOPs and seconds."""
        return {
            "computed": True,
            "checkpoint": str(self.checkpoint),
            "lengths": asdict(self.lengths) | {"prompt": self.lengths.prompt},
            "limits": asdict(self.limits),
            "flops": self.flops,
            "decode_mode": self.decode_mode,
            "targets": [_target_json(target) for target in self.targets],
        }


def _target_json(target: TargetPlan) -> dict[str, Any]:
    return {
        "target": target.name,
        "jetpack": target.jetpack,
        "memory": target.memory,
        "efficiency": target.efficiency.shares() if target.efficiency else None,
        "sources": None if target.efficiency is None else memory_sources() | speed_sources(target.efficiency),
        "precisions": [_figures_json(figures) for figures in target.figures],
    }


def _figures_json(figures: Figures) -> dict[str, Any]:
    memory, speed = figures.memory, figures.speed
    on_gpu = speed is not None
    return {
        "precision": figures.storage.name,
        "weights": figures.weights,
        "text_key_values": memory.text_key_values,
        "slow_key_values": memory.slow_key_values,
        "activations": {g.name: g.activations for g in memory.graphs},
        "engine_activations": {g.name: g.engine_activations for g in memory.graphs} if on_gpu else None,
        "engines": {g.name: g.engine for g in memory.graphs} if on_gpu else None,
        "build_peak": {"device": memory.build_device, "host": memory.build_host},
        "run_peak": memory.run,
        "builds": figures.builds,
        "answers": figures.answers,
        "seconds": None if speed is None else _seconds_json(speed),
        "tokens_per_second": None if speed is None else speed.tokens_per_second,
        "plain_tokens_per_second": None if speed is None else speed.plain_tokens_per_second,
    }


def _seconds_json(speed: Speed) -> dict[str, float | None]:
    stages = {name: getattr(speed, name) for name in ("vision", "compressor", "prefix", "question")}
    return stages | {"first_token": speed.first_token, "second_question": speed.second_question}


def plan(path: Path, target: str | None = None, frames: int | None = None, jetpack: str | None = None) -> Plan:
    """Compute the memory and speed of building engines and answering about a video.

    Args:
        target: a name in the table of targets, 'all', or 'cpu' for ONNX Runtime on this machine; None: this machine.
        frames: number of frames sampled from the video; None: the checkpoint's.
        jetpack: the target's JetPack; None: its default.

    Raises:
        InputError: an unknown target or JetPack, or a number of frames that cannot be asked about.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    chosen = choose_targets(target, jetpack)
    _check_frames(frames)
    checkpoint = Checkpoint.open(path)
    checkpoint.validate()
    with TemporaryDirectory(prefix="sfexport-plan-") as folder:
        precisions = ("fp32", checkpoint.half_precision)
        wide, narrow = (_export(checkpoint, Path(folder) / p, p, frames) for p in precisions)
        lengths = _lengths(checkpoint, wide.frames)
        limits = Limits(lengths.frames)
        if chosen is None:
            targets: Sequence[TargetPlan] = [_on_this_cpu(checkpoint, wide, lengths)]
        else:
            memory = _MemoryEstimates({4: wide, 2: narrow}, limits)
            targets = [_on_target(checkpoint, memory, lengths, target) for target in chosen]
    config, size = checkpoint.config, checkpoint.image.crop
    flops = {
        "vision": vision_flops(config, checkpoint.tower, size, lengths.frames),
        "compressor": slow_key_value_flops(config, lengths.slow),
        **{f"prefill_{name}": call_flops(config, call) for name, call in prefill_calls(config, lengths).items()},
    }
    return Plan(path, lengths, limits, flops, config.slow_fast.decode_mode, tuple(targets))


def choose_targets(name: str | None, jetpack: str | None = None) -> list[Target] | None:
    """Return the targets that a name stands for; None: this machine's CPU.

    Raises:
        InputError: an unknown name or JetPack, or this machine has a GPU that the table of targets does not have.
    """
    if jetpack is not None and name in (None, ALL, CPU):
        raise InputError("--jetpack needs a --target of its own.", "Name one, such as --target jetson-orin-agx-64.")
    if name == ALL:
        return [choices[0] for choices in load_targets().values()]
    if name == CPU:
        return None
    if name is not None:
        if name not in load_targets():
            known = ", ".join([*load_targets(), CPU, ALL])
            raise InputError(f"Unknown target {name!r}.", f"Choose one of {known}.")
        return [find_target(name, jetpack)]
    machine = detect_machine()
    here = match_machine(machine)
    if here is None and machine.gpus:
        raise InputError(f"The table of targets does not have this machine's {machine.gpus[0].name}.", "Use --target.")
    return [here] if here else None


def _check_frames(frames: int | None) -> None:
    if frames is not None:
        whole_number(frames, "--frames", maximum=MAX_FRAMES, hint="Change --frames.")


def _export(checkpoint: Checkpoint, out: Path, precision: str, frames: int | None) -> Bundle:
    return export(checkpoint, out, ExportOptions(frames=frames, weights="reference", precision=precision))


def _lengths(checkpoint: Checkpoint, frames: int) -> Lengths:
    config = checkpoint.config
    lengths = prompt_lengths(config, checkpoint.tower, checkpoint.image.crop, frames, BEFORE_TOKENS, QUESTION_TOKENS)
    longest = config.text.max_length
    if longest is not None and lengths.prompt > longest:
        raise InputError(
            f"{frames} frames make {lengths.fast:,} fast tokens with this checkpoint's strides; with "
            f"{lengths.before + lengths.question} tokens of text that is more than the {longest:,} positions the "
            "model takes.",
            "Use fewer --frames.",
        )
    return lengths


class _MemoryEstimates:
    """Memory estimates of the exported bundles, by width in bytes; each is computed once."""

    def __init__(self, bundles: dict[int, Bundle], limits: Limits) -> None:
        self._profiles = {width: resolve_profiles(bundle, limits) for width, bundle in bundles.items()}
        self._bundles = bundles
        self._known: dict[int, MemoryEstimate] = {}

    def of(self, storage: Storage, weights: dict[str, int], mapped: bool, parts: int) -> MemoryEstimate:
        """Estimate memory for a Storage.

        Args:
            weights: bytes by part.
            mapped: the parser maps the weights file.
            parts: engines that the decoder is split into.
        """
        width = storage.width
        if width not in self._known:
            self._known[width] = estimate_memory(self._bundles[width], self._profiles[width], mapped)
        found = self._known[width]
        found = with_quantized(found, weights, mapped) if storage.quantised else found
        return with_decoder_parts(found, parts, mapped)


def _on_target(checkpoint: Checkpoint, memory: _MemoryEstimates, lengths: Lengths, target: Target) -> TargetPlan:
    config, tower, size = checkpoint.config, checkpoint.tower, checkpoint.image.crop
    mapped = maps_weights(target.tensorrt)
    found = []
    for storage in storages(checkpoint.half_precision):
        weights = weight_bytes(config, tower, storage)
        needs = memory.of(storage, weights, mapped, min(target.split_decoder, config.text.num_layers))
        builds, answers = _builds_and_answers(needs, target)
        speed = estimate_speed(config, tower, size, lengths, storage, weights, target)
        found.append(Figures(storage, weights, needs, builds, answers, speed))
    return TargetPlan(target.name, target.jetpack, round(1e9 * target.memory_gb), efficiency_on(target), tuple(found))


def _builds_and_answers(memory: MemoryEstimate, target: Target) -> tuple[bool, bool]:
    """Check whether building and answering fit into the target's memory; a GPU host's memory is not known."""
    free = target.memory_gb - (SYSTEM_BYTES / 1e9 if target.shared_memory else 0)
    needs = memory_needs(memory, target.shared_memory, free, None)
    verdicts = {what: needed <= has for what, needed, has in needs if has is not None}
    builds, answers = (all(ok for what, ok in verdicts.items() if what.startswith(v)) for v in ("Build", "Answer"))
    return builds, answers


def _on_this_cpu(checkpoint: Checkpoint, bundle: Bundle, lengths: Lengths) -> TargetPlan:
    profiles = resolve_profiles(bundle, Limits(lengths.frames, lengths.before + lengths.question))
    size, found = physical_memory(), []
    for storage in CPU_STORAGES:
        memory = cpu_memory(checkpoint, bundle, profiles, storage, lengths.frames)
        builds, answers = (None if size is None else n <= size for n in (memory.build_host, memory.run))
        found.append(Figures(storage, cpu_weight_bytes(checkpoint, storage), memory, builds, answers, None))
    return TargetPlan(CPU, None, size, None, tuple(found))
