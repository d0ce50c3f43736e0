"""A sweep's rows decide the size of the image and record truncated prompts.

Also the options of a generator that is not a diffusion.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_autoregressive
import tiny_runs
import tiny_sweep
from tiny_sweep import BATCH, NUM, SIZE, tiny_image

from jobs.generate import GenerateSettings, generate
from mmcore.errors import InputError
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.images import decode_image, read_png_text

pytest_plugins = ("sweep_fixtures",)
OTHER = (24, 32)


def write_prompts(folder: Path) -> str:
    """Every third row has its own size."""
    rows = [{"prompt": f"picture {row} of a dog"} for row in range(NUM)]
    for row in rows[::3]:
        row |= dict(zip(("height", "width"), OTHER, strict=True))
    path = folder / "sizes.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_each_image_has_the_size_of_its_row(sweep, tmp_path, monkeypatch):
    batches, make = [], tiny_sweep.TinyGenerator.generate

    def watched(self, prompts, seeds, options, size):
        batches.append((len(prompts), len(set(prompts)), size))
        return make(self, prompts, seeds, options, size=size)

    monkeypatch.setattr(tiny_sweep.TinyGenerator, "generate", watched)
    prompts, out = write_prompts(tmp_path), tmp_path / "out"
    sweep(prompts=prompts)
    rows = pq.read_table(out / "manifest").to_pylist()
    assert [(row["height"], row["width"]) for row in rows] == [
        OTHER if row % 3 == 0 else (SIZE, SIZE) for row in range(NUM)
    ]
    for row in rows:
        image = np.asarray(decode_image((out / row["key"]).read_bytes(), name="image"))
        assert (image == tiny_image(row["prompt"], row["seed"], (row["height"], row["width"]))).all()
    # A warm-up, then two sizes per block, each in full batches of one size.
    square = (SIZE, SIZE)
    assert batches[0] == (BATCH, 1, square)
    assert sorted(batches[1:]) == sorted(
        [
            (BATCH, 2, OTHER),
            (BATCH, 2, square),
            (BATCH, 1, OTHER),
            (BATCH, 3, square),
            (BATCH, 1, OTHER),
            (BATCH, 1, square),
        ]
    )

    # After a kill, images without rows are adopted, but not those of another size.
    (out / "manifest" / "part-000001.parquet").unlink()
    sweep(prompts=prompts)
    assert pq.read_table(out / "manifest").num_rows == NUM
    with pytest.raises(InputError, match="resolution was 16 and is now '16x32'"):
        sweep(prompts=prompts, size="16x32")
    with pytest.raises(InputError, match="a sweep of other images"):
        sweep()


def test_the_size_of_all_images_is_a_flag(sweep, tmp_path):
    assert sweep(size="32x8")["resolution"] == "32x8"
    (row, *_) = pq.read_table(tmp_path / "out" / "manifest").to_pylist()
    image = np.asarray(decode_image((tmp_path / "out" / row["key"]).read_bytes(), name="image"))
    assert image.shape == (row["height"], row["width"], 3) == (8, 32, 3)


def test_prompts_that_were_cut_are_counted_and_named(without_ray, tmp_path, capsys):
    """By the run's tokenizer, which reads 16 tokens including begin and end."""
    run = tiny_runs.write_pixel_run(tmp_path / "run")
    longest = "a red circle " * 4 + "a star"
    texts = [f"{longest} below it", longest, "a red circle", *[f"{longest} below a square"] * 5]
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"image_id": f"p{row}", "prompt": text} for row, text in enumerate(texts)]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = GenerateSettings(str(run), str(prompts), str(tmp_path / "out"), batch_size=4)
    summary = generate(settings, DiffusionOptions(steps=2, negative_prompt=f"{longest} above"))
    # Three of each block are named, five in the summary.
    cut = {"max_tokens": 16, "num_prompts_cut": 6, "prompts_cut": ["p0", "p3", "p4", "p5", "p6"]}
    assert {name: summary[name] for name in cut} == cut
    assert summary["negative_prompt_is_cut"]
    told = capsys.readouterr().out
    # Once for the first block, not for each prompt. Two threads begin together.
    named = re.findall(r"generate: the prompt of (?:p0 has 18|p4 has 19) tokens; its end beyond 16 is not read", told)
    assert 1 <= len(named) <= 2
    assert "generate: longer than the 16 tokens that the text encoder reads" in told
    assert "were cut off: 6 prompts, p0, p3, p4, p5, p6, ..." in told
    assert "the negative prompt is longer than 16 tokens" in told


def test_nothing_is_said_of_prompts_that_are_read_whole(sweep, capsys):
    summary = sweep()
    assert (summary["num_prompts_cut"], summary["prompts_cut"], summary["negative_prompt_is_cut"]) == (0, [], False)
    said = capsys.readouterr().out
    assert "cut off" not in said
    assert (summary["num_prompts_unknown"], summary["unknown_words"]) == (0, [])
    assert "does not know" not in said


def test_words_that_the_text_encoder_does_not_know_are_named(sweep, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("a DOG\n\n\na cat\nBEACH of DOG\n")
    summary = sweep(prompts=str(tmp_path / "words.txt"))
    assert (summary["num_images"], summary["num_prompts_unknown"]) == (3, 2)
    assert summary["unknown_words"] == ["BEACH", "DOG"]
    assert (
        "generate: 2 prompts have words that the run's text encoder does not know and cannot draw, such as BEACH, DOG\n"
        in (capsys.readouterr().out)
    )


def test_a_sweep_of_codes_resumes_and_says_its_own_options(without_ray, tmp_path):
    run, out = tiny_autoregressive.write_run(tmp_path / "runs" / "autoregressive" / "a"), tmp_path / "out"
    settings = GenerateSettings(str(run), "shapes-test", str(out), count=3, batch_size=2, num_threads=1)
    options = AutoregressiveOptions(guidance=2.0, guidance_end=1.0, top_k=9)
    assert generate(settings, options)["num_images"] == 3
    plan, table = (out / "sweep.json").read_bytes(), pq.read_table(out / "manifest")
    rows = table.to_pylist()
    assert [(row["steps"], row["sampler"], row["guidance"]) for row in rows] == [(None, None, 2.0)] * 3
    assert [str(table.schema.field(name).type) for name in ("steps", "sampler")] == ["int64", "string"]
    said = {"guidance": 2.0, "guidance_end": 1.0, "temperature": 0.6, "top_k": 9, "top_p": 1.0, "negative_prompt": ""}
    assert json.loads(rows[0]["options"]) == said
    assert said.items() <= json.loads(plan)["settings"].items()
    text = read_png_text((out / rows[2]["key"]).read_bytes())
    assert {name: text.get(name) for name in said} == {
        **{name: str(value) for name, value in said.items()}, "negative_prompt": None,
    }  # fmt: skip
    # Killed before a block was committed: its image exists and is made again, bit-identical.
    images = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "images").iterdir()}
    for name in ("manifest/part-000001.parquet", "summary.json"):
        (out / name).unlink()
    generate(settings, options)
    again = pq.read_table(out / "manifest").to_pylist()
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "images").iterdir()} == images
    assert (out / "sweep.json").read_bytes() == plan
    with pytest.raises(InputError, match=r"guidance_end was 1\.0 and is now None"):
        generate(settings, dataclasses.replace(options, guidance_end=None))
