"""The Ray cluster that a server uses, if its settings name one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fortwo import hardware
from fortwo.errors import InvalidRequest
from fortwo.kernels import isa
from fortwo.settings import Settings

if TYPE_CHECKING:
    from fortwo.jobs.workers import TrainingCluster


@contextmanager
def needing_ray(message: str, param: str, instead: str = "") -> Iterator[None]:
    """Inside, modules that need Ray are imported. Raises InvalidRequest if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        hint = f"Install it: pip install 'fortwo[ray]'{'.' if instead else ''}{instead}"
        raise InvalidRequest(message, param=param, hint=hint) from None


@contextmanager
def training_cluster(settings: Settings) -> Iterator[TrainingCluster | None]:
    """What computes the gradients of jobs; None where FORTWO_TRAIN is own, and then nothing of Ray is imported. Raises
    InvalidRequest if Ray is not installed or several jobs are to run without it, and Unavailable if the cluster cannot
    be reached."""
    if settings.train == "own":
        if settings.shard:
            raise InvalidRequest(
                "FORTWO_SHARD is set, but this server computes the gradients itself, on the whole base.",
                param="shard",
                hint="Set FORTWO_TRAIN=ray, or remove FORTWO_SHARD.",
            )
        if settings.jobs > 1:
            raise InvalidRequest(
                f"FORTWO_JOBS = {settings.jobs}, but this server computes the gradients itself, one job after another.",
                param="jobs",
                hint="Set FORTWO_TRAIN=ray, or remove FORTWO_JOBS.",
            )
        yield None
        return
    hardware.limit_spinning()  # both before torch is imported
    isa.cap(settings.isa)
    with needing_ray(
        "FORTWO_TRAIN is ray, but the package ray is not installed.", "train", " Or set FORTWO_TRAIN=own."
    ):
        from fortwo.scale.ray_train import RayTraining
    cluster = RayTraining(settings)
    try:
        yield cluster
    finally:
        cluster.close()
