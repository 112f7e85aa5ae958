"""Every page of the documentation site in real Chromium, as wide as a desktop and as wide as a telephone."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from browser import SHOTS
from processes import ROOT, require_package

WIDTHS = (1280, 400)

#: What leaves the window on the right, and is not inside something that scrolls by itself.
OUTSIDE = """
(width => [...document.querySelectorAll('body *')]
  .filter(e => e.checkVisibility({visibilityProperty: true, opacityProperty: true}))
  .filter(e => e.getBoundingClientRect().right > width + 1)
  .filter(e => {
    for (let up = e; up !== document.body; up = up.parentElement)
      if (getComputedStyle(up).overflowX !== 'visible' || getComputedStyle(up).position === 'fixed') return false;
    return true;
  })
  .map(e => e.outerHTML.slice(0, 200)))"""

BROKEN_IMAGES = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
ANCHORS = "[...document.querySelectorAll('[id]')].map(e => e.id)"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the browser reports what it did not find."""


@pytest.fixture
def site(home: Path) -> Path:
    """The documentation, built as `make docs` builds it, but somewhere else."""
    require_package("mkdocs")
    built = home / "site"
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", built],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True,
    )  # fmt: skip
    return built


@pytest.fixture
def origin(site: Path) -> Iterator[str]:
    """Where the site is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_every_page(site, origin, browser):
    """Nothing is missing, nothing complains, nothing is wider than the window, and each link leads somewhere."""
    tab = browser()
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")
    assert {"index.html", "tutorial.html", "reference/api.html", "examples/seed/index.html"} <= set(pages)
    links: dict[str, set[str]] = {}
    anchors: dict[str, set[str]] = {}
    found = []
    for page in pages:
        tab.open(origin + page, shows="article h1")
        for width in WIDTHS:
            tab.resize(width)
            faults = {
                "wider than the window": tab.run("document.documentElement.scrollWidth") > width
                and tab.run("document.documentElement.scrollWidth"),
                "outside the window": tab.run(f"{OUTSIDE}({width})"),
                "images that do not load": tab.run(BROKEN_IMAGES),
                "the console": tab.complaints(),
                "loaded from another site": [
                    url for url in tab.requests() if not url.startswith((origin, "data:", "blob:"))
                ],
            }
            if SHOTS:  # pictures of long pages take a minute together
                tab.shot(f"{page.removesuffix('.html').replace('/', '-')}-{width}")
            tab.events.clear()
            found += [(page, width, fault, what) for fault, what in faults.items() if what]
        links[page] = {link for link in tab.run(LINKS) if link.startswith(origin)}
        anchors[page] = set(tab.run(ANCHORS))
    for page, targets in links.items():
        for link, anchor in map(urldefrag, targets):
            target = unquote(urlsplit(link).path)[1:] or "index.html"
            if not (site / target).is_file():
                found.append((page, 0, "a link leads nowhere", link))
            elif anchor and target in anchors and unquote(anchor) not in anchors[target]:
                found.append((page, 0, "a link leads to no heading", f"{link}#{anchor}"))
    assert found == []
