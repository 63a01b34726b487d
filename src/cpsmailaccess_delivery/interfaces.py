"""The contracts, said once.  Implementations say "See `ISpool`".

Life of a mail in the spool::

    stage -> prepare -> publish -> queued -> claim -> settle -> (gone: accepted)
      |         |                    ^         |         |
      +-discard-+                    |      release      +-> deferred -> (due) queued
                                     |         |         +-> held, unclear, refused
                                  requeue <----+---------------+

`stage`, `prepare` and `publish` are the two phases of the transaction: what can fail
has failed when `prepare` returns; `publish` is a rename.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from zope.interface import Attribute, Interface
from zope.sendmail.interfaces import IMailDelivery, IQueuedMailDelivery

if TYPE_CHECKING:
    from .account import Account
    from .envelope import Envelope

__all__ = [
    "NORMAL_PRIORITY",
    "Entry",
    "IAccountEvent",
    "IAccountPaused",
    "IAccountResumed",
    "IAccountStore",
    "IAccounts",
    "IJournal",
    "ILease",
    "IMailAccepted",
    "IMailDeferred",
    "IMailDelivery",
    "IMailEvent",
    "IMailQueued",
    "IMailRefused",
    "IMailUnclear",
    "IMailboxDelivery",
    "IOutbox",
    "IPresence",
    "IQueueProcessor",
    "IQueuedMailDelivery",
    "ISendingPolicy",
    "ISpool",
    "ITransactionWitness",
    "ITransit",
    "IWatch",
    "KeyNote",
    "LaneNote",
    "Outcome",
    "Record",
    "Settlement",
    "State",
    "SweepReport",
    "Verdict",
]


class State(StrEnum):
    """What may be said of a mail, or of one of its recipients.

    In the spool a mail is ``queued``, ``deferred``, ``held``, ``unclear`` or ``refused``;
    ``accepted`` and ``cancelled`` ones are gone from it and live on in the journal.
    """

    QUEUED = "queued"
    DEFERRED = "deferred"
    HELD = "held"
    UNCLEAR = "unclear"
    REFUSED = "refused"
    ACCEPTED = "accepted"
    CANCELLED = "cancelled"


class Outcome(NamedTuple):
    """What became of one recipient in the last attempt that concerned it.

    ``state``: queued (not tried yet), accepted, deferred, refused or unclear.
    ``reply``: the relay's words, or ours when there was no reply; hostile text.
    ``at``: seconds since the epoch.
    ``doubts``: how many attempts have ended unclear: the relay may have taken so many copies.
    ``held``: unclear, and not tried again before a person has decided.
    """

    state: State
    reply: str = ""
    at: float = 0.0
    doubts: int = 0
    held: bool = False

    def __str__(self) -> str:
        return f"{self.state}: {self.reply}" if self.reply else str(self.state)


#: Of a mail for which nobody asked for another one.
NORMAL_PRIORITY: Final = 5


class Entry(NamedTuple):
    """One mail in the spool, as a directory listing shows it: nothing was opened.

    ``id``: names the mail for ever, whatever its state; ids sort by time of `stage`.
    ``lane``: `envelope.lane_key` of its route; "" for a file we did not name.
    ``due``: seconds since the epoch; 0: at once.  ``attempts``: how many were made.
    ``priority``: 0 to 9; within a lane, higher ones go first.
    ``expires``: seconds since the epoch: not sent from then on; 0: no limit.
    """

    id: str
    lane: str
    state: State = State.QUEUED
    due: float = 0.0
    attempts: int = 0
    priority: int = NORMAL_PRIORITY
    expires: float = 0.0

    @property
    def staged_at(self) -> float:
        """Seconds since the epoch, read from the id; 0 when it does not begin with a time."""
        seconds = self.id.partition(".")[0]
        return float(seconds) if seconds.isdecimal() else 0.0


class Cancel(NamedTuple):
    """Of a mail that a transaction cancels whose end nobody has seen: what it was before.

    ``token``: of the transaction.  ``earlier``: of another one, of which the same is true.
    """

    token: str
    state: State
    due: float
    reason: str
    earlier: Cancel | None = None


class Doubt(NamedTuple):
    """A mail in doubt of which a witness can tell.

    ``token``: of the transaction.  ``cancels``: whether that takes the mail back; else it sends it.
    """

    entry: Entry
    token: str
    cancels: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """One mail in the spool, opened: for people and for `status`."""

    entry: Entry
    envelope: Envelope
    outcomes: Mapping[str, Outcome]  # of those recipients that were tried
    size: int  # bytes of the message
    reason: str = ""  # why it is held
    cancel: Cancel | None = None  # in doubt: whether it was cancelled, a witness can tell


@dataclass(frozen=True, slots=True)
class Settlement:
    """What an attempt left: see `ILease.settle`."""

    state: State  # of the mail: ACCEPTED or CANCELLED (gone), DEFERRED, HELD, UNCLEAR or REFUSED
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)  # all that are known
    due: float = 0.0  # seconds since the epoch, when DEFERRED
    attempts: int = 0
    reason: str = ""
    keep: bool = True  # False: it leaves the spool, whatever its state


@dataclass(frozen=True, slots=True)
class LaneNote:
    """Why a whole lane waits: its relay or its account is in trouble.

    ``route``: mailbox or relay.  ``trouble``: account or relay.  ``until``: seconds since
    the epoch of the next probe.  ``version``: `IAccountStore.version` when it was written.
    ``told``: whether the owner of the mailbox was.  ``paused``: whether journal and
    subscribers were told that the account is.
    """

    route: str
    trouble: str
    reason: str
    since: float
    until: float
    failures: int = 1
    version: str = ""
    told: bool = False
    paused: bool = False


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What `ISpool.sweep` did: ids of entries."""

    removed: tuple[str, ...] = ()  # staged by a dead process, not prepared: cannot be committed
    held: tuple[str, ...] = ()  # prepared by a dead process: in doubt


