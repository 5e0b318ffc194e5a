"""`hf-mlopt push DIR REPO`."""

import argparse

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.push import PushConfig, push_checkpoint


HELP = "Check a pruned or distilled checkpoint and put it on the Hub."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="Checkpoint with its card, as prune and distill write it.")
    parser.add_argument("repo", metavar="REPO", help="Repository on the Hub, user/name; created if it is absent.")
    add_fields(parser, PushConfig, exclude=("directory", "repo"))


def run(args: argparse.Namespace, api=None) -> None:
    config = load_config(PushConfig, overrides=arguments_given(args, PushConfig))
    result = push_checkpoint(config, api)
    for file in result.files:
        kind = "large" if file.is_large else "text "
        print(f"{file.size:>16,}  {kind}  {file.path}{'  (changed for others)' if file.content is not None else ''}")
    print(f"{result.total_bytes:>16,}  bytes in {len(result.files)} files")
    if result.left_out:
        print(f"stays here: {', '.join(result.left_out)}")
    if result.removed:
        print(f"removed there: {', '.join(result.removed)}")
    if result.url is None:
        print(f"nothing was sent; without --dry-run this goes to {config.repo}")
    else:
        print(f"pushed to {result.url}")
