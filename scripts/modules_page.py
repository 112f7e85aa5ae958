"""Writes docs/reference/modules.md from the first paragraph of each module's docstring: ``make modules``."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gunicorn_passenger"
PAGE = ROOT / "docs" / "reference" / "modules.md"

HEAD = """\
# Modules

What each module of the package is for: the first paragraph of its docstring. The rest of the
docstring says which process runs the module, and what it must never do. `make modules` writes this
page. How the parts work together: [architecture](../explanation/architecture.md).
"""


def plain(text: str) -> str:
    """reStructuredText as Markdown: references become code."""
    text = re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", text.replace("``", "`"))
    return text.replace("|", r"\|")


def purpose(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    return plain(" ".join(said.partition("\n\n")[0].split()))


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for folder in [PACKAGE, *sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))]:
        title = "The top level" if folder == PACKAGE else f"`{folder.name}/`"
        said = textwrap.fill(purpose(folder / "__init__.py"), 100, break_on_hyphens=False)
        parts.append(f"## {title}\n\n{said}\n\n| module | |\n| --- | --- |")
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                name = path.relative_to(PACKAGE)
                parts[-1] += f"\n| `{name}` | {purpose(path)} |"
        parts[-1] += "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
