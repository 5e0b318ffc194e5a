"""`hf-mlopt federate` on this machine: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import shlex

import numpy as np
import pytest
import torch
import yaml
from command_line import hf_mlopt, succeed, weights
from federations import digests, killed, killing, patched, without_timings
from PIL import Image
from test_data_labelled_text import table
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_mlopt.configuration import load_config
from hf_mlopt.data import load_images
from hf_mlopt.federated import checkpoint, trainer
from hf_mlopt.federated.storage import load_message
from hf_mlopt.resources import resource_dir
from hf_mlopt.workflows.federate import Federation, site_rows
from hf_mlopt.workflows.federate_recipe import FederateRecipe


pytestmark = pytest.mark.e2e

RESNET = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
DIGITS = {
    "task": "image-classification",
    "model_type": "resnet",
    "model_config": RESNET,
    "num_sites": 2,
    "partition": "dirichlet",
    "num_rounds": 2,
    "local_steps": 2,
    "per_device_train_batch_size": 16,
    "mlopt_optim": "sgd",
    "learning_rate": 0.1,
    "disable_tqdm": True,
}
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXTS = {
    **{name: DIGITS[name] for name in ("local_steps", "per_device_train_batch_size", "learning_rate", "disable_tqdm")},
    "task": "text-classification",
    "model_type": "bert",
    "model_config": BERT,
    "tokenizer": "words",
    "sequence_length": 8,
    "num_rounds": 1,
}
GPT2 = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RECIPES = ("digits_resnet", "topics_bert", "gpt2_lora", "digits_domains", "cifar_resnet20")


def write(folder, fields):
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def read(output):
    return json.loads((output / "federated_results.json").read_text(encoding="utf-8"))


def data_of(folder, fields):
    return Federation(load_config(FederateRecipe, None, {**fields, "output_dir": str(folder / "output")})).data


def labels_of(site_data):
    """Of all rows of a site, those that are held out with them."""
    return np.sort([int(row["labels"]) for rows in (site_data.train, site_data.evaluation) for row in rows])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two sites and two rounds; the directory, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    output = folder / "output"
    return output, succeed("federate", write(folder, DIGITS), "--output-dir", output, "--hub-token", "secret-token")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A table of three hospitals that write of other things."""
    rows = []
    for site, words in ("west", "red blue"), ("east", "red green"), ("north", "blue green grey"):
        for number in range(12 if site == "west" else 20):
            word = words.split()[number % len(words.split())]
            rows.append((f"it was {word} on day {number}", "warm" if word == "red" else "cold", site))
    return table(tmp_path_factory.mktemp("reports") / "reports.csv", rows)


def test_what_is_written_and_shown(trained):
    output, outcome = trained
    files = {"config.json", "model.safetensors", "recipe.yaml", "federated_results.json", "curves.png", "sites"}
    assert files | {"checkpoint-1", "checkpoint-2"} <= {path.name for path in output.iterdir()}
    results = read(output)
    expected = {
        "task": "image-classification",
        "model": "resnet",
        "engine": "in-process",
        "seed": 42,
        "local_steps": 2,
    }
    expected |= {"sites": ["site_0", "site_1"], "learning_rate": 0.1, "local_epochs": None, "device": "cpu"}
    expected |= {"algorithm": {"name": "fedavg", "args": {}}, "optimizer": {"name": "sgd", "args": {}}}
    assert {name: results[name] for name in expected} == expected
    assert (
        results["parameters"]
        == results["exchanged_parameters"]
        == sum(parameter.numel() for parameter in AutoModelForImageClassification.from_pretrained(output).parameters())
    )
    assert results["data"]["partition"] == "dirichlet" and results["data"]["of"] == 0.5
    assert sum(results["data"]["rows"].values()) == results["data"]["train"]["images"] == 1400

    header, *rows = [line.split() for line in outcome.out.splitlines()[:3]]
    assert header == ["site", "rows", "rounds", "train_loss", "eval_loss", "eval_accuracy", "megabytes"]
    last = results["rounds"][-1]
    for row, site in zip(rows, ("site_0", "site_1"), strict=True):
        own, found = last["sites"][site], last["evaluation"]["sites"][site]
        sent = sum(round["sites"][site]["bytes_up"] for round in results["rounds"]) / 1e6
        numbers = (own["train_loss"], found["eval_loss"], found["eval_accuracy"], sent)
        assert row == [site, str(own["num_samples"]), "2", *(f"{number:.4g}" for number in numbers)]
        assert own["num_samples"] + found["num_evaluated"] == results["data"]["rows"][site]
    assert f"server_accuracy {results['server']['server_accuracy']:.4g}" in outcome.out
    assert f"written to {output}: model, recipe.yaml, federated_results.json, curves.png" in outcome.out


