"""Certificates for tests: a throw-away authority, made on the spot (extra ``demo``)."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

NAMES = ("localhost", "127.0.0.1", "::1")


class Authority:
    """A certificate authority of one test.

    Writes its certificate, not its key, to ``ca_file`` in a directory of the caller: what an
    account's ``verify`` takes.
    """

    def __init__(self, directory: Path | str) -> None:
        import trustme  # an extra; and it takes longer to import than the rest of the package

        self._ca = trustme.CA(organization_name="Throw-away test authority")
        self.ca_file = Path(directory) / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca_file)

    def server_context(self, *names: str, expired: bool = False) -> ssl.SSLContext:
        """Return a server's TLS settings with a new certificate for `names`.

        Without names: localhost and its two addresses.
        """
        ends = datetime.now(UTC) - timedelta(days=1) if expired else None
        certificate = self._ca.issue_cert(
            *(names or NAMES),
            not_before=datetime.now(UTC) - timedelta(days=30) if expired else None,
            not_after=ends,
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(context)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return a client's TLS settings that trust this authority alone."""
        return ssl.create_default_context(cafile=str(self.ca_file))
