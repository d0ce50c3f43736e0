"""jobs/export.py: the exported model in diffusers makes the same image from the same noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_autoregressive
import tiny_runs
import tiny_tokenizer
import torch

from jobs.export import ExportSettings, export
from mmcore.errors import InputError
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.infinity_weights import load_vae
from mmcore.generators.text_context import TextSettings
from mmcore.generators.vqvae import VQVAE
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_autoencoder
from mmcore.trained.generator import open_generator
from mmcore.trained.to_diffusers import TOLERANCE


# A VQ-VAE with 8 pixels per latent, as diffusers' pipeline needs, and one with 4.
@pytest.mark.parametrize(
    ("frozen_text", "changes"), [(True, {"channels": (8, 16, 16, 16), "image_size": 64}), (False, {"num_heads": 1})]
)
def test_diffusers_makes_the_same_images(frozen_text: bool, changes: dict, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, LDMTextToImagePipeline

    text = TextSettings(str(tiny_runs.write_clip(tmp_path / "clip")), max_tokens=77) if frozen_text else None
    run = tiny_runs.write_latent_run(tmp_path / "runs" / "ldm" / "a", text, **changes)
    found = export(ExportSettings(run=str(run), out=str(tmp_path / "out" / "pipeline")))
    assert found <= TOLERANCE
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pipeline"]

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert type(pipeline) is LDMTextToImagePipeline
    pipeline.set_progress_bar_config(disable=True)
    generator: Any = open_generator(str(run)).load()
    prompts, seeds = ["a large red circle", "a small blue star above a green square"], [3, 4]
    shape = generator.model.x_0_shape
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    for guidance in (1.0, 4.0):
        theirs = pipeline(
            prompts, latents=noise, num_inference_steps=10, guidance_scale=guidance, output_type="np"
        ).images
        ours = generator.generate(prompts, seeds, DiffusionOptions(10, guidance, "ddim"))
        assert theirs.shape == ours.shape == (2, *generator.size, 3)
        # Half a step of 1/255 for rounding, and the tolerance.
        assert np.abs(theirs - ours / 255).max() <= 0.5 / 255 + TOLERANCE
        assert np.abs(theirs[0] - theirs[1]).max() > 0.05, "the images say nothing of prompt and noise"


def test_diffusers_has_the_same_vqvae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VQ-VAE stored with a generator. It is a run by itself."""
    from diffusers import VQModel

    vqvae = str(tiny_runs.write_latent_run(tmp_path / "runs" / "ldm" / "a", num_heads=1) / "model" / "vqvae")
    assert export(ExportSettings(run=vqvae, out=str(tmp_path / "exported"))) <= TOLERANCE
    theirs, ours = VQModel.from_pretrained(tmp_path / "exported"), open_autoencoder(vqvae).load()
    codes = torch.arange(ours.num_codes).view(1, *ours.code_shape)
    vectors = theirs.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, ours.latent_shape[0]))
    image = theirs.decode(vectors, force_not_quantize=True).sample
    torch.testing.assert_close(image, ours.decode_codes(codes), atol=TOLERANCE, rtol=0)
    with pytest.raises(InputError, match="--text-encoder 'bert': a VQ-VAE reads no text"):
        export(ExportSettings(run=vqvae, out=str(tmp_path / "other"), text_encoder="bert"))
    monkeypatch.setattr(TrainedVQVAE, "encode", lambda vqvae, pixels: vqvae.model.encode(torch.ones(1, 3, 32, 32)))
    with pytest.raises(RuntimeError, match=r"differ by [\d.]+ of 1"):
        export(ExportSettings(run=vqvae, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_runs_that_the_pipeline_cannot_hold_are_refused(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    short = TextSettings(max_tokens=16, text_width=32, text_layers=1, text_heads=2)
    refused = [
        (tiny_runs.write_pixel_run(runs / "pixel_diffusion" / "a"), "not a latent diffusion"),
        (
            tiny_autoregressive.write_run(runs / "codes", {"num_heads": 1}),
            rf"VQ-VAE by --run {runs}/codes/model/vqvae$",
        ),
        (
            tiny_autoregressive.write_run(runs / "heads", {"num_heads": 2}),
            r"heads/model/model.safetensors; its VQ-VAE cannot be exported either \(num_heads 2: .*--num-heads 1\)$",
        ),
        (tiny_runs.write_latent_run(runs / "ldm" / "heads", num_heads=2), "num_heads 2: this model cannot be exported"),
        (tiny_runs.write_latent_run(runs / "ldm" / "patches", patch_size=2), "patch_size 2: diffusers' pipeline has"),
        (tiny_runs.write_latent_run(runs / "ldm" / "short", short), "max_tokens 16: diffusers' pipeline pads"),
    ]
    for run, message in refused:
        with pytest.raises(InputError, match=message):
            export(ExportSettings(run=str(run), out=str(tmp_path / "pipeline")))
    assert not (tmp_path / "pipeline").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        export(ExportSettings(run=str(refused[2][0]), out=str(tmp_path / "there")))


def test_a_pipeline_that_differs_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_runs.write_latent_run(tmp_path / "runs" / "ldm" / "a")
    right = VQVAE.to_diffusers
    monkeypatch.setattr(VQVAE, "to_diffusers", lambda model, scaling_factor: right(model, scaling_factor / 2))
    with pytest.raises(RuntimeError, match=r"differ by [\d.]+ of 1"):
        export(ExportSettings(run=str(run), out=str(tmp_path / "pipeline")))
    assert not (tmp_path / "pipeline").exists()


def test_a_run_in_s3_is_exported(s3_server: str, tmp_path: Path) -> None:
    run = tiny_runs.write_latent_run(tmp_path / "runs" / "ldm" / "a", num_heads=1)
    for path in run.rglob("*"):
        if path.is_file():
            Storage(s3_server).upload(path, f"runs/ldm/a/{path.relative_to(run)}")
    assert export(ExportSettings(run=f"{s3_server}/runs/ldm/a", out=str(tmp_path / "pipeline"))) <= TOLERANCE
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_a_tokenizer_becomes_an_official_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = Storage(str(tmp_path / "run")), tmp_path / "official"
    official = {"width": 32, "norm_groups": 32, "patch_size": 1, "factors": (1, 1, 1), "discriminator_channels": (32,)}
    tiny_tokenizer.write_run(run, **official)
    with pytest.raises(InputError, match="--to diffusers: a run of infinity_tokenizer is for infinity; give --to inf"):
        export(ExportSettings(run=run.uri, out=str(out)))
    with pytest.raises(InputError, match="--text-encoder 'bert': a tokenizer has none"):
        export(ExportSettings(run=run.uri, out=str(out), to="infinity", text_encoder="bert"))
    assert export(ExportSettings(run=run.uri, out=str(out), to="infinity")) == 0
    assert "infinity_weights: vae.safetensors has the official names\n" in capsys.readouterr().out
    assert load_vae(str(out / "vae.safetensors"), "--vae").settings.widths == [32, 32, 32]
