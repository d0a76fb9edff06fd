"""The PyTorch model's generate against the same tokens computed whole, without a cache, by a plain forward call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfexport.errors import InputError
from sfexport.testing.random_checkpoint import write_random_checkpoint

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from sfexport.model import LlavaQwenSlowFastForCausalLM  # noqa: E402
from sfexport.model.merging import VIDEO_TOKEN as VIDEO  # noqa: E402

STEPS = 5
MODES = ("released", "trained")
# Prompts of different lengths, the last without a video.
ROWS = [[5, VIDEO, 9, 10], [5, 6, 7, VIDEO, 8, 9], [5, 6, 7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlavaQwenSlowFastForCausalLM:
    path = tmp_path_factory.mktemp("generation") / "checkpoint"
    write_random_checkpoint(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def clip_of(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(frames, 3, 128, 128)).astype(np.float32))


def batch(padding_side: str = "left") -> dict[str, Any]:
    """The three rows with padding: input_ids, attention_mask and images."""
    longest = max(map(len, ROWS))
    ids = torch.zeros(len(ROWS), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(ROWS):
        where = slice(longest - len(row), longest) if padding_side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), 1
    return {"inputs": ids, "attention_mask": mask, "images": [clip_of(8, 1), clip_of(16, 2), None]}


def generate(model: LlavaQwenSlowFastForCausalLM, mode: str, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, STEPS] and the logits they were chosen from, [B, STEPS, V]."""
    args = batch() | {"decode_mode": mode, "max_new_tokens": STEPS, "eos_token_id": None, "do_sample": False} | changes
    out = model.generate(**args, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, dim=1)


