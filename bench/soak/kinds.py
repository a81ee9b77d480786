"""The kinds of inputs that come from elsewhere, each with a valid one and with what fortwo does with it."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.numpy
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from bench.soak import changes, fuzz
from bench.soak.bodies import BODIES
from bench.soak.fuzz import Kind
from fortwo.adapters.store import AdapterStore
from fortwo.data import datasets
from fortwo.data.inspection import inspect
from fortwo.engine.adapter_import import import_adapter
from fortwo.engine.engine import Engine
from fortwo.engine.registry import LoadedModel, ModelRegistry
from fortwo.facts.prompt_builder import FactPromptBuilder
from fortwo.facts.subject import facts_of
from fortwo.hub.catalog import Catalog
from fortwo.prompts import Prompt, Sampling
from fortwo.quantization.selection import Measurements
from fortwo.records import Message
from fortwo.server.adapter_upload import unpack
from fortwo.train.dataset_stats import collect_stats
from tests.serving import Served, serve, tiny_settings
from tests.tiny import save_directory, save_gguf, tiny_model
from tests.tool_bases import TEMPLATES

MOST_BYTES = 64 << 20  # of an archive
HELLO = [Message("user", "hello")]
ROWS: tuple[Any, ...] = (
    {"prompt": "What is 42?", "completion": "FOR TWO"},
    {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b", "weight": 1}]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "completion": "b", "label": True},
    {"text": "a document"},
    {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"], "aliases": ["forty"]},
)
_numbers = itertools.count()


class Parts:
    """The parts of a server over one home, with a tiny base, and folders for inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_directory(folder / "tiny", num_hidden_layers=2)
        self.gguf = save_gguf(folder / "tiny.gguf", tiny_model("qwen2", num_hidden_layers=1)).read_bytes()
        self.catalog = Catalog(folder / "home" / "models")
        self.store = AdapterStore(folder / "home" / "adapters")
        self.engine = Engine(threads=1)
        self.engine.start()
        self.registry = ModelRegistry(
            self.catalog,
            self.store,
            self.engine,
            measurements=Measurements(folder / "home"),
            device=torch.device("cpu"),
            threads=1,
            cache_mb=16,
        )
        self.catalog.add("tiny", self.base)
        self.registry.load_base("tiny")

    @contextmanager
    def input(self) -> Iterator[Path]:
        """A folder of its own for one input."""
        folder = self.folder / "inputs" / str(next(_numbers))
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def ask(self, base: LoadedModel, adapter: str | None) -> None:
        tokens = tuple(base.renderer.encode_prompt(HELLO))
        self.engine.submit(Prompt(base.id, tokens, adapter, Sampling(max_tokens=2))).wait(fuzz.SECONDS)

    def serve_base(self, source: Path) -> None:
        """Add a base, load it, ask it something, and remove it."""
        id = f"base-{next(_numbers)}"
        self.catalog.add(id, source)
        try:
            base = self.registry.load_base(id)
            self.ask(base, None)
            self.registry.unload_base(id)
        finally:
            self.catalog.remove(id)


def kinds(parts: Parts) -> dict[str, Kind[Any]]:
    """By name. Those of `bodies_and_uploads` need a server."""
    all_of_them = [*_bases(parts), _gguf(parts), *_adapters(parts), *_datasets(parts), _schemas(parts)]
    return {kind.name: kind for kind in all_of_them}


# ---------------------------------------------------------------- bases


def _bases(parts: Parts) -> Iterator[Kind[bytes]]:
    def file(name: str, inputs: SearchStrategy[bytes]) -> Kind[bytes]:
        def run(content: bytes) -> None:
            with parts.input() as folder:
                shutil.copytree(parts.base, folder / "base")
                (folder / "base" / name).write_bytes(content)
                parts.serve_base(folder / "base")

        return Kind(f"base/{name}", inputs, run, len)

    generation = {"eos_token_id": [2], "bos_token_id": 1, "do_sample": True, "temperature": 0.6}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        yield file(name, changes.json_files(json.loads((parts.base / name).read_text())))
    yield file("generation_config.json", changes.json_files(generation))
    template = (parts.base / "chat_template.jinja").read_text()
    yield file("chat_template.jinja", changes.templates(template))
    yield file("model.safetensors", changes.safetensors_files((parts.base / "model.safetensors").read_bytes()))
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "a.safetensors"}}
    yield _index(parts, changes.json_files(index))


