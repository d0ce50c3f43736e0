"""Start the service, and end it without losing a request.

    python -m serve.control start captioner=NAME:URI generator=NAME:URI [host=127.0.0.1 port=8000 ...]
    python -m serve.control stop [port=8000]

`start` stays in the foreground and takes the arguments of `serve run serve.app:build`, and host and port. It starts Ray
on this machine. With RAY_ADDRESS it joins that cluster, and starts and ends its one application there.

Ctrl-C ends the service, and so does SIGTERM, which `stop` sends. New requests are then answered 503. Those in flight
are finished, for SERVE_DRAIN_TIMEOUT_S at most. `storage=` keeps unfinished jobs for the next start; without it they
are lost. `serve run` itself may drop requests when it ends. A `start` that was killed leaves its application on the
cluster of RAY_ADDRESS; `stop` with that variable ends it in the same way.
"""

import contextlib
import difflib
import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from mmcore.errors import InputError
from mmcore.temporary import make_folder
from serve import draining, loading, proxy
from serve.limits import Limits
from serve.parsing import TYPO

APP = "mmcore"
# The exit code of a program that Ctrl-C ended.
_INTERRUPTED = 130
_HOST, _PORT = "127.0.0.1", 8000
# Ray's CPUs are a number for its scheduler: enough for several models, and for a new version beside the old one.
_MIN_LOCAL_CPUS = 8
_POLL_S = 0.1
# The wait for the processes to say how many requests they have. A process that died is replaced and asked again.
_DRAIN_ANSWER_S = 5.0
# The line of a traceback that says what was raised.
_RAISED = re.compile(r"(?m)^[\w.]+(?:Error|Exception|Exit|Interrupt)\b.*$")
# Ray Serve kills its controller at the end. Ray reports the calls that were on their way there as failed and repeated.
_CALL_OF_CONTROLLER = re.compile(
    r"Task ServeController\.(listen_for_change|graceful_shutdown) failed\. There are infinite retries remaining"
)
# The wait for a service that has locked its port to write down its process.
_NUMBER_S = 10.0
# The wait for the application to be gone after the drain. If requests are left, its processes wait for them as long
# again (graceful_shutdown_timeout_s), which is longer than promised.
_DELETE_S = 10.0
# Time after the drain for the application, Ray Serve (30 s at most) and the processes to end.
_SHUTDOWN_S = 60.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(words: list[str]) -> dict[str, str]:
    """``key=value`` words. Raises InputError."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{word!r}: arguments are written key=value")
        if key in found:
            raise InputError(f"{key} is given twice")
        found[key] = value
    return found


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise InputError(f"port={text}: give a number from 1 to 65535")
    return int(text)


def lock_file(port: int) -> Path:
    """The file that the service at `port` locks as long as it lives. It holds the number of its process."""
    return Path(tempfile.gettempdir()) / f"mmcore-serve-{os.getuid()}-{port}.pid"


def _open_lock(port: int, flags: int = 0) -> int | None:
    """The opened lock file; None if there is none. Raises InputError for a file that we cannot write."""
    path = lock_file(port)
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        # Everybody may write to the folder of temporary files, so this may be a link, a folder or another user's file.
        message = f"port={port}: cannot open {path} ({error.strerror}); remove it, set TMPDIR, or choose another port"
        raise InputError(message) from None


@contextlib.contextmanager
def _locked(host: str, port: int) -> Iterator[None]:
    descriptor = _lock(port)
    try:
        # First of all: the number of a service that was killed may belong to another program by now.
        os.truncate(descriptor, 0)
        _check_free(host, port)
        os.write(descriptor, str(os.getpid()).encode())
        # Ray's processes do not inherit the file, as Python's files are not inherited. They would hold the lock.
        yield
    finally:
        # While it is locked. Who has opened it before finds that it is gone.
        lock_file(port).unlink(missing_ok=True)
        os.close(descriptor)


def _lock(port: int) -> int:
    """The locked file. Raises InputError where a service holds the lock."""
    while True:
        descriptor = _open_lock(port, os.O_CREAT)
        assert descriptor is not None
        if not _try_lock(descriptor):
            os.close(descriptor)
            raise InputError(f"port={port}: a service runs there; `python -m serve.control stop port={port}`")
        # A service that ended since the file was opened has removed it, and another may have made a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(lock_file(port))):
                return descriptor
        os.close(descriptor)


def _check_free(host: str, port: int) -> None:
    """Raises InputError if another program listens at the port. Ray would restart its proxy for ever."""
    if _joins_cluster():
        # The proxies run on the cluster's machines.
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"port={port}: cannot listen there ({error.strerror}); choose another port") from None


def _joins_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or a Ray of our own on this machine, with a token on every port."""
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "namespace": "serve"}
    if _joins_cluster():
        try:
            ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
        except ConnectionError as error:
            raise InputError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray there ({_one_line(error)})") from None
        yield
        ray.shutdown()
        return
    # Its path must leave room for the names of sockets (107 bytes).
    parent = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.path.isdir("/tmp") else None)
    try:
        folder = make_folder("serve", parent)
    except OSError as error:
        raise InputError(f"RAY_TMPDIR: Ray's own files cannot lie in {parent} ({error.strerror})") from None
    try:
        if "RAY_AUTH_MODE" not in os.environ:
            # Ray listens on every interface. By itself it would write a lasting token into the home folder.
            token = folder / "auth_token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        from serve.ray_private import reload_auth_mode

        # Ray was imported before, to build the application: errors of that are told before anything starts.
        reload_auth_mode()
        try:
            ray.init(
                address="local",
                num_cpus=max(_MIN_LOCAL_CPUS, os.cpu_count() or 1),
                # Without it a start takes half as long, with one port less. The service has /metrics.
                include_dashboard=False,
                _temp_dir=str(folder),
                **quiet,
            )
        except Exception as error:  # where it takes too long, Ray raises this very class
            raise InputError(f"Ray does not start, its files in {folder} (RAY_TMPDIR): {_one_line(error)}") from None
        yield
    finally:
        ray.shutdown()
        # The last of Ray's processes may still write a log line into it.
        deadline = time.monotonic() + 3.0
        while folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)


def run(make_app: Callable[[], Any], *, host: str = _HOST, port: int = _PORT) -> int:
    """Serve until SIGTERM or SIGINT, then drain. Returns the exit code: 1 if requests or jobs were lost.

    A second SIGINT ends the wait for them; the exit code is then 130.

    `make_app` gives the application of Ray Serve; it is called before anything is started. Raises InputError for a
    taken port, for a cluster that serves this application already, and for models that do not start.
    """
    # A Ray that is started here hands it on to its proxies. A cluster must have it in its own environment, and the
    # process that answers requests checks that.
    os.environ.setdefault(proxy.VARIABLE, proxy.VALUE)
    application = make_app()
    limits = Limits.from_environment(os.environ)
    ready, ending = threading.Event(), threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        again = ending.is_set() and number == signal.SIGINT
        ending.set()
        if again or not ready.is_set():
            raise KeyboardInterrupt

    with _locked(host, port), _ray(), contextlib.ExitStack() as until_ready:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        from serve.app import QUIET
        from serve.ray_private import leave_out_errors, worker_lines_left_out

        # Of this process: what Ray Serve says of its own start.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # After Ray has set its own handlers, which would end the process at once.
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        joined, deployed = _joins_cluster(), False
        if not joined:
            # On a cluster, which may be full or have our port taken, these lines may say why nothing comes.
            until_ready.enter_context(worker_lines_left_out(loading.only_slow))
        try:
            serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
            if joined and APP in serve.status().applications:
                address = os.environ["RAY_ADDRESS"]
                raise InputError(
                    f"RAY_ADDRESS={address}: that cluster serves an application {APP!r} already; end it where it was "
                    f"started, or, if that process is gone, by `RAY_ADDRESS={address} python -m serve.control stop`"
                )
            deployed = True
            _say("serve: starting; the models load, which takes a minute or two")
            try:
                with loading.told(APP, _say):
                    handle = serve.run(application, name=APP, route_prefix="/", blocking=False)
            except (RuntimeError, RayServeException) as error:
                raise InputError(f"the models did not start: {_why_not(error)}") from None
            ready.set()
            until_ready.close()
            place = f"{APP!r} on that cluster, which has its own host, port and limit of bodies,"
            place = place if joined else f"http://{host}:{port}/"
            _say(f"serve: {place} is ready; end it with `python -m serve.control stop port={port}`")
            ending.wait()
            # Only now: before the end the same line is the trace of a controller that crashed.
            leave_out_errors(_CALL_OF_CONTROLLER)
            _say(
                f"serve: ending; no new requests, and {limits.drain_timeout_s:g} s at most for those in flight; "
                "Ctrl-C again ends at once"
            )
            try:
                left = drain(handle, limits.drain_timeout_s)
                # Ray Serve would wait for what is still at work, which ends with Ray anyway.
                if not joined and _delete():
                    serve.shutdown()
            except KeyboardInterrupt:
                _say("serve: ending at once; nothing is waited for any longer")
                return _INTERRUPTED
        finally:
            # A Ray of our own ends with this process. A joined cluster goes on, with what else it serves.
            if joined and deployed:
                _delete()
            for number, handler in before.items():
                signal.signal(number, handler)
    return _verdict(left)


