"""Calls to processes that die, or that are replaced by another version while the caller lives on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from serving import Served, chat, data_uri, picture, run

from serve import clients
from serve.captioner import Captioner
from serve.clients import Deployed, Model
from serve.errors import ApiError
from serve.limits import Limits

CHAT = "/v1/chat/completions"


NEVER = object()


class Response:
    """Like Ray Serve's handle: the result of a call, or its events.

    An exception is raised, and NEVER does not arrive.
    """

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes, self.cancelled = outcomes, False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Any:
        return self._result().__await__()

    async def _result(self) -> Any:
        (outcome,) = [each async for each in self]
        return outcome

    async def __aiter__(self) -> AsyncIterator[Any]:
        for outcome in self.outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is NEVER:
                await asyncio.sleep(60)
            yield outcome


class Handle:
    def __init__(self, *responses: Response) -> None:
        self.responses, self.calls = list(responses), list[tuple[str, bool, Any]]()

    def options(self, method_name: str, stream: bool) -> Any:
        class Method:
            def remote(_, *args: Any) -> Response:
                self.calls.append((method_name, stream, args))
                return self.responses[len(self.calls) - 1]

        return Method()


def test_what_a_dead_process_was_at_is_asked_of_the_next() -> None:
    handle = Handle(Response(RayActorError()), Response(RayActorError()), Response("answer"))
    assert run(Deployed(handle).call("describe", 3)) == "answer"
    assert handle.calls == [("describe", False, (3,))] * 3


@pytest.mark.parametrize(
    "responses",
    [[Response(RayActorError()) for _ in range(3)], [Response(DeploymentUnavailableError("a"))]],
    ids=["three dead ones", "none"],
)
def test_without_a_process_it_is_503(responses: list[Response]) -> None:
    async def stream() -> None:
        async for _ in Deployed(Handle(*responses)).stream("stream"):
            pass

    for call in (lambda: Deployed(Handle(*responses)).call("describe"), stream):
        with pytest.raises(ApiError) as caught:
            run(call())
        assert (caught.value.status, caught.value.code) == (503, "model_unavailable")
        assert caught.value.retry_after_s


def test_who_goes_away_cancels_the_call() -> None:
    async def main() -> None:
        call, events = Response(NEVER), Response("one", NEVER)
        replica = Deployed(Handle(call, events))
        task = asyncio.ensure_future(replica.call("generate"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert call.cancelled
        source = replica.stream("stream")
        assert await anext(source) == "one"
        await source.aclose()
        assert events.cancelled

    run(main())


# --- A new version with another resolution ---------------------------------------------------------------------


def test_what_a_model_says_of_itself_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(clients.time, "monotonic", lambda: now[0])
    handle = Handle(*(Response({"resolution": size}) for size in (16, 8, 4)))

    async def main() -> list[int]:
        model, sizes = Model("words", "captioner", Deployed(handle)), []
        for seconds in (0.0, 4.0, 2.0, 1.0):
            now[0] += seconds
            sizes.append((await model.info())["resolution"])
        model.forget()
        return [*sizes, (await model.info())["resolution"]]

    assert run(main()) == [16, 16, 8, 8, 4]


def test_pixels_of_another_version_are_not_captioned() -> None:
    served = Served()

    async def main() -> None:
        pixels = {size: np.zeros((size, size, 3), np.uint8) for size in (8, 16)}
        assert await served.captioner.caption({8: pixels[8]}, 5) == {"resolution": 16}
        assert "caption" in await served.captioner.caption(pixels, 5)
        await served.close()

    run(main())
    assert served.fake_captioner.batches == [1]


async def ask(client: httpx.AsyncClient, colour: str) -> httpx.Response:
    return await client.post(CHAT, json=chat(data_uri(picture(colour))))


def with_versions(choose: Callable[[int], int]) -> tuple[Served, list[str]]:
    """A service whose captioner is version `choose(number)` at each call: 0 takes 16 pixels, 1 takes 8."""
    served = Served()
    versions = [served.captioner, Captioner("words", lambda device: served.other_captioner, Limits())]
    calls: list[str] = []

    class Rolling:
        async def call(self, method: str, *args: Any) -> Any:
            calls.append(method)
            return await getattr(versions[choose(len(calls))], method)(*args)

    served.service.front.models["words"].replica = Rolling()  # type: ignore[assignment]
    return served, calls


def test_a_front_that_knew_the_old_version_serves_the_new_one() -> None:
    version = [0]
    served, _ = with_versions(lambda number: version[0])

    async def main() -> None:
        async with served.client() as client:
            for colour in ("green", "blue"):
                answer = (await ask(client, colour)).json()
                prefix = "some" if version[0] else "a"
                assert answer["choices"][0]["message"]["content"] == f"{prefix} {colour} picture"
                version[0] = 1
            models = (await client.get("/v1/models")).json()["data"]
            assert next(model["resolution"] for model in models if model["id"] == "words") == 8

    run(main())


def test_while_both_versions_answer_nobody_gets_a_fault() -> None:
    served, calls = with_versions(lambda number: number % 2)

    async def main() -> None:
        async with served.client() as client:
            for _ in range(5):
                response = await ask(client, "green")
                assert response.status_code == 200, response.text
                # The next call meets the versions in the other order.
                calls.append("nothing")

    run(main())
    assert calls.count("caption") > 5, "the versions never disagreed"


def test_a_model_that_never_agrees_with_itself_is_not_asked_for_ever() -> None:
    served = Served()

    class Moody:
        resolution = 16

        async def call(self, method: str, *args: Any) -> Any:
            self.resolution += 1
            return {"resolution": self.resolution, "takes_prompt": False}

    served.service.front.models["words"].replica = Moody()  # type: ignore[assignment]

    async def main() -> httpx.Response:
        async with served.client() as client:
            return await ask(client, "green")

    response = run(main())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
    assert not any(served.service.front.admission.held.values())
