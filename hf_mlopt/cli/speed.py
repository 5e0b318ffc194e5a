"""`hf-mlopt speed MODEL`."""

import argparse

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.speed import SpeedConfig, measure_speed


HELP = "Measure whether pruning makes the experts of a model faster on this machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Local directory or Hub id.")
    add_fields(parser, SpeedConfig, exclude=("model",))


def run(args: argparse.Namespace) -> None:
    config = load_config(SpeedConfig, overrides=arguments_given(args, SpeedConfig))
    record = measure_speed(config)
    shape = record["experts"]
    print(
        f"{config.model}: one layer, {shape['num_experts']} experts, top-{shape['top_k']}, hidden "
        f"{shape['hidden_size']}, intermediate {shape['intermediate_size']}, {shape['dtype']}"
    )
    print(f"random weights on {_machine(record)}, routing {record['routing']}, median of {_rounds(record)} rounds")
    print()
    print("\n".join(table(record)))
    print()
    for row in record["rows"]:
        if row["implementation"] != "grouped_mm":
            print(f"tokens {row['tokens']}: dense is {row['implementation']}, here faster than grouped_mm")
    for line in record["does_not_apply"]:
        print(f"does not apply  {line}")
    for line in record["verdict"]:
        print(line)
    print("Removing and zeroing weights changes what the model says: hf-mlopt evaluate measures that.")
    if config.output:
        print(f"written to {config.output}")


def table(record: dict) -> list[str]:
    """
    Speed against dense, a line for each number of tokens, and the bytes of weights below.

    Args:
        record (`dict`): Of [`~workflows.speed.measure_speed`].
    """
    variants = {name: variant for name, variant in record["variants"].items() if name != "dense"}
    lines = [["tokens", "per expert", "dense", *(variant["what"] for variant in variants.values())]]
    for row in record["rows"]:
        counts = row["tokens_per_expert"]["dense"]
        spread = f"{min(counts)}-{max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
        speedups = [_speedup(row["speedup"][name]) for name in variants]
        lines.append([str(row["tokens"]), spread, f"{1000 * row['seconds']['dense']:.3g} ms", *speedups])
    size = record["variants"]["dense"]["bytes"]
    shares = [f"x {variant['bytes'] / size:.4g}" for variant in variants.values()]
    lines.append(["weights", "", f"{size / 1e6:.4g} MB", *shares])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _speedup(speedup: dict[str, float]) -> str:
    return f"x {speedup['median']:.2f} ± {(speedup['high'] - speedup['low']) / 2:.2f}"


def _machine(record: dict) -> str:
    machine = record["environment"]["machine"]
    return f"{record['device']} ({machine}" + (f", {record['threads']} in use)" if record["device"] == "cpu" else ")")


def _rounds(record: dict) -> str:
    rounds = [row["rounds"] for row in record["rows"]]
    return f"{rounds[0]}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
