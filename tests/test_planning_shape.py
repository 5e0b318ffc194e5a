"""What a plan understands from names and shapes, against the models themselves."""

import json

import pytest
import torch
from transformers import AutoConfig

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import ShardWriter, TensorInfo
from hf_mlopt.moe import decoder_layers, moe_layers
from hf_mlopt.planning import read_shape, read_source
from hf_mlopt.planning.families import has_fused_experts, kept_in_float32
from hf_mlopt.pruning.targets import linear_layers
from tests.command_line import save
from tests.families import ALL_FAMILIES, FUSED_FAMILIES, make_family


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "dtype": "float32",
}


def shape_of(directory):
    return read_shape(read_source(str(directory)))


def write(directory, config, shapes, dtype="F32"):
    """A checkpoint of zeros with the given tensors."""
    tensors = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    ShardWriter(directory, {"model.safetensors": tensors}).close()
    return directory


@pytest.mark.parametrize("as_parameters", [False, True], ids=["as on the Hub", "as parameters"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_understood_in_both_forms(family, as_parameters, tmp_path):
    model = make_family(family)
    model.save_pretrained(tmp_path, save_original_format=not as_parameters)
    shape, moe = shape_of(tmp_path), {layer.index: layer for layer in moe_layers(model)}
    prefix, decoders = decoder_layers(model, list(moe.values()))
    assert len(shape.layers) == len(decoders)
    for index, (layer, decoder) in enumerate(zip(shape.layers, decoders, strict=True)):
        assert layer.num_experts == (moe[index].num_experts if index in moe else 0)
        # Linears have the same sizes, whatever they are called in the files.
        linears = linear_layers(decoder, f"{prefix}.{index}", moe.get(index)).values()
        found = sorted((matrix.outputs, matrix.inputs) for matrix in layer.linears)
        assert found == sorted((linear.out_features, linear.in_features) for linear in linears)
        if index in moe:
            assert layer.intermediate == moe[index].input_size("intermediate")
            for source in ("hidden", "intermediate"):
                weights = [m.numel for m in layer.experts if m.reads == source]
                names = [name for name, reads in moe[index].projections.items() if reads == source]
                one = sum(moe[index].weight(0, name).numel() for name in names)
                assert sum(weights) == layer.num_experts * one
    assert (shape.top_k, shape.hidden) == (moe_layers(model)[0].top_k, 32)
    assert shape.dtype == "F32" and not shape.unused
    stored = sum(info.numel for layer in shape.layers for info in layer.tensors.values())
    stored += sum(info.numel for info in shape.rest.values())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    persistent = model.state_dict()
    assert stored == sum(value.numel() for name, value in tensors.items() if name in persistent)


@pytest.mark.parametrize("hidden, intermediate", [(8, 8), (8, 4), (8, 16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_orientation_of_stacked_experts_also_where_some_are_square(hidden, intermediate, transposed, tmp_path):
    up, down = (4, 2 * intermediate, hidden), (4, hidden, intermediate)
    if transposed:
        up, down = (4, hidden, 2 * intermediate), (4, intermediate, hidden)
    names = {"model.layers.0.mlp.experts.gate_up_proj": up, "model.layers.0.mlp.experts.down_proj": down}
    (layer,) = shape_of(write(tmp_path, MIXTRAL, names)).layers
    by_name = {matrix.name.rpartition(".")[2]: (matrix.outputs, matrix.inputs) for matrix in layer.experts}
    assert by_name == {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}


def test_layers_beyond_the_model_and_stored_frequencies_are_no_part_of_it(tmp_path):
    expert = {f"model.layers.{layer}.mlp.experts.0.w1.weight": (4, 8) for layer in (0, 1)}
    others = {"model.mtp.0.proj.weight": (4, 8), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    kept = {"model.embed_tokens.weight": (9, 8), "lm_head.weight": (9, 8)}
    shape = shape_of(write(tmp_path, MIXTRAL, expert | others | kept))
    assert shape.unused == {"model.layers.1.mlp.experts.0.w1.weight", *others}
    assert set(shape.rest) == set(kept) and set(shape.embedding) == {"model.embed_tokens.weight"}


def test_the_decoder_of_a_multimodal_model(tmp_path):
    config = {"model_type": "mixtral", "dtype": "bfloat16", "text_config": MIXTRAL | {"dtype": "float16"}}
    names = {
        "model.language_model.layers.0.mlp.experts.0.w1.weight": (4, 8),
        "model.vision_tower.layers.0.fc1.weight": (4, 8),
        "model.vision_tower.layers.1.fc1.weight": (4, 8),
    }
    shape = shape_of(write(tmp_path, config, names))
    assert len(shape.layers) == 1 and len(shape.rest) == 2 and shape.dtype == "BF16"


@pytest.mark.parametrize(
    "config, names, message",
    [
        ({"num_local_experts": None}, {"model.layers.0.mlp.up_proj.weight": (4, 8)}, "dense model"),
        ({}, {"model.layers.0.ffn.w1.weight": (4, 8)}, "4 experts in a layout that is not understood"),
        ({}, {"model.layers.0.mlp.experts.mystery": (4, 6, 8)}, "experts in a layout that is not understood"),
        ({}, {"model.layers.0.mlp.experts.up_proj": (4, 6, 7)}, "does not fit the hidden size 8"),
        ({}, {"model.layers.0.mlp.experts.0.w1.weight": (4, 6)}, "cannot tell what it reads"),
        (
            {"num_experts_per_tok": None},
            {"model.layers.0.mlp.experts.0.w1.weight": (4, 8)},
            "how many experts",
        ),
        ({"hidden_size": None}, {"model.layers.0.mlp.experts.0.w1.weight": (4, 8)}, "no hidden_size"),
        ({"num_hidden_layers": 2}, {"model.layers.0.mlp.experts.0.w1.weight": (4, 8)}, "nothing of layer 1 of 2"),
        ({"model_type": "llama4"}, {"model.layers.0.feed_forward.experts.0.w1.weight": (4, 8)}, "not understood"),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            {"model.layers.0.mlp.experts.gate_up_proj_blocks": (4, 6, 8, 16)},
            "is quantized",
        ),
        (
            {},
            {"a.layers.0.experts.0.w1.weight": (4, 8), "b.layers.0.experts.0.w1.weight": (4, 8)},
            "different stacks",
        ),
    ],
)
def test_what_is_not_understood_is_one_clear_error(config, names, message, tmp_path):
    with pytest.raises(InputError, match=message):
        shape_of(write(tmp_path, MIXTRAL | config, names))


def test_the_dtype_is_that_of_the_configuration_or_else_of_the_first_tensor(tmp_path):
    names = {"model.layers.0.mlp.experts.0.w1.weight": (4, 8)}
    for number, (given, expected) in enumerate(
        [({"dtype": "bfloat16"}, "BF16"), ({"dtype": None, "torch_dtype": "float16"}, "F16"), ({"dtype": None}, "F32")]
    ):
        assert shape_of(write(tmp_path / str(number), MIXTRAL | given, names)).dtype == expected


@pytest.mark.parametrize("family", FUSED_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_stays_in_float32_is_what_transformers_keeps(family, dtype):
    model = make_family(family)
    keeps = set(model._get_dtype_plan(dtype))
    word = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    found = kept_in_float32(family, word)
    assert set(found.pattern.split("|") if found else ()) == keeps


def test_model_types_whose_experts_can_be_observed():
    assert has_fused_experts("mixtral") and has_fused_experts("gpt_oss")
    assert has_fused_experts("llama4") is False and has_fused_experts("never_heard_of") is None


def test_a_checkpoint_says_the_same_as_its_model(tmp_path, tiny_mixtral, tiny_tokenizer):
    shape = shape_of(save(tiny_mixtral(num_local_experts=6), tiny_tokenizer, tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (shape.num_experts, shape.top_k, shape.context) == (6, 2, config.max_position_embeddings)
