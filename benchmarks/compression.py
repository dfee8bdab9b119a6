"""What permessage-deflate would save and cost on a token stream, in bytes and CPU per frame.

    python benchmarks/compression.py [--tokens 5000]

Three ways over the same `llm.delta` frames: none; one compressor per connection that remembers what it has sent (context
takeover); each frame alone, compressed once for all connections of a view. Also with 8 frames joined to one message.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from broker.envelope import Envelope
from broker.views import event_frame

TEXT = (
    "The answer to this question depends on what you want to measure and how long you are willing to wait for it . "
    "Most systems spend their time where nobody looks , in copies and in wake - ups , not in the work itself ."
)
WORDS = TEXT.split()
TAIL = b"\x00\x00\xff\xff"  # RFC 7692, 7.2.1: left out on the wire


def frames(count: int) -> Iterator[bytes]:
    """Yield the texts of a stream of tokens."""
    prev = 1_763_690_000_000_000_000
    for number, word in enumerate(itertools.islice(itertools.cycle(WORDS), count)):
        seq = prev + 1_000_000 * (17 + number % 7) + number % 3
        data = b'{"delta":" %b","runId":"run-5f0a9c31"}' % word.encode()
        yield event_frame(Envelope("c1", "llm.delta", "msg-3fa85f64", "sem", data, 0, seq), prev)
        prev = seq


def remembering() -> Callable[[bytes], bytes]:
    """Return a compressor as one connection with context takeover needs it."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    return lambda text: (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


def alone(text: bytes) -> bytes:
    """Compress one frame by itself."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    return (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5000)
    single = list(frames(parser.parse_args().tokens))
    joined = [b"".join(single[start : start + 8]) for start in range(0, len(single), 8)]
    print("| | bytes per token, none | remembering | alone | us per token, remembering | alone |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, texts in (("a frame per token", single), ("8 tokens joined", joined)):
        sizes, times = [], []
        for compress in (remembering(), alone):
            begin = time.process_time()
            sizes.append(sum(len(compress(text)) for text in texts) / len(single))
            times.append((time.process_time() - begin) / len(single) * 1e6)
        plain = sum(map(len, texts)) / len(single)
        print(f"| {name} | {plain:.0f} | {sizes[0]:.0f} | {sizes[1]:.0f} | {times[0]:.1f} | {times[1]:.1f} |")


if __name__ == "__main__":
    main()
