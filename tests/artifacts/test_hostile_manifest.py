"""Manifests and graphs are not trusted: any value in any place is refused with a reason, or does no harm."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import pytest
from helpers import assert_says, edit_json, promise_again, refusal, sfexport

from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.engines import Engines
from sfexport.artifacts.inspect import inspect
from sfexport.artifacts.manifest_files import content_digest
from sfexport.demo.run import DemoPaths as Tree
from sfexport.engines.build import open_backend
from sfexport.errors import BundleError, SfexportError

HOSTILE = [None, True, -1, 0, 10**30, 1.5, float("inf"), "", "/dev/zero", "../x", "\x1b[31m", [], {}, [[1]], 2**40]
# How many of a bundle's many inputs and outputs are tried.
PLACES = int(os.environ.get("SFEXPORT_PLACES", "40"))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield (*path, key)
        yield from places(entry, (*path, key))


def changed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    out = copy.deepcopy(content)
    inner = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return out


@pytest.mark.parametrize("signed", [True, False], ids=["digest follows", "digest stays"])
@pytest.mark.parametrize("kind", ["bundle", "engines"])
def test_any_value_in_any_place_is_refused_or_harmless(kind: str, signed: bool, tree_copy: Tree) -> None:
    file = tree_copy.bundle / "sfexport.json" if kind == "bundle" else tree_copy.engines / "engine.json"
    before = json.loads(file.read_text())
    chosen, chance = sorted(places(before), key=str), random.Random(7)
    # Every place outside the long lists of inputs and outputs, and some of those.
    few = [path for path in chosen if path[0] not in ("graphs", "model")]
    rest = [path for path in chosen if path not in few]
    for path in [*few, *chance.sample(rest, min(PLACES, len(rest)))]:
        for value in chance.sample(HOSTILE, 5) if len(rest) > PLACES else HOSTILE:
            content = changed(before, path, value)
            if signed and path != ("digest",):
                content["digest"] = content_digest(content)
            file.write_text(json.dumps(content))
            try:
                inspect(file.parent)
            except SfexportError as error:
                assert error.exit_code == 2, (path, value)
            else:
                assert signed or content == before, (path, value)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "/dev/zero"},
        {"file": "../bundle/config.json"},
        {"offset": 0},
        {"offset": 2**60},
        {"length": 4},
        {"dtype": "F16"},
        {"shape": [1, 1]},
        {"file": "config.json", "offset": 0},
    ],
    ids=str,
)
def test_embedding_elsewhere_is_refused(change: dict[str, Any], tree_copy: Tree) -> None:
    edit_json(tree_copy.bundle / "sfexport.json", lambda c: c["weights"]["embedding"].update(change))
    assert_says(refusal(tree_copy.root, "inspect", tree_copy.bundle), tree_copy.bundle, "damaged")


def test_pipe_in_the_place_of_a_file_is_refused(tree_copy: Tree) -> None:
    for name in ("config.json", "decoder.onnx", "sfexport.json"):
        file = tree_copy.bundle / name
        kept = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        result = sfexport("inspect", tree_copy.engines)
        assert (result.exit_code, result.stdout) == (2, "")
        file.unlink()
        file.write_bytes(kept)
    shard = next(tree_copy.bundle.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    assert sfexport("inspect", tree_copy.engines).exit_code == 2


def test_listed_file_of_many_gigabytes_is_not_read(tree_copy: Tree) -> None:
    size = 20 << 30
    os.truncate(tree_copy.bundle / "tokenizer.json", size)
    edit_json(tree_copy.bundle / "sfexport.json", lambda c: c["files"]["tokenizer.json"].update(size=size))
    result = sfexport("inspect", tree_copy.bundle)
    assert result.exit_code == 2
    assert_says(result.stderr, "damaged", "files")


# Graphs.


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.external_data)


def entry(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for found in external(model).external_data:
            if found.key == key:
                found.value = value

    return change


def drop(key: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = external(model)
        kept = [found for found in tensor.external_data if found.key != key]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)

    return change


def in_a_node(model: onnx.ModelProto) -> None:
    """The same tensor, as the value of a Constant."""
    node = model.graph.node.add(op_type="Constant", name="c", output=["unused"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external(model))


GRAPH_CHANGES = {
    "a pipe": entry("location", "pipe"),
    "a device": entry("location", "/dev/zero"),
    "outside": entry("location", "../checkpoint/config.json"),
    "the manifest": entry("location", "sfexport.json"),
    "no file": entry("location", ""),
    "offset in words": entry("offset", "ten"),
    "a negative offset": entry("offset", "-8"),
    "beyond the end": entry("offset", str(2**62)),
    "too long": entry("length", str(2**62)),
    "another length": entry("length", "4"),
    "no length": drop("length"),
    "no location": drop("location"),
    "another shape": lambda model: external(model).dims.append(7),
    "an unknown type": lambda model: setattr(external(model), "data_type", 77),
    "in a node": in_a_node,
}


@pytest.mark.parametrize("name", GRAPH_CHANGES)
def test_graph_that_names_other_data_is_refused(name: str, tree_copy: Tree) -> None:
    os.mkfifo(tree_copy.bundle / "pipe")
    for directory, manifest in ((tree_copy.engines, "engine.json"), (tree_copy.bundle, "sfexport.json")):
        model = onnx.load(directory / "decoder.onnx", load_external_data=False)
        GRAPH_CHANGES[name](model)
        (directory / "decoder.onnx").write_bytes(model.SerializeToString())
        promise_again(directory / manifest, "decoder.onnx")
        if directory == tree_copy.engines:
            engines = Engines.open(tree_copy.engines)
            with pytest.raises(BundleError, match="decoder"):
                open_backend(engines)
    out = ("-o", tree_copy.root / "new")
    os.unlink(tree_copy.bundle / "pipe")
    os.mkfifo(tree_copy.bundle / "pipe")
    result = sfexport("build", tree_copy.bundle, *out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert_says(result.stderr.splitlines()[-1], tree_copy.bundle / "decoder.onnx")
    assert not (tree_copy.root / "new").exists()


def test_graph_of_another_model_is_refused(tree_copy: Tree) -> None:
    foreign = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["a"], ["b"])],
            "foreign",
            [onnx.helper.make_tensor_value_info("a", onnx.TensorProto.STRING, [1])],
            [onnx.helper.make_tensor_value_info("b", onnx.TensorProto.STRING, [1])],
        )
    )
    (tree_copy.bundle / "decoder.onnx").write_bytes(foreign.SerializeToString())
    promise_again(tree_copy.bundle / "sfexport.json", "decoder.onnx")
    Bundle.open(tree_copy.bundle)
    paragraph = refusal(tree_copy.root, "build", tree_copy.bundle, "-o", tree_copy.root / "new")
    assert_says(paragraph, "decoder.onnx is not the graph that the manifest describes")


def test_manifest_edited_by_hand_is_refused(tree_copy: Tree) -> None:
    for file in (tree_copy.engines / "engine.json", tree_copy.bundle / "sfexport.json"):
        file.write_text(file.read_text().replace('"machine": "', '"machine": "x').replace('"frames": ', '"frames": 1'))
        assert_says(refusal(tree_copy.root, "inspect", file.parent), file, "was changed after it was written")


def test_manifest_that_was_laid_out_anew_is_the_same(tree_copy: Tree) -> None:
    file = tree_copy.bundle / "sfexport.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    Bundle.open(tree_copy.bundle)
