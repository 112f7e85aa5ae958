"""What MkDocs needs to make a site of this repository: pages from outside docs/, and links to its files.

The links of a page are those that work in a checkout. A Markdown file outside docs/ becomes a page at its own
path (examples/seed/README.md); any other file that a page links to is copied into the site. So
the same link works in both.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md", "examples/*/README.md"]
#: a role of Sphinx in a docstring, such as :meth:`.Server.listen`, as mkdocstrings leaves it
ROLE = re.compile(r":(?:class|meth|func|mod|attr):<code>~?\.?([\w.]+)</code>")
WORD = re.compile(r"<code>([^<\s]+)</code>")
#: as many characters of code fit on a line of a telephone
SHORT = 36
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def _place(file: Path) -> str:
    """Where a file of the repository is in the site."""
    return str(file.relative_to(DOCS if file.is_relative_to(DOCS) else ROOT))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not below docs/, and the files that pages link to."""
    for page in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, _place(page), abs_src_path=str(page)))
    for page in [file for file in files if file.is_documentation_page()]:
        for link, _ in LINK.findall(Path(page.abs_src_path).read_text()):
            target = _target(Path(page.abs_src_path), link)
            if target and target.is_file() and files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let each link lead to the place that its target has in the site."""
    source = Path(page.file.abs_src_path)

    def placed(match: re.Match[str]) -> str:
        target = _target(source, match[1])
        if target is None:
            return match[0]
        place = os.path.relpath(_place(target), Path(page.file.src_uri).parent)
        return f"]({place}{match[2] or ''})"

    return LINK.sub(placed, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings as code, with the last part of the name, and mark words (site.css)."""
    html = ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
    return WORD.sub(
        lambda match: f'<code class="word{" long" * (len(match[1]) > SHORT)}">{match[1]}</code>', html
    )


def _target(source: Path, link: str) -> Path | None:
    """The file of the repository that a link leads to; None for other addresses."""
    if re.match(r"\w+:", link):
        return None
    target = (source.parent / link).resolve()
    readme = target / "README.md"
    return readme if readme.is_file() else target
