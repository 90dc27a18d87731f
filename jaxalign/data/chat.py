"""Examples -> token ids, which of them are scored, and where the prompt ends. Pure: nothing is kept."""

import itertools
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple, cast

from jaxalign.data.formats import Example, Messages, RowError

# Llama 3.2's template writes today's date into the system turn. Tokens must not depend on the day that they were made,
# so every template sees the date that Llama 3.1's own template falls back to.
TEMPLATE_DATE = date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

# Stands for an answer when a template that has no generation prompt is asked what it writes before an answer.
_PROBE = "jaxalign-probe-5f3a9c"


# A template that says itself what the assistant wrote (transformers' `return_assistant_tokens_mask`).
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """Token ids of prompt + response for each response, and which of them are scored. The first `prompt_length` ids of
    all are equal; they are not scored, save what `train_on` adds (see `encode`)."""

    sequences: list[list[int]]
    masks: list[list[bool]]
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
    tokenizer: Any,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    chat_template: str | None = None,
) -> str:
    """The conversation as text; with `continue_final_message` up to the end of the last message's content.

    Raises RowError if the template refuses these messages, ValueError if there is no template.
    """
    import jinja2

    template = template_of(tokenizer, chat_template)
    if template is None:
        raise ValueError(
            "the tokenizer has no chat template, so chat messages cannot be turned into text: use an instruct model, "
            "give tokenizer.chat_template, or use data whose prompt, chosen and rejected are text"
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from error
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
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
    """Token ids to generate from, see `encode_prompts`; raises RowError if there are none."""
    (result,) = encode_prompts(tokenizer, [prompt], chat_template=chat_template)
    if isinstance(result, RowError):
        raise result
    return result


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str | Messages], *, chat_template: str | None = None
) -> list[list[int] | RowError]:
    """Token ids to generate from, or a prompt's RowError in its place. Messages end with the template's generation
    prompt, or inside the last turn if that is one of the assistant's; text stands as it is. One BOS at most."""
    prefix, template = special_prefix(tokenizer), template_of(tokenizer, chat_template)
    rendered: list[str | RowError] = []
    for prompt in prompts:
        try:
            if not isinstance(prompt, str):
                begun = prompt[-1]["role"] == "assistant"
                prompt = render(
                    tokenizer,
                    prompt,
                    add_generation_prompt=not begun,
                    continue_final_message=begun,
                    chat_template=template,
                )
            rendered.append(prompt)
        except RowError as error:
            rendered.append(error)
    found = iter(_encodings(tokenizer, [text for text in rendered if isinstance(text, str)])["input_ids"])
    results: list[list[int] | RowError] = []
    for prompt, text in zip(prompts, rendered, strict=True):
        if isinstance(text, RowError):
            results.append(text)
            continue
        start = prefix if isinstance(prompt, str) else []
        results.append(_one_bos(tokenizer, start + next(found), [])[0])
    return results


def encode(
    tokenizer: Any, examples: Sequence[Example], *, train_on: str | None = None, chat_template: str | None = None
) -> list[Encoded | RowError]:
    """Tokenizes examples; one that cannot be is returned as its RowError, in its place.

    A whole (prompt + response) is tokenized at once, so its ids are those that the model sees in use. The prompt ends
    where its own tokenization and that of any whole part (a token that merges across the border belongs to the
    response). Messages go through the chat template, whose end-of-turn tokens belong to the response; text is
    prompt + response + the tokenizer's eos, unless it ends with it. No truncation here.

    Responses are scored, and nothing else unless `train_on` says so (for `chats`). "all": every token but the first,
    which nothing predicts. "assistant": in a conversation all turns of the assistant, that is what stands in the
    template's generation blocks, or where it has none, what it writes from the end of a turn's header to the end of
    that turn. "last": of these the last turn alone.
    """
    template = template_of(tokenizer, chat_template)
    prefix = special_prefix(tokenizer)
    planned: list[_Texts | RowError] = []
    for example in examples:
        try:
            if isinstance(example.prompt, str):
                planned.append(_plain_texts(tokenizer, example, train_on))
            else:
                planned.append(_chat_texts(tokenizer, example, train_on, template))
        except RowError as error:
            planned.append(error)
    tokenized = _tokenize(tokenizer, [entry for entry in planned if isinstance(entry, _Texts)])
    results: list[Encoded | RowError] = []
    for example, entry in zip(examples, planned, strict=True):
        if isinstance(entry, RowError):
            results.append(entry)
            continue
        start = prefix if isinstance(example.prompt, str) else []
        prompt, *wholes = (
            _one_bos(tokenizer, start + ids, [bool(entry.spans)] * len(start) + mask)
            for ids, mask in itertools.islice(tokenized, 1 + len(entry.wholes))
        )
        results.append(_cut(prompt[0], wholes, entry))
    return results


class _Texts(NamedTuple):
    """What is tokenized of an example: its prompt, then prompt + response for each response. `spans`: the parts
    [start, end) of the one whole that are scored; None: what follows the prompt."""

    prompt: str
    wholes: list[str]
    spans: list[tuple[int, int]] | None = None


def _plain_texts(tokenizer: Any, example: Example, train_on: str | None) -> _Texts:
    eos = tokenizer.eos_token
    if not eos:
        raise ValueError("the tokenizer has no eos token, so a plain text response would never end")
    prompt, responses = cast(str, example.prompt), cast(tuple[str, ...], example.responses)
    wholes = [prompt + (text if text.endswith(eos) else text + eos) for text in responses]
    return _Texts(prompt, wholes, [(0, len(wholes[0]))] if train_on == "all" else None)


