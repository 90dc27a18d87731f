"""What is scored of a conversation or text (SFT), token for token."""

import itertools

import pytest
from common import FAMILIES, case, load_tokenizer

from jaxalign.data.chat import encode
from jaxalign.data.formats import FORMATS, Example, RowError, convert, detect
from jaxalign.data.templates import TEMPLATES
from jaxalign.data.tokenizers import byte_tokenizer


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, FIRST, SECOND = turn("system", "keep light"), turn("user", "cloud é?"), turn("user", "why?\n")
ANSWERS = turn("assistant", "glass 🌍 <|x|>"), turn("assistant", "<div>\n lemon"), turn("assistant", "ok")
DIALOGUE = [SYSTEM, FIRST, ANSWERS[0], SECOND, ANSWERS[1], FIRST, ANSWERS[2]]
CHAT = Example(DIALOGUE[:-1], (DIALOGUE[-1:],), conversation=True)


def one(tokenizer, example, **options):
    (result,) = encode(tokenizer, [example], **options)
    return result


def runs(tokenizer, encoded):
    """The texts of the runs of scored tokens."""
    pairs = zip(encoded.masks[0], encoded.sequences[0], strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in group]) for scored, group in groups if scored]


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return byte_tokenizer()


# ---- goldens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["sft_messages_assistant_only", "sft_prompt_completion", "sft_text", "kto_conversational"]
)
def test_tokens_and_masks_are_trls(family, name):
    tokenizer = load_tokenizer(family)
    golden = case(family, "data_tokenization")[0]["data"][name]
    kind = "labelled" if name.startswith("kto") else "chats"
    for row, expected in zip(golden["rows"], golden["tokenized"], strict=True):
        (example,) = convert(FORMATS[detect(row, kind)](row), kind)
        found = one(tokenizer, example, train_on="assistant" if kind == "chats" else None)
        if kind == "labelled":
            border, completion = len(expected["prompt_ids"]), expected["completion_ids"]
            assert found.sequences == [expected["prompt_ids"] + completion] and found.prompt_length == border
            assert found.masks == [[False] * border + [True] * len(completion)]
            continue
        assert found.sequences == [expected["input_ids"]]
        # Nothing predicts the first token of a text: TRL shifts its label away, here its mask is False.
        labels = expected.get("labels", [-100, *expected["input_ids"][1:]])
        assert [mask and token for mask, token in zip(found.masks[0], found.sequences[0], strict=True)] == [
            label != -100 and label for label in labels
        ]
        everything = one(tokenizer, example, train_on="all")
        assert everything.masks == [[False] + [True] * (len(expected["input_ids"]) - 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_orpos_tokens_are_trls_but_for_the_second_eos(family):
    tokenizer = load_tokenizer(family)
    golden = case(family, "data_tokenization")[0]["data"]["orpo_conversational"]
    for row, expected in zip(golden["rows"], golden["tokenized"], strict=True):
        found = one(tokenizer, FORMATS["pairs"](row))
        for side, ids, mask in zip(("chosen", "rejected"), found.sequences, found.masks, strict=True):
            assert [*ids, tokenizer.eos_token_id] == expected[f"{side}_input_ids"]
            assert [label != -100 for label in expected[f"{side}_labels"]] == [*mask, True]


# ---- any template


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_turns_of_the_assistant_are_scored_and_nothing_else(bytes_tokenizer, name):
    """With a token for each byte, the scored text is what the template writes for each answer, to the letter."""
    end = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>\n", "zephyr": "<|im_end|>\n"}.get(name, "<|im_end|>")
    # Tulu's and Alpaca's templates part turns by what they do not write after the last one.
    found = one(bytes_tokenizer, CHAT, train_on="assistant", chat_template=TEMPLATES[name])
    assert runs(bytes_tokenizer, found) == [answer["content"] + end for answer in ANSWERS]
    last = one(bytes_tokenizer, CHAT, train_on="last", chat_template=TEMPLATES[name])
    assert runs(bytes_tokenizer, last) == [ANSWERS[-1]["content"] + end]
    assert last.sequences == found.sequences and last.prompt_length == found.prompt_length == last.masks[0].index(True)


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_marks_what_is_generated_is_taken_at_its_word(bytes_tokenizer, family):
    found = one(bytes_tokenizer, CHAT, train_on="assistant", chat_template=MARKED)
    assert runs(bytes_tokenizer, found) == [answer["content"] + "<|im_end|>" for answer in ANSWERS]
    assert runs(bytes_tokenizer, one(bytes_tokenizer, CHAT, train_on="last", chat_template=MARKED)) == ["ok<|im_end|>"]
    tokenizer = load_tokenizer(family)
    theirs = tokenizer.apply_chat_template(
        DIALOGUE, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    found = one(tokenizer, CHAT, train_on="assistant", chat_template=MARKED)
    assert found.sequences == [theirs["input_ids"]] and found.masks == [list(map(bool, theirs["assistant_masks"]))]
    unmarked = MARKED.replace("'assistant' %}", "'nobody' %}")
    assert not any(one(tokenizer, CHAT, train_on="assistant", chat_template=unmarked).masks[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_scored_tokens_of_real_tokenizers_spell_the_answers(family):
    tokenizer = load_tokenizer(family)
    found = one(tokenizer, CHAT, train_on="assistant", chat_template=TEMPLATES["chatml"])
    assert runs(tokenizer, found) == [answer["content"] + "<|im_end|>\n" for answer in ANSWERS]


def test_offsets_without_blanks_change_nothing():
    from tokenizers import processors

    tokenizer, trimmed = byte_tokenizer(), byte_tokenizer()
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    blank = Example([FIRST, turn("assistant", " a  b "), SECOND], ([turn("assistant", "  c")],), conversation=True)
    found = one(tokenizer, blank, train_on="assistant", chat_template=TEMPLATES["chatml"])
    assert runs(tokenizer, found) == [" a  b <|im_end|>\n", "  c<|im_end|>\n"]
    assert one(trimmed, blank, train_on="assistant", chat_template=TEMPLATES["chatml"]) == found


# Like Qwen3's and DeepSeek-R1's: the last answer gets a thought that earlier ones lose.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_answers_is_an_error_of_the_row_unless_the_last_is_meant(bytes_tokenizer):
    error = one(bytes_tokenizer, CHAT, train_on="assistant", chat_template=THINKING)
    assert isinstance(error, RowError) and error.reason == "the chat template rewrites the history"
    assert "train_on=last" in error.detail
    last = one(bytes_tokenizer, CHAT, train_on="last", chat_template=THINKING)
    assert runs(bytes_tokenizer, last) == ["<think>\n\n</think>\n\nok<|im_end|>\n"]
    single = Example([FIRST], (DIALOGUE[-1:],), conversation=True)
    assert runs(bytes_tokenizer, one(bytes_tokenizer, single, train_on="assistant", chat_template=THINKING)) == [
        "<think>\n\n</think>\n\nok<|im_end|>\n"
    ]


def test_a_thought_that_the_generation_prompt_opens_is_no_part_of_a_finished_turn(bytes_tokenizer):
    """Both "<think>" and the answer "<div>" begin with "<": the answer keeps all of its letters."""
    opened = TEMPLATES["chatml"].replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    assert opened != TEMPLATES["chatml"]
    found = one(bytes_tokenizer, CHAT, train_on="assistant", chat_template=opened)
    assert runs(bytes_tokenizer, found) == [answer["content"] + "<|im_end|>\n" for answer in ANSWERS]


def test_a_conversation_that_the_assistant_opens_has_no_border(bytes_tokenizer):
    opening = Example([ANSWERS[0], FIRST], (DIALOGUE[-1:],), conversation=True)
    error = one(bytes_tokenizer, opening, train_on="assistant")
    assert isinstance(error, RowError) and error.reason == "wrong roles"
    assert runs(bytes_tokenizer, one(bytes_tokenizer, opening, train_on="last")) == ["ok<|im_end|>\n"]


# ---- what names its prompt, and plain text


def test_a_row_that_names_its_prompt_scores_the_completion(bytes_tokenizer):
    named = Example(DIALOGUE[:-1], (DIALOGUE[-1:],))
    for train_on in ("assistant", "last"):
        assert runs(bytes_tokenizer, one(bytes_tokenizer, named, train_on=train_on)) == ["ok<|im_end|>\n"]
        text = one(bytes_tokenizer, Example("ask: ", ("answer",)), train_on=train_on)
        assert runs(bytes_tokenizer, text) == ["answer<|im_end|>"]
    assert runs(bytes_tokenizer, one(bytes_tokenizer, Example("ask: ", ("answer",)), train_on="all")) == [
        "ask: answer<|im_end|>"
    ]


def test_plain_text_is_scored_from_its_second_token(bytes_tokenizer):
    for family in ("llama", "qwen2"):  # with a BOS, and without
        tokenizer = load_tokenizer(family)
        for train_on in ("assistant", "last", "all"):
            found = one(tokenizer, Example("", ("cloud teach glass",)), train_on=train_on)
            assert found.prompt_length == 1 and found.masks == [[False] + [True] * (len(found.sequences[0]) - 1)]
            assert found.sequences[0][-1] == tokenizer.eos_token_id


def test_a_second_bos_takes_its_mask_along(bytes_tokenizer):
    twice = "{{ bos_token }}" + TEMPLATES["llama3"]
    found = one(bytes_tokenizer, CHAT, train_on="assistant", chat_template=twice)
    assert found.sequences[0].count(bytes_tokenizer.bos_token_id) == 1
    assert runs(bytes_tokenizer, found) == [answer["content"] + "<|eot_id|>" for answer in ANSWERS]