def _verdict(left: draining.Unfinished | None) -> int:
    """Print what became of the requests and jobs; returns the exit code."""
    line, code = draining.verdict(left)
    _say(line)
    return code


def _delete() -> bool:
    """Have Ray Serve end the application and wait a little; returns whether it is gone.

    It raises nothing, as the verdict on the requests is still to be printed. Ray's own wait takes a minute, and ends in
    a traceback.
    """
    from ray import serve

    deadline = time.monotonic() + _DELETE_S
    try:
        serve.delete(APP, _blocking=False)
        while APP in serve.status().applications:
            if time.monotonic() > deadline:
                _say(f"serve: {APP!r} is still at work after {_DELETE_S:g} s; it is not waited for any longer")
                return False
            time.sleep(_POLL_S)
    except Exception as error:
        _say(f"serve: Ray Serve does not say whether {APP!r} has ended ({_one_line(error)})")
        return False
    return True


def _why_not(error: Exception) -> str:
    """The deployments that failed, with their errors. Ray's error has only names, its status whole tracebacks."""
    from ray import serve

    application = serve.status().applications.get(APP)
    reasons = [
        f"{name}: {_RAISED.findall(status.message)[-1]}"
        for name, status in (application.deployments if application else {}).items()
        if _RAISED.search(status.message)
    ]
    return "; ".join(reasons) or _one_line(error)


def drain(handle: Any, timeout_s: float) -> draining.Unfinished | None:
    """Have every process that answers requests take no more, and wait until all are answered.

    Returns what is unfinished then, or when the time is up; None if no process said.
    """
    deadline = time.monotonic() + timeout_s
    left: draining.Unfinished | None = None
    told, waited_for = "", 0
    while time.monotonic() < deadline:
        try:
            parts = handle.broadcast("drain").results(timeout_s=_DRAIN_ANSWER_S)
        except Exception as error:
            # A process died or is being replaced. The others still have requests to finish.
            left, reason = None, _one_line(error)
            if reason != told:
                _say(f"serve: asking again what is in flight, as a process did not answer ({reason})")
            told = reason
        else:
            left = draining.joined(parts) if parts else None
            if left and len(left["waited_for"]) not in (0, waited_for):
                waited_for = len(left["waited_for"])
                _say(f"serve: requests and jobs that are waited for: {waited_for}")
        if left and not left["waited_for"]:
            break
        time.sleep(_POLL_S)
    return left


