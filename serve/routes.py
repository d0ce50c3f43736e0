"""The HTTP interface as an ASGI app: OpenAI's routes, our own and the page. serve/app.py puts it behind Ray Serve."""

import asyncio
import mimetypes
from collections.abc import Collection
from functools import partial
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route, Router

from mmcore.storage import Storage
from serve.caption_routes import CaptionRoutes
from serve.clients import Model, Replica
from serve.errors import ApiError, bad_value, quoted
from serve.front import Front, Handler, facts_of_request
from serve.gallery import MAX_PAGE, Gallery
from serve.image_routes import ImageRoutes
from serve.limits import Limits
from serve.metrics import Observe
from serve.openapi import document
from serve.security import App, BodyLimit, Keys, Receive, Scope, Send

WEB = Path(__file__).parent / "web"
# These need no key: the health of the service, and the page, which holds no secret and asks for the key.
OPEN_ROUTES = ("/health", "/ready", "/", "/static/{name}")
_GALLERY_PAGE = 60
# The fields of a route's query. Other routes take no query.
_QUERIES = {"/v1/gallery": ("limit", "cursor")}


class Service:
    """`app()` is the ASGI app."""

    def __init__(
        self,
        *,
        models: list[Model],
        keys: Keys,
        limits: Limits,
        jobs: Replica | None = None,
        gallery: Storage | None = None,
        storage: Storage | None = None,
        allowed_hosts: Collection[str] = (),
        web: Path = WEB,
    ) -> None:
        self.front = front = Front(models, keys, limits, allowed_hosts)
        self._gallery = Gallery(gallery) if gallery else None
        # Read once, so that no path can lead to another file.
        self._pages = {path.name: path.read_bytes() for path in sorted(web.glob("*")) if path.is_file()}
        captions, images = CaptionRoutes(front), ImageRoutes(front, jobs, storage)
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/health", self.health),
            ("GET", "/ready", self.ready),
            ("GET", "/metrics", self.prometheus),
            ("GET", "/openapi.json", self.openapi),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/{model}", self.get_model),
            ("POST", "/v1/images/generations", images.generations),
            ("POST", "/v1/chat/completions", captions.chat),
            ("POST", "/v1/captions", captions.captions),
            ("POST", "/v1/jobs", images.submit_job),
            ("GET", "/v1/jobs/{job_id}", images.get_job),
            ("DELETE", "/v1/jobs/{job_id}", images.cancel_job),
            ("GET", "/v1/gallery", self.gallery_page),
            ("GET", "/v1/gallery/{image_id}", self.gallery_image),
            ("GET", "/", self.page),
            ("GET", "/static/{name}", self.page),
        ]
        self._routes = [
            Route(path, partial(self._endpoint, path, handler), methods=[method]) for method, path, handler in routes
        ]
        self._router = Router(self._routes, redirect_slashes=False)

    def app(self) -> App:
        return self.front.counting(Observe(BodyLimit(self._route, self.front.limits), self.front.metrics))

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        # With an app in its scope the router raises for an unknown route, instead of answering in plain text.
        scope["app"] = self
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            # A path may have a route for each of its methods.
            there = [route for route in self._routes if route.matches(scope)[0] is not Match.NONE]
            methods = {method for route in there for method in route.methods or ()}
            raise self.front.no_route(Request(scope), error, methods) from None

    async def _endpoint(self, path: str, handler: Handler, request: Request) -> Response:
        facts_of_request(request)["route"] = path
        if path in OPEN_ROUTES:
            return await handler(request)
        return await self.front.guarded(handler, request, _QUERIES.get(path, ()))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 once every model answers; 503 before that, and while the service ends."""
        models = self.front.models
        answers = await asyncio.gather(*(model.ready() for model in models.values()))
        status = "draining" if self.front.draining else "ready" if all(answers) else "waiting for models"
        return JSONResponse({"status": status}, status_code=200 if status == "ready" else 503)

    async def prometheus(self, request: Request) -> Response:
        metrics = self.front.metrics
        return Response(metrics.text(), media_type=metrics.content_type)

    async def openapi(self, request: Request) -> Response:
        """The routes and their fields, with the options of the generators that answer soon."""
        models = self.front.models.values()
        told = dict(zip(self.front.models, await asyncio.gather(*(model.told() for model in models)), strict=True))
        options = {name: info["options"] for name, info in told.items() if info and info["kind"] == "generator"}
        return JSONResponse(document(options, self.front.limits, open_routes=OPEN_ROUTES))

    async def list_models(self, request: Request) -> Response:
        data = await asyncio.gather(*(model.listed() for model in self.front.models.values()))
        return JSONResponse({"object": "list", "data": data})

    async def get_model(self, request: Request) -> Response:
        name, models = request.path_params["model"], self.front.models
        if name not in models:
            message = f"no model {quoted(name)}; known: {', '.join(models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(await models[name].listed())

    def _need_gallery(self) -> Gallery:
        if self._gallery is None:
            raise ApiError(404, "this service was started without gallery=URI", code="no_gallery")
        return self._gallery

    async def gallery_page(self, request: Request) -> Response:
        gallery, query = self._need_gallery(), request.query_params
        text = query.get("limit", str(_GALLERY_PAGE))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_PAGE):
            raise bad_value("limit", f"{quoted(text)}; give 1 to {MAX_PAGE}")
        return JSONResponse(await gallery.page(int(text), query.get("cursor")))

    async def gallery_image(self, request: Request) -> Response:
        data = await self._need_gallery().image(request.path_params["image_id"])
        return Response(data, media_type="image/png", headers={"cache-control": "private, max-age=60"})

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._pages:
            raise ApiError(404, f"no such file {quoted(name)}", code="not_found")
        # Names with a hash would need a build step. Instead every load asks whether the file changed.
        return Response(
            self._pages[name],
            media_type=mimetypes.guess_type(name)[0] or "application/octet-stream",
            headers={"cache-control": "no-cache"},
        )
