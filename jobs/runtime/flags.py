"""What a job shows of its command line: a mistake in one line, and a help without ragged lines.

tyro tells a mistake in a box of many lines, and breaks a help text wherever a line of the docstring begins with no
letter.
"""

import contextlib
import difflib
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tyro import _strings

from mmcore.errors import InputError

T = TypeVar("T")

_WIDTH = 80
_FLAG = re.compile(r"--[A-Za-z][\w.-]*")
# What tyro says of a value, and what is said here.
_VALUES = {
    r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)": r"\1 \2: give a whole number",
    r"Error parsing (--\S+): could not convert string to float: (.*)": r"\1 \2: give a number",
    r"[Ii]nvalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)": r"\2 \1: choose one of \3",
    r"Missing value for argument '(\S+)'.*": r"\1: its value is missing",
    r"Error parsing (--\S+): no type matching (\S+) could be instantiated from \[(.*?)\].*": r"\1 \3: give \2",
    # Of a group of settings, which says itself what is wrong.
    r"Error parsing [^-].*?: (--.*)": r"\1",
}


def read_flags(parse: Callable[[list[str]], T], argv: Sequence[str], command: str, hidden: str = "") -> T:
    """``parse(argv)``, which calls tyro. Raises InputError for flags that are wrong.

    Args:
        command: what is typed before the flags.
        hidden: what the help says in place of the groups of flags; "" shows them.
    """
    # Private to tyro; where it is no longer called the help has its ragged lines again.
    _strings.remove_single_line_breaks = _paragraphs
    out, err = io.StringIO(), io.StringIO()  # of no encoding, for which tyro draws no boxes
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return parse(list(argv))
    except SystemExit as end:
        if end.code:
            raise InputError(_mistake(err.getvalue(), parse, argv, command)) from None
        print("\n".join(_shown(out.getvalue().splitlines(), hidden)))
        raise


def _paragraphs(helptext: str) -> str:
    """The lines of each paragraph as one; what is indented, such as a command, stays as it is."""
    lines: list[str] = []
    for line in map(str.rstrip, inspect.cleandoc(helptext).split("\n")):
        if line and not line.startswith(" ") and lines and lines[-1] and not lines[-1].startswith(" "):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _shown(lines: Sequence[str], hidden: str) -> Iterator[str]:
    """The help; its description, which tyro does not break, in lines of `_WIDTH`."""
    num_groups = 0
    for line in map(str.rstrip, lines):
        is_title = re.fullmatch(r" \S.*", line) is not None and line.strip(" -") != ""
        num_groups += is_title
        if hidden and num_groups > 1:
            yield textwrap.fill(hidden, _WIDTH)
            return
        yield line if line.startswith(" ") else textwrap.fill(line, _WIDTH, break_on_hyphens=False)


# -- mistakes ------------------------------------------------------------------------------------------------------


def _mistake(told: str, parse: Callable[[list[str]], object], argv: Sequence[str], command: str) -> str:
    """What tyro tells in a title and sections with rules between them, in one line."""
    title, section = [*re.split(r"^ +-{3,} *$", told.strip("\n"), flags=re.MULTILINE), ""][:2]
    show, flags = f"`{command} --help`", _flags(parse)
    named = [word.partition("=")[0].replace("_", "-") for word in argv if _FLAG.match(word)]
    # A mistyped one may be what tyro misses.
    if unknown := [flag for flag in named if flag not in flags]:
        near = _nearest(unknown[0], flags)
        return f"{unknown[0]}: no such flag; {f'did you mean {near}? ' * bool(near)}{show} lists all"
    said = " ".join((section or title).split())
    if title.strip() == "Unrecognized options":
        return f"{said.rpartition(': ')[2]}: belongs to no flag; {show} lists all"
    if title.strip() == "Required options":
        missing = re.findall(r"^ +(--\S+)", section, flags=re.MULTILINE)
        return f"{' and '.join(missing)}: needed; {show} says what for"
    for pattern, line in _VALUES.items():
        if match := re.fullmatch(pattern, said.removesuffix(".")):
            return match.expand(line)
    return said


def _flags(parse: Callable[[list[str]], object]) -> list[str]:
    """All flags that the help names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        parse(["--help"])
    return sorted(set(_FLAG.findall(out.getvalue())))


def _nearest(name: str, flags: Sequence[str]) -> str | None:
    # `--train.lr`, as recipe.json nests it, is `--lr`.
    last = f"--{name.lstrip('-').rpartition('.')[2]}"
    return last if last in flags else next(iter(difflib.get_close_matches(name, flags, 1)), None)
