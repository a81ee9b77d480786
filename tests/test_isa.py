"""Levels of instructions: what belongs to which architecture, and what the compiler is told."""

from __future__ import annotations

import pytest

from fortwo.errors import InvalidRequest
from fortwo.kernels import isa


@pytest.mark.parametrize("level", [one for one in ("avx2", "amx", "neon", "dotprod") if one not in isa.LEVELS])
def test_a_level_of_another_architecture_is_refused_with_those_there_are(level: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        isa.cap(level)
    assert level in raised.value.message
    assert ", ".join(isa.LEVELS) in str(raised.value.hint)


def test_the_levels_of_this_processor_go_up_to_its_highest() -> None:
    highest = isa.highest()
    if highest is None:
        assert isa.levels() in ((None,), ("none",))
    else:
        assert set(isa.levels()) <= set(isa.LEVELS)
        assert isa.LEVELS.index(highest) == max(isa.LEVELS.index(one) for one in (highest, *map(str, isa.levels())))


@pytest.mark.parametrize(
    ("features", "flag"),
    [({"asimd", "asimddp"}, "armv8.2-a+dotprod"), ({"asimd", "asimddp", "i8mm"}, "armv8.2-a+dotprod+i8mm")],
)
def test_arm_is_compiled_for_the_instructions_it_has(
    monkeypatch: pytest.MonkeyPatch, features: set[str], flag: str
) -> None:
    monkeypatch.setattr(isa, "flags", lambda: frozenset(features))
    assert isa.compiler_flags("dotprod") == (f"-march={flag}",)
    assert isa.compiler_flags("neon") == ("-march=armv8-a",)


@pytest.mark.parametrize(
    ("features", "level"), [(set(), None), ({"asimd"}, "neon"), ({"asimd", "asimddp", "i8mm"}, "dotprod")]
)
def test_the_highest_level_of_an_arm_processor(
    monkeypatch: pytest.MonkeyPatch, features: set[str], level: str | None
) -> None:
    monkeypatch.setattr(isa, "LEVELS", ("none", *isa.ARM_LEVELS))
    monkeypatch.setattr(isa, "flags", lambda: frozenset(features))
    assert isa.highest.__wrapped__() == level
