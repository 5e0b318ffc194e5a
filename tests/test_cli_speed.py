"""`hf-mlopt speed`: what it prints and writes, and what it refuses. No test asks which variant is faster."""

import json

import pytest
import torch
from command_line import hf_mlopt, save, succeed
from families import make_family
from transformers import LlamaConfig, LlamaForCausalLM


pytestmark = pytest.mark.e2e

QUICK = ("--tokens", "1", "6", "--repeats", "6")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def source(work, tiny_mixtral, tiny_tokenizer):
    return save(tiny_mixtral(), tiny_tokenizer, work / "source")


@pytest.fixture(scope="module")
def report(work, source):
    calibration = ("--calibration", "embedded", "--samples", "4", "--sequence-length", "64", "--min-tokens", "0")
    succeed("prune", source, "--output", work / "pruned", "--sparsity", "0.5", *calibration)
    return work / "pruned" / "pruning_report.json"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """What is measured is of no interest here."""
    monkeypatch.setattr("hf_mlopt.speed.timing._BLOCK_SECONDS", 0.0)


def measured(model, output, *words):
    outcome = succeed("speed", model, *QUICK, *words, "--output", output)
    return json.loads(output.read_text()), outcome.out


def refused(*words):
    outcome = hf_mlopt("speed", *words)
    assert outcome.status == 2 and "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and outcome.err.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("hf-mlopt speed: error: ")


@pytest.mark.parametrize(
    "name, experts, intermediate",
    [("mixtral", 4, 64), ("qwen3_moe", 8, 32), ("gpt_oss", 4, 64), ("deepseek_v2", 8, 32)],
)
def test_the_record_is_complete(name, experts, intermediate, tmp_path):
    source = save(make_family(name, dtype=torch.bfloat16), None, tmp_path / "source")
    record, out = measured(source, tmp_path / "result.json")
    assert record["experts"] == {
        "model_type": name,
        "num_experts": experts,
        "top_k": 2,
        "hidden_size": 32,
        "intermediate_size": intermediate,
        "dtype": "bfloat16",
    }
    share = "0.5736" if name == "gpt_oss" else "0.5625"  # gpt-oss has biases, which stay
    assert f"it would take {share} of the bytes" in record["does_not_apply"][0]
    assert record["device"] == "cpu" and record["threads"] == 1 and record["routing"] == "balanced"
    assert record["environment"]["torch"] == torch.__version__ and record["model"] == str(source)
    assert [row["tokens"] for row in record["rows"]] == [1, 6]
    variants = ["half_zeros", "drop_0.25", "drop_0.5"]
    assert list(record["variants"]) == ["dense", *variants]
    for row in record["rows"]:
        assert list(row["speedup"]) == variants and set(row["seconds"]) == {"dense", *variants}
        assert row["rounds"] == 6 and row["implementation"] == "grouped_mm"
        assert [len(counts) for counts in row["tokens_per_expert"].values()] == [
            experts,
            experts * 3 // 4,
            experts // 2,
        ]
        assert all(sum(counts) == 2 * row["tokens"] for counts in row["tokens_per_expert"].values())
    for line in record["verdict"]:
        assert line in out


def test_what_does_not_apply_on_a_cpu_is_said(source, tmp_path):
    record, out = measured(source, tmp_path / "result.json", "--drop-experts", "0.5", "0.75")
    lines = [line for line in out.splitlines() if line.startswith("does not apply")]
    assert len(lines) == len(record["does_not_apply"]) == 2
    assert "2:4: torch's 2:4 kernels need a CUDA GPU, and this ran on the CPU" in lines[0]
    assert "drop_experts=0.75: keeps 1 of 4 experts" in lines[1]
    assert "2:4" not in record["variants"] and "by expert" not in out


def test_the_table_has_a_line_for_each_number_of_tokens(source, tmp_path):
    record, out = measured(source, tmp_path / "result.json")
    table = out.split("\n\n")[1].splitlines()
    assert table[0].split("  ")[-1].strip() == "2 of 4 removed" and "half zeros" in table[0]
    assert [line.split()[:2] for line in table[1:3]] == [["1", "0-1"], ["6", "3"]]
    median = record["rows"][0]["speedup"]["half_zeros"]["median"]
    assert f"x {median:.2f} ± " in table[1]
    # 4 experts of 3 matrices, 32 x 64, in float32; one and two of the four go.
    assert record["variants"]["dense"]["bytes"] == 4 * 3 * 32 * 64 * 4
    assert table[3].split() == ["weights", "0.0983", "MB", "x", "1", "x", "0.75", "x", "0.5"]
    assert "half zeros: " in out and "evaluate" in out


def test_another_implementation_of_dense_is_named(source, tmp_path, monkeypatch):
    choose = "hf_mlopt.speed.variants.ExpertVariants._fastest_implementation"
    monkeypatch.setattr(choose, lambda self, counts: "batched_mm" if sum(counts["dense"]) == 2 else "grouped_mm")
    record, out = measured(source, tmp_path / "result.json")
    assert [row["implementation"] for row in record["rows"]] == ["batched_mm", "grouped_mm"]
    assert [line for line in out.splitlines() if "batched_mm" in line] == [
        "tokens 1: dense is batched_mm, here faster than grouped_mm"
    ]


def test_the_dtype_is_that_of_the_config_or_as_asked(source, tmp_path):
    record, _ = measured(source, tmp_path / "one.json", "--dtype", "bfloat16")
    other, _ = measured(source, tmp_path / "other.json")
    assert (record["experts"]["dtype"], other["experts"]["dtype"]) == ("bfloat16", "float32")
    assert 2 * record["variants"]["dense"]["bytes"] == other["variants"]["dense"]["bytes"]


