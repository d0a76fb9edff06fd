"""What most tests need, made once: a random checkpoint, a clip, a bundle with its weights, and engines.

Nobody may change these: `tree_copy` gives a test its own.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest
from drawn_clip import write_clip
from hypothesis import HealthCheck, settings

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths
from sfexport.engines.build import build
from sfexport.exporting.export import ExportOptions, export
from sfexport.testing.random_checkpoint import write_random_checkpoint

# Examples take longer on a busy machine, which is no fault of what is tested.
settings.register_profile("sfexport", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sfexport")

Tree = DemoPaths
SHOWN = ("numpy", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "tokenizers", "av", "pillow", "msgspec", "click")
SHOWN += ("rich", "torch", "transformers", "optimum", "safetensors", "triton")


def pytest_report_header() -> list[str]:
    """The versions that are tested, and what is left out without PyTorch."""
    versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    found = {name: versions.get(name, versions.get(name.replace("-", "_"))) for name in SHOWN}
    lines = ["versions: " + ", ".join(f"{name} {version}" for name, version in found.items() if version)]
    if found["torch"] is None:
        lines.append("PyTorch is not installed: tests that compare with it or with transformers are skipped")
    return lines


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Read only. The bundle has its weights, so that it stands alone."""
    made = Tree(tmp_path_factory.mktemp("tree"))
    write_random_checkpoint(made.checkpoint)
    write_clip(made.clip, seconds=2, fps=10, size=(96, 64))
    bundle = export(Checkpoint.open(made.checkpoint), made.bundle, ExportOptions(weights="copy"))
    build(bundle, made.engines, "onnxruntime")
    return made


@pytest.fixture
def tree_copy(tree: Tree, tmp_path: Path) -> Tree:
    """A copy to change. Its engines find its own bundle, which lies beside them."""
    return Tree(Path(shutil.copytree(tree.root, tmp_path / "tree")))
