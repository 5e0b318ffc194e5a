"""
What a step of RSGD and DOMO costs, and what they reach beside the usual optimizers.

    python benchmarks/optimizers.py                  # 40 minutes on 2 idle cores: step 5, quality 25, rounds 10
    python benchmarks/optimizers.py --short          # under 3 minutes
    python benchmarks/optimizers.py --device cuda    # the step alone, on a GPU, in a file of its own

step     an optimizer's step in turn with that of torch.optim.SGD (momentum 0.9), foreach and in a loop, and of AdamW
         for the wrapper, on parameters in the shapes of a transformer. Beside it the bytes that a step cannot do
         without, each array read once and written once, their rate, and that rate as a share of a triad
         a = b + s * c on arrays as large as all parameters. Last, whether torch.compile(optimizer.step) agrees
quality  perplexity or accuracy at the training point w, the average x and the explored iterate y, after the first
         epoch and the last. Every method's learning rate is the best of three on one seed, by its own point on a part
         that is not tested on; then three seeds. Two runs at a time, so that seconds are those of a busy machine
           digits           MLP, 1,200 images of scikit-learn's digits, tested on 397
           CIFAR-10 subset  ResNet of 7 convolutions, 13,500 lossy images, tested on 5,000; not for comparison with
                            results on CIFAR-10
           WT2-mini         LSTM, trained on half of the validation file of WikiText-2, tested on 40,000 tokens of
                            its test file; not a result on WikiText-2
rounds   the family of DOMO on digits, 10 clients with data of their own, 10 local steps a round: accuracy of the point
         that a variant evaluates, by round. Learning rate as above. Batches are drawn with replacement
traffic  what a client gives into the all-reduce at the end of a round: 4 bytes a parameter, twice that where local
         momenta are averaged, and 4 for each parameter group. A ring sends 2 (K - 1) / K of it
"""

import argparse
from collections.abc import Callable

import torch
from common import SHARED, Results, paired_ratio, seconds
from local_rounds import Task, accuracies, initial_parameters, simulate
from optimizers_plot import draw
from optimizers_quality import TASKS, measure_quality

from hf_mlopt.data import dirichlet_shares, label_sorted_shares, load_images
from hf_mlopt.optimizers import DOMO, RSGD, VARIANTS, RSGDWrapper


PARTS = {
    "step": ("bandwidth", "step", "compile"),
    "quality": ("tuning", "quality"),
    "rounds": ("rounds-tuning", "rounds", "traffic"),
}
SEEDS = (0, 1, 2)
# Hidden width, layers, vocabulary: 10 and 100 million parameters.
SHAPES = {"10M": (256, 8, 14_000), "100M": (768, 12, 20_000)}
SGD_FOREACH, SGD_LOOP, ADAMW = "SGDm, foreach", "SGDm, loop", "AdamW"
# Name -> how it is made, and arrays of a parameter's size that a step reads or writes at least.
OPTIMIZERS = {
    SGD_FOREACH: (lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, foreach=True), 5),
    SGD_LOOP: (lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, foreach=False), 5),
    ADAMW: (lambda p: torch.optim.AdamW(p, 1e-3), 7),
    "RSGDm": (lambda p: RSGD(p, 1e-3, 0.9), 7),
    "RSGDm, foreach": (lambda p: RSGD(p, 1e-3, 0.9, foreach=True), 7),
    "RSGD": (lambda p: RSGD(p, 1e-3), 5),
    "RSGD-AdamW": (lambda p: RSGDWrapper(p, 1e-3), 9),
    "DOMO": (lambda p: DOMO(p, 1e-3), 5),
    "DOMO-S": (lambda p: DOMO(p, 1e-3, "domo-s"), 6),
}
CLAIMS = {("RSGDm", SGD_FOREACH): 1.35, ("DOMO", SGD_FOREACH): 1.1}
PAIRS = [
    (SGD_LOOP, SGD_FOREACH),
    *(
        (name, base)
        for name in ("RSGDm", "RSGDm, foreach", "RSGD", "DOMO", "DOMO-S")
        for base in (SGD_FOREACH, SGD_LOOP)
    ),
    ("RSGD-AdamW", ADAMW),
]
NUM_CLIENTS, LOCAL_STEPS, BATCH, WEIGHT_DECAY, SIZES = 10, 10, 32, 5e-4, (64, 64, 64, 10)
SPLITS = {
    "label-sorted": lambda labels, seed: label_sorted_shares(labels, NUM_CLIENTS, 0.0, seed),
    "10 % similar": lambda labels, seed: label_sorted_shares(labels, NUM_CLIENTS, 0.1, seed),
    "Dirichlet 0.5": lambda labels, seed: dirichlet_shares(labels, NUM_CLIENTS, 0.5, seed),
}
MEMBERS = [(name, None) for name in VARIANTS if not name.startswith("domo")]
MEMBERS += [(name, fusion) for name in ("domo", "domo-s") for fusion in (0.3, 0.6, 0.9)]
RATES = {"SGD": (0.01, 0.03, 0.1), "AdamW": (1e-3, 3e-3, 1e-2)}  # by what takes the local steps


