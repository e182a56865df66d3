import json
from functools import cache

import pytest
import rigs
import torch
from rigs import SOFT, hidden_states, other_weights, plain

from onlinespec.config import GenerationParams, SamplingParams
from onlinespec.core import Features, Feedback, RequestInfo, Trace
from onlinespec.drafters import draft_vocab as draft_vocab_module
from onlinespec.drafters.draft_vocab import DraftVocab
from onlinespec.drafters.eagle import Eagle
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.training_rows import TrainingRows
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners.losses import soft_cross_entropy
from onlinespec.models.linear import HalfLinear, PlainLinear, can_pack_half

VOCAB, HIDDEN = 64, 16
HEAD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
STATES = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(1))
TARGET = rigs.random_target()
PROMPTS = [[5, 9, 200, 31, 77, 14, 9], [3], list(range(90, 140))]
GREEDY = SamplingParams()


@cache
def plain_answers(max_new_tokens):
    return [plain(TARGET, prompt, GenerationParams(max_new_tokens)).output_ids for prompt in PROMPTS]


def vocab(tokens=None, head=HEAD, make_linear=PlainLinear):
    return DraftVocab(head, make_linear, tokens)


def listed(some):
    return some.now.draft_to_target.tolist()


def see(some, *requests):
    for token_ids in requests:
        some.begin_request(token_ids)


def test_the_head_has_the_rows_of_the_listed_tokens():
    some = vocab(4)
    see(some, [53, 50, 52, 51])
    torch.testing.assert_close(some.now.head(STATES), (STATES @ HEAD.T)[:, [50, 51, 52, 53]])


@pytest.mark.parametrize("size", [VOCAB, 10 * VOCAB, None])
def test_a_list_as_long_as_the_vocabulary_is_the_vocabulary(size):
    some = vocab(size)
    see(some, [3, 4, 5])
    assert listed(some) == list(range(VOCAB))


def test_a_large_vocabulary_has_a_longer_list():
    assert len(listed(vocab(head=torch.zeros(32_000, 2)))) == 2_000


def test_before_anything_is_seen_low_ids_are_listed():
    assert listed(vocab(8)) == list(range(8))


def test_a_prompts_tokens_are_listed_as_its_request_begins():
    some = vocab(8)
    see(some, [60, 61, 60, 62])
    assert listed(some) == [0, 1, 2, 3, 4, 60, 61, 62]


def test_the_list_follows_the_stream_and_keeps_what_stays_frequent():
    some = vocab(4)
    see(some, *[[10, 11, 12, 13]] * 50)
    assert listed(some) == [10, 11, 12, 13]
    see(some, *[[10, 20, 21, 22]] * 20)
    assert listed(some) == [10, 20, 21, 22]


def test_one_long_ago_yields_to_one_just_now():
    some = vocab(1)
    see(some, [7], [8])
    assert listed(some) == [8]


def test_the_head_is_copied_only_when_the_list_changes():
    some = vocab(4)
    before = some.now
    see(some, [1, 2], [2, 3], [0])  # all listed from the start
    assert some.now is before
    see(some, [9])
    assert some.now is not before


def test_a_list_without_a_token_is_refused():
    with pytest.raises(ValueError, match="a draft vocabulary of 0 tokens"):
        vocab(0)


def test_nothing_is_chosen_before_someone_asks():
    some = vocab(4, make_linear=None)
    see(some, [1], [50], [51])
    with pytest.raises(TypeError):
        some.now  # noqa: B018 - the first who asks makes the product


def test_a_list_can_be_had_that_holds_some_tokens_and_leaves_the_one_to_draft_from():
    some = vocab(4)
    see(some, [50, 51, 51, 52, 52, 53, 53])
    assert some.including([51, 51, 52]) is some.now
    assert some.including([7, 7, 9]).draft_to_target.tolist() in (
        [7, 9, 51, 52],
        [7, 9, 52, 53],
        [7, 9, 51, 53],
    )
    assert listed(some) == [50, 51, 52, 53]


