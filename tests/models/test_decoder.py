"""Our forward against transformers', and against itself: the same position has the same bits in any company."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import save_tiny, tiny_model
from torch import Tensor

from onlinespec.config import MAX_DRAFT_TOKENS
from onlinespec.models.decoder import Decoder
from onlinespec.models.kv_cache import PAD, KVCache
from onlinespec.models.linear import PlainLinear, can_pack
from onlinespec.models.loading import load_target

MIXED = ["sliding_attention", "full_attention"]
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
SHAPES = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 24}),
    "qwen2-mixed-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "layer_types": MIXED}),
    "qwen3-mixed-windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": MIXED}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 11}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-window-partly-turning": ("phi3", {"sliding_window": 17, "rope_parameters": PARTIAL}),
    "llama3-scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear-scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "yarn-scaling": ("qwen3", {"rope_parameters": YARN}),
    "dynamic-scaling": ("llama", {"rope_parameters": DYNAMIC}),
    "longrope-scaling": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}),
    # What a family's own code does not look at must not count with us either.
    "llama-told-of-windows": ("llama", {"sliding_window": 9, "layer_types": MIXED}),
    "mistral-told-of-layers": ("mistral", {"sliding_window": 11, "layer_types": MIXED}),
    "phi3-told-of-layers": ("phi3", {"sliding_window": 11, "layer_types": MIXED}),
    "llama-told-to-turn-in-part": ("llama", {"rope_parameters": PARTIAL}),
    "mistral-told-to-turn-in-part": ("mistral", {"sliding_window": None, "rope_parameters": PARTIAL}),
    "qwen2-told-to-turn-in-part": ("qwen2", {"rope_parameters": PARTIAL}),
    "qwen3-told-to-turn-in-part": ("qwen3", {"rope_parameters": PARTIAL}),
}
PLACES = (0, 15, 28, 31, 32, 186, 220, 508, 511, 690)  # around the borders of padding and of torch's blocks of keys

# Hidden size, intermediate size, query heads, key-value heads. What the last four add once had other bits in company:
# four and more query heads to a key-value head behind some 190 keys; a single key-value head, or an odd number of query
# heads to one, with two threads; products of more than 1,024 columns. With PlainLinear one row usually has other bits
# than eight in any of these shapes.
BIT_SIZES = [(96, 172, 4, 2), (256, 768, 8, 2), (320, 861, 5, 1), (64, 250, 4, 4), (64, 1376, 4, 2)]

BIT_SHAPES = [*((sizes, 0) for sizes in BIT_SIZES), (BIT_SIZES[0], 33), (BIT_SIZES[1], 187)]  # and a layer's window


IN_FULL = ("llama-tied", "llama-all-heads", "qwen3-tied", "qwen2-mixed-windows", "mistral", "linear-scaling")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.full if n in IN_FULL else ()) for n in SHAPES]
)
def pair(request, tmp_path_factory):
    """transformers' model and our decoder from the same files."""
    family, overrides = SHAPES[request.param]
    folder = save_tiny(tmp_path_factory.mktemp(request.param), family, **overrides)
    return tiny_model(family, **overrides), load_target(folder).decoder


@pytest.fixture(scope="module", params=BIT_SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def decoder(request, tmp_path_factory) -> Decoder:
    (hidden, intermediate, heads, kv_heads), window = request.param
    windows = {"use_sliding_window": True, "sliding_window": window, "layer_types": MIXED} if window else {}
    folder = save_tiny(
        tmp_path_factory.mktemp("bits"),
        "qwen3",
        **windows,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
    )
    return load_target(folder).decoder


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 288, (count,), generator=torch.Generator().manual_seed(seed))


