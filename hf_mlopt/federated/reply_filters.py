"""What becomes of a reply between the local training and the algorithm, made from the arguments alone at both ends."""

import logging
from typing import TYPE_CHECKING

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithms import Message, ServerAlgorithm
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.federated.privacy.accounting import noise_to_signal, require_accountant
from hf_mlopt.federated.privacy.clipping import change, changed, clipped, norm
from hf_mlopt.federated.privacy.masking import LEAST_SITES, masked, new_key
from hf_mlopt.federated.privacy.noise import noisy, site_secret
from hf_mlopt.federated.storage import SiteStore
from hf_mlopt.federated.update_codec import make_update_codec
from hf_mlopt.secure_sum.keys import primitives


if TYPE_CHECKING:
    from hf_mlopt.federated.arguments import FederatedTrainingArguments

logger = logging.getLogger(__name__)


class ReplyFilters:
    """
    In this order: clipping, noise, and a codec or masks, which see no more than the server would without them.

    Args:
        args (`FederatedTrainingArguments`): Alike at server and sites.
        store (`SiteStore`): Where sites keep what is their own.

    Raises:
        InputError: If a package is missing.
    """

    def __init__(self, args: "FederatedTrainingArguments", store: SiteStore):
        self.args, self.store = args, store
        self.codec = None
        if args.update_codec is not None:
            self.codec = make_update_codec(args.update_codec, args.update_codec_args, args.update_feedback)
        if args.noise_multiplier or args.secure_sum:
            primitives("hashes")  # so that it is missed before the first round

    @property
    def keeps_state(self) -> bool:
        """Whether a reply depends on what the site has kept of earlier ones."""
        return self.args.update_feedback

    def new_key(self, site: str, message: Message) -> Message:
        """The site's answer to the task `keys`."""
        if not self.args.secure_sum:
            raise ConfigurationError(
                "secure_sum", False, f"the server asks site {site!r} for a masked sum; set it true"
            )
        return new_key(self.store.folder / site, site, message)

    def encode(
        self, site: str, sent: Message, reply: Message, state: Message | None
    ) -> tuple[Message, dict[str, Group]]:
        """
        What leaves the site.

        Args:
            site (`str`): Its name.
            sent (`Message`): What it was sent.
            reply (`Message`): Its weights after local training, and what goes with them.
            state (`Message`, *optional*): What it has kept.

        Returns:
            `tuple`: The answer, and the groups to keep beside what the algorithm keeps.
        """
        if self.args.clip_update is not None:
            reply = self._bounded(site, sent, reply)
        if self.codec is not None:
            return self.codec.encode(sent, reply, state)
        if self.args.secure_sum:
            return masked(self.store.folder / site, site, sent, reply), {}
        return reply, {}

    def decode(self, sent: Message, reply: Message) -> Message:
        """
        The reply as the algorithm expects it. A masked one is no matter of a single site; see [`run_secure_round`].

        Raises:
            InputError: If the site has used another codec, or what it sent is damaged.
        """
        return reply if self.codec is None else self.codec.decode(sent, reply)

    def _bounded(self, site: str, sent: Message, reply: Message) -> Message:
        args, start, end = self.args, sent.groups["weights"], reply.groups["weights"]
        delta, scalars = change(start, end), dict(reply.scalars)
        if not args.noise_multiplier:
            scalars["unclipped_norm"] = norm(delta)
            if scalars["unclipped_norm"] <= args.clip_update:  # then bit for bit as it is
                return Message(reply.groups, scalars)
        delta = clipped(delta, args.clip_update)
        if args.noise_multiplier:
            secret = site_secret(self.store.folder / site, args.noise_seed)
            delta = noisy(delta, args.noise_multiplier * args.clip_update, secret, sent)
        return Message({**reply.groups, "weights": changed(start, delta)}, scalars)


def check_switches(args: "FederatedTrainingArguments", algorithm: ServerAlgorithm) -> None:
    """
    Refuses switches that mean nothing to an algorithm, or would not protect what they seem to; says what noise is
    worth. After `setup`, before the first round.

    Raises:
        ConfigurationError: With the reason.
        InputError: If the accountant is missing.
    """
    for name in ("clip_update", "update_codec", "secure_sum"):  # noise is refused without clipping
        if getattr(args, name):
            _check_groups(name, getattr(args, name), args, algorithm)
    if args.noise_multiplier:
        require_accountant()
        num_weights = sum(weight.numel() for weight in algorithm.groups["weights"].values())
        num_sites = max(round(algorithm.fraction * len(algorithm.sites)), algorithm.min_sites)
        ratio = noise_to_signal(args.noise_multiplier, num_weights, num_sites)
        logger.warning(
            "noise_multiplier=%g hides a site as a whole, not its rows one by one, and only the weights: losses, "
            "metrics and numbers of rows are told as they are. The noise of the mean of %d sites is about %.3g times "
            "as large as a clipped update; few sites average little of it away.",
            *(args.noise_multiplier, num_sites, ratio),
        )
    if args.secure_sum:
        _check_masked_sum(args, algorithm)


def _check_groups(name: str, value: object, args: "FederatedTrainingArguments", algorithm: ServerAlgorithm) -> None:
    groups = set(algorithm.template(algorithm.sites[0]).groups)
    summed = set(algorithm.group_weighting()) if name == "secure_sum" else set()
    further = sorted(groups - {"weights", "buffers"} - summed)
    if further:
        remedy = f"replies of {args.algorithm} also hold {', '.join(further)}, made of the exact change; take fedavg"
        raise ConfigurationError(name, value, remedy)
    if args.noise_multiplier and "buffers" in groups:
        raise ConfigurationError(
            "noise_multiplier",
            args.noise_multiplier,
            "the model's buffers, such as the statistics of batch normalization, would leave the sites without noise; "
            "take fedbn, which keeps them there, or a model without buffers",
        )


def _check_masked_sum(args: "FederatedTrainingArguments", algorithm: ServerAlgorithm) -> None:
    if not algorithm.needs_only_mean:
        remedy = f"{args.algorithm} needs the replies one by one; a masked sum gives their mean: take fedavg"
        raise ConfigurationError("secure_sum", True, remedy)
    num_asked = len(algorithm.configure(algorithm.round))
    if num_asked < LEAST_SITES:
        raise ConfigurationError(
            "secure_sum",
            True,
            f"a round asks {num_asked} sites, and a masked sum needs {LEAST_SITES}: of two, each gets the other's "
            "update by subtracting its own; add sites, or raise site_fraction",
        )
