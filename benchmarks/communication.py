"""
What coded gradients lose, cost, and save.

    python benchmarks/communication.py                        # 17 minutes on 2 idle cores, and quality
    python benchmarks/communication.py --short                # 2 minutes, and quality
    python benchmarks/communication.py --parts error codec    # these alone; rows of other parts stay
    python benchmarks/communication.py --device cuda          # communication_gpu.py: codecs and a run of two ranks

error    3 minutes. E‖Q(v) - v‖² / ‖v‖² of every codec in blocks of 2,048, on Gaussian, Laplace, Student-t3 and skewed
         values (70 % N(-0.5, 0.25²), 30 % N(1, 0.5²)), three seeds, and on gradients of a Llama of two layers that
         learns TinyStories by the byte, and of a ResNet of 7 convolutions on lossy images of CIFAR-10, at steps 1, 20
         and 100. Beside it the least error that any levels of each block can have, by dynamic programming on the same
         blocks, and 2^(-2 R), less than which no code of R bits can lose of Gaussian values. R counts the levels. The
         gradients are those that travel coded: no vectors, embeddings, head
codec    2 minutes. Elements per second that are encoded and decoded on one thread, and the time in copies of a float32
         tensor of the same length. Then ORQ-9 against 4-bit codes of evenly spaced levels, scaled by the largest
         magnitude (qsgd-15) and by the range (linear-16), in turn; the claim is at most 4 times their time
link     12 minutes. A step of a transformer of 25 million parameters on 2 and 4 ranks, each on one thread in a network
         namespace of its own, behind a link of 100 Mbit/s and 1 Gbit/s (tc tbf, both ways): plain DDP in float32,
         torch's hooks for bfloat16 (DDP refuses it by name on gloo, where it runs) and PowerSGD of rank 4 (with all
         gradients in one bucket; with several it hangs on gloo), every codec, with step-ahead where it is biased. On
         two ranks also at 300 Mbit/s and 3 Gbit/s, for the bandwidth below which a codec beats bfloat16, beside the
         one that `hf_mlopt.communication.pays` predicts from the rate of the codec. Where namespaces cannot be made
         (it takes root, ip and tc), the time of the wire is slept in the exchange and rows say "emulated". Four ranks
         share two cores, so that they compute half as fast as two
quality  convergence of modes and codecs, three seeds, on a causal LM and a ResNet: communication_quality.py says more
"""

import argparse

import torch
from common import SHARED, Results


PARTS = {
    "error": ("error", "optimum"),
    "codec": ("codec", "codec-ratio"),
    "link": ("link", "crossover"),
    "quality": ("tuning", "quality"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Little of everything: checks that it runs.")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="Only these (default: all).")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda runs communication_gpu.py.")
    parser.add_argument("--groups", type=int, default=1, help="Runs of quality at a time, of 4 processes each.")
    parser.add_argument("--resume", action="store_true", help="Keep the rows of quality that are there.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.device == "cuda":
        import communication_gpu

        communication_gpu.main([])
        return
    words = " --short" if args.short else ""
    results = Results(f"communication{words.replace(' --', '_')}", f"python benchmarks/communication.py{words}")
    results.keep_others(set() if args.resume else {kind for part in args.parts for kind in PARTS[part]})
    there = {row["kind"] for row in results.record["rows"]}  # of earlier runs
    not_run = [part for part in PARTS if part not in args.parts and not there & set(PARTS[part])]
    if not SHARED.is_dir():
        not_run += [f"{part} on real data: no shared data" for part in ("error", "quality") if part in args.parts]
    if "error" in args.parts:
        from communication_codecs import measure_errors

        if args.short:
            measure_errors(results, seeds=(0,), blocks=2, draws=2, steps=(1, 3))
        else:
            measure_errors(results, seeds=(0, 1, 2), blocks=16, draws=8, steps=(1, 20, 100))
    if "codec" in args.parts:
        from communication_codecs import CODECS, gradient, measure_claims, measure_codec

        flat, pairs = gradient(1 << (20 if args.short else 24), "cpu"), 3 if args.short else 9
        for name in CODECS:
            measure_codec(results, name, flat, pairs)
        measure_claims(results, flat, pairs)
    if "link" in args.parts:
        from communication_link import measure_link

        measure_link(results, args.short)
    if "quality" in args.parts and SHARED.is_dir():
        from communication_quality import measure_quality

        measure_quality(results, args.short, args.groups)
    # Parts may have run on other machines.
    machines = {**results.record.get("machines", {}), **dict.fromkeys(args.parts, results.record["environment"])}
    results.note(not_run=not_run, machines=machines)
    from communication_plot import draw

    draw(results)
    print(f"written to {results.path} and {results.path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
