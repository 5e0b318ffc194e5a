"""What stands at a site: it answers the messages of the server, with a Trainer for the local steps."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_mlopt import __version__
from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.federated.arguments import FederatedTrainingArguments
from hf_mlopt.federated.local_momentum import load_local_momentum, local_momentum
from hf_mlopt.federated.optimizer_state import load_optimizer_groups, optimizer_groups
from hf_mlopt.federated.parameters import SharedParameters
from hf_mlopt.federated.privacy.masking import KEYS
from hf_mlopt.federated.reply_filters import ReplyFilters
from hf_mlopt.federated.selector_model import ImageBatches
from hf_mlopt.federated.site_data import SiteData
from hf_mlopt.federated.site_rules import SiteRule, site_rule
from hf_mlopt.federated.storage import SiteStore
from hf_mlopt.training import MLOptTrainer


HELLO, TRAIN, EVALUATE = "hello", "train", "evaluate"


class FederatedClient:
    """
    Answers for one or many sites, with one model in memory.

    Args:
        args (`FederatedTrainingArguments`): Of the local training.
        model_init (`Callable`): Makes the model; the same at all sites.
        data (`Callable[[str], SiteData]`): Site to its data.
        store (`SiteStore`): Where sites keep what is their own.
        trainer_class (`type`, *optional*, defaults to `MLOptTrainer`): Any Trainer.
        trainer_kwargs (`Mapping`, *optional*): Further keywords of it: `data_collator`, `compute_metrics`...
        callbacks (`Callable[[str], list]`, *optional*): Site to callbacks of its Trainer.
    """

    def __init__(
        self,
        args: FederatedTrainingArguments,
        model_init: Callable[[], torch.nn.Module],
        data: Callable[[str], SiteData],
        store: SiteStore,
        trainer_class: type[Trainer] = MLOptTrainer,
        trainer_kwargs: Mapping[str, Any] | None = None,
        callbacks: Callable[[str], list[TrainerCallback]] | None = None,
    ):
        self.args, self.model_init, self.data, self.store = args, model_init, data, store
        self.trainer_class, self.trainer_kwargs = trainer_class, dict(trainer_kwargs or {})
        self.callbacks = callbacks or (lambda site: [])
        self.filters = ReplyFilters(args, store)

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model, made when it is first needed."""
        set_seed(self.args.seed)
        return self.model_init().to(self.args.device)

    @cached_property
    def shared(self) -> SharedParameters:
        """What of the model travels."""
        return SharedParameters(self.model)

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which another process makes for itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("model", "shared")}

    def answer(self, site: str, message: Message) -> Message:
        """
        What the site says to a message, by its scalar `task`: `hello`, `train`, `evaluate`, or `keys` before a masked
        sum. The same message gets the same answer, however often it comes; but one for a masked sum only once.

        Raises:
            InputError: If the site cannot do what is asked, such as go on from a state that it has lost.
        """
        task = message.scalars.get("task")
        if task == HELLO:
            return self._hello(site)
        if task == KEYS:
            return self.filters.new_key(site, message)
        if task not in (TRAIN, EVALUATE):
            raise InputError(f"task={task!r}: a site is asked to {HELLO}, {TRAIN} or {EVALUATE}")
        data, rule_cls = self.data(site), site_rule(message)
        images = ImageBatches(data.train if data.plain is None else data.plain, self.args.device)
        rule = rule_cls(message, self._state(site, message, rule_cls), self.shared, images)
        if task == EVALUATE:
            rule.load()
            return Message({}, {"round": message.scalars["round"], **self._evaluated(data, rule)})
        reply, kept = self._step(site, data, rule)
        reply, of_filters = self.filters.encode(site, message, reply, rule.state)
        if self._keeps_state(message, rule_cls):
            state = Message({**kept, **of_filters})
            now, before = message.scalars["round"], message.scalars["state_round"]
            self.store.save(site, message.scalars["training"], now, state, before)
        return reply

    def description(self) -> dict[str, str]:
        """What must be the same wherever one model is trained: `layout`, `frozen`, `vocabulary` and `version`."""
        return {
            "layout": json.dumps(self.shared.layout(), sort_keys=True),
            "frozen": self.shared.frozen_digest(),
            "vocabulary": self._vocabulary_digest(),
            "version": __version__,
        }

    def _vocabulary_digest(self) -> str:
        """Two vocabularies of one size have the same layout, and another meaning in every row."""
        tokenizer = self.trainer_kwargs.get("processing_class")
        if not hasattr(tokenizer, "get_vocab"):
            return ""
        return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()

    def initial(self) -> Message:
        """What of the model travels, as it was made."""
        return self.shared.initial()

    def evaluate_on(self, dataset: Any) -> dict[str, float]:
        """Metrics of the model as it stands, on rows that are no site's."""
        trainer = self._trainer(SiteData(dataset, dataset), Message({}))
        return _metrics(trainer, "eval")

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the model as it stands, as a Trainer would; by default into `output_dir` of the arguments."""
        self._trainer(SiteData(None), Message({})).save_model(output_dir)

    def _hello(self, site: str) -> Message:
        data = self.data(site)
        num_evaluated = 0 if data.evaluation is None else len(data.evaluation)
        scalars = {"num_samples": len(data.train), "num_evaluated": num_evaluated}
        scalars |= {"release_personal": True} if self.args.release_personal else {}
        return Message({}, {**scalars, **self.description()})

    def _state(self, site: str, message: Message, rule_cls: type[SiteRule]) -> Message | None:
        round = message.scalars["state_round"]
        if round < 0 or not self._keeps_state(message, rule_cls):
            return None
        state = self.store.load(site, message.scalars["training"], round)
        if state is None:
            what = "what its codec has not sent" if self.filters.keeps_state else "its optimizer's state"
            what = f"its state of {message.scalars['algorithm']}" if rule_cls.keeps_state else what
            raise InputError(
                f"site {site!r} has lost {what} after round {round}: restore its folder, or begin a new training"
            )
        return state

    def _keeps_state(self, message: Message, rule_cls: type[SiteRule]) -> bool:
        return rule_cls.keeps_state or self._keeps_optimizer(message) or self.filters.keeps_state

    def _keeps_optimizer(self, message: Message) -> bool:
        return "keep" in (self.args.optimizer_state, message.scalars.get("local_state"))

    def _step(self, site: str, data: SiteData, rule: SiteRule) -> tuple[Message, dict[str, Group]]:
        message, kept = rule.message, {}
        rule.load()
        scalars = {
            "round": message.scalars["round"],
            "num_samples": len(data.train),
            "start_digest": self.shared.message(rule.exchanged()).digest(),
        }
        if message.scalars.get("evaluate"):
            scalars |= self._evaluated(data, rule)
        rule.load()
        started = time.perf_counter()
        trainer = self._ready(site, data, rule)
        _begin_with(trainer.optimizer, self.shared, message, rule.state)
        train_loss = _train(trainer)
        if self._keeps_optimizer(message):
            kept = optimizer_groups(trainer.optimizer, self.shared.weights)
        momentum = local_momentum(trainer.optimizer, self.shared.weights, message)
        scalars |= {
            "lr_sum": rule.lr_sum,
            "num_steps": rule.num_steps,
            "train_loss": train_loss,
        }
        groups, state = rule.after(lambda other: _train(self._ready(site, data, other)))
        scalars |= {**rule.scalars, "seconds": time.perf_counter() - started}
        kept = {**(state.groups if state else {}), **kept}
        return Message({**groups, **momentum}, scalars), kept

    def _evaluated(self, data: SiteData, rule: SiteRule) -> dict[str, float]:
        if data.evaluation is None:
            return {}
        found = {"num_evaluated": len(data.evaluation)} | _metrics(self._trainer(data, rule.message), "eval")
        personal = rule.personal()
        if personal is not None:
            self.shared.load(rule.message, personal)
            found |= _metrics(self._trainer(data, rule.message), "eval_personal")
        return found

    def _trainer(self, data: SiteData, message: Message) -> Trainer:
        args = self._arguments(message)
        args.dataloader_drop_last = False  # Trainer would leave out rows of an evaluation as well
        trainer = self.trainer_class(
            self.model, args, train_dataset=data.train, eval_dataset=data.evaluation, **self.trainer_kwargs
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)  # one line a site and round is the server's to write
        return trainer

    def _ready(self, site: str, data: SiteData, rule: SiteRule) -> Trainer:
        """A Trainer that is about to train by a rule."""
        trainer = self._trainer(data, rule.message)
        log = _LogFile(self.store.folder / site / "log.jsonl", rule.message.scalars["round"])
        for callback in (rule, log, *self.callbacks(site)):
            trainer.add_callback(callback)
        trainer.args.dataloader_drop_last = self.args.dataloader_drop_last
        trainer.create_optimizer()
        return trainer

    def _arguments(self, message: Message) -> FederatedTrainingArguments:
        """A fresh Trainer with a seed of its own: one that is used again repeats its order of the data."""
        args, scalars = copy.copy(self.args), message.scalars
        steps, epochs = scalars.get("local_steps", args.local_steps), scalars.get("local_epochs", args.local_epochs)
        args.seed = args.data_seed = scalars.get("seed", args.seed)
        args.max_steps, args.num_train_epochs = -1 if steps is None else steps, epochs
        args.learning_rate = scalars.get("learning_rate", args.learning_rate) * scalars.get("lr_factor", 1.0)
        args.lr_scheduler_type, args.local_steps = "constant", 1
        args.save_strategy = args.eval_strategy = "no"
        args.report_to, args.disable_tqdm, args.push_to_hub = [], True, False
        return args


class _LogFile(TrainerCallback):
    """Appends what a site's Trainer logs to a file."""

    def __init__(self, path: Path, round: int):
        self.path, self.round = path, round

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": self.round, "step": state.global_step, **(logs or {})}) + "\n")


def _begin_with(optimizer, shared: SharedParameters, message: Message, state: Message | None) -> None:
    if state is not None:
        load_optimizer_groups(optimizer, shared.weights, state.groups)
    load_local_momentum(optimizer, shared.weights, message)


def _train(trainer: Trainer) -> float:
    set_seed(trainer.args.seed)  # an evaluation before has drawn numbers
    with _released(trainer):
        loss = trainer.train().training_loss
        if isinstance(trainer, MLOptTrainer):
            trainer.to_evaluation_point()
    return loss


def _metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    with _released(trainer):
        found = trainer.evaluate(metric_key_prefix=prefix)
    timing = ("_runtime", "_per_second", "_preparation_time")
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not name.endswith(timing) and name != "epoch"
    }


@contextmanager
def _released(trainer: Trainer) -> Iterator[None]:
    """Takes off at the end what mixed precision has put around the model's forward; the next Trainer does it again."""
    try:
        yield
    finally:
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        vars(trainer.model).pop("_is_accelerate_prepared", None)  # or the next one would train without autocast
