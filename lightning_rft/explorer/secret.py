"""The secret that a run shares with explorers which dial in: from the environment, or a file of its user's alone."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from pathlib import Path

from lightning_rft.errors import ConfigurationError

__all__ = ["VARIABLE", "new_secret", "read_secret", "write_secret"]

#: Environment variable that holds it, as Kubernetes hands out secrets; it goes before a file.
VARIABLE = "LIGHTNING_RFT_SECRET"
_LEAST = 16
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_secret(file: str | Path | None = None) -> bytes:
    """The secret that the environment or else a file holds; ``-`` is the standard input.

    Raises:
        ConfigurationError: There is none, it is too short to be one, or others may read or change the file.
    """
    if given := os.environ.get(VARIABLE):
        return _checked(given, VARIABLE)
    if file is None:
        raise ConfigurationError(
            f"the run's secret is missing: give --secret-file the file that the trainer has named, or set {VARIABLE}"
        )
    if str(file) == "-":
        return _checked(sys.stdin.readline(), "the standard input")
    try:
        with open(file, encoding="utf-8") as opened:
            if os.fstat(opened.fileno()).st_mode & _OTHERS:
                raise ConfigurationError(f"others can read or change the secret in {file}: chmod 600 {file}")
            return _checked(opened.read(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the run's secret cannot be read from {file}: {error}") from error


def new_secret() -> bytes:
    """A secret that nobody can guess."""
    return secrets.token_hex(32).encode()


def write_secret(file: Path, secret: bytes) -> None:
    """Puts a secret into a file that only its user can read."""
    file.unlink(missing_ok=True)  # of an earlier run
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(secret + b"\n")


def _checked(secret: str, where: str) -> bytes:
    secret = secret.strip()
    if len(secret) < _LEAST:
        raise ConfigurationError(
            f"the secret in {where} has {len(secret)} characters, and needs at least {_LEAST}: `openssl rand -hex 32` "
            "makes one"
        )
    return secret.encode()
