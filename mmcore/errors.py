"""The exceptions for bad input, which the user can correct, and checks that many settings share."""

import shlex
from typing import Any


class InputError(ValueError):
    """Bad input. The message is one line: the file, field and value, and how to correct it.

    Jobs print it as ``error: ...`` and exit with code 1, without a traceback.
    """


class OptionError(InputError):
    """A value of a model's option that is not allowed. Jobs show the option as a flag, the service as a request field.

    ``problem`` says what is wrong with the value and how to correct it. It names no flag.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(option, problem)
        self.option, self.problem = option, problem

    def __str__(self) -> str:
        return f"--{self.option.replace('_', '-')} {self.problem}"


def check_at_least_one(settings: object, *names: str) -> None:
    """Raise InputError, naming the flag, for a field of `settings` below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"{name} {getattr(settings, name)} must be at least 1; change --{flag}")


def check_not_negative(settings: object, *names: str) -> None:
    """Raise InputError, naming the flag, for a field of `settings` below 0."""
    for name in names:
        if getattr(settings, name) < 0:
            flag = name.replace("_", "-")
            raise InputError(f"{name} {getattr(settings, name)} must not be negative; change --{flag}")


def check_share(settings: object, *names: str) -> None:
    """Raise InputError, naming the flag, for a field of `settings` outside of [0, 1)."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"{name} {getattr(settings, name)} must be from 0 to below 1; change --{flag}")


def check_heads(settings: Any) -> None:
    """Raise InputError, naming both flags, for a `num_heads` of `settings` that does not divide its `width`."""
    if settings.width % settings.num_heads:
        raise InputError(
            f"num_heads {settings.num_heads} does not divide width {settings.width}; change --num-heads or --width"
        )


def check_negative_prompt(negative_prompt: str, guides: bool) -> None:
    """Raise OptionError for a negative prompt where no step is guided."""
    if negative_prompt and not guides:
        raise OptionError("negative_prompt", "has no effect without guidance (a guidance of 1); give a larger guidance")


def not_prepared(folder: object, dataset: str, storage: object) -> InputError:
    """The error for a `folder` without a finished dataset, with the command that prepares it in `storage`."""
    source = "" if dataset == "shapes" else " --source SOURCE"
    command = f"python jobs/prepare.py --dataset {dataset}{source} --storage {shlex.quote(str(storage))}"
    return InputError(f"{folder}: no prepared dataset; run `{command}` first")
