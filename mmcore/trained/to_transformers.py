"""Exports a Q-Former and its language model as BLIP-2 of transformers, and measures the difference of their outputs.

A run of ``train_qformer.py`` becomes a `Blip2ForImageTextRetrieval`, one of ``train_qformer_llm.py`` with the bridge
`qformer` a `Blip2ForConditionalGeneration`. `mmcore.captioners.qformer_weights` has the names. What these classes have
no place for is beside them, and the README.md of the folder has the code that puts it there:

* Another image encoder than BLIP-2's, or a LayerNorm after it. The encoder is in ``encoder/``. The class has a vision
  model without layers in its place, which refuses images; its last LayerNorm is that of the run. `Tower` replaces it.
* The language head of ITG. It is in ``language_head.safetensors``, under the names of LAVIS. `write_caption` needs it.

Shapes: B images, Q queries, L image tokens, E channels of an image token, P pixels a side.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmcore.captioners.bridge import QFormerBridge
from mmcore.captioners.qformer_captioner import QFormerCaptioner
from mmcore.captioners.qformer_llm import LanguageCaptioner
from mmcore.captioners.qformer_weights import generation_state, language_head, qformer_config, retrieval_state
from mmcore.captioners.search_options import GREEDY, LanguageSearchOptions
from mmcore.captioners.temperature import temperature_of
from mmcore.errors import InputError
from mmcore.frozen.language import FrozenLanguageModel
from mmcore.frozen.tokenizers import PieceTokenizer, first_sentence, words_tokenizer
from mmcore.frozen.vision import PATCH
from mmcore.text import WordVocabulary
from mmcore.trained.captioner import TrainedCaptioner

# Largest allowed difference of similarities and probabilities, and of image tokens as a share of the largest. On a CPU
# the tests measure 1.5e-8 at most.
TOLERANCE = 1e-4
_HEAD, _ENCODER, _IMAGE = "language_head.safetensors", "encoder", "<image>"
# Short ones: a text above the longest length keeps its end token there, and loses it here.
_CHECK_TEXTS = ["a dog", "two children play ."]


class Tower(nn.Module):
    """Another image encoder in the place of BLIP-2's vision model."""

    def __init__(self, encoder: nn.Module, norm: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.norm, self.pooled = encoder, norm, pooled

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        outputs = self.encoder(pixel_values)
        tokens = outputs.pooler_output.flatten(1)[:, None] if self.pooled else outputs.last_hidden_state
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=self.norm(tokens))


@torch.no_grad()
def write_caption(
    model: Any, head: dict[str, Tensor], tokenizer: Any, pixel_values: Tensor, max_tokens: int
) -> list[int]:
    """Greedy search for the caption of one image (1, 3, P, P): its ids, without begin and end."""
    image = model.vision_model(pixel_values=pixel_values).last_hidden_state
    num_queries = model.query_tokens.shape[1]
    end_id = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    silent = [index for index in tokenizer.all_special_ids if index != end_id]
    ids = [tokenizer.bos_token_id]
    while len(ids) <= max_tokens and ids[-1] != end_id:
        embedded = torch.cat([model.query_tokens, model.embeddings(input_ids=torch.tensor([ids]))], dim=1)
        # Words see all queries and the words before. Queries see no words.
        visible = torch.ones(embedded.shape[1], embedded.shape[1], dtype=torch.bool).tril()
        visible[:num_queries, :num_queries] = True
        hidden = model.qformer(
            query_embeds=embedded,
            query_length=num_queries,
            attention_mask=visible[None, None],
            encoder_hidden_states=image,
        ).last_hidden_state[0, -1]
        name = "Qformer.cls.predictions"
        dense, norm = f"{name}.transform.dense", f"{name}.transform.LayerNorm"
        hidden = F.gelu(F.linear(hidden, head[f"{dense}.weight"], head[f"{dense}.bias"]))
        eps = model.config.qformer_config.layer_norm_eps
        hidden = F.layer_norm(hidden, hidden.shape, head[f"{norm}.weight"], head[f"{norm}.bias"], eps)
        logits = F.linear(hidden, model.embeddings.word_embeddings.weight, head[f"{name}.bias"])
        logits[silent] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[1:-1] if ids[-1] == end_id else ids[1:]


