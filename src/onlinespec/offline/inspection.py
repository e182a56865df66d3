"""Descriptions of model directories (`inspect`): targets, drafters and drafter versions, without loading weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from onlinespec.drafters.checkpoints import (
    SIDE_FILE,
    looks_like_drafter,
    read_drafter_config,
    read_format,
    read_side,
    tensor_names,
)
from onlinespec.drafters.small_lm import adapters
from onlinespec.models.checkpoint import architecture_of, find_folder, fingerprint, read_json, weight_files
from onlinespec.models.families import ARCHITECTURES
from onlinespec.models.loading import path_of
from onlinespec.publishing import store as versions
from onlinespec.publishing.layout import is_in, record_of
from onlinespec.publishing.protocol import Event
from onlinespec.registry import SHIPPED_DRAFTERS, SHIPPED_TARGETS

_SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "n_embd",  # from here on: the names that GPT-2 and similar models use
    "n_layer",
    "n_head",
    "n_positions",
    "tie_word_embeddings",
    "max_ngram",
)


def folders_of(name: str) -> tuple[Path, ...]:
    """Returns the directories that a path or Hub id refers to: one, or for `demo` a target's and a drafter's."""
    return (SHIPPED_TARGETS[name], SHIPPED_DRAFTERS[name]) if name == "demo" else (find_folder(name),)


def describe(folder: Path) -> dict[str, Any]:
    """Returns labelled facts about a directory with a target, a drafter, or versions of a drafter, for display.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the directory holds none of these, or a file can't be read.
    """
    if is_in(folder):
        return _versions_facts(folder)
    if adapters.is_in(folder):
        return _adapter_facts(folder)
    config = read_drafter_config(folder)
    architecture = architecture_of(config, folder / "config.json")
    is_target = _is_target(config, architecture, folder)
    kind = "target" if is_target else read_format(folder)
    facts: dict[str, Any] = {"kind": kind if is_target else f"drafter ({kind})", "path": folder}
    facts |= {"architecture": architecture} | {key: config[key] for key in _SHAPE_KEYS if key in config}
    if is_target:
        facts |= {"runs through": path_of(folder), "fingerprint": fingerprint(folder)}
    if is_target or any(folder.glob("*.safetensors*")):
        facts |= _tensor_facts(weight_files(folder))
    return facts if is_target else facts | _noted(folder)


def history_of(folder: Path) -> list[Event]:
    """Returns the events of a versions folder, oldest first; an empty list for any other directory."""
    return versions.Versions(folder).history() if is_in(folder) else []


def _versions_facts(folder: Path) -> dict[str, Any]:
    store = versions.Versions(folder)
    good, told = store.latest_good(None), []
    for number in store.numbers():
        try:
            told.append(str(store.read(number).version))
        except ValueError:
            told.append(f"{number} (not whole)")
    facts: dict[str, Any] = {"kind": "versions of a drafter", "path": folder, "on disk": ", ".join(told) or "none"}
    if good is None:
        return facts | {"a restart begins with": "the drafter as it was given: no version here is whole and good"}
    facts |= {
        "a restart begins with": f"version {good.version}, of {good.created}",
        "its drafter": store.folder_of(good.version),
    }
    facts |= {"target fingerprint": good.target_fingerprint}
    return facts | ({"learner": good.learner} if good.learner else {})


def _adapter_facts(folder: Path) -> dict[str, Any]:
    config = read_json(folder / adapters.CONFIG)
    facts: dict[str, Any] = {"kind": "drafter (adapters of a small_lm)", "path": folder}
    facts |= {"of": adapters.base_of(config, folder)}
    facts |= {key.replace("lora_", ""): config[key] for key in ("r", "lora_alpha", "target_modules") if key in config}
    return facts | _tensor_facts([folder / adapters.WEIGHTS]) | _noted(folder)


def _noted(folder: Path) -> dict[str, Any]:
    """Facts from the files that onlinespec adds to the published format: onlinespec.json and version.json."""
    side = read_side(folder)
    if not side:
        return {"history": f"none: no {SIDE_FILE}, so it was written by another program, or that file is lost"}
    noted = {key: value for key, value in side.items() if key != "notes"} | dict(side.get("notes", {}))
    if record := record_of(folder):
        noted |= {"learner": record.learner, "how it came about": f"{record.created}: {record.event.summary}"}
    return {key.replace("_", " "): value for key, value in noted.items()}


def _is_target(config: Mapping[str, Any], architecture: str, folder: Path) -> bool:
    """Whether a directory holds a target and not a drafter.

    Published EAGLE heads give their target's architecture in config.json, so the tensor names decide. A language model
    with an onlinespec.json was saved by us as a drafter.
    """
    if read_side(folder):
        return False
    if architecture in ARCHITECTURES:
        return "model.embed_tokens.weight" in tensor_names(folder)
    if looks_like_drafter(config, architecture, folder):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")), ())
    return architecture in ((known,) if isinstance(known, str) else known)


def _tensor_facts(files: Sequence[Path]) -> dict[str, Any]:
    num_parameters, dtypes, num_bytes = 0, set(), 0
    for path in files:
        num_bytes += path.stat().st_size
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_slice(name)
                size = 1
                for n in tensor.get_shape():
                    size *= n
                num_parameters += size
                dtypes.add(tensor.get_dtype())
    return {
        "parameters": f"{num_parameters:,}",
        "stored as": ", ".join(sorted(dtypes)),
        "size": f"{num_bytes / 1e6:.1f} MB in {len(files)} file{'s' if len(files) > 1 else ''}",
    }
