"""The messages between a copy of a weight in the first block and its owner in the last; the rule is in `tied`."""

from collections import deque

import torch
from torch import nn

from hf_mlopt.pipeline.schedule import Schedule, Updates
from hf_mlopt.pipeline.tied import add_to_owner, gradient_of_copy, owner_weight, refresh_copy
from hf_mlopt.pipeline.transport.base import Channels


class TiedExchange:
    """
    Sends every gradient of the copy to the owner, and the owner's weight back.

    Args:
        block (`nn.Module`): The first or the last block, with the names of copy and owner in `block.tied`.
        index (`int`): Its stage.
        schedule ([`Schedule`]): Whose m_0 is the lag of the gradients.
        channels ([`Channels`]): With `tied_in` and `tied_out`.
        refresh_every (`int`): Updates between two refreshes of the copy, r.
    """

    def __init__(self, block: nn.Module, index: int, schedule: Schedule, channels: Channels, refresh_every: int = 1):
        self.block, self.is_owner, self.lag = block, index > 0, schedule.m[0]
        self.channels, self.refresh_every = channels, refresh_every
        self.pending: deque[tuple[int, torch.Tensor]] = deque()  # weights that came before a stop

    def after_backward(self, n: int, updates: Updates, end: int) -> None:
        """
        Args:
            n (`int`): The batch that was back-propagated.
            updates ([`Updates`]): Knows the last drain.
            end (`int`): Batch before which the pipeline is emptied next.
        """
        if not self.is_owner:
            self.channels.tied_out.put(n, (gradient_of_copy(self.block),), {})
            return
        last = n if n + 1 == end else n - self.lag
        for late in range(max(updates.drained(n), n - self.lag), last + 1):
            (gradient,), _ = self.channels.tied_in.get(late)
            add_to_owner(self.block, gradient)

    def after_update(self, version: int, is_last: bool) -> None:
        """
        Args:
            version (`int`): Updates of the block so far.
            is_last (`bool`): Whether the pipeline is emptied after this update.
        """
        if version % self.refresh_every and not is_last:
            return
        if self.is_owner:
            self.channels.tied_out.put(version, (owner_weight(self.block),), {})
        elif self.pending:
            refresh_copy(self.block, self.pending.popleft()[1])
        else:
            refresh_copy(self.block, self.channels.tied_in.get(version)[0][0])

    def after_late_drain(self, end: int, updates: Updates) -> None:
        """
        The pipeline was emptied after batch `end - 1` without notice: the owner's next update takes what is late.

        Args:
            end (`int`): The batch after the last.
            updates ([`Updates`]): Knows the drain before.
        """
        for late in range(max(updates.drained(end - 1), end - self.lag), end) if self.is_owner else ():
            (gradient,), _ = self.channels.tied_in.get(late)
            add_to_owner(self.block, gradient)

    def collect(self, done: int, sent: int) -> None:
        """
        At a stop, takes what the owner is ahead by out of the channel.

        Args:
            done, sent (`int`): Updates of the first and of the last block.
        """
        first = self.pending[-1][0] if self.pending else done
        if not self.is_owner:
            for version in range(first + 1, sent + 1):
                if version % self.refresh_every == 0:
                    self.pending.append((version, self.channels.tied_in.get(version)[0][0]))
