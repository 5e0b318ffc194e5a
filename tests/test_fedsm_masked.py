"""FedSM under masks: the open form's models, at sites that keep theirs, from sums that tell of no site."""

import functools
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import FedSM, MaskedFedSM, Message
from hf_mlopt.federated.algorithms.fedsm import with_new_site
from hf_mlopt.federated.engines import InProcessEngine
from hf_mlopt.federated.privacy.masking import vector_size
from hf_mlopt.federated.privacy.secure_round import run_secure_round
from hf_mlopt.federated.reply_filters import ReplyFilters
from hf_mlopt.federated.rounds import RoundFailed
from hf_mlopt.federated.segmentation_data import disc_sites
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.site_rules import MaskedFedSMRule
from hf_mlopt.federated.storage import SiteStore
from tests.federations import (
    ETA,
    SAMPLES,
    SITES,
    START,
    STEPS,
    FaultyEngine,
    KillAt,
    arguments,
    asked_twice,
    federation,
    flat,
    give_faults,
    gradient,
    kept_by,
    killed,
    lost,
    record_messages,
    same_bits,
    weights_of,
    without_timings,
)
from tests.reference.fedsm import fedsm
from tests.reference.fedsm_masked import masked_fedsm
from tests.test_fedsm import INPUTS, PROBLEM, Run
from tests.test_fedsm import START as SELECTOR


ALONE = {"selector": "none"}
LEARNED = {"selector": "learned", "selector_steps": 2}
MOMENTS = ("selector_m", "selector_v")
# Segformer has buffers, floating point and a count.
make_model = functools.partial(SegmentationModel, "segformer", width=2)
DISCS = disc_sites(["c", "a", "b", "d"], 10, size=16)
SETTINGS = {"algorithm": "fedsm", "per_device_train_batch_size": 4, "local_steps": 2, "learning_rate": 1e-3}


def discs(folder, secure_sum=True, names="abc", **settings):
    sites = {name: {"train": DISCS[name].select(range(6)), "test": DISCS[name].select(range(6, 10))} for name in names}
    settings = {"mlopt_optim": "adamw", "algorithm_args": LEARNED, **SETTINGS, **settings}
    return federation(folder, make_model, sites, secure_sum=secure_sum, **settings)


def squares(folder, secure_sum=True, pull=0.7, **settings):
    """Least squares in float64 and whole batches: no seed matters, so a round that is repeated is the same again."""
    options = {"algorithm_args": {**ALONE, "pull": pull}, "evaluate_every": 0, **settings}
    return federation(folder, algorithm="fedsm", secure_sum=secure_sum, **options)


def personal_of(trainer, site):
    """What a site would go on from: of the open form what the server sends it, else what it makes of a mean."""
    message = trainer.algorithm.evaluation()[site]
    if isinstance(trainer.algorithm, FedSM):
        groups = {"weights": "personal", "buffers": "personal_buffers"}
        return {group: message.groups[kind] for group, kind in groups.items() if kind in message.groups}
    state = kept_by(trainer, site).get(message.scalars["state_round"])
    return MaskedFedSMRule(message, state, None).personal().groups


def without_key(answer, site, message):
    """Absent before anybody has trained, so that nobody trains again."""
    return None if message.scalars["task"] == "keys" else answer(site, message)


def without_vector(answer, site, message):
    return lost(answer, site, message) if message.scalars["task"] == "train" else answer(site, message)


# The same models


@pytest.mark.parametrize("pull", [0.7, 1.0, 0.25, 0.0])
def test_trainers_follow_the_twins(tmp_path, pull):
    """Absent are `b` in rounds 1 and 2, and `d` in round 3: both are pulled by what they were last part of."""
    faults = {("b", 1): without_vector, ("b", 2): without_key, ("d", 3): without_vector}
    trainer = give_faults(squares(tmp_path, pull=pull, num_rounds=5), faults)
    trainer.train()
    assert [[*row["absent"]] for row in trainer.history] == [[], ["b"], ["b"], ["d"], []]
    assert [row["attempts"] for row in trainer.history] == [1, 2, 1, 2, 1]
    no_selector = np.zeros((1, 1)), {site: np.zeros((1, 1)) for site in SITES}
    for twin in (masked_fedsm, fedsm):
        *_, (common, personal, _) = twin(
            *(START, no_selector[0], lambda k, w, r, i: gradient(k, w), no_selector[1]),
            *(["abcd", "acd", "acd", "abc", "abcd"], SAMPLES, STEPS, ETA, pull, 0, 0.1),
        )
        np.testing.assert_allclose(flat(weights_of(trainer)), common, rtol=0, atol=1e-8)
        for site in SITES:
            np.testing.assert_allclose(flat(personal_of(trainer, site)["weights"]), personal[site], rtol=0, atol=1e-9)


