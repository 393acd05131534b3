"""A real Chromium for the tests that look at pages; they are skipped where there is none.

    with a_page(height=900) as (page, told): ...      # told: what the page said to the console
"""
import contextlib
import shutil

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIETLY = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@contextlib.contextmanager
def a_page(**options):
    """A new page, 1,000 pixels wide, and its list of messages and errors."""
    sync = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no browser")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=QUIETLY)
        page = browser.new_page(viewport={"width": 1000, "height": 900}, **options)
        told = []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        yield page, told
        browser.close()
