"""The web pages: right types, safe headers, fresh copies, nothing outside of their folder."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from transports.app import create_ui
from transports.pages import bundled_pages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (site / "index.html").write_text('<meta name="broker-api-base" content="./">')
    (site / "app.js").write_text("export {};")
    (site / "sub" / "index.html").write_text("sub")
    (tmp_path / "secret.txt").write_text("secret")
    (site / "link.txt").symlink_to(tmp_path / "secret.txt")
    return site


def client(folder: Path | None, **options: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(create_ui(directory=folder, **options)),
        base_url="http://127.0.0.1",
    )


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/sub/", "text/html; charset=utf-8"),
    ],
)
async def test_files_have_their_type_and_the_safety_headers(folder: Path, path: str, media_type: str) -> None:
    response = await client(folder).get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    policy = response.headers["content-security-policy"]
    for directive in (
        "default-src 'self'",
        "connect-src 'self' ws: wss:",
        "frame-ancestors 'none'",
        "object-src 'none'",
    ):
        assert directive in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/app.js", "/"])
@pytest.mark.parametrize("base", ["./", "/elsewhere/"])
async def test_an_unchanged_file_is_not_sent_again(folder: Path, path: str, base: str) -> None:
    pages = client(folder, api_base=base)
    first = await pages.get(path)
    again = await pages.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_the_api_base_is_put_into_the_page_as_text(folder: Path) -> None:
    page = await client(folder, api_base='/x"><script>/').get("/")
    assert page.text == '<meta name="broker-api-base" content="/x&quot;&gt;&lt;script&gt;/">'


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/sub/..%2f..%2fsecret.txt",
        "/sub/%2e%2e/%2e%2e/secret.txt",
        "//etc/passwd",
        "/..%5csecret.txt",
        "/link.txt",
        "/%00",
        "/no.js",
    ],
)
async def test_nothing_outside_of_the_folder_is_served(folder: Path, path: str) -> None:
    response = await client(folder).get(path)
    assert response.status_code in (400, 404)
    assert "secret" not in response.text.replace("secret.txt", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_pages_can_only_be_read(folder: Path, method: str) -> None:
    assert (await client(folder).request(method, "/app.js")).status_code == 405


async def test_head_has_no_body(folder: Path) -> None:
    response = await client(folder).head("/app.js")
    assert (response.status_code, response.content) == (200, b"")


async def test_the_bundled_pages_are_there_and_load_nothing_inline() -> None:
    """The policy forbids inline scripts and styles: a page that needs one would be dead."""
    page = (await client(None).get("/")).text
    assert "<script>" not in page
    assert "<style>" not in page
    assert " style=" not in page
    for name in bundled_pages().glob("*.js"):
        assert (await client(None).get(f"/{name.name}")).status_code == 200


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="--ui-dir"):
        create_ui(directory=tmp_path / "nowhere")
