"""A recipe on Ray Train: the run folder, workers, restarts, progress, and the finished model.

``STORAGE/runs/{recipe}/{name}/`` holds recipe.json, Ray Train's checkpoints and snapshot (the only commit point for
resume), metrics.jsonl, tensorboard/, samples/ where a model makes images; a finished run adds model/, with copies of
the frozen parts that it needs, and, last, _SUCCESS. Beside it, ``.{name}/lease/`` says which driver trains it: a second
one is refused.
"""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import ray.train
import tyro
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster import ROOT, Watchdog, connect, max_gpus
from jobs.lease import Lease
from jobs.progress import progress
from jobs.run_monitor import RunMonitor
from jobs.train_worker import Doing, Setup, train_on_worker
from mmcore.errors import InputError
from mmcore.recipe import check_effect, difference, recipe_from_json, recipe_to_json
from mmcore.storage import Storage
from mmcore.training import check_batch

# Crashes are counted by the run's monitor; this ends workers that fail before they can tell it.
_MAX_RESTARTS = 100
_POLL_S = 0.5
_SNAPSHOT = "checkpoint_manager_snapshot.json"
_PLACES = ("encoder", "text_encoder", "tokenizer", "vqvae", "perceptual", "vgg16", "lpips_heads")
# Ray's name of a working directory that it unpacked, before the hash of its files.
_RAY_PACKAGE = "_ray_pkg_"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RunOptions:
    """The flags that every training job has."""

    storage: str = "./out"
    """Where data, features and runs lie: a folder or s3://bucket/prefix."""
    name: str = "default"
    """Name of the run."""
    num_workers: int = 1
    """Training workers."""
    use_gpu: bool | None = None
    """A GPU for each worker; by default where the cluster has GPUs or its autoscaler can start some."""
    fresh: bool = False
    """Start anew even if a run of this name is there."""
    dry_run: bool = False
    """Print the resolved recipe, sizes, steps and what would be read and written, and stop."""
    stream: bool = False
    """Captioners only: feed the workers through Ray Data, not a copy on their disk, where data are larger. A restart
    then goes on at the right step but reads the interrupted epoch from its beginning."""
    stall_timeout: float | None = None
    """Seconds without progress after which the job ends; by default it waits (an autoscaler may take minutes)."""
    num_threads: int | None = None
    """CPU threads of a worker; by default the machine's cores over the workers on it."""


@dataclass(frozen=True)
class Job:
    """A training job's command line, resolved. Raises InputError for options that no run can have."""

    recipe_name: str
    variant: str
    recipe: Any
    options: RunOptions

    def __post_init__(self) -> None:
        if not _RUN_NAME.fullmatch(self.options.name):
            raise InputError(
                f"--name {self.options.name!r}: use letters, digits, '.', '_' and '-', a letter or digit first"
            )
        if self.options.num_threads is not None and self.options.num_threads < 1:
            raise InputError(f"--num-threads {self.options.num_threads}: must be at least 1")

    @property
    def storage(self) -> Storage:
        return Storage(self.options.storage)

    @property
    def run(self) -> Storage:
        return self.storage / "runs" / self.recipe_name / self.options.name


def recipe_name(job_file: str) -> str:
    """The recipe of ``jobs/train_x.py`` is ``x``."""
    return Path(job_file).stem.removeprefix("train_")


