"""Positions in this file are those of tokens in a request's text, counted from 0."""

import json
import math
import re
import shutil
from dataclasses import replace

import peft
import pytest
import rigs
import torch
from checkpoints import add_tokens, save_tiny, tiny_model
from rigs import hidden_states, other_weights, run_together
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DrafterWeights, Features, Feedback, RequestInfo, Trace
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.settings import Tuning
from onlinespec.drafters.small_lm.draft_model import OwnDraftModel
from onlinespec.drafters.small_lm.drafter import SmallLM
from onlinespec.drafters.training_rows import TrainingRows
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners.losses import auto, soft_cross_entropy
from onlinespec.learning.learner_spec import parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.lossless.noise import Noise, StepNoise
from onlinespec.models.linear import PlainLinear, plain_product
from onlinespec.models.loading import load_target
from onlinespec.registry import LOSSES, resolve

TARGET = rigs.random_target()
TUNINGS = {"layers": Tuning("layers"), "all": Tuning("all"), "adapters": Tuning("adapters", rank=3, alpha=5.0)}
FLAT = SamplingParams(temperature=20.0)  # so that every token can be drawn


def random_text(count, seed=0):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def trace_of(token_ids, target=TARGET):
    """All but the last token with their true states."""
    states = hidden_states(target, token_ids[:-1])
    return Trace(list(token_ids), Features(states), len(states))


