"""The files a plan promises, against those that runs write."""

import json

import pytest
import torch
from transformers import AutoConfig

from hf_mlopt.hub.shards import ShardReader, TensorInfo
from hf_mlopt.planning import planned_layout, read_shape, read_source
from hf_mlopt.planning.layout import file_bytes, packed_bytes, saved_by_transformers
from hf_mlopt.pruning.removal import smaller_model
from hf_mlopt.streaming.skeleton import load_skeleton
from hf_mlopt.streaming.skeleton import output_layout as written_layout
from tests.command_line import hf_mlopt, save, succeed, weights
from tests.families import FUSED_FAMILIES, make_family


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def sizes(directory):
    return {file.name: file.stat().st_size for file in shards(directory)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("as_parameters", [False, True], ids=["as on the Hub", "as parameters"])
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_the_layout_is_the_one_that_streaming_writes(family, as_parameters, dtype, tmp_path):
    model = make_family(family, dtype)
    model.save_pretrained(tmp_path, save_original_format=not as_parameters, max_shard_size="40KB")
    source = read_source(str(tmp_path))
    shape = read_shape(source)
    with ShardReader(shards(tmp_path)) as reader:
        skeleton = load_skeleton(type(model), AutoConfig.from_pretrained(tmp_path), reader, "model")
        assert planned_layout(shape, source.layout) == written_layout(skeleton, reader.layout)
        kept = shape.num_experts - 2
        fewer = written_layout(smaller_model(skeleton, kept), reader.layout)
    promised = planned_layout(shape, source.layout, kept)
    assert promised == fewer
    assert [list(tensors) for tensors in promised.values()] == [list(tensors) for tensors in fewer.values()]


@pytest.mark.parametrize("stored, loaded", [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_the_dtype_written_is_the_one_a_model_is_loaded_in(stored, loaded, tmp_path):
    model = make_family("deepseek_v3", stored)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": loaded}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = read_source(str(tmp_path))
    with ShardReader(shards(tmp_path)) as reader:
        skeleton = load_skeleton(type(model), AutoConfig.from_pretrained(tmp_path), reader, "model")
        written = written_layout(skeleton, reader.layout)
    assert planned_layout(read_shape(source), source.layout) == written
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert written["model.safetensors"][bias].dtype == "F32"  # in either case


@pytest.mark.e2e
@pytest.mark.parametrize("options", [["--stream"], ["--in-memory"]], ids=lambda words: words[0][2:])
@pytest.mark.parametrize("family, extra", [("qwen3_moe", ["--drop-experts", "0.25"]), ("glm4_moe", [])])
def test_the_bytes_promised_are_the_bytes_written(family, extra, options, tmp_path, tiny_tokenizer):
    model = make_family(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = [tmp_path / "model", "--output", tmp_path / "pruned", "--sparsity", "0.5", "--calibration", "embedded"]
    words += ["--samples", "4", "--sequence-length", "32", *extra, *options]
    outcome = hf_mlopt("plan", *words, "--json", tmp_path / "plan.json")
    assert outcome.status == 0, outcome.out + outcome.err
    succeed("prune", *words)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["files"] == sizes(tmp_path / "pruned")
    assert plan["costs"]["output_bytes"] == plan["result"]["bytes"] == sum(sizes(tmp_path / "pruned").values())
    assert plan["result"]["parameters"] == sum(value.numel() for value in weights(tmp_path / "pruned").values())


def test_a_file_whose_experts_all_go_is_not_written(tmp_path, tiny_mixtral):
    source = read_source(str(save(tiny_mixtral(num_hidden_layers=1), None, tmp_path)))
    ((_, tensors),) = source.layout.items()
    last = {name: info for name, info in tensors.items() if ".experts.3." in name}
    split = {"a": {name: info for name, info in tensors.items() if name not in last}, "b": last}
    assert set(planned_layout(read_shape(source), split)) == {"a", "b"}
    assert set(planned_layout(read_shape(source), split, 3)) == {"a"}


def test_what_counts_experts_elsewhere_is_cut_too(tmp_path, tiny_mixtral):
    source = read_source(str(save(tiny_mixtral(num_hidden_layers=1), None, tmp_path)))
    name = "model.layers.0.block_sparse_moe.moe_statics.e_score_correction_bias"  # as Ernie has it
    source.layout["model.safetensors"][name] = TensorInfo("F32", (1, 4))
    assert planned_layout(read_shape(source), source.layout, 3)["model.safetensors"][name].shape == (1, 3)


def test_bytes_of_a_file_are_its_header_and_its_tensors(tmp_path, tiny_mixtral):
    source = read_source(str(save(tiny_mixtral(), None, tmp_path)))
    assert file_bytes(source.layout) == sizes(tmp_path)
    shuffled = {"x": dict(reversed(source.layout["model.safetensors"].items()))}
    assert file_bytes(saved_by_transformers(shuffled)) == sizes(tmp_path)


def test_packed_tensors_take_a_bit_a_weight_and_what_is_not_zero():
    layout = {"x": {"pruned": TensorInfo("BF16", (64, 32)), "dense": TensorInfo("BF16", (64, 32))}}
    assert packed_bytes(layout, {"pruned"}, 0.5) == 4096 * (0.5 + 1 / 16) + 4096
    assert packed_bytes(layout, {"pruned"}, 0.0) == 2 * 4096  # it would not get smaller