def expected(model, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        output = model(input_ids=ids[None], output_hidden_states=True)
    return output.logits[0], tuple(states[0] for states in output.hidden_states)


def run(decoder: Decoder, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits of all positions, computed piece by piece with the cache."""
    cache = decoder.new_cache()
    cache.take(0, len(ids))
    return torch.cat([decoder.forward(part, [0], [len(part)], cache).logits_MV for part in ids.split(pieces)])


@pytest.mark.parametrize(
    "pieces",
    [[40], pytest.param([1] * 40, marks=pytest.mark.full), [7, 1, 20, 12]],
    ids=["at once", "one by one", "in pieces"],
)
def test_logits_equal_transformers(pair, pieces):
    model, decoder = pair
    ids = ids_of(40)
    torch.testing.assert_close(run(decoder, ids, pieces), expected(model, ids)[0], atol=1e-4, rtol=0)


def test_logits_equal_transformers_after_crop(pair):
    model, decoder = pair
    ids, other = ids_of(40), ids_of(25, seed=1)
    cache = decoder.new_cache()
    cache.take(0, 64)
    decoder.forward(torch.cat([ids[:15], other]), [0], [40], cache)
    cache.crop(0, 15)
    logits = decoder.forward(ids[15:], [0], [25], cache).logits_MV
    torch.testing.assert_close(logits, expected(model, ids)[0][15:], atol=1e-4, rtol=0)


def test_logits_equal_transformers_in_a_ragged_batch(pair):
    model, decoder = pair
    texts = [ids_of(n, seed=n) for n in (5, 33, 18)]
    counts = [1, 8, 5]
    cache = decoder.new_cache()
    for slot, ids in enumerate(texts):
        cache.take(slot, len(ids))
        decoder.forward(ids[: -counts[slot]], [slot], [len(ids) - counts[slot]], cache, num_logits=[0])
    new = torch.cat([ids[-count:] for ids, count in zip(texts, counts, strict=True)])
    logits = decoder.forward(new, [0, 1, 2], counts, cache).logits_MV
    wanted = torch.cat([expected(model, ids)[0][-count:] for ids, count in zip(texts, counts, strict=True)])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_states_equal_transformers_by_layer(pair):
    """Id n is the state after n layers; transformers' last entry is the final state, after the norm."""
    model, decoder = pair
    ids = ids_of(20)
    cache = decoder.new_cache()
    cache.take(0, 20)
    output = decoder.forward(ids, [0], [20], cache, aux_layer_ids=(0, 1, 2))
    before_norm: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0][0]))
    _, states = expected(model, ids)
    hook.remove()
    assert sorted(output.features.aux) == [0, 1, 2]
    for layer, wanted in enumerate([*states[:2], *before_norm]):
        torch.testing.assert_close(output.features.aux[layer], wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features.final_SD, states[-1], atol=1e-4, rtol=0)
    assert torch.equal(decoder.head(output.features.final_SD), output.logits_MV)


def test_only_the_wanted_rows_get_logits(pair):
    _, decoder = pair
    ids = ids_of(30)
    cache = decoder.new_cache()
    for slot in (0, 1):
        cache.take(slot, 30)
    full = decoder.forward(ids, [0, 1], [10, 20], cache).logits_MV
    for slot in (0, 1):
        cache.crop(slot, 0)
    some = decoder.forward(ids, [0, 1], [10, 20], cache, num_logits=[0, 3]).logits_MV
    assert torch.equal(some, full[-3:])


def test_wrong_counts_and_a_full_cache_are_refused_before_anything_is_written(pair):
    _, decoder = pair
    cache = decoder.new_cache()
    cache.take(0, PAD)
    with pytest.raises(ValueError, match=r"\[3\] do not add up to 5"):
        decoder.forward(ids_of(5), [0], [3], cache)
    with pytest.raises(ValueError, match=f"{PAD} tokens; {PAD + 1} more do not fit"):
        decoder.forward(ids_of(PAD + 1), [0], [PAD + 1], cache)
    assert cache.lengths[0] == 0


def test_rows_that_are_not_there_and_a_slot_named_twice_are_refused(pair):
    _, decoder = pair
    cache = decoder.new_cache()
    cache.take(0, PAD)
    for wanted in (-1, 6):
        with pytest.raises(ValueError, match=rf"num_logits \[{wanted}\] must lie between 0 and the counts \[5\]"):
            decoder.forward(ids_of(5), [0], [5], cache, num_logits=[wanted])
    with pytest.raises(ValueError, match=r"slots \[0, 0\] name one twice"):
        decoder.forward(ids_of(5), [0, 0], [2, 3], cache)
    assert cache.lengths[0] == 0


