"""The base models in memory and the adapters served on them, loaded on demand and identified by digest.

Names (`base`, `adapter`, `adapter@3`) are resolved here; the engine sees base ids and digests. Weights are read outside
the device's thread, so replies continue while a model loads. This module knows no HTTP and no jobs.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, Protocol

import torch
from torch import Tensor

from fortwo.adapters.store import AdapterStore
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.engine import malloc_tuning
from fortwo.engine.adapter_check import MIN_EFFECT, check_tensors, measure_effect
from fortwo.engine.base_choice import TrainedOn, choose_base, no_base
from fortwo.engine.engine import Engine
from fortwo.engine.networks import read_network
from fortwo.engine.runner import Runner
from fortwo.errors import Conflict, InvalidAdapter, NotFound, Unavailable, UnsupportedModel
from fortwo.execution.autotuning import all_blocks, alone, memory, prefers_blocks
from fortwo.execution.backend import Backend, backend_for
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.hub.prepared import ModelInfo
from fortwo.hub.weights import ProgressCallback
from fortwo.nn.config import DecoderConfig
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.network import Network
from fortwo.quantization.matmul import multiplies_bf16
from fortwo.quantization.selection import Measurements
from fortwo.records import AdapterVersion, Json, PlanWarning
from fortwo.train.estimate import format_size
from fortwo.train.fit import Fit, fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory. digest, weights_digest: as in ModelInfo; bytes: the size of its weights, without the
    cache."""

    id: str
    digest: str
    weights_digest: str
    backend: Backend
    renderer: ChatTemplateRenderer
    bytes: int
    runner: Runner

    @property
    def decoder(self) -> Network:
        return self.backend.decoder

    def taught(self, version: AdapterVersion) -> bool:
        """Whether the adapter was trained on this base."""
        return self.has_digest(version.base_digest)

    def has_digest(self, digest: str) -> bool:
        """Whether it is this base's digest, or that of its weights, which adapters of earlier versions name."""
        return digest in (self.digest, self.weights_digest)


@dataclass(frozen=True)
class Target:
    """The weights that answer a request. adapter_key: as in prompts.Prompt; name: as the request wrote it."""

    model: LoadedModel
    adapter_key: str | None
    name: str


@dataclass(frozen=True)
class ModelState:
    """digest: None while it is loading; bytes: the size of its weights. progress: of a model that is fetched or
    converted, what is done at present, how much of it is done, and how much there is."""

    state: Literal["loading", "loaded"]
    digest: str | None
    bytes: int
    progress: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class AdapterState:
    """base: id of the loaded model that serves it."""

    base: str
    bytes: int


@dataclass(frozen=True)
class RegistryState:
    """Models by id and adapters by digest; what is not in memory is not listed."""

    models: dict[str, ModelState]
    adapters: dict[str, AdapterState]


class AdapterSource(Protocol):
    """A store of adapter files: that of published versions, or that of checkpoints (refs like name@job-step)."""

    def get(self, ref: str) -> AdapterVersion: ...
    def read(self, ref: str) -> tuple[AdapterVersion, Json, dict[str, Tensor]]: ...


