"""A certificate of a bench's own, for the lane with TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster.config import TlsConfig
from cluster.errors import Unavailable

_OPENSSL_TIMEOUT_S = 60


def self_signed(folder: Path, host: str) -> TlsConfig:
    """A key and a certificate for one address that signs itself, in `folder`. Raises Unavailable without the
    `openssl` command.
    """
    key, certificate = folder / "bench.key", folder / "bench.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=anabranch-bench", "-addext", f"subjectAltName=IP:{host}", "-days", "2"]
    command = ["openssl", "req", "-x509", *curve, "-keyout", str(key), "-out", str(certificate), *names]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_OPENSSL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"no certificate without the openssl command: {error}") from error
    return TlsConfig(certificate=str(certificate), key=str(key), authority=str(certificate))
