"""Means over ranks of several nodes: plain inside a node, where links are fast, coded between nodes."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hf_mlopt.communication.collectives import (
    Exchange,
    Key,
    gather_messages,
    send_to_owners,
    shard_bounds,
    two_phase_mean,
)
from hf_mlopt.communication.quantizers import Cast, Codec
from hf_mlopt.errors import ConfigurationError


@dataclass(frozen=True)
class NodeGroups:
    """
    Args:
        inside (`ProcessGroup`): The ranks of this node.
        across (`ProcessGroup`): The rank of every node that has the same place in it.
    """

    inside: object
    across: object


@dataclass
class NodeExchange(Exchange):
    """
    Args:
        bytes_across (`int`): Of `bytes_sent`, those that left the node.
    """

    bytes_across: int = 0


def node_groups(ranks_per_node: int | None = None, group=None, **options) -> NodeGroups:
    """
    The groups of [`hierarchical_mean`]; all ranks make all of them.

    Args:
        ranks_per_node (`int`, *optional*): Ranks of a node, which follow one another, as `torchrun` and
            `accelerate launch` number them; by default their `LOCAL_WORLD_SIZE`.
        group (`ProcessGroup`, *optional*): What they are taken from; by default all ranks.
        options: Of `torch.distributed.new_group`, such as `timeout`.

    Raises:
        ConfigurationError: If the nodes are not of this size, or there is only one.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    size = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if size < 1 or len(ranks) % size or len(ranks) == size:
        allowed = f"must divide the {len(ranks)} ranks into at least two nodes; take another collective for one node"
        raise ConfigurationError("ranks_per_node", size, allowed)
    nodes = [ranks[first : first + size] for first in range(0, len(ranks), size)]
    found = {}
    for kind, parts in (("inside", nodes), ("across", list(zip(*nodes, strict=True)))):
        for part in parts:
            made = dist.new_group(list(part), **options)
            if dist.get_rank() in part:
                found[kind] = made
    return NodeGroups(**found)


def hierarchical_mean(
    flat: torch.Tensor,
    up: Codec,
    down: Codec,
    key: Key,
    groups: NodeGroups,
    want_sent: bool,
    down_residual: torch.Tensor | None = None,
    inside: Codec | None = None,
) -> NodeExchange:
    """
    Every rank averages a slice of the vector over its node, exchanges that with the ranks of other nodes that own the
    same slice, coded, in two phases, and hands the mean to its node in float32. All ranks end with the same bits.

    Between nodes a slice travels as little as it can: of n vectors on m nodes, (m-1)/m of one coded vector leaves a
    node on the way up, and as much on the way down.

    Args:
        flat (`torch.Tensor`): `[numel]`, float32.
        up (`Codec`), down (`Codec`): How parts and means travel between nodes.
        key (`Callable`): Of the random numbers; phase and a number that is another one for every message.
        groups (`NodeGroups`): From [`node_groups`].
        want_sent (`bool`): Whether to return `sent`. What a slice has lost on its way to other nodes is kept by its
            owner alone, so `flat - sent` is there the error of the node times its ranks, whose mean over the ranks is
            right; elsewhere it is what `inside` has lost.
        down_residual (`torch.Tensor`, *optional*): `[numel]`, of which this rank's shard of its slice holds what it
            lost before; `down_error` is what was lost now.
        inside (`Codec`, *optional*): How vectors travel to their node's owners: `Cast(format="bf16")`, or float32 by
            default.
    """
    inside = inside or Cast()
    rank, size = dist.get_rank(groups.inside), dist.get_world_size(groups.inside)
    nodes = dist.get_world_size(groups.across)
    bounds = shard_bounds(flat.numel(), size, getattr(up, "block", 1))
    begin, end = bounds[rank]
    payloads = [inside.encode(flat[first:last], key(2, rank)) for first, last in bounds]
    messages = [inside.to_bytes(payload) for payload in payloads]
    mean = torch.zeros(end - begin, dtype=torch.float32, device=flat.device)
    for message in send_to_owners(messages, inside.wire_bytes(end - begin), groups.inside):
        inside.decode(inside.from_bytes(message, end - begin), mean, accumulate=True)
    mean.div_(size)

    def key_of_slice(phase: int, number: int) -> tuple[int, ...]:
        return key(phase, number + rank * nodes * nodes)

    own_residual = None if down_residual is None else down_residual[begin:end]
    across = two_phase_mean(mean, up, down, key_of_slice, groups.across, want_sent, own_residual)
    sent = None
    if want_sent:
        sent = torch.empty_like(flat)
        for payload, (first, last) in zip(payloads, bounds, strict=True):
            inside.decode(payload, sent[first:last])
        sent[begin:end].sub_(mean.sub_(across.sent), alpha=size)
    error = None
    if down_residual is not None:
        error = torch.zeros_like(flat)
        error[begin:end] = across.down_error
    whole = Cast()
    message = whole.to_bytes(whole.encode(across.mean))
    sizes = [whole.wire_bytes(last - first) for first, last in bounds]
    gathered = gather_messages(message, sizes, groups.inside)
    result = torch.empty_like(flat)
    for other, (first, last) in zip(gathered, bounds, strict=True):
        whole.decode(whole.from_bytes(other, last - first), result[first:last])
    within = sum(map(len, messages)) - len(messages[rank]) + max(sizes) * (size - 1)
    return NodeExchange(result, sent, across.bytes_sent + within, error, across.down_norm, across.bytes_sent)
