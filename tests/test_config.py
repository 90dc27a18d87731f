"""The config: every key documented, every mistake found before anything expensive, what is saved loads again."""

import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from absl import flags

from jaxalign import config as C
from jaxalign.data.rows import find_files

CONFIGS = Path(__file__).parent.parent / "configs"


def good(**changes):
    """A valid flat config of a run without evaluation, with keys changed ("a.b": value)."""
    flat = {"workdir": "w", "steps": 10, "batch_size": 8, "model.path": "m", "data.path": "d.jsonl"} | changes
    config = C.base()
    for name, value in flat.items():
        set_key(config, name, value)
    return config


def set_key(config, name, value):
    *sections, field = name.split(".")
    for section in sections:
        config = config[section]
    config[field] = value


def problems(config, **kwargs):
    with pytest.raises(ValueError) as error:
        C.validate(config, **kwargs)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


EVAL = {"data.eval.fraction": 0.1}
REWARDED = {"rewards.functions": ("format",)}
BEST = {"checkpoint.keep_best": 1, "checkpoint.best_metric": "eval_loss", "checkpoint.best_mode": "min"}


# The table


def test_base_has_every_key_at_its_default_and_defaults_fit_their_own_types():
    base = C.flatten(C.base())
    for key in C.KEYS:
        assert base[key.name] == key.default
        assert C.coerce(key, key.default) == key.default
        assert key.help and key.help[-1] == "."
    assert len({key.name for key in C.KEYS}) == len(C.KEYS)


def test_base_is_new_each_time():
    config = C.base()
    config.mesh.data = 4
    assert C.base().mesh.data == -1


def test_describe_has_a_line_with_the_help_for_every_key():
    lines = {line.split()[0]: line for line in C.describe().splitlines() if line}
    assert list(lines) == [key.name for key in C.KEYS]
    assert all(lines[key.name].endswith(key.help) for key in C.KEYS)


def test_module_prints_the_table_and_never_imports_jax():
    code = "import sys; from jaxalign import config; print(config.describe()); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "optim.learning_rate" in done.stdout


def test_no_key_is_a_place_for_a_secret():
    secret = re.compile(r"api_?key|secret|password|token(?!izer|s\b)")
    assert not [key.name for key in C.KEYS if secret.search(key.name)]


def test_every_option_of_every_loss_and_optimizer_has_a_key():
    from jaxalign import optim
    from jaxalign.losses import LOSSES, POLICY, policy_options

    for options in (*(loss.options for loss in LOSSES.values()), *map(policy_options, POLICY)):
        for option, default in options.items():
            assert C.BY_NAME[f"loss.{option}"].default in (default, None)  # None: losses have different ones
    for name in optim.OPTIMIZERS:
        for option in optim.options(name):
            assert f"optim.{option}" in C.BY_NAME


def test_choices_that_other_modules_define_agree_with_them():
    from jaxalign import optim
    from jaxalign.models.decoder import REMAT_POLICIES

    assert C.BY_NAME["optim.schedule"].choices == optim.SCHEDULES
    assert set(C.BY_NAME["model.remat"].choices) == {"auto", *REMAT_POLICIES}


def test_every_key_is_read_by_the_program():
    """A key is read as `config.section.field`, or as a field in a file that takes its section as a whole."""
    package = Path(C.__file__).parent
    texts = [path.read_text() for path in package.glob("*.py") if path.stem not in ("config", "config_keys")]

    def is_read(name):
        section, _, field = name.rpartition(".")
        whole = rf'\bconfig\.{section}\b(?!\.[a-su-z])|\["{section}"\]'  # all but .to_dict()
        part = rf'\.{field}\b|\["{field}"\]|\bconfig\.{section}\.to_dict\(\)'
        there = any(re.search(whole, text) and re.search(part, text) for text in texts) if section else False
        return there or any(re.search(rf"\bconfig\.{re.escape(name)}\b", text) for text in texts)

    assert not [key.name for key in C.KEYS if not key.name.startswith("loss.") and not is_read(key.name)]
    assert not is_read("samples.nonsense") and not is_read("nonsense")
    assert any("config_lib.loss_arguments(" in text for text in texts)


