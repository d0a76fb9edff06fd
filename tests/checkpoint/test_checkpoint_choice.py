"""Which files and tensors of a checkpoint are used: those that transformers loads, and a line on every other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    FIRST,
    INDEX,
    SECOND,
    assert_says,
    change_tensors,
    document,
    edit_json,
    read_tensors,
    refusal,
    set_fields,
    sfexport,
    write_tensors,
)

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths as Tree
from sfexport.dtypes import Precision
from sfexport.engines.interface import DecoderStep
from sfexport.engines.onnxruntime_backend import OnnxRuntimeBackend
from sfexport.errors import CheckpointError
from sfexport.exporting.export import ExportOptions, export
from sfexport.testing.random_checkpoint import write_random_checkpoint

SINGLE = "model.safetensors"
LAYER = "model.layers.1.self_attn."
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def bf16(*shape: int, seed: int = 0) -> tuple[str, list[int], bytes]:
    """A random tensor as `change_tensors` takes it."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return "BF16", list(shape), Precision.BF16.from_float32(values).tobytes()


def as_one_file(checkpoint: Path, out: Path) -> None:
    """All tensors of a checkpoint in two shards, in one file."""
    write_tensors(out, read_tensors(checkpoint / FIRST) | read_tensors(checkpoint / SECOND))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: a checkpoint without slow branch, which Qwen2 itself can load."""
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    write_random_checkpoint(folder, changes={"cross_attn_every_n_layers": None})
    for shard in (FIRST, SECOND):
        change_tensors(folder / shard, lambda ts: [ts.pop(name) for name in list(ts) if "cross_attn" in name])
    return folder


@pytest.fixture
def checkpoint(plain: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(plain, tmp_path / "checkpoint"))


def transformers_logits(checkpoint: Path, embeds: np.ndarray) -> np.ndarray:
    """What transformers' own Qwen2 makes of the checkpoint's files."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    copy = Path(shutil.copytree(checkpoint, checkpoint.with_name("qwen2"), symlinks=True))
    set_fields(copy / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    model = transformers.Qwen2ForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(inputs_embeds=torch.from_numpy(embeds)).logits[0, -1].numpy()


def our_logits(checkpoint: Path, weights: str, embeds: np.ndarray) -> np.ndarray:
    out = checkpoint.with_name(f"bundle-{weights}")
    bundle = export(Checkpoint.open(checkpoint), out, ExportOptions(weights=weights))
    backend = OnnxRuntimeBackend(bundle.path, bundle.weights_directory, bundle.config)
    return backend.decode(DecoderStep(embeds, np.ones(embeds.shape[1], dtype=bool)))[0][0]


def two_sets(checkpoint: Path) -> None:
    """A whole single file of another model beside the index and its shards."""
    other = checkpoint.with_name("other")
    write_random_checkpoint(other, seed=1, changes={"cross_attn_every_n_layers": None})
    as_one_file(other, checkpoint / SINGLE)


def single_file_and_absent_shards(checkpoint: Path) -> None:
    two_sets(checkpoint)
    (checkpoint / FIRST).unlink()
    (checkpoint / SECOND).unlink()


def dangling_single_file(checkpoint: Path) -> None:
    (checkpoint / SINGLE).symlink_to("gone")


def other_weights(checkpoint: Path) -> None:
    """Files that stand beside weights and are none."""
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "training_args.bin"):
        (checkpoint / name).write_bytes(b"never opened")


def map_tells_another_shard(checkpoint: Path) -> None:
    """Shards are read whole, whatever the index says of their tensors."""
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update({HEAD: SECOND, TABLE: SECOND}))


def map_leaves_tensors_out(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, lambda index: [index["weight_map"].pop(name) for name in (HEAD, TABLE)])


def tied_with_another_head(checkpoint: Path) -> None:
    set_fields(checkpoint / "config.json", tie_word_embeddings=True)


def tied_with_the_same_head(checkpoint: Path) -> None:
    set_fields(checkpoint / "config.json", tie_word_embeddings=True)
    table = next(ts[TABLE] for ts in map(read_tensors, (checkpoint / FIRST, checkpoint / SECOND)) if TABLE in ts)
    change_tensors(checkpoint / FIRST, lambda tensors: tensors.update({HEAD: table}))


def tied_without_head(checkpoint: Path) -> None:
    set_fields(checkpoint / "config.json", tie_word_embeddings=True)
    change_tensors(checkpoint / FIRST, lambda tensors: tensors.pop(HEAD))


def extra_tensors(checkpoint: Path) -> None:
    extra = {f"{LAYER}{x}_norm.weight": bf16(16, seed=1) for x in "qk"} | {f"{LAYER}o_proj.bias": bf16(64)}
    extra |= {"model.layers.1.mlp.down_proj.bias": bf16(64), "model.layers.9.mlp.down_proj.weight": bf16(64, 128)}
    extra |= {f"{LAYER}rotary_emb.inv_freq": bf16(8), "lm_head.bias": bf16(704)}
    change_tensors(checkpoint / FIRST, lambda tensors: tensors.update(extra))


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(content) and None


