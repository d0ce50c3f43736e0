"""The one exception that means "the user can mend this"."""

import shlex


class InputError(ValueError):
    """Bad input: the message is one line that names the file, field and value, and says how to mend it.

    Jobs print it as ``error: ...`` and exit with code 1, without a traceback.
    """


def not_prepared(folder: object, dataset: str, storage: object) -> InputError:
    """There is no finished dataset in `folder`, and how to make it in `storage`."""
    source = "" if dataset == "shapes" else " --source SOURCE"
    command = f"python jobs/prepare.py --dataset {dataset}{source} --storage {shlex.quote(str(storage))}"
    return InputError(f"{folder}: no prepared dataset; run `{command}` first")