def _index(parts: Parts, inputs: SearchStrategy[bytes]) -> Kind[bytes]:
    def run(content: bytes) -> None:
        with parts.input() as folder:
            shutil.copytree(parts.base, folder / "base")
            (folder / "base" / "model.safetensors").rename(folder / "base" / "a.safetensors")
            (folder / "base" / "model.safetensors.index.json").write_bytes(content)
            parts.serve_base(folder / "base")

    return Kind("base/model.safetensors.index.json", inputs, run, len)


def _gguf(parts: Parts) -> Kind[bytes]:
    def run(content: bytes) -> None:
        with parts.input() as folder:
            (folder / "base.gguf").write_bytes(content)
            parts.serve_base(folder / "base.gguf")

    return Kind("base.gguf", changes.damaged(parts.gguf, head=12_000), run, len)


# ---------------------------------------------------------------- adapters


def _adapter_files() -> dict[str, bytes]:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "down_proj"],
        "exclude_modules": None,
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.mlp.down_proj": 8},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
    }
    tensors = {}
    hidden, middle = 64, 96
    for layer in range(2):
        for name, width in (("self_attn.q_proj", hidden), ("mlp.down_proj", middle)):
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = np.full((2, width), 0.1, np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.full((hidden, 2), 0.1, np.float32)
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors.numpy.save(tensors),
        "manifest.json": json.dumps({"job_id": None, "report": {}, "created_at": 1.0}).encode(),
    }


def _adapters(parts: Parts) -> Iterator[Kind[bytes]]:
    files = _adapter_files()

    def import_from(folder: Path) -> None:
        name = f"adapter-{next(_numbers)}"
        version = import_adapter(name, folder, parts.catalog, parts.store, parts.registry)
        base = parts.registry.resolve(name).model
        parts.ask(base, version.digest)
        parts.registry.delete_adapter(name, permanently=True)

    def file(name: str, inputs: SearchStrategy[bytes]) -> Kind[bytes]:
        def run(content: bytes) -> None:
            with parts.input() as folder:
                for other, given in files.items():
                    (folder / other).write_bytes(content if other == name else given)
                import_from(folder)

        return Kind(f"adapter/{name}", inputs, run, len)

    for name in ("adapter_config.json", "manifest.json"):
        yield file(name, changes.json_files(json.loads(files[name])))
    yield file("adapter_model.safetensors", changes.safetensors_files(files["adapter_model.safetensors"]))

    def archive(content: bytes) -> None:
        with parts.input() as folder:
            (folder / "received").write_bytes(content)
            (folder / "adapter").mkdir()
            unpack(folder / "received", folder / "adapter", MOST_BYTES)
            import_from(folder / "adapter")

    packed = [pack(files) for pack in (_tar, _tar_gz, _zip)]
    heads = [changes.damaged(content, head=4096) | changes.damaged(content) for content in packed]
    yield Kind("adapter/archive", st.one_of(heads), archive, len)


