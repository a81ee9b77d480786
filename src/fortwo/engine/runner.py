"""Forwards of the serving path: the prompts of new sequences, a part at a time, then one token for every running one.

Rows of the plain base and of any adapters share one forward; each row gets its own adapter's update and no other.
The runner knows tensors and slots; who runs when is the scheduler's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.engine.cache import Cache, Pool, Slot
from fortwo.execution.adapters_cuda import TabledAdapters
from fortwo.execution.adapters_stacked import Banks
from fortwo.execution.cuda_graphs import Graphs
from fortwo.execution.decode_fused import Step
from fortwo.execution.prefill_fused import Piece, Prefill
from fortwo.kernels.operations import decode_attention
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora, Update
from fortwo.nn.packing import PackedAttention, common_prefix, pack
from fortwo.quantization.formats import WIDE

log = logging.getLogger(__name__)
Computed = tuple[list[int], Tensor, list[list[int]]]  # places of sequences; hidden states (T, D); where in T each lies


class Listener(Protocol):
    def on_hidden_states(self, hidden_LD: Tensor, begin: int, /) -> None:
        """Hidden states after the final norm of the sequence's tokens from place `begin` on."""


class Running(Protocol):
    """What the runner needs of a sequence. tokens: prompt and reply so far. slot: None until it is opened. listener:
    hears each part that is computed; where there is one, nothing is taken from kept prefixes. background: as
    in prompts.Prompt; no prefixes are kept of it."""

    tokens: list[int]
    adapter: str | None
    slot: Slot | None

    @property
    def listener(self) -> Listener | None: ...
    @property
    def background(self) -> bool: ...


