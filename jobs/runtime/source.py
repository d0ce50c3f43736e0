"""The code that a job runs: its folder and its commit."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `jobs/` and `mmcore/`: the code that this driver runs."""

# Ray's name of a working directory that it unpacked, before the hash of its files.
_RAY_PACKAGE = "_ray_pkg_"


def source_commit() -> str:
    """The commit of the code, with ``+changes`` where files differ from it; ``unknown`` outside a checkout.

    Of code that was sent to a cluster, which leaves .git at home, it is the name of Ray's package, a hash of the files.
    """
    if ROOT.name.startswith(_RAY_PACKAGE):
        return ROOT.name
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--exclude=*", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
