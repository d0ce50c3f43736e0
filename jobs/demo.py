#!/usr/bin/env python
"""Both directions on built-in data, small enough for a laptop: prepare, train a captioner, caption, score; train a
VQ-VAE and a latent diffusion on its codes, generate images, score them; and a page.

    make demo, or: python jobs/demo.py [--storage URI] [--fresh]

Needs no data, no weights and no network. Finished stages are kept; what changed since is done anew. The last lines tell
how to serve what it trained.
Exit code 1 if fewer than 80 % of the attributes that the captions name are right, or if they name too few.
The generator is trained for a few minutes only: its score is shown and not demanded.
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

import pyarrow.compute as pc
import tyro

from jobs import train_ldm, train_resnet_captioner, train_vqvae
from jobs.caption import CAPTIONS_FILE, CaptionSettings, caption
from jobs.evaluate import CaptionScoreSettings, ShapesScoreSettings, evaluate_captions, evaluate_images
from jobs.generate import GenerateSettings, generate
from jobs.prepare import SHAPES, PrepareSettings, prepare
from jobs.runtime import demo_page
from jobs.runtime.commandline import run as run_job
from jobs.runtime.job import Job, RunOptions, recipe_name
from jobs.runtime.source import output_storage, source_commit
from jobs.runtime.sweep import PARTS, read_parts, read_plan, remove_sweep
from jobs.runtime.trainer import RunSummary
from mmcore.captioners import cross_attention as resnet
from mmcore.captioners.cross_attention import CrossAttentionCaptionerRecipe
from mmcore.captioners.search_options import SearchOptions
from mmcore.catalogue import RECIPES
from mmcore.data.manifest import MANIFEST, read_manifest
from mmcore.data.prepared import read_prepared
from mmcore.data.prompts import SHAPES_TEST
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_oracle import judge_text
from mmcore.errors import InputError
from mmcore.generators import latent_diffusion, vqvae
from mmcore.generators.diffusion import SamplerName
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.latent_diffusion import LatentDiffusionRecipe
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.images import decode_image
from mmcore.metrics.shapes import score_captions
from mmcore.page import Html, page, paragraph, section, table
from mmcore.recipe import difference, recipe_to_json
from mmcore.run_files import RunFile, read_begun
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_autoencoder

PAGE = "index.html"
# Where serve.control listens if it is told nothing else.
SERVED_AT = "http://127.0.0.1:8000/"
SPLIT = "test"
SAMPLER: SamplerName = "dpmsolver++"
MIN_CORRECT = 0.8
# A caption that names little is easily right: half of what true captions name is the least.
MIN_NAMED = 0.5


def _shorter(recipe: Any, max_steps: int) -> Any:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=max_steps))


_CAPTIONER = _shorter(resnet.VARIANTS["shapes"], 2000)
_VQVAE = _shorter(vqvae.VARIANTS["shapes"], 250)
# It is trained for minutes only, so that its network is smaller and faster than the variant's.
_LDM = dataclasses.replace(
    latent_diffusion.VARIANTS["shapes"],
    unet=dataclasses.replace(latent_diffusion.VARIANTS["shapes"].unet, channels=(32, 64, 128, 128)),
    train=dataclasses.replace(latent_diffusion.VARIANTS["shapes"].train, max_steps=200, warmup_steps=20),
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
    steps: int = 15
    """Steps of the sampler, DPM-Solver++."""
    guidance: float = 3.0
    """Classifier-free guidance scale of the generated images."""
    shapes: ShapesSettings = field(default_factory=ShapesSettings)
    """The built-in data."""
    captioner: CrossAttentionCaptionerRecipe = _CAPTIONER
    """The captioner and its training."""
    vqvae: VQVAERecipe = _VQVAE
    """The VQ-VAE and its training."""
    ldm: LatentDiffusionRecipe = _LDM
    """The latent diffusion and its training."""


@dataclass
class Demo:
    """What the stages hand on to each other."""

    settings: DemoSettings
    facts: dict[str, Any] = field(default_factory=dict)
    """What each stage returned, by its title."""
    sections: list[Html] = field(default_factory=list)
    """The page, a section for each part of the pipeline."""
    failures: list[str] = field(default_factory=list)
    """One line for each score that is too low."""

    @property
    def storage(self) -> Storage:
        return output_storage(self.settings.storage, "--storage")

    def job(self, file: Any, recipe: Any) -> Job:
        """The training job of the module `file`."""
        return Job(recipe_name(file.__file__), "shapes", recipe, RunOptions(storage=self.storage.uri))

    @property
    def captioner(self) -> Job:
        return self.job(train_resnet_captioner, self.settings.captioner)

    @property
    def vqvae(self) -> Job:
        return self.job(train_vqvae, self.settings.vqvae)

    @property
    def ldm(self) -> Job:
        return self.job(train_ldm, dataclasses.replace(self.settings.ldm, vqvae=self.vqvae.run.uri))

    @property
    def captions(self) -> Storage:
        return self.storage / "captions" / self.captioner.recipe_name / self.captioner.options.name

    @property
    def sweep(self) -> Storage:
        return self.storage / "sweeps" / self.ldm.recipe_name / self.ldm.options.name


# -- training ------------------------------------------------------------------------------------------------------


def _begun(job: Job[Any]) -> RunFile[Any, Any]:
    return read_begun(job.run, type(job.recipe), RECIPES[job.recipe_name].facts_type)


def _changes(demo: Demo, job: Job[Any]) -> list[str]:
    """In what the run that is there differs from `job`: its settings, its data, the VQ-VAE that it works on."""
    try:
        there = _begun(job)
    except InputError as error:  # of another version
        return [str(error)]
    facts = {"dataset_fingerprint": demo.facts["data"]["fingerprint"]}
    if job.recipe_name == demo.ldm.recipe_name:
        facts["vqvae_fingerprint"] = demo.facts["vqvae_fingerprint"]
    theirs = {"settings": recipe_to_json(there.recipe), **{name: getattr(there.facts, name) for name in facts}}
    return difference({"settings": recipe_to_json(job.recipe), **facts}, theirs)


def _trained(demo: Demo, job: Job, train: Callable[[Job], RunSummary], made_of_it: Storage, parts: str = PARTS) -> str:
    """Train, or keep a run that is finished, or under way, with the same settings and data; what was made of another
    one, a sweep with its blocks in `parts`, is removed."""
    fresh = demo.settings.fresh
    if not fresh and job.run.exists("recipe.json"):
        changes = _changes(demo, job)
        if changes:
            print(f"the run that is there differs ({'; '.join(changes[:3])}): trained anew", flush=True)
            fresh = True
        elif job.run.exists("_SUCCESS"):
            print(
                f"{job.run} is finished, trained at commit {_begun(job).commit} (now {source_commit()}): kept "
                "(--fresh trains anew)",
                flush=True,
            )
            demo.facts[job.recipe_name] = json.loads(job.run.read("_SUCCESS"))
            return _said(demo, job)
    if fresh:
        # Before the training, not after it: what the old model made must not be taken for the new one's.
        remove_sweep(made_of_it, parts)
    options = dataclasses.replace(job.options, fresh=fresh)
    demo.facts[job.recipe_name] = train(dataclasses.replace(job, options=options))
    return _said(demo, job)


def _said(demo: Demo, job: Job) -> str:
    facts = demo.facts[job.recipe_name]
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
    return _trained(demo, demo.captioner, train_resnet_captioner.train, demo.captions)


def caption_test_split(demo: Demo) -> str:
    _remove_other(demo.captions, {"num_beams": demo.settings.num_beams})
    facts = caption(
        CaptionSettings(
            run=demo.captioner.run.uri,
            images=(demo.storage / "data" / SHAPES).uri,
            out=demo.captions.uri,
            split=f"split:{SPLIT}",
        ),
        SearchOptions(num_beams=demo.settings.num_beams),
    )
    return f"{facts['num_rows']:,} images, {facts['rows_done_now']:,} of them now"


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
    rows = _test_rows(demo)
    attributes = score_captions(
        [row["image"] for row in rows], [row["caption"] for row in rows], [row["captions"] for row in rows]
    )
    whole_scene = attributes.pop("whole_scene")
    text = json.dumps(attributes, indent=1).encode() + b"\n"
    (demo.storage / "scores" / job.recipe_name).write(f"{job.options.name}-attributes.json", text)
    scores = demo.facts["caption scores"] = attributes | {"bleu4": bleu["bleu4"]}
    demo.failures += failures(attributes)
    print("\n".join(_lines(scores)), flush=True)
    best = f"{_said(demo, job)}; weights of step {demo.facts[job.recipe_name]['best_step']:,}, the best on validation."
    demo.sections += [
        demo_page.caption_scores(scores),
        demo_page.captioned_pictures(rows, whole_scene),
        demo_page.training(
            "Training of the captioner",
            job.run,
            best,
            [
                ("Loss (nats a word)", {"training": "loss", "validation": "validation_loss"}),
                ("Words predicted right", {"training": "correct", "validation": "validation_correct"}),
                ("Learning rate", {"learning rate": "lr"}),
            ],
            "Not all words can be known: five captions of an image word it differently, so the loss stays above 0.",
        ),
    ]
    return (
        f"{attributes['all']['fraction_correct']:.1%} of {sum(attributes['all']['named'].values()):,} attributes right"
    )


def _test_rows(demo: Demo) -> list[dict[str, Any]]:
    """Image, references and caption of every image of the test split."""
    table = read_parts(demo.captions, ["image_id", "caption"])
    captions = dict(zip(table["image_id"].to_pylist(), table["caption"].to_pylist(), strict=True))
    images = read_prepared(demo.storage.uri, SHAPES, ["image_id", "image", "captions", "split"])
    rows = images.filter(pc.field("split") == SPLIT).drop_columns("split").to_pylist()
    return [{**row, "caption": captions[row["image_id"]]} for row in rows]


def failures(attributes: dict[str, Any]) -> list[str]:
    """What is too low in the oracle's scores, a line each; empty where all is well."""
    lines = []
    correct, named = attributes["all"]["fraction_correct"], attributes["named_per_caption"]
    if correct < MIN_CORRECT:
        lines.append(f"{correct:.1%} of the attributes that the captions name are right; {MIN_CORRECT:.0%} are needed")
    needed = MIN_NAMED * attributes["named_per_reference"]
    if named < needed:
        lines.append(
            f"the captions name {named:.2f} attributes each; {needed:.2f} are needed, "
            f"{MIN_NAMED:.0%} of the {attributes['named_per_reference']:.2f} of true captions"
        )
    return lines


