"""Codes in bytes and back."""

import pytest
import torch

from hf_mlopt.communication import packing
from hf_mlopt.communication.packing import pack, packed_bytes, unpack
from hf_mlopt.errors import ConfigurationError
from tests.reference import gradient_codecs as reference


ALPHABETS = (2, 3, 4, 5, 6, 9, 16, 17, 256)


def random_codes(count: int, alphabet: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 1000 + alphabet)
    codes = torch.randint(0, alphabet, (count,), dtype=torch.uint8, generator=generator)
    codes[-1:] = alphabet - 1
    return codes


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_every_length_is_exact_and_laid_out_as_documented(alphabet):
    for count in range(71):
        codes = random_codes(count, alphabet)
        packed = pack(codes, alphabet)
        assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(count, alphabet)
        assert packed.tolist() == reference.pack(codes.tolist(), alphabet)
        assert torch.equal(unpack(packed, alphabet, count), codes)


@pytest.mark.parametrize("alphabet, digits", [(2, 8), (3, 5), (4, 4), (5, 3), (9, 2), (16, 2), (17, 1), (256, 1)])
def test_bytes_taken(alphabet, digits):
    assert packed_bytes(0, alphabet) == 0
    assert [packed_bytes(n, alphabet) for n in (1, digits, digits + 1)] == [1, 1, 2]
    assert packed_bytes(10**6, alphabet) == -(-(10**6) // digits)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_the_path_of_other_devices_gives_the_same_bytes(alphabet, monkeypatch):
    codes = random_codes(1003, alphabet)
    expected = pack(codes, alphabet)
    monkeypatch.setattr(packing, "native", lambda tensor: tensor)
    assert torch.equal(pack(codes, alphabet), expected)
    assert torch.equal(unpack(expected, alphabet, 1003), codes)


def test_results_do_not_share_memory_with_what_they_came_from():
    codes = random_codes(9, 256)
    packed = pack(codes, 256)
    again = unpack(packed, 256, 9)
    codes.zero_(), packed[:8].zero_()
    assert again.tolist() == random_codes(9, 256).tolist()


@pytest.mark.parametrize("alphabet", [0, 1, 257])
def test_an_alphabet_no_byte_holds_is_refused(alphabet):
    with pytest.raises(ConfigurationError, match=f"alphabet={alphabet}: must be between 2 and 256"):
        packed_bytes(8, alphabet)


def test_bytes_of_another_count_are_refused():
    with pytest.raises(ConfigurationError, match="17 codes of 2 take 3 bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 2, 17)
