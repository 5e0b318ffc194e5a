"""The small public key infrastructure: what it makes passes OpenSSL's rules, and what is wrong is refused by name."""

import datetime
import ssl
import stat

import pytest


pytest.importorskip("cryptography", reason="certificates need the package cryptography")

from cryptography import x509  # noqa: E402
from cryptography.x509.verification import PolicyBuilder, Store  # noqa: E402

from hf_mlopt.errors import ConfigurationError, InputError  # noqa: E402
from hf_mlopt.vertical import credentials, pki  # noqa: E402


@pytest.fixture
def authority(tmp_path):
    pki.create_authority(tmp_path / "pki")
    return tmp_path / "pki"


def read(folder):
    return [(folder / name).read_bytes() for name in (pki.CERTIFICATE, pki.AUTHORITY)]


def test_keys_are_for_the_owner_alone(authority):
    folder = pki.issue(authority, "bank")
    for path in (authority / pki.AUTHORITY_KEY, folder / pki.KEY):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"PRIVATE KEY" in path.read_bytes()
    for path in (authority / pki.AUTHORITY, folder / pki.CERTIFICATE, folder / pki.AUTHORITY):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert b"PRIVATE KEY" not in path.read_bytes()


def test_another_implementation_accepts_the_chain_for_the_party_and_its_hosts_only(authority):
    certificate, root = (
        x509.load_pem_x509_certificate(p) for p in read(pki.issue(authority, "bank", ["db.bank.org"]))
    )
    builder = PolicyBuilder().store(Store([root]))
    for name in ("bank", "db.bank.org"):
        assert builder.build_server_verifier(x509.DNSName(name)).verify(certificate, []) == [certificate, root]
    with pytest.raises(x509.verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("shop")).verify(certificate, [])
    assert builder.build_client_verifier().verify(certificate, []).subjects[0].value == "bank"
    ssl.create_default_context(cadata=read(authority / "bank")[1].decode())


