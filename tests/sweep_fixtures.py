"""Fixtures for tests of a whole sweep in this process, without Ray."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_sweep

import jobs.generate
import jobs.runtime.sweep
from jobs.generate import GenerateSettings, generate
from jobs.runtime.blocks import Blocks
from jobs.runtime.image_blocks import read_block
from mmcore.generators.diffusion_options import DiffusionOptions


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tiny_sweep.write_run(tmp_path / "runs" / "tiny" / "a")


def work_here(blocks: Blocks, todo: list[int], actors: dict[str, Any], num_workers: int) -> Iterator[dict[str, Any]]:
    """Like `jobs.runtime.sweep._results`, with one worker on two threads of this process."""
    worker = actors["fn"](**actors["fn_constructor_kwargs"])

    def work(block: int) -> dict[str, Any]:
        item = blocks.items[block]
        rows = item["columns"] if blocks.source is None else read_block(blocks.source, item)
        return worker({"block": block, "rows": rows})

    with ThreadPoolExecutor(2) as threads:
        yield from threads.map(work, todo)


@pytest.fixture
def without_ray(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in this process, as starting Ray's workers takes longer than the tests.

    Other tests run, kill and interrupt jobs with Ray.
    """
    for module in (jobs.generate, jobs.runtime.sweep):
        monkeypatch.setattr(module, "connect", lambda: None)
        monkeypatch.setattr(module, "num_workers_and_gpus", lambda device=None: (1, 0.0))
    monkeypatch.setattr(jobs.generate, "machine_cpus", lambda device: [2])
    monkeypatch.setattr(jobs.runtime.sweep, "_results", work_here)


@pytest.fixture
def sweep(without_ray: None, run_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`sweep(**changes)`: ten images in batches of four to `tmp_path`/out. `changes` apply to settings and options."""
    prompts = tiny_sweep.write_prompts(tmp_path / "prompts.txt", tiny_sweep.NUM)

    def run(**changes: Any) -> dict[str, Any]:
        settings = GenerateSettings(str(run_folder), str(prompts), str(tmp_path / "out"), batch_size=tiny_sweep.BATCH)
        options = {name: changes.pop(name) for name in DiffusionOptions.__dataclass_fields__ if name in changes}
        settings = dataclasses.replace(settings, **changes)
        return generate(settings, DiffusionOptions(**options), tiny_sweep.TinyWorker)

    return run
