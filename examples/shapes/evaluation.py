"""Quick accuracy on held-out rendered clips while training: every question of a clip at once, teacher-forced.

All answer tokens right under teacher forcing is the same as a right greedy answer. The accuracy that counts is
measured on real video files through exported engines: benchmarks/demo_accuracy.py.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from packing import IGNORED, Clips, Example
from trainee import Trainee, make_collator

from sfexport.demo.scenes import is_sampled, make_scene
from sfexport.model import LlavaQwenSlowFastForCausalLM
from sfexport.qa.prompt import ChatTokenizer

HELD_OUT_SEED = 11


def measure(lm: LlavaQwenSlowFastForCausalLM, tokenizer: ChatTokenizer, clips: int) -> dict[str, dict[str, float]]:
    """Accuracy by kind, with the slow branch and without; details also apart for frames the fast path never sees."""
    data = Clips(HELD_OUT_SEED, clips, tokenizer)
    collator = make_collator(lm, tokenizer)
    modes = ("trained", "slow_off") if lm.config.model_config.slow_fast.hybrid_layers else ("plain",)
    right: dict[str, dict[str, list[bool]]] = {mode: defaultdict(list) for mode in modes}
    lm.eval()
    trainee = Trainee(lm, 0.0)
    for i in range(clips):
        example = data[i]
        segments = [data.segment(q) for q in make_scene(HELD_OUT_SEED, i).questions()]
        example = Example(example.pixels, example.labels, segments)
        batch = collator([example])
        for mode in modes:
            batch["slow_off"] = torch.tensor(mode == "slow_off")
            _score(trainee, batch, example, right[mode])
    lm.train()
    return {mode: {kind: round(sum(v) / len(v), 4) for kind, v in sorted(r.items())} for mode, r in right.items()}


@torch.no_grad()
def _score(trainee: Trainee, batch: dict, example: Example, right: dict[str, list[bool]]) -> None:
    wrong = trainee.predictions(batch)[:, :-1] != batch["labels"][:, 1:]
    wrong &= batch["labels"][:, 1:] != IGNORED
    for number, segment in enumerate(example.segments, start=1):
        is_right = not bool((wrong & (batch["segments"][:, 1:] == number)).any())
        right[segment.kind].append(is_right)
        if segment.frame is not None and not is_sampled(segment.frame):
            right[f"{segment.kind}_unsampled"].append(is_right)
