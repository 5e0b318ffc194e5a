"""
Pairwise masks in Python integers and plain loops, after RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (ChaCha20) and
arXiv 1611.04482 (masks). Shares no code with the library and uses nothing but the standard library's hash functions.

c_l = enc(x_l) + sum_{j>l} PRG_lj - sum_{j<l} PRG_lj mod 2^64, with parties in the order of their names.
"""

import hashlib
import hmac
from fractions import Fraction


R = 2**64
P = 2**255 - 19


def x25519(k: bytes, u: bytes) -> bytes:
    """RFC 7748, Section 5: scalar multiplication by the Montgomery ladder."""
    scalar = (int.from_bytes(k, "little") & ~7 & (2**255 - 1)) | 2**254
    x_1 = int.from_bytes(u, "little") & (2**255 - 1)
    x_2, z_2, x_3, z_3 = 1, 0, x_1, 1
    for t in range(254, -1, -1):
        bit = (scalar >> t) & 1
        if bit:
            x_2, z_2, x_3, z_3 = x_3, z_3, x_2, z_2
        A, B, C, D = x_2 + z_2, x_2 - z_2, x_3 + z_3, x_3 - z_3
        AA, BB, DA, CB = A * A, B * B, D * A, C * B
        E = AA - BB
        x_3, z_3 = (DA + CB) ** 2 % P, x_1 * (DA - CB) ** 2 % P
        x_2, z_2 = AA * BB % P, E * (AA + 121665 * E) % P
        if bit:
            x_2, z_2, x_3, z_3 = x_3, z_3, x_2, z_2
    return (x_2 * pow(z_2, P - 2, P) % P).to_bytes(32, "little")


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.new(salt, secret, hashlib.sha256).digest()


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    out, block, count = b"", b"", 1
    while len(out) < length:
        block = hmac.new(key, block + info + bytes([count]), hashlib.sha256).digest()
        out, count = out + block, count + 1
    return out[:length]


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """RFC 8439, Section 2.3."""
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    start += [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
    start += [counter] + [int.from_bytes(nonce[i : i + 4], "little") for i in range(0, 12, 4)]
    s = list(start)

    def step(a, b, c, shift):
        s[a] = (s[a] + s[b]) % 2**32
        mixed = s[c] ^ s[a]
        s[c] = ((mixed << shift) | (mixed >> (32 - shift))) % 2**32

    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for _ in range(10):
        for a, b, c, d in columns + diagonals:
            step(a, b, d, 16)
            step(c, d, b, 12)
            step(a, b, d, 8)
            step(c, d, b, 7)
    return b"".join(((x + y) % 2**32).to_bytes(4, "little") for x, y in zip(s, start, strict=True))


def stream(key: bytes, count: int) -> list[int]:
    """`count` words of 8 bytes, nonce zero, blocks 0, 1, 2, ..."""
    raw = b"".join(chacha20_block(key, block, bytes(12)) for block in range(-(-count // 8)))
    return [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 8 * count, 8)]


def joined(parts: list[bytes]) -> bytes:
    out = b""
    for part in parts:
        out += len(part).to_bytes(8, "big") + part
    return out


def encode(x: float, bits: int) -> int:
    """x as a multiple of 2^-bits, halves to even, in two's complement."""
    return round(Fraction(x) * 2**bits) % R


def decode(word: int, bits: int) -> float:
    """Correctly rounded, as a fraction becomes a float."""
    return float(Fraction(word - R if word >= R // 2 else word, 2**bits))


def masked(
    values, me: str, private: dict, run: str, epoch: int, bits: int, round_id: int, channel: str, context: bytes
):
    """c_l of party `me` for a flat list of values; `private` holds the private key of every party."""
    label = b"hf_mlopt/secure_sum/pairwise/1"
    names = sorted(private)
    base = (9).to_bytes(32, "little")
    public = {name: x25519(private[name], base) for name in names}

    parts = [run.encode(), epoch.to_bytes(8, "big"), bits.to_bytes(8, "big")]
    for name in names:
        parts += [name.encode(), public[name]]
    roster = hashlib.sha256(joined(parts)).digest()
    request = joined([channel.encode(), round_id.to_bytes(8, "big"), context])

    c = [encode(x, bits) for x in values]
    for other in names:
        if other == me:
            continue
        first, second = min(me, other), max(me, other)
        secret = x25519(private[me], public[other])
        info = joined([label, run.encode(), epoch.to_bytes(8, "big"), first.encode(), second.encode()])
        pair = hkdf_expand(hkdf_extract(bytes(32), secret), info, 32)
        key = hkdf_expand(pair, joined([label, roster, request]), 32)
        for i, word in enumerate(stream(key, len(c))):
            c[i] = (c[i] + word if me == first else c[i] - word) % R
    return c


def total(columns, bits: int) -> list[float]:
    """The sum of all c_l, entry by entry."""
    return [decode(sum(entries) % R, bits) for entries in zip(*columns, strict=True)]