def test_a_site_that_is_first_asked_late_begins_where_the_others_began(tmp_path):
    """And of three sites that answer each is pulled by three."""
    masked, open_ = (squares(tmp_path / str(on), on, site_fraction=0.75, num_rounds=4) for on in (True, False))
    absent = [[site for site in "abcd" if site not in row["sites"]] for row in masked.history]
    for number_of_rounds in (1, 4):
        for trainer in (masked, open_):
            trainer.args.num_rounds = number_of_rounds
            trainer.train(resume_from_checkpoint=number_of_rounds > 1)
        absent = [[site for site in "abcd" if site not in row["sites"]] for row in masked.history]
        for site in SITES:
            found, expected = personal_of(masked, site)["weights"], personal_of(open_, site)["weights"]
            np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-9)
    assert all(len(sites) == 1 for sites in absent) and len({*map(str, absent)}) > 1
    (late,) = absent[0]
    sent = masked.algorithm.evaluation()
    assert {message.scalars["num_pulled"] for message in sent.values()} == {3} and late in sent


def test_the_masked_form_is_the_open_one(tmp_path):
    """With buffers and the selector, `b` absent in round 1. By SGD: Adam would make of rounding steps of full size."""
    options = {"mlopt_optim": "sgd", "learning_rate": 0.05, "evaluate_every": 3}
    masked, open_ = (discs(tmp_path / str(on), on, "abcd", **options) for on in (True, False))
    give_faults(masked, {("b", 1): without_key}).train()
    give_faults(open_, {("b", 1): lost}).train()
    assert masked.algorithm.last_rounds == open_.algorithm.last_rounds == dict.fromkeys("abcd", 2)
    for group in ("weights", "buffers", "selector", *MOMENTS, "selector_step"):
        found, expected = masked.algorithm.groups[group], open_.algorithm.groups[group]
        torch.testing.assert_close(found, dict(expected), rtol=1e-4, atol=1e-5)
    for site in DISCS:
        torch.testing.assert_close(personal_of(masked, site), personal_of(open_, site), rtol=1e-4, atol=1e-5)
        ends = masked.history[-1]["evaluation"]["sites"][site], open_.history[-1]["evaluation"]["sites"][site]
        assert set(ends[0]) == {"num_evaluated", "eval_loss", "eval_personal_loss"}
        assert ends[0] == pytest.approx(ends[1], abs=1e-4)
        assert abs(ends[0]["eval_loss"] - ends[0]["eval_personal_loss"]) > 1e-4


# What the server does with a sum


class Toy:
    """Sites without a Trainer, in front of the real filters, with moments as small as a selector's become."""

    def __init__(self, folder, **settings):
        self.filters = ReplyFilters(arguments(folder, **settings), SiteStore(folder / "sites"))
        self.seen = []

    def __call__(self, site, message):
        if message.scalars["task"] == "keys":
            reply = self.filters.new_key(site, message)
        else:
            reply = self.filters.encode(site, message, self.plain(site, message), None)[0]
        self.seen.append((site, message, reply))
        return reply

    def plain(self, site, message):
        generator = torch.Generator().manual_seed(message.scalars["seed"])

        def moved(group, tensor):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if group in MOMENTS:
                return 1e-6 * noise if group == "selector_m" else 1e-12 * noise.square()
            return (tensor.double() + 0.1 * noise).to(tensor.dtype)

        like = {**message.groups, **{name: message.groups["selector"] for name in MOMENTS}}
        groups = {
            group: {name: moved(group, tensor) for name, tensor in sorted(like[group].items())}
            for group in ("weights", "personal", "selector", *MOMENTS)
        }
        number = SAMPLES[site]
        scalars = {"round": message.scalars["round"], "num_samples": number, "start_digest": "same"}
        scalars |= {"selector_step": message.scalars["selector_step"] + 1}
        return Message(groups, {**scalars, "train_loss": 1.0 / number, "lr_sum": number / 64, "num_steps": number})


