"""
FedSM and Auto-FedRL beside the methods they are compared with: segmentation at sites that differ, and hyper-parameters
that tune themselves.

    python benchmarks/federated_medical.py            # the full form: about 75 minutes on 2 cores
    python benchmarks/federated_medical.py --short    # under 4 minutes

nuclei         64 x 64 images of five kinds of microscope, each a site, and a sixth, mixed group that stays unseen:
               centralised, local only, FedAvg, FedProx, SCAFFOLD, FedBN, Ditto and FedSM; Dice per site, as the mean
               over cases, of all models there are; FedSM's super model with both selectors
shared         what FedSM costs where there is nothing to personalise: one distribution at three sites
auto_fedrl     CIFAR subset at eight sites (Dirichlet 0.5) and the nuclei: four policies beside fixed rates, random
               search and a grid in as many rounds; and what a policy costs in a round
ablation       FedSM's pull (lambda), bytes per site and round, and the window of rewards; the threshold (gamma) is in
               every row of FedSM, for it takes part in no training
leave_one_out  FedSM trained without a site, judged there

Every method has as many rounds of one local epoch. Rates are tuned over three values on the first seed, in fewer
rounds, by a fifth of the training images; then all of these are trained on. (Three centralised runs of an earlier,
smaller network on the first seed's test images showed that it was too weak; rates were not chosen by them.) Seeds
change first weights and the order of rows, not the sites. The norms of this U-Net are group norms, without buffers:
FedBN keeps their scales and shifts at the sites.

Estimated for 2 cores that do nothing else, from parts of it: nuclei 30 minutes (1.5 s of a core a round, twice that
for FedSM and Ditto), auto_fedrl 27, leave_one_out 8, ablation 5, shared 2. On cores half as fast it takes twice as
long, of which --rounds 40 saves a quarter.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from typing import Any

from common import SHARED, Results, require
from federated_medical_policies import WINDOWS, auto_fedrl, overhead, tuned_methods
from federated_medical_runs import METHODS, PLAIN_SGD, SITES, nuclei, shared, traffic
from federated_medical_summary import summarise, tuned_rates


RATES, SGD_RATES = (1e-3, 2e-3, 4e-3), (0.3, 1.0, 3.0)
PULLS = (0.5, 0.9)  # beside 0.7
NAMED_POLICIES = ("gaussian", "categorical", "cholesky", "mlp")
FUNCTIONS: dict[str, Callable[..., dict]] = {
    "nuclei tuning": nuclei,
    "nuclei": nuclei,
    "shared": shared,
    "auto_fedrl": auto_fedrl,
    "auto_fedrl on nuclei": partial(auto_fedrl, task="nuclei"),
    "overhead": overhead,
    "bytes": traffic,
    "pull": nuclei,
    "window": auto_fedrl,
    "leave one out": nuclei,
}
PARTS = {
    "nuclei": ("nuclei tuning", "nuclei"),
    "shared": ("shared",),
    "auto_fedrl": ("overhead", "auto_fedrl", "auto_fedrl on nuclei"),
    "ablation": ("bytes", "pull", "window"),
    "leave_one_out": ("leave one out",),
}
TUNED = {"auto_fedrl": "cifar", "auto_fedrl on nuclei": "nuclei"}  # kind to its task
Job = tuple[str, dict[str, Any]]


def run(kind: str, settings: dict[str, Any]) -> dict:
    """One row, in a process of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return FUNCTIONS[kind](**settings)


