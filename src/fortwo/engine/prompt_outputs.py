"""Outputs about the prompt itself, collected part by part while it is computed: log-probabilities and the embedding.

Shape suffixes: L tokens of a part, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.engine.sampling import logprobs
from fortwo.nn.network import Network
from fortwo.prompts import Logprob, Prompt

LOGITS = 256  # tokens whose logits are in memory at once


class PromptOutputs:
    """logprobs: of the tokens computed so far, as Sampling.prompt_logprobs asks. embedding: the hidden state of the
    last token, scaled to length 1; only that token has attended to the whole text (Neelakantan et al. 2022,
    arXiv:2201.10005; vLLM's default for decoders)."""

    def __init__(self, prompt: Prompt, decoder: Network) -> None:
        self.logprobs: list[Logprob] = []
        self.embedding: tuple[float, ...] = ()
        self._prompt = prompt
        self._decoder = decoder

    @staticmethod
    def wanted(prompt: Prompt) -> bool:
        """Whether the prompt asks for any of them."""
        return prompt.embed or prompt.sampling.prompt_logprobs is not None

    @torch.no_grad()
    def on_hidden_states(self, hidden_LD: Tensor, begin: int) -> None:
        """Takes the hidden states (L, D) of the prompt's tokens from index `begin` on. Parts come in order; one that
        begins at 0 starts over, because the request was preempted."""
        prompt, end = self._prompt, begin + len(hidden_LD)
        if prompt.embed and end == len(prompt.tokens):
            self.embedding = tuple(F.normalize(hidden_LD[-1], dim=0).tolist())
        count = prompt.sampling.prompt_logprobs
        if count is None:
            return
        if begin == 0:
            self.logprobs = [Logprob(prompt.tokens[0], None)]
        following = prompt.tokens[begin + 1 : end + 1]
        for start in range(0, len(following), LOGITS):
            tokens = following[start : start + LOGITS]
            logits_LV = self._decoder.logits(hidden_LD[start : start + len(tokens)])
            self.logprobs += logprobs(logits_LV, tokens, count)
