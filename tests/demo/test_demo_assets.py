"""The demo's assets: the random checkpoint, its tokenizer and the clip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from drawn_clip import draw_frames, write_clip
from tokenizers import Tokenizer

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo import clip as clip_module
from sfexport.dtypes import Precision
from sfexport.errors import InputError
from sfexport.testing.random_checkpoint import save_safetensors_bf16, write_random_checkpoint

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "What colour is the 2nd circle?<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = [
    PROMPT,
    "It's what we'LL do: 12345!!!\n\n\n  a \t\r\n  b  ",
    "Größe, 日本語, مرحبا, 👩‍👩‍👧, \x00\x01\x7f\u200b\ufeff",
    "",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "new" / "checkpoint"
    write_random_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def test_checkpoint_is_valid_and_small(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    opened.validate()
    assert set(opened.tensors) == set(opened.expected_tensors()) | set(opened.unused_tensors())
    assert len(opened.unused_tensors()) == 4
    assert {tensor.dtype for tensor in opened.tensors.values()} == {"BF16"}
    assert sum(map(len, contents(checkpoint).values())) < 2_000_000


def test_checkpoint_has_the_architecture_asked_for(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    config = opened.config
    assert config.slow_fast.hybrid_layers == (0, 2)
    assert 16 // config.slow_fast.fast.temporal_stride == 4 == config.slow_fast.fast.min_frames
    assert opened.tower.depths == (1, 1, 2, 1)
    assert opened.image.size == opened.image.crop == 128
    assert opened.tower.grid(opened.image.crop) == 4


def test_index_and_shards_agree(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    opened = Checkpoint.open(checkpoint)
    assert sorted(file.name for file in checkpoint.glob("*.safetensors")) == SHARDS
    assert index["weight_map"] == {tensor.name: tensor.shard.name for tensor in opened.tensors.values()}
    assert index["metadata"]["total_size"] == sum(tensor.length for tensor in opened.tensors.values())
    assert max(shard.size for shard in opened.shards) < 400_000


def test_safetensors_library_reads_the_shards(checkpoint: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    opened = Checkpoint.open(checkpoint)
    for name in SHARDS:
        with safetensors.safe_open(str(checkpoint / name), framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                assert tuple(file.get_slice(key).get_shape()) == opened.tensors[key].shape


def test_weights_are_finite_and_gates_stand_open(checkpoint: Path) -> None:
    tensors = Checkpoint.open(checkpoint).tensors
    assert all(np.isfinite(tensor.rows()).all() for tensor in tensors.values())
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.self_attn.cross_attn_"
        assert tensors[prefix + "warm_up_gate"].rows() == pytest.approx(0.8, abs=0.01)
        assert abs(tensors[prefix + "gate_proj.0.bias"].rows()[0]) > 0.1


def test_padding_of_the_vocabulary_gets_no_logit(checkpoint: Path, tokenizer: Tokenizer) -> None:
    opened = Checkpoint.open(checkpoint)
    size = opened.config.text.vocab_size
    assert size % 64 == 0 and 0 < size - tokenizer.get_vocab_size() <= 64
    head = opened.tensors["lm_head.weight"].rows()
    assert np.flatnonzero(~head.any(axis=1)).tolist() == list(range(tokenizer.get_vocab_size(), size))


def test_same_seed_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    # In another process, so that nothing hangs on its hash seed.
    code = "import sys, pathlib; from sfexport.testing.random_checkpoint import write_random_checkpoint as w; "
    code += "w(pathlib.Path(sys.argv[1])); assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, cwd=root)
    assert contents(tmp_path / "again") == contents(checkpoint)


def test_another_seed_other_weights(checkpoint: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "other", seed=1)
    one, other = contents(checkpoint), contents(tmp_path / "other")
    assert sorted(name for name in one if one[name] != other[name]) == SHARDS
    assert one.keys() == other.keys()


def test_existing_empty_directory_is_filled(checkpoint: Path, tmp_path: Path) -> None:
    before = tmp_path.stat().st_ino
    write_random_checkpoint(tmp_path)
    assert tmp_path.stat().st_ino == before
    assert contents(tmp_path) == contents(checkpoint)


def test_directory_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty") as caught:
        write_random_checkpoint(target)
    assert str(target) in str(caught.value) and caught.value.hint
    assert contents(tmp_path) == {"taken/notes.txt": b"mine"}


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as caught:
            write_random_checkpoint(target)
        assert caught.value.hint
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sfexport.testing.random_checkpoint.save_safetensors_bf16", fail)
    with pytest.raises(InputError, match="disk full"):
        write_random_checkpoint(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# --- bfloat16


def test_bf16_rounds_to_nearest_ties_to_even() -> None:
    step = 2.0**-7  # between 1 and 2
    values = np.array([1.0, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, 1 + 0.49 * step, -1 - 1.5 * step, 0.0])
    back = Precision.BF16.to_float32(Precision.BF16.from_float32(values.astype(np.float32)))
    assert back.tolist() == [1.0, 1.0, 1 + 2 * step, 1 + step, 1.0, -1 - 2 * step, 0.0]


def test_bf16_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal((64, 65)).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(Precision.BF16.from_float32(values).view(np.uint16), expected)


def test_save_safetensors_bf16_keeps_shapes(tmp_path: Path) -> None:
    tensors = {"b": np.zeros((2, 3, 4), np.float32), "a": np.ones((1,), np.float32)}
    save_safetensors_bf16(tmp_path / "t.safetensors", tensors)
    data = (tmp_path / "t.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and len(data) == 8 + length + 2 * 25
    assert header["b"] == {"dtype": "BF16", "shape": [2, 3, 4], "data_offsets": [2, 50]}


# --- tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


def test_tokenizer_normalises_to_nfc(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(encode(tokenizer, "e\u0301")) == "\u00e9"


def test_special_tokens_are_one_id_after_the_ordinary_ones(tokenizer: Tokenizer, checkpoint: Path) -> None:
    ordinary = tokenizer.get_vocab_size(with_added_tokens=False)
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [encode(tokenizer, token) for token in tokens] == [[ordinary], [ordinary + 1], [ordinary + 2]]
    assert tokenizer.decode([ordinary, ordinary + 1, ordinary + 2]) == ""
    config = Checkpoint.open(checkpoint).raw_config
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert config["bos_token_id"] == config["pad_token_id"] == generation["pad_token_id"] == ordinary
    assert config["eos_token_id"] == ordinary + 2
    assert generation["eos_token_id"] == [ordinary + 2, ordinary]


def test_tokenizer_learned_words_and_splits_digits(tokenizer: Tokenizer) -> None:
    assert len(encode(tokenizer, " video")) == 1
    assert len(encode(tokenizer, "2024")) == 4
    assert len(encode(tokenizer, PROMPT)) < len(PROMPT) / 2


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(checkpoint)
    for text in [*TEXTS, "e\u0301"]:
        ids = encode(tokenizer, text)
        assert fast(text)["input_ids"] == ids
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    assert (auto.eos_token, auto.pad_token, auto.model_max_length) == ("<|im_end|>", "<|endoftext|>", 1024)
    assert len(auto) == tokenizer.get_vocab_size()


# --- clip


def decode(file: Path) -> list[av.VideoFrame]:
    with av.open(str(file)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize("encoder", [None, ("mpeg4", {"b": "2000000"})], ids=["best", "mpeg4"])
def test_clip_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: tuple | None) -> None:
    if encoder:
        monkeypatch.setattr(clip_module, "_encoder", lambda: encoder)
    file = tmp_path / "new" / "clip.mp4"
    write_clip(file, seconds=1.5, fps=12, size=(96, 64))
    frames = decode(file)
    assert len(frames) == 18
    assert {(frame.width, frame.height, frame.format.name) for frame in frames} == {(96, 64, "yuv420p")}
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 12]
    assert frames[-1].time == pytest.approx(17 / 12, abs=1e-3)
    assert [entry.name for entry in file.parent.iterdir()] == ["clip.mp4"]
    drawn = list(draw_frames(18, 12, (96, 64)))
    for frame, picture in zip(frames, drawn, strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - picture).mean() < 12


def test_clip_is_deterministic_and_depends_on_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_clip(tmp_path / f"{name}.mp4", seconds=0.5, size=(64, 48), seed=seed)
    one, same, other = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert one == same != other


@pytest.mark.parametrize("name", ["clip", "clip.zzz", "clip.webm"])
def test_clip_refuses_an_unknown_container(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        write_clip(tmp_path / name, seconds=0.5, size=(64, 48))
    assert ".mp4" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
