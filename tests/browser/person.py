"""What a person does with the chat page, and what they see on it."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page, expect


def send(page: Page, text: str) -> None:
    """Write a message and send it with Enter."""
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def answers(page: Page) -> Any:
    return page.locator(".message.assistant .prose")


def said(page: Page) -> list[str]:
    """What stands in the conversation, in order, without what only this window shows."""
    return page.locator("#timeline > .card:not([hidden])").all_inner_texts()


def tab_to(page: Page, target: Any, key: str) -> None:
    """Press `key` until the target has the focus."""
    for _ in range(60):
        page.keyboard.press(key)
        if target.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"{key} never reaches {target}")


def finish(page: Page) -> None:
    """Wait until nothing is being answered any more."""
    expect(answers(page).last).not_to_be_empty()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".streaming")).to_have_count(0)
