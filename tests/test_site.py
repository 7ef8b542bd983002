"""The site that `make docs` builds, opened in headless Chromium and read as a file.

Every page is opened once, on a wide screen or on a telephone, light or dark: no error in the console, no
request to elsewhere, formulas drawn, nothing wider than the screen. `make site` runs it.
"""

from __future__ import annotations

import functools
import http.server
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from browser import browser, requested

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "_build" / "html"

pytestmark = pytest.mark.site


def pages() -> list[Path]:
    """Return the pages of the site, without Sphinx's own lists of names and modules."""
    found = sorted(p.relative_to(SITE) for p in SITE.rglob("*.html") if "_static" not in p.parts)
    assert len(found) > 100, "build the site first: make docs"
    return [p for p in found if p.name not in ("genindex.html", "py-modindex.html", "search.html")]


class Page(HTMLParser):
    """The links, anchors and images of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.images: list[dict] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(given[name] for name in ("id", "name") if given.get(name))
        if tag == "img":
            self.images.append(given)
        for name in ("href", "src"):
            if given.get(name):
                self.links.append(given[name])


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_link_within_the_site_leads_somewhere():
    read = {path: Page(SITE / path) for path in pages()}
    dead = []
    for path, page in read.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (SITE / path.parent / unquote(parts.path)).resolve() if parts.path else SITE / path
            page_there = read.get(target.relative_to(SITE))
            lost = parts.fragment and page_there and unquote(parts.fragment) not in page_there.anchors
            if lost or not target.is_file():
                dead.append(f"{path}: {link}")
    assert not dead


def test_every_figure_says_in_words_what_it_shows():
    for path in pages():
        for image in Page(SITE / path).images:
            if "sidebar-logo" not in image.get("class", ""):
                assert len(image.get("alt", "")) > 15, (path, image)


DRAWN = """
const wide = document.documentElement.scrollWidth - innerWidth;
const formulas = document.querySelectorAll('.math').length;
const drawn = document.querySelectorAll('mjx-container').length;
const wrong = [...document.querySelectorAll('[data-mml-node="merror"]')].map(e => e.textContent);
return [wide, formulas, drawn, wrong];
"""


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (1200, True)])
def test_pages_are_drawn(address, width, dark):
    every = pages()
    reference = [p for p in every if p.parent.name == "api"]
    some = [p for p in every if p not in reference] + reference[:: 8 if width > 600 else 20]
    with browser(width, dark) as driver:
        for path in some:
            driver.get(f"{address}/{path}")
            wide = formulas = drawn = 0
            wrong = []
            for _ in range(100):
                wide, formulas, drawn, wrong = driver.execute_script(DRAWN)
                if drawn >= formulas:
                    break
                time.sleep(0.05)
            assert drawn >= formulas, (path, drawn, formulas)
            assert not wrong, (path, wrong)
            assert wide <= 0, f"{path} is {wide} pixels wider than the screen"
            errors = [e for e in driver.get_log("browser") if "favicon" not in e["message"]]
            assert not errors, (path, errors)
            elsewhere = [u for u in requested(driver) if not u.startswith((address, "data:"))]
            assert not elsewhere, (path, elsewhere)


@pytest.mark.parametrize("word", ["linear_cross_entropy", "label smoothing", "fit_temperature"])
def test_the_search_finds(address, word):
    with browser() as driver:
        driver.get(f"{address}/search.html?q={word.replace(' ', '+')}")
        for _ in range(200):
            found = driver.execute_script(
                "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
            )
            if found:
                break
            time.sleep(0.05)
        assert found
        if "_" in word:
            assert any(link.split("#")[0].endswith(f"xent.{word}.html") for link in found[:5]), found[:5]
