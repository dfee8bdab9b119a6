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

_TCP_INFO = getattr(socket, "TCP_INFO", None) if sys.platform == "linux" else None
# struct tcp_info of Linux, which only ever grows at its end (include/uapi/linux/tcp.h): tcpi_bytes_acked, since 4.1, and
# tcpi_snd_wnd, since 5.4.
_INFO_BYTES = 232
_BYTES_ACKED = struct.Struct("=Q")
_BYTES_ACKED_AT = 120
_SEND_WINDOW = struct.Struct("=I")
_SEND_WINDOW_AT = 228


def progress(transport: asyncio.WriteTransport) -> int:
    """Return a number that changes when the transport's peer takes something, and at best only then.

    Where the system tells it (Linux, TCP): up to where the peer has room. It moves on when its program reads, and not when
    its system stores what the program leaves lying. Elsewhere: what the transport holds.
    """
    if _TCP_INFO is not None:
        try:
            info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_BYTES)
        except (OSError, AttributeError):  # no TCP, or gone
            info = b""
        if len(info) >= _INFO_BYTES:
            acked: int = _BYTES_ACKED.unpack_from(info, _BYTES_ACKED_AT)[0]
            window: int = _SEND_WINDOW.unpack_from(info, _SEND_WINDOW_AT)[0]
            return acked + window
    return -transport.get_write_buffer_size()
