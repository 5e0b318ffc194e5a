import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pruning import METHODS, MoEPruner, PruningConfig, validate
from hf_mlopt.pruning.batches import as_batches
from tests.families import make_family, token_ids
from tests.test_moe_layers import LLAMA4


@pytest.mark.parametrize(
    ("field", "settings", "message"),
    [
        ("sparsity", {"sparsity": 1.0}, r"\[0, 1\)"),
        ("sparsity", {"sparsity": -0.1}, r"\[0, 1\)"),
        ("sparsity", {"sparsity": 50}, r"\[0, 1\)"),
        ("sparsity", {"sparsity": float("nan")}, r"\[0, 1\)"),
        ("sparsity", {}, "none is given"),
        ("sparsity", {"sparsity": 0.5, "pattern": "2:4"}, "both are given"),
        ("sparsity", {"sparsity": 0.0, "pattern": "2:4"}, "both are given"),
        *(("pattern", {"pattern": text}, "N:M with 0 < N < M")
          for text in ("2:2", "4:2", "0:4", "a:b", "2:4:8", "2", "-2:4", "", 24)),
        ("method", {"sparsity": 0.5, "method": "moe_pruner"}, "moe-pruner, wanda, magnitude"),
        ("scope", {"sparsity": 0.5, "scope": "all"}, "experts, all-linear"),
        ("propagate", {"sparsity": 0.5, "propagate": "both"}, "pruned, dense"),
        ("gate_normalize", {"sparsity": 0.5, "gate_normalize": "softmax"}, "as_model, sum_to_one"),
        ("on_uncovered", {"sparsity": 0.5, "on_uncovered": "ignore"}, "blend, all_tokens"),
        ("gate_power", {"sparsity": 0.5, "gate_power": -1.0}, "0 ignores the router"),
        ("gate_power", {"sparsity": 0.5, "gate_power": float("nan")}, "0 ignores the router"),
        ("min_tokens", {"sparsity": 0.5, "min_tokens": -1}, "0 turns the guard off"),
        ("batch_size", {"sparsity": 0.5, "batch_size": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_refused(field, settings, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        PruningConfig(**settings)
    assert field in str(caught.value)


def test_every_method_is_a_choice():
    assert all(PruningConfig(method=method, sparsity=0.5).label == "50%" for method in METHODS)
    assert PruningConfig(pattern="4:8").n_of_m == (4, 8) and PruningConfig(pattern="4:8").label == "4:8"


def refused(model, calibration, message, error=InputError, **settings):
    """Pruning raises, no module has run, no parameter and no flag has changed."""
    settings = settings if "pattern" in settings else {"sparsity": 0.5, **settings}
    before, ran = {key: value.clone() for key, value in model.state_dict().items()}, []
    model.train()
    for module in model.modules():
        module.register_forward_pre_hook(lambda _module, _args: ran.append(_module))
    with pytest.raises(error, match=message):
        MoEPruner(PruningConfig(**settings)).prune(model, calibration, progress=False)
    assert not ran and model.training
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8)), key  # NaN compares unequal


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize(
    "tensor",
    (
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.0.mlp.gate.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ),
)
def test_a_weight_that_is_not_finite_is_named(tensor, value, dtype):
    model = make_family("mixtral", dtype)
    with torch.no_grad():
        model.get_parameter(tensor).view(-1)[7] = value
    refused(model, token_ids(), rf"^{tensor.replace('.', '[.]')} holds NaN or Inf")


def test_weights_whose_sum_overflows_are_not_refused():
    model = make_family("mixtral")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e37)
    MoEPruner(PruningConfig(sparsity=0.5)).prune(model, token_ids(), progress=False)


@pytest.mark.parametrize(
    ("pattern", "overrides", "scope", "tensor"),
    [
        ("1:3", {}, "experts", "model.layers.0.mlp.experts.gate_up_proj"),
        ("8:16", {"intermediate_size": 40}, "experts", "model.layers.0.mlp.experts.down_proj"),
        ("8:16", {"head_dim": 6}, "all-linear", "model.layers.0.self_attn.o_proj.weight"),
    ],
)
def test_a_group_that_does_not_divide_the_width_names_the_tensor(pattern, overrides, scope, tensor):
    model = make_family("mixtral", **overrides)
    refused(model, token_ids(), rf"does not divide the input width \d+ of {tensor}", ConfigurationError,
            pattern=pattern, scope=scope)  # fmt: skip


def test_the_width_of_attention_matters_only_in_its_scope():
    model = make_family("mixtral", head_dim=6)
    assert MoEPruner(PruningConfig(pattern="8:16")).prune(model, token_ids(), progress=False).sparsity == 0.5


def test_a_transposed_layout_is_checked_along_its_inputs():
    """gpt-oss stores [input, output]; 64 outputs would take a group of 64, 32 inputs do not."""
    refused(make_family("gpt_oss"), token_ids(), "width 32 of model.layers.0.mlp.experts.gate_up_proj",
            ConfigurationError, pattern="32:64")  # fmt: skip


def test_a_sparsity_that_removes_nothing_is_refused():
    refused(make_family("mixtral"), token_ids(), "removes nothing from rows of 32 inputs", sparsity=0.01)


@pytest.mark.parametrize("scope", ("experts", "all-linear"))
def test_a_dense_model_is_refused(scope):
    settings = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    refused(model, token_ids(), "'llama' is a dense model", scope=scope)


def test_an_unknown_layout_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **LLAMA4))
    refused(model, token_ids(), r"model\.layers\.0\.feed_forward\.experts \(Llama4TextExperts.*unknown layout")


