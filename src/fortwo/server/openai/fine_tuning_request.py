"""OpenAI's request for a fine-tuning job, and the request for training that it means. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fortwo.errors import FortwoError, InvalidRequest
from fortwo.jobs.fine_tuned_models import slug
from fortwo.records import Json
from fortwo.server.openai.parameters import Strict, at_most, only
from fortwo.train.request import TrainingRequest

METADATA = 16  # pairs
SUFFIX = 64  # characters
LONGEST_NAME = 128

Auto = Literal["auto"]
Text64 = Annotated[str, Field(max_length=64)]
Text512 = Annotated[str, Field(max_length=512)]


class Hyperparameters(Strict):
    """ "auto" is as if a value were not given."""

    n_epochs: Auto | Annotated[int, Field(ge=1)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="It multiplies the rate that the plan would choose."
    )

    def given(self) -> Json:
        """The numbers that are given, under their names."""
        return {name: value for name, value in self if value not in (None, "auto")}


class DpoHyperparameters(Hyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Supervised(Strict):
    hyperparameters: Hyperparameters | None = None


class Dpo(Strict):
    hyperparameters: DpoHyperparameters | None = None


class Method(Strict):
    """How the model is trained: "supervised", or "dpo" on rows of preferences."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        other = {"supervised": "dpo", "dpo": "supervised"}.get(self.type)
        if other is None:
            raise InvalidRequest(
                f"method.type = {self.type!r} is not supported.",
                param="method.type",
                hint='Give the method "supervised" or "dpo", or leave it out.',
                code="unsupported_parameter",
            )
        if getattr(self, other) is not None:
            raise InvalidRequest(
                f"method.{other} is given, but method.type is {self.type!r}.",
                param=f"method.{other}",
                hint=f"Leave it out, or give the type {other!r}.",
            )
        return self

    def given(self) -> Json:
        """The numbers that are given, under their names."""
        options = self.dpo if self.type == "dpo" else self.supervised
        return {} if options is None or options.hyperparameters is None else options.hyperparameters.given()


