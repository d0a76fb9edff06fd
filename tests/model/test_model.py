"""The PyTorch model beyond the goldens: loading, towers, training, batches, prompts without a video."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import GATING_TYPES, TOWER_PREFIX, ModelConfig
from sfexport.checkpoint.vision_tower import CONVNEXT_XXL, VIT_PREFIX, VitTower, read_tower
from sfexport.errors import CheckpointError, InputError
from sfexport.testing.random_checkpoint import demo_config, write_random_checkpoint
from sfexport.testing.tokenizer import train_tokenizer

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from sfexport.model import LlavaQwenSlowFastConfig, LlavaQwenSlowFastForCausalLM  # noqa: E402

UPSTREAM_KEYS = Path(__file__).parents[1] / "golden" / "upstream_7b_keys.json"
VIDEO = -200
CLIP = VitTower("clip", 64, 3, 2, 96, 14, 56, -2, 1e-5, "quick_gelu")
SIGLIP = VitTower("siglip", 48, 3, 3, 64, 14, 56, -2, 1e-6, "gelu_tanh")


def config_7b() -> dict:
    """The released 7B configuration's sizes."""
    return demo_config(train_tokenizer()) | {
        "cross_attn_every_n_layers": 8,
        "cross_attn_max_layer_depth": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "mm_hidden_size": 3072,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }


@pytest.fixture(scope="module")
def upstream_keys() -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in json.loads(UPSTREAM_KEYS.read_text()).items()}


def is_head(name: str) -> bool:
    return name.startswith(TOWER_PREFIX + "head.")


def test_the_7b_model_has_exactly_the_released_names_and_shapes(upstream_keys: dict) -> None:
    assert len(upstream_keys) == 743
    with torch.device("meta"):
        model = LlavaQwenSlowFastForCausalLM(LlavaQwenSlowFastConfig(**config_7b()))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert state == {name: shape for name, shape in upstream_keys.items() if not is_head(name)}


def test_the_7b_names_load_on_the_meta_device_with_none_missing_or_unexpected(upstream_keys: dict) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlavaQwenSlowFastConfig(**config_7b()))
        state = {name: torch.empty(shape) for name, shape in upstream_keys.items() if not is_head(name)}
    result = model.load_state_dict(state, strict=True, assign=True)
    assert not result.missing_keys
    assert not result.unexpected_keys


def test_the_tables_of_expected_tensors_agree_with_the_7b(upstream_keys: dict) -> None:
    config = ModelConfig.from_dict(config_7b())
    assert read_tower(config_7b(), upstream_keys) == CONVNEXT_XXL
    expected = config.expected_tensors() | CONVNEXT_XXL.expected_tensors()
    assert expected == {name: shape for name, shape in upstream_keys.items() if not is_head(name)}
    assert config.slow_fast.hybrid_layers == (0, 8, 16, 24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    write_random_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlavaQwenSlowFastForCausalLM:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def clip_of(frames: int, size: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(frames, 3, size, size)).astype(np.float32))


IDS = torch.tensor([[5, 6, 7, VIDEO, 8, 9, 10, 11]])


def test_auto_classes_know_the_model(checkpoint: Path, model: LlavaQwenSlowFastForCausalLM) -> None:
    assert isinstance(AutoConfig.from_pretrained(checkpoint), LlavaQwenSlowFastConfig)
    assert isinstance(model, LlavaQwenSlowFastForCausalLM)
    assert model.config.tower == Checkpoint.open(checkpoint).tower


def test_a_slow_branch_added_to_a_checkpoint_starts_closed(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "c", changes={"cross_attn_every_n_layers": None})
    config = AutoConfig.from_pretrained(tmp_path / "c")
    config.cross_attn_every_n_layers = 2
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "c", config=config, output_loading_info=True)
    gates = {n: p for n, p in model.named_parameters() if n.endswith("cross_attn_warm_up_gate")}
    assert set(gates) < set(info["missing_keys"])
    assert [gate.tolist() for gate in gates.values()] == [[0.0], [0.0]]


