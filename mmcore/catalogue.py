"""The scope on one screen: the name of a recipe -> its settings. A run folder's recipe.json holds that name."""

from typing import Any

from mmcore.captioners.resnet import ResNetCaptionerRecipe

CAPTIONERS: dict[str, Any] = {
    "resnet_captioner": ResNetCaptionerRecipe,
}
