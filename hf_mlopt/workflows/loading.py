"""Loading models and tokenizers with errors a user can act on."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import TYPE_CHECKING

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import Checkpoint, hub_errors
from hf_mlopt.hub.checkpoint import mismatch_errors


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes, as torch allocates


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a checkpoint, or None where it has none."""
    from transformers import AutoTokenizer

    if not any(checkpoint.directory.glob("tokenizer*")) and not any(checkpoint.directory.glob("vocab*")):
        return None
    try:
        with hub_errors(checkpoint.name):
            return AutoTokenizer.from_pretrained(
                checkpoint.name, revision=checkpoint.revision, trust_remote_code=trust_remote_code
            )
    except InputError:
        raise
    except ValueError as error:  # broken JSON, custom code
        raise InputError(
            f"model={checkpoint.name!r}: its tokenizer cannot be read: {shorten(str(error), 600)}"
        ) from None


@contextmanager
def architecture_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns what goes wrong when a model is made from a configuration into one line."""
    from huggingface_hub.errors import StrictDataclassError

    with hub_errors(checkpoint.name):
        try:
            yield
        except InputError:
            raise
        except (ValueError, StrictDataclassError) as error:  # unknown architecture, custom code, ill-typed field
            raise InputError(f"model={checkpoint.name!r}: {shorten(str(error), 600)}") from None


def build_skeleton(checkpoint: Checkpoint, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of a checkpoint without weights, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_mlopt.models  # noqa: F401  makes `word_lm` known

    with architecture_errors(checkpoint):
        config = AutoConfig.from_pretrained(
            checkpoint.name, revision=checkpoint.revision, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_model(
    checkpoint: Checkpoint, trust_remote_code: bool = False, device_map: str | None = None
) -> "PreTrainedModel":
    """The model of a checkpoint, in its stored dtype and evaluation mode, on the CPU or where `device_map` says."""
    from transformers import AutoModelForCausalLM

    import hf_mlopt.models  # noqa: F401  makes `word_lm` known

    with hub_errors(checkpoint.name), mismatch_errors(checkpoint.name):
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.name,
            revision=checkpoint.revision,
            dtype="auto",
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # transformers' own error does not name the tensor
        )
    # What is not in the files would be random.
    absent = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if absent:
        raise InputError(
            f"model={checkpoint.name!r}: {len(absent)} tensors are missing in its weight files or have another shape "
            f"than its config.json says, {absent[0]} first; download it again"
        )
    for parameter in model.parameters():
        # The last bit of a matrix product depends on where its factors begin, and a mapped file begins anywhere.
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model.eval()


def context_length(config) -> int | None:
    """Tokens the model was made for, where its configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def choose_device(device: str, needed_bytes: int = 0) -> "torch.device":
    """The device a user asked for; `auto` is the first GPU, or the CPU if there is none or it has too little room."""
    import torch

    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        free, _ = torch.cuda.mem_get_info()
        if needed_bytes < 0.9 * free:
            return torch.device("cuda")
        logger.warning(f"{needed_bytes / 1e9:.0f} GB do not fit the GPU ({free / 1e9:.0f} GB free): using the CPU.")
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ConfigurationError("device", device, "must be auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError("device", device, f"this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen


@contextmanager
def launched_processes(device: str) -> "Iterator[torch.device | None]":
    """
    Joins the processes that `accelerate launch` or `torchrun` has started.

    Args:
        device (`str`): As the user asked for.

    Returns:
        `Iterator[torch.device]`: The device of this process; None if it is the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    try:
        yield state.device
    finally:
        state.destroy_process_group()
