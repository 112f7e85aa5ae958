#!/usr/bin/env python3
"""Draws the plots of docs/performance.md from the tables on that page, which are the output of bench/.

python scripts/draw_performance.py            # writes docs/images/performance-*.svg
python scripts/draw_performance.py --check    # exit status 1 if they are not what the tables say
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
#: the plots: file, title, heading of the section, column of its first table
PLOTS = [
    ("performance-wsgi.svg", "WSGI, hello: requests per second", "WSGI servers compared", 1),
    ("performance-proxy.svg", "Proxy, hello: requests per second", "Reverse proxies compared", 1),
    (
        "performance-websocket.svg",
        "Proxy, WebSocket echo: messages per second",
        "Reverse proxies compared",
        2,
    ),
]
WIDTH, LEFT, ROW = 760, 250, 30


def rows(page: str, heading: str, column: int) -> list[tuple[str, int]]:
    """The names in a section's first table, and their numbers in one column."""
    section = page.partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    found = []
    for line in table[0].splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        number = re.match(r"[\d,]+", cells[column])
        if number:
            found.append((re.sub(r"[*`]", "", cells[0]), int(number[0].replace(",", ""))))
    return found


def plot(title: str, values: list[tuple[str, int]]) -> str:
    """Horizontal bars, in the table's order."""
    height = 60 + ROW * len(values)
    most = max(number for _, number in values)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-labelledby="title" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#1f2933">',
        f'  <title id="title">{escape(title)}</title>',
        f'  <rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>',
        f'  <text x="20" y="30" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (name, value) in enumerate(values):
        y = 48 + ROW * number
        width = max(1, round(value / most * (WIDTH - LEFT - 110)))
        color = "#00897b" if name == "gunicorn-passenger" else "#9aa5b1"
        lines += [
            f'  <text x="{LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'  <rect x="{LEFT}" y="{y}" width="{width}" height="20" fill="{color}"/>',
            f'  <text x="{LEFT + width + 8}" y="{y + 15}">{value:,}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    page = (DOCS / "performance.md").read_text()
    changed = []
    for file, title, heading, column in PLOTS:
        path = DOCS / "images" / file
        drawn = plot(title, rows(page, heading, column))
        if not path.exists() or path.read_text() != drawn:
            changed.append(file)
            if "--check" not in sys.argv:
                path.write_text(drawn)
    print(f"changed: {', '.join(changed) or 'none'}")
    return int("--check" in sys.argv and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
