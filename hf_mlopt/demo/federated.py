"""FedAvg against FedSM on drawn discs, which three sites see under other contrast and polarity."""

import json
import shutil
import time
from pathlib import Path

import torch

from hf_mlopt.configuration import load_config
from hf_mlopt.demo.output import demo_output
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.super_model import SuperModel
from hf_mlopt.hub import environment
from hf_mlopt.resources import resource_dir
from hf_mlopt.workflows.federate import federate
from hf_mlopt.workflows.federate_recipe import FederateRecipe
from hf_mlopt.workflows.segmentation_data import SegmentationData
from hf_mlopt.workflows.segmentation_overlays import save_sheet


ROUNDS, SHORT_ROUNDS = 15, 2
_FEDAVG, _FEDSM, _OVERLAY, _RESULTS = "fedavg", "fedsm", "overlay.png", "results.json"
_WRITTEN = {_FEDAVG, _FEDSM, _OVERLAY, _RESULTS}
_IMAGES = 2  # of a site in the picture


def run_federated_demo(output: str, seed: int = 0, num_rounds: int = ROUNDS) -> dict:
    """
    Trains the same U-Net by FedAvg and by FedSM and writes `output`: `fedavg/`, `fedsm/` with its `super_model/`,
    `overlay.png` and `results.json`.

    Args:
        output (`str`): Folder to write.
        seed (`int`, *optional*, defaults to 0): Same seed, same numbers.
        num_rounds (`int`, *optional*, defaults to 15): Of both.

    Returns:
        `dict`: What `results.json` holds: `sites` (site to Dice of `fedavg`, and of FedSM's `global`, `personal` and
        `super` model), `mean`, `selector_accuracy`, `rounds`, `seed`, `seconds`, `environment`.

    Raises:
        InputError: If `output` holds anything but an earlier demo, which is replaced.
    """
    started = time.perf_counter()
    target = Path(output).expanduser().resolve()
    with demo_output(target, _WRITTEN, 10_000_000) as folder:
        found = {}
        for name, changed in (
            (_FEDAVG, {"algorithm": "fedavg", "algorithm_args": None, "release_personal": False}),
            (_FEDSM, {}),
        ):
            print(f"{name}: {num_rounds} rounds at three sites")
            found[name] = _trained(folder / name, {"seed": seed, "num_rounds": num_rounds, **changed})
        _draw(folder)
        fedavg, fedsm = (found[name]["segmentation"] for name in (_FEDAVG, _FEDSM))
        result = {
            "sites": {
                site: {"fedavg": fedavg["sites"][site]["global"], **_dice(row)} for site, row in fedsm["sites"].items()
            },
            "mean": {"fedavg": fedavg["mean"]["global"], **_dice(fedsm["mean"])},
            "selector_accuracy": fedsm["selector_accuracy"],
            "rounds": num_rounds,
            "seed": seed,
            "seconds": time.perf_counter() - started,
            "environment": environment(),
        }
        (folder / _RESULTS).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def federated_table(result: dict) -> str:
    """Dice of every model at every site, as text."""
    columns = ("fedavg", "global", "personal", "super")
    lines = [f"{'Dice':<8} {'FedAvg':>8} {'FedSM: global':>14} {'personal':>9} {'super':>8}"]
    for site, row in {**result["sites"], "mean": result["mean"]}.items():
        lines.append("{:<8} {:>8.3f} {:>14.3f} {:>9.3f} {:>8.3f}".format(site, *(row[name] for name in columns)))
    lines.append(f"the selector names the right site for {100 * result['selector_accuracy']:.0f} % of the images")
    return "\n".join(lines)


def _trained(folder: Path, changed: dict) -> dict:
    file = resource_dir("recipes") / "federated" / "fedsm_discs.yaml"
    recipe = load_config(FederateRecipe, file, {"output_dir": str(folder), "overlay_every": 0, **changed})
    results, _ = federate(recipe)
    for path in (*folder.glob("checkpoint-*"), folder / "sites"):
        shutil.rmtree(path, ignore_errors=True)
    return results


def _draw(folder: Path) -> None:
    recipe = load_config(FederateRecipe, folder / _FEDSM / "recipe.yaml", {"output_dir": str(folder)})
    data = SegmentationData(recipe)
    rows = [data.site(site).evaluation[:_IMAGES] for site in data.names]
    images, true = (torch.cat([some[name] for some in rows]) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        common = SegmentationModel.from_pretrained(folder / _FEDAVG).eval()(images)["logits"]
    chosen = SuperModel.from_pretrained(folder / _FEDSM / "super_model").predict(images).logits
    predicted = {"FedAvg": common, "FedSM": chosen}
    masks = {name: (logits[:, 0] > 0).numpy() for name, logits in predicted.items()}
    save_sheet(folder / _OVERLAY, images.numpy(), true[:, 0].numpy(), masks)


def _dice(row: dict) -> dict[str, float]:
    return {name: row[name] for name in ("global", "personal", "super")}
