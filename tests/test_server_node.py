"""Clients for Node against a running server: OpenAI's own and Vercel's AI SDK, by scripts that were written for them.

Node is needed for these tests alone. The packages are those of tests/node/package-lock.json, installed by npm ci.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import Served

if shutil.which("node") is None or shutil.which("npm") is None:
    pytest.skip("node and npm are not installed", allow_module_level=True)

SCRIPTS = Path(__file__).parent / "node"
CACHE = Path(__file__).parent.parent / ".cache" / "node"
LOCK = "package-lock.json"
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {thing}?"}, {"role": "assistant", "content": answer}]}
    for thing, answer in (("up", "the sky"), ("down", "the sea"), ("left", "the wood"), ("right", "the town"))
]


@pytest.fixture(scope="session")
def packages() -> Path:
    """A folder with the scripts and their packages, which stay until the lock file changes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    installed = CACHE / "installed.json"
    if not installed.is_file() or installed.read_bytes() != (SCRIPTS / LOCK).read_bytes():
        for name in ("package.json", LOCK):
            shutil.copyfile(SCRIPTS / name, CACHE / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=CACHE, check=True, capture_output=True, text=True)
        shutil.copyfile(SCRIPTS / LOCK, installed)
    for script in SCRIPTS.glob("*.mjs"):
        shutil.copyfile(script, CACHE / script.name)
    return CACHE


def run(packages: Path, script: str, *arguments: str, **environment: str) -> Any:
    """What a script prints, as JSON."""
    command = ["node", script, *arguments]
    found = subprocess.run(command, cwd=packages, env=os.environ | environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_script_for_openai_runs_with_another_base_url_and_nothing_else(
    served: Served, packages: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    said = run(
        packages, "fine_tuning.mjs", str(rows), "tiny", OPENAI_BASE_URL=f"{served.url}/v1", OPENAI_API_KEY="none"
    )
    assert said["filename"] == "rows.jsonl"
    assert said["content"] == rows.read_text()
    assert said["status"] == "succeeded"
    assert said["model"].startswith("ft:tiny:")
    assert "from-node" in said["model"]
    assert "message" in said["events"]
    assert "metrics" in said["events"]
    assert said["jobs"]
    assert said["listed"]
    assert said["deleted"]
    assert said["whole"] == said["streamed"]
    assert said["tokens"] > 0
    assert said["refusal"] == {"status": 404, "code": "not_found", "kind": "NotFoundError"}
    messages = [{"role": "user", "content": "What is up?"}]
    ours = served.chat(model=said["model"], messages=messages, temperature=0, max_tokens=12).json()
    assert said["whole"] == ours["choices"][0]["message"]["content"]


def test_vercels_ai_sdk_has_a_conversation(served: Served, packages: Path) -> None:
    said = run(packages, "ai_sdk.mjs", f"{served.url}/v1", "tiny")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    first = served.chat(messages=messages, temperature=0, max_tokens=12).json()["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And the rest?"}]
    second = served.chat(messages=messages, temperature=0, max_tokens=12).json()["choices"][0]["message"]["content"]
    for provider in ("compatible", "openai"):
        expected = {"first": first, "second": second, "streamed": second, "tokens": 12, "reason": "length"}
        assert said[provider] == expected, provider
