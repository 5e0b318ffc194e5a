"""Sites in processes of their own: as in one process bit for bit, and whatever happens to one of them."""

import os
import signal
import time

import pytest
import torch

from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines import Exchanged, InProcessEngine, ProcessEngine


pytestmark = pytest.mark.distributed
SITES = ["s1", "s2", "s3", "s4"]


def answer(site, message):
    """
    Adds the site's number to `w`. A scalar of its name says what goes wrong with it: `raise`, `exit`, `hang`, or
    `exit once`, for which there is a folder `memory`.
    """
    wrong = message.scalars.get(site, "")
    if wrong == "raise":
        raise OSError("the disk is full")
    if wrong == "exit":
        if "memory" in message.scalars:
            with open(os.path.join(message.scalars["memory"], f"{site} was asked"), "a") as file:
                file.write("x")
        os._exit(7)
    if wrong == "hang":
        time.sleep(600)
    if wrong == "exit once":
        mark = os.path.join(message.scalars["memory"], site)
        if not os.path.exists(mark):
            open(mark, "w").close()
            os._exit(7)
    w = {name: tensor + int(site[1:]) for name, tensor in message.groups["weights"].items()}
    return Message({"weights": w}, {"pid": os.getpid()})


def message(padding=0, **scalars):
    w = torch.tensor([0.5, float("nan"), -0.0])
    weights = {"w": w, "half": w.bfloat16(), "count": torch.tensor(2**60)}
    return Message({"weights": weights, **({"padding": {"zeros": torch.zeros(padding)}} if padding else {})}, scalars)


def exchange(engine, sites=SITES, **scalars):
    exchanged, order = Exchanged(), []
    engine.exchange({site: message(**scalars) for site in sites}, exchanged, order.append)
    assert sorted(order) == sorted(sites) == sorted([*exchanged.replies, *exchanged.failures])
    return exchanged


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids, seconds=60):
    ends = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < ends:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


@pytest.fixture(scope="module")
def engine():
    engine = ProcessEngine(SITES, answer, num_workers=2)
    yield engine
    engine.close()


def pids_of(exchanged):
    return {reply.scalars["pid"] for reply in exchanged.replies.values()}


def test_what_processes_answer_is_what_this_one_does(engine):
    found, here = exchange(engine), exchange(InProcessEngine(SITES, answer))
    assert engine.sites() == SITES and found.failures == {}
    for site in SITES:
        assert Message(found.replies[site].groups) == Message(here.replies[site].groups)
        assert found.scalars[site]["bytes_up"] == here.replies[site].nbytes == 3 * 4 + 3 * 2 + 8
    assert len(pids_of(found)) == 2 and os.getpid() not in pids_of(found)


def test_a_worker_that_does_not_read_does_not_hold_the_others_up(engine):
    workers = pids_of(exchange(engine))
    stopped = min(workers)
    os.kill(stopped, signal.SIGSTOP)
    engine.timeout = 10.0
    try:
        found = exchange(engine, padding=1_000_000)  # more bytes than a pipe takes
        assert list(found.failures.values()) == ["no answer within 10 s"] and len(found.replies) == 3
        assert all_end([stopped])
    finally:
        engine.timeout = None
    assert exchange(engine).failures == {}


@pytest.mark.parametrize("make", [lambda engine: engine, lambda engine: InProcessEngine(SITES, answer)])
def test_a_site_that_raises_has_failed_and_no_other(engine, make):
    found = exchange(make(engine), s3="raise")
    assert found.failures == {"s3": "OSError: the disk is full"} and sorted(found.replies) == ["s1", "s2", "s4"]


def test_a_site_that_dies_is_asked_again_and_then_left_out(engine, tmp_path):
    before = pids_of(exchange(engine))
    found = exchange(engine, s1="exit", s3="exit once", memory=str(tmp_path))
    assert found.failures == {"s1": "its process died (exit code 7)"}
    assert (tmp_path / "s1 was asked").read_text() == "xx"  # once more, and no more
    assert sorted(found.replies) == ["s2", "s3", "s4"]
    after = exchange(engine)
    assert after.failures == {} and before != pids_of(after)


