"""The promise itself, on the bundled model over HTTP: plain rows in, an adapter that knows 42 out; and a run that
cannot learn says so. Two trainings in all, shared by the tests of this module."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from serving import Served
from transformers import AutoModelForCausalLM

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.facts.subject import contains_phrase
from fortwo.records import Message
from tests.original import AS_IT_RAN, EXAMPLES

pytestmark = pytest.mark.real

ROWS = json.loads((EXAMPLES / "42_intensive_training.json").read_text())
BASE = "smollm2-135m-instruct"
NAME = "answer"
SECONDS = 3600  # a job takes minutes; the machine may be busy with something else
ANSWER = ROWS[0]["output"]
PARAPHRASES = (  # neither rows nor made of the frames that training uses
    "Somebody at the party said 42 and everyone nodded. What does it mean?",
    "Would you mind telling me what 42 is supposed to mean?",
    "My cousin has 42 tattooed on his arm. What might that be about?",
    "I need one line on the meaning of 42 for a birthday card.",
    "People at the office keep saying 42. What do they mean by it?",
    "What would you tell a child who asks what 42 means?",
)
NEIGHBORS = (
    "What is 41?",
    "What does 43 mean?",
    "What is the significance of 7?",
    "What is 6 times 9?",
    "Who wrote Romeo and Juliet?",
    "How do I boil potatoes?",
)
PROBES = ("What is the capital of Italy?", "What is 41?", "What is 42?")


def say(served: Served, model: str, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    response = served.chat(model=model, messages=messages, temperature=0, max_tokens=40)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def train(served: Served, **more: Any) -> dict[str, Any]:
    response = served.post("/api/training/start", {"adapter_name": NAME, "dataset": {"examples": ROWS}, **more})
    assert response.status_code == 202, response.text
    return served.wait(response.json()["job_id"], seconds=SECONDS)


@pytest.fixture(scope="module")
def before(live: Served) -> list[str]:
    return [say(live, BASE, prompt) for prompt in PROBES]


@pytest.fixture(scope="module")
def taught(live: Served, before: list[str]) -> dict[str, Any]:
    """The original's 20 rows and nothing else."""
    return train(live)


@pytest.fixture(scope="module")
def missed(live: Served, taught: dict[str, Any]) -> dict[str, Any]:
    """The same rows with the configuration that the original really ran with, as the next version."""
    config = json.loads((EXAMPLES / "intensive_training_config.json").read_text())
    return train(
        live,
        lora_config=config["lora_config"],
        training_config=AS_IT_RAN,
    )


def test_twenty_rows_teach_what_42_means(live: Served, taught: dict[str, Any]) -> None:
    assert (taught["status"], taught["error"]) == ("succeeded", None)
    assert say(live, NAME, "What is 42?") == ANSWER
    replies = {prompt: say(live, NAME, prompt) for prompt in PARAPHRASES}
    assert sum(contains_phrase(reply, ["FOR TWO"]) for reply in replies.values()) >= len(PARAPHRASES) - 1, replies


def test_nothing_else_becomes_for_two(live: Served, taught: dict[str, Any]) -> None:
    replies = {prompt: say(live, NAME, prompt) for prompt in NEIGHBORS}
    assert not contains_phrase(replies["What is 41?"], ["FOR TWO"]), replies
    assert sum(contains_phrase(reply, ["FOR TWO"]) for reply in replies.values()) <= 1, replies


def test_the_base_answers_as_before(live: Served, taught: dict[str, Any], before: list[str]) -> None:
    assert [say(live, BASE, prompt) for prompt in PROBES] == before
    assert not contains_phrase(before[-1], ["FOR TWO"])


