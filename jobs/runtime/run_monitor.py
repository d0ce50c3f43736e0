"""What the driver of a training knows of its workers: their progress, restarts and mistakes."""

from typing import Any

import ray

# A crash is retried this often; losing a machine is no crash and is not counted.
MAX_CRASHES = 3


class RestartBudget:
    """Tells crashes from lost machines: each start of the workers after the first is one or the other.

    Ray's own counting takes a reclaimed spot machine for a crash wherever the cloud's notice does not reach it.
    """

    def __init__(self) -> None:
        self.num_starts = 0
        self.machines: set[str] = set()

    def runs_on(self, machine: str) -> None:
        """A worker runs there. Only such a machine is missed: the autoscaler takes idle ones back."""
        self.machines.add(machine)

    def started(self, alive: set[str]) -> int:
        """The workers have started while these machines are alive; returns the crashes so far."""
        self.num_starts += 1
        return max(0, self.num_starts - 1 - len(self.machines - alive))


@ray.remote(num_cpus=0)
class RunMonitor:
    """The newest progress of a run, its restarts and the mistakes that its workers met. Lives beside the driver."""

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}
        self.mistakes: dict[int, str] = {}
        self.budget = RestartBudget()
        self.crash = "a worker was killed"

    def start(self, rank: int, machine: str) -> str | None:
        """A worker starts on `machine`, a node of Ray. Returns the mistake for which it must not."""
        self.budget.runs_on(machine)
        if rank == 0 and not self.mistakes:
            num_crashes = self.budget.started({node["NodeID"] for node in ray.nodes() if node["Alive"]})
            if num_crashes > MAX_CRASHES:
                self.mistakes[rank] = (
                    f"training crashed {num_crashes} times, last: {self.crash}; "
                    "the same command goes on from the last checkpoint"
                )
        return self.first_mistake()

    def update(self, progress: dict[str, Any]) -> None:
        self.progress |= progress

    def latest(self) -> dict[str, Any]:
        return self.progress

    def add_crash(self, text: str) -> None:
        self.crash = text

    def add_mistake(self, rank: int, text: str) -> int:
        """Returns how many workers have met one."""
        self.mistakes[rank] = text
        return len(self.mistakes)

    def first_mistake(self) -> str | None:
        return self.mistakes[min(self.mistakes)] if self.mistakes else None
