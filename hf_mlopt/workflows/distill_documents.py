"""What a distilled checkpoint holds beside its weights: record in `config.json`, card, recipe, reports and plot."""

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

from hf_mlopt import __version__
from hf_mlopt.configuration import save_yaml
from hf_mlopt.errors import InputError
from hf_mlopt.hub import Checkpoint, environment
from hf_mlopt.hub.card_distilled import distillation_card
from hf_mlopt.hub.checkpoint import read_config
from hf_mlopt.hub.provenance import shown_name
from hf_mlopt.workflows.prune import calibration_record


_PRUNING_REPORT = "pruning_report.json"
_NOT_TYPED = ("student", "output", "dataset_fingerprint")
# How it was run on this machine does not change the weights.
_OF_THE_MACHINE = ("output", "resume", "stream", "offload_states", "save_states_every", "save_steps")


def documents(report, recipe, student: Checkpoint, teacher: Checkpoint | None, windows) -> tuple[dict, dict]:
    """
    What goes into a distilled checkpoint beside the weights.

    Args:
        report (`DistillationReport`): What was done; is told where everything came from.
        recipe (`DistillRecipe`): What was asked for.
        student (`Checkpoint`), teacher (`Checkpoint`, *optional*): What was trained, and by what; a report whose
            targets were stored names the teacher already.
        windows (`CalibrationSet`): The tokens.

    Returns:
        `tuple[dict, dict]`: The block in `config.json`, and the other files, as
            [`~hub.checkpoint.complete_checkpoint`] takes them.
    """
    from hf_mlopt.distillation.plot import plot_distillation

    report.environment = environment()
    report.student = _source(student)
    if teacher is not None:
        report.teacher = _source(teacher)
    report.dataset = calibration_record(windows)
    record = report.to_dict()
    pruning = pruning_report(student)
    again = replace(
        recipe,
        **{name: type(recipe).__dataclass_fields__[name].default for name in _OF_THE_MACHINE},
        student_revision=recipe.student_revision or student.revision,
        teacher_revision=recipe.teacher_revision or (teacher and teacher.revision),
        dataset_fingerprint=windows.source["fingerprint"],
    )
    name, command = Path(recipe.output).resolve().name, _command(again, report)
    files = {
        "README.md": distillation_card(record, pruning, name, command=command, license=student.license),
        "recipe.yaml": lambda path: save_yaml(again, path),
        "distillation_report.json": json.dumps(record, indent=1) + "\n",
        "distillation.png": lambda path: plot_distillation(record, path, name),
    }
    if pruning is not None:
        files[_PRUNING_REPORT] = (student.directory / _PRUNING_REPORT).read_text(encoding="utf-8")
    # What pruning noted is still true, the number of zeros included.
    provenance = {
        **(read_config(student.directory).get("hf_mlopt") or {}),
        "version": __version__,
        "distillation": {"mode": report.mode, "teacher": report.teacher, "student": report.student},
    }
    return provenance, files


def pruning_report(student: Checkpoint) -> dict | None:
    """
    The report of how the student was pruned, if it was by hf_mlopt.

    Raises:
        InputError: If the file is there and cannot be read.
    """
    path = student.directory / _PRUNING_REPORT
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy it again from where the student was written") from None


def _source(checkpoint: Checkpoint) -> dict:
    """Names a checkpoint without giving away where it lay on this machine."""
    return {"source": shown_name(checkpoint.name), "revision": checkpoint.revision}


def _command(recipe, report) -> str:
    """
    The command line that repeats a recipe; fields at their defaults are left out. It goes into a card, so of files and
    directories it gives only the names.
    """
    local = {name: getattr(recipe, name) for name in ("student", "teacher", "dataset", "teacher_targets")}
    shown = {name: value and shown_name(value) for name, value in local.items()}
    words = [*_launcher(report), "distill", shown["student"], "--output", "DIR"]
    for field in fields(recipe):
        value = shown.get(field.name, getattr(recipe, field.name))
        if field.name in _NOT_TYPED or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        words += [flag] if value is True else ["--no-" + flag[2:]] if value is False else [flag, str(value)]
    return shlex.join(words)


def _launcher(report) -> list[str]:
    """What a run was started by: how many processes there are, and their precision, change what it gives."""
    if report.processes == 1 and report.precision == "no":
        return ["hf-mlopt"]
    words = ["accelerate", "launch", "--num_processes", str(report.processes), "--mixed_precision", report.precision]
    if report.sharded:
        words += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    elif report.processes > 1:
        words += ["--multi_gpu"]
    return [*words, "-m", "hf_mlopt"]
