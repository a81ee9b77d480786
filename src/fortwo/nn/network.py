"""A frozen network that backends compute: fortwo's own decoder, or a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from fortwo.nn.config import Shape
from fortwo.nn.decoder import Angles, Attend, Operations
from fortwo.nn.head import Head
from fortwo.nn.lora import Seeds, Update
from fortwo.nn.rows import Rows
from fortwo.quantization.formats import Frozen


class Network(Protocol):
    """`Decoder` says what each of these does; `GenericDecoder` is the other one."""

    @property
    def config(self) -> Shape: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def bytes(self) -> int: ...
    @property
    def head_VD(self) -> Head: ...
    def with_operations(self, operations: Operations) -> Self: ...
    def with_rows(self, rows: Rows) -> Self:
        """The same network for a pass over these rows; what it carries from token to token besides keys and values
        starts and ends as they say."""

    def beginning(self, layers: int) -> Self: ...
    def frozen(self, layer: int, group: str) -> Frozen: ...
    def in_fp32(self) -> Self: ...
    def in_bf16(self) -> Self: ...
    def bytes_to_train(self, bf16: bool) -> int: ...
    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, segments: Sequence[Update] = ()
    ) -> Tensor: ...
    def embed(self, tokens_T: Tensor) -> Tensor: ...
    def angles(self, positions_T: Tensor) -> Sequence[Angles | None]: ...
    def norm(self, x_TD: Tensor) -> Tensor: ...
    def through_layers(
        self,
        x_TD: Tensor,
        angles: Sequence[Angles | None],
        attend: Attend,
        segments: Sequence[Update] = (),
        seeds: Seeds = ...,
        checkpointing: bool = False,
    ) -> Tensor: ...
    def logits(self, hidden_TD: Tensor) -> Tensor: ...
