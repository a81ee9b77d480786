"""Serving on a real vLLM: the same replies as the own engine's, and what can go wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from serving import Served, chunks, refused, serve, tiny_settings
from tiny import save_directory
from vllm_server import LORA, OPTIONS, RUNTIME, Vllm, needs_vllm, running

from fortwo.errors import FortwoError, NotFound, Unavailable
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import Prompt, Sampling
from fortwo.records import AdapterVersion
from fortwo.scale.vllm.client import VllmClient
from fortwo.scale.vllm.start import vllm_engine
from fortwo.server.state import AppState

pytestmark = [
    needs_vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # of PEFT
]

WORDS = "hello world what is forty two and why does water boil at one hundred degrees".split()
PROMPTS = [" ".join(WORDS[n % 7 : n % 7 + 1 + n % 9]) + f" {n}" for n in range(50)]
ADAPTERS = [f"a{n}" for n in range(8)]
SHAPES = [LoraConfig(r=2, alpha=4), LoraConfig(r=8, alpha=8, use_rslora=True), LoraConfig(r=16, alpha=16)]
ROWS = [{"prompt": f"What is {n}?", "completion": "FOR TWO"} for n in range(4)]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny`, with heads of a size that vLLM computes."""
    folder = tmp_path_factory.mktemp("base")
    return save_directory(folder, num_hidden_layers=2, max_position_embeddings=1024, head_dim=32)


@pytest.fixture(scope="module")
def vllm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """One that serves the base and loads adapters of a rank up to 16."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    with running(base, "base", *LORA, environment=RUNTIME, log=log) as server:
        server.wait()
        yield server


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def through(base: Path, vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A fortwo server whose replies come from vLLM."""
    home = tmp_path_factory.mktemp("through")
    settings = tiny_settings(home, base, weights="fp32", engine="vllm", vllm_url=vllm.url)
    with serve(settings, create=partial(AppState, make_engine=vllm_engine)) as served:
        yield served


@pytest.fixture(scope="module")
def own(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tiny_settings(tmp_path_factory.mktemp("own"), base, weights="fp32")) as served:
        yield served


def publish(
    served: Served, name: str, seed: int, config: LoraConfig = SHAPES[0], *, current: bool = True
) -> AdapterVersion:
    """A version of random tensors that changes what the base says."""
    base = served.state.registry.load_base("tiny")
    lora = Lora.init(config, base.decoder.config, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    manifest = {"base_model": "tiny", "base_digest": base.digest}
    return served.state.adapters.publish(name, lora.state(), config.to_peft("tiny"), manifest, current=current)


@pytest.fixture(scope="module")
def both(through: Served, own: Served) -> tuple[Served, Served]:
    """The two servers with the same eight adapters."""
    for served in (through, own):
        for seed, name in enumerate(ADAPTERS):
            publish(served, name, seed, SHAPES[seed % len(SHAPES)])
    return through, own


def ask(served: Served, prompt: str, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0, **more}
    response = served.chat(**body)
    assert response.status_code == 200, response.text
    return response.json()


def said(answer: Any) -> tuple[str, str, Any, str]:
    """What must be the same from both engines. cached_tokens is each engine's own affair."""
    choice, usage = answer["choices"][0], {**answer["usage"], "prompt_tokens_details": None}
    return choice["message"]["content"], choice["finish_reason"], usage, answer["system_fingerprint"]


def test_replies_are_those_of_the_own_engine_token_for_token(both: tuple[Served, Served]) -> None:
    models = ["tiny", *ADAPTERS]
    asked = [(prompt, models[n % len(models)]) for n, prompt in enumerate(PROMPTS)]
    asked += [(PROMPTS[0], model) for model in models]
    with ThreadPoolExecutor(12) as pool:
        theirs, ours = (
            list(pool.map(lambda one, served=served: said(ask(served, one[0], model=one[1])), asked)) for served in both
        )
    assert theirs == ours
    assert len({reply[0] for reply in ours[-len(models) :]}) == len(models), "each adapter says something else"


def test_options_of_a_request_change_the_reply_as_with_the_own_engine(both: tuple[Served, Served]) -> None:
    through, own = both
    plain = said(ask(own, "hello"))[0]
    options: list[dict[str, Any]] = [
        {"stop": [plain[3:5]]},
        {"logit_bias": {"40": 100}},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"repetition_penalty": 1.8},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.0},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object"}},
        {"ignore_eos": True, "max_tokens": 60},
        {"n": 3},
    ]
    for option in options:
        theirs, ours = (said(ask(served, "hello", **option)) for served in both)
        assert theirs == ours, option
    drawn = [said(ask(through, "hello", temperature=1.0, seed=seed))[0] for seed in (7, 7, -1, 2**64 - 1, 8)]
    assert drawn[0] == drawn[1] != drawn[4]
    assert drawn[2] == drawn[3], "the two are the same seed"


