"""Measured results in cards: header, tables, `.eval_results/`, and the card of a distilled model."""

import copy
import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_mlopt.errors import InputError
from hf_mlopt.hub import distillation_card, pruning_card
from hf_mlopt.hub.results import check_evaluation, eval_results_files, read_evaluation, subject
from tests.test_hub_card import REPORT


def row(task, value, stderr=0.01, dataset="allenai/ai2_arc", metric="acc", samples=2376, shots=0, **more):
    return {
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "samples": samples,
        "num_fewshot": shots,
        "version": 1.0,
        "dataset": dataset,
        "split": "test",
        **more,
    }


def measured(name, shift, perplexity):
    return {
        "model": name,
        "results": [
            row("arc_easy", 0.8125 - shift),
            row("arc_challenge", 0.5 - shift, stderr=None),
            row("gsm8k", 0.4 - shift, dataset="openai/gsm8k", metric="exact_match", samples=1319, shots=5),
            row("mine", 0.25 - shift, dataset="/home/me/mine.jsonl", samples=8),
        ],
        "perplexity": {
            "perplexity": perplexity,
            "nll": 1.0,
            "tokens": 333824,
            "windows": 163,
            "window": 2048,
            "dataset": {"source": "wikitext", "dataset": "Salesforce/wikitext", "split": "test"},
            "calibration_overlap": None,
        },
    }


EVALUATION = {
    "models": [
        measured("/data/dense", 0, 4.0),
        measured("runs/pruned", 0.125, 5.0),
        measured("distilled", 0.0625, 4.5),
    ],
    "environment": REPORT["environment"],
    "lm_eval": "0.4.13",
}
DISTILLATION = {
    "mode": "end-to-end",
    "teacher": {"source": "mistralai/Mixtral-8x7B-v0.1", "revision": "fc7ac946"},
    "student": {"source": "pruned", "revision": None},
    "dataset": {
        "source": "allenai/c4",
        "dataset": "allenai/c4",
        "revision": "1588ec45",
        "fingerprint": "cd" * 32,
        "samples": 144,
    },
    "samples": 128,
    "eval_samples": 16,
    "sequence_length": 2048,
    "epochs": 2.0,
    "tokens": 524288,
    "steps": 64,
    "learning_rate": 2e-5,
    "lmbda": 0.31,
    "logit_weight": 0.5,
    "temperature": 2.0,
    "trained": "lora",
    "lora_rank": 8,
    "freeze_router": True,
    "mask_violations": 0,
    "loss": [{"step": 1, "loss": 3.25, "ce": 2.5, "expert_mse": 0.25}, {"step": 64, "loss": 2.25, "ce": 2.0}],
    "layers": [{"index": 0, "mse_before": 0.2, "mse_after": 0.05}],
    "seconds": 4210.0,
    "peak_memory_bytes": 23_400_000_000,
    "environment": REPORT["environment"],
    "evaluation": [
        {
            **{"dataset": "Salesforce/wikitext", "split": "validation", "window": 2048, "tokens": 333824},
            **{"dense": 4.0, "pruned": 5.0, "distilled": 4.25},
        }
    ],
}


def without(record, path):
    record = copy.deepcopy(record)
    place = record
    *way, last = path
    for key in way:
        place = place[key]
    del place[last]
    return record


def by_metric(card):
    return {(result.dataset_name, result.metric_type): result for result in ModelCard(card).data.eval_results}


def test_the_header_holds_the_numbers_of_the_evaluation():
    report = {**REPORT, "evaluation": []}
    found = by_metric(pruning_card(report, "someone/pruned", results=EVALUATION))
    expected = {(each["task"], each["metric"]): each["value"] for each in EVALUATION["models"][1]["results"]}
    expected["Salesforce/wikitext", "perplexity"] = 5.0
    assert {key: result.metric_value for key, result in found.items()} == expected
    easy = found["arc_easy", "acc"]
    assert (easy.dataset_type, easy.dataset_config, easy.dataset_split) == ("allenai/ai2_arc", "arc_easy", "test")
    assert easy.metric_name == (
        "acc, 0-shot, lm-eval 0.4.13, task version 1.0, standard error 0.0100 (dense model: 0.8125)"
    )
    assert found["mine", "acc"].dataset_type == "mine.jsonl"


