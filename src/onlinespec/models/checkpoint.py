"""Checkpoint directories: finding them, reading their files, checking that all tensors are there and finite.

Only safetensors are read, and code from a checkpoint is never run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onlinespec.registry import SHIPPED_DRAFTERS, SHIPPED_TARGETS

_FINGERPRINT_BYTES = 1 << 20  # read in three places of every weight file


def find_folder(path_or_hub_id: str | Path) -> Path:
    """Returns the local directory of a checkpoint. A Hub id is downloaded if it is not in the Hub's cache.

    Args:
        path_or_hub_id: A directory, a Hub id, or the name of a shipped target or drafter (`demo`).

    Raises:
        FileNotFoundError: if there is neither such a directory nor such a Hub id.
        ValueError: if the name is empty, or the path of a file.
    """
    if shipped := (SHIPPED_DRAFTERS | SHIPPED_TARGETS).get(str(path_or_hub_id)):
        return shipped
    if not str(path_or_hub_id):
        raise ValueError("the name is empty; give a directory, a Hub id, or demo")
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the directory that holds config.json and the weights")
    name = str(path_or_hub_id)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no directory {folder}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is neither a directory here nor could it be had from the Hub ({type(error).__name__}: {reason})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a checkpoint directory holds {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def read_weights(folder: Path, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors checkpoint, sharded or not.

    Args:
        dtype: The dtype to convert to; None keeps the stored one.

    Raises:
        FileNotFoundError, ValueError: as `weight_files` and `read_tensors`.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= read_tensors(path, device, dtype)
    return weights


def read_tensors(path: Path, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file, as copies: a view would keep the whole file in memory.

    Args:
        dtype: The dtype to convert to; None keeps the stored one.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    tensors = {}
    for name in _names_in(path):
        with safe_open(path, framework="pt") as file:
            tensors[name] = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
    return tensors


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors by name, from the headers of the files.

    Raises:
        FileNotFoundError: as `weight_files`.
        ValueError: naming a file that can't be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        names = _names_in(path)
        with safe_open(path, framework="pt") as shard:
            shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in names}
    return shapes


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} can't be read ({error}); it may be cut short: copy or download it again") from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint directory.

    Raises:
        FileNotFoundError: if there are none, or the index of the shards names one that is missing.
        ValueError: if the index is malformed.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: its weight_map must name a file for every tensor")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise FileNotFoundError(f"{index} names {missing or 'no files'}, which {folder} does not hold")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
            "convert other formats with transformers' save_pretrained"
        )
    return [single]


def check_tensors(
    weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path, may_have: tuple[str, ...] = ()
) -> None:
    """Checks every tensor of a checkpoint by name, shape and finiteness.

    Args:
        expected: The shapes of the tensors that must be there, by name.
        folder: The checkpoint directory, for error messages.
        may_have: Further names that are allowed. Rotary frequencies, which older checkpoints store, always are.

    Raises:
        ValueError: naming what is missing, unexpected, of another shape, or not finite.
    """
    missing = [name for name in expected if name not in weights]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    extra = [n for n in weights if n not in expected and n not in may_have and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ValueError(
            f"{folder}: {len(extra)} tensors are not part of the model its config.json describes: {extra[:3]}"
        )
    for name, dims in expected.items():
        if tuple(weights[name].shape) != dims:
            raise ValueError(f"{folder}: {name} has shape {tuple(weights[name].shape)}, config.json says {dims}")
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{folder}: {name} holds values that are not finite (NaN or infinity)")


def architecture_of(config: Mapping[str, Any], path: Path) -> str:
    """Returns the first of the architectures that a config.json names; "(none)" if it names none.

    Args:
        path: The file, for the error message.

    Raises:
        ValueError: if `architectures` is not a list of names.
    """
    names = config.get("architectures") or ["(none)"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f'{path}: architectures is {names!r}; it must be a list of names: ["LlamaForCausalLM"]')
    return names[0]


def fingerprint(folder: Path) -> str:
    """Returns a hash of sixteen hex digits that identifies a model and its tokenizer.

    It covers config.json, tokenizer.json, and the size and the first, middle and last MiB of every weight file. This is
    enough to distinguish checkpoints without reading tens of gigabytes.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start in (0, max(0, size // 2 - _FINGERPRINT_BYTES // 2), max(0, size - _FINGERPRINT_BYTES)):
                file.seek(start)
                digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
