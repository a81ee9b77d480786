"""All errors that fortwo raises on purpose: one tree of classes with the same fields.

An error names what is wrong (`param`, and the value in the message) and the remedy (`hint`). `server.errors` turns it
into an HTTP response, `cli` into two lines of text; nothing else formats errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

E = TypeVar("E", bound="FortwoError")
LONGEST = 4000  # characters of a message, hint or param that are shown


class FortwoError(Exception):
    """Base class.

    message: what is wrong, with the offending value.
    param:   dotted name of the field at fault ("training_config.learning_rate"), if there is one.
    hint:    what to do about it.
    code:    machine-readable slug; each class has a default.
    retry_after: seconds to wait before trying again, if that is known.
    """

    code = "internal_error"
    type = "server_error"
    status = 500
    retry_after: int | None = None

    def __init__(
        self, message: str, *, param: str | None = None, hint: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.hint = hint
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The HTTP body: {"error": {message, type, code, param, hint}}. Lone surrogates are escaped. Texts are cut
        off after LONGEST characters, because they may repeat what a client sent."""
        fields = ("message", "type", "code", "param", "hint")
        return {"error": {name: _encodable(getattr(self, name)) for name in fields}}


def _encodable(text: str | None) -> str | None:
    if text is None:
        return None
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return shown.encode(errors="backslashreplace").decode()


class InvalidRequest(FortwoError):
    """The caller's input is wrong: a field, a value or a file."""

    code = "invalid_request"
    type = "invalid_request_error"
    status = 400


def all_of(errors: Sequence[E]) -> E:
    """Several findings as one error, with param, code and class of the first. errors: at least one."""
    first = errors[0]
    if len(errors) == 1:
        return first
    messages = dict.fromkeys(error.message.rstrip(".") for error in errors)
    hints = dict.fromkeys(error.hint for error in errors if error.hint is not None)
    return type(first)("; ".join(messages) + ".", param=first.param, hint=" ".join(hints) or None, code=first.code)


class InvalidDataset(InvalidRequest):
    """A dataset or one of its rows is wrong; the message has the line number."""

    code = "invalid_dataset"


class Unauthorized(FortwoError):
    code = "invalid_api_key"
    type = "authentication_error"
    status = 401


class Forbidden(FortwoError):
    """The caller is known, but may not do this."""

    code = "forbidden"
    type = "permission_error"
    status = 403


class NotFound(FortwoError):
    """A model, adapter, version, job or file does not exist."""

    code = "not_found"
    type = "not_found_error"
    status = 404


class Conflict(FortwoError):
    """The request is valid, but the current state does not allow it."""

    code = "conflict"
    type = "conflict_error"
    status = 409


class UnsupportedModel(InvalidRequest):
    """fortwo cannot run this base model: its architecture, a missing tensor or a wrong shape."""

    code = "unsupported_model"


class InvalidAdapter(InvalidRequest):
    """An adapter on disk cannot be served: a missing, truncated or foreign file, a wrong base, or no effect."""

    code = "invalid_adapter"


class SourceUnreachable(FortwoError):
    """The source of a base model (package index, hub) cannot be reached."""

    code = "source_unreachable"
    status = 503


class StorageFailed(FortwoError):
    """Writing to disk failed; what was stored before is unchanged."""

    code = "storage_failed"
    status = 507


class Unavailable(FortwoError):
    """The server is shutting down, does not answer, or has no room; or what was requested is gone."""

    code = "unavailable"
    status = 503


class Overloaded(FortwoError):
    """The server is at its limit of requests that run or wait."""

    code = "queue_full"
    type = "rate_limit_error"
    status = 429

    def __init__(self, message: str, *, retry_after: int, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class DeadlineExceeded(FortwoError):
    """A request took longer than the time limit."""

    code = "deadline_exceeded"
    type = "timeout_error"
    status = 504


class TrainingFailed(FortwoError):
    """A run cannot continue (`nan_loss`) or missed its targets (`targets_missed`)."""

    code = "training_failed"
