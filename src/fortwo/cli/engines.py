"""What computes the replies of a server: fortwo's own engine, vLLM, or replicas. Only what is chosen is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fortwo.errors import InvalidRequest

if TYPE_CHECKING:
    from fortwo.jobs.workers import TrainingCluster
    from fortwo.server.state import AppState, MakeEngine
    from fortwo.settings import Settings


def create_state(settings: Settings, cluster: TrainingCluster | None) -> AppState:
    """The state of a server with these settings. Raises InvalidRequest for settings that do not go together or need a
    package that is not installed, and what AppState raises."""
    if settings.replicas is None:
        from fortwo.server.state import AppState

        return AppState(settings, _make_engine(settings), cluster)
    for name, value, alone in (("engine", settings.engine, "own"), ("train", settings.train, "own")):
        if value != alone:
            raise InvalidRequest(
                f"A server with replicas = {settings.replicas} cannot have {name} = {value!r}",
                param=name,
                hint=f"Remove FORTWO_{name.upper()}, or FORTWO_REPLICAS and --replicas.",
            )
    try:
        from fortwo.scale.replicated import create
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise InvalidRequest(
            f"replicas = {settings.replicas} needs the package ray with Serve, which is not installed.",
            param="replicas",
            hint="Install it: pip install 'fortwo[ray]'",
        ) from None
    return create(settings)


def _make_engine(settings: Settings) -> MakeEngine | None:
    if settings.engine == "own":
        return None
    from fortwo.scale.vllm.start import vllm_engine

    return vllm_engine