@torch.no_grad()
def generate_ids(model: Any, tokenizer: Any, pixel_values: Tensor, prompt: str) -> list[list[int]]:
    """Greedy search for the caption of each image (B, 3, P, P) behind prompt, begin token and image."""
    text = tokenizer(prompt)["input_ids"]
    if text[-1:] == [tokenizer.eos_token_id]:
        text = text[:-1]
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = torch.tensor([*text, begin, *[model.config.image_token_index] * model.config.num_query_tokens])
    ids = ids.expand(len(pixel_values), -1)
    # Given as embeddings, the prompt does not count for the repetition penalty.
    embedded = model.get_input_embeddings()(ids)
    # The language model would else take its own settings.
    settings = model.generation_config
    return model.generate(
        pixel_values, inputs_embeds=embedded, attention_mask=torch.ones_like(ids), generation_config=settings
    ).tolist()


class _Exporter:
    """What both classes share: the image encoder, its processor and the README."""

    def __init__(self, trained: TrainedCaptioner, image_norm: nn.Module) -> None:
        import transformers

        if trained.encoder is None:
            raise InputError(
                "--run: it trained its own image encoder, for which transformers has no class; train with --encoder "
                "NAME_OR_FOLDER"
            )
        self.trained, self.encoder, self.image_norm = trained, trained.encoder, image_norm
        self.has_norm = isinstance(image_norm, nn.LayerNorm)
        self.encoder_class = type(self.encoder.model)
        own = transformers.Blip2VisionModel
        self.is_blip2 = self.encoder_class is own and self.encoder.tokens == PATCH and not self.has_norm
        if getattr(transformers, self.encoder_class.__name__, None) is None:
            raise InputError(
                f"--encoder {self.encoder.name!r}: {self.encoder_class.__name__} is no class that transformers opens "
                "by itself"
            )

    def vision_config(self, width: int) -> dict[str, Any]:
        """The configuration of BLIP-2's vision model, or of one without layers in its place."""
        if self.is_blip2:
            return self.encoder.model.config.to_dict()
        sizes = {"hidden_size": width, "intermediate_size": 1, "num_hidden_layers": 0, "num_attention_heads": 1}
        eps = {"layer_norm_eps": self.image_norm.eps} if isinstance(self.image_norm, nn.LayerNorm) else {}
        return {**sizes, **eps, "image_size": 1, "patch_size": 1}

    def vision_state(self, model: Any) -> dict[str, Tensor]:
        """The weights of the vision model of `model`."""
        if self.is_blip2:
            own = self.encoder.model.state_dict()
        else:
            own = {name: torch.zeros(value.shape) for name, value in model.vision_model.state_dict().items()}
            own["post_layernorm.weight"].fill_(1.0)
            own |= {f"post_layernorm.{name}": value for name, value in self.image_norm.state_dict().items()}
        return {f"vision_model.{name}": value for name, value in own.items()}

    def built(self, kind: Any, config: Any, state: dict[str, Tensor]) -> Any:
        """The model of transformers with these weights, which it shares, and those of the vision model."""
        with torch.device("meta"):
            model = kind(config)
        weights = {name: value.contiguous() for name, value in (state | self.vision_state(model)).items()}
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        return model.eval()

    def save(self, model: Any, tokenizer: Any, folder: str, code: str, more: str) -> None:
        from transformers import BlipImageProcessor

        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        BlipImageProcessor(
            size={"height": self.encoder.image_size, "width": self.encoder.image_size},
            resample=Image.Resampling.BICUBIC,
            image_mean=list(self.encoder.mean),
            image_std=list(self.encoder.std),
        ).save_pretrained(folder)
        replaced, imports, beside = "", "", ""
        if not self.is_blip2:
            # Else the names would be those of the larger model that it was read from.
            self.encoder.model.save_pretrained(str(Path(folder, _ENCODER)), save_original_format=False)
            norm = "model.vision_model.post_layernorm" if self.has_norm else "nn.Identity()"
            load = f"{self.encoder_class.__name__}.from_pretrained(f'{{folder}}/{_ENCODER}').eval()"
            imports = f"from transformers import {self.encoder_class.__name__}\n"
            pooled = self.encoder.tokens != PATCH
            beside = (
                f"\nIts image encoder is in `{_ENCODER}/`. The class has a vision model without layers in its place."
            )
            replaced = f"{inspect.getsource(Tower)}\n\nmodel.vision_model = Tower({load}, {norm}, pooled={pooled})\n"
        readme = _README.format(
            kind=type(model).__name__, imports=imports, replaced=replaced, code=code, more=more + beside
        )
        Path(folder, "README.md").write_text(readme)

    def loaded(self, kind: Any, folder: str) -> Any:
        """The saved model, with the encoder in its place."""
        model = kind.from_pretrained(folder, trust_remote_code=False).eval()
        if not self.is_blip2:
            encoder = self.encoder_class.from_pretrained(str(Path(folder, _ENCODER)), trust_remote_code=False).eval()
            norm = model.vision_model.post_layernorm if self.has_norm else nn.Identity()
            model.vision_model = Tower(encoder, norm, self.encoder.tokens != PATCH)
        return model

    def check_images(self, folder: str) -> tuple[np.ndarray, Tensor]:
        """Two images: as pixels for us, and as the processor of the folder gives them."""
        from transformers import AutoImageProcessor

        side = self.encoder.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        return pixels, processor(images=list(pixels), return_tensors="pt")["pixel_values"]


