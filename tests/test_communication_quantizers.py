"""Every codec: exact sizes, special blocks, resumable bits, agreement with the literal definitions."""

import math

import pytest
import torch

from hf_mlopt.communication import codec
from hf_mlopt.communication import packing as packing_module
from hf_mlopt.communication.quantizers import bingrad, draws, orq_levels, rounding
from hf_mlopt.communication.quantizers.orq import SharedORQ
from hf_mlopt.errors import ConfigurationError, InputError
from tests.reference import gradient_codecs as reference


NAMES = (
    "fp32",
    "bf16",
    "fp16",
    "fp8",
    "sign",
    "bingrad-b",
    "bingrad-pb",
    "orq-3",
    "orq-5",
    "orq-9",
    "orq-17",
    "orq-5-optimal",
    "orq-9-2.5sigma",
    "orq-9-binned",
    "orq-9-shared",
    "orq-5-shared-optimal",
    "orq-9-shared-2.5sigma",
    "linear-2",
    "linear-9",
    "qsgd-9",
    "qsgd-5-l2",
    "terngrad",
    "terngrad-2.5sigma",
    "top-k-0.1",
)
IN_BLOCKS = tuple(name for name in NAMES if name not in ("fp32", "bf16", "fp16", "top-k-0.1"))
# Whose levels do not come from the root mean square, which no entry of a constant block need lie on.
EXACT_ON_CONSTANTS = tuple(name for name in IN_BLOCKS if "shared-" not in name and "-l2" not in name)
KEY = (7, 0, 2, 0, 1)


def make(name: str, block: int = 64):
    return codec(name) if name not in IN_BLOCKS else codec(name, block=block)


