"""jobs/generate.py: the files of a sweep, adopted images, and refusals."""

import dataclasses
import hashlib
import io
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_runs
import tiny_sweep
import torch
from gate import Gate
from kills import MAP_WORKER, TIMEOUT_S, wait_for_blocks, wait_until_gone, workers
from PIL import Image
from tiny_sweep import BATCH, NUM

import jobs.generate
import jobs.runtime.sweep
from jobs.generate import GenerateSettings, auto_batch_size, generate, summarise
from jobs.runtime.lease import Lease
from jobs.runtime.model_flags import parse_with_options
from jobs.runtime.watchdog import ALL_PLACED
from mmcore.data.prompts import Prompt, Prompts, read_prompts
from mmcore.errors import InputError
from mmcore.generators import pixel_diffusion
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.images import decode_image, png_bytes, read_png_text
from mmcore.run_files import read_fields
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator

pytest_plugins = ("sweep_fixtures",)
COLUMNS = {
    "image_id": "string", "key": "string", "sha256": "string", "prompt": "string", "seed": "int64", "height": "int64",
    "width": "int64", "steps": "int64", "guidance": "double", "sampler": "string", "options": "string",
    "dtype": "string", "device": "string", "seconds": "double",
}  # fmt: skip


def edit_text(path: Path, **changes: str) -> None:
    data = path.read_bytes()
    pixels = np.asarray(decode_image(data, name=path.name))
    path.write_bytes(png_bytes(pixels, read_png_text(data) | changes))


def test_what_a_sweep_writes(sweep, run_folder, tmp_path, capsys):
    summary = sweep(steps=7, guidance=2.5, seed=3)
    out = tmp_path / "out"
    rows = tiny_sweep.check_complete(Storage(str(out)), NUM)
    assert [row["image_id"] for row in rows] == [f"{i:06d}" for i in range(NUM)]
    assert {field.name: str(field.type) for field in pq.read_table(out / "manifest").schema} == COLUMNS
    assert sorted(path.name for path in (out / "manifest").iterdir()) == [f"part-{k:06d}.parquet" for k in range(3)]
    tiny_sweep.check_tidy(out)
    text = read_png_text((out / "images" / "000004.png").read_bytes())
    plan = json.loads((out / "sweep.json").read_text())
    assert text == {
        "prompt": "picture 4 of a dog", "seed": str(rows[4]["seed"]), "steps": "7", "guidance": "2.5",
        "sampler": "dpmsolver++", "run": str(run_folder), "commit": plan["commit"],
    }  # fmt: skip
    wanted = {"steps": 7, "guidance": 2.5, "batch_size": BATCH, "device": "cpu", "count": NUM, "seed": 3}
    assert {name: plan["settings"][name] for name in wanted} == wanted
    assert plan["settings"]["num_threads"] >= 1
    assert (rows[0]["steps"], rows[0]["guidance"], rows[0]["dtype"]) == (7, 2.5, "float32")
    assert json.loads(rows[0]["options"]) == dataclasses.asdict(DiffusionOptions(steps=7, guidance=2.5))
    assert (rows[0]["height"], rows[0]["width"]) == (tiny_sweep.SIZE, tiny_sweep.SIZE)
    # The last batch is padded, so that all images are made with the same batch size.
    log = [line.split() for line in Gate(run_folder).begun()]
    assert log == [["000000", "4"], ["000004", "4"], ["000008", "2"]]

    assert summary == json.loads((out / "summary.json").read_text())
    seconds = [row["seconds"] for row in rows]
    assert summary["seconds_per_image"]["median"] == pytest.approx(np.median(seconds))
    assert summary["seconds_per_image"]["p95"] == pytest.approx(np.percentile(seconds, 95))
    assert summary["images_per_s"] == pytest.approx(NUM / summary["worked_s"])
    assert (summary["num_images"], summary["steps"], summary["dtype"]) == (NUM, 7, "float32")
    assert min(summary["load_s"], summary["warmup_s"]) >= 0
    assert f"generate: {NUM} images in {out}/images, " in capsys.readouterr().out
    assert json.loads((out / "lease" / "000000.json").read_text())["expires_unix"] == 0


