"""
Trains a Mixtral-shaped model of some hundred million parameters on one GPU, prunes it by every method and distils it.

    python benchmarks/train_moe.py train      # at most 7 minutes of training; with its text about 9
    python benchmarks/train_moe.py quality    # 9 minutes; again and again, until it says that nothing is left
    python benchmarks/train_moe.py plot

Recorded on an H200: `train --minutes 1.5 --characters 3e7` and the first 7 rows of `quality`, no more.

The text is the Python sources installed beside the interpreter, see `python_sources.py`: whole packages are held out.
Everything is in --folder (train_moe in the temp folder) on the local disk. Each command can be killed and given again:
training goes on from a state written every 90 seconds, the table after its last row. Where $OUT names a folder, or
--out does, every finished row is written there too, in train_moe.json, and so is the plot. The model stays in
--folder: the rows of a table are of one model, so if that folder is lost, training and table begin anew.

The first time on a machine whose commands end after 10 minutes, one after the other while its disk is kept:

    1. python benchmarks/train_moe.py train --folder trial --minutes 0.3 --characters 2e7 &&
       python benchmarks/train_moe.py quality --folder trial --minutes 1 --out ''   # a trial of everything
    2. python benchmarks/train_moe.py train
    3. python benchmarks/train_moe.py quality && python benchmarks/train_moe.py plot

Then train_moe.json and train_moe.png go to benchmarks/results. Should the trial run out of memory, halve
--micro-batch. Training sees cross-entropy and the load-balancing loss, AdamW on float32 masters of bfloat16 weights,
a learning rate that falls as a cosine of the time. Needs torch, transformers, accelerate and what they bring; no data
set, no network.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from common import Results, require
from moe_quality import measure_quality, plot
from python_sources import installed, read_packages, shuffled, split, tokenize, train_tokenizer
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging


AUX_COEFFICIENT, WEIGHT_DECAY, BETAS, CLIP = 0.02, 0.1, (0.9, 0.95), 1.0
WARMUP, LAST_RATE = 0.03, 0.1  # share of the time, and of the highest learning rate
LOGGED = 10  # steps between two readings of the loss, for which the device is waited for
COMMAND = "python benchmarks/train_moe.py"
# What a folder is begun with and keeps; tokens, model and rows follow from it.
SIZES = {"hidden": 1024, "intermediate": 1792, "layers": 12, "experts": 8, "heads": 16, "kv-heads": 4}
SIZES |= {"vocabulary": 16384, "length": 1024, "batch-size": 64, "seed": 0}


def prepare(arguments, results: Results) -> tuple[AutoTokenizer, dict[str, torch.Tensor]]:
    """The tokenizer and the tokens of every part, made here the first time."""
    file = arguments.folder / "text.pt"
    if not file.is_file():
        started = time.perf_counter()
        parts = split(read_packages(arguments.roots or installed()))
        documents = {part: shuffled(packages) for part, packages in parts.items()}
        tokenizer = train_tokenizer(documents["train"], arguments.vocabulary, arguments.characters / 10)
        limits = {"train": arguments.characters}
        tokens = {part: tokenize(texts, tokenizer, limits.get(part, math.inf)) for part, texts in documents.items()}
        tokenizer.save_pretrained(arguments.folder / "tokenizer")
        results.note(
            text={part: {"tokens": len(tokens[part]), "documents": len(documents[part])} for part in parts},
            characters={part: sum(map(len, texts)) for part, texts in documents.items()},
            held_out={part: sorted(parts[part]) for part in ("evaluation", "calibration")},
            text_seconds=time.perf_counter() - started,
        )
        save(tokens, file)
    tokens = torch.load(file)
    for part, ids in tokens.items():
        if len(ids) < 2 * arguments.length:
            raise SystemExit(f"the {part} text has {len(ids)} tokens, less than two windows; give more --roots")
    return AutoTokenizer.from_pretrained(arguments.folder / "tokenizer"), tokens


def save(value, file: Path) -> None:
    """Whole or not at all."""
    torch.save(value, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)


def make_model(arguments, tokenizer) -> MixtralForCausalLM:
    """Random bfloat16 weights, on the device from the start."""
    torch.manual_seed(arguments.seed)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        num_local_experts=arguments.experts,
        num_experts_per_tok=2,
        max_position_embeddings=arguments.length,
        router_aux_loss_coef=AUX_COEFFICIENT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(arguments.device):
        return MixtralForCausalLM(config).to(torch.bfloat16)


class Training:
    """Model, float32 masters, optimizer, and how far they are."""

    def __init__(self, model: MixtralForCausalLM):
        self.model, self.parameters = model, list(model.parameters())
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        groups = [
            {"params": [master for master in self.masters if master.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [master for master in self.masters if master.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
        self.step, self.seconds, self.curve = 0, 0.0, []

    def save(self, file: Path) -> None:
        state = {"step": self.step, "seconds": self.seconds, "curve": self.curve, "masters": self.masters}
        save({**state, "optimizer": self.optimizer.state_dict()}, file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        state = torch.load(file, map_location=self.masters[0].device)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        for master, stored in zip(self.masters, state["masters"], strict=True):
            master.copy_(stored)
        self.optimizer.load_state_dict(state["optimizer"])
        self._publish()

    def accumulate(self, windows: torch.Tensor, share: float) -> torch.Tensor:
        """Adds the gradient of a micro-batch; returns its cross-entropy and load-balancing loss, weighed alike."""
        output = self.model(windows, labels=windows, output_router_logits=True, use_cache=False)
        (output.loss * share).backward()
        ce = output.loss.detach() - AUX_COEFFICIENT * output.aux_loss.detach()
        return share * torch.stack([ce.float(), output.aux_loss.detach().float()])

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._publish()
        self.step += 1

    def _publish(self) -> None:
        torch._foreach_copy_(self.parameters, self.masters)


def learning_rate_at(share: float, highest: float) -> float:
    """Of a moment of the training, in [0, 1]."""
    if share < WARMUP:
        return highest * max(share / WARMUP, 0.01)
    fallen = 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))
    return highest * (LAST_RATE + (1 - LAST_RATE) * fallen)


def batch_of(tokens: torch.Tensor, step: int, arguments) -> torch.Tensor:
    """The windows of a step, `[batch, length]`: every epoch goes through all of them in another order."""
    length, size = arguments.length, min(arguments.batch_size, len(tokens) // arguments.length)
    per_epoch = len(tokens) // length // size
    order = torch.randperm(len(tokens) // length, generator=torch.Generator().manual_seed(step // per_epoch))
    chosen = order[step % per_epoch * size :][:size]
    return torch.stack([tokens[index * length :][:length] for index in chosen.tolist()]).long()


def fit(training: Training, tokens: torch.Tensor, arguments) -> None:
    """Trains until the time is over; the time of checkpoints counts."""
    file, budget, device = arguments.folder / "state.pt", 60 * arguments.minutes, torch.device(arguments.device)
    begun = time.perf_counter() - training.seconds
    losses, since, saved = torch.zeros(2, device=device), 0, training.seconds
    while training.seconds < budget:
        batch = batch_of(tokens, training.step, arguments).to(device, non_blocking=True)
        for part in batch.split(arguments.micro_batch):
            losses += training.accumulate(part, len(part) / len(batch))
        training.update(learning_rate_at(training.seconds / budget, arguments.learning_rate))
        since += 1
        training.seconds = time.perf_counter() - begun
        if since == LOGGED or training.step <= 2 or training.seconds >= budget:
            ce, aux = (losses / since).tolist()  # waits for the device
            if not math.isfinite(ce):
                raise SystemExit(f"the loss is {ce} at step {training.step}; lower --learning-rate")
            row = {"step": training.step, "tokens": training.step * batch.numel(), "ce": ce, "aux": aux}
            training.curve.append(row)
            losses, since = torch.zeros_like(losses), 0
            training.seconds = time.perf_counter() - begun
        if training.step % 50 == 0:
            row = training.curve[-1]
            print(f"{training.seconds:.0f} s  step {row['step']}  {row['tokens']:,} tokens  loss {row['ce']:.4f}")
        if training.seconds - saved > arguments.save_seconds:
            training.save(file)
            saved = training.seconds = time.perf_counter() - begun


def train(arguments) -> None:
    """Stage one: text, tokenizer, model."""
    if (arguments.folder / "model").is_dir():
        print(f"the model in {arguments.folder} is trained; go on with `{COMMAND} quality`")
        return
    results = open_results(arguments)
    tokenizer, tokens = prepare(arguments, results)
    training = Training(make_model(arguments, tokenizer))
    if (arguments.folder / "state.pt").is_file():
        training.load(arguments.folder / "state.pt")
        print(f"going on at step {training.step}, after {training.seconds:.0f} s")
    fit(training, tokens["train"], arguments)
    model, last = training.model, training.curve[-1]
    unused = (model.config.num_local_experts - 2) / model.config.num_local_experts
    experts = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 3)
    results.note(
        parameters=model.num_parameters(),
        parameters_active=round(model.num_parameters() - unused * experts),
        training={
            **last,
            "seconds": training.seconds,
            "tokens_per_second": last["tokens"] / training.seconds,
            "epochs": last["tokens"] / len(tokens["train"]),
            "peak_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None,
            "curve": training.curve[:: max(1, len(training.curve) // 100)],
        },
    )
    model.save_pretrained(arguments.folder / "model.part")
    tokenizer.save_pretrained(arguments.folder / "model.part")
    os.replace(arguments.folder / "model.part", arguments.folder / "model")
    (arguments.folder / "state.pt").unlink(missing_ok=True)


def quality(arguments) -> None:
    """Stage two: the table."""
    if not (arguments.folder / "model").is_dir():
        raise SystemExit(f"no trained model in {arguments.folder}: run `{COMMAND} train` with this --folder first")
    tokens = torch.load(arguments.folder / "text.pt")
    model = MixtralForCausalLM.from_pretrained(arguments.folder / "model", dtype=torch.bfloat16)
    measure_quality(model.to(arguments.device).eval(), tokens, open_results(arguments), arguments)


class CopiedResults(Results):
    """Rows beside the model they are of, and a copy of each elsewhere."""

    def __init__(self, folder: Path, out: Path | None):
        super().__init__("train_moe", f"{COMMAND} train; {COMMAND} quality")
        self.path, self.out = folder / "train_moe.json", out
        self.keep_others(set())

    def save(self) -> None:
        super().save()
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / self.path.name).write_text(self.path.read_text(encoding="utf-8"), encoding="utf-8")


def open_results(arguments) -> CopiedResults:
    """The table of this folder; refuses a folder that was begun with other sizes."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = CopiedResults(arguments.folder, arguments.out)
    asked = {name: getattr(arguments, name.replace("-", "_")) for name in SIZES}
    begun = results.record.get("sizes", asked)
    differing = [f"--{name} {begun[name]}" for name in SIZES if asked[name] != begun[name]]
    if differing:
        raise SystemExit(f"{arguments.folder} was begun with {' '.join(differing)}: give that, or another --folder")
    results.note(sizes=asked)
    return results


