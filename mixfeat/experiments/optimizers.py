"""Optimizers of networks in one launch: a loss for each run, and a state that a record can hold.

A step depends only on the previous state and the number of the step, so a run that is split is the unbroken run. Weight
decay adds ``weight_decay w`` to the gradient, as in :class:`torch.optim.SGD` and Adam.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["OPTIMIZERS", "Loop"]

# the tensors of weight's shape that each optimizer carries from step to step
OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "gd": (), "momentum": ("velocity",), "sgd": (), "adam": ("mean", "square"), "sign": (),
}  # fmt: skip

_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's, as in Kingma and Ba 2015 (arXiv 1412.6980) and PyTorch


class Loop:
    """Steps of SGD, Adam (arXiv 1412.6980) or sign descent (``w - lr sign(gradient)``).

    Args:
        optimizer: "sgd", "adam" or "sign".
        loss: ``loss(weight, step)``, the losses (R,) of weights (R,C,M,D) at that step.
        lr, weight_decay: finite, not negative.
        step: number of the next step, 0 for the first.
        state: the tensors (R,C,M,D) that ``OPTIMIZERS`` names; they are replaced, never mutated.
    """

    def __init__(
        self,
        optimizer: str,
        loss: Callable[[Tensor, int], Tensor],
        lr: float,
        weight_decay: float,
        step: int,
        state: dict[str, Tensor],
    ) -> None:
        self._optimizer, self._loss, self._lr, self._weight_decay = optimizer, loss, lr, weight_decay
        self._step, self.state = step, state

    def __call__(self, weight: Tensor, count: int) -> Tensor:
        """Take ``count`` steps and return the weight after them."""
        for _ in range(count):
            weight = weight.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._loss(weight, self._step).sum(), weight)
            self._step += 1
            with torch.no_grad():
                change = self._change(gradient.add(weight, alpha=self._weight_decay))
                weight = weight.sub(change, alpha=self._lr)
        return weight.detach()

    def _change(self, gradient: Tensor) -> Tensor:
        if self._optimizer == "sign":
            return gradient.sign()
        if self._optimizer == "sgd":
            return gradient
        (beta1, beta2), t = _BETAS, self._step
        mean = self.state["mean"].lerp(gradient, 1 - beta1)
        square = (beta2 * self.state["square"]).addcmul(gradient, gradient, value=1 - beta2)
        self.state = {"mean": mean, "square": square}
        return (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + _EPS)
