"""Judge whether a machine can build and run engines, and print the commands that fix what is missing."""

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
    """The result of `sfexport doctor`: every check of a machine, and which engines it can build and run.

    Attributes:
        target: name of the target judged for; None: the table of targets does not have this machine.
        nvidia: NVIDIA hardware is present, whether it works or not.
        asked: the caller named the target; False: it is this machine's own, if the table has it.
        checks: one DoctorCheck per item, in the order to fix things in.
    """

    target: str | None
    nvidia: bool
    asked: bool
    checks: tuple[DoctorCheck, ...]

    @property
    def missing(self) -> list[str]:
        """Names of the checks whose verdict is 'missing'."""
        return [check.name for check in self.checks if check.verdict == MISSING]

    @property
    def can_build(self) -> bool:
        """True if TensorRT engines can be built and run on this machine."""
        return set(self.missing) <= {"onnxruntime"}

    @property
    def can_run_onnxruntime(self) -> bool:
        """True if ONNX Runtime engines can be built and run on this machine."""
        return not ONNXRUNTIME_NEEDS & set(self.missing)

    @property
    def exit_code(self) -> int:
        """Exit code of `sfexport doctor`: 0 if TensorRT engines can be built on this machine, else 1.

        Without NVIDIA hardware and without a target that was asked for, it is 0 if ONNX Runtime engines can be built.
        """
        enough_here = not self.nvidia and not self.asked and self.can_run_onnxruntime
        return 0 if self.can_build or enough_here else 1

    def summary(self) -> list[str]:
        """Write one sentence about TensorRT engines and one about ONNX Runtime engines."""
        works = "can" if self.can_run_onnxruntime else "cannot"
        second = f"ONNX Runtime engines {works} be built and run here."
        engines = f"TensorRT engines for {self.target}" if self.asked else "TensorRT engines"
        if self.can_build:
            return [f"{engines} can be built and run here.", second]
        reason = f"missing: {', '.join(self.missing)}" if self.nvidia else "there is no NVIDIA GPU"
        return [f"{engines} cannot be built here; {reason}.", second]

    def to_json(self) -> dict[str, Any]:
        """Return a document of plain values; `lines` has the checks."""
        return {
            "target": self.target,
            "can_build": self.can_build,
            "can_run_onnxruntime": self.can_run_onnxruntime,
            "lines": [asdict(check) for check in self.checks],
        }


def examine(machine: Machine, target: Target | None = None) -> Diagnosis:
    """Run every check on a machine, for the target that engines are wanted for.

    Args:
        machine: the machine to judge.
        target: the target; None: the machine itself. If it names the machine itself, the machine's own JetPack
            counts, not the target's.
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
