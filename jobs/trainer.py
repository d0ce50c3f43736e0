"""A recipe on Ray Train: the run folder, workers, restarts, progress, and the finished model.

``STORAGE/runs/{recipe}/{name}/`` holds recipe.json, Ray Train's checkpoints and snapshot (the only commit point for
resume), metrics.jsonl, tensorboard/, samples/ where a model makes images; a finished run adds model/, with copies of
the frozen parts that it needs, and, last, _SUCCESS.
"""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import ray
import ray.train
import tyro
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from jobs.cluster import ROOT, Watchdog, connect
from jobs.progress import progress
from mmcore.errors import InputError
from mmcore.images import decode_image, png_bytes
from mmcore.recipe import difference, recipe_to_json
from mmcore.storage import Storage
from mmcore.training import Rows, RunHooks, Training, check_batch, write_history

# Folder of the images that a run makes on its way.
SAMPLES = "samples"
# A crash is retried this often; losing a machine to preemption is no crash and is retried without limit.
MAX_CRASHES = 3
_POLL_S = 0.5


@dataclass(frozen=True)
class RunOptions:
    """The flags that every training job has."""

    storage: str = "./out"
    """Where data, features and runs lie: a folder or s3://bucket/prefix."""
    name: str = "default"
    """Name of the run."""
    num_workers: int = 1
    """Training workers; a GPU each where the cluster has them."""
    fresh: bool = False
    """Start anew even if a run of this name is there."""
    dry_run: bool = False
    """Print the resolved recipe, sizes, steps and what would be read and written, and stop."""
    stream: bool = False
    """Feed the workers through Ray Data instead of a copy on their disk: for data larger than that disk. A restart
    then goes on at the right step but reads the interrupted epoch from its beginning."""
    stall_timeout: float | None = None
    """Seconds without progress after which the job ends; by default it waits (an autoscaler may take minutes)."""
    num_threads: int | None = None
    """CPU threads of a worker; by default the machine's cores over the workers on it."""


@dataclass(frozen=True)
class Job:
    """A training job's command line, resolved."""

    recipe_name: str
    variant: str
    recipe: Any
    options: RunOptions

    @property
    def storage(self) -> Storage:
        return Storage(self.options.storage)

    @property
    def run(self) -> Storage:
        return self.storage / "runs" / self.recipe_name / self.options.name


@dataclass
class Setup:
    """What a worker trains: made inside the worker by the recipe's own function."""

    model: nn.Module
    rows: Rows
    samples: Callable[[nn.Module, int], dict[str, Any]]
    """What the model makes at a step, by name: text, or uint8 images (H, W, 3), which are written under samples/."""
    assets: dict[str, Storage] = field(default_factory=dict)
    """Folders that a finished run keeps a copy of, by their name under model/: what it needs beside its weights."""


def recipe_name(job_file: str) -> str:
    """The recipe of ``jobs/train_x.py`` is ``x``."""
    return Path(job_file).stem.removeprefix("train_")


def parse_job(job_file: str, variants: dict[str, Any], description: str, argv: list[str] | None = None) -> Job:
    """Read ``--variant`` first; its fields are then the defaults of the flags, and what ``--help`` shows."""
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
    # Absolute: the workers' working directory is not the driver's.
    options = dataclasses.replace(parsed.options, storage=Storage(parsed.options.storage).uri)
    job = dataclasses.replace(parsed, options=options)
    if source == "no --variant":
        print(
            f"no --variant given: running `shapes`, self-contained on built-in data; "
            f"the report's recipe is `{command} --variant report --storage URI`",
            flush=True,
        )
    return job


def source_commit() -> str:
    """The commit of the code, with ``+changes`` where files differ from it; ``unknown`` outside a checkout."""
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
        run.delete_tree()
    if run.exists("_SUCCESS"):
        raise InputError(f"{run} is finished; {again}")
    mine = {"recipe": job.recipe_name, "variant": job.variant, "settings": recipe_to_json(job.recipe), **facts}
    data = json.dumps({**mine, "commit": source_commit()}, indent=1, ensure_ascii=False).encode()
    if not run.create("recipe.json", data):
        there = json.loads(run.read("recipe.json"))
        there.pop("commit")
        mine.pop("variant"), there.pop("variant")
        differences = difference(json.loads(json.dumps(mine)), there)
        if differences:
            raise InputError(f"{run} holds an unfinished run of other settings: {'; '.join(differences[:5])}; {again}")
        print(f"going on with the unfinished run {run}", flush=True)


def check_new_run(job: Job) -> None:
    """Refuse a finished run before any other work is done for it."""
    check_batch(job.recipe.train, job.options.num_workers)
    if not job.options.fresh and job.run.exists("_SUCCESS"):
        raise InputError(f"{job.run} is finished; give another --name, or --fresh to start anew")


# -- on the workers ------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class RunMonitor:
    """The newest progress of a run, between its workers and its driver."""

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}

    def update(self, progress: dict[str, Any]) -> None:
        self.progress = progress

    def latest(self) -> dict[str, Any]:
        return self.progress


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """One worker of the run. A user's mistake is returned, not raised: trying again would not mend it."""
    # Two lines at each report, which the run's own progress says better; Ray's log file keeps them.
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)
    try:
        return _train(config)
    except InputError as error:
        return {"error": str(error)}


def _train(config: dict[str, Any]) -> dict[str, Any]:
    import torch

    job, setup_fn, monitor = config["job"], config["setup"], config["monitor"]
    context = ray.train.get_context()
    torch.set_num_threads(job.options.num_threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    rank = context.get_world_rank()
    workdir = Path(tempfile.mkdtemp(prefix="mmcore-run-"))
    run = job.run
    last_update = 0.0

    def send_progress(values: dict[str, Any]) -> None:
        nonlocal last_update
        now = time.monotonic()
        if now - last_update >= _POLL_S / 2 or values["step"] == values["total"]:
            last_update = now
            monitor.update.remote(values)

    def commit(folder: Path | None, metrics: dict[str, Any]) -> None:
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if folder else None)
        if folder is not None:
            shutil.rmtree(folder)
            publish(run, training.state.history, workdir)

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
        made = setup.samples(model, step).items()
        return {
            name: _keep_image(run, workdir, f"{SAMPLES}/step-{step:08d}-{name}.png", value)
            if isinstance(value, np.ndarray)
            else value
            for name, value in made
        }

    setup: Setup = setup_fn(job, config["facts"])
    hooks = RunHooks(commit=commit, progress=send_progress, samples=samples)
    checkpoint = ray.train.get_checkpoint()
    try:
        if checkpoint is None:
            training = Training(setup.model, setup.rows, job.recipe.train, hooks, workdir=workdir)
        else:
            with checkpoint.as_directory() as folder:
                training = Training(
                    setup.model,
                    setup.rows,
                    job.recipe.train,
                    hooks,
                    workdir=workdir,
                    resume_from=Path(folder),
                    resume_name=str(run / Path(checkpoint.path).name),
                )
            if rank == 0:
                print(f"resumed at step {training.state.step} of {training.total_steps}", flush=True)
        weights = training.run()
        if rank == 0:
            publish(run, training.state.history, workdir)
            _save_model(run, weights, setup.assets, workdir)
        return {
            "best_step": training.state.best_step,
            "best_validation_loss": training.state.best_loss,
            "steps": training.total_steps,
            "train_seconds": round(training.state.seconds, 1),
            "rows_seen": training.state.rows_seen,
            "precision": training.precision,
            "device": training.accelerator.device.type,
        }
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def _keep_image(run: Storage, workdir: Path, name: str, image: np.ndarray) -> dict[str, str]:
    """Write a sample, over the same one of a run that was killed after it; returns how the history names it."""
    data = png_bytes(image)
    run.write(name, data)
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).write_bytes(data)
    return {"image": name}


