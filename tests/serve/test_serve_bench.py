"""The benchmarks run, and compare equal things."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import RunJob

from serve.bench import latency, throughput
from serve.bench.measuring import Endpoint


def test_a_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(SystemExit, match=r"^error: .* package httpx; `make setup` installs it$"):
        Endpoint("http://127.0.0.1:1", {}).client()


def test_a_package_that_httpx_lacks_is_not_taken_for_httpx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "httpx.py").write_text("import of_httpx\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "httpx", raising=False)
    with pytest.raises(ModuleNotFoundError, match="of_httpx"):
        Endpoint("http://127.0.0.1:1", {}).client()


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
