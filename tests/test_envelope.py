"""The private block: what is written reads back, and nothing else does."""

from __future__ import annotations

import pytest
import transaction
from hypothesis import assume, example, given
from hypothesis import strategies as st
from zope.sendmail.delivery import QueuedMailDelivery
from zope.sendmail.queue import QueueProcessorThread

from cpsmailaccess_delivery.dsn import NOTIFIES, RETURNS
from cpsmailaccess_delivery.envelope import (
    Envelope,
    Route,
    digest,
    format_block,
    lane_key,
    parse_block,
)
from cpsmailaccess_delivery.errors import InvalidEnvelope, SpoolError

ROUTE = Route("alice@example.org", "smtp.example.org", 587)
ENVELOPE = Envelope(
    sender="alice@example.org",
    recipients=("bob@example.net", "carol@example.net"),
    route=ROUTE,
    message_id="1.2@example.org",
    token="4f0c",
)
BLOCK = b"""\
X-Zope-Envelope: 1
X-Zope-From: alice@example.org
X-Zope-To: bob@example.net, carol@example.net
X-Zope-Hostname: smtp.example.org
X-Zope-Port: 587
X-Zope-Mailbox: alice@example.org
X-Zope-Message-Id: 1.2@example.org
X-Zope-Token: 4f0c

"""

WISHES = b"""\
X-Zope-Not-Before: 1732369200.25
X-Zope-Expires: 1732455600
X-Zope-Priority: 8
X-Zope-Key: k 1
X-Zope-Notify: success,delay
X-Zope-Ret: headers
"""

# Any line of text: more than addresses, so that the framing stands by itself.
lines = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x7f", min_codepoint=32),
    max_size=30,
).map(str.strip)
quoted = st.text(alphabet='ab, ;:.<>@\\"', max_size=10).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"@example.org'
)
atoms = st.text(alphabet="abcé日.-", min_size=1, max_size=10).map(lambda text: text + "@x.org")
recipients = st.lists(quoted | atoms, min_size=1, max_size=6).map(tuple)
routes = st.builds(
    Route, mailbox=lines.filter(bool), host=lines, port=st.integers(0, 65535)
) | st.builds(Route, host=lines.filter(bool), port=st.integers(1, 65535))
times = st.floats(0, 9e10).map(lambda seconds: round(seconds, 3))
envelopes = st.builds(
    Envelope,
    sender=lines,
    recipients=recipients,
    route=routes,
    message_id=lines,
    token=lines,
    not_before=times,
    expires=times,
    priority=st.integers(0, 9),
    key=lines,
    notify=st.sampled_from(["", *NOTIFIES]),
    ret=st.sampled_from(["", *RETURNS]),
)


def test_as_designed():
    assert format_block(ENVELOPE) == BLOCK
    assert parse_block(BLOCK + b"Subject: x\n\ny") == (ENVELOPE, len(BLOCK))


@given(envelopes, st.binary(max_size=80))
@example(ENVELOPE, b"\n\n")
@example(ENVELOPE, b"X-Zope-Hostname: evil.example\nX-Zope-Port: 1\n\nX-Zope-To: eve@example.com")
def test_round_trip(envelope, message):
    block = format_block(envelope)
    assert parse_block(block + message) == (envelope, len(block))


@given(
    st.builds(
        Envelope,
        lines,
        st.lists(lines, max_size=4).map(tuple),
        routes,
        lines,
        lines,
        st.floats() | times,
        st.floats() | times,
        st.integers(-1, 11),
        lines,
        st.sampled_from(["", *NOTIFIES]) | lines,
        st.sampled_from(["", *RETURNS]) | lines,
    )
)
@example(Envelope("", ('a"b', 'c"d'), ROUTE))
@example(Envelope("", ("a, b",), ROUTE))
@example(Envelope("", ('"a', 'b"'), ROUTE))
@example(Envelope("", ("a,", "b"), ROUTE))
@example(Envelope("", ('"\\', "x"), ROUTE))
def test_writer_writes_what_reads_back_or_nothing(envelope):
    try:
        block = format_block(envelope)
    except InvalidEnvelope:
        return
    assert parse_block(block) == (envelope, len(block))


