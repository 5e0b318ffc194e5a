"""One step of Adam as a function, for moments that travel or are stored."""

import torch

from hf_mlopt.federated.algorithms.message import Group


def adam_step(
    weights: Group,
    grads: Group,
    m: Group,
    v: Group,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    r"""
    [Adam](https://huggingface.co/papers/1412.6980), Algorithm 1, towards smaller values.

    Args:
        weights (`Group`): Weights; none is changed.
        grads (`Group`): Gradients, of all weights.
        m (`Group`): First moments.
        v (`Group`): Second moments.
        step (`int`): t, the number of this step; the first is 1.
        lr (`float`): α.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): β₁, β₂.
        eps (`float`, *optional*, defaults to 1e-8): ε, outside the root.

    Returns:
        `tuple`: Weights, m and v after the step, in the dtypes given.
    """
    beta1, beta2 = betas
    new_weights, new_m, new_v = {}, {}, {}
    for name, weight in weights.items():
        grad = grads[name].to(m[name].dtype)
        new_m[name] = beta1 * m[name] + (1 - beta1) * grad
        new_v[name] = beta2 * v[name] + (1 - beta2) * grad.square()
        m_hat = new_m[name] / (1 - beta1**step)
        v_hat = new_v[name] / (1 - beta2**step)
        new_weights[name] = (weight - lr * m_hat / (v_hat.sqrt() + eps)).to(weight.dtype)
    return new_weights, new_m, new_v
