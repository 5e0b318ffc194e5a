"""
Targets computed once and read from disk, so that no teacher stands beside the student.

    DIRECTORY/
        manifest.json           teacher, data set, shapes, dtype
        <digest>.safetensors    one row: `LAYER.experts` [tokens, top-k], `LAYER.outputs` [tokens, top-k, hidden]

The name of a row is a digest of its token ids, by which a batch finds what belongs to it, however it was shuffled and
padded, with no column that collator and Trainer would have to keep.
"""

# B batch   S sequence   T tokens = B * S   H hidden   K experts per token   N tokens of one row, without padding

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_mlopt import __version__
from hf_mlopt.distillation.compatibility import differences, sizes
from hf_mlopt.distillation.teacher import ModelTeacher, Targets
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub.output import check_output, unfinished_directory
from hf_mlopt.hub.provenance import model_provenance
from hf_mlopt.hub.shards import write_errors
from hf_mlopt.moe import MoELayer, moe_layers
from hf_mlopt.streaming.journal import begin_run, write_json


logger = logging.get_logger(__name__)

_FORMAT = 1
_MANIFEST = "manifest.json"
_DTYPES = ("float32", "bfloat16")
_LAYERS = "mixture-of-experts layers at"  # key of `sizes`


def plan_targets(
    teacher: nn.Module,
    dataset: Iterable[dict],
    directory: str | Path,
    *,
    dtype: str | None = None,
    resume: bool = False,
) -> str:
    """
    What [`store_targets`] would write, refused if it cannot be written.

    Args:
        teacher (`nn.Module`): Its model; may live on the meta device.
        dataset, directory, dtype, resume: As for [`store_targets`].

    Returns:
        `str`: The size on disk in words.
    """
    return _plan(teacher, _rows(dataset), directory, dtype, resume)[1]


def store_targets(
    teacher: PreTrainedModel,
    dataset: Iterable[dict],
    directory: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    resume: bool = False,
) -> "StoredTargets":
    """
    Runs a teacher once over every row of a data set and writes what its experts made of the tokens.

    A token takes layers x top-k x (hidden x bytes of `dtype` + 1): a row of 2048 tokens of Mixtral-8x7B 1.07 GB in
    bfloat16. Rows are run one at a time, so that they do not depend on one another.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): With fused experts, where it is to run.
        dataset (`Iterable[dict]`): Rows with `input_ids`, and `attention_mask` if they are padded: all that will be
            trained and evaluated on. Equal rows are stored once.
        directory (`str` or `Path`): To be written; absent or empty. It appears when all rows are there.
        dtype (`str`, *optional*): `float32` or `bfloat16`; by default that of the teacher.
        revision (`str`, *optional*): Commit of the teacher, for the record.
        resume (`bool`, *optional*, defaults to `False`): Go on with a run that was interrupted.

    Returns:
        [`StoredTargets`]: To be given to a trainer in place of a teacher.

    Raises:
        InputError: If the disk is too small, the directory holds something, an unfinished run is another one, or an
            output is not finite.
    """
    rows = _rows(dataset)
    output, size = _plan(teacher, rows, directory, dtype, resume)
    logger.info(size)
    manifest = _manifest(teacher, rows, dtype, revision)
    unfinished = unfinished_directory(output)
    lock = begin_run(unfinished, manifest, resume, parts=("targets",))
    try:
        _store_rows(ModelTeacher(teacher), rows, unfinished / "targets", getattr(torch, manifest["dtype"]))
        write_json(unfinished / "targets" / _MANIFEST, manifest)
        with write_errors(output):
            if output.is_dir():
                output.rmdir()  # it is empty, and rename replaces no directory on some systems
            os.replace(unfinished / "targets", output)
            shutil.rmtree(unfinished)
    except InputError:
        if not any((unfinished / "targets").glob("*.safetensors")):
            shutil.rmtree(unfinished)  # nothing to go on with, and in the way of a corrected run
        raise
    finally:
        os.close(lock)
    return StoredTargets(output)


