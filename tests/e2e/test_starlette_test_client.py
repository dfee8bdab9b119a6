"""An app that embeds the broker can be tested with Starlette's own test client."""

from __future__ import annotations

import time

from starlette.testclient import TestClient

from broker.settings import Settings
from broker.testing import parts_of
from transports.app import create_app


def test_leaving_a_websocket_ends_the_endpoint_cleanly() -> None:
    """Leaving the block cancels the endpoint through anyio; that used to come back as CancelledError."""
    app = create_app(Settings(db=":memory:", plugins_dir="no-such-folder"))
    with TestClient(app, base_url="http://localhost") as client:
        with client.websocket_connect("ws://localhost/ws?conv_id=c1") as socket:
            assert socket.receive_json()["event"]["type"] == "ws.hello"
            assert socket.receive_json()["event"]["type"] == "ws.caught_up"
        assert client.get("/readyz").json() == {"status": "ready"}
        deadline = time.monotonic() + 10
        while parts_of(app.state.broker).registry.all():
            assert time.monotonic() < deadline, "the subscription outlived its connection"
            time.sleep(0.01)
