"""Prefetching of batches."""

import threading

import pytest
import torch

from mmcore.errors import InputError
from mmcore.rows import prefetched


def test_batches_put_together_ahead_come_in_order_with_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches():
        yield [{"x": torch.tensor(0)}]
        yield [{"x": torch.tensor(1)}]
        raise InputError("row 7 is broken")

    seen = []
    with pytest.raises(InputError, match="row 7 is broken"):  # noqa: PT012
        for batch in prefetched(batches()):
            seen.append(int(batch[0]["x"]))
    assert seen == [0, 1]
    before = set(threading.enumerate())
    monkeypatch.setattr("mmcore.rows._JOIN_S", 300.0)
    endless = prefetched(iter(lambda: [], None))
    next(endless)
    endless.close()
    assert "prefetch" not in {thread.name for thread in set(threading.enumerate()) - before}
