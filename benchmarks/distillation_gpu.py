"""
Time and memory of distillation on one GPU, for a model of Mixtral-8x7B's width.

    python benchmarks/distillation_gpu.py    # planned for under 5 minutes on an H100; 60 GB of host memory

Recorded on an H200: step, in 17 s. The layer-wise part has run on a CPU only, in a small shape.

step        an optimizer step of expert-wise distillation with a frozen teacher, against a cross-entropy step of the
            same student and a forward pass of the teacher, in turn; the claim is at most 1.25. All weights are
            bfloat16 and trained by SGD, which keeps no state: that of AdamW for four layers would not fit beside
            teacher, student, gradients and masks (42 GB), and as it would be in both steps, the ratio would be lower.
            Zeros are held in both
            peak_bytes of every pass is what is allocated at its highest, weights included
layer-wise  seconds per layer, and peak memory for two depths, with both models in host memory: the layers that are
            trained are on the device, with float32 masters and AdamW, one at a time

Weights and tokens are random, so that errors and losses mean nothing. If fewer layers fit than are asked for, as many
are taken, and the row says so. A row whose run was out of memory says that; the others go on. Needs torch,
transformers, accelerate, peft and what they bring; no data, no network.
"""

import argparse
import statistics
import tempfile
import time

import torch
from common import Results, paired_ratio, require
from pruning_gpu import make_model, shape
from timed_sweep import now
from transformers.utils import logging

from hf_mlopt.distillation.config import LayerwiseConfig
from hf_mlopt.pruning import MoEPruner, PruningConfig
from hf_mlopt.pruning.pruner import peak_memory


BYTES_PER_WEIGHT = 2 + 2 + 2 + 1  # student, teacher, gradient, mask
CLAIM = 1.25


def student_and_teacher(arguments, layers: int, device: torch.device):
    """Random bfloat16 models, the student with half of its expert weights zero."""
    teacher, student = (make_model(shape(arguments, layers), device) for _ in range(2))
    MoEPruner(PruningConfig(method="magnitude", sparsity=0.5)).prune(student, progress=False)
    return student, teacher


