"""`hf-mlopt train` in one process: what it writes, that it goes on where it stopped, and what it refuses."""

import argparse
import json
import math
import shutil

import pytest
import torch
import yaml
from command_line import hf_mlopt, succeed, weights
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from hf_mlopt.configuration import add_arguments, arguments_given, load_config
from hf_mlopt.data import load_images
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.workflows.launch import as_words, check_num_processes
from hf_mlopt.workflows.train_data import held_out_text
from hf_mlopt.workflows.train_recipe import TrainRecipe


pytestmark = pytest.mark.e2e

LENGTH = 8
SMALL = ("--model-config", '{"hidden_size": 8, "num_layers": 1}', "--sequence-length", LENGTH)
QUICK = ("--max-steps", 4, "--logging-steps", 2, "--disable-tqdm", "--learning-rate", "0.5")
IMAGES = ("--task", "image-classification", "--model-type", "convnext")
CONVNEXT = '{"patch_size": 2, "num_stages": 1, "hidden_sizes": [4], "depths": [1]}'


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences whose last tenth is not like the rest, so that evaluating on the wrong part shows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"{who} {what} the {where} ." for who in "abc" for what in "defgh" for where in ("sea", "hill", "town")]
    path.write_text("\n".join(lines * 8 + ["c d the sea . ."] * 40) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run by RSGDm with a checkpoint in the middle; its directory, and what was printed."""
    output = tmp_path_factory.mktemp("trained") / "output"
    words = (*SMALL, *QUICK, "--mlopt-optim", "rsgdm", "--save-steps", 2, "--hub-token", "secret-token")
    outcome = succeed("train", "--dataset", text, "--tokenizer", "words", "--output-dir", output, *words)
    return output, outcome


def read(output):
    return json.loads((output / "train_results.json").read_text(encoding="utf-8"))


def held_out_loss(output, text):
    """Nats per token of the saved model on the last tenth of a text, window by window."""
    model = AutoModelForCausalLM.from_pretrained(output).double()
    content = text.read_text(encoding="utf-8")
    tail = content[content.rfind("\n", 0, int(0.9 * len(content))) + 1 :]
    ids = AutoTokenizer.from_pretrained(output)(tail).input_ids
    losses = []
    for start in range(0, len(ids) - LENGTH + 1, LENGTH):
        window = ids[start : start + LENGTH]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0]
        losses += [float(-logits[place].log_softmax(-1)[window[place + 1]]) for place in range(LENGTH - 1)]
    return sum(losses) / len(losses)


def test_results_are_those_of_the_saved_model_on_the_held_out_text(trained, text):
    output, outcome = trained
    results = read(output)
    loss = held_out_loss(output, text)
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert results["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert f"perplexity {results['eval_perplexity']:.4g} after 4 steps" in outcome.out
    expected = {"task": "causal-lm", "model": "word_lm", "steps": 4, "seed": 42, "world_size": 1, "device": "cpu"}
    expected |= {"optimizer": {"name": "rsgdm", "args": {}}, "learning_rate": 0.5, "local_steps": 1}
    assert {name: results[name] for name in expected} == expected
    assert results["seconds"] > 0 and results["environment"]["torch"] == torch.__version__
    assert [row["step"] for row in results["log"] if "loss" in row] == [2, 4]


def test_the_loss_at_the_other_points_is_listed(trained, text, tmp_path):
    """x is the one that is saved: a run that evaluates at w has the others' values changed round."""
    results = read(trained[0])
    assert set(results["eval_loss_elsewhere"]) == {"w", "y"}
    optimizer = ("--mlopt-optim", "rsgdm", "--mlopt-optim-args", '{"eval_point": "w"}')
    words = ("--dataset", text, "--tokenizer", "words", "--output-dir", tmp_path / "w", *SMALL, *QUICK, *optimizer)
    succeed("train", *words, "--plot", tmp_path / "plots" / "run.png")
    assert (tmp_path / "plots" / "run.png").is_file() and not (tmp_path / "w" / "curves.png").exists()
    at_w = read(tmp_path / "w")
    assert at_w["eval_loss"] == pytest.approx(results["eval_loss_elsewhere"]["w"], rel=1e-5)
    assert at_w["eval_loss_elsewhere"]["x"] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert at_w["eval_loss_elsewhere"]["y"] == pytest.approx(results["eval_loss_elsewhere"]["y"], rel=1e-5)
    assert len({round(loss, 4) for loss in (results["eval_loss"], *results["eval_loss_elsewhere"].values())}) == 3


def test_the_recipe_is_what_was_given_and_gives_the_same_weights(trained, text, tmp_path):
    output, _ = trained
    recipe = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe == {
        "model_config": {"hidden_size": 8, "num_layers": 1},
        "sequence_length": LENGTH,
        "max_steps": 4,
        "logging_steps": 2.0,
        "disable_tqdm": True,
        "learning_rate": 0.5,
        "mlopt_optim": "rsgdm",
        "save_steps": 2.0,
        "dataset": str(text),
        "tokenizer": "words",
    }
    assert not [file for file in output.glob("*.[jy]*") if "secret-token" in file.read_text(encoding="utf-8")]
    succeed("train", "--config", output / "recipe.yaml", "--output-dir", tmp_path / "again")
    first, second = weights(output), weights(tmp_path / "again")
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_the_plot_is_a_picture_of_both_curves(trained):
    with Image.open(trained[0] / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (1500, 600)
        for box, curves in ((0, 0, 750, 600), {"#999999", "#0072b2"}), ((750, 0, 1500, 600), {"#0072b2"}):
            colours = picture.convert("RGB").crop(box).getcolors(1 << 20)
            assert curves <= {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in colours}


def test_going_on_gives_the_same_weights_as_going_straight_through(trained, tmp_path):
    output, _ = trained
    resumed = tmp_path / "resumed"
    words = ("--output-dir", resumed, "--resume-from-checkpoint", output / "checkpoint-2")
    succeed("train", "--config", output / "recipe.yaml", *words)
    straight, again = weights(output), weights(resumed)
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert [path.name for path in resumed.glob("checkpoint-*")] == [
        "checkpoint-4"
    ]  # the first two were not done again
    assert read(resumed)["eval_loss"] == read(output)["eval_loss"]
    assert [row["step"] for row in read(resumed)["log"] if "loss" in row] == [2, 4]


def test_going_on_begins_at_the_last_whole_checkpoint(trained, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(trained[0], output)
    shutil.rmtree(output / "checkpoint-2")
    for name, files in ("checkpoint-3", ["trainer_state.json"]), ("checkpoint-9", ["model.safetensors"]):
        (output / name).mkdir()
        for file in files:  # to go on from either would fail
            (output / name / file).write_text("{}")
    words = ("--output-dir", output, "--resume-from-checkpoint", "true", "--max-steps", 6)
    outcome = succeed("train", "--config", output / "recipe.yaml", *words)
    assert "after 6 steps" in outcome.out and (output / "checkpoint-6").is_dir()


def test_the_defaults_run_without_a_network(tmp_path):
    outcome = succeed("train", "--output-dir", tmp_path / "output", "--max-steps", 1, "--disable-tqdm")
    results = read(tmp_path / "output")
    assert (results["model"], results["optimizer"]["name"]) == ("word_lm", "adamw_torch_fused")
    assert results["data"]["train"]["source"] == "embedded" and results["data"]["eval"]["split"] == "test"
    assert results["data"]["vocab_size"] == 2048 and "word_lm, " in outcome.err


def test_a_checkpoint_is_gone_on_from_with_its_own_tokenizer(trained, text, tmp_path):
    output, _ = trained
    words = ("--dataset", text, "--model", output, "--sequence-length", LENGTH, *QUICK, "--learning-rate", 0)
    succeed("train", "--output-dir", tmp_path / "on", *words, "--plot", "false")
    assert not list((tmp_path / "on").glob("*.png"))
    assert read(tmp_path / "on")["eval_loss"] == pytest.approx(read(output)["eval_loss"], rel=1e-6)
    assert read(tmp_path / "on")["model"] == "output"  # without where it lies on this machine


@pytest.mark.parametrize(
    "model_type, config",
    [
        ("gpt2", {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}),
        # Its own pad token would lie outside of this vocabulary.
        ("phi3", {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}),
    ],
)
def test_an_architecture_of_transformers_gets_vocabulary_and_special_tokens_of_the_text(
    model_type, config, text, tmp_path
):
    words = ("--model-type", model_type, "--model-config", json.dumps(config), "--vocab-size", 300)
    succeed("train", "--dataset", text, "--output-dir", tmp_path / "output", *words, "--sequence-length", 16, *QUICK)
    saved = json.loads((tmp_path / "output" / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert saved["vocab_size"] == len(tokenizer) and saved["eos_token_id"] == tokenizer.eos_token_id
    assert config.items() <= saved.items() and saved["use_cache"] is True


def test_the_training_loss_of_gpt2_is_a_mean_over_predicted_tokens(text, tmp_path):
    config = json.dumps({"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8})
    words = ("--model-type", "gpt2", "--model-config", config, "--vocab-size", 300, "--sequence-length", 8)
    still = (*QUICK, "--learning-rate", 0)
    succeed("train", "--dataset", text, "--output-dir", tmp_path / "output", *words, *still)
    results = read(tmp_path / "output")
    # Weights that are drawn and stay so know as little of one text as of the other: log(300) nats.
    losses = [row["loss"] for row in results["log"] if "loss" in row]
    assert [*losses, results["eval_loss"]] == pytest.approx([math.log(300)] * 3, rel=0.02)


def test_images_are_classified_and_resized(tmp_path):
    words = ("--model-config", CONVNEXT, "--image-size", 6, "--per-device-train-batch-size", 32, *QUICK)
    outcome = succeed("train", *IMAGES, "--output-dir", tmp_path / "output", *words)
    results = read(tmp_path / "output")
    test = load_images("digits", "test")
    pixels = torch.nn.functional.interpolate(torch.from_numpy(test.images), (6, 6), mode="bilinear", antialias=True)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "output")
    with torch.no_grad():
        logits = model(pixels.clamp(0, 1)).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.labels))
    right = (logits.argmax(-1).numpy() == test.labels).mean()
    assert results["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert results["eval_accuracy"] == pytest.approx(right) and f"accuracy {right:.4g} after" in outcome.out
    assert model.config.num_labels == 10 and model.config.image_size == 6 and model.config.num_channels == 1
    assert results["data"]["image_shape"] == [1, 6, 6] and "eval_perplexity" not in results


def test_a_warning_where_batch_statistics_belong_to_another_point(trained, tmp_path):
    config = '{"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}'
    words = ("--task", "image-classification", "--model-type", "resnet", "--model-config", config, "--max-steps", 1)
    outcome = succeed("train", *words, "--mlopt-optim", "rsgd", "--output-dir", tmp_path / "output")
    assert "statistics of batch normalisation" in outcome.err
    assert "statistics of batch normalisation" not in trained[1].err


def test_what_diverges_has_no_number_and_says_so(text, tmp_path):
    words = ("--mlopt-optim", "sgd", "--learning-rate", "1e30", "--max-grad-norm", "0")
    outcome = succeed("train", "--dataset", text, *SMALL, *QUICK, "--output-dir", tmp_path / "output", *words)
    assert read(tmp_path / "output")["eval_loss"] > 1e6 and read(tmp_path / "output")["eval_perplexity"] is None
    assert "perplexity not finite after 4 steps" in outcome.out and "lower learning_rate" in outcome.err


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("--model-type", "gtp2"),
            "model_type='gtp2': is no causal-lm architecture of transformers; did you mean gpt2",
        ),
        (("--model-type", "resnet"), "model_type='resnet': is no causal-lm architecture"),
        (("--task", "image-classification"), "model_type=None: is needed, such as vit"),
        (("--model", "x", "--model-type", "gpt2"), "model_type='gpt2': is for a model from random weights"),
        (("--model", "missing/a/b"), "no such directory"),
        (
            ("--model-config", '{"hiden_size": 3}'),
            "model_config.hiden_size=3: word_lm has no such field; did you mean",
        ),
        (("--model-type", "gpt2", "--model-config", '{"n_layer": "a"}'), "={'n_layer': 'a'}: gpt2: Validation error"),
        (("--model-config", '{"num_layers": 0}'), "model_config.num_layers=0: must be a whole number of at least 1"),
        (("--model-config", '{"vocab_size": 9}'), "model_config.vocab_size=9: the model has 9 tokens"),
        (("--model-config", '{"hidden_size": 9000000}'), "more than is free"),
        (
            ("--model-type", "gpt2", "--model-config", '{"n_embd": 9, "n_head": 2}'),
            "gpt2: `embed_dim` must be divisible by num_heads",
        ),
        (("--dataset", "digits"), "dataset='digits': holds images"),
        (("--dataset", "missing.txt"), "dataset='missing.txt': no such file"),
        (("--eval-dataset", "missing.txt"), "eval_dataset='missing.txt': no such file"),
        (("--dataset", "nobody/nothing"), "dataset='nobody/nothing': neither a local file nor a data set"),
        ((*IMAGES, "--dataset", "embedded"), "dataset='embedded': must be digits, an .npz file"),
        ((*IMAGES, "--dataset", "missing.npz"), "dataset='missing.npz': no such file or folder"),
        ((*IMAGES, "--vocab-size", "300"), "vocab_size=300: belongs to --task causal-lm"),
        ((*IMAGES, "--similarity", "2"), "similarity=2.0: must be from 0"),
        ((*IMAGES, "--model-config", '{"image_size": 28}'), "has image_size 8, the model 28; set image_size"),
        ((*IMAGES, "--model-config", '{"patch_size": 3}'), "model_config.patch_size=3: must divide the 8 pixels"),
        (("--image-size", "8"), "image_size=8: belongs to --task image-classification"),
        (("--tokenizer", "missing/a/b"), "tokenizer='missing/a/b': no such directory"),
        (("--tokenizer", "."), "tokenizer='.': holds no tokenizer"),
        (("--tokenizer", "missing/a/b", "--vocab-size", "300"), "vocab_size=300: is of a tokenizer that is trained"),
        (("--vocab-size", "200"), "vocab_size=200: must be at least 259"),
        (("--tokenizer", "words", "--vocab-size", "2"), "vocab_size=2: must be at least 3"),
        (("--per-rank-data",), "per_rank_data=True: each process would train a tokenizer of its own"),
        (("--sequence-length", "1"), "sequence_length=1: must be at least 2"),
        (("--sequence-length", "20000"), "dataset='embedded': held-out 11"),
        (("--model-type", "gpt2", "--sequence-length", "1025"), "sequence_length=1025: is more than the 1024 tokens"),
        (("--mlopt-optim", "sgdm"), "mlopt_optim='sgdm': must be one of"),
        (("--mlopt-optim", "sgd", "--mlopt-optim-args", '{"momentum": -1}'), "mlopt_optim_args={'momentum': -1}: "),
        (("--mlopt-optim", "rsgd", "--mlopt-optim-args", '{"residual": 1}'), "mlopt_optim_args.residual=1: must be"),
        (("--mlopt-optim", "sgd", "--local-steps", "2"), "local_steps=2: needs mlopt_optim to be one of"),
        (("--learning-rate", "-1"), "learning_rate=-1.0: must be at least 0"),
        (("--per-device-train-batch-size", "0"), "per_device_train_batch_size=0: must be at least 1"),
        (("--num-train-epochs", "0"), "num_train_epochs=0.0: must be above 0"),
        (("--plot", "curves.pdf"), "plot='curves.pdf': must end in .png"),
        (("--num-processes", "0"), "num_processes=0: must be at least 1"),
        (("--resume-from-checkpoint", "true"), "resume_from_checkpoint=True: there is no checkpoint in"),
        (("--resume-from-checkpoint", "elsewhere"), "resume_from_checkpoint='elsewhere': holds no trainer_state.json"),
        (("--eval-strategy", "sometimes"), "sometimes is not a valid IntervalStrategy"),
    ],
)
def test_bad_input_is_refused_before_training(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_mlopt.training.MLOptTrainer.train", lambda *_, **__: pytest.fail("it trains"))
    outcome = hf_mlopt("train", "--output-dir", "output", *words)
    assert outcome.status == 2 and message in outcome.err, outcome.err
    assert outcome.err.count("error:") == 1 and not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for path, message in (tmp_path / "full", "is not empty"), (tmp_path / "full" / "notes", "is a file"):
        outcome = hf_mlopt("train", "--output-dir", path)
        assert outcome.status == 2 and f"output_dir={str(path)!r}: {message}" in outcome.err


def test_a_file_of_text_that_is_too_short_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("a few words\n" * 4)
    (tmp_path / "long.txt").write_text("a few words\n" * 400)
    words = ("train", "--output-dir", tmp_path / "output", "--sequence-length", "64")
    for given, name in (
        ({"dataset": "short"}, "dataset"),
        ({"dataset": "long", "eval_dataset": "short"}, "eval_dataset"),
    ):
        options = [
            word for key, file in given.items() for word in (f"--{key.replace('_', '-')}", tmp_path / f"{file}.txt")
        ]
        outcome = hf_mlopt(*words, *options)
        assert outcome.status == 2 and f"{name}={str(tmp_path / 'short.txt')!r}: " in outcome.err
        assert "less than one window of 64: lower sequence_length" in outcome.err


def test_the_held_out_text_is_the_end_and_is_not_trained_on():
    class Recipe:
        dataset = "any.txt"

    for documents in ["ab\n" * 100], ["ab"] * 100, ["x" * 1000]:
        train, held_out, _ = held_out_text(Recipe, documents)
        assert "\n\n".join(documents) == train[0] + held_out[0]
        assert 0.08 < len(held_out[0]) / len(train[0] + held_out[0]) < 0.13


def test_options_come_through_as_words():
    parser = argparse.ArgumentParser()
    add_arguments(parser, TrainRecipe)
    words = ["--bf16", "--no-use-cpu", "--no-tf32", "--plot", "true", "--learning-rate", "1e-4", "--project", "5"]
    words += ["--model-config", '{"a": [1, -2.5]}', "--resume-from-checkpoint=-x", "--num-processes", "null"]
    words += ["--label-names", "a", "b c"]
    given = arguments_given(parser.parse_args(words), TrainRecipe)
    assert given["bf16"] is True and given["use_cpu"] is False and given["plot"] is True
    again = parser.parse_args(as_words(given, TrainRecipe))
    assert arguments_given(again, TrainRecipe) == given and len(given) == 10


def test_the_number_of_processes_must_be_there(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_num_processes(3, use_cpu=True)
    check_num_processes(None, use_cpu=True)
    with pytest.raises(ConfigurationError, match="num_processes=2: but the launcher has started 3"):
        check_num_processes(2, use_cpu=True)
    monkeypatch.delenv("WORLD_SIZE")
    check_num_processes(2, use_cpu=True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    check_num_processes(1, use_cpu=False)
    with pytest.raises(ConfigurationError, match="this machine has 1 GPUs"):
        check_num_processes(2, use_cpu=False)


def test_the_cpu_is_chosen_where_there_is_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert load_config(TrainRecipe, overrides={"output_dir": str(tmp_path)}).use_cpu is True
