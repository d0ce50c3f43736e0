"""Momentum distillation: the slow copy, its soft targets, and its place in a training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_qformer_captioner import NUM_IMAGES, model_of, recipe, rows_of
from test_qformer_losses import NUM_ROWS, features, temperature
from torch import Tensor

from mmcore import checkpoint
from mmcore.captioners.momentum import MomentumCopy
from mmcore.captioners.qformer_losses import Similarities, itc_loss, itg_loss, similarities
from mmcore.recipe import TrainSettings
from mmcore.training import RunHooks, Training

pytestmark = pytest.mark.usefixtures("one_thread")


def soft_cross_entropy(logits: list[float], soft_logits: list[float]) -> float:
    total, soft_total = (math.log(sum(map(math.exp, each))) for each in (logits, soft_logits))
    pairs = zip(logits, soft_logits, strict=True)
    return sum(math.exp(soft - soft_total) * (total - logit) for logit, soft in pairs)


# -- losses --------------------------------------------------------------------------------------------------------


def test_a_share_of_itc_has_the_copy_s_similarities_as_targets() -> None:
    images, texts = (each.detach() for each in features())
    cosines, index = similarities(images, texts, images, texts), torch.arange(NUM_ROWS)
    soft = Similarities(*(each.flip(1) for each in cosines))
    expected = 0.0
    for own, theirs in zip(cosines, soft, strict=True):
        for row in range(NUM_ROWS):
            scaled = [(each[row] / temperature()).tolist() for each in (own, theirs)]
            expected += soft_cross_entropy(scaled[0], scaled[1]) / 2
    hard = itc_loss(cosines, temperature(), index, index).item()
    for weight in (0.0, 0.4, 1.0):
        mixed = itc_loss(cosines, temperature(), index, index, soft=soft, soft_weight=weight)
        assert mixed.item() == pytest.approx((1 - weight) * hard + weight * expected, abs=1e-12)


def test_the_targets_of_the_copy_have_no_gradient_in_the_temperature() -> None:
    """With predictions equal to the targets, the cross-entropy with them is at its least."""
    images, texts = (each.detach() for each in features())
    cosines, index, scale = similarities(images, texts, images, texts), torch.arange(NUM_ROWS), temperature()
    itc_loss(cosines, scale, index, index, soft=cosines, soft_weight=1.0).backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_a_share_of_itg_has_the_copy_s_words_as_targets() -> None:
    ids, lengths = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]]), torch.tensor([4, 3])
    own, theirs = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = sum(soft_cross_entropy(*pair) for pair in zip(own.tolist(), theirs.tolist(), strict=True))
    hard, right = itg_loss(own, ids, lengths)
    mixed, still_right = itg_loss(own, ids, lengths, soft_logits_NV=theirs, soft_weight=0.4)
    assert mixed.item() == pytest.approx(0.6 * hard.item() + 0.4 * expected, abs=1e-12)
    assert still_right == right


# -- the copy ------------------------------------------------------------------------------------------------------


def test_the_copy_follows_and_only_so() -> None:
    model = model_of(recipe(distillation=0.4, dropout=0.1)).double()
    first = {name: value.clone() for name, value in checkpoint.trainable_parameters(model).items()}
    model.load_pretrained()
    slow = model.momentum_copy
    assert isinstance(slow, MomentumCopy)
    assert not list(slow.parameters())
    model.train()
    assert not any(module.training for module in slow.modules())
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1
    for step in (0, 1):
        model.after_step({"epochs": torch.tensor(0.25)}, step)
    assert slow.epochs.item() == 0.5
    assert model.summarize({}) == {"distillation": 0.2}
    names = {name for name in first if name.startswith(("qformer.", "heads."))}
    assert names | {"epochs"} == {name for name, _ in slow.named_buffers()}
    # 0.995, twice: what is left of the distance 1.
    for name in names:
        torch.testing.assert_close(slow.get_buffer(name), first[name] + 1 - 0.995**2, rtol=0, atol=1e-12)


def test_only_training_uses_the_copy() -> None:
    """The copy predicts all words and rows alike: ITC and ITG change, ITM stays."""
    batch = rows_of(recipe()).train_batch(torch.arange(8).numpy(), 0)
    plain, model = (model_of(recipe(distillation=share)) for share in (0.0, 0.4))
    for each in (plain, model):
        each.load_pretrained()
    assert plain.momentum_copy is None
    assert model.momentum_copy is not None

    def losses_of(each: Any) -> dict[str, float]:
        outputs = each(batch)
        assert outputs.statistics.keys() == ({"epochs"} if each.training and each is model else set())
        return {name: loss.sum.item() for name, loss in outputs.losses.items()}

    plain.train(), model.train()
    first = losses_of(plain)
    assert losses_of(model) == pytest.approx(first, rel=1e-6), "the share begins with 0"
    assert model(batch).statistics["epochs"].item() == pytest.approx(8 / NUM_IMAGES)
    model.momentum_copy.epochs += 3  # the share is full after one
    with torch.no_grad():
        for buffer in model.momentum_copy.qformer.buffers():
            buffer.zero_()
    softened = losses_of(model)
    assert softened["itm"] == pytest.approx(first["itm"], rel=1e-6)
    assert abs(softened["itc"] - first["itc"]) > 1e-3
    assert abs(softened["itg"] - first["itg"]) > 1e-3
    plain.eval(), model.eval()
    assert losses_of(model) == pytest.approx(losses_of(plain), rel=1e-6)


# -- training ------------------------------------------------------------------------------------------------------


def test_it_resumes_to_the_bit_and_the_finished_run_has_no_copy(tmp_path: Path) -> None:
    train = TrainSettings(
        num_epochs=2, batch_size=5, lr=1e-2, precision="fp32", checkpoint_every_steps=3, log_every_steps=1,
        ema_decay=0.9,
    )  # fmt: skip
    settings = recipe(dropout=0.1, distillation=0.4, distillation_momentum=0.9, train=train)
    kept: dict[int, Path] = {}

    def trained(name: str, resume_from: Path | None = None) -> tuple[Training, dict[str, Tensor]]:
        def commit(folder: Path | None, metrics: dict[str, Any]) -> None:
            assert folder is not None
            kept.setdefault(metrics["step"], folder)

        model = model_of(settings)
        model.load_pretrained()
        training = Training(
            model, rows_of(settings), train, RunHooks(commit=commit), workdir=tmp_path / name, resume_from=resume_from
        )
        return training, training.run()

    whole, saved = trained("whole")
    resumed, saved_again = trained("resumed", kept[3])
    of_copy = {name for name in load_file(kept[3] / "weights.safetensors") if name.startswith("momentum_copy.")}
    assert of_copy == set(whole.model.state_buffers)
    for mine, again in ((checkpoint.trainable_state(whole.model), checkpoint.trainable_state(resumed.model)),
                        (saved, saved_again)):  # fmt: skip
        assert mine.keys() == again.keys()
        assert all(torch.equal(mine[name], again[name]) for name in mine)
    assert saved.keys() == checkpoint.trainable_parameters(whole.model).keys()
    checkpoint.load_trainable(model_of(settings), saved, "a finished run opens without the copy")
    # Four steps are an epoch of 20 images.
    shares = [row["distillation"] for row in whole.state.history if "distillation" in row and "samples" not in row]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])
