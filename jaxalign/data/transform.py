"""Rows through a function of the user's own before a format reads them: `data.format=FILE.function`."""

import copy
import functools
import inspect
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign import user_code
from jaxalign.data.formats import LEFT_OUT, RowError
from jaxalign.data.formats.example import kind_of_value


class Transform(NamedTuple):
    """A user's function of rows.

    name: what it is called in messages. row_function: a row -> columns of the new one; with a keyword `tokenizer` where
    `takes_tokenizer`. merges: what it returns is put over the row's own columns without `removed` ("__all__" or their
    names); else it is the row. identity: a hash that is another one when the function's file is.
    """

    name: str
    row_function: Callable[..., Any]
    takes_tokenizer: bool
    merges: bool
    removed: str | frozenset[str]
    identity: str

    def __call__(self, row: Any, tokenizer: Any) -> dict[str, Any]:
        """The new row. Raises RowError if the function leaves the row out, raises, or returns no row."""
        if not isinstance(row, Mapping):
            raise RowError("not a JSON object", f"the row is {kind_of_value(row)}")
        options = {"tokenizer": tokenizer} if self.takes_tokenizer else {}
        try:
            found = self.row_function(copy.deepcopy(row), **options)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}, line {at.lineno}"
            raise RowError(f"{self.name} raised {type(error).__name__}", f"{error} ({where})") from error
        if found is None:
            raise RowError(f"{LEFT_OUT} {self.name}")
        if not isinstance(found, Mapping):
            raise RowError(f"{self.name} returned {kind_of_value(found)}", "expected a row, or None to leave it out")
        if not self.merges:
            return dict(found)
        kept = {} if self.removed == "__all__" else {k: value for k, value in row.items() if k not in self.removed}
        return {**kept, **found}


def load(name: str, *, dataset: Mapping[str, Any]) -> Transform:
    """The transform that `name` (see `user_code.load`) stands for: a function `row -> row | None`, or one like
    Axolotl's, `f(cfg, dataset_idx=0, **kwargs)`, that gives such a function.

    The latter is called with cfg = {"datasets": [dataset]}. It returns a row function, or this and a dict with
    `remove_columns`: names (those that a row lacks don't matter) or "__all__". What its row function returns is put
    over the row's other columns. A row function may take a keyword `tokenizer`.

    Raises:
      ValueError: there is no such function, or it gives something else.
    """
    function = user_code.load(name)
    label = Path(name).name
    whole = functools.partial(Transform, label, identity=user_code.fingerprint(name))
    if not _accepts(function, "dataset_idx"):
        return whole(function, _accepts(function, "tokenizer"), merges=False, removed=frozenset())
    found = function({"datasets": [dict(dataset)]}, dataset_idx=0)
    row_function, options = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    if not callable(row_function) or not isinstance(options, Mapping):
        raise ValueError(
            f"{label} takes dataset_idx or **kwargs, so it was called as {label}(cfg, dataset_idx=0) and is to return "
            f"a function of rows, or this and {{'remove_columns': [...]}}; it returned {type(found).__name__}. A "
            "function of rows itself is written f(row)"
        )
    if unknown := set(options) - {"remove_columns"}:
        raise ValueError(f"{label} returned {sorted(unknown)} for the mapping; only remove_columns is there")
    removed = options.get("remove_columns") or ()
    removed = removed if removed == "__all__" else frozenset([removed] if isinstance(removed, str) else removed)
    return whole(row_function, _accepts(row_function, "tokenizer"), merges=True, removed=removed)


def _accepts(function: Callable[..., Any], keyword: str) -> bool:
    """Whether a function takes a keyword, by name or among **kwargs (for `tokenizer`: by name alone)."""
    parameters = inspect.signature(function).parameters
    return keyword in parameters or (
        keyword != "tokenizer" and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    )
