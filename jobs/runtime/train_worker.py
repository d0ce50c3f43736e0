"""What runs on each worker of a training: the loop with its hooks, and the word between workers and driver."""

import contextlib
import logging
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import ray
import ray.train
from ray.train import Checkpoint
from torch import nn

from jobs.runtime.commandline import is_full_disk, one_line
from jobs.runtime.job import Job
from jobs.runtime.ray_private import cpus
from jobs.runtime.run_monitor import RunProgress
from mmcore.errors import InputError
from mmcore.images import decode_image, png_bytes
from mmcore.rows import Rows
from mmcore.run_files import read_begun, write_model
from mmcore.storage import Storage, writing
from mmcore.temporary import temporary_folder
from mmcore.training import RunHooks, Training, write_history

# Seconds between words to the driver.
_UPDATE_S = 0.25
# Seconds between words while one call takes long.
_BUSY_S = 10.0
# Workers that meet the same mistake meet it within this time of each other.
_MISTAKE_S = 5.0
# Folder of the images that a run makes on its way.
SAMPLES = "samples"

Doing = Callable[[str], None]


@dataclass
class Setup:
    """What a worker trains: made inside the worker by the recipe's own ``setup(job, facts, doing)``."""

    model: nn.Module
    rows: Rows
    samples: Callable[[nn.Module, int], dict[str, Any]]
    """What the model makes at a step, by name: text, or uint8 images (H, W, 3), which are written under samples/."""
    assets: dict[str, Storage] = field(default_factory=dict)
    """Folders that a finished run keeps a copy of, by their name under model/: what it needs beside its weights."""
    check_assets: Callable[[Storage], None] = lambda model: None
    """Called with model/ once the copies are there; raises InputError where one is not what was trained on."""


class TrainConfig(TypedDict):
    """What the driver hands to each worker; `monitor` is the handle of a `RunMonitor`."""

    job: Job[Any]
    setup: Callable[[Job[Any], Any, Doing], Setup]
    facts: Any
    monitor: Any


class WorkerSummary(TypedDict, total=False):
    """What a worker says of its training when that is over."""

    best_step: int
    best_validation_loss: float
    steps: int
    train_seconds: float
    rows_seen: int
    precision: str
    device: str


class Mistake(TypedDict):
    """What a worker returns instead where all of them met a user's mistake."""

    error: str


def train_on_worker(config: TrainConfig) -> WorkerSummary | Mistake:
    """One worker of the run. A user's mistake is returned, not raised: trying again would not mend it."""
    monitor, rank = config["monitor"], ray.train.get_context().get_world_rank()
    # Two lines at each report, which the run's own progress says better, come by the root logger (Ray 2.60 names theirs
    # by its file), which shares this handler; a crash is told by the driver. Ray's log files keep all of it.
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)
            handler.addFilter(lambda record: not record.name.startswith("ray.train"))
    try:
        mistake = ray.get(monitor.start.remote(rank, ray.get_runtime_context().get_node_id()))
        if mistake:
            raise InputError(mistake)
        return _train(config)
    except InputError as error:
        return _mistake(monitor, rank, error)
    except Exception as error:
        if is_full_disk(error):
            return _mistake(monitor, rank, InputError(one_line(error)))
        text = str(error).strip().splitlines() or [""]
        ray.get(monitor.add_crash.remote(f"{type(error).__name__}: {text[0]} (worker {rank})", traceback.format_exc()))
        raise


def _mistake(monitor: Any, rank: int, error: InputError) -> Mistake:
    """Return the mistake if all workers met it; else end the others, which wait in a collective for this one.

    Raising does that: Ray restarts the group, and each new worker finds the mistake and returns it.
    """
    deadline = time.monotonic() + _MISTAKE_S
    while ray.get(monitor.add_mistake.remote(rank, str(error))) < ray.train.get_context().get_world_size():
        if time.monotonic() > deadline:
            raise error
        time.sleep(0.1)
    return {"error": ray.get(monitor.first_mistake.remote())}


