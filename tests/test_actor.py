"""What the policy as an actor asks of the sampler and of rewards, and what it makes of their answers."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxalign import actor, decoding, hf, sampling

END = 9


class Prompts:
    """Three prompts, of one, two and three tokens."""

    def prompt(self, i):
        return np.full(i + 1, 50 + i, np.int32)

    def text(self, i):
        return {"prompt": f"p{i}", "answer": str(i)}

    def asked(self, i):
        return f"p{i}" if i < 2 else [{"role": "user", "content": "p2"}]

    def columns(self, places):
        return {"answer": [str(i) for i in places]}


TOKENIZER = SimpleNamespace(
    decode=lambda ids, **_: "".join(chr(96 + i) for i in ids if i != END), get_added_vocab=dict, eos_token_id=END
)


@pytest.fixture
def asked(monkeypatch):
    """What the sampler is asked; request b answers with b + 1 tokens (as far as it may) of the id 1, the last an end
    where b is even."""
    calls = []

    def sample(cfg, params, prompts, keys, limits, *, max_new_tokens, n, **options):
        calls.append(
            SimpleNamespace(prompts=prompts, keys=jax.random.key_data(keys).tolist(), limits=limits, n=n, **options)
        )
        counts = np.minimum(np.arange(len(prompts) * n) + 1, limits.max_new)
        tokens, mask = np.ones((len(counts), max_new_tokens), np.int32), np.arange(max_new_tokens) < counts[:, None]
        for b in range(0, len(counts), 2):
            tokens[b, counts[b] - 1] = END
        logps = np.where(mask, -1.0, 0).astype(np.float32)
        return sampling.Samples(tokens, mask, logps, logps, 2 * logps)

    monkeypatch.setattr(sampling, "sample", sample)
    monkeypatch.setattr(decoding, "is_view", lambda params: True)
    monkeypatch.setattr(hf, "stop_ids", lambda *_: (END,))
    return calls


def make(**changes):
    settings = {
        "rewards": None, "limits": {"temperature": 0.7, "min_new": 1}, "stop": (), "max_length": 8,
        "max_completion_length": 6, "slots": 4,
    }  # fmt: skip
    return actor.Actor(None, TOKENIZER, **{**settings, **changes})


def test_a_completion_is_limited_by_its_own_room_and_fillers_ask_for_nothing(asked):
    found = make(slots=8).sample(None, Prompts(), [0, 2], 3, n=2)
    (call,) = asked
    assert call.limits.max_new.tolist() == [6, 6, 5, 5, 0, 0, 0, 0] and len(call.prompts) == 4
    assert call.limits.temperature.tolist() == pytest.approx([0.7] * 8) and call.limits.stop_ids[0, 0] == END
    assert [ids.tolist() for ids in found.tokens] == [[END], [1, 1], [1, 1, END], [1, 1, 1, 1]]
    assert found.ended.tolist() == [True, False, True, False] and found.texts == ["", "aa", "aa", "aaaa"]
    assert found.logps[1].tolist() == [-2, -2] and all(mask.all() for mask in found.masks)
    make().sample(None, Prompts(), [0, 2], 3, n=2, temperature=0.0)
    assert not asked[1].limits.temperature.any() and len(asked[1].prompts) == 2
    make().sample(None, Prompts(), [0, 2], 4, n=2)
    assert asked[0].keys[:4] == asked[1].keys and not any(key in asked[1].keys for key in asked[2].keys)


def test_limits_are_drawn_between_the_shortest_and_the_longest(asked):
    one = make(min_completion_length=3, max_length=100)
    for _ in range(2):
        one.sample(None, Prompts(), [0, 1, 2], 5, n=40)
    first, second = (call.limits.max_new for call in asked)
    assert set(first.tolist()) == {3, 4, 5, 6} and (first == second).all()
    one.sample(None, Prompts(), [0, 1, 2], 6, n=40)
    assert (asked[2].limits.max_new != first).any()


def test_a_stop_string_ends_a_completion_and_is_no_part_of_its_text(asked):
    found = make(stop=("aaa",)).sample(None, Prompts(), [0, 1], 3, n=2)
    assert found.ended.tolist() == [True, False, True, True] and found.texts[3] == ""
    assert callable(asked[0].stop) and asked[0].stop([1, 1, 1, 1]) == 3


def test_each_completion_is_rewarded_with_its_own_prompt_and_columns(asked):
    def rewards(prompts, completions, columns, *, completion_ids):
        seen.append((prompts, completions, columns, completion_ids))
        return SimpleNamespace(values=np.ones((len(prompts), 1)), errors=np.zeros((len(prompts), 1), bool))

    rewards.names, seen = ("one",), []
    one = make(rewards=rewards)
    values, failed = one.reward(Prompts(), [2, 0], one.sample(None, Prompts(), [2, 0], 3, n=2))
    ((prompts, completions, columns, ids),) = seen
    assert values.shape == failed.shape == (4, 1) and columns == {"answer": ["2", "2", "0", "0"]}
    assert prompts[:2] == [[{"role": "user", "content": "p2"}]] * 2 and prompts[2:] == ["p0", "p0"]
    assert completions == [
        [{"role": "assistant", "content": ""}], [{"role": "assistant", "content": "aa"}], "aa", "aaaa"
    ]  # fmt: skip
    assert ids == [[END], [1, 1], [1, 1, END], [1, 1, 1, 1]]


def test_a_users_function_gets_rows_and_its_answers_are_checked(asked):
    def function(generate, rows):
        assert [row["prompt_ids"] for row in rows] == [[50], [50], [51, 51], [51, 51]] and rows[0]["answer"] == "0"
        first = generate([row["prompt_ids"] for row in rows], max_new_tokens=2)
        assert generate([]) == [] and generate.tokenizer is TOKENIZER
        return [(ids + [4], [True] * len(ids) + [False]) for ids in first]

    found = make(function=function).sample(None, Prompts(), [0, 1], 3, n=2)
    assert found.logps is None and found.masks[1].tolist() == [True, True, False] and found.texts[1] == "aad"
    assert asked[0].limits.max_new.max() == 2 and asked[0].keys != asked[1].keys

    for answer, message in (
        ([([1], [True])], "returned 1 completions for 4 rows"),
        ([([1, 1], [True])] * 4, r"ids of shape \(2,\) with a mask of shape \(1,\)"),
        ([([1], [False])] * 4, "some of them True"),
        ([([1] * 8, [True] * 8)] * 4, "returned 8 tokens after a prompt of 1, more than max_length = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            make(function=lambda generate, rows, answer=answer: answer).sample(None, Prompts(), [0, 1], 3, n=2)


def test_a_users_function_may_tell_its_log_probs(asked):
    def function(generate, rows):
        found = generate.sample([row["prompt_ids"] for row in rows], 1)
        return [
            ([*ids, 4], [True] * len(ids) + [False], [*logps, np.nan])
            for ids, logps in zip(found.tokens, found.logps, strict=True)
        ]

    found = make(function=function).sample(None, Prompts(), [0, 1], 3)
    assert [x[:-1].tolist() for x in found.logps] == [[-2], [-2, -2]] and np.isnan(found.logps[0][-1])
    unknown = make(function=lambda generate, rows: [([1, 4], [True, False], [np.nan, -1.0])] * 2)
    assert unknown.sample(None, Prompts(), [0, 1], 3).logps is None  # of no token that was sampled
    with pytest.raises(ValueError, match=r"ids of shape \(1,\) with log-probs of shape \(2,\)"):
        make(function=lambda generate, rows: [([1], [True], [-1, -2])] * 2).sample(None, Prompts(), [0, 1], 3)


def test_the_last_turn_of_a_users_function_ends_by_stop_id_or_text(asked):
    turns = [
        ([1, 1, 4, 2, END], [True, True, False, True, True], True),
        ([2, 4, 1, 1], [True, False, True, True], True),  # the stop text ends the last turn
        ([1, 1, 4, 2], [True, True, False, True], False),  # it ended the first one only
        ([1, 1, 2, 2], [True] * 4, False),  # the first of two turns without a tool's between
        ([1, 1, 2, 1, 1], [True] * 5, True),
        ([1, 1, 4], [True, True, False], False),  # the tool has the last word
        ([4, 1, 1], [True, False, False], False),
        ([1, 1], [True, True], True),
    ]
    function = lambda generate, rows: [turn[:2] for turn in turns]  # noqa: E731
    found = make(function=function, stop=("aa",)).sample(None, Prompts(), [0], 3, n=len(turns))
    assert found.ended.tolist() == [ended for *_, ended in turns]


def test_a_function_that_differs_from_process_to_process_is_named(monkeypatch):
    from jax.experimental import multihost_utils

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = []
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: told.append(x) or np.array([told[0], x]))
    for ids in ([[1, 2], [3]], [[1, 2], np.array([3], np.int32)]):
        actor._check_same("what it returned", ids)
    with pytest.raises(ValueError, match="rollout.function: what it returned differs from process to process"):
        actor._check_same("what it returned", [[1], [2, 3]])


def test_a_prompt_without_room_is_named(asked):
    with pytest.raises(ValueError, match="a prompt of 8 tokens leaves no room within 8"):
        actor.Generate(make(), None, 0, None)([[1] * 8])
