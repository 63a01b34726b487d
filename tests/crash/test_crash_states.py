"""Every state that a power loss may leave of every operation: nothing lost, nothing twice.

``make crash`` prints the figures; docs/reliability.rst explains them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from disk import MODELS, Disk
from enumerator import Enumerator, all_sites, is_missed
from recorder import in_memory
from stories import NAMES

POSIX = "posix"
#: What is promised for; of the fourth see `test_renames_must_be_whole`.
PROMISED = tuple(model for model in MODELS if model != "unordered")

#: Every sync there is: where it is called and what it syncs, and whether a journalling file
#: system (ext4, xfs) needs it too.
SYNCS = {
    "files.sync_path < files._make: the directory above": False,
    "files.sync_path < key.forget_former: the directory above": True,
    "files.sync_path < key.make: the directory above": False,
    "files.sync_path < key.renew: the directory above": False,
    "files.sync_path < vault._publish: accounts/": False,
    "files.sync_path < vault_files._put_in_place: accounts/": False,
    "files.sync_path < vault._reseal: accounts/": False,
    "files.sync_path < vault.forget: accounts/": False,
    "files.sync_path < vault.prepare: accounts/": False,
    "files.sync_path < vault.prepare: the file": True,
    "files.sync_path < vault.resolve: accounts/": False,
    "files.write_new < key.make: the file": True,
    "files.write_new < key.renew: the file": True,
    "files.write_new < register.write: the file": True,
    "files.write_new < spool.outcomes.write: the file": True,
    "files.write_new < vault._reseal: the file": True,
    "spool.durable.settle_files < spool.keys._settle: everything": True,
    "spool.durable.settle_files < spool.keys._settle: the file": True,
    "spool.durable.settle_files < spool.keys._settle: tmp/": False,
    "spool.durable.settle_files < spool.staging._settle_all: everything": True,
    "spool.durable.settle_files < spool.staging._settle_all: the file": True,
    "spool.durable.settle_files < spool.staging._settle_all: tmp/": False,
    "spool.keys._sync < spool.keys.confirm: tmp/": False,
    "spool.keys._sync < spool.keys.free: keys/": False,
    "spool.keys._sync < spool.keys.give_back: keys/": False,
    "spool.keys.take < spool.staging.prepare: keys/": False,
    "spool.mails._sync < spool.mails.hold: cur/": True,
    "spool.mails._sync < spool.mails.put_back: cur/": True,
    "spool.mails._sync < spool.mails.sync_names: cur/": False,
    "spool.mails._sync < spool.mails.sync_names: new/": False,
    "spool.mails._sync < spool.mails.sync: cur/": False,
    "spool.mails._sync < spool.mails.sync: new/": False,
    "spool.mails._sync < spool.mails.sync: tmp/": False,
    "spool.outcomes.write < spool.doubts.hold: outcomes/": False,
    "spool.outcomes.write < spool.mails.hold: outcomes/": False,
    "spool.outcomes.write < spool.mails.record: outcomes/": True,
    "spool.outcomes.write < spool.mails.set_aside: outcomes/": False,
    "spool.staging.<lambda> < spool.durable._take_turns: new/": True,
    "spool.staging._settle_all < spool.durable._take_turns: the file": True,
    "spool.staging._settle_all < spool.durable._take_turns: tmp/": False,
    "spool.staging.discard < spool.maildir.discard: tmp/": True,
}

#: Missed by nobody: what goes is why the mail was held, and that is no promise.
SPARED = {
    "spool.outcomes.write < spool.mails.put_back: outcomes/",
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What is found in thousands of states is logged as often."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def enumerator() -> Iterator[Enumerator]:
    with in_memory() as workplace:
        yield Enumerator(workplace)


@pytest.mark.parametrize("name", NAMES)
def test_no_state_breaks_a_promise(enumerator, name):
    for model in PROMISED:
        for syncfs in (False, True):
            count = enumerator.run(name, model, syncfs=syncfs)
            assert count.moments > 0
            assert count.violations == []


def test_thousands_of_states(enumerator):
    states = set()
    for name in NAMES:
        disk = Disk(POSIX)
        for op in enumerator.story(name, syncfs=False):
            disk.apply(op)
            if op.kind not in ("mark", "sync"):
                states.update(disk.states())
    assert len(states) >= 5000


def test_the_same_in_every_run(enumerator, tmp_path):
    for name in ("a_key", "accounts", "the_first_mail"):
        again = Enumerator(tmp_path).story(name, syncfs=False)
        assert [op for op in again if op.kind != "mark"] == [
            op for op in enumerator.story(name, syncfs=False) if op.kind != "mark"
        ]


def test_every_sync_is_known(enumerator):
    assert set(all_sites(enumerator)) == SPARED | set(SYNCS)


@pytest.mark.parametrize("site", SYNCS)
def test_every_sync_is_missed(enumerator, site):
    """Without it some promise is broken, by the strictest reading of POSIX."""
    assert is_missed(enumerator, site, POSIX)


@pytest.mark.parametrize("site", SYNCS)
def test_a_journal_makes_some_superfluous(enumerator, site):
    """Of these, `durable` leaves out the one of tmp/ where there is a journal for certain."""
    assert bool(is_missed(enumerator, site, "journal")) is SYNCS[site]


def test_a_journal_keeps_the_name_with_the_file():
    """What `durable` leaves out on ext4 and xfs is superfluous there, and only there."""
    names = ("one_mail", "a_key")
    with in_memory() as workplace:
        enumerator = Enumerator(workplace, keeps_names=True)
        for name in NAMES:
            for syncfs in (False, True):
                assert enumerator.run(name, "journal", syncfs=syncfs).violations == []
        assert any(enumerator.run(n, POSIX, syncfs=False, stop=True).violations for n in names)


def test_renames_must_be_whole(enumerator):
    """Where a power loss may take the old name and not give the new one, mail is lost."""
    count = enumerator.run("one_mail", "unordered", syncfs=False)
    assert any("lost" in violation for violation in count.violations)
