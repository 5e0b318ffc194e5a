import copy

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from hf_mlopt.hub import pruning_card, render_card


REPORT = {
    "method": "moe-pruner",
    "pattern": None,
    "sparsity": 0.5,
    "scope": "experts",
    "propagate": "pruned",
    "gate_power": 1.0,
    "experts_implementation": "grouped_mm",
    "calibration": {
        "source": "allenai/c4",
        "dataset": "allenai/c4",
        "revision": "1588ec45",
        "packing": "documents",
        "seed": 0,
        "samples": 128,
        "sequence_length": 2048,
        "fingerprint": "ab" * 32,
    },
    "model": {"source": "mistralai/Mixtral-8x7B-v0.1", "revision": "fc7ac946"},
    "layers": [
        {
            "index": index,
            "tensors": [
                {"name": f"model.layers.{index}.mlp.experts.{expert}.{name}", "shape": [4, 8], "sparsity": sparsity}
                for expert in range(2)
                for name, sparsity in (("w1", 0.5), ("w2", 0.25))
            ],
            "tokens_per_expert": [5000, 3 if index == 1 else 7000],
            "uncovered": [1] if index == 1 else [],
        }
        for index in range(2)
    ],
    "totals": {
        "parameters": 1000,
        "pruned_parameters": 256,
        "zeros": 96,
        "sparsity_of_scope": 0.375,
        "sparsity_of_model": 0.096,
    },
    "seconds": 4210.0,
    "peak_memory_bytes": 23_400_000_000,
    "environment": {
        "python": "3.11.9",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "hf_mlopt": "0.1.0",
        "machine": "1 x NVIDIA H100 80GB HBM3, 16 CPU cores",
    },
    "evaluation": [
        {"dataset": "Salesforce/wikitext", "split": "test", "window": 2048, "tokens": 333824, "dense": 4, "pruned": 5}
    ],
}


def changed(**changes):
    return copy.deepcopy(REPORT) | changes


def test_header_is_read_back_by_the_hub_library():
    card = ModelCard(pruning_card(REPORT, "someone/pruned-50", license="apache-2.0"))
    assert card.data.base_model == "mistralai/Mixtral-8x7B-v0.1"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["allenai/c4"]
    assert "moe-pruner" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("perplexity", 5, "Salesforce/wikitext")
    assert "dense model: 4.00" in result.metric_name
    assert card.data.model_name == "pruned-50"


def test_every_number_stands_beside_the_dense_one():
    text = pruning_card(REPORT, "pruned")
    assert "| Salesforce/wikitext | test | 2048 | 333,824 | 4.00 | **5.00** | +25.0 % |" in text


def test_projections_are_summed_over_layers_and_experts():
    text = pruning_card(REPORT, "pruned")
    assert "| `mlp.experts.w1` | 4 | 128 | 64 | 50 % |" in text
    assert "| `mlp.experts.w2` | 4 | 128 | 32 | 25 % |" in text
    assert "| **all in scope** | | 256 | 96 | **37.5 %** |" in text


def test_calibration_and_starved_experts_are_stated():
    text = pruning_card(REPORT, "pruned", command="hf-mlopt prune X --sparsity 0.5")
    assert "128 windows × 2048 tokens = 262,144 tokens" in text
    assert "ab" * 32 in text
    assert "1 expert saw too few tokens" in text
    assert "| 1 | 1 (3) |" in text
    assert "hf-mlopt prune X --sparsity 0.5" in text
    assert "70 min" in text and "23.4 GB" in text


def test_a_long_list_of_starved_layers_is_cut():
    layers = [REPORT["layers"][1] | {"index": index} for index in range(15)]
    text = pruning_card(changed(layers=layers), "pruned")
    assert "and 3 more layers" in text and "| 11 | 1 (3) |" in text and "| 12 | 1 (3) |" not in text


def test_what_was_not_measured_is_left_out():
    bare = changed(
        method="magnitude",
        pattern="2:4",
        sparsity=None,
        calibration=None,
        model={"source": "my-model", "revision": None},
        experts_implementation=None,
        peak_memory_bytes=None,
        layers=[layer | {"tokens_per_expert": [], "uncovered": []} for layer in REPORT["layers"]],
    )
    del bare["evaluation"]
    text = pruning_card(bare, "pruned")
    header = ModelCard(text).data.to_dict()
    assert not {"base_model", "datasets", "license", "model-index", "model_name"} & set(header)
    assert "## Perplexity" not in text and "## Calibration" not in text and "Tokens per expert" not in text
    assert "peak memory" not in text and "observed through" not in text
    assert "2 of every 4 consecutive inputs" in text
    assert "No quality was measured" in text
    assert "None" not in text


def test_a_directory_is_shown_by_its_name_alone(tmp_path):
    calibration = {"source": "embedded", "python": "3.11.9", "samples": 8, "sequence_length": 128}
    text = pruning_card(changed(calibration=calibration), str(tmp_path / "pruned"))
    assert str(tmp_path) not in text and "# pruned\n" in text and 'from_pretrained("pruned"' in text
    assert "documentation of Python 3.11.9 (`pydoc_data.topics`)" in text


def test_overlap_of_calibration_and_evaluation_is_told():
    row = REPORT["evaluation"][0] | {"overlap": 0.2}
    assert "20 % of the calibration text was found again" in pruning_card(changed(evaluation=[row]), "pruned")
    assert "found again" not in pruning_card(REPORT, "pruned")


def test_layout_of_the_page_survives_the_template():
    for report in (REPORT, changed(calibration=None, evaluation=[])):
        text = pruning_card(report, "pruned")
        assert "\n\n\n" not in text and "{%" not in text and "{{" not in text
        for before, line in zip(text.split("\n"), text.split("\n")[1:], strict=False):
            if line.startswith("#"):
                assert before == "", f"no blank line before {line!r}"


def test_data_the_template_needs_is_demanded():
    with pytest.raises(UndefinedError, match="name"):
        render_card("pruned", {}, {"library_name": "transformers"})
