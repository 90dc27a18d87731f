"""The on-policy source without a model: which prompts it asks, what it keeps, and what its batches say."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign import actor, config, rollout
from jaxalign.data.packing import FILLER

N_PROMPTS, GROUP, LENGTH = 10, 2, 16


class Prompts:
    """Prompts of 1 to 4 tokens, each of them the prompt's number + 100."""

    kind, width, pad_id = "prompts", 1, 0
    meta = {"max_length": LENGTH}  # noqa: RUF012
    prompt_lengths = np.arange(N_PROMPTS, dtype=np.int32) % 4 + 1
    lengths = prompt_lengths[:, None]

    def __len__(self):
        return N_PROMPTS

    def prompt(self, i):
        return np.full(self.prompt_lengths[i], 100 + i, np.int32)


@dataclasses.dataclass
class Actor:
    """Writes the prompt's number as many times as the weights say; the reward is the prompt's number, plus the
    completion's place in its group where the number is even."""

    rewards = SimpleNamespace(names=("a", "b"))
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(list(ids)))
    max_length, function = LENGTH, None
    asked: list = dataclasses.field(default_factory=list)

    def sample(self, params, prepared, places, seed, *, n):
        self.asked.append((list(map(int, places)), seed))
        tokens = [np.full(params + j, i, np.int32) for i in places for j in range(n)]
        masks = [np.ones(len(ids), bool) for ids in tokens]
        logps = [-np.arange(1, len(ids) + 1, dtype=np.float32) for ids in tokens]
        return actor.Sampled(tokens, masks, logps, np.arange(len(tokens)) % 2 == 0, [""] * len(tokens))

    def reward(self, prepared, places, sampled):
        first = [i + (j if i % 2 == 0 else 0) for i in places for j in range(GROUP)]
        values = np.array([[x, np.nan if k % 2 else 1.0] for k, x in enumerate(first)], np.float32)
        return values, np.isnan(values)


def source(**changes):
    settings = {
        "batch_size": 4, "num_generations": GROUP, "steps_per_generation": 2, "num_iterations": 2, "seed": 3,
        "weights": (1.0, 0.0), "scored": ("old_logps",),
        "score": lambda sampled, params, reference: {"old_logps": 10 * sampled.sampling_logps},
    }  # fmt: skip
    return rollout.Rollouts(Prompts(), Actor(), **{**settings, **changes})


def rows_of(batch):
    """(prompt's number, tokens written, advantage, truncated) of each completion in a batch."""
    return [
        (int(batch["tokens"][row, 0]) - 100, int(batch["mask"][row].sum()), *map(float, said))
        for row, said in enumerate(zip(batch["advantages"][:, 0], batch["truncated"][:, 0], strict=True))
    ]


def test_a_rollout_serves_its_updates_each_completion_once_in_every_pass():
    rollouts = source()
    batches = [rollouts(step, 3) for step in range(8)]
    assert rollouts.updates == 4 and len(rollouts.actor.asked) == 2
    first, second = rollouts.actor.asked
    assert first[1] != second[1] and len(set(first[0] + second[0])) == 8  # four prompts each, none twice in an epoch
    for start, asked in ((0, first), (4, second)):
        once, again = (sorted(sum(map(rows_of, batches[at : at + 2]), [])) for at in (start, start + 2))
        assert once == again and [row[0] for row in once] == sorted(asked[0] * GROUP)
        assert [row[1] for row in once] == [3, 4] * 4
    assert rows_of(batches[0]) != rows_of(batches[2])  # another order in the second pass
    for number, tokens, advantage, truncated in rows_of(batches[0]):
        if number % 2:
            assert advantage == 0
        else:  # two rewards that differ by one, of which the longer completion has the larger
            assert advantage == pytest.approx((0.5 if tokens == 4 else -0.5) / (np.sqrt(0.5) + 1e-4))
        assert truncated == (tokens == 4)


def test_log_probs_stand_at_their_tokens_padded_and_packed():
    for layout in ({}, {"packing": "on", "packed_length": 24}):
        batch = source(**layout)(0, 3)
        at, mask = np.argwhere(batch["mask"]), batch["mask"]
        assert len(at) == batch["mask"].sum() > 0
        assert (batch["sampling_logps"][~mask] == 0).all() and (
            batch["old_logps"] == 10 * batch["sampling_logps"]
        ).all()
        for row in range(len(mask)):
            borders = np.flatnonzero(mask[row] & ~np.roll(mask[row], 1))
            assert (batch["sampling_logps"][row, borders] == -1).all()
            assert (batch["sampling_logps"][row, borders + 2] == -3).all()
        if layout:
            assert batch["advantages"].shape == batch["row_ids"].shape and (batch["row_ids"] != FILLER).sum() == 4
    assert "old_logps" not in source(scored=())(0, 3)


