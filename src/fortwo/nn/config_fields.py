"""The fields of a config.json, each checked as it is read; all that is wrong is reported together. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fortwo.errors import UnsupportedModel

_MISSING = object()
_HINT = "Correct config.json, or save the model again with transformers' save_pretrained."


class Fields:
    """Values by name, and those of `defaults` for what is not there. A method that reads a field returns a harmless
    value for one that is wrong, so that reading goes on until `raise_findings`."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, within: str = "") -> None:
        self._values = {**(defaults or {}), **values}
        self._within = within
        self.findings: list[tuple[str, str]] = []

    def __contains__(self, name: str) -> bool:
        """Whether it has a value; null is none."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as it is; None for none."""
        return self._values.get(name)

    def inner(self, name: str, values: Any, defaults: Mapping[str, Any] | None = None) -> Fields:
        """The fields of an object, which report to these. values: of the object."""
        if not isinstance(values, Mapping):
            self.wrong(name, "is not an object", values)
            values = {}
        inner = Fields(values, defaults, f"{self._within}{name}.")
        inner.findings = self.findings
        return inner

    def wrong(self, name: str, what: str, value: Any = _MISSING) -> None:
        """Report a field. what: is wrong with it."""
        value = self._values.get(name, _MISSING) if value is _MISSING else value
        path = f"{self._within}{name}"
        self.findings.append((path, f"{path} is missing" if value is _MISSING else f"{path} = {value!r} {what}"))

    def whole(self, name: str, least: int = 1) -> int:
        """A whole number."""
        value = self._values.get(name, _MISSING)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self.wrong(name, f"is not a whole number of {least} or more")
        return max(1, least)

    def optional_whole(self, name: str, least: int = 1) -> int | None:
        """A whole number, or None for null and for nothing."""
        return self.whole(name, least) if name in self else None

    def number(self, name: str, above: float = 0.0) -> float:
        """A number."""
        value = self._values.get(name, _MISSING)
        if isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf:
            return float(value)
        self.wrong(name, f"is not a number above {above:g}")
        return above + 1.0

    def optional_number(self, name: str) -> float | None:
        """A number above 0, or None for null and for nothing."""
        return self.number(name) if name in self else None

    def flag(self, name: str) -> bool:
        """True or false; null and nothing are false."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, "is not true or false")
        return value is True

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of so many numbers above 0."""
        value = self._values.get(name, _MISSING)
        good = isinstance(value, list | tuple) and len(value) == length
        if good and all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in value):
            return tuple(map(float, value))
        self.wrong(name, f"is not a list of {length} numbers above 0")
        return (1.0,) * length

    def words(self, name: str, length: int, known: tuple[str, ...]) -> list[str]:
        """A list of so many of the known words."""
        value = self._values.get(name, _MISSING)
        if isinstance(value, list | tuple) and len(value) == length and all(word in known for word in value):
            return list(value)
        self.wrong(name, f"is not a list of {length} words out of {', '.join(known)}")
        return [known[0]] * length

    def raise_findings(self) -> None:
        """Raises UnsupportedModel naming all that is wrong, if anything is."""
        if self.findings:
            text = "; ".join(dict.fromkeys(text for _, text in self.findings))
            raise UnsupportedModel(f"config.json: {text}", param=self.findings[0][0], hint=_HINT)
