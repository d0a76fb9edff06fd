"""Kinds of edited graphs and weights, and of strange places for bundles and engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from helpers import FIRST, edit_json, promise_again, split_shard

from fuzz.base import BUNDLE, ENGINES, copy, expect_same, read
from fuzz.kinds import Case, Expect, Kind, command
from fuzz.manifests import both, use

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER
GRAPHS = ("vision_encoder", "compressor", "decoder")
BUNDLE_FILE, ENGINE_FILE = "sfexport.json", "engine.json"


# Graphs that were edited, with their digests in the manifest edited too.


def _graph_kinds() -> Iterator[Kind]:
    for graph in GRAPHS:
        for name, fields in EXTERNAL.items():
            act = partial(_external, graph=graph, fields=fields)
            yield Kind(f"external data of the {graph}: {name}", "manifests", act, REFUSED)
        for name, raw in {
            "empty": b"",
            "text": b"not a graph",
            "an empty graph": onnx.ModelProto().SerializeToString(),
        }.items():
            yield Kind(f"the {graph} is {name}", "manifests", partial(_graph_bytes, graph=graph, raw=raw), REFUSED)
        yield Kind(f"the {graph} is another graph", "manifests", partial(_other_graph, graph=graph), REFUSED)


EXTERNAL: dict[str, dict[str, str]] = {
    "location above": {"location": "../../secret"},
    "location absolute": {"location": "/etc/passwd"},
    "location /dev/zero": {"location": "/dev/zero"},
    "location a FIFO": {"location": "fifo"},
    "location a directory": {"location": "."},
    "location empty": {"location": ""},
    "location with a NUL": {"location": "a\0b"},
    "location with escapes": {"location": "\x1b[2J"},
    "location missing": {"location": "nowhere.safetensors"},
    "offset negative": {"offset": "-1"},
    "offset in words": {"offset": "many"},
    "offset beyond the end": {"offset": "4000000000"},
    "offset of 10^30": {"offset": str(10**30)},
    "length negative": {"length": "-4"},
    "length beyond the end": {"length": "4000000000"},
    "length of another tensor": {"length": "2"},
    "length in words": {"length": "many"},
}


def _external(case: Case, graph: str, fields: dict[str, str]) -> None:
    file = both(case) / BUNDLE / f"{graph}.onnx"
    os.mkfifo(case.room / BUNDLE / "fifo")
    model = onnx.load(file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    kept = {entry.key: entry.value for entry in tensor.external_data} | fields
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    promise_again(case.room / BUNDLE / BUNDLE_FILE, file.name)
    use(case, built_again=True)


def _graph_bytes(case: Case, graph: str, raw: bytes) -> None:
    bundle = both(case) / BUNDLE
    (bundle / f"{graph}.onnx").write_bytes(raw)
    promise_again(bundle / BUNDLE_FILE, f"{graph}.onnx")
    use(case, built_again=True)


def _other_graph(case: Case, graph: str) -> None:
    """A small graph of somebody else's that onnx finds right."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    body = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    _graph_bytes(case, graph, model.SerializeToString())


# Weights that were edited; sizes and headers stay.

VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeroed": np.zeros_like,
    "negated": lambda bits: bits ^ 0x8000,
    "reversed": lambda bits: bits[::-1].copy(),
}


def _weight_kinds() -> Iterator[Kind]:
    for by_reference in (False, True):
        where = "referenced" if by_reference else "copied"
        for name, change in VALUES.items():
            act = partial(_edited_weights, change=change, by_reference=by_reference)
            yield Kind(f"{where} weights {name} after the export", "manifests", act, REFUSED)
        yield Kind(
            f"{where} weights with one byte flipped after the export",
            "manifests",
            partial(_flipped_weight, by_reference=by_reference),
            REFUSED,
            drawn=True,
        )
    yield Kind("weights replaced under engines that were built", "manifests", _under_engines, REFUSED)


