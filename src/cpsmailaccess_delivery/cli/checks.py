"""What the doctor looks at.  Each check yields findings.

None changes what is there; two write a file of their own and remove it again, to see
whether that works.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..envelope import Envelope, Route
from ..errors import OutboxError, SecretUnavailable, VaultError
from ..interfaces import State
from ..journal_file import JournalFile
from ..outcome import Trouble
from ..parts import is_url
from ..password import resolve_secret
from ..spool.names import parse
from ..verdicts import DECIDED, mails_and_changes
from ..wording import age, counted
from .findings import Finding, Level
from .server_checks import advice_on, check_server

if TYPE_CHECKING:
    from ..outbox import Outbox

_MIB: Final = 1024 * 1024

#: Files whose access is looked at: of a million mails, the first tell.
_SAMPLE: Final = 10_000

#: Seconds that a mail may be due before that is strange, and before it is a failure.
_LATE, _STALLED = 600.0, 4 * 3600.0

#: Seconds between our clock and the file system's, or a mail's, that matter.
_DRIFT, _WRONG = 5.0, 60.0


#: What a person may do with a mail that waits for one.
_DECISIONS: Final = {
    State.HELD: "release or cancel",
    State.UNCLEAR: "release or cancel",
    State.REFUSED: "retry or cancel",
}


def examine(outbox: Outbox) -> Iterator[Finding]:
    """Yield the findings of all checks; a check that breaks is a finding, too."""
    for name, check in (_ON_A_SERVER if is_url(outbox.location) else _CHECKS).items():
        try:
            for level, text, advice in check(outbox):
                yield Finding(name, level, text, advice)
        except VaultError as error:  # which says what to do
            yield Finding(name, Level.FAIL, str(error))
        except (OutboxError, OSError) as error:
            if check is check_server:
                yield Finding(name, Level.FAIL, str(error), advice_on(error))
                return  # whatever else is asked of it, the answer is the same
            yield Finding(name, Level.FAIL, str(error), "see to the disk and its permissions")


_Findings = Iterator[tuple[Level, str, str]]


def _check_access(outbox: Outbox) -> _Findings:
    root = Path(outbox.location)
    owner = root.stat().st_uid
    if owner != os.geteuid():
        yield (
            Level.FAIL,
            f"{root} belongs to user {owner}, we are {os.geteuid()}",
            ("run cpsmail and the applications as one user"),
        )
    old = _is_old_queue(root)
    looked = open_ = foreign = readable = 0
    for path in islice(_walk(root), _SAMPLE):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # delivered meanwhile
        looked += 1
        if stat.S_ISLNK(status.st_mode):
            yield Level.FAIL, f"{path} is a symbolic link", "put the directory or file there itself"
        elif old and not status.st_mode & 0o022 and _is_old(path, root):
            readable += status.st_mode & 0o077 != 0
        elif status.st_mode & 0o077:
            open_ += 1
            if open_ == 1:
                yield (
                    Level.FAIL,
                    f"others may use {path} ({status.st_mode & 0o777:o})",
                    (f"chmod -R go= '{root}', and find out what changed it"),
                )
        foreign += status.st_uid != owner
    if open_ > 1:
        yield Level.FAIL, f"... and {open_ - 1} more files and directories", ""
    if foreign:
        yield Level.FAIL, f"{foreign} files belong to other users", f"chown -R them to user {owner}"
    if readable:
        yield (
            Level.WARN,
            f"others may read {readable} files and directories, as zope.sendmail makes them",
            f"chmod -R go= '{root}'",
        )
    if not open_ and not foreign and not readable:
        yield Level.OK, f"{looked} files and directories are ours alone", ""


def _check_key(outbox: Outbox) -> _Findings:
    key = outbox.keys.load()
    accounts = sum(1 for _ in outbox.vault.accounts())
    problems = dict.fromkeys(map(str, outbox.vault.problems()))  # of all accounts, often one
    if key is not None:
        yield Level.OK, f"key {key.id} from {key.origin}", ""
    elif not accounts and is_url(outbox.location):
        advice = "give all processes one, as CPSMAIL_KEY or the credential cpsmail.key"
        yield Level.WARN, "no key: without one, no account can be put", advice
    elif not accounts:
        yield Level.OK, "no key yet: the first account makes it", ""
    for problem in problems:
        yield Level.FAIL, problem, ""
    if accounts and not problems:
        yield Level.OK, f"it opens all accounts: {accounts}", ""
    if not accounts:
        yield Level.WARN, "there are no accounts", "cpsmail accounts set MAILBOX --host ..."
    former = outbox.keys.former()
    if former is None or key is None or former.id == key.id:
        return
    if needed := outbox.vault.needs(former):
        sealed = counted(needed, "account or change is", "accounts or changes are")
        text = f"{sealed} still sealed with the former key {former.id}"
        yield Level.WARN, text, "cpsmail accounts rekey"
    else:
        text = f"nothing needs the former key {former.id} from {former.origin}"
        yield Level.WARN, text, "take it away"


def _check_passwords(outbox: Outbox) -> _Findings:
    sources = [a for a in outbox.accounts.list() if a.password_from is not None]
    for account in sources:
        try:
            resolve_secret(account)
        except SecretUnavailable as error:
            yield Level.WARN, str(error), "it must be there for the process that delivers"
        else:
            yield Level.OK, f"account {account.mailbox}: {account.password_from} is there", ""


def _check_disk(outbox: Outbox) -> _Findings:
    space = os.statvfs(outbox.location)
    free = space.f_bavail * space.f_frsize
    level = Level.FAIL if free < 64 * _MIB else Level.WARN if free < 1024 * _MIB else Level.OK
    advice = "" if level is Level.OK else "make room: without it, no mail can be sent"
    yield level, f"{free // _MIB:,} MiB free", advice
    if space.f_files:  # some file systems do not count
        left = space.f_favail
        level = Level.FAIL if left < 1000 else Level.WARN if left < 50_000 else Level.OK
        advice = "" if level is Level.OK else "each mail is a file: remove small files elsewhere"
        yield level, f"{left:,} inodes free", advice


def _check_write(outbox: Outbox) -> _Findings:
    begun = time.monotonic()
    route = Route(mailbox="*")
    entry = outbox.spool.stage(Envelope("", ("doctor@localhost",), route), b"\n")
    outbox.spool.discard([entry])
    yield Level.OK, f"a mail can be written ({(time.monotonic() - begun) * 1000:.1f} ms)", ""


def _check_clock(outbox: Outbox) -> _Findings:
    probe = Path(outbox.location) / f".doctor-{os.getpid()}"
    try:
        probe.touch(mode=0o600)
        drift = probe.stat().st_mtime - time.time()
    finally:
        probe.unlink(missing_ok=True)
    if abs(drift) > _DRIFT:
        level = Level.FAIL if abs(drift) > _WRONG else Level.WARN
        advice = "synchronise the clocks of this host and its file server"
        yield level, f"the file system's clock is {drift:+.0f} s from ours", advice
    now = time.time()
    ahead = [e.staged_at - now for e in outbox.queue.entries() if e.staged_at - now > _WRONG]
    if ahead:
        mails = counted(len(ahead), "mail was", "mails were")
        text = f"{mails} queued in the future, by up to {age(max(ahead))}"
        yield Level.WARN, text, "was the clock put back? synchronise it (timedatectl)"
    elif abs(drift) <= _DRIFT:
        yield Level.OK, "clock and file system agree", ""


def _check_oldest(outbox: Outbox) -> _Findings:
    counts = outbox.queue.counts()
    if not counts.oldest:
        yield Level.OK, "no mail is due", ""
    else:
        waits = outbox.clock() - counts.oldest
        level = Level.FAIL if waits > _STALLED else Level.WARN if waits > _LATE else Level.OK
        advice = "" if level is Level.OK else "does `cpsmail run` run? `cpsmail queue` says more"
        yield level, f"the oldest mail that is due was queued {age(waits)} ago", advice
    for state in _DECISIONS:
        if number := counts.states.get(state, 0):
            advice = f"cpsmail queue --state {state}; then {_DECISIONS[state]}"
            one, many = f"mail is {state}, and waits", f"mails are {state}, and wait"
            yield Level.WARN, f"{counted(number, one, many)} for a person", advice


def _check_lanes(outbox: Outbox) -> _Findings:
    notes, now = outbox.spool.lane_notes(), outbox.clock()
    for note in notes.values():
        advice = (
            "is its relay up? it is tried again by itself"
            if note.trouble == Trouble.RELAY
            else f"cpsmail accounts check '{note.route}'"
        )
        text = f"{note.route} waits since {age(now - note.since)}: {note.reason}"
        yield Level.WARN, text, advice
    if not notes:
        yield Level.OK, "no lane waits", ""


def _check_leftovers(outbox: Outbox) -> _Findings:
    root = Path(outbox.location)
    mails, changes = len(outbox.spool.left_overs()), len(outbox.vault.left_overs())
    if mails:
        advice = "`cpsmail run` and `drain` remove them or hold them"
        text = counted(mails, "file of a mail in tmp/", "files of mails in tmp/")
        yield Level.WARN, f"processes died and left {text}", advice
    if changes:
        advice = "put these accounts again: `cpsmail accounts list` shows what is in force"
        text = counted(changes, "change of an account", "changes of accounts")
        yield Level.WARN, f"processes died and left {text}", advice
    others = list(_left_by_zope_sendmail(root))
    yield from others
    if not mails and not changes and not others:
        yield Level.OK, "dead processes left nothing", ""


def _check_doubts(outbox: Outbox) -> _Findings:
    mails, changes = len(outbox.spool.doubts()), len(outbox.vault.doubts())
    if mails or changes:
        yield (
            Level.WARN,
            f"in doubt: {mails_and_changes(mails, changes)}; a witness can tell",
            "a processor that has the witness (the application's, with its database) asks it",
        )
    counts = outbox.journal.counts(0.0)
    committed, aborted, doubtful = (counts.get(kind, 0) for kind in DECIDED.values())
    if committed or aborted or doubtful:
        yield (
            Level.OK,
            f"recipients of mails that crashes left in doubt: {committed} committed, {aborted} not"
            f" committed, {doubtful} held because nobody knew",
            "",
        )
    elif not mails and not changes:
        yield Level.OK, "no crash has left a doubt", ""


def _left_by_zope_sendmail(root: Path) -> _Findings:
    hidden = [name for folder in ("new", "cur") for name in _names(root / folder)]
    for prefix, advice in (
        (".sending-", "when no zope.sendmail processor runs any more, remove them"),
        (
            ".rejected-",
            "it gave up on them: remove them, or rename them without the prefix to send",
        ),
    ):
        if number := sum(name.startswith(prefix) for name in hidden):
            yield Level.WARN, f"{number} {prefix}* of zope.sendmail in new/ are left alone", advice


def _is_old_queue(root: Path) -> bool:
    """Tell whether zope.sendmail made this Maildir: by umask; we make all but the root 0700."""
    try:
        return all((root / name).lstat().st_mode & 0o055 for name in ("new", "cur", "tmp"))
    except FileNotFoundError:
        return False


def _is_old(path: Path, root: Path) -> bool:
    """Tell whether zope.sendmail made a file or directory of such a queue."""
    folders = [root / name for name in ("new", "cur", "tmp")]
    if path == root or path in folders:
        return True
    if path.parent not in folders or ",P=" in path.name:
        return False
    entry = parse(path.name, path.parent.name)
    return entry is None or not entry.lane


def _check_processes(outbox: Outbox) -> _Findings:
    presence = outbox.presence
    names = (name for name in _names(Path(outbox.location) / "presence") if name != presence.token)
    others = sum(presence.is_alive(name) for name in names if not name.startswith("."))
    deliver = sum(not each.here for each in presence.deliverers())
    if deliver:
        text = counted(deliver, "process delivers", "processes deliver")
        yield Level.OK, f"{text}; {counted(others, 'has', 'have')} the outbox open", ""
    else:
        text = counted(others, "other process has", "other processes have")
        yield (
            Level.WARN,
            f"{text} the outbox open: nothing delivers",
            "start `cpsmail run`, or an application with a processor",
        )


def _check_journal(outbox: Outbox) -> _Findings:
    try:
        events = sum(JournalFile(outbox.journal.path).count(0.0).values())
    except sqlite3.Error as error:
        yield Level.FAIL, f"{outbox.journal.path}: {error}", "remove it: no mail is affected"
    else:
        yield Level.OK, counted(events, "event", "events"), ""


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _walk(root: Path) -> Iterator[Path]:
    """Yield the outbox and what is in it, breadth first: directories before mails."""
    yield root
    level = [root]
    while level:
        below = []
        for directory in level:
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))
                    yield Path(entry.path)
        for directory in level:
            for entry in os.scandir(directory):
                if not entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)
        level = below


_CHECKS: Final[dict[str, Callable[[Outbox], _Findings]]] = {
    "access": _check_access,
    "key": _check_key,
    "passwords": _check_passwords,
    "disk": _check_disk,
    "write": _check_write,
    "clock": _check_clock,
    "queue": _check_oldest,
    "lanes": _check_lanes,
    "leftovers": _check_leftovers,
    "doubts": _check_doubts,
    "processes": _check_processes,
    "journal": _check_journal,
}

#: Of an outbox that a URL names.
_ON_A_SERVER: Final[dict[str, Callable[[Outbox], _Findings]]] = {
    "server": check_server,
    "key": _check_key,
    "passwords": _check_passwords,
    "queue": _check_oldest,
    "lanes": _check_lanes,
}
