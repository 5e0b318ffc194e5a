"""FedSM with a Trainer at every site: against its twin, in processes, resumed, and with sites that drop out."""

import functools
import json

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated import FederatedTrainer, SiteData
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.segmentation_data import disc_sites
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.selector_model import ImageBatches, SelectorModel, selector_like, selector_reply
from tests.federations import (
    ETA,
    SAMPLES,
    SITES,
    START,
    STEPS,
    KillAt,
    arguments,
    federation,
    flat,
    give_faults,
    gradient,
    killed,
    lost,
    raising,
    record_messages,
    same_bits,
    untimed,
    weights_of,
    without_timings,
)
from tests.reference import fedsm as twin


# Segformer has buffers, which the U-Net has not.
make_model = functools.partial(SegmentationModel, "segformer", width=2)
DISCS = disc_sites(["c", "a", "b"], 10, size=16)
SETTINGS = {"algorithm": "fedsm", "per_device_train_batch_size": 4, "local_steps": 2, "learning_rate": 1e-3}
LEARNED, MOMENTS = {"selector": "learned", "selector_steps": 2}, {"selector": "moments"}
TUNED = {"learning_rate": [1e-4, 1e-2], "local_steps": [1, 3], "window": 2}


def sites():
    return {name: {"train": rows.select(range(6)), "test": rows.select(range(6, 10))} for name, rows in DISCS.items()}


def discs(folder, selector=LEARNED, **settings):
    settings = {"mlopt_optim": "adamw", "algorithm_args": selector, **SETTINGS, **settings}
    return federation(folder, make_model, sites(), **settings)


class Notes(TrainerCallback):
    """What the server holds after each round."""

    def __init__(self):
        self.groups, self.trainer = [], None

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.groups.append(dict(self.trainer.algorithm.groups))


def groups_of(trainer):
    return Message(trainer.algorithm.state_dict()["groups"])


@pytest.mark.parametrize("pull", [0.7, 1.0, 0.25])
def test_trainers_follow_the_twin(tmp_path, pull):
    """Least squares in float64. At 1/K all personal models are the plain mean; at 1 each is trained alone."""
    trainer = federation(tmp_path, algorithm="fedsm", algorithm_args={"selector": "none", "pull": pull})
    trainer.train()
    no_selector = {site: np.zeros((1, 1)) for site in SITES}
    rounds = twin.fedsm(
        *(START, np.zeros((1, 1)), lambda k, w, r, i: gradient(k, w), no_selector),
        *([sorted(SITES)] * 3, SAMPLES, STEPS, ETA, pull, 0, 0.1),
    )
    *_, (common, personal, _) = rounds
    np.testing.assert_allclose(flat(weights_of(trainer)), common, rtol=0, atol=1e-13)
    for site in SITES:
        group = trainer.algorithm.groups[f"personal/{site}"]
        np.testing.assert_allclose(flat(group), personal[site], rtol=0, atol=1e-13)


@pytest.mark.parametrize("selector", [LEARNED, MOMENTS], ids=["learned", "moments"])
def test_sites_send_and_are_sent_what_the_algorithm_says(tmp_path, selector):
    trainer = discs(tmp_path, selector, num_rounds=2)
    seen = record_messages(trainer)
    trainer.train()
    trained = [(site, sent, reply) for site, sent, reply in seen if sent.scalars["task"] == "train"]
    assert [sent.scalars["label"] for site, sent, _ in trained] == [0, 1, 2] * 2  # in order of names
    own = {"personal", "personal_buffers"}
    for _, sent, reply in trained:
        assert own <= set(sent.groups) and own <= set(reply.groups)
        assert not same_bits(sent.groups["personal"], reply.groups["personal"])
        if sent.scalars["round"] == 1:
            # another's end, pulled, is not the site's own
            assert not same_bits(sent.groups["personal"], sent.groups["weights"])
    replied = [set(reply.groups) - own - {"weights", "buffers"} for *_, reply in trained]
    if selector is MOMENTS:
        assert replied == [{"selector_statistics"}] * 3 + [set()] * 3  # once
        assert [float(reply.groups["selector_statistics"]["count"]) for *_, reply in trained[:3]] == [6.0] * 3
    else:
        assert replied == [{"selector", "selector_m", "selector_v"}] * 6
        assert [reply.scalars["selector_step"] for *_, reply in trained] == [2] * 3 + [4] * 3


def test_a_personal_model_has_an_optimizer_of_its_own_and_is_not_held_near_the_common_one(tmp_path):
    """In round 0 both start alike and are trained alike, so they end alike; SoftPull then parts them."""
    trainer = discs(tmp_path, num_rounds=1)
    seen = record_messages(trainer)
    trainer.train()
    for _, sent, reply in seen:
        if sent.scalars["task"] == "train":
            assert same_bits(reply.groups["weights"], reply.groups["personal"])
            assert same_bits(reply.groups["buffers"], reply.groups["personal_buffers"])


