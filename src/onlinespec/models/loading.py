"""The loading of targets from a Hugging Face directory or Hub id: config, weights, tokenizer, chat template.

Only safetensors are read, code from a checkpoint is never run, and every tensor of the model must be there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onlinespec.config import SamplingParams
from onlinespec.models.base import Model, ModelConfig
from onlinespec.models.checkpoint import (
    architecture_of,
    find_folder,
    fingerprint,
    read_json,
    read_weights,
    tensor_shapes,
)
from onlinespec.models.decoder import Decoder
from onlinespec.models.families import FAMILIES, NotOurs, checked_weights, decoder_config
from onlinespec.models.linear import MakeLinear, PackedLinear, linear_for
from onlinespec.models.memory import check_memory, estimate

if TYPE_CHECKING:  # transformers and the Hub client take seconds to import, so each is imported where it is needed
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from onlinespec.models.hf import HFModel

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_NAMED = 3  # tokens named in a log line
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_GENERATION_CONFIG = "generation_config.json"
# transformers' defaults of the settings in generation_config.json
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Target:
    """The model whose output distribution is preserved, with its tokenizer."""

    name: str  # the path, Hub id or `demo` that it was loaded by
    decoder: Model[Any]
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: frozenset[int]
    sampling: SamplingParams  # from generation_config.json; greedy if it does not ask for sampling
    fingerprint: str  # of weights, config and tokenizer
    tokens_beyond: Mapping[int, str] = field(default_factory=dict)  # tokens that only the tokenizer has, by id

    @property
    def path(self) -> str:
        """Which code runs it: `own` for our decoder, or `transformers`."""
        return self.decoder.path

    def encode(self, text: str, is_chat: bool = True) -> list[int]:
        """Returns the token ids of a prompt. If `is_chat`, it is put into the chat template as a user message.

        Without a chat template, `is_chat` has no effect.
        """
        if is_chat and self.tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            rendered = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(text)["input_ids"]
        return [int(i) for i in ids]


def load_target(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    make_linear: MakeLinear | None = None,
    beside: Callable[[ModelConfig, torch.dtype, torch.device], int] | None = None,
) -> Target:
    """Loads a target, ready to decode.

    Args:
        path_or_hub_id: A directory, a Hub id, or `demo` for the shipped model.
        make_linear: Makes the matrix products of our decoder; by default the fastest exact ones.
        beside: For the memory estimate: returns the bytes that a drafter and its learning will hold beside a target of
            these sizes, dtype and device.

    Raises:
        FileNotFoundError: if there is no such directory or Hub id, or one of its files is missing.
        ValueError: if the checkpoint is not supported, broken or incomplete, or does not fit into memory.
    """
    folder = find_folder(path_or_hub_id)
    device, dtype = as_device(device), as_dtype(dtype)
    config = read_config(folder)
    shape = own_shape(config, folder)
    generation = read_generation_config(folder)
    end_token_ids = _end_token_ids(config, generation, folder)
    sampling = _default_sampling(generation, folder / _GENERATION_CONFIG)
    decoder: Model[Any]
    if shape:
        make_linear = make_linear or linear_for(device, dtype)
        need = estimate(tensor_shapes(folder), shape, dtype, keeps_second_head=make_linear is PackedLinear)
        check_memory(replace(need, beside=beside(shape, dtype, device) if beside else 0), device, folder)
        weights = checked_weights(read_weights(folder, device, dtype), config, shape, folder)
        decoder = Decoder(shape, weights, make_linear)
    else:
        decoder = _load_through_transformers(folder, config, device, dtype, beside)
    tokenizer, vocab_size = read_tokenizer(folder), decoder.config.vocab_size
    beyond = _tokens_beyond(tokenizer, vocab_size)
    if beyond:
        log.warning(
            "%s: the tokenizer has %d tokens, the model %d; prompts with one of the others (%s) will be refused",
            folder, len(tokenizer), vocab_size, _named(beyond),
        )  # fmt: skip
    return Target(
        name=str(path_or_hub_id),
        decoder=decoder,
        tokenizer=tokenizer,
        end_token_ids=_that_can_be_said(end_token_ids, beyond, vocab_size),
        sampling=sampling,
        fingerprint=fingerprint(folder),
        tokens_beyond=beyond,
    )


def _load_through_transformers(
    folder: Path,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    beside: Callable[[ModelConfig, torch.dtype, torch.device], int] | None = None,
) -> HFModel:
    from onlinespec.models.hf import load_hf, model_config

    shape = model_config(config, str(folder))
    need = estimate(tensor_shapes(folder), shape, dtype)
    if device.type != "cpu":  # transformers reads it into host memory first
        check_memory(need, torch.device("cpu"), folder)
    check_memory(replace(need, beside=beside(shape, dtype, device) if beside else 0), device, folder)
    return load_hf(folder, config, device, dtype)


def read_model(
    folder: Path, device: torch.device
) -> tuple[dict[str, Any], ModelConfig, dict[str, Tensor], torch.dtype] | None:
    """Reads a language model of a family that our decoder runs.

    Returns:
        (config.json, sizes, float32 weights, stored dtype); None for a model that only transformers runs.

    Raises:
        FileNotFoundError, ValueError: as `load_target`.
    """
    config = read_config(folder)
    shape = own_shape(config, folder)
    if shape is None:
        return None
    stored = checked_weights(read_weights(folder, device, dtype=None), config, shape, folder)
    weights = {name: t.float() for name, t in stored.items()}
    return read_json(folder / "config.json"), shape, weights, stored["model.embed_tokens.weight"].dtype


def read_hf_model(folder: Path, device: torch.device) -> HFModel:
    """Reads any other language model, in float32, through transformers.

    Raises:
        FileNotFoundError, ValueError: as `load_target`.
    """
    return _load_through_transformers(folder, read_config(folder), device, torch.float32)


def as_device(device: str | torch.device) -> torch.device:
    """Returns a torch device, after creating a tensor on it.

    Raises:
        ValueError: if torch does not know it, this machine has none, or its tensors hold no values (meta).
    """
    try:
        found = torch.device(device)
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest can be very long
        raise ValueError(
            f"device {str(device)!r} can't be used here ({reason}); choose --device cpu, or cuda or mps if there is one"
        ) from error
    return found


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns a torch dtype by its name. Raises ValueError for names that are not in `DTYPES`.

    >>> as_dtype("float8")
    Traceback (most recent call last):
    ...
    ValueError: dtype is 'float8'; choose one of float32, bfloat16, float16
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def read_config(folder: Path) -> PretrainedConfig:
    """Reads config.json with transformers, if the architecture is supported.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: naming what is wrong with the file, or the architecture if it is not supported.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    raw = read_json(path)
    architecture = architecture_of(raw, path)
    is_known = architecture in FAMILIES
    model_type = FAMILIES[architecture].model_type if is_known else str(raw.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder}: architecture {architecture} is not supported: transformers has no model_type {model_type!r}, "
            "and code in a checkpoint is not run"
        )
    _token_ids(raw.get("eos_token_id"), path)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # whatever transformers raises is a fault of the file
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{folder}: its weights are quantized ({method}), which is not supported; give the original")
    if not is_known:
        from onlinespec.models.hf import check_architecture

        check_architecture(config, architecture, folder)
    return config