def begun(size=5, algorithm_cls=MaskedFedSM, sites=SITES, **options):
    generator = torch.Generator().manual_seed(1)
    algorithm = algorithm_cls(**options)
    groups = {
        name: {"w": torch.randn(count, generator=generator, dtype=torch.float64)}
        for name, count in (("weights", size), ("selector", 40))
    }
    algorithm.setup(sites, Message({group: groups[group] for group in groups if _takes(algorithm, group)}), seed=3)
    return algorithm


def _takes(algorithm, group):
    return group == "weights" or algorithm.selector.takes_weights


class Rows(Toy):
    """The sites of the open form's tests, with the rule's way of going on from what they have kept."""

    def __init__(self, folder, **settings):
        super().__init__(folder, **settings)
        self.run, self.kept = Run(selector_steps=2), {}

    def rule(self, site, message):
        return MaskedFedSMRule(message, self.kept.get((site, message.scalars["state_round"])), None)

    def plain(self, site, message):
        personal = self.rule(site, message).personal().groups["weights"]
        reply = self.run.reply(site, Message({**message.groups, "personal": personal}, message.scalars))
        self.kept[site, message.scalars["round"]] = Message({"personal": reply.groups["personal"]})
        return Message(reply.groups, {**reply.scalars, "start_digest": "", "train_loss": 0.5, "lr_sum": 1.0})


def secure(algorithm, engine):
    return run_secure_round(algorithm, engine, {}, lambda site: None)[0]


def state_groups(algorithm):
    return Message(algorithm.state_dict()["groups"])


def test_all_that_is_summed_follows_the_twin(tmp_path):
    """Round for round: the common model, the personal ones and the selector with its moments."""
    toy, algorithm = Rows(tmp_path, secure_sum=True), MaskedFedSM(selector_steps=2)
    algorithm.setup(SITES, toy.run.init(), seed=3)
    engine = FaultyEngine(SITES, toy, {("b", 1): without_key, ("c", 2): without_vector, ("c", 3): without_key})
    present, samples = [[0, 1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 3], [0, 1, 2, 3]], {0: 10, 1: 20, 2: 30, 3: 40}
    twin = masked_fedsm(
        *(PROBLEM.start, SELECTOR, PROBLEM.client_gradient, INPUTS),
        *(present, samples, 4, 0.02, 0.7, 2, 0.01),
    )
    names = ("a.weight", "b.weight", "norm.bias")
    for number, (common, personal, (W, m, v, s)) in enumerate(twin):
        assert secure(algorithm, engine)["num_sites"] == len(present[number])
        np.testing.assert_allclose(flat(algorithm.groups["weights"], names), common, rtol=0, atol=1e-8)
        for k, (site, message) in enumerate(algorithm.evaluation().items()):
            found = toy.rule(site, message).personal().groups["weights"]
            np.testing.assert_allclose(flat(found, names), personal[k], rtol=0, atol=1e-9)
        for name, value in (("selector", W), ("selector_m", m), ("selector_v", v)):
            np.testing.assert_allclose(algorithm.groups[name]["weight"].numpy(), value, rtol=0, atol=1e-13)
        assert int(algorithm.groups["selector_step"]["s"]) == s


@pytest.mark.parametrize("selector_weighting", ["samples", "uniform"])
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_every_part_has_its_own_weights_and_digits_enough(tmp_path, weighting, selector_weighting):
    """Adam divides m by the root of v: both come through a sum of steps of 2^-24 though they are far smaller."""
    options = {"weighting": weighting, "selector_weighting": selector_weighting}
    toy, masked, open_ = Toy(tmp_path, secure_sum=True), begun(**options), begun(**options)
    sent = masked.configure(0)
    replies = {site: toy.plain(site, message) for site, message in sent.items()}
    secure(masked, InProcessEngine(SITES, toy))
    open_.aggregate(0, replies)
    of_model = SAMPLES if weighting == "samples" else dict.fromkeys(SITES, 1)
    of_selector = dict.fromkeys(SITES, 1) if selector_weighting == "uniform" else of_model
    for group, shares in (
        ("weights", of_model),
        ("personal", dict.fromkeys(SITES, 1)),
        *((name, of_selector) for name in ("selector", *MOMENTS)),
    ):
        mean = sum(shares[site] * replies[site].groups[group]["w"] for site in SITES) / sum(shares.values())
        tolerance = {"rtol": 0, "atol": {"weights": 2e-8, "personal": 2e-8, "selector": 1e-15}.get(group, 1e-21)}
        for algorithm in (masked, open_):
            found = algorithm.evaluation()["a"].groups if group == "personal" else algorithm.groups
            torch.testing.assert_close(found[group]["w"], mean, **tolerance)
    assert int(masked.groups["selector_step"]["s"]) == 1 and masked.last_rounds == open_.last_rounds


