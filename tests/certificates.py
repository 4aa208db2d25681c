"""A certificate authority of the tests, and certificates it signs for loopback."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.config import TlsConfig


@dataclass(frozen=True)
class Authority:
    """Signs certificates; everything lies in one folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def tls(self, name: str, mutual: bool = False, host: str | None = None) -> TlsConfig:
        """A certificate for 127.0.0.1 and localhost, or for another host alone, as configuration."""
        key = ec.generate_private_key(ec.SECP256R1())
        loopback = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        alternatives = x509.SubjectAlternativeName([x509.DNSName(host)] if host else loopback)
        certificate = _builder(name, self.certificate.subject, key).add_extension(
            alternatives, critical=False
        )
        return TlsConfig(
            certificate=str(_write(self.folder / f"{name}.pem", certificate.sign(self.key, hashes.SHA256()))),
            key=str(_write_key(self.folder / f"{name}.key", key)),
            authority=str(self.folder / "authority.pem"),
            mutual=mutual,
        )


def authority(folder: Path) -> Authority:
    """A new authority whose certificate lies in `folder`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("anabranch test authority")
    builder = _builder("anabranch test authority", name, key)
    certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(
        key, hashes.SHA256()
    )
    _write(folder / "authority.pem", certificate)
    return Authority(folder, key, certificate)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


def _write(path: Path, certificate: x509.Certificate) -> Path:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path
