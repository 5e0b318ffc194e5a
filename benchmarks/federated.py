"""
The federated Trainer: what its rounds cost, how it grows with the number of sites, and what DOMO gains through it.

    python benchmarks/federated.py            # the full form: planned for 90 minutes on 2 cores
    python benchmarks/federated.py --short    # under 4 minutes

overhead  seconds of a round in process beside the sum of its local trainings; target: at most 5 % more
engines   the same through Flower, simulated and with SuperNodes: seconds beyond local training, and the bits
scale     peak memory with 10, 30 and 100 sites and a model of 10 million parameters
quality   DOMO and its family, FedAvg and SCAFFOLD: test accuracy at a quarter, half and all of the rounds, ten sites
peers     Flower's own FedAvg and FedAvgM strategies on the same updates: same weights, time of an aggregation

Rates are tuned over three values on one seed by 1,000 held-out training images, then run on two more. Needs
`../shared/data` for `quality`.
"""

import argparse

from common import SHARED, Results
from federated_costs import engines, overhead, peers, scale
from federated_plot import draw
from federated_quality import METHODS, TASKS, quality
from transformers.utils import logging


PARTS = ("overhead", "engines", "scale", "peers", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="Processes for the runs of quality.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seconds", type=float, help="Stop taking up runs of quality after so long.")
    parser.add_argument("--cpu", action="store_true", help="Leave a GPU alone.")
    parser.add_argument("--resume", action="store_true", help="Keep the runs of quality that have a row.")
    parser.add_argument("--name", default="federated", help="Of the file of results.")
    args = parser.parse_args()
    suffix = "_short" if args.short else ""
    command = f"python benchmarks/federated.py --parts {' '.join(args.parts)}" + (" --short" if args.short else "")
    results = Results(args.name + suffix, command)
    kinds = {part: {part} for part in PARTS} | {"quality": {"quality summary", *(() if args.resume else ("quality",))}}
    results.keep_others(set().union(*(kinds[part] for part in args.parts)))
    logging.set_verbosity_error()
    for part, measure in (("overhead", overhead), ("engines", engines), ("scale", scale), ("peers", peers)):
        if part in args.parts:
            measure(results, args.short)
    if "quality" in args.parts:
        if SHARED.is_dir():
            quality(results, args)
        else:
            print(f"not run: quality, {SHARED} is not there")
    draw(results)


if __name__ == "__main__":
    main()
