"""The commands that teach: they plan and start training jobs on files, facts in words, documents and folders."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fortwo.cli import views
from fortwo.cli.hub_dataset import PREFIX
from fortwo.cli.requests import (
    adapter_name,
    fact,
    file_dataset,
    file_datasets,
    training_request,
)
from fortwo.cli.terminal import AsJson, connect, error_screen, respond
from fortwo.errors import InvalidRequest

if TYPE_CHECKING:
    from fortwo.records import Json

teaching = typer.Typer()
ROWS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
DOCUMENTS = (".md", ".markdown", ".pdf")

Data = Annotated[
    str,
    typer.Argument(
        help="A file with rows or facts (.json, .jsonl, .csv, .tsv, .parquet, .txt), hub:OWNER/NAME for a dataset of "
        "the Hugging Face hub, a document (.md, .pdf), or the subject of a fact."
    ),
]
Answer = Annotated[str | None, typer.Argument(help="What the model is to say about the subject.", show_default=False)]
Questions = Annotated[
    list[str] | None,
    typer.Option("--question", help="A question about the subject; may be repeated.", show_default="common questions"),
]
Match = Annotated[
    list[str] | None,
    typer.Option(
        "--match", help="A phrase that marks a right reply; may be repeated.", show_default="read from the answer"
    ),
]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Another name of the subject; may be repeated.")]
HeldOut = Annotated[
    list[str] | None,
    typer.Option("--held-out", help="A question for the evaluation alone; may be repeated."),
]
Neighbors = Annotated[
    list[str] | None,
    typer.Option("--neighbor", help="A question about another subject, whose reply must stay; may be repeated."),
]
Controls = Annotated[
    list[str] | None,
    typer.Option("--control", help="An unrelated prompt, whose reply must stay; may be repeated."),
]
Name = Annotated[
    str | None, typer.Option("--name", help="Name of the adapter.", show_default="made of the subject or the document")
]


def _file(text: str) -> Path | str:
    """A file that exists, or a dataset of the hub as it was written."""
    if text.startswith(PREFIX):
        return text
    if not (path := Path(text)).is_file():
        raise typer.BadParameter(f"File {text!r} does not exist.")
    return path


Validation = Annotated[
    Any,
    typer.Option(
        "--validation",
        help="A file or dataset like DATA, whose rows are evaluated only.",
        parser=_file,
        metavar="VALIDATION",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="A .json file with lora_config, training_config etc.", exists=True, dir_okay=False),
]
Objective = Annotated[
    str | None, typer.Option("--objective", help="auto, sft, override, dpo, kto or orpo.", show_default="auto")
]
Onto = Annotated[str | None, typer.Option("--onto", help="Adapter, or adapter@version, to continue from.")]
Effort = Annotated[str | None, typer.Option("--effort", help="normal or max.", show_default="normal")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Workers of the server's Ray cluster that compute the gradients.", min=1),
]
Base = Annotated[str | None, typer.Option("--model", help="Base model.", show_default="the server's default")]
Writer = Annotated[
    str | None,
    typer.Option(
        "--writer",
        help="Of a document: the URL of an OpenAI-compatible server whose model writes the facts.",
        show_default="fortwo's own",
    ),
]
WriterModel = Annotated[
    str | None,
    typer.Option("--writer-model", help="The model's name there.", show_default="the base that is taught"),
]
KeyEnv = Annotated[
    str | None, typer.Option("--key-env", help="The environment variable that holds that server's API key.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Start without asking. In a pipe nothing is asked.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the job to end.")]


@teaching.command()
def teach(
    data: Data,
    answer: Answer = None,
    question: Questions = None,
    match: Match = None,
    alias: Aliases = None,
    held_out: HeldOut = None,
    neighbor: Neighbors = None,
    control: Controls = None,
    name: Name = None,
    validation: Validation = None,
    config: Config = None,
    objective: Objective = None,
    model: Base = None,
    onto: Onto = None,
    effort: Effort = None,
    workers: Workers = None,
    writer: Writer = None,
    writer_model: WriterModel = None,
    key_env: KeyEnv = None,
    yes: Yes = False,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on DATA and publish it if its replies meet the targets. DATA is a file of rows, or, with an
    answer, the subject of a fact, or a document (.md, .pdf): a model writes a fact for each of its sections, and you
    approve them. The plan is shown first. With --json each event is a line, and the last line is the job."""
    from fortwo.cli.handbook import facts_of_document, writer_of
    from fortwo.cli.live import start

    of_fact = {"questions": question, "match": match, "aliases": alias, "held_out": held_out, "neighbors": neighbor}
    from_document = {"writer": writer, "writer-model": writer_model, "key-env": key_env}
    options = _options(objective, model, onto, effort, workers)
    if answer is None and Path(data).suffix.lower() in DOCUMENTS:
        _check_file(Path(data), [name for name, texts in (of_fact | {"controls": control}).items() if texts])
        by = writer_of(writer, writer_model, key_env, model)
        datasets: Json = {"dataset": {"facts": []}}
        if validation is not None:
            datasets["validation_dataset"] = file_dataset(validation)
        # What is wrong with the rest of the request is told before anybody approves facts.
        body = training_request(datasets, _name(data, answer, name), config, **options)
        body["dataset"] = {"facts": facts_of_document(Path(data), by, yes, as_json)}
    else:
        _check_no_writer([name for name, given in from_document.items() if given is not None])
        datasets = _datasets(data, answer, of_fact | {"controls": control}, validation)
        body = training_request(datasets, _name(data, answer, name), config, **options)
    start(connect(), body, ask=not yes, detach=detach, as_json=as_json)


