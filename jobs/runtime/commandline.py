"""The edge between a job and the shell: exit codes and one-line errors."""

import atexit
import errno
import os
import select
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from jobs.runtime.source import ROOT, submission
from mmcore.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_STDERR = 2
_STOPPING = "stopping: Ray stops and its files are removed, a few seconds"

Handler = Callable[[int, FrameType | None], object]
"""What Python calls at a signal."""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it was raised from, through Ray's errors of tasks, actors and trainings too."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "cause", None) or getattr(current, "controller_failure", None)
        current = inner or current.__cause__


def one_line(error: BaseException) -> str | None:
    """What to tell the user where they, their disk or their storage are the cause; None for a fault of ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    for cause in _causes(error):
        if isinstance(cause, InputError):
            return str(cause)
        # Of pyarrow's own requests too, by which Ray Data and Ray Train read and write.
        of_pyarrow = isinstance(cause, OSError) and cause.errno is None and "AWS Error" in str(cause)
        if of_pyarrow or isinstance(cause, BotoCoreError | ClientError):
            return f"S3 refused or did not answer: {cause}; check the URI, the AWS_* variables and the network"
        if isinstance(cause, OSError) and cause.errno is not None:
            is_full = cause.errno in _FULL
            # Of two files the second is the one that is written.
            place = (is_full and cause.filename2) or cause.filename or (is_full and "a disk of this job or of Ray's")
            if place:
                mend = "make room there and give the same command again" if is_full else "check the path"
                return f"{place}: {os.strerror(cause.errno)}; {mend}"
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether it was raised since a disk or a quota is full, which trying again does not mend."""
    return any(isinstance(cause, OSError) and cause.errno in _FULL for cause in _causes(error))


def say(line: str) -> None:
    """Print a line to stderr: a job's stdout may be its result."""
    print(line, file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """``1 image``, ``1,000 images``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def in_one_line(error: BaseException) -> str:
    """The text of `error` without its line breaks."""
    return " ".join(str(error).split())


def _nobody_reads_stdout() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


# Jobs that commit parts of their work, beside the trainings.
_GO_ON = ("caption.py", "capfilt.py", "generate.py", "demo.py")


def still_ending(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does from the second one on: the job lets go of its Ray, its folder and its lease meanwhile."""
    _write("still ending: Ray stops and its files are removed, a few seconds more")


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, still_ending)
    _write(_STOPPING)
    raise KeyboardInterrupt


def saying_that_it_stops(handler: Handler) -> Handler:
    """`handler` of Ctrl-C, with a line before it: at the first Ctrl-C that the job stops, later that it still does."""
    is_first = True

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            _write(_STOPPING)
        else:
            still_ending(number, frame)
        handler(number, frame)

    return stop


def _write(line: str) -> None:
    """Print `line` from a handler of a signal: not by print(), which the signal may have interrupted."""
    # On a terminal the bar, or ^C, is on this line.
    start = "\n" if os.isatty(_STDERR) else ""
    os.write(_STDERR, f"{start}{line}\n".encode())


def _how_to_go_on(argv: Sequence[str]) -> str:
    """What is said after `interrupted`: the command that goes on with what `argv` began."""
    program, *flags = argv
    name = os.path.basename(program)
    if not name.startswith("train_") and name not in _GO_ON:
        return ""
    if "--fresh" in flags:
        # Whether the earlier run was removed already is not known here.
        return "; give the same command again: without --fresh it goes on, with it everything begins anew"
    address = os.environ.get("RAY_ADDRESS")
    joined = [f"RAY_ADDRESS={shlex.quote(address)}"] if address else []
    again = " ".join([*joined, shlex.join([_python(), program, *flags])])
    return f"; to go on from what was saved, if anything was: {again}"


def _python() -> str:
    """The Python that runs this, for a shell: `python` is another one where the environment is not active."""
    return "python" if shutil.which("python") == sys.executable else _near(sys.executable)


def _near(path: str) -> str:
    """`path` from the current folder, where it lies below it."""
    near = os.path.relpath(path)
    return path if near.startswith(os.pardir) else near


def say_next(words: Sequence[str]) -> None:
    """Print the command that usually follows, for a shell: a program of `jobs/` and its flags. Without any, nothing.

    After a submitted job it is submitted in the same way.
    """
    if words:
        program, *flags = words
        runtime_env, file = submission(), _near(str(ROOT / "jobs" / program))
        submit = [] if runtime_env is None else ["ray", "job", "submit", "--"]
        if runtime_env and runtime_env.get("working_dir"):
            # Ray's copy of the code is no place to begin in.
            submit, file = ["ray", "job", "submit", "--working-dir", ".", "--"], f"jobs/{program}"
        print(f"next: {shlex.join([*submit, _python(), file, *flags])}", flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a job's `main`; bad input and a failing storage become one line on stderr and exit code 1.

    The first Ctrl-C ends the job with 130, later ones do not hinder it. SIGTERM does the same, with 143.
    None hinders what a finished job still removes.
    Where the reader of stdout is gone (`| head`) it ends silently with 141, as programs do that SIGPIPE ends.
    """
    # A pipe or a log file must show progress as it happens, not when a buffer fills.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    ended_by = signal.SIGINT

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal ended_by
        ended_by = signal.SIGTERM
        # Ray Train has a handler of its own for Ctrl-C, which ends a training in order.
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except KeyboardInterrupt:
        print(f"interrupted{_how_to_go_on(sys.argv)}", file=sys.stderr)
        raise SystemExit(128 + ended_by) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            # What is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        line = one_line(error)
        if line is None:
            raise
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        # The last that is registered is called first: before Ray stops, and before its files are removed.
        atexit.register(signal.signal, signal.SIGINT, still_ending)
