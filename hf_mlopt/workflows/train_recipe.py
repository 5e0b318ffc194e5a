"""The recipe of `hf-mlopt train`, and what is refused as soon as it is read."""

import math
import os
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline import PipelineTrainingArguments
from hf_mlopt.training.optimizer_table import optimizer_cls_and_kwargs
from hf_mlopt.workflows.launch import check_num_processes, launched
from hf_mlopt.workflows.train_data import TRAINED_TOKENIZERS, is_image_source
from hf_mlopt.workflows.train_model import check_model_type


_TEXT_ONLY = ("tokenizer", "vocab_size")
# Of the machine or the occasion, not of the recipe; or secret.
_NOT_WRITTEN = ("output_dir", "resume_from_checkpoint", "hub_token", "local_rank", "num_processes")


@dataclass(repr=False)  # the inherited one keeps tokens out of logs
class TrainRecipe(PipelineTrainingArguments):
    """
    Everything one run of `hf-mlopt train` is given; the keys of a recipe. All fields of `TrainingArguments` are among
    them; evaluation is once an epoch and a log line every 10 steps unless they say otherwise.

    Args:
        task (`str`, *optional*, defaults to `"causal-lm"`): `causal-lm` or `image-classification`.
        model (`str`, *optional*): Local directory or Hub id of a checkpoint to go on from.
        model_type (`str`, *optional*): Architecture to train from random weights instead: `word_lm`, the LSTM of
            pytorch/examples and the default for text, or any of transformers.
        model_config (`dict`, *optional*): Fields of its configuration that differ from the defaults:
            `{"n_layer": 4}`. Vocabulary, special tokens, labels and image size come from the data.
        tokenizer (`str`, *optional*): `byte-bpe` or `words`, trained on the training text, or a local directory or
            Hub id. By default that of `model`, else `byte-bpe`.
        vocab_size (`int`, *optional*): Entries of a tokenizer that is trained; by default 2048 of `byte-bpe`, and all
            `words`.
        dataset (`str`, *optional*): Text: `embedded` (no network; the default), a local .txt, .jsonl or .parquet file,
            or a data set on the Hub. Images: `digits` (the default), an .npz file, `file.npz:name`, or a folder with a
            folder for each class.
        eval_dataset (`str`, *optional*): What to evaluate on. By default the test split of `dataset`; of a text file
            the last tenth.
        sequence_length (`int`, *optional*, defaults to 128): Tokens in a window of text.
        image_size (`int`, *optional*): Pixels on a side that images are resized to.
        plot (`str` or `bool`, *optional*, defaults to `True`): PNG to draw the course of the run to; `true` is
            `curves.png` in `output_dir`.
        similarity (`float`, *optional*): Makes every process a silo with images of its own: this part of them is dealt
            at random, the rest in the order of their labels. 1 is i.i.d., 0 gives each process few labels.
        num_processes (`int`, *optional*): Processes to train in, a GPU each, or with `use_cpu` on the cores of this
            machine. With `pipeline`, by default one for each of the `stages`.
        resume_from_checkpoint (`str` or `bool`, *optional*): Training checkpoint to go on from; `true` is the last one
            in `output_dir`.
        eval_strategy (`str`, *optional*, defaults to `"epoch"`): When to evaluate: `no`, `steps` or `epoch`.
        logging_steps (`float`, *optional*, defaults to 10): Steps between two log lines.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`): Whether several processes look for
            weights that a step has left out; a model that leaves some out says that it needs this.
    """

    task: Literal["causal-lm", "image-classification"] = "causal-lm"
    model: str | None = None
    model_type: str | None = None
    model_config: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    sequence_length: int = 128
    image_size: int | None = None
    plot: str | bool = True
    similarity: float | None = None
    num_processes: int | None = None
    resume_from_checkpoint: str | bool | None = None
    eval_strategy: str = "epoch"
    logging_steps: float = 10
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        # Before TrainingArguments puts in what it derives.
        self.given = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _NOT_WRITTEN and getattr(self, field.name) != default_of(field)
        }
        check_numbers(self)
        if self.max_steps < 1 and not self.num_train_epochs > 0:
            raise ConfigurationError("num_train_epochs", self.num_train_epochs, "must be above 0, or set max_steps")
        check_model(self)
        _check_data(self)
        if self.plot not in (True, False) and Path(self.plot).suffix != ".png":
            raise ConfigurationError("plot", self.plot, "must end in .png, or be true or false")
        # accelerate 1.15 has the processes of a machine without GPUs find one another only where this is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.pipeline is not None and self.num_processes is None and not launched():
            if self.stages is None:
                raise ConfigurationError("stages", None, "is needed with pipeline, where no launcher has started them")
            self.num_processes = self.stages
        check_num_processes(self.num_processes, self.use_cpu)
        super().__post_init__()
        if launched() and self.world_size != int(os.environ["WORLD_SIZE"]):
            raise ConfigurationError(
                "num_processes",
                int(os.environ["WORLD_SIZE"]),
                f"were started, {self.world_size} have found one another",
            )
        refuse_bad_optimizer(self)

    @property
    def processes(self) -> int:
        """Those that train, also before they are started."""
        return self.world_size if launched() else self.num_processes or self.world_size