def own_shape(config: PretrainedConfig, folder: Path) -> ModelConfig | None:
    """Returns the sizes of a model for our decoder; None if only transformers can run it.

    Raises:
        ValueError: naming what is wrong with the config.
    """
    if architecture_of(config.to_dict(), folder / "config.json") not in FAMILIES:
        return None
    try:
        return decoder_config(config, folder)
    except NotOurs as error:
        log.info("not for our decoder (%s); transformers runs it", error)
        return None


def path_of(folder: Path) -> str:
    """Returns which code runs a target directory: "own", "transformers", or "none" with the reason in brackets."""
    try:
        return "own" if own_shape(read_config(folder), folder) else "transformers"
    except ValueError as error:
        return f"none ({error})"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads a checkpoint's tokenizer. It may have more tokens than the model, or fewer.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it can't be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # transformers would make one up
        raise FileNotFoundError(
            f"{folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy these files of the model into it, too"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises is a fault of the files
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: the tokenizer can't be loaded ({reason}); is tokenizer.json there?") from error
    # We refuse texts beyond the context, so transformers' warning that they will fail is wrong here.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _tokens_beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[int, str]:
    """Returns the tokens that the model has no row for, by id: a pad token added without resizing the embedding."""
    return {i: token for token, i in sorted(tokenizer.get_vocab().items(), key=itemgetter(1)) if i >= vocab_size}


def _named(tokens: Mapping[int, str]) -> str:
    first = ", ".join(repr(token) for token in islice(tokens.values(), _MOST_NAMED))
    return first if len(tokens) <= _MOST_NAMED else f"{first}, ... {len(tokens)} in all"


def _that_can_be_said(end_token_ids: frozenset[int], beyond: Mapping[int, str], vocab_size: int) -> frozenset[int]:
    """Returns the end tokens that are in the model's vocabulary. Logs a warning if none of them is."""
    can_be_said = frozenset(i for i in end_token_ids if i < vocab_size)
    if end_token_ids and not can_be_said:
        first = min(end_token_ids)
        log.warning(
            "the model can't say its end token %d%s; only max_new_tokens and stop strings end an answer",
            first, f" ({beyond[first]!r})" if first in beyond else "",
        )  # fmt: skip
    return can_be_said


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Returns the content of generation_config.json; empty if there is no such file."""
    path = folder / _GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def _end_token_ids(config: PretrainedConfig, generation: Mapping[str, Any], folder: Path) -> frozenset[int]:
    ids = _token_ids(generation.get("eos_token_id"), folder / _GENERATION_CONFIG)
    ids = ids or _token_ids(config.eos_token_id, folder / "config.json")
    if not ids:
        log.warning("the checkpoint names no end token; only max_new_tokens and stop strings end an answer")
    return frozenset(ids)


def _token_ids(given: Any, path: Path) -> list[int]:
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(one) is not int for one in ids):  # also excludes bool, a subclass of int
        raise ValueError(f"{path}: eos_token_id is {given!r}; it must be a token's number or a list of numbers")
    return ids


def _default_sampling(generation: Mapping[str, Any], path: Path) -> SamplingParams:
    """Returns the sampling that a checkpoint recommends; greedy unless it sets `do_sample`.

    Values that are not used are not checked.
    """
    is_sampling = generation.get("do_sample") or False
    used = _SAMPLING if is_sampling else {"repetition_penalty": 1.0}
    values: dict[str, Any] = used | {name: generation[name] for name in used if generation.get(name) is not None}
    try:
        if not isinstance(is_sampling, bool):
            raise ValueError(f"do_sample is {is_sampling!r}; it must be true or false")
        for name, value in values.items():
            kinds = (int,) if name == "top_k" else (int, float)
            if type(value) not in kinds:
                raise ValueError(f"{name} is {value!r}; it must be a {'whole ' if name == 'top_k' else ''}number")
        return SamplingParams(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct it there, or remove it") from error
