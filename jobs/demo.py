#!/usr/bin/env python
"""Both directions on built-in data, small enough for a laptop: prepare, train a captioner, caption, score; train a
VQ-VAE and a Transformer over its codes, generate images, score them; and a page.

    make demo, or: python jobs/demo.py [--storage URI] [--fresh]

Takes about ten minutes on two CPU cores. Needs no data, no weights and no network. Finished stages are kept; what
changed since is done anew. The last lines tell how to serve what it trained.
Exit code 1 if fewer than 80 % of the attributes that the captions name are right, or if they name too few; and if fewer
than 75 % of those that the prompts name are in the generated images. The page then says so first.
"""

import dataclasses
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from jobs import train_autoregressive, train_resnet_captioner, train_vqvae
from jobs.caption import CAPTIONS_FILE, CaptionSettings, caption
from jobs.evaluate import CaptionScoreSettings, ShapesScoreSettings, evaluate_captions, evaluate_images
from jobs.generate import GenerateSettings, generate
from jobs.prepare import SHAPES, PrepareSettings, prepare
from jobs.runtime import demo_page
from jobs.runtime.commandline import counted
from jobs.runtime.commandline import run as run_job
from jobs.runtime.demo_demands import caption_failures, image_failures, in_words
from jobs.runtime.demo_keeping import keep_or_train, remove_other
from jobs.runtime.job import Job, RunOptions, recipe_name
from jobs.runtime.scene_training import check_scenes
from jobs.runtime.source import output_storage, source_commit
from jobs.runtime.sweep import PARTS, read_parts
from mmcore.captioners import cross_attention as resnet
from mmcore.captioners.cross_attention import CrossAttentionCaptionerRecipe
from mmcore.captioners.search_options import SearchOptions
from mmcore.data.manifest import MANIFEST, read_manifest
from mmcore.data.pixels import to_pixels
from mmcore.data.prepared import read_prepared
from mmcore.data.prompts import SHAPES_TEST
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_oracle import AttributeScore, judge_text
from mmcore.errors import InputError
from mmcore.flags import Help, read_settings
from mmcore.generators import autoregressive, vqvae
from mmcore.generators.autoregressive import AutoregressiveRecipe
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.images import decode_image, resize_image
from mmcore.metrics.shapes import score_captions
from mmcore.page import Html, command, page, paragraph, section, table
from mmcore.recipe import difference
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_vqvae
from mmcore.training_plan import check_batch, num_steps

PAGE = "index.html"
# Where serve.control listens if it is told nothing else.
SERVED_AT = "http://127.0.0.1:8000/"
SPLIT = "test"
# The variant of the VQ-VAE that is made for a Transformer.
CODES = "shapes-codes"
# Pictures of the page, of each kind the first.
NUM_GENERATED, NUM_CAPTIONED, NUM_RECONSTRUCTED = 24, 12, 8
FULL_TRAINING = (
    "The training is short on purpose: python jobs/train_autoregressive.py trains on to its end, in 38 minutes, "
    "on scenes of up to three shapes, of which it then gets 94.5 % of the attributes and 74.4 % of the scenes right."
)
_MORE_FLAGS = (
    "The settings of the data and of the three recipes are flags too, such as --shapes.num-train 2000 or "
    "--captioner.train.max-steps 500: those of jobs/prepare.py and of the trainings, after --shapes., --captioner., "
    "--vqvae. or --autoregressive."
)
# A batch of the VQ-VAE that a laptop holds.
_IMAGES_AT_ONCE = 64


def _shorter(recipe: Any, max_steps: int, **train: Any) -> Any:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=max_steps, **train))


