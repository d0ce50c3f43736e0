"""serve/config.yaml and serve/rayservice.yaml against Ray's own schema, our builder, and their promises."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray._private import ray_constants
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.application_state import override_deployment_info
from ray.serve._private.build_app import build_app
from ray.serve._private.config import ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)
from serving import KEY, run

from mmcore.errors import InputError
from serve.app import Api, Args, build
from serve.limits import Limits
from serve.proxy import VALUE, VARIABLE
from serve.sources import Source, named

ROOT = Path(__file__).resolve().parents[2]
# `ray start --block` waits this long for a node's requests when it is told to end.
DRAINING = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@pytest.fixture(autouse=True)
def middlewares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, VALUE)


def ray_of_constraints() -> str:
    found = re.search(r"(?m)^ray(?:\[.*?\])?==(\S+)$", (ROOT / "constraints.txt").read_text())
    assert found, "constraints.txt does not fix ray"
    return found.group(1)


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())


@pytest.fixture
def ray_service() -> list[dict[str, Any]]:
    documents = list(yaml.safe_load_all((ROOT / "serve" / "rayservice.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["ServiceAccount", "NetworkPolicy", "RayService"]
    return documents


def serve_config(ray_service: list[dict[str, Any]]) -> dict[str, Any]:
    return yaml.safe_load(ray_service[2]["spec"]["serveConfigV2"])


def deployments_of(application: Any) -> dict[str, Any]:
    return {deployment.name: deployment for deployment in build_app(application, name="mmcore").deployments}


@pytest.mark.parametrize("which", ["config", "ray_service"])
def test_ray_and_the_builder_accept_the_files(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    found = request.getfixturevalue(which)
    schema = ServeDeploySchema.model_validate(found if which == "config" else serve_config(found))
    (application,) = schema.applications
    assert application.route_prefix == "/"
    assert application.import_path == "serve.app:build"
    built = call_user_app_builder_with_args_if_necessary(build, application.args)
    deployments = deployments_of(built)
    # Every deployment named in the file exists.
    assert {each.name for each in application.deployments} <= set(deployments)
    assert set(deployments) == {"api", "jobs", "captioner-resnet", "generator-images"}
    for each in application.deployments:
        if each.name != "api":
            scaling = each.autoscaling_config
            assert isinstance(scaling, dict)
            # The queue must be long enough for all replicas. It counts images. The target counts calls: a generator's
            # call has up to n images, a captioner's one.
            images = Limits().max_n if each.name.startswith("generator") else 1
            assert scaling["target_ongoing_requests"] * scaling["max_replicas"] * images <= Limits().max_queue
            AutoscalingConfig.model_validate(scaling)
            assert scaling["min_replicas"] >= 1, "what asks whether it is ready would wake it again and again"


@pytest.mark.parametrize("which", ["config", "ray_service"])
def test_the_files_let_new_versions_begin_before_old_ones_end(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file overrides the defaults of serve/app.py for models on GPUs."""
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    found = request.getfixturevalue(which)
    (application,) = ServeDeploySchema.model_validate(found if which == "config" else serve_config(found)).applications
    built = deployments_of(call_user_app_builder_with_args_if_necessary(build, application.args))
    infos = {
        name: DeploymentInfo(
            deployment_config=each._deployment_config,
            # Without arguments: a copy of the real ones, which hold handles, would start Ray.
            replica_config=ReplicaConfig.create(object),
            start_time_ms=0,
            deployer_job_id="",
        )
        for name, each in built.items()
    }
    models = ("captioner-resnet", "generator-images")
    assert [infos[name].deployment_config.max_surge_percent for name in models] == [0, 0]
    deployed = override_deployment_info(infos, application)
    surges = {name: each.deployment_config.max_surge_percent for name, each in deployed.items()}
    assert surges == {"api": 100, "jobs": 0, **dict.fromkeys(models, 100)}