class RetrievalExport(_Exporter):
    """A trained Q-Former as `Blip2ForImageTextRetrieval`."""

    loader = "Blip2ForImageTextRetrieval"
    compared_on = "similarities and matching scores of two images and texts"

    def __init__(self, trained: TrainedCaptioner) -> None:
        """Raises InputError for a run that transformers has no place for."""
        self.model: QFormerCaptioner = trained.model
        super().__init__(trained, self.model.image_norm)
        self.tokenizer = trained.tokenizer

    def _own_tokenizer(self) -> Any:
        """A fast tokenizer that gives texts as ITC and ITM read them."""
        if isinstance(self.tokenizer, WordVocabulary):
            return words_tokenizer(self.tokenizer, first_id=self.model.facts.first_id)
        assert isinstance(self.tokenizer, PieceTokenizer), "a Q-Former has one of the two"
        return copy.deepcopy(self.tokenizer.tokenizer)

    def save(self, folder: str) -> None:  # type: ignore[override]
        from transformers import Blip2Config, Blip2ForImageTextRetrieval

        qformer = self.model.qformer
        config = Blip2Config(
            vision_config=self.vision_config(qformer.settings.memory_width),
            qformer_config=qformer_config(qformer.settings).to_dict(),
            num_query_tokens=qformer.settings.num_queries,
            image_text_hidden_size=self.model.heads.vision_projection.out_features,
        )
        model = self.built(Blip2ForImageTextRetrieval, config, retrieval_state(qformer, self.model.heads))
        tokenizer = self._own_tokenizer()
        max_length = tokenizer.model_max_length = self.trained.max_length
        code = f"{inspect.getsource(write_caption)}\n\n{_RETRIEVAL.format(head=_HEAD, max_tokens=max_length)}"
        super().save(model, tokenizer, folder, code, more=_OF_RETRIEVAL.format(head=_HEAD, max_length=max_length))
        temperature = temperature_of(self.model.log_scale).reshape(())
        head = {name: value.contiguous() for name, value in language_head(qformer).items()}
        save_file(head | {"temp": temperature}, Path(folder, _HEAD), metadata={"format": "pt"})

    @torch.inference_mode()
    def difference(self, folder: str) -> float:
        """The largest difference of the similarities and of the probabilities; 1 for another caption."""
        from transformers import AutoTokenizer, Blip2ForImageTextRetrieval

        model = self.loaded(Blip2ForImageTextRetrieval, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        pixels, pixel_values = self.check_images(folder)
        inputs = tokenizer(_CHECK_TEXTS, padding=True, truncation=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ours, tokens = self.model, self.encoder(pixels)
        encoded = [self.tokenizer.encode(text, self.trained.max_length) for text in _CHECK_TEXTS]
        ids_BT = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in encoded], batch_first=True)
        mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([len(ids) for ids in encoded])[:, None]
        similarity = (ours.image_features(tokens) @ ours.text_features(ids_BT, mask_BT).T).amax(dim=1)
        matching = ours.match(ours.memory(tokens), ids_BT, mask_BT).sigmoid()
        their_similarity = model(pixel_values, **inputs).logits_per_image
        logits = model(pixel_values, **inputs, use_image_text_matching_head=True).logits_per_image
        head, length = load_file(Path(folder, _HEAD)), min(GREEDY.max_length, self.trained.max_length)
        theirs = [write_caption(model, head, tokenizer, image[None], length) for image in pixel_values]
        return max(
            float((similarity - their_similarity).abs().max()),
            float((matching - logits.softmax(dim=-1)[:, 1]).abs().max()),
            float(ours.caption(tokens, GREEDY) != theirs),
        )


