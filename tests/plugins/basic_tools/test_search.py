"""The search: the passage that fits best comes first."""

from __future__ import annotations

from typing import Any

import pytest
from plugins.basic_tools.search import DocumentIndex, passages, search_tool, words

from broker.runs.tools import ToolContext
from plugins.basic_tools import BUNDLED_DOCUMENT

TEA = """Intro before any heading.

# Tea

## Green tea

Green tea is steamed or roasted soon after the harvest.
Water of 70 degrees keeps it mild.

## Black tea
Black tea is oxidised before it dries. Boiling water is fine.

Milk goes well with it.

# Coffee

Coffee beans are roasted. Café means coffee in many languages.
"""


def top(query: str, document: str = TEA) -> str:
    return DocumentIndex(document).search(query, 1)[0][1].text


def test_passages_know_their_section() -> None:
    found = [(passage.section, passage.text.split(".")[0]) for passage in passages(TEA)]
    assert found == [
        ("", "Intro before any heading"),
        ("Tea > Green tea", "Green tea is steamed or roasted soon after the harvest"),
        ("Tea > Black tea", "Black tea is oxidised before it dries"),
        ("Tea > Black tea", "Milk goes well with it"),
        ("Coffee", "Coffee beans are roasted"),
    ]


def test_long_paragraphs_are_cut_without_loss() -> None:
    found = list(passages("x" * 4000))
    assert [len(passage.text) for passage in found] == [1500, 1500, 1000]


@pytest.mark.parametrize(
    ("query", "start"),
    [
        ("green tea temperature", "Green tea"),
        ("MILK", "Milk"),
        ("boiling", "Black tea"),
        ("coffee", "Coffee"),
        ("cafe", "Coffee"),
        ("bean", "Coffee"),
        ("roasted harvest", "Green tea"),
        ("what is this intro about?", "Intro"),
    ],
)
def test_the_best_passage_comes_first(query: str, start: str) -> None:
    assert top(query).startswith(start)


def test_rare_words_weigh_more() -> None:
    document = "common rare\n\n" + "common common common\n\n" * 5
    assert top("common rare", document) == "common rare"


def test_equal_scores_keep_the_order() -> None:
    index = DocumentIndex("one a\n\none b\n\none c")
    assert [passage.text for _, passage in index.search("one", 10)] == ["one a", "one b", "one c"]


@pytest.mark.parametrize("query", ["nothing fits", "", "?!", "\0", "🙂" * 100])
def test_nothing_found(query: str) -> None:
    assert DocumentIndex(TEA).search(query, 3) == []


@pytest.mark.parametrize("document", ["", "\n\n\n", "# Only a heading"])
def test_an_empty_document_holds_nothing(document: str) -> None:
    assert len(DocumentIndex(document)) == 0
    assert DocumentIndex(document).search("heading", 3) == []


def test_words_are_compared_without_case_and_accents() -> None:
    assert len(set(words("Café CAFE cafés"))) == 1
    assert len(set(words("STRASSE, straße"))) == 1
    assert words("a1 is – it?") == ["a1", "is", "it"]


@pytest.mark.parametrize(
    "forms",
    ["cancel cancels cancelled cancelling", "run runs running", "store stores stored storing", "class classes"],
)
def test_forms_of_a_word_are_one(forms: str) -> None:
    assert len(set(words(forms))) == 1


def test_short_words_stay_apart() -> None:
    assert len(set(words("thing think this thus bed bee red ring"))) == 8


def test_the_tool_answers_with_passages() -> None:
    call = search_tool(DocumentIndex(TEA)).call
    context = ToolContext("c1", "r1", "call_1")
    found: Any = call({"query": "green tea", "limit": 2}, context)
    assert [passage["section"] for passage in found["passages"]] == ["Tea > Green tea", "Tea > Black tea"]
    assert "hint" not in found
    nothing: Any = call({"query": "wine"}, context)
    assert nothing["passages"] == []
    assert "5 passages" in nothing["hint"]


@pytest.mark.parametrize(
    ("query", "section"),
    [
        ("what is an epoch?", "Epoch"),
        ("cancel a run", "Cancelling"),
        ("slow client", "Slow clients"),
        ("where is the data stored, sqlite or redis?", "Storage"),
    ],
)
def test_the_bundled_handbook_answers(query: str, section: str) -> None:
    index = DocumentIndex(BUNDLED_DOCUMENT.read_text(encoding="utf-8"))
    assert index.search(query, 1)[0][1].section.endswith(section)
