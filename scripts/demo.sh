#!/usr/bin/env bash
# From a fresh clone to fluent text: makes .venv, installs, then exports the trained CLA model that
# ships here, proves it equal to PyTorch, and generates. Arguments go to `cla-export demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh '.[cpu]'
exec .venv/bin/cla-export demo --force "$@"
