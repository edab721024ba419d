"""Whether everybody can read and work the page: both themes, a narrow screen, the keyboard alone, names for all."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.browser.browsing import ADD, BOX, CONTRASTS, LAMP, NEEDS_CHROMIUM, Open, unnamed

pytestmark = NEEDS_CHROMIUM

NARROW = {"width": 360, "height": 740}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(visiting: Open, scheme: str) -> None:
    visit = visiting(color_scheme=scheme, reduced_motion="reduce").ready()
    page = visit.page
    visit.ask(ADD)
    visit.ask(LAMP)
    visit.row(ADD).click()
    visit.act("Fork here")
    expect(page.locator("#branch")).to_have_text(re.compile("Branch 2"))
    visit.ask(BOX)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(number) for number in re.findall(r"\d+", ground)[:3]) / 3
    assert brightness < 40 if scheme == "dark" else brightness > 220
    assert [one for one in page.evaluate(CONTRASTS) if one["ratio"] < 4.5] == []
    visit.picture(f"{scheme}-fork")
    toggle = page.get_by_role("button", name="Dark theme")
    expect(toggle).to_have_attribute("aria-pressed", str(scheme == "dark").lower())
    toggle.click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground


def test_a_narrow_screen_has_room_for_all(visiting: Open) -> None:
    visit = visiting(viewport=NARROW, has_touch=True).ready()
    page = visit.page
    visit.ask(LAMP)
    visit.ask(ADD)
    for part, reachable in {
        "Branches": ["Fork here", "Rewind here", "Export", "Delete", "Import…"],
        "Memory": ["This branch", "Whole context"],
        "Settings": ["Reset"],
        "Chat": ["Send"],
    }.items():
        page.get_by_role("navigation").get_by_role("button", name=part).tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
        for name in [*reachable, "New", "Dark theme"]:
            button = page.get_by_role("button", name=name, exact=True)
            button.scroll_into_view_if_needed()
            box = button.bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= NARROW["width"]
            assert box["y"] >= 0 and box["y"] + box["height"] <= NARROW["height"]
        visit.picture(f"narrow-{part.lower()}")
    page.get_by_role("navigation").get_by_role("button", name="Branches").tap()
    visit.row(LAMP[:20]).tap()
    visit.act("Rewind here")
    expect(page.locator("#notice-text")).to_be_visible()
    page.get_by_role("navigation").get_by_role("button", name="Chat").tap()
    assert visit.said == [LAMP, "4821"]


def test_the_keyboard_is_enough(visiting: Open) -> None:
    visit = visiting().ready()
    page = visit.page
    press = page.keyboard.press
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("What is")
    press("Shift+Enter")
    page.keyboard.type("27 + 45?")
    expect(page.locator("#input")).to_have_value("What is\n27 + 45?")
    press("ControlOrMeta+A")
    page.keyboard.type(ADD)
    press("Enter")
    expect(page.locator(".figures")).to_have_count(1)
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type(LAMP)
    press("Enter")
    expect(page.locator(".figures")).to_have_count(2)
    page.locator(".skip").focus()
    seen = []
    for _ in range(40):
        press("Tab")
        seen.append(
            page.evaluate("""() => {
          const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
          const { id, dataset, role } = document.activeElement;
          return [id || dataset.act || role || dataset.zoom, outlineStyle, parseFloat(outlineWidth)];
        }""")
        )
        if seen[-1][0] == "system":
            break
    assert all(style == "solid" and width >= 2 for _, style, width in seen)
    order = [name for name, _, _ in seen]
    wanted = ["new", "theme", "import", "treeitem", "fork", "input", "now", "temperature", "system"]
    places = [order.index(name) for name in wanted]
    assert places == sorted(places)
    assert order.count("treeitem") == 1  # the tree is one stop; arrows move in it
    page.locator("[role=treeitem][tabindex='0']").focus()
    expect(visit.row(LAMP[:20])).to_be_focused()
    press("ArrowUp")
    expect(visit.row(ADD)).to_be_focused()
    press("Home")
    expect(visit.row("Start")).to_be_focused()
    press("ArrowRight")
    expect(visit.row(ADD)).to_be_focused()
    press("Enter")
    expect(page.get_by_role("button", name="Fork here")).to_be_focused()
    press("Enter")
    expect(page.locator("#branch")).to_have_text(re.compile("Branch 2 · 31 tokens"))
    assert visit.said == [ADD, "27 + 45 = 72"]


def test_every_control_has_a_name(visiting: Open) -> None:
    visit = visiting().ready()
    assert unnamed(visit) == []
    visit.ask(ADD)
    assert unnamed(visit) == []
    visit.act("Name…")
    assert unnamed(visit) == []