class ModelRegistry:
    """Methods may be called from any thread except the device's; those that load or unload may wait for the disk.

    device: of its bases; weights, threads, max_adapters, cache_mb: the settings of these names. training: the bases on
    which jobs train, where those are on another device. copies: further devices that reply, each with its engine, of
    which `engine` is the whole.
    """

    def __init__(
        self,
        catalog: Catalog,
        adapters: AdapterStore,
        engine: Engine,
        checkpoints: AdapterSource | None = None,
        *,
        measurements: Measurements,
        device: torch.device,
        weights: str = "auto",
        threads: int | None = None,
        max_adapters: int = 64,
        cache_mb: int | None = None,
        training: ModelRegistry | None = None,
        copies: Sequence[tuple[Engine, torch.device]] = (),
    ) -> None:
        self._catalog = catalog
        self._store = adapters
        self._engine = engine
        self._checkpoints = checkpoints
        self._measurements = measurements
        self._device = device
        self._training = training
        self._copies = copies
        self._in_memory = 1 + sum(where == device for _, where in copies)  # how often each base is in its memory
        self._sharing: list[ModelRegistry] = []  # the other one, if its bases are in the same memory
        if training is not None and training._device == device:
            self._sharing, training._sharing = [training], [self]
        self._weights = weights
        self._threads = threads
        self._max_adapters = max_adapters
        self._cache_bytes = memory(self._device) // 8 if cache_mb is None else cache_mb << 20
        self._lock = threading.RLock()  # for loading and unloading; readers take the dicts as they are
        self._loading: Counter[str] = Counter()  # by id: threads that load it
        self.adapter_loads = 0  # since the start
        self._progress: dict[str, tuple[str, int, int]] = {}  # by id of a base that is prepared
        self._bases: dict[str, LoadedModel] = {}
        self._adapters: dict[str, AdapterState] = {}
        self._pins: Counter[str] = Counter()  # by adapter digest: requests that are about to be submitted
        self._pin_lock = threading.Lock()  # for pinning an adapter, and for unloading one that has no pin
        self._last_used: dict[str, int] = {}  # by adapter digest: a number of self._clock
        self._clock = count()

    def resolve(self, model: str) -> Target:
        """The weights that a model name means, loaded if necessary. Raises what `find` and the load raise."""
        while (target := self.find(model)) is None:  # again if it was unloaded meanwhile
            if model in self._catalog_ids():
                self.load_base(model)
            else:
                self.load_adapter(model)
        return target

    def find(self, model: str) -> Target | None:
        """The weights that a model name means; None if they must be loaded first. Raises NotFound listing the known
        names."""
        if base := self._bases.get(model):
            return Target(base, None, model)
        version = self.version_of(model)
        serving_base = None if version is None else self._base_serving(version)
        if version is None or serving_base is None:
            return None
        self._last_used[version.digest] = next(self._clock)
        return Target(serving_base, version.digest, model)

    def version_of(self, model: str) -> AdapterVersion | None:
        """The version or checkpoint that a model name means; None if it is a base. Raises NotFound listing the known
        names."""
        ids = self._catalog_ids()
        if model in ids:
            return None
        source = self._source(model)
        if source is self._store and not self._store.has(model.partition("@")[0]):
            names = ", ".join(self._store.names())
            raise NotFound(
                f"There is no model {model!r}.",
                param="model",
                hint=f"Base models: {', '.join(ids)}. Adapters: {names or 'none yet'}.",
            )
        try:
            return source.get(model)
        except NotFound as error:
            raise NotFound(error.message, param="model", hint=error.hint) from None

    def pin(self, target: Target) -> bool:
        """Keep the target's adapter in memory until `unpin`; False if it was unloaded since `resolve`. Does not
        block."""
        key = target.adapter_key
        if key is None:
            return True
        with self._pin_lock:
            if loaded := key in self._adapters:
                self._pins[key] += 1
        return loaded

    def unpin(self, target: Target) -> None:
        """Undo one `pin`, when the device's thread has accepted what was submitted before: an unload that waits for
        that thread sees the pin or the requests. Does not block."""
        if (key := target.adapter_key) is not None:
            with suppress(Unavailable):  # the engine is closed
                self._engine.call(lambda: self._unpin(key))

    def _unpin(self, key: str) -> None:
        with self._pin_lock:
            self._pins[key] -= 1
            self._pins += Counter()  # drops entries of zero

    def load_base(self, id: str, progress: ProgressCallback | None = None) -> LoadedModel:
        """The base in memory, fetched and converted first if necessary; progress as in Catalog.prepare.

        The tokenizer and the chat template are read, and tried, before the lock is taken: they come with the base, and
        a slow template delays nobody else.
        """
        if base := self._bases.get(id):
            return base
        self._check_memory(id)
        self._count_loading(id, 1)
        try:
            directory = self._catalog.prepare(id, self._reporting(id, progress))
            info = self._catalog.model_info(id)
            if info is None:
                raise Conflict(
                    f"Base model {id!r} was changed while it was loaded.", param="model", hint="Load it again."
                )
            self._check_memory(id)  # of a base whose dimensions were not known before
            renderer = ChatTemplateRenderer(directory)
            with self._lock:
                return self._bases.get(id) or self._load(info, renderer)
        finally:
            self._count_loading(id, -1)
            self._progress.pop(id, None)

    def training_base(self, id: str) -> LoadedModel:
        """The base on which jobs train, loaded if necessary: the one that is served, or its copy on their own device.
        Raises what load_base raises, and Conflict if the files have changed since the base was loaded."""
        base = self.load_base(id)
        if self._training is None:
            return base
        copy = self._training.load_base(id)
        if copy.digest != base.digest:
            raise Conflict(
                f"Base model {id!r} has changed on disk since it was loaded.",
                param="model",
                hint="Unload it and load it again.",
            )
        return copy

    def _training_lock(self) -> AbstractContextManager[object]:
        """Held besides the own lock, and after it, where both devices lose a base."""
        return nullcontext() if self._training is None else self._training._lock

    @property
    def training_engine(self) -> Engine:
        return self._engine if self._training is None else self._training._engine

    def fit(self, id: str) -> Fit | None:
        """How the base fits into the memory of the device, and of the one for jobs; None where its dimensions are not
        known yet."""
        smallest = min(memory(device) for device in (self._device, *(device for _, device in self._copies)))
        found = fit(self._catalog.config(id), self._weights, smallest, self._blocks(id))
        there = None if self._training is None else self._training.fit(id)
        if found is None or there is None:
            return found
        return replace(found, teach=there.teach, train=there.train, training_memory=there.memory)

    def _blocks(self, id: str) -> int:
        """Bytes of the blocks that `auto` would hold of a base; 0 where it holds none, or that is not known yet."""
        info = self._catalog.model_info(id)
        if info is None or self._device.type != "cpu" or not weights.block_bytes(info.directory):
            return 0
        try:
            config = DecoderConfig.from_hf(self._catalog.config(id))
        except UnsupportedModel:
            return 0
        held = prefers_blocks(config) and all_blocks(config, weights.block_types(info.directory))
        return weights.block_bytes(info.directory) if held else 0

    def training_weights(self, base: LoadedModel) -> str:
        """The FORTWO_WEIGHTS with which another process trains on the same numbers as this one does on the base."""
        if self._training is not None:
            return self._training.training_weights(base)
        if self._weights != "auto":
            return self._weights
        if self._blocks(base.id):
            return "gguf"
        narrow = self._device.type != "cpu" and multiplies_bf16(self._device)
        return alone(base.decoder.config.parameters, memory(self._device)) or ("bf16" if narrow else "fp32")

    def _check_memory(self, id: str) -> None:
        """Raises Unavailable for a base that does not fit, as soon as its dimensions are known."""
        found = self.fit(id)
        beside = [self, *self._sharing]
        others = sum(base.bytes * one._in_memory for one in beside for base in one._bases.copy().values())
        needed = 0 if found is None else found.serve * self._in_memory
        if found is not None and needed + others > found.memory:
            loaded = f" beside {format_size(others)} of other bases" if others else ""
            raise Unavailable(
                f"Base model {id!r} needs {format_size(needed)} of memory to be served in "
                f"{found.weight_format}{loaded}; "
                f"this machine has {format_size(found.memory)}.",
                param="model",
                hint="Unload other bases, set FORTWO_WEIGHTS to a smaller format (int8, int4, nf4), or take a smaller "
                "base (fortwo models catalog).",
                code="out_of_memory",
            )

    def _reporting(self, id: str, progress: ProgressCallback | None) -> ProgressCallback:
        """A callback that remembers the progress for `state` and passes it on."""

        def report(label: str, done: int, total: int) -> None:
            self._progress[id] = (label, done, total)
            if progress is not None:
                progress(label, done, total)

        return report

    def _count_loading(self, id: str, change: int) -> None:
        with self._pin_lock:
            self._loading[id] += change

    def _load(self, info: ModelInfo, renderer: ChatTemplateRenderer) -> LoadedModel:
        id = info.id
        backend, runner = self._read(info, self._engine, self._device)
        base = LoadedModel(id, info.digest, info.weights_digest, backend, renderer, backend.decoder.bytes, runner)
        with ExitStack() as undoing:
            for engine, device in self._copies:
                engine.add_base(id, self._read(info, engine, device)[1], renderer)
                undoing.callback(engine.remove_base, id)
            self._engine.add_base(id, runner, renderer)
            undoing.pop_all()
        malloc_tuning.trim()
        for warning in renderer.warnings:
            log.warning("%s: %s %s", id, warning.message, warning.hint)
        self._bases[id] = base
        return base

    def _read(self, info: ModelInfo, engine: Engine, device: torch.device) -> tuple[Backend, Runner]:
        """The base's weights on a device."""
        decoder = read_network(
            info,
            device,
            self._weights,
            self._threads,
            self._measurements,
            lambda measure: engine.call(measure).result(),
        )
        backend = backend_for(decoder)
        return backend, Runner(backend, self._cache_bytes)

    def unload_base(self, id: str) -> None:
        """Drop a base and the adapters on it from memory. Raises Conflict while a request or a job uses it."""
        with self._lock, self._training_lock():
            if id not in self._bases:
                self._catalog.get(id)
                raise NotFound(
                    f"Base model {id!r} is not loaded.",
                    param="model",
                    hint=f"Loaded: {', '.join(self._bases) if self._bases else 'none'}.",
                )
            if self.training_engine.has_job():
                raise Conflict(
                    f"Base model {id!r} cannot be unloaded while a job runs or waits.",
                    param="model",
                    hint="Wait for the job or cancel it.",
                )
            if self._training is not None and id in self._training._bases:
                self._training.unload_base(id)
            self._engine.remove_base(id)
            del self._bases[id]
            self._adapters = {key: state for key, state in self._adapters.items() if state.base != id}
            self._last_used = {key: self._last_used[key] for key in self._adapters}

    def remove_base(self, id: str) -> None:
        """Drop a base from memory and remove it as Catalog.remove does. Raises Conflict while a request or a job uses
        it; then nothing is removed."""
        with self._lock, self._training_lock():
            self._catalog.check_removable(id)
            if id in self._bases:
                self.unload_base(id)
            self._catalog.remove(id)

    def load_adapter(self, ref: str) -> AdapterVersion:
        """Serve a published version on the base it was trained on. Raises InvalidAdapter for one that cannot have the
        effect it was trained for: wrong base, foreign tensors, no effect. Raises Unavailable when there is no room."""
        with self._lock:
            source = self._source(ref)
            version = source.get(ref)
            if self._base_serving(version) is not None:
                return version
            version, config, tensors = source.read(ref)
            base = self.base_of(TrainedOn.of(version))
            lora = self.check_adapter(version.id, base, config, tensors)
            if not self._evict():
                raise Unavailable(
                    f"Adapter {version.id!r} cannot be loaded: all {self._max_adapters} adapters in memory are in use.",
                    param="model",
                    hint="Try again when some requests are done, or raise FORTWO_MAX_ADAPTERS.",
                )
            self._attach(base, version, lora)
            return version

    def check_adapter(self, name: str, base: LoadedModel, config: Json, tensors: dict[str, Tensor]) -> Lora:
        """The adapter, ready to be served on `base`. name: for messages. Raises InvalidAdapter for an option that is
        not supported, foreign tensors, and tensors without effect."""
        decoder = base.decoder
        modules = [name for names in decoder.config.groups.values() for name in names]
        lora = Lora.from_state(LoraConfig.from_peft(config, modules), decoder.config, tensors, decoder.device)
        check_tensors(name, lora)
        effect = self._engine.call(lambda: measure_effect(base.backend, base.renderer, lora)).result()
        if math.isnan(effect):
            raise InvalidAdapter(
                f"Adapter {name!r} cannot be checked: {base.id!r} computes logits that are no numbers without it, too.",
                hint="The base's weights hold nan or infinite values. Prepare the base again from intact files.",
            )
        if not math.isfinite(effect):
            raise InvalidAdapter(
                f"Adapter {name!r} makes the logits of {base.id!r} infinite or no numbers at all.",
                hint="Its tensors or its lora_alpha are far too large. Train it again with a lower learning rate.",
            )
        if effect < MIN_EFFECT:
            raise InvalidAdapter(
                f"Adapter {name!r} changes nothing: on a probe it moves the logits of {base.id!r} by only "
                f"{effect:.1e} of their size.",
                hint="It was hardly trained; its report and plan say why.",
            )
        return lora

    def unload_adapter(self, ref: str) -> None:
        """Drop an adapter from memory. Raises Conflict while requests use it."""
        with self._lock:
            version = self._store.get(ref)
            key, state = version.digest, self._adapters.get(version.digest)
            if state is None:
                raise NotFound(
                    f"Adapter {version.id!r} is not loaded.",
                    param="adapter_name",
                    hint="GET /api/adapters lists those that are.",
                )
            if requests := self._unload_unused(key, state.base):
                raise Conflict(
                    f"Adapter {version.id!r} cannot be unloaded: {requests} request(s) use it.",
                    param="adapter_name",
                    hint="Try again when they are done.",
                )

    def delete_adapter(self, ref: str, *, permanently: bool = False) -> None:
        """Delete a version, or with a bare name all versions, from memory and disk. Raises Conflict while requests use
        one of them, or one is protected; then nothing is deleted from disk."""
        with self._lock:
            for version in self._store.versions(ref):
                if version.digest in self._adapters:
                    self.unload_adapter(version.id)
            self._store.delete(ref, permanently=permanently)

    def prune_adapters(self, keep: int, *, apply: bool, needed: Collection[str] = ()) -> list[Json]:
        """`AdapterStore.prune`, with what is removed unloaded first. Raises Conflict while requests use one of them;
        then nothing is removed."""
        with self._lock:
            for one in self._store.prune(keep, apply=False, needed=needed) if apply else []:
                with suppress(NotFound):  # it was deleted before
                    version = self._store.get(one["id"])
                    if version.digest in self._adapters:
                        self.unload_adapter(version.id)
            return self._store.prune(keep, apply=apply, needed=needed)

    def publish(self, version: AdapterVersion, lora: Lora) -> None:
        """Serve a version that was just trained and written, from its tensors in memory. If its base is no longer
        loaded, or every adapter in memory is in use, nothing happens: it will be loaded when it is requested."""
        with self._lock:
            base = self._bases.get(version.base_model)
            fits = version.digest in self._adapters or self._evict()
            if fits and base is not None and base.taught(version):
                self._attach(base, version, lora)

    def discard(self, versions: Iterable[AdapterVersion]) -> None:
        """Drop versions that were removed from disk; requests that still use them are cancelled."""
        with self._lock:
            for version in versions:
                if state := self._adapters.pop(version.digest, None):
                    self._last_used.pop(version.digest, None)
                    self._engine.detach(state.base, version.digest)

    def state(self) -> RegistryState:
        """What is in memory now or being loaded."""
        models = {id: ModelState("loaded", base.digest, base.bytes) for id, base in self._bases.items()}
        loading = [id for id, threads in self._loading.copy().items() if threads and id not in models]
        models |= {id: ModelState("loading", None, 0, self._progress.get(id)) for id in loading}
        return RegistryState(models, dict(self._adapters))

    def warnings(self, id: str) -> tuple[PlanWarning, ...]:
        """What people should know about the tokenizer and the chat template of a base; empty until it is loaded."""
        base = self._bases.get(id)
        return () if base is None else base.renderer.warnings

    def _attach(self, base: LoadedModel, version: AdapterVersion, lora: Lora) -> None:
        self._engine.attach(base.id, version.digest, lora, version=version)
        self.adapter_loads += 1
        self._last_used[version.digest] = next(self._clock)
        size = sum(tensor.nbytes for tensor in lora.parameters())
        self._adapters[version.digest] = AdapterState(base.id, size)

    def _evict(self) -> bool:
        """Unload the least recently used adapters that no request uses until one more fits; False if none does."""
        for key in sorted(self._adapters, key=lambda key: self._last_used[key]):
            if len(self._adapters) < self._max_adapters:
                break
            self._unload_unused(key, self._adapters[key].base)
        return len(self._adapters) < self._max_adapters

    def _unload_unused(self, key: str, base: str) -> int:
        """Unload an adapter unless requests use it or are about to. Returns how many do."""

        def forget() -> int:
            with self._pin_lock:
                requests = self._pins[key] or self._engine.count_requests(base, key)
                if not requests:
                    del self._adapters[key], self._last_used[key]
            return requests

        requests = self._engine.call(forget).result()
        if not requests:  # and from now on nobody can pin it
            self._engine.detach(base, key)
        return requests

    def _base_serving(self, version: AdapterVersion) -> LoadedModel | None:
        """The base that has this version attached and is still the one it was trained on."""
        state = self._adapters.get(version.digest)
        base = None if state is None else self._bases.get(state.base)
        return base if base is not None and base.taught(version) else None

    def _source(self, ref: str) -> AdapterSource:
        return self._checkpoints if self._checkpoints is not None and "-" in ref.partition("@")[2] else self._store

    def _catalog_ids(self) -> list[str]:
        return [entry.id for entry in self._catalog.entries()]

    def base_of(self, trained_on: TrainedOn) -> LoadedModel:
        """The base that the adapter was trained on, loaded if necessary, whatever it is called. Raises InvalidAdapter
        when there is none."""
        infos = {id: self._catalog.model_info(id) for id in self._catalog_ids()}
        known = {id: (info.digest, info.weights_digest) for id, info in infos.items() if info is not None}
        known |= {id: (base.digest, base.weights_digest) for id, base in self._bases.items()}
        id = choose_base(trained_on, known, loaded=self._bases, unprepared=infos.keys() - known.keys())
        if id is not None:
            base = self.load_base(id)
            if base.has_digest(trained_on.digest):
                return base
            known[id] = (base.digest, base.weights_digest)
        waiting = sorted(infos.keys() - known.keys())
        raise no_base(trained_on, known, [one for one in waiting if self._catalog.get(one).origin == "user"])
