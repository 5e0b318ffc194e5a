"""The random numbers and the stochastic rounding they decide."""

import pytest
import torch

from hf_mlopt.communication.quantizers import draws, rounding
from hf_mlopt.communication.quantizers.draws import Draw, stream, uniform
from hf_mlopt.communication.quantizers.memory import Memory
from hf_mlopt.communication.quantizers.rounding import round_between_levels, round_on_grid
from tests.reference import gradient_codecs as reference


KEY = (3, 1, 4, 1, 5)


def numbers(key, start, count) -> torch.Tensor:
    return torch.from_numpy(uniform(stream(key), start, count, Memory("cpu")).copy())


def draw(key=KEY, position=0) -> Draw:
    return Draw(stream(key), position, Memory("cpu"))


def rounded(values, levels, key=KEY, position=0) -> torch.Tensor:
    codes = torch.empty(values.shape, dtype=torch.uint8)
    round_between_levels(values, levels, draw(key, position), codes)
    return codes


@pytest.mark.parametrize("key", [(), (0,), KEY, (2**40, 7, 2**31), (2**64 - 1,)])
def test_numbers_are_those_of_splitmix(key):
    assert numbers(key, 0, 50).tolist() == [reference.uniform(key, i) for i in range(50)]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 7, 2**33 + 1])
@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_numbers_belong_to_a_position(start, count):
    assert numbers(KEY, start, count).tolist() == [reference.uniform(KEY, start + i) for i in range(count)]


def test_numbers_are_uniform():
    u = numbers(KEY, 0, 1 << 18)
    assert 0 < u.min() and u.max() < 1
    counts = (u * 256).long().bincount(minlength=256).double()
    chi_square = ((counts - 1024) ** 2 / 1024).sum().item()
    assert 255 - 5 * (2 * 255) ** 0.5 < chi_square < 255 + 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("other", [(3, 1, 4, 1, 6), (3, 2, 4, 1, 5), (4, 1, 4, 1, 5), (3, 1, 4, 5, 1), (3, 1, 4, 1)])
def test_streams_of_different_keys_are_independent(other):
    a, b = numbers(KEY, 0, 1 << 16) - 0.5, numbers(other, 0, 1 << 16) - 0.5
    for shift in range(5):
        correlation = (a[shift:] * b[: len(b) - shift]).mean() * 12
        assert correlation.abs() < 5 / 256
    lagged = (a[1:] * a[:-1]).mean() * 12
    assert lagged.abs() < 5 / 256


def test_the_path_of_other_devices_gives_the_same_numbers_and_codes(monkeypatch):
    torch.manual_seed(0)
    values, levels = torch.randn(5, 333), torch.randn(5, 9).sort(dim=1).values
    expected_numbers, expected = numbers(KEY, 5, 1000), rounded(values, levels, position=6)
    on_grid = torch.empty(5, 333, dtype=torch.uint8)
    round_on_grid(values * 2 + 4, 8, draw(), on_grid)
    for module in (draws, rounding):
        monkeypatch.setattr(module, "native", lambda tensor: tensor)
    assert torch.equal(uniform(stream(KEY), 5, 1000, Memory("cpu")), expected_numbers)
    assert torch.equal(rounded(values, levels, position=6), expected)
    again = torch.empty(5, 333, dtype=torch.uint8)
    round_on_grid(values * 2 + 4, 8, draw(), again)
    assert torch.equal(again, on_grid)


@pytest.mark.parametrize("num_levels", [2, 3, 5, 9, 17])
def test_codes_are_those_of_the_definition(num_levels):
    torch.manual_seed(num_levels)
    values, levels = 2 * torch.randn(3, 101), torch.randn(3, num_levels).sort(dim=1).values
    found = rounded(values, levels, position=10)
    for n in range(3):
        u = [reference.uniform(KEY, 10 + 101 * n + i) for i in range(101)]
        row = zip(values[n].tolist(), u, strict=True)
        assert found[n].tolist() == [reference.round_between(x, levels[n].tolist(), w) for x, w in row]


def test_chunks_make_no_difference(monkeypatch):
    torch.manual_seed(1)
    values, levels = torch.randn(7, 50), torch.randn(7, 5).sort(dim=1).values
    expected = rounded(values, levels)
    monkeypatch.setattr(rounding, "_CACHED", 120)
    assert torch.equal(rounded(values, levels), expected)


def test_a_value_on_a_level_gets_it_and_outside_saturates():
    levels = torch.tensor([[-1.0, -0.25, 0.0, 0.1, 3.0]])
    values = levels.repeat_interleave(1000, dim=1)
    assert torch.equal(rounded(values, levels), torch.arange(5).repeat_interleave(1000).to(torch.uint8)[None])
    assert rounded(torch.tensor([[-5.0, -1.001, 3.001, 1e30]]), levels).tolist() == [[0, 0, 4, 4]]


def test_equal_levels_are_one():
    levels = torch.tensor([[1.0, 1.0, 1.0]])
    codes = rounded(torch.full((1, 100), 1.0), levels)
    assert torch.equal(levels[0][codes.long()], torch.ones(1, 100))
    codes = rounded(torch.full((1, 4000), 1.5), torch.tensor([[1.0, 1.0, 2.0, 2.0]]))
    assert set(codes.unique().tolist()) == {1, 2}


def test_rounding_is_unbiased():
    levels = torch.tensor([[-1.3, -0.2, 0.05, 0.9, 2.0]])
    values = torch.tensor([-1.29, -0.7, -0.19, 0.0, 0.049, 0.3, 0.89, 1.99])
    draws_each = 20_000
    codes = rounded(values.repeat_interleave(draws_each)[None], levels)
    decoded = levels[0][codes[0].long()].view(-1, draws_each).double()
    z = (decoded.mean(1) - values.double()) / (decoded.std(1) / draws_each**0.5)
    assert z.abs().max() < 4


def test_rounding_on_a_grid_is_unbiased_and_keeps_integers():
    position = torch.tensor([0.0, 0.01, 1.5, 2.0, 7.9, 8.0]).repeat_interleave(20_000)[None]
    codes = torch.empty(position.shape, dtype=torch.uint8)
    round_on_grid(position.clone(), 8, draw(), codes)
    mean, spread = codes.view(6, -1).double().mean(1), codes.view(6, -1).double().std(1)
    expected = torch.tensor([0.0, 0.01, 1.5, 2.0, 7.9, 8.0]).double()
    assert ((mean - expected).abs() <= 4 * spread / 20_000**0.5 + 1e-12).all()
    outside = torch.empty(1, 3, dtype=torch.uint8)
    round_on_grid(torch.tensor([[-3.0, 8.001, 300.0]]), 8, draw(), outside)
    assert outside.tolist() == [[0, 8, 8]]