class StoredTargets:
    """
    Reads what [`store_targets`] wrote; a trainer takes it as `teacher`.

    Args:
        directory (`str` or `Path`): Where it was written.

    Raises:
        InputError: If nothing complete is there.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser().resolve()
        manifest = self.directory / _MANIFEST
        if not manifest.is_file():
            unfinished = unfinished_directory(self.directory).is_dir()
            state = "is not finished; store it with resume first" if unfinished else "holds no stored targets"
            raise InputError(f"teacher targets {str(directory)!r}: {state}")
        self.manifest = json.loads(manifest.read_text(encoding="utf-8"))
        if self.manifest["format"] != _FORMAT:
            raise InputError(
                f"teacher targets {str(directory)!r}: format {self.manifest['format']} is not understood, only "
                f"{_FORMAT}; store them anew"
            )

    def check(self, student: nn.Module, datasets: dict[str, Iterable[dict] | None]) -> None:
        """
        Refuses, before training, a student or data that these targets are not for.

        Args:
            student (`nn.Module`): The model to be trained.
            datasets (`dict`): By name. Rows of streamed ones cannot be looked up before they come.

        Raises:
            InputError: If shapes differ (all are named) or rows are not held.
        """
        if differing := differences(sizes(student), self.manifest["sizes"]):
            raise InputError(
                f"teacher targets {str(self.directory)!r}: do not fit the student, which have {differing}. Store "
                "those of the model that the student was pruned from"
            )
        for name, dataset in datasets.items():
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                self._check_rows(name, part)

    def _check_rows(self, name: str, dataset: Iterable[dict] | None) -> None:
        if not isinstance(dataset, Sized) or "input_ids" not in next(iter(dataset), {}):
            return
        missing = [number for number, row in enumerate(dataset) if not self._file(_ids(row)).is_file()]
        if missing:
            raise InputError(
                f"{name}: {len(missing)} of its {len(dataset)} rows, row {missing[0]} first, are not among the "
                f"{self.manifest['rows']} of teacher targets {str(self.directory)!r}; store those of all rows that "
                "are trained and evaluated on"
            )

    def targets(self, inputs: dict) -> Targets:
        """
        Reads the rows of a batch. Padding is given expert 0 and zeros, which no loss counts.

        Args:
            inputs (`dict`): `input_ids` and, where there is padding, `attention_mask`, `[batch, sequence]`.

        Raises:
            InputError: If a row is not held.
        """
        ids_BS, mask_BS = inputs["input_ids"], inputs.get("attention_mask")
        mask_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        rows = [self._row(ids_S[mask_S]) for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True) if mask_S.any()]
        targets, mask_T = Targets(), mask_BS.reshape(-1)
        for layer in self.manifest["sizes"][_LAYERS]:
            index_TK = _padded([row[f"{layer}.experts"] for row in rows], mask_T)
            targets.index_TK[layer] = index_TK.long()
            targets.output_TKH[layer] = _padded([row[f"{layer}.outputs"] for row in rows], mask_T)
        return targets

    def _row(self, ids_N: torch.Tensor) -> dict[str, torch.Tensor]:
        file = self._file(ids_N)
        if not file.is_file():
            raise InputError(
                f"a row of {len(ids_N)} tokens, {ids_N[:8].tolist()} first, is not among the {self.manifest['rows']} "
                f"of teacher targets {str(self.directory)!r}; store rows of token ids as the collator makes them"
            )
        return load_file(file)

    def _file(self, ids_N: torch.Tensor) -> Path:
        return self.directory / _file_name(ids_N)


def _padded(parts: list[torch.Tensor], mask_T: torch.Tensor) -> torch.Tensor:
    """Tokens of all rows in their places in a batch, zeros in the others."""
    tokens = torch.cat(parts).to(mask_T.device)
    padded = tokens.new_zeros(len(mask_T), *tokens.shape[1:])
    padded[mask_T] = tokens
    return padded


def _rows(dataset: Iterable[dict]) -> dict[str, torch.Tensor]:
    """
    Token ids of every row by the name of its file. Held in memory: targets are thousands of times larger.
    """
    rows = {_file_name(ids): ids for ids in map(_ids, dataset) if len(ids)}
    if not rows:
        raise InputError("dataset: has no rows to store targets of")
    return rows


def _ids(row: dict) -> torch.Tensor:
    """Token ids of a row, `[tokens]`, without padding."""
    if "input_ids" not in row:
        raise InputError(f"dataset: needs a column 'input_ids', not only {sorted(row)}; tokenize it first")
    ids, mask = torch.as_tensor(row["input_ids"]), row.get("attention_mask")
    return ids if mask is None else ids[torch.as_tensor(mask).bool()]


def _file_name(ids_N: torch.Tensor) -> str:
    return hashlib.blake2b(ids_N.cpu().numpy().astype("<i8").tobytes(), digest_size=16).hexdigest() + ".safetensors"


def _plan(teacher: nn.Module, rows: dict, directory: str | Path, dtype: str | None, resume: bool) -> tuple[Path, str]:
    """The directory as an absolute path, which can be written, and in words what will be."""
    if dtype not in (None, *_DTYPES):
        raise ConfigurationError("dtype", dtype, f"must be one of {', '.join(_DTYPES)}")
    layers, dtype = moe_layers(teacher), _dtype(teacher, dtype)
    unfinished = unfinished_directory(Path(directory).expanduser().resolve()) / "targets"
    left = [ids for name, ids in rows.items() if not (resume and (unfinished / name).is_file())]
    output = check_output(directory, _bytes(layers, sum(map(len, left)), dtype))
    layer, tokens = layers[0], sum(map(len, rows.values()))
    hidden, itemsize = _hidden_size(layer), getattr(torch, dtype).itemsize
    per_slot = f"({hidden} x {itemsize} + {_index_dtype(layer).itemsize})"
    size = f"targets of {len(rows)} rows: {tokens} tokens x {len(layers)} layers x {layer.top_k} experts x {per_slot}"
    total = _bytes(layers, tokens, dtype)
    size += f" bytes = {total:,} bytes ({total / 1e9:.2f} GB) in {output}"
    return output, size + (f", of which {len(rows) - len(left)} rows are there" if resume else "")


def _manifest(teacher: PreTrainedModel, rows: dict, dtype: str | None, revision: str | None) -> dict:
    """What the targets are of. A run is gone on with only by an equal one."""
    layers, dtype, tokens = moe_layers(teacher), _dtype(teacher, dtype), sum(map(len, rows.values()))
    sample = torch.stack([layer.weight(0, "down_proj")[0].detach().float().cpu() for layer in layers])
    return {
        "format": _FORMAT,
        # One row of weights a layer tells another fine-tune of the same shape.
        "teacher": model_provenance(teacher, revision) | {"sample": hashlib.sha256(sample.numpy()).hexdigest()},
        "sizes": sizes(teacher),
        "rows": len(rows),
        "tokens": tokens,
        "fingerprint": hashlib.sha256("".join(sorted(rows)).encode()).hexdigest(),
        "dtype": dtype,
        "bytes": _bytes(layers, tokens, dtype),
        "versions": {"hf_mlopt": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _store_rows(teacher: ModelTeacher, rows: dict, directory: Path, dtype: torch.dtype) -> None:
    for name, ids_N in tqdm(rows.items(), desc="targets", unit="row", leave=False, disable=None):
        if (directory / name).is_file():
            continue
        targets = teacher.targets({"input_ids": ids_N.unsqueeze(0).to(teacher.model.device)})
        tensors = dict(_tensors(targets, teacher.layers, dtype))
        unfinished = directory / f"{name}.unfinished"
        with write_errors(directory):
            with open(unfinished, "wb") as stream:
                stream.write(save(tensors))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(unfinished, directory / name)


def _tensors(targets: Targets, layers: list[MoELayer], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in layers:
        outputs_NKH = targets.output_TKH[layer.index].to(dtype)
        if not outputs_NKH.isfinite().all():
            raise InputError(f"teacher: {layer.name} gives outputs that are not finite; nothing can learn from them")
        yield f"{layer.index}.experts", targets.index_TK[layer.index].to(_index_dtype(layer)).cpu().contiguous()
        yield f"{layer.index}.outputs", outputs_NKH.cpu().contiguous()


def _dtype(teacher: nn.Module, dtype: str | None) -> str:
    return dtype or str(teacher.dtype).removeprefix("torch.")


def _bytes(layers: list[MoELayer], num_tokens: int, dtype: str) -> int:
    itemsize = getattr(torch, dtype).itemsize
    slots = [layer.top_k * (_hidden_size(layer) * itemsize + _index_dtype(layer).itemsize) for layer in layers]
    return num_tokens * sum(slots)


def _hidden_size(layer: MoELayer) -> int:
    return layer.weight(0, "down_proj").shape[0]


def _index_dtype(layer: MoELayer) -> torch.dtype:
    return torch.uint8 if layer.num_experts <= 256 else torch.int16
