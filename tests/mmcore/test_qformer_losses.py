"""The losses of a Q-Former's first stage, on one worker and on two, and the draw of hard negatives."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from mmcore.captioners.qformer_losses import (
    Negatives,
    Similarities,
    itc_loss,
    itg_loss,
    itm_logits,
    itm_loss,
    itm_negatives,
    itm_scores,
    predicts_word,
    similarities,
)
from mmcore.distributed import gathered

NUM_ROWS, NUM_QUERIES, WIDTH = 8, 3, 5
TEMPERATURE = 0.2


def features(num_rows: int = NUM_ROWS, num_queries: int = NUM_QUERIES) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(num_rows, num_queries, WIDTH, generator=random, dtype=torch.float64)
    texts = torch.randn(num_rows, WIDTH, generator=random, dtype=torch.float64)
    return F.normalize(images, dim=-1).requires_grad_(), F.normalize(texts, dim=-1).requires_grad_()


def temperature() -> Tensor:
    return torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)


def uniforms(num_rows: int = NUM_ROWS) -> Tensor:
    return torch.rand(num_rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def of_part(rows: Tensor, index: Tensor, draws: Tensor) -> tuple[Tensor, Negatives]:
    """Loss and negatives of the worker that has `rows` of the whole batch. The features have no gradient."""
    images, texts = (each.detach() for each in features())
    cosines = similarities(images[rows], texts[rows], images, texts)
    loss = itc_loss(cosines, temperature().detach(), index[rows], index)
    return loss, itm_negatives(cosines, temperature().detach(), index[rows], index, draws[rows])


# -- ITC ---------------------------------------------------------------------------------------------------------


def test_itc_is_the_mean_of_two_smoothed_cross_entropies_over_the_best_query() -> None:
    images, texts = (each.detach() for each in features())
    cosines = similarities(images, texts, images, texts)
    index = torch.arange(NUM_ROWS)
    total = 0.0
    for row in range(NUM_ROWS):
        to_texts = [max(float(query @ text) for query in images[row]) / TEMPERATURE for text in texts]
        to_images = [max(float(query @ texts[row]) for query in image) / TEMPERATURE for image in images]
        for logits in (to_texts, to_images):
            log_sum = math.log(sum(map(math.exp, logits)))
            missed = [log_sum - logit for logit in logits]
            total += (0.9 * missed[row] + 0.1 * sum(missed) / NUM_ROWS) / 2
    # Measured difference 0 to 4e-15.
    assert itc_loss(cosines, temperature(), index, index).item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("second", "sign"), [(7, -1), (8, 1)])
def test_rows_of_one_image_are_no_negatives_of_each_other_in_itc(second: int, sign: int) -> None:
    """Gradient descent raises the similarity of two rows of one image, and lowers that of two images."""
    index = torch.tensor([7, second])
    both = [torch.tensor([[0.5, 0.2], [0.2, 0.5]], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    itc_loss(Similarities(*both), temperature(), index, index, label_smoothing=0.0).backward()
    for each in both:
        assert each.grad is not None
        assert sign * each.grad[0, 1] > 0.1
        assert sign * each.grad[1, 0] > 0.1


def test_itc_is_computed_in_fp32_under_autocast() -> None:
    images, texts = (each.detach().float() for each in features())
    with torch.autocast("cpu", torch.bfloat16):
        cosines = similarities(images.bfloat16(), texts.bfloat16(), images.bfloat16(), texts.bfloat16())
        loss = itc_loss(cosines, torch.tensor(1e-4), torch.arange(NUM_ROWS), torch.arange(NUM_ROWS))
    assert cosines.image_to_text_BM.dtype == loss.dtype == torch.float32
    assert torch.isfinite(loss)


def as_worker(rank: int, port: int, folder: Path) -> None:
    """One worker of a gloo group with half of the rows. It saves its loss, gradients and negatives."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mine = slice(rank * NUM_ROWS // 2, (rank + 1) * NUM_ROWS // 2)
    images, texts = (each.detach()[mine].requires_grad_() for each in features())
    index, scale = torch.arange(NUM_ROWS)[mine], temperature()
    all_index = gathered(index)
    cosines = similarities(images, texts, gathered(images), gathered(texts))
    loss = itc_loss(cosines, scale, index, all_index)
    loss.backward()
    negatives = itm_negatives(cosines, scale, index, all_index, uniforms()[mine])
    saved = {"loss": loss.detach(), "images": images.grad, "texts": texts.grad, "scale": scale.grad}
    torch.save({**saved, "drawn": torch.stack(negatives[:2])}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.process
def test_two_workers_agree_with_one(tmp_path: Path) -> None:
    from conftest import free_port

    torch.multiprocessing.spawn(as_worker, (free_port(), tmp_path), nprocs=2)
    images, texts = features()
    scale, index = temperature(), torch.arange(NUM_ROWS)
    cosines = similarities(images, texts, images, texts)
    loss = itc_loss(cosines, scale, index, index)
    loss.backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    # In float64; measured difference at most 2e-15.
    near = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(first["loss"] + second["loss"], loss.detach(), **near)
    torch.testing.assert_close(first["scale"] + second["scale"], scale.grad, **near)
    for name, whole in (("images", images.grad), ("texts", texts.grad)):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), whole, **near)
    negatives = itm_negatives(cosines, scale, index, index, uniforms())
    assert torch.cat([first["drawn"], second["drawn"]], dim=1).tolist() == torch.stack(negatives[:2]).tolist()


