"""The edge between a job and the shell: exit codes and one-line errors."""

import sys
from collections.abc import Callable

from mmcore.errors import InputError


def find_input_error(error: BaseException) -> InputError | None:
    """The user's mistake behind `error`, where a Ray task or actor raised it on another process."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, InputError):
            return current
        current = getattr(current, "cause", None) or current.__cause__ or current.__context__
    return None


def run(main: Callable[[], None]) -> None:
    """Run a job's `main`; a user's mistake becomes one line on stderr and exit code 1."""
    # A pipe or a log file must show progress as it happens, not when a buffer fills.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from what is committed", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        mistake = find_input_error(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(1) from None
