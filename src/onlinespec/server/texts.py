"""Text to token ids and back, for the server: prompts, conversations, and the names of single tokens.

Works on a tokenizer of its own: the decoding thread uses the target's, and one must not be set up anew while the other
reads. Encoding is done in a thread, one text after the other, so that a long one does not stall the event loop.
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

_PRIVATE = range(0xE000, 0xF8FF)  # characters that no text should hold; one marks a cut
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


class Texts:
    """A target's texts and tokens.

    What is written in a message never becomes a control token, however it is spelt: the checkpoint's special tokens
    come from its chat template alone. Marks of a template that are ordinary text ("[INST]") can't be told apart.
    """

    def __init__(self, target: Target) -> None:
        self._tokenizer = copy.deepcopy(target.tokenizer)
        self._one_at_a_time = asyncio.Lock()
        self._names: dict[int, bytes] = {}
        special = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        self._taken = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        self._special = sorted(special | set(self._tokenizer.all_special_tokens))

    async def of_completion(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt. In these, unlike in messages, special tokens may be spelt."""
        return [await self._run(self._encode, one, True) if isinstance(one, str) else one for one in request.prompts]

    async def of_chat(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation, laid out by the checkpoint's chat template.

        Raises:
            ApiError: if there is no template, or it refuses the conversation.
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
        """A text in which every special token's spelling is cut in two, each half to be encoded for itself."""
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
        except Exception as error:  # templates are programs of the checkpoint's, and refuse in many ways
            raise ApiError(
                400, f"messages don't fit the model's chat template: {error}", "messages", "invalid_value"
            ) from error
        return rendered

    # --- tokens -------------------------------------------------------------------------------------------------

    def bytes_of(self, token_id: int) -> bytes:
        """A token as UTF-8 bytes, which need not be whole characters."""
        if token_id not in self._names:
            self._names[token_id] = self._spell(token_id)
        return self._names[token_id]

    def text_of(self, token_id: int) -> str:
        """A token as text, with U+FFFD for what is no whole character."""
        return self.bytes_of(token_id).decode(errors="replace")

    def _spell(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # models are often a little larger than their tokenizers
            return b""
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if "\ufffd" in text:
            if found := _BYTE_TOKEN.fullmatch(piece):
                return bytes.fromhex(found[1])
            if all(character in _BYTES for character in piece):
                return bytes(_BYTES[character] for character in piece)
        if piece.startswith(_SPACE) and not text.startswith(" "):  # which a decoder strips at a text's beginning
            text = " " + text
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """The bytes behind the characters that byte-level vocabularies are written in."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
