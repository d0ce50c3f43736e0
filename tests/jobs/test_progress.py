"""The progress line of a job: a smoothed rate, the remaining time by that rate, and labelled times."""

import io
import time

import pytest

from jobs.runtime import progress
from jobs.runtime.progress import Work, clock


def numbers(reports: list[tuple[float, int]], total: int, at: float | None = None) -> str:
    """The numbers of work that began at 0 and reported `(seconds, done)`, at the last report or later."""
    work = Work("train x", "steps", 0.0)
    for now, done in reports:
        work.add(now, done, total, "")
    return work.numbers(reports[-1][0] if at is None else at)


def left_s(line: str) -> int:
    minutes, seconds = line.split(", ")[-1].removesuffix(" left").split(":")[-2:]
    return 60 * int(minutes) + int(seconds)


def test_the_start_and_the_slow_first_steps_are_soon_forgotten() -> None:
    """Twenty seconds of loading, ten steps of one second each, then ten steps a second: 1,000 take 99 s from there."""
    slow = [(20.0 + step, step) for step in range(11)]
    steady = [*slow, *((30 + step / 10, 10 + step) for step in range(1, 400))]
    assert numbers(slow[:3], 1000) == "2 of 1,000 steps, 0:22 elapsed", "too little was seen to say a rate"
    early, later = numbers(steady[:311], 1000), numbers(steady, 1000)
    assert "10 steps/s, 1:00 elapsed" in early
    assert abs(left_s(early) - 69) <= 1
    assert abs(left_s(later) - 59) <= 1


def test_single_steps_do_not_move_the_rate() -> None:
    """Steps of 0.02 s and 0.2 s in turn. A single step would give 5 or 50 steps a second."""
    now, reports = 0.0, []
    for step in range(1, 500):
        now += 0.2 if step % 2 else 0.02
        reports.append((now, step))
    rates = [float(numbers(reports[:number], 10_000).split(", ")[1].split()[0]) for number in range(100, 500)]
    assert 8.9 <= min(rates) <= max(rates) <= 9.3


def test_the_time_that_is_left_follows_the_rate_that_is_shown() -> None:
    line = numbers([(0.0, 0), (10.0, 100), (20.0, 200), (30.0, 300)], 900)
    assert line == "300 of 900 steps, 10 steps/s, 0:30 elapsed, 1:00 left"


@pytest.mark.parametrize(("step_s", "steps_per_epoch", "validation_s"), [(0.1, 100, 10.0), (10.0, 2, 5.0)])
def test_a_validation_is_in_the_time_that_is_left_and_not_in_the_rate(
    step_s: float, steps_per_epoch: int, validation_s: float
) -> None:
    """Reports come every half second, as from a training. The first step is where the measuring begins."""
    work, now, done, total = Work("train x", "steps", 0.0), 0.0, 0, 4 * steps_per_epoch + 1
    work.add(now, done, total, "")
    for _ in range(3):
        for _ in range(steps_per_epoch):
            now, done = now + step_s, done + 1
            work.add(now, done, total, "loss 1.0")
        for tick in range(round(validation_s * 2) + 1):
            work.add(now + tick / 2, done, total, "validating", beside=True)
        now += validation_s
        assert work.rate.per_s() == pytest.approx(1 / step_s, rel=0.1)
    now, done = now + step_s, done + 1
    work.add(now, done, total, "loss 1.0")
    assert work.rate.per_s() == pytest.approx(1 / step_s, rel=0.1)
    epoch_s = steps_per_epoch * step_s + validation_s
    assert work.rate.left_s(steps_per_epoch) == pytest.approx(epoch_s, rel=0.1)


def test_a_restart_during_other_work_begins_the_rate_anew() -> None:
    work = Work("train x", "steps", 0.0)
    for step in range(1, 101):
        work.add(step / 10, step, 400, "")
    for second in range(60):
        work.add(10.0 + second, 100, 400, "copying features", beside=True)
    for step in range(51, 102):
        work.add(70 + (step - 50) / 10, step, 400, "")
    assert work.numbers(75.1).startswith("101 of 400 steps, 10 steps/s")


def test_a_restart_from_a_checkpoint_measures_anew() -> None:
    line = numbers([(0.0, 0), (1.0, 10), (50.0, 500), (60.0, 400), (70.0, 401), (80.0, 411), (90.0, 421)], 521)
    assert line == "421 of 521 steps, 1 steps/s, 1:30 elapsed, 1:40 left"


def test_times_are_short_and_whole() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 3599, 7322)] == ["0:00", "1:00", "59:59", "2:02:02"]


def test_without_a_total_only_the_time_and_what_is_done_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it begins with is said at once, without the ten seconds between lines."""
    moments = iter([0.0, 1.0, 10.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    with progress.progress("train x", "steps") as report:
        report(0, 0, "starting the workers")
        report(0, 0, "compiling")
        report(3, 9, "loss 2.0")
        report(4, 9, "loss 1.5")
        report(9, 9, "loss 1.0")
    assert capsys.readouterr().err.splitlines() == [
        "train x: 0:01 elapsed, starting the workers",
        "train x: 3 of 9 steps, 0:11 elapsed, loss 2.0",
        "train x: 9 of 9 steps, 0:13 elapsed, loss 1.0",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_on_a_terminal_of_any_width_the_numbers_stay_whole(width: int) -> None:
    work = Work("encode flickr8k, view 1 of 2, with google/mobilenet_v2_1.0_224", "images", time.monotonic() - 30)
    for now, done in ((0.0, 0), (1.0, 10), (11.0, 110)):
        work.add(now, done, 8091, "")
    console = progress.Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(progress._Bar(work, console))
    title, line = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert title.startswith("encode flickr8k")
    assert line.endswith("110 of 8,091 images, 10 images/s, 0:30 elapsed, 13:18 left" if width > 65 else "…")
    assert len(line) <= width
