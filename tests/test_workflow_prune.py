"""`hf-mlopt prune` from one directory to the next: what is written, what reads it, and what an interruption leaves."""

import json

import pytest
import torch
import yaml
from command_line import hf_mlopt, python, save, succeed, weights
from families import FUSED_FAMILIES, make_family
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_mlopt.data import embedded_corpus
from hf_mlopt.moe import moe_layers


pytestmark = pytest.mark.e2e

PATTERNS = {"half": ("--sparsity", "0.5"), "2:4": ("--pattern", "2:4")}

# Loads and generates where the package does not exist.
STRANGER = """
import json, sys
sys.modules["hf_mlopt"] = None  # from here on importing it raises ImportError
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    inputs = tokenizer("the quick brown fox", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, do_sample=False)[0])
    print(json.dumps({
        "text": text,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "unexpected": sorted(info["unexpected_keys"]),
        "missing": sorted(info["missing_keys"]),
        "loss": model(**inputs, labels=inputs["input_ids"]).loss.item(),
    }))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("prune")


@pytest.fixture(scope="module")
def text(work):
    """About 20,000 tokens of English."""
    path = work / "text.txt"
    path.write_text("\n\n".join(embedded_corpus("train"))[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibration(text):
    return ("--calibration", text, "--samples", "8", "--sequence-length", "64")


@pytest.fixture(scope="module")
def sources(work, tiny_mixtral, tiny_tokenizer):
    """The original of each pattern, which differ in dtype and `use_cache`."""
    return {
        "half": save(tiny_mixtral().to(torch.bfloat16), tiny_tokenizer, work / "bfloat16"),
        "2:4": save(tiny_mixtral(use_cache=False), tiny_tokenizer, work / "float32"),
    }


@pytest.fixture(scope="module")
def pruned(work, sources, calibration):
    """Pattern -> the directory written for it."""
    outputs = {name: work / f"pruned-{name.replace(':', '-')}" for name in PATTERNS}
    for name, words in PATTERNS.items():
        succeed("prune", sources[name], "--output", outputs[name], *words, *calibration)
    return outputs


@pytest.fixture(params=PATTERNS)
def pattern(request):
    return request.param


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def experts(tensors):
    return {name: value for name, value in tensors.items() if ".experts." in name}


def fingerprint(directory):
    return read_json(directory / "pruning_report.json")["calibration"]["fingerprint"]


def assert_half_of_every_row_is_zero(matrix):
    assert ((matrix == 0).sum(dim=-1) == matrix.shape[-1] // 2).all()


def assert_two_of_every_four_are_zero(matrix):
    assert ((matrix.unflatten(-1, (-1, 4)) == 0).sum(dim=-1) == 2).all()


def test_the_directory_is_a_checkpoint_with_its_papers(pruned, pattern):
    assert sorted(path.name for path in pruned[pattern].iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pruning_report.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_nothing_is_left_beside_the_directory(pruned, work):
    assert not [path.name for path in work.iterdir() if path.name.startswith(".")]


def test_tensors_keep_the_names_of_the_hub(pruned, sources, pattern):
    names = set(weights(pruned[pattern]))
    assert names == set(weights(sources[pattern]))
    # As in mistralai/Mixtral-8x7B-v0.1, which is older than the fused experts of transformers 5.
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_every_expert_matrix_has_the_declared_sparsity(pruned, pattern):
    check = assert_half_of_every_row_is_zero if pattern == "half" else assert_two_of_every_four_are_zero
    matrices = experts(weights(pruned[pattern]))
    assert len(matrices) == 2 * 4 * 3  # layers, experts, projections
    for matrix in matrices.values():
        check(matrix)


def test_all_else_is_bit_identical_and_so_is_what_was_kept(pruned, sources, pattern):
    before, after = weights(sources[pattern]), weights(pruned[pattern])
    for name, value in after.items():
        kept = value != 0 if ".experts." in name else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[name][kept]), name


def test_dtype_and_use_cache_are_those_of_the_source(pruned, sources, pattern):
    before, after = (read_json(directory / "config.json") for directory in (sources[pattern], pruned[pattern]))
    assert (before["dtype"], before["use_cache"]) == {"half": ("bfloat16", True), "2:4": ("float32", False)}[pattern]
    assert {key: value for key, value in after.items() if key != "hf_mlopt"} == before
    assert {str(value.dtype) for value in weights(pruned[pattern]).values()} == {f"torch.{before['dtype']}"}


def test_the_config_says_what_was_done(pruned, sources, pattern):
    block = read_json(pruned[pattern] / "config.json")["hf_mlopt"]
    what = {"sparsity": 0.5} if pattern == "half" else {"pattern": "2:4"}
    assert what.items() <= block.items() and len({"sparsity", "pattern"} & set(block)) == 1
    assert (block["method"], block["scope"], block["base_model"]) == ("moe-pruner", "experts", sources[pattern].name)
    assert str(sources[pattern].parent) not in json.dumps(block)


def test_the_report_counts_what_is_in_the_files(pruned, pattern):
    report = read_json(pruned[pattern] / "pruning_report.json")
    tensors, totals = weights(pruned[pattern]), report["totals"]
    matrices = experts(tensors).values()
    assert totals["parameters"] == sum(value.numel() for value in tensors.values())
    assert totals["pruned_parameters"] == sum(value.numel() for value in matrices)
    assert totals["zeros"] == sum(int((value == 0).sum()) for value in matrices)
    assert totals["sparsity_of_scope"] == 0.5
    assert report["calibration"]["samples"] == 8 and report["calibration"]["source"] == "text.txt"
    for layer in report["layers"]:
        assert sum(layer["tokens_per_expert"]) == 8 * 64 * 2  # top-2
        starved = [expert for expert, tokens in enumerate(layer["tokens_per_expert"]) if tokens < 256]
        assert layer["uncovered"] == starved


def test_the_card_parses_and_its_numbers_are_those_of_the_report(pruned, pattern):
    report = read_json(pruned[pattern] / "pruning_report.json")
    card = ModelCard.load(pruned[pattern] / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"mixture-of-experts", "pruning", "moe-pruner"} <= set(card.data.tags)
    totals = report["totals"]
    scope, model = (f"{100 * totals[key]:.3g} %" for key in ("sparsity_of_scope", "sparsity_of_model"))
    counts = f"{totals['pruned_parameters']:,} | {totals['zeros']:,}"
    assert f"| **all in scope** | | {counts} | **{scope}** |" in card.text
    assert f"| **whole model** | | {totals['parameters']:,} | | **{model}** |" in card.text
    assert report["calibration"]["fingerprint"] in card.text
    seen = sorted(count for layer in report["layers"] for count in layer["tokens_per_expert"])
    assert f"Over 8 experts: fewest {seen[0]}, " in card.text and f"most {seen[-1]} tokens." in card.text
    assert "## Perplexity" not in card.text  # nothing was measured
    assert ("sparse tensor cores" in card.text) == (pattern == "2:4")


def test_a_process_without_the_package_loads_it_and_generates(pruned):
    lines = [json.loads(line) for line in python(STRANGER, *pruned.values()).splitlines()]
    assert [line["dtype"] for line in lines] == ["torch.bfloat16", "torch.float32"]
    for line in lines:
        assert line["class"] == "MixtralForCausalLM" and not line["missing"] and not line["unexpected"]
        assert line["text"].startswith("the quick brown fox") and len(line["text"]) > len("the quick brown fox")
        assert 0 < line["loss"] < 20


def test_the_recipe_gives_the_same_bits_again(pruned, pattern, tmp_path):
    recipe = yaml.safe_load((pruned[pattern] / "recipe.yaml").read_text())
    assert recipe["output"] is None
    succeed("prune", "--config", pruned[pattern] / "recipe.yaml", "--output", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (pruned[pattern] / name).read_bytes()
    assert fingerprint(tmp_path / "again") == fingerprint(pruned[pattern])


def test_a_pattern_on_the_command_line_replaces_the_sparsity_of_a_recipe(pruned, tmp_path):
    recipe = pruned["half"] / "recipe.yaml"
    succeed("prune", "--config", recipe, "--output", tmp_path / "new", "--pattern", "1:4", "--method", "magnitude")
    for matrix in experts(weights(tmp_path / "new")).values():
        assert ((matrix.unflatten(-1, (-1, 4)) == 0).sum(dim=-1) == 3).all()
    written = yaml.safe_load((tmp_path / "new" / "recipe.yaml").read_text())
    assert (written["pattern"], written["sparsity"], written["method"]) == ("1:4", None, "magnitude")


def test_a_sparsity_on_the_command_line_replaces_the_pattern_of_a_recipe(pruned, tmp_path):
    recipe = pruned["2:4"] / "recipe.yaml"
    succeed("prune", "--config", recipe, "--output", tmp_path / "new", "--sparsity", "0.25", "--method", "magnitude")
    for matrix in experts(weights(tmp_path / "new")).values():
        assert ((matrix == 0).sum(dim=-1) == matrix.shape[-1] // 4).all()


def test_magnitude_needs_neither_calibration_nor_tokenizer(sources, tiny_mixtral, monkeypatch, tmp_path):
    def unexpected(*args, **kwargs):
        raise AssertionError("calibration was loaded")

    monkeypatch.setattr("hf_mlopt.workflows.prune.load_calibration", unexpected)
    source = save(tiny_mixtral(), None, tmp_path / "source")
    output = tmp_path / "output"
    outcome = succeed("prune", source, "--output", output, "--method", "magnitude", "--sparsity", "0.5")
    assert "calibrated on nothing" in outcome.out
    for name, matrix in experts(weights(output)).items():
        assert_half_of_every_row_is_zero(matrix)
        before = weights(source)[name].abs()
        assert (
            before[matrix == 0].reshape(len(matrix), -1).amax(1)
            <= before[matrix != 0].reshape(len(matrix), -1).amin(1)
        ).all()
    assert not read_json(output / "pruning_report.json")["calibration"]
    assert "## Calibration" not in (output / "README.md").read_text()


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "sparsegpt-gated"])
def test_every_method_writes_what_it_declares(sources, calibration, method, tmp_path):
    words = ("--method", method, "--pattern", "2:4")
    succeed("prune", sources["2:4"], "--output", tmp_path / "output", *words, *calibration)
    for matrix in experts(weights(tmp_path / "output")).values():
        assert_two_of_every_four_are_zero(matrix)
    assert read_json(tmp_path / "output" / "config.json")["hf_mlopt"]["method"] == method


def test_all_linear_prunes_attention_and_never_router_embeddings_or_head(sources, calibration, tmp_path):
    words = ("--sparsity", "0.5", "--scope", "all-linear")
    succeed("prune", sources["2:4"], "--output", tmp_path / "output", *words, *calibration)
    before, after = weights(sources["2:4"]), weights(tmp_path / "output")
    changed = {name.split(".", 3)[-1] for name in after if not torch.equal(before[name], after[name])}
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert {name for name in changed if "experts" not in name} == attention
    for name, matrix in after.items():
        if ".experts." in name or "self_attn" in name:
            assert_half_of_every_row_is_zero(matrix)


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_every_family_comes_back_from_disk_with_its_pattern(family, tiny_tokenizer, calibration, tmp_path):
    source = save(make_family(family, torch.bfloat16), tiny_tokenizer, tmp_path / "source")
    succeed("prune", source, "--output", tmp_path / "output", "--pattern", "2:4", *calibration)
    assert set(weights(tmp_path / "output")) == set(weights(source))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    for layer in moe_layers(model):
        for projection in layer.projections:
            assert_two_of_every_four_are_zero(layer.stacked(projection))


def test_the_seed_decides_the_calibration_tokens(sources, calibration, pruned, tmp_path):
    for seed in (0, 1):
        words = ("--sparsity", "0.5", "--seed", seed, *calibration)
        succeed("prune", sources["half"], "--output", tmp_path / str(seed), *words)
    assert fingerprint(tmp_path / "0") == fingerprint(pruned["half"]) != fingerprint(tmp_path / "1")


def test_token_ids_need_no_tokenizer(tiny_mixtral, tmp_path):
    source = save(tiny_mixtral(), None, tmp_path / "source")
    rows = torch.randint(3, 260, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    words = ("--sparsity", "0.5", "--calibration", tokens, "--samples", "8", "--sequence-length", "32")
    succeed("prune", source, "--output", tmp_path / "output", *words)
    assert not list((tmp_path / "output").glob("tokenizer*"))
    assert read_json(tmp_path / "output" / "pruning_report.json")["calibration"]["packing"] == "documents"


def test_a_window_longer_than_the_context_is_cut_and_an_overlapping_stream_is_said(sources, text, tmp_path):
    words = ("--sparsity", "0.5", "--calibration", text, "--samples", "80", "--sequence-length", "4096")
    outcome = succeed("prune", sources["half"], "--output", tmp_path / "output", *words)
    assert "INFO: sequence_length=4096 is cut to the model's context of 512 tokens" in outcome.err
    calibration = read_json(tmp_path / "output" / "pruning_report.json")["calibration"]
    uses = 80 * 512 / calibration["stream_tokens"]
    assert f"a token is used {uses:.1f} times on average" in outcome.err
    assert calibration["sequence_length"] == 512 and calibration["windows_per_token"] == round(uses, 3) > 1


def test_sparsity_zero_warns_and_changes_nothing(sources, calibration, tmp_path):
    outcome = succeed("prune", sources["half"], "--output", tmp_path / "output", "--sparsity", "0", *calibration)
    assert "WARNING: sparsity=0" in outcome.err
    before, after = weights(sources["half"]), weights(tmp_path / "output")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def fail_at_the_second_call(monkeypatch, target, error):
    """Replaces a function by one that does its work once and then raises."""
    from importlib import import_module

    module, name = target.rsplit(".", 1)
    original, calls = getattr(import_module(module), name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(target, fail)
    return calls


@pytest.mark.parametrize("existing", [False, True], ids=["absent", "empty"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_run_stopped_in_the_sweep_leaves_nothing(sources, calibration, monkeypatch, tmp_path, error, existing):
    output = tmp_path / "output"
    if existing:
        output.mkdir()
    calls = fail_at_the_second_call(monkeypatch, "hf_mlopt.pruning.sweep._prune", error)
    words = ("prune", sources["half"], "--output", output, "--sparsity", "0.5", *calibration)
    if isinstance(error, KeyboardInterrupt):
        outcome = hf_mlopt(*words)
        assert outcome.status == 130 and outcome.err.splitlines()[-1] == "hf-mlopt prune: interrupted"
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            hf_mlopt(*words)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.rglob("*")] == (["output"] if existing else [])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_run_stopped_while_writing_leaves_nothing_and_can_be_repeated(
    sources, calibration, monkeypatch, tmp_path, error
):
    words = ("prune", sources["half"], "--output", tmp_path / "output", "--sparsity", "0.5", *calibration)
    written = []

    def fail(record, path):
        written.extend(entry.name for entry in path.parent.iterdir())
        # Were the process killed here, nobody would take this for a checkpoint.
        assert path.parent.name.startswith(".output.") and not (tmp_path / "output").exists()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("hf_mlopt.workflows.prune.save_yaml", fail)
        if isinstance(error, KeyboardInterrupt):
            assert hf_mlopt(*words).status == 130
        else:
            with pytest.raises(OSError, match="disk full"):
                hf_mlopt(*words)
    assert "model.safetensors" in written and not list(tmp_path.iterdir())
    succeed(*words)
    assert (tmp_path / "output" / "model.safetensors").is_file()
