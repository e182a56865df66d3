import pytest
from checkpoints import END_TOKEN_ID, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from toy import steady
from transformers import PreTrainedTokenizerFast

from onlinespec.engine.detokenizer import TextStream

BYTES = byte_tokenizer()


def merging_tokenizer():
    """Byte-level, with tokens that hold several characters, and tokens that begin or end in mid-character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {decoders.ByteLevel().decode([c]): c for c in alphabet}
    space = byte_of[" "]
    high = "".join(c for c in "ðŁĺĢ")  # the bytes of an emoji, as byte-level vocabularies spell them
    longer = [high[:2], high[2:], f"a{high[:1]}", f"{high[3:]}b", f"{space}the", "ST", "OP", "STOPS", "xSTOPx"]
    vocab = {token: i for i, token in enumerate([*alphabet, *longer])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


MERGING = merging_tokenizer()


def fallback_tokenizer():
    """As Llama 2 has it: words carry their leading space, the first one loses it, and rare characters are bytes."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁the", "▁cat", "s", "▁"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


FALLBACK = fallback_tokenizer()


def ids_of(text):
    return BYTES(text)["input_ids"]


def decode(ids, tokenizer=BYTES):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(ids, stop_strings=(), tokenizer=BYTES, take_every=1):
    """The pieces given out while the tokens come, the final text, and how many tokens it took."""
    text, pieces, taken = TextStream(tokenizer, stop_strings), [], 0
    for taken, token_id in enumerate(ids, start=1):
        if text.push(token_id):
            break
        if taken % take_every == 0:
            pieces.append(text.take())
    text.close()
    pieces.append(text.take())
    return pieces, text.text, taken


