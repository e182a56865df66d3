"""Targets that transformers computes: the same logits as its plain forward, and the same answers with drafts."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import END_TOKEN_ID, THROUGH_TRANSFORMERS, byte_tokenizer, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.ngram import Ngram
from onlinespec.engine.step import DecodeLoop
from onlinespec.experiments.ties import is_tie
from onlinespec.learners import make_learner
from onlinespec.learners.losses import cross_entropy
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.hf import HFModel, check_architecture
from onlinespec.models.loading import Target, load_target, read_model

WINDOW = 16  # of gemma2's and gemma3's sliding layers
PROMPT = [ord(c) for c in "a b c a b c a b"]
CLOSE = {"atol": 1e-4, "rtol": 0}
HAS_PLAIN_HEAD = {"gemma2": False, "phi": False}


IN_SHORT = ("gemma3", "phi")  # sliding windows; a head with a bias


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n in IN_SHORT else pytest.mark.full) for n in THROUGH_TRANSFORMERS],
)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def model(family):
    """transformers' own. Its fused attention leaves Gemma 2's capped scores out, so the plain one is the reference."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def target(folder) -> Target:
    return load_target(folder)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 288, (count,), generator=torch.Generator().manual_seed(seed))


def expected(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


# --- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [[60], pytest.param([1] * 60, marks=pytest.mark.full), [7, 1, 30, 22]],
    ids=["at once", "one by one", "in pieces"],
)
def test_logits_equal_transformers(target, model, pieces):
    ids, cache = ids_of(60), target.decoder.new_cache()
    cache.take(0, 60)
    logits = torch.cat([target.decoder.forward(part, [0], [len(part)], cache).logits_MV for part in ids.split(pieces)])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected(model, ids), **CLOSE)


@pytest.mark.parametrize("kept", [3, WINDOW - 1, 30])
def test_logits_equal_transformers_after_a_crop_across_the_window(target, model, kept):
    ids, other, cache = ids_of(60), ids_of(25, seed=1), target.decoder.new_cache()
    cache.take(0, 64)
    target.decoder.forward(torch.cat([ids[:kept], other]), [0], [kept + 25], cache)
    cache.crop(0, kept)
    logits = target.decoder.forward(ids[kept:], [0], [60 - kept], cache).logits_MV
    torch.testing.assert_close(logits, expected(model, ids)[kept:], **CLOSE)


def test_logits_equal_transformers_with_several_slots_in_one_call(target, model):
    texts, counts = [ids_of(n, seed=n) for n in (5, 33, 18)], [1, 8, 5]
    cache = target.decoder.new_cache()
    for slot, ids in enumerate(texts):
        cache.take(slot, len(ids))
        target.decoder.forward(ids[: -counts[slot]], [slot], [len(ids) - counts[slot]], cache, num_logits=[0])
    new = torch.cat([ids[-count:] for ids, count in zip(texts, counts, strict=True)])
    logits = target.decoder.forward(new, [0, 1, 2], counts, cache, num_logits=[1, 8, 2]).logits_MV
    wanted = torch.cat([expected(model, ids)[-count:] for ids, count in zip(texts, [1, 8, 2], strict=True)])
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert cache.lengths == {0: 5, 1: 33, 2: 18}


def test_states_equal_transformers_by_layer(target, model):
    ids, cache, decoder = ids_of(20), target.decoder.new_cache(), target.decoder
    cache.take(0, 20)
    num_layers = decoder.config.num_layers
    output = decoder.forward(ids, [0], [20], cache, aux_layer_ids=range(num_layers + 1))
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
    assert sorted(output.features.aux) == list(range(num_layers + 1))
    for layer in range(num_layers):  # its own last entry is after the norm
        torch.testing.assert_close(output.features.aux[layer], states[layer][0], **CLOSE)
    torch.testing.assert_close(output.features.final_SD, states[-1][0], **CLOSE)
    assert not torch.allclose(output.features.aux[num_layers], output.features.final_SD, atol=1e-2)
    assert torch.equal(decoder.head(output.features.final_SD), output.logits_MV)


def test_the_last_raw_state_is_what_the_final_norm_reads(tmp_path):
    target, model, ids = load_target(save_tiny(tmp_path, "olmo2")), tiny_model("olmo2"), ids_of(9)
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    expected(model, ids)
    cache = target.decoder.new_cache()
    cache.take(0, 9)
    aux = target.decoder.forward(ids, [0], [9], cache, aux_layer_ids=[2]).features.aux
    torch.testing.assert_close(aux[2], seen[0], **CLOSE)


