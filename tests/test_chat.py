"""Formats and the chat template: rows -> examples -> token ids."""

import math
from dataclasses import replace

import pytest
from common import FAMILIES, load_tokenizer
from common import case as golden_case

from jaxalign.data.chat import Encoded, encode, encode_prompt, render, special_prefix
from jaxalign.data.formats import Example, RowError, detect, extract_prompt
from jaxalign.data.formats.hh import hh
from jaxalign.data.formats.pairs import pairs

USER = {"role": "user", "content": "cloud teach glass"}
GOOD = {"role": "assistant", "content": "prompt lemon clear"}
BAD = {"role": "assistant", "content": "bridge kind"}
SYSTEM = {"role": "system", "content": "keep light"}


@pytest.fixture(scope="module")
def tokenizers():
    return {family: load_tokenizer(family) for family in FAMILIES}


@pytest.fixture
def llama(tokenizers):
    return tokenizers["llama"]


def golden(family, name):
    return golden_case(family, name)[0]["data"]


def one(tokenizer, example, **options):
    (result,) = encode(tokenizer, [example], **options)
    return result


# ---- formats


def test_extract_prompt_is_trls():
    for case in golden("llama", "data_conversions")["extract_prompt"]:
        prompt, chosen, rejected = extract_prompt(case["in"]["chosen"], case["in"]["rejected"])
        assert {"prompt": prompt, "chosen": chosen, "rejected": rejected} == case["out"]


def test_extract_prompt_keeps_the_last_item_of_a_side_that_begins_the_other():
    assert extract_prompt([USER], [USER, GOOD]) == ([], [USER], [USER, GOOD])


def test_pairs_reads_every_way_to_give_the_prompt():
    expected = Example([USER], ([GOOD], [BAD]))
    explicit = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert pairs(explicit) == pairs({**whole, "prompt": [USER]}) == expected
    assert pairs(whole) == replace(expected, conversation=True)
    assert pairs({**whole, "prompt": USER["content"], "score_chosen": math.nan, "extra": None}) == expected
    text = {"prompt": "a b ", "chosen": "c", "rejected": "d"}
    assert pairs(text) == Example("a b ", ("c", "d"))
    assert pairs({"chosen": "a b c", "rejected": "a b d"}) == Example("a b", (" c", " d"))


def test_pairs_leaves_out_the_columns_that_a_table_filled_with_none():
    filled = {**GOOD, "tool_calls": None}
    assert pairs({"prompt": [USER], "chosen": [filled], "rejected": [BAD]}).responses[0] == [GOOD]


BAD_ROWS = {
    "no chosen column": {"prompt": "a", "rejected": "b"},
    "chosen is None": {"prompt": "a", "chosen": None, "rejected": "b"},
    "rejected is NaN": {"prompt": "a", "chosen": "b", "rejected": math.nan},
    "rejected is a number": {"prompt": "a", "chosen": "b", "rejected": 3},
    "rejected is a boolean": {"prompt": "a", "chosen": "b", "rejected": True},
    "rejected is an object": {"prompt": "a", "chosen": "b", "rejected": {"content": "c"}},
    "prompt is None": {"prompt": None, "chosen": "b", "rejected": "c"},
    "prompt is empty or blank": {"prompt": " ", "chosen": "b", "rejected": "c"},
    "rejected is empty or blank": {"prompt": "a", "chosen": "b", "rejected": "\n "},
    "chosen is an empty list": {"prompt": [USER], "chosen": [], "rejected": [BAD]},
    "chosen and rejected are equal": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "chosen and rejected are of different kinds": {"prompt": "a", "chosen": "b", "rejected": [BAD]},
    "prompt and responses are of different kinds": {"prompt": "a", "chosen": [GOOD], "rejected": [BAD]},
    "no common prompt": {"chosen": "b c", "rejected": "d e"},
    "chosen holds something that is no message": {"prompt": [USER], "chosen": ["b"], "rejected": [BAD]},
    "chosen has a message without text": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": None}],
        "rejected": [BAD],
    },
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_pairs_says_why_a_row_cannot_be_read(reason):
    with pytest.raises(RowError) as error:
        pairs(BAD_ROWS[reason])
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "row, reason",
    [
        # The system message is missing on one side, so nothing is common; or an explicit prompt is not the sides' own.
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]}, "no common prompt"),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "wrong roles"),
        ({"prompt": [USER, SYSTEM], "chosen": [GOOD], "rejected": [BAD]}, "wrong roles"),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "wrong roles"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "wrong roles"),
        ({"prompt": [USER], "chosen": [{"role": "bot", "content": "a"}], "rejected": [BAD]}, "wrong roles"),
        # Sides that part before their last turn would train on the user's words.
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "wrong roles"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "wrong roles"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "no common prompt"),
        ({"prompt": [USER], "chosen": [{**GOOD, "content": " "}], "rejected": [BAD]}, "chosen is empty or blank"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "chosen and rejected are equal"),
        ({"chosen": "a b", "rejected": "a b c"}, None),
        (["a"], "not a JSON object"),
        (None, "not a JSON object"),
    ],
)
def test_pairs_refuses_wrong_dialogues(row, reason):
    if reason is None:
        assert pairs(row).prompt
        return
    with pytest.raises(RowError) as error:
        pairs(row)
    assert error.value.reason == reason