# -- negatives of ITM --------------------------------------------------------------------------------------------


def test_negatives_depend_on_the_image_and_not_on_the_split_or_the_order() -> None:
    index, draws = torch.arange(NUM_ROWS) * 10, uniforms()
    _, whole = of_part(torch.arange(NUM_ROWS), index, draws)
    assert not torch.equal(whole.text_B, whole.image_B)
    for parts in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]], [[5], [0, 7, 1, 2, 3, 4, 6]]):
        for part in parts:
            _, mine = of_part(torch.tensor(part), index, draws)
            assert mine.text_B.tolist() == whole.text_B[part].tolist()
            assert mine.image_B.tolist() == whole.image_B[part].tolist()
    # The whole batch in another order: the same images are drawn.
    order = torch.tensor([3, 6, 0, 7, 1, 5, 2, 4])
    images, texts = (each.detach()[order] for each in features())
    cosines = similarities(images, texts, images, texts)
    shuffled = itm_negatives(cosines, temperature(), index[order], index[order], draws[order])
    assert index[order][shuffled.text_B].tolist() == index[whole.text_B[order]].tolist()
    assert index[order][shuffled.image_B].tolist() == index[whole.image_B[order]].tolist()


def test_no_negative_is_of_the_same_image() -> None:
    images, texts = (each.detach() for each in features())
    cosines = similarities(images, texts, images, texts)
    # The own pair is by far the most similar.
    high = Similarities(*(each + 2 * torch.eye(NUM_ROWS, dtype=torch.float64) for each in cosines))
    index = torch.tensor([4, 1, 4, 3, 1, 4, 9, 0])
    for uniform in (0.0, 0.3, 0.999999, 1.0):
        draws = torch.full((NUM_ROWS, 2), uniform)
        for scale in (1e-4, 0.01, 1.0):
            found = itm_negatives(high, torch.tensor(scale), index, index, draws)
            assert (index[found.text_B] != index).all()
            assert (index[found.image_B] != index).all()
            assert found.exist_B.all()


def test_a_batch_of_one_image_has_no_negatives() -> None:
    images, texts = (each.detach()[:2] for each in features())
    index = torch.tensor([5, 5])
    found = itm_negatives(similarities(images, texts, images, texts), temperature(), index, index, uniforms(2))
    assert found.exist_B.tolist() == [False, False]
    assert found.text_B.tolist() == found.image_B.tolist() == [0, 0]


def test_negatives_are_as_frequent_as_their_similarities_say() -> None:
    images, texts = (each.detach() for each in features())
    cosines = similarities(images[:1], texts[:1], images, texts)
    num_draws = 4000
    grid = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    index = torch.arange(NUM_ROWS)
    both = Similarities(*(each.expand(num_draws, -1) for each in cosines))
    found = itm_negatives(both, temperature(), index[:1].expand(num_draws), index, torch.stack([grid, grid], dim=1))
    for drawn, cosines_1M in ((found.text_B, cosines[0]), (found.image_B, cosines[1])):
        expected = torch.cat([torch.zeros(1), (cosines_1M[0, 1:] / TEMPERATURE).softmax(dim=0)])
        shares = torch.bincount(drawn, minlength=NUM_ROWS) / num_draws
        # A regular grid hits an interval of length p between p - 1/n and p + 1/n times.
        assert (shares - expected).abs().max() <= 1.01 / num_draws


def test_the_first_number_draws_the_text_and_the_second_the_image() -> None:
    same = torch.zeros(3, 4, dtype=torch.float64)
    index = torch.arange(4)
    found = itm_negatives(Similarities(same, same), temperature(), index[:3], index, torch.tensor([[0.0, 0.9]] * 3))
    assert (found.text_B.tolist(), found.image_B.tolist()) == ([1, 0, 0], [3, 3, 3])


# -- ITM and ITG -------------------------------------------------------------------------------------------------


def test_itm_is_a_cross_entropy_of_the_mean_over_queries() -> None:
    logits = torch.randn(3, NUM_QUERIES, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    matches = torch.tensor([True, False, False])
    mean = logits.mean(dim=1)
    expected = sum(
        math.log(math.exp(no) + math.exp(yes)) - (yes if match else no)
        for (no, yes), match in zip(mean.tolist(), matches.tolist(), strict=True)
    )
    assert itm_loss(logits, matches).item() == pytest.approx(expected, abs=1e-12)
    probability = itm_logits(logits).softmax(dim=1)[:, 1]
    torch.testing.assert_close(itm_scores(logits).sigmoid(), probability, rtol=0, atol=1e-12)


def test_itg_predicts_each_next_word_and_nothing_after_the_end() -> None:
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0], [0, 0, 0, 0, 0]])
    lengths = torch.tensor([4, 3, 0])
    predicts = predicts_word(lengths, 5)
    assert predicts.tolist() == [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3, [False] * 5]
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.tensor([5, 6, 2, 7, 2])
    logits[0, 5] = 9.0
    loss, num_correct = itg_loss(logits, ids, lengths)
    log_probabilities = logits.log_softmax(dim=1)
    expected = -(0.9 * log_probabilities[torch.arange(5), labels] + 0.1 * log_probabilities.mean(dim=1)).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert num_correct == (logits.argmax(dim=1) == labels).sum()
    assert num_correct >= 1
