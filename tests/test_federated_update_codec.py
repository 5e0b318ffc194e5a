"""Updates in fewer bytes: what is coded, that both ends agree, what feedback keeps, and what damage does."""

import math

import numpy as np
import pytest
import torch

from hf_mlopt.communication.quantizers.registry import codec
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.update_codec import make_update_codec
from tests.federations import (
    arguments,
    asked_twice,
    digests,
    federation,
    give_faults,
    kept_by,
    lost,
    record_messages,
    regression_data,
    same_bits,
    without_timings,
)


SITES = ("a", "b")
COLUMNS = 40  # 8 · 40 float32 are 1,280 bytes, and coded
PLAIN_BYTES = 4 * (COLUMNS + 8 + 8)


class Wide(torch.nn.Module):
    """One matrix that is coded; a small one, a vector and a buffer that are not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, COLUMNS) / 8)
        self.small = torch.nn.Parameter(torch.randn(8, 1) / 8)
        self.bias = torch.nn.Parameter(torch.zeros(COLUMNS))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x, labels):
        x = x.float()
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        hidden = (x @ self.weight + self.bias).tanh().mean(1) + (x @ self.small)[:, 0]
        return {"loss": (hidden - labels.float()).square().mean()}


def wide_federation(folder, **settings):
    sites = {site: regression_data(site) for site in SITES}
    return federation(folder, Wide, sites, **{"evaluate_every": 0, "num_rounds": 2, **settings})


def messages(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def weights():
        shapes = {"weight": (8, COLUMNS), "second": (30, 20), "small": (8, 1), "bias": (COLUMNS * 10,)}
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    sent = Message({"weights": weights(), "buffers": {"mean": torch.ones(3)}}, {"round": 0, "seed": 5})
    return sent, Message({"weights": weights(), "buffers": {"mean": torch.zeros(3)}}, {"round": 0, "num_samples": 3})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, relative", [("bf16", 2.0**-8), ("fp16", 2.0**-11)])
def test_what_is_decoded_is_as_near_as_the_format(name, relative, dtype):
    coder = make_update_codec(name, None, False)
    sent, reply = messages(dtype=dtype)
    answer, kept = coder.encode(sent, reply, None)
    found = coder.decode(sent, answer)
    assert kept == {} and found.scalars == reply.scalars
    assert same_bits(found.groups["buffers"], reply.groups["buffers"])
    for weight, end in reply.groups["weights"].items():
        start, value = sent.groups["weights"][weight], found.groups["weights"][weight]
        assert value.dtype == dtype and value.shape == end.shape
        if weight in ("small", "bias"):
            assert torch.equal(value, end)
            continue
        delta = (end.double() - start.double()).abs()
        error = (value.double() - end.double()).abs()
        rounding = value.double().abs() * torch.finfo(dtype).eps
        assert (error <= relative * delta + rounding).all() and error.max() > 0


@pytest.mark.parametrize(
    "name", ["orq-9", "orq-5-shared", "bingrad-b", "sign", "qsgd-9", "terngrad", "fp8", "top-k-0.05"]
)
def test_every_codec_goes_there_and_back(name):
    coder, plain = make_update_codec(name, None, False), codec(name)
    sent, reply = messages()
    answer, _ = coder.encode(sent, reply, None)
    assert set(answer.groups["update_codes"]) == {"weight", "second"}
    assert set(answer.groups["weights"]) == {"small", "bias"}
    found = coder.decode(sent, answer).groups["weights"]
    for number, weight in enumerate(("second", "weight")):
        start, end = (message.groups["weights"][weight].double() for message in (sent, reply))
        delta = (end - start).float().flatten()
        expected = start + plain.decode(plain.encode(delta, (5, number))).double().view(start.shape)
        assert torch.equal(found[weight], expected.float())
        assert answer.groups["update_codes"][weight].numel() == plain.wire_bytes(delta.numel())


def test_the_noise_of_rounding_is_the_seeds_and_averages_out():
    coder = make_update_codec("qsgd-3", None, False)
    sent, reply = messages()
    first = coder.encode(sent, reply, None)[0]
    assert first == coder.encode(sent, reply, None)[0]
    total = torch.zeros(8, COLUMNS, dtype=torch.float64)
    for seed in range(400):
        asked = Message(sent.groups, {**sent.scalars, "seed": seed})
        answer = coder.encode(asked, reply, None)[0]
        total += coder.decode(asked, answer).groups["weights"]["weight"].double() / 400
    once = coder.decode(sent, first).groups["weights"]["weight"].double()
    end = reply.groups["weights"]["weight"].double()
    assert (total - end).norm() < 0.1 * (once - end).norm()


def test_feedback_loses_nothing_in_the_long_run():
    """Σ decoded = Σ Δ - what is still unsent: Algorithm 2 of EF-SGD, summed."""
    coder, state = make_update_codec("bingrad-b", None, True), None
    wanted, given = 0.0, 0.0
    for seed in range(20):
        sent, reply = messages(seed)
        answer, kept = coder.encode(sent, reply, state)
        state = Message(kept)
        start, end = (message.groups["weights"]["weight"].double() for message in (sent, reply))
        wanted = wanted + end - start
        given = given + coder.decode(sent, answer).groups["weights"]["weight"].double() - start
    left = state.groups["update_unsent"]["weight"].double().view(8, COLUMNS)
    assert left.norm() > 1
    torch.testing.assert_close(given + left, wanted, rtol=0, atol=1e-4)
    assert set(state.groups["update_unsent"]) == {"weight", "second"}


def test_bytes_up_are_those_of_the_codes(tmp_path):
    trainer = wide_federation(tmp_path, update_codec="bingrad-b", num_rounds=1)
    seen = record_messages(trainer)
    trainer.train()
    (row,) = trainer.history
    coded = codec("bingrad-b").wire_bytes(8 * COLUMNS)
    assert row["bytes_up"] == 2 * (coded + PLAIN_BYTES) and coded < 4 * 8 * COLUMNS / 20
    assert row["bytes_down"] == 2 * (4 * 8 * COLUMNS + PLAIN_BYTES)
    assert trainer.client.store.load("a", trainer.training, 0) is None
    replies = [reply for _, sent, reply in seen if sent.scalars["task"] == "train"]
    assert all(reply.groups["update_codes"]["weight"].dtype == torch.uint8 for reply in replies)


def test_the_server_averages_what_was_decoded(tmp_path):
    trainer = wide_federation(tmp_path, update_codec="orq-9", update_codec_args={"block": 64}, num_rounds=1)
    seen = record_messages(trainer)
    give_faults(trainer, {("b", 0): asked_twice})
    trainer.engine.answer = recording(trainer.engine.answer, seen)
    trainer.train()
    assert trainer.history[0]["absent"] == {}
    coder = make_update_codec("orq-9", {"block": 64}, False)
    ends = {site: coder.decode(sent, reply) for site, sent, reply in seen if sent.scalars["task"] == "train"}
    total = sum(end.scalars["num_samples"] for end in ends.values())
    for name, value in trainer.algorithm.groups["weights"].items():
        parts = [end.groups["weights"][name].double() * end.scalars["num_samples"] / total for end in ends.values()]
        torch.testing.assert_close(value.double(), sum(parts), rtol=0, atol=1e-7)
    change = (
        trainer.algorithm.groups["weights"]["weight"] - trainer.client.initial().groups["weights"]["weight"]
    ).norm()
    assert change > 1e-3


def recording(answer, seen):
    def recorded(site, message):
        reply = answer(site, message)
        seen.append((site, message, reply))
        return reply

    return recorded


FEEDBACK = {"update_codec": "sign", "update_feedback": True}


def test_what_is_unsent_survives_a_restart(tmp_path):
    whole = wide_federation(tmp_path / "whole", **FEEDBACK)
    whole.train()
    wide_federation(tmp_path / "parts", **FEEDBACK, num_rounds=1).train()
    rest = wide_federation(tmp_path / "parts", **FEEDBACK)
    rest.train(resume_from_checkpoint=True)
    assert without_timings(rest.history) == without_timings(whole.history)
    assert kept_by(rest, "a")[1] == kept_by(whole, "a")[1]
    (rest.client.store.folder / "a" / rest.training / "round-1.safetensors").unlink()
    with pytest.raises(InputError, match="'a' has lost what its codec has not sent after round 1"):
        rest.client.answer(
            "a", Message({}, {**rest.algorithm.configure(2)["a"].scalars, "task": "train", "training": rest.training})
        )
    with pytest.raises(InputError, match="update_feedback=False: the checkpoint"):
        wide_federation(tmp_path / "parts", update_codec="sign", num_rounds=3).train(resume_from_checkpoint=True)


def test_what_was_unsent_before_a_lost_reply_counts_again(tmp_path):
    trainer = wide_federation(tmp_path, **FEEDBACK, num_rounds=3)
    seen = []
    give_faults(trainer, {("a", 1): lost})
    trainer.engine.answer = recording(trainer.engine.answer, seen)
    states = {}
    encode = trainer.client.filters.codec.encode

    def noted(sent, reply, state):
        answer, kept = encode(sent, reply, state)
        states[sent.scalars["seed"]] = (state, Message(kept))
        return answer, kept

    trainer.client.filters.codec.encode = noted
    trainer.train()
    assert [*trainer.history[1]["absent"]] == ["a"]
    asked = {(site, sent.scalars["round"]): sent.scalars for site, sent, _ in seen if sent.scalars["task"] == "train"}
    found = {key: states[scalars["seed"]] for key, scalars in asked.items()}
    assert asked["a", 2]["state_round"] == 0 and asked["b", 2]["state_round"] == 1
    for site, before in (("a", 0), ("b", 1)):
        unsent = found[site, 2][0].groups["update_unsent"]
        assert same_bits(unsent, found[site, before][1].groups["update_unsent"])
    assert not same_bits(found["a", 0][1].groups["update_unsent"], found["a", 1][1].groups["update_unsent"])


def damaged(change):
    def fault(answer, site, message):
        reply = answer(site, message)
        codes = {name: tensor.clone() for name, tensor in reply.groups["update_codes"].items()}
        return Message({**reply.groups, "update_codes": change(codes)}, reply.scalars)

    return fault


def with_indices_beyond(codes):
    codes["weight"][:] = 127
    return codes


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("bf16", lambda codes: {"weight": codes["weight"][1:]}, "'weight': is no bf16 of it"),
        ("bf16", lambda codes: {}, "has [] and should have ['weight']"),
        ("bf16", lambda codes: {**codes, "bias": codes["weight"]}, "has ['bias', 'weight']"),
        ("bf16", lambda codes: {"weight": codes["weight"].float()}, "'weight': is no bf16 of it"),
        ("top-k-0.1", with_indices_beyond, "'weight': is no top-k-0.1 of it"),
    ],
)
def test_damage_is_a_failure_of_the_site(name, change, reason):
    coder = make_update_codec(name, None, False)
    sent, reply = messages()
    keep = ("weight", "small", "bias")
    sent, reply = (Message({"weights": {n: m.groups["weights"][n] for n in keep}}, m.scalars) for m in (sent, reply))
    answer = damaged(change)(lambda site, message: coder.encode(sent, reply, None)[0], "a", sent)
    with pytest.raises(InputError) as caught:
        coder.decode(sent, answer)
    assert reason in str(caught.value)


def test_a_round_goes_on_without_a_damaged_reply_or_one_that_is_not_finite(tmp_path):
    trainer = wide_federation(tmp_path, update_codec="bingrad-b")

    def not_finite(codes):
        codes["weight"][-8:] = torch.tensor([math.nan, math.nan]).view(torch.uint8)
        return codes

    give_faults(trainer, {("a", 0): damaged(lambda codes: {}), ("b", 1): damaged(not_finite)})
    trainer.train()
    first, second = (row["absent"] for row in trainer.history)
    assert "should have ['weight']" in first["a"] and second == {"b": "'weights', 'weight': not finite"}
    assert [row["num_sites"] for row in trainer.history] == [1, 1] and len({*digests(trainer.history)}) == 2


def test_clipping_comes_before_the_codec(tmp_path):
    trainer = wide_federation(tmp_path, update_codec="bf16", clip_update=0.01, num_rounds=1)
    seen = record_messages(trainer)
    trainer.train()
    for _, sent, reply in seen:
        if sent.scalars["task"] == "train":
            end = make_update_codec("bf16", None, False).decode(sent, reply).groups["weights"]
            parts = [(end[name].double() - start.double()).norm() for name, start in sent.groups["weights"].items()]
            assert np.linalg.norm(parts) == pytest.approx(0.01, rel=1e-2)
            assert reply.scalars["unclipped_norm"] > 0.011


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"update_codec": "zip"}, "update_codec='zip': must be one of"),
        ({"update_codec": "none"}, "update_codec='none': saves nothing"),
        (
            {"update_codec": "orq-9", "update_codec_args": {"blocks": 3}},
            "update_codec_args.blocks=3: orq-9 has no such",
        ),
        ({"update_codec_args": '{"block": 64}'}, "update_codec_args=.*: has no effect without a codec"),
        ({"update_feedback": True}, "update_feedback=True: has no effect without a codec"),
        (
            {"update_codec": "terngrad", "update_feedback": True},
            "update_codec='terngrad': .* or update_feedback false",
        ),
        ({"update_codec": "bf16", "secure_sum": True}, "update_codec='bf16': masked words cannot be compressed"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        arguments(tmp_path, **settings)


def test_orq_takes_the_ends_that_suit_feedback():
    assert make_update_codec("orq-9", None, True).codec.clip == "optimal"
    assert make_update_codec("orq-9", None, False).codec.clip == "none"


def test_algorithms_that_need_the_exact_change_are_refused(tmp_path):
    trainer = wide_federation(tmp_path, algorithm="scaffold", update_codec="bf16")
    with pytest.raises(ConfigurationError, match="update_codec='bf16': replies of scaffold also hold control_change"):
        trainer.train()