def test_both_models_are_evaluated(tmp_path):
    trainer = discs(tmp_path, num_rounds=2)
    row = trainer.train()
    names = {"num_evaluated", "eval_loss", "eval_personal_loss"}
    for found in (trainer.history[0]["evaluation"], row["evaluation"]):
        assert set(found["sites"]) == {"a", "b", "c"} and all(set(one) == names for one in found["sites"].values())
    for site, one in row["evaluation"]["sites"].items():
        for kind, name in (("weights", "eval_loss"), ("personal", "eval_personal_loss")):
            groups = trainer.algorithm.evaluation()[site].groups
            buffers = groups["buffers" if kind == "weights" else "personal_buffers"]
            trainer.client.shared.load(Message({"weights": groups[kind], "buffers": buffers}))
            model, rows = trainer.model.eval(), DISCS[site].select(range(6, 10))[:]
            with torch.no_grad():
                assert float(model(**rows)["loss"]) == pytest.approx(one[name], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "selector", [LEARNED, pytest.param(MOMENTS, marks=pytest.mark.slow)], ids=["learned", "moments"]
)
def test_worker_processes_give_the_same_bits(tmp_path, selector):
    settings = {"num_rounds": 2, "auto_fedrl": TUNED if selector is LEARNED else None}
    settings |= {"local_steps": None} if selector is LEARNED else {}
    here = discs(tmp_path / "1", selector, **settings)
    there = discs(tmp_path / "2", selector, num_workers=2, **settings)
    here.train(), there.train()
    assert groups_of(here) == groups_of(there)
    assert without_timings(here.history) == without_timings(there.history)


@pytest.mark.parametrize("settings", [{}, {"local_steps": None, "auto_fedrl": TUNED}], ids=["fedsm", "auto_fedrl"])
def test_a_server_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path, settings):
    """In the middle of round 2; all is resumed: both kinds of models, selector, policy and its trace."""
    settings = {"num_rounds": 4, **settings}
    undisturbed = discs(tmp_path / "undisturbed", **settings)
    undisturbed.train()
    counting = KillAt("on_train_begin", 2 * 3 * 2 + 3)
    killing = {"site_callbacks": lambda site: [counting]}
    assert killed(lambda: discs(tmp_path / "killed", **settings, **killing).train())
    assert (tmp_path / "killed" / "checkpoint-2").is_dir() and not (tmp_path / "killed" / "checkpoint-3").exists()
    resumed = discs(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert without_timings(resumed.history) == without_timings(undisturbed.history)
    first, second = undisturbed.algorithm.state_dict(), resumed.algorithm.state_dict()
    assert Message(first.pop("groups")) == Message(second.pop("groups")) and first == second


@pytest.mark.parametrize("selector", [LEARNED, MOMENTS], ids=["learned", "moments"])
@pytest.mark.parametrize("round", [0, 1, 2])
def test_a_site_that_drops_out_keeps_its_model_and_the_rest_goes_on(tmp_path, selector, round):
    notes = Notes()
    trainer = discs(tmp_path, selector, evaluate_every=0, callbacks=[notes])
    notes.trainer = give_faults(trainer, {("b", round): lost})
    trainer.train()
    assert [list(row["absent"]) for row in trainer.history] == [["b"] if r == round else [] for r in range(3)]
    own = [trainer.client.initial().groups["weights"], *(groups["personal/b"] for groups in notes.groups)]
    assert [same_bits(before, after) for before, after in zip(own, own[1:], strict=False)] == [
        r == round for r in range(3)
    ]
    if selector is MOMENTS:
        counts = [float(trainer.algorithm.groups[f"selector_statistics/{s}"]["count"]) for s in "abc"]
        assert counts == [6.0] * 3  # asked again where the first answer was lost
    else:
        assert int(trainer.algorithm.groups["selector_step"]["s"]) == 3 * 2


def test_a_message_that_comes_twice_is_answered_alike(tmp_path):
    trainer = discs(tmp_path, num_rounds=2, evaluate_every=0)
    trainer.train()
    message = trainer.algorithm.evaluation()["a"]
    sent = Message(
        {**message.groups, **trainer.algorithm.selector.sent(trainer.algorithm.groups, "a")},
        {**message.scalars, "task": "train", "training": trainer.training},
    )
    assert untimed(trainer.client.answer("a", sent)) == untimed(trainer.client.answer("a", sent))


def test_the_selector_looks_at_plain_images(tmp_path):
    """Where `train` changes rows at random, the statistics are those of the rows as they are."""
    changed = [{**row, "pixel_values": row["pixel_values"] * 0} for row in DISCS["a"]]
    data = {name: SiteData(changed, None, plain=DISCS[name]) for name in DISCS}
    trainer = federation(
        tmp_path, make_model, data, algorithm_args=MOMENTS, num_rounds=1, **SETTINGS, mlopt_optim="adamw"
    )
    trainer.train()
    for site in DISCS:
        total = torch.stack([row["pixel_values"] for row in DISCS[site]]).double().mean(dim=(2, 3)).sum(0)
        found = trainer.algorithm.groups[f"selector_statistics/{site}"]["sum"][:3]
        torch.testing.assert_close(found, total, rtol=1e-6, atol=0)


def test_statistics_do_not_depend_on_batches():
    message = Message({}, {"needs_statistics": True})
    small, whole = (selector_reply(message, ImageBatches(DISCS["a"], size=size))[0] for size in (3, 64))
    for name, tensor in whole["selector_statistics"].items():
        torch.testing.assert_close(small["selector_statistics"][name], tensor, rtol=1e-12, atol=1e-12)
    assert selector_reply(Message({}, {"needs_statistics": False}), ImageBatches(DISCS["a"])) == ({}, {})


def test_a_selector_is_known_by_its_weights():
    model = SelectorModel(num_channels=2, num_sites=5, width=3)
    again = selector_like(model.state_dict())
    assert again.options == model.options and same_bits(again.state_dict(), model.state_dict())
    with pytest.raises(InputError, match="weights of another module"):
        selector_like({"weight": torch.zeros(2)})


def test_a_site_says_whether_its_model_may_be_handed_out(tmp_path):
    trainer = discs(tmp_path, num_rounds=1, release_personal=True)
    trainer.engine.answer = lambda site, message: _as_if_it_had_not_agreed(trainer, site, message)
    trainer.train()
    assert trainer.released == ["a", "c"]
    without = discs(tmp_path / "none", num_rounds=1)
    without.train()
    assert without.released == []


def _as_if_it_had_not_agreed(trainer, site, message):
    reply = trainer.client.answer(site, message)
    scalars = {k: v for k, v in reply.scalars.items() if (site, k) != ("b", "release_personal")}
    return Message(reply.groups, scalars)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"algorithm_args": {"pull": 1.5}}, "algorithm_args.pull=1.5"),
        ({"algorithm_args": {"threshold": -0.1}}, "algorithm_args.threshold=-0.1"),
        ({"algorithm_args": {"selector": "best"}}, "algorithm_args.selector='best'"),
        ({"algorithm_args": {"gamma": 0.5}}, "algorithm_args.gamma=0.5: fedsm takes"),
        ({"clip_update": 1.0}, "clip_update=1.0.*personal"),
        ({"update_codec": "orq-9"}, "update_codec='orq-9'.*fedsm"),
    ],
)
def test_bad_options_are_named_before_the_first_round(tmp_path, settings, match):
    with pytest.raises(ConfigurationError, match=match):
        discs(tmp_path, **settings).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_one_site_has_nothing_to_select(tmp_path):
    one = {"a": DISCS["a"]}
    with pytest.raises(ConfigurationError, match="selector='learned': with one site"):
        federation(tmp_path, make_model, one, mlopt_optim="adamw", **SETTINGS).train()
    federation(tmp_path, make_model, one, mlopt_optim="adamw", algorithm_args={"selector": "none"}, **SETTINGS).train()


def test_a_model_without_images_has_no_learned_selector(tmp_path):
    with pytest.raises(ConfigurationError, match="Regression is no model of images"):
        federation(tmp_path, algorithm="fedsm").train()


def test_only_fedsm_has_models_to_release(tmp_path):
    with pytest.raises(ConfigurationError, match="release_personal=True: ditto gives the server no personal models"):
        arguments(tmp_path, algorithm="ditto", release_personal=True)


def test_another_selector_or_roster_cannot_go_on_from_a_checkpoint(tmp_path):
    discs(tmp_path, num_rounds=1).train()
    with pytest.raises(InputError, match="algorithm_args="):
        discs(tmp_path, MOMENTS).train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-1" / "server.json").read_text())
    assert state["algorithm_state"]["sites"] == ["a", "b", "c"]
    data = {name: {"train": DISCS["a"]} for name in ("a", "b", "d")}
    other = federation(tmp_path, make_model, data, mlopt_optim="adamw", algorithm_args=LEARNED, **SETTINGS)
    with pytest.raises(InputError, match="sites"):
        other.train(resume_from_checkpoint=True)


def test_a_site_that_fails_is_named(tmp_path):
    trainer = give_faults(discs(tmp_path, num_rounds=1, evaluate_every=0), {("c", 0): raising})
    row = trainer.train()
    assert row["absent"] == {"c": "OSError: the disk is full"} and isinstance(trainer, FederatedTrainer)