def test_a_finished_sweep_needs_no_ray_and_generates_nothing(sweep, run_folder, tmp_path, monkeypatch, capsys):
    first = sweep()
    calls, before = tiny_sweep.calls(run_folder), (tmp_path / "out" / "summary.json").read_bytes()
    monkeypatch.setattr(jobs.runtime.sweep, "connect", lambda: pytest.fail("Ray was asked for"))
    assert sweep() == first
    # Options that are not given again are those of the sweep's start.
    assert sweep(batch_size="auto", num_threads=None) == first
    assert f"all done already: {NUM} images" in capsys.readouterr().out
    assert tiny_sweep.calls(run_folder) == calls
    assert len(list((tmp_path / "out" / "lease").iterdir())) == 1
    # Killed just before its end. It computes its speed from the manifest.
    (tmp_path / "out" / "summary.json").unlink()
    sweep()
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def test_images_that_are_there_are_adopted(sweep, run_folder, tmp_path):
    sweep()
    out = tmp_path / "out"
    written = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "images").iterdir()}
    lost = out / "manifest" / "part-000001.parquet"
    rows = pq.read_table(lost).to_pylist()
    lost.unlink()
    # From another commit: the code changed between two resumes, and the image is the same.
    edit_text(out / "images" / "000005.png", commit="before")
    edited = (out / "images" / "000005.png").read_bytes()
    sweep(batch_size="auto")
    assert tiny_sweep.calls(run_folder)[-1:] == ["000004"]
    now = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "images").iterdir()}
    assert {name: value for name, value in now.items() if name != "000005.png"} == {
        name: value for name, value in written.items() if name != "000005.png"
    }
    again = pq.read_table(lost).to_pylist()
    rows[1]["sha256"] = hashlib.sha256(edited).hexdigest()
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: edit_text(path, seed="5"), "seed is '5' and not '"),
        (lambda path: edit_text(path, run="elsewhere"), "run is 'elsewhere' and not"),
        (lambda path: path.write_bytes(png_bytes(np.zeros((16, 16, 3), np.uint8), read_png_text(path.read_bytes()))),
         "its pixels differ by"),
        (lambda path: path.write_bytes(png_bytes(np.zeros((8, 8, 3), np.uint8), read_png_text(path.read_bytes()))),
         "it is 8 x 8 pixels and not 16 x 16"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "broken image"),
        (lambda path: Image.open(path).save(path, "JPEG"), r"000006.png: broken PNG \(not a PNG, or its header"),
    ],
)  # fmt: skip
def test_another_image_under_the_same_key_is_not_touched(damage, message, sweep, tmp_path):
    sweep()
    (tmp_path / "out" / "manifest" / "part-000001.parquet").unlink()
    path = tmp_path / "out" / "images" / "000006.png"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message) as raised:
        sweep()
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before
    assert not (tmp_path / "out" / "manifest" / "part-000001.parquet").exists()


