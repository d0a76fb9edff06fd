"""Train the demo model: `python examples/shapes/train.py -o runs/shapes`. An hour and a half on one CPU core.

Stages, each resumed or skipped if the run is repeated:

    tower     the vision tower alone, on single frames (which flash, digit, corner; which shape where)
    base      the decoder without slow branch, on overview questions
    motion    the same again with a fresh learning rate: directions and binding come late
    slow      the hybrid layers are added; overview and detail questions
    polish    the same with more questions about shapes and directions
    balance   and with more about counts, at a lower rate

With --plain the last three stages run without slow branch, for comparison: the same data and steps.

The result is OUTPUT/checkpoint, in the released layout.

As in the paper, the slow branch is added to a model that already works: with it from the start, motion is neglected.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that wait actively slow a shared machine's training down tenfold; must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from evaluation import measure
from packing import Clips
from ship import write_checkpoint
from torch import nn
from torch.utils.data import SequentialSampler
from trainee import TowerTrainee, Trainee, initialise, make_collator, make_config, make_tokenizer, open_gates
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from sfexport.demo.scenes import TRAINING_SEEDS
from sfexport.model import LlavaQwenSlowFastForCausalLM
from sfexport.model.activations import ReleaseSReLU
from sfexport.model.srelu import parameter_groups, srelu_modules
from sfexport.qa.prompt import ChatTokenizer


@dataclass(frozen=True)
class Stage:
    """One stage's settings; `seed` is an offset into TRAINING_SEEDS.

    Attributes:
        detail: share of questions about one-frame details. directions, counts, shapes: see Clips.
        slow_dropout: share of steps without slow branch.
        auxiliary: weight of the heads on slow tokens. cells: heads for shape and colour per cell among them.
    """

    name: str
    seed: int
    steps: int
    rate: float
    detail: float = 0.0
    directions: int = 2
    counts: int = 1
    shapes: int = 1
    slow_dropout: float = 0.0
    auxiliary: float = 0.5
    cells: bool = True
    batch: int = 16
    tower_factor: float = 0.5


STAGES = {
    "tower": Stage("tower", 0, 800, 2e-3, tower_factor=1.0),
    "base": Stage("base", 1, 1400, 1.5e-3, cells=False),
    "motion": Stage("motion", 3, 1200, 1.5e-3, auxiliary=0.3),
    "slow": Stage("slow", 2, 1200, 1.2e-3, detail=0.65, slow_dropout=0.2, auxiliary=0.25),
    "polish": Stage("polish", 4, 1000, 1.2e-3, detail=0.45, slow_dropout=0.2, auxiliary=0.15, directions=4, shapes=6),
    "balance": Stage(
        "balance", 5, 500, 6e-4, detail=0.35, slow_dropout=0.2, auxiliary=0.1, directions=4, counts=3, shapes=4
    ),
}


class InOrder(Trainer):
    """Every index is a fresh clip, so that nothing is to be shuffled."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class LogLines(TrainerCallback):
    """Loss and speed as JSON lines."""

    def __init__(self, file: Path) -> None:
        self.file, self.start = file, time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        line = {"step": state.global_step, "seconds": round(time.time() - self.start, 1), **(logs or {})}
        print(json.dumps(line), flush=True)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def optimiser(trainee: nn.Module, stage: Stage) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW; no decay on one-dimensional parameters (SReLU's among them); the tower learns more slowly."""
    in_tower = {id(p) for p in trainee.lm.model.vision_tower.parameters()}
    groups = []
    for group in parameter_groups(trainee, weight_decay=0.05):
        for is_tower in (False, True):
            parameters = [p for p in group["params"] if (id(p) in in_tower) == is_tower]
            rate = stage.rate * (stage.tower_factor if is_tower else 1)
            groups.append(group | {"params": parameters, "lr": rate})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    warm_up = 100

    def factor(step: int) -> float:
        done = max(0, step - warm_up) / max(1, stage.steps - warm_up)
        return min(1, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, done))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def run_stage(stage: Stage, lm: LlavaQwenSlowFastForCausalLM, out: Path, tokenizer: ChatTokenizer) -> None:
    """Train `lm` in place, or load what an earlier run of this stage left. Afterwards it is on the CPU."""
    done = out / stage.name / "final.pt"
    if done.is_file():
        lm.load_state_dict(torch.load(done, map_location="cpu", weights_only=True))
        return
    set_seed(stage.seed)
    is_tower = stage.name == "tower"
    trainee = TowerTrainee(lm) if is_tower else Trainee(lm, stage.auxiliary, stage.cells)
    clips = Clips(
        TRAINING_SEEDS[stage.seed],
        stage.steps * stage.batch,
        None if is_tower else tokenizer,
        stage.detail,
        stage.directions,
        stage.counts,
        stage.shapes,
    )
    arguments = TrainingArguments(
        output_dir=str(out / stage.name),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch,
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=stage.seed,
    )
    callbacks: list[TrainerCallback] = [LogLines(out / f"{stage.name}.jsonl")]
    if stage.name == "base" and srelu_modules(lm):
        callbacks.append(ReleaseSReLU(stage.steps // 5))
    trainer = InOrder(
        model=trainee,
        args=arguments,
        train_dataset=clips,
        data_collator=make_collator(lm, tokenizer, stage.slow_dropout),
        optimizers=optimiser(trainee, stage),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=any((out / stage.name).glob("checkpoint-*")))
    torch.save(lm.cpu().state_dict(), done)


def add_slow_branch(base: LlavaQwenSlowFastForCausalLM, projector: str) -> LlavaQwenSlowFastForCausalLM:
    """The base model with fresh hybrid layers, gates open."""
    lm = LlavaQwenSlowFastForCausalLM(make_config(projector, hybrid=True))
    initialise(lm)
    missing, unexpected = lm.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    assert all("cross_attn" in name for name in missing)
    open_gates(lm)
    return lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of this run; resumed if it exists")
    parser.add_argument("--projector", default="mlp2x_srelu", choices=["mlp2x_srelu", "mlp2x_gelu"])
    parser.add_argument("--plain", action="store_true", help="the comparison without slow branch")
    parser.add_argument("--clips", type=int, default=300, help="held-out clips measured at the end of a stage")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = ChatTokenizer(make_tokenizer())
    lm = LlavaQwenSlowFastForCausalLM(make_config(options.projector, hybrid=False))
    set_seed(0)
    initialise(lm)
    for name in STAGES:
        if name == "slow" and not options.plain:
            lm = add_slow_branch(lm, options.projector)
        run_stage(STAGES[name], lm, options.output, tokenizer)
        if name in ("motion", "slow", "polish", "balance"):
            print(json.dumps({name: measure(lm, tokenizer, options.clips)}), flush=True)
    write_checkpoint(lm, options.projector, options.output / "checkpoint")


if __name__ == "__main__":
    main()
