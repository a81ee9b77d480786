"""`fortwo doctor --repair`: shows what is wrong in the home and what would be done, and does it with --apply."""

from __future__ import annotations

from fortwo.adapters import repair as adapters
from fortwo.adapters.store import AdapterStore
from fortwo.cli.terminal import screen
from fortwo.errors import FortwoError
from fortwo.home import lock_home
from fortwo.jobs import repair as jobs
from fortwo.records import Repair
from fortwo.settings import Settings


def repair(settings: Settings, apply: bool) -> bool:
    """Print the findings, and carry out what can be repaired if `apply`. Whether nothing is left to do. Raises Conflict
    when a server uses the home while repairs are to be carried out."""
    if not apply:
        return _show(find(settings), apply=False)
    with lock_home(settings.home):
        return _show(find(settings), apply=True)


def find(settings: Settings) -> list[Repair]:
    store = AdapterStore(settings.adapters_dir)
    of_adapters = adapters.repairs(settings.adapters_dir)
    return [*of_adapters, *jobs.repairs(settings.jobs_dir, store, settings.database)]


def _show(found: list[Repair], apply: bool) -> bool:
    done = True
    for one in found:
        screen.print(f"{one.problem}.")
        outcome = one.action if one.carry_out is None else f"Would be done: {one.action}"
        if apply and one.carry_out is not None:
            try:
                one.carry_out()
                outcome = f"Done: {one.action}"
            except (OSError, FortwoError) as error:
                outcome, done = f"Failed: {error}", False
        elif one.carry_out is not None:
            done = False
        screen.print(f"  {outcome}", style="dim")
    if not found:
        screen.print("Nothing is wrong in the home.")
    elif not apply and not done:
        screen.print("Nothing was changed. Stop the server, then: fortwo doctor --repair --apply")
    return done