def test_the_tables_show_the_dense_model_first_and_this_one_last():
    text = pruning_card({**REPORT, "evaluation": []}, "pruned", results=EVALUATION)
    assert "| task | metric | shots | questions | dense | distilled | this model | change |" in text
    line = "| arc_easy (version 1.0) | acc | 0 | 2,376 | 0.8125 ± 0.0100 | 0.7500 ± 0.0100 | **0.6875** ± 0.0100 |"
    assert f"{line} -0.1250 |" in text
    assert "| arc_challenge (version 1.0) | acc | 0 | 2,376 | 0.5000 | 0.4375 | **0.3750** | -0.1250 |" in text
    assert "| Salesforce/wikitext | test | 2048 | 333,824 | 4.00 | 4.50 | **5.00** | +25.0 % |" in text
    assert "lm-eval 0.4.13" in text and "/home/me" not in text and "/data/dense" not in text


def test_what_the_evaluation_measured_again_stands_once():
    text = pruning_card(REPORT, "pruned", results=EVALUATION)  # both on the test split of wikitext
    assert text.count("| Salesforce/wikitext |") == 1
    text = distillation_card(DISTILLATION, REPORT, "distilled", results=EVALUATION)  # another split
    assert text.count("| Salesforce/wikitext |") == 2
    assert [result.metric_value for result in ModelCard(text).data.eval_results[:2]] == [4.25, 4.5]


