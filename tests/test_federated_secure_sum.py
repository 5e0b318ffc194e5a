"""Rounds under masks: the same model as without, nothing of a site in any message, and what happens if one is lost."""

import functools
import json
import stat
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import (
    ALGORITHMS,
    FedAvg,
    FedAvgM,
    FederatedDOMO,
    Message,
    Scaffold,
)
from hf_mlopt.federated.algorithms.averaging import site_seed
from hf_mlopt.federated.engines import InProcessEngine
from hf_mlopt.federated.privacy.masking import vector_size
from hf_mlopt.federated.privacy.secure_round import run_secure_round
from hf_mlopt.federated.reply_filters import ReplyFilters
from hf_mlopt.federated.rounds import RoundFailed, run_round
from hf_mlopt.federated.storage import SiteStore
from tests.federations import (
    NET_SITES,
    FaultyEngine,
    arguments,
    digests,
    federation,
    kept_by,
    lost,
    net_federation,
    record_messages,
    regression_data,
    weights_of,
)


SITES = ("a", "b", "c", "d")
SAMPLES = {"a": 10, "b": 25, "c": 31, "d": 4}
STEP = 2.0**-24


class Toy:
    """Sites without a Trainer, in front of the real filters: their change follows from name, round and seed."""

    def __init__(self, folder, scale=0.1, **settings):
        self.filters = ReplyFilters(arguments(folder, **settings), SiteStore(folder / "sites"))
        self.scale, self.seen = scale, []

    def __call__(self, site, message):
        reply = self._answer(site, message)
        self.seen.append((site, message, reply))
        return reply

    def _answer(self, site, message):
        if message.scalars["task"] == "keys":
            return self.filters.new_key(site, message)
        return self.filters.encode(site, message, self.plain(site, message), None)[0]

    def plain(self, site, message):
        generator = torch.Generator().manual_seed(message.scalars["seed"])

        def moved(tensor):
            if not tensor.is_floating_point():
                return tensor + SAMPLES[site]
            change = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return (tensor.double() + self.scale * change).to(tensor.dtype)

        groups = {
            group: {name: moved(tensor) for name, tensor in message.groups[group].items()}
            for group in ("weights", "buffers")
            if group in message.groups
        }
        number = SAMPLES[site]
        scalars = {"round": message.scalars["round"], "num_samples": number, "start_digest": "same"}
        return Message(groups, {**scalars, "train_loss": 1.0 / number, "lr_sum": number / 64, "num_steps": number})


def start(size=300):
    generator = torch.Generator().manual_seed(1)
    weights = {"w": torch.randn(size, generator=generator), "norm.bias": torch.randn(3, 2, generator=generator)}
    return Message({"weights": weights, "buffers": {"mean": torch.zeros(3), "count": torch.tensor(7)}})


def begun(algorithm, size=300, sites=SITES):
    algorithm.setup(sites, start(size), seed=3)
    return algorithm


def secure(algorithm, engine):
    return run_secure_round(algorithm, engine, {"lr_factor": 1.0, "evaluate": False}, lambda site: None)[0]


def plain(algorithm, toy):
    engine = InProcessEngine(SITES, lambda site, message: toy.plain(site, message))
    return run_round(algorithm, engine, {"lr_factor": 1.0, "evaluate": False}, lambda site: None)[0]


MASKED = [
    *(
        functools.partial(algorithm, **({"local_names": ["norm.*"]} if name == "fedbn" else {}))
        for name, algorithm in ALGORITHMS.items()
        if algorithm.needs_only_mean is True  # of DOMO it depends
    ),
    functools.partial(FedAvg, weighting="uniform"),
    functools.partial(FedAvg, fraction=0.75),
    functools.partial(FedAvgM, server_lr=0.7),
    functools.partial(FederatedDOMO),
    functools.partial(FederatedDOMO, fusion_at="step", weighting="uniform"),
]


def named(part):
    return " ".join([part.func.__name__, *map(str, part.keywords.values())])


