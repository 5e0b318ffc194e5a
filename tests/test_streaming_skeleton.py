"""Models without weights: what they know of their files, and that a layer that was read is let go again."""

import json
import weakref

import pytest
import torch
from families import FUSED_FAMILIES, make_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import ShardReader, ShardWriter, TensorInfo
from hf_mlopt.moe import decoder_layers, moe_layers
from hf_mlopt.pruning import PruningConfig
from hf_mlopt.pruning.pruner import with_fewer_experts
from hf_mlopt.streaming.layers import StreamedLayers, load_parameters
from hf_mlopt.streaming.skeleton import (
    are_views,
    bytes_of,
    load_skeleton,
    materialize_,
    output_layout,
    release_,
    stored_tensors,
    unused_tensors,
)


FORMS = {"hub": {}, "fused": {"save_original_format": False}}


def saved(directory, name="mixtral", dtype=torch.float32, form="hub", **overrides):
    """A checkpoint, and what `from_pretrained` makes of it."""
    make_family(name, dtype, **overrides).save_pretrained(directory, max_shard_size="60KB", **FORMS[form])
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def skeleton_of(directory, model):
    with ShardReader(sorted(directory.glob("*.safetensors"))) as reader:
        return load_skeleton(type(model), model.config, reader, "x"), reader


def rewrite(directory, change):
    """Changes the tensors of a checkpoint, in whatever file they are."""
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})


def streamed(directory, model, writer=None):
    """The decoder layers of a checkpoint; the reader is for the caller to close."""
    reader = ShardReader(sorted(directory.glob("*.safetensors")))
    skeleton = load_skeleton(type(model), model.config, reader, "x")
    moe = moe_layers(skeleton)
    prefix, _ = decoder_layers(skeleton, moe)
    return StreamedLayers(skeleton, prefix, moe, reader, writer, torch.device("cpu"))


@pytest.fixture
def mixtral(tmp_path):
    return tmp_path, saved(tmp_path)


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_it_is_what_from_pretrained_gives_but_for_the_weights(tmp_path, name):
    model = saved(tmp_path, name, torch.bfloat16)
    skeleton, _ = skeleton_of(tmp_path, model)
    expected, found = model.state_dict(), skeleton.state_dict()
    assert list(found) == list(expected) and not skeleton.training
    for key, value in found.items():
        assert value.is_meta and (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype), key
    computed = dict(model.named_non_persistent_buffers())
    buffers = dict(skeleton.named_non_persistent_buffers())
    assert buffers.keys() == computed.keys() and (buffers or name == "nemotron_h")
    for key, value in computed.items():
        assert torch.equal(buffers[key], value) and buffers[key].dtype == value.dtype, key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_what_the_files_hold_are_views_of_the_parameters(tmp_path, name, form):
    """Filled through the views, the parameters are those that `from_pretrained` computes."""
    model = saved(tmp_path, name, form=form)
    skeleton, reader = skeleton_of(tmp_path, model)
    files = {key: value for file in tmp_path.glob("*.safetensors") for key, value in load_file(file).items()}
    parameters, _ = materialize_(skeleton, list(skeleton.state_dict()))
    stored = stored_tensors(skeleton, parameters)
    assert are_views(stored, parameters) and stored.keys() == files.keys()
    for key, value in stored.items():
        value.copy_(files[key])
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in skeleton.state_dict().items())


def test_a_copy_is_no_view(mixtral):
    directory, model = mixtral
    skeleton, _ = skeleton_of(directory, model)
    parameters, _ = materialize_(skeleton, ["lm_head.weight", "model.norm.weight"])
    assert are_views({"x": parameters["lm_head.weight"].T[3:]}, parameters)
    assert not are_views({"x": parameters["lm_head.weight"][1:], "y": parameters["model.norm.weight"] + 0}, parameters)


