"""What a job printed, without what Ray's own actors logged beside it."""

import re

# Lines that Ray prints on a driver whenever they arrive, an earlier job's too: of other processes, and of its own.
_RAY = re.compile(
    r"(\x1b\[\d+m)*\(([\w.]+ )?(pid=\d+|raylet|autoscaler)\b"
    r"|(\x1b\[\d+m)*\d{4}-\d\d-\d\d [\d:,]+\s+[A-Z]+ \w+\.py:\d+ -- "
)

# Put before a script whose watchdog is to name a demand: however late the head hears of it, or answers.
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
    """The job's lines of `output`. Ray's actors log errors of theirs, tracebacks too, when several Rays run on this
    machine or a busy one is slow."""
    return [line for line in output.splitlines() if not re.search(r"\((TrainController|PlacementGroupCleaner) ", line)]


def driver_lines(output: str) -> list[str]:
    """What the job's driver itself printed."""
    return [line for line in output.splitlines() if line.strip() and not _RAY.match(line)]


def error_line(output: str) -> str:
    """The one line by which a job refused, the last that its driver printed; no traceback anywhere."""
    assert not any("Traceback" in line for line in own_lines(output)), output
    lines = driver_lines(output)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert lines[-1] == errors[0], output
    return errors[0]
