# Sourced by the other scripts: makes .venv if it is missing and installs what is asked for into it.
# Usage: . scripts/venv.sh REQUIREMENT...   (PYTHON=python3.12 picks another interpreter, VENV=.venv-x
# another folder)
VENV="${VENV:-.venv}"
if [ ! -x "$VENV"/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "cla-export needs Python 3.11 or newer; set PYTHON to one" >&2
    exit 3
  }
  "${PYTHON:-python3}" -m venv "$VENV"
fi
# Reinstall only when the project's requirements changed since the last time.
wanted="$(cat pyproject.toml; printf '%s ' "$@")"
if [ "$(cat "$VENV"/cla-export-installed 2>/dev/null)" != "$wanted" ]; then
  "$VENV"/bin/python -m pip install --quiet --disable-pip-version-check "$@"
  printf '%s' "$wanted" > "$VENV"/cla-export-installed
fi
