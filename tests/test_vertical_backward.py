"""Backward modes: the encrypted gradient is the plain one, the noise keeps its bound, labels leak as stated."""

import math

import numpy as np
import pytest
import scipy.sparse
from scipy.stats import norm

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.backward import (
    PaillierOwner,
    PaillierParty,
    label_leak,
    noise_for,
    noisy_theta,
    sensitivity_of,
)


@pytest.fixture(scope="module")
def owner():
    pytest.importorskip("phe", reason="backward='he' needs the package phe")
    return PaillierOwner()


def exchange(owner, theta, features):
    """All three messages of one batch; the gradient and what each side saw."""
    party = PaillierParty(owner.public_key)
    message = owner.encrypt(theta)
    reply, masks = party.multiply(message, features)
    plain = owner.decrypt(reply)
    return party.unmask(plain, masks, len(features)), message, reply, plain


@pytest.mark.parametrize("classes, form", [((), np.array), ((2,), scipy.sparse.csr_array)])
def test_the_encrypted_gradient_is_the_plain_one(owner, classes, form):
    rng = np.random.default_rng(0)
    theta, features = rng.normal(size=(4, *classes)), rng.normal(size=(4, 2))
    features[1, 1] = features[3, 0] = 0.0
    party = PaillierParty(owner.public_key)
    reply, masks = party.multiply(owner.encrypt(theta), form(features))
    gradient = party.unmask(owner.decrypt(reply), masks, 4)
    expected = (features.T @ theta / 4).ravel()
    # Each product is off by 2^-25 (|theta| + |x|), rounding of fixed point.
    assert np.abs(gradient - expected).max() < 2.0**-25 * 8


def test_integers_come_through_exactly(owner):
    theta, features = np.array([-3.0, 5.0]), np.array([[2.0, -7.0], [1.5, 0.0]])
    gradient, *_ = exchange(owner, theta, features)
    assert gradient.tolist() == [(-6 + 7.5) / 2, 21 / 2]


def test_messages_hide_their_numbers_and_never_repeat(owner):
    """The owner's plain view is uniform over the ring; the same batch twice looks like two."""
    theta, features = np.zeros(2), np.zeros((2, 1))
    party, bits, seen = PaillierParty(owner.public_key), [], set()
    modulus = int.from_bytes(owner.public_key, "big")
    for _ in range(2):
        message = owner.encrypt(theta)
        reply, masks = party.multiply(message, features)
        plain = owner.decrypt(reply)
        assert party.unmask(plain, masks, 2).tolist() == [0.0]
        number = int.from_bytes(plain, "big")
        assert 2**-40 < number / modulus < 1 - 2**-40
        bits.append(number)
        half = len(message) // 2
        seen |= {message[:half], message[half:], reply}
    assert len(seen) == 6 and len(set(bits)) == 2


def test_the_owner_learns_nothing_of_the_features_from_its_own_randomness(owner):
    """Without a fresh encryption the reply would be a product of the owner's ciphertexts."""
    theta, features = np.array([1.0]), np.array([[1.0]])
    message = owner.encrypt(theta)
    reply, (mask,) = PaillierParty(owner.public_key).multiply(message, features)
    n = int.from_bytes(owner.public_key, "big")
    sent, got = (int.from_bytes(data, "big") for data in (message, reply))
    known = pow(sent, 2**24, n * n) * (1 + mask * n) % (n * n)  # Enc(theta)^x times g^r, no new randomness
    assert got != known


def test_malformed_ciphertexts_and_small_keys(owner):
    party = PaillierParty(owner.public_key)
    good = owner.encrypt(np.ones(2))
    half = len(good) // 2
    no_unit = bytes(half - len(owner.public_key)) + owner.public_key  # the modulus itself
    for bad in (good[:-1], bytes(len(good)), good[:half] + b"\xff" * half, good[:half] + no_unit):
        with pytest.raises(InputError, match="ciphertext"):
            party.multiply(bad, np.ones((2, 1)))
    with pytest.raises(InputError, match="2 encrypted derivatives for 3 rows"):
        party.multiply(good, np.ones((3, 1)))
    with pytest.raises(InputError, match="decrypted sums"):
        party.unmask(b"", [1], 2)
    with pytest.raises(ConfigurationError, match="public_key='1024 bits'"):
        PaillierParty((1 << 1023 | 1).to_bytes(128, "big"))
    for bits in (1024, 2049, 2048.0):
        with pytest.raises(ConfigurationError, match="key_bits="):
            PaillierOwner(bits)
    for bad in (math.nan, math.inf, 2.0**40):
        with pytest.raises(ConfigurationError, match="theta="):
            owner.encrypt(np.array([0.0, bad]))
        with pytest.raises(ConfigurationError, match="features="):
            party.multiply(good, np.array([[1.0], [bad]]))


def test_without_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "phe", None)
    with pytest.raises(InputError, match="pip install 'phe>=1.5'"):
        PaillierOwner()


