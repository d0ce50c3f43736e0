"""Trained models behind Ray Serve.

    export SERVE_API_KEYS_FILE=FILE     # a key a line; without one nothing starts, but with open=true
    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:proxy_middlewares
    serve run serve.app:build captioner=name1:URI1,name2:URI2 generator=name:URI

The second variable puts our limits before Ray's own proxy. The proxy reads it where Ray is started. A URI is the folder
of a finished run, local or in S3. `python -m serve.control start` takes the same arguments and sets that variable
itself. It answers the requests in flight before it ends. serve/config.yaml is for `serve deploy`, with autoscaling.
"""

import contextlib
import os
from collections.abc import Callable, Collection
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import get_runtime_context, serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from mmcore.errors import InputError
from mmcore.storage import Storage
from serve.captioner import Captioner
from serve.clients import Deployed, Model
from serve.draining import Unfinished, nothing
from serve.errors import ApiError
from serve.generator import Generator
from serve.image_jobs import Jobs
from serve.limits import Limits
from serve.metrics import configure_logging
from serve.proxy import check_guarded
from serve.routes import Service
from serve.security import Keys
from serve.sources import Source, sources

# The share of the CPUs that Ray counts for a model's replica. The replica computes with SERVE_MODEL_THREADS; the share
# is small so that several models fit a small machine. On a cluster set num_cpus in serve/config.yaml.
_MODEL_CPUS = 0.5
# Ray Serve's own limits lie above what is admitted. Requests that it holds back pass two at a time.
_ROOM = 4
_API_ONGOING = 10_000
_HEALTH_PERIOD_S = 5.0
# Ray Serve logs every request, and every call between its processes, in lines of its own. The service's one line of a
# request says more (serve/metrics.py).
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
_WAIT_LOOP_S = 0.5


class Args(BaseModel):
    """What `serve run serve.app:build` takes as ``key=value``, and a deploy config as `args`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    captioner: str = ""
    """name1:URI1,name2:URI2: finished runs of captioners."""
    generator: str = ""
    """name:URI: finished runs of generators."""
    encoder: str = ""
    """name:FOLDER of a model's frozen encoder, where it does not lie where the run had it."""
    language_model: str = ""
    """name:FOLDER of a captioner's frozen language model, where it does not lie where the run had it."""
    gallery: str = ""
    """A sweep of jobs/generate.py whose images the page shows."""
    storage: str = ""
    """Folder or s3://bucket/prefix for jobs, and in S3 for the images that answers link to."""
    gpus: float = 0.0
    """GPUs of each model's replica; 0.5 puts two on one."""
    open: bool = False
    """Serve without keys whoever can reach the port."""
    allowed_hosts: str = ""
    """name1,name2: names of this machine by which an open service is reached, beside localhost and addresses."""