_CAPTIONER = _shorter(resnet.VARIANTS["shapes"], 1700)
_VQVAE = _shorter(vqvae.VARIANTS[CODES], 1500)
_SHAPES = autoregressive.VARIANTS["shapes"]
# In these minutes a smaller Transformer learns more than the variant's: it sees nearly twice as many images.
# The prompts are captions of the templates, so all of the training captions are too.
# Validation once an epoch gives a curve.
_AUTOREGRESSIVE = dataclasses.replace(
    _shorter(_SHAPES, 1600, lr=0.0014, ema_decay=0.99, validate_every_epochs=1, num_samples=0),
    exhaustive_captions=0.0,
    transformer=dataclasses.replace(_SHAPES.transformer, width=192, num_layers=4, num_heads=6, ffn_width=768),
    text=dataclasses.replace(_SHAPES.text, text_width=192, text_heads=6),
    # So early in a training more guidance than the variant's is better.
    sample=AutoregressiveOptions(guidance=2.0, temperature=0.6),
)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo makes, and where."""

    storage: str = "runs/demo"
    """Folder or s3://bucket/prefix for everything, the page included."""
    fresh: bool = False
    """Start anew instead of keeping the stages that are finished."""
    num_beams: int = 3
    """Beams of the search for captions; 1 is greedy."""
    num_generated: int = 48
    """Images to generate, from the first prompts of the test split."""
    num_workers: int = 2
    """Training workers of the Transformer, which share the cores."""
    shapes: ShapesSettings = field(default_factory=lambda: ShapesSettings(max_objects=2))
    """The built-in data, with scenes that can be learned in minutes."""
    captioner: CrossAttentionCaptionerRecipe = _CAPTIONER
    """The captioner and its training."""
    vqvae: VQVAERecipe = _VQVAE
    """The VQ-VAE and its training."""
    autoregressive: AutoregressiveRecipe = _AUTOREGRESSIVE
    """The Transformer over the VQ-VAE's codes, its training, and by `sample` how the images are drawn."""


@dataclass
class Demo:
    """What the stages hand on to each other."""

    settings: DemoSettings
    facts: dict[str, Any] = field(default_factory=dict)
    """What later stages and the page need: `data`, `autoencoder_fingerprint`, the summary of each run by its recipe."""
    sections: list[Html] = field(default_factory=list)
    """The page, a section for each part of the pipeline."""
    results: list[str] = field(default_factory=list)
    """One line for each score of which a least is demanded."""
    failures: list[str] = field(default_factory=list)
    """One line for each score that is too low."""

    @property
    def storage(self) -> Storage:
        return output_storage(self.settings.storage, "--storage")

    def job(self, file: Any, recipe: Any, variant: str = "shapes", num_workers: int = 1) -> Job:
        """The training job of the module `file`."""
        options = RunOptions(storage=self.storage.uri, fresh=self.settings.fresh, num_workers=num_workers)
        return Job(recipe_name(file.__file__), variant, recipe, options)

    @property
    def captioner(self) -> Job:
        return self.job(train_resnet_captioner, self.settings.captioner)

    @property
    def vqvae(self) -> Job:
        return self.job(train_vqvae, self.settings.vqvae, CODES)

    @property
    def autoregressive(self) -> Job:
        recipe = dataclasses.replace(self.settings.autoregressive, vqvae=self.vqvae.run.uri)
        return self.job(train_autoregressive, recipe, num_workers=self.settings.num_workers)

    @property
    def captions(self) -> Storage:
        return self.storage / "captions" / self.captioner.recipe_name / self.captioner.options.name

    @property
    def sweep(self) -> Storage:
        return self.storage / "sweeps" / self.autoregressive.recipe_name / self.autoregressive.options.name

    def said(self, job: Job) -> str:
        """What a training came to, in a line."""
        facts = self.facts[job.recipe_name]
        return (
            f"{facts['steps']:,} steps of {job.recipe.train.batch_size} images, "
            f"{facts['train_seconds']:.0f} s of training, {facts['precision']} on {facts['device']}"
        )


# -- stages --------------------------------------------------------------------------------------------------------


def prepare_shapes(demo: Demo) -> str:
    """The built-in data; other settings than last time replace it."""
    settings = PrepareSettings(dataset=SHAPES, storage=demo.storage.uri, shapes=demo.settings.shapes)
    data = demo.storage / "data" / SHAPES
    fresh = demo.settings.fresh
    if not fresh and data.exists("_SUCCESS"):
        there = json.loads(data.read("_SUCCESS"))["settings"]
        changes = difference(settings.identity(), there)
        if changes:
            print(f"the data that is there has other settings ({'; '.join(changes[:3])}): made anew", flush=True)
            fresh = True
    demo.facts["data"] = prepare(dataclasses.replace(settings, fresh=fresh))
    splits = demo.facts["data"]["splits"]["split"]
    return ", ".join(f"{count:,} {name}" for name, count in splits.items()) + " images"


