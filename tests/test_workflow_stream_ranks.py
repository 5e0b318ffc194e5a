"""
Calibration shared between two processes gives what one process gives, and a streamed run of two can be gone on with.

The processes are forks of this one that speak gloo with one another; one test starts them anew.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from command_line import hf_mlopt, succeed, weights
from families import make_family, token_ids
from processes import SECONDS, environment, free_port, together

from hf_mlopt import ranks
from hf_mlopt.errors import InputError
from hf_mlopt.pruning import MoEPruner, PruningConfig
from hf_mlopt.pruning.states import LayerCalls


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

HALF = ("--sparsity", "0.5")


def digest(model):
    """All bytes of a model as one number, of which two equal models have the same."""
    import hashlib

    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def prune(name, settings, family):
    """Prunes a model of ours on seven windows in batches of two; weights, report, layers called."""
    config = PruningConfig(**{"sparsity": 0.5, "batch_size": 2, **settings})
    model, called, call = make_family(name, **family), [], LayerCalls.__call__

    def counting(self, *args):
        called.append(1)
        return call(self, *args)

    LayerCalls.__call__ = counting
    try:
        report = MoEPruner(config).prune(model, token_ids(7), progress=False)
    finally:
        LayerCalls.__call__ = call
    # Not sums of floats, which depend on the order by their last bits.
    layers = [[layer.tensors, layer.tokens_per_expert, layer.uncovered, layer.kept_experts] for layer in report.layers]
    return {"weights": digest(model), "layers": layers, "calls": len(called), "size": ranks.world_size()}


@pytest.mark.parametrize(
    "name, settings",
    [
        ("mixtral", {"min_tokens": 90}),
        ("mixtral", {"min_tokens": 90, "method": "wanda", "scope": "all-linear"}),
        ("mixtral", {"min_tokens": 90, "on_uncovered": "all_tokens", "propagate": "dense"}),
        ("mixtral", {"min_tokens": 0, "drop_experts": 0.25, "allocation": "owl"}),
        ("qwen2_moe", {"min_tokens": 90, "scope": "all-linear", "allocation": "load"}),
        ("module_list", {"min_tokens": 90, "method": "ria", "sparsity": None, "pattern": "2:4"}),
        ("gpt_oss", {"method": "magnitude"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_two_processes_are_one(name, settings):
    alone = prune(name, settings, {})
    first, second = together(lambda rank: prune(name, settings, {}))
    assert first["size"] == second["size"] == 2, first
    if settings.get("min_tokens"):
        assert any(0 < len(uncovered) < len(tokens) for _, tokens, uncovered, _ in alone["layers"])
    assert first["weights"] == second["weights"] == alone["weights"]
    assert first["layers"] == second["layers"] == alone["layers"]
    assert first["calls"] == second["calls"] == alone["calls"] / 2


def test_three_processes_with_unequal_shares():
    """Four batches on three processes: the first has two of them."""
    settings = {"min_tokens": 90, "on_uncovered": "all_tokens"}
    alone = prune("mixtral", settings, {})
    answers = together(lambda rank: prune("mixtral", settings, {}), world=3)
    assert [answer["weights"] for answer in answers] == [alone["weights"]] * 3
    assert answers[0]["calls"] == 2 * answers[1]["calls"] == 2 * answers[2]["calls"]


def test_fewer_batches_than_processes_are_refused_by_all():
    def run(rank):
        with pytest.raises(InputError, match="1 batches for 2 processes; lower batch_size"):
            prune("mixtral", {"batch_size": 8}, {})
        return "refused"

    assert together(run) == ["refused"] * 2


@pytest.mark.parametrize("bad", (0, 1))
def test_all_stop_where_one_finds_nan(bad):
    """Nobody is left waiting for it."""

    def run(rank):
        import hf_mlopt.pruning.sweep as sweep

        if rank == bad:
            sweep.is_finite = lambda value: False
        with pytest.raises(InputError, match="NaN or Inf"):
            prune("mixtral", {"min_tokens": 0}, {})
        return "refused"

    assert together(run) == ["refused"] * 2


def test_what_the_processes_tell_one_another():
    def run(rank):
        sums = {"b": torch.full((2, 2), float(rank + 1)), "a": torch.tensor(rank, dtype=torch.int64)}
        ranks.sum_(sums)
        answers = [ranks.all_agree(rank != 1, torch.device("cpu")), ranks.all_agree(True, torch.device("cpu"))]
        ranks.wait_for_all()
        return [
            ranks.rank(), ranks.world_size(), ranks.my_share([*"abcde"]), sums["a"].item(), sums["b"].tolist(),
            ranks.from_first(f"of {rank}"), answers,
        ]  # fmt: skip

    common = [1, [[3.0, 3.0], [3.0, 3.0]], "of 0", [False, True]]
    assert together(run) == [[0, 2, [*"ace"], *common], [1, 2, [*"bd"], *common]]


def test_alone_nothing_happens():
    sums = {"a": torch.ones(2)}
    ranks.sum_(sums)
    ranks.wait_for_all()
    assert (ranks.rank(), ranks.world_size(), ranks.my_share([1, 2]), ranks.from_first(3)) == (0, 1, [1, 2], 3)
    assert ranks.all_agree(True, torch.device("cpu")) and not ranks.all_agree(False, torch.device("cpu"))
    assert sums["a"].tolist() == [1, 1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def words(work):
    make_family("mixtral", num_hidden_layers=3).save_pretrained(work / "source", max_shard_size="60KB")
    (work / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_ids(7).tolist()))
    return (
        "prune", work / "source", *HALF, "--samples", 7, "--sequence-length", 24, "--min-tokens", 90,
        "--batch-size", 2, "--save-states-every", 1, "--calibration", work / "ids.jsonl", "--device", "cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(work, words):
    succeed(*words, "--stream", "--output", work / "alone")
    return weights(work / "alone")


def command(*words, dies_at=None):
    """Runs a command as each of the processes of `accelerate launch` does."""

    def run(rank):
        from accelerate import PartialState

        PartialState._reset_state()  # of an earlier test in the process that this one is a copy of
        seen, record = [], None
        if dies_at is not None:
            from hf_mlopt.streaming.journal import Journal

            record = Journal.record

            def deadly(journal, index, *args):
                if (rank, index) == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                record(journal, index, *args)

            Journal.record = deadly
        share = ranks.my_share
        ranks.my_share = lambda batches: seen.append(ranks.world_size()) or share(batches)
        outcome = hf_mlopt(*words)
        return [outcome.status, seen, outcome.out, outcome.err]

    return together(run, group=False)


def same(directory, expected):
    found = weights(directory)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.e2e
@pytest.mark.parametrize("way", (["--stream"], ["--in-memory"], ["--stream", "--offload-states", "STATES"]))
def test_the_command_in_two_processes(tmp_path, words, alone, way):
    way = [tmp_path / "states" if word == "STATES" else word for word in way]
    output = tmp_path / "out" / "pruned"
    answers = command(*words, *way, "--output", output)
    assert [answer[:2] for answer in answers] == [[0, [2]]] * 2, answers
    assert "written to" in answers[0][2] and answers[1][2] == ""
    assert same(output, alone) and os.listdir(output.parent) == ["pruned"]
    assert not (tmp_path / "states").exists() or not any((tmp_path / "states").iterdir())


@pytest.mark.e2e
@pytest.mark.parametrize("dies_at", ((0, 1), (1, 2)))
def test_one_of_two_is_killed(tmp_path, words, alone, dies_at):
    """The other ends too, and both go on with what they had; one alone, or three, do not."""
    words = (*words, "--stream", "--output", tmp_path / "pruned")
    answers = command(*words, dies_at=dies_at)
    assert answers[dies_at[0]] is None and isinstance(answers[1 - dies_at[0]], str), answers
    assert not (tmp_path / "pruned").exists()
    outcome = hf_mlopt(*words, "--resume")
    assert outcome.status == 2 and "processes was 2 and is 1" in outcome.err
    first, second = command(*words)  # refused by the one that writes; the other does not wait for it
    assert first[0] == 2 and "unfinished run" in first[3] and second[0] != 0, second
    answers = command(*words, "--resume")
    assert [answer[0] for answer in answers] == [0, 0], answers
    assert same(tmp_path / "pruned", alone)


@pytest.mark.e2e
@pytest.mark.slow
def test_processes_started_anew(tmp_path, words, alone):
    port, program = free_port(), "import sys; from hf_mlopt.cli import main; sys.exit(main(sys.argv[1:]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words), "--stream", "--output", str(tmp_path / "pruned")],
            env={**os.environ, **environment(rank, port)},
        )
        for rank in range(2)
    ]
    assert [process.wait(SECONDS) for process in processes] == [0, 0]
    assert same(tmp_path / "pruned", alone)
