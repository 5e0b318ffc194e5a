"""The parts of `federated.py` about costs: rounds beside local training, growth with sites, Flower's strategies."""

import contextlib
import copy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from common import ROOT, Results
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator
from transformers.utils import logging

from hf_mlopt.data import image_dataset, label_sorted_shares, load_images, window_dataset
from hf_mlopt.federated import FederatedTrainer, FederatedTrainingArguments


PAIRS = 5
LANGUAGE = {"n_layer": 6, "n_embd": 320, "n_head": 8, "n_positions": 64, "vocab_size": 8192}  # 10 million parameters


def digits_model():
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, num_labels=10, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1],
            layer_type="basic",
        )
    )  # fmt: skip


def language_model():
    return GPT2LMHeadModel(GPT2Config(**LANGUAGE))


def digits_sites(num_sites: int) -> dict:
    data = load_images("digits", "train")
    shares = label_sorted_shares(data.labels, num_sites, 0.1, 0)
    return {
        f"site_{k}": image_dataset(replace(data, images=data.images[share], labels=data.labels[share]))
        for k, share in enumerate(shares)
    }


def language_sites(num_sites: int) -> dict:
    windows = torch.randint(LANGUAGE["vocab_size"], (num_sites, 16, 32), generator=torch.Generator().manual_seed(0))
    return {f"site_{k:03}": window_dataset(rows) for k, rows in enumerate(windows)}


def arguments(folder: str, **given) -> FederatedTrainingArguments:
    return FederatedTrainingArguments(
        folder,
        **{
            "mlopt_optim": "sgd",
            "learning_rate": 0.01,
            "evaluate_every": 0,
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 16,
            "dataloader_drop_last": True,
            **given,
        },
    )


def overhead(results: Results, short: bool) -> None:
    """Seconds of a federated round in process, beside the same Trainers started by hand one after the other."""
    rounds = (
        ("ResNet of 78 thousand parameters, 20 steps", digits_model, digits_sites, 20),
        ("GPT-2 of 10 million parameters, 10 steps", language_model, language_sites, 10),
    )
    for name, make_model, make_sites, steps in rounds[:1] if short else rounds:
        sites = make_sites(4)
        ratios, base = [], []
        for _ in range(2 if short else PAIRS):
            base.append(_by_hand(make_model, sites, steps))
            ratios.append(_in_rounds(make_model, sites, steps) / base[-1])
        results.add(
            kind="overhead",
            of=name,
            sites=len(sites),
            ratio_median=statistics.median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
            pairs=len(ratios),
            local_seconds=statistics.median(base),
        )


def _in_rounds(make_model, sites: dict, steps: int) -> float:
    """Seconds of the second of two rounds; the first warms up, as by hand."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, num_rounds=2, local_steps=steps)
        trainer = FederatedTrainer(make_model, args, sites, data_collator=default_data_collator)
        marks = []
        trainer.engine.exchange = _marked(trainer.engine.exchange, marks)
        trainer.train()
        return time.perf_counter() - marks[-1]  # to the end: with aggregation, checkpoint and history


def _marked(exchange, marks: list[float]):
    def timed(messages, *args):
        if any(message.scalars["task"] == "train" for message in messages.values()):
            marks.append(time.perf_counter())
        return exchange(messages, *args)

    return timed


def _by_hand(make_model, sites: dict, steps: int) -> float:
    from hf_mlopt.training import MLOptTrainer

    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(arguments(folder))
        args.local_steps, args.max_steps, args.save_strategy, args.report_to = 1, steps, "no", []
        for round in range(2):
            if round == 1:
                started = time.perf_counter()
            for data in sites.values():
                with contextlib.redirect_stdout(None):
                    MLOptTrainer(model, args, train_dataset=data, data_collator=default_data_collator).train()
    return time.perf_counter() - started


ENGINES = {
    "in process": {},
    "Flower's simulation": {"engine": "flower", "flower_simulation": True},
    "Flower's SuperNodes, a resident beside each": {"engine": "flower"},
}


def engines(results: Results, short: bool) -> None:
    """One recipe through each engine: what a round takes beyond local training, and what comes around the rounds."""
    from hf_mlopt.configuration import load_config
    from hf_mlopt.workflows.federate import federate
    from hf_mlopt.workflows.federate_flower import federate_on_flower
    from hf_mlopt.workflows.federate_recipe import FederateRecipe

    recipe, digests = ROOT / "recipes" / "federated" / "digits_resnet.yaml", {}
    num_rounds = 3 if short else 6
    for name, fields in ENGINES.items():
        with tempfile.TemporaryDirectory() as folder:
            fields = {**fields, "output_dir": f"{folder}/out", "num_rounds": num_rounds, "num_sites": 2, "plot": False}
            started = time.perf_counter()
            given = load_config(FederateRecipe, recipe, {**fields, "disable_tqdm": True, "evaluate_every": 0})
            found = (federate_on_flower if "engine" in fields else federate)(given)[0]
            seconds = time.perf_counter() - started
        rounds = found["rounds"]
        beyond = [row["seconds"] - sum(site["seconds"] for site in row["sites"].values()) for row in rounds[1:]]
        digests[name] = rounds[-1]["digest"]
        results.add(
            kind="engines",
            engine=name,
            sites=2,
            rounds=num_rounds,
            local_seconds=statistics.median(
                sum(site["seconds"] for site in row["sites"].values()) for row in rounds[1:]
            ),
            beyond_median=statistics.median(beyond),
            beyond_min=min(beyond),
            beyond_max=max(beyond),
            around_rounds=seconds - sum(row["seconds"] for row in rounds),
            same_bits=digests[name] == digests["in process"],
        )


def scale(results: Results, short: bool) -> None:
    """Peak memory of a process that simulates many sites, one step each in two rounds."""
    for num_sites in (10, 30) if short else (10, 30, 100):
        started = time.perf_counter()
        program = f"import federated_costs; print(federated_costs.peak_of({num_sites}))"
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)
        results.add(
            kind="scale",
            sites=num_sites,
            peak_gigabytes=float(done.stdout.split()[-1]),
            seconds=time.perf_counter() - started,
        )


def peak_of(num_sites: int) -> float:
    from hf_mlopt.pruning.pruner import peak_memory

    logging.set_verbosity_error()
    folder = tempfile.mkdtemp()
    try:
        args = arguments(folder, num_rounds=2, local_steps=1, per_device_train_batch_size=1)
        sites = language_sites(num_sites)
        FederatedTrainer(language_model, args, sites, data_collator=default_data_collator).train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return peak_memory(torch.device("cpu")) / 2**30


def peers(results: Results, short: bool) -> None:
    """Flower's own strategies beside ours: the same sites train, each server goes its own way."""
    from hf_mlopt.federated.algorithms import FedAvg, FedAvgM

    test = image_dataset(load_images("digits", "test"))
    for name, ours, theirs, options in (
        ("FedAvg", FedAvg(), "FedAvg", {}),
        ("FedAvgM", FedAvgM(server_momentum=0.9), "FedAvgM", {"server_momentum": 0.9}),
    ):
        found = _beside_flower(ours, theirs, options, 3 if short else 10, test)
        results.add(kind="peers", algorithm=name, peer="flwr 1.42 strategy", **found)