def test_no_message_holds_anything_of_a_site(tmp_path):
    toy, algorithm = Toy(tmp_path, secure_sum=True), begun(size=20_000)
    for _ in range(2):
        secure(algorithm, InProcessEngine(SITES, toy))
    for site, sent, reply in toy.seen:
        if sent.scalars["task"] == "keys":
            assert reply.groups == {} and set(reply.scalars) == {"round", "public_key"}
            continue
        assert set(reply.scalars) == {"round", "start_digest", "roster", "request"}
        assert {group: set(tensors) for group, tensors in reply.groups.items()} == {"masked": {"words"}}
        words = reply.groups["masked"]["words"].numpy().view(np.uint64)
        # The common and the personal model, two words a number of the selector, and four scalars.
        assert len(words) == vector_size(algorithm.template(site).groups) == 2 * 20_000 + 6 * 40 + 4
        counts = Counter(words.tobytes())
        assert stats.chisquare([counts[value] for value in range(256)]).pvalue > 1e-4
        personal = toy.plain(site, sent).groups["personal"]["w"].numpy()
        shown = words[:20_000].view(np.int64).astype(float)
        assert abs(np.corrcoef(shown, personal)[0, 1]) < 4 / np.sqrt(20_000)
    words = [reply.groups["masked"]["words"] for _, sent, reply in toy.seen if sent.scalars["task"] == "train"]
    ends = [
        toy.plain(site, sent).groups["personal"]["w"] for site, sent, _ in toy.seen if sent.scalars["task"] == "train"
    ]
    total = sum(word.numpy().view(np.uint64) for word in words[:4])[:20_000].view(np.int64) / 2**24 / 1024
    np.testing.assert_allclose(total, sum(ends[:4]).numpy(), rtol=0, atol=1e-8)  # all of it, and nothing else


def test_the_server_never_holds_a_personal_model(tmp_path):
    trainer = discs(tmp_path, num_rounds=2, evaluate_every=2)
    seen = record_messages(trainer)
    trainer.train()
    for round in (0, 1):
        ends = {site: kept_by(trainer, site)[round] for site in "abc"}
        assert all(set(end.groups) == {"personal", "personal_buffers"} for end in ends.values())
        held = [trainer.algorithm.state_dict()["groups"], *(one.groups for _, *pair in seen for one in pair)]
        for groups in held:
            for group, tensors in groups.items():
                assert not any(same_bits(tensors, end.groups[kind]) for end in ends.values() for kind in end.groups), (
                    group
                )
    mean = trainer.algorithm.evaluation()["a"].groups["personal"]
    for name, value in mean.items():
        expected = sum(end.groups["personal"][name] for end in ends.values()) / 3
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_bytes_of_a_round_and_means_that_are_kept():
    """θ of the mean, the same for all, whatever K is; older ones for as long as somebody is behind."""
    algorithm, theta, theta_s = begun(), 5 * 8, 40 * 8

    def ended(sites):
        template = algorithm.template("a")
        mean = Message({group: dict(tensors) for group, tensors in template.groups.items()})
        algorithm.aggregate_mean(algorithm.round, mean, list(sites), 10)
        kept = {int(group.partition("/")[2]) for group in algorithm.state_dict()["groups"] if "/" in group}
        pulled = [message.scalars["num_pulled"] for message in algorithm.evaluation().values()]
        return sorted(kept), pulled

    assert {message.nbytes for message in algorithm.configure(0).values()} == {2 * theta + theta_s}
    assert ended("abc") == ([-1, 0], [3, 3, 3, 1])
    assert {message.nbytes for message in algorithm.configure(1).values()} == {2 * theta + 3 * theta_s}
    assert ended("acd") == ([0, 1], [3, 3, 3, 3])
    assert ended("abcd") == ([2], [4, 4, 4, 4])
    assert ended("abc") == ([2, 3], [3, 3, 3, 4])


