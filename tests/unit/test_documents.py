"""The documents: complete, true where a test can tell, and in plain English."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gunicorn_passenger.config import settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gunicorn_passenger"
README = (ROOT / "README.md").read_text()
FOLDERS = [".", *sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))]

DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "bench/README.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").glob("*/README.md"),
    ]
)
EXAMPLE_FILES = sorted([*(ROOT / "examples").glob("*/*.py"), ROOT / "Dockerfile"])

#: Phrases that a reader has to read twice.
UNIDIOMATIC = re.compile(
    r"\b(is no|is none|are none|nobody|somebody|whoever|of before|broke off|who reads)\b(?! longer| more)",
    re.IGNORECASE,
)
WIDTH = 100

#: How many such phrases the string constants (docstrings, messages) of a folder of the package still have; the
#: folder "." is the modules on top. A folder that is not here has none.
ALLOWED: dict[str, int] = {
    ".": 1, "http": 4,
}  # fmt: skip

#: Documents that name modules and classes of the package.
NAMING = [
    ROOT / "docs" / name for name in ("architecture.md", "glossary.md", "daemons.md", "http.md", "proxy.md")
]
#: Classes of other libraries.
OTHERS = frozenset({"ForkingMixIn", "SameSite", "StopIteration", "TypeError", "ValueError"})


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """The prose of a Markdown text, with as many lines: code blocks are empty lines."""
    lines, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        lines.append("" if fenced or line.startswith("    ") else line)
    return "\n".join(lines)


def links(text: str) -> set[str]:
    """Where the links of a Markdown text lead."""
    return set(re.findall(r"\]\(([^)\s]+)\)", without_code(text)))


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# --- what README has to name -----------------------------------------------------------------------


def settings_rows() -> list[list[str]]:
    section = README.partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


def test_readme_lists_every_setting():
    rows = {row[0]: row for row in settings_rows() if row[0]}
    assert set(rows) == set(settings._CHECKS)
    for name, row in rows.items():
        assert row[1] == f"PASSENGER_{name.upper()}"


def test_readme_gives_the_defaults():
    rows = {row[0]: row[2] for row in settings_rows()}
    timeouts = settings.Timeouts()
    assert float(rows["head_timeout"]) == timeouts.head
    assert float(rows["body_timeout"]) == timeouts.body
    assert float(rows["write_timeout"]) == timeouts.write
    assert float(rows["grace_period"]) == settings.DEFAULT_GRACE_PERIOD
    assert float(rows["max_blocking_time"]) == settings.DEFAULT_MAX_BLOCKING_TIME


def test_readme_says_which_settings_the_application_cannot_make():
    marked = {row[0] for row in settings_rows() if "not in the application" in row[3]}
    assert marked == settings._OPERATOR_ONLY


def test_readme_lists_the_variables_that_are_not_settings():
    assert {row[1] for row in settings_rows() if not row[0]} == {
        "PASSENGER_RUNTIME_DIR",
        "PORT",
    }


def test_readme_links_every_document_and_example():
    wanted = {ids(path) for path in (ROOT / "docs").glob("*.md")}
    wanted |= {ids(path.parent) for path in (ROOT / "examples").glob("*/README.md")}
    assert wanted <= links(README)


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path):
    for link in links(path.read_text()):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


# --- what the documents name -----------------------------------------------------------------------


def code_words(path: Path) -> set[str]:
    """What stands in backticks in the prose of a document."""
    return {" ".join(word.split()) for word in re.findall(r"`([^`]+)`", without_code(path.read_text()))}


@pytest.mark.parametrize("path", NAMING, ids=ids)
def test_named_modules_exist(path):
    known = {ids(file).partition("/")[2] for file in PACKAGE.rglob("*.*")}
    known |= {Path(name).name for name in known}
    known |= {ids(file) for file in (ROOT / "tests").rglob("*.py")} | {"gunicorn.conf.py", "app.py"}
    named = {word for word in code_words(path) if re.fullmatch(r"[\w/.]+\.(py|html)", word)}
    assert named <= known


@pytest.mark.parametrize("path", NAMING, ids=ids)
def test_named_classes_exist(path):
    known = set(OTHERS)
    for file in PACKAGE.rglob("*.py"):
        known |= set(re.findall(r"^\s*class (\w+)", file.read_text(), re.MULTILINE))
    named = {word for word in code_words(path) if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", word)}
    assert named <= known


@pytest.mark.parametrize("path", NAMING, ids=ids)
def test_named_classes_are_where_the_document_says(path):
    for name, file in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", without_code(path.read_text())):
        assert re.search(rf"^class {name}\b", (PACKAGE / file).read_text(), re.MULTILINE), (name, file)


# --- the language ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS + EXAMPLE_FILES, ids=ids)
def test_english(path):
    found = [
        f"{number}: {line}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNIDIOMATIC.search(line)
    ]
    assert not found


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_width(path):
    """Prose is wrapped at one width. Tables and code are not, nor is a word that is longer than a line."""
    lines = without_code(path.read_text()).splitlines()
    long = [
        f"{number}: {line}"
        for number, line in enumerate(lines, 1)
        if len(line) > WIDTH and not line.startswith(("|", "#")) and " " in line.strip("- ")
    ]
    assert not long


@pytest.mark.parametrize("folder", FOLDERS)
def test_english_of_the_package(folder):
    found = []
    for path in sorted((PACKAGE / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [
                    f"{ids(path)}:{node.lineno}: {match[0]}" for match in UNIDIOMATIC.finditer(node.value)
                ]
    assert len(found) <= ALLOWED.get(folder, 0), found
