"""A Trainer at every site, and a server that makes one model of theirs."""

import gc
import logging
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithm_table import first_message, make_algorithm
from hf_mlopt.federated.algorithms import AutoFedRL, ServerAlgorithm
from hf_mlopt.federated.arguments import FederatedTrainingArguments
from hf_mlopt.federated.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from hf_mlopt.federated.client import FederatedClient
from hf_mlopt.federated.engines import Engine, InProcessEngine, ProcessEngine
from hf_mlopt.federated.privacy.accounting import epsilon, num_releases
from hf_mlopt.federated.privacy.secure_round import run_secure_round
from hf_mlopt.federated.reply_filters import check_switches
from hf_mlopt.federated.roll_call import require_held_out, roll_call
from hf_mlopt.federated.rounds import RoundFailed, evaluate_sites, mean_over_sites, run_round
from hf_mlopt.federated.site_data import SitesData
from hf_mlopt.federated.storage import SiteStore
from hf_mlopt.training import MLOptTrainer


logger = logging.getLogger(__name__)

# What a resumed run must have in common with the one it goes on from.
_OF_A_RUN = (
    *("algorithm", "algorithm_args", "auto_fedrl", "seed", "clip_update", "noise_multiplier"),
    *("update_codec", "update_codec_args", "update_feedback", "secure_sum"),
)


