"""How parties train together, and what they refuse to do before anything is sent."""

from dataclasses import dataclass
from typing import Literal

from transformers.utils import logging

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.vertical.budget import automatic_budget
from hf_mlopt.vertical.updates.schedule import BatchSchedule


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Parties:
    """
    The public facts of a roster.

    Args:
        num_rows (`int`): Aligned rows.
        num_features (`dict[str, int]`): Columns of each party, in roster order, without a bias.
        label_owner (`str`): The party whose labels they are; its block gets the bias.
        label_recipients (`tuple[str, ...]`, *optional*): Who else gets the labels when they are shared; by default
            everyone.
    """

    num_rows: int
    num_features: dict[str, int]
    label_owner: str
    label_recipients: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.num_rows < 1:
            raise ConfigurationError("num_rows", self.num_rows, "must be at least 1")
        for name, count in self.num_features.items():
            if count < 1:
                raise ConfigurationError(f"num_features[{name}]", count, "a party needs at least one column")
        for field in ("label_owner", "label_recipients"):
            named = getattr(self, field)
            for name in (named,) if isinstance(named, str) else named or ():
                if name not in self.num_features:
                    raise ConfigurationError(field, name, f"must be among the parties {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        """All parties, in roster order."""
        return tuple(self.num_features)

    def label_holders(self, labels: str) -> tuple[str, ...]:
        """Who has labels, in roster order, with `labels="shared"` or `"owner"`: the parties that update."""
        if labels == "owner":
            return (self.label_owner,)
        recipients = self.names if self.label_recipients is None else self.label_recipients
        return tuple(name for name in self.names if name == self.label_owner or name in recipients)


@dataclass
class VerticalArguments:
    """
    Arguments of vertical training, the same at every party.

    Args:
        algorithm (`str`, *optional*, defaults to `"saga"`): `sgd`, `svrg` or `saga`.
        loss (`str`, *optional*, defaults to `"logistic"`): `logistic`, `ridge` or `multinomial`.
        num_labels (`int`, *optional*, defaults to 2): Classes of the multinomial loss.
        mode (`str`, *optional*, defaults to `"async"`): `async`, where no one waits for slower parties, or `sync`,
            with a barrier after each batch.
        batch_size (`int`, *optional*, defaults to 256): Rows of a batch.
        num_epochs (`int`, *optional*, defaults to 1): Passes each party makes over the rows.
        max_steps (`int`, *optional*): Updates of each party, in place of `num_epochs`.
        learning_rate (`float`, *optional*, defaults to 0.5): Constant step size.
        l2 (`float`, *optional*, defaults to 1e-4): Of the penalty `l2 / 2 * |w|^2`, bias included.
        bias (`bool`, *optional*, defaults to `True`): A column of ones at the label owner.
        inflight (`int`, *optional*, defaults to 1): Batches a party asks for at a time, async only.
        push_ahead (`int`, *optional*, defaults to 0): Batches for which others send their shares unasked, ahead of
            need; hides slow answers, async only.
        share_aggregates (`bool`, *optional*, defaults to `False`): In sync mode one label holder collects each sum and
            passes it on to the others, which saves traffic by the number of label holders.
        mask (`str`, *optional*, defaults to `"pairwise"`): `pairwise`, `tree`, or `none`: everyone sees each share.
        fixed_point_bits (`int`, *optional*, defaults to 24): Binary digits after the point of masked shares.
        accept_two_party_disclosure (`bool`, *optional*, defaults to `False`): Of two parties each learns the other's
            share, whatever the mask.
        allow_unsafe (`bool`, *optional*, defaults to `False`): Permits modes that disclose shares or labels.
        labels (`str`, *optional*, defaults to `"shared"`): `shared` with the label recipients, who train; `owner`
            keeps them with their owner.
        backward (`str`, *optional*): With owner labels, how others get gradients: `none` (only the owner's block
            trains), `he`, `dp`, or `plain`, which discloses all labels.
        dp_epsilon (`float`, *optional*): With `backward=dp`, bound of what all derivatives together tell of a label.
        dp_delta (`float`, *optional*, defaults to 1e-6): Probability left out of that bound; below one over the rows.
        dp_clip (`float`, *optional*): Bound of a row's derivative, which ridge needs with `backward=dp`.
        on_dropout (`str`, *optional*, defaults to `"abort"`): When a party is lost: `abort`; `wait` for it; `exclude`
            it, which discloses its share of the last sum.
        query_budget (`str` or `int`, *optional*, defaults to `"auto"`): Versions of the weights at which a party may
            see a row. `auto` stops known attacks; more, or null for no limit, needs `accept_gram_disclosure`.
        accept_gram_disclosure (`bool`, *optional*, defaults to `False`): Others can recover inner products of rows,
            and with some known rows the rows.
        max_staleness (`int`, *optional*): Updates by others since a sum was read, above which it is dropped and asked
            for again, async only.
        delay_compensation (`bool`, *optional*, defaults to `True`): Parties that update more rarely take longer steps.
        finish (`str`, *optional*, defaults to `"all"`): Training ends when `all` parties have made their steps, or
            with the `first` that has, async only.
        timeout (`float`, *optional*, defaults to 60.0): Seconds after which a silent party is lost.
        seed (`int`, *optional*, defaults to 42): Of the batches; public.
    """

    algorithm: Literal["sgd", "svrg", "saga"] = "saga"
    loss: Literal["logistic", "ridge", "multinomial"] = "logistic"
    num_labels: int = 2
    mode: Literal["async", "sync"] = "async"
    batch_size: int = 256
    num_epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = 0.5
    l2: float = 1e-4
    bias: bool = True
    inflight: int = 1
    push_ahead: int = 0
    share_aggregates: bool = False
    mask: Literal["pairwise", "tree", "none"] = "pairwise"
    fixed_point_bits: int = 24
    accept_two_party_disclosure: bool = False
    allow_unsafe: bool = False
    labels: Literal["shared", "owner"] = "shared"
    backward: Literal["none", "he", "dp", "plain"] | None = None
    dp_epsilon: float | None = None
    dp_delta: float = 1e-6
    dp_clip: float | None = None
    on_dropout: Literal["abort", "wait", "exclude"] = "abort"
    query_budget: Literal["auto"] | int | None = "auto"
    accept_gram_disclosure: bool = False
    max_staleness: int | None = None
    delay_compensation: bool = True
    finish: Literal["all", "first"] = "all"
    timeout: float = 60.0
    seed: int = 42

    def __post_init__(self):
        choices = {
            "algorithm": ("sgd", "svrg", "saga"),
            "loss": ("logistic", "ridge", "multinomial"),
            "mode": ("async", "sync"),
            "mask": ("pairwise", "tree", "none"),
            "labels": ("shared", "owner"),
            "backward": (None, "none", "he", "dp", "plain"),
            "on_dropout": ("abort", "wait", "exclude"),
            "finish": ("all", "first"),
        }
        for field, allowed in choices.items():
            self._require(field, getattr(self, field) in allowed, f"must be one of {', '.join(map(str, allowed))}")
        for field in ("batch_size", "num_epochs", "inflight"):
            self._require(field, getattr(self, field) >= 1, "must be at least 1")
        self._require("push_ahead", self.push_ahead >= 0, "must be at least 0")
        self._require("max_steps", self.max_steps is None or self.max_steps >= 1, "must be at least 1")
        self._require("num_labels", self.num_labels >= 2, "must be at least 2")
        self._require("learning_rate", 0 < self.learning_rate < float("inf"), "must be above 0")
        self._require("l2", 0 <= self.l2 < float("inf"), "must be at least 0")
        self._require("learning_rate", self.learning_rate * self.l2 < 1, f"times l2={self.l2:g} must be below 1")
        self._require("fixed_point_bits", 1 <= self.fixed_point_bits <= 52, "must be 1 to 52")
        self._require("timeout", 0 < self.timeout < float("inf"), "must be above 0 seconds")
        self._require("max_staleness", self.max_staleness is None or self.max_staleness >= 0, "must be at least 0")
        budget = self.query_budget
        is_number = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        self._require("query_budget", budget in ("auto", None) or is_number, "must be auto, at least 1, or null")
        self._check_mode()
        self._check_labels()

    def _require(self, field: str, is_good: bool, allowed: str):
        if not is_good:
            raise ConfigurationError(field, getattr(self, field), allowed)

    def _check_mode(self):
        """Options that the other mode would ignore."""
        if self.mode == "sync":
            reason = "has no effect with mode=sync, where every step waits for all shares; use mode=async"
            self._require("inflight", self.inflight == 1, reason)
            self._require("push_ahead", self.push_ahead == 0, reason)
            self._require("finish", self.finish == "all", reason)
            self._require("max_staleness", self.max_staleness is None, reason)
            self._require("on_dropout", self.on_dropout == "abort", "needs mode=async; a barrier cannot go on")
        else:
            self._require("share_aggregates", not self.share_aggregates, "needs mode=sync, where batches are common")
            both = self.push_ahead == 0 or self.inflight == 1
            self._require("inflight", both, "has no effect with push_ahead, which sets how far shares run ahead")
        safe = "discloses the share of the lost party to whoever has both sums; use wait, or allow_unsafe=true"
        self._require("on_dropout", self.on_dropout != "exclude" or self.allow_unsafe, safe)

    def _check_labels(self):
        if self.labels == "shared":
            self._require("backward", self.backward is None, "has no effect with labels=shared; leave it out")
            return
        ways = "labels=owner needs it: none (only the owner's block trains), he, dp, or plain"
        self._require("backward", self.backward is not None, ways)
        plain = "discloses every label through the sign of theta; use he or dp, or set allow_unsafe=true"
        self._require("backward", self.backward != "plain" or self.allow_unsafe, plain)
        is_sent = self.backward in ("he", "dp", "plain")
        text = "sends others no derivatives at an anchor; use saga or sgd"
        self._require("algorithm", self.algorithm != "svrg" or not is_sent, f"with backward={self.backward} {text}")
        has_bound = self.dp_epsilon is not None and 0 < self.dp_epsilon < float("inf")
        self._require("dp_epsilon", self.backward != "dp" or has_bound, "backward=dp needs a number above 0")
        self._require("dp_delta", 0 < self.dp_delta < 1, "must lie between 0 and 1, below one over the rows")
        has_clip = self.dp_clip is not None and self.dp_clip > 0
        self._require("dp_clip", self.backward != "dp" or self.loss != "ridge" or has_clip, "ridge needs it above 0")

    def num_steps(self, num_rows: int) -> int:
        """Updates that each label holder makes."""
        return self.max_steps or self.num_epochs * -(-num_rows // self.batch_size)

    def budget(self, parties: Parties, requester: str) -> int | None:
        """Views of a row that `requester` may have; `None` is no limit."""
        return self._automatic_budget(parties, requester) if self.query_budget == "auto" else self.query_budget

    def _automatic_budget(self, parties: Parties, requester: str) -> int:
        hidden = sum(count for name, count in parties.num_features.items() if name != requester)
        hidden += self.bias and requester != parties.label_owner
        return automatic_budget(parties.num_rows, hidden)

    def schedule(self, num_rows: int) -> BatchSchedule:
        """The batches of all parties."""
        order = "drawn" if self.algorithm == "saga" else "reshuffled"
        return BatchSchedule(num_rows, self.batch_size, self.seed, order)

    def planned_views(self, num_rows: int) -> int:
        """Most views of any row that a party will have had at the end if no sum is asked for twice."""
        schedule, steps = self.schedule(num_rows), self.num_steps(num_rows)
        anchors = (steps - 1) // schedule.num_batches if self.algorithm == "svrg" else 0  # w = 0 is known to all
        return schedule.most_visits(steps) + anchors

    def check(self, parties: Parties):
        """
        Refuses what the roster makes unsafe or impossible, before any network use.

        Args:
            parties ([`Parties`]): The roster.

        Raises:
            ConfigurationError: Naming field, value and remedy.
        """
        self.check_masks(len(parties.names))
        self._check_gradients(parties)
        self._check_budget(parties)

    def check_masks(self, num_parties: int):
        """The part of [`check`] that needs no more than the number of parties."""
        if num_parties < 3:
            one = "hides nothing from one other party, who subtracts its own share; set mask=none"
            also = " and accept_two_party_disclosure=true" if num_parties == 2 else ""
            self._require("mask", self.mask == "none", one + also)
        if num_parties == 2:
            field, text = "accept_two_party_disclosure", "of two parties each learns the other's scores; accept it"
            self._require(field, self.accept_two_party_disclosure, text + " with true, or find a third party")
        if num_parties > 2:
            text = "shows every share to whoever asks; use pairwise, or set allow_unsafe=true"
            self._require("mask", self.mask != "none" or self.allow_unsafe, text)
            both = self.mask == "none" or self.on_dropout != "exclude"
            self._require("on_dropout", both, "masks do not cancel without a party; make a roster of the rest")

    def _check_gradients(self, parties: Parties):
        if self.backward in (None, "none"):
            return
        if self.backward == "dp":
            is_small = self.dp_delta < 1 / parties.num_rows
            self._require("dp_delta", is_small, f"must be below one over the rows, 1 / {parties.num_rows}")
        for name, count in parties.num_features.items():
            if name == parties.label_owner:
                continue
            floor = 4 * count if self.backward == "he" else count
            text = f"must be at least {floor} with backward={self.backward}: party {name!r} has {count} columns, and "
            text += "solves for the labels from fewer rows"
            self._require("batch_size", self.batch_size >= floor, text)
            advised = 128 * self.planned_views(parties.num_rows) * count
            if self.backward == "he" and self.batch_size < advised:
                logger.warning(
                    f"batch_size={self.batch_size}: party {name!r} can guess labels from its own gradients better "
                    f"than by chance; take {advised}, or backward=dp"
                )

    def _check_budget(self, parties: Parties):
        if len(parties.names) == 1:
            return
        planned = self.planned_views(parties.num_rows)
        for name in parties.label_holders(self.labels):
            automatic, limit = self._automatic_budget(parties, name), self.budget(parties, name)
            text = (
                f"party {name!r} may see a row {automatic} times before inner products of rows can leak; take that at "
            )
            text += "most, or set accept_gram_disclosure=true"
            is_low = limit is not None and limit <= automatic
            self._require("query_budget", is_low or self.accept_gram_disclosure, text)
            text = (
                f"party {name!r} would see some rows {planned} times but may see them {limit} times: train for fewer "
            )
            text += "epochs, take sgd if this is not it, or set a higher number and accept_gram_disclosure=true"
            self._require("query_budget", limit is None or planned <= limit, text)
