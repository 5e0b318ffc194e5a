"""
Training with diversely stale parameters in index form: one loop over batches that keeps every version of every block.

w[k][v]: block k after v updates. h[k]: its output for batch n, made with version u(max(D, n - m_k)). Its gradient uses
version u(n), at the same input. Shares no code with the library; optimizers are torch's.
"""

import copy
import math

import torch


def updates_before(n, every, drains=()):
    """u(n): groups of `every` batches, cut at drain points, that lie wholly before batch n."""
    count, first = 0, 0
    for batch in range(n):
        if batch + 1 - first == every or batch + 1 in drains or (batch + 1) % every == 0:
            count, first = count + 1, batch + 1
    return count


def simulate(
    blocks,
    optimizers,
    m,
    batches,
    every=1,
    drains=(),
    predict=None,
    max_norm=0.0,
    lagged=False,
    tied=None,
    is_counted=False,
):
    """
    Args:
        blocks: Modules; not changed.
        optimizers: For each block a function from parameters to an optimizer.
        batches: All batches; the last batch of all closes a group.
        drains: Batches before which the pipeline was empty.
        predict: None, or β of momentum.
        tied: Functions that give the copy in the first block and its owner in the last. The gradient of the copy for
            batch n joins the owner's at batch min(n + m_0, E - 1), E the next drain; both are equal in each version.
        is_counted: Whether the blocks divide their loss by the items of a group, so that it is summed.
        max_norm: Bound of the norm of each block's gradient, or with `lagged` of all blocks'.

    Returns: the blocks after the last update, and the losses.
    """
    total, K = len(batches), len(blocks)
    u = [updates_before(n, every, (*drains, total)) for n in range(total + 1)]
    D = [max([0, *(d for d in drains if d <= n)]) for n in range(total + 1)]
    w = [[copy.deepcopy(block)] for block in blocks]
    opt_state, losses, norms = [None] * K, [], {}
    late = {}
    for n, batch in enumerate(batches):
        h = [()]
        for k in range(K - 1):
            version = u[max(D[n], n - m[k])]
            block = copy.deepcopy(w[k][version])
            if predict is not None and version > 0:
                s = u[n] - version
                factor = predict * (1 - predict**s) / (1 - predict)
                with torch.no_grad():
                    for p, now, before in zip(
                        block.parameters(), w[k][version].parameters(), w[k][version - 1].parameters(), strict=True
                    ):
                        p.copy_(now + factor * (now - before) if s else now)
            with torch.no_grad():
                h.append(block(h[k], batch))
        group = [i for i in range(total) if u[i] == u[n]]
        gradient = None
        for k in reversed(range(K)):
            block = w[k][u[n]]
            x = tuple(t.detach().clone().requires_grad_(k > 0) for t in h[k])
            out = block(x, batch)
            if k == K - 1:
                losses.append(out[0].item())
                (out[0] * (1.0 if is_counted else 1.0 / len(group))).backward()
            else:
                torch.autograd.backward(out, gradient)
            gradient = tuple(t.grad for t in x)
        if tied:
            copied, owned = tied[0](w[0][u[n]]), tied[1](w[-1][u[n]])
            late[n], copied.grad = copied.grad, None
            drained_next = n + 1 in (*drains, total)
            for i in sorted(late):
                if i + m[0] <= n or drained_next:
                    owned.grad += late.pop(i)
        if n != group[-1]:
            continue
        norms[n] = [
            sum((p.grad**2).sum().item() for p in w[k][u[n]].parameters() if p.grad is not None) for k in range(K)
        ]
        old = [e for e in norms if e <= n - 1 - m[0]]
        for k in range(K):
            norm = math.sqrt(sum(norms[max(old)]) if lagged and old else norms[n][k])
            new = copy.deepcopy(w[k][u[n]])
            for p, before in zip(new.parameters(), w[k][u[n]].parameters(), strict=True):
                if before.grad is not None:
                    p.grad = before.grad * min(1.0, max_norm / (norm + 1e-6)) if max_norm else before.grad.clone()
            optimizer = optimizers[k](new.parameters())
            if opt_state[k] is not None:
                optimizer.load_state_dict(opt_state[k])
            optimizer.step()
            opt_state[k] = copy.deepcopy(optimizer.state_dict())
            optimizer.zero_grad()
            w[k].append(new)
        if tied:
            with torch.no_grad():
                tied[0](w[0][-1]).copy_(tied[1](w[-1][-1]))
    return [versions[-1] for versions in w], losses
