"""Several rewards of a batch of completions, computed at the same time."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxalign.rewards.run import GIVEN, PRINTED, Worker

log = logging.getLogger(__name__)

_FEW_ROWS = 16


class Scores(NamedTuple):
    """Rewards of C completions by F functions.

    Attributes:
      values: [C, F] float32; NaN where a function has no opinion or failed.
      errors: [C, F] bool, where it failed.
      traceback: of the last failure, with the function's name; None where there was none.
    """

    values: np.ndarray
    errors: np.ndarray
    traceback: str | None


Model = Callable[..., np.ndarray]
"""A reward model: f(prompts, completions, completion_ids) -> [C] float32."""


class Rewards:
    """Reward functions, called with TRL's arguments; close it, or use it as a context, to end its processes.

    Args:
      scorers: by name, what scores: workers that share the rows between them, or a model, which is called here.
      max_error_rate: the share of completions that a function may fail on, in a call or, where calls are small, in
        those of the last 16 completions.

    Attributes:
      names: [F] of the functions, as metrics have them.
    """

    def __init__(self, scorers: Mapping[str, Sequence[Worker] | Model], *, max_error_rate: float):
        self.names = tuple(scorers)
        self._max_error_rate = max_error_rate
        self._models = {f: scorer for f, scorer in enumerate(scorers.values()) if callable(scorer)}
        self._workers = {f: scorer for f, scorer in enumerate(scorers.values()) if not callable(scorer)}
        self._recent: dict[str, deque[tuple[int, int]]] = {name: deque() for name in scorers}
        self._told: set[str] = set()

    @property
    def error_rate(self) -> dict[str, float]:
        """By function, the share of the last completions that it failed on (see `max_error_rate`)."""
        return {
            name: sum(failed for failed, _ in calls) / max(sum(rows for _, rows in calls), 1)
            for name, calls in self._recent.items()
        }

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        *,
        completion_ids: Sequence[Sequence[int]],
    ) -> Scores:
        """Scores C completions; the functions run at the same time.

        Args:
          prompts: [C] texts, or lists of messages.
          completions: [C] texts, or lists of one message each.
          columns: of the completions' source rows, [C] each, values that JSON has. A function gets those that it has
            arguments for (all, if it takes `**columns`); "prompt", "completion" and the arguments' names are left out.
          completion_ids: [C] the sampled tokens.

        Raises:
          ValueError: a column has another length, or values that JSON has not.
          RuntimeError: a function failed too often; with its last traceback.
        """
        ids = [[int(token) for token in tokens] for tokens in completion_ids]
        arguments = {name: column for name, column in columns.items() if name not in (*GIVEN, "prompt", "completion")}
        arguments |= dict(zip(GIVEN, (prompts, completions, ids), strict=True))
        count = len(completions)
        for name, column in arguments.items():
            if len(column) != count:
                raise ValueError(f"rewards: column {name!r} has {len(column)} entries for {count} completions")
        values = np.full((count, len(self.names)), np.nan, np.float32)
        errors = np.zeros(values.shape, bool)
        problems: dict[int, str] = {}
        with ThreadPoolExecutor(1 + sum(map(len, self._workers.values()))) as pool:
            calls = [
                (f, rows, pool.submit(worker.rewards, _rows_of(arguments, rows), len(rows)))
                for f, workers in self._workers.items()
                for worker, rows in zip(workers, np.array_split(np.arange(count), len(workers)), strict=True)
                if len(rows)
            ]
            for f, model in self._models.items():
                values[:, f] = model(prompts, completions, ids)
                errors[:, f] = ~np.isfinite(values[:, f])
                problems[f] = "a reward that is not finite"
            for f, rows, call in calls:
                for row, (value, problem) in zip(rows, call.result(), strict=True):
                    values[row, f] = np.nan if value is None else value
                    if problem is not None:
                        errors[row, f], problems[f] = True, problem
        values[errors] = np.nan
        return Scores(values, errors, self._judge(errors, problems))

    def _judge(self, errors_CF: np.ndarray, problems: Mapping[int, str]) -> str | None:
        """What went wrong last; raises where too much did."""
        last = None
        for f, name in enumerate(self.names):
            failed, recent = int(errors_CF[:, f].sum()), self._recent[name]
            recent.append((failed, len(errors_CF)))
            while sum(rows for _, rows in recent) - recent[0][1] >= _FEW_ROWS:
                recent.popleft()
            if not failed:
                continue
            failures, rows = map(sum, zip(*recent, strict=True))
            if failures > self._max_error_rate * max(rows, _FEW_ROWS):
                raise RuntimeError(
                    f"reward {name} failed on {failures} of {rows} completions, more than rewards.max_error_rate "
                    f"({self._max_error_rate:g}) allows; the last failure:\n{problems[f]}"
                )
            why, _, _ = problems[f].partition(PRINTED)
            text = why.splitlines()[-1] if name in self._told else problems[f]
            self._told.add(name)
            log.warning("reward %s failed on %d of %d completions: %s", name, failed, len(errors_CF), text)
            last = f"reward {name}: {problems[f]}"
        return last

    def close(self) -> None:
        """Ends the processes."""
        for worker in itertools.chain(*self._workers.values()):
            worker.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows_of(arguments: Mapping[str, Sequence[Any]], rows: np.ndarray) -> dict[str, list[Any]]:
    return {name: [column[row] for row in rows] for name, column in arguments.items()}
