"""The interface through which a run lets other processes compute its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fortwo.nn.lora import Lora
    from fortwo.records import TrainEvents
    from fortwo.train.losses import Accumulated, Row
    from fortwo.train.retry_policy import RowMix


class GradientWorkers(Protocol):
    """Processes that have the base of a run and its plan."""

    def accumulate(self, prefix: int, lora: Lora, rows: list[Row], mix: RowMix) -> TrainEvents[Accumulated]:
        """Add the gradient of a step with these rows to the adapter's, as `PreparedObjective.accumulate` does. prefix:
        the number of tokens that all rows begin with. Yields Waiting until the gradient is there, and a Phase for what
        users should know. Raises FortwoError when the workers cannot compute it."""