# Types and unknown keys


def test_validate_completes_and_types_what_is_given():
    config = C.validate(
        {
            "workdir": "w", "steps": 3, "max_length": 64, "model": {"path": "m"},
            "data": {"path": "d", "buckets": [32, 64]}, "optim": {"learning_rate": 1},
        }
    )  # fmt: skip
    assert config.data.buckets == (32, 64)
    assert isinstance(config.optim.learning_rate, float)
    assert config.loss.beta is None and config.loss.gamma_beta_ratio == 0.5


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("steps", 1.5, "int or None"),
        ("steps", True, "int or None"),
        ("steps", 0, "[1, inf)"),
        ("optim.learning_rate", "1e-6", "float"),
        ("optim.learning_rate", float("nan"), "(0, inf)"),
        ("optim.learning_rate", float("inf"), "(0, inf)"),
        ("optim.b1", 1.0, "[0, 1)"),
        ("loss.beta", 0.0, "(0, inf)"),
        ("log.tensorboard", 1, "bool"),
        ("data.buckets", (16, "x"), "(int, ...)"),
        ("data.buckets", (0, 16), "[1, inf)"),
        ("model.random", 3, "dict or None"),
        ("samples.prompts", "hi", "int or (str, ...)"),
        ("optim.schedule", "cosin", "did you mean 'cosine'?"),
        ("resume", "always", "one of auto, force, never"),
        ("mesh.tensor", 0, "mesh.tensor is 0"),
        ("mesh.tensor", -2, "[-1, inf)"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_was_expected(key, value, expected):
    found = problems(good(**{key: value}))
    assert len(found) == 1
    assert key in found[0] and expected in found[0]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("step", "steps"), ("optim.learning_rat", "optim.learning_rate"), ("learning_rate", "optim.learning_rate"),
     ("optim.lr", "optim.learning_rate"), ("loss.betta", "loss.beta"), ("beta", "loss.beta")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(name, nearest, tmp_path):
    flat = C.flatten(good())
    nested = C.nest({**flat, name: 1})
    assert any(f"there is no key {name!r}; did you mean {nearest!r}" in problem for problem in problems(nested))


@pytest.mark.parametrize("name", ["vllm.host", "trl.use_vllm", "rollout.vllm_server_port"])
def test_keys_of_a_generation_server_are_named_as_such(name):
    message = f"there is no key {name!r}: no generation server is needed"
    assert any(message in problem for problem in problems(C.nest({name: 1})))
    with pytest.raises(ValueError, match=message):
        C.load("configs/grpo_smollm2.py", [f"{name}=1"])


def test_a_misspelt_key_is_not_complained_about_twice():
    config = good(steps=None)
    config.step = 5
    assert len(problems(config)) == 1


def test_all_problems_come_at_once():
    config = good(batch_size=7, gradient_accumulation_steps=2, epochs=1.0)
    config.optim.lr = 1.0
    config.loss.beta = "x"
    assert len(problems(config)) == 4


# Contradictions and keys without effect


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": None}, "steps, epochs"),
        ({"epochs": 1.0}, "steps, epochs"),
        ({"workdir": None}, "workdir"),
        ({"model.path": None}, "model.path, model.random"),
        ({"model.random": {"hidden_size": 8}, "tokenizer.path": "bytes"}, "model.path, model.random"),
        ({"model.path": None, "model.random": {"hidden_size": 8}}, "tokenizer.path"),
        ({"data.path": None}, "data.path"),
        ({"data.eval.fraction": 0.1, "data.eval.path": "e"}, "data.eval.fraction"),
        ({"data.eval.split": "train"}, "data.eval.split"),
        ({"data.buckets": (64, 32), "max_length": 64}, "data.buckets"),
        ({"data.buckets": (32, 64), "max_length": 128}, "data.buckets"),
        ({"data.max_prompt_length": 1024}, "data.max_prompt_length"),
        ({"data.format": "pair"}, "data.format"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps"),
        ({"mesh.fsdp": -1}, "mesh.data and mesh.fsdp"),
        ({"loss.name": "sigmod"}, "'sigmoid'"),
        ({"loss.name": "sft+dft"}, "'dft' is no term of a sum"),
        ({"loss.name": "kto+sigmoid"}, "'kto' is no term of a sum"),
        ({"loss.name": "attributes"}, "data.score_columns is missing"),
        ({"loss.name": "attributes", "data.score_columns": ("a", "b"), "loss.reward_weights": (1.0,)}, "1 numbers for"),
        ({"loss.name": "reward", "samples.prompts": 2}, "a reward model (reward) says nothing"),
        ({"lora.path": "adapter", "lora.rank": 4}, "has its own: set it to 0"),
        ({"lora.rank": 4, "reference.sync_every": 5}, "under LoRA are the frozen ones"),
        ({"data.packing": "on", "data.prefixes": (16,)}, "data.packing=shared"),
        ({"data.packing": "shared", "loss.name": "sft"}, "has one sequence: set it to on"),
        ({"data.packing": "shared", "model.attention": "splash"}, "model.attention=xla"),
        ({"loss.name": "sigmoid+sigmoid"}, "twice"),
        ({"loss.name": "sigmoid+sft", "loss.weights": (1.0,)}, "loss.weights"),
        ({"loss.name": "sigmoid+nca_pair", "loss.f_divergence_type": "forward_kl"}, "not go with 'nca_pair'"),
        ({"loss.name": "aot+ipo", "loss.use_weighting": True}, "loss.use_weighting = True does not go with 'aot'"),
        ({"loss.name": "simpo+ipo", "loss.ld_alpha": 0.5}, "loss.ld_alpha = 0.5 does not go with 'simpo'"),
        ({"loss.name": "exo_pair", "loss.label_smoothing": 0.0}, "exo_pair divides by it"),
        ({"loss.name": "simpoo"}, "did you mean 'simpo'?"),
        ({"reference.mode": "cached", "reference.sync_every": 5}, "reference.sync_every"),
        ({"optim.warmup_steps": 2, "optim.warmup_ratio": 0.1}, "optim.warmup_ratio"),
        ({"optim.warmup_steps": 11}, "optim.warmup_steps"),
        ({"optim.name": "adamww"}, "'adamw'"),
        ({"log.profile_steps": (5,)}, "log.profile_steps"),
        ({"checkpoint.keep_best": 1, **EVAL}, "checkpoint.best_metric"),
        ({"checkpoint.keep_best": 1, "checkpoint.best_metric": "eval_loss", **EVAL}, "checkpoint.best_mode"),
        (BEST, "data.eval"),
        ({"early_stopping.metric": "loss", "early_stopping.mode": "min", **EVAL}, "eval_"),
        ({"early_stopping.metric": "eval_loss", "early_stopping.mode": "min"}, "data.eval"),
        ({"early_stopping.metric": "eval_loss", "early_stopping.mode": "min", "eval.every": 0, **EVAL}, "eval.every"),
        ({"export.step": "best"}, "export.step"),
        (
            {
                "loss.name": "vespo",
                "loss.importance_sampling_correction": True,
                "loss.importance_sampling_mode": "sequence_mask",
                **REWARDED,
            },
            "vespo takes token_truncate or token_mask",
        ),
        ({"model.path": "hf_abcdefghijklmnopqrstuv"}, "secret"),
        ({"data.path": "https://me:pw@host/x.jsonl"}, "secret"),
    ],
)
def test_a_contradiction_is_found(changes, named):
    found = problems(good(**changes))
    assert len(found) == 1, found
    assert named in found[0]


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("loss.weights", (2.0,), {}),
        ("loss.label_smoothing", 0.1, {"loss.name": "ipo"}),
        ("loss.length_normalize", False, {}),
        ("loss.gamma_beta_ratio", 0.3, {"loss.name": "cpo"}),
        ("loss.cpo_alpha", 0.3, {"loss.name": "orpo"}),
        ("loss.ld_alpha", 0.3, {"loss.name": "simpo"}),
        ("loss.use_weighting", True, {"loss.name": "aot"}),
        ("loss.f_alpha_divergence_coef", 0.3, {}),
        ("loss.f_alpha_divergence_coef", 0.3, {"loss.name": "aot"}),
        ("reference.mode", "cached", {"loss.name": "simpo"}),
        ("reference.path", "other", {"loss.name": "orpo+cpo"}),
        ("reference.sync_alpha", 0.5, {}),
        ("loss.desirable_weight", 2.0, {"loss.name": "bco"}),
        ("loss.reward_weights", (1.0,), {"loss.name": "reward"}),
        ("data.train_on", "all", {}),
        ("data.score_columns", ("a",), {}),
        ("data.packed_length", 2048, {}),
        ("data.buckets", (1024,), {"data.packing": "on"}),
        ("lora.alpha", 4.0, {}),
        ("model.quantize", "int8", {}),
        ("lora.targets", ("q_proj",), {"lora.path": "adapter"}),
        ("optim.b1", 0.8, {"optim.name": "rmsprop"}),
        ("optim.momentum", 0.8, {}),
        ("optim.weight_decay", 0.1, {"optim.name": "adam"}),
        ("optim.final_ratio", 0.1, {"optim.schedule": "constant"}),
        ("checkpoint.best_metric", "eval_loss", EVAL),
        ("checkpoint.best_mode", "min", EVAL),
        ("eval.every", 7, {}),
        ("eval.max_rows", 7, {}),
        ("samples.max_new_tokens", 7, {}),
        ("samples.every", 7, {}),
        ("early_stopping.patience", 7, EVAL),
        ("early_stopping.mode", "min", EVAL),
        ("export.dtype", "float32", {"export.enabled": False}),
        ("loss.epsilon", 0.1, {"loss.name": "sapo", **REWARDED}),
        ("loss.use_bias_correction_kl", False, {"loss.name": "grpo", **REWARDED}),
        ("loss.importance_sampling_clip_max", 2.0, {"loss.name": "dapo", **REWARDED}),
        ("rewards.scale", "none", {"loss.name": "rloo", **REWARDED}),
        ("reference.path", "other", {"loss.name": "grpo", **REWARDED}),
        ("reference.path", "other", {"loss.name": "rloo", "loss.beta": 0.0, **REWARDED}),
    ],
)
def test_a_key_without_effect_is_an_error(key, value, others):
    found = problems(good(**others, **{key: value}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{key} = ") and "has no effect" in found[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": None, "epochs": 0.5},
        {"loss.name": "sigmoid+sft", "loss.weights": (1.0, 0.5), "loss.label_smoothing": 0.1},
        {"loss.name": "sft", "data.train_on": "last", "data.packing": "on", "data.packed_length": 2048},
        {"loss.name": "kto", "loss.desirable_weight": 1.33, "data.weight": "quality", "data.packing": "shared"},
        {"loss.name": "attributes", "data.score_columns": ("a", "b"), "loss.reward_weights": (1.0, -1.0)},
        {"lora.rank": 8, "lora.targets": ("q_proj",), "model.quantize": "nf4", "lora.modules_to_save": ("lm_head",)},
        {"lora.path": "adapter", "lora.dropout": 0.1},
        {"loss.name": "robust", "loss.label_smoothing": 0.1},
        {"loss.name": "ipo", "loss.length_normalize": False},
        {"loss.name": "simpo", "loss.gamma_beta_ratio": 0.3, "loss.cpo_alpha": 0.1, "loss.alpha": 0.25},
        {"loss.name": "sigmoid+bco_pair+sft", "loss.weights": (0.8, 0.2, 1.0), "loss.ld_alpha": 0.5},
        {"loss.f_divergence_type": "alpha_divergence", "loss.f_alpha_divergence_coef": 0.3, "loss.use_weighting": True},
        {"loss.name": "simpo+ipo", "reference.mode": "cached"},
        {"optim.name": "sgd", "optim.momentum": 0.9},
        {"optim.name": "rmsprop", "optim.b2": 0.9, "optim.weight_decay": 0.1},
        {"optim.max_grad_norm": None},
        {"reference.sync_every": 5, "reference.sync_alpha": 0.5},
        {**BEST, **EVAL, "export.step": "best"},
        {"data.eval.path": "d", "data.eval.split": "train", "eval.every": 3},
        {"samples.prompts": ("hi", "you"), "samples.temperature": 1.0},
        {"data.buckets": (32, 1024), "mesh.fsdp": 8},
    ],
)
def test_what_makes_sense_together_is_accepted(changes):
    C.validate(good(**changes), n_devices=8)


