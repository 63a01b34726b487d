"""What is done to a spool while the power fails: every operation, in every form."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from recorder import Recorder
from world import (
    ABSENT,
    ACCEPTED,
    ASKED,
    BOB,
    BOTH,
    CAROL,
    DEFERRED,
    DOUBT,
    HELD,
    NOW,
    QUEUED,
    REFUSED,
    UNCLEAR,
    World,
)

from cpsmailaccess_delivery.errors import KeyTaken, SpoolError
from cpsmailaccess_delivery.interfaces import Settlement, State, Verdict
from cpsmailaccess_delivery.spool import staging

Story = Callable[[World], Any]

STORIES: dict[str, Story] = {}
A, B, C = "a@x", "b@x", "c@x"
WAITING = (QUEUED, State.DEFERRED)


def story(function: Story) -> Story:
    """A story that begins with an empty spool that the disk knows."""
    STORIES[function.__name__] = function
    return function


@story
def one_mail(world):
    world.commit(A)


@story
def three_mails_of_one_transaction(world):
    world.commit(A, B, C)


@story
def more_mails_than_are_kept_open(world):
    with mock.patch.object(staging, "_MAX_OPEN", 1):
        world.commit(A, B)
    with mock.patch.object(staging, "_MAX_OPEN", 0):
        world.commit(C)


@story
def a_notice(world):
    """No transaction decides about it: what a crash leaves is never in doubt."""
    world.stage(A)
    world.prepare(A, alone=True)
    world.publish(A)
    world.settle(A, State.ACCEPTED, ABSENT, QUEUED)
    world.sync(A)


@story
def one_after_the_other(world):
    world.commit(A)
    world.commit(B, priority=8)
    world.commit(C, not_before=NOW + 86400)


@story
def two_transactions_at_a_time(world):
    world.stage(A)
    world.stage(B)
    world.prepare(B)
    world.prepare(A)
    world.publish(B)
    world.publish(A)


@story
def commit_beside_abort(world):
    world.stage(A)
    world.prepare(A)
    world.stage(B)
    world.prepare(B)
    world.discard(A)
    world.publish(B)


@story
def aborts(world):
    world.stage(A, B)
    world.discard(A)
    world.prepare(B)
    world.discard(B)


@story
def closed_with_a_mail_in_doubt(world):
    world.stage(A)
    world.stage(B)
    world.prepare(B)
    world.spool.close()
    world.presence.close()


@story
def a_key(world):
    world.commit(A, key="k")
    world.accept(A)
    world.sync(A)
    world.stage(B, key="k")
    try:
        world.spool.prepare([world.entries[B]])
    except KeyTaken:
        world.spool.discard([world.entries[B]])


@story
def a_key_that_is_given_back(world):
    world.stage(A, key="k")
    world.prepare(A)
    world.discard(A)
    world.commit(B, key="k")


@story
def a_key_that_is_kept_longer(world):
    world.commit(A, key="k", not_before=NOW + 900 * 86400)
    world._holds(kept={"k": NOW + 900 * 86400})


@story
def a_key_that_is_cancelled(world):
    world.commit(A, key="k")
    world.rest()
    world.cancel(A)
    world.commit(B, key="k")


@story
def a_key_whose_mail_is_taken_back(world):
    world.commit(A, key="k")
    world.rest()
    world.expect_key([A], absent_free=True, there_held=True)
    world.settle(A, State.CANCELLED, ABSENT, QUEUED, DOUBT)
    world.sync(A)
    world.expect_key([A], free=True)


@story
def accepted(world):
    world.commit(A, B)
    world.accept(A)
    world.accept(B)
    world.sync(A, B)


@story
def accepted_beside_commits(world):
    world.commit(A)
    world.stage(B)
    world.accept(A)
    world.prepare(B)
    world.publish(B)
    world.sync(A)


@story
def deferred(world):
    world.commit(A)
    world.settle(A, State.DEFERRED, *WAITING, bob=DEFERRED, carol=DEFERRED)
    world.settle(A, State.DEFERRED, *WAITING, attempts=2, bob=DEFERRED, carol=DEFERRED)
    world.accept(A)
    world.sync(A)


@story
def one_recipient_at_a_time(world):
    world.commit(A)
    world.settle(A, State.DEFERRED, *WAITING, bob=ACCEPTED, carol=DEFERRED)
    world.settle(A, State.DEFERRED, *WAITING, attempts=2, carol=DEFERRED)
    world.requeue(A)
    world.accept(A)
    world.sync(A)


@story
def refused(world):
    world.commit(A, B)
    world.settle(A, State.REFUSED, State.REFUSED, bob=REFUSED, carol=ACCEPTED)
    world.settle(B, State.DEFERRED, *WAITING, bob=REFUSED, carol=DEFERRED)


@story
def unclear(world):
    world.commit(A)
    world.settle(A, State.DEFERRED, *WAITING, bob=UNCLEAR, carol=UNCLEAR)
    world.settle(A, State.UNCLEAR, State.UNCLEAR, attempts=2, bob=UNCLEAR, carol=UNCLEAR)


@story
def held_by_the_processor(world):
    world.commit(A)
    world.settle(A, State.HELD, QUEUED, HELD, reason="a fault")


@story
def cancelled_in_a_transaction(world):
    world.commit(A)
    world.settle(A, State.DEFERRED, *WAITING, bob=ACCEPTED, carol=DEFERRED)
    world.settle(A, State.CANCELLED, ABSENT, DOUBT, *WAITING)
    world.sync(A)


@story
def people(world):
    world.commit(A)
    world.rest()
    world.hold(A)
    world.requeue(A)
    world.rest()
    world.cancel(A)


@story
def people_and_a_mail_that_was_tried(world):
    world.commit(A)
    world.settle(A, State.DEFERRED, *WAITING, bob=ACCEPTED, carol=DEFERRED)
    world.hold(A)
    world.requeue(A)
    world.cancel(A)


@story
def set_aside_and_put_back(world):
    world.commit(A)
    world.settle(A, State.DEFERRED, *WAITING, bob=ACCEPTED, carol=DEFERRED)
    world.rest()
    lease = world.set_aside(A, State.DEFERRED)
    only_carol = {"never": frozenset({BOB}), "must": frozenset({CAROL})}
    world.expect([A], HELD, State.DEFERRED, **only_carol)
    lease.release()
    world.expect([A], State.DEFERRED, **only_carol)


@story
def set_aside_and_put_back_at_once(world):
    world.commit(A)
    lease = world.set_aside(A, QUEUED, DOUBT)
    world.expect([A], HELD, QUEUED)
    lease.release()
    world.expect([A], QUEUED)


@story
def set_aside_and_removed(world):
    world.commit(A)
    lease = world.set_aside(A, QUEUED, DOUBT)
    world.expect([A], HELD, ABSENT, DOUBT)
    lease.settle(Settlement(State.CANCELLED))
    world.sync(A)


@story
def accounts(world):
    world.put("one")
    world.put("two")
    world.put("three", end="discard")
    world.put(None)


@story
def an_account_beside_a_mail(world):
    world.put("one")
    world.rest()
    world.stage(A)
    world.prepare(A)
    world.put("two")
    world.publish(A)


@story
def a_new_key(world):
    world.put("one")
    world.rest()
    world.rekey()


@story
def a_new_key_after_a_change(world):
    world.put("one")
    world.put("two")
    world.rekey()
    world.put("three")


@story
def notes_of_lanes(world):
    world.commit(A)
    world.note(1)
    world.note(2)
    world.note(0)


@story
def found_by_hand(world):
    """A file that somebody puts into new/, under a name that we would not give."""
    world.commit(A)
    world.rest()
    name = "1700000000.strange:2,S"
    old = os.listdir(Path(world.spool.location, "new"))[0]
    with world.by_hand():
        os.rename(Path(world.spool.location, "new", old), Path(world.spool.location, "new", name))
    list(world.spool.scan())


@story
def published_when_the_disk_is_full(world):
    world.stage(A)
    world.prepare(A)
    world.expect([A], DOUBT, QUEUED)
    with world.failing("rename", "new/"):
        world.spool.publish([world.entries[A]])
    world.spool.sweep()


@story
def a_settlement_that_stops_half_way(world):
    world.commit(A)
    lease = world.spool.claim(world.entries[A])
    world.expect([A], QUEUED, State.DEFERRED, must=BOTH - {BOB})
    with world.failing("rename", "cur/"):
        try:
            lease.settle(Settlement(State.DEFERRED, {BOB: ACCEPTED, CAROL: DEFERRED}, NOW, 1))
        except SpoolError:
            lease.release()
    world.expect(
        [A],
        QUEUED,
        State.DEFERRED,
        never=frozenset({BOB}),
        must=BOTH - {BOB},
    )
    world.spool.claim(world.entries[A])


def died_with_a_mail_in_doubt(root: Path, recorder: Recorder) -> None:
    """The next process tidies."""
    world = World(root, recorder)
    world.stage(A, key="k")
    world.prepare(A)
    _next(root, recorder, world)


def died_with_a_key_taken(root: Path, recorder: Recorder) -> None:
    world = World(root, recorder)
    world.stage(A, key="k")
    world.expect_key([A], absent_free=True)
    with world.failing("fchmod", ",S="):
        try:
            world.spool.prepare([world.entries[A]])
        except SpoolError:
            pass
    world.expect_key([A], free=True)
    _next(root, recorder, world)


def died_with_mails_staged_and_in_doubt(root: Path, recorder: Recorder) -> None:
    world = World(root, recorder)
    world.stage(A, B)
    world.prepare(A)
    _next(root, recorder, world)


def _asked(root: Path, recorder: Recorder, verdict: Verdict, fate: str) -> None:
    world = World(root, recorder)
    world.stage(A, key="k")
    world.prepare(A, witnessed=True)
    after = World(root, recorder, world.die())
    after.keys = world.keys
    after.spool.sweep()
    after.rest()
    (doubt,) = after.spool.doubts()
    after.expect([A], ASKED, fate)
    if fate == ABSENT:
        after.expect_key([A], absent_free=True, there_held=True)
    after.spool.resolve(doubt, verdict)
    after.expect([A], *((ASKED, QUEUED) if fate == QUEUED else (ABSENT,)))
    if fate == ABSENT:
        after.expect_key([A], free=True)
    after.presence.close()
    after.spool.close()


def died_and_the_database_had_committed(root: Path, recorder: Recorder) -> None:
    """In doubt until the witness is asked; in doubt again, when its answer is lost."""
    _asked(root, recorder, Verdict.COMMITTED, QUEUED)


def died_and_the_database_had_not_committed(root: Path, recorder: Recorder) -> None:
    _asked(root, recorder, Verdict.ABORTED, ABSENT)


def _asked_about_a_cancel(
    root: Path, recorder: Recorder, verdict: Verdict, *, tried: bool = False
) -> None:
    """Killed between vote and finish: what the witness says comes true, or it is asked again."""
    world = World(root, recorder)
    world.commit(A, key="k")
    world.rest()
    if tried:
        world.settle(A, State.DEFERRED, *WAITING, bob=ACCEPTED, carol=DEFERRED)
    before, before_fates = world.truth.mails[A], WAITING if tried else (QUEUED,)
    world.set_aside(A, *before_fates, token="a transaction").leave()
    after = World(root, recorder, world.die())
    after.keys = world.keys
    after.spool.sweep()
    (doubt,) = after.spool.doubts()
    gone = verdict is Verdict.COMMITTED
    fates = (ABSENT,) if gone else (State.DEFERRED,) if tried else (QUEUED,)
    after.expect_key([A], absent_free=not tried, there_held=True)
    after._now(A, before, ASKED, *fates)
    after.spool.resolve(doubt, verdict)
    after._now(A, before, *fates)
    after.expect_key([A], free=gone and not tried, held=not gone)
    after.presence.close()
    after.spool.close()


def died_and_the_database_had_cancelled(root: Path, recorder: Recorder) -> None:
    _asked_about_a_cancel(root, recorder, Verdict.COMMITTED)


def died_and_the_database_had_not_cancelled(root: Path, recorder: Recorder) -> None:
    _asked_about_a_cancel(root, recorder, Verdict.ABORTED)


def died_and_the_database_had_cancelled_what_was_tried(root: Path, recorder: Recorder) -> None:
    _asked_about_a_cancel(root, recorder, Verdict.COMMITTED, tried=True)


def died_and_the_database_had_not_cancelled_what_was_tried(root: Path, recorder: Recorder) -> None:
    _asked_about_a_cancel(root, recorder, Verdict.ABORTED, tried=True)


def died_and_a_cancel_of_what_was_in_doubt_had_not_committed(
    root: Path, recorder: Recorder
) -> None:
    """It is what it was: in doubt, for a witness to tell about who sends it."""
    world = World(root, recorder)
    world.stage(A)
    world.prepare(A, witnessed=True)
    after = World(root, recorder, world.die())
    after.spool.sweep()
    after.rest()
    (sends,) = after.spool.doubts()
    after.entries[A] = sends.entry
    after.set_aside(A, ASKED, token="another").leave()
    (cancels,) = after.spool.doubts()
    after.spool.resolve(cancels, Verdict.ABORTED)
    assert after.spool.doubts() == [sends]
    after.presence.close()
    after.spool.close()


def died_and_the_database_had_committed_an_account(root: Path, recorder: Recorder) -> None:
    world = World(root, recorder)
    world.put("one")
    world.put("two", end="die")
    after = World(root, recorder, world.die())
    after.rest()
    after.ask_about_accounts(Verdict.COMMITTED, "one", "two")
    after.presence.close()
    after.spool.close()


def died_with_a_mail_half_published(root: Path, recorder: Recorder) -> None:
    """The disk was full, or half of the rename came back; either is put right."""
    world = World(root, recorder)
    world.stage(A)
    world.prepare(A)
    world.expect([A], DOUBT, QUEUED)
    with world.failing("rename", "new/"):
        world.spool.publish([world.entries[A]])
    _next(root, recorder, world)


def _next(root: Path, recorder: Recorder, world: World) -> None:
    after = World(root, recorder, world.die())
    after.rest()
    after.spool.sweep()
    after.presence.close()
    after.spool.close()


def the_first_mail(root: Path, recorder: Recorder) -> None:
    """Nothing is there, and the disk is slow from the beginning."""
    world = World(root, recorder)
    world.commit(A)


def the_first_account(root: Path, recorder: Recorder) -> None:
    world = World(root, recorder)
    world.put("one")


ALONE = (
    died_with_a_mail_in_doubt,
    died_with_a_key_taken,
    died_with_mails_staged_and_in_doubt,
    died_with_a_mail_half_published,
    died_and_the_database_had_committed,
    died_and_the_database_had_not_committed,
    died_and_the_database_had_cancelled,
    died_and_the_database_had_not_cancelled,
    died_and_the_database_had_cancelled_what_was_tried,
    died_and_the_database_had_not_cancelled_what_was_tried,
    died_and_a_cancel_of_what_was_in_doubt_had_not_committed,
    died_and_the_database_had_committed_an_account,
    the_first_mail,
    the_first_account,
)


def record(name: str, root: Path) -> list[Any]:
    """Play a story in a directory; return what it did."""
    recorder = Recorder(root)
    alone = {function.__name__: function for function in ALONE}
    with recorder.recording():
        if name in alone:
            alone[name](root, recorder)
        else:
            world = World(root, recorder)
            world.rest()
            STORIES[name](world)
            world.presence.close()
            world.spool.close()
    return recorder.ops


NAMES = (*STORIES, *(function.__name__ for function in ALONE))
