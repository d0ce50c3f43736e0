"""What is printed while the models load: lines of our own, in the place of Ray's warnings of a slow start."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator

_TELL_EVERY_S = 30.0
# The wait for a line that is just being made.
_END_S = 5.0
# Ray's own warnings, which come after as long, or when a busy machine starts processes slowly.
_SLOW = re.compile(
    r"Proxy actor reported not ready on node"
    r"|have taken more than \d+s to initialize\."
    r"|This may be caused by a slow __init__ or reconfigure method\."
)
_UNSCHEDULED = re.compile(
    r"have taken more than \d+s to be scheduled\."
    r".*required for each replica: (\{.*?\}), total resources available: (\{.*?\})\."
)


def only_slow(line: str) -> bool:
    """Whether Ray warns of a slow start alone. A line by which a CPU or GPU is missing says more."""
    if (match := _UNSCHEDULED.search(line)) is None:
        return bool(_SLOW.search(line))
    required, available = json.loads(match[1]), json.loads(match[2])
    return all(available.get(name, 0.0) >= amount for name, amount in required.items())


@contextlib.contextmanager
def told(app: str, say: Callable[[str], None]) -> Iterator[None]:
    """Every 30 s `say` which deployments of `app` do not answer yet."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(_TELL_EVERY_S):
            try:
                line = _line(app)
            except Exception as error:
                line = f"serve: still loading; Ray Serve does not say what ({type(error).__name__})"
            if not done.is_set():
                say(line)

    thread = threading.Thread(target=tell, name="loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_END_S)


def _line(app: str) -> str:
    from ray import serve
    from ray.serve.schema import DeploymentStatus

    application = serve.status().applications.get(app)
    statuses = application.deployments if application else {}
    late = [name for name, each in statuses.items() if each.status != DeploymentStatus.HEALTHY]
    return f"serve: still loading{': ' if late else ''}{', '.join(late)}"