def test_a_dataset_given_in_python_replaces_data_path():
    C.validate(good(**{"data.path": None}), has_dataset=True)
    assert "a dataset is given" in problems(good(), has_dataset=True)[0]


def test_an_eval_dataset_given_in_python_replaces_data_eval():
    C.validate(good(**BEST, **{"eval.every": 5}), has_eval_dataset=True)
    assert "an eval_dataset is given" in problems(good(**EVAL), has_eval_dataset=True)[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mesh.data": 3}, "8 devices"),
        ({"mesh.data": 2, "mesh.fsdp": 2}, "8 devices"),
        ({"mesh.fsdp": 3}, "8 devices"),
        ({"batch_size": 6}, "no multiple of mesh.data x mesh.fsdp = 8"),
        ({"gradient_accumulation_steps": 4}, "a micro-batch has 4 rows"),
        ({"eval.batch_size": 3, **EVAL}, "eval.batch_size"),
        ({"mesh.sequence": 8, "data.buckets": (100, 1024)}, "mesh.sequence"),
    ],
)
def test_what_the_devices_cannot_share_is_found(changes, named):
    C.validate(good(**changes))  # without devices nothing is wrong
    found = problems(good(**changes), n_devices=8)
    assert len(found) == 1, found
    assert named in found[0]


