"""The password of an account at the moment of its login: sealed, or behind ``password_from``."""

from __future__ import annotations

import os
import stat
from typing import Final

from .account import Account, Secret
from .errors import SecretUnavailable

_MAX_SIZE: Final = 16 * 1024  # bytes: tokens may be long, a log file is none


def resolve_secret(account: Account) -> Secret | None:
    """Return the password to log in with; None: the account has none.

    ``env:NAME`` and ``file:PATH`` are read at each call, so that a changed password
    serves the next login.  Raises `SecretUnavailable`, which never quotes the content.
    """
    source = account.password_from
    if source is None:
        return account.secret
    kind, _, name = source.partition(":")
    text, problem = _from_environment(name) if kind == "env" else _from_file(name)
    if problem:
        raise SecretUnavailable(f"account {account.mailbox}: password_from={source}: {problem}")
    return Secret(text)


def _from_environment(name: str) -> tuple[str, str]:
    text = os.environ.get(name, "")
    if not text:
        return "", f"the environment variable {name} is not set: set it for this process"
    return _checked(text, "the environment variable")


def _from_file(path: str) -> tuple[str, str]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return "", f"cannot open the file: {error.strerror}: put the password there"
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return "", "is no regular file: put the password into a file"
        if status.st_mode & 0o006:
            return "", "every user may read or write the file: chmod o-rw it"
        data = os.read(handle, _MAX_SIZE + 1)
    except OSError as error:
        return "", f"cannot read the file: {error.strerror}"
    finally:
        os.close(handle)
    if len(data) > _MAX_SIZE:
        return "", f"the file has more than {_MAX_SIZE} bytes: it holds the password alone"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "", "the file is not UTF-8"
    text = text.removesuffix("\n").removesuffix("\r")  # as an editor ends it
    if not text:
        return "", "the file is empty: put the password there"
    return _checked(text, "the file")


def _checked(text: str, what: str) -> tuple[str, str]:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "", f"{what} is not UTF-8: set it again"
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        return "", f"{what} has a control character: it holds the password alone, in one line"
    return text, ""
