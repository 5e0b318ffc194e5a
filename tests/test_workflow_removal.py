"""A checkpoint with fewer experts and half their weights, in the hands of plain transformers."""

import json

import pytest
import torch
from command_line import save, succeed
from families import make_family, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_mlopt.moe import moe_layers
from hf_mlopt.training.callbacks import KeepZerosCallback


pytestmark = pytest.mark.e2e


def half_is_zero(model):
    matrices = [layer.stacked(projection) for layer in moe_layers(model) for projection in layer.projections]
    return all(int((matrix == 0).sum()) * 2 == matrix.numel() for matrix in matrices)


@pytest.mark.parametrize("mode", ("--stream", "--in-memory"))
@pytest.mark.parametrize("name", ("mixtral", "qwen2_moe", "gpt_oss"))
def test_it_reloads_trains_a_step_and_reloads_again(name, mode, tiny_tokenizer, tmp_path):
    source = save(make_family(name), tiny_tokenizer, tmp_path / "source")
    words = ["--drop-experts", "0.25", "--sparsity", "0.5", "--calibration", "embedded", "--samples", "4"]
    succeed("prune", source, "--output", tmp_path / "pruned", *words, "--sequence-length", "64", mode)
    report = json.loads((tmp_path / "pruned" / "pruning_report.json").read_text())
    assert [len(layer["kept_experts"]) for layer in report["layers"]] == [3, 3]
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "3 of 4 experts left in every layer" in card and "Smaller by the experts that went" in card

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert [layer.num_experts for layer in moe_layers(model)] == [3, 3] and half_is_zero(model)
    before = model.lm_head.weight.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4, 16)]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=1, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[KeepZerosCallback()])
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    trainer.save_model(tmp_path / "trained")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    assert not torch.equal(again.lm_head.weight, before) and half_is_zero(again)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model.eval()(token_ids()).logits)
