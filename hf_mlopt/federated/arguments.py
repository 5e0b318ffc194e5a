"""The fields of a federated training, beside those of the local one."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithm_table import ALGORITHM_NAMES, auto_fedrl_parts, corrects_gradients, local_optimizer
from hf_mlopt.federated.update_codec import make_update_codec
from hf_mlopt.training.arguments import MLOptTrainingArguments, json_object
from hf_mlopt.training.combinations import refusal


@dataclass(repr=False)  # the inherited one keeps tokens out of logs
class FederatedTrainingArguments(MLOptTrainingArguments):
    """
    `MLOptTrainingArguments` of what every site does in a round, and what the server makes of it.

    Args:
        algorithm (`str`, *optional*, defaults to `"fedavg"`):
            What sites and server do in a round; docs/federate.md explains each.
        algorithm_args (`dict` or `str`, *optional*):
            Options of the algorithm, or a JSON object of them: `{"server_lr": 0.5}`.
        auto_fedrl (`dict` or `str`, *optional*):
            Has a policy tune hyper-parameters during the training, by the losses on what sites hold out: ranges
            `learning_rate`, `local_epochs` or `local_steps`, `server_lr`, `aggregation_weights` (`[low, high]`, or
            null where it is not searched), `search_space` (`log` or `paper`), and the options of `AutoFedRL`:
            `policy`, `window`, `hyper_lr`, `cost_weight`, `guard`... `{}` searches all with the paper's ranges.
        release_personal (`bool`, *optional*, defaults to `False`):
            Of `fedsm`: whether a site's personal model may be handed to all users in a super model. Each site says so
            for itself; its weights tell of its data. With `secure_sum` it stays at its site.
        num_rounds (`int`, *optional*, defaults to 10):
            Exchanges between server and sites.
        local_epochs (`float`, *optional*, defaults to 1.0):
            Passes of every site over its data in a round.
        local_steps (`int`, *optional*):
            Optimizer steps of every site in a round, in place of `local_epochs`.
        site_fraction (`float`, *optional*, defaults to 1.0):
            Share of the sites that is asked in a round.
        min_sites (`int`, *optional*, defaults to 1):
            Sites that must answer for a round to count.
        site_weights (`str`, *optional*, defaults to `"samples"`):
            Weight of a site in a mean: by its number of `samples`, or `uniform`.
        optimizer_state (`str`, *optional*, defaults to `"reset"`):
            Whether a site's optimizer begins every round afresh (`reset`) or goes on (`keep`).
        evaluate_every (`int`, *optional*, defaults to 1):
            Rounds between two evaluations at the sites, and after the last one; 0 is never.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that sites train in, each with one model; 0 is one site after the other in this process.
        round_timeout (`float`, *optional*):
            Seconds after which a round goes on without the sites that have not answered.
        site_retries (`int`, *optional*, defaults to 1):
            How often a site whose process died is asked again within a round.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Course of the learning rate over the rounds, `constant`, `linear` or `cosine`; in a round it is constant.
        save_total_limit (`int`, *optional*, defaults to 2):
            Checkpoints of the server to keep; there is one after every round.
        clip_update (`float`, *optional*):
            Largest L2 norm of the change that a site makes to the weights in a round; a larger one is scaled down.
        noise_multiplier (`float`, *optional*, defaults to 0.0):
            Standard deviation of the Gaussian noise on that change, over `clip_update`. It hides that a site has the
            data it has, from the server too; that takes so much noise that of few sites (5, say) nothing is learned.
            It is no protection of single rows, which DP-SGD in the sites' own training would be. Losses, metrics and
            numbers of rows are told without noise. Every row of the history has the `epsilon` spent so far.
        target_delta (`float`, *optional*, defaults to 1e-5):
            δ of that ε.
        noise_seed (`int`, *optional*):
            Makes the noise repeatable, for tests: whoever knows the seed can take the noise off again.
        update_codec (`str`, *optional*):
            Gradient codec in which the change of the weights travels to the server: `orq-9`, `bingrad-b`, `sign`,
            `top-k-0.01`, `bf16`... Vectors and small tensors travel as they are.
        update_codec_args (`dict` or `str`, *optional*):
            Settings of the codec, or a JSON object of them: `{"block": 1024}`.
        update_feedback (`bool`, *optional*, defaults to `False`):
            Whether sites add to a change what of the earlier ones was not sent.
        secure_sum (`bool`, *optional*, defaults to `False`):
            Whether updates are masked so that the server learns their sum alone, of at least three sites. For an
            algorithm that needs no more than their mean, and a server that hands out the sites' keys honestly.
        report_to (`str`, *optional*, defaults to `"none"`):
            Where the metrics of rounds go as well: `tensorboard`, `wandb`...
    """

    algorithm: Literal[*ALGORITHM_NAMES] = "fedavg"
    algorithm_args: dict[str, Any] | str | None = None
    auto_fedrl: dict[str, Any] | str | None = None
    release_personal: bool = False
    num_rounds: int = 10
    local_epochs: float = 1.0
    local_steps: int | None = None
    site_fraction: float = 1.0
    min_sites: int = 1
    site_weights: Literal["samples", "uniform"] = "samples"
    optimizer_state: Literal["reset", "keep"] = "reset"
    evaluate_every: int = 1
    num_workers: int = 0
    round_timeout: float | None = None
    site_retries: int = 1
    clip_update: float | None = None
    noise_multiplier: float = 0.0
    target_delta: float = 1e-5
    noise_seed: int | None = None
    update_codec: str | None = None
    update_codec_args: dict[str, Any] | str | None = None
    update_feedback: bool = False
    secure_sum: bool = False
    lr_scheduler_type: str = "constant"
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"

    def __post_init__(self):
        local_steps, self.local_steps = self.local_steps, 1  # theirs is that of optimizers with rounds
        self.algorithm_args = json_object("algorithm_args", self.algorithm_args)
        self.update_codec_args = json_object("update_codec_args", self.update_codec_args)
        self.auto_fedrl = json_object("auto_fedrl", self.auto_fedrl)
        _check_numbers(self, local_steps)
        _check_schedule(self)
        _check_updates(self)
        if self.algorithm not in ALGORITHM_NAMES:
            raise ConfigurationError("algorithm", self.algorithm, f"must be one of {', '.join(ALGORITHM_NAMES)}")
        _check_algorithm(self)
        self.mlopt_optim, self.mlopt_optim_args = local_optimizer(self)
        super().__post_init__()
        self.local_steps = local_steps
        if self.fp16 and corrects_gradients(self):
            remedy = f"{self.algorithm} adds to gradients that fp16 has scaled; take bf16"
            raise ConfigurationError("fp16", True, remedy)
        if self.grad_codec is not None:
            raise refusal("codec", "federated", self.grad_codec)


def _check_numbers(args: FederatedTrainingArguments, local_steps: int | None) -> None:
    for name, value, least in (
        ("num_rounds", args.num_rounds, 1),
        ("local_steps", local_steps, 1),
        ("evaluate_every", args.evaluate_every, 0),
        ("num_workers", args.num_workers, 0),
        ("site_retries", args.site_retries, 0),
        ("save_total_limit", args.save_total_limit, 1),
        ("min_sites", args.min_sites, 1),
    ):
        if value is not None and (type(value) is not int or value < least):
            raise ConfigurationError(name, value, f"must be an int of at least {least}")
    for name, most in (("local_epochs", math.inf), ("round_timeout", math.inf), ("site_fraction", 1)):
        value = getattr(args, name)
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if value is not None and not (is_number and 0 < value <= most):
            raise ConfigurationError(name, value, "must be above 0" + (" and at most 1" if most == 1 else ""))
    for name, known in (("site_weights", ("samples", "uniform")), ("optimizer_state", ("reset", "keep"))):
        if getattr(args, name) not in known:
            raise ConfigurationError(name, getattr(args, name), f"must be {' or '.join(known)}")
    is_elsewhere = getattr(args, "engine", None) == "flower"
    if args.round_timeout is not None and args.num_workers == 0 and not is_elsewhere:
        raise ConfigurationError(
            "round_timeout", args.round_timeout, "needs num_workers: a site that trains in this process cannot be left"
        )


def _check_algorithm(args: FederatedTrainingArguments) -> None:
    if args.release_personal and args.algorithm != "fedsm":
        raise ConfigurationError(
            "release_personal", True, f"{args.algorithm} gives the server no personal models; fedsm does"
        )
    if args.release_personal and args.secure_sum:
        remedy = "under secure_sum the server has no personal models to hand out; leave one of the two out"
        raise ConfigurationError("release_personal", True, remedy)
    if args.auto_fedrl is None:
        return
    auto_fedrl_parts(args.auto_fedrl)
    if args.secure_sum:
        raise refusal("auto-fedrl", "secure-sum", True)


def _check_schedule(args: FederatedTrainingArguments) -> None:
    if args.lr_scheduler_type not in ("constant", "linear", "cosine"):
        raise ConfigurationError(
            "lr_scheduler_type", args.lr_scheduler_type, "over rounds it is constant, linear or cosine"
        )
    for name, unset, instead in (
        ("max_steps", -1, "set local_steps and num_rounds"),
        ("num_train_epochs", 3.0, "set local_epochs and num_rounds"),
        ("warmup_steps", 0, "a round begins at its full learning rate; leave it out"),
    ):
        if getattr(args, name) not in (unset, None):
            raise ConfigurationError(name, getattr(args, name), instead)


def _check_updates(args: FederatedTrainingArguments) -> None:
    clip = args.clip_update
    for name, value, is_good, allowed in (
        ("clip_update", clip, clip is None or 0 < clip < math.inf, "must be above 0"),
        ("noise_multiplier", args.noise_multiplier, 0 <= args.noise_multiplier < math.inf, "must be at least 0"),
        ("target_delta", args.target_delta, 0 < args.target_delta < 1, "must be above 0 and below 1"),
    ):
        if not is_good:
            raise ConfigurationError(name, value, allowed)
    no_codec = "has no effect without a codec; set update_codec, or leave it out"
    for name, is_set, needed, instead in (
        ("noise_multiplier", args.noise_multiplier > 0, clip, "is in units of clip_update; set that too"),
        ("noise_seed", args.noise_seed is not None, args.noise_multiplier, "has no effect without noise_multiplier"),
        ("update_codec_args", bool(args.update_codec_args), args.update_codec, no_codec),
        ("update_feedback", args.update_feedback, args.update_codec, no_codec),
    ):
        if is_set and not needed:
            raise ConfigurationError(name, getattr(args, name), instead)
    if args.secure_sum and args.update_codec is not None:
        raise refusal("update-codec", "secure-sum", args.update_codec)
    is_whole = getattr(args, "lora", None) is None  # adapters are not zero, but masked
    if args.keep_zeros and is_whole and args.update_codec is not None:
        raise refusal("masks", "update-codec", args.update_codec)
    if args.keep_zeros and is_whole and args.noise_multiplier:
        remedy = "with keep_zeros would fill the zeros; take adapters (lora), which leave them as they are"
        raise ConfigurationError("noise_multiplier", args.noise_multiplier, remedy)
    if args.algorithm == "fedsm" and args.update_codec is not None:
        raise refusal("fedsm", "update-codec", args.update_codec)
    if args.update_codec is not None:
        make_update_codec(args.update_codec, args.update_codec_args, args.update_feedback)
