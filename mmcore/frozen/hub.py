"""Reading from the hub of Hugging Face: no noise of the library, a line for a fetch, and the error of a failure."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmcore.errors import InputError


@contextmanager
def quiet_load() -> Iterator[None]:
    """Within the block, transformers prints no progress bar, no report on weights and no attempts to reach the hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def say_fetch(name: str, *files: str, what: str = "") -> None:
    """Print that `name` is read from the hub, if it is no local folder and none of `files` is in the cache.

    Without a network the attempts take a minute and more. `what`: the part that is read, such as ``the weights of``.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
        return
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return
    except HFValidationError:  # a path, which is refused without a request
        return
    # Of evaluate.py the output is one JSON object.
    print(f"reading {what}{' ' * bool(what)}{name} from the hub of Hugging Face", file=sys.stderr, flush=True)


def not_found(name: str, flag: str, what: str, error: Exception) -> InputError:
    """The error for `name`, which is no `what`: whether the hub has none or was not reached, by the causes of `error`.

    `flag` is named in the message.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if Path(name).is_absolute() and not Path(name).exists():
        return InputError(f"{flag} {name!r}: no such folder; name the one where the {what} is now")
    place = f"{flag} {name!r}: no {what} in a folder of this name"
    if any(isinstance(each, LocalEntryNotFoundError) for each in causes):
        why = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        return InputError(f"{place} or in the cache, and the hub of Hugging Face cannot be reached{why}; name a folder")
    if any(isinstance(each, RepositoryNotFoundError) and not isinstance(each, GatedRepoError) for each in causes):
        return InputError(f"{place}, and the hub of Hugging Face has no such model, or a private one; check the name")
    reason = str(error).strip().splitlines()[0]
    return InputError(f"{place} or on the hub of Hugging Face ({reason})")
