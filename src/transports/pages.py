"""Serves the web pages: a folder of plain files, with the headers that keep them safe and fresh."""

from __future__ import annotations

import hashlib
import html
import os
import re
from importlib import resources
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Scope

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        # 'self' does not cover ws: of the same host in every browser that is still around.
        "connect-src 'self' ws: wss:",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Modules import one another by fixed names: a stale one beside a fresh one breaks the page.
    "cache-control": "no-cache",
}
# Named here because Python asks the operating system's tables, where .js may be anything.
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}
_API_BASE = re.compile(r'(<meta\s+name="broker-api-base"\s+content=")[^"]*(")')


class WebPages(StaticFiles):
    """ASGI application that serves the files of `directory` (None: the bundled pages), `index.html` for a folder.

    api_base: put into the pages' `<meta name="broker-api-base" content="…">`; None leaves them as they are. Paths that
    lead out of the folder, symbolic links included, are not found.
    """

    def __init__(self, directory: str | Path | None = None, *, api_base: str | None = None) -> None:
        folder = Path(directory) if directory is not None else bundled_pages()
        if not folder.is_dir():
            raise NotADirectoryError(f"the web pages' folder {str(folder)!r} does not exist: check --ui-dir")
        super().__init__(directory=folder, html=True, follow_symlink=False)
        self._api_base = api_base

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """Return the file with the right media type and the security headers, or 304."""
        suffix = Path(full_path).suffix.lower()
        response = super().file_response(full_path, stat_result, scope, status_code)
        if suffix == ".html" and self._api_base is not None:
            response = self._with_api_base(Path(full_path), Headers(scope=scope), status_code)
        if not isinstance(response, NotModifiedResponse):
            response.headers["content-type"] = _MEDIA_TYPES.get(suffix, "application/octet-stream")
        response.headers.update(_HEADERS)
        return response

    def _with_api_base(self, page: Path, request_headers: Headers, status_code: int) -> Response:
        base = html.escape(self._api_base or "./")
        text = _API_BASE.sub(lambda found: found[1] + base + found[2], page.read_text(encoding="utf-8"))
        response = Response(text, status_code)
        # Of the text as sent: the same file under another base is another page.
        etag = f'"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"'
        response.headers["etag"] = etag
        if self.is_not_modified(response.headers, request_headers):
            return NotModifiedResponse(response.headers)
        return response


def bundled_pages() -> Path:
    """Return the folder of the pages that come with the package."""
    folder = resources.files("transports") / "ui"
    if not isinstance(folder, Path):
        raise HTTPException(404, "the web pages are inside an archive: install the package unpacked, or give --ui-dir")
    return folder
