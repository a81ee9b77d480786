#!/usr/bin/env bash
# The whole story once: the base model's answer, what it is taught, its answer after, and the proof.
# Starts a server when none listens, and leaves it running so that one can go on chatting.
set -euo pipefail
cd "$(dirname "$0")/.."

home=${FORTWO_HOME:-$HOME/.fortwo}
url=http://${FORTWO_HOST:-127.0.0.1}:${FORTWO_PORT:-5001}
question="What is 42?"
export COLUMNS=${COLUMNS:-100}
mkdir -p "$home"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() {
    local shown=fortwo word
    for word in "$@"; do
        case $word in *' '*) shown+=" \"$word\"" ;; *) shown+=" $word" ;; esac
    done
    say "$shown"
    fortwo "$@"
}

run models fetch

if python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" "$url/healthz" 2>/dev/null; then
    printf '\nA server already listens on %s.\n' "$url"
else
    say "fortwo serve &"
    nohup fortwo serve >"$home/server.log" 2>&1 </dev/null &
    server=$!
    echo "$server" >"$home/server.pid"
    until python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" "$url/healthz" 2>/dev/null; do
        kill -0 "$server" 2>/dev/null || { cat "$home/server.log" >&2; exit 1; }
        sleep 0.3
    done
    printf 'It listens on %s; its log is %s.\n' "$url" "$home/server.log"
fi

run chat "$question"
run teach examples/42_intensive_training.json --name 42
run chat --model 42 "$question"
run report 42

cat <<END

Go on chatting:     .venv/bin/fortwo chat --model 42
Teach it your own:  .venv/bin/fortwo teach your-facts.json --name yours
Stop the server:    make stop
END
