"""Which methods of this package go together: what every pair of them does, and why some pairs are refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from hf_mlopt.errors import ConfigurationError


METHODS = {
    "masks": ("masks", "zeros of a pruned model, held: `keep_zeros`, and always in `distill`"),
    "end-to-end": ("end-to-end", "expert-wise distillation, `distill --mode end-to-end`"),
    "layer-wise": ("layer-wise", "layer-wise distillation, `distill --mode layerwise`"),
    "lora": ("LoRA", "adapters: `lora_rank` of `distill`, `lora` of `federate`"),
    "rsgd": ("RSGD", "`mlopt_optim`: `rsgd`, `rsgdm`, `rsgd-adamw`"),
    "local-steps": ("local steps", "DOMO and its relatives between ranks: `mlopt_optim: domo`, `local_steps`"),
    "codec": ("codec", "coded gradients: `grad_codec`"),
    "feedback": ("feedback", "`error_feedback`: `classic` or `step-ahead`"),
    "saef": ("SAEF", "coded updates of the paper: `mlopt_optim: saef`"),
    "pipeline": ("pipeline", "stages: `pipeline: dsp`, `stages`"),
    "federated": ("federated", "`federate`, of any algorithm"),
    "fedsm": ("FedSM", "`federate`, `algorithm: fedsm`"),
    "auto-fedrl": ("Auto-FedRL", "`federate`, `auto_fedrl`"),
    "update-codec": ("update codec", "coded changes of a round: `update_codec` of `federate`"),
    "secure-sum": ("secure sum", "`secure_sum` of `federate`, `mask` of `vertical`"),
    "vertical": ("vertical", "`vertical`: parties with different columns"),
}


@dataclass(frozen=True)
class Pair:
    """
    What two methods do together.

    Args:
        one (`str`), other (`str`): Keys of `METHODS`.
        outcome (`str`): `runs`; `refused`, by a constructor, with `field` and `reason`; `apart`, where nothing takes
            both, for the `reason`.
        reason (`str`, *optional*): Why not; may name values in braces, see [`refusal`].
        field (`str`, *optional*): That the refusal names.
        shown_by (`str`, *optional*): Of a pair that runs, the test: `file::function`, below `tests/`.
        note (`str`, *optional*): What else to know.
    """

    one: str
    other: str
    outcome: str
    reason: str = ""
    field: str = ""
    shown_by: str = ""
    note: str = ""


NEEDS_CODEC = "needs grad_codec"
END_TO_END_ONLY = "belongs to --mode end-to-end; layer by layer only experts are trained"
STEP_AHEAD_IN_STAGES = "moves weights that stages in flight read; take classic"
_STAGES = "does not go with pipeline: "
_OF_RANKS = "is for ranks that share gradients; a site has one, and its change of a round is coded by update_codec"
_ITSELF = "exchanges of itself; name it as algorithm, or a local optimizer"
_EXACT = "replies of fedsm also hold weights of the site's own, made of the exact change; take fedavg"

# Why two methods never meet.
_MODES = "`mode` chooses one of the two"
_ONE_OPTIMIZER = "`mlopt_optim` names one of the two"
_TWO_TRAINERS = "`distill` and `train` have Trainers of their own, and only that of `train` cuts a model into stages"
_LINEAR = "parties of `vertical` train linear models of their columns, with none of the options of a Trainer"
_ALONE = "it trains in one process, without a Trainer"
_TEXT = "pruning and distillation are of language models, and FedSM tells sites from one another by images"

_TEST = "test_combinations.py::test_"
_DISTILLED = _TEST + "a_pruned_model_is_distilled_by_rsgdm_with_orq_and_step_ahead_in_two_processes"
_ADAPTERS = _TEST + "adapters_on_a_pruned_model_are_merged_masked_and_pushed"
_RANKS = _TEST + "a_pruned_model_is_distilled_in_two_processes_by_other_means"
_PIPE = _TEST + "two_replicas_of_two_stages_send_codes"
_SITES = _TEST + "sites_train_adapters_of_a_pruned_model_by_domo_and_send_codes"
_TUNED = _TEST + "a_policy_tunes_fedsm"
_DIGITS = _TEST + "sites_combine"
_HELD = _TEST + "sites_hold_the_zeros_of_a_whole_pruned_model"
_LAYERS = "test_workflow_distill_layerwise.py::test_what_is_written"
_WORDS = "test_vertical_privacy.py::test_p1_words_at_a_requester_are_uniform_and_tell_nothing"
_AHEAD = "test_communication_feedback.py::test_no_step_ahead_is_classic_and_one_is_not"


def _runs(one: str, others: str, shown_by: str, note: str = "") -> Iterator[Pair]:
    for other in others.split():
        yield Pair(one, other, "runs", shown_by=shown_by, note=note)


def _refused(one: str, others: str, field: str, reason: str, note: str = "") -> Iterator[Pair]:
    for other in others.split():
        yield Pair(one, other, "refused", reason, field, note=note)


def _apart(one: str, others: str, reason: str, note: str = "") -> Iterator[Pair]:
    for other in others.split():
        yield Pair(one, other, "apart", reason, note=note)


_OF_SITES = "fedsm auto-fedrl update-codec secure-sum"
PAIRS: tuple[Pair, ...] = (
    *_runs("masks", "end-to-end rsgd codec feedback", _DISTILLED),
    *_runs("masks", "layer-wise", _LAYERS),
    *_runs("masks", "lora", _ADAPTERS, "where the model is zero, adapters change nothing"),
    *_runs("masks", "local-steps", _RANKS),
    *_refused(
        "masks", "saef", "keep_zeros",
        "saef sends codes of the update, which know no zero, and steps to them; name the codec as grad_codec, which "
        "holds zeros",
    ),
    *_refused(
        "masks", "pipeline", "keep_zeros",
        _STAGES + "a stage steps when gradients come, not when the Trainer counts a step and puts zeros back",
    ),
    *_runs("masks", "federated auto-fedrl secure-sum", _HELD),
    *_apart("masks", "fedsm", _TEXT),
    *_refused(
        "masks", "update-codec", "update_codec",
        "would fill the zeros that keep_zeros holds, for its codes know none; train adapters (lora), which leave them",
        "adapters of a pruned model do travel coded",
    ),
    *_apart("end-to-end", "layer-wise", _MODES),
    *_runs("end-to-end", "lora", _ADAPTERS),
    *_runs("end-to-end", "rsgd codec feedback", _DISTILLED),
    *_runs("end-to-end", "local-steps", _RANKS),
    *_refused(
        "end-to-end", "saef", "keep_zeros",
        "saef sends codes of the update, which know no zero, and steps to them; name the codec as grad_codec, which "
        "holds zeros",
        "with `lora_rank` it runs",
    ),
    *_apart("end-to-end", "pipeline", _TWO_TRAINERS),
    *_refused("end-to-end", "federated auto-fedrl update-codec secure-sum", "args", "must be DistillationArguments"),
    *_apart("end-to-end", "fedsm", _TEXT),
    *_refused("layer-wise", "lora", "lora_rank", END_TO_END_ONLY),
    *_refused("layer-wise", "rsgd local-steps saef", "mlopt_optim", END_TO_END_ONLY),
    *_refused("layer-wise", "codec", "grad_codec", END_TO_END_ONLY),
    *_refused("layer-wise", "feedback", "error_feedback", END_TO_END_ONLY),
    *_apart("layer-wise", "pipeline", _TWO_TRAINERS),
    *_apart("layer-wise", "federated auto-fedrl update-codec secure-sum", _ALONE),
    *_apart("layer-wise", "fedsm", _TEXT),
    *_runs("lora", "rsgd codec feedback local-steps saef", _RANKS),
    *_refused("lora", "pipeline", "model", "must be a model of transformers, without wrappers such as PEFT or DDP"),
    *_runs("lora", "federated update-codec", _SITES),
    *_runs("lora", "fedsm auto-fedrl secure-sum", _DIGITS),
    *_apart("rsgd", "local-steps", _ONE_OPTIMIZER, "at sites, RSGD may be the local optimizer of `algorithm: domo`"),
    *_runs("rsgd", "codec feedback", _DISTILLED, "a late gradient moves y by lr / (1 - momentum) in all"),
    *_apart("rsgd", "saef", _ONE_OPTIMIZER),
    *_runs("rsgd", "pipeline", _PIPE),
    *_runs("rsgd", "federated fedsm auto-fedrl update-codec secure-sum", _DIGITS),
    *_refused(
        "local-steps", "codec", "grad_codec",
        "codes gradients, and {optimizer} sends models; leave one of them out, or have the change of a round coded: "
        "hf-mlopt federate, with algorithm domo and update_codec",
    ),
    *_refused("local-steps", "feedback", "error_feedback", NEEDS_CODEC, "which local steps refuse"),
    *_apart("local-steps", "saef", _ONE_OPTIMIZER),
    *_refused("local-steps", "pipeline", "mlopt_optim", _STAGES + "local steps average whole models"),
    *_runs("local-steps", "federated update-codec", _SITES, "as `algorithm`"),
    *_refused("local-steps", "fedsm", "mlopt_optim", _ITSELF, "`algorithm` names one of the two"),
    *_runs("local-steps", "auto-fedrl secure-sum", _DIGITS, "as `algorithm`"),
    *_runs("codec", "feedback", _AHEAD),
    *_refused("codec", "saef", "grad_codec", "codes gradients, and saef updates; leave it out, and name the codec in "
              "mlopt_optim_args"),
    *_runs("codec", "pipeline", _PIPE, "between replicas"),
    *_refused("codec", f"federated {_OF_SITES}", "grad_codec", _OF_RANKS),
    *_refused("feedback", "saef", "error_feedback", NEEDS_CODEC, "`mlopt_optim_args` has that of SAEF"),
    *_runs("feedback", "pipeline", _PIPE, "`classic`; `step-ahead` " + STEP_AHEAD_IN_STAGES),
    *_refused("feedback", f"federated {_OF_SITES}", "error_feedback", NEEDS_CODEC, "that of sites is update_feedback"),
    *_refused("saef", "pipeline", "mlopt_optim", _STAGES + "its step exchanges the updates of a whole model"),
    *_refused("saef", f"federated {_OF_SITES}", "mlopt_optim", _ITSELF),
    *_apart("pipeline", f"federated {_OF_SITES}", "`federate` has no stages: a site trains in one process"),
    *_runs("federated", "fedsm auto-fedrl", _TUNED),
    *_runs("federated", "update-codec", _SITES),
    *_runs("federated", "secure-sum", _DIGITS),
    *_runs("fedsm", "auto-fedrl", _TUNED),
    *_refused("fedsm", "update-codec", "update_codec", _EXACT),
    *_runs("fedsm", "secure-sum", _DIGITS, "with a selector that is learned, or none"),
    *_runs("auto-fedrl", "update-codec", _DIGITS),
    *_refused("auto-fedrl", "secure-sum", "secure_sum", "auto_fedrl needs the loss of each site; drop one of the two"),
    *_refused("update-codec", "secure-sum", "update_codec", "masked words cannot be compressed; drop secure_sum"),
    *_apart("vertical", " ".join(name for name in METHODS if name not in ("vertical", "secure-sum")), _LINEAR),
    *_runs("vertical", "secure-sum", _WORDS),
)  # fmt: skip

_BY_METHODS = {frozenset((pair.one, pair.other)): pair for pair in PAIRS}


def pair_of(one: str, other: str) -> Pair:
    """What is declared of two methods, in either order."""
    return _BY_METHODS[frozenset((one, other))]


def refusal(one: str, other: str, value: Any, **named: Any) -> ConfigurationError:
    """
    The error that a constructor raises for a pair that is refused.

    Args:
        one (`str`), other (`str`): The two methods.
        value (`Any`): Of the field that is refused.
        **named: What the reason names in braces.

    Returns:
        `ConfigurationError`: To be raised.
    """
    pair = pair_of(one, other)
    return ConfigurationError(pair.field, value, pair.reason.format(**named))


def undeclared() -> list[tuple[str, str]]:
    """Pairs of methods of which nothing is said."""
    return [two for two in combinations(METHODS, 2) if frozenset(two) not in _BY_METHODS]