def test_columns_are_places_in_the_list_and_none_if_one_is_missing():
    some = vocab(4)
    see(some, [50, 51, 52, 53])
    assert some.now.target_to_draft([53, 50, 50]).tolist() == [3, 0, 0]
    for other in (0, 49, 54, 63):
        assert some.now.target_to_draft([53, other]) is None


def test_what_traffic_has_brought_is_saved_once_it_is_enough_and_comes_back_as_the_choice():
    some, later = vocab(4), vocab(4)
    see(some, [50, 51, 52, 53])
    assert some.saved() == [], "four tokens are too few to stand for the traffic"
    see(some, [50, 51, 52, 53])
    assert sorted(some.saved()) == [50, 51, 52, 53]
    later.restore(some.saved())
    assert not later.is_cold
    assert listed(later) == [50, 51, 52, 53]
    see(later, *[[10, 11, 12, 13]] * 3)
    assert listed(later) == [10, 11, 12, 13], "newer traffic outweighs it"


def test_saved_tokens_without_a_row_are_left_out():
    some = vocab(4)
    some.restore([50, VOCAB + 7, -1, 51])
    assert {50, 51} <= set(listed(some))


def test_fixed_tokens_are_the_same_whatever_is_seen():
    some = vocab([9, 3, 60, 3])
    assert not some.is_cold
    assert listed(some) == [3, 9, 60]
    see(some, [50, 51, 52] * 9)
    assert listed(some) == listed_ids_of(some.including([50])) == [3, 9, 60]
    assert some.now.target_to_draft([60, 3]).tolist() == [2, 0]
    assert some.saved() == []


def listed_ids_of(tokens):
    return tokens.draft_to_target.tolist()


@pytest.mark.parametrize(
    ("tokens", "words"), [([], "draft tokens are none"), ([3, VOCAB], "3 to 64; give some of 0 to 63"), ([-1], "-1")]
)
def test_fixed_tokens_that_the_head_lacks_are_refused(tokens, words):
    with pytest.raises(ValueError, match=words):
        vocab(tokens)


# In a drafter


def eagle(size):
    """Random weights, drafting from a list of the given size."""
    fresh = Eagle.fresh(TARGET)
    params = other_weights(fresh.weights, seed=1, scale=0.2).params
    return Eagle(TARGET, fresh.config, params, make_linear=PlainLinear, draft_tokens=size)


@pytest.mark.parametrize("size", [1, 8, 40])
def test_answers_are_plain_decodings_whatever_is_listed(size):
    loop = DecodeLoop(TARGET, eagle(size))
    params = GenerationParams(max_new_tokens=24, num_draft_tokens=3)
    assert [loop.complete(prompt, params).output_ids for prompt in PROMPTS] == plain_answers(24)


def proposals(size, sampling, prompts=PROMPTS):
    """Every draft of some requests."""
    drafter, drafts = eagle(size), []
    propose = drafter.propose

    def spy(slots, anchors, *rest):
        drafts.append(propose(slots, anchors, *rest))
        return drafts[-1]

    drafter.propose = spy
    loop = DecodeLoop(TARGET, drafter)
    for prompt in prompts:
        loop.complete(prompt, GenerationParams(max_new_tokens=20, num_draft_tokens=3, sampling=sampling, seed=5))
    return drafts


def test_greedy_drafts_are_of_listed_tokens_only(monkeypatch):
    monkeypatch.setattr(draft_vocab_module, "_COLD", 0)
    drafts = proposals(len(PROMPTS[0]) + 1, GREEDY)
    first = {i for draft in drafts[:5] for i in draft.token_ids_BK.flatten().tolist()}
    assert first <= {*PROMPTS[0], 0, 1}  # its distinct tokens, and unseen ones from below
    assert all(draft.probs_BKV is None for draft in drafts)


