"""The benchmarks run, and compare equal things."""

import importlib
import json
import sys
from types import ModuleType

import pytest
from conftest import RunJob

from serve.bench import latency, throughput


def test_a_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "serve.bench.measuring", raising=False)
    with pytest.raises(SystemExit, match=r"^error: .* package httpx; `make setup` installs it$"):
        importlib.import_module("serve.bench.measuring")


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


@pytest.mark.parametrize("bench", [latency, throughput])
def test_a_wrong_flag_is_one_line(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--smok"])
    with pytest.raises(SystemExit, match=r"^error: --smok: no such flag; did you mean --smoke\? "):
        bench.main()
