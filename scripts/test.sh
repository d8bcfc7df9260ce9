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
if [ ! -x /usr/bin/chromium ]; then # tests/test_page.py opens the parity page in it
  if [ "$(id -u)" = 0 ] && grep -qsE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release; then
    echo "== chromium"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } \
      >/dev/null || echo "chromium could not be installed; tests/test_page.py will say so" >&2
  else
    echo "tests/test_page.py needs Chromium, such as: sudo apt-get install chromium" >&2
  fi
fi
# One thread of PyTorch a worker: more would wait for each other. The same random examples in every
# run; `pytest` by itself looks for new ones.
echo "== pytest" && OMP_NUM_THREADS=1 $bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal \
  --hypothesis-profile=ci "$@"
