"""`sfexport plan`: its figures against the build's own, against a real run's memory, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import set_fields, snapshot, strict_json

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.engines.build import build
from sfexport.engines.memory import ACTIVATIONS, GraphMemory, estimate_memory, sum_up
from sfexport.engines.profiles import Limits, resolve_profiles
from sfexport.errors import CheckpointError, InputError
from sfexport.exporting.export import ExportOptions, export
from sfexport.machines.targets import find_target, load_targets
from sfexport.planning.flops import Storage, weight_bytes
from sfexport.planning.memory import GRAPH_PARTS
from sfexport.planning.plan import CPU, Plan, plan
from sfexport.planning.report import show
from sfexport.testing.random_checkpoint import write_random_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ["fp32", "bf16", "int4+bf16", "int4+int8"]
AGX = "jetson-orin-agx-64"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "checkpoint"
    write_random_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The 7 B model's headers over empty files: a plan reads no weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from sparse_checkpoint import write_sparse_checkpoint

        path = tmp_path_factory.mktemp("plan") / "released"
        write_sparse_checkpoint(path)
        yield path


def figures(found: Plan, target: str, precision: str) -> dict[str, Any]:
    document = found.to_json()
    row = next(t for t in document["targets"] if t["target"] == target)
    return next(p for p in row["precisions"] if p["precision"] == precision)


def test_json_is_whole_and_strict(checkpoint: Path) -> None:
    before = snapshot(checkpoint)
    document = strict_json(json.dumps(plan(checkpoint, AGX, 16).to_json(), allow_nan=False))
    assert document["computed"] is True
    assert document["lengths"]["frames"] == 16 and document["lengths"]["slow"] == 64
    assert set(document["flops"]) == {"vision", "compressor", "prefill_before", "prefill_fast", "prefill_question"}
    (target,) = document["targets"]
    assert target["target"] == AGX and target["jetpack"] == "6.2" and target["memory"] == 64 * 10**9
    assert all(0 < share <= 1 for share in target["efficiency"].values())
    assert [p["precision"] for p in target["precisions"]] == NAMES
    for row in target["precisions"]:
        assert row["run_peak"] > sum(row["weights"].values()) - row["weights"]["embedding"] > 0
        assert row["builds"] and row["answers"] and row["tokens_per_second"] > 0
    assert snapshot(checkpoint) == before


def test_a_plan_counts_with_what_a_build_counts_with(checkpoint: Path, tmp_path: Path) -> None:
    found = plan(checkpoint, AGX, 16)
    for precision in ("fp32", "bf16"):
        bundle = export(Checkpoint.open(checkpoint), tmp_path / precision, ExportOptions(16, precision=precision))
        theirs = estimate_memory(bundle, resolve_profiles(bundle, Limits(16)), mapped_weights=False)
        row = figures(found, AGX, precision)
        assert row["run_peak"] == theirs.run and row["text_key_values"] == theirs.text_key_values
        assert row["build_peak"] == {"device": theirs.build_device, "host": theirs.build_host}
        assert row["activations"] == {g.name: g.activations for g in theirs.graphs}
        # By part as in the graphs; the compressor has a copy of the hybrid layers' input norms.
        norms = 2 * 64 * bundle.config.text.num_layers // 4 * {"fp32": 4, "bf16": 2}[precision]
        for graph in theirs.graphs:
            parts = sum(row["weights"][part] for part in GRAPH_PARTS[graph.name])
            assert graph.weights == parts + (norms if graph.name == "compressor" else 0)
        for mapped in (False, True):
            whole = estimate_memory(bundle, resolve_profiles(bundle, Limits(16)), mapped)
            assert sum_up(whole.graphs, whole.text_key_values, whole.slow_key_values, mapped) == whole


def test_rounded_weights_change_weights_only(checkpoint: Path) -> None:
    found = plan(checkpoint, AGX, 16)
    half, *rounded = (figures(found, AGX, name) for name in NAMES[1:])
    opened = Checkpoint.open(checkpoint)
    for row, bits in zip(rounded, (16, 8), strict=True):
        assert row["weights"] == weight_bytes(opened.config, opened.tower, Storage("", 2, 4, bits))
        saved = sum(half["weights"].values()) - sum(row["weights"].values())
        assert saved > 0
        # The graphs of the half bundle count the hybrid layers' norms twice, the parts once.
        assert 0 <= half["run_peak"] - row["run_peak"] - saved < 1024
        # An 8-bit head is never expanded.
        for same in ("text_key_values", "slow_key_values", "activations", "engine_activations"):
            assert row[same] == half[same]


def test_every_figure_names_its_source(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(checkpoint, AGX, 16)
    (target,) = found.to_json()["targets"]
    sources = target["sources"]
    for name in ("engine", "engine_activations", "build_host"):
        assert "measured with the builder of TensorRT for RTX 1.7 (not TensorRT)" in sources[name]
    for name in ("weights", "activations", "text_key_values", "slow_key_values"):
        assert sources[name] == "computed"
    assert "27% of the bandwidth: plain ONNX graph" in sources["plain_tokens_per_second"]
    assert "77% of the bandwidth: TinyChat" in sources["tokens_per_second"]
    for row in target["precisions"]:
        assert row["plain_tokens_per_second"] < row["tokens_per_second"]
        assert sum(row["weights"].values()) > 0 and row["engines"]["decoder"] > row["weights"]["decoder"]
    show(found)
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("with the builder of TensorRT for RTX 1.7, not TensorRT", "tokens/s, plain graph", "27%", "TinyChat"):
        assert words in printed
    assert plan(checkpoint, CPU, 16).to_json()["targets"][0]["sources"] is None


def test_estimates_are_near_what_the_builder_took() -> None:
    """The figures of docs/benchmarks/full_width.md: bytes of weights, anonymous memory of the build, activations."""
    start = 190_000_000  # of the process before a build, at most
    for weights, anonymous, converted in (
        (1_161_600_000, 2_575_000_000, False),
        (2_093_900_000, 4_469_300_000, False),
        (1_161_600_000, 3_093_800_000, True),
        (2_093_900_000, 5_591_600_000, True),
        (595_500_000, 1_741_700_000, True),
        (1_734_500_000, 3_832_000_000, False),
    ):
        estimated = GraphMemory("decoder", weights, 0, weights, converted=converted).host(mapped_weights=True)
        assert 0.97 < (estimated + start) / anonymous < 1.12
    for graph, computed, measured in (
        ("vision_encoder", 3_183_800_000, 891_800_000),
        ("compressor", 157_900_000, 101_100_000),
        ("decoder", 230_600_000, 304_700_000),
        ("decoder", 230_600_000, 294_000_000),
    ):
        assert 1 <= ACTIVATIONS[graph] * computed / measured < 1.1


def test_all_compares_every_target(checkpoint: Path) -> None:
    document = plan(checkpoint, "all", 16).to_json()
    assert [t["target"] for t in document["targets"]] == list(load_targets())
    assert all([p["precision"] for p in t["precisions"]] == NAMES for t in document["targets"])


def test_the_released_model_on_known_boards(released: Path) -> None:
    """Verdicts as docs/jetson.md has them; speeds near what others published for models of this size."""
    found = plan(released, "all", 64)

    def verdict(target: str, precision: str) -> tuple[bool, bool]:
        row = figures(found, target, precision)
        return row["builds"], row["answers"]

    assert verdict(AGX, "bf16") == (True, True)
    assert verdict("jetson-orin-agx-32", "bf16") == (False, True)
    assert verdict("jetson-orin-nx-16", "bf16") == (False, False)
    assert verdict("jetson-orin-nx-16", "int4+int8")[1]
    assert verdict("jetson-orin-nano-8", "int4+int8") == (False, False)
    assert verdict("l4", "bf16") == (True, True) and verdict("l4", "fp32") == (False, False)
    # TinyChat on an AGX Orin: 11.5 to 11.9 tokens/s in fp16 and 32.3 to 38.5 in INT4; 64 frames take 5.8 s.
    assert figures(found, AGX, "bf16")["tokens_per_second"] == pytest.approx(11.7, rel=0.1)
    assert figures(found, AGX, "int4+bf16")["tokens_per_second"] == pytest.approx(35, rel=0.1)
    # A plain ONNX graph on an Orin Nano reached 27 % of its bandwidth; TinyChat's figures are of 77 %.
    low, high = (figures(found, AGX, "bf16")[key] for key in ("plain_tokens_per_second", "tokens_per_second"))
    assert low / high == pytest.approx(0.27 / 0.77)
    assert 5 < figures(found, AGX, "bf16")["seconds"]["first_token"] < 9
    # A decode step reads every weight once, and K/V.
    row, orin = figures(found, AGX, "bf16"), find_target(AGX)
    read = orin.bandwidth_gbs * 1e9 * found.targets[0].efficiency.bandwidth / row["tokens_per_second"]
    assert read == pytest.approx(row["weights"]["decoder"] + row["weights"]["head"] + 1340 * 57_344, rel=1e-4)


def test_seconds(released: Path) -> None:
    few, many = (plan(released, AGX, n).to_json()["targets"][0]["precisions"] for n in (64, 128))
    for short, long in zip(few, many, strict=True):
        a, b = short["seconds"], long["seconds"]
        if short["precision"] == "fp32":
            assert a["first_token"] is None and a["vision"] is None  # the table has no fp32 rate
            continue
        assert b["vision"] == pytest.approx(2 * a["vision"]) and b["compressor"] == pytest.approx(2 * a["compressor"])
        stages = [a[name] for name in ("vision", "compressor", "prefix", "question")]
        assert a["first_token"] == pytest.approx(sum(stages)) and a["second_question"] == a["question"]
        assert a["second_question"] < a["first_token"] / 10
        assert long["slow_key_values"] == 2 * short["slow_key_values"]
        assert long["tokens_per_second"] < short["tokens_per_second"]


def test_decode_mode_counts_slow_tokens(checkpoint: Path, tmp_path: Path) -> None:
    speeds = {}
    for mode in ("released", "trained"):
        write_random_checkpoint(tmp_path / mode, changes={"decode_mode": mode})
        speeds[mode] = figures(plan(tmp_path / mode, AGX, 64), AGX, "bf16")["tokens_per_second"]
    assert speeds["trained"] < speeds["released"]


def test_a_model_without_slow_branch(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "plain", changes={"cross_attn_every_n_layers": None})
    row = figures(plan(tmp_path / "plain", AGX, 16), AGX, "bf16")
    assert row["slow_key_values"] == row["weights"]["compressor"] == 0


def test_jetpack_changes_what_building_takes(checkpoint: Path) -> None:
    old, new = (figures(plan(checkpoint, AGX, 16, jetpack), AGX, "bf16") for jetpack in ("6.2", "7.2"))
    # The parser's copy of the weights as they are stored.
    stored = old["weights"]["decoder"] + old["weights"]["head"]
    assert old["build_peak"]["host"] - new["build_peak"]["host"] == pytest.approx(stored, rel=0.01)
    assert new["run_peak"] == old["run_peak"]


def test_the_bundles_frames_are_the_default(checkpoint: Path) -> None:
    assert plan(checkpoint, AGX).lengths.frames == 16  # mm_training_video_frames


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "jetson-tx2"}, "Unknown target 'jetson-tx2'"),
        ({"target": AGX, "jetpack": "5.1"}, "no JetPack 5.1"),
        ({"target": "all", "jetpack": "6.2"}, "--jetpack needs a --target"),
        ({"jetpack": "6.2"}, "--jetpack needs a --target"),
        ({"target": AGX, "frames": 0}, "--frames"),
        ({"target": AGX, "frames": -3}, "--frames"),
        ({"target": AGX, "frames": 65_537}, "--frames"),
        ({"target": CPU, "frames": 4096}, "1,024 positions"),
    ],
)
def test_refusals(checkpoint: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(checkpoint, **options)
    assert says in str(caught.value) and caught.value.hint


def test_not_a_checkpoint(tmp_path: Path, tree_copy: Any) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        plan(tmp_path / "nowhere", AGX)
    set_fields(tree_copy.checkpoint / "config.json", hidden_size=128)
    with pytest.raises(CheckpointError, match="config.json asks for"):
        plan(tree_copy.checkpoint, AGX)


@pytest.mark.parametrize(("target", "columns"), [(AGX, 80), ("h100", 80), ("all", 80), (CPU, 80)])
def test_tables_are_readable(
    checkpoint: Path, released: Path, target: str, columns: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (checkpoint, released):
        show(plan(path, target, 64))
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= columns
        assert "computed" in printed and "64 frames" in printed
        for name in ("int4+int8", *(load_targets() if target == "all" else ())):
            assert name in printed


def test_small_models_are_shown_in_mb(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(checkpoint, CPU, 16)
    show(found)
    line = next(line for line in capsys.readouterr().out.splitlines() if "answering" in line)
    assert f"{found.targets[0].figures[0].memory.run / 1e6:.2f}" in line


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cpu_memory_is_what_a_run_takes(tree: Any, tmp_path: Path, precision: str) -> None:
    """Planned before, measured after, in a process of its own. benchmarks/plan_memory.py does this at 0.5 B."""
    planned = {f.storage.name: f.memory.run for f in plan(tree.checkpoint, CPU, 16).targets[0].figures}
    bundle = export(Checkpoint.open(tree.checkpoint), tmp_path / "bundle", ExportOptions(precision=precision))
    engines = build(bundle, tmp_path / "engines", "onnxruntime")
    command = [sys.executable, str(BENCHMARKS / "plan_memory.py"), "--child", "answer", engines.path, tree.clip, "16"]
    done = run_within(300, list(map(str, command)))
    assert done.returncode == 0, done.stderr
    assert planned[precision] == pytest.approx(json.loads(done.stdout.splitlines()[-1])["peak"], rel=0.15)


def run_within(seconds: float, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python command; one that hangs is ended by SIGABRT, on which it says where each of its threads was."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        stdout, stderr = process.communicate(timeout=30)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def test_cpu_memory_grows_with_the_weights(tmp_path: Path, checkpoint: Path) -> None:
    write_random_checkpoint(tmp_path / "wide", changes={"hidden_size": 256, "intermediate_size": 1024})
    small, large = (plan(path, CPU, 16).targets[0].figures for path in (checkpoint, tmp_path / "wide"))
    for a, b in zip(small, large, strict=True):
        weights = [sum(x.weights.values()) - x.weights["embedding"] for x in (a, b)]
        assert b.memory.run - a.memory.run >= weights[1] - weights[0] > 0
        assert b.memory.build_device == 0
    fp32, _, int4, int8_head = (f.memory.run for f in large)
    assert int8_head <= int4 < fp32