def transcript(*turns):
    return "".join(f"\n\n{who}: {said}" for who, said in turns)


def test_hh_reads_transcripts_into_chat_messages():
    history = [("Human", "hi"), ("Assistant", " yes \n"), ("Human", "why?\n\nReally")]
    row = {name: transcript(*history, ("Assistant", f"{name} it is")) for name in ("chosen", "rejected")}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why?\n\nReally"},
    ]
    sides = tuple([{"role": "assistant", "content": f"{name} it is"}] for name in ("chosen", "rejected"))
    assert hh(row) == Example(messages, sides, conversation=True)
    unpaired = {"prompt": transcript(*history) + "\n\nAssistant:", "completion": " chosen it is", "label": False}
    assert hh(unpaired) == Example(messages, sides[:1], label=False)


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        ([("Human", "a"), ("Assistant", "b")], [("Human", "a"), ("Assistant", "")], "rejected is empty or blank"),
        ([("Human", "a"), ("Assistant", "b")], [("Human", "x"), ("Assistant", "c")], "the histories differ"),
        ([("Human", "a"), ("Assistant", "b")], [("Human", "a"), ("Assistant", "b")], "chosen and rejected are equal"),
        ([("Human", "a"), ("Assistant", "b")], [("Human", "a")], "wrong roles"),
        (
            [("Human", "a"), ("Assistant", "b Human: c")],
            [("Human", "a"), ("Assistant", "d")],
            "a turn holds 'Human:' or 'Assistant:'",
        ),
        (
            [("Human", "a"), ("Human", "b"), ("Assistant", "c")],
            [("Human", "a"), ("Human", "b"), ("Assistant", "d")],
            "wrong roles",
        ),
        (
            [("Human", ""), ("Assistant", "c")],
            [("Human", ""), ("Assistant", "d")],
            "a turn of the history is blank",
        ),
    ],
)
def test_hh_says_why_a_pair_cannot_be_read(chosen, rejected, reason):
    with pytest.raises(RowError) as error:
        hh({"chosen": transcript(*chosen), "rejected": transcript(*rejected)})
    assert error.value.reason == reason


def test_detect_tells_transcripts_from_pairs():
    dialogue = transcript(("Human", "a"), ("Assistant", "b"))
    assert detect({"chosen": dialogue, "rejected": dialogue}) == "hh"
    assert detect({"prompt": "a", "chosen": dialogue, "rejected": dialogue}) == "pairs"
    assert detect({"chosen": [USER], "rejected": [USER]}) == "pairs"
    assert detect({"chosen": None, "rejected": "a"}) is None
    assert detect({"question": "a"}) is None and detect("text") is None


