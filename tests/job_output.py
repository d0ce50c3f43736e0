"""The output of a job without lines that Ray's actors log into it."""

import re

# Lines that Ray prints on a driver at any time, also about other processes and earlier jobs.
_RAY = re.compile(
    r"(\x1b\[\d+m)*\(([\w.]+ )?(pid=\d+|raylet|autoscaler)\b"
    r"|(\x1b\[\d+m)*\d{4}-\d\d-\d\d [\d:,]+\s+[A-Z]+ \w+\.py:\d+ -- "
)

# Prepended to a script whose watchdog must name a demand: Ray's head may learn of it or answer late.
PATIENT_WATCHDOG = """
import contextlib
from jobs.runtime import watchdog

describe = watchdog.describe_waiting

def once_named():
    while True:
        with contextlib.suppress(Exception):
            if "waiting for " in (described := describe()):
                return described

watchdog.describe_waiting, watchdog.QUERY_TIMEOUT_S = once_named, 300.0
"""


def own_lines(output: str) -> list[str]:
    """The job's own lines of `output`.

    Ray's actors log errors and tracebacks if several Rays run or the machine is slow.
    """
    return [line for line in output.splitlines() if not re.search(r"\((TrainController|PlacementGroupCleaner) ", line)]


def driver_lines(output: str) -> list[str]:
    """The lines printed by the job's driver."""
    return [line for line in output.splitlines() if line.strip() and not _RAY.match(line)]


def error_line(output: str) -> str:
    """The error line of a refused job: the last line of its driver. Asserts that there is no traceback."""
    assert not any("Traceback" in line for line in own_lines(output)), output
    lines = driver_lines(output)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert lines[-1] == errors[0], output
    return errors[0]
