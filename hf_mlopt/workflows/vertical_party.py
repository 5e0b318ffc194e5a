"""One party on its own machine: aligns, trains, evaluates, predicts. Others are reached over gRPC."""

import json
import logging
import time
from pathlib import Path

import numpy as np

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.secure_sum import Party
from hf_mlopt.vertical.align import Alignment
from hf_mlopt.vertical.arguments import Parties
from hf_mlopt.vertical.checkpoints import load_state, save_block, save_state
from hf_mlopt.vertical.data import VerticalData
from hf_mlopt.vertical.gradients import MODES
from hf_mlopt.vertical.introduction import Facts, session_id
from hf_mlopt.vertical.metrics import score_metrics, training_speed
from hf_mlopt.vertical.party import VerticalParty
from hf_mlopt.vertical.updater import Updater
from hf_mlopt.workflows.vertical_connection import (
    RESULTS,
    TRAIN,
    Connection,
    aligned_rows,
    check,
    checkpoints,
    connected,
    sharing_of,
)
from hf_mlopt.workflows.vertical_data import (
    hold_out,
    load_alignment,
    read_party,
    save_alignment,
    training_labels,
)
from hf_mlopt.workflows.vertical_recipe import PartyRecipe


logger = logging.getLogger(__name__)

ALIGNMENT, TRACE = "alignment.json", "trace.npz"


def align_party(recipe: PartyRecipe) -> Alignment:
    """
    `hf-mlopt vertical align`: finds the common rows and writes them to `alignment.json` of `output_dir`.

    Raises:
        InputError, PeerLost: If that cannot be done.
    """
    check(recipe)
    path = Path(recipe.output_dir) / ALIGNMENT
    if path.exists():
        raise ConfigurationError("output_dir", recipe.output_dir, f"has {ALIGNMENT}; remove it at all parties first")
    data = read_party(recipe)
    with connected(recipe, "align") as connection:
        alignment = aligned_rows(connection, data)
        connection.intro.part(recipe.label_owner)
    save_alignment(alignment, path)
    return alignment


