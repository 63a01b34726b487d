"""Another key for the vault: while others work, killed at every step, no password lost."""

from __future__ import annotations

import base64
import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest
import transaction

from cli_helpers import Site
from conftest import PASSWORD
from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery import vault as vault_module
from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.errors import BrokenSeal, VaultError, WrongKey
from cpsmailaccess_delivery.interfaces import Verdict
from cpsmailaccess_delivery.key import KeySource
from cpsmailaccess_delivery.register import Register
from cpsmailaccess_delivery.rekey import rekey
from cpsmailaccess_delivery.sealed import PUBLISHED
from cpsmailaccess_delivery.spool.presence import Presence
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.vault import Vault

MAILBOXES = [f"user{number}@example.org" for number in range(4)]

#: Every call that changes a file system.
CALLS = (
    "rename",
    "replace",
    "link",
    "unlink",
    "fsync",
    "writev",
    "mkdir",
    "open",
    "utime",
)


@pytest.fixture(autouse=True)
def _no_former_key(monkeypatch):
    monkeypatch.delenv("CPSMAIL_FORMER_KEY", raising=False)


def account(mailbox: str, **changes) -> Account:
    settings = {"username": mailbox, "password": PASSWORD + mailbox}
    return Account(mailbox=mailbox, host="smtp.example.org", **(settings | changes))


class Home:
    """The files of an outbox, as one process sees them."""

    def __init__(self, root: Path) -> None:
        self.key_file = root / "outbox.key"
        self.keys = KeySource(file=self.key_file)
        self.presence = Presence(root / "outbox" / "presence")
        self.vault = Vault(root / "outbox" / "accounts", self.keys, self.presence)

    def put(self, *accounts: Account) -> None:
        tokens = [self.vault.stage(each.mailbox, each) for each in accounts]
        self.vault.prepare(tokens)
        self.vault.publish(tokens)

    def check(self, mailboxes=MAILBOXES) -> None:
        for mailbox in mailboxes:
            assert self.vault.get(mailbox).secret.reveal() == PASSWORD + mailbox
        assert list(self.vault.problems()) == []


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path)
    home.put(*map(account, MAILBOXES))
    yield home
    home.presence.close()


def is_locked(home: Home, *, alone: bool) -> bool:
    """Tell whether somebody has the lock of the vault; `alone`: so that nobody stages."""
    with open(home.vault.location + "/lock", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if alone else fcntl.LOCK_EX))
        except BlockingIOError:
            return True
    return False


def test_who_changes_the_register_or_the_key_is_alone(home, monkeypatch):
    locked = []

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(self, *args):
            locked.append((name, is_locked(home, alone=True)))
            return real(self, *args)

        monkeypatch.setattr(owner, name, watched)

    watch(Register, "write")
    watch(KeySource, "renew")
    vault = home.vault

    def done() -> int:
        assert all(held for _, held in locked)
        number = len(locked)
        locked.clear()
        return number

    (first, *_) = MAILBOXES
    home.put(account(first))
    assert done() == 2  # announced, settled
    change = vault.stage(first, account(first), "token")
    vault.prepare([change], witnessed=True)
    vault.resolve(change, Verdict.COMMITTED)
    assert done() == 2
    change = vault.stage(first, account(first))
    vault.prepare([change])
    vault.discard([change])
    vault.sweep()
    assert done() == 2
    rekey(vault, home.keys)
    assert done() > 2
    home.check()


def test_who_stages_keeps_the_key_from_being_changed(home, monkeypatch):
    real, locked = vault_module.write_new, []

    def write_new(*args, **kw):
        locked.append((is_locked(home, alone=False), is_locked(home, alone=True)))
        return real(*args, **kw)

    monkeypatch.setattr(vault_module, "write_new", write_new)
    home.put(account(MAILBOXES[0]))
    assert locked == [(True, False)], "and no other who stages"


def test_who_stages_uses_the_key_of_now(home, tmp_path):
    """Also when it has read the former one long ago."""
    other = Home(tmp_path)
    rekey(other.vault, other.keys)
    home.put(account(MAILBOXES[0]))
    assert not (tmp_path / "outbox.key.former").exists()
    other.check()
    other.presence.close()


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file() and "." in path.name)


def test_everything_opens_with_the_new_key_alone(tmp_path, home):
    old = home.keys.load()
    done = rekey(home.vault, home.keys)
    assert (done.former.id, done.resealed, done.needed) == (old.id, 4, 0)
    assert done.key.id != old.id
    home.check()
    Home(tmp_path).check()
    assert not list(tmp_path.glob("outbox.key.former"))
    text = home.key_file.read_bytes()
    assert base64.b64decode(text) == done.key.reveal()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert base64.b64encode(old.reveal()) not in content
            assert old.id.encode() not in content
            assert path.stat().st_mode & 0o077 == 0


