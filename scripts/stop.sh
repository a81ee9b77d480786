#!/usr/bin/env bash
# Stop the server that scripts/demo.sh started, and wait until it is gone.
set -euo pipefail
pidfile=${FORTWO_HOME:-$HOME/.fortwo}/server.pid
[ -f "$pidfile" ] || { echo "no server was started by make demo"; exit 0; }
server=$(cat "$pidfile")
if kill "$server" 2>/dev/null; then
    while kill -0 "$server" 2>/dev/null; do sleep 0.2; done
    echo "stopped"
else
    echo "it was not running any more"
fi
rm -f "$pidfile"
