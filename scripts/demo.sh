#!/usr/bin/env bash
# The whole story once: the base model's answer, what it is taught, its answer after, and the proof.
# Starts a server when none listens, and leaves it running so that one can go on chatting. `make stop` stops it.
set -euo pipefail
cd "$(dirname "$0")/.."
export COLUMNS=${COLUMNS:-100}
exec fortwo quickstart