def record(trace, start, num_rows, num_accepted=None):
    kept = num_rows - 1 if num_accepted is None else num_accepted
    return Feedback(trace, start, num_rows, num_draft_tokens=4, num_accepted=kept, weights_version=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target's checkpoint and draft models of its tokenizer, as transformers writes them."""
    root = tmp_path_factory.mktemp("small_lm")
    save_tiny(root / "target", "qwen3", seed=1)
    save_tiny(root / "qwen2", "qwen2", num_hidden_layers=1)
    save_tiny(root / "tied", "llama", tie_word_embeddings=True, hidden_size=32)
    save_tiny(root / "narrow", "llama", vocab_size=260)  # a row for each of the tokenizer's tokens, and no padding
    save_tiny(root / "wide", "llama", vocab_size=320)
    return root


@pytest.fixture(scope="module")
def target(folders):
    return load_target(folders / "target")


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def drafted_rows(drafter, text, sampling=FLAT, num_draft_tokens=1, max_tokens=None):
    """The rows [K, V] that tokens behind the text are drafted from, and the tokens."""
    info = RequestInfo(capacity=max_tokens or len(text) + 16)
    drafter.start(0, info, text, Features(torch.empty(len(text) - 1, 0)))
    drafter.gives_probs = True
    noise = StepNoise([None if sampling.is_greedy else Noise(0, 0, 288)], [len(text)])
    draft = drafter.propose([0], [text[-1]], [num_draft_tokens], [sampling], noise)
    drafter.release(0, is_finished=True)
    return draft.probs_BKV[0], draft.token_ids_BK[0].tolist()


# Drafts are the model's own


@pytest.mark.parametrize("name", ["qwen2", "tied", "narrow", "wide"])
def test_drafts_follow_the_law_that_transformers_gives_the_model(folders, target, name):
    drafter = load_drafter(folders / name, target)
    rows, token_ids = drafted_rows(drafter, random_text(30), num_draft_tokens=4)
    with torch.no_grad():
        logits = plain_model(folders / name)(torch.tensor([random_text(30) + token_ids[:3]])).logits[0, -4:]
    width = min(logits.shape[-1], 288)
    expected = (logits[:, :width] / FLAT.temperature).softmax(-1)
    torch.testing.assert_close(rows[:, :width] / rows[:, :width].sum(-1, keepdim=True), expected, atol=2e-3, rtol=0.05)
    assert rows.shape[-1] == 288


def test_in_full_precision_drafts_are_transformers_to_the_fifth_decimal(folders, target, plain_products):
    rows, token_ids = drafted_rows(load_drafter(folders / "qwen2", target), random_text(30), num_draft_tokens=4)
    with torch.no_grad():
        logits = plain_model(folders / "qwen2")(torch.tensor([random_text(30) + token_ids[:3]])).logits[0, -4:]
    torch.testing.assert_close(rows, (logits / FLAT.temperature).softmax(-1), atol=1e-5, rtol=1e-4)


def test_a_long_prompt_read_in_pieces_is_read_as_a_whole(target, folders):
    drafter, text = load_drafter(folders / "qwen2", target), random_text(1000)
    in_pieces, _ = drafted_rows(drafter, text[:901])
    cold = load_drafter(folders / "qwen2", target)
    cold._prefill_waiting = lambda slot: None
    whole, _ = drafted_rows(cold, text[:901])
    torch.testing.assert_close(in_pieces, whole, atol=1e-4, rtol=1e-2)


def test_beyond_its_own_context_a_drafter_drafts_no_more_and_the_answer_goes_on(folders, tmp_path):
    target = load_target(folders / "target")
    short = load_drafter(save_tiny(tmp_path / "short", "llama", max_position_embeddings=64), target)
    params = GenerationParams(max_new_tokens=40, num_draft_tokens=4)
    for num_prompt_tokens in (20, 64, 200):
        prompt = random_text(num_prompt_tokens)
        request = DecodeLoop(target, short).complete(prompt, params)
        assert request.output_ids == rigs.plain(target, prompt, params).output_ids
        assert (request.stats.drafted > 0) == (num_prompt_tokens == 20)
        assert request.num_beyond_drafter == {20: 20 + 40 - 48, 64: 40, 200: 40}[num_prompt_tokens]


def test_the_targets_own_model_as_a_drafter_is_always_right(folders, target):
    same = load_drafter(folders / "target", target)
    for sampling in (SamplingParams(), SamplingParams(temperature=0.8)):
        params = GenerationParams(max_new_tokens=40, num_draft_tokens=3, sampling=sampling)
        stats = DecodeLoop(target, same).complete(random_text(12), params).stats
        assert stats.acceptance_rate > 0.9, "bfloat16 drafts may miss a near tie, no more"


# Learning sees what drafting saw


def remade(drafter, weights, target, make_linear=None):
    """With other weights, as if it had been loaded."""
    model = OwnDraftModel(drafter._model.config, drafter.config, weights, make_linear)
    return SmallLM(target, drafter.config, model, weights, base="beneath", make_linear=make_linear)


@pytest.fixture
def plain_products(monkeypatch):
    """Drafts and learning in the float32 of transformers."""
    for module in ("drafter", "draft_model"):
        monkeypatch.setattr(f"onlinespec.drafters.small_lm.{module}.draft_linear_for", lambda *_: PlainLinear)
        monkeypatch.setattr(f"onlinespec.drafters.small_lm.{module}.learn_product_for", lambda *_: plain_product)


def make(tuning="layers", seed=3, target=TARGET):
    fresh = SmallLM.fresh(target)
    weights = {n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)) for n, t in
               fresh._weights.items()}  # fmt: skip
    drafter = remade(fresh, weights, target, PlainLinear)
    drafter.tune(TUNINGS[tuning])
    if tuning == "adapters":
        drafter.swap(other_weights(drafter.weights, seed=1, scale=0.1))
    return drafter


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_training_row_is_the_row_that_drafting_would_use(tuning):
    drafter, text, first, num_rows = make(tuning), random_text(22), 12, 9
    batch = drafter.batch([record(trace_of(text), first, num_rows)])
    ((logits, _),) = drafter.rows([drafter.weights.params], batch)
    for i in range(num_rows):
        drafted, _ = drafted_rows(drafter, text[: first + i + 1])
        trained = (logits[0, i] / FLAT.temperature).softmax(-1)
        torch.testing.assert_close(trained, drafted[0], atol=1e-5, rtol=1e-3)