@pytest.mark.parametrize("buffers, counts", [("average", (2, 3)), ("local", (1, 4))])
def test_buffers_are_pulled_or_stay_and_means_of_counts_are_not_rounded_before(buffers, counts):
    algorithm = MaskedFedSM(**ALONE, buffers=buffers)
    count = {"count": torch.tensor(0)}
    algorithm.setup(["a", "b"], Message({"weights": {"w": torch.zeros(1)}, "buffers": count}), seed=0)
    ends = {"a": 2**40 + 1, "b": 2**40 + 4}
    replies = {}
    for site, end in ends.items():
        like = algorithm.template(site)
        groups = {**like.groups, "personal_buffers": {"count": torch.tensor(end)}}
        replies[site] = Message(groups, {**like.scalars, "num_samples": 1})
    algorithm.aggregate(0, replies)
    for site, expected in zip("ab", counts, strict=True):  # .7 of the own and .3 of the other's, then rounded
        rule = MaskedFedSMRule(algorithm.evaluation()[site], Message(replies[site].groups), None)
        pulled = rule.personal().groups["buffers"]["count"]
        assert pulled.dtype == torch.int64 and int(pulled) - 2**40 == expected


def test_a_site_that_answers_alone_is_not_pulled():
    """Masks never let it come to that; the arithmetic divides by nothing."""
    algorithm = begun(sites=["a"], **ALONE, pull=0.3)
    like = algorithm.template("a")
    end = {"w": torch.tensor([-0.0, 1e-30, 3.0, 4.0, 5.0], dtype=torch.float64)}
    algorithm.aggregate(0, {"a": Message({**like.groups, "personal": end}, {**like.scalars, "num_samples": 3})})
    message = algorithm.evaluation()["a"]
    rule = MaskedFedSMRule(message, Message({"personal": end}), None)
    assert message.scalars["num_pulled"] == 1 and same_bits(rule.personal().groups["weights"], end)


# Faults


def test_replies_that_come_twice_or_in_another_order_change_nothing(tmp_path):
    trainers = [squares(tmp_path / str(twice), num_rounds=2) for twice in (False, True)]
    for trainer, twice in zip(trainers, (False, True), strict=True):
        give_faults(trainer, twice=twice, shuffled=twice).train()
    assert state_groups(trainers[0].algorithm) == state_groups(trainers[1].algorithm)
    for site in SITES:
        assert Message(personal_of(trainers[0], site)) == Message(personal_of(trainers[1], site))


def test_a_message_that_comes_twice_is_answered_once_and_leaves_the_state_of_the_first(tmp_path):
    """The site has no key any more; it is left out, and goes on from the round before."""

    def twice_in_round_1(answer, site, message):
        if message.scalars["task"] == "keys":
            return answer(site, message)
        return asked_twice(answer, site, message)

    trainer = give_faults(squares(tmp_path), {("c", 1): twice_in_round_1})
    trainer.train()
    assert "site 'c' has no key for this sum" in trainer.history[1]["absent"]["c"]
    twin = give_faults(squares(tmp_path / "twin"), {("c", 1): without_key})
    twin.train()
    for site in SITES:
        found, expected = personal_of(trainer, site)["weights"], personal_of(twin, site)["weights"]
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-12)


def test_a_site_that_has_lost_its_model_is_named_and_left_out(tmp_path):
    trainer = squares(tmp_path)

    def forgetful(answer, site, message):
        shutil.rmtree(trainer.client.store.folder / site / trainer.training, ignore_errors=True)
        return answer(site, message)

    give_faults(trainer, {("d", 1): forgetful})
    trainer.train()
    assert "site 'd' has lost its state of fedsm-masked after round 0" in trainer.history[1]["absent"]["d"]
    assert [row["num_sites"] for row in trainer.history] == [4, 3, 3]


def test_with_min_sites_of_all_no_sum_lacks_a_site(tmp_path):
    """Or the difference to the sum of the round before would be near the model of the site that is missing."""
    trainer = give_faults(squares(tmp_path, min_sites=4, num_rounds=2), {("b", 1): without_key})
    with pytest.raises(RoundFailed, match="3 sites can put together a masked sum, 4 are needed. b: no answer"):
        trainer.train()
    resumed, twin = squares(tmp_path, min_sites=4, num_rounds=2), squares(tmp_path / "twin", num_rounds=2)
    resumed.train(resume_from_checkpoint=True), twin.train()
    assert state_groups(resumed.algorithm) == state_groups(twin.algorithm)


