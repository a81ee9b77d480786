"""An exam is run again from a report, and fortwo verify says by its exit status whether it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fortwo.adapters.store import AdapterStore
from fortwo.cli import app
from fortwo.errors import InvalidRequest
from fortwo.facts.exam import Kept, Result, exam_of, passes, same_beginning
from fortwo.hub.catalog import Catalog
from fortwo.nn.lora_config import LoraConfig, module_name
from fortwo.records import Metric, ReplyCheck
from tests.serving import serve, tiny_settings
from tests.tiny import save_directory


@pytest.mark.parametrize(
    ("rule", "texts", "right", "wrong"),
    [
        ("contains", ("Oslo", "Bergen"), "It is OSLO.", "It is Oslofjord."),
        ("lacks", ("Oslo",), "It is Paris.", "It is Oslo."),
        ("begins", ("blue and green",), " blue and", ""),
        ("holds", ("get", "42"), 'get {"n": 42}', "get"),
        ("holds", ("get", '\\"a\\"\\n', '{"n": 1}'), '<get>"a"\n</get> {"n": 1}', 'get "a" {"n": 1}'),
    ],
)
def test_rules(rule: str, texts: tuple[str, ...], right: str, wrong: str) -> None:
    check = ReplyCheck(rule, texts)  # type: ignore[arg-type]
    assert passes(check, right)
    assert not passes(check, wrong)


def test_an_adapter_without_a_report_has_no_exam() -> None:
    with pytest.raises(InvalidRequest, match="no report"):
        exam_of("one@1", {"report": None})


def test_a_report_of_an_earlier_version_has_an_exam_if_it_is_about_one_fact() -> None:
    transcript = {"kind": "paraphrase", "prompt": "Where?", "base": "", "adapter": "", "passed": True}
    report = {"transcripts": [transcript], "metrics": {}}
    exam = exam_of("one@1", {"report": report, "facts": [{"match": ["Oslo"]}]})
    assert exam.questions[0].check == ReplyCheck("contains", ("Oslo",))
    with pytest.raises(InvalidRequest, match="did not record"):
        exam_of("one@1", {"report": report, "facts": [{"match": ["Oslo"]}, {"match": ["Rome"]}]})


def test_the_beginning_that_two_replies_share() -> None:
    assert same_beginning("abcd", "abxd") == Kept(2, 4, exact=False)
    assert same_beginning("abcd", "abcd, more") == Kept(4, 4, exact=False)


def published(home: Path, target: float) -> None:
    """An adapter "one" on the base "tiny" whose exam asks for words that no reply of a random model lacks or has."""
    info = Catalog(home / "models").model_info("tiny")
    assert info is not None
    config = LoraConfig(r=2, target_modules=("q_proj",))
    tensors = {
        f"base_model.model.{module_name(layer, 'q_proj')}.lora_{half}.weight": torch.randn(size) * 0.1
        for layer in range(3)
        for half, size in (("A", (2, 64)), ("B", (64, 2)))
    }
    questions = [
        {"kind": "specificity", "prompt": "hello", "check": {"rule": "lacks", "texts": ["zebra"]}},
        {"kind": "retention", "prompt": "hello", "check": None, "base_tokens": [5, 6, 7]},
    ]
    transcripts = [{"base": "x", "adapter": "x", "passed": True, **one} for one in questions]
    share = {"value": 1.0, "n": 1, "low": 0.2, "high": 1.0}
    report = {"transcripts": transcripts, "metrics": {"specificity": share}, "reply_tokens": 4}
    manifest = {"base_model": "tiny", "base_digest": info.digest, "report": report}
    manifest["plan"] = {"targets": {"specificity": target, "retention": 0.0}}
    AdapterStore(home / "adapters").publish("one", tensors, config.to_peft("tiny"), manifest, current=True)


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["verify", *arguments])
    return found.exit_code, found.stdout


@pytest.mark.parametrize(("target", "status"), [(1.0, 0), (1.1, 1)])
def test_verify_against_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: float, status: int) -> None:
    settings = tiny_settings(tmp_path / "home", save_directory(tmp_path / "base"))
    Catalog(settings.models_dir).prepare("tiny")
    published(settings.home, target)
    monkeypatch.setenv("FORTWO_HOME", str(settings.home))
    with serve(settings) as served:
        code, output = run("one", "--url", f"{served.url}/v1", "--json")
    found = json.loads(output)
    assert (code, found["holds"]) == (status, status == 0)
    assert found["metrics"]["specificity"]["now"]["n"] == 1
    assert found["retention_is_exact"]
    assert found["metrics"]["retention"]["now"]["n"] == 3


def test_verify_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings(tmp_path / "home", save_directory(tmp_path / "base"))
    Catalog(settings.models_dir).prepare("tiny")
    published(settings.home, 1.0)
    monkeypatch.setenv("FORTWO_HOME", str(settings.home))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert run("one", "--url", "http://127.0.0.1:9/v1")[0] == 2
    assert run("nobody")[0] == 2
    assert run("one", "--key-env", "NO_SUCH_KEY")[0] == 2


def test_an_exam_of_which_nothing_counts_judges_nothing() -> None:
    kept = {"retention": Metric(1.0, 3, 0.4, 1.0)}
    assert not Result(kept, exact=False).judges
    assert Result(kept, exact=True).judges
    assert Result({**kept, "efficacy": Metric(1.0, 3, 0.4, 1.0)}, exact=False).judges
