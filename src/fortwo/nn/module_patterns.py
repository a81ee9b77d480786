"""How PEFT's options choose modules: by names, by ends of names, or by regular expressions. Torch-free."""

from __future__ import annotations

import re2

Pattern = tuple[tuple[str, float], ...]  # PEFT's rank_pattern and alpha_pattern, in their order
Modules = tuple[str, ...] | str  # ends of names after a dot, or whole names; a text is a pattern for whole names
MOST_KEYS, LONGEST_KEY = 1000, 1000  # of a pattern: more than a pattern for every projection of a large model needs
_RE2 = re2.Options()
_RE2.log_errors = False  # a bad pattern is the caller's mistake, and the caller is told


def expression(key: str) -> re2._Regexp:
    """A pattern's key as PEFT reads it: a regular expression for the end of a module's name, from the name's beginning
    or after a dot.

    RE2 matches it, in time that is linear in the length of the name, because the text comes from a client and the
    standard library's engine can take for ever. RE2 has no look-around and no back-references. Raises ValueError
    saying what is wrong with the key.
    """
    return _compiled(rf"(.*\.)?({key})$", key)


def whole_expression(pattern: str) -> re2._Regexp:
    """A text as PEFT reads it where it gives target_modules or exclude_modules: a regular expression for a module's
    whole name; its fullmatch decides. Raises ValueError as `expression` does."""
    return _compiled(pattern, pattern)


def layer_expression(pattern: str) -> re2._Regexp:
    """An entry of layers_pattern as PEFT reads it; the group `idx` of a match is the layer. Raises ValueError as
    `expression` does."""
    return _compiled(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", pattern)


def _compiled(pattern: str, key: str) -> re2._Regexp:
    if len(key) > LONGEST_KEY:
        raise ValueError(f"it has {len(key)} characters, at most {LONGEST_KEY} are allowed")
    try:
        return re2.compile(pattern, _RE2)
    except re2.error as error:
        said = error.args[0]
        reason = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise ValueError(f"{reason} (RE2's syntax: no look-around, no back-references)") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None


def deciding(pattern: Pattern, module: str) -> tuple[str, float] | None:
    """The entry that decides for a module: the first whose key matches."""
    return next((entry for entry in pattern if expression(entry[0]).match(module)), None)


def matches(modules: Modules, module: str) -> bool:
    """Whether PEFT's target_modules or exclude_modules choose a module, by its full name."""
    if isinstance(modules, str):
        return whole_expression(modules).fullmatch(module) is not None
    return module in modules or any(module.endswith(f".{name}") for name in modules)
