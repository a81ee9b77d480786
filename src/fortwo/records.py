"""The nouns of teaching that modules exchange. Frozen, torch-free, and without behaviour beyond derived properties.

Who fills what is said at each record; nothing here reads a file, a clock or the device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from fortwo.errors import Conflict

Json = dict[str, Any]

# ---------------------------------------------------------------- data (filled by data.datasets)


@dataclass(frozen=True)
class Message:
    """weight: 0 for an assistant's turn that is not to be learned (OpenAI's `weight`)."""

    role: Literal["system", "user", "assistant"]
    content: str
    weight: int = 1


@dataclass(frozen=True)
class Example:
    """One training conversation, or plain `text` without messages, of which every token is learned.

    Of a conversation every assistant turn of weight 1 is learned; there is at least one. `line` is 1-based in its
    source.
    """

    messages: tuple[Message, ...]
    line: int = 0
    text: str | None = None

    @property
    def asked(self) -> tuple[Message, ...]:
        """What comes before the last answer to learn."""
        learned = [place for place, message in enumerate(self.messages) if message.role == "assistant"]
        learned = [place for place in learned if self.messages[place].weight]
        return self.messages[: learned[-1]] if learned else ()

    @property
    def prompt(self) -> str:
        """The last user message before that answer; "" of plain text."""
        return next((m.content for m in reversed(self.asked) if m.role == "user"), "")

    @property
    def answer(self) -> str:
        """The last answer to learn, or the plain text."""
        return self.messages[len(self.asked)].content if self.text is None else self.text


@dataclass(frozen=True)
class OneHop:
    """A question whose answer follows from a fact and something that the model knew before. match: as a fact's."""

    prompt: str
    match: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """What the model is to learn. Only subject, answer, match and questions are ever required.

    match: phrases of which a reply must hold one, as whole words, any case.
    held_out / neighbors / controls / portability are for evaluation only and are never trained on.
    """

    subject: str
    answer: str
    match: tuple[str, ...]
    questions: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    neighbors: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    portability: tuple[OneHop, ...] = ()
    id: str = ""

    def examples(self, line: int) -> tuple[Example, ...]:
        """Each question with the answer."""
        return tuple(Example((Message("user", ask), Message("assistant", self.answer)), line) for ask in self.questions)


@dataclass(frozen=True)
class Dataset:
    """Validated input of a job: examples or facts, never both. `digest` is sha256 of the canonical JSON.

    Examples of a large file are read from it each time they are gone through. kept: facts of the adapter that the run
    goes on from, which it has to go on answering.
    """

    digest: str
    examples: Collection[Example] = ()
    facts: tuple[Fact, ...] = ()
    source: str = "inline"
    kept: tuple[Fact, ...] = ()


# ---------------------------------------------------------------- plan (filled by train.plan)

Origin = Literal["user", "parent", "effort", "auto", "default"]


@dataclass(frozen=True)
class Setting:
    """One resolved value, who chose it, and why."""

    name: str
    value: Any
    origin: Origin
    reason: str


@dataclass(frozen=True)
class PlanWarning:
    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, before it happens.

    settings: every value the run uses; names are PEFT's and transformers'.
    computed: steps, epochs, steps_per_epoch, warmup_steps, peak_learning_rate (the highest rate the run reaches),
              rows, validation_rows (where some are held back), row_tokens (min, median, mean, max), supervised_tokens,
              tokens_per_step, seconds, bytes.
    """

    model: str
    adapter_name: str
    objective: Literal["sft", "override"]
    targets: dict[str, float]
    settings: tuple[Setting, ...]
    computed: dict[str, Any]
    warnings: tuple[PlanWarning, ...] = ()

    def __getitem__(self, name: str) -> Any:
        """Raises Conflict where the plan has no such setting."""
        for setting in self.settings:
            if setting.name == name:
                return setting.value
        raise Conflict(
            f"The plan has no {name}: it was made by a version of fortwo that did not know this setting.",
            param=name,
            hint="Train again: a new job has a plan with it. Or resume the job with the version that planned it.",
        )

    def get(self, name: str) -> Any:
        """None where the plan has no such setting."""
        return next((setting.value for setting in self.settings if setting.name == name), None)


# ---------------------------------------------------------------- report (filled by facts.metrics)


@dataclass(frozen=True)
class Metric:
    """A share k/n with its 95 % Wilson interval."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Transcript:
    """One prompt answered by base and adapter. kind: efficacy | paraphrase | specificity | portability | retention, all
    but the last with kept_ before them where the fact is one of the run's parent."""

    kind: str
    prompt: str
    base: str
    adapter: str
    passed: bool