class Runner:
    """bound: bytes of memory for keys and values, None for as many as come."""

    def __init__(self, decoder: Decoder, bound: int | None = None) -> None:
        self.decoder = decoder
        self._heads = [decoder.config.heads, decoder.config.kv_heads, decoder.config.kv_heads]
        self._one_kernel = Step(decoder)
        self._prompts = Prefill(decoder)
        on_gpu = decoder.device.type != "cpu"
        dtype = decoder.dtype if on_gpu else torch.float16 if self._one_kernel.laid else torch.float32
        tokens = None if bound is None else bound // Cache.bytes_per_token(decoder.config, dtype)
        self.cache = Cache(decoder.config, decoder.device, tokens, dtype)
        self._live: dict[str, Lora] = {}
        self._graphs = Graphs(decoder, dtype) if Graphs.fits(decoder, dtype) else None
        self._banks: TabledAdapters | Banks = (
            TabledAdapters(decoder.dtype, decoder.device)
            if on_gpu or self._graphs is not None
            else Banks(decoder.config, decoder.device, self._one_kernel.laid)
        )
        self._numbers = count(1)
        self._roots: dict[str | None, int] = {None: 0}  # whose keys and values may be kept for others

    def warm(self) -> None:
        """Do what the first request would have to wait for, on the thread that will run it."""
        if self.decoder.device.index is not None:
            torch.cuda.set_device(self.decoder.device)
        if self._graphs is not None:
            self._graphs.warm()

    # ------------------------------------------------------------ adapters

    def attach(self, key: str, lora: Lora, *, frozen: bool = False) -> None:
        """Serve a copy of `lora` under `key`. frozen: it will not change any more, so prefixes are kept for it; else it
        is copied again whenever prompts are read, and nothing outlives a reply."""
        self.detach(key)
        self._banks.add(key, lora)
        if frozen:
            self._roots[key] = next(self._numbers)
        else:
            self._live[key] = lora

    def detach(self, key: str) -> None:
        self._live.pop(key, None)
        self._banks.remove(key)
        if (root := self._roots.pop(key, None)) is not None:
            self.cache.prefixes.forget(root)

    def has(self, key: str) -> bool:
        return key in self._banks

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
            slot, sequence.slot = sequence.slot, None
            try:
                if keep:
                    self._keep(slot, sequence)
            except RuntimeError:  # no memory for it: the next one that begins alike is only slower
                log.exception("a prefix could not be kept")
            finally:
                self.cache.give_back(slot)

    def _root(self, sequence: Running) -> int | None:
        """What its prefixes are found and kept under."""
        return None if sequence.listener is not None else self._roots.get(sequence.adapter)

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
            self._banks.copy(key, self._live[key])
        logits: dict[int, Tensor] = {}
        for places, hidden_TD, spans in self._computed(sequences, lengths):
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

    def _computed(self, sequences: Sequence[Running], lengths: Sequence[int]) -> Iterator[Computed]:
        """The next tokens of each sequence, of some after the other."""
        if self._graphs is not None:
            ends = list(accumulate(lengths))
            spans = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
            yield list(range(len(sequences))), self._played(self._graphs, sequences, lengths), spans
            return
        groups = prefill_groups(sequences, lengths, mixed=self._one_kernel.laid)
        if self._prompts.takes:
            yield self._prefill_at_once(sequences, lengths, groups)
            return
        for places, alike in groups:
            group, parts = [sequences[place] for place in places], [lengths[place] for place in places]
            even = len(parts) * max(parts) <= 2 * sum(parts)  # the grid of a pack is as wide as its longest row
            yield places, *(self._prefill_whole(group) if alike and even else self._prefill_parts(group, parts))

    def _prefill_at_once(
        self, sequences: Sequence[Running], lengths: Sequence[int], groups: Iterable[tuple[list[int], bool]]
    ) -> Computed:
        """All in one kernel; what those of a group that is alike begin with is computed once."""
        pieces: list[Piece] = []
        keys: list[str | None] = []  # whose rows they are
        found: dict[int, list[int]] = {}  # where in T the tokens of each place lie

        def put(tokens: Sequence[int], before: int, places: Sequence[int]) -> None:
            slots = [self.cache.place(_slot(sequences[place])) for place in places]
            pieces.append(Piece(tokens, before, slots))
            for place in places:
                found[place] = found.get(place, []) + list(range(len(keys), len(keys) + len(tokens)))
            keys.extend([sequences[places[0]].adapter] * len(tokens))

        for places, alike in groups:
            shared = common_prefix([sequences[place].tokens for place in places]) if alike and len(places) > 1 else 0
            if shared:
                put(sequences[places[0]].tokens[:shared], 0, places)
            for place in places:
                tokens, begun = sequences[place].tokens, _slot(sequences[place]).length
                put(tokens[begun + shared : begun + lengths[place]], begun + shared, [place])
        return list(found), self._prompts(pieces, self._updates(keys)), list(found.values())

    def _prefill_whole(self, sequences: Sequence[Running]) -> tuple[Tensor, list[list[int]]]:
        """Sequences of one adapter of which nothing is known; what they begin with in common is computed once.
        Hidden states (T, D), and where in T the tokens of each lie."""
        device = self.decoder.device
        packed = pack([sequence.tokens for sequence in sequences], device)
        P, attention = packed.prefix, PackedAttention(packed, self.decoder.config)
        slots = [_slot(sequence) for sequence in sequences]
        rests = list(zip(slots, packed.starts, packed.lengths, strict=True))

        def attend(layer: int, qkv_TNE: Tensor) -> Tensor:
            _, k_TKE, v_TKE = qkv_TNE.split(self._heads, 1)
            for slot, start, length in rests:
                pool = self.cache.pools[slot.capacity]
                for stored, new_TKE in ((pool.k[layer], k_TKE), (pool.v[layer], v_TKE)):
                    new_KTE = new_TKE.transpose(0, 1)
                    if P:
                        stored[slot.row, :, :P] = new_KTE[:, :P]
                    stored[slot.row, :, P : P + length] = new_KTE[:, start : start + length]
            return attention(layer, qkv_TNE)

        updates = self._updates([sequences[0].adapter] * len(packed.tokens_T))
        hidden_TD = self.decoder.forward(packed.tokens_T, packed.positions_T, attend, updates)
        return hidden_TD, [[*range(P), *range(start, start + length)] for _, start, length in rests]

    def _prefill_parts(self, sequences: Sequence[Running], lengths: Sequence[int]) -> tuple[Tensor, list[list[int]]]:
        """The next tokens of sequences, after what their slots hold. Hidden states (T, D), and where in T the tokens of
        each lie."""
        device = self.decoder.device
        tokens: list[int] = []
        positions: list[int] = []
        parts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            slot = _slot(sequence)
            before = slot.length
            mask_LS = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
            parts.append((slot, before, len(tokens), length, mask_LS))
            tokens += sequence.tokens[before : before + length]
            positions += range(before, before + length)

        def attend(layer: int, qkv_TNE: Tensor) -> Tensor:
            q_THE, k_TKE, v_TKE = qkv_TNE.split(self._heads, 1)
            mixed_THE = torch.empty_like(q_THE)
            for slot, before, start, length, mask_LS in parts:
                pool, part = self.cache.pools[slot.capacity], slice(start, start + length)
                k_KSE, v_KSE = (stored[layer][slot.row, :, : before + length] for stored in (pool.k, pool.v))
                k_KSE[:, before:] = k_TKE[part].transpose(0, 1)
                v_KSE[:, before:] = v_TKE[part].transpose(0, 1)
                q_1HLE, seen = (
                    q_THE[part].transpose(0, 1)[None],
                    (k_KSE[None].to(q_THE.dtype), v_KSE[None].to(q_THE.dtype)),
                )
                mixed_1HLE = F.scaled_dot_product_attention(q_1HLE, *seen, attn_mask=mask_LS, enable_gqa=True)
                mixed_THE[part] = mixed_1HLE[0].transpose(0, 1)
            return mixed_THE

        hidden_TD = self.decoder.forward(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            attend,
            self._updates([one.adapter for one, length in zip(sequences, lengths, strict=True) for _ in range(length)]),
        )
        return hidden_TD, [list(range(start, start + length)) for _, _, start, length, _ in parts]

    @torch.no_grad()
    def step(self, sequences: Sequence[Running]) -> Tensor:
        """Run the last token of each sequence whose other tokens are computed, and for which `extend` found room.
        Next-token logits (len(sequences), V), in order."""
        if self._graphs is not None or self._prompts.takes or self._one_kernel.takes(len(sequences)):
            hidden_BD = self._step_at_once(sequences)
            self._told(sequences, hidden_BD)
            return self.decoder.logits(hidden_BD)
        device = self.decoder.device
        owners = {id(sequence.slot): place for place, sequence in enumerate(sequences)}
        parts = self.cache.together([_slot(sequence) for sequence in sequences])
        order = [owners[id(slot)] for _, slots in parts for slot in slots]
        rows = [sequences[place] for place in order]
        positions_B = torch.tensor([len(sequence.tokens) - 1 for sequence in rows], device=device)
        tokens_B = torch.tensor([sequence.tokens[-1] for sequence in rows], device=device)
        attention = _StepAttention(parts, positions_B)
        hidden_BD = self.decoder.forward(tokens_B, positions_B, attention, self._updates([row.adapter for row in rows]))
        self._told(rows, hidden_BD)
        if order != list(range(len(order))):
            hidden_BD = hidden_BD[torch.tensor(order, device=device).argsort()]
        return self.decoder.logits(hidden_BD)

    def _step_at_once(self, sequences: Sequence[Running]) -> Tensor:
        if self._graphs is not None:
            return self._played(self._graphs, sequences, [1] * len(sequences))
        rows = [(one.tokens[-1], len(one.tokens) - 1, self.cache.place(_slot(one))) for one in sequences]
        updates = self._updates([sequence.adapter for sequence in sequences])
        few = len(rows) < WIDE or not self._prompts.takes
        if few and self._one_kernel.takes(len(rows)):
            return self._one_kernel(rows, updates)
        return self._prompts([Piece([token], position, [place]) for token, position, place in rows], updates)

    def _played(self, graphs: Graphs, sequences: Sequence[Running], lengths: Sequence[int]) -> Tensor:
        """Hidden states (T, D) of the next tokens of each sequence, one behind the other."""
        assert isinstance(self._banks, TabledAdapters)
        rows, adapted = [], False
        for sequence, length in zip(sequences, lengths, strict=True):
            begun, place = _slot(sequence).length, self.cache.place(_slot(sequence))
            owner = self._banks.address(sequence.adapter)
            adapted = adapted or owner != 0
            rows += [(sequence.tokens[at], at, *place, owner) for at in range(begun, begun + length)]
        return graphs(rows, self._banks.most if adapted else 0)

    def _told(self, sequences: Sequence[Running], hidden_BD: Tensor) -> None:
        for row, sequence in enumerate(sequences):
            if sequence.listener is not None:
                sequence.listener.on_hidden_states(hidden_BD[row : row + 1], _slot(sequence).length)
            _slot(sequence).length += 1

    def _updates(self, keys: Sequence[str | None]) -> list[Update]:
        """What the adapters add. keys: of each row of a forward."""
        if len(set(keys)) == 1:
            return [] if keys[0] is None else [self._banks.whole(keys[0], len(keys))]
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            if key is not None:
                rows.setdefault(key, []).append(row)
        return self._banks.updates(rows)