def _right(scores: dict[str, Any]) -> list[str]:
    return [
        f"attributes right: {scores['all']['fraction_correct']:.1%} (chance "
        f"{scores['shuffled']['fraction_correct']:.1%}); seen pairs {scores['seen']['fraction_correct']:.1%}, "
        f"pairs never seen in training {scores['held_out']['fraction_correct']:.1%}",
        f"whole scenes right: {scores['all']['whole_scene']:.1%} (chance {scores['shuffled']['whole_scene']:.1%})",
    ]


def _lines(scores: dict[str, Any]) -> list[str]:
    return [
        *_right(scores),
        f"attributes named: {scores['named_per_caption']:.2f} a caption (true captions "
        f"{scores['named_per_reference']:.2f}); BLEU-4 {scores['bleu4']:.1f}",
    ]


def _remove_other(out: Storage, wanted: dict[str, Any], parts: str = PARTS) -> None:
    """Remove what was made with other settings than `wanted`: the demo makes it anew."""
    plan = read_plan(out, parts)
    if plan is None:
        return
    changes = difference(wanted, {name: plan["settings"].get(name) for name in wanted})
    if changes:
        print(f"{out} has other settings ({'; '.join(changes[:3])}): made anew", flush=True)
        remove_sweep(out, parts)


def train_autoencoder(demo: Demo) -> str:
    job = demo.vqvae
    said = _trained(demo, job, train_vqvae.train, demo.sweep, MANIFEST)
    demo.facts["vqvae_fingerprint"] = open_autoencoder(job.run.uri).load().fingerprint()
    return said


