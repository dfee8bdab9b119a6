"""The replaying server is proved against the official client before anything is proved with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from tests.support.recorded_provider import Exchange, RecordedProvider


@pytest.fixture
async def provider(shared_dir: Path) -> AsyncIterator[RecordedProvider]:
    async with RecordedProvider(shared_dir / "llm-recordings") as running:
        yield running


async def _text(base_url: str) -> str:
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        return "".join([
            choice.delta.content or "" async for chunk in stream for choice in chunk.choices if choice.delta
        ])  # fmt: skip


@pytest.mark.parametrize("mode", ["whole", "b1", "b7"])
@pytest.mark.parametrize("name", ["chat-01", "chat-03", "chat-10", "chat-15"])
async def test_the_official_client_reads_the_reference(provider: RecordedProvider, name: str, mode: str) -> None:
    if (name, mode) == ("chat-15", "b1"):
        mode = "b7"
    exchange = provider.exchange(name)
    assert exchange is not None
    assert await _text(provider.url(name, mode)) == exchange.reference["choices"][0]["text"]
    assert provider.requests[0].headers["authorization"] == "Bearer none"


@pytest.mark.parametrize("name", ["err-01", "err-02", "err-03", "err-04"])
async def test_the_official_client_raises_the_reference(provider: RecordedProvider, name: str) -> None:
    exchange = provider.exchange(name)
    assert exchange is not None
    with pytest.raises(openai.APIStatusError) as caught:
        await _text(provider.url(name))
    assert type(caught.value).__name__ == exchange.reference["error"]["class"]
    assert caught.value.status_code == exchange.reference["error"]["status"]


async def test_a_reset_is_a_connection_error_to_the_official_client(provider: RecordedProvider) -> None:
    with pytest.raises((openai.APIConnectionError, httpx.ReadError, openai.APIError)):
        await _text(provider.url("chat-02", "reset"))


async def test_a_clean_cut_is_silence_to_the_official_client(provider: RecordedProvider) -> None:
    exchange = provider.exchange("chat-02")
    assert exchange is not None
    for mode in ("cut", "close"):
        text = await _text(provider.url("chat-02", mode))
        assert text
        assert exchange.reference["choices"][0]["text"].startswith(text)


@pytest.mark.parametrize(("mode", "size"), [("b1", 1), ("b7", 7)])
async def test_the_client_sees_the_pieces(mode: str, size: int) -> None:
    """Batched writes do not glue the pieces together again."""
    body = bytes(range(256)) * 400
    async with RecordedProvider() as provider, httpx.AsyncClient() as client:
        provider.add("x", Exchange(body))
        async with client.stream("POST", f"{provider.url('x', mode)}/chat/completions") as response:
            pieces = [piece async for piece in response.aiter_raw()]
    assert b"".join(pieces) == body
    assert max(len(piece) for piece in pieces) == size


@pytest.mark.parametrize("mode", ["reset", "cut", "close"])
async def test_two_thirds_arrive(mode: str) -> None:
    body = b"x" * 300_000
    pieces: list[bytes] = []

    async def read(url: str) -> None:
        async with httpx.AsyncClient() as client, client.stream("POST", f"{url}/chat/completions") as response:
            async for piece in response.aiter_raw():
                pieces.append(piece)

    async with RecordedProvider() as provider:
        provider.add("x", Exchange(body))
        if mode == "reset":
            with pytest.raises(httpx.ReadError):
                await read(provider.url("x", mode))
        else:
            await read(provider.url("x", mode))
    assert sum(map(len, pieces)) == 200_000


@pytest.mark.parametrize("path", ["/nothing/whole", "/x/nothing", "/x"])
async def test_an_unknown_path_says_so(path: str) -> None:
    async with RecordedProvider() as provider, httpx.AsyncClient() as client:
        provider.add("x", Exchange(b""))
        response = await client.post(f"{provider.base_url}{path}/chat/completions")
    assert response.status_code == 404
    assert "no recording or mode" in response.json()["error"]["message"]