class FederatedTrainer:
    """
    Trains one model at several sites whose data stay where they are.

    Args:
        model_init (`Callable`): Makes the model. Its trainable parameters travel; of a model with adapters only these.
        args (`FederatedTrainingArguments`): What a site does in a round, the algorithm, and the rounds.
        sites (`Mapping`, *optional*): Site to its `train` data set, to a mapping of `train` and `test` (a
            `DatasetDict`), to a [`SiteData`], or to a function that returns one of these when the site needs it. Not
            needed with an `engine`.
        algorithm (`ServerAlgorithm`, *optional*): In place of the one that `args` name.
        engine (`Engine`, *optional*): What reaches the sites; by default they train on this machine, in
            `args.num_workers` processes or in this one.
        eval_dataset (`datasets.Dataset`, *optional*): Rows of the server's own to evaluate on.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Of the server, for `on_train_begin`, `on_log`
            (a round is a step) and `on_train_end`.
        site_callbacks (`Callable[[str], list]`, *optional*): Site to callbacks of its Trainer.
        trainer_class (`type`, *optional*, defaults to `MLOptTrainer`): The sites' Trainer.
        **trainer_kwargs: Its further keywords: `data_collator`, `processing_class`, `compute_metrics`...

    Raises:
        InputError: If arguments, sites and model do not go together.
    """

    def __init__(
        self,
        model_init: Callable[[], torch.nn.Module],
        args: FederatedTrainingArguments,
        sites: Mapping[str, Any] | None = None,
        algorithm: ServerAlgorithm | None = None,
        engine: Engine | None = None,
        eval_dataset: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        site_callbacks: Callable[[str], list[TrainerCallback]] | None = None,
        trainer_class: type[Trainer] = MLOptTrainer,
        **trainer_kwargs: Any,
    ):
        if (sites is None) == (engine is None):
            raise InputError("sites: give the sites' data, or an engine that reaches them")
        if args.n_gpu > 1:
            raise InputError(f"n_gpu={args.n_gpu}: a site trains on one GPU; choose it with CUDA_VISIBLE_DEVICES")
        if args.world_size > 1:
            raise InputError(f"world_size={args.world_size}: the server is one process; start it without a launcher")
        self.args, self.eval_dataset = args, eval_dataset
        data, store = SitesData(sites or {}), SiteStore(Path(args.output_dir) / "sites")
        self.client = FederatedClient(args, model_init, data, store, trainer_class, trainer_kwargs, site_callbacks)
        self.engine = engine or _local_engine(args, data.names, self.client)
        self.algorithm = algorithm or make_algorithm(args, self.client.model)
        self.history: list[dict[str, Any]] = []
        self.training = uuid.uuid4().hex  # its name, by which sites know what they have kept of it
        self.released: list[str] = []  # sites that hand their personal models to users
        reporters = get_reporting_integration_callbacks(args.report_to)
        every = [DefaultFlowCallback(), *(reporter() for reporter in reporters), *callbacks]
        self._callbacks = CallbackHandler(every, self.client.model, None, None, None)
        self._state = TrainerState(max_steps=args.num_rounds)
        self._control = TrainerControl()

    @property
    def model(self) -> torch.nn.Module:
        """The server's model, as it was last trained, evaluated or saved."""
        return self.client.model

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """
        Runs the rounds that are left, with a checkpoint of the server after each.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): Folder of a checkpoint; `True` is the newest in
                `output_dir`.

        Returns:
            `dict`: The last row of the history.

        Raises:
            InputError: If the sites cannot train together; before the first round.
            RoundFailed: If a round has too few sites. What was before is in the last checkpoint.
        """
        try:
            self._begin(resume_from_checkpoint)
            self._callbacks.on_train_begin(self.args, self._state, self._control)
            with spared_modules():
                self._rounds()
                self._evaluate_last()
        finally:
            self.engine.close()
        self.load_server_model()
        self._callbacks.on_train_end(self.args, self._state, self._control)
        return self.history[-1]

    def evaluate(self) -> dict[str, Any]:
        """
        Has all sites, and the server where it has data, evaluate the model as it is.

        Returns:
            `dict`: Metrics as means over the sites' rows, those of the server as `server_...`, and `sites`.
        """
        self.load_server_model()
        try:
            found, _ = evaluate_sites(self.algorithm, self.engine, {"training": self.training})
        finally:
            self.engine.close()
        return {**mean_over_sites(found), **self._at_the_server(), "sites": found}

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the server's model, as a Trainer would."""
        self.load_server_model()
        self.client.save_model(output_dir)

    def _begin(self, resume_from_checkpoint: str | bool | None) -> None:
        found = checkpoints(Path(self.args.output_dir))
        if found and not resume_from_checkpoint:
            raise ConfigurationError(
                "output_dir", self.args.output_dir, f"holds {found[-1].name}; resume from it, or take another folder"
            )
        if resume_from_checkpoint is True and not found:
            raise ConfigurationError("resume_from_checkpoint", True, f"no checkpoint in {self.args.output_dir}")
        roster = roll_call(self.engine, self.client.description())
        self.released = [site for site, answer in roster.items() if answer.scalars.get("release_personal")]
        first = first_message(self.algorithm, self.client.initial(), self.model, len(roster), self.args.seed)
        if resume_from_checkpoint:
            path = found[-1] if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            if path.resolve() in [one.resolve() for one in found[:-1]]:
                remedy = f"{found[-1].name} is newer, and would be resumed from later: move it away first"
                raise ConfigurationError("resume_from_checkpoint", str(resume_from_checkpoint), remedy)
            state, self.history, self.training = load_checkpoint(path, self._run())
            self.algorithm.setup(list(roster), first, self.args.seed)  # compared with the state
            self.algorithm.load_state_dict(state)
        else:
            self.history = []
            self.algorithm.setup(list(roster), first, self.args.seed)
        check_switches(self.args, self.algorithm)
        if isinstance(self.algorithm, AutoFedRL):
            require_held_out(roster)
        num_samples = {site: answer.scalars["num_samples"] for site, answer in roster.items()}
        logger.info(
            "%s over %d sites (%s), %s trainable parameters of %s, %d rounds",
            *(self.args.algorithm, len(roster), ", ".join(f"{site}: {n} rows" for site, n in num_samples.items())),
            f"{sum(p.numel() for p in self.client.shared.weights.values()):,}",
            type(self.model).__name__,
            self.args.num_rounds,
        )

    def _rounds(self) -> None:
        with tqdm(total=self.args.num_rounds, unit="round", disable=self.args.disable_tqdm) as bar:
            bar.update(self.algorithm.round)
            while self.algorithm.round < self.args.num_rounds:
                self._round(bar)

    def _round(self, bar: tqdm) -> None:
        args, round, pending = self.args, self.algorithm.round, set(self.algorithm.configure(self.algorithm.round))
        asked, every = len(pending), args.evaluate_every
        # Under masks no reply says anything but its vector.
        can_fuse = self.algorithm.sends_model and not args.secure_sum
        can_fuse = can_fuse and asked == len(self.algorithm.sites)
        fused = bool(every and can_fuse and round > 0 and round % every == 0)

        def on_reply(site: str) -> None:
            pending.discard(site)
            waited = f", waiting for {', '.join(sorted(pending)[:3])}" if pending else ""
            bar.set_postfix_str(f"{asked - len(pending)}/{asked} sites{waited}")

        try:
            # Auto-FedRL has sites evaluate in every round, whether this is noted or not.
            scalars = {"training": self.training, "lr_factor": self._lr_factor(round)}
            scalars |= {"evaluate": True} if fused else {}
            run = run_secure_round if args.secure_sum else partial(run_round, decode=self.client.filters.decode)
            row, found = run(self.algorithm, self.engine, scalars, on_reply)
        except RoundFailed as error:
            kept = f". What was before round {round} is kept; resume to do it again" if round else ""
            raise RoundFailed(f"{error}{kept}") from error
        if fused and found:
            self._note_evaluation(self.history[-1], found)
        self.history.append(row)
        if args.noise_multiplier:
            row["epsilon"] = epsilon(args.noise_multiplier, num_releases(self.history), args.target_delta)
        for site, reason in row["absent"].items():
            logger.warning("round %d: %s is left out: %s", round, site, reason)
        told = ("train_loss", "update_norm", "bytes_up", "epsilon")
        self._log({"round": round, **{name: row[name] for name in told if name in row}})
        is_due = every and (round + 1) % every == 0 and round + 1 < args.num_rounds
        if is_due:
            self._evaluate_round(row, at_sites=not can_fuse)
        self._save()
        bar.update()

    def _evaluate_last(self) -> None:
        row = self.history[-1]
        if not self.args.evaluate_every or "evaluation" in row or "server" in row:
            return
        self._evaluate_round(row, at_sites=True)
        self._save()

    def _evaluate_round(self, row: dict[str, Any], at_sites: bool) -> None:
        """Puts into the row what sites, asked for this alone, and the server find of its model."""
        if at_sites:
            told = {"training": self.training}
            found, row["bytes_evaluation"] = evaluate_sites(self.algorithm, self.engine, told)
            if found:
                self._note_evaluation(row, found)
        if self.eval_dataset is not None:
            row["server"] = self._at_the_server()
            self._log(row["server"])

    def _save(self) -> None:
        state, limit = self.algorithm.state_dict(), self.args.save_total_limit
        save_checkpoint(Path(self.args.output_dir), state, self.history, self.training, self._run(), limit)

    def _note_evaluation(self, row: dict[str, Any], found: dict[str, dict[str, float]]) -> None:
        row["evaluation"] = {**mean_over_sites(found), "sites": found}
        self._log({"round": row["round"], **mean_over_sites(found)})

    def _at_the_server(self) -> dict[str, float]:
        if self.eval_dataset is None:
            return {}
        self.load_server_model()
        metrics = self.client.evaluate_on(self.eval_dataset)
        return {name.replace("eval_", "server_", 1): value for name, value in metrics.items()}

    def load_server_model(self) -> None:
        """Has `model` be what the server holds; a site that trains in this process leaves its own there."""
        if not self.algorithm.sites:
            raise InputError("the server has no model yet: train it, or resume from a checkpoint")
        message = next(iter(self.algorithm.evaluation().values()))
        self.client.shared.load(message)

    def _log(self, logs: dict[str, Any]) -> None:
        self._state.global_step = self.algorithm.round
        logs = {name: value for name, value in logs.items() if value is not None}
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._callbacks.on_log(self.args, self._state, self._control, logs)

    def _lr_factor(self, round: int) -> float:
        share = round / self.args.num_rounds
        kind = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        return {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[kind]

    def _run(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in _OF_A_RUN}


@contextmanager
def spared_modules() -> Iterator[None]:
    """
    Has garbage collections pass over what is there before: every Trainer begins and ends with full ones, which take
    a quarter of a second each for the objects of transformers' modules alone.
    """
    if gc.get_freeze_count():  # it is done already
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _local_engine(args: FederatedTrainingArguments, names: list[str], client: FederatedClient) -> Engine:
    if not names:
        raise InputError("sites: a training needs a site")
    if args.num_workers == 0:
        return InProcessEngine(names, client.answer)
    return ProcessEngine(names, client.answer, args.num_workers, args.round_timeout, args.site_retries)
