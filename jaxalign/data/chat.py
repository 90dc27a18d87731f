"""Examples -> token ids and the border between prompt and response. Pure: a tokenizer goes in, nothing is kept."""

import re
from collections.abc import Sequence
from datetime import date
from typing import Any, NamedTuple

from jaxalign.data.formats.pairs import Example, Messages, RowError

# Llama 3.2's template writes today's date into the system turn. Tokens must not depend on the day that they were made,
# so every template sees the date that Llama 3.1's own template falls back to.
TEMPLATE_DATE = date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

# Stands for an answer when a template that has no generation prompt is asked what it writes before an answer.
_PROBE = "jaxalign-probe-5f3a9c"


class EncodedPair(NamedTuple):
    """Token ids of prompt + response for both sides. The first `prompt_length` ids of both are equal and not scored."""

    chosen: list[int]
    rejected: list[int]
    prompt_length: int


def template_of(tokenizer: Any, chat_template: str | None = None) -> str | None:
    """The chat template that is used: the given one, else the tokenizer's own default, else None. The date is fixed."""
    if chat_template is None:
        try:
            chat_template = tokenizer.get_chat_template()
        except ValueError:  # transformers raises it for a tokenizer without a template
            return None
    return _NOW.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), chat_template)


def render(
    tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = False, chat_template: str | None = None
) -> str:
    """The conversation as text.

    Raises RowError if the template refuses these messages, ValueError if there is no template.
    """
    import jinja2

    template = template_of(tokenizer, chat_template)
    if template is None:
        raise ValueError(
            "the tokenizer has no chat template, so chat messages cannot be turned into text: use an instruct model, "
            "give data.chat_template, or use data whose prompt, chosen and rejected are text"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from error
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise RowError("the chat template refuses the messages", str(error)) from error


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before plain text by itself: [bos] or []."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def encode_prompt(tokenizer: Any, prompt: str | Messages, *, chat_template: str | None = None) -> list[int]:
    """Token ids to generate from: messages end with the template's generation prompt, text stands as it is. One BOS
    at most."""
    if isinstance(prompt, str):
        return _one_bos(tokenizer, special_prefix(tokenizer) + _ids(tokenizer, [prompt])[0])
    text = render(tokenizer, prompt, add_generation_prompt=True, chat_template=chat_template)
    return _one_bos(tokenizer, _ids(tokenizer, [text])[0])


def encode_pairs(
    tokenizer: Any, examples: Sequence[Example], *, chat_template: str | None = None
) -> list[EncodedPair | RowError]:
    """Tokenizes pairs; a pair that cannot be is returned as its RowError, in its place.

    The whole (prompt + response) is tokenized at once, so its ids are those that the model sees in use. The prompt ends
    where its own tokenization and that of either whole part (a token that merges across the border belongs to the
    response). Messages go through the chat template, whose end-of-turn tokens belong to the response; text is
    prompt + response + the tokenizer's eos, unless it ends with it. No truncation here.
    """
    template = template_of(tokenizer, chat_template)
    prefix = special_prefix(tokenizer)
    texts: list[str] = []
    results: list[EncodedPair | RowError | None] = []
    for example in examples:
        try:
            match example.prompt, example.chosen, example.rejected:
                case str(prompt), str(chosen), str(rejected):
                    texts += _plain_texts(tokenizer, prompt, chosen, rejected)
                case list(prompt), list(chosen), list(rejected):
                    texts += _chat_texts(tokenizer, prompt, chosen, rejected, template)
                case _:
                    raise RowError("prompt and responses are of different kinds", "text and messages")
            results.append(None)
        except RowError as error:
            results.append(error)
    encoded = iter(_ids(tokenizer, texts))
    for at, example in enumerate(examples):
        if results[at] is None:
            start = prefix if isinstance(example.prompt, str) else []
            results[at] = _cut(*(_one_bos(tokenizer, start + next(encoded)) for _ in range(3)))
    return [result for result in results if result is not None]


def _plain_texts(tokenizer: Any, prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    eos = tokenizer.eos_token
    if not eos:
        raise ValueError("the tokenizer has no eos token, so a plain text response would never end")
    ended_chosen, ended_rejected = (text if text.endswith(eos) else text + eos for text in (chosen, rejected))
    return prompt, prompt + ended_chosen, prompt + ended_rejected


def _chat_texts(
    tokenizer: Any, prompt: Messages, chosen: Messages, rejected: Messages, template: str | None
) -> tuple[str, str, str]:
    """Prompt, prompt + chosen and prompt + rejected as text.

    Raises RowError if the template writes the history differently once the answer follows: then no border is right.
    """

    def text(messages: Messages, generation: bool = False) -> str:
        return render(tokenizer, messages, add_generation_prompt=generation, chat_template=template)

    before = text(prompt, generation=True)
    wholes = text(prompt + chosen), text(prompt + rejected)
    if not all(whole.startswith(before) for whole in wholes):
        # A generation prompt that opens what a finished turn lacks (<think>) is fine: the cut comes before it.
        if not all(whole.startswith(text(prompt)) for whole in wholes):
            raise RowError(
                "the chat template rewrites the history", "the prompt's text changes once the response follows it"
            )
    elif "add_generation_prompt" not in (template or ""):
        # Without a generation prompt, what the template writes before an answer still belongs to the prompt.
        probed = text([*prompt, {"role": "assistant", "content": _PROBE}])
        header = probed[: max(0, probed.find(_PROBE))]
        if header and all(whole.startswith(header) for whole in wholes):
            before = header
    return before, *wholes


def _cut(prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair | RowError:
    border = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    if border == 0:
        return RowError("no prompt token", "the first token of prompt + response already belongs to the response")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) == border:
            return RowError(f"{name} has no tokens", "the chat template writes nothing for it")
    return EncodedPair(chosen, rejected, border)


def _common_prefix(left: list[int], right: list[int]) -> int:
    shortest = min(len(left), len(right))
    if left[:shortest] == right[:shortest]:
        return shortest
    return next(i for i in range(shortest) if left[i] != right[i])


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Drops all but the last of several BOS at the beginning (text that was rendered with one before)."""
    bos = tokenizer.bos_token_id
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # No special tokens: a template renders its own. verbose=False: we cut to max_length ourselves.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
