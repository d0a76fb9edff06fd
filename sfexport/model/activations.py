"""SReLU for transformers: the name 'srelu' in ACT2FN, and the callback that ends its freezing during training.

Importing this module registers the name; `import sfexport.model` does so.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.activations import ACT2FN

from sfexport.model.srelu import SReLU, srelu_modules

# ACT2FN makes modules without arguments: this one is shared by all channels.
ACT2FN["srelu"] = SReLU


class ReleaseSReLU(TrainerCallback):
    """Freezes a model's SReLUs when training begins and releases them after optimizer step `step`.

    A training resumed at or after that step does not freeze again. The paper says "the initial several training
    epochs" and no number. Give the Trainer an optimizer made with `sfexport.model.srelu.parameter_groups`: its
    own would apply weight decay to SReLU.

    Args:
        step: number of the last optimizer step with frozen parameters; 0: never frozen.
        quantile: see `SReLU.release`.
    """

    def __init__(self, step: int, quantile: float = 0.9) -> None:
        self.step, self.quantile = step, quantile

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.step:
            for module in srelu_modules(kwargs["model"]):
                module.freeze()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            for module in srelu_modules(kwargs["model"]):
                if module.frozen:
                    module.release(self.quantile)
