"""The command line: its help, what it imports, what it prints, and the whole way from a checkpoint to an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import assert_says, document, promise_again, sfexport, snapshot, strict_json
from PIL import Image

from sfexport import __version__
from sfexport.cli import main
from sfexport.demo.run import DemoPaths as Tree
from sfexport.qa.pipeline import Pipeline
from sfexport.qa.video_session import STAGES

HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "av", "tokenizers", "numpy", "PIL"}
TWO = ("-q", "Which shapes are in the video?", "-q", "What colour is the circle?")


def ask(tree: Tree, *args: object) -> dict:
    return document(sfexport("ask", tree.engines, tree.clip, *args, "--json"))


def python(code: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


# Help and imports.


def test_help_shows_the_usual_way() -> None:
    result = sfexport("--help")
    assert result.exit_code == 0
    assert_says(result.stdout, "sfexport demo", "sfexport build CHECKPOINT -o ENGINES", "sfexport ask ENGINES")


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_help_of_every_verb_has_examples(verb: str) -> None:
    for flag in ("-h", "--help"):
        result = sfexport(verb, flag)
        assert result.exit_code == 0
        assert f"  sfexport {verb}" in result.stdout.split("Examples:")[1]
        assert max(map(len, result.stdout.splitlines())) <= 100


def test_verbs_are_these() -> None:
    assert set(main.commands) == {"ask", "build", "demo", "doctor", "export", "inspect", "parity", "plan"}


def test_version_is_shown() -> None:
    assert __version__ in sfexport("--version").stdout


@pytest.mark.parametrize("arguments", [("--help",), ("ask", "--help"), ("--version",), ("nonsense",)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sfexport", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == (2 if arguments == ("nonsense",) else 0)
    imported = {line.rsplit("|", 1)[1].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "sfexport.cli" in imported
    assert not imported & HEAVY


RUN_AND_LIST = """
import json, sys
from sfexport.cli import main
main(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_after(*args: object) -> set[str]:
    run = python(RUN_AND_LIST, *args)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stderr.splitlines()[-1]))


def test_export_needs_neither_torch_nor_a_runtime(tree: Tree, tmp_path: Path) -> None:
    modules = modules_after("export", tree.checkpoint, "-o", tmp_path / "bundle")
    assert not modules & {"torch", "transformers", "onnxruntime", "safetensors", "tokenizers", "av"}


def test_answering_needs_no_torch(tree: Tree, tmp_path: Path) -> None:
    modules = modules_after("ask", tree.engines, tree.clip, *TWO, "--max-new-tokens", 1, "--json")
    assert not modules & {"torch", "transformers", "safetensors"}


@pytest.mark.parametrize("kind", ["checkpoint", "bundle", "engines"])
def test_inspecting_needs_no_runtime(kind: str, tree: Tree) -> None:
    modules = modules_after("inspect", tree.root / kind)
    assert not modules & {"torch", "transformers", "onnxruntime", "onnx", "av", "tokenizers"}


# Answers.


