"""`hf-mlopt vertical predict`: scores of other rows, which the label owner alone gets."""

import csv
import hashlib
import os
from pathlib import Path

import numpy as np

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.secure_sum import Party
from hf_mlopt.vertical.budget import LeakBudget
from hf_mlopt.vertical.checkpoints import load_block
from hf_mlopt.vertical.inbox import Inbox
from hf_mlopt.vertical.introduction import Facts, session_id
from hf_mlopt.vertical.metrics import predictions
from hf_mlopt.vertical.responder import Responder
from hf_mlopt.vertical.store import WeightStore
from hf_mlopt.vertical.sums import SumCollector
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import make_loss
from hf_mlopt.vertical.updates.schedule import BatchSchedule
from hf_mlopt.vertical.updates.weights import LazyWeights
from hf_mlopt.workflows.vertical_connection import TRAIN, Connection, aligned_rows, check, connected, sharing_of
from hf_mlopt.workflows.vertical_data import read_party
from hf_mlopt.workflows.vertical_recipe import PartyRecipe


def predict_party(recipe: PartyRecipe, rows: str, output: str) -> int:
    """
    Scores the rows that all parties have, with the block that training left in `output_dir`.

    Args:
        recipe ([`PartyRecipe`]): With which this party has trained.
        rows (`str`): Own columns of the rows, in the form of `data`.
        output (`str`): CSV with id and prediction, at the label owner; must not exist.

    Returns:
        `int`: How many rows all parties have.

    Raises:
        InputError, PeerLost: If that cannot be done.
    """
    check(recipe, must_be_new=False)
    if not Path(rows).is_file():
        raise ConfigurationError("--rows", rows, "no such file; name own columns of the rows to be scored")
    is_owner = recipe.party == recipe.label_owner
    if is_owner and (Path(output).exists() or not os.access(Path(output).resolve().parent, os.W_OK)):
        raise ConfigurationError("--output", output, "exists, or cannot be written; name a new file")
    weights, config = load_block(recipe.output_dir)
    data = read_party(recipe, rows)
    if list(config["feature_names"]) != list(data.names):
        here, there = list(data.names[:3]), config["feature_names"][:3]
        raise InputError(f"data have columns such as {here}, the model {there}: name the data it was trained on")
    with connected(recipe, "predict") as connection:
        alignment = aligned_rows(connection, data)
        data = data.take(alignment.rows)
        collector = _meet(connection, data.features, weights, f"{alignment.manifest.digest} {config['run']}")
        if is_owner:
            guess = predictions(make_loss(recipe.loss, recipe.num_labels), collector.scores(0))
        connection.intro.part(recipe.label_owner)
    if is_owner:
        _write(Path(output), data.ids, guess)
    return len(data)


def _meet(connection: Connection, features, weights: np.ndarray, content: str) -> SumCollector:
    """Answers and, at the label owner, asks. `content` says which rows and which model, and must be the same."""
    recipe = connection.recipe
    key = Party(recipe.party) if recipe.mask == "pairwise" else None
    public = key.public_key.hex() if key else ""
    facts = connection.intro.exchange(Facts(features.shape[1], features.shape[0], content, public), None, ())
    schedule = BatchSchedule(features.shape[0], recipe.batch_size, recipe.seed, order="kept")
    block = FeatureBlock(features, schedule, len(weights) > features.shape[1])
    transport, owner = connection.conversation(TRAIN), recipe.label_owner
    budget, inbox = LeakBudget({owner: 1}), Inbox(transport.peers, 16)
    run = hashlib.sha256(content.encode() + session_id(facts)).digest()[:16]
    store, sharing = WeightStore(LazyWeights.of(weights)), sharing_of(recipe, key, facts)
    asking = (owner, (owner,), False, 0)
    responder = Responder(
        recipe.party, run, {0: block}, store, sharing, budget, inbox, *asking, note=connection.log.record
    )
    responder.start(transport)
    return SumCollector(responder, transport, recipe.timeout)


def _write(path: Path, ids: list, guess: np.ndarray):
    columns = ["prediction"] if guess.ndim == 1 else [f"probability_{label}" for label in range(guess.shape[1])]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *columns])
        for identity, values in zip(ids, guess.reshape(len(ids), -1), strict=True):
            writer.writerow([identity, *(repr(float(value)) for value in values)])
