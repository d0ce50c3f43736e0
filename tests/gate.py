"""A gate that holds the work of a job until the test opens it, so that a kill always hits a running job.

The gate is a file. It also holds processes that outlive a killed job. Without the file the gate is open.
"""

import contextlib
import fcntl
import time
from pathlib import Path

# Training steps allowed beyond the step that a kill waits for. The kill then hits a running training that is not
# finished.
AHEAD = 4


class Gate:
    """The gate in `folder`, and the record of started work."""

    def __init__(self, folder: Path | str) -> None:
        self.allowed, self.log = Path(folder) / "allowed", Path(folder) / "begun.txt"
        self.arrivals = Path(folder) / "arrived.txt"

    def allow(self, number: int) -> None:
        """Allow work up to `number`, and no more."""
        new = self.allowed.with_suffix(".new")
        new.write_text(str(number))
        new.replace(self.allowed)

    def allow_more(self, more: int) -> None:
        """Allow `more` beyond the work started so far."""
        self.allow(len(self.begun()) + more)

    def open(self) -> None:
        """Open the gate for all work."""
        self.allowed.unlink()

    def wait(self, number: int) -> None:
        """Wait until `number` is allowed."""
        with contextlib.suppress(FileNotFoundError):
            while int(self.allowed.read_text()) < number:
                time.sleep(0.005)

    def begin(self, line: str) -> None:
        """Write `line` to the record once its work is allowed."""
        with open(self.log, "a+") as file:
            # Each process gets its number under a lock. The lock of a killed process is released.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self.wait(len(file.readlines()) + 1)
            file.write(f"{line}\n")

    def arrive(self) -> None:
        """Record one more process at this gate."""
        with open(self.arrivals, "a") as file:
            file.write("arrived\n")

    def arrived(self) -> int:
        """The number of processes at this gate."""
        return len(self.arrivals.read_text().splitlines()) if self.arrivals.exists() else 0

    def begun(self) -> list[str]:
        """The recorded lines in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []
