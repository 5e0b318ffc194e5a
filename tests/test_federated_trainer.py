"""Whole trainings: killed and resumed, refused before they begin, and what they leave."""

import functools
import gc

import pytest
import torch
from transformers import TrainerCallback

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated import FederatedTrainer
from hf_mlopt.federated.engines import InProcessEngine
from tests.federations import (
    SITES,
    KillAt,
    Net,
    arguments,
    digests,
    federation,
    give_faults,
    kept_by,
    killed,
    make_net,
    net_data,
    net_federation,
    raising,
    regression_data,
    same_bits,
    weights_of,
    without_timings,
)


RESUMED = [
    {"algorithm": "fedavg"},
    {"algorithm": "fedadam", "algorithm_args": {"betas": (0.9, 0.99)}},
    {"algorithm": "scaffold"},
    {"algorithm": "ditto"},
    {"algorithm": "fedbn", "mlopt_optim": "adamw", "optimizer_state": "keep"},
    {"algorithm": "domo", "mlopt_optim": None, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"},
    {"algorithm": "fedavg", "mlopt_optim": "adamw", "optimizer_state": "keep", "evaluate_every": 2},
]


@pytest.mark.parametrize("settings", RESUMED)
def test_a_server_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path, settings):
    """Three of four sites a round, 2 steps each. Killed between rounds, in a round, and after it, before its end."""
    settings = {"num_rounds": 4, "site_fraction": 0.75, **settings}
    undisturbed = net_federation(tmp_path / "undisturbed", **settings)
    undisturbed.train()
    trainings = 2 if settings["algorithm"] == "ditto" else 1  # of a site in a round
    between = {"site_callbacks": KillAt("on_train_begin", 2 * 3 * trainings + 1)}
    within = {"site_callbacks": KillAt("on_step_end", 2 * 3 * 2 * trainings + 3)}
    before_checkpoint = {"callbacks": [KillNextRound(2)]}
    for number, callbacks in enumerate((between, within, before_checkpoint)):
        folder = tmp_path / str(number)
        if "site_callbacks" in callbacks:
            counting = callbacks["site_callbacks"]
            callbacks = {"site_callbacks": lambda site, counting=counting: [counting]}
        assert killed(lambda folder=folder, how=callbacks: net_federation(folder, **settings, **how).train())
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
        resumed = net_federation(folder, **settings)
        row = resumed.train(resume_from_checkpoint=True)
        assert without_timings(resumed.history) == without_timings(undisturbed.history)
        assert row is resumed.history[-1] and same_bits(weights_of(resumed), weights_of(undisturbed))
        for site in "abcd":
            states, others = kept_by(resumed, site), kept_by(undisturbed, site)
            assert not others or states[max(states)] == others[max(others)]


class KillNextRound(TrainerCallback):
    """Kills once the round of this number has been aggregated, and is not yet in a checkpoint."""

    def __init__(self, round):
        self.round, self.kill = round, KillAt("now", 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs.get("round") == self.round and "train_loss" in logs:
            self.kill.now()


def test_a_training_goes_on_for_more_rounds(tmp_path):
    longer = net_federation(tmp_path / "longer", num_rounds=3)
    longer.train()
    net_federation(tmp_path / "short", num_rounds=2).train()
    resumed = net_federation(tmp_path / "short", num_rounds=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-2"))
    assert digests(resumed.history) == digests(longer.history)


def test_a_finished_training_stays_as_it_is(tmp_path):
    trainer = net_federation(tmp_path)
    trainer.train()
    again = net_federation(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.history == trainer.history
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True))


def test_a_site_that_comes_back_after_the_server_needs_its_state(tmp_path):
    net_federation(tmp_path, algorithm="scaffold", num_rounds=2).train()
    for path in (tmp_path / "sites" / "a").glob("*/round-*"):
        path.unlink()
    resumed = net_federation(tmp_path, algorithm="scaffold")
    row = resumed.train(resume_from_checkpoint=True)
    assert list(row["absent"]) == ["a"] and "has lost its state of scaffold after round 1" in row["absent"]["a"]


def test_trainings_that_share_the_folder_of_the_sites_do_not_mix(tmp_path):
    alone = net_federation(tmp_path / "alone", algorithm="scaffold")
    alone.train()
    first = net_federation(tmp_path / "first", algorithm="scaffold", num_rounds=1)
    other = net_federation(tmp_path / "other", algorithm="scaffold", seed=5)
    other.client.store.folder = first.client.store.folder
    first.train()
    other.train()
    rest = net_federation(tmp_path / "first", algorithm="scaffold")
    rest.train(resume_from_checkpoint=True)
    assert digests(rest.history) == digests(alone.history)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"algorithm": "fedprox"}, "algorithm='fedprox'.*'fedavg'"),
        ({"seed": 7}, "seed=7.*42"),
        ({"algorithm_args": {}}, "algorithm_args"),
        ({"sites": {"a": net_data("a"), "x": net_data("x")}}, r"sites \['a', 'b', 'c', 'd'\]"),
        ({"model_init": functools.partial(Net, 0, width=4)}, "first.weight"),
    ],
)
def test_another_run_cannot_go_on_from_a_checkpoint(tmp_path, changed, match):
    net_federation(tmp_path, num_rounds=1).train()
    with pytest.raises(InputError, match=match):
        net_federation(tmp_path, **changed).train(resume_from_checkpoint=True)


def test_a_folder_that_is_in_use_and_one_with_nothing_in_it(tmp_path):
    with pytest.raises(ConfigurationError, match="resume_from_checkpoint=True: no checkpoint"):
        net_federation(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="resume_from_checkpoint=.*nowhere"):
        net_federation(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    net_federation(tmp_path, num_rounds=1).train()
    with pytest.raises(ConfigurationError, match="output_dir=.*holds checkpoint-1; resume from it"):
        net_federation(tmp_path).train()


# Refused before the first round.

CORRECTING = ("fedprox", "scaffold", "ditto", "domo-s")
REFUSED = [
    ({"algorithm": "fedbest"}, "algorithm='fedbest'.*ditto, domo, domo-s.*scaffold"),
    ({"algorithm": "fedprox", "algorithm_args": {"mu": 1}}, "algorithm_args.mu=1: fedprox takes proximal_mu"),
    ({"algorithm_args": {"mu": 1}}, "algorithm_args.mu=1"),
    ({"algorithm": "fedprox", "algorithm_args": {"proximal_mu": -1}}, "algorithm_args.proximal_mu=-1: must"),
    ({"algorithm_args": {"fraction": 0.5}}, "algorithm_args.fraction=0.5: set site_fraction instead"),
    ({"algorithm_args": "[1]"}, "algorithm_args='?\\[1\\]'?: must be a dict"),
    ({"algorithm": "scaffold", "mlopt_optim": "adamw"}, "mlopt_optim='adamw'.*take sgd"),
    *(({"algorithm": name, "fp16": True}, f"fp16=True: {name} adds to gradients") for name in CORRECTING),
    ({"algorithm": "domo", "algorithm_args": {"fusion_at": "step"}, "fp16": True}, "fp16=True: domo adds"),
    ({"algorithm": "fedavg-lm", "mlopt_optim": "adamw"}, "mlopt_optim='adamw'.*take sgd"),
    ({"algorithm": "fedavg-lm", "mlopt_optim_args": {"momentum": 0.0}}, "mlopt_optim_args.*momentum"),
    ({"mlopt_optim": "domo"}, "mlopt_optim='domo'.*name it as algorithm"),
    ({"mlopt_optim": "saef"}, "mlopt_optim='saef'"),
    ({"mlopt_optim": "sgdd"}, "mlopt_optim='sgdd'"),
    ({"mlopt_optim": None, "optim": "adamw_torch", "mlopt_optim_args": {"a": 1}}, "mlopt_optim_args"),
    ({"grad_codec": "sign"}, "grad_codec='sign'"),
    ({"num_rounds": 0}, "num_rounds=0"),
    ({"num_rounds": 2.0}, "num_rounds=2.0"),
    ({"local_steps": 0}, "local_steps=0"),
    ({"local_epochs": 0}, "local_epochs=0"),
    ({"local_epochs": "two"}, "local_epochs='two'"),
    ({"local_epochs": float("nan")}, "local_epochs=nan"),
    ({"site_fraction": 1.5}, "site_fraction=1.5.*at most 1"),
    ({"min_sites": 0}, "min_sites=0"),
    ({"min_sites": 9}, "min_sites=9.*number of sites, 4"),
    ({"site_weights": "equal"}, "site_weights='equal'.*samples or uniform"),
    ({"optimizer_state": "carry"}, "optimizer_state='carry'.*reset or keep"),
    ({"evaluate_every": -1}, "evaluate_every=-1"),
    ({"num_workers": -1}, "num_workers=-1"),
    ({"site_retries": True}, "site_retries=True"),
    ({"save_total_limit": 0}, "save_total_limit=0"),
    ({"round_timeout": 5.0}, "round_timeout=5.0.*num_workers"),
    ({"round_timeout": -1.0, "num_workers": 2}, "round_timeout=-1.0"),
    ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial'"),
    ({"max_steps": 10}, "max_steps=10.*local_steps"),
    ({"num_train_epochs": 2}, "num_train_epochs=2.*local_epochs"),
    ({"warmup_steps": 10}, "warmup_steps=10"),
    ({"sites": {}}, "a training needs a site"),
    ({"sites": {"a": []}}, "sites\\['a'\\] has no rows"),
    ({"sites": {"a": {"train": [], "test": []}}}, "sites\\['a'\\] has no rows"),
    ({"sites": {"a": {"test": [1]}}}, "sites\\['a'\\].*give train"),
    ({"sites": {"a": {"train": [1], "dev": [1]}}}, "sites\\['a'\\].*test or validation"),
    ({"sites": {"a": iter([1])}}, "sites\\['a'\\].*length"),
    ({"sites": {"": net_data("a")}}, "needs a name"),
    ({"sites": {7: net_data("a")}}, "needs a name"),
    ({"sites": {"../a": net_data("a")}}, "'../a'.*must not be a path"),
    ({"sites": {"..": net_data("a")}}, "'..'.*must not be a path"),
    ({"algorithm": "fedbn", "model_init": functools.partial(torch.nn.Linear, 2, 2)}, "local_names"),
]


@pytest.mark.parametrize("settings, match", REFUSED)
def test_bad_input_is_refused_before_the_first_round(tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        net_federation(tmp_path, **settings).train()
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "sites").exists()


def with_another_site(folder, **another):
    """A federation whose site b has another client."""
    trainer, other = net_federation(folder), net_federation(folder / "other", **another)
    mine = trainer.client.answer
    trainer.engine.answer = lambda site, message: (other.client.answer if site == "b" else mine)(site, message)
    return trainer


@pytest.mark.parametrize(
    "model_init, match",
    [
        (
            functools.partial(Net, 0, width=4),
            r"site 'b' has another model: first.bias is float32\[4\], at the server float32\[3\] .*tensors differ\); "
            "all sites need the same architecture and vocabulary",
        ),
        (functools.partial(Net, 0, torch.bfloat16), r"bfloat16\[3\], at the server float32\[3\]"),
        (functools.partial(Net, 1), "site 'b' has other frozen weights; all sites need the same base model"),
    ],
)
def test_sites_of_other_models_are_refused(tmp_path, model_init, match):
    with pytest.raises(InputError, match=match):
        with_another_site(tmp_path, model_init=model_init).train()
    assert not (tmp_path / "sites").exists()


def test_sites_of_other_starting_weights_are_given_the_servers(tmp_path):
    """Nothing is refused that does not matter: what travels is replaced, so only the frozen rest must be equal."""

    def build():
        net = Net(1)
        net.base.load_state_dict(Net(0).base.state_dict())
        return net

    trainer, plain = with_another_site(tmp_path / "a", model_init=build), net_federation(tmp_path / "b")
    trainer.train(), plain.train()
    assert digests(trainer.history) == digests(plain.history)


def test_names_of_sites_must_differ_and_all_must_be_there(tmp_path):
    client = net_federation(tmp_path).client
    trainer = net_federation(tmp_path, sites=None, engine=InProcessEngine(["a", "b", "a"], client.answer))
    with pytest.raises(InputError, match="two sites are named 'a'"):
        trainer.train()
    absent = give_faults(net_federation(tmp_path), {("b", None): raising})
    with pytest.raises(InputError, match="site 'b' cannot take part: OSError: the disk is full"):
        absent.train()
    unknown = net_federation(tmp_path, sites=None, engine=InProcessEngine(["a", "nobody"], client.answer))
    with pytest.raises(InputError, match="site 'nobody' cannot take part"):
        unknown.train()


def test_sites_or_an_engine_but_not_both(tmp_path):
    args, sites = arguments(tmp_path), {site: regression_data(site) for site in SITES}
    for given in ({}, {"sites": sites, "engine": InProcessEngine([], None)}):
        with pytest.raises(InputError, match="give the sites' data, or an engine"):
            FederatedTrainer(make_net, args, **given)


def test_a_model_is_saved_as_it_was_trained(tmp_path):
    from safetensors.torch import load_file

    def untied():  # a Trainer cannot write tied weights of a model that is none of transformers
        net = Net(0)
        net.tied.weight = torch.nn.Parameter(net.tied.weight.detach().clone())
        return net

    trainer = net_federation(tmp_path, model_init=untied)
    trainer.train()
    with torch.no_grad():
        trainer.model.first.weight.zero_()  # whatever has used the model since
    trainer.save_model(str(tmp_path / "model"))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(saved["first.weight"], weights_of(trainer)["first.weight"])
    assert torch.equal(saved["norm.running_mean"], trainer.algorithm.groups["buffers"]["norm.running_mean"])


def test_before_it_is_trained_there_is_nothing_to_evaluate_or_save(tmp_path):
    trainer = net_federation(tmp_path)
    for call in (trainer.evaluate, trainer.save_model):
        with pytest.raises(InputError, match="no model yet: train it, or resume"):
            call()


class Counts(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append("begin")

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("end")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, logs.get("round"), "eval_loss" in logs))


def test_the_servers_callbacks_see_rounds_as_steps(tmp_path):
    counts = Counts()
    net_federation(tmp_path, num_rounds=2, callbacks=[counts]).train()
    # what is evaluated with the next round comes when that is there
    assert counts.seen == ["begin", (1, 0, False), (2, 0, True), (2, 1, False), (2, 1, True), "end"]


def test_every_site_has_callbacks_of_its_own(tmp_path):
    counts = {site: Counts() for site in "abcd"}
    net_federation(tmp_path, site_callbacks=lambda site: [counts[site]], logging_strategy="no").train()
    assert all(one.seen.count("begin") == 3 for one in counts.values())


def test_a_batch_of_sites_is_chosen_anew_every_round(tmp_path):
    sites = {f"s{n}": regression_data("a", 4) for n in range(6)}
    trainer = federation(tmp_path, sites=sites, site_fraction=0.5, num_rounds=6, evaluate_every=0)
    trainer.train()
    chosen = [tuple(row["sites"]) for row in trainer.history]
    assert {len(some) for some in chosen} == {3} and len(set(chosen)) > 3


def test_full_collections_spare_what_was_there_before(tmp_path):
    class Watch(TrainerCallback):
        def on_log(self, *args, **kwargs):
            frozen.append(gc.get_freeze_count())

    gc.unfreeze()
    for is_frozen_before in (False, True):
        frozen = []
        if is_frozen_before:
            gc.freeze()
        net_federation(tmp_path / str(is_frozen_before), callbacks=[Watch()]).train()
        assert len(frozen) > 2 and min(frozen) > 10_000
        assert (gc.get_freeze_count() > 0) == is_frozen_before
