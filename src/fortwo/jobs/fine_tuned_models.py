"""The names of fine-tuned models as OpenAI writes them: ft:BASE:fortwo:SUFFIX:ID, and ft:...:ckpt-step-N.

ID is the first eight digits of a job's id. The name stands for the version that this job published, or for a checkpoint
of it.
"""

from __future__ import annotations

import re

from fortwo.errors import NotFound
from fortwo.jobs.store import Job, JobStore

ORGANIZATION = "fortwo"
PREFIX = "ft:"
_NAME = re.compile(r"ft:[^:]+:[^:]*:[^:]*:([0-9a-f]{8})(?::ckpt-step-([1-9][0-9]{0,8}))?")


def slug(suffix: str) -> str:
    """The suffix as a part of names: characters that names may not have become '-'."""
    return re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", suffix)).strip("-._")


def model_name(job: Job, step: int | None = None) -> str:
    """The name of what a job publishes, or of its checkpoint of a step."""
    suffix = job.adapter_name if job.fine_tuning is None else slug(job.fine_tuning["suffix"] or "")
    name = f"{PREFIX}{job.model}:{ORGANIZATION}:{suffix}:{job.id[:8]}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def adapter_ref(model: str, store: JobStore) -> str:
    """The adapter@version or adapter@job-step that a name of this kind means. Raises NotFound."""
    match = _NAME.fullmatch(model)
    step = None if match is None or match[2] is None else int(match[2])
    for job in store.beginning_with(match[1]) if match is not None else ():
        if model_name(job, step) == model:
            if step is not None:
                return f"{job.adapter_name}@{job.id[:8]}-{step}"
            if job.adapter is None:
                raise NotFound(
                    f"Model {model!r} does not exist: its job has published no adapter; its status is {job.status}.",
                    param="model",
                    hint="Wait until the job has succeeded, or use one of its checkpoints.",
                )
            return f"{job.adapter['name']}@{job.adapter['version']}"
    raise NotFound(f"There is no model {model!r}.", param="model", hint="GET /v1/fine_tuning/jobs lists the jobs.")
