"""The body of /api/training/start and /api/training/plan.

`lora_config` and `training_config` stay plain dictionaries here. `train.options` checks their keys one by one, so that
a key of PEFT or transformers gets a better answer than "extra inputs are not permitted".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_WORKERS = 1024
Share = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]


class _Strict(BaseModel):
    """A field that is null is as if it were not given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Targets(_Strict):
    """The shares, from 0 to 1, that the served adapter must reach. A missing metric has the objective's default."""

    efficacy: Share | None = None
    paraphrase: Share | None = None
    specificity: Share | None = None
    retention: Share | None = None
    accuracy: Share | None = None

    def given(self) -> dict[str, float]:
        """The targets that the request gives, by metric."""
        return self.model_dump(exclude_none=True)


class Objective(_Strict):
    """The objective and its targets; auto lets the plan choose."""

    type: Literal["auto", "sft", "override", "dpo", "kto", "orpo"] = "auto"
    targets: Targets = Targets()


def _from_name(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


class TrainingRequest(_Strict):
    """A request to plan or start a run. The objective may be given as its name alone."""

    model: str | None = Field(
        None, min_length=1, description="Id of the base model; default: the server's default model."
    )
    adapter_name: str = Field(min_length=1, description="Name under which the adapter is published.")
    dataset: dict[str, Any] = Field(description='One of {"path"}, {"file_id"}, {"hub"}, {"examples"}, {"facts"}.')
    validation_dataset: dict[str, Any] | None = Field(
        None,
        description='One of {"path"}, {"file_id"}, {"hub"}, {"examples"}; instead of validation_split. '
        "Its rows are evaluated.",
    )
    lora_config: dict[str, Any] = Field({}, description="Keys of PEFT's LoraConfig.")
    training_config: dict[str, Any] = Field({}, description="Keys of transformers' TrainingArguments.")
    parent: str | None = Field(
        None, min_length=1, description="Adapter, or adapter@version, to start from; its facts are preserved."
    )
    workers: Annotated[int, Field(ge=1, le=MOST_WORKERS, strict=True)] | None = Field(
        None, description="Workers of a Ray cluster that compute the gradients; more than 1 needs FORTWO_TRAIN=ray."
    )
    effort: Literal["normal", "max"] = Field("normal", description="max: a larger rank and more steps.")
    objective: Annotated[
        Objective,
        BeforeValidator(
            _from_name, json_schema_input_type=Literal["auto", "sft", "override", "dpo", "kto", "orpo"] | Objective
        ),
    ] = Objective()

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """The sources of rows that the request gives, by field."""
        given = {"dataset": self.dataset}
        return given if self.validation_dataset is None else given | {"validation_dataset": self.validation_dataset}

    @property
    def file_ids(self) -> dict[str, str]:
        """The uploaded files that the request names, by field."""
        return {name: source["file_id"] for name, source in self.datasets.items() if "file_id" in source}
