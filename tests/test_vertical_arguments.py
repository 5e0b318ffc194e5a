"""What vertical training refuses before anything is sent, and what it takes."""

import argparse

import pytest

from hf_mlopt.configuration import add_arguments, arguments_given, load_config, save_yaml
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.vertical import arguments as module
from hf_mlopt.vertical.arguments import Parties, VerticalArguments


THREE = Parties(10_000, {"bank": 10, "shop": 20, "telco": 30}, "bank")
TWO = Parties(10_000, {"bank": 10, "shop": 20}, "bank")
ONE = Parties(10_000, {"bank": 10}, "bank")


def test_defaults_pass_with_three_parties():
    arguments = VerticalArguments()
    arguments.check(THREE)
    assert (arguments.mask, arguments.labels, arguments.on_dropout) == ("pairwise", "shared", "abort")


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("algorithm", "adam", "one of sgd, svrg, saga"),
        ("loss", "hinge", "one of logistic, ridge, multinomial"),
        ("mode", "lazy", "one of async, sync"),
        ("mask", "float", "one of pairwise, tree, none"),
        ("labels", "all", "one of shared, owner"),
        ("backward", "mpc", "one of None, none, he, dp, plain"),
        ("on_dropout", "ignore", "one of abort, wait, exclude"),
        ("batch_size", 0, "at least 1"),
        ("num_epochs", 0, "at least 1"),
        ("max_steps", 0, "at least 1"),
        ("inflight", 0, "at least 1"),
        ("push_ahead", -1, "at least 0"),
        ("num_labels", 1, "at least 2"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("learning_rate", float("inf"), "above 0"),
        ("learning_rate", 1e4, "times l2=0.0001 must be below 1"),
        ("l2", -1.0, "at least 0"),
        ("fixed_point_bits", 0, "1 to 52"),
        ("fixed_point_bits", 53, "1 to 52"),
        ("timeout", 0.0, "above 0 seconds"),
        ("max_staleness", -1, "at least 0"),
        ("query_budget", 0, "auto, at least 1, or null"),
        ("query_budget", "many", "auto, at least 1, or null"),
        ("query_budget", True, "auto, at least 1, or null"),
    ],
)
def test_values_out_of_range_are_refused(field, value, text):
    with pytest.raises(ConfigurationError, match=text) as caught:
        VerticalArguments(**{field: value})
    assert caught.value.field == field
    assert caught.value.value is value