# ---- tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["dpo_conversational", "dpo_standard", "dpo_implicit_prompt"])
def test_tokens_are_trls(tokenizers, family, case):
    data = golden(family, "data_tokenization")[case]
    encoded = encode(tokenizers[family], [pairs(row) for row in data["rows"]])
    for pair, expected in zip(encoded, data["tokenized"], strict=True):
        assert pair.prompt_length == len(expected["prompt_ids"])
        assert pair.sequences[0] == expected["prompt_ids"] + expected["chosen_ids"]
        assert pair.sequences[1] == expected["prompt_ids"] + expected["rejected_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_whole_and_the_turn_end_is_scored(tokenizers, family):
    tokenizer = tokenizers[family]
    pair = one(tokenizer, Example([SYSTEM, USER], ([GOOD], [BAD])))
    assert pair.sequences[0] == tokenizer.apply_chat_template([SYSTEM, USER, GOOD])["input_ids"]
    response = tokenizer.decode(pair.sequences[0][pair.prompt_length :])
    assert response == GOOD["content"] + "<|im_end|>\n"
    assert tokenizer.eos_token_id in pair.sequences[0][pair.prompt_length :]


def test_one_bos_when_template_and_tokenizer_both_write_one(llama):
    bos = llama.bos_token_id
    assert special_prefix(llama) == [bos]
    for example in (
        Example([USER], ([GOOD], [BAD])),
        Example("cloud teach ", ("glass", "kind")),
        Example(llama.bos_token + "cloud teach ", ("glass", "kind")),
    ):
        pair = one(llama, example)
        assert pair.sequences[0].count(bos) == pair.sequences[1].count(bos) == 1 and pair.sequences[0][0] == bos
    twice = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    assert one(llama, Example([USER], ([GOOD], [BAD])), chat_template=twice).sequences[0].count(bos) == 1
    assert encode_prompt(llama, [USER]).count(bos) == encode_prompt(llama, "cloud").count(bos) == 1


def test_no_bos_is_invented(tokenizers):
    assert special_prefix(tokenizers["qwen2"]) == []
    text = "cloud teach"
    assert tokenizers["qwen2"].decode(encode_prompt(tokenizers["qwen2"], text)) == text


def test_a_token_that_merges_across_the_border_belongs_to_the_response(llama):
    # "cloud teach " + "glass": the blank merges into " g", so the prompt ends one token earlier than it does alone.
    alone = encode_prompt(llama, "cloud teach ")
    pair = one(llama, Example("cloud teach ", ("glass", "kind")))
    assert pair.prompt_length == len(alone) - 1
    whole = llama("cloud teach glass" + llama.eos_token, add_special_tokens=False)["input_ids"]
    assert pair.sequences[0] == special_prefix(llama) + whole
    assert llama.decode(pair.sequences[0][pair.prompt_length :]) == " glass" + llama.eos_token


def test_a_border_that_only_one_side_merges_across_is_cut_alike_on_both(llama):
    # The blank merges into " g" but stays apart from "1".
    alone = encode_prompt(llama, "cloud teach ")
    assert one(llama, Example("cloud teach ", ("1", "2"))).prompt_length == len(alone)
    for chosen, rejected in (("glass", "1"), ("1", "glass")):
        pair = one(llama, Example("cloud teach ", (chosen, rejected)))
        assert pair.prompt_length == len(alone) - 1
        assert pair.sequences[0][: pair.prompt_length] == pair.sequences[1][: pair.prompt_length] == alone[:-1]


def test_eos_ends_plain_text_once(llama):
    eos = llama.eos_token_id
    pair = one(llama, Example("cloud teach ", ("glass" + llama.eos_token, "kind")))
    assert pair.sequences[0].count(eos) == pair.sequences[1].count(eos) == 1
    assert pair.sequences[0][-1] == pair.sequences[1][-1] == eos


def test_one_bad_row_does_not_stop_the_others(llama):
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    good, bad = Example([USER], ([GOOD], [BAD])), Example([SYSTEM, USER], ([GOOD], [BAD]))
    results = encode(llama, [good, bad, good], chat_template=strict)
    assert isinstance(results[0], Encoded) and results[0] == results[2]
    assert isinstance(results[1], RowError) and "no system here" in results[1].detail


# A template like Qwen3's and DeepSeek-R1's: thoughts of earlier turns are left out.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}GENERATION{% endif %}"
)


def test_thoughts_stripped_from_the_history_leave_the_border_right(tokenizers):
    tokenizer = tokenizers["qwen3"]
    earlier = {"role": "assistant", "content": "<think>river</think>ocean"}
    answer = {"role": "assistant", "content": "<think>paper</think>glass"}
    template = THINKING.replace("GENERATION", "")
    pair = one(tokenizer, Example([USER, earlier, USER], ([answer], [BAD])), chat_template=template)
    assert "river" not in tokenizer.decode(pair.sequences[0])
    assert tokenizer.decode(pair.sequences[0][pair.prompt_length :]) == answer["content"] + "<|im_end|>\n"


def test_a_generation_prompt_that_opens_a_thought_is_cut_where_the_texts_part(tokenizers):
    tokenizer = tokenizers["qwen3"]
    pair = one(tokenizer, Example([USER], ([GOOD], [BAD])), chat_template=THINKING.replace("GENERATION", "<think>\n"))
    assert tokenizer.decode(pair.sequences[0][pair.prompt_length :]) == GOOD["content"] + "<|im_end|>\n"


def test_a_template_that_rewrites_the_history_is_an_error_of_the_row(tokenizers):
    rewriting = "{% for m in messages %}{{ '<|im_start|>' ~ messages | length ~ m['content'] }}{% endfor %}"
    result = one(tokenizers["qwen3"], Example([USER], ([GOOD], [BAD])), chat_template=rewriting)
    assert isinstance(result, RowError) and result.reason == "the chat template rewrites the history"


def test_without_a_generation_prompt_the_header_belongs_to_the_prompt(llama):
    headed = (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
        "{% endfor %}"
    )
    pair = one(llama, Example([USER], ([GOOD], [{**BAD, "content": "assistant"}])), chat_template=headed)
    assert llama.decode(pair.sequences[0][pair.prompt_length :]) == GOOD["content"] + "<|im_end|>"
    assert llama.decode(pair.sequences[1][pair.prompt_length :]) == "assistant<|im_end|>"


def test_the_template_sees_a_fixed_date(llama):
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert render(llama, [USER], chat_template=dated) == "26 Jul 2024" + USER["content"]


def test_messages_without_a_template_are_refused_with_the_ways_out(tokenizers):
    bare = load_tokenizer("llama")
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*tokenizer.chat_template"):
        encode(bare, [Example([USER], ([GOOD], [BAD]))])
    with pytest.raises(ValueError, match="chat template cannot be read"):
        encode(bare, [Example([USER], ([GOOD], [BAD]))], chat_template="{% for %}")
