"""Calibration data as batches of token ids, without padding."""

from collections.abc import Iterable
from itertools import groupby

import torch

from hf_mlopt.errors import InputError


def as_batches(calibration, batch_size: int, config) -> list[torch.Tensor]:
    """
    Groups calibration sequences of equal length, so that no batch needs padding and no padding token is ever counted.

    Args:
        calibration: A LongTensor `[samples, length]`, a list of token lists, or rows with `input_ids` and optionally
            `attention_mask` (a `datasets` object); what the mask excludes is left out.
        batch_size (`int`): Sequences per batch.
        config: The model's configuration; gives vocabulary size and special tokens.

    Returns:
        `list[torch.Tensor]`: LongTensors `[batch, length]`, longest last.

    Raises:
        InputError: If there is nothing to calibrate on, an id is outside the vocabulary, or a sequence holds padding
            tokens that no attention mask excludes.
    """
    sequences = [_as_ids(row, number) for number, row in enumerate(_rows(calibration))]
    sequences = [ids for ids in sequences if len(ids)]
    if not sequences:
        raise InputError("calibration is empty: give at least one sequence of token ids.")
    largest, smallest = max(int(ids.max()) for ids in sequences), min(int(ids.min()) for ids in sequences)
    if smallest < 0 or largest >= config.vocab_size:
        raise InputError(
            f"calibration holds token id {largest if smallest >= 0 else smallest}, outside the model's vocabulary of "
            f"{config.vocab_size}: was it made with another tokenizer?"
        )
    _refuse_padding(sequences, config)
    sequences.sort(key=len)
    batches = []
    for _, same_length in groupby(sequences, key=len):
        stacked = torch.stack(list(same_length))
        batches.extend(stacked.split(batch_size))
    return batches


def _rows(calibration) -> Iterable:
    if isinstance(calibration, torch.Tensor):
        if calibration.ndim != 2 or not _is_integral(calibration):
            raise InputError(
                f"calibration is a {calibration.dtype} tensor of shape {tuple(calibration.shape)}; give token ids as "
                "a LongTensor [samples, length]."
            )
        return calibration
    if isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise InputError(
            f"calibration is a {type(calibration).__name__}; give token ids (a LongTensor, token lists, or a data set "
            "with input_ids). Text is read by hf_mlopt.data.load_calibration."
        )
    columns = getattr(calibration, "column_names", None)
    if columns is not None and "input_ids" not in columns:
        raise InputError(f"calibration has the columns {columns}; it needs input_ids.")
    return calibration


def _as_ids(row, number: int) -> torch.Tensor:
    if isinstance(row, dict) and "input_ids" not in row:
        raise InputError(f"calibration sequence {number} has the keys {sorted(row)}; it needs input_ids.")
    ids, mask = (row["input_ids"], row.get("attention_mask")) if isinstance(row, dict) else (row, None)
    try:
        ids = torch.as_tensor(ids)
        empty = ids.numel() == 0
        if not empty and (ids.ndim != 1 or not _is_integral(ids)):
            raise TypeError(f"{ids.dtype} of shape {tuple(ids.shape)}")
    except (TypeError, ValueError) as error:
        raise InputError(f"calibration sequence {number} is not a list of token ids ({error}).") from None
    ids = ids.long().cpu().flatten()
    if mask is None:
        return ids
    mask = torch.as_tensor(mask).cpu().bool()
    if mask.shape != ids.shape:
        raise InputError(
            f"calibration sequence {number} has {len(ids)} input_ids and an attention_mask of shape "
            f"{tuple(mask.shape)}; give one entry per token."
        )
    return ids[mask]


def _is_integral(values: torch.Tensor) -> bool:
    return not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool)


def _refuse_padding(sequences: list[torch.Tensor], config) -> None:
    pad, others = getattr(config, "pad_token_id", None), set()
    for key in ("eos_token_id", "bos_token_id"):
        value = getattr(config, key, None)
        others.update(value if isinstance(value, list) else [value])
    if pad is None or pad in others:
        return  # the id also stands for something real, so its presence tells nothing
    for number, ids in enumerate(sequences):
        if bool((ids == pad).any()):
            raise InputError(
                f"calibration sequence {number} holds the padding token {pad}; give an attention_mask that excludes "
                "it, or sequences without padding."
            )
