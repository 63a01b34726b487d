"""The key of the vault, and passwords behind ``password_from``: real files, real processes."""

from __future__ import annotations

import base64
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cpsmailaccess_delivery.account import Account, Secret
from cpsmailaccess_delivery.errors import SecretUnavailable, VaultError, WrongKey
from cpsmailaccess_delivery.key import CREDENTIAL, VARIABLE, Key, KeySource
from cpsmailaccess_delivery.password import resolve_secret

RAW = bytes(range(7, 39))
BASE64 = base64.b64encode(RAW).decode()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def value(source: KeySource) -> bytes:
    key = source.load()
    assert key is not None
    return key.reveal()


def write(path: Path, data: bytes | str, mode: int = 0o600) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    "given",
    [
        RAW,
        BASE64,
        BASE64.rstrip("="),
        base64.urlsafe_b64encode(RAW).decode(),
        BASE64.encode() + b"\n",
        RAW.hex(),
        RAW.hex().upper(),
    ],
)
def test_given_in_code(given):
    assert value(KeySource(given)) == RAW


@pytest.mark.parametrize(
    "given",
    [
        "",
        "short",
        "x" * 32,
        b"thirty-two letters of passphrase",
        RAW[:-1],
        RAW * 2,
        "ü" * 44,
        "=" * 44,
    ],
)
def test_what_is_no_key_is_refused_and_not_quoted(given):
    with pytest.raises(WrongKey) as caught:
        KeySource(given).load()
    assert "32 random bytes" in str(caught.value)
    assert not given or str(given) not in str(caught.value)


def test_order_of_places(tmp_path, monkeypatch):
    path = write(tmp_path / "outbox.key", RAW.hex())
    assert KeySource(file=path).load().origin == str(path)
    write(tmp_path / CREDENTIAL, bytes(reversed(RAW)), 0o640)  # an ACL shows as the group's
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert value(KeySource(file=path)) == bytes(reversed(RAW))
    monkeypatch.setenv(VARIABLE, base64.b64encode(b"\xfe" * 32).decode())
    assert value(KeySource(file=path)) == b"\xfe" * 32
    assert value(KeySource(RAW, file=path)) == RAW


def test_unusable_variable_does_not_fall_through(tmp_path, monkeypatch):
    write(tmp_path / "k", BASE64)
    monkeypatch.setenv(VARIABLE, "hunter2")
    with pytest.raises(WrongKey, match=VARIABLE) as caught:
        KeySource(file=tmp_path / "k").load()
    assert "hunter2" not in str(caught.value)


def test_made_on_first_use(tmp_path, open_umask):
    path = tmp_path / "sub" / "outbox.key"
    source = KeySource(file=path)
    assert source.load() is None
    key = source.make()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["outbox.key"]
    assert value(KeySource(file=path)) == key.reveal()
    assert KeySource(file=path).make().reveal() == key.reveal(), "an existing key is kept"
    assert KeySource(file=tmp_path / "other").make().id != key.id


def test_no_place_to_make_it():
    with pytest.raises(WrongKey, match=VARIABLE):
        KeySource().make()


def test_cannot_be_made(tmp_path):
    write(tmp_path / "file", "")
    with pytest.raises(VaultError, match=VARIABLE):
        KeySource(file=tmp_path / "file" / "key").make()