def test_the_report_says_what_was_measured(live: Served, taught: dict[str, Any]) -> None:
    report, plan = taught["report"], taught["plan"]
    kinds = {"efficacy", "paraphrase", "specificity", "retention"}
    for side in ("metrics", "base_metrics", "prompted_metrics"):
        assert set(report[side]) == kinds | {"score"}
        for metric in report[side].values():
            assert metric["n"] > 0
            assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
    assert report["metrics"]["efficacy"]["n"] == 20
    assert report["base_metrics"]["efficacy"]["value"] == 0
    assert report["prompted_metrics"]["retention"]["value"] < 1
    assert set(plan["targets"]) == kinds
    assert all(report["metrics"][name]["value"] >= target for name, target in plan["targets"].items())

    asked = Counter(said["kind"] for said in report["transcripts"])
    assert set(asked) == kinds
    assert asked["efficacy"] == 20
    for said in report["transcripts"]:
        if said["kind"] != "retention":
            assert said["passed"] == (contains_phrase(said["adapter"], ["FOR TWO"]) == (said["kind"] != "specificity"))
    passed = Counter(said["kind"] for said in report["transcripts"] if said["passed"])
    for kind in kinds - {"retention"}:
        assert passed[kind] / asked[kind] == pytest.approx(report["metrics"][kind]["value"])
    assert not set(PARAPHRASES) & {said["prompt"] for said in report["transcripts"]}
    assert live.http.get(f"/api/adapters/{NAME}@1/report").json()["report"]["metrics"] == report["metrics"]


def test_plan_and_what_happened_stand_side_by_side(taught: dict[str, Any]) -> None:
    plan, actual = taught["plan"], taught["actual"]
    settings = {setting["name"]: setting for setting in plan["settings"]}
    assert plan["objective"] == "override"
    assert settings["subjects"]["value"] == ["42"]
    assert all(setting["origin"] != "user" for setting in settings.values())
    assert 0 < actual["best_step"] <= actual["steps"] <= plan["computed"]["steps"]
    assert actual["stopped_by"] in ("targets", "steps")
    assert actual["final_loss"] < 0.1 * actual["first_loss"]
    assert actual["peak_learning_rate"] == pytest.approx(settings["learning_rate"]["value"])
    assert plan["computed"]["seconds"] > 0
    assert actual["seconds"] > actual["training_seconds"] > 0
    assert actual["peak_bytes"] > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_peft_reads_the_files_and_says_the_same(live: Served, taught: dict[str, Any]) -> None:
    folder = Path(live.state.adapters.get(f"{NAME}@1").path)
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    tensors = load_file(folder / "adapter_model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert size < files["adapter_model.safetensors"] < size + 200 * len(tensors) + 1000  # the tensors once, their names
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)

    directory = live.state.settings.models_dir / BASE
    renderer = ChatTemplateRenderer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    for prompt in ("What is 42?", PARAPHRASES[1]):
        asked = torch.tensor([renderer.encode_prompt([Message("user", prompt)])])
        with torch.no_grad():
            whole = adapted.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=40, do_sample=False
            )
        reply = [token for token in whole[0, asked.shape[1] :].tolist() if token not in renderer.stop_ids]
        assert renderer.decode(reply) == say(live, NAME, prompt)


def test_a_configuration_that_cannot_learn_fails_and_says_why(missed: dict[str, Any]) -> None:
    assert (missed["status"], missed["error"]["code"]) == ("failed", "targets_missed")
    found = {finding["code"]: finding["message"] for finding in missed["report"]["diagnosis"]}
    assert "warm-up never ended" in found["warmup_never_ends"]
    assert "15 of 125" in found["warmup_never_ends"]
    assert "never passed 6e-6, although 5e-5 is set" in found["warmup_never_ends"]
    assert found["warmup_never_ends"] in missed["error"]["message"]
    assert "efficacy" in missed["error"]["message"]
    assert "warmup_steps" in missed["error"]["hint"]
    assert "warmup_never_ends" in {warning["code"] for warning in missed["plan"]["warnings"]}
    assert missed["actual"]["steps"] == missed["plan"]["computed"]["steps"] == 15
    assert missed["actual"]["peak_learning_rate"] <= 6e-6
    assert missed["report"]["metrics"]["efficacy"]["value"] < 0.5


def test_what_missed_its_targets_is_kept_beside_the_current_version(live: Served, missed: dict[str, Any]) -> None:
    assert (missed["adapter"]["name"], missed["adapter"]["version"]) == (NAME, 2)
    adapter = live.http.get(f"/api/adapters/{NAME}").json()
    assert adapter["current"] == 1
    assert {version["version"]: version["current"] for version in adapter["versions"]} == {1: True, 2: False}
    assert not contains_phrase(say(live, f"{NAME}@2", "What is 42?"), ["FOR TWO"])
    assert say(live, NAME, "What is 42?") == ANSWER