def _made(case: Case, by_reference: bool) -> tuple[Path, Path]:
    """(bundle, shard to edit)."""
    checkpoint = copy(case, "checkpoint")
    command("export", checkpoint, "-o", case.room / BUNDLE, "--weights", "reference" if by_reference else "copy")
    return case.room / BUNDLE, (checkpoint if by_reference else case.room / BUNDLE) / FIRST


def _edit_weights(shard: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    _, data = split_shard(shard)
    header = shard.read_bytes()[: -len(data)]
    shard.write_bytes(header + change(np.frombuffer(data, "<u2")).astype("<u2").tobytes())


def _build_and_answer(case: Case) -> None:
    command("build", case.room / BUNDLE, "-o", case.room / ENGINES, "--backend", "onnxruntime")
    read(case.room / ENGINES)


def _edited_weights(case: Case, change: Callable[[np.ndarray], np.ndarray], by_reference: bool) -> None:
    _, shard = _made(case, by_reference)
    _edit_weights(shard, change)
    _build_and_answer(case)


def _flipped_weight(case: Case, by_reference: bool) -> None:
    _, shard = _made(case, by_reference)
    _, data = split_shard(shard)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) - 1 - case.rng.randrange(len(data))] ^= 1 << case.rng.randrange(8)
    shard.write_bytes(raw)
    _build_and_answer(case)


def _under_engines(case: Case) -> None:
    _, shard = _made(case, by_reference=True)
    _build_and_answer(case)
    _edit_weights(shard, VALUES["negated"])
    read(case.room / ENGINES)


# Other people's directories.


def _stranger_kinds() -> Iterator[Kind]:
    yield Kind("a bundle moved beside another checkpoint of the same name", "manifests", _moved_beside_another, EITHER)
    yield Kind("engines whose bundle was exported again, unchanged", "manifests", _exported_again, EITHER)
    yield Kind("engines whose bundle is a file", "manifests", _bundle_is_a_file, REFUSED)
    for what in ("ask", "build", "inspect", "plan", "parity"):
        for place in ("/dev/null", "/proc/self", "/etc/passwd", "/", "", "nowhere", "a\nb", "-"):
            act = partial(_strange_place, verb=what, place=place)
            yield Kind(f"{what} on {place!r}", "manifests", act, REFUSED)


def _moved_beside_another(case: Case) -> None:
    """The recorded place is still right; a checkpoint with other weights lies where the relative one points."""
    from sfexport.testing.random_checkpoint import write_random_checkpoint

    checkpoint = copy(case, "checkpoint")
    command("export", checkpoint, "-o", case.room / BUNDLE, "--weights", "reference")
    (case.room / "elsewhere").mkdir()
    (case.room / BUNDLE).rename(case.room / "elsewhere" / BUNDLE)
    write_random_checkpoint(case.room / "elsewhere" / "checkpoint", seed=5)
    engines = case.room / ENGINES
    command("build", case.room / "elsewhere" / BUNDLE, "-o", engines, "--backend", "onnxruntime")
    expect_same(case, read(engines))


def _exported_again(case: Case) -> None:
    _made(case, by_reference=False)
    command("build", case.room / BUNDLE, "-o", case.room / ENGINES, "--backend", "onnxruntime")
    command("export", case.room / "checkpoint", "-o", case.room / BUNDLE, "--weights", "copy")
    expect_same(case, read(case.room / ENGINES))


def _bundle_is_a_file(case: Case) -> None:
    both(case)
    edit_json(case.room / ENGINES / ENGINE_FILE, lambda c: c["bundle"].update(relative="engine.json", absolute="/x"))
    read(case.room / ENGINES)


def _strange_place(case: Case, verb: str, place: str) -> None:
    os.chdir(case.room)
    more = ("/dev/null", "-q", "What?") if verb == "ask" else ("-o", case.room / "out") if verb == "build" else ()
    command(verb, place, *more)


KINDS = [*_graph_kinds(), *_weight_kinds(), *_stranger_kinds()]
