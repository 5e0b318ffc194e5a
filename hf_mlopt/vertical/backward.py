r"""
How a label owner lets parties without labels train: what it sends in place of the loss derivatives theta.

| mode | the party gets | and can tell from it |
|-|-|-|
| `he` | its own plain gradient X_B^T theta / B | labels over many steps: B >= 4 d_l is a floor, not protection |
| `dp` | theta with Gaussian noise | labels within (epsilon, delta) |
| `plain` | theta | every label: sign(theta) = -y |

In `he` (Paillier, [1999](https://doi.org/10.1007/3-540-48910-X_16)) the owner sends Enc(theta_B); the party returns
Enc(X_B^T theta + r), r uniform over the whole plaintext ring; the owner decrypts, and the party takes r off. Numbers
are integers of fixed point, so that no exponent tells their size, and a fresh encryption of r makes the reply
independent of the randomness that the owner chose.
"""

import math
import os
import secrets

import numpy as np
import scipy.sparse

from hf_mlopt.errors import ConfigurationError, InputError


FRACTION_BITS = 24
_MIN_KEY_BITS = 2048
_LIMIT_BITS = 63  # of a fixed-point number; their products and sums stay far below the ring


def label_leak(batch_size: int, num_features: int, epochs: float) -> float:
    r"""
    Area under the curve of the labels that a party can infer from its own plain gradients, with labels independent of
    its features: \Phi(\sqrt{2P/(1-P)}), P = E d_l / B. One half is nothing.

    Args:
        batch_size (`int`): B.
        num_features (`int`): d_l.
        epochs (`float`): E.
    """
    share = epochs * num_features / batch_size
    return 1.0 if share >= 1 else _normal_cdf(math.sqrt(2 * share / (1 - share)))


