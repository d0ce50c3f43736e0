"""The README's tree names every file that a newcomer may look for."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_tree_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The tree") :]
    tree = tree[: tree.index("```", tree.index("```") + 3)]
    named = set(re.findall(r"[\w.]+\.(?:py|yaml|txt)|Makefile", tree))
    there = {path.name for folder in ("jobs", "mmcore", "serve") for path in (ROOT / folder).rglob("*.py")} - {
        "__init__.py"
    }
    assert there - named == set(), "files that the README's tree leaves out"
    everywhere = there | {path.name for path in ROOT.glob("*")} | {path.name for path in ROOT.glob("*/*.yaml")}
    assert named - everywhere == set(), "the README's tree names what is not there"
