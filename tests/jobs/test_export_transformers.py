"""jobs/export.py --to transformers: the exported BLIP-2 gives the same scores and captions."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from safetensors import safe_open
from transformers import BertConfig, BertModel, BertTokenizer, Blip2Config, Blip2ForImageTextRetrieval

from jobs.export import ExportSettings, export
from mmcore import checkpoint
from mmcore.captioners import qformer_captioner, qformer_llm
from mmcore.captioners.bridge import BridgeSettings
from mmcore.captioners.decoding import greedy
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.qformer import MatchingHeads, QFormer
from mmcore.captioners.qformer_weights import blip2_settings, load_blip2, load_lavis_head
from mmcore.captioners.search_options import GREEDY
from mmcore.errors import InputError
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder
from mmcore.metrics.bleu import tokenize
from mmcore.storage import Storage
from mmcore.text import WordVocabulary
from mmcore.trained import to_transformers
from mmcore.trained.captioner import open_captioner

SIDE = 32
WORDS = ["a", "dog", "runs", "on", "the", "grass", ".", "two", "children", "play", "in", "water", "and", ","]
PIXELS = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
PIXELS[1:, :, :20] //= np.array([8, 1, 8], np.uint8)
PIXELS[2] = 255 - PIXELS[2]


def write_encoder(kind: str, folder: Path) -> Path:
    if kind == "resnet":
        return tiny_runs.write_resnet(folder)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=small | {"patch_size": 8, "image_size": SIDE, "initializer_range": 0.3},
        qformer_config=small | {"vocab_size": 8, "use_qformer_text_input": True},
        num_query_tokens=2,
    )
    Blip2ForImageTextRetrieval(config).save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(tokens), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder)
    return folder


def facts_of(recipe: Any, words: Any) -> CaptionerFacts:
    encoder = FrozenVisionEncoder(recipe.encoder, SIDE, tokens=getattr(recipe, "tokens", "patch"))
    return CaptionerFacts(words.token_ids, *encoder.token_shape, encoder_fingerprint=encoder.fingerprint())


def write_run(folder: Path, name: str, recipe: Any, words: Any, facts: Any) -> Path:
    """A finished run whose random weights are large, so that outputs depend on the image."""
    model = recipe.build(facts)
    random = torch.Generator().manual_seed(3)
    weights = {}
    for key, value in checkpoint.trainable_state(model).items():
        # Adapters are without weights until the language model is loaded.
        first = torch.zeros(value.shape) if value.is_meta else value.detach()
        weights[key] = first + (key != "log_scale") * 0.25 * torch.randn(value.shape, generator=random)
        if key == "qformer.lm_head.bias":
            weights[key][facts.token_ids.eos_id] = -3.0  # not all captions end at once
    tiny_runs.write(folder, name, recipe, facts, weights)
    for file, data in words.files().items():
        Storage(str(folder / "model" / "tokenizer")).write(file, data)
    return folder


def qformer_run(tmp_path: Path, kind: str = "resnet", *, scratch: bool = False, **changes: Any) -> Path:
    recipe = dataclasses.replace(
        qformer_captioner.VARIANTS["smoke"],
        encoder=str(write_encoder(kind, tmp_path / kind)),
        text_model=SCRATCH if scratch else str(write_bert(tmp_path / "bert")),
        image_size=SIDE,
        max_length=12,
        cross_every=2,
        **changes,
    )
    words: Any = WordVocabulary(tuple(WORDS), lowercase=True)
    if not scratch:
        words = recipe.build_tokenizer(None)  # type: ignore[arg-type]
    return write_run(
        tmp_path / "runs" / "qformer" / "a", "qformer", recipe, words, recipe.complete(facts_of(recipe, words))
    )


def language_run(tmp_path: Path, kind: str = "resnet", **changes: Any) -> Path:
    bridge = BridgeSettings(num_queries=3, bridge_width=24, bridge_layers=2, bridge_heads=2)
    recipe = dataclasses.replace(
        qformer_llm.VARIANTS["smoke"],
        encoder=str(write_encoder(kind, tmp_path / kind)),
        image_size=SIDE,
        bridge=dataclasses.replace(bridge, bridge=changes.pop("bridge", "qformer")),
        **{"max_length": 20, **changes},
    )
    words = recipe.build_tokenizer(None)  # type: ignore[arg-type]
    run = tmp_path / "runs" / "qformer_llm" / "a"
    return write_run(run, "qformer_llm", recipe, words, recipe.complete(facts_of(recipe, words)))


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the code in README.md of the folder leaves."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    Image.fromarray(PIXELS[0]).save(folder / "image.jpg", quality=100)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("blip2", {"image_norm": False}),
        ("blip2", {"image_norm": True}),
        ("resnet", {"image_norm": True}),
        ("resnet", {"image_norm": False}),
        ("resnet", {"scratch": True}),
    ],
)
def test_the_class_for_retrieval_gives_the_same_scores_and_captions(
    kind: str, changes: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = qformer_run(tmp_path, kind, **changes)
    folder = tmp_path / "exported"
    found = export(ExportSettings(run=str(run), out=str(folder), to="transformers"))
    assert found <= to_transformers.TOLERANCE
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".md",
        ".txt",
        ".jinja",
    }
    _, loaded = Blip2ForImageTextRetrieval.from_pretrained(folder, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]

    theirs, captioner = run_readme(folder, monkeypatch), open_captioner(str(run)).load()
    pixels = np.array(Image.open(folder / "image.jpg"))[None]
    tokens = captioner.encoder(pixels)
    # transformers' `decode` spaces marks of punctuation in its own way.
    words, expected = (
        tokenize(text, tokens="marks") for text in (theirs["caption"], *captioner.caption(pixels, GREEDY))
    )
    assert words == expected
    ids = torch.tensor([captioner.tokenizer.encode("a dog runs on the grass .", 12)])
    similarity = captioner.model.image_features(tokens) @ captioner.model.text_features(ids, torch.ones_like(ids)).T
    # measured: 3e-8
    torch.testing.assert_close(theirs["similarity"], similarity.amax(dim=1), rtol=0, atol=1e-5)
    matching = captioner.model.match(captioner.model.memory(tokens), ids, torch.ones_like(ids)).sigmoid()
    torch.testing.assert_close(theirs["matching"], matching, rtol=0, atol=1e-5)

    # The same folder gives the first weights of a Q-Former of ours.
    settings = blip2_settings(str(folder), flag="--bridge-weights")
    qformer, heads = QFormer(settings).eval(), MatchingHeads(settings.width, 16)
    load_blip2(qformer, str(folder), flag="--bridge-weights", heads=heads)
    load_lavis_head(qformer, str(folder / "language_head.safetensors"), flag="--head")
    tokens = captioner.encoder(PIXELS)
    captions = captioner.model.caption(tokens, GREEDY)
    assert greedy(qformer, captioner.model.memory(tokens), 12, captioner.model.token_ids) == captions
    assert len({tuple(each) for each in captions}) > 1


@pytest.mark.parametrize(("kind", "lora"), [("blip2", 0), ("resnet", 2)])
def test_the_class_for_generation_writes_the_same_captions(
    kind: str, lora: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = language_run(tmp_path, kind, lora=lora)
    folder = tmp_path / "exported"
    found = export(ExportSettings(run=str(run), out=str(folder), to="transformers"))
    assert found <= to_transformers.TOLERANCE
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name]  # noqa: SIM118
    theirs, captioner = run_readme(folder, monkeypatch), open_captioner(str(run)).load()
    pixels = np.array(Image.open(folder / "image.jpg"))[None]
    assert theirs["caption"] == captioner.caption(pixels, captioner.options)[0]
    assert theirs["caption"]


def test_a_vision_model_without_layers_refuses_images(tmp_path: Path) -> None:
    export(ExportSettings(run=str(qformer_run(tmp_path)), out=str(tmp_path / "out"), to="transformers"))
    model = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, 3, dtype=torch.long))


def test_runs_that_transformers_has_no_place_for_are_refused(tmp_path: Path) -> None:
    def refusal(run: Path, **settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            export(ExportSettings(run=str(run), out=str(tmp_path / "out"), **{"to": "transformers", **settings}))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    run = qformer_run(tmp_path / "q")
    assert "--to diffusers: a run of qformer is for transformers; give --to transformers" in refusal(
        run, to="diffusers"
    )
    assert "--text-encoder 'bert': only a generator has one" in refusal(run, text_encoder="bert")
    assert "--encoder 'x': no vision model in a folder" in refusal(run, encoder="x")
    assert "trained on" in refusal(run, encoder=str(write_encoder("blip2", tmp_path / "other")))
    mlp = language_run(tmp_path / "mlp", bridge="mlp")
    assert "its bridge is of kind mlp; transformers' BLIP-2 has a Q-Former there" in refusal(mlp)
    ldm = tiny_runs.write_latent_run(tmp_path / "runs" / "ldm" / "a")
    assert "--to transformers: a run of ldm is for diffusers; give --to diffusers" in refusal(ldm)
    assert "--encoder 'x': only a captioner has one" in refusal(ldm, to="diffusers", encoder="x")
    assert "--language-model 'x': only a captioner" in refusal(ldm, to="diffusers", language_model="x")
