"""The three losses of a Q-Former's first stage: image-text contrast (ITC), matching (ITM) and generation (ITG).

ITC with hard negatives for ITM: ALBEF (Li et al. 2021, https://arxiv.org/abs/2107.07651, section 3.2). With query
tokens, and with ITG: BLIP-2 (Li et al. 2023, https://arxiv.org/abs/2301.12597, section 3.2).

All functions are pure. The caller gathers the features of other workers (`mmcore.distributed.gathered`), in training
only. Images with an equal index are the same image. They are never negatives of each other.

Shapes: B images of this worker, each with one text; M images of all workers; Q queries, F features, X pairs of an image
and a text, R rows of text, T positions, N predicted words, V words of the vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Similarities(NamedTuple):
    """Cosines of this worker's rows with the rows of all workers, in fp32 or above."""

    image_to_text_BM: Tensor
    """Each image of this worker with each text."""
    text_to_image_BM: Tensor
    """Each text of this worker with each image."""


def similarities(images_BQF: Tensor, texts_BF: Tensor, all_images_MQF: Tensor, all_texts_MF: Tensor) -> Similarities:
    """The similarity of an image and a text: the largest dot product of a query with the text (BLIP-2, section 3.2).

    Args:
        images_BQF: features of the queries, normalised over F. An image tower without queries has Q = 1.
        texts_BF: features of the texts, normalised.
        all_images_MQF, all_texts_MF: those of all workers, in one order.
    """
    # In fp16 the loss of a published implementation became infinite, so autocast is off.
    with torch.autocast(images_BQF.device.type, enabled=False):
        own_images, own_texts, images, texts = (
            each.to(torch.promote_types(each.dtype, torch.float32))
            for each in (images_BQF, texts_BF, all_images_MQF, all_texts_MF)
        )
        return Similarities(
            torch.einsum("bqf,mf->bqm", own_images, texts).amax(dim=1),
            torch.einsum("bf,mqf->bmq", own_texts, images).amax(dim=2),
        )


def same_image(image_index_B: Tensor, all_image_index_M: Tensor) -> Tensor:
    """Which of the gathered rows belong to the image of each row: bool (B, M)."""
    return image_index_B[:, None] == all_image_index_M


def itc_loss(
    cosines: Similarities,
    temperature: Tensor,
    image_index_B: Tensor,
    all_image_index_M: Tensor,
    label_smoothing: float = 0.1,
    soft: Similarities | None = None,
    soft_weight: Tensor | float = 0.0,
) -> Tensor:
    """The image-text contrastive loss, summed over this worker's rows (ALBEF, equation 1; InfoNCE).

    It is the mean of two cross-entropies: to find the text of an image, and the image of a text. Several rows of one
    image share the probability of the target. Without smoothing and with one query this is CLIP's loss.

    Args:
        temperature: scalar > 0 that divides the similarities; learned.
        image_index_B, all_image_index_M: int64, the images of the rows, in the order of the similarities.
        label_smoothing: share of the target's probability that is spread over all M.
        soft: similarities of a momentum copy. Their softmax is a second target (ALBEF, equation 6).
        soft_weight: share of the loss for that target.
    Returns: a scalar. The sums of all workers add up to that of the whole batch.
    """
    same_BM = same_image(image_index_B, all_image_index_M).to(cosines.image_to_text_BM.dtype)
    target_BM = same_BM / same_BM.sum(dim=1, keepdim=True)
    both = []
    for column, cosines_BM in enumerate(cosines):
        logits_BM = cosines_BM / temperature
        loss = F.cross_entropy(logits_BM, target_BM, reduction="sum", label_smoothing=label_smoothing)
        if soft is not None:
            loss = _softened(loss, logits_BM, soft[column] / temperature.detach(), soft_weight)
        both.append(loss)
    return (both[0] + both[1]) / 2


def _softened(loss: Tensor, logits_NV: Tensor, soft_logits_NV: Tensor, weight: Tensor | float) -> Tensor:
    """`loss`, of which the share `weight` is the cross-entropy with the softmax of `soft_logits_NV`, summed over N.

    ALBEF has the KL divergence there. It differs by the entropy of the targets, which has no gradient.
    """
    soft_loss = F.cross_entropy(logits_NV, soft_logits_NV.to(logits_NV.dtype).softmax(dim=1), reduction="sum")
    return (1 - weight) * loss + weight * soft_loss


class Negatives(NamedTuple):
    """The hard negatives of ITM, as indices of the gathered rows."""

    text_B: Tensor
    """The text that is paired with each image of this worker, int64."""
    image_B: Tensor
    """The image that is paired with each text of this worker, int64."""
    exist_B: Tensor
    """Whether the batch has another image, bool. The indices of the other rows have no meaning."""


