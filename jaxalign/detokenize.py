"""Token ids -> text while they are sampled: whole characters, up to the first stop string; and text -> single ids."""

import dataclasses
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character (yet)


@dataclasses.dataclass(frozen=True)
class Stops:
    """Strings that end a completion wherever they begin and end among its tokens: the `stop` of `sampling.sample`.

    Made by `stops`. A string counts if it is completed by token number `min_new_tokens` (from 1) or a later one.
    """

    tokenizer: Any
    strings: tuple[str, ...]
    min_new_tokens: int = 0

    def __call__(self, ids: Sequence[int]) -> int | None:
        """The number of tokens up to and with the one that completes a stop string; None where there is none."""
        if not self.strings or self._find(ids) is None:
            return None
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._find(ids[:middle]) is None else (low, middle)
        return low

    def completed_by_last(self, ids: Sequence[int]) -> bool:
        """Whether the last token completes a stop string, be it the first or not."""
        whole, before = self._decode(ids), self._decode(ids[:-1])
        return any(whole.count(string) > before.count(string) for string in self.strings)

    def text(self, ids: Sequence[int], *, ended: bool) -> str:
        """The text of a completion, without special tokens, up to the stop string.

        Args:
          ended: no token follows because the model (or a stop string) says so. Else what a token may still change is
            left out: a last character whose bytes are not all there.
        """
        kept = self(ids)
        if kept is not None:
            return self._decode(ids[:kept])[: self._find(ids[:kept])]
        return self._decode(ids) if ended else self._decode(ids).rstrip(UNFINISHED)

    def settled(self, ids: Sequence[int]) -> str:
        """The beginning of `text` that no further token can change: none of it may turn out to begin a stop string."""
        text = self.text(ids, ended=False)
        if self(ids) is not None:
            return text
        beginnings = (string[:n] for string in self.strings for n in range(1, len(string)))
        return text[: len(text) - max((len(start) for start in beginnings if text.endswith(start)), default=0)]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _find(self, ids: Sequence[int]) -> int | None:
        """Where the first stop string begins in the text."""
        text = self._decode(ids)
        before = len(self._decode(ids[: self.min_new_tokens - 1]).rstrip(UNFINISHED)) if self.min_new_tokens > 1 else 0
        found = (text.find(string, max(before - len(string) + 1, 0)) for string in self.strings)
        return min((at for at in found if at >= 0), default=None)


def stops(tokenizer: Any, strings: Sequence[str], *, min_new_tokens: int = 0) -> tuple[Stops, list[int]]:
    """(what looks for the stop strings, the ids of those that are special tokens of the tokenizer).

    Text has no special tokens, so a stop string that is one ("<|im_end|>") has to be a stop id. Other tokens that were
    added ("</think>") are in the text and may be spelled with smaller ones.

    Raises:
      ValueError: an empty stop string.
    """
    if isinstance(strings, str) or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop is {strings!r}, expected a sequence of texts that are not empty")
    added = tokenizer.get_added_vocab()

    def is_special(string: str) -> bool:
        return string in added and (
            added[string] in tokenizer.all_special_ids or tokenizer.added_tokens_decoder[added[string]].special
        )

    special = {string: added[string] for string in strings if is_special(string)}
    texts = tuple(dict.fromkeys(string for string in strings if string not in special))
    return Stops(tokenizer, texts, min_new_tokens), [*special.values()]


def bad_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The ids of tokens that are one of the words, alone or after a space.

    Only these tokens are ruled out: a model may still spell the word with smaller ones.

    Raises:
      ValueError: no token is the word.
    """
    if isinstance(words, str) or not all(words):
        raise ValueError(f"bad_words is {words!r}, expected a sequence of texts that are not empty")
    vocab, found = tokenizer.get_vocab(), []
    for word in words:
        encoded = tokenizer([word, f" {word}"], add_special_tokens=False)["input_ids"]
        ids = [one[0] for one in encoded if len(one) == 1]
        ids += [vocab[word]] if word in vocab else []  # where text begins with a space by itself
        if not ids:
            raise ValueError(
                f"bad_words: {word!r} is {len(encoded[0])} tokens, and only words that are one token can be ruled out; "
                "stop=... ends a completion at it"
            )
        found += ids
    return sorted(set(found))
