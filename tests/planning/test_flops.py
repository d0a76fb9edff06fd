"""The formulas of planning/flops.py against torch's own counter, the paper's setting and what a quantised bundle holds.

FlopCounterMode has no entry for the CPU's fused attention, so attention runs as plain products here. It counts
nothing but matrix products and convolutions, and neither do the formulas: they must agree to the last FLOP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import ModelConfig
from sfexport.checkpoint.vision_tower import CONVNEXT_XXL, ConvNextTower, Tower, VitTower
from sfexport.exporting.weights_layout import layout_weights
from sfexport.planning.flops import (
    PARTS,
    Call,
    Lengths,
    Storage,
    call_bytes,
    call_flops,
    decoder_flops,
    prefill_calls,
    projector_flops,
    prompt_lengths,
    slow_key_value_bytes,
    slow_key_value_flops,
    storages,
    text_key_value_bytes,
    tower_flops,
    vision_flops,
    weight_bytes,
)
from sfexport.testing.random_checkpoint import TOWER, demo_config, write_random_checkpoint
from sfexport.testing.tokenizer import train_tokenizer

KEYS: dict[str, list[int]] = json.loads((Path(__file__).parents[1] / "golden/upstream_7b_keys.json").read_text())
WIDE = ConvNextTower(depths=(2, 1), widths=(8, 24), stem_patch=8, kernel=5)
CLIP = VitTower("clip", 32, 3, 4, 48, 8, 64, -2, 1e-5, "quick_gelu")
SIGLIP = VitTower("siglip", 24, 2, 2, 56, 16, 96, -1, 1e-6, "gelu_tanh")
TOWERS = [(TOWER, 128), (WIDE, 104), (CLIP, 64), (SIGLIP, 96)]
NAMES = {"convnext": "convnext-576", "clip": "openai/clip-tiny", "siglip": "google/siglip-tiny"}


def make_model(tower: Tower = TOWER, **changes: Any) -> Any:
    """The PyTorch model of the demo's size and its model_config."""
    pytest.importorskip("torch")
    from sfexport.model.configuration import LlavaQwenSlowFastConfig
    from sfexport.model.modeling import LlavaQwenSlowFastForCausalLM

    config = demo_config(train_tokenizer()) | {"mm_hidden_size": tower.out_size, "mm_vision_tower": NAMES[tower.kind]}
    config = LlavaQwenSlowFastConfig(**(config | changes))
    config.set_tower(tower)
    return LlavaQwenSlowFastForCausalLM(config).eval()