def test_the_recipe_is_what_was_given(trained):
    output, _ = trained
    assert yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8")) == {
        name: value for name, value in DIGITS.items() if name != "task"
    }
    texts = [path for path in output.rglob("*.[jy]*") if path.is_file()]
    assert texts and not [path for path in texts if "secret-token" in path.read_text(encoding="utf-8")]


def test_the_same_recipe_gives_the_same_weights_in_other_processes(trained, tmp_path):
    output, again = trained[0], tmp_path / "again"
    succeed("federate", output / "recipe.yaml", "--output-dir", again, "--num-workers", 2)
    assert digests(read(again)["rounds"]) == digests(read(output)["rounds"])
    first, second = weights(output), weights(again)
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_the_results_are_those_of_the_saved_model(trained):
    output, results = trained[0], read(trained[0])
    model = AutoModelForImageClassification.from_pretrained(output)
    test = load_images("digits", "test")
    with torch.no_grad():
        logits = model(torch.from_numpy(test.images)).logits
    right = float((logits.argmax(-1).numpy() == test.labels).mean())
    loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.labels)))
    assert results["server"]["server_accuracy"] == pytest.approx(right)
    assert results["server"]["server_loss"] == pytest.approx(loss, rel=1e-5)
    assert model.config.id2label == {number: str(number) for number in range(10)}


