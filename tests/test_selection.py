"""Which form for how many rows: pure, from what was measured, within what memory there is."""

from __future__ import annotations

from pathlib import Path

from fortwo.quantization.selection import ROWS, Choice, Measured, Measurements, choose, worthwhile

NBYTES = {"fp32": 400, "bf16": 200, "int8": 106, "int4": 62}


def seconds(**by_form: float | tuple[float, float]) -> dict[str, dict[int, float]]:
    """A figure, or one for up to 32 rows and one for more."""
    pairs = {form: given if isinstance(given, tuple) else (given, given) for form, given in by_form.items()}
    return {form: {rows: few if rows <= 32 else many for rows in ROWS} for form, (few, many) in pairs.items()}


def test_a_form_that_another_is_nearer_and_smaller_than_is_not_worth_it() -> None:
    assert worthwhile({"fp32": 0, "bf16": 0, "int8": 0.007, "int4": 0.1}, NBYTES, 0.01) == ["fp32", "bf16", "int8"]
    assert worthwhile({"fp32": 0, "bf16": 0, "int8": 0.007, "int4": 1e-6}, NBYTES, 0.01) == ["fp32", "bf16", "int4"]
    assert worthwhile({"fp32": 0, "bf16": 0.02}, NBYTES, 0.01) == ["fp32"]


def test_each_number_of_rows_gets_its_fastest_form() -> None:
    choice = choose(seconds(fp32=(40, 90), bf16=(20, 30), int4=(5, 60)), NBYTES, bound=1000, keep="fp32")
    assert [choice.format_for(rows) for rows in (1, 3, 32, 33, 64, 100, 5000)] == ["int4"] * 3 + ["bf16"] * 4
    assert choice.formats == ("int4", "bf16")


def test_the_more_exact_form_wins_where_the_other_is_hardly_faster() -> None:
    assert choose(seconds(fp32=10, int8=9.2), NBYTES, bound=1000).formats == ("fp32",)
    assert choose(seconds(fp32=10, int8=8), NBYTES, bound=1000).formats == ("int8",)


def test_memory_bounds_how_many_forms_are_held() -> None:
    found = seconds(fp32=(40, 90), bf16=(20, 30), int4=(5, 60))
    assert choose(found, NBYTES, bound=662, keep="fp32").formats == ("int4", "bf16")
    assert choose(found, NBYTES, bound=661, keep="fp32").formats == ("int4",)
    assert choose(found, NBYTES, bound=262).formats == ("int4", "bf16")
    assert choose(found, NBYTES, bound=261).formats == ("int4",)


def test_where_nothing_fits_the_smallest_form_is_held() -> None:
    assert choose(seconds(fp32=1, int4=2), {"fp32": 400, "int4": 62}, bound=10) == Choice.fixed("int4")


def test_a_second_form_must_be_worth_its_memory() -> None:
    found = seconds(fp32=(100, 100), int4=(5, 100), int8=(5, 97))
    assert choose(found, NBYTES, bound=1000).formats == ("int8",)


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    one = Measured("m", "a processor", 2, {"fp32": {1: 0.5}}, ((1, "fp32"),))
    other = Measured("n", "a processor", 4, {"int4": {1: 0.25, 512: 3.0}}, ((1, "int4"), (512, "int4")))
    known = Measurements(tmp_path / "home")
    assert known.all() == {}
    known.put("a", one)
    known.put("b", other)
    assert Measurements(tmp_path / "home").all() == {"a": one, "b": other}
    assert [file.name for file in (tmp_path / "home").iterdir()] == ["measured.json"]


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"a": {"model": "m"}}', '{"a": 3}'):
        (tmp_path / "measured.json").write_text(text)
        assert Measurements(tmp_path).all() == {}
    known = Measurements(tmp_path)
    known.put("a", one := Measured("m", "p", 1, {"fp32": {1: 1.0}}, ((1, "fp32"),)))
    assert known.all() == {"a": one}
