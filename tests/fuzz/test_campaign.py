"""The hostile campaign in small: a few kinds of every group, the same ones each time, two processes at a time.

`make fuzz` runs all of it.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fuzz.kinds import Kind
from fuzz.registry import KINDS
from fuzz.runner import Order, run

SEED = 22
SECONDS = 40.0  # no case begins later, on however slow a machine
# Kinds of each group that take part.
SHARE = {
    "config": 12,
    "pictures": 3,
    "weights": 8,
    "files": 5,
    "texts": 10,
    "manifests": 8,
    "media": 14,
    "memory": 5,
    "options": 9,
    "outputs": 4,
    "kills": 4,
}


def chosen() -> list[Order]:
    """By seed, of the kinds that need no PyTorch and happen at the same moment every time."""
    rng = random.Random(SEED)
    orders = []
    for group, share in SHARE.items():
        kinds = [kind for kind in KINDS if kind.group == group and not kind.needs_torch and not kind.slow]
        for kind in rng.sample(kinds, share):
            orders.append(Order(kind, rng.randrange(1000 if kind.drawn else kind.cases)))
    rng.shuffle(orders)
    return sorted(orders, key=lambda order: order.kind.group != "kills")  # the longest first


def test_campaign_has_no_unexpected_error_no_hang_and_no_wrong_answer() -> None:
    report = run(chosen(), SEED, workers=2, seconds=SECONDS)
    assert report.results
    problems = list(map(str, report.bad))
    assert not problems, "\n".join(problems)


def test_tables_name_at_least_200_kinds_of_every_sort() -> None:
    groups = Counter(kind.group for kind in KINDS)
    assert groups.keys() == SHARE.keys()
    assert sum(groups.values()) >= 200


@pytest.mark.parametrize("share", [SHARE])
def test_choice_is_the_same_every_time(share: dict[str, int]) -> None:
    first, second = chosen(), chosen()
    assert [(o.kind.name, o.number) for o in first] == [(o.kind.name, o.number) for o in second]
    assert Counter(o.kind.group for o in first) == Counter(share)
    assert all(isinstance(order.kind, Kind) for order in first)
