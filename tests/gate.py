"""A gate before the work of a job, so that none of it gets ahead of the test that is about to kill it.

It is a file: those wait at it too that outlive a killed job, and where no test has written one it stands open.
"""

import contextlib
import fcntl
import time
from pathlib import Path

# Steps of a training that may be made beyond the one that a kill waits for: it meets a run at work, however soon it
# comes, and one that is not over, however late.
AHEAD = 4


class Gate:
    """The gate in `folder`, and what was begun behind it."""

    def __init__(self, folder: Path | str) -> None:
        self.allowed, self.log = Path(folder) / "allowed", Path(folder) / "begun.txt"
        self.arrivals = Path(folder) / "arrived.txt"

    def allow(self, number: int) -> None:
        """Nothing beyond `number` may begin."""
        new = self.allowed.with_suffix(".new")
        new.write_text(str(number))
        new.replace(self.allowed)

    def allow_more(self, more: int) -> None:
        """So many more may begin than have begun by now."""
        self.allow(len(self.begun()) + more)

    def open(self) -> None:
        """Everything may begin."""
        self.allowed.unlink()

    def wait(self, number: int) -> None:
        """Until `number` may begin."""
        with contextlib.suppress(FileNotFoundError):
            while int(self.allowed.read_text()) < number:
                time.sleep(0.005)

    def begin(self, line: str) -> None:
        """Write `line` down, once what is begun by it is allowed."""
        with open(self.log, "a+") as file:
            # One process after another has its number; the lock of one that is killed goes with it.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self.wait(len(file.readlines()) + 1)
            file.write(f"{line}\n")

    def arrive(self) -> None:
        """Note that one more process works up to this gate."""
        with open(self.arrivals, "a") as file:
            file.write("arrived\n")

    def arrived(self) -> int:
        """How many processes have."""
        return len(self.arrivals.read_text().splitlines()) if self.arrivals.exists() else 0

    def begun(self) -> list[str]:
        """The lines of what was begun, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []
