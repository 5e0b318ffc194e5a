"""Where the targets of a distillation come from: a model that runs beside the student."""

# T tokens   H hidden   K experts per token   L layers   V vocabulary

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from hf_mlopt.moe import MoELayer, moe_layers
from hf_mlopt.moe.expert_outputs import receive_expert_outputs


@dataclass
class Targets:
    """
    What the teacher makes of a batch. Keys are indices of decoder layers.

    Args:
        index_TK (`dict[int, torch.Tensor]`): Experts that the teacher's router chose, `[tokens, top-k]`.
        output_TKH (`dict[int, torch.Tensor]`): Their outputs before the router's weight is applied.
        logits_BSV (`torch.Tensor`, *optional*): The teacher's logits, where they are asked for.
    """

    index_TK: dict[int, torch.Tensor] = field(default_factory=dict)
    output_TKH: dict[int, torch.Tensor] = field(default_factory=dict)
    logits_BSV: torch.Tensor | None = None


class ModelTeacher:
    """
    A frozen model that gives targets.

    Args:
        model ([`~transformers.PreTrainedModel`]): The teacher; put into eval mode for good.
        experts (`bool`): Whether outputs of experts are wanted.
        logits (`bool`): Whether logits are wanted.
    """

    def __init__(self, model: PreTrainedModel, experts: bool = True, logits: bool = False):
        self.model = model.eval().requires_grad_(False)
        self.layers: list[MoELayer] = moe_layers(model)
        self.experts, self.logits = experts, logits

    @torch.no_grad()
    def targets(self, inputs: dict) -> Targets:
        """
        Runs the teacher.

        Args:
            inputs (`dict`): What a model is called with; `labels` are left out.
        """
        targets = Targets()

        def receive(layer, index_TK, output_TKH):
            targets.index_TK[layer.index], targets.output_TKH[layer.index] = index_TK, output_TKH

        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with ExitStack() as stack:
            if self.experts:
                stack.enter_context(receive_expert_outputs(self.layers, receive))
            # Without need for logits, those of one token: the head of a large vocabulary costs as much as some layers.
            logits = self.model(**inputs, use_cache=False, **({} if self.logits else {"logits_to_keep": 1})).logits
        targets.logits_BSV = logits if self.logits else None
        return targets
