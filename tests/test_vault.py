"""The vault, with real files: what is edited, swapped, half-written or lost is told."""

from __future__ import annotations

import base64
import json
import logging
import os
import select
import stat
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from zope.interface.verify import verifyObject

from cpsmailaccess_delivery import register
from cpsmailaccess_delivery import vault as vault_module
from cpsmailaccess_delivery.account import HIDDEN, Account
from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.errors import BrokenSeal, NoSuchAccount, VaultError, WrongKey
from cpsmailaccess_delivery.interfaces import IAccountStore, IWatch, Verdict
from cpsmailaccess_delivery.key import Key, KeySource
from cpsmailaccess_delivery.seal import MAX_SIZE, parse, seal
from cpsmailaccess_delivery.vault import Vault
from cpsmailaccess_delivery.watch import PollingWatch

PASSWORD = "hunter2-is-the-password"
DEADLINE = 30.0


class Presence:
    """Stand-in: tokens are alive unless said otherwise."""

    def __init__(self, token: str = "host.4711.9") -> None:
        self.token = token
        self.dead: set[str] = set()

    def is_alive(self, token: str) -> bool:
        return token not in self.dead


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("CPSMAIL_KEY", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def make(tmp_path: Path, presence: Presence | None = None, **key) -> Vault:
    source = KeySource(**(key or {"file": tmp_path / "outbox.key"}))
    return Vault(tmp_path / "outbox" / "accounts", source, presence or Presence())


@pytest.fixture
def vault(tmp_path) -> Vault:
    return make(tmp_path)


def account(mailbox="alice@example.org", host="smtp.example.org", **settings) -> Account:
    settings = {"username": "alice", "password": PASSWORD} | settings
    return Account(mailbox=mailbox, host=host, **settings)


def put(vault: Vault, *accounts: Account) -> None:
    tokens = [vault.stage(each.mailbox, each) for each in accounts]
    vault.prepare(tokens)
    vault.publish(tokens)


def file_of(vault: Vault, mailbox="alice@example.org") -> Path:
    return Path(vault.location, digest(mailbox) + ".account")


def edit(path: Path, **settings) -> None:
    document = json.loads(path.read_bytes())
    document["account"].update(settings)
    path.write_text(json.dumps(document))


def names(vault: Vault) -> list[str]:
    """Return all but the lock and the registers."""
    found = sorted(os.listdir(vault.location))
    return [name for name in found if name != "lock" and not name.startswith("register-")]


def test_contract(vault):
    assert verifyObject(IAccountStore, vault)
    watch = vault.watch()
    assert verifyObject(IWatch, watch)
    watch.close()


def test_nothing_on_disk_until_something_is_put(tmp_path, vault):
    assert vault.peek("alice@example.org") is None
    assert [each.mailbox for each in vault.accounts()] == []
    assert vault.version("alice@example.org") == ""
    assert vault.sweep() == ()
    with pytest.raises(NoSuchAccount, match=r"alice@example\.org"):
        vault.get("alice@example.org")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "given",
    [
        account(),
        account("*"),
        account("@example.org", password=""),
        account(password="päss ="),
        account(username=None, password=None, security="plain"),
        account(password=None, password_from="env:X"),
        account(verify="/etc/ca.pem", mails_per_minute=30, connect_timeout=1.5, port=2525),
    ],
)
def test_round_trip(tmp_path, vault, given):
    put(vault, given)
    again = make(tmp_path)
    assert again.get(given.mailbox) == given
    assert again.peek(given.mailbox) == given.without_secret()
    assert [each.mailbox for each in again.accounts()] == [given.mailbox]
    assert list(again.problems()) == []


