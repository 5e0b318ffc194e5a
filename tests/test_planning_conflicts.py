"""Every conflict that a run would be refused for, and that the run is refused for it indeed."""

import json
from collections import namedtuple
from dataclasses import replace

import pytest

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import TensorInfo
from hf_mlopt.planning import conflicts, make_plan, plan, read_shape, read_source
from hf_mlopt.planning.memory import Peak
from hf_mlopt.pruning import PruningConfig, validate
from hf_mlopt.workflows.prune import PruneRecipe
from tests.command_line import save
from tests.families import make_family


Usage = namedtuple("Usage", "free")


@pytest.fixture
def model(tmp_path, tiny_mixtral):
    return save(tiny_mixtral(), None, tmp_path / "model")


def planned(model, **settings):
    settings = {"sparsity": 0.5, "samples": 4, "sequence_length": 32, "device": "cpu", **settings}
    return make_plan(PruneRecipe(model=str(model), **settings))


def conflicts_of(model, **settings):
    return planned(model, **settings).conflicts


def test_a_run_that_can_be_done_has_none(model, tmp_path):
    for settings in ({}, {"sparsity": None, "pattern": "2:4"}, {"drop_experts": 0.5}, {"scope": "all-linear"}):
        assert conflicts_of(model, output=str(tmp_path / "new"), **settings) == []


@pytest.mark.parametrize(
    "family, config, settings",
    [
        ("mixtral", {}, {"drop_experts": 0.75}),  # top-2 of one expert
        ("mixtral", {}, {"drop_experts": 0.1}),  # none goes
        ("deepseek_v3", {}, {"drop_experts": 0.375}),  # five experts in two groups
        ("deepseek_v2", {}, {"drop_experts": 0.75}),  # one expert in each group
        ("mixtral", {"intermediate_size": 63}, {"pattern": "2:4"}),
        ("granitemoe", {"intermediate_size": 30}, {"pattern": "4:8"}),
        ("gpt_oss", {"intermediate_size": 36}, {"pattern": "4:8"}),
        ("mixtral", {}, {"sparsity": 0.01}),
        ("mixtral", {"intermediate_size": 63}, {"sparsity": 0.5, "allocation": "load"}),
        ("olmoe", {}, {"sparsity": 0.98, "allocation": "load"}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 50}, {"pattern": "2:4", "scope": "all-linear"}),
        ("deepseek_v2", {"kv_lora_rank": 18}, {"pattern": "2:4", "scope": "all-linear"}),
    ],
)
def test_what_does_not_fit_the_model_is_what_prune_refuses(family, config, settings, tmp_path):
    if "sparsity" not in settings and "pattern" not in settings:
        settings = {"sparsity": 0.5, **settings}
    model = make_family(family, **config)
    found = conflicts_of(save(model, None, tmp_path), **{"sparsity": None, **settings})
    with pytest.raises(InputError) as refused:
        validate(model, PruningConfig(**settings))
    # Of a tensor, a plan gives the name in the files and prune that of the parameter.
    assert str(refused.value).partition(" of model.")[0].partition(" in model.")[0] in " ".join(found)
    assert all(line.startswith(("drop_experts=", "pattern=", "sparsity=", "allocation=")) for line in found)


def test_all_conflicts_are_listed_and_name_their_tensors(tmp_path):
    model = save(make_family("mixtral", intermediate_size=62), None, tmp_path / "model")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    found = conflicts_of(model, sparsity=None, pattern="2:4", drop_experts=0.75, output=str(tmp_path / "old"))
    assert len(found) == 3
    assert "4 does not divide the input width 62" in found[0]
    assert found[0].endswith(" of model.layers.0.block_sparse_moe.experts.0.w2.weight")
    assert found[1].startswith("drop_experts=0.75: keeps 1 of 4 experts")
    assert found[2].endswith("the directory is not empty; name a new one")


def test_a_quantized_checkpoint(model):
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    assert conflicts_of(model) == ["the checkpoint is quantized (quantization_config); prune the unquantized weights."]


def test_fp8_tensors_are_named(model):
    source = read_source(str(model))
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    source.layout["model.safetensors"][name] = TensorInfo("F8_E4M3", (64, 32))
    found = conflicts.model_conflicts(source, read_shape(source), PruningConfig(sparsity=0.5), False)
    assert found == [f"{name} is stored as F8_E4M3; prune the unquantized weights."]


def test_layers_with_different_numbers_of_experts(model):
    source = read_source(str(model))
    tensors = source.layout["model.safetensors"]
    for name in [name for name in tensors if ".layers.1." in name and ".experts.3." in name]:
        del tensors[name]
    found = conflicts.model_conflicts(source, read_shape(source), PruningConfig(drop_experts=0.25), False)
    assert found == ["drop_experts=0.25: the layers have 3 or 4 experts; they must have equally many"]


def test_more_experts_a_token_than_there_are(model):
    source = read_source(str(model))
    shape = replace(read_shape(source), top_k=5)
    (found,) = conflicts.model_conflicts(source, shape, PruningConfig(sparsity=0.5), False)
    assert found == "num_experts_per_tok=5: the model has 4 experts"


def test_code_of_the_checkpoint_must_be_trusted(model):
    source = read_source(str(model))
    source.config.update(model_type="own", auto_map={"AutoModelForCausalLM": "code.Model"})
    shape = read_shape(source)
    (found,) = conflicts.model_conflicts(source, shape, PruningConfig(sparsity=0.5), False)
    assert found.startswith("trust_remote_code=False: model type 'own' needs code of the checkpoint")
    assert conflicts.model_conflicts(source, shape, PruningConfig(sparsity=0.5), True) == []


