"""The command line: complete help, clear refusals, and no web server where none is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.support.broker_process import BrokerProcess, broker_command, clean_environment
from typer.testing import CliRunner

from broker.cli import main as cli
from broker.settings import Settings, variable

runner = CliRunner()


def broker(
    *arguments: str, cwd: Path | None = None, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*broker_command(), *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
        cwd=cwd,
        env=clean_environment(**variables),
    )


def test_no_command_but_serve_imports_the_web_server() -> None:
    """I8: the command line is usable, and quick, without FastAPI and uvicorn."""
    code = (
        "import sys, broker.cli.main, broker.cli.doctor, broker.client; "
        "print(sorted({'fastapi', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["tail"],
        ["send"],
        ["publish"],
        ["plugins"],
        ["plugins", "list"],
        ["timeline", "verify"],
        ["doctor"],
        ["cluster", "nodes"],
        ["cluster", "connections"],
        ["cluster", "runs"],
        ["cluster", "channels"],
        ["cluster", "switch"],
    ],
)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = runner.invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def test_serve_has_a_flag_and_names_a_variable_for_every_setting() -> None:
    text = "".join(runner.invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "400"}).output.split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"[env:{variable(name)}]" in text


def test_a_bad_flag_is_one_clear_line() -> None:
    done = broker("serve", "--port", "70000")
    assert done.returncode == 2
    assert done.stderr.startswith("broker: --port=70000 is not usable")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_bad_variable_is_one_clear_line() -> None:
    done = broker("serve", BROKER_SWEEP_INTERVAL_S="soon")
    assert done.returncode == 2
    assert "BROKER_SWEEP_INTERVAL_S='soon' is not usable" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server_is_one_clear_line() -> None:
    done = broker("send", "c1", "hi", "--url", "http://127.0.0.1:9/")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["{", "[1]", "NaN", "", '{"n": 123456789012345678901}'])
def test_publish_wants_a_json_object(text: str) -> None:
    done = broker("publish", "c1", "log", text)
    assert done.returncode == 2
    assert '{"message": "hi"}' in done.stderr


def test_tail_refuses_a_position_that_is_none() -> None:
    done = broker("tail", "c1", "--since", "-5")
    assert done.returncode == 2
    assert "since='-5' is not a position" in done.stderr


def test_a_broken_plugin_leaves_our_commands_alone(tmp_path: Path) -> None:
    """`broker doctor` is what one runs when a plugin is broken, so it must work then, and say which it is."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "broken.py").write_text("raise ValueError('no')\n")
    done = broker("doctor", "--port", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert "problem  plugins" in done.stdout
    assert "broken" in done.stdout
    assert broker("--help", cwd=tmp_path).returncode == 0


def test_doctor_finds_nothing_wrong_in_an_empty_folder(tmp_path: Path) -> None:
    done = broker("doctor", "--port", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "problem" not in done.stdout
    assert list(tmp_path.iterdir()) == [], "a check must leave nothing behind"


def test_doctor_names_valkey_by_its_own_version(valkey_cluster_url: str, tmp_path: Path) -> None:
    done = broker("doctor", "--port", "0", "--redis-url", valkey_cluster_url, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(r"store +Valkey [89]\.\d+\.\d+ at 127\.0\.0\.1:", done.stdout)


def test_doctor_names_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "broker.db").write_text("this is no database, it is a text that somebody put here" * 50)
    done = broker("doctor", "--port", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert "broker.db cannot be read" in done.stdout


def test_doctor_warns_of_a_misspelled_variable(tmp_path: Path) -> None:
    done = broker("doctor", "--port", "0", cwd=tmp_path, BROKER_RETENTION_CUONT="1")
    assert "did you mean BROKER_RETENTION_COUNT?" in done.stdout


def test_a_plugin_adds_a_command(tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "greeter.py").write_text(
        "from broker.hookspecs import hookimpl\n\n\n@hookimpl\ndef register_commands(cli):\n"
        "    @cli.command('greet')\n    def greet(name: str) -> None:\n        print(f'hello {name}')\n"
    )
    assert broker("greet", "world", cwd=tmp_path).stdout == "hello world\n"


def test_plugins_list_shows_source_and_hooks(tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "quiet.py").write_text(
        "from broker.hookspecs import hookimpl\n\n\n@hookimpl\ndef classify(event_type):\n    return None\n"
    )
    text = broker("plugins", "list", cwd=tmp_path).stdout
    assert "quiet" in text
    assert "hooks: classify" in text
    assert str(folder) in text


def test_plugins_list_of_a_server_says_what_is_in_quarantine_and_a_release_ends_it(tmp_path: Path) -> None:
    """Else an operator sees errors, and not that a view has shown nothing since."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "broken.py").write_text(
        "from broker.hookspecs import hookimpl\n\n\n@hookimpl\ndef build_filter(profile):\n"
        "    return lambda envelope: 1 / 0\n"
    )
    process = BrokerProcess(tmp_path, "--plugins-dir", str(folder), "--debug-channels", "debug.trace").start()
    try:
        note = {"conv_id": "c1", "type": "note.said", "data": {}}
        with httpx.Client(base_url=process.url) as client:
            assert client.post("/api/publish", json=[note] * 60).status_code == 200
            assert client.get("/api/messages?conv_id=c1&since=0").status_code == 200
        listed = broker("plugins", "list", "--url", process.url, cwd=tmp_path)
        assert "in quarantine: build_filter: view default" in listed.stdout, listed.stderr
        assert broker("plugins", "release", "broken", "--url", process.url, cwd=tmp_path).returncode == 0
        assert "in quarantine" not in broker("plugins", "list", "--url", process.url, cwd=tmp_path).stdout
    finally:
        process.stop()