def test_tokens_go_where_the_report_counted_them(source, report, tmp_path):
    content = json.loads(report.read_text())
    for layer, counts in zip(content["layers"], ([10, 60, 20, 10], [35, 5, 0, 60]), strict=True):
        layer["tokens_per_expert"] = counts
    edited = tmp_path / "pruning_report.json"
    edited.write_text(json.dumps(content))
    record, out = measured(source, tmp_path / "result.json", "--tokens", "100", "--report", edited)
    # The mean of both layers, from the most to the least used expert; each is 60, 27.5, 7.5 and 5 %.
    assert record["rows"][0]["tokens_per_expert"] == {
        "dense": [100, 69, 19, 12],
        "drop_0.25": [100, 79, 21],
        "drop_0.5": [100, 100],
    }
    assert f"routing as counted in {edited}" in out


def test_the_report_of_a_real_run_is_understood(source, report, tmp_path):
    record, _ = measured(source, tmp_path / "result.json", "--report", report)
    counts = record["rows"][1]["tokens_per_expert"]["dense"]
    assert sum(counts) == 12 and counts == sorted(counts, reverse=True)


def test_the_report_of_a_run_that_removed_experts_fits_both_models(source, report, tmp_path):
    content = json.loads(report.read_text())
    for layer, kept in zip(content["layers"], ([1, 2], [0, 3]), strict=True):
        layer.update(tokens_per_expert=[10, 60, 20, 10], kept_experts=kept)
    edited = tmp_path / "pruning_report.json"
    edited.write_text(json.dumps(content))
    words = ("--tokens", "200", "--report", edited, "--drop-experts", "0.5")
    before, _ = measured(source, tmp_path / "before.json", *words)
    assert before["rows"][0]["tokens_per_expert"]["dense"] == [200, 100, 50, 50]
    after = save(make_family("mixtral", num_local_experts=2, num_experts_per_tok=1), None, tmp_path / "after")
    record, _ = measured(after, tmp_path / "after.json", *words)
    # 60 of 80, and 10 of 20 tokens went to the first of the two.
    assert record["rows"][0]["tokens_per_expert"] == {"dense": [125, 75], "drop_0.5": [200]}


def test_a_report_that_does_not_fit(source, report, work, tmp_path):
    words = ("speed", source, *QUICK, "--report")
    other = save(make_family("qwen3_moe"), None, tmp_path / "other")
    assert "counts 4 experts, the model has 8" in refused(other, *QUICK, "--report", report)
    assert "no pruning_report.json" in refused(*words[1:], tmp_path / "none.json")
    assert "no pruning_report.json" in refused(*words[1:], source / "config.json")
    content = json.loads(report.read_text())
    for layer in content["layers"]:
        layer["tokens_per_expert"] = []
    (tmp_path / "uncalibrated.json").write_text(json.dumps(content))
    assert "no tokens per expert" in refused(*words[1:], tmp_path / "uncalibrated.json")


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--tokens", "0"], ["tokens=[0]", "at least 1"]),
        (["--tokens", "8", "-1"], ["tokens=[8, -1]", "at least 1"]),
        (["--tokens"], ["tokens=[]", "one or more"]),
        (["--drop-experts", "1.0"], ["drop_experts=[1.0]", "between 0 and 1"]),
        (["--drop-experts", "0.5", "0"], ["drop_experts=[0.5, 0.0]", "between 0 and 1"]),
        (["--repeats", "5"], ["repeats=5", "at least 6"]),
        (["--device", "tpu"], ["device='tpu'", "must be auto, cpu"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
    ],
)
def test_wrong_words(source, words, parts):
    line = refused(source, *words)
    assert all(part in line for part in parts), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(source):
    assert "device='cuda': this machine has 0 CUDA devices" in refused(source, "--device", "cuda")


def test_a_dense_model(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=260
    )
    assert "dense model" in refused(save(LlamaForCausalLM(config), None, tmp_path / "dense"), *QUICK)


def test_a_config_without_dtype(source, tmp_path):
    model = save(make_family("mixtral"), None, tmp_path / "source")
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    assert "dtype='auto': config.json names none" in refused(model, *QUICK)


def test_a_layer_that_does_not_fit(source, monkeypatch):
    experts = 4 * 3 * 32 * 64 * 4  # bytes; dense and half-zero ones are needed, and some activations
    available = 1.9 * experts
    monkeypatch.setattr("hf_mlopt.planning.machine.available_memory", lambda: available)
    line = refused(source, *QUICK)
    assert "takes 0.0 GB, and cpu has 0.0 GB" in line and "--dtype" in line
    available = 2.5 * experts
    succeed("speed", source, *QUICK)
    assert "takes 3.1 GB" in refused(source, "--tokens", "1000000")


def test_an_earlier_result_is_kept(source, tmp_path):
    result = tmp_path / "result.json"
    result.write_text("mine")
    assert "exists already" in refused(source, *QUICK, "--output", result)
    assert result.read_text() == "mine"


def test_no_weights_are_read(source, tmp_path):
    """A file that holds something else, with a header that says it is whole, makes no difference."""
    from safetensors.torch import save_file

    empty = tmp_path / "source"
    empty.mkdir()
    (empty / "config.json").write_text((source / "config.json").read_text())
    save_file({"nothing": torch.zeros(1)}, empty / "model.safetensors")
    record, _ = measured(empty, tmp_path / "result.json")
    assert record["experts"]["num_experts"] == 4


def test_a_directory_that_is_not_a_checkpoint(tmp_path):
    assert "not a checkpoint" in refused(tmp_path)
