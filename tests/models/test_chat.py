"""A prompt as a user's turn has the token ids that transformers gives it, in the chat formats that models publish.

The templates (`chats.py`) are written after the published formats: what each puts around a turn, where it begins a
text, and whether it asks the tokenizer for that beginning or spells it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import rigs
from chats import CHATS, PROMPTS

BEGINNINGS = {"vicuna": "<s>", "llama 2": "<s>", "llama 3": "<|begin_of_text|>", "qwen3": None}
ENDINGS = {
    "vicuna": "ASSISTANT:",
    "llama 2": "[/INST]",
    "llama 3": "assistant<|end_header_id|>",
    "qwen3": "<|im_start|>assistant",
}


@pytest.fixture(params=CHATS)
def name(request):
    return request.param


@pytest.fixture
def target(name):
    template, tokenizer = CHATS[name]
    tokenizer.chat_template = template
    return replace(rigs.random_target(vocab=512), tokenizer=tokenizer)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_turn_has_the_ids_that_transformers_gives_it(target, prompt):
    turns = [{"role": "user", "content": prompt}]
    expected = target.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert target.encode(prompt) == expected


def test_a_text_begins_once(name, target):
    ids = target.encode("hi")
    begin = BEGINNINGS[name]
    if begin:
        assert ids[0] == target.tokenizer.bos_token_id
        assert ids.count(target.tokenizer.bos_token_id) == 1
        assert target.encode("hi", is_chat=False)[0] == target.tokenizer.bos_token_id, "without a template, too"
    else:
        assert ids[0] == target.tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_turn_comes_back_as_the_template_lays_it_out(name, target, prompt):
    text = target.tokenizer.decode(target.encode(prompt), skip_special_tokens=False)
    assert (prompt.strip() if name.startswith("llama") else prompt) in text
    assert text.rstrip().endswith(ENDINGS[name])
