"""sfexport/versions.py, and that pyproject, the tables, the pages and the code agree with it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfexport.engines.tensorrt.parser_support import support_for
from sfexport.engines.tensorrt.plugin import choose_plugin
from sfexport.errors import InputError
from sfexport.kernels.launch_config import SMS
from sfexport.machines.targets import kernel_ptx_isa
from sfexport.versions import (
    FIRST_AOT_PLUGINS,
    FIRST_AOT_WITH_NEW_NUMPY,
    NEW_NUMPY,
    NEWEST_TENSORRT,
    OLDEST,
    OLDEST_JETPACK,
    TENSORRT_RTX,
    aot_needs_old_numpy,
    has_aot_plugins,
    is_older,
    maps_weights,
    version_numbers,
    version_text,
)

ROOT = Path(__file__).parent.parent
NO_THRESHOLDS = ("versions.py", "__version__.py", "random_checkpoint.py")  # the last writes the reference's version
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("10.16.1.11", (10, 16, 1, 11)),
        ("v10.16.1.11-1+cuda13.2", (10, 16, 1, 11)),
        ("v10.13.3", (10, 13, 3)),
        ("10.3.0.30-1+cuda12.5", (10, 3, 0, 30)),
        ("6.2.1+b38", (6, 2, 1)),  # apt's nvidia-jetpack
        ("36.4.3", (36, 4, 3)),  # Jetson Linux
        ("2.35-0ubuntu3.8", (2, 35)),
        ("10.3.0~rc1-1", (10, 3, 0)),
        ("5.10.104-tegra", (5, 10, 104)),
        (" 3.12.3+", (3, 12, 3)),
        ("2.4.0rc1", (2, 4, 0)),
        ("2.13.0.dev20260101+cpu", (2, 13, 0)),
        ("12", (12,)),
        ("unknown", ()),
        ("", ()),
        (None, ()),
    ],
)
def test_a_versions_leading_numbers(text: str | None, numbers: tuple[int, ...]) -> None:
    assert version_numbers(text) == numbers
    assert version_numbers(version_text(numbers)) == numbers


def test_what_is_older() -> None:
    assert is_older("10.2.9", (10, 3)) and is_older("9.9", (10, 3)) and is_older(None, (10, 3))
    assert not is_older("10.3", (10, 3)) and not is_older("10.16.2.10", (10, 3)) and not is_older("11", (10, 3))


@pytest.mark.parametrize("package", OLDEST)
def test_pyproject_asks_for_the_same(package: str) -> None:
    """Every mention of a package has this lower bound, in whatever group of dependencies."""
    if package == "python":
        bounds = re.findall(r"requires-python = \">=([\d.]+)\"", PYPROJECT)
    else:
        bounds = re.findall(rf"\"{package}(?:-gpu)?>=([\d.]+)", PYPROJECT)
        assert len(bounds) == len(re.findall(rf"\"{package}(?:-gpu)?[><=~!; \"]", PYPROJECT)), "one has no bound"
    assert bounds and {version_numbers(bound) for bound in bounds} == {OLDEST[package]}


def test_pyproject_pins_tensorrt_for_rtx() -> None:
    pins = re.findall(r"\"tensorrt-rtx-cu12-bindings==([\d.]+);", PYPROJECT)
    assert len(pins) == 2 and {version_numbers(pin) for pin in pins} == {TENSORRT_RTX}


def test_no_other_file_of_the_package_holds_a_version() -> None:
    """Neither as a text ('10.9', 'numpy<2.4') nor as a tuple that a version is compared with."""
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / "sfexport").rglob("*.py"))
        if file.name not in NO_THRESHOLDS
        for line in version_literals(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ["x = '10.9'", "f'numpy<{x}' 'triton>=3.7'", "is_older(v, (10, 9))", "(10, 9) <= version_numbers(v)[:2] < (11, 0)"],
)
def test_versions_are_found(code: str) -> None:
    assert list(version_literals(ast.parse(code))) != []


def test_other_literals_are_no_versions() -> None:
    code = "def f(v):\n    '''As in 10.9.'''\n    return is_older(v, OLDEST), x < (1, 2), 'at 0.5 of 10'"
    assert list(version_literals(ast.parse(code))) == []


def version_literals(tree: ast.Module) -> Iterator[int]:
    """Lines of version literals: a text that is one or bounds a package, a tuple of integers compared with one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if re.fullmatch(r"v?\d+(\.\d+)+", text) or re.search(r"\w(==|>=|<=|~=|<|>)\d", text):
                yield node.lineno
        elif isinstance(node, ast.Compare | ast.Call) and {"is_older", "version_numbers"} & names_in(node):
            yield from (inner.lineno for inner in ast.walk(node) if is_tuple_of_integers(inner))


