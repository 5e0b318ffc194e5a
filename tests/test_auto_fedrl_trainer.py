"""Auto-FedRL with a Trainer at every site: what is drawn holds there, is rewarded, and is on record."""

import json

import numpy as np
import pytest

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import ALGORITHMS
from tests.federations import (
    NAMES,
    SITES,
    START,
    arguments,
    federation,
    flat,
    give_faults,
    gradient,
    lost,
    raising,
    record_messages,
    regression_data,
    rows_of,
    weights_of,
    without_timings,
)
from tests.reference.federated import local_sgd


RANGES = {
    "learning_rate": [0.01, 0.1],
    "local_steps": [1, 4],
    "server_lr": [0.5, 1.5],
    "aggregation_weights": [0.1, 1.0],
}
HELD_OUT = {"a": 3, "b": 4, "c": 5, "d": 6}
DATA = {site: {"train": regression_data(site), "test": regression_data(site + "t", HELD_OUT[site])} for site in SITES}


def tuned(folder, data=DATA, space=RANGES, **settings):
    settings = {"local_steps": None, "num_rounds": 4, **settings}
    return federation(folder, sites=data, auto_fedrl=space, **settings)


def loss_at(site, w):
    A, b = rows_of(site + "t", HELD_OUT[site])
    return float(np.square(A @ w - b).mean() / 2)


def of_round(trainer, round):
    return {row["site"]: row for row in trainer.algorithm.trace if row["round"] == round}


def test_what_is_drawn_is_what_sites_and_server_do(tmp_path):
    """Plain loops with the numbers of the history give the same model, and the losses before training."""
    trainer = tuned(tmp_path, evaluate_every=0)
    trainer.train()
    w = np.array(START)
    drawn = []
    for row in trainer.history:
        values, trace = row["tuned"], of_round(trainer, row["round"])
        drawn.append(values["learning_rate"])
        assert {k: trace[k]["num_steps"] for k in trace} == dict.fromkeys(sorted(SITES), values["local_steps"])
        for site in SITES:
            assert trace[site]["eval_loss"] == pytest.approx(loss_at(site, w), rel=1e-9)
        mean = sum(HELD_OUT[site] * trace[site]["eval_loss"] for site in SITES) / sum(HELD_OUT.values())
        assert values["eval_loss"] == pytest.approx(mean, rel=1e-12)
        shares = {site: trace[site]["aggregation_weight"] for site in SITES}
        assert sum(shares.values()) == pytest.approx(1) and len({round(share, 6) for share in shares.values()}) == 4
        ends = {
            site: local_sgd(
                w, values["local_steps"], values["learning_rate"], lambda v, i, site=site: gradient(site, v)
            )
            for site in SITES
        }
        w = w + values["server_lr"] * sum(shares[site] * (ends[site] - w) for site in SITES)
    assert len(set(drawn)) == 4 and all(0.01 <= lr <= 0.1 for lr in drawn)
    np.testing.assert_allclose(flat(weights_of(trainer), NAMES), w, rtol=0, atol=1e-12)


def test_each_draw_is_rewarded_by_the_loss_of_the_next_round(tmp_path):
    trainer = tuned(tmp_path, evaluate_every=0)
    trainer.train()
    losses = [row["tuned"]["eval_loss"] for row in trainer.history]
    for r, row in enumerate(trainer.history):
        expected = None if r == 0 else pytest.approx(1 - losses[r] / losses[r - 1], rel=1e-12)
        assert row["tuned"]["reward"] == expected
        assert row["tuned"]["policy_updated"] == (r >= 2)  # a single reward has no advantage
    rewards = [{of["reward"] for of in of_round(trainer, r).values()} for r in range(4)]
    assert rewards == [{row["tuned"]["reward"]} for row in trainer.history[1:]] + [{None}]


