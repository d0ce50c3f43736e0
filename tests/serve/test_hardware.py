"""What a replica takes of its machine: the GPU that Ray gave it, and no other."""

import pytest
import ray
from serving import FakeCaptioner, FakeGenerator

from serve import hardware
from serve.captioner import Captioner
from serve.generator import Generator
from serve.limits import Limits


@pytest.mark.parametrize(("given", "device"), [([], "cpu"), ([0], "cuda"), (["GPU-1"], "cuda"), (None, "cpu")])
def test_a_model_is_put_where_ray_gave_a_gpu(
    given: list[int] | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine with GPUs, which a replica sees even if it asked for none (`gpus=0`)."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: given is not None)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
    devices: list[str] = []
    Captioner("words", lambda device: devices.append(device) or FakeCaptioner(), Limits())  # type: ignore[func-returns-value]
    Generator("shapes", lambda device: devices.append(device) or FakeGenerator(), Limits())  # type: ignore[func-returns-value]
    assert devices == [device, device]


def test_threads_are_those_that_are_set_or_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 7})
    assert hardware.num_threads(Limits()) == 3
    assert hardware.num_threads(Limits(model_threads=2)) == 2
