"""
What the installed transformers says about a model type, taken from the text of its modeling file.

The text is read, not imported: importing it would take torch and seconds. A table of our own would be stale with every
release.
"""

import ast
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


def kept_in_float32(model_type: str, dtype: str) -> re.Pattern | None:
    """
    Names of parameters that stay in float32 when a model is loaded in another type.

    Args:
        model_type (`str`): As in `config.json`.
        dtype (`str`): Type the model is loaded in, in the words of safetensors.

    Returns:
        `re.Pattern`: To be searched for in a name; None if there are no such parameters.
    """
    strict = "_keep_in_fp32_modules_strict"
    lists = {"F16": ("_keep_in_fp32_modules", strict), "BF16": (strict,)}
    patterns = set()
    for node in ast.walk(_tree(model_type)) if dtype in lists else ():
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") in lists[dtype] for target in node.targets):
            try:
                patterns.update(ast.literal_eval(node.value) or ())
            except ValueError:
                continue  # not written out; nothing is known
    escaped = (re.escape(pattern).replace(r"\*", ".*") for pattern in sorted(patterns))
    return re.compile("|".join(escaped)) if patterns else None


def has_fused_experts(model_type: str) -> bool | None:
    """Whether its experts are of the kind that transformers can switch and we can observe; None if not known."""
    text = _text(model_type)
    return "@use_experts_implementation" in text if text else None


@lru_cache(maxsize=8)
def _text(model_type: str) -> str:
    spec = find_spec("transformers")
    for name in (model_type.replace("-", "_"), model_type.removesuffix("_text")):
        file = Path(spec.origin).parent / "models" / name / f"modeling_{name}.py" if spec is not None else Path()
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return ""


@lru_cache(maxsize=8)
def _tree(model_type: str) -> ast.AST:
    return ast.parse(_text(model_type))
