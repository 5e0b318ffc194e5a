"""What a party shows the others to be itself: its certificate and key, and how the others check them."""

import datetime
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.secure_sum.keys import encode_parts


AUTHORITY, CERTIFICATE, KEY = "authority.pem", "certificate.pem", "private.key"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # one label of DNS
_LABEL = b"hf_mlopt/vertical/public-key/1"


def check_party(name: str) -> str:
    """
    Returns:
        `str`: The name.

    Raises:
        ConfigurationError: If it cannot name a party in a certificate.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name == "localhost":
        remedy = "must be 1 to 63 of a-z, 0-9 and inner hyphens, and not `localhost`: it becomes a certificate's name"
        raise ConfigurationError("party", name, remedy)
    return name


@dataclass(frozen=True)
class Credentials:
    """
    What a party shows to the others.

    Args:
        party (`str`): Its name.
        authority (`bytes`), certificate (`bytes`): PEM.
        key (`bytes`): PEM, secret.
    """

    party: str
    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike, party: str) -> "Credentials":
        """
        Args:
            folder (path): With `authority.pem`, `certificate.pem` and `private.key`.
            party (`str`): Who this is meant to be.

        Raises:
            InputError: If a file is missing or malformed, others can read the key, the key is of another certificate,
                or [`check_certificate`] refuses.
        """
        folder = Path(folder)
        authority, certificate, key = (read_file(folder / name) for name in (AUTHORITY, CERTIFICATE, KEY))
        mode = (folder / KEY).stat().st_mode & 0o777
        if os.name == "posix" and mode & 0o077:
            raise InputError(f"{folder / KEY} can be read by others (mode {mode:o}): chmod 600 it")
        checked = check_certificate(certificate, authority, check_party(party))
        if load_private_key(key, folder / KEY).public_key() != checked.public_key():
            raise InputError(f"{folder / KEY} is not the key of {folder / CERTIFICATE}: issue both together")
        return cls(party, authority, certificate, key)


def party_names(names: Sequence[str]) -> list[str]:
    """Those of a certificate's DNS names that name parties: single labels other than `localhost`."""
    return [name for name in names if "." not in name and name != "localhost" and NAME.fullmatch(name)]


def check_certificate(certificate: bytes, authority: bytes, party: str, *, now: datetime.datetime | None = None):
    """
    Args:
        certificate (`bytes`), authority (`bytes`): PEM.
        party (`str`): Who the certificate must speak for.
        now (`datetime`, *optional*): With a time zone; the present if absent.

    Returns:
        `cryptography.x509.Certificate`: The party's.

    Raises:
        InputError: If it is malformed, of another authority, expired or not yet valid, or names another party.
    """
    x509, ec, _ = crypto_modules()
    try:
        leaf, root = (x509.load_pem_x509_certificate(pem) for pem in (certificate, authority))
    except ValueError as error:
        raise InputError(f"the certificate of {party!r} or its authority's is malformed: issue it again") from error
    try:
        leaf.verify_directly_issued_by(root)
    except Exception as error:  # InvalidSignature, ValueError or TypeError, by the way in which it is foreign
        raise InputError(f"the certificate of {party!r} is of a foreign authority: issue it by this one") from error
    now = now or datetime.datetime.now(datetime.UTC)
    for found, what in ((leaf, f"certificate of {party!r}"), (root, "authority")):
        if now > found.not_valid_after_utc:
            raise InputError(f"the {what} expired on {found.not_valid_after_utc:%Y-%m-%d}: issue a new one")
        if now < found.not_valid_before_utc:
            text = f"the {what} is not valid before {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            raise InputError(f"{text}: set this machine's clock")
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        named = party_names(names.get_values_for_type(x509.DNSName))
    except x509.ExtensionNotFound:
        named = []
    if named != [party]:
        raise InputError(f"the certificate speaks for {named}, not for {party!r}: take the one issued to that party")
    if not isinstance(leaf.public_key(), ec.EllipticCurvePublicKey):
        raise InputError(f"the certificate of {party!r} has no key on an elliptic curve: issue it by this command")
    return leaf


def sign_public_key(credentials: Credentials, public_key: bytes, *, run: str, epoch: int) -> bytes:
    """
    Binds a party's X25519 key to its certificate, so that whoever relays it cannot put another in its place.

    Args:
        credentials ([`Credentials`]): Own.
        public_key (`bytes`): X25519, 32 bytes.
        run (`str`), epoch (`int`): Of the roster it is meant for: a key of an earlier run is refused.

    Returns:
        `bytes`: ECDSA over SHA-256, DER.
    """
    _, ec, hashes = crypto_modules()
    key = load_private_key(credentials.key, KEY)
    return key.sign(_binding(credentials.party, public_key, run, epoch), ec.ECDSA(hashes.SHA256()))


def verify_public_key(
    certificate: bytes, authority: bytes, party: str, public_key: bytes, signature: bytes, *, run: str, epoch: int
):
    """
    Args:
        certificate (`bytes`): The other's, PEM.
        authority (`bytes`): Own copy, PEM.
        party (`str`): Who the key must be of.
        public_key (`bytes`), signature (`bytes`): From [`sign_public_key`].
        run (`str`), epoch (`int`): Of the roster.

    Raises:
        InputError: If [`check_certificate`] refuses, or the certificate's key did not sign this.
    """
    from cryptography.exceptions import InvalidSignature

    _, ec, hashes = crypto_modules()
    key = check_certificate(certificate, authority, party).public_key()
    try:
        key.verify(signature, _binding(party, public_key, run, epoch), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        text = f"the public key {public_key.hex()} of {party!r} for run {run!r}, epoch {epoch}"
        raise InputError(
            f"{text} is not signed by its certificate: do not go on, someone may have replaced it"
        ) from error


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a PEM certificate's DER form, hexadecimal, to compare over another channel."""
    x509, _, hashes = crypto_modules()
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def _binding(party: str, public_key: bytes, run: str, epoch: int) -> bytes:
    return encode_parts(_LABEL, party.encode(), run.encode(), epoch.to_bytes(8, "big"), public_key)


def crypto_modules():
    """`x509`, elliptic curves and hashes of `cryptography`, imported on first use."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise InputError("certificates need the package `cryptography`: pip install 'hf-mlopt[vertical]'") from error
    return x509, ec, hashes


def load_private_key(pem: bytes, path: str | Path):
    """
    Raises:
        InputError: If it is no private key in PEM form without a passphrase; errors call it `path`.
    """
    from cryptography.hazmat.primitives import serialization

    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no unencrypted private key in PEM form: issue it again") from error


def read_file(path: Path) -> bytes:
    """
    Raises:
        InputError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): create the authority, issue the party") from error
