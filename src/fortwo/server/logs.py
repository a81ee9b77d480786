"""The format of the server's log: lines of text, or a JSON object a line. Each names the request and the job that it is
about, if it is about one."""

from __future__ import annotations

import logging
from typing import Any, Literal

from opentelemetry import trace
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from fortwo import log_context

LogFormat = Literal["text", "json"]


def configure(format: LogFormat) -> None:
    """Log to standard error: what fortwo says from INFO on, and what libraries say from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logging.basicConfig(handlers=[handler])
    logging.captureWarnings(True)
    logging.getLogger("fortwo").setLevel(logging.INFO)


class TextLines(logging.Formatter):
    """The message, with the ids in brackets behind its first line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        ids = log_context.fields().values()
        return f"{record.message} [{' '.join(ids)}]" if ids else record.message


class JsonLines(JsonFormatter):
    """time (ISO 8601, UTC), level, logger, message, the fields that a message came with, and, where they are known,
    request_id, job_id, trace_id and span_id."""

    def __init__(self) -> None:
        super().__init__(
            ("levelname", "name", "message"),
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's message once more, for terminals
        )

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        log_data |= log_context.fields()
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            log_data |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
