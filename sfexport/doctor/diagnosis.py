"""`sfexport doctor`: whether engines can be built and run here, and the command that fixes what is missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sfexport import console
from sfexport.doctor.checks import MISSING, DoctorCheck, checks_for
from sfexport.machines.machine import Machine
from sfexport.machines.targets import Target, match_machine

ONNXRUNTIME_NEEDS = {"Python", "onnxruntime"}


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        target: its name; None: a machine that the table of targets does not have.
        asked: engines for that target are wanted, not just what this machine can do.
        nvidia: there is NVIDIA hardware here, whether it works or not.
    """

    target: str | None
    nvidia: bool
    asked: bool
    checks: tuple[DoctorCheck, ...]

    @property
    def missing(self) -> list[str]:
        return [check.name for check in self.checks if check.verdict == MISSING]

    @property
    def can_build(self) -> bool:
        """TensorRT engines can be built and run here."""
        return set(self.missing) <= {"onnxruntime"}

    @property
    def can_run_onnxruntime(self) -> bool:
        """ONNX Runtime engines can be built and run here."""
        return not ONNXRUNTIME_NEEDS & set(self.missing)

    @property
    def exit_code(self) -> int:
        """0 if TensorRT engines can be built here, else 1.

        Without NVIDIA hardware and without a target that was asked for, ONNX Runtime is enough.
        """
        enough_here = not self.nvidia and not self.asked and self.can_run_onnxruntime
        return 0 if self.can_build or enough_here else 1

    def summary(self) -> list[str]:
        """One sentence on TensorRT, one on ONNX Runtime."""
        works = "can" if self.can_run_onnxruntime else "cannot"
        second = f"ONNX Runtime engines {works} be built and run here."
        engines = f"TensorRT engines for {self.target}" if self.asked else "TensorRT engines"
        if self.can_build:
            return [f"{engines} can be built and run here.", second]
        reason = f"missing: {', '.join(self.missing)}" if self.nvidia else "there is no NVIDIA GPU"
        return [f"{engines} cannot be built here; {reason}.", second]

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "can_build": self.can_build,
            "can_run_onnxruntime": self.can_run_onnxruntime,
            "lines": [asdict(check) for check in self.checks],
        }


def examine(machine: Machine, target: Target | None = None) -> Diagnosis:
    """Judge a machine.

    Args:
        target: what engines are wanted for; None: the machine itself. If it is the machine itself, its own
            JetPack counts, not the target's.
    """
    here = match_machine(machine)
    asked = target is not None
    if target is None or (here and here.name == target.name):
        target = here
    checks = (check(machine, target) for check in checks_for(machine))
    name = target.name if target else None
    return Diagnosis(name, machine.cuda.device, asked, tuple(found for found in checks if found is not None))


def show(diagnosis: Diagnosis) -> None:
    """Print the table of checks, the fixes and the verdict on stdout."""
    title = f"this machine, for {diagnosis.target}" if diagnosis.target else "this machine"
    rows = [(check.verdict, check.name, check.seen, check.expected) for check in diagnosis.checks]
    console.table(title, ("", "", "seen", "expected"), rows)
    if fixes := [(check.name, check.fix) for check in diagnosis.checks if check.fix]:
        console.table("what to do", ("", ""), fixes)
    for sentence in diagnosis.summary():
        console.result(sentence)
