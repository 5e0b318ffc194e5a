"""How a party reaches the others: checks, certificates, conversations, common rows, masks."""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_mlopt import __version__
from hf_mlopt.configuration import to_dict
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.secure_sum import FixedPoint, Party, Roster
from hf_mlopt.vertical import introduction
from hf_mlopt.vertical.aggregate import PairwiseSharing, PlainSharing, Sharing
from hf_mlopt.vertical.align import Alignment, AlignmentResponder, align
from hf_mlopt.vertical.audit import AuditLog
from hf_mlopt.vertical.climb import TreeSharing
from hf_mlopt.vertical.credentials import Credentials
from hf_mlopt.vertical.data import VerticalData
from hf_mlopt.vertical.introduction import Facts, Introduction
from hf_mlopt.vertical.transport.shared import Conversation, SharedTransport
from hf_mlopt.workflows.places import require_writable
from hf_mlopt.workflows.vertical_data import (
    as_is,
)
from hf_mlopt.workflows.vertical_recipe import PartyRecipe


logger = logging.getLogger(__name__)

TRAIN, ALIGN = b"hfv1", b"HFAL"  # how frames of the two conversations begin
AUDIT, RESULTS = "audit.jsonl", "party_results.json"


def check(recipe: PartyRecipe, *, must_be_new: bool = True):
    """
    Refuses what shows without a network and before data are read.

    Raises:
        InputError: If a file or a package is missing, the certificate is not this party's, or the output directory
            holds a model already.
    """
    if not Path(recipe.data).is_file():
        raise ConfigurationError("data", recipe.data, "no such file; name the party's own columns")
    output = Path(recipe.output_dir)
    if output.exists() and not output.is_dir():
        raise ConfigurationError("output_dir", recipe.output_dir, "is a file; name a directory")
    require_writable(recipe.output_dir, output)
    if must_be_new and (output / RESULTS).exists():
        raise ConfigurationError("output_dir", recipe.output_dir, "holds the results of a run; name a new directory")
    if must_be_new and recipe.resume is False and checkpoints(output):
        text = "holds checkpoints; set resume=true to go on from them, or name a new directory"
        raise ConfigurationError("output_dir", recipe.output_dir, text)
    _grpc()
    if recipe.credentials is not None:
        Credentials.load(recipe.credentials, recipe.party)


def checkpoints(output: Path) -> list[int]:
    """Steps of the checkpoints in a directory."""
    return sorted(int(folder.name.rpartition("-")[2]) for folder in output.glob("checkpoint-*"))


def _grpc():
    try:
        from hf_mlopt.vertical.transport import grpc
    except ImportError as error:
        raise InputError("parties speak over the package `grpcio`: pip install 'hf-mlopt[vertical]'") from error
    return grpc


@dataclass(eq=False)
class Connection:
    """
    A connected party.

    Args:
        recipe ([`PartyRecipe`]): Of the party.
        shared ([`SharedTransport`]): To all others.
        credentials ([`Credentials`], *optional*): Own.
        log ([`AuditLog`]): Own.
        intro ([`Introduction`]): Listening.
    """

    recipe: PartyRecipe
    shared: SharedTransport
    credentials: Credentials | None
    log: AuditLog
    intro: Introduction

    def conversation(self, prefix: bytes) -> Conversation:
        """One of the conversations."""
        return self.shared.conversation(prefix)


@contextmanager
def connected(recipe: PartyRecipe, purpose: str) -> Iterator[Connection]:
    """
    Connects to all parties, and ends all connections at the end.

    Args:
        recipe ([`PartyRecipe`]): Checked.
        purpose (`str`): `align`, `train` or `predict`; the same at all parties.

    Raises:
        PeerLost: If a party is not there in time, or is refused because its settings differ.
    """
    log = AuditLog(Path(recipe.output_dir) / AUDIT, recipe.party)
    credentials = Credentials.load(recipe.credentials, recipe.party) if recipe.credentials else None
    names = ("label_owner", "label_recipients", "run_name", "alignment", "eval_share", "resume")
    same = {name: getattr(recipe, name) for name in names}
    settings = {**to_dict(recipe.arguments), **same, "version": __version__, "purpose": purpose}
    digest = hashlib.sha256(json.dumps([list(recipe.parties), recipe.label_owner]).encode()).hexdigest()
    transport = _grpc().GrpcTransport(
        recipe.party,
        recipe.parties,
        digest,
        credentials,
        settings,
        listen=recipe.listen,
        timeout=recipe.timeout,
        plaintext=recipe.plaintext,
        audit=log.record,
    )
    prefixes = (introduction.PREFIX, TRAIN, ALIGN)
    shared = SharedTransport(transport, prefixes, patience=recipe.connect_timeout)
    given = (credentials, recipe.run_name, recipe.timeout, recipe.connect_timeout, log.record)
    intro = Introduction(shared.conversation(introduction.PREFIX), *given)
    try:
        shared.start()
        intro.listen()
        transport.wait_ready(recipe.connect_timeout)
        logger.info("%s is connected to %s", recipe.party, ", ".join(transport.peers) or "no one")
        yield Connection(recipe, shared, credentials, log, intro)
    finally:
        shared.close()
        log.close()


def aligned_rows(connection: Connection, data: VerticalData) -> Alignment:
    """Finds the common rows with all other parties. Who learns what: see [`hf_mlopt.vertical.align`]."""
    recipe = connection.recipe
    if recipe.alignment == "as-is":
        return as_is(data, recipe.duplicates)
    how = {"duplicates": recipe.duplicates, "method": recipe.alignment, "labels": data.label}
    how["accept_dictionary_attack"] = recipe.accept_dictionary_attack
    transport = connection.conversation(ALIGN)
    if recipe.party == recipe.label_owner:
        return align(transport, data.ids, timeout=recipe.timeout, **how)
    responder, is_aligned = AlignmentResponder(data.ids, recipe.label_owner, **how), threading.Event()

    def answer(peer: str, frame: bytes) -> bytes:
        reply = responder.answer(peer, frame)
        if responder.result is not None:
            is_aligned.set()
        return reply

    transport.serve(answer, lambda peer, frame: None)
    connection.intro.wait_for(is_aligned, recipe.label_owner)
    return responder.result


def sharing_of(recipe: PartyRecipe, key: Party | None, facts: dict[str, Facts]) -> Sharing:
    """The masks of a start, from the keys that the parties have shown each other."""
    if recipe.mask == "tree":
        code = FixedPoint(len(recipe.parties), recipe.fixed_point_bits)
        return TreeSharing(recipe.party, tuple(recipe.parties), code, recipe.timeout)
    if key is None:
        return PlainSharing(tuple(recipe.parties))
    members = {name: bytes.fromhex(fact.public_key) for name, fact in facts.items()}
    key.join(Roster(recipe.run_name, members, fraction_bits=recipe.fixed_point_bits))
    return PairwiseSharing(key)
