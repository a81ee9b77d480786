"""The body of /api/training/start and /api/training/plan, as it arrives.

Shapes only: `lora_config` and `training_config` stay plain dictionaries here; `train.options` checks them key by key,
because PEFT's and transformers' keys deserve better answers than "extra inputs are not permitted".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Targets(_Strict):
    """What the served adapter must reach, as shares; a metric left out takes the objective's own target."""

    efficacy: Share | None = None
    paraphrase: Share | None = None
    specificity: Share | None = None
    retention: Share | None = None

    def given(self) -> dict[str, float]:
        return self.model_dump(exclude_none=True)


class Objective(_Strict):
    type: Literal["auto", "sft", "override"] = "auto"
    targets: Targets = Targets()


def _spelt_out(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


class TrainingRequest(_Strict):
    """`model` None means the server's default model. An objective may be given by its name alone."""

    model: str | None = Field(
        None, min_length=1, description="Id of the base model; default: the server's default model."
    )
    adapter_name: str = Field(min_length=1, description="Name under which the adapter is published.")
    dataset: dict[str, Any] = Field(description='One of {"path"}, {"file_id"}, {"examples"}, {"facts"}.')
    lora_config: dict[str, Any] = Field({}, description="Keys of PEFT's LoraConfig.")
    training_config: dict[str, Any] = Field({}, description="Keys of transformers' TrainingArguments.")
    parent: str | None = Field(
        None, min_length=1, description="Adapter, or adapter@version, that the run goes on from; its facts are kept."
    )
    objective: Annotated[
        Objective,
        BeforeValidator(_spelt_out, json_schema_input_type=Literal["auto", "sft", "override"] | Objective),
    ] = Objective()
