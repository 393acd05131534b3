"""A real Chromium for the tests that look at pages; they are skipped where there is none.

    with a_page(height=900) as (page, told): ...      # told: what the page said to the console
    with hosted(folder) as home: ...                  # the address of a host of these files
"""
import contextlib
import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIETLY = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@contextlib.contextmanager
def a_browser():
    """Chromium; a process has one at a time."""
    sync = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no browser")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=QUIETLY)
        yield browser
        browser.close()


@contextlib.contextmanager
def page_in(browser, **options):
    """A new page, 1,000 pixels wide, and its list of messages and errors."""
    page = browser.new_page(viewport={"width": 1000, "height": 900}, **options)
    told = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    yield page, told
    page.close()


@contextlib.contextmanager
def a_page(**options):
    """The same in a browser of its own."""
    with a_browser() as browser, page_in(browser, **options) as (page, told):
        yield page, told


class Quiet(SimpleHTTPRequestHandler):
    """Files of one folder with a few headers more, and no line for each request."""
    more = ()

    def log_message(self, *args):
        pass

    def end_headers(self):
        for name, value in self.more:
            self.send_header(name, value)
        super().end_headers()


@contextlib.contextmanager
def hosted(folder, more=()):
    """The address of a static host of this folder; more: headers (name, value) that it sends."""
    kind = type("Handler", (Quiet,), {"more": more})
    handler = functools.partial(kind, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{host.server_port}/"
        host.shutdown()
