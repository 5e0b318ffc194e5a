"""Clipping and noise on what sites answer: what leaves them, what it is worth, and where it is refused."""

import logging
import math
import stat
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.privacy.accounting import epsilon, num_releases
from hf_mlopt.federated.privacy.clipping import clipped
from hf_mlopt.federated.privacy.noise import gaussian, noisy, site_secret
from tests.federations import (
    ETA,
    SAMPLES,
    START,
    STEPS,
    Net,
    Regression,
    arguments,
    asked_twice,
    digests,
    federation,
    flat,
    give_faults,
    gradient,
    lost,
    net_federation,
    record_messages,
    regression_data,
    weights_of,
    without_timings,
)


QUIET = {"evaluate_every": 0, "num_rounds": 2}
BOUND = 0.05
TWO = ("a", "b")


def two_sites(folder, model_init=Regression, **settings):
    sites = {site: regression_data(site) for site in TWO}
    return federation(folder, model_init, sites, **{**QUIET, **settings})


def local_change(site, start):
    """Δ of a site's steps over all its rows, float64."""
    w = start.copy()
    for _ in range(STEPS):
        w -= ETA * gradient(site, w)
    return w - start


def changes(seen):
    return {
        (site, sent.scalars["round"]): flat(reply.groups["weights"]) - flat(sent.groups["weights"])
        for site, sent, reply in seen
        if sent.scalars["task"] == "train"
    }


def test_clipping_bounds_the_norm_of_all_tensors_together():
    change = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}
    half = clipped(change, 2.5)
    assert half["a"].item() == 1.5 and half["b"].tolist() == [[0.0, 2.0]]
    kept = clipped(change, 5.0)
    assert all(torch.equal(kept[name], change[name].double()) for name in change)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_does_not_hide_a_change_that_is_not_finite(bad):
    assert not clipped({"a": torch.tensor([1.0, bad])}, 1.0)["a"].isfinite().all()


def test_clipped_rounds_equal_a_literal_twin(tmp_path):
    trainer = two_sites(tmp_path, clip_update=BOUND)
    seen = record_messages(trainer)
    trainer.train()
    w, total = START.copy(), sum(SAMPLES[site] for site in TWO)
    for row in trainer.history:
        steps = {site: local_change(site, w) for site in TWO}
        for site, step in steps.items():
            assert row["sites"][site]["unclipped_norm"] == pytest.approx(np.linalg.norm(step), rel=1e-9)
        assert max(np.linalg.norm(step) for step in steps.values()) > 1.2 * BOUND
        w = w + sum(
            SAMPLES[site] / total * step * min(1, BOUND / np.linalg.norm(step)) for site, step in steps.items()
        )
    np.testing.assert_allclose(flat(weights_of(trainer)), w, rtol=0, atol=1e-12)
    assert max(np.linalg.norm(change) for change in changes(seen).values()) <= BOUND * (1 + 1e-9)


def test_a_bound_that_nobody_reaches_changes_no_bit(tmp_path):
    plain, bounded = (two_sites(tmp_path / str(c), clip_update=c, num_rounds=1) for c in (None, 1e6))
    plain.train(), bounded.train()
    assert digests(plain.history) == digests(bounded.history)


@pytest.mark.parametrize("size", [1, 4097, (1 << 17) + 3, 3 << 17])
def test_the_noise_is_normal(size):
    draws = gaussian(b"k" * 32, size).numpy()
    assert draws.shape == (size,) and np.isfinite(draws).all()
    assert not np.array_equal(draws, gaussian(b"l" * 32, size).numpy())
    if size == 1:
        return
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    half = size // 2
    for first, second in ((draws[:-1], draws[1:]), (draws[:half], draws[half : 2 * half]), (draws**2, draws[::-1])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(half)
    assert len(np.unique(draws)) == size


def test_no_seed_that_others_know_has_a_part_in_the_noise(tmp_path):
    sent = Message({"weights": {"a": torch.zeros(50)}}, {"round": 3, "seed": 5, "evaluate": True})
    change = {"a": torch.ones(50, dtype=torch.float64)}
    secrets = [site_secret(tmp_path / name / "site") for name in ("one", "two")]
    drawn = []
    for secret in secrets:
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(noisy(change, 2.0, secret, sent)["a"] - 1)
    assert not torch.isclose(*drawn).any()


def test_noise_is_repeated_for_the_same_question_and_for_no_other(tmp_path):
    secret = site_secret(tmp_path / "site")
    sent = Message({"weights": {"a": torch.zeros(50)}}, {"round": 3, "seed": 5, "evaluate": True})
    change = {"a": torch.ones(50, dtype=torch.float64)}
    noise = noisy(change, 2.0, secret, sent)["a"] - 1
    again = Message(sent.groups, {**sent.scalars, "evaluate": False})
    assert torch.equal(noisy(change, 2.0, secret, again)["a"] - 1, noise)
    for other in (
        noisy(change, 2.0, secret, Message(sent.groups, {**sent.scalars, "round": 4}))["a"] - 1,
        noisy(change, 2.0, secret, Message(sent.groups, {**sent.scalars, "seed": 6}))["a"] - 1,
        noisy(change, 2.0, secret, Message({"weights": {"a": torch.ones(50)}}, sent.scalars))["a"] - 1,
        noisy({"a": change["a"] * (1 + 1e-9)}, 2.0, secret, sent)["a"] - 1,
    ):
        assert not torch.isclose(other, noise).any()


def test_the_key_of_the_noise_is_made_once_and_read_by_its_owner_alone(tmp_path):
    secret = site_secret(tmp_path / "site")
    assert len(secret) == 32 and site_secret(tmp_path / "site") == secret
    (path,) = (tmp_path / "site").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    seeded = {site_secret(tmp_path / name, 7) for name in ("x", "y")} | {site_secret(tmp_path / "x", 8)}
    assert len(seeded) == 3 and not (tmp_path / "x").exists()


class Wide(torch.nn.Module):
    """Enough weights to measure the noise on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3000, 8, dtype=torch.float64))

    def forward(self, x, labels):
        return {"loss": ((x @ self.weight.T).mean(1) - labels).square().mean()}


def test_updates_leave_with_the_noise_that_was_ordered(tmp_path):
    trainer = two_sites(tmp_path, Wide, clip_update=0.5, noise_multiplier=2.0)
    seen = record_messages(trainer)
    trainer.train()
    found = [
        (reply.groups["weights"]["weight"] - sent.groups["weights"]["weight"]).numpy().reshape(-1)
        for _, sent, reply in seen
        if sent.scalars["task"] == "train"
    ]
    for noise in found:  # of 24,000 entries; an update of norm 0.5 does not show
        assert noise.std() == pytest.approx(1.0, rel=0.03) and abs(noise.mean()) < 0.03
    assert abs(np.corrcoef(found)[~np.eye(len(found), dtype=bool)]).max() < 0.03
    assert all("unclipped_norm" not in row for one in trainer.history for row in one["sites"].values())


def test_a_message_that_comes_twice_gets_the_same_noise(tmp_path):
    trainer = two_sites(tmp_path, clip_update=1.0, noise_multiplier=1.0, num_rounds=1)
    give_faults(trainer, {("a", 0): asked_twice})
    trainer.train()
    assert all(row["absent"] == {} for row in trainer.history)


def test_a_seed_makes_runs_repeatable_and_only_a_seed(tmp_path):
    how = {"clip_update": 1.0, "noise_multiplier": 0.3, "num_rounds": 1}
    runs = [two_sites(tmp_path / str(n), noise_seed=seed, **how) for n, seed in enumerate((1, 1, None, None))]
    for run in runs:
        run.train()
    found = [run.history[-1]["digest"] for run in runs]
    assert found[0] == found[1] and len({*found}) == 3


def test_a_resumed_run_goes_on_with_noise_and_account(tmp_path):
    how = {"clip_update": 1.0, "noise_multiplier": 3.0, "noise_seed": 1}
    whole = two_sites(tmp_path / "whole", **how)
    whole.train()
    two_sites(tmp_path / "parts", num_rounds=1, **how).train()
    rest = two_sites(tmp_path / "parts", **how)
    rest.train(resume_from_checkpoint=True)
    assert without_timings(rest.history) == without_timings(whole.history)
    with pytest.raises(InputError, match="noise_multiplier=1.0: the checkpoint"):
        other = two_sites(tmp_path / "parts", num_rounds=3, **{**how, "noise_multiplier": 1.0})
        other.train(resume_from_checkpoint=True)


def exact_epsilon(mu, delta):
    """Of the Gaussian mechanism with sensitivity over noise μ: [Balle and Wang 2018], Theorem 8, by bisection."""

    def spent(e):
        return stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)

    low, high = 0.0, 300.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("z, releases", [(1.0, 1), (4.0, 1), (4.0, 10), (20.0, 1), (20.0, 100), (300.0, 100)])
def test_epsilon_bounds_that_of_the_gaussian_mechanism(z, releases):
    mu = 2 * math.sqrt(releases) / z  # two clipped updates are up to 2 C apart
    exact = exact_epsilon(mu, 1e-5)
    assert exact <= epsilon(z, releases, 1e-5) <= 1.2 * exact + 0.05


def test_epsilon_without_noise_or_release():
    assert epsilon(0.0, 1, 1e-5) == math.inf and epsilon(1.0, 0, 1e-5) == 0


def test_rows_account_for_every_site_that_was_asked(tmp_path, caplog):
    trainer = two_sites(tmp_path, clip_update=1.0, noise_multiplier=10.0)
    give_faults(trainer, {("b", 1): lost, ("a", 0): lost})
    with caplog.at_level(logging.WARNING, "hf_mlopt"):
        trainer.train()
    ratio = 10 * math.sqrt(len(START) / len(TWO))
    assert "hides a site as a whole, not its rows" in caplog.text and f"about {ratio:.3g} times" in caplog.text
    assert [[*row["absent"]] for row in trainer.history] == [["a"], ["b"]]
    assert [row["epsilon"] for row in trainer.history] == [epsilon(10.0, n, 1e-5) for n in (1, 2)]
    rows = [{"sites": {"a": 0}, "absent": {"b": ""}, "attempts": 2}, {"sites": {"b": 0}, "absent": {}}]
    assert num_releases(rows) == 3 and num_releases([]) == 0


def test_a_missing_accountant_is_named_before_the_first_round(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)
    trainer = two_sites(tmp_path, clip_update=1.0, noise_multiplier=1.0)
    with pytest.raises(InputError, match=r"pip install 'hf-mlopt\[privacy\]'"):
        trainer.train()
    assert trainer.history == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clip_update": 0.0}, "clip_update=0.0: must be above 0"),
        ({"clip_update": math.nan}, "clip_update=nan"),
        ({"clip_update": 1.0, "noise_multiplier": -1.0}, "noise_multiplier=-1.0: must be at least 0"),
        ({"noise_multiplier": 1.0}, "noise_multiplier=1.0: is in units of clip_update"),
        ({"target_delta": 0.0}, "target_delta=0.0: must be above 0 and below 1"),
        ({"noise_seed": 0}, "noise_seed=0: has no effect without noise_multiplier"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        arguments(tmp_path, **settings)


def refusal(trainer):
    with pytest.raises(ConfigurationError) as caught:
        trainer.train()
    assert trainer.history == []
    return str(caught.value)


def test_replies_that_hold_more_than_weights_are_refused(tmp_path):
    scaffold = two_sites(tmp_path / "s", algorithm="scaffold", clip_update=1.0)
    assert refusal(scaffold).startswith("clip_update=1.0: replies of scaffold also hold control_change")
    average = two_sites(tmp_path / "d", algorithm="fedavg-lm", mlopt_optim_args={"momentum": 0.9}, clip_update=1.0)
    assert "replies of fedavg-lm also hold local_momentum" in refusal(average)


def test_noise_is_refused_where_buffers_would_leave_without(tmp_path):
    how = {"clip_update": 1.0, "noise_multiplier": 1.0, "evaluate_every": 0, "num_rounds": 1}
    assert "take fedbn, which keeps them there" in refusal(net_federation(tmp_path / "buffers", **how))
    trainer = net_federation(tmp_path / "fedbn", algorithm="fedbn", **how)
    seen = record_messages(trainer)
    trainer.train()
    replies = [reply for _, sent, reply in seen if sent.scalars["task"] == "train"]
    assert replies and all(set(reply.groups) == {"weights"} for reply in replies)
    assert Net(0).norm.running_mean is not None
