#!/bin/sh
# get_test_tools.sh PYTHON: installs what some tests drive and a plain machine may lack: a Redis server, Chromium, and a C
# compiler for the benchmarks' load client.
# What cannot be installed is said; its tests are skipped, in CI (variable CI set) they fail.
set -u
python=$1

has_redis() { command -v redis-server >/dev/null 2>&1 || command -v valkey-server >/dev/null 2>&1; }

has_chromium() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null 2>&1 && return 0
    done
    "$python" - <<'PY' 2>/dev/null
import os, sys
from playwright.sync_api import sync_playwright
with sync_playwright() as tools:
    sys.exit(not os.path.exists(tools.chromium.executable_path))
PY
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo -n "$@" # never asks: a test run has nobody to answer
    else
        return 1
    fi
}

install() { # install DEBIAN ALPINE FEDORA HOMEBREW: names of one package
    if command -v apt-get >/dev/null 2>&1; then
        as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1"
    elif command -v apk >/dev/null 2>&1; then
        as_root apk add --quiet "$2"
    elif command -v dnf >/dev/null 2>&1; then
        as_root dnf install -y -q "$3"
    elif command -v brew >/dev/null 2>&1; then
        brew install --quiet "$4"
    else
        return 1
    fi
}

if ! has_redis; then
    echo "installing a Redis server" >&2
    install redis-server redis redis redis >&2
    has_redis || echo "no Redis server could be installed: its tests are left out; install redis-server to run them" >&2
fi

has_compiler() { command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1; }

if ! has_compiler; then
    echo "installing a C compiler" >&2
    install build-essential build-base gcc gcc >&2
    has_compiler || echo "no C compiler could be installed: tests of benchmarks are left out; install gcc to run them" >&2
fi

if ! has_chromium; then
    echo "installing Chromium" >&2
    install chromium chromium chromium chromium >&2 || "$python" -m playwright install chromium >&2
    has_chromium || echo "no Chromium could be installed: browser tests are left out; install chromium to run them" >&2
fi
exit 0
