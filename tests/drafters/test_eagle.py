"""Positions in this file are those of tokens in a request's text, counted from 0."""

import json
from dataclasses import replace

import pytest
import rigs
import torch
from checkpoints import save_tiny
from hypothesis import given
from hypothesis import strategies as st
from rigs import Recorder, Script, hidden_states, other_weights, plain
from safetensors.torch import load_file, save_file
from toy import steady

import onlinespec.drafters.eagle as eagle_module
from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import DecodeStats, Features, Feedback, RequestInfo, Trace
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.training_rows import TrainingRows
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners import make_learner
from onlinespec.learners.losses import auto, soft_cross_entropy
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.lossless.sampling import process_logits
from onlinespec.models.linear import PlainLinear, bf16_matmul
from onlinespec.models.loading import load_target

PROMPT = [5, 9, 200, 31, 77, 14, 9]
TARGET = rigs.random_target()


def make_eagle(target=TARGET, unroll=2, has_bias=False):
    """Random weights, drafting in the same float32 that learning uses."""
    fresh = Eagle.fresh(target)
    params = dict(other_weights(fresh.weights, seed=1, scale=0.2).params)
    if has_bias:
        params["fc.bias"] = torch.linspace(-1, 1, len(params["fc.weight"]))
    return Eagle(target, fresh.config, params, unroll=unroll, make_linear=PlainLinear)


@pytest.fixture
def eagle():
    return make_eagle()


@pytest.fixture
def scored(monkeypatch):
    """Every (logits, target rows) the loss compares, in order; gradients of the logits are kept."""
    calls = []

    losses = Eagle.losses

    def spy(draft_logits, target):
        if draft_logits.requires_grad:
            draft_logits.retain_grad()
        calls.append((draft_logits, target.probs_NV))
        return soft_cross_entropy(draft_logits, target)

    monkeypatch.setattr(Eagle, "losses", lambda self, candidates, batch, row_loss: losses(self, candidates, batch, spy))
    return calls


def leaves(drafter):
    return {name: p.clone().requires_grad_() for name, p in drafter.weights.params.items()}


def trace_of(token_ids, target=TARGET):
    """All but the last token with their true states."""
    states = hidden_states(target, token_ids[:-1])
    return Trace(list(token_ids), Features(states), len(states))


def record(trace, start, num_rows):
    return Feedback(trace, start, num_rows, num_draft_tokens=4, num_accepted=num_rows - 1, weights_version=0)


def random_text(count, seed=0):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Learning sees what drafting saw

FLAT = SamplingParams(temperature=20.0)  # so that every token can be drawn


def forced_rows(drafter, text, position, depth, max_tokens=None):
    """The drafter's rows at drafting depths 0..depth behind text[: position + 1], the text's own tokens being drawn."""
    drafter.gives_probs = True
    known = text[: position + 1]
    info = RequestInfo(capacity=max_tokens or len(text))
    drafter.start(0, info, known, Features(hidden_states(TARGET, known)[:-1]))
    forced = rigs.ForcedNoise(text[position + 1 : position + 1 + depth])
    draft = drafter.propose([0], [text[position]], [depth + 1], [FLAT], forced)
    drafter.release(0, is_finished=True)
    assert draft.token_ids_BK[0, :depth].tolist() == text[position + 1 : position + 1 + depth]
    return draft.probs_BKV[0]


@pytest.mark.parametrize("has_bias", [False, True])
def test_every_training_row_is_the_row_that_drafting_would_use(scored, has_bias):
    unroll, first, num_rows = 3, 12, 9
    drafter = make_eagle(unroll=unroll, has_bias=has_bias)
    text = random_text(first + num_rows + 1)
    drafter.loss(leaves(drafter), drafter.batch([record(trace_of(text), first, num_rows)]))
    assert [len(logits) for logits, _ in scored] == [num_rows - depth for depth in range(unroll)]
    for i in range(num_rows):
        depths = min(unroll, num_rows - i)
        trained = process_logits(torch.stack([scored[depth][0][i] for depth in range(depths)]), FLAT)
        # row i's token is the anchor; the deeper rows of the same chain stand at the same index
        drafted = forced_rows(drafter, text, first + i, depths - 1)
        torch.testing.assert_close(trained, drafted, atol=1e-5, rtol=1e-3)


