"""The name of the hardware, and the thread that computes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mmcore import device
from mmcore.device import compute_thread, fast_products


def test_a_compute_thread_changes_no_other_threads_number() -> None:
    """In a thread that has not computed yet, as at the start of a training."""

    def numbers() -> tuple[int, int]:
        with compute_thread(1) as thread:
            return thread.submit(torch.get_num_threads).result(), torch.get_num_threads()

    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(3,)) as fresh:
        assert fresh.submit(numbers).result() == (1, 3)
    # The number that new threads start with.
    torch.set_num_threads(before)


def test_fast_products_are_in_fp32_and_leave_the_setting() -> None:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    x, y = torch.rand(40, 300), torch.rand(300, 200)
    exact = x.double() @ y.double()
    with fast_products():
        made = x @ y
    assert ((made - exact) / exact).abs().max() < 1e-5  # measured 1e-6; rounded to bf16 it is 6e-4
    with pytest.raises(KeyError), fast_products():
        raise KeyError
    assert setting.fp32_precision == before


@pytest.mark.parametrize(
    ("can", "changed"),
    [
        ({"avx512_f": True}, True),
        ({"avx512_f": True, "amx_tile": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_fast_products_change_nothing_where_they_might_round(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, object], changed: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    device._onednn_stays_in_fp32.cache_clear()
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    with fast_products():
        assert (setting.fp32_precision != before) == changed
    device._onednn_stays_in_fp32.cache_clear()
