"""jobs/compare.py: sources, the table, the check of the report's claim."""

import csv
import io
from pathlib import Path

import pytest

from jobs.compare import CompareSettings, compare
from jobs.runtime.compare_source import Source, parse_source
from jobs.runtime.estimate import cost_of
from mmcore.errors import InputError


def test_a_source_is_read_as_it_is_written() -> None:
    text = "sdxl,steps=30,batch=8,size=512x768,dtype=float16,seconds=1.5"
    source = parse_source(text)
    assert source == Source("sdxl", steps=30, batch=8, size="512x768", dtype="float16", seconds=1.5)
    assert source.height_width == (768, 512)
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sdxl,step=3", "'step=3' is no setting; write one of steps="),
        ("sdxl,steps", "'steps' is no setting"),
        ("sdxl,steps=many", "steps=many must be a whole number"),
        ("sdxl,steps=0", "steps must be at least 1"),
        ("sdxl,seconds=0", "seconds must be above 0"),
        ("sdxl,seconds=inf", "seconds must be above 0 and finite"),
        ("sdxl,steps=10,guided=11", "guided must be from 0 to the 10 steps"),
        ("sdxl,steps=10,steps=20", "steps is given twice"),
        ("infinity-2b,steps=10", "Infinity has no steps"),
        ("sdxl,size=big", "size must be WIDTHxHEIGHT"),
        ("sdxl,dtype=int8", "dtype must be one of float32, float16, bfloat16"),
    ],
)
def test_a_wrong_source_is_told_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_source(text)


def test_the_reports_claim_does_not_fit_its_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(CompareSettings("a6000", out=str(tmp_path)))
    shown = capsys.readouterr().out
    assert "100 steps, in 10.8 s an image needs 126 TFLOP/s, 81.5% of the peak of one RTX A6000" in shown
    assert "the settings do not fit" in shown
    assert "In that time fit 50 steps at 1024x1024 (41%) or 100 steps at 512x512 (19%)" in shown
    assert "Claimed: infinity-2b is 3.6 times as fast as sdxl" in shown
    rows = list(csv.DictReader(io.StringIO((tmp_path / "compare.csv").read_text())))
    assert [row["source"] for row in rows][:2] == [
        "sdxl,steps=100,dtype=float16",
        "sdxl,steps=30,batch=8,dtype=float16",
    ]
    assert float(rows[0]["TFLOP/image"]) == pytest.approx(1363, abs=1)


def test_hours_are_of_all_images_on_all_devices(capsys: pytest.CaptureFixture[str]) -> None:
    hours = []
    for device in ("h100", "h100,8"):
        compare(CompareSettings(device, ("infinity-2b",), images=10_000_000))
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("infinity-2b"))
        hours.append(float(row.split()[-1].replace(",", "")))
    assert hours[0] == pytest.approx(8 * hours[1], rel=1e-3)
    assert hours[0] == pytest.approx(129.5 / (989 * 0.4) * 1e7 / 3600, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (CompareSettings("h100,none"), "write DEVICE,COUNT"),
        (CompareSettings("h100", images=0), "--images 0: must be at least 1"),
        (CompareSettings("h100", mfu=1.5), "--mfu 1.5: must be above 0 and at most 1"),
    ],
)
def test_wrong_settings_are_told_in_one_line(settings: CompareSettings, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        compare(settings)


def test_the_larger_infinity_has_all_positions_of_an_image() -> None:
    """Its positions are patches of its tokenizer, of which there are as many as of the smaller model."""
    small, large = (cost_of(Source(model)).flops for model in ("infinity-2b", "infinity-8b"))
    # Products with weights grow by the square of the width, scores of attention by the width; both by the layers.
    assert 40 * 3584 / (32 * 2048) < large["transformer"] / small["transformer"] < 40 * 3584**2 / (32 * 2048**2)
    # The same levels from the full side on, but the one below the latents.
    assert large["vae"] == pytest.approx(small["vae"], rel=0.3)
