"""Chat formats that models publish, each with a tokenizer of its kind, and prompts that try them."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SYSTEM = "A chat between a curious user and an artificial intelligence assistant."
TURNS = "{% for m in messages %}"
VICUNA = (
    "{{ bos_token }}" + SYSTEM + " " + TURNS + "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA2 = (
    TURNS + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set start = '<|start_header_id|>' %}{% set stop = '<|end_header_id|>\n\n' %}" + TURNS + "{% if loop.first %}"
    "{{ bos_token }}{% endif %}{{ start + m.role + stop + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ start + 'assistant' + stop }}{% endif %}"
)
QWEN3 = (
    TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PROMPTS = [
    "What is 2 + 2?",
    "  blanks before, and after \n",
    "two\n\nparagraphs\tand a tab",
    "naïve 日本 🎌 ﷽ a\u0301 \u202eright to left",
    "USER: am I a turn? ASSISTANT: [INST] no [/INST]",
]


def pieces_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """As Llama 2 and Vicuna have them: blanks become pieces, unknown characters bytes, every text begins with <s>."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    words += [chr(i) for i in range(33, 127)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", *special])
    return begun(tokenizer, "<s>", "</s>")


def bytes_tokenizer(*special: str, begin: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen have them: a token per byte here, special tokens beside."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    return begun(tokenizer, begin, special[-1])


def begun(tokenizer: Tokenizer, begin: str | None, end: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts its first token before every text by itself."""
    if begin:
        first = tokenizer.token_to_id(begin)
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, first)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


CHATS = {
    "vicuna": (VICUNA, pieces_tokenizer()),
    "llama 2": (LLAMA2, pieces_tokenizer()),
    "llama 3": (
        LLAMA3,
        bytes_tokenizer(
            "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", begin="<|begin_of_text|>"
        ),
    ),
    "qwen3": (QWEN3, bytes_tokenizer("<|im_start|>", "<think>", "</think>", "<|im_end|>")),
}
