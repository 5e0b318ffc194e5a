"""A small regression with batch normalisation, for tests of the Trainer glue."""

import torch
from torch import nn
from transformers import TrainerCallback

from hf_mlopt import MLOptTrainer, MLOptTrainingArguments


SETTINGS = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}


class Net(nn.Module):
    """Linear, batch normalisation, linear; `unused` never gets a gradient."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, x, labels):
        y = self.last(self.norm(self.first(x.to(self.last.weight.dtype))).relu())[:, 0]
        return {"loss": ((y - labels.to(y.dtype)) ** 2).mean(), "logits": y}


def examples(count=40, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator) + shift
    return [{"x": row, "labels": row.sum() + shift} for row in x]


def make_trainer(folder, callbacks=(), model=None, data=None, **settings):
    args = MLOptTrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    return MLOptTrainer(
        model or Net(),
        args,
        train_dataset=data or examples(),
        eval_dataset=examples(8, seed=1),
        callbacks=list(callbacks),
    )


class Recorder(TrainerCallback):
    """The first weight matrix after every step, and what batch normalisation has seen."""

    def __init__(self):
        self.weights, self.means = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.first.weight.detach().double().flatten().tolist())
        self.means.append(model.norm.running_mean.double().tolist())


def state_of(model):
    return {name: value.detach().double().tolist() for name, value in model.state_dict().items()}
