"""The hardware of a replica: only the GPU that Ray assigned."""

import threading

import numpy as np
import pytest
import ray
import torch
from serving import SIZE, FakeCaptioner, FakeGenerator, FakeSearch, run, wanted

from serve import hardware
from serve.captioner import Captioner
from serve.generator import Generator
from serve.limits import Limits


@pytest.mark.parametrize(("given", "device"), [([], "cpu"), ([0], "cuda"), (["GPU-1"], "cuda"), (None, "cpu")])
def test_a_model_is_put_where_ray_gave_a_gpu(
    given: list[int] | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine with GPUs, which a replica sees even without a request for one (`gpus=0`)."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: given is not None)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
    devices: list[str] = []
    Captioner("words", lambda device: devices.append(device) or FakeCaptioner(), Limits())  # type: ignore[func-returns-value]
    Generator("shapes", lambda device: devices.append(device) or FakeGenerator(), Limits())  # type: ignore[func-returns-value]
    assert devices == [device, device]


@pytest.mark.parametrize(("of_container", "expected"), [(64, 3), (2, 2), (0, 1)])
def test_threads_are_those_that_are_set_or_every_core_that_it_may_use(
    of_container: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 7})
    monkeypatch.setattr(hardware, "cpus", lambda: of_container)
    assert hardware.num_threads(Limits()) == expected
    assert hardware.num_threads(Limits(model_threads=5)) == 5


def test_a_model_is_loaded_in_the_thread_that_it_works_in() -> None:
    """If each had its own threads, OpenMP would have two teams, with more threads than cores."""
    limits = Limits(model_threads=3)
    loaded: list[tuple[int, int]] = []

    class Words(FakeCaptioner):
        def __init__(self) -> None:
            super().__init__()
            self.threads: set[int] = set()
            loaded.append((threading.get_ident(), torch.get_num_threads()))

        def caption(self, pixels: np.ndarray, options: FakeSearch) -> list[str]:
            self.threads.add(threading.get_ident())
            return super().caption(pixels, options)

    class Shapes(FakeGenerator):
        def __init__(self) -> None:
            super().__init__()
            loaded.append((threading.get_ident(), torch.get_num_threads()))

    captioner = Captioner("words", lambda device: Words(), limits)
    generator = Generator("shapes", lambda device: Shapes(), limits)

    async def main() -> None:
        await captioner.caption({SIZE: np.zeros((SIZE, SIZE, 3), np.uint8)}, 5)
        await generator.generate(wanted("a red circle", steps=2))

    run(main())
    assert isinstance(captioner.model, Words)
    assert isinstance(generator.model, Shapes)
    assert [*captioner.model.threads, *generator.model.threads] == [thread for thread, _ in loaded]
    assert [number for _, number in loaded] == [3, 3]
    assert threading.get_ident() not in captioner.model.threads
