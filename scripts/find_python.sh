#!/bin/sh
# Prints a Python 3.11 or newer that really works, or says what is missing.
# A name on PATH proves nothing: version managers leave shims there for interpreters that are not installed.
set -u

works() {
    "$1" -c 'import sys, ssl, sqlite3, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

for candidate in "${PYTHON:-}" python3.14 python3.13 python3.12 python3.11 python3 python \
    "$HOME"/.pyenv/versions/3.1[1-9]*/bin/python3 /usr/local/bin/python3 /usr/bin/python3 /opt/homebrew/bin/python3; do
    if [ -n "$candidate" ] && works "$candidate"; then
        "$candidate" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done

cat >&2 <<'TEXT'
No usable Python 3.11 or newer was found (with ssl, sqlite3, venv and ensurepip).
  Debian, Ubuntu:  sudo apt-get install python3 python3-venv
  Fedora:          sudo dnf install python3
  macOS:           brew install python@3.12
or name one: make serve PYTHON=/path/to/python3.12
TEXT
exit 1
