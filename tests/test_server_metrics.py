"""GET /metrics: what was done is counted, and nothing that a client wrote is a label."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Served, serve, tiny_settings

from fortwo.engine.statistics import Histogram
from fortwo.server.metrics import CONTENT_TYPE

DASHBOARD = Path(__file__).parent.parent / "examples" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tiny_settings(tmp_path_factory.mktemp("measured"), tiny)) as served:
        yield served


def samples(served: Served) -> dict[str, float]:
    """The value of each sample, by its name with its labels in order: name{a=b}."""
    response = served.http.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == CONTENT_TYPE
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_requests_and_tokens_are_counted(measured: Served) -> None:
    before = samples(measured)
    replies = [measured.chat(max_tokens=5, ignore_eos=True).json() for _ in range(3)]
    assert measured.chat(temperature=-1).status_code == 400
    assert measured.http.get("/v1/models/secret-name").status_code == 404
    after = samples(measured)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    chat = "method=POST,route=/v1/chat/completions"
    assert grew(f"fortwo_requests_total{{{chat},status=200}}") == 3
    assert grew(f"fortwo_requests_total{{{chat},status=400}}") == 1
    assert grew("fortwo_requests_total{method=GET,route=/v1/models/{model},status=404}") == 1
    assert grew(f"fortwo_request_seconds_count{{{chat}}}") == 4
    usage = [reply["usage"] for reply in replies]
    assert grew("fortwo_generation_tokens_total") == sum(one["completion_tokens"] for one in usage) == 15
    assert grew("fortwo_prompt_tokens_total") == sum(one["prompt_tokens"] for one in usage)
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usage)
    assert grew("fortwo_cached_prompt_tokens_total") == cached > 0
    assert grew("fortwo_time_to_first_token_seconds_count") == 3
    assert grew("fortwo_time_to_first_token_seconds_sum") > 0
    assert grew("fortwo_batch_size_count") == 12  # the first token of a reply is the prompt's
    assert grew("fortwo_batch_size_bucket{le=1.0}") == 12
    assert after["fortwo_requests_running{model=tiny}"] == 0
    assert after["fortwo_cache_tokens{model=tiny}"] > 0
    assert 0 < after["fortwo_cache_usage_ratio{model=tiny}"] <= 1
    assert after["fortwo_models_loaded"] == 1
    assert after["process_resident_memory_bytes"] > 0


def test_what_a_client_wrote_is_no_label(measured: Served) -> None:
    measured.http.get("/no/such/secret-path?key=secret-query", headers={"Authorization": "Bearer secret-key"})
    measured.http.request("SECRET", "/v1/models")
    measured.chat(messages=[{"role": "user", "content": "secret-prompt"}])
    text = measured.http.get("/metrics").text
    assert "secret" not in text.lower()
    assert 'fortwo_requests_total{method="GET",route="none",status="404"}' in text


def test_jobs_and_their_streams_are_counted(measured: Served) -> None:
    progress = {"step": 7, "steps": 50, "tokens_per_second": 123.5}
    job = measured.state.jobs.create(
        model="tiny", adapter_name="a", dataset={}, plan={"parent": None}, progress=progress
    )
    measured.state.jobs.update(job.id, status="running")
    found = samples(measured)
    assert found["fortwo_jobs{status=running}"] == 1
    assert found["fortwo_jobs{status=queued}"] == 0
    assert found["fortwo_training_step"] == 7
    assert found["fortwo_training_steps_planned"] == 50
    assert found["fortwo_training_tokens_per_second"] == 123.5
    assert found["fortwo_event_streams"] == 0
    with measured.http.stream("GET", f"/api/training/jobs/{job.id}/events"):
        assert samples(measured)["fortwo_event_streams"] == 1
        measured.state.jobs.update(job.id, status="cancelled")
    assert samples(measured)["fortwo_training_tokens_per_second"] == 0


def test_a_database_that_refuses_hides_nothing_else(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as served:
        assert samples(served)["fortwo_database_up"] == 1
        with sqlite3.connect(tmp_path / "fortwo.db") as database:
            database.execute("ALTER TABLE jobs RENAME TO gone")
        database.close()
        found = samples(served)
        assert found["fortwo_database_up"] == 0
        assert "fortwo_models_loaded" in found
        assert not any(name.startswith("fortwo_jobs") for name in found)


def test_the_dashboard_asks_for_metrics_that_exist(measured: Served) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    measured.chat()
    names = {name.partition("{")[0] for name in samples(measured)}
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 10
    for expression in asked:
        words = {word for word in _words(expression) if word.startswith(("fortwo_", "process_"))}
        assert words, expression
        assert words <= names, expression


def _words(expression: str) -> Iterator[str]:
    word = ""
    for letter in f"{expression} ":
        if letter.isalnum() or letter == "_":
            word += letter
        else:
            yield word
            word = ""


def test_a_histogram_counts_each_value_once() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1]
    assert histogram.sum == 12.0


def test_the_document_says_that_metrics_are_text(served: Served) -> None:
    document = served.http.get("/openapi.json").json()
    assert list(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