def test_one_that_was_trained_for_another_target_says_so(folders, target, tmp_path, caplog):
    drafter = load_drafter(folders / "qwen2", target)
    drafter.save(tmp_path / "saved")
    load_drafter(tmp_path / "saved", target)
    load_drafter(folders / "qwen2", target)
    assert not caplog.records, "a model from elsewhere was trained for no target"
    load_drafter(tmp_path / "saved", replace(target, fingerprint="other"))
    assert f"trained for target {target.fingerprint}, this target is other" in caplog.text


SCALINGS = {
    "dynamic": ("llama", 64, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    "longrope": (
        "phi3",
        256,
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)],
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rows_of_requests_that_may_grow_long_turn_in_training_as_in_drafting(scaling, target, tmp_path, plain_products):
    family, context, rope = SCALINGS[scaling]
    folder = save_tiny(tmp_path, family, max_position_embeddings=context, rope_parameters=rope)
    drafter, num_rows = load_drafter(folder, target), 4
    for seed, longest in enumerate((40, 150, 1_000)):  # where nothing is stretched, where it is, beyond the context
        text = random_text(22, seed)
        trace = replace(trace_of(text, target), max_tokens=longest)
        others = record(trace_of(random_text(30, 7), target), 20, 5)  # of another request, in the same round
        ((logits, _),) = drafter.rows([drafter.weights.params], drafter.batch([record(trace, 12, num_rows), others]))
        for i in range(num_rows):
            drafted, _ = drafted_rows(drafter, text[: 13 + i], max_tokens=longest)
            trained = (logits[0, i] / FLAT.temperature).softmax(-1)
            torch.testing.assert_close(trained, drafted[0], atol=1e-5, rtol=1e-3)


def test_deeper_rows_are_those_of_drafts_that_came_so_far():
    drafter, text = make(), random_text(22)
    batch = drafter.batch([record(trace_of(text), 5, 4), record(trace_of(random_text(22, 1)), 12, 2)])
    first, second, third, fourth = drafter.rows([drafter.weights.params], batch, num_depths=4)
    assert [rows.probs_NV.shape[0] for _, rows in (first, second, third, fourth)] == [6, 4, 2, 1]
    torch.testing.assert_close(second[0][0], first[0][0][[1, 2, 3, 5]])
    torch.testing.assert_close(fourth[0][0], first[0][0][[3]])


def test_a_label_is_the_targets_row_and_the_token_that_came_next():
    drafter, text = make(), random_text(14)
    trace = trace_of(text)
    ((_, rows),) = drafter.rows([drafter.weights.params], drafter.batch([record(trace, 0, 5)]))
    torch.testing.assert_close(rows.probs_NV, TARGET.decoder.head(trace.features.final_SD[:5]).softmax(-1))
    assert rows.token_ids_N.tolist() == text[1:6], "the first token of a text has a row too"


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("row_loss", [soft_cross_entropy, auto])
def test_losses_and_gradients_together_are_those_of_each_alone(tuning, row_loss):
    drafter = make(tuning)
    candidates = [other_weights(drafter.weights, seed=seed, scale=0.05).params for seed in range(3)]
    leaves = [{n: p.clone().requires_grad_() for n, p in params.items()} for params in candidates]
    batch = drafter.batch([record(trace_of(random_text(20)), 8, 4), record(trace_of(random_text(9, 1)), 0, 3)])
    together = drafter.losses(leaves, batch, row_loss)
    torch.stack([loss.total for loss in together]).sum().backward()
    for params, loss in zip(leaves, together, strict=True):
        alone = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        one = drafter.loss(alone, batch, row_loss)
        one.total.backward()
        torch.testing.assert_close(loss.total, one.total)
        assert loss.fresh == pytest.approx(one.fresh)
        for name in alone:
            torch.testing.assert_close(params[name].grad, alone[name].grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_gradients_are_those_of_autograd_through_transformers(tuning, folders, target, plain_products):
    """The rows' own gradient: keys of the context lend none, and here there is no context."""
    drafter = load_drafter(folders / "qwen2", target)
    drafter.tune(TUNINGS[tuning])
    text = random_text(12)
    rows = drafter.batch([record(trace_of(text, target), 0, 11)])
    batch = TrainingRows(rows, drafter._label)  # over the whole vocabulary
    params = {n: p.clone().requires_grad_() for n, p in drafter.weights.params.items()}
    drafter.loss(params, batch).total.backward()

    model = plain_model(folders / "qwen2")
    labels = target.decoder.head(hidden_states(target, text[:11])).softmax(-1)
    logits = model(torch.tensor([text[:11]])).logits[0]
    (-(labels * logits.log_softmax(-1)).sum(-1).mean()).backward()
    theirs = {n: p.grad for n, p in model.named_parameters()}
    if tuning == "adapters":
        module, scale = "model.layers.0.self_attn.q_proj", 5.0 / 3
        b_grad = scale * theirs[f"{module}.weight"] @ params[f"{module}.lora_A.weight"].detach().mT
        torch.testing.assert_close(params[f"{module}.lora_B.weight"].grad, b_grad, atol=1e-6, rtol=1e-3)
    else:
        for name, p in params.items():
            torch.testing.assert_close(p.grad, theirs[name], atol=1e-6, rtol=1e-3)


def test_what_is_not_tuned_never_moves():
    for name, still in {"layers": ["model.embed_tokens.weight", "lm_head.weight"], "all": []}.items():
        drafter = make(name)
        before = {n: t.clone() for n, t in drafter._effective(drafter.weights.params).items()}
        learning = InlineLearning(drafter, config=parse_learner("online_gradient/min_interval=4/budget=inf"))
        DecodeLoop(TARGET, drafter, learning).complete(random_text(9), GenerationParams(max_new_tokens=28))
        assert learning.num_rounds > 3
        after = drafter._effective(drafter.weights.params)
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        assert moved == set(after) - set(still)


ONE_BY_ONE = "online_gradient/min_interval=8"
IN_BUFFERS = "osd/requests_per_round=1/step_size=3e-3/min_interval=8"


@pytest.mark.parametrize(
    ("tuning", "method"),
    [
        ("layers", ONE_BY_ONE),
        pytest.param("all", IN_BUFFERS, marks=pytest.mark.full),
        *(pytest.param(tuning, ONE_BY_ONE, marks=pytest.mark.full) for tuning in TUNINGS if tuning != "layers"),
        *(pytest.param(tuning, IN_BUFFERS, marks=pytest.mark.full) for tuning in TUNINGS if tuning != "all"),
    ],
)
def test_it_learns_a_target_online_until_most_drafts_are_kept(tuning, method):
    target = rigs.counting_target()
    drafter = SmallLM.fresh(target)
    drafter = remade(drafter, dict(drafter._weights), target)
    drafter.tune(TUNINGS[tuning])
    blank = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3 if p.dim() > 1 else p
             for i, (n, p) in enumerate(drafter.weights.params.items())}  # fmt: skip
    drafter.swap(DrafterWeights(blank, 0))
    learning = InlineLearning(
        drafter, config=parse_learner(f"{method}/budget=inf/max_interval=8", LearnConfig(step_size=3e-3))
    )
    loop = DecodeLoop(target, drafter, learning)
    params = GenerationParams(max_new_tokens=48, num_draft_tokens=3)
    lengths = []
    while sum(lengths[-10:]) / 10 <= 3.5:
        i = len(lengths)
        assert i < 120
        (request,) = run_together(loop, [([i % 12, (i + 1) % 12], params)])
        lengths.append(request.stats.acceptance_length)
    assert not learning.is_frozen
    assert lengths[0] < 2.5


# On disk


def test_transformers_reads_what_was_saved_and_gives_its_logits(folders, target, tmp_path):
    drafter = load_drafter(folders / "qwen2", target)
    drafter.tune(TUNINGS["all"])
    drafter.swap(other_weights(drafter.weights, seed=1, scale=0.05))
    drafter.save(tmp_path / "saved")
    model, ids = plain_model(tmp_path / "saved"), torch.tensor([random_text(20)])
    other = plain_model(folders / "qwen2")
    other.load_state_dict(drafter.weights.params)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits)
    vocab = AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab()
    assert target.tokenizer.get_vocab().items() <= vocab.items()  # the family's class adds a token


