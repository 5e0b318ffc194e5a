"""`hf-mlopt plan-pipeline`, and the picture of what stages did."""

import json

import pytest
import torch
from command_line import hf_mlopt
from PIL import Image

from hf_mlopt.cli.plan_pipeline import table
from hf_mlopt.pipeline.timeline import plot_timeline
from hf_mlopt.workflows.plan_pipeline import PipelinePlan, PipelinePlanRecipe, plan_pipeline


LLAMA = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 64}


def test_it_plans_every_mode():
    recipe = PipelinePlanRecipe(
        model_type="llama",
        model_config=LLAMA,
        stages=2,
        batch_size=2,
        sequence_length=16,
        latency=1000.0,
        device="cpu",
    )
    plan = plan_pipeline(recipe)
    assert plan.bounds[0] == 0 and plan.bounds[-1] == 4 and len(plan.bounds) == 3 and len(plan.times) == 2
    rows = {(row["mode"], row["recompute"]): row for row in plan.rows}
    assert len(rows) == 10 and all(len(row["memory"]) == 2 and min(row["memory"]) > 0 for row in rows.values())
    # A link this slow: back-propagation waits twice for it in every batch, the mode that was chosen for it never.
    assert rows["bp", False]["seconds"] > 2 and rows["lag1", False]["seconds"] > 1
    assert rows["auto", False]["seconds"] < 0.1 and rows["auto", False]["in_flight"][0] > 10
    assert rows["gpipe", False]["in_flight"] == [8, 8] and rows["1f1b", False]["in_flight"] == [2, 1]
    text = "\n".join(table(plan))
    assert text.splitlines()[0].split() == [
        "mode",
        "repeats",
        "in",
        "flight",
        "ms",
        "a",
        "batch",
        "x",
        "bp",
        "GB",
        "a",
        "stage",
    ]
    assert text.splitlines()[1].split()[:4] == ["bp", "-", "1", "1"]


def test_images_are_planned():
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    recipe = PipelinePlanRecipe(
        model_type="vit", task="image-classification", model_config={**settings, "image_size": 16, "patch_size": 4},
        stages=3, device="cpu",
    )  # fmt: skip
    plan = plan_pipeline(recipe)
    assert isinstance(plan, PipelinePlan) and plan.bounds == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--stages", "5"), "stages=5: the model has 4 layers"),
        (("--stages", "0"), "stages=0: must be at least 1"),
        (("--latency", "-1"), "latency=-1.0: must be at least 0"),
        (("tiny", "--stages", "2"), "model='tiny': name a model, or a model_type"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message):
    outcome = hf_mlopt("plan-pipeline", *words, "--model-type", "llama", "--model-config", json.dumps(LLAMA))
    assert outcome.status == 2 and f"hf-mlopt plan-pipeline: error: {message}" in outcome.err


def test_the_timeline_is_drawn(tmp_path):
    """Two stages, of which the second waits for half of the time."""
    first = [(0.1 * n, 0.1 * n + 0.1, "F" if n % 2 else "B", n) for n in range(20)]
    second = [(0.1 * n, 0.1 * n + 0.05, "wait", n) for n in range(20)] + [
        (0.1 * n + 0.05, 0.1 * n + 0.1, "F", n) for n in range(20)
    ]
    plot_timeline([first, second], tmp_path / "timeline.png", "two stages")
    with Image.open(tmp_path / "timeline.png") as image:
        pixels = torch.tensor(list(image.convert("RGB").getdata()))
    grey = (pixels == torch.tensor([0xDD, 0xDD, 0xDD])).all(1).sum()
    blue = (pixels == torch.tensor([0x00, 0x72, 0xB2])).all(1).sum()
    assert grey > 1000 and blue > 1000
    plot_timeline([[], []], tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").is_file()
