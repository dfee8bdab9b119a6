#!/bin/sh
# WebSocket conformance by the Autobahn test suite, taken over and plain ASGI. A tester's tool, not part of CI: the suite
# needs CPython 2.7 with virtualenv support.
#
#   benchmarks/autobahn.sh [folder for the suite and its report]
#
# PYTHON27: the old interpreter (default python2.7). PYTHON: ours (default python).
# CASES: a JSON list (default all; compression is 12.* and 13.*, which take most of the time).
# Exit code 1 if anything failed in fast mode, if anything but 7.1.5 (uvicorn's own) failed in ASGI mode, or if a server
# logged anything. Not failed but left out: compression in ASGI mode, where it is not agreed on, and in fast mode the offers
# that want the server to use a window below 15 bits.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$(mktemp -d)}
PYTHON=${PYTHON:-python}
CASES=${CASES:-'["1.*","2.*","3.*","4.*","5.*","6.*","7.*","9.*","10.*","12.*","13.*"]'}
mkdir -p "$folder" && cd "$folder"

if [ ! -x env/bin/wstest ]; then
    "$PYTHON" -m venv maker
    maker/bin/pip -q install 'virtualenv<20.22' # the last that makes environments for 2.7
    maker/bin/virtualenv -q -p "${PYTHON27:-python2.7}" env
    env/bin/pip -q install autobahntestsuite==25.10.1
fi

"$PYTHON" "$here/autobahn_echo.py" 9701 fast uvloop 2>fast-uvloop.log & one=$!
"$PYTHON" "$here/autobahn_echo.py" 9702 fast asyncio 2>fast-asyncio.log & two=$!
"$PYTHON" "$here/autobahn_echo.py" 9703 asgi uvloop 2>asgi-uvloop.log & three=$!
trap 'kill $one $two $three' EXIT
"$PYTHON" - <<'WAIT'
import socket, time
for port in (9701, 9702, 9703):
    for _ in range(300):
        if socket.socket().connect_ex(("127.0.0.1", port)) == 0:
            break
        time.sleep(0.1)
WAIT
cat >spec.json <<SPEC
{"options": {"failByDrop": false}, "outdir": "report", "cases": $CASES, "exclude-cases": [], "exclude-agent-cases": {},
 "servers": [{"agent": "fast-uvloop", "url": "ws://127.0.0.1:9701"}, {"agent": "fast-asyncio", "url": "ws://127.0.0.1:9702"},
             {"agent": "asgi-uvloop", "url": "ws://127.0.0.1:9703"}]}
SPEC
env/bin/wstest -m fuzzingclient -s spec.json >wstest.log 2>&1
"$PYTHON" - <<'SUMMARY'
import collections, json, os, sys
bad = False
for agent, cases in sorted(json.load(open("report/index.json")).items()):
    print(agent, dict(collections.Counter(case["behavior"] for case in cases.values())))
    failed = {name for name, case in cases.items()
              if not {case["behavior"], case["behaviorClose"]} <= {"OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED"}}
    print("  failed:", sorted(failed) or "none",
          "not strict:", sorted(name for name, case in cases.items() if case["behavior"] == "NON-STRICT"),
          "left out:", sorted(name for name, case in cases.items() if case["behavior"] == "UNIMPLEMENTED"))
    bad |= bool(failed - ({"7.1.5"} if agent.startswith("asgi") else set()))
    bad |= os.path.getsize(agent + ".log") > 0
sys.exit(bad)
SUMMARY