def test_the_plot_is_a_picture_of_all_curves(trained):
    with Image.open(trained[0] / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (1500, 600)
        left, right = {"#999999", "#0072b2", "#d55e00"}, {"#0072b2", "#d55e00"}
        for box, curves in ((0, 0, 750, 600), left), ((750, 0, 1500, 600), right):
            colours = [colour for _, colour in picture.convert("RGB").crop(box).getcolors(1 << 20)]
            assert curves <= {"#{:02x}{:02x}{:02x}".format(*colour) for colour in colours}
        # Those of single sites, to the right, are thin: no pixel is all of a line.
        assert min(np.abs(np.subtract(colours, (0x56, 0xB4, 0xE9))).max(axis=1)) < 25


def test_the_plot_goes_where_it_is_said_or_nowhere(tmp_path):
    recipe = write(tmp_path, {**DIGITS, "num_rounds": 1, "evaluate_every": 0, "local_steps": 1})
    outcome = succeed("federate", recipe, "--output-dir", tmp_path / "a", "--plot", tmp_path / "plots" / "run.png")
    assert (tmp_path / "plots" / "run.png").is_file() and not list((tmp_path / "a").glob("*.png"))
    assert outcome.out.splitlines()[0].split() == ["site", "rows", "rounds", "train_loss", "megabytes"]
    succeed("federate", recipe, "--output-dir", tmp_path / "b", "--plot", "false", "--sites", 3, "--rounds", 2)
    assert not list((tmp_path / "b").rglob("*.png"))
    results = read(tmp_path / "b")
    assert len(results["sites"]) == 3 and len(results["rounds"]) == 2 and results["server"] is None


def test_a_run_that_was_killed_goes_on_and_ends_the_same(trained, tmp_path):
    output, words = tmp_path / "output", ("federate", trained[0] / "recipe.yaml", "--output-dir")
    with patched(trainer, "save_checkpoint", killing(checkpoint.save_checkpoint, 2)):
        assert killed(lambda: hf_mlopt(*words, output))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (output / "federated_results.json").exists()

    outcome = hf_mlopt(*words, output)
    assert outcome.status == 2 and "is not empty; name a new directory, or go on with the run in it" in outcome.err
    outcome = hf_mlopt(*words, output, "--resume-from-checkpoint", "true", "--algorithm", "fedprox")
    assert outcome.status == 2 and "algorithm" in outcome.err and not (output / "federated_results.json").exists()

    succeed(*words, output, "--resume-from-checkpoint", "true")
    assert without_timings(read(output)["rounds"]) == without_timings(read(trained[0])["rounds"])
    first, second = weights(trained[0]), weights(output)
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    assert yaml.safe_load((output / "recipe.yaml").read_text()) == yaml.safe_load(
        (trained[0] / "recipe.yaml").read_text()
    )


def test_too_few_usable_replies_end_a_run(tmp_path):
    recipe = write(tmp_path, {**DIGITS, "learning_rate": 1e38})
    outcome = hf_mlopt("federate", recipe, "--output-dir", tmp_path / "output")
    assert outcome.status == 1 and "hf-mlopt federate: round 0" in outcome.err and "Traceback" not in outcome.err


def test_sites_are_the_hospitals_of_a_column(reports, tmp_path):
    fields = {**TEXTS, "dataset": reports, "partition": "column", "site_column": "hospital", "site_eval_share": 0.25}
    output = tmp_path / "output"
    outcome = succeed("federate", write(tmp_path, fields), "--output-dir", output)
    results = read(output)
    assert results["data"]["rows"] == {"east": 20, "north": 20, "west": 12} and results["data"]["of"] == "hospital"
    assert [line.split()[:2] for line in outcome.out.splitlines()[1:4]] == [
        ["east", "15"],
        ["north", "15"],
        ["west", "9"],
    ]
    assert results["server"] is None  # a table has no part that is left for the server
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "cold", 1: "warm"}
    data = data_of(tmp_path, fields)
    # Of the words in these rows, red ones are warm: labels and texts of a site belong together.
    for site, num_warm in ("west", 6), ("east", 10), ("north", 0):
        assert labels_of(data.site(site)).tolist() == sorted(
            [1] * num_warm + [0] * (len(data._shares[site]) - num_warm)
        )
    red = data.tokenizer("red").input_ids
    for row in data.site("east").train:
        assert (row["labels"] == 1) == (len(set(red) & set(row["input_ids"])) == len(set(red)))


@pytest.mark.parametrize("partition", [{"partition": "iid"}, {"partition": "label-sorted", "similarity": 0.0}])
def test_texts_are_dealt_by_label(partition, reports, tmp_path):
    data = data_of(tmp_path, {**TEXTS, "dataset": reports, "num_sites": 2, **partition})
    first, second = (labels_of(data.site(name)) for name in data.names)
    assert data.names == ["site_0", "site_1"] and len(first) == len(second) == 26
    assert (first.sum(), second.sum()) == (0, 16) if partition["partition"] == "label-sorted" else first.any()
    again = data_of(tmp_path, {**TEXTS, "dataset": reports, "num_sites": 2, "seed": 7, **partition})
    assert labels_of(again.site("site_0")).tolist() == first.tolist()  # not those of the seed of the run
    assert all(
        list(one) == list(other) for one, other in zip(data._shares.values(), again._shares.values(), strict=True)
    )


def test_a_dirichlet_of_texts_deals_all_rows(reports, tmp_path):
    data = data_of(tmp_path, {**TEXTS, "dataset": reports, "num_sites": 11, "partition": "dirichlet"})
    assert data.names[0] == "site_00" and data.names[-1] == "site_10"  # in order of their numbers also as text
    assert sorted(np.concatenate(list(data._shares.values()))) == list(range(52))
    dealt = [
        data_of(
            tmp_path, {**TEXTS, "dataset": reports, "num_sites": 3, "partition": "dirichlet", "seed": seed}
        )._shares
        for seed in (1, 2)
    ]
    assert len({len(share) for share in dealt[0].values()}) > 1
    assert all(list(dealt[0][site]) == list(dealt[1][site]) for site in dealt[0])  # not by the seed of the run


