"""Which request and which job the current work is for, as log lines name them.

Context variables follow a request onto the threads that work for it, and a job onto the device's thread: whoever hands
work to another thread hands over a copy of its context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)


@contextmanager
def about_job(id: str) -> Iterator[None]:
    """Inside, log lines name this job."""
    token = job_id.set(id)
    try:
        yield
    finally:
        job_id.reset(token)


def fields() -> dict[str, str]:
    """The ids that are known here, by their names."""
    known = {"request_id": request_id.get(), "job_id": job_id.get()}
    return {name: id for name, id in known.items() if id is not None}
