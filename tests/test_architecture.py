"""The shape of the package: who may import whom, and what it offers. A change here is meant to be deliberate."""

import ast
from pathlib import Path

import pytest

import hf_mlopt


PACKAGE = Path(hf_mlopt.__file__).parent
ROOT = PACKAGE.parent

# Each room imports only from earlier layers, and from itself. Part of a room may lie lower than the rest of it.
LAYERS = (
    {"errors", "configuration", "lazy", "ranks", "resources"},
    {"moe", "optimizers", "communication.packing", "secure_sum", "federated.algorithms", "vertical.updates"},
    {"communication.quantizers"},
    {"pruning", "hub", "evaluation", "data", "models", "communication"},
    {"training", "streaming", "planning", "speed"},
    {"distillation", "pipeline", "federated", "vertical"},
    {"workflows"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
BASE = LAYERS[0]  # these are single modules and may use one another

PUBLIC_NAMES = [
    "DOMO",
    "DistillationArguments",
    "ExpertDistillationTrainer",
    "FederatedTrainer",
    "FederatedTrainingArguments",
    "LayerwiseConfig",
    "MLOptTrainer",
    "MLOptTrainingArguments",
    "MoELayer",
    "MoEPruner",
    "PipelineTrainer",
    "PipelineTrainingArguments",
    "PruningConfig",
    "PruningReport",
    "RSGD",
    "RSGDWrapper",
    "SAEFOptimizer",
    "compress",
    "distill_layerwise",
    "evaluate_tasks",
    "moe_layers",
    "observe",
    "perplexity",
]


def room_of(module: str) -> str | None:
    """The room a dotted name below `hf_mlopt` belongs to; `None` for the package itself."""
    parts = module.split(".")[1:]
    for length in (2, 1):
        if ".".join(parts[:length]) in LAYER_OF:
            return ".".join(parts[:length])
    return parts[0] if parts else None


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Absolute names of what a module imports from this package, wherever in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parent = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parent, base]).rstrip(".")
            # `from .. import x`: a room, a module, or a public name, which comes from a room as well.
            for alias in node.names:
                names.update((base, f"{base}.{alias.name}"))
                if base == "hf_mlopt":
                    names.add(hf_mlopt._PUBLIC.get(alias.name, base))
    return {name for name in names if name.split(".")[0] == "hf_mlopt"}


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room, found = room_of(module), []
    if room is None:
        return found
    for name in sorted(imported_modules(ast.parse(source), module, is_package)):
        other = room_of(name)
        if other == room or not {room, other} <= set(LAYER_OF) or {room, other} <= BASE:
            continue  # a name of the package itself, such as its version, is no room
        if LAYER_OF[other] >= LAYER_OF[room]:
            found.append(f"{module} imports {name}")
    return found


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


def test_every_room_has_a_layer():
    assert {room_of(module) for _, module, _ in modules()} - {None} <= set(LAYER_OF)


def test_imports_run_downward_only():
    found = [violations(path.read_text(), module, is_package) for path, module, is_package in modules()]
    assert sum(found, []) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("hf_mlopt.moe.layers", "from ..pruning import scores"),
        ("hf_mlopt.moe.layers", "from hf_mlopt import pruning"),
        ("hf_mlopt.moe.layers", "from .. import MoEPruner"),
        ("hf_mlopt.pruning.sweep", "def f():\n    import hf_mlopt.data.text"),
        ("hf_mlopt.moe", "from ..hub import card"),
        ("hf_mlopt.errors", "from .moe import layers"),
        ("hf_mlopt.communication.packing", "from .hook import x"),
        ("hf_mlopt.training.trainer", "from ..cli import main"),
    ],
)
def test_the_check_sees_an_import_that_runs_upward(module, source):
    assert violations(source, module, is_package=module == "hf_mlopt.moe")


@pytest.mark.parametrize(
    "module, source",
    [
        ("hf_mlopt.pruning.sweep", "from ..moe import layers\nfrom .scores import x\nimport torch"),
        ("hf_mlopt.configuration", "from .errors import InputError"),
        ("hf_mlopt.hub.card", "from .. import __version__\nfrom ..resources import resource_dir"),
        ("hf_mlopt.communication.hook", "from .packing import pack"),
    ],
)
def test_the_check_lets_a_downward_import_pass(module, source):
    assert violations(source, module) == []


def test_no_file_postpones_annotations_and_none_is_named_utils():
    for folder in (PACKAGE, *(ROOT / name for name in ("tests", "recipes", "benchmarks", "hub_scripts"))):
        for path in folder.rglob("*.py"):
            if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
                continue  # environments of the peers that benchmarks run
            assert path.name != "utils.py", path
            for node in ast.walk(ast.parse(path.read_text())):
                is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
                assert not (is_future and "annotations" in [alias.name for alias in node.names]), path


def test_the_public_names():
    assert list(hf_mlopt.__all__) == PUBLIC_NAMES
    assert set(PUBLIC_NAMES) <= set(dir(hf_mlopt))


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_resolves_and_is_documented(name):
    assert getattr(hf_mlopt, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_mlopt.nothing
