"""Checkpoints in, and what is said about broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import CHAT_TEMPLATE, END_TOKEN_ID, add_tokens, save_tiny
from safetensors.torch import load_file, save_file
from transformers import tokenization_utils_base

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.engine.request import UnknownToken
from onlinespec.engine.step import DecodeLoop
from onlinespec.models.checkpoint import fingerprint, read_weights
from onlinespec.models.loading import as_device, load_target


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target"), chat_template=CHAT_TEMPLATE)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def logits(folder: Path) -> torch.Tensor:
    decoder = load_target(folder).decoder
    cache = decoder.new_cache()
    cache.take(0, 8)
    return decoder.forward(torch.arange(8), [0], [8], cache).logits_MV


def test_sharded_and_single_files_give_the_same_model(original, tmp_path):
    sharded = save_tiny(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(logits(sharded), logits(original))


def test_weights_can_be_read_as_they_are_stored(folder):
    edit_weights(folder, lambda weights: weights.update({n: t.bfloat16() for n, t in weights.items() if "norm" in n}))
    weights = read_weights(folder, torch.device("cpu"), None)
    assert weights["model.norm.weight"].dtype == torch.bfloat16
    assert weights["lm_head.weight"].dtype == torch.float32


def test_a_tied_checkpoint_with_a_head_of_its_own_uses_it_as_transformers_does(tmp_path):
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    before = logits(folder)
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}))
    torch.testing.assert_close(logits(folder), 2 * before)
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"][:3].clone()}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(3, 64\), config\.json says \(288, 64\)"):
        load_target(folder)


def test_a_rotary_base_in_the_older_form_is_read(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 5e5}))
    assert load_target(folder).decoder.config.layer.rope.theta == 5e5


def test_code_in_a_checkpoint_is_not_run_nor_asked_about(folder, capfd):
    auto_map = {"AutoTokenizer": ["theirs.Theirs", None]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Theirs", auto_map=auto_map)
    (folder / "theirs.py").write_text("from pathlib import Path\nPath(__file__).with_name('it-ran').touch()\n")
    with pytest.raises(ValueError, match="the tokenizer can't be loaded"):
        load_target(folder)
    assert "[y/N]" not in capfd.readouterr().out
    assert not (folder / "it-ran").exists()


def test_prompts_go_through_the_chat_template_unless_raw(original):
    target = load_target(original)
    assert target.tokenizer.decode(target.encode("hi")) == "<|user|>hi<|assistant|>"
    assert target.tokenizer.decode(target.encode("hi", is_chat=False)) == "hi"


def test_without_a_chat_template_a_prompt_stands_as_it_is(tmp_path):
    target = load_target(save_tiny(tmp_path))
    assert target.tokenizer.decode(target.encode("hi")) == "hi"


def test_generation_config_brings_end_tokens_and_sampling(folder):
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [END_TOKEN_ID, 3]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    target = load_target(folder)
    assert target.end_token_ids == {END_TOKEN_ID, 3}
    assert target.sampling == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)


def test_sampling_that_is_recommended_without_numbers_is_transformers_own(folder):
    edit_json(folder / "generation_config.json", do_sample=True, temperature=None)
    assert load_target(folder).sampling == SamplingParams(temperature=1.0, top_k=50)


def test_what_a_checkpoint_says_of_sampling_is_not_looked_at_where_it_does_not_sample(folder):
    edit_json(folder / "generation_config.json", do_sample=False, temperature=-1)
    assert load_target(folder).sampling == SamplingParams()


def test_without_generation_config_the_end_token_is_the_config_s_and_sampling_greedy(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    target = load_target(folder)
    assert target.end_token_ids == {END_TOKEN_ID}
    assert target.sampling == SamplingParams()


def test_the_fingerprint_follows_weights_and_tokenizer(original, folder):
    before = fingerprint(original)
    assert fingerprint(folder) == before
    edit_weights(folder, lambda weights: weights["model.norm.weight"].add_(0.5))
    changed = fingerprint(folder)
    assert changed != before
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert fingerprint(folder) not in (before, changed)


def test_a_tokenizer_does_not_say_that_a_long_text_would_be_run(folder, monkeypatch):
    warnings = []
    target = load_target(folder)
    target.tokenizer.model_max_length = 4
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", warnings.append)
    assert len(target.encode("a b c d e f g h", is_chat=False)) > 4
    assert not warnings


# A tokenizer with more tokens than the model


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_tokenizer_with_tokens_that_the_model_lacks_is_loaded_and_it_is_said_once(tmp_path, family, caplog):
    folder = add_tokens(save_tiny(tmp_path, family, vocab_size=259), "<pad>", "<extra>")
    target = load_target(folder)
    assert target.tokens_beyond == {259: "<pad>", 260: "<extra>"}
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        f"{folder}: the tokenizer has 261 tokens, the model 259; prompts with one of the others ('<pad>', '<extra>') "
        "will be refused"
    ]


def test_a_tokenizer_class_that_adds_a_token_of_its_own_does_not_keep_a_checkpoint_from_being_loaded(tmp_path):
    target = load_target(save_tiny(tmp_path, "qwen2", vocab_size=259))
    assert target.tokens_beyond == {259: "<|endoftext|>"}
    answer = DecodeLoop(target).complete(target.encode("hi"), GenerationParams(8, ignore_end_tokens=True))
    assert len(answer.output_ids) == 8


def test_many_tokens_that_the_model_lacks_are_counted_and_not_all_named(tmp_path, caplog):
    load_target(add_tokens(save_tiny(tmp_path, vocab_size=259), *(f"<{i}>" for i in range(30))))
    assert "the others ('<0>', '<1>', '<2>', ... 30 in all) will be refused" in caplog.text


def test_only_a_prompt_that_uses_such_a_token_is_refused(tmp_path):
    target = load_target(add_tokens(save_tiny(tmp_path, vocab_size=259), "<pad>"))
    loop = DecodeLoop(target)
    message = r"the prompt has token 259 \('<pad>'\), outside the model's vocabulary of 259; leave it out"
    with pytest.raises(UnknownToken, match=message):
        loop.open(target.encode("hi <pad>"), GenerationParams())
    with pytest.raises(UnknownToken, match=r"the prompt has token 261, outside the model's vocabulary of 259"):
        loop.open([5, 261], GenerationParams())
    assert loop.complete(target.encode("hi"), GenerationParams(4)).output_ids


def test_a_tokenizer_whose_ids_have_gaps_is_judged_by_its_ids(tmp_path):
    folder = save_tiny(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["A"] = 300  # of as many tokens as before, fewer than the model's 288
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    target = load_target(folder)
    assert target.tokens_beyond == {300: "A"}
    with pytest.raises(UnknownToken, match=r"token 300 \('A'\)"):
        DecodeLoop(target).open(target.encode("A"), GenerationParams())


def test_an_end_token_that_the_model_can_not_say_ends_nothing_and_is_named(tmp_path, caplog):
    folder = add_tokens(save_tiny(tmp_path, vocab_size=259), "<stop>")
    edit_json(folder / "generation_config.json", eos_token_id=[END_TOKEN_ID, 259])
    assert load_target(folder).end_token_ids == {END_TOKEN_ID}
    assert "end token 259" not in caplog.text, "another one ends answers"
    edit_json(folder / "generation_config.json", eos_token_id=259)
    assert load_target(folder).end_token_ids == frozenset()
    assert "the model can't say its end token 259 ('<stop>'); only max_new_tokens and stop strings end" in caplog.text


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **fields)


def generation(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "generation_config.json", **fields)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight") is None)


def add_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.layers.1.extra.weight": torch.zeros(2)}))


def add_nan(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights["model.layers.0.mlp.up_proj.weight"][0].fill_(float("nan")))


BROKEN = {
    "no config": (remove("config.json"), FileNotFoundError, r"config\.json is missing"),
    "config no JSON": (rewrite("config.json", "{"), ValueError, r"config\.json is not valid JSON"),
    "config a list": (rewrite("config.json", "[]"), ValueError, "holds a list, expected an object"),
    "architecture": (
        config(architectures=["GPT2LMHeadModel"]),
        ValueError,
        "GPT2LMHeadModel is not supported: the causal language model .* for model_type 'llama' is LlamaForCausalLM",
    ),
    "unknown architecture": (
        config(architectures=["TheirForCausalLM"], model_type="their"),
        ValueError,
        "TheirForCausalLM is not supported: transformers has no model_type 'their', and code in a checkpoint is not",
    ),
    "architecture as text": (
        config(architectures="LlamaForCausalLM"),
        ValueError,
        r"/config\.json: architectures is 'LlamaForCausalLM'; it must be a list of names",
    ),
    "architecture a number": (config(architectures=[3]), ValueError, r"/config\.json: architectures is \[3\]; .* list"),
    "no architecture": (config(architectures=None), ValueError, r"\(none\) is not supported"),
    "model_type a list": (
        config(architectures=["TheirForCausalLM"], model_type=["their"]),
        ValueError,
        "TheirForCausalLM is not supported: transformers has no model_type",
    ),
    "rope scaling": (
        config(rope_parameters={"rope_type": "spiral", "factor": 2.0, "rope_theta": 1e4}),
        ValueError,
        "rotary scaling 'spiral' is not supported; supported are default, linear, dynamic, yarn, longrope, llama3",
    ),
    "rope scaling without its factor": (
        config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
        ValueError,
        r"/config\.json: .*Missing required keys .*'llama3'.*factor",
    ),
    "no weights": (remove("model.safetensors"), FileNotFoundError, "neither model.safetensors nor"),
    "cut short": (cut, ValueError, r"model\.safetensors can't be read .* cut short"),
    "tensor missing": (drop_tensor, ValueError, r"1 tensors are missing, the first is model\.layers\.1\.mlp\.up_proj"),
    "tensor too many": (add_tensor, ValueError, r"not part of the model.*layers\.1\.extra"),
    "shape": (config(intermediate_size=100), ValueError, r"has shape \(160, 64\), config.json says \(100, 64\)"),
    "sizes as text": (config(hidden_size="64"), ValueError, r"/config\.json: Validation error.* int, got str.*'64'\)$"),
    "no size": (config(num_key_value_heads=0), ValueError, r"/config\.json: num_key_value_heads is 0; .* at least 1"),
    "uneven heads": (config(num_key_value_heads=3), ValueError, r"/config\.json: 4 heads can't share 3 key-value"),
    "neither": (config(hidden_act="warp"), ValueError, r"transformers can't load it \(.*warp"),
    "NaN": (add_nan, ValueError, r"layers\.0\.mlp\.up_proj\.weight holds values that are not finite"),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ValueError, r"quantized \(gptq\)"),
    "end token as text": (config(eos_token_id="</s>"), ValueError, r"/config\.json: eos_token_id is '</s>'; .*number"),
    "end token as text in generation": (
        generation(eos_token_id=[256, "</s>"]),
        ValueError,
        r"/generation_config\.json: eos_token_id is \[256, '</s>'\]; it must be a token's number or a list of numbers",
    ),
    "end token a fraction": (
        generation(eos_token_id=2.5),
        ValueError,
        r"/generation_config\.json: eos_token_id is 2\.5",
    ),
    "temperature": (
        generation(do_sample=True, temperature=-1),
        ValueError,
        r"/generation_config\.json: temperature is -1; it must be 0 .* or a positive number; correct it there",
    ),
    "temperature as text": (
        generation(do_sample=True, temperature="0.5"),
        ValueError,
        r"/generation_config\.json: temperature is '0\.5'; it must be a number; correct it",
    ),
    "top_p": (generation(do_sample=True, top_p=3), ValueError, r"/generation_config\.json: top_p is 3; .* at most 1"),
    "top_k": (generation(do_sample=True, top_k=2.5), ValueError, r"/generation_config\.json: top_k is 2\.5; .* whole"),
    "do_sample": (
        generation(do_sample="false"),
        ValueError,
        r"/generation_config\.json: do_sample is 'false'; .* true",
    ),
    "no tokenizer": (remove("tokenizer.json"), FileNotFoundError, "holds no tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_with_its_reason(folder, name):
    damage, error, message = BROKEN[name]
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_target(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, [], {"lm_head.weight": 1}], ids=str)
def test_an_index_that_names_no_files_is_refused(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json: its weight_map must name a file for every tensor"):
        load_target(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = save_tiny(tmp_path, max_shard_size="100KB")
    missing = min(folder.glob("*.safetensors"))
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=missing.name):
        load_target(folder)


SLIDING = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("qwen2", SLIDING | {"sliding_window": 0}, "sliding_window is 0 .*at least 1"),
        ("qwen2", SLIDING | {"sliding_window": None}, "sliding_window is None .*at least 1"),
        ("qwen3", SLIDING | {"use_sliding_window": False}, "sliding_window is None .*at least 1"),
        ("qwen3", SLIDING | {"layer_types": ["sliding_attention"] * 3}, r"3.*num_hidden_layers|num_hidden_layers.*3"),
        ("mistral", {"sliding_window": -3}, "sliding_window is -3 .*at least 1"),
        ("mistral", {"sliding_window": "all"}, "sliding_window.*'all'"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.2}},
            "3 of 16 elements of a head turn; it must be an even number",
        ),
        (
            "llama",
            {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 5}},
            "'longrope' can't be computed",
        ),
        (
            "phi3",
            {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [0.0] * 8}},
            "'longrope' can't be computed from .*not finite",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "'linear' can't be computed from .*gives 4 frequencies; 16 elements of a head turn",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
            "'linear' can't be computed|factor",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_positions_that_make_no_sense_are_refused_with_the_file_and_the_value(tmp_path, family, fields, message):
    folder = save_tiny(tmp_path, family)
    edit_json(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=rf"/config\.json: .*({message})"):
        load_target(folder)


def test_a_wrong_path_is_named(original, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        load_target(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        load_target(original / "config.json")
    with pytest.raises(ValueError, match="the name is empty; give a directory"):
        load_target("")
    with pytest.raises(FileNotFoundError, match="'someone/no-such-model' is neither a directory here nor"):
        load_target("someone/no-such-model")


def test_unknown_dtypes_and_devices_are_named(original):
    with pytest.raises(ValueError, match="dtype is 'float8'; choose one of float32"):
        load_target(original, dtype="float8")
    with pytest.raises(ValueError, match="device 'warp' can't be used here"):
        load_target(original, device="warp")
    with pytest.raises(ValueError, match=r"device 'meta' can't be used here .*choose --device cpu, or cuda or mps"):
        load_target(original, device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said_so():
    with pytest.raises(ValueError, match="device 'cuda' can't be used here"):
        as_device("cuda")