@torch.no_grad()
def logits_without_cache(model: LlavaQwenSlowFastForCausalLM, mode: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the last prompt position and of all tokens but the last, from one call over all positions."""
    args = batch()
    prompt, slow = model.prepare_multimodal(args["inputs"], args["images"], args["attention_mask"], padding_side="left")
    fed = tokens[:, :-1]
    attends = torch.full(fed.shape, mode == "trained")
    out = model(
        inputs_embeds=torch.cat([prompt.inputs_embeds, model.model.embed_tokens(fed)], dim=1),
        attention_mask=torch.cat([prompt.attention_mask, torch.ones_like(attends)], dim=1),
        slow_key_values=slow.key_values,
        slow_attends=torch.cat([slow.attends, attends], dim=1),
        slow_mask=slow.mask,
        use_cache=False,
    )
    return out.logits[:, -tokens.shape[1] :]


def assert_generates_right(model: LlavaQwenSlowFastForCausalLM, mode: str, **changes: Any) -> None:
    tokens, logits = generate(model, mode, **changes)
    expected = logits_without_cache(model, mode, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, expected.argmax(-1))


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_a_call_without_cache(model, mode: str) -> None:
    assert_generates_right(model, mode)


@pytest.mark.parametrize("mode", MODES)
def test_use_cache_false_gives_the_same(model, mode: str) -> None:
    assert_generates_right(model, mode, use_cache=False)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_of_fixed_size_gives_the_same_or_is_refused(model, mode: str) -> None:
    """transformers 5.0's is told where to write in a way that later versions do not have."""
    try:
        assert_generates_right(model, mode, cache_implementation="static")
    except InputError as error:
        assert "StaticCache" in str(error)


@pytest.mark.parametrize("mode", MODES)
def test_sampled_tokens_are_those_drawn_from_a_call_without_cache(model, mode: str) -> None:
    torch.manual_seed(3)
    tokens, logits = generate(model, mode, do_sample=True, temperature=0.7, top_k=0)
    expected = logits_without_cache(model, mode, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.manual_seed(3)
    drawn = [torch.multinomial((expected[:, i] / 0.7).softmax(-1), 1) for i in range(STEPS)]
    assert torch.equal(tokens, torch.cat(drawn, dim=1))


class Forgetful(DynamicCache):
    """Remembers how much it was given and gives back zeros for all but the newest positions of hybrid layers."""

    layers_to_forget: tuple[int, ...] = ()

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key, value, layer, *args, **kwargs)
        if layer in self.layers_to_forget:
            keys, values = keys.clone(), values.clone()
            keys[:, :, : -key.shape[2]] = values[:, :, : -key.shape[2]] = 0
        return keys, values


class Dropping(DynamicCache):
    """Gives back the newest positions only, as a layer without a cache would have them."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        super().update(key, value, layer, *args, **kwargs)
        return key, value


@pytest.mark.parametrize("mode", MODES)
def test_the_comparison_finds_a_cache_that_forgets(model, mode: str) -> None:
    cache = Forgetful()
    assert_generates_right(model, mode, past_key_values=cache)
    cache = Forgetful()
    cache.layers_to_forget = model.config.model_config.slow_fast.hybrid_layers
    with pytest.raises(AssertionError):
        assert_generates_right(model, mode, past_key_values=cache)


def test_a_cache_that_drops_positions_is_refused(model) -> None:
    with pytest.raises(InputError, match="gave back 1 positions"):
        generate(model, "released", past_key_values=Dropping())


@contextmanager
def counted_positions(model: LlavaQwenSlowFastForCausalLM) -> Iterator[list[int]]:
    """The positions that the last layer computes, call by call."""
    seen: list[int] = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    yield seen
    hook.remove()


def test_each_step_computes_one_position(model) -> None:
    with counted_positions(model) as seen:
        generate(model, "trained")
    assert seen[1:] == [1] * (STEPS - 1) and seen[0] > 10


@pytest.mark.parametrize("name", ["cache", "past_key_values", "kv_of_a_later_release"])
def test_a_cache_is_known_by_its_type(model, name: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache()
        model(ids[:, :3], **{name: cache})
        assert cache.get_seq_length() == 3
        rest = model(ids[:, 3:], **{name: cache}).logits
    torch.testing.assert_close(rest, whole[:, 3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_rows_answer_as_they_do_alone_whatever_the_side_of_the_padding(model, mode: str) -> None:
    args = {"decode_mode": mode, "max_new_tokens": STEPS, "eos_token_id": None, "do_sample": False}
    images = batch()["images"]
    alone = [
        model.generate(torch.tensor([row]), images=None if video is None else [video], **args)
        for row, video in zip(ROWS, images, strict=True)
    ]
    for side in ("left", "right"):
        assert torch.equal(model.generate(**batch(side), **args), torch.cat(alone))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"past_key_values": "full"}, "empty cache"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"output_attentions": True}, "attention weights"),
        ({"decode_mode": "other"}, "decode mode"),
    ],
)
def test_what_generate_cannot_do_is_refused(model, arguments: dict[str, Any], match: str) -> None:
    if "past_key_values" in arguments:
        cache = DynamicCache()
        model(torch.tensor([[5, 6]]), past_key_values=cache)
        arguments = {"past_key_values": cache}
    with pytest.raises(InputError, match=match):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, **arguments)


def test_a_mask_that_does_not_cover_the_cache_is_refused(model) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        with pytest.raises(InputError, match="covers 1 positions; the cache holds 3"):
            model(torch.tensor([[8]]), attention_mask=torch.ones(1, 1), past_key_values=cache)
        with pytest.raises(InputError, match="belong to a prompt"):
            model(torch.tensor([[8]]), images=[clip_of(2)], past_key_values=cache)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "c")
    labels = torch.tensor([[-100, -100, -100, -100, 9, 10]])
    found = []
    for is_checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).train()
        if is_checkpointing:
            model.gradient_checkpointing_enable()
        out = model(torch.tensor([[5, 6, VIDEO, 8, 9, 10]]), images=[clip_of(4)], labels=labels)
        out.loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_the_loss_is_the_sum_over_the_items_of_a_step(model) -> None:
    args = {"images": [clip_of(4)], "labels": torch.tensor([[-100, -100, -100, -100, 9, 10]])}
    ids = torch.tensor([[5, 6, VIDEO, 8, 9, 10]])
    with torch.no_grad():
        mean, shared = model(ids, **args).loss, model(ids, **args, num_items_in_batch=8).loss
    torch.testing.assert_close(shared, mean * 2 / 8)
