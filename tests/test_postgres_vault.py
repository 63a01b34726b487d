"""The accounts on PostgreSQL: what was put back, edited or cut short is told; another key."""

from __future__ import annotations

import base64
import os
import secrets
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

from zope.interface.verify import verifyObject

from cli_helpers import Site
from conftest import PASSWORD
from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.errors import (
    BrokenSeal,
    NoSuchAccount,
    VaultError,
    VaultUnreachable,
    WrongKey,
)
from cpsmailaccess_delivery.interfaces import IAccountStore, Verdict
from cpsmailaccess_delivery.key import KeySource
from cpsmailaccess_delivery.pg import register as register_module
from cpsmailaccess_delivery.pg import vault as vault_module
from cpsmailaccess_delivery.pg.connections import Connections
from cpsmailaccess_delivery.pg.register import RegisterTable
from cpsmailaccess_delivery.pg.vault import PostgresVault
from cpsmailaccess_delivery.rekey import rekey
from postgres_helpers import DEADLINE

ALICE = "alice@example.org"
KEY, OTHER = b"\x01" * 32, b"\x02" * 32
NAME = digest(ALICE) + ".account"

Make = Callable[..., PostgresVault]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("CPSMAIL_KEY", "CPSMAIL_FORMER_KEY", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(database: str) -> Iterator[Make]:
    made = []

    def make(key: bytes | None = KEY) -> PostgresVault:
        made.append(Connections(database))
        return PostgresVault(made[-1], KeySource(key))

    yield make
    for connections in made:
        connections.close()


@pytest.fixture
def vault(make: Make) -> PostgresVault:
    return make()


def account(mailbox: str = ALICE, password: str = PASSWORD) -> Account:
    return Account(mailbox=mailbox, host="smtp.example.org", username="a", password=password)


def put(vault: PostgresVault, *accounts: Account) -> None:
    tokens = [vault.stage(each.mailbox, each) for each in accounts]
    vault.prepare(tokens)
    vault.publish(tokens)


def delete(vault: PostgresVault, mailbox: str = ALICE) -> None:
    token = vault.stage(mailbox, None)
    vault.prepare([token])
    vault.publish([token])


def query(vault: PostgresVault, text: str, *values: object) -> list[tuple[object, ...]]:
    with vault._connections.use("meddle") as connection:
        cursor = connection.execute(text.encode(), values, binary=True)
        return cursor.fetchall() if cursor.description else []


def problems(vault: PostgresVault) -> list[str]:
    return [str(problem) for problem in vault.problems()]


def test_contract(vault):
    assert verifyObject(IAccountStore, vault)


def test_round_trip(make, vault):
    put(vault, account(), account("bob@example.org", "other"))
    other = make()
    assert other.get(ALICE).secret.reveal() == PASSWORD
    assert sorted(each.mailbox for each in other.accounts()) == [ALICE, "bob@example.org"]
    assert problems(other) == []
    delete(other)
    with pytest.raises(NoSuchAccount):
        vault.get(ALICE)
    assert problems(vault) == []
    put(vault, account(password="again"))
    assert other.get(ALICE).secret.reveal() == "again"


def test_older_row_of_an_account_put_back(make, vault):
    put(vault, account(password="former"))
    [(former,)] = query(vault, "SELECT data FROM cpsmail.accounts")
    put(vault, account())
    query(vault, "UPDATE cpsmail.accounts SET data = %s", former)
    for each in (vault, make()):
        with pytest.raises(BrokenSeal, match="older state"):
            each.get(ALICE)
        assert len(problems(each)) == 1


def test_removed_account_put_back(make, vault):
    put(vault, account())
    [(former,)] = query(vault, "SELECT data FROM cpsmail.accounts")
    delete(vault)
    query(vault, "INSERT INTO cpsmail.accounts (name, data) VALUES (%s, %s)", NAME, former)
    with pytest.raises(BrokenSeal, match="put back after its account was removed"):
        make().get(ALICE)


def test_removed_by_hand(vault):
    put(vault, account(), account("bob@example.org"))
    query(vault, "DELETE FROM cpsmail.accounts WHERE name = %s", NAME)
    [problem] = problems(vault)
    assert NAME in problem
    assert "was removed, but not by us" in problem


def test_accounts_and_register_put_back_are_told_to_processes_that_run(make, vault):
    put(vault, account(password="former"))
    [(row,)] = query(vault, "SELECT data FROM cpsmail.accounts")
    [(register,)] = query(vault, "SELECT data FROM cpsmail.registers")
    put(vault, account())
    assert vault.get(ALICE).secret.reveal() == PASSWORD
    query(vault, "UPDATE cpsmail.accounts SET data = %s", row)
    query(vault, "UPDATE cpsmail.registers SET data = %s", register)
    with pytest.raises(BrokenSeal, match="earlier state"):
        vault.get(ALICE)
    with pytest.raises(BrokenSeal, match="earlier state"):  # before the vote, not after it
        vault.prepare([vault.stage(ALICE, account())])


def test_a_register_that_is_damaged_is_told_before_the_vote(make, vault):
    put(vault, account())
    query(vault, "UPDATE cpsmail.registers SET data = %s", b"{}")
    fresh = make()
    with pytest.raises(BrokenSeal, match="register"):
        fresh.get(ALICE)
    with pytest.raises(BrokenSeal, match="register"):
        fresh.prepare([fresh.stage(ALICE, account())])


def test_what_a_witness_resolves_is_listed(make, vault):
    token = vault.stage(ALICE, account(), "transaction")
    vault.prepare([token], witnessed=True)
    query(vault, "UPDATE cpsmail.account_changes SET staged_at = now() - interval '1 hour'")
    other = make()
    assert other.doubts() == [(token, "transaction")]
    assert other.resolve(token, Verdict.COMMITTED) == ALICE
    assert other.get(ALICE).secret.reveal() == PASSWORD
    assert problems(vault) == []


@pytest.mark.parametrize("verdict", [Verdict.COMMITTED, Verdict.ABORTED])
def test_what_a_witness_will_know_is_not_swept(make, vault, verdict):
    known = vault.stage(ALICE, account(), "T0k3n")
    unknown = vault.stage("bob@example.org", account("bob@example.org"), "T0k3n")
    vault.prepare([known], witnessed=True)
    vault.prepare([unknown])
    query(vault, "UPDATE cpsmail.account_changes SET staged_at = now() - interval '1 hour'")
    other = make()
    assert other.doubts() == [(known, "T0k3n")]
    assert other.sweep() == ("bob@example.org",)
    assert other.resolve(known, verdict) == ALICE
    found = [each.mailbox for each in other.accounts()]
    assert found == ([ALICE] if verdict is Verdict.COMMITTED else [])


def test_an_account_that_was_put_since_stays(make, vault):
    put(vault, account(password="first"))
    change = vault.stage(ALICE, account(password="second"), "T0k3n")
    vault.prepare([change], witnessed=True)
    put(make(), account())
    assert vault.resolve(change, Verdict.COMMITTED) == ALICE
    assert vault.get(ALICE).secret.reveal() == PASSWORD


def test_who_loses_his_connection_publishes_all_the_same(vault, monkeypatch):
    real, lost = vault._publish, [VaultUnreachable("the connection is lost")]

    def publish(changes):
        if lost:
            raise lost.pop()
        real(changes)

    monkeypatch.setattr(vault, "_publish", publish)
    put(vault, account())
    assert vault.get(ALICE).secret.reveal() == PASSWORD


def test_a_change_that_is_rolled_back_changes_no_register(make, vault, monkeypatch):
    put(vault, account(password="former"))
    token = vault.stage(ALICE, account())
    vault.prepare([token])
    monkeypatch.setattr(vault, "_put_in_place", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vault.publish([token])
    monkeypatch.undo()
    assert vault.get(ALICE).secret.reveal() == "former"
    put(vault, account())
    assert make().get(ALICE).secret.reveal() == PASSWORD


def test_what_is_rolled_back_was_never_seen(vault):
    """In its transaction each write is read; after it, what was there before is there."""
    put(vault, account())
    register, key = vault._register, vault._keys.load()
    with vault._connections.use("meddle") as connection:
        before = register.page(connection, key)
        with connection.transaction():
            for version in ("first", "second"):
                register.write(connection, key, {"name": [version]})
                assert register.page(connection, key).accounts["name"] == [version]
            raise psycopg.Rollback
        assert register.page(connection, key) == before


def test_a_register_in_the_place_of_another_is_another(make, vault):
    """So it is after a vacuum, and here at once."""
    place = "SELECT ctid::text FROM cpsmail.registers"
    query(vault, "TRUNCATE cpsmail.registers")
    put(vault, account(password="former"))
    reader, former = make(), query(vault, place)
    assert reader.get(ALICE).secret.reveal() == "former"
    vault.forget(vault._keys.load())
    query(vault, "TRUNCATE cpsmail.registers")
    put(vault, account())
    assert query(vault, place) == former
    assert reader.get(ALICE).secret.reveal() == PASSWORD


def test_a_key_that_comes_back_begins_anew(make, vault):
    for _ in range(3):
        put(vault, account(password="former"))
    vault.forget(vault._keys.load())
    put(make(), account())
    assert vault.get(ALICE).secret.reveal() == PASSWORD


def test_a_forked_child_changes_no_account(vault):
    tokens = [vault.stage(ALICE, account()), vault.stage("*", account("*"))]
    vault.prepare(tokens)
    child = os.fork()
    if not child:
        code = 1
        try:
            with pytest.raises(VaultError, match="not staged by this process"):
                vault.prepare(tokens)
            vault.publish(tokens[:1])
            vault.discard(tokens[1:])
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    left = query(vault, "SELECT token FROM cpsmail.account_changes")
    assert {token for (token,) in left} == set(tokens)
    assert list(vault.accounts()) == []
    vault.publish(tokens)
    assert sorted(each.mailbox for each in vault.accounts()) == ["*", ALICE]


# Another key


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def test_rekey_seals_all_anew(make, vault, monkeypatch):
    mailboxes = [f"user{number}@example.org" for number in range(120)]
    put(vault, *map(account, mailboxes))
    monkeypatch.setenv("CPSMAIL_FORMER_KEY", text(KEY))
    changed = make(OTHER)
    assert changed.get(mailboxes[0]).secret.reveal() == PASSWORD  # both work meanwhile
    put(changed, account())
    done = rekey(changed, changed._keys)
    assert (done.resealed, done.needed) == (120, 0)
    monkeypatch.delenv("CPSMAIL_FORMER_KEY")
    alone = make(OTHER)
    assert {alone.get(each).secret.reveal() for each in (ALICE, *mailboxes)} == {PASSWORD}
    assert problems(alone) == []
    assert len(query(vault, "SELECT key FROM cpsmail.registers")) == 1
    with pytest.raises(WrongKey):
        make(KEY).get(ALICE)


def test_who_changes_the_register_is_alone(database, make, vault, monkeypatch):
    real, locked = RegisterTable.write, []

    def write(*arguments):
        query = "SELECT pg_try_advisory_xact_lock(%s)"
        with psycopg.connect(database, autocommit=True) as other:
            locked.append(other.execute(query, [register_module._LOCK]).fetchone() == (False,))
        real(*arguments)

    monkeypatch.setattr(RegisterTable, "write", write)
    put(vault, account())
    assert locked == [True]
    change = vault.stage(ALICE, account(), "T0k3n")
    vault.prepare([change], witnessed=True)
    vault.resolve(change, Verdict.COMMITTED)
    assert locked == [True] * 2
    monkeypatch.setenv("CPSMAIL_FORMER_KEY", text(KEY))
    changed = make(OTHER)
    rekey(changed, changed._keys)
    assert len(locked) > 2
    assert all(locked)


def test_a_change_in_doubt_is_not_overtaken_by_a_new_key(make, vault, monkeypatch):
    """To be sealed anew is not to be put again."""
    put(vault, account(password="former"))
    change = vault.stage(ALICE, account(), "T0k3n")
    vault.prepare([change], witnessed=True)
    monkeypatch.setenv("CPSMAIL_FORMER_KEY", text(KEY))
    changed = make(OTHER)
    assert rekey(changed, changed._keys).resealed == 1
    changed.resolve(change, Verdict.COMMITTED)
    assert changed.get(ALICE).secret.reveal() == PASSWORD


def test_rekey_keeps_the_former_key_for_what_is_in_doubt(make, vault, monkeypatch):
    vault.prepare([vault.stage(ALICE, account())], witnessed=True)
    monkeypatch.setenv("CPSMAIL_FORMER_KEY", text(KEY))
    changed = make(OTHER)
    assert rekey(changed, changed._keys).needed == 1


def test_a_change_that_is_published_meanwhile_needs_its_key(vault, monkeypatch):
    """Its account has been looked at, its change not yet: the key must not be forgotten."""
    token = vault.stage(ALICE, account())
    vault.prepare([token])
    other = threading.Thread(target=vault.publish, args=[[token]])
    rows = vault_module._rows

    def rows_and_publish(*arguments: Any) -> Any:
        found = rows(*arguments)
        if other.ident is None:
            other.start()
            other.join(0.3)  # it waits for us
        return found

    monkeypatch.setattr(vault_module, "_rows", rows_and_publish)
    assert vault.needs(vault._keys.load()) == 1
    other.join(30)
    assert not other.is_alive()


def test_rekey_without_a_new_key_says_what_to_do(vault):
    put(vault, account())
    with pytest.raises(WrongKey, match="CPSMAIL_FORMER_KEY"):
        rekey(vault, vault._keys)
    assert vault.get(ALICE).secret.reveal() == PASSWORD


def test_a_row_that_was_put_back_is_not_sealed_anew(make, vault, monkeypatch):
    put(vault, account(password="former"))
    [(former,)] = query(vault, "SELECT data FROM cpsmail.accounts")
    put(vault, account())
    query(vault, "UPDATE cpsmail.accounts SET data = %s", former)
    monkeypatch.setenv("CPSMAIL_FORMER_KEY", text(KEY))
    changed = make(OTHER)
    with pytest.raises(BrokenSeal, match="older state"):
        rekey(changed, changed._keys)


def test_without_the_key_nothing_can_be_put(make, vault):
    put(vault, account())
    keyless = make(None)
    with pytest.raises(VaultError, match="CPSMAIL_KEY"):
        keyless.stage(ALICE, account())


def test_a_key_that_is_gone_is_told_before_the_vote(vault):
    token = vault.stage(ALICE, account())
    vault._keys = KeySource(OTHER)
    with pytest.raises(WrongKey, match="was changed meanwhile: put the account again"):
        vault.prepare([token])


def test_rekey_by_the_command(database, tmp_path, vault):
    put(vault, account())
    site = Site(tmp_path)
    new = secrets.token_bytes(32)
    site.environ |= {
        "CPSMAIL_OUTBOX": database,
        "CPSMAIL_KEY": text(new),
        "CPSMAIL_FORMER_KEY": text(KEY),
    }
    assert "1 account is sealed anew" in site.run("accounts", "rekey").output


# Many at once


def test_read_ahead_gives_each_account_once_without_a_question(make, vault, monkeypatch):
    others = [account(f"m{n}@example.org") for n in range(5)]
    put(vault, *others)
    expected = [(vault.version(each.mailbox), each) for each in others]
    reader = make()
    reader.read_ahead([*(each.mailbox for each in others), "nobody@example.org"])
    with monkeypatch.context() as patch:
        patch.setattr(PostgresVault, "_data", None)
        assert [reader.current(each.mailbox) for each in others] == expected
    put(vault, account("m0@example.org", "another"))  # nobody has told us: it is asked for again
    assert reader.get("m0@example.org").password.reveal() == "another"
    with pytest.raises(NoSuchAccount):
        reader.current("nobody@example.org")


def test_what_was_read_ahead_is_forgotten_after_a_change(make, vault):
    put(vault, account())
    reader = make()
    watch = reader.watch()
    reader.read_ahead([ALICE])
    put(vault, account(password="another"))
    assert select.select([watch.fileno()], [], [], DEADLINE)[0]
    watch.read()
    assert reader.get(ALICE).password.reveal() == "another"
    watch.close()


def test_a_change_that_is_told_while_accounts_are_read_ahead(make, vault, monkeypatch):
    """What was read is older than what was told, and nobody will tell it again."""
    put(vault, account())
    reader = make()
    watch = reader.watch()
    real = PostgresVault._open

    def open_late(self, *values):
        opened = real(self, *values)
        if not changed:
            changed.append(1)
            put(vault, account(password="another"))
            assert select.select([watch.fileno()], [], [], DEADLINE)[0]
            watch.read()
        return opened

    changed: list[int] = []
    monkeypatch.setattr(PostgresVault, "_open", open_late)
    reader.read_ahead([ALICE])
    assert changed
    assert reader.get(ALICE).password.reveal() == "another"
    watch.close()


def test_what_was_read_ahead_is_not_kept_for_long(make, vault, monkeypatch):
    put(vault, account())
    reader = make()
    reader.read_ahead([ALICE])
    monkeypatch.setattr(vault_module, "_AHEAD", -1.0)
    put(vault, account(password="another"))
    assert reader.get(ALICE).password.reveal() == "another"


def test_a_row_that_was_put_back_is_not_read_ahead(make, vault):
    put(vault, account(password="old"))
    (old,) = query(vault, "SELECT data FROM cpsmail.accounts WHERE name = %s", NAME)
    put(vault, account(password="new"))
    query(vault, "UPDATE cpsmail.accounts SET data = %b WHERE name = %s", old[0], NAME)
    reader = make()
    reader.read_ahead([ALICE])
    with pytest.raises(BrokenSeal, match="older state"):
        reader.current(ALICE)


def test_the_register_is_sent_when_it_has_changed(make, vault, monkeypatch):
    put(vault, account())
    reader, loaded = make(), []
    real = register_module.load_page

    def load_page(data, key):
        loaded.append(data)
        return real(data, key)

    monkeypatch.setattr(register_module, "load_page", load_page)
    for _ in range(3):
        reader.get(ALICE)
    assert len(loaded) == 1
    token = vault.stage("bob@example.org", account("bob@example.org"))
    vault.prepare([token])
    vault.publish([token])
    loaded.clear()
    for _ in range(3):
        reader.get("bob@example.org")
    assert len(loaded) == 1


def test_all_are_listed_by_one_question(vault, monkeypatch, caplog):
    """A page of thousands asks once, and one that is damaged hides no other."""
    for name in ("a", "b", "c"):
        put(vault, Account(mailbox=f"{name}@example.org", host="smtp.example.org", port=587))
    with vault._connections.use("damage") as connection:
        query = "UPDATE cpsmail.accounts SET data = 'x' WHERE name = %s"
        connection.execute(query, [digest("b@example.org") + ".account"])
    asked: list[str] = []
    use = Connections.use
    monkeypatch.setattr(
        Connections, "use", lambda self, action: asked.append(action) or use(self, action)
    )
    assert {each.mailbox for each in vault.accounts()} == {"a@example.org", "c@example.org"}
    assert asked == ["list the accounts"]
    assert digest("b@example.org") in caplog.text
