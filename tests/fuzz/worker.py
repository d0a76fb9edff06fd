"""One process that runs cases, one line of JSON in and out for each. Its memory and file sizes are limited.

A case that hangs, aborts or fills the memory takes this process with it; the runner then starts another.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fuzz.base import check_left_over
from fuzz.kinds import Case, Expect, Kind, Refused, Unexpected, Wrong

MEMORY = 8 << 30  # bytes of address space; PyTorch's libraries alone take 2 GB of it
LARGEST_FILE = 1 << 30
CPU_SECONDS = 20.0  # more for one case counts as hanging


def judge(kind: Kind, case: Case) -> tuple[str, str]:
    """(verdict, detail); verdicts: refused, right, unexpected, wrong."""
    try:
        remark = kind.act(case)
    except Refused as refusal:
        if kind.expect is Expect.ANSWERED:
            return "unexpected", f"refused what is right: {refusal}"
        return "refused", str(refusal)
    except Wrong as problem:
        return "wrong", str(problem)
    except Unexpected as problem:
        return "unexpected", str(problem)
    except BaseException:
        return "unexpected", "in the campaign itself: " + traceback.format_exc(limit=-4)
    if kind.expect is Expect.REFUSED:
        return "wrong", "accepted"
    return "right", remark or ""


def run(kind: Kind, number: int, seed: int, base: Path) -> dict[str, str]:
    """One case in a room of its own."""
    room = Path(tempfile.mkdtemp(prefix="sfexport-fuzz-"))
    home, started = Path.cwd(), time.process_time()
    try:
        case = Case(number, random.Random(f"{seed} {kind.name} {number}"), room, base)
        verdict, detail = judge(kind, case)
        if time.process_time() - started > CPU_SECONDS:
            verdict, detail = "hung", f"{time.process_time() - started:.0f} s of CPU time; {detail}"
        elif verdict in ("refused", "right"):
            try:
                check_left_over(room)
            except Unexpected as problem:
                verdict, detail = "unexpected", str(problem)
    finally:
        os.chdir(home)
        shutil.rmtree(room, ignore_errors=True)
    return {"verdict": verdict, "detail": detail}


def main() -> None:
    from fuzz.registry import KINDS

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    base = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    orders = os.fdopen(os.dup(0))
    # What a library prints must not be taken for a verdict, and no case may read the orders.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    kinds = {kind.name: kind for kind in KINDS}
    for line in orders:
        order = json.loads(line)
        answers.write(json.dumps(run(kinds[order["kind"]], order["number"], order["seed"], base)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