@torch.no_grad()
def itm_negatives(
    cosines: Similarities,
    temperature: Tensor,
    image_index_B: Tensor,
    all_image_index_M: Tensor,
    uniforms_B2: Tensor,
) -> Negatives:
    """Draw one negative text for each image and one negative image for each text (ALBEF, section 3.2).

    The probability of a row is the softmax of its similarity over the rows of other images. A uniform number chooses
    by the inverse of the cumulative distribution, over rows ordered by image. The draw therefore depends on the image
    and its batch alone. Workers and the order of the batch do not change it.

    Args:
        temperature, image_index_B, all_image_index_M: as for `itc_loss`.
        uniforms_B2: in [0, 1), the first for the text and the second for the image, drawn from (seed, epoch, image_id).
    """
    order_M = all_image_index_M.argsort(stable=True)
    other_BM = ~same_image(image_index_B, all_image_index_M[order_M])
    drawn = [
        order_M[_draw(each_BM[:, order_M].double() / temperature, other_BM, uniforms_B2[:, column])]
        for column, each_BM in enumerate(cosines)
    ]
    return Negatives(drawn[0], drawn[1], other_BM.any(dim=1))


def _draw(logits_BM: Tensor, allowed_BM: Tensor, uniform_B: Tensor) -> Tensor:
    """An index of each row, by the softmax of the logits over what is allowed: int64 (B,)."""
    # The largest allowed logit is subtracted. That of the own pair could be so large that all others become 0.
    largest_B1 = logits_BM.masked_fill(~allowed_BM, -torch.inf).amax(dim=1, keepdim=True)
    weights_BM = (logits_BM - largest_B1).exp().masked_fill(~allowed_BM, 0.0)
    cumulative_BM = weights_BM.cumsum(dim=1)
    total_B1 = cumulative_BM[:, -1:].contiguous()
    index_B1 = torch.searchsorted(cumulative_BM, uniform_B.double()[:, None] * total_B1, right=True)
    # The first index that reaches the total. A uniform number just below 1 may be rounded to 1.
    last_B1 = torch.searchsorted(cumulative_BM, total_B1)
    return torch.minimum(index_B1, last_B1).squeeze(1)


def itm_logits(logits_XQ2: Tensor) -> Tensor:
    """The mean of the two-class logits over the queries, in fp32 or above: (X, Q, 2) -> (X, 2)."""
    return logits_XQ2.to(torch.promote_types(logits_XQ2.dtype, torch.float32)).mean(dim=1)


def itm_loss(logits_XQ2: Tensor, matches_X: Tensor) -> Tensor:
    """The image-text matching loss, summed over pairs: the cross-entropy of two classes (BLIP-2, section 3.2).

    Args:
        logits_XQ2: logits of "no match" and "match" at each query.
        matches_X: bool, whether the pair belongs together. BLIP-2 takes a pair, and one negative of each kind.
    """
    return F.cross_entropy(itm_logits(logits_XQ2), matches_X.long(), reduction="sum")


def itm_scores(logits_XQ2: Tensor) -> Tensor:
    """Log-odds that the image and the text match, (X,). Their sigmoid is the probability."""
    no_match_X, match_X = itm_logits(logits_XQ2).unbind(dim=1)
    return match_X - no_match_X


def predicts_word(lengths_R: Tensor, num_positions: int) -> Tensor:
    """Which positions have a next word: bool (R, T). `lengths_R`: int64, the real tokens of each row."""
    return torch.arange(1, num_positions + 1, device=lengths_R.device) < lengths_R[:, None]


def itg_loss(
    logits_NV: Tensor,
    input_ids_RT: Tensor,
    lengths_R: Tensor,
    label_smoothing: float = 0.1,
    soft_logits_NV: Tensor | None = None,
    soft_weight: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The image-grounded text generation loss, summed over words: the cross-entropy of the next word.

    Args:
        logits_NV: logits of the word after each position where `predicts_word` is true, row by row.
        input_ids_RT: int64, with begin and end. The first token may differ from that of the input (`[DEC]`).
        lengths_R: int64, the number of real tokens; 0 for a missing caption.
        soft_logits_NV: those of a momentum copy. Their softmax is a second target (ALBEF, equation 7).
        soft_weight: share of the loss for that target.
    Returns: the sum, and the number of words that are predicted correctly.
    """
    predicts_RT = predicts_word(lengths_R, input_ids_RT.shape[1])
    labels_N = input_ids_RT.roll(-1, dims=1)[predicts_RT]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    loss = F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=label_smoothing)
    if soft_logits_NV is not None:
        loss = _softened(loss, logits_NV, soft_logits_NV, soft_weight)
    return loss, (logits_NV.argmax(dim=-1) == labels_N).sum()