def test_rows_of_requests_that_may_grow_long_turn_in_training_as_in_drafting(scored):
    fresh, first, num_rows = make_eagle(), 12, 4
    stretched = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    drafter = Eagle(TARGET, fresh.config | stretched, fresh.weights.params, unroll=1, make_linear=PlainLinear)
    for seed, longest in enumerate((40, 150)):
        text = random_text(first + num_rows + 1, seed)
        trace = replace(trace_of(text), max_tokens=longest)
        others = record(trace_of(random_text(30, 7)), 20, 5)  # of another request, in the same round
        scored.clear()
        drafter.loss(leaves(drafter), drafter.batch([record(trace, first, num_rows), others]))
        trained = process_logits(scored[0][0], FLAT)
        for i in range(num_rows):
            drafted = forced_rows(drafter, text, first + i, 0, longest)
            torch.testing.assert_close(trained[i], drafted[0], atol=1e-5, rtol=1e-3)


# Gradient where the target judged, and nowhere else


def scripted_steps():
    """Two refusals, a bonus token and steps without a draft, at known places: (positions of the rows, feedback)."""
    n = len(PROMPT)
    answer = plain(TARGET, PROMPT, GenerationParams(max_new_tokens=14)).trace.token_ids
    recorder = Recorder()
    script = Script(answer[: n + 12], wrong_at={n + 1, n + 7})
    DecodeLoop(TARGET, script, recorder).complete(PROMPT, GenerationParams(max_new_tokens=14))
    expected = [
        range(n - 1, n + 1),  # one kept, the second refused
        range(n + 1, n + 6),  # all four kept and a bonus
        range(n + 6, n + 7),  # the first refused
        range(n + 7, n + 12),
        range(n + 12, n + 13),  # nothing drafted
    ]
    return list(zip(expected, recorder.feedback, strict=True))


def test_feedback_holds_exactly_the_rows_that_were_verified():
    for expected, feedback in scripted_steps():
        assert range(feedback.start, feedback.start + feedback.num_rows) == expected


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [4], [0, 1], [0, 2], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_exactly_the_verified_rows_receive_gradient(eagle, scored, chosen):
    steps = [scripted_steps()[i] for i in chosen]
    feedback = [replace(f, trace=steps[0][1].trace) for _, f in steps]
    eagle.unroll = 1
    eagle.loss(leaves(eagle), eagle.batch(feedback)).total.backward()
    positions = [position for expected, _ in steps for position in expected]
    states = steps[0][1].trace.features.final_SD[positions]
    labels = torch.cat([target_probs for _, target_probs in scored])
    gradients = torch.cat([logits.grad for logits, _ in scored])
    torch.testing.assert_close(labels, TARGET.decoder.head(states).softmax(-1))
    assert (gradients.abs().amax(-1) > 0).all()
    rows = torch.cat([logits.detach() for logits, _ in scored]).softmax(-1)
    torch.testing.assert_close(gradients, (rows - labels) / len(positions))


def test_a_label_is_the_targets_row_for_the_token_that_came_next(eagle, scored):
    """Greedy text: the target's most likely token in a row is the next token of the text."""
    for expected, feedback in scripted_steps():
        scored.clear()
        eagle.loss(leaves(eagle), eagle.batch([feedback]))
        assert scored[0][1].argmax(-1).tolist() == [feedback.trace.token_ids[i + 1] for i in expected]


@steady
@given(first=st.integers(1, 12), num_rows=st.integers(1, 6))
def test_what_lies_behind_the_verified_rows_changes_nothing(first, num_rows):
    drafter, text = make_eagle(), random_text(20)
    losses = []
    for is_changed in (False, True):
        trace = trace_of(text)
        if is_changed:
            trace.features.final_SD[first + num_rows :] += 1
            trace.token_ids[first + num_rows + 1 :] = [3] * (20 - first - num_rows - 1)
        losses.append(drafter.loss(drafter.weights.params, drafter.batch([record(trace, first, num_rows)])).total)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("changed", [0, 4, 8, 10, 12])
def test_a_row_sees_the_tokens_up_to_its_own_and_no_later_one(eagle, scored, changed):
    first, num_rows = 8, 6
    text = random_text(16)
    other = [*text[:changed], (text[changed] + 1) % 256, *text[changed + 1 :]]
    trace = trace_of(text)
    for ids in (text, other):
        eagle.loss(eagle.weights.params, eagle.batch([record(replace(trace, token_ids=ids), first, num_rows)]))
    for depth in range(eagle.unroll):
        before, after = scored[depth][0], scored[eagle.unroll + depth][0]
        for i in range(num_rows - depth):
            reads_it = 1 <= changed <= first + i + depth  # the first token is read through its state only
            assert torch.allclose(before[i], after[i], atol=1e-5) == (not reads_it)


def test_context_rows_lend_keys_but_get_no_gradient(eagle):
    first, num_rows = 8, 3
    (span,) = eagle.batch([record(trace_of(random_text(16)), first, num_rows)])
    features = span.features_SD.clone().requires_grad_()
    eagle.loss(leaves(eagle), TrainingRows([span._replace(features_SD=features)], eagle._label)).total.backward()
    assert (features.grad[: first - 1] == 0).all()
    assert (features.grad[first - 1 :].abs().amax(-1) > 0).all()


# Batches


def test_consecutive_steps_of_a_request_become_one_span(eagle):
    one, other = trace_of(random_text(20)), trace_of(random_text(20, seed=1))
    spans = eagle.batch([record(one, 3, 2), record(one, 5, 4), record(other, 9, 1), record(one, 12, 2)])
    assert [len(span.target_states_ND) for span in spans] == [6, 1, 2]


def test_the_first_token_of_a_text_has_no_state_to_learn_from(eagle):
    trace = trace_of(random_text(9))
    assert eagle.batch([record(trace, 0, 1)]) == []
    (span,) = eagle.batch([record(trace, 0, 1), record(trace, 1, 3)])
    assert len(span.target_states_ND) == 3


def test_a_batch_without_rows_has_no_loss(eagle):
    with pytest.raises(ValueError, match="without verified rows"):
        eagle.loss(eagle.weights.params, eagle.batch([]))


def test_the_loss_of_a_batch_is_the_mean_over_its_rows(eagle):
    records = [record(trace_of(random_text(20, seed)), 3 + seed, 1 + 4 * seed) for seed in range(3)]
    whole = eagle.loss(eagle.weights.params, eagle.batch(records))
    parts = [eagle.loss(eagle.weights.params, eagle.batch([r])) for r in records]
    assert whole.num_rows == sum(part.num_rows for part in parts) == 15
    torch.testing.assert_close(whole.total, sum(part.total * part.num_rows for part in parts) / 15)
    assert whole.fresh == pytest.approx(sum(part.fresh * part.num_rows for part in parts) / 15)


def test_the_fresh_loss_is_the_cross_entropy_of_the_first_depth(eagle, scored):
    loss = eagle.loss(eagle.weights.params, eagle.batch([record(trace_of(random_text(20)), 5, 7)]))
    logits, target_probs = scored[0]
    assert loss.fresh == pytest.approx(float(-(target_probs * logits.log_softmax(-1)).sum(-1).mean()))
    assert float(loss.total) > loss.fresh


# Which rows count


@pytest.mark.parametrize("unroll", [1, 2])
def test_rejected_only_trains_the_mistake_and_not_the_row_after_it(eagle, scored, unroll):
    """The mistake at token index i was drafted by the row at i - 1; the published online code trains row i."""
    eagle.unroll = unroll
    steps = scripted_steps()
    trace = steps[0][1].trace
    feedback = [replace(f, trace=trace) for _, f in steps]
    wrong_tokens = [f.start + f.num_accepted + 1 for f in feedback if f.is_rejection]
    eagle.loss(leaves(eagle), eagle.batch(feedback, rejected_only=True)).total.backward()
    logits, target_probs = scored[0]
    first = feedback[0].start
    trained = [first + i for i, row in enumerate(logits.grad) if row.abs().max() > 0]
    assert trained == [token - 1 for token in wrong_tokens] != []
    for row in trained:
        assert int(target_probs[row - first].argmax()) == trace.token_ids[row + 1]  # the correction