def test_only_whole_benchmarks_of_the_hub_get_a_file():
    files = eval_results_files(EVALUATION, "pruned")
    assert list(files) == [".eval_results/gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/gsm8k.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 27.5)
    assert entry.notes == "exact_match, 5-shot, lm-eval 0.4.13, task version 1.0"
    for change in ({"samples": 100}, {"metric": "acc"}, {"dataset": "gsm8k.jsonl"}):
        other = copy.deepcopy(EVALUATION)
        for model in other["models"]:
            model["results"][2] |= change
        assert eval_results_files(other, "pruned") == {}


def test_the_model_is_told_by_its_name():
    assert subject(EVALUATION, "someone/distilled") == 2
    two = EVALUATION | {"models": EVALUATION["models"][:2]}
    assert subject(two, "someone/pruned") == 1
    with pytest.raises(InputError, match="model='whatever'"):  # not those of whatever else was measured
        subject(two, "whatever")
    with pytest.raises(InputError, match="model='other': is not one of .* dense, pruned, distilled"):
        subject(EVALUATION, "other")
    with pytest.raises(InputError, match="model='dense'"):  # nothing stands beside it
        subject(EVALUATION, "dense")


@pytest.mark.parametrize(
    "path, message",
    [
        (("models",), "no list `models`"),
        (("models", 2, "results", 0, "stderr"), r"models\[2\].results\[0\] misses stderr"),
        (("models", 1, "perplexity", "window"), r"models\[1\].perplexity misses window"),
        (("lm_eval",), "misses lm_eval"),
        (("models", 0, "results", 1), "has acc of arc_challenge, the dense model has not"),
        (("models", 0, "perplexity"), "the dense model has none"),
    ],
)
def test_an_evaluation_that_lacks_something_is_refused_by_name(path, message):
    check_evaluation(EVALUATION, "result.json")
    with pytest.raises(InputError, match=f"^result.json: .*{message}|^result.json: .*misses"):
        check_evaluation(without(EVALUATION, path), "result.json")
    with pytest.raises(InputError, match=message):
        check_evaluation(without(EVALUATION, path), "result.json")


def test_numbers_that_cannot_be_compared_or_stated_are_refused():
    for change, message in (
        ({"num_fewshot": 5}, "num_fewshot 5, for the dense model with 0"),
        ({"value": float("nan")}, "its value is nan"),
    ):
        other = copy.deepcopy(EVALUATION)
        other["models"][1]["results"][0] |= change
        with pytest.raises(InputError, match=message):
            check_evaluation(other, "result.json")
    with pytest.raises(InputError, match="holds 1 model; .*hf-mlopt evaluate DENSE PRUNED"):
        check_evaluation({"models": EVALUATION["models"][:1]}, "result.json")


def test_a_file_that_is_no_evaluation_is_refused(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("{")
    with pytest.raises(InputError, match=f"{file}: cannot be read"):
        read_evaluation(file)
    file.write_text(json.dumps(EVALUATION))
    assert read_evaluation(file) == EVALUATION


def test_the_card_of_a_distilled_model_tells_both_steps():
    text = distillation_card(DISTILLATION, REPORT, "someone/distilled", command="hf-mlopt distill X", license="mit")
    data = ModelCard(text).data
    assert data.base_model == "mistralai/Mixtral-8x7B-v0.1" and data.datasets == ["allenai/c4"]
    assert {"distillation", "pruning", "sparse", "moe-pruner", "mixture-of-experts"} <= set(data.tags)
    assert [result.metric_value for result in data.eval_results] == [4.25]
    assert "| Salesforce/wikitext | validation | 2048 | 333,824 | 4.00 | 5.00 | **4.25** | +6.2 % |" in text
    assert "| `mlp.experts.w1` | 4 | 128 | 64 | 50 % |" in text
    for line in (
        "| size | 128 windows × 2048 tokens = 262,144 tokens |",
        "| held out | 16 windows more |",
        "| trained | the routed experts, by a LoRA of rank 8 that was merged; routers frozen |",
        "| steps | 64, 524,288 tokens seen |",
        "| learning rate | 2e-05 |",
        "| weight of the experts' error (λ) | 0.31 |",
        "| weight of the logits' divergence | 0.5, temperature 2 |",
        "| loss (nats per token) | 3.25 at step 1, 2.25 at step 64 |",
        "| 0 | 0.2 | 0.05 | -75.0 % |",
        "Every weight that pruning had set to zero is still zero.",
        "hf-mlopt distill X",
    ):
        assert line in text
    assert "error of the experts | 0.25" not in text  # logged once: there is no course
    assert "bit for bit" not in text  # nothing of a trained model is sure to be the original's


def test_the_card_of_a_distilled_model_leaves_out_what_it_does_not_know():
    bare = {
        key: DISTILLATION[key]
        for key in ("teacher", "student", "dataset", "tokens", "steps", "learning_rate", "seconds", "environment")
    }
    bare |= {"mode": "layerwise", "trained": "experts", "mask_violations": 3}
    text = distillation_card(bare, None, "distilled")
    data = ModelCard(text).data.to_dict()
    assert not {"license", "model-index", "model_name"} & set(data) and "sparse" not in data["tags"]
    assert "What was removed" not in text and "Perplexity" not in text and "λ" not in text
    assert "layer by layer" in text and "No quality was measured" in text and "None" not in text
    assert "3 weights that were zero before are not zero any more" in text
    plain = distillation_card({**DISTILLATION, "lmbda": 0}, None, "distilled")
    assert "The student learned to predict the text. " in plain


@pytest.mark.parametrize("results", [None, EVALUATION])
@pytest.mark.parametrize("pruning", [None, REPORT])
def test_layout_of_the_page_survives_the_template(pruning, results):
    for text in (
        distillation_card(DISTILLATION, pruning, "distilled", command="x", results=results),
        pruning_card(REPORT, "pruned", command="x", results=results),
    ):
        assert "\n\n\n" not in text and "{%" not in text and "{{" not in text
        for before, line in zip(text.split("\n"), text.split("\n")[1:], strict=False):
            if line.startswith("#") or (line.startswith("|") and not before.startswith("|")):
                assert before == "", f"no blank line before {line!r}"
            if line.startswith("|") and before.startswith("|"):
                assert line.count("|") == before.count("|"), line


def test_a_report_without_what_its_card_states_is_one_error():
    lacking = without(without(DISTILLATION, ("teacher", "source")), ("steps",))
    with pytest.raises(InputError, match="^distillation_report.json: misses teacher.source, steps, which its card"):
        distillation_card(lacking, REPORT, "distilled")
    with pytest.raises(InputError, match="^pruning_report.json: misses totals.zeros"):
        distillation_card(DISTILLATION, without(REPORT, ("totals", "zeros")), "distilled")
    with pytest.raises(InputError, match="^pruning_report.json: misses model.source"):
        pruning_card(without(REPORT, ("model",)), "pruned")