def train_party(recipe: PartyRecipe) -> dict:
    """
    `hf-mlopt vertical party`: trains with all others, and writes the own block, results and audit log.

    Args:
        recipe ([`PartyRecipe`]): Of this party.

    Returns:
        `dict`: What `party_results.json` holds.

    Raises:
        InputError, PeerLost, LeakBudgetExceeded: If that cannot be done.
    """
    check(recipe)
    output = Path(recipe.output_dir)
    path, data = output / ALIGNMENT, read_party(recipe)
    known = load_alignment(path, len(data)) if path.exists() else None
    with connected(recipe, "train with a known alignment" if known else "train") as connection:
        alignment = known or aligned_rows(connection, data)
        if known is None:
            save_alignment(alignment, path)
        results = _Training(connection, data.take(alignment.rows), alignment.manifest.digest).run()
    (output / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


class _Training:
    """What a party does from the first connection to its results."""

    def __init__(self, connection: Connection, data: VerticalData, alignment: str):
        self.connection, self.recipe, self.data = connection, connection.recipe, data
        self.output, self.alignment = Path(self.recipe.output_dir), alignment
        self.trace: list[tuple[float, int, np.ndarray]] = []

    def run(self) -> dict:
        recipe = self.recipe
        train, held_out = hold_out(len(self.data), recipe.eval_share, recipe.seed)
        rows = self.data.take(train)
        key = Party(recipe.party) if recipe.mask == "pairwise" else None
        party, facts = self._meet(key, rows)
        party.on_save(lambda position: self._save(party, position))
        if recipe.resume:
            self._resume(party, facts)
        if len(held_out):
            party.add_rows(1, self.data.features[held_out], len(held_out))
        seconds = self._train(party)
        results = {"party": recipe.party, "run": party.digest.hex(), "seconds": seconds, "alignment": self.alignment}
        if party.updater is not None:
            results |= training_speed(party.updater, seconds)
            results["staleness"] = dict(sorted(party.updater.overlap.items()))
            results["train_loss"] = float(np.mean(party.updater.losses)) if party.updater.losses else None
        results["views_given"] = party.responder.budget.used()
        if recipe.party == recipe.label_owner:
            if len(held_out):
                labels = party.loss.check_labels(training_labels(self.data.label, recipe.loss)[held_out])
                results["evaluation"] = score_metrics(party.loss, party.predict(1), labels)
        self.connection.intro.part(recipe.label_owner)
        save_block(party, self.output, list(self.data.names))
        if self.trace:
            times, steps, weights = zip(*self.trace, strict=True)
            np.savez(self.output / TRACE, times=np.array(times), steps=np.array(steps), weights=np.stack(weights))
        return results

    def _meet(self, key: Party | None, rows: VerticalData) -> tuple[VerticalParty, dict]:
        recipe, arguments, intro = self.recipe, self.recipe.arguments, self.connection.intro
        labels = None if rows.label is None else training_labels(rows.label, recipe.loss)
        columns, public = rows.features.shape[1], key.public_key.hex() if key else ""
        own = Facts(columns, len(rows), self.alignment, public, tuple(checkpoints(self.output)))
        recipients = recipe.label_recipients
        everyone = Parties(len(rows), dict.fromkeys(recipe.parties, 1), recipe.label_owner, _tuple(recipients))
        holders = everyone.label_holders(arguments.labels)
        facts = intro.exchange(own, labels, holders)
        sizes = {name: facts[name].num_features for name in recipe.parties}
        parties = Parties(len(rows), sizes, recipe.label_owner, _tuple(recipients))
        arguments.check(parties)
        if recipe.party in holders and labels is None:
            labels = intro.labels(recipe.label_owner)
        sharing = sharing_of(recipe, key, facts)
        sleep = (lambda: time.sleep(recipe.step_seconds)) if recipe.step_seconds else None
        given = {"session": session_id(facts), "note": self.connection.log.record, "compute": sleep}
        transport = self.connection.conversation(TRAIN)
        run = f"{recipe.run_name}/{self.alignment}"
        return VerticalParty(arguments, parties, transport, sharing, rows.features, labels, run, **given), facts

    def _resume(self, party: VerticalParty, facts: dict[str, Facts]):
        trains_without_labels = self.recipe.backward in MODES
        steps = set(checkpoints(self.output))
        if party.updater is None and not trains_without_labels and not steps:
            return
        if trains_without_labels or self.recipe.mode == "sync":
            together = facts if trains_without_labels else party.holders
            steps = steps.intersection(*(facts[name].checkpoints for name in together))
        if not steps:
            others = {name: list(fact.checkpoints) for name, fact in facts.items()}
            raise InputError(f"resume: no checkpoint to go on from, there are {others}; set resume=false everywhere")
        load_state(party, self.output / f"checkpoint-{max(steps)}")
        logger.info("%s goes on from step %d", self.recipe.party, max(steps))

    def _train(self, party: VerticalParty) -> float:
        self._remember(party)
        start = time.monotonic()
        party.train(lambda updater: self._after_step(party, updater))
        return time.monotonic() - start

    def _after_step(self, party: VerticalParty, updater: Updater):
        recipe, position = self.recipe, updater.position
        if recipe.save_steps and position % recipe.save_steps == 0:
            self._save(party, position)
        if recipe.trace_steps and (position % recipe.trace_steps == 0 or position == updater.num_steps):
            self._remember(party)
        if position % updater.schedule.num_batches == 0 and logger.isEnabledFor(logging.INFO):
            loss, epoch = float(np.mean(updater.losses)), position // updater.schedule.num_batches
            logger.info("%s: epoch %d, step %d, training loss %.4f", recipe.party, epoch, position, loss)

    def _save(self, party: VerticalParty, position: int):
        save_state(party, self.output / f"checkpoint-{position}")

    def _remember(self, party: VerticalParty):
        if self.recipe.trace_steps:
            self.trace.append((time.monotonic(), party.store.version, party.weights))


def _tuple(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)
