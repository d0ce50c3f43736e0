"""The command line of a training job: its flags, its variant, and what they resolve to."""

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from jobs.runtime.source import output_storage
from mmcore.catalogue import RECIPES
from mmcore.errors import InputError
from mmcore.flags import Help, read_flags, value_given
from mmcore.recipe import Recipe, check_effect
from mmcore.storage import Storage

R = TypeVar("R", bound=Recipe)

# What the help says of variants that many jobs have.
_VARIANTS = {
    "report": "as in the report",
    "best": "our best for photos",
    "shapes": "for the built-in scenes, on CPUs",
    "smoke": "a tiny model that trains 20 steps",
}
_STAGE = "What is trained; the variants and the other flags are those of the stage."
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RunOptions:
    """The flags that every training job has."""

    storage: str = "./out"
    """Where data, features and runs lie: a folder or s3://bucket/prefix."""
    name: str = "default"
    """Name of the run."""
    num_workers: int = 1
    """Training workers."""
    use_gpu: bool | None = None
    """A GPU for each worker; by default where the cluster has GPUs or its autoscaler can start some."""
    fresh: bool = False
    """Start anew even if a run of this name is there."""
    dry_run: bool = False
    """Print what would be read and written, sizes, steps and the resolved recipe, and stop."""
    stream: bool = False
    """Feed the workers through Ray Data, not from a copy on their disk, where data are larger (captioners only). A
    restart then goes on at the right step but reads the interrupted epoch from its beginning."""
    stall_timeout: float | None = None
    """Seconds without progress after which the job ends; by default it waits (an autoscaler may take minutes)."""
    num_threads: int | None = None
    """CPU threads of a worker; by default the machine's cores over the workers on it."""


@dataclass(frozen=True)
class Job(Generic[R]):
    """A training job's command line, resolved. Raises InputError for options that no run can have."""

    recipe_name: str
    variant: str
    recipe: R
    options: RunOptions
    is_typed: bool = False
    """Whether it was read from a command line, by `parse_job`: its end then names the command that usually follows.
    A training that another job starts is followed by that job's own work."""

    def __post_init__(self) -> None:
        if not _RUN_NAME.fullmatch(self.options.name):
            raise InputError(
                f"--name {self.options.name!r}: use letters, digits, '.', '_' and '-', a letter or digit first"
            )
        if self.options.num_threads is not None and self.options.num_threads < 1:
            raise InputError(f"--num-threads {self.options.num_threads}: must be at least 1")

    @property
    def storage(self) -> Storage:
        return Storage(self.options.storage)

    @property
    def run(self) -> Storage:
        return self.storage / "runs" / self.recipe_name / self.options.name


def recipe_name(job_file: str) -> str:
    """The recipe of ``jobs/train_x.py`` is ``x``."""
    return Path(job_file).stem.removeprefix("train_")


def parse_staged_job(
    job_file: str, stages: dict[str, str], description: str, argv: list[str] | None = None
) -> Job[Any]:
    """As `parse_job`, for a job of several recipes. It reads ``--stage`` first, by default the last of `stages`.

    `stages`: the name of the recipe of each stage.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = value_given(argv, "--stage")
    stage = [*stages][-1] if given is None else given
    if stage not in stages:
        raise InputError(f"--stage {stage!r}: choose one of {', '.join(stages)}")
    name = stages[stage]
    return _parse(name, job_file, RECIPES[name].variants, description, argv, stages=tuple(stages), stage=stage)


def parse_job(
    job_file: str, variants: dict[str, R], description: str, argv: list[str] | None = None, report_needs: str = ""
) -> Job[R]:
    """Read ``--variant`` first; its fields are then the defaults of the flags, and what ``--help`` shows.

    Raises InputError for a flag that has no effect beside the others, and for a job that the catalogue does not name.

    `report_needs`: the flags without which `report` does not run.
    """
    name, argv = recipe_name(job_file), sys.argv[1:] if argv is None else argv
    return _parse(name, job_file, variants, description, argv, report_needs)


def _parse(
    name: str,
    job_file: str,
    variants: dict[str, R],
    description: str,
    argv: list[str],
    report_needs: str = "",
    stages: tuple[str, ...] = (),
    stage: str = "",
) -> Job[R]:
    given = value_given(argv, "--variant")
    variant = ("shapes" if "shapes" in variants else "report") if given is None else given
    if variant not in variants:
        raise InputError(f"--variant {variant!r}: choose one of {', '.join(variants)}")
    # Found out after the training, its run could not be opened.
    if name not in RECIPES:
        raise InputError(
            f"jobs/{Path(job_file).name}: mmcore/catalogue.py has no recipe {name!r}; add it to RECIPES there"
        )
    command = f"python jobs/{Path(job_file).name}"
    Variant = Literal[tuple(variants)]  # type: ignore[valid-type]
    Stage: Any = Annotated[Literal[stages], tyro.conf.arg(help=_STAGE)] if stages else tyro.conf.Suppress[str]

    def collect(
        variant: Variant,  # type: ignore[valid-type]
        recipe: Annotated[Any, tyro.conf.arg(name="")],
        options: Annotated[RunOptions, tyro.conf.arg(name="")],
        stage: Stage,
    ) -> Job[Any]:
        return Job(name, variant, recipe, options)

    collect.__annotations__["recipe"] = Annotated[type(variants[variant]), tyro.conf.arg(name="")]
    collect.__defaults__ = (variant, variants[variant], RunOptions(), stage)
    told = "; ".join(f"{each} is {_VARIANTS[each]}" for each in variants if each in _VARIANTS)
    help_text = f"Settings to start from: {told}. Every other flag overrides one of them."
    collect.__annotations__["variant"] = Annotated[Variant, tyro.conf.arg(help=help_text)]
    config, text = (tyro.conf.OmitArgPrefixes,), description.strip()
    schedule = value_given(argv, "--schedule") or variants[variant].train.schedule
    left_out = [] if schedule == "step" else ["--step-epoch"]
    left_out += [] if RECIPES[name].kind == "captioner" else ["--stream", "--no-stream"]
    parsed: Job[R] = read_flags(
        lambda argv: tyro.cli(collect, args=argv, description=text, prog=command, config=config),
        argv,
        command,
        Help(left_out=left_out),
    )
    check_effect(parsed.recipe, variants[variant])
    # Absolute: the workers' working directory is not the driver's.
    options = dataclasses.replace(parsed.options, storage=output_storage(parsed.options.storage, "--storage").uri)
    job = dataclasses.replace(parsed, options=options, is_typed=True)
    if given is None and variant == "shapes":
        report = f"; for the report's settings give `--variant report{report_needs}`"
        print(
            f"no --variant given: running `shapes`, self-contained on built-in data{report * ('report' in variants)}",
            flush=True,
        )
    return job
