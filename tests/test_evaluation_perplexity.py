import math

import pytest
import torch

from hf_mlopt.data import load_text, tokenize_corpus
from hf_mlopt.errors import InputError
from hf_mlopt.evaluation import perplexity
from tests.reference.perplexity import perplexity as reference_perplexity


@pytest.fixture
def token_ids():
    return torch.randint(0, 260, (103,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("window", "batch_size"), [(2, 8), (16, 4), (17, 1), (103, 8)])
def test_agrees_with_the_reference(tiny_mixtral, token_ids, window, batch_size):
    model = tiny_mixtral()
    result = perplexity(model, token_ids, window, batch_size)
    assert result.perplexity == pytest.approx(reference_perplexity(model, token_ids.tolist(), window), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.windows, result.window) == (103 // window, window)
    assert result.tokens == (103 // window) * (window - 1)


def test_the_tail_is_dropped_and_windows_do_not_see_each_other(tiny_mixtral, token_ids):
    model = tiny_mixtral()
    whole = perplexity(model, token_ids, 25)
    assert whole == perplexity(model, token_ids[:100], 25)
    parts = [perplexity(model, part, 25).nll for part in token_ids[:100].split(25)]
    assert whole.nll == pytest.approx(sum(parts) / 4, rel=1e-6)


def test_the_standard_error_is_that_of_a_mean_over_windows(tiny_mixtral, token_ids):
    model = tiny_mixtral()
    nlls = [perplexity(model, part, 20).nll for part in token_ids[:100].split(20)]
    mean = sum(nlls) / 5
    variance = sum((nll - mean) ** 2 for nll in nlls) / 4
    result = perplexity(model, token_ids, 20)
    assert result.stderr == pytest.approx(math.exp(mean) * math.sqrt(variance / 5), rel=1e-4)
    assert perplexity(model, token_ids[:20], 20).stderr is None


@pytest.mark.parametrize("training", [True, False])
def test_restores_the_mode_and_leaves_no_gradient(tiny_mixtral, token_ids, training):
    model = tiny_mixtral(attention_dropout=0.5).train(training)
    first = perplexity(model, token_ids, 20)
    assert model.training is training
    assert first == perplexity(model, token_ids, 20)  # no dropout during the measurement
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_is_taken_in_float32(tiny_mixtral, token_ids):
    model = tiny_mixtral()
    result = perplexity(model.to(torch.bfloat16), token_ids, 20)
    with torch.no_grad():
        logits = model(token_ids[:100].view(5, 20)).logits.float()
    log_probabilities = logits[:, :-1].log_softmax(-1).gather(-1, token_ids[:100].view(5, 20)[:, 1:, None])
    assert result.nll == pytest.approx(-log_probabilities.mean().item(), rel=1e-5)


def test_nan_is_refused_and_the_mode_restored(tiny_mixtral, token_ids):
    model = tiny_mixtral().train()
    model.lm_head.weight.data[7, 0] = torch.nan
    with pytest.raises(InputError, match="loss is nan in window 0: .*NaN or Inf"):
        perplexity(model, token_ids, 20, batch_size=2)
    assert model.training


@pytest.mark.parametrize(
    ("window", "message"), [(104, "103 tokens, less than one window of 104"), (1, "window=1: must be at least 2")]
)
def test_impossible_windows_are_refused(tiny_mixtral, token_ids, window, message):
    with pytest.raises(InputError, match=message):
        perplexity(tiny_mixtral(), token_ids, window)


def test_reference_model_on_wikitext(shared_data):
    """The value recorded when the model was trained: 37.8 on the first 200 windows of 128 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models" / "mixtral-8x-wiki"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents, provenance = load_text(str(shared_data / "text" / "wikitext2-test.txt"))
    assert provenance == {"source": "wikitext2-test.txt"}
    token_ids = tokenize_corpus(documents, tokenizer)
    result = perplexity(AutoModelForCausalLM.from_pretrained(folder), token_ids[: 200 * 128], 128)
    assert result.perplexity == pytest.approx(37.78, abs=0.02)
    assert (result.windows, result.tokens) == (200, 200 * 127)
