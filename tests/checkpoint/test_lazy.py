import pytest
import torch
from safetensors.torch import save_file

from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.lazy import LazyTensor, lazy_state_dict


@pytest.fixture
def lazy(tmp_path):
    save_file({"t": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        yield LazyTensor(checkpoint, checkpoint.tensors["t"])


def test_is_read_when_indexed(lazy):
    tensor = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(lazy[...], tensor)
    assert torch.equal(lazy[:], tensor)
    assert torch.equal(lazy[1], tensor[1])
    assert torch.equal(lazy[:, 1:], tensor[:, 1:])


def test_each_read_is_its_own_memory(lazy):
    lazy[...].zero_()
    assert lazy[...].sum() == 15


def test_shape_and_dtype_are_those_of_a_slice(lazy):
    assert lazy.shape == (2, 3) and lazy.get_shape() == [2, 3]
    assert lazy.dtype is torch.float32 and lazy.get_dtype() == "F32"


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_transformers_loads_a_model_from_them(save_tiny, model_type):
    saved = save_tiny(model_type, sharded=True)
    with Checkpoint.open(saved.directory) as checkpoint:
        state = lazy_state_dict(checkpoint, checkpoint.tensors)
        loaded = type(saved.model).from_pretrained(
            None, config=saved.model.config, state_dict=state, dtype=torch.bfloat16
        )
    expected = saved.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