def fields_nobody_knows(checkpoint: Path) -> None:
    set_fields(checkpoint / "config.json", zeta_scale=3, alpha_gate="x")


# Change -> what the notes say.
SAME: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "two sets of weights": (two_sets, [SINGLE, "ignored", INDEX, FIRST, SECOND]),
    "a single file and an index of absent shards": (single_file_and_absent_shards, [SINGLE, "ignored", INDEX]),
    "an index and a link to nothing": (dangling_single_file, [INDEX, f"ignored: {SINGLE}"]),
    "other files of weights": (
        other_weights,
        ["ignored: consolidated.safetensors, model.fp16.safetensors, pytorch_model.bin"],
    ),
    "an index that names another shard": (map_tells_another_shard, []),
    "an index that leaves tensors out": (map_leaves_tensors_out, []),
    "a tied head that is stored": (tied_with_another_head, [HEAD, "ties"]),
    "a tied head that is stored and the same": (tied_with_the_same_head, [HEAD, "ties"]),
    "a tied head": (tied_without_head, []),
    "tensors nobody knows": (
        extra_tensors,
        ["model.layers.*.self_attn.q_norm.weight", "model.layers.*.self_attn.k_norm.weight", "lm_head.bias"]
        + ["model.layers.*.self_attn.o_proj.bias", "model.layers.*.mlp.down_proj.bias", "inv_freq"]
        + ["model.layers.*.mlp.down_proj.weight"],
    ),
    "settings of rounding that was not done": (
        text("quantize_config.json", "{}"),
        ["quantize_config.json is not used"],
    ),
    "fields nobody knows": (fields_nobody_knows, ["config.json", "'alpha_gate', 'zeta_scale'"]),
}


@pytest.mark.parametrize("name", SAME)
def test_logits_are_those_of_transformers_own_loading(name: str, checkpoint: Path) -> None:
    change, said = SAME[name]
    change(checkpoint)
    embeds = np.random.default_rng(0).standard_normal((1, 7, 64), dtype=np.float32)
    expected = transformers_logits(checkpoint, embeds)
    for weights in ("copy", "reference"):
        np.testing.assert_allclose(our_logits(checkpoint, weights, embeds), expected, atol=1e-4)
    assert_says(" ".join(Checkpoint.open(checkpoint).notes()), *said)


def test_notes_are_printed_and_in_the_document(checkpoint: Path, tmp_path: Path) -> None:
    two_sets(checkpoint)
    extra = {f"{LAYER}q_norm.weight": bf16(16)}
    change_tensors(checkpoint / SINGLE, lambda tensors: tensors.update(extra))
    said = (f"ignored: {FIRST}", "q_norm")
    assert_says(sfexport("export", checkpoint, "-o", tmp_path / "bundle").stderr, *said)
    shown = document(sfexport("inspect", checkpoint, "--json"))
    assert_says(" ".join(shown["notes"]), *said)
    assert f"{LAYER}q_norm.weight" in shown["unused_tensors"]
    assert "ignored" in sfexport("inspect", checkpoint).stdout


def test_a_stale_index_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    two_sets(checkpoint)
    export(Checkpoint.open(checkpoint), tmp_path / "bundle", ExportOptions(weights="copy"))
    assert {p.name for p in (tmp_path / "bundle").glob("*.safetensors*")} == {SINGLE}


# Refusals.


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (path / "adapter_model.safetensors").write_bytes(b"")