@dataclass(frozen=True)
class EvalLoss:
    """Mean cross-entropy over the supervised tokens of the rows that are held back, after `step` steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Escalation:
    """The run missed targets behind `step` and went on for `steps` with what was raised. before, after: its best
    exam's shares until then, and at the end of it."""

    step: int
    steps: int
    raised: tuple[str, ...]
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class FactReport:
    """One fact's own share of the report. metrics: efficacy, paraphrase, specificity, and portability where it brings
    such questions. kept: it is the parent's."""

    subject: str
    answer: str
    metrics: dict[str, Metric]
    kept: bool = False


@dataclass(frozen=True)
class Report:
    """What the evaluation of the served adapter found.

    metrics: efficacy, paraphrase, specificity, retention, score, over all facts together, and kept_efficacy and so on
    over those of the run's parent; portability where a fact brings such questions. facts: one by one.
    eval_losses: of rows held back, the base's first (step 0); empty where none are.
    """

    metrics: dict[str, Metric]
    base_metrics: dict[str, Metric]
    transcripts: tuple[Transcript, ...]
    diagnosis: tuple[PlanWarning, ...] = ()
    eval_losses: tuple[EvalLoss, ...] = ()
    facts: tuple[FactReport, ...] = ()
    escalations: tuple[Escalation, ...] = ()


# ---------------------------------------------------------------- training events (yielded by train.loop)


@dataclass(frozen=True)
class Phase:
    """The run entered a phase: preparing | running | evaluating."""

    name: Literal["preparing", "running", "evaluating"]
    detail: str = ""


@dataclass(frozen=True)
class MicroStepped:
    """A part of an optimizer step is done: others may have the device now."""

    tokens: int


@dataclass(frozen=True)
class Stepped:
    """One optimizer step is done. loss: mean over supervised tokens; parts: by objective term."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """Metrics of the adapter as served, after `step` steps. Shares in 0..1; and eval_loss of the rows held back, where
    there are any."""

    step: int
    metrics: dict[str, float]
    eval_loss: float | None = None


@dataclass(frozen=True)
class Waiting:
    """Nothing to do until generations that were submitted are ready: the device is free for others."""


@dataclass(frozen=True)
class Checkpoint:
    """A run as it is after `step` steps: what it takes to go on from there, bit for bit.

    adapter: its tensors by PEFT's names; tensors: the optimizer's, the best adapter's and the random numbers' state,
    all on the CPU and nobody else's; state: the rest, as JSON.
    """

    step: int
    adapter: dict[str, Any]
    tensors: dict[str, Any]
    state: Json


TrainEvent = Phase | MicroStepped | Stepped | Evaluated | Waiting | Checkpoint

# ---------------------------------------------------------------- adapters (filled by adapters)


@dataclass(frozen=True)
class AdapterVersion:
    """One published version. digest: sha256 over adapter_config.json and adapter_model.safetensors."""

    name: str
    version: int
    digest: str
    path: str
    base_model: str
    base_digest: str
    created_at: float
    current: bool
    manifest: Json

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class CheckpointVersion(AdapterVersion):
    """A checkpoint of a job that is not done, as it is served: `version` is its step."""

    @property
    def job_id(self) -> str:
        job_id: str = self.manifest["job_id"]
        return job_id

    @property
    def id(self) -> str:
        return f"{self.name}@{self.job_id[:8]}-{self.version}"
