"""What the rounds of all federated algorithms share: messages, refusals, the choice of sites, the server's state."""

import copy
import json
import subprocess
import sys
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import ALGORITHMS, FedAvg, FedAvgM, Message, check_reply
from hf_mlopt.federated.algorithms.message import DTYPES


OPTIONS = {"fedbn": {"local_names": ["bias"]}, "domo": {"local_state": "average"}, "fedsm": {"selector": "none"}}


def example():
    weights = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([float("nan"), -0.0, 1e-45])}
    others = {"n": torch.tensor(7), "none": torch.empty(0, 2), "half": torch.tensor([1.5], dtype=torch.bfloat16)}
    return Message({"weights": weights, "buffers": others, "empty": {}}, {"round": 3, "lr": 0.1, "a": "x", "ok": True})


def changed(message, group=None, name=None, tensor=None, **scalars):
    groups = {key: dict(tensors) for key, tensors in message.groups.items()}
    if group:
        groups[group][name] = tensor
    return Message(groups, {**message.scalars, **scalars})


# Messages


def test_equal_in_any_order_and_by_bits():
    message = example()
    other = Message(
        {group: dict(reversed(tensors.items())) for group, tensors in reversed(message.groups.items())},
        dict(reversed(message.scalars.items())),
    )
    assert message == other and message.digest() == other.digest()
    assert message == copy.deepcopy(message) and message != "message"


@pytest.mark.parametrize(
    "change",
    [
        {"round": 4},
        {"round": 3.0},
        {"ok": 1},
        {"more": 0},
        {"group": "weights", "name": "b", "tensor": torch.tensor([float("nan"), 0.0, 1e-45])},
        {"group": "weights", "name": "w", "tensor": torch.arange(6.0).reshape(3, 2)},
        {"group": "weights", "name": "w", "tensor": torch.arange(6.0).reshape(2, 3).double()},
        {"group": "weights", "name": "v", "tensor": torch.zeros(1)},
        {"group": "empty", "name": "w", "tensor": torch.empty(0)},
    ],
)
def test_any_difference_is_seen(change):
    message, other = example(), changed(example(), **change)
    assert message != other and message.digest() != other.digest()


def test_nbytes():
    assert example().nbytes == 24 + 12 + 8 + 0 + 2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_flat_arrays_and_back_are_exact(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=dtype).T  # not contiguous
    message = changed(example(), "empty", "t", tensor, loss=float("inf"), big=2**62)
    header, arrays = message.to_flat()
    assert all(array.dtype == np.uint8 and array.ndim == 1 for array in arrays)
    back = Message.from_flat(header, arrays)
    assert back == message and back.groups["empty"]["t"].dtype == dtype
    for array in arrays:
        array[...] = 0
    assert back == message  # it owns its memory, and so do the arrays


def test_flat_arrays_that_do_not_fit_are_refused():
    header, arrays = example().to_flat()
    negative = json.loads(header)
    negative["groups"]["weights"][0][2] = [-2, -3]
    for bad_header, bad_arrays in [
        (header, arrays[:-1]),
        (header, [arrays[0][:-1], *arrays[1:]]),
        (header, [arrays[0][:-4], *arrays[1:]]),
        (header, [arrays[0].astype(np.float32), *arrays[1:]]),
        (header[:-1], arrays),
        ("{}", arrays),
        (header.replace("bfloat16", "float3"), arrays),
        (json.dumps(negative), arrays),
    ]:
        with pytest.raises(InputError, match="do not fit together"):
            Message.from_flat(bad_header, bad_arrays)


@pytest.mark.parametrize(
    "groups, scalars, words",
    [
        ({"weights": {"w": np.zeros(2)}}, {}, "'w' of group 'weights' is a ndarray"),
        ({"weights": {"w": torch.zeros(2, requires_grad=True)}}, {}, "requires a gradient"),
        ({"weights": {"w": torch.zeros(2, device="meta")}}, {}, "on meta"),
        ({"weights": {"w": torch.eye(2).to_sparse()}}, {}, "torch.sparse_coo"),
        ({"weights": {"w": torch.zeros(2, dtype=torch.complex64)}}, {}, "complex64"),
        ({"weights": {"": torch.zeros(2)}}, {}, "not empty"),
        ({1: {}}, {}, "got 1"),
        ({}, {"n": np.int64(3)}, "'n' is a int64"),
        ({}, {"n": None}, "NoneType"),
    ],
)
def test_what_no_message_can_hold_is_named(groups, scalars, words):
    with pytest.raises(InputError, match=words):
        Message(groups, scalars)


