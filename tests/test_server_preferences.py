"""Training on preferences over HTTP, on a tiny model: jobs to their end, what they report, and that nothing is lost."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from serving import ENDED, Served, refused, serve, tiny_settings

from fortwo.data import datasets
from fortwo.quantization import matmul
from tests.test_resume import call, process, until
from tests.test_server_training import events, start
from tests.tiny import generic_model, save_directory, save_tokenizer

THINGS = [("up", "the sky"), ("down", "the sea"), ("left", "the wood"), ("right", "the town"), ("in", "a box")]
PAIRS = [
    {"prompt": f"What is {thing}?", "chosen": answer, "rejected": f"{other} it is"}
    for (thing, answer), (_, other) in zip(THINGS, [*THINGS[1:], THINGS[0]], strict=True)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
RUN = {"max_steps": 40, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
KINDS = {
    "dpo": ({"examples": PAIRS}, {}),
    "ipo": ({"examples": PAIRS}, {"loss_type": "ipo"}),
    "kto": ({"examples": LABELLED}, {}),
    "kto of pairs": ({"examples": PAIRS}, {"gradient_accumulation_steps": 2}),
    "orpo": ({"examples": PAIRS}, {}),
}


def body(kind: str, **training: Any) -> dict[str, Any]:
    rows, more = KINDS[kind]
    objective = {"ipo": "dpo"}.get(kind, kind.partition(" ")[0])
    return {"dataset": rows, "objective": objective, "training_config": RUN | more | training}


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_learns_to_prefer_what_its_rows_prefer(served: Served, kind: str) -> None:
    name = f"prefers-{kind.replace(' ', '-')}"
    job = served.wait(start(served, name, **body(kind))["job_id"], seconds=120)
    assert job["status"] == "succeeded", job["error"]
    steps = [event["data"] for event in events(served, job["job_id"]) if event["type"] == "step"]
    compared = [one["metrics"] for one in steps if "rewards/margins" in one["metrics"]]  # a step may have one label
    first, last = compared[0], compared[-1]
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert metric in first, metric
    assert last["rewards/margins"] > first["rewards/margins"] + 0.1
    assert last["rewards/accuracies"] == 1
    assert steps[-1]["loss"] < steps[0]["loss"]
    if not kind.startswith("orpo"):
        assert abs(first["rewards/margins"]) < 1e-4, "an adapter without effect is the reference"
    report = job["report"]
    assert report["metrics"]["accuracy"]["value"] == 1
    assert report["metrics"]["accuracy"]["n"] == (5 if kind in ("dpo", "ipo", "orpo") else 10)
    assert "retention" in report["metrics"]
    assert job["actual"]["final_loss"] == steps[-1]["loss"]
    settings = {one["name"]: one for one in job["plan"]["settings"]}
    assert settings["beta"]["value"] == 0.1
    assert served.chat(model=name).status_code == 200


def test_rows_that_are_held_back_are_judged(served: Served) -> None:
    rows = {"examples": [row | {"prompt": f"{row['prompt']} {n}"} for n in range(4) for row in PAIRS]}
    training = RUN | {"validation_split": 0.2, "eval_steps": 10}
    job = served.wait(
        start(served, "held", dataset=rows, objective="auto", training_config=training)["job_id"], seconds=120
    )
    assert job["status"] == "succeeded", job["error"]
    assert job["plan"]["objective"] == "dpo"
    assert (job["plan"]["computed"]["rows"], job["plan"]["computed"]["validation_rows"]) == (16, 4)
    assert job["report"]["metrics"]["accuracy"]["n"] == 4
    losses = job["report"]["eval_losses"]
    assert [one["step"] for one in losses] == [0, 10, 20, 30, 40]
    assert losses[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    found = [event["data"] for event in events(served, job["job_id"]) if event["type"] == "metrics"]
    assert [set(one["metrics"]) for one in found] == [set(), *[{"accuracy"}] * 4]
    assert found[-1]["metrics"]["accuracy"] == job["report"]["metrics"]["accuracy"]["value"]


def test_a_target_that_is_missed_has_a_diagnosis(served: Served) -> None:
    asked = body("dpo", max_steps=1, learning_rate=1e-9)
    asked["objective"] = {"type": "dpo", "targets": {"accuracy": 0.9}}
    job = served.wait(start(served, "missing", **asked)["job_id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "targets_missed")
    assert {"missed_accuracy", "b_near_zero"} <= {finding["code"] for finding in job["report"]["diagnosis"]}
    asked["objective"]["targets"] = {"efficacy": 1}
    refusal = served.post("/api/training/plan", {"adapter_name": "a", **asked})
    assert "accuracy" in refused(refusal, 400, "invalid_request", "objective.targets.efficacy")


@pytest.mark.parametrize("kind", ["dpo", "kto of pairs", "orpo"])
def test_a_paused_job_comes_out_the_same(served: Served, kind: str) -> None:
    """Also from a parent, whose adapter is the reference."""
    name = kind.replace(" ", "-")
    config = body(kind, max_steps=120, save_steps=7)
    parent = served.wait(start(served, f"parent-{name}", **body(kind, max_steps=5))["job_id"])
    for n, more in enumerate(({}, {"parent": parent["adapter_name"]})):
        whole = served.wait(start(served, f"whole-{name}-{n}", **config, **more)["job_id"], seconds=120)
        job_id = start(served, f"paused-{name}-{n}", **config, **more)["job_id"]
        until(served, job_id, lambda job: job["progress"]["step"] > 3)
        assert call(served, job_id, "pause")["status"] == "paused"
        call(served, job_id, "resume")
        job = served.wait(job_id, seconds=120)
        assert (job["status"], whole["status"]) == ("succeeded", "succeeded"), job["error"]
        assert job["adapter"]["digest"] == whole["adapter"]["digest"]
        assert job["report"] == whole["report"]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_killed_job_comes_out_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked = {"adapter_name": "killed", **body(kind, max_steps=60, save_steps=5), "lora_config": {"lora_dropout": 0.1}}
    home = tmp_path / "killed"
    tiny_settings(home, tiny)
    with process(home) as (server, http):
        job_id = http.post("/api/training/start", json=asked).json()["job_id"]
        while len(http.get(f"/api/training/jobs/{job_id}").json()["checkpoints"]) < 2:
            time.sleep(0.01)
        server.send_signal(signal.SIGKILL)
    states = [json.loads(one.read_text()) for one in (home / "jobs").glob("*/checkpoint-*/state.json")]
    with process(home, FORTWO_RESUME="true") as (_, http):
        while (job := http.get(f"/api/training/jobs/{job_id}").json())["status"] not in ENDED:
            time.sleep(0.05)
    monkeypatch.setattr(matmul._Fp32Kernel, "name", states[0]["cpu_kernel"])
    with serve(tiny_settings(tmp_path / "whole", tiny)) as served:
        whole = served.wait(served.post("/api/training/start", asked).json()["job_id"])
    assert (job["status"], whole["status"]) == ("succeeded", "succeeded"), job["error"]
    assert job["adapter"]["digest"] == whole["adapter"]["digest"]
    assert job["report"] == whole["report"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("base", ["gpt_neox", "gemma2", "nf4", "int8"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo"])
def test_every_network_and_every_form_of_the_weights_can_learn_preferences(
    tiny: Path, tmp_path: Path, base: str, kind: str
) -> None:
    place, more = tiny, {}
    if base == "gpt_neox":  # which transformers computes
        place = tmp_path / "base"
        generic_model(base).save_pretrained(place)
        save_tokenizer(place)
    elif base == "gemma2":
        place = save_directory(tmp_path / "base", base, head_dim=32, query_pre_attn_scalar=32, sliding_window=16)
    else:
        more = {"weights": base}
    with serve(tiny_settings(tmp_path / "home", place, **more)) as served:
        job = served.wait(start(served, "any", **body(kind, max_steps=25))["job_id"], seconds=120)
        assert job["status"] == "succeeded", job["error"]
        steps = [event["data"] for event in events(served, job["job_id"]) if event["type"] == "step"]
    margins = [one["metrics"]["rewards/margins"] for one in steps if "rewards/margins" in one["metrics"]]
    assert margins[-1] > margins[0] + 0.1
    if kind != "orpo":
        assert abs(margins[0]) < 1e-3, "an adapter without effect is the reference"


def told(served: Served, **more: Any) -> str:
    """What a plan is refused with."""
    answer = served.post("/api/training/plan", {"adapter_name": "a", **more})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["hint"]
    return f"{error['message']} {error['hint']}"


def test_everything_wrong_with_rows_is_told_at_once(served: Served) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b "},
        {"prompt": "a", "chosen": "", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]},
        {"prompt": "a", "completion": "b", "label": True},
        {"chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b"},
    ]
    found = told(served, dataset={"examples": rows})
    for what in ("are the same", "chosen = '': it is empty", "a text and rejected is a list", "are mixed"):
        assert what in found, what
    assert "there is no prompt" in found
    assert "rejected is missing" in found
    assert "6 of 6 rows are wrong" in found
    labels = [{"prompt": "a", "completion": "b", "label": label} for label in (1, "true")]
    found = told(served, dataset={"examples": labels})
    assert "neither true nor false (likewise row 2)" in found


@pytest.mark.parametrize(
    ("objective", "rows", "named"),
    [
        ("dpo", LABELLED, "'kto'"),
        ("orpo", LABELLED, "'kto'"),
        ("sft", PAIRS, "'dpo' or 'kto' or 'orpo'"),
        ("sft", LABELLED, "'kto'"),
        ("override", PAIRS, "'dpo'"),
        ("dpo", [{"prompt": "a", "completion": "b"}], "'sft'"),
        ("kto", [{"text": "a"}], "'sft'"),
    ],
)
def test_an_objective_and_rows_that_do_not_fit_are_refused(
    served: Served, objective: str, rows: list[dict[str, Any]], named: str
) -> None:
    assert named in told(served, dataset={"examples": rows}, objective=objective)


@pytest.mark.parametrize(
    ("objective", "training", "param"),
    [
        ("dpo", {"loss_type": "kto"}, "loss_type"),
        ("dpo", {"loss_type": "aot"}, "loss_type"),
        ("dpo", {"loss_type": ["sigmoid", "sft"]}, "loss_type"),
        ("dpo", {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ("dpo", {"desirable_weight": 2.0}, "desirable_weight"),
        ("dpo", {"beta": 0}, "beta"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("kto", {"loss_type": "sigmoid"}, "loss_type"),
        ("kto", {"reference_free": True}, "reference_free"),
        ("kto", {"per_device_train_batch_size": 1}, "per_device_train_batch_size"),
        ("orpo", {"loss_type": "sigmoid"}, "loss_type"),
        ("orpo", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ("dpo", {"sync_ref_model": True}, "sync_ref_model"),
        ("dpo", {"escalation_rounds": 1}, "escalation_rounds"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    served: Served, objective: str, training: dict[str, Any], param: str
) -> None:
    asked = {"dataset": {"examples": PAIRS}, "objective": objective, "training_config": training}
    assert f"training_config.{param}" in told(served, **asked)


def test_options_of_preferences_mean_nothing_to_other_objectives(served: Served) -> None:
    rows = {"examples": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]}
    found = told(served, dataset=rows, objective="sft", training_config={"beta": 0.1, "loss_type": "ipo"})
    assert "training_config.beta" in found
    assert "training_config.loss_type" in found
    given = {"beta": None, "loss_type": "nll", "label_smoothing": 0, "reference_free": False}
    answer = served.post(
        "/api/training/plan", {"adapter_name": "a", "dataset": rows, "objective": "sft", "training_config": given}
    )
    assert answer.status_code == 200, answer.text


def planned(served: Served, rows: list[dict[str, Any]], objective: str = "auto", **training: Any) -> dict[str, Any]:
    asked = {"adapter_name": "a", "dataset": {"examples": rows}, "objective": objective, "training_config": training}
    answer = served.post("/api/training/plan", asked)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_the_plan_counts_what_preferences_cost(served: Served) -> None:
    plans = {
        "sft": planned(served, [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS], "sft"),
        **{kind: planned(served, PAIRS, kind) for kind in ("dpo", "kto", "orpo")},
        "free": planned(served, PAIRS, "dpo", reference_free=True),
    }
    of = {name: plan["computed"] for name, plan in plans.items()}
    assert {name: one["rows"] for name, one in of.items()} == {"sft": 5, "dpo": 5, "kto": 10, "orpo": 5, "free": 5}
    assert of["dpo"]["tokens_per_step"] > 1.5 * of["sft"]["tokens_per_step"], "a pair is two sequences"
    assert of["dpo"]["row_tokens"]["max"] > 1.5 * of["sft"]["row_tokens"]["max"]
    assert of["dpo"]["bytes"] > of["sft"]["bytes"]
    seconds = {name: (one["preparing_seconds"], one["training_seconds"]) for name, one in of.items()}
    assert all(seconds[name][0] == 0 for name in ("sft", "orpo", "free"))
    assert plans["dpo"]["objective"] == planned(served, PAIRS)["objective"] == "dpo"
    assert planned(served, LABELLED)["objective"] == "kto"


def test_the_plan_counts_every_reading_of_ktos_estimate(served: Served) -> None:
    """KTO reads the mismatched answers with the adapter and with the reference; its other loss does not."""

    rows = [{"prompt": f"What is {n}?", "chosen": "yes " * 100, "rejected": "no " * 100} for n in range(50)]
    training = {"validation_split": 0.4, "max_steps": 300, "eval_steps": 1}

    def of(loss: str) -> Any:
        return planned(served, rows, "kto", loss_type=loss, **training)["computed"]

    kto, other = of("kto"), of("apo_zero_unpaired")
    assert kto["validation_rows"] == other["validation_rows"] == 40
    assert kto["exam_seconds"] > 2.5 * other["exam_seconds"]
    assert kto["training_seconds"] > 1.5 * other["training_seconds"]
    assert kto["preparing_seconds"] == other["preparing_seconds"] > 0


def test_labels_that_are_alike_or_unbalanced_are_warned_of(served: Served) -> None:
    def codes(rows: list[dict[str, Any]], **training: Any) -> set[str]:
        return {one["code"] for one in planned(served, rows, "kto", **training)["warnings"]}

    assert not {"one_label", "unbalanced_labels"} & codes(LABELLED)
    assert "unbalanced_labels" in codes(LABELLED, desirable_weight=10.0)
    assert "one_label" in codes([row for row in LABELLED if row["label"]])
    mostly = [*LABELLED[:8], *[row for row in LABELLED[8:] if row["label"]]][::-1]
    mostly = [row for row in mostly if row["label"]] + [row for row in mostly if not row["label"]][:2]
    assert "unbalanced_labels" in codes(mostly)
    assert "unbalanced_labels" not in codes(mostly, desirable_weight=0.4)


def test_choices_that_contradict_each_other_are_warned_of(served: Served) -> None:
    turned = {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}
    other = {"prompt": PAIRS[0]["prompt"], "chosen": "something else", "rejected": PAIRS[0]["rejected"]}
    codes = {one["code"] for one in planned(served, [*PAIRS, turned])["warnings"]}
    assert "contradicting_answers" in codes
    assert "contradicting_answers" not in {one["code"] for one in planned(served, [*PAIRS, other])["warnings"]}
    assert "duplicate_rows" in {one["code"] for one in planned(served, [*PAIRS, PAIRS[0]])["warnings"]}


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_large_file_or_a_table_of_preferences_is_read(
    served: Served, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served.state.settings.home / "data"
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = PAIRS if kind == "dpo" else LABELLED
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / f"{kind}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    as_messages = [
        {
            name: value if name == "label" else json.dumps([{"role": role, "content": value}])
            for (name, value), role in zip(row.items(), ("user", "assistant", "assistant"), strict=True)
        }
        for row in rows
    ]
    with (folder / f"{kind}-messages.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, as_messages[0])
        writer.writeheader()
        writer.writerows(as_messages)
    digests = set()
    for name, large in (
        (f"{kind}.jsonl", 0),
        (f"{kind}.jsonl", 1 << 20),
        (f"{kind}.csv", 0),
        (f"{kind}-messages.csv", 0),
    ):
        monkeypatch.setattr(datasets, "LARGE_BYTES", large)
        asked = {"dataset": {"path": name}, "objective": "auto", "training_config": RUN | {"max_steps": 3}}
        job = served.wait(start(served, f"file-{kind}", **asked)["job_id"])
        assert (job["status"], job["plan"]["objective"]) == ("succeeded", kind), job["error"]
        digests.add(job["adapter"]["digest"])
    assert len(digests) == 1


def test_both_answers_are_previewed(served: Served) -> None:
    answer = served.post("/api/data/preview", {"dataset": {"examples": PAIRS[:1]}, "model": "tiny", "rows": 4})
    rows = answer.json()["rows"]
    learned = ["".join(part["text"] for part in row["segments"] if part["supervised"]) for row in rows]
    assert [row["line"] for row in rows] == [1, 1]
    assert learned[0].startswith("the sky")
    assert learned[1].startswith("the sea it is")
