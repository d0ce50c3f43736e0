"""The name of the hardware, and the thread that computes."""

from concurrent.futures import ThreadPoolExecutor

import torch

from mmcore.device import compute_thread


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