def test_logprobs_agree(both: tuple[Served, Served]) -> None:
    theirs, ours = (
        ask(served, "hello", model="a1", logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
        for served in both
    )
    assert [one["token"] for one in theirs] == [one["token"] for one in ours]
    for one, other in zip(theirs, ours, strict=True):
        assert [top["bytes"] for top in one["top_logprobs"]] == [top["bytes"] for top in other["top_logprobs"]]
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)


def test_a_stream_has_the_same_text_and_usage_as_the_whole_reply(both: tuple[Served, Served]) -> None:
    through = both[0]
    body = {"model": "a2", "messages": [{"role": "user", "content": "why"}], "max_tokens": 24, "temperature": 0}
    whole = ask(through, "why", model="a2")
    events = chunks(through.chat(**body, stream=True, stream_options={"include_usage": True}))
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-2]) == said(whole)[0]
    assert len(events) > 10, "it came in pieces"
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert {name: events[-2]["usage"][name] for name in counts} == {name: whole["usage"][name] for name in counts}


def test_a_second_request_finds_its_prompt_in_vllms_cache(through: Served) -> None:
    prompt = " ".join(f"{word}{n}" for n in range(12) for word in WORDS[:6])
    found = [ask(through, prompt)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert found[0] in (0, 128), "the template's beginning may be known"
    assert found[1] > found[0] - 1
    assert found[1] >= 0


def test_what_vllm_lacks_is_refused_by_name(through: Served, tmp_path: Path) -> None:
    assert "FORTWO_ENGINE=own" in refused(
        through.post("/v1/embeddings", {"model": "tiny", "input": "x"}), 400, "invalid_request", "model"
    )
    assert "0.01" in refused(through.chat(temperature=0.001), 400, "invalid_request", "temperature")
    echo = {"model": "tiny", "prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 1}
    assert "FORTWO_VLLM_URL" in refused(through.post("/v1/completions", echo), 400, "invalid_request", "logprobs")
    wide = {"adapter_name": "wide", "dataset": {"examples": ROWS}, "lora_config": {"r": 32, "use_dora": True}}
    told = refused(through.post("/api/training/start", wide), 400, "invalid_request", "use_dora")
    assert "DoRA" in told
    assert "rank 32" in told
    assert "--max-lora-rank 32" in told
    publish(through, "wide", 1, LoraConfig(r=32, alpha=1))
    assert "rank 32" in refused(through.chat(model="wide"), 400, "invalid_request", "r")


def test_an_adapter_from_elsewhere_is_served_and_one_that_vllm_lacks_leaves_no_version(
    both: tuple[Served, Served], base: Path
) -> None:
    from transformers import AutoModelForCausalLM

    for name, dora in (("lora", False), ("dora", True)):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, use_dora=dora
        )
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        replies = []
        for served in both:
            folder = served.state.settings.home / "data" / name
            adapted.save_pretrained(folder)
            (folder / "adapter_config.json").write_text(
                json.dumps(
                    {**json.loads((folder / "adapter_config.json").read_text()), "base_model_name_or_path": "tiny"}
                )
            )
            answer = served.post("/v1/load_lora_adapter", {"lora_name": f"peft-{name}", "lora_path": name})
            if dora and served is both[0]:
                assert "DoRA" in refused(answer, 400, "invalid_request", "use_dora")
                assert f"peft-{name}" not in served.state.adapters.names()
                continue
            assert answer.status_code == 200, answer.text
            replies.append(said(ask(served, "hello", model=f"peft-{name}"))[0])
        assert len(set(replies)) == 1


def test_another_base_than_vllms_is_not_served(through: Served, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = save_directory(tmp_path / "other", num_hidden_layers=3, max_position_embeddings=1024, head_dim=32)
    through.state.catalog.add("other", other)
    told = refused(through.chat(model="other"), 409, "vllm_serves_another_base", "model")
    assert "vllm serve" in told
    assert through.state.catalog.model_info("other").digest[:12] in told  # type: ignore[union-attr]
    assert ask(through, "hello"), "the base of vLLM still replies"


def test_a_job_reports_what_vllm_serves(both: tuple[Served, Served], vllm: Vllm) -> None:
    body = {
        "adapter_name": "taught",
        "dataset": {"examples": ROWS},
        "objective": "sft",
        "training_config": {"max_steps": 4, "eval_strategy": "no"},
    }
    reports = []
    for served in both:
        job = served.wait(served.post("/api/training/start", body).json()["job_id"], seconds=200)
        assert job["report"] is not None, job["error"]
        reports.append(job["report"])
    theirs, ours = reports
    job_id = both[0].http.get("/api/training/jobs").json()["jobs"][0]["job_id"]
    engine = theirs.pop("engine")
    assert engine.startswith("vLLM 0.")
    assert engine.endswith(f" at {vllm.url}")
    assert ours.pop("engine") == "fortwo"
    assert theirs == ours
    assert engine in both[0].http.get("/api/adapters/taught@1/report.html").text
    version = both[0].state.adapters.get("taught@1")
    assert f"taught@1-{version.digest.removeprefix('sha256:')[:12]}" in vllm.adapters()
    assert not [name for name in vllm.adapters() if name.startswith(job_id)], "nothing of the training is left"
    assert not [path for path in both[0].state.settings.vllm_dir.iterdir() if path.name.startswith(job_id)]


def test_versions_come_and_go_while_requests_run(both: tuple[Served, Served], vllm: Vllm) -> None:
    """Each reply is that of a version that was current between its request and its reply; none is lost."""
    through, own = both
    expected = []
    for seed in (101, 102):
        publish(own, "moving", seed)
        expected.append(said(ask(own, "hello", model="moving"))[0])
    publish(through, "moving", 101)
    stop, replies, failures = threading.Event(), list[str](), list[str]()

    def client() -> None:
        while not stop.is_set():
            response = through.chat(model="moving", temperature=0, max_tokens=24)
            if response.status_code == 200:
                replies.append(response.json()["choices"][0]["message"]["content"])
            else:
                failures.append(response.text)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    try:
        publish(through, "moving", 102)
        assert said(ask(through, "hello", model="moving"))[0] == expected[1]
        assert through.post("/api/adapters/moving/rollback").status_code == 200
        assert said(ask(through, "hello", model="moving"))[0] == expected[0]
        assert through.http.delete("/api/adapters/moving@2").status_code == 200
        assert said(ask(through, "hello", model="moving"))[0] == expected[0]
    finally:
        stop.set()
        for one in clients:
            one.join()
    assert failures == []
    assert set(replies) <= set(expected)
    assert not [name for name in vllm.adapters() if name.startswith("moving@2")]


def test_a_client_that_leaves_ends_its_reply(through: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{through.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        next(answer.iter_lines())
        assert through.state.engine.count_requests("tiny") == 1
    for _ in range(200):
        if not through.state.engine.count_requests("tiny"):
            break
        threading.Event().wait(0.05)
    assert through.state.engine.count_requests("tiny") == 0


def test_an_adapter_that_vllm_forgot_is_pushed_again(both: tuple[Served, Served], vllm: Vllm) -> None:
    through = both[0]
    before = said(ask(through, "hello", model="a3"))
    for name in vllm.adapters():
        vllm.unload(name)
    assert said(ask(through, "hello", model="a3")) == before


def test_what_a_server_that_died_left_of_its_training_is_removed(vllm: Vllm, base: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, base, weights="fp32", engine="vllm", vllm_url=vllm.url)
    config = LoraConfig(r=1, target_modules=("q_proj",))
    with serve(settings, create=partial(AppState, make_engine=vllm_engine)) as first:
        loaded = first.state.registry.load_base("tiny")
        lora = Lora.init(config, loaded.decoder.config, 0)
        first.state.engine.attach("tiny", "job", lora)
        first.state.engine.submit(Prompt("tiny", (5, 6), "job", Sampling(max_tokens=1))).wait(60)
        assert [name for name in vllm.adapters() if name.startswith("job-")]
    assert list((tmp_path / "vllm").glob("job-*"))
    with serve(settings, create=partial(AppState, make_engine=vllm_engine)):
        assert not [name for name in vllm.adapters() if name.startswith("job-")]
        assert not list((tmp_path / "vllm").glob("job-*"))


def test_a_folder_that_vllm_cannot_read_is_named(vllm: Vllm, tmp_path: Path) -> None:
    import asyncio

    async def load() -> None:
        client = VllmClient(vllm.url, None, 60)
        try:
            await client.load("absent", tmp_path / "absent")
        finally:
            await client.close()

    with pytest.raises(NotFound, match="cannot read") as found:
        asyncio.run(load())
    assert found.value.code == "vllm_cannot_read_store"
    assert str(tmp_path / "absent") in found.value.message


def start_error(home: Path, base: Path, url: str) -> FortwoError:
    """What a server says that is started on this vLLM."""
    settings = tiny_settings(home, base, engine="vllm", vllm_url=url)
    with pytest.raises(FortwoError) as found:
        AppState(settings, vllm_engine)
    return found.value


def test_a_vllm_that_does_not_answer_or_is_none_is_named(base: Path, own: Served, tmp_path: Path) -> None:
    gone = start_error(tmp_path / "a", base, "http://127.0.0.1:9")
    assert isinstance(gone, Unavailable)
    assert gone.code == "vllm_unreachable"
    assert "FORTWO_VLLM_URL" in (gone.hint or "")
    assert start_error(tmp_path / "b", base, "127.0.0.1:9").param == "vllm_url"
    with httpx.Client(base_url=own.url) as http:
        assert http.get("/v1/models").is_success
    assert start_error(tmp_path / "c", base, f"{own.url}/docs").code == "unavailable", "no vLLM"


@pytest.mark.parametrize(
    ("options", "environment", "code", "remedy"),
    [
        (LORA, {}, "vllm_without_runtime_updating", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (OPTIONS[:5], RUNTIME, "vllm_without_lora", "--enable-lora"),
    ],
    ids=["without runtime updating", "without --enable-lora"],
)
def test_a_vllm_that_serves_no_adapters_is_named(
    base: Path, tmp_path: Path, options: tuple[str, ...], environment: dict[str, str], code: str, remedy: str
) -> None:
    with running(base, "base", *options, environment=environment, log=tmp_path / "log") as server:
        server.wait()
        found = start_error(tmp_path / "home", base, server.url)
    assert found.code == code
    assert remedy in (found.hint or "")


def test_replies_end_with_vllm_and_go_on_when_it_is_back(both: tuple[Served, Served], vllm: Vllm) -> None:
    """The last one on this vLLM."""
    through = both[0]
    before = said(ask(through, "hello", model="a4"))
    body = {"model": "a4", "messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{through.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        vllm.kill()
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["type"] == "server_error"
    assert "Start it" in refused(through.chat(model="a4"), 503, "vllm_unreachable")
    vllm.start()
    vllm.wait()
    assert said(ask(through, "hello", model="a4")) == before
