"""SReLU against ReLU, leaky ReLU and PReLU on scikit-learn's digits: Jin et al.'s (AAAI 2016) comparison, very small.

    python examples/srelu_digits/reproduce.py            a Markdown table of test errors
    python examples/srelu_digits/reproduce.py --json     settings, and the error of every seed

Needs `pip install 'sfexport[torch,examples]'`, no network, one core and a few minutes. Per seed, all activations get
the same split, initial weights and batches. Nothing is tuned, neither here per activation nor on the test images.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import sklearn
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from sfexport.model.srelu import SReLU, parameter_groups, srelu_modules

WIDTH, CLASSES, BATCH = 64, 10, 64
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
FROZEN_SHARE = 1 / 6  # of the epochs; the paper says "several" and no number
SLOPE = 0.2  # the paper's a_left

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "leaky ReLU": lambda: nn.LeakyReLU(SLOPE),
    "PReLU": lambda: nn.PReLU(WIDTH),
    "SReLU, never frozen": lambda: SReLU(WIDTH, a_left=SLOPE),
    "SReLU, frozen at first": lambda: SReLU(WIDTH, a_left=SLOPE),
}


class Digits(NamedTuple):
    """Pixels float32 [N, 64] in 0..1 and labels int64 [N], half of the 1,797 images to each side."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def split(seed: int) -> Digits:
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x / 16, y, test_size=0.5, random_state=seed, stratify=y)
    return Digits(
        torch.tensor(train_x, dtype=torch.float32),
        torch.tensor(train_y),
        torch.tensor(test_x, dtype=torch.float32),
        torch.tensor(test_y),
    )


def network(activation: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """64-64-64-10. No activation draws random numbers, so the linear layers depend on the seed alone."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), activation(), nn.Linear(WIDTH, WIDTH), activation(), nn.Linear(WIDTH, CLASSES)
    )


def train(model: nn.Module, digits: Digits, seed: int, epochs: int, frozen_epochs: int) -> None:
    """SGD with momentum, learning rate falling to 0 along a cosine; no decay on SReLU, PReLU and biases."""
    batches = torch.Generator().manual_seed(seed)
    for module in srelu_modules(model) if frozen_epochs else []:
        module.freeze()
    optimizer = torch.optim.SGD(parameter_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        if frozen_epochs and epoch == frozen_epochs:
            for module in srelu_modules(model):
                module.release()
        for rows in torch.randperm(len(digits.train_x), generator=batches).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits.train_x[rows]), digits.train_y[rows]).backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def error_percent(model: nn.Module, digits: Digits) -> float:
    wrong = model.eval()(digits.test_x).argmax(-1) != digits.test_y
    return 100 * wrong.float().mean().item()


def run(seeds: int, epochs: int) -> dict[str, Any]:
    """The test error in % of every activation and seed."""
    frozen_epochs = max(1, round(FROZEN_SHARE * epochs))
    errors: dict[str, list[float]] = {name: [] for name in ACTIVATIONS}
    for seed in range(seeds):
        digits = split(seed)
        for name, activation in ACTIVATIONS.items():
            model = network(activation, seed)
            train(model, digits, seed, epochs, frozen_epochs if name.endswith("frozen at first") else 0)
            errors[name].append(error_percent(model, digits))
        print(f"seed {seed + 1} of {seeds}", file=sys.stderr)
    return {
        "settings": {"seeds": seeds, "epochs": epochs, "frozen_epochs": frozen_epochs, "batch": BATCH}
        | {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "width": WIDTH},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "sklearn": sklearn.__version__},
        "test_error_percent": errors,
    }


def table(errors: dict[str, list[float]]) -> str:
    """Mean and standard deviation over the seeds, and the mean difference to ReLU with its standard error."""
    lines = [
        "| activation | test error %, mean | standard deviation | less ReLU's of the same seed, ± standard error |",
        "|---|---|---|---|",
    ]
    for name, values in errors.items():
        gaps = [value - other for value, other in zip(values, errors["ReLU"], strict=True)]
        gap = f"{statistics.mean(gaps):+.2f} ± {deviation(gaps) / math.sqrt(len(gaps)):.2f}" if any(gaps) else "0"
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {deviation(values):.2f} | {gap} |")
    return "\n".join(lines)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON document and no table")
    arguments = parser.parse_args()
    if min(arguments.seeds, arguments.epochs) < 1:
        parser.error("--seeds and --epochs must be at least 1")
    torch.set_num_threads(1)
    start = time.perf_counter()
    results = run(arguments.seeds, arguments.epochs) | {"seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(results, indent=2) if arguments.json else table(results["test_error_percent"]))


if __name__ == "__main__":
    main()