# Replies


def template():
    buffers = {"mean": torch.zeros(2), "count": torch.tensor(0)}
    return Message({"weights": {"w": torch.zeros(3)}, "buffers": buffers}, {"round": 4})


def good_reply(**scalars):
    return changed(template(), num_samples=5, loss=0.5, **scalars)


def test_a_good_reply_is_good():
    assert check_reply(good_reply(), template()) is None


@pytest.mark.parametrize(
    "reply, reason",
    [
        (None, "is a NoneType, not a message"),
        (template(), "num_samples=None; an int above 0 is needed"),
        (good_reply(round=3), "round=3 instead of 4 (a stale reply)"),
        (good_reply(round=5), "round=5 instead of 4"),
        (good_reply(round=4.0), "round=4.0 instead of 4"),
        (changed(template(), num_samples=0), "num_samples=0; an int above 0 is needed"),
        (changed(template(), num_samples=True), "num_samples=True; an int above 0 is needed"),
        (changed(good_reply(), "weights", "w", torch.zeros(2)), "'weights', 'w': shape [2] instead of [3]"),
        (
            changed(good_reply(), "weights", "w", torch.zeros(3).half()),
            "'weights', 'w': dtype torch.float16 instead of torch.float32",
        ),
        (changed(good_reply(), "weights", "w", torch.tensor([0.0, float("nan"), 0])), "'weights', 'w': not finite"),
        (changed(good_reply(), "buffers", "mean", torch.tensor([0, -torch.inf])), "'buffers', 'mean': not finite"),
        (changed(good_reply(), "weights", "v", torch.zeros(3)), "tensors of 'weights': unknown ['v']"),
        (Message({"weights": {}, "buffers": {}}, good_reply().scalars), "tensors of 'weights': missing ['w']"),
        (
            Message({"weights": {}, "other": {}}, good_reply().scalars),
            "groups: missing ['buffers'], unknown ['other']",
        ),
    ],
)
def test_the_reason_for_a_refusal_is_told(reply, reason):
    assert check_reply(reply, template()) == reason


# Rounds


def init(dtype=torch.float32):
    weights = {"weight": torch.tensor([[0.5, -1.0]], dtype=dtype), "bias": torch.tensor([2.0], dtype=dtype)}
    return Message({"weights": weights, "buffers": {"mean": torch.ones(2), "batches": torch.tensor(10)}})


def ready(name="fedavg", sites=("c", "a", "b"), seed=0, dtype=torch.float32, **options):
    algorithm = ALGORITHMS[name](**OPTIONS.get(name, {}), **options)
    algorithm.setup(list(sites), init(dtype), seed)
    return algorithm


def answers(algorithm, **num_samples):
    """Replies of all sites that are asked, each a little other than what was sent."""
    replies = {}
    for k, site in enumerate(algorithm.configure(algorithm.round)):
        likeness = algorithm.template(site)
        groups = {
            group: {name: t + 0.1 * (k + 1) if t.is_floating_point() else t + k for name, t in tensors.items()}
            for group, tensors in likeness.groups.items()
        }
        scalars = {**likeness.scalars, "num_samples": num_samples.get(site, k + 1), "lr_sum": 0.1 * (k + 1)}
        scalars["num_steps"] = k + 1
        replies[site] = Message(groups, scalars)
    return replies


def test_buffers_are_averaged_and_counts_rounded():
    algorithm = ready()
    metrics = algorithm.aggregate(0, answers(algorithm, a=1, b=1, c=6))
    # 10, 11 and 12 batches, 1/8, 1/8 and 6/8: 11.625
    assert algorithm.groups["buffers"]["batches"].item() == 12
    assert algorithm.groups["buffers"]["batches"].dtype == torch.int64
    torch.testing.assert_close(algorithm.groups["buffers"]["mean"], torch.full((2,), 1.2625))
    assert (metrics["num_sites"], metrics["num_samples"], metrics["absent"], metrics["refused"]) == (3, 8, [], {})
    assert metrics["update_norm"] == pytest.approx(0.2625 * 3**0.5, rel=1e-6)


