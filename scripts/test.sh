#!/usr/bin/env bash
# Everything CI checks: lint, types, the graph goldens, the test suite. Quick ones first.
# Arguments go to pytest, for example `scripts/test.sh -k layout`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh -e '.[dev]'
bin=.venv/bin
echo "== ruff" && $bin/ruff check . && $bin/ruff format --check .
echo "== mypy" && $bin/mypy
echo "== goldens" && $bin/python scripts/regen_graphs.py --check
echo "== pytest" && $bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
