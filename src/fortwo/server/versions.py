"""What is done with the versions of an adapter: promote, tag, protect, restore, prune and compare."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from fortwo.adapters.comparison import compare
from fortwo.records import Json
from fortwo.server.native import version_body
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppStateDep

router = APIRouter(prefix="/api/adapters", tags=["adapters"], route_class=JsonRoute)


@router.post("/{name}/promote", summary="Make a version, as name@version, the current one")
def promote(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.adapters.promote(name))


@router.put("/{name}/tags/{tag}", summary="Let name@tag mean a version, as name@version")
def tag(state: AppStateDep, name: str, tag: str) -> Json:
    """A tag that means another version of the adapter means this one from now on."""
    return version_body(state, state.adapters.tag(name, tag))


@router.delete("/{name}/tags/{tag}", summary="Forget a tag of an adapter")
def untag(state: AppStateDep, name: str, tag: str) -> Json:
    state.adapters.untag(name, tag)
    return {"name": name, "tag": tag, "deleted": True}


@router.put("/{name}/protection", summary="Protect a version, as name@version, from deletion")
def protect(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.adapters.protect(name, True))


@router.delete("/{name}/protection", summary="Allow that a version, as name@version, is deleted")
def unprotect(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.adapters.protect(name, False))


@router.post("/{name}/restore", summary="Bring back a deleted version, as name@version, or all of an adapter")
def restore(state: AppStateDep, name: str) -> Json:
    return {"restored": [version_body(state, version) for version in state.adapters.restore(name)]}


@router.get("/{name}/compare", summary="Two versions beside each other: metrics, settings, probes and weights")
async def compare_versions(
    request: Request,
    state: AppStateDep,
    name: str,
    other: Annotated[str, Query(min_length=1, description="The other version, as name@version.")],
) -> Json:
    """`probes` lists those that one version passed and the other did not. `weights` compares what is added to the
    base's weights, by Frobenius norms; it is null for versions of two bases, and for DoRA."""
    return await state.control.run(request, lambda _: compare(state.adapters, name, other))


class PruneRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: int = Field(3, ge=0, le=1000, description="How many newest versions of each adapter stay.")
    dry_run: bool = Field(True, description="Only list what would be removed.")


@router.post(
    "/prune", summary="Remove versions that nothing needs, and deleted ones whose days to be restored are over"
)
async def prune(request: Request, state: AppStateDep, body: PruneRequest) -> Json:
    """What is current, tagged, protected or a parent of others stays, and what a rollback would make current."""

    def run() -> list[Json]:
        needed = state.jobs.wanted_parents()
        return state.registry.prune_adapters(body.keep, apply=not body.dry_run, needed=needed)

    removed = await state.control.run(request, lambda _: run())
    return {"dry_run": body.dry_run, "versions": removed}
