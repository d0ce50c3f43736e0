"""All that the service needs of Ray and that Ray does not promise to keep."""

from ray._private.utils import get_num_cpus
from ray._raylet import Config  # type: ignore[attr-defined]


def cpus() -> int:
    """CPUs that the quota of this process's container allows."""
    return int(get_num_cpus(override_docker_cpu_warning=True))


def reload_auth_mode() -> None:
    """Ray reads RAY_AUTH_MODE once, when it is imported; `ray.init` itself reloads it by this call."""
    Config.initialize("")