def _chat_texts(tokenizer: Any, example: Example, train_on: str | None, template: str | None) -> _Texts:
    """Raises RowError if the template writes the history differently once the answer follows: then no border is
    right."""

    def text(messages: Messages, generation: bool = False) -> str:
        return render(tokenizer, messages, add_generation_prompt=generation, chat_template=template)

    prompt, responses = cast(Messages, example.prompt), cast(tuple[Messages, ...], example.responses)
    dialogues = [prompt + response for response in responses]
    wholes = [text(dialogue) for dialogue in dialogues]
    header = _header(prompt, wholes, text, template)
    spans = None
    if train_on == "all":
        spans = [(0, len(wholes[0]))]
    elif train_on is not None and example.conversation and _GENERATION.search(template or ""):
        after = len(header) if train_on == "last" else 0
        spans = [(start, end) for start, end in _marked(tokenizer, dialogues[0], template) if end > after]
    elif train_on == "assistant" and example.conversation:
        spans = _turns(dialogues[0], wholes[0], text, template)
    return _Texts(header, wholes, spans)


def _header(prompt: Messages, wholes: Sequence[str], text: Callable[..., str], template: str | None) -> str:
    """What the template writes up to an answer to the prompt, as far as all of `wholes` begin with it."""
    before = text(prompt, generation=True)
    if "add_generation_prompt" in (template or "") and all(whole.startswith(before) for whole in wholes):
        return before
    opened = text(prompt)
    if not all(whole.startswith(opened) for whole in wholes):
        raise RowError(
            "the chat template rewrites the history", "the prompt's text changes once the response follows it"
        )
    # A generation prompt may open what a finished turn lacks (<think>), and a template without one still writes
    # something before an answer, which belongs to the prompt: an answer that is found again shows what.
    probed = text([*prompt, {"role": "assistant", "content": _PROBE}])
    header = probed[: max(0, probed.find(_PROBE))]
    if header and all(whole.startswith(header) for whole in wholes):
        return header
    return os.path.commonprefix([before, *wholes])


def _turns(dialogue: Messages, whole: str, text: Callable[..., str], template: str | None) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in the text of a dialogue: from the end of their header to their own end."""
    spans = []
    for at, message in enumerate(dialogue):
        if message["role"] == "assistant":
            if at == 0:
                raise RowError("wrong roles", "the conversation begins with the assistant")
            until = text(dialogue[: at + 1])
            if not whole.startswith(until):
                raise RowError(
                    "the chat template rewrites the history",
                    "an answer's text changes once turns follow it; train_on=last scores the last answer alone",
                )
            spans.append((len(_header(dialogue[:at], [whole], text, template)), len(until)))
    return spans


def _marked(tokenizer: Any, dialogue: Messages, template: str | None) -> list[tuple[int, int]]:
    """Where the template's generation blocks stand in the text of a dialogue."""
    from transformers.utils.chat_template_utils import render_jinja_template

    found: Any = render_jinja_template(
        [dialogue], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    return found[1][0]


def _tokenize(tokenizer: Any, entries: Sequence[_Texts]) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, which of them are in the spans) of each entry's prompt and wholes; the mask is empty without spans."""
    texts = [text for entry in entries for text in (entry.prompt, *entry.wholes)]
    offsets = any(entry.spans is not None for entry in entries)
    found = _encodings(tokenizer, texts, return_offsets_mapping=offsets)
    at = 0
    for entry in entries:
        yield found["input_ids"][at], []
        for n in range(at + 1, at + 1 + len(entry.wholes)):
            yield (
                found["input_ids"][n],
                [] if entry.spans is None else _covered(found["offset_mapping"][n], entry.spans),
            )
        at += 1 + len(entry.wholes)


def _covered(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of the spans. A token holds what lies between it and the one before, too: some
    tokenizers report their tokens' places without the blanks."""
    scored = bytearray(max((end for _, end in offsets), default=0))
    for start, end in spans:
        scored[start:end] = b"\1" * len(scored[start:end])
    mask, last = [], 0
    for start, end in offsets:
        mask.append(1 in scored[min(start, last) : end])
        last = end
    return mask


def _cut(prompt: list[int], wholes: Sequence[tuple[list[int], list[bool]]], texts: _Texts) -> Encoded | RowError:
    """The ids of the wholes, their masks, and where the prompt ends in all of them."""
    border = min(_common_prefix(prompt, ids) for ids, _ in wholes)
    if not texts.prompt:
        border = 1  # plain text: nothing predicts its first token
    if border == 0:
        return RowError("no prompt token", "the first token of prompt + response already belongs to the response")
    sequences, masks = [ids for ids, _ in wholes], []
    for ids, mask in wholes:
        if len(ids) == border:
            return RowError("a response has no tokens", "the chat template writes nothing for it")
        masks.append([False] * border + [True] * (len(ids) - border) if texts.spans is None else [False, *mask[1:]])
    return Encoded(sequences, masks, border)


def _common_prefix(left: list[int], right: list[int]) -> int:
    shortest = min(len(left), len(right))
    if left[:shortest] == right[:shortest]:
        return shortest
    return next(i for i in range(shortest) if left[i] != right[i])


def _one_bos(tokenizer: Any, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """Drops all but the last of several BOS at the beginning (text that was rendered with one before)."""
    bos = tokenizer.bos_token_id
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:], mask[start:]


def _encodings(tokenizer: Any, texts: list[str], **options: Any) -> Mapping[str, Any]:
    """What the tokenizer makes of the texts. No special tokens: a template renders its own. Never cut here."""
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
