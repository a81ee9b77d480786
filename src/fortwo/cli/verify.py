"""`fortwo verify`: runs an adapter's exam again against a server, for people and for CI."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from fortwo.cli import views
from fortwo.cli.terminal import error_screen, progress_bars, screen
from fortwo.errors import FortwoError, InvalidRequest
from fortwo.facts.exam import Exam, Result

if TYPE_CHECKING:
    from fortwo.export.openai_examinee import Encode

HOLDS, DOES_NOT_HOLD, NOT_RUN = 0, 1, 2


def verify(name: str, url: str | None, model: str | None, key_env: str | None, as_json: bool) -> int:
    """The exit status. url: None for this machine's own server; model: its name there."""
    try:
        ref, exam, found = _run(name, url, model, key_env)
    except FortwoError as error:
        if as_json:
            screen.print_json(data={"adapter": name, "holds": None, **error.body()})
        else:
            error_screen.print(views.error(error.message, error.hint))
        return NOT_RUN
    missed = found.misses(exam)
    if as_json:
        screen.print_json(data=_body(ref, exam, found, missed))
    else:
        screen.print(views.exam(exam, found, "now"))
        screen.print(f"{ref} does not hold: {', '.join(missed)}." if missed else f"{ref} holds.")
    return DOES_NOT_HOLD if missed else HOLDS


def _body(ref: str, exam: Exam, found: Result, missed: list[str]) -> dict[str, object]:
    metrics = {
        name: {"reported": asdict(exam.reported[name]) if name in exam.reported else None, "now": asdict(metric)}
        for name, metric in found.metrics.items()
    }
    return {
        "adapter": ref,
        "holds": not missed,
        "missed": missed,
        "targets": exam.targets,
        "metrics": metrics,
        "retention_is_exact": found.exact,
    }


def _run(name: str, url: str | None, model: str | None, key_env: str | None) -> tuple[str, Exam, Result]:
    """The version's id, its exam, and how it did. Raises FortwoError where the exam could not be run."""
    from fortwo.adapters.store import AdapterStore
    from fortwo.export.openai_examinee import OpenAIExaminee
    from fortwo.facts.exam import exam_of, examine
    from fortwo.settings import load

    settings = load()
    key = settings.plain_api_key if url is None else None
    if key_env is not None:
        key = os.environ.get(key_env)
        if not key:
            raise InvalidRequest(
                f"--key-env names {key_env}, which is not set.", param="key_env", hint=f"Set it: export {key_env}=..."
            )
    version = AdapterStore(settings.adapters_dir).get(name)
    exam = exam_of(version.id, version.manifest)
    there = settings.url if url is None else url
    chosen = version.id if model is None else model
    examinee = OpenAIExaminee(there, chosen, key, _encoder(version.base_model))
    with closing(examinee), progress_bars(error_screen) as progress:
        found = examine(exam, examinee, lambda done, total: progress("exam", done, total))
    if not found.judges:
        raise InvalidRequest(
            f"The exam of {version.id} asks for retention alone, and {there} does not return what measures it.",
            param="url",
            hint="Verify it on a server that returns log-probabilities of a prompt, as fortwo does.",
        )
    return version.id, exam, found


def _encoder(base: str) -> Encode | None:
    """Turns a conversation into tokens of the base, if the base is on this machine."""
    from fortwo.data.chat_template import ChatTemplateRenderer
    from fortwo.hub.catalog import Catalog
    from fortwo.settings import load

    try:
        info = Catalog(load().models_dir).model_info(base)
        renderer = None if info is None else ChatTemplateRenderer(info.directory)
    except FortwoError:
        renderer = None
    return None if renderer is None else renderer.encode_prompt
