"""
Gradient codecs: pure functions of a flat tensor and a key. They know no process groups, files or Trainer.

[`codec`] makes one from its name; [`Codec`] says what each can do.
"""

from hf_mlopt.lazy import lazy_names


_HERE = "hf_mlopt.communication.quantizers"
_PUBLIC = {
    "BinGradB": f"{_HERE}.bingrad",
    "BinGradPB": f"{_HERE}.bingrad",
    "Cast": f"{_HERE}.casts",
    "Codec": f"{_HERE}.interface",
    "FP8": f"{_HERE}.casts",
    "Linear": f"{_HERE}.uniform_levels",
    "ORQ": f"{_HERE}.orq",
    "Payload": f"{_HERE}.interface",
    "QSGD": f"{_HERE}.uniform_levels",
    "ScaledSign": f"{_HERE}.sign",
    "SharedORQ": f"{_HERE}.orq",
    "TernGrad": f"{_HERE}.uniform_levels",
    "TopK": f"{_HERE}.top_k",
    "codec": f"{_HERE}.registry",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