def only_an_adapter(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    adapter(path)


def llava_adapter(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    adapter(path)
    (path / "non_lora_trainables.bin").touch()


def adapter_without_settings(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "adapter_model.bin").touch()


def only_projector(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "mm_projector.bin").touch()


def only_gguf(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "model-q4.gguf").touch()


def rank_local_shards(path: Path) -> None:
    shutil.copyfile(path / FIRST, path / "shard-00001-model-00001-of-00001.safetensors")


def link_out(name: str, content: str = "{}") -> Callable[[Path], None]:
    def change(path: Path) -> None:
        outside = path.parent / "outside.json"
        outside.write_text(content)
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(outside)

    return change


def dangle(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("../../blobs/0123")

    return change


def fifo(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return change


def directory(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()

    return change


def sparse(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).touch()
        os.truncate(path / name, 30 << 30)

    return change


def add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda path: change_tensors(path / FIRST, lambda tensors: tensors.update({name: bf16(*shape)}))


def both_spellings(path: Path) -> None:
    block = "model.vision_tower.vision_tower.stages.0.blocks.0."
    shard = Checkpoint.open(path).tensors[f"{block}weight"].shard
    change_tensors(shard, lambda tensors: tensors.update({f"{block}gamma": bf16(16)}))


def both_spellings_in_two_shards(path: Path) -> None:
    block = "model.vision_tower.vision_tower.stages.0.blocks.0."
    shard = Checkpoint.open(path).tensors[f"{block}weight"].shard
    other = path / (FIRST if shard.name == SECOND else SECOND)
    change_tensors(other, lambda tensors: tensors.update({f"{block}gamma": bf16(16)}))


def untied_without_head(path: Path) -> None:
    change_tensors(path / FIRST, lambda tensors: tensors.pop(HEAD))


STAGE = "model.vision_tower.vision_tower.stages.1000000000.blocks.0.conv_dw.weight"
REFUSED = {
    "an adapter beside the weights": (adapter, ["adapter_config.json", "'org/base'", "beside", "merge_and_unload"]),
    "only an adapter": (only_an_adapter, ["adapter", "not a whole model", "merge_and_unload", "save_pretrained"]),
    "an adapter as LLaVA saves it": (llava_adapter, ["adapter", "not a whole model", "merge_and_unload"]),
    "an adapter without settings": (adapter_without_settings, ["adapter_model.bin", "merge_and_unload"]),
    "only a projector": (only_projector, ["mm_projector.bin", "projector"]),
    "only GGUF": (only_gguf, ["model-q4.gguf", "save_pretrained"]),
    "shards of ranks": (rank_local_shards, ["shard-00001", "distributed"]),
    "a side file outside": (link_out("special_tokens_map.json"), ["special_tokens_map.json", "outside.json"]),
    "a config.json outside": (link_out("config.json"), ["config.json", "outside the checkpoint"]),
    "a preprocessor that is gone": (dangle("preprocessor_config.json"), ["preprocessor_config.json", "gone"]),
    "a tokenizer that is gone": (dangle("tokenizer.json"), ["tokenizer.json", "gone"]),
    "a config.json that is gone": (dangle("config.json"), ["config.json", "gone"]),
    "an index that is gone": (dangle(INDEX), [INDEX, "gone"]),
    "a pipe as config.json": (fifo("config.json"), ["config.json", "not a regular file"]),
    "a pipe as preprocessor": (fifo("preprocessor_config.json"), ["preprocessor_config.json", "regular"]),
    "a pipe as tokenizer": (fifo("tokenizer.json"), ["tokenizer.json", "regular"]),
    "a pipe as shard": (fifo(FIRST), [FIRST, "regular"]),
    "a directory as shard": (directory(FIRST), [FIRST, "regular"]),
    "a directory as side file": (directory("added_tokens.json"), ["added_tokens.json", "regular"]),
    "a side file of 30 GB": (sparse("special_tokens_map.json"), ["special_tokens_map.json", "32,212,254,720 bytes"]),
    "an index of 30 GB": (sparse(INDEX), [INDEX, "bytes"]),
    "a side file that is no JSON": (text("tokenizer_config.json", "root:x:0"), ["tokenizer_config.json", "JSON"]),
    "a side file with a list": (text("special_tokens_map.json", "[]"), ["special_tokens_map.json", "object"]),
    "cross-attention in a layer that has none": (
        add(f"{LAYER}cross_attn_kv_proj.bias", 64),
        [f"{LAYER}cross_attn_kv_proj.bias", "config.json", "cross_attn"],
    ),
    "an SReLU that the projector has not": (
        add("model.mm_projector.1.t_right", 64),
        ["model.mm_projector.1.t_right", "mm_projector_type"],
    ),
    "a layer scale in both spellings": (both_spellings, ["stages.0.blocks.0.weight", "twice"]),
    "a layer scale in both shards": (both_spellings_in_two_shards, ["stages.0.blocks.0.weight", "two shards"]),
    "neither head nor tie": (untied_without_head, [f"lacks {HEAD}"]),
    "an absurd stage": (add(STAGE, 1), ["stages.1000000000", "number 4"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_is_refused(name: str, tree: Tree, tmp_path: Path) -> None:
    change, parts = REFUSED[name]
    folder = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        export(Checkpoint.open(folder), tmp_path / "bundle", ExportOptions())
    assert_says(caught.value.paragraph(), *parts)
    assert not (tmp_path / "bundle").exists()
    inspected = sfexport("inspect", folder)
    assert inspected.exit_code == 2
    assert_says(inspected.stderr, *parts[:1])


def test_a_refusal_leaves_nothing(tree: Tree, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    adapter(folder)
    assert_says(refusal(tmp_path, "export", folder, "-o", tmp_path / "bundle"), "merge_and_unload")


def test_links_within_the_checkpoint_are_followed(tree: Tree, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    (folder / "tokenizer.json").rename(folder / "tokenizer-v2.json")
    (folder / "tokenizer.json").symlink_to("tokenizer-v2.json")
    assert folder / "tokenizer.json" in Checkpoint.open(folder).side_files()
