# Sourced by the other scripts: makes .venv if it is missing and installs what is asked for into it.
# Usage: . scripts/venv.sh REQUIREMENT...   (PYTHON=python3.12 picks another interpreter)
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "cla-export needs Python 3.11 or newer; set PYTHON to one" >&2
    exit 3
  }
  "${PYTHON:-python3}" -m venv .venv
fi
# Reinstall only when the project's requirements changed since the last time.
wanted="$(cat pyproject.toml; printf '%s ' "$@")"
if [ "$(cat .venv/cla-export-installed 2>/dev/null)" != "$wanted" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
  printf '%s' "$wanted" > .venv/cla-export-installed
fi