def test_layer_scale_may_be_called_gamma(checkpoint: Path, model, tmp_path: Path) -> None:
    state = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        state |= load_file(shard)
    renamed = {
        name.removesuffix("weight") + "gamma" if ".blocks." in name and name.count(".") == 7 else name: value
        for name, value in state.items()
    }
    assert sum(name.endswith(".gamma") for name in renamed) == sum(model.config.tower.depths)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    Checkpoint.open(tmp_path).validate()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    loaded.save_pretrained(tmp_path / "saved")
    Checkpoint.open(tmp_path / "saved").validate()


def test_saving_and_loading_keeps_the_model(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    Checkpoint.open(tmp_path).validate()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = (m(IDS, images=[clip_of(8)]).logits for m in (model, again))
    assert torch.equal(a, b)


@pytest.mark.parametrize("gating", GATING_TYPES)
@pytest.mark.parametrize("attention", ["text-only-vanilla-flashattn", "text-only-vanilla-masksystem", "vanilla"])
def test_every_variant_trains(gating: str, attention: str, tmp_path: Path) -> None:
    changes = {"cross_attn_gating_type": gating, "cross_attn_implementation": attention}
    write_random_checkpoint(tmp_path / "c", changes=changes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).train()
    labels = torch.tensor([[-100, -100, -100, -100, -100, 9, 10, 11]])
    loss = model(IDS, images=[clip_of(8)], labels=labels).loss
    loss.backward()
    attention_module = model.model.layers[0].self_attn
    assert torch.isfinite(loss)
    for name, parameter in attention_module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_masksystem_leaves_the_text_before_the_video_alone(tmp_path: Path) -> None:
    """With the slow branch off, only positions that attend may change in the first layer."""
    outs = {}
    for attention in ("text-only-vanilla", "text-only-vanilla-masksystem", "vanilla"):
        write_random_checkpoint(tmp_path / attention, changes={"cross_attn_implementation": attention})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / attention, dtype=torch.float32).eval()
        seen = []
        hook = model.model.layers[0].register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            merged, slow = model.prepare_multimodal(IDS, [clip_of(8)])
            args = {"inputs_embeds": merged.inputs_embeds, "position_ids": merged.position_ids}
            model(**args, slow_key_values=slow.key_values, slow_attends=slow.attends, slow_mask=slow.mask)
            model(**args)
        hook.remove()
        outs[attention] = (seen[0] != seen[1]).any(-1)[0].tolist()
    visual = outs["vanilla"].count(True) - 7
    assert outs["text-only-vanilla"] == [True] * 3 + [False] * visual + [True] * 4
    assert outs["text-only-vanilla-masksystem"] == [False] * (3 + visual) + [True] * 4
    assert outs["vanilla"] == [True] * (7 + visual)


