"""The layout of a page in a browser: its height, and text that leaves its box or the window."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.page import chromium

DESKTOP, PHONE = 1280, 390  # px

_CUT = """() => {
  const cut = [], wide = document.documentElement.clientWidth
  if (document.documentElement.scrollWidth > wide) cut.push(`the page scrolls: ${document.documentElement.scrollWidth} px`)
  for (const box of document.querySelectorAll(".scroll"))
    if (box.checkVisibility() && box.scrollWidth > box.clientWidth + 1) cut.push(`a table scrolls: ${box.innerText.slice(0, 50)}`)
  for (const cell of document.querySelectorAll("td, th"))
    if (cell.checkVisibility() && cell.scrollWidth > cell.clientWidth + 1 && getComputedStyle(cell).display !== "inline")
      cut.push(`a cell is too narrow: ${cell.dataset.name} ${cell.innerText.slice(0, 50)}`)
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const node = texts.currentNode
    if (!node.data.trim() || !node.parentElement.checkVisibility()) continue
    const range = document.createRange()
    range.selectNodeContents(node)
    const outer = node.parentElement.closest("svg, td, th, p, li, summary, figcaption, h1, h2, h3, nav, div, body")
    const box = outer.getBoundingClientRect()
    for (const { left, right, width } of range.getClientRects())
      if (width && (left < -1 || right > wide + 1 || left < box.left - 1 || right > box.right + 1))
        cut.push(`${node.data.trim().slice(0, 50)}: ${left} to ${right} in ${box.left} to ${box.right}`)
  }
  return cut
}"""


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium. Skip the test where there is none."""
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextlib.contextmanager
def opened(started: Any, path: Path, width: int) -> Iterator[Any]:
    """Open a file in a window of this width."""
    page = started.new_page(viewport={"width": width, "height": 844})
    page.goto(path.resolve().as_uri())
    yield page
    page.close()


def height(page: Any) -> int:
    """Return the full height of the page in px."""
    return int(page.evaluate("document.documentElement.scrollHeight"))


def unfold(page: Any) -> None:
    """Open all folded details."""
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")


def cut_text(page: Any) -> list[str]:
    """Return the texts that leave their box or the window, and the tables that need scrolling."""
    return list(page.evaluate(_CUT))
