"""Methods that do not go together: every refusal with its declared reason, and the page that says so."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from command_line import hf_mlopt
from compressed import Layers
from distilled import SETTINGS as DISTILLED
from distilled import make_pair, rows
from families import make_family
from test_combinations import RECIPES, peft_warns, work  # noqa: F401
from torch import nn

from hf_mlopt import RSGD, MLOptTrainer, MLOptTrainingArguments
from hf_mlopt.distillation import ExpertDistillationTrainer
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated import FederatedTrainingArguments
from hf_mlopt.optimizers import DOMO
from hf_mlopt.training import combinations


pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parent.parent


def test_optimizers_that_are_passed_are_told_like_those_that_are_named(tmp_path):
    """Else local steps would leave a codec nothing to code, and DOMO would never end a round."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    model = Layers()
    coded = MLOptTrainingArguments(**settings, grad_codec="orq-9")
    for passed in (
        {"optimizers": (DOMO(model.parameters(), 0.1), None)},
        {"optimizer_cls_and_kwargs": (DOMO, {"lr": 0.1})},
    ):
        with pytest.raises(ConfigurationError, match="grad_codec='orq-9': codes gradients, and DOMO sends models"):
            MLOptTrainer(model, coded, **passed)
        names = [
            type(callback).__name__
            for callback in _callbacks(MLOptTrainer(model, MLOptTrainingArguments(**settings), **passed))
        ]
        assert "LocalStepsCallback" in names


def _callbacks(trainer):
    return trainer.callback_handler.callbacks


def test_an_optimizer_with_two_points_is_no_base_of_another():
    with pytest.raises(ConfigurationError, match="base='RSGD': trains and evaluates at points of its own"):
        DOMO([nn.Parameter(torch.zeros(1))], 0.1, base=RSGD)


TRAIN = ("train", "--use-cpu", "--output-dir", "OUT")
IN_STAGES = (*TRAIN, "--pipeline", "dsp", "--stages", 2)
FEDERATE = ("federate", RECIPES / "auto_fedrl_fedsm.yaml", "--output-dir", "OUT", "--auto-fedrl", "null")
AVERAGE = (*FEDERATE, "--algorithm", "fedavg", "--algorithm-args", "null", "--no-release-personal")
BY_POLICY = (*AVERAGE, "--auto-fedrl", "{}")
OF_SITES = {
    "federated": AVERAGE,
    "fedsm": FEDERATE,
    "auto-fedrl": BY_POLICY,
    "update-codec": (*AVERAGE, "--update-codec", "orq-9"),
    "secure-sum": (*AVERAGE, "--secure-sum"),
}
LAYERWISE = ("distill", "STUDENT", "--teacher", "TEACHER", "--output", "OUT", "--mode", "layerwise")
# A pair that is refused to a command that asks for it.
ASKED = {
    ("masks", "saef"): (*TRAIN, "--keep-zeros", "--mlopt-optim", "saef"),
    ("masks", "pipeline"): (*IN_STAGES, "--keep-zeros"),
    ("masks", "update-codec"): (*OF_SITES["update-codec"], "--keep-zeros"),
    ("end-to-end", "saef"): ("distill", "STUDENT", "--teacher", "TEACHER", "--output", "OUT", "--mode", "end-to-end",
                             "--mlopt-optim", "saef", "--dataset", "IDS", "--samples", 8, "--eval-samples", 0,
                             "--sequence-length", 16),
    ("layer-wise", "lora"): (*LAYERWISE, "--lora-rank", 4),
    ("layer-wise", "rsgd"): (*LAYERWISE, "--mlopt-optim", "rsgdm"),
    ("layer-wise", "local-steps"): (*LAYERWISE, "--mlopt-optim", "domo", "--local-steps", 2),
    ("layer-wise", "saef"): (*LAYERWISE, "--mlopt-optim", "saef"),
    ("layer-wise", "codec"): (*LAYERWISE, "--grad-codec", "orq-9"),
    ("layer-wise", "feedback"): (*LAYERWISE, "--error-feedback", "classic"),
    ("local-steps", "codec"): (*TRAIN, "--mlopt-optim", "domo", "--local-steps", 4, "--grad-codec", "orq-9"),
    ("local-steps", "feedback"): (*TRAIN, "--mlopt-optim", "domo", "--local-steps", 4, "--error-feedback", "classic"),
    ("local-steps", "pipeline"): (*IN_STAGES, "--mlopt-optim", "domo"),
    ("local-steps", "fedsm"): (*FEDERATE, "--mlopt-optim", "domo"),
    ("codec", "saef"): (*TRAIN, "--mlopt-optim", "saef", "--grad-codec", "orq-9"),
    ("feedback", "saef"): (*TRAIN, "--mlopt-optim", "saef", "--error-feedback", "classic"),
    ("saef", "pipeline"): (*IN_STAGES, "--mlopt-optim", "saef"),
    ("fedsm", "update-codec"): (*FEDERATE, "--update-codec", "orq-9"),
    ("auto-fedrl", "secure-sum"): (*BY_POLICY, "--secure-sum"),
    ("update-codec", "secure-sum"): (*OF_SITES["update-codec"], "--secure-sum"),
    **{("codec", name): (*words, "--grad-codec", "orq-9") for name, words in OF_SITES.items()},
    **{("feedback", name): (*words, "--error-feedback", "classic") for name, words in OF_SITES.items()},
    **{("saef", name): (*words, "--mlopt-optim", "saef") for name, words in OF_SITES.items()},
}  # fmt: skip
# Those that no command can ask for, whose Trainers are told.
IN_PYTHON = {("lora", "pipeline")} | {
    ("end-to-end", name) for name in ("federated", "auto-fedrl", "update-codec", "secure-sum")
}
REFUSED = [pair for pair in combinations.PAIRS if pair.outcome == "refused"]