def publish(run: Storage, history: list[dict[str, Any]], workdir: Path) -> None:
    """Write metrics.jsonl and the TensorBoard file anew from the committed history, so a restart leaves no doubles."""
    from tensorboardX import SummaryWriter

    run.write("metrics.jsonl", write_history(history))
    folder = workdir / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder), filename_suffix=".run") as writer:
        for row in history:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "seconds"):
                    writer.add_scalar(name, value, row["step"], walltime=row["seconds"])
            for name, made in row.get("samples", {}).items():
                if not isinstance(made, dict):
                    writer.add_text(f"{SAMPLES}/{name}", str(made), row["step"], walltime=row["seconds"])
                    continue
                path = workdir / made["image"]
                if not path.exists():  # made before a restart
                    run.download(made["image"], path)
                image = np.asarray(decode_image(path.read_bytes(), name=made["image"]))
                writer.add_image(f"{SAMPLES}/{name}", image, row["step"], walltime=row["seconds"], dataformats="HWC")
    (events,) = folder.iterdir()
    run.upload(events, "tensorboard/events.out.tfevents.0.run")


def _save_model(run: Storage, weights: dict[str, Any], assets: dict[str, Storage], workdir: Path) -> None:
    from safetensors.torch import save_file

    path = workdir / "model.safetensors"
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, path)
    run.upload(path, "model/model.safetensors")
    for asset, folder in assets.items():
        for name in folder.list():
            folder.download(name, workdir / name)
            run.upload(workdir / name, f"model/{asset}/{name}")
            (workdir / name).unlink()
    run.write("model/recipe.json", run.read("recipe.json"))


# -- on the driver -------------------------------------------------------------------------------------------------


def run_training(
    job: Job,
    setup: Callable[[Job, dict[str, Any]], Setup],
    facts: dict[str, Any],
    datasets: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `job` to its end, going on from what is committed. Raises InputError where the run cannot go on.

    `setup(job, facts)` runs on every worker and makes the model and its rows; `datasets` are Ray Datasets that a
    streamed run splits over its workers. Returns the run's summary, which ``_SUCCESS`` holds too.
    """
    open_run(job, facts)
    connect()
    filesystem, path = job.run.parent.arrow_whole_files()
    if not job.run.is_s3:
        Path(path).mkdir(parents=True, exist_ok=True)
    use_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    monitor = RunMonitor.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _train_on_worker,  # type: ignore[arg-type]
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
            failure_config=FailureConfig(max_failures=MAX_CRASHES, max_preemption_failures=-1),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    start = time.perf_counter()
    with _Follower(job, monitor):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise InputError(
                f"{job.run}: training failed: {_last_line(error)}; the same command goes on from the last checkpoint"
            ) from error
    summary: dict[str, Any] = result.return_value or {}  # type: ignore[attr-defined]
    if "error" in summary:
        raise InputError(summary["error"])
    summary = {**summary, "wall_seconds": round(time.perf_counter() - start, 1), "num_workers": job.options.num_workers}
    job.run.write("_SUCCESS", json.dumps(summary, indent=1).encode())
    print(f"finished: {job.run}/model ({summary['train_seconds']:.0f} s of training)", flush=True)
    return summary


def _last_line(error: BaseException) -> str:
    """The line of a nested traceback that says what happened: its last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


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
        seen = -1
        with progress(f"train {self.job.recipe_name}", "steps") as report:
            while not self.stop.wait(_POLL_S):
                try:
                    latest = ray.get(self.monitor.latest.remote(), timeout=10)
                except ray.exceptions.RayError:
                    continue  # the monitor comes back or the run ends; the watchdog speaks meanwhile
                if latest and latest["step"] != seen:
                    seen = latest["step"]
                    self.watchdog.beat()
                    speed = f"loss {latest['loss']:.4f}, {latest['rows_per_s']:.0f} rows/s"
                    report(seen, latest["total"], f"epoch {latest['epoch']:.2f}, {speed}")
