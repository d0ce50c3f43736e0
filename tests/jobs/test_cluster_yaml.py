"""cluster.yaml against Ray's own schema and launcher (with an emulated AWS), and rayjob.yaml against its promises."""

import copy
import json
import os
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    name.split(".")[0]
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
}


@pytest.fixture
def config():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def commands(config):
    return [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]


def ray_of_constraints() -> str:
    found = re.search(r"(?m)^ray(?:\[.*?\])?==(\S+)$", (ROOT / "constraints.txt").read_text())
    assert found, "constraints.txt does not fix ray"
    return found.group(1)


def test_ray_accepts_the_file(config):
    filled = fillout_defaults(copy.deepcopy(config))
    prepared = prepare_config(copy.deepcopy(config))
    for complete in (filled, prepared):
        validate_config(complete)
    # Ray knows every key that we set: the schema refuses others.
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config({**filled, "idle_timeout_minute": 5})
    # Setup runs on the head and on the workers.
    assert set(config["setup_commands"]) <= set(prepared["head_setup_commands"])
    assert set(config["setup_commands"]) <= set(prepared["worker_setup_commands"])


def test_ray_resolves_the_file_on_an_emulated_aws(config, monkeypatch, tmp_path):
    """The steps of `ray up` before it starts machines: key pair, subnets, security groups, image, roles."""
    moto = pytest.importorskip("moto")
    from ray.autoscaler._private.aws import utils as aws_utils
    from ray.autoscaler._private.aws.config import bootstrap_aws

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    aws_utils.resource_cache.cache_clear()
    aws_utils.client_cache.cache_clear()
    with moto.mock_aws():
        resolved = bootstrap_aws(prepare_config(copy.deepcopy(config)))
    aws_utils.resource_cache.cache_clear()
    aws_utils.client_cache.cache_clear()
    for name, node_type in resolved["available_node_types"].items():
        asked = config["available_node_types"][name]["node_config"]
        launched = node_type["node_config"]
        assert {key: launched[key] for key in asked} == asked
        assert launched["SubnetIds"]
        assert launched["SecurityGroupIds"]
    # The role in the file is kept, and Ray creates none.
    assert "IamInstanceProfile" not in resolved["head_node"]


def test_nothing_costs_money_while_nothing_runs(config):
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"], "a head that can vanish takes the jobs with it"
    assert head.get("min_workers", 0) == 0
    assert types
    for worker in types.values():
        assert worker["resources"]["GPU"] > 0
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert 0 < config["idle_timeout_minutes"] <= 30
    # Ray's default would keep stopped machines with their disks.
    assert config["provider"]["cache_stopped_nodes"] is False


