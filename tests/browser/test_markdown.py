"""The page's Markdown, drawn by a real browser from the files as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.needs_browser

PAGES = Path(__file__).resolve().parents[2] / "src" / "transports" / "ui"
ORIGIN = "http://pages.test"

DOCUMENT = """# Title

A paragraph with **bold**, *emphasis*, `code` and [a link](https://example.org/a_(b)).
Second line. A bare https://example.org/path?x=1. Not snake_case_word nor 2 * 3 * 4.

1. first
2. second
   ```py
   def f():
       return "```"
   ```
   - nested **item**
   - another
3. third

> quoted
> lines

---

~~~
tilde fence with ``` inside
~~~
* star
+ plus

| name | **value** |
|:-----|------:|
| a \\| b | `1` |
|  | [x](https://e.org) |
Text after. Unclosed **bold and `code
"""


@pytest.fixture(scope="module")
def module_page(chromium: Browser) -> Iterator[Page]:
    """An empty page that can import the page's modules."""
    context = chromium.new_context()
    page = context.new_page()

    def serve(route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN).lstrip("/")
        if path == "":
            route.fulfill(content_type="text/html", body="<!doctype html><title>modules</title>")
        else:
            route.fulfill(content_type="text/javascript", body=(PAGES / path).read_text("utf-8"))

    page.route(f"{ORIGIN}/**", serve)
    page.goto(f"{ORIGIN}/")
    yield page
    context.close()


DRAW = """async ([text, size, finish]) => {
  const { MarkdownStream } = await import("/markdown.js");
  const root = document.createElement("div");
  const stream = new MarkdownStream(root);
  for (let at = 0; at < text.length; at += size) stream.append(text.slice(at, at + size));
  if (finish) stream.end();
  return root.innerHTML;
}"""


def draw(page: Page, text: str, size: int = 10_000_000, *, finish: bool = True) -> str:
    """Return the markup that `text` becomes when it arrives in pieces of `size`."""
    html: str = page.evaluate(DRAW, [text, size, finish])
    return html


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_pieces_make_the_same_as_the_whole(module_page: Page, size: int) -> None:
    """However the text is cut, the end is the same."""
    assert draw(module_page, DOCUMENT, size) == draw(module_page, DOCUMENT)


def test_every_cut_makes_the_same(module_page: Page) -> None:
    """Two pieces, cut at each place there is."""
    different = module_page.evaluate(
        """async (text) => {
          const { MarkdownStream } = await import("/markdown.js");
          const draw = (...pieces) => {
            const root = document.createElement("div");
            const stream = new MarkdownStream(root);
            for (const piece of pieces) stream.append(piece);
            stream.end();
            return root.innerHTML;
          };
          const whole = draw(text);
          return [...text].map((_, at) => at).filter((at) => draw(text.slice(0, at), text.slice(at)) !== whole);
        }""",
        DOCUMENT,
    )
    assert different == []


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain", '<p dir="ltr">plain</p>'),
        ("a\nb", '<p dir="ltr">a<br>b</p>'),
        ("a\n\nb", '<p dir="ltr">a</p><p dir="ltr">b</p>'),
        ("**a** *b* __c__ _d_", '<p dir="ltr"><strong>a</strong> <em>b</em> <strong>c</strong> <em>d</em></p>'),
        ("**a *b* c**", '<p dir="ltr"><strong>a <em>b</em> c</strong></p>'),
        ("``a ` b``", '<p dir="ltr"><code>a ` b</code></p>'),
        ("snake_case_name 2*3*4 \\*x\\*", '<p dir="ltr">snake_case_name 2*3*4 *x*</p>'),
        ("# One\n## Two", '<h3 dir="ltr">One</h3><h4 dir="ltr">Two</h4>'),
        ("<b>x</b> &amp;", '<p dir="ltr">&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>'),
        ("- a\n- b", '<ul><li dir="ltr"><p>a</p></li><li dir="ltr"><p>b</p></li></ul>'),
        ("- 1\n  - 2", "<ul><li><p>1</p><ul><li><p>2</p></li></ul></li></ul>"),
        (
            "1. a\n1. b\n7. c\n8. d",
            '<ol><li dir="ltr"><p>a</p></li><li dir="ltr"><p>b</p></li></ol>'
            '<ol start="7"><li dir="ltr"><p>c</p></li><li dir="ltr"><p>d</p></li></ol>',
        ),
        ("1, 2: שלום and `x`", '<p dir="rtl">1, 2: שלום and <code>x</code></p>'),
        ("> 1\n> مرحبا", '<blockquote dir="rtl"><p>1<br>مرحبا</p></blockquote>'),
        ("- 5 שלום", '<ul><li dir="rtl"><p>5 שלום</p></li></ul>'),
        ("3) c", '<ol start="3"><li dir="ltr"><p>c</p></li></ol>'),
        ("---", "<hr>"),
        ("> a\n> b", '<blockquote dir="ltr"><p>a<br>b</p></blockquote>'),
        ("-", "<p>-</p>"),
        (
            "| a | b |\n|---|--:|\n| 1 | 2\\|3 |",
            '<div class="table" tabindex="0" dir="ltr"><table><thead><tr><th>a</th><th class="end">b</th></tr></thead>'
            '<tbody><tr><td>1</td><td class="end">2|3</td></tr></tbody></table></div>',
        ),
        ("| not a row", '<p dir="ltr">| not a row</p>'),
        ("#hashtag", '<p dir="ltr">#hashtag</p>'),
    ],
)
def test_what_is_understood(module_page: Page, text: str, html: str) -> None:
    """The whole language, in examples."""
    assert draw(module_page, text) == html


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "vbscript:x",
        "//e.org",
        "/a",
        "x",
    ],
)
def test_only_web_addresses_become_links(module_page: Page, address: str) -> None:
    """Anything else stays the text that it is."""
    assert draw(module_page, f"[x]({address})") == f'<p dir="ltr">[x]({address})</p>'


