"""The interface through which jobs use a cluster whose workers compute gradients, and what a request may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from fortwo.errors import InvalidRequest
from fortwo.train.workers import GradientWorkers

if TYPE_CHECKING:
    from torch import Tensor

    from fortwo.engine.registry import LoadedModel
    from fortwo.records import Plan


class RunWorkers(GradientWorkers, Protocol):
    """The workers of one run."""

    def close(self) -> None:
        """Let the workers end, without waiting for it."""


class TrainingCluster(Protocol):
    """Methods may be called from any thread except the device's."""

    def check(self, workers: int) -> None:
        """Raises InvalidRequest if there can never be so many workers at once."""

    def start(
        self,
        base: LoadedModel,
        weights: str,
        plan: Plan,
        workers: int,
        steps_done: int,
        parent: Mapping[str, Tensor] | None,
    ) -> RunWorkers:
        """Start the workers of a run, without waiting for them. weights: ModelRegistry.training_weights of the base;
        steps_done: those before the checkpoint from which the run resumes; parent: the tensors of the adapter that KTO
        compares with, if there is one."""

    def leave_room(self, taken: Callable[[], Mapping[str, float]]) -> None:
        """taken: the numbers of the cluster's resources, such as CPU and GPU, that workers never get."""

    def close(self) -> None:
        """Leave the cluster."""


def planned_workers(requested: int | None, cluster: TrainingCluster | None) -> int | None:
    """The number of workers of a run; None where the server computes the gradients itself. Raises InvalidRequest for a
    number that this server cannot have."""
    if cluster is None:
        if requested is not None and requested > 1:
            raise InvalidRequest(
                f"workers = {requested}: this server computes the gradients in its own process.",
                param="workers",
                hint="Start the server with FORTWO_TRAIN=ray, or leave workers out.",
            )
        return None
    workers = 1 if requested is None else requested
    cluster.check(workers)
    return workers
