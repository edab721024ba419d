"""A headless Chromium of this machine, and what a reader would do with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

KEY = "a-key-of-some-length"
STEP_MS = 30_000
NAMES = ("chromium", "chromium-browser", "google-chrome")
ADD = "What is 27 + 45?"
LAMP = "The code of the red lamp is 4821. The blue box is in the kitchen. What is the code of the red lamp?"
BOX = "Where is the blue box?"
expect.set_options(timeout=STEP_MS)


def chromium() -> str | None:
    """The program: what STATEWISE_CHROMIUM names, or the one on the path."""
    return os.environ.get("STATEWISE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


NEEDS_CHROMIUM = pytest.mark.skipif(
    chromium() is None, reason="no Chromium here: install one or name it in STATEWISE_CHROMIUM"
)


@contextmanager
def launched() -> Iterator[Browser]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A tab with the page, which must not complain and must not ask anybody else."""

    def __init__(self, browser: Browser, url: str, *, key: str | None = KEY, **options: Any) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        self.context: BrowserContext = browser.new_context(**{"viewport": {"width": 1360, "height": 860}, **options})
        self.context.set_default_timeout(STEP_MS)
        if key is not None:
            self.context.add_init_script(f"sessionStorage.setItem('statewise.key', '\"{key}\"')")
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self._note("error", str(error)))
        self.page.on("request", lambda request: self._see(request.url))
        self.page.goto(url)

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def _see(self, url: str) -> None:
        if not url.startswith((self.url, "blob:" + self.url.rstrip("/"), "data:")):
            self.strangers.append(url)

    def ready(self) -> Visit:
        self.page.wait_for_selector("body[data-ready]")
        return self

    def ask(self, text: str) -> None:
        """Send a message and wait for the whole answer."""
        answers = self.page.locator(".message.assistant")
        before = answers.count()
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        expect(answers).to_have_count(before + 1)
        self.idle()

    def idle(self) -> None:
        expect(self.page.locator("#stop")).to_be_hidden()
        expect(self.page.locator("#messages")).to_have_attribute("aria-busy", "false")

    def row(self, text: str) -> Any:
        return self.page.get_by_role("treeitem").filter(has_text=text)

    def act(self, name: str) -> None:
        self.page.get_by_role("group", name="At the selected checkpoint").get_by_role("button", name=name).click()

    @property
    def said(self) -> list[str]:
        return self.page.locator(".message .text").all_inner_texts()

    def picture(self, name: str) -> None:
        """Keep how the page looks, for people who read the results of a run."""
        folder = Path(os.environ.get("STATEWISE_SCREENSHOTS") or "ci-output/screenshots")
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png")

    def end(self) -> None:
        self.context.close()
        assert not self.complaints and not self.strangers


Open = Callable[..., Visit]

CONTRASTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let here = element; here; here = here.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(here).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.matches(":disabled, .visually-hidden, .skip, option")) continue;
    const style = getComputedStyle(element);
    const color = numbers(element instanceof SVGElement ? style.fill : style.color);
    const [one, other] = [light(color), light(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push({ text: element.textContent.trim().slice(0, 40), ratio });
  }
  return found;
}"""
"""The contrast of every text that can be seen with what it stands on."""


def unnamed(visit: Visit) -> list[str]:
    """The controls that a screen reader could not name."""
    session = visit.context.new_cdp_session(visit.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "textbox", "spinbutton", "treeitem", "tree", "dialog", "meter", "region", "image"}
    return [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored")
        and node.get("role", {}).get("value") in wanted
        and not node.get("name", {}).get("value", "").strip()
    ]