def test_the_former_key_opens_nothing_any_more(tmp_path, home):
    old = home.keys.load().reveal()
    rekey(home.vault, home.keys)
    former = Vault(home.vault.location, KeySource(old), home.presence)
    with pytest.raises(WrongKey):
        former.get(MAILBOXES[0])


def test_a_process_that_knows_the_former_key_goes_on(tmp_path, home):
    other = Home(tmp_path)
    other.check()  # has read the key
    rekey(home.vault, home.keys)
    other.check()
    other.put(account("new@example.org"))
    Home(tmp_path).check([*MAILBOXES, "new@example.org"])
    other.presence.close()


def test_a_transaction_under_way_keeps_the_former_key(tmp_path, home):
    other = Home(tmp_path)
    token = other.vault.stage("new@example.org", account("new@example.org"))
    other.vault.prepare([token])
    done = rekey(home.vault, home.keys)
    assert done.needed == 1
    assert home.keys.former().id == done.former.id
    other.vault.publish([token])
    home.check([*MAILBOXES, "new@example.org"])
    again = rekey(home.vault, home.keys)
    assert (again.key.id, again.resealed, again.needed) == (done.key.id, 1, 0), "the same change"
    assert home.keys.former() is None
    Home(tmp_path).check([*MAILBOXES, "new@example.org"])
    other.presence.close()


def test_what_a_dead_process_has_staged_keeps_no_key(tmp_path, home):
    dead = Home(tmp_path)
    dead.vault.stage("new@example.org", account("new@example.org"))
    dead.presence.close()
    assert rekey(home.vault, home.keys).needed == 0
    assert home.keys.former() is None


def test_a_change_that_was_staged_before_and_prepared_after(tmp_path, home):
    other = Home(tmp_path)
    token = other.vault.stage("new@example.org", account("new@example.org"))
    assert rekey(home.vault, home.keys).needed == 1
    other.vault.prepare([token])
    other.vault.publish([token])
    assert rekey(home.vault, home.keys).needed == 0
    Home(tmp_path).check([*MAILBOXES, "new@example.org"])
    other.presence.close()


