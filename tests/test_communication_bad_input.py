"""What is refused, when, and in which words."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from compressed import SETTINGS, Layers, coded, digest, loss_of, sgd, train, wrap
from processes import together
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from hf_mlopt.communication import CompressionConfig, compress
from hf_mlopt.communication.config import logger
from hf_mlopt.errors import ConfigurationError, InputError


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
AHEAD = {"error_feedback": "step-ahead"}


def refusal(function):
    try:
        function()
    except InputError as error:
        return str(error)
    raise AssertionError("was not refused")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grad_codec": "bingrad"}, "grad_codec='bingrad': must be one of none (or fp32), bf16, fp16, fp8, sign"),
        ({"grad_codec": "orq-1"}, "grad_codec_args.levels=1: "),
        ({"grad_codec_down": "gzip"}, "grad_codec_down='gzip': must be one of none"),
        ({"error_average_codec": "x"}, "error_average_codec='x': must be one of none"),
        ({"grad_codec_args": {"block": 0}}, "grad_codec_args.block=0: must be at least 1"),
        (
            {"grad_codec_args": {"ratio": 0.1}},
            "grad_codec_args.ratio=0.1: bingrad-b has no such setting; it has block",
        ),
        ({"error_feedback": "ahead"}, "error_feedback='ahead': must be one of none, classic, step-ahead"),
        ({"collective": "ring"}, "collective='ring': must be one of auto, two-phase, all-gather"),
        ({"step_ahead": 1.5}, "step_ahead=1.5: must be between 0 and 1"),
        ({"step_ahead": float("nan")}, "step_ahead=nan: must be between 0 and 1"),
        ({"min_bytes": -1}, "min_bytes=-1: must be at least 0"),
        ({"warmup_steps_uncompressed": -1}, "warmup_steps_uncompressed=-1: must be at least 0"),
        ({"error_average_period": -2, **AHEAD}, "error_average_period=-2: must be at least 0"),
        ({"error_average_period": 5}, "error_average_period=5: needs error_feedback"),
        ({"grad_codec": "terngrad", **AHEAD}, "grad_codec='terngrad': errs by more than the gradient on some data"),
        ({"grad_codec_down": "orq-3-none", **AHEAD}, "grad_codec_down='orq-3': errs by more than the gradient"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_a_setting_out_of_range_is_named(settings, message):
    assert refusal(lambda: CompressionConfig(**settings)).startswith(message)


def test_settings_that_fit_are_taken(monkeypatch):
    warned = []
    monkeypatch.setattr(logger, "warning", warned.append)
    assert CompressionConfig(grad_codec="orq-3", **AHEAD).up.clip == "optimal"  # what error feedback wants
    assert CompressionConfig(grad_codec="orq-3").up.clip == "none"  # unbiased
    assert CompressionConfig(grad_codec="orq-3", grad_codec_down="sign").down.name == "sign"
    assert not warned
    CompressionConfig(grad_codec="qsgd-9", **AHEAD)
    assert warned[0].startswith("grad_codec='qsgd-9'") and len(warned) == 2  # up and down


def test_only_the_wrapped_model_has_gradients_to_code():
    net = Layers()
    message = refusal(lambda: compress(net, sgd(net)))
    assert message.startswith("model='Layers': gradients are coded on their way between DDP replicas; start several")
    assert "FSDP, DeepSpeed and tensor parallelism" in message
    with pytest.raises(ConfigurationError, match="grad_codec='gzip'"):
        compress(net, sgd(net), grad_codec="gzip")


def in_two(function):
    answers = together(lambda rank: [dist.get_world_size(), function(rank)])
    for answer in answers:
        assert isinstance(answer, list), answer
        assert answer[0] == 2
    return [answer[1] for answer in answers]


@pytest.mark.distributed
def test_what_ddp_cannot_take_is_refused():
    def run(rank):
        model, optimizer, _ = coded(rank, 1)
        again = refusal(lambda: compress(model, optimizer))
        other = wrap(Layers())
        other.register_comm_hook(None, fp16_compress_hook)
        foreign = refusal(lambda: compress(other, sgd(other)))
        without = refusal(lambda: compress(wrap(Layers()), **AHEAD))
        train(model, optimizer, rank, 1, start=1)  # what was there still works
        return [again, foreign, without]

    for again, foreign, without in in_two(run):
        hook = "model='DistributedDataParallel': has a communication hook already, and DDP takes one"
        assert again == foreign == hook
        assert without == "optimizer=None: is needed for error feedback, which follows its steps"


@pytest.mark.distributed
def test_without_an_optimizer_gradients_are_coded_all_the_same():
    def run(rank):
        net = Layers()
        model = wrap(net)
        compression = compress(model, **SETTINGS)
        optimizer = sgd(model)
        train(model, optimizer, rank, 3)
        assert compression.take_traffic().coded > 0
        return digest(net)

    one, other = in_two(run)
    assert one == other


@pytest.mark.distributed
def test_ranks_that_disagree_are_refused_together_and_the_field_is_named():
    others = [{"grad_codec": "sign"}, {"seed": 1}, {"grad_codec_args": {"block": 32}}, {"exempt": []}, AHEAD]

    def run(rank):
        messages = []
        for other in others:
            net = Layers()
            messages.append(refusal(lambda net=net, other=other: coded(rank, net=net, **(other if rank else {}))))
        return messages

    one, other = in_two(run)
    assert one == other
    for settings, message in zip(others, one, strict=True):
        (field,) = settings
        assert re.match(rf"the ranks disagree about {{'{field}': \[.*\]}}; start all of them with the same", message)


@pytest.mark.distributed
def test_a_rank_that_is_killed_ends_the_others_with_a_message():
    def run(rank, settings):
        def kill(step):
            if step == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            coded(rank, 10, after=kill, **settings)
        except RuntimeError as error:
            return str(error)

    for settings in (AHEAD, {"min_bytes": 1 << 20}):
        first, killed, last = together(lambda rank, s=settings: run(rank, s), world=3)
        assert killed is None
        for rank, message in ((0, first), (2, last)):
            assert f"RuntimeError: rank {rank}: gradients were not exchanged; another process has ended" in message


@pytest.mark.distributed
def test_the_others_wait_as_long_as_in_the_group_of_the_model():
    def run(rank):
        model = wrap(Layers(), process_group=dist.new_group([0, 1], timeout=timedelta(seconds=1)))
        optimizer = sgd(model)
        compress(model, optimizer, **SETTINGS)
        train(model, optimizer, rank, 2)
        if rank == 1:
            return time.sleep(2.5)
        with pytest.raises(RuntimeError, match="(?i)rank 0: gradients were not exchanged.*timed out waiting 1000ms"):
            loss_of(model, rank, 2).backward()
        with pytest.raises(RuntimeError, match="an earlier exchange failed: rank 0: gradients were not exchanged"):
            model.zero_grad()
            loss_of(model, rank, 3).backward()

    started = time.perf_counter()
    assert in_two(run) == [None, None]
    assert time.perf_counter() - started < 60  # not half an hour
