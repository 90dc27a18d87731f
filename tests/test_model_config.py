"""config.json to ModelConfig and back: both spellings, HF's defaults, and the refusal of all that would be ignored."""

import dataclasses
import json

import pytest
from common import policy

from jaxalign.models.config import FAMILIES, RopeScaling, config_from_hf, config_to_hf

MODELS = ("llama", "qwen2", "qwen3", "llama_rope3")

LLAMA31 = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    rope_theta=500000.0,
    rope_scaling=dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    torch_dtype="bfloat16",
)


def golden(model: str, name: str = "config.json") -> dict:
    return json.loads((policy(model) / name).read_text())


@pytest.mark.parametrize("model", MODELS)
def test_both_spellings_give_the_same_config(model):
    assert config_from_hf(golden(model)) == config_from_hf(golden(model, "config_transformers4.json"))


@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_the_identity(model):
    cfg = config_from_hf(golden(model))
    assert config_from_hf(config_to_hf(cfg)) == cfg
    assert hash(cfg) == hash(config_from_hf(config_to_hf(cfg)))


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_means_the_same_in_either_spelling(model):
    written = config_to_hf(config_from_hf(golden(model)))
    old = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert config_from_hf(old) == config_from_hf(new) == config_from_hf(golden(model))


def test_llama31_is_read_in_full():
    cfg = config_from_hf(LLAMA31)
    assert cfg.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (cfg.rope_theta, cfg.head_dim, cfg.dtype) == (500000.0, 128, "bfloat16")
    assert cfg.eos_token_id == (128001, 128008, 128009)
    assert config_to_hf(cfg)["eos_token_id"] == [128001, 128008, 128009]
    assert config_from_hf(config_to_hf(cfg)) == cfg


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_defaults_of_absent_fields_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    ours = config_from_hf({"model_type": model_type})
    for field in dataclasses.fields(ours):
        if field.name in theirs and field.name not in ("eos_token_id", "dtype", "rope_scaling"):
            assert getattr(ours, field.name) == theirs[field.name], field.name
    assert ours.eos_token_id == (() if theirs["eos_token_id"] is None else (theirs["eos_token_id"],))
    # qwen2's head_dim is no field there
    assert ours.head_dim == (theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"])
    window = theirs.get("sliding_window")
    assert set(ours.sliding_windows) == {window}


@pytest.mark.parametrize("model", [*MODELS, "llama31", "mistral", "qwen2_windows", "linear", "reward"])
def test_transformers_reads_what_we_write(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    sources = {
        "llama31": LLAMA31,
        "mistral": {"model_type": "mistral", "sliding_window": 128, "num_hidden_layers": 2},
        "qwen2_windows": {**golden("qwen2"), "layer_types": ["sliding_attention", "full_attention"]}
        | {"use_sliding_window": True, "sliding_window": 64},
        "linear": {**golden("llama"), "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        "reward": {**golden("llama"), "architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
    }
    cfg = config_from_hf(sources.get(model) or golden(model))
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(cfg)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(cfg):
        if hasattr(theirs, field.name) and field.name not in ("eos_token_id", "rope_scaling", "dtype", "num_labels"):
            assert getattr(theirs, field.name) == getattr(cfg, field.name), field.name
    assert str(theirs.dtype).removeprefix("torch.") == cfg.dtype
    assert theirs.rope_parameters["rope_theta"] == cfg.rope_theta
    assert theirs.rope_parameters["rope_type"] == (cfg.rope_scaling.rope_type if cfg.rope_scaling else "default")
    for name, value in vars(cfg.rope_scaling).items() if cfg.rope_scaling else ():
        assert theirs.rope_parameters.get(name) == value
    if model == "qwen2_windows":
        assert theirs.layer_types == ["sliding_attention", "full_attention"] and theirs.sliding_window == 64
    # and what transformers then writes is read by us as the same model
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config_from_hf(again) == cfg


def test_sliding_windows_follow_each_familys_rule():
    mistral = {"model_type": "mistral", "num_hidden_layers": 2}
    assert config_from_hf(mistral).sliding_windows == (4096, 4096)
    assert config_from_hf({**mistral, "sliding_window": None}).sliding_windows == (None, None)
    qwen = {"model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 8, "max_window_layers": 1}
    assert config_from_hf(qwen).sliding_windows == (None, None, None)
    assert config_from_hf({**qwen, "use_sliding_window": True}).sliding_windows == (None, 8, 8)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    cfg = config_from_hf({**qwen, "use_sliding_window": True, "layer_types": kinds})
    assert cfg.sliding_windows == (8, None, 8)
    assert config_to_hf(cfg)["layer_types"] == kinds


def test_biases_follow_each_familys_rule():
    llama = config_from_hf({"model_type": "llama", "attention_bias": True, "mlp_bias": True})
    assert (llama.attention_bias, llama.attention_out_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = config_from_hf({"model_type": "qwen2"})
    assert (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = config_from_hf({"model_type": "qwen3"})
    assert (qwen3.attention_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


def test_number_of_labels_comes_from_id2label_or_is_transformers_two():
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    assert config_from_hf({**config, "id2label": {"0": "LABEL_0"}}).num_labels == 1
    assert config_from_hf(config).num_labels == 2
    assert config_from_hf({"model_type": "llama", "id2label": {"0": "LABEL_0"}}).num_labels == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(model_type="gemma2"), "gemma2.*llama.*mistral.*qwen2.*qwen3"),
        (dict(model_type=None), "model_type None"),
        (dict(model_type="evil", auto_map={"AutoModel": "evil.Model"}), "never"),
        (dict(architectures=["LlamaForTokenClassification"]), "LlamaForTokenClassification"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn.*linear and llama3"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
        (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "longrope"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "by layer"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0)), "high_freq_factor"),
        (dict(rope_scaling=dict(rope_type="linear")), "factor"),
        (dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5, rope_type="default")), "contradicts"),
        (
            dict(rope_scaling=dict(rope_type="linear", factor=2.0), rope_parameters=dict(rope_type="default")),
            "contradicts",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(hidden_act="gelu"), "gelu.*silu"),
        (dict(quantization_config=dict(quant_method="gptq")), "quantised"),
        (dict(torch_dtype="float64"), "float64"),
        (dict(num_attention_heads=32, num_key_value_heads=5), "multiple"),
        (dict(hidden_size=65, num_attention_heads=4), "head_dim"),
        (dict(head_dim=33), "even"),
        (dict(hidden_size="4096"), "hidden_size = '4096'"),
        (dict(num_hidden_layers=0), "num_hidden_layers = 0"),
        (dict(rms_norm_eps=0), "rms_norm_eps = 0"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
        (dict(eos_token_id="</s>"), "eos_token_id"),
    ],
)
def test_what_is_not_implemented_or_broken_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        config_from_hf({"model_type": "llama", **change})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(model_type="qwen2", num_hidden_layers=2, layer_types=["full_attention"]), "1 entries"),
        (dict(model_type="qwen3", num_hidden_layers=1, layer_types=["chunked_attention"]), "chunked_attention"),
        (dict(model_type="qwen3", num_hidden_layers=1, layer_types=["sliding_attention"]), "no window"),
        (dict(model_type="mistral", num_hidden_layers=1, layer_types=["full_attention"]), "one window"),
    ],
)
def test_contradicting_windows_are_refused(config, says):
    with pytest.raises(ValueError, match=says):
        config_from_hf(config)


def test_a_config_that_its_family_cannot_say_is_not_written():
    llama, qwen2 = config_from_hf(golden("llama")), config_from_hf(golden("qwen2"))
    qwen3 = config_from_hf(golden("qwen3"))
    mistral = config_from_hf({"model_type": "mistral", "num_hidden_layers": 2})
    for cfg in (
        dataclasses.replace(llama, attention_bias=True),
        dataclasses.replace(llama, sliding_windows=(4, 4)),
        dataclasses.replace(mistral, sliding_windows=(4, None)),
        dataclasses.replace(qwen2, qk_norm=True),
        dataclasses.replace(qwen2, sliding_windows=(4, 8)),
        dataclasses.replace(qwen3, mlp_bias=True),
        dataclasses.replace(llama, model_type="other"),
    ):
        with pytest.raises(ValueError, match="config.json"):
            config_to_hf(cfg)
