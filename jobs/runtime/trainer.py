"""A recipe on Ray Train: the run folder, workers, restarts, progress, and the finished model.

``STORAGE/runs/{recipe}/{name}/`` holds recipe.json, Ray Train's checkpoints and snapshot (the only commit point for
resume), metrics.jsonl, tensorboard/, samples/ where a model makes images; a finished run adds model/, with copies of
the frozen parts that it needs, and, last, _SUCCESS. Beside it, ``.{name}/lease/`` says which driver trains it: a second
one is refused.
"""

import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.runtime import ray_private
from jobs.runtime.cluster import connect, max_gpus, show_dashboard
from jobs.runtime.commandline import one_line, say, saying_that_it_stops, still_ending
from jobs.runtime.job import Job, R
from jobs.runtime.lease import Lease
from jobs.runtime.progress import progress
from jobs.runtime.run_folder import open_run, remove_unfinished_uploads
from jobs.runtime.run_monitor import Restarts, RunMonitor, RunState
from jobs.runtime.train_worker import Doing, Mistake, Setup, WorkerSummary, train_on_worker
from jobs.runtime.watchdog import Watchdog
from mmcore.errors import InputError

# Crashes are counted by the run's monitor; this ends workers that fail before they can tell it.
_MAX_RESTARTS = 100
# The empty file by which Ray Train's workers see that they share the storage; it leaves the file there.
_MARKER = ".validate_storage_marker"
_POLL_S = 0.5
# For what the monitor knows at the end, which may have come after the follower's last look.
_LAST_LOOK_S = 10.0
_NODES_S = 2.0
# What a detached actor of Ray Train warns of, also when Ctrl-C has ended the training.
_CONTROLLER_IS_DEAD = "Detected that the Ray Train controller actor"
F = TypeVar("F")


class RunSummary(WorkerSummary, total=False):
    """What ``_SUCCESS`` says of a finished run; a dry run has nothing to say."""

    wall_seconds: float
    num_workers: int


def run_training(
    job: Job[R],
    setup: Callable[[Job[R], F, Doing], Setup],
    facts: F,
    datasets: dict[str, Any] | None = None,
) -> RunSummary:
    """Train `job` to its end, going on from what is committed. Raises InputError where the run cannot go on.

    `setup(job, facts, doing)` runs on every worker and makes the model and its rows, telling `doing` what takes
    time; `datasets` are Ray Datasets that a streamed run splits over its workers. Returns the run's summary, which
    ``_SUCCESS`` holds too. Raises InputError too while another driver trains the same run.
    """
    connect()
    # That of a smoke test is over before anybody looks.
    if job.variant != "smoke":
        show_dashboard()
    ray_private.hand_on_to_train(["RAY_API_SERVER_ADDRESS"])
    # Beside the driver, which no reclaimed machine takes along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = RunMonitor.options(  # type: ignore[attr-defined]
        max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    ).remote()
    follower = _Follower(job, monitor)
    # Beside the run's folder, which --fresh removes.
    with Lease(job.run.parent / f".{job.run.name}", f"the run {job.run}"):
        # Last, since with --fresh it removes a run: everything that can be refused has been.
        open_run(job, facts)
        remove_unfinished_uploads(job.run)
        return _fit(job, setup, facts, datasets, monitor, follower)


