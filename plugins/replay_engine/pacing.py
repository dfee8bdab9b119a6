"""When each event of a recorded stream comes: as the recording says, else drawn from the shape of real streams.

The shape was measured on four answers whose tokens were recorded with their times (KoljaB/stream2sentence,
`tests/test_data/`; 601, 601, 601 and 66 tokens): the gaps are steady. Their logarithm has a standard deviation of 0.05
to 0.12, the 5th and 95th percentile lie within 20 % of the median, and 0.1 % of all gaps (2 of 1865) are stalls, the
longest 0.75 s or 4.6 medians. A token has 4.8 characters. Their median gap was 0.14 to 0.17 s, which is slower than
what hosted models do today and tiring in a demo, so the median here is 34 ms, about 30 tokens per second. Stalls are
drawn three times as often as measured, so that an answer of ordinary length has one. The first token comes after 0.2
to 0.6 s: 0.2 s is the best median of 19 hosted models (ray-project/llmperf-leaderboard).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

MEDIAN_GAP_S = 0.034
LOG_SPREAD = 0.12
STALL_SHARE = 0.003
STALL_MEDIANS = 4.6
MAX_GAP_S = 0.75
FIRST_GAP_S = (0.2, 0.6)
CHARS_PER_TOKEN = 4.8


class Pacing:
    """The gaps of one playing, in order. The same recording is always played with the same gaps.

    name: of the recording, the seed. timing_ms: gap in ms before each event of the stream, as far as it was recorded.
    speed: 1 = as recorded, 0 = no gaps.
    """

    def __init__(self, name: str, timing_ms: Sequence[float], speed: float) -> None:
        self._random = random.Random(name)
        self._timing_ms = timing_ms
        self._speed = speed
        self._drawn = 0

    def gap_s(self, index: int, characters: int) -> float:
        """Return the seconds to wait before event `index` of the stream, which brings that many characters."""
        if self._speed == 0:
            return 0.0
        if index < len(self._timing_ms):
            return self._timing_ms[index] / 1000 / self._speed
        return self._draw(characters) / self._speed

    def _draw(self, characters: int) -> float:
        self._drawn += 1
        if self._drawn == 1:
            return self._random.uniform(*FIRST_GAP_S)
        gap = MEDIAN_GAP_S * self._random.lognormvariate(0.0, LOG_SPREAD)
        if self._random.random() < STALL_SHARE:
            gap *= STALL_MEDIANS
        # Some providers put many tokens into one event: then as many gaps have passed.
        return min(gap * max(1.0, characters / CHARS_PER_TOKEN), MAX_GAP_S)