def parse_job(
    job_file: str, variants: dict[str, Any], description: str, argv: list[str] | None = None, report_needs: str = ""
) -> Job:
    """Read ``--variant`` first; its fields are then the defaults of the flags, and what ``--help`` shows.

    Raises InputError for a flag that has no effect beside the others.

    `report_needs`: the flags without which `report` does not run.
    """
    argv = sys.argv[1:] if argv is None else argv
    variant, source = "shapes", "no --variant"
    for index, word in enumerate(argv):
        if word == "--variant" and index + 1 < len(argv):
            variant, source = argv[index + 1], "--variant"
        elif word.startswith("--variant="):
            variant, source = word.partition("=")[2], "--variant"
    if variant not in variants:
        raise InputError(f"--variant {variant!r}: choose one of {', '.join(variants)}")
    name = recipe_name(job_file)
    command = f"python jobs/{Path(job_file).name}"
    Variant = Literal[tuple(variants)]  # type: ignore[valid-type]

    def collect(
        variant: Variant,  # type: ignore[valid-type]
        recipe: Annotated[Any, tyro.conf.arg(name="")],
        options: Annotated[RunOptions, tyro.conf.arg(name="")],
    ) -> Job:
        return Job(name, variant, recipe, options)

    collect.__annotations__["recipe"] = Annotated[type(variants[variant]), tyro.conf.arg(name="")]
    collect.__defaults__ = (variant, variants[variant], RunOptions())
    variant_help = "Args:\n    variant: Settings to start from; every other flag overrides one of them."
    collect.__doc__ = f"{description.strip()}\n\n{variant_help}"
    parsed: Job = tyro.cli(collect, args=argv, prog=command, config=(tyro.conf.OmitArgPrefixes,))
    check_effect(parsed.recipe, variants[variant])
    # Absolute: the workers' working directory is not the driver's.
    options = dataclasses.replace(parsed.options, storage=Storage(parsed.options.storage).uri)
    job = dataclasses.replace(parsed, options=options)
    if "/runtime_resources/working_dir_files/" in options.storage:
        print(
            f"warning: {options.storage} lies in Ray's copy of the working directory, which changes with the code and "
            "is removed with the cluster; give --storage an absolute folder or s3://bucket/prefix",
            file=sys.stderr,
            flush=True,
        )
    if source == "no --variant":
        print(
            f"no --variant given: running `shapes`, self-contained on built-in data; "
            f"the report's recipe is `{command} --variant report{report_needs} --storage URI`",
            flush=True,
        )
    return job


def source_commit() -> str:
    """The commit of the code, with ``+changes`` where files differ from it; ``unknown`` outside a checkout.

    Of code that was sent to a cluster, which leaves .git at home, it is the name of Ray's package, a hash of the files.
    """
    if ROOT.name.startswith(_RAY_PACKAGE):
        return ROOT.name
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--exclude=*", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# -- the run folder ------------------------------------------------------------------------------------------------


def open_run(job: Job, facts: dict[str, Any]) -> None:
    """Create the run folder, or check that the unfinished run there is this one.

    `facts`: what beside the recipe decides the result, such as the dataset's fingerprint.
    Raises InputError for a finished run and for an unfinished one of other settings.
    """
    run, again = job.run, "give another --name, or --fresh to start anew"
    if job.options.fresh:
        run.delete_tree(first=["_SUCCESS", _SNAPSHOT, "recipe.json"])
    if run.exists("_SUCCESS"):
        raise InputError(f"{run} is finished; {again}")
    mine = {"recipe": job.recipe_name, "variant": job.variant, "settings": recipe_to_json(job.recipe), **facts}
    data = json.dumps({**mine, "commit": source_commit()}, indent=1, ensure_ascii=False).encode()
    if not run.create("recipe.json", data):
        there = json.loads(run.read("recipe.json"))
        there.pop("commit")
        mine.pop("variant"), there.pop("variant")
        with contextlib.suppress(InputError):  # of fields that are no more; `difference` names them
            # A field that is younger than the run has its default, which is how the run was trained.
            there["settings"] = recipe_to_json(recipe_from_json(type(job.recipe), there["settings"], run.uri))
        differences = difference(_without_places(json.loads(json.dumps(mine))), _without_places(there))
        if differences:
            raise InputError(f"{run} holds an unfinished run of other settings: {'; '.join(differences[:5])}; {again}")
        print(f"going on with the unfinished run {run}", flush=True)


