"""Full-text search in one document: passages ranked with BM25, in memory.

BM25 as in Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), with the
usual k1 = 1.5 and b = 0.75.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from broker.runs.tools import Tool, ToolContext

_K1 = 1.5
_B = 0.75
_MAX_PASSAGE_CHARS = 1500
_MAX_RESULTS = 10
_WORD = re.compile(r"\w+")
_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*$")


@dataclass(frozen=True, slots=True)
class Passage:
    """A paragraph. section: the headings above it, outermost first, joined by " > "; "" before the first."""

    section: str
    text: str


def passages(document: str) -> Iterator[Passage]:
    """Yield the paragraphs of a text or Markdown document; a very long one in pieces."""
    headings: list[tuple[int, str]] = []
    for block in re.split(r"\n\s*\n", document.replace("\r\n", "\n")):
        lines = []
        for line in block.strip().split("\n"):
            heading = _HEADING.match(line)
            if heading is None:
                lines.append(line.strip())
                continue
            level = len(heading[1])
            headings = [*(above for above in headings if above[0] < level), (level, heading[2])]
        text = "\n".join(lines).strip()
        section = " > ".join(title for _, title in headings)
        for start in range(0, len(text), _MAX_PASSAGE_CHARS):
            yield Passage(section, text[start : start + _MAX_PASSAGE_CHARS])


def words(text: str) -> list[str]:
    """Return the words of `text` as they are compared: without case, accents and the common English endings."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(character for character in decomposed if not unicodedata.combining(character))
    return [_stem(word) for word in _WORD.findall(bare)]


def _stem(word: str) -> str:
    """Return what `cancel`, `cancels`, `cancelled` and `cancelling` have in common; rough, but the same for each."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


class DocumentIndex:
    """The passages of a document and how often each word is in them."""

    def __init__(self, document: str) -> None:
        self._passages = list(passages(document))
        self._counts = [Counter(words(f"{passage.section} {passage.text}")) for passage in self._passages]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean_length = sum(self._lengths) / len(self._lengths) if self._lengths else 1.0
        holders = Counter(word for counts in self._counts for word in counts)
        total = len(self._passages)
        self._weights = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in holders.items()}

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, limit: int) -> list[tuple[float, Passage]]:
        """Return up to `limit` passages that hold a word of `query`, with their scores, best first.

        Equal scores keep the order of the document.
        """
        wanted = [word for word in dict.fromkeys(words(query)) if word in self._weights]
        scored = [(self._score(number, wanted), number) for number in range(len(self._passages))]
        best = sorted((-score, number) for score, number in scored if score > 0)[:limit]
        return [(-negative, self._passages[number]) for negative, number in best]

    def _score(self, number: int, wanted: list[str]) -> float:
        counts = self._counts[number]
        norm = _K1 * (1 - _B + _B * self._lengths[number] / self._mean_length)
        return sum(self._weights[word] * counts[word] * (_K1 + 1) / (counts[word] + norm) for word in wanted)


def search_tool(index: DocumentIndex) -> Tool:
    """Return the tool that searches `index`."""

    def run(tool_input: Mapping[str, Any], context: ToolContext) -> dict[str, Any]:
        found = index.search(tool_input["query"], tool_input.get("limit", 3))
        result: dict[str, Any] = {
            "passages": [
                {"section": passage.section, "text": passage.text, "score": round(score, 2)} for score, passage in found
            ]
        }
        if not found:
            result["hint"] = f"none of these words is in the document ({len(index)} passages); try other words"
        return result

    return Tool(
        name="search_document",
        description=(
            "Search the server's document by words and get the passages that fit best, with their section. "
            "The words themselves are looked for, not their meaning: use the terms that the document would use."
        ),
        parameters={
            "type": "object",
            "properties": {
                "query": {"type": "string", "minLength": 1, "maxLength": 500, "description": "Words to look for"},
                "limit": {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": _MAX_RESULTS,
                    "description": "How many passages to return; 3 if left out",
                },
            },
            "required": ["query"],
            "additionalProperties": False,
        },
        call=run,
        timeout_s=10.0,
    )