def test_bad_replies_are_left_out_with_their_reason_and_the_round_goes_on():
    algorithm, alone = ready(), ready()
    replies = answers(algorithm)
    good = replies["b"]
    bad = changed(replies["a"], "weights", "bias", torch.tensor([float("nan")]))
    metrics = algorithm.aggregate(0, {"x": good, "b": good, "a": bad})
    assert metrics["refused"] == {"a": "'weights', 'bias': not finite", "x": "is not on the roster ['a', 'b', 'c']"}
    assert metrics["absent"] == ["c"]
    alone.aggregate(0, {"b": good})
    assert Message(algorithm.groups) == Message(alone.groups)


def test_too_few_usable_replies_change_nothing_and_the_round_can_be_repeated():
    algorithm = ready("fedavgm", min_sites=2)
    before, replies = Message(algorithm.groups), answers(algorithm)
    stale = changed(replies["a"], round=-1)
    with pytest.raises(
        RuntimeError, match="round 0: 1 usable replies, 2 are needed. a: round=-1.*stale.*; c: no reply"
    ):
        algorithm.aggregate(0, {"a": stale, "b": replies["b"]})
    assert Message(algorithm.groups) == before and algorithm.round == 0
    assert algorithm.aggregate(0, replies)["num_sites"] == 3


def test_a_state_that_would_not_be_finite_is_not_taken():
    algorithm = FedAvgM(server_momentum=0.0, server_lr=1e30)
    algorithm.setup(["a"], init(), seed=0)
    before, reply = Message(algorithm.groups), answers(algorithm)["a"]
    huge = changed(reply, "weights", "bias", torch.tensor([3e38]))
    with pytest.raises(RuntimeError, match="'bias' of 'weights' would not be finite"):
        algorithm.aggregate(0, {"a": huge})
    assert Message(algorithm.groups) == before and algorithm.round == 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_sites_and_replies_does_not_matter(name):
    one, other = (ready(name, sites=sites, dtype=torch.float64) for sites in ("abcdefg", "gfedcba"))
    for _ in range(3):
        replies = answers(one)
        one.aggregate(one.round, replies)
        other.aggregate(other.round, dict(reversed(replies.items())))
    assert Message(one.groups).digest() == Message(other.groups).digest()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_state_goes_on_bit_for_bit_in_a_new_server(name, tmp_path):
    whole = ready(name, sites="abcde", seed=5, fraction=0.6)
    for _ in range(3):
        whole.aggregate(whole.round, answers(whole))
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = ALGORITHMS[name](**OPTIONS.get(name, {}), fraction=0.6)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        assert whole.configure(whole.round) == resumed.configure(resumed.round)
        replies = answers(whole)
        assert whole.aggregate(whole.round, replies) == resumed.aggregate(resumed.round, replies)
    assert Message(whole.groups) == Message(resumed.groups)
    assert Message(whole.groups) != Message(ready(name, sites="abcde").groups)


def test_a_state_shares_no_memory():
    algorithm, start = FedAvg(), init()
    algorithm.setup(["a"], start, seed=0)
    start.groups["weights"]["bias"].fill_(9)
    assert algorithm.groups["weights"]["bias"].item() == 2
    state = algorithm.state_dict()
    state["groups"]["weights"]["bias"].zero_()
    assert algorithm.groups["weights"]["bias"].item() == 2
    algorithm.load_state_dict(state)
    state["groups"]["weights"]["bias"].fill_(3)
    assert algorithm.groups["weights"]["bias"].item() == 0


