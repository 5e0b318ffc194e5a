"""Targets stored once and read from disk: what is written, how a batch finds its rows, and training from them."""

import copy
import json
import os
import signal

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_mlopt.distillation import (
    DistillationArguments,
    ExpertDistillationTrainer,
    StoredTargets,
    store_targets,
)
from hf_mlopt.distillation.stored import plan_targets
from hf_mlopt.distillation.teacher import ModelTeacher
from hf_mlopt.errors import ConfigurationError, InputError
from tests.distilled import SETTINGS, assert_same_trajectory, logs, make_pair, make_trainer, rows
from tests.families import make_family, token_ids
from tests.processes import together
from tests.pruned import snapshot


def unpadded(count=6, length=12):
    return [{"input_ids": ids, "labels": ids} for ids in token_ids(count, length).tolist()]


def files(directory):
    return sorted(directory.glob("*.safetensors"))


def run(student, teacher, folder, data, **settings):
    trainer = make_trainer(copy.deepcopy(student), teacher, folder, data, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    return logs(trainer), snapshot(trainer.model), {name: metrics[name] for name in ("eval_loss", "eval_expert_mse")}


# Training


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_training_is_that_with_the_teacher_bit_for_bit(tmp_path, name):
    student, teacher = make_pair(name)
    data = unpadded()
    targets = store_targets(teacher, data, tmp_path / "targets")
    settings = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 2}
    with_teacher, with_targets = (run(student, source, tmp_path, data, **settings) for source in (teacher, targets))
    assert with_teacher[0] == with_targets[0] and with_teacher[2] == with_targets[2]
    assert all(torch.equal(value, with_targets[1][key]) for key, value in with_teacher[1].items())


def test_padded_rows_in_larger_batches_give_the_same_up_to_rounding(tmp_path):
    student, teacher = make_pair()
    targets = store_targets(teacher, rows(), tmp_path / "targets")
    runs = [run(student, source, tmp_path, rows(), gradient_accumulation_steps=2) for source in (teacher, targets)]
    assert_same_trajectory(runs[0][:2], runs[1][:2])
    assert runs[0][2] == pytest.approx(runs[1][2], rel=1e-5)


