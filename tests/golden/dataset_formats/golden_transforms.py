"""Custom transform functions for the golden GRPO cases (our own code, free to use in tests).

Axolotl's contract: TYPE is '{file}.{function}'; the function is called with the whole config
(and keyword arguments such as dataset_idx) and returns either a row function, or a pair of a
row function and keyword arguments for the mapping step (only remove_columns is used here).
The row function may or may not take a `tokenizer` argument.
"""


def gsm8k_transform(cfg, *args, **kwargs):
    """Question to a one-message chat, gold answer to the text after the last ####."""

    def transform_fn(example, tokenizer=None):
        gold = example["answer"].split("####")[-1].strip().replace(",", "")
        return {"prompt": [{"role": "user", "content": example["question"]}], "answer": gold}

    return transform_fn, {"remove_columns": ["question"]}


def plain_no_tokenizer(cfg, **kwargs):
    """A row function without a tokenizer argument, and no mapping arguments."""

    def transform_fn(example):
        return {"prompt": "Q: " + example["question"] + "\nA:", "answer": example["answer"].strip()}

    return transform_fn


def drop_all(cfg, *args, **kwargs):
    """remove_columns may be the word __all__ (newer Axolotl): every input column goes."""

    def transform_fn(example, tokenizer=None):
        return {
            "prompt": [
                {"role": "system", "content": "Answer with a number."},
                {"role": "user", "content": example["question"].strip()},
            ],
            "target": len(example["answer"]),
        }

    return transform_fn, {"remove_columns": "__all__"}


def drop_missing(cfg, *args, **kwargs):
    """remove_columns may name a column that the data lacks; it is then ignored."""

    def transform_fn(example, tokenizer=None):
        return {"prompt": [{"role": "user", "content": example["question"]}]}

    return transform_fn, {"remove_columns": ["question", "no_such_column"]}


def uses_config(cfg, *args, dataset_idx=0, **kwargs):
    """Reads its own data set entry from the config."""
    prefix = cfg["datasets"][dataset_idx].get("prefix") or ""

    def transform_fn(example, tokenizer=None):
        return {"prompt": [{"role": "user", "content": prefix + example["question"]}]}

    return transform_fn, {"remove_columns": ["question"]}


def rewards_length(completions, **kwargs):
    """A deterministic reward: minus the number of characters of each completion."""
    return [-float(len(c if isinstance(c, str) else c[-1]["content"])) for c in completions]
