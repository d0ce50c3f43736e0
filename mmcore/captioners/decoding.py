"""Batched greedy and beam search, and sampling, over a decoder with a cache. Images that a search finished leave it.

Shapes: B images, K beams per image, R rows not yet finished, V words, T words so far.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mmcore.text import TokenIds

OnWords = Callable[[list[tuple[int, int]]], None]
"""Is told the new words of a step as (image, id)."""


class State(Protocol):
    """The state of incremental decoding. Each image has one row per beam."""

    def select_rows(self, rows_R: Tensor) -> None:
        """Keep the rows `rows_R`, in that order."""

    def select_images(self, images_B: Tensor) -> None:
        """Keep the images `images_B`, in that order."""


class Decoder(Protocol):
    """An autoregressive decoder of words with a memory of the image."""

    def start(self, memory: Tensor, rows_per_image: int, num_positions: int, /) -> Any:
        """The initial State: memory (B, ...), `rows_per_image` rows per image, at most `num_positions` words."""

    def step(self, ids_R: Tensor, state: Any, /) -> Tensor:
        """Logits (R, V) of the word after `ids_R`. Updates `state`."""


def _logits(decoder: Decoder, last_R: Tensor, state: State, tokens: TokenIds) -> Tensor:
    logits_RV = decoder.step(last_R, state).float()
    logits_RV[:, tokens.silent_ids] = -torch.inf
    return logits_RV


def _log_probabilities(decoder: Decoder, last_R: Tensor, state: State, tokens: TokenIds) -> Tensor:
    return _logits(decoder, last_R, state, tokens).log_softmax(dim=-1)


@torch.inference_mode()
def greedy(
    decoder: Decoder,
    memory: Tensor,
    max_length: int,
    tokens: TokenIds,
    on_words: OnWords | None = None,
    closing_V: Tensor | None = None,
) -> list[list[int]]:
    """Greedy search: the most probable word at each step, until the end token or `max_length` words.

    A finished caption leaves the batch, which saves work. Returns ids without begin and end tokens. `on_words` is told
    them step by step. `closing_V`: words, bool (V,), that end a caption and belong to it.
    """
    num_images = memory.shape[0]
    captions: list[list[int]] = [[] for _ in range(num_images)]
    running_R = torch.arange(num_images, device=memory.device)
    last_R = torch.full((num_images,), tokens.bos_id, device=memory.device)
    state = decoder.start(memory, 1, max_length)
    for _ in range(max_length):
        last_R = _logits(decoder, last_R, state, tokens).argmax(dim=-1)
        step = zip(running_R.tolist(), last_R.tolist(), strict=True)
        new = [(image, word) for image, word in step if word != tokens.eos_id]
        for image, word in new:
            captions[image].append(word)
        if on_words is not None:
            on_words(new)
        open_R = last_R != tokens.eos_id
        going_R = (open_R if closing_V is None else open_R & ~closing_V[last_R]).nonzero().squeeze(1)
        if going_R.numel() == 0:
            break
        if going_R.numel() < last_R.numel():
            running_R, last_R = running_R[going_R], last_R[going_R]
            state.select_rows(going_R)
            state.select_images(going_R)
    return captions


@torch.no_grad()
def sample(
    decoder: Decoder, memory: Tensor, num_samples: int, max_length: int, tokens: TokenIds
) -> list[list[list[int]]]:
    """For each image `num_samples` captions, drawn by PyTorch's global generator, of at most `max_length` words.

    Returns ids without begin and end tokens, one list of captions per image.
    """
    num_rows = memory.shape[0] * num_samples
    state = decoder.start(memory, num_samples, max_length)
    last_R = torch.full((num_rows,), tokens.bos_id, device=memory.device)
    ended_R = torch.zeros(num_rows, dtype=torch.bool, device=memory.device)
    words = []
    for _ in range(max_length):
        probabilities_RV = _log_probabilities(decoder, last_R, state, tokens).exp()
        last_R = torch.multinomial(probabilities_RV, 1).squeeze(1).masked_fill(ended_R, tokens.eos_id)
        ended_R = last_R == tokens.eos_id
        words.append(last_R)
        if ended_R.all():
            break
    captions = [[word for word in row if word != tokens.eos_id] for row in torch.stack(words, dim=1).tolist()]
    return [captions[first : first + num_samples] for first in range(0, num_rows, num_samples)]


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    memory: Tensor,
    max_length: int,
    tokens: TokenIds,
    num_beams: int,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Beam search for the caption with the highest log-probability / length**length_penalty.

    An image is finished if no open beam can still exceed its best finished caption. Returns ids without begin and end
    tokens.
    """
    device, num_images = memory.device, memory.shape[0]
    best: list[tuple[float, list[int]]] = [(-torch.inf, [])] * num_images
    running_B = torch.arange(num_images, device=device)
    state = decoder.start(memory, num_beams, max_length)
    last_R = torch.full((num_images * num_beams,), tokens.bos_id, device=device)
    scores_BK = torch.full((num_images, num_beams), -torch.inf, device=device)
    scores_BK[:, 0] = 0.0  # all beams are equal at first, so only one may branch
    words_RT = torch.zeros(num_images * num_beams, 0, dtype=torch.long, device=device)

    for length in range(1, max_length + 1):
        log_probs_RV = _log_probabilities(decoder, last_R, state, tokens)
        vocabulary_size = log_probs_RV.shape[1]
        totals_BX = (scores_BK.flatten()[:, None] + log_probs_RV).view(len(running_B), -1)
        # Among 2K candidates at least K do not end, as each beam has one end token only.
        top_BX, index_BX = totals_BX.topk(2 * num_beams, dim=1)
        beam_BX, word_BX = index_BX // vocabulary_size, index_BX % vocabulary_size
        ended_BX = word_BX == tokens.eos_id
        for row, candidate in ended_BX.nonzero().tolist():
            score = top_BX[row, candidate].item() / length**length_penalty
            image = int(running_B[row])
            # A finished caption counts only if it is among the K best candidates.
            if candidate < num_beams and score > best[image][0]:
                best[image] = (score, words_RT[row * num_beams + int(beam_BX[row, candidate])].tolist())
        scores_BK, choice_BK = top_BX.masked_fill(ended_BX, -torch.inf).topk(num_beams, dim=1)
        offset_B1 = torch.arange(len(running_B), device=device)[:, None] * num_beams
        rows_R = (beam_BX.gather(1, choice_BK) + offset_B1).flatten()
        last_R = word_BX.gather(1, choice_BK).flatten()
        words_RT = torch.cat([words_RT[rows_R], last_R[:, None]], dim=1)

        # Log-probabilities only decrease. The upper bound of an open beam divides its score by the longest length.
        reach_B = scores_BK[:, 0] / (max_length if length_penalty > 0 else length) ** length_penalty
        open_B = torch.tensor([best[int(image)][0] for image in running_B], device=device) < reach_B
        if length == max_length or not open_B.any():
            for row, image in enumerate(running_B.tolist()):
                score = scores_BK[row, 0].item() / length**length_penalty
                # A caption truncated at the limit counts only if no caption has finished.
                if best[image][0] == -torch.inf:
                    best[image] = (score, words_RT[row * num_beams].tolist())
            break
        state.select_rows(rows_R)
        if not open_B.all():
            keep_B = open_B.nonzero().squeeze(1)
            keep_R = (keep_B[:, None] * num_beams + torch.arange(num_beams, device=device)).flatten()
            running_B, scores_BK = running_B[keep_B], scores_BK[keep_B]
            last_R, words_RT = last_R[keep_R], words_RT[keep_R]
            state.select_rows(keep_R)
            state.select_images(keep_B)
    return [words for _, words in best]
