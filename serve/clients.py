"""How the front calls the processes that hold a model: through Ray Serve's handle."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from serve.errors import ApiError, ErrorFields
from serve.schemas import GenerateWork

if TYPE_CHECKING:
    from serve.captioner import CaptionerInfo
    from serve.generator import GeneratorInfo

ModelInfo: TypeAlias = "GeneratorInfo | CaptionerInfo"

# Captions and images depend on the request alone, so the work of a killed replica can be asked for again.
_MAX_ATTEMPTS = 3
# Anybody may ask for readiness. The models are asked no more often, and for no longer, than this.
_READY_EVERY_S = 1.0
_READY_TIMEOUT_S = 2.0
# The longest wait for one of several models, which may be dead or still load.
TOLD_TIMEOUT_S = 3.0
# A model is asked anew after so long: a new version may have been deployed meanwhile.
_INFO_AGE_S = 5.0


class Replica(Protocol):
    """A deployment's methods by name."""

    async def call(self, method: str, *args: Any) -> Any: ...

    def stream(self, method: str, *args: Any) -> AsyncGenerator[Any, None]: ...


class Deployed:
    """Ray Serve's replicas. Cancelling a call ends the work there. When a replica dies, the call goes to another."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._methods: dict[tuple[str, bool], Any] = {}

    def _method(self, name: str, stream: bool) -> Any:
        if (name, stream) not in self._methods:
            self._methods[name, stream] = self._handle.options(method_name=name, stream=stream)
        return self._methods[name, stream]

    async def call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        for attempt in range(1, _MAX_ATTEMPTS + 1):
            response = self._method(method, False).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayActorError:
                if attempt == _MAX_ATTEMPTS:
                    raise model_unavailable() from None
            except DeploymentUnavailableError:
                raise model_unavailable() from None
        raise AssertionError("the last attempt returned or raised")

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        for attempt in range(1, _MAX_ATTEMPTS + 1):
            events = self._method(method, True).remote(*args)
            done = False
            try:
                async for event in events:
                    yield event
                done = True
                return
            except RayActorError:
                done = True
                if attempt == _MAX_ATTEMPTS:
                    raise model_unavailable() from None
            except DeploymentUnavailableError:
                done = True
                raise model_unavailable() from None
            finally:
                if not done:
                    events.cancel()


def model_unavailable() -> ApiError:
    return ApiError(503, "the model is not available now; try again", code="model_unavailable", retry_after_s=5.0)


class Model:
    """A model by its public name, and its description of itself."""

    def __init__(self, name: str, kind: str, replica: Replica) -> None:
        self.name, self.kind, self.replica = name, kind, replica
        self._info: tuple[float, ModelInfo] = (float("-inf"), cast(ModelInfo, {}))
        self._ready: tuple[float, bool] = (float("-inf"), False)
        # OpenAI's clients want a time for each model: since when this process serves it.
        self._created = int(time.time())

    async def info(self) -> ModelInfo:
        """As GET /v1/models shows it; asked anew every few seconds. Waits for a model that still loads."""
        told_at, info = self._info
        if time.monotonic() - told_at >= _INFO_AGE_S:
            info = await self.replica.call("describe")
            self._info = (time.monotonic(), info)
        return info

    async def told(self) -> "ModelInfo | None":
        """Like `info`, but None if the model does not answer soon."""
        try:
            async with asyncio.timeout(TOLD_TIMEOUT_S):
                return await self.info()
        except (TimeoutError, ApiError):
            return None

    async def listed(self) -> dict[str, Any]:
        """Like `info`, with `ready`. A model that is not ready is shown as it described itself last, if it ever did."""
        info = await self.told()
        known = {"id": self.name, "object": "model", "created": self._created, "owned_by": "mmcore", "kind": self.kind}
        unknown = {"resolution": None, "options": None, "defaults": None, "limits": None}
        if self.kind == "captioner":
            unknown["takes_prompt"] = None
        return {**known, **unknown, **(self._info[1] if info is None else info), "ready": info is not None}

    async def refusal(self, work: GenerateWork) -> ApiError | None:
        """Why a generator refuses the work; None if it does not, or if it does not answer soon."""
        try:
            async with asyncio.timeout(TOLD_TIMEOUT_S):
                told: ErrorFields | None = await self.replica.call("check", work)
        except (TimeoutError, ApiError):
            return None
        return None if told is None else ApiError.from_dict(told)

    def forget(self) -> None:
        """Ask the model anew the next time."""
        self._info = (float("-inf"), self._info[1])

    async def ready(self) -> bool:
        """Whether it answers now."""
        asked_at, answer = self._ready
        if time.monotonic() - asked_at >= _READY_EVERY_S:
            # Set before the answer is known, so that a hundred callers at once ask once.
            self._ready = (time.monotonic(), answer)
            try:
                async with asyncio.timeout(_READY_TIMEOUT_S):
                    await self.replica.call("describe")
                answer = True
            except (TimeoutError, ApiError):
                answer = False
            self._ready = (time.monotonic(), answer)
        return answer