def test_a_server_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path):
    """In the middle of round 2, in which `a` has trained already; and a site too is another process than before."""
    settings = {"num_rounds": 4, "evaluate_every": 0}
    undisturbed = discs(tmp_path / "undisturbed", **settings)
    undisturbed.train()
    counting = KillAt("on_train_begin", 2 * 3 * 2 + 4)
    assert killed(lambda: discs(tmp_path / "killed", **settings, site_callbacks=lambda site: [counting]).train())
    assert (tmp_path / "killed" / "checkpoint-2").is_dir() and not (tmp_path / "killed" / "checkpoint-3").exists()
    resumed = discs(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert without_timings(resumed.history) == without_timings(undisturbed.history)
    first, second = undisturbed.algorithm.state_dict(), resumed.algorithm.state_dict()
    assert Message(first.pop("groups")) == Message(second.pop("groups")) and first == second
    for site in "abc":
        assert kept_by(undisturbed, site) == kept_by(resumed, site) and set(kept_by(resumed, site)) == {2, 3}


@pytest.mark.parametrize("is_set_up", [True, False])
def test_a_state_with_means_of_several_rounds_is_resumed(tmp_path, is_set_up):
    algorithm, toy = begun(), Toy(tmp_path / "1", secure_sum=True)
    secure(algorithm, FaultyEngine(SITES, toy, {("b", 0): without_key}))
    state = algorithm.state_dict()
    resumed = begun() if is_set_up else MaskedFedSM()
    resumed.load_state_dict(state)
    for one, folder in ((algorithm, "2"), (resumed, "3")):
        secure(one, FaultyEngine(SITES, Toy(tmp_path / folder, secure_sum=True), {("d", 1): without_key}))
        assert {group for group in one.state_dict()["groups"] if "/" in group} == {
            f"{kind}/{round}" for kind in ("personal", "personal_sites") for round in (0, 1)
        }
    assert state_groups(algorithm) == state_groups(resumed) != Message(state["groups"])
    assert algorithm.configure(2) == resumed.configure(2)


@pytest.mark.slow
@pytest.mark.distributed
def test_any_process_may_answer_for_any_site(tmp_path):
    here, there = (discs(tmp_path / str(n), num_workers=n) for n in (0, 2))
    here.train(), there.train()
    assert without_timings(here.history) == without_timings(there.history)
    assert state_groups(here.algorithm) == state_groups(there.algorithm)


# What is refused


@pytest.mark.parametrize(
    "settings, match",
    [
        (
            {"algorithm_args": {"selector": "moments"}},
            "algorithm_args.selector='moments': needs each site's statistics",
        ),
        ({"release_personal": True}, "release_personal=True: under secure_sum the server has no personal models"),
        ({"clip_update": 1.0}, "clip_update=1.0: replies of fedsm also hold personal"),
        ({"update_codec": "orq-9"}, "update_codec='orq-9': masked words cannot be compressed"),
        ({"auto_fedrl": {}}, "secure_sum=True: auto_fedrl needs the loss of each site"),
        ({"site_fraction": 0.5}, "a round asks 2 sites, and a masked sum needs 3"),
    ],
)
def test_what_masks_do_not_go_with_is_said_before_the_first_round(tmp_path, settings, match):
    with pytest.raises(ConfigurationError, match=match):
        discs(tmp_path, **settings).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_open_form_takes_no_sum(tmp_path):
    trainer = squares(tmp_path)
    trainer.algorithm = FedSM(**ALONE)
    with pytest.raises(ConfigurationError, match="secure_sum=True: replies of fedsm also hold personal"):
        trainer.train()


def test_states_of_one_form_are_not_taken_for_those_of_the_other(tmp_path):
    masked, open_ = begun(), begun(algorithm_cls=FedSM)
    states = masked.state_dict(), open_.state_dict()
    with pytest.raises(InputError, match="the state is that of 'fedsm', not of 'fedsm-masked'"):
        masked.load_state_dict(states[1])
    with pytest.raises(InputError, match="the state is that of 'fedsm-masked', not of 'fedsm'"):
        open_.load_state_dict(states[0])
    lacking = {**states[0], "last_rounds": {"a": 0}}
    with pytest.raises(InputError, match=r"means of rounds \[-1\], not of \[-1, 0\]"):
        masked.load_state_dict(lacking)
    assert masked.state_dict().keys() == states[0].keys() and state_groups(masked) == Message(states[0]["groups"])
    with pytest.raises(InputError, match="'fedsm-masked', which holds no personal models to be mixed"):
        with_new_site(states[0], "e", dict.fromkeys(SITES, 0.25))


def test_a_training_does_not_go_on_in_the_other_form(tmp_path):
    squares(tmp_path, num_rounds=1).train()
    with pytest.raises(InputError, match="secure_sum=False: the checkpoint checkpoint-1 is of a run with True"):
        squares(tmp_path, secure_sum=False).train(resume_from_checkpoint=True)
