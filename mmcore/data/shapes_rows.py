"""The rows of the Shapes dataset: scenes as encoded images with their captions."""

import io
from collections.abc import Iterator
from typing import Any

from mmcore.data.shapes import SPLITS, ShapesSettings, make_scene, render_scene
from mmcore.data.shapes_captions import scene_captions


def shapes_row(settings: ShapesSettings, split: str, index: int) -> dict[str, Any]:
    """One row: image_id, file_name, image (PNG bytes), captions (a list of five), split.

    Raises ValueError for an unknown split and IndexError for an index that the split does not have.
    """
    num_images = settings.num_images(split)
    if not 0 <= index < num_images:
        raise IndexError(f"shapes has {num_images} {split} images, no index {index}")
    scene = make_scene(settings.seed, split, index, settings.max_objects)
    encoded = io.BytesIO()
    render_scene(scene, settings.image_size).save(encoded, "PNG")
    image_id = f"shapes-{split}-{index:06d}"
    return {
        "image_id": image_id,
        "file_name": f"{image_id}.png",
        "image": encoded.getvalue(),
        "captions": scene_captions(settings.seed, split, index, scene),
        "split": split,
    }


def shapes_rows(settings: ShapesSettings) -> Iterator[dict[str, Any]]:
    """All rows, split after split in the order of SPLITS."""
    for split in SPLITS:
        for index in range(settings.num_images(split)):
            yield shapes_row(settings, split, index)
