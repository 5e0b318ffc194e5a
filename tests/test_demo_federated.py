"""`hf-mlopt demo --federated`: the table, the picture, and that the same seed gives the same numbers."""

import json

import numpy as np
import pytest
from command_line import hf_mlopt, succeed
from PIL import Image

from hf_mlopt.federated.super_model import SuperModel


pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "output"
    return output, succeed("demo", "--federated", "--short", "--output", output)


def results(output):
    return json.loads((output / "results.json").read_text())


def test_the_table_is_that_of_the_results(demo):
    output, outcome = demo
    found = results(output)
    lines = [line.split() for line in outcome.out.splitlines()]
    for site, row in {**found["sites"], "mean": found["mean"]}.items():
        (line,) = [line for line in lines if line and line[0] == site]
        assert line[1:] == [f"{row[name]:.3f}" for name in ("fedavg", "global", "personal", "super")]
    # The global model of FedSM is FedAvg's.
    assert all(row["fedavg"] == row["global"] for row in found["sites"].values())


def test_what_is_written(demo):
    output, _ = demo
    assert sorted(path.name for path in output.iterdir()) == ["fedavg", "fedsm", "overlay.png", "results.json"]
    assert not list(output.glob("*/checkpoint-*")) and not list(output.glob("*/sites"))
    assert len(SuperModel.from_pretrained(output / "fedsm" / "super_model").models) == 4
    sheet = np.asarray(Image.open(output / "overlay.png"))
    assert sheet.shape == (18 + 6 * 132 + 18, 4 + 3 * 132, 3)
    assert all(
        len(np.unique(sheet[18:-18, 4 + 132 * k : 132 + 132 * k].reshape(-1, 3), axis=0)) > 20 for k in range(3)
    )


@pytest.mark.slow
def test_an_earlier_demo_is_replaced_and_the_same_seed_gives_the_same_numbers(demo):
    output, _ = demo
    before = results(output)
    succeed("demo", "--federated", "--short", "--output", output)
    after = results(output)
    assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    outcome = hf_mlopt("demo", "--federated", "--short", "--output", tmp_path)
    assert outcome.status == 2 and "not empty" in outcome.err and (tmp_path / "thesis.txt").read_text() == "mine"
