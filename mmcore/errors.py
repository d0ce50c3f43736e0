"""The one exception that means "the user can mend this", and checks that many settings share."""

import shlex


class InputError(ValueError):
    """Bad input: the message is one line that names the file, field and value, and says how to mend it.

    Jobs print it as ``error: ...`` and exit with code 1, without a traceback.
    """


class OptionError(InputError):
    """An option of a model that it cannot take. Jobs show the option as a flag, the service as a field of its own name.

    ``problem`` tells the value and the mend, and names no flag.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(option, problem)
        self.option, self.problem = option, problem

    def __str__(self) -> str:
        return f"--{self.option.replace('_', '-')} {self.problem}"


def check_at_least_one(settings: object, *names: str) -> None:
    """Raise InputError for a field of `settings` that is below 1, with its flag."""
    for name in names:
        if getattr(settings, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"{name} {getattr(settings, name)} must be at least 1; mend it with --{flag}")


def check_share(settings: object, *names: str) -> None:
    """Raise InputError for a field of `settings` that is not from 0 to below 1, with its flag."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"{name} {getattr(settings, name)} must be from 0 to below 1; mend it with --{flag}")


def not_prepared(folder: object, dataset: str, storage: object) -> InputError:
    """There is no finished dataset in `folder`, and how to make it in `storage`."""
    source = "" if dataset == "shapes" else " --source SOURCE"
    command = f"python jobs/prepare.py --dataset {dataset}{source} --storage {shlex.quote(str(storage))}"
    return InputError(f"{folder}: no prepared dataset; run `{command}` first")
