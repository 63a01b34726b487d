"""What the outbox does in a transaction: all that is committed, nothing that is not."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transaction
from transaction.interfaces import (
    DoomedTransaction,
    ISavepointDataManager,
    NoTransaction,
    TransactionFailedError,
    TransientError,
)
from zope.interface.verify import verifyObject

from conftest import KEY, PASSWORD, mails_on_disk
from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.datamanager import TOKEN_NAME, join, kept_for
from cpsmailaccess_delivery.envelope import parse_block
from cpsmailaccess_delivery.errors import (
    InvalidAccount,
    NoSuchAccount,
    SpoolError,
    UnknownMailbox,
)
from cpsmailaccess_delivery.outgoing import Doings
from cpsmailaccess_delivery.spool import durable

ALICE, BOB = "alice@example.org", "bob@example.net"


def message(name: str = "1") -> bytes:
    return b"Message-Id: <%s@example.org>\nDate: today\n\nbody\n" % name.encode()


def send(outbox: Outbox, name: str = "1") -> str:
    return outbox.delivery.send(ALICE, [BOB], message(name))


def sent(outbox: Outbox) -> list[str]:
    """The names of the mails that a processor can see, the oldest first."""
    found = [outbox.spool.load(entry).envelope.message_id for entry in outbox.spool.scan()]
    return [message_id.removesuffix("@example.org") for message_id in found]


def staged_accounts(outbox: Outbox) -> list[Path]:
    return list(Path(outbox.location).rglob("*.staged"))


def nothing_left(outbox: Outbox) -> bool:
    return not mails_on_disk(outbox) and not staged_accounts(outbox)


class Participant:
    """Another data manager; it writes down what is asked of it, and fails where it is told."""

    def __init__(
        self,
        manager: Any = transaction.manager,
        key: str = "sqlite",
        fail: str = "",
        log: list[str] | None = None,
        error: Exception | None = None,
    ) -> None:
        self.transaction_manager = manager
        self.key = key
        self.fail = fail
        self.log = log if log is not None else []
        self.error = error or RuntimeError("veto")

    def sortKey(self) -> str:
        return self.key

    def _do(self, what: str) -> None:
        self.log.append(f"{self.key}.{what}")
        if self.fail == what:
            raise self.error

    def tpc_begin(self, txn: Any) -> None:
        self._do("tpc_begin")

    def commit(self, txn: Any) -> None:
        self._do("commit")

    def tpc_vote(self, txn: Any) -> None:
        self._do("tpc_vote")

    def tpc_finish(self, txn: Any) -> None:
        self._do("tpc_finish")

    def tpc_abort(self, txn: Any) -> None:
        self.log.append(f"{self.key}.tpc_abort")

    abort = tpc_abort


class Recorder:
    """A store that only writes down what is asked of it."""

    def __init__(self, log: list[str], name: str = "store", fail: str = "") -> None:
        self.log, self.name, self.fail = log, name, fail

    def _do(self, what: str, items: Sequence[Any]) -> None:
        self.log.append(f"{self.name}.{what}({','.join(items)})")
        if self.fail == what:
            raise OSError(28, "No space left on device")

    def prepare(self, items: Sequence[Any], *, witnessed: bool) -> None:
        self._do("prepare", items)

    def publish(self, items: Sequence[Any]) -> None:
        self._do("publish", items)

    def discard(self, items: Sequence[Any]) -> None:
        self._do("discard", items)


def put(store: Recorder, item: str, *, rank: int = 1, manager: Any = transaction.manager) -> None:
    def stage(token: str) -> str:
        store.log.append(f"{store.name}.stage({item})")
        return item

    join(manager, store, stage, rank=rank)


# The order of calls


@pytest.mark.parametrize("key", ["~sqlalchemy:1", "ZODB", "", "~~~zzz", "\U0010ffff"])
def test_one_batch_before_anybody_votes(key):
    log: list[str] = []
    spool, vault = Recorder(log, "spool"), Recorder(log, "vault")
    with transaction.manager as txn:
        txn.join(Participant(key=key, log=log))
        put(spool, "a")
        put(vault, "x", rank=0)
        put(spool, "b")
        put(spool, "c")
        put(vault, "y", rank=0)
        del log[:]
    other = [line for line in log if line.startswith(f"{key}.")]
    ours = [line for line in log if line not in other]
    assert ours == [
        "vault.prepare(x,y)",
        "spool.prepare(a,b,c)",
        "vault.publish(x,y)",
        "spool.publish(a,b,c)",
    ]
    assert other == [f"{key}.{what}" for what in ("tpc_begin", "commit", "tpc_vote", "tpc_finish")]
    assert log.index(f"{key}.tpc_vote") > log.index("spool.prepare(a,b,c)")
    if not key.startswith(("~~~z", "\U0010ffff")):
        assert log.index(f"{key}.tpc_finish") < log.index("vault.publish(x,y)")


@pytest.mark.parametrize("key", ["ZODB", "~~~~"])
@pytest.mark.parametrize("phase", ["tpc_begin", "commit", "tpc_vote"])
def test_veto_discards_all(key, phase):
    log: list[str] = []
    spool = Recorder(log)
    txn = transaction.begin()
    put(spool, "a")
    put(spool, "b")
    txn.join(Participant(key=key, fail=phase, log=log))
    with pytest.raises(RuntimeError, match="veto"):
        transaction.commit()
    assert not [line for line in log if "publish" in line]
    discarded = [line for line in log if "discard" in line]
    if "store.prepare(a,b)" in log:
        assert discarded == ["store.discard(a,b)"]
    else:
        assert set(discarded) == {"store.discard(a)", "store.discard(b)"}


@pytest.mark.parametrize("key", ["ZODB", "~~~~"])
@pytest.mark.parametrize("phase", ["tpc_begin", "commit", "tpc_vote"])
def test_veto_leaves_nothing(stocked, account, key, phase):
    txn = transaction.begin()
    send(stocked)
    stocked.accounts.put(account.replace(mailbox="new@example.org"))
    txn.join(Participant(key=key, fail=phase))
    send(stocked, "2")
    with pytest.raises(RuntimeError, match="veto"):
        transaction.commit()
    assert nothing_left(stocked)
    with pytest.raises(TransactionFailedError):
        send(stocked, "3")
    transaction.abort()
    assert nothing_left(stocked)
    with pytest.raises(NoSuchAccount):
        stocked.accounts.get("new@example.org")
    with transaction.manager:
        send(stocked, "4")
    assert sent(stocked) == ["4"]


def test_a_failing_finish_before_ours_discards(stocked):
    """tpc_finish must not fail; when it does, the others are told to abort."""
    txn = transaction.begin()
    send(stocked)
    txn.join(Participant(key="ZODB", fail="tpc_finish"))
    with pytest.raises(RuntimeError):
        transaction.commit()
    assert nothing_left(stocked)


def test_a_failing_finish_after_ours_takes_nothing_back(stocked):
    txn = transaction.begin()
    send(stocked)
    txn.join(Participant(key="~~~~", fail="tpc_finish"))
    with pytest.raises(RuntimeError):
        transaction.commit()
    transaction.abort()
    assert sent(stocked) == ["1"]


def test_vote_without_commit_is_refused():
    log: list[str] = []
    txn = transaction.begin()
    put(Recorder(log), "a")
    (change,) = txn._resources
    assert verifyObject(ISavepointDataManager, change)
    with pytest.raises(RuntimeError):
        change.tpc_vote(txn)


def test_token_is_on_the_transaction_and_in_the_envelope(stocked):
    seen = []
    with transaction.manager as txn:
        send(stocked)
        send(stocked, "2")
        seen.append(txn.extension[TOKEN_NAME])
    with transaction.manager as txn:
        send(stocked, "3")
        seen.append(txn.extension[TOKEN_NAME])
    tokens = [parse_block(path.read_bytes())[0].token for path in mails_on_disk(stocked)]
    assert sorted(tokens) == sorted([seen[0], seen[0], seen[1]])
    assert seen[0] != seen[1]
    assert all(len(token) == 32 for token in seen)


def test_token_survives_a_savepoint():
    log: list[str] = []
    tokens = []
    txn = transaction.begin()
    point = txn.savepoint()
    join(transaction.manager, Recorder(log), lambda t: tokens.append(t) or "a", rank=1)
    point.rollback()
    join(transaction.manager, Recorder(log), lambda t: tokens.append(t) or "b", rank=1)
    assert tokens[0] == tokens[1] == txn.extension[TOKEN_NAME]


# Failures of our own


def test_join_failing_leaves_nothing(stocked):
    txn = transaction.begin()
    txn.join(Participant(fail="commit"))
    with pytest.raises(RuntimeError):
        transaction.commit()
    with pytest.raises(TransactionFailedError):
        send(stocked)
    assert nothing_left(stocked)
    with pytest.raises(TransactionFailedError):
        stocked.accounts.delete(ALICE)
    assert nothing_left(stocked)
    transaction.abort()
    assert stocked.accounts.get(ALICE)


def test_stage_failing_leaves_the_transaction_usable(stocked, monkeypatch):
    with transaction.manager:
        send(stocked)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", _disk_full)
            patch.setattr(os, "writev", _disk_full, raising=False)
            with pytest.raises(SpoolError):
                send(stocked, "2")
        send(stocked, "3")
    assert sent(stocked) == ["1", "3"]
    assert len(mails_on_disk(stocked)) == 2


def _disk_full(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def test_prepare_failing_raises_and_leaves_nothing(stocked, monkeypatch):
    participant = Participant(key="~~~~")
    transaction.get().join(participant)
    send(stocked)
    send(stocked, "2")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _disk_full)
        patch.setattr(os, "fdatasync", _disk_full)
        patch.setattr(durable, "_syncfs", None)  # which would be used instead
        with pytest.raises(SpoolError):
            transaction.commit()
    assert "~~~~.tpc_vote" not in participant.log
    transaction.abort()
    assert nothing_left(stocked)


def test_an_abort_after_prepare_costs_one_fsync(stocked, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(durable, "_syncfs", None)
    transaction.get().join(Participant(key="~~~~", fail="tpc_vote"))
    for number in range(50):
        send(stocked, str(number))
    prepare = stocked.spool.prepare

    def prepare_and_count(entries: Sequence[Any], **options: Any) -> None:
        prepare(entries, **options)
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))

    monkeypatch.setattr(stocked.spool, "prepare", prepare_and_count)
    with pytest.raises(RuntimeError, match="veto"):
        transaction.commit()
    assert len(synced) == 1
    assert nothing_left(stocked)


def test_prepare_failing_discards_what_was_prepared_elsewhere():
    log: list[str] = []
    first, second = Recorder(log, "vault"), Recorder(log, "spool", fail="prepare")
    transaction.begin()
    put(second, "a")
    put(first, "x", rank=0)
    with pytest.raises(OSError, match="No space"):
        transaction.commit()
    assert {"vault.discard(x)", "spool.discard(a)"} <= set(log)
    assert not [line for line in log if "publish" in line]


def test_finish_never_raises(caplog):
    log: list[str] = []
    store, other = Recorder(log, fail="publish"), Participant(key="~~~~")
    with caplog.at_level(logging.CRITICAL), transaction.manager as txn:
        txn.join(other)
        put(store, "a")
        put(store, "b")
    assert other.log[-1] == "~~~~.tpc_finish"
    assert log.count("store.publish(a,b)") == 1
    assert not [line for line in log if "discard" in line]  # in doubt, not gone
    assert "in doubt" in caplog.text


def test_nothing_is_discarded_after_publish():
    """After the hooks, transaction calls abort() of every data manager."""
    log: list[str] = []
    with transaction.manager as txn:
        put(Recorder(log), "a")
        txn.addAfterCommitHook(lambda status: None)
    assert log == ["store.stage(a)", "store.prepare(a)", "store.publish(a)"]


def test_accounts_are_published_before_mails(stocked, account, monkeypatch):
    order: list[str] = []
    for name, store in (("vault", stocked.vault), ("spool", stocked.spool)):
        publish = store.publish
        monkeypatch.setattr(
            store, "publish", lambda items, n=name, p=publish: (order.append(n), p(items))
        )
    with transaction.manager:
        send(stocked)
        stocked.accounts.put(account.replace(mailbox="new@example.org"))
    assert order == ["vault", "spool"]


def test_one_prepare_per_transaction(stocked, monkeypatch):
    prepared = []
    prepare = stocked.spool.prepare
    monkeypatch.setattr(
        stocked.spool,
        "prepare",
        lambda entries, **options: (prepared.append(len(entries)), prepare(entries, **options)),
    )
    with transaction.manager:
        for number in range(20):
            send(stocked, str(number))
    assert prepared == [20]
    assert sent(stocked) == [str(number) for number in range(20)]


# Commit, abort, savepoints


def test_commit_and_abort(stocked):
    send(stocked)
    assert sent(stocked) == []
    assert len(mails_on_disk(stocked)) == 1
    transaction.abort()
    assert nothing_left(stocked)
    send(stocked, "2")
    transaction.commit()
    assert sent(stocked) == ["2"]
    transaction.abort()
    transaction.commit()
    assert sent(stocked) == ["2"]


def test_an_exception_in_the_block_aborts(stocked):
    def work() -> None:
        with transaction.manager:
            send(stocked)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert nothing_left(stocked)


def test_nested_savepoints(stocked):
    with transaction.manager as txn:
        send(stocked, "1")
        outer = txn.savepoint()
        send(stocked, "2")
        inner = txn.savepoint()
        send(stocked, "3")
        inner.rollback()
        assert len(mails_on_disk(stocked)) == 2
        send(stocked, "4")
        inner.rollback()  # a savepoint can be rolled back to more than once
        send(stocked, "5")
        outer.rollback()
        assert len(mails_on_disk(stocked)) == 1
        send(stocked, "6")
        txn.savepoint()
        send(stocked, "7")
    assert sent(stocked) == ["1", "6", "7"]


def test_rollback_of_everything(stocked):
    with transaction.manager as txn:
        point = txn.savepoint()
        send(stocked)
        point.rollback()
    assert nothing_left(stocked)


def test_in_the_style_of_cmf_editions(stocked):
    """It saves optimistically, makes a version, and goes back when that fails."""
    with transaction.manager as txn:
        send(stocked, "1")
        for number in range(3):
            point = txn.savepoint(optimistic=True)
            send(stocked, f"version-{number}")
            if number == 1:
                point.rollback()
        send(stocked, "2")
    assert sent(stocked) == ["1", "version-0", "version-2", "2"]


def test_beside_one_that_knows_no_savepoints(stocked):
    txn = transaction.begin()
    txn.join(Participant())
    send(stocked, "1")
    point = txn.savepoint(optimistic=True)
    send(stocked, "2")
    with pytest.raises(TypeError):
        point.rollback()
    transaction.abort()
    assert nothing_left(stocked)


def test_optimistic_savepoint_rolled_back(stocked):
    with transaction.manager as txn:
        send(stocked, "1")
        point = txn.savepoint(optimistic=True)
        send(stocked, "2")
        point.rollback()
        send(stocked, "3")
        txn.savepoint(optimistic=True)
        send(stocked, "4")
    assert sent(stocked) == ["1", "3", "4"]


def test_abort_after_savepoints(stocked):
    txn = transaction.begin()
    send(stocked, "1")
    txn.savepoint()
    send(stocked, "2")
    txn.savepoint().rollback()
    transaction.abort()
    assert nothing_left(stocked)


def test_doomed(stocked):
    txn = transaction.begin()
    send(stocked, "1")
    txn.doom()
    send(stocked, "2")
    with pytest.raises(DoomedTransaction):
        transaction.commit()
    transaction.abort()
    assert nothing_left(stocked)


# Hooks


def test_before_commit_hook(stocked):
    with transaction.manager as txn:
        txn.addBeforeCommitHook(send, (stocked, "hook"))
        send(stocked, "1")
    assert sent(stocked) == ["1", "hook"]


def test_failing_before_commit_hook(stocked):
    def fail() -> None:
        raise RuntimeError

    txn = transaction.begin()
    send(stocked)
    txn.addBeforeCommitHook(fail)
    with pytest.raises(RuntimeError):
        transaction.commit()
    transaction.abort()
    assert nothing_left(stocked)


def test_after_commit_hook(stocked, caplog):
    """A mail sent there belongs to no transaction: refused, logged by transaction, gone."""
    statuses = []

    def hook(status: bool) -> None:
        statuses.append(status)
        send(stocked, "hook")

    with transaction.manager as txn:
        txn.addAfterCommitHook(hook)
        send(stocked, "1")
    assert statuses == [True]
    # After the hooks, transaction calls abort() of every data manager: 1 is still there.
    assert sent(stocked) == ["1"]
    assert len(mails_on_disk(stocked)) == 1
    assert "Error in hook" in caplog.text


def test_after_commit_hook_with_a_transaction_of_its_own(stocked, account, tmp_path):
    own = transaction.TransactionManager()
    with Outbox(tmp_path / "own", key=KEY, transaction_manager=own) as second:
        with own:
            second.accounts.put(account)

        def hook(status: bool) -> None:
            with own:
                send(second, "hook")

        with transaction.manager as txn:
            txn.addAfterCommitHook(hook)
            send(stocked, "1")
        assert sent(second) == ["hook"]
    assert sent(stocked) == ["1"]


def test_after_commit_hook_of_a_failed_commit(stocked):
    txn = transaction.begin()
    txn.addAfterCommitHook(lambda status: None)
    txn.join(Participant(fail="tpc_vote"))
    send(stocked)
    with pytest.raises(RuntimeError):
        transaction.commit()
    assert nothing_left(stocked)


# What a transaction has found


def test_an_account_is_read_once_in_a_transaction(stocked, account, monkeypatch):
    """Many mails cost one question; what the transaction changes itself is seen at once."""
    asked: list[str] = []
    peek = stocked.accounts._store.peek
    monkeypatch.setattr(
        stocked.accounts._store, "peek", lambda mailbox: asked.append(mailbox) or peek(mailbox)
    )

    def host() -> str:
        """Send, and return the relay of the mail."""
        send(stocked)
        doings = kept_for(transaction.get(), stocked.delivery, Doings)
        return list(doings.sent.values())[-1].envelope.route.host

    assert [host(), host(), host()] == ["smtp.example.org"] * 3
    assert asked == [ALICE]
    savepoint = transaction.savepoint()
    stocked.accounts.put(account.replace(host="other.example.org"))
    assert host() == "other.example.org"
    savepoint.rollback()
    assert host() == "smtp.example.org"
    stocked.accounts.delete(ALICE)
    with pytest.raises(UnknownMailbox):
        send(stocked)
    transaction.abort()
    other = transaction.TransactionManager()
    with Outbox(stocked.location, key=KEY, transaction_manager=other) as second, other:
        second.accounts.put(account.replace(host="later.example.org"))
    assert host() == "later.example.org", "the next transaction asks again"


# Managers


def test_two_outboxes_with_managers_of_their_own(tmp_path, account):
    managers = [transaction.TransactionManager() for _ in range(2)]
    outboxes = [
        Outbox(tmp_path / f"outbox{number}", key=KEY, transaction_manager=manager)
        for number, manager in enumerate(managers)
    ]
    for outbox, manager in zip(outboxes, managers, strict=True):
        with manager:
            outbox.accounts.put(account)
        send(outbox)
    transaction.commit()  # the thread's: nobody's
    assert [sent(outbox) for outbox in outboxes] == [[], []]
    managers[0].commit()
    managers[1].abort()
    assert [sent(outbox) for outbox in outboxes] == [["1"], []]
    assert nothing_left(outboxes[1])
    for outbox in outboxes:
        outbox.close()


def test_two_outboxes_in_one_transaction(stocked, tmp_path, account):
    with Outbox(tmp_path / "second", key=KEY) as second:
        with transaction.manager:
            second.accounts.put(account)
            send(stocked, "1")
            send(second, "2")
        assert (sent(stocked), sent(second)) == (["1"], ["2"])
        send(stocked, "3")
        send(second, "4")
        transaction.abort()
        assert (sent(stocked), sent(second)) == (["1"], ["2"])


def test_an_outbox_that_nobody_keeps_lasts_as_long_as_its_transaction(tmp_path):
    """What it has done is known by its `id`: no other outbox may get that, and with it the keys,
    accounts and mails of this one."""
    outbox = Outbox(tmp_path / "outbox", key=KEY)
    outbox.delivery.send(ALICE, [BOB], message(), hostname="smtp.example.org")
    with pytest.raises(UnknownMailbox):
        send(outbox)
    parts = [weakref.ref(part) for part in (outbox.delivery, outbox.accounts)]
    spool, presence = outbox.spool, outbox.presence
    del outbox
    gc.collect()
    assert all(part() is not None for part in parts)
    transaction.commit()
    gc.collect()
    assert not any(part() is not None for part in parts)
    assert len(list(spool.scan())) == 1
    spool.close()
    presence.close()


def test_two_outboxes_of_one_directory(stocked):
    with Outbox(stocked.location, key=KEY) as second:
        with transaction.manager:
            send(stocked, "1")
            send(second, "2")
        assert sorted(sent(stocked)) == sorted(sent(second)) == ["1", "2"]


def test_explicit_mode(tmp_path, account):
    manager = transaction.TransactionManager(explicit=True)
    with Outbox(tmp_path / "outbox", key=KEY, transaction_manager=manager) as outbox:
        with manager:
            outbox.accounts.put(account)
        assert outbox.accounts.get(ALICE).host == "smtp.example.org"  # reading needs none
        assert outbox.accounts.find(ALICE)
        assert len(outbox.accounts.list()) == 1
        for change in (
            lambda: send(outbox),
            lambda: outbox.accounts.put(account),
            lambda: outbox.accounts.delete(ALICE),
            lambda: outbox.accounts.find_once(ALICE),
        ):
            with pytest.raises(NoTransaction):
                change()
            assert nothing_left(outbox)
        with manager:
            send(outbox)
        assert sent(outbox) == ["1"]


def test_the_threads_manager_in_explicit_mode(stocked):
    transaction.manager.explicit = True
    with pytest.raises(NoTransaction):
        send(stocked)
    assert nothing_left(stocked)
    with transaction.manager:
        send(stocked)
    assert sent(stocked) == ["1"]


def test_retry(stocked):
    """Each attempt is a transaction of its own; what failed leaves nothing."""
    tries = []
    for attempt in transaction.manager.attempts(3):
        with attempt as txn:
            tries.append(len(tries))
            send(stocked, f"try{len(tries)}")
            fails = len(tries) < 3
            txn.join(Participant(fail="commit" if fails else "", error=TransientError("conflict")))
    assert len(tries) == 3
    assert sent(stocked) == ["try3"]
    assert len(mails_on_disk(stocked)) == 1


def test_run(stocked):
    transaction.manager.run(lambda: send(stocked))
    assert sent(stocked) == ["1"]


def test_threads_share_an_outbox(stocked):
    """Each thread has its transaction: the odd ones abort."""
    errors: list[BaseException] = []
    ready = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            ready.wait(30)
            for mail in range(10):
                send(stocked, f"{number}-{mail}")
                if mail % 2:
                    transaction.abort()
                else:
                    transaction.commit()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    wanted = [f"{number}-{mail}" for number in range(8) for mail in range(0, 10, 2)]
    assert sorted(sent(stocked)) == sorted(wanted)
    assert len(mails_on_disk(stocked)) == len(wanted)


# Accounts


def test_accounts_follow_the_transaction(outbox, account):
    outbox.accounts.put(account)
    assert outbox.accounts.get(ALICE).host == "smtp.example.org"
    transaction.abort()
    with pytest.raises(NoSuchAccount):
        outbox.accounts.get(ALICE)
    assert nothing_left(outbox)
    with transaction.manager:
        outbox.accounts.put(account)
    assert outbox.accounts.get(ALICE).host == "smtp.example.org"


def test_others_see_an_account_when_it_is_committed(outbox, account):
    manager = transaction.TransactionManager()
    with Outbox(outbox.location, key=KEY, transaction_manager=manager) as other:
        outbox.accounts.put(account)
        assert other.accounts.list() == []
        with pytest.raises(UnknownMailbox):
            send(other)
        transaction.commit()
        assert [found.mailbox for found in other.accounts.list()] == [ALICE]


def test_reads_its_own_writes(outbox, account):
    with transaction.manager:
        outbox.accounts.put(account)
        send(outbox, "1")
        outbox.accounts.put(account.replace(mailbox="*"))
        outbox.delivery.send("eve@example.net", [BOB], message("2"))
        assert [found.mailbox for found in outbox.accounts.list()] == ["*", ALICE]
    assert sent(outbox) == ["1", "2"]


def test_delete_then_send(stocked):
    with transaction.manager:
        stocked.accounts.delete(ALICE)
        with pytest.raises(UnknownMailbox):
            send(stocked)
        with pytest.raises(NoSuchAccount):
            stocked.accounts.get(ALICE)
        with pytest.raises(NoSuchAccount):
            stocked.accounts.delete(ALICE)
        assert ALICE not in [found.mailbox for found in stocked.accounts.list()]
        transaction.abort()
    send(stocked)
    stocked.accounts.delete(ALICE)
    transaction.commit()
    with pytest.raises(UnknownMailbox):
        send(stocked)


def test_savepoint_restores_the_former_account(stocked, account):
    def host() -> str:
        return stocked.accounts.get(ALICE).host

    with transaction.manager as txn:
        stocked.accounts.put(account.replace(host="first.example.org"))
        point = txn.savepoint()
        stocked.accounts.put(account.replace(host="second.example.org"))
        inner = txn.savepoint()
        stocked.accounts.delete(ALICE)
        with pytest.raises(NoSuchAccount):
            host()
        inner.rollback()
        assert host() == "second.example.org"
        point.rollback()
        assert host() == "first.example.org"
        stocked.accounts.put(account.replace(host="first.example.org"))  # the same once more
        point.rollback()
        assert host() == "first.example.org"
    assert host() == "first.example.org"
    assert not staged_accounts(stocked)


def test_the_last_change_of_a_transaction_counts(stocked, account):
    with transaction.manager:
        for number in range(5):
            stocked.accounts.put(account.replace(host=f"h{number}.example.org"))
        stocked.accounts.delete(ALICE)
        stocked.accounts.put(account.replace(host="last.example.org"))
    assert stocked.accounts.get(ALICE).host == "last.example.org"
    with transaction.manager:
        stocked.accounts.put(account)
        stocked.accounts.delete(ALICE)
    with pytest.raises(NoSuchAccount):
        stocked.accounts.get(ALICE)


def test_what_is_read_has_no_password(stocked, account):
    for _ in ("committed", "in the transaction"):
        for found in (
            stocked.accounts.get(ALICE),
            stocked.accounts.find(ALICE),
            stocked.accounts.list()[-1],
        ):
            assert found.secret.hidden
            assert PASSWORD not in repr(vars(found))
        stocked.accounts.put(account)


def test_put_back_keeps_the_password(stocked):
    with transaction.manager:
        stocked.accounts.put(stocked.accounts.get(ALICE).replace(connections=1))
        stocked.accounts.put(stocked.accounts.get(ALICE).replace(connections=2))
    kept = stocked.vault.get(ALICE)
    assert kept.secret.reveal() == PASSWORD
    assert kept.connections == 2


def test_put_back_keeps_the_password_of_the_last_change(stocked, account):
    with transaction.manager:
        for password in ("first", "second"):
            stocked.accounts.put(account.replace(password=password))
        stocked.accounts.put(stocked.accounts.get(ALICE).replace(connections=3))
    kept = stocked.vault.get(ALICE)
    assert kept.secret.reveal() == "second"
    assert kept.connections == 3


def test_put_back_after_delete_has_no_password_to_keep(stocked):
    read = stocked.accounts.get(ALICE)
    stocked.accounts.delete(ALICE)
    with pytest.raises(InvalidAccount, match="no stored password"):
        stocked.accounts.put(read)
    transaction.abort()


@pytest.mark.parametrize(
    "elsewhere", [{"host": "evil.example"}, {"verify": False}, {"security": "plain"}]
)
def test_a_kept_password_goes_nowhere_else(stocked, elsewhere):
    read = stocked.accounts.get(ALICE)
    with pytest.raises(InvalidAccount):
        stocked.accounts.put(read.replace(**elsewhere))
    stocked.accounts.put(read.replace(port=465, security="tls"))
    transaction.commit()
    assert stocked.vault.get(ALICE).port == 465


@pytest.mark.parametrize("changes", [{"security": "plain", "host": "localhost"}, {"verify": False}])
def test_where_no_certificate_is_asked_for_another_port_is_somebody_else(stocked, changes):
    open_one = stocked.vault.get(ALICE).replace(**changes, port=2525)
    with transaction.manager:
        stocked.accounts.put(open_one.replace(password="new"))
    read = stocked.accounts.get(ALICE)
    with pytest.raises(InvalidAccount, match="2525"):
        stocked.accounts.put(read.replace(port=2526))
    stocked.accounts.put(read.replace(connections=1))


def test_a_kept_password_is_not_said_in_clear(stocked):
    encrypted = stocked.vault.get(ALICE).replace(host="localhost", port=2525)
    with transaction.manager:
        stocked.accounts.put(encrypted.replace(password="new"))
    read = stocked.accounts.get(ALICE)
    with pytest.raises(InvalidAccount, match="for less security"):
        stocked.accounts.put(read.replace(security="plain"))


def test_another_mailbox_does_not_get_the_password(stocked):
    """What is hidden belongs to a mailbox: a copy for another one has none to keep."""
    copy = stocked.accounts.get(ALICE).replace(mailbox="eve@example.org")
    with pytest.raises(InvalidAccount, match="no stored password"):
        stocked.accounts.put(copy)


def test_put_takes_accounts_only(outbox):
    with pytest.raises(TypeError):
        outbox.accounts.put({"mailbox": ALICE})


@pytest.mark.parametrize("bad", [None, 7, b"\xff", "", "nobody", "a@x.org\n"])
def test_find_nonsense(stocked, bad):
    with pytest.raises(ValueError, match=r"address|mailbox"):
        stocked.accounts.find(bad)


def test_find(stocked, account):
    assert stocked.accounts.find("Alice@Example.ORG").mailbox == ALICE
    assert stocked.accounts.find("bob@example.com").mailbox == "@example.com"
    assert stocked.accounts.find("*bob@example.com").mailbox == "@example.com"
    with pytest.raises(UnknownMailbox):
        stocked.accounts.find("bob@sub.example.com")
    with transaction.manager:
        stocked.accounts.put(Account(mailbox="*", host="x.org"))
    assert stocked.accounts.find("bob@sub.example.com").mailbox == "*"
    assert stocked.accounts.find("*").mailbox == "*"


def test_accounts_and_mails_fall_together(stocked, account, monkeypatch):
    """The spool cannot prepare: the account, prepared before, is not published either."""
    stocked.accounts.put(account.replace(mailbox="new@example.org"))
    send(stocked)

    def fail(entries: Any, **options: Any) -> None:
        raise SpoolError("disk full")

    monkeypatch.setattr(stocked.spool, "prepare", fail)
    with pytest.raises(SpoolError):
        transaction.commit()
    transaction.abort()
    assert nothing_left(stocked)
    with pytest.raises(NoSuchAccount):
        stocked.accounts.get("new@example.org")


def test_a_password_does_not_fall_into_a_log(stocked, account, caplog):
    caplog.set_level(logging.DEBUG)
    txn = transaction.begin()
    stocked.accounts.put(account)
    send(stocked)
    txn.join(Participant(fail="tpc_vote"))
    with pytest.raises(RuntimeError):
        transaction.commit()
    with pytest.raises(TransactionFailedError) as caught:
        send(stocked)
    transaction.abort()
    assert PASSWORD not in caplog.text + str(caught.value)
