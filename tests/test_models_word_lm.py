import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from hf_mlopt.data import token_windows
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.evaluation import perplexity
from hf_mlopt.models import WordLM, WordLMConfig


def small(seed=0, **overrides) -> WordLM:
    set_seed(seed)
    return WordLM(WordLMConfig(**{"vocab_size": 11, "hidden_size": 8, **overrides})).eval()


def tokens(*shape, seed=0) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model: WordLM, row: list[int]) -> list[list[float]]:
    """Logits of one row, float64, a token, a layer and a unit at a time, from the weights by name."""
    w = {name: tensor.double().tolist() for name, tensor in model.state_dict().items()}
    size, layers = model.config.hidden_size, model.config.num_layers
    h, c = [[0.0] * size for _ in range(layers)], [[0.0] * size for _ in range(layers)]
    logits = []
    for token in row:
        x = w["embedding.weight"][token]
        for n in range(layers):
            gates = [
                sum(a * b for a, b in zip(w[f"lstm.weight_ih_l{n}"][j], x, strict=True))
                + sum(a * b for a, b in zip(w[f"lstm.weight_hh_l{n}"][j], h[n], strict=True))
                + w[f"lstm.bias_ih_l{n}"][j]
                + w[f"lstm.bias_hh_l{n}"][j]
                for j in range(4 * size)
            ]
            i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
            for j in range(size):
                c[n][j] = c[n][j] / (1 + math.exp(-f[j])) + math.tanh(g[j]) / (1 + math.exp(-i[j]))
                h[n][j] = math.tanh(c[n][j]) / (1 + math.exp(-o[j]))
            x = h[n]
        rows = zip(w["decoder.weight"], w["decoder.bias"], strict=True)
        logits.append([sum(a * b for a, b in zip(row, x, strict=True)) + bias for row, bias in rows])
    return logits


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_logits_and_loss_by_hand(num_layers):
    model = small(num_layers=num_layers).double()
    torch.nn.init.normal_(model.decoder.bias)
    batch = tokens(2, 5)
    output = model(batch, labels=batch)
    expected = [by_hand(model, row) for row in batch.tolist()]  # so every row starts from zero
    assert output.logits.tolist() == [[pytest.approx(position, abs=1e-12) for position in row] for row in expected]
    losses = []
    for row, logits in zip(batch.tolist(), expected, strict=True):
        for target, position in zip(row[1:], logits[:-1], strict=True):
            losses.append(math.log(sum(math.exp(logit) for logit in position)) - position[target])
    assert output.loss.item() == pytest.approx(sum(losses) / 8, rel=1e-6)  # transformers takes the loss in float32
    assert model(batch, labels=batch, num_items_in_batch=3).loss.item() == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert model(batch).loss is None


def test_ignored_labels_are_no_targets():
    model, batch = small(), tokens(2, 6)
    labels = batch.clone()
    labels[:, 4:] = -100
    assert torch.equal(model(batch, labels=labels).loss, model(batch[:, :4], labels=batch[:, :4]).loss)


def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused():
    model, batch = small(), tokens(2, 6)
    mask = torch.ones_like(batch)
    mask[1, 4:] = 0
    padded = batch.where(mask.bool(), 0)
    assert torch.equal(model(padded, attention_mask=mask).logits[1, :4], model(batch).logits[1, :4])
    with pytest.raises(ValueError, match="pad on the right"):
        model(batch, attention_mask=mask.flip(1))


def test_dropout_stands_after_the_embedding_and_before_the_decoder():
    model = small(dropout=0.5, num_layers=1).train()
    seen = {}
    model.lstm.register_forward_hook(lambda module, inputs, output: seen.update(lstm=(inputs[0], output[0])))
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.update(decoder=inputs[0]))
    batch = tokens(4, 20)
    model(batch)
    for before, after in ((model.embedding(batch), seen["lstm"][0]), (seen["lstm"][1], seen["decoder"])):
        dropped = after == 0
        assert 0.4 < dropped.float().mean() < 0.6
        assert torch.allclose(after[~dropped], 2 * before[~dropped])
    assert small(dropout=0.5).lstm.dropout == 0.5 and model.lstm.dropout == 0


def test_initial_weights_are_those_of_the_example():
    model = small(vocab_size=1000, hidden_size=64)
    for weight, bound in [(model.decoder.weight, 0.1), *((p, 1 / 8) for p in model.lstm.parameters())]:
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not model.decoder.bias.any()
    set_seed(0)
    assert torch.equal(small(seed=0).embedding.weight, small(seed=0).embedding.weight)
    assert not torch.equal(small(seed=0).embedding.weight, small(seed=1).embedding.weight)


def test_the_setting_of_the_measured_run_has_its_number_of_parameters():
    assert small(vocab_size=4000, hidden_size=128, num_layers=1).num_parameters() == 648_096


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_through_the_auto_classes(tmp_path, tied):
    model = small(tie_word_embeddings=tied, dropout=0.3, num_layers=3)
    assert (model.decoder.weight is model.embedding.weight) == tied
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is WordLM and not any(report.values())
    assert type(AutoConfig.from_pretrained(tmp_path)) is WordLMConfig
    assert (loaded.decoder.weight is loaded.embedding.weight) == tied
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.config.dropout, loaded.config.num_layers) == (0.3, 3)
    batch = tokens(2, 5)
    assert torch.equal(loaded(batch).logits, model(batch).logits)


def test_it_generates_what_its_logits_say():
    model, prompt = small(), tokens(2, 3)
    expected = prompt
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("field, value", [("vocab_size", 0), ("num_layers", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigurationError, match=f"{field}="):
        WordLMConfig(**{field: value})


# With a Trainer


def train(folder, batch_size: int, accumulation: int) -> list[float]:
    model = small(dropout=0.0)
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        optim="sgd",
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=token_windows(tokens(4 * 9 * 6), 9))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_means_over_the_same_targets_however_it_accumulates(tmp_path):
    """Trainer divides by the targets that the loss has, without the first token of each window."""
    whole, parts = train(tmp_path, 4, 1), train(tmp_path, 1, 4)
    assert whole == pytest.approx(parts, rel=1e-4)
    assert whole[0] == pytest.approx(math.log(11), abs=0.05)


def test_perplexity_measures_it_and_training_lowers_it():
    model, stream = small(dropout=0.0), torch.arange(11).repeat(30)
    before = perplexity(model, stream, 10)
    batch = stream[:320].view(-1, 10)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    for _ in range(60):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = perplexity(model, stream, 10)
    assert before.perplexity == pytest.approx(11, rel=0.05) and after.perplexity < 1.5
