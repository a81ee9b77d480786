"""The request of a job again, from its plan and its rows, so that the next try may change it."""

from __future__ import annotations

import json
from typing import Any

from fortwo.records import Json
from fortwo.train.options import LORA_KEYS, TRAINING_KEYS

_RESOLVED = {"learning_rate_multiplier": "learning_rate", "warmup_steps": "warmup_ratio"}  # the second follows


def request_of(plan: Json, dataset: Json) -> Json:
    """The body of /api/training/start that makes the same plan. plan, dataset: as a job stores them. Settings that were
    given as shares are numbers of steps here."""
    given = {one["name"]: one["value"] for one in plan["settings"] if one["origin"] == "user"}
    for name, follows in _RESOLVED.items():
        if name in given:
            given.pop(follows, None)
    body: Json = {"model": plan["model"], "adapter_name": plan["adapter_name"], "dataset": source_of(dataset)}
    if "validation" in dataset:
        body["validation_dataset"] = source_of(dataset["validation"])
    for section, keys in (("lora_config", LORA_KEYS), ("training_config", TRAINING_KEYS)):
        if own := {name: given[name] for name in keys if name in given}:
            body[section] = own
    body |= {name: given[name] for name in ("parent", "effort") if name in given}
    targets = {name.removeprefix("targets."): value for name, value in given.items() if name.startswith("targets.")}
    if "objective" in given or targets:
        body["objective"] = {"type": given.get("objective", "auto")} | ({"targets": targets} if targets else {})
    return body


def source_of(dataset: Json) -> Json:
    """The rows that a job stores as the `dataset` of a request; of a large file its path."""
    if "file" in dataset:
        file = dataset["file"]
        return {"path": file["path"]} | ({"columns": file["columns"]} if "columns" in file else {})
    if dataset["facts"]:
        return {"facts": [{name: value for name, value in fact.items() if value} for fact in dataset["facts"]]}
    return {"examples": [_row(example) for example in dataset["examples"]]}


def _row(example: Json) -> Json:
    if example["text"] is not None:
        return {"text": example["text"]}
    messages = [_message(one) for one in example["messages"]]
    if example["rejected"]:
        return {"chosen": messages, "rejected": [_message(one) for one in example["rejected"]]}
    if example["label"] is not None:
        return {"prompt": messages[:-1], "completion": messages[-1:], "label": example["label"]}
    tools = example["messages"][0].get("tools")
    return {"messages": messages} | ({"tools": json.loads(tools)} if tools else {})


def _message(stored: Json) -> Json:
    message: dict[str, Any] = {"role": stored["role"], "content": stored["content"]}
    if not stored["weight"]:
        message["weight"] = 0
    message |= {key: stored[key] for key in ("name", "tool_call_id") if stored.get(key)}
    return message | ({"tool_calls": json.loads(stored["tool_calls"])} if stored.get("tool_calls") else {})