def count(call: Callable[[], Any]) -> int:
    """FLOPs as torch counts them, with attention as plain products."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("tower", "size"), TOWERS, ids=lambda x: getattr(x, "kind", x))
def test_tower(tower: Tower, size: int) -> None:
    torch = pytest.importorskip("torch")
    vision = make_model(tower).model.vision_tower
    assert count(lambda: vision(torch.zeros(3, 3, size, size))) == 3 * tower_flops(tower, size)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "mlp3x_srelu", "linear", "identity"])
def test_projector(kind: str) -> None:
    torch = pytest.importorskip("torch")
    hidden = {"mm_hidden_size": 64} if kind == "identity" else {}
    model = make_model(mm_projector_type=kind, **hidden)
    model_config = model.config.model_config
    features = torch.zeros(2, 5, model_config.projector.in_size)
    assert count(lambda: model.model.mm_projector(features)) == projector_flops(model_config, 10)


def test_vision_is_tower_and_projector() -> None:
    torch = pytest.importorskip("torch")
    model = make_model()
    video = torch.zeros(3, 3, 128, 128)
    # Pooling and means are not counted.
    assert count(lambda: model.model.encode_videos([video])) == vision_flops(model.config.model_config, TOWER, 128, 3)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_slow_key_values(every: int) -> None:
    torch = pytest.importorskip("torch")
    model = make_model(cross_attn_every_n_layers=every)
    slow = torch.zeros(1, 40, 64)
    assert count(lambda: model.model.slow_key_values(slow)) == slow_key_value_flops(model.config.model_config, 40)


def run_decoder(model: Any, positions: int, past: int, slow: int) -> Callable[[], Any]:
    """A call of the decoder, ready to be counted."""
    import torch

    text = model.config.model_config.text
    given: dict[str, Any] = {}
    if slow:
        layers = len(model.config.model_config.slow_fast.hybrid_layers)
        shape = (1, layers, 2, text.num_kv_heads, slow, text.head_dim)
        attends, mask = torch.ones(1, positions, dtype=torch.bool), torch.ones(1, slow, dtype=torch.bool)
        given = {"slow_key_values": torch.zeros(shape), "slow_attends": attends, "slow_mask": mask}
    if past:
        with torch.no_grad():
            before = model(inputs_embeds=torch.zeros(1, past, text.hidden_size), use_cache=True)
        given["past_key_values"] = before.past_key_values
    embeds = torch.zeros(1, positions, text.hidden_size)
    mask = torch.ones(1, past + positions, dtype=torch.bool)
    return lambda: model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **given)


@pytest.mark.parametrize("shape", [{}, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}])
@pytest.mark.parametrize("slow", [0, 50])
@pytest.mark.parametrize(("positions", "past"), [(30, 0), (9, 21), (1, 30)])
def test_decoder(positions: int, past: int, slow: int, shape: dict[str, int]) -> None:
    model = make_model(**shape)
    counted = count(run_decoder(model, positions, past, slow))
    model_config = model.config.model_config
    assert counted == decoder_flops(model_config, positions, past, slow, logits=positions).total
    # PyTorch computes the cross-attention of every row; a session asks for those that attend.
    fewer = decoder_flops(model_config, positions, past, slow, rows=0, logits=positions)
    assert fewer.cross_attention == 0 and (fewer.total < counted) == bool(slow)


def test_a_model_without_slow_branch() -> None:
    model = make_model(cross_attn_every_n_layers=None)
    model_config = model.config.model_config
    assert count(run_decoder(model, 12, 5, 0)) == decoder_flops(model_config, 12, 5, logits=12).total
    assert decoder_flops(model_config, 12, 5, slow=100) == decoder_flops(model_config, 12, 5)
    at = prompt_lengths(model_config, TOWER, 128, 16, 10, 10)
    assert at.slow == slow_key_value_flops(model_config, 100) == slow_key_value_bytes(model_config, 100, 2) == 0


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        from sparse_checkpoint import QWEN2_7B
    return ModelConfig.from_dict(QWEN2_7B)


def test_the_released_model(released: ModelConfig) -> None:
    """Figures that were counted on the reference implementation itself, in TFLOP."""
    assert tower_flops(CONVNEXT_XXL, 576) / 1e12 == pytest.approx(2.004, abs=5e-4)
    assert projector_flops(released, 64 * 324) / 1e12 == pytest.approx(0.99, abs=5e-3)
    assert decoder_flops(released, 1396, logits=1396).total / 1e12 == pytest.approx(20.5225, abs=5e-5)
    assert slow_key_value_flops(released, 64 * 81) / 1e12 == pytest.approx(0.152, abs=5e-4)
    assert decoder_flops(released, 1396, slow=64 * 81, rows=100).cross_attention / 1e12 == pytest.approx(0.03, abs=5e-4)
    at = prompt_lengths(released, CONVNEXT_XXL, 576, 64, 14, 86)
    assert at == Lengths(frames=64, before=14, fast=1296, question=86, slow=5184) and at.prompt == 1396
    assert prompt_lengths(released, CONVNEXT_XXL, 576, 1, 14, 86).slow == 324


def test_weights_of_the_released_model(released: ModelConfig) -> None:
    fp32, half, int4, int8_head = (weight_bytes(released, CONVNEXT_XXL, s) for s in storages("bf16"))
    everything = sum(math.prod(shape) for name, shape in KEYS.items() if ".head." not in name)
    assert set(fp32) == set(PARTS)
    assert sum(half.values()) == 2 * everything
    assert sum(fp32.values()) == 4 * everything - half["embedding"]  # which stays in 16 bits
    # A decode step reads these GB (INT4 in blocks of 128, 16-bit scales).
    steps = [call_bytes(released, w, Call(1, 0, 0), 2) / 1e9 for w in (half, int4, int8_head)]
    assert steps == pytest.approx([14.14, 4.45, 3.91], abs=0.01)
    for part in ("tower", "projector", "compressor"):
        assert half[part] == int4[part] == int8_head[part]


def test_key_values_of_the_released_model(released: ModelConfig) -> None:
    assert text_key_value_bytes(released, 1, 2) == 57_344
    assert slow_key_value_bytes(released, 1, 2) == 8_192


@pytest.mark.parametrize("attends", ["text-only-vanilla", "text-only-vanilla-masksystem", "vanilla"])
def test_calls_of_a_session(attends: str) -> None:
    config = demo_config(train_tokenizer()) | {"cross_attn_implementation": attends}
    model_config = ModelConfig.from_dict(config)
    at = Lengths(16, before=14, fast=64, question=30, slow=256)
    calls = prefill_calls(model_config, at)
    assert [c.positions for c in calls.values()] == [14, 64, 30] and [c.past for c in calls.values()] == [0, 14, 78]
    with_slow = {name for name, call in calls.items() if call.slow}
    expected = {"vanilla": {"before", "fast", "question"}, "text-only-vanilla": {"before", "question"}}
    assert with_slow == expected.get(attends, {"question"})
    whole = decoder_flops(
        model_config, at.prompt, slow=at.slow, rows=sum(c.positions for c in calls.values() if c.slow)
    )
    pieces = sum(call_flops(model_config, call) for call in calls.values())
    # In pieces no position looks at later pieces, and two more last positions have logits.
    head = decoder_flops(model_config, 1).head
    later = 4 * 64 * 4 * (14 * (64 + 30) + 64 * 30)
    assert pieces == whole.total + 2 * head - later


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_size": 192, "intermediate_size": 320}, {"intermediate_size": 100}, {"tie_word_embeddings": True}],
)
@pytest.mark.parametrize(("head", "head_bits"), [("fp16", 16), ("int8", 8)])
def test_int4_is_what_a_quantised_bundle_holds(
    tmp_path: Path, head: str, head_bits: int, changes: dict[str, Any]
) -> None:
    write_random_checkpoint(tmp_path / "checkpoint", changes=changes)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    layout = layout_weights(checkpoint, tmp_path, "BF16", head)
    stored = {name: place.length for name, place in layout.places.items()}
    ours = weight_bytes(checkpoint.config, checkpoint.tower, Storage("int4", 2, 4, head_bits))
    if checkpoint.config.text.tie_word_embeddings and head == "fp16":
        ours["embedding"] = 0  # the same bytes as the head
    assert sum(ours.values()) == sum(stored.values())


def test_more_frames_cost_what_the_paper_says(monkeypatch: pytest.MonkeyPatch, released: ModelConfig) -> None:
    """16 to 128 frames for about 2 % more prefill; all frames in self-attention: more than nine times as much."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import frames

    base, _ = frames.prompt_flops(released, frames.all_frames_lengths(16))
    slow_fast = [sum(frames.prompt_flops(released, frames.slow_fast_lengths(n))) / base for n in (16, 128, 1536)]
    assert slow_fast == pytest.approx([1.002, 1.019, 1.23], abs=1e-3)
    assert frames.prompt_flops(released, frames.all_frames_lengths(128))[0] / base == pytest.approx(9.5, abs=0.01)
    rows = frames.computed_table(released)
    assert len(rows) == 2 + len(frames.FRAMES) and all(row.count("|") == 7 for row in rows)


def test_the_plot_is_an_svg_with_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from frames_plot import HEIGHT, WIDTH, Line, draw

    lines = [Line("a < b", "#000", [(16, 1.0), (128, 1.02)], points=True), Line("c", "#111", [(16, 1.0), (128, 9.5)])]
    root = ElementTree.fromstring(draw(lines, "frames", "times"))
    tag = "{http://www.w3.org/2000/svg}"
    (left, low), (right, high), _ = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{tag}circle")]
    assert 0 < left < right < WIDTH and 0 < high < low < HEIGHT
    assert "a < b" in [text.text for text in root.iter(f"{tag}text")]