class _StepAttention:
    """The decoder's `attend` for one token of each row, after all that its slot holds; a pool at a time."""

    def __init__(self, parts: Iterable[tuple[Pool, list[Slot]]], positions_B: Tensor) -> None:
        self._parts = []
        first = 0
        for pool, slots in parts:
            last = first + len(slots)
            rows = torch.arange(len(slots), device=positions_B.device)
            self._parts.append((pool, first, last, rows, positions_B[first:last]))
            first = last

    def __call__(self, layer: int, qkv_BNE: Tensor) -> Tensor:
        mixed = [
            decode_attention(qkv_BNE[first:last], pool.k[layer], pool.v[layer], rows, positions)
            for pool, first, last, rows, positions in self._parts
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _slot(sequence: Running) -> Slot:
    assert sequence.slot is not None, "the sequence was not opened"
    return sequence.slot


def _is_whole(sequence: Running, length: int) -> bool:
    """Nothing of the sequence is computed yet, and all of it will be now."""
    return length == len(sequence.tokens)


def prefill_groups(sequences: Sequence[Running], lengths: Sequence[int], mixed: bool) -> list[tuple[list[int], bool]]:
    """Places of sequences to compute together, and whether they are alike: all whole, and of one adapter, so that what
    they begin with is computed once. The others are grouped by adapter; where adapters can be `mixed`, all that are
    alone or begun."""
    groups: dict[tuple[str | None, bool], list[int]] = {}
    for place, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        groups.setdefault((sequence.adapter, _is_whole(sequence, length)), []).append(place)
    if not mixed:
        return [(places, whole) for (_, whole), places in groups.items()]
    alike = [(places, True) for (_, whole), places in groups.items() if whole and len(places) > 1]
    others = sorted(place for (_, whole), places in groups.items() if not whole or len(places) == 1 for place in places)
    return [*alike, (others, False)] if others else alike
