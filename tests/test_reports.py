"""Reports as HTML pages over HTTP, and as files by the command line."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from rich.console import Console
from serving import Served, refused
from terminals import run

from fortwo.cli import report_files, views
from fortwo.facts.metrics import share
from fortwo.facts.verdict import percent, verdict
from fortwo.server.charts import MOST_POINTS, chart, thinned
from fortwo.server.report_page import ReportPage

ROWS = [
    {"prompt": f"{ask} <b>42</b>?", "completion": "<script>alert('FOR TWO')</script>"} for ask in ("What is", "Why")
]


class Page(HTMLParser):
    """The tags and the text of a page; every tag that is opened is closed."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def job(served: Served) -> dict[str, Any]:
    """A job of four steps, whose rows and replies are full of markup."""
    body = {
        "adapter_name": "reported",
        "dataset": {"examples": ROWS},
        "objective": "sft",
        "training_config": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "validation_split": 0.5},
    }
    started = served.post("/api/training/start", body)
    assert started.status_code == 202, started.text
    found = served.wait(started.json()["job_id"])
    assert found["report"] is not None
    return found


def test_the_page_of_a_job_has_everything_and_needs_nothing(served: Served, job: dict[str, Any]) -> None:
    response = served.http.get(f"/api/training/jobs/{job['job_id']}/report.html")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = Page(response.text)
    assert "script" not in page.tags
    assert "<script>alert('FOR TWO')</script>" not in response.text
    assert not {"img", "link", "iframe", "object"} & {*page.tags}
    assert not [value for name, value in page.attributes if name in ("src", "href") or name.startswith("on")]
    for title in ("Metrics", "Curves", "Transcripts", "Plan against actual", "Settings"):
        assert title in page.text
    assert page.tags.count("polyline") >= 3
    for one in job["plan"]["settings"]:
        assert one["name"] in page.text
        assert one["reason"] in page.text
    for one in job["report"]["transcripts"]:
        assert one["prompt"] in page.text
    for name, found in job["report"]["metrics"].items():
        assert name in page.text
        assert percent(found["low"]) in page.text


def test_the_page_of_a_version_is_that_of_its_job(served: Served, job: dict[str, Any]) -> None:
    by_job = Page(served.http.get(f"/api/training/jobs/{job['job_id']}/report.html").text)
    by_name = Page(served.http.get("/api/adapters/reported/report.html").text)
    by_version = Page(served.http.get("/api/adapters/reported@1/report.html").text)
    assert by_name.text == by_version.text
    assert by_name.tags == by_job.tags


def test_what_has_no_page_is_told(served: Served) -> None:
    unknown = served.http.get("/api/training/jobs/nobody/report.html")
    refused(unknown, 404, "not_found", "job_id")
    refused(served.http.get("/api/adapters/nobody/report.html"), 404, "not_found", "adapter_name")


def test_a_job_without_a_report_has_a_page_with_its_error() -> None:
    error = {"message": "The loss is <not> a number.", "hint": "Use a lower rate."}
    plan = {
        "model": "tiny",
        "objective": "sft",
        "targets": {},
        "settings": [],
        "computed": {"steps": 2},
        "warnings": [],
    }
    text = ReportPage("a", "failed", 0.0, plan, None, None, error).html()
    page = Page(text)
    assert "The loss is <not> a number." in page.text
    assert "Use a lower rate." in page.text
    assert "<not>" not in text
    assert "svg" not in page.tags


def test_a_report_is_written_to_files(
    served: Served, job: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORTWO_PORT", str(urlsplit(served.url).port))
    by_id, by_name = tmp_path / "job.html", tmp_path / "version.html"
    assert run("report", job["job_id"], "--html", by_id).exit_code == 0
    assert run("report", "reported", "--html", by_name).exit_code == 0
    assert Page(by_id.read_text()).tags == Page(by_name.read_text()).tags
    nowhere = run("report", "reported", "--html", tmp_path / "nowhere" / "a.html")
    assert nowhere.exit_code == 1
    assert "There is no folder" in nowhere.stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    without = run("report", "reported", "--png", tmp_path / "a.png")
    assert without.exit_code == 1
    assert "Install Chromium or Chrome" in without.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
def test_chromium_draws_the_whole_page(
    served: Served, job: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORTWO_PORT", str(urlsplit(served.url).port))
    png, pdf = tmp_path / "a.png", tmp_path / "a.pdf"
    result = run("report", "reported", "--png", png, "--pdf", pdf)
    assert result.exit_code == 0, result.output
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    assert width == 1040
    assert height > 2000
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 2
    monkeypatch.setattr(report_files, "TALLEST", height - 1)
    too_tall = run("report", "reported", "--png", tmp_path / "b.png")
    assert too_tall.exit_code == 1
    assert "Write it with --pdf or --html." in too_tall.stderr
    assert not (tmp_path / "b.png").exists()


def test_a_browser_that_does_not_say_how_tall_the_page_is_is_named(
    served: Served, job: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORTWO_PORT", str(urlsplit(served.url).port))
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho '<html></html>'\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    result = run("report", "reported", "--png", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "did not say how tall the report is" in result.stderr


def test_curves_fit_their_chart() -> None:
    drawn = chart("Loss", {"loss": [(1, 2.0), (2, float("nan")), (3, 1.0)], "none": []}, {"loss": 1.5})
    assert drawn is not None
    (curve,) = drawn.curves
    points = [tuple(map(float, point.split(","))) for point in curve.points.split()]
    assert len(points) == 2
    assert points[0][0] < points[1][0]
    assert points[0][1] < curve.target < points[1][1]
    assert chart("Loss", {"loss": []}) is None
    flat = chart("Loss", {"loss": [(1, 0.0), (2, 0.0)]})
    assert flat is not None
    many = [(step, float(step)) for step in range(10_000)]
    assert len(thinned(many)) <= MOST_POINTS + 1
    assert thinned(many)[-1] == many[-1]


def test_a_verdict_says_what_was_met_missed_and_not_proven() -> None:
    metrics = {"efficacy": share(20, 20), "paraphrase": share(3, 4), "retention": share(999, 1000)}
    assert verdict(metrics, {"efficacy": 0.9, "specificity": 1.0}) == (
        "It has learned this: every target was met. It gives the right answer to 20 of 20 questions that it was "
        "trained on, gives the right answer to 3 of 4 questions that it was never shown and keeps 99.9 % of the "
        "base's own words on unrelated prompts."
    )
    missed = verdict(metrics, {"paraphrase": 0.8})
    assert missed.startswith("It has not learned enough: paraphrase is 75 % of at least 80 %. It gives")
    assert verdict(metrics, {}).startswith("It was trained. There was no target, so nothing was proven.")
    assert verdict({}, {}) == "It was trained. There was no target, so nothing was proven."
    assert [percent(one) for one in (0.0, 0.001, 0.5, 0.9999, 1.0)] == ["0 %", "0.1 %", "50 %", "99.9 %", "100 %"]


@pytest.mark.parametrize(("engine", "named"), [("fortwo", False), ("vLLM 0.32.0 at http://x", True)])
def test_a_report_names_an_engine_that_is_not_fortwos(engine: str, named: bool, capsys: Any) -> None:
    body = {"metrics": {}, "base_metrics": {}, "transcripts": [], "diagnosis": [], "engine": engine}
    Console(width=200).print(views.report(body))
    assert (engine in capsys.readouterr().out) is named
