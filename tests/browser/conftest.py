"""One server with the demo model and a key, and one browser, for all tests of the page.

What needs playwright is imported late: without it the tests are skipped, not broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.server.served import Served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.browsing import Open, Visit


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from tests.browser.browsing import KEY

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"reader: {KEY}\n")
    keys.chmod(0o600)
    server = Served("--api-key-file", str(keys))
    try:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server.ready()
    finally:
        server.stop()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    from tests.browser.browsing import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def visiting(served: Served, browser: Browser) -> Iterator[Open]:
    """Open the page; what it complains of fails the test at its end."""
    from tests.browser.browsing import Visit

    visits: list[Visit] = []

    def visit(**options: object) -> Visit:
        visits.append(Visit(browser, str(served.client.base_url), **options))
        return visits[-1]

    yield visit
    for one in visits:
        one.end()