def jobs(kind: str, options: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """Settings of the runs of a kind, those that matter most first."""
    seeds, tuned = options.seeds, tuned_rates(results)
    # Without a tuning, the rate of the recipe.
    common = {"width": options.width, "rounds": options.rounds}
    fedsm = {"method": "FedSM", "rate": tuned.get("FedSM", RATES[1]), "seed": seeds[0], **common}
    if kind == "nuclei tuning":
        common |= {"seed": seeds[0], "rounds": options.tuning_rounds, "held_out": "validation"}
        rates = {method: SGD_RATES if method in PLAIN_SGD else options.rates for method in options.methods}
        tried = slice(1, 2) if options.short else slice(None)
        return [{"method": name, "rate": rate, **common} for name in options.methods for rate in rates[name][tried]]
    if kind == "nuclei":
        rates = {method: tuned[method] for method in options.methods if method in tuned}
        return [{"method": name, "rate": rates[name], "seed": seed, **common} for seed in seeds for name in rates]
    if kind == "shared":
        common = {"rate": RATES[1], "rounds": 3 if options.short else 20}
        return [{"method": method, "seed": seed, **common} for seed in seeds for method in ("FedSM", "FedAvg")]
    if kind in TUNED:
        common = {"rounds": options.tuned_rounds}
        methods = tuned_methods(TUNED[kind])
        if options.short:
            methods = (methods[0], "gaussian")
        return [{"method": name, "seed": seed, **common} for seed in seeds for name in methods]
    if kind == "window":
        common = {"seed": seeds[0], "rounds": options.tuned_rounds}
        return [{"method": f"window {rounds}", **common} for rounds in WINDOWS]
    if kind == "overhead":
        common = {"rounds": 3 if options.short else 9}
        policies = [{"method": name, "evaluates": True, **common} for name in NAMED_POLICIES]
        return [{"method": "fixed 0.05", "evaluates": some, **common} for some in (False, True)] + policies
    if kind == "bytes":
        selectors = (("FedAvg", "none"), ("FedSM", "learned"), ("FedSM", "moments"))
        return [{"method": method, "selector": selector} for method, selector in selectors]
    varied = [{"pull": pull} for pull in PULLS] if kind == "pull" else [{"without": site} for site in SITES]
    return [{**fedsm, **one} for one in (varied[:1] if options.short else varied)]


def run_all(pool, wanted: list[Job], results: Results, workers: int, until: float | None) -> None:
    """Adds a row for each run as it ends; what has one is not run again."""
    rows = results.record["rows"]
    pending = [
        (kind, settings)
        for kind, settings in wanted
        if not any({**row, "kind": kind, **settings} == row for row in rows)
    ]
    for (kind, settings), found in _finished(pool, pending, workers, until):
        results.add(kind=kind, **settings, **found)


def _finished(pool, pending: list[Job], workers: int, until: float | None) -> Iterator[tuple[Job, dict]]:
    """No run is begun after `until`, and none is cut off."""
    pending, running = list(pending), {}
    while pending or running:
        is_late = until is not None and time.time() > until
        while pending and len(running) < workers and not is_late:
            job = pending.pop(0)
            running[pool.submit(run, *job)] = job
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            try:
                yield job, future.result()
            except Exception as error:  # a rate at which training leaves the finite numbers
                print(f"failed: {job}: {error}"[:400], flush=True)
    for job in pending:
        print(f"not run: {job}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="Processes, a run each.")
    parser.add_argument("--seconds", type=float, help="Begin no run after so long.")
    parser.add_argument("--resume", action="store_true", help="Keep the runs that have a row.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Rates are tuned on the first one.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="Of nuclei.")
    parser.add_argument("--rounds", type=int, default=60, help="Of nuclei, leave_one_out and the pulls.")
    parser.add_argument("--tuning-rounds", type=int, default=10)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="Of AdamW, to tune over.")
    parser.add_argument("--width", type=int, default=8, help="Of the U-Net; another one needs another --name.")
    parser.add_argument("--tuned-rounds", type=int, default=40, help="Of auto_fedrl; a multiple of 8.")
    parser.add_argument("--name", default="federated_medical", help="Of the file of results.")
    options = parser.parse_args()
    require("monai", "matplotlib")
    if options.tuned_rounds % 8:
        parser.error(f"--tuned-rounds {options.tuned_rounds}: must be a multiple of 8")
    if options.short:
        options.seeds, options.rounds, options.tuning_rounds, options.tuned_rounds = [0], 2, 1, 8
        options.methods = ["FedSM", "centralised", "FedAvg"]
    command = f"python benchmarks/federated_medical.py --parts {' '.join(options.parts)}"
    results = Results(options.name + ("_short" if options.short else ""), command + " --short" * options.short)
    kinds = {kind for part in options.parts for kind in PARTS[part]}
    results.keep_others(set() if options.resume else kinds)
    until = None if options.seconds is None else time.time() + options.seconds
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for part in options.parts:
            if part != "shared" and not SHARED.is_dir():
                print(f"not run: {part}, {SHARED} is not there")
                continue
            for kind in PARTS[part]:
                wanted = [(kind, settings) for settings in jobs(kind, options, results)]
                run_all(pool, wanted, results, options.workers, until)
    summarise(results)
    from federated_medical_plot import draw

    draw(results)


if __name__ == "__main__":
    main()
