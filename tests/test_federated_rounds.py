"""One round: who is left out and why, and what the history says of it."""

import pytest
import torch

from hf_mlopt.federated import RoundFailed
from hf_mlopt.federated import rounds as module
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.storage import load_message
from tests.federations import (
    NET_SITES,
    asked_twice,
    corrupted,
    digests,
    give_faults,
    kept_by,
    lost,
    net_federation,
    patched,
    raising,
    same_bits,
    weights_of,
    without_timings,
)


def set_nan(weights, scalars):
    weights["last.bias"][0] = float("nan")


def set_shape(weights, scalars):
    weights["last.bias"] = torch.zeros(2)


def set_dtype(weights, scalars):
    weights["last.bias"] = weights["last.bias"].double()


def drop_one(weights, scalars):
    del weights["last.bias"]


def set_round(weights, scalars):
    scalars["round"] -= 1


def set_samples(weights, scalars):
    scalars["num_samples"] = 0


FAULTS = [
    (corrupted(set_nan), "'weights', 'last.bias': not finite"),
    (corrupted(set_shape), "'weights', 'last.bias': shape [2] instead of [1]"),
    (corrupted(set_dtype), "'weights', 'last.bias': dtype torch.float64 instead of torch.float32"),
    (corrupted(drop_one), "tensors of 'weights': missing ['last.bias']"),
    (corrupted(set_round), "round=0 instead of 1 (a stale reply)"),
    (corrupted(set_samples), "num_samples=0; an int above 0 is needed"),
    (raising, "OSError: the disk is full"),
    (lost, "no answer within 1 s"),
]


@pytest.fixture(scope="module")
def without_b(tmp_path_factory):
    """A training in which site b is not to be reached in round 1."""
    trainer = net_federation(tmp_path_factory.mktemp("without"), num_rounds=2, evaluate_every=0)
    give_faults(trainer, {("b", 1): raising}).train()
    return trainer


@pytest.mark.parametrize("fault, reason", FAULTS)
def test_a_site_that_does_wrong_is_left_out_with_its_reason(tmp_path, without_b, fault, reason):
    trainer = give_faults(net_federation(tmp_path, num_rounds=2, evaluate_every=0), {("b", 1): fault})
    row = trainer.train()
    assert row["absent"] == {"b": reason} and row["num_sites"] == 3
    assert row["num_samples"] == sum(len(NET_SITES[site]["train"]) for site in "acd")
    assert digests(trainer.history) == digests(without_b.history)
    assert row["train_loss"] == without_b.history[-1]["train_loss"]


@pytest.mark.parametrize("loss", [float("nan"), "none"])
def test_a_loss_that_is_no_number_spoils_nothing_else(tmp_path, loss):
    def set_loss(weights, scalars):
        scalars["train_loss"] = loss

    trainer = net_federation(tmp_path, num_rounds=1, evaluate_every=0)
    row = give_faults(trainer, {("b", 0): corrupted(set_loss)}).train()
    assert row["absent"] == {} and row["train_loss"] == pytest.approx(
        sum(row["sites"][site]["train_loss"] for site in "acd") / 3
    )


@pytest.mark.parametrize("how", [{"shuffled": True}, {"twice": True}])
def test_neither_order_nor_repetition_of_replies_matters(tmp_path, how):
    settings = {"algorithm": "scaffold", "site_fraction": 0.75}
    trainer = net_federation(tmp_path / "plain", **settings)
    trainer.train()
    other = give_faults(net_federation(tmp_path / "other", **settings), **how)
    other.train()
    assert without_timings(other.history) == without_timings(trainer.history)
    backwards = dict(reversed(NET_SITES.items()))
    third = net_federation(tmp_path / "third", backwards, **settings)
    third.train()
    assert without_timings(third.history) == without_timings(trainer.history)


