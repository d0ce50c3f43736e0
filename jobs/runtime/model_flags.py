"""The flags of a job that works with a trained model: the job's own, and the options of the model that --run names."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from mmcore.errors import InputError
from mmcore.flags import Help, read_flags, value_given
from mmcore.trained.pipeline import HUB, TrainedPipeline

Settings = TypeVar("Settings")


def parse_with_options(
    settings_type: type[Settings],
    open_model: Callable[[str], Any],
    families: Mapping[str, Any],
    description: str,
    command: str,
    argv: list[str] | None = None,
    flag: str = "--run",
) -> tuple[Settings, Any]:
    """Read `flag`, which names a run, first. The options of its model are then flags, with its defaults.

    Args:
        open_model: run -> what has ``options``, a dataclass.
        flag: the flag that names the run.
        families: the usual options by the kind of the model; ``--help`` shows the first where no run is named.
    Raises InputError where `open_model` does.
    """
    argv = sys.argv[1:] if argv is None else argv
    (kind, options), *others = families.items()
    title, run = f"options of {kind}", value_given(argv, flag)
    if run is not None:
        options, others, title = open_model(run).options, [], f"options of the model of {run}"

    def collect(settings: Any, options: Any) -> tuple[Any, Any]:
        return settings, options

    flat = tyro.conf.arg(name="")
    collect.__annotations__ |= {"settings": Annotated[settings_type, flat], "options": Annotated[type(options), flat]}
    collect.__defaults__ = (options,)
    config = (tyro.conf.OmitArgPrefixes,)
    return read_flags(
        lambda argv: tyro.cli(collect, args=argv, description=description, prog=command, config=config),
        argv,
        command,
        Help(
            titles={_flags(options)[0]: title},
            ending=" ".join(
                f"Instead of these, {other} has {_listed(each)}: add {flag} RUN." for other, each in others
            ),
        ),
    )


def with_run(argv: Sequence[str]) -> list[str]:
    """The flags, with --run for what --model and --revision name: one source stands for either."""
    run, model, revision = (value_given(argv, flag) for flag in ("--run", "--model", "--revision"))
    if model is None:
        if revision is not None:
            raise InputError(f"--revision {revision}: is for --model; leave it out")
        return list(argv)
    if run is not None:
        raise InputError(f"--run {run} and --model {model}: give one of them")
    if Path(model).is_dir():
        # Raises InputError for what is no folder of a pipeline, or a revision of one.
        TrainedPipeline(model, revision)
        return [*argv, "--run", str(Path(model).absolute())]
    return [*argv, "--run", HUB + model + ("" if revision is None else f"@{revision}")]


def _flags(options: Any) -> list[str]:
    return [f"--{each.name.replace('_', '-')}" for each in dataclasses.fields(options)]


def _listed(options: Any) -> str:
    *flags, last = _flags(options)
    return f"{', '.join(flags)} and {last}"
