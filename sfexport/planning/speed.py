"""How long things would take on a target: FLOPs and bytes over its peak rates, times the fraction that is attained.

Computed, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfexport.checkpoint.config import DecodeMode, ModelConfig
from sfexport.checkpoint.vision_tower import Tower
from sfexport.machines.targets import Target
from sfexport.planning.flops import (
    Call,
    Lengths,
    Storage,
    call_bytes,
    call_flops,
    prefill_calls,
    slow_key_value_flops,
    vision_flops,
)


@dataclass(frozen=True)
class Efficiency:
    """Fractions of a target's peak rates.

    Attributes:
        bandwidth: while the decoder reads its weights, in a runtime that has kernels of its own for it.
        prefill, prefill_int4, vision: of the fp16 rate.
        plain_bandwidth: as bandwidth, of a plain ONNX graph that appends to its K/V by Concat, as sfexport's do.
    """

    bandwidth: float
    prefill: float
    prefill_int4: float
    vision: float
    plain_bandwidth: float = 0.27  # a published measurement: a model of 0.5 B in fp16 on an Orin Nano, TensorRT 10.3


# From published measurements of models of 7 to 8 B parameters (TensorRT-Edge-LLM 0.9: Qwen3-8B and Qwen3-VL-8B on AGX
# Orin, Orin NX and AGX Thor; TinyChat: Llama models on AGX Orin). Where a board has no figure of its own the AGX
# Orin's stands in; Thor's fp16 prefill is taken to attain what its fp16 vision does.
_PUBLISHED = {
    "jetson-orin-nx": Efficiency(bandwidth=0.90, prefill=0.45, prefill_int4=0.45, vision=0.47),
    "jetson-thor": Efficiency(bandwidth=0.87, prefill=0.28, prefill_int4=0.12, vision=0.28),
}
_ELSEWHERE = Efficiency(bandwidth=0.77, prefill=0.45, prefill_int4=0.43, vision=0.47)


def efficiency_on(target: Target) -> Efficiency:
    return next((e for name, e in _PUBLISHED.items() if target.name.startswith(name)), _ELSEWHERE)


@dataclass(frozen=True)
class Speed:
    """Seconds of the stages of a first question; None: the table of targets has no rate for this type.

    Attributes:
        vision: tower and projector. compressor: slow K/V. prefix: text before the video and the fast tokens.
        question: its own prefill.
        tokens_per_second: of the answer, in the model's decode mode, by Efficiency's bandwidth: the upper end.
        plain_tokens_per_second: by its plain_bandwidth: the lower end.
    """

    vision: float | None
    compressor: float | None
    prefix: float | None
    question: float | None
    tokens_per_second: float
    plain_tokens_per_second: float

    @property
    def first_token(self) -> float | None:
        """From decoded frames to the first token of the first answer."""
        return _total(self.vision, self.compressor, self.prefix, self.question)

    @property
    def second_question(self) -> float | None:
        """To the first token of every later answer about the video."""
        return self.question


def _total(*seconds: float | None) -> float | None:
    """Add up stages; None if one of them is unknown."""
    known = [stage for stage in seconds if stage is not None]
    return sum(known) if len(known) == len(seconds) else None


def estimate_speed(
    config: ModelConfig,
    tower: Tower,
    image_size: int,
    at: Lengths,
    storage: Storage,
    weights: Mapping[str, int],
    target: Target,
) -> Speed:
    """Args: `weights`: bytes by part, from cost.weight_bytes."""
    attained = efficiency_on(target)
    bandwidth = 1e9 * target.bandwidth_gbs * attained.bandwidth
    rate = 1e12 * target.fp16_tflops if storage.width == 2 else None
    share = attained.prefill_int4 if storage.quantised else attained.prefill

    def call_seconds(call: Call) -> float | None:
        """Of reading and computing the longer one."""
        reading = call_bytes(config, weights, call, storage.width) / bandwidth
        return None if rate is None else max(reading, call_flops(config, call) / (rate * share))

    before, fast, question = (call_seconds(call) for call in prefill_calls(config, at).values())
    slow = at.slow if config.slow_fast.decode_mode == DecodeMode.TRAINED else 0
    step = call_bytes(config, weights, Call(1, at.prompt, slow), storage.width) / bandwidth
    return Speed(
        vision=None if rate is None else vision_flops(config, tower, image_size, at.frames) / (rate * attained.vision),
        compressor=None if rate is None else slow_key_value_flops(config, at.slow) / (rate * attained.prefill),
        prefix=_total(before, fast),
        question=question,
        tokens_per_second=1 / step,
        plain_tokens_per_second=attained.plain_bandwidth / attained.bandwidth / step,
    )