def test_json_answer_is_all_that_stdout_has(tree: Tree) -> None:
    arguments = ["ask", tree.engines, tree.clip, *TWO, "--json", "--max-new-tokens", "5"]
    run = subprocess.run([sys.executable, "-m", "sfexport", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers = strict_json(run.stdout)
    assert run.stdout.count("\n") == 1
    assert {"video", "engines", "backend", "mode", "frames", "fast_tokens", "slow_tokens"} <= answers.keys()
    assert [a["question"] for a in answers["questions"]] == [*TWO[1::2]]
    for entry in answers["questions"]:
        assert isinstance(entry["answer"], str)
        assert 1 <= entry["new_tokens"] == len(entry["ids"]) <= 5
        assert tuple(entry["seconds"]) == STAGES
        assert all(seconds >= 0 for seconds in entry["seconds"].values())


def test_second_question_costs_its_own_tokens_only(tree: Tree) -> None:
    first, second = ask(tree, *TWO, "--max-new-tokens", 2)["questions"]
    tokenizer = Pipeline.load(tree.engines).tokenizer
    own = [tokenizer.prompt(question) for question in TWO[1::2]]
    assert first["frames_encoded"] == 16
    assert first["prefill_tokens"] == len(own[0].before) + 16 + len(own[0].after)
    assert second["frames_encoded"] == 0
    assert second["prefill_tokens"] == len(own[1].after) < first["prefill_tokens"]
    assert second["seconds"]["vision"] == 0


def test_second_answer_does_not_depend_on_the_first(tree: Tree) -> None:
    both = ask(tree, *TWO, "--max-new-tokens", 8)["questions"]
    alone = ask(tree, *TWO[2:], "--max-new-tokens", 8)["questions"]
    assert both[1]["ids"] == alone[0]["ids"]


def test_both_modes_answer_and_differ(tree: Tree) -> None:
    released, trained, default = (
        ask(tree, *TWO, *mode, "--max-new-tokens", 16) for mode in (("--mode", "released"), ("--mode", "trained"), ())
    )
    assert (released["mode"], trained["mode"], default["mode"]) == ("released", "trained", "released")
    ids = [[a["ids"] for a in document["questions"]] for document in (released, trained, default)]
    assert ids[0] == ids[2] != ids[1]


def test_same_seed_gives_the_same_answer(tree: Tree) -> None:
    def ids(seed: int) -> list[int]:
        options = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--seed", seed, "--max-new-tokens", 8)
        return ask(tree, *TWO[:2], *options)["questions"][0]["ids"]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_stop_token_ends_the_answer(tree: Tree) -> None:
    ids = ask(tree, *TWO[:2], "--max-new-tokens", 8)["questions"][0]["ids"]
    tokenizer = Pipeline.load(tree.engines).tokenizer
    at, text = next((i, t) for i, t in enumerate(tokenizer.decode([n]) for n in ids) if t.isalpha())
    stopped = ask(tree, *TWO[:2], "--max-new-tokens", 8, "--stop", text)["questions"][0]
    assert stopped["ids"] == ids[: at + 1]
    assert not stopped["answer"].endswith(text)


def test_repetition_penalty_changes_the_answer(tree: Tree) -> None:
    plain, penalised = (
        ask(tree, *TWO[:2], "--max-new-tokens", 24, "--repetition-penalty", penalty)["questions"][0]["ids"]
        for penalty in (1.0, 5.0)
    )
    assert len(set(penalised)) > len(set(plain))


@pytest.mark.parametrize("options", [(), ("--mode", "trained"), ("--temperature", 1.0, "--seed", 5)])
def test_streamed_text_is_the_json_answer(options: tuple[object, ...], tree: Tree) -> None:
    answers = [a["answer"] for a in ask(tree, *TWO, *options)["questions"]]
    command = [sys.executable, "-m", "sfexport", "ask", tree.engines, tree.clip, *TWO, *options]
    run = subprocess.run([str(part) for part in command], capture_output=True)
    assert run.returncode == 0, run.stderr
    text = run.stdout.decode().split(f"Q: {TWO[1]}\nA: ")[1]
    assert [part.strip() for part in text.split(f"\nQ: {TWO[3]}\nA: ")] == answers


def test_frames_and_sampling_are_taken(tree: Tree) -> None:
    few = ask(tree, *TWO[:2], "--frames", 4, "--max-new-tokens", 1)
    assert few["frames"] == few["questions"][0]["frames_encoded"] == 4
    # Two seconds at two frames per second.
    sampled = ask(tree, *TWO[:2], "--sampling", "eval", "--max-new-tokens", 1)
    assert sampled["frames"] == 4


def test_keyframes_are_taken_and_their_times_told(tree: Tree, tmp_path: Path) -> None:
    exact = ask(tree, *TWO[:2], "--frames", 4, "--max-new-tokens", 1)
    keyframe = ask(tree, *TWO[:2], "--frames", 4, "--seek", "keyframe", "--max-new-tokens", 1)
    assert (exact["seek"], keyframe["seek"], exact["decoder"]) == ("exact", "keyframe", "pyav")
    assert exact["frames"] == len(exact["frame_times"]) == keyframe["frames"] == len(keyframe["frame_times"]) == 4
    assert exact["frame_times"] == sorted(set(exact["frame_times"]))
    with av.open(str(tree.clip)) as clip:
        keys = [float(p.pts * p.time_base) for p in clip.demux(video=0) if p.size and p.is_keyframe]
    nearest = [min(keys, key=lambda key: abs(key - time)) for time in exact["frame_times"]]
    assert keyframe["frame_times"] == pytest.approx(nearest)
    assert keyframe["questions"][0]["frames_encoded"] == len(set(nearest))
    said = sfexport("ask", tree.engines, tree.clip, *TWO[:2], "--seek", "keyframe", "--max-new-tokens", 1)
    assert_says(said.stderr, f"Different keyframes: {len(set(keys))}, for 16 sampled frames")
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(picture)
    refused = sfexport("ask", tree.engines, picture, *TWO[:2], "--seek", "keyframe")
    assert refused.exit_code == 2
    assert_says(refused.stderr, "picture.png", "no keyframes", "--seek keyframe")


def test_gstreamer_and_onnxruntime_work_in_one_process(tree: Tree) -> None:
    """GStreamer's libunwind made ONNX Runtime abort at its first C++ exception."""
    pytest.importorskip("gi", reason="GStreamer's Python bindings are not installed")
    command = [sys.executable, "-m", "sfexport", "ask", tree.engines, tree.clip, *TWO, "--json", "--max-new-tokens", 4]
    runs = [
        subprocess.run([*map(str, command), "--decoder", decoder], capture_output=True, text=True, check=False)
        for decoder in ("gstreamer", "pyav")
    ]
    assert [run.returncode for run in runs] == [0, 0], runs
    by_gstreamer, by_pyav = (strict_json(run.stdout) for run in runs)
    assert (by_gstreamer["decoder"], by_pyav["decoder"]) == ("gstreamer", "pyav")
    assert by_gstreamer["frame_times"] == by_pyav["frame_times"]
    assert [a["ids"] for a in by_gstreamer["questions"]] == [a["ids"] for a in by_pyav["questions"]]


def test_clip_shorter_than_the_sample_is_encoded_once(tree: Tree) -> None:
    many = ask(tree, *TWO[:2], "--frames", 40, "--max-new-tokens", 1)
    assert many["frames"] == 40
    assert many["questions"][0]["frames_encoded"] == 20


def test_picture_is_one_frame_that_is_not_pooled(tree: Tree, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(picture)
    answers = document(sfexport("ask", tree.engines, picture, *TWO[:2], "--max-new-tokens", 2, "--json"))
    assert answers["questions"][0]["frames_encoded"] == 1
    assert (answers["frames"], answers["slow_tokens"]) == (1, 16)


def test_one_frame_is_not_pooled(tree: Tree) -> None:
    one, two = (ask(tree, *TWO[:2], "--frames", n, "--max-new-tokens", 1) for n in (1, 2))
    assert (one["slow_tokens"], two["slow_tokens"]) == (16, 2 * 4)


def test_answering_leaves_the_engines_alone(tree: Tree) -> None:
    before = snapshot(tree.root)
    ask(tree, *TWO, "--max-new-tokens", 1)
    assert snapshot(tree.root) == before


# The other verbs.


def test_build_takes_a_checkpoint(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    described = document(sfexport("build", tree.checkpoint, "--json"))
    assert described["kind"] == "engines"
    (engines,) = (tmp_path / "checkpoint-engines").iterdir()
    assert engines.name == f"cpu-onnxruntime-{described['runtime']['version']}"
    assert (tmp_path / "checkpoint-bundle" / "sfexport.json").is_file()
    assert sfexport("ask", "checkpoint-engines", tree.clip, *TWO[:2], "--max-new-tokens", 1).exit_code == 0


def test_export_chooses_a_name_and_says_what_next(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = sfexport("export", tree.checkpoint)
    assert result.exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-bundle"]
    assert_says(result.stdout, "bundle written to checkpoint-bundle", "sfexport build checkpoint-bundle")


def test_export_describes_itself_as_inspect_does(tree: Tree, tmp_path: Path) -> None:
    exported = document(sfexport("export", tree.checkpoint, "-o", tmp_path / "bundle", "--frames", 5, "--json"))
    assert exported == document(sfexport("inspect", tmp_path / "bundle", "--json"))
    assert exported["options"]["frames"] == 5


def test_inspect_describes_a_checkpoint(tree: Tree) -> None:
    found = document(sfexport("inspect", tree.checkpoint, "--json"))
    assert found["kind"] == "checkpoint"
    assert found["model"]["slow_fast"]["hybrid_layers"] == [0, 2]
    assert found["model"]["tower"]["kind"] == "convnext"
    assert found["image"]["crop"] == 128
    assert found["parameters"]["total"] == sum(n for part, n in found["parameters"].items() if part != "total")
    assert found["dtypes"].keys() == {"BF16"}
    assert len(found["shards"]) == 2


def test_inspect_describes_a_bundle_and_engines(tree: Tree) -> None:
    bundle = document(sfexport("inspect", tree.bundle, "--json"))
    assert bundle["kind"] == "bundle"
    assert set(bundle["graphs"]) == {"vision_encoder", "compressor", "decoder"}
    assert bundle["options"] == {
        "precision": "fp32",
        "frames": 16,
        "weights": "copy",
        "quantize": None,
        "split_lm_head": 1,
    }
    pixels = bundle["graphs"]["vision_encoder"]["inputs"][0]
    assert (pixels["name"], pixels["shape"]) == ("pixel_values", ["frames", 3, 128, 128])
    engines = document(sfexport("inspect", tree.engines, "--json"))
    assert engines["kind"] == "engines"
    assert engines["backend"] == "onnxruntime"
    assert engines["bundle"] == bundle


@pytest.mark.parametrize("kind", ["checkpoint", "bundle", "engines"])
def test_inspect_shows_a_table(kind: str, tree: Tree) -> None:
    result = sfexport("inspect", tree.root / kind)
    assert result.exit_code == 0
    assert_says(result.stdout, kind, "hybrid layers", "[0, 2]", "decode mode")
    assert ("past" in result.stdout) == (kind != "checkpoint")


def test_demo_goes_the_whole_way_and_can_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        result = sfexport("demo", "-o", tmp_path / "demo")
        assert result.exit_code == 0, result.stderr
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {"bundle", "checkpoint", "clip.mp4", "engines"}
    assert_says(result.stdout, "A: ", "sfexport ask", "arity")


# Parity.


@pytest.fixture
def torch() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


@pytest.mark.parametrize("video", [True, False])
def test_parity_passes_on_the_clip_and_on_noise(video: bool, tree: Tree, torch: None) -> None:
    report = document(sfexport("parity", tree.engines, *[tree.clip] * video, "--json"))
    assert report["passed"]
    assert all(c["passed"] for c in report["comparisons"])
    assert {c["graph"] for c in report["comparisons"]} == {"vision_encoder", "compressor", "decoder"}
    assert [(a["mode"], a["passed"]) for a in report["answers"]] == [("released", True), ("trained", True)]
    assert report["frames"] == (16 if video else 8)


def test_parity_without_tolerance_fails(tree: Tree, torch: None) -> None:
    result = sfexport("parity", tree.engines, tree.clip, "--atol", 0, "--rtol", 0, "--json")
    assert result.exit_code == 1
    assert not strict_json(result.stdout)["passed"]


def test_parity_finds_a_wrong_graph(tree_copy: Tree, torch: None) -> None:
    onnx = pytest.importorskip("onnx")
    file = tree_copy.engines / "vision_encoder.onnx"
    graph = onnx.load(file, load_external_data=False)
    epsilons = [a for node in graph.graph.node for a in node.attribute if a.name == "epsilon"]
    epsilons[0].f = 0.5
    onnx.save(graph, file)
    promise_again(tree_copy.engines / "engine.json", file.name)
    result = sfexport("parity", tree_copy.engines, tree_copy.clip, "--json")
    assert result.exit_code == 1
    wrong = {c["graph"] for c in strict_json(result.stdout)["comparisons"] if not c["passed"]}
    assert wrong == {"vision_encoder"}
    shown = sfexport("parity", tree_copy.engines, tree_copy.clip)
    assert shown.exit_code == 1
    assert_says(shown.stdout, "FAIL  vision_encoder", "parity FAILED")


def test_torch_engines_answer_as_the_others_do(tree: Tree, tmp_path: Path, torch: None) -> None:
    assert sfexport("build", tree.bundle, "-o", tmp_path / "engines", "--backend", "torch").exit_code == 0
    arguments = (tree.clip, *TWO, "--max-new-tokens", 8, "--json")
    ours = document(sfexport("ask", tmp_path / "engines", *arguments))
    theirs = document(sfexport("ask", tree.engines, *arguments))
    assert (ours["backend"], theirs["backend"]) == ("torch", "onnxruntime")
    assert [a["ids"] for a in ours["questions"]] == [a["ids"] for a in theirs["questions"]]


def test_build_rounds_a_checkpoint_and_refuses_a_bundle_that_is_not(tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    built = sfexport("build", tree.checkpoint, "-o", out, "--quantize", "int4", "--backend", "onnxruntime")
    assert built.exit_code == 0, built.stderr
    assert document(sfexport("inspect", tmp_path / "engines-bundle", "--json"))["options"]["quantize"] == "int4"
    assert sfexport("build", tmp_path / "engines-bundle", "-o", out, "--quantize", "int4").exit_code == 0
    refused = sfexport("build", tree.bundle, "-o", tmp_path / "other", "--quantize", "int4")
    assert refused.exit_code == 2
    assert "not rounded" in refused.stderr and "--quantize int4" in refused.stderr