FIELDS = ["sender", "recipients", "mailbox", "host", "message_id", "token"]


def with_value(field: str, value: str) -> Envelope:
    values = dict.fromkeys(FIELDS, "x@example.org")
    values[field] = value
    return Envelope(
        sender=values["sender"],
        recipients=("a@example.org", values["recipients"], "z@example.org"),
        route=Route(values["mailbox"], values["host"], 25),
        message_id=values["message_id"],
        token=values["token"],
    )


@pytest.mark.parametrize("field", FIELDS)
@given(lines, st.sampled_from("\r\n\0\x01\t\x7f"), lines)
def test_writer_refuses_control_characters(field, before, character, after):
    with pytest.raises(InvalidEnvelope):
        format_block(with_value(field, before + character + after))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [" a@b.org", "a@b.org ", "a@b.org\u3000", "\ud800@b.org"])
def test_writer_refuses(field, value):
    with pytest.raises(InvalidEnvelope):
        # between other recipients, outer space is not at the end of the line
        format_block(with_value(field, value + (", x" if field == "recipients" else "")))


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope("a@b.org", (), ROUTE),
        Envelope("a@b.org", ("",), ROUTE),
        Envelope("a@b.org", ("a@b.org", ""), ROUTE),
        Envelope("a@b.org", ("b@b.org",)),
        Envelope("a@b.org", ("b@b.org",), Route(host="relay.example.org")),
        Envelope("a@b.org", ("b@b.org",), Route(port=25)),
        Envelope("a@b.org", ("b@b.org",), Route("a@b.org", "x.org", 65536)),
        Envelope("a@b.org", ("b@b.org",), Route("a@b.org", "x.org", -1)),
    ],
)
def test_writer_refuses_envelope(envelope):
    with pytest.raises(InvalidEnvelope):
        format_block(envelope)


def test_writer_refuses_more_than_is_read():
    many = tuple(f"recipient-number-{i}@example.org" for i in range(130_000))
    with pytest.raises(InvalidEnvelope, match="fewer recipients"):
        format_block(Envelope("a@b.org", many, ROUTE))
    fitting = many[:100_000]
    block = format_block(Envelope("a@b.org", fitting, ROUTE))
    assert parse_block(block)[0].recipients == fitting


@pytest.mark.parametrize("line", [each for each in BLOCK.splitlines()[1:] if each])
@pytest.mark.parametrize("space", [b" ", b"\t", "\u3000".encode()])
def test_reader_refuses_outer_space(line, space):
    for wrong in (line + space, line.replace(b": ", b": " + space)):
        with pytest.raises(InvalidEnvelope):
            parse_block(BLOCK.replace(line, wrong))


@pytest.mark.parametrize("name", [b"X-Zope-From", b"X-Zope-To"])
def test_reader_needs_a_sender_and_a_recipient(name):
    lines = [line for line in BLOCK.splitlines(keepends=True) if not line.startswith(name)]
    with pytest.raises(InvalidEnvelope, match="is missing"):
        parse_block(b"".join(lines))


def test_reader_says_which_line_is_there_twice():
    (line,) = (line for line in BLOCK.splitlines(keepends=True) if line.startswith(b"X-Zope-To:"))
    with pytest.raises(InvalidEnvelope, match=r"X-Zope-To: .*unknown, repeated or out of order"):
        parse_block(BLOCK.replace(line, line + line))


def test_error_is_a_spool_error():
    assert issubclass(InvalidEnvelope, SpoolError)


