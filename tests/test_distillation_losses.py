"""The losses of distillation against their literal twin, at odd shapes and in the degenerate cases."""

import math

import pytest
import torch

from hf_mlopt.distillation.losses import expert_mse, expert_squared_error, logit_divergence, tokens_per_expert
from hf_mlopt.distillation.running_means import RunningMeans
from tests.reference import distillation


def expert_case(tokens=11, k=3, hidden=5, num_experts=7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, k, hidden, generator=generator).to(dtype) for _ in range(2))
    rows = [torch.randperm(num_experts - 1, generator=generator)[:k] for _ in range(tokens)]  # the last gets no token
    return student, teacher, torch.stack(rows), torch.rand(tokens, generator=generator) < 0.7


def literal_mse(student, teacher, index, mask, num_experts):
    sums, tokens = [0.0] * num_experts, [0] * num_experts
    for t in range(len(index)):
        for k in range(index.shape[1]):
            if mask is None or mask[t]:
                pairs = zip(student[t, k].tolist(), teacher[t, k].tolist(), strict=True)
                sums[index[t, k]] += sum((a - b) ** 2 for a, b in pairs)
                tokens[index[t, k]] += 1
    return distillation.mean_squared_errors(sums, tokens, student.shape[-1]), tokens


def library_mse(student, teacher, index, mask, num_experts):
    error_E = expert_squared_error(student, teacher, index, num_experts, mask)
    tokens_E = tokens_per_expert(index, num_experts, mask)
    return expert_mse(error_E, tokens_E, student.shape[-1]), tokens_E


@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("tokens, k, hidden, num_experts", [(11, 3, 5, 7), (1, 1, 1, 2), (64, 2, 33, 9)])
def test_expert_mse_is_the_twins(tokens, k, hidden, num_experts, masked):
    student, teacher, index, mask_T = expert_case(tokens, k, hidden, num_experts)
    mask_T = mask_T if masked else None
    mse_E, tokens_E = library_mse(student, teacher, index, mask_T, num_experts)
    expected, counted = literal_mse(student, teacher, index, mask_T, num_experts)
    assert tokens_E.tolist() == counted and counted[-1] == 0 and mse_E[-1] == 0
    torch.testing.assert_close(mse_E, torch.tensor(expected), rtol=1e-6, atol=0)


def test_no_token_counts_and_equal_outputs_have_no_error():
    student, teacher, index, mask_T = expert_case()
    mse_E, tokens_E = library_mse(student, teacher, index, torch.zeros_like(mask_T), 7)
    assert tokens_E.sum() == 0 and torch.equal(mse_E, torch.zeros(7))
    mse_E, _ = library_mse(student, student.clone(), index, None, 7)
    assert torch.equal(mse_E, torch.zeros(7))


def test_a_token_that_does_not_count_gets_no_gradient():
    student, teacher, index, mask_T = expert_case()
    student.requires_grad_()
    library_mse(student, teacher, index, mask_T, 7)[0].sum().backward()
    assert not student.grad[~mask_T].any() and student.grad[mask_T].all()
    tokens = literal_mse(student, teacher, index, mask_T, 7)[1]
    t = int(mask_T.nonzero()[0])
    expected = 2 * (student - teacher)[t, 0] / (tokens[index[t, 0]] * 5)  # d/ds (s - t)^2 / (n H)
    torch.testing.assert_close(student.grad[t, 0], expected.detach())


def test_sums_of_micro_batches_are_those_of_the_batch():
    student, teacher, index, mask_T = expert_case(tokens=20)
    whole_E, _ = library_mse(student, teacher, index, mask_T, 7)
    parts = [slice(0, 3), slice(3, 4), slice(4, 20)]
    error_E = sum(expert_squared_error(student[p], teacher[p], index[p], 7, mask_T[p]) for p in parts)
    tokens_E = sum(tokens_per_expert(index[p], 7, mask_T[p]) for p in parts)
    torch.testing.assert_close(expert_mse(error_E, tokens_E, 5), whole_E)


def test_bfloat16_is_accumulated_in_float32():
    student, teacher, index, mask_T = expert_case(tokens=300, dtype=torch.bfloat16)
    mse_E, _ = library_mse(student, teacher, index, mask_T, 7)
    expected, _ = literal_mse(student, teacher, index, mask_T, 7)
    assert mse_E.dtype == torch.float32
    torch.testing.assert_close(mse_E, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 3.0))
def test_logit_divergence_is_the_twins(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 7, 13, generator=generator) for _ in range(2))
    labels = torch.randint(0, 13, (2, 7), generator=generator)
    labels[0, 4:] = labels[1, :3] = -100
    flat = [logits[:, :-1].flatten(0, 1) for logits in (student, teacher)]
    divergence = logit_divergence(*flat, labels[:, 1:].flatten(), temperature)
    expected = distillation.forward_kl(student, teacher, labels, temperature)
    assert divergence.item() == pytest.approx(expected, rel=1e-5)
    assert logit_divergence(flat[0], flat[0], labels[:, 1:].flatten(), temperature) == 0
    nothing = torch.full_like(labels[:, 1:], -100).flatten()
    assert logit_divergence(*flat, nothing, temperature) == 0


def test_the_divergence_is_forward_and_its_gradient_keeps_its_size_at_any_temperature():
    # p = (1, 0), q = (1/2, 1/2): KL(p, q) = log 2, while KL(q, p) is very large.
    teacher, student, label = torch.tensor([[40.0, 0.0]]), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    assert logit_divergence(student, teacher, label, 1.0).item() == pytest.approx(math.log(2))
    norms = []
    for temperature in (10.0, 100.0):
        logits = student.clone().requires_grad_()
        logit_divergence(logits, torch.tensor([[1.0, 0.0]]), label, temperature).backward()
        norms.append(logits.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_running_means_are_over_steps_and_ranks():
    means, ranks = RunningMeans(), lambda value: 2 * value
    for step in range(3):
        means.begin_step()
        for micro_batch in range(2):
            means.add("a", torch.tensor(float(step + micro_batch)))
            means.add("b", torch.tensor([1.0, float(step)], requires_grad=True))
    assert means.read(ranks) == {"a": 6.0, "b": [4.0, 4.0]}
    assert means.read(ranks) == {}
    means.add("a", torch.tensor(0.5))
    assert means.read(ranks) == {"a": 1.0}  # no step was begun: the sum
