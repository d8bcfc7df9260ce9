#!/usr/bin/env bash
# Deployments in the real servers of others: what is too heavy for everybody's test environment.
# Arguments go to pytest, for example `scripts/test_deploy.sh -k triton`.
set -euo pipefail
cd "$(dirname "$0")/.."

# install FOLDER WHAT...: a virtual environment, made again when what is asked for changed.
install() {
  local venv=$1 wanted
  shift
  wanted="$(cat pyproject.toml "$0")"
  [ "$(cat "$venv/cla-export-installed" 2>/dev/null)" != "$wanted" ] || return 0
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$@"
  printf '%s' "$wanted" > "$venv/cla-export-installed"
}

deploy() {
  local pip=".venv-deploy/bin/pip install -q --disable-pip-version-check"
  $pip 'torch==2.13.0' # before a range pulls in a build for CUDA
  $pip -e '.[cpu,serve]' \
    'pytest>=8.3,<10' 'httpx>=0.28,<0.29' 'dockerfile-parse>=2.0.1,<3'
}

# What runs inside Triton, as in an image: without PyTorch. The wheel's tritonserver is 24.10, whose
# Python backend reads NumPy 2 wrongly (24.11 does not).
triton() {
  local pip=".venv-triton/bin/pip install -q --disable-pip-version-check"
  $pip --no-deps -e .
  .venv-triton/bin/python -m cla_export.deploy.image cpu serve > .venv-triton/requirements.txt
  $pip -r .venv-triton/requirements.txt
  $pip --no-deps 'nvidia-pytriton==0.7.0' 'numpy<2'
}

install .venv-deploy deploy
install .venv-triton triton
echo "== pytest tests/deploy" && OMP_NUM_THREADS=1 .venv-deploy/bin/python -m pytest tests/deploy "$@"
