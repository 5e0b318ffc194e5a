"""`hf-mlopt vertical`: parties that hold different columns of the same rows train one model."""

import argparse
import sys

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config


HELP = "Train one linear model by parties that hold different columns of the same rows."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hf_mlopt.workflows.vertical_recipe import PartyRecipe, SimulationRecipe

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, allow_abbrev=False)

    _add_pki(add("pki", "Make an authority and certificates for the parties."))
    for name, text in (
        ("align", "Find the rows that all parties have; every party runs it at the same time."),
        ("party", "Train as one party; every party runs it at the same time."),
        ("predict", "Score other rows; every party runs it at the same time, and the label owner gets the scores."),
    ):
        one = add(name, text)
        one.add_argument("-c", "--config", metavar="PARTY.YAML", required=True, help="File of this party.")
        if name == "predict":
            one.add_argument("--rows", metavar="FILE", required=True, help="Own columns of the rows to be scored.")
            one.add_argument("--output", metavar="CSV", required=True, help="At the label owner: ids and scores.")
        add_fields(one, PartyRecipe)
    for name, text in (
        ("simulate", "Run all parties as processes of this machine, in step and asynchronously, and compare."),
        ("attack", "Say what each party could learn in the configured mode, and try the known attacks on the data."),
    ):
        one = add(name, text)
        one.add_argument("recipe", metavar="RECIPE", help="Recipe in YAML; options on the command line win over it.")
        add_fields(one, SimulationRecipe)
    audit = add("audit", "Check an audit log.")
    audit.add_argument("what", choices=["verify"], help="Whether no line was changed, moved or taken out.")
    audit.add_argument("log", metavar="LOG", help="audit.jsonl of a party.")
    audit.add_argument("--head", metavar="LINES:SHA256", help="An end of the log that another party has noted.")


def _add_pki(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)

    def add(name: str, text: str, *words: tuple[str, str]) -> argparse.ArgumentParser:
        one = steps.add_parser(name, help=text, description=text, allow_abbrev=False)
        for word, meaning in words:
            one.add_argument(word.lower().replace(".", "_"), metavar=word, help=meaning)
        return one

    directory, party = ("DIR", "Folder of the authority."), ("PARTY", "Name of the party, as in the roster.")
    init = add("init", "Make the authority.", directory)
    issue = add("issue", "Make key and certificate of a party, into DIR/PARTY.", directory, party)
    add("request", "Make own key and a request for a certificate.", ("FOLDER", "Own folder."), party)
    request = ("REQUEST", "The party's request.pem; compare its fingerprint with the party first.")
    sign = add("sign", "Sign a party's request, into DIR/PARTY.", directory, request, party)
    for one, days in ((init, 3650), (issue, 365), (sign, 365)):
        one.add_argument("--days", type=int, default=days, help=f"How long it is valid (default: {days}).")
        if one is not init:
            one.add_argument("--host", action="append", default=[], help="Host name or address, may be repeated.")


def run(args: argparse.Namespace) -> int | None:
    from hf_mlopt.vertical.transport.base import PeerLost

    try:
        return _ACTIONS[args.action](args)
    except (PeerLost, *_failures()) as error:
        print(f"hf-mlopt vertical {args.action}: {error}", file=sys.stderr)
        return 1


def _failures() -> tuple[type[Exception], ...]:
    from hf_mlopt.vertical.budget import LeakBudgetExceeded
    from hf_mlopt.workflows.vertical_processes import SimulationFailed

    return LeakBudgetExceeded, SimulationFailed


def _pki(args: argparse.Namespace) -> None:
    from hf_mlopt.vertical import pki

    made = {
        "init": lambda: pki.create_authority(args.dir, days=args.days),
        "issue": lambda: pki.issue(args.dir, args.party, args.host, days=args.days),
        "request": lambda: pki.request(args.folder, args.party),
        "sign": lambda: pki.sign_request(args.dir, args.request, args.party, args.host, days=args.days),
    }[args.step]()
    print(made)


def _party_recipe(args: argparse.Namespace):
    from hf_mlopt.workflows.vertical_recipe import PartyRecipe

    return load_config(PartyRecipe, args.config, arguments_given(args, PartyRecipe))


def _align(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.vertical_party import align_party

    recipe = _party_recipe(args)
    manifest = align_party(recipe).manifest
    print(f"{manifest.rows} common rows, digest {manifest.digest}")
    print(f"written to {recipe.output_dir}: alignment.json")


def _party(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.vertical_party import train_party

    recipe = _party_recipe(args)
    results = train_party(recipe)
    for name in ("updates", "updates_per_second", "share_waiting", "mean_staleness", "train_loss"):
        if results.get(name) is not None:
            print(f"{name} {results[name]:.4g}")
    for name, value in results.get("evaluation", {}).items():
        print(f"{name} {value:.4g}")
    print(f"written to {recipe.output_dir}: own block, party_results.json, audit.jsonl")


def _predict(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.vertical_predict import predict_party

    recipe = _party_recipe(args)
    rows = predict_party(recipe, args.rows, args.output)
    place = f", written to {args.output}" if recipe.party == recipe.label_owner else ""
    print(f"{rows} rows scored{place}")


def _simulation_recipe(args: argparse.Namespace, **defaults):
    from hf_mlopt.workflows.vertical_recipe import SimulationRecipe

    return load_config(SimulationRecipe, args.recipe, {**defaults, **arguments_given(args, SimulationRecipe)})


def _simulate(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.tables import text_table
    from hf_mlopt.workflows.vertical import simulate, simulation_rows, speed_up

    recipe = _simulation_recipe(args)
    results = simulate(recipe)
    print("\n".join(text_table(simulation_rows(results))))
    sleeps = ", ".join(f"{seconds:g}" for seconds in results["step_seconds"])
    print(f"A step is a sleep of {sleeps} s by party beside the true work: the processes share this machine's cores.")
    ratio = speed_up(results)
    if ratio is not None:
        print(f"async reaches the gap of {recipe.gap:g} {ratio:.2f} times as fast as sync")
    picture = ", course.png" if recipe.plot else ""
    print(f"written to {recipe.output_dir}: vertical_results.json, recipe.yaml{picture}, a folder for each mode")


def _attack(args: argparse.Namespace) -> None:
    from hf_mlopt.workflows.vertical_attack import attack, who_learns_what

    recipe = _simulation_recipe(args, output_dir="none")
    print("\n".join(who_learns_what(recipe)))
    print("\n".join(attack(recipe)))


def _audit(args: argparse.Namespace) -> None:
    from hf_mlopt.errors import ConfigurationError
    from hf_mlopt.vertical.audit import AuditHead, verify

    head = None
    if args.head is not None:
        lines, _, digest = args.head.partition(":")
        if not lines.isdecimal() or len(digest) != 64:
            raise ConfigurationError("--head", args.head, "must be LINES:SHA256, as printed by this command")
        head = AuditHead(int(lines), digest)
    found = verify(args.log, head)
    print(f"{found.lines} lines, none changed; its end is {found.lines}:{found.digest}")


_ACTIONS = {
    "pki": _pki,
    "align": _align,
    "party": _party,
    "predict": _predict,
    "simulate": _simulate,
    "attack": _attack,
    "audit": _audit,
}
