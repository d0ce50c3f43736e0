"""What a job printed, without what Ray's own actors logged beside it."""

import re


def own_lines(output: str) -> list[str]:
    """The job's lines of `output`. Ray's actors log errors of theirs, tracebacks too, when several Rays run on this
    machine or a busy one is slow."""
    return [line for line in output.splitlines() if not re.search(r"\((TrainController|PlacementGroupCleaner) ", line)]
