"""
A small public key infrastructure: one private authority, one certificate a party (ECDSA P-256, X.509 v3).

A certificate names its party by a DNS entry of its subject alternative names. Party names are single labels such as
`bank` and hosts are not (`db.bank.example`, `10.0.0.7`; `localhost` is no party), so a certificate speaks for one
party and no host name can be taken for another. gRPC's TLS does not take Ed25519 certificates, hence the curve.

Whoever holds the authority's key can speak as any party. Make it where the parties trust it, and take it off line. A
party that lets no one else see its own key makes a [`request`] and has that signed.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.credentials import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    NAME,
    check_party,
    crypto_modules,
    load_private_key,
    read_file,
)


AUTHORITY_KEY, REQUEST = "authority.key", "request.pem"
_SKEW = datetime.timedelta(minutes=5)  # clocks of the parties differ


def create_authority(directory: str | os.PathLike, *, days: int = 3650) -> Path:
    """
    Makes the authority: `authority.pem` for every party, `authority.key` for no one (mode 0600).

    Args:
        directory (path): Made if absent.
        days (`int`, *optional*, defaults to 3650): How long the authority is valid.

    Returns:
        `Path`: Its certificate.

    Raises:
        ConfigurationError: If `days` is no positive number.
        InputError: If one of the files exists, or `cryptography` does not.
    """
    x509, ec, hashes = crypto_modules()
    directory = Path(directory)
    _refuse_existing(directory / AUTHORITY, directory / AUTHORITY_KEY)
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"hf-mlopt {os.urandom(8).hex()}")])
    builder = _builder(x509, name, name, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(x509, authority=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    _write(directory / AUTHORITY_KEY, _private_pem(key), 0o600)
    _write(directory / AUTHORITY, _public_pem(certificate), 0o644)
    return directory / AUTHORITY


def issue(directory: str | os.PathLike, party: str, hosts: Sequence[str] = (), *, days: int = 365) -> Path:
    """
    Makes a party's folder `directory/party`: the authority's certificate, its own, and its private key (mode 0600).
    It is all that the party needs, and is sent to no other.

    Args:
        directory (path): Of [`create_authority`].
        party (`str`): Name as in the roster.
        hosts (sequence of `str`, *optional*): Names with a dot, addresses or `localhost` under which the party can be
            reached, for proxies that look at them. Peers go by the party's name.
        days (`int`, *optional*, defaults to 365): How long the certificate is valid.

    Returns:
        `Path`: The folder.

    Raises:
        ConfigurationError: If the party's name, a host or `days` is unusable.
        InputError: If one of the files exists, or the authority cannot be read.
    """
    _, ec, _ = crypto_modules()
    folder = Path(directory) / check_party(party)
    _refuse_existing(*(folder / name for name in (AUTHORITY, CERTIFICATE, KEY)))
    key = ec.generate_private_key(ec.SECP256R1())
    authority, certificate = _certify(Path(directory), party, hosts, days, key.public_key())
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / KEY, _private_pem(key), 0o600)
    _write(folder / CERTIFICATE, certificate, 0o644)
    _write(folder / AUTHORITY, authority, 0o644)
    return folder


def request(folder: str | os.PathLike, party: str) -> Path:
    """
    What a party that keeps its key to itself sends to the authority: `request.pem`, beside `private.key` (mode 0600).

    Args:
        folder (path): The party's own; made if absent.
        party (`str`): Name as in the roster.

    Returns:
        `Path`: The request, to be signed by [`sign_request`].

    Raises:
        ConfigurationError: If the name is unusable.
        InputError: If one of the files exists.
    """
    x509, ec, hashes = crypto_modules()
    folder = Path(folder)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, check_party(party))])
    _refuse_existing(folder / KEY, folder / REQUEST)
    key = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / KEY, _private_pem(key), 0o600)
    signed = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    _write(folder / REQUEST, _public_pem(signed), 0o644)
    return folder / REQUEST


def sign_request(
    directory: str | os.PathLike, path: str | os.PathLike, party: str, hosts: Sequence[str] = (), *, days: int = 365
) -> Path:
    """
    Signs a party's request. Compare its fingerprint with the party by another channel first.

    Args:
        directory (path): Of [`create_authority`].
        path (path): The request.
        party (`str`): Name as in the roster, which the request must carry.
        hosts, days: As in [`issue`].

    Returns:
        `Path`: `directory/party`, with the two certificates for the party to put beside its key.

    Raises:
        ConfigurationError, InputError: As in [`issue`], and if the request is malformed or of another party.
    """
    x509, _, _ = crypto_modules()
    folder = Path(directory) / check_party(party)
    _refuse_existing(folder / AUTHORITY, folder / CERTIFICATE)
    try:
        asked = x509.load_pem_x509_csr(read_file(Path(path)))
    except ValueError as error:
        raise InputError(f"{path} is no certificate request: have {party!r} make one") from error
    names = [entry.value for entry in asked.subject]
    if not asked.is_signature_valid or names != [party]:
        raise InputError(f"{path} is a request of {names}, not of {[party]}: have that party make one")
    authority, certificate = _certify(Path(directory), party, hosts, days, asked.public_key())
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CERTIFICATE, certificate, 0o644)
    _write(folder / AUTHORITY, authority, 0o644)
    return folder


def _certify(directory: Path, party: str, hosts: Sequence[str], days: int, public_key) -> tuple[bytes, bytes]:
    """PEM of the authority's certificate and of a new one for this key."""
    x509, _, hashes = crypto_modules()
    names = [x509.DNSName(party), *(_host(x509, host) for host in hosts)]
    authority = read_file(directory / AUTHORITY)
    root = x509.load_pem_x509_certificate(authority)
    root_key = load_private_key(read_file(directory / AUTHORITY_KEY), directory / AUTHORITY_KEY)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, party)])
    builder = _builder(x509, subject, root.subject, public_key, days)
    usages = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(x509, authority=False), True),
        (usages, False),
        (x509.SubjectAlternativeName(names), False),
        (identifier, False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return authority, _public_pem(builder.sign(root_key, hashes.SHA256()))


def _builder(x509, subject, issuer, public_key, days: int):
    """What both kinds of certificates have."""
    if not isinstance(days, int) or isinstance(days, bool) or not 1 <= days <= 36500:
        raise ConfigurationError("days", days, "must be a whole number, 1 to 36500")
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _SKEW).not_valid_after(now + datetime.timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)


def _key_usage(x509, *, authority: bool):
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(x509, host: str):
    labels = host.lower().split(".") if isinstance(host, str) else []
    try:
        return x509.IPAddress(ipaddress.ip_address(".".join(labels)))
    except ValueError:
        pass
    if host != "localhost" and (len(labels) < 2 or not all(NAME.fullmatch(label) for label in labels)):
        remedy = "must be an address, `localhost` or a name with a dot: single labels name parties"
        raise ConfigurationError("hosts", host, remedy)
    return x509.DNSName(host.lower())


def _private_pem(key) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _public_pem(signed) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return signed.public_bytes(serialization.Encoding.PEM)


def _refuse_existing(*paths: Path):
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists and is not overwritten: move it away first")


def _write(path: Path, content: bytes, mode: int):
    """Exclusive, and with its mode from the start: no one reads a key between its making and a chmod."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(content)