def test_a_round_without_a_rejection_has_nothing_for_rejected_only(eagle):
    kept = [f for _, f in scripted_steps() if not f.is_rejection]
    assert kept
    assert eagle.batch(kept, rejected_only=True) == []
    assert eagle.batch([], replayed=[f for _, f in scripted_steps()]) == []


def test_replayed_rows_count_in_the_total_and_not_in_the_fresh_loss(eagle):
    fresh, old = record(trace_of(random_text(20)), 5, 4), record(trace_of(random_text(20, seed=1)), 3, 8)
    params = eagle.weights.params
    alone, together = (eagle.loss(params, eagle.batch([fresh], replayed=r)) for r in ([], [old]))
    replayed = eagle.loss(params, eagle.batch([old]))
    assert together.fresh == pytest.approx(alone.fresh)
    assert together.num_rows == 12
    torch.testing.assert_close(together.total, (4 * alone.total + 8 * replayed.total) / 12)


def test_a_row_is_told_the_token_that_was_committed_there_and_its_temperature(eagle):
    text = random_text(20)
    sampled = replace(record(trace_of(text), 5, 4), temperature=0.7)
    ((_, target),) = eagle.rows([eagle.weights.params], eagle.batch([sampled]))
    assert target.token_ids_N.tolist() == text[6:10]
    assert target.temperatures_N.tolist() == pytest.approx([0.7] * 4)


# Several sets of weights at once


def spread_out(drafter, count):
    generator = torch.Generator().manual_seed(3)
    return [
        {name: p + 0.05 * torch.randn(p.shape, generator=generator) for name, p in drafter.weights.params.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("row_loss", [soft_cross_entropy, auto])
def test_losses_and_gradients_together_are_those_of_each_alone(row_loss, has_bias):
    drafter = make_eagle(unroll=3, has_bias=has_bias)
    batch = drafter.batch(
        [record(trace_of(random_text(20)), 5, 7), record(trace_of(random_text(15, seed=1)), 2, 3)],
        replayed=[record(trace_of(random_text(30, seed=2)), 20, 9)],
    )
    sets = [{name: p.requires_grad_() for name, p in params.items()} for params in spread_out(drafter, 3)]
    together = drafter.losses(sets, batch, row_loss)
    grads = torch.autograd.grad(sum(loss.total for loss in together), [p for params in sets for p in params.values()])
    for i, params in enumerate(sets):
        alone = drafter.loss(params, batch, row_loss)
        torch.testing.assert_close(together[i].total, alone.total)
        assert together[i].fresh == pytest.approx(alone.fresh, rel=1e-5)
        own = grads[i * len(params) : (i + 1) * len(params)]
        for theirs, mine in zip(torch.autograd.grad(alone.total, list(params.values())), own, strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=1e-4)


def test_rows_are_those_that_the_loss_compares_at_every_depth(eagle, scored):
    batch = eagle.batch([record(trace_of(random_text(20)), 5, 7)])
    eagle.loss(eagle.weights.params, batch)
    depths = eagle.rows([eagle.weights.params] * 2, batch, num_depths=eagle.unroll)
    for (logits, target), (expected, target_probs) in zip(depths, scored, strict=True):
        for one in logits:
            torch.testing.assert_close(one, expected)
        torch.testing.assert_close(target.probs_NV, target_probs)


# Labels are aligned: an oracle can be learned


class LabelsOneOff(Eagle):
    """WRONG: each row is shown its neighbour's label."""

    def batch(self, *feedback, **choice):
        spans = super().batch(*feedback, **choice)
        rolled = [
            span._replace(target_states_ND=span.target_states_ND.roll(1, 0), token_ids_N=span.token_ids_N.roll(1, 0))
            for span in spans
        ]
        return TrainingRows(rolled, self._label)


def acceptance_after_counting(cls):
    target = rigs.counting_target()
    drafter = cls.fresh(target)
    drafter.unroll = 4
    learning = InlineLearning(
        drafter,
        make_learner("online_gradient", 1e-2),
        LearnConfig(min_interval=8, max_interval=16, budget=float("inf")),
    )
    loop = DecodeLoop(target, drafter, learning)
    for first in range(28):
        loop.complete([first % 12, (first + 1) % 12], GenerationParams(48, num_draft_tokens=0))
    assert learning.num_rounds > 30
    assert not learning.is_frozen
    done = [DecodeLoop(target, drafter).complete([i, i + 1], GenerationParams(max_new_tokens=21)) for i in range(11)]
    return sum((request.stats for request in done), DecodeStats()).acceptance_rate


def test_counting_is_learned_to_perfection():
    assert acceptance_after_counting(Eagle) == 1.0


def test_counting_is_not_learned_from_labels_one_off():
    assert acceptance_after_counting(LabelsOneOff) < 0.1


# Drafting


@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 16, 17, 18, 60])
def test_rows_of_a_prompt_that_no_one_reads_leave_the_same_keys_and_drafts(num_prompt_tokens, monkeypatch):
    """A prompt's rows but the last write keys and values only; the reference runs all of them through the layer."""
    drafts = {}
    for many in (eagle_module._MANY_ROWS, 10**9):
        monkeypatch.setattr(eagle_module, "_MANY_ROWS", many)
        drafter, prompt = make_eagle(), random_text(num_prompt_tokens, seed=3)
        loop = DecodeLoop(TARGET, drafter)
        request = loop.start(prompt, GenerationParams(24, 3, SamplingParams(1.0)))
        loop.step([request])
        keys = drafter._cache.block(request.slot)[:, :, :, : drafter._cache.lengths[request.slot]].clone()
        while request.finish_reason is None:
            loop.step([request])
        drafts[many] = keys, request.output_ids, request.stats.accepted
    (keys, *made), (wanted_keys, *wanted) = drafts.values()
    torch.testing.assert_close(keys, wanted_keys, atol=1e-5, rtol=1e-5)
    assert made == wanted


