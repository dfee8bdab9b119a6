#!/bin/sh
# make_venv.sh DIR: makes or completes a virtual environment with exactly the packages of requirements.lock.
set -eu
venv=$1

if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    python=$(sh "$(dirname "$0")/find_python.sh")
    echo "creating $venv with $python" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

# Every line of the lock has hashes, so pip refuses whatever differs from what was locked.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