def _fit(
    job: Job[R],
    setup: Callable[[Job[R], F, Doing], Setup],
    facts: F,
    datasets: dict[str, Any] | None,
    monitor: Any,
    follower: "_Follower",
) -> RunSummary:
    filesystem, path = job.run.parent.arrow_whole_files()
    if not job.run.is_s3:
        Path(path).mkdir(parents=True, exist_ok=True)
    use_gpu = max_gpus() > 0 if job.options.use_gpu is None else job.options.use_gpu
    trainer = TorchTrainer(
        train_on_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job, "setup": setup, "facts": facts, "monitor": monitor},
        scaling_config=ScalingConfig(
            num_workers=job.options.num_workers,
            use_gpu=use_gpu,
            # Half a CPU: on two cores, workers of one CPU each would leave none for reading data (a deadlock).
            resources_per_worker={"CPU": 0.5, **({"GPU": 1} if use_gpu else {})},
        ),
        datasets=datasets,
        run_config=RunConfig(
            name=job.run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=_MAX_RESTARTS, max_preemption_failures=-1),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            # Of a lost machine its controller warns and informs on two screens, and the follower says it in a line.
            # Ray Train's own log files ("sys") keep all of it.
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    ray_private.replace_ctrl_c_of_train(trainer, saying_that_it_stops)
    start = time.perf_counter()
    with follower:
        try:
            with _ctrl_c_interrupts():
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            reason = one_line(error) or _last_line(error)
            raise InputError(
                f"{job.run}: training failed: {reason}; the same command goes on from the last checkpoint"
            ) from error
    summary = cast(RunSummary, result.return_value or {})  # type: ignore[attr-defined]
    if "error" in summary:
        raise InputError(cast(Mistake, summary)["error"])
    remove_unfinished_uploads(job.run)
    job.run.delete(_MARKER)
    summary = {**summary, "wall_seconds": round(time.perf_counter() - start, 1), "num_workers": job.options.num_workers}
    job.run.write("_SUCCESS", json.dumps(summary, indent=1).encode())
    # Those of the whole run, where the time is that of this start.
    steps = f"{summary['train_seconds']:.0f} s of steps"
    took = f"{steps} in all" if follower.restarts.num_resumes else f"{summary['wall_seconds']:.0f} s, of them {steps}"
    print(f"finished: {job.run}/model ({took})", flush=True)
    return summary


@contextlib.contextmanager
def _ctrl_c_interrupts() -> Iterator[None]:
    """Ray Train takes Ctrl-C for itself, ends the process with exit code 0, and keeps it when its training is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        before = still_ending
        # Without Ctrl-C the same line is the only trace of a controller that crashed.
        ray_private.leave_out_lines(_CONTROLLER_IS_DEAD)
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _last_line(error: BaseException) -> str:
    """The line of a nested traceback that says what happened: the last that names an exception, else the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (named or lines or [type(error).__name__])[-1]


class _Follower:
    """Shows a run's progress on the driver and watches for stalls, while `fit` blocks."""

    def __init__(self, job: Job[Any], monitor: Any) -> None:
        self.job, self.monitor = job, monitor
        self.stop = threading.Event()
        self.watchdog = Watchdog(f"train {job.recipe_name}/{job.options.name}", job.options.stall_timeout)
        self.thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self.restarts, self.nodes_at = Restarts(), 0.0
        self.nodes: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self.watchdog.__enter__()
        self.thread.start()

    def __exit__(self, *details: Any) -> None:
        self.stop.set()
        self.thread.join(timeout=5)
        with contextlib.suppress(ray.exceptions.RayError):  # the monitor is gone with its machine
            self._say_restarts(ray.get(self.monitor.state.remote(), timeout=_LAST_LOOK_S))
        self.watchdog.__exit__(*details)

    def _say_restarts(self, state: RunState) -> None:
        for line in self.restarts.lines(state, self.nodes):
            say(f"train {self.job.recipe_name}: {line}")

    def _follow(self) -> None:
        seen = None
        with progress(f"train {self.job.recipe_name}", "steps") as report:
            report(0, 0, "starting the workers")
            while not self.stop.wait(_POLL_S):
                try:
                    state: RunState = ray.get(self.monitor.state.remote(), timeout=10)
                    if time.monotonic() >= self.nodes_at:
                        self.nodes, self.nodes_at = ray.nodes(), time.monotonic() + _NODES_S
                except ray.exceptions.RayError:
                    continue  # the monitor comes back or the run ends; the watchdog speaks meanwhile
                self._say_restarts(state)
                latest = state.progress
                if latest == seen:
                    continue
                seen = latest
                self.watchdog.beat()
                if "step" in latest:
                    doing = latest["doing"]
                    detail = doing or f"epoch {latest['epoch']:.2f}, loss {latest['loss']:.4f}"
                    report(latest["step"], latest["total"], detail, beside=bool(doing))
                elif latest.get("doing"):
                    report(0, 0, latest["doing"])
