"""`hf-mlopt pack MODEL --output DIR`."""

import argparse


HELP = "Store a pruned checkpoint without its zeros, as a bitmask and the other values; lossless."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Local directory or Hub id of a pruned checkpoint.")
    parser.add_argument("--output", metavar="DIR", required=True, help="Directory to write; must be absent or empty.")
    parser.add_argument("--revision", metavar="STR", help="Branch, tag or commit on the Hub.")


def run(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.pack import pack_checkpoint

    result = pack_checkpoint(args.model, args.output, args.revision)
    print(f"packed {result.num_packed:,} of {result.num_tensors:,} tensors")
    ratio = result.packed_bytes / result.dense_bytes
    print(f"dense {result.dense_bytes:,} bytes, packed {result.packed_bytes:,} bytes, ratio {ratio:.3f}")
    print(f"written to {result.output}")
    print(f"to use it: hf-mlopt unpack {args.output} --output DIR")
