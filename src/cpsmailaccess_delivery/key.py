"""Where the key of the vault comes from, and what is refused as one.

In this order, the first that is there: given in code; ``CPSMAIL_KEY``; the systemd
credential ``cpsmail.key``; a file beside the spool, made on first use.  One that is there
and cannot be used is an error, never a reason to go on to the next.

While the key is being changed (`rekey`), the former one is known, too: ``CPSMAIL_FORMER_KEY``,
the credential ``cpsmail.former.key``, or the file with ``.former`` at its end.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Final

from .errors import VaultError, WrongKey
from .files import make_private, sync_path, write_new

KEY_SIZE: Final = 32  # bytes
VARIABLE: Final = "CPSMAIL_KEY"
CREDENTIAL: Final = "cpsmail.key"
FORMER_VARIABLE: Final = "CPSMAIL_FORMER_KEY"
FORMER_CREDENTIAL: Final = "cpsmail.former.key"

_MAX_TEXT: Final = 256  # bytes of a key file: hexadecimal and some white space
_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_HOW: Final = f"`head -c {KEY_SIZE} /dev/urandom | base64`"
_RULE: Final = f"a key is {KEY_SIZE} random bytes in base64 or hexadecimal: {_HOW} makes one"


class Key:
    """32 bytes that do not show themselves.  ``id`` may be shown: it names the key.

    ``origin``: where it was found, for messages.
    """

    __slots__ = ("_value", "id", "origin")

    def __init__(self, value: bytes, origin: str) -> None:
        self._value = value
        self.origin = origin
        self.id = hashlib.blake2b(value, digest_size=8, person=b"cpsmail.key.id").hexdigest()

    def reveal(self) -> bytes:
        """Return the key itself; for the vault only."""
        return self._value

    def __repr__(self) -> str:
        return f"<key {self.id} from {self.origin}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Key is not pickled")


class KeySource:
    """Finds the key when it is first needed, and keeps it.

    ``given``: the key itself, as 32 bytes or as text in base64 or hexadecimal.
    ``file``: the key file; it lies outside the spool, so that a copy of the spool is
    no copy of its passwords.
    """

    def __init__(
        self, given: bytes | str | None = None, *, file: str | os.PathLike[str] | None = None
    ) -> None:
        self._given = given
        self._file = Path(file) if file is not None else None
        self._key: Key | None = None

    def __repr__(self) -> str:
        return f"<KeySource file={str(self._file)!r}>"

    def load(self) -> Key | None:
        """Return the key, or None where there is none yet.

        Raises `WrongKey` when what is there cannot be used, `VaultError` when it
        cannot be read.
        """
        if self._key is None:
            self._key = self._find()
        return self._key

    def reload(self) -> Key | None:
        """Look again: the key may have been changed since it was first read."""
        self._key = None
        return self.load()

    def former(self) -> Key | None:
        """Return the key that was current before, while it is still needed.  Raises as `load`."""
        return _look(FORMER_VARIABLE, FORMER_CREDENTIAL, self._former_file)

    def known(self) -> list[Key]:
        """Return the keys that are there: current, former.  Raises as `load`."""
        keys = {key.id: key for key in (self.reload(), self.former()) if key is not None}
        return list(keys.values())

    def find(self, key_id: str) -> Key | None:
        """Return the key with this id, if it is known; the one in use may be another by now."""
        return next((key for key in self.known() if key.id == key_id), None)

    def renew(self) -> Key:
        """Make a new key the current one, and the current one the former.  Durable.

        Whatever crashes, both are there before anything needs the new one.  Only where the
        key is our file.  Raises `VaultError`, `WrongKey`.
        """
        key = self.reload()
        if key is None or self._file is None or key.origin != str(self._file):
            raise WrongKey(
                f"the key comes from {key.origin if key else 'nowhere'}: make a new one with"
                f" {_HOW}, give it to all processes in its place, and the present one as"
                f" {FORMER_VARIABLE} or as the credential {FORMER_CREDENTIAL}; then say this again"
            )
        text = base64.b64encode(secrets.token_bytes(KEY_SIZE)) + b"\n"
        name = self._file.with_name(f".{self._file.name}.new")
        former = self._file.with_name(self._file.name + ".former")
        try:
            try:
                os.link(self._file, former)
            except FileExistsError:
                pass  # a crash came after this
            sync_path(str(self._file.parent))
            name.unlink(missing_ok=True)
            write_new(str(name), text, sync=True)
            os.replace(name, self._file)
            sync_path(str(self._file.parent))
        except OSError as error:
            raise VaultError(
                f"cannot change the key file {self._file}: {error.strerror}: let this user write"
                f" to {self._file.parent}"
            ) from error
        return self._made()

    def forget_former(self) -> None:
        """Remove the file of the former key, durably.  Raises `VaultError`."""
        path = self._former_file
        if path is None:
            return
        try:
            path.unlink(missing_ok=True)
            sync_path(str(path.parent))
        except OSError as error:
            raise VaultError(f"cannot remove the former key {path}: {error.strerror}") from error

    @property
    def _former_file(self) -> Path | None:
        return None if self._file is None else self._file.with_name(self._file.name + ".former")

    def make(self) -> Key:
        """Make the key file, durably; where another process was faster, its key is ours.

        The file appears whole or not at all.  Raises `VaultError`, `WrongKey`.
        """
        if self._file is None:
            raise WrongKey(
                f"the vault has no key: give all processes one, as {VARIABLE} or as the systemd"
                f" credential {CREDENTIAL}: {_RULE}"
            )
        directory = self._file.parent
        text = base64.b64encode(secrets.token_bytes(KEY_SIZE)) + b"\n"
        try:
            make_private(str(directory))
            name = str(self._file.with_name(f".{self._file.name}.{secrets.token_hex(4)}"))
            write_new(name, text, sync=True)
            try:
                os.link(name, self._file)
            except FileExistsError:
                pass
            finally:
                os.unlink(name)
            sync_path(str(directory))
        except OSError as error:
            raise VaultError(
                f"cannot make the key file {self._file}: {error.strerror}: let this user write"
                f" to {directory}, or set {VARIABLE}"
            ) from error
        return self._made()

    def _made(self) -> Key:
        key = self.reload()
        if key is None:
            raise WrongKey(f"the key file {self._file} vanished as soon as it was made")
        return key

    def where(self) -> str:
        """Return the places where a key would be found, for messages."""
        return f"{VARIABLE}, the systemd credential {CREDENTIAL} or {self._file or 'a key file'}"

    def _find(self) -> Key | None:
        if self._given is not None:
            return _parse(self._given, "the settings")
        return _look(VARIABLE, CREDENTIAL, self._file)


def _look(variable: str, credential: str, file: Path | None) -> Key | None:
    if text := os.environ.get(variable):
        return _parse(text, variable)
    if directory := os.environ.get("CREDENTIALS_DIRECTORY"):
        # Mode and owner are systemd's business: it may grant access by an ACL.
        path = Path(directory, credential)
        if (data := _read(path, trusted=True)) is not None:
            return _parse(data, f"the systemd credential {path}")
    if file is not None and (data := _read(file, trusted=False)) is not None:
        return _parse(data, str(file))
    return None


def _read(path: Path, *, trusted: bool) -> bytes | None:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if trusted else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise WrongKey(
                f"the key file {path} is a symbolic link: put the key there itself"
            ) from None
        raise VaultError(
            f"cannot read the key file {path}: {error.strerror}: let this user read it"
        ) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise WrongKey(f"the key file {path} is no regular file: put the key there itself")
        if not trusted:
            _check_access(path, status)
        return os.read(handle, _MAX_TEXT + 1)
    finally:
        os.close(handle)


def _check_access(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise WrongKey(
            f"the key file {path} belongs to user {status.st_uid}, we are {os.geteuid()}:"
            " run as its owner, or chown it"
        )
    if status.st_mode & 0o077:
        raise WrongKey(
            f"others may read or write the key file {path}: chmod 600 it, and consider the"
            " passwords known"
        )


def _parse(text: bytes | str, origin: str) -> Key:
    """Read 32 raw bytes, base64 or hexadecimal.  No message quotes what was read."""
    value = _decode(text)
    if value is None or len(value) != KEY_SIZE:
        raise WrongKey(f"{origin} holds no key: {_RULE}")
    return Key(value, origin)


def _decode(text: bytes | str) -> bytes | None:
    if isinstance(text, bytes) and len(text) == KEY_SIZE and not _is_text(text):
        return text
    if isinstance(text, str):
        text = text.encode("utf-8", "replace")
    text = text.strip()
    try:
        if len(text) == 2 * KEY_SIZE:
            return binascii.unhexlify(text)
        text = text.translate(_URL_SAFE).rstrip(b"=")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None


def _is_text(data: bytes) -> bool:
    """Tell a passphrase from random bytes: these are all printable once in 10^13."""
    return all(32 <= byte < 127 for byte in data)