def test_prompts_and_seeds_depend_on_the_number_of_the_rollout_alone():
    straight, resumed = source(), source()
    for step in range(12):
        straight(step, 3)
    resumed(8, 3)
    assert resumed.actor.asked == straight.actor.asked[2:]
    assert source(seed=4)._order.examples_of(0).tolist() != straight._order.examples_of(0).tolist()


def test_what_is_kept_is_the_rollout_that_a_run_is_in_the_middle_of():
    rollouts = source()
    assert int(rollouts.kept(0)["number"]) == -1
    rollouts(4, 3)
    shapes = {name: (x.shape, x.dtype) for name, x in rollouts.kept(0).items()}
    for step, number in ((4, -1), (5, 1), (7, 1), (8, -1)):
        kept = rollouts.kept(step)
        assert int(kept["number"]) == number
        assert {name: (x.shape, x.dtype) for name, x in kept.items()} == shapes
    other = source()
    other.restore(rollouts.kept(6))
    batch, again = rollouts(6, 5), other(6, 5)  # the weights are others by now
    assert not other.actor.asked and batch.keys() == again.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], again[name])
    assert other.metrics() == rollouts.metrics() and other.shown() == rollouts.shown()


def test_groups_without_spread_give_way_to_new_prompts_within_the_rounds_allowed():
    plain, one, many = source(), source(resample=1), source(resample=20)
    for rollouts in (plain, one, many):
        rollouts(0, 3)
    odd = [i for i in plain.actor.asked[0][0] if i % 2]
    assert len(plain.actor.asked) == 1 and len(odd) > 0
    assert [len(places) for places, _ in one.actor.asked] == [4, len(odd)]
    assert plain.metrics()["frac_reward_zero_std"] == len(odd) / 4
    found = sum((rows_of(many(step, 3)) for step in (0, 1)), [])
    assert all(number % 2 == 0 and advantage for number, _, advantage, _ in found)
    assert many.metrics()["frac_reward_zero_std"] == 0
    assert many.metrics()["rollout/replaced_groups"] == len(odd) and "rollout/replaced_groups" not in plain.metrics()
    kept = [i for i in plain.actor.asked[0][0] if i % 2 == 0]
    assert set(kept) <= {number for number, *_ in found}  # groups with spread stay
    again = source(resample=20)
    again(0, 3)
    assert again.actor.asked == many.actor.asked


def test_no_prompt_is_in_a_rollout_twice():
    """Of ten prompts four are in a rollout, so that what would take the place of a group often is in it already."""
    rollouts = source(resample=4)
    for number in (0, 1, 3, 4, 5, 6, 8, 9):  # the others begin in one epoch and end in the next
        rollouts(4 * number, 3)
        groups = rollouts.rollout.prompts[::GROUP]
        assert len(set(groups.tolist())) == len(groups) == 4
    assert len(rollouts.actor.asked) > 10


def test_groups_have_spread_by_what_their_advantages_are_made_of():
    values = np.array([[0, 2], [1, 0], [1, 1], [1, 1], [0, 1], [0, 0]], np.float32)  # sums 1 1, 1.5 1.5, 0.5 0
    by_aggregation = {"sum_then_normalize": [False, False, True], "normalize_then_sum": [True, False, True]}
    for aggregation, expected in by_aggregation.items():
        rollouts = source(weights=(1.0, 0.5), aggregation=aggregation)
        assert rollouts._has_spread(values).tolist() == expected
    one = source(weights=(1.0, 0.0), aggregation="normalize_then_sum")
    assert one._has_spread(values).tolist() == [True, False, False]  # what counts nothing makes no difference


def test_log_probs_of_another_sampler_are_asked_for_where_they_are_needed():
    def without(rollouts):
        sample = rollouts.actor.sample
        rollouts.actor.sample = lambda *a, **k: dataclasses.replace(sample(*a, **k), logps=None)
        return rollouts

    batch = without(source(sampling_logps=False, scored=()))(0, 3)
    assert "sampling_logps" not in batch
    batch = without(source(scored=()))(0, 3)
    assert np.isnan(batch["sampling_logps"][batch["mask"]]).all()
    with pytest.raises(ValueError, match="have rollout.function return .token ids, mask, log-probs. for each row"):
        without(source(corrects=True))(0, 3)


def test_metrics_leave_out_what_has_no_reward_and_count_what_failed():
    rollouts = source(weights=(1.0, 1.0))
    rollouts(0, 3)
    found = rollouts.metrics()
    assert found["rewards/b/mean"] == 1 and found["rewards/b/error_rate"] == 0.5 and found["rewards/a/error_rate"] == 0
    assert found["completions/mean_length"] == 3.5 and found["completions/clipped_ratio"] == 0.5
    assert found["completions/mean_terminated_length"] == found["completions/max_terminated_length"] == 3


def test_steps_and_epochs_count_prompts():
    assert source().prompts_per_step == 1 and source().steps(1) == 10
    assert source(num_iterations=1).prompts_per_step == 2 and source(num_iterations=1).steps(1.5) == 8


