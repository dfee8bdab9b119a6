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

from broker.errors import StoreError

_TREE_PAGE_HEADERS = {0x02: 12, 0x05: 12, 0x0A: 8, 0x0D: 8}  # first byte of a tree page -> size of its header
_CHUNK_BYTES = 1024 * 1024
# Pages that belong to no tree begin with a page number. Below this count its first byte is 0 or 1: no tree's mark.
_MAX_PAGES = 0x0200_0000


def overwrite_unused(fd: int, path: str) -> int:
    """Overwrite the unused space of every tree page of the file `fd`; return how many pages needed it.

    The caller holds SQLite's write lock, and the WAL is empty. path: for error texts. Raises StoreError for a file too
    large to tell its pages apart, OSError when the file cannot be written.
    """
    changed = 0
    header = os.pread(fd, 100, 0)
    page_size = int.from_bytes(header[16:18], "big")
    page_size = 65_536 if page_size == 1 else page_size
    size = os.fstat(fd).st_size
    if size // page_size >= _MAX_PAGES:
        raise StoreError(
            f"database {path} is too large ({size} bytes) to overwrite unused space: run VACUUM", path=path
        )
    for chunk_offset in range(0, size, _CHUNK_BYTES):
        chunk = os.pread(fd, _CHUNK_BYTES, chunk_offset)
        for offset in range(0, len(chunk), page_size):
            start, end = _unused(chunk, offset, page_size, first_page=chunk_offset + offset == 0)
            if chunk.count(0, start, end) != end - start:
                os.pwrite(fd, bytes(end - start), chunk_offset + start)
                changed += 1
    if changed:
        os.fsync(fd)
    return changed


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
