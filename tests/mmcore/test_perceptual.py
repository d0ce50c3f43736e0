"""Perceptual distances: LPIPS as published, and features of any convolutional network."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MobileNetV2Config, MobileNetV2Model, ViTConfig, ViTModel

from mmcore.errors import InputError
from mmcore.frozen.pretrained import sha256_of
from mmcore.generators.perceptual import LPIPS, FeatureDistance

# torchvision's vgg16, configuration D: channels of its convolutions, M for a pooling.
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights with the names of the published files: one .pth, one safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vgg: dict[str, Tensor] = {}
    place, before = 0, 3
    for entry in VGG16:
        if entry == "M":
            place += 1
            continue
        assert isinstance(entry, int)
        vgg[f"features.{place}.weight"] = torch.randn(entry, before, 3, 3) * (2 / (9 * before)) ** 0.5
        vgg[f"features.{place}.bias"] = torch.randn(entry) * 0.1
        place, before = place + 2, entry  # a convolution and its ReLU
    vgg["classifier.0.weight"] = torch.zeros(3)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, folder / "vgg16.pth")
    save_file(heads, folder / "vgg.safetensors")
    return folder / "vgg16.pth", folder / "vgg.safetensors"


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_is_the_published_formula(files: tuple[Path, Path]) -> None:
    vgg = torch.load(files[0], weights_only=True)
    heads = load_file(files[1])

    def stages(x: Tensor) -> list[Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            1, 3, 1, 1
        )
        found, place = [], 0
        for entry in VGG16:
            if entry == "M":
                found.append(x)
                x, place = F.max_pool2d(x, 2, 2), place + 1
            else:
                x = F.relu(F.conv2d(x, vgg[f"features.{place}.weight"], vgg[f"features.{place}.bias"], padding=1))
                place += 2
        return found

    a, b = images(0), images(1)
    expected = torch.zeros(2)
    for stage, (of_a, of_b) in enumerate(zip(stages(a), stages(b), strict=True)):
        unit_a, unit_b = (each / (each.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for each in (of_a, of_b))
        expected += F.conv2d((unit_a - unit_b) ** 2, heads[f"lin{stage}.model.1.weight"]).mean((1, 2, 3))
    lpips = LPIPS(*map(str, files))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(lpips(a, a), torch.zeros(2))
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_the_gradient_is_finite_where_images_are_equal_and_features_are_zero(files: tuple[Path, Path]) -> None:
    lpips = LPIPS(*map(str, files))
    with torch.no_grad():
        for parameter in lpips.convolutions.parameters():
            if parameter.ndim == 1:
                parameter.fill_(-100.0)  # every feature becomes zero
    x = images(0).requires_grad_()
    lpips(x, x.detach().clone()).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_missing_and_misshapen_weights_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    vgg, heads = map(str, files)
    with pytest.raises(InputError, match=r"--vgg16 'no\.pth': no such file"):
        LPIPS("no.pth", heads)
    with pytest.raises(InputError, match=r"--lpips-heads .*lin0\.model\.1\.weight is missing"):
        LPIPS(vgg, vgg)
    with pytest.raises(InputError, match=r"--vgg16 .*features\.0\.weight is missing"):
        LPIPS(heads, heads)
    wrong = tmp_path / "wrong.safetensors"
    save_file({f"lin{stage}.model.1.weight": torch.zeros(1, 3, 1, 1) for stage in range(5)}, wrong)
    with pytest.raises(InputError, match=r"has shape \(1, 3, 1, 1\) where \(1, 64, 1, 1\) is needed"):
        LPIPS(vgg, str(wrong))


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_that_is_no_weights_is_refused_and_runs_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Evil()}, tmp_path / name)
    with pytest.raises(InputError, match="not a file of weights") as caught:
        LPIPS(str(tmp_path / name), "heads")
    assert "\n" not in str(caught.value)
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a file of weights"):
        LPIPS(str(tmp_path / name), "heads")
    assert not (tmp_path / "evil-was-here").exists()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny convolutional network in Hugging Face format, with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network")
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.2, finegrained_output=False, depth_divisible_by=2)
    model = MobileNetV2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:  # with the default initialisation features would shrink to 1e-25
                torch.nn.init.kaiming_normal_(parameter)
    model.save_pretrained(folder)
    return str(folder)


def test_features_are_the_last_of_each_resolution(network: str) -> None:
    distance = FeatureDistance(network, 32)
    model = MobileNetV2Model.from_pretrained(network).eval()
    a, b = images(0), images(1)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        maps = [model((((x + 1) / 2) - mean) / std, output_hidden_states=True).hidden_states for x in (a, b)]
        sides = [each.shape[-1] for each in maps[0]]
        last = [index for index, side in enumerate(sides) if side not in sides[index + 1 :]]
        assert sorted({*sides}, reverse=True) == [sides[index] for index in last] == [8, 4, 2, 1]
        pairs = [[F.normalize(of[index], dim=1) for of in maps] for index in last]
        expected = torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in pairs]).mean(0)
        torch.testing.assert_close(distance(a, b), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(distance(a, a), torch.zeros(2))


def test_a_distance_is_of_each_pair_and_falls_as_images_come_closer(network: str) -> None:
    distance = FeatureDistance(network, 32)
    a, b = images(0), images(1)
    with torch.no_grad():
        torch.testing.assert_close(distance(a, b)[1:], distance(a[1:], b[1:]), rtol=1e-4, atol=1e-6)
        assert (distance(a, a + 0.1 * (b - a)) < distance(a, b)).all()
    x = b.clone().requires_grad_()
    distance(a, x).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(a, b).dtype == torch.float32


def test_training_mode_does_not_reach_a_frozen_network(network: str) -> None:
    distance = FeatureDistance(network, 32).train()
    assert not any(module.training for module in distance.modules())
    before = sha256_of(distance, None)
    distance(images(0), images(1))
    assert sha256_of(distance, None) == before


def test_networks_without_feature_maps_are_refused(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match=r"--perceptual .*vit.*has no feature maps"):
        FeatureDistance(str(tmp_path / "vit"), 32)
    with pytest.raises(InputError, match=r"--perceptual 'no/such/folder'"):
        FeatureDistance("no/such/folder", 32)