SAMPLES = [
    "plain words",
    "smile 😀 and 👩‍👩‍👧 family",
    "中文字符、混合 text",
    "e\u0301 combining n\u0303",
    "\u202eright to left שלום",
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_pieces_never_hold_half_a_character(sample):
    pieces, text, _ = stream(ids_of(sample))
    assert text == "".join(pieces) == sample
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_given_out_with_its_last_byte():
    pieces, _, _ = stream(ids_of("a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_bytes_that_never_become_a_character_show_at_the_end():
    pieces, text, _ = stream(ids_of("ok 😀")[:-1])
    assert pieces[:-1] == ["o", "k", " ", "", "", ""]
    assert text == decode(ids_of("ok 😀")[:-1])
    assert text.endswith("\ufffd")


any_ids = st.lists(st.integers(0, 258), max_size=40)
merging_ids = st.lists(st.one_of(st.integers(0, len(MERGING) - 1), st.integers(250, len(MERGING) - 1)), max_size=40)


@steady
@given(ids=any_ids, take_every=st.integers(1, 7))
def test_the_text_of_any_bytes_is_what_the_tokenizer_decodes(ids, take_every):
    pieces, text, _ = stream(ids, take_every=take_every)
    assert text == "".join(pieces) == decode(ids)


@steady
@given(ids=merging_ids, take_every=st.integers(1, 7))
def test_the_text_of_any_tokens_is_what_the_tokenizer_decodes(ids, take_every):
    pieces, text, _ = stream(ids, tokenizer=MERGING, take_every=take_every)
    assert text == "".join(pieces) == decode(ids, MERGING)


@steady
@given(text=st.text(max_size=30), take_every=st.integers(1, 5))
def test_any_text_comes_out_whole_and_in_whole_characters(text, take_every):
    pieces, final, _ = stream(ids_of(text), take_every=take_every)
    assert final == "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


characters = st.sampled_from(["😀", "é", "中", "a", "▁the", "▁cat", "s", "▁", "<s>"])


@steady
@given(words=st.lists(characters, max_size=20), take_every=st.integers(1, 7))
def test_the_text_of_a_tokenizer_with_byte_fallback_is_what_it_decodes(words, take_every):
    ids = []
    for word in words:
        known = FALLBACK.convert_tokens_to_ids(word)
        ids += list(word.encode()) if known is None else [known]
    pieces, text, _ = stream(ids, tokenizer=FALLBACK, take_every=take_every)
    assert text == "".join(pieces) == decode(ids, FALLBACK)
    assert not any("\ufffd" in piece for piece in pieces)


# Special tokens


def test_special_tokens_never_show():
    ids = [END_TOKEN_ID, *ids_of("a"), END_TOKEN_ID + 1, *ids_of("b"), END_TOKEN_ID + 2]
    pieces, text, _ = stream(ids)
    assert text == "".join(pieces) == "ab"


def test_special_tokens_inside_a_character_do_not_break_it():
    emoji = ids_of("😀")
    pieces, text, _ = stream([*emoji[:2], *[END_TOKEN_ID] * 9, *emoji[2:]])
    assert text == "".join(pieces) == "😀"


def test_an_end_token_adds_no_text_whatever_it_is():
    text = TextStream(BYTES)
    text.push(ids_of("a")[0])
    text.push(ids_of("b")[0], is_end=True)
    text.close()
    assert text.take() == "a"


# Stop strings


@pytest.mark.parametrize(
    ("sample", "stops", "expected"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("STOP", ("STOP",), ""),
        ("STO STOP", ("STOP",), "STO "),
        ("a\n\nb", ("\n\n",), "a"),
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("xyz", ("yz", "y"), "x"),
        ("xabcd", ("bcd", "abcd"), "x"),
        ("xabcd", ("abcd", "bc"), "xa"),
        ("say 停止 now", ("停止",), "say "),
        ("ends with STO", ("STOP",), "ends with STO"),
        ("no stop here", ("STOP", "\n"), "no stop here"),
    ],
)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(sample, stops, expected):
    pieces, text, _ = stream(ids_of(sample), stops)
    assert text == "".join(pieces) == expected


def test_a_stop_string_is_noticed_with_the_token_that_completes_it():
    assert stream(ids_of("one STOP two"), ("STOP",))[2] == len("one STOP")


def test_nothing_of_a_stop_string_is_given_out_while_it_is_spelt():
    pieces, _, _ = stream(ids_of("one STOP"), ("STOP",))
    assert "".join(pieces) == "one "
    assert "S" not in "".join(pieces)


def test_what_only_began_like_a_stop_string_is_given_out_as_soon_as_it_differs():
    pieces, _, _ = stream(ids_of("STx"), ("STOP",))
    assert pieces == ["", "", "STx", ""]


def test_a_stop_string_inside_a_token_cuts_the_token():
    ids = MERGING.convert_tokens_to_ids(["a", "xSTOPx", "b"])
    assert stream(ids, ("STOP",), MERGING)[1:] == ("ax", 2)


def test_a_stop_string_across_tokens_is_found():
    ids = MERGING.convert_tokens_to_ids(["a", "ST", "OP", "b"])
    assert stream(ids, ("TO",), MERGING)[1:] == ("aS", 3)


stop_sets = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@steady
@given(text=st.text("abc", max_size=25), stops=stop_sets, take_every=st.integers(1, 4))
def test_pieces_add_up_to_the_text_before_the_first_stop_string(text, stops, take_every):
    pieces, final, taken = stream(ids_of(text), stops, take_every=take_every)
    complete = next((n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    seen = text if complete is None else text[:complete]
    starts = [seen.find(stop) for stop in stops if stop in seen]
    assert final == "".join(pieces) == (seen[: min(starts)] if starts else text)
    assert taken == len(seen)


@steady
@given(ids=any_ids, stops=stop_sets)
def test_no_stop_string_is_ever_in_the_text(ids, stops):
    pieces, final, _ = stream(ids, stops)
    assert final == "".join(pieces)
    assert not any(stop in final for stop in stops)
    assert decode(ids).startswith(final)


def test_tokens_after_the_end_add_nothing():
    text = TextStream(BYTES, ("b",))
    assert [text.push(i) for i in ids_of("ab")] == [False, True]
    text.push(ids_of("c")[0])
    text.close()
    assert text.take() == text.text == "a"
    assert text.take() == ""
