"""What a program shows of its command line: a mistake in one line, and a help without ragged lines.

tyro tells a mistake in a box of many lines, and breaks a help text wherever a line of the docstring begins with no
letter.
"""

import contextlib
import difflib
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import tyro
from tyro import _strings

from mmcore.errors import InputError

T = TypeVar("T")

_WIDTH = 80
# Least likeness of a mistyped flag: --dry-run where there is none is no mistyped --run, which are 0.71 alike.
_ALIKE = 0.75
_FLAG = re.compile(r"--[A-Za-z][\w.-]*")
# How tyro writes the values of a flag: every flag without a value has the default None, which the help says too.
_NONE = re.compile(r"\{None\}\|(\S+)( *)")
# What tyro says of a value, and what is said here.
_VALUES = {
    r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)": r"\1 \2: give a whole number",
    r"Error parsing (--\S+): could not convert string to float: (.*)": r"\1 \2: give a number",
    r"[Ii]nvalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)": r"\2 \1: choose one of \3",
    r"Missing value for argument '(\S+)'.*": r"\1: its value is missing",
    r"Error parsing (--\S+): no type matching \{None\}\|(\S+) could be .* from \[(.*?)\].*": r"\1 \3: give \2 or None",
    r"Error parsing (--\S+): no type matching (\S+) could be instantiated from \[(.*?)\].*": r"\1 \3: give \2",
    # Of a group of settings, which says itself what is wrong.
    r"Error parsing [^-].*?: (--.*)": r"\1",
}


@dataclass(frozen=True)
class Help:
    """What the help of a program shows beside what tyro writes."""

    hidden: str = ""
    """Said in place of the groups of flags; "" shows them."""
    left_out: Sequence[str] = ()
    """Flags that cannot matter here. No mistyped flag is taken for one of them; given, they are read nevertheless."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Title over a flag and those that follow."""
    ending: str = ""
    """Said below all flags."""


def read_settings(settings_type: type[T], description: str | None, command: str, shown: Help = Help()) -> T:
    """The settings by the flags of this process. Raises InputError for flags that are wrong."""
    return read_flags(
        lambda argv: tyro.cli(settings_type, args=argv, description=description, prog=command),
        sys.argv[1:],
        command,
        shown,
    )


def read_flags(parse: Callable[[list[str]], T], argv: Sequence[str], command: str, shown: Help = Help()) -> T:
    """``parse(argv)``, which calls tyro. Raises InputError for flags that are wrong.

    `command`: what is typed before the flags.
    """
    # Private to tyro; where it is no longer called the help has its ragged lines again.
    _strings.remove_single_line_breaks = _paragraphs
    out, err = io.StringIO(), io.StringIO()  # of no encoding, for which tyro draws no boxes
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return parse(list(argv))
    except SystemExit as end:
        if end.code:
            raise InputError(_mistake(err.getvalue(), parse, argv, command, shown)) from None
        print("\n".join(_shown(out.getvalue().splitlines(), shown)))
        raise


def read_subcommand(kinds: Mapping[str, type], description: str | None, command: str, missing: str) -> Any:
    """The settings of one of `kinds`, which the first word of this process names.

    `missing`: what the line of an absent word says. Raises InputError for another word, or flags that are wrong.
    """
    kind, *flags = sys.argv[1:] or [""]
    if kind not in (*kinds, "-h", "--help"):
        raise InputError(f"{kind or missing}: choose one of {', '.join(kinds)}")
    return read_flags(
        lambda flags: tyro.extras.subcommand_cli_from_dict(
            dict(kinds), args=[kind, *flags], description=description, prog=command
        ),
        flags,
        f"{command} {kind}",
    )


def value_given(argv: Sequence[str], flag: str) -> str | None:
    """The value of `flag` in `argv`, before tyro reads it; of several the last, which tyro takes. None without one."""
    value = None
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            value = argv[index + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _paragraphs(helptext: str) -> str:
    """The lines of each paragraph as one; what is indented, such as a command, stays as it is."""
    lines: list[str] = []
    for line in map(str.rstrip, inspect.cleandoc(helptext).split("\n")):
        if line and not line.startswith(" ") and lines and lines[-1] and not lines[-1].startswith(" "):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _shown(lines: Sequence[str], shown: Help) -> Iterator[str]:
    """The help; its description, which tyro does not break, in lines of `_WIDTH`."""
    num_groups, is_left_out = 0, False
    for line in map(str.rstrip, lines):
        is_title = re.fullmatch(r" \S.*", line) is not None and line.strip(" -") != ""
        num_groups += is_title
        if shown.hidden and num_groups > 1:
            yield textwrap.fill(shown.hidden, _WIDTH)
            return
        if (flag := re.match(r"  (--[\w.-]+)", line)) or not line.startswith("   "):
            is_left_out = flag is not None and flag[1] in shown.left_out
        if is_left_out:
            continue
        if flag and (title := shown.titles.get(flag[1])):
            yield from ("", f" {title}", f" {'-' * (_WIDTH - 2)}")
        # In the usage too, which has no columns.
        line = _NONE.sub(_padded if flag else r"\1\2", line).rstrip()
        yield line if line.startswith(" ") else textwrap.fill(line, _WIDTH, break_on_hyphens=False)
    if shown.ending:
        yield textwrap.fill(shown.ending, _WIDTH)


def _padded(found: re.Match[str]) -> str:
    """The kind of value alone, as wide as it was with None, so that the help beside it stays in its column."""
    return found[1].ljust(len(found[0]))


# -- mistakes ------------------------------------------------------------------------------------------------------


def _mistake(told: str, parse: Callable[[list[str]], object], argv: Sequence[str], command: str, shown: Help) -> str:
    """What tyro tells in a title and sections with rules between them, in one line."""
    title, section = [*re.split(r"^ +-{3,} *$", told.strip("\n"), flags=re.MULTILINE), ""][:2]
    show, flags = f"`{command} --help`", _flags(parse)
    named = [word.partition("=")[0].replace("_", "-") for word in argv if _FLAG.match(word)]
    # A mistyped one may be what tyro misses.
    if unknown := [flag for flag in named if flag not in flags]:
        near = _nearest(unknown[0], [flag for flag in flags if flag not in shown.left_out])
        return f"{unknown[0]}: no such flag; {f'did you mean {near}? ' * bool(near)}{show} shows the flags"
    said = " ".join((section or title).split())
    if title.strip() == "Unrecognized options":
        return f"{said.rpartition(': ')[2]}: belongs to no flag; {show} shows the flags"
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
    return last if last in flags else next(iter(difflib.get_close_matches(name, flags, 1, _ALIKE)), None)