def test_a_checkpoint_that_cannot_be_read_piece_by_piece(mixtral, monkeypatch):
    directory, model = mixtral
    monkeypatch.setattr(
        "hf_mlopt.streaming.layers.stored_tensors",
        lambda model, values: {name: value + 0 for name, value in stored_tensors(model, values).items()},
    )
    layers = streamed(directory, model)
    with layers.reader, pytest.raises(InputError, match=r"model\.layers\.0\..*in a way that cannot.*--in-memory"):
        layers.load(0)


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_layers_that_are_stored_unchanged_are_what_transformers_saves(tmp_path, name):
    model = saved(tmp_path, name, torch.bfloat16)
    (target := tmp_path / "target").mkdir()
    layers = streamed(tmp_path, model)
    with layers.reader, ShardWriter(target, output_layout(layers.model, layers.reader.layout)) as writer:
        layers.writer = writer
        expected = model.get_submodule(layers.prefix)
        for index in range(len(layers)):
            _, layer, _ = layers.load(index)
            values = expected[index].state_dict()
            assert all(torch.equal(value, values[key]) for key, value in layer.state_dict().items())
            layers.store(index)
        layers.copy_rest()
    model.save_pretrained(tmp_path / "expected")  # some parameters are kept in another dtype than the file's
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for file in tmp_path.glob("*.safetensors"):
        before, after = load_file(file), load_file(target / file.name)
        assert before.keys() == after.keys()
        for key, value in after.items():
            assert torch.equal(value, expected[key]) and value.dtype == expected[key].dtype, key