def parse(words: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "quality", "plot"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "train_moe")
    parser.add_argument("--out", default=os.environ.get("OUT", ""), help="Where a copy of the results goes.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="Of training (default: 7) or of the table (9).")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--roots", nargs="*", type=Path, help="Folders of packages (default: the interpreter's).")
    parser.add_argument("--characters", type=float, default=3e8, help="Of training text, at most.")
    parser.add_argument("--micro-batch", type=int, default=16, help="Windows in a forward pass of training.")
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="The highest one of training.")
    parser.add_argument("--save-seconds", type=float, default=90)
    parser.add_argument("--windows", type=int, default=512, help="Of text that is evaluated on, and distilled on.")
    parser.add_argument("--samples", type=int, default=128, help="Windows that pruning is calibrated on.")
    parser.add_argument("--rows", type=int, default=1000, help="Rows to add to the table, at most.")
    arguments = parser.parse_args(words)
    arguments.out = Path(arguments.out) if arguments.out else None
    arguments.minutes = arguments.minutes or (7 if arguments.stage == "train" else 9)
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    require("accelerate")
    logging.disable_progress_bar()
    if arguments.stage == "plot":
        plot(json.loads((arguments.folder / "train_moe.json").read_text(encoding="utf-8")), arguments)
    else:
        {"train": train, "quality": quality}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