@pytest.mark.parametrize("which", ["config", "ray_service"])
def test_every_word_of_the_files_is_one_of_ray(which: str, request: pytest.FixtureRequest) -> None:
    """Ray silently ignores an unknown key and uses its default."""
    found = request.getfixturevalue(which)
    found = found if which == "config" else serve_config(found)
    assert set(found) <= set(ServeDeploySchema.model_fields)
    assert set(found["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    for application in found["applications"]:
        assert set(application) <= set(ServeApplicationSchema.model_fields)
        for deployment in application["deployments"]:
            assert set(deployment) <= set(DeploymentSchema.model_fields)
            assert set(deployment.get("autoscaling_config", {})) <= set(AutoscalingConfig.model_fields)
            assert set(deployment.get("ray_actor_options", {})) <= set(RayActorOptionsSchema.model_fields)


def test_only_this_machine_by_default(config: dict[str, Any]) -> None:
    assert config["http_options"]["host"] == "127.0.0.1"
    assert config["proxy_location"] == "HeadOnly"
    assert "open" not in config["applications"][0]["args"]


def test_no_secret_in_the_files() -> None:
    for name in ("config.yaml", "rayservice.yaml"):
        text = (ROOT / "serve" / name).read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|RAY_AUTH_TOKEN=|aws_secret|SECRET_ACCESS_KEY|[0-9a-f]{32}", text)
        assert not re.search(r"SERVE_API_KEYS\b(?!_FILE)[\"']?[,:] *[\"']?value", text)


def test_ray_service_of_kubernetes(ray_service: list[dict[str, Any]]) -> None:
    account, policy, service = ray_service
    assert service["apiVersion"] == "ray.io/v1"
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    version = ray_of_constraints()
    assert cluster["rayVersion"] == version
    text = (ROOT / "serve" / "rayservice.yaml").read_text()
    assert f"FROM rayproject/ray:{version}-py311" in text
    limits = {f"SERVE_{field.name.upper()}" for field in dataclasses.fields(Limits)}
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    gpus = 0
    for group in (head, *groups):
        labels = group["template"]["metadata"]["labels"]
        assert labels == policy["spec"]["podSelector"]["matchLabels"], "the policy does not cover this pod"
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["image"].endswith(f":ray{version}")
        assert container["resources"]["requests"] == container["resources"]["limits"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        # The keys are a file of a Secret that exists.
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount["name"] == volume["name"]
        assert "subPath" not in mount, "a file that is mounted alone never changes"
        assert environment["SERVE_API_KEYS_FILE"] == f"{mount['mountPath']}/keys"
        assert f"create secret generic {volume['secret']['secretName']} --from-file=keys" in text
        assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "serve.proxy:proxy_middlewares"
        # Ray ends a pod within its grace period, but after its requests had their time.
        assert isinstance(getattr(ray_constants, DRAINING), float), "Ray has another name for it"
        assert Limits().drain_timeout_s <= float(environment[DRAINING]) < pod["terminationGracePeriodSeconds"] - 10
        ours = {name for name in environment if name.startswith("SERVE_")} - {"SERVE_API_KEYS_FILE"}
        assert ours <= limits
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (group is not head)
        if has_gpu:
            gpus += group["maxReplicas"]
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # The number of machines equals the maximum number of replicas.
    (application,) = serve_config(ray_service)["applications"]
    scaled = [
        each["autoscaling_config"]["max_replicas"] for each in application["deployments"] if each["name"] != "api"
    ]
    assert sum(scaled) < gpus, "there is no room for a new version beside the old"
    # Replaced replicas have enough time to finish.
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > Limits().drain_timeout_s
    # Only Serve's port is open to everyone.
    open_rules = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [port["port"] for rule in open_rules for port in rule["ports"]] == [8000]
    (head_container,) = head["template"]["spec"]["containers"]
    assert 8000 in [port["containerPort"] for port in head_container["ports"]]
    assert serve_config(ray_service)["http_options"]["port"] == 8000


def test_both_files_serve_the_same(config: dict[str, Any], ray_service: list[dict[str, Any]]) -> None:
    assert serve_config(ray_service)["applications"] == config["applications"]


def test_the_middlewares_are_named_where_ray_is_started() -> None:
    import importlib

    from serve.proxy import proxy_middlewares

    text = (ROOT / "serve" / "config.yaml").read_text()
    found = re.search(r"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=(\S+):(\S+)", text)
    assert found
    assert getattr(importlib.import_module(found.group(1)), found.group(2)) is proxy_middlewares


# --- The builder -----------------------------------------------------------------------------------------------


def test_nothing_is_built_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVE_API_KEYS", raising=False)
    monkeypatch.delenv("SERVE_API_KEYS_FILE", raising=False)
    with pytest.raises(InputError, match="no key"):
        build(Args(captioner="a:/x"))
    assert set(deployments_of(build(Args(captioner="a:/x", open=True)))) == {"api", "captioner-a"}


@pytest.mark.parametrize("value", [None, "", "somebody.elses:middlewares"])
def test_nothing_is_built_without_limits_before_the_proxy(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    if value is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(InputError) as caught:
        build(Args(captioner="a:/x"))
    assert f"export {VARIABLE}={VALUE}" in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "runtime_env", "guarded"),
    [
        ({VARIABLE: VALUE}, {"env_vars": {"OTHER": "x"}}, True),
        ({VARIABLE: VALUE}, {}, True),
        ({}, {}, False),
        # For a replica or an application. It does not reach the proxy.
        ({VARIABLE: VALUE}, {"env_vars": {VARIABLE: VALUE}}, False),
    ],
)
def test_nothing_is_answered_where_the_cluster_lacks_the_limits_before_its_proxy(
    environment: dict[str, str], runtime_env: dict[str, Any], guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent of the environment of the driver that built the application."""
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    monkeypatch.delenv(VARIABLE)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("serve.app.get_runtime_context", lambda: SimpleNamespace(runtime_env=runtime_env))
    kind: Any = Api.func_or_class  # type: ignore[attr-defined]
    # As Ray starts it.
    begun = kind.__init__(object.__new__(kind), {}, {}, None, "", "", Limits(), False, ())
    if guarded:
        run(begun)
        return
    with pytest.raises(InputError) as caught:
        run(begun)
    assert f"export {VARIABLE}={VALUE}, here and where Ray is started" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_arguments_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    monkeypatch.setenv("SERVE_MAX_QUEUE", "32")
    monkeypatch.setenv("SERVE_DRAIN_TIMEOUT_S", "77")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    typed = {"captioner": "a:runs/a,b:s3://bucket/b", "generator": "c:/runs/c", "gpus": "0.5", "storage": "s3://b/p"}
    typed |= {"encoder": "c:clip,b:google/some_model"}
    deployments = deployments_of(call_user_app_builder_with_args_if_necessary(build, typed))
    assert set(deployments) == {"api", "jobs", "captioner-a", "captioner-b", "generator-c"}
    model = deployments["captioner-a"]
    name, load, limits = model.init_args
    assert name == "a"
    # A folder is resolved where it was typed, for any working directory of the replica.
    assert load.__self__ == Source("a", str(Path("runs/a").absolute()), None, None)
    # An encoder too, but a name on the hub is not changed.
    assert deployments["generator-c"].init_args[1].__self__ == Source("c", "/runs/c", str(tmp_path / "clip"), None)
    assert deployments["captioner-b"].init_args[1].__self__ == Source("b", "s3://bucket/b", "google/some_model", None)
    assert limits.max_queue == 32
    assert {each._deployment_config.graceful_shutdown_timeout_s for each in deployments.values()} == {77}
    assert model.ray_actor_options["num_gpus"] == 0.5
    # More than is admitted must fit, or batches would shrink.
    assert model.max_ongoing_requests >= 2 * 32
    # The key is in no argument, as Ray's dashboard shows arguments.
    for deployment in deployments.values():
        assert KEY not in repr((deployment.init_args, deployment.init_kwargs, deployment.ray_actor_options))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing to serve"),
        ({"captioner": "/runs/a"}, "give each a name"),
        ({"captioner": "s3://bucket/a"}, "give each a name"),
        ({"captioner": "a:"}, "give each a name"),
        ({"captioner": "a:/x,a:/y"}, "stands there twice"),
        ({"captioner": "a b:/x"}, "a name has letters"),
        ({"captioner": "a#b:/x"}, "a name has letters"),
        ({"captioner": "a:/x", "generator": "a:/y"}, "a captioner and a generator"),
        ({"captioner": "a:/x", "encoder": "b:/y"}, "no model of that name"),
        ({"captioner": "a:/x", "allowed_hosts": "mine.example"}, "only for open=true"),
        ({"captioner": "a:gs://x/y"}, "only a local path or s3"),
        ({"captioner": "a:/x", "storage": "http://x"}, "only a local path or s3"),
        ({"captioner": "a:s3://key:secret@bucket/x"}, "keys come from AWS"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    with pytest.raises(InputError, match=words) as caught:
        build(Args.model_validate(arguments))
    assert "secret@" not in str(caught.value)


def test_misspelt_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="captioners"):
        call_user_app_builder_with_args_if_necessary(build, {"captioners": "a:/x"})


def test_names_and_their_uris() -> None:
    assert named("a:/x, b:s3://c/d,", "captioner") == {"a": "/x", "b": "s3://c/d"}
    assert named("", "captioner") == {}
