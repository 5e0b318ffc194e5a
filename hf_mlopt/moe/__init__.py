"""What a mixture-of-experts layer is: finding it in any model, its layout, observing it."""

from hf_mlopt.moe.layers import MoELayer, decoder_layers, moe_layers
from hf_mlopt.moe.observation import observe, observe_layers
from hf_mlopt.moe.routed_tokens import RoutedTokens


__all__ = [
    "MoELayer",
    "RoutedTokens",
    "decoder_layers",
    "moe_layers",
    "observe",
    "observe_layers",
]