def measure_step(results: Results, device: str, threads: tuple[int, ...], shapes: list[str], pairs: int) -> None:
    """Every pair of optimizers on the same parameters and gradients, with states of their own."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    before = torch.get_num_threads()
    for number in threads:
        torch.set_num_threads(number)
        where = {"device": name, "threads": number}
        for shape in shapes:
            parameters = transformer_parameters(*SHAPES[shape], device)
            elements = sum(parameter.numel() for parameter in parameters)
            rates = bandwidth(elements, device, synchronize)
            results.add(kind="bandwidth", **where, elements=elements, **rates)
            for one, baseline in PAIRS:
                steps = [finished(OPTIMIZERS[which][0](parameters).step, synchronize) for which in (one, baseline)]
                ratio = paired_ratio(*steps, pairs if shape == "100M" else 2 * pairs)
                least = 4 * elements * OPTIMIZERS[one][1]
                rate = least / (ratio["ratio_median"] * ratio["baseline_seconds"])
                row = {"size": shape, "parameters": elements, "name": one, "baseline": baseline, **ratio}
                row |= {"least_bytes": least, "bytes_per_second": rate, "share_of_triad": rate / rates["triad"]}
                results.add(kind="step", **where, **row, claim_at_most=CLAIMS.get((one, baseline)))
    torch.set_num_threads(before)


def transformer_parameters(hidden: int, layers: int, vocabulary: int, device: str) -> list[torch.nn.Parameter]:
    """An embedding, and for every layer the matrices, biases and norms of attention and MLP, with gradients."""
    square, up, down = (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)
    layer = [*[square, (hidden,)] * 4, up, (4 * hidden,), down, (hidden,), *[(hidden,)] * 4]
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in [(vocabulary, hidden), *layer * layers]:
        values, gradient = (torch.randn(shape, generator=generator, device=device) * 0.02 for _ in range(2))
        parameters.append(torch.nn.Parameter(values))
        parameters[-1].grad = gradient
    return parameters


def finished(work: Callable[[], object], synchronize: Callable[[], None]) -> Callable[[], None]:
    """The work and the wait for its end, which a GPU leaves to the caller."""

    def run():
        work()
        synchronize()

    return run


def bandwidth(elements: int, device: str, synchronize: Callable[[], None]) -> dict[str, float]:
    """Bytes per second, the best of seven, of a copy (2 arrays) and of a triad (3 arrays)."""
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    kinds = {"copy": (2, lambda: a.copy_(b)), "triad": (3, lambda: torch.add(b, c, alpha=3.0, out=a))}
    rates = {}
    for name, (arrays, work) in kinds.items():
        work = finished(work, synchronize)
        rates[name] = 4 * arrays * elements / min([seconds(work) for _ in range(8)][1:])
    return rates


def measure_compiled(results: Results, device: str, names: list[str]) -> None:
    """Largest difference of any parameter between compiled and eager steps; float32."""
    for name in names:
        torch._dynamo.reset()
        own, others = (transformer_parameters(64, 2, 500, device) for _ in range(2))
        compiled, eager = (OPTIMIZERS[name][0](parameters) for parameters in (own, others))
        step = torch.compile(compiled.step)
        start = [parameter.detach().clone() for parameter in own]
        for _ in range(5):
            for ours, theirs in zip(own, others, strict=True):
                ours.grad = torch.randn_like(ours)
                theirs.grad = ours.grad.clone()
            step(), eager.step()
        moved = max(float((end.detach() - begin).abs().max()) for end, begin in zip(others, start, strict=True))
        apart = max(float((ours - theirs).detach().abs().max()) for ours, theirs in zip(own, others, strict=True))
        results.add(kind="compile", device=device, name=name, steps=5, max_difference=apart, max_change=moved)


def measure_rounds(results: Results, seeds: tuple[int, ...], num_rounds: int) -> None:
    """All splits and learning rates, then all splits and seeds, of a variant at once."""
    chosen, at_edge, reported = {}, [], sorted({1, 2, 5, 10, 15, 20, 30, 40, num_rounds})
    reported = [number for number in reported if number <= num_rounds]
    train, validation, test = digits()
    for variant, fusion in MEMBERS:
        member = variant if fusion is None else f"{variant} {fusion}"
        rates = RATES[VARIANTS[variant].base]
        runs = [(split, seeds[0], rate) for split in SPLITS for rate in rates]
        task = rounds_task(train, runs, num_rounds)
        *_, last = simulate(task, variant, rates_of(runs), fusion)
        tuned = list(zip(runs, accuracies(task, last, *validation).tolist(), strict=True))
        best = {}
        for split in SPLITS:  # a tie goes to the smaller rate
            of_split = {rate: value for (where, _, rate), value in tuned if where == split}
            best[split] = max(of_split, key=of_split.get)
            results.add(
                kind="rounds-tuning", split=split, member=member, validation=of_split, learning_rate=best[split]
            )
            if best[split] in (rates[0], rates[-1]):
                at_edge.append(f"{split}: {member}, {best[split]:g}")
        chosen[member] = best
        runs = [(split, seed, best[split]) for split in SPLITS for seed in seeds]
        task = rounds_task(train, runs, num_rounds)
        found = [accuracies(task, x, *test).tolist() for x in simulate(task, variant, rates_of(runs), fusion)]
        for number, (split, seed, rate) in enumerate(runs):
            by_round = {after: found[after - 1][number] for after in reported}
            row = {"split": split, "member": member, "learning_rate": rate, "seed": seed, "accuracy": by_round}
            results.add(kind="rounds", **row)
    results.note(rounds_learning_rates=chosen, rounds_best_at_the_edge_of_the_grid=at_edge)


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Images and labels to train on, to tune on (200) and to test on."""
    train, test = (load_images("digits", split) for split in ("train", "test"))
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    (images, labels), held_out = [
        (torch.from_numpy(data.images).flatten(1), torch.from_numpy(data.labels)) for data in (train, test)
    ]
    return (images[order[200:]], labels[order[200:]]), (images[order[:200]], labels[order[:200]]), held_out


