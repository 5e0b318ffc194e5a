"""Key agreement: X25519 between two parties, HKDF-SHA256 from their secret to one key a request."""

from importlib import import_module
from types import ModuleType

from hf_mlopt.errors import InputError


KEY_BYTES = 32
_LABEL = b"hf_mlopt/secure_sum/pairwise/1"


def primitives(name: str) -> ModuleType:
    """
    A module of `cryptography.hazmat.primitives`, imported on first use: only parties that mask need the package.

    Raises:
        InputError: If the package is not installed.
    """
    try:
        return import_module(f"cryptography.hazmat.primitives.{name}")
    except ImportError as error:
        raise InputError("masks need the package `cryptography`: pip install 'hf-mlopt[secure-sum]'") from error


def encode_parts(*parts: bytes) -> bytes:
    """The parts behind their lengths, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def new_private_key() -> bytes:
    """32 bytes from the operating system's generator, an X25519 private key (RFC 7748)."""
    return primitives("asymmetric.x25519").X25519PrivateKey.generate().private_bytes_raw()


def public_key(private_key: bytes) -> bytes:
    """The X25519 public key of a private one, 32 bytes each."""
    key = primitives("asymmetric.x25519").X25519PrivateKey.from_private_bytes(private_key)
    return key.public_key().public_bytes_raw()


def pair_key(private_key: bytes, peer: bytes, *, run: str, epoch: int, pair: tuple[str, str]) -> bytes:
    """
    The key that two parties share for one epoch of a run (HKDF, RFC 5869: extract, then expand).

    Args:
        private_key (`bytes`): Own, 32 bytes.
        peer (`bytes`): The other's public key, 32 bytes.
        run (`str`), epoch (`int`): From the roster.
        pair (`tuple[str, str]`): Both names in roster order, alike at both ends.

    Returns:
        `bytes`: 32 bytes.

    Raises:
        InputError: If the peer's key is one of the few points that make the shared secret zero.
    """
    x25519, hkdf, hashes = (primitives(name) for name in ("asymmetric.x25519", "kdf.hkdf", "hashes"))
    private = x25519.X25519PrivateKey.from_private_bytes(private_key)
    try:
        secret = private.exchange(x25519.X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        text = f"public key {peer.hex()} of the pair {pair} gives a secret anyone knows: ask that party for a new key"
        raise InputError(text) from error
    info = encode_parts(_LABEL, run.encode(), epoch.to_bytes(8, "big"), *(name.encode() for name in pair))
    return hkdf.HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def request_key(key: bytes, roster_digest: bytes, request: bytes) -> bytes:
    """
    The key of one request, so that no two requests share any keystream (HKDF, expand only).

    Args:
        key (`bytes`): From [`pair_key`].
        roster_digest (`bytes`): Of the party set; parties that disagree on it get masks that do not cancel.
        request (`bytes`): What identifies the request.

    Returns:
        `bytes`: 32 bytes.
    """
    hkdf, hashes = primitives("kdf.hkdf"), primitives("hashes")
    info = encode_parts(_LABEL, roster_digest, request)
    return hkdf.HKDFExpand(hashes.SHA256(), KEY_BYTES, info=info).derive(key)
