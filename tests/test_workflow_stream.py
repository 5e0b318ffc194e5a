"""`hf-mlopt prune --stream`: the same bytes as in memory, whatever the family and however its checkpoint is stored."""

import inspect
import json
import os
import shlex
import threading

import pytest
import torch
import yaml
from command_line import hf_mlopt, succeed, weights
from families import FUSED_FAMILIES, ListBlock, ListExpert, make_family, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_mlopt.workflows import prune


pytestmark = pytest.mark.e2e

HALF, TWO_OF_FOUR = ("--sparsity", "0.5"), ("--pattern", "2:4", "--scope", "all-linear")
SINGLE, SHARDED = {}, {"max_shard_size": "30KB"}  # a layer lies in several shards
HUB, FUSED = {}, {"save_original_format": False}
PLAIN, SPLIT = (HALF, torch.float32, SINGLE), (TWO_OF_FOUR, torch.bfloat16, SHARDED)

# What a checkpoint of a transformers 4 author holds beside its weights.
REMOTE_CODE = f"""
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM


class ListConfig(MixtralConfig):
    model_type = "list_moe"


{inspect.getsource(ListExpert)}

{inspect.getsource(ListBlock)}

class ListForCausalLM(MixtralForCausalLM):
    config_class = ListConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListBlock(config)
        self.post_init()
"""


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Seven windows in batches of two, so that one batch is shorter than the others."""
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_ids(7).tolist()))
    return ("--calibration", path, "--samples", 7, "--sequence-length", 24, "--min-tokens", 0, "--batch-size", 2)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def mixtral(source):
    make_family("mixtral").save_pretrained(source, **SHARDED)
    return source


def change_config(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    config |= values
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def report_of(directory):
    """A report without what differs from run to run."""
    report = read_json(directory / "pruning_report.json")
    report = {key: value for key, value in report.items() if key not in ("seconds", "peak_memory_bytes")}
    return report | {"layers": [layer | {"seconds": 0} for layer in report["layers"]]}


def assert_same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and value.shape == right[name].shape, name
        # By bytes: a NaN is one, and -0.0 is not 0.0.
        assert torch.equal(value.view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8)), name


def both(source, *words):
    """Prunes in memory and streamed, and compares weights and reports."""
    in_memory, streamed = source.parent / "in_memory", source.parent / "streamed"
    succeed("prune", source, "--output", in_memory, *words, "--in-memory")
    outcome = succeed("prune", source, "--output", streamed, *words, "--stream")
    assert_same_weights(in_memory, streamed)
    assert report_of(in_memory) == report_of(streamed)
    assert not [path.name for path in source.parent.iterdir() if path.name.startswith(".")]
    return in_memory, streamed, outcome


def same_logits(left, right, **settings):
    left, right = (
        AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **settings) for directory in (left, right)
    )
    with torch.no_grad():
        return left.dtype == right.dtype and torch.equal(*(model(token_ids(2)).logits for model in (left, right)))


@pytest.mark.parametrize("form", (HUB, FUSED), ids=("hub", "fused"))
@pytest.mark.parametrize("number, name", list(enumerate(FUSED_FAMILIES)))
def test_streamed_is_in_memory(source, calibration, number, name, form):
    words, dtype, shards = (PLAIN, SPLIT)[(number + (form is FUSED)) % 2]
    make_family(name, dtype).save_pretrained(source, **form, **shards)
    _, streamed, _ = both(source, *words, *calibration)
    files = {path.name for path in source.glob("*.safetensors")}
    assert (len(files) > 1) == (shards is SHARDED)
    assert {path.name for path in streamed.glob("*.safetensors")} == files


@pytest.mark.parametrize(
    "words",
    [
        (*HALF, "--propagate", "dense"),
        (*HALF, "--method", "magnitude"),
        (*TWO_OF_FOUR, "--method", "magnitude"),
        (*HALF, "--method", "sparsegpt", "--scope", "all-linear"),
        (*HALF, "--method", "sparsegpt-gated", "--propagate", "dense"),
        (*TWO_OF_FOUR, "--method", "ria"),
        (*HALF, "--min-tokens", "70"),
        (*HALF, "--min-tokens", "70", "--on-uncovered", "all_tokens", "--scope", "all-linear"),
        (*HALF, "--min-tokens", "70", "--on-uncovered", "skip"),
        ("--sparsity", "0"),
        ("--drop-experts", "0.5"),
        ("--drop-experts", "0.25", *HALF, "--scope", "all-linear"),
        ("--drop-experts", "0.25", *TWO_OF_FOUR, "--method", "magnitude", "--drop-score", "frequency"),
        (*HALF, "--allocation", "load"),
        (*HALF, "--allocation", "owl", "--scope", "all-linear"),
        (*HALF, "--allocation", "owl", "--drop-experts", "0.25", "--method", "magnitude"),
    ],
    ids=lambda words: " ".join(words).replace("--", ""),
)
def test_every_way_of_pruning(mixtral, calibration, words):
    both(mixtral, *calibration, *words)


@pytest.mark.parametrize("name, form", [("gpt_oss", HUB), ("deepseek_v3", FUSED), ("qwen2_moe", HUB)])
def test_fewer_experts_in_other_layouts(source, calibration, name, form):
    make_family(name, torch.bfloat16).save_pretrained(source, **form, **SHARDED)
    in_memory, streamed, _ = both(source, *HALF, "--drop-experts", "0.5", *calibration)
    assert same_logits(in_memory, streamed)


@pytest.mark.parametrize("every", (1, 2))
def test_states_on_disk(mixtral, calibration, tmp_path, every):
    states = tmp_path / "fast disk"
    for words in ((), ("--propagate", "dense"), ("--allocation", "owl")):
        plain, offloaded = tmp_path / f"plain{len(words)}{words[-1:]}", tmp_path / f"offloaded{len(words)}{words[-1:]}"
        succeed("prune", mixtral, "--output", plain, *HALF, *words, *calibration, "--in-memory")
        succeed(
            "prune", mixtral, "--output", offloaded, *HALF, *words, *calibration, "--stream",
            "--offload-states", states, "--save-states-every", every,
        )  # fmt: skip
        assert_same_weights(plain, offloaded)
        assert not any(states.iterdir())


@pytest.mark.parametrize("trusted", (True, False))
def test_remote_code(source, calibration, trusted):
    make_family("module_list").save_pretrained(source, **SHARDED, save_original_format=False)
    (source / "modeling_list.py").write_text(REMOTE_CODE)
    change_config(
        source,
        model_type="list_moe",
        architectures=["ListForCausalLM"],
        auto_map={"AutoConfig": "modeling_list.ListConfig", "AutoModelForCausalLM": "modeling_list.ListForCausalLM"},
    )
    if not trusted:
        outcome = hf_mlopt("prune", source, "--output", source.parent / "out", *HALF, *calibration, "--stream")
        assert outcome.status == 2 and "trust_remote_code" in outcome.err
        return
    in_memory, streamed, _ = both(source, *TWO_OF_FOUR, *calibration, "--trust-remote-code")
    assert "model.layers.1.mlp.experts.3.w2.weight" in weights(streamed)
    assert (streamed / "modeling_list.py").read_text() == REMOTE_CODE
    assert same_logits(in_memory, streamed, trust_remote_code=True)


@pytest.mark.parametrize("stored, config", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_a_configuration_of_another_dtype_than_the_files(source, calibration, stored, config):
    make_family("deepseek_v3", getattr(torch, stored)).save_pretrained(source, **SHARDED)
    change_config(source, dtype=config)
    in_memory, streamed, _ = both(source, *HALF, *calibration)
    assert same_logits(in_memory, streamed)


def test_a_configuration_that_names_no_dtype(source, calibration):
    """The files are of two dtypes; what the library lists first decides."""
    make_family("mixtral", torch.bfloat16).save_pretrained(source)
    change_config(source, dtype=None, torch_dtype=None)
    tensors = load_file(source / "model.safetensors")
    tensors = {name: value.float() if "norm" in name else value for name, value in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    in_memory, streamed, _ = both(source, *HALF, *calibration)
    assert same_logits(in_memory, streamed)


@pytest.mark.parametrize("words", ((), ("--drop-experts", "0.25")))
def test_tied_embeddings(source, calibration, words):
    make_family("olmoe", tie_word_embeddings=True).save_pretrained(source)
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    in_memory, streamed, _ = both(source, *HALF, *calibration, *words)
    assert same_logits(in_memory, streamed)


@pytest.mark.parametrize("other", (0, 1))
def test_a_tied_head_that_is_stored_nevertheless(source, calibration, other):
    """Streaming keeps what the source has. Where the head differs, transformers takes it for a head of its own."""
    make_family("olmoe", tie_word_embeddings=True).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + other
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    in_memory, streamed = source.parent / "in_memory", source.parent / "streamed"
    succeed("prune", source, "--output", in_memory, *HALF, *calibration, "--in-memory")
    succeed("prune", source, "--output", streamed, *HALF, *calibration, "--stream")
    assert same_logits(in_memory, streamed)
    assert torch.equal(weights(streamed)["lm_head.weight"], tensors["lm_head.weight"])


def test_what_is_written_is_a_checkpoint_like_its_source(source, calibration, tiny_tokenizer):
    make_family("qwen3_moe", torch.bfloat16).save_pretrained(source, **SHARDED)
    tiny_tokenizer.save_pretrained(source)
    in_memory, streamed, _ = both(source, *HALF, *calibration)
    index = "model.safetensors.index.json"
    assert {path.name for path in streamed.iterdir()} == {path.name for path in source.iterdir()} | {
        "README.md", "recipe.yaml", "pruning_report.json"
    }  # fmt: skip
    assert read_json(streamed / index) == read_json(source / index)
    for file in source.glob("*.safetensors"):
        before, after = (directory / file.name for directory in (source, streamed))
        assert after.stat().st_size == before.stat().st_size and after.stat().st_mode & 0o777 == 0o644
    config = read_json(streamed / "config.json")
    assert config.pop("hf_mlopt")["method"] == "moe-pruner" and config == read_json(source / "config.json")
    assert same_logits(in_memory, streamed)
    assert "float32" in str(AutoModelForCausalLM.from_pretrained(streamed, dtype=torch.float32).dtype)


def test_tensors_that_are_no_part_of_the_model_are_left_out_with_a_warning(mixtral, calibration):
    extra = mixtral / sorted(path.name for path in mixtral.glob("*.safetensors"))[0]
    save_file(load_file(extra) | {"model.layers.5.mtp.weight": torch.zeros(3)}, extra, {"format": "pt"})
    _, streamed, outcome = both(mixtral, *HALF, *calibration)
    assert any(
        all(word in line for word in ("1 tensors", "no part of the model", "model.layers.5.mtp.weight"))
        for line in outcome.err.splitlines()
    )
    index = read_json(streamed / "model.safetensors.index.json")
    assert index["weight_map"].keys() == weights(streamed).keys()


def test_nothing_stays_open(mixtral, calibration, tmp_path):
    def running():
        return {thread.name for thread in threading.enumerate()}, set(os.listdir("/proc/self/fd"))

    words = ("prune", mixtral, *HALF, *calibration, "--stream", "--offload-states", tmp_path / "states")
    succeed(*words, "--output", tmp_path / "warm")
    before = running()
    succeed(*words, "--output", tmp_path / "out")
    assert running() == before
    assert (
        hf_mlopt(*words, "--output", tmp_path / "bad", "--min-tokens", "1000", "--on-uncovered", "error").status == 2
    )
    assert running() == before


@pytest.mark.parametrize("available, streamed", [(10**5, True), (10**12, False)])
def test_what_does_not_fit_is_streamed(mixtral, calibration, tmp_path, monkeypatch, available, streamed):
    monkeypatch.setattr("hf_mlopt.workflows.prune.available_memory", lambda: available)
    loaded = []
    load = prune.load_model
    monkeypatch.setattr(prune, "load_model", lambda *args: loaded.append(1) or load(*args))
    outcome = succeed("prune", mixtral, "--output", tmp_path / "out", *HALF, *calibration)
    assert bool(loaded) != streamed and ("--stream" in outcome.err) == streamed
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["stream"] is None and recipe["resume"] is False


@pytest.mark.parametrize("mode", ("--stream", "--no-stream", "--in-memory"))
def test_the_command_in_the_card_and_the_recipe_can_be_run(mixtral, calibration, tmp_path, mode):
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    succeed("prune", mixtral, "--output", first, *HALF, *calibration, mode)
    command = next(
        line for line in (first / "README.md").read_text().splitlines() if line.startswith("hf-mlopt prune")
    )
    words = [
        {"DIR": second, "source": mixtral, "ids.jsonl": calibration[1]}.get(word, word)
        for word in shlex.split(command)[1:]
    ]
    succeed(*words)
    succeed("prune", "--config", first / "recipe.yaml", "--output", third)
    assert_same_weights(first, second)
    assert_same_weights(first, third)


def test_a_model_of_the_hub(mixtral, calibration, tmp_path, monkeypatch):
    """Weights are fetched into the cache, and only they."""
    import hf_mlopt.hub.checkpoint as module

    fetched = []

    def download(name, revision=None, allow_patterns=None, **_settings):
        fetched.append(allow_patterns)
        return str(mixtral)

    checkpoint = module.Checkpoint(str(mixtral), mixtral, revision="0" * 40)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = module.safetensors_files(checkpoint)
    assert [file.name for file in files] == sorted(path.name for path in mixtral.glob("*.safetensors"))
    assert len(fetched) == 1 and "model*.safetensors" in fetched[0]
