"""All that the jobs need of Ray and that Ray does not promise to keep: one place to look at when Ray is updated."""

import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import ray
from ray._private import ray_logging
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.working_dir import _LOG_ONCE_DEFAULT_EXCLUDE_PREFIX
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.autoscaler_pb2 import NodeStatus  # type: ignore[attr-defined]
from ray.util.debug import log_once


def cpus() -> int:
    """CPUs that this process may use: those of its container, where os.cpu_count() tells the machine's."""
    return max(1, int(ray._private.utils.get_num_cpus()))


def training_device() -> str:
    """The device that Ray Train has chosen for this worker's model, which it tells accelerate; outside of it the CPU.

    The public ``ray.train.torch.get_device`` says the same, but on a worker alone.
    """
    return os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu")


def host_and_port(address: str) -> tuple[str, int]:
    """Where the cluster of RAY_ADDRESS is, which may be `auto`. Raises OSError (none there) or ValueError."""
    canonical = canonicalize_bootstrap_address(address)
    assert canonical is not None, "only None and `local` stand for a new cluster"
    host, _, port = canonical.rpartition(":")
    return host.strip("[]"), int(port)


def token_exists() -> bool:
    return AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)


def reload_auth_mode() -> None:
    """Ray reads RAY_AUTH_MODE once, when it is imported; `ray.init` itself reloads it by this call."""
    Config.initialize("")


def spend_warnings_of_excludes() -> None:
    """Ray announces at each start what folders it leaves out of a working directory, such as .git and .venv."""
    for folder in get_runtime_env_default_excludes():
        log_once(f"{_LOG_ONCE_DEFAULT_EXCLUDE_PREFIX}{folder}")


def hand_code_over_by_value() -> None:
    """Have Ray Data give its actors their code as a value, where it gives an object of Ray's store.

    An actor cannot be started again once such an object is lost, of which Ray warns as an error at each start of one.
    """
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    for reference, value in (("_map_transformer_ref", "_map_transformer"), ("_data_context_ref", "data_context")):
        setattr(ActorPoolMapOperator, reference, property(attrgetter(value)))


def print_without_colours() -> None:
    """Have Ray print the lines of workers, and how often one was repeated, without codes of colours."""
    os.environ["RAY_COLOR_PREFIX"] = "0"
    ray_logging._color = lambda msg: msg


def leave_out_lines(*texts: str) -> None:
    """Have this driver print no line of a worker or of a machine that holds one of `texts`. Ray's log files keep it.

    All such lines come through Ray's two deduplicators, unless RAY_DEDUP_LOGS=0 asks for every line.
    """
    for deduplicator in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        before = deduplicator.skip_re.pattern if deduplicator.skip_re else ""
        more = [escaped for escaped in map(re.escape, texts) if escaped not in before]
        deduplicator.skip_re = re.compile("|".join([before, *more] if before else more))


def largest_resources() -> Mapping[str, float]:
    """What the autoscaler can start at most; empty where there is none."""
    return ray._private.state.state.get_max_resources_from_cluster_config() or {}  # type: ignore[attr-defined]


def scheduling_state() -> Any:
    """The head's own scheduling state (what an autoscaler reads), which needs no dashboard: a protobuf message."""
    return get_cluster_resource_state(ray._private.worker.global_worker.gcs_client)  # type: ignore[attr-defined]


def is_alive(node: Any) -> bool:
    """Of a node of the scheduling state: one that went is listed for a while."""
    return bool(node.status != NodeStatus.DEAD)


def actor_states() -> list[tuple[str, str]]:
    """(class, state) of each actor of the cluster."""
    actors = ray._private.state.actors().values()  # type: ignore[attr-defined]
    return [(actor["ActorClassName"].rpartition(".")[2], actor["State"]) for actor in actors]


def replace_ctrl_c_of_train(trainer: Any, make: Callable[[Any], Any]) -> None:
    """Have `trainer` end at Ctrl-C by `make(HANDLER)`, of the HANDLER that Ray Train itself sets inside of `fit`."""
    register = trainer._register_sigint_handler

    def register_ours(controller: Any) -> None:
        register(controller)
        signal.signal(signal.SIGINT, make(signal.getsignal(signal.SIGINT)))

    trainer._register_sigint_handler = register_ours


def hand_on_to_train(variables: Sequence[str]) -> None:
    """Have Ray Train give these variables of the driver's environment to its actors, as it does with its own."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.update(variables)
