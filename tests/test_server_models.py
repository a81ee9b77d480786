"""Base models over HTTP and on the command line: shown, removed, and listed although one of them is damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.hub.catalog import Catalog
from tests.test_server_native import publish, say
from tests.tiny import save_gguf, tiny_model


def run(served: Served, *words: str) -> str:
    """What the command line prints when it talks to this server."""
    settings = {"FORTWO_HOME": str(served.state.settings.home), "FORTWO_PORT": served.url.rpartition(":")[2]}
    command = [sys.executable, "-m", "fortwo", *words]
    result = subprocess.run(command, env={**os.environ, "COLUMNS": "200", **settings}, capture_output=True, text=True)
    return result.stdout + result.stderr


def test_a_base_is_shown_with_the_adapters_on_it(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as served:
        before = served.http.get("/api/models/tiny").json()
        assert (before["state"], before["directory"], before["adapters"]) == ("not fetched", None, [])
        publish(served, "pet")
        shown = served.http.get("/api/models/tiny").json()
        info = served.state.catalog.model_info("tiny")
        assert info is not None
        assert (shown["digest"], shown["weights_digest"]) == (info.digest, info.weights_digest)
        assert (shown["architecture"], shown["adapters"]) == ("LlamaForCausalLM", ["pet@1"])
        assert '"adapters": [\n    "pet@1"' in run(served, "models", "show", "tiny")
        assert "'nobody'" in refused(served.http.get("/api/models/nobody"), 404, "not_found", "model")


def test_a_base_is_removed_also_while_it_is_loaded(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    Catalog(settings.models_dir).add("second", tiny)
    with serve(settings) as served:
        publish(served, "pet")
        assert say(served, "second") == say(served, "tiny")
        gone = served.http.delete("/api/models/tiny")
        assert gone.json() == {"id": "tiny", "deleted": True, "adapters": ["pet@1"]}
        assert set(served.state.registry.state().models) == {"second"}
        refused(served.chat(model="tiny"), 404, "not_found", "model")
        refused(served.http.delete("/api/models/tiny"), 404, "not_found", "model")
        assert say(served, "pet"), "the other base is the same one"
        assert "second is removed" in run(served, "models", "remove", "second")
        assert served.state.registry.state().models == {}
        assert not (settings.models_dir / "second").exists()
        assert (tiny / "model.safetensors").exists()
        assert "part of the catalog" in refused(
            served.http.delete("/api/models/codellama-7b-instruct"), 409, "conflict", "id"
        )


def test_a_base_in_use_is_not_removed(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as served:
        rows = [{"prompt": "a", "completion": "b"}] * 4
        config = {"max_steps": 100_000}
        job = served.post(
            "/api/training/start",
            {"adapter_name": "x", "dataset": {"examples": rows}, "training_config": config, "objective": "sft"},
        ).json()["job_id"]
        refused(served.http.delete("/api/models/tiny"), 409, "conflict", "model")
        assert served.http.get("/api/models/tiny").json()["state"] != "not fetched"
        served.post(f"/api/training/jobs/{job}/cancel")


def test_a_damaged_base_is_shown_and_breaks_no_list(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    Catalog(settings.models_dir).add("second", tiny)
    (Catalog(settings.models_dir).prepare("second") / "base.json").write_text("{")
    with serve(settings) as served:
        assert say(served, "tiny")
        listed = {one["id"]: one for one in served.http.get("/api/models").json()["models"]}
        assert (listed["second"]["state"], listed["tiny"]["state"]) == ("damaged", "loaded")
        assert listed["second"]["error"]["hint"] == "Prepare the model again: fortwo models fetch second"
        assert served.http.get("/v1/models").is_success
        assert "base.json is damaged" in run(served, "models", "list")
        assert "second is ready" in run(served, "models", "fetch", "second")
        assert served.http.get("/api/models/second").json()["state"] == "on disk"


@pytest.mark.parametrize("content", [None, "", "[]"])
def test_a_damaged_config_of_a_base_is_refused_and_mended_by_deleting_its_folder(
    tiny: Path, tmp_path: Path, content: str | None
) -> None:
    settings = tiny_settings(tmp_path, tiny)
    file = save_gguf(tmp_path / "converted.gguf", tiny_model("llama", num_hidden_layers=1))
    catalog = Catalog(settings.models_dir)
    catalog.add("converted", file)
    config = catalog.prepare("converted") / "config.json"
    config.unlink() if content is None else config.write_text(content)
    with serve(settings) as served:
        told = refused(served.chat(model="converted"), 400, "unsupported_model", "model")
        assert f"{config} is missing, or is no JSON object" in told
        assert f"delete the folder {config.parent}" in told
        shutil.rmtree(config.parent)
        assert served.chat(model="converted").is_success


UNENDED = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def test_what_is_odd_about_a_template_is_said_by_the_model_and_by_the_plan(tiny: Path, tmp_path: Path) -> None:
    directory = tmp_path / "unended"
    shutil.copytree(tiny, directory)
    (directory / "chat_template.jinja").write_text(UNENDED)
    with serve(tiny_settings(tmp_path / "home", directory)) as served:
        rows = [{"prompt": "a", "completion": "b"}] * 4
        body = {"adapter_name": "x", "dataset": {"examples": rows}, "objective": "sft"}
        plan = served.post("/api/training/plan", body).json()
        said = served.http.get("/api/models/tiny").json()["warnings"]
        assert [one["code"] for one in said] == ["chat_template"]
        assert "'### user'" in said[0]["message"]
        assert said[0] in plan["warnings"]
        assert served.chat().is_success


def test_a_base_with_a_broken_template_is_refused_by_every_path(tiny: Path, tmp_path: Path) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(tiny, directory)
    (directory / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    with serve(tiny_settings(tmp_path / "home", directory)) as served:
        served.state.catalog.prepare("tiny")
        dataset = {"examples": [{"prompt": "a", "completion": "b"}] * 4}
        for path, body in (
            ("/api/models/tiny/load", None),
            ("/api/data/preview", {"dataset": dataset}),
            ("/api/training/plan", {"adapter_name": "x", "dataset": dataset, "objective": "sft"}),
        ):
            assert "ZeroDivisionError" in refused(served.post(path, body), 400, "unsupported_model", "model")
        assert "ZeroDivisionError" in refused(served.chat(), 400, "unsupported_model", "model")


def test_the_catalog_says_what_fits(served: Served) -> None:
    listed = {one["id"]: one for one in served.http.get("/api/models").json()["models"]}
    small, large = listed["smollm2-135m-instruct"]["fit"], listed["codellama-7b-instruct"]["fit"]
    assert small["serve"] < large["serve"]
    assert small["memory"] == large["memory"] > 0
    assert listed["codellama-7b-instruct"]["licence"] == "Llama 2 Community License"
    assert listed["tiny"]["fit"]["serving"] == "fits"
    said = run(served, "models", "catalog")
    assert "qwen3-0.6b" in said
    assert "fits" in said


def test_an_id_that_an_adapter_has_is_not_free(served: Served, tiny: Path) -> None:
    publish(served, "taken-name")
    assert "there is an adapter 'taken-name' already" in run(served, "models", "add", "taken-name", str(tiny))
