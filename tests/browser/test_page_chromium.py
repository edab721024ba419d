"""The page in a real browser, over a real server with the demo model: what a reader does, and what comes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import expect

from tests.browser.browsing import ADD, BOX, KEY, LAMP, NEEDS_CHROMIUM, Open, Visit
from tests.server.served import Served

pytestmark = NEEDS_CHROMIUM

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
LONG = {"temperature": "50", "seed": "1"}  # so hot that the model babbles on


def tokens_of(visit: Visit) -> tuple[int, int]:
    """Tokens and checkpoints that the chart shows."""
    shown = visit.page.locator("#chart")
    return int(shown.get_attribute("data-tokens") or 0), int(shown.get_attribute("data-points") or 0)


def test_a_chat_is_answered_measured_and_drawn(visiting: Open) -> None:
    visit = visiting().ready()
    page = visit.page
    expect(page.locator("#model")).to_have_text("demo")
    visit.picture("light-empty")
    page.get_by_role("button", name=ADD).click()
    expect(page.locator(".message.assistant .figures")).to_contain_text("reused 0 of 20 tokens")
    assert visit.said == [ADD, "27 + 45 = 72"]
    assert re.search(r"first token \d+ m?s", page.inner_text(".figures"))
    expect(page.locator("#announcer")).to_have_text("Answer: 27 + 45 = 72")
    tokens, points = tokens_of(visit)
    assert (tokens, points) == (31, 2)
    visit.ask(LAMP)
    visit.ask(BOX)
    assert visit.said[-1] == "kitchen"
    expect(page.locator(".figures").nth(1)).to_contain_text("reused 30 of")
    grown, more = tokens_of(visit)
    assert grown > tokens and more == 6
    assert page.locator("#chart .line.all, #chart .line.own, #chart .line.state").count() == 3
    expect(page.locator("#legend-all")).to_have_text(re.compile(r"[\d.]+ MiB"))
    page.get_by_text("How this is counted").click()
    assert page.locator("#table tr").count() == 6
    expect(page.locator("#live-records")).to_have_text(re.compile(r"[1-9]\d* of \d+"))
    expect(page.locator("#live-checkpoints")).to_have_text(re.compile(r"[1-9]\d* device"))
    visit.picture("light-chat")


def test_what_is_said_is_text_and_never_markup(visiting: Open) -> None:
    visit = visiting().ready()
    visit.ask(MARKUP)
    assert visit.said[0] == MARKUP
    assert visit.page.locator("#messages img, #messages script, #tree img").count() == 0
    shown = "import('./prose.js').then(({ parts }) => parts('Say\\n```py\\na < b\\n```\\nand ```c``` so\\n```\\nopen'))"
    parts = visit.page.evaluate(shown.replace("./", "/page/"))
    assert [(part["code"], part["text"]) for part in parts] == [
        (False, "Say"),
        (True, "a < b"),
        (False, "and ```c``` so"),
        (True, "open"),
    ]


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped_and_what_came_stays(visiting: Open, how: str) -> None:
    visit = visiting().ready()
    page = visit.page
    for name, value in LONG.items():
        page.fill(f"#{name}", value)
    page.fill("#input", "Tell me a long story.")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".writing .text")).to_have_text(re.compile(r"\S{3,}"))
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    visit.idle()
    expect(page.locator(".figures")).to_have_text("stopped")
    kept = visit.said[-1]
    assert kept and tokens_of(visit)[0] > 0
    page.get_by_role("button", name="Reset").click()
    visit.ask(ADD)
    assert visit.said[1] == kept


def test_branches_are_forked_rewound_named_and_deleted_by_clicks(visiting: Open, served: Served) -> None:
    visit = visiting().ready()
    page = visit.page
    visit.ask(ADD)
    visit.ask(LAMP)
    visit.row(ADD).click()
    visit.act("Fork here")
    expect(page.locator("#branch")).to_have_text(re.compile(r"Branch 2 · 31 tokens"))
    assert visit.said == [ADD, "27 + 45 = 72"]
    visit.ask("Sort from smallest to largest: 42, 7, 19, 88, 3")
    assert visit.said[-1] == "3, 7, 19, 42, 88"
    expect(page.locator(".figures").last).to_contain_text("reused 30 of")
    assert [row.get_attribute("aria-level") for row in page.get_by_role("treeitem").all()] == ["1", "1", "2", "1"]
    visit.act("Name…")
    page.get_by_role("textbox", name="Name").fill("sorted")
    page.keyboard.press("Enter")
    expect(visit.row("Sort from")).to_contain_text("sorted")
    visit.act("Pin")
    expect(page.locator("#notice-text")).to_contain_text("kept for an hour")
    visit.picture("light-branches")
    visit.row(LAMP[:20]).click()
    visit.act("Open")
    assert visit.said == [ADD, "27 + 45 = 72", LAMP, "4821"]
    visit.row(ADD).click()
    visit.act("Rewind here")
    expect(page.locator("#branch")).to_have_text(re.compile(r"Branch 1 · 31 tokens"))
    assert visit.said == [ADD, "27 + 45 = 72"]
    expect(visit.row(LAMP[:20])).to_have_count(0)
    visit.ask(BOX)
    assert len(visit.said) == 4
    visit.row("Sort from").click()
    visit.act("Delete")
    expect(visit.row("Sort from")).to_have_count(0)
    visit.act("Delete")
    expect(page.locator("#empty")).to_be_visible()


def test_a_conversation_is_exported_and_taken_in(visiting: Open, tmp_path: Path) -> None:
    visit = visiting().ready()
    page = visit.page
    visit.ask(LAMP)
    visit.ask(ADD)
    visit.row(LAMP[:20]).click()
    with page.expect_download() as download:
        visit.act("Export")
    file = tmp_path / "conversation.state"
    download.value.save_as(file)
    assert file.stat().st_size > 400_000
    other = visiting().ready()
    other.page.set_input_files("#import-file", file)
    expect(other.page.locator("#notice-text")).to_contain_text("Taken in as branch 1")
    assert other.said == [LAMP, "4821"]
    other.ask(BOX)
    assert other.said[-1] == "kitchen"
    file.write_bytes(file.read_bytes()[:-1])
    other.page.set_input_files("#import-file", file)
    expect(other.page.get_by_role("alert")).to_have_text(re.compile(r"^[^.]+\.$"))
    other.complaints.clear()  # the browser tells of the refusal too


def test_a_reload_finds_the_conversation_and_a_lost_one_is_told(visiting: Open, served: Served) -> None:
    visit = visiting().ready()
    visit.ask(ADD)
    figures = visit.page.inner_text(".figures")
    visit.page.reload()
    visit.ready()
    assert visit.said == [ADD, "27 + 45 = 72"]
    assert visit.page.inner_text(".figures") == figures
    visit.ask(BOX)
    current = visit.page.evaluate("JSON.parse(sessionStorage.getItem('statewise.sessions')).current")
    assert served.client.delete(f"/v1/sessions/{current}").status_code == 200
    visit.page.reload()
    expect(visit.page.locator("#notice-text")).to_have_text("1 branch of this page is no longer on the server.")
    expect(visit.page.locator("#empty")).to_be_visible()
    visit.complaints.clear()  # the browser tells of the 404


def test_the_key_is_asked_for_and_kept_in_the_tab(visiting: Open) -> None:
    visit = visiting(key=None)
    page = visit.page
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    field = dialog.get_by_label("API key")
    field.fill("not-the-key-that-it-is")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("That key is not accepted.")
    visit.picture("light-key")
    field.fill(KEY)
    dialog.get_by_role("button", name="Use the key").click()
    visit.ready()
    assert all("401" in complaint for complaint in visit.complaints)
    visit.complaints.clear()
    visit.ask(ADD)
    page.reload()
    visit.ready()
    assert visit.said == [ADD, "27 + 45 = 72"]
    assert page.evaluate("localStorage.getItem('statewise.key')") is None


def test_an_error_of_the_server_is_one_sentence(visiting: Open) -> None:
    visit = visiting().ready()
    page = visit.page
    page.fill("#top_p", "7")
    page.fill("#input", ADD)
    page.press("#input", "Enter")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("top_p")
    assert re.fullmatch(r"[^.]+(\.\d[^.]*)*\.", alert.inner_text())
    expect(page.locator("#input")).to_have_value(ADD)  # to send it again
    page.get_by_role("button", name="Dismiss").click()
    expect(alert).to_have_count(0)
    visit.complaints.clear()
    page.get_by_role("button", name="Reset").click()
    page.press("#input", "Enter")
    expect(page.locator(".figures")).to_have_count(1)
