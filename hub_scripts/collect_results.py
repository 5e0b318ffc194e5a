# /// script
# dependencies = ["hf-mlopt"]
# ///
"""
Puts what `hf-mlopt evaluate` measured into the card of a local checkpoint, or of a repository on the Hub.

hf-mlopt evaluate DENSE mixtral-8x7b-50 --tasks arc_easy,piqa --perplexity wikitext --output result.json
python hub_scripts/collect_results.py result.json mixtral-8x7b-50
"""

import argparse
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from hf_mlopt.errors import InputError
from hf_mlopt.hub import hub_errors
from hf_mlopt.hub.push_checks import CARD, DISTILLATION, PRUNING
from hf_mlopt.hub.results import EVALUATION, read_evaluation
from hf_mlopt.hub.results_into_card import collect_results


def main(argv: list[str] | None = None, api: HfApi | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", metavar="JSON", help="What `hf-mlopt evaluate` wrote, dense model first.")
    parser.add_argument("target", metavar="DIR_OR_REPO", help="Checkpoint here, or user/name on the Hub.")
    parser.add_argument("--model", help="Which of the models evaluated it is, if it was called otherwise there.")
    parser.add_argument("--revision", help="Branch of the repository (default: main).")
    parser.add_argument("--overwrite", action="store_true", help="Replace a card that was edited by hand.")
    parser.add_argument("--dry-run", action="store_true", help="Show what would be written, and write nothing.")
    args = parser.parse_args(argv)
    try:
        changed = collect(args, api or HfApi())
    except InputError as error:
        print(f"collect_results: error: {error}", file=sys.stderr)
        return 2
    for path, text in changed.items():
        print(f"{'would write' if args.dry_run else 'wrote'} {path}, {len(text.encode()):,} bytes")
    return 0


def collect(args: argparse.Namespace, api: HfApi) -> dict[str, str]:
    evaluation, directory = read_evaluation(args.evaluation), Path(args.target).expanduser()
    if directory.is_dir():
        changed = collect_results(directory, evaluation, model=args.model, overwrite=args.overwrite)
        if not args.dry_run:
            for path, text in changed.items():
                (directory / path).parent.mkdir(exist_ok=True)
                (directory / path).write_text(text, encoding="utf-8")
        return changed
    with hub_errors(args.target), tempfile.TemporaryDirectory() as folder:
        there = api.list_repo_files(args.target, revision=args.revision)
        for name in {CARD, PRUNING, DISTILLATION, EVALUATION}.intersection(there):
            api.hf_hub_download(args.target, name, revision=args.revision, local_dir=folder)
        name, model = args.target, args.model
        changed = collect_results(Path(folder), evaluation, name=name, model=model, overwrite=args.overwrite)
        if not args.dry_run:
            changes = [CommitOperationAdd(path, text.encode()) for path, text in changed.items()]
            api.create_commit(args.target, changes, commit_message="Add measured results", revision=args.revision)
    return changed


if __name__ == "__main__":
    sys.exit(main())
