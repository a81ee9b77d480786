"""The prefix cache: keys and values of token prefixes, in blocks that sequences with the same beginning share.

A block is identified by a digest over its weights' root, its tokens and all tokens before it, so equal digests mean
equal keys and values (automatic prefix caching, as in vLLM). This module knows no rows, no memory limit, no adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import blake2b
from itertools import takewhile

from torch import Tensor

BLOCK = 16  # tokens


class Prefixes:
    """Blocks (2, layers, kv_heads, BLOCK, head_size) of keys and values, ordered from the least recently used."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, tuple[int, Tensor]] = OrderedDict()

    @property
    def tokens(self) -> int:
        return len(self._blocks) * BLOCK

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def keys(self, root: int, tokens: Sequence[int]) -> list[bytes]:
        """The digest of each whole block of `tokens`; it covers all blocks before it too."""
        keys, key = [], str(root).encode()
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            block = " ".join(map(str, tokens[start : start + BLOCK]))
            key = blake2b(key + b":" + block.encode(), digest_size=16).digest()
            keys.append(key)
        return keys

    def match(self, root: int, tokens: Sequence[int]) -> list[bytes]:
        """The keys of the longest cached prefix of `tokens`."""
        return list(takewhile(self._blocks.__contains__, self.keys(root, tokens)))

    def length(self, root: int, tokens: Sequence[int]) -> int:
        """The length in tokens of the longest cached prefix."""
        return len(self.match(root, tokens)) * BLOCK

    def blocks(self, keys: Sequence[bytes]) -> list[Tensor]:
        """The blocks of keys that `match` returned; they count as used now."""
        self.touch(keys)
        return [self._blocks[key][1] for key in keys]

    def add(self, root: int, key: bytes, block: Tensor) -> None:
        self._blocks[key] = (root, block)

    def evict(self, spared: Collection[bytes] = ()) -> bool:
        """Drop the least recently used block; False if there is none, or if it is one of the spared."""
        if not self._blocks or (key := next(iter(self._blocks))) in spared:
            return False
        del self._blocks[key]
        return True

    def forget(self, root: int) -> None:
        """Drop every block of the weights with this root."""
        for key in [key for key, (owner, _) in self._blocks.items() if owner == root]:
            del self._blocks[key]

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark the cached ones as used now, in an order that evicts the end of a prefix before its beginning."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)