def train_captioner(demo: Demo) -> str:
    job, made_of = demo.captioner, {"dataset_fingerprint": demo.facts["data"]["fingerprint"]}
    demo.facts[job.recipe_name] = keep_or_train(job, train_resnet_captioner.train, made_of, demo.captions, PARTS)
    return demo.said(job)


def caption_test_split(demo: Demo) -> str:
    remove_other(demo.captions, {"num_beams": demo.settings.num_beams}, PARTS)
    facts = caption(
        CaptionSettings(
            run=demo.captioner.run.uri,
            images=(demo.storage / "data" / SHAPES).uri,
            out=demo.captions.uri,
            split=f"split:{SPLIT}",
        ),
        SearchOptions(num_beams=demo.settings.num_beams),
    )
    return f"{counted(facts['num_rows'], 'image')}, {facts['rows_done_now']:,} of them now"


def score_test_captions(demo: Demo) -> str:
    """BLEU against the references, and the oracle's word on every attribute that is named."""
    job = demo.captioner
    bleu = evaluate_captions(
        CaptionScoreSettings(
            predictions=f"{demo.captions}/{CAPTIONS_FILE}",
            storage=demo.storage.uri,
            dataset=SHAPES,
            split=f"split:{SPLIT}",
            run=job.run.uri,
        )
    )
    table = read_parts(demo.captions, ["image_id", "caption"])
    captions = dict(zip(table["image_id"].to_pylist(), table["caption"].to_pylist(), strict=True))
    rows = [{**row, "caption": captions[row["image_id"]]} for row in _test_images(demo)]
    attributes = score_captions(
        [row["image"] for row in rows], [row["caption"] for row in rows], [row["captions"] for row in rows]
    )
    text = json.dumps(attributes, indent=1).encode() + b"\n"
    (demo.storage / "scores" / job.recipe_name).write(f"{job.options.name}-attributes.json", text)
    scores = attributes | {"bleu4": bleu["bleu4"]}
    demo.results.append(f"{attributes['all']['fraction_correct']:.1%} of the attributes that captions name")
    demo.failures += caption_failures(attributes)
    print(*in_words(scores), sep="\n")
    print(
        f"attributes named: {scores['named_per_caption']:.2f} a caption (true captions "
        f"{scores['named_per_reference']:.2f}); BLEU-4 {scores['bleu4']:.1f}",
        flush=True,
    )
    best = f"{demo.said(job)}; weights of step {demo.facts[job.recipe_name]['best_step']:,}, the best on validation."
    demo.sections += [
        demo_page.captioned_pictures(rows[:NUM_CAPTIONED]),
        demo_page.caption_scores(scores),
        demo_page.captioner_training(job.run, best),
    ]
    return (
        f"{attributes['all']['fraction_correct']:.1%} of {sum(attributes['all']['named'].values()):,} attributes right"
    )


def _test_images(demo: Demo) -> list[dict[str, Any]]:
    """image_id, image and true captions of every image of the test split."""
    images = read_prepared(demo.storage.uri, SHAPES, ["image_id", "image", "captions", "split"])
    return images.filter(pc.field("split") == SPLIT).drop_columns("split").to_pylist()  # type: ignore[no-any-return]