def test_an_implementation_that_cannot_be_observed_is_refused():
    model = make_family("mixtral")
    model.config._experts_implementation = "deepgemm"
    refused(model, token_ids(), "'deepgemm' cannot be observed")


def test_a_quantized_checkpoint_is_refused():
    model = make_family("mixtral")
    model.config.quantization_config = {"quant_method": "fp8"}
    refused(model, token_ids(), "quantized")


@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.float8_e4m3fn))
def test_quantized_experts_are_refused_by_name(dtype):
    model = make_family("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(dtype), requires_grad=False)
    refused(model, token_ids(), r"model\.layers\.1\.mlp\.experts\.down_proj is stored as")


EMPTY = r"calibration is empty"
BAD_CALIBRATION = {
    "none": (None, "needs calibration data"),
    "no rows": (torch.zeros(0, 8, dtype=torch.long), EMPTY),
    "no columns": (torch.zeros(8, 0, dtype=torch.long), EMPTY),
    "empty list": ([], EMPTY),
    "empty sequences": ([[], []], EMPTY),
    "all masked": ([{"input_ids": [4, 5], "attention_mask": [0, 0]}], EMPTY),
    "floats": (torch.rand(2, 8), r"torch\.float32 tensor of shape \(2, 8\)"),
    "one dimension": (torch.ones(8, dtype=torch.long), r"tensor of shape \(8,\)"),
    "three dimensions": (torch.ones(2, 2, 2, dtype=torch.long), r"tensor of shape \(2, 2, 2\)"),
    "text": ("once upon a time", "is a str; give token ids"),
    "number": (7, "is a int; give token ids"),
    "list of texts": (["once", "upon"], "sequence 0 is not a list of token ids"),
    "list of floats": ([[4, 5], [1.5, 2.5]], "sequence 1 is not a list of token ids"),
    "list of lists of lists": ([[[4, 5]]], "sequence 0 is not a list of token ids"),
    "flat list": ([4, 5, 6], "sequence 0 is not a list of token ids"),
    "boolean": (torch.ones(2, 8, dtype=torch.bool), r"torch\.bool tensor"),
    "too large": (torch.full((2, 8), 260), "token id 260, outside the model's vocabulary of 260"),
    "negative": ([[4, -100, 5]], "token id -100, outside the model's vocabulary"),
    "padding": ([[4, 5], [4, 5, 2, 2]], "sequence 1 holds the padding token 2; give an attention_mask"),
    "rows without ids": ([{"text": "once"}], "sequence 0.*input_ids"),
    "mask of another length": ([{"input_ids": [4, 5, 6], "attention_mask": [1, 1]}], "sequence 0.*attention_mask"),
}


@pytest.mark.parametrize("case", BAD_CALIBRATION)
def test_bad_calibration_is_refused(case):
    calibration, message = BAD_CALIBRATION[case]
    refused(make_family("mixtral"), calibration, message)


def test_a_data_set_without_ids_is_refused():
    datasets = pytest.importorskip("datasets")
    refused(make_family("mixtral"), datasets.Dataset.from_dict({"text": ["once"]}), r"\['text'\]; it needs input_ids")


def test_magnitude_needs_no_calibration():
    models = [make_family("mixtral"), make_family("mixtral")]
    for model, calibration in zip(models, (None, token_ids()), strict=True):
        report = MoEPruner(PruningConfig(method="magnitude", sparsity=0.5)).prune(model, calibration, progress=False)
        assert report.layers[0].tokens_per_expert == [] and report.sparsity == 0.5
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_a_padding_id_that_is_also_the_end_of_text_is_allowed():
    config = make_family("mixtral", pad_token_id=1).config
    [batch] = as_batches([[4, 5, 1], [4, 1, 6]], 8, config)
    assert batch.tolist() == [[4, 5, 1], [4, 1, 6]]


def test_batches_hold_sequences_of_one_length_without_padding():
    config = make_family("mixtral").config
    rows = [[4] * 3, [5] * 7, [6] * 3, [7] * 3, {"input_ids": [2, 2, 8], "attention_mask": [0, 0, 1]}]
    batches = as_batches(rows, 2, config)
    assert [batch.tolist() for batch in batches] == [[[8]], [[4] * 3, [6] * 3], [[7] * 3], [[5] * 7]]


def test_validate_reads_no_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_family("deepseek_v3").config)
    layers = validate(model, PruningConfig(pattern="2:4", scope="all-linear"))
    assert [layer.index for layer in layers] == [1, 2]
    with pytest.raises(ConfigurationError, match="does not divide"):
        validate(model, PruningConfig(pattern="1:3"))


def test_experts_whose_activations_overflow_are_named():
    """Finite weights, activations that are not: only a forward pass can tell, and the first layer stays as it was."""
    model = make_family("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1] *= 1e30
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts: the intermediate activations of expert 1"):
        MoEPruner(PruningConfig(sparsity=0.5)).prune(model, token_ids(), progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("scope", ("experts", "all-linear"))
def test_a_layer_whose_output_overflows_is_named(scope):
    """The dense first layer of DeepSeek has no experts to ask."""
    model = make_family("deepseek_v3")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 3e38
    with pytest.raises(InputError, match=r"model\.layers\.0"):
        MoEPruner(PruningConfig(sparsity=0.5, scope=scope)).prune(model, token_ids(), progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
