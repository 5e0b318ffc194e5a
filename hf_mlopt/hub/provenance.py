"""Where a model came from and what it was changed with."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import hf_mlopt


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def environment() -> dict:
    """
    Versions and hardware that numbers depend on.

    Returns:
        `dict`: `python`, `torch`, `transformers` and `hf_mlopt` versions, and `machine` in words, for example
            `"1 x NVIDIA H100 80GB HBM3, 16 CPU cores"`.
    """
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "hf_mlopt": hf_mlopt.__version__,
        "machine": ", ".join([*machine, f"{os.cpu_count()} CPU cores"]),
    }


def is_local_name(model: str) -> bool:
    """Whether a name can only mean a directory, because it is one or does not have the form `organisation/model`."""
    path = Path(model).expanduser()
    return path.is_dir() or path.is_absolute() or model.count("/") > 1 or model.startswith((".", "~"))


def shown_name(name: str) -> str:
    """A Hub id as it is; of a directory or file only the last part, without where it lies on this machine."""
    path = Path(name).expanduser()
    return path.resolve().name if is_local_name(name) or path.exists() else name


def model_provenance(model: "PreTrainedModel", revision: str | None = None) -> dict:
    """
    Names the source of a model without giving away where it lay on this machine.

    Args:
        model ([`~transformers.PreTrainedModel`]): Any model.
        revision (`str`, *optional*): Commit on the Hub it was loaded from, which the model itself does not know; see
            [`resolve_checkpoint`].

    Returns:
        `dict`: `source` is a Hub id, the bare name of a directory, or `None` for a model made from a configuration;
            `revision` as given. `model_type`, `dtype` and the number of `parameters` follow, and `derived_from` if the
            source itself carries an `hf_mlopt` record.
    """
    config = model.config
    name = config.name_or_path
    record = {
        "source": (Path(name).name if is_local_name(name) else name) or None,
        "revision": revision,
        "model_type": config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
    }
    earlier = getattr(config, "hf_mlopt", None)
    return record | ({"derived_from": earlier} if earlier else {})