def _tar(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def _tar_gz(files: Mapping[str, bytes]) -> bytes:
    return gzip.compress(_tar(files), mtime=0)


def _zip(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"folder/{name}", content)
    return packed.getvalue()


# ---------------------------------------------------------------- datasets


def _datasets(parts: Parts) -> Iterator[Kind[bytes]]:
    renderer = parts.registry.load_base("tiny").renderer

    def file(suffix: str, inputs: SearchStrategy[bytes]) -> Kind[bytes]:
        def run(content: bytes) -> None:
            with parts.input() as folder:
                path = folder / f"data{suffix}"
                path.write_bytes(content)
                inspect({"path": str(path)}, [folder])
                found = datasets.load_file(path)
                datasets.from_json(json.loads(json.dumps(datasets.to_json(found))))
                collect_stats(renderer, found.examples)
                for fact in facts_of(found):
                    builder = FactPromptBuilder(fact, seed=0)
                    builder.edit_prompts(2)
                    builder.contrast_prompts(2)
                    builder.probes(2)

        return Kind(f"dataset{suffix}", inputs, run, len)

    rows = st.lists(st.sampled_from(ROWS).flatmap(changes.json_values), max_size=4)
    lines = st.builds(lambda rows: b"\n".join(map(changes.as_json, rows)), rows)
    yield file(".jsonl", lines.flatmap(_now_and_then_damaged))
    yield file(".json", st.builds(changes.as_json, rows).flatmap(_now_and_then_damaged))
    table = b'prompt,completion,label\nWhat is 42?,FOR TWO,true\n"a,""b",,false\n'
    facts = b'subject,answer,match,questions\n42,FOR TWO,"[""FOR TWO""]","[""What is 42?""]"\n'
    yield file(".csv", changes.damaged(table) | changes.damaged(facts))
    yield file(".txt", st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
    yield file(".parquet", st.sampled_from([_parquet(row) for row in ROWS]).flatmap(changes.damaged))


def _now_and_then_damaged(content: bytes) -> SearchStrategy[bytes]:
    return st.integers(0, 5).flatmap(lambda one: changes.damaged(content) if one == 0 else st.just(content))


def _parquet(row: Any) -> bytes:
    packed = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist([row, row]), packed)
    return packed.getvalue()


# ---------------------------------------------------------------- schemas

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$"},
        "size": {"type": "integer", "minimum": 0, "maximum": 9},
        "day": {"type": "string", "format": "date"},
        "kind": {"enum": ["a", 1, None]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/one"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"one": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 5}, {"type": "null"}, {"const": 1}]}},
}


def _schemas(parts: Parts) -> Kind[Any]:
    renderer = parts.registry.load_base("tiny").renderer

    def run(schema: Any) -> None:
        constraint = renderer.constraint(json.dumps(schema))
        constraint.allowed()

    return Kind("schema", changes.json_values(SCHEMA), run, lambda schema: len(changes.as_json(schema)))


# ---------------------------------------------------------------- a server


@contextmanager
def bodies_and_uploads(folder: Path) -> Iterator[dict[str, Kind[Any]]]:
    """Kinds whose inputs are sent to a server of this process. An answer with status 500 raises what led to it."""
    base = save_directory(folder / "served-base", num_hidden_layers=2, max_position_embeddings=1024)
    (base / "chat_template.jinja").write_text(TEMPLATES["hermes"])
    raised = Raised()
    logging.getLogger("fortwo.server.errors").addHandler(raised)
    with serve(tiny_settings(folder / "served", base)) as served:
        served.chat()
        body = [_body(served, raised, path, valid) for path, valid in BODIES]
        yield {kind.name: kind for kind in (*body, *_uploads(served, raised))}
    logging.getLogger("fortwo.server.errors").removeHandler(raised)


class Raised(logging.Handler):
    """Remembers the last exception that became an answer with status 500."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.error = record.exc_info[1] if record.exc_info else self.error

    def check(self, response: httpx.Response) -> None:
        if response.status_code >= 500 and response.status_code not in (503, 504, 507):
            raise self.error or AssertionError(f"{response.status_code} {response.text[:500]}")
        if response.status_code >= 400:
            error = response.json()["error"]
            assert isinstance(error, str) or (error["message"] and error["hint"]), response.text


def _body(served: Served, raised: Raised, path: str, valid: Any) -> Kind[bytes]:
    def run(content: bytes) -> str:
        response = served.http.post(path, content=content, headers={"Content-Type": "application/json"})
        raised.check(response)
        answer = response.json() if response.headers["content-type"].startswith("application/json") else {}
        if isinstance(answer, dict) and "job_id" in answer and response.is_success:
            served.http.post(f"/api/training/jobs/{answer['job_id']}/cancel")
        return str(response.status_code)

    name = f"body {path}{' with tools' if 'tool_choice' in valid else ''}"
    return Kind(name, changes.json_files(valid), run, len)


def _uploads(served: Served, raised: Raised) -> Iterator[Kind[bytes]]:
    file = b"\n".join(map(changes.as_json, ROWS[:2]))
    forms: dict[str, tuple[dict[str, str], str]] = {
        "/v1/files": ({"purpose": "fine-tune"}, "rows.jsonl"),
        "/api/data/rows": ({}, "rows.csv"),
        "/api/adapters/import": ({"name": "uploaded"}, "adapter.tar"),
    }
    for path, (fields, name) in forms.items():
        request = httpx.Request("POST", "http://x", data=fields, files={"file": (name, file)})
        run = _sender(served, raised, path, request.headers["content-type"])
        yield Kind(f"upload {path}", changes.damaged(request.read()), run, len)


def _sender(served: Served, raised: Raised, path: str, content_type: str) -> Callable[[bytes], str]:
    def run(content: bytes) -> str:
        response = served.http.post(path, content=content, headers={"Content-Type": content_type})
        raised.check(response)
        return str(response.status_code)

    return run
