"""Every error fortwo raises on purpose: one tree, one shape.

An error names what was wrong (`param`, the value in the message) and the remedy (`hint`).
`server.app` turns it into the HTTP body, `cli` into two lines; nothing else formats errors.
"""

from __future__ import annotations


class FortwoError(Exception):
    """Base of the tree.

    message: what is wrong, with the offending value.
    param:   dotted name of the field at fault ("training_config.learning_rate"), if there is one.
    hint:    what to do about it.
    code:    machine-readable slug; each class has a default.
    retry_after: seconds after which trying again makes sense, where that is known.
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
        """The wire form: {"error": {message, type, code, param, hint}}; half a surrogate pair in it is written out."""
        fields = ("message", "type", "code", "param", "hint")
        return {"error": {name: _encodable(getattr(self, name)) for name in fields}}


def _encodable(text: str | None) -> str | None:
    return None if text is None else text.encode(errors="backslashreplace").decode()


class InvalidRequest(FortwoError):
    """The caller's input is at fault: a field, a value, a file."""

    code = "invalid_request"
    type = "invalid_request_error"
    status = 400


class InvalidDataset(InvalidRequest):
    """A dataset or one of its rows; the message carries the line number."""

    code = "invalid_dataset"


class Unauthorized(FortwoError):
    code = "invalid_api_key"
    type = "authentication_error"
    status = 401


class NotFound(FortwoError):
    """An unknown model, adapter, version, job or file."""

    code = "not_found"
    type = "not_found_error"
    status = 404


class Conflict(FortwoError):
    """The request is well formed but the present state forbids it."""

    code = "conflict"
    type = "conflict_error"
    status = 409


class UnsupportedModel(InvalidRequest):
    """A base model fortwo cannot run: architecture, missing tensor, wrong shape."""

    code = "unsupported_model"


class InvalidAdapter(InvalidRequest):
    """An adapter on disk that cannot be served: missing, truncated or foreign file, wrong base, no effect."""

    code = "invalid_adapter"


class SourceUnreachable(FortwoError):
    """A base model's source (package index, hub) cannot be reached."""

    code = "source_unreachable"
    status = 503


class StorageFailed(FortwoError):
    """The disk refused a write; what was there before is untouched."""

    code = "storage_failed"
    status = 507


class Unavailable(FortwoError):
    """The server is shutting down, or what was asked is gone."""

    code = "unavailable"
    status = 503


class Overloaded(FortwoError):
    """As many requests run and wait as may."""

    code = "queue_full"
    type = "rate_limit_error"
    status = 429

    def __init__(self, message: str, *, retry_after: int, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class DeadlineExceeded(FortwoError):
    """A request took longer than it may."""

    code = "deadline_exceeded"
    type = "timeout_error"
    status = 504


class TrainingFailed(FortwoError):
    """A run that cannot go on (`nan_loss`) or that missed its targets (`targets_missed`)."""

    code = "training_failed"
