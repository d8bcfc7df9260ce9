#!/usr/bin/env bash
# Deployments in the real servers of others: what is too heavy for everybody's test environment, in
# environments of its own. Arguments go to pytest, for example `scripts/test_deploy.sh -k triton`.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=.venv-deploy
. scripts/venv.sh -e '.[cpu,ray]' 'pytest>=8.3,<10' 'openai>=3.54,<4' 'httpx>=0.28,<0.29' \
  'psutil>=6,<8' 'dockerfile-parse>=2.0.1,<3'

# What runs inside Triton, as in an image: without PyTorch. The wheel's tritonserver is 24.10, whose
# Python backend reads NumPy 2 wrongly (24.11 does not).
wanted="$(cat pyproject.toml "$0")"
if [ "$(cat .venv-triton/cla-export-installed 2>/dev/null)" != "$wanted" ]; then
  [ -x .venv-triton/bin/python ] || .venv-deploy/bin/python -m venv .venv-triton
  pip=".venv-triton/bin/pip install -q --disable-pip-version-check"
  $pip --no-deps -e .
  .venv-triton/bin/python -m cla_export.deploy.image cpu serve > .venv-triton/requirements.txt
  $pip -r .venv-triton/requirements.txt
  $pip --no-deps 'nvidia-pytriton==0.7.0' 'numpy<2'
  printf '%s' "$wanted" > .venv-triton/cla-export-installed
fi
echo "== pytest tests/deploy"
OMP_NUM_THREADS=1 .venv-deploy/bin/python -m pytest tests/deploy "$@"
