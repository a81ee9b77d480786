"""Exports one version of an adapter: checks, writes into a draft, examines what was written, and publishes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fortwo import disk
from fortwo.adapters.store import AdapterStore
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.errors import FortwoError, InvalidRequest
from fortwo.export import examinees, gguf, mlx, ollama, peft
from fortwo.export.merged import Progress, write_merged
from fortwo.export.output import MARK, check_free, draft
from fortwo.export.source import Source, open_source
from fortwo.facts.exam import Exam, Result, exam_of, examine
from fortwo.hub.catalog import Catalog
from fortwo.records import Json

FORMS = ("peft", "merged", "gguf-lora", "gguf", "ollama", "mlx", "vllm")
DEFAULT_QUANTIZATION = "F16"
_QUANTIZED = ("gguf", "ollama")
_WITHOUT_DORA = {"gguf-lora": "llama.cpp", "vllm": "vLLM", "mlx": "fortwo's form for MLX"}  # who has no DoRA


@dataclass(frozen=True)
class ExportPlan:
    """adapter: the version, as name@version. bytes: the size on disk, at most. exam: why the exam cannot be run in the
    exported form, as a sentence; None if it can."""

    adapter: str
    to: str
    quantization: str | None
    bytes: int
    exam: str | None


@dataclass(frozen=True)
class Exported:
    """output: the folder. notes: what the user should know, one sentence each. exam, result: how the exported form did
    in the adapter's exam; None where it was not run, and a note says why."""

    output: Path
    notes: tuple[str, ...]
    exam: Exam | None
    result: Result | None

    def body(self) -> Json:
        """As JSON. exam: by metric, the report's value and that of the exported form."""
        exam = None
        if self.exam is not None and self.result is not None:
            exam = {
                name: {"reported": _json(self.exam.reported.get(name)), "exported": _json(found)}
                for name, found in self.result.metrics.items()
            }
        return {"output": str(self.output), "notes": list(self.notes), "exam": exam}


def _json(metric: Any) -> Json | None:
    return None if metric is None else asdict(metric)


def check_form(to: str, quantization: str | None) -> str | None:
    """The quantisation in llama.cpp's spelling; None for forms that have none. Raises InvalidRequest for a form or a
    quantisation that there is not, or that do not go together."""
    if to not in FORMS:
        raise InvalidRequest(
            f"to = {to!r} is not a form that fortwo exports.", param="to", hint=f"Choose one of {', '.join(FORMS)}."
        )
    if to not in _QUANTIZED:
        if quantization is not None:
            raise InvalidRequest(
                f"quantization = {quantization!r} is given, but {to} is not quantised.",
                param="quantization",
                hint=f"Leave it out, or export to {' or '.join(_QUANTIZED)}.",
            )
        return None
    return gguf.check_quantization(DEFAULT_QUANTIZATION if quantization is None else quantization)


def plan_export(ref: str, to: str, quantization: str | None, catalog: Catalog, store: AdapterStore) -> ExportPlan:
    """What `export` would write for the version that `ref` means. Raises what `export` raises before it writes."""
    chosen = check_form(to, quantization)
    source = open_source(ref, catalog, store)
    _check_dora(source, to)
    version = source.version
    why = examinees.missing(to)
    if why is None:
        _, why = _exam(source)
    return ExportPlan(version.id, to, chosen, _need(source, to, chosen), why)


def export(
    ref: str,
    to: str,
    output: Path,
    catalog: Catalog,
    store: AdapterStore,
    progress: Progress,
    *,
    quantization: str | None = None,
    overwrite: bool = False,
    with_exam: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Exported:
    """Write the version that `ref` means into the folder `output`, which appears complete or not at all.

    progress(label, done, total) is called now and then; check may raise to give up. with_exam: run the adapter's exam
    in the exported form. Raises InvalidRequest, InvalidAdapter or UnsupportedModel for what cannot be exported,
    Conflict for an output that exists, StorageFailed for a disk that is full.
    """

    def report(label: str, done: int, total: int) -> None:
        check()
        progress(label, done, total)

    chosen = check_form(to, quantization)
    source = open_source(ref, catalog, store)
    _check_dora(source, to)
    check_free(output, overwrite)
    with draft(output, _need(source, to, chosen), overwrite) as folder:
        notes = _write(source, to, folder, chosen, report)
        mark = {"adapter": source.version.id, "digest": source.version.digest, "base_digest": source.base.digest}
        (folder / MARK).write_bytes(disk.dump({**mark, "to": to, "quantization": chosen}))
        exam, result, why = _examined(source, to, folder, report) if with_exam else (None, None, None)
    return Exported(output, (*notes, *([why] if why else [])), exam, result)


def _check_dora(source: Source, to: str) -> None:
    """Raises InvalidRequest for a DoRA adapter in a form that has A and B alone."""
    if source.lora.use_dora and to in _WITHOUT_DORA:
        raise InvalidRequest(
            f"{source.version.id} was trained with DoRA (use_dora), which {_WITHOUT_DORA[to]} does not know.",
            param="to",
            hint="Export it as merged, gguf or ollama, where the update is in the weights, or as peft.",
        )


def _need(source: Source, to: str, quantization: str | None) -> int:
    """Bytes on disk, at most."""
    adapter = 4 * sum(tensor.numel() for tensor in source.tensors.values())
    if to == "merged":
        return source.base.bytes + (32 << 20)
    if to in _QUANTIZED:
        return int(source.base.parameters * gguf.BITS.get(quantization or "", 6.6) / 8) + (32 << 20)
    return adapter + (1 << 20)


def _write(source: Source, to: str, folder: Path, quantization: str | None, progress: Progress) -> list[str]:
    match to:
        case "peft":
            return peft.write_peft(source, folder)
        case "vllm":
            return peft.write_vllm(source, folder)
        case "mlx":
            return mlx.write_mlx(source, folder)
        case "merged":
            return write_merged(source, folder, progress)
        case "gguf-lora":
            return gguf.write_lora(source, folder)
        case _:
            assert quantization is not None
            if to == "gguf":
                return gguf.write_model(source, folder, quantization, progress)
            renderer = ChatTemplateRenderer(source.base.directory)
            frames = ollama.frames_of(renderer)  # before gigabytes are written
            gguf.write_model(source, folder, quantization, progress)
            return ollama.write_modelfile(source.version.id, frames, renderer, folder)


def _exam(source: Source) -> tuple[Exam | None, str | None]:
    """The version's exam, or None and why there is none."""
    try:
        return exam_of(source.version.id, source.version.manifest), None
    except InvalidRequest as error:
        return None, f"The exam is not run: {error.message}"


def _examined(
    source: Source, to: str, folder: Path, progress: Progress
) -> tuple[Exam | None, Result | None, str | None]:
    """The exam, how the exported form did, and why it was not run, if it was not."""
    exam, why = _exam(source)
    if exam is None:
        return None, None, why
    try:
        with examinees.opened(source, to, folder) as examinee:
            return exam, examine(exam, examinee, lambda done, total: progress("exam", done, total)), None
    except examinees.NotHere as reason:
        return None, None, str(reason)
    except (FortwoError, RuntimeError, OSError) as error:  # what was written is whole
        return None, None, f"The exam could not be run: {error}"
