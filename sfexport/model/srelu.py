"""SReLU, the S-shaped rectified linear unit of Jin et al. (AAAI 2016, arXiv 1512.07030), and how it is trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SAMPLE_ROWS = 4096  # observed rows that a frozen SReLU keeps
ROWS_PER_STEP = 512  # of one forward pass, so that the sample covers at least 8 of them


class _SReLUFunction(torch.autograd.Function):
    """The paper's gradients by hand: faster than autograd's, and they keep x alone in memory.

    The CPU's torch.where takes ten times as long as arithmetic, so both passes do without where they can.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        t_right, a_right, t_left, a_left = parameters
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (t_left > t_right).any():
            middle, above, below = x.clamp(t_left, t_right), (x - t_right).clamp_(min=0), (x - t_left).clamp_(max=0)
            return middle + above.mul_(a_right) + below.mul_(a_left)  # of the last two, at least one is 0
        right, left = t_right + a_right * (x - t_right), t_left + a_left * (x - t_left)
        return torch.where(x >= t_right, right, torch.where(x <= t_left, left, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t_right, a_right, t_left, a_left = ctx.saved_tensors
        in_right = x >= t_right
        right, left = grad * in_right, grad * (~in_right & (x <= t_left))
        own: list[Tensor | None] = [None] * 4
        if any(ctx.needs_input_grad[1:]):
            own[0] = (1 - a_right) * right.sum_to_size(t_right.shape)
            own[1] = (x - t_right).mul_(right).sum_to_size(a_right.shape)
            own[2] = (1 - a_left) * left.sum_to_size(t_left.shape)
            own[3] = (x - t_left).mul_(left).sum_to_size(a_left.shape)
        middle = (grad - right).sub_(left)
        return (middle.add_(right.mul_(a_right)).add_(left.mul_(a_left)), *own)


class SReLU(nn.Module):
    """Three pieces per channel, the outer two with a learned threshold and slope (the paper's equation 7).

        x >= t_right:  t_right + a_right * (x - t_right)
        x <= t_left:   t_left + a_left * (x - t_left)
        otherwise:     x

    The thresholds belong to the outer pieces, also in the gradients (equations 9 and 10). Training may move
    t_left above t_right; where both outer pieces hold, the right one wins. Nothing is clamped: the paper's
    learned slopes go negative. NaN stays NaN.

    The parameters t_right, a_right, t_left, a_left have the shape [channels] ([1] when shared) and start as
    t_right, 1, 0, a_left: a leaky ReLU.

    Args:
        channels: size of the input's last axis; None: all channels share one set of parameters.
        t_right, a_left: initial values; the paper takes any positive t_right, and 0.2 for a_left.
    """

    def __init__(self, channels: int | None = None, t_right: float = 1.0, a_left: float = 0.2) -> None:
        super().__init__()
        self.channels, self.initial = channels, (t_right, 1.0, 0.0, a_left)
        size = channels or 1
        self.t_right, self.a_right = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.t_left, self.a_left = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.frozen = False
        # Not registered: neither saved nor cast with the module.
        self._sample: Tensor | None = None
        self._seen = 0
        self.reset_parameters()

    def own_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return t_right, a_right, t_left, a_left."""
        return self.t_right, self.a_right, self.t_left, self.a_left

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values."""
        for parameter, value in zip(self.own_parameters(), self.initial, strict=True):
            nn.init.constant_(parameter, value)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to [..., channels]; the result has the wider of the input's and the parameters' types."""
        if self.frozen and self.training:
            self._observe(x.detach())
        return _SReLUFunction.apply(x, *self.own_parameters())

    def freeze(self) -> None:
        """Keep the four parameters as they are, and observe the inputs of training passes until `release`.

        An optimizer made while they are frozen must be given them all the same: `parameter_groups` does so.
        """
        self._set_frozen(True)

    def release(self, quantile: float = 0.9) -> None:
        """End the freezing: t_right becomes that quantile of each channel's observed inputs; all four train.

        The paper sets t_right to "the k-th largest value" of a channel's inputs with k = ceil(0.9 n). Read
        literally that is about the 10th percentile; its learned thresholds (up to 72) and its positive t_right
        speak for the k-th value in ascending order, the 90th percentile, which is the default here
        (`quantile=0.1` is the other reading). The inputs are a sample: the last 4096 rows of those observed,
        of which each forward pass gives at most 512, chosen at random.

        A channel whose quantile is not a finite value above t_left keeps its t_right; so do all channels if
        nothing was observed.

        Raises:
            ValueError: the quantile is not above 0 and at most 1.
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"A quantile lies above 0 and is at most 1; {quantile!r} does not.")
        if self._sample is not None:
            self._set_threshold(self._sample[: self._seen], quantile)
        self._set_frozen(False)

    def extra_repr(self) -> str:
        return "shared" if self.channels is None else str(self.channels)

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen, self._sample, self._seen = frozen, None, 0
        for parameter in self.own_parameters():
            parameter.requires_grad_(not frozen)

    @torch.no_grad()
    def _set_threshold(self, sample: Tensor, quantile: float) -> None:
        k = math.ceil(quantile * len(sample))  # torch.quantile refuses more than 2^24 values
        value = sample.kthvalue(k, dim=0).values.to(self.t_right)
        self.t_right.copy_(torch.where(value.isfinite() & (value > self.t_left), value, self.t_right))

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Put rows of x over the oldest ones of the sample, float32 [SAMPLE_ROWS, channels]."""
        rows = x.reshape(-1, len(self.t_right))
        if len(rows) > ROWS_PER_STEP:
            # A generator of its own: observing must not change the random numbers of the rest of the training.
            generator = torch.Generator().manual_seed(self._seen)
            rows = rows[torch.randint(len(rows), (ROWS_PER_STEP,), generator=generator).to(x.device)]
        if self._sample is None:
            self._sample = torch.empty(SAMPLE_ROWS, rows.shape[1], dtype=torch.float32, device=x.device)
        slots = torch.arange(self._seen, self._seen + len(rows), device=x.device) % SAMPLE_ROWS
        self._sample[slots] = rows.float()
        self._seen += len(rows)


def srelu_modules(model: nn.Module) -> list[SReLU]:
    """Return all SReLUs of a model, in the order of `model.modules()`."""
    return [module for module in model.modules() if isinstance(module, SReLU)]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices and larger, with decay; SReLUs and all other 1-D parameters, without.

    The paper uses no weight decay on SReLU: it would pull the thresholds and slopes towards 0. Parameters that do
    not train are left out, but for those of frozen SReLUs.
    """
    srelus = {id(p): module for module in srelu_modules(model) for p in module.own_parameters()}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        module = srelus.get(id(parameter))
        if parameter.requires_grad or (module is not None and module.frozen):
            groups[module is not None or parameter.ndim < 2].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
