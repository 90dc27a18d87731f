"""The mesh and its rules: total both ways, and no silent fall-back for what does not divide."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign import models, sharding
from jaxalign.models import Weight


def test_four_axes_always_exist_and_minus_one_takes_what_is_left():
    mesh = sharding.make_mesh(fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"data": 3}, "needs a total of 3"), ({"data": -1, "fsdp": -1}, "at most one"), ({"fsdp": -1, "tensor": 3}, "8")],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_an_unknown_logical_axis_raises():
    mesh = sharding.make_mesh(fsdp=8)
    with pytest.raises(ValueError, match="w.*'embd' has no rule"):
        sharding.param_shardings(mesh, {"w": Weight((8,), ("embd",))})


def test_a_dimension_that_does_not_divide_raises_with_the_way_out():
    mesh = sharding.make_mesh(fsdp=8)
    with pytest.raises(ValueError, match=r"layers/w.*12 \(embed\).*'fsdp': 8.*mesh.data"):
        sharding.param_shardings(mesh, {"layers": {"w": Weight((2, 12), ("layers", "embed"))}})


def test_a_vocabulary_takes_the_largest_split_that_divides_it():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    for size, axes in ((48, ("tensor", "fsdp")), (44, ("fsdp",)), (46, ("tensor",)), (47, None)):
        assert sharding.partition((size, 16), ("vocab", None), mesh) == P(axes, None)


def test_every_weight_of_a_model_is_split_over_fsdp_and_tensor_but_norms():
    cfg = models.config_from_hf(
        dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    )  # fmt: skip
    shardings = sharding.param_shardings(sharding.make_mesh(fsdp=4, tensor=2), models.declare(cfg))
    layers = shardings["layers"]
    assert layers["self_attn"]["q_proj"]["kernel"].spec == P(None, ("fsdp",), ("tensor",))
    assert layers["mlp"]["down_proj"]["kernel"].spec == P(None, ("tensor",), ("fsdp",))
    assert shardings["embed_tokens"]["embedding"].spec == P(("tensor", "fsdp"), None)
    for path, one in jax.tree_util.tree_leaves_with_path(shardings):
        assert (len(one.device_set) == 8 and not one.is_fully_replicated) == (path[-1].key != "scale")


def test_a_process_feeds_each_of_its_rows_once_whatever_the_tensor_axis():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    np.testing.assert_array_equal(sharding.process_rows(mesh, 12), np.arange(12))
    with pytest.raises(ValueError, match="10 rows.*4"):
        sharding.process_rows(mesh, 10)


def test_constraints_are_hints_that_never_fail():
    x = np.ones((3, 5), np.float32)
    assert sharding.constrain(x, sharding.ROWS, "tensor") is x  # no mesh
    with sharding.use_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
        np.testing.assert_array_equal(jax.jit(lambda x: sharding.constrain(x, sharding.ROWS, "tensor"))(x), x)
