"""What encodes on the workers of Ray Data: images and captions into tensors of a column, one an image."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from jobs.runtime.blocks import Columns
from jobs.runtime.image_blocks import ImageRows
from mmcore.data.columns import VALUE, column_table
from mmcore.frozen.text import FrozenTextEncoder
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder, Tokens, pixels_from_bytes
from mmcore.generators.code_rows import code_dtype
from mmcore.generators.sdxl_frozen import SdxlImageEncoder, SdxlTextEncoder, crop_centre
from mmcore.generators.sdxl_rows import EMBEDS, MOMENTS, POOLED, SIZES
from mmcore.images import decode_image
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_autoencoder

# Rows that an encoder takes at once.
_ENCODE_BATCH = 32
AutoencoderOutput = Literal["latents", "codes"]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pixel_batches(rows: ImageRows, image_size: int, flip: bool) -> Iterator[np.ndarray]:
    """The images of `rows` as uint8 (B, P, P, 3), mirrored with `flip`, a batch at a time."""
    for start in range(0, len(rows["image"]), _ENCODE_BATCH):
        stop = start + _ENCODE_BATCH
        pixels = pixels_from_bytes(rows["image"][start:stop], image_size, rows["file_name"][start:stop])
        yield np.ascontiguousarray(pixels[:, :, ::-1]) if flip else pixels


class EncodeImages:
    """Images -> frozen tokens in fp16, or the squashed pixels for a recipe that trains its encoder."""

    def __init__(self, encoder: str, image_size: int, flip: bool, tokens: Tokens) -> None:
        self.encoder = None
        if encoder != SCRATCH:
            self.encoder = FrozenVisionEncoder(encoder, image_size, _device(), tokens=tokens)
        self.image_size, self.flip = image_size, flip

    def __call__(self, rows: ImageRows) -> pa.Table:
        batches = _pixel_batches(rows, self.image_size, self.flip)
        if self.encoder is None:
            values = list(batches)
        else:
            values = [self.encoder(pixels).half().cpu().numpy() for pixels in batches]
        return column_table(rows["image_id"], {VALUE: np.concatenate(values)})


class EncodeByAutoencoder:
    """Images -> `output` of a trained autoencoder; a VQ-VAE alone has codes.

    Latents are fp16 (C, h, w), before quantisation. Codes (h, w) are the smallest integers that hold them.
    """

    def __init__(self, run: Storage, fingerprint: str, output: AutoencoderOutput, flip: bool) -> None:
        self.autoencoder = open_autoencoder(run.uri, fingerprint=fingerprint).load(_device())
        self.output, self.flip = output, flip

    def __call__(self, rows: ImageRows) -> pa.Table:
        batches = _pixel_batches(rows, self.autoencoder.image_size, self.flip)
        if self.output == "latents":
            values = [self.autoencoder.encode(pixels).half().cpu().numpy() for pixels in batches]
        else:
            assert isinstance(self.autoencoder, TrainedVQVAE)
            dtype = code_dtype(self.autoencoder.num_codes)
            values = [self.autoencoder.codes(pixels).cpu().numpy().astype(dtype) for pixels in batches]
        return column_table(rows["image_id"], {VALUE: np.concatenate(values)})


class EncodeText:
    """Captions -> hidden states (K, T, E) of a frozen text encoder in fp16; zeros where an image has fewer."""

    def __init__(self, encoder: str, max_tokens: int, captions_per_image: int) -> None:
        self.encoder = FrozenTextEncoder(encoder, max_tokens, _device())
        self.captions_per_image = captions_per_image

    def __call__(self, rows: Columns) -> pa.Table:
        # As many captions at once as images, several times over: these are short.
        texts = [text for captions in rows["captions"] for text in captions]
        hidden = [
            self.encoder(texts[start : start + 2 * _ENCODE_BATCH]).half().cpu().numpy()
            for start in range(0, len(texts), 2 * _ENCODE_BATCH)
        ]
        hidden_NTE = np.concatenate(hidden)
        values = np.zeros((len(rows["captions"]), self.captions_per_image, *hidden_NTE.shape[1:]), np.float16)
        start = 0
        for row, captions in enumerate(rows["captions"]):
            values[row, : len(captions)] = hidden_NTE[start : start + len(captions)]
            start += len(captions)
        return column_table(rows["image_id"], {VALUE: values})


class EncodeSdxlImages:
    """Images -> moments of SDXL's latents, fp16 (8, h, w), and height, width, top and left of the crop, int32 (4,)."""

    def __init__(self, model: str, revision: str | None, image_size: int, flip: bool) -> None:
        self.encoder = SdxlImageEncoder(model, revision, _device())
        self.image_size, self.flip = image_size, flip

    def __call__(self, rows: ImageRows) -> pa.Table:
        moments, sizes = [], []
        # One after the other, as a large image takes much memory.
        for data, name in zip(rows["image"], rows["file_name"], strict=True):
            pixels, size = crop_centre(decode_image(data, name=name), self.image_size)
            pixels = np.ascontiguousarray(pixels[:, ::-1]) if self.flip else pixels
            moments.append(self.encoder(pixels[None])[0])
            sizes.append(np.array(size, np.int32))
        return column_table(rows["image_id"], {MOMENTS: np.stack(moments), SIZES: np.stack(sizes)})


class EncodeSdxlCaptions:
    """Captions -> embeddings of SDXL's text encoders, fp16 (K, T, C) and (K, P); zeros where an image has fewer."""

    def __init__(self, model: str, revision: str | None, captions_per_image: int) -> None:
        self.encoder, self.captions_per_image = SdxlTextEncoder(model, revision, _device()), captions_per_image

    def __call__(self, rows: Columns) -> pa.Table:
        embeds: list[np.ndarray] = []
        pooled: list[np.ndarray] = []
        for captions in rows["captions"]:
            of_captions = self.encoder(captions[: self.captions_per_image])
            missing = self.captions_per_image - len(of_captions[0])
            for values, all_values in zip(of_captions, (embeds, pooled), strict=True):
                all_values.append(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))
        return column_table(rows["image_id"], {EMBEDS: np.stack(embeds), POOLED: np.stack(pooled)})
