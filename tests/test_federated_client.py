"""What a site does with a message: algorithms through a real Trainer against twins, and what Trainers forget."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.algorithms.averaging import site_seed
from hf_mlopt.federated.client import FederatedClient
from hf_mlopt.federated.storage import SiteStore, load_message
from tests.federations import (
    ETA,
    NET_SITES,
    SAMPLES,
    SETTINGS,
    SITES,
    START,
    STEPS,
    Net,
    arguments,
    asked_twice,
    digests,
    federation,
    flat,
    give_faults,
    gradient,
    kept_by,
    lost,
    make_net,
    net_data,
    net_federation,
    raising,
    record_messages,
    regression_data,
    same_bits,
    untimed,
    weights_of,
)
from tests.reference import domo as domo_twin
from tests.reference import federated as twin
from tests.reference.rsgd import Momentum


ROUNDS = 4
EXACT = {"rtol": 0, "atol": 1e-12}
QUIET = {"evaluate_every": 0, "save_total_limit": None}


def trained(folder, **settings):
    trainer = federation(folder, **{"num_rounds": ROUNDS, **QUIET, **settings})
    trainer.train()
    return trainer


def asked(trainer):
    return [sorted(row["sites"]) for row in trainer.history]


def server_after(trainer, round, group="weights"):
    path = trainer.client.store.folder.parent / f"checkpoint-{round + 1}" / "server.safetensors"
    return flat(load_message(path).groups[group])


SERVERS = [*((*row, 0.0) for row in twin.SERVERS), ("fedprox", {"proximal_mu": 0.7}, twin.fedavg, 0.7)]


@pytest.mark.parametrize("name, options, server, mu", SERVERS)
def test_algorithms_through_a_trainer_equal_their_twins(tmp_path, name, options, server, mu):
    trainer = trained(tmp_path, algorithm=name, algorithm_args=options, site_fraction=0.5)
    assert {len(sites) for sites in asked(trainer)} == {2} and len({*sum(asked(trainer), [])}) > 2
    expected = twin.fedopt(START, gradient, asked(trainer), SAMPLES, STEPS, ETA, server(), mu)
    for r, w in enumerate(expected):
        np.testing.assert_allclose(server_after(trainer, r), w, **EXACT)
    assert weights_of(trainer)["weight"].dtype == torch.float64


@pytest.mark.parametrize("fraction, options", [(1.0, {}), (0.5, {"server_lr": 0.6})])
def test_scaffold_through_a_trainer_equals_its_twin(tmp_path, fraction, options):
    trainer = trained(tmp_path, algorithm="scaffold", algorithm_args=options, site_fraction=fraction)
    alpha = options.get("server_lr", 1.0)
    expected = twin.scaffold(START, gradient, asked(trainer), SAMPLES, STEPS, ETA, alpha)
    for r, (w, c, _) in enumerate(expected):
        np.testing.assert_allclose(server_after(trainer, r), w, **EXACT)
        np.testing.assert_allclose(server_after(trainer, r, "control"), c, rtol=0, atol=1e-11)
    *_, (_, _, controls) = twin.scaffold(START, gradient, asked(trainer), SAMPLES, STEPS, ETA, alpha)
    for site in {*sum(asked(trainer), [])}:
        kept = kept_by(trainer, site)
        np.testing.assert_allclose(flat(kept[max(kept)].groups["control"]), controls[site], rtol=0, atol=1e-11)


def test_scaffold_follows_a_schedule_over_rounds(tmp_path):
    trainer = trained(tmp_path, algorithm="scaffold", lr_scheduler_type="linear")
    etas = [ETA * (1 - r / ROUNDS) for r in range(ROUNDS)]
    for r, (w, c, _) in enumerate(twin.scaffold(START, gradient, asked(trainer), SAMPLES, STEPS, etas, 1.0)):
        np.testing.assert_allclose(server_after(trainer, r), w, **EXACT)
        np.testing.assert_allclose(server_after(trainer, r, "control"), c, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_ditto_of_some_sites_in_a_round_equals_its_twin(tmp_path, lmbda):
    trainer = trained(tmp_path, algorithm="ditto", algorithm_args={"ditto_lambda": lmbda}, site_fraction=0.5)
    common, w, personal = twin.fedopt(START, gradient, asked(trainer), SAMPLES, STEPS, ETA, twin.fedavg()), START, {}
    for r, sites in enumerate(asked(trainer)):
        for site in sites:
            v = personal.get(site, w)  # a site that comes later begins with the common model of its first round
            personal[site] = twin.local_sgd(v, STEPS, ETA, lambda v, i, k=site, w=w: gradient(k, v) + lmbda * (v - w))
        w = next(common)
        np.testing.assert_allclose(server_after(trainer, r), w, **EXACT)
    for site, v in personal.items():
        kept = kept_by(trainer, site)
        np.testing.assert_allclose(flat(kept[max(kept)].groups["weights"]), v, **EXACT)


def test_ditto_of_all_sites_equals_its_twin(tmp_path):
    trainer = trained(tmp_path, algorithm="ditto", algorithm_args={"ditto_lambda": 0.5})
    *_, (w, personal) = twin.ditto(START, gradient, asked(trainer), SAMPLES, STEPS, ETA, 0.5)
    np.testing.assert_allclose(flat(weights_of(trainer)), w, **EXACT)
    for site in SITES:
        np.testing.assert_allclose(flat(kept_by(trainer, site)[ROUNDS - 1].groups["weights"]), personal[site], **EXACT)


def test_fedbn_through_a_trainer_equals_its_twin(tmp_path):
    trainer = trained(tmp_path, algorithm="fedbn", site_fraction=0.5)
    is_local = np.arange(8) >= 5
    *_, models = twin.fedbn(START, is_local, gradient, asked(trainer), SAMPLES, STEPS, ETA)
    for site in SITES:
        np.testing.assert_allclose(weights_of(trainer)["weight"].numpy(), models[site][:5], **EXACT)
        kept = kept_by(trainer, site)
        if kept:
            own = kept[max(kept)].groups["weights"]
            assert list(own) == ["norm.bias"]
            np.testing.assert_allclose(own["norm.bias"].numpy(), models[site][5:], **EXACT)


FAMILY = [
    ("domo", {"server_momentum": 0.6, "fusion": 0.4}, 0.9, 0.6, 0.4, "before", "zero"),
    ("domo-s", {"server_momentum": 0.6, "fusion": 0.4}, 0.9, 0.6, 0.4, "inside", "zero"),
    ("fedavg-slm", {"server_momentum": 0.5}, 0.9, 0.5, 0.0, None, "average"),
    ("slowmo", {"server_lr": 0.8}, 0.9, 0.5, 0.0, None, "keep"),
    ("fedavg-sm", {}, 0.0, 0.9, 0.0, None, "zero"),
]


@pytest.mark.parametrize("name, options, mu_l, mu_s, beta, fused, local", FAMILY)
def test_the_domo_family_through_a_trainer_equals_its_twin(tmp_path, name, options, mu_l, mu_s, beta, fused, local):
    trainer = trained(tmp_path, algorithm=name, algorithm_args=options, mlopt_optim=None, lr_scheduler_type="linear")
    sites, alpha = sorted(SITES), options.get("server_lr", 1.0)
    shares = list(twin.shares(SAMPLES, sites).values())
    expected = domo_twin.domo(
        START,
        lambda k, z, r, i: gradient(sites[k], z),
        [[ETA * (1 - r / ROUNDS)] * STEPS for r in range(ROUNDS)],
        [Momentum(mu_l) for _ in sites],
        shares,
        alpha,
        mu_s,
        beta,
        fused,
        local,
    )
    for r, (x, _, m, _) in enumerate(expected):
        np.testing.assert_allclose(server_after(trainer, r), x, **EXACT)
        np.testing.assert_allclose(server_after(trainer, r, "server_momentum"), m, rtol=0, atol=1e-11)


def test_a_correction_is_added_once_in_a_step_of_several_batches(tmp_path):
    data = {"d": regression_data("d")}
    settings = {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 4}
    trainer = trained(tmp_path, sites=data, algorithm="fedprox", algorithm_args={"proximal_mu": 0.7}, **settings)
    *_, w = twin.fedopt(START, gradient, [["d"]] * ROUNDS, SAMPLES, STEPS, ETA, twin.fedavg(), 0.7)
    np.testing.assert_allclose(flat(weights_of(trainer)), w, **EXACT)
    assert trainer.history[-1]["sites"]["d"]["num_steps"] == STEPS


# Federated training of one site, or of equal ones, is training.


def central(folder, data, seed, model=make_net, **settings):
    """A plain `Trainer`, on the model that a federation of seed 42 begins with."""
    kept = ("per_device_train_batch_size", "learning_rate", "max_grad_norm", "use_cpu", "disable_tqdm")
    common = {name: {**SETTINGS, **settings}[name] for name in kept}
    rest = {name: value for name, value in settings.items() if name not in kept}
    args = TrainingArguments(
        str(folder),
        seed=seed,
        report_to="none",
        save_strategy="no",
        lr_scheduler_type="constant",
        **{"optim": "sgd", **common, **rest},
    )
    trainer = Trainer(model(), args, train_dataset=data)
    trainer.train()
    return {
        name: parameter.detach() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize(
    "local, how",
    [({"local_steps": 1}, {"max_steps": 1}), ({"local_steps": None, "local_epochs": 2}, {"num_train_epochs": 2})],
)
def test_a_round_of_one_site_is_centralised_training_bit_for_bit(tmp_path, local, how):
    """With dropout, batch normalization, shuffled rows and AdamW."""
    data = net_data("a")
    settings = {"per_device_train_batch_size": 8, "learning_rate": 0.01, "max_grad_norm": 1.0}
    trainer = net_federation(tmp_path, {"a": data}, num_rounds=1, mlopt_optim="adamw", **local, **settings)
    trainer.train()
    expected = central(tmp_path, data, site_seed(42, 0, "a"), optim="adamw_torch", **settings, **how)
    assert same_bits(weights_of(trainer), expected)
    assert not same_bits(weights_of(trainer), trainer.client.initial().groups["weights"])


@pytest.mark.parametrize("optimizer, state", [("sgd", "reset"), ("adamw", "keep")])
def test_rounds_of_one_site_and_step_are_centralised_training_bit_for_bit(tmp_path, optimizer, state):
    data, rounds = net_data("a"), 5
    settings = {"per_device_train_batch_size": 24, "train_sampling_strategy": "sequential", "learning_rate": 0.01}
    no_dropout = functools.partial(Net, 0, dropout=0.0)
    trainer = federation(
        tmp_path,
        no_dropout,
        {"a": data},
        num_rounds=rounds,
        local_steps=1,
        mlopt_optim=optimizer,
        optimizer_state=state,
        **settings,
    )
    trainer.train()
    optim = {"sgd": "sgd", "adamw": "adamw_torch"}[optimizer]
    expected = central(tmp_path, data, 1, optim=optim, max_steps=rounds, model=no_dropout, **settings)
    assert same_bits(weights_of(trainer), expected)


def test_equal_sites_of_full_batches_are_centralised_training(tmp_path):
    sites = {f"site {n}": regression_data("d", 40) for n in range(3)}
    trainer = trained(tmp_path, sites=sites, local_steps=1, site_weights="uniform")
    np.testing.assert_allclose(
        flat(weights_of(trainer)), twin.local_sgd(START, ROUNDS, ETA, functools.partial(gradient, "d")), **EXACT
    )


def test_sites_of_one_step_are_centralised_training_on_the_rows_of_all(tmp_path):
    trainer = trained(tmp_path, local_steps=1)

    def pooled(w, i):
        return sum(SAMPLES[site] * gradient(site, w) for site in SITES) / sum(SAMPLES.values())

    np.testing.assert_allclose(flat(weights_of(trainer)), twin.local_sgd(START, ROUNDS, ETA, pooled), **EXACT)


# What a Trainer that is used again forgets, or does not.


class Rows(list):
    """A data set that notes which rows it is asked for, beginning anew with every training."""

    def __init__(self, rows):
        super().__init__(rows)
        self.rounds = []

    def __getitem__(self, index):
        self.rounds[-1].append(index)
        return super().__getitem__(index)


class BeginsRows(TrainerCallback):
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.rounds.append([])


def test_every_round_and_site_sees_other_rows(tmp_path):
    """Though one step is less than an epoch. A loader reads ahead, so only the first rows count."""
    sites = {site: Rows(net_data("a")) for site in "ab"}
    net_federation(
        tmp_path, sites, num_rounds=4, local_steps=1, evaluate_every=0, site_callbacks=lambda site: [BeginsRows()]
    ).train()
    seen = [tuple(asked[:8]) for rows in sites.values() for asked in rows.rounds]
    assert len(set(seen)) == len(seen) == 8
    assert len({index for batch in seen for index in batch}) > 16


class Watch(TrainerCallback):
    """Learning rate and count of the optimizer's steps, at each step."""

    def __init__(self):
        self.lrs, self.steps = [], []

    def on_optimizer_step(self, args, state, control, optimizer=None, model=None, **kwargs):
        self.lrs.append(optimizer.param_groups[0]["lr"])
        counts = {int(entry["step"]) for entry in optimizer.state.values() if "step" in entry}
        self.steps.append(max(counts, default=None))