def default_of(field: Field):
    """What a field of a dataclass is where nothing is given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def check_numbers(recipe) -> None:
    """Refuses numbers of a recipe, of this verb or a related one, that are out of range."""
    for name, least in (
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("sequence_length", 2),
        ("image_size", 1),
        ("vocab_size", 1),
        ("learning_rate", 0),
        ("weight_decay", 0),
        ("seed", 0),
    ):
        value = getattr(recipe, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigurationError(name, value, f"must be at least {least} and finite")


def check_model(recipe) -> None:
    """Refuses what does not name one model; a language model that is not named is `word_lm`."""
    if recipe.model:
        for name in ("model_type", "model_config"):
            if getattr(recipe, name) is not None:
                raise ConfigurationError(
                    name, getattr(recipe, name), "is for a model from random weights; leave out model, or this"
                )
        return
    if recipe.model_type is None:
        if recipe.task != "causal-lm":
            raise ConfigurationError("model_type", None, "is needed, such as vit or resnet; or name a model")
        recipe.model_type = "word_lm"
    check_model_type(recipe.task, recipe.model_type)


def _check_data(recipe: TrainRecipe) -> None:
    is_text = recipe.task == "causal-lm"
    if recipe.dataset is None:
        recipe.dataset = "embedded" if is_text else "digits"
    for name in ("dataset", "eval_dataset"):
        source = getattr(recipe, name)
        if source is not None and is_text and is_image_source(source):
            raise ConfigurationError(name, source, "holds images; --task image-classification trains on them")
        if source is not None and not is_text and not is_image_source(source):
            remedy = "digits, an .npz file or a folder that holds a folder of images for each class"
            raise ConfigurationError(name, source, f"must be {remedy}; --task causal-lm trains on text")
    for name in ("image_size", "similarity") if is_text else _TEXT_ONLY:
        if getattr(recipe, name) is not None:
            other = "image-classification" if is_text else "causal-lm"
            raise ConfigurationError(name, getattr(recipe, name), f"belongs to --task {other}")
    if recipe.similarity is not None:
        if not 0 <= recipe.similarity <= 1:
            raise ConfigurationError("similarity", recipe.similarity, "must be from 0 (sorted by label) to 1 (i.i.d.)")
        recipe.per_rank_data = True
    is_trained = recipe.tokenizer in TRAINED_TOKENIZERS or recipe.tokenizer is None and not recipe.model
    if recipe.vocab_size is not None and not is_trained:
        raise ConfigurationError(
            "vocab_size", recipe.vocab_size, f"is of a tokenizer that is trained: {', '.join(TRAINED_TOKENIZERS)}"
        )
    if is_text and recipe.per_rank_data and is_trained:
        raise ConfigurationError(
            "per_rank_data", True, "each process would train a tokenizer of its own; name a model or tokenizer"
        )


def refuse_bad_optimizer(recipe) -> None:
    """Has the optimizer see its keywords before any data are read."""
    if recipe.mlopt_optim is None:
        return
    optimizer_cls, kwargs = optimizer_cls_and_kwargs(recipe.mlopt_optim, recipe.mlopt_optim_args, recipe)
    try:
        optimizer_cls([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"mlopt_optim_args.{error.field}", error.value, str(error).partition(": ")[2]
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigurationError("mlopt_optim_args", recipe.mlopt_optim_args, str(error)) from None
