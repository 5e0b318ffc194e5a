"""KeepZerosCallback: what it holds, by which of its two means, and what it counts."""

import pytest
import torch

from hf_mlopt.training import KeepZerosCallback
from hf_mlopt.training.callbacks import sparsity_of
from tests.distilled import AtStep
from tests.families import make_family
from tests.pruned import prune
from tests.test_training_trainer import make_trainer


def pruned_model():
    model = make_family("mixtral")
    prune(model)
    return model


def begun(model):
    callback = KeepZerosCallback()
    callback.on_train_begin(None, None, None, model=model)
    return callback


def test_gradients_of_zeros_are_zero_so_that_clipping_does_not_see_them(tmp_path):
    norms = {}
    for callbacks in ([], [KeepZerosCallback()]):
        model, seen = pruned_model(), []

        def note(model, seen=seen):
            for name, parameter in model.named_parameters():
                if "experts" in name:
                    seen.append((parameter.grad[parameter == 0].abs().max(), parameter.grad.abs().max()))

        settings = {"max_steps": 1, "logging_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 1e9}
        trainer = make_trainer(model, tmp_path, [*callbacks, AtStep("on_pre_optimizer_step", note)], **settings)
        trainer.train()
        assert len(seen) == 4 and all((zeros == 0) == bool(callbacks) and others > 0 for zeros, others in seen)
        norms[bool(callbacks)] = trainer.state.log_history[0]["grad_norm"]
    assert norms[True] < norms[False]


def test_what_an_optimizer_moves_is_zero_again(tmp_path):
    """Momentum of a run that did not mask its gradients, say: only the second means catches it."""
    model = pruned_model()
    callback, weight = begun(model), model.model.layers[0].mlp.experts.down_proj
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    assert callback.violations() == int((before == 0).sum())
    callback.on_optimizer_step(None, None, None)
    assert callback.violations() == 0
    assert torch.equal(weight, torch.where(before == 0, 0, before + 1))


@pytest.mark.parametrize("means", ("_mask_gradient", "on_optimizer_step"))
def test_either_means_alone_holds_zeros(tmp_path, monkeypatch, means):
    if means == "_mask_gradient":
        monkeypatch.setattr("hf_mlopt.training.callbacks._mask_gradient", lambda parameter, zeros: _Nothing())
    else:
        monkeypatch.setattr(KeepZerosCallback, "on_optimizer_step", lambda *args, **kwargs: None)
    model = pruned_model()
    zeros = model.model.layers[1].mlp.experts.gate_up_proj == 0
    make_trainer(model, tmp_path, [KeepZerosCallback()], mlopt_optim="adamw").train()
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj == 0, zeros)


class _Nothing:
    def remove(self):
        pass


def test_frozen_and_dense_matrices_are_not_held_and_all_is_forgotten_at_the_end():
    model = pruned_model()
    model.model.layers[0].mlp.experts.requires_grad_(False)
    callback = begun(model)
    held = {id(parameter) for parameter, _ in callback._zeros}
    experts = model.model.layers[1].mlp.experts
    assert held == {id(experts.gate_up_proj), id(experts.down_proj)}
    callback.on_train_end(None, None, None)
    assert callback.violations() == 0 and not callback._zeros
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert experts.down_proj.grad[experts.down_proj == 0].any()  # no hook is left


def test_a_second_training_reads_its_masks_anew(tmp_path):
    model, callback = pruned_model(), KeepZerosCallback()
    trainer = make_trainer(model, tmp_path, [callback], max_steps=1)
    trainer.train()
    weight = model.model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        weight[:, :8] = 0
    zeros = weight == 0
    trainer.train()
    assert torch.equal(weight == 0, zeros)


def test_nothing_to_hold_is_said(monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_mlopt.training.callbacks.logger.warning", warnings.append)
    begun(make_family("mixtral"))
    assert len(warnings) == 1 and "no pruned matrix" in warnings[0]


def test_sparsity_of_a_matrix():
    assert sparsity_of(torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 4.0]])) == pytest.approx(1 / 3)
    assert sparsity_of(torch.zeros(0, 2)) == 0  # partitioned away, as DeepSpeed does
