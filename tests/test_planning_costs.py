"""Operations, bytes and memory of a plan, against sums written out by hand."""

from dataclasses import dataclass

import pytest
import torch

from hf_mlopt.planning import planned_layout, read_shape, read_source
from hf_mlopt.planning.costs import Run, count_costs
from hf_mlopt.planning.layout import file_bytes, packed_bytes
from hf_mlopt.planning.memory import in_memory_peak, must_stream, streamed_peak
from hf_mlopt.pruning.config import PruningConfig
from tests.command_line import save
from tests.families import make_family
from tests.mixtral_8x7b import source as mixtral_8x7b_source


# The tiny Mixtral: hidden 32, 4 heads of 8, 2 of them for keys and values, experts of 64, 4 of them, top-2, 260 words.
ATTENTION, EXPERT, ROUTER, WORDS = 32 * 32 * 2 + 16 * 32 * 2, 3 * 64 * 32, 4 * 32, 260 * 32
LAYER = ATTENTION + 4 * EXPERT + ROUTER + 2 * 32
TOKENS = 3 * 10


@dataclass
class Planned:
    shape: object
    run: Run
    costs: object
    source: object


@pytest.fixture
def mixtral(tmp_path, tiny_mixtral):
    source = read_source(str(save(tiny_mixtral(num_hidden_layers=3), None, tmp_path)))
    return source, read_shape(source)


def plan(mixtral, streamed=True, offloaded=False, every=4, **settings):
    source, shape = mixtral
    settings = {"sparsity": 0.5, **settings}
    run = Run(PruningConfig(**settings), 3, 10, streamed, offloaded, every)
    costs = count_costs(shape, run, source.layout, planned_layout(shape, source.layout))
    return Planned(shape, run, costs, source)


@pytest.mark.parametrize(
    "settings, passes",
    [
        ({}, 2 + 2 + 1),
        ({"propagate": "dense"}, 1 + 1 + 1),
        ({"method": "magnitude"}, 0),
        ({"method": "magnitude", "drop_experts": 0.25}, 2 + 2 + 1),
        ({"allocation": "owl"}, 2 + 2 + 1 + 2 * 3),
    ],
)
def test_operations_of_the_calibration_passes(mixtral, settings, passes):
    # Causal attention: 4 heads, 8 features of queries and of values, half of the 10 x 10 pairs, two operations each.
    of_token = 2 * (ATTENTION + 2 * EXPERT + ROUTER) + 4 * (8 + 8) * 10
    assert plan(mixtral, **settings).costs.forward_flops == passes * of_token * TOKENS


def test_a_dense_layer_is_observed_only_if_it_is_in_scope(tmp_path):
    source = read_source(str(save(make_family("deepseek_v2", first_k_dense_replace=1), None, tmp_path)))
    found = {}
    for scope in ("experts", "all-linear"):
        found[scope] = plan((source, read_shape(source)), scope=scope).costs
    shape = read_shape(source)
    dense = 2 * sum(matrix.numel for matrix in shape.layers[0].linears) + 4 * (16 + 8) * 10
    assert found["all-linear"].forward_flops - found["experts"].forward_flops == dense * TOKENS
    linears = sum(matrix.numel for layer in shape.layers for matrix in layer.linears)
    assert found["all-linear"].scored_weights - found["experts"].scored_weights == linears