# Files


@pytest.fixture
def saved(eagle, tmp_path):
    eagle.save(tmp_path / "drafter")
    return tmp_path / "drafter"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_file_holds_the_published_names_and_nothing_of_the_target(saved):
    assert set(load_file(saved / "model.safetensors")) == {
        "fc.weight",
        *(f"layers.0.self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
        "layers.0.post_attention_layernorm.weight",
    }


def test_loading_and_saving_keeps_every_bit_and_every_unknown_field(saved, tmp_path):
    edit_config(saved, some_field_of_theirs={"a": 1})
    load_drafter(saved, TARGET).save(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "onlinespec.json"):
        before, after = (folder / name for folder in (saved, tmp_path / "again"))
        if name.endswith("json"):
            assert json.loads(before.read_text()) == json.loads(after.read_text())
        else:
            assert before.read_bytes() == after.read_bytes()


def test_an_embedding_in_the_file_is_kept_and_not_used(saved, tmp_path):
    embedding = torch.full_like(TARGET.decoder.embedding_VD, 7.0)
    edit_tensors(saved, lambda tensors: tensors.update({"embed_tokens.weight": embedding}))
    drafter = load_drafter(saved, TARGET)
    assert "embed_tokens.weight" not in drafter.weights.params
    drafter.save(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")["embed_tokens.weight"], embedding)
    assert not (TARGET.decoder.embedding_VD == 7.0).any()


def test_a_bias_of_the_file_learns_and_is_saved(tmp_path):
    make_eagle(has_bias=True).save(tmp_path / "drafter")
    drafter = load_drafter(tmp_path / "drafter", TARGET)
    params = leaves(drafter)
    drafter.loss(params, drafter.batch([record(trace_of(random_text(20)), 5, 7)])).total.backward()
    assert params["fc.bias"].grad.abs().sum() > 0
    drafter.save(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")["fc.bias"], params["fc.bias"].detach())


def test_a_half_precision_file_learns_in_float32_and_stays_half_precision(saved, tmp_path):
    edit_tensors(saved, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    drafter = load_drafter(saved, TARGET)
    assert all(p.dtype == torch.float32 for p in drafter.weights.params.values())
    drafter.save(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (saved, tmp_path / "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "drafter vocab_size 300 != target vocab_size 288"),
        ({"hidden_size": 64}, "drafter hidden_size 64 != target hidden_size 32"),
        ({"vocab_size": None}, "has no vocab_size"),
    ],
)
def test_a_drafter_for_another_shape_is_refused_with_both_values(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_drafter(saved, TARGET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": None}, "has no num_attention_heads"),
        ({"num_attention_heads": 0}, r"config.json says \(0, 32\)"),
        ({"num_attention_heads": "two"}, "config.json: .*'two'"),
        ({"intermediate_size": [64]}, "config.json: .*list"),
        ({"vocab_size": [288]}, r"drafter vocab_size \[288\] != target vocab_size 288"),
        ({"rope_theta": "wide"}, "config.json: .*'wide'"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "config.json: rotary scaling 'spiral' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "config.json: .*factor"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "config.json: .*'two'"),
        ({"rope_scaling": 2.0}, "config.json: .*2.0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_the_file_and_the_reason(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_drafter(saved, TARGET)


def test_heads_need_not_divide_the_hidden_size(tmp_path):
    target = load_target(save_tiny(tmp_path / "target", "qwen3", num_attention_heads=6, head_dim=24))
    Eagle.fresh(target).save(tmp_path / "eagle")
    assert load_drafter(tmp_path / "eagle", target).weights.params["layers.0.self_attn.q_proj.weight"].shape[0] == 144


def test_a_drafter_trained_for_another_target_is_refused_with_both_fingerprints(saved):
    with pytest.raises(ValueError, match="trained for target random-0, this target is other"):
        load_drafter(saved, replace(TARGET, fingerprint="other"))
    (saved / "onlinespec.json").unlink()
    assert load_drafter(saved, replace(TARGET, fingerprint="other")).weights.version == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.0.mlp.up_proj.weight"), "missing, the first is layers.0.mlp.up_proj.weight"),
        (lambda t: t.update({"layers.0.input_layernorm.weight": torch.ones(32)}), "layers.0.input_layernorm.weight"),
        (lambda t: t.update({"fc.weight": torch.ones(32, 32)}), r"fc.weight has shape \(32, 32\).*\(32, 64\)"),
        (lambda t: t["fc.weight"].fill_(torch.nan), "fc.weight holds values that are not finite"),
    ],
    ids=["missing", "unknown", "misshapen", "nan"],
)
def test_broken_tensors_are_refused_by_name(saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises(ValueError, match=message):
        load_drafter(saved, TARGET)


def test_a_file_cut_short_is_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        load_drafter(saved, TARGET)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_drafts_and_learns_for_a_target_in_half_precision(tmp_path, dtype):
    target = load_target(save_tiny(tmp_path), dtype=dtype)
    drafter = Eagle.fresh(target)
    learning = InlineLearning(
        drafter, make_learner("online_gradient", 1e-3), LearnConfig(min_interval=8, budget=float("inf"))
    )
    request = DecodeLoop(target, drafter, learning).complete([1, 2, 3], GenerationParams(max_new_tokens=30))
    assert request.stats.drafted > 0
    assert learning.num_rounds > 1
    assert not learning.is_frozen
    assert all(p.dtype == torch.float32 for p in drafter.weights.params.values())


def test_gradients_from_bfloat16_products_point_where_the_plain_ones_do(eagle):
    text = random_text(40)
    batch = eagle.batch([record(trace_of(text), 8, 30)])

    def gradient():
        params = leaves(eagle)
        grads = torch.autograd.grad(eagle.loss(params, batch).total, list(params.values()))
        return torch.cat([grad.flatten() for grad in grads])

    plain = gradient()
    eagle._product = bf16_matmul
    assert torch.cosine_similarity(gradient(), plain, dim=0) > 0.99