def rates_of(runs: list[tuple[str, int, float]]) -> torch.Tensor:
    return torch.tensor([rate for _, _, rate in runs])


def rounds_task(data: tuple[torch.Tensor, torch.Tensor], runs: list[tuple], num_rounds: int) -> Task:
    """The shares, the first parameters and the batches of every run, which its split and seed decide."""
    batches, weights = [], []
    for split, seed, _ in runs:
        shares = [torch.from_numpy(share) for share in SPLITS[split](data[1].numpy(), seed)]
        sizes = torch.tensor([len(share) for share in shares])
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(num_rounds * LOCAL_STEPS, NUM_CLIENTS, BATCH, generator=generator)
        places = (drawn * sizes[:, None]).long()
        batches.append(torch.stack([share[places[:, k]] for k, share in enumerate(shares)], dim=1))
        weights.append(sizes / sizes.sum())
    start = torch.stack([initial_parameters(SIZES, seed) for _, seed, _ in runs])
    return Task(SIZES, *data, torch.stack(batches, 1), torch.stack(weights), start, LOCAL_STEPS, WEIGHT_DECAY)


def measure_traffic(results: Results) -> None:
    """Bytes that `DOMO.sync` asks to have averaged, for the network of the rounds."""
    elements = len(initial_parameters(SIZES, 0))
    for variant in VARIANTS:
        sent, parameter = [], torch.nn.Parameter(torch.zeros(elements))
        parameter.grad = torch.zeros(elements)
        optimizer = DOMO([parameter], 0.1, variant)
        optimizer.step()
        optimizer.sync(lambda flat, sent=sent: sent.append(flat.nbytes) or flat)
        row = {"parameters": elements, "bytes_per_round": sent[0], "bytes_per_local_step": sent[0] / LOCAL_STEPS}
        results.add(kind="traffic", variant=variant, **row, bytes_of_gradients_per_step=4 * elements)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Little data, one seed, no tuning: checks that it runs.")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="Only these parts (default: all).")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Of the step; cuda measures no more.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = args.device == "cuda"
    parts = ["step"] if on_gpu else args.only or list(PARTS)
    name = f"optimizers{'_gpu' if on_gpu else ''}{'_short' if args.short else ''}"
    words = f"{' --device cuda' if on_gpu else ''}{' --short' if args.short else ''}"
    results = Results(name, f"python benchmarks/optimizers.py{words}")
    results.keep_others({kind for part in parts for kind in PARTS[part]})
    not_run = [part for part in PARTS if part not in parts]
    seeds = SEEDS[:1] if args.short else SEEDS
    if "step" in parts:
        threads, sizes, pairs = ((1,), ["10M"], 3) if args.short else ((1, 2), list(SHAPES), 9)
        measure_step(results, args.device, (1,) if on_gpu else threads, sizes, pairs)
        own = [name for name in OPTIMIZERS if name.startswith(("RSGD", "DOMO"))]
        measure_compiled(results, args.device, own[:1] if args.short else own)
    if "rounds" in parts:
        measure_traffic(results)
        measure_rounds(results, seeds, num_rounds=4 if args.short else 40)
    if "quality" in parts:
        tasks = [task for task in TASKS if task == "digits" or SHARED.is_dir()]
        not_run += [f"quality, {task}: no {SHARED}" for task in TASKS if task not in tasks]
        measure_quality(results, tasks, seeds, args.short)
    results.note(not_run=not_run)
    draw(results)
    print(f"written to {results.path} and {results.path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
