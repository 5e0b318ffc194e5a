"""What a plan says a distillation takes, against sums by hand and against what a training run holds."""

from dataclasses import replace

import pytest
import torch

from hf_mlopt.distillation import DistillationArguments, ExpertDistillationTrainer
from hf_mlopt.distillation.expert_training import ExpertWeights
from hf_mlopt.distillation.losses import expert_squared_error
from hf_mlopt.distillation.teacher import ModelTeacher
from hf_mlopt.errors import InputError
from hf_mlopt.moe import moe_layers
from hf_mlopt.moe.expert_outputs import receive_expert_outputs
from hf_mlopt.planning import check_distillation_memory, plan_distillation, read_shape, read_source
from hf_mlopt.planning import distillation as planning
from hf_mlopt.planning.layerwise_memory import Layerwise, disk_beside_output, layerwise_host, layerwise_peak
from hf_mlopt.planning.training_memory import Training, checkpoint_bytes, end_to_end_peak, host_bytes
from hf_mlopt.planning.ways import Machine, all_ways, asked_way
from hf_mlopt.workflows.distill import DistillRecipe
from tests.command_line import save
from tests.families import make_family, token_ids
from tests.mixtral_8x7b import source
from tests.pruned import prune


# The tiny Mixtral: hidden 32, 4 experts of 64, top-2, 2 layers, 260 words.
EXPERTS = 2 * 4 * 3 * 64 * 32
GB = 10**9


@pytest.fixture
def pair(tmp_path):
    """Directories of a pruned tiny Mixtral and of the original."""
    teacher, student = make_family("mixtral"), make_family("mixtral")
    prune(student)
    return save(student, None, tmp_path / "student"), save(teacher, None, tmp_path / "teacher")


def shape_of(directory):
    return read_shape(read_source(str(directory)))


@pytest.fixture(scope="module")
def mixtral_8x7b():
    return read_shape(source())


def ways_of(shape, machine, **recipe):
    recipe = DistillRecipe(student="s", teacher="t", **recipe)
    ways = all_ways(shape, shape, recipe, recipe.sequence_length, machine)
    return {way.label: way for way in ways}, asked_way(ways, recipe, machine)


def test_the_published_figures_of_mixtral_8x7b(mixtral_8x7b):
    ways, asked = ways_of(mixtral_8x7b, Machine(8, 80 * GB, None), mode="end-to-end", batch_size=1)
    parts = ways["end-to-end, one GPU"].gpu.parts
    gradients = 4 * 46_702_792_704
    assert parts["student"] + parts["AdamW"] + gradients == pytest.approx(747e9, rel=1e-3)
    assert parts["teacher"] == pytest.approx(93.4e9, rel=1e-3)
    assert asked.label == "end-to-end, DDP on 8" and asked.fits is False
    assert asked.gpu.parts["buckets of DDP"] == gradients
    assert ways["layerwise, one GPU"].fits and ways["layerwise, one GPU"].gpu.total < 40 * GB
    assert ways["layerwise, CPU"].fits is None  # nothing is known of that machine's memory