def test_a_masked_completion_costs_no_kl_divergence():
    score = lambda sampled, *_: {"old_logps": sampled.sampling_logps, "ref_logps": 2 * sampled.sampling_logps}  # noqa: E731
    options = {"score": score, "scored": ("old_logps", "ref_logps"), "estimator": "leave_one_out", "beta": 0.01}
    found = {}
    for masks in (False, True):
        rollouts = source(mask_truncated=masks, **options)
        rollouts(0, 3)
        found[masks] = rollouts.rollout.advantages.reshape(-1, GROUP)
    # Three tokens cost 1 + 2 + 3 nats; the group's other completion, which has no end, 1 + 2 + 3 + 4 or nothing.
    ended = rollouts.rollout.truncated.reshape(-1, GROUP) == 0
    assert (ended == [True, False]).all()
    even = rollouts.rollout.prompts[::GROUP] % 2 == 0
    np.testing.assert_allclose(found[False][:, 0], np.where(even, -1, 0) - 0.06 + 0.10, atol=1e-6)
    np.testing.assert_allclose(found[True][:, 0], np.where(even, -1, 0) - 0.06, atol=1e-6)


def test_advantages_of_tokens_stand_at_their_tokens():
    score = lambda sampled, *_: {"old_logps": sampled.sampling_logps, "ref_logps": 2 * sampled.sampling_logps}  # noqa: E731
    rollouts = source(estimator="reinforce_pp", beta=0.1, score=score, scored=("old_logps", "ref_logps"))
    assert rollouts.kept(0)["advantages"].shape == (8, LENGTH)
    batch = rollouts(0, 3)
    assert batch["advantages"].shape == batch["tokens"].shape and (batch["advantages"][~batch["mask"]] == 0).all()
    row = batch["advantages"][0][batch["mask"][0]]
    assert (np.diff(row) > 0).all()  # less of the penalty is to come


def test_keys_that_do_nothing_or_contradict_are_named():
    given = {
        "workdir": "runs/x", "steps": 1, "model.path": "x", "data.path": "x", "loss.name": "grpo", "batch_size": 16,
        "rewards.functions": ("gsm8k",),
    }  # fmt: skip

    def problems(**changes):
        values = given | {name.replace("__", "."): value for name, value in changes.items()}
        values = {name: value for name, value in values.items() if value is not None}
        try:
            config.validate(config.nest(values))
        except ValueError as error:
            return str(error)
        return ""

    assert problems() == "" == problems(loss__name="reinforce", rollout__num_generations=1)
    offline = problems(loss__name="sigmoid", rollout__top_k=5)
    assert "rollout.top_k = 5 has no effect" in offline and "rewards.functions = ('gsm8k',) has no effect" in offline
    for changes, text in (
        ({"rewards__functions": None}, "rewards.functions is missing"),
        ({"rewards__functions": ("a.f", "b.py:f")}, "two of f, f have one name"),
        ({"rollout__min_new_tokens": 300}, "rollout.min_new_tokens = 300 is more than"),
        ({"loss__importance_sampling_correction": True, "loss__importance_sampling_clip_min": 4.0}, "4.0, not below"),
        ({"checkpoint__keep_best": 1, "data__eval__fraction": 0.1}, "e.g. eval_reward"),
        ({"rollout__num_generations": 1}, "grpo compares a completion with others of its prompt"),
        ({"rollout__num_generations": 1, "loss__name": "rloo"}, "rloo compares a completion"),
        ({"rollout__resample": 1, "rollout__num_generations": 1}, "replaces groups whose rewards are all alike"),
        ({"reference__mode": "cached", "loss__beta": 0.1}, "reference.mode=cached"),
        ({"data__max_prompt_length": 1000}, "no room for 1000 prompt tokens"),
        ({"data__on_long": "drop"}, "data.on_long = 'drop' has no effect"),
        ({"eval__temperature": 0.0, "loss__name": "sft", "rewards__functions": None}, "eval.temperature = 0.0 has no"),
        ({"reference__path": "x", "loss__beta": None}, "reference.path = 'x' has no effect"),
        ({"data__weight": "w"}, "prompts have no weight"),
    ):
        assert text in problems(**changes), (changes, problems(**changes))


def test_functions_beside_the_config_are_found_from_anywhere(tmp_path):
    (tmp_path / "mine.py").write_text("def good(completions, **columns):\n    return [1.0] * len(completions)\n")
    (tmp_path / "run.py").write_text(
        "from jaxalign.config import base\n"
        "def get_config(arg=None):\n"
        "    c = base()\n"
        "    c.steps, c.model.path, c.data.path, c.loss.name = 1, 'x', 'x', 'grpo'\n"
        "    c.rewards.functions, c.rollout.function = ('mine.good', 'gsm8k'), 'mine.good'\n"
        "    return c\n"
    )
    found = config.load(str(tmp_path / "run.py"))
    assert found.rewards.functions == (f"{tmp_path}/mine.py:good", "gsm8k")
    assert found.rollout.function == f"{tmp_path}/mine.py:good"