def test_wrong_calls_are_refused_before_anything_is_written(target):
    decoder, cache = target.decoder, target.decoder.new_cache()
    cache.take(0, 8)
    with pytest.raises(ValueError, match=r"\[3\] do not add up to 5"):
        decoder.forward(ids_of(5), [0], [3], cache)
    with pytest.raises(ValueError, match=r"slot 0 holds 0 of 8 tokens; 9 more do not fit"):
        decoder.forward(ids_of(9), [0], [9], cache)
    with pytest.raises(ValueError, match=r"num_logits \[6\] must lie between 0 and the counts \[5\]"):
        decoder.forward(ids_of(5), [0], [5], cache, num_logits=[6])
    with pytest.raises(ValueError, match="name one twice"):
        decoder.forward(ids_of(5), [0, 0], [2, 3], cache)
    with pytest.raises(ValueError, match="slot 0 is taken"):
        cache.take(0, 8)
    with pytest.raises(ValueError, match="can't crop slot 0 to 1: it holds 0 tokens"):
        cache.crop(0, 1)
    assert cache.lengths == {0: 0}


def test_a_slot_that_was_released_starts_empty(target, model):
    cache = target.decoder.new_cache()
    for seed in (1, 0):
        cache.take(0, 12)
        logits = target.decoder.forward(ids_of(12, seed), [0], [12], cache).logits_MV
        cache.release(0)
    torch.testing.assert_close(logits, expected(model, ids_of(12)), **CLOSE)


def test_sizes_are_the_models(target):
    shape = target.decoder.config
    assert (shape.vocab_size, shape.max_positions) == (288, 1024)
    assert (shape.layer.hidden_size, shape.layer.num_heads, shape.layer.head_dim) == (64, 4, 16)
    assert shape.layer.intermediate_size in (160, 256)  # GPT-2 names none: four times the hidden size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_run(folder, dtype):
    target = load_target(folder, dtype=dtype)
    cache = target.decoder.new_cache()
    cache.take(0, 20)
    output = target.decoder.forward(ids_of(20), [0], [20], cache)
    assert output.features.final_SD.dtype == getattr(torch, dtype)
    assert output.logits_MV.dtype == torch.float32
    assert output.logits_MV.isfinite().all()


_SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": END_TOKEN_ID,
}
_WINDOWED = _SIZES | {"sliding_window": WINDOW}
_OLD = {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_PICTURES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MORE = {  # by what is peculiar to them
    "opt": _OLD | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128},  # layers deeper inside
    "bloom": _OLD | {"seq_length": 128},  # no positions, a bias on scores
    "mpt": {"vocab_size": 288, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    "falcon": _OLD,  # attention and products side by side
    "gptj": {"vocab_size": 288, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "cohere": _SIZES,  # a scale behind the head
    "granite": _SIZES | {"logits_scaling": 4.0},
    "mixtral": _SIZES | {"num_local_experts": 4},  # experts
    "gpt_oss": _WINDOWED | {"num_local_experts": 4},  # sinks, windows
    "deepseek_v3": {k: v for k, v in _SIZES.items() if "head" not in k}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | _LATENT
    | _EXPERTS,  # keys and values of other widths
    "llama4_text": _SIZES | {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": WINDOW},
    "starcoder2": _WINDOWED,
    "mistral": _WINDOWED,
    "phi3": _SIZES,  # fused products
    "gemma3": {"text_config": _WINDOWED, "vision_config": _PICTURES | {"image_size": 28, "patch_size": 14}},
}


@pytest.mark.parametrize("model_type", MORE)
def test_more_families_equal_transformers_in_pieces_and_after_a_crop(model_type):
    settings = MORE[model_type] | ({"mm_tokens_per_image": 4} if model_type == "gemma3" else {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).eval()
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) * (1.5 / parameter.shape[-1] ** 0.5))
    decoder, ids = HFModel(model), ids_of(60)
    cache = decoder.new_cache()
    cache.take(0, 60)
    first = [decoder.forward(part, [0], [len(part)], cache).logits_MV for part in ids[:30].split([20, 1, 9])]
    decoder.forward(ids_of(25, seed=1), [0], [25], cache)
    cache.crop(0, 30)
    last = decoder.forward(ids[30:], [0], [30], cache, aux_layer_ids=[0, decoder.config.num_layers])
    torch.testing.assert_close(torch.cat([*first, last.logits_MV]), expected(model, ids).float(), **CLOSE)
    assert sorted(last.features.aux) == [0, decoder.config.num_layers]


# --- the head ---------------------------------------------------------------------------------------------------------


def test_a_head_that_does_more_than_multiply_is_found_out(target, family):
    assert target.decoder.has_plain_head is HAS_PLAIN_HEAD.get(family, True)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    product = states @ target.decoder.head_VD.T
    assert torch.allclose(target.decoder.head(states), product, atol=1e-4) is target.decoder.has_plain_head


def test_a_scale_behind_the_head_is_drafted_with():
    sizes = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = CohereForCausalLM(CohereConfig(**sizes, num_attention_heads=4, logit_scale=0.25, pad_token_id=0))
    decoder = HFModel(model)
    states = torch.randn(5, 64)
    assert decoder.has_plain_head
    torch.testing.assert_close(decoder.head_VD, 0.25 * model.lm_head.weight)
    torch.testing.assert_close(decoder.head(states), states @ decoder.head_VD.T, **CLOSE)


# --- decoding ---------------------------------------------------------------------------------------------------------


def complete(target, drafter=None, learning=None, num_tokens=60, prompt=PROMPT):
    params = GenerationParams(num_tokens, ignore_end_tokens=True)
    return DecodeLoop(target, drafter, learning).complete(prompt, params)


def assert_same(target, answer, plain):
    assert answer.output_ids == plain.output_ids or is_tie(target, answer, plain)


def test_plain_decoding_equals_transformers_generate(target, model):
    plain = complete(target)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=60, min_new_tokens=60, do_sample=False, eos_token_id=None
        )
    assert plain.output_ids == ids[0, len(PROMPT) :].tolist()


def test_greedy_with_ngram_equals_plain_decoding(target):
    answer = complete(target, Ngram.fresh(target))
    assert_same(target, answer, complete(target))
    assert answer.stats.drafted > 0


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("gpt2", "gemma3") else pytest.param(name, marks=pytest.mark.full)
        for name in THROUGH_TRANSFORMERS
    ],
    indirect=True,
    scope="module",
)
def test_greedy_with_eagle_that_learns_equals_plain_decoding_and_the_loss_falls(target):
    drafter = Eagle.fresh(target)
    before = drafter.weights.params
    config = LearnConfig(min_interval=4, max_interval=4, budget=math.inf)
    learning = InlineLearning(drafter, make_learner("online_gradient", 5e-3, "preconditioned"), config)
    seen = []
    learning.replay.offer, kept = lambda feedback: (seen.extend(feedback), kept(feedback)), learning.replay.offer
    plain = complete(target, num_tokens=120)
    for _ in range(2):
        assert_same(target, complete(target, drafter, learning, num_tokens=120), plain)
    assert learning.num_rounds >= 4
    assert not learning.is_frozen
    batch = drafter.batch(seen[:10])
    first, last = drafter.losses([before, drafter.weights.params], batch, cross_entropy)
    assert last.total < first.total


def test_eagles_labels_are_the_targets_own_rows(target):
    drafter, seen = Eagle.fresh(target), []
    loop = DecodeLoop(target, drafter)
    loop.learning = type("Keeps", (), {"diagnostic_seconds": 0.0, "offer": lambda _, feedback: seen.extend(feedback)})()
    loop.complete(PROMPT, GenerationParams(12, ignore_end_tokens=True))
    batch = drafter.batch(seen)
    states = torch.cat([span.target_states_ND for span in batch])
    assert batch.tokens
    labels = drafter._target_logits(batch.tokens, states)
    torch.testing.assert_close(labels, target.decoder.head(states)[:, batch.tokens.draft_to_target_S], **CLOSE)


def test_sampled_requests_are_served_too(target):
    params = GenerationParams(20, sampling=SamplingParams(temperature=1.0), ignore_end_tokens=True)
    request = DecodeLoop(target, Eagle.fresh(target)).complete(PROMPT, params)
    assert len(request.output_ids) == 20


def test_a_prompt_longer_than_the_context_is_refused(target):
    with pytest.raises(ValueError, match="the target's context 1024"):
        complete(target, prompt=[5] * 1024)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_the_path_is_told_and_logged(folder, caplog):
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        target = load_target(folder)
    assert target.path == "transformers"
    assert "runs through transformers" in caplog.text