def test_a_published_model_keeps_its_dtype_and_every_field_of_its_config(folders, target, tmp_path):
    tiny_model("qwen2", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders / "qwen2" / name, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text()) | {"unheard_of": 7}
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    load_drafter(tmp_path / "half", target).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == config
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_come_back_as_they_were_and_leave_the_model_beneath_alone(folders, target, tmp_path):
    beneath = (folders / "qwen2" / "model.safetensors").read_bytes()
    drafter = load_drafter(folders / "qwen2", target, tuning=TUNINGS["adapters"])
    drafter.swap(other_weights(drafter.weights, seed=1, scale=0.1))
    drafter.save(tmp_path / "adapters")
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "onlinespec.json",
    ]
    loaded = load_drafter(tmp_path / "adapters", target)
    assert loaded.weights.version == 1
    assert loaded.weights.params.keys() == drafter.weights.params.keys()
    rows = [drafted_rows(one, random_text(9))[0] for one in (drafter, loaded)]
    torch.testing.assert_close(*rows, atol=0, rtol=0)
    assert (folders / "qwen2" / "model.safetensors").read_bytes() == beneath
    loaded.save(tmp_path / "again")
    assert load_drafter(tmp_path / "again", target).weights.version == 1


def test_peft_reads_our_adapters_and_we_read_pefts(folders, target, tmp_path):
    drafter = load_drafter(folders / "qwen2", target, tuning=TUNINGS["adapters"])
    drafter.swap(other_weights(drafter.weights, seed=1, scale=0.1))
    drafter.save(tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(plain_model(folders / "qwen2"), tmp_path / "ours").eval()
    whole = plain_model(folders / "qwen2")
    whole.load_state_dict(drafter._effective(drafter.weights.params))
    ids = torch.tensor([random_text(20)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)

    some = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(plain_model(folders / "qwen2"), some).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    (tmp_path / "theirs" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(folders / "qwen2")})
    )
    loaded = load_drafter(tmp_path / "theirs", target)
    whole.load_state_dict(loaded._effective(loaded.weights.params))
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"r": "x"}, "r and lora_alpha must be numbers"),
        ({"r": 4}, r"lora_[AB].weight has shape"),
        ({"base_model_name_or_path": None}, "must name the model underneath"),
        ({"base_model_name_or_path": "./gone"}, "no directory gone"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_what_is_wrong(folders, target, tmp_path, change, message):
    load_drafter(folders / "qwen2", target, tuning=TUNINGS["adapters"]).save(tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_drafter(tmp_path / "adapters", target)


def test_adapters_for_a_model_that_changed_are_refused_with_both_fingerprints(folders, target, tmp_path):
    base = shutil.copytree(folders / "qwen2", tmp_path / "base")
    load_drafter(base, target, tuning=TUNINGS["adapters"]).save(tmp_path / "adapters")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"adapters for a model with fingerprint \w+, .*base has \w+"):
        load_drafter(tmp_path / "adapters", target)


def test_a_tokenizer_that_differs_is_refused_by_its_first_difference(folders, target, tmp_path):
    other = shutil.copytree(folders / "qwen2", tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.get)[7:9]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=re.escape(f"token 7 is '{one}' for the target and '{two}' for the drafter")):
        load_drafter(other, target)