def test_peek_needs_no_key_and_no_cryptography(tmp_path, vault):
    put(vault, account())
    (tmp_path / "outbox.key").unlink()
    assert make(tmp_path).peek("alice@example.org").password is HIDDEN
    code = (
        "import sys; from cpsmailaccess_delivery.vault import Vault;"
        "from cpsmailaccess_delivery.key import KeySource;"
        f"vault = Vault({vault.location!r}, KeySource(), None);"
        "assert vault.peek('alice@example.org').username == 'alice';"
        "assert [each.mailbox for each in vault.accounts()];"
        "assert not [name for name in sys.modules if name.startswith('cryptography')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_two_phases(vault):
    put(vault, account())
    seen = vault.version("alice@example.org")
    token = vault.stage("alice@example.org", account())
    vault.prepare([token])
    assert vault.version("alice@example.org") == seen
    vault.discard([token])
    vault.discard([token])
    assert names(vault) == [file_of(vault).name]
    assert vault.version("alice@example.org") == seen
    put(vault, account())
    assert vault.version("alice@example.org") != seen


def test_changes_are_published_in_order(vault):
    mailbox = "alice@example.org"
    tokens = [
        vault.stage(mailbox, account(username="one")),
        vault.stage(mailbox, None),
        vault.stage(mailbox, account(username="two")),
    ]
    assert vault.peek(mailbox) is None
    vault.prepare(tokens)
    vault.publish(tokens)
    assert vault.get(mailbox).username == "two"
    tokens = [vault.stage(mailbox, account(username="three")), vault.stage(mailbox, None)]
    vault.prepare(tokens)
    vault.publish(tokens)
    assert names(vault) == []
    assert vault.version(mailbox) == ""


def test_mailbox_and_account_agree(vault):
    with pytest.raises(ValueError, match="cannot be put"):
        vault.stage("mallory@example.org", account())


def test_modes_whatever_the_umask(tmp_path, vault, open_umask):
    put(vault, account())
    vault.stage("bob@example.org", account("bob@example.org"))
    for path in tmp_path.rglob("*"):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_prepare_syncs_files_then_directory(vault, monkeypatch):
    synced = []
    monkeypatch.setattr(vault_module, "sync_path", lambda path: synced.append(Path(path)))
    token = vault.stage("alice@example.org", account())
    synced.clear()
    vault.prepare([token])
    directory = Path(vault.location)
    assert synced == [directory / token, directory]
    synced.clear()
    vault.publish([token])
    assert synced == [directory], "before the register forgets the former file"


def test_that_a_witness_will_know_is_durable_with_the_change(vault, monkeypatch):
    modes = []
    monkeypatch.setattr(
        vault_module, "sync_path", lambda path: modes.append(stat.S_IMODE(os.stat(path).st_mode))
    )
    token = vault.stage("alice@example.org", account(), "T0k3n")
    modes.clear()
    vault.prepare([token], witnessed=True)
    assert modes[0] == 0o1600


def test_prepare_fails_and_can_be_discarded(vault):
    token = vault.stage("alice@example.org", account())
    os.unlink(Path(vault.location, token))
    with pytest.raises(VaultError, match="No such file"):
        vault.prepare([token])
    vault.discard([token])


def test_publish_never_raises(vault, caplog):
    tokens = [vault.stage("alice@example.org", account()), vault.stage("*", account("*"))]
    os.unlink(Path(vault.location, tokens[0]))
    vault.publish(tokens)
    assert [each.mailbox for each in vault.accounts()] == ["*"], (
        "one that fails does not stop the next"
    )
    assert "put it again" in caplog.text


def test_cannot_write(tmp_path):
    (tmp_path / "outbox").write_text("")
    with pytest.raises(VaultError, match="outbox/accounts"):
        make(tmp_path).stage("alice@example.org", account())


# What was tampered with


@pytest.mark.parametrize(
    "edited",
    [
        {"host": "evil.example.net"},
        {"port": 25},
        {"security": "tls"},
        {"verify": False},
        {"username": "bob"},
        {"password_from": None},
        {"connections": 4},
        {"data_timeout": 600},
    ],
)
@pytest.mark.parametrize("login", [{}, {"username": None, "password": None}])
def test_edited_settings_do_not_open(vault, edited, login):
    put(vault, account(**login))
    before = json.loads(file_of(vault).read_bytes())["account"]
    edit(file_of(vault), **edited)
    after = json.loads(file_of(vault).read_bytes())["account"]
    if json.dumps(before) == json.dumps(after):
        assert vault.get("alice@example.org")
        return
    with pytest.raises(BrokenSeal) as caught:
        vault.get("alice@example.org")
    assert "alice@example.org" in str(caught.value)
    assert str(file_of(vault)) in str(caught.value)
    assert [type(problem) for problem in vault.problems()] == [BrokenSeal]


def test_setting_taken_out_does_not_open(vault):
    put(vault, account(verify="/etc/ca.pem"))
    document = json.loads(file_of(vault).read_bytes())
    del document["account"]["verify"]
    file_of(vault).write_text(json.dumps(document))
    with pytest.raises(BrokenSeal):
        vault.get("alice@example.org")


def test_seal_of_another_account_does_not_open(vault):
    put(vault, account(), account("bob@example.org", password="other"))
    alice, bob = file_of(vault), file_of(vault, "bob@example.org")
    document = json.loads(bob.read_bytes())
    document["sealed"] = json.loads(alice.read_bytes())["sealed"]
    bob.write_text(json.dumps(document))
    with pytest.raises(BrokenSeal, match=r"bob@example\.org"):
        vault.get("bob@example.org")


def test_swapped_files(vault, caplog):
    put(vault, account(), account("bob@example.org"), account("*"))
    file_of(vault).rename(vault.location + "/x")
    file_of(vault, "bob@example.org").rename(file_of(vault))
    Path(vault.location, "x").rename(file_of(vault, "bob@example.org"))
    for look in (vault.peek, vault.get):
        with pytest.raises(BrokenSeal, match=r"account alice@.*is the account of bob@"):
            look("alice@example.org")
    assert [each.mailbox for each in vault.accounts()] == ["*"]
    assert "another's name" in caplog.text
    assert len(list(vault.problems())) == 2


GARBAGE = [
    b"",
    b"{",
    b"\x00" * 500,
    b"[" * 100_000,
    b"[" * 10_000,
    b"[]",
    b"null",
    b'{"version": 1}',
    b'{"version": 2, "account": {}}',
    b'{"version": 1, "account": [], "key": "", "sealed": ""}',
    b'{"version": 1, "account": {"password": "x"}, "key": "", "sealed": ""}',
    b'{"version": 1, "account": {"mailbox": 7, "host": {}}, "key": "", "sealed": ""}',
    b'{"version": 1, "account": {"mailbox": "*", "host": "h"}, "key": 1, "sealed": ""}',
    b'{"version": 1, "account": {"mailbox": "*", "host": "h"}, "key": "", "sealed": 5}',
    b'{"version": 1, "account": {"mailbox": "*", "host": "h"}, "key": "", "sealed": "*"}',
    b'{"version": 1, "account": {"mailbox": "*", "host": "h", "security": []},'
    b' "key": "", "sealed": ""}',
    b'{"version": 1, "account": {"mailbox": "*", "host": "h", "verify": NaN},'
    b' "key": "", "sealed": ""}',
    b'{"version": 1, "account": {"mailbox": "*", "host": "h", "port": ' + b"9" * 9000 + b"}}",
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_told_and_harms_no_other(vault, caplog, content):
    put(vault, account(), account("*"))
    broken = file_of(vault)
    broken.write_bytes(content)
    for look in (vault.peek, vault.get):
        with pytest.raises(BrokenSeal) as caught:
            look("alice@example.org")
        assert str(broken) in str(caught.value)
    assert [each.mailbox for each in vault.accounts()] == ["*"]
    assert str(broken) in caplog.text
    assert [str(broken) in str(problem) for problem in vault.problems()] == [True]
    assert vault.get("*").secret.reveal() == PASSWORD
    put(vault, account())
    assert list(vault.problems()) == []


def test_every_cut_is_told(vault):
    put(vault, account())
    whole = file_of(vault).read_bytes().rstrip()
    for length in range(len(whole)):
        file_of(vault).write_bytes(whole[:length])
        with pytest.raises(BrokenSeal):
            vault.get("alice@example.org")


def test_every_flipped_bit_of_the_seal_is_told(vault):
    put(vault, account())
    document = json.loads(file_of(vault).read_bytes())
    sealed = base64.b64decode(document["sealed"])
    for place in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[place // 8] ^= 1 << place % 8
        document["sealed"] = base64.b64encode(flipped).decode()
        file_of(vault).write_text(json.dumps(document))
        with pytest.raises(BrokenSeal):
            vault.get("alice@example.org")


def test_no_regular_file(vault, tmp_path):
    put(vault, account())
    elsewhere = file_of(vault).rename(tmp_path / "elsewhere")
    file_of(vault).symlink_to(elsewhere)
    with pytest.raises(BrokenSeal, match="no regular file"):
        vault.peek("alice@example.org")
    file_of(vault).unlink()
    file_of(vault).mkdir()
    with pytest.raises(BrokenSeal, match="no regular file"):
        vault.get("alice@example.org")
    assert [each.mailbox for each in vault.accounts()] == []
    file_of(vault).rmdir()
    os.mkfifo(file_of(vault))
    with pytest.raises(BrokenSeal):
        vault.get("alice@example.org")


# Keys


def test_wrong_key(tmp_path):
    put(make(tmp_path, given=b"\x01" * 32), account())
    other = make(tmp_path, given=b"\x02" * 32)
    with pytest.raises(WrongKey, match="give this process the key") as caught:
        other.get("alice@example.org")
    assert "alice@example.org" in str(caught.value)
    assert other.peek("alice@example.org").username == "alice"
    put(other, account())  # as the text says
    assert other.get("alice@example.org").secret.reveal() == PASSWORD


def test_lost_key_is_never_made_anew(tmp_path, vault):
    put(vault, account())
    (tmp_path / "outbox.key").unlink()
    lost = make(tmp_path)
    for act in (lambda: lost.get("alice@example.org"), lambda: lost.stage("*", account("*"))):
        with pytest.raises(WrongKey, match=r"lost.*restore it"):
            act()
    assert not (tmp_path / "outbox.key").exists()
    token = lost.stage("alice@example.org", None)  # the way out that the text names
    lost.prepare([token])
    lost.publish([token])
    put(lost, account())
    assert lost.get("alice@example.org").secret.reveal() == PASSWORD


def test_key_changed_while_running(tmp_path, vault):
    put(vault, account())
    (tmp_path / "outbox.key").write_bytes(b"\x07" * 32)
    put(make(tmp_path), account(username="new"))
    assert vault.get("alice@example.org").username == "new"


def test_a_key_that_is_gone_is_told_before_the_vote(tmp_path, vault):
    token = vault.stage("alice@example.org", account())
    (tmp_path / "outbox.key").write_bytes(b"\x07" * 32)
    with pytest.raises(WrongKey, match="was changed meanwhile: put the account again"):
        vault.prepare([token])


# Processes


def test_sweep_takes_what_dead_processes_left(tmp_path, vault):
    presence = Presence("gone-with.1-2")
    dead = make(tmp_path, presence)
    put(vault, account())
    dead.stage("bob@example.org", account("bob@example.org"))
    dead.stage("alice@example.org", None)
    torn = dead.stage("carol@example.org", account("carol@example.org"))
    os.truncate(Path(vault.location, torn), 20)
    living = vault.stage("dave@example.org", account("dave@example.org"))
    assert (vault.left_overs(), vault.sweep()) == ([], ())
    sweeper = make(tmp_path, after := Presence("later"))
    after.dead.add(presence.token)
    assert len(sweeper.left_overs()) == 3
    assert living not in sweeper.left_overs()
    assert sorted(sweeper.sweep()) == [
        f"(unreadable: {torn})",
        "alice@example.org",
        "bob@example.org",
    ]
    assert sweeper.sweep() == ()
    assert names(vault) == sorted([file_of(vault).name, living])


@pytest.mark.parametrize("verdict", [Verdict.COMMITTED, Verdict.ABORTED])
def test_what_a_witness_will_know_is_not_swept(tmp_path, vault, verdict):
    presence = Presence("gone-with.1-2")
    dead = make(tmp_path, presence)
    known = dead.stage("alice@example.org", account(), "T0k3n")
    unknown = dead.stage("bob@example.org", account("bob@example.org"), "T0k3n")
    dead.prepare([known], witnessed=True)
    dead.prepare([unknown])
    sweeper = make(tmp_path, after := Presence("later"))
    after.dead.add(presence.token)
    assert sweeper.doubts() == [(known, "T0k3n")]
    assert sweeper.sweep() == ("bob@example.org",)
    assert sweeper.doubts() == [(known, "T0k3n")]
    assert sweeper.resolve(known, verdict) == "alice@example.org"
    assert sweeper.doubts() == []
    found = [each.mailbox for each in make(tmp_path).accounts()]
    assert found == (["alice@example.org"] if verdict is Verdict.COMMITTED else [])
    for name in names(vault):
        assert stat.S_IMODE(Path(vault.location, name).stat().st_mode) == 0o600
    assert list(sweeper.problems()) == []


def test_a_change_in_doubt_counts_that_is_as_old_as_the_account(vault):
    """A clock may tick once while both are written; what was committed is not lost."""
    put(vault, account(username="one"))
    change = vault.stage("alice@example.org", account(username="two"), "T0k3n")
    vault.prepare([change], witnessed=True)
    times = file_of(vault).stat()
    os.utime(Path(vault.location, change), ns=(times.st_atime_ns, times.st_mtime_ns))
    vault.resolve(change, Verdict.COMMITTED)
    assert vault.get("alice@example.org").username == "two"


def test_a_forked_child_neither_publishes_nor_discards(vault):
    tokens = [vault.stage("alice@example.org", account()), vault.stage("*", account("*"))]
    vault.prepare(tokens)
    child = os.fork()
    if not child:
        code = 1
        try:
            vault.publish(tokens[:1])
            vault.discard(tokens[1:])
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert names(vault) == sorted(tokens)
    vault.publish(tokens)
    assert sorted(each.mailbox for each in vault.accounts()) == ["*", "alice@example.org"]


def test_an_account_that_is_put_while_it_is_read(tmp_path, vault, monkeypatch):
    """Its file was read, and its register is that of the next file."""
    put(vault, account(username="one"))
    real, changed = vault._open, []

    def open_late(*arguments):
        if not changed:
            changed.append(1)
            put(make(tmp_path), account(username="two"))
        return real(*arguments)

    monkeypatch.setattr(vault, "_open", open_late)
    assert vault.get("alice@example.org").username == "two"


def test_concurrent_changes(tmp_path):
    """Readers see whole accounts only, whoever writes."""
    vaults = [make(tmp_path, given=b"\x01" * 32) for _ in range(4)]
    put(vaults[0], account(username="0", password="0"))
    failed, done = [], threading.Event()

    def write(vault: Vault, name: str) -> None:
        try:
            for n in range(50):
                put(vault, account(username=f"{name}.{n}", password=f"{name}.{n}"))
        except Exception as error:
            failed.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                seen = vaults[3].get("alice@example.org")
                assert seen.username == seen.secret.reveal()
                assert [each.mailbox for each in vaults[3].accounts()] == ["alice@example.org"]
        except Exception as error:
            failed.append(error)

    writers = [
        threading.Thread(target=write, args=(vaults[n % 2], str(n)), daemon=True) for n in range(3)
    ]
    reader = threading.Thread(target=read, daemon=True)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join(DEADLINE)
    done.set()
    reader.join(DEADLINE)
    assert not failed
    assert names(vaults[0]) == [file_of(vaults[0]).name]


def test_thousands(vault):
    mailboxes = [f"user{n}@example.org" for n in range(5000)]
    tokens = [vault.stage(each, account(each, password=f"pw-{each}")) for each in mailboxes]
    vault.publish(tokens)  # without 5,000 fsyncs
    assert sorted(each.mailbox for each in vault.accounts()) == sorted(mailboxes)
    assert all(vault.peek(each).mailbox == each for each in mailboxes)
    assert vault.get("user4711@example.org").secret.reveal() == "pw-user4711@example.org"


def test_files_that_vanish_while_listing(vault):
    put(vault, *(account(f"user{n}@example.org") for n in range(5)))
    found = vault.accounts()
    first = next(found)
    for path in Path(vault.location).iterdir():
        path.unlink()
    assert list(found) == []
    assert first.mailbox.startswith("user")


def test_secret_is_nowhere(tmp_path, vault, caplog):
    caplog.set_level(logging.DEBUG)
    put(vault, account(), account("*"))
    staged = vault.stage("bob@example.org", account("bob@example.org"))
    texts = [repr(vault), staged, repr(vault.get("*")), repr(vault.peek("*")), str(vault._keys)]
    edit(file_of(vault), host="evil.example.net")
    for mailbox in ("alice@example.org", "nobody@example.org"):
        try:
            vault.get(mailbox)
        except VaultError as error:
            texts += [repr(error), str(error)]
    texts += [str(problem) for problem in vault.problems()]
    key = KeySource(file=tmp_path / "outbox.key").load().reveal()
    for text in (*texts, caplog.text):
        assert PASSWORD not in text
        assert key.hex() not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    for path in files:
        assert PASSWORD.encode() not in path.read_bytes()
        if path.name != "outbox.key":
            assert key not in path.read_bytes()


# The watch


def wait(watch: IWatch) -> None:
    assert select.select([watch.fileno()], [], [], DEADLINE)[0], "nothing was told"
    assert watch.read() is None


@pytest.mark.parametrize("polling", [False, True])
def test_watch(vault, polling):
    put(vault, account("*"))
    if polling:
        watch = PollingWatch(vault.location, (".",), interval=0.01)
        assert verifyObject(IWatch, watch)
    else:
        watch = vault.watch()
    try:
        assert not select.select([watch.fileno()], [], [], 0)[0]
        put(vault, account())
        wait(watch)
        token = vault.stage("alice@example.org", None)
        vault.publish([token])
        wait(watch)
    finally:
        watch.close()
        watch.close()


def test_watch_falls_back(vault, monkeypatch):
    put(vault, account())
    monkeypatch.setitem(sys.modules, "inotify_simple", None)
    watch = vault.watch()
    assert isinstance(watch, PollingWatch)
    watch.close()


# What was put back


def test_older_file_of_an_account_put_back(tmp_path, vault, caplog):
    put(vault, account(host="old.example.org", password="known-by-now"))
    old = file_of(vault).read_bytes()
    put(vault, account("*"), account())
    file_of(vault).write_bytes(old)
    for each in (vault, make(tmp_path)):
        with pytest.raises(BrokenSeal, match=r"alice@example\.org.*older state.*put back"):
            each.get("alice@example.org")
        assert [type(problem) for problem in each.problems()] == [BrokenSeal]
        assert each.get("*").secret.reveal() == PASSWORD
    put(vault, account())  # as the text says
    assert vault.get("alice@example.org").secret.reveal() == PASSWORD
    assert list(vault.problems()) == []


def test_removed_account_put_back(tmp_path, vault):
    put(vault, account(), account("*"))
    old = file_of(vault).read_bytes()
    token = vault.stage("alice@example.org", None)
    vault.prepare([token])
    vault.publish([token])
    file_of(vault).write_bytes(old)
    with pytest.raises(BrokenSeal, match="after its account was removed"):
        make(tmp_path).get("alice@example.org")


def test_removed_by_hand(tmp_path, vault):
    put(vault, account(), account("*"))
    file_of(vault).unlink()
    (problem,) = make(tmp_path).problems()
    assert str(file_of(vault)) in str(problem)
    assert "not by us" in str(problem)


def register_of(vault: Vault) -> Path:
    (found,) = Path(vault.location).glob("register-*")
    return found


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 5000, b'{"seal": 1}', b'{"seal": "AAAA"}'])
def test_register_that_is_damaged(tmp_path, vault, content):
    put(vault, account())
    whole = register_of(vault).read_bytes()
    register_of(vault).write_bytes(content)
    other = make(tmp_path)
    with pytest.raises(BrokenSeal, match=r"register .* edited or damaged"):
        other.get("alice@example.org")
    assert other.peek("alice@example.org").username == "alice", "mails are taken all the same"
    with pytest.raises(BrokenSeal, match="register"):
        put(other, account())
    register_of(vault).write_bytes(whole)
    assert other.get("alice@example.org").secret.reveal() == PASSWORD
    register_of(vault).unlink()  # the way out that the text names
    with pytest.raises(BrokenSeal, match="register was lost"):
        make(tmp_path).get("alice@example.org")
    for each in (other, vault):
        put(each, account())
        for reader in (make(tmp_path), vault, other):
            assert reader.get("alice@example.org").secret.reveal() == PASSWORD


def test_register_that_is_edited(tmp_path, vault):
    put(vault, account(username="one"))
    old = file_of(vault).read_bytes()
    put(vault, account(username="two"))
    document = json.loads(register_of(vault).read_bytes())
    (name,) = document["accounts"]
    document["accounts"][name] = [json.loads(old)["sealed"]]
    register_of(vault).write_text(json.dumps(document))
    with pytest.raises(BrokenSeal, match="edited or damaged"):
        make(tmp_path).get("alice@example.org")


def test_whole_directory_put_back_is_told_to_processes_that_run(tmp_path, vault):
    """And to no other: a backup that was restored looks the same."""
    put(vault, account(username="one"))
    old = {path: path.read_bytes() for path in Path(vault.location).iterdir()}
    put(vault, account(username="two"))
    assert vault.get("alice@example.org").username == "two"
    for path, content in old.items():
        path.write_bytes(content)
    with pytest.raises(BrokenSeal, match="earlier state than this process has seen"):
        vault.get("alice@example.org")
    assert make(tmp_path).get("alice@example.org").username == "one"


def test_a_register_of_the_same_size_and_time_is_read_all_the_same(tmp_path, vault):
    """A clock may tick once while others write twice."""
    put(vault, account(username="one"))
    other, path = make(tmp_path), register_of(vault)
    assert other.get("alice@example.org").username == "one"
    before = path.stat()
    os.link(path, tmp_path / "kept")  # so that nobody gets its inode again
    put(vault, account(username="two"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert other.get("alice@example.org").username == "two"


def test_a_key_that_comes_back_begins_anew(tmp_path, vault):
    for _ in range(3):
        put(vault, account())
    vault.forget(KeySource(file=tmp_path / "outbox.key").load())
    put(make(tmp_path), account(username="again"))
    assert vault.get("alice@example.org").username == "again"


def test_crash_between_announcement_and_publication(tmp_path, vault):
    """Both versions count until somebody sweeps; then the one in force does, alone."""
    put(vault, account(username="one"))
    presence = Presence("gone-with.1-2")
    dead = make(tmp_path, presence)
    token = dead.stage("alice@example.org", account(username="two"))
    dead.prepare([token])
    copy = Path(vault.location, token).read_bytes()
    assert vault.get("alice@example.org").username == "one"
    sweeper = make(tmp_path, after := Presence("later"))
    after.dead.add(presence.token)
    assert sweeper.sweep() == ("alice@example.org",)
    assert list(sweeper.problems()) == []
    file_of(vault).write_bytes(copy)
    with pytest.raises(BrokenSeal, match="older state"):
        make(tmp_path).get("alice@example.org")


def test_what_was_only_staged_counts_for_nothing(tmp_path, vault):
    put(vault, account(username="one"))
    token = vault.stage("alice@example.org", account(username="two"))
    copy = Path(vault.location, token).read_bytes()
    put(vault, account(username="three"))
    file_of(vault).write_bytes(copy)
    with pytest.raises(BrokenSeal, match="older state"):
        make(tmp_path).get("alice@example.org")


def test_first_account_that_a_crash_has_cut_short_is_not_missed(tmp_path, vault):
    put(vault, account("*"))
    presence = Presence("gone-with.1-2")
    dead = make(tmp_path, presence)
    dead.prepare([dead.stage("alice@example.org", account())])
    assert list(vault.problems()) == []
    sweeper = make(tmp_path, after := Presence("later"))
    after.dead.add(presence.token)
    sweeper.sweep()
    assert list(vault.problems()) == []
    assert len(json.loads(register_of(vault).read_bytes())["accounts"]) == 1


# What is too large, or of another release


def test_no_account_is_larger_than_what_is_read(vault):
    networks = tuple(f"10.{number // 256}.{number % 256}.0/24" for number in range(1200))
    with pytest.raises(VaultError, match="bytes of settings: shorten them"):
        vault.stage("alice@example.org", account(networks=networks))
    put(vault, account(networks=networks[:500]))
    assert len(vault.get("alice@example.org").networks) == 500


def test_a_huge_file_is_not_read(vault):
    put(vault, account())
    path = file_of(vault)
    path.write_bytes(path.read_bytes() + b" " * MAX_SIZE)
    with pytest.raises(BrokenSeal, match="has more than"):
        vault.peek("alice@example.org")
    os.truncate(path, 64 * 1024 * 1024)
    tracemalloc.start()
    try:
        with pytest.raises(BrokenSeal, match="has more than"):
            vault.peek("alice@example.org")
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


def test_a_register_of_another_release_is_not_believed(tmp_path, vault, monkeypatch):
    put(vault, account())
    monkeypatch.setattr(register, "VERSION", 2)
    with pytest.raises(BrokenSeal, match="has version 1; this release reads 2"):
        make(tmp_path).get("alice@example.org")


@pytest.mark.parametrize(
    ("changed", "why"), [({"version": 2}, "has version 2"), ({"key": 7}, "names no key")]
)
def test_what_another_release_would_write_is_told(changed, why):
    document = json.loads(seal(Account(mailbox="*", host="h"), Key(bytes(32), "a test")))
    with pytest.raises(ValueError, match=why):
        parse(json.dumps(document | changed).encode())
