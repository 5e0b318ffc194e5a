"""Our loop on Flower's `Grid`, without any process of Flower's."""

import re
import time

import flower_toy
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, RecordDict
from flwr.app import Message as Envelope
from flwr.supercore.task_identity import TaskIdentity
from test_federated_resident import odd_message

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines.base import Exchanged
from hf_mlopt.federated.engines.flower import FlowerEngine
from hf_mlopt.federated.engines.flower_app import client_app
from hf_mlopt.federated.engines.flower_records import from_flat, to_flat
from hf_mlopt.federated.engines.in_process import InProcessEngine
from hf_mlopt.federated.engines.site import pack, unpack


RUN = {"application": "flower_toy"}


@pytest.fixture(autouse=True)
def identity():
    """Who this process is, which Flower tells the ones that it starts."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


class FakeGrid:
    """
    Nodes that run the real `ClientApp` in this process. `spoil(node, envelope, reply, attempt)` may change what comes
    back to a list of replies, and of what is sent of type `train.step` the n-th attempt is known to it.
    """

    def __init__(self, names, spoil=None, reverse=False):
        self.names = dict(enumerate(names, 100))
        self.spoil, self.reverse = spoil, reverse
        self.mailbox, self.attempts, self.greeted, self.ttls, self.most_asked = [], {}, [], [], 0

    def get_node_ids(self):
        return list(self.names)

    def push_messages(self, envelopes):
        return [self._push(envelope) for envelope in envelopes]

    def _push(self, envelope):
        node = envelope.metadata.dst_node_id
        envelope.metadata.__dict__["_message_id"] = name = f"message {len(self.ttls)}"
        self.ttls.append(envelope.metadata.ttl)
        if envelope.metadata.message_type == "query.hello":
            self.greeted.append(node)
        if node not in self.names:
            self.mailbox.append(failed(envelope, 5))
            return name
        context = Context(1, node, {"site": self.names[node]}, RecordDict(), RUN)
        replies = [client_app(envelope, context)]
        if envelope.metadata.message_type == "train.step":
            attempt = self.attempts[node] = self.attempts.get(node, 0) + 1
            if self.spoil is not None:
                replies = self.spoil(self.names[node], envelope, replies[0], attempt)
        self.mailbox += replies
        return name

    def pull_messages(self, ids):
        self.most_asked = max(self.most_asked, len(ids))
        found = [reply for reply in self.mailbox if reply.metadata.reply_to_message_id in set(ids)]
        self.mailbox = [reply for reply in self.mailbox if reply not in found]
        return found[::-1] if self.reverse else found


def failed(envelope, code, source=1):
    reply = Envelope(Error(code=code, reason="a reason"), reply_to=envelope)
    reply.metadata.__dict__["_src_node_id"] = source
    return reply


def engine_of(grid, expected=None, **options):
    expected = len(grid.names) if expected is None else expected
    return FlowerEngine(grid, expected, **{"timeout": 20.0, "poll": 0.01, "pause": 0.01, **options})


def exchanged(engine, messages=None, **scalars):
    """What comes of one exchange, and the sites in the order in which they were in."""
    message = Message({"weights": {"w": torch.arange(3.0)}}, {"round": 0, **scalars})
    outcome, arrived = Exchanged(), []
    engine.exchange(dict.fromkeys(engine.sites(), message), outcome, arrived.append)
    return outcome, arrived


@pytest.mark.parametrize("message", [odd_message(), Message({}), Message({"w": {"a": torch.zeros(0)}}, {"error": ""})])
def test_a_message_in_records_is_the_same_bit_for_bit(message):
    envelope = Envelope(from_flat(*pack(message)), 7, "train.step", ttl=60.0)
    assert unpack(*to_flat(envelope.content)) == message
    # As it travels: cut into Flower's objects, and put together again.
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    pieces = get_all_nested_objects(envelope)
    contents = {name: piece.deflate() for name, piece in pieces.items()}
    num_bytes = sum(map(len, contents.values()))
    arrived = inflate_object_from_contents(envelope.object_id, contents)
    assert unpack(*to_flat(arrived.content)) == message
    assert message.nbytes <= num_bytes < message.nbytes + len(message.header()) + 1000 * (len(message.groups) + 1)


def test_records_that_are_not_ours_are_refused():
    ours = from_flat(*pack(Message({"w": {"a": torch.ones(2)}})))
    del ours["message"]
    with pytest.raises(InputError, match="no message of ours"):
        to_flat(ours)
    with pytest.raises(InputError, match="no message of ours"):
        to_flat(RecordDict({"message": ConfigRecord({"header": 3}), "group.w": torch_record()}))


def torch_record():
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({"bytes": Array(torch.ones(2).numpy())})


@pytest.mark.parametrize("reverse", [False, True])
def test_rounds_over_the_grid_are_those_of_this_process(reverse):
    names = ["hosp2", "hosp0", "hosp1"]
    grid = FakeGrid(names, reverse=reverse)
    engine = engine_of(grid, expected=names)
    weights, _, failures = flower_toy.rounds(engine, 3)
    expected, _, _ = flower_toy.rounds(InProcessEngine(sorted(names), flower_toy.answer), 3)
    assert engine.sites() == sorted(names)
    assert weights == expected and weights.digest() == expected.digest()
    assert failures == [{}, {}, {}]
    assert max(grid.ttls) <= 20.0  # half a day without it
    assert engine.ignored == 0


def test_what_a_site_raises_is_its_failure_alone():
    outcome, arrived = exchanged(engine_of(FakeGrid(["hosp0", "hosp1"])), raises="hosp1")
    assert list(outcome.replies) == ["hosp0"]
    assert outcome.failures == {"hosp1": "ValueError: no data at hosp1"}
    assert sorted(arrived) == ["hosp0", "hosp1"]


def test_a_lost_reply_is_a_failure_at_the_deadline():
    grid = FakeGrid(["hosp0", "hosp1"], lambda site, sent, reply, attempt: [] if site == "hosp0" else [reply])
    engine = engine_of(grid, timeout=0.5)
    engine.sites()
    begin = time.monotonic()
    outcome, arrived = exchanged(engine)
    assert 0.5 <= time.monotonic() - begin < 10
    assert outcome.failures == {"hosp0": "no answer within 0.5 s"}
    assert list(outcome.replies) == ["hosp1"]
    assert arrived == ["hosp1", "hosp0"]


def test_a_late_reply_is_not_taken_for_one_of_the_next_round():
    kept = []

    def spoil(site, sent, reply, attempt):
        if attempt == 1 and site == "hosp0":
            kept.append(reply)
            return []
        return [reply] if attempt == 1 else [*kept, reply]

    grid = FakeGrid(["hosp0", "hosp1"], spoil)
    grid.pull_messages = lambda ids, mailbox=grid: [mailbox.mailbox.pop(0) for _ in mailbox.mailbox[:]]  # all it has
    engine = engine_of(grid, timeout=0.3)
    assert exchanged(engine)[0].failures == {"hosp0": "no answer within 0.3 s"}
    engine.timeout = 20.0
    outcome, _ = exchanged(engine, round=1)
    assert {site: reply.scalars["round"] for site, reply in outcome.replies.items()} == {"hosp0": 1, "hosp1": 1}
    assert engine.ignored == 2  # it came with each of the two


def test_a_site_that_has_come_back_as_another_node_is_the_same_site():
    grid = FakeGrid(["hosp0", "hosp1"])
    engine = engine_of(grid, pause=0.2)
    assert exchanged(engine)[0].failures == {}
    # hosp0 has come back, and there are one with the name of a site that is there, and one with none that is known.
    grid.names = {200: "hosp1", 201: "hosp0", 203: "hosp9", 101: "hosp1"}
    for _ in range(2):
        outcome, _ = exchanged(engine)
        assert sorted(outcome.replies) == engine.sites() == ["hosp0", "hosp1"] and outcome.failures == {}
    assert grid.attempts == {100: 1, 101: 3, 201: 2}
    assert grid.greeted == [100, 101, 200, 201, 203]


def test_a_site_of_a_registered_node_is_no_other_node():
    grid = FakeGrid(["hosp0", "hosp1"])
    engine = engine_of(grid, nodes={"hosp0": 100, "hosp1": 101})
    engine.sites()
    grid.names = {200: "hosp0", 101: "hosp1"}
    outcome, _ = exchanged(engine)
    assert outcome.failures == {"hosp0": "Flower error 5: a reason"} and 200 not in grid.attempts


def test_a_duplicate_is_ignored_and_counted():
    grid = FakeGrid(["hosp0", "hosp1"], lambda site, sent, reply, attempt: [reply, reply])
    engine = engine_of(grid)
    outcome, arrived = exchanged(engine)
    assert sorted(outcome.replies) == sorted(arrived) == ["hosp0", "hosp1"]
    assert engine.ignored == 2


@pytest.mark.parametrize("code", [0, 3, 4, 5, 8])
def test_an_error_that_may_pass_is_tried_again(code):
    def spoil(site, sent, reply, attempt):
        return [reply] if site == "hosp0" or attempt == 3 else [failed(sent, code)]

    grid = FakeGrid(["hosp0", "hosp1"], spoil)
    outcome, _ = exchanged(engine_of(grid, retries=2))
    assert sorted(outcome.replies) == ["hosp0", "hosp1"] and outcome.failures == {}
    assert grid.attempts == {100: 1, 101: 3}


def test_no_more_is_tried_than_was_allowed():
    grid = FakeGrid(["hosp0", "hosp1"], lambda site, sent, reply, attempt: [failed(sent, 5)])
    outcome, arrived = exchanged(engine_of(grid, retries=1))
    assert outcome.failures == dict.fromkeys(["hosp0", "hosp1"], "Flower error 5: a reason")
    assert grid.attempts == {100: 2, 101: 2}
    assert sorted(arrived) == ["hosp0", "hosp1"]


@pytest.mark.parametrize("code", [1, 2, 6, 7])
def test_an_error_that_stays_fails_at_once_and_at_its_own_site(code):
    # The error's source is the link's own id, so only the message it answers says whose it is.
    def spoil(site, sent, reply, attempt):
        return [failed(sent, code)] if site == "hosp1" else [reply]

    grid = FakeGrid(["hosp0", "hosp1", "hosp2"], spoil)
    outcome, _ = exchanged(engine_of(grid))
    assert outcome.failures == {"hosp1": f"Flower error {code}: a reason"}
    assert sorted(outcome.replies) == ["hosp0", "hosp2"]
    assert grid.attempts == {100: 1, 101: 1, 102: 1}


def test_a_retry_that_is_lost_says_why_there_was_one():
    grid = FakeGrid(["hosp0"], lambda site, sent, reply, attempt: [failed(sent, 3)] if attempt == 1 else [])
    outcome, _ = exchanged(engine_of(grid, timeout=0.5))
    assert outcome.failures == {"hosp0": "no answer within 0.5 s, after: Flower error 3: a reason"}


def test_a_link_that_has_trouble_is_asked_again():
    grid, troubles = FakeGrid(["hosp0"]), {"push": 1, "pull": 2, "nodes": 1}

    def unlucky(name, method):
        def call(*arguments):
            troubles[name] -= 1
            if troubles[name] >= 0:
                raise RuntimeError("database is locked")
            return method(*arguments)

        return call

    grid.push_messages = unlucky("push", grid.push_messages)
    grid.pull_messages = unlucky("pull", grid.pull_messages)
    grid.get_node_ids = unlucky("nodes", grid.get_node_ids)
    outcome, _ = exchanged(engine_of(grid))
    assert list(outcome.replies) == ["hosp0"]
    engine = engine_of(grid, retries=0)
    engine.sites()
    grid.push_messages = lambda envelopes: [None]
    assert exchanged(engine)[0].failures == {"hosp0": "could not be sent (refused by the SuperLink)"}


def test_replies_of_many_sites_are_not_all_in_memory_at_once():
    grid = FakeGrid([f"hosp{number}" for number in range(20)])
    outcome, _ = exchanged(engine_of(grid))
    assert len(outcome.replies) == 20
    assert grid.most_asked == 8


def test_a_reply_that_cannot_be_read_is_its_sites_failure():
    def spoil(site, sent, reply, attempt):
        if site == "hosp1":
            reply.content["message"]["header"] = "{"
        return [reply]

    outcome, _ = exchanged(engine_of(FakeGrid(["hosp0", "hosp1"], spoil)))
    assert list(outcome.replies) == ["hosp0"]
    assert "header and arrays do not fit together" in outcome.failures["hosp1"]


@pytest.mark.parametrize(
    "names, options, said",
    [
        (["hosp0", "hosp0"], {}, "nodes 100 and 101 both call themselves 'hosp0'"),
        (["hosp0", "hosp7"], {"expected": ["hosp0", "hosp1"]}, "'hosp7', which is no site of this federation.*hosp1"),
        (["hosp0", "hosp1"], {"nodes": {"hosp0": 101, "hosp1": 100}}, "100 calls itself 'hosp0', which is registered"),
        (["hosp0", "hosp1"], {"expected": 1}, "2 sites have come, .*hosp0.*hosp1.*, and 1 are expected"),
        (["hosp0", ""], {}, "the node 101 calls itself ''"),
        (["hosp0", "refuses"], {}, "the node 101 does not take part: site 'refuses': its data set is empty"),
        (["hosp0"], {"expected": 2, "timeout": 0.2}, r"1 of 2 sites have come within 0.2 s, \['hosp0'\]; start"),
        (["hosp0"], {"expected": ["hosp0", "hosp1"], "timeout": 0.2}, r"missing are \['hosp1'\]"),
    ],
)
def test_who_may_not_take_part(names, options, said):
    with pytest.raises(InputError, match=said):
        engine_of(FakeGrid(names), **options).sites()


def test_a_name_that_is_given_twice_is_found_though_the_second_is_late():
    grid = FakeGrid(["hosp0", "hosp1", "hosp1"])
    pull, asked = grid.pull_messages, []

    def pull_all_but_the_last_at_first(ids):
        asked.append(1)
        return pull(ids) if len(asked) > 5 else pull([name for name in ids if name != "message 2"])

    grid.pull_messages = pull_all_but_the_last_at_first
    with pytest.raises(InputError, match="both call themselves 'hosp1'"):
        engine_of(grid, expected=2).sites()


def test_sites_may_come_one_after_the_other():
    grid = FakeGrid(["hosp0", "hosp1"])
    later, asked = dict(grid.names), []

    def online():
        asked.append(1)
        return list(later)[: len(asked) // 5]

    grid.get_node_ids = online
    assert engine_of(grid, nodes={"hosp0": 100, "hosp1": 101}).sites() == ["hosp0", "hosp1"]


def test_a_node_that_is_gone_does_not_keep_the_others_waiting():
    grid = FakeGrid(["hosp0", "hosp1", "gone"])
    push = grid._push

    def push_or_fail(envelope):
        name = push(envelope)
        if envelope.metadata.dst_node_id == 102:
            grid.mailbox[-1] = failed(envelope, 5)
        return name

    grid._push = push_or_fail
    assert engine_of(grid, expected=2).sites() == ["hosp0", "hosp1"]


@pytest.mark.parametrize(
    "run_config, said",
    [
        ({}, "sites=None"),
        ({"sites": 0}, "sites=0: a federation needs a site"),
        ({"sites": "a,a"}, "names of sites must differ"),
        ({"sites": 2, "nodes": "hosp0"}, "nodes='hosp0': must be as in"),
        ({"sites": "a,b", "nodes": "a=1,c=2"}, "must be of sites"),
        ({"sites": 2, "nodes": "a=1"}, "must name all sites, 2"),
        ({"sites": 2, "timeout": 0}, "timeout=0"),
        ({"sites": 2, "retries": -1}, "retries=-1"),
        ({"sites": 2, "pause": -0.1}, "pause=-0.1"),
        ({"sites": 2, "poll": 0.0}, "poll=0.0"),
    ],
)
def test_a_run_configuration_out_of_range(run_config, said):
    with pytest.raises(InputError, match=re.escape(said)):
        FlowerEngine.from_run_config(None, run_config)


def test_a_run_configuration_is_read():
    values = {"sites": "b, a", "nodes": "a=1, b=2", "timeout": 5.0, "retries": 0, "pause": 2, "poll": 0.1, "more": 1}
    grid = FakeGrid(["a", "b"])
    grid.names = {1: "a", 2: "b"}
    engine = FlowerEngine.from_run_config(grid, values)
    assert (engine.timeout, engine.retries, engine.pause, engine.poll) == (5.0, 0, 2, 0.1)
    assert engine.sites() == ["a", "b"]