def test_pictures_become_links(module_page: Page) -> None:
    """Loading one would tell a stranger's server who reads the conversation."""
    html = draw(module_page, "![a cat](https://e.org/cat.png)")
    assert "<img" not in html
    assert 'href="https://e.org/cat.png"' in html
    assert 'rel="noopener noreferrer nofollow"' in html


def test_code_keeps_every_character(module_page: Page) -> None:
    """Blank lines, indentation, markup and the fence's own characters inside a longer fence."""
    code = "a\n\n    b  \n**not bold** <i>\n```\n"
    text = module_page.evaluate(
        """async (text) => { const { MarkdownStream } = await import("/markdown.js"); const root = document.createElement("div");
        const stream = new MarkdownStream(root); for (const c of text) stream.append(c); stream.end();
        return root.querySelector("code").textContent; }""",
        f"````\n{code}````\n",
    )
    assert text == code


def test_what_is_not_closed_yet_is_shown_as_it_will_look(module_page: Page) -> None:
    """While the text grows; at its end, a mark that was never closed is only a character."""
    assert "<strong>bo</strong>" in draw(module_page, "a **bo", finish=False)
    assert "**bo" in draw(module_page, "a **bo")
    assert "<code>x</code>" in draw(module_page, "a `x", finish=False)


def test_the_direction_of_a_text_is_what_the_browser_would_find(module_page: Page) -> None:
    """Of every letter: `dir="auto"` is the yardstick, and much slower where a long text grows."""
    different = module_page.evaluate(
        """async () => {
          const { directionOf } = await import("/direction.js");
          const element = document.body.appendChild(document.createElement("p"));
          element.dir = "auto";
          const wrong = [];
          // Punctuation and digits of these scripts have a direction, too: that of the letters after them.
          const unlettered = (code) => (code >= 0x590 && code < 0x900) || (code >= 0xfb1d && code < 0xff00)
            || (code >= 0x10800 && code < 0x11000) || (code >= 0x1e800 && code < 0x1f000);
          for (let code = 1; code < 0x110000; code += 1) {
            if (code >= 0xd800 && code < 0xe000) continue;
            const text = "12, " + String.fromCodePoint(code);
            const said = directionOf(text);
            const letter = /[\\p{L}\\u061c\\u200e\\u200f]/u.test(text);
            if ((said !== null) !== letter) wrong.push(code.toString(16));
            // Beyond, left to right is the rule; and for what is no letter, samples are enough.
            if (said !== "rtl" && code > 0x3000 && code % 16 !== 0) continue;
            if (said === null && (unlettered(code) || code % 16 !== 0)) continue;
            element.textContent = text;
            if ((said === "rtl") !== element.matches(":dir(rtl)")) wrong.push(code.toString(16));
          }
          return wrong;
        }"""
    )
    assert different == []


WORK = """async ([opening, unit, times]) => {
  const { MarkdownStream } = await import("/markdown.js");
  const root = document.createElement("div");
  let written = 0;
  new MutationObserver((records) => {
    for (const record of records) for (const node of record.addedNodes) written += node.textContent.length;
  }).observe(root, { childList: true, subtree: true });
  const stream = new MarkdownStream(root);
  stream.append(opening);
  for (let at = 0; at < times; at += 1) {
    stream.append(unit);
    if (at % 50 === 0) await new Promise((resolve) => setTimeout(resolve));
  }
  stream.end();
  await new Promise((resolve) => setTimeout(resolve));
  return written;
}"""


@pytest.mark.parametrize(
    ("opening", "unit"),
    [
        ("", "word **bold** word\n\n"),
        ("", "word "),
        ("", "- item\n"),
        ("", "a line\n"),
        ("", "| a | b |\n"),
        ("```\n", "x = 1\n"),
        ("", "**"),
    ],
)
def test_the_cost_of_a_long_answer_is_linear(module_page: Page, opening: str, unit: str) -> None:
    """Twice the text, about twice what is written into the document."""
    short: Any = module_page.evaluate(WORK, [opening, unit, 2000])
    long: Any = module_page.evaluate(WORK, [opening, unit, 4000])
    assert 0 < long < 2.5 * short