@teaching.command()
def plan(
    data: Data,
    answer: Answer = None,
    question: Questions = None,
    match: Match = None,
    alias: Aliases = None,
    held_out: HeldOut = None,
    neighbor: Neighbors = None,
    control: Controls = None,
    name: Annotated[str, typer.Option("--name", help="Name of the adapter.")] = "plan",
    validation: Validation = None,
    config: Config = None,
    objective: Objective = None,
    model: Base = None,
    onto: Onto = None,
    effort: Effort = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Show the plan for training on DATA, without starting it."""
    of_fact = {"questions": question, "match": match, "aliases": alias, "held_out": held_out, "neighbors": neighbor}
    datasets = _datasets(data, answer, of_fact | {"controls": control}, validation)
    options = _options(objective, model, onto, effort, workers)
    found = connect().post("/api/training/plan", training_request(datasets, name, config, **options))
    respond(found, views.plan(found), as_json)


@teaching.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="A folder with files of facts (.json, .jsonl).")],
    once: Annotated[bool, typer.Option("--once", help="Teach what the files say now, and end.")] = False,
    config: Config = None,
    model: Base = None,
    effort: Effort = None,
    as_json: AsJson = False,
) -> None:
    """Teach the files of facts in a folder whenever one has changed, each into an adapter with the name of the file.
    New facts are taught onto the current version, and a new version becomes current only if it met its targets. With
    --once it exits with 0 if every adapter knows what its file says, else with 1."""
    from fortwo.cli.folder import Folder

    watched = Folder(connect(), folder, config, as_json, model=model, effort=effort)
    if once and not watched.teach_once():
        raise typer.Exit(1)
    if not once:
        with suppress(KeyboardInterrupt):
            watched.watch()


def _options(
    objective: str | None, model: str | None, onto: str | None, effort: str | None, workers: int | None
) -> dict[str, str | int | None]:
    """The fields of a request that have an option of their own."""
    return {"objective": objective, "model": model, "parent": onto, "effort": effort, "workers": workers}


def _datasets(
    data: str, answer: str | None, of_fact: dict[str, list[str] | None], validation: Path | str | None
) -> Json:
    """The fields of a request that give rows: a fact in words if there is an answer, else those of the file `data`."""
    given = {name: texts for name, texts in of_fact.items() if texts}
    file = Path(data)
    if answer is None and data.startswith(PREFIX) and not given:
        return file_datasets(data, validation)
    if answer is None:
        _check_file(file, list(given))
        return file_datasets(file, validation)
    if file.is_file() and file.suffix.lower() in (*ROWS, *DOCUMENTS):
        raise InvalidRequest(
            f"{data} is a file, and {answer!r} is given as the answer of a fact.",
            param="data",
            hint="Give the file alone, with --name for the adapter, or the subject of a fact and its answer.",
        )
    questions, phrases = given.pop("questions", []), given.pop("match", [])
    datasets: Json = {"dataset": {"facts": [fact(data, answer, questions, phrases, **given)]}}
    return datasets if validation is None else datasets | {"validation_dataset": file_dataset(validation)}


def _check_no_writer(given: list[str]) -> None:
    if given:
        raise InvalidRequest(
            f"{', '.join(f'--{name}' for name in given)} belong to a document, whose facts a model writes.",
            param=given[0].replace("-", "_"),
            hint=f"Give a document ({', '.join(DOCUMENTS)}) as DATA, or leave them out.",
        )


def _check_file(file: Path, of_fact: list[str]) -> None:
    """Raises InvalidRequest with all that is wrong with a file of rows. of_fact: what was given for a fact in words."""
    wrong, hints = [], []
    if of_fact:
        wrong.append(f"{', '.join(of_fact)} belong to a fact in words, and no answer is given")
        hints.append('Write: fortwo teach "SUBJECT" "ANSWER", or put them into the file.')
    if file.is_dir():
        wrong.append(f"{file} is a folder")
        hints.append(f"To teach the files of facts in it: fortwo watch {file}")
    elif not file.is_file():
        wrong.append(f"there is no file {str(file)!r}")
        hints.append(f'To teach a fact, give its answer too: fortwo teach "{file}" "ANSWER"')
    if wrong:
        told = "; ".join(wrong)
        raise InvalidRequest(f"{told[0].upper()}{told[1:]}.", param="data", hint=" ".join(hints))


def _name(data: str, answer: str | None, name: str | None) -> str:
    """The name of the adapter. Raises InvalidRequest if there is none for a file of rows."""
    if name is not None:
        return name
    if answer is None and Path(data).suffix.lower() in DOCUMENTS:
        return adapter_name(Path(data).stem)
    if answer is None:
        raise InvalidRequest(
            "The adapter has no name.", param="name", hint=f"Give one: fortwo teach {data} --name NAME"
        )
    return adapter_name(data)


@teaching.command()
def migrate(
    config: Annotated[
        Path, typer.Argument(help="A .yml, .yaml or .json file.", exists=True, dir_okay=False, readable=True)
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the adapter.", show_default="the configuration's output")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the training request that a configuration of Axolotl, LLaMA-Factory or TRL means, as JSON. What it leaves
    out, and why, goes to the error output, or with --json into the same document. Needs no server."""
    from fortwo.hub.base_names import bases_named
    from fortwo.hub.catalog import Catalog
    from fortwo.settings import load
    from fortwo.train.migration import migrate as migrated

    entries = Catalog(load().models_dir).entries()
    found = migrated(_yaml(config), name, lambda named: bases_named(named, entries))
    if as_json:
        respond({"request": found.request, "left_out": [asdict(one) for one in found.left_out]}, None, as_json)
        return
    for one in found.left_out:
        error_screen.print(f"left out {one.key} = {one.value!r}: {one.why}", soft_wrap=True)
    respond(found.request, None, as_json)


def _yaml(file: Path) -> Json:
    """The object in a YAML or JSON file."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"{file} is not YAML: {reason}.", hint="Correct the file and try again.") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file} does not contain an object of settings.", hint="Name a training configuration.")
    return found
