"""Which engine computes the replies of a server. Only the chosen one is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fortwo.server.state import MakeEngine
    from fortwo.settings import Settings


def make_engine(settings: Settings) -> MakeEngine | None:
    """What builds it, for AppState; None for fortwo's own."""
    if settings.engine == "own":
        return None
    from fortwo.scale.vllm.start import vllm_engine

    return vllm_engine
