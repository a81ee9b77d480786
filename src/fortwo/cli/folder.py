"""`fortwo watch`: teaches the files of facts in a folder, each into an adapter of its own, whenever one has changed.

What is new is taught onto the current version. The server makes a version current only if it met its targets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fortwo.cli import live, views
from fortwo.cli.client import AT_REST, Client, Refused
from fortwo.cli.requests import adapter_name, training_request
from fortwo.cli.terminal import error_screen, print_json_line, screen
from fortwo.errors import FortwoError, InvalidDataset, InvalidRequest, NotFound, Unavailable
from fortwo.facts.hard_negatives import same_subject
from fortwo.records import Fact, Json

SUFFIXES = (".json", ".jsonl")
INTERVAL = 1.0  # seconds between two looks at the folder
INTERRUPTED = "interrupted"  # code of the error of a job whose server stopped

Stamp = tuple[int, int]  # a file's time of change and size


@dataclass(frozen=True)
class Lesson:
    """What an adapter needs to know what its file says. onto: the facts are added to what it knows; else everything is
    taught anew, because a fact that was removed from the file cannot be taken out of an adapter."""

    facts: tuple[Fact, ...]
    onto: bool


def lesson(wanted: Sequence[Fact], known: Sequence[Fact]) -> Lesson | None:
    """The lesson that leads from the facts that an adapter knows to those that are wanted; None if it knows them all
    and no other."""
    new = tuple(fact for fact in wanted if fact not in known)
    kept = [fact for fact in known if fact in wanted]
    replaced = [fact for fact in known if fact not in kept and any(same_subject(fact, one) for one in new)]
    if len(kept) + len(replaced) < len(known) or not known:
        return Lesson(tuple(wanted), onto=False)
    return Lesson(new, onto=True) if new else None


class Folder:
    """A folder whose files of facts are taught. options: fields of each training request."""

    def __init__(self, client: Client, folder: Path, config: Path | None, as_json: bool, **options: str | None) -> None:
        """Raises InvalidRequest if `folder` is none."""
        if not folder.is_dir():
            raise InvalidRequest(f"{folder} is not a folder.", param="folder", hint="Name a folder of files of facts.")
        self._client = client
        self._folder = folder
        self._config = config
        self._as_json = as_json
        self._options = options
        self._seen: dict[Path, Stamp] = {}
        self._answered = False  # whether a server has answered, so that one that does not is only away
        self._away = False

    def teach_once(self) -> bool:
        """Teach what the files say now; whether every adapter knows it in the end."""
        known = [self._teach(file) for file in self._files()]
        return all(known)

    def watch(self) -> None:
        """Teach each file that is new or has changed, once two looks found the same content, and again when a server
        that was away is back. Never returns. Raises NotFound when the folder is gone, and Unavailable when no server
        has ever answered."""
        changing: dict[Path, Stamp] = {}
        while True:
            for file in self._files():
                if (stamp := _stamp(file)) is None or self._seen.get(file) == stamp:
                    continue
                if changing.get(file) == stamp and self._try(file):
                    self._seen[file] = stamp
                changing[file] = stamp
            time.sleep(INTERVAL)

    def _try(self, file: Path) -> bool:
        """Teach what is new in a file; whether the server was there until the end."""
        try:
            self._teach(file)
        except Unavailable as error:
            if not self._answered:
                raise
            if not self._away:
                self._tell(file, f"{error.message} The file is taught when the server is back.")
            self._away = True
            return False
        self._answered, self._away = True, False
        return True

    def _files(self) -> list[Path]:
        """The files of facts, by name. Raises NotFound if the folder is gone or cannot be read."""
        try:
            found = sorted(self._folder.iterdir())
        except OSError as error:
            raise NotFound(
                f"{self._folder} cannot be read any more: {error.strerror}.",
                param="folder",
                hint="Put it back, and start fortwo watch again.",
            ) from None
        return [file for file in found if file.suffix.lower() in SUFFIXES and file.is_file()]

    def _teach(self, file: Path) -> bool:
        """Teach what is new in a file; whether its adapter knows it now. What is wrong is told, and ends nothing.
        Raises Unavailable when no server answers, or when it shuts down."""
        try:
            return self._teach_facts(file, self._name(file), _facts(file))
        except Unavailable:
            raise
        except FortwoError as error:
            if isinstance(error, Refused) and error.code == Unavailable.code:
                raise Unavailable(error.message, hint=error.hint) from None
            if self._as_json:
                print_json_line({"file": str(file), **error.body()})
            else:
                error_screen.print(f"{file}:", views.error(error.message, error.hint))
            return False

    def _teach_facts(self, file: Path, name: str, wanted: tuple[Fact, ...]) -> bool:
        if (job_id := self._under_way(name)) is not None:
            self._tell(file, f"A job for {name} is under way. It is watched first.")
            live.watch(self._client, job_id, self._as_json)
        current = self._current(name)
        known = () if current is None else _known(current)
        if (new := lesson(wanted, known)) is None:
            self._tell(file, f"{name} knows what it says.", current=current and current["id"], taught=[])
            return True
        subjects = [fact.subject for fact in new.facts]
        parent = current["id"] if current is not None and new.onto else None
        whereto = name if parent is None else parent
        self._tell(
            file, f"{', '.join(subjects)} will be taught {'onto' if parent else 'as'} {whereto}.", taught=subjects
        )
        rows = {"dataset": {"facts": [asdict(fact) for fact in new.facts]}}
        started = self._client.post(
            "/api/training/start", training_request(rows, name, self._config, parent=parent, **self._options)
        )
        if not self._as_json:
            screen.print(views.plan_summary(started["plan"]))
        job = live.watch(self._client, started["job_id"], self._as_json)
        if job["status"] == "succeeded":
            return True
        if job["status"] == "failed" and job["error"]["code"] == INTERRUPTED:
            raise Unavailable(job["error"]["message"], hint=job["error"]["hint"])
        stays = "No version is current." if current is None else f"{current['id']} stays current."
        self._tell(file, f"This was not proven. {stays}", current=current and current["id"], taught=[])
        return False

    def _name(self, file: Path) -> str:
        """The name of a file's adapter. Raises InvalidRequest if another file before it has the same one."""
        name = adapter_name(file.stem)
        first = next((other for other in self._files() if _named(other, name)), file)
        if first != file:
            raise InvalidRequest(
                f"{first} and {file} would both be taught to the adapter {name}.",
                param="folder",
                hint="Rename one of the files, or put the facts of both into one.",
            )
        return name

    def _under_way(self, name: str) -> str | None:
        """The job that teaches the adapter already, for example since the server was started again."""
        jobs = self._client.get("/api/training/jobs")["jobs"]
        active = (job for job in jobs if job["adapter_name"] == name and job["status"] not in AT_REST)
        return next((job["job_id"] for job in active), None)

    def _current(self, name: str) -> Json | None:
        """The manifest of the adapter's current version, with its id; None if there is none."""
        try:
            found = self._client.get(f"/api/adapters/{name}")
        except Refused as error:
            if error.code == "not_found":
                return None
            raise
        return None if found["current"] is None else {**found["manifest"], "id": f"{name}@{found['current']}"}

    def _tell(self, file: Path, text: str, **more: object) -> None:
        if self._as_json:
            print_json_line({"file": str(file), "message": text, **more})
        else:
            screen.print(f"{file}: {text}")


def _named(file: Path, name: str) -> bool:
    try:
        return adapter_name(file.stem) == name
    except InvalidRequest:
        return False


def _facts(file: Path) -> tuple[Fact, ...]:
    """The facts of a file. Raises InvalidDataset with all that is wrong with it."""
    from fortwo.data.datasets import load_file

    found = load_file(file).facts
    if not found:
        raise InvalidDataset(
            f"{file} has examples and no facts.",
            param="dataset",
            hint=f"Teach it with: fortwo teach {file} --name NAME. Only facts can be taught onto what is known.",
        )
    return found


def _known(manifest: Json) -> tuple[Fact, ...]:
    from fortwo.data.datasets import FACTS

    return FACTS.validate_python(manifest.get("facts", ()))


def _stamp(file: Path) -> Stamp | None:
    """None if the file is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
