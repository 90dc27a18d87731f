"""Tokenizers: one that needs no file, for models that begin from random weights; one read late; changes to any."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
"""Ids 0 to 3; <|im_end|> ends a turn and a text."""

BYTE_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Lazy:
    """A transformers tokenizer that is read when something of it is first asked for.

    A run whose rows are tokenized already does without for a while, and transformers' import alone takes half a second.

    Attributes:
      identity: a hash of all that its behaviour depends on.
    """

    def __init__(self, identity: str, load: Callable[[], Any]):
        self.identity = identity
        self._load = load

    @functools.cached_property
    def _loaded(self) -> Any:
        return self._load()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what pickle and copy look for
            raise AttributeError(name)
        return getattr(self._loaded, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._loaded)


def change(
    tokenizer: Any,
    *,
    chat_template: str | None = None,
    special_tokens: Mapping[str, str | Sequence[str]] | None = None,
    add_tokens: Sequence[str] = (),
) -> None:
    """Changes a transformers tokenizer. Tokens that it has keep their ids, those that are new get the next ones.

    Args:
      chat_template: Jinja text in place of its own.
      special_tokens: as transformers' `add_special_tokens` takes them: {"eos_token": "<|im_end|>", "pad_token": ...};
        "extra_special_tokens" is a list. They are never split, and left out of decoded text.
      add_tokens: tokens that are never split either, but stand in decoded text.

    Raises:
      ValueError: a kind of special token that there is not, or an empty token.
    """
    kinds = (*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, "extra_special_tokens", "additional_special_tokens")
    for kind, given in (special_tokens or {}).items():
        if kind not in kinds:
            raise ValueError(f"tokenizer.special_tokens has {kind!r}, expected one of {', '.join(kinds)}")
        tokens, what = (given, "a list of tokens") if kind.endswith("special_tokens") else ([given], "a token's text")
        if isinstance(tokens, str) or not all(isinstance(token, str) and token for token in tokens):
            raise ValueError(f"tokenizer.special_tokens has {kind} = {given!r}, expected {what}")
    if not all(add_tokens):
        raise ValueError(f"tokenizer.add_tokens has an empty token: {list(add_tokens)}")
    if special_tokens:
        tokenizer.add_special_tokens(dict(special_tokens), replace_extra_special_tokens=False)
    if add_tokens:
        tokenizer.add_tokens(list(add_tokens))
    if chat_template is not None:
        tokenizer.chat_template = chat_template


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a byte of UTF-8 (id = 4 + byte) and SPECIAL_TOKENS, with a ChatML template.

    Text is encoded after one <|bos|>, as Llama's tokenizers do; the template writes its own.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, _, end = SPECIAL_TOKENS
    letters = {letter: len(SPECIAL_TOKENS) + byte for byte, letter in enumerate(_letters())}
    specials = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=specials | letters, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, specials[bos])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=end, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte 0..255 (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 up, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, spare = [], 256
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters
