"""The training loop of all recipes.

A model's ``forward(batch)`` returns `Outputs`: named losses, each a sum and its count, and metrics to log. The loop
sums over micro-batches and workers and divides once. A step is therefore the same for any number of workers. Random
numbers of a step are seeded by (seed, step, worker), so a step can be repeated without saved generator states.

A model may define more; all of it is optional:

* ``counts(batch)``: the denominators of losses that are not means over rows; see `mmcore.losses`.
* ``whole_batch_losses``: names of losses that compare all rows of the batch, such as a contrastive loss over
  ``gathered`` features. Gradient accumulation is refused for them.
* ``phases`` and ``phase_parameters(phase)``: the phases of a step, such as ``("generator", "discriminator")``. Each
  phase has its own optimiser. The loop calls ``forward(batch, phase)`` for each.
* ``active_phases(step)``: the phases of that step. The first phase is always active, and it is validated.
* ``after_step(statistics, step)``: called with the statistics of the whole batch after the weights are updated.
* ``summarize(statistics)``: scalars to log, for a batch and for the whole validation set.
* ``blocks()``: modules for activation checkpointing.
* ``state_buffers``: names of buffers that ``after_step`` changes. They are saved with the weights.
* ``training_buffers``: those of them that checkpoints have and a finished run does not need.
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.distributed import Replica, align_gradients, check_frozen_alike
from mmcore.errors import InputError
from mmcore.frozen_weights import digests, frozen_parts, hold_frozen
from mmcore.losses import TOTAL, Denominators, Outputs, Sums
from mmcore.optimization import Average, Phase, build_phases, gradients_only_for, lr_factor
from mmcore.recipe import TrainSettings
from mmcore.recomputation import recompute_blocks
from mmcore.rows import Batch, Rows, micro_batches, prefetched
from mmcore.seeding import seed_step
from mmcore.training_plan import check_batch, num_steps, resolve_precision


@dataclass
class RunHooks:
    """Callbacks of the loop. `commit` and `doing` are called on every worker, the others on rank 0 only.

    Every worker calls `commit` equally often.
    """

    commit: Callable[[Path | None, dict[str, Any]], None] = lambda folder, metrics: None
    """Store a checkpoint folder (None on ranks above 0) and its metrics. Returns once both are stored."""
    progress: Callable[[dict[str, Any]], None] = lambda progress: None
    """Report step, total, epoch and mean losses."""
    doing: Callable[[str], None] = lambda text: None
    """Report slow work between two steps, such as a validation."""
    samples: Callable[[nn.Module, int], dict[str, Any]] = lambda model, step: {}
    """Outputs of the model for a few validation rows, for the metrics."""


@dataclass
class Progress:
    """The part of a checkpoint that is not tensors."""

    step: int = 0
    seconds: float = 0.0
    rows_seen: int = 0
    best_loss: float = math.inf
    """Validation loss of the saved weights: the lowest so far, or the last if `keep` is `last`."""
    best_step: int = -1
    """Step of the saved weights."""
    history: list[dict[str, Any]] = field(default_factory=list)


class Training:
    """One run of one model on this worker."""

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        settings: TrainSettings,
        hooks: RunHooks,
        *,
        workdir: Path,
        resume_from: Path | None = None,
        resume_name: str | None = None,
    ) -> None:
        """`workdir`: a local folder for checkpoints before they are stored. `resume_from`: a checkpoint folder.
        `resume_name`: the name of that checkpoint in errors, if the folder is a copy."""
        self.settings, self.rows, self.hooks, self.workdir = settings, rows, hooks, workdir
        on_gpu = torch.cuda.is_available()
        num_threads = torch.get_num_threads()
        device = torch.device("cuda" if on_gpu else "cpu")
        self.precision = resolve_precision(settings, device)
        # With this flag DDP keeps its first gradient buckets. Without it the buckets change after the first step. A
        # resumed run on three or more workers would then sum gradients in another order than an unbroken run.
        # With phases the flag is also needed because the other phases' weights have no gradient.
        keep_layout = DistributedDataParallelKwargs(find_unused_parameters=True)
        # Autocast is entered in each step. accelerate would fix one precision for the whole process.
        self.accelerator = Accelerator(
            cpu=not on_gpu, step_scheduler_with_optimizer=False, kwargs_handlers=[keep_layout]
        )
        torch.set_num_threads(num_threads)  # accelerate changes it if OMP_NUM_THREADS is unset
        self.world_size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        check_batch(settings, self.world_size)
        whole = getattr(model, "whole_batch_losses", ())
        if whole and settings.gradient_accumulation > 1:
            raise InputError(
                f"gradient_accumulation {settings.gradient_accumulation}: {', '.join(whole)} needs all rows of the "
                "batch at once, not micro-batches; give --gradient-accumulation 1"
            )
        self.steps_per_epoch, self.total_steps = num_steps(settings, rows.num_train)
        if rows.num_validation < 1:
            raise InputError("no row to validate on: the validation split is empty; choose another with --split")
        if self.precision == "fp64":
            model = model.double()
        hold_frozen(model, settings.frozen_precision, self.precision)
        self.model = model.to(self.accelerator.device)
        self.frozen = digests(self.model)
        check_frozen_alike(self.frozen, self.world_size)
        if settings.activation_checkpointing:
            recompute_blocks(self.model)
        if settings.compile:
            self.model.compile()  # in place, so the names of weights do not change
        self.phases = build_phases(self.model, settings)
        self.ema = Average(self.model) if settings.ema_decay is not None else None
        self.best: dict[str, Tensor] = {}
        self.state = Progress()
        if resume_from is not None:
            self._load(resume_from, resume_name or str(resume_from))
        # The last step with a stored checkpoint.
        self.committed_step = self.state.step
        if self.world_size > 1:
            align_gradients(self.model)
        self.wrapped = self.model if self.world_size == 1 else self.accelerator.prepare_model(Replica(self.model))

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _load(self, folder: Path, where: str) -> None:
        tensors, state = checkpoint.load(folder, where)
        checkpoint.load_trainable(self.model, tensors["weights"], where)
        for phase in self.phases:
            checkpoint.load_optimizer(phase.optimizer, tensors[phase.group])
        if self.ema is not None:
            checkpoint.copy_state(self.ema.weights, tensors["ema"], where)
        self.best = tensors.get("best", {})
        parallelism = {"num_workers": self.world_size, "num_threads": torch.get_num_threads()}
        if self.rank == 0 and state["parallelism"] != parallelism:
            print(
                f"resuming on {parallelism}, saved on {state['parallelism']}: the order of the data is the same, "
                "but sums may round differently",
                flush=True,
            )
        self.state = Progress(**state["progress"])

    def _commit(self, metrics: dict[str, Any]) -> None:
        """Write a checkpoint and pass it to the hook. Every rank calls this at the same step."""
        weights = checkpoint.trainable_state(self.model)
        if not all(torch.isfinite(weight).all() for weight in weights.values()):
            raise self._diverged("some weights are not finite", self.state.step)
        folder = None
        if self.rank == 0:
            folder = self.workdir / f"step-{self.state.step:08d}"
            tensors = {"weights": weights}
            for phase in self.phases:
                tensors[phase.group] = checkpoint.optimizer_state(phase.optimizer)
            if self.ema is not None:
                tensors["ema"] = self.ema.weights
            if self.best:
                tensors["best"] = self.best
            checkpoint.save(
                folder,
                tensors,
                {
                    "progress": self.state.__dict__,
                    "parallelism": {"num_workers": self.world_size, "num_threads": torch.get_num_threads()},
                },
            )
        self.hooks.commit(folder, metrics)

    # -- data --------------------------------------------------------------------------------------------------

    def _to_device(self, batch: Batch) -> Batch:
        real = torch.float64 if self.precision == "fp64" else torch.float32
        moved = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        return {name: value.to(real) if value.is_floating_point() else value for name, value in moved.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _add_up(self, values: Tensor) -> Tensor:
        """Sum over all workers, in float64 on the CPU."""
        if self.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def _summary(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        return self.model.summarize(statistics) if statistics else {}  # type: ignore[operator]

    # -- steps -------------------------------------------------------------------------------------------------

    def _step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One step of each active phase. Returns the means over the whole batch."""
        settings, step = self.settings, self.state.step
        self._train_mode()
        active = self.model.active_phases(step) if self.phases[0].name else (None,)  # type: ignore[operator]
        lr = settings.lr * lr_factor(settings, step, self.total_steps, self.steps_per_epoch)
        means: dict[str, float] = {}
        statistics: dict[str, Tensor] = {}
        for phase in self.phases:
            if phase.name in active:
                phase_means, phase_statistics = self._phase_step(phase, micro_batches, lr)
                means |= {phase.logged(name): value for name, value in phase_means.items()}
                statistics |= {phase.logged(name): value for name, value in phase_statistics.items()}
        if statistics:
            with torch.no_grad():
                self.model.after_step(statistics, step)  # type: ignore[operator]
        if self.ema is not None and settings.ema_decay is not None:
            self.ema.update(self.model, settings.ema_decay, step)
        return {**means, **self._summary(statistics), "lr": lr}

    def _phase_step(
        self, phase: Phase, micro_batches: list[Batch], lr: float
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Update the weights of `phase` once. Returns its means and statistics over the whole batch."""
        settings, step = self.settings, self.state.step
        phase.optimizer.zero_grad(set_to_none=True)
        denominators = self._denominators(micro_batches, phase)
        sums = Sums()
        for index, batch in enumerate(micro_batches):
            seed_step(settings.seed, "step", step, index, self.rank, *phase.arguments)
            last = index == len(micro_batches) - 1
            context = self.accelerator.no_sync(self.wrapped) if not last else contextlib.nullcontext()
            with context, gradients_only_for(phase, self.phases):
                with self._autocast():
                    outputs = self.wrapped(self._to_device(batch), *phase.arguments)
                self.accelerator.backward(denominators.backward_loss(outputs))
            sums.add(outputs)
        sums = sums.reduced(self._add_up)
        denominators.check(sums)
        means = sums.means()
        if not math.isfinite(means[TOTAL]):
            raise self._diverged(f"{phase.of('loss')} is {means[TOTAL]}", step + 1)
        # Each backward pass summed over its rows, and DDP averaged over workers. Divide once by the total count.
        gradients = [p.grad for p in phase.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.world_size / denominators.unit)
        if settings.clip_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(phase.parameters, settings.clip_grad_norm).item()
            if not math.isfinite(norm):
                raise self._diverged(f"{phase.of('gradient')}'s norm is {norm}", step + 1)
            means["grad_norm"] = norm
        for group in phase.optimizer.param_groups:
            group["lr"] = lr
        phase.optimizer.step()
        return means, sums.statistics

    def _denominators(self, micro_batches: list[Batch], phase: Phase) -> Denominators:
        """The denominators of the whole batch, summed over workers before the first backward pass."""
        counts: dict[str, Tensor] = {}
        if hasattr(self.model, "counts"):
            for batch in micro_batches:
                for name, count in self.model.counts(batch, *phase.arguments).items():  # type: ignore[operator]
                    counts[name] = counts.get(name, 0) + torch.as_tensor(count, dtype=torch.float64)
        if counts:
            totals = self._add_up(torch.stack(list(counts.values()))).tolist()
        return Denominators(self.settings.batch_size, dict(zip(counts, totals, strict=True)) if counts else {})

    def _diverged(self, what: str, step: int) -> InputError:
        """The error for `what` at `step`, counted from 1 as in the metrics."""
        good = f"step {self.committed_step}" if self.committed_step else "none"
        return InputError(
            f"{what} at step {step}; last good checkpoint: {good}; start a new run with a lower --lr "
            f"(now {self.settings.lr:g}), or check the data of this step"
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Means over the validation rows. Each of W workers takes every W-th batch."""
        model, phase = self.model, self.phases[0]
        batch_size = self.settings.batch_size

        def outputs_of(start: int) -> Outputs:
            self.hooks.doing(f"validating row {start:,} of {self.rows.num_validation:,}")
            indices = np.arange(start, min(start + batch_size, self.rows.num_validation))
            with self._autocast():
                return model(self._to_device(self.rows.validation_batch(indices)), *phase.arguments)

        sums = Sums()
        for start in list(range(0, self.rows.num_validation, batch_size))[self.rank :: self.world_size]:
            sums.add(outputs_of(start))
        if not sums.parts:  # more workers than batches: this worker adds zeros of the right shapes
            sums.add(outputs_of(0))
            sums = sums.zeros()
        sums = sums.reduced(self._add_up)
        means = sums.means() | self._summary(sums.statistics)
        return {f"validation_{name}": value for name, value in means.items()}

    def _train_mode(self) -> None:
        """Training mode, but frozen parts stay in evaluation mode: no dropout, stored batch statistics."""
        self.model.train()
        for part in frozen_parts(self.model).values():
            part.eval()

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Within the block, the model is in evaluation mode and has the EMA weights if there is an EMA."""
        self.model.eval()
        with self.ema.applied(self.model) if self.ema is not None else contextlib.nullcontext():
            yield

    def _check_frozen(self) -> None:
        for name, digest in digests(self.model).items():
            if self.frozen[name] != digest:
                raise AssertionError(f"frozen weight {name} has changed")

    def run(self) -> dict[str, Tensor]:
        """Train to the last step. Returns the weights to save by name: the best or the last, by `keep`."""
        settings, state = self.settings, self.state
        validate_every = settings.validate_every_epochs * self.steps_per_epoch
        stream = micro_batches(
            self.rows,
            settings,
            rank=self.rank,
            world_size=self.world_size,
            steps_per_epoch=self.steps_per_epoch,
            first_step=state.step,
        )
        batches = prefetched(itertools.islice(stream, self.total_steps - state.step))
        clock = time.perf_counter()
        try:
            for batch in batches:
                means = self._step(batch)
                state.step += 1
                state.rows_seen += settings.batch_size
                now = time.perf_counter()
                state.seconds, clock = state.seconds + now - clock, now
                row = {"step": state.step, "epoch": state.step / self.steps_per_epoch, **means}
                last = state.step == self.total_steps
                if state.step % settings.log_every_steps == 0 or last:
                    state.history.append({**row, "seconds": round(state.seconds, 3)})
                if self.rank == 0:
                    self.hooks.progress({**row, "total": self.total_steps})
                validate = last or state.step % validate_every == 0
                if validate:
                    row = self._validated(row)
                    clock = time.perf_counter()
                if validate or state.step % settings.checkpoint_every_steps == 0:
                    self._commit(row)
                    self.committed_step = state.step
                    clock = time.perf_counter()
        finally:
            batches.close()  # type: ignore[attr-defined]
        self._check_frozen()
        return self.best

    def _validated(self, row: dict[str, Any]) -> dict[str, Any]:
        """Validate, keep a copy of the weights if they are the ones to save, and add samples to the history."""
        state = self.state
        with self._evaluated():
            metrics = {**row, **self._validate()}
            if self.settings.keep == "last" or metrics["validation_loss"] < state.best_loss:
                state.best_loss, state.best_step = metrics["validation_loss"], state.step
                # A copy in CPU memory, since training changes the weights. Tied weights are kept once.
                source, unneeded = checkpoint.trainable_state(self.model), getattr(self.model, "training_buffers", ())
                self.best = {name: value.to("cpu", copy=True) for name, value in source.items() if name not in unneeded}
            if not math.isfinite(metrics["validation_loss"]):
                raise self._diverged(f"the validation loss is {metrics['validation_loss']}", state.step)
            entry = {**metrics, "seconds": round(state.seconds, 3)}
            if self.rank == 0:
                seed_step(self.settings.seed, "samples")
                entry["samples"] = self.hooks.samples(self.model, state.step)
        state.history.append(entry)
        return metrics


def write_history(history: list[dict[str, Any]]) -> bytes:
    """metrics.jsonl: one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in history).encode()