def test_an_image_of_another_kind_of_cpu_is_adopted(sweep, tmp_path, monkeypatch):
    """With a VQ-VAE, one patch may have another code.

    Other pixels differ by at most one step, and other prompts by tens.
    """
    sweep()
    out = tmp_path / "out"
    path = out / "images" / "000006.png"
    mine, text = np.asarray(decode_image(path.read_bytes(), name="mine")), read_png_text(path.read_bytes())
    others = np.asarray(decode_image((out / "images" / "000007.png").read_bytes(), name="others"))
    patch, step = mine.copy(), mine.copy()
    patch[4:6, 4:6] ^= 64
    step[:, :, 0] ^= 1
    # Its mean is near, like a scene of one small shape for another prompt, but no pixel is the same.
    near = mine ^ 2

    def resumed(there: np.ndarray, decides_by_code: bool) -> None:
        path.write_bytes(png_bytes(there, text))
        (out / "manifest" / "part-000001.parquet").unlink(missing_ok=True)
        monkeypatch.setattr(tiny_sweep.TinyGenerator, "of_codes", decides_by_code)
        sweep()

    resumed(step, False)
    resumed(patch, True)
    for there, decides_by_code in ((patch, False), (others, False), (others, True), (near, True)):
        with pytest.raises(InputError, match="its pixels differ by"):
            resumed(there, decides_by_code)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 9}, "steps was 25 and is now 9"),
        ({"guidance": 1.0}, "guidance was 3.0 and is now 1.0"),
        ({"sampler": "ddpm"}, r"sampler was 'dpmsolver\+\+' and is now 'ddpm'"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"count": 9}, "count was 10 and is now 9"),
        ({"batch_size": 5}, "batch_size was 4 and is now 5"),
        ({"negative_prompt": "blur"}, "negative_prompt was '' and is now 'blur'"),
        ({"device": "cuda"}, "device was 'cpu' and is now 'cuda'"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' and is now 'bfloat16'"),
    ],
)
def test_other_settings_for_the_same_place_are_refused(changes, message, sweep, tmp_path, monkeypatch):
    plan = tmp_path / "out" / "sweep.json"
    monkeypatch.setattr(jobs.generate, "Lease", lambda *_: pytest.fail("the lease was asked for"))
    settings = {
        "run": str(tmp_path / "runs" / "tiny" / "a"), "count": NUM, "seed": 0, "steps": 25, "guidance": 3.0,
        "sampler": "dpmsolver++", "negative_prompt": "", "dtype": "float32", "resolution": 16,
        "batch_size": BATCH, "num_threads": 1, "device": "cpu",
    }  # fmt: skip
    settings["weights_sha256"] = read_fields(Storage(settings["run"]))[0]["weights_sha256"]
    digest = jobs.generate._blocks(read_prompts(str(tmp_path / "prompts.txt")), BATCH).ids_sha256
    plan.parent.mkdir()
    plan.write_text(json.dumps({"settings": settings, "num_rows": NUM, "num_blocks": 3, "ids_sha256": digest}))
    with pytest.raises(InputError, match=message):
        sweep(**changes)


def test_a_run_trained_anew_and_other_prompts_are_refused(sweep, run_folder, tmp_path):
    sweep()
    recipe = run_folder / "model" / "recipe.json"
    before = recipe.read_text()
    facts = json.loads(before)
    recipe.write_text(json.dumps(facts | {"weights_sha256": "of other weights"}))
    with pytest.raises(InputError, match="weights_sha256 was"):
        sweep()
    recipe.write_text(before)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(prompts.read_text().replace("picture 7", "drawing 7"))
    with pytest.raises(InputError, match="a sweep of other images: their ids, prompts or seeds"):
        sweep()


def test_a_second_live_run_is_refused(sweep, tmp_path, run_folder):
    sweep()
    (tmp_path / "out" / "manifest" / "part-000001.parquet").unlink()
    calls = tiny_sweep.calls(run_folder)
    refused = pytest.raises(InputError, match=f"the sweep {tmp_path}/out is being run by process {os.getpid()}")
    with Lease(Storage(str(tmp_path / "out")), "another", ttl_s=3600), refused:
        sweep()
    assert tiny_sweep.calls(run_folder) == calls


def test_a_dry_run_writes_nothing(sweep, tmp_path, capsys):
    assert sweep(dry_run=True) == {"num_rows": NUM}
    assert not (tmp_path / "out").exists()
    assert "not begun" in capsys.readouterr().out


def test_many_prompts_stay_in_ten_thousand_blocks(monkeypatch):
    monkeypatch.setattr(jobs.generate, "MAX_BLOCKS", 10)
    prompts = Prompts.of(Prompt(f"{i}", "a dog", i) for i in range(95))
    blocks = jobs.generate._blocks(prompts, 4)
    sizes = [len(item["columns"]["seed"]) for item in blocks.items]
    assert sizes == [12] * 7 + [11]
    assert [seed for item in blocks.items for seed in item["columns"]["seed"]] == list(range(95))


