"""Tokenization for the server: prompts and conversations to token ids, and single tokens to text.

Uses a copy of the target's tokenizer, because encoding may change the settings of a tokenizer while the decoding thread
reads it. Encoding runs in a thread, one text at a time, so that a long text does not block the event loop.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from onlinespec.models.loading import Target
from onlinespec.server.errors import ApiError
from onlinespec.server.schema import ChatRequest, CompletionRequest

_PRIVATE = range(0xE000, 0xF8FF)  # private-use characters; one that no message has marks a cut
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece vocabularies write a space


class Texts:
    """A target's tokenizer, for use in the event loop.

    Text in a message never becomes a special token, even if it spells one: special tokens come only from the chat
    template. Template markers that are ordinary text ("[INST]") can't be distinguished from the same text in a message.
    """

    def __init__(self, target: Target) -> None:
        self._tokenizer = copy.deepcopy(target.tokenizer)
        self._one_at_a_time = asyncio.Lock()
        self._names: dict[int, bytes] = {}
        special = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        self._taken = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        self._special = sorted(special | set(self._tokenizer.all_special_tokens))

    async def of_completion(self, request: CompletionRequest) -> list[list[int]]:
        """Returns the token ids of each prompt. Unlike in messages, text that spells a special token becomes one."""
        return [await self._run(self._encode, one, True) if isinstance(one, str) else one for one in request.prompts]

    async def of_chat(self, request: ChatRequest) -> list[int]:
        """Returns the token ids of a conversation, rendered by the checkpoint's chat template.

        Raises:
            ApiError: 400, if there is no template or it rejects the conversation.
        """
        if not self._tokenizer.chat_template:
            raise ApiError(
                400,
                "messages can't be laid out: the model has no chat template; use /v1/completions",
                "messages",
                "no_chat_template",
            )
        if request.continue_final_message and request.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message is true; it must go with add_generation_prompt false",
                "continue_final_message",
                "invalid_value",
            )
        return await self._run(self._encode_chat, request)

    async def _run(self, encode: Any, *arguments: Any) -> list[int]:
        async with self._one_at_a_time:
            ids: list[int] = await asyncio.to_thread(encode, *arguments)
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return [int(i) for i in ids]

    def _encode_chat(self, request: ChatRequest) -> list[int]:
        texts = [message.text for message in request.messages]
        cut = next(chr(i) for i in _PRIVATE if not any(chr(i) in text for text in texts))
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": self._cut(text, cut)}
            for message, text in zip(request.messages, texts, strict=True)
        ]
        rendered = self._render(turns, request)
        return [i for piece in rendered.split(cut) for i in self._encode(piece, False)]

    def _cut(self, text: str, cut: str) -> str:
        """Inserts the character `cut` into every special token spelt in a text; the parts are encoded separately."""
        places = {
            found.start() + 1
            for token in self._special
            if token in text
            for found in re.finditer(f"(?={re.escape(token)})", text)
        }
        if any(len(token) == 1 and token in text for token in self._special):
            raise ApiError(400, "messages hold a control character of the model; leave it out", "messages")
        bounds = [0, *sorted(places), len(text)]
        return cut.join(text[start:end] for start, end in pairwise(bounds))

    def _render(self, turns: Sequence[Mapping[str, str]], request: ChatRequest) -> str:
        settings = request.chat_template_kwargs or {}
        if taken := sorted(settings.keys() & self._taken):
            message = f"chat_template_kwargs has {taken[0]}, which is set otherwise; leave it out"
            raise ApiError(400, message, "chat_template_kwargs", "invalid_value")
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **settings,
            )
        except Exception as error:  # a template is code from the checkpoint and can raise anything
            raise ApiError(
                400, f"messages don't fit the model's chat template: {error}", "messages", "invalid_value"
            ) from error
        return rendered

    # --- tokens -------------------------------------------------------------------------------------------------

    def bytes_of(self, token_id: int) -> bytes:
        """Returns a token's UTF-8 bytes, which can end within a character."""
        if token_id not in self._names:
            self._names[token_id] = self._spell(token_id)
        return self._names[token_id]

    def text_of(self, token_id: int) -> str:
        """Returns a token's text, with U+FFFD for incomplete characters."""
        return self.bytes_of(token_id).decode(errors="replace")

    def _spell(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # a model's vocabulary is often padded beyond its tokenizer's
            return b""
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if "\ufffd" in text:
            if found := _BYTE_TOKEN.fullmatch(piece):
                return bytes.fromhex(found[1])
            if all(character in _BYTES for character in piece):
                return bytes(_BYTES[character] for character in piece)
        if piece.startswith(_SPACE) and not text.startswith(" "):  # the decoder strips a leading space
            text = " " + text
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """The map from the characters of byte-level BPE vocabularies (as in GPT-2) to bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
