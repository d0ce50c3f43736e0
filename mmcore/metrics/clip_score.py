"""CLIPScore: how well a text matches an image, by the features of a contrastive pair.

Hessel et al. 2021, https://arxiv.org/abs/2104.08718, equation 1. The paper's pair is CLIP ViT-B/32.

Shapes: M pairs of an image and a text.
"""

import numpy as np
import numpy.typing as npt

_WEIGHT = 2.5


def clip_scores(cosines_M: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The score of each pair, from 0 to 2.5: ``2.5 * max(cosine, 0)``."""
    return _WEIGHT * np.maximum(cosines_M, 0)