@pytest.mark.parametrize(
    ("device", "resolution", "num_images", "gpu_gib", "expected"),
    [
        ("cpu", 64, 1000, 0, 4),
        ("cpu", 32, 1000, 0, 16),
        ("cpu", 128, 1000, 0, 1),
        ("cpu", 1024, 1000, 0, 1),
        ("cpu", 64, 5, 0, 4),
        ("cpu", 64, 1, 0, 1),
        ("cuda", 256, 1000, 80, 64),
        ("cuda", 512, 1000, 24, 4),
        ("cuda", 1024, 1000, 8, 1),
    ],
)
def test_the_batch_goes_by_device_and_resolution(device, resolution, num_images, gpu_gib, expected):
    assert auto_batch_size(device, (resolution, resolution), num_images, gpu_gib * 2**30) == expected
    assert auto_batch_size(device, (2 * resolution, resolution // 2), num_images, gpu_gib * 2**30) == expected


def test_speed_counts_the_time_in_which_anybody_worked(tmp_path):
    out = Storage(str(tmp_path))
    # Two workers in parallel from 10 to 16 s, and after a kill a third from 30 to 34 s.
    blocks = [("a", 10, 12), ("b", 11, 14), ("a", 12.5, 15), ("b", 15, 16), ("c", 30, 31), ("c", 33, 34)]
    for k, (worker, began, ended) in enumerate(blocks):
        facts = {"worker": worker, "began": began, "ended": ended, "load_s": k, "warmup_s": 1, "device": "x"}
        table = pa.table({"seconds": [0.5, 1.5]}).replace_schema_metadata({"block": json.dumps(facts)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        out.write(f"manifest/part-{k:06d}.parquet", buffer.getvalue())
    out.write("sweep.json", json.dumps({"settings": {"steps": 4}, "commit": "abc"}).encode())
    summary = summarise(out)
    assert summary["worked_s"] == pytest.approx(6 + 4)
    assert summary["images_per_s"] == pytest.approx(12 / 10)
    assert (summary["num_worker_starts"], summary["load_s"], summary["steps"]) == (3, 5, 4)
    assert not math.isnan(summary["seconds_per_image"]["p95"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"run": "nowhere"}, "no such run"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"count": 11}, "--count 11: "),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"options": DiffusionOptions(steps=7, sampler="ddim")}, "--steps 7 sampling steps: ddim takes a divisor"),
        (
            {"options": DiffusionOptions(guidance=2.0), "dry_run": True, "run": "never-without-prompt"},
            "--guidance 2: .*guidance is not possible",
        ),
        ({"size": "65x16"}, "--size 65x16: at most 64 a side"),
        ({"size": "64"}, "--size 64: write WIDTHxHEIGHT"),
        ({"prompts": "large.csv"}, "large.csv: image_id 'b': size 16x128: at most 64 a side"),
        ({"prompts": "shapes-test", "storage": "nowhere"}, "no prepared dataset"),
    ],
)
def test_bad_input_writes_nothing(flags, message, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tiny_sweep.write_prompts(tmp_path / "prompts.txt", NUM)
    recipe = dataclasses.replace(pixel_diffusion.VARIANTS["smoke"], drop_text=0.0, sample_guidance=1.0)
    tiny_sweep.write_run(tmp_path / "never-without-prompt", recipe=recipe)
    (tmp_path / "large.csv").write_text("image_id,prompt,height,width\na,a dog,,\nb,a cat,128,16\n")
    settings = GenerateSettings(str(run_folder), str(prompts), str(tmp_path / "out"))
    options = flags.pop("options", None)
    with pytest.raises(InputError, match=message):
        generate(dataclasses.replace(settings, **flags), options, tiny_sweep.TinyWorker)
    assert not (tmp_path / "out").exists()


def test_bad_prompts_are_left_out_and_listed(sweep, tmp_path, capsys):
    path = tmp_path / "prompts.csv"
    path.write_text("image_id,prompt,height,width\na,a dog,,\nb,,,\nc,a cat,128,16\nd,a bird,,\n")
    summary = sweep(prompts=str(path), skip_bad=True)
    assert summary["num_images"] == 2
    assert sorted(each.stem for each in (tmp_path / "out" / "images").iterdir()) == ["a", "d"]
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split(" is ")[0] for line in skipped[:1]] == [f"{path}:3: prompt"]
    assert skipped[1].startswith(f"{path}: image_id 'c': size 16x128: at most 64 a side")
    assert f"2 prompts skipped, all in {tmp_path}/out/skipped.txt" in capsys.readouterr().out