class JobRequest(Strict):
    """objective, facts, lora_config, training_config and adapter_name are fortwo's own; they mean what they mean in
    /api/training/start."""

    model: str = Field(min_length=1, description="A base model, or a fine-tuned model to go on from.")
    training_file: str | None = Field(None, min_length=1, description="Id of an uploaded file; or give facts.")
    validation_file: str | None = Field(
        None, min_length=1, description="Id of an uploaded file, whose rows are evaluated and never trained on."
    )
    suffix: str | None = Field(None, min_length=1, max_length=SUFFIX)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    metadata: Annotated[dict[Text64, Text512], at_most(METADATA)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="Deprecated by OpenAI; use method.")
    integrations: Annotated[Any, only([])] = None

    objective: Any = None
    facts: list[Any] | None = None
    lora_config: Json | None = None
    training_config: Json | None = None
    adapter_name: str | None = Field(None, min_length=1, description="Default: the suffix, or ft-MODEL.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.training_file is None) == (self.facts is None):
            both = "training_file and facts are both given" if self.facts is not None else "training_file is missing"
            raise InvalidRequest(
                f"{both}.",
                param="training_file",
                hint="Give the id of an uploaded file, or facts; exactly one of them.",
            )
        if self.suffix is not None and not slug(self.suffix):
            raise InvalidRequest(
                f"suffix = {self.suffix!r} has no letter and no digit.", param="suffix", hint="Choose another suffix."
            )
        older = {} if self.hyperparameters is None else self.hyperparameters.given()
        newer = self._of_method()
        for name in older.keys() & newer.keys():
            if older[name] != newer[name]:
                raise InvalidRequest(
                    f"hyperparameters.{name} = {older[name]} and method.supervised.hyperparameters.{name} = "
                    f"{newer[name]} contradict each other.",
                    param=f"hyperparameters.{name}",
                    hint="Give only method.",
                )
        return self

    def _of_method(self) -> Json:
        return {} if self.method is None else self.method.given()

    def hyperparameters_given(self) -> Json:
        older = {} if self.hyperparameters is None else self.hyperparameters.given()
        return older | self._of_method()

    def record(self) -> Json:
        """What is stored with the job: what its object repeats."""
        fields = ("model", "training_file", "validation_file", "suffix", "seed", "metadata")
        method = "supervised" if self.method is None else self.method.type
        given = {"method": method, "hyperparameters": self.hyperparameters_given()}
        return {name: getattr(self, name) for name in fields} | given


_TRAINING_KEYS = {"n_epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}


def training_request(asked: JobRequest, parent: str | None) -> TrainingRequest:
    """The request for training that a request for a fine-tuning job means. parent: the adapter that `model` names; None
    for a base. Raises InvalidRequest for two values of one setting, and pydantic's ValidationError."""
    config = dict(asked.training_config or {})
    settings = {
        _TRAINING_KEYS.get(name, name): (f"hyperparameters.{name}", value)
        for name, value in asked.hyperparameters_given().items()
    }
    if asked.seed is not None:
        settings["seed"] = ("seed", asked.seed)
    for key, (param, value) in settings.items():
        if key in config and config[key] != value:
            raise InvalidRequest(
                f"{param} = {value} and training_config.{key} = {config[key]!r} contradict each other.",
                param=f"training_config.{key}",
                hint="Give only one of them.",
            )
        config[key] = value
    objective = asked.objective
    if asked.method is not None and asked.method.type == "dpo":
        if objective not in (None, "dpo"):
            raise InvalidRequest(
                f"method.type = 'dpo' and objective = {objective!r} contradict each other.",
                param="objective",
                hint="Give only one of them.",
            )
        objective = "dpo"
    name = asked.adapter_name or slug(asked.suffix or "") or f"ft-{slug(asked.model.partition('@')[0])}"
    given = {
        "model": asked.model if parent is None else None,
        "parent": parent,
        "adapter_name": name[:LONGEST_NAME],
        "dataset": {"facts": asked.facts} if asked.training_file is None else {"file_id": asked.training_file},
        "validation_dataset": None if asked.validation_file is None else {"file_id": asked.validation_file},
        "lora_config": asked.lora_config,
        "training_config": config,
        "objective": objective,
    }
    return TrainingRequest.model_validate(given)


def check_method(asked: JobRequest, objective: str) -> None:
    """Raises InvalidRequest if the rows want another objective than an explicit method of supervised training."""
    if asked.method is not None and asked.method.type == "supervised" and objective in ("dpo", "kto", "orpo"):
        raise InvalidRequest(
            f"method.type = 'supervised', but training_file has rows of preferences, which are for {objective!r}.",
            param="method.type",
            hint='Give the method "dpo", or rows of messages.',
        )


_PARAMS = {"dataset.file_id": "training_file", "parent": "model"}
_HYPERPARAMETERS = {f"training_config.{key}": f"hyperparameters.{name}" for name, key in _TRAINING_KEYS.items()}


def renamed(error: FortwoError, asked: JobRequest) -> FortwoError:
    """The same error with its field named as OpenAI's request names it."""
    param = error.param or ""
    if asked.validation_file is not None:
        error.message = _with_files(error.message)
        error.hint = None if error.hint is None else _with_files(error.hint)
    own = asked.training_config or {}
    if param in _PARAMS:
        error.param = _PARAMS[param]
    elif param.startswith("validation_dataset"):
        error.param = "validation_file"
    elif param.startswith("dataset") and asked.training_file is not None:
        error.param = "training_file"
    elif param == "adapter_name" and asked.adapter_name is None:
        error.param = "model" if asked.suffix is None else "suffix"
    elif param in _HYPERPARAMETERS and param.partition(".")[2] not in own:
        error.param = _HYPERPARAMETERS[param]
    elif param == "training_config.learning_rate_multiplier" and "learning_rate_multiplier" not in own:
        error.param = "hyperparameters.learning_rate_multiplier"
    return error


def _with_files(text: str) -> str:
    """A text about the two datasets of a request as one about its two files."""
    text = re.sub(r"\bvalidation_dataset(\.file_id)?\b", "validation_file", text)
    return re.sub(r"(^|; )dataset(\.file_id)?(?=: | )", r"\1training_file", text)
