"""The files published at each checkpoint: every row once, and every image decoded once."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jobs.runtime import train_worker
from jobs.runtime.train_worker import Publisher
from mmcore.images import decode_image, png_bytes
from mmcore.storage import Storage


def events_of(run: Storage) -> list[tuple[int, str, float]]:
    """(step, tag, time) of each value. A record is a length with its checksum, then the event with its own."""
    data, place, found = run.read("tensorboard/events.out.tfevents.0.run"), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        found += [(event.step, value.tag, event.wall_time) for value in event.summary.value]
        place += 12 + length + 4
    return found


def history_of(run: Storage, num_rows: int, *locally: Path) -> list[dict[str, Any]]:
    """Rows of which every second one has an image, with paths in the run's folder."""
    rows: list[dict[str, Any]] = []
    for step in range(1, num_rows + 1):
        row: dict[str, Any] = {"step": step, "loss": 1 / step, "seconds": float(step)}
        if step % 2 == 0:
            name = f"samples/step-{step:08d}-grid.png"
            image = png_bytes(np.full((4, 4, 3), step, np.uint8))
            run.write(name, image)
            for folder in locally:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(image)
            row["samples"] = {"grid": {"image": name}, "prompts": "a square"}
        rows.append(row)
    return rows


def test_each_row_is_once_in_the_file_and_each_image_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, workdir = Storage(str(tmp_path / "run")), tmp_path / "work"
    workdir.mkdir()
    history = history_of(run, 6, workdir)
    decoded: list[str] = []
    monkeypatch.setattr(
        train_worker, "decode_image", lambda data, name: decoded.append(name) or decode_image(data, name=name)
    )
    publisher = Publisher(run, workdir)
    for num_rows in (2, 3, 3, 6):
        publisher.publish(history[:num_rows])
        assert run.read("metrics.jsonl").decode().splitlines() == [json.dumps(row) for row in history[:num_rows]]
    names = [f"samples/step-{step:08d}-grid.png" for step in (2, 4, 6)]
    assert decoded == names
    events = events_of(run)
    assert [(step, tag) for step, tag, _ in events if tag == "loss"] == [(step, "loss") for step in range(1, 7)]
    assert [step for step, tag, _ in events if tag == "samples/grid"] == [2, 4, 6]
    assert all(time == step for step, _, time in events)

    # A new process has no event file yet. Rows that were lost or repeated are written once.
    restarted = tmp_path / "restarted"
    (restarted / "samples").mkdir(parents=True)
    again = Publisher(run, restarted)
    again.publish(history[:4])
    assert events_of(run) == [event for event in events if event[0] <= 4]
    again.publish(history)
    assert events_of(run) == events
    assert decoded == names * 2