def test_bfloat16_runs(tmp_path):
    decoder = load_target(save_tiny(tmp_path), dtype="bfloat16").decoder
    assert run(decoder, ids_of(12), [8, 4]).isfinite().all()


# --- positions ------------------------------------------------------------------------------------------------------


STRETCHED = {
    "dynamic": ("llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 32},
        },
    ),
}


@pytest.mark.parametrize("count", [20, 32, 33, 100])
@pytest.mark.parametrize("name", STRETCHED)
def test_a_text_as_long_as_its_request_can_become_turns_as_in_transformers(name, count, tmp_path):
    family, overrides = STRETCHED[name]
    folder = save_tiny(tmp_path, family, **overrides)
    model, decoder = tiny_model(family, **overrides), load_target(folder).decoder
    assert decoder.config.max_positions == 128
    ids = ids_of(count)
    torch.testing.assert_close(run(decoder, ids, [count]), expected(model, ids)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", STRETCHED)
def test_a_position_turns_the_same_whatever_was_read_or_cropped_before(name, tmp_path):
    family, overrides = STRETCHED[name]
    decoder = load_target(save_tiny(tmp_path, family, **overrides)).decoder
    ids, wrong = ids_of(60), ids_of(9, seed=1)
    cache = decoder.new_cache()
    cache.take(0, 100)
    cache.take(1, 100)
    steady = torch.cat([decoder.forward(part, [0], [len(part)], cache).logits_MV for part in ids.split(15)])
    pieces = []
    for part in ids.split(15):  # drafts that reach beyond where the scaling changes, and are cropped
        length = cache.lengths[1]
        decoder.forward(torch.cat([part[:7], wrong]), [1], [16], cache)
        cache.crop(1, length)
        pieces.append(decoder.forward(part, [1], [15], cache).logits_MV)
    assert torch.equal(torch.cat(pieces), steady)


@pytest.mark.parametrize(
    ("family", "overrides", "written"),
    [
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
            {"rope_scaling": {"type": "linear", "factor": 2.5}},
        ),
        ("llama", {"rope_parameters": DYNAMIC}, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
        ("qwen3", {"rope_parameters": YARN}, {"rope_scaling": {k: YARN[k] for k in YARN if k != "rope_theta"}}),
        (
            "phi3",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512},
            {"rope_scaling": {"type": "longrope"} | {k: LONGROPE[k] for k in ("short_factor", "long_factor")}},
        ),
    ],
    ids=["llama3", "linear", "dynamic", "yarn", "longrope"],
)
def test_scalings_as_published_configs_spell_them_are_read(family, overrides, written, tmp_path):
    folder = save_tiny(tmp_path, family, **overrides)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": theta} | written))
    ids = ids_of(40)
    logits = run(load_target(folder).decoder, ids, [40])
    torch.testing.assert_close(logits, expected(tiny_model(family, **overrides), ids)[0], atol=1e-4, rtol=0)


def test_only_so_many_tables_are_kept_and_an_old_length_comes_back(tmp_path):
    decoder = load_target(save_tiny(tmp_path, "llama", max_position_embeddings=32, rope_parameters=DYNAMIC)).decoder
    first = run(decoder, ids_of(40), [40])
    for count in range(41, 61):
        run(decoder, ids_of(count), [count])
    assert len(decoder._rotary._tables) <= 8
    assert torch.equal(run(decoder, ids_of(40), [40]), first)


# --- bits -----------------------------------------------------------------------------------------------------------

exact = pytest.mark.skipif(not can_pack(), reason="this processor has no prepacked products; the tie rule serves there")


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.full), 2], ids=["1 thread", "2 threads"])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run_unblocked(decoder: Decoder, ids: Tensor, cache: KVCache | None = None, slot: int = 0) -> Tensor:
    """Logits of all positions, in pieces too short to fill a block: each row attends alone, as in verification."""
    if cache is None:
        cache = decoder.new_cache()
        cache.take(slot, len(ids))
    return torch.cat([decoder.forward(part, [slot], [len(part)], cache).logits_MV for part in ids.split(PAD - 1)])


