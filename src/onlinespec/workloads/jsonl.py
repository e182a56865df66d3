"""Prompts from a .jsonl or .jsonl.gz file: one object per line, with `prompt` and optionally `id` and `response`."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onlinespec.workloads.base import Prompt, Split, check_split

SHOWN_CHARACTERS = 60  # of a bad line, in messages
ROW_FORM = '{"prompt": "...", "id": "...", "response": "..."}, where only "prompt" is required'


class JsonlWorkload:
    """The rows of a file, in its order. Seed and split of `prompts` make no difference.

    The whole file is read and checked on construction, so that a bad row does not end a run half way.

    Raises:
        ValueError: naming the line, for content that is not rows with a prompt.
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name.removesuffix(".gz").removesuffix(".jsonl")
        self._prompts = _read(self.path, self.name)

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        check_split(split)
        return iter(self._prompts)


def _read(path: Path, domain: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):  # splitlines would split at breaks inside strings
        if not line.strip():
            continue
        prompt = _prompt(line, f"{path}, line {number}", f"{domain}-{number}", domain)
        first = line_of.setdefault(prompt.id, number)
        if first != number:
            raise ValueError(
                f"{path}, line {number}: id {prompt.id!r} is already used on line {first}; ids must differ"
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no rows; write one object a line: {ROW_FORM}")
    return prompts


def _text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a .jsonl or .jsonl.gz file in it")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; give a .jsonl[.gz] file, builtin:NAME or hf:dataset[:split]")
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = _unpacked(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        way_out = "unpack it or name it .gz" if content.startswith(b"\x1f\x8b") else "save the file as UTF-8"
        raise ValueError(f"{path}, line {line}: byte {content[error.start]:#04x} is not UTF-8; {way_out}") from error


def _unpacked(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise ValueError(f"{path} is cut short: its gzip stream does not end; copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a sound gzip file ({error}); pack it again or drop the .gz") from error


def _prompt(line: str, where: str, default_id: str, domain: str) -> Prompt:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): {_start(line)}; write {ROW_FORM}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__} instead of an object: {_start(line)}; write {ROW_FORM}")
    if "prompt" not in row:
        keys = ", ".join(row) or "none"
        raise ValueError(f'{where}: no "prompt"; the keys it has: {keys}; rename one of them to "prompt"')
    return Prompt(
        id=_identifier(row.get("id"), where) or default_id,
        text=_string(row["prompt"], "prompt", where),
        domain=domain,
        reference=None if row.get("response") is None else _string(row["response"], "response", where),
    )


def _identifier(value: Any, where: str) -> str:
    """Also takes whole numbers, which are common as ids in published files."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return "" if value is None else _string(value, "id", where)


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        shown = _start(json.dumps(value))
        raise ValueError(f'{where}: "{key}" is {type(value).__name__} ({shown}), not a string; put it in quotes')
    if key == "prompt" and not value.strip():
        raise ValueError(f'{where}: "prompt" is empty; give it some text or drop the row')
    return value


def _start(text: str) -> str:
    text = text.strip()
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