def _beside_flower(ours, theirs: str, options: dict, num_rounds: int, test) -> dict:
    import flwr.serverapp.strategy as strategies
    from flwr.app import ArrayRecord, MetricRecord, RecordDict

    sites = digits_sites(4)
    strategy = getattr(strategies, theirs)(min_train_nodes=1, min_available_nodes=1, **options)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, num_rounds=num_rounds, local_steps=20, per_device_train_batch_size=32)
        client = FederatedTrainer(
            digits_model,
            args,
            sites,
            data_collator=default_data_collator,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        ).client
        initial = client.initial()
        ours.setup(list(sites), initial, 0)
        flower = {f"{group}/{name}": t for group, tensors in initial.groups.items() for name, t in tensors.items()}
        seconds, differences = {"ours": 0.0, "peer": 0.0}, []
        for round in range(num_rounds):
            asked = {site: _with(message, task="train") for site, message in ours.configure(round).items()}
            replies = {site: client.answer(site, message) for site, message in asked.items()}
            started = time.perf_counter()
            ours.aggregate(round, replies)
            seconds["ours"] += time.perf_counter() - started
            sent = {site: _with(_grouped(asked[site], flower)) for site in asked}
            arrived = {site: client.answer(site, message) for site, message in sent.items()}
            started = time.perf_counter()
            strategy.current_arrays = ArrayRecord({name: _array(t) for name, t in flower.items()})
            records = [
                _Arrived(
                    RecordDict(
                        {
                            "arrays": ArrayRecord({n: _array(t) for n, t in _flat(arrived[site]).items()}),
                            "metrics": MetricRecord({"num-examples": arrived[site].scalars["num_samples"]}),
                        }
                    )
                )
                for site in sorted(arrived)
            ]
            aggregated, _ = strategy.aggregate_train(round + 1, records)
            seconds["peer"] += time.perf_counter() - started
            flower = {
                name: torch.from_numpy(np.array(aggregated[name].numpy())).to(t.dtype) for name, t in flower.items()
            }
            differences.append(
                max(
                    float((flower[f"weights/{name}"] - tensor).abs().max())
                    for name, tensor in ours.groups["weights"].items()
                )
            )
        accuracies = {}
        for who, message in (("ours", ours.evaluation()["site_0"]), ("peer", _grouped(asked["site_0"], flower))):
            client.shared.load(message)
            accuracies[who] = client.evaluate_on(test)["eval_accuracy"]
    return {
        "rounds": num_rounds,
        "first_difference": differences[0],
        "last_difference": differences[-1],
        "accuracy": accuracies["ours"],
        "peer_accuracy": accuracies["peer"],
        "aggregation_ratio": seconds["ours"] / seconds["peer"],
    }


@dataclass
class _Arrived:
    """What a strategy reads of a message; one of Flower's own exists only within a run."""

    content: object

    def has_error(self) -> bool:
        return False


def _with(message, **scalars):
    return type(message)(message.groups, {**message.scalars, **scalars})


def _flat(message) -> dict[str, torch.Tensor]:
    return {f"{group}/{name}": t for group, tensors in message.groups.items() for name, t in tensors.items()}


def _grouped(message, flat: dict[str, torch.Tensor]):
    groups = {group: {name: flat[f"{group}/{name}"] for name in tensors} for group, tensors in message.groups.items()}
    return type(message)(groups, message.scalars)


def _array(tensor: torch.Tensor):
    from flwr.app import Array

    return Array(tensor.numpy())