def test_credentials_name_their_party(authority):
    folder = pki.issue(authority, "bank", ["localhost", "10.0.0.7", "::1", "db.bank.org"])
    loaded = credentials.Credentials.load(folder, "bank")
    assert loaded.party == "bank" and "PRIVATE" not in repr(loaded)
    names = x509.load_pem_x509_certificate(loaded.certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert [str(name.value) for name in names.value] == ["bank", "localhost", "10.0.0.7", "::1", "db.bank.org"]
    assert credentials.party_names([str(name.value) for name in names.value]) == ["bank"]
    with pytest.raises(InputError, match=r"speaks for \['bank'\], not for 'shop'"):
        credentials.Credentials.load(folder, "shop")


def test_a_party_may_keep_its_key_to_itself(authority, tmp_path):
    own = tmp_path / "own"
    asked = pki.request(own, "bank")
    folder = pki.sign_request(authority, asked, "bank")
    assert not (folder / pki.KEY).exists()
    for name in (pki.CERTIFICATE, pki.AUTHORITY):
        (own / name).write_bytes((folder / name).read_bytes())
    assert credentials.Credentials.load(own, "bank").party == "bank"
    assert len(credentials.fingerprint(read(own)[0])) == 64
    with pytest.raises(InputError, match=r"a request of \['bank'\], not of \['shop'\]"):
        pki.sign_request(authority, asked, "shop")
    asked.write_text("nothing")
    (authority / "bank" / pki.CERTIFICATE).unlink()
    (authority / "bank" / pki.AUTHORITY).unlink()
    with pytest.raises(InputError, match="is no certificate request"):
        pki.sign_request(authority, asked, "bank")


def test_nothing_is_overwritten(authority, tmp_path):
    folder = pki.issue(authority, "bank")
    before = {path: path.read_bytes() for path in authority.rglob("*.*")}
    for make in (
        lambda: pki.create_authority(authority),
        lambda: pki.issue(authority, "bank"),
        lambda: pki.request(folder, "bank"),
    ):
        with pytest.raises(InputError, match="exists and is not overwritten"):
            make()
    assert {path: path.read_bytes() for path in authority.rglob("*.*")} == before


@pytest.mark.parametrize("party", ["", "Bank", "a.b", "localhost", "-a", "a-", "a b", "a/b", "..", "ä", "a" * 64, 7])
def test_names_that_no_certificate_can_carry(authority, party):
    with pytest.raises(ConfigurationError, match="party="):
        pki.issue(authority, party)


@pytest.mark.parametrize("host", ["shop", "", "a..b", "*.bank.org", "bank_1.org", 7])
def test_a_host_cannot_be_mistaken_for_a_party(authority, host):
    with pytest.raises(ConfigurationError, match="hosts="):
        pki.issue(authority, "bank", [host])
    assert not (authority / "bank").exists()


@pytest.mark.parametrize("days", [0, -1, 1.5, True, 10**6])
def test_days(authority, days):
    with pytest.raises(ConfigurationError, match="days="):
        pki.issue(authority, "bank", days=days)


def test_times(authority):
    certificate, root = read(pki.issue(authority, "bank", days=30))
    now = datetime.datetime.now(datetime.UTC)
    for days in (0, 29):
        assert credentials.check_certificate(certificate, root, "bank", now=now + datetime.timedelta(days))
    with pytest.raises(InputError, match=r"certificate of 'bank' expired on \d{4}-"):
        credentials.check_certificate(certificate, root, "bank", now=now + datetime.timedelta(31))
    with pytest.raises(InputError, match="'bank' is not valid before .* clock"):
        credentials.check_certificate(certificate, root, "bank", now=now - datetime.timedelta(1))


def test_an_expired_authority(tmp_path):
    pki.create_authority(tmp_path, days=1)
    certificate, root = read(pki.issue(tmp_path, "bank", days=30))
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(2)
    with pytest.raises(InputError, match="the authority expired"):
        credentials.check_certificate(certificate, root, "bank", now=later)


def test_a_foreign_authority(authority, tmp_path):
    pki.create_authority(tmp_path / "other")
    certificate, _ = read(pki.issue(tmp_path / "other", "bank"))
    folder = pki.issue(authority, "bank")
    with pytest.raises(InputError, match="'bank' is of a foreign authority"):
        credentials.check_certificate(certificate, read(folder)[1], "bank")
    (folder / pki.CERTIFICATE).write_bytes(certificate)
    with pytest.raises(InputError, match="foreign authority"):
        credentials.Credentials.load(folder, "bank")


def test_an_authority_of_the_same_name_and_another_key_is_foreign(authority, tmp_path):
    """The signature counts, not the issuer's name."""
    other = tmp_path / "other"
    pki.create_authority(other)
    certificate, _ = read(pki.issue(authority, "bank"))
    name = x509.load_pem_x509_certificate(certificate).issuer
    _, ec, hashes = credentials.crypto_modules()
    key = ec.generate_private_key(ec.SECP256R1())
    forged = pki._builder(x509, name, name, key.public_key(), 10)
    forged = forged.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    with pytest.raises(InputError, match="foreign authority"):
        credentials.check_certificate(certificate, pki._public_pem(forged.sign(key, hashes.SHA256())), "bank")


def test_files_that_do_not_belong_together(authority):
    bank, shop = pki.issue(authority, "bank"), pki.issue(authority, "shop")
    (bank / pki.KEY).write_bytes((shop / pki.KEY).read_bytes())
    with pytest.raises(InputError, match="is not the key of"):
        credentials.Credentials.load(bank, "bank")
    (bank / pki.KEY).chmod(0o640)
    with pytest.raises(InputError, match=r"read by others \(mode 640\)"):
        credentials.Credentials.load(bank, "bank")
    (shop / pki.CERTIFICATE).write_text("nothing")
    with pytest.raises(InputError, match="malformed"):
        credentials.Credentials.load(shop, "shop")
    (shop / pki.CERTIFICATE).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        credentials.Credentials.load(shop, "shop")


def test_a_file_that_comes_up_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(FileExistsError):
        pki._write(tmp_path / "file", b"key", 0o600)
    assert (tmp_path / "file").read_text() == "here"


def test_no_authority(tmp_path):
    with pytest.raises(InputError, match=r"authority\.pem cannot be read"):
        pki.issue(tmp_path, "bank")
    assert list(tmp_path.iterdir()) == []


def test_the_authority_speaks_for_no_party(authority):
    root = (authority / pki.AUTHORITY).read_bytes()
    with pytest.raises(InputError, match=r"speaks for \[\]"):
        credentials.check_certificate(root, root, "bank")


def test_signed_public_keys(authority):
    bank = credentials.Credentials.load(pki.issue(authority, "bank"), "bank")
    shop = credentials.Credentials.load(pki.issue(authority, "shop"), "shop")
    key, run = bytes(range(32)), {"run": "credit", "epoch": 3}
    signature = credentials.sign_public_key(bank, key, **run)
    credentials.verify_public_key(bank.certificate, shop.authority, "bank", key, signature, **run)
    changes = [
        {"public_key": bytes(32)},
        {"signature": signature[:-1] + bytes([signature[-1] ^ 1])},
        {"run": "credit-2"},
        {"epoch": 4},
        {"signature": credentials.sign_public_key(shop, key, **run)},
    ]
    for change in changes:
        given = {"public_key": key, "signature": signature, **run, **change}
        with pytest.raises(InputError, match="is not signed by its certificate"):
            credentials.verify_public_key(bank.certificate, shop.authority, "bank", **given)
    with pytest.raises(InputError, match=r"speaks for \['bank'\], not for 'shop'"):
        credentials.verify_public_key(bank.certificate, shop.authority, "shop", key, signature, **run)
