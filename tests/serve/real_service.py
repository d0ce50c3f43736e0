"""A real Ray Serve on loopback with fake models, as a separate process. Command: python tests/serve/real_service.py
PORT FOLDER

A file FOLDER/redeploy makes it deploy another version of every process; then the file is deleted. While a file
FOLDER/hold exists, the generator stops after its first step.
"""

import dataclasses
import sys
import threading
import time
from functools import partial
from pathlib import Path

from ray import serve
from ray.serve import Application
from serving import HANG_S, FakeCaptioner, FakeGenerator

from serve import control
from serve.app import application
from serve.limits import Limits

# Four images in 8 steps: ten images a second.
BATCH_SIZE, STEP_S = 4, 0.05
LIMITS = Limits(
    max_queue=16,
    max_n=4,
    generator_batch_size=BATCH_SIZE,
    rate_burst=100_000,
    rate_per_minute=6_000_000,
    drain_timeout_s=HANG_S,
    body_timeout_s=HANG_S,
    max_body_bytes=5 * 2**20,
    max_image_bytes=4 * 2**20,
)


class FileGate:
    """A gate that is closed while a file exists, for the generator's process, which shares no event with a test."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def wait(self, timeout: float) -> bool:
        if self.file.exists():
            time.sleep(timeout)
        return not self.file.exists()


def make_app(folder: Path, version: int = 1) -> Application:
    limits = dataclasses.replace(LIMITS, max_prompt_chars=1000 + version)
    prefix = "a" if version == 1 else "the"
    return application(
        {"words": lambda device: FakeCaptioner(prefix, 0.02)},
        {"shapes": lambda device: FakeGenerator(STEP_S, gate=FileGate(folder / "hold"))},
        limits=limits,
        storage=str(folder / "kept"),
    )


def watch(folder: Path) -> None:
    while True:
        if (folder / "redeploy").exists():
            serve.run(make_app(folder, 2), name=control.APP, route_prefix="/", blocking=False)
            (folder / "redeploy").unlink()
        time.sleep(0.1)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    threading.Thread(target=watch, args=(place,), daemon=True).start()
    raise SystemExit(control.run(partial(make_app, place), port=int(sys.argv[1])))
