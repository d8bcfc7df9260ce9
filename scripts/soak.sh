#!/usr/bin/env bash
# Serves the demo model and soaks it: `scripts/soak.sh [minutes] [requests a round]`. Ends with 1 if
# any answer differs from the one that the same request gets alone, or a slot is lost.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
work=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -r "$work"' EXIT
$python -m cla_export.cli export cla_export/data/demo "$work/demo" >/dev/null
$python -m cla_export.cli serve "$work/demo" --port 0 --slots 8 2>"$work/log" &
server=$!
until url=$(sed -n 's/^serving .* on //p' "$work/log") && [ -n "$url" ]; do
  kill -0 "$server" || { cat "$work/log" >&2; exit 1; }
  sleep 0.2
done
$python scripts/soak.py "$url" --minutes "${1:-1}" --requests "${2:-200}" --pid "$server"
