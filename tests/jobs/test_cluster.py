"""Joining a cluster and naming what a stalled job waits for, on real local Rays."""

import ast
import os
import re
import time
from pathlib import Path

import psutil
import pytest

from jobs import cluster
from mmcore.errors import InputError

STATUS_JOB = """
import os, sys
from pathlib import Path
from jobs.cluster import connect
if "--default-interval" in sys.argv:
    del os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]
connect(); connect()
import ray
token_file = os.environ.get("RAY_AUTH_TOKEN_PATH")
mode = oct(os.stat(token_file).st_mode & 0o777) if token_file else None
answer = ray.get(ray.remote(lambda: 41 + 1).remote())
print({"cpus": ray.cluster_resources()["CPU"], "answer": answer, "auth": os.environ.get("RAY_AUTH_MODE"),
       "token_file": token_file, "token_file_mode": mode,
       "interval": os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]})
"""


@pytest.mark.parametrize("history", ["none", "token from earlier", "mode disabled"])
def test_a_local_ray_starts_whatever_ray_left_behind(history, run_job, tmp_path):
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    env, flags = {"HOME": str(home)}, ["--default-interval"]
    if history == "token from earlier":
        (home / ".ray" / "auth_token").write_text("a" * 64)
    elif history.startswith("mode"):
        env["RAY_AUTH_MODE"] = history.removeprefix("mode ")
        env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"], flags = "0.25", []
    script = tmp_path / "status.py"
    script.write_text(STATUS_JOB)

    done = run_job(script, *flags, env=env)

    result = ast.literal_eval(done.stdout.strip())
    assert result["answer"] == 42
    assert result["cpus"] >= cluster.MIN_LOCAL_CPUS
    assert result["auth"] == ("disabled" if history == "mode disabled" else "token")
    assert result["interval"] == ("0.25" if history.startswith("mode") else str(cluster.HEALTH_CHECK_INTERVAL_S))
    lines = [line for line in done.stderr.splitlines() if line.startswith("Ray:")]
    assert len(lines) == 1, done.stderr
    assert "dashboard http://127.0.0.1:" in lines[0]
    if history == "none":
        # A token left in the home folder would lock the next `ray job submit` out.
        assert not (home / ".ray" / "auth_token").exists()
        assert result["token_file_mode"] == "0o600"
        assert not Path(result["token_file"]).parent.exists(), "the folder of this Ray is removed at exit"
    else:
        assert result["token_file"] is None


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("http://127.0.0.1:8265", "use `ray job submit`"),
        ("ray://127.0.0.1:10001", "HOST:PORT"),
        ("nonsense", "Invalid address format"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address, message, monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as refused:
        cluster.connect()
    assert address in str(refused.value)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - start < 2 * cluster.CONNECT_TIMEOUT_S


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    def too_slow(**settings):
        raise Exception("The current node timed out\nduring startup")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", too_slow)
    monkeypatch.setattr(cluster, "_reload_auth_mode", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    with pytest.raises(InputError, match=r"Ray does not start .* \(RAY_TMPDIR\): The current node timed out during s"):
        cluster.connect()


def wait_until_named(text: str) -> str:
    """`describe_waiting()` once it holds `text`: the head hears of a demand with the next heartbeat."""
    deadline = time.monotonic() + 20
    while text not in (described := cluster.describe_waiting()):
        assert time.monotonic() < deadline, described
        time.sleep(0.2)
    return described


def test_what_waits_is_named_with_what_is_missing(ray_local):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    assert "nothing waits for resources" in cluster.describe_waiting()
    has_cpus = int(ray.cluster_resources()["CPU"])

    group = placement_group([{"CPU": 1, "GPU": 1}] * 2, name="workers")
    described = wait_until_named("placement group")
    assert "waiting for a placement group 'workers' of {CPU: 1, GPU: 1} x 2" in described
    assert f"the cluster has CPU {has_cpus} (" in described
    assert "GPU 0 (0 free); missing: GPU" in described
    remove_placement_group(group)

    @ray.remote(num_cpus=0, num_gpus=1)
    class NeedsGpu:
        pass

    actor = NeedsGpu.remote()
    described = wait_until_named("{GPU: 1}")
    assert "pending actors: NeedsGpu" in described
    assert "missing: GPU" in described
    ray.kill(actor)

    @ray.remote(num_cpus=has_cpus)
    def busy():
        time.sleep(6)

    tasks = [busy.remote() for _ in range(2)]
    # Enough in all, nothing free: an autoscaler or patience mends it.
    described = wait_until_named("all in use: CPU")
    assert f"waiting for {{CPU: {has_cpus}}}" in described
    assert "missing" not in described
    ray.get(tasks)

    # Enough in total but on no single node.
    assert cluster._lacking([cluster.Counter(CPU=6)], [cluster.Counter(CPU=4)] * 2) == {"CPU"}
    assert cluster._lacking([cluster.Counter(CPU=4)] * 2, [cluster.Counter(CPU=4)] * 2) == set()


def test_demands_inside_a_placement_group_are_told_apart(ray_local):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())

    @ray.remote(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
    def busy():
        time.sleep(30)

    tasks = [busy.remote() for _ in range(2)]
    described = wait_until_named("inside a full placement group")
    assert "{CPU: 1}" in described
    # The group's CPU is not counted a second time.
    assert f"the cluster has CPU {ray.cluster_resources()['CPU']:g} (" in described
    for task in tasks:
        ray.cancel(task, force=True)
    remove_placement_group(group)


def test_watchdog_is_silent_while_there_is_progress(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "describe_waiting", lambda: "waiting for Godot")
    with cluster.Watchdog("training", report_after_s=1.5) as watchdog:
        for _ in range(20):
            time.sleep(0.1)
            watchdog.beat()
        assert capsys.readouterr().err == ""
        time.sleep(2.5)
        stalled = capsys.readouterr().err
        assert re.match(r"stalled: training: no progress for \d s: waiting for Godot", stalled)
        assert stalled.count("\n") == 1, "the next line comes a minute later"
        watchdog.beat()
        time.sleep(2.5)
        assert capsys.readouterr().err.count("stalled:") == 1, "a beat starts the time anew"
    time.sleep(2)
    assert capsys.readouterr().err == ""


def test_a_long_wait_that_is_usual_is_reported_calmly(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "describe_waiting", lambda: "waiting for Godot")
    with cluster.Watchdog("sweep", report_after_s=0.2) as watchdog:
        watchdog.usual_s = 100.0
        time.sleep(1)
    said = capsys.readouterr().err
    assert re.match(r"waiting: sweep: no progress for \d s \(up to 100 s went well before\): waiting for Godot", said)


def test_watchdog_reports_a_head_that_does_not_answer(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "QUERY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(cluster, "describe_waiting", lambda: time.sleep(5))
    with cluster.Watchdog("sweep", report_after_s=0.1):
        time.sleep(0.6)
    assert re.search(r"sweep: no progress for \d s: the cluster's head does not answer", capsys.readouterr().err)

    def gone():
        raise ConnectionError("the head\nis gone")

    monkeypatch.setattr(cluster, "describe_waiting", gone)
    with cluster.Watchdog("sweep", report_after_s=0.1):
        time.sleep(0.6)
    assert "cannot be read (ConnectionError: the head is gone)" in capsys.readouterr().err


def test_a_stall_is_named_within_a_minute_by_default():
    assert cluster.Watchdog("training").report_after_s + cluster.QUERY_TIMEOUT_S < 60
    with pytest.raises(InputError, match="--stall-timeout -1"):
        cluster.Watchdog("training", stall_timeout_s=-1)


def command_lines() -> list[str]:
    return [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]


STALLED_JOB = """
import ray
from jobs.cluster import Watchdog, connect
connect()

@ray.remote(num_gpus=1)
def never():
    pass

with Watchdog("training", stall_timeout_s=12, report_after_s=2):
    print("waits", flush=True)
    ray.get(never.remote())
"""


def test_stall_timeout_ends_a_job_that_is_blocked_in_ray(run_job, tmp_path):
    script = tmp_path / "stalled.py"
    script.write_text(STALLED_JOB)
    done = run_job(script, check=False, timeout_s=200, env={"CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("waits\n")
    lines = done.stderr.splitlines()
    # How many seconds is left open: the answer of a busy machine takes some.
    (first,) = [line for line in lines if re.match(r"stalled: training: no progress for \d+ s: ", line)]
    assert "waiting for {CPU: 1, GPU: 1}" in first
    assert "missing: GPU" in first
    (last,) = [line for line in lines if re.match(r"error: training: no progress for \d+ s: ", line)]
    assert "missing: GPU" in last
    assert "--stall-timeout 12" in last
    # The reaper of that Ray ends its processes; they are known by the folder in their command lines.
    folder = lines[0].partition("token in ")[2].rpartition("/")[0]
    assert "mmcore-ray-" in folder
    deadline = time.monotonic() + 60
    while left := [name for name in command_lines() if folder in name]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
