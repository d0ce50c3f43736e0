"""mmcore/temporary.py: folders of killed processes are removed, those of live ones are not."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mmcore.temporary import make_folder, temporary_folder

HOLD = """
import sys
from mmcore.temporary import make_folder
print(make_folder("ray", sys.argv[1]), flush=True)
sys.stdin.read()
"""


@pytest.mark.process
def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        (folder / "session").mkdir()
        stranger = tmp_path / "mmcore-0"  # from an earlier version, or the cache of features
        stranger.mkdir()
        mine = make_folder("run", str(tmp_path))
        assert folder.is_dir(), "it is a live one's"
        process.kill()
        process.wait()
    make_folder("model", str(tmp_path))
    assert not folder.exists()
    assert mine.is_dir()
    assert stranger.is_dir()


def test_it_goes_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder("model") as folder:
        (folder / "file").touch()
        assert {path.name for path in folder.iterdir()} == {"lock", "file"}
    assert not list(tmp_path.iterdir())