@pytest.mark.parametrize("every, noted", [(0, []), (1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2, 3])])
def test_sites_evaluate_in_every_round_whatever_is_noted(tmp_path, every, noted):
    trainer = tuned(tmp_path, evaluate_every=every)
    seen = record_messages(trainer)
    trainer.train()
    trained = [(sent, reply) for _, sent, reply in seen if sent.scalars["task"] == "train"]
    assert len(trained) == 4 * 4 and all(type(reply.scalars["eval_loss"]) is float for _, reply in trained)
    # The losses of round r + 1 before training are those after round r: no site is asked twice.
    num_evaluations = sum(sent.scalars["task"] == "evaluate" for _, sent, _ in seen)
    assert num_evaluations == (4 if every else 0)
    assert [row["round"] for row in trainer.history if "evaluation" in row] == noted
    assert not any("eval_loss" in of for row in trainer.history for of in row["sites"].values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_algorithm_is_tuned(tmp_path, algorithm):
    args = {"algorithm_args": {"selector": "none"}} if algorithm == "fedsm" else {}
    trainer = tuned(tmp_path, algorithm=algorithm, num_rounds=3, **args)
    seen = record_messages(trainer)
    trainer.train()
    assert {sent.scalars["algorithm"] for _, sent, _ in seen if "algorithm" in sent.scalars} == {algorithm}
    assert len(trainer.algorithm.trace) == 3 * 4 and not any(row["absent"] for row in trainer.history)
    assert all(np.isfinite(row["eval_loss"]) and row["learning_rate"] for row in trainer.algorithm.trace)


@pytest.mark.parametrize("fault", [lost, raising])
@pytest.mark.parametrize("round", [0, 1, 3])
def test_a_site_that_drops_out_is_left_out_of_loss_and_reward(tmp_path, round, fault):
    trainer = give_faults(tuned(tmp_path, evaluate_every=0), {("c", round): fault})
    trainer.train()
    assert [list(row["absent"]) for row in trainer.history] == [["c"] if r == round else [] for r in range(4)]
    losses = [{site: row["eval_loss"] for site, row in of_round(trainer, r).items()} for r in range(4)]
    assert [r for r in range(4) if losses[r]["c"] is None] == [round]
    for r in range(1, 4):
        common = [site for site in SITES if site != "c" or round not in (r - 1, r)]
        before, now = (sum(HELD_OUT[site] * losses[q][site] for site in common) for q in (r - 1, r))
        assert trainer.history[r]["tuned"]["reward"] == pytest.approx(1 - now / before, rel=1e-9)


def test_too_few_sites_end_the_round(tmp_path):
    from hf_mlopt.federated import RoundFailed

    trainer = give_faults(tuned(tmp_path, min_sites=4), {("c", 1): raising})
    with pytest.raises(RoundFailed, match="c: OSError: the disk is full"):
        trainer.train()
    resumed = tuned(tmp_path, min_sites=4)
    resumed.train(resume_from_checkpoint=True)
    undisturbed = tuned(tmp_path / "undisturbed", min_sites=4)
    undisturbed.train()
    assert without_timings(resumed.history) == without_timings(undisturbed.history)
    assert resumed.algorithm.trace == undisturbed.algorithm.trace


def test_a_site_without_held_out_rows_is_refused_before_the_first_round(tmp_path):
    data = {**DATA, "b": {"train": regression_data("b")}}
    with pytest.raises(InputError, match="auto_fedrl: site 'b' has no rows to evaluate on"):
        tuned(tmp_path, data).train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "space, match",
    [
        ({"learning_rate": [0.1, 0.01]}, r"auto_fedrl.learning_rate=\[0.1, 0.01\]: must be \(low, high\)"),
        ({"learning_rate": [0.1]}, "auto_fedrl.learning_rate"),
        ({"local_steps": [1, 2.5]}, "auto_fedrl.local_steps"),
        ({"local_steps": [1, 2], "local_epochs": [1, 2]}, "auto_fedrl.local_steps"),
        (dict.fromkeys([*RANGES, "local_epochs"]), "auto_fedrl.search_space=.*nothing is searched"),
        ({"search_space": "wide"}, "auto_fedrl.search_space='wide': must be log or paper"),
        ({"lr": [0.1, 0.2]}, "auto_fedrl.lr=.*Auto-FedRL takes aggregation_weights"),
        ({**RANGES, "policy": "best"}, "auto_fedrl.policy='best'"),
        ({**RANGES, "window": 1}, "auto_fedrl.window=1"),
        ({**RANGES, "guard": 0.5}, "auto_fedrl.guard=0.5"),
    ],
)
def test_a_bad_search_is_named(tmp_path, space, match):
    with pytest.raises(ConfigurationError, match=match):
        tuned(tmp_path, space=space)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"secure_sum": True}, "secure_sum=True: auto_fedrl needs the loss of each site"),
        ({"local_steps": 3, "auto_fedrl": {"learning_rate": [0.1, 0.2]}}, "local_steps=3: local_steps is fixed"),
        ({"site_weights": "uniform"}, "site_weights='uniform': must be samples"),
        ({"auto_fedrl": "{1}"}, "auto_fedrl"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, settings, match):
    with pytest.raises(ConfigurationError, match=match):
        federation(tmp_path, sites=DATA, **{"local_steps": None, "auto_fedrl": RANGES, **settings})


@pytest.mark.parametrize(
    "space", [{**RANGES, "learning_rate": [0.01, 0.2]}, {**RANGES, "policy": "cholesky"}, None], ids=str
)
def test_a_policy_of_another_search_cannot_go_on(tmp_path, space):
    tuned(tmp_path, num_rounds=1).train()
    settings = {"local_steps": 2} if space is None else {}
    with pytest.raises(InputError, match="auto_fedrl="):
        tuned(tmp_path, space=space, **settings).train(resume_from_checkpoint=True)


def test_a_text_is_a_search_too_and_all_is_searched_by_default(tmp_path):
    assert arguments(tmp_path, local_steps=None, auto_fedrl=json.dumps(RANGES)).auto_fedrl == RANGES
    trainer = tuned(tmp_path, space={})
    assert trainer.algorithm.learner.space.num_dimensions(SITES) == 3 + len(SITES)
