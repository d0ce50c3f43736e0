"""Everything between a job and a Ray cluster: which one it joins, and what it says when nothing moves."""

import atexit
import contextlib
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ray

from jobs.runtime import ray_private
from jobs.runtime.commandline import counted, in_one_line, say
from jobs.runtime.source import ROOT, submission
from mmcore.data.columns import default_cache
from mmcore.errors import InputError
from mmcore.temporary import make_folder

MIN_LOCAL_CPUS = 4
"""Ray's CPUs are a number for its scheduler. With 2 of them two Train workers, or a map actor beside the
filter of a resumed sweep, wait for ever for a third; 4 is the least with which every job runs."""

HEALTH_CHECK_INTERVAL_S = 0.5
"""How often Ray Train's controller polls its workers. A report is seen at the next poll: Ray's 2 s make each
report of a short epoch cost 2 s."""


CONNECT_TIMEOUT_S = 10.0
REMOVE_TIMEOUT_S = 3.0
# Ray's words where its processes do not answer in time.
_TOO_SLOW = "timed out during startup"
# What Ray prints of a job that runs well. The first is of Ray Train's own actor, which gets handles of its workers. The
# second comes of actors that ask for half a CPU or none.
_HARMLESS = ("Actor with class name: 'PreemptionWatcher'", "worker processes have been started on node")
# Where the dashboard of a Ray of our own is, until it is told.
_dashboard: list[str] = []


# --- Joining -----------------------------------------------------------------------------------------------


def connect() -> None:
    """Join the cluster this job was sent to, or start Ray on this machine; a second call does nothing.

    Inside `ray job submit`, and wherever RAY_ADDRESS is set, that cluster is joined. A job without a working directory
    ships its repository root. Workers on other nodes then run the driver's code, not the code installed there. Says on
    stderr what it does. Sets RAY_API_SERVER_ADDRESS. If it is unset, also sets RAY_TRAIN_HEALTH_CHECK_INTERVAL_S, and
    for a local Ray RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH and RAY_TRAIN_ENABLE_PREEMPTION_WATCHER.

    Raises:
        InputError: the address is of the wrong kind, nothing answers there, or the token is refused.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(HEALTH_CHECK_INTERVAL_S))
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        ray_private.print_without_colours()
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        # Nobody takes this machine away, and one process less is to be started.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        _start_local()
    else:
        _join(address)
    ray_private.leave_out_lines(*_HARMLESS)
    _quieten_ray_data()


def show_dashboard() -> None:
    """Print where the dashboard of a Ray of our own is, once, for work that is long enough to be looked at."""
    while _dashboard:
        say(_dashboard.pop())


def _start_local() -> None:
    """A Ray of our own: its own folder, free ports, the dashboard on loopback, a token on every port."""
    folder = _temp_dir()
    token_note = ""
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on every interface and turns tokens on by itself, but then leaves one in the home
        # folder, and from that day on a plain `ray start --head` refuses a plain `ray job submit`. A token
        # that lives as long as this process closes the ports and leaves no trace; one that is there already
        # (`ray get-auth-token` shows it) is used.
        os.environ["RAY_AUTH_MODE"] = "token"
        if not ray_private.token_exists():
            token_file = folder / "auth_token"
            token_file.touch(mode=0o600)
            token_file.write_text(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    ray_private.reload_auth_mode()
    if os.environ["RAY_AUTH_MODE"] == "token":
        token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
        token_note = "" if "RAY_AUTH_TOKEN" in os.environ else f" (it asks for the token in {token_file})"
    # Ray starts a worker that has a runtime environment (Ray Train's all do) through a shell, and does not quote
    # this path: in a clone whose path has a space no worker would ever start.
    python = shlex.quote(sys.executable)
    say("Ray: starting on this machine")
    try:
        with _temporary_files_in(folder / "tmp"), _sigterm_kept():
            context = ray.init(
                # Not None, which would join a Ray that somebody else started on this machine.
                address="local",
                num_cpus=max(MIN_LOCAL_CPUS, ray_private.cpus()),
                # Without the dashboard Ray Train's controller logs an error every second.
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                logging_level=logging.WARNING,
                runtime_env=None if python == sys.executable else {"py_executable": python},
                _temp_dir=str(folder),
            )
    except Exception as error:  # where it takes too long, Ray raises this very class
        said = " ".join(str(error).split())
        busy = "; the machine is too busy, or short of memory: give the same command again" if _TOO_SLOW in said else ""
        raise InputError(
            f"Ray does not start on this machine{busy}; its files are in {folder} (RAY_TMPDIR): {said}"
        ) from error
    _point_to(context.dashboard_url)
    say(f"Ray: started, {_own_totals()}")
    _dashboard[:] = [f"Ray: dashboard http://{context.dashboard_url}{token_note}"]


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Have the processes that start meanwhile, and theirs, put temporary files there, to be removed with Ray's.

    Ray ends its processes without their exit hooks, so what they would remove themselves stays. What is kept for later
    jobs lies elsewhere: copies of features, and compiled models.
    """
    folder.mkdir(exist_ok=True)
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(default_cache() / "compiled")
    theirs = {
        "MMCORE_CACHE": str(default_cache()),
        "TORCHINDUCTOR_CACHE_DIR": compiled,
        "TMPDIR": str(folder),
    }
    mine = {name: os.environ.get(name) for name in theirs}
    os.environ.update(theirs)
    try:
        yield
    finally:
        for name, value in mine.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the job's own handler of SIGTERM, where it has one.

    Ray takes the signal twice when it starts: in Python, and in C++, where it prints a stack and aborts the process.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _join(address: str) -> None:
    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS={address}: a job needs a cluster's HOST:PORT (6379 by default) or `auto`; "
            "to send a job through an http:// address use `ray job submit`"
        )
    working_dir = (submission() or {}).get("working_dir")
    runtime_env: dict[str, Any] = {}
    if working_dir is None:
        if not (ROOT / "pyproject.toml").is_file():
            raise InputError(
                f"{ROOT} is not the repository: this copy was installed without its sources, which other nodes "
                "need; install with `pip install -e .` or submit with `ray job submit --working-dir .`"
            )
        runtime_env["working_dir"] = str(ROOT)
    # With an address Ray does not look for a token by itself; a cluster without tokens ignores one.
    if "RAY_AUTH_MODE" not in os.environ and ray_private.token_exists():
        os.environ["RAY_AUTH_MODE"] = "token"
    ray_private.reload_auth_mode()
    try:
        # Ray itself goes on trying a dead address for several minutes.
        socket.create_connection(ray_private.host_and_port(address), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({in_one_line(error)}); name one, or unset it"
        ) from error
    # .rayignore leaves them out anyway.
    ray_private.spend_warnings_of_excludes()
    try:
        with _sigterm_kept():
            context = ray.init(address=address, runtime_env=runtime_env or None, logging_level=logging.WARNING)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise InputError(
            f"RAY_ADDRESS={address}: something answers there but does not let this job in; export "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the cluster's own token, or "
            f"RAY_AUTH_MODE=disabled where it has none ({in_one_line(error)[:200]})"
        ) from error
    _point_to(context.dashboard_url)
    code = f"code from {ROOT}" if working_dir is None else "code from the job's working directory"
    dashboard = f"dashboard http://{context.dashboard_url}" if context.dashboard_url else "no dashboard"
    say(f"Ray: joined {address}, {_totals()}, {code}, {dashboard}")