def tokens_of(arguments, windows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(arguments.vocabulary, (windows, arguments.length), generator=generator)


def layers_that_fit(arguments, device: torch.device) -> int:
    """How many layers the device has room for in the step, beside embeddings and what a batch takes."""
    if device.type != "cuda":
        return arguments.layers
    meta = torch.device("meta")
    sizes = [make_model(shape(arguments, layers), meta).num_parameters() for layers in (1, 2)]
    layer = sizes[1] - sizes[0]
    slots = 2 * arguments.batch_size * arguments.length
    kept = slots * (10 * arguments.intermediate + 12 * arguments.hidden)  # bytes that a layer keeps for its gradient
    logits = 5 * slots * arguments.vocabulary  # bfloat16, float32, and their gradients
    largest = 4 * arguments.experts * arguments.hidden * 2 * arguments.intermediate  # a gradient, and it masked
    free = torch.cuda.mem_get_info(device)[0] - BYTES_PER_WEIGHT * (sizes[0] - layer) - logits - largest - 2e9
    return max(1, min(arguments.layers, int(free // (BYTES_PER_WEIGHT * layer + kept))))


def make_trainer(student, teacher, device: torch.device, **settings):
    """The trainer of the package; its own loop is not used, its targets, losses and backward pass are."""
    from hf_mlopt.distillation import DistillationArguments, ExpertDistillationTrainer

    arguments = DistillationArguments(
        output_dir=tempfile.gettempdir(),
        mlopt_optim="sgd",
        learning_rate=0.0,  # the time is the same, and nothing drifts
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    trainer = ExpertDistillationTrainer(student, teacher, arguments, train_dataset=[{"input_ids": [0, 0]}])
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def measure_step(arguments, results: Results, device: torch.device) -> None:
    """The claim, and time and memory of every pass."""
    from hf_mlopt.training import KeepZerosCallback

    layers = layers_that_fit(arguments, device)
    student, teacher = student_and_teacher(arguments, layers, device)
    student.train()
    tokens = tokens_of(arguments, arguments.batch_size).to(device)
    distilling = make_trainer(student, teacher, device)
    plain = make_trainer(student, None, device, lmbda=0.0)
    zeros = KeepZerosCallback()
    zeros.on_train_begin(None, None, None, model=student)

    def step(trainer):
        (inputs,), items = trainer.get_batch_samples(iter([{"input_ids": tokens, "labels": tokens}]), 1, device)
        trainer.training_step(trainer.model, inputs, items)
        trainer.optimizer.step()
        zeros.on_optimizer_step(None, None, None)
        student.zero_grad()
        now(device)

    @torch.no_grad()
    def forward():
        teacher(tokens, use_cache=False, logits_to_keep=1)
        now(device)

    def baseline():
        forward()
        step(plain)

    distilling_step = paired_ratio(lambda: step(distilling), baseline, arguments.pairs)
    results.add(
        kind="ratio",
        name="distillation step / cross-entropy step and a forward pass of the teacher",
        claim_at_most=CLAIM,
        tokens=tokens.numel(),
        **distilling_step,
    )
    passes = {"distillation": lambda: step(distilling), "cross-entropy": lambda: step(plain), "teacher": forward}
    for name, function in passes.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = []
        for _ in range(arguments.pairs):
            begun = now(device)
            function()
            times.append(time.perf_counter() - begun)
        results.add(
            kind="pass",
            name=name,
            seconds_median=statistics.median(times),
            seconds_min=min(times),
            seconds_max=max(times),
            tokens_per_second=tokens.numel() / statistics.median(times),
            peak_bytes=peak_memory(device),
        )
    results.add(
        kind="model",
        layers=layers,
        layers_asked=arguments.layers,
        **({"fewer_because": "no more fit beside what a step needs"} if layers < arguments.layers else {}),
        parameters=student.num_parameters(),
        mask_violations=zeros.violations(),
        lmbda=distilling.lmbda,
        optimizer=type(distilling.optimizer).__name__,
    )


def measure_layerwise(arguments, results: Results, device: torch.device, layers: int) -> None:
    """Models in host memory, layers on the device as they are distilled."""
    from hf_mlopt.distillation.layerwise import distill_layerwise

    student, teacher = (model.to("cpu") for model in student_and_teacher(arguments, layers, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config = LayerwiseConfig(epochs=1.0, batch_size=arguments.batch_size)
    tokens = tokens_of(arguments, arguments.windows)
    report = distill_layerwise(student, teacher, tokens, config, device=device, progress=False)
    seconds = [layer.seconds for layer in report.layers]
    results.add(
        kind="layer-wise",
        layers=layers,
        tokens=report.tokens,
        steps_per_layer=report.steps,
        seconds_median=statistics.median(seconds),
        seconds_min=min(seconds),
        seconds_max=max(seconds),
        tokens_per_second=report.tokens / statistics.median(seconds),
        peak_bytes=report.peak_memory_bytes,
        layer_bytes=sum(parameter.nbytes for parameter in student.model.layers[0].parameters()),
        model_bytes=sum(parameter.nbytes for parameter in student.parameters()),
        mask_violations=report.mask_violations,
        layers_left_as_they_were=sum(not layer.kept for layer in report.layers),
    )


def attempt(results: Results, kind: str, measure, *words) -> None:
    """Goes on with what is left to be measured where something does not fit."""
    message = None
    try:
        measure(*words)
    except torch.OutOfMemoryError as error:
        message = str(error)
    if message is not None:  # outside of the handler, which holds on to what is to be freed
        results.add(kind="out of memory", part=kind, message=message)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse(words: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 4096, "intermediate": 14336, "experts": 8, "heads": 32, "kv-heads": 8, "vocabulary": 32000}
    sizes |= {"layers": 4, "length": 1024, "batch-size": 8, "windows": 128, "pairs": 10}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4], help="Layers of layer-wise distillation.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parts = ["step", "layer-wise"]
    parser.add_argument("--only", nargs="*", default=parts, choices=parts)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    require("accelerate", "peft")
    logging.disable_progress_bar()
    device, begun = torch.device(arguments.device), time.perf_counter()
    results = Results("distillation_gpu", "python benchmarks/distillation_gpu.py")
    results.note(sparsity=0.5, **vars(arguments))
    if "step" in arguments.only:
        attempt(results, "step", measure_step, arguments, results, device)
    if "layer-wise" in arguments.only:
        for layers in arguments.depths:
            attempt(results, f"layer-wise, {layers} layers", measure_layerwise, arguments, results, device, layers)
    results.note(seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
