"""Removes the last traces of deleted rows from a SQLite file.

`PRAGMA secure_delete` overwrites a row where it is deleted. But when SQLite balances its trees it moves rows to other
pages, and the old copy stays in the unused middle of the page it came from: out of reach of any statement, in plain
sight of whoever reads the file. `VACUUM` would help by writing the whole database anew: twice the disk space, a
temporary file, and publishers waiting for all of it. Here only the unused middles are overwritten, in place. No reader
of the format ever looks at these bytes (https://www.sqlite.org/fileformat2.html#b_tree_pages, "unallocated space"), so
it is safe whenever nobody writes the file, and safe to be interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from broker.errors import StoreError

_TREE_PAGE_HEADERS = {0x02: 12, 0x05: 12, 0x0A: 8, 0x0D: 8}  # first byte of a tree page -> size of its header
_CHUNK_BYTES = 1024 * 1024
# Pages that belong to no tree begin with a page number. Below this count its first byte is 0 or 1: no tree's mark.
_MAX_PAGES = 0x0200_0000
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24  # https://www.sqlite.org/fileformat2.html#the_write_ahead_log


def overwrite_unused(fd: int, path: str, start: int, end: int, again: Iterable[int] = ()) -> None:
    """Overwrite the unused space of every tree page of the file `fd` from byte `start` to `end`, both at pages' ends.

    again: further pages, by number (the first is 1). The caller holds SQLite's write lock, and the WAL is empty. path: for
    error texts. Raises StoreError for a file too large to tell its pages apart, OSError when it cannot be written.
    """
    page_size = page_size_of(fd)
    size = os.fstat(fd).st_size
    if size // page_size >= _MAX_PAGES:
        raise StoreError(
            f"database {path} is too large ({size} bytes) to overwrite unused space: run VACUUM", path=path
        )
    changed = 0
    for page in again:
        changed += _overwrite_in(fd, page_size, (page - 1) * page_size, page_size)
    for chunk_offset in range(start, min(end, size), _CHUNK_BYTES):
        changed += _overwrite_in(fd, page_size, chunk_offset, min(_CHUNK_BYTES, end - chunk_offset))
    if changed:
        os.fsync(fd)


def _overwrite_in(fd: int, page_size: int, chunk_offset: int, length: int) -> int:
    chunk = os.pread(fd, length, chunk_offset)
    changed = 0
    for offset in range(0, len(chunk), page_size):
        start, end = _unused(chunk, offset, page_size, first_page=chunk_offset + offset == 0)
        if chunk.count(0, start, end) != end - start:
            os.pwrite(fd, bytes(end - start), chunk_offset + start)
            changed += 1
    return changed


def page_size_of(fd: int) -> int:
    """Return the size of the pages of the SQLite file `fd`, in bytes."""
    page_size = int.from_bytes(os.pread(fd, 2, 16), "big")
    return 65_536 if page_size == 1 else page_size


def pages_in_wal(path: str) -> tuple[int, set[int]] | None:
    """Return the number of the WAL at `path` and the pages that it has; None for an empty one.

    SQLite counts its WALs: each time it begins one from the start, the number grows by one.
    """
    with open(path, "rb", buffering=0) as file:
        header = file.read(_WAL_HEADER_BYTES)
        if len(header) < _WAL_HEADER_BYTES:
            return None
        frame_bytes = _FRAME_HEADER_BYTES + int.from_bytes(header[8:12], "big")
        salts = header[16:24]
        pages: set[int] = set()
        at = _WAL_HEADER_BYTES
        while len(frame := os.pread(file.fileno(), _FRAME_HEADER_BYTES, at)) == _FRAME_HEADER_BYTES:
            if frame[8:16] != salts:
                break  # of the WAL before
            pages.add(int.from_bytes(frame[:4], "big"))
            at += frame_bytes
        return int.from_bytes(header[12:16], "big"), pages


def _unused(chunk: bytes, offset: int, page_size: int, *, first_page: bool) -> tuple[int, int]:
    """Return where in `chunk` the unused space of the page at `offset` begins and ends; nothing for other pages."""
    at = offset + 100 if first_page else offset  # the first page begins with the file's header
    header_size = _TREE_PAGE_HEADERS.get(chunk[at], 0)
    if not header_size:
        return 0, 0
    cells = int.from_bytes(chunk[at + 3 : at + 5], "big")
    content = int.from_bytes(chunk[at + 5 : at + 7], "big") or 65_536
    start, end = at + header_size + 2 * cells, offset + content
    return (start, end) if start <= end <= offset + page_size else (0, 0)