def _without_places(facts: dict[str, Any]) -> dict[str, Any]:
    """Without the folders of pretrained parts, which `facts` know by their fingerprints wherever they lie today."""
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in facts.items()
        if name not in _PLACES
    }


def check_new_run(job: Job) -> None:
    """Refuse a finished run before any other work is done for it."""
    check_batch(job.recipe.train, job.options.num_workers)
    if not job.options.fresh and job.run.exists("_SUCCESS"):
        raise InputError(f"{job.run} is finished; give another --name, or --fresh to start anew")


def remove_unfinished_uploads(run: Storage) -> None:
    """Remove checkpoint folders that Ray Train's snapshot does not name: uploads that failed or were killed."""
    try:
        snapshot = run.read(_SNAPSHOT).decode()
    except FileNotFoundError:
        snapshot = ""
    for folder in run.folders():
        if folder.startswith("checkpoint_") and folder not in snapshot:
            (run / folder).delete_tree()
    run.remove_temporary()


# -- on the driver -------------------------------------------------------------------------------------------------


def run_training(
    job: Job,
    setup: Callable[[Job, dict[str, Any], Doing], Setup],
    facts: dict[str, Any],
    datasets: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `job` to its end, going on from what is committed. Raises InputError where the run cannot go on.

    `setup(job, facts, doing)` runs on every worker and makes the model and its rows, telling `doing` what takes
    time; `datasets` are Ray Datasets that a streamed run splits over its workers. Returns the run's summary, which
    ``_SUCCESS`` holds too. Raises InputError too while another driver trains the same run.
    """
    connect()
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
    job: Job,
    setup: Callable[[Job, dict[str, Any], Doing], Setup],
    facts: dict[str, Any],
    datasets: dict[str, Any] | None,
    monitor: Any,
    follower: "_Follower",
) -> dict[str, Any]:
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
        ),
    )
    start = time.perf_counter()
    with follower:
        try:
            with _ctrl_c_interrupts():
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise InputError(
                f"{job.run}: training failed: {_last_line(error)}; the same command goes on from the last checkpoint"
            ) from error
    summary: dict[str, Any] = result.return_value or {}  # type: ignore[attr-defined]
    if "error" in summary:
        raise InputError(summary["error"])
    remove_unfinished_uploads(job.run)
    summary = {**summary, "wall_seconds": round(time.perf_counter() - start, 1), "num_workers": job.options.num_workers}
    job.run.write("_SUCCESS", json.dumps(summary, indent=1).encode())
    print(f"finished: {job.run}/model ({summary['train_seconds']:.0f} s of training)", flush=True)
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
    except SystemExit:
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

    def __init__(self, job: Job, monitor: Any) -> None:
        self.job, self.monitor = job, monitor
        self.stop = threading.Event()
        self.watchdog = Watchdog(f"train {job.recipe_name}/{job.options.name}", job.options.stall_timeout)
        self.thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def __enter__(self) -> None:
        self.watchdog.__enter__()
        self.thread.start()

    def __exit__(self, *details: Any) -> None:
        self.stop.set()
        self.thread.join(timeout=5)
        self.watchdog.__exit__(*details)

    def _follow(self) -> None:
        seen: dict[str, Any] = {}
        with progress(f"train {self.job.recipe_name}", "steps") as report:
            while not self.stop.wait(_POLL_S):
                try:
                    latest = ray.get(self.monitor.latest.remote(), timeout=10)
                except ray.exceptions.RayError:
                    continue  # the monitor comes back or the run ends; the watchdog speaks meanwhile
                if latest == seen:
                    continue
                seen = latest
                self.watchdog.beat()
                if "step" in latest:
                    speed = f"loss {latest['loss']:.4f}, {latest['rows_per_s']:.0f} rows/s"
                    detail = latest["doing"] or f"epoch {latest['epoch']:.2f}, {speed}"
                    report(latest["step"], latest["total"], detail)
                elif latest.get("doing"):
                    report(0, 0, latest["doing"])
