"""The parts, each callable alone: python -m bench.soak [PART ...]. The exit status is 1 if one finds a fault.

fuzz:  files and bodies that hypothesis makes of valid ones end as a success or an error of ours.
api:   schemathesis calls every path of the OpenAPI document.
kills: a server that trains, imports, exports, uploads and deletes is killed at random and at chosen moments.
crowd: many clients, some of which hang up or send bad bodies, while a job trains.
home:  the files of a home are damaged in turn.
disk:  the database is locked, the home cannot be written, the disk is full, the clock goes backwards.
ready: the time from the start to the first answer with many jobs and versions.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.soak import api, crowd, fuzz, home, hostile_disk, kills, kinds, ready
from bench.soak.fuzz import Kind

PARTS = ("fuzz", "api", "kills", "crowd", "home", "disk", "ready")


def fuzz_all(folder: Path, examples: int, seed: int, only: str) -> int:
    """The number of faults."""
    faults = fuzz_each(kinds.kinds(kinds.Parts(folder / "parts")), examples, seed, only)
    with kinds.bodies_and_uploads(folder / "served") as found:
        return faults + fuzz_each(found, examples, seed, only)


def fuzz_each(found: Mapping[str, Kind[Any]], examples: int, seed: int, only: str) -> int:
    faults = 0
    for name, kind in found.items():
        if only not in name:
            continue
        began = time.monotonic()
        outcome = fuzz.fuzz(kind, examples, seed)
        faults += len(outcome.faults)
        ends = ", ".join(f"{count} {end}" for end, count in outcome.ends.most_common())
        print(f"{name}: {ends}; {outcome.most_bytes >> 20} MiB; {time.monotonic() - began:.0f} s", flush=True)
        for fault in outcome.faults.values():
            print(f"FAULT {fault.what}, {fault.times} times\n{fault.told}\n{fault.example!r:.2000}", flush=True)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=100, help="fuzz: of each kind")
    parser.add_argument("--only", default="", help="fuzz: kinds, home: files, whose names contain this")
    parser.add_argument("--seconds", type=int, default=120, help="api: the time for schemathesis")
    parser.add_argument("--kills", type=int, default=12, help="kills: at random moments")
    parser.add_argument("--requests", type=int, default=2000, help="crowd: of all clients together")
    parser.add_argument("--count", type=int, default=1000, help="ready: of jobs and of versions")
    given = parser.parse_args()
    faults = 0
    for part in given.parts or PARTS:
        print(f"== {part}", flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            match part:
                case "fuzz":
                    faults += fuzz_all(folder, given.examples, given.seed, given.only)
                case "api":
                    faults += api.call_everything(folder, given.seconds, given.seed)
                case "kills":
                    faults += kills.kill_often(folder, given.kills, given.seed)
                case "crowd":
                    faults += crowd.ask(folder, given.requests, given.seed)
                case "home":
                    faults += home.damage_each(folder, given.only)
                case "disk":
                    faults += hostile_disk.try_each(folder)
                case "ready":
                    for what, (seconds, processor) in ready.start_times(folder, given.count).items():
                        print(f"{what}: {seconds:.2f} s, {processor:.2f} s of the processor")
    return min(faults, 1)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the device's thread of the fuzzed parts would run on
