"""The benchmarks with tiny sizes: they run, print their figures, and compare equal things. No time is checked."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_runs
import torch
from job_output import driver_lines

from jobs.bench import captioner_step as train_captioner
from jobs.bench import (
    decode_captions,
    infinity_batches,
    inputs,
    language_generation,
    ray_train_overhead,
    shapes_reconstructions,
    timing,
)
from jobs.bench import ldm_step as train_ldm
from jobs.bench.report_way import ReportCaptioner
from jobs.runtime.ray_private import cpus
from mmcore.captioners.cross_attention import VARIANTS
from mmcore.captioners.facts import CaptionerFacts
from mmcore.decoder import Packing
from mmcore.errors import InputError
from mmcore.generators import infinity_sampling, latent_diffusion
from mmcore.recipe import recipe_to_json
from mmcore.text import EOS_ID

ROOT = Path(__file__).parents[2]
SHARED_CAPTIONS = ROOT.parent / "shared" / "data" / "flickr8k" / "captions.txt"


# Threads that wait for each other make tiny sizes very slow on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_ratios_are_of_pairs_and_the_order_changes():
    calls = []
    values = {"ours": iter([4.0, 9.0, 10.0]), "theirs": iter([2.0, 3.0, 1.0])}

    def way(name):
        def call():
            calls.append(name)
            return next(values[name])

        return call

    figures = timing.interleaved("x", {name: way(name) for name in values}, 3)
    assert figures["ratio"] == {"median": 3.0, "min": 2.0, "max": 10.0, "all": [2.0, 3.0, 10.0]}
    assert figures["theirs"]["median"] == 2.0
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_encoding_counts_where_it_is_paid():
    figures = {"ours": {"median": 10.0}, "report": {"median": 1.0}}
    assert timing.ratio_with_encoding(figures, 0.1) == 5.0


def test_publish_prints_one_object_and_moves_other_output_away(capsys):
    def measure():
        print("a line of a library")
        return {"ratio": 2}

    timing.publish("x", {"pairs": 1, "smoke": True}, measure)
    out, err = map(driver_lines, capsys.readouterr())
    result = json.loads("\n".join(out))
    assert (result["bench"], result["ratio"], result["threads"]) == ("x", 2, torch.get_num_threads())
    assert result["commit"]
    assert err == ["a line of a library"]


def test_lengths_are_flickr8ks():
    counts = np.array(inputs.NUM_CAPTIONS_BY_WORDS)
    assert counts.sum() == 40_455
    assert (counts * np.arange(1, len(counts) + 1)).sum() / counts.sum() == pytest.approx(11.78, abs=0.005)
    if not SHARED_CAPTIONS.exists():
        pytest.skip(f"{SHARED_CAPTIONS} is not here")
    captions = [line.partition(",")[2] for line in SHARED_CAPTIONS.read_text().splitlines()[1:]]
    assert np.array_equal(np.bincount([len(caption.split()) for caption in captions])[1:], counts)


@pytest.mark.parametrize("variant", ["report", "best"])
def test_the_reports_decoder_with_our_weights_gives_our_logits(variant):
    recipe = inputs.tiny(VARIANTS[variant])
    vocabulary = inputs.synthetic_vocabulary(100, recipe.lowercase)
    torch.manual_seed(0)
    model = recipe.build(CaptionerFacts(vocabulary.token_ids, 4, 8)).eval()
    report = ReportCaptioner(recipe, len(vocabulary), 8).eval()
    report.load_decoder(model.decoder)
    ids_BT, memory_BLD = torch.randint(1, 100, (3, 7)), torch.randn(3, 4, recipe.width)
    with torch.inference_mode():
        ours = model.decoder(ids_BT, Packing.from_lengths(torch.full((3,), 7), 7), memory_BLD)
        theirs = report(ids_BT, memory_BLD).flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_train_captioner():
    bench = train_captioner.TrainBench(
        smoke=True, pairs=2, our_steps=1, report_steps=1, warmup_steps=1, our_batch=4, report_batch=2, num_images=8
    )
    figures = train_captioner.measure(bench)
    assert figures["target_met"] is None
    for variant in ("report", "best"):
        assert len(figures[variant]["ratio"]["all"]) == 2
        assert figures[variant]["ratio"]["min"] > 0
    # The same model on both sides: `best` only adds the norm and the positions of its image tokens.
    assert figures["report"]["parameters"]["ours"] == figures["report"]["parameters"]["report"]


LDM = train_ldm.LDMBench(
    smoke=True, pairs=2, our_steps=1, report_steps=1, batch=4, large_batch=2, num_images=6, variants=("best", "report")
)


@pytest.mark.parametrize("variant", ["report", "best"])
def test_the_reports_diffusion_with_our_weights_predicts_the_same(variant, tmp_path):
    vqvae = train_ldm.FrozenVQVAE(LDM.vqvae("report"), "cpu")
    text = train_ldm.FrozenText(train_ldm.TINY_CLIP_TEXT, "cpu")
    data = train_ldm.load_data(LDM, vqvae, text, tmp_path)
    recipe = LDM.recipe(variant)
    model, rows = train_ldm.our_training(recipe, data)
    report = train_ldm.ReportTraining(recipe, data, vqvae, text, copy.deepcopy(model.unet))
    # Validation uses the unmirrored image and its first caption.
    batch = {
        name: each.float() if each.is_floating_point() else each
        for name, each in rows.validation_batch(np.array([0])).items()
    }
    row = [len(data.pixels) - 1]
    noise, timesteps = batch["noise"], batch["timesteps"]
    with torch.inference_mode():
        if variant == "report":
            context = model.text(batch)
        else:  # it trains its own text encoder, so use the text of the report's loop
            context = report.model["projection"](torch.from_numpy(data.hidden[row, 0]).float())
        ours = model.predict(model.noise.add_noise(batch["x_0"], noise, timesteps), timesteps, context)
        theirs = report.predict(data.pixels[row], data.input_ids[row, 0], noise, timesteps)
        other = report.predict(data.pixels[:1], data.input_ids[row, 0], noise, timesteps)
        other_text = report.predict(data.pixels[row], data.input_ids[row, 1], noise, timesteps)
    assert ours.shape == theirs.shape == (1, *vqvae.model.recipe.latent_shape)
    # The caches are fp16, the report's loop is not: 4.6e-5 measured. Another image changes it by 0.2, another caption
    # by 0.08.
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (other - theirs).abs().max() > 0.02
    assert (other_text - theirs).abs().max() > 0.02


def test_the_frozen_half_of_the_report_has_its_sizes():
    assert train_ldm.LDMBench().vqvae("report").latent_shape == (4, 32, 32)
    assert train_ldm.LDMBench().vqvae("best").latent_shape == (4, 16, 16)
    assert train_ldm.CLIP_TEXT["max_position_embeddings"] == latent_diffusion.VARIANTS["report"].text.max_tokens
    with torch.device("meta"):
        text = train_ldm.FrozenText(train_ldm.CLIP_TEXT, "meta")
    # As openai/clip-vit-base-patch16 has it: 12 layers, and the embeddings of 49,408 tokens and 77 positions.
    assert train_ldm.num_parameters(text.model) == 63_165_952


def test_train_ldm(monkeypatch, capsys):
    settings = {"pairs": 2, "our-steps": 1, "batch": 4, "large-batch": 2, "num-images": 6}
    command = ["train_ldm.py", "--smoke"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", command)
    train_ldm.main()
    result = json.loads("\n".join(driver_lines(capsys.readouterr().out)))
    assert result["target_met"] is None
    assert result["settings"].keys() == dataclasses.asdict(LDM).keys()
    for variant in ("best", "report"):
        figures = result[variant]
        assert len(figures["ratio"]["all"]) == 2
        assert figures["ratio_with_encoding"] > 0
        assert figures["latents"] == {"ours": [4, 8, 8], "report": [4, 8, 8]}
    # `report` has only the U-Net on both sides.
    assert len(set(result["report"]["parameters"].values())) == 1


def test_train_ldm_on_the_latents_of_best_itself():
    figures = train_ldm.measure(dataclasses.replace(LDM, variants=("best",), own_latents=True, pairs=1))
    assert figures["best"]["latents"] == {"ours": (4, 4, 4), "report": (4, 8, 8)}
    assert "target" not in figures, "no like for like"


def test_a_block_begins_where_a_step_ends():
    with pytest.raises(InputError, match="--warmup-steps 0"):
        train_ldm.measure(dataclasses.replace(LDM, warmup_steps=0))


def test_decode_captions():
    figures = decode_captions.measure(decode_captions.DecodeBench(smoke=True, pairs=1, num_images=32, batch_size=16))
    assert figures["captions_equal"] == figures["captions"] == 32
    assert figures["words_per_caption"]["min"] < figures["words_per_caption"]["max"] < 50
    assert len(figures["ratio"]["all"]) == 1


def test_a_caption_that_differs_is_found():
    bench = decode_captions.DecodeBench(smoke=True, num_images=32)
    model, memory = decode_captions.synthetic_model(bench, inputs.tiny(VARIANTS["report"]), "cpu")
    report = ReportCaptioner(model.recipe, model.token_ids.size, 1).eval()
    report.load_decoder(model.decoder)
    right = [decode_captions.up_to_end(ids) for ids in report.greedy(memory).tolist()]
    assert decode_captions.count_ties(report, memory, right, right) == 0
    assert all(EOS_ID not in ids for ids in right)
    wrong = [list(ids) for ids in right]
    image = max(range(32), key=lambda image: len(right[image]))
    wrong[image][-1] += 1
    with pytest.raises(RuntimeError, match=f"image {image}: .* from word {len(right[image])} on"):
        decode_captions.count_ties(report, memory, wrong, right)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_language_generation(num_beams):
    bench = language_generation.GenerationBench(smoke=True, pairs=1, num_images=5, batch_size=3, num_beams=num_beams)
    figures = language_generation.measure(bench)
    assert figures["captions_equal"] == figures["captions"] == 5
    assert figures["tokens_per_caption"]["max"] <= figures["max_length"]
    assert len(figures["ratio"]["all"]) == 1


def test_infinity_batches():
    bench = infinity_batches.InfinityBench(smoke=True, pairs=1, batch_size=3, compared=4)
    figures = infinity_batches.measure(bench)
    assert figures["target against one at a time_met"] is None
    assert {"batch", "official way"} == figures["tflops"].keys()
    found = figures["batch of 3 against 1"]
    assert (found["images"], found["bits"]) == (4, 4 * 21 * 4)
    for name in ("one at a time", "official way"):
        assert len(figures[f"against {name}"]["ratio"]["all"]) == 1


def test_a_cache_that_grows_gives_the_same_images():
    made = infinity_batches._Bench(infinity_batches.InfinityBench(smoke=True))
    with mock.patch.object(infinity_sampling, "Cache", infinity_batches.GrowingCache):
        grown = made.bits([0, 1], 2)
    bits = made.bits([0, 1], 2)
    assert torch.equal(grown, bits)
    # The figures of differing bits: one bit of one image, of 84.
    others = bits.clone()
    others[1, 5] ^= True
    assert infinity_batches.differences(bits, others) == {
        "bits": 168,
        "bits_differing": 1,
        "images": 2,
        "images_differing": 1,
    }


OVERHEAD = ray_train_overhead.OverheadBench(
    smoke=True, pairs=1, steps=4, warmup_steps=2, batch_size=4, num_images=8, num_threads=1
)


def test_step_seconds_leaves_the_warm_up_out():
    seconds = [9.0, 10.0, 10.5, 11.0, 13.0, 13.0]
    steps = [1, 2, 3, 4, 5, 5]
    history = "".join(json.dumps({"step": a, "seconds": b}) + "\n" for a, b in zip(steps, seconds, strict=True))
    medians: list[float] = []
    assert ray_train_overhead.step_seconds(history.encode(), 2, medians) == 1.0
    assert medians == [0.5]


@pytest.mark.process
def test_torchrun_loop_times_every_step(tmp_path):
    history = ray_train_overhead.with_torchrun(OVERHEAD, tmp_path)
    rows = [json.loads(line) for line in history.splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert "validation_loss" in rows[-1]
    assert json.loads((tmp_path / "recipe.json").read_text()) == recipe_to_json(OVERHEAD.recipe())


@pytest.mark.soak
def test_ray_train_overhead(job_environment):
    settings = {"pairs": 1, "steps": 4, "warmup-steps": 2, "batch-size": 4, "num-images": 8}
    command = [sys.executable, "jobs/bench/ray_train_overhead.py", "--smoke"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, env=job_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["required_met"] is None
    assert {"ray", "torchrun", "ratio", "commit"} <= result.keys()
    assert dataclasses.asdict(OVERHEAD).keys() == result["settings"].keys()
    # One worker, and one core is left for Ray.
    assert result["threads_per_worker"] == max(1, cpus() - 1)


def test_reconstructions_of_shapes_are_scored(tmp_path: Path) -> None:
    run = tiny_runs.write_latent_run(tmp_path / "runs" / "ldm" / "a") / "model" / "vqvae"
    found = shapes_reconstructions.measure(shapes_reconstructions.ReconstructionBench(str(run), count=3))
    assert 0 <= found["fraction_correct"] < 0.9, "random weights"
    assert 0 < found["psnr"] < 20
    with pytest.raises(InputError, match="--count 0: must be at least 1"):
        shapes_reconstructions.measure(shapes_reconstructions.ReconstructionBench(str(run), count=0))
