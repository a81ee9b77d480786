"""Plans, reports, jobs, models and adapters as Rich tables and text."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fortwo.display import value
from fortwo.facts.verdict import verdict_of
from fortwo.records import Json

if TYPE_CHECKING:
    from fortwo.facts.exam import Exam, Result

FACT_METRICS = ("efficacy", "paraphrase", "specificity", "portability")
METRICS = (*FACT_METRICS, "accuracy", "retention", *(f"kept_{name}" for name in FACT_METRICS), "score")
STATUS_STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "paused": "cyan"}


def table(*columns: str, title: str | None = None, wrapped: tuple[str, ...] = ()) -> Table:
    """A table without borders. In a narrow terminal only the columns named in `wrapped` are broken into lines."""
    shape = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        shape.add_column(column, overflow="fold", no_wrap=column not in wrapped)
    return shape


def size(count: int | None) -> str:
    """A number of bytes, in the unit that makes it short."""
    if count is None:
        return "-"
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 999.5:  # so that three digits are enough
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.3g} {unit}" if unit != "B" else f"{count} B"


def count(number: int | None) -> str:
    """A number of parameters, like 135M or 6.74B."""
    if number is None:
        return "-"
    return f"{number / 1e9:.3g}B" if number >= 999.5e6 else f"{number / 1e6:.3g}M"


def moment(stamp: float | None) -> str:
    return "-" if stamp is None else datetime.fromtimestamp(stamp).strftime("%Y-%m-%d %H:%M:%S")


def comparison(body: Json) -> RenderableType:
    """Two versions side by side: metrics, settings that differ, probes that changed, the distance of the weights."""
    left, right = body["left"], body["right"]
    metrics = table("metric", left, right, "difference")
    for name, one in body["metrics"].items():
        metrics.add_row(name, value(one["left"]), value(one["right"]), value(one["difference"]))
    settings = table("setting", left, right, wrapped=(left, right))
    for one in body["settings"]:
        settings.add_row(one["name"], value(one["left"]), value(one["right"]))
    probes = table("kind", "prompt", left, right, "passed by", wrapped=("prompt", left, right))
    for one in body["probes"]:
        probes.add_row(one["kind"], one["prompt"], one["left"], one["right"], right if one["passed"] else left)
    apart = body["weights"]
    weights = (
        "The weights are not compared, because the versions belong to two bases, or one of them scales the base's own "
        "weights (DoRA)."
    )
    if apart is not None:
        relative, cosine = value(apart["relative"]), value(apart["cosine"])
        weights = f"The updates of the weights are {relative} of the first one's norm apart (cosine {cosine})."
    parts = [part for part in (metrics, settings, probes) if part.row_count]
    return Group(*(item for part in parts for item in (part, "")), weights)


def status(word: str) -> Text:
    return Text(word, style=STATUS_STYLES.get(word, ""))


def notes(warnings: list[Json], style: str = "yellow") -> RenderableType:
    """Warnings or diagnoses, each with its hint; nothing if there are none."""
    lines = [
        line
        for warning in warnings
        for line in (Text(f"! {warning['message']}", style=style), Text(f"  {warning['hint']}", style="dim"))
    ]
    return Group(*([""] if lines else []), *lines)


def plan(body: Json) -> RenderableType:
    """A plan: every setting with its origin and reason, the computed values, the warnings."""
    title = f"Plan: {body['adapter_name']} on {body['model']}"
    settings = table("setting", "value", "origin", "reason", title=title, wrapped=("value", "reason"))
    for setting in body["settings"]:
        style = {"user": "bold", "auto": "cyan"}.get(setting["origin"], "")
        settings.add_row(
            setting["name"], value(setting["value"]), Text(setting["origin"], style=style), setting["reason"]
        )
    computed = table("computed", "", wrapped=("",))
    computed.add_row("objective", f"{body['objective']}, targets {value(body['targets'])}")
    for name, thing in body["computed"].items():
        computed.add_row(name, size(thing) if name.endswith("bytes") else value(thing))
    return Group(settings, "", computed, notes(body["warnings"]))


def plan_summary(body: Json) -> RenderableType:
    """A plan in a few lines: what is trained on what, how long it takes, what it must reach, and the warnings."""
    from fortwo.train.estimate import format_duration

    computed = body["computed"]
    first = f"{body['adapter_name']} on {body['model']}: {body['objective']}"
    rows = [f"{value(computed[name])} {name}" for name in ("rows", "steps") if computed.get(name) is not None]
    if (seconds := computed.get("seconds")) is not None:
        rows.append(f"about {format_duration(seconds)}")
    if (needed := computed.get("bytes")) is not None:
        rows.append(f"{size(needed)} of memory")
    targets = [f"Targets: {value(body['targets'])}."] if body["targets"] else ["There are no targets."]
    return Group(Text(f"Plan: {', '.join([first, *rows])}."), *targets, notes(body["warnings"]))


def outcome(job: Json) -> RenderableType:
    """What came of a job: checkpoints, verdict, diagnosis, error and adapter."""
    lines: list[RenderableType] = [
        f"Checkpoint of step {checkpoint['step']}: fortwo chat --model {checkpoint['model']}"
        for checkpoint in job["checkpoints"]
    ]
    if job["status"] == "paused":
        lines.append(f"Resume it with: fortwo jobs resume {job['job_id']}")
    if (found := job["report"]) is not None:
        shares = {name: metric["value"] for name, metric in found["metrics"].items()}
        lines += [metrics_line(shares), notes(found["diagnosis"], style="red")]
        style = STATUS_STYLES.get(job["status"], "")
        lines.append(Text(verdict_of(found, job["plan"]["targets"]), style=f"bold {style}".strip()))
    if job["error"] is not None:
        lines.append(error(job["error"]["message"], job["error"]["hint"]))
    if job["adapter"] is not None:
        name, version = job["adapter"]["name"], job["adapter"]["version"]
        ref = name if job["status"] == "succeeded" else f"{name}@{version}"
        lines.append(f"The adapter is {name}@{version}. Try it with: fortwo chat --model {ref}")
    return Group(*lines)


def replicas(found: Json) -> Table:
    """The replicas that answer."""
    title = f"{len(found['replicas'])} of {found['wanted']} replicas answer"
    rows = table("replica", "machine", "process", "replies", "bases", "adapters", title=title, wrapped=("adapters",))
    for one in found["replicas"]:
        names = ", ".join(one["bases"]), ", ".join(one["adapters"])
        rows.add_row(one["id"], one["machine"], str(one["pid"]), str(one["replies"]), *names)
    return rows


def plan_against_actual(planned: Json, actual: Json) -> Table:
    """The values computed before the run beside those measured in it."""
    rows = table("", "plan", "actual", title="Plan against actual", wrapped=("plan", "actual"))
    computed = planned["computed"]
    for name in [*computed, *(name for name in actual if name not in computed)]:
        shown = size if name.endswith("bytes") else value
        rows.add_row(name, shown(computed.get(name)), shown(actual.get(name)))
    return rows


def metrics_line(metrics: dict[str, float], eval_loss: float | None = None) -> str:
    loss = [] if eval_loss is None else [f"eval_loss {eval_loss:.4g}"]
    return "  ".join([*(f"{name} {metrics[name]:.2f}" for name in METRICS if name in metrics), *loss])


def report(body: Json) -> RenderableType:
    """A report: the metrics of base and adapter, those of each fact if there are several, and the transcripts."""
    prompted = body.get("prompted_metrics", {})
    rows = table(
        "metric", "base", *(["fact in the prompt"] if prompted else []), "adapter", "95 %", "n", title="Report"
    )
    for name in METRICS:
        if name not in body["metrics"]:
            continue
        found = body["metrics"][name]
        without = [one.get(name) for one in (body["base_metrics"], prompted)[: 2 if prompted else 1]]
        shares = ["-" if one is None else f"{one['value']:.2f}" for one in (*without, found)]
        rows.add_row(name, *shares, f"{found['low']:.2f} to {found['high']:.2f}", str(found["n"]))
    of_facts = body.get("facts", [])
    names = [name for name in FACT_METRICS if any(name in one["metrics"] for one in of_facts)]
    facts = table("fact", *names, wrapped=("fact",))
    for one in of_facts:
        found = [one["metrics"].get(name) for name in names]
        facts.add_row(
            f"{one['subject']} (kept)" if one.get("kept") else one["subject"],
            *("-" if share is None else f"{share['value']:.2f}" for share in found),
        )
    columns = ("", "kind", "asked", "base said", "adapter said")
    transcripts = table(*columns, title="Transcripts", wrapped=columns[2:])
    for one in body["transcripts"]:
        mark = Text("✓", style="green") if one["passed"] else Text("✗", style="red")
        transcripts.add_row(mark, one["kind"], one["prompt"], one["base"], one["adapter"])
    by_fact: list[RenderableType] = ["", facts] if facts.row_count > 1 else []
    lines = [*_engine(body), *_escalations(body), *_eval_losses(body)]
    return Group(rows, *by_fact, *lines, "", transcripts, notes(body["diagnosis"], style="red"))


def exam(asked: Exam, found: Result, where: str) -> RenderableType:
    """The metrics of an exam that was run again, beside those of the report. where: what it was run in."""
    rows = table("metric", "report", where, "95 %", "n", title="The exam, run again")
    for name in METRICS:
        if (metric := found.metrics.get(name)) is not None:
            before = asked.reported.get(name)
            shown = "-" if before is None else f"{before.value:.2f}"
            rows.add_row(name, shown, f"{metric.value:.2f}", f"{metric.low:.2f} to {metric.high:.2f}", str(metric.n))
    note = (
        "" if found.exact else "Retention is the share of characters before the first difference from the base's reply."
    )
    return Group(rows, *([note] if note else []))


def _engine(body: Json) -> list[str]:
    """Who replied, where it was not fortwo itself."""
    engine = body.get("engine", "fortwo")
    return [] if engine == "fortwo" else [f"The replies are those of {engine}."]


def _escalations(body: Json) -> list[str]:
    """What each escalation raised, and how the best metrics changed."""
    lines = []
    for one in body.get("escalations", []):
        pairs = ((name, one["before"].get(name), one["after"].get(name)) for name in METRICS)
        changes = [
            f"{name} {was:.2f} to {now:.2f}" for name, was, now in pairs if None not in (was, now) and was != now
        ]
        what = f"{', '.join(one['raised'])} raised after step {one['step']}, for {one['steps']} steps"
        lines.append(f"{what}: {', '.join(changes) if changes else 'nothing changed'}")
    return lines


def _eval_losses(body: Json) -> list[str]:
    """The eval_loss of the validation rows by step, the base's first; old reports have none."""
    losses = [f"{one['loss']:.4g} after {one['step']}" for one in body.get("eval_losses", [])]
    return [f"eval_loss of the validation rows by step: {', '.join(losses)}"] if losses else []


def preview(body: Json) -> RenderableType:
    """Rows as they are trained on: tokens that are learned in green, the others dim."""
    lines: list[RenderableType] = []
    for row in body["rows"]:
        head = f"line {row['line']}: {row['tokens']} tokens, {row['supervised_tokens']} learned"
        lines.append(Text(head, style="bold"))
        if not row["fits"]:
            reason = f"This row is refused: the context of {body['model']} has only {body['context']} tokens."
            lines.append(Text(reason, style="red"))
        text, role = Text(), None
        for segment in row["segments"]:
            if segment["role"] != role:
                role = segment["role"]
                text.append("" if role is None else f"[{role}] ", style="cyan")
            text.append(segment["text"], style="green" if segment["supervised"] else "dim")
        lines += [text, ""]
    return Group(*lines)


def error(message: str, hint: str | None) -> Text:
    lines = Text(message, style="red")
    if hint is not None:
        lines.append(f"\n{hint}", style="default")
    return lines
