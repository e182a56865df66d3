"""The service behind both completion routes: reads and checks a body, submits its choices, sends the answers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from onlinespec.config import GenerationParams
from onlinespec.engine.request import ERROR
from onlinespec.engine.scheduler import CANCELLED, Busy
from onlinespec.server.engine import Answer, Closed, Engine, Piece
from onlinespec.server.errors import ApiError, from_submit_error, parsed, to_json
from onlinespec.server.metrics import Metrics
from onlinespec.server.replies import Choice, Reply, usage_of
from onlinespec.server.schema import ChatRequest, Sampled
from onlinespec.server.settings import MAX_CHOICES, ServerSettings
from onlinespec.server.streams import ClientGone, EventStream, event, merged, while_connected
from onlinespec.server.texts import Texts

JSON = "application/json"
_CLOSE = {"Connection": "close"}  # for a body that was not read completely
_POLL_SECONDS = 0.25  # between two checks of the clock while a body arrives
_SEED_BITS = 53  # of a drawn seed: JSON readers that parse all numbers as doubles keep it exact
_GONE = 499  # status for a client that disconnected: nobody reads it, but the metrics count it

Body = TypeVar("Body", bound=Sampled)


@dataclass(frozen=True)
class Tags:
    """The headers of a request: whether the drafter may learn from it, and its tenant."""

    learns: bool = True
    tenant: str = ""


class Service:
    """What /v1/completions and /v1/chat/completions have in common."""

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
        self._engine, self.settings, self._metrics = engine, settings, metrics
        self.texts = Texts(engine.scheduler.loop.target)

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """Reads and checks a request's body, and starts the request's clock.

        Args:
            kind: The schema of the body.

        Raises:
            ApiError: 400, 404, 408, 413, 415, 499 or 503.
        """
        request.state.began = time.perf_counter()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            # browsers send other types cross-site without asking: this keeps foreign web pages out
            raise ApiError(415, "send the body with `Content-Type: application/json`", code="unsupported_media_type")
        body = parsed(kind, await self._bounded(request))
        if body.model is not None:
            check_model(body.model, self.settings)
        return body

    async def _bounded(self, request: Request) -> bytes:
        """Reads the whole body.

        Raises:
            ApiError: if it is too large or too slow, the client leaves, or the server stops meanwhile.
        """
        reading, until = asyncio.ensure_future(self._received(request)), time.monotonic() + self.settings.body_seconds
        try:
            while not (await asyncio.wait({reading}, timeout=_POLL_SECONDS))[0]:
                if not self._engine.is_ready:
                    raise ApiError(503, "the server is stopping", code="unavailable", headers=_CLOSE)
                if time.monotonic() > until:
                    message = f"the body did not come in {self.settings.body_seconds:g} seconds; send it faster"
                    raise ApiError(408, message, code="body_too_slow", headers=_CLOSE)
            return await reading
        finally:
            reading.cancel()

    async def _received(self, request: Request) -> bytes:
        most, raw = self.settings.max_body_bytes, bytearray()
        try:
            if (declared := request.headers.get("content-length", "")).isdecimal() and int(declared) > most:
                raise _too_large(most)
            async for part in request.stream():
                raw += part
                if len(raw) > most:
                    raise _too_large(most)
        except ClientDisconnect:
            raise ApiError(_GONE, "the client left") from None
        return bytes(raw)

    async def answer(
        self,
        request: Request,
        body: Sampled,
        prompts: Sequence[Sequence[int]],
        kind: type[Reply],
        tags: Tags,
    ) -> Response:
        """Answers a checked body, as JSON or as a stream of server-sent events.

        Args:
            prompts: Token ids of each prompt; each gets `body.num_choices` answers.
            kind: Builds the reply in the format of the route.

        Raises:
            ApiError: if the request can't be accepted, an answer fails, or the client leaves.
        """
        self._check(body, prompts)
        reply = kind(self.settings.model, self.texts, body.num_logprobs is not None)
        answers = self._ask(prompts, body, tags, reply.id)
        pieces = self._metrics.timed(merged(answers), request.state.began)
        if body.stream:
            return EventStream(self._events(answers, pieces, body, reply), on_end=partial(_cancel_unfinished, answers))
        try:
            choices = await while_connected(request.receive, _collected(answers, pieces, self.settings.retry_after))
        except ClientGone:
            raise ApiError(_GONE, "the client left") from None
        finally:
            _cancel_unfinished(answers)
        return Response(to_json(reply.whole(choices, usage_of(answers, body.num_choices))), media_type=JSON)

    def _check(self, body: Sampled, prompts: Sequence[Sequence[int]]) -> None:
        """Raises ApiError if a prompt is too long, or there are too many choices."""
        longest, most = max(map(len, prompts)), self.settings.max_prompt_tokens
        if most is not None and longest > most:
            message = f"the prompt has {longest} tokens; it must have at most {most} here"
            raise ApiError(400, message, _source(body), "context_length_exceeded")
        limits = self._engine.scheduler.limits
        allowed = min(MAX_CHOICES, limits.max_running + limits.max_waiting)
        if (total := len(prompts) * body.num_choices) > allowed:
            message = f"{len(prompts)} prompts times n = {body.num_choices} are {total} choices; at most {allowed} go"
            raise ApiError(400, message, "n", "invalid_value")

    def _ask(self, prompts: Sequence[Sequence[int]], body: Sampled, tags: Tags, request_id: str) -> list[Answer]:
        """Submits all choices of all prompts, or none of them if one can't be accepted."""
        try:
            params = params_of(body, self.settings.defaults)
            jobs = [(ids, replace(params, choice=i)) for ids in prompts for i in range(body.num_choices)]
            return self._engine.submit(jobs, request_id=request_id, tenant=tags.tenant, may_learn=tags.learns)
        except (ValueError, Busy, Closed) as error:
            raise from_submit_error(error, self.settings.retry_after, _source(body)) from error

    async def _events(
        self,
        answers: Sequence[Answer],
        pieces: AsyncGenerator[tuple[int, Piece], None],
        body: Sampled,
        reply: Reply,
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream; an error ends it with an event named error."""
        options = body.stream_options
        has_tokens = bool(options and options.include_speculation)
        choices = [Choice() for _ in answers]
        try:
            async with aclosing(pieces):
                async for index, piece in pieces:
                    _check_piece(piece, self.settings.retry_after)
                    choice = choices[index]
                    if piece.text or piece.finish_reason or piece.logprobs or has_tokens:
                        yield event(to_json(reply.chunk(index, choice, piece, has_tokens)))
                        choice.num_pieces += 1
                if options and options.include_usage:
                    yield event(to_json(reply.last(usage_of(answers, body.num_choices))))
                yield event(b"[DONE]")
        except ApiError as error:
            _cancel_unfinished(answers)  # at once: the client may be slow to read the error
            yield event(to_json(error.body), b"error")


def params_of(body: Sampled, defaults: GenerationParams) -> GenerationParams:
    """Returns a body's generation settings. Missing fields are taken from `defaults`; a missing seed is drawn.

    Raises:
        ValueError: naming the setting and what is allowed.
    """
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = max(0, body.top_k)
    return GenerationParams(
        max_new_tokens=body.longest or defaults.max_new_tokens,
        num_draft_tokens=defaults.num_draft_tokens if body.num_draft_tokens is None else body.num_draft_tokens,
        sampling=replace(defaults.sampling, **given),
        stop_strings=body.stops,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_end_tokens=bool(body.ignore_eos),
        num_logprobs=body.num_logprobs,
        seed=secrets.randbits(_SEED_BITS) if body.seed is None else body.seed,
    )


async def _collected(
    answers: Sequence[Answer], pieces: AsyncGenerator[tuple[int, Piece], None], retry_after: int
) -> list[Choice]:
    """Collects all answers until they are complete."""
    choices = [Choice() for _ in answers]
    async with aclosing(pieces):
        async for index, piece in pieces:
            _check_piece(piece, retry_after)
            choices[index].add(piece)
    return choices


def _cancel_unfinished(answers: Sequence[Answer]) -> None:
    """Cancels the answers that are not complete, to free their memory and their place in the batch."""
    for answer in answers:
        if answer.request.finish_reason is None:
            answer.cancel()


def _check_piece(piece: Piece, retry_after: int) -> None:
    if piece.finish_reason == ERROR:
        raise ApiError(500, f"the answer failed: {piece.error}", code="answer_failed")
    if piece.finish_reason == CANCELLED:
        headers = {"Retry-After": str(retry_after)}
        raise ApiError(503, "the server stopped before the answer was complete", code="unavailable", headers=headers)


def check_model(name: str, settings: ServerSettings) -> None:
    """Raises ApiError, 404, if a model is not the one served."""
    if name != settings.model:
        message = f"model is {name!r}; it must be {settings.model!r}, which is the one served here"
        raise ApiError(404, message, "model", "model_not_found")


def _source(body: Sampled) -> str:
    return "messages" if isinstance(body, ChatRequest) else "prompt"


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes, the most that is read", code="body_too_large")
