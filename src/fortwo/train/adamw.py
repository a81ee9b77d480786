"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over one flat parameter.

torch's own classes bring its compiler into memory and take a second for that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fortwo.models import kernels


class AdamW:
    """weight_N: fp32, with its gradient in `weight_N.grad`. The other settings are torch.optim.AdamW's."""

    def __init__(self, weight_N: Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self._weight_N, self._betas, self._eps, self._weight_decay = weight_N.detach(), betas, eps, weight_decay
        assert weight_N.grad is not None
        self._grad_N = weight_N.grad
        self._steps = 0
        self._first_N, self._second_N = torch.zeros_like(self._weight_N), torch.zeros_like(self._weight_N)

    def gradient_norm(self) -> float:
        if not kernels.usable(self._grad_N):
            return float(self._grad_N.norm())
        sum_1 = torch.zeros(1, dtype=torch.float64)
        kernels.call("square_sum", None, self._grad_N.numel(), self._grad_N, sum_1)
        return float(sum_1.sqrt())

    def step(self, rate: float, scale: float = 1.0) -> None:
        """By the gradient times `scale`, which is zero afterwards."""
        self._steps += 1
        beta1, beta2 = self._betas
        rate_1 = rate / (1 - beta1**self._steps)
        by, shrink = (1 - beta2**self._steps) ** -0.5, 1 - rate * self._weight_decay
        x_N, grad_N, first_N, second_N = self._weight_N, self._grad_N, self._first_N, self._second_N
        if kernels.usable(x_N, grad_N):
            numbers = [float(one) for one in (scale, beta1, beta2, rate_1, by, self._eps, shrink)]
            kernels.call("adamw", None, x_N.numel(), x_N, grad_N, first_N, second_N, *numbers)
            return
        grad_N.mul_(scale)
        first_N.lerp_(grad_N, 1 - beta1)
        second_N.mul_(beta2).addcmul_(grad_N, grad_N, value=1 - beta2)
        x_N.mul_(shrink).addcdiv_(first_N, second_N.sqrt().mul_(by).add_(self._eps), value=-rate_1)
        grad_N.zero_()

    def state(self) -> dict[str, Tensor]:
        """By torch's names."""
        return {"step": torch.tensor(float(self._steps)), "exp_avg": self._first_N, "exp_avg_sq": self._second_N}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._steps = int(state["step"])
        self._first_N.copy_(state["exp_avg"])
        self._second_N.copy_(state["exp_avg_sq"])
