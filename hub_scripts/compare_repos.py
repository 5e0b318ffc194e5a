# /// script
# dependencies = ["hf-mlopt"]
# ///
"""
Tells in what two checkpoints differ: files, config.json, and tensors by shape, dtype, zeros and bytes.

Either may be a directory or a repository on the Hub. Of a repository, hashes and the headers of weight files are
fetched; the weights only with --weights, and only of files that are not the same.

python hub_scripts/compare_repos.py mixtral-8x7b-50 user/Mixtral-8x7B-50
"""

import argparse
import hashlib
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi

from hf_mlopt.errors import InputError
from hf_mlopt.hub import hub_errors
from hf_mlopt.hub.packed import FLOATS, pieces
from hf_mlopt.hub.shards import ShardReader, TensorInfo, read_header


@dataclass
class Side:
    """One of the two: a directory, or a revision of a repository."""

    name: str
    api: HfApi
    revision: str | None = None

    def __post_init__(self):
        self.directory = Path(self.name).expanduser() if Path(self.name).expanduser().is_dir() else None
        if self.directory:
            paths = [path for path in self.directory.rglob("*") if path.is_file()]
            self.files = {path.relative_to(self.directory).as_posix(): path.stat().st_size for path in paths}
            return
        with hub_errors(self.name):
            tree = self.api.list_repo_tree(self.name, recursive=True, revision=self.revision)
            self.entries = {entry.path: entry for entry in tree if hasattr(entry, "size")}
        self.files = {path: entry.size for path, entry in self.entries.items()}

    def path(self, name: str) -> Path:
        """The file on this machine; one on the Hub is fetched."""
        if self.directory:
            return self.directory / name
        with hub_errors(self.name):
            return Path(self.api.hf_hub_download(self.name, name, revision=self.revision))

    def kind(self, name: str) -> str | None:
        """Which hash of a file the Hub has; None of a directory, where either can be computed."""
        return None if self.directory else "sha256" if self.entries[name].lfs else "git"

    def hash(self, name: str, kind: str) -> str:
        if self.kind(name) == kind:
            return self.entries[name].lfs.sha256 if kind == "sha256" else self.entries[name].blob_id
        path = self.path(name)
        digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with open(path, "rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    def weights(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors") and "/" not in name)

    def tensors(self) -> dict[str, tuple[TensorInfo, str]]:
        """What the headers say, and which file each tensor is in."""
        found = {}
        for name in self.weights():
            if self.directory:
                header = {tensor: info for tensor, (info, _) in read_header(self.directory / name)[0].items()}
            else:
                with hub_errors(self.name):
                    read = self.api.parse_safetensors_file_metadata(self.name, name, revision=self.revision).tensors
                header = {tensor: TensorInfo(info.dtype, tuple(info.shape)) for tensor, info in read.items()}
            found |= {tensor: (info, name) for tensor, info in header.items()}
        return found


def same(left: Side, right: Side, name: str) -> bool:
    """Whether a file is the same on both sides, by hashes that are known already where possible."""
    if left.files[name] != right.files[name]:
        return False
    kinds = {left.kind(name), right.kind(name)} - {None}
    kind = kinds.pop() if len(kinds) == 1 else "sha256"
    return left.hash(name, kind) == right.hash(name, kind)


def compare(left: Side, right: Side, weights: bool) -> dict:
    """What differs, as plain lists and dicts."""
    both = sorted(left.files.keys() & right.files.keys())
    other = [name for name in both if not same(left, right, name)]
    return {
        "only_left": sorted(left.files.keys() - right.files.keys()),
        "only_right": sorted(right.files.keys() - left.files.keys()),
        "different_files": other,
        "config": _config(left, right) if "config.json" in other else {},
        **compare_tensors(left, right, set(both) - set(other), weights),
    }