class GenerationExport(_Exporter):
    """A trained Q-Former and its language model as `Blip2ForConditionalGeneration`."""

    loader = "Blip2ForConditionalGeneration"
    compared_on = "tokens and captions of two images"

    def __init__(self, trained: TrainedCaptioner) -> None:
        """Raises InputError for a run that transformers has no place for."""
        self.model: LanguageCaptioner = trained.model
        bridge, settings = self.model.bridge, self.model.recipe.bridge
        if not isinstance(bridge, QFormerBridge):
            raise InputError(
                f"--run: its bridge is of kind {settings.bridge}; transformers' BLIP-2 has a Q-Former there; train "
                "with --bridge qformer"
            )
        if settings.instruct:
            raise InputError("--run: its Q-Former reads the prompt, which transformers' BLIP-2 cannot; train without "
                             "--instruct")  # fmt: skip
        super().__init__(trained, bridge.image_norm)
        self.bridge, self.language_model = bridge, self.model.language_model
        self.options = LanguageSearchOptions()

    def save(self, folder: str) -> None:  # type: ignore[override]
        from transformers import Blip2Config, Blip2ForConditionalGeneration, GenerationConfig

        tokenizer = copy.deepcopy(self.language_model.tokenizer.tokenizer)
        tokenizer.add_tokens([_IMAGE], special_tokens=True)
        image_id = tokenizer.convert_tokens_to_ids(_IMAGE)
        text_config = copy.deepcopy(self.language_model.model.config)
        text_config.get_text_config().vocab_size = max(text_config.get_text_config().vocab_size, image_id + 1)
        settings = self.bridge.qformer.settings
        config = Blip2Config(
            vision_config=self.vision_config(settings.memory_width),
            qformer_config=qformer_config(settings).to_dict() | {"use_qformer_text_input": False},
            text_config=text_config.to_dict(),
            num_query_tokens=settings.num_queries,
            image_token_index=image_id,
        )
        state = generation_state(self.bridge.qformer, self.bridge.projection)
        language = language_state(self.language_model, text_config.get_text_config().vocab_size)
        state |= {f"language_model.{name}": value for name, value in language.items()}
        model = self.built(Blip2ForConditionalGeneration, config, state)
        prompt, writer = self.model.recipe.prompt, self.model.writer(self.model.recipe.prompt, self.options)
        ends = {writer.end_id, *writer.other_ends, *writer.closing_V.nonzero().flatten().tolist()}
        silent = {*writer.silent.tolist(), image_id} - {writer.end_id, *writer.other_ends}
        model.generation_config = GenerationConfig(
            bos_token_id=self.model.token_ids.bos_id,
            eos_token_id=sorted(ends),
            pad_token_id=self.language_model.tokenizer.own_eos_id,
            suppress_tokens=sorted(silent),
            repetition_penalty=self.options.repetition_penalty,
            max_new_tokens=min(self.options.max_length, self.trained.max_length),
        )
        code = f"{inspect.getsource(generate_ids)}\n\n{_GENERATION.format(prompt=prompt)}"
        super().save(model, tokenizer, folder, code, more=_OF_GENERATION)

    @torch.inference_mode()
    def difference(self, folder: str) -> float:
        """The largest difference of the image tokens, as a share of the largest; 1 for another caption."""
        from transformers import AutoTokenizer, Blip2ForConditionalGeneration

        model = self.loaded(Blip2ForConditionalGeneration, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        pixels, pixel_values = self.check_images(folder)
        ours = self.model.image_tokens(self.encoder(pixels), self.model.recipe.prompt)
        theirs = model.get_image_features(pixel_values).pooler_output
        written = [
            first_sentence(
                str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            ).strip()
            for ids in generate_ids(model, tokenizer, pixel_values, self.model.recipe.prompt)
        ]
        share = float((ours - theirs).abs().max() / ours.abs().max())
        return max(share, float(written != self.trained.caption(pixels, self.options)))


def language_state(language_model: FrozenLanguageModel, num_rows: int) -> dict[str, Tensor]:
    """The weights of the language model with adapters added to them, and with `num_rows` rows for tokens.

    A new row is the mean of the others, as in transformers' `resize_token_embeddings`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = language_model.model
    adapted: dict[str, Any] = {name: each for name, each in model.named_modules() if isinstance(each, BaseTunerLayer)}
    embeddings = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    of_tokens = {value.data_ptr() for each in embeddings for value in each.parameters()}
    grown: dict[int, Tensor] = {}  # tied weights stay one tensor
    state = {}
    for name, value in model.state_dict().items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer in adapted:
            value = value + adapted[layer].get_delta_weight("default").to(value)
        if value.data_ptr() in of_tokens and len(value) < num_rows:
            rows = value.mean(dim=0, keepdim=True).expand(num_rows - len(value), *value.shape[1:])
            value = grown.setdefault(value.data_ptr(), torch.cat([value, rows]))
        state[name.replace(".base_layer.", ".")] = value
    return state


_README = """# A BLIP-2 of transformers

`transformers.{kind}.from_pretrained` loads this folder. {more}
The code below was run when the folder was written, and its outputs were those of the trained model.

```python
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, {kind}
{imports}from typing import Any

folder = "."  # this folder
model = {kind}.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
pixel_values = AutoImageProcessor.from_pretrained(folder)(
    images=Image.open("image.jpg"), return_tensors="pt"
)["pixel_values"]


{replaced}

{code}```
"""
_OF_RETRIEVAL = """Its language head, for captions, is in `{head}`, as the class has
no place for it. That file has the names of LAVIS. `temp` is what divides the similarities in training.
The tokenizer cuts texts at {max_length} tokens and keeps the end token. In training it was cut off too."""
_RETRIEVAL = """text = tokenizer(["a dog runs on the grass ."], padding=True, truncation=True, return_tensors="pt")
text.pop("token_type_ids", None)
with torch.no_grad():
    similarity = model(pixel_values, **text).logits_per_image
    matching = model(pixel_values, **text, use_image_text_matching_head=True).logits_per_image.softmax(-1)[:, 1]
caption = tokenizer.decode(write_caption(model, load_file(f"{{folder}}/{head}"), tokenizer, pixel_values, {max_tokens}))
"""
_OF_GENERATION = """It was trained with the image after prompt and begin token.
A caption ends with a line break or a sentence."""
_GENERATION = """(ids,) = generate_ids(model, tokenizer, pixel_values, {prompt!r})
caption = tokenizer.decode(ids, skip_special_tokens=True).strip()
"""
