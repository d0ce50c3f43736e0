"""The flags of a job that works with a trained model: the job's own, and the options of the model that --run names."""

import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro

from jobs.runtime.flags import read_flags

Settings = TypeVar("Settings")


def parse_with_options(
    settings_type: type[Settings],
    open_model: Callable[[str], Any],
    usual: Any,
    description: str,
    command: str,
    argv: list[str] | None = None,
) -> tuple[Settings, Any]:
    """Read ``--run`` first; the options of that model are then flags, with its defaults, and what ``--help`` shows.

    Args:
        open_model: run -> what has ``options``, a dataclass.
        usual: the options that ``--help`` shows where no run is named.
    Raises InputError where `open_model` does.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = usual
    for index, word in enumerate(argv):
        if word == "--run" and index + 1 < len(argv):
            options = open_model(argv[index + 1]).options
        elif word.startswith("--run="):
            options = open_model(word.partition("=")[2]).options

    def collect(settings: Any, options: Any) -> tuple[Any, Any]:
        return settings, options

    flat = tyro.conf.arg(name="")
    collect.__annotations__ |= {"settings": Annotated[settings_type, flat], "options": Annotated[type(options), flat]}
    collect.__defaults__ = (options,)
    collect.__doc__ = description
    config = (tyro.conf.OmitArgPrefixes,)
    return read_flags(lambda argv: tyro.cli(collect, args=argv, prog=command, config=config), argv, command)
