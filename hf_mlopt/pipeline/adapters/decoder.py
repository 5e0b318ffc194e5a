"""Decoder-only language models with the usual layout: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.moe import moe_layers
from hf_mlopt.pipeline.adapters.base import Adapter, Batch, Block, PassThrough, Tensors
from hf_mlopt.pipeline.moe_aux import AuxLoss


_AT_THE_FIRST = {"input_ids", "token_type_ids"}
_OF_ROUTER_LOSS = ("router_aux_loss_coef", "num_experts", "num_experts_per_tok")
_AT_THE_LAST = {"labels", "num_items_in_batch", "shift_labels"}


class DecoderBlock(Block):
    """
    Layers of a decoder. Mask and rotary embeddings are made anew in every block; only hidden states travel.

    Args:
        shell, is_first, is_last: See [`Block`].
        aux ([`AuxLoss`], *optional*): The load-balancing loss of a mixture of experts that trains with it.
    """

    def __init__(self, shell: nn.Module, is_first: bool, is_last: bool, aux: AuxLoss | None = None):
        super().__init__(shell, is_first, is_last)
        self.aux = aux

    def forward(self, boundary: Tensors, batch: Batch) -> Tensors:
        boundary = self.from_before(boundary, 1 + (self.aux.num_tensors if self.aux else 0))
        inputs = self._inputs(boundary, batch)
        if self.is_last:
            self.of_batch(batch, "labels")
            outputs = self.shell(**inputs, **{name: batch[name] for name in _AT_THE_LAST if name in batch})
            hidden_states = outputs.logits
        else:
            outputs = self.shell.base_model(**inputs)
            hidden_states = outputs.last_hidden_state
        carried = ()
        if self.aux is not None:
            router_logits = outputs.router_logits if self.aux.num_layers else ()
            carried = self.aux.add(boundary[1:], router_logits, batch.get("attention_mask"), hidden_states.device)
        if not self.is_last:
            return hidden_states, *carried
        return outputs.loss + self.aux.total(carried) if self.aux else outputs.loss, outputs.logits

    def _inputs(self, boundary: Tensors, batch: Batch) -> dict:
        inputs = {
            name: value
            for name, value in batch.items()
            if value is not None and name not in _AT_THE_LAST and (self.is_first or name not in _AT_THE_FIRST)
        }
        if self.is_first:
            self.of_batch(batch, "input_ids")
        else:
            inputs["inputs_embeds"] = boundary[0]
        if self.aux is not None:
            inputs["output_router_logits"] = self.aux.num_layers > 0
        return {**inputs, "use_cache": False}


class DecoderAdapter(Adapter):
    """
    Args:
        model (`PreTrainedModel`): A causal language model.
        moe_aux (`str`, *optional*, defaults to `"exact"`): See [`hf_mlopt.pipeline.partition.split`].

    Raises:
        ConfigurationError: If the model does not have the usual layout.
    """

    layer_list = "layers"
    before = {"embed_tokens": PassThrough}
    after = {"norm": PassThrough}

    def __init__(self, model: nn.Module, moe_aux: str = "exact"):
        super().__init__(model)
        prefix, head = self._layout()
        self.layers = [
            f"{prefix}.{self.layer_list}.{i}" for i in range(len(getattr(model.base_model, self.layer_list)))
        ]
        self.inputs = {f"{prefix}.{name}": stand_in() for name, stand_in in self.before.items()}
        self.outputs = {f"{prefix}.{name}": stand_in() for name, stand_in in self.after.items()} | {
            head: PassThrough()
        }
        self.moe_aux, self.routed = moe_aux, []
        if getattr(model.config, "output_router_logits", False):
            self._check_router_loss()
            self.routed = [layer.index for layer in moe_layers(model)]
            # Once for the model and all blocks: each would install its own in the routers that they share, and see
            # every router as often.
            maybe_install_capturing_hooks(model.base_model)

    @property
    def carries_loss(self) -> bool:
        return bool(self.routed)

    def _check_router_loss(self) -> None:
        lacks = [name for name in _OF_ROUTER_LOSS if not hasattr(self.model, name)]
        if lacks:
            raise ConfigurationError(
                "model",
                self.model.config.model_type,
                f"{type(self.model).__name__} has no {lacks[0]}, which the load-balancing loss of its routers needs: "
                "set config.output_router_logits=False to train without it",
            )

    def _layout(self) -> tuple[str, str]:
        """Name of the base model, and of the head."""
        model = self.model
        base, names = model.base_model, {id(module): name for name, module in model.named_modules()}
        parts = (self.layer_list, *self.before, *self.after)
        missing = [part for part in parts if not isinstance(getattr(base, part, None), nn.Module)]
        head = names.get(id(model.get_output_embeddings()))
        if base is model or missing or head is None or not isinstance(getattr(base, self.layer_list), nn.ModuleList):
            lacks = missing or ["a language-model head on top of a base model"]
            raise ConfigurationError(
                "model",
                getattr(model.config, "model_type", type(model).__name__),
                f"{type(model).__name__} lacks {', '.join(lacks)}: a pipeline cuts causal language models with the "
                "layout of Llama, GPT-2, and image classifiers ViT and ResNet; train this one without a pipeline",
            )
        return names[id(base)], head

    def block(self, shell: nn.Module, start: int, stop: int) -> DecoderBlock:
        aux = None
        if self.routed and stop - start < len(self.layers):
            aux = AuxLoss(
                mode=self.moe_aux,
                coefficient=shell.router_aux_loss_coef,
                num_experts=shell.num_experts,
                top_k=shell.num_experts_per_tok,
                num_layers=sum(start <= index < stop for index in self.routed),
                num_layers_of_model=len(self.routed),
            )
            shell.router_aux_loss_coef = 0.0  # the model's own would see the routers of this block alone
        return DecoderBlock(shell, start == 0, stop == len(self.layers), aux)

    def random_batch(self, shape: Sequence[int] | None = None) -> Batch:
        size, length = shape or (2, 8)
        ids = torch.randint(self.model.config.get_text_config().vocab_size, (size, length))
        mask = torch.ones_like(ids)
        mask[-1, length - length // 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
