"""
A Mixtral-shaped checkpoint with random float32 weights, and random token ids, for the runs against the peers.

    python shape.py FOLDER [--layers 8] [--samples 64] [--length 128]

writes FOLDER/model (184.6 M parameters as it stands, per-expert keys as on the Hub) and FOLDER/tokens.safetensors.
Needs torch and transformers alone, so it runs in our environment and in that of a peer.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig


TOKENS_KEY = "input_ids"
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}


def write_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **shape) -> int:
    """Writes a random Mixtral of `SHAPE`, changed by `shape`, and returns the bytes of its weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**{**SHAPE, **shape}), dtype=dtype)
    model.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in model.parameters())


def write_tokens(path: Path, samples: int, length: int, vocabulary: int = SHAPE["vocab_size"], seed: int = 0) -> None:
    """Writes uniformly random token ids, `[samples, length]`, int64."""
    generator = torch.Generator().manual_seed(seed)
    save_file({TOKENS_KEY: torch.randint(vocabulary, (samples, length), generator=generator)}, path)


def read_tokens(path: Path) -> torch.Tensor:
    """Token ids, `[samples, length]`, from a safetensors file or from `torch.save`."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)[TOKENS_KEY]
    return torch.load(path, weights_only=True)


def weight_bytes(folder: Path) -> int:
    """Bytes of all tensors of a safetensors checkpoint, from the file headers."""
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    size = write_model(arguments.folder / "model", num_hidden_layers=arguments.layers)
    write_tokens(arguments.folder / "tokens.safetensors", arguments.samples, arguments.length)
    print(f"{size / 4e6:.1f} M parameters, {size / 1e6:.0f} MB, in {arguments.folder}")


if __name__ == "__main__":
    main()
