"""Builders of response bodies in OpenAI's format from pieces of answers: complete bodies, and chunks of streams."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pydantic import BaseModel

from onlinespec.core import DecodeStats, TokenLogprobs
from onlinespec.server.engine import Answer, Piece
from onlinespec.server.schema import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkSpeculation,
    Completion,
    CompletionChoice,
    Delta,
    FinishReason,
    LegacyLogprobs,
    NewToken,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
    UsageSpeculation,
)
from onlinespec.server.texts import Texts


class Choice:
    """One answer, as far as it is generated."""

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.num_pieces = 0
        self.text_offset = 0  # of the next token, in characters of the tokens before it

    def add(self, piece: Piece) -> None:
        """Appends a piece."""
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.num_pieces += 1
        self.finish_reason = openai_finish_reason(piece.finish_reason)


class Reply(ABC):
    """Builds the bodies of the response to one HTTP request."""

    prefix: str  # of the response id

    def __init__(self, model: str, texts: Texts, has_logprobs: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._model, self._texts, self._has_logprobs = model, texts, has_logprobs

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        """Returns the complete body."""

    @abstractmethod
    def chunk(self, index: int, choice: Choice, piece: Piece, has_tokens: bool) -> BaseModel:
        """Returns the chunk of a stream for one piece.

        Args:
            index: Of the choice.
            choice: The state of the choice before the piece.
            has_tokens: Whether to include the new tokens and the statistics of speculative decoding.
        """

    @abstractmethod
    def last(self, usage: Usage) -> BaseModel:
        """Returns the last chunk of a stream, which holds the usage."""

    def _speculation(self, piece: Piece) -> ChunkSpeculation:
        tokens = [
            NewToken(id=i, text=self._texts.text_of(i), drafted=is_drafted)
            for i, is_drafted in zip(piece.token_ids, piece.is_drafted, strict=True)
        ]
        return ChunkSpeculation(tokens=tokens, **_counts(piece.stats))


class CompletionReply(Reply):
    """Bodies of /v1/completions."""

    prefix = "cmpl"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        found = [
            CompletionChoice(
                index=i,
                text=choice.text,
                logprobs=self._logprobs(choice.logprobs, choice),
                finish_reason=choice.finish_reason,
            )
            for i, choice in enumerate(choices)
        ]
        return self._completion(found, usage)

    def chunk(self, index: int, choice: Choice, piece: Piece, has_tokens: bool) -> BaseModel:
        new = CompletionChoice(
            index=index,
            text=piece.text,
            logprobs=self._logprobs(piece.logprobs, choice),
            finish_reason=openai_finish_reason(piece.finish_reason),
        )
        if has_tokens:
            new.speculation = self._speculation(piece)
        return self._completion([new])

    def last(self, usage: Usage) -> BaseModel:
        return self._completion([], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        body = Completion(
            id=self.id, object="text_completion", created=self.created, model=self._model, choices=choices
        )
        if usage:
            body.usage = usage
        return body

    def _logprobs(self, rows: Sequence[TokenLogprobs], choice: Choice) -> LegacyLogprobs | None:
        if not self._has_logprobs:
            return None
        name = self._texts.text_of
        tokens = [name(row.token_id) for row in rows]
        offsets = list(accumulate(map(len, tokens), initial=choice.text_offset))
        choice.text_offset = offsets.pop()
        top = []
        for row in rows:
            likeliest: dict[str, float] = {}
            for token_id, logprob in (*row.top, (row.token_id, row.logprob)):
                likeliest.setdefault(name(token_id), logprob)
            top.append(likeliest)
        return LegacyLogprobs(
            tokens=tokens, token_logprobs=[row.logprob for row in rows], top_logprobs=top, text_offset=offsets
        )


class ChatReply(Reply):
    """Bodies of /v1/chat/completions."""

    prefix = "chatcmpl"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        found = [
            ChatChoice(
                index=i,
                message=ChatMessage(role="assistant", content=choice.text),
                logprobs=self._logprobs(choice.logprobs),
                finish_reason=choice.finish_reason,
            )
            for i, choice in enumerate(choices)
        ]
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self._model,
            choices=found,
            usage=usage,
        )

    def chunk(self, index: int, choice: Choice, piece: Piece, has_tokens: bool) -> BaseModel:
        delta = Delta(content=piece.text) if choice.num_pieces else Delta(role="assistant", content=piece.text)
        new = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=openai_finish_reason(piece.finish_reason),
        )
        if has_tokens:
            new.speculation = self._speculation(piece)
        return self._chunk([new])

    def last(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        body = ChatChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self._model, choices=choices
        )
        if usage:
            body.usage = usage
        return body

    def _logprobs(self, rows: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        content = [
            TokenLogprob(
                **dict(self._one(row.token_id, row.logprob)), top_logprobs=[self._one(*pair) for pair in row.top]
            )
            for row in rows
        ]
        return ChatLogprobs(content=content)

    def _one(self, token_id: int, logprob: float) -> TopLogprob:
        spelt = self._texts.bytes_of(token_id)
        return TopLogprob(token=spelt.decode(errors="replace"), logprob=logprob, bytes=list(spelt))


def openai_finish_reason(finish_reason: str | None) -> FinishReason | None:
    """Returns OpenAI's name of a finish reason: a full context is "length", too."""
    return None if finish_reason is None else "stop" if finish_reason == "stop" else "length"


def _counts(stats: DecodeStats) -> dict[str, Any]:
    """The fields of `Speculation`."""
    return dict(
        drafted=stats.drafted,
        accepted=stats.accepted,
        steps=stats.steps,
        acceptance_length=stats.acceptance_length,
    )


def usage_of(answers: Sequence[Answer], num_choices: int) -> Usage:
    """Returns the usage over all answers to one HTTP request. A prompt counts once, however many choices it has."""
    requests = [answer.request for answer in answers]
    prompts = requests[::num_choices]
    stats = sum((request.stats for request in requests), DecodeStats())
    num_prompt = sum(request.num_prompt_tokens for request in prompts)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=stats.tokens,
        total_tokens=num_prompt + stats.tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(request.num_cached for request in prompts)),
        speculation=UsageSpeculation(
            beyond_drafter=sum(request.num_beyond_drafter for request in requests),
            seed=requests[0].params.seed,
            **_counts(stats),
        ),
    )
