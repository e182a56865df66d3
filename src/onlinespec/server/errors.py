"""Error responses in OpenAI's format: which field is wrong, its value, and what is allowed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onlinespec.engine.request import ContextOverflow
from onlinespec.engine.scheduler import Busy, TooLarge
from onlinespec.server import schema
from onlinespec.server.engine import Closed
from onlinespec.server.schema import ErrorBody, ErrorDetail

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)

_LONGEST_VALUE = 80  # characters of a refused value that a message repeats
_BRANCH = re.compile(
    r"[^\w-]|^(constrained-)?(str|int|float|bool|dict|list)$"
)  # names of a union's members in pydantic's error paths
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

DESCRIPTIONS = {
    400: "The request can't be answered as it is.",
    401: "The API key is missing or wrong.",
    404: "There is no such path or model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "The server is full; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server is stopping or has failed; Retry-After says when to try again.",
}


class ApiError(Exception):
    """An error response, as an exception.

    Args:
        status: HTTP status.
        param: Field that is wrong.
        code: OpenAI's machine-readable name of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> ErrorBody:
        """The body of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return ErrorBody(error=ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        """Returns the HTTP response."""
        return Response(to_json(self.body), self.status, self.headers, "application/json")


def to_json(body: BaseModel) -> bytes:
    """Encodes a body without unset fields. Lone surrogates, which a refused value may contain, are escaped."""
    try:
        return body.model_dump_json(exclude_unset=True).encode()
    except ValueError:
        return json.dumps(body.model_dump(exclude_unset=True)).encode()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describes responses with these statuses for the OpenAPI document."""
    return {status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses}


def install(app: FastAPI) -> None:
    """Makes an app answer every error in this format."""

    async def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = (_cut(text) for text in (request.method, request.url.path))
        message = f"{method} {path} is not served here ({error.detail})"
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_middleware(_AnswerBugs)


def _cut(text: str) -> str:
    """Shortens text from a client for an error message."""
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


class _AnswerBugs:
    """ASGI middleware: logs an unexpected exception and answers 500, so that the connection stays open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            log.exception("%s %s failed", scope["method"], scope["path"])
            failed = ApiError(500, f"the server failed ({type(error).__name__}); its log says more")
            await failed.response()(scope, receive, send)


def parsed(kind: type[Body], raw: bytes) -> Body:
    """Parses and validates a JSON body.

    Raises:
        ApiError: 400, naming the first field that is wrong, its value, and what is allowed.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False), _shapes(kind) | _shapes(schema.Message)) from error


def _shapes(kind: type[BaseModel]) -> dict[str, str]:
    return {name: field.description for name, field in kind.model_fields.items() if field.description}


def from_validation(errors: Sequence[Any], shapes: Mapping[str, str] | None = None) -> ApiError:
    """Returns the first of pydantic's errors with a readable message.

    For a field of several types, the error of the type that the client meant, or else what all types together allow.

    Args:
        shapes: By field name: what a field of several types must be, in words.
    """
    first, path = errors[0], _path(errors[0])
    context = first.get("ctx", {})
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error', first['msg'])}", code="invalid_json")
    if first["type"] == "refused":
        return ApiError(400, context["message"], context["field"], "invalid_value")
    if not path:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}", code="invalid_json")
    allowed = _ours(first["msg"])
    branches = [error for error in errors if _path(error)[: len(path)] == path]
    if len(branches) > 1:
        furthest = max(branches, key=lambda error: len(_path(error)))
        if isinstance(_path(furthest)[-1], str) and len(_path(furthest)) > len(path):  # in a field of a list's object
            first, path, allowed = furthest, _path(furthest), _ours(furthest["msg"])
        else:
            shape = (shapes or {}).get(str(path[-1]))
            allowed = f"it must be {shape}" if shape else allowed
    name = ".".join(map(str, path))
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    if first["type"] == "too_long" and not context["max_length"]:
        allowed = "that is not offered here, leave it out"
    if first["type"] == "too_short" and context["min_length"] == 1:
        allowed = "it must not be empty"
    return ApiError(400, f"{name} is {_told(first['input'])}; {allowed}", name, "invalid_value")


def from_submit_error(error: Exception, retry_after: int, prompt: str) -> ApiError:
    """Returns the error response for an exception of `Engine.ask`: 429, 503 or 400.

    Args:
        retry_after: In seconds.
        prompt: Name of the field that holds the prompt.
    """
    again = {"Retry-After": str(retry_after)}
    match error:
        case Busy():
            return ApiError(429, f"the server is full: {error}", code="rate_limit_exceeded", headers=again)
        case Closed():
            return ApiError(503, str(error), code="unavailable", headers=again)
        case TooLarge():
            return ApiError(400, str(error), "max_tokens", "request_too_large")
        case ContextOverflow():
            return ApiError(400, str(error), prompt, "context_length_exceeded")
    return ApiError(400, str(error), prompt, "invalid_value")


def _path(error: Any) -> list[str | int]:
    """Path of the wrong field, without pydantic's names of a union's members."""
    return [part for part in error["loc"] if isinstance(part, int) or not _BRANCH.search(part)]


def _told(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _ours(message: str) -> str:
    for theirs in ("Input should be", "Value should be"):
        message = message.replace(theirs, "it must be")
    return message[:1].lower() + message[1:]
