"""
The `hf-mlopt` command. Every module in this folder is a verb: it has `HELP` (one line), `add_arguments(parser)` and
`run(args) -> int | None`, and imports whatever is heavy inside `run`.
"""

import argparse
import difflib
import logging
import sys
from importlib import import_module
from pkgutil import iter_modules

from hf_mlopt import __doc__ as package_summary
from hf_mlopt import __version__
from hf_mlopt.errors import InputError


__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """
    Runs one verb.

    Args:
        argv (`list[str]`, *optional*): The words after `hf-mlopt`; those of the process by default.

    Returns:
        `int`: The exit status: 0 on success, 2 for input that is refused, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = _make_parser(argv).parse_known_args(argv)
    if unknown:
        _refuse_option(args.parser, unknown[0])
    _show_messages()
    try:
        return args.run(args) or 0
    except InputError as error:
        print(f"hf-mlopt {args.verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-mlopt {args.verb}: interrupted", file=sys.stderr)
        return 130


def _refuse_option(parser: argparse.ArgumentParser, word: str) -> None:
    """Exits with status 2 and the option that was probably meant."""
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
    hint = f", did you mean {close[0]}?" if close else f"; see {parser.prog} --help"
    parser.exit(2, f"{parser.prog}: error: unknown argument {word}{hint}\n")


def _show_messages() -> None:
    """Shows the package's info lines and warnings; a library leaves that to its caller, and here we are the caller."""
    logger = logging.getLogger("hf_mlopt")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _make_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-mlopt", description=package_summary)
    parser.add_argument("--version", action="version", version=f"hf-mlopt {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs = {module.name.replace("_", "-"): module.name for module in iter_modules(__path__)}
    # A verb that is named needs none of the others: its start does not wait for their imports.
    named = argv[:1] if argv and argv[0] in verbs else []
    for verb in named or sorted(verbs):
        module = import_module(f"{__name__}.{verbs[verb]}")
        # Abbreviated options would change their meaning whenever an option is added.
        verb_parser = subparsers.add_parser(verb, help=module.HELP, description=module.HELP, allow_abbrev=False)
        if named:  # the list of verbs shows no options, and those of `train` come with torch
            module.add_arguments(verb_parser)
        verb_parser.set_defaults(run=module.run, parser=verb_parser)
    return parser