@pytest.mark.parametrize("make", MASKED, ids=named)
def test_masked_rounds_equal_plain_ones(tmp_path, make):
    toy, masked, open_ = Toy(tmp_path, secure_sum=True), begun(make()), begun(make())
    for _ in range(3):
        row, other = secure(masked, InProcessEngine(SITES, toy)), plain(open_, toy)
        for name in ("round", "num_sites", "num_samples", "absent", "start_digest"):
            assert row[name] == other[name], name
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-7)
        assert row["attempts"] == 1 and set(row["sites"]) == set(other["sites"])
    for group, tensors in open_.groups.items():
        for name, expected in tensors.items():
            tolerance = 1e-4 if "Ada" in named(make) or "Yogi" in named(make) else 2e-6
            torch.testing.assert_close(masked.groups[group][name], expected, rtol=tolerance, atol=tolerance)
    assert masked.last_rounds == open_.last_rounds and masked.round == 3
    assert set(masked.last_rounds.values()) <= {0, 1, 2} and len(masked.last_rounds) >= row["num_sites"]


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_error_is_that_of_fixed_point(tmp_path, weighting):
    """At most q · 2^-25 over the sum of the weights, plus the rounding of the result to its float64."""
    toy = Toy(tmp_path, secure_sum=True)
    algorithm = FedAvg(weighting=weighting)
    init = Message({"weights": {"w": start().groups["weights"]["w"].double()}})
    algorithm.setup(SITES, init, seed=3)
    sent = algorithm.configure(0)
    ends = {site: toy.plain(site, sent[site]).groups["weights"]["w"].numpy() for site in SITES}
    weights = {site: SAMPLES[site] if weighting == "samples" else 1 for site in SITES}
    expected = sum(weights[site] * ends[site] for site in SITES) / sum(weights.values())
    secure(algorithm, InProcessEngine(SITES, toy))
    error = np.abs(algorithm.groups["weights"]["w"].numpy() - expected).max()
    total = sum(SAMPLES.values()) if weighting == "samples" else 1024 * len(SITES)
    assert 0 < error <= len(SITES) * STEP / 2 / total + 1e-15


def test_clipping_and_noise_come_before_the_masks(tmp_path):
    how = {"clip_update": 0.5, "noise_multiplier": 0.1, "noise_seed": 4}
    masked, algorithm, open_ = Toy(tmp_path / "m", secure_sum=True, **how), begun(FedAvg()), begun(FedAvg())
    secure(algorithm, InProcessEngine(SITES, masked))
    noisy = Toy(tmp_path / "o", **how)
    run_round(open_, InProcessEngine(SITES, noisy), {}, lambda site: None)
    torch.testing.assert_close(algorithm.groups["weights"], open_.groups["weights"], rtol=0, atol=1e-6)
    moved = {site: noisy.plain(site, sent).groups["weights"]["w"] for site, sent, _ in noisy.seen}
    told = {site: reply.groups["weights"]["w"] for site, _, reply in noisy.seen}
    assert all((told[site] - moved[site]).norm() > 1 for site in SITES)


def words_of(seen):
    found = [reply.groups["masked"]["words"] for _, sent, reply in seen if sent.scalars["task"] == "train"]
    return [words.numpy().view(np.uint64) for words in found]


def test_no_message_holds_anything_of_an_update(tmp_path):
    toy = Toy(tmp_path, secure_sum=True)
    algorithm = begun(FedAvg(), size=20_000)
    secure(algorithm, InProcessEngine(SITES, toy))
    for site, sent, reply in toy.seen:
        if sent.scalars["task"] == "keys":
            assert reply.groups == {} and set(reply.scalars) == {"round", "public_key"}
            continue
        assert set(reply.scalars) == {"round", "start_digest", "roster", "request"}
        assert {group: set(tensors) for group, tensors in reply.groups.items()} == {"masked": {"words"}}
        words = reply.groups["masked"]["words"].numpy().view(np.uint64)
        assert len(words) == vector_size(algorithm.template(site).groups)
        counts = Counter(words.tobytes())
        assert stats.chisquare([counts[value] for value in range(256)]).pvalue > 1e-4
        change = toy.plain(site, sent).groups["weights"]["w"].double() - sent.groups["weights"]["w"].double()
        shown = words[-4 - 20_000 : -4].view(np.int64).astype(float)  # w is last, before four scalars
        assert abs(np.corrcoef(shown, change.numpy())[0, 1]) < 4 / np.sqrt(20_000)
    # Any three of the four tell as little.
    partial = sum(words_of(toy.seen)[1:], np.zeros(1, np.uint64))
    counts = Counter(partial.tobytes())
    assert stats.chisquare([counts[value] for value in range(256)]).pvalue > 1e-4
    assert (sum(words_of(toy.seen), np.zeros(1, np.uint64))[-1:].view(np.int64) * STEP)[0] == pytest.approx(
        sum(number * number / 64 for number in SAMPLES.values())
    )


def test_every_sum_has_keys_of_its_own(tmp_path):
    toy = Toy(tmp_path, secure_sum=True)
    algorithm = begun(FedAvg())
    for _ in range(2):
        secure(algorithm, InProcessEngine(SITES, toy))
    keys = [reply.scalars["public_key"] for _, sent, reply in toy.seen if sent.scalars["task"] == "keys"]
    assert len({*keys}) == 8
    path = tmp_path / "sites" / "a" / "secure-sum.json"
    assert not path.exists()
    toy("a", Message({}, {"task": "keys", "round": 2, "attempt": 0}))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_site_masks_for_no_fewer_than_three_and_with_no_foreign_key(tmp_path):
    toy, sent = Toy(tmp_path, secure_sum=True), begun(FedAvg()).configure(0)["a"]
    keys = {site: toy(site, Message({}, {"task": "keys", "round": 0})).scalars["public_key"] for site in SITES}

    def asked_with(members):
        added = {"task": "train", "attempt": 0, "site_weights": "samples", "secure_members": json.dumps(members)}
        return toy("a", Message(sent.groups, {**sent.scalars, **added}))

    with pytest.raises(ConfigurationError, match="a masked sum needs three parties"):
        asked_with({site: keys[site] for site in "ab"})
    with pytest.raises(InputError, match="party 'a' is not in the roster"):
        asked_with({site: keys[site] for site in "bcd"})
    with pytest.raises(InputError, match="the roster gives party 'a' the public key"):
        asked_with({**keys, "a": "11" * 32})
    assert asked_with(keys).groups["masked"]["words"].numel() == vector_size(sent.groups)


def test_a_site_may_start_anew_between_key_and_vector(tmp_path):
    algorithms = [begun(FedAvg()) for _ in range(2)]
    secure(algorithms[0], InProcessEngine(SITES, Toy(tmp_path / "one", secure_sum=True)))
    engine = InProcessEngine(SITES, lambda site, message: Toy(tmp_path / "new", secure_sum=True)(site, message))
    secure(algorithms[1], engine)
    assert Message(algorithms[0].groups) == Message(algorithms[1].groups)  # whatever the masks were


def test_a_site_without_its_key_is_left_out(tmp_path):
    def forgetful(answer, site, message):
        (tmp_path / "sites" / site / "secure-sum.json").unlink()
        return answer(site, message)

    engine = FaultyEngine(SITES, Toy(tmp_path, secure_sum=True), {("d", 0): first_attempt(forgetful)})
    row = secure(begun(FedAvg()), engine)
    assert "site 'd' has no key for this sum" in row["absent"]["d"] and row["num_sites"] == 3


def only(task, fault):
    return lambda answer, site, message: (
        fault(answer, site, message) if message.scalars["task"] == task else answer(site, message)
    )


def first_attempt(fault):
    def once(answer, site, message):
        is_first = message.scalars["task"] == "train" and message.scalars["attempt"] == 0
        return fault(answer, site, message) if is_first else answer(site, message)

    return once


def test_a_lost_vector_makes_the_rest_train_again_from_other_seeds(tmp_path):
    toy, algorithm, twin = Toy(tmp_path, secure_sum=True), begun(FedAvg()), begun(FedAvg())
    row = secure(algorithm, FaultyEngine(SITES, toy, {("b", 0): first_attempt(lost)}))
    assert row["attempts"] == 2 and row["absent"] == {"b": "no answer within 1 s"} and row["num_sites"] == 3
    assert row["num_samples"] == sum(SAMPLES.values()) - SAMPLES["b"] and "b" not in algorithm.last_rounds
    trained = [(site, sent) for site, sent, _ in toy.seen if sent.scalars["task"] == "train"]
    first, second = trained[:4], trained[4:]
    assert [site for site, _ in second] == ["a", "c", "d"]
    seeds = {
        site: (sent.scalars["seed"], *[o.scalars["seed"] for s, o in second if s == site]) for site, sent in first
    }
    for site in ("a", "c", "d"):
        assert seeds[site] == (site_seed(3, 0, site), site_seed(3, 0, f"{site}/1")) and len({*seeds[site]}) == 2
    replies = {site: toy.plain(site, sent) for site, sent in second}
    twin.aggregate(0, replies)
    torch.testing.assert_close(algorithm.groups["weights"], twin.groups["weights"], rtol=0, atol=1e-6)
    # What the server has of both attempts: the difference of the sums is not the missing vector.
    assert algorithm.round == 1
    vector_bytes = 8 * vector_size(algorithm.template("a").groups)
    assert row["bytes_up"] == 6 * vector_bytes and row["sites"]["a"] == {"bytes_up": 2 * vector_bytes}


def test_who_sends_no_key_is_left_out_without_another_attempt(tmp_path):
    algorithm = begun(FedAvg())
    engine = FaultyEngine(SITES, Toy(tmp_path, secure_sum=True), {("b", 0): only("keys", lost)})
    row = secure(algorithm, engine)
    assert row["attempts"] == 1 and [*row["absent"]] == ["b"] and row["num_sites"] == 3


@pytest.mark.parametrize("key", ["", "ab", 7, "g" * 64, "that of a"])
def test_who_sends_no_proper_key_is_left_out(tmp_path, key):
    toy = Toy(tmp_path, secure_sum=True)

    def forged(answer, site, message):
        stolen = [reply.scalars["public_key"] for name, _, reply in toy.seen if name == "a"]
        return Message({}, {"round": 0, "public_key": stolen[0] if key == "that of a" else key})

    row = secure(begun(FedAvg()), FaultyEngine(SITES, toy, {("d", 0): only("keys", forged)}))
    assert row["absent"] == {"d": "is no public key of its own for round 0"} and row["num_sites"] == 3


def test_a_vector_that_comes_twice_counts_once(tmp_path):
    algorithms = [begun(FedAvg()) for _ in range(2)]
    for number, algorithm in enumerate(algorithms):
        engine = FaultyEngine(SITES, Toy(tmp_path, secure_sum=True), twice=bool(number), shuffled=bool(number))
        row = secure(algorithm, engine)
        assert row["absent"] == {} and row["num_sites"] == 4
    assert Message(algorithms[0].groups) == Message(algorithms[1].groups)


def test_fewer_than_three_are_no_sum_and_leave_all_as_it_was(tmp_path):
    algorithm = begun(FedAvg())
    before = algorithm.state_dict()
    faults = {("a", 0): only("keys", lost), ("b", 0): first_attempt(lost)}
    with pytest.raises(RoundFailed, match="2 sites can put together a masked sum, 3 are needed. a: no answer"):
        secure(algorithm, FaultyEngine(SITES, Toy(tmp_path, secure_sum=True), faults))
    assert algorithm.round == 0 and Message(before["groups"]) == Message(algorithm.groups)
    assert secure(algorithm, InProcessEngine(SITES, Toy(tmp_path, secure_sum=True)))["num_sites"] == 4


def test_attempts_end(tmp_path):
    sites = [f"s{number}" for number in range(7)]
    SAMPLES.update(dict.fromkeys(sites, 5))

    def in_turn(answer, site, message):
        is_its_turn = message.scalars["task"] == "train" and site == f"s{message.scalars['attempt']}"
        return None if is_its_turn else answer(site, message)

    engine = FaultyEngine(sites, Toy(tmp_path, secure_sum=True), {(site, 0): in_turn for site in sites})
    with pytest.raises(RoundFailed, match="a site was missing in each of 3 attempts. s0: .*s1: .*s2: "):
        secure(begun(FedAvg(), sites=sites), engine)


def test_a_site_masks_one_vector_with_a_key_and_no_second(tmp_path):
    toy, algorithm = Toy(tmp_path, secure_sum=True), begun(FedAvg())

    def twice(answer, site, message):
        answer(site, message)
        return answer(site, message)

    row = secure(algorithm, FaultyEngine(SITES, toy, {("c", 0): first_attempt(twice)}))
    assert row["attempts"] == 2 and "has no key for this sum: it has been used" in row["absent"]["c"]


def changed_reply(change):
    def fault(answer, site, message):
        reply = answer(site, message)
        groups, scalars = {"masked": dict(reply.groups["masked"])}, dict(reply.scalars)
        change(groups["masked"], scalars)
        return Message(groups, scalars)

    return first_attempt(fault)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda group, scalars: group.update(words=group["words"][1:]), "is no masked vector of 314 words"),
        (lambda group, scalars: group.update(words=group["words"].double()), "is no masked vector of 314 words"),
        (lambda group, scalars: group.clear(), "is no masked vector of 314 words"),
        (lambda group, scalars: scalars.update(request="00"), "is masked for another request"),
        (lambda group, scalars: scalars.update(roster="no hex"), "is masked for another roster"),
    ],
)
def test_a_vector_that_does_not_fit_is_a_failure_of_its_site(tmp_path, change, reason):
    engine = FaultyEngine(SITES, Toy(tmp_path, secure_sum=True), {("a", 0): changed_reply(change)})
    row = secure(begun(FedAvg()), engine)
    assert reason in row["absent"]["a"] and row["attempts"] == 2 and row["num_sites"] == 3


def test_masks_that_do_not_cancel_are_noticed(tmp_path):
    def with_other_words(group, scalars):
        group["words"] = group["words"] + torch.arange(len(group["words"]))

    engine = FaultyEngine(SITES, Toy(tmp_path, secure_sum=True), {("a", 0): changed_reply(with_other_words)})
    with pytest.raises(RoundFailed, match="the masks do not cancel"):
        secure(begun(FedAvg()), engine)


@pytest.mark.parametrize(
    "scale, reason", [(1e12, "is beyond 1.37439e.11, the share"), (float("inf"), "is not finite")]
)
def test_what_does_not_fit_into_the_sum_is_said_without_its_value(tmp_path, scale, reason):
    toy = Toy(tmp_path, scale, secure_sum=True)
    with pytest.raises(RoundFailed, match=reason) as caught:
        secure(begun(FedAvg()), InProcessEngine(SITES, toy))
    sent = begun(FedAvg()).configure(0)["a"]
    values = [abs(float(value)) for value in toy.plain("a", sent).groups["weights"]["w"][:50]]
    assert not any(f"{value:.3g}"[:4] in str(caught.value) for value in values if value < float("inf"))


def test_who_should_mask_sends_nothing_in_the_clear(tmp_path):
    algorithm = begun(FedAvg())
    with pytest.raises(RoundFailed, match="the server asks for an update without a mask"):
        run_round(algorithm, InProcessEngine(SITES, Toy(tmp_path, secure_sum=True)), {}, lambda site: None)
    with pytest.raises(RoundFailed, match="secure_sum=False: the server asks site 'a' for a masked sum"):
        secure(algorithm, InProcessEngine(SITES, Toy(tmp_path)))


def test_an_algorithm_that_needs_each_reply_takes_no_mean():
    scaffold = begun(Scaffold())
    with pytest.raises(ConfigurationError, match="algorithm='scaffold': needs each reply by itself"):
        scaffold.aggregate_mean(0, start(), list(SITES), 10)
    algorithm = begun(FedAvg(min_sites=2))
    with pytest.raises(RuntimeError, match="1 usable replies, 2 are needed"):
        algorithm.aggregate_mean(0, start(), ["a"], 10)
    with pytest.raises(RuntimeError, match="does not look like a reply"):
        algorithm.aggregate_mean(0, Message({"weights": start().groups["weights"]}), list(SITES), 10)
    assert algorithm.round == 0


# With real Trainers.

QUIET = {"evaluate_every": 0, "num_rounds": 2}
THREE = ("a", "b", "c")


def three_sites(folder, **settings):
    return federation(folder, sites={site: regression_data(site) for site in THREE}, **{**QUIET, **settings})


def refusal(trainer):
    with pytest.raises(ConfigurationError) as caught:
        trainer.train()
    assert trainer.history == []
    return str(caught.value)


def test_refusals_come_before_the_first_round(tmp_path):
    scaffold = three_sites(tmp_path / "s", algorithm="scaffold", secure_sum=True)
    assert "secure_sum=True: replies of scaffold also hold control_change" in refusal(scaffold)
    two = federation(tmp_path / "two", sites={site: regression_data(site) for site in "ab"}, secure_sum=True)
    assert "a round asks 2 sites, and a masked sum needs 3" in refusal(two)
    half = federation(tmp_path / "half", site_fraction=0.5, secure_sum=True)
    assert "a round asks 2 sites, and a masked sum needs 3" in refusal(half)


def test_trainers_agree_with_and_without_masks(tmp_path):
    plain, masked = (three_sites(tmp_path / str(on), algorithm="domo", secure_sum=on) for on in (False, True))
    seen = record_messages(masked)
    plain.train(), masked.train()
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(masked)[name], weight, rtol=0, atol=1e-7)
    for row, other in zip(masked.history, plain.history, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-6)
        assert row["absent"] == {} and all(set(said) == {"bytes_up"} for said in row["sites"].values())
    assert masked.history[0]["start_digest"] == plain.history[0]["start_digest"]
    told = [reply.scalars for _, sent, reply in seen if sent.scalars["task"] == "train"]
    assert len(told) == 6 and not any({"train_loss", "num_samples", "lr_sum"} & set(said) for said in told)
    json.dumps(masked.history)


@pytest.mark.slow
@pytest.mark.distributed
def test_any_process_may_answer_for_any_site(tmp_path):
    here, there = (three_sites(tmp_path / str(n), secure_sum=True, num_workers=n) for n in (0, 2))
    here.train(), there.train()
    assert digests(here.history) == digests(there.history)  # masks are random, and nothing is left of them


def test_personal_models_buffers_and_evaluations_go_on_under_masks(tmp_path):
    sites = {site: NET_SITES[site] for site in THREE}
    masked, plain = (
        net_federation(tmp_path / str(secure), sites, algorithm="ditto", secure_sum=secure, num_rounds=2)
        for secure in (True, False)
    )
    masked.train(), plain.train()
    for group in ("weights", "buffers"):
        found, expected = masked.algorithm.groups[group], plain.algorithm.groups[group]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for row, other in zip(masked.history, plain.history, strict=True):
        assert row["evaluation"]["eval_loss"] == pytest.approx(other["evaluation"]["eval_loss"], abs=1e-4)
    kept, wanted = kept_by(masked, "a")[1].groups["weights"], kept_by(plain, "a")[1].groups["weights"]
    torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-4)
