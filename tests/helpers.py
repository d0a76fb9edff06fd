"""Small builders and checks that several test files share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from sfexport.artifacts.manifest_files import content_digest
from sfexport.cli import main

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


def sfexport(*args: object) -> Result:
    """Run the command line in this process; stdout and stderr apart."""
    try:
        runner = CliRunner(mix_stderr=False)
    except TypeError:  # click 8.2 and later always keep them apart
        runner = CliRunner()
    return runner.invoke(main, [str(arg) for arg in args])


def snapshot(directory: Path) -> dict[str, str]:
    """What is below a directory: a link's target, a file's digest, 'directory'."""

    def describe(path: Path) -> str:
        if path.is_symlink():
            return f"-> {path.readlink()}"
        return "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    return {str(path.relative_to(directory)): describe(path) for path in directory.rglob("*")}


def refusal(directory: Path, *args: object, after_steps: bool = False) -> str:
    """Run a command that must be refused, leaving everything below `directory` as it was; the paragraph it says.

    Args:
        after_steps: it may report steps first; otherwise the paragraph is all it says.
    """
    before = snapshot(directory)
    result = sfexport(*args)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    assert after_steps or len(lines) == 1, lines
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert snapshot(directory) == before
    return lines[-1]


def assert_says(paragraph: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in paragraph, (part, paragraph)


def document(result: Result) -> Any:
    """stdout as one strict JSON document."""
    assert result.exit_code == 0, result.stderr
    return strict_json(result.stdout)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place; a manifest's own digest follows, as if it had been that way all along."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    if "digest" in content:
        content["digest"] = content_digest(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def set_fields(file: Path, **fields: Any) -> None:
    edit_json(file, lambda content: content.update(fields))


def remove_field(file: Path, name: str) -> None:
    edit_json(file, lambda content: content.pop(name))


def split_shard(shard: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_shard(shard: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(shard: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = split_shard(shard)
    change(header)
    write_shard(shard, header, data)


def read_tensors(shard: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape and bytes of every tensor in a safetensors file."""
    header, data = split_shard(shard)
    header.pop("__metadata__", None)
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}


def write_tensors(shard: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Write a safetensors file without holes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    write_shard(shard, header, b"".join(data for _, _, data in tensors.values()))


def change_tensors(shard: Path, change: Callable[[dict[str, tuple[str, list[int], bytes]]], Any]) -> None:
    """Add, remove or replace tensors of a safetensors file in place."""
    tensors = read_tensors(shard)
    change(tensors)
    write_tensors(shard, tensors)


def promise_again(manifest: Path, name: str) -> None:
    """Write a changed file's digest into its manifest, as if it had been that way all along."""
    file = manifest.with_name(name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_json(manifest, lambda content: content["files"][name].update(sha256=digest, size=file.stat().st_size))