def test_loss_arguments_are_those_of_the_objective():
    from jaxalign import objectives

    config = C.validate(good(**{"loss.name": "sigmoid+sft", "loss.weights": (1.0, 0.5), "loss.beta": 0.2}))
    assert C.loss_arguments(config) == ({"sigmoid": 1.0, "sft": 0.5}, {"beta": 0.2})
    assert C.loss_arguments(C.validate(good(**{"loss.name": "simpo"}))) == ({"simpo": 1.0}, {})
    assert C.loss_arguments(C.validate(good(**{"loss.name": "exo_pair", "loss.beta": 0.1, "loss.ld_alpha": 0.5}))) == (
        {"exo_pair": 1.0},
        {"beta": 0.1, "ld_alpha": 0.5},
    )
    terms, options = C.loss_arguments(config)
    assert objectives.pairwise(None, terms, **options).terms == (("sigmoid", 1.0), ("sft", 0.5))


# Files, overrides, flags


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from jaxalign import config as c\n"
        "def get_config(arg=None):\n"
        "    x = c.base()\n"
        "    x.steps = int(arg or 3)\n"
        "    x.model.path = 'm'\n"
        "    x.data.path = 'd'\n"
        "    return x\n"
    )
    return path


def test_load_runs_a_file_with_its_argument_and_names_the_workdir(config_file):
    assert C.load(str(config_file)).steps == 3
    config = C.load(f"{config_file}:5")
    assert (config.steps, config.workdir) == (5, str(Path("runs") / "mine-5"))
    assert C.load(str(config_file), arg="6").steps == 6
    assert C.load(f"{config_file}:5", ["steps=7", "config.workdir=here"]).workdir == "here"
    with pytest.raises(ValueError, match="give one"):
        C.load(f"{config_file}:5", arg="6")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.learning_rate=5e-7", 5e-7),
        ("optim.learning_rate=1", 1.0),
        ("optim.max_grad_norm=none", None),
        ("optim.max_grad_norm=2", 2.0),
        ("log.tensorboard=true", True),
        ("eval.at_start=False", False),
        ("steps=1_000", 1000),
        ("data.eval.split=test", "test"),
        ("data.buckets=512,1024", (512, 1024)),
        ("data.buckets=(1024,)", (1024,)),
        ("data.buckets=()", ()),
        ("samples.prompts=4", 4),
        ("samples.prompts=['a, b', 'c']", ("a, b", "c")),
        ("model.path=a=b", "a=b"),
        ("optim.b1=", None),
    ],
)
def test_an_override_is_read_by_its_keys_type(config_file, text, value):
    needed = ["data.eval.path=e"] if "eval" in text else []
    config = C.load(str(config_file), [*needed, text])
    found = C.flatten(config)[text.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["steps=1.5", "steps=x", "log.tensorboard=yes", "optim.learning_rate=fast", "steps",
                                  "data.buckets=a,b", "nothing=1"])  # fmt: skip
