"""
What a mixture-of-experts layer is: finding it in any model, its layout, observing it. Light to import: torch comes
with the first use.
"""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "MoELayer": "hf_mlopt.moe.layers",
    "RoutedTokens": "hf_mlopt.moe.routed_tokens",
    "decoder_layers": "hf_mlopt.moe.layers",
    "moe_layers": "hf_mlopt.moe.layers",
    "observe": "hf_mlopt.moe.observation",
    "observe_layers": "hf_mlopt.moe.observation",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
