"""Token ids as rows that a Trainer takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_mlopt.errors import ConfigurationError, InputError


if TYPE_CHECKING:
    import datasets
    import torch


def token_windows(token_ids: "torch.Tensor | Sequence[int]", length: int) -> "datasets.Dataset":
    """
    Cuts a text into consecutive windows that share no token; what is left at the end is dropped.

    Args:
        token_ids (`torch.Tensor` or `Sequence[int]`): `[tokens]`.
        length (`int`): Tokens in a window.

    Returns:
        [`~datasets.Dataset`]: As [`window_dataset`].

    Raises:
        ConfigurationError: If `length` is below 2: a causal model has nothing to predict in a window of one.
        InputError: If there is less than one window.
    """
    import torch

    if length < 2:
        raise ConfigurationError("length", length, "must be at least 2 tokens: the first one is not predicted")
    tokens = torch.as_tensor(token_ids, dtype=torch.long)
    if len(tokens) < length:
        raise InputError(
            f"{len(tokens)} tokens of text, less than one window of {length}: shorten it or give more text"
        )
    return window_dataset(tokens[: len(tokens) // length * length].view(-1, length))


def window_dataset(windows: "torch.LongTensor") -> "datasets.Dataset":
    """
    Windows as rows for a causal language model, which shifts the labels itself.

    Args:
        windows (`torch.LongTensor`): `[windows, length]`.

    Returns:
        [`~datasets.Dataset`]: Columns `input_ids` and `labels`, the same tokens.
    """
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": windows.numpy(), "labels": windows.numpy()})