def gradient(numel: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.Laplace(0.0, 0.01).sample((numel,)) * torch.linspace(0.5, 2, max(numel, 1))[:numel]


def decoded(coder, flat: torch.Tensor, key=KEY) -> torch.Tensor:
    return coder.decode(coder.encode(flat, key))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numel", [0, 1, 64, 65, 1000])
def test_the_message_is_as_long_as_declared_and_decodes_to_the_same_bits(name, numel):
    coder, flat = make(name), gradient(numel)
    before = flat.clone()
    payload = coder.encode(flat, KEY)
    message = coder.to_bytes(payload)
    assert torch.equal(flat, before)
    assert message.dtype == torch.uint8 and message.shape == (coder.wire_bytes(numel),) and message.is_contiguous()
    values = coder.decode(payload)
    assert values.dtype == torch.float32 and values.shape == (numel,) and values.isfinite().all()
    for offset in (0, 1, 6):  # as part of a longer message, not aligned for anything
        received = torch.zeros(len(message) + 8, dtype=torch.uint8)[offset : offset + len(message)].copy_(message)
        assert torch.equal(coder.decode(coder.from_bytes(received, numel)), values)


@pytest.mark.parametrize(
    "name, numel, expected",
    [
        ("fp32", 1000, 4000),
        ("bf16", 1000, 2000),
        ("fp8", 4096, 4096 + 2 * 4),
        ("sign", 4097, 513 + 3 * 4),
        ("bingrad-b", 2048, 256 + 8),
        ("bingrad-pb", 2049, 257 + 16),
        ("orq-3", 2048, 410 + 12),
        ("orq-5", 2048, 683 + 20),
        ("orq-9", 2048, 1024 + 36),
        ("orq-9-shared", 4096, 2048 + 2 * 4 + 36),
        ("linear-9", 2048, 1024 + 8),
        ("qsgd-9", 2048, 1024 + 4),
        ("terngrad", 2048, 410 + 4),
        ("top-k-0.1", 1001, 101 * 8),
        ("top-k-0.07", 100, 7 * 8),
    ],
)
def test_bytes_on_the_wire(name, numel, expected):
    assert codec(name).wire_bytes(numel) == expected


@pytest.mark.parametrize("name", NAMES)
def test_decoding_writes_or_adds_in_place(name):
    coder, flat = make(name), gradient(300)
    payload = coder.encode(flat, KEY)
    values = coder.decode(payload)
    out = torch.full((300,), 2.0)
    assert coder.decode(payload, out) is out and torch.equal(out, values)
    torch.testing.assert_close(coder.decode(payload, torch.ones(300), accumulate=True), values + 1)
    assert torch.equal(coder.decode(payload, torch.empty(300, dtype=torch.bfloat16)), values.bfloat16())
    assert torch.equal(coder.decode(payload, accumulate=True), values)
    with pytest.raises(InputError, match=r"300 elements, out has shape \[299\]"):
        coder.decode(payload, torch.empty(299))


@pytest.mark.parametrize("name", NAMES)
def test_the_key_decides_the_bits_of_stochastic_codecs_only(name):
    coder, flat = make(name), gradient(1000)
    first, again, other = (coder.to_bytes(coder.encode(flat, key)) for key in (KEY, KEY, (7, 0, 2, 0, 2)))
    assert torch.equal(first, again)
    assert torch.equal(first, other) != coder.stochastic


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_coded_as_its_float32_value(name, dtype):
    coder, flat = make(name), gradient(200).to(dtype)
    assert torch.equal(decoded(coder, flat), decoded(coder, flat.float()))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fp16"])
@pytest.mark.parametrize("exponent", [-40, -3, 5, 30])
def test_scaling_by_a_power_of_two_scales_the_result(name, exponent):
    coder, flat = make(name), gradient(200)
    assert torch.equal(decoded(coder, flat * 2.0**exponent), decoded(coder, flat) * 2.0**exponent)


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_blocks_do_not_know_each_other(name):
    """A shorter last block is coded with the statistics of what it holds; chunks make no difference."""
    if "shared" in name:
        coder = make(name).fit(gradient(500))
    else:
        coder = make(name)
    flat = gradient(64 * 5 + 17)
    whole = coder.encode(flat, KEY)
    levels = whole.levels[: 6 * coder.levels_per_block].view(6, -1)
    for block in range(6):
        part = flat[64 * block : 64 * block + 64]
        alone = coder.encode(part, KEY)
        torch.testing.assert_close(alone.levels[: coder.levels_per_block], levels[block], rtol=1e-6, atol=0)
        if not coder.stochastic:
            torch.testing.assert_close(coder.decode(alone), coder.decode(whole)[64 * block : 64 * block + 64])


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_chunks_make_no_difference(name, monkeypatch):
    coder, flat = make(name, block=32), gradient(1000)
    expected = coder.to_bytes(coder.encode(flat, KEY)), decoded(coder, flat)
    monkeypatch.setattr(rounding, "_CACHED", 100)
    monkeypatch.setattr(bingrad, "_SOLVED_AT_ONCE", 100)
    monkeypatch.setattr("hf_mlopt.communication.quantizers.orq._SOLVED_AT_ONCE", 100)
    assert torch.equal(coder.to_bytes(coder.encode(flat, KEY)), expected[0])
    assert torch.equal(decoded(coder, flat), expected[1])


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_the_path_of_other_devices_gives_the_same_message(name, monkeypatch):
    coder, flat = make(name), gradient(1000)
    message, values = coder.to_bytes(coder.encode(flat, KEY)), decoded(coder, flat)
    for module in (packing_module, bingrad, draws, orq_levels, rounding):
        monkeypatch.setattr(module, "native", lambda tensor: tensor)
    assert torch.equal(coder.to_bytes(coder.encode(flat, KEY)), message)
    assert torch.equal(decoded(coder, flat), values)


@pytest.mark.parametrize("name", NAMES)
def test_zero_stays_zero(name):
    for numel in (1, 64, 100):
        assert not decoded(make(name), torch.zeros(numel)).any()


@pytest.mark.parametrize("name", EXACT_ON_CONSTANTS)
@pytest.mark.parametrize("value", [0.1, -3.7e-5])
def test_constant_blocks_are_exact(name, value):
    flat = torch.cat((torch.full((64 * 3,), value), gradient(64), torch.full((5,), -value)))
    found = decoded(make(name), flat)
    steps = 2**-22 * abs(value)  # a level is sent as the step between levels, or read back from a sum
    torch.testing.assert_close(found[:192], flat[:192], rtol=0, atol=steps)
    torch.testing.assert_close(found[-5:], flat[-5:], rtol=0, atol=steps)


@pytest.mark.parametrize("name", EXACT_ON_CONSTANTS)
def test_blocks_of_one_entry_are_exact(name):
    flat = gradient(50)
    torch.testing.assert_close(decoded(make(name, block=1), flat), flat, rtol=2**-22, atol=0)


@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [70, 199])
def test_a_block_that_is_not_finite_decodes_to_nan_and_spares_the_others(name, bad, position):
    coder = make(name).fit(gradient(64)) if "shared" in name else make(name)
    flat = gradient(200)
    clean = decoded(coder, flat)
    flat[position] = bad
    found = decoded(coder, flat)
    block = slice(position // 64 * 64, position // 64 * 64 + 64)
    assert found[block].isnan().all()
    found[block], clean[block] = 0, 0
    assert torch.equal(found, clean)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "top-k-0.1"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_entry_that_is_not_finite_arrives_as_such(name, bad):
    flat = gradient(200)
    flat[70] = bad
    found = decoded(make(name), flat)
    assert not found[70].isfinite() and found.isfinite().sum() == 199


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).stochastic and not make(name).biased])
def test_unbiased_codecs_are_unbiased(name):
    coder, flat, draws_each = make(name, block=32), gradient(32, seed=3), 10_000
    if "shared" in name:
        coder = coder.fit(flat)
    found = decoded(coder, flat.repeat(draws_each)).view(draws_each, 32).double()
    spread = found.std(dim=0) / draws_each**0.5
    assert ((found.mean(dim=0) - flat.double()).abs() <= 4.5 * spread + 1e-6 * flat.abs().max()).all()


