"""`hf-mlopt vertical simulate`: all parties as processes of this machine, sync against async."""

import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import scipy.sparse
from scipy.optimize import minimize

from hf_mlopt import __version__
from hf_mlopt.configuration import save_yaml
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.vertical import pki
from hf_mlopt.vertical.arguments import Parties, VerticalArguments
from hf_mlopt.vertical.checkpoints import load_block
from hf_mlopt.vertical.data import VerticalData
from hf_mlopt.vertical.updates.losses import Loss, make_loss
from hf_mlopt.workflows.places import check_output_dir
from hf_mlopt.workflows.vertical_connection import RESULTS
from hf_mlopt.workflows.vertical_data import hold_out, simulated_parties
from hf_mlopt.workflows.vertical_party import TRACE
from hf_mlopt.workflows.vertical_processes import run_processes
from hf_mlopt.workflows.vertical_recipe import EMBEDDED, SimulationRecipe


logger = logging.getLogger(__name__)

PICTURE, SIMULATION = "course.png", "vertical_results.json"


def check(recipe: SimulationRecipe):
    """
    Refuses what shows before data are read.

    Raises:
        InputError: If a file is missing or the output directory is not empty.
    """
    for path in recipe.data:
        if path not in EMBEDDED and not Path(path).is_file():
            known = ", ".join(EMBEDDED)
            raise ConfigurationError("data", path, f"no such file; name files, or one of {known}")
    check_output_dir(recipe.output_dir, resumes=False, can_resume=False)