def test_fsdp2_takes_shares(mixtral_8x7b):
    of_8, asked = ways_of(mixtral_8x7b, Machine(8, 141 * GB, None, sharded=True), mode="end-to-end", batch_size=1)
    of_16, _ = ways_of(mixtral_8x7b, Machine(16, 80 * GB, None), mode="end-to-end", batch_size=1)
    assert asked.label == "end-to-end, FSDP2 on 8" and asked.fits
    assert of_16["end-to-end, FSDP2 on 16"].fits
    one = of_8["end-to-end, one GPU"].gpu.parts
    for part in ("student", "AdamW", "teacher", "masks"):
        assert asked.gpu.parts[part] == -(-one[part] // 8)
    assert asked.gpu.parts["gradients"] == -(-4 * 46_702_792_704 // 8)
    layer, head = 46_702_792_704 - 4096 - 2 * 32000 * 4096, 32000 * 4096
    assert asked.gpu.parts["gathered layers"] == 2 * (5 * layer // 32 + head)


def test_the_parts_are_what_a_training_run_holds(pair, tmp_path):
    """Masters, moments and masks, to the byte, after a step of the trainer."""
    student, teacher = make_family("mixtral"), make_family("mixtral")
    prune(student)
    arguments = DistillationArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(2, 16)]
    trainer = ExpertDistillationTrainer(student, teacher, arguments, train_dataset=rows)
    masks = []
    trainer._kept.on_optimizer_step = lambda *a, **k: masks.append(
        sum(zeros.nbytes for _, zeros in trainer._kept._zeros)
    )
    trainer.train()
    shape = shape_of(pair[0])
    parts = end_to_end_peak(shape, 4 * 1000, Training(2, 16)).parts
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["student"] == sum(parameter.nbytes for parameter in student.parameters())
    assert parts["AdamW"] == sum(moment.nbytes for moment in moments)
    assert parts["masks"] == masks[0] == EXPERTS


@pytest.mark.parametrize("rank", [1, 3])
def test_adapters_are_counted_as_peft_makes_them(pair, rank):
    from hf_mlopt.distillation.lora import add_masked_lora

    adapted = add_masked_lora(make_family("mixtral"), rank)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    training = Training(2, 16, lora_rank=rank)
    parts = end_to_end_peak(shape_of(pair[0]), 0, training).parts
    assert parts["AdamW"] == 8 * trained and parts["masks"] == 0
    assert checkpoint_bytes(shape_of(pair[0]), training) == 12 * trained


def test_activations_are_what_autograd_keeps(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 176}
    student, teacher = make_family("mixtral", **sizes), make_family("mixtral", **sizes)
    prune(student)
    ids = token_ids(8, 64)
    targets, kept, errors = ModelTeacher(teacher).targets({"input_ids": ids}), {}, []
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}

    def receive(layer, index_TK, output_TKH):
        target_TKH = targets.output_TKH[layer.index]
        errors.append(expert_squared_error(output_TKH, target_TKH, index_TK, layer.num_experts).sum())

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, receive_expert_outputs(moe_layers(student), receive, instead=targets.index_TK):
        student(input_ids=ids, labels=ids).loss + sum(errors)
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    measured -= 4 * ids.numel() * 260  # logarithms of probabilities, a part of their own
    shape = shape_of(save(student, None, tmp_path))
    teacher_bytes = sum(parameter.nbytes for parameter in teacher.parameters())
    parts = end_to_end_peak(shape, teacher_bytes, Training(8, 64)).parts
    assert 0.95 < parts["activations"] / measured < 1.25  # counts every fourth slot twice
    made = [*targets.output_TKH.values(), *targets.index_TK.values()]
    assert parts["targets"] == sum(value.nbytes for value in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_training_of_a_layer_holds(dtype, tmp_path):
    student = make_family("mixtral", dtype)
    shape = shape_of(save(student, None, tmp_path))
    layer = moe_layers(student)[0]
    weights = ExpertWeights(layer, 0.0)
    for parameter in weights._parameters:
        parameter.grad = torch.zeros_like(parameter)
    weights.step(1e-3)
    held = sum(value.nbytes for value in (*weights._stored, *weights._zeros))
    held += sum(parameter.nbytes for parameter in layer.experts.parameters())
    held += sum(m.nbytes for m, p in zip(weights._masters, weights._parameters, strict=True) if m is not p)
    held += sum(v.nbytes for state in weights._optimizer.state.values() for k, v in state.items() if k != "step")
    parts = layerwise_peak(shape, shape, Layerwise(4, 16, 2)).parts
    names = ("student's layer", "layer as it was", "float32 weights", "AdamW", "masks")
    others = sum(p.nbytes for p in student.model.layers[0].parameters()) - sum(
        p.nbytes for p in layer.experts.parameters()
    )
    assert sum(parts[name] for name in names) == held + others


def test_what_is_known_of_the_windows(pair):
    shape = shape_of(pair[0])
    run = Layerwise(windows=10, length=16, batch_size=4, save_states_every=1)
    host, states = layerwise_host(shape, shape, run), 10 * 16 * 32 * 4
    assert (host["states"], host["inputs of experts"]) == (states, states + 10 * 16 * 2 * 4)
    assert disk_beside_output(shape, run) == (states, 0)
    offloaded = replace(run, offloaded=True)
    assert "states" not in layerwise_host(shape, shape, offloaded)
    assert disk_beside_output(shape, offloaded) == (0, 3 * states + 10 * 16 * 2 * 4)
    assert layerwise_host(shape, shape, replace(run, streamed=False))["models"] == 2 * sum(
        info.nbytes for tensors in read_source(str(pair[0])).layout.values() for info in tensors.values()
    )


def test_layer_by_layer_memory_does_not_grow_with_depth(tmp_path):
    totals = []
    for depth in (2, 5):
        shape = shape_of(save(make_family("mixtral", num_hidden_layers=depth), None, tmp_path / str(depth)))
        totals.append(layerwise_peak(shape, shape, Layerwise(8, 16, 4)).total)
    assert totals[0] == totals[1]


@pytest.mark.parametrize(
    "change, more",
    [
        ({"accumulation": 2}, "targets"),
        ({"logits": True}, "logits"),
        ({"batch_size": 128}, "activations"),
    ],
)
def test_what_takes_more(pair, change, more):
    base = Training(64, 64)
    shape = shape_of(pair[0])
    before, after = (end_to_end_peak(shape, 4 * EXPERTS, training) for training in (base, replace(base, **change)))
    assert after.total > before.total and after.parts.get(more, 0) > before.parts.get(more, 0)


def test_activation_checkpointing_keeps_the_inputs_of_layers(pair):
    shape = shape_of(pair[0])
    kept = end_to_end_peak(shape, 0, Training(64, 64, checkpointing=True))
    assert kept.total < end_to_end_peak(shape, 0, Training(64, 64)).total
    assert kept.parts["activations"] == 2 * 64 * 64 * 32 * 4


def test_without_a_teacher_there_is_none(pair):
    parts = end_to_end_peak(shape_of(pair[0]), 10**6, Training(2, 16, experts=False)).parts
    assert parts["teacher"] == 0 and parts["targets"] == 0


def test_every_process_of_ddp_loads_and_the_first_of_fsdp2(pair):
    shape, base = shape_of(pair[0]), Training(2, 16, processes=4)
    whole = sum(info.numel for tensors in read_source(str(pair[0])).layout.values() for info in tensors.values())
    shared = host_bytes(shape, 1000, replace(base, sharded=True))
    assert host_bytes(shape, 1000, base) - shared == 4 * (4 * whole + 1000) - 8 * whole


def planned(pair, **settings):
    options = {name: settings.pop(name) for name in ("gpus", "gpu_memory", "sharded") if name in settings}
    settings = {"samples": 8, "eval_samples": 2, "sequence_length": 64, "device": "cpu", **settings}
    return plan_distillation(DistillRecipe(student=str(pair[0]), teacher=str(pair[1]), **settings), **options)


def test_a_run_that_can_be_done_has_no_conflict(pair, tmp_path):
    for mode in ("layerwise", "end-to-end"):
        plan = planned(pair, mode=mode, output=str(tmp_path / "new"))
        assert plan.conflicts == [] and plan.way.fits and plan.way.place == "CPU"


def test_ddp_is_refused_where_a_replica_does_not_fit(pair):
    plan = planned(pair, mode="end-to-end", gpus=4, gpu_memory=10**6)
    (conflict,) = plan.conflicts
    assert conflict.startswith("memory: end-to-end, DDP on 4, needs ") and "each GPU holds all" in conflict
    roomy = next(way for way in plan.ways if way.label == "layerwise, one GPU").gpu.total
    plan = planned(pair, mode="end-to-end", gpus=4, gpu_memory=roomy)
    assert "What fits: --mode layerwise on one GPU" in plan.conflicts[0]
    shared = next(way for way in plan.ways if way.label == "end-to-end, FSDP2 on 4").gpu.total
    plan = planned(pair, mode="end-to-end", gpus=4, gpu_memory=max(roomy, shared))
    assert "hf-mlopt recipes copy accelerate/fsdp2" in plan.conflicts[0]
    assert planned(pair, mode="end-to-end", gpus=4, gpu_memory=shared, sharded=True).conflicts == []


def test_a_teacher_that_does_not_fit_is_a_conflict(pair, tmp_path):
    other = save(make_family("mixtral", num_local_experts=8, num_hidden_layers=3), None, tmp_path / "other")
    (conflict,) = planned((pair[0], other)).conflicts
    assert "decoder layers 2 and 3" in conflict and "experts 4 and 8" in conflict


def test_conflicts_of_disk_and_output(pair, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    assert "not empty" in planned(pair, output=str(tmp_path / "old")).conflicts[0]
    monkeypatch.setattr(planning, "free_disk", lambda path: 1000)
    found = planned(pair, offload_states=str(tmp_path)).conflicts
    assert [line.partition(":")[0] for line in found] == ["output", "offload_states"]


def test_training_checkpoints_on_disk(pair):
    one = planned(pair, mode="end-to-end", save_steps=100).disk_bytes
    several = planned(pair, mode="end-to-end", save_steps=1).disk_bytes
    whole = one["beside"]
    assert several["beside"] == max(2 * whole - several["output"], whole) > whole


def test_gpus_that_nobody_knows(pair, monkeypatch):
    monkeypatch.setattr(planning, "gpu_memories", lambda device: [])
    with pytest.raises(InputError, match="gpus=2: nvidia-smi shows none"):
        planned(pair, gpus=2)
    monkeypatch.setattr(planning, "gpu_memories", lambda device: [3 * GB, 2 * GB])
    plan = planned(pair, mode="end-to-end", device="auto")
    assert plan.asked == "end-to-end, DDP on 2" and plan.way.gpu_available == 2 * GB


class TestBeforeARun:
    """`check_distillation_memory`, as `distill` calls it."""

    def check(self, pair, gpu_memory=None, **settings):
        settings = {"mode": "end-to-end", "samples": 8, "sequence_length": 64, **settings}
        recipe = DistillRecipe(student=str(pair[0]), teacher=str(pair[1]), **settings)
        check_distillation_memory(recipe, *pair, gpu_memory=gpu_memory)

    def launched(self, monkeypatch, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    def test_what_fits_passes(self, pair, monkeypatch):
        self.check(pair)
        self.check(pair, GB)
        self.check(pair, mode="layerwise")
        self.launched(monkeypatch, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        self.check(pair)

    def test_one_gpu(self, pair):
        with pytest.raises(InputError, match="memory: end-to-end, one GPU, needs"):
            self.check(pair, 10**6)

    def test_ddp_and_fsdp2(self, pair, monkeypatch):
        self.launched(monkeypatch, WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")
        with pytest.raises(InputError, match="DDP on 4, needs"):
            self.check(pair, 10**6)
        self.launched(monkeypatch, ACCELERATE_USE_FSDP="true")
        with pytest.raises(InputError, match="FSDP2 on 4, needs"):
            self.check(pair, 10**5)

    def test_processes_on_the_cpu_share_its_memory(self, pair, monkeypatch):
        monkeypatch.setattr(planning, "available_memory", lambda: 2 * GB)
        monkeypatch.setattr(planning, "own_memory", lambda: 0)
        self.check(pair)
        self.launched(monkeypatch, WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")
        with pytest.raises(InputError, match="end-to-end, CPU, needs"):
            self.check(pair)

    def test_a_plan_may_be_wrong_by_a_little(self, pair):
        recipe = DistillRecipe(student="s", teacher="t", mode="end-to-end", samples=8, sequence_length=64)
        shapes = [shape_of(directory) for directory in pair]
        needed = asked_way(all_ways(*shapes, recipe, 64, Machine(1, GB, None)), recipe, Machine(1, GB, None)).gpu.total
        self.check(pair, round(0.9 * needed))
        with pytest.raises(InputError):
            self.check(pair, round(0.8 * needed))

    def test_what_cannot_be_planned_is_not_refused(self, pair, tmp_path):
        self.check((pair[0], tmp_path), 1)