class PaillierOwner:
    """
    The label owner of mode `he`: encrypts derivatives, decrypts masked gradients.

    Args:
        key_bits (`int`, *optional*, defaults to 2048): Size of the modulus, at least 2048.

    Raises:
        ConfigurationError: If the key is too small.
        InputError: If `phe` is not installed.
    """

    def __init__(self, key_bits: int = _MIN_KEY_BITS):
        if not isinstance(key_bits, int) or key_bits < _MIN_KEY_BITS or key_bits % 8:
            raise ConfigurationError("key_bits", key_bits, f"must be at least {_MIN_KEY_BITS} and a multiple of 8")
        self._public, self._private = _phe().generate_paillier_keypair(n_length=key_bits)

    @property
    def public_key(self) -> bytes:
        """The modulus, for [`PaillierParty`]."""
        return self._public.n.to_bytes((self._public.n.bit_length() + 7) // 8, "big")

    def encrypt(self, theta: np.ndarray) -> bytes:
        """
        Args:
            theta (`np.ndarray`): Of any shape, row after row.

        Returns:
            `bytes`: One ciphertext an entry.
        """
        integers = _to_integers(np.ravel(theta), "theta")
        return _join([self._public.raw_encrypt(number % self._public.n) for number in integers], self._public.n)

    def decrypt(self, reply: bytes) -> bytes:
        """
        Args:
            reply (`bytes`): From [`PaillierParty.multiply`].

        Returns:
            `bytes`: Masked sums, uniform to this party.
        """
        size = len(self.public_key)
        plain = [self._private.raw_decrypt(cipher) for cipher in _split(reply, self._public.n)]
        return b"".join(number.to_bytes(size, "big") for number in plain)


class PaillierParty:
    """
    A party without labels in mode `he`.

    Args:
        public_key (`bytes`): The owner's modulus.

    Raises:
        ConfigurationError: If it is too small.
        InputError: If `phe` is not installed.
    """

    def __init__(self, public_key: bytes):
        modulus = int.from_bytes(public_key, "big")
        if modulus.bit_length() < _MIN_KEY_BITS:
            remedy = f"a Paillier modulus has at least {_MIN_KEY_BITS} bits"
            raise ConfigurationError("public_key", f"{modulus.bit_length()} bits", remedy)
        self._public = _phe().PaillierPublicKey(modulus)

    def multiply(self, message: bytes, features) -> tuple[bytes, list[int]]:
        """
        Args:
            message (`bytes`): Enc(theta_B), from [`PaillierOwner.encrypt`].
            features (`np.ndarray` or sparse): `[B, d_l]`, own.

        Returns:
            `tuple[bytes, list[int]]`: Enc(X_B^T theta + r) for the owner, and r, to be kept.

        Raises:
            InputError: If the message is not that of B rows.
        """
        phe = _phe()
        ciphers = _split(message, self._public.n)
        columns = scipy.sparse.csc_array(features)
        rows = columns.shape[0]
        if not ciphers or len(ciphers) % rows:
            raise InputError(f"{len(ciphers)} encrypted derivatives for {rows} rows: ask for the batch again")
        classes = len(ciphers) // rows
        theta = [phe.EncryptedNumber(self._public, cipher, 0) for cipher in ciphers]
        replies, masks = [], []
        for column in range(columns.shape[1]):
            part = slice(columns.indptr[column], columns.indptr[column + 1])
            numbers = _to_integers(columns.data[part], "features")
            for k in range(classes):
                mask = secrets.randbelow(self._public.n)
                total = phe.EncryptedNumber(self._public, self._public.raw_encrypt(mask), 0)
                for row, number in zip(columns.indices[part], numbers, strict=True):
                    if number:
                        total = total + theta[row * classes + k] * number
                replies.append(total.ciphertext(be_secure=False))  # the encryption of r is fresh already
                masks.append(mask)
        return _join(replies, self._public.n), masks

    def unmask(self, plain: bytes, masks: list[int], batch_size: int) -> np.ndarray:
        """
        Args:
            plain (`bytes`): From [`PaillierOwner.decrypt`].
            masks (`list[int]`): From [`multiply`], used once.
            batch_size (`int`): B.

        Returns:
            `np.ndarray`: X_B^T theta / B, float64, flat: feature after feature, classes within.

        Raises:
            InputError: If the sums are not as many as the masks.
        """
        modulus = self._public.n
        size = (modulus.bit_length() + 7) // 8
        if len(plain) != size * len(masks):
            raise InputError(f"{len(plain)} bytes of decrypted sums, expected {size * len(masks)}: ask again")
        sums = []
        for place, mask in enumerate(masks):
            number = (int.from_bytes(plain[place * size : (place + 1) * size], "big") - mask) % modulus
            number = number - modulus if number > modulus // 2 else number
            sums.append(math.ldexp(float(number), -2 * FRACTION_BITS) / batch_size)
        return np.array(sums)


def noise_for(epsilon: float, delta: float, releases: int, sensitivity: float) -> float:
    r"""
    The least noise \sigma with which the labels stay private within (\epsilon, \delta), exact by Gaussian differential
    privacy ([1905.02383](https://huggingface.co/papers/1905.02383)): T releases of a value of sensitivity \Delta are
    \mu-GDP with \mu = \sqrt{T} \Delta / \sigma, and \delta(\epsilon) = \Phi(-\epsilon/\mu + \mu/2) -
    e^\epsilon \Phi(-\epsilon/\mu - \mu/2).

    A row's label enters one release an epoch. The same noisy derivatives go to all parties; noise drawn for each of
    them would be one release each.

    Args:
        epsilon (`float`), delta (`float`): The bound; delta below 1 / n.
        releases (`int`): T, of one row's derivatives, such as the number of epochs.
        sensitivity (`float`): \Delta, see [`sensitivity_of`].

    Returns:
        `float`: Standard deviation.

    Raises:
        ConfigurationError: If epsilon or delta is out of range.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigurationError("epsilon", epsilon, "must be a positive number")
    if not 0 < delta < 1:
        raise ConfigurationError("delta", delta, "must lie between 0 and 1, below one over the rows")
    low, high = 0.0, 1.0
    while _delta_of(epsilon, high) < delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta_of(epsilon, middle) < delta else (low, middle)
    return math.sqrt(releases) * sensitivity / low


def sensitivity_of(loss: str, clip: float | None = None) -> float:
    r"""
    How far a change of a row's label can move its derivatives (L2 norm).

    Args:
        loss (`str`): `"logistic"`: |\sigma(z) + \sigma(-z)| = 1. `"multinomial"`: \sqrt 2. `"ridge"`: 2 `clip`.
        clip (`float`, *optional*): Bound of |theta| that the owner enforces; needed for ridge.
    """
    known = {"logistic": 1.0, "multinomial": math.sqrt(2)}
    if loss in known:
        return known[loss] if clip is None else min(known[loss], 2 * clip)
    if loss != "ridge":
        raise ConfigurationError("loss", loss, f"must be one of {[*known, 'ridge']}")
    if clip is None or clip <= 0:
        raise ConfigurationError("clip", clip, "must be a positive number: derivatives of ridge have no bound")
    return 2 * clip


def noisy_theta(theta: np.ndarray, noise: float, clip: float | None = None) -> np.ndarray:
    """
    Derivatives with Gaussian noise from the operating system's generator, on a grid of 2^-24.

    Args:
        theta (`np.ndarray`): `[B]` or `[B, K]`.
        noise (`float`): Standard deviation.
        clip (`float`, *optional*): Rows are scaled to at most this norm first.

    Returns:
        `np.ndarray`: Of the same shape.
    """
    from scipy.special import ndtri

    theta = np.asarray(theta, np.float64)
    if clip is not None:
        norms = np.abs(theta) if theta.ndim == 1 else np.linalg.norm(theta, axis=1, keepdims=True)
        theta = theta * np.minimum(1.0, clip / np.maximum(norms, np.finfo(np.float64).tiny))
    words = np.frombuffer(os.urandom(8 * theta.size), "<u8") >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # never 0 or 1
    drawn = theta + noise * ndtri(uniform).reshape(theta.shape)
    return np.ldexp(np.rint(np.ldexp(drawn, FRACTION_BITS)), -FRACTION_BITS)


def _delta_of(epsilon: float, mu: float) -> float:
    return _normal_cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu))


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _log_normal_cdf(x: float) -> float:
    from scipy.special import log_ndtr

    return float(log_ndtr(x))


def _phe():
    try:
        from phe import paillier
    except ImportError as error:
        raise InputError("backward='he' needs the package `phe`: pip install 'phe>=1.5'") from error
    return paillier


def _to_integers(values: np.ndarray, name: str) -> list[int]:
    """Fixed point; the loop is over Python's integers, which have no limit."""
    values = np.asarray(values, np.float64)
    bad = ~(np.abs(values) < 2.0 ** (_LIMIT_BITS - FRACTION_BITS))  # NaN as well
    if bad.any():
        limit = f"must be finite and below 2^{_LIMIT_BITS - FRACTION_BITS} in absolute value; scale it"
        raise ConfigurationError(name, float(values[bad][0]), limit)
    return [int(number) for number in np.rint(np.ldexp(values, FRACTION_BITS)).astype(np.int64)]


def _join(ciphers: list[int], modulus: int) -> bytes:
    size = (2 * modulus.bit_length() + 7) // 8
    return b"".join(cipher.to_bytes(size, "big") for cipher in ciphers)


def _split(data: bytes, modulus: int) -> list[int]:
    size = (2 * modulus.bit_length() + 7) // 8
    if len(data) % size:
        raise InputError(f"{len(data)} bytes are no ciphertexts of {size} bytes each: ask again")
    numbers = [int.from_bytes(data[start : start + size], "big") for start in range(0, len(data), size)]
    if any(not 0 < number < modulus * modulus or math.gcd(number, modulus) != 1 for number in numbers):
        raise InputError("a ciphertext outside its group: the other party does not follow the protocol")
    return numbers