def kill_at(step: int, work) -> bool:
    """Run `work` in a child that dies before one of its changes; return whether it did."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        return os.WIFSIGNALED(status)
    left = step

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal left
            if call.__name__ != "open" or args[1] & os.O_CREAT:
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return call(*args, **kwargs)

        return wrapper

    try:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_every_step(tmp_path):
    """Whatever step is the last: every password opens at once, and the next rekey ends it."""
    killed, step = 0, 0
    while True:
        root = tmp_path / str(step)
        home = Home(root)
        home.put(*map(account, MAILBOXES))
        old = home.keys.load().id

        def work(root=root) -> None:
            fresh = Home(root)
            rekey(fresh.vault, fresh.keys)

        if not kill_at(step, work):
            break
        killed += 1
        after = Home(root)
        after.check()
        home.check()
        after.put(account("new@example.org"))
        done = rekey(after.vault, after.keys)
        assert done.needed == 0
        assert done.key.id != old
        assert after.keys.former() is None
        last = Home(root)
        last.check([*MAILBOXES, "new@example.org"])
        left = [name for name in files(root) if name.endswith((".new", ".former", ".staged"))]
        assert not left
        assert len(list(Path(after.vault.location).glob("register-*"))) == 1
        for each in (home, after, last):
            each.presence.close()
        step += 1
    home.presence.close()
    assert killed >= 30, "is every step counted?"


def test_what_a_change_that_died_has_left_goes(home):
    """Of an account that was put again since: nothing takes its place any more."""
    left = Path(home.vault.location, digest(MAILBOXES[0]) + PUBLISHED + ".new")
    left.write_bytes(b"sealed anew")
    home.keys.renew()
    home.put(*map(account, MAILBOXES))
    rekey(home.vault, home.keys)
    assert not left.exists()
    home.check()


def test_a_change_that_is_published_meanwhile_needs_its_key(tmp_path, home, monkeypatch):
    """Its account has been looked at, its staged file not yet: the key must not be forgotten."""
    token = home.vault.stage(MAILBOXES[0], account(MAILBOXES[0], connections=7))
    home.vault.prepare([token])
    key = home.keys.load()
    home.keys.renew()
    assert home.vault.reseal() == len(MAILBOXES)
    other = threading.Thread(target=home.vault.publish, args=[[token]])
    data = home.vault._data

    def data_and_publish(name: str, mailbox: str) -> bytes | None:
        found = data(name, mailbox)
        if name == digest(MAILBOXES[0]) + PUBLISHED and other.ident is None:
            other.start()
            other.join(0.3)  # it waits for us
        return found

    monkeypatch.setattr(home.vault, "_data", data_and_publish)
    assert home.vault.needs(key) == 1
    other.join(30)
    assert not other.is_alive()


def test_while_others_put_accounts(tmp_path, home):
    failed, done = [], threading.Event()

    def write(name: str) -> None:
        mine = Home(tmp_path)
        try:
            for number in range(15):
                mailbox = f"{name}@example.org"
                mine.put(account(mailbox, password=PASSWORD + mailbox, connections=1 + number))
                mine.check([mailbox])
        except Exception as error:
            failed.append(error)
        finally:
            mine.presence.close()

    def read() -> None:
        mine = Home(tmp_path)
        try:
            while not done.is_set():
                for mailbox in MAILBOXES:
                    assert mine.vault.get(mailbox).secret.reveal() == PASSWORD + mailbox
        except Exception as error:
            failed.append(error)
        finally:
            mine.presence.close()

    threads = [threading.Thread(target=write, args=(name,), daemon=True) for name in "ab"]
    reader = threading.Thread(target=read, daemon=True)
    for thread in (*threads, reader):
        thread.start()
    changes = 0
    while any(thread.is_alive() for thread in threads) and changes < 20:
        rekey(home.vault, home.keys)
        changes += 1
    for thread in threads:
        thread.join(60)
    done.set()
    reader.join(60)
    assert not failed
    assert rekey(home.vault, home.keys).needed == 0
    Home(tmp_path).check([*MAILBOXES, "a@example.org", "b@example.org"])


def test_account_that_does_not_open_stops_it(tmp_path, home):
    broken = next(Path(home.vault.location).glob("*.account"))
    broken.write_bytes(broken.read_bytes().replace(b"smtp.example.org", b"evil.example.org"))
    with pytest.raises(BrokenSeal, match=r"edited or damaged"):
        rekey(home.vault, home.keys)
    assert home.keys.former() is not None, "what it sealed may be needed yet"


def test_key_from_elsewhere(tmp_path, home, monkeypatch):
    old, new = home.keys.load().reveal(), bytes(range(32))
    home.key_file.unlink()
    monkeypatch.setenv("CPSMAIL_KEY", base64.b64encode(old).decode())
    with pytest.raises(WrongKey, match=r"from CPSMAIL_KEY.*CPSMAIL_FORMER_KEY"):
        rekey(home.vault, home.keys)
    monkeypatch.setenv("CPSMAIL_KEY", base64.b64encode(new).decode())
    monkeypatch.setenv("CPSMAIL_FORMER_KEY", base64.b64encode(old).decode())
    Home(tmp_path).check()
    done = rekey(home.vault, home.keys)
    assert (done.resealed, done.needed) == (4, 0)
    monkeypatch.delenv("CPSMAIL_FORMER_KEY")
    Home(tmp_path).check()


def test_key_file_that_cannot_be_written(home, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        with pytest.raises(VaultError, match="No space left"):
            rekey(home.vault, home.keys)
    home.check()


def test_command(tmp_path):
    """A processor that runs logs in before and after; nobody starts anything again."""
    site = Site(tmp_path)
    site.environ.pop("CPSMAIL_FORMER_KEY", None)
    with SMTPServer(users={"alice": PASSWORD}) as server, site.outbox() as outbox:
        with transaction.manager:
            outbox.accounts.put(
                Account(
                    mailbox="*",
                    host="127.0.0.1",
                    port=server.port,
                    security="plain",
                    username="alice",
                    password=PASSWORD,
                    mails_per_session=1,
                )
            )
        processor = outbox.processor()
        processor.start()
        for number in range(3):
            site.send()
            server.wait_for(number + 1)
            said = site.json("accounts", "rekey")
            assert (said["resealed"], said["left"]) == (1, 0)
        processor.stop()
    assert "1 account is sealed anew" in site.run("accounts", "rekey").stdout
    assert all(each["level"] != "fail" for each in site.json("doctor")["findings"])
    assert all(login.accepted for login in server.logins)


def test_a_change_in_doubt_is_not_overtaken_by_a_new_key(home):
    """To be sealed anew is not to be put again."""
    (first, *_) = MAILBOXES
    change = home.vault.stage(first, account(first, password="new"), "token")
    home.vault.prepare([change], witnessed=True)
    rekey(home.vault, home.keys)
    home.vault.resolve(change, Verdict.COMMITTED)
    assert home.vault.get(first).secret.reveal() == "new"


def test_what_is_announced_while_accounts_are_sealed_anew_stays_so(home, tmp_path):
    """Died between its rename and the register: it is the last one all the same."""
    (first, *_) = MAILBOXES
    with home.vault.locked():
        home.keys.renew()
    change = home.vault.stage(first, account(first, password="new"))
    home.vault.prepare([change])
    while home.vault.reseal():
        pass
    home.vault._put_in_place(change)
    other = Home(tmp_path)
    assert other.vault.get(first).secret.reveal() == "new"
    other.presence.close()