def test_the_options_of_the_run_are_flags_with_its_defaults(run_folder, tmp_path):
    recipe = dataclasses.replace(pixel_diffusion.VARIANTS["smoke"], drop_text=0.0, sample_guidance=1.0)
    unguided = tiny_sweep.write_run(tmp_path / "never-without-prompt", recipe=recipe)

    def options(run: Path, *flags: str) -> DiffusionOptions:
        argv = ["--prompts", "p.txt", "--out", "out", "--run", str(run), *flags]
        settings, options = parse_with_options(
            GenerateSettings, open_generator, {"any": DiffusionOptions()}, "", "x", argv
        )
        assert settings == GenerateSettings(str(run), "p.txt", "out")
        return options

    assert options(run_folder, "--steps", "7") == DiffusionOptions(steps=7)
    assert options(unguided) == DiffusionOptions(guidance=1.0)
    with pytest.raises(InputError, match="no model/ there"):
        options(tmp_path)


def test_the_run_of_a_captioner_makes_no_images(run_folder, tmp_path):
    facts = {"recipe": "resnet_captioner", "weights_sha256": "of a captioner"}
    (run_folder / "model" / "recipe.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="recipe 'resnet_captioner' is not of kind generator"):
        generate(GenerateSettings(str(run_folder), "shapes-test", str(tmp_path / "out")))


def test_an_image_depends_on_its_prompt_and_seed_alone(ray_local, one_thread, tmp_path):
    """Equal bytes with one or two workers, in any order, and with any other prompts.

    Other batch sizes may round differently.
    """
    run = tiny_runs.write_pixel_run(tmp_path / "runs" / "pixel_diffusion" / "a")
    prompts = read_prompts("shapes-test", count=12)
    settings = GenerateSettings(str(run), "shapes-test", "", count=12, batch_size=5, num_threads=1)
    bytes_of = []
    for num_workers in (1, 2):
        out = tmp_path / f"out-{num_workers}"
        generate(dataclasses.replace(settings, out=str(out), num_workers=num_workers), DiffusionOptions(steps=4))
        bytes_of.append({path.stem: path.read_bytes() for path in (out / "images").iterdir()})
    assert bytes_of[0] == bytes_of[1]
    sweep = np.stack([np.asarray(decode_image(bytes_of[0][each.image_id], name="image")) for each in prompts])
    assert len({image.tobytes() for image in sweep}) == 12

    generator = open_generator(str(run)).load()

    def images(rows: list[int]) -> np.ndarray:
        chosen = [prompts[row] for row in rows]
        texts, seeds = [each.prompt for each in chosen], [each.seed for each in chosen]
        return generator.generate(texts, seeds, DiffusionOptions(steps=4))

    rows = [11, 0, 7, 2, 5]
    assert (images(rows) == sweep[rows]).all()
    alone = np.concatenate([images([row]) for row in rows])
    differing = np.abs(alone.astype(int) - sweep[rows])
    print(f"batches of 1 against 5: {(differing > 0).mean():.2%} of the values differ, by {differing.max()} at most")
    assert differing.max() <= 1


def test_settings_that_do_not_work_begin_no_sweep(without_ray, tmp_path):
    run = tiny_runs.write_pixel_run(tmp_path / "runs" / "pixel_diffusion" / "a")
    settings = GenerateSettings(str(run), "shapes-test", str(tmp_path / "out"), count=3, batch_size=3)
    with pytest.raises(InputError, match="7 sampling steps: ddim takes a divisor"):
        generate(settings, DiffusionOptions(steps=7, sampler="ddim"))
    assert not (tmp_path / "out" / "sweep.json").exists()
    # Found by a worker only.
    weights = run / "model" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model\.safetensors: missing; copy the whole folder"):
        generate(settings, DiffusionOptions(steps=4))
    assert not (tmp_path / "out" / "sweep.json").exists()
    (tmp_path / "elsewhere").rename(weights)
    assert generate(settings, DiffusionOptions(steps=4))["num_images"] == 3


def test_an_odd_number_of_timesteps_is_warmed_up_for(without_ray, tmp_path):
    """ddim cannot use two steps for this number of timesteps."""
    smoke = dataclasses.replace(pixel_diffusion.VARIANTS["smoke"], image_size=16)
    recipe = dataclasses.replace(smoke, noise=dataclasses.replace(smoke.noise, num_timesteps=15))
    run = tiny_runs.write_pixel_run(tmp_path / "runs" / "pixel_diffusion" / "a", recipe)
    out = str(tmp_path / "out")
    settings = GenerateSettings(str(run), "shapes-test", out, count=1, batch_size=1)
    assert generate(settings, DiffusionOptions(steps=3, sampler="ddim"))["num_images"] == 1


@pytest.mark.parametrize(
    ("machines", "num_workers", "threads"),
    [([64, 4], 2, 4), ([4, 64], 2, 4), ([8, 8], 4, 4), ([2], 3, 1), ([16], 1, 16)],
)
def test_the_threads_are_those_of_the_smallest_machine(machines, num_workers, threads, without_ray, monkeypatch):
    monkeypatch.setattr(jobs.generate, "machine_cpus", lambda device: machines)
    settings = GenerateSettings("run", "prompts", "out", num_workers=num_workers, device="cpu")
    assert jobs.generate._resolved(settings, (64, 64), 100)["num_threads"] == threads


def test_another_commit_is_told_and_listed(sweep, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs.generate, "source_commit", lambda: "before")
    assert sweep()["commits"] == ["before"]
    out = tmp_path / "out"
    (out / "manifest" / "part-000001.parquet").unlink()
    (out / "summary.json").unlink()
    monkeypatch.setattr(jobs.generate, "source_commit", lambda: "after")
    capsys.readouterr()
    assert sweep()["commits"] == ["after", "before"]
    assert "generate: begun at commit before, going on at after" in capsys.readouterr().out
    sweep()
    assert "going on at" not in capsys.readouterr().out


def test_an_interrupted_sweep_says_how_to_go_on_and_does(without_ray, tmp_path, start_job, shared_ray):
    run_folder = tiny_sweep.write_run(tmp_path / "runs" / "tiny" / "a")
    prompts, out = tiny_sweep.write_prompts(tmp_path / "prompts.txt", 40), tmp_path / "out"
    command = ["tests/tiny_sweep.py", "--run", run_folder, "--prompts", prompts, "--out", out, "--batch-size", "4"]
    gate = Gate(run_folder)
    gate.allow(3)
    job = start_job(*command, env=shared_ray)
    wait_for_blocks(Storage(str(out / "manifest")), 1, job)
    actors = workers(job, MAP_WORKER)
    # As a terminal does: the signal goes to the job and to all processes of its group.
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(TIMEOUT_S) == 130
    wait_until_gone(actors)
    gate.open()
    log = (tmp_path / "job-0.log").read_text()
    assert "interrupted; to go on from what was saved, if anything was: " in log
    assert "Traceback" not in log
    assert "constructor arguments" not in log, "Ray warns of arguments that a restart may not find"
    assert json.loads((out / "lease" / "000000.json").read_text())["expires_unix"] == 0
    assert not (out / "summary.json").exists()
    done = len(list((out / "manifest").glob("*.parquet")))
    assert 0 < done < 10
    settings = GenerateSettings(str(run_folder), str(prompts), str(out), batch_size=4)
    generate(settings, None, tiny_sweep.TinyWorker)
    tiny_sweep.check_complete(Storage(str(out)), 40)
    assert len(tiny_sweep.calls(run_folder)) <= 10 + 2


@pytest.mark.nightly  # test_cluster.py names what a cluster lacks
def test_what_a_sweep_waits_for_is_named(tmp_path, run_job):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, for which the sweep would not wait")
    run_folder = tiny_sweep.write_run(tmp_path / "runs" / "tiny" / "a")
    prompts = tiny_sweep.write_prompts(tmp_path / "prompts.txt", 4)
    command = ["tests/tiny_sweep.py", "--run", run_folder, "--prompts", prompts, "--out", tmp_path / "out"]
    # On a busy machine the sweep may not have requested its workers within the shorter time.
    for stall_timeout in ("3", "120"):
        flags = ["--device", "cuda", "--batch-size", "4", "--stall-timeout", stall_timeout]
        result = run_job(*command, *flags, check=False)
        if ALL_PLACED not in result.stderr:
            break
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "generate: no progress for" in line
    assert "missing: GPU" in line