def names_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def is_tuple_of_integers(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Tuple)
        and bool(node.elts)
        and all(isinstance(element, ast.Constant) and type(element.value) is int for element in node.elts)
    )


def test_the_onnx_runtime_that_doctor_installs_is_pyprojects() -> None:
    """The GPU's build on x86-64 only: the aarch64 one has no code for a Jetson's GPU."""
    (marker,) = re.findall(r"\"onnxruntime-gpu>=[\d.]+; ([^\"]+)\"", PYPROJECT)
    assert marker == "platform_system == 'Linux' and platform_machine == 'x86_64'"


def test_the_tables_begin_and_end_with_the_same_versions() -> None:
    surfaces = [file.stem.split("_")[1] for file in (ROOT / "tests/trt_bindings").glob("surface_*.json")]
    assert max(map(version_numbers, surfaces)) == NEWEST_TENSORRT
    assert min(map(version_numbers, surfaces)) == OLDEST["tensorrt"]
    assert version_numbers(support_for(version_text(OLDEST["tensorrt"])).row) == OLDEST["tensorrt"]
    with pytest.raises(InputError):
        support_for(f"{OLDEST['tensorrt'][0]}.{OLDEST['tensorrt'][1] - 1}")
    with pytest.raises(InputError):
        kernel_ptx_isa(min(SMS) - 1)


@pytest.mark.parametrize(
    ("tensorrt", "numpy", "kind"),
    [
        ("10.3.0", "1.26.4", "python"),
        ("10.8", "2.4.6", "python"),
        ("10.9.0", "2.3.5", "ahead"),
        ("10.9.0", "2.4.0", "python"),
        ("10.16.2.10", "2.4.6", "python"),
        ("10.17.0", "2.4.6", "python"),
        ("11.0.0", "2.5.1", "ahead"),
        ("11.4.0.106", "1.26.4", "ahead"),
    ],
)
def test_the_kind_of_plugin(tensorrt: str, numpy: str, kind: str) -> None:
    assert choose_plugin(tensorrt, numpy) == kind
    works = has_aot_plugins(tensorrt) and (is_older(numpy, NEW_NUMPY) or not aot_needs_old_numpy(tensorrt))
    assert works == (kind == "ahead")


def test_weights_are_read_where_they_lie_from_10_13_on() -> None:
    assert [maps_weights(v) for v in ("10.3", "10.12.9", "10.13", "11.0")] == [False, False, True, True]


def test_the_pages_name_the_same_versions() -> None:
    jetson, datacenter = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("jetson", "datacenter"))
    numpy, first, end = version_text(NEW_NUMPY), version_text(FIRST_AOT_PLUGINS), FIRST_AOT_WITH_NEW_NUMPY
    for page in (jetson, datacenter):
        assert re.findall(r"numpy<([\d.]+)", page).count(numpy) >= 1
        assert f"NumPy {numpy} with TensorRT {first} to 10.16" in page and end == (11, 0)
    assert f"JetPack {OLDEST_JETPACK[0]}.{OLDEST_JETPACK[1] - 1} and older" in jetson


def too_old_a_triton(folder: Path, version: str) -> dict[str, str]:
    """An environment whose `triton` says it is of this version and has nothing in it."""
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_a_triton_that_is_too_old_counts_as_none(tmp_path: Path) -> None:
    """`build --check` says what it needs and checks all else; the kernel is one line that was not checked."""
    environment = too_old_a_triton(tmp_path / "old", "3.3.1")
    arguments = ["build", "sfexport/demo/model", "--check", "--target", "jetson-orin-agx-64"]
    done = subprocess.run(
        [sys.executable, "-m", "sfexport", *arguments, "--json"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [check for check in json.loads(done.stdout)["checks"] if check["subject"] == "plugin kernels"]
    assert line["verdict"] == "not checked"
    assert "'triton' 3.7 or later; 3.3.1 is installed" in line["found"] and "pip install 'triton>=3.7'" in line["found"]


def test_a_triton_of_an_unknown_kind_is_a_gap_and_no_crash(tmp_path: Path) -> None:
    environment = too_old_a_triton(tmp_path / "new", "99.0")
    code = "from sfexport.kernels.compile import compile_kernels; compile_kernels('fp16', 32, 87, 85)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "SfexportError: Triton 99.0 cannot compile cross_attention_split for SM 8.7" in done.stderr
