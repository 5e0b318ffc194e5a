"""The model of `hf-mlopt train`: a checkpoint to go on from, or an architecture with random weights."""

import difflib
import logging
from textwrap import shorten
from typing import TYPE_CHECKING

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.hub import Checkpoint
from hf_mlopt.planning.machine import available_memory
from hf_mlopt.workflows.loading import architecture_errors, context_length, load_model
from hf_mlopt.workflows.train_data import TrainData


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_mlopt.training import MLOptTrainingArguments

logger = logging.getLogger(__name__)

_OF_DATA = ("image_size", "num_channels", "num_labels")  # what a configuration takes from the images


def check_model_type(task: str, model_type: str) -> None:
    """
    Refuses an architecture that the task has no model of.

    Raises:
        ConfigurationError: With those whose names are close.
    """
    known = _model_types(task)
    if model_type not in known:
        close = difflib.get_close_matches(model_type.lower().replace("-", "_"), known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"such as {', '.join(_EXAMPLES[task])}"
        raise ConfigurationError("model_type", model_type, f"is no {task} architecture of transformers; {hint}")


_EXAMPLES = {
    "causal-lm": ("word_lm", "gpt2", "llama"),
    "image-classification": ("vit", "resnet", "convnext"),
    "text-classification": ("bert", "distilbert", "roberta"),
    "segmentation": ("unet", "segformer", "unet3d"),
}


def _model_types(task: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    if task == "image-classification":
        return list(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if task == "segmentation":
        return list(_EXAMPLES[task])
    if task == "text-classification":
        return list(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    return ["word_lm", *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def load_config(recipe, checkpoint: Checkpoint | None) -> "PreTrainedConfig":
    """
    The configuration as far as the recipe gives it, before any data are read.

    Raises:
        InputError: If a key of `model_config` is unknown or its value has the wrong type, the checkpoint is of another
            task, or the windows are longer than the model's context.
    """
    from transformers import AutoConfig

    import hf_mlopt.models  # noqa: F401  registers word_lm

    if checkpoint is not None:
        with architecture_errors(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint.name, revision=checkpoint.revision)
        if config.model_type not in _model_types(recipe.task):
            raise ConfigurationError("model", recipe.model, f"is a {config.model_type}, not a model for {recipe.task}")
    else:
        config = _new_config(recipe.model_type, recipe.model_config or {})
    context = context_length(config)
    if recipe.task != "image-classification" and context is not None and recipe.sequence_length > context:
        remedy = f"is more than the {context} tokens of the model's context; lower it"
        remedy += "" if checkpoint else ", or set max_position_embeddings in model_config"
        raise ConfigurationError("sequence_length", recipe.sequence_length, remedy)
    return config


def _new_config(model_type: str, overrides: dict) -> "PreTrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    for name, value in overrides.items():
        if not hasattr(default, name):
            known = [*default.to_dict(), *default.attribute_map]
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; it has {', '.join(sorted(known))}"
            raise ConfigurationError(f"model_config.{name}", value, f"{model_type} has no such field{hint}")
    try:
        return AutoConfig.for_model(model_type, **overrides)
    except ConfigurationError as error:
        raise ConfigurationError(f"model_config.{error.field}", error.value, str(error).partition(": ")[2]) from None
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = shorten(" ".join(str(error).split()), 300)
        raise ConfigurationError("model_config", overrides, f"{model_type}: {reason}") from None


def build_model(recipe, checkpoint: Checkpoint | None, config: "PreTrainedConfig", data: TrainData):
    """
    The model in float32, its vocabulary or labels those of the data.

    Args:
        recipe (`TrainRecipe`): What to do.
        checkpoint (`Checkpoint`, *optional*): What to go on from.
        config (`PreTrainedConfig`): Of [`load_config`].
        data (`TrainData`): What it is for.

    Returns:
        `PreTrainedModel`: Random weights are those of the global seed.

    Raises:
        ConfigurationError: If the data do not fit the model, or the model does not fit in memory.
    """
    if recipe.task == "causal-lm":
        _fit_to_text(recipe, config, data.tokenizer, from_scratch=checkpoint is None)
        model = load_model(checkpoint).float() if checkpoint else _from_config("AutoModelForCausalLM", recipe, config)
        # GPT-2 names none, and a Trainer would then divide its loss by one token too many of every row.
        model.loss_type = model.loss_type or "ForCausalLM"
        return model
    if recipe.task == "text-classification":
        _fit_to_text(recipe, config, data.tokenizer, from_scratch=checkpoint is None)
        _name_labels(config, data)
        return _classifier("AutoModelForSequenceClassification", recipe, checkpoint, config)
    _fit_to_images(recipe, config, data, from_scratch=checkpoint is None)
    _name_labels(config, data)
    return _classifier("AutoModelForImageClassification", recipe, checkpoint, config)


def _classifier(auto_class: str, recipe, checkpoint: Checkpoint | None, config: "PreTrainedConfig"):
    if checkpoint is None:
        return _from_config(auto_class, recipe, config)
    import transformers

    with architecture_errors(checkpoint):
        return (
            getattr(transformers, auto_class)
            .from_pretrained(
                checkpoint.name, revision=checkpoint.revision, config=config, ignore_mismatched_sizes=True
            )
            .float()
        )


def _name_labels(config: "PreTrainedConfig", data: TrainData) -> None:
    config.id2label = dict(enumerate(data.label_names))
    config.label2id = {name: index for index, name in enumerate(data.label_names)}


def _fit_to_text(recipe, config, tokenizer, from_scratch: bool) -> None:
    given = (recipe.model_config or {}).get("vocab_size")
    if from_scratch and given is None:
        config.vocab_size = len(tokenizer)
    size = config.get_text_config().vocab_size
    if size < len(tokenizer):
        field, value = ("model_config.vocab_size", given) if from_scratch else ("tokenizer", recipe.tokenizer)
        raise ConfigurationError(field, value, f"the model has {size} tokens, the tokenizer {len(tokenizer)}")
    if from_scratch:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))


def _fit_to_images(recipe, config, data: TrainData, from_scratch: bool) -> None:
    channels, height, width = data.shape
    found = {"image_size": height, "num_channels": channels, "num_labels": len(data.label_names)}
    if hasattr(config, "image_size") and height != width:
        raise ConfigurationError(
            "dataset",
            recipe.dataset,
            f"images of {height} x {width}, {config.model_type} takes squares; set image_size",
        )
    for name in _OF_DATA if from_scratch else _OF_DATA[:2]:
        if not hasattr(config, name):
            continue
        wanted = getattr(config, name) if not from_scratch else (recipe.model_config or {}).get(name, found[name])
        if wanted not in (found[name], [height, width]):
            remedy = f"has {name} {found[name]}, the model {wanted}"
            remedy += "; set image_size" if name == "image_size" else ""
            raise ConfigurationError("dataset", recipe.dataset, remedy)
        setattr(config, name, found[name])
    patch = getattr(config, "patch_size", None)
    if from_scratch and isinstance(patch, int) and hasattr(config, "image_size") and height % patch:
        raise ConfigurationError(
            "model_config.patch_size", patch, f"must divide the {height} pixels of an image; set it in model_config"
        )


def _from_config(auto_class: str, recipe, config) -> "PreTrainedModel":
    import torch
    import transformers

    build = getattr(transformers, auto_class).from_config
    try:
        with torch.device("meta"):
            skeleton = build(config)
        needed = sum(4 * parameter.numel() for parameter in skeleton.parameters())
        if needed > available_memory():
            raise ConfigurationError(
                "model_config",
                recipe.model_config,
                f"makes a {recipe.model_type} of {needed / 1e9:.1f} GB, more than is free; make it smaller",
            )
        return build(config, dtype=torch.float32)
    except ConfigurationError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # sizes that do not go together
        reason = shorten(" ".join(str(error).split()), 300)
        raise ConfigurationError("model_config", recipe.model_config, f"{recipe.model_type}: {reason}") from error


def warn_of_filled_zeros(model: "PreTrainedModel", recipe: "MLOptTrainingArguments") -> None:
    """Says what becomes of a pruned checkpoint whose matrices are about to be trained without `keep_zeros`."""
    from hf_mlopt.training.callbacks import is_pruned

    if recipe.model is None or recipe.keep_zeros:
        return
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    pruned = [name for name, weight in trained if is_pruned(weight)]
    if pruned:
        logger.warning(
            f"{recipe.model} is pruned ({len(pruned)} matrices, such as {pruned[0]}), and training fills its zeros; "
            "--keep-zeros holds them"
        )