def test_the_server_evaluates_texts_of_its_own(reports, tmp_path):
    held_out = table(tmp_path / "held_out.csv", [("red day", "warm"), ("blue day", "cold")] * 3, ("text", "label"))
    data = data_of(tmp_path, {**TEXTS, "dataset": reports, "eval_dataset": held_out})
    assert [row["labels"] for row in data.evaluation] == [1, 0] * 3
    embedded = data_of(tmp_path, TEXTS)
    assert 0 < len(embedded.evaluation) < sum(len(labels_of(embedded.site(name))) for name in embedded.names) / 8


@peft_warns
def test_only_adapters_travel(tmp_path):
    from peft import PeftModel

    base = GPT2LMHeadModel(GPT2Config(**GPT2, vocab_size=300, bos_token_id=0, eos_token_id=0))
    base.save_pretrained(tmp_path / "base")
    fields = {
        "task": "causal-lm",
        "dataset": write_text(tmp_path),
        "model": str(tmp_path / "base"),
        "tokenizer": "byte-bpe",
        "vocab_size": 300,
        "lora": {"r": 2, "target_modules": ["c_attn"], "lora_dropout": 0.0},
        "sequence_length": 16,
        "num_sites": 2,
        "local_steps": 2,
        "num_rounds": 1,
        "learning_rate": 0.05,
        "disable_tqdm": True,
    }
    output = tmp_path / "output"
    succeed("federate", write(tmp_path, fields), "--output-dir", output)
    results = read(output)
    exchanged = 2 * 8 + 24 * 2  # A and B of one layer
    assert results["exchanged_parameters"] == exchanged and results["parameters"] > 10 * exchanged
    assert results["bytes_up"] == 2 * 4 * exchanged
    assert results["bytes_down"] == 2 * results["bytes_up"]  # to train with, and to evaluate
    assert not (output / "model.safetensors").exists()
    saved = weights(output)
    assert sum(value.numel() for value in saved.values()) == exchanged
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), output)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)  # which begin at zero
    held_out = data_of(tmp_path, fields).evaluation
    loss = _mean_loss(model, held_out)
    assert results["server"]["server_loss"] == pytest.approx(loss, rel=1e-5)


def write_text(folder):
    path = folder / "text.txt"
    path.write_text("\n".join(f"{a} and {b} go to the {c}" for a in "xyz" for b in "uvw" for c in ("sea", "hill")) * 4)
    return str(path)


