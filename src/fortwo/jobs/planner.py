"""Plans requests for training: reads the dataset, finds base and parent, counts tokens, and decides every setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from fortwo.adapters.refs import check_name
from fortwo.data import datasets
from fortwo.data.findings import in_each
from fortwo.data.preview import check_row_length
from fortwo.engine.base_choice import TrainedOn
from fortwo.errors import InvalidRequest
from fortwo.facts.subject import facts_of
from fortwo.jobs import parents
from fortwo.jobs.machine import Trials, machine_of, try_out
from fortwo.jobs.workers import TrainingCluster, planned_workers
from fortwo.records import Dataset, Example, Plan
from fortwo.settings import Settings
from fortwo.train import plan as plans
from fortwo.train.adapter import lora_config
from fortwo.train.dataset_stats import ValidationStats, collect_stats, shared_rows
from fortwo.train.parent import Parent
from fortwo.train.request import TrainingRequest

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore
    from fortwo.engine.engine import Engine
    from fortwo.engine.registry import LoadedModel, ModelRegistry
    from fortwo.hub.catalog import Catalog
    from fortwo.jobs.files import FileStore
    from fortwo.jobs.store import JobStore


class JobPlanner:
    """For any thread."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        adapters: AdapterStore,
        engine: Engine,
        registry: ModelRegistry,
        store: JobStore,
        files: FileStore,
        cluster: TrainingCluster | None = None,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._adapters = adapters
        self._engine = engine
        self._registry = registry
        self._store = store
        self._files = files
        self._cluster = cluster
        self._trials = Trials()

    def plan(self, request: TrainingRequest, check: Callable[[], None]) -> tuple[Dataset, Plan]:
        """The dataset and the plan of a request. Raises InvalidRequest naming field, value and remedy. check: called
        between rows; it may raise to end the planning."""
        check_name_available(request.adapter_name, self._catalog)
        self._adapters.check_publishable(request.adapter_name)
        workers = planned_workers(request.workers, self._cluster)
        folders = self._settings.allowed_data_dirs
        read = in_each(request.datasets, lambda one: datasets.load(*self._files.source(one, folders, check), check))
        dataset = replace(read["dataset"], validation=read.get("validation_dataset"))
        parent, resident = self._parent_and_base(request)
        if parent is not None:
            dataset = replace(dataset, parent_facts=parent.facts_to_keep(facts_of(dataset)))
        cache = resident.runner.cache
        base = plans.BaseFacts.of(resident.id, resident.decoder, cache.bound, cache.dtype.itemsize)
        device = self._registry.training_engine
        trial = self._trials.of(resident.digest, lambda: device.call(lambda: try_out(resident.backend)).result())
        machine = machine_of(trial, self._store.last_actual(resident.id))

        def rows(one: Dataset) -> Iterator[Example]:
            for example in datasets.checked(plans.training_rows(one), check):
                check_row_length(example, resident.renderer, base.context)
                yield example

        stats = in_each(read, lambda one: collect_stats(resident.renderer, rows(one)))
        validation = None
        if dataset.validation is not None:
            own, trained = (datasets.checked(plans.training_rows(one), check) for one in (dataset.validation, dataset))
            validation = ValidationStats(*stats["validation_dataset"], shared_rows(own, trained))
        counts, dataset_warnings = stats["dataset"]
        plan = plans.resolve(request, dataset, base, counts, machine, dataset_warnings, parent, validation, workers)
        self._engine.check_lora(f"The adapter {request.adapter_name!r}", lora_config(plan))
        warnings = (*resident.renderer.warnings, *plan.warnings)
        return dataset, replace(plan, warnings=warnings, origins=self._files.origins(read))

    def _parent_and_base(self, request: TrainingRequest) -> tuple[Parent | None, LoadedModel]:
        """The parent that the request names, if any, and the base to train on, which must be the parent's own."""
        model = self._settings.default_model if request.model is None else request.model
        if request.parent is None:
            return None, self._registry.training_base(model)
        version, parent = parents.resolve_parent(request.parent, self._adapters)
        if request.model is None:
            return parent, self._registry.training_base(self._registry.base_of(TrainedOn.of(version)).id)
        resident = self._registry.training_base(model)
        if not resident.taught(version):
            raise InvalidRequest(
                f"parent = {version.id!r} was trained on {version.base_model!r} with digest {version.base_digest}; "
                f"model = {model!r} has digest {resident.digest}",
                param="parent",
                hint="Omit `model`: then the parent's own base is used.",
            )
        return parent, resident


def check_name_available(name: str, catalog: Catalog) -> None:
    """Raises InvalidRequest when an adapter cannot have this name, for example because a base model has it."""
    check_name(name)
    if name in (entry.id for entry in catalog.entries()):
        raise InvalidRequest(
            f"adapter_name = {name!r} is the id of a base model.", param="adapter_name", hint="Choose another name."
        )
