"""Detokenizer: turns committed tokens into text that is final, without half characters or parts of stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes a second
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # decoding puts this for bytes that are no complete character


class TextStream:
    """The text of one request, as its tokens are committed.

    `push` adds a token, `take` returns the text that became final since the last call. Text that may begin
    a stop string, and bytes of an incomplete character, are held back. A stop string and everything after it is never
    returned, nor are special tokens.
    """

    _WINDOW = 6  # earlier tokens decoded together with a new one, because its text may depend on them

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._ids: list[int] = []
        self._settled = 0  # number of tokens whose text is in `text`
        self._starts = [0]  # earlier values of _settled, where whole characters end; decoding starts at the first
        self._taken = 0
        self._is_closed = False
        self.text = ""  # the text so far, cut at a stop string

    def push(self, token_id: int, is_end: bool = False) -> bool:
        """Adds a token. Returns whether a stop string is now complete. An end token adds no text."""
        if not is_end:
            self._ids.append(token_id)
            if self._stop_strings:
                self._settle()
        return self._cut()

    def close(self) -> None:
        """Ends the text: what was held back becomes final."""
        self._settle(is_final=True)
        self._cut()
        self._is_closed = True

    def take(self) -> str:
        """Returns the text that became final since the last call."""
        self._settle(is_final=self._is_closed)
        end = len(self.text) if self._is_closed else len(self.text) - self._num_held()
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _settle(self, is_final: bool = False) -> None:
        if self._is_closed or self._settled == len(self._ids):
            return
        before = self._decode(self._ids[self._starts[0] : self._settled])
        now = self._decode(self._ids[self._starts[0] :])
        if (now.endswith(_REPLACEMENT) and not is_final) or len(now) < len(before):
            return
        self.text += now[len(before) :]
        self._settled = len(self._ids)
        self._starts.append(self._settled)
        while self._starts[1] <= self._settled - self._WINDOW:
            del self._starts[0]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _cut(self) -> bool:
        starts = [start for stop in self._stop_strings if (start := self.text.find(stop)) >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self._is_closed = True
        return bool(starts)

    def _num_held(self) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for n in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
