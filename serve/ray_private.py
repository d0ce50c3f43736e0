"""Everything that the service uses of Ray's private interface, which may change."""

from ray._private.utils import get_num_cpus
from ray._raylet import Config  # type: ignore[attr-defined]


def cpus() -> int:
    """CPUs that the quota of this process's container allows."""
    return int(get_num_cpus(override_docker_cpu_warning=True))


def reload_auth_mode() -> None:
    """Have Ray read RAY_AUTH_MODE again, as `ray.init` does. Otherwise Ray reads it once, at its import."""
    Config.initialize("")
