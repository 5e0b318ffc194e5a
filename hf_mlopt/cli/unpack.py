"""`hf-mlopt unpack DIR --output DIR`."""

import argparse


HELP = "Give back the checkpoint that was packed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="Directory that `pack` wrote, or the Hub id of one.")
    parser.add_argument("--output", metavar="DIR", required=True, help="Directory to write; must be absent or empty.")
    parser.add_argument("--revision", metavar="STR", help="Branch, tag or commit on the Hub.")


def run(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.pack import unpack_checkpoint

    result = unpack_checkpoint(args.model, args.output, args.revision)
    print(f"unpacked {result.num_packed:,} of {result.num_tensors:,} tensors")
    ratio = result.packed_bytes / result.dense_bytes
    print(f"packed {result.packed_bytes:,} bytes, dense {result.dense_bytes:,} bytes, ratio {ratio:.3f}")
    print(f"written to {result.output}")