@pytest.mark.parametrize("dtype, memory", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_memory_of_a_server_is_at_least_float32(dtype, memory):
    for name, group in [("fedavgm", "momentum"), ("scaffold", "control"), ("domo", "server_momentum")]:
        algorithm = ready(name, dtype=dtype)
        algorithm.aggregate(0, answers(algorithm))
        assert algorithm.groups[group]["weight"].dtype == memory
        assert algorithm.groups["weights"]["weight"].dtype == dtype


def test_the_state_of_something_else_is_refused():
    state = ready("fedavgm").state_dict()
    with pytest.raises(InputError, match="that of 'fedavgm', not of 'fedavg'"):
        ready().load_state_dict(state)
    with pytest.raises(InputError, match="give the same roster"):
        ready("fedavgm", sites="abd").load_state_dict(state)
    other = FedAvgM()
    other.setup("abc", Message({"weights": {"weight": torch.zeros(1, 2), "bias": torch.zeros(2)}}), seed=0)
    with pytest.raises(InputError, match="buffers/batches, buffers/mean, momentum/bias, weights/bias"):
        other.load_state_dict(state)
    state["groups"].pop("momentum")
    with pytest.raises(InputError, match="momentum/bias, momentum/weight"):
        FedAvgM().load_state_dict(state)


def test_configure_can_be_repeated_and_what_was_sent_stays_as_it_was():
    algorithm = ready("fedadam")
    sent = algorithm.configure(0)
    assert sent == algorithm.configure(0)
    digests = {site: message.digest() for site, message in sent.items()}
    algorithm.aggregate(0, answers(algorithm))
    assert digests == {site: message.digest() for site, message in sent.items()}
    assert (
        len({message.scalars["seed"] for message in sent.values()} | {algorithm.configure(1)["a"].scalars["seed"]})
        == 4
    )


@pytest.mark.parametrize("fraction, min_sites, expected", [(1.0, 1, 10), (0.3, 1, 3), (0.29, 1, 3), (0.01, 2, 2)])
def test_how_many_sites_are_asked(fraction, min_sites, expected):
    algorithm = ready(sites="abcdefghij", fraction=fraction, min_sites=min_sites)
    assert len(algorithm.configure(0)) == expected


def choices(seed, num_rounds):
    algorithm, chosen = ready(sites="abcdefghij", seed=seed, fraction=0.3), []
    for r in range(num_rounds):
        chosen.append("".join(algorithm.configure(r)))
        algorithm.aggregate(r, answers(algorithm))
    return chosen


def test_the_choice_is_uniform_and_differs_by_round_and_seed():
    chosen = choices(seed=1, num_rounds=600)
    counts = [sum(site in sites for sites in chosen) for site in "abcdefghij"]
    assert 140 < min(counts) and max(counts) < 220  # 180, standard deviation 11
    assert len(set(chosen)) > 90 and chosen[:20] != choices(seed=2, num_rounds=20)


def test_the_choice_is_the_same_in_another_process():
    code = "from tests.test_federated_messages import choices; print(choices(1, 8))"
    environment = {"PYTHONHASHSEED": "77", "PATH": ""}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert other.stdout.strip() == str(choices(1, 8)), other.stderr


class OnDemand(Mapping):
    """Replies that exist only while somebody holds them."""

    def __init__(self, replies):
        self.replies, self.made, self.most = replies, [], 0

    def __getitem__(self, site):
        reply = copy.deepcopy(self.replies[site])
        self.made.append(weakref.ref(reply.groups["weights"]["weight"]))
        self.most = max(self.most, sum(tensor() is not None for tensor in self.made))
        return reply

    def __iter__(self):
        return iter(self.replies)

    def __len__(self):
        return len(self.replies)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_replies_are_not_held_all_at_once(name):
    algorithm, other = ready(name, sites="abcdefgh"), ready(name, sites="abcdefgh")
    replies = OnDemand(answers(algorithm))
    algorithm.aggregate(0, replies)
    other.aggregate(0, replies.replies)
    assert Message(algorithm.groups) == Message(other.groups)
    assert replies.most <= 2  # the next comes before the last has gone


def test_a_site_that_was_not_asked_is_refused():
    algorithm = ready(sites="abcdefghij", fraction=0.3)
    replies = answers(algorithm)
    uninvited = min(set("abcdefghij") - set(replies))
    metrics = algorithm.aggregate(0, {**replies, uninvited: next(iter(replies.values()))})
    assert metrics["refused"] == {uninvited: "was not asked in round 0"}


@pytest.mark.parametrize(
    "sites, words", [([], "a training needs a site"), (["a", "a"], "names must differ"), (["a", ""], "needs a name")]
)
def test_a_bad_roster_is_refused(sites, words):
    with pytest.raises(ConfigurationError, match=words):
        ready(sites=sites)


def test_what_cannot_begin_is_refused():
    with pytest.raises(ConfigurationError, match="min_sites=4: must be at most the number of sites, 3"):
        ready(min_sites=4)
    with pytest.raises(RuntimeError, match="call setup"):
        FedAvg().configure(0)
    with pytest.raises(ConfigurationError, match="round=1: .* the next one is 0"):
        ready().configure(1)
    for groups, words in [
        ({"buffers": {}}, "weights are needed"),
        ({"weights": {}}, "weights are needed"),
        ({"weights": {"w": torch.zeros(1)}, "momentum": {}}, "weights are needed"),
        ({"weights": {"w": torch.zeros(1, dtype=torch.int8)}}, "'w' is torch.int8"),
        ({"weights": {"w": torch.full((1,), torch.nan)}}, "'w' of group 'weights' is not finite"),
    ]:
        with pytest.raises(InputError, match=words):
            FedAvg().setup(["a"], Message(groups), seed=0)
