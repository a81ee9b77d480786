"""What computes the replies of a server: fortwo's own engine, vLLM, or replicas. Only what is chosen is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fortwo.cli.cluster import needing_ray
from fortwo.errors import InvalidRequest

if TYPE_CHECKING:
    from fortwo.jobs.workers import TrainingCluster
    from fortwo.server.state import AppState, MakeEngine
    from fortwo.settings import Settings


def check_together(settings: Settings) -> None:
    """Raises InvalidRequest for settings that do not go together. To be called before anything is started."""
    if settings.replicas is not None and settings.engine != "own":
        raise InvalidRequest(
            f"A server with replicas = {settings.replicas} cannot have engine = {settings.engine!r}",
            param="engine",
            hint="Remove FORTWO_ENGINE, or FORTWO_REPLICAS and --replicas.",
        )
    elsewhere = {"replicas": settings.replicas is not None, "engine": settings.engine != "own"}
    for name in (name for name, chosen in elsewhere.items() if chosen and "," in settings.device):
        raise InvalidRequest(
            f"A server with {name} = {getattr(settings, name)!r} cannot have device = {settings.device!r}: other "
            "processes than the server compute its replies.",
            param="device",
            hint="Name one device in FORTWO_DEVICE.",
        )
    others = {**elsewhere, "train": settings.train != "own"}
    for name in (name for name, chosen in others.items() if chosen and settings.train_device is not None):
        raise InvalidRequest(
            f"A server with {name} = {getattr(settings, name)!r} cannot have train_device = {settings.train_device!r}: "
            "other processes than the server compute its replies or its gradients.",
            param="train_device",
            hint="Remove FORTWO_TRAIN_DEVICE.",
        )


def create_state(settings: Settings, cluster: TrainingCluster | None) -> AppState:
    """The state of a server with these settings. Raises InvalidRequest if they need a package that is not installed,
    and what AppState raises."""
    if settings.replicas is None:
        from fortwo.server.state import AppState

        return AppState(settings, _make_engine(settings), cluster)
    missing = f"replicas = {settings.replicas} needs the package ray with Serve, which is not installed."
    with needing_ray(missing, "replicas"):
        from fortwo.scale.replicated import create
    return create(settings, cluster)


def _make_engine(settings: Settings) -> MakeEngine | None:
    if settings.engine == "own":
        return None
    from fortwo.scale.vllm.start import vllm_engine

    return vllm_engine