def test_nothing_of_a_layer_or_of_the_embedding_stays_in_memory(mixtral, tmp_path):
    directory, model = mixtral
    layers = streamed(directory, model)

    def on_cpu():
        return [name for name, value in layers.model.named_parameters() if not value.is_meta]

    with layers.reader:
        with layers.embedding():
            assert on_cpu() == ["model.embed_tokens.weight", "model.norm.weight"]
            values = [weakref.ref(layers.model.get_parameter(name)) for name in on_cpu()]
        assert not on_cpu()
        for changed in (True, False):  # without a writer, nothing is written
            _, layer, _ = layers.load(1)
            assert on_cpu() and all(name.startswith("model.layers.1.") for name in on_cpu())
            values += [weakref.ref(value) for value in layer.parameters()]
            layers.store(1, changed)
            assert not on_cpu()
        assert len(values) > 10 and not [value() for value in values if value() is not None]


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "deepseek_v3"))
def test_nothing_stays_in_memory_where_experts_were_removed(tmp_path, name):
    model = saved(tmp_path, name)
    layers = streamed(tmp_path, model)
    layers.smaller = with_fewer_experts(layers.model, list(layers.moe.values()), PruningConfig(drop_experts=0.5))
    (target := tmp_path / "target").mkdir()
    with layers.reader, ShardWriter(target, output_layout(layers.smaller, layers.reader.layout)) as writer:
        layers.writer = writer
        for index in range(len(layers)):
            _, layer, moe = layers.load(index)
            values = [weakref.ref(value) for value in layer.parameters()]
            if moe is not None:
                layers.remove_experts(index, list(range(moe.num_experts // 2)))
            values += [weakref.ref(value) for value in layer.parameters()]
            layers.store(index)
            assert not [value for value in values if value() is not None]
            for skeleton in (layers.model, layers.smaller):
                assert all(value.is_meta for value in skeleton.parameters())


def test_a_weight_that_is_not_finite_is_named(mixtral):
    directory, model = mixtral
    name = "model.layers.1.self_attn.o_proj.weight"
    rewrite(directory, lambda tensors: tensors[name].view(-1)[7].fill_(float("nan")) if name in tensors else None)
    layers = streamed(directory, model)
    with layers.reader:
        layers.load(0)
        layers.store(0)
        with pytest.raises(InputError, match=f"{name} holds NaN or Inf"):
            layers.load(1)


def test_what_is_released_is_what_was_there_before(tmp_path):
    """Also where another parameter is tied to it."""
    model = saved(tmp_path, tie_word_embeddings=True)
    skeleton, _ = skeleton_of(tmp_path, model)
    name = "model.embed_tokens.weight"
    assert skeleton.lm_head.weight is skeleton.get_parameter(name)
    _, before = materialize_(skeleton, [name])
    made = weakref.ref(skeleton.get_parameter(name))
    assert isinstance(made(), torch.nn.Parameter) and not made().is_meta
    release_(skeleton, before)
    assert made() is None and skeleton.lm_head.weight is skeleton.get_parameter(name)
    assert skeleton.lm_head.weight.is_meta


def test_a_tensor_that_is_missing(mixtral):
    directory, model = mixtral
    rewrite(directory, lambda tensors: tensors.pop("model.norm.weight", None))
    with pytest.raises(InputError, match=r"'x': 1 tensors are missing.*model\.norm\.weight first; download it again"):
        skeleton_of(directory, model)


@pytest.mark.parametrize("name", ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"))
def test_a_tensor_of_another_shape(mixtral, name):
    directory, model = mixtral
    rewrite(directory, lambda tensors: name in tensors and tensors.update({name: tensors[name][:-8].clone()}))
    with pytest.raises(InputError, match=rf"{name} first; download it again"):
        skeleton_of(directory, model)


@pytest.mark.parametrize("change", (lambda value: None, lambda value: value[:-8].clone()), ids=("missing", "cut"))
def test_experts_that_do_not_fit_together(mixtral, change):
    directory, model = mixtral
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"

    def spoil(tensors):
        if name in tensors and (value := change(tensors.pop(name))) is not None:
            tensors[name] = value

    rewrite(directory, spoil)
    with pytest.raises(InputError, match="'x'.*experts.*missing.*download it again"):
        skeleton_of(directory, model)


def test_tensors_that_the_model_does_not_use_are_named_and_left_out(mixtral):
    directory, model = mixtral
    save_file({"model.layers.7.extra": torch.zeros(2)}, directory / "more.safetensors")
    skeleton, reader = skeleton_of(directory, model)
    layout, unused = output_layout(skeleton, reader.layout), unused_tensors(skeleton, reader.layout)
    assert unused == ["model.layers.7.extra"] and "more.safetensors" not in layout
    assert list(layout) == [file for file in reader.layout if file != "more.safetensors"]
    assert {name for tensors in layout.values() for name in tensors} == reader.tensors.keys() - set(unused)


def test_names_that_saving_would_not_give_are_refused(mixtral):
    directory, model = mixtral
    skeleton, reader = skeleton_of(directory, model)
    name = "model.layers.0.self_attn.q_proj.weight"
    layout = {
        file: {(f"old.{key}" if key == name else key): info for key, info in tensors.items()}
        for file, tensors in reader.layout.items()
    }
    with pytest.raises(InputError, match=f"1 tensors would get names.*{name}.*--in-memory"):
        output_layout(skeleton, layout)


def test_the_layout_has_the_order_of_the_source_and_the_dtype_of_the_model(tmp_path):
    model = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    skeleton, reader = skeleton_of(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))
    layout = output_layout(skeleton, reader.layout)
    assert [list(tensors) for tensors in layout.values()] == [list(tensors) for tensors in reader.layout.values()]
    for file, tensors in layout.items():
        for name, info in tensors.items():
            assert info == TensorInfo("BF16", reader.layout[file][name].shape)
    assert model.dtype == torch.float32


def test_a_tied_head_that_no_file_holds_is_no_loss(tmp_path):
    model = saved(tmp_path, tie_word_embeddings=True)
    skeleton, reader = skeleton_of(tmp_path, model)
    layout = output_layout(skeleton, reader.layout)
    assert "lm_head.weight" not in {name for file in layout.values() for name in file}


@pytest.mark.parametrize("stored, config", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_parameters_are_read_in_the_dtype_of_the_configuration(tmp_path, stored, config):
    saved(tmp_path, dtype=getattr(torch, stored))
    words = json.loads((tmp_path / "config.json").read_text()) | {"dtype": config}
    (tmp_path / "config.json").write_text(json.dumps(words))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    with ShardReader(sorted(tmp_path.glob("*.safetensors"))) as reader:
        skeleton = load_skeleton(type(model), model.config, reader, "x")
        names = [name for name in skeleton.state_dict() if name.startswith("model.layers.0.")]
        load_parameters(skeleton, names, reader)
    expected = model.state_dict()
    for name in names:
        assert skeleton.state_dict()[name].dtype == getattr(torch, config)
        assert torch.equal(skeleton.state_dict()[name], expected[name]), name


def test_the_dtype_is_that_of_from_pretrained_where_the_configuration_names_none(tmp_path):
    """The first tensor decides there, and the other tensors of the file are converted to its dtype."""
    saved(tmp_path, dtype=torch.bfloat16)
    rewrite(tmp_path, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items() if "norm" in k}))
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    model.config.dtype = None
    skeleton, _ = skeleton_of(tmp_path, model)
    expected = model.state_dict()
    assert {value.dtype for value in expected.values()} == {torch.bfloat16}
    assert all(value.dtype == expected[name].dtype for name, value in skeleton.state_dict().items())


@pytest.mark.parametrize("value", (torch.randn(2, 3), torch.tensor(1.5), torch.tensor([True, False]), torch.empty(0)))
def test_bytes_of_a_tensor(value):
    assert bytes_of(value).tobytes() == value.numpy().tobytes()
    assert bytes_of(value.bfloat16()).nbytes == 2 * value.numel()
