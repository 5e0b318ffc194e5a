"""All parties of a vertical federation in one process, trained with the hooks of a Trainer."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_mlopt.errors import InputError
from hf_mlopt.secure_sum import FixedPoint, Party, Roster
from hf_mlopt.vertical.aggregate import PairwiseSharing, PlainSharing, Sharing
from hf_mlopt.vertical.arguments import Parties, VerticalArguments
from hf_mlopt.vertical.checkpoints import load_state, save_block, save_state
from hf_mlopt.vertical.climb import TreeSharing
from hf_mlopt.vertical.gradients import MODES
from hf_mlopt.vertical.metrics import predictions, score_metrics, training_speed
from hf_mlopt.vertical.party import VerticalParty
from hf_mlopt.vertical.transport.base import PeerLost
from hf_mlopt.vertical.transport.in_process import InProcessHub
from hf_mlopt.vertical.updater import Updater


class VerticalTrainer:
    """
    A simulation of parties as threads. They hold each other's data in one process, but send each other what parties on
    different machines would send, and nothing else.

    Args:
        args ([`VerticalArguments`]): For all parties.
        train_features (`dict[str, array]`): Columns of each party, `[n, d_l]`, dense or sparse, in roster order.
        train_labels (array): `[n]`, for the label holders.
        label_owner (`str`): Whose labels they are.
        label_recipients (`tuple[str, ...]`, *optional*): See [`Parties`].
        feature_names (`dict[str, list[str]]`, *optional*): Names of the columns, for the saved blocks.
        output_dir (`str` or `Path`, *optional*): For checkpoints and `state.json`.
        save_steps (`int`, *optional*): Steps of a party between two of its checkpoints; needs `output_dir`.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Hear of the beginning and end of training and of the label
            owner's steps and epochs, with `args`, a `TrainerState` and a `TrainerControl`, of which
            `should_training_stop` is heeded: each party ends with the step that it is at, or in sync mode the next.
        compute_metrics (`Callable`, *optional*): `(z, labels) -> dict` in place of the usual metrics.
        compute (`dict[str, Callable[[], None]]`, *optional*): Called by a party in each step; to simulate slow ones.
    """

    def __init__(
        self,
        args: VerticalArguments,
        train_features: dict,
        train_labels,
        label_owner: str,
        label_recipients: tuple[str, ...] | None = None,
        feature_names: dict[str, list[str]] | None = None,
        output_dir: str | Path | None = None,
        save_steps: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        compute_metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None,
        compute: dict[str, Callable[[], None]] | None = None,
    ):
        if save_steps is not None and (output_dir is None or save_steps < 1):
            raise InputError(f"save_steps={save_steps}: must be at least 1, and needs output_dir")
        self.args, self.feature_names = args, feature_names or {}
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.save_steps, self.callbacks, self.compute_metrics = save_steps, list(callbacks), compute_metrics
        columns = {name: features.shape[1] for name, features in train_features.items()}
        facts = Parties(len(train_labels), columns, label_owner, label_recipients)
        args.check(facts)
        self._hub = InProcessHub(facts.names)
        sharings, holders = _sharings(args, facts), facts.label_holders(args.labels)
        self.parties: dict[str, VerticalParty] = {}
        for name, features in train_features.items():
            labels = train_labels if name in holders else None
            pause, transport = (compute or {}).get(name), self._hub.transports[name]
            self.parties[name] = VerticalParty(args, facts, transport, sharings[name], features, labels, compute=pause)
            if save_steps is not None:
                self.parties[name].on_save(lambda position, name=name: self._save(name, position))
        self.owner = self.parties[label_owner]
        self.state, self.control = TrainerState(max_steps=self.owner.updater.num_steps), TrainerControl()
        self.metrics: dict[str, dict[str, float]] = {}

    def train(self, resume: bool = False) -> dict[str, dict[str, float]]:
        """
        Trains all parties to their last step.

        Args:
            resume (`bool`, *optional*, defaults to `False`): From the newest checkpoints in `output_dir`; in sync
                mode, or where parties train without labels, the newest that all have.

        Returns:
            `dict`: For each party that updates, `updates`, `updates_per_second`, `share_waiting` (of its time),
                `mean_staleness` and `max_staleness` (updates by others), `dropped_sums`.

        Raises:
            PeerLost: If a party failed, or what made it fail.
        """
        if resume:
            self._resume()
        self._call("on_train_begin")
        start, ends = time.monotonic(), {}

        def run(party: VerticalParty):
            try:
                party.train(lambda updater: self._after_step(party, updater))
            finally:
                ends[party.name] = time.monotonic() - start

        with ThreadPoolExecutor(len(self.parties)) as pool:
            errors = [run.exception() for run in [pool.submit(run, party) for party in self.parties.values()]]
        causes = [error for error in errors if error is not None]
        if causes:  # the failure itself, not that others then missed the party
            raise next((error for error in causes if not isinstance(error, PeerLost)), causes[0])
        updaters = {name: party.updater for name, party in self.parties.items() if party.updater is not None}
        self.metrics = {name: training_speed(updater, ends[name]) for name, updater in updaters.items()}
        self._call("on_train_end")
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(self.output_dir / "state.json"))
        return self.metrics

    def _after_step(self, party: VerticalParty, updater: Updater):
        if self.save_steps and updater.position % self.save_steps == 0:
            self._save(party.name, updater.position)
        if party is not self.owner:
            return
        num_batches = updater.schedule.num_batches
        self.state.global_step, self.state.epoch = updater.position, updater.position / num_batches
        self._call("on_step_end")
        if updater.position % num_batches == 0:
            self._call("on_epoch_end")

    def _call(self, event: str):
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control)
        if self.control.should_training_stop:
            # In sync mode others may wait for one more share of the owner already, for two they cannot.
            last = self.owner.updater.position + 1 if self.args.mode == "sync" else 0
            for party in self.parties.values():
                if party.updater is not None:
                    party.updater.num_steps = min(party.updater.num_steps, last)

    def _save(self, name: str, position: int):
        save_state(self.parties[name], self._checkpoint(name, position))

    def _checkpoint(self, name: str, position: int) -> Path:
        return self.output_dir / name / f"checkpoint-{position}"

    def _resume(self):
        is_common = self.args.mode == "sync" or self.args.backward in MODES
        updating = list(self.parties) if self.args.backward in MODES else self.owner.holders
        found = {}
        for name in updating:
            folders = self.output_dir.glob(f"{name}/checkpoint-*") if self.output_dir else ()
            found[name] = {int(folder.name.rpartition("-")[2]) for folder in folders}
        common = set.intersection(*found.values())
        if not common:
            text = f"resume: no checkpoint in {str(self.output_dir)!r} that all of {list(updating)} have"
            raise InputError(f"{text}; train from the start")
        for name in updating:
            position = max(common) if is_common else max(found[name])
            load_state(self.parties[name], self._checkpoint(name, position))

    def predict(self, features: dict) -> np.ndarray:
        """
        Args:
            features (`dict[str, array]`): Columns of each party of other rows.

        Returns:
            `np.ndarray`: See [`predictions`]. The label owner gets them; other parties learn nothing.
        """
        return predictions(self.owner.loss, self._scores(features))

    def evaluate(self, features: dict, labels) -> dict[str, float]:
        """
        Args:
            features (`dict[str, array]`): Columns of each party.
            labels (array): The label owner's, `[rows]`.

        Returns:
            `dict[str, float]`: See [`score_metrics`], or what `compute_metrics` returns.
        """
        labels = self.owner.loss.check_labels(labels)
        z = self._scores(features)
        if len(labels) != len(z):
            raise InputError(f"labels: {len(labels)} rows, the features have {len(z)}; align them first")
        if self.compute_metrics is not None:
            return self.compute_metrics(z, labels)
        return score_metrics(self.owner.loss, z, labels)

    def _scores(self, features: dict) -> np.ndarray:
        if set(features) != set(self.parties):
            raise InputError(f"features: of {sorted(features)}, needed of {sorted(self.parties)}")
        num_rows = features[self.owner.name].shape[0]
        for name, party in self.parties.items():
            party.add_rows(1, features[name], num_rows)
            party.start()
        return self.owner.predict(1)

    def save_model(self, output_dir: str | Path | None = None):
        """
        Writes each party's own block to a folder of its name; see [`save_block`].

        Args:
            output_dir (`str` or `Path`, *optional*): By default that of the trainer.
        """
        folder = self.output_dir if output_dir is None else Path(output_dir)
        if folder is None:
            raise InputError("output_dir: give one here or to the trainer")
        for name, party in self.parties.items():
            save_block(party, folder / name, self.feature_names.get(name))

    def close(self):
        """Ends the threads that answer."""
        for transport in self._hub.transports.values():
            transport.close()


def _sharings(args: VerticalArguments, facts: Parties) -> dict[str, Sharing]:
    if args.mask == "none":
        return dict.fromkeys(facts.names, PlainSharing(facts.names))
    if args.mask == "tree":
        code = FixedPoint(len(facts.names), args.fixed_point_bits)
        return {name: TreeSharing(name, facts.names, code, args.timeout) for name in facts.names}
    keys = {name: Party(name) for name in facts.names}
    members = {name: key.public_key for name, key in keys.items()}
    roster = Roster("run", members, fraction_bits=args.fixed_point_bits)
    for key in keys.values():
        key.join(roster)
    return {name: PairwiseSharing(key) for name, key in keys.items()}
