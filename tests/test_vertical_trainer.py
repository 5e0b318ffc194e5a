"""Training, saving, resuming and judging a vertical model with all parties in one process."""

import json

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression
from transformers import TrainerCallback

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.arguments import VerticalArguments
from hf_mlopt.vertical.checkpoints import load_block, load_state
from hf_mlopt.vertical.trainer import VerticalTrainer


OPEN = {"accept_gram_disclosure": True, "query_budget": None}
NAMES = ("bank", "shop", "telco")


def data(load=load_breast_cancer):
    X, y = load(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    return dict(
        zip(NAMES, np.array_split(X, 3, axis=1), strict=True)
    ), 2.0 * y - 1 if load is load_breast_cancer else y


def make(tmp_path=None, load=load_breast_cancer, callbacks=(), **options):
    features, y = data(load)
    given = {key: options.pop(key) for key in ("save_steps", "compute_metrics", "feature_names") if key in options}
    args = VerticalArguments(**({"batch_size": 32, "learning_rate": 0.2, "l2": 1e-2} | OPEN | options))
    trainer = VerticalTrainer(args, features, y, "bank", output_dir=tmp_path, callbacks=callbacks, **given)
    return trainer, features, y


@pytest.mark.parametrize("algorithm", ["svrg", "saga"])
def test_a_masked_asynchronous_run_matches_scikit_learn(algorithm):
    """A2 with real masks and threads: the same objective, the same accuracy."""
    trainer, features, y = make(algorithm=algorithm, num_epochs=30, l2=0.1)
    metrics = trainer.train()
    X = np.hstack([np.hstack(list(features.values())), np.ones((569, 1))])
    model = LogisticRegression(C=1 / (569 * 0.1), fit_intercept=False, tol=1e-10, max_iter=1000).fit(X, y)
    exact, w = model.coef_[0], np.vstack([party.weights for party in trainer.parties.values()])[:, 0]
    order = [*range(10), *range(11, 31), 10]  # the bank's block ends with the bias
    objective = lambda w: np.mean(np.logaddexp(0, -y * (X @ w))) + 0.1 / 2 * w @ w  # noqa: E731
    assert objective(w[order]) - objective(exact) <= 1e-5
    found = trainer.evaluate(features, y)
    assert abs(found["accuracy"] - model.score(X, y)) <= 1e-3
    assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(y, X @ exact), abs=1e-3)
    assert found["log_loss"] == pytest.approx(sklearn_metrics.log_loss(y, trainer.predict(features)), rel=1e-9)
    assert {name: m["updates"] for name, m in metrics.items()} == dict.fromkeys(NAMES, 30 * 18)
    assert all(0 <= m["share_waiting"] <= 1 < m["updates_per_second"] for m in metrics.values())
    trainer.close()


