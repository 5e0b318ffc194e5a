"""Our perplexity as a metric of `evaluate`, from the folder in the package."""

from dataclasses import asdict

import evaluate
import pytest
import torch
from command_line import save
from network import no_network  # noqa: F401

from hf_mlopt.evaluation import perplexity, perplexity_metric


TEXTS = ["the quick brown fox " * 20, "jumps over the lazy dog " * 20]
COUNT = """
import datasets
import evaluate


class Count(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions):
        return {"texts": len(predictions)}
"""


@pytest.fixture(scope="module")
def models(tiny_mixtral, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("metric")
    return [save(tiny_mixtral(seed), tiny_tokenizer, folder / str(seed)) for seed in (0, 1)]


def expected(model, tokenizer, window):
    token_ids = torch.tensor(tokenizer("\n\n".join(TEXTS)).input_ids)
    return asdict(perplexity(model, token_ids, window))


def test_it_loads_without_network_and_says_the_same(models, tiny_mixtral, tiny_tokenizer, no_network):  # noqa: F811
    metric = evaluate.load(perplexity_metric())
    found = metric.compute(predictions=TEXTS, model_id=str(models[0]), window=32)
    assert found == pytest.approx(expected(tiny_mixtral(0), tiny_tokenizer, 32))
    found = metric.compute(predictions=TEXTS, model_id=tiny_mixtral(1), tokenizer=tiny_tokenizer, window=50)
    assert found == pytest.approx(expected(tiny_mixtral(1), tiny_tokenizer, 50))


def test_it_is_no_copy(monkeypatch, models):
    metric = evaluate.load(perplexity_metric(), model_id=str(models[0]), window=16)
    monkeypatch.setitem(type(metric)._compute.__globals__, "perplexity", lambda *args: pytest.fail("called"))
    with pytest.raises(pytest.fail.Exception, match="called"):
        metric.compute(predictions=TEXTS)


def test_it_combines(models, tiny_mixtral, tiny_tokenizer, tmp_path, no_network):  # noqa: F811
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "count.py").write_text(COUNT)
    loaded = {
        name: evaluate.load(perplexity_metric(), model_id=str(model), window=64)
        for name, model in zip(("dense", "pruned"), models, strict=True)
    }
    found = evaluate.combine({**loaded, "count": str(tmp_path / "count")}).compute(predictions=TEXTS)
    assert found["texts"] == 2
    for seed, name in enumerate(loaded):
        wanted = expected(tiny_mixtral(seed), tiny_tokenizer, 64)
        assert found[f"{name}_perplexity"] == pytest.approx(wanted["perplexity"])
    both = evaluate.combine([perplexity_metric()] * 2)
    assert both.compute(predictions=TEXTS, model_id=str(models[0]), window=64)


def test_what_is_missing_is_named(tiny_mixtral):
    metric = evaluate.load(perplexity_metric())
    with pytest.raises(ValueError, match="model_id=None"):
        metric.compute(predictions=TEXTS)
    with pytest.raises(ValueError, match="tokenizer=None"):
        metric.compute(predictions=TEXTS, model_id=tiny_mixtral())
