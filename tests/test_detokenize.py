"""Text from token ids as they come: whole characters, stop strings across token borders, words that are one token."""

import pytest
from common import load_tokenizer

from jaxalign import detokenize
from jaxalign.data import tokenizers

BYTES = tokenizers.byte_tokenizer()
BPE = load_tokenizer("llama")
TEXT = "Hello thé 漢🙂 the end"


def ids_of(text, tokenizer=BYTES):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def looks_for(*strings, tokenizer=BYTES, **options):
    return detokenize.stops(tokenizer, strings, **options)[0]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("strings", [(), ("the end!", "xyz")], ids=["no stop", "stops that never come"])
def test_the_settled_beginnings_grow_by_whole_characters_into_the_text(tokenizer, strings):
    ids, stops = ids_of(TEXT, tokenizer), looks_for(*strings, tokenizer=tokenizer)
    settled = [stops.settled(ids[:n]) for n in range(len(ids) + 1)]
    assert all(later.startswith(earlier) for earlier, later in zip(settled, settled[1:], strict=False))
    assert all(TEXT.startswith(text) and detokenize.UNFINISHED not in text for text in settled)
    assert len(set(settled)) > 8 and stops.text(ids, ended=True) == TEXT
    assert settled[-1] == (TEXT if not strings else "Hello thé 漢🙂 ")


def test_a_character_that_lacks_bytes_is_left_out_unless_the_model_ended_there():
    ids, stops = ids_of("a漢")[:-1], looks_for()
    assert stops.text(ids, ended=False) == "a" and stops.text(ids, ended=True) == "a" + detokenize.UNFINISHED


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("stop", ["lo t", "é 漢", "🙂", "H", "end"])
def test_a_stop_string_is_found_at_the_token_that_completes_it(tokenizer, stop):
    ids, stops = ids_of(TEXT, tokenizer), looks_for(stop, tokenizer=tokenizer)
    naive = next(n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]))
    found = [stops(ids[:n]) for n in range(len(ids) + 1)]
    assert found == [None] * naive + [naive] * (len(ids) + 1 - naive)
    before = TEXT[: TEXT.index(stop)]
    assert all(stops.text(ids[:n], ended=False) == before for n in range(naive, len(ids) + 1))
    # What is settled never shows a part of it.
    assert all(before.startswith(stops.settled(ids[:n])) for n in range(len(ids) + 1))


def test_of_several_stop_strings_the_first_to_be_complete_ends_the_text():
    stops, ids = looks_for("bcdef", "d", "cd"), ids_of("abcdef")
    assert stops(ids) == 4 and stops.text(ids, ended=False) == "ab"


def test_a_stop_string_before_min_new_tokens_does_not_count_one_across_it_does():
    ids = ids_of("ab ab ab")
    assert [looks_for("ab", min_new_tokens=n)(ids) for n in (0, 1, 2, 3, 5, 6, 8, 9)] == [2, 2, 2, 5, 5, 8, 8, None]
    assert looks_for("ab", min_new_tokens=3).text(ids, ended=False) == "ab "


def test_special_tokens_become_stop_ids_and_other_added_ones_are_text():
    stops, ids = detokenize.stops(BPE, ["<|im_end|>", "the", "the"])
    assert ids == [3] and stops.strings == ("the",)
    assert detokenize.stops(BPE, []) == (detokenize.Stops(BPE, ()), [])
    tokenizer = load_tokenizer("llama")
    tokenizer.add_tokens(["</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    stops, ids = detokenize.stops(tokenizer, ["</think>", "<|end|>"])
    assert ids == tokenizer.convert_tokens_to_ids(["<|end|>"]) and stops.strings == ("</think>",)
    whole = tokenizer("Hello</think> the", add_special_tokens=False)["input_ids"]
    (token,) = tokenizer.convert_tokens_to_ids(["</think>"])
    assert token in whole and stops(whole) == whole.index(token) + 1
    assert stops.text(whole, ended=True) == "Hello"
    spelled = [*ids_of("Hello</th", tokenizer), *ids_of("ink> the", tokenizer)]
    assert token not in spelled and stops.text(spelled, ended=True) == "Hello"


@pytest.mark.parametrize("strings", [[""], "text", [3]])
def test_what_is_no_stop_string_is_refused(strings):
    with pytest.raises(ValueError, match="stop is .* expected a sequence of texts that are not empty"):
        detokenize.stops(BPE, strings)


def test_bad_words_are_the_tokens_with_and_without_a_space_before():
    vocab = BPE.get_vocab()
    assert detokenize.bad_ids(BPE, ["th"]) == sorted(vocab[token] for token in ("th", "Ġth") if token in vocab)
    assert detokenize.bad_ids(BPE, ["<|im_end|>", "H"]) == [3, vocab["H"]]  # " H" is two tokens
    with pytest.raises(ValueError, match=r"bad_words: 'Hello there' is \d+ tokens, and only words that are one token"):
        detokenize.bad_ids(BPE, ["H", "Hello there"])
    for words in ("H", ["H", ""]):
        with pytest.raises(ValueError, match="expected a sequence of texts that are not empty"):
            detokenize.bad_ids(BPE, words)