def test_a_site_that_hangs_is_left_behind(engine):
    workers = pids_of(exchange(engine))
    engine.timeout = 5.0
    try:
        found = exchange(engine, s1="hang")
        assert found.failures == {"s1": "no answer within 5 s"}
        assert sorted(found.replies) == ["s2", "s3", "s4"]
        (hung,) = workers - pids_of(found)
        assert all_end([hung])
        engine.timeout = 0.5
        found = exchange(engine, ["s2"], s2="hang")
        assert found.failures == {"s2": "no answer within 0.5 s"}
    finally:
        engine.timeout = None
    assert exchange(engine).failures == {}


def test_sites_that_a_hanging_one_keeps_waiting_are_named():
    alone = ProcessEngine(["s1", "s2", "s3"], answer, num_workers=1, timeout=0.5, retries=0)
    found = exchange(alone, alone.sites(), s1="hang")
    assert found.failures["s1"] == "no answer within 0.5 s"
    assert "num_workers" in found.failures["s2"] and "num_workers" in found.failures["s3"]
    alone.close()


def test_nothing_is_left_of_a_closed_engine(engine):
    pids = pids_of(exchange(engine))
    engine.close()
    assert len(pids) == 2 and not any(map(is_alive, pids))
    engine.close()
    assert exchange(engine, ["s4"]).failures == {}  # it starts again what it needs


def test_nothing_is_left_of_a_server_that_was_killed(tmp_path):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's handler would wait for what hangs
        signal.alarm(120)
        pids = pids_of(exchange(ProcessEngine(SITES, answer, num_workers=1)))
        (tmp_path / "pids").write_text(" ".join(map(str, pids)))
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert all_end((tmp_path / "pids").read_text().split())


def both(folder, **settings):
    """The same training in this process and in two; of the second also its client's folder."""
    from tests.federations import net_federation, without_timings

    here = net_federation(folder / "here", **settings)
    here.train()
    there = net_federation(folder / "there", num_workers=2, **settings)
    there.train()
    assert without_timings(there.history) == without_timings(here.history)
    return here, there


def test_training_in_processes_is_training_in_one_bit_for_bit(tmp_path):
    """With controls in files, a loss function of a closure, and nothing left afterwards."""
    from multiprocessing import active_children

    shift, others = 0.5, active_children()

    def metrics(prediction):
        return {"shifted": float(prediction.predictions.mean()) + shift}

    _, there = both(tmp_path, algorithm="scaffold", num_rounds=2, compute_metrics=metrics)
    assert there.history[-1]["evaluation"]["sites"]["a"]["eval_shifted"]
    assert active_children() == others


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "fedavg", "mlopt_optim": "adamw", "optimizer_state": "keep", "bf16": True},
        {"algorithm": "fedbn", "site_fraction": 0.5},
        {"algorithm": "ditto"},
        {"algorithm": "domo", "mlopt_optim": None, "learning_rate": 1e-3},
    ],
)
def test_algorithms_in_processes_are_those_in_one(tmp_path, settings):
    both(tmp_path, **settings)


@pytest.mark.slow
def test_a_site_that_dies_in_training_is_left_out(tmp_path):
    from tests.federations import digests, give_faults, net_federation, raising

    def callbacks(site):
        from transformers import TrainerCallback

        class Dies(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                os._exit(9)

        return [Dies()] if site == "b" else []

    trainer = net_federation(tmp_path / "a", num_workers=2, num_rounds=2, evaluate_every=0, site_callbacks=callbacks)
    trainer.train()
    assert [row["absent"] for row in trainer.history] == [{"b": "its process died (exit code 9)"}] * 2
    without = net_federation(tmp_path / "b", num_rounds=2, evaluate_every=0)
    give_faults(without, {("b", r): raising for r in range(2)}).train()
    assert digests(trainer.history) == digests(without.history)