def set_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights, max(weights, key=lambda name: (".1." in name and "weight" in name, weights[name].numel())))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "missing": (lambda weights, name: weights.pop(name), "1 tensors are missing, by what config.json describes: .*1"),
    "extra": (lambda weights, _: weights.update(more=torch.zeros(2)), "1 tensors are not part of the model, .*: more"),
    "shape": (lambda weights, name: weights.update({name: torch.zeros(3, 5)}), "1 tensors are misshapen"),
    "NaN": (lambda weights, name: weights[name].view(-1)[:1].fill_(math.nan), "holds values that are not finite"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_tensor_is_accounted_for(copied, kind, capfd):
    change, words = BROKEN[kind]
    edit_weights(copied, change)
    with pytest.raises(ValueError, match=words) as caught:
        load_target(copied)
    assert str(copied) in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"], indirect=True)
def test_constants_and_names_of_older_versions_are_no_strangers(family, copied, target):
    """As the first checkpoints of GPT-2 and of GPT-NeoX were published."""
    path, mask = copied / "model.safetensors", torch.ones(1, 1, 8, 8).tril()
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    layer = "h.0.attn" if family == "gpt2" else "gpt_neox.layers.0.attention"
    weights |= {f"{layer}.bias": mask, f"{layer}.masked_bias": torch.tensor(-1e4)}
    if family == "gpt_neox":
        weights[f"{layer}.rotary_emb.inv_freq"] = torch.ones(2)
        assert "embed_out.weight" in weights
    save_file(weights, path, metadata={"format": "pt"})
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_target(copied).decoder.head(states), target.decoder.head(states))


def test_files_cut_short_are_named(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read .* cut short"):
        load_target(copied)


def test_quantized_weights_are_refused(copied):
    set_config(copied, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantized \(gptq\)"):
        load_target(copied)


def test_files_that_are_no_safetensors_are_not_read(copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_target(copied)


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


REFUSED = {
    "MambaForCausalLM": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=288, hidden_size=32, num_hidden_layers=2)),
        "keeps a state instead of keys and values, which can't go back when a draft is refused",
    ),
    "T5ForConditionalGeneration": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=288, d_model=32, d_kv=8, d_ff=64, num_layers=2)),
        "it has an encoder",
    ),
    "OpenAIGPTLMHeadModel": (  # of 2018: no cache at all, found out by trying
        lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=288, n_embd=32, n_layer=2, n_head=2)),
        "its cache does not forget drafts that were refused",
    ),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_can_not_go_back_is_refused_by_name(tmp_path, architecture):
    make, words = REFUSED[architecture]
    with pytest.raises(ValueError, match=rf"{architecture} is not supported: .*{words}"):
        load_target(saved(make(), tmp_path))


@pytest.mark.parametrize("model_type", ["rwkv", "mamba2", "jamba", "qwen3_next", "recurrent_gemma", "lfm2"])
def test_states_that_are_no_keys_and_values_are_refused_by_the_config_alone(tmp_path, model_type):
    mixed = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}  # as lfm2's published configs are
    config = CONFIG_MAPPING[model_type](**(mixed if model_type == "lfm2" else {}))
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    with pytest.raises(ValueError, match=f"architecture {architecture} is not supported: it keeps a state instead"):
        check_architecture(config, architecture, tmp_path)


def test_a_config_without_a_context_is_refused():
    model = tiny_model("gpt2")
    model.config.n_positions = 0
    with pytest.raises(ValueError, match="names no context length; add max_position_embeddings"):
        HFModel(model)


FALLS_THROUGH = {
    "activation": ("llama", {"hidden_act": "gelu"}),
    "rotary scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
                             "original_max_position_embeddings": 64,
                             "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    ),
    "sliding windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLS_THROUGH)
def test_what_our_decoder_lacks_of_a_known_family_runs_through_transformers(tmp_path, name, caplog):
    family, settings = FALLS_THROUGH[name]
    with caplog.at_level(logging.INFO, logger="onlinespec"):
        target = load_target(save_tiny(tmp_path, family, **settings))
    if target.path == "own":
        pytest.skip("our decoder has learned it")
    assert "is not supported" in caplog.text
    ids, cache = ids_of(50), target.decoder.new_cache()
    cache.take(0, 50)
    logits = target.decoder.forward(ids, [0], [50], cache).logits_MV
    torch.testing.assert_close(logits, expected(tiny_model(family, **settings), ids), **CLOSE)
    assert END_TOKEN_ID in target.end_token_ids


def test_a_directory_that_only_transformers_runs_is_no_model_of_our_decoder(folder):
    assert read_model(folder, torch.device("cpu")) is None
