"""Drafter checkpoints on disk: recognising the family of a checkpoint folder, and writing folders atomically.

A drafter folder has `config.json` and, if the drafter has weights, `model.safetensors`, both in the published layout of
its family. What only onlinespec needs (weights version, target fingerprint, draft vocabulary, ...) is in
`onlinespec.json`, which other engines ignore.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onlinespec.drafters.draft_vocab import DraftVocab
from onlinespec.models.checkpoint import architecture_of, find_folder, read_json, weight_files

SIDE_FILE = "onlinespec.json"
_DRAFT_TOKENS = "draft_tokens"
_KNOWN_ELSEWHERE = {  # families that we do not run yet, by architecture; for the error message
    "LlamaForCausalLMEagle3": "EAGLE-3",
    "Eagle3Speculator": "EAGLE-3 (speculators)",
    "Eagle3DraftModel": "EAGLE-3 (speculators)",
    "DFlashDraftModel": "DFlash",
    "DFlashSpeculator": "DFlash (speculators)",
}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_KEY_MARKS = {"medusa_num_heads": "Medusa", "hydra_head_arch": "Hydra", "draft_vocab_size": "EAGLE-3"}


def drafter_folder(name: str, known: list[str]) -> Path:
    """Returns the folder of a saved drafter, from a path or a Hub id.

    Raises:
        FileNotFoundError: if there is none; the message lists `known`, the names of untrained drafters.
    """
    try:
        return find_folder(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; a fresh drafter is one of: {', '.join(known)}") from error


def read_drafter_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a drafter folder.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a JSON object.
    """
    return read_json(folder / "config.json")


def read_format(folder: Path) -> str:
    """Returns which drafter class a folder is for: a name in `registry.DRAFTERS`, or "pkg.module:Class".

    Recognised by an `adapter_config.json`, else by the architecture in config.json, else by the names of the tensors.

    Raises:
        ValueError: if the family is not supported or not recognised.
    """
    if (folder / "adapter_config.json").is_file():
        return "small_lm"
    config = read_drafter_config(folder)
    architecture = architecture_of(config, folder / "config.json")
    if architecture == "NgramDrafter":
        return "ngram"
    if _is_class(architecture):
        return architecture
    family = _family_elsewhere(config, architecture)
    if family:
        raise ValueError(f"{folder} is a drafter of the family {family}, which this version does not run yet")
    names = tensor_names(folder)
    if _is_eagle(names):
        return "eagle"
    if architecture.endswith(_LANGUAGE_MODELS) and any(name.endswith(_EMBEDDINGS) for name in names):
        return "small_lm"
    raise ValueError(f"{folder} is no drafter we know: architecture {architecture}, tensors {sorted(names)[:4]}")


def looks_like_drafter(config: Mapping[str, Any], architecture: str, folder: Path) -> bool:
    """Whether a folder holds a drafter of a family that we run or know by name, and so no target.

    False for a small_lm: it is an ordinary language model, so nothing distinguishes it from a target.
    """
    if architecture == "NgramDrafter" or _is_class(architecture) or _family_elsewhere(config, architecture):
        return True
    return _is_eagle(tensor_names(folder))


def _is_class(architecture: str) -> bool:
    """Whether a config names a class outside of this package, as "pkg.module:Class"."""
    return ":" in architecture


def _family_elsewhere(config: Mapping[str, Any], architecture: str) -> str | None:
    return _KNOWN_ELSEWHERE.get(architecture) or next((f for key, f in _KEY_MARKS.items() if key in config), None)


def _is_eagle(names: Collection[str]) -> bool:
    return "fc.weight" in names and "lm_head.weight" not in names and "layers.0.self_attn.q_proj.weight" in names


def tensor_names(folder: Path) -> set[str]:
    """Returns the names of all tensors in a folder's safetensors files, without reading the tensors.

    Raises:
        ValueError: if a file can't be read.
    """
    names: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                names |= set(shard.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read ({error}); it may be cut short: copy it again") from error
    return names


def read_side(folder: Path) -> dict[str, Any]:
    """Returns the content of `onlinespec.json`; empty if there is none, because another program wrote the drafter."""
    return read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else {}


def draft_tokens_of(vocab: DraftVocab) -> dict[str, str]:
    """Returns the draft vocabulary as an entry of `onlinespec.json`; empty if `DraftVocab.saved` is."""
    token_ids = vocab.saved()
    return {_DRAFT_TOKENS: " ".join(map(str, token_ids))} if token_ids else {}


def draft_tokens_in(side: Mapping[str, Any]) -> list[int]:
    """Returns the token ids of the draft vocabulary from the content of `onlinespec.json`; empty if there are none.

    Raises:
        ValueError: if the entry is not a string of token ids.
    """
    noted = side.get(_DRAFT_TOKENS, "")
    try:
        return [int(i) for i in noted.split()]
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{_DRAFT_TOKENS} in {SIDE_FILE} is no text of token ids ({error}); leave it out") from error


def write_drafter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    version: int,
    side: Mapping[str, Any] | None = None,
    names: tuple[str, str] = ("config.json", "model.safetensors"),
    also: Callable[[Path], object] | None = None,
) -> None:
    """Writes a drafter folder atomically: into a temporary folder beside it, which is then renamed.

    Args:
        folder: The folder to write. An existing one is replaced if onlinespec wrote it, or if it is empty.
        config: The content of the config file.
        tensors: The tensors by their published names. If there are none, no file is written.
        version: The weights version, for `onlinespec.json`.
        side: Further entries of `onlinespec.json`.
        names: File names of the config and of the tensors.
        also: Called with the temporary folder to write further files, such as a tokenizer.

    Raises:
        ValueError: if the folder can't be written to, or exists and was not written by onlinespec.
    """
    folder = Path(folder)
    if (
        folder.exists()
        and any(folder.iterdir() if folder.is_dir() else [folder])
        and not (folder / SIDE_FILE).is_file()
    ):
        raise ValueError(f"{folder} exists and was not written by onlinespec; choose another place for the drafter")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"the drafter can't be saved to {folder}: {error}") from error
    try:
        _write_json(partial / names[0], config)
        _write_json(partial / SIDE_FILE, {"weights_version": version, **(side or {})})
        if tensors:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial / names[1])
            (partial / names[1]).chmod((partial / names[0]).stat().st_mode)  # safetensors makes it owner-only
        if also:
            also(partial)
        partial.chmod(0o755)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
    old = new.with_name(new.name + ".old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