def test_closed_by_default(config):
    head_starts = [command for command in commands(config) if "ray start --head" in command]
    assert len(head_starts) == 1
    assert re.findall(r"--dashboard-host[= ](\S+)", head_starts[0]) == ["127.0.0.1"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    token_files = {remote: local for remote, local in config["file_mounts"].items() if "auth_token" in remote}
    assert token_files == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for node_type in config["available_node_types"].values():
        assert set(node_type["node_config"]["IamInstanceProfile"]) <= {"Name", "Arn"}


def test_it_can_serve(config):
    """Its containers have the environment variables that serve/app.py needs when Ray starts.

    The keys come separately.
    """
    from serve.proxy import VALUE, VARIABLE

    environment = dict(each.removeprefix("--env ").split("=", 1) for each in config["docker"]["run_options"][1:])
    assert environment[VARIABLE] == VALUE
    assert environment.keys() == {"RAY_AUTH_MODE", VARIABLE, "SERVE_API_KEYS_FILE"}
    # The commented line copies the file to the path where it is expected.
    (line,) = re.findall(r"(?m)^  # (/home/ray/\S+): ~/\S+$", (ROOT / "cluster.yaml").read_text())
    assert environment["SERVE_API_KEYS_FILE"] == f"{line}/keys"


def test_no_secret_in_the_files():
    for name in ("cluster.yaml", "jobs/rayjob.yaml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|RAY_AUTH_TOKEN=|aws_secret|SECRET_ACCESS_KEY|[0-9a-f]{40}", text)


def test_only_code_is_copied_to_the_nodes(config):
    mounted = {Path(local) for local in config["file_mounts"].values() if not local.startswith("~")}
    assert {Path("jobs"), Path("mmcore"), Path("pyproject.toml"), Path("constraints.txt")} <= mounted
    for local in mounted:
        assert (ROOT / local).exists(), f"cluster.yaml copies {local}, which does not exist"
        assert local.parts[0] not in {"data", "runs", "out", ".git", ".venv", "."}
    # The setup command, the start command and the copy use the same path.
    folders = {Path(remote).parent for remote, local in config["file_mounts"].items() if local in PACKAGES}
    assert folders == {Path("/home/ray/mmcore")}
    assert config["setup_commands"] == ["pip install -c ~/mmcore/constraints.txt -e ~/mmcore"]
    for command in commands(config):
        assert "ray start" not in command or command.startswith("cd ~/mmcore && ")


def test_what_is_installed_there_is_copied_there(config):
    """pip fails for a package of pyproject.toml that does not exist."""
    assert set(config["file_mounts"].values()) >= {*PACKAGES, "pyproject.toml", "constraints.txt", "README.md"}
    for name in ("jobs/rayjob.yaml", "serve/rayservice.yaml"):
        copied = re.findall(r"^#   COPY --chown=ray (.+) \S+$", (ROOT / name).read_text(), re.M)
        assert {each for line in copied for each in line.split()} >= {*PACKAGES, "pyproject.toml", "README.md"}, name


def test_cluster_runs_the_tested_ray(config):
    version = ray_of_constraints()
    for kind in ("head_image", "worker_image"):
        assert config["docker"][kind].startswith(f"rayproject/ray:{version}-py311")


@pytest.fixture
def ray_job():
    documents = list(yaml.safe_load_all((ROOT / "jobs" / "rayjob.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["ServiceAccount", "RayJob"]
    return documents


def test_ray_job_of_kubernetes(ray_job):
    account, job = ray_job
    assert job["apiVersion"] == "ray.io/v1"
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True

    interpreter, script, *flags = spec["entrypoint"].split()
    assert interpreter == "python"
    assert (ROOT / script).is_file(), f"{script} does not exist"
    assert flags[flags.index("--storage") + 1].startswith("s3://")

    version = ray_of_constraints()
    assert cluster["rayVersion"] == version
    head = cluster["headGroupSpec"]
    groups = cluster["workerGroupSpecs"]
    assert groups
    for group in (head, *groups):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["image"].endswith(f":ray{version}")
        assert container["workingDir"] == "/home/ray/mmcore"
        # KubeRay passes limits to Ray, and the scheduler of Kubernetes uses requests.
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group is not head)
    for group in groups:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    assert f"FROM rayproject/ray:{version}-py311" in (ROOT / "jobs" / "rayjob.yaml").read_text()


def test_upload_holds_the_code_and_no_data(tmp_path):
    """`.rayignore` as Ray applies it, in a checkout full of outputs of runs."""
    import shutil
    import zipfile

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in (".rayignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    for package in ("jobs", "mmcore", "serve"):
        if (ROOT / package).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, checkout / package, ignore=ignore)
    code = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*.py")}
    litter = [
        ".git/config", ".venv/bin/python", "data/flickr8k/1.txt", "runs/demo/metrics.jsonl", "out/runs/x/y.json",
        "photos/1.jpg", "photos/flickr8k.zip", "weights/model.safetensors", "weights/a.pth", "mmcore.egg-info/PKG",
        "part-00000.parquet", "mmcore/__pycache__/x.pyc", "tests/test_x.py",
    ]  # fmt: skip
    for name in litter:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")

    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, include_parent_dir=False, excludes=[])
    with zipfile.ZipFile(package) as archive:
        uploaded = {name for name in archive.namelist() if not name.endswith("/")}
    assert code <= uploaded, "mmcore/data/ is code"
    assert not uploaded & set(litter)
    # The code alone is 2.2 MB, not compressed. The limit of Ray is 100 MiB.
    assert package.stat().st_size < 4 * 2**20
    # .rayignore is enough: a copy without .gitignore is as small.
    (checkout / ".gitignore").unlink()
    create_package(str(checkout), package, include_gitignore=True, include_parent_dir=False, excludes=[])
    with zipfile.ZipFile(package) as archive:
        assert not set(archive.namelist()) & set(litter), json.dumps(archive.namelist())
