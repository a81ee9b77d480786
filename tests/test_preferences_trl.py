"""Losses and gradients of preferences are TRL's on the same rows of a tiny random model.

Tolerance: losses within 1e-5 of TRL's, relative, and each gradient within 1e-5 of the largest or 1e-4 of its own (fp32,
sums in another order).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fortwo.execution.backend import backend_for
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.train.losses import Row
from fortwo.train.retry_policy import RowMix
from tests.parts import as_decoder
from tests.test_preferences import compared, finished, learning
from tests.tiny import save_tokenizer, tiny_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and its libraries
LOSS = {"atol": 1e-5, "rtol": 1e-5}
PAIRS = [
    ("What is up?", "the sky", "a road"),
    ("What is down, and why is it there?", "the sea", "nothing at all"),
    ("Name a colour.", "blue, as the sky is", "seven"),
    ("Say hello.", "hello", "hello there, my friend"),
]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pairs() -> Any:
    rows = [
        {
            "prompt": [turn("user", prompt)],
            "chosen": [turn("assistant", chosen)],
            "rejected": [turn("assistant", rejected)],
        }
        for prompt, chosen, rejected in PAIRS
    ]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found.pad_token = "<|im_end|>"
    return found


def trainer(kind: str, tokenizer: Any, tmp_path: Path, rows: Any, **options: Any) -> Any:
    """TRL's trainer of a tiny model with an adapter that changes much."""
    if kind == "ORPO":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        Config, Trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    if kind == "KTO":
        options["train_sampling_strategy"] = "sequential"
    arguments = Config(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8 if kind == "KTO" else 4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None if kind != "ORPO" else 200,
        remove_unused_columns=False,
        **options,
    )
    lora = peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Trainer(
            model=tiny_model("llama"), args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def batch_of(made: Any) -> Any:
    return next(iter(made.get_train_dataloader()))


def ours(made: Any) -> tuple[Any, Lora]:
    """A backend of the same base, and the same adapter."""
    base = as_decoder(tiny_model("llama"))
    config = LoraConfig(r=4, alpha=12, target_modules=("q_proj", "v_proj", "down_proj"))
    state = {name: tensor.detach().clone() for name, tensor in peft.get_peft_model_state_dict(made.model).items()}
    lora = Lora.from_state(config, base.config, state)
    lora.flatten()
    return backend_for(base), lora


def compare(made: Any, loss: torch.Tensor, found: Any, lora: Lora) -> None:
    loss.backward()
    torch.testing.assert_close(torch.tensor(found.loss), loss.detach(), **LOSS)
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in made.model.named_parameters()
        if parameter.requires_grad
    }
    for parameter in lora.parameters():
        assert parameter.grad is not None
        parameter.data.copy_(parameter.grad)
    named = lora.state()
    assert named.keys() == gradients.keys()
    largest = max(float(one.abs().max()) for one in gradients.values())
    assert largest > 1e-3
    for name, wanted in gradients.items():
        torch.testing.assert_close(named[name], wanted, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": kind, "beta": beta}
        for kind in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "sppo_hard", "apo_zero", "apo_down")
        for beta in (0.1, 0.5)
    ]
    + [{"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("budget", [40, 10_000])
def test_dpo(tokenizer: Any, tmp_path: Path, options: dict[str, Any], budget: int) -> None:
    made = trainer("DPO", tokenizer, tmp_path, pairs(), **{**options, "loss_type": [options["loss_type"]]})
    batch = batch_of(made)
    loss = made._compute_loss(made.model, dict(batch), False)
    backend, lora = ours(made)
    count = len(batch["input_ids"]) // 2
    rows = [masked(batch, "", place) for n in range(count) for place in (n, n + count)]
    learned = learning(backend, "dpo", micro_step_tokens=budget, **options)
    found = finished(learned.accumulate(lora, compared(learned, rows), RowMix()))
    compare(made, loss, found, lora)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert found.metrics[name] == pytest.approx(made._metrics["train"][name][-1], rel=1e-4, abs=1e-5), name


def masked(batch: Any, prefix: str, place: int) -> Row:
    seen = batch[f"{prefix}attention_mask"][place].bool()
    tokens = batch[f"{prefix}input_ids"][place][seen].tolist()
    return Row.from_mask(tokens, batch[f"{prefix}completion_mask"][place][seen].bool().tolist())


@pytest.mark.parametrize("budget", [40, 10_000])
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"beta": 0.2, "loss_type": "apo_zero_unpaired"},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_kto(tokenizer: Any, tmp_path: Path, options: dict[str, Any], budget: int, seed: int) -> None:
    """On pairs, which TRL unpairs; a batch of all rows has its mismatched answers among itself."""
    made = trainer("KTO", tokenizer, tmp_path, pairs(), seed=seed, **options)
    batch = batch_of(made)
    if "KL_input_ids" in batch and seed:  # the other direction, in which the estimate is not cut off at 0
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.data.neg_()
    loss = made._compute_loss(made.model, dict(batch), False)
    backend, lora = ours(made)
    labels = batch["label"].tolist()
    learned = learning(backend, "kto", micro_step_tokens=budget, **options)
    rows = [replace(masked(batch, "", place), desirable=bool(label)) for place, label in enumerate(labels)]
    rows = compared(learned, rows)
    mismatched = [row for (row,) in learned.mismatched([(row,) for row in rows])]
    if learned.estimates_kl:
        assert [row.tokens for row in mismatched] == [
            masked(batch, "KL_", place).tokens for place in range(len(labels))
        ]
    found = finished(learned.accumulate(lora, [*rows, *mismatched], RowMix()))
    compare(made, loss, found, lora)
    if learned.estimates_kl:
        assert (found.metrics["kl"] > 0) == bool(seed), "both sides of the limit are compared"
        assert found.metrics["kl"] == pytest.approx(made._metrics["train"]["kl"][-1], rel=1e-4, abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert found.metrics[name] == pytest.approx(made._metrics["train"][name][-1], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("budget", [40, 10_000])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_orpo(tokenizer: Any, tmp_path: Path, beta: float, budget: int) -> None:
    made = trainer("ORPO", tokenizer, tmp_path, pairs(), beta=beta)
    batch = batch_of(made)
    loss, metrics = made.get_batch_loss_metrics(made.model, batch)
    backend, lora = ours(made)
    rows = []
    for n in range(len(batch["chosen_input_ids"])):
        for side in ("chosen", "rejected"):
            seen = batch[f"{side}_attention_mask"][n].bool()
            answer = (batch[f"{side}_labels"][n][seen] != -100).tolist()
            rows.append(Row.from_mask(batch[f"{side}_input_ids"][n][seen].tolist(), answer))
    learned = learning(backend, "orpo", beta=beta, micro_step_tokens=budget)
    found = finished(learned.accumulate(lora, rows, RowMix()))
    compare(made, loss, found, lora)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss"):
        assert found.metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