def test_while_little_was_seen_greedy_drafts_are_of_all_tokens():
    """A list of what one prompt holds would leave out most of what its answer needs."""
    listed, unlisted = (proposals(size, GREEDY, PROMPTS[:1])[:5] for size in (30, None))
    for some, whole in zip(listed, unlisted, strict=True):
        assert torch.equal(some.token_ids_BK, whole.token_ids_BK)


def test_a_list_is_cold_until_twice_as_many_tokens_were_seen_as_it_holds():
    some = vocab(4)
    see(some, [1, 2, 3], [4, 5, 6, 7])
    assert some.is_cold
    some.observe_tokens([8])
    assert not some.is_cold


def test_sampled_drafts_are_of_all_tokens():
    for some, whole in zip(proposals(4, SOFT), proposals(None, SOFT), strict=True):
        assert torch.equal(some.token_ids_BK, whole.token_ids_BK)


def test_no_list_changes_the_tokens_of_a_seed(monkeypatch):
    monkeypatch.setattr(draft_vocab_module, "_COLD", 0)
    answers = []
    for size in (4, None):
        drafter = eagle(size)
        params = GenerationParams(max_new_tokens=20, num_draft_tokens=3, sampling=SOFT, seed=5)
        answers.append([DecodeLoop(TARGET, drafter).complete(prompt, params).output_ids for prompt in PROMPTS])
    assert answers[0] == answers[1]


def test_fixed_tokens_are_all_that_greedy_drafts_have_and_answers_stay_exact():
    allowed = [5, 9, 31, 77, 200]
    drafts = proposals(allowed, GREEDY)
    assert {i for draft in drafts for i in draft.token_ids_BK.flatten().tolist()} <= {*allowed}
    loop = DecodeLoop(TARGET, eagle(allowed))
    params = GenerationParams(max_new_tokens=24, num_draft_tokens=3)
    assert [loop.complete(prompt, params).output_ids for prompt in PROMPTS] == plain_answers(24)


@pytest.mark.parametrize("name", ["eagle", "small_lm"])
def test_a_saved_drafter_begins_with_the_tokens_of_its_traffic(name, tmp_path):
    drafter = load_drafter(name, TARGET)
    drafter.draft_vocab = DraftVocab(drafter.draft_vocab._head_VD, PlainLinear, 8)
    drafter.draft_vocab.begin_request([60, 61, 62, 63, 64, 65, 66, 67] * 2)
    drafter.save(tmp_path / "d")
    noted = json.loads((tmp_path / "d" / "onlinespec.json").read_text())
    assert noted["draft_tokens"] == "60 61 62 63 64 65 66 67"
    again = load_drafter(tmp_path / "d", TARGET)
    assert again.draft_vocab._num_seen == 16
    assert {*range(60, 68)} <= set(listed(again.draft_vocab))


def test_noted_tokens_that_are_none_are_named_with_the_way_out(tmp_path):
    Eagle.fresh(TARGET).save(tmp_path / "d")
    side = tmp_path / "d" / "onlinespec.json"
    side.write_text(json.dumps(json.loads(side.read_text()) | {"draft_tokens": "5 x"}))
    with pytest.raises(ValueError, match=r"draft_tokens in onlinespec.json is no text of token ids .*leave it out"):
        load_drafter(tmp_path / "d", TARGET)


# Learning


