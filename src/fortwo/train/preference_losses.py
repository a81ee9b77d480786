"""The losses of DPO, KTO and ORPO as functions of log probabilities, under TRL's names.

Shape suffixes: N answers or pairs of answers. A log ratio is the log probability of an answer minus that which the
reference gives it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_losses(
    chosen_N: Tensor,
    rejected_N: Tensor,
    tokens_N: Tensor,
    rejected_tokens_N: Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair (N,). chosen_N, rejected_N: log ratios of the answers; tokens_N, rejected_tokens_N: their
    lengths. label_smoothing: of sigmoid (Mitchell 2023) and of robust. Raises ValueError for an unknown loss_type."""
    margin_N = beta * (chosen_N - rejected_N)
    match loss_type:
        case "sigmoid":  # Rafailov et al. 2023, arXiv:2305.18290
            return -(1 - label_smoothing) * F.logsigmoid(margin_N) - label_smoothing * F.logsigmoid(-margin_N)
        case "robust":  # Chowdhury et al. 2024, arXiv:2403.00409
            right_N, wrong_N = F.logsigmoid(margin_N), F.logsigmoid(-margin_N)
            return (label_smoothing * wrong_N - (1 - label_smoothing) * right_N) / (1 - 2 * label_smoothing)
        case "hinge":  # Liu et al. 2023, arXiv:2309.06657
            return torch.relu(1 - margin_N)
        case "ipo":  # Azar et al. 2023, arXiv:2310.12036, by the token
            return (chosen_N / tokens_N - rejected_N / rejected_tokens_N - 1 / (2 * beta)) ** 2
        case "sigmoid_norm":
            return -F.logsigmoid(beta * (chosen_N / tokens_N - rejected_N / rejected_tokens_N))
        case "nca_pair":  # Chen et al. 2024, arXiv:2402.05369
            good_N, bad_N = beta * chosen_N, beta * rejected_N
            return -F.logsigmoid(good_N) - 0.5 * F.logsigmoid(-good_N) - 0.5 * F.logsigmoid(-bad_N)
        case "sppo_hard":  # Wu et al. 2024, arXiv:2405.00675
            return (chosen_N - 0.5 / beta) ** 2 + (rejected_N + 0.5 / beta) ** 2
        case "apo_zero":  # D'Oosterlinck et al. 2024, arXiv:2408.06266
            return 1 - torch.sigmoid(beta * chosen_N) + torch.sigmoid(beta * rejected_N)
        case "apo_down":
            return torch.sigmoid(beta * chosen_N) + 1 - torch.sigmoid(margin_N)
    raise ValueError(loss_type)


def odds_ratio_losses(chosen_N: Tensor, rejected_N: Tensor, beta: float) -> Tensor:
    """ORPO's loss of each pair (N,) beside the cross-entropy (Hong et al. 2024, arXiv:2403.07691). chosen_N,
    rejected_N: mean log probability of a token of each answer."""
    odds_N = (chosen_N - rejected_N) - (_log1mexp(chosen_N) - _log1mexp(rejected_N))
    return -beta * F.logsigmoid(odds_N)


def _log1mexp(x_N: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012). Probabilities of 1 give a finite value."""
    x_N = x_N.clamp(max=-1e-7)
    return torch.where(x_N > -0.6931472, torch.log(-torch.expm1(x_N)), torch.log1p(-torch.exp(x_N)))


def kto_losses(
    ratios_N: Tensor, desirable_N: Tensor, kl: float, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO's loss of each answer (N,) (Ethayarajh et al. 2024, arXiv:2402.01306). ratios_N: log ratios; desirable_N: the
    labels; kl: the estimate of the divergence from the reference, 0 for apo_zero_unpaired."""
    sign_N = torch.where(desirable_N, 1.0, -1.0)
    weight_N = torch.where(desirable_N, desirable_weight, undesirable_weight)
    return weight_N * (1 - torch.sigmoid(beta * sign_N * (ratios_N - kl)))
