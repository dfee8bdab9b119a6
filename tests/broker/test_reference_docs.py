"""The reference pages say what the code says."""

from __future__ import annotations

import pytest
from scripts.reference_docs import PAGES, REFERENCE


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    written = (REFERENCE / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "run `python -m scripts.reference_docs`"
