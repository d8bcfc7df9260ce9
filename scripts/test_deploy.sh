#!/usr/bin/env bash
# Deployments, on what they are deployed on: packages too heavy for everybody, in a .venv-deploy of
# their own. Arguments go to pytest, for example `scripts/test_deploy.sh -k ray`.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=.venv-deploy
. scripts/venv.sh -e '.[cpu,ray]' 'pytest>=8.3,<10' 'openai>=3.54,<4' 'httpx>=0.28,<0.29' 'psutil>=6,<8'
echo "== pytest tests/deploy" && OMP_NUM_THREADS=1 $VENV/bin/python -m pytest tests/deploy "$@"
