"""Sentences of docstrings and documents have at most 25 words, and so have cells of tables."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS = 25
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Paragraphs without sentences: lists of shapes, commands, code and tables.
NO_PROSE = re.compile(r"Shapes: |Command: |    |==|::$")
# A list item or an argument's entry begins a new sentence, also without a full stop before it.
ITEM = re.compile(r"\n\s*(?:[-*] |\d+\. |(?=`?\w+`?: ))")
END = re.compile(r"(?<=[.?!;])\s+")
CODE_BLOCK = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)
TABLE_OR_HEADING = re.compile(r"^(\||#).*$", re.MULTILINE)
ROW = re.compile(r"^\|(.*)\|$", re.MULTILINE)


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of modules, classes, functions and fields."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield inspect.cleandoc(str(statement.value.value))


def long_sentences(text: str) -> list[str]:
    """The sentences of `text` with more than `MOST_WORDS` words. A semicolon ends a sentence too."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not NO_PROSE.match(paragraph):
            for item in ITEM.split(paragraph):
                found += [each for each in END.split(" ".join(item.split())) if len(each.split()) > MOST_WORDS]
    return found


def test_long_sentences_are_found() -> None:
    words = " ".join(["word"] * MOST_WORDS)
    assert long_sentences(f"Short. {words} ends. Short.") == [f"{words} ends."]
    assert long_sentences(f"{words}.\n* {words}\n* {words}\n\nShapes: {words} {words}") == []


@pytest.mark.parametrize("package", ["mmcore", "jobs", "serve", "tests"])
def test_sentences_of_docstrings_are_short(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {sentence}"
        for path in (ROOT / package).rglob("*.py")
        for text in docstrings(path.read_text())
        for sentence in long_sentences(text)
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_sentences_of_documents_are_short(path: Path) -> None:
    found = long_sentences(TABLE_OR_HEADING.sub("", CODE_BLOCK.sub("", path.read_text())))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_cells_of_documents_are_short(path: Path) -> None:
    """A table is read by its columns: a paragraph belongs below it."""
    cells = [cell for row in ROW.findall(CODE_BLOCK.sub("", path.read_text())) for cell in row.split("|")]
    found = [cell for cell in cells if len(cell.split()) > MOST_WORDS]
    assert not found, "\n".join(found)
