"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over one flat parameter, with moments in 32 or in 8 bits.

torch's own classes would import its compiler, which takes a second and memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.train.estimate import MOMENT_BLOCK as BLOCK

CHUNK = BLOCK << 12  # codes that are processed at once without the kernel
# A code is the upper bits of a float from 0 to 1, without its lowest `shift` bits and minus an offset.
FIRST, ROOT = (127, 20, (127 << 3) - 127), (255, 19, (127 << 4) - 255)  # the code of 1, shift, offset
WORD = 0xFFFFFFFF


class AdamW:
    """weight_N: fp32, with its gradient in `weight_N.grad`. The other arguments are those of torch.optim.AdamW."""

    kernel = "adamw"

    def __init__(self, weight_N: Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self._weight_N, self._betas, self._eps, self._weight_decay = weight_N.detach(), betas, eps, weight_decay
        assert weight_N.grad is not None
        self._grad_N = weight_N.grad
        self._steps = 0
        self._moments = self._zero_moments()

    def gradient_norm(self) -> float:
        """The L2 norm of the gradient, with a sum in fp64 where the kernel is available."""
        if not cpu.usable(self._grad_N):
            return float(self._grad_N.norm())
        sum_1 = torch.zeros(1, dtype=torch.float64)
        cpu.kernels().sum_of_squares(self._grad_N.numel(), self._grad_N, sum_1)
        return float(sum_1.sqrt())

    def step(self, rate: float, scale: float = 1.0) -> None:
        """Update the weights by the gradient times `scale`, and set the gradient to zero. rate: the learning rate."""
        self._steps += 1
        beta1, beta2 = self._betas
        rate_1 = rate / (1 - beta1**self._steps)
        by, shrink = (1 - beta2**self._steps) ** -0.5, 1 - rate * self._weight_decay
        x_N, grad_N = self._weight_N, self._grad_N
        if cpu.usable(x_N, grad_N):
            numbers = scale, beta1, beta2, rate_1, by, self._eps, shrink
            step = getattr(cpu.kernels(), self.kernel)
            step(x_N.numel(), self._steps, x_N, grad_N, *self._moments.values(), *numbers)
            return
        grad_N.mul_(scale)
        self._update(rate_1, by, shrink)
        grad_N.zero_()

    def state(self) -> dict[str, Tensor]:
        """The step and the moments, under torch's names."""
        return {"step": torch.tensor(float(self._steps)), **self._moments}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state that `state` returned."""
        self._steps = int(state["step"])
        for name, moment in self._moments.items():
            moment.copy_(state[name])

    def _zero_moments(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self._weight_N) for name in ("exp_avg", "exp_avg_sq")}

    def _update(self, rate: float, by: float, shrink: float) -> None:
        first_N, second_N = self._moments.values()
        beta1, beta2 = self._betas
        first_N.lerp_(self._grad_N, 1 - beta1)
        second_N.mul_(beta2).addcmul_(self._grad_N, self._grad_N, value=1 - beta2)
        self._weight_N.mul_(shrink).addcdiv_(first_N, second_N.sqrt().mul_(by).add_(self._eps), value=-rate)


class AdamW8bit(AdamW):
    """AdamW with the first moment and the root of the second in 8 bits each, relative to the largest value of their
    block (Dettmers et al. 2022, arXiv:2110.02861). A code is a short float rather than an index into 256 values, and
    rounding is stochastic: beta2 changes a second moment by only a thousandth in each step, which rounding to the
    nearest would undo each time. The code of a root that is not zero never becomes zero, because the update would then
    be the first moment divided by eps."""

    kernel = "adamw_8bit"

    def _zero_moments(self) -> dict[str, Tensor]:
        like, blocks = self._weight_N, -(-self._weight_N.numel() // BLOCK)
        moments = {}
        for name in ("exp_avg", "exp_avg_sq_root"):
            moments[name] = torch.zeros_like(like, dtype=torch.uint8)
            moments[f"{name}_max"] = like.new_zeros(blocks)
        return moments

    def _update(self, rate: float, by: float, shrink: float) -> None:
        first_N, first_max_B, root_N, root_max_B = self._moments.values()
        (beta1, beta2), count = self._betas, self._weight_N.numel()
        for start in range(0, count, CHUNK):
            part, of = slice(start, min(start + CHUNK, count)), slice(start // BLOCK, (start + CHUNK) // BLOCK)
            grad_C = self._grad_N[part]
            sizes_C, signs_C = first_N[part] & 127, 1 - 2 * (first_N[part] >> 7).float()
            first_C = (_dequantize(sizes_C, first_max_B[of], FIRST) * signs_C).where(sizes_C > 0, 0)
            first_C.lerp_(grad_C, 1 - beta1)
            root_C = _dequantize(root_N[part], root_max_B[of], ROOT)
            root_C.square_().mul_(beta2).addcmul_(grad_C, grad_C, value=1 - beta2).sqrt_()
            self._weight_N[part].mul_(shrink).addcdiv_(first_C, by * root_C + self._eps, value=-rate)
            random_C = _random(start, grad_C, self._steps)
            sizes_C, first_max_B[of] = _quantize(first_C.abs(), random_C >> 12, FIRST)
            first_N[part] = sizes_C | ((first_C < 0).byte() << 7)
            root_N[part], root_max_B[of] = _quantize(root_C, random_C & 0x7FFFF, ROOT)


def _dequantize(codes_C: Tensor, scale_B: Tensor, form: tuple[int, int, int]) -> Tensor:
    """The values (C,) of codes (C,) in blocks with scales (B,). The caller sets code 0 of a first moment to zero."""
    _, shift, lowest = form
    return ((codes_C.int() + lowest) << shift).view(torch.float32) * _per_element(scale_B, codes_C)


def _quantize(values_C: Tensor, random_C: Tensor, form: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The codes (C,) of non-negative values (C,), and the scales (B,) of their blocks."""
    most, shift, lowest = form
    scale_B = torch.nn.functional.pad(values_C, (0, -len(values_C) % BLOCK)).view(-1, BLOCK).amax(1)
    words_C = (values_C * _per_element(torch.where(scale_B > 0, 1 / scale_B, 0), values_C)).view(torch.int32)
    return (((words_C + random_C) >> shift) - lowest).clamp(0, most).byte(), scale_B


def _per_element(block_B: Tensor, like_C: Tensor) -> Tensor:
    return block_B.repeat_interleave(BLOCK)[: len(like_C)]


def _random(start: int, like_C: Tensor, step: int) -> Tensor:
    """32 random bits for each index from `start` on, by the hash of index and step in the kernels, on any device."""
    h_C = torch.arange(start, start + len(like_C), device=like_C.device) * 0x9E3779B9 + step & WORD
    for _ in range(2):
        h_C = ((h_C ^ (h_C >> 16)) * 0x85EBCA6B) & WORD
        h_C = ((h_C ^ (h_C >> 13)) * 0xC2B2AE35) & WORD
        h_C = ((h_C ^ (h_C >> 16)) + step) & WORD
    return h_C
