"""Bad input through the command line: one paragraph, exit status 2, and nothing changed on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from helpers import (
    FIRST,
    INDEX,
    SECOND,
    assert_says,
    change_tensors,
    edit_header,
    edit_json,
    refusal,
    remove_field,
    set_fields,
    sfexport,
    snapshot,
    split_shard,
    write_shard,
)

from sfexport.demo.run import DemoPaths as Tree
from sfexport.errors import CheckpointError
from sfexport.exporting import export as bundle_module
from sfexport.testing.random_checkpoint import write_random_checkpoint

QUESTION = ("-q", "What happens?")
NORM = "model.norm.weight"
STEM = "model.vision_tower.vision_tower.stem.0.weight"


def config(**fields: object) -> Callable[[Path], None]:
    return lambda path: set_fields(path / "config.json", **fields)


def preprocessor(**fields: object) -> Callable[[Path], None]:
    return lambda path: set_fields(path / "preprocessor_config.json", **fields)


def without(field: str) -> Callable[[Path], None]:
    return lambda path: remove_field(path / "config.json", field)


def shard_of(path: Path, tensor: str) -> Path:
    return path / json.loads((path / INDEX).read_text())["weight_map"][tensor]


def entry(tensor: str, **fields: object) -> Callable[[Path], None]:
    """Change what a shard's header says about a tensor."""
    return lambda path: edit_header(shard_of(path, tensor), lambda header: header[tensor].update(fields))


