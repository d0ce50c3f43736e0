"""Everything that the service uses of Ray's private interface, which may change."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from ray._private import ray_logging, worker
from ray._private.utils import get_num_cpus
from ray._raylet import Config  # type: ignore[attr-defined]


def cpus() -> int:
    """CPUs that the quota of this process's container allows."""
    return int(get_num_cpus(override_docker_cpu_warning=True))


def reload_auth_mode() -> None:
    """Have Ray read RAY_AUTH_MODE again, as `ray.init` does. Otherwise Ray reads it once, at its import."""
    Config.initialize("")


@contextlib.contextmanager
def worker_lines_left_out(unwanted: Callable[[str], bool]) -> Iterator[None]:
    """Meanwhile this driver prints no line of a worker that is unwanted. Ray's log files keep it."""
    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    before = dispatcher.handlers

    def wanted_only(handle: Callable[[dict[str, Any]], None], data: dict[str, Any]) -> None:
        handle({**data, "lines": [line for line in data.get("lines", []) if not unwanted(line)]})

    dispatcher.handlers = [
        (name, functools.partial(wanted_only, handle) if name == "ray_print_logs" else handle)
        for name, handle in before
    ]
    try:
        yield
    finally:
        dispatcher.handlers = before


def leave_out_errors(wanted: re.Pattern[str]) -> None:
    """Have this driver print no error of Ray in which `wanted` is found. Lines of workers are printed as before."""
    worker.print_to_stdstream = functools.partial(_without, wanted, worker.print_to_stdstream)


def _without(wanted: re.Pattern[str], handle: Callable[..., None], data: dict[str, Any], ignore_prefix: bool) -> None:
    # Ray gives its errors to this function as lines of the raylet. Its dispatcher of workers' lines never has them.
    if data.get("pid") == "raylet":
        data = {**data, "lines": [line for line in data["lines"] if not wanted.search(line)]}
    handle(data, ignore_prefix)