@pytest.mark.parametrize("state, counts", [("reset", [1, 2, 1, 2, 1, 2]), ("keep", [1, 2, 3, 4, 5, 6])])
def test_an_optimizer_begins_afresh_or_goes_on(tmp_path, state, counts):
    watch = {site: Watch() for site in "abcd"}
    trainer = net_federation(
        tmp_path, mlopt_optim="adamw", optimizer_state=state, site_callbacks=lambda site: [watch[site]]
    )
    trainer.train()
    assert {site: seen.steps for site, seen in watch.items()} == dict.fromkeys("abcd", counts)
    assert bool(kept_by(trainer, "a")) == (state == "keep")


@pytest.mark.parametrize("kind, factors", [("constant", [1, 1, 1]), ("linear", [1, 2 / 3, 1 / 3]), ("cosine", None)])
def test_the_learning_rate_is_constant_in_a_round_and_falls_over_rounds(tmp_path, kind, factors):
    watch = Watch()
    trainer = net_federation(
        tmp_path, {"a": net_data("a")}, lr_scheduler_type=kind, site_callbacks=lambda site: [watch]
    )
    trainer.train()
    factors = factors or [1, 0.75, 0.25]
    np.testing.assert_allclose(watch.lrs, np.repeat(0.01 * np.array(factors), 2), rtol=1e-12)
    sums = [row["sites"]["a"]["lr_sum"] for row in trainer.history]
    np.testing.assert_allclose(sums, 0.02 * np.array(factors), rtol=1e-12)