def train_autoencoder(demo: Demo) -> str:
    job = demo.vqvae
    made_of = {"dataset_fingerprint": demo.facts["data"]["fingerprint"]}
    demo.facts[job.recipe_name] = keep_or_train(job, train_vqvae.train, made_of, demo.sweep, MANIFEST)
    autoencoder = open_vqvae(job.run.uri).load()
    demo.facts["autoencoder_fingerprint"] = autoencoder.fingerprint()
    rows = _test_images(demo)
    pixels = np.stack(
        [resize_image(decode_image(row["image"], name=row["image_id"]), autoencoder.image_size) for row in rows]
    )
    made = np.concatenate(
        [
            to_pixels(autoencoder.decode_codes(autoencoder.codes(some))).numpy()
            for some in np.array_split(pixels, -(-len(pixels) // _IMAGES_AT_ONCE))
        ]
    )
    captions = [row["captions"][0] for row in rows]
    kept = sum((judge_text(*each).score for each in zip(made, captions, strict=True)), start=AttributeScore())
    height, width = autoencoder.code_shape
    shown = slice(NUM_RECONSTRUCTED)
    demo.sections += [
        demo_page.reconstructions(
            pixels[shown],
            made[shown],
            captions[shown],
            f"The VQ-VAE makes {height} x {width} codes of an image, each one of {autoencoder.num_codes:,}. Left the "
            f"original, right what its codes keep: {kept.fraction_correct:.1%} of the attributes of the test images.",
        ),
        demo_page.vqvae_training(job.run, demo.said(job)),
    ]
    return demo.said(job)


def train_generator(demo: Demo) -> str:
    job = demo.autoregressive
    made_of = {
        "dataset_fingerprint": demo.facts["data"]["fingerprint"],
        "autoencoder_fingerprint": demo.facts["autoencoder_fingerprint"],
    }
    demo.facts[job.recipe_name] = keep_or_train(job, train_autoregressive.train, made_of, demo.sweep, MANIFEST)
    demo.sections.append(demo_page.generator_training(job.run, demo.said(job)))
    return demo.said(job)


def generate_images(demo: Demo) -> str:
    settings = demo.settings
    count = min(settings.num_generated, settings.shapes.num_test)
    sample = settings.autoregressive.sample
    wanted = {"count": count, **dataclasses.asdict(sample)}
    remove_other(demo.sweep, wanted, MANIFEST)
    facts = generate(
        GenerateSettings(
            run=demo.autoregressive.run.uri,
            prompts=SHAPES_TEST,
            storage=demo.storage.uri,
            count=count,
            out=demo.sweep.uri,
        ),
        sample,
    )
    demo.facts["sweep"] = facts
    return f"{facts['num_images']:,} images, {facts['images_per_s']:.3g} images/s"


def score_images(demo: Demo) -> str:
    """The oracle's word on what the prompts name."""
    facts, sample = demo.facts["sweep"], demo.settings.autoregressive.sample
    scores = evaluate_images(ShapesScoreSettings(sweep=demo.sweep.uri, run=demo.autoregressive.run.uri))
    demo.results.append(f"{scores['all']['fraction_correct']:.1%} of those that prompts name")
    demo.failures += image_failures(scores)
    print(*in_words(scores), sep="\n", flush=True)
    manifest, _ = read_manifest(demo.sweep)
    rows = manifest.slice(0, NUM_GENERATED).to_pylist()
    # What a visitor came for stands first.
    demo.sections[:0] = [
        demo_page.generated_pictures(
            [demo.sweep.read(row["key"]) for row in rows], [row["prompt"] for row in rows], FULL_TRAINING
        ),
        demo_page.image_scores(
            scores,
            f"{facts['num_images']:,} images of {facts['resolution']} x {facts['resolution']} pixels, "
            f"{', '.join(f'{name} {value}' for name, value in dataclasses.asdict(sample).items() if value)}: "
            f"{facts['images_per_s']:.3g} images/s.",
        ),
    ]
    return f"{scores['all']['fraction_correct']:.1%} of {sum(scores['all']['named'].values()):,} attributes right"


# -- all of it -----------------------------------------------------------------------------------------------------

STAGES: list[tuple[str, Callable[[Demo], str]]] = [
    ("prepare the built-in Shapes data", prepare_shapes),
    ("train a captioner", train_captioner),
    ("caption the test split", caption_test_split),
    ("score the captions", score_test_captions),
    ("train a VQ-VAE", train_autoencoder),
    ("train a Transformer over its codes", train_generator),
    ("generate images", generate_images),
    ("score the images", score_images),
]
"""Title and function, in order; each function adds to the Demo and says in a few words what work was done."""


def write_page(demo: Demo, seconds: list[tuple[str, str, float]]) -> None:
    """The page. What is too low stands above everything else."""
    rows = [(f"{name}: {work}", f"{spent:.1f}") for name, work, spent in seconds]
    stages = table(("stage", "seconds"), [*rows, ("all", f"{sum(spent for _, _, spent in seconds):.1f}")])
    if demo.failures:
        verdict = paragraph(f"✗ Below what the demo demands: {'; '.join(demo.failures)}.", style="bad")
    else:
        verdict = paragraph(
            f"✓ All that the demo demands is reached: {' and '.join(demo.results)} are right.", style="good"
        )
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    text = page(
        "From images to captions and from prompts to images, on Ray",
        verdict,
        demo_page.introduction(demo.settings.shapes),
        *demo.sections,
        section(
            "Serve it",
            # With a hyphen at which no line breaks.
            paragraph(
                f"In the folder of the repository; then open {SERVED_AT} and enter the key. Ctrl\u2011C ends it."
            ),
            command(
                "[ -s ~/.mmcore-key ] || (umask 077; openssl rand -hex 32 > ~/.mmcore-key)\n"
                f"export KEY=$(cat ~/.mmcore-key); echo $KEY\n{serve_command(demo, '$KEY')}"
            ),
        ),
        section(
            "How it was made",
            stages,
            paragraph("Seconds of the last start of the demo; what an earlier one had finished was not done again."),
            paragraph(f"{when}, commit {source_commit()}", style="soft"),
        ),
    )
    demo.storage.write(PAGE, text.encode())


def _check(settings: DemoSettings) -> None:
    """Raise InputError for what a stage would refuse after minutes of others."""
    if settings.shapes.num_test < 2:
        raise InputError(f"--shapes.num-test {settings.shapes.num_test}: at least 2 are needed to score them")
    if settings.num_generated < 2:
        raise InputError(f"--num-generated {settings.num_generated}: at least 2 are needed to score them")
    if settings.autoregressive.vqvae is not None:
        raise InputError(
            f"--autoregressive.vqvae {settings.autoregressive.vqvae}: the demo trains a VQ-VAE of its own; leave the "
            "flag out, and set that one by --vqvae.*"
        )
    SearchOptions(num_beams=settings.num_beams).check()
    check_scenes(settings.autoregressive)
    for name, num_workers in (("captioner", 1), ("vqvae", 1), ("autoregressive", settings.num_workers)):
        train = getattr(settings, name).train
        try:
            check_batch(train, num_workers)
            num_steps(train, settings.shapes.num_train)
        except InputError as error:
            # Three trainings have that flag.
            raise InputError(f"--{name}.*: {error}") from None


def run_demo(settings: DemoSettings) -> Demo:
    """All stages, then the page, which is written for low scores too."""
    _check(settings)
    demo = Demo(settings)
    seconds: list[tuple[str, str, float]] = []
    for number, (title, stage) in enumerate(STAGES, start=1):
        print(f"\n== {number}/{len(STAGES)} {title}", flush=True)
        start = time.perf_counter()
        work = stage(demo)
        seconds.append((title, work, time.perf_counter() - start))
        print(f"== {number}/{len(STAGES)} done in {seconds[-1][2]:.0f} s: {work}", flush=True)
    write_page(demo, seconds)
    print(f"\npage: {demo.storage}/{PAGE} ({sum(spent for _, _, spent in seconds):.0f} s in all)", flush=True)
    # Made for this person and this once: nothing is served without one.
    key = secrets.token_hex(16)
    print(f"serve: {serve_command(demo, key)}")
    print(f"       then open {SERVED_AT} and enter the key {key}; Ctrl-C ends it", flush=True)
    return demo


def serve_command(demo: Demo, key: str) -> str:
    """A line for the shell, in this folder, that serves what was trained and shows the sweep."""

    def near(path: str) -> str:
        """As one writes it here: relative to this folder, if it lies in it."""
        relative = os.path.relpath(path) if os.path.isabs(path) else path
        return path if relative.startswith(os.pardir) else relative

    places = {"captioner": demo.captioner.run, "generator": demo.autoregressive.run, "gallery": demo.sweep}
    names = {"captioner": "resnet:", "generator": "images:"}
    words = [f"{kind}={names.get(kind, '')}{near(place.uri)}" for kind, place in places.items()]
    return f"SERVE_API_KEYS={key} {shlex.join([near(sys.executable), '-m', 'serve.control', 'start', *words])}"


def main() -> None:
    demo = run_demo(read_settings(DemoSettings, __doc__, "python jobs/demo.py", Help(hidden=_MORE_FLAGS)))
    if demo.failures:
        print(f"error: {'; '.join(demo.failures)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_job(main)
