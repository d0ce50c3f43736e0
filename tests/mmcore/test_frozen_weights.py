"""Frozen parts in training: number of copies, precision, and the check that they do not change."""

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import test_losses
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmcore.errors import InputError
from mmcore.frozen_weights import digests, frozen_parts, hold_frozen
from mmcore.losses import Loss, Outputs
from mmcore.training import RunHooks, Training

# 14,336² = 205 million weights.
WIDTH = 14_336
FP32_BYTES = 4 * WIDTH**2


class Big(nn.Module):
    """A large frozen layer under a small trainable one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.frozen.weight.data = torch.zeros(WIDTH, WIDTH)
        self.frozen.weight.data.fill_diagonal_(1)
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        made = self.layer(self.frozen(batch["a"].repeat(1, WIDTH // 4)))
        return Outputs({"loss": Loss((made.float() - batch["b"]).abs().sum(), len(made))})


class LargeTensorsMade(TorchDispatchMode):
    """The bytes of each new storage of at least the size of a frozen weight in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        outputs = function(*arguments, **(keywords or {}))
        known = {place(each) for each in tree_leaves((arguments, keywords)) if isinstance(each, Tensor)}
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor) and place(each) not in known and large(each):
                self.made.append(each.untyped_storage().nbytes())
        return outputs


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def large(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() >= FP32_BYTES // 2


def live() -> list[int]:
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and large(each)]
    return list({place(each): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize(
    ("precision", "frozen_precision", "copies"),
    [("fp32", "auto", []), ("bf16", "auto", [FP32_BYTES // 2]), ("fp32", "bf16", [FP32_BYTES // 2])],
)
def test_frozen_weights_are_held_once(tmp_path: Path, precision: str, frozen_precision: str, copies: list[int]) -> None:
    """EMA, saved weights, checkpoints, validation and the final check make no copy of frozen weights."""
    settings = dataclasses.replace(
        test_losses.SETTINGS, precision=precision, frozen_precision=frozen_precision, ema_decay=0.9
    )
    seen: list[list[int]] = []
    hooks = RunHooks(commit=lambda *_: seen.append(live()), samples=lambda *_: {"live": seen.append(live())})
    model = Big()
    with LargeTensorsMade() as watched:
        Training(model, test_losses.Pairs(), settings, hooks, workdir=tmp_path).run()
    assert watched.made == copies, "one cast at the start, where one is asked for"
    assert len(seen) == 4  # two validations
    assert all(each == [copies[0] if copies else FP32_BYTES] for each in seen)


# -- precision -----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A frozen encoder with trainable layers before and after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(4, 8)
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.encoder.requires_grad_(False)
        self.after = nn.Linear(8, 4)

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        made = self.after(self.encoder(self.before(batch["a"])))
        return Outputs({"loss": Loss((made.double() - batch["b"]).abs().sum(), len(made))})


def batch_of(num_rows: int) -> dict[str, Tensor]:
    batch = test_losses.Pairs().train_batch(torch.arange(num_rows).numpy(), 0)
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def test_auto_holds_what_autocast_would_cast() -> None:
    """Bit-identical, forward and backward. Normalisation layers keep their precision."""
    plain, held = Mixed().eval(), Mixed().eval()
    hold_frozen(held, "auto", "bf16")
    dtypes = {name: value.dtype for name, value in held.named_parameters() if value.dtype != torch.float32}
    assert dtypes == dict.fromkeys(
        [f"encoder.{i}.{what}" for i in (0, 3) for what in ("weight", "bias")], torch.bfloat16
    )
    losses = []
    for model in (plain, held):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(batch_of(8)).losses["loss"].sum)
        losses[-1].backward()
    assert torch.equal(*losses)
    for mine, theirs in zip(held.parameters(), plain.parameters(), strict=True):
        assert mine.grad is theirs.grad is None or torch.equal(mine.grad, theirs.grad)
    unchanged = Mixed()
    hold_frozen(unchanged, "auto", "fp32")
    assert digests(unchanged) == digests(Mixed())
    unchanged.encoder.own_precision = True
    hold_frozen(unchanged, "auto", "bf16")
    assert digests(unchanged) == digests(Mixed())


@pytest.mark.parametrize("frozen_precision", ["fp16", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_part_computes_in_its_own_precision(frozen_precision: str, precision: str) -> None:
    dtype = torch.float16 if frozen_precision == "fp16" else torch.bfloat16
    held = Mixed().eval()
    hold_frozen(held, frozen_precision, precision)
    seen: list[Tensor] = []
    for layer in held.encoder:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        before = held.before(batch_of(8)["a"])
        made = held.encoder(before)
    assert [each.dtype for each in seen] == [dtype] * 4
    assert made.dtype == before.dtype
    by_hand = copy.deepcopy(Mixed().encoder).eval().to(dtype)(before.to(dtype))
    assert torch.equal(made, by_hand.to(before.dtype))
    F.l1_loss(made.float(), torch.zeros(8, 8)).backward()
    assert held.before.weight.grad.abs().sum() > 0, "gradients pass through"


def test_a_precision_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="frozen_precision bf16: this model has no frozen part"):
        test_losses.trained(test_losses.Two(), tmp_path, frozen_precision="bf16")


# -- what stays ----------------------------------------------------------------------------------------------------


def test_a_frozen_part_drops_nothing_out_and_its_buffers_stay(tmp_path: Path) -> None:
    model = Mixed()
    assert list(frozen_parts(model)) == ["encoder"]
    drops: list[bool] = []
    model.encoder[2].register_forward_hook(lambda layer, inputs, output: drops.append(layer.training))
    before = digests(model)
    test_losses.trained(model, tmp_path, precision="fp32")
    assert set(drops) == {False}
    assert digests(model) == before

    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model.encoder[3] = Counts().requires_grad_(False)
    with pytest.raises(AssertionError, match=r"frozen weight encoder\.3\.calls has changed"):
        test_losses.trained(model, tmp_path, precision="fp32")
