"""The three numbers of README.md, from benchmarks/results/*.json."""

import json
import re
import statistics
from pathlib import Path

from result_tables import markdown


RESULTS = Path(__file__).resolve().parent / "results"
_PLACE = re.compile(r"(?<=<!-- numbers -->\n).*?(?=<!-- end -->)", re.DOTALL)


def with_numbers(readme: str, folder: Path = RESULTS) -> str:
    """README with the table anew between its markers."""
    return _PLACE.sub("\n".join(markdown([_model(folder), _network(folder), _sites(folder)])) + "\n", readme)


def _model(folder: Path) -> dict[str, str]:
    pruning, distillation = _record("pruning", folder), _record("distillation", folder)
    common = {"kind": "quality", "pattern": "50%"}
    perplexity = {
        method: _mean(pruning, "perplexity", **common, scope="experts", method=method)
        for method in ("moe-pruner", "magnitude")
    }
    closed = _mean(distillation, "gap_closed", **common, method="layer-wise")
    return {
        "in the way": "the size of a model",
        "measured here": f"half of the experts' weights zero: perplexity {pruning['dense_perplexity']:.1f} → "
        f"{perplexity['moe-pruner']:.1f}; distillation layer by layer wins {100 * closed:.0f} % of such a loss back",
        "beside it": f"{perplexity['magnitude']:.1f} by magnitude: on a model this small all scores are close",
        "made by": f"`{pruning['command']}`",
    }


def _network(folder: Path) -> dict[str, str]:
    record = _record("communication", folder)
    seconds = {
        codec: _mean(record, "step_seconds_median", kind="link", ranks=2, bandwidth=1e8, codec=codec)
        for codec in ("bf16", "bingrad-b")
    }
    loss = {
        mode: _mean(record, "loss", kind="quality", task="LM", mode=mode)
        for mode in ("bf16", "bingrad-b / a tenth ahead")
    }
    return {
        "in the way": "the network",
        "measured here": f"a step over 100 Mbit/s: {seconds['bf16']:.1f} s in bf16, {seconds['bingrad-b']:.1f} s in "
        "one bit by BinGrad",
        "beside it": f"training loss {loss['bf16']:.2f} and, with step-ahead feedback, "
        f"{loss['bingrad-b / a tenth ahead']:.2f}; at 1 Gbit/s it is not worth it here",
        "made by": f"`{record['command'].partition(' --')[0]}`",
    }


def _sites(folder: Path) -> dict[str, str]:
    record = _record("federated_medical", folder)
    dice = {}
    for method, model in (
        ("FedAvg", "global"),
        ("FedSM", "super, moments"),
        ("Ditto", "personal"),
        ("centralised", "global"),
    ):
        rows = _rows(record, kind="nuclei", method=method)
        most = max(row["rounds"] for row in rows)
        dice[method] = statistics.mean(row["dice"][model]["mean"] for row in rows if row["rounds"] == most)
    return {
        "in the way": "data of several owners",
        "measured here": f"nuclei of five microscopes, each a site: Dice {dice['FedAvg']:.2f} by FedAvg, "
        f"{dice['FedSM']:.2f} by FedSM's super model",
        "beside it": f"{dice['centralised']:.2f} with all images in one place; {dice['Ditto']:.2f} by Ditto, which "
        "has to be told whose an image is",
        "made by": f"`{record['command'].partition(' --')[0]}`",
    }


def _record(name: str, folder: Path) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _rows(record: dict, **wanted) -> list[dict]:
    return [row for row in record["rows"] if wanted.items() <= row.items()]


def _mean(record: dict, key: str, **wanted) -> float:
    return statistics.mean(row[key] for row in _rows(record, **wanted))
