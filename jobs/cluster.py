"""Everything between a job and a Ray cluster: which one it joins, and what it says when nothing moves."""

import atexit
import contextlib
import json
import logging
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.autoscaler_pb2 import NodeStatus  # type: ignore[attr-defined]
from ray.util.placement_group import placement_group_table

from mmcore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds `jobs/` and `mmcore/`: the code that this driver runs."""

MIN_LOCAL_CPUS = 4
"""Ray's CPUs are a number for its scheduler. With 2 of them two Train workers, or a map actor beside the
filter of a resumed sweep, wait for ever for a third; 4 is the least with which every job runs."""

HEALTH_CHECK_INTERVAL_S = 0.5
"""How often Ray Train's controller polls its workers. A report is seen at the next poll: Ray's 2 s make each
report of a short epoch cost 2 s."""

FIRST_REPORT_S = 45.0
"""A stall is named after this time without progress; with `QUERY_TIMEOUT_S` on top it stays below 60 s."""

REPORT_INTERVAL_S = 60.0
QUERY_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0
REMOVE_TIMEOUT_S = 3.0

_T = TypeVar("_T")


# --- Joining -----------------------------------------------------------------------------------------------


def connect() -> None:
    """Join the cluster this job was sent to, or start Ray on this machine; a second call does nothing.

    Inside `ray job submit`, and wherever RAY_ADDRESS is set, that cluster is joined. A job that came without a
    working directory ships its repository root, so that workers on other nodes run the driver's code and not
    what happens to be installed there. Prints one line to stderr. Sets, where they are unset,
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S and for a local Ray RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH and
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER.

    Raises:
        InputError: the address is of the wrong kind, nothing answers there, or the token is refused.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(HEALTH_CHECK_INTERVAL_S))
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        # Nobody takes this machine away, and one process less is to be started.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        _start_local()
    else:
        _join(address)
    _quieten_ray_data()


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
        if not _token_exists():
            token_file = folder / "auth_token"
            token_file.touch(mode=0o600)
            token_file.write_text(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    _reload_auth_mode()
    if os.environ["RAY_AUTH_MODE"] == "token":
        token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
        token_note = "" if "RAY_AUTH_TOKEN" in os.environ else f" (it asks for the token in {token_file})"
    # Ray starts a worker that has a runtime environment (Ray Train's all do) through a shell, and does not quote
    # this path: in a clone whose path has a space no worker would ever start.
    python = shlex.quote(sys.executable)
    try:
        context = ray.init(
            # Not None, which would join a Ray that somebody else started on this machine.
            address="local",
            num_cpus=max(MIN_LOCAL_CPUS, cpus()),
            # Without the dashboard Ray Train's controller logs an error every second.
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            runtime_env=None if python == sys.executable else {"py_executable": python},
            _temp_dir=str(folder),
        )
    except Exception as error:  # where it takes too long, Ray raises this very class
        said = " ".join(str(error).split())
        raise InputError(f"Ray does not start on this machine, its files in {folder} (RAY_TMPDIR): {said}") from error
    _say(f"Ray: started on this machine, {_totals()}, dashboard http://{context.dashboard_url}{token_note}")


def _join(address: str) -> None:
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in address:
        raise InputError(
            f"RAY_ADDRESS={address}: a job needs a cluster's HOST:PORT (6379 by default) or `auto`; "
            "to send a job through an http:// address use `ray job submit`"
        )
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    working_dir = (submitted.get("runtime_env") or {}).get("working_dir")
    runtime_env: dict[str, Any] = {}
    if working_dir is None:
        if not (ROOT / "pyproject.toml").is_file():
            raise InputError(
                f"{ROOT} is not the repository: this copy was installed without its sources, which other nodes "
                "need; install with `pip install -e .` or submit with `ray job submit --working-dir .`"
            )
        runtime_env["working_dir"] = str(ROOT)
    # With an address Ray does not look for a token by itself; a cluster without tokens ignores one.
    if "RAY_AUTH_MODE" not in os.environ and _token_exists():
        os.environ["RAY_AUTH_MODE"] = "token"
    _reload_auth_mode()
    try:
        gcs_address = canonicalize_bootstrap_address(address)
        assert gcs_address is not None, "only None and `local` stand for a new cluster"
        gcs_host, _, gcs_port = gcs_address.rpartition(":")
        # Ray itself goes on trying a dead address for several minutes.
        socket.create_connection((gcs_host.strip("[]"), int(gcs_port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({_one_line(error)})") from error
    # Ray announces there, at each start, that it leaves out .git and .venv, which .rayignore does anyway.
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)
    try:
        context = ray.init(address=address, runtime_env=runtime_env or None, logging_level=logging.WARNING)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise InputError(
            f"RAY_ADDRESS={address}: something answers there but does not let this job in; export "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the cluster's own token, or "
            f"RAY_AUTH_MODE=disabled where it has none ({_one_line(error)[:200]})"
        ) from error
    code = f"code from {ROOT}" if working_dir is None else "code from the job's working directory"
    dashboard = f"dashboard http://{context.dashboard_url}" if context.dashboard_url else "no dashboard"
    _say(f"Ray: joined {address}, {_totals()}, {code}, {dashboard}")


@cache
def _temp_dir() -> Path:
    """This process's own Ray folder, removed at exit so that a later Ray cannot find it.

    Below /tmp where there is one: Ray puts Unix sockets in it, whose path must stay under 107 bytes.
    """
    parent = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.path.isdir("/tmp") else None)
    folder = Path(tempfile.mkdtemp(prefix="mmcore-ray-", dir=parent))

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


def _token_exists() -> bool:
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    return AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)


def _reload_auth_mode() -> None:
    """Ray reads RAY_AUTH_MODE once, when it is imported; `ray.init` itself reloads it by this call."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


def _quieten_ray_data() -> None:
    """Ray Data's bars and its lines about plans and dataset ids: every job shows its own progress, in images.

    Warnings stay, and all of it still goes to the log file of the session.
    """
    from ray.data import DataContext
    from ray.util.debug import log_once

    DataContext.get_current().enable_progress_bars = False
    log_once("ray_data_progress_manager_disabled")  # spends the warning that they are off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)


def _totals() -> str:
    total = ray.cluster_resources()
    return f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"


def _say(line: str) -> None:
    # stderr: a job's stdout may be its result.
    print(line, file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# --- Waiting -----------------------------------------------------------------------------------------------


def cpus() -> int:
    """CPUs that this process may use: those of its container, where os.cpu_count() tells the machine's."""
    from ray._private.utils import get_num_cpus

    return max(1, int(get_num_cpus()))


def max_gpus() -> int:
    """GPUs that the cluster has, or that its autoscaler can start."""
    could = ray._private.state.state.get_max_resources_from_cluster_config() or {}  # type: ignore[attr-defined]
    return int(max(ray.cluster_resources().get("GPU", 0), could.get("GPU", 0)))


class Watchdog:
    """Says what a job waits for when nothing moves, and ends it after `stall_timeout_s` if that is given.

    ::

        with Watchdog("training", settings.stall_timeout_s) as watchdog:
            for batch in batches:
                watchdog.beat()

    Without a beat for `report_after_s` a thread prints one line to stderr that names the pending placement
    groups, actors and tasks, what they ask for and what the cluster has; again every minute until the next
    beat. After `stall_timeout_s` without a beat it prints that line a last time and ends the process with
    exit code 1, even where the main thread is blocked inside Ray. None (the default) waits for ever: an
    autoscaler may take minutes.
    """

    def __init__(self, what: str, stall_timeout_s: float | None = None, report_after_s: float = FIRST_REPORT_S) -> None:
        if stall_timeout_s is not None and stall_timeout_s <= 0:
            raise InputError(f"--stall-timeout {stall_timeout_s:g}: must be more than 0 seconds")
        self.what = what
        self.stall_timeout_s = stall_timeout_s
        self.report_after_s = report_after_s
        self.usual_s = 0.0
        """The longest time between beats that was no stall: three times it and less is reported in calmer words."""
        self._last_beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """There was progress. Cheap enough to be called for every batch, from any thread."""
        self._last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        watched_beat, next_report_s = self._last_beat, self.report_after_s
        while True:
            if watched_beat != self._last_beat:
                watched_beat, next_report_s = self._last_beat, self.report_after_s
            next_event_s = min(next_report_s, self.stall_timeout_s or next_report_s)
            wait_s = watched_beat + next_event_s - time.monotonic()
            # No longer than `report_after_s`: a beat after a report is seen in time for the next stall.
            if self._stop.wait(max(0.0, min(wait_s, self.report_after_s))):
                return
            if watched_beat != self._last_beat or wait_s > self.report_after_s:
                continue
            waiting = _bounded(_describe_or_error, QUERY_TIMEOUT_S, "the cluster's head does not answer")
            # The answer took time: the job may have gone on or finished meanwhile.
            if self._stop.is_set() or watched_beat != self._last_beat:
                continue
            idle_s = time.monotonic() - watched_beat
            is_usual = idle_s < 3 * self.usual_s
            before = f" (up to {self.usual_s:.0f} s went well before)" if is_usual else ""
            line = f"{self.what}: no progress for {idle_s:.0f} s{before}: {waiting}"
            if self.stall_timeout_s is not None and idle_s >= self.stall_timeout_s:
                end_process(f"error: {line} (--stall-timeout {self.stall_timeout_s:g})")
            _say(f"{'waiting' if is_usual else 'stalled'}: {line}")
            next_report_s = idle_s + REPORT_INTERVAL_S


def _describe_or_error() -> str:
    try:
        return describe_waiting()
    except Exception as error:  # whatever it is, the report and the time-out must come
        return f"the cluster's state cannot be read ({type(error).__name__}: {_one_line(error)})"


def describe_waiting() -> str:
    """What the cluster cannot place now, in one line: demands, then totals, then the resources that lack.

    Reads the head's own scheduling state (what an autoscaler reads), which needs no dashboard.
    """
    if not ray.is_initialized():
        return "not connected to a cluster"
    gcs = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    # Ray Train takes its placement group back and asks again once a minute: look twice before saying nothing.
    for attempt in range(3):
        if attempt:
            time.sleep(1)
        state = get_cluster_resource_state(gcs)
        demands = _pending_demands(state)
        if demands:
            break
    nodes = [
        (_real_resources(node.total_resources), _real_resources(node.available_resources))
        for node in state.node_states
        # A node that went is listed for a while; its resources are gone.
        if node.status != NodeStatus.DEAD
    ]
    totals, frees = [total for total, _ in nodes], [free for _, free in nodes]
    asked = {name for bundles, _ in demands for bundle in bundles for name in bundle}
    total, free = _summed(totals), _summed(frees)
    has = ", ".join(
        f"{name} {_quantity(name, total[name])} ({_quantity(name, free[name])} free)"
        for name in sorted({"CPU", "GPU"} | asked)
    )
    if not demands:
        return f"nothing waits for resources, so a task is slow or blocked; the cluster has {has}"
    never = sorted({name for bundles, _ in demands for name in _lacking(bundles, totals)})
    busy = sorted({name for bundles, _ in demands for name in _lacking(bundles, frees)} - set(never))
    line = f"waiting for {'; '.join(text for _, text in demands)}: the cluster has {has}"
    if never:
        line += f"; missing: {', '.join(never)}"
    if busy:
        line += f"; all in use: {', '.join(busy)}"
    return line


def _pending_demands(state: Any) -> list[tuple[list[Counter[str]], str]]:
    """(bundles that must be placed at once, their description) for all that waits in the scheduling state."""
    demands: list[tuple[list[Counter[str]], str]] = []
    names = {group_id: group["name"] for group_id, group in placement_group_table().items() if group["name"]}
    for gang in state.pending_gang_resource_requests:
        bundles = [_real_resources(request.resources_bundle) for request in gang.requests]
        name = names.get(gang.details.partition(":")[0])
        kinds = Counter(_bundle_text(bundle) for bundle in bundles)
        text = " + ".join(_times(kind, count) for kind, count in kinds.items())
        demands.append((bundles, f"a placement group{f' {name!r}' if name else ''} of {text}"))
    actors = Counter(
        actor["ActorClassName"].rpartition(".")[2]
        for actor in ray._private.state.actors().values()
        if actor["State"] in ("PENDING_CREATION", "RESTARTING")
    )
    for pending in state.pending_resource_requests:
        asked = pending.request.resources_bundle
        bundle = _real_resources(asked)
        # Inside a placement group the demand is for its `CPU_group_ab12`: what the cluster has is no help.
        inside = Counter({name.partition("_group_")[0]: asked[name] for name in asked if "_group_" in name})
        del inside["bundle"]
        text = _times(_bundle_text(bundle or inside), pending.count)
        demands.append(([bundle], f"{text} (tasks or actors{' inside a full placement group' * bool(inside)})"))
    if actors and demands:
        listed = ", ".join(_times(name, count) for name, count in sorted(actors.items()))
        demands[-1] = (demands[-1][0], f"{demands[-1][1]}; pending actors: {listed}")
    return demands


def _real_resources(resources: Mapping[str, float]) -> Counter[str]:
    """Without what Ray derives from them: `node:10.0.0.1`, and `CPU_group_ab12` of a placement group, which
    counts CPUs a second time."""
    return Counter(
        {name: amount for name, amount in resources.items() if not name.startswith("node:") and "_group_" not in name}  # type: ignore[arg-type]
    )


def _summed(bundles: list[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return total


def _lacking(bundles: list[Counter[str]], nodes: list[Counter[str]]) -> set[str]:
    """The resources of which all nodes together, or the largest node for one bundle, have too little."""
    asked, had = _summed(bundles), _summed(nodes)
    return {
        name
        for name in asked
        if asked[name] > had[name]
        or max(bundle[name] for bundle in bundles) > max((node[name] for node in nodes), default=0)
    }


def _bundle_text(bundle: Counter[str]) -> str:
    return "{" + ", ".join(f"{name}: {_quantity(name, amount)}" for name, amount in sorted(bundle.items())) + "}"


def _quantity(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if name in ("memory", "object_store_memory") else f"{amount:g}"


def _times(text: str, count: int) -> str:
    return text if count == 1 else f"{text} x {count}"


def _bounded(call: Callable[[], _T], timeout_s: float, instead: _T) -> _T:
    """`call()` in a thread of its own, or `instead` when that has not returned in time."""
    result: list[_T] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return result[0] if result else instead


def end_process(line: str) -> None:
    """Print the line and exit with code 1 from any thread, whatever the main thread is blocked in.

    Without `ray.shutdown()`, which makes a `ray.get` in the main thread raise SystemExit(0): a stalled job
    would have succeeded. Ray frees what the job holds when its driver is gone, and a local Ray's reaper ends
    its processes; only the folder with their logs stays.
    """
    _say(line)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep the job alive
            stream.flush()
    os._exit(1)
