"""`python -m tests.fuzz`: the large campaign. Exits with 1 for an unexpected error, a hang or a wrong answer."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.kinds import Kind  # noqa: E402
from fuzz.registry import KINDS  # noqa: E402
from fuzz.runner import BAD, VERDICTS, Order, Report, Result, run  # noqa: E402


def orders(kinds: list[Kind], cases: int, rng: random.Random) -> list[Order]:
    """Every variant of every kind, and `cases` of each kind that draws its damage, shuffled."""
    found = [Order(kind, number) for kind in kinds for number in range(cases if kind.drawn else kind.cases)]
    rng.shuffle(found)
    return found


def show(report: Report) -> None:
    """A table on stdout: a line per kind, then the sums by group, then what went wrong."""
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


def _print_row(name: str, width: int, counts: Counter[str]) -> None:
    cells = "  ".join(f"{counts[verdict]:>{len(verdict)}}" for verdict in VERDICTS)
    print(f"{name:{width}}  {sum(counts[verdict] for verdict in VERDICTS):5}  {cells}")


def _names(wanted: str, kind: Kind, groups: set[str]) -> bool:
    """A group's name stands for the group, any other text for the kinds whose names contain it."""
    return kind.group == wanted if wanted in groups else wanted in kind.name


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10, help="cases of each kind that draws its damage")
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument("--only", action="append", help="a group, or a part of the names of kinds; may be repeated")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the kinds and run nothing")
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
