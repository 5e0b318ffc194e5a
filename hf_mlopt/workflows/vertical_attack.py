"""`hf-mlopt vertical attack`: who learns what in the configured mode, and the known attacks on the recipe's data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.vertical.arguments import Parties, VerticalArguments
from hf_mlopt.vertical.attacks import (
    GramView,
    features_from_low_rank,
    gram_recovery,
    labels_from_theta,
    theta_from_block_gradient,
)
from hf_mlopt.vertical.backward import label_leak
from hf_mlopt.vertical.data import VerticalData
from hf_mlopt.vertical.updates.losses import make_loss
from hf_mlopt.workflows.vertical_data import hold_out, simulated_parties
from hf_mlopt.workflows.vertical_recipe import EMBEDDED, SimulationRecipe


_GRAM_ROWS, _LOW_RANK_ROWS = 60, 2000  # attacked; more rows need more views and tell no more


def who_learns_what(recipe: SimulationRecipe) -> list[str]:
    """
    The lines of the table of `docs/vertical.md` that hold for a recipe.

    Args:
        recipe ([`SimulationRecipe`]): With the mode.

    Returns:
        `list[str]`: A sentence each.
    """
    names, count = recipe.names, recipe.parties
    holders = names if recipe.labels == "shared" else names[:1]
    who = f"{holders[0]} trains, and learns" if len(holders) == 1 else f"{', '.join(holders)} train, and learn"
    lines = [f"{who} the sum of all scores of the rows asked for, at each version."]
    if count == 1:
        return ["One party alone: there is no one to learn anything."]
    if recipe.mask == "none":
        lines.append("mask=none: whoever asks learns the score of each other party, row by row.")
    elif recipe.mask == "pairwise":
        lines.append(
            f"mask=pairwise: no one learns another's score alone; {count - 1} parties that collude isolate the last "
            f"one's, {count - 2} or fewer do not."
        )
    else:
        lines.append("mask=tree: no one learns another's score alone; two that collude, one in each tree, do.")
    if recipe.labels == "shared":
        lines.append(f"labels=shared: {', '.join(holders)} know every label.")
    else:
        lines.append(f"labels=owner, backward={recipe.backward}: {_BACKWARD[recipe.backward]}")
    lines.append("All learn which batches are used and when, how many rows there are, and how many columns each has.")
    lines.append("A prediction tells the label owner the sum of the scores, and others nothing.")
    return lines


_BACKWARD = {
    "none": "others learn nothing of the labels, and their blocks stay zero.",
    "plain": "others learn every label, by the sign of the derivative.",
    "dp": "others learn noisy derivatives, and labels within (epsilon, delta).",
    "he": "others learn their own plain gradients, from which labels follow over many steps.",
}


def attack(recipe: SimulationRecipe) -> list[str]:
    """
    Runs the attacks of [`hf_mlopt.vertical.attacks`] on the recipe's data, with as many views as the recipe gives and
    with as many as they need.

    Args:
        recipe ([`SimulationRecipe`]): Data, parties, batches and budget.

    Returns:
        `list[str]`: What came out; relative errors of 1 or more are no better than knowing nothing.

    Raises:
        InputError: If the data cannot be read.
    """
    for path in recipe.data:
        if path not in EMBEDDED and not Path(path).is_file():
            raise ConfigurationError("data", path, f"no such file; name files, or one of {', '.join(EMBEDDED)}")
    if recipe.parties == 1:
        return []
    blocks, labels = simulated_parties(recipe)
    train, _ = hold_out(len(labels), recipe.eval_share, recipe.seed)
    blocks, labels = {name: block.take(train) for name, block in blocks.items()}, labels[train]
    arguments = VerticalArguments(**recipe.arguments("async"))
    sizes = {name: block.features.shape[1] for name, block in blocks.items()}
    parties = Parties(len(train), sizes, recipe.names[0])
    lines = []
    for name in parties.label_holders(recipe.labels):
        hidden = _dense([block for other, block in blocks.items() if other != name])
        planned, limit = arguments.planned_views(len(train)), arguments.budget(parties, name)
        views = planned if limit is None else min(planned, limit)
        safe = VerticalArguments(**recipe.arguments("async") | {"query_budget": "auto"}).budget(parties, name)
        lines.append(f"{name} sees a row at {views} versions of the weights; up to {safe} stop these attacks:")
        lines += [f"  {line}" for line in _gram(hidden, views) + _low_rank(hidden, views)]
    lines += _label_lines(recipe, blocks, labels, arguments.planned_views(len(train)))
    return lines


def _dense(blocks: Sequence[VerticalData]) -> np.ndarray:
    parts = [block.features for block in blocks]
    return np.hstack([part.toarray() if scipy.sparse.issparse(part) else part for part in parts])


def _gram(hidden: np.ndarray, views: int) -> list[str]:
    """Inner products of rows, where the hidden parties make equal steps between all that is seen: the worst case."""
    rng, rate = np.random.default_rng(0), 0.5
    rows = hidden[: min(_GRAM_ROWS, len(hidden))]
    weights = np.zeros(rows.shape[1])
    partial, batches, thetas = [rows @ weights], [], []
    for _ in range(max(views, len(rows) + 20)):
        batch = rng.choice(len(rows), size=max(2, len(rows) // 6), replace=False)
        theta = rng.normal(size=len(batch))
        weights = weights - rate / len(batch) * rows[batch].T @ theta
        partial.append(rows @ weights)
        batches.append(batch)
        thetas.append(theta)

    def error(steps: int) -> float:
        view = GramView(np.array(partial[: steps + 1]), batches[:steps], thetas[:steps], rate)
        return _relative(gram_recovery(view), rows @ rows.T)

    few, many = max(1, views - 1), len(partial) - 1
    text = f"inner products of {len(rows)} rows of the others: relative error {error(few):.2g} with {few + 1} views"
    return [f"{text}, {error(many):.2g} with {many + 1}"]


def _low_rank(hidden: np.ndarray, views: int) -> list[str]:
    """Columns of the others, where some rows of theirs are known."""
    rng = np.random.default_rng(0)
    rows = hidden[: min(_LOW_RANK_ROWS, len(hidden))]
    rank = int(np.linalg.matrix_rank(rows))
    known = np.arange(min(len(rows), 2 * rank))
    need = rank + 5
    partial = rng.normal(size=(max(views, need), rows.shape[1])) @ rows.T

    def error(versions: int) -> float:
        return _relative(features_from_low_rank(partial[:versions], rank, known, rows[known]), rows)

    text = f"their {rows.shape[1]} columns, given {len(known)} rows: relative error {error(views):.2g}"
    return [f"{text} with {views} views, {error(need):.2g} with {need}"]


def _label_lines(recipe: SimulationRecipe, blocks: dict[str, VerticalData], labels: np.ndarray, visits: int):
    if recipe.labels == "shared" or recipe.backward in (None, "none"):
        return []
    loss, lines = make_loss(recipe.loss, recipe.num_labels), []
    rows = np.arange(min(recipe.batch_size, len(labels)))
    theta = loss.theta(np.zeros((len(rows), loss.words)), labels[rows])
    if recipe.backward == "plain" and recipe.loss != "ridge":
        guess = labels_from_theta(theta[:, 0] if loss.words == 1 else theta)
        lines.append(f"labels from plain derivatives: {np.mean(guess == labels[rows]):.0%} of a batch are right")
    if recipe.backward == "he" and recipe.loss == "logistic":
        for name, block in list(blocks.items())[1:]:
            features = _dense([block])[rows]
            found = theta_from_block_gradient(features.T @ theta / len(rows), features)
            once, all_visits = (label_leak(len(rows), features.shape[1], number) for number in (1, visits))
            text = (
                f"{name}: derivatives of a batch from its own gradient: relative error {_relative(found, theta):.2g}"
            )
            lines.append(f"{text}; labels by theory: AUC {once:.2f} from one epoch, at most {all_visits:.2f} from all")
    return lines


def _relative(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))
