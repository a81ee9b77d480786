"""`fortwo doctor --repair`: shows what is wrong in the home and what would be done, and does it with --apply."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from fortwo.adapters import repair as adapters
from fortwo.adapters.store import AdapterStore
from fortwo.cli.terminal import respond
from fortwo.errors import FortwoError
from fortwo.home import lock_home
from fortwo.jobs import repair as jobs
from fortwo.records import Repair
from fortwo.settings import Settings


@dataclass(frozen=True)
class Finding:
    """outcome: what would be done, was done or failed. done: whether nothing is left to do."""

    problem: str
    outcome: str
    done: bool


def repair(settings: Settings, apply: bool, as_json: bool) -> bool:
    """Print the findings, and carry out what can be repaired if `apply`. Whether nothing is left to do. Raises Conflict
    when a server uses the home while repairs are to be carried out."""
    with lock_home(settings.home) if apply else nullcontext():
        found = [_carry_out(one) if apply else _announce(one) for one in find(settings)]
    done = all(one.done for one in found)
    lines: list[RenderableType] = []
    for one in found:
        lines += [f"{one.problem}.", Text(f"  {one.outcome}", style="dim")]
    if not found:
        lines.append("Nothing is wrong in the home.")
    elif not apply and not done:
        lines.append("Nothing was changed. Stop the server, then: fortwo doctor --repair --apply")
    respond({"findings": [asdict(one) for one in found], "done": done}, Group(*lines), as_json)
    return done


def find(settings: Settings) -> list[Repair]:
    store = AdapterStore(settings.adapters_dir)
    of_adapters = adapters.repairs(settings.adapters_dir)
    of_jobs = jobs.repairs(settings.jobs_dir, store, settings.database)
    return [*of_adapters, *of_jobs, *jobs.upload_repairs(settings.files_dir, settings.database)]


def _announce(one: Repair) -> Finding:
    outcome = one.action if one.carry_out is None else f"Would be done: {one.action}"
    return Finding(one.problem, outcome, one.carry_out is None)


def _carry_out(one: Repair) -> Finding:
    if one.carry_out is None:
        return _announce(one)
    try:
        one.carry_out()
    except (OSError, FortwoError) as error:
        return Finding(one.problem, f"Failed: {error}", False)
    return Finding(one.problem, f"Done: {one.action}", True)