def test_tokens_that_one_of_both_models_lacks_may_differ(tmp_path):
    """Neither are they drafted, nor said by the target: a pad token added in fine-tuning, one that a class adds."""
    target = load_target(save_tiny(tmp_path / "target", "qwen2", vocab_size=259))
    drafter = load_drafter(add_tokens(save_tiny(tmp_path / "drafter", vocab_size=259), "<pad>"), target)
    assert (target.tokens_beyond[259], drafter._tokenizer) == ("<|endoftext|>", target.tokenizer)
    drafter.save(tmp_path / "saved")
    assert load_drafter(tmp_path / "saved", target).weights.version == 0
    wider = load_target(add_tokens(save_tiny(tmp_path / "wider", vocab_size=288), "<new>"))
    assert load_drafter(tmp_path / "drafter", wider).weights.version == 0


def test_a_model_without_a_tokenizer_is_refused(folders, target, tmp_path):
    other = shutil.copytree(folders / "qwen2", tmp_path / "other")
    (other / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer \(tokenizer.json"):
        load_drafter(other, target)


# Vocabularies of another size than the target's


def tempting_padding(folder, known):
    """A draft model that scores its own padding highest, and all else so low that a row of zeros would be drafted."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:] = 0
    tensors["model.norm.weight"][0] = 1  # the state is one number, s ...
    for name in [name for name in tensors if name.startswith("model.layers")]:
        tensors[name] *= 0
    tensors["model.embed_tokens.weight"][:, 0] = 3  # ... and that positive
    head = tensors["lm_head.weight"]
    head[:, 0] = -4 + 0.1 * torch.randn(len(head), generator=torch.Generator().manual_seed(0))
    head[known:, 0] = 9
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


SIZES = {"narrow": 260, "wide": 320}


def drafted_while_serving(drafter, target, monkeypatch, sampling, may_learn=True):
    """All token ids that were drafted in some answers."""
    drafted, propose = [], drafter.propose

    def noting(*args):
        draft = propose(*args)
        for row, count in zip(draft.token_ids_BK.tolist(), draft.num_draft_tokens_B.tolist(), strict=True):
            drafted.extend(row[:count])
        return draft

    monkeypatch.setattr(drafter, "propose", noting)
    config = parse_learner("online_gradient/min_interval=4/max_interval=4/budget=inf/step_size=0.01")
    learning = InlineLearning(drafter, config=config) if may_learn else None
    loop = DecodeLoop(target, drafter, learning)
    for seed in range(3):
        loop.complete(random_text(9, seed), GenerationParams(16, 3, sampling, seed=seed, ignore_end_tokens=True))
    assert not learning or (learning.num_rounds >= 3 and not learning.is_frozen)
    return drafted


DRAWN = {"greedy": SamplingParams(), "sampled": SamplingParams(1.0), "flat": FLAT}


@pytest.mark.parametrize(
    ("tuning", "drawn"),
    [
        pytest.param(tuning, drawn, marks=() if drawn == "flat" or tuning == "layers" else pytest.mark.full)
        for tuning in (None, *TUNINGS)
        for drawn in DRAWN
    ],
)
@pytest.mark.parametrize("name", SIZES)
def test_no_id_is_drafted_that_drafter_and_target_do_not_both_know(tmp_path, target, monkeypatch, name, tuning, drawn):
    folder = tempting_padding(save_tiny(tmp_path / name, vocab_size=SIZES[name]), known=min(SIZES[name], 288))
    drafter = load_drafter(folder, target, tuning=TUNINGS.get(tuning))
    drafted = drafted_while_serving(drafter, target, monkeypatch, DRAWN[drawn], may_learn=tuning is not None)
    assert drafted
    assert max(drafted) < min(SIZES[name], 288)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("row_loss", [resolve(LOSSES, name, "loss") for name in LOSSES])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_whose_token_the_drafter_lacks_are_not_learned_from(folders, target, tuning, row_loss, temperature):
    drafter = load_drafter(folders / "narrow", target, tuning=TUNINGS[tuning])
    text = random_text(20)
    text[16] = 277  # committed at row 15
    trace = trace_of(text, target)

    def loss_of(records):
        params = {n: p.clone().requires_grad_() for n, p in drafter.weights.params.items()}
        batch = drafter.batch([replace(one, temperature=temperature) for one in records])
        loss = drafter.loss(params, batch, row_loss)
        loss.total.backward()
        return loss, {n: p.grad for n, p in params.items()}

    whole, grads = loss_of([record(trace, 12, 7)])
    assert math.isfinite(whole.fresh)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert whole.num_rows == 6
    (one, _), (six, _) = loss_of([record(trace, 12, 3)]), loss_of([record(trace, 12, 3), record(trace, 16, 3)])
    assert one.num_rows == 3
    assert whole.fresh == pytest.approx(six.fresh, rel=1e-4)
    assert drafter.batch([record(trace, 15, 1)]) == []


def test_what_a_drafter_lacks_has_no_share_in_its_labels(folders, target):
    drafter, trace = load_drafter(folders / "narrow", target), trace_of(random_text(20), target)
    ((logits, rows),) = drafter.rows([drafter.weights.params], drafter.batch([record(trace, 12, 5)]))
    assert logits.shape[-1] == rows.probs_NV.shape[-1] == 288
    assert not rows.probs_NV[:, 260:].any()
    torch.testing.assert_close(rows.probs_NV.sum(-1), torch.ones(5))
    assert not logits.softmax(-1)[..., 260:].any()


# Families that only transformers runs


OTHERS = {"gpt2": {}, "olmo2": {}, "gemma3": {}}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.full if n == "olmo2" else ()) for n in OTHERS]
)
def other(request, tmp_path_factory):
    """A draft model that our decoder does not run, with the same tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("other") / request.param, request.param, seed=2)


def test_drafts_of_any_family_follow_its_own_law(other, target):
    rows, token_ids = drafted_rows(load_drafter(other, target), random_text(30), num_draft_tokens=4)
    with torch.no_grad():
        logits = plain_model(other)(torch.tensor([random_text(30) + token_ids[:3]])).logits[0, -4:]
    torch.testing.assert_close(rows, (logits / FLAT.temperature).softmax(-1), atol=1e-4, rtol=1e-3)


def test_any_family_answers_in_batches_as_plain_decoding_does(other, target):
    jobs = [
        (random_text(n, n), GenerationParams(12, num_draft_tokens=k)) for n, k in ((1, 3), (40, 4), (9, 0), (70, 2))
    ]
    done = run_together(DecodeLoop(target, load_drafter(other, target)), jobs)
    assert [r.output_ids for r in done] == [rigs.plain(target, *job).output_ids for job in jobs]


@pytest.mark.parametrize("what", ["layers", "all"])
def test_any_family_learns_by_the_gradients_of_its_own_code(other, target, what, plain_products):
    drafter, text = load_drafter(other, target, tuning=Tuning(what)), random_text(20)
    rows = drafter.batch([record(trace_of(text, target), 8, 5), record(trace_of(text[:9], target), 0, 8)])
    batch = TrainingRows(rows, drafter._label)
    params = {n: p.clone().requires_grad_() for n, p in drafter.weights.params.items()}
    loss = drafter.loss(params, batch)
    loss.total.backward()

    model, losses = plain_model(other), []
    for ids, first in ((text[:13], 8), (text[:8], 0)):
        labels = target.decoder.head(hidden_states(target, ids)).softmax(-1)[first:]
        losses.append(-(labels * model(torch.tensor([ids])).logits[0, first:].log_softmax(-1)).sum(-1))
    torch.cat(losses).mean().backward()
    torch.testing.assert_close(loss.total.item(), torch.cat(losses).mean().item(), atol=1e-4, rtol=1e-4)
    theirs = {n: p.grad for n, p in model.named_parameters()}
    for name, p in params.items():
        torch.testing.assert_close(p.grad, theirs[name], atol=1e-5, rtol=1e-3)


def test_several_sets_of_any_family_have_the_losses_of_each_alone(other, target):
    drafter = load_drafter(other, target)
    candidates = [other_weights(drafter.weights, seed=seed, scale=0.02).params for seed in range(2)]
    batch = drafter.batch([record(trace_of(random_text(20), target), 8, 4)])
    together = drafter.losses(candidates, batch)
    for params, loss in zip(candidates, together, strict=True):
        torch.testing.assert_close(loss.total, drafter.loss(params, batch).total)


def test_any_family_learns_online_and_is_read_back_as_transformers_reads_it(other, target, tmp_path):
    drafter = load_drafter(other, target)
    learning = InlineLearning(drafter, config=parse_learner("online_gradient/min_interval=8/max_interval=8/budget=inf"))
    loop, prompt = DecodeLoop(target, drafter, learning), random_text(12)
    losses = []
    for _ in range(5):
        loop.complete(prompt, GenerationParams(32, num_draft_tokens=2))
        losses.append(learning.last_loss)
    assert not learning.is_frozen
    assert losses[-1] < losses[0] - 0.5
    drafter.save(tmp_path / "saved")
    loaded = load_drafter(tmp_path / "saved", target)
    assert loaded.weights.version == drafter.weights.version > 2
    rows = [drafted_rows(one, prompt)[0] for one in (drafter, loaded)]
    torch.testing.assert_close(*rows, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        logits = plain_model(tmp_path / "saved")(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(rows[0][0], (logits / FLAT.temperature).softmax(-1), atol=1e-4, rtol=1e-3)


def test_adapters_for_a_family_that_only_transformers_runs_are_refused(other, target):
    with pytest.raises(
        ValueError, match=r"adapters are for models that our decoder runs, not \w+; choose --tune layers"
    ):
        load_drafter(other, target, tuning=TUNINGS["adapters"])


def test_a_model_that_caps_its_logits_is_refused_as_a_drafter(target, tmp_path):
    folder = save_tiny(tmp_path / "gemma2", "gemma2")
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does more to its logits than multiply by its head"):
        load_drafter(folder, target)


# What learning reads


def test_rows_see_the_newest_context_only_as_far_as_it_is_kept(folders, target, plain_products):
    drafter, text = load_drafter(folders / "qwen2", target), random_text(40)
    drafter.max_context = 7
    batch = drafter.batch([record(trace_of(text, target), 20, 5), record(trace_of(text[:12], target), 3, 2)])
    ((logits, _),) = drafter.rows([drafter.weights.params], batch)
    model = plain_model(folders / "qwen2")
    with torch.no_grad():
        far, near = (model(torch.tensor([ids])).logits[0] for ids in (text[13:25], text[:5]))
    torch.testing.assert_close(logits[0], torch.cat([far[-5:], near[-2:]]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_drafter_with_windows_learns_the_rows_that_it_drafts_from(name, target, tmp_path, plain_products):
    folder = save_tiny(tmp_path / name, name, sliding_window=6)
    drafter, text = load_drafter(folder, target), random_text(30)
    ((logits, _),) = drafter.rows([drafter.weights.params], drafter.batch([record(trace_of(text, target), 18, 8)]))
    for i in range(8):
        drafted, _ = drafted_rows(drafter, text[: 18 + i + 1])
        torch.testing.assert_close((logits[0, i] / FLAT.temperature).softmax(-1), drafted[0], atol=1e-5, rtol=1e-3)


def test_fused_products_are_saved_as_the_family_publishes_them(target, tmp_path):
    folder = save_tiny(tmp_path / "phi3", "phi3")
    drafter = load_drafter(folder, target)
    drafter.save(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_a_fresh_one_for_a_target_that_transformers_runs_is_saved_and_read_back(family, tmp_path):
    """GPT-2 uses its embedding as its head: one tensor, to be written once."""
    target = load_target(save_tiny(tmp_path / "target", family))
    fresh = SmallLM.fresh(target)
    assert ("lm_head.weight" in fresh._weights) == (family == "olmo2")
    fresh.save(tmp_path / "saved")
    rows = [drafted_rows(one, random_text(9))[0] for one in (fresh, load_drafter(tmp_path / "saved", target))]
    torch.testing.assert_close(*rows)
