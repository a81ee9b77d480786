"""What is in memory: base models and the adapters served on them, loaded on demand and known by digest.

Names (`base`, `adapter`, `adapter@3`) end here; the engine sees base ids and digests. Weights are read outside the
device's thread, so replies go on while something is loaded. Knows no HTTP and no jobs.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Literal, Protocol

import torch
from torch import Tensor

from fortwo.adapters.store import AdapterStore
from fortwo.data.render import Renderer
from fortwo.engine import heap
from fortwo.engine.effect import ROUNDING, check, effect
from fortwo.engine.engine import Engine
from fortwo.engine.runner import Runner
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound, Unavailable
from fortwo.execution.autotuning import memory, serving
from fortwo.execution.backend import Backend, backend_for
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.hub.weights import Progress
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion, Json
from fortwo.settings import Settings


@dataclass(frozen=True)
class Resident:
    """A base model in memory. bytes: its weights, without the cache."""

    id: str
    digest: str
    backend: Backend
    renderer: Renderer
    bytes: int
    runner: Runner

    @property
    def decoder(self) -> Decoder:
        return self.backend.decoder


@dataclass(frozen=True)
class Target:
    """Who answers a request. adapter_key: as in prompts.Prompt; name: as the request said it."""

    resident: Resident
    adapter_key: str | None
    name: str


@dataclass(frozen=True)
class ModelState:
    state: Literal["loading", "loaded"]
    digest: str | None
    bytes: int


@dataclass(frozen=True)
class AdapterState:
    """base: the resident it is served on."""

    base: str
    bytes: int


@dataclass(frozen=True)
class States:
    """models by id, adapters by digest; what is not in memory is not listed."""

    models: dict[str, ModelState]
    adapters: dict[str, AdapterState]


class Shelf(Protocol):
    """Where adapters lie: the store of versions, or that of checkpoints, whose refs are name@job-step."""

    def get(self, ref: str) -> AdapterVersion: ...
    def read(self, ref: str) -> tuple[AdapterVersion, Json, dict[str, Tensor]]: ...


class Residents:
    """Every method is safe from any thread but the device's, and may take as long as the disk."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: AdapterStore,
        engine: Engine,
        checkpoints: Shelf | None = None,
    ) -> None:
        self._settings = settings
        self._device = _device(settings.device)
        self._catalog = catalog
        self._store = store
        self._engine = engine
        self._checkpoints = checkpoints
        self._changing = threading.RLock()  # whoever loads or unloads; readers take the dicts as they are
        self._loading: str | None = None
        self._bases: dict[str, Resident] = {}
        self._adapters: dict[str, AdapterState] = {}
        self._held: Counter[str] = Counter()  # adapters that are about to be asked, by digest
        self._holding = threading.Lock()  # whoever holds one, or lets go of one that nobody holds
        self._asked: dict[str, int] = {}  # when each adapter was asked for last, by its digest
        self._now = count()
        self._most = settings.max_adapters
        self._cache_bytes = _cache_bytes(settings.cache_mb, self._device)

    def resolve(self, model: str) -> Target:
        """Who answers to this name, loaded if need be. Raises what `find` does."""
        if (target := self.find(model)) is not None:
            return target
        if model in self._known():
            return Target(self.load_base(model), None, model)
        with self._changing:
            version = self.load_adapter(model)
            resident = self._serving(version)
        assert resident is not None
        self._asked[version.digest] = next(self._now)
        return Target(resident, version.digest, model)

    def find(self, model: str) -> Target | None:
        """Who answers to this name; None if it must be loaded first. Raises NotFound naming what there is."""
        if resident := self._bases.get(model):
            return Target(resident, None, model)
        ids = self._known()
        if model in ids:
            return None
        names = self._store.names()
        if model.partition("@")[0] not in names and self._shelf(model) is self._store:
            raise NotFound(
                f"no model {model!r}",
                param="model",
                hint=f"Base models: {', '.join(ids)}. Adapters: {', '.join(names) if names else 'none yet'}.",
            )
        try:
            version = self._shelf(model).get(model)
        except NotFound as error:
            raise NotFound(error.message, param="model", hint=error.hint) from None
        resident = self._serving(version)
        if resident is None:
            return None
        self._asked[version.digest] = next(self._now)
        return Target(resident, version.digest, model)

    def hold(self, target: Target) -> bool:
        """Keep its adapter in memory until `release`; False if it has gone since `resolve`. Does not wait."""
        key = target.adapter_key
        if key is None:
            return True
        with self._holding:
            if here := key in self._adapters:
                self._held[key] += 1
        return here

    def release(self, target: Target) -> None:
        if (key := target.adapter_key) is not None:
            with self._holding:
                self._held[key] -= 1
                self._held += Counter()  # forgets what nobody holds

    def load_base(self, id: str, progress: Progress | None = None) -> Resident:
        """The base in memory, fetched and converted first if need be; progress as in Catalog.prepare."""
        with self._changing:
            if resident := self._bases.get(id):
                return resident
            self._loading = id
            try:
                directory = self._catalog.prepare(id, progress)
                card = self._catalog.prepared(id)
                assert card is not None
                config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
                tensors = weights.read(directory)
                decoder = serving(
                    id,
                    config,
                    tensors,
                    self._device,
                    self._settings,
                    lambda measure: self._engine.call(measure).result(),
                )
                backend = backend_for(decoder)
                runner = Runner(backend, self._cache_bytes)
                resident = Resident(id, card.digest, backend, Renderer(directory), decoder.bytes, runner)
                self._engine.add_base(id, resident.runner, resident.renderer)
                heap.give_back()
            finally:
                self._loading = None
            self._bases[id] = resident
            return resident

    def unload_base(self, id: str) -> None:
        """Forget a base and the adapters on it. Raises Conflict while requests or a job use it."""
        with self._changing:
            if id not in self._bases:
                self._catalog.get(id)
                raise NotFound(
                    f"base model {id!r} is not loaded",
                    param="model",
                    hint=f"Loaded: {', '.join(self._bases) if self._bases else 'none'}.",
                )
            if self._engine.working():
                raise Conflict(
                    f"base model {id!r} stays while a job runs", param="model", hint="Wait for the job or cancel it."
                )
            self._engine.remove_base(id)
            del self._bases[id]
            self._adapters = {key: state for key, state in self._adapters.items() if state.base != id}
            self._asked = {key: self._asked[key] for key in self._adapters}

    def load_adapter(self, ref: str) -> AdapterVersion:
        """Serve a published version, on the base it was trained on. Raises InvalidAdapter when it cannot have the
        effect it was trained for: wrong base, foreign tensors, no effect."""
        with self._changing:
            version = self._shelf(ref).get(ref)
            if self._serving(version) is not None:
                return version
            version, config, tensors = self._shelf(ref).read(ref)
            resident = self.base_of(version)
            decoder = resident.decoder
            lora = Lora.from_state(LoraConfig.from_peft(config), decoder.config, tensors, decoder.device)
            check(version, lora)
            moved = self._engine.call(lambda: effect(resident.backend, resident.renderer, lora)).result()
            if not moved >= ROUNDING:
                raise InvalidAdapter(
                    f"adapter {version.id!r} changes nothing: on a probe the logits of {resident.id!r} move by "
                    f"{moved:.1e} of their size",
                    hint="It was hardly trained; its report and plan say why.",
                )
            if not self._make_room():
                raise Unavailable(
                    f"adapter {version.id!r} cannot be loaded: all {self._most} adapters in memory answer requests",
                    param="model",
                    hint="Try again when some are done, or raise FORTWO_MAX_ADAPTERS.",
                )
            self._attach(resident, version, lora)
            return version

    def unload_adapter(self, ref: str) -> None:
        """Raises Conflict while requests run on it."""
        with self._changing:
            version = self._store.get(ref)
            key, state = version.digest, self._adapters.get(version.digest)
            if state is None:
                raise NotFound(
                    f"adapter {version.id!r} is not loaded",
                    param="adapter_name",
                    hint="GET /api/adapters says which are.",
                )
            if requests := self._drop(key, state.base):
                raise Conflict(
                    f"adapter {version.id!r} answers {requests} request(s)",
                    param="adapter_name",
                    hint="Try again when they are done.",
                )

    def delete_adapter(self, ref: str) -> None:
        """Forget a version, or with a bare name all of them, in memory and on disk. Raises Conflict while requests run
        on it; then nothing is deleted."""
        with self._changing:
            for version in self._store.versions(ref):
                if version.digest in self._adapters:
                    self.unload_adapter(version.id)
            self._store.delete(ref)

    def publish(self, version: AdapterVersion, lora: Lora) -> None:
        """Serve a version that was just trained and written: its tensors are in memory, nothing is read. If its base
        has gone in the meantime, or every adapter in memory answers, it will be loaded when it is asked for."""
        with self._changing:
            resident = self._bases.get(version.base_model)
            fits = version.digest in self._adapters or self._make_room()
            if fits and resident is not None and resident.digest == version.base_digest:
                self._attach(resident, version, lora)

    def forget(self, versions: Iterable[AdapterVersion]) -> None:
        """Let go of what is gone from the disk; requests that still run on it are cancelled."""
        with self._changing:
            for version in versions:
                if state := self._adapters.pop(version.digest, None):
                    self._asked.pop(version.digest, None)
                    self._engine.detach(state.base, version.digest)

    def states(self) -> States:
        """What is in memory now, or on its way there."""
        models = {id: ModelState("loaded", resident.digest, resident.bytes) for id, resident in self._bases.items()}
        if (loading := self._loading) is not None:
            models[loading] = ModelState("loading", None, 0)
        return States(models, dict(self._adapters))

    def _attach(self, resident: Resident, version: AdapterVersion, lora: Lora) -> None:
        self._engine.attach(resident.id, version.digest, lora, frozen=True)
        self._asked[version.digest] = next(self._now)
        self._adapters[version.digest] = AdapterState(resident.id, _bytes(lora))

    def _make_room(self) -> bool:
        """Forget the adapters that were asked for least recently and answer nothing, until one more fits."""
        for key in sorted(self._adapters, key=lambda key: self._asked[key]):
            if len(self._adapters) < self._most:
                break
            self._drop(key, self._adapters[key].base)
        return len(self._adapters) < self._most

    def _drop(self, key: str, base: str) -> int:
        """Forget an adapter unless requests run on it or are about to; how many do."""

        def detach() -> int:
            with self._holding:
                requests = self._held[key] or self._engine.requests(base, key)
                if not requests:
                    self._engine.detach(base, key)
                    del self._adapters[key], self._asked[key]
            return requests

        return self._engine.call(detach).result()

    def _serving(self, version: AdapterVersion) -> Resident | None:
        """The base that has this version attached, with the weights it was trained on."""
        state = self._adapters.get(version.digest)
        resident = None if state is None else self._bases.get(state.base)
        return resident if resident is not None and resident.digest == version.base_digest else None

    def _shelf(self, ref: str) -> Shelf:
        return self._checkpoints if self._checkpoints is not None and "-" in ref.partition("@")[2] else self._store

    def _known(self) -> list[str]:
        return [entry.id for entry in self._catalog.entries()]

    def base_of(self, version: AdapterVersion) -> Resident:
        """The base with the weights the adapter was trained on; what it is called does not matter."""
        digests = {id: card.digest if (card := self._catalog.prepared(id)) else None for id in self._known()}
        digests |= {id: resident.digest for id, resident in self._bases.items()}
        same = [id for id, digest in digests.items() if digest == version.base_digest]
        if same:
            return self.load_base(min(same, key=lambda id: (id not in self._bases, id != version.base_model)))
        if version.base_model not in digests:
            raise InvalidAdapter(
                f"adapter {version.id!r} was trained on {version.base_model!r} with digest {version.base_digest}; "
                f"no base model here has these weights",
                hint="Add that base: fortwo models add ID PATH",
            )
        found = digests[version.base_model]
        if found is None:
            resident = self.load_base(version.base_model)
            if resident.digest == version.base_digest:
                return resident
            found = resident.digest
        raise InvalidAdapter(
            f"adapter {version.id!r} was trained on weights with digest {version.base_digest}; "
            f"{version.base_model!r} has digest {found}",
            hint="Train it again on this base, or add the base it was trained on: fortwo models add ID PATH",
        )


def _bytes(lora: Lora) -> int:
    return sum(tensor.nbytes for tensor in lora.parameters())


def _cache_bytes(megabytes: int | None, device: torch.device) -> int:
    """Memory for keys and values: what is set, or an eighth of what the device or the machine has."""
    if megabytes is not None:
        return megabytes << 20
    return memory(device) // 8


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    present = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    if not present:
        raise InvalidRequest(
            f"device = {name!r} is not on this machine", param="device", hint="Set FORTWO_DEVICE to auto or cpu."
        )
    return device