def start(words: list[str]) -> int:
    arguments = _parse(words)
    host, port = arguments.pop("host", _HOST), _port(arguments.pop("port", str(_PORT)))

    def make_app() -> Any:
        from serve.app import Args, build, check_runs

        try:
            args = Args.model_validate(arguments)
            built = build(args)
            check_runs(args)
            return built
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            name = str(detail["loc"][0])
            if wanted := {"bool_parsing": "true or false", "float_parsing": "a number"}.get(detail["type"]):
                raise InputError(f"{name}={arguments[name]}: give {wanted}") from None
            known = ["host", "port", *Args.model_fields]
            near = difflib.get_close_matches(name[:64], known, n=1, cutoff=TYPO)
            meant = f" did you mean {near[0]}=?" if near else ""
            message = f"{name}={arguments[name]}: no such argument;{meant} the arguments are {', '.join(known)}"
            raise InputError(message) from None

    return run(make_app, host=host, port=port)


def stop(words: list[str]) -> int:
    """Tell the service at a port to end, and wait until it has."""
    arguments = _parse(words)
    port = _port(arguments.pop("port", str(_PORT)))
    if arguments:
        raise InputError(f"{next(iter(arguments))}: stop takes port=NUMBER only")
    # Read first: an error in the environment is told before anything ends.
    drain_timeout_s = Limits.from_environment(os.environ).drain_timeout_s
    timeout_s = drain_timeout_s + _SHUTDOWN_S
    descriptor = _open_lock(port)
    if descriptor is None or _try_lock(descriptor):
        if _joins_cluster():
            return _stop_there(drain_timeout_s)
        raise InputError(f"port={port}: no service of `python -m serve.control start` runs there")
    deadline = time.monotonic() + _NUMBER_S
    while not (number := os.pread(descriptor, 20, 0)) and time.monotonic() < deadline:
        # The service has the lock and is about to write its number.
        time.sleep(_POLL_S)
    if not number:
        raise InputError(f"port={port}: a service begins there and does not say which process it is; try again")
    if not (number.isdigit() and int(number) > 1):
        message = f"port={port}: {lock_file(port)} holds {number!r}, which is no process; remove it once that has ended"
        raise InputError(message)
    process_id = int(number)
    _say(f"serve: asked process {process_id} to end; requests in flight have {drain_timeout_s:g} s at most")
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    # The lock tells, and not the process: by then the number may belong to another one.
    while not _try_lock(descriptor):
        if time.monotonic() > deadline:
            _say(f"serve: process {process_id} has not ended within {timeout_s:g} s")
            return 1
        time.sleep(_POLL_S)
    _say(f"serve: process {process_id} has ended")
    return 0


def _stop_there(drain_timeout_s: float) -> int:
    """End the application on the cluster of RAY_ADDRESS, after the process that started it was killed."""
    with _ray():
        from ray import serve

        if APP not in serve.status().applications:
            raise InputError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no service, neither there nor on this machine")
        left = drain(serve.get_app_handle(APP), drain_timeout_s)
        _delete()
    return _verdict(left)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _help() -> str:
    from serve.app import Args

    # Docstrings of several lines become one line.
    told = {name: " ".join((field.description or "").split()) for name, field in Args.model_fields.items()}
    fields = [f"{f'{name}={Args.model_fields[name].default}':<15} {text}" for name, text in told.items()]
    return "\n    ".join([f"{__doc__}\nThe arguments of `start`, with their defaults:\n", *fields])


def main() -> None:
    command, *words = sys.argv[1:] or [""]
    asks = {"-h", "--help", "help"}.intersection((command, *words))
    if command and not asks and command not in ("start", "stop"):
        _say(f"error: {command!r}: no such command; give start or stop, or --help")
        raise SystemExit(2)
    if asks or not command:
        print(_help())
        raise SystemExit(0 if asks else 2)
    try:
        raise SystemExit(start(words) if command == "start" else stop(words))
    except KeyboardInterrupt:
        _say("serve: ended before it was ready")
        raise SystemExit(_INTERRUPTED) from None
    except InputError as error:
        _say(f"error: {' '.join(str(error).split())}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
