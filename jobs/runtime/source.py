"""The code that a job runs: its folder and its commit, and whether it came to a cluster with the job."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from mmcore.errors import InputError
from mmcore.s3 import S3
from mmcore.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `jobs/` and `mmcore/`: the code that this driver runs."""

# Ray's name of a working directory that it unpacked, before the hash of its files.
_RAY_PACKAGE = "_ray_pkg_"
# Where Ray unpacks the working directories of jobs, in the folder of its session.
_RAY_COPIES = ("runtime_resources", "working_dir_files")


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


def submission() -> dict[str, Any] | None:
    """The runtime environment with which `ray job submit` started this job; None where something else started it."""
    config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return None if config is None else json.loads(config).get("runtime_env") or {}


def output_storage(folder: str, flag: str) -> Storage:
    """The output `folder` of a job, from `flag` or its default.

    Raises InputError if the job was submitted with its working directory (``--working-dir``) and the folder is relative
    or inside Ray's copy of it. That copy is removed with the cluster.
    """
    storage = Storage(folder)
    if storage.is_s3:
        return storage
    is_sent = _in_ray_copy(Path.cwd()) or _in_ray_copy(ROOT)
    if _in_ray_copy(Path(storage.uri)) or (is_sent and not Path(folder).expanduser().is_absolute()):
        raise InputError(
            f"{flag} {folder}: would lie in Ray's copy of the job's working directory, which is removed with the "
            f"cluster; give an absolute path, such as {flag} {Path.home() / storage.name}, or {S3}bucket/prefix"
        )
    return storage


def _in_ray_copy(place: Path) -> bool:
    return any(each.parts[-2:] == _RAY_COPIES for each in place.parents)