def _train(config: TrainConfig) -> WorkerSummary:
    import torch

    job, monitor = config["job"], config["monitor"]
    context = ray.train.get_context()
    torch.set_num_threads(job.options.num_threads or max(1, cpus() // context.get_local_world_size()))
    rank, run = context.get_world_rank(), job.run
    last_update = 0.0

    def update(values: RunProgress, at_once: bool = False) -> None:
        nonlocal last_update
        now = time.monotonic()
        if at_once or now - last_update >= _UPDATE_S:
            last_update = now
            monitor.update.remote(values)

    def send_progress(values: dict[str, Any]) -> None:
        update(cast(RunProgress, {**values, "doing": ""}), at_once=values["step"] == values["total"])

    def doing(text: str) -> None:
        if rank == 0:
            update({"doing": text})

    @contextlib.contextmanager
    def busy(text: str) -> Iterator[None]:
        """Tells what takes long in one call, and once in a while for how long, so that it is no stall."""
        start, done = time.monotonic(), threading.Event()

        def tell() -> None:
            update({"doing": text}, at_once=True)
            while not done.wait(_BUSY_S):
                update({"doing": f"{text}, {time.monotonic() - start:.0f} s so far"}, at_once=True)

        thread = threading.Thread(target=tell, name="busy", daemon=True)
        if rank == 0:
            thread.start()
        try:
            yield
        finally:
            done.set()

    def commit(folder: Path | None, metrics: dict[str, Any]) -> None:
        with busy("saving a checkpoint"):
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if folder else None)
        if folder is not None:
            shutil.rmtree(folder)
            update({"committed": training.state.step}, at_once=True)
            publisher.publish(training.state.history)

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
        return {
            name: _keep_image(run, workdir, f"{SAMPLES}/step-{step:08d}-{name}.png", value)
            if isinstance(value, np.ndarray)
            else value
            for name, value in setup.samples(model, step).items()
        }

    with temporary_folder("run") as workdir, writing(workdir):
        publisher = Publisher(run, workdir)
        setup: Setup = config["setup"](job, config["facts"], doing)
        hooks = RunHooks(commit=commit, progress=send_progress, doing=doing, samples=samples)
        checkpoint = ray.train.get_checkpoint()
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
                # Not printed here: what a worker prints may reach the driver after its end, or never.
                ray.get(monitor.add_resume.remote(training.state.step, training.total_steps))
        weights = training.run()
        if rank == 0:
            with busy("writing the model"):
                publisher.publish(training.state.history)
                copy_assets(run, setup.assets, workdir)
                setup.check_assets(run / "model")
                write_model(run, weights, read_begun(run, type(job.recipe), type(config["facts"])))
        return {
            # Of the weights that were kept: by `keep`, those of the best validation or the last.
            "best_step": training.state.best_step,
            "best_validation_loss": training.state.best_loss,
            "steps": training.total_steps,
            "train_seconds": round(training.state.seconds, 1),
            "rows_seen": training.state.rows_seen,
            "precision": training.precision,
            "device": training.accelerator.device.type,
        }


def _keep_image(run: Storage, workdir: Path, name: str, image: np.ndarray) -> dict[str, str]:
    """Write a sample, over the same one of a run that was killed after it; returns how the history names it."""
    data = png_bytes(image)
    run.write(name, data)
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).write_bytes(data)
    return {"image": name}


def copy_assets(run: Storage, assets: dict[str, Storage], workdir: Path) -> None:
    """Copy folders of files to their names under model/."""
    for asset, folder in assets.items():
        for name in folder.list():
            folder.download(name, workdir / name)
            run.upload(workdir / name, f"model/{asset}/{name}")
            (workdir / name).unlink()


class Publisher:
    """metrics.jsonl and the TensorBoard file of a run, from its committed history.

    What is new is appended to the file, since a grid of images is slow to decode. A new process begins with the whole
    history, so a restart leaves no doubles.
    """

    def __init__(self, run: Storage, workdir: Path) -> None:
        self.run, self.workdir, self.num_rows = run, workdir, 0

    def publish(self, history: list[dict[str, Any]]) -> None:
        from tensorboardX import SummaryWriter

        self.run.write("metrics.jsonl", write_history(history))
        folder, events = self.workdir / "tensorboard", self.workdir / "events"
        with SummaryWriter(str(folder), filename_suffix=".run") as writer:
            for row in history[self.num_rows :]:
                self._write(writer, row)
        self.num_rows = len(history)
        # Records stand for themselves: the files of two writers, one after the other, are one of both.
        (new,) = folder.iterdir()
        with events.open("ab") as file:
            file.write(new.read_bytes())
        shutil.rmtree(folder)
        self.run.upload(events, "tensorboard/events.out.tfevents.0.run")

    def _write(self, writer: Any, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "seconds"):
                writer.add_scalar(name, value, row["step"], walltime=row["seconds"])
        for name, made in row.get("samples", {}).items():
            if not isinstance(made, dict):
                writer.add_text(f"{SAMPLES}/{name}", str(made), row["step"], walltime=row["seconds"])
                continue
            path = self.workdir / made["image"]
            if not path.exists():  # made before a restart
                self.run.download(made["image"], path)
            image = np.asarray(decode_image(path.read_bytes(), name=made["image"]))
            path.unlink()
            writer.add_image(f"{SAMPLES}/{name}", image, row["step"], walltime=row["seconds"], dataformats="HWC")