def compare_tensors(left: Side, right: Side, same_files: set[str], weights: bool) -> dict:
    """What differs in the weights: by headers, and by values where the files are here or may be fetched."""
    ours, theirs = left.tensors(), right.tensors()
    shared = [name for name in ours if name in theirs]
    shapes, open_ones = {}, []
    for name in shared:
        (info, file), (other_info, other_file) = ours[name], theirs[name]
        if info != other_info:
            shapes[name] = [[info.dtype, *info.shape], [other_info.dtype, *other_info.shape]]
        elif file != other_file or file not in same_files:
            open_ones.append(name)
    values = {}
    readable = bool(weights or (left.directory and right.directory))
    if readable and open_ones:
        with ExitStack() as stack:
            readers = []
            for side, tensors in ((left, ours), (right, theirs)):
                files = sorted({tensors[name][1] for name in open_ones})
                readers.append(stack.enter_context(ShardReader(side.path(file) for file in files)))
            compared = {name: _tensor(readers, name) for name in open_ones}
        values = {name: row for name, row in compared.items() if row}
    return {
        "tensors_only_left": sorted(ours.keys() - theirs.keys()),
        "tensors_only_right": sorted(theirs.keys() - ours.keys()),
        "shapes": shapes,
        "values": values,
        "equal_tensors": len(shared) - len(shapes) - len(values if readable else open_ones),
        "not_compared": [] if readable else open_ones,
    }


def _config(left: Side, right: Side) -> dict[str, list]:
    ours, theirs = (json.loads(side.path("config.json").read_text(encoding="utf-8")) for side in (left, right))
    keys = sorted(ours.keys() | theirs.keys())
    return {key: [ours.get(key), theirs.get(key)] for key in keys if ours.get(key) != theirs.get(key)}


def _tensor(readers: list[ShardReader], name: str) -> dict | None:
    """How many elements of a tensor differ, and the fraction of zeros on both sides; None if all bits are equal."""
    different, zeros, numel = 0, [0, 0], readers[0].tensors[name].numel
    signless = readers[0].tensors[name].dtype in FLOATS  # -0.0 is a zero
    for (_, ours), (_, theirs) in zip(*(pieces(reader, name) for reader in readers), strict=True):
        different += int(np.count_nonzero(ours != theirs))
        for side, piece in enumerate((ours, theirs)):
            zeros[side] += len(piece) - int(np.count_nonzero(piece << 1 if signless else piece))
    if not different:
        return None
    return {"different": different, "of": numel, "sparsity": [count / numel for count in zeros]}


def _print(found: dict, names: list[str]) -> None:
    for key, title in (
        ("only_left", f"only in {names[0]}"),
        ("only_right", f"only in {names[1]}"),
        ("different_files", "different files"),
        ("tensors_only_left", f"tensors only in {names[0]}"),
        ("tensors_only_right", f"tensors only in {names[1]}"),
    ):
        if found[key]:
            print(f"{title}: {', '.join(found[key])}")
    for key, (ours, theirs) in found["config"].items():
        print(f"config.json {key}: {json.dumps(ours)} | {json.dumps(theirs)}")
    for name, (ours, theirs) in found["shapes"].items():
        print(f"{name}: {ours[0]} {ours[1:]} | {theirs[0]} {theirs[1:]}")
    for name, row in found["values"].items():
        sparsity = " | ".join(f"{100 * value:.2f} %" for value in row["sparsity"])
        print(f"{name}: {row['different']:,} of {row['of']:,} weights differ, zeros {sparsity}")
    print(f"{found['equal_tensors']:,} tensors are equal to the bit")
    if found["not_compared"]:
        print(f"{len(found['not_compared']):,} tensors are in files that differ; --weights compares them")


def main(argv: list[str] | None = None, api: HfApi | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("left", help="Directory, or user/name on the Hub.")
    parser.add_argument("right", help="Directory, or user/name on the Hub.")
    parser.add_argument("--left-revision", help="Branch, tag or commit of the first.")
    parser.add_argument("--right-revision", help="Branch, tag or commit of the second.")
    parser.add_argument("--weights", action="store_true", help="Fetch weights that may differ and compare them.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    args = parser.parse_args(argv)
    api = api or HfApi()
    try:
        sides = Side(args.left, api, args.left_revision), Side(args.right, api, args.right_revision)
        found = compare(*sides, args.weights)
    except InputError as error:
        print(f"compare_repos: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1)) if args.json else _print(found, [args.left, args.right])
    differs = any(found[key] for key in found if key != "equal_tensors")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
