"""The benchmarks run, and compare equal things."""

import json

import pytest
from conftest import RunJob


@pytest.mark.parametrize(
    ("bench", "figures"),
    [
        pytest.param("latency", {"seconds", "added_ms"}, marks=pytest.mark.soak),
        pytest.param("throughput", {"of_offline", "times_one_at_a_time", "cpu_s_per_image"}, marks=pytest.mark.soak),
    ],
)
def test_bench(bench: str, figures: set[str], run_job: RunJob) -> None:
    done = run_job("-m", f"serve.bench.{bench}", "--smoke")
    found = json.loads(done.stdout)
    assert found["bench"] == f"serve_{bench}"
    assert figures <= set(found)
    assert found["device"]
