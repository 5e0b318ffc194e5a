"""Messages in files, replies that wait there, what sites keep, and checkpoints of the server."""

import json
import os

import pytest
import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from hf_mlopt.federated.storage import SiteStore, SpooledReplies, load_message, save_message
from tests.federations import killed, killing, patched


def awkward():
    """Every type and layout a message may hold."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    nan = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    groups = {
        "weights": {
            "plain": base,
            "same": base,
            "turned": base.T,
            "part": base[1:3, ::2],
            "expanded": torch.ones(1).expand(3, 2),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "odd": nan,
        },
        "buffers": {
            "half": nan.to(torch.bfloat16),
            "count": torch.tensor(2**62 + 1),
            "mask": torch.tensor([True, False]),
            "small": torch.tensor([-3], dtype=torch.int8),
            "turned/first": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
        },
        "nothing": {},
    }
    return Message(groups, {"round": 3, "share": 0.1, "name": "a/ü", "is": True, "loss": float("nan")})


def test_a_message_comes_back_from_its_file_bit_for_bit(tmp_path):
    message, path = awkward(), tmp_path / "new" / "m.safetensors"
    save_message(message, path)
    loaded = load_message(path)
    assert loaded.digest() == message.digest() and loaded.groups.keys() == message.groups.keys()
    assert isinstance(loaded.scalars["is"], bool) and isinstance(loaded.scalars["round"], int)
    assert os.listdir(path.parent) == [path.name]


def test_two_views_of_one_tensor_in_any_order(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    for name, tensors in enumerate(([base, base.T], [base.T, base], [base[:, 1:], base.T], [base.T, base.T])):
        message = Message({"x": dict(zip("ab", tensors, strict=True))})
        save_message(message, tmp_path / str(name))
        assert load_message(tmp_path / str(name)) == message


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    old, path = Message({"x": {"w": torch.zeros(3)}}), tmp_path / "m"
    save_message(old, path)

    def save():
        with patched(os, "replace", killing(os.replace, 1)):
            save_message(Message({"x": {"w": torch.ones(3)}}), path)

    assert killed(save)
    assert load_message(path) == old


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "cut", "other"])
def test_what_is_no_message_is_named(tmp_path, content):
    from safetensors.torch import save_file

    path = tmp_path / "m"
    if content == "cut":
        save_message(awkward(), path)
        path.write_bytes(path.read_bytes()[:-5])
    elif content == "other":
        save_file({"w": torch.zeros(2)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="message"):
        load_message(path)


def reply(value):
    return Message({"weights": {"w": torch.tensor([float(value)])}}, {"round": 0})


def test_replies_wait_in_files_and_the_last_of_a_site_counts(tmp_path):
    replies = SpooledReplies(tmp_path)
    for site, value in (("b", 0), ("a/../..", 1), ("b", 2), ("c", 3), ("c", 4), ("d", 5)):
        replies.add(site, reply(value))
    assert {site: replies[site] for site in replies} == {
        site: reply(value) for site, value in (("b", 2), ("a/../..", 1), ("c", 4), ("d", 5))
    }
    assert len(replies) == len(list(tmp_path.iterdir())) == 4
    assert "e" not in replies


def test_a_site_keeps_the_state_it_may_have_to_go_back_to(tmp_path):
    store = SiteStore(tmp_path)
    assert store.load("a", "one", 0) is None
    store.save("a", "one", 0, reply(0), before=-1)
    store.save("a", "one", 1, reply(1), before=0)
    store.save("b", "one", 1, reply(9), before=-1)
    store.save("a", "one", 2, reply(2), before=0)  # the reply of round 1 was not used
    assert store.load("a", "one", 1) is None
    assert [store.load("a", "one", r) for r in (0, 2)] == [reply(0), reply(2)]
    assert store.load("b", "one", 1) == reply(9)
    store.save("a", "one", 2, reply(2), before=0)  # the same message again
    assert store.load("a", "one", 0) == reply(0)
    store.save("a", "one", 3, reply(3), before=2)
    assert store.load("a", "one", 0) is None and store.load("a", "one", 2) == reply(2)
    store.save("a", "two", 7, reply(7), before=6)
    assert store.load("a", "two", 2) is None and store.load("a", "one", 2) == reply(2)


def test_the_name_of_a_training_leads_nowhere_else(tmp_path):
    for name in ("", "..", "../b", "a/b"):
        with pytest.raises(InputError, match="letters and digits name a training"):
            SiteStore(tmp_path / "sites").save("a", name, 0, reply(0), before=-1)
    assert not list(tmp_path.rglob("*"))


RUN = {"algorithm": "fedadam", "algorithm_args": {"betas": (0.9, 0.99)}, "seed": 3}


def state(round, value=1.0):
    groups = {"weights": {"w": torch.tensor([value, -0.0])}, "m": {}}
    return {
        "algorithm": "fedadam",
        "sites": ["a"],
        "seed": 3,
        "round": round,
        "last_rounds": {"a": 0},
        "groups": groups,
    }


def test_a_checkpoint_holds_state_and_history_exactly(tmp_path):
    history = [{"round": 0, "loss": 0.1, "nan": float("nan"), "sites": {"a": {"n": 3}}}]
    path = save_checkpoint(tmp_path, state(1), history, "one", RUN, limit=None)
    assert path.name == "checkpoint-1"
    loaded, rows, training = load_checkpoint(path, RUN)
    assert Message(loaded.pop("groups")) == Message(state(1)["groups"])
    assert loaded == {name: value for name, value in state(1).items() if name != "groups"}
    assert json.dumps(rows) == json.dumps(history) and training == "one"


@pytest.mark.parametrize("limit, kept", [(None, [1, 2, 9, 10, 11]), (1, [11]), (2, [10, 11])])
def test_the_newest_checkpoints_are_kept(tmp_path, limit, kept):
    for round in (1, 2, 9, 10, 11):
        save_checkpoint(tmp_path, state(round), [], "one", RUN, limit)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{round}" for round in kept]


def test_one_that_was_just_written_is_not_too_many(tmp_path):
    """Of a run that goes on from an older one."""
    for round in (1, 2, 3):
        save_checkpoint(tmp_path, state(round), [], "one", RUN, limit=None)
    path = save_checkpoint(tmp_path, state(1, 5.0), [], "one", RUN, limit=1)
    assert load_checkpoint(path, RUN)[0]["groups"]["weights"]["w"][0] == 5


@pytest.mark.parametrize(
    "call, count", [("mkdir", 1), ("save_message", 1), ("replace", 1), ("write_text", 1), ("replace", 2)]
)
def test_half_a_checkpoint_is_none(tmp_path, call, count):
    import os
    from pathlib import Path

    import hf_mlopt.federated.checkpoint as module

    save_checkpoint(tmp_path, state(1), ["old"], "one", RUN, limit=2)
    owner = {"save_message": module, "replace": os}.get(call, Path)

    def save():
        with patched(owner, call, killing(getattr(owner, call), count)):
            save_checkpoint(tmp_path, state(2), [], "one", RUN, limit=2)

    assert killed(save)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert load_checkpoint(checkpoints(tmp_path)[0], RUN)[1] == ["old"]
    save_checkpoint(tmp_path, state(2), ["new"], "one", RUN, limit=2)
    assert load_checkpoint(checkpoints(tmp_path)[-1], RUN)[1] == ["new"]


def test_a_checkpoint_that_is_being_removed_is_none(tmp_path):
    """However far the removal came: what is left must not look like a checkpoint."""
    import hf_mlopt.federated.checkpoint as module

    save_checkpoint(tmp_path, state(1), ["old"], "one", RUN, limit=2)
    save_checkpoint(tmp_path, state(2), ["old"], "one", RUN, limit=2)

    def half(path, **_):
        if not os.path.isdir(path):
            return
        os.unlink(os.path.join(path, "server.safetensors"))
        os.kill(os.getpid(), 9)

    def save():
        with patched(module.shutil, "rmtree", half):
            save_checkpoint(tmp_path, state(2), ["new"], "one", RUN, limit=2)

    assert killed(save)
    for path in checkpoints(tmp_path):
        load_checkpoint(path, RUN)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"algorithm": "fedavg"}, {"algorithm_args": None}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed):
    path = save_checkpoint(tmp_path, state(1), [], "one", RUN, limit=2)
    with pytest.raises(InputError, match=next(iter(changed))):
        load_checkpoint(path, {**RUN, **changed})


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="resume_from_checkpoint=.*nothing"):
        load_checkpoint(tmp_path / "nothing", RUN)
    (tmp_path / "server.json").write_text("{")
    with pytest.raises(InputError, match="resume_from_checkpoint"):
        load_checkpoint(tmp_path, RUN)
