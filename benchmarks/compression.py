"""What permessage-deflate saves and costs on a token stream, in bytes and CPU per message.

    python benchmarks/compression.py [--tokens 5000]

Over the same messages: one compressor per connection that remembers what it has sent (context takeover); each message
alone, compressed once for all connections of a view, as `--compression per_view` does it. Tokens also as 8 frames joined to
one message, which the server does not do.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from broker.envelope import Envelope
from broker.views.frames import event_frame
from transports.deflate import MessageDeflater

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
    """Return a compressor as each connection with context takeover needs one."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    return lambda text: (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


def alone(level: int) -> Callable[[bytes], bytes]:
    """Return what the server does for all connections of a view: each message by itself, with one compressor."""
    return MessageDeflater(level).deflate


def entity(words: int) -> bytes:
    """Return a timeline upsert with a text of some words, drawn as unevenly as those of a language."""
    drawn = random.Random(words)
    vocabulary = ["".join(drawn.choices("etaoinshrdlucm", k=drawn.randint(2, 9))) for _ in range(2000)]
    text = " ".join(vocabulary[min(int(drawn.expovariate(0.01)), 1999)] for _ in range(words))
    return b'{"sem":true,"event":{"type":"timeline.upsert","id":"m1","seq":"17","data":{"entity":{"text":"%b"}}}}' % (
        text.encode()
    )


def cpu_us(compress: Callable[[bytes], bytes], texts: Sequence[bytes]) -> tuple[float, int]:
    """Return microseconds of CPU per text, the best of five rounds, and the bytes of all of them."""
    best, size = float("inf"), 0
    for _ in range(5):
        begin = time.process_time()
        size = sum(len(compress(text)) for text in texts)
        best = min(best, (time.process_time() - begin) / len(texts) * 1e6)
    return best, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5000)
    single = list(frames(parser.parse_args().tokens))
    joined = [b"".join(single[start : start + 8]) for start in range(0, len(single), 8)]
    sets = {
        "a token": single,
        "8 tokens joined": joined,
        "upsert of 2 KB": [entity(350 + n) for n in range(50)],
        "upsert of 20 KB": [entity(3500 + n) for n in range(10)],
        "upsert of 1 MB": [entity(180_000)],
    }
    unit, _ = cpu_us(remembering(), single)
    print(f"CPU: 1 is a token for one connection with a compressor of its own ({unit:.1f} us here)\n")
    print("| | bytes | a compressor per connection | | once for all, level 1 | | level 6 | |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, texts in sets.items():
        plain = sum(map(len, texts))
        cells = [f"{plain / len(texts):.0f}"]
        for compress in (remembering(), alone(1), alone(6)):
            took, size = cpu_us(compress, texts)
            cells += [f"{size / plain:.0%}", f"{took / unit:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
