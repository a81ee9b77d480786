"""Which base an adapter is served on: the one that it was trained on, whatever it is called."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from fortwo.errors import InvalidAdapter
from fortwo.records import AdapterVersion


@dataclass(frozen=True)
class TrainedOn:
    """What an adapter's manifest says about its base. adapter: what to call it in messages; named: the id that the base
    had; digest: of the base, or of its weights alone."""

    adapter: str
    named: str
    digest: str

    @classmethod
    def of(cls, version: AdapterVersion) -> TrainedOn:
        return cls(f"Adapter {version.id!r}", version.base_model, version.base_digest)


def choose_base(
    trained_on: TrainedOn,
    known: Mapping[str, tuple[str, str]],
    *,
    loaded: Container[str],
    unprepared: Container[str],
) -> str | None:
    """The id of the base to serve an adapter on: the one that its manifest names if the digest agrees, else one with
    the same digest, else the one it names if that must be prepared first to know its digest, else one with the same
    weights, for adapters whose manifest has the digest of the weights alone.

    known: digest and weights_digest by id. Of equal bases one that is loaded is preferred.
    """
    digest, named = trained_on.digest, trained_on.named
    if named in known and digest in known[named]:
        return named
    order = sorted(known, key=lambda id: (id not in loaded, id))
    for id in order:
        if known[id][0] == digest:
            return id
    if named in unprepared:
        return named
    return next((id for id in order if known[id][1] == digest), None)


def no_base(trained_on: TrainedOn, known: Mapping[str, tuple[str, str]], waiting: list[str]) -> InvalidAdapter:
    """waiting: bases that the user added and that are not prepared."""
    named = trained_on.named
    what = f"{trained_on.adapter} was trained on {named!r} with digest {trained_on.digest}"
    if named in known:
        return InvalidAdapter(
            f"{what}, but {named!r} now has digest {known[named][0]}: its weights, "
            "positions, tokenizer or chat template are other ones.",
            hint="Restore the base's files, or train the adapter again. A base under another path is added with: "
            "fortwo models add ID PATH",
        )
    prepare = f", or prepare the one it needs if it is among: {', '.join(waiting)} (fortwo models fetch ID)"
    return InvalidAdapter(
        f"{what}; no base model here has this digest.",
        hint=f"Add that base: fortwo models add ID PATH{prepare if waiting else ''}",
    )