def _mean_loss(model, windows):
    """Nats per token, window by window."""
    losses = []
    for window in windows:
        ids = torch.tensor([window["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return sum(losses) / len(losses)


@peft_warns
def test_adapters_to_random_weights_come_with_these(tmp_path):
    from peft import PeftModel

    words = ("--task", "causal-lm", "--model-type", "gpt2", "--model-config", json.dumps(GPT2), "--vocab-size", 300)
    text = write_text(tmp_path)
    words += (
        "--dataset",
        text,
        "--lora",
        '{"r": 2, "target_modules": ["c_attn"]}',
        "--sequence-length",
        16,
        "--seed",
        3,
    )
    (tmp_path / "given.yaml").write_text("{local_steps: 1, num_rounds: 1, num_sites: 1, disable_tqdm: true}")
    output = tmp_path / "output"
    outcome = succeed("federate", tmp_path / "given.yaml", "--output-dir", output, *words)
    assert "federated_results.json, base, curves.png" in outcome.out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output / "base"), output)
    fields = {"task": "causal-lm", "model_type": "gpt2", "vocab_size": 300, "sequence_length": 16, "dataset": text}
    assert read(output)["server"]["server_loss"] == pytest.approx(
        _mean_loss(model, data_of(tmp_path, fields).evaluation), rel=1e-5
    )


@pytest.fixture
def three_sites(tmp_path):
    """Site to a source: 4 x 4 images whose brightness is their class; the third has no rows of class b."""
    classes = {"north": ("b", "a", "c"), "south": ("c", "b", "a"), "west": ("c", "a")}
    for site, names in classes.items():
        labels = np.arange(30) % len(names)
        brightness = np.array(["abc".index(name) * 100 for name in names], dtype=np.uint8)
        images = np.broadcast_to(brightness[labels][:, None, None], (30, 4, 4))
        np.savez(tmp_path / f"{site}.npz", images=images, labels=labels, classes=np.array(names))
    return {site: str(tmp_path / f"{site}.npz") for site in classes}


def test_each_site_has_a_source_of_its_own_and_may_lack_a_class(three_sites, tmp_path):
    fields = {name: value for name, value in DIGITS.items() if name not in ("partition", "num_sites", "num_rounds")}
    fields |= {"site_datasets": three_sites, "label_names": ["a", "b", "c"], "algorithm": "fedbn", "num_rounds": 1}
    output = tmp_path / "output"
    succeed("federate", write(tmp_path, fields), "--output-dir", output)
    results = read(output)
    assert results["sites"] == ["north", "south", "west"] and results["server"] is None
    assert set(results["evaluation"]) == {"eval_accuracy", "eval_loss"}
    assert results["data"] == {"sites": three_sites}
    assert [row["site"] for row in site_rows(results)] == ["north", "south", "west"]
    assert AutoModelForImageClassification.from_pretrained(output).config.id2label == {0: "a", 1: "b", 2: "c"}
    data = data_of(tmp_path, fields)
    for site in three_sites:
        found = {(int(row["labels"]), round(float(row["pixel_values"].mean()) * 255)) for row in data.site(site).train}
        assert found == {(0, 0), (1, 100), (2, 200)} - ({(1, 100)} if site == "west" else set())


def test_images_of_sites_are_brought_to_one_size(three_sites, tmp_path):
    np.savez(tmp_path / "west.npz", images=np.zeros((20, 6, 6), np.uint8), labels=np.arange(20) % 2)
    fields = {"task": "image-classification", "model_type": "resnet", "site_datasets": three_sites}
    fields |= {"label_names": ["a", "b", "c", "0", "1"]}
    with pytest.raises(ValueError, match=r"site_datasets.west='.*': has images of \[1, 6, 6\] .* image_size brings"):
        data_of(tmp_path, fields).site("west")
    data = data_of(tmp_path, {**fields, "image_size": 5})
    assert data.shape == (1, 5, 5) and data.site("west").train[0]["pixel_values"].shape == (1, 5, 5)


def test_digits_of_three_kinds_keep_their_normalization(shared_data, tmp_path):
    file = shared_data / "vision" / "digits3_16x16.npz"
    recipe = resource_dir("recipes") / "federated" / "digits_domains.yaml"
    sites = yaml.safe_load(recipe.read_text())["site_datasets"]
    sites = {site: source.replace("digits3_16x16.npz", str(file)) for site, source in sites.items()}
    words = ("--site-datasets", json.dumps(sites), "--rounds", 2, "--local-steps", 3, "--disable-tqdm")
    words += ("--model-config", json.dumps(RESNET), "--per-device-eval-batch-size", 512)
    succeed("federate", recipe, "--output-dir", tmp_path / "output", *words)
    results = read(tmp_path / "output")
    assert results["sites"] == ["mnist", "optdigits", "semeion"] and results["algorithm"]["name"] == "fedbn"
    losses = [round["train_loss"] for round in results["rounds"]]
    assert losses[1] < losses[0] and results["server"] is None
    folders = [tmp_path / "output" / "sites" / site for site in sites]
    kept = [load_message(next(folder.glob("*/round-1.safetensors"))) for folder in folders]
    names = {name for group in kept[0].groups.values() for name in group}
    assert len({message.digest() for message in kept}) == 3 and any("running_mean" in name for name in names)


# What is refused as the recipe is read, or as files are looked for: (options, what is said).
BAD = [
    (
        "--model-type resnt",
        "model_type='resnt': is no image-classification architecture of transformers; did you mean",
    ),
    ("--num-sites 0", "num_sites=0: must be at least 1"),
    ("--sites 2000", "num_sites=2000: must be from 1 to the number of examples, 1400"),
    ("--rounds 0", "num_rounds=0: must be an int of at least 1"),
    ("--site-eval-share 1", "site_eval_share=1.0: must be at least 0 and below 1"),
    ("--partition sorted", "partition"),
    ("--dirichlet-alpha 0", "dirichlet_alpha=0.0: must be above 0"),
    ("--dirichlet-alpha inf", "--dirichlet-alpha: invalid value 'inf': must be float"),
    ("--similarity 0.5", "similarity=0.5: belongs to partition label-sorted"),
    ("--partition label-sorted --similarity 1.5", "similarity=1.5: must be from 0 (sorted by label) to 1 (i.i.d.)"),
    ("--partition iid --dirichlet-alpha 1", "dirichlet_alpha=1.0: belongs to partition dirichlet"),
    ("--site-column hospital", "site_column='hospital': belongs to partition column"),
    ("--partition column", "site_column=None: is needed with partition column"),
    ("--partition column --site-column x", "partition='column': needs a table of texts: task text-classification"),
    ("--dataset embedded", "dataset='embedded': is no source for --task image-classification"),
    ("--dataset missing.npz", "dataset='missing.npz': no such file or folder"),
    ("--eval-dataset missing.npz", "eval_dataset='missing.npz': no such file or folder"),
    ("--tokenizer words", "tokenizer='words': does not belong to --task image-classification"),
    ("--vocab-size 300", "vocab_size=300: does not belong to --task image-classification"),
    ("--image-size 0", "image_size=0: must be at least 1"),
    ("--learning-rate -1", "learning_rate=-1.0: must be at least 0"),
    ("--algorithm fedavgg", "algorithm: invalid value 'fedavgg': must be one of 'ditto', 'domo'"),
    ("--algorithm-args '{\"mu\": 1}'", "algorithm_args"),
    ("--mlopt-optim-args '{\"momentum\": -1}'", "mlopt_optim_args"),
    ("--model-config '{\"depth\": [1]}'", "model_config.depth=[1]: resnet has no such field; did you mean depths?"),
    ("--plot curves.pdf", "plot='curves.pdf': must end in .png"),
    ('--site-datasets \'{"a": "a.npz"}\'', "partition='dirichlet': leave it out: site_datasets has a source a site"),
    ('--site-datasets \'{"a": "a.npz"}\' --dataset digits', "dataset='digits': leave it out: site_datasets has"),
    ('--site-datasets \'{"a": "a.npz"}\' --partition iid', "site_datasets.a='a.npz': no such file or folder"),
    ('--site-datasets \'{"a": "a.csv"}\' --partition iid', "site_datasets.a='a.csv': is no source for --task image"),
    ("--site-datasets north.npz", "site_datasets='north.npz': must be a dict or a JSON object"),
    ("--site-datasets '[1]'", "site_datasets=[1]: must be a dict or a JSON object"),
    ("--site-datasets '{}'", "site_datasets={}: must name one a site"),
    ("--site-datasets '{\"a\": 1}'", "site_datasets={'a': 1}: must name one a site"),
    ('--site-datasets \'{"../a": "digits"}\' --partition iid', "'../a' would leave its folder"),
    ("--label-names a b", "dataset='digits': has labels ['0', '1', '2'"),
    ('--lora \'{"r": 0, "target_modules": ["convolution"]}\'', "lora={'r': 0"),
    ("--lora '{\"rank\": 2}'", "lora={'rank': 2}: "),
    ('--lora \'{"target_modules": ["nowhere"]}\'', "lora={'target_modules': ['nowhere']}: "),
    ("--resume-from-checkpoint true", "resume_from_checkpoint=True: there is no checkpoint in output"),
    ("--resume-from-checkpoint nowhere", "resume_from_checkpoint"),
    ("--superlink localhost:1", "superlink='localhost:1': belongs to engine flower"),
    ("--flower-simulation", "flower_simulation=True: belongs to engine flower"),
    ("--flower-nodes '{\"a\": 1}'", "flower_nodes={'a': 1}: belongs to engine flower"),
    ("--engine flower --flower-nodes '{\"a\": 1}'", "flower_nodes={'a': 1}: belongs to a superlink"),
    ('--engine flower --flower-nodes \'{"a": "b"}\'', 'must name one a site, as in {"north": 1234}'),
    ("--engine flower --root-certificates given.yaml", "root_certificates='given.yaml': belongs to a superlink"),
    (
        "--engine flower --superlink a:1 --dataset digits --root-certificates no.crt",
        "root_certificates='no.crt': no such file",
    ),
    ("--engine flower --superlink a:1 --flower-simulation", "flower_simulation=True: runs on this machine; leave"),
    ("--engine flower --num-workers 2", "num_workers=2: is of the engine in-process"),
    ("--engine flower --superlink localhost --dataset digits", "superlink='localhost': cannot be reached"),
    ("--engine flower --superlink localhost:9 --dataset digits", "superlink='localhost:9': cannot be reached"),
    ("--engine flower --superlink a:1", "site_datasets=None: is needed with a superlink, for the server has no data"),
    ("--engine ray", "engine"),
    ("--round-timeout 5", "round_timeout=5.0: needs num_workers"),
]
BAD_TEXT = [
    ("--image-size 8", "image_size=8: does not belong to --task text-classification"),
    ("--dataset digits", "dataset='digits': is no source for --task text-classification"),
    ("--dataset missing.csv", "dataset='missing.csv': no such file"),
    ("--dataset nobody/nothing", "dataset='nobody/nothing': neither a local file nor a data set"),
    ("--eval-dataset missing.jsonl", "eval_dataset='missing.jsonl': no such file"),
    ("--dataset other.csv", "dataset='other.csv': no column 'text', only"),
    ("--dataset one.csv", "dataset='one.csv': all rows have the label ['x']; at least two labels are needed"),
    ("--eval-dataset two.csv", "eval_dataset='two.csv': has labels ['x', 'y'], others ["),
    ("--dataset two.csv --label-names x z", "dataset='two.csv': has labels ['y'], which label_names does not list"),
    ("--dataset two.csv --partition column --site-column hospital", "dataset='two.csv': no column 'hospital', only"),
    ("--partition column --site-column hospital", "dataset='embedded': has no column 'hospital'; leave site_column"),
    ("--tokenizer nowhere/a/b", "tokenizer='nowhere/a/b': no such directory"),
    ("--tokenizer .", "tokenizer='.': its tokenizer cannot be read"),
    ("--tokenizer . --vocab-size 300", "vocab_size=300: is of a tokenizer that is trained: byte-bpe, words"),
    ("--vocab-size 2", "vocab_size=2: must be at least"),
    ("--sequence-length 1", "sequence_length=1: must be at least 2"),
    ("--sequence-length 513", "sequence_length=513: is more than the 512 tokens of the model's context; lower it"),
    ('--site-datasets \'{"a": "two.csv"}\'', "tokenizer='words': would be trained on every site's text; name a dir"),
    ('--site-datasets \'{"a": "two.csv", "b": "three.csv"}\' --tokenizer tokenizer', "site_datasets.b='three.csv'"),
    ("--model nowhere/a/b --model-type null --model-config null", "no such directory"),
    (
        '--engine flower --superlink a:1 --tokenizer tokenizer --site-datasets \'{"a": "two.csv"}\'',
        "label_names=None: is needed with a superlink, for the server has no data to read it from",
    ),
    ("--model nowhere/a/b", "model_type='bert': is for a model from random weights"),
    (
        "--task causal-lm --model-type gpt2 --model-config null --partition dirichlet",
        "partition='dirichlet': deals by",
    ),
]


def refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_mlopt.federated.client.FederatedClient._step", lambda *_: pytest.fail("it trains"))
    before = sorted(tmp_path.rglob("*"))
    outcome = hf_mlopt("federate", "given.yaml", "--output-dir", "output", *shlex.split(options))
    assert outcome.status == 2 and message in outcome.err, outcome.err
    assert outcome.err.count("error:") == 1 and "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options, message", BAD)
