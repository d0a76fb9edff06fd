"""The workflow that runs every week: well formed, and what it calls exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def workflow(request: pytest.FixtureRequest) -> dict:
    return yaml.safe_load(request.param.read_text(encoding="utf-8"))


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_weekly_one_reports_failures() -> None:
    weekly = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text(encoding="utf-8"))
    (schedule,) = weekly[True]["schedule"]  # YAML 1.1 reads the key `on` as true
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    assert weekly["permissions"] == {"contents": "read", "issues": "write"}
    run, report = steps(weekly)[-2:]
    assert "make test-newest" in run["run"] and "pipefail" in run["run"]
    assert report["if"] == "failure()" and "gh issue create" in report["run"]
    assert report["env"]["GH_TOKEN"] == "${{ github.token }}"


def test_steps_are_well_formed(workflow: dict) -> None:
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] <= 60
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_scripts_parse_and_call_targets_that_exist(workflow: dict) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for step in steps(workflow):
        if script := step.get("run"):
            assert not re.search(r"\$\{\{", script), "an expression in a script: pass it as a variable"
            if bash := shutil.which("bash"):
                subprocess.run([bash, "-n"], input=script, text=True, check=True)
            assert set(re.findall(r"make ([a-z-]+)", script)) <= targets
