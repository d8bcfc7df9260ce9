#!/usr/bin/env bash
# Runs the field's own clients, lm-eval and aiperf, against `cla-export serve`. They are heavy, and
# pin what they need, so they live in .venv-clients, apart from the package. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh -e '.[dev]'
bin=.venv-clients/bin
wanted=tests/clients/requirements.txt
if ! cmp -s "$wanted" .venv-clients/installed; then
  echo "== clients"
  [ -x $bin/python ] || .venv/bin/python -m venv .venv-clients
  $bin/python -m pip install --quiet --disable-pip-version-check -r "$wanted"
  cp "$wanted" .venv-clients/installed
fi
OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/clients "$@"