# Ray Serve's decorator would freeze an app at the import. Without one it calls `__serve_build_asgi_app__`.
@serve.deployment(name="api")
@serve.ingress()
class Api:
    """The process that answers requests."""

    def __init__(
        self,
        captioners: dict[str, DeploymentHandle],
        generators: dict[str, DeploymentHandle],
        jobs: DeploymentHandle | None,
        gallery: str,
        storage: str,
        limits: Limits,
        open_to_all: bool,
        allowed_hosts: Collection[str],
    ) -> None:
        configure_logging()
        # Ray's proxy has the environment in which Ray was started on its machine. This process has the same, and in
        # addition what a runtime_env adds to it alone.
        added = get_runtime_context().runtime_env.get("env_vars", {})
        check_guarded({name: value for name, value in os.environ.items() if name not in added})
        models = [Model(name, "captioner", Deployed(handle)) for name, handle in captioners.items()]
        models += [Model(name, "generator", Deployed(handle)) for name, handle in generators.items()]
        self._jobs = Deployed(jobs) if jobs else None
        self._service = Service(
            models=models,
            # Read here and handed to no other process: Ray's dashboard shows the arguments of a deployment.
            keys=Keys(os.environ, open_to_all=open_to_all),
            limits=limits,
            jobs=self._jobs,
            gallery=Storage(gallery) if gallery else None,
            storage=Storage(storage) if storage else None,
            allowed_hosts=allowed_hosts,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._service.app()

    async def drain(self) -> Unfinished:
        """Take no more requests; returns what is unfinished. Called until nothing is waited for."""
        self._service.front.draining = True
        jobs = nothing()
        if self._jobs:
            # Their process may be dead. A storage keeps its jobs; without one they were lost with it.
            with contextlib.suppress(ApiError):
                jobs = await self._jobs.call("drain")
        return {**jobs, "waited_for": [*self._service.front.unanswered, *jobs["waited_for"]]}


def application(
    captioners: dict[str, Callable[[str], Any]],
    generators: dict[str, Callable[[str], Any]],
    *,
    limits: Limits,
    gallery: str = "",
    storage: str = "",
    gpus: float = 0.0,
    open_to_all: bool = False,
    allowed_hosts: Collection[str] = (),
) -> Application:
    """The deployments of the service. Each model is given by a function that loads it in its replica on a device."""
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": limits.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": _WAIT_LOOP_S,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "logging_config": QUIET,
    }
    model_options: dict[str, Any] = {
        **common,
        "max_ongoing_requests": _ROOM * (limits.max_queue + limits.job_concurrency * limits.max_n),
        "ray_actor_options": {"num_cpus": _MODEL_CPUS, "num_gpus": gpus},
        # A new version begins before the old one ends. A model on a GPU ends first: Ray would wait for a second GPU
        # without end, and few clusters have a free one. serve/config.yaml chooses otherwise.
        "max_surge_percent": 0 if gpus else 100,
    }

    # Ray's hints know its decorator only with or without options, not with a class and options.
    deployment: Any = serve.deployment

    def deployed(kind: type, loaders: dict[str, Callable[[str], Any]]) -> dict[str, Application]:
        return {
            name: deployment(kind, name=f"{kind.__name__.lower()}-{name}", **model_options).bind(name, load, limits)
            for name, load in loaders.items()
        }

    captioner_apps, generator_apps = deployed(Captioner, captioners), deployed(Generator, generators)
    jobs = None
    if generators:
        options = {**common, "max_ongoing_requests": _API_ONGOING, "ray_actor_options": {"num_cpus": 0}}
        # One process at a time: two would both take up what is pending.
        jobs = deployment(Jobs, name="jobs", **options).bind(generator_apps, storage or None, limits)
    api: Any = Api
    return api.options(
        **common,
        max_ongoing_requests=_API_ONGOING,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
    ).bind(captioner_apps, generator_apps, jobs, gallery, storage, limits, open_to_all, allowed_hosts)


def build(args: Args) -> Application:
    """The application of Ray Serve.

    Raises InputError for bad arguments, for a service without a key and without `open`, and where Ray's proxy would
    lack our limits.
    """
    captioners, generators = _sources(args)
    allowed_hosts = [name for name in (part.strip().lower() for part in args.allowed_hosts.split(",")) if name]
    if allowed_hosts and not args.open:
        raise InputError(f"allowed_hosts={args.allowed_hosts}: only for open=true; a service with keys needs none")
    for text in (args.gallery, args.storage):
        if text:
            Storage(text)
    # Checked here, where a person reads the error. The process that answers requests checks its own environment again.
    check_guarded(os.environ)
    Keys(os.environ, open_to_all=args.open)
    return application(
        {name: source.load_captioner for name, source in captioners.items()},
        {name: source.load_generator for name, source in generators.items()},
        limits=Limits.from_environment(os.environ),
        gallery=Storage(args.gallery).uri if args.gallery else "",
        storage=Storage(args.storage).uri if args.storage else "",
        gpus=args.gpus,
        open_to_all=args.open,
        allowed_hosts=allowed_hosts,
    )


def check_runs(args: Args) -> None:
    """Raises InputError for a URI without a finished run of its kind, before anything is started."""
    captioners, generators = _sources(args)
    for source in captioners.values():
        source.open_captioner()
    for source in generators.values():
        source.open_generator()


def _sources(args: Args) -> tuple[dict[str, Source], dict[str, Source]]:
    return sources(args.captioner, args.generator, args.encoder, args.language_model)