def test_a_bad_override_is_an_error_that_names_it(config_file, text):
    with pytest.raises(ValueError, match="has a problem:\n  .*" + text.partition("=")[0]):
        C.load(str(config_file), [text])


def test_names_in_a_dict_key_may_have_dots(tmp_path):
    """As paths of reward models have."""
    options = {"model:../rm-0.6B": {"batch_size": 4}, "length": {"target": 8}}
    (tmp_path / "mine.py").write_text(
        "from jaxalign import config\n\n\ndef get_config(arg=None):\n    c = config.base()\n    c.steps = 1\n"
        "    c.model.path = c.data.path = 'x'\n    c.loss.name = 'grpo'\n    c.batch_size = 8\n"
        f"    c.rewards.functions = {tuple(options)}\n    c.rewards.options = {options}\n    return c\n"
    )
    loaded = C.load(str(tmp_path / "mine.py"))
    assert loaded.rewards.options == options
    (tmp_path / "config.json").write_text(C.to_json(loaded))
    assert C.diff(C.load(str(tmp_path / "config.json")), loaded) == []


def test_a_field_of_a_dict_key_can_be_overridden(config_file):
    fields = ["model.random.hidden_size=8", "model.random.model_type=llama"]
    overrides = ["model.path=none", "tokenizer.path=bytes", *fields]
    assert C.load(str(config_file), overrides).model.random == {"hidden_size": 8, "model_type": "llama"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_config():\n  from jaxalign.config import base\n  c = base()\n  c.optm.b1 = 1\n  return c", "optim"),
        ("x = 1", "get_config"),
        ("def get_config():\n  return 3", "ConfigDict"),
        ("def get_config(:", "invalid syntax"),
        ("def get_config():\n  return {'stepss': 1}", "'steps'"),
    ],
)
def test_a_broken_config_file_is_an_error_that_names_file_or_key(tmp_path, body, message):
    path = tmp_path / "broken.py"
    path.write_text(body)
    with pytest.raises(ValueError, match=message):
        C.load(str(path))


