"""All recipes by name. A run is stored under the name of its recipe: ``runs/{recipe}/{name}``.

    python -m mmcore.catalogue sizes

prints a JSON line for each recipe: its parameters at full size, and those that Table 1 of the report states. It reads
no data and no weights.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mmcore.captioners import (
    clip_captioner,
    contrastive,
    cross_attention,
    full_size,
    qformer_captioner,
    qformer_llm,
    table_1,
)
from mmcore.captioners.facts import CaptionerFacts, ContrastiveFacts
from mmcore.errors import InputError
from mmcore.generators import (
    autoregressive,
    infinity_recipe,
    infinity_tokenizer,
    latent_diffusion,
    pixel_diffusion,
    sdxl_lora,
    vqvae,
)
from mmcore.generators import full_size as generators_full_size
from mmcore.generators.facts import (
    AutoregressiveFacts,
    DiffusionFacts,
    InfinityFacts,
    InfinityTokenizerFacts,
    SdxlLoraFacts,
    VQVAEFacts,
)
from mmcore.run_files import RunFile, read_fields, run_file_from_json
from mmcore.storage import Storage

Kind = Literal["captioner", "generator", "autoencoder", "retriever"]


@dataclass(frozen=True)
class Entry:
    """One recipe."""

    kind: Kind
    recipe_type: type[Any]
    facts_type: type[Any]
    variants: dict[str, Any]
    table_1: tuple[float, float] | None = None
    """Total and trainable parameters in millions, from Table 1 of the report."""
    remark: str = ""
    """Why the sizes of the variant `report` differ from those."""
    also: tuple[Kind, ...] = ()
    """Other kinds that a finished run can be opened as."""
    stage: tuple[str, str] | None = None
    """Job and stage that train it: ``train_JOB.py --stage STAGE``. None is the job of the recipe's name."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return (self.kind, *self.also)


RECIPES: dict[str, Entry] = {
    "resnet_captioner": Entry(
        "captioner",
        cross_attention.CrossAttentionCaptionerRecipe,
        CaptionerFacts,
        cross_attention.VARIANTS,
        table_1=(34.2, 21.5),
        remark=table_1.RESNET,
    ),
    "clip_captioner": Entry(
        "captioner",
        cross_attention.CrossAttentionCaptionerRecipe,
        CaptionerFacts,
        clip_captioner.VARIANTS,
        table_1=(108.0, 21.5),
        remark=table_1.CLIP,
    ),
    "qformer": Entry(
        "captioner",
        qformer_captioner.QFormerRecipe,
        qformer_captioner.QFormerFacts,
        qformer_captioner.VARIANTS,
        table_1=(1121.0, 110.0),
        remark=table_1.QFORMER,
        also=("retriever",),
    ),
    "qformer_llm": Entry(
        "captioner",
        qformer_llm.LanguageCaptionerRecipe,
        qformer_llm.LanguageCaptionerFacts,
        qformer_llm.VARIANTS,
        table_1=(2274.0, 188.3),
        remark=table_1.LANGUAGE_MODEL,
    ),
    "clip": Entry("retriever", contrastive.ContrastiveRecipe, ContrastiveFacts, contrastive.VARIANTS),
    "pixel_diffusion": Entry(
        "generator",
        pixel_diffusion.PixelDiffusionRecipe,
        DiffusionFacts,
        pixel_diffusion.VARIANTS,
    ),
    "ldm": Entry(
        "generator",
        latent_diffusion.LatentDiffusionRecipe,
        DiffusionFacts,
        latent_diffusion.VARIANTS,
    ),
    "autoregressive": Entry(
        "generator",
        autoregressive.AutoregressiveRecipe,
        AutoregressiveFacts,
        autoregressive.VARIANTS,
    ),
    "infinity": Entry(
        "generator",
        infinity_recipe.InfinityRecipe,
        InfinityFacts,
        infinity_recipe.VARIANTS,
        stage=("infinity", "transformer"),
    ),
    "sdxl_lora": Entry("generator", sdxl_lora.SdxlLoraRecipe, SdxlLoraFacts, sdxl_lora.VARIANTS),
    "vqvae": Entry("autoencoder", vqvae.VQVAERecipe, VQVAEFacts, vqvae.VARIANTS),
    "infinity_tokenizer": Entry(
        "autoencoder",
        infinity_tokenizer.InfinityTokenizerRecipe,
        InfinityTokenizerFacts,
        infinity_tokenizer.VARIANTS,
        stage=("infinity", "tokenizer"),
    ),
}


def names(kind: Kind) -> list[str]:
    """The names of the recipes that can be opened as one kind."""
    return [name for name, entry in RECIPES.items() if kind in entry.kinds]


def read_model_file(run: Storage, kind: Kind) -> RunFile[Any, Any]:
    """``model/recipe.json`` of a finished run. Raises InputError if the run is unfinished or of another kind."""
    fields, where = read_fields(run)
    recipe_name = fields["recipe"]
    entry = RECIPES.get(recipe_name)
    if entry is None or kind not in entry.kinds:
        raise InputError(
            f"{where}: recipe {recipe_name!r} is not of kind {kind}; name a run of {', '.join(names(kind))}"
        )
    return run_file_from_json(fields, entry.recipe_type, entry.facts_type, where)


def sizes() -> Iterator[dict[str, Any]]:
    """Parameters of each recipe at full size: of its variant `report`, or of `best` where the report has none."""
    for name, entry in RECIPES.items():
        variant = "report" if "report" in entry.variants else "best"
        recipe = entry.variants[variant]
        if entry.kind in ("captioner", "retriever"):
            total, trainable = full_size.sizes(recipe)
        else:
            # What a generator of codes or latents is trained on; an autoencoder needs none.
            autoencoders = infinity_tokenizer.VARIANTS if name == "infinity" else vqvae.VARIANTS
            total, trainable = generators_full_size.sizes(recipe, autoencoders[variant])
        of_report = [round(millions * 1e6) for millions in entry.table_1] if entry.table_1 else [None, None]
        line = {"name": name, "variant": variant, "total": total, "trainable": trainable}
        line |= dict(zip(("report_total", "report_trainable"), of_report, strict=True))
        yield line | ({"remark": entry.remark} if entry.remark else {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcore.catalogue", description=__doc__)
    parser.add_argument("what", choices=["sizes"], help="a JSON line for each recipe")
    parser.parse_args()
    for line in sizes():
        print(json.dumps(line))


if __name__ == "__main__":
    main()