def independent_reading(data: bytes) -> tuple[Envelope, int]:
    """Read a block in the plainest way, with no rule but the format itself."""
    head, _, _ = data.partition(b"\n\n")
    values = dict(line.split(": ", 1) for line in head.decode().split("\n"))
    to, parts, part, inside, escaped = values["X-Zope-To"], [], "", False, False
    for index, character in enumerate(to):
        if not inside and to[index : index + 2] == ", ":
            parts.append(part)
            part = ""
        elif not inside and index and to[index - 1 : index + 1] == ", ":
            continue
        else:
            part += character
        if escaped:
            escaped = False
        elif inside and character == "\\":
            escaped = True
        elif character == '"':
            inside = not inside
    route = Route(
        values.get("X-Zope-Mailbox", ""),
        values.get("X-Zope-Hostname", ""),
        int(values.get("X-Zope-Port", "0")),
    )
    envelope = Envelope(
        values["X-Zope-From"],
        (*parts, part),
        route,
        values.get("X-Zope-Message-Id", ""),
        values.get("X-Zope-Token", ""),
        float(values.get("X-Zope-Not-Before", "0")),
        float(values.get("X-Zope-Expires", "0")),
        int(values.get("X-Zope-Priority", "5")),
        values.get("X-Zope-Key", ""),
        values.get("X-Zope-Notify", ""),
        values.get("X-Zope-Ret", ""),
    )
    return envelope, len(head) + 2


@given(
    st.sampled_from([BLOCK, BLOCK[:-1] + WISHES + b"\n"]),
    st.integers(0, len(BLOCK + WISHES) - 1),
    st.integers(0, 8),
    st.binary(max_size=8) | st.sampled_from([b"\n", b": ", b", ", b'"', b"X-Zope-To: ", b" "]),
)
def test_mutations_say_what_they_say_or_are_refused(block, position, length, replacement):
    data = block[:position] + replacement + block[position + length :] + b"Subject: x\n\nbody\n"
    assume(not data.startswith(b"X-Zope-From: "))
    try:
        found = parse_block(data)
    except InvalidEnvelope:
        return
    assert found == independent_reading(data)


def test_what_a_sender_asks_for():
    wishes = {"not_before": 1732369200.25, "expires": 1732455600.0, "priority": 8, "key": "k 1"}
    wishes |= {"notify": "success,delay", "ret": "headers"}
    block = format_block(ENVELOPE._replace(**wishes))
    assert block == BLOCK[:-1] + WISHES + b"\n"
    assert parse_block(block)[0] == ENVELOPE._replace(**wishes)


@pytest.mark.parametrize(
    "wish",
    [
        {"not_before": -1.0},
        {"not_before": 0.0001},
        {"not_before": float("nan")},
        {"expires": float("inf")},
        {"expires": 1e11},
        {"priority": 10},
        {"priority": -1},
        {"key": "a\nX-Zope-Port: 1"},
        {"key": " a"},
        {"notify": "failure,success"},
        {"notify": "NEVER"},
        {"notify": "never\nX-Zope-Ret: full"},
        {"ret": "hdrs"},
    ],
)
def test_writer_refuses_a_wish(wish):
    with pytest.raises(InvalidEnvelope):
        format_block(ENVELOPE._replace(**wish))


@pytest.mark.parametrize(
    "line",
    [
        b"X-Zope-Not-Before: 0",
        b"X-Zope-Not-Before: 1.50",
        b"X-Zope-Not-Before: 1.0001",
        b"X-Zope-Not-Before: -1",
        b"X-Zope-Not-Before: 1e3",
        b"X-Zope-Not-Before: inf",
        b"X-Zope-Expires: 01",
        b"X-Zope-Expires: ",
        "X-Zope-Expires: \u0665".encode(),
        b"X-Zope-Priority: 5",
        b"X-Zope-Priority: 10",
        b"X-Zope-Priority: high",
        b"X-Zope-Priority: ",
        b"X-Zope-Key: a\nX-Zope-Priority: 8",
        b"X-Zope-Notify: ",
        b"X-Zope-Notify: never,failure",
        b"X-Zope-Notify: delay,failure",
        b"X-Zope-Notify: failure NOTIFY=NEVER",
        b"X-Zope-Ret: ",
        b"X-Zope-Ret: HDRS",
        b"X-Zope-Ret: full\nX-Zope-Notify: never",
    ],
)
def test_reader_refuses_a_wish(line):
    with pytest.raises(InvalidEnvelope):
        parse_block(BLOCK[:-1] + line + b"\n\n")