@exact
def test_a_position_has_the_same_bits_alone_and_among_eight_rows(decoder, num_threads):
    ids = ids_of(700)
    cache = decoder.new_cache()
    cache.take(0, 700)
    one_after_the_other = run_unblocked(decoder, ids, cache)
    for place in PLACES:
        for count in (1, 5, 8):
            cache.lengths[0] = place  # keys and values of all positions are there; only these are computed again
            logits = decoder.forward(ids[place : place + count], [0], [count], cache).logits_MV
            assert torch.equal(logits, one_after_the_other[place : place + count]), (place, count)


@exact
def test_a_prompt_in_pieces_that_fill_no_block_has_the_same_bits(decoder, num_threads):
    ids = ids_of(300)
    assert torch.equal(run(decoder, ids, [1, 37, 2, 40, 47, 32, 31, 33, 32, 32, 13]), run_unblocked(decoder, ids))


@exact
def test_a_prompt_cut_between_blocks_has_the_same_bits(decoder, num_threads):
    ids = ids_of(300)
    assert torch.equal(run(decoder, ids, [PAD, 3 * PAD, 5 * PAD, 12]), run(decoder, ids, [300]))


@pytest.mark.parametrize("count", [PAD, 3 * PAD + 5])
def test_blocks_attend_as_rows_alone_do(decoder, count):
    ids = ids_of(count)
    torch.testing.assert_close(run(decoder, ids, [count]), run_unblocked(decoder, ids), atol=1e-4, rtol=0)


@exact
def test_a_block_has_the_same_bits_in_a_mixed_batch(decoder, num_threads):
    ids, other = ids_of(2 * PAD), ids_of(100, seed=1)
    cache = decoder.new_cache()
    for slot in (0, 1):
        cache.take(slot, 100)
    mixed = decoder.forward(torch.cat([other, ids]), [0, 1], [100, 2 * PAD], cache).logits_MV
    assert torch.equal(mixed[100:], run(decoder, ids, [2 * PAD]))


def test_verification_never_fills_a_block():
    assert MAX_DRAFT_TOKENS + 1 < PAD


@exact
def test_a_position_has_the_same_bits_after_wrong_drafts_were_cropped(decoder, num_threads):
    ids, wrong = ids_of(230), ids_of(7, seed=1)
    untroubled = run_unblocked(decoder, ids)
    cache = decoder.new_cache()
    cache.take(0, 240)
    run_unblocked(decoder, ids[:185], cache)
    for place in range(185, 230):
        decoder.forward(wrong, [0], [7], cache)
        cache.crop(0, place)
        logits = decoder.forward(ids[place : place + 1], [0], [1], cache).logits_MV
        assert torch.equal(logits[0], untroubled[place]), place


@exact
def test_a_position_has_the_same_bits_in_a_mixed_batch(decoder, num_threads):
    ids, other = ids_of(300), ids_of(500, seed=1)
    alone = run_unblocked(decoder, ids)
    cache = decoder.new_cache()
    for slot, (text, done) in enumerate([(other, 480), (ids, 290), (other, 3)]):
        cache.take(slot, 600)
        run_unblocked(decoder, text[:done], cache, slot)
    new = torch.cat([other[480:500], ids[290:295], other[3:4]])
    mixed = decoder.forward(new, [0, 1, 2], [20, 5, 1], cache).logits_MV
    assert torch.equal(mixed[20:25], alone[290:295])


@exact
def test_the_packed_path_is_the_default_and_close_to_the_plain_one(tmp_path):
    folder = save_tiny(tmp_path)
    packed, plain = load_target(folder).decoder, load_target(folder, make_linear=PlainLinear).decoder
    assert packed.make_linear is not PlainLinear
    ids = ids_of(50)
    torch.testing.assert_close(run(packed, ids, [50]), run(plain, ids, [50]), atol=1e-4, rtol=0)