def test_a_missing_config_names_those_there_are():
    with pytest.raises(ValueError, match="tiny"):
        C.load("no_such_config")
    with pytest.raises(ValueError, match="not found"):
        C.load("nowhere/x.py")


def test_json_comes_back_equal_and_is_a_config_itself(tmp_path):
    config = C.validate(good(**{"data.buckets": (512, 1024), "optim.learning_rate": 1 / 3, "samples.prompts": ("ä",)}))
    path = tmp_path / "config.json"
    path.write_text(C.to_json(config))
    assert C.load(str(path)) == config
    assert C.load(str(tmp_path)) == config
    assert C.load(str(path)).optim.learning_rate == 1 / 3
    content = json.loads(path.read_text())
    content["optim"]["lr"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="optim.lr"):
        C.load(str(path))


def test_resume_is_not_saved():
    assert "resume" not in json.loads(C.to_json(C.validate(good(resume="force"))))


def parse(*arguments):
    return C.parse(["train", *arguments], flags.FlagValues())


def test_parse_takes_overrides_in_both_spellings_and_the_resume_flag(config_file):
    overrides = ["--config.loss.beta=0.5", "--config.log.tensorboard", "--config.seed", "3"]
    config = parse(f"--config={config_file}:4", *overrides, "--resume=force")
    assert (config.steps, config.loss.beta, config.log.tensorboard, config.seed) == (4, 0.5, True, 3)
    assert config.resume == "force"