def test_targets_in_bfloat16_take_half_and_train_nearly_the_same(tmp_path):
    student, teacher = make_pair()
    whole, half = (
        store_targets(teacher, unpadded(), tmp_path / str(dtype), dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert whole.manifest["bytes"] == 6 * 12 * 2 * 2 * (32 * 4 + 1)
    assert half.manifest["bytes"] == 6 * 12 * 2 * 2 * (32 * 2 + 1)
    losses = [[line["loss"] for line in run(student, source, tmp_path, unpadded())[0]] for source in (whole, half)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_adapters_train_from_stored_targets(tmp_path):
    student, teacher = make_pair()
    targets = store_targets(teacher, unpadded(), tmp_path / "targets")
    lines = [
        run(student, source, tmp_path, unpadded(), lora_rank=2, per_device_train_batch_size=1)[0]
        for source in (teacher, targets)
    ]
    assert lines[0] == lines[1]


# What is on disk


def test_files_hold_what_the_teacher_makes_of_each_row_alone(tmp_path):
    _, teacher = make_pair("deepseek_v3")
    store_targets(teacher, unpadded(), tmp_path / "targets", revision="abc")
    frozen = ModelTeacher(teacher)
    assert len(files(tmp_path / "targets")) == 6
    wanted = []
    for row in unpadded():
        targets = frozen.targets({"input_ids": torch.tensor([row["input_ids"]])})
        expected = {}
        for layer in (1, 2):  # the first is dense
            expected[f"{layer}.experts"] = targets.index_TK[layer].to(torch.uint8)
            expected[f"{layer}.outputs"] = targets.output_TKH[layer]
        wanted.append(expected)
    found = [load_file(file) for file in files(tmp_path / "targets")]
    for expected in wanted:
        (held,) = [one for one in found if all(torch.equal(one[key], expected[key]) for key in expected)]
        assert held.keys() == expected.keys() and all(held[key].dtype == expected[key].dtype for key in held)
    manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
    assert manifest["bytes"] == sum(value.nbytes for one in found for value in one.values())
    assert (manifest["rows"], manifest["tokens"], manifest["dtype"]) == (6, 72, "float32")
    assert manifest["teacher"]["revision"] == "abc" and manifest["teacher"]["model_type"] == "deepseek_v3"
    assert manifest["sizes"]["mixture-of-experts layers at"] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["targets"]


def test_more_than_256_experts_take_two_bytes(tmp_path):
    teacher = make_family("qwen3_moe", num_experts=300, num_hidden_layers=1)
    targets = store_targets(teacher, unpadded(2), tmp_path / "targets")
    index_TK = load_file(files(tmp_path / "targets")[0])["0.experts"]
    assert index_TK.dtype == torch.int16 and targets.manifest["bytes"] == 2 * 12 * 2 * (32 * 4 + 2)
    inputs = {"input_ids": token_ids(2, 12)}
    expected, found = (source.targets(inputs) for source in (ModelTeacher(teacher), targets))
    assert torch.equal(expected.index_TK[0], found.index_TK[0]) and found.index_TK[0].dtype == torch.int64
    assert found.index_TK[0].max() > 255


def test_a_batch_finds_its_rows_wherever_padding_stands(tmp_path):
    _, teacher = make_pair()
    ids = [row["input_ids"] for row in unpadded(3)]
    ids = [ids[0], ids[1][:5], ids[2][:9]]
    dataset = [
        {"input_ids": ids[0]},
        {"input_ids": [2, 2, *ids[1]], "attention_mask": [0, 0, 1, 1, 1, 1, 1]},
        {"input_ids": torch.tensor(ids[2])},
        {"input_ids": ids[0]},  # again
    ]
    targets = store_targets(teacher, dataset, tmp_path / "targets")
    assert targets.manifest["rows"] == 3 and targets.manifest["tokens"] == 12 + 5 + 9
    batch = torch.full((4, 12), 2)
    mask = torch.zeros(4, 12, dtype=torch.long)
    places = {0: (2, range(3, 12)), 1: (0, range(12)), 3: (1, range(5))}  # left, none, right; row 2 is empty
    for row, (number, place) in places.items():
        batch[row, list(place)], mask[row, list(place)] = torch.tensor(ids[number]), 1
    found = targets.targets({"input_ids": batch, "attention_mask": mask})
    for row, (number, place) in places.items():
        expected = ModelTeacher(teacher).targets({"input_ids": torch.tensor([ids[number]])})
        tokens = row * 12 + torch.tensor(list(place))
        for layer in (0, 1):
            assert torch.equal(found.index_TK[layer][tokens], expected.index_TK[layer])
            assert torch.equal(found.output_TKH[layer][tokens], expected.output_TKH[layer])
    padding = (mask == 0).flatten()
    assert not found.output_TKH[0][padding].any() and not found.index_TK[0][padding].any()


def test_the_size_is_told_before_anything_is_run(tmp_path, caplog):
    _, teacher = make_pair()
    with torch.device("meta"):
        skeleton = type(teacher)(teacher.config)
    said = plan_targets(skeleton, unpadded(), tmp_path / "targets", dtype="bfloat16")
    assert said == (
        "targets of 6 rows: 72 tokens x 2 layers x 2 experts x (32 x 2 + 1) bytes = 18,720 bytes (0.00 GB) in "
        f"{tmp_path / 'targets'}"
    )
    assert not list(tmp_path.iterdir())
    with caplog.at_level("INFO", "hf_mlopt"):
        store_targets(teacher, unpadded(), tmp_path / "targets", dtype="bfloat16")
    assert said in caplog.text


# Going on


def killed_at_row(count, teacher, data, directory):
    """Stores in another process, which is killed when it has written a row that does not have its name yet."""

    def run(rank):
        replace, left = os.replace, [count]

        def dying(source, target):
            left[0] -= str(target).endswith(".safetensors")
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
        store_targets(teacher, data, directory)

    assert together(run, world=1, group=False) == [None]


def test_a_killed_run_goes_on_and_gives_the_same_files(tmp_path, monkeypatch):
    _, teacher = make_pair()
    directory, data = tmp_path / "targets", unpadded()
    store_targets(teacher, data, tmp_path / "straight")
    killed_at_row(4, teacher, data, directory)
    unfinished = tmp_path / ".targets.unfinished"
    assert not directory.exists() and len(files(unfinished / "targets")) == 4

    with pytest.raises(InputError, match="is not finished; store it with resume first"):
        StoredTargets(directory)
    with pytest.raises(InputError, match="an unfinished run stands in .*add --resume"):
        store_targets(teacher, data, directory)
    for source, rows_, settings, message in (
        (teacher, unpadded(5), {}, "fingerprint was .* rows was 6 and is 5"),
        (make_family("mixtral", seed=1), data, {}, "teacher.sample was"),
        (teacher, data, {"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16'"),
    ):
        with pytest.raises(InputError, match=message):
            store_targets(source, rows_, directory, resume=True, **settings)
    assert "of which 4 rows are there" in plan_targets(teacher, data, directory, resume=True)

    ran = []
    targets = ModelTeacher.targets
    monkeypatch.setattr(ModelTeacher, "targets", lambda self, inputs: ran.append(1) or targets(self, inputs))
    store_targets(teacher, data, directory, resume=True)
    assert len(ran) == 2 and not unfinished.exists()
    names = [sorted(path.name for path in folder.iterdir()) for folder in (directory, tmp_path / "straight")]
    assert names[0] == names[1] and len(names[0]) == 7
    assert all((directory / name).read_bytes() == (tmp_path / "straight" / name).read_bytes() for name in names[0])


# Bad input


def test_a_disk_that_is_too_small_is_refused_before_the_teacher_runs(tmp_path, monkeypatch):
    _, teacher = make_pair()
    needed = 6 * 12 * 2 * 2 * (32 * 4 + 1)
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr("hf_mlopt.hub.output.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(ModelTeacher, "targets", None)
    with pytest.raises(InputError, match="needs 0.00 GB, but the disk has"):
        store_targets(teacher, unpadded(), tmp_path / "targets")
    assert not list(tmp_path.iterdir())
    usage.free = needed
    plan_targets(teacher, unpadded(), tmp_path / "targets")


@pytest.mark.parametrize(
    "data, settings, message",
    [
        ([], {}, "dataset: has no rows"),
        ([{"text": "a", "labels": 1}], {}, r"needs a column 'input_ids', not only \['labels', 'text'\]"),
        (unpadded(1), {"dtype": "int8"}, "dtype='int8': must be one of float32, bfloat16"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, data, settings, message):
    with pytest.raises(InputError, match=message):
        store_targets(make_pair()[1], data, tmp_path / "targets", **settings)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="the directory is not empty"):
        store_targets(make_pair()[1], unpadded(), tmp_path)


def test_outputs_that_are_not_finite_are_refused_and_leave_nothing(tmp_path):
    _, teacher = make_pair()
    teacher.model.layers[1].mlp.experts.down_proj.data.fill_(float("inf"))
    with pytest.raises(InputError, match="model.layers.1.mlp.experts gives outputs that are not finite"):
        store_targets(teacher, unpadded(), tmp_path / "targets")
    assert not list(tmp_path.iterdir())


def test_what_holds_no_targets_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no stored targets"):
        StoredTargets(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(InputError, match="format 7 is not understood, only 1"):
        StoredTargets(tmp_path)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_local_experts": 8}, "experts per layer 8 and 4"),
        ({"num_hidden_layers": 3}, r"decoder layers 3 and 2; mixture-of-experts layers at \[0, 1, 2\] and \[0, 1\]"),
        ({"hidden_size": 64, "num_experts_per_tok": 1}, "hidden size 64 and 32; experts per token 1 and 2"),
    ],
)
def test_a_student_of_other_shapes_is_refused(tmp_path, overrides, message):
    targets = store_targets(make_pair()[1], unpadded(), tmp_path / "targets")
    with pytest.raises(InputError, match=message):
        make_trainer(make_pair(**overrides)[0], targets, tmp_path, unpadded())


def test_data_that_are_not_stored_are_refused_before_training(tmp_path):
    student, teacher = make_pair()
    targets = store_targets(teacher, unpadded(6), tmp_path / "targets")
    args = DistillationArguments(output_dir=str(tmp_path), **SETTINGS)
    known, strange = unpadded(6), [{"input_ids": [9] * 12, "labels": [9] * 12}]
    for train, evaluate, message in (
        (known + strange, None, "train_dataset: 1 of its 7 rows, row 6 first, are not among the 6 of teacher targets"),
        (known, strange, "eval_dataset: 1 of its 1 rows"),
        (known, {"one": known, "two": strange}, "eval_dataset: 1 of its 1 rows"),
        (Dataset.from_list(strange), None, "train_dataset: 1 of its 1 rows"),
    ):
        with pytest.raises(InputError, match=message):
            ExpertDistillationTrainer(student, targets, args, train_dataset=train, eval_dataset=evaluate)
    ExpertDistillationTrainer(student, targets, args, train_dataset=Dataset.from_list(known[2:4]))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ({"input_ids": torch.tensor([9] * 12), "labels": torch.tensor([9] * 12)} for _ in range(4))


def test_a_streamed_row_that_is_not_stored_is_refused_when_it_comes(tmp_path):
    student, teacher = make_pair()
    targets = store_targets(teacher, unpadded(), tmp_path / "targets")
    args = DistillationArguments(output_dir=str(tmp_path), **SETTINGS)
    trainer = ExpertDistillationTrainer(student, targets, args, train_dataset=Stream())
    before = snapshot(student)
    with pytest.raises(InputError, match=r"a row of 12 tokens, \[9, 9, 9, 9, 9, 9, 9, 9\] first, is not among the 6"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in snapshot(student).items())


def test_logits_are_not_stored(tmp_path):
    student, teacher = make_pair()
    targets = store_targets(teacher, unpadded(), tmp_path / "targets")
    with pytest.raises(ConfigurationError, match="logit_weight=0.5: must be 0: stored targets hold no logits"):
        make_trainer(student, targets, tmp_path, unpadded(), logit_weight=0.5)
