"""Tiny random checkpoints as transformers would publish them: config, safetensors, tokenizer.

Every parameter is random, norms and biases too: a forward that drops or misplaces one of them gives other logits.
The tokenizer has one token per byte and a few special ones, so any text can be encoded and any ids decoded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_WINDOWS = {  # narrower than the texts of the tests, and mixed with layers that see everything
    "num_hidden_layers": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 16,
}
THROUGH_TRANSFORMERS: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel], dict[str, object]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"tie_word_embeddings": True}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        _WINDOWS | {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, _WINDOWS),
    "phi": (PhiConfig, PhiForCausalLM, {}),  # its head has a bias
}
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>")
END_TOKEN_ID = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(family: str = "llama", **overrides: object) -> PretrainedConfig:
    """Two layers, four heads that share two key-value heads, a vocabulary larger than the tokenizer's."""
    sizes = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_TOKEN_ID,
        "pad_token_id": None,
    }
    if family in FAMILIES:
        return FAMILIES[family][0](**(sizes | overrides))
    config_class, _, settings = THROUGH_TRANSFORMERS[family]
    names = {config_class.attribute_map.get(name, name): value for name, value in sizes.items()}
    return config_class(**(names | settings | overrides))


def tiny_model(family: str = "llama", *, seed: int = 0, **config_overrides: object) -> PreTrainedModel:
    """A random float32 model whose logits have a standard deviation of a few units."""
    with torch.random.fork_rng():
        table = FAMILIES if family in FAMILIES else THROUGH_TRANSFORMERS
        model = table[family][1](tiny_config(family, **config_overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 1:  # of a norm
                parameter.copy_(1 + 0.3 * noise)
            else:
                scale = 2 if "emb" in name or "head" in name or "wte" in name else 1
                parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)
    return model.eval()


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: ids 0..255 are bytes, the special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0])
    fast.chat_template = chat_template
    return fast


def save_tiny(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    chat_template: str | None = None,
    max_shard_size: str = "5GB",
    **config_overrides: object,
) -> Path:
    """Writes a tiny random checkpoint of a family of either table and gives its folder back."""
    model = tiny_model(family, seed=seed, **config_overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return Path(folder)


def add_tokens(folder: Path, *names: str) -> Path:
    """Adds special tokens to a checkpoint's tokenizer alone, as fine-tuning does that forgets the model's embedding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(names), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder
