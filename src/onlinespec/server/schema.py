"""The request and response bodies of the HTTP API, in OpenAI's format.

Types are strict: "3" is not a number. Unknown fields are ignored, as in other servers of this API. Known fields that
are not supported accept only the values that have no effect; any other value is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from onlinespec.config import MAX_DRAFT_TOKENS, MAX_LOGPROBS
from onlinespec.server.settings import MAX_CHOICES

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 256

Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
ListsOfIds = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
EmptyList = Annotated[list[Any], Field(max_length=0)]


class Refusal(PydanticCustomError):
    """A validation error: the value of one field contradicts another field."""

    def __new__(cls, field: str, message: str) -> Self:
        return super().__new__(cls, "refused", "{message}", {"field": field, "message": message})


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    """What a stream contains beside the text."""

    include_usage: bool | None = None
    include_speculation: bool | None = Field(
        None, description="In every chunk the new tokens, and which of them were drafted."
    )


class TextFormat(_Body):
    """The only supported response format."""

    type: Literal["text"]


class Sampled(_Body):
    """The fields of both kinds of request. The server's settings apply to fields that are missing or null."""

    model: str | None = Field(None, description="The name under /v1/models.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer; the context bounds it, too.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy; left out, what the checkpoint recommends.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Left out, one is drawn for each request.")
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS, fail_fast=True)] | None = Field(
        None, description=f"a text or up to {_MAX_STOPS} of them, each of 1 to {_MAX_STOP_LENGTH} characters"
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = Field(None, description="Go on behind an end token, for benchmarks of a fixed length.")
    num_draft_tokens: int | None = Field(None, ge=0, le=MAX_DRAFT_TOKENS, description="0 is plain decoding.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _streams_if_it_says_how(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Refusal("stream_options", "stream_options needs stream to be true")
        return self

    @property
    def num_choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def longest(self) -> int | None:
        """Maximum length of the answer, in tokens; None if not given."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Number of top alternatives to report with each token's logprob; None reports no logprobs."""
        return None


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, fail_fast=True)] | TokenIds | ListsOfIds = Field(
        description="a text, a list of texts, a list of token ids, or a list of lists of token ids"
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Offered as the same number as n alone.")
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _has_one_number_of_choices(self) -> Self:
        if self.best_of not in (None, self.num_choices):
            raise Refusal("best_of", f"best_of is {self.best_of}; it must be n ({self.num_choices}), or left out")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, as texts or as token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Body):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        description="a text, or a list of text parts"
    )
    tool_calls: EmptyList | None = None
    function_call: None = None
    audio: None = None

    @property
    def text(self) -> str:
        """The content as one text; parts are joined with newlines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(False, description="Go on in the last message, instead of answering it.")
    chat_template_kwargs: dict[str, bool | int] | None = Field(
        None, description="Settings of the checkpoint's chat template, such as enable_thinking."
    )
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise Refusal("top_logprobs", "top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise Refusal("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


# --- answers --------------------------------------------------------------------------------------------------------


class Speculation(BaseModel):
    """Statistics of speculative decoding: drafted and accepted tokens, decode steps."""

    drafted: int
    accepted: int
    steps: int
    acceptance_length: float = Field(description="Mean tokens per step, 1 + accepted / steps.")


class UsageSpeculation(Speculation):
    """Statistics of speculative decoding over all answers to a request, and the seed of its sampling."""

    beyond_drafter: int = Field(description="Tokens behind the longest text that the drafter drafts for.")
    seed: int = Field(description="The one that was asked for or drawn; with it the same request has the same texts.")


class PromptDetails(BaseModel):
    """How many of the prompt tokens were found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a request and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    speculation: UsageSpeculation


class NewToken(BaseModel):
    """A token of a chunk. If a character is split over several tokens, its bytes are shown as U+FFFD."""

    id: int
    text: str
    drafted: bool = Field(description="Kept from a draft; else the target's own.")


class ChunkSpeculation(Speculation):
    """Statistics of speculative decoding for a choice so far, and the new tokens."""

    tokens: list[NewToken]


FinishReason = Literal["stop", "length"]


class LegacyLogprobs(BaseModel):
    """Logprobs in the format of /v1/completions: natural logarithms, before sampling settings are applied."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token and its logprob."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs in the format of /v1/chat/completions: natural logarithms, before sampling settings are applied."""

    content: list[TokenLogprob]


class CompletionChoice(BaseModel):
    """An answer, or the new part of one in a chunk."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason | None
    speculation: ChunkSpeculation | None = None


class Completion(BaseModel):
    """The response body of /v1/completions, and of each chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """An answer and its finish reason."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """The response body of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """The new part of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The new part of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    speculation: ChunkSpeculation | None = None


class ChatChunk(BaseModel):
    """A chunk of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "onlinespec"
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class ModelList(BaseModel):
    """The list of served models, which has one entry."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """The state of the server."""

    status: str


class ErrorDetail(BaseModel):
    """An error: message, type, the wrong field (`param`) and code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The response body of every error."""

    error: ErrorDetail