@pytest.mark.parametrize(
    "options, field, text",
    [
        ({"mode": "sync", "inflight": 2}, "inflight", "no effect with mode=sync"),
        ({"mode": "sync", "push_ahead": 2}, "push_ahead", "no effect with mode=sync"),
        ({"mode": "sync", "max_staleness": 2}, "max_staleness", "no effect with mode=sync"),
        ({"mode": "sync", "on_dropout": "wait"}, "on_dropout", "needs mode=async"),
        ({"share_aggregates": True}, "share_aggregates", "needs mode=sync"),
        ({"push_ahead": 2, "inflight": 2}, "inflight", "no effect with push_ahead"),
        ({"on_dropout": "exclude"}, "on_dropout", "discloses the share of the lost party"),
        ({"backward": "dp"}, "backward", "no effect with labels=shared"),
        ({"labels": "owner"}, "backward", "labels=owner needs it"),
        ({"labels": "owner", "backward": "plain"}, "backward", "discloses every label"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, field, text):
    with pytest.raises(ConfigurationError, match=text) as caught:
        VerticalArguments(**options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "options, parties, field, text",
    [
        ({}, TWO, "mask", "set mask=none and accept_two_party_disclosure=true"),
        ({"mask": "tree"}, TWO, "mask", "hides nothing"),
        ({"mask": "none"}, TWO, "accept_two_party_disclosure", "each learns the other's scores"),
        ({}, ONE, "mask", "set mask=none$"),
        ({"mask": "none"}, THREE, "mask", "shows every share to whoever asks"),
        ({"on_dropout": "exclude", "allow_unsafe": True}, THREE, "on_dropout", "masks do not cancel"),
        (
            {"labels": "owner", "backward": "he", "batch_size": 119},
            THREE,
            "batch_size",
            "at least 120 .*'telco' has 30",
        ),
        (
            {"labels": "owner", "backward": "dp", "dp_epsilon": 1.0, "batch_size": 29},
            THREE,
            "batch_size",
            "at least 30 .*'telco'",
        ),
        ({"labels": "owner", "backward": "plain", "allow_unsafe": True, "batch_size": 19}, THREE, "batch_size", "20"),
        (
            {"labels": "owner", "backward": "dp", "dp_epsilon": 1.0, "dp_delta": 1e-4, "batch_size": 30},
            THREE,
            "dp_delta",
            "below one over the rows, 1 / 10000",
        ),
        (
            {"num_epochs": 16, "algorithm": "sgd"},
            THREE,
            "query_budget",
            "'telco' would see some rows 16 .* them 15 times",
        ),
        ({"num_epochs": 9, "algorithm": "svrg"}, THREE, "query_budget", "'telco' would see some rows 17 times"),
        ({"num_epochs": 15}, THREE, "query_budget", "'shop' would see some rows 22 times"),  # SAGA draws batches
        ({"query_budget": 16}, THREE, "query_budget", "'telco' may see a row 15 times before"),
        ({"query_budget": None}, THREE, "query_budget", "set accept_gram_disclosure=true"),
        (
            {"query_budget": 2, "num_epochs": 3, "algorithm": "sgd"},
            THREE,
            "query_budget",
            "'bank' would see some rows 3",
        ),
    ],
)
def test_what_the_roster_makes_unsafe_is_refused(options, parties, field, text):
    arguments = VerticalArguments(**options)
    with pytest.raises(ConfigurationError, match=text) as caught:
        arguments.check(parties)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "options, parties",
    [
        ({"mask": "none", "accept_two_party_disclosure": True}, TWO),
        ({"mask": "none", "num_epochs": 5000}, ONE),
        ({"mask": "none", "allow_unsafe": True}, THREE),
        ({"mask": "none", "on_dropout": "exclude", "allow_unsafe": True}, THREE),
        ({"labels": "owner", "backward": "he", "batch_size": 120}, THREE),
        ({"labels": "owner", "backward": "dp", "dp_epsilon": 1.0, "batch_size": 30}, THREE),
        ({"labels": "owner", "backward": "none", "batch_size": 1, "algorithm": "sgd"}, THREE),
        ({"num_epochs": 15, "algorithm": "sgd"}, THREE),
        ({"num_epochs": 4}, THREE),
        ({"num_epochs": 8, "algorithm": "svrg"}, THREE),
        ({"query_budget": 15, "num_epochs": 15, "algorithm": "sgd"}, THREE),
        ({"query_budget": 150, "num_epochs": 99, "accept_gram_disclosure": True}, THREE),
        ({"query_budget": None, "num_epochs": 999, "accept_gram_disclosure": True}, THREE),
    ],
)
def test_what_is_declared_passes(options, parties):
    VerticalArguments(**options).check(parties)


@pytest.mark.parametrize("batch_size, warned", [(128 * 2 * 30, []), (128 * 2 * 30 - 1, ["telco"])])
def test_small_encrypted_batches_are_warned_of(batch_size, warned, monkeypatch):
    texts = []
    monkeypatch.setattr(module.logger, "warning", texts.append)
    options = {"labels": "owner", "backward": "he", "algorithm": "sgd"}
    VerticalArguments(batch_size=batch_size, num_epochs=2, **options).check(THREE)
    assert [name for name in THREE.names if any(repr(name) in text for text in texts)] == warned


def test_label_holders():
    some = Parties(10, {"a": 1, "b": 1, "c": 1}, "b", ("c",))
    assert some.label_holders("shared") == ("b", "c")
    assert some.label_holders("owner") == ("b",)
    assert THREE.label_holders("shared") == ("bank", "shop", "telco")


@pytest.mark.parametrize(
    "facts, field",
    [
        ((0, {"a": 1}, "a"), "num_rows"),
        ((5, {"a": 0}, "a"), r"num_features[a]"),
        ((5, {"a": 1}, "b"), "label_owner"),
        ((5, {"a": 1}, "a", ("z",)), "label_recipients"),
    ],
)
def test_rosters_that_make_no_sense_are_refused(facts, field):
    with pytest.raises(ConfigurationError) as caught:
        Parties(*facts)
    assert caught.value.field == field


def test_steps_views_and_budget():
    arguments = VerticalArguments(batch_size=256, num_epochs=3)
    assert arguments.num_steps(10_000) == 120
    assert VerticalArguments(algorithm="sgd", num_epochs=3).planned_views(10_000) == 3
    assert VerticalArguments(algorithm="sgd", max_steps=41).planned_views(10_000) == 2
    schedule = arguments.schedule(10_000)
    drawn = [schedule.batch(position) for position in range(120)]
    assert arguments.planned_views(10_000) == max(drawn.count(batch) for batch in range(40)) > 3
    assert VerticalArguments(algorithm="svrg", num_epochs=3).planned_views(10_000) == 5
    assert arguments.budget(THREE, "bank") == 25  # half of 20 + 30
    assert arguments.budget(THREE, "telco") == 15  # half of 10 + 20 and the bias, rounded down
    assert VerticalArguments(query_budget=7).budget(THREE, "bank") == 7


@pytest.mark.parametrize("budget", ["auto", 7, None])
def test_arguments_travel_through_yaml_and_the_command_line(tmp_path, budget):
    given = VerticalArguments(query_budget=budget, backward=None, max_staleness=3, accept_gram_disclosure=True)
    save_yaml(given, tmp_path / "party.yaml")
    assert load_config(VerticalArguments, tmp_path / "party.yaml") == given
    parser = argparse.ArgumentParser()
    add_arguments(parser, VerticalArguments)
    word = "null" if budget is None else str(budget)
    typed = parser.parse_args(["--query-budget", word, "--no-delay-compensation", "--labels", "owner"])
    assert arguments_given(typed, VerticalArguments) == {
        "query_budget": budget,
        "delay_compensation": False,
        "labels": "owner",
    }
    parser.format_help()


def test_every_argument_has_help():
    parser = argparse.ArgumentParser()
    add_arguments(parser, VerticalArguments)
    assert all(action.help for action in parser._actions)
