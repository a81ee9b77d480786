"""What a step on preferences has found: the parts of its loss, and the sums of which its metrics are means."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, field

from torch import Tensor

from fortwo.nn.packing import Pack
from fortwo.train.shares import Share


@dataclass
class _Answers:
    """How many answers there are, and the sums of their rewards and log probabilities."""

    count: float = 0
    reward: float = 0.0
    log_prob: float = 0.0

    def add(self, reward: float, log_prob: float) -> None:
        self.count += 1
        self.reward += reward
        self.log_prob += log_prob


@dataclass
class PreferenceSums:
    """What a step has found so far. right: units whose rewards agree with them."""

    loss: float = 0.0
    nll: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    right: int = 0
    chosen: _Answers = field(default_factory=_Answers)
    rejected: _Answers = field(default_factory=_Answers)

    def count(self, packed: Pack, began: float) -> None:
        self.tokens += len(packed.tokens_T)
        self.seconds += time.perf_counter() - began

    def add_up(self, share: Share) -> None:
        """Replace what this process has found, but for the seconds, by the sums over all processes."""
        parts = self.loss, self.nll, self.tokens, self.right, *astuple(self.chosen), *astuple(self.rejected)
        self.loss, self.nll, tokens, right, *answers = share.add_up(list(parts))
        self.tokens, self.right = int(tokens), int(right)
        self.chosen, self.rejected = _Answers(*answers[:3]), _Answers(*answers[3:])

    def add_pairs(self, log_probs_R: Tensor, rewards_R: Tensor) -> None:
        found = list(zip(rewards_R.tolist(), log_probs_R.tolist(), strict=True))
        for chosen, rejected in zip(found[::2], found[1::2], strict=True):
            self.chosen.add(*chosen)
            self.rejected.add(*rejected)
            self.right += chosen[0] > rejected[0]

    def add_labelled(self, log_probs_R: Tensor, rewards_R: Tensor, desirable_R: Tensor, least: float) -> None:
        """least: the reward that a desirable answer must exceed to be judged right."""
        found = zip(rewards_R.tolist(), log_probs_R.tolist(), desirable_R.tolist(), strict=True)
        for reward, log_prob, desirable in found:
            (self.chosen if desirable else self.rejected).add(reward, log_prob)
            self.right += (reward > least) == desirable

    def metrics(self, objective: str, kl: float | None) -> dict[str, float]:
        """The step's metrics under TRL's names. A step without an answer of a kind has none of its metrics."""
        named: dict[str, float] = {}
        for name, answers in (("chosen", self.chosen), ("rejected", self.rejected)):
            if answers.count:
                named[f"rewards/{name}"] = answers.reward / answers.count
                named[f"logps/{name}"] = answers.log_prob / answers.count
        units = self.chosen.count + self.rejected.count if objective == "kto" else self.chosen.count
        named["rewards/accuracies"] = self.right / units
        if self.chosen.count and self.rejected.count:
            named["rewards/margins"] = named["rewards/chosen"] - named["rewards/rejected"]
        if objective == "orpo":
            named["nll_loss"] = self.nll
        return named if kl is None else named | {"kl": kl}