def depth(model):
    """How often the forward of a model is wrapped."""
    function, count = model.forward, 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    return count


def test_mixed_precision_wraps_the_model_no_more_with_every_round(tmp_path):
    trainer = net_federation(tmp_path / "bf16", bf16=True)
    row = trainer.train()
    assert depth(trainer.model) == 0 and "_original_forward" not in vars(trainer.model)
    assert {tensor.dtype for tensor in weights_of(trainer).values()} == {torch.float32}
    exact = net_federation(tmp_path / "fp32").train()
    assert row["digest"] != exact["digest"] and row["train_loss"] == pytest.approx(exact["train_loss"], rel=0.1)


class SeesAutocast(Net):
    seen = []

    def forward(self, x, labels):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return super().forward(x, labels)


def test_every_site_and_round_trains_and_evaluates_in_mixed_precision(tmp_path):
    """Accelerate marks a model that it has prepared, and leaves a marked one as it is."""
    SeesAutocast.seen.clear()
    net_federation(
        tmp_path, model_init=functools.partial(SeesAutocast, 0), bf16=True, per_device_eval_batch_size=64
    ).train()
    assert len(SeesAutocast.seen) == 4 * (3 * 2 + 3) and all(SeesAutocast.seen)


class Fails(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise OSError("the disk is full")


def test_a_site_that_fails_leaves_nothing_to_the_next_one(tmp_path):
    failing = net_federation(
        tmp_path / "a", bf16=True, site_callbacks=lambda site: [Fails()] if site == "b" else [], min_sites=2
    )
    failing.train()
    assert all(row["absent"] == {"b": "OSError: the disk is full"} for row in failing.history)
    without = give_faults(net_federation(tmp_path / "b", bf16=True), {("b", r): raising for r in range(3)})
    without.train()
    assert digests(failing.history) == digests(without.history)
    assert depth(failing.model) == 0


def test_a_model_in_half_precision_travels_and_is_averaged_in_float32(tmp_path):
    trainer = net_federation(tmp_path, model_init=functools.partial(Net, 0, torch.bfloat16))
    seen = record_messages(trainer)
    trainer.train()
    tensors = {m.groups["weights"]["first.weight"] for _, *both in seen for m in both if "weights" in m.groups}
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    mean = weights_of(trainer)["first.weight"]
    assert mean.dtype == torch.float32 and not torch.equal(mean, mean.bfloat16().float())
    assert trainer.model.first.weight.dtype == torch.bfloat16
    sent = {m.scalars["round"]: m for _, m, reply in seen if m.scalars.get("task") == "train"}
    assert not torch.equal(
        sent[1].groups["weights"]["first.weight"], sent[1].groups["weights"]["first.weight"].bfloat16()
    )


def test_tied_weights_travel_once_and_frozen_ones_never(tmp_path):
    trainer = net_federation(tmp_path)
    seen = record_messages(trainer)
    trainer.train()
    layers = ("first", "norm", "middle", "last")
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"tied.bias"}
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for _, message, reply in seen:
        for one in (message, reply):
            if one.groups:
                assert set(one.groups["weights"]) == names and set(one.groups["buffers"]) == buffers
    assert trainer.model.tied.weight is trainer.model.middle.weight
    assert torch.equal(trainer.model.base.weight, Net(0).base.weight)


