"""The byte tokenizer: every byte its own id, one BOS, ChatML, and the same after saving and loading."""

import pytest

from jaxalign.data.tokenizers import BYTE_VOCAB_SIZE, SPECIAL_TOKENS, byte_tokenizer

TEXT = "".join(map(chr, range(0x500))) + "語 😀 \r\n"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_every_byte_has_its_own_id_and_comes_back(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == [4 + byte for byte in TEXT.encode()]
    assert tokenizer.decode(ids) == TEXT
    assert len(tokenizer) == BYTE_VOCAB_SIZE == 260


def test_special_tokens_have_the_first_ids_and_text_one_bos(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 3)
    assert tokenizer("a<|im_end|>")["input_ids"] == [1, 4 + ord("a"), 3]


def test_it_is_the_same_after_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert (loaded.chat_template, loaded.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)


def test_the_template_is_chatml_and_its_prompt_begins_every_answer(tokenizer):
    user, assistant = {"role": "user", "content": "hi "}, {"role": "assistant", "content": "yo"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template([user, assistant], tokenize=False) == prompt + "yo<|im_end|>\n"