def test_devices(model, monkeypatch):
    assert conflicts_of(model, device="tpu") == ["device='tpu': must be auto, cpu, cuda or cuda:N"]
    monkeypatch.setattr(conflicts, "gpu_memory", lambda device: None)
    (found,) = conflicts_of(model, device="cuda:1")
    assert found.startswith("device='cuda:1'")


@pytest.mark.parametrize(
    "parts, streamed, remedy",
    [
        ({"interpreter": 1, "weights": 9}, False, "--stream"),
        ({"states": 9, "layer": 1}, True, "--offload-states"),
        ({"workspace": 9, "layer": 1}, True, "lower batch_size (now 8)"),
        ({"states": 1, "layer": 9}, True, "the layer alone takes 9.00 GB"),
    ],
)
def test_too_little_memory(parts, streamed, remedy):
    peak = Peak("observing", {name: size * 10**9 for name, size in parts.items()})
    assert conflicts.memory_conflicts(peak, 10 * 10**9, "memory", streamed, 8) == []
    (found,) = conflicts.memory_conflicts(peak, 9 * 10**9, "memory", streamed, 8)
    assert found.startswith("memory: needs 10.00 GB, but 9.00 GB are available; ") and remedy in found


def test_memory_is_compared_with_what_this_machine_has(model, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 1000)
    small = planned(model)
    assert small.run["streamed"] and small.run["why"] == "the model does not fit in memory"
    assert [line.partition(":")[0] for line in small.conflicts] == ["memory"]
    assert not planned(model, stream=False).run["streamed"]


def test_pages_that_the_system_can_take_back_are_no_reason_to_refuse(model, monkeypatch):
    settings = {"stream": False, "sparsity": None, "drop_experts": 0.25, "samples": 1, "sequence_length": 1}
    peak = planned(model, **settings).peak
    assert peak.moment == "loading"
    monkeypatch.setattr(plan, "available_memory", lambda: peak.total - 1)
    assert planned(model, **settings).conflicts == []
    monkeypatch.setattr(plan, "available_memory", lambda: peak.total - peak.parts["mapped files"])
    assert [line.partition(":")[0] for line in planned(model, **settings).conflicts] == ["memory"]


def test_memory_of_a_gpu_counts_by_itself(model, monkeypatch):
    monkeypatch.setattr(plan, "gpu_memory", lambda device: 1000)
    found = planned(model, stream=True, device="auto")
    assert [line.partition(":")[0] for line in found.conflicts] == ["memory of the GPU"]
    assert "interpreter" in found.peak.parts and "workspace" not in found.peak.parts
    assert "workspace" in found.device_peak.parts and "interpreter" not in found.device_peak.parts


def test_too_little_disk(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mlopt.planning.machine.shutil.disk_usage", lambda path: Usage(10))
    (found,) = conflicts_of(model, output=str(tmp_path / "new"))
    assert found.startswith("output: needs 0.00 GB") and "free some space" in found
    # Both on one disk: what they need adds up.
    (found,) = conflicts_of(model, output=str(tmp_path / "new"), stream=True, offload_states=str(tmp_path / "states"))
    assert found.startswith("output and offload_states: needs")
    assert conflicts_of(model, output=str(tmp_path / "new"), resume=True) == []


def test_states_on_disk_are_streamed_and_need_a_directory(model, tmp_path):
    found = planned(model, offload_states=str(tmp_path / "states"))
    assert found.run["streamed"] and found.conflicts == [] and not (tmp_path / "states").exists()
    (tmp_path / "file").touch()
    (found,) = conflicts_of(model, offload_states=str(tmp_path / "file" / "states"))
    assert found.startswith("offload_states=") and found.endswith(f"cannot write in {tmp_path / 'file'}")


def test_room_for_a_download(model, tmp_path, monkeypatch):
    source = replace(read_source(str(model)), to_download=10**18, download_to=tmp_path / "cache")
    monkeypatch.setattr(plan, "read_source", lambda *_: source)
    (found,) = conflicts_of(model, output=str(tmp_path / "new"))
    assert found.startswith("output and model: needs 1000000000.")


@pytest.mark.parametrize("place", ["file", "full"])
def test_an_output_that_cannot_be_written(model, tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (found,) = conflicts_of(model, output=str(tmp_path / place))
    assert found.startswith("output=")


def test_an_unfinished_run_in_the_way(model, tmp_path):
    (tmp_path / ".new.unfinished" / "checkpoint").mkdir(parents=True)
    assert conflicts_of(model, output=str(tmp_path / "new"), stream=True) == []  # killed before it began
    (tmp_path / ".new.unfinished" / "manifest.json").touch()
    (found,) = conflicts_of(model, output=str(tmp_path / "new"), stream=True)
    assert "--resume" in found
    resumed = planned(model, output=str(tmp_path / "new"), resume=True)
    assert resumed.conflicts == [] and resumed.run["streamed"]
    assert conflicts_of(model, output=str(tmp_path / "new"), stream=False) == []


def test_what_is_only_noted(model):
    found = planned(model, sequence_length=2048, sparsity=0.0)
    assert found.conflicts == [] and found.run["sequence_length"] == 512
    assert found.notes[0] == "sequence_length=2048 is cut to the model's context of 512 tokens"
    assert "sparsity=0 removes nothing" in found.notes
    assert planned(model, samples=64, min_tokens=64).notes == []
    assert (
        "16 calibration tokens an expert on average, below min_tokens=64"
        in planned(model, samples=1, min_tokens=64).notes[0]
    )


def test_a_dtype_that_the_files_do_not_have_is_noted(model):
    config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    assert "experts are stored as F32, but loaded and written as BF16" in planned(model).notes
