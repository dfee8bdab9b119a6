#!/bin/sh
# Renews requirements.lock: the newest versions that pyproject.toml allows, with hashes and without any index's address.
set -eu
cd "$(dirname "$0")/.."
tool=.tools/lock
if [ ! -x "$tool/bin/pip-compile" ]; then
    "$(sh scripts/find_python.sh)" -m venv "$tool"
    # Apart from .venv: its own dependencies must not end up in the lock.
    "$tool/bin/python" -m pip install --quiet --disable-pip-version-check pip-tools
fi
CUSTOM_COMPILE_COMMAND="make lock" "$tool/bin/pip-compile" --quiet --upgrade --all-extras --generate-hashes --strip-extras \
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file=requirements.lock pyproject.toml