def test_bad_input_is_refused_before_the_first_round(options, message, tmp_path, monkeypatch):
    write(tmp_path, DIGITS)
    refused(tmp_path, monkeypatch, options, message)


@pytest.mark.parametrize("options, message", BAD_TEXT)
def test_bad_input_of_texts_is_refused_before_the_first_round(options, message, tmp_path, monkeypatch, tiny_tokenizer):
    write(tmp_path, TEXTS)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    table(tmp_path / "one.csv", [("a", "x"), ("b", "x")], ("text", "label"))
    table(tmp_path / "two.csv", [("a", "x"), ("b", "y")] * 4, ("text", "label"))
    table(tmp_path / "three.csv", [("a", "x"), ("b", "z")] * 4, ("text", "label"))
    table(tmp_path / "other.csv", [("a", "x"), ("b", "y")], ("body", "label"))
    refused(tmp_path, monkeypatch, options, message)


def test_sites_that_have_other_labels_or_no_rows_are_named(three_sites, tmp_path, monkeypatch):
    fields = {"task": "image-classification", "model_type": "resnet", "model_config": RESNET}
    write(tmp_path, {**fields, "site_datasets": three_sites})
    refused(tmp_path, monkeypatch, "", "has images of [1, 4, 4] with labels ['c', 'b', 'a'], others [1, 4, 4]")
    wanted = "site_datasets.north='" + three_sites["north"] + "': has labels ['c'], which label_names does not list"
    refused(tmp_path, monkeypatch, "--label-names a b", wanted)
    np.savez(tmp_path / "south.npz", images=np.zeros((0, 4, 4), np.uint8), labels=np.zeros(0, np.int64))
    refused(tmp_path, monkeypatch, "--label-names a b c", "south")


