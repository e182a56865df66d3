"""From a Hugging Face directory or Hub id to a target that decodes: config, weights, tokenizer, chat template.

Only safetensors are read, no code from a checkpoint is run, and every tensor of the model must be accounted for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onlinespec import demo
from onlinespec.config import SamplingParams
from onlinespec.models.decoder import Decoder, DecoderConfig
from onlinespec.models.layer import LayerConfig
from onlinespec.models.linear import MakeLinear

if TYPE_CHECKING:  # transformers and the Hub's client take seconds to import, so each is, where it is first needed
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
_GENERATION_CONFIG = "generation_config.json"
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}  # as transformers'
_FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """The model whose output is preserved, with what turns text into its tokens and back."""

    name: str
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: frozenset[int]
    sampling: SamplingParams  # what the checkpoint itself recommends; greedy where it says nothing
    fingerprint: str  # of weights, config and tokenizer

    def encode(self, text: str, is_chat: bool = True) -> list[int]:
        """Token ids of a prompt: as a user's turn where the checkpoint has a chat template, else as it stands."""
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
) -> Target:
    """Loads a target, ready to decode.

    Args:
        path_or_hub_id: A directory, a Hub id, or `demo` for the pair that ships with the package.

    Raises:
        FileNotFoundError: if there is no such directory or Hub id, or a file of it is missing.
        ValueError: if the checkpoint is of a kind that is not supported, broken, or incomplete.
    """
    folder = find_folder(path_or_hub_id)
    device, dtype = as_device(device), as_dtype(dtype)
    config = read_config(folder)
    shape = decoder_config(config, folder)
    generation = read_generation_config(folder)
    end_token_ids = _end_token_ids(config, generation, folder)
    sampling = _default_sampling(generation, folder / _GENERATION_CONFIG)
    weights = read_weights(folder, device, dtype)
    _check_weights(weights, config, shape, folder)
    decoder = Decoder(shape, weights, make_linear)
    return Target(
        name=str(path_or_hub_id),
        decoder=decoder,
        tokenizer=_read_tokenizer(folder, shape),
        end_token_ids=end_token_ids,
        sampling=sampling,
        fingerprint=fingerprint(folder),
    )


def as_device(device: str | torch.device) -> torch.device:
    """A usable torch device.

    Raises:
        ValueError: if torch does not know it, has none here, or computes no numbers on it (meta).
    """
    try:
        found = torch.device(device)
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest can be pages
        raise ValueError(
            f"device {str(device)!r} can't be used here ({reason}); choose --device cpu, or cuda or mps if there is one"
        ) from error
    return found


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype by its name.

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


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint, downloaded from the Hub if it is none here."""
    if str(path_or_hub_id) == "demo":
        return demo.TARGET
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
    """A JSON object from a file.

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


def read_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's config.json as transformers reads it, if its architecture is one we run."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    raw = read_json(path)
    architecture = architecture_of(raw, path)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{folder}: architecture {architecture} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    _token_ids(raw.get("eos_token_id"), path)
    try:
        return CONFIG_MAPPING[architecture.removesuffix("ForCausalLM").lower()].from_dict(raw)
    except Exception as error:  # whatever transformers finds wrong with the file, the user should read it as such
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def architecture_of(config: Mapping[str, Any], path: Path) -> str:
    """The first of a config.json's architectures, "(none)" where it names none.

    Raises:
        ValueError: naming the file, if they are not a list of names.
    """
    names = config.get("architectures") or ["(none)"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f'{path}: architectures is {names!r}; it must be a list of names: ["{ARCHITECTURES[0]}"]')
    return names[0]


def decoder_config(config: PretrainedConfig, folder: Path) -> DecoderConfig:
    """The sizes our forward needs, refusing by name what it does not compute."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: rotary scaling {rope['rope_type']!r} is not supported; only 'default' is")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{folder}: its weights are quantized ({method}), which is not supported; give the original")
    has_window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if has_window or getattr(config, "use_sliding_window", False):
        raise ValueError(f"{folder}: sliding-window attention is not supported")
    if config.hidden_act != "silu":
        raise ValueError(f"{folder}: activation {config.hidden_act!r} is not supported; only 'silu' is")
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise ValueError(f"{folder / 'config.json'}: {name} is {getattr(config, name)}; it must be at least 1")
    try:
        layer = LayerConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
        )
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return DecoderConfig(layer, config.num_hidden_layers, config.vocab_size, config.max_position_embeddings)


def read_weights(folder: Path, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of a single or sharded safetensors checkpoint, in one dtype, or as stored if that is None."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as shard:
                weights.update({name: shard.get_tensor(name).to(dtype=dtype) for name in shard.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} can't be read ({error}); it may be cut short: copy or download it again"
            ) from error
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory.

    Raises:
        FileNotFoundError: if there are none, or the index names one that is missing.
        ValueError: if there is an index that is not one.
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


def _layer_shapes(config: PretrainedConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
    d, f, e = layer.hidden_size, layer.intermediate_size, layer.head_dim
    q, kv = layer.num_heads * e, layer.num_kv_heads * e
    is_qwen2, is_qwen3 = config.model_type == "qwen2", config.model_type == "qwen3"
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    has_attention_bias = is_qwen2 or getattr(config, "attention_bias", False)
    if has_attention_bias:
        shapes |= {f"self_attn.{n}_proj.bias": (q if n == "q" else kv,) for n in "qkv"}
    if has_attention_bias and not is_qwen2:
        shapes["self_attn.o_proj.bias"] = (d,)
    if getattr(config, "mlp_bias", False):
        shapes |= {f"mlp.{n}_proj.bias": (d if n == "down" else f,) for n in ("gate", "up", "down")}
    if is_qwen3:
        shapes |= {f"self_attn.{n}_norm.weight": (e,) for n in "qk"}
    return shapes


def _check_weights(weights: Mapping[str, Tensor], config: PretrainedConfig, shape: DecoderConfig, folder: Path) -> None:
    layer_shapes = _layer_shapes(config, shape.layer)
    expected: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}": dims for i in range(shape.num_layers) for name, dims in layer_shapes.items()
    }
    hidden = shape.layer.hidden_size
    expected |= {"model.embed_tokens.weight": (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings or "lm_head.weight" in weights:
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    check_tensors(weights, expected, folder)


def check_tensors(
    weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path, may_have: tuple[str, ...] = ()
) -> None:
    """Accounts for every tensor of a checkpoint by name, shape and finiteness.

    Raises:
        ValueError: naming what is missing, unexpected, misshapen or not finite.
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


def _read_tokenizer(folder: Path, shape: DecoderConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizer files fail in many ways; all of them are the checkpoint's
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: the tokenizer can't be loaded ({reason}); is tokenizer.json there?") from error
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {shape.vocab_size}")
    return tokenizer


def read_generation_config(folder: Path) -> dict[str, Any]:
    """What generation_config.json says; nothing where there is none."""
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
    if any(type(one) is not int for one in ids):  # a bool is an int, too
        raise ValueError(f"{path}: eos_token_id is {given!r}; it must be a token's number or a list of numbers")
    return ids


def _default_sampling(generation: Mapping[str, Any], path: Path) -> SamplingParams:
    """What a checkpoint recommends; greedy unless it says `do_sample`. What is not used is not checked."""
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


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits that change with the model or its tokenizer.

    Covers config.json, tokenizer.json, and of every weight file its size, first, middle and last MiB: enough to
    tell checkpoints apart without reading tens of gigabytes.
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
