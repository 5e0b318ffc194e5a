"""
Writes combinations.md: what every two methods do together, as `hf_mlopt.training.combinations` declares it.

    python docs/combinations.py
"""

from collections.abc import Iterator
from pathlib import Path

from hf_mlopt.resources import resource_dir
from hf_mlopt.training import combinations


PAGE = Path(__file__).with_name("combinations.md")
_SECTIONS = (
    ("runs", "What runs", "shown by"),
    ("refused", "What is refused", "field and reason"),
    ("apart", "What never meets", "why"),
)
_BEGINNING = """\
# Combinations

```
hf-mlopt recipes copy all --output recipes  # outside a checkout, which has them
hf-mlopt train --config recipes/combinations/pipeline_replicas.yaml --output-dir replicas
```

What every two methods do together. `runs`: a test has them run together. **no**: a constructor refuses the two,
with the reason below, before training begins. –: nothing takes both. `python docs/combinations.py` writes this
page, from what `hf_mlopt.training.combinations` declares and the constructors refuse with; a test compares.

Five combinations of more than two, each a recipe in `recipes/combinations/`. Those of a pruned model begin with
what `hf-mlopt demo` leaves; the second line of a recipe is its command.

{recipes}

How they meet:

- **Masks and codes.** Codes of few levels know no zero. Where a weight is held at zero its gradient is zeroed
  before it is coded and after it is decoded, and so is what was not sent: no residual is left under a mask.
- **Masks and adapters.** Adapters of expert matrices leave zeros as they are, in `distill` always and elsewhere
  with `keep_zeros`. `distill` merges them. What `federate` writes are adapters; they are merged under the mask by
  `mask_adapters(PeftModel.from_pretrained(base, folder)).merge_and_unload()` (`hf_mlopt.training.adapters`); peft
  alone would fill the zeros. An adapter of a pruned linear layer adds to its output and is refused.
- **RSGD and step-ahead.** RSGD holds back part of every step but gives all of it out in the end: a residual e moves
  y by lr / (1 - momentum) e (AdamW inside: lr / (√v + eps) e), and that is what the shift anticipates. It is a
  shift of w, undone before `optimizer.eval()` or `train()` moves w to another point.
- **Local steps and codes.** Between two averages nothing is sent, so there is no gradient to code; the change of a
  round is coded at sites, by `update_codec` of `federate`.
"""


def page() -> str:
    """`docs/combinations.md`."""
    names = list(combinations.METHODS)
    marks = {"runs": "runs", "refused": "**no**", "apart": "–"}
    recipes = ["| recipe | what |", "|---|---|"]
    for path in sorted(resource_dir("recipes").glob("combinations/*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        recipes.append(f"| `{path.name}` | {first} |")
    lines = [
        _BEGINNING.format(recipes="\n".join(recipes)),
        "| | " + " | ".join(combinations.METHODS[name][0] for name in names[1:]) + " |",
    ]
    lines.append("|---" * len(names) + "|")
    for number, one in enumerate(names[:-1]):
        found = [combinations.pair_of(one, other).outcome for other in names[number + 1 :]]
        cells = [""] * number + [marks[outcome] for outcome in found]
        lines.append(f"| **{combinations.METHODS[one][0]}** | " + " | ".join(cells) + " |")
    lines += ["", "| method | what asks for it |", "|---|---|"]
    lines += [f"| {title} | {asked} |" for title, asked in combinations.METHODS.values()]
    for outcome, title, column in _SECTIONS:
        lines += ["", f"## {title}", "", f"| | with | {column} |", "|---|---|---|"]
        lines += _rows([pair for pair in combinations.PAIRS if pair.outcome == outcome])
    return "\n".join(lines) + "\n"


def _rows(pairs: list[combinations.Pair]) -> Iterator[str]:
    """One line for all pairs of a method that have the same to say."""
    together: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        said = f"`tests/{pair.shown_by}`" if pair.shown_by else pair.reason.replace("{optimizer}", "domo")
        said = f"`{pair.field}`: {said}" if pair.field else said
        said += f" ({pair.note})" if pair.note else ""
        together.setdefault((pair.one, said), []).append(combinations.METHODS[pair.other][0])
    for (one, said), others in together.items():
        yield f"| {combinations.METHODS[one][0]} | {', '.join(others)} | {said} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
