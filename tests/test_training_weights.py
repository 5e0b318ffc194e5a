"""Checkpoints under the original Hub names, read back into fused experts."""

import pytest
import torch

from hf_mlopt.training.weights import load_converted_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
def test_fused_experts_are_restored_from_hub_names(tiny_mixtral, tmp_path, dtype, max_shard_size):
    source, model = tiny_mixtral().to(dtype), tiny_mixtral(seed=1).to(dtype)
    for one in (source, model):
        one.model.layers[0].mlp.gate.float()
    source.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert load_converted_weights(model, tmp_path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) and model.state_dict()[name].dtype == tensor.dtype


def test_plain_names_are_left_to_the_trainer(tiny_mixtral, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path, save_original_format=False)
    assert not load_converted_weights(tiny_mixtral(), tmp_path)
    assert not load_converted_weights(torch.nn.Linear(2, 2), tmp_path)