def test_flower_that_is_missing_or_old_is_said_with_how_to_install_it(tmp_path, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def version(name):
        if name == missing:
            raise PackageNotFoundError(name)
        return found

    write(tmp_path, DIGITS)
    monkeypatch.setattr("hf_mlopt.federated.engines.flower_runs.version", version)
    install = "pip install 'hf-mlopt[flower]'"
    for absent, number, options, message in (
        ("flwr", "1.42.0", "", f"engine='flower': the package 'flwr' is not installed: {install}"),
        ("ray", "1.42.0", "--flower-simulation", f"engine='flower': the package 'ray' is not installed: {install}"),
        (None, "1.29.0", "", f"engine='flower': flwr 1.29.0 is too old: {install}"),
    ):
        missing, found = absent, number
        refused(tmp_path, monkeypatch, f"--engine flower {options}", message)


def test_an_output_that_holds_something_is_refused(tmp_path):
    recipe = write(tmp_path, DIGITS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for path, message in (tmp_path / "full", "is not empty"), (tmp_path / "full" / "notes", "is a file"):
        outcome = hf_mlopt("federate", recipe, "--output-dir", path)
        assert outcome.status == 2 and f"output_dir={str(path)!r}: {message}" in outcome.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_begins_with_what_it_is_for_and_its_own_command(name, tmp_path):
    path = resource_dir("recipes") / "federated" / f"{name}.yaml"
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and len(first) > 20
    assert second == f"# hf-mlopt federate {name}.yaml --output-dir DIR"
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "output_dir" not in given
    recipe = load_config(FederateRecipe, path, {"output_dir": str(tmp_path)})
    assert recipe.engine == "in-process" and recipe.num_sites > 1
    if "without a network" in first:
        assert given["dataset"] in ("embedded", "digits") and given.get("tokenizer") in ("words", "byte-bpe", None)


def test_there_are_recipes_of_every_task_and_kind_of_algorithm(tmp_path):
    folder = resource_dir("recipes") / "federated"
    recipes = [load_config(FederateRecipe, folder / f"{name}.yaml", {"output_dir": str(tmp_path)}) for name in RECIPES]
    assert {recipe.task for recipe in recipes} == {"image-classification", "text-classification", "causal-lm"}
    assert {recipe.algorithm for recipe in recipes} >= {"fedavg", "fedadam", "fedbn", "domo"}
    assert any(recipe.lora for recipe in recipes)
