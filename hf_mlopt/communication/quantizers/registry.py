"""Codecs by name."""

import re
from dataclasses import fields

from hf_mlopt.communication.quantizers.bingrad import BinGradB, BinGradPB
from hf_mlopt.communication.quantizers.casts import FP8, Cast
from hf_mlopt.communication.quantizers.interface import Codec
from hf_mlopt.communication.quantizers.orq import ORQ, SharedORQ
from hf_mlopt.communication.quantizers.sign import ScaledSign
from hf_mlopt.communication.quantizers.top_k import TopK
from hf_mlopt.communication.quantizers.uniform_levels import QSGD, Linear, TernGrad
from hf_mlopt.errors import ConfigurationError


_CLIP = r"(?:-(?P<clip>none|optimal|[\d.]+sigma))?"
# What follows a name is read from it: arguments are the groups that matched.
_PATTERNS = (
    (r"none|fp32", Cast),
    (r"(?P<format>bf16|fp16)", Cast),
    (r"fp8", FP8),
    (r"sign", ScaledSign),
    (r"bingrad-b", BinGradB),
    (r"bingrad-pb", BinGradPB),
    (rf"orq-(?P<levels>\d+){_CLIP}", ORQ),
    (rf"orq-(?P<levels>\d+)-(?P<statistics>binned){_CLIP}", ORQ),
    (rf"orq-(?P<levels>\d+)-shared{_CLIP}", SharedORQ),
    (r"linear-(?P<levels>\d+)", Linear),
    (r"qsgd-(?P<levels>\d+)(?:-(?P<norm>l2))?", QSGD),
    (rf"terngrad{_CLIP}", TernGrad),
    (r"top-k-(?P<ratio>[\d.e-]+)", TopK),
)
KNOWN = (
    "none (or fp32), bf16, fp16, fp8, sign, bingrad-b, bingrad-pb, orq-LEVELS, orq-LEVELS-binned, orq-LEVELS-shared, "
    "linear-LEVELS, qsgd-LEVELS, qsgd-LEVELS-l2, terngrad, top-k-RATIO; orq and terngrad take -2.5sigma, orq -optimal"
)
_READ = {"levels": int, "ratio": float}


def codec(name: str, **settings) -> Codec:
    """
    The codec of a name, such as "orq-9", "orq-5-optimal", "orq-9-shared", "bingrad-b", "qsgd-9", "top-k-0.01", "bf16".

    Args:
        name (`str`): Method, then number of levels or ratio, then how it clips.
        settings: `block`, `clip`, `sweeps` or whatever else the codec has; they override the name.

    Raises:
        ConfigurationError: If the name is unknown, the codec has no such setting, or a value is out of range.
    """
    for pattern, kind in _PATTERNS:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        try:
            given = {key: _READ.get(key, str)(text) for key, text in match.groupdict().items() if text is not None}
        except ValueError:
            break
        allowed = [field.name for field in fields(kind)]
        for setting, value in settings.items():
            if setting not in allowed:
                remedy = f"{name} has no such setting; it has {', '.join(allowed) or 'none'}"
                raise ConfigurationError(setting, value, remedy)
        return kind(**{**given, **settings})
    raise ConfigurationError("codec", name, f"must be one of {KNOWN}")
