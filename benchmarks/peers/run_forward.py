"""
Plain forward passes over the calibration tokens, in the environment that runs this file: the unit of the other times.

    python run_forward.py MODEL_DIR TOKENS_FILE [--batch-size 8] [--repeats 3] [--threads 2]

Prints one JSON line: seconds of each pass (after one pass to warm up), their median, and peak memory.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from probe import Record
from shape import read_tokens, weight_bytes
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = Record(
        tool="plain forward",
        threads=arguments.threads,
        batch_size=arguments.batch_size,
        model_bytes=weight_bytes(arguments.model),
    )
    with record.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    batches = read_tokens(arguments.tokens).split(arguments.batch_size)
    seconds, cpu_seconds = [], []
    with record.phase("forward"), torch.no_grad():
        for _ in range(1 + arguments.repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            for batch in batches:
                model(batch, use_cache=False)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    record.facts.update(
        seconds=seconds[1:],
        median=statistics.median(seconds[1:]),
        cpu_median=statistics.median(cpu_seconds[1:]),
    )
    print(record.close())


if __name__ == "__main__":
    main()