@given(st.permutations(BLOCK.split(b"\n")[1:-2]))
def test_order_counts(permuted):
    data = b"X-Zope-Envelope: 1\n" + b"\n".join(permuted) + b"\n\n"
    if data == BLOCK:
        assert parse_block(data)[0] == ENVELOPE
    else:
        with pytest.raises(InvalidEnvelope):
            parse_block(data)


@pytest.mark.parametrize("number", range(8))
def test_every_line_at_most_once(number):
    block = BLOCK.splitlines(keepends=True)
    with pytest.raises(InvalidEnvelope):
        parse_block(b"".join([*block[: number + 1], block[number], *block[number + 1 :]]))


@pytest.mark.parametrize("end", range(len(BLOCK)))
def test_cut_off(end):
    with pytest.raises(InvalidEnvelope):
        parse_block(BLOCK[:end])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Envelope: 1", b"Envelope: 2"),
        (b"Envelope: 1", b"Envelope: 1 "),
        (b"Port: 587", b"Port: 65536"),
        (b"Port: 587", b"Port: -1"),
        (b"Port: 587", b"Port: +25"),
        (b"Port: 587", b"Port: 5 7"),
        (b"Port: 587", "Port: \u0665".encode()),
        (b"Port: 587", b"Port: "),
        (b"carol@", b"carol\r@"),
        (b"carol@", b"carol\0@"),
        (b"carol@", b"carol\xff@"),
        (b"net, carol", b"net, , carol"),
        (b"From: alice", b"From:  alice"),
        (b"X-Zope-Token", b"X-Zope-Password"),
        (b"X-Zope-From", b"x-zope-from"),
        (b"From: alice", b"From:alice"),
        (b"To: bob@example.net, carol@example.net", b"To: "),
        (b"\n", b"\r\n"),
        (b"\n\n", b"\nSubject: x\n\n"),
        (b"X-Zope-Hostname", b" folded\nX-Zope-Hostname"),
    ],
)
def test_reader_refuses(old, new):
    data = BLOCK.replace(old, new)
    assert data != BLOCK
    with pytest.raises(InvalidEnvelope):
        parse_block(data)


prefixes = st.sampled_from(
    [
        b"",
        b"X-Zope-Envelope: ",
        b"X-Zope-Envelope: 1\nX-Zope-From: ",
        BLOCK[:-1],
        b"X-Zope-From: ",
        b"X-Zope-From: a@b.org\nX-Zope-To: ",
    ]
)


@given(prefixes, st.binary(max_size=200))
@example(b"X-Zope-From: a@b.org\nX-Zope-To: ", b"(" * 5000 + b"\n")
@example(b"X-Zope-From: ", b"(" * 5000 + b"\nX-Zope-To: a@b.org\n")
@example(b"X-Zope-From: ", b"\xff\nX-Zope-To: a@b.org\n")
def test_arbitrary_bytes(prefix, data):
    try:
        envelope, offset = parse_block(prefix + data)
    except InvalidEnvelope:
        return
    assert 0 < offset <= len(prefix + data)
    assert envelope.recipients


def test_hostile_quotes_are_read_in_linear_time():
    """A mega-byte of quotes that never close: quadratic would be hours."""
    to = b'"' + b'\\"' * 500_000
    data = b"X-Zope-Envelope: 1\nX-Zope-From: \nX-Zope-To: " + to + b"\nX-Zope-Mailbox: *\n\n"
    assert parse_block(data)[0].recipients == (to.decode(),)


def test_a_mail_cannot_change_its_envelope():
    hostile = BLOCK.replace(b"alice", b"eve").replace(b"bob", b"mallory")
    message = hostile + b"\nX-Zope-Hostname: evil.example\n\n" + hostile
    envelope, offset = parse_block(format_block(ENVELOPE) + message)
    assert envelope == ENVELOPE
    assert (format_block(ENVELOPE) + message)[offset:] == message


def spool_file(tmp_path, sender, recipients, message) -> bytes:
    """What zope.sendmail itself writes."""
    queue = tmp_path / "queue"
    with transaction.manager:
        QueuedMailDelivery(str(queue)).send(sender, recipients, message)
    (path,) = (queue / "new").iterdir()
    return path.read_bytes()


