"""Settings that training jobs refuse before any work, in one line with the setting, its value and a correction."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_train_autoregressive
import test_train_ldm
import test_train_pixel_diffusion
import test_train_vqvae
import test_training_job
import tiny
from job_output import error_line

from jobs import train_autoregressive, train_ldm, train_pixel_diffusion, train_resnet_captioner, train_vqvae
from mmcore.storage import Storage

bert = test_train_pixel_diffusion.bert
FLAGS = {
    train_resnet_captioner: test_training_job.FLAGS,
    train_vqvae: test_train_vqvae.FLAGS,
    train_ldm: test_train_ldm.FLAGS,
    train_autoregressive: [*test_train_autoregressive.FLAGS, *test_train_autoregressive.ON_TINY],
    train_pixel_diffusion: test_train_pixel_diffusion.FLAGS,
}
REFUSED: list[tuple[ModuleType, list[str], list[str]]] = [
    (train_resnet_captioner, ["--variant", "shmoke"], ["--variant 'shmoke'", "report, best, reward, shapes, smoke"]),
    (
        train_resnet_captioner,
        ["--batch-size", "9", "--num-workers", "2"],
        ["batch_size 9", "2 workers", "--batch-size"],
    ),
    (train_resnet_captioner, ["--gradient-accumulation", "3"], ["batch_size 8", "3 micro-batches", "--batch-size"]),
    (train_resnet_captioner, ["--max-steps", "0"], ["max_steps 0", "--max-steps"]),
    (train_resnet_captioner, ["--dataset", "nothing"], ["data/nothing", "jobs/prepare.py --dataset nothing"]),
    (train_resnet_captioner, ["--split", "split_x"], ["--split 'split_x'", "has no such column; give --split split"]),
    (train_resnet_captioner, ["--encoder", "no/such/folder"], ["--encoder 'no/such/folder'"]),
    (train_resnet_captioner, ["--storage", "gs://bucket"], ["'gs://bucket'", "s3://bucket/prefix"]),
    (train_resnet_captioner, ["--num-heads", "3"], ["num_heads 3", "width 32", "--num-heads"]),
    (train_resnet_captioner, ["--dropout", "1.0"], ["dropout 1.0", "--dropout"]),
    (train_resnet_captioner, ["--batch-size", "64"], ["batch_size 64", "40 training rows", "--batch-size"]),
    (train_resnet_captioner, ["--name", ""], ["--name ''", "a letter or digit first"]),
    (train_resnet_captioner, ["--name", ".."], ["--name '..'", "a letter or digit first"]),
    (train_resnet_captioner, ["--name", "a/b"], ["--name 'a/b'", "a letter or digit first"]),
    (train_resnet_captioner, ["--num-threads", "0"], ["--num-threads 0", "at least 1"]),
    (train_resnet_captioner, ["--lr", "-1"], ["lr -1.0", "--lr"]),
    (train_resnet_captioner, ["--warmup-steps", "-5"], ["warmup_steps -5", "--warmup-steps"]),
    (train_resnet_captioner, ["--clip-grad-norm", "0"], ["clip_grad_norm 0.0", "--clip-grad-norm"]),
    (train_resnet_captioner, ["--ema-decay", "1"], ["ema_decay 1.0", "--ema-decay"]),
    (train_vqvae, ["--image-size", "18"], ["image_size 18", "--image-size"]),
    (train_vqvae, ["--stream"], ["--stream"]),
    (train_vqvae, ["--dataset", "nothing"], ["data/nothing", "jobs/prepare.py --dataset nothing"]),
    (train_vqvae, ["--perceptual", "lpips"], ["--vgg16 FILE", "--lpips-heads FILE", "--perceptual None"]),
    (train_vqvae, ["--perceptual", "lpips", "--vgg16", "no.pth", "--lpips-heads", "no.pth"], ["--vgg16", "no.pth"]),
    (train_vqvae, ["--perceptual", "no/such/folder"], ["--perceptual 'no/such/folder'"]),
    (train_vqvae, ["--batch-size", "64"], ["batch_size 64", "40 training rows"]),
    (
        train_ldm,
        ["--vqvae", "no/such/run"],
        ["--vqvae", "no/such/run: no such run", "jobs/train_vqvae.py trains a VQ-VAE"],
    ),
    (train_ldm, ["--stream"], ["--stream", "leave it out"]),
    (train_ldm, ["--drop-text", "0"], ["sample_guidance 3.0", "--drop-text 0.1"]),
    (train_ldm, ["--channels", "30", "60"], ["channels (30, 60)", "--channels"]),
    (train_ldm, ["--tokenizer", "no/such/folder"], ["--tokenizer 'no/such/folder'"]),
    (train_ldm, ["--text-encoder", "no/such/folder"], ["--text-encoder 'no/such/folder'"]),
    (train_ldm, ["--sample-steps", "3"], ["3 sampling steps", "ddim takes a divisor"]),
    (
        train_ldm,
        ["--variant", "report", "--num-epochs", "1"],
        ["--vqvae is missing", "train_vqvae.py --variant report"],
    ),
    (train_ldm, ["--batch-size", "64"], ["batch_size 64", "40 training rows"]),
    (
        train_autoregressive,
        ["--vqvae", "no/such/run"],
        ["--vqvae", "no/such/run: no such run", "jobs/train_vqvae.py trains a VQ-VAE"],
    ),
    (train_autoregressive, ["--fresh-scenes"], ["fresh_scenes", "--dataset tiny is not rendered", "--no-fresh-scenes"]),
    (train_autoregressive, ["--exhaustive-captions", "0.5"], ["exhaustive_captions 0.5", "--fresh-scenes"]),
    *(
        (job, ["--dataset", "shapes", "--flip"], ["flip", "--dataset shapes", "--no-flip"])
        for job in (train_resnet_captioner, train_ldm, train_autoregressive, train_pixel_diffusion)
    ),
    (
        train_autoregressive,
        ["--dataset", "shapes", "--fresh-scenes", "--text-encoder", "bert"],
        ["fresh_scenes", "--text-encoder bert", "--no-fresh-scenes"],
    ),
    (train_autoregressive, ["--top-p", "0"], ["--top-p 0", "above 0"]),
    (train_autoregressive, ["--temperature", "0"], ["--temperature 0", "at least"]),
    (train_autoregressive, ["--drop-text", "0"], ["--guidance 1.7", "drop_text 0"]),
    (train_autoregressive, ["--num-heads", "3"], ["num_heads 3", "width 32", "--num-heads"]),
    (
        train_pixel_diffusion,
        ["--channels", "32", "64", "64", "64", "64", "64"],
        ["levels need sides divisible by 32", "--channels"],
    ),
    (train_pixel_diffusion, ["--sample-guidance", "2"], ["sample_guidance 2.0", "--drop-text 0.1"]),
    (train_pixel_diffusion, ["--max-tokens", "40"], ["max_tokens 40", "takes at most 32", "--max-tokens"]),
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    return storage


@pytest.mark.parametrize(
    ("job", "flags", "named"),
    REFUSED,
    ids=lambda value: value.__name__.removeprefix("jobs.") if isinstance(value, ModuleType) else value[0].lstrip("-"),
)
def test_a_bad_setting_is_refused_in_one_line(
    job: ModuleType, flags: list[str], named: list[str], storage: Storage, bert: str, call_here: Callable[..., Any]
) -> None:
    usual = [] if job is train_resnet_captioner and "--variant" in flags else FLAGS[job]
    frozen = ["--text-encoder", bert] if job is train_pixel_diffusion else []
    before = {path: path.read_bytes() for path in Path(storage.uri).rglob("*") if path.is_file()}
    done = call_here(job.main, *usual, *frozen, "--storage", storage, "--name", "refused", *flags, check=False)
    assert done.returncode == 1
    line = error_line(done.stdout + done.stderr)
    assert line in done.stderr.splitlines()
    assert all(part in line for part in named), line
    after = {path: path.read_bytes() for path in Path(storage.uri).rglob("*") if path.is_file()}
    assert after == before, "nothing is written before the settings are known to work"
