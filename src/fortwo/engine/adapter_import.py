"""Brings an adapter that another program trained into the store: which base it belongs to, and that it can be served.

Everything is checked before anything is published; an import that fails leaves the store as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fortwo.adapters.peft_files import PeftFiles, parse_config, read_directory, read_file, under_pefts_names
from fortwo.adapters.store import AdapterStore
from fortwo.adapters.version_files import CONFIG, MANIFEST
from fortwo.engine.base_choice import TrainedOn
from fortwo.engine.registry import LoadedModel, ModelRegistry
from fortwo.errors import InvalidAdapter, UnsupportedModel
from fortwo.hub.base_names import bases_named
from fortwo.hub.catalog import Catalog
from fortwo.nn.config import DecoderConfig, Shape
from fortwo.nn.lora import MAGNITUDE, check_shapes
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion, Json


def import_adapter(
    name: str, directory: Path, catalog: Catalog, store: AdapterStore, registry: ModelRegistry
) -> AdapterVersion:
    """Publish the adapter in `directory` as the current version of `name`, and load it. Raises InvalidAdapter naming
    the file, option, tensor or base at fault."""
    adapter = read_directory(directory)
    config = LoraConfig.from_peft(adapter.config)
    manifest = _manifest(directory)
    base = _base(directory, under_pefts_names(adapter), config, manifest, catalog, registry)
    if not _needs(base.decoder.config, adapter.tensors):
        adapter = under_pefts_names(adapter)
    registry.check_adapter(name, base, adapter.config, adapter.tensors)

    def serve(version: AdapterVersion) -> None:
        try:
            registry.load_adapter(version.id)
        except BaseException:
            registry.delete_adapter(version.id)
            raise

    return store.import_peft(name, adapter, manifest | {"base_model": base.id, "base_digest": base.digest}, serve)


def _base(
    directory: Path,
    adapter: PeftFiles,
    config: LoraConfig,
    manifest: Json,
    catalog: Catalog,
    registry: ModelRegistry,
) -> LoadedModel:
    """The base it was trained on: by the digest of the weights if fortwo saved the adapter, else by its name."""
    if (digest := manifest.get("base_digest")) is not None:
        try:
            return registry.base_of(TrainedOn(str(directory), str(manifest["base_model"]), str(digest)))
        except InvalidAdapter as error:
            error.param = "lora_path"
            raise
    named = adapter.config.get("base_model_name_or_path")
    ids = bases_named(named, catalog.entries()) if isinstance(named, str) and named else []
    if len(ids) == 1:
        return registry.load_base(ids[0])
    if ids:
        problem = f"was trained on {named!r}, which may be any of the bases {', '.join(ids)} here"
    elif named is None or named == "":
        problem = "does not say on which base it was trained (base_model_name_or_path is not given)"
    else:
        problem = f"was trained on {named!r}, which is not a base model here"
    fitting = [id for id in ids or _ids(catalog) if _fits(id, adapter, config, catalog)]
    raise InvalidAdapter(
        f"{directory} {problem}.",
        param="lora_path",
        hint=f"Set base_model_name_or_path in its {CONFIG} to the base it was trained on. By shape it fits: "
        f"{', '.join(fitting)}."
        if fitting
        else "No prepared base here has its shapes. Add the base it was trained on: fortwo models add ID PATH",
    )


def _ids(catalog: Catalog) -> list[str]:
    return [entry.id for entry in catalog.entries()]


def _fits(id: str, adapter: PeftFiles, config: LoraConfig, catalog: Catalog) -> bool:
    """Whether the adapter's tensors have the shapes that a base on disk needs."""
    info = catalog.model_info(id)
    source = Path(catalog.get(id).source.partition(":")[2])
    folder = source if info is None else info.directory
    try:
        decoder = DecoderConfig.from_hf(json.loads((folder / "config.json").read_text("utf-8")))
        check_shapes(config, decoder, adapter.tensors)
    except (InvalidAdapter, UnsupportedModel, OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _needs(network: Shape, names: Iterable[str]) -> bool:
    """Whether all these names are PEFT's names of tensors for modules of the network."""
    modules = [name for names in network.groups.values() for name in names]
    known = {
        f"base_model.model.{network.module_name(layer, module)}.{tensor}"
        for layer in range(network.layers)
        for module in modules
        if network.has(layer, module)
        for tensor in ("lora_A.weight", "lora_B.weight", MAGNITUDE)
    }
    return known.issuperset(names)


def _manifest(directory: Path) -> Json:
    """What fortwo wrote beside an adapter that it published; empty for an adapter from elsewhere."""
    path = directory / MANIFEST
    if not path.is_symlink() and not path.exists():
        return {}
    manifest = parse_config(read_file(path), path)
    return manifest if {"base_model", "base_digest"} <= manifest.keys() else {}
