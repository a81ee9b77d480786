"""What is exported: a version of an adapter, and the base it was trained on, both checked.

Weights are read one by one, so that an export needs the memory of one tensor, not of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.adapters.store import AdapterStore
from fortwo.engine.base_choice import TrainedOn, choose_base, no_base
from fortwo.errors import InvalidAdapter, UnsupportedModel
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.hub.identity import read_json
from fortwo.hub.prepared import ModelInfo
from fortwo.hub.weights import LazyTensors, TensorInfo
from fortwo.nn.config import DecoderConfig
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor

CONV1D = ("gpt2", "openai-gpt")  # networks of transformers whose weights are (inputs, outputs)
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class Source:
    """peft: adapter_config.json; tensors: under PEFT's names; base: the prepared base; named: how PEFT and vLLM find
    it, a repository of the hub or a path."""

    version: AdapterVersion
    peft: Json
    tensors: dict[str, Tensor]
    base: ModelInfo
    named: str

    @cached_property
    def config(self) -> Json:
        """The base's config.json."""
        return read_json(self.base.directory / "config.json")

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return weights.tensor_infos(self.base.directory)

    @cached_property
    def lora(self) -> LoraConfig:
        """Raises InvalidAdapter for an option that is not supported."""
        modules = {name.rpartition(".")[0].rpartition(".")[2] for name in self.infos if name.endswith(".weight")}
        return LoraConfig.from_peft(self.peft, sorted(modules & self._targeted))

    @property
    def _targeted(self) -> set[str]:
        return {module.rpartition(".")[2] for module in self.modules}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The full names of the modules with an update. Raises InvalidAdapter where a part of an update is missing, or
        for a tensor that is none."""
        ends = (".lora_A.weight", ".lora_B.weight", *([_MAGNITUDE] if self.peft.get("use_dora") else []))
        halves = {name: next((end for end in ends if name.endswith(end)), None) for name in self.tensors}
        if wrong := [name for name, end in halves.items() if end is None or not name.startswith(_PREFIX)]:
            raise InvalidAdapter(
                f"{self.version.id} has the tensor {wrong[0]!r}, which is no part of a LoRA update.",
                hint="Export it as peft, which keeps its files as they are.",
            )
        found = dict.fromkeys(name.removeprefix(_PREFIX).removesuffix(end or "") for name, end in halves.items())
        for module in found:
            for end in ends:
                if f"{_PREFIX}{module}{end}" not in self.tensors:
                    raise InvalidAdapter(
                        f"{self.version.id} lacks the tensor {_PREFIX}{module}{end}.", hint="Train it again."
                    )
        return tuple(found)

    def halves(self, module: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a module, in fp32, without the scale."""
        a, b = (self.tensors[f"{_PREFIX}{module}.lora_{half}.weight"] for half in "AB")
        return a.float(), b.float()

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the base in sorted order, with the update added in fp32 where there is one, and with DoRA
        the sum scaled. What has an update is fp32; the rest has the base's type. Raises UnsupportedModel where the base
        lacks a module."""
        if self.config.get("model_type") in CONV1D:
            raise UnsupportedModel(
                f"{self.base.id!r} holds its weights as (inputs, outputs), which merging does not support.",
                hint="Export the adapter as peft.",
            )
        base: Mapping[str, Tensor] = LazyTensors(self.infos)
        updated = {f"{module}.weight": module for module in self.modules}
        if missing := sorted(updated.keys() - self.infos.keys()):
            raise UnsupportedModel(
                f"{self.version.id} changes {missing[0].removesuffix('.weight')}, but {self.base.id!r} lacks it.",
                hint="Its files have other names for the module. Export the adapter as peft.",
            )
        for name in self.infos:
            weight = base[name]
            if (module := updated.get(name)) is not None:
                a, b = self.halves(module)
                weight = weight.float().add_(b @ a, alpha=self.lora.scale(module))
                if self.lora.use_dora:
                    weight *= self._output_scale(module, weight)[:, None]
            yield name, weight

    def _output_scale(self, module: str, updated_OI: Tensor) -> Tensor:
        """What DoRA multiplies the outputs of a module with (O,): its magnitudes by the norms of the updated weight; 1
        where a row is zero."""
        norm_O = updated_OI.norm(dim=1)
        magnitude_O: Tensor = self.tensors[f"{_PREFIX}{module}{_MAGNITUDE}"].float()
        scale_O: Tensor = (magnitude_O / norm_O).where(norm_O > 0, 1)
        return scale_O

    @property
    def decoder(self) -> DecoderConfig:
        """Raises UnsupportedModel for a base that only transformers can run."""
        return DecoderConfig.from_hf(self.config)


def open_source(ref: str, catalog: Catalog, store: AdapterStore) -> Source:
    """The adapter that `ref` (name or name@3) means, and its base. Raises NotFound, and InvalidAdapter naming a damaged
    file or the base that is missing or was changed."""
    version, peft, tensors = store.read(ref)
    infos = {entry.id: catalog.model_info(entry.id) for entry in catalog.entries()}
    known = {id: (info.digest, info.weights_digest) for id, info in infos.items() if info is not None}
    trained_on = TrainedOn.of(version)
    id = choose_base(trained_on, known, loaded=(), unprepared=infos.keys() - known.keys())
    if id is not None and id not in known:
        if (damage := catalog.damage(id)) is not None:
            raise damage
        raise InvalidAdapter(
            f"The base {id!r} of {version.id} is not on disk.", param="name", hint=f"Run: fortwo models fetch {id}"
        )
    if id is None:
        waiting = sorted(infos.keys() - known.keys())
        raise no_base(trained_on, known, [one for one in waiting if catalog.get(one).origin == "user"])
    info = infos[id]
    assert info is not None
    _check_base(info)
    return Source(version, peft, tensors, info, _name_of(catalog.get(id).source, info.directory))


def _check_base(info: ModelInfo) -> None:
    """Raises UnsupportedModel for a base whose files are gone or cut off since it was prepared."""
    tensors = weights.tensor_infos(info.directory)
    if weights.parameter_count(tensors) != info.parameters:
        raise UnsupportedModel(
            f"The base {info.id!r} in {info.directory} has {weights.parameter_count(tensors):,} parameters, but it had "
            f"{info.parameters:,} when it was prepared.",
            hint=f"Prepare it again: delete {info.directory} and run fortwo models fetch {info.id}",
        )


def _name_of(source: str, directory: Path) -> str:
    """What another program can load the base from: its repository of the hub, its own directory, or the prepared one
    where it comes from a GGUF file."""
    kind, _, place = source.partition(":")
    if kind == "hub":
        return place.partition("@")[0]
    path = Path(place)
    return str(path) if path.is_absolute() and path.is_dir() else str(directory.resolve())
