"""
The losses of expert-wise distillation, Eq. (10) of [MoE-Pruner](https://huggingface.co/papers/2410.12013):
L = L_CE + lmbda * sum over layers, sum over experts, MSE(E_teacher(x), E_student(x)).

Each is kept as sums and counts, so that micro-batches and ranks add up to what one large batch would have given.
"""

# T tokens   H hidden   K experts per token   E experts   L layers   V vocabulary

import torch
import torch.nn.functional as F


IGNORED = -100  # label of a token that is not predicted


def expert_squared_error(
    student_TKH: torch.Tensor,
    teacher_TKH: torch.Tensor,
    index_TK: torch.Tensor,
    num_experts: int,
    mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Summed squared difference of two sets of expert outputs, per expert.

    Args:
        student_TKH, teacher_TKH (`torch.Tensor`): Unweighted outputs, `[tokens, top-k, hidden]`.
        index_TK (`torch.Tensor`): The expert of each.
        num_experts (`int`): Experts of the layer.
        mask_T (`torch.Tensor`, *optional*): False for tokens that do not count.

    Returns:
        `torch.Tensor`: `[experts]`, float32, in units of the output squared.
    """
    error_TK = (student_TKH.float() - teacher_TKH.float()).square().sum(dim=-1)
    if mask_T is not None:
        error_TK = error_TK * mask_T.unsqueeze(1)
    zeros_E = error_TK.new_zeros(num_experts)
    return zeros_E.index_add(0, index_TK.reshape(-1), error_TK.reshape(-1))


def tokens_per_expert(index_TK: torch.Tensor, num_experts: int, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens that count, per expert, `[experts]`, int64."""
    if mask_T is not None:
        index_TK = index_TK[mask_T]
    return torch.bincount(index_TK.reshape(-1), minlength=num_experts)


def expert_mse(error_LE: torch.Tensor, tokens_LE: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """
    Mean squared error of each expert, over the tokens sent to it and the hidden dimension.

    Args:
        error_LE (`torch.Tensor`): Summed squared errors.
        tokens_LE (`torch.Tensor`): Tokens of each expert, over everything that makes up one optimizer step; an expert
            without any has no error.
        hidden_size (`int`): Width of the outputs.

    Returns:
        `torch.Tensor`: Of the shape of `error_LE`; its sum is the loss.
    """
    return error_LE / (tokens_LE.clamp(min=1) * hidden_size)


def logit_divergence(
    student_TV: torch.Tensor, teacher_TV: torch.Tensor, labels_T: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    Forward KL divergence from teacher to student, summed over predicted tokens, times the temperature squared.

    Args:
        student_TV, teacher_TV (`torch.Tensor`): Logits that predict `labels_T`, `[tokens, vocabulary]`.
        labels_T (`torch.Tensor`): What is predicted; -100 does not count.
        temperature (`float`): Divides both logits.

    Returns:
        `torch.Tensor`: Scalar, nats.
    """
    predicted_T = labels_T != IGNORED
    student_TV = F.log_softmax(student_TV[predicted_T].float() / temperature, dim=-1)
    teacher_TV = F.log_softmax(teacher_TV[predicted_T].float() / temperature, dim=-1)
    return F.kl_div(student_TV, teacher_TV, reduction="sum", log_target=True) * temperature**2