@pytest.mark.parametrize("name", NAMES)
def test_contractive_codecs_are_so_on_every_distribution(name):
    coder = make(name, block=2048)
    torch.manual_seed(5)
    laplace, student = torch.distributions.Laplace(0.0, 1.0), torch.distributions.StudentT(2.0)
    sparse = torch.randn(8192) * (torch.rand(8192) < 0.01)
    inputs = [torch.randn(8192), laplace.sample((8192,)), student.sample((8192,)), torch.rand(8192) + 1, sparse]
    errors = [((decoded(coder, v) - v).square().sum() / v.square().sum()).item() for v in inputs]
    assert coder.contractive in (True, None)
    if coder.contractive:
        assert max(errors) < 1
    elif coder.alphabet == 3 and not coder.biased:
        assert max(errors) > 1  # which is why it is not called so


@pytest.mark.parametrize(
    "name, gaussian, laplace",
    [
        ("sign", 0.364, 0.502),
        ("bingrad-b", 0.364, 0.501),
        ("bingrad-pb", 0.455, 0.580),
        ("terngrad", 1.868, 3.112),
        ("terngrad-2.5sigma", 1.008, 0.876),
        ("orq-3", 1.718, 2.734),
        ("linear-5", 0.488, 1.141),
        ("qsgd-5", 0.541, 1.131),
        ("orq-5", 0.339, 0.504),
        ("linear-9", 0.122, 0.298),
        ("qsgd-9", 0.136, 0.335),
        ("orq-9", 0.077, 0.114),
        ("orq-9-2.5sigma", 0.055, 0.076),
    ],
)
def test_errors_are_those_on_record(name, gaussian, laplace):
    torch.manual_seed(11)
    for flat, expected in (
        (torch.randn(64 * 2048), gaussian),
        (torch.distributions.Laplace(0.0, 1.0).sample((64 * 2048,)), laplace),
    ):
        error = (decoded(codec(name), flat) - flat).square().sum() / flat.square().sum()
        assert error.item() == pytest.approx(expected, rel=0.08)


def twin(name: str, v: list[float], u: list[float], levels: list[float]) -> list[float]:
    kind, *rest = name.split("-")
    if name == "bingrad-b":
        return reference.bingrad_b(v)
    if kind == "sign":
        return reference.scaled_sign(v)
    if kind == "fp8":
        return reference.fp8(v)
    if kind == "linear":
        return reference.linear(v, int(rest[0]), u)
    if kind == "qsgd":
        return reference.qsgd(v, int(rest[0]), u, norm=rest[1] if rest[1:] else "max")
    if kind == "terngrad":
        return reference.qsgd(v, 3, u, clip=2.5 if rest else None)
    if "shared" in name:
        return reference.shared_orq(v, levels, u, scale="max" if rest[-1] == "shared" else "rms")
    return [levels[reference.round_between(x, levels, w)] for x, w in zip(v, u, strict=True)]