MESSAGE = b"Message-Id: <1@example.org>\nSubject: x\nX-Zope-Hostname: evil.org\n\nX-Zope-To: a\n"


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_files_of_zope_sendmail(tmp_path, eol):
    message = MESSAGE.replace(b"\n", eol)
    data = spool_file(tmp_path, "alice@example.org", ["bob@example.net", "c@example.net"], message)
    envelope, offset = parse_block(data)
    assert data[offset:] == message
    assert envelope == Envelope(
        "alice@example.org",
        ("bob@example.net", "c@example.net"),
        Route(mailbox="*"),
        message_id="1@example.org",
    )


def test_files_of_zope_sendmail_with_names_and_commas(tmp_path):
    data = spool_file(
        tmp_path,
        "Alice <alice@example.org>",
        ['"Bob, the Builder" <bob@example.net>', '"a, b"@example.net', "é@example.net"],
        "Subject: é\n\nbody",
    )
    envelope, offset = parse_block(data)
    assert envelope.sender == "alice@example.org"
    assert envelope.recipients == ("bob@example.net", '"a, b"@example.net', "é@example.net")
    assert envelope.message_id  # zope.sendmail has made one
    assert data[offset:].startswith(b"Message-Id: <" + envelope.message_id.encode())
    assert data.endswith("Subject: é\n\nbody".encode())


def test_files_of_zope_sendmail_null_sender(tmp_path):
    data = spool_file(tmp_path, "", ["bob@example.net"], MESSAGE)
    assert parse_block(data)[0].sender == ""


@pytest.mark.parametrize(
    "data",
    [
        b"X-Zope-From: a@b.org\n",
        b"X-Zope-From: a@b.org",
        b"X-Zope-From: a@b.org\nSubject: x\n\n",
        b"X-Zope-From: a@b.org\nX-Zope-To: \n\n",
        b"X-Zope-From: a@b.org\nX-Zope-To: nobody\n\n",
        b"X-Zope-From: nobody\nX-Zope-To: a@b.org\n\n",
        b"X-Zope-From: a@b.org\nX-Zope-To: a@b.org\r\n",
        b"X-Zope-From: a@b.org\r\nX-Zope-To: a@b.org\n",
        b"X-Zope-From: a@b.org\nX-Zope-To: a\x00@b.org\n\n",
        b"Subject: x\n\nno spool file",
        b"",
    ],
)
def test_broken_foreign_files(data):
    with pytest.raises(InvalidEnvelope):
        parse_block(data)


def test_zope_sendmail_does_not_send_ours():
    """A stock processor that is pointed at our directory finds no recipients: smtplib refuses."""
    processor = object.__new__(QueueProcessorThread)
    sender, to, _ = processor._parseMessage(BLOCK + MESSAGE)
    assert (sender, to) == ("", ())


def test_lane_key_follows_the_account():
    assert lane_key(ROUTE) == lane_key(Route("alice@example.org", "elsewhere.example.org", 25))
    assert lane_key(ROUTE) != lane_key(Route("bob@example.org", "smtp.example.org", 587))
    assert lane_key(Route(host="a.org", port=25)) != lane_key(Route(host="a.org", port=26))
    assert digest("") == digest("")
    assert len(digest("é\ud800")) == 16


def test_a_block_is_as_large_when_it_is_read_as_when_it_is_written():
    """A file that somebody has put there does not make us parse gigabytes."""
    recipients = tuple(f"{number:0200}@example.net" for number in range(20_000))
    block = format_block(ENVELOPE._replace(recipients=recipients[:18_000]))
    assert parse_block(block)[1] == len(block)
    with pytest.raises(InvalidEnvelope, match="at most"):
        format_block(ENVELOPE._replace(recipients=recipients))
    longer = block.replace(
        b"\nX-Zope-Hostname", b", " + ", ".join(recipients).encode() + b"\nX-Zope-Hostname"
    )
    with pytest.raises(InvalidEnvelope, match="no end"):
        parse_block(longer)