def test_processes_that_make_it_at_once_agree(tmp_path):
    path = tmp_path / "outbox.key"
    code = (
        "import sys; from cpsmailaccess_delivery.key import KeySource\n"
        "source = KeySource(file=sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "print((source.load() or source.make()).id)"
    )
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for maker in makers:
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:  # all are past their imports: now
        maker.stdin.write("\n")
        maker.stdin.flush()
    ids = {maker.communicate(timeout=60)[0].strip() for maker in makers}
    assert ids == {KeySource(file=path).load().id}
    assert os.listdir(tmp_path) == ["outbox.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_file_that_others_can_reach(tmp_path, mode):
    path = write(tmp_path / "k", BASE64, mode)
    with pytest.raises(WrongKey, match="chmod 600") as caught:
        KeySource(file=path).load()
    assert str(path) in str(caught.value)


def test_file_that_is_a_link(tmp_path):
    write(tmp_path / "real", BASE64)
    (tmp_path / "k").symlink_to("real")
    with pytest.raises(WrongKey, match="symbolic link"):
        KeySource(file=tmp_path / "k").load()


def test_file_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(WrongKey, match="no regular file"):
            KeySource(file=path).load()


def test_file_of_somebody_else(tmp_path, monkeypatch):
    path = write(tmp_path / "k", BASE64)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(WrongKey, match="belongs to user"):
        KeySource(file=path).load()


@pytest.mark.parametrize("content", ["", "\n", BASE64[:20], BASE64 * 2, "x" * 100_000])
def test_file_of_wrong_size(tmp_path, content):
    with pytest.raises(WrongKey, match="holds no key"):
        KeySource(file=write(tmp_path / "k", content)).load()


def test_read_once_and_again_on_demand(tmp_path):
    path = write(tmp_path / "k", BASE64)
    source = KeySource(file=path)
    assert value(source) == RAW
    write(path, bytes(reversed(RAW)))
    assert value(source) == RAW
    assert source.reload().reveal() == bytes(reversed(RAW))


def test_never_shown(tmp_path):
    source = KeySource(BASE64, file=tmp_path / "k")
    key = source.load()
    for text in (repr(source), repr(key), str(key), f"{key}", key.id):
        assert BASE64 not in text
        assert RAW.hex() not in text
        assert repr(RAW) not in text
    with pytest.raises(TypeError):
        pickle.dumps(key)
    assert Key(RAW, "a").id == Key(RAW, "b").id


# password_from


def account(**login) -> Account:
    return Account(mailbox="a@example.org", host="smtp.example.org", username="a", **login)


def test_password_given_or_none():
    assert resolve_secret(account(password="s3cret")) == Secret("s3cret")
    assert resolve_secret(Account(mailbox="a@example.org", host="smtp.example.org")) is None


def test_password_from_environment_is_read_at_each_login(monkeypatch):
    sealed = account(password_from="env:SITE_PASSWORD")
    with pytest.raises(SecretUnavailable, match=r"a@example\.org.*SITE_PASSWORD is not set"):
        resolve_secret(sealed)
    for text in ("one", "zwö", " two words "):
        monkeypatch.setenv("SITE_PASSWORD", text)
        assert resolve_secret(sealed) == Secret(text)


@pytest.mark.parametrize(
    ("content", "password"),
    [("pw\n", "pw"), ("pw", "pw"), ("pw\r\n", "pw"), (" pä \n", " pä ")],
)
def test_password_from_file(tmp_path, content, password):
    path = write(tmp_path / "pw", content, 0o640)
    assert resolve_secret(account(password_from=f"file:{path}")) == Secret(password)
    path.unlink()
    with pytest.raises(SecretUnavailable, match="No such file"):
        resolve_secret(account(password_from=f"file:{path}"))


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"hunter2", 0o604, "chmod o-rw"),
        (b"hunter2", 0o602, "chmod o-rw"),
        (b"", 0o600, "empty"),
        (b"\n", 0o600, "empty"),
        (b"hunter2\n\n", 0o600, "control character"),
        (b"hunter2\nuser: x\n", 0o600, "control character"),
        (b"hunter2\xff", 0o600, "not UTF-8"),
        (b"hunter2" * 10_000, 0o600, "more than"),
    ],
)
def test_password_file_refused_and_not_quoted(tmp_path, content, mode, said):
    path = write(tmp_path / "pw", content, mode)
    with pytest.raises(SecretUnavailable, match=said) as caught:
        resolve_secret(account(password_from=f"file:{path}"))
    error: BaseException | None = caught.value
    while error is not None:  # a tracker shows the whole chain
        assert "hunter2" not in repr(error) + repr(vars(error))
        error = error.__context__


def test_password_file_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(SecretUnavailable, match="regular file"):
            resolve_secret(account(password_from=f"file:{path}"))