class Verdict(StrEnum):
    """What a witness says of a transaction that nobody saw end."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


class ITransactionWitness(Interface):
    """Knows, from a database that took part, whether a transaction has committed.

    Asked about what a crash between vote and finish left in doubt.  It never guesses: where a
    transaction may have committed without leaving a trace in this database, absence of the
    trace says nothing.
    """

    def mark(transaction) -> str:
        """Return where a look for this transaction has to begin, to be part of its token.

        Letters and digits, or "".  Called when the first change joins, long before the commit.
        """

    def expects(transaction) -> bool:
        """Tell whether this transaction leaves a trace here if, and only if, it commits.

        Called at the end of the first phase, when the database has been told what to write.
        """

    def ask(tokens: Sequence[str]) -> Mapping[str, Verdict]:
        """Return what became of transactions whose trace was expected, by token.

        Their processes are dead.  May take its time; raises anything when the database
        cannot be asked now: it is asked again later.
        """


class ISpool(Interface):
    """The durable store of mails.  Thread-safe.  Raises `SpoolError` and its children."""

    location = Attribute("Where it is: a path or URL without secrets (str)")
    paces = Attribute(
        "What lanes have spent of their limits per minute, see `limits.Pace`, by lane key: seconds"
        " since the epoch, MutableMapping[str, float]"
    )

    def stage(envelope: Envelope, message: bytes) -> Entry:
        """Write a mail that nobody sees yet.  Not durable.  Leaves nothing when it fails.

        The entry is due and expires when the envelope says, and has its priority.
        """

    def prepare(entries: Sequence[Entry], *, witnessed: bool = False, alone: bool = False) -> None:
        """Make staged mails durable: whatever crashes now, they are published or in doubt.

        `witnessed`: a witness will know whether their transaction has committed.  `alone`: no
        transaction decides about them; a crash leaves them published or removed.  All the
        fsyncs of one transaction happen here.  When it raises, every one of them can still be
        discarded.  Raises `KeyTaken`: another mail has the same `Envelope.key`, or takes it
        right now.
        """

    def publish(entries: Sequence[Entry]) -> None:
        """Make prepared mails visible to processors, durably.  Never raises: it logs."""

    def discard(entries: Sequence[Entry]) -> None:
        """Remove staged or prepared mails.  Never raises; unknown ones are ignored."""

    def key_holder(key: str) -> str | None:
        """Return the Message-Id of the mail that was published with this key, or None.

        For 30 days, also when the mail is gone; but that of a mail which was cancelled before
        its first attempt is free again.  Raises `KeyTaken`: whether the mail stays, a witness
        has still to tell.
        """

    def scan() -> Iterator[Entry]:
        """Yield the visible entries, the oldest first, without opening one."""

    def watch() -> IWatch:
        """Return a watch that tells of entries that become visible or change state."""

    def serves(lane: str) -> bool:
        """Tell whether mails of this lane leave from here: else another worker has it now."""

    def claim(entry: Entry) -> ILease | None:
        """Take the exclusive lease of an entry, or None: gone, changed or leased elsewhere.

        An entry whose private block cannot be read is set aside as held; None then too.
        """

    def note_lane(key: str, note: LaneNote | None) -> None:
        """Keep, or forget, why a lane waits.  Durable enough to survive a restart."""

    def lane_note(key: str) -> LaneNote | None:
        """Return why this lane waits, or None."""

    def lane_notes() -> dict[str, LaneNote]:
        """Return why lanes wait, by lane key."""

    def leased(entry: Entry) -> bool:
        """Tell whether a living processor holds the lease of this entry."""

    def find(message_id: str) -> list[Record]:
        """Return the mails with this Message-Id (no angle brackets): often one, or none."""

    def holding(message_ids: Collection[str]) -> set[str]:
        """Return those of these Message-Ids under which we have a mail; nothing is opened."""

    def look_up(entry_id: str) -> Entry:
        """Return the entry of an id that a person typed.  Raises `NoSuchEntry`.

        Lists the spool.  So do the next five, once, when the mail has changed since its
        entry was told: what they do, they do to the mail as it is now.
        """

    def load(entry: Entry) -> Record:
        """Return one mail as it is now.  Raises `NoSuchEntry`, `InvalidEnvelope`."""

    def read_message(entry: Entry) -> bytes:
        """Return the message of one mail as it is stored.

        Raises `NoSuchEntry`, `InvalidEnvelope`.
        """

    def requeue(entry: Entry, *, unclear: bool = False) -> Entry:
        """Make one mail due now: retry a deferred one, release a held or unclear one.

        `unclear`: those of its recipients that wait for a person are tried again, too.
        Raises `NoSuchEntry`, `EntryBusy`.
        """

    def hold(entry: Entry, reason: str) -> Entry:
        """Set one mail aside until it is requeued.  Raises `NoSuchEntry`, `EntryBusy`."""

    def cancel(entry: Entry) -> Record:
        """Remove one mail that is not being delivered.  Raises `NoSuchEntry`, `EntryBusy`."""

    def refused_before(when: float) -> Iterator[Entry]:
        """Yield the refused mails that were settled before a time (epoch seconds).

        Without opening one.
        """

    def sweep() -> SweepReport:
        """Tidy what dead processes left: see `SweepReport`.  Safe beside living ones."""

    def left_overs() -> Sequence[str]:
        """Return the names of what dead processes left, for the doctor: `sweep` is due."""

    def doubts() -> Sequence[Doubt]:
        """Return the mails that dead processes left held and a witness can tell of."""

    def resolve(doubt: Doubt, verdict: Verdict) -> Record | None:
        """Let the verdict come true, durably; return what the mail was.

        ::

                       sends it   cancels it
            COMMITTED  queued     removed
            ABORTED    removed    what it was before
            UNKNOWN    held, for a person

        None: somebody else has decided already.
        """

    def sync() -> None:
        """Make what leases removed safe against a power loss; cheap when nothing was.

        To be called now and then while settling: what was accepted since the last call
        may be sent again after a power loss (never after the death of a process).
        """

    def close() -> None:
        """Give back what the spool holds in this process.  Twice is fine."""


class ILease(Interface):
    """The exclusive claim on one entry.  It dies with its process."""

    entry = Attribute("Entry")
    envelope = Attribute("Envelope")
    message = Attribute("The message as it is stored, without the private block (bytes), or b''")
    outcomes = Attribute("Outcomes of earlier attempts: Mapping[str, Outcome]")

    def settle(settlement: Settlement) -> Entry | None:
        """Record what an attempt left, and end the lease.

        ACCEPTED, CANCELLED and what is not kept are removed, durably with the next
        `ISpool.sync`, which also frees the key of what was CANCELLED before its first attempt.
        Else outcomes of recipients that must not be tried again are durable when this returns.
        Returns the entry as it is now, or None.  When it raises `SpoolError` the lease
        is still held: settle again later, or release.
        """

    def forget_message() -> None:
        """Keep ``message`` in memory no longer: it is b"" from now on."""

    def read_message() -> bytes:
        """Return the message as it is stored, also after `forget_message`.

        Only while the lease is held, in any thread.  Raises `SpoolError`.
        """

    def set_aside(reason: str, token: str = "") -> None:
        """Hold the mail, durably, and keep the lease: so it stays if this process dies.

        `token`: of the transaction that cancels the mail, if a witness will know what became of
        it: when this process dies, the mail is one of `ISpool.doubts`.
        ``entry`` is the held one from now on.  Raises `SpoolError`.
        """

    def release() -> None:
        """End the lease without a trace: the mail is as it was.  Twice is fine."""

    def leave() -> None:
        """End the lease as the death of the process would: what was set aside stays so."""


class ISettlesTogether(Interface):
    """What a spool offers as well to which every change is a way to a server and back."""

    def settle_accepted(leases: Sequence[ILease]) -> Sequence[ILease]:
        """Remove, at once, mails that their relays took for all; return those to settle singly.

        Somebody may have locked them, or their leases were lost.  When it raises `SpoolError` every
        lease is still held.
        """


class KeyNote(NamedTuple):
    """An idempotency key that was committed, without the key itself.

    ``digest``: `spool.keys.digest_of` the key.  ``entry``: id of the mail that has it, or had.
    ``until``: seconds since the epoch; nobody else commits it before.
    """

    digest: str
    entry: str
    message_id: str
    until: float


class ITransit(Interface):
    """What mails go through when they come from another spool; see `moving`.

    ::

        arrive -> admit -> as they were there, under the same ids
          +-- dismiss

    A copy that has arrived is durable, and nobody sees it.  `admit` takes it away in the step that
    makes the mail visible: so whether the copy is there tells whether the mail was admitted.
    """

    def place() -> tuple[object, ...]:
        """Return what tells this spool from every other, by whatever name it is opened.

        Raises `SpoolError`.
        """

    def arrive(mails: Sequence[tuple[Record, bytes]], origin: str) -> Collection[str]:
        """Keep copies, durably; one of the same mail that was there is replaced.

        `origin`: 16 hexadecimal digits that stand for the spool that they come from.
        Returns the ids that were taken: not those of visible mails.  Raises `SpoolError`.
        """

    def arrived(origin: str) -> Collection[str]:
        """Return the ids of the copies that came from there.  Raises `SpoolError`."""

    def admit(ids: Collection[str]) -> None:
        """Make mails visible, durably; of an id without a copy, nothing.  Raises `SpoolError`."""

    def dismiss(ids: Collection[str]) -> None:
        """Forget copies.  Raises `SpoolError`."""

    def key_notes() -> Iterator[KeyNote]:
        """Yield the keys that were committed.  Raises `SpoolError`."""

    def keep_keys(notes: Iterable[KeyNote]) -> None:
        """Keep keys, durably; one that somebody has stays his.  Raises `SpoolError`."""

    def close() -> None:
        """Let others move mails to this spool.  Twice is fine; all the rest works again."""


class IPresence(Interface):
    """The processes that deliver, as others see them."""

    def delivers() -> None:
        """Say that a processor runs in this process, until as many have said `rests`.

        Never raises: it is for people only.
        """

    def rests() -> None:
        """Take one `delivers` back.  Never raises."""

    def deliverers() -> Sequence[object]:
        """Return the living ones, `spool.presence.Deliverer`, the oldest first."""

    def close() -> None:
        """Give back what it holds.  Twice is fine."""


class IWatch(Interface):
    """Tells a processor what changed.  The rim adds `fileno` to its event loop."""

    def fileno() -> int:
        """File descriptor that is readable when `read` has something to tell."""

    def read() -> Iterable[Entry] | None:
        """Return the entries that changed since the last call; None: unknown, `scan` again."""

    def close() -> None:
        """Stop watching.  Twice is fine."""


class IAccountStore(Interface):
    """Where accounts are kept, secrets sealed (the vault).  Knows no transaction.

    Changes come in the same two phases as mails.
    """

    location = Attribute("Where it is (str)")

    def get(mailbox: str) -> Account:
        """Return the account with its secret opened.

        Raises `NoSuchAccount`, `WrongKey`, `BrokenSeal`.
        """

    def current(mailbox: str) -> tuple[str, Account]:
        """Return what `version` and `get` say at the same moment.  Raises as `get`."""

    def peek(mailbox: str) -> Account | None:
        """Return the account, a password as `account.HIDDEN`, or None: for routes and lists.

        Needs no key.  Raises `BrokenSeal` for a file that was damaged.
        """

    def version(mailbox: str) -> str:
        """Return a text that differs after every change of this account; "" for none."""

    def accounts() -> Iterator[Account]:
        """Yield all accounts as `peek` gives them, in no order; what cannot be read is logged."""

    def stage(mailbox: str, account: Account | None, transaction: str = "") -> str:
        """Write a change (None: delete) that nobody sees yet; return its token.

        `transaction`: the token of that, for a witness.
        """

    def prepare(tokens: Sequence[str], *, witnessed: bool = False) -> None:
        """Make staged changes durable.  `witnessed`: see `ISpool.prepare`."""

    def publish(tokens: Sequence[str]) -> None:
        """Make prepared changes visible, in this order.  Never raises: it logs."""

    def discard(tokens: Sequence[str]) -> None:
        """Forget staged changes.  Never raises."""

    def problems() -> Iterator[Exception]:
        """Open every account with the key; yield what is wrong, for the doctor."""

    def sweep() -> tuple[str, ...]:
        """Remove changes staged by dead processes; return their mailboxes.

        Those that a witness can tell of are left for `resolve`.
        """

    def doubts() -> Sequence[tuple[str, str]]:
        """Return (token of a change, token of its transaction) of those; the oldest first."""

    def resolve(change: str, verdict: Verdict) -> str:
        """Publish or remove one of them; return its mailbox, "" when it is gone.

        A change that a later one has overtaken is removed, whatever became of it.
        """

    def left_overs() -> Sequence[str]:
        """Return the names of changes staged by dead processes, for the doctor."""

    def watch() -> IWatch:
        """Return a watch that tells no entries: `read` gives None when something changed."""


class IAccounts(Interface):
    """The accounts as an application sees them: changes follow the transaction."""

    def put(account: Account) -> None:
        """Add or replace the account of ``account.mailbox``."""

    def get(mailbox: str) -> Account:
        """Return the account of exactly this mailbox, its password as `account.HIDDEN`.

        Put back with it, it keeps the stored password.  Raises `NoSuchAccount`.
        """

    def delete(mailbox: str) -> None:
        """Remove the account of exactly this mailbox.  Raises `NoSuchAccount`."""

    def list() -> list[Account]:
        """Return all accounts, sorted by mailbox, as `get` does."""

    def find(sender: str) -> Account:
        """Return the account that serves a sender: exact, ``@domain``, ``*``; as `get` does.

        Raises `UnknownMailbox`, `InvalidAddress`.
        """

    def find_once(sender: str) -> Account:
        """As `find`, but the store is asked once: later in the transaction it is the same.

        What the transaction changes itself is seen.  For who takes part in it: a read alone
        would let a transaction begin that nobody ends.  Raises `NoTransaction` in explicit mode,
        and as `find` does.
        """


class IMailboxDelivery(IQueuedMailDelivery):
    """The delivery utility."""

    def send(
        fromaddr,
        toaddrs,
        message,
        *,
        mailbox=None,
        hostname=None,
        port=None,
        not_before=None,
        undo=None,
        expires=None,
        priority=None,
        idempotency_key=None,
        notify=None,
        ret=None,
    ):
        """Queue a mail that is delivered when the transaction commits.

        `fromaddr`: address of the sender; "" or None with ``mailbox``: the null
        reverse-path (RFC 5321 section 4.5.5).  `toaddrs`: sequence of addresses.
        `message`: bytes, str or `email.message.Message`.
        `mailbox`: route as this mailbox instead of by `fromaddr`.
        `hostname`, `port`: a relay without login instead of an account.
        `not_before`: seconds since the epoch, or an aware datetime: not sent earlier.
        `undo`: seconds from now in which it is held back, and may be cancelled; the later
        of both counts.  `expires`: as `not_before`; not tried any more from then on.
        `priority`: "low" (2), "normal" (5), "high" (8) or 0 to 9; of the mails that leave
        through one account, higher ones go first.
        `idempotency_key`: a text; with one that was committed in the last 30 days nothing is
        queued, and that mail's Message-Id is returned.  When two transactions commit one at the
        same time, the later one fails with `KeyTaken`, a `TransientError`; so does this while a
        witness has still to tell whether that mail stays.
        `notify`: "never", or of what the sender is told: some of "success", "failure" and
        "delay", as a sequence or with commas between them; when nothing is said, of the last
        two.  `ret`: "full" or "headers": what of a mail that failed is returned to him.  Relays
        that offer DSN are asked for the same (RFC 3461).

        Returns the Message-Id without angle brackets.  Raises `InvalidAddress`,
        `NoRecipients`, `UnknownMailbox`, `InvalidMessage`, `InvalidOption`,
        `MessageTooLarge`, `NotQueued`, all of them `SendError` and
        `smtplib.SMTPException`; what `ISendingPolicy` does; in the explicit mode of transaction
        its `NoTransaction`.  Nothing is queued then.
        """

    def cancel(message_id):
        """Take a mail back, when the transaction commits, if it is not delivered yet.

        Until the end of the transaction it may still be delivered; what is cancelled before
        its commit, in the same transaction, never is.  Raises `NoSuchEntry`: unknown, or
        delivered to all; `EntryBusy`: being delivered right now, also from the commit.
        """

    def bind(mailbox):
        """Return an `IMailDelivery` whose `send` routes as this mailbox.

        The account is looked up at each `send`, so it may be put later.  Raises
        `UnknownMailbox` for what cannot be a mailbox.
        """


class ISendingPolicy(Interface):
    """Who may send as which mailbox: a utility, asked at each `IMailboxDelivery.send`.

    Without one, whoever can call `send` may send as any mailbox.
    """

    def check(account, queue_path):
        """Raise when the code that runs now may not send as this account.

        `account`: an `Account` without its password; None: a relay without login.
        `queue_path`: of the delivery utility (str).
        Asked of the account that a mail leaves through, however it was chosen, and of those,
        of exactly an address or of its domain, that serve the envelope's sender and the
        addresses in From, Sender and their Resent- forms (RFC 5322 section 3.6.2).
        What it raises comes out of `send`, and nothing is queued.
        """


class IJournal(Interface):
    """The searchable log of what happened to each mail.  Deletable without harm.

    It has envelopes and the words of relays, and nothing of a message, not its subject either.
    """

    trouble = Attribute("Why it could not be written last time (str)")

    def record(event) -> None:
        """Take a `journal.Event`; written soon, in a batch.  Never raises, never blocks."""

    def recover() -> int:
        """Write what processes that were killed had recorded and not written; return how many.

        Never raises.
        """

    def events(*, message_id=None, address=None, limit=1000):
        """Return the newest `limit` events of one Message-Id or address, the oldest first."""

    def last_outcomes(message_id: str) -> dict[str, Outcome]:
        """Return the last outcome of each recipient, as far as the journal goes back."""

    def totals(since: float, *, by: str) -> list[tuple[str, str, int]]:
        """Return (mailbox or relay, kind, number of events) since a time (epoch seconds).

        `by`: ``mailbox`` or ``relay``.
        """

    def counts(since: float) -> dict[str, int]:
        """Return how many events of each kind there were since a time (epoch seconds)."""

    def series(since: float, step: float) -> list[tuple[int, str, int]]:
        """Return (number of the step, kind, number of events) since a time (epoch seconds).

        `step`: seconds; steps are numbered from 0 and end with now.
        """

    def flush() -> None:
        """Return when what was recorded is written."""

    def close() -> None:
        """Flush and close.  Twice is fine."""


class IMailEvent(Interface):
    """Something has happened to a mail: for subscribers of zope.event.

    Told after the fact, in a thread of its own of the process in which it happened.
    """

    at = Attribute("When: seconds since the epoch")
    id = Attribute("Id of the entry in the spool (str)")
    message_id = Attribute("Without angle brackets (str)")
    mailbox = Attribute("Its route: a mailbox, or a relay without login as host:port (str)")
    sender = Attribute("Address of the sender; empty: the null reverse-path (str)")
    recipients = Attribute("Those whom the event concerns: Mapping[str, Outcome]")


class IMailQueued(IMailEvent):
    """A mail was committed."""


class IMailAccepted(IMailEvent):
    """The relay has taken the mail for these recipients, or a person says so."""


class IMailDeferred(IMailEvent):
    """An attempt has ended; these recipients are tried again."""


class IMailRefused(IMailEvent):
    """For good: the relay, a person, or time has refused these recipients."""


class IMailUnclear(IMailEvent):
    """The connection died before the reply to the end of data: see `Outcome.held`."""


class IAccountEvent(Interface):
    """Something has happened to all mails of an account, or of a relay without login."""

    at = Attribute("When: seconds since the epoch")
    mailbox = Attribute("The mailbox, or the relay without login as host:port (str)")
    relay = Attribute("Host and port (str)")
    reason = Attribute("Why, in words; may quote the relay, so hostile text (str)")


class IAccountPaused(IAccountEvent):
    """Its mails wait: the account must be mended, or its relay was not reached repeatedly.

    Told once for each trouble, not for each probe.
    """


class IAccountResumed(IAccountEvent):
    """Its mails are sent again."""


class IQueueProcessor(Interface):
    """Delivers what is in a spool: a `threading.Thread`."""

    summary = Attribute("`scheduler.Summary` of what it has done since it was started")

    def start() -> None:
        """Start the thread; once."""

    def run(forever: bool = True) -> object:
        """Deliver in the calling thread, ``forever=False``: once what is due.

        Returns the summary.
        """

    def stop(timeout: float = 30.0) -> bool:
        """Stop: finish what is past the end of data, give back the rest.

        After `timeout` seconds connections are dropped.  Returns whether it has ended.
        """

    def abort() -> None:
        """Drop the connections now."""

    def look() -> None:
        """Look now whether a person has ended the wait of a lane, not in half a minute."""


class IOutbox(Interface):
    """An outbox; see `outbox.Outbox`."""

    location = Attribute("Where the spool is (str)")
    accounts = Attribute("IAccounts")
    delivery = Attribute("IMailboxDelivery")
    queue = Attribute("`queue.Queue`: for people who look and steer")
    spool = Attribute("ISpool")
    vault = Attribute("IAccountStore")
    journal = Attribute("IJournal")
    keys = Attribute("`key.KeySource` of the vault")
    presence = Attribute("IPresence of this process")
    witness = Attribute("ITransactionWitness, or None: what is in doubt is held")
    clock = Attribute("The time that rules: Callable[[], float], seconds since the epoch")
    helo_name = Attribute("How it introduces itself to relays (str)")
    processors = Attribute("Those that were made here: tuple[IQueueProcessor, ...]")

    def processor(*, unclear: str | None = None) -> IQueueProcessor:
        """Return a processor, not started yet.  Raises `OutboxClosed`."""

    def resume(lane: str) -> None:
        """Let a lane that waits be tried now.  Raises `SpoolError`."""

    def look() -> None:
        """Let the processors of this process look now at what was decided on lanes."""

    def status(message_id: str) -> object:
        """Return a `status.Status`.  Raises `NoSuchEntry`."""

    def close() -> None:
        """Stop its processors and give back what it holds.  Twice is fine."""
