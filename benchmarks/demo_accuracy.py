"""Accuracy of the shipped demo model: exported engines, ONNX Runtime, real video files, clips of any seed.

    python benchmarks/demo_accuracy.py --seed 7 --clips 1000
    python benchmarks/demo_accuracy.py --seed 7 --clips 1000 --json     {mode: {kind: accuracy}}

Modes: `trained` and `released` (see the README), `slow_off` (without the slow branch). Kinds of detail questions
appear three times: all, and apart for event frames that the fast path sees (`_sampled`) and never sees
(`_unsampled`). An answer counts if it is the whole right answer. Seeds of the training clips are refused.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from shapes_accuracy import MODES, check_seed, evaluate, load

from sfexport.demo.shipped import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="another checkpoint trained on such clips")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    check_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = load(options.checkpoint, Path(folder))
        accuracies = evaluate(pipeline, Path(folder), options.seed, options.clips).accuracies()
    if options.json:
        print(json.dumps(accuracies))
        return
    modes = [mode for mode in (*MODES, "plain") if mode in accuracies]
    print(f"{options.clips} clips of seed {options.seed}\n{'':28}" + "".join(f"{mode:>12}" for mode in modes))
    for kind in accuracies[modes[0]]:
        print(f"{kind:28}" + "".join(f"{accuracies[mode][kind]:12.3f}" for mode in modes))


if __name__ == "__main__":
    main()