def test_unknown_variants_are_refused(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    config.cross_attn_gating_type = "channel-wise-dynamic-sigmoid"
    with pytest.raises(CheckpointError, match="channel-wise-dynamic-sigmoid"):
        LlavaQwenSlowFastForCausalLM(config)


def test_left_padded_rows_answer_as_they_do_alone(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.config.tokenizer_padding_side = "left"
    videos = [clip_of(8, seed=1), clip_of(16, seed=2)]
    rows = [[5, VIDEO, 9, 10], [5, 6, 7, VIDEO, 8, 9]]
    for mode in ("released", "trained"):
        alone = [
            model.generate(torch.tensor([ids]), images=[v], decode_mode=mode, max_new_tokens=6, eos_token_id=None)
            for ids, v in zip(rows, videos, strict=True)
        ]
        padded = torch.tensor([[0, 0, *rows[0]], rows[1]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        both = model.generate(
            padded, images=videos, attention_mask=mask, decode_mode=mode, max_new_tokens=6, eos_token_id=None
        )
        assert torch.equal(both, torch.cat(alone))


def test_a_text_only_prompt_is_not_touched_by_an_earlier_video(model) -> None:
    text = torch.tensor([[5, 6, 7, 8]])
    before = model.generate(text, max_new_tokens=5, eos_token_id=None)
    with_video = model.generate(IDS, images=[clip_of(8)], max_new_tokens=5, eos_token_id=None)
    assert torch.equal(model.generate(text, max_new_tokens=5, eos_token_id=None), before)
    assert torch.equal(model.generate(IDS, images=[clip_of(8)], max_new_tokens=5, eos_token_id=None), with_video)
    dummy = model.generate(text, images=[torch.zeros(3, 128, 128)], max_new_tokens=5, eos_token_id=None)
    assert torch.equal(dummy, before)


def test_layers_keep_no_state(model) -> None:
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model.generate(IDS, images=[clip_of(4)], max_new_tokens=3)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_beams_and_several_answers_work(model) -> None:
    args = {"images": [clip_of(8)], "max_new_tokens": 4, "eos_token_id": None}
    for mode in ("released", "trained"):
        beams = model.generate(IDS, num_beams=3, num_return_sequences=2, decode_mode=mode, **args)
        assert beams.shape == (2, 4)


def test_modes_differ_only_after_the_first_token(model) -> None:
    args = {"images": [clip_of(8)], "max_new_tokens": 3, "eos_token_id": None}
    args |= {"output_logits": True, "return_dict_in_generate": True}
    released, trained = (model.generate(IDS, decode_mode=mode, **args).logits for mode in ("released", "trained"))
    assert torch.equal(released[0], trained[0])
    assert not torch.allclose(released[1], trained[1])


def test_truncation_warns_and_says_that_the_question_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_random_checkpoint(tmp_path / "c", changes={"tokenizer_model_max_length": 12})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).eval()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        logits = model(IDS, images=[clip_of(16)]).logits
    assert logits.shape[1] == 12
    assert "cut off" in caplog.text
    assert "the question among them" in caplog.text


@pytest.mark.parametrize(
    ("ids", "videos", "match"),
    [
        ([[1, VIDEO, VIDEO, 2]], 1, "one per prompt"),
        ([[1, VIDEO, 2]], 0, "no video was given"),
        ([[1, VIDEO, 2]], 2, "2 were given"),
    ],
)
def test_prompts_and_videos_must_fit(model, ids: list, videos: int, match: str) -> None:
    images = [clip_of(2)] * videos or None
    with pytest.raises(InputError, match=match):
        model(torch.tensor(ids), images=images)


def reference_features(tower: VitTower, path: Path, pixels: torch.Tensor) -> torch.Tensor:
    """transformers' own tower with all its layers: hidden_states[-2]."""
    sizes = {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "intermediate_size": tower.intermediate_size,
        "patch_size": tower.patch,
        "image_size": tower.image_size,
    }
    whole = CLIPVisionModel(CLIPVisionConfig(**sizes)) if tower.kind == "clip" else None
    whole = whole or SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **sizes))
    stored = {name: torch.from_numpy(t.rows()) for name, t in Checkpoint.open(path).tensors.items()}
    state = {n.removeprefix(VIT_PREFIX): v for n, v in stored.items() if n.startswith(VIT_PREFIX)}
    missing, unexpected = getattr(whole, "vision_model", whole).load_state_dict(state, strict=False)
    assert all("post_layernorm" in name or "position_ids" in name for name in missing)
    assert not unexpected
    with torch.no_grad():
        hidden = whole.eval()(pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == tower.num_layers + 1
    return hidden[-2][:, 1:] if tower.kind == "clip" else hidden[-2]


@pytest.mark.parametrize(("tower", "name"), [(CLIP, "openai/clip-vit-x"), (SIGLIP, "google/siglip-x")])
def test_vit_towers_give_transformers_second_last_hidden_state(tower: VitTower, name: str, tmp_path: Path) -> None:
    heads = {"mm_vision_tower": name, "mm_vision_num_attention_heads": tower.num_heads}
    write_random_checkpoint(tmp_path / "c", tower=tower, changes=heads)
    assert Checkpoint.open(tmp_path / "c").tower == tower
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    pixels = clip_of(3, tower.image_size)
    with torch.no_grad():
        features = model.eval().model.vision_tower(pixels)
    torch.testing.assert_close(features, reference_features(tower, tmp_path / "c", pixels), atol=1e-5, rtol=1e-5)