def test_operations_of_sparsegpt(mixtral):
    costs = plan(mixtral, method="sparsegpt").costs
    slots = 2 * TOKENS
    hessians = 2 * slots * (32**2 + 64**2) + 2 * TOKENS * 32**2
    up = 2 * (4 * 32**3 // 3 + 64 * 32**2)  # w1 and w3
    down = 4 * 64**3 // 3 + 32 * 64**2
    assert costs.solve_flops == 3 * (hessians + 4 * (up + down))
    fewer = plan(mixtral, method="sparsegpt", drop_experts=0.25).costs
    assert fewer.solve_flops == pytest.approx(3 * (hessians + 3 * (up + down)), rel=1e-5)
    assert plan(mixtral).costs.solve_flops == 0


def test_weights_scored(mixtral):
    assert plan(mixtral).costs.scored_weights == 3 * 4 * EXPERT
    assert plan(mixtral, sparsity=None, drop_experts=0.25).costs.scored_weights == 0
    assert plan(mixtral, drop_experts=0.25).costs.scored_weights == 3 * 3 * EXPERT


def test_bytes_read_and_written(mixtral):
    planned = plan(mixtral)
    everything = 4 * (3 * LAYER + 2 * WORDS + 32)
    written = sum(file_bytes(planned.source.layout).values())
    embedding = 4 * (WORDS + 32)  # and the last norm, which is read with it
    assert planned.costs.read_bytes == everything + embedding
    assert planned.costs.written_bytes == planned.costs.output_bytes == written
    assert plan(mixtral, streamed=False).costs.read_bytes == everything
    assert plan(mixtral, method="magnitude").costs.read_bytes == everything
    assert plan(mixtral, allocation="owl").costs.read_bytes == everything + 2 * embedding + 4 * 3 * LAYER


def test_states_on_disk(mixtral, tmp_path, tiny_mixtral):
    states, output = TOKENS * 32 * 4, plan(mixtral).costs.output_bytes
    assert plan(mixtral).costs.state_bytes == states
    saved = plan(mixtral, every=1).costs  # the inputs of layers 1 and 2
    assert (saved.written_bytes - output, saved.disk_bytes - output) == (2 * states, 2 * states)
    assert plan(mixtral, every=2).costs.disk_bytes - output == states
    assert plan(mixtral, every=3).costs.disk_bytes == output
    longer = read_source(str(save(tiny_mixtral(num_hidden_layers=5), None, tmp_path / "longer")))
    costs = plan((longer, read_shape(longer)), every=1).costs
    assert costs.disk_bytes - costs.output_bytes == 2 * states  # the one that is written, and the one before
    offloaded = plan(mixtral, offloaded=True).costs
    assert (offloaded.disk_bytes, offloaded.offloaded_bytes) == (output, 2 * states)
    assert offloaded.written_bytes - output == 3 * states
    assert offloaded.read_bytes - plan(mixtral).costs.read_bytes == 5 * states
    assert plan(mixtral, method="magnitude", every=1).costs.disk_bytes == output


def test_the_peak_of_streaming_does_not_grow_with_depth(tmp_path, tiny_mixtral):
    totals = []
    for depth in (2, 5):
        source = read_source(str(save(tiny_mixtral(num_hidden_layers=depth), None, tmp_path / str(depth))))
        planned = plan((source, read_shape(source)))
        totals.append(streamed_peak(planned.shape, planned.run, planned.costs.state_bytes).total)
    assert totals[0] == totals[1]


def test_the_parts_of_the_streamed_peak(mixtral):
    planned = plan(mixtral)
    peak = streamed_peak(planned.shape, planned.run, planned.costs.state_bytes)
    assert peak.parts["layer"] == 4 * LAYER and peak.parts["states"] == TOKENS * 32 * 4
    assert peak.total == sum(peak.parts.values())
    offloaded = plan(mixtral, offloaded=True)
    assert streamed_peak(offloaded.shape, offloaded.run, planned.costs.state_bytes).parts["states"] == 0
    dense = plan(mixtral, propagate="dense")
    assert streamed_peak(dense.shape, dense.run, planned.costs.state_bytes).parts["states"] == 2 * TOKENS * 32 * 4
    on_gpu = streamed_peak(planned.shape, planned.run, planned.costs.state_bytes, accelerator=True)
    assert "interpreter" not in on_gpu.parts


def test_activations_count_twice_on_an_accelerator(mixtral):
    planned = plan(mixtral)
    run = Run(PruningConfig(sparsity=0.5, batch_size=1024), 1024, 64, True)
    cpu, gpu = (streamed_peak(planned.shape, run, 0, accelerator=accelerator) for accelerator in (False, True))
    assert cpu.moment == gpu.moment == "observing layer 0"
    assert gpu.parts["workspace"] == 2 * cpu.parts["workspace"]


def test_statistics_are_sums_or_second_moments(mixtral):
    def statistics(**settings):
        planned = plan(mixtral, **settings)
        return streamed_peak(planned.shape, planned.run, planned.costs.state_bytes).parts["statistics"]

    assert statistics(method="wanda", batch_size=3) == 8 * (5 * 32 + 4 * 64)
    assert statistics(method="sparsegpt") == 4 * (5 * 32**2 + 4 * 64**2)


def test_a_larger_batch_takes_more_workspace(tmp_path):
    """What is alive while the experts of a batch are computed, by hand, where that is more than scoring takes."""
    model = make_family("mixtral", torch.bfloat16, hidden_size=32, intermediate_size=512)
    source = read_source(str(save(model, None, tmp_path)))
    shape = read_shape(source)
    run = Run(PruningConfig(sparsity=0.5, batch_size=8), 16, 2048, True)
    tokens, slots = 8 * 2048, 2 * 8 * 2048
    peak = streamed_peak(shape, run, 0)
    assert peak.moment == "observing layer 0"
    assert peak.parts["workspace"] == 2 * (3 * tokens * 32 + slots * 32 + slots * (2 * 512 + 2 * 512))


def test_the_peak_in_memory(mixtral):
    planned = plan(mixtral, streamed=False)
    everything, layers, up = 4 * (3 * LAYER + 2 * WORDS + 32), 4 * 3 * LAYER, 4 * 3 * 4 * 2 * 64 * 32
    states = 10**6
    peak = in_memory_peak(planned.shape, planned.run, states)
    assert peak.moment == "pruning layer 0" and peak.parts["states"] == states and peak.parts["layer"] == 0
    assert peak.parts["weights"] == everything
    # Where no weights are scored and there is one token only: the loading, or the saving if pages do not count.
    short = Run(PruningConfig(drop_experts=0.25), 1, 1, False)
    peak = in_memory_peak(planned.shape, short, 0)
    assert peak.moment == "loading" and peak.parts["mapped files"] == layers
    peak = in_memory_peak(planned.shape, short, 0, mapped=False)
    assert peak.moment == "saving" and peak.parts["saving"] == up


def test_experts_that_are_stored_as_one_tensor_are_neither_put_together_nor_split(tmp_path):
    make_family("mixtral").save_pretrained(tmp_path, save_original_format=False)
    shape = read_shape(read_source(str(tmp_path)))
    run = Run(PruningConfig(drop_experts=0.25), 1, 1, False)
    assert in_memory_peak(shape, run, 0, mapped=False).parts.get("saving", 0) == 0
    assert in_memory_peak(shape, run, 0).parts["mapped files"] == 4 * LAYER


def test_a_model_is_streamed_where_it_takes_most_of_the_memory():
    assert not must_stream(100, 0, 200) and not must_stream(0, 160, 200)
    assert must_stream(100, 1, 200) and must_stream(0, 161, 200)


@pytest.fixture(scope="module")
def mixtral_8x7b():
    source = mixtral_8x7b_source()
    return source, read_shape(source)


def test_the_published_sizes_of_mixtral_8x7b(mixtral_8x7b):
    source, shape = mixtral_8x7b
    run = Run(PruningConfig(sparsity=0.5), 128, 2048, True)
    output = planned_layout(shape, source.layout)
    costs = count_costs(shape, run, source.layout, output)
    assert sum(info.numel for info in output["model.safetensors"].values()) == 46_702_792_704
    assert source.nbytes == pytest.approx(93.4e9, rel=1e-3)
    assert costs.state_bytes == pytest.approx(2.15e9, rel=2e-3)
    assert costs.forward_flops == pytest.approx(2 * 6.7e15, rel=0.02)
    experts = {name for name in output["model.safetensors"] if ".experts." in name}
    assert packed_bytes(output, experts, 0.5) == pytest.approx(53.9e9, rel=2e-3)
    layer = streamed_peak(shape, run, costs.state_bytes).parts["layer"]
    assert layer == pytest.approx((2.82 + 0.084) * 1e9, rel=2e-3)


@pytest.mark.parametrize(
    "method, workspace",
    [
        ("ria", 24 * 14336 * 4096),  # a whole matrix at once
        ("sparsegpt", 4 * (4 * 14336**2 + 14336 * 4096)),  # of one expert at a time
    ],
)
def test_what_scoring_takes(mixtral_8x7b, method, workspace):
    _, shape = mixtral_8x7b
    run = Run(PruningConfig(method=method, sparsity=0.5, batch_size=1), 1, 16, True)
    peak = streamed_peak(shape, run, 0)
    assert peak.moment == "pruning layer 0" and peak.parts["workspace"] == workspace


def test_sparsegpt_takes_several_small_experts_at_once(mixtral):
    planned = plan(mixtral, method="sparsegpt", batch_size=1)
    peak = streamed_peak(planned.shape, Run(planned.run.config, 1, 1, True), 0)
    assert peak.parts["workspace"] == 4 * (4 * 4 * 64**2 + 4 * 32 * 64)