def drop(tensor: str) -> Callable[[Path], None]:
    return lambda path: change_tensors(shard_of(path, tensor), lambda tensors: tensors.pop(tensor))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def move_offsets(by: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        old = split_shard(shard_of(path, NORM))[0][NORM]["data_offsets"]
        entry(NORM, data_offsets=[old[0] + by, old[1] + by])(path)

    return change


def cut_tail(path: Path) -> None:
    os.truncate(path / SECOND, (path / SECOND).stat().st_size - 1000)


def only_pickles(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def only_config(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


def dangle(path: Path) -> None:
    (path / FIRST).unlink()
    (path / FIRST).symlink_to("../../blobs/0123abcd")


def dangling_single_file(path: Path) -> None:
    only_config(path)
    (path / "model.safetensors").symlink_to("../../blobs/0123abcd")


def link_in_a_circle(path: Path) -> None:
    (path / FIRST).unlink()
    (path / FIRST).symlink_to(FIRST)


def name_shard(name: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / INDEX, lambda index: index["weight_map"].update({NORM: name}))


def shard_twice(path: Path) -> None:
    shutil.copyfile(path / FIRST, path / "other.safetensors")
    name_shard("other.safetensors")(path)


def stored_as(dtype: str, size: int) -> Callable[[Path], None]:
    """A whole shard in another dtype: all sizes fit."""

    def change(path: Path) -> None:
        header, data = split_shard(shard_of(path, NORM))
        for name, value in header.items():
            if name != "__metadata__":
                value.update(dtype=dtype, data_offsets=[size * n // 2 for n in value["data_offsets"]])
        write_shard(shard_of(path, NORM), header, (4 * data)[: size * len(data) // 2])

    return change


BAD_CHECKPOINTS = {
    "a config.json that is not there": (lambda p: (p / "config.json").unlink(), ["config.json"]),
    "a config.json that is not JSON": (write("config.json", b"{'a': 1}"), ["config.json", "not valid JSON"]),
    "half a config.json": (write("config.json", b'{"model_type": "llava'), ["config.json", "not valid JSON"]),
    "a config.json that is not text": (write("config.json", b"\xff\xfe{}"), ["config.json"]),
    "a config.json with a list": (write("config.json", b"[1]"), ["config.json", "JSON object"]),
    "a config.json nested too deeply": (write("config.json", b"[" * 100_000), ["config.json", "not valid JSON"]),
    "a config.json with an endless number": (write("config.json", b'{"a": 1' + b"0" * 5000 + b"}"), ["config.json"]),
    "another model_type": (config(model_type="llama"), ["'llama'", "llava_qwen_slow_fast"]),
    "no hidden_size": (without("hidden_size"), ["'hidden_size'"]),
    "no mm_hidden_size": (without("mm_hidden_size"), ["'mm_hidden_size'"]),
    "no mm_vision_tower": (without("mm_vision_tower"), ["'mm_vision_tower'", "convnext"]),
    "no cross-attention gate": (without("cross_attn_gating_type"), ["'cross_attn_gating_type'"]),
    "a text as a size": (config(hidden_size="64"), ["'hidden_size'", "'64'"]),
    "layers below none": (config(cross_attn_min_layer_depth=-2), ["'cross_attn_min_layer_depth'", "-2"]),
    "a text as a limit": (config(tokenizer_model_max_length="1k"), ["'tokenizer_model_max_length'", "'1k'"]),
    "a text as an epsilon": (config(rms_norm_eps="tiny"), ["'rms_norm_eps'", "'tiny'"]),
    "a rotary base of 0": (config(rope_theta=0), ["'rope_theta'"]),
    "key heads that do not divide": (config(num_key_value_heads=3), ["num_key_value_heads", "3"]),
    "an unknown gating type": (
        config(cross_attn_gating_type="per-head"),
        ["'per-head'", "whole-dynamic, whole-dynamic-tanh, whole-dynamic-warmup, whole-dynamic-tanh-warmup"],
    ),
    "an unknown cross-attention": (config(cross_attn_implementation="flash"), ["'flash'", "text-only-vanilla"]),
    "a number as cross-attention": (config(cross_attn_implementation=1), ["'cross_attn_implementation'"]),
    "an unknown projector": (config(mm_projector_type="resampler"), ["'resampler'", "mlp<N>x_gelu, mlp<N>x_srelu"]),
    "a projector without layers": (config(mm_projector_type="mlp0x_gelu"), ["'mlp0x_gelu'"]),
    "a number as projector": (config(mm_projector_type=2), ["'mm_projector_type'"]),
    "an unknown tower": (config(mm_vision_tower="dinov2-large"), ["'dinov2-large'", "convnext-576"]),
    "a tower of another kind": (config(mm_vision_tower="openai/clip-vit-large-patch14"), ["patch_embedding.weight"]),
    "an unknown decode mode": (config(decode_mode="both"), ["'both'", "released, trained"]),
    "more layers than tensors": (config(num_hidden_layers=5), ["model.layers.4.", "more"]),
    "another width than the tensors": (
        config(intermediate_size=256),
        ["mlp.gate_proj.weight", "[128, 64]", "[256, 64]"],
    ),
    "another width than the tower": (config(mm_hidden_size=64), ["mm_hidden_size is 64", "48"]),
    "frames that give no token": (preprocessor(crop_size=16), ["16 x 16 pixels", "mm_video_pooling_stride"]),
    "an image size in words": (preprocessor(size={"shortest_edge": "big"}), ["preprocessor_config.json", "'big'"]),
    "one mean for three channels": (preprocessor(image_mean=0.5), ["preprocessor_config.json", "0.5"]),
    "a deviation of 0": (preprocessor(image_std=[0, 1, 1]), ["image_std"]),
    "a missing tensor": (drop(NORM), [f"lacks {NORM}"]),
    "a missing tensor of the tower": (drop(STEM), [STEM]),
    "a tensor of another shape": (entry(NORM, shape=[8, 8]), [NORM, "[8, 8]", "[64]"]),
    "a truncated shard": (cut_tail, [SECOND, "truncated", "bytes"]),
    "a missing shard": (lambda p: (p / FIRST).unlink(), [FIRST, "does not exist"]),
    "no shard and no index": (only_config, ["model.safetensors"]),
    "a shard of garbage": (write(FIRST, b"garbage" * 100), [FIRST, "not a safetensors file"]),
    "an empty shard": (write(FIRST, b""), [FIRST, "not a safetensors file"]),
    "a header that is too long": (write(FIRST, b"\xff" * 7 + b"\x7f{}"), [FIRST, "not a safetensors file"]),
    "a header of length 0": (write(FIRST, bytes(64)), [FIRST, "not a safetensors file"]),
    "a header that is not JSON": (write(FIRST, b"\x02" + bytes(7) + b"{]"), [FIRST, "damaged safetensors header"]),
    "a header that is a list": (write(FIRST, b"\x02" + bytes(7) + b"[]"), [FIRST, "damaged safetensors header"]),
    "tensors that overlap": (move_offsets(-2), [NORM, "overlap"]),
    "negative offsets": (entry(NORM, data_offsets=[-128, 0]), [NORM, "[-128, 0]"]),
    "offsets that do not fit the shape": (entry(NORM, data_offsets=[0, 2]), [NORM, "[0, 2]"]),
    "offsets in words": (entry(NORM, data_offsets="ab"), [NORM]),
    "a negative shape": (entry(NORM, shape=[-8, -8]), [NORM, "[-8, -8]"]),
    "a shape beyond 64 bits": (entry(NORM, shape=[2**40, 2**40]), [NORM]),
    "no dtype": (lambda p: edit_header(shard_of(p, NORM), lambda h: h[NORM].pop("dtype")), ["'dtype'"]),
    "pickles": (only_pickles, ["pytorch_model.bin", "pickled", "safe_serialization"]),
    "float64 weights": (stored_as("F64", 8), ["stored as F64", "F32, F16, BF16"]),
    "integer weights": (stored_as("I32", 4), ["stored as I32"]),
    "8-bit weights": (stored_as("F8_E4M3", 1), ["stored as F8_E4M3"]),
    "an unheard-of dtype": (entry(NORM, dtype="F4"), [NORM, "stored as F4"]),
    "an index that leads out": (name_shard("../x.safetensors"), [INDEX, "'../x.safetensors'"]),
    "an index that names the directory": (name_shard("."), [INDEX, "'.'"]),
    "an index with a number": (name_shard(7), ["7"]),
    "an index with an impossible name": (name_shard("a\0b"), [INDEX, "'a\\x00b'"]),
    "an index without a map": (write(INDEX, b"{}"), [INDEX, "weight_map"]),
    "a tensor in two shards": (shard_twice, ["is in two shards", "other.safetensors"]),
    "a link to a blob that is gone": (dangle, [FIRST, "link"]),
    "a single file that is gone": (dangling_single_file, ["model.safetensors", "link"]),
    "a link to itself": (link_in_a_circle, [FIRST]),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoint_is_refused(name: str, tree: Tree, tmp_path: Path) -> None:
    damage, parts = BAD_CHECKPOINTS[name]
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    damage(checkpoint)
    paragraph = refusal(tmp_path, "export", checkpoint, "-o", tmp_path / "new" / "bundle")
    assert_says(paragraph, *parts)
    assert refusal(tmp_path, "build", checkpoint, "-o", tmp_path / "engines") == paragraph
    if (checkpoint / "config.json").exists():
        assert refusal(tmp_path, "inspect", checkpoint) == paragraph


@pytest.mark.parametrize("verb", ["export", "build", "inspect"])
def test_checkpoint_must_be_a_directory(verb: str, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = () if verb == "inspect" else ("-o", tmp_path / "out")
    assert_says(refusal(tmp_path, verb, tmp_path / "nowhere", *output), tmp_path / "nowhere", "does not exist")
    assert_says(refusal(tmp_path, verb, tmp_path / "file", *output), tmp_path / "file", "is not a directory")


def test_tensors_that_the_model_does_not_need_may_have_any_dtype(tree: Tree, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    header, data = split_shard(checkpoint / SECOND)
    header["model.vision_tower.vision_tower.position_ids"] = {
        "dtype": "I64",
        "shape": [1, 2],
        "data_offsets": [len(data), len(data) + 16],
    }
    write_shard(checkpoint / SECOND, header, data + bytes(16))
    assert sfexport("export", checkpoint, "-o", tmp_path / "bundle").exit_code == 0


# Videos.


def wiped_clip(path: Path, clip: Path) -> None:
    """All coded data replaced by zeros; the table of contents stays."""
    raw = bytearray(clip.read_bytes())
    begin = raw.index(b"mdat") + 4
    length = int.from_bytes(raw[begin - 8 : begin - 4], "big") - 8
    raw[begin : begin + length] = bytes(length)
    path.write_bytes(raw)


def sound(path: Path, clip: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))


def clip_without_frames(path: Path, clip: Path) -> None:
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


BAD_VIDEOS = {
    "no file": (lambda path, clip: None, "There is no file"),
    "a directory": (lambda path, clip: path.mkdir(), "is a directory"),
    "an empty file": (lambda path, clip: path.touch(), "is empty"),
    "a text": (lambda path, clip: path.write_text("Once upon a time\n" * 50), "not a video"),
    "sound alone": (sound, "contains no video"),
    "no frames": (clip_without_frames, "video"),
    "half a clip": (lambda path, clip: path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2]), "incomplete"),
    "a clip of zeros": (wiped_clip, "decoded"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_video_is_refused(name: str, tree: Tree, tmp_path: Path) -> None:
    make, part = BAD_VIDEOS[name]
    video = tmp_path / "video.mp4"
    make(video, tree.clip)
    assert_says(refusal(tmp_path, "ask", tree.engines, video, *QUESTION), video, part)


@pytest.mark.parametrize("verb", ["ask", "parity"])
def test_a_url_is_refused_as_such(verb: str, tree: Tree, tmp_path: Path) -> None:
    more = QUESTION if verb == "ask" else ()
    assert_says(refusal(tmp_path, verb, tree.engines, "https://host/a.mp4", *more), "'https://host/a.mp4'", "offline")


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_damage_inside_a_clip_is_survived_or_explained(place: float, tree: Tree, tmp_path: Path) -> None:
    raw = bytearray(tree.clip.read_bytes())
    begin = int(place * len(raw))
    raw[begin : begin + 400] = 50 * b"damaged!"
    video = tmp_path / "video.mp4"
    video.write_bytes(raw)
    result = sfexport("ask", tree.engines, video, *QUESTION, "--max-new-tokens", 1)
    assert result.exit_code in (0, 2), result.stderr
    assert result.exit_code == 0 or str(video) in result.stderr.splitlines()[-1]


# Questions and options.

BAD_OPTIONS = {
    "an empty question": (["-q", ""], "question is empty"),
    "a question of spaces": (["-q", " \n\t"], "question is empty"),
    "a bad second question": (["-q", "Why?", "-q", " "], "question is empty"),
    "a question with the video's mark": (["-q", "Is this an <image>?"], "<image>"),
    "a question that is not UTF-8": (["-q", "caf\udce9"], "UTF-8"),
    "a question that is too long": (["-q", "Why? " * 2000], "does not fit"),
    "more frames than fit": ([*QUESTION, "--frames", 5000], "does not fit"),
    "no frames": ([*QUESTION, "--frames", 0], "--frames"),
    "a slip of the keyboard": ([*QUESTION, "--frames", 300_000_000], "300000000"),
    "a negative temperature": ([*QUESTION, "--temperature", -0.5], "-0.5"),
    "a temperature that is no number": ([*QUESTION, "--temperature", "nan"], "nan"),
    "no mass": ([*QUESTION, "--top-p", 0], "top-p"),
    "too much mass": ([*QUESTION, "--temperature", 1, "--top-p", 1.5], "1.5"),
    "fewer candidates than none": ([*QUESTION, "--top-k", -1], "-1"),
    "top-k without sampling": ([*QUESTION, "--top-k", 5], "--temperature"),
    "top-p without sampling": ([*QUESTION, "--temperature", 0, "--top-p", 0.5], "--temperature"),
    "no new tokens": ([*QUESTION, "--max-new-tokens", 0], "at least 1, not 0"),
    "no penalty": ([*QUESTION, "--repetition-penalty", 0], "repetition penalty"),
    "a negative seed": ([*QUESTION, "--temperature", 1, "--seed", -1], "-1"),
    "a stop text of several tokens": ([*QUESTION, "--stop", "the end of it"], "'the end of it' is"),
    "an empty stop text": ([*QUESTION, "--stop", ""], "0 tokens"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_question_or_option_is_refused_before_anything_is_encoded(name: str, tree: Tree) -> None:
    options, part = BAD_OPTIONS[name]
    # The paragraph is all that is said: no frame was encoded.
    assert_says(refusal(tree.root, "ask", tree.engines, tree.clip, *options), part)


def test_question_must_fit_a_small_model(tree: Tree, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "checkpoint", changes={"tokenizer_model_max_length": 60})
    assert sfexport("build", tmp_path / "checkpoint", "-o", tmp_path / "engines").exit_code == 0
    short = sfexport("ask", tmp_path / "engines", tree.clip, "-q", "Why?", "--max-new-tokens", 1)
    assert short.exit_code == 0, short.stderr
    long = ("-q", "Which of the three shapes is moving to the left?")
    paragraph = refusal(tmp_path, "ask", tmp_path / "engines", tree.clip, "-q", "Why?", *long)
    assert_says(paragraph, "does not fit", "16 of the video", "the model takes 60", "--frames")


def test_export_of_no_frames_is_refused(tree: Tree, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "out", "--frames", 0)
    assert_says(refusal(tmp_path, "export", tree.checkpoint, *output), "at least 1, not 0")


@pytest.mark.parametrize("video", [True, False])
def test_parity_of_no_frames_is_refused(video: bool, tree: Tree) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    arguments = [tree.engines, *[tree.clip] * video, "--frames", 0]
    assert_says(refusal(tree.root, "parity", *arguments), "at least 1, not 0")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--atol", "nan"), ("--atol", "inf"), ("--rtol", "-0.1"), ("--rtol", "nan"), ("--max-new-tokens", "-1")],
)
def test_parity_with_numbers_without_meaning_is_refused(option: str, value: str, tree: Tree) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert_says(refusal(tree.root, "parity", tree.engines, option, value), option, "must be")


def test_generation_config_without_meaning_is_refused(tree: Tree, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    set_fields(checkpoint / "generation_config.json", temperature="hot")
    assert sfexport("build", checkpoint, "-o", tmp_path / "engines").exit_code == 0
    paragraph = refusal(tmp_path, "ask", tmp_path / "engines", tree.clip, *QUESTION)
    assert_says(paragraph, "generation_config.json")


def test_checkpoint_without_tokenizer_exports_but_cannot_answer(tree: Tree, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").unlink()
    assert sfexport("build", checkpoint, "-o", tmp_path / "engines").exit_code == 0
    assert_says(refusal(tmp_path, "ask", tmp_path / "engines", tree.clip, *QUESTION), "tokenizer.json")


# Outputs.


def foreign_directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("42 pages")


def bundle_with_more(path: Path) -> None:
    path.mkdir()
    (path / "sfexport.json").write_text("{}")
    (path / "engine.json").write_text("{}")
    (path / "photos").mkdir()


BAD_OUTPUTS = {
    "a file": (lambda path: path.write_text("mine"), "", "is not a directory"),
    "a directory of something else": (foreign_directory, "", "already holds something else"),
    "a bundle with the user's directory in it": (bundle_with_more, "", "photos"),
    "below a file": (lambda path: path.write_text("mine"), "bundle", "cannot be written"),
    "deep below a file": (lambda path: path.write_text("mine"), "a/b/c", "cannot be written"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "", "is not a directory"),
    "too long a name": (lambda path: None, "x" * 300, "cannot be written"),
    "below too long a name": (lambda path: None, f"new/{'x' * 300}/bundle", "cannot be written"),
}


@pytest.mark.parametrize("verb", ["export", "build"])
@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_output_is_refused_and_left_alone(name: str, verb: str, tree: Tree, tmp_path: Path) -> None:
    make, below, part = BAD_OUTPUTS[name]
    make(tmp_path / "out")
    source = tree.checkpoint if verb == "export" else tree.bundle
    output = tmp_path / "out" / below
    assert_says(refusal(tmp_path, verb, source, "-o", output, after_steps=False), output, part, "-o")


def test_output_of_a_build_is_checked_before_its_checkpoint_is_exported(tree: Tree, tmp_path: Path) -> None:
    foreign_directory(tmp_path / "out")
    assert_says(refusal(tmp_path, "build", tree.checkpoint, "-o", tmp_path / "out"), "already holds")


def test_output_of_the_demo_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign_directory(tmp_path / "out")
    (tmp_path / "file").touch()
    assert_says(refusal(tmp_path, "demo", "-o", tmp_path / "out"), "thesis.tex")
    assert_says(refusal(tmp_path, "demo", "-o", tmp_path / "file"), "is not a directory")
    refusal(tmp_path, "demo", "-o", tmp_path / "file" / "x", after_steps=True)


@pytest.mark.parametrize("output", [".", "..", "../here"])
def test_current_directory_is_not_replaced(
    output: str, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_says(refusal(tmp_path, "export", tree.checkpoint, "-o", output), "-o")


def test_earlier_output_is_replaced_whole(tree_copy: Tree) -> None:
    (tree_copy.bundle / "compressor.onnx").unlink()
    (tree_copy.engines / ".DS_Store").touch()
    assert sfexport("export", tree_copy.checkpoint, "-o", tree_copy.bundle).exit_code == 0
    assert sfexport("build", tree_copy.bundle, "-o", tree_copy.engines).exit_code == 0
    assert sorted(p.name for p in tree_copy.root.iterdir()) == ["bundle", "checkpoint", "clip.mp4", "engines"]
    assert sfexport("inspect", tree_copy.engines).exit_code == 0


@pytest.mark.parametrize(
    "error", [CheckpointError("The tensor 'x' is gone.", "Find it."), OSError(errno.ENOSPC, "Full")]
)
def test_export_that_fails_half_way_leaves_the_old_bundle(
    error: Exception, tree_copy: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(bundle_module, "build_decoder", fail)
    arguments = ("export", tree_copy.checkpoint, "-o")
    refusal(tree_copy.root, *arguments, tree_copy.bundle, after_steps=True)
    refusal(tree_copy.root, *arguments, tree_copy.root / "a" / "b" / "c", after_steps=True)


def test_interrupted_export_leaves_the_old_bundle(tree_copy: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_module, "build_compressor", interrupt)
    before = snapshot(tree_copy.root)
    assert sfexport("export", tree_copy.checkpoint, "-o", tree_copy.bundle).exit_code == 1
    assert snapshot(tree_copy.root) == before


# Exceptions.


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sfexport", "inspect", str(tmp_path / "nowhere")]
    run = subprocess.run(command, env={**os.environ, "SFEXPORT_DEBUG": "1"}, capture_output=True, text=True)
    assert run.returncode != 0
    assert "Traceback" in run.stderr
    run = subprocess.run(command, env={**os.environ, "SFEXPORT_DEBUG": ""}, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("Error: ")
    assert run.stderr.count("\n") == 1


def test_what_nobody_expected_is_one_paragraph_too(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfexport.artifacts.inspect.inspect", lambda path: 1 / 0)
    result = sfexport("inspect", tree.checkpoint)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ZeroDivisionError: division by zero.")
    assert "SFEXPORT_DEBUG=1" in result.stderr
    assert result.stderr.count("\n") == 1
