"""python -m serve.control: one line for every mistake, and one command each to start and to stop."""

import socket
from pathlib import Path

import httpx
import pytest
from conftest import RunJob, StartJob, free_port
from serving import AUTHORIZED, HANG_S, KEY, chat, data_uri, picture, wait_ready
from tiny_runs import write_resnet

from mmcore.errors import InputError
from mmcore.storage import Storage
from serve import control
from serve.app import Args, check_runs
from serve.bench.measuring import write_captioner

CONTROL = ("-m", "serve.control")
CLOSED = {"SERVE_API_KEYS": "", "SERVE_API_KEYS_FILE": ""}


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("start", "captioner=a:/x"), {}, "no key"),
        (("start", "captioner=a:/x"), {"SERVE_API_KEYS": "short"}, "can be guessed"),
        (("start", "captioner=a:/x"), {"SERVE_API_KEYS_FILE": "/nowhere/keys"}, "cannot be read"),
        (("start", "captioner=a:/x"), {"SERVE_API_KEYS": KEY, "SERVE_MAX_QUEUE": "many"}, "SERVE_MAX_QUEUE='many'"),
        (("start",), {"SERVE_API_KEYS": KEY}, "nothing to serve"),
        (
            ("start", "captioners=a:/x"),
            {"SERVE_API_KEYS": KEY},
            "captioners=a:/x: no such argument; did you mean captioner=? the arguments are host, port, cap",
        ),
        (("start", "foo=bar"), {"SERVE_API_KEYS": KEY}, "foo=bar: no such argument; the arguments are host, port, cap"),
        (("start", "captioner"), {"SERVE_API_KEYS": KEY}, "key=value"),
        (("start", "captioner=a:/x", "captioner=b:/x"), {"SERVE_API_KEYS": KEY}, "given twice"),
        (("start", "captioner=a:/x", "port=http"), {"SERVE_API_KEYS": KEY}, "port=http"),
        (("start", "captioner=a:/x", "open=perhaps"), {"SERVE_API_KEYS": KEY}, "open=perhaps: give true or false"),
        (("start", "captioner=a:/nowhere/at/all"), {"SERVE_API_KEYS": KEY}, "/nowhere/at/all"),
        (("stop", "port=1"), {}, "no service"),
        (("stop", "captioner=a:/x"), {}, "stop takes port=NUMBER"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["control", *arguments])
    for name, value in {**CLOSED, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        control.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert KEY not in line


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port={port}: cannot listen there"):
            control.run(lambda: None, port=port)


def test_runs_of_another_kind(tmp_path: Path) -> None:
    run = write_captioner(Storage(str(tmp_path)) / "run", smoke=True)
    check_runs(Args(captioner=f"a:{run}"))
    with pytest.raises(InputError, match="recipe 'resnet_captioner' is not of kind generator; name a run of "):
        check_runs(Args(generator=f"a:{run}"))


def test_a_process_that_may_not_start_says_one_line(run_job: RunJob) -> None:
    done = run_job(*CONTROL, "start", "captioner=a:/x", env=CLOSED, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: no key")


@pytest.mark.parametrize(
    ("folder", "words"),
    [pytest.param("nowhere", "No such file", marks=pytest.mark.nightly), ("long" * 30, "Ray does not start")],
)
def test_a_place_where_ray_does_not_start_is_told_in_one_line(
    folder: str, words: str, tmp_path: Path, run_job: RunJob
) -> None:
    if words.startswith("Ray"):
        # The names of its sockets become longer than the system allows.
        (tmp_path / folder).mkdir()
    run_folder = write_captioner(Storage(str(tmp_path)) / "run", smoke=True)
    command = (*CONTROL, "start", f"captioner=tiny:{run_folder}", f"port={free_port()}")
    variables = {**CLOSED, "SERVE_API_KEYS": KEY, "RAY_TMPDIR": str(tmp_path / folder)}
    done = run_job(*command, env=variables, check=False)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    assert words in line
    assert "RAY_TMPDIR" in line


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["start", "--help"], 0), ([], 2)])
def test_what_it_can_do_is_told(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["control", *arguments])
    with pytest.raises(SystemExit) as ended:
        control.main()
    assert ended.value.code == code
    told = capsys.readouterr().out
    assert "serve.control stop" in told
    assert "gallery= " in told
    assert "A sweep of jobs/generate.py" in told


def test_an_unknown_command_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["control", "frob"])
    with pytest.raises(SystemExit) as ended:
        control.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: 'frob': no such command; give start or stop, or --help\n"


@pytest.mark.soak
def test_a_model_that_does_not_load_is_told_in_one_line(tmp_path: Path, run_job: RunJob) -> None:
    """Its encoder is gone, which only the process that loads it notices. Ray's report of that has a traceback."""
    encoder = write_resnet(tmp_path / "encoder")
    run_folder = write_captioner(Storage(str(tmp_path)) / "run", smoke=True, encoder=str(encoder))
    encoder.rename(tmp_path / "elsewhere")
    command = (*CONTROL, "start", f"captioner=tiny:{run_folder}", f"port={free_port()}")
    done = run_job(*command, env={**CLOSED, "SERVE_API_KEYS": KEY}, check=False)
    assert done.returncode == 1
    # The last line, after output that Ray forwards from its processes.
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the models did not start: captioner-tiny: mmcore.errors.InputError: "), done.stderr
    assert str(encoder) in line


def test_start_and_stop(tmp_path: Path, start_job: StartJob, run_job: RunJob) -> None:
    """A trained captioner from its run folder, with keys from a file."""
    write_captioner(Storage(str(tmp_path)) / "run", smoke=True)
    port, keys, log = free_port(), tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"{KEY}\n")
    environment = {**CLOSED, "SERVE_API_KEYS_FILE": str(keys), "SERVE_DRAIN_TIMEOUT_S": "20"}
    command = (*CONTROL, "start", f"captioner=tiny:{tmp_path / 'run'}", f"port={port}")
    process = start_job(*command, env=environment, log=log)
    url = f"http://127.0.0.1:{port}"
    wait_ready(url, process, log)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    body = {**chat(data_uri(picture())), "model": "tiny"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTHORIZED, timeout=HANG_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]
    # Another key, without a restart.
    keys.write_text("another-key-0123456789\n")
    assert httpx.get(f"{url}/v1/models", headers=AUTHORIZED).status_code == 401
    other = {"authorization": "Bearer another-key-0123456789"}
    assert httpx.get(f"{url}/v1/models", headers=other).json()["data"][0]["id"] == "tiny"

    second = run_job(*command, env=environment, check=False)
    assert second.returncode == 1
    assert f"port={port}: a service runs there" in second.stderr

    done = run_job(*CONTROL, "stop", f"port={port}", env=CLOSED)
    assert done.returncode == 0
    assert "to end; requests in flight have " in done.stderr
    assert "has ended" in done.stderr
    assert not control.lock_file(port).exists()
    # `stop` returns when everything has ended.
    assert process.wait(HANG_S) == 0, log.read_text()[-3000:]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    assert "no service" in run_job(*CONTROL, "stop", f"port={port}", env=CLOSED, check=False).stderr
