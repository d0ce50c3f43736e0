"""jobs/demo.py fails for low scores, keeps finished parts, and its page shows the results."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from job_output import own_lines
from pyarrow.fs import FileSelector

from jobs import demo
from jobs.runtime.demo_demands import MIN_CAPTIONS_CORRECT, MIN_IMAGES_CORRECT, caption_failures, image_failures
from jobs.runtime.demo_page import captioned_pictures, judged_picture
from mmcore.data.shapes import BACKGROUND, COLOURS, SIZES, SceneObject, render_scene
from mmcore.images import png_bytes
from mmcore.page import paragraph
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from mmcore.trained.generator import open_generator
from serve.app import Args, build
from serve.proxy import VALUE, VARIABLE

# Only ends a demo that hangs.
TIMEOUT_S = 800.0
# Far too little training: its captions must not pass.
TINY = [
    "--shapes.num-train", "64", "--shapes.num-validation", "12", "--shapes.num-test", "12",
    "--captioner.width", "32", "--captioner.num-layers", "1", "--captioner.num-heads", "2",
    "--captioner.ffn-width", "64", "--captioner.train.num-epochs", "2", "--captioner.train.batch-size", "8",
    "--vqvae.image-size", "16", "--vqvae.channels", "8", "16", "--vqvae.norm-groups", "4", "--vqvae.num-codes", "32",
    "--vqvae.train.num-epochs", "2", "--vqvae.train.max-steps", "16", "--vqvae.train.batch-size", "8",
    "--autoregressive.transformer.width", "32", "--autoregressive.transformer.num-layers", "1",
    "--autoregressive.transformer.num-heads", "2", "--autoregressive.transformer.ffn-width", "64",
    "--autoregressive.text.text-width", "32", "--autoregressive.text.text-layers", "1",
    "--autoregressive.text.text-heads", "2", "--autoregressive.train.num-epochs", "2",
    "--autoregressive.train.max-steps", "16", "--autoregressive.train.batch-size", "8",
    "--autoregressive.train.validate-every-epochs", "1", "--autoregressive.train.num-samples", "2",
    "--autoregressive.sample.temperature", "0.7", "--num-generated", "12", "--num-workers", "1",
]  # fmt: skip


def scores(correct: float, named: float) -> dict[str, Any]:
    return {"all": {"fraction_correct": correct}, "named_per_caption": named, "named_per_reference": 8.0}


@pytest.mark.parametrize(
    ("correct", "named", "expected"),
    [
        (MIN_CAPTIONS_CORRECT, 4.0, []),
        (0.95, 8.0, []),
        (0.7999, 8.0, ["79.9% of the attributes that the captions name are right; 80% are needed"]),
        (1.0, 3.9, ["the captions name 3.90 attributes each; 4.00 are needed, 50% of the 8.00 of true captions"]),
    ],
)
def test_what_fails(correct: float, named: float, expected: list[str]) -> None:
    assert caption_failures(scores(correct, named)) == expected


def test_images_may_be_just_good_enough() -> None:
    assert image_failures(scores(MIN_IMAGES_CORRECT, 8.0)) == []
    assert image_failures(scores(0.74999, 8.0)) == [
        "74.9% of the attributes that the prompts name are in the images; 75% are needed"
    ]


def test_silence_fails_twice() -> None:
    assert len(caption_failures(scores(0.0, 0.0))) == 2


def scene(*looks: str) -> bytes:
    """An image with these shapes from left to right."""
    items = [
        SceneObject(*look.split(), x=(number + 0.5) / len(looks), y=0.5, side=sum(SIZES[look.split()[0]]) / 2)
        for number, look in enumerate(looks)
    ]
    return png_bytes(np.asarray(render_scene(tuple(items), 64)))


@pytest.mark.parametrize(
    ("looks", "wrong", "verdict"),
    [
        (["large red star", "small blue circle"], {}, "✓ whole scene right"),
        (["large red circle", "small blue circle"], {"star": "circle"}, "✗ 6 of 7 right"),
        (["small blue circle", "large red star"], {"left of": "right of"}, "✗ 6 of 7 right"),
        (["large red star"], {"left of": "", "small": "", "blue": "", "circle": ""}, "✗ 3 of 7 right, 1 shape missing"),
        (["large red star", "small blue circle", "small pink star"], {}, "✗ 7 of 7 right, 1 shape too many"),
    ],
)
def test_a_picture_says_what_is_wrong(looks: list[str], wrong: dict[str, str], verdict: str) -> None:
    text = "a large red star left of a small blue circle"
    picture = judged_picture(scene(*looks), text)
    assert {text[mark.start : mark.end]: mark.instead for mark in picture.marks if not mark.good} == wrong
    assert (picture.verdict, picture.good) == (verdict, verdict.startswith("✓"))
    # Largest first, in the order of the oracle.
    assert picture.alt == f"an image with {', '.join(f'a {look}' for look in sorted(looks))}"


def test_a_word_of_two_shapes_is_right_if_it_is_of_both() -> None:
    marks = judged_picture(scene("large red circle", "large blue circle"), "two red circles").marks
    assert [(mark.good, mark.instead) for mark in marks] == [(False, "blue"), (True, "")]


def test_a_patch_of_no_shape_counts_as_the_nearest_which_the_page_says() -> None:
    image = np.full((64, 64, 3), BACKGROUND, np.uint8)
    image[16:48, 28:36] = image[28:36, 20:52] = COLOURS["red"]
    cross = png_bytes(image)
    nearest = judged_picture(cross, "").alt.removeprefix("an image with ")
    html = captioned_pictures([{"image": cross, "caption": nearest}])
    assert "✓ whole scene right" in html
    assert "for the nearest shape, also where a person sees none" in html


def test_captions_are_no_markup() -> None:
    html = captioned_pictures([{"image": scene("large red star"), "caption": "<script>alert(1)</script>"}])
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_low_scores_are_the_first_thing_that_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_here: Callable[..., CompletedProcess[str]]
) -> None:
    def feed(fed: demo.Demo) -> str:
        fed.sections.append(paragraph("a section"))
        fed.failures += image_failures(scores(0.5, 8.0))
        return "fed"

    monkeypatch.setattr(demo, "STAGES", [("feed", feed)])
    done = call_here(demo.main, "--storage", tmp_path, "--shapes.max-objects", 2, check=False)
    assert done.returncode == 1
    line = "50.0% of the attributes that the prompts name are in the images; 75% are needed"
    assert f"error: {line}\n" in done.stderr
    html = (tmp_path / "index.html").read_text()
    assert 0 < html.index(line) < html.index("a section")
    assert "✓" not in html
    assert "scenes hold one and two shapes, as more take longer" in html
    assert "Ctrl\u2011C ends it" in html, "in one line of the page"


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--num-generated", "1", "error: --num-generated 1: at least 2 are needed"),
        ("--num-beams", "0", "error: --num-beams 0: must be at least 1"),
        ("--num-workers", "0", "error: --autoregressive.*: num_workers 0 must be at least 1"),
        ("--vqvae.train.batch-size", "9000", "error: --vqvae.*: batch_size 9000 is above the 8000 training rows"),
        ("--autoregressive.dataset", "mine", "error: fresh_scenes: --dataset mine is not rendered"),
        ("--autoregressive.vqvae", "a/run", "error: --autoregressive.vqvae a/run: the demo trains a VQ-VAE of its own"),
        ("--autoregressive.sample.top-p", "0", "error: --top-p 0: must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    flag: str, value: str, told: str, tmp_path: Path, call_here: Callable[..., CompletedProcess[str]]
) -> None:
    done = call_here(demo.main, "--storage", tmp_path / "a demo", flag, value, check=False)
    assert done.returncode != 0
    assert told in done.stderr
    assert not (tmp_path / "a demo").exists()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.soak)])
def test_a_bad_captioner_fails_and_a_second_run_keeps_the_work(
    where: str,
    call_job: Callable[..., CompletedProcess[str]],
    run_job: Callable[..., CompletedProcess[str]],
    shared_ray: dict[str, str],
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Storage in S3 shows that all jobs called by the demo work there."""
    storage = Storage(s3_server if where == "s3" else str(tmp_path)) / "a demo"
    first = call_job(demo.main, "--storage", storage, *TINY, check=False)
    assert first.returncode == 1, first.stderr
    # No crash: after everything was made, one line names the low score.
    assert re.search(
        r"^error: .*% of the attributes that the captions name are right; 80% are needed", first.stderr, re.M
    )
    assert not any("Traceback" in line for line in own_lines(first.stderr)), first.stderr
    for number, (title, _) in enumerate(demo.STAGES, start=1):
        assert f"== {number}/{len(demo.STAGES)} {title}" in first.stdout
    html = storage.read("index.html").decode()
    assert html.count("<img ") == 12 + 12 + demo.NUM_RECONSTRUCTED
    # Loss and accuracy twice each, rate; loss, PSNR and codes twice each; loss and accuracy twice each, rate.
    assert html.count("<polyline ") == 5 + 6 + 5
    assert "are needed" in html
    assert "pixels, guidance 2.0, temperature 0.7, top_p 1.0: " in html
    # Its last lines start the closed service with the trained models.
    told = re.search(r"^serve: SERVE_API_KEYS=(\S+) (.*)$", first.stdout, re.M)
    assert told, first.stdout[-2000:]
    _, dash_m, module, start, *words = shlex.split(told[2])
    assert (dash_m, module, start) == ("-m", "serve.control", "start")
    assert f"enter the key {told[1]}" in first.stdout
    assert "next: " not in first.stdout, "what follows a stage is the next stage"
    monkeypatch.setenv("SERVE_API_KEYS", told[1])
    monkeypatch.setenv(VARIABLE, VALUE)
    arguments = Args.model_validate(dict(word.split("=", 1) for word in words))
    assert build(arguments)
    assert set(arguments.model_fields_set) == {"captioner", "generator", "gallery"}
    assert open_captioner(arguments.captioner.removeprefix("resnet:")).load().image_size > 0
    generator = open_generator(arguments.generator.removeprefix("images:")).load()
    assert generator.options.temperature == 0.7, "what is served draws as the page's images were drawn"
    result = json.loads((storage / "scores" / "resnet_captioner").read("default-attributes.json"))
    assert result["all"]["num_scenes"] == 12
    made = kept_files(storage)
    assert len(made) > 20

    second = run_job("jobs/demo.py", "--storage", storage, *TINY, env=shared_ray, check=False, timeout_s=TIMEOUT_S)
    assert second.returncode == 1, "low scores stay a failure when nothing is done anew"
    assert second.stdout.count("kept") == 4
    assert "Ray: " not in second.stderr, "finished stages need no Ray"
    assert kept_files(storage) == made


def kept_files(storage: Storage) -> dict[str, Any]:
    """The time of the last write of each file of data, models, captions and images."""
    filesystem, path = storage.arrow()
    files = filesystem.get_file_info(FileSelector(path, recursive=True))
    parts = ("data", "model", "parts", "images", "manifest")
    return {file.path: file.mtime_ns for file in files if file.is_file and Path(file.path).parent.name in parts}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_another_training_leaves_no_captions_of_the_old_one(
    run_job: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    storage = tmp_path / "a demo"
    run_job("jobs/demo.py", "--storage", storage, *TINY, check=False, timeout_s=TIMEOUT_S)
    model = storage / "runs" / "resnet_captioner" / "default" / "model" / "model.safetensors"
    before = model.read_bytes()
    again = run_job(
        "jobs/demo.py", "--storage", storage, *TINY, "--captioner.train.seed", "7", check=False, timeout_s=TIMEOUT_S
    )
    assert again.stdout.count("trained anew") == 1, "data and generator stay"
    assert "12 images, 12 of them now" in again.stdout
    assert model.read_bytes() != before