def test_the_stated_leak():
    assert label_leak(128, 1, 1) == pytest.approx(0.55, abs=0.002)
    assert label_leak(40, 10, 1) == pytest.approx(0.793, abs=0.001)
    assert label_leak(320, 10, 1) == pytest.approx(0.6, abs=0.001)
    assert label_leak(40, 10, 4) == 1.0
    assert label_leak(10**9, 1, 1) == pytest.approx(0.5, abs=1e-4)


# Differential privacy.


@pytest.mark.parametrize("epsilon, releases, sensitivity", [(5.0, 1, 1.0), (5.0, 40, 1.0), (0.5, 40, math.sqrt(2))])
def test_the_bound_is_that_of_the_hockey_stick_divergence(epsilon, releases, sensitivity):
    """delta(eps) = integral of max(p - e^eps q, 0) over the T releases, which is one Gaussian of sqrt(T) the shift."""
    shift = math.sqrt(releases) * sensitivity / noise_for(epsilon, 1e-5, releases, sensitivity)
    x = np.linspace(-40, 40 + shift, 2_000_001)
    gap = norm.pdf(x, shift) - np.exp(epsilon) * norm.pdf(x)
    delta = np.maximum(gap, 0).sum() * (x[1] - x[0])
    assert delta == pytest.approx(1e-5, rel=1e-3)


def test_noise_grows_with_releases_and_with_privacy():
    assert noise_for(1.0, 1e-5, 9, 2.0) == pytest.approx(3 * 2 * noise_for(1.0, 1e-5, 1, 1.0), rel=1e-12)
    noises = [noise_for(epsilon, 1e-5, 1, 1.0) for epsilon in (0.01, 0.1, 1.0, 10.0)]
    assert noises == sorted(noises, reverse=True)
    assert 0.049 < noise_for(21_000.0, 1e-5, 100, 1.0) < 0.051  # no overflow where there is next to no privacy


@pytest.mark.parametrize("loss, label_a, label_b", [("logistic", 1, -1), ("multinomial", 0, 2)])
def test_no_label_moves_its_derivative_by_more_than_the_sensitivity(loss, label_a, label_b):
    rng, largest = np.random.default_rng(0), 0.0
    for _ in range(200):
        if loss == "logistic":
            z = rng.normal(0, 5)
            values = [np.array([-y / (1 + np.exp(y * z))]) for y in (label_a, label_b)]
        else:
            z = rng.normal(0, 5, 4)
            p = np.exp(z) / np.exp(z).sum()
            values = [p - np.eye(4)[y] for y in (label_a, label_b)]
        largest = max(largest, float(np.linalg.norm(values[0] - values[1])))
    assert largest == pytest.approx(sensitivity_of(loss))


def test_sensitivities():
    assert sensitivity_of("ridge", 3.0) == 6.0 and sensitivity_of("logistic", 0.1) == 0.2
    for clip in (None, 0, -1.0):
        with pytest.raises(ConfigurationError, match="clip="):
            sensitivity_of("ridge", clip)
    with pytest.raises(ConfigurationError, match="loss='hinge'"):
        sensitivity_of("hinge")


@pytest.mark.parametrize("shape", [(40_000,), (10_000, 4)])
def test_noise_is_gaussian_fresh_and_not_numpys(shape):
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        drawn.append(noisy_theta(np.full(shape, 0.25), 2.0))
    assert drawn[0].shape == shape and not (drawn[0] == drawn[1]).any()
    z = np.sort((drawn[0].ravel() - 0.25) / 2.0)
    steps = np.arange(1, len(z) + 1) / len(z)
    assert np.abs(norm.cdf(z) - steps).max() < 2.5 / math.sqrt(len(z))  # Kolmogorov-Smirnov, p = 1e-5
    assert (np.ldexp(drawn[0], 24) % 1 == 0).all()


def test_clipping():
    theta = np.array([-5.0, 0.5, 2.0])
    assert np.allclose(noisy_theta(theta, 1e-12, clip=1.0), [-1, 0.5, 1], atol=1e-7)
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert np.allclose(noisy_theta(rows, 1e-12, clip=1.0), [[0.6, 0.8], [0.3, 0.4], [0, 0]], atol=1e-7)


def test_the_noise_bounds_the_best_guess_of_labels():
    """The best guess from one release is right with Phi(mu / 2), mu being sensitivity over noise."""
    from hf_mlopt.vertical.attacks import labels_from_theta

    rng = np.random.default_rng(0)
    y = rng.choice([-1.0, 1.0], 20_000)
    theta = -y * 0.5
    assert (labels_from_theta(theta) == y).all()  # mode plain: every label
    for noise in (0.5, 2.0, 8.0):
        right = (labels_from_theta(noisy_theta(theta, noise)) == y).mean()
        assert right == pytest.approx(norm.cdf(0.5 / noise), abs=0.02)


@pytest.mark.parametrize("change", [{"epsilon": 0}, {"epsilon": math.nan}, {"delta": 0.0}, {"delta": 1}])
def test_bounds_out_of_range(change):
    with pytest.raises(ConfigurationError, match=f"{next(iter(change))}="):
        noise_for(**{"epsilon": 1.0, "delta": 1e-5, **change}, releases=1, sensitivity=1.0)
