"""Whether a peer takes what it is sent: told by the system, because a buffer that stays full says nothing.

What was written lies in three places before a peer reads it: the transport's buffer, the kernel's here and the kernel's
there. With megabytes in the second, a peer that reads steadily moves nothing in the first for minutes. TCP knows better: a
peer's window opens when its program reads.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

try:
    from fcntl import ioctl
    from termios import TIOCOUTQ
except ImportError:  # Windows: no TCP_INFO either
    pass

_TCP_INFO = getattr(socket, "TCP_INFO", None) if sys.platform == "linux" else None
# struct tcp_info of Linux, which only ever grows at its end (include/uapi/linux/tcp.h): tcpi_bytes_acked, since 4.1, and
# tcpi_snd_wnd, since 5.4.
_INFO_BYTES = 232
_BYTES_ACKED = struct.Struct("=Q")
_BYTES_ACKED_AT = 120
_SEND_WINDOW = struct.Struct("=I")
_SEND_WINDOW_AT = 228


_BYTES = struct.Struct("=i")


def progress(transport: asyncio.WriteTransport) -> int:
    """Return a number that changes when the transport's peer takes something, and at best only then.

    Where the system tells it (Linux, TCP): up to where the peer has room. It moves on when its program reads; but also, until
    the peer's buffers are full, by some of what its system stores: it tells only of a peer for which something waits.
    Elsewhere: what the transport holds.
    """
    told = _acked_and_window(transport)
    return sum(told) if told else -transport.get_write_buffer_size()


class PingWatch:
    """Whether a peer that owes a pong is still reading its way to the ping. Any peer does well that has little to read first."""

    __slots__ = ("_acked", "_ping_ends", "_progress", "_window_max")

    def __init__(self) -> None:
        self._window_max = 0
        self._acked = self._ping_ends = self._progress = 0

    def pinged(self, transport: asyncio.WriteTransport) -> None:
        """Take note of where the peer is. To be called right after a ping was written."""
        told = _acked_and_window(transport)
        if told is None:
            self._progress = -transport.get_write_buffer_size()
            return
        self._note(*told)
        self._ping_ends = self._acked + _unacked_bytes(transport) + transport.get_write_buffer_size()

    def reads_on(self, transport: asyncio.WriteTransport) -> bool:
        """Return True if the peer took something since this or `pinged` was last called, and has more to read first.

        That the numbers move is not enough: a peer's system takes in what its program leaves lying, and keeps its window.
        """
        progress, window = self._progress, self._progress - self._acked
        told = _acked_and_window(transport)
        if told is None:
            self._progress = -transport.get_write_buffer_size()
            return self._progress != progress
        self._note(*told)
        if self._progress == progress:
            return False
        return (
            told[1] > window  # it made room for more than what came meanwhile
            or self._acked < self._ping_ends  # its system has not even got the ping
            or transport.get_write_buffer_size() > 0
            or told[1] < self._window_max / 2  # its system holds much that was not read
        )

    def _note(self, acked: int, window: int) -> None:
        self._acked, self._progress = acked, acked + window
        self._window_max = max(self._window_max, window)


def _acked_and_window(transport: asyncio.WriteTransport) -> tuple[int, int] | None:
    """Return how many bytes the peer's system has taken, and for how many more it has room; None: nobody tells."""
    if _TCP_INFO is None:
        return None
    try:
        info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_BYTES)
    except (OSError, AttributeError):  # no TCP, or gone
        return None
    if len(info) < _INFO_BYTES:
        return None
    return _BYTES_ACKED.unpack_from(info, _BYTES_ACKED_AT)[0], _SEND_WINDOW.unpack_from(info, _SEND_WINDOW_AT)[0]


def _unacked_bytes(transport: asyncio.WriteTransport) -> int:
    """Return what the kernel here holds until the peer's has it. Only where TCP_INFO tells."""
    try:
        fd = transport.get_extra_info("socket").fileno()
        return int(_BYTES.unpack(ioctl(fd, TIOCOUTQ, bytes(_BYTES.size)))[0])
    except OSError:  # gone
        return 0
