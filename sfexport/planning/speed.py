"""Estimate seconds and tokens per second on a target from FLOPs, bytes and the attained share of its peak rates.

Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

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
    """Attained fractions of a target's peak rates.

    Attributes:
        bandwidth: of the memory bandwidth, while a runtime with decoder kernels of its own reads the weights.
        prefill: of the fp16 rate, in prefill with 16-bit weights.
        prefill_int4: of the fp16 rate, in prefill with int4 weights.
        vision: of the fp16 rate, in vision tower and projector.
        plain_bandwidth: of the memory bandwidth, by a plain ONNX graph, which sfexport's are too.
        source: where `bandwidth`, `prefill` and `vision` come from.
    """

    bandwidth: float
    prefill: float
    prefill_int4: float
    vision: float
    source: str
    # Measured by others: a 0.5 B model in fp16 on an Orin Nano, TensorRT 10.3; its K/V are appended to by Concat.
    plain_bandwidth: float = 0.27

    def shares(self) -> dict[str, float]:
        """Return the fractions by name."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


# From published measurements of models of 7 to 8 B parameters (TensorRT-Edge-LLM 0.9: Qwen3-8B and Qwen3-VL-8B on AGX
# Orin, Orin NX and AGX Thor; TinyChat: Llama models on AGX Orin). A target without a published figure has the
# AGX Orin's. Thor's fp16 prefill is assumed to attain what its fp16 vision does.
_EDGE_LLM = "TensorRT-Edge-LLM 0.9 with its own kernels, published for "
_PLAIN = "plain ONNX graph in TensorRT 10.3, published for a 0.5 B model in fp16 on Orin Nano"
_PUBLISHED = {
    "jetson-orin-nx": Efficiency(
        bandwidth=0.90, prefill=0.45, prefill_int4=0.45, vision=0.47, source=_EDGE_LLM + "Orin NX"
    ),
    "jetson-thor": Efficiency(
        bandwidth=0.87, prefill=0.28, prefill_int4=0.12, vision=0.28, source=_EDGE_LLM + "AGX Thor"
    ),
}
_AGX_ORIN = Efficiency(
    bandwidth=0.77, prefill=0.45, prefill_int4=0.43, vision=0.47, source=f"TinyChat and {_EDGE_LLM}AGX Orin"
)


def efficiency_on(target: Target) -> Efficiency:
    """Choose the efficiency assumed on a target: its board's published one, else the AGX Orin's."""
    return next((e for name, e in _PUBLISHED.items() if target.name.startswith(name)), _AGX_ORIN)


def speed_sources(efficiency: Efficiency) -> dict[str, str]:
    """Return where both ends of the range of decode speeds, and the seconds, come from."""
    return {
        "tokens_per_second": f"computed at {efficiency.bandwidth:.0%} of the bandwidth: {efficiency.source}",
        "plain_tokens_per_second": f"computed at {efficiency.plain_bandwidth:.0%} of the bandwidth: {_PLAIN}",
        "seconds": f"computed with the efficiency of: {efficiency.source}",
    }


@dataclass(frozen=True)
class Speed:
    """Seconds of a first question's stages and the answer's tokens per second.

    Seconds are None where the table of targets has no rate for the dtype.

    Attributes:
        vision: seconds of tower and projector, all frames.
        compressor: seconds of the slow K/V.
        prefix: seconds of the prefill of the text before the video and of the fast tokens.
        question: seconds of the question's prefill.
        tokens_per_second: upper end, in the model's decode mode, at Efficiency.bandwidth.
        plain_tokens_per_second: lower end, at Efficiency.plain_bandwidth.
    """

    vision: float | None
    compressor: float | None
    prefix: float | None
    question: float | None
    tokens_per_second: float
    plain_tokens_per_second: float

    @property
    def first_token(self) -> float | None:
        """Seconds from decoded frames to the first token of the first answer; None: unknown."""
        return _total(self.vision, self.compressor, self.prefix, self.question)

    @property
    def second_question(self) -> float | None:
        """Seconds to the first token of every later answer about the video; None: unknown."""
        return self.question


def _total(*seconds: float | None) -> float | None:
    """Add up the seconds of stages; None if one of them is unknown."""
    known = [stage for stage in seconds if stage is not None]
    return sum(known) if len(known) == len(seconds) else None


def estimate_speed(
    config: ModelConfig,
    tower: Tower,
    image_size: int,
    lengths: Lengths,
    storage: Storage,
    weights: Mapping[str, int],
    target: Target,
) -> Speed:
    """Estimate the speed of a first question on a target.

    Args:
        image_size: side of a frame in pixels.
        lengths: frames and tokens of the prompt.
        weights: bytes by part, from flops.weight_bytes.
    """
    attained = efficiency_on(target)
    bandwidth = 1e9 * target.bandwidth_gbs * attained.bandwidth
    rate = 1e12 * target.fp16_tflops if storage.width == 2 else None
    share = attained.prefill_int4 if storage.quantised else attained.prefill

    def call_seconds(call: Call) -> float | None:
        """Estimate a call's seconds: the longer of reading and computing; None: no rate for the dtype."""
        reading = call_bytes(config, weights, call, storage.width) / bandwidth
        return None if rate is None else max(reading, call_flops(config, call) / (rate * share))

    before, fast, question = (call_seconds(call) for call in prefill_calls(config, lengths).values())
    slow = lengths.slow if config.slow_fast.decode_mode == DecodeMode.TRAINED else 0
    step = call_bytes(config, weights, Call(1, lengths.prompt, slow), storage.width) / bandwidth
    vision = vision_flops(config, tower, image_size, lengths.frames)
    return Speed(
        vision=None if rate is None else vision / (rate * attained.vision),
        compressor=None if rate is None else slow_key_value_flops(config, lengths.slow) / (rate * attained.prefill),
        prefix=_total(before, fast),
        question=question,
        tokens_per_second=1 / step,
        plain_tokens_per_second=attained.plain_bandwidth / attained.bandwidth / step,
    )
