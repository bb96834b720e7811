"""Certificates made on the spot: an authority, and one for each host."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)


class Authority:
    """Signs certificates; its own is `FOLDER/ca.pem`."""

    def __init__(self, folder: Path, name: str = "tilenet's tests") -> None:
        folder.mkdir(parents=True)
        self.folder, self._name = folder, _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(self._name, self._name, self._key, self._key)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(_may("key_cert_sign", "crl_sign"), True)
        self._write("ca", builder, None)

    def sign(self, name: str, address: str) -> None:
        """Write `NAME.pem` and `NAME.key`."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name), x509.IPAddress(ip_address(address))]
        builder = _builder(_name(name), self._name, key, self._key)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        builder = builder.add_extension(_may("digital_signature"), True)
        self._write(name, builder, key)

    def _write(
        self, name: str, builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey | None
    ) -> None:
        pem = serialization.Encoding.PEM
        made = builder.sign(self._key, hashes.SHA256())
        (self.folder / f"{name}.pem").write_bytes(made.public_bytes(pem))
        if key is not None:
            text = key.private_bytes(
                pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            path = self.folder / f"{name}.key"
            path.touch(0o600)
            path.write_bytes(text)

    def options(self, name: str) -> list[str]:
        """Return the options of `dask scheduler` and `dask worker`."""
        return [
            "--tls-ca-file", str(self.folder / "ca.pem"),
            "--tls-cert", str(self.folder / f"{name}.pem"),
            "--tls-key", str(self.folder / f"{name}.key"),
        ]  # fmt: skip

    def client(self, name: str) -> dict[str, str]:
        """Return the environment in which Dask's client shows this certificate."""
        prefix = "DASK_DISTRIBUTED__COMM__TLS__"
        return {
            f"{prefix}CA_FILE": str(self.folder / "ca.pem"),
            f"{prefix}CLIENT__CERT": str(self.folder / f"{name}.pem"),
            f"{prefix}CLIENT__KEY": str(self.folder / f"{name}.key"),
        }


def _may(*uses: str) -> x509.KeyUsage:
    every = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{use: use in uses for use in every})


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    known = x509.SubjectKeyIdentifier.from_public_key
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(known(key.public_key()), False)
        .add_extension(by(signer.public_key()), False)
    )
