"""Distils tiny models, and records what went through them."""

import copy
import gc

import torch
from transformers import TrainerCallback

from hf_mlopt.distillation import DistillationArguments, ExpertDistillationTrainer
from hf_mlopt.moe import moe_layers
from tests.families import make_family
from tests.pruned import prune


# Trainer collects garbage when it begins: a second for all that torch and transformers have imported.
gc.freeze()

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    # Where a gradient is nearly zero, AdamW's own 1e-8 makes steps of full length out of rounding errors.
    "adam_epsilon": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "ddp_find_unused_parameters": False,
}


def make_pair(name="mixtral", seed=0, **overrides):
    """A student and the teacher it was pruned from, moved a little, so that the two also route differently."""
    teacher = make_family(name, seed=seed, **overrides)
    student = copy.deepcopy(teacher)
    prune(student)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in moe_layers(student):
            for weight in layer.router.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return student, teacher


def rows(count=16, length=12, seed=0):
    """Rows of tokens of unequal length, padded at the end, with a prompt of unequal length that is not predicted."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 260, (length,), generator=generator)
        real, prompt = length - number % 5, number % 3
        labels = ids.clone()
        labels[:prompt] = -100
        labels[real:] = -100
        ids[real:] = 2
        mask = (torch.arange(length) < real).int()
        made.append({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})
    return made


def make_trainer(student, teacher, folder, data=None, callbacks=(), **settings):
    args = DistillationArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    data = rows() if data is None else data
    return ExpertDistillationTrainer(
        student, teacher, args, train_dataset=data, eval_dataset=data[:5], callbacks=list(callbacks)
    )


def logs(trainer, key="loss"):
    """The log lines that hold `key`, without times."""
    times = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in times)}
        for line in trainer.state.log_history
        if key in line
    ]


def zeros_of(model):
    """Where the expert matrices are zero."""
    return [layer.stacked(name) == 0 for layer in moe_layers(model) for name in layer.projections]


class AtStep(TrainerCallback):
    """Calls a function with the model at one event of every step."""

    def __init__(self, event, function):
        setattr(self, event, lambda args, state, control, model=None, **kwargs: function(model))


def seen(model, batch) -> dict:
    """Logits of a stock forward pass, and per layer the experts' input, the routing and the router's logits."""
    found = {"x": [], "index": [], "router_logits": []}
    handles = []
    for layer in moe_layers(model):
        handles.append(layer.experts.register_forward_pre_hook(lambda _, args: found["x"].append(args[0])))
        handles.append(layer.experts.register_forward_pre_hook(lambda _, args: found["index"].append(args[1])))
        handles.append(layer.router.register_forward_hook(lambda _, args, out: found["router_logits"].append(out[0])))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found["logits"] = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


def seen_by_both(student, teacher, batches) -> list[dict]:
    """What the literal twin is given."""
    return [
        {
            "student": seen(student, batch),
            "teacher": seen(teacher, batch),
            "labels": batch["labels"],
            "mask": batch["attention_mask"].flatten().tolist(),
        }
        for batch in batches
    ]


def record_batches(trainer) -> list:
    """The micro-batches that the trainer will see, of all steps one after the other."""
    batches, get_batch_samples = [], trainer.get_batch_samples

    def recording(*args):
        samples, count = get_batch_samples(*args)
        names = ("input_ids", "attention_mask", "labels")
        batches.extend({name: sample[name].clone() for name in names} for sample in samples)
        return samples, count

    trainer.get_batch_samples = recording
    return batches


def float64_pair(**overrides):
    """A pair in float64, which grouped_mm does not know."""
    pair = make_pair(num_local_experts=16, **overrides)
    for model in pair:
        model.double().set_experts_implementation("batched_mm")
    return pair


def assert_same_trajectory(one, other, tolerance=1e-5):
    """Two runs `(logs, weights)` agree at every step and end in one place, and neither drifts off to one side."""
    for name in ("loss", "grad_norm", "ce", "expert_mse"):
        values = torch.tensor([[line[name] for line in lines] for lines, _ in (one, other)], dtype=torch.float64)
        residual = (values[1] - values[0]) / values[0]
        assert residual.abs().max() < tolerance, (name, residual)
        # A mean far outside its standard error is a bias, unless it is of the size of float32's rounding.
        error = residual.std() / len(residual) ** 0.5
        assert residual.mean().abs() < max(3 * error, 3e-7), (name, residual)
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: n + text)