def train_generator(demo: Demo) -> str:
    return _trained(demo, demo.ldm, train_ldm.train, demo.sweep, MANIFEST)


def generate_images(demo: Demo) -> str:
    settings = demo.settings
    count = min(settings.num_generated, settings.shapes.num_test)
    wanted = {"count": count, "steps": settings.steps, "guidance": settings.guidance, "sampler": SAMPLER}
    _remove_other(demo.sweep, wanted, MANIFEST)
    facts = generate(
        GenerateSettings(
            run=demo.ldm.run.uri,
            prompts=SHAPES_TEST,
            storage=demo.storage.uri,
            count=count,
            out=demo.sweep.uri,
        ),
        DiffusionOptions(settings.steps, settings.guidance, SAMPLER),
    )
    demo.facts["sweep"] = facts
    return f"{facts['num_images']:,} images, {facts['images_per_s']:.3g} images/s"


def score_images(demo: Demo) -> str:
    """The oracle's word on what the prompts name; shown and not demanded of a training this short."""
    job, facts = demo.ldm, demo.facts["sweep"]
    scores = evaluate_images(ShapesScoreSettings(sweep=demo.sweep.uri, run=job.run.uri))
    print("\n".join(_right(scores)), flush=True)
    manifest, _ = read_manifest(demo.sweep)
    rows = manifest.slice(0, demo_page.NUM_PICTURES).to_pylist()
    images, prompts = [demo.sweep.read(row["key"]) for row in rows], [row["prompt"] for row in rows]
    pictures = [decode_image(image, name=row["key"]) for image, row in zip(images, rows, strict=True)]
    whole_scene = [judge_text(image, text).whole_scene for image, text in zip(pictures, prompts, strict=True)]
    demo.sections += [
        demo_page.image_scores(
            scores,
            f"{facts['num_images']:,} images of {facts['resolution']}², {facts['steps']} steps of {facts['sampler']}, "
            f"guidance {facts['guidance']:g}: {facts['images_per_s']:.3g} images/s. The training is short on purpose; "
            "python jobs/train_ldm.py trains the same variant to its end.",
        ),
        demo_page.generated_pictures(images, prompts, whole_scene),
        demo_page.training(
            "Training of the VQ-VAE",
            demo.vqvae.run,
            _said(demo, demo.vqvae),
            [
                ("Loss", {"training": "loss", "validation": "validation_loss"}),
                ("Reconstruction (PSNR, dB)", {"training": "psnr", "validation": "validation_psnr"}),
                ("Codes used (share)", {"a batch": "codes_used", "validation": "validation_codes_used"}),
            ],
        ),
        demo_page.training(
            "Training of the latent diffusion",
            job.run,
            _said(demo, job),
            [
                ("Loss", {"training": "loss", "validation": "validation_loss"}),
                ("Learning rate", {"learning rate": "lr"}),
            ],
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
    ("train a latent diffusion", train_generator),
    ("generate images", generate_images),
    ("score the images", score_images),
]
"""Title and function, in order; each function adds to the Demo and says in a few words what work was done."""


def write_page(demo: Demo, seconds: list[tuple[str, str, float]]) -> None:
    stages = table(("stage", "seconds now"), [(f"{name}: {work}", f"{spent:.1f}") for name, work, spent in seconds])
    verdict = "; ".join(demo.failures) or "All scores are above what the demo demands."
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    text = page(
        "From images to captions and from prompts to images, on Ray",
        paragraph(verdict, style="bad" if demo.failures else "good"),
        *demo.sections,
        section("How it was made", stages, paragraph(f"{when}, commit {source_commit()}", style="soft")),
    )
    demo.storage.write(PAGE, text.encode())


def run_demo(settings: DemoSettings) -> Demo:
    """All stages, then the page, which is written for low scores too."""
    if settings.shapes.num_test < 2:
        raise InputError(f"--shapes.num-test {settings.shapes.num_test}: at least 2 are needed to score them")
    if settings.num_generated < 2:
        raise InputError(f"--num-generated {settings.num_generated}: at least 2 are needed to score them")
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

    places = {"captioner": demo.captioner.run, "generator": demo.ldm.run, "gallery": demo.sweep}
    names = {"captioner": "captions:", "generator": "images:"}
    words = [f"{kind}={names.get(kind, '')}{near(place.uri)}" for kind, place in places.items()]
    return f"SERVE_API_KEYS={key} {shlex.join([near(sys.executable), '-m', 'serve.control', 'start', *words])}"


def main() -> None:
    demo = run_demo(tyro.cli(DemoSettings, description=__doc__, prog="python jobs/demo.py"))
    if demo.failures:
        sys.exit(f"error: {'; '.join(demo.failures)}")


if __name__ == "__main__":
    run_job(main)