def _point_to(dashboard: str | None) -> None:
    """Have what asks a dashboard, in the actors of Ray Train too, ask that of the cluster that it runs on.

    Without this it asks whichever Ray it finds on its machine, or one that the user's shell names for other jobs. Ray
    Train's cleaner then takes the controller of this cluster for dead, and removes the workers' placement group.
    """
    if dashboard:
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{dashboard}"
    else:
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)


@cache
def _temp_dir() -> Path:
    """This process's own Ray folder, removed at exit so that a later Ray cannot find it. Those of killed jobs go now.

    Below /tmp where there is one: Ray puts Unix sockets in it, whose path must stay under 107 bytes.
    """
    parent = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.path.isdir("/tmp") else None)
    folder = make_folder("ray", parent)

    def remove() -> None:
        # Ray's own exit hook runs after this one; its processes must be gone before their folder is.
        ray.shutdown()
        _remove(folder)

    atexit.register(remove)
    return folder


def _remove(folder: Path) -> None:
    # The last of Ray's processes may still write a log line into it.
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _quieten_ray_data() -> None:
    """Ray Data's bars and its lines about plans and dataset ids: every job shows its own progress, in images.

    Warnings stay, and all of it still goes to the log file of the session.
    """
    from ray.data import DataContext
    from ray.util.debug import log_once

    ray_private.hand_code_over_by_value()
    DataContext.get_current().enable_progress_bars = False
    log_once("ray_data_progress_manager_disabled")  # spends the warning that they are off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)


def _totals() -> str:
    total = ray.cluster_resources()
    return f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"


def _own_totals() -> str:
    """What this machine has."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    return f"{counted(ray_private.cpus(), 'CPU core')}, {counted(num_gpus, 'GPU')}"


def max_gpus() -> int:
    """GPUs that the cluster has, or that its autoscaler can start."""
    return int(max(ray.cluster_resources().get("GPU", 0), ray_private.largest_resources().get("GPU", 0)))