def record(temperature=0.0, num_rows=6, seed=0):
    """A request of random tokens from all over the vocabulary, its last rows to be learned from."""
    ids = torch.randint(256, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    states = hidden_states(TARGET, ids[:-1])
    return Feedback(
        Trace(ids, Features(states), len(states)), 19 - num_rows, num_rows, 2, 0, 0, temperature=temperature
    )


def scored(drafter, *records):
    """Width of the logits that the loss compares, and the target's rows."""
    seen = []

    def spy(logits, target):
        seen.append((logits.shape[-1], target))
        return soft_cross_entropy(logits, target)

    drafter.loss(drafter.weights.params, drafter.batch(records), spy)
    return seen[0]


def test_greedy_rows_learn_over_a_list_that_holds_their_tokens():
    drafter, greedy = eagle(40), record()
    width, target = scored(drafter, greedy)
    listed_ids = drafter.batch([greedy]).tokens.draft_to_target_S
    assert width == len(listed_ids) == 40
    assert listed_ids[target.token_ids_N].tolist() == greedy.trace.token_ids[14:]
    whole = TARGET.decoder.head(greedy.trace.features.final_SD[13:19])
    torch.testing.assert_close(target.probs_NV, whole[:, listed_ids].softmax(-1))


@pytest.mark.skipif(not can_pack_half(), reason="this processor has no prepacked products in bfloat16")
def test_labels_are_the_targets_own_however_roughly_drafts_are_made():
    drafter = Eagle.fresh(TARGET)
    rough = Eagle(TARGET, drafter.config, drafter.weights.params, make_linear=HalfLinear, draft_tokens=40)
    _, exact = scored(eagle(40), record())
    _, same = scored(rough, record())
    torch.testing.assert_close(same.probs_NV, exact.probs_NV)


@pytest.mark.parametrize("records", [[record(1.0)], [record(), record(0.7, seed=1)]], ids=["sampled", "mixed"])
def test_sampled_rows_learn_over_the_vocabulary(records):
    width, target = scored(eagle(40), *records)
    assert width == target.probs_NV.shape[-1] == 288
    assert target.token_ids_N[:6].tolist() == records[0].trace.token_ids[14:]


def test_rows_with_more_tokens_than_the_list_holds_learn_over_the_vocabulary():
    assert scored(eagle(4), record())[0] == 288


def test_replayed_tokens_are_listed_with_the_fresh_ones():
    fresh, old = record(), record(seed=1)
    listed = eagle(40).batch([fresh], [old]).tokens
    assert listed.target_to_draft(fresh.trace.token_ids[14:] + old.trace.token_ids[14:]) is not None


def test_the_loss_of_a_batch_is_its_own_whatever_is_seen_after_it():
    drafter = eagle(40)
    batch = drafter.batch([record()])
    before = drafter.loss(drafter.weights.params, batch).total
    drafter.batch([record(seed=1)])
    for seed in range(5):
        drafter.start(seed, RequestInfo(capacity=30), record(seed=seed).trace.token_ids, Features(torch.zeros(19, 32)))
    assert torch.equal(drafter.loss(drafter.weights.params, batch).total, before)


def test_learning_does_not_change_what_is_drafted_from():
    drafter = eagle(40)
    drafter.start(0, RequestInfo(capacity=30), [1, 2, 3], Features(torch.zeros(2, 32)))
    before = drafter.draft_vocab.now
    drafter.batch([record()])
    assert drafter.draft_vocab.now is before


def test_rows_that_are_only_measured_do_not_choose_what_is_drafted_from():
    """While the list has seen little it is not drafted from yet, and is chosen by what comes until then."""
    measured, other = eagle(40), eagle(40)
    for drafter in (measured, other):
        drafter.draft_vocab.begin_request([1, 2, 3])
        if drafter is measured:
            drafter.rows([drafter.weights.params], drafter.batch([record()]))
        drafter.draft_vocab.observe_tokens(list(range(100, 240)))
    assert torch.equal(measured.draft_vocab.now.draft_to_target_S, other.draft_vocab.now.draft_to_target_S)


def test_over_a_list_that_holds_everything_the_loss_is_the_whole_ones():
    drafter = eagle(None)
    batch = drafter.batch([record()])
    losses = [
        drafter.loss(drafter.weights.params, spans).total for spans in (batch, TrainingRows(batch, drafter._label))
    ]
    torch.testing.assert_close(*losses)
