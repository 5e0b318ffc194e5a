import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config, Mxfp4Config

from hf_mlopt.errors import InputError
from hf_mlopt.hub import (
    check_output,
    checkpoint_bytes,
    environment,
    model_provenance,
    resolve_checkpoint,
    save_checkpoint,
    staged_output,
)


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 4}

QWEN_EXPERTS = {f"mlp.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")}
MIXTRAL_EXPERTS = {f"block_sparse_moe.experts.{e}.{p}.weight" for e in range(4) for p in ("w1", "w2", "w3")}
SHARED_EXPERTS = {f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}

# Model type: what its configuration needs, and the names of the sparse block of layer 1 as on the Hub. In order:
# mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen1.5-MoE-A2.7B, Qwen/Qwen3-30B-A3B, allenai/OLMoE-1B-7B-0924,
# deepseek-ai/DeepSeek-V2-Lite, deepseek-ai/DeepSeek-V3, microsoft/Phi-3.5-MoE-instruct,
# ibm-granite/granite-3.0-1b-a400m-base, unsloth/gpt-oss-20b-BF16, zai-org/GLM-4.5-Air.
FAMILIES = {
    "mixtral": ({"num_local_experts": 4}, MIXTRAL_EXPERTS | {"block_sparse_moe.gate.weight"}),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        QWEN_EXPERTS
        | {f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
        | {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    ),
    "qwen3_moe": (
        {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 4},
        QWEN_EXPERTS | {"mlp.gate.weight"},
    ),
    "olmoe": ({"num_experts": 4}, QWEN_EXPERTS | {"mlp.gate.weight"}),
    "deepseek_v2": (
        {**DEEPSEEK, **MLA, "q_lora_rank": None},
        QWEN_EXPERTS | SHARED_EXPERTS | {"mlp.gate.weight"},
    ),
    "deepseek_v3": (
        {**DEEPSEEK, **MLA, "q_lora_rank": 8},
        QWEN_EXPERTS | SHARED_EXPERTS | {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
    ),
    "phimoe": ({"num_local_experts": 4}, MIXTRAL_EXPERTS | {"block_sparse_moe.gate.weight"}),
    "granitemoe": (
        {"num_local_experts": 4},
        {
            "block_sparse_moe.input_linear.weight",
            "block_sparse_moe.output_linear.weight",
            "block_sparse_moe.router.layer.weight",
        },
    ),
    "gpt_oss": (
        {"num_local_experts": 4, "head_dim": 4},
        {f"mlp.experts.{p}_proj{b}" for p in ("gate_up", "down") for b in ("", "_bias")}
        | {"mlp.router.weight", "mlp.router.bias"},
    ),
    "glm4_moe": (
        {**DEEPSEEK, "head_dim": 4},
        QWEN_EXPERTS | SHARED_EXPERTS | {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"},
    ),
}


def tiny(family, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family][0], **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


def saved_keys(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return set(file.keys())


def assert_same_weights(model, other):
    expected, found = model.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name


@pytest.fixture
def mixtral_source(tmp_path, tiny_mixtral, tiny_tokenizer):
    """A checkpoint as a user has it: weights, tokenizer, licence, card."""
    directory = tmp_path / "source"
    tiny_mixtral().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    (directory / "LICENSE").write_text("licence text")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# source\n")
    return directory


# Saving


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_of_the_hub_and_weights_reload_bit_exactly(family, tmp_path):
    model = tiny(family)
    output = save_checkpoint(model, None, tmp_path / "out", provenance={"method": "none"})

    keys = saved_keys(output)
    block = {
        re.sub(r"^model\.layers\.1\.", "", key) for key in keys if re.search(r"layers\.1\.(mlp|block_sparse)", key)
    }
    assert block == FAMILIES[family][1]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"} <= keys

    reloaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert_same_weights(model, reloaded)
    # The same again after one trip: the conversion recorded at loading is undone as well.
    assert saved_keys(save_checkpoint(reloaded, None, tmp_path / "again", provenance={})) == keys


def test_fused_and_bfloat16_source_keeps_both(tmp_path, tiny_mixtral):
    model = tiny_mixtral().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype="auto")
    output = save_checkpoint(loaded, None, tmp_path / "out", provenance={}, source=tmp_path / "fused")
    assert saved_keys(output) == saved_keys(tmp_path / "fused")
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(output, dtype="auto"))


def to_mxfp4(name, tensor):
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    experts, inner, outer = tensor.shape
    blocks = torch.randint(0, 255, (experts, outer, inner // 32, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:-1], 122, dtype=torch.uint8)}


def to_fp8(name, tensor):
    if not name.endswith("_proj.weight"):
        return {name: tensor}
    scale = torch.full([-(-size // 128) for size in tensor.shape], 0.125)
    return {name: (tensor.float() * 8).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


@pytest.mark.parametrize(
    ("family", "quantize", "config"),
    [
        ("gpt_oss", to_mxfp4, Mxfp4Config(dequantize=True)),  # as openai/gpt-oss-20b
        ("qwen3_moe", to_fp8, FineGrainedFP8Config(dequantize=True)),  # as Qwen/Qwen3-30B-A3B-FP8
    ],
)
def test_dequantized_model_is_written_as_plain_weights(family, quantize, config, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    plain = tiny(family, **sizes, **({"moe_intermediate_size": 128} if family == "qwen3_moe" else {}))
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    keys = saved_keys(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights = {key: value for name, tensor in weights.items() for key, value in quantize(name, tensor).items()}
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": str(config.quant_method.value)}
    (tmp_path / "source" / "config.json").write_text(json.dumps(settings))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto", quantization_config=config)
    recorded = model._weight_conversions
    output = save_checkpoint(model, None, tmp_path / "out", provenance={}, source=tmp_path / "source")
    assert saved_keys(output) == keys
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert model._weight_conversions is recorded
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(output, dtype="auto"))


def test_tied_embeddings_are_written_once(tmp_path, tiny_mixtral):
    model = tiny_mixtral(tie_word_embeddings=True)
    output = save_checkpoint(model, None, tmp_path / "out", provenance={})
    assert "lm_head.weight" not in saved_keys(output)
    assert checkpoint_bytes(model) == pytest.approx((output / "model.safetensors").stat().st_size, rel=0.05)
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(output, dtype="auto"))


def test_config_gets_the_record_and_keeps_use_cache(tmp_path, mixtral_source):
    model = AutoModelForCausalLM.from_pretrained(mixtral_source, dtype="auto")
    model.config.use_cache = False  # as a Trainer leaves it
    model.config.sparsity_config = {"format": "dense"}
    model.config.quantization_config = {"quant_method": "mxfp4"}  # as dequantizing may leave it
    record = {"method": "wanda", "sparsity": 0.5}
    output = save_checkpoint(model, None, tmp_path / "out", provenance=record, source=mixtral_source)

    config = json.loads((output / "config.json").read_text())
    source = json.loads((mixtral_source / "config.json").read_text())
    assert config.pop("hf_mlopt") == record
    assert config == source
    assert AutoConfig.from_pretrained(output).use_cache is True
    assert AutoConfig.from_pretrained(output).hf_mlopt == record


def test_use_cache_false_in_the_source_stays_false(tmp_path, tiny_mixtral):
    tiny_mixtral(use_cache=False).save_pretrained(tmp_path / "source")
    output = save_checkpoint(tiny_mixtral(), None, tmp_path / "out", provenance={}, source=tmp_path / "source")
    assert json.loads((output / "config.json").read_text())["use_cache"] is False


def test_files_of_the_source_are_copied_byte_by_byte(tmp_path, mixtral_source, tiny_tokenizer):
    generation = {"temperature": 0.3, "do_sample": True, "eos_token_id": 1}
    (mixtral_source / "generation_config.json").write_text(json.dumps(generation))
    (mixtral_source / "chat_template.jinja").write_text("{{ messages }}")
    (mixtral_source / "tokenizer.model").write_bytes(b"sentencepiece")
    model = AutoModelForCausalLM.from_pretrained(mixtral_source)
    output = save_checkpoint(model, tiny_tokenizer, tmp_path / "out", provenance={}, source=mixtral_source)
    names = {"LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.model", "tokenizer.json"}
    for name in names | {"tokenizer_config.json"}:
        assert (output / name).read_bytes() == (mixtral_source / name).read_bytes(), name
    assert not (output / "README.md").exists()  # the card of the original does not describe this model


def test_tokenizer_and_further_files_are_written(tmp_path, tiny_mixtral, tiny_tokenizer):
    files = {"recipe.yaml": "method: wanda\n", "plot.png": lambda path: path.write_bytes(b"PNG")}
    output = save_checkpoint(tiny_mixtral(), tiny_tokenizer, tmp_path / "out", provenance={}, files=files)
    assert (output / "recipe.yaml").read_text() == "method: wanda\n"
    assert (output / "plot.png").read_bytes() == b"PNG"
    assert AutoTokenizer.from_pretrained(output)("the fox").input_ids == tiny_tokenizer("the fox").input_ids
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_nothing(error, tmp_path, tiny_mixtral):
    def fail(path):
        assert (path.parent / "model.safetensors").is_file() and path.parent.name.startswith(".out.incomplete-")
        raise error

    with pytest.raises(error):
        save_checkpoint(tiny_mixtral(), None, tmp_path / "out", provenance={}, files={"README.md": fail})
    assert os.listdir(tmp_path) == []


def test_record_that_is_not_json_fails_before_writing(tmp_path, tiny_mixtral):
    with pytest.raises(TypeError):
        save_checkpoint(tiny_mixtral(), None, tmp_path / "out", provenance={"score": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def test_quantized_model_is_refused(tmp_path, tiny_mixtral):
    model = tiny_mixtral()
    model.is_quantized = True
    with pytest.raises(InputError, match="quantized"):
        save_checkpoint(model, None, tmp_path / "out", provenance={})


# The output directory


def test_leftovers_of_dead_runs_are_removed_and_of_living_ones_kept(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    dead, mine = (tmp_path / f".out.incomplete-{pid}" for pid in (finished.pid, os.getpid()))
    alive, other = tmp_path / f".out.incomplete-{os.getppid()}", tmp_path / f".other.incomplete-{finished.pid}"
    for directory in (dead, mine, alive, other):
        directory.mkdir()
        (directory / "model.safetensors").touch()
    with staged_output(tmp_path / "out") as staging:
        assert list(staging.iterdir()) == [] and not dead.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, other.name, "out"])


def test_check_output_accepts_new_and_empty_directories_and_leaves_nothing(tmp_path):
    assert check_output(tmp_path / "a" / "b", 1) == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    assert os.listdir(tmp_path) == ["empty"]
    with staged_output(tmp_path / "empty") as staging:
        (staging / "file").touch()
    assert os.listdir(tmp_path / "empty") == ["file"]


def test_output_that_is_taken_is_refused(tmp_path, tiny_mixtral):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for path, message in (
        ("full", "not empty"),
        ("full/notes.txt", "is a file"),
        ("full/notes.txt/x", "cannot write"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(tmp_path / path)
    with pytest.raises(InputError, match="not empty"):
        save_checkpoint(tiny_mixtral(), None, tmp_path / "full", provenance={})
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["notes.txt"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that even root cannot write")
def test_read_only_place_is_refused():
    with pytest.raises(InputError, match=r"output='/proc/out': cannot write in /proc"):
        check_output("/proc/out")


def test_full_disk_is_refused_with_both_numbers(tmp_path, tiny_mixtral, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    check_output(tmp_path / "out", 9_000_000)
    with pytest.raises(InputError, match=r"needs 93\.40 GB.* 0\.01 GB free"):
        check_output(tmp_path / "out", 93_400_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="free some space"):
        save_checkpoint(tiny_mixtral(), None, tmp_path / "out", provenance={})
    assert os.listdir(tmp_path) == []


# Finding a checkpoint


def test_a_local_checkpoint_is_recognised(mixtral_source):
    found = resolve_checkpoint(str(mixtral_source))
    assert (found.directory, found.revision, found.license) == (mixtral_source, None, "apache-2.0")
    assert found.weight_bytes == (mixtral_source / "model.safetensors").stat().st_size


def test_a_sharded_checkpoint_needs_every_shard_whole(tmp_path, tiny_mixtral):
    tiny_mixtral().save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert resolve_checkpoint(tmp_path).weight_bytes == sum(shard.stat().st_size for shard in shards)
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{shards[1].name}: incomplete"):
        resolve_checkpoint(tmp_path)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"1 of {len(shards)} shards are missing, {shards[1].name}"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", 3, ""])
def test_an_index_of_shards_that_leads_elsewhere_is_refused(shard, mixtral_source):
    (mixtral_source / "model.safetensors").rename(mixtral_source.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (mixtral_source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is no name of a file beside it"):
        resolve_checkpoint(mixtral_source)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").rename(path / "adapter_config.json"), "merge_and_unload"),
        (lambda path: (path / "config.json").write_text("{"), "not JSON"),
        (lambda path: (path / "config.json").write_text("{}"), "no model_type"),
        (lambda path: (path / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda path: (path / "model.safetensors").write_text("version https://git-lfs"), "no safetensors file"),
    ],
)
def test_a_directory_that_is_no_checkpoint_is_refused(break_it, message, mixtral_source):
    break_it(mixtral_source)
    with pytest.raises(InputError, match=message):
        resolve_checkpoint(mixtral_source)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "the Hub cannot be reached"),
        ("not an id", "nor the form of a Hub id"),
        ("./missing", "no such directory"),
        ("some/missing/folder", "no such directory"),
        (__file__, "is a file"),
    ],
)
def test_names_that_lead_nowhere_are_refused(model, message):
    with pytest.raises(InputError, match=f"{re.escape(repr(model))}.*{message}"):
        resolve_checkpoint(model)


def test_a_cached_repository_is_used_offline(tmp_path, monkeypatch, mixtral_source):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(mixtral_source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    found = resolve_checkpoint("someone/tiny")
    assert (found.name, found.revision, found.license) == ("someone/tiny", commit, "apache-2.0")
    assert (found.directory / "LICENSE").is_file()

    model = AutoModelForCausalLM.from_pretrained(found.name, revision=found.revision, cache_dir=tmp_path / "cache")
    record = model_provenance(model, found.revision)
    assert (record["source"], record["revision"]) == ("someone/tiny", commit)


# Provenance


def test_provenance_names_no_place_on_this_machine(tmp_path, mixtral_source):
    model = AutoModelForCausalLM.from_pretrained(mixtral_source)
    record = model_provenance(model)
    assert (record["source"], record["revision"], record["model_type"]) == ("source", None, "mixtral")
    assert record["parameters"] == model.num_parameters()
    output = save_checkpoint(model, None, tmp_path / "out", provenance={"model": record}, source=mixtral_source)
    assert str(tmp_path) not in (output / "config.json").read_text()
    again = model_provenance(AutoModelForCausalLM.from_pretrained(output))
    assert again["derived_from"] == {"model": record}


def test_a_model_made_here_has_no_source(tiny_mixtral):
    assert model_provenance(tiny_mixtral())["source"] is None


def test_environment_is_plain_data():
    record = environment()
    assert record["torch"] == torch.__version__ and "CPU cores" in record["machine"]
    assert json.loads(json.dumps(record)) == record


def test_importing_the_room_needs_no_torch():
    code = (
        "import sys, hf_mlopt.hub; sys.exit(bool({'torch', 'transformers', 'jinja2', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