def test_parse_keeps_other_flags_of_a_program(config_file):
    values = flags.FlagValues()
    flags.DEFINE_integer("rows", 3, "", flag_values=values)
    C.parse(["preview", f"--config={config_file}", "--rows=5"], values)
    assert values.rows == 5


def test_print_config_prints_what_load_reads(config_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(f"--config={config_file}", "--print_config", "--config.steps=9")
    assert stop.value.code == 0
    (tmp_path / "c.json").write_text(capsys.readouterr().out)
    assert C.load(str(tmp_path / "c.json")).steps == 9


def test_help_config_prints_the_table(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help_config")
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == C.describe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=FILE", "steps=3"], "unexpected argument 'steps=3'"),
        (["--config=FILE", "--confg.steps=3"], "confg"),
        (["--config=FILE", "--resume=maybe"], "resume"),
        (["--config=FILE", "--config.steps=0", "--config.loss.bta=1"], "2 problems"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(config_file, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parse(*(argument.replace("FILE", str(config_file)) for argument in arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# Resuming


def test_diff_lists_changed_keys_and_fills_defaults():
    assert C.diff(good(), good(**{"loss.beta": 0.2, "data.buckets": (1024,)})) == [
        ("data.buckets", (), (1024,)),
        ("loss.beta", None, 0.2),
    ]
    assert C.diff(json.loads(C.to_json(good())), good()) == []
    assert C.diff({"steps": 3, "gone": 1}, {"steps": 3}) == [("gone", 1, None)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 20), ("log.every", 3), ("eval.every", 3), ("checkpoint.every", 3), ("mesh.fsdp", 2), ("workdir", "v"),
     ("samples.prompts", 3), ("export.enabled", False), ("early_stopping.metric", "eval_loss"), ("data.workers", 1)],
)  # fmt: skip
def test_a_resumed_run_may_change_how_it_is_run(key, value):
    assert [name for name, _, _ in C.check_resume(good(), good(**{key: value}))] == [key]


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.path", "other"), ("data.path", "other"), ("data.eval.fraction", 0.1), ("loss.beta", 0.2), ("seed", 1),
     ("optim.learning_rate", 1.0), ("batch_size", 16), ("max_length", 8), ("reference.sync_every", 2)],
)  # fmt: skip
def test_a_resumed_run_may_not_change_what_it_computes_unless_forced(key, value):
    changed = good(**{key: value})
    with pytest.raises(ValueError, match=re.escape(key) + ".* -> "):
        C.check_resume(good(), changed)
    changed.resume = "force"
    assert key in [name for name, _, _ in C.check_resume(good(), changed)]


def test_what_may_change_is_made_of_keys_that_exist():
    for prefix in C.RESUME_MAY_CHANGE:
        assert prefix in C.BY_NAME or any(name.startswith(prefix + ".") for name in C.BY_NAME)


# The shipped configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_its_docstring_holds_the_command(path):
    config = C.load(str(path))
    assert C.load(path.stem) == config
    doc = path.read_text().split('"""')[1]
    assert f"--config=configs/{path.name}" in doc
    assert re.search(r"Expected time.*numbers:", doc, re.DOTALL)
    for source in (config.data.path, config.data.eval.path):
        if source is not None and source.startswith("package:"):
            assert find_files(source)


def test_key_types_are_those_that_the_check_knows():
    known = {int, float, str, bool, dict, type(None)}
    for key in C.KEYS:
        for member in C.members(key.type):
            assert member in known or typing.get_origin(member) is tuple
