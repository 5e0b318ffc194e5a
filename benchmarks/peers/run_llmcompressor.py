"""
llm-compressor's Wanda or SparseGPT on the experts of a local Mixtral-shaped checkpoint, float32, on the CPU.

    .venv-llmcompressor/bin/python run_llmcompressor.py MODEL_DIR TOKENS_FILE OUT_DIR --method wanda --sparsity 0.5

Follows its own Mixtral example: the model is loaded under `load_context`, which turns fused experts into one
`nn.Linear` per matrix, then `oneshot` runs the sequential pipeline, then the model is saved. By default every expert
sees every token, as in that example; `--routed` gives each expert its own tokens, which is the work our pruner does.
The recipe names the matrices of the experts, so attention, router and head stay as they are.

Prints one JSON line: seconds and peak memory of load, prune and save, zeros per expert matrix, versions, the warnings
of the library, whether stock transformers reads the result (which needs `--repack`), and, if it could not do the work,
its own message.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from probe import Record, expert_sparsity
from shape import read_tokens, weight_bytes
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


EXPERT_MATRICES = r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=("wanda", "sparsegpt"), default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default=None, help="N:M instead of --sparsity, such as 2:4.")
    parser.add_argument("--routed", action="store_true", help="Calibrate each expert on the tokens routed to it.")
    parser.add_argument("--repack", action="store_true", help="Call its `repack_moe` before saving.")
    parser.add_argument("--batch-size", type=int, default=1, help="1 is the default of the library.")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def recipe(method: str, sparsity: float, pattern: str | None):
    """The modifier for the matrices of the experts."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    if pattern:
        # The library prunes N of every M, so 2:4 reads the same either way; anything else would not.
        kept, group = map(int, pattern.split(":"))
        return modifier(sparsity=1 - kept / group, mask_structure=f"{group - kept}:{group}", targets=[EXPERT_MATRICES])
    return modifier(sparsity=sparsity, targets=[EXPERT_MATRICES])


def watch_attention(model: torch.nn.Module, record: Record) -> None:
    """Notes what the first attention layer is called with first: "eager" without a mask sees later tokens too."""

    def hook(module, args, kwargs):
        handle.remove()
        record.facts["attention_in_calibration"] = {
            "implementation": module.config._attn_implementation,
            "mask_given": kwargs.get("attention_mask") is not None,
        }

    handle = model.get_decoder().layers[0].self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def run(arguments: argparse.Namespace, record: Record) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import repack_moe
    from llmcompressor.utils import load_context
    from loguru import logger

    def note(message) -> None:
        # Its metrics have a level of their own above WARNING.
        level, text = message.record["level"].name, message.record["message"]
        if level in ("WARNING", "ERROR") and text not in record.facts["messages"]:
            record.facts["messages"].append(text)

    logger.add(note, level="WARNING")
    with record.phase("load"), load_context():
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    token_ids = read_tokens(arguments.tokens)
    batches = DataLoader([{"input_ids": row} for row in token_ids], batch_size=arguments.batch_size)
    # `oneshot` insists on a tokenizer, though the token ids are ready.
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    watch_attention(model, record)
    with record.phase("prune"):
        oneshot(
            model=model,
            processor=unused,
            dataset=batches,
            num_calibration_samples=len(token_ids),
            max_seq_length=token_ids.shape[1],
            recipe=recipe(arguments.method, arguments.sparsity, arguments.pattern),
            moe_calibrate_all_experts=not arguments.routed,
        )
    record.facts["sparsity_reached"] = expert_sparsity(model)
    with record.phase("save"):
        if arguments.repack:
            repack_moe(model)
        model.save_pretrained(arguments.output)


def reload(folder: Path) -> dict[str, int]:
    """Tensors stock transformers misses in the saved model, and makes up at random, and those it does not know."""
    _, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return {key: len(info[key]) for key in ("missing_keys", "unexpected_keys")}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    # Imported before the clock starts: what the libraries themselves hold is the start of the memory figures.
    with contextlib.redirect_stdout(sys.stderr):
        import llmcompressor  # noqa: F401

        record = Record(
            tool="llm-compressor",
            method=arguments.method,
            pattern=arguments.pattern or f"{arguments.sparsity:g}",
            calibrated_on="routed tokens" if arguments.routed else "all tokens",
            threads=arguments.threads,
            batch_size=arguments.batch_size,
            model_bytes=weight_bytes(arguments.model),
        )
        with record.catch():
            run(arguments, record)
            record.stop()
            with record.phase("reload"):
                record.facts["reloaded"] = reload(arguments.output)
        line = record.close()
    print(line)


if __name__ == "__main__":
    main()
