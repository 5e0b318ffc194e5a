"""
Asynchronous vertical training: optima, what a slow party costs, and what masks and TLS cost.

    python benchmarks/vertical.py            # the full form: about an hour on 2 cores
    python benchmarks/vertical.py --short    # a few minutes, smaller everywhere

optimum    event clock: objective above its optimum and accuracy beside scikit-learn; target: 1e-5 at most, 0.1 points
straggler  event clock, 8 parties, one at a third of the speed: time to 1e-3 in step over that without, three seeds;
           target: 2.5, and 1.3 without longer steps for the slow party
processes  SAGA with real processes over gRPC and mTLS, whose step is a sleep of 50 ms: two cores would measure
           themselves
late       threads, a party that answers 20 ms late: updates a second over those without delay; target with pushed
           shares: 0.9
wire       real processes without sleep, 100,000 rows of 330 columns: seconds an epoch, bytes an update, with and
           without masks and TLS; 2, 3, 4, 8 and 16 parties; target: 2 s
sparse     one of 8 blocks of 60,000 rows of 47,236 columns, 73 non-zeros a row: memory and time of a step

Times of real processes are those of this machine under whatever else it does: read ratios. `optimum`, `straggler` and
`processes` need `../shared/data`.
"""

import argparse

from common import SHARED, Results
from transformers.utils import logging
from vertical_clock import optimum, straggler
from vertical_plot import draw
from vertical_processes import late, processes, sparse, wire


PARTS = {
    "optimum": optimum,
    "straggler": straggler,
    "processes": processes,
    "late": late,
    "wire": wire,
    "sparse": sparse,
}
NEED_DATA = ("optimum", "straggler", "processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    command = f"python benchmarks/vertical.py --parts {' '.join(args.parts)}" + (" --short" if args.short else "")
    results = Results("vertical_short" if args.short else "vertical", command)
    results.keep_others(set(args.parts))
    logging.set_verbosity_error()
    for part in args.parts:
        if part in NEED_DATA and not SHARED.is_dir():
            print(f"not run: {part}, {SHARED} is not there")
        else:
            PARTS[part](results, args.short)
    draw(results)


if __name__ == "__main__":
    main()