def reason(pair):
    return pair.reason.format(optimizer="domo")


@pytest.mark.parametrize(
    "pair", [p for p in REFUSED if (p.one, p.other) in ASKED], ids=lambda p: f"{p.one}, {p.other}"
)
def test_a_command_is_refused_with_the_declared_reason(pair, work, tmp_path):  # noqa: F811
    places = {
        "OUT": tmp_path / "output",
        "STUDENT": work / "student",
        "TEACHER": work / "teacher",
        "IDS": work / "ids.jsonl",
    }
    outcome = hf_mlopt(*(places.get(word, word) for word in ASKED[pair.one, pair.other]))
    assert outcome.status == 2 and not (tmp_path / "output").exists()
    assert f"{pair.field}=" in outcome.err and reason(pair) in " ".join(outcome.err.split()), outcome.err


@peft_warns
def test_trainers_refuse_with_the_declared_reason(tmp_path):
    from peft import LoraConfig, get_peft_model

    from hf_mlopt.pipeline import PipelineTrainer, PipelineTrainingArguments

    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    student, _ = make_pair()
    for name, more in {
        "federated": {},
        "auto-fedrl": {"auto_fedrl": {}},
        "update-codec": {"update_codec": "orq-9"},
        "secure-sum": {"secure_sum": True},
    }.items():
        pair = combinations.pair_of("end-to-end", name)
        with pytest.raises(ConfigurationError) as refused:
            ExpertDistillationTrainer(student, args=FederatedTrainingArguments(**common, **more))
        assert refused.value.field == pair.field and reason(pair) in str(refused.value)
    pair = combinations.pair_of("lora", "pipeline")
    adapted = get_peft_model(make_family("mixtral"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigurationError) as refused:
        PipelineTrainer(adapted, PipelineTrainingArguments(**common, pipeline="lag1", stages=1))
    assert refused.value.field == pair.field and reason(pair) in str(refused.value)


@peft_warns
def test_adapters_that_cannot_be_masked_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = make_family("mixtral")
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight.data[::2] = 0
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args = MLOptTrainingArguments(**{**DISTILLED, "output_dir": str(tmp_path), "keep_zeros": True})
    with pytest.raises(ValueError, match="q_proj is pruned, and an adapter of a linear layer fills its zeros"):
        MLOptTrainer(adapted, args, train_dataset=rows())


# The declarations, and the page.


def test_every_pair_is_declared_once_and_every_refusal_is_tried():
    assert combinations.undeclared() == []
    assert len({frozenset((p.one, p.other)) for p in combinations.PAIRS}) == len(combinations.PAIRS)
    assert {(pair.one, pair.other) for pair in REFUSED} == ASKED.keys() | IN_PYTHON
    assert {pair.outcome for pair in combinations.PAIRS} == {"runs", "refused", "apart"}
    for pair in combinations.PAIRS:
        assert bool(pair.shown_by) == (pair.outcome == "runs") and bool(pair.field) == (pair.outcome == "refused")
        assert bool(pair.reason) == (pair.outcome != "runs")


def test_what_shows_a_pair_is_a_test():
    for shown_by in {pair.shown_by for pair in combinations.PAIRS if pair.shown_by}:
        file, _, name = shown_by.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, shown_by


def test_what_never_meets_has_no_common_place():
    """No configuration takes the options of both."""
    from hf_mlopt.distillation import DistillationArguments
    from hf_mlopt.vertical.arguments import VerticalArguments

    vertical = set(VerticalArguments.__dataclass_fields__)
    assert not vertical & {"keep_zeros", "lora_rank", "mlopt_optim", "grad_codec", "error_feedback", "pipeline"}
    assert not vertical & {"update_codec", "auto_fedrl", "lmbda"} and "mask" in vertical
    assert "pipeline" not in DistillationArguments.__dataclass_fields__
    assert not {"pipeline", "stages"} & set(FederatedTrainingArguments.__dataclass_fields__)


def test_the_page_is_that_of_the_declarations():
    spec = importlib.util.spec_from_file_location("combinations_page", ROOT / "docs" / "combinations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/combinations.py"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_begins_with_what_it_is_for_and_its_own_command(path):
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and first.endswith("without a network.")
    assert (
        f" {path.name} " in second
        and " --output" in second
        and second.startswith(("# hf-mlopt ", "# After `hf-mlopt demo`: "))
    )
