"""What an example is made of, by kind, and which rows can be turned into which kind."""

from dataclasses import replace

from jaxalign.data.formats.example import Example, RowError

KINDS = {"pairs": 2, "labelled": 2, "singles": 1, "chats": 1, "triples": 3, "scored": 1, "prompts": 1}
"""Kind -> width, the token sequences of an example: prompt + chosen and prompt + rejected; prompt + completion and
prompt + a completion that belongs to another prompt; the first of these alone; a conversation or text; prompt + chosen,
rejected and reference; prompt + completion; a prompt alone, for a policy that answers it itself."""

LABELLED = ("labelled", "singles")
"""Kinds whose completions have a label, desirable or not."""

TRAIN_ON = ("assistant", "last", "all")
"""What is scored of `chats`: all turns of the assistant, the last one, or every token."""


def convert(example: Example, kind: str) -> list[Example]:
    """The examples of a kind that an example of any kind gives.

    A pair gives two of LABELLED: its chosen side, then its rejected one. As `chats` a pair gives its chosen side. All
    give their prompt. Raises RowError if there is no sensible way.
    """
    if not example.responses and kind != "prompts":
        raise RowError("no response", f"the row is a prompt alone, and {kind} need an answer to it")
    if kind == "chats":
        if example.label is False:
            raise RowError("the label says undesirable", "such a completion is nothing to imitate")
        return [replace(example, responses=example.responses[:1], label=None)]
    if not example.prompt:
        raise RowError("no prompt", f"the row is plain text, and {kind} need an answer to something")
    if kind == "prompts":
        return [Example(example.prompt, ())]
    found = len(example.responses)
    if kind in LABELLED and found > 1:
        alone = [example.responses[at : at + 1] for at in range(2)]
        return [Example(example.prompt, response, label=at == 0) for at, response in enumerate(alone)]
    if kind in LABELLED and example.label is None:
        raise RowError("no label column", "labelled data needs label: true or false")
    needed = 1 if kind in LABELLED else KINDS[kind]
    if found < needed or (needed == 1 and found > 1):
        raise RowError("wrong number of responses", f"the row has {found}, {kind} need {needed}")
    return [replace(example, responses=example.responses[:needed], conversation=False)]