@pytest.mark.parametrize("name", [name for name in IN_BLOCKS if "binned" not in name])
def test_decoded_values_are_those_of_the_literal_definition(name):
    coder, flat = make(name, block=48), gradient(48 * 3 + 11, seed=2)
    if "shared" in name:
        coder = coder.fit(flat)
    payload = coder.encode(flat, KEY)
    found, levels = coder.decode(payload), payload.levels[: 4 * coder.levels_per_block].view(4, -1)
    for block in range(4):
        start = 48 * block
        v = flat[start : start + 48].tolist()
        u = [reference.uniform(KEY, start + i) for i in range(len(v))]
        b = list(coder.codebook) if "shared" in name else levels[block].tolist()
        torch.testing.assert_close(found[start : start + 48], torch.tensor(twin(name, v, u, b)), rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("name", ["bingrad-pb", "orq-3", "orq-5", "orq-9", "orq-5-optimal", "orq-9-2.5sigma"])
def test_levels_are_as_good_as_those_of_the_literal_definition(name):
    flat = gradient(3 * 100, seed=2)
    levels = make(name, block=100).encode(flat, KEY).levels.view(3, -1).tolist()
    clip = {"pb": "optimal", "optimal": "optimal", "2.5sigma": 2.5}.get(name.split("-")[-1], "none")
    sweeps = 4 if name == "bingrad-pb" else 5 if clip == "optimal" else 2
    for v, found in zip(flat.view(3, 100).tolist(), levels, strict=True):
        start = sorted(set(reference.bingrad_b(v))) if name == "bingrad-pb" else None
        expected = reference.orq(v, len(found), clip, sweeps, start)
        error = reference.expected_error(v, expected)
        assert reference.expected_error(v, found) == pytest.approx(error, rel=1e-5)


def test_top_k_keeps_the_largest_and_the_first_of_equals():
    flat = torch.tensor([0.5, -2.0, 1.0, -1.0, 1.0, 0.0, -0.1, 3.0, 1.0, 0.2])
    for kept in range(1, 11):
        coder = codec(f"top-k-{kept / 10}")
        assert decoded(coder, flat).tolist() == pytest.approx(reference.top_k(flat.tolist(), kept))
    assert decoded(codec("top-k-0.0001"), flat).count_nonzero() == 1


def test_bingrad_b_levels_are_the_means_of_both_sides():
    """Without masked sums, and though a float32 mean is off by its rounding."""
    for offset in (0.0, 3.0, -100.0):
        flat = offset + gradient(2048 * 8, seed=4) * 100
        levels = codec("bingrad-b").encode(flat).levels.view(8, 2).double()
        for row, (low, high) in zip(flat.view(8, 2048), levels, strict=True):
            above = row >= row.mean()
            assert high.item() == pytest.approx(row[above].double().mean().item(), rel=1e-6, abs=1e-6)
            assert low.item() == pytest.approx(row[~above].double().mean().item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("width", [3, 100, 2048])
def test_bingrad_b_is_exact_where_the_mean_of_a_constant_block_rounds(width):
    flat = (gradient(400, seed=8) + 1).repeat_interleave(width)
    assert (flat.view(400, width).mean(dim=1) != flat[::width]).any()
    assert torch.equal(decoded(codec("bingrad-b", block=width), flat), flat)


def test_identity_is_exact_and_does_not_share_memory():
    flat = gradient(100)
    payload = codec("none").encode(flat)
    before = flat.clone()
    flat.zero_()
    assert torch.equal(codec("none").decode(payload), before)


def test_a_fitted_codebook_is_kept_and_travels_with_the_message():
    sender = codec("orq-9-shared").fit(gradient(10_000))
    receiver = codec("orq-9-shared")
    assert receiver.codebook is None and len(sender.codebook) == 9
    assert sender.codebook[0] == -1 and sender.codebook[-1] == 1
    other = gradient(5000, seed=9)
    message = sender.to_bytes(sender.encode(other, KEY))
    assert torch.equal(receiver.decode(receiver.from_bytes(message, 5000)), decoded(sender, other))
    # Levels fitted on another gradient of the same kind are about as good as its own.
    errors = [(decoded(c, other) - other).square().sum().item() for c in (sender, receiver)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


def test_shared_levels_cost_little_against_levels_of_each_block():
    torch.manual_seed(6)
    flat = torch.randn(64 * 2048)
    own, shared, even = (
        (decoded(codec(name), flat) - flat).square().sum().item() for name in ("orq-9", "orq-9-shared", "qsgd-9")
    )
    assert own < shared < 1.15 * own < 0.75 * even


def test_fitting_needs_entries_and_leaves_out_what_is_not_finite():
    with pytest.raises(InputError, match="not an empty tensor"):
        codec("orq-5-shared").fit(torch.zeros(0))
    flat = gradient(4096)
    flat[5] = math.inf
    assert all(math.isfinite(level) for level in codec("orq-5-shared", block=64).fit(flat).codebook)


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_made_from_its_own_name(name):
    assert codec(make(name).name) == codec(name)
    assert codec("none") == codec("fp32") and codec("orq-5-none") == codec("orq-5")


def test_settings_override_the_name():
    coder = codec("orq-9", block=256, clip="optimal", sweeps=1)
    assert (coder.block, coder.clip, coder.sweeps, coder.name) == (256, "optimal", 1, "orq-9-optimal")
    assert codec("orq-9-2sigma").clip == "2sigma"


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("orc-9", {}, "codec='orc-9': must be one of none .*bingrad-b, .*orq-LEVELS.*top-k-RATIO"),
        ("orq-9-3.sigma.4", {}, "must be one of"),
        ("orq-9-1.2.3sigma", {}, "clip='1.2.3sigma': must be none, optimal"),
        ("orq-9", {"clip": "0sigma"}, "clip='0sigma': must be none, optimal, or a positive multiple"),
        ("orq-9", {"clip": "infsigma"}, "clip='infsigma'"),
        ("orq-9", {"clip": "2.5"}, "clip='2.5'"),
        ("orq-4", {}, "levels=4: ORQ bisects"),
        ("orq-1", {}, "levels=1: ORQ bisects"),
        ("orq-9", {"block": 0}, "block=0: must be at least 1; 2048"),
        ("orq-9", {"sweeps": -1}, "sweeps=-1: must be at least 0"),
        ("orq-9", {"statistics": "guessed"}, "statistics='guessed': must be sorted or binned"),
        ("bingrad-pb", {"sweeps": 0}, "sweeps=0: must be at least 1"),
        ("bingrad-b", {"sweeps": 2}, "sweeps=2: bingrad-b has no such setting; it has block"),
        ("bf16", {"block": 2}, "block=2: bf16 has no such setting"),
        ("linear-1", {}, "levels=1: must be between 2 and 256"),
        ("linear-257", {}, "levels=257: must be between 2 and 256"),
        ("qsgd-4", {}, "levels=4: must be odd"),
        ("qsgd-9", {"norm": "l1"}, "norm='l1': must be max or l2"),
        ("terngrad-optimal", {}, "clip='optimal': must be none or a factor"),
        ("top-k-0", {}, "ratio=0.0: must be in"),
        ("top-k-1.5", {}, "ratio=1.5: must be in"),
        ("top-k-1-2", {}, "codec='top-k-1-2': must be one of"),
        ("fp32", {"format": "fp64"}, "format='fp64': must be one of fp32, bf16, fp16"),
        ("orq-3-shared", {"codebook": (0.0, 1.0)}, "must be 3 ascending levels"),
        ("orq-3-shared", {"codebook": (0.0, 2.0, 1.0)}, "must be 3 ascending levels"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(name, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        codec(name, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_input_that_is_no_flat_tensor_of_floats_is_refused(name):
    for bad in (torch.zeros(2, 2), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(InputError, match="a codec encodes a flat tensor of floats"):
            make(name).encode(bad)


def test_a_message_of_another_length_is_refused():
    with pytest.raises(InputError, match=r"1000 elements in orq-5 take \d+ bytes, not torch.uint8 \[7\]"):
        codec("orq-5").from_bytes(torch.zeros(7, dtype=torch.uint8), 1000)
    with pytest.raises(InputError, match="torch.int8"):
        codec("bf16").from_bytes(torch.zeros(20, dtype=torch.int8), 10)


def test_codecs_are_values():
    assert codec("orq-9") == codec("orq-9") != codec("orq-9", block=256)
    assert len({codec("orq-9"), codec("orq-9"), codec("sign")}) == 2
    assert isinstance(codec("orq-9-shared"), SharedORQ)
