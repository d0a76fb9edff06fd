"""Run the large hostile campaign: damaged and misleading inputs at every door, and sudden ends while outputs are made.

Each class is a kind of input with what is right for it. A case may be refused in one paragraph, or answered as an
independent reading answers it (PyTorch, transformers, FFmpeg, the undamaged files). Everything else is a finding: an
unexpected error, a hang, a silently wrong answer, half a result after a kill. Findings are printed on stderr as they
come and on stdout at the end, with the name and number of their case: the same seed gives the same case again.
Exits with 1 if there was one. `tests/fuzz/test_campaign.py` is the small form.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.kills import TOO_LATE  # noqa: E402
from fuzz.kinds import Kind  # noqa: E402
from fuzz.registry import KINDS  # noqa: E402
from fuzz.runner import BAD, VERDICTS, Order, Report, Result, run  # noqa: E402


def orders(kinds: list[Kind], cases: int, rng: random.Random) -> list[Order]:
    """Every variant of every kind, and `cases` of each kind that draws its damage, shuffled."""
    found = [Order(kind, number) for kind in kinds for number in range(cases if kind.drawn else kind.cases)]
    rng.shuffle(found)
    return found


def show(report: Report) -> None:
    """Print a line per kind, the sums by group, what went wrong, and the summary."""
    width = max((len(name) for _, name, _ in report.rows()), default=10)
    groups: dict[str, Counter[str]] = {}
    print(f"{'':{width}}  cases  {'  '.join(VERDICTS)}")
    for group, name, counts in sorted(report.rows(), key=lambda row: row[:2]):
        _print_row(name, width, counts)
        groups.setdefault(group, Counter()).update(counts)
        groups[group]["kinds"] += 1
    print()
    for group, counts in groups.items():
        kinds = counts.pop("kinds")
        _print_row(f"{group} ({kinds} kinds)", width, counts)
    _print_row("all", width, sum(groups.values(), Counter()))
    for result in report.bad:
        print(f"\n{result}")
    print(f"\n{summary(report)}")


def summary(report: Report) -> str:
    """Say in two lines how many classes and cases ran and what became of them."""
    counts = Counter(result.verdict for result in report.results)
    classes = {result.order.kind.name for result in report.results}
    sudden = [result for result in report.results if result.order.kind.group == "kills"]
    kills = [r for r in sudden if " ended by " in r.order.kind.name and r.detail != TOO_LATE]
    halves = sum(result.verdict == "wrong" for result in sudden)
    return (
        f"{len(classes)} classes, {len(report.results)} cases: {counts['refused']} refusals, "
        f"{counts['right']} answered, {counts['unexpected']} unexpected errors, {counts['hung']} hangs, "
        f"{counts['wrong']} silently wrong.\n"
        f"{len(kills)} kills: {halves} half results."
    )


def _print_row(name: str, width: int, counts: Counter[str]) -> None:
    cells = "  ".join(f"{counts[verdict]:>{len(verdict)}}" for verdict in VERDICTS)
    print(f"{name:{width}}  {sum(counts[verdict] for verdict in VERDICTS):5}  {cells}")


def _names(wanted: str, kind: Kind, groups: set[str]) -> bool:
    """A group's name stands for the group, any other text for the kinds whose names contain it."""
    return kind.group == wanted if wanted in groups else wanted in kind.name


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the damage that is drawn, and of the order (default: 0)"
    )
    parser.add_argument("--cases", type=int, default=10, help="cases of each kind that draws its damage (default: 10)")
    parser.add_argument("--minutes", type=float, help="begin no case after this time (default: run all)")
    parser.add_argument("--only", action="append", help="a group, or a part of the names of kinds; may be repeated")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the kinds, each after its group, and run nothing")
    options = parser.parse_args()
    groups = {kind.group for kind in KINDS}
    kinds = [kind for kind in KINDS if not options.only or any(_names(o, kind, groups) for o in options.only)]
    if options.list:
        print("\n".join(f"{kind.group:12} {kind.name}" for kind in kinds))
        return 0

    wanted = orders(kinds, options.cases, random.Random(options.seed))
    done = itertools.count(1)

    def on_result(result: Result) -> None:
        if result.verdict in BAD:
            print(result, file=sys.stderr, flush=True)
        if (number := next(done)) % 100 == 0:
            print(f"{number} of {len(wanted)} cases", file=sys.stderr, flush=True)

    seconds = options.minutes and 60 * options.minutes
    report = run(wanted, options.seed, options.workers, seconds, on_result)
    show(report)
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
