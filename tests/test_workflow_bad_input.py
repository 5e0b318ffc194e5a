"""What `hf-mlopt prune` refuses: one line with field, value and remedy, before any forward pass, nothing written."""

import json
import shutil
from types import SimpleNamespace

import pytest
from command_line import hf_mlopt, save, weights
from families import make_family
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_mlopt.data import embedded_corpus


pytestmark = pytest.mark.e2e

UNKNOWN_LAYOUTS = {
    "llama4_text": {
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"intermediate_size": 32, "num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def source(work, tiny_mixtral, tiny_tokenizer):
    return save(tiny_mixtral(), tiny_tokenizer, work / "source")


@pytest.fixture(scope="module")
def calibration(work):
    path = work / "text.txt"
    path.write_text("\n\n".join(embedded_corpus("train"))[:20_000], encoding="utf-8")
    return ("--calibration", path, "--samples", "8", "--sequence-length", "64")


@pytest.fixture
def output(tmp_path):
    """A directory that must not appear."""
    return tmp_path / "parent" / "output"


def never(*args, **kwargs):
    raise AssertionError("reached, though the input is refused")


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where weights are loaded."""
    monkeypatch.setattr("hf_mlopt.workflows.prune.load_model", never)


@pytest.fixture
def no_forward(monkeypatch):
    """Fails the test at a forward pass of the model or of a layer."""
    monkeypatch.setattr("hf_mlopt.pruning.states._record", never)
    monkeypatch.setattr("hf_mlopt.pruning.states.LayerCalls.__call__", never)


def refused(*words, output=None):
    """Runs a command that must be refused and write nothing; the line it says."""
    outcome = hf_mlopt(*words)
    assert outcome.status == 2, outcome.out
    # Progress bars and info lines may stand before it.
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in outcome.err, outcome.err
    assert outcome.err.splitlines()[-1] == lines[0] and "written" not in outcome.out
    if output is not None:
        assert not output.parent.exists()
    return lines[0].removeprefix("hf-mlopt prune: error: ")


def refused_source(source, output, *words):
    return refused("prune", source, "--output", output, *(words or ("--sparsity", "0.5")), output=output)


def mentions(line, *parts):
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in {line!r}"


@pytest.mark.parametrize("value, shown", [("1", 1.0), ("1.5", 1.5), ("-0.1", -0.1), (".nan", "nan"), (".inf", "inf")])
def test_sparsity_outside_its_range(source, calibration, output, no_weights, value, shown):
    line = refused_source(source, output, "--sparsity", value, *calibration)
    mentions(line, f"sparsity={shown}", "must be in [0, 1)")


def test_sparsity_that_is_no_number(source, calibration, output, no_weights):
    line = refused_source(source, output, "--sparsity", "half", *calibration)
    mentions(line, "--sparsity", "'half'", "must be float")


@pytest.mark.parametrize(
    "words, problem",
    [([], "none is given"), (["--sparsity", "0.5", "--pattern", "2:4"], "both are given")],
)
def test_both_or_neither_of_sparsity_and_pattern(source, calibration, output, no_weights, words, problem):
    line = refused_source(source, output, *calibration, *words)
    mentions(line, "sparsity=", "give", "sparsity", "pattern", problem)


def test_both_in_a_recipe(source, output, no_weights, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nsparsity: 0.5\npattern: 2:4\ncalibration: embedded\n")
    mentions(refused("prune", "--config", recipe, "--output", output, output=output), "both are given")


@pytest.mark.parametrize("value", ["4:2", "0:4", "2:2", "2of4", "-2:4"])
def test_a_pattern_that_is_none(source, calibration, output, no_weights, value):
    line = refused_source(source, output, f"--pattern={value}", *calibration)
    mentions(line, f"pattern='{value}'", "N:M with 0 < N < M", "2:4")


@pytest.mark.parametrize("pattern, scope, tensor, width", [
    ("1:3", "experts", "model.layers.0.mlp.experts.gate_up_proj", 32),
    ("16:64", "experts", "model.layers.0.mlp.experts.gate_up_proj", 32),
    ("2:5", "all-linear", "model.layers.0.mlp.experts.gate_up_proj", 32),
])  # fmt: skip
def test_a_pattern_that_does_not_divide_a_width_names_the_tensor(
    source, calibration, output, no_weights, pattern, scope, tensor, width
):
    line = refused_source(source, output, "--pattern", pattern, "--scope", scope, *calibration)
    mentions(line, f"pattern='{pattern}'", f"{pattern.split(':')[1]} does not divide the input width {width}", tensor)


def test_a_pattern_that_fits_the_experts_but_not_attention(tiny_tokenizer, calibration, output, no_weights, tmp_path):
    model = make_family("qwen3_moe", num_attention_heads=3, num_key_value_heads=3, head_dim=4)
    source = save(model, tiny_tokenizer, tmp_path / "source")
    line = refused_source(source, output, "--pattern", "4:8", "--scope", "all-linear", *calibration)
    mentions(line, "pattern='4:8'", "width 12", "model.layers.0.self_attn.o_proj.weight")


def test_a_sparsity_that_removes_nothing(source, calibration, output, no_weights):
    line = refused_source(source, output, "--sparsity", "0.01", *calibration)
    mentions(line, "sparsity=0.01", "removes nothing", "32 inputs", "model.layers.0.mlp.experts.gate_up_proj")


def tiny_llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=260, num_key_value_heads=2, **sizes))


def test_a_dense_model(tiny_tokenizer, calibration, output, no_weights, tmp_path):
    source = save(tiny_llama(), tiny_tokenizer, tmp_path / "source")
    line = refused_source(source, output, "--sparsity", "0.5", "--scope", "experts", *calibration)
    mentions(line, "'llama'", "dense model", "give a mixture of experts")


@pytest.mark.parametrize("model_type", UNKNOWN_LAYOUTS)
def test_an_unknown_layout_of_experts_names_the_module(
    model_type, tiny_tokenizer, calibration, output, no_weights, tmp_path
):
    common = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **{**common, **UNKNOWN_LAYOUTS[model_type]})
    source = save(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "source")
    line = refused_source(source, output, "--sparsity", "0.5", *calibration)
    mentions(line, "expert", "layout", "nderstood", f"'{model_type}'")


def test_an_architecture_that_transformers_does_not_know(source, calibration, output, no_weights, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    change_config(copy, model_type="mixtral_next")
    mentions(refused_source(copy, output, "--sparsity", "0.5", *calibration), "model=", "mixtral_next", "pip install")


def test_an_ill_typed_field_of_the_config(source, calibration, output, no_weights, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    change_config(copy, hidden_size="big")
    mentions(
        refused_source(copy, output, "--sparsity", "0.5", *calibration), "model=", "'hidden_size'", "expected int"
    )


def test_code_of_the_checkpoint_is_not_run_unasked(source, calibration, output, no_weights, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / "modeling_own.py").write_text("raise AssertionError('was run')")
    names = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    change_config(copy, model_type="own", auto_map=names)
    mentions(refused_source(copy, output, "--sparsity", "0.5", *calibration), "custom code", "trust_remote_code=True")


def test_a_quantized_checkpoint(source, calibration, output, no_weights, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    change_config(copy, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    mentions(refused_source(copy, output, "--sparsity", "0.5", *calibration), "quantized", "unquantized weights")


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["text.txt", "empty"]),
        (b" \n\n ", ["text.txt", "empty"]),
        ("für".encode("latin-1"), ["text.txt", "not UTF-8", "byte 1", "convert"]),
        (b"too short", ["text.txt", "9 tokens", "one window of 64", "sequence_length"]),
    ],
    ids=["empty", "blank", "latin-1", "short"],
)
def test_calibration_text_that_cannot_be_used(source, output, no_weights, tmp_path, content, parts):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    words = ("--sparsity", "0.5", "--calibration", path, "--samples", "8", "--sequence-length", "64")
    mentions(refused_source(source, output, *words), *parts)


def test_a_calibration_file_that_is_not_there(source, output, no_weights, tmp_path):
    line = refused_source(source, output, "--sparsity", "0.5", "--calibration", tmp_path / "none.txt")
    mentions(line, "none.txt", "no such file")


def test_too_few_long_documents(source, output, no_weights, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": word * 40}) + "\n" for word in ("a", "b", "c")))
    words = ("--sparsity", "0.5", "--calibration", path, "--samples", "8", "--sequence-length", "32")
    mentions(refused_source(source, output, *words), "3 of 3 documents", "samples=8", "--calibration-packing stream")


def test_calibration_tokens_of_another_tokenizer(source, output, no_forward, tmp_path):
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"input_ids": [5, 6, 7, 31_999]}) + "\n")
    words = ("--sparsity", "0.5", "--calibration", path, "--samples", "1", "--sequence-length", "4")
    mentions(refused_source(source, output, *words), "31999", "vocabulary of 260", "another tokenizer")


def test_a_missing_tokenizer(tiny_mixtral, calibration, output, no_weights, tmp_path):
    source = save(tiny_mixtral(), None, tmp_path / "source")
    line = refused_source(source, output, "--sparsity", "0.5", *calibration)
    mentions(line, "calibration=", "needs a tokenizer", "save one beside the model", "input_ids")


def test_a_broken_tokenizer(source, calibration, output, no_weights, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / "tokenizer.json").write_text("{")
    mentions(refused_source(copy, output, "--sparsity", "0.5", *calibration), str(copy), "tokenizer cannot be read")


def test_an_output_that_is_not_empty(source, calibration, no_weights, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    line = refused("prune", source, "--output", tmp_path, "--sparsity", "0.5", *calibration)
    mentions(line, f"output='{tmp_path}'", "not empty", "name a new one")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_output_that_is_the_source(source, calibration, no_weights):
    before = sorted(path.stat().st_mtime_ns for path in source.iterdir())
    mentions(refused("prune", source, "--output", source, "--sparsity", "0.5", *calibration), "not empty")
    assert sorted(path.stat().st_mtime_ns for path in source.iterdir()) == before


def test_no_output(source, calibration, no_weights):
    mentions(refused("prune", source, "--sparsity", "0.5", *calibration), "output=None", "is needed")


def test_no_model(output, no_weights):
    mentions(refused("prune", "--output", output, "--sparsity", "0.5", output=output), "model=None", "is needed")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "tensor, place",
    [("model.layers.1.mlp.experts.down_proj", (2, 3, 4)), ("model.layers.0.self_attn.v_proj.weight", (1, 2))],
)
def test_weights_that_are_not_finite_name_the_tensor(
    tiny_mixtral, tiny_tokenizer, calibration, output, no_forward, tmp_path, bad, tensor, place
):
    model = tiny_mixtral()
    model.get_parameter(tensor).data[place] = bad
    source = save(model, tiny_tokenizer, tmp_path / "source")
    line = refused_source(source, output, "--sparsity", "0.5", *calibration)
    mentions(line, tensor, "NaN or Inf", "damaged")


@pytest.mark.parametrize("method", ["moe-pruner", "sparsegpt"])
def test_activations_that_overflow_name_the_layer(tiny_mixtral, tiny_tokenizer, calibration, output, tmp_path, method):
    model = tiny_mixtral()
    model.model.layers[1].mlp.experts.down_proj.data.fill_(3e38)  # finite, but no sum of two is
    model.model.layers[1].mlp.experts.gate_up_proj.data.mul_(1e3)
    source = save(model, tiny_tokenizer, tmp_path / "source")
    line = refused_source(source, output, "--sparsity", "0.5", "--method", method, *calibration)
    mentions(line, "model.layers.1", "NaN or Inf", "check the checkpoint and its dtype")


def without(name):
    return lambda directory: (directory / name).unlink()


def cut_short(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, parts",
    [
        (without("config.json"), ["not a checkpoint", "config.json"]),
        (without("model.safetensors"), ["not a checkpoint", "model.safetensors"]),
        (lambda directory: (directory / "config.json").write_text("{"), ["config.json", "not JSON"]),
        (lambda directory: (directory / "config.json").write_text("{}"), ["config.json", "model_type"]),
        (cut_short, ["model.safetensors", "incomplete", "download it again"]),
    ],
    ids=["no config", "no weights", "broken config", "no model type", "cut short"],
)
def test_a_directory_that_is_not_a_checkpoint(source, calibration, output, no_weights, tmp_path, damage, parts):
    copy = shutil.copytree(source, tmp_path / "source")
    damage(copy)
    mentions(refused_source(copy, output, "--sparsity", "0.5", *calibration), str(copy), *parts)


def test_weights_that_lack_a_tensor(source, calibration, output, no_forward, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    tensors = weights(copy)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    line = refused_source(copy, output, "--sparsity", "0.5", *calibration)
    mentions(line, "1 tensors are missing", "model.layers.1.self_attn.q_proj.weight", "download it again")


def test_weights_of_another_shape_than_the_config_says(source, calibration, output, no_forward, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    change_config(copy, intermediate_size=96)
    line = refused_source(copy, output, "--sparsity", "0.5", *calibration)
    mentions(line, "another shape than its config.json says", "model.layers.0.mlp.experts.down_proj")


@pytest.mark.parametrize(
    "model, parts",
    [
        ("./missing", ["'./missing'", "no such directory"]),
        ("mistralai/Mixtral-8x7B-v0.1", ["no such directory here", "Hub cannot be reached", "local checkpoint"]),
        ("no such model!", ["neither a directory here nor the form of a Hub id"]),
    ],
)
def test_a_model_that_is_not_there(calibration, output, no_weights, model, parts):
    mentions(refused_source(model, output, "--sparsity", "0.5", *calibration), "model=", *parts)


def test_not_enough_disk(source, calibration, output, no_weights, monkeypatch):
    needed = (source / "model.safetensors").stat().st_size
    usage = SimpleNamespace(total=1 << 40, used=0, free=needed - 1)
    monkeypatch.setattr("hf_mlopt.hub.output.shutil.disk_usage", lambda path: usage)
    line = refused_source(source, output, "--sparsity", "0.5", *calibration)
    mentions(line, f"output='{output}'", "needs 0.00 GB", "free some space")


def test_an_unknown_key_of_a_recipe(source, output, no_weights, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nsparsty: 0.5\ncalibration: embedded\n")
    line = refused("prune", "--config", recipe, "--output", output, output=output)
    mentions(line, "sparsty=0.5", "unknown field", "did you mean 'sparsity'?", "recipe.yaml")


def test_an_ill_typed_value_of_a_recipe(source, output, no_weights, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nsparsity: 0.5\nsamples: many\n")
    line = refused("prune", "--config", recipe, "--output", output, output=output)
    mentions(line, "samples='many'", "must be int", "recipe.yaml")


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta", "mps", "cuda:x"])
def test_an_unknown_device(source, calibration, output, no_weights, device):
    line = refused_source(source, output, "--sparsity", "0.5", "--device", device, *calibration)
    mentions(line, f"device='{device}'", "CUDA devices" if device == "cuda:99" else "must be auto, cpu")


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--samples", "0"], ["samples=0", "at least 1"]),
        (["--sequence-length", "0"], ["sequence_length=0", "at least 1"]),
        (["--seed", "-1"], ["seed=-1", "at least 0"]),
        (["--gate-power", "-1"], ["gate_power=-1.0", "[0, 16]"]),
        (["--min-tokens", "-1"], ["min_tokens=-1", "0 turns the guard off"]),
        (["--batch-size", "0"], ["batch_size=0", "at least 1"]),
        (["--method", "wonda"], ["--method", "'wonda'", "'wanda'"]),
        (["--scope", "router"], ["--scope", "'router'", "'all-linear'"]),
    ],
)
def test_a_value_out_of_range(source, output, no_weights, words, parts):
    mentions(refused_source(source, output, "--sparsity", "0.5", *words), *parts)


def test_a_data_set_of_the_hub_without_network_names_the_embedded_text(source, output, no_weights):
    line = refused_source(source, output, "--sparsity", "0.5")  # the default is C4
    mentions(line, "allenai/c4", "without network", "--calibration embedded")


def test_an_expert_without_tokens_under_the_strict_policy(source, calibration, output):
    words = ("--sparsity", "0.5", "--min-tokens", "100000", "--on-uncovered", "error", *calibration)
    line = refused_source(source, output, *words)
    mentions(line, "model.layers.0.mlp.experts", "min_tokens=100000", "calibrate on more samples")
