"""The documents: complete, true where a test can tell, and in plain English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import modules_page
import pytest
from sources import nodes

from gunicorn_passenger.config import settings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gunicorn_passenger"
DOCS = ROOT / "docs"
SETTINGS = (DOCS / "reference" / "settings.md").read_text()
LOG_LINES = DOCS / "reference" / "log-lines.md"
GLOSSARY = DOCS / "reference" / "glossary.md"
FOLDERS = [".", *sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))]

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        ROOT / "bench" / "README.md",
        *DOCS.rglob("*.md"),
        *(ROOT / "examples").glob("*/README.md"),
    ]
)
EXAMPLE_FILES = sorted([*(ROOT / "examples").glob("*/*.py"), ROOT / "Dockerfile"])

#: Phrases that a reader has to read twice.
UNIDIOMATIC = re.compile(
    r"(?<!there )\b(is no|is none|are none|nobody|somebody|whoever|of before|broke off|goes on|mend|who reads)\b"
    r"(?! longer| more)",
    re.IGNORECASE,
)
WIDTH = 100

#: Documents that name modules and classes of the package.
NAMING = [
    *(DOCS / "explanation" / name for name in ("architecture.md", "security.md")),
    GLOSSARY,
    *(DOCS / "reference" / name for name in ("daemons.md", "http.md", "proxy.md", "modules.md")),
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


# --- the settings ----------------------------------------------------------------------------------


def settings_rows() -> list[list[str]]:
    rows = [line.strip("|").split(" | ") for line in SETTINGS.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


def test_the_page_lists_every_setting():
    rows = {row[0]: row for row in settings_rows() if row[0]}
    assert set(rows) == set(settings._CHECKS)
    for name, row in rows.items():
        assert row[1] == f"PASSENGER_{name.upper()}"


def test_the_page_gives_the_defaults():
    rows = {row[0]: row[2] for row in settings_rows()}
    timeouts = settings.Timeouts()
    assert float(rows["head_timeout"]) == timeouts.head
    assert float(rows["body_timeout"]) == timeouts.body
    assert float(rows["write_timeout"]) == timeouts.write
    assert float(rows["grace_period"]) == settings.DEFAULT_GRACE_PERIOD
    assert float(rows["max_blocking_time"]) == settings.DEFAULT_MAX_BLOCKING_TIME


def test_the_page_says_which_settings_the_application_cannot_make():
    marked = {row[0] for row in settings_rows() if "not in the application" in row[3]}
    assert marked == settings._OPERATOR_ONLY


def test_the_page_lists_the_variables_that_are_not_settings():
    assert {row[1] for row in settings_rows() if not row[0]} == {
        "PASSENGER_RUNTIME_DIR",
        "PORT",
    }


# --- the pages and their links ---------------------------------------------------------------------


def test_every_page_and_example_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    examples = {ids(path) for path in (ROOT / "examples").glob("*/README.md")}
    assert pages | examples <= set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    linked = links((DOCS / "index.md").read_text())
    assert {f"../{ids(ROOT / path).removesuffix('/README.md')}" for path in examples} <= linked
    # in a checkout there is no other navigation
    assert pages - {"index.md"} <= {link.partition("#")[0] for link in linked}


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


def test_each_word_of_the_glossary_is_a_module_or_a_class():
    rows = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    assert rows[1:] == sorted(rows[1:], key=str.lower)
    for row in rows[1:]:
        assert "`" in row.split(" | ")[2], row


def test_the_page_of_modules_is_what_their_docstrings_say():
    assert (DOCS / "reference" / "modules.md").read_text() == modules_page.page(), "run 'make modules'"


def test_the_changelog_has_the_form_that_it_names():
    """https://keepachangelog.com/en/1.1.0/: versions, newest first, and in each the known kinds of changes."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    for version in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", version, re.MULTILINE)
        assert kinds == sorted(
            set(kinds), key=["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"].index
        )


# --- log lines and errors --------------------------------------------------------------------------

LOGGING = {"warning", "error", "critical", "exception"}


def as_shown(text: str) -> str:
    """A text of the code as the page shows it."""
    text = re.sub(r"%[-+0-9.]*[a-z]", "…", text).removeprefix("gunicorn-passenger: ")
    return " ".join(re.sub("…+", "…", text).split())


def texts(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The strings among the nodes of a syntax tree, with ``…`` for what an f-string fills in."""
    for inner in nodes:
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield as_shown(inner.value)
        elif isinstance(inner, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in inner.values]
            yield as_shown("".join(map(str, parts)))


def quoted_lines() -> set[str]:
    return set(re.findall(r"^\| `(.+?)` \|", LOG_LINES.read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "module", ["config/listen_errors.py", "serving/server_errors.py", "daemons/daemon_errors.py"]
)
def test_errors(module):
    """Each error that these modules make is quoted, by its beginning."""
    made = set()
    for node in nodes(PACKAGE / module):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
            # the text is the last argument; its first string is the whole of it, the others are parts
            made.update(list(texts(ast.walk(node.value.args[-1])))[:1])
    quoted = quoted_lines()
    assert len(made) > 5
    assert {text for text in made if not any(text.startswith(line) for line in quoted)} == set()


def test_log_lines():
    """Each quoted line is in the code, and each warning and error of the code is quoted, by its beginning."""
    quoted = quoted_lines()
    known: set[str] = set()
    logged: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        known.update(texts(nodes(path)))
        for node in nodes(path):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LOGGING
            ):
                logged.update(text for argument in node.args[:1] for text in texts(ast.walk(argument)))
    beginnings = "\n" + "\n".join(known)
    assert {line for line in quoted if f"\n{line}" not in beginnings} == set()
    # lines that are only a reason are quoted where the reason is made
    logged -= {"…", "…: …", "… (…)"}
    assert {text for text in logged if not any(text.startswith(line) for line in quoted)} == set()


def test_pages_that_messages_name():
    """A message leads to a page, and the page exists."""
    named = set()
    for path in PACKAGE.rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.update(re.findall(r"\bdocs/[\w/-]+\.md", node.value))
    assert {"docs/how-to/debugging.md", "docs/how-to/deployment.md", "docs/reference/ports.md"} <= named
    assert [page for page in named if not (ROOT / page).is_file()] == []


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


def test_nothing_is_said_twice():
    """The pages of docs/ share no run of fourteen words; a page links to the one that says it."""
    pages: dict[tuple[str, ...], set[str]] = {}
    for path in sorted(DOCS.rglob("*.md")):
        text = re.sub(r"\]\([^)]*\)", "]", without_code(path.read_text())).lower()
        words = re.findall(r"[a-z0-9_()./'-]+", text)
        for at in range(len(words) - 13):
            pages.setdefault(tuple(words[at : at + 14]), set()).add(ids(path))
    assert not {" ".join(run): found for run, found in pages.items() if len(found) > 1}


@pytest.mark.parametrize("folder", FOLDERS)
def test_english_of_the_package(folder):
    found = []
    for path in sorted((PACKAGE / folder).glob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [f"{ids(path)}:{node.lineno}: {it[0]}" for it in UNIDIOMATIC.finditer(node.value)]
    assert not found
