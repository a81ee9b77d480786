"""Forwards of the serving path: the prompts of new sequences, a part at a time, then one token for every running one.

Rows of the plain base and of any adapters share one forward; each row gets its own adapter's update and no other.
The runner knows tensors and slots; who runs when is the scheduler's business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from fortwo.engine.cache import Cache
from fortwo.engine.scheduler import Sequence as Running
from fortwo.execution.backend import Backend
from fortwo.execution.kv_cache import Slot
from fortwo.execution.parts import Part
from fortwo.nn.lora import Lora

log = logging.getLogger(__name__)


class Runner:
    """bound: bytes of memory for keys and values, None for as many as come."""

    def __init__(self, backend: Backend, bound: int | None = None) -> None:
        self.backend = backend
        self.decoder = decoder = backend.decoder
        tokens = None if bound is None else bound // Cache.bytes_per_token(decoder.config, backend.kv_dtype)
        self.cache = Cache(decoder.config, decoder.device, tokens, backend.kv_dtype)
        self._live: dict[str, Lora] = {}
        self._numbers = count(1)
        self._roots: dict[str | None, int] = {None: 0}  # whose keys and values may be kept for others

    def warm(self) -> None:
        """Do what the first request would have to wait for, on the thread that will run it."""
        if self.decoder.device.type == "cuda":
            torch.cuda.set_device(self.decoder.device)  # Triton's kernels and graphs go to the thread's own device
        self.backend.warm()

    # ------------------------------------------------------------ adapters

    def attach(self, key: str, lora: Lora, *, frozen: bool = False) -> None:
        """Serve a copy of `lora`, which may be on another device, under `key`. frozen: it will not change any more, so
        prefixes are kept for it; else it is copied again whenever prompts are read, and nothing outlives a reply."""
        self.detach(key)
        self.backend.adapters.add(key, lora.to(self.decoder.device))
        if frozen:
            self._roots[key] = next(self._numbers)
        else:
            self._live[key] = lora

    def detach(self, key: str) -> None:
        self._live.pop(key, None)
        self.backend.adapters.remove(key)
        if (root := self._roots.pop(key, None)) is not None:
            self.cache.prefixes.forget(root)

    def has(self, key: str) -> bool:
        return key in self.backend.adapters

    # ------------------------------------------------------------ slots

    def unread(self, sequence: Running) -> int:
        """How many tokens of a waiting sequence will have to be computed."""
        tokens, root = sequence.tokens, self._root(sequence)
        return len(tokens) - (0 if root is None else self.cache.prefixes.length(root, tokens[:-1]))

    def open(self, sequence: Running) -> bool:
        """Give the sequence a slot that holds what is already known of its beginning; False where there is no room."""
        slot = self.cache.take(min(len(sequence.tokens) + 1, self.cache.longest))
        if slot is None:
            return False
        slot.root = self._root(sequence)
        self.cache.recall(slot, sequence.tokens)
        sequence.slot = slot
        return True

    def extend(self, sequence: Running) -> bool:
        """Make room for the sequence's last token; False where there is none."""
        return self.cache.grow(_slot(sequence), len(sequence.tokens))

    def release(self, sequence: Running, *, keep: bool = True) -> None:
        """Give the sequence's slot back. keep: what it held serves others that begin alike."""
        if sequence.slot is not None:
            slot, sequence.slot = _slot(sequence), None
            try:
                if keep:
                    self._keep(slot, sequence)
            except RuntimeError:  # no memory for it: the next one that begins alike is only slower
                log.exception("a prefix could not be kept")
            finally:
                self.cache.give_back(slot)

    def _root(self, sequence: Running) -> int | None:
        """What its prefixes are found and kept under; None where keys and values alone do not continue a prefix."""
        if sequence.listener is not None or self.decoder.config.state_bytes:
            return None
        return self._roots.get(sequence.adapter)

    def _keep(self, slot: Slot, sequence: Running) -> None:
        still_the_same = slot.root == self._roots.get(sequence.adapter)  # adapter as when it was computed
        if not sequence.background and still_the_same:
            self.cache.keep(slot, sequence.tokens)

    # ------------------------------------------------------------ forwards

    @torch.no_grad()
    def prefill(self, sequences: Sequence[Running], lengths: Sequence[int] | None = None) -> Tensor:
        """Compute the next `lengths` tokens of each sequence (None: all that are left), opening those that are not.

        Next-token logits (N, V) of the sequences that are computed wholly now, in order. Raises MemoryError where an
        opened sequence finds no room.
        """
        for sequence in sequences:
            if sequence.slot is None and not self.open(sequence):
                raise MemoryError(f"the cache has no room for a sequence of {len(sequence.tokens)} tokens")
        if lengths is None:
            lengths = [len(sequence.tokens) - _slot(sequence).length for sequence in sequences]
        for key in self._live.keys() & {sequence.adapter for sequence in sequences}:
            self.backend.adapters.copy(key, self._live[key].to(self.decoder.device))
        logits: dict[int, Tensor] = {}
        parts = [_part(sequence, length) for sequence, length in zip(sequences, lengths, strict=True)]
        for places, hidden_TD, spans in self.backend.prefill(parts):
            done = {}  # places of sequences, with where in T their last token lies
            for place, span in zip(places, spans, strict=True):
                sequence, slot = sequences[place], _slot(sequences[place])
                if sequence.listener is not None:
                    sequence.listener.on_hidden_states(hidden_TD[span], slot.length)
                slot.length += len(span)
                if slot.length == len(sequence.tokens):
                    done[place] = span[-1]
                    self._keep(slot, sequence)
            if done:
                rows_V = self.decoder.logits(hidden_TD[list(done.values())])
                logits |= zip(done, rows_V, strict=True)
        if not logits:
            return torch.empty(0, self.decoder.config.vocabulary, device=self.decoder.device)
        return torch.stack([logits[place] for place in sorted(logits)])

    @torch.no_grad()
    def step(self, sequences: Sequence[Running]) -> Tensor:
        """Run the last token of each sequence whose other tokens are computed, and for which `extend` found room.
        Next-token logits (len(sequences), V), in order."""
        hidden_BD = self.backend.decode([_part(sequence, 1) for sequence in sequences])
        for row, sequence in enumerate(sequences):
            if sequence.listener is not None:
                sequence.listener.on_hidden_states(hidden_BD[row : row + 1], _slot(sequence).length)
            _slot(sequence).length += 1
        return self.decoder.logits(hidden_BD)


def _slot(sequence: Running) -> Slot:
    assert isinstance(sequence.slot, Slot), "the sequence was not opened"
    return sequence.slot


def _part(sequence: Running, length: int) -> Part:
    """The next `length` tokens of the sequence."""
    tokens, slot = sequence.tokens, _slot(sequence)
    end = slot.length + length
    return Part(tokens[slot.length : end], slot.length, slot, sequence.adapter, end == len(tokens))
