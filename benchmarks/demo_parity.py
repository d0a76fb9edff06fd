"""The shipped demo model on held-out questions: do ONNX Runtime and PyTorch give the same answer tokens?

    python benchmarks/demo_parity.py --seed 8 --questions 200

Exits with 1 if any answer differs. Both decode modes; every question counts once per mode.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from shapes_accuracy import check_seed, clips, load

from sfexport.checkpoint.config import DecodeMode
from sfexport.demo.shipped import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    check_seed(options.seed)
    asked, different = 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipelines = [load(SHIPPED, folder / backend, backend) for backend in ("onnxruntime", "torch")]
        greedy = pipelines[0].generation_options().greedy()
        for path, questions in clips(folder, options.seed, options.questions):
            sessions = [pipeline.encode(path) for pipeline in pipelines]
            for question in questions[: options.questions - asked]:
                asked += 1
                for mode in DecodeMode:
                    ours, theirs = (session.ask(question.text, greedy, mode) for session in sessions)
                    if ours.ids != theirs.ids:
                        different.append((question.text, mode, ours.answer, theirs.answer))
            if asked == options.questions:
                break
    print(f"{asked} questions, {len(DecodeMode)} modes: {len(different)} answers differ")
    for line in different:
        print(line)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
