"""The machine against a strict relay, without sockets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.interfaces import State as MailState
from cpsmailaccess_delivery.outcome import Phase, Trouble, classify
from cpsmailaccess_delivery.smtp.machine import Closed, MailDone, MailUnsent, Ready, State
from cpsmailaccess_delivery.smtp.reply import ProtocolError
from smtp_helpers import MODES, Drive, Letter, Relay, letter

THREE = [letter(1), letter(2, "a@example.net", "b@example.net"), letter(3)]

modes = pytest.mark.parametrize("keywords", MODES.values(), ids=MODES)


def state_of(result):
    return classify(result.phase, result.reply, result.error).state


def states(drive):
    return {recipient: str(state_of(result)) for recipient, result in drive.done.items()}


def finish(drive):
    """Quit, and let the relay answer."""
    drive.take(drive.machine.quit())
    written = drive.fill()
    drive.take(drive.machine.receive(drive.relay.receive(written)))
    return drive


@modes
def test_mails_arrive_as_they_are(keywords):
    drive = finish(Drive(Relay(keywords), THREE).run())
    drive.check()
    assert drive.close.failure is None
    assert set(states(drive).values()) == {"accepted"}
    assert [(sender, tuple(to)) for sender, to, _ in drive.relay.delivered] == [
        (mail.sender, mail.recipients) for mail in THREE
    ]
    assert drive.relay.delivered[0][2] == b"Subject: 1\r\n\r\nhello 1\r\n"
    assert drive.machine.accepted == 3


@modes
def test_split_at_every_octet(keywords):
    for step in (1, 2, 3, 7):
        drive = finish(Drive(Relay(keywords), THREE).run(step=step))
        drive.check()
        assert len(drive.relay.delivered) == 3


def refuse(line, relay):
    """A relay with an opinion on everything."""
    if line == "RCPT TO:<b@example.net>":
        return "550 5.1.1 no such user"
    if line.startswith("RCPT TO:<late"):
        return "452 4.5.3 too many"
    if line.startswith("MAIL FROM:<sender4@"):
        return "451 4.7.1 later"
    if line.startswith("RCPT TO:<none"):
        return "550 5.1.1 nobody"
    if line == "END" and relay.sender == "sender6@example.org":
        return "554 5.7.1 spam"
    if line == "DATA" and relay.sender == "sender8@example.org":
        return "451 4.3.0 disk"
    return None


MANY = [
    *THREE,
    letter(4),
    letter(5, "none1@example.net", "none2@example.net"),
    letter(6),
    letter(7, "seven@example.net", "late@example.net"),
    letter(8),
    letter(9),
]


@modes
def test_every_refusal_has_its_own_recipient(keywords):
    drive = finish(Drive(Relay(keywords, refuse), MANY).run())
    drive.check()
    assert drive.close.failure is None
    data = "CHUNKING" not in keywords
    assert states(drive) == {
        "to1@example.net": "accepted",
        "a@example.net": "accepted",
        "b@example.net": "refused",
        "to3@example.net": "accepted",
        "to4@example.net": "deferred",
        "none1@example.net": "refused",
        "none2@example.net": "refused",
        "to6@example.net": "refused",
        "seven@example.net": "accepted",
        "late@example.net": "deferred",
        "to8@example.net": "deferred" if data else "accepted",
        "to9@example.net": "accepted",
    }


@modes
def test_the_connection_dies_at_every_octet_from_the_relay(keywords):
    seen_unclear = False
    for cut in range(1, 1400):
        drive = Drive(Relay(keywords, refuse), MANY).run(from_relay=cut)
        if not drive.closed:
            drive.take(drive.machine.eof())
        drive.check()
        seen_unclear |= "unclear" in states(drive).values()
        if not drive.queue and len(drive.done) == 12:
            break
    else:
        pytest.fail("never got through")
    assert seen_unclear


@modes
def test_the_connection_dies_at_every_octet_to_the_relay(keywords):
    drive = Drive(Relay(keywords, refuse), MANY).run()
    for cut in range(1, len(drive.sent), 3):
        broken = Drive(Relay(keywords, refuse), MANY).run(to_relay=cut)
        if not broken.closed:
            broken.take(broken.machine.fail(TimeoutError("too long")))
        broken.check()


@modes
@pytest.mark.parametrize("how", ["stop", "abort", "quit"])
def test_ending_at_every_octet(keywords, how):
    for cut in range(1, 900):
        drive = Drive(Relay(keywords, refuse), MANY)
        drive.run(from_relay=cut)
        drive.take(getattr(drive.machine, how)())
        drive.go_on()
        drive.check()
        assert drive.close.failure is None


@modes
def test_garbage_at_every_octet(keywords):
    for cut in range(1, 700):
        drive = Drive(Relay(keywords, refuse), MANY).run(from_relay=cut)
        drive.take(drive.machine.receive(b"\x00garbage\r\n"))
        if not drive.closed:
            drive.take(drive.machine.eof())
        drive.check()


@modes
def test_hangs_up_with_421_anywhere(keywords):
    total = len(finish(Drive(Relay(keywords, refuse), MANY).run()).relay.commands)
    for at in range(1, total + 8):
        count = 0

        def rule(line, relay, at=at):
            nonlocal count
            count += 1
            return "!421 4.3.2 closing" if count == at else refuse(line, relay)

        drive = Drive(Relay(keywords, rule), MANY).run()
        if not drive.closed:
            finish(drive)
        drive.check()
        assert "unclear" not in states(drive).values()


def test_pipelining_sends_the_next_mail_with_the_end_of_data():
    relay = Relay(MODES["pipelining"])
    drive = Drive(relay, THREE)
    writes = []
    answer = b"220 hi\r\n"
    while answer:
        drive.take(drive.machine.receive(answer))
        writes.append(drive.fill())
        answer = relay.receive(writes[-1])
    assert len(writes) == 2 + 3 + 1  # EHLO, first group, three bodies, nothing
    assert writes[2].endswith(b"hello 1\r\n.\r\n" + writes[2][writes[2].index(b"MAIL") :])
    assert writes[2].endswith(b"DATA\r\n")


def test_chunking_puts_rset_between_mails():
    drive = Drive(Relay(MODES["chunking"]), [letter(n) for n in range(20)]).run()
    commands = [line.split(" ")[0] for line in drive.relay.commands[1:]]
    assert commands[:4] == ["MAIL", "RCPT", "BDAT", "RSET"]
    assert len(drive.relay.delivered) == 20
    assert all(
        commands[at + 1] == "RSET" or commands[at - 3 : at] != []
        for at, verb in enumerate(commands[:-1])
        if verb == "BDAT"
    )


def test_chunking_has_a_window_in_mails_and_octets():
    relay = Relay(MODES["chunking"])
    drive = Drive(relay, [letter(n) for n in range(20)])
    drive.take(drive.machine.receive(b"220 hi\r\n"))
    drive.take(drive.machine.receive(relay.receive(drive.fill())))
    assert drive.fill()
    assert drive.machine.in_flight == 1  # the first one asks before it goes in
    drive.take(drive.machine.receive(b"250 sender\r\n250 recipient\r\n"))
    drive.fill()
    assert drive.machine.in_flight == 8
    big = [letter(n, message=b"x" * 600_000) for n in range(20)]
    relay = Relay(MODES["chunking"])
    drive = Drive(relay, big)
    drive.take(drive.machine.receive(b"220 hi\r\n"))
    drive.take(drive.machine.receive(relay.receive(drive.fill())))
    assert drive.fill()
    drive.take(drive.machine.receive(b"250 sender\r\n250 recipient\r\n"))
    drive.fill()
    assert drive.machine.in_flight == 2


def test_chunking_asks_first_after_a_pause():
    drive = Drive(Relay(MODES["chunking"]), [letter(1)]).run()
    drive.queue = [letter(2), letter(3)]
    written = drive.fill()
    assert b"BDAT" not in written
    assert drive.machine.in_flight == 1
    drive.take(drive.machine.eof())
    drive.check()
    assert [mail.sender for mail in drive.unsent] == ["sender2@example.org"]
    assert drive.close.failure is None


def test_failed_bdat_leaks_nothing_into_the_next_mail():
    open_for_ever = []

    def rule(line, relay):
        """After a failed BDAT the transaction stays open until RSET, as some relays do."""
        if line == "END" and relay.sender == "sender1@example.org":
            open_for_ever.append((relay.sender, list(relay.recipients)))
            return "552 5.3.4 too much"
        if line == "RSET":
            open_for_ever.clear()
        if open_for_ever and line.startswith("RCPT"):
            pytest.fail("into a foreign transaction")
        return None

    drive = finish(Drive(Relay(MODES["chunking"], rule), THREE).run())
    drive.check()
    assert states(drive)["to1@example.net"] == "refused"
    assert states(drive)["to3@example.net"] == "accepted"


def test_354_without_recipients_gets_a_lone_dot():
    relay = Relay(MODES["pipelining"])

    def rule(line, relay):
        if line.startswith("RCPT TO:<to1@"):
            return "550 5.1.1 no"
        if line == "DATA" and not relay.recipients:
            relay._mode = "data"
            return "354 go on then"
        return None

    relay.rule = rule
    drive = finish(Drive(relay, THREE).run())
    drive.check()
    assert states(drive)["to1@example.net"] == "refused"
    assert len(relay.delivered) == 2
    assert "RSET" in relay.commands


def test_503_after_an_error_is_not_the_next_mails_fault():
    failed = []

    def rule(line, relay):
        if line == "END" and relay.sender == "sender1@example.org":
            failed.append(1)
            return "550 5.7.1 no"
        if line == "RSET":
            failed.clear()
        if failed and line.startswith(("MAIL", "RCPT", "DATA")):
            return "503 5.5.1 RSET first"
        return None

    drive = Drive(Relay(MODES["pipelining"], rule), THREE).run()
    assert [mail.sender for mail in drive.unsent] == ["sender2@example.org"]
    assert states(drive)["to3@example.net"] == "accepted"
    finish(drive).check()


def test_rcpt_accepted_after_mail_refused_ends_the_session():
    def rule(line, relay):
        return (
            "451 4.0.0 no"
            if line.startswith("MAIL")
            else ("250 sure" if line.startswith("RCPT") else None)
        )

    drive = Drive(Relay(MODES["pipelining"], rule), [letter(1)]).run()
    assert drive.close.failure is not None
    assert states(drive) == {"to1@example.net": "deferred"}


def test_rset_refused_drops_the_session():
    def rule(line, relay):
        if line == "RSET":
            return "502 5.5.1 never"
        return "550 5.7.1 no" if line.startswith("MAIL FROM:<sender1@") else None

    for keywords in (MODES["pipelining"], MODES["serial"]):
        drive = Drive(Relay(keywords, rule), THREE).run()
        assert drive.close.failure.phase is Phase.IDLE
        assert [mail.sender for mail in drive.unsent] == ["sender2@example.org"]
        drive.check()


@modes
def test_unclear_only_after_the_end_of_data(keywords):
    def rule(line, relay):
        return "!" if line == "END" else None

    drive = Drive(Relay(keywords, rule), [letter(1)]).run()
    drive.take(drive.machine.eof())
    assert states(drive) == {"to1@example.net": "unclear"}
    drive.check()


@modes
def test_early_acceptance_is_no_acceptance(keywords):
    drive = Drive(Relay(keywords), [letter(1, message=b"x" * 600_000)])
    drive.take(drive.machine.receive(b"220 hi\r\n"))
    drive.take(drive.machine.receive(drive.relay.receive(drive.fill())))
    drive.take(drive.machine.send(drive.queue[0]))
    drive.given.append(drive.queue.pop(0))
    for answer in (b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n", b"250 ok\r\n"):
        if answer.startswith(b"354") and "CHUNKING" in keywords:
            continue
        drive.take(drive.machine.receive(answer))
        if answer.startswith(b"250"):
            drive.machine.data_to_send()
    assert states(drive) == {"to1@example.net": "deferred"}
    drive.check()


def test_refused_in_the_middle_of_the_body():
    drive = Drive(Relay(MODES["pipelining"]), [letter(1, message=b"x" * 600_000)])
    drive.take(drive.machine.receive(b"220 hi\r\n"))
    drive.take(drive.machine.receive(drive.relay.receive(drive.fill())))
    drive.take(drive.machine.send(drive.queue[0]))
    drive.given.append(drive.queue.pop(0))
    drive.machine.data_to_send()
    drive.take(drive.machine.receive(b"250 ok\r\n250 ok\r\n354 go\r\n"))
    drive.machine.data_to_send()
    drive.take(drive.machine.receive(b"552 5.3.4 enough\r\n"))
    assert states(drive) == {"to1@example.net": "refused"}
    assert drive.close.failure is None
    assert drive.machine.data_to_send() == b""


@modes
def test_session_ends_after_its_mails(keywords):
    drive = Drive(Relay(keywords), [letter(n) for n in range(10)], mails_per_session=4).run()
    drive.check()
    assert drive.close == Closed(None)
    assert len(drive.relay.delivered) == 4
    assert drive.relay.commands[-1] == "QUIT"


def test_failing_quit_is_nothing():
    for answer in (b"500 what?\r\n", b"421 bye\r\n", b"\0\0\r\n", b""):
        drive = Drive(Relay(), [letter(1)]).run()
        drive.take(drive.machine.quit())
        drive.fill()
        drive.take(drive.machine.receive(answer) if answer else drive.machine.eof())
        assert drive.close.failure is None
        drive.check()


def test_idle_and_closed_by_the_relay_is_no_failure():
    for end in (b"421 4.4.2 time-out\r\n", b""):
        drive = Drive(Relay(), [letter(1)]).run()
        drive.take(drive.machine.receive(end) if end else drive.machine.eof())
        assert drive.close.failure is None
        drive.check()


def test_a_reused_session_that_dies_hands_the_mail_back():
    drive = Drive(Relay(), [letter(1)]).run()
    drive.queue = [letter(2)]
    drive.fill()
    drive.take(drive.machine.eof())
    assert [mail.sender for mail in drive.unsent] == ["sender2@example.org"]
    assert drive.close.failure is None


def test_the_first_mail_of_a_session_is_tried():
    drive = Drive(Relay(rule=lambda line, _: "!" if line.startswith("MAIL") else None), [letter(1)])
    drive.run()
    drive.take(drive.machine.eof())
    assert drive.done["to1@example.net"].phase is Phase.MAIL
    assert drive.close.failure.phase is Phase.MAIL


def test_unasked_reply_ends_the_session():
    drive = Drive(Relay(), [letter(1)]).run()
    drive.take(drive.machine.receive(b"250 extra\r\n"))
    assert drive.close.failure.phase is Phase.IDLE
    drive.check()


def test_phase_and_state():
    drive = Drive(Relay(MODES["serial"]), [letter(1)])
    machine = drive.machine
    phases = [machine.awaiting]
    answer = b"220 hi\r\n"
    while answer:
        drive.take(machine.receive(answer))
        written = drive.fill()
        phases.append(machine.awaiting)
        answer = drive.relay.receive(written)
    assert phases == [
        Phase.GREETING, Phase.HELLO, Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.BODY, None,
    ]  # fmt: skip
    assert machine.state is State.READY
    assert "READY" in repr(machine)


# Addresses, sizes, eight bits


def test_too_large_is_refused_here():
    drive = Drive(Relay(("SIZE 100",)), [letter(1, message=b"x" * 101), letter(2)]).run()
    reply = drive.done["to1@example.net"].reply
    assert (reply.code, reply.enhanced) == (552, "5.3.4")
    assert state_of(drive.done["to1@example.net"]) is MailState.REFUSED
    assert states(drive)["to2@example.net"] == "accepted"
    assert not any("sender1" in line for line in drive.relay.commands)


@modes
def test_non_ascii_local_part_needs_smtputf8(keywords):
    mail = letter(1, "jörg@example.net", "bob@bücher.example", "bob@example.net")
    drive = Drive(Relay(keywords), [mail]).run()
    assert drive.done["jörg@example.net"].reply.enhanced == "5.6.7"
    assert drive.relay.delivered[0][1] == ["bob@xn--bcher-kva.example", "bob@example.net"]
    drive = Drive(Relay((*keywords, "SMTPUTF8")), [mail]).run()
    assert drive.relay.delivered[0][1][0] == "jörg@example.net"
    assert any(" SMTPUTF8" in line for line in drive.relay.commands)
    drive = Drive(Relay(keywords), [replace(mail, sender="jörg@example.org")]).run()
    assert {result.phase for result in drive.done.values()} == {Phase.MAIL}
    assert not drive.relay.delivered


def test_eight_bits_as_they_are_or_converted():
    mail = letter(1, message="Subject: x\n\nnaïve\n".encode())
    drive = Drive(Relay(("8BITMIME",)), [mail]).run()
    assert drive.relay.commands[1].endswith(" BODY=8BITMIME")
    assert drive.relay.delivered[0][2] == "Subject: x\r\n\r\nnaïve\r\n".encode()
    drive = Drive(Relay(()), [mail]).run()
    assert "BODY" not in drive.relay.commands[1]
    assert drive.relay.delivered[0][2].isascii()
    signed = replace(mail, message=b"DKIM-Signature: v=1\n" + mail.message)
    drive = Drive(Relay(()), [signed]).run()
    assert drive.done["to1@example.net"].reply.enhanced == "5.6.3"
    assert state_of(drive.done["to1@example.net"]) is MailState.REFUSED


@pytest.mark.parametrize(
    "address",
    ["a@b.example>\r\nRSET\r\nx<", "a@b.example> SIZE=1", "a b@c.example", "x\0@y.example"],
)
def test_no_address_becomes_a_command(address):
    drive = Drive(Relay(), [letter(1, address, "ok@example.net")]).run()
    assert state_of(drive.done[address]) is MailState.REFUSED
    assert drive.relay.delivered[0][1] == ["ok@example.net"]
    drive = Drive(Relay(), [Letter(address, ("ok@example.net",), b"x")]).run()
    assert state_of(drive.done["ok@example.net"]) is MailState.REFUSED
    assert not drive.relay.delivered


def test_quoted_local_part_passes():
    drive = Drive(Relay(), [letter(1, '"a > b"@example.net')]).run()
    assert states(drive) == {'"a > b"@example.net': "accepted"}


def test_hundreds_of_recipients_some_too_many():
    to = [f"r{n}@example.net" for n in range(500)]

    def rule(line, relay):
        return (
            "452 4.5.3 too many"
            if line.startswith("RCPT") and len(relay.recipients) >= 100
            else None
        )

    for keywords in MODES.values():
        drive = finish(Drive(Relay(keywords, rule), [letter(1, *to)]).run())
        drive.check()
        assert list(states(drive).values()).count("accepted") == 100
        assert list(states(drive).values()).count("deferred") == 400


# Opening


def trouble_of(drive):
    failure = drive.close.failure
    return classify(failure.phase, failure.reply, failure.error).trouble


def test_helo_when_ehlo_is_unknown():
    drive = Drive(Relay(rule=lambda line, _: "502 what" if line[:4] == "EHLO" else None), THREE)
    drive.run()
    assert len(drive.relay.delivered) == 3
    assert drive.relay.commands[:2] == ["EHLO me.example.org", "HELO me.example.org"]


@pytest.mark.parametrize("greeting", ["421 busy", "554 no", "450 later", "250 hm", "HTTP/1.1 400"])
def test_greeting_that_is_none(greeting):
    drive = Drive(Relay(greeting=greeting), THREE).run()
    assert drive.close.failure.phase is Phase.GREETING
    assert trouble_of(drive) is Trouble.RELAY
    assert not drive.given


def test_starttls():
    drive = Drive(Relay(("STARTTLS", "AUTH LOGIN")), THREE, security="starttls")
    drive.run()
    assert drive.relay.starting_tls
    assert drive.machine.state is State.TLS
    assert drive.machine.awaiting is Phase.TLS
    drive.take(drive.machine.tls_started())
    assert not drive.machine.capabilities.auth
    drive.take(drive.machine.receive(drive.relay.receive(drive.fill())))
    assert drive.ready


def test_starttls_is_never_silently_left_out():
    drive = Drive(Relay(()), THREE, security="starttls").run()
    assert drive.close.failure.phase is Phase.TLS
    assert trouble_of(drive) is Trouble.ACCOUNT
    drive = Drive(Relay(rule=lambda line, _: "502 what" if line[:4] == "EHLO" else None))
    drive = Drive(drive.relay, THREE, security="starttls").run()
    assert trouble_of(drive) is Trouble.ACCOUNT
    assert not drive.given
    rule = lambda line, _: "454 4.7.0 not now" if line == "STARTTLS" else None  # noqa: E731
    drive = Drive(Relay(("STARTTLS",), rule), THREE, security="starttls").run()
    assert trouble_of(drive) is Trouble.RELAY


@pytest.mark.parametrize("injected", ["250 x\r\n", "250 x", "2", "\0\r\n"])
def test_response_injection(injected):
    """What came in clear behind the 220 must not count as said inside TLS (CVE-2011-1575)."""
    drive = Drive(Relay(("STARTTLS",)), THREE, security="starttls")
    drive.take(drive.machine.receive(b"220 hi\r\n250-x\r\n250 STARTTLS\r\n"))
    drive.take(drive.machine.receive(b"220 go\r\n" + injected.encode()))
    assert drive.close.failure.phase is Phase.TLS
    drive = Drive(Relay(("STARTTLS",)), THREE, security="starttls").run()
    drive.take(drive.machine.receive(injected.encode()))
    assert drive.close.failure.phase is Phase.TLS


LOGIN = {"security": "tls", "username": "alice", "password": "s3cret word"}


@pytest.mark.parametrize(
    ("offered", "used"),
    [
        ("AUTH LOGIN PLAIN CRAM-MD5", "CRAM-MD5"),
        ("AUTH LOGIN PLAIN", "PLAIN"),
        ("AUTH=LOGIN", "LOGIN"),
        ("auth xoauth2 login", "LOGIN"),
    ],
)
def test_login(offered, used):
    drive = Drive(Relay((offered,)), [letter(1)], **LOGIN).run()
    assert drive.machine.login == used
    user, password = drive.relay.logins[0]
    assert user == "alice"
    digest = "9e2fef1df1d93c8d3ac0ef5ea6ef5d46"
    assert password == "s3cret word" or (used == "CRAM-MD5" and len(password) == len(digest))
    assert len(drive.relay.delivered) == 1


def test_cram_md5_of_rfc_2195():
    from cpsmailaccess_delivery.account import Secret
    from cpsmailaccess_delivery.smtp.auth import Login

    login = Login("CRAM-MD5", "tim", Secret("tanstaaftanstaaf"))
    challenge = b"PDE4OTYuNjk3MTcwOTUyQHBvc3RvZmZpY2UucmVzdG9uLm1jaS5uZXQ+"
    assert login.answer(challenge) == b"dGltIGI5MTNhNjAyYzdlZGE3YTQ5NWI0ZTZlNzMzNGQzODkw"


@pytest.mark.parametrize("code", [504, 534])
def test_next_mechanism_when_one_is_not_accepted(code):
    rule = lambda line, _: f"{code} no" if line.startswith("AUTH CRAM") else None  # noqa: E731
    drive = Drive(Relay(("AUTH CRAM-MD5 PLAIN",), rule), [letter(1)], **LOGIN).run()
    assert drive.machine.login == "PLAIN"


def test_wrong_password_is_tried_once():
    rule = lambda line, _: "535 5.7.8 wrong" if line == "LOGIN" else None  # noqa: E731
    drive = Drive(Relay(("AUTH CRAM-MD5 PLAIN",), rule), [letter(1)], **LOGIN).run()
    assert len(drive.relay.logins) == 1
    assert trouble_of(drive) is Trouble.LOGIN
    assert not drive.given


def test_no_login_offered():
    for keywords in ((), ("AUTH GSSAPI",)):
        drive = Drive(Relay(keywords), [letter(1)], **LOGIN).run()
        assert drive.close.failure.phase is Phase.AUTH
        assert trouble_of(drive) is Trouble.LOGIN


@pytest.mark.parametrize("answer", ["334 !!!", "334 ", "334 YQ==", "250 ok", "99 x"])
def test_login_dialogue_out_of_order(answer):
    rule = lambda line, _: answer if line.startswith("AUTH") else None  # noqa: E731
    drive = Drive(Relay(("AUTH PLAIN",), rule), [letter(1)], **LOGIN).run()
    assert drive.close.failure.phase is Phase.AUTH


@pytest.mark.parametrize("mechanism", ["LOGIN", "PLAIN", "CRAM-MD5"])
def test_a_relay_that_asks_for_more_than_there_is_to_say(mechanism):
    rule = lambda line, _: "334 YQ==" if line == "LOGIN" else None  # noqa: E731
    drive = Drive(Relay((f"AUTH {mechanism}",), rule), [letter(1)], **LOGIN).run()
    assert isinstance(drive.close.failure.error, ProtocolError)
    assert f"more than {mechanism} has to say" in drive.close.failure.text
    assert "" not in drive.relay.commands


@pytest.mark.parametrize("mechanism", ["LOGIN", "PLAIN", "CRAM-MD5"])
def test_what_was_said_at_a_login_is_not_shown(mechanism):
    """Nor an answer to a challenge: it is good for guessing the password."""
    for word in range(3):
        said = []

        def echo(line, relay, word=word, said=said):
            if line != "LOGIN" or word >= len(relay._auth[1:]):
                return None
            said.append(relay._auth[1 + word])
            return f"535 5.7.8 {said[0]} is wrong"

        drive = Drive(Relay((f"AUTH {mechanism}",), echo), [letter(1)], **LOGIN).run()
        for text in said:
            assert "is wrong" in drive.close.failure.text
            assert text not in drive.close.failure.text + repr(drive.events)
        assert said or word


def test_no_secret_in_anything_that_can_be_shown():
    tokens = ("s3cret", "czNjcmV0", "AGFsaWNl")

    def echo(line, relay):
        if line.startswith(("AUTH PLAIN ", "EHLO")):
            return None
        return "535 5.7.8 bad: s3cret word AGFsaWNlAHMzY3JldCB3b3Jk"

    for rule in (
        echo,
        lambda line, _: "s3cret word" if line == "LOGIN" else None,
        lambda line, _: "250 s3cret word" if line == "END" else None,
        lambda line, _: "xx s3cret word" if line == "END" else None,
    ):
        drive = Drive(Relay(("AUTH PLAIN",), rule), [letter(1)], **LOGIN).run()
        shown = (
            repr(drive.events)
            + repr(drive.machine)
            + str([result.text for result in drive.done.values()])
        )
        if drive.closed and drive.close.failure:
            shown += drive.close.failure.text
        assert not any(token in shown for token in tokens), shown


def test_ready_names_capabilities():
    drive = Drive(Relay(("SIZE 10", "8BITMIME", "SMTPUTF8", "PIPELINING", "X-NEW 1"))).run()
    (ready,) = (event for event in drive.events if isinstance(event, Ready))
    assert ready.capabilities.size == 10
    assert ready.capabilities.smtputf8
    assert ready.capabilities.keywords["X-NEW"] == "1"


def test_handed_back_by_stop_before_its_data():
    relay = Relay(MODES["pipelining"])
    drive = Drive(relay, THREE)
    drive.take(drive.machine.receive(b"220 hi\r\n"))
    drive.take(drive.machine.receive(relay.receive(drive.fill())))
    drive.take(drive.machine.receive(relay.receive(drive.fill())))
    answer = relay.receive(drive.fill())  # body 1, and the group of mail 2
    drive.take(drive.machine.stop())
    assert [mail.sender for mail in drive.unsent] == ["sender2@example.org"]
    drive.take(drive.machine.receive(answer))
    assert states(drive) == {"to1@example.net": "accepted"}
    assert drive.close.failure is None
    assert drive.fill() == b""  # no dot, no QUIT: the relay waits for data of mail 2
    assert any(isinstance(event, MailUnsent) for event in drive.events)
    drive.check()


REPLIES = st.sampled_from(
    [b"250 ok", b"250-a\r\n250 b", b"354 go", b"550 no", b"451 later", b"421 bye", b"503 no", b"x"]
)


@given(st.sampled_from(sorted(MODES)), st.lists(REPLIES, max_size=40), st.integers(1, 99))
def test_any_relay_whatsoever(mode, replies, step):
    """No exception, nothing lost, and unclear only past an end of data."""
    drive = Drive(
        Relay(MODES[mode]), [letter(n, "a@b.example", f"c{n}@b.example") for n in range(9)]
    )
    keywords = "\r\n".join(f"250-{keyword}" for keyword in MODES[mode]).encode()
    talk = b"220 hi\r\n" + keywords + b"\r\n250 x\r\n" + b"".join(r + b"\r\n" for r in replies)
    for at in range(0, len(talk), step):
        drive.take(drive.machine.receive(talk[at : at + step]))
        drive.fill()
    if not drive.closed:
        drive.take(drive.machine.eof())
    back = [e.mail for e in drive.events if isinstance(e, MailDone | MailUnsent)]
    assert sorted(map(id, back)) == sorted(map(id, drive.given))
    ends = drive.sent.count(b"hello") + drive.sent.count(b"Subject")
    unclear = [state for state in states(drive).values() if state == "unclear"]
    assert ends or not unclear
    assert isinstance(drive.events[-1], Closed)
