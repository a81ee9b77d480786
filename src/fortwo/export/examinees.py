"""Runs an exported adapter in the program that it was exported for, so that it can be examined there."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.export import gguf
from fortwo.export.openai_examinee import OpenAIExaminee
from fortwo.export.source import Source
from fortwo.facts.exam import Examinee, ExamQuestion, Kept
from fortwo.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotHere(Exception):
    """Why the exported form cannot be run on this machine, as a sentence for the user."""


_PACKAGES = {
    "peft": ("peft", "PEFT"),
    "vllm": ("peft", "PEFT"),
    "gguf": ("xllamacpp", "llama.cpp"),
    "gguf-lora": ("xllamacpp", "llama.cpp"),
    "ollama": ("xllamacpp", "llama.cpp"),
}


def missing(to: str) -> str | None:
    """Why a form cannot be examined on this machine, as a sentence for the user; None if it can."""
    if to == "mlx":
        return "The exam is not run: MLX runs on Apple's processors alone."
    package, program = _PACKAGES.get(to, (None, ""))
    if package is not None and importlib.util.find_spec(package) is None:
        return f"The exam is not run: {program} is not installed. Install it with: pip install 'fortwo[export]'"
    return None


@contextmanager
def opened(source: Source, to: str, folder: Path) -> Iterator[Examinee]:
    """What was exported, ready to answer. Raises NotHere."""
    if (why := missing(to)) is not None:
        raise NotHere(why)
    match to:
        case "peft" | "vllm":
            yield _with_peft(source, folder, source.base.directory)
        case "merged":
            yield _Transformers(_model(folder), ChatTemplateRenderer(folder))
        case "gguf-lora":
            with tempfile.TemporaryDirectory(prefix="fortwo-base-") as base:
                plain = _without_adapter(source)
                gguf.write_model(plain, Path(base), "F16", lambda label, done, total: None)
                with _llama_cpp(Path(base) / gguf.MODEL, folder / gguf.ADAPTER, source) as examinee:
                    yield examinee
        case _:
            with _llama_cpp(folder / gguf.MODEL, None, source) as examinee:
                yield examinee


def _without_adapter(source: Source) -> Source:
    return Source(source.version, source.peft, {}, source.base, source.named)


# ---------------------------------------------------------------- transformers and PEFT


def _model(folder: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command has its own
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


def _with_peft(source: Source, folder: Path, base: Path) -> Examinee:
    from peft import PeftModel

    model = _model(base)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between PEFT and transformers
        model = PeftModel.from_pretrained(model, folder).eval()
    return _Transformers(model, ChatTemplateRenderer(base))


class _Transformers:
    def __init__(self, model: Any, renderer: ChatTemplateRenderer) -> None:
        self._model = model
        self._renderer = renderer

    def reply(self, messages: Sequence[Message], tokens: int) -> str:
        import torch

        prompt = self._renderer.encode_prompt(list(messages))
        found: list[int] = []
        past, given = None, torch.tensor([prompt])
        with torch.no_grad():
            while len(found) < tokens:
                out = self._model(input_ids=given, past_key_values=past, use_cache=True)
                past, token = out.past_key_values, int(out.logits[0, -1].argmax())
                if token in self._renderer.stop_ids:
                    break
                found.append(token)
                given = torch.tensor([[token]])
        return _stopped(self._renderer.decode(found), self._renderer.stop_texts)

    def retention(self, question: ExamQuestion, tokens: int) -> Kept:
        import torch

        prompt = self._renderer.encode_prompt(list(question.messages))
        said = question.base_tokens
        if not said:
            return Kept(0, 0)
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([[*prompt, *said]])).logits[0]
        ranked = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return Kept(sum(ours == theirs for ours, theirs in zip(ranked, said, strict=True)), len(said))


def _stopped(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop."""
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=len(text))]


# ---------------------------------------------------------------- llama.cpp


@contextmanager
def _llama_cpp(model: Path, adapter: Path | None, source: Source) -> Iterator[Examinee]:
    """llama.cpp's own server, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.port, params.n_parallel, params.n_ctx = 0, 1, 4096
    params.n_gpu_layers = 0
    params.verbosity = 1  # errors alone
    server = xllamacpp.Server(params)
    try:
        renderer = ChatTemplateRenderer(source.base.directory)
        with contextlib.closing(_LlamaCpp(server.listening_address, renderer)) as examinee:
            yield examinee
    finally:
        del server


class _LlamaCpp(OpenAIExaminee):
    """Replies go through llama.cpp's own chat template and tokenizer; retention is asked in tokens."""

    def __init__(self, address: str, renderer: ChatTemplateRenderer) -> None:
        super().__init__(address, "model")
        self._renderer = renderer

    def retention(self, question: ExamQuestion, tokens: int) -> Kept:
        """Each place is asked by continuing the base's own reply; only where the next token differs a new request is
        needed."""
        prompt = self._renderer.encode_prompt(list(question.messages))
        said, kept, place = question.base_tokens, 0, 0
        while place < len(said):
            body = {
                "prompt": [*prompt, *said[:place]],
                "n_predict": len(said) - place,
                "temperature": 0,
                "top_k": 1,
                "return_tokens": True,
                "cache_prompt": True,
                "ignore_eos": False,
            }
            found = self.post("/completion", body)["tokens"]
            # A token that ends the reply is not among those that are returned.
            found = [*found, *([said[-1]] if len(found) < len(said) - place and said[-1] in self._ends else [])]
            equal = next((n for n, (a, b) in enumerate(zip(found, said[place:], strict=False)) if a != b), len(found))
            equal = min(equal, len(said) - place)
            kept += equal
            place += equal + 1
        return Kept(kept, len(said))

    @property
    def _ends(self) -> frozenset[int]:
        return self._renderer.stop_ids
