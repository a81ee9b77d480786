"""The data classes that modules exchange about datasets, plans, training runs, reports and adapters.

They are frozen and free of torch, and have no behaviour beyond derived properties. Nothing here reads a file, a clock
or the device. Each section names the module that fills its classes. Names of fields that are sent or stored are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from fortwo.errors import Conflict

Json = dict[str, Any]

# ---------------------------------------------------------------- data (filled by data.datasets)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. weight: 0 for an assistant message that is not trained on, as in OpenAI's format.

    name, tool_calls, tool_call_id: as in OpenAI's format, "" for none; the chat template writes them. tool_calls is the
    JSON text of a list, in which arguments are objects. tools: on the first message, the JSON text of the list of tools
    that the conversation offers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    weight: int = 1
    name: str = ""
    tool_calls: str = ""
    tool_call_id: str = ""
    tools: str = ""


@dataclass(frozen=True)
class Example:
    """One training conversation, or plain `text` without messages. In a conversation, every assistant message of weight
    1 is trained on, and there is at least one. In plain text, every token is. `line` is the 1-based line in the
    source.

    rejected: of a preference, the same conversation with the answer that is rejected, while `messages` has the chosen
    one. label: of an answer by itself, whether it is desirable. In both only the answers have weight 1.
    """

    messages: tuple[Message, ...]
    line: int = 0
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    label: bool | None = None

    @property
    def sides(self) -> tuple[Example, ...]:
        """The answers of a preference as examples of their own, the chosen one first; else the example itself."""
        if not self.rejected:
            return (self,)
        return Example(self.messages, self.line, label=True), Example(self.rejected, self.line, label=False)

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The messages before the last answer that is trained on; () for plain text."""
        answers = [n for n, message in enumerate(self.messages) if message.role == "assistant" and message.weight]
        return self.messages[: answers[-1]] if answers else ()

    @property
    def prompt(self) -> str:
        """The last user message before that answer; "" for plain text."""
        return next((m.content for m in reversed(self.prompt_messages) if m.role == "user"), "")

    @property
    def answer(self) -> str:
        """The last answer that is trained on, with the JSON text of its calls of tools; or the plain text."""
        if self.text is not None:
            return self.text
        message = self.messages[len(self.prompt_messages)]
        return f"{message.content}\n{message.tool_calls}".strip("\n") if message.tool_calls else message.content

    @property
    def uses_tools(self) -> bool:
        """Whether the conversation offers tools, calls one or has the result of one."""
        return any(message.tools or message.tool_calls or message.role == "tool" for message in self.messages)


@dataclass(frozen=True)
class OneHop:
    """A question whose answer follows from a fact and from something that the model knew before. match: as in `Fact`.
    Its metric is portability (Yao et al. 2023, arXiv:2305.13172)."""

    prompt: str
    match: tuple[str, ...]


LONGEST_NAME = 500  # characters of a fact's subject, of an alias, and of a phrase of `match`


@dataclass(frozen=True)
class Fact:
    """What the model is to learn. Only subject, answer, match and questions are required. match: a reply is right if it
    contains one of these phrases, as whole words, in upper or lower case. held_out, neighbors, controls and portability
    are used for evaluation only and are never trained on."""

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
        """One example for each question, with the answer."""
        return tuple(Example((Message("user", ask), Message("assistant", self.answer)), line) for ask in self.questions)


@dataclass(frozen=True)
class Dataset:
    """The validated input of a job: examples or facts, never both. `digest` is the SHA-256 of the canonical JSON. The
    examples of a large file are read from the file on each iteration. parent_facts: the facts of the parent adapter
    that the run must preserve; they are stored under the key "kept". validation: the request's `validation_dataset`,
    whose rows are evaluated and never trained on."""

    digest: str
    examples: Collection[Example] = ()
    facts: tuple[Fact, ...] = ()
    source: str = "inline"
    parent_facts: tuple[Fact, ...] = ()
    validation: Dataset | None = None


# ---------------------------------------------------------------- plan (filled by train.plan)

ObjectiveName = Literal["sft", "override", "dpo", "kto", "orpo"]
Origin = Literal["user", "parent", "effort", "auto", "default"]


@dataclass(frozen=True)
class Setting:
    """One setting of a plan: its value, who chose the value, and the reason."""

    name: str
    value: Any
    origin: Origin
    reason: str


@dataclass(frozen=True)
class PlanWarning:
    """A warning of a plan or a finding of a diagnosis. code: stable, for programs; hint: the remedy."""

    code: str
    message: str
    hint: str