def test_counts_of_batches_are_averaged_as_integers(tmp_path):
    trainer = net_federation(
        tmp_path, local_steps=None, local_epochs=1, sites={"a": net_data("a", 24), "b": net_data("b", 8)}
    )
    trainer.train()
    count = trainer.algorithm.groups["buffers"]["norm.num_batches_tracked"]
    # 24 / 32 of 3 batches and 8 / 32 of 1, 2.5 in all, is 2 rounded to even; then 2 more; and so on
    assert count.dtype == torch.int64 and count.item() == 6
    assert trainer.model.norm.num_batches_tracked.item() == 6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_of_a_model_with_adapters_only_these_travel(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16)

    def build():
        return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    ids = torch.arange(48).reshape(6, 8) % 32
    sites = {site: [{"input_ids": row + n, "labels": row + n} for row in ids % 30] for n, site in enumerate("ab")}
    trainer = federation(tmp_path, build, sites, learning_rate=1.0, num_rounds=2)
    seen = record_messages(trainer)
    trainer.train()
    names = {
        name for _, message, reply in seen for m in (message, reply) for group in m.groups.values() for name in group
    }
    assert names and all("lora_" in name for name in names)
    assert not same_bits(weights_of(trainer), trainer.client.initial().groups["weights"])
    trainer.save_model(str(tmp_path / "model"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }


# FedBN: what normalizes stays.


class NormsAtStart(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.found.append({name: t.clone() for name, t in model.norm.state_dict().items()})


def test_of_fedbn_neither_norms_nor_statistics_are_in_any_message(tmp_path):
    norms = {site: NormsAtStart() for site in "abcd"}
    trainer = net_federation(
        tmp_path, algorithm="fedbn", num_rounds=6, site_fraction=0.5, site_callbacks=lambda site: [norms[site]]
    )
    seen = record_messages(trainer)
    trainer.train()
    for _, message, reply in seen:
        for one in (message, reply):
            assert set(one.groups) <= {"weights"}
            assert not any("norm" in name for group in one.groups.values() for name in group)
    assert {message.scalars["task"] for _, message, _ in seen} == {"hello", "train", "evaluate"}
    trained_in = {site: [r for r, row in enumerate(trainer.history) if site in row["sites"]] for site in "abcd"}
    assert max(map(len, trained_in.values())) >= 3
    for site, rounds in trained_in.items():
        assert len(norms[site].found) == len(rounds)
        if rounds:  # another site has used the model before
            assert same_bits(norms[site].found[0], Net(0).norm.state_dict())
        for start in norms[site].found[1:]:
            assert not torch.equal(start["running_mean"], Net(0).norm.running_mean)
        if len(rounds) >= 2:
            kept = kept_by(trainer, site)[rounds[-2]].groups
            last = norms[site].found[-1]
            assert same_bits(last, {n: {**kept["weights"], **kept["buffers"]}[f"norm.{n}"] for n in last})


# What sites keep.

KEEPING = [
    {"algorithm": "scaffold"},
    {"algorithm": "ditto"},
    {"algorithm": "fedbn"},
    {"algorithm": "slowmo", "mlopt_optim": None, "learning_rate": 1e-3},
    {"algorithm": "fedavg", "mlopt_optim": "adamw", "optimizer_state": "keep"},
    {"algorithm": "ditto", "mlopt_optim": "adamw", "optimizer_state": "keep"},
]
WHAT = ["state of scaffold", "state of ditto", "state of fedbn", "optimizer's state", "optimizer's state", "ditto"]


@pytest.mark.parametrize("settings, what", list(zip(KEEPING, WHAT, strict=True)))
def test_a_site_without_its_state_says_so(tmp_path, settings, what):
    trainer = net_federation(tmp_path, **settings)

    def lose(answer, site, message):
        shutil.rmtree(trainer.client.store.folder / site)
        return answer(site, message)

    give_faults(trainer, {("b", 2): lose}).train()
    reason = trainer.history[2]["absent"].pop("b")
    assert trainer.history[2]["absent"] == {} and "b" not in trainer.history[2]["sites"]
    assert "site 'b' has lost its" in reason and what in reason and "round 1" in reason


def test_a_site_that_keeps_nothing_loses_nothing(tmp_path):
    trainer = net_federation(tmp_path)

    def lose(answer, site, message):
        shutil.rmtree(trainer.client.store.folder / site)
        return answer(site, message)

    give_faults(trainer, {("b", 2): lose}).train()
    assert trainer.history[2]["absent"] == {}
    assert not kept_by(trainer, "a")


@pytest.mark.parametrize("settings", KEEPING)
def test_the_same_message_gets_the_same_answer(tmp_path, settings):
    settings = {**settings, "evaluate_every": 0}
    undisturbed = net_federation(tmp_path / "once", **settings)
    undisturbed.train()
    faults = {(site, r): asked_twice for site in "abc" for r in range(3)}
    twice = give_faults(net_federation(tmp_path / "twice", **settings), faults)
    twice.train()
    assert digests(twice.history) == digests(undisturbed.history)
    assert untimed_state(twice, "a") == untimed_state(undisturbed, "a")


def untimed_state(trainer, site):
    return {round: message.digest() for round, message in kept_by(trainer, site).items()}


@pytest.mark.parametrize("settings", KEEPING)
def test_after_a_reply_that_was_not_used_a_site_goes_back(tmp_path, settings):
    """As if it had not been asked: in the first round, and in a later one."""
    at = [("a", 0), ("b", 1), ("b", 2)]
    runs = []
    for name, fault in (("lost", lost), ("raised", raising)):
        trainer = net_federation(tmp_path / name, num_rounds=4, evaluate_every=0, **settings)
        give_faults(trainer, dict.fromkeys(at, fault)).train()
        runs.append(trainer)
    assert digests(runs[0].history) == digests(runs[1].history)
    for site in "ab":
        states = [kept_by(trainer, site) for trainer in runs]
        assert states[0][3] == states[1][3]


# Messages that a site cannot answer, or answers in another way.


def message_for(trainer, site="a", **scalars):
    trainer.algorithm.setup(sorted(NET_SITES), trainer.client.initial(), 0)
    message = trainer.algorithm.configure(0)[site]
    return Message(message.groups, {**message.scalars, "task": "train", "training": "one", **scalars})


@pytest.mark.parametrize(
    "scalars, match", [({"task": "sleep"}, "task='sleep'"), ({"algorithm": "new"}, "algorithm='new'")]
)
def test_what_a_site_does_not_know_is_named(tmp_path, scalars, match):
    trainer = net_federation(tmp_path)
    with pytest.raises(InputError, match=match):
        trainer.client.answer("a", message_for(trainer, **scalars))


def test_a_message_may_set_steps_epochs_and_learning_rate(tmp_path):
    trainer = net_federation(tmp_path)
    answers = [
        trainer.client.answer("a", message_for(trainer, **scalars)).scalars
        for scalars in ({}, {"local_steps": 5}, {"learning_rate": 0.5}, {"lr_factor": 0.5})
    ]
    assert [said["num_steps"] for said in answers] == [2, 5, 2, 2]
    assert [said["lr_sum"] for said in answers] == pytest.approx([0.02, 0.05, 1.0, 0.01])
    by_epochs = net_federation(tmp_path / "epochs", local_steps=None)
    assert by_epochs.client.answer("a", message_for(by_epochs, local_epochs=3)).scalars["num_steps"] == 9


def test_an_answer_depends_on_nothing_but_message_and_site(tmp_path):
    """Not on what the client has done before: evaluated, trained another site, or failed."""
    trainer = net_federation(tmp_path)
    message = message_for(trainer)
    first = trainer.client.answer("a", message)
    trainer.client.answer("b", message_for(trainer, "b", local_steps=3, evaluate=True))
    trainer.client.evaluate_on(net_data("x"))
    again = trainer.client.answer("a", message_for(trainer, evaluate=True))
    assert again.groups.keys() == first.groups.keys() and Message(again.groups) == Message(first.groups)
    assert untimed(net_federation(tmp_path / "other").client.answer("a", message)) == untimed(first)
    other = trainer.client.answer("a", message_for(trainer, seed=1))
    assert Message(other.groups) != Message(first.groups)


def test_a_message_is_not_written_into(tmp_path):
    for settings in (
        {"algorithm": "scaffold"},
        {"algorithm": "domo-s"},
        {"algorithm": "ditto"},
        {"algorithm": "fedavg-lm", "mlopt_optim": None},
    ):
        trainer = net_federation(tmp_path / settings["algorithm"], **settings)
        message = message_for(trainer)
        before = message.digest()
        reply = trainer.client.answer("a", message)
        digest = reply.digest()
        trainer.client.answer("b", message_for(trainer, "b"))
        assert message.digest() == before and reply.digest() == digest


def test_a_site_logs_to_a_file_of_its_own(tmp_path):
    trainer = net_federation(tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    lines = (tmp_path / "sites" / "c" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [(row["round"], row["step"]) for row in rows if "loss" in row]
    assert losses == [(r, step) for r in range(3) for step in (1, 2)]


def test_vocabularies_of_one_size_are_told_apart(tmp_path):
    class Tokenizer:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: number for number, word in enumerate(self.words)}

    def digest(*words):
        args = arguments(tmp_path)
        kwargs = {"processing_class": Tokenizer(*words)} if words else {}
        client = FederatedClient(args, Net, lambda site: None, SiteStore(tmp_path), trainer_kwargs=kwargs)
        return client.description()["vocabulary"]

    assert digest("a", "b") == digest("a", "b") != digest("b", "a")
    assert digest() == ""