def simulate(recipe: SimulationRecipe) -> dict:
    """
    Trains in each mode, with one process a party.

    Args:
        recipe ([`SimulationRecipe`]): What to do.

    Returns:
        `dict`: What `vertical_results.json` holds; see [`simulation_rows`].

    Raises:
        InputError: For what is refused before any process starts.
        SimulationFailed: If a party's process fails.
    """
    check(recipe)
    blocks, labels = simulated_parties(recipe)
    train, held_out = hold_out(len(labels), recipe.eval_share, recipe.seed)
    sizes = {name: block.features.shape[1] for name, block in blocks.items()}
    for mode in recipe.modes:
        VerticalArguments(**recipe.arguments(mode)).check(Parties(len(train), sizes, recipe.names[0]))
    problem = Problem(recipe, {name: block.take(train) for name, block in blocks.items()}, labels[train])
    optimum = problem.optimum()
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    facts = {"version": __version__, "parties": sizes, "rows": len(train), "held_out": len(held_out)}
    facts |= {"step_seconds": [recipe.step_seconds * factor for factor in recipe.factors()], "gap": recipe.gap}
    results = {**facts, "transport": "plaintext" if recipe.plaintext else "mTLS", "mask": recipe.mask}
    results |= {"algorithm": recipe.algorithm, "optimum": optimum, "modes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        files = _write_blocks(blocks, Path(scratch))
        if not recipe.plaintext:
            pki.create_authority(Path(scratch) / "pki")
            for name in blocks:
                pki.issue(Path(scratch) / "pki", name)
        for mode in recipe.modes:
            logger.info("%s: %d processes, a step sleeps %g s", mode, len(blocks), recipe.step_seconds)
            run_processes(recipe, mode, files, Path(scratch))
            results["modes"][mode] = _course(problem, optimum, recipe.gap, output / mode)
    save_yaml(recipe, output / "recipe.yaml")
    (output / SIMULATION).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if recipe.plot:
        from hf_mlopt.workflows.vertical_plot import plot_course

        plot_course(results, output / PICTURE)
    return results


class Problem:
    """
    The objective of all columns together, which only a simulation can compute.

    Args:
        recipe ([`SimulationRecipe`]), blocks (`dict[str, VerticalData]`), labels (`np.ndarray`): Training rows.
    """

    def __init__(self, recipe: SimulationRecipe, blocks: dict[str, VerticalData], labels: np.ndarray):
        self.loss: Loss = make_loss(recipe.loss, recipe.num_labels)
        self.l2, self.labels = recipe.l2, self.loss.check_labels(labels)
        parts = []
        for number, block in enumerate(blocks.values()):
            bias = [np.ones((len(labels), 1))] if recipe.bias and number == 0 else []
            is_sparse = scipy.sparse.issparse(block.features)
            stacked = scipy.sparse.hstack if is_sparse else np.hstack
            parts.append(stacked([block.features, *bias]) if bias else block.features)
        is_sparse = any(scipy.sparse.issparse(part) for part in parts)
        self.features = scipy.sparse.csr_array(scipy.sparse.hstack(parts)) if is_sparse else np.hstack(parts)

    def objective(self, weights: np.ndarray) -> float:
        """f of all weights, `[d, K]`."""
        values = self.loss.values(self.features @ weights, self.labels)
        return float(values.mean()) + self.l2 / 2 * float(np.sum(weights**2))

    def optimum(self) -> float:
        """f* by L-BFGS on all columns."""
        shape = (self.features.shape[1], self.loss.words)

        def both(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(shape)
            theta = self.loss.theta(self.features @ weights, self.labels)
            gradient = self.features.T @ theta / len(self.labels) + self.l2 * weights
            return self.objective(weights), gradient.ravel()

        options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-9}
        start = np.zeros(shape[0] * shape[1])
        return float(minimize(both, start, jac=True, method="L-BFGS-B", options=options).fun)


def _write_blocks(blocks: dict[str, VerticalData], folder: Path) -> dict[str, Path]:
    files = {}
    for name, block in blocks.items():
        if scipy.sparse.issparse(block.features):
            from sklearn.datasets import dump_svmlight_file

            label = np.zeros(len(block)) if block.label is None else block.label
            files[name] = folder / f"{name}.svm"
            features = scipy.sparse.csr_matrix(block.features)
            for index in ("indices", "indptr"):
                setattr(features, index, getattr(features, index).astype(np.int32))  # the writer knows no other
            dump_svmlight_file(features, label, str(files[name]), zero_based=False)
            continue
        columns = {f"x{number}": column for number, column in enumerate(block.features.T)}
        extra = {} if block.label is None else {"label": block.label}
        files[name] = folder / f"{name}.parquet"
        pa.parquet.write_table(pa.table({"id": range(len(block)), **extra, **columns}), files[name])
    return files


def _course(problem: Problem, optimum: float, gap: float, folder: Path) -> dict:
    """What the parties wrote, and the objective over time from their weights at equal times."""
    names = sorted(path.name for path in folder.iterdir())
    found = {name: json.loads((folder / name / RESULTS).read_text(encoding="utf-8")) for name in names}
    traces = [dict(np.load(folder / name / TRACE)) for name in names]
    start = max(trace["times"][0] for trace in traces)  # the last to be ready
    times = np.unique(np.concatenate([trace["times"] for trace in traces]))
    times = np.concatenate([[start], times[times > start]])
    places = [np.searchsorted(trace["times"], times, side="right") - 1 for trace in traces]
    course = []
    for moment, *at in zip(times, *places, strict=True):
        weights = np.vstack([trace["weights"][place] for trace, place in zip(traces, at, strict=True)])
        course.append((float(moment - start), problem.objective(weights) - optimum))
    reached = next((seconds for seconds, left in course if left <= gap), None)
    owner = next(result for result in found.values() if "evaluation" in result or result["party"] == names[0])
    return {
        "seconds_to_gap": reached,
        "seconds": course[-1][0],
        # Of the blocks that were written: a trace ends a little before, where a party waits for the last.
        "objective": problem.objective(np.vstack([load_block(folder / name)[0] for name in names])),
        "evaluation": owner.get("evaluation", {}),
        "parties": found,
        "course": course,
    }


def simulation_rows(results: dict) -> list[dict]:
    """
    A row a mode for the final table, then one a party.

    Args:
        results (`dict`): What [`simulate`] returns.

    Returns:
        `list[dict]`: `mode`, `seconds_to_gap` (`None` if it was not reached), `seconds`, `objective`, the metrics of
            the rows that were kept, and for each party `updates_per_second`, `share_waiting` and staleness.
    """
    rows = []
    for mode, found in results["modes"].items():
        row = {"mode": mode, "party": "all", "to gap (s)": found["seconds_to_gap"], "total (s)": found["seconds"]}
        rows.append({**row, "objective": found["objective"], **found["evaluation"]})
        for name, party in found["parties"].items():
            speed = {"updates/s": "updates_per_second", "waiting": "share_waiting", "staleness": "mean_staleness"}
            rows.append({"mode": mode, "party": name, **{title: party.get(field) for title, field in speed.items()}})
    return rows


def speed_up(results: dict) -> float | None:
    """Time to the gap in sync over that in async, if both reached it."""
    times = [results["modes"].get(mode, {}).get("seconds_to_gap") for mode in ("sync", "async")]
    return times[0] / times[1] if all(times) else None
