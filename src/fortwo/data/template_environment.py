"""Renders chat templates, which come with a base model and are not trusted, in jinja2's sandbox and within a budget.

A template sees what transformers shows it: the same options, functions and tags. What a rendering may cost is limited
in passes through loops and macros, in processor time, and in the length of a text. The counting is added to the parsed
template, so that no template can avoid it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, ext, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

PASSES = 1_000_000  # through loops and macros of one rendering
SECONDS = 5.0  # of processor time of one rendering
LENGTH = 1 << 25  # characters of a text, or items of a list
BITS = 1 << 16  # of a whole number
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{6,}|\*)")  # a format that pads to more characters than anybody needs


class TemplateRefusal(Exception):
    """The template itself refused the conversation, with raise_exception."""


class TemplateFailure(Exception):
    """The template is wrong, or costs too much; the text says how."""


class ChatTemplate:
    """A compiled template. Raises TemplateFailure for a syntax error."""

    def __init__(self, text: str) -> None:
        try:
            self._template = _Environment().from_string(text)
        except Exception as error:  # a template can make the compiler fail in any way, with RecursionError for example
            raise TemplateFailure(_reason(error)) from None

    def render(self, **values: Any) -> str:
        """The text. Raises TemplateRefusal or TemplateFailure."""
        token = _budget.set(_Budget())
        try:
            return self._template.render(**values)
        except _Raised as error:
            raise TemplateRefusal(str(error)) from None
        except Exception as error:  # an expression can raise anything: TypeError, RecursionError, ...
            raise TemplateFailure(_reason(error)) from None
        finally:
            _budget.reset(token)


@dataclass
class _Budget:
    passes: int = PASSES
    ends: float = field(default_factory=lambda: time.thread_time() + SECONDS)

    def spend(self) -> None:
        self.passes -= 1
        if self.passes < 0:
            raise SecurityError(f"its loops and macros are passed through more than {PASSES:,} times")
        if time.thread_time() > self.ends:
            raise SecurityError(f"it computes longer than {SECONDS:.0f} s")


_budget: ContextVar[_Budget] = ContextVar("budget")


class _Raised(TemplateError):
    """raise_exception was called."""


class _Environment(ImmutableSandboxedEnvironment):
    """One for each template. The optimizer, which computes constants while it compiles, is switched off."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = [_GenerationTag, ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=dict
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return parsed

    def spend(self) -> None:
        """Called at the beginning of each pass through a loop or a macro."""
        _budget.get().spend()

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, also those that the loop's condition leaves out."""
        for item in items:
            _budget.get().spend()
            yield item

    def joined(self, *parts: Any) -> str:
        """What `~` makes of its operands."""
        return self.concat(str(part) for part in parts)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """All output of a template, of a macro and of a block is joined here."""
        found, length = [], 0
        for part in parts:
            length += len(part)
            _check(length, LENGTH)
            found.append(part)
        return "".join(found)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check(_len(left) + _len(right), LENGTH)
        elif operator == "*":
            _check(_len(left) * _number(right) + _len(right) * _number(left), LENGTH)
            _check(_bits(left) + _bits(right), BITS)
        elif operator == "**":
            _check(_bits(left) * _number(right), BITS)
        elif isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("it pads a text to a great length")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):  # of str.ljust and the like
            _check(_number(value), LENGTH)
        return super().call(context, obj, *args, **kwargs)


class _Counting(NodeTransformer):
    """Adds the counting to a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("counted", node.iter, lineno=node.lineno)
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("joined", *node.nodes, lineno=node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(_call("spend", lineno=node.lineno), lineno=node.lineno))
        return node


def _call(method: str, *args: nodes.Node, lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None, lineno=lineno)


class _GenerationTag(ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks what the assistant says, and writes it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        return str(caller())


class _Namespace(Namespace):
    """Refuses names that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")


def _raise_exception(message: object) -> None:
    raise _Raised(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own escapes characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise SecurityError(f"it makes a value of more than {limit:,} characters, items or bits")


def _len(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    where = "" if line is None else f" in line {line}"
    return f"{type(error).__name__}{where}: {error}"
