"""Runs cases in worker processes, a few at a time, and counts what became of them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

from fuzz import base
from fuzz.kinds import Kind

VERDICTS = ("refused", "right", "unexpected", "hung", "wrong")
BAD = ("unexpected", "hung", "wrong")
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Order:
    kind: Kind
    number: int


@dataclass(frozen=True)
class Result:
    order: Order
    verdict: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.order.kind.name} #{self.order.number}: {self.detail}"


@dataclass
class Report:
    """Results by kind."""

    results: list[Result] = field(default_factory=list)

    @property
    def bad(self) -> list[Result]:
        return [result for result in self.results if result.verdict in BAD]

    def rows(self) -> Iterator[tuple[str, str, Counter[str]]]:
        """(group, kind, count of each verdict), in the order of the tables."""
        counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for result in self.results:
            counts[result.order.kind.group, result.order.kind.name][result.verdict] += 1
        for (group, name), count in counts.items():
            yield group, name, count


class _Worker:
    """A worker process, started again after it died."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._seed = root, seed
        self._process: subprocess.Popen[str] | None = None

    def run(self, order: Order) -> Result:
        process = self._process or self._start()
        process.stdin.write(json.dumps({"kind": order.kind.name, "number": order.number, "seed": self._seed}) + "\n")
        process.stdin.flush()
        # On a machine with other work to do, everything takes as much longer as there are waiting processes.
        timeout = order.kind.timeout * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        line = process.stdout.readline() if ready else ""
        if line:
            return Result(order, **json.loads(line))
        if not ready:
            self.stop()
            return Result(order, "hung", f"no end within {timeout:.0f} s")
        code = process.wait()
        self._process = None
        reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Result(order, "unexpected", f"the process died: {reason}")

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(REPOSITORY / "tests"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker", str(self._root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,  # a kill takes its children along
        )
        return self._process


def run(
    orders: Iterable[Order],
    seed: int,
    workers: int = 2,
    seconds: float | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Run all orders, or those that can be begun within `seconds`."""
    queue: Queue[Order] = Queue()
    for order in orders:
        queue.put(order)
    report, lock, end = Report(), threading.Lock(), time.monotonic() + (seconds or float("inf"))
    with tempfile.TemporaryDirectory(prefix="sfexport-fuzz-base-") as folder:
        root = Path(folder)
        base.make(root)

        def work() -> None:
            worker = _Worker(root, seed)
            try:
                while time.monotonic() < end:
                    result = worker.run(queue.get_nowait())
                    with lock:
                        report.results.append(result)
                        on_result(result)
            except Empty:
                return
            finally:
                worker.stop()

        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return report