@pytest.mark.parametrize("how", [{}, {"shuffled": True, "twice": True}])
def test_replies_that_wait_in_files_give_the_same_bits(tmp_path, how):
    trainer = net_federation(tmp_path / "memory", algorithm="scaffold")
    trainer.train()
    spooled = give_faults(net_federation(tmp_path / "files", algorithm="scaffold"), {("c", 1): asked_twice}, **how)
    folders = []

    def mkdtemp(prefix):
        folders.append(tmp_path / f"spool {len(folders)}")
        folders[-1].mkdir()
        return str(folders[-1])

    with patched(module, "_IN_MEMORY", 100), patched(module.tempfile, "mkdtemp", mkdtemp):
        spooled.train()
    assert without_timings(spooled.history) == without_timings(trainer.history)
    assert len(folders) >= 3 and not any(folder.exists() for folder in folders)


def test_too_few_sites_fail_the_round_and_it_can_be_done_again(tmp_path):
    undisturbed = net_federation(tmp_path / "undisturbed")
    undisturbed.train()
    trainer = net_federation(tmp_path / "failed", min_sites=3)
    give_faults(trainer, {("b", 1): raising, ("c", 1): corrupted(set_nan)})
    with pytest.raises(RoundFailed, match="2 usable replies, 3 are needed") as caught:
        trainer.train()
    for told in ("b: OSError: the disk is full", "c: 'weights', 'last.bias': not finite", "resume"):
        assert told in str(caught.value)
    assert trainer.algorithm.round == 1 and len(trainer.history) == 1
    give_faults(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert digests(trainer.history) == digests(undisturbed.history)


def test_a_round_that_fails_at_the_start_can_be_done_again(tmp_path):
    trainer = net_federation(tmp_path)
    give_faults(trainer, dict.fromkeys([(site, 0) for site in "abcd"], raising))
    with pytest.raises(RoundFailed, match="0 usable replies, 1 are needed"):
        trainer.train()
    give_faults(trainer).train()
    assert [row["round"] for row in trainer.history] == [0, 1, 2]


def test_a_row_says_what_was_used(tmp_path):
    trainer = net_federation(tmp_path, num_rounds=2)
    trainer.train()
    first, last = trainer.history
    assert first["start_digest"] == trainer.client.initial().digest()
    assert last["digest"] == Message({"weights": weights_of(trainer)}).digest()
    size = Message({"weights": weights_of(trainer)}).nbytes + 4 * 3 * 2 + 8  # of batch normalization
    assert first["bytes_down"] == first["bytes_up"] == 4 * size
    change = sum(
        float((weights_of(trainer)[n].double() - before.double()).square().sum())
        for n, before in checkpoint_weights(tmp_path, 1).items()
    )
    assert last["update_norm"] == pytest.approx(change**0.5, rel=1e-12)
    assert last["sites"]["a"]["num_steps"] == 2 and last["sites"]["a"]["num_samples"] == 24
    assert not any(name.startswith("eval_") for name in last["sites"]["a"])


def checkpoint_weights(folder, round):
    return load_message(folder / f"checkpoint-{round}" / "server.safetensors").groups["weights"]


# Evaluation: of which model, where, and when.


def recomputed(trainer, weights, buffers, site):
    """Mean loss of a site's rows under a model, by hand."""
    net = trainer.client.model_init()
    net.load_state_dict({**net.state_dict(), **weights, **buffers, "tied.weight": weights["middle.weight"]})
    rows = NET_SITES[site]["test"]
    net.eval()
    with torch.no_grad():
        return float(net(torch.stack([r["x"] for r in rows]), torch.stack([r["labels"] for r in rows]))["loss"])


@pytest.mark.parametrize("algorithm", ["fedavg", "domo"])
def test_metrics_of_a_row_are_those_of_the_model_after_it(tmp_path, algorithm):
    """Fused with the next round where sites are sent that model, and in an exchange of its own where not."""
    how = {"save_total_limit": None, "algorithm": algorithm, "per_device_eval_batch_size": 64}
    trainer = net_federation(tmp_path, mlopt_optim="sgd", learning_rate=1e-3, **how)
    assert trainer.algorithm.sends_model == (algorithm == "fedavg")
    tasks = []

    def counted(answer, site, message):
        tasks.append(message.scalars["task"])
        return answer(site, message)

    give_faults(trainer, {(site, r): counted for site in "abcd" for r in range(4)}).train()
    assert tasks.count("evaluate") == (4 if algorithm == "fedavg" else 12)
    for r, row in enumerate(trainer.history):
        groups = load_message(tmp_path / f"checkpoint-{r + 1}" / "server.safetensors").groups
        total, count = 0.0, 0
        for site in "abcd":
            found = row["evaluation"]["sites"][site]
            expected = recomputed(trainer, groups["weights"], groups["buffers"], site)
            assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
            assert found["num_evaluated"] == len(NET_SITES[site]["test"])
            total, count = total + expected * found["num_evaluated"], count + found["num_evaluated"]
        assert row["evaluation"]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.history[-1]["evaluation"]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("algorithm", ["fedavg", "domo"])
@pytest.mark.parametrize("every, evaluated", [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (3, [2, 4]), (9, [4])])
def test_rounds_that_are_evaluated(tmp_path, algorithm, every, evaluated):
    trainer = net_federation(
        tmp_path,
        {site: NET_SITES[site] for site in "ab"},
        algorithm=algorithm,
        num_rounds=5,
        local_steps=1,
        learning_rate=1e-3,
        evaluate_every=every,
        eval_dataset=NET_SITES["c"]["test"],
    )
    trainer.train()
    assert [row["round"] for row in trainer.history if "evaluation" in row] == evaluated
    assert [row["round"] for row in trainer.history if "server" in row] == evaluated


@pytest.mark.parametrize("algorithm", ["fedavg", "ditto"])  # which has loaded another model in between
def test_evaluation_changes_nothing(tmp_path, algorithm):
    runs, how = [], {"algorithm": algorithm, "eval_dataset": NET_SITES["c"]["test"]}
    for every in (0, 1):
        runs.append(net_federation(tmp_path / str(every), evaluate_every=every, **how))
        runs[-1].train()
    assert digests(runs[0].history) == digests(runs[1].history)
    assert same_bits(weights_of(runs[0]), weights_of(runs[1]))


def test_the_server_evaluates_on_rows_of_its_own(tmp_path):
    trainer = net_federation(
        tmp_path,
        eval_dataset=NET_SITES["c"]["test"],
        compute_metrics=mean_of_predictions,
        per_device_eval_batch_size=64,
    )
    row = trainer.train()
    groups = trainer.algorithm.groups
    expected = recomputed(trainer, groups["weights"], groups["buffers"], "c")
    assert row["server"]["server_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["server"]["server_mean"] == pytest.approx(row["evaluation"]["sites"]["c"]["eval_mean"], rel=1e-5)


def mean_of_predictions(prediction):
    return {"mean": float(prediction.predictions.mean())}


def test_sites_without_rows_to_evaluate_on_are_left_out_of_it(tmp_path):
    sites = {"a": NET_SITES["a"], "b": NET_SITES["b"]["train"]}
    row = net_federation(tmp_path / "one", sites).train()
    assert list(row["evaluation"]["sites"]) == ["a"]
    row = net_federation(tmp_path / "none", {"b": NET_SITES["b"]["train"]}).train()
    assert "evaluation" not in row


def test_personal_models_are_evaluated_beside_the_common_one(tmp_path):
    how = {"algorithm": "ditto", "algorithm_args": {"ditto_lambda": 0.0}, "per_device_eval_batch_size": 64}
    trainer = net_federation(tmp_path, num_rounds=4, **how)
    row = trainer.train()
    for site in "abcd":
        kept = kept_by(trainer, site)[3].groups
        expected = recomputed(trainer, kept["weights"], kept["buffers"], site)
        found = row["evaluation"]["sites"][site]
        assert found["eval_personal_loss"] == pytest.approx(expected, rel=1e-5) != found["eval_loss"]


def test_of_fedbn_every_site_evaluates_with_its_own_norms(tmp_path):
    trainer = net_federation(tmp_path, algorithm="fedbn", per_device_eval_batch_size=64)
    row = trainer.train()
    for site in "abcd":
        kept = kept_by(trainer, site)[2].groups
        expected = recomputed(trainer, {**weights_of(trainer), **kept["weights"]}, kept["buffers"], site)
        assert row["evaluation"]["sites"][site]["eval_loss"] == pytest.approx(expected, rel=1e-5)
