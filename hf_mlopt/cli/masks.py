"""`hf-mlopt masks export` and `hf-mlopt masks apply`: the zeros of one checkpoint, for another fine-tune."""

import argparse


HELP = "Export which weights of a pruned checkpoint are left, or prune another fine-tune of the same base alike."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    export = actions.add_parser("export", help="Write the masks of a pruned checkpoint.", allow_abbrev=False)
    export.add_argument("model", metavar="PRUNED", help="Local directory or Hub id of a pruned checkpoint.")
    export.add_argument("--output", metavar="FILE", required=True, help="Safetensors file to write; must be absent.")
    export.add_argument(
        "--min-zeros",
        metavar="FLOAT",
        type=float,
        default=0.1,
        help="Fraction of zeros from which a matrix counts as pruned (default: 0.1).",
    )
    apply = actions.add_parser("apply", help="Zero the same weights of another checkpoint.", allow_abbrev=False)
    apply.add_argument("masks", metavar="FILE", help="The file that `masks export` wrote.")
    apply.add_argument("model", metavar="MODEL", help="Local directory or Hub id of a fine-tune of the same base.")
    apply.add_argument("--output", metavar="DIR", required=True, help="Directory to write; must be absent or empty.")
    for action in (export, apply):
        action.add_argument("--revision", metavar="STR", help="Branch, tag or commit of the checkpoint on the Hub.")


def run(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.masks import apply_masks, export_masks

    if args.action == "export":
        result = export_masks(args.model, args.output, args.min_zeros, args.revision)
    else:
        result = apply_masks(args.masks, args.model, args.output, args.revision)
    share = 100 * result.num_zeros / result.num_weights
    print(f"masks of {result.num_tensors:,} tensors leave out {share:.1f} % of their {result.num_weights:,} weights")
    print(f"written to {result.output}")
