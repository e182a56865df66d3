"""The FastAPI app: routes of OpenAI's completions and chat, health, metrics, and the live page.

How a completion request is processed is in `service.py`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import Response

from onlinespec import __version__
from onlinespec.server.engine import Engine
from onlinespec.server.errors import ApiError, documented, install
from onlinespec.server.live import Live
from onlinespec.server.metrics import CountResponses, Metrics
from onlinespec.server.page import routes
from onlinespec.server.replies import ChatReply, CompletionReply
from onlinespec.server.schema import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    Status,
)
from onlinespec.server.service import Service, Tags, check_model
from onlinespec.server.settings import ServerSettings

log = logging.getLogger(__name__)

_BODIES: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {  # request body, and chunk of its stream
    "/v1/completions": (CompletionRequest, Completion),
    "/v1/chat/completions": (ChatRequest, ChatChunk),
}


def create_app(engine: Engine, settings: ServerSettings, facts: dict[str, Any] | None = None) -> FastAPI:
    """Returns the app. It starts the engine on startup and stops it on shutdown.

    Args:
        facts: Shown on the live page: drafter, learning_mode, has_chat.
    """
    live = Live(
        engine, {"model": settings.model, "drafter": "", "learning_mode": "", "has_chat": False} | (facts or {})
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        sampling = asyncio.create_task(live.run())
        try:
            yield
        finally:
            sampling.cancel()
            await engine.stop(settings.grace_seconds)

    metrics = Metrics(engine)
    app = FastAPI(
        title="onlinespec",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(_models(engine, settings))
    app.include_router(_completions(Service(engine, settings, metrics)))
    app.include_router(_operations(engine, metrics))
    app.include_router(routes(live))
    install(app)
    app.add_middleware(CountResponses, metrics=metrics)  # outermost, so that it counts every response
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


# --- routes ---------------------------------------------------------------------------------------------------------


def _tags(
    x_drafter_learn: Annotated[
        Literal["on", "off"], Header(description="`off`: the drafter does not learn from this request.")
    ] = "on",
    x_drafter_tenant: Annotated[
        str, Header(max_length=128, description="Whose request this is: prompts are shared within a tenant only.")
    ] = "",
) -> Tags:
    return Tags(x_drafter_learn == "on", x_drafter_tenant)


def _guards(settings: ServerSettings) -> list[Any]:
    """The dependencies of the /v1 routes: the check of the API key, if one is set."""
    if settings.api_key is None:
        return []
    expected = settings.api_key.encode()

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        key = given.credentials.encode("latin-1") if given else b""
        if not hmac.compare_digest(key, expected):
            what = "is wrong" if given else "is missing"
            message = f"the API key {what}; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    return [Depends(check)]


def _router(settings: ServerSettings) -> APIRouter:
    responses = documented(401) if settings.api_key is not None else {}
    return APIRouter(prefix="/v1", dependencies=_guards(settings), responses=responses)


def _models(engine: Engine, settings: ServerSettings) -> APIRouter:
    router = _router(settings)
    context = engine.scheduler.loop.target.decoder.config.max_positions
    card = ModelCard(id=settings.model, created=int(time.time()), max_model_len=context)

    @router.get("/models")
    async def models() -> ModelList:
        """Lists the served model."""
        return ModelList(data=[card])

    @router.get("/models/{model:path}", responses=documented(404))
    async def model(model: str) -> ModelCard:
        """Describes the served model, by its name."""
        check_model(model, settings)
        return card

    return router


def _completions(service: Service) -> APIRouter:
    router = _router(service.settings)
    failures = documented(400, 404, 408, 413, 415, 429, 500, 503)

    def answers(kind: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
        return failures | {200: {"model": kind, "description": "The answer, whole or as a stream."}}

    @router.post("/completions", responses=answers(Completion))
    async def completions(request: Request, tags: Annotated[Tags, Depends(_tags)]) -> Response:
        """Continues one or several prompts."""
        body = await service.read(request, CompletionRequest)
        prompts = await service.texts.of_completion(body)
        return await service.answer(request, body, prompts, CompletionReply, tags)

    @router.post("/chat/completions", responses=answers(ChatCompletion))
    async def chat_completions(request: Request, tags: Annotated[Tags, Depends(_tags)]) -> Response:
        """Answers a conversation."""
        body = await service.read(request, ChatRequest)
        prompt = await service.texts.of_chat(body)
        return await service.answer(request, body, [prompt], ChatReply, tags)

    return router


def _operations(engine: Engine, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses=documented(503))
    async def health() -> Status:
        """Liveness: 503 if decoding has failed, after which only a restart helps."""
        if not engine.is_alive:
            raise ApiError(503, "decoding has stopped", code="unavailable")
        return Status(status="ok")

    @router.get("/ready", responses=documented(503))
    async def ready() -> Status:
        """Readiness: 503 while the server takes no requests, such as while it is stopping."""
        if not engine.is_ready:
            raise ApiError(503, "no requests are taken", code="unavailable")
        return Status(status="ready")

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
    )
    async def metrics_text() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _document(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document.

    Adds the request bodies, which `Service` parses instead of FastAPI, and removes FastAPI's 422, which is never sent.
    """
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = document["components"]["schemas"]
        for path, (body, chunk) in _BODIES.items():
            operation = document["paths"][path]["post"]
            for kind in (body, chunk):
                schema = kind.model_json_schema(ref_template=_REFERENCE)
                schemas |= schema.pop("$defs", {}) | {kind.__name__: schema}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _refer_to(body)}}}
            operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": _event_schema(chunk)}
        for operation in (one for path in document["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


_REFERENCE = "#/components/schemas/{model}"


def _refer_to(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=kind.__name__)}


def _event_schema(chunk: type[BaseModel]) -> dict[str, Any]:
    """The schema of a server-sent event."""
    data = {
        "type": "string",
        "description": "A chunk; [DONE] behind the last; of an event named error, what went wrong.",
        "contentMediaType": "application/json",
        "contentSchema": _refer_to(chunk),
    }
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}
