"""`hf-mlopt demo`: the main job in six minutes, without a network."""

import argparse
import os


HELP = "Train a small mixture of experts here, prune it with every method, distil, compare. No network needed."

_NEXT = """
The same on a real model (93 GB on disk; one layer at a time is in memory where it does not fit):
  hf-mlopt plan  mistralai/Mixtral-8x7B-v0.1 --sparsity 0.5
  hf-mlopt prune mistralai/Mixtral-8x7B-v0.1 --sparsity 0.5 --output mixtral-8x7b-50
  hf-mlopt distill mixtral-8x7b-50 --teacher mistralai/Mixtral-8x7B-v0.1 --output mixtral-8x7b-50-distilled
  hf-mlopt evaluate mistralai/Mixtral-8x7B-v0.1 mixtral-8x7b-50-distilled --perplexity wikitext --tasks arc_easy,piqa
  hf-mlopt push mixtral-8x7b-50-distilled USER/mixtral-8x7b-50-distilled"""

_NEXT_FEDERATED = """
The same on images of your own, a folder SITE/images with SITE/masks for every site:
  hf-mlopt federate recipes/federated/fedsm_discs.yaml --dataset FOLDER --image-size 64 --output-dir DIR"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", metavar="DIR", default="demo_output", help="Folder to write (default: demo_output)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Same seed, same numbers (default: 0).")
    parser.add_argument(
        "--short", action="store_true", help="A few training steps and variants: checks that all works."
    )
    parser.add_argument(
        "--federated", action="store_true", help="Instead: FedAvg against FedSM at three sites, in two minutes."
    )


def run(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
    if args.federated:
        return _federated(args)
    from transformers.utils import logging

    from hf_mlopt.demo.run import SHORT, Budget, recovery_table, run_demo, table

    logging.disable_progress_bar()  # one bar at a time, and those of single files are not it
    result = run_demo(args.output, args.seed, SHORT if args.short else Budget())
    print()
    print(table(result))
    print()
    print(recovery_table(result))
    print(
        f"\n{result['seconds']:.0f} s on {result['environment']['machine']}. A model this small shows that the methods"
    )
    print("work, not which is best: differences of a few per cent change with the seed.")
    print(f"\nwritten to {args.output}: perplexity.png, results.json,")
    print(
        "mixtral-demo-50/ (the pruned checkpoint with its card), mixtral-demo-50-distilled/ and mixtral-demo/ (dense)"
    )
    print(_NEXT)


def _federated(args: argparse.Namespace) -> None:
    from hf_mlopt.demo.federated import ROUNDS, SHORT_ROUNDS, federated_table, run_federated_demo

    result = run_federated_demo(args.output, args.seed, SHORT_ROUNDS if args.short else ROUNDS)
    print()
    print(federated_table(result))
    print(f"\n{result['seconds']:.0f} s on {result['environment']['machine']}. Sites as unlike as these are the best")
    print("case of FedSM; one model has to serve all in FedAvg. FedSM trains two a site: a round takes twice as long.")
    print(f"\nwritten to {args.output}: overlay.png, results.json, fedavg/, fedsm/ (with super_model/)")
    print(_NEXT_FEDERATED)