class PlanValues(Protocol):
    """Values by the names of settings: those of a `Plan`, or of one that is being built."""

    def __getitem__(self, name: str, /) -> Any: ...
    def get(self, name: str, /) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do, decided before it starts. settings: every value that the run uses, under the names
    of PEFT and transformers. computed: steps, epochs, steps_per_epoch, warmup_steps, peak_learning_rate (the highest
    rate the run reaches), rows, validation_rows (where there are some), row_tokens (min, median, mean, max),
    supervised_tokens, tokens_per_step, seconds, bytes. origins: by field of the request, where the rows of a dataset
    come from, if it was downloaded from the hub."""

    model: str
    adapter_name: str
    objective: ObjectiveName
    targets: dict[str, float]
    settings: tuple[Setting, ...]
    computed: dict[str, Any]
    warnings: tuple[PlanWarning, ...] = ()
    origins: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """The value of a setting. Raises Conflict if the plan does not have it."""
        for setting in self.settings:
            if setting.name == name:
                return setting.value
        raise Conflict(
            f"The plan has no {name}: it was made by a version of fortwo that did not know this setting.",
            param=name,
            hint="Train again: a new job has a plan with it. Or resume the job with the version that planned it.",
        )

    def get(self, name: str) -> Any:
        """The value of a setting, or None if the plan does not have it."""
        return next((setting.value for setting in self.settings if setting.name == name), None)


# ---------------------------------------------------------------- report (filled by facts.metrics)


@dataclass(frozen=True)
class Metric:
    """A share k / n with its 95 % Wilson interval from `low` to `high`."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class ReplyCheck:
    """When a reply is right. rule: contains (at least one of the texts, as whole words in upper or lower case), lacks
    (none of them), begins (the one text begins with the reply) or holds (every text occurs, with or without the escapes
    of JSON)."""

    rule: Literal["contains", "lacks", "begins", "holds"]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Transcript:
    """One prompt with the replies of base and adapter. kind: efficacy, paraphrase, specificity, portability or
    retention. All but the last have the prefix "kept_" if the fact belongs to the parent of the run.

    before: the messages before the prompt. check: when a reply passes; None for retention, for which base_tokens are
    the tokens of the base's reply. With these the question can be asked again (facts.exam)."""

    kind: str
    prompt: str
    base: str
    adapter: str
    passed: bool
    before: tuple[Message, ...] = ()
    check: ReplyCheck | None = None
    base_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class EvalLoss:
    """Mean cross-entropy over the supervised tokens of the validation rows, or the mean loss of their preferences,
    after `step` steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Escalation:
    """One retry round: the run had missed targets after `step` steps and continued for `steps` more. raised: the levers
    that were applied. before, after: the shares of the best evaluation before and after the round."""

    step: int
    steps: int
    raised: tuple[str, ...]
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class FactReport:
    """The metrics of one fact. kept: the fact belongs to the parent of the run. metrics: efficacy, paraphrase,
    specificity, and portability if the fact has such questions."""

    subject: str
    answer: str
    metrics: dict[str, Metric]
    kept: bool = False


@dataclass(frozen=True)
class Report:
    """The results of the final evaluation of the served adapter. metrics: efficacy, paraphrase, specificity, retention
    and score over all facts, kept_efficacy and so on over the facts of the parent, and portability if a fact has such
    questions; with preferences, accuracy instead of efficacy. prompted_metrics: those of the base when its system
    prompt states the facts; empty if there are none.
    facts: the metrics of each fact. eval_losses: on the validation rows, the base's first (step 0); empty if
    there are no such rows. reply_tokens: maximum length of a reply; 0 where it was not recorded.
    engine: who computed the replies."""

    metrics: dict[str, Metric]
    base_metrics: dict[str, Metric]
    transcripts: tuple[Transcript, ...]
    prompted_metrics: dict[str, Metric] = field(default_factory=dict)
    diagnosis: tuple[PlanWarning, ...] = ()
    eval_losses: tuple[EvalLoss, ...] = ()
    facts: tuple[FactReport, ...] = ()
    escalations: tuple[Escalation, ...] = ()
    reply_tokens: int = 0
    engine: str = "fortwo"


# ---------------------------------------------------------------- training events (yielded by train.loop)


@dataclass(frozen=True)
class Phase:
    """The run has entered a phase."""

    name: Literal["preparing", "running", "evaluating"]
    detail: str = ""


@dataclass(frozen=True)
class MicroStepped:
    """A part of an optimizer step is done, and other work may use the device now."""

    tokens: int


@dataclass(frozen=True)
class Stepped:
    """One optimizer step is done. loss: the sum of its terms, each a mean over supervised tokens; parts: the terms.
    With preferences the loss is a mean over pairs or answers; metrics: of them, under TRL's names such as
    rewards/chosen."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What the served adapter replied to one question of an evaluation. kind: as in Transcript."""

    kind: str
    prompt: str
    reply: str
    passed: bool


@dataclass(frozen=True)
class Evaluated:
    """The metrics of the served adapter after `step` steps, as shares from 0 to 1, and the loss on validation rows.
    samples: its replies to the same few questions in every evaluation of the run."""

    step: int
    metrics: dict[str, float]
    eval_loss: float | None = None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Waiting:
    """The run waits for replies that it has submitted, and the device is free for other work."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps, from which it can be resumed bit for bit. adapter: its tensors under
    PEFT's names; tensors: copies on the CPU of the optimizer's state, the best adapter and the states of the random
    number generators; state: everything else, as JSON."""

    step: int
    adapter: dict[str, Any]
    tensors: dict[str, Any]
    state: Json


TrainEvent = Phase | MicroStepped | Stepped | Evaluated | Waiting | Checkpoint
Result = TypeVar("Result")
TrainEvents = Generator[TrainEvent, None, Result]  # of a part of a run, which returns a Result

# ---------------------------------------------------------------- adapters (filled by adapters)


@dataclass(frozen=True)
class AdapterVersion:
    """One published version of an adapter. digest: SHA-256 of adapter_config.json and adapter_model.safetensors.
    protected: it cannot be deleted."""

    name: str
    version: int
    digest: str
    path: str
    base_model: str
    base_digest: str
    created_at: float
    current: bool
    manifest: Json
    tags: tuple[str, ...] = ()
    protected: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Repair:
    """Something wrong on disk. action: what carrying it out does, or why nothing can be done (`carry_out` is None)."""

    problem: str
    action: str
    carry_out: Callable[[], None] | None = None


@dataclass(frozen=True)
class CheckpointVersion(AdapterVersion):
    """A checkpoint of an unfinished job, which is served like a version; `version` is its step."""

    @property
    def job_id(self) -> str:
        job_id: str = self.manifest["job_id"]
        return job_id

    @property
    def id(self) -> str:
        return f"{self.name}@{self.job_id[:8]}-{self.version}"
