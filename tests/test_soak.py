"""The short form of `make soak`: a few inputs of each kind. And what its parts call a fault."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from bench.soak import kinds
from bench.soak.fuzz import SPARE_BYTES, Kind, fuzz
from fortwo.errors import InvalidRequest

EXAMPLES = 2
PATIENCE = 600.0  # seconds; a busy machine may need many


def found_in(kind: Kind[object]) -> list[str]:
    return [
        f"{kind.name}: {fault.what}\n{fault.told}" for fault in fuzz(kind, EXAMPLES, seconds=PATIENCE).faults.values()
    ]


def test_files_and_schemas_end_as_a_success_or_an_error_of_ours(tmp_path: Path) -> None:
    parts = kinds.Parts(tmp_path)
    try:
        assert [fault for kind in kinds.kinds(parts).values() for fault in found_in(kind)] == []
    finally:
        parts.engine.close()


def test_bodies_and_uploads_end_as_a_success_or_an_error_of_ours(tmp_path: Path) -> None:
    with kinds.bodies_and_uploads(tmp_path) as found:
        assert [fault for kind in found.values() for fault in found_in(kind)] == []


# ---------------------------------------------------------------- what fuzz itself finds


def fail(given: int) -> str:
    if given > 10:
        raise InvalidRequest("too large", hint="Send less.")
    if given > 5:
        raise ValueError(f"{given} is odd")
    return "small" if given else "none"


def test_errors_of_ours_are_ends_and_others_are_faults() -> None:
    outcome = fuzz(Kind("numbers", st.integers(0, 20), fail, lambda _: 8), 200)
    assert set(outcome.ends) == {"small", "none", "invalid_request"}
    (fault,) = outcome.faults.values()
    assert fault.what == "ValueError in test_soak:fail"
    assert fault.times > 1
    assert fault.example in range(6, 11)


def test_memory_beyond_twice_the_input_is_a_fault() -> None:
    kind = Kind("memory", st.just(SPARE_BYTES + (64 << 20)), bytearray, lambda _: 8)
    assert list(fuzz(kind, 1).faults) == ["too much memory"]


def test_a_hang_is_a_fault() -> None:
    def hang(_: int) -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    assert list(fuzz(Kind("hang", st.just(1), hang, lambda _: 8), 1, seconds=0.05).faults) == ["too long"]