def test_classes_and_values_match_closed_forms():
    """A11."""
    trainer, features, y = make(
        load=load_diabetes, loss="ridge", l2=0.5, num_epochs=30, learning_rate=0.05, bias=False
    )
    y_z = (y - y.mean()) / y.std()
    trainer = VerticalTrainer(trainer.args, features, y_z, "bank")
    trainer.train()
    X = np.hstack(list(features.values()))
    exact = np.linalg.solve(X.T @ X / 442 + 0.5 * np.eye(10), X.T @ y_z / 442)
    w = np.vstack([party.weights for party in trainer.parties.values()])[:, 0]
    np.testing.assert_allclose(w, exact, atol=1e-4)
    found = trainer.evaluate(features, y_z)
    assert found["rmse"] ** 2 == pytest.approx(np.mean((X @ exact - y_z) ** 2), rel=1e-4)
    assert found["r2"] == pytest.approx(1 - np.mean((X @ exact - y_z) ** 2), rel=1e-4)
    trainer.close()

    trainer, features, y = make(load=load_wine, loss="multinomial", num_labels=3, num_epochs=40, l2=0.3)
    trainer.train()
    X = np.hstack([np.hstack(list(features.values())), np.ones((178, 1))])
    exact = LogisticRegression(C=1 / (178 * 0.3), fit_intercept=False, tol=1e-10, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(trainer.predict(features), exact.predict_proba(X), atol=1e-3)
    assert trainer.evaluate(features, y)["accuracy"] == pytest.approx(exact.score(X, y), abs=1e-3)
    trainer.close()


@pytest.mark.parametrize("mask", ["pairwise", "tree", "none"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, mask):
    options = {"mode": "sync", "mask": mask, "allow_unsafe": mask == "none", "algorithm": "svrg", "num_epochs": 3}
    whole, _, _ = make(**options)
    whole.train()

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 31:
                raise KeyError("power cut")

    first, _, _ = make(tmp_path, save_steps=10, callbacks=[Crash()], timeout=300.0, **options)
    with pytest.raises(KeyError):
        first.train()
    again, _, _ = make(tmp_path, save_steps=10, timeout=300.0, **options)
    again.train(resume=True)
    for name in NAMES:
        np.testing.assert_array_equal(again.parties[name].weights, whole.parties[name].weights)
        assert again.metrics[name]["updates"] == 54 - 30
    assert json.loads((tmp_path / "state.json").read_text())["global_step"] == 54


def test_parties_without_labels_resume_with_their_owner(tmp_path):
    options = {"mode": "sync", "labels": "owner", "backward": "plain", "allow_unsafe": True, "num_epochs": 3}
    whole, _, _ = make(**options)
    whole.train()

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 31:
                raise KeyError("power cut")

    first, _, _ = make(tmp_path, save_steps=10, callbacks=[Crash()], **options)
    with pytest.raises(KeyError):
        first.train()
    # The newest that all have: as if the owner had ended between the others' files and its own.
    (tmp_path / "bank" / "checkpoint-30").rename(tmp_path / "lost")
    again, _, _ = make(tmp_path, save_steps=10, **options)
    again.train(resume=True)
    assert again.metrics["bank"]["updates"] == 54 - 20
    for name in NAMES:
        np.testing.assert_array_equal(again.parties[name].weights, whole.parties[name].weights)
        assert again.parties[name].store.version == 54


def test_an_asynchronous_run_resumes_each_party_where_it_was(tmp_path):
    first, _, _ = make(tmp_path, save_steps=9, max_steps=30)
    first.train()
    (tmp_path / "shop" / "checkpoint-27").rename(tmp_path / "lost")
    again, _, _ = make(tmp_path, max_steps=30)
    again.train(resume=True)
    assert [again.metrics[name]["updates"] for name in NAMES] == [3, 12, 3]
    assert [party.store.version for party in again.parties.values()] == [30] * 3


def test_each_party_saves_its_own_block(tmp_path):
    names = {"bank": [f"säule {i}" for i in range(10)]}
    trainer, _, _ = make(tmp_path, feature_names=names, max_steps=5, algorithm="sgd")
    trainer.train()
    trainer.save_model()
    for name, party in trainer.parties.items():
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [
            "model.safetensors",
            "vertical_config.json",
        ]
        weights, config = load_block(tmp_path / name)
        np.testing.assert_array_equal(weights, party.weights)
        assert (len(weights), config["party"], config["algorithm"]) == (11 if name == "bank" else 10, name, "sgd")
        assert config["feature_names"] == names.get(name, [f"x{i}" for i in range(10)])
    with pytest.raises(InputError, match="no block"):
        load_block(tmp_path / "nowhere")
    trainer.feature_names["shop"] = ["one"]
    with pytest.raises(InputError, match="1 names for the 10 columns of 'shop'"):
        trainer.save_model()


def test_callbacks_follow_the_owner_and_may_stop():
    for mode in ("sync", "async"):
        seen = []

        class Watch(TrainerCallback):
            def on_train_begin(self, args, state, control, seen=seen, **kwargs):
                seen.append(("begin", state.max_steps))

            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop |= state.global_step == 20

            def on_epoch_end(self, args, state, control, seen=seen, **kwargs):
                seen.append(("epoch", state.epoch))

            def on_train_end(self, args, state, control, seen=seen, **kwargs):
                seen.append(("end", state.global_step))

        trainer, _, _ = make(callbacks=[Watch()], mode=mode, num_epochs=50, timeout=300.0)
        trainer.train()
        last = 21 if mode == "sync" else 20
        assert seen == [("begin", 900), ("epoch", 1.0), ("end", last)]
        versions = [party.store.version for party in trainer.parties.values()]
        assert versions == [21] * 3 if mode == "sync" else max(versions) < 900
        trainer.close()


def test_own_metrics_take_the_place_of_the_usual_ones():
    trainer, features, y = make(max_steps=3, compute_metrics=lambda z, labels: {"rows": len(z), "sum": labels.sum()})
    trainer.train()
    assert trainer.evaluate(features, y) == {"rows": 569, "sum": y.sum()}
    with pytest.raises(InputError, match="labels: 5 rows, the features have 569"):
        trainer.evaluate(features, y[:5])
    with pytest.raises(InputError, match="needed of"):
        trainer.predict({"bank": features["bank"]})
    trainer.close()


def test_what_cannot_be_trained_or_resumed_is_refused(tmp_path):
    with pytest.raises(InputError, match="save_steps=5: must be at least 1, and needs output_dir"):
        make(save_steps=5)
    with pytest.raises(ConfigurationError, match="query_budget"):
        make(num_epochs=40, query_budget="auto")
    with pytest.raises(InputError, match="resume: no checkpoint"):
        make(tmp_path)[0].train(resume=True)
    trainer, _, _ = make(tmp_path, save_steps=5, max_steps=5)
    trainer.train()
    other = make(tmp_path, max_steps=5, learning_rate=0.1)[0].parties["bank"]
    with pytest.raises(InputError, match="is of run"):
        load_state(other, tmp_path / "bank" / "checkpoint-5")
    with pytest.raises(InputError, match="is of party 'shop', this is 'bank'"):
        load_state(trainer.parties["bank"], tmp_path / "shop" / "checkpoint-5")
    (tmp_path / "bank" / "checkpoint-5" / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        load_state(trainer.parties["bank"], tmp_path / "bank" / "checkpoint-5")
    trainer.close()
