"""Addresses and host names: what an envelope takes, and what it must never take."""

from __future__ import annotations

from email.header import Header
from email.headerregistry import Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.address import (
    MAX_ADDRESS,
    ascii_host,
    check_address,
    check_recipients,
    is_loopback,
)
from cpsmailaccess_delivery.errors import InvalidAddress, NoRecipients, SendError

GOOD = {
    "plain": ("alice@example.org", "alice@example.org"),
    "outer space": ("  alice@example.org ", "alice@example.org"),
    "display name": ("Alice A. <alice@example.org>", "alice@example.org"),
    "quoted name": ('"Alice, of Example" <alice@example.org>', "alice@example.org"),
    "comment": ("alice@example.org (Alice)", "alice@example.org"),
    "angle brackets": ("<alice@example.org>", "alice@example.org"),
    "encoded name": ("=?utf-8?q?Andr=C3=A9?= <a@example.org>", "a@example.org"),
    "non-ASCII name": ("André <a@example.org>", "a@example.org"),
    "Header": (Header("Andrés <a@example.org>", "utf-8"), "a@example.org"),
    "headerregistry": (Address("Ann", "a", "example.org"), "a@example.org"),
    "bytes": (b"alice@example.org", "alice@example.org"),
    "UTF-8 bytes": ("josé@example.org".encode(), "josé@example.org"),
    "plus and atext": ("o'b+t!#$%&*/=?^_`{|}~-@x.org", "o'b+t!#$%&*/=?^_`{|}~-@x.org"),
    "case is kept": ("Alice@Example.ORG", "Alice@Example.ORG"),
    "SMTPUTF8": ("用户@例え.jp", "用户@例え.jp"),
    "IDN": ("a@bücher.example", "a@bücher.example"),
    "quoted local part": ('"a b"@example.org', '"a b"@example.org'),
    "quoted comma": ('"a, b"@example.org', '"a, b"@example.org'),
    "quoted at": ('"a@b"@example.org', '"a@b"@example.org'),
    "quoted quote": (r'"a\"b"@example.org', r'"a\"b"@example.org'),
    "quoted brackets": ('"a>b"@example.org', '"a>b"@example.org'),
    "empty quoted": ('""@example.org', '""@example.org'),
    "IPv4 literal": ("a@[192.0.2.1]", "a@[192.0.2.1]"),
    "IPv6 literal": ("a@[IPv6:2001:db8::1]", "a@[IPv6:2001:db8::1]"),
    "one label": ("root@localhost", "root@localhost"),
    "underscore": ("a@_dmarc.example.org", "a@_dmarc.example.org"),
}

BAD = {
    "None": None,
    "empty": "",
    "space": "   ",
    "number": 7,
    "no at": "alice",
    "no local part": "@example.org",
    "no domain": "alice@",
    "two": "a@example.org, b@example.org",
    "two by space": "a@example.org b@example.org",
    "two by semicolon": "a@example.org; b@example.org",
    "two brackets": "A <a@example.org> <b@example.org>",
    "address as name": "a@example.org <b@example.net>",
    "parenthesis": "a@example.org)b@example.net",
    "two ats": "a@b@example.org",
    "empty group": "undisclosed-recipients:;",
    "name with comma": "Doe, John <john@example.org>",
    "double dot": "a..b@example.org",
    "dot first": ".a@example.org",
    "dot last": "a.@example.org",
    "backslash": r"\a@example.org",
    "stray quote": 'a"b@example.org',
    "quote in the middle": 'x"y"@example.org',
    "empty label": "a@example..org",
    "dot at the end": "a@example.org.",
    "dots at the end": "a@example.org...",
    "hyphen": "a@-example.org",
    "long label": f"a@{'x' * 64}.org",
    "bad literal": "a@[example.org]",
    "open literal": "a@[192.0.2.1",
    "not UTF-8": b"caf\xe9@example.org",
    "bad IDN": "a@\u0300.example",
    "no-break space": "a\u00a0b@example.org",
    "wide space in the domain": "a@\u3000example.org",
    "wide space in brackets": "A <\u3000a@example.org>",
    "zone": "a@[IPv6:fe80::1%eth0]",
    "parameter in a zone": "a@[IPv6:fe80::1%> NOTIFY=NEVER]",
    "bracket in a zone": "a@[IPv6:fe80::1%>x]",
    "nested comments": "(" * 1900 + "a@example.org",
    "very many nested comments": "(" * 1_000_000 + "a@example.org",
    "ten megabytes": "a" * 10_000_000 + "@example.org",
    "ten megabytes of commas": "," * 10_000_000,
}


@pytest.mark.parametrize("name", GOOD)
def test_good(name):
    given_, bare = GOOD[name]
    assert check_address(given_) == bare


@pytest.mark.parametrize("name", BAD)
def test_bad(name):
    with pytest.raises(InvalidAddress) as caught:
        check_address(BAD[name])
    assert isinstance(caught.value, SendError)
    assert len(str(caught.value)) < 10_000  # what was given may be ten megabytes


INJECTED = [
    "\r",
    "\n",
    "\r\n",
    "\0",
    "\t",
    "\v",
    "\f",
    "\x1b",
    "\x7f",
    "\x80",
    "\x85",
    "\x9f",
    "\u2028",
    "\u2029",
    "\udc0a",
    "\ud800",
]


@pytest.mark.parametrize("character", INJECTED, ids=ascii)
@pytest.mark.parametrize(
    "pattern",
    [
        "a{}X-Zope-Hostname: evil@example.org",
        "a@example.org{}",
        "{}a@example.org",
        "a@exam{}ple.org",
        '"a{}b"@example.org',
        "Al{}ice <a@example.org>",
        "a@[192.0.2.1{}]",
        "a@example.org ({})",
    ],
)
def test_control_characters(character, pattern):
    with pytest.raises(InvalidAddress):
        check_address(pattern.format(character))


@given(st.text(max_size=60))
def test_any_text_is_one_address_or_refused(text):
    """What comes out may stand between the angle brackets of RCPT TO."""
    try:
        bare = check_address(text)
    except InvalidAddress:
        return
    assert check_address(bare) == bare
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in bare)
    assert bare == bare.strip()
    local, _, domain = bare.rpartition("@")
    assert local
    assert domain
    if not local.startswith('"'):
        assert not set(local + domain) & set('<>"(),;\\ \u2028')
    assert len(bare.encode()) <= MAX_ADDRESS


_structured = st.text(alphabet='ab.@"\\<>()[],:; %0\u00a0é', max_size=30)


@given(_structured, st.sampled_from(["@x.org", "@[IPv6:fe80::1%", "@[192.0.2.1]"]), _structured)
def test_no_structure_escapes(before, middle, after):
    try:
        bare = check_address(before + middle + after)
    except InvalidAddress:
        return
    domain = bare.rpartition("@")[2]
    assert not set(domain) & set('<>"(),;\\ %')
    assert check_address(bare) == bare


@given(st.binary(max_size=60))
def test_any_bytes(data):
    try:
        check_address(data)
    except InvalidAddress:
        pass


def test_longest():
    longest = "a" * 60 + "@" + ".".join(["b" * 60] * 3 + ["c" * 10])
    assert len(longest) == MAX_ADDRESS
    assert check_address(longest) == longest
    with pytest.raises(InvalidAddress):
        check_address("a" + longest)
    wide = "é" * 100 + "@" + "b" * 54  # octets count
    with pytest.raises(InvalidAddress):
        check_address(wide)


def test_recipients():
    given_ = ["Bob <bob@example.net>", b"carol@example.net", "bob@example.net"]
    assert check_recipients(given_) == ("bob@example.net", "carol@example.net")
    assert check_recipients("bob@example.net") == ("bob@example.net",)
    assert check_recipients(b"bob@example.net") == ("bob@example.net",)
    assert check_recipients(a for a in given_[:1]) == ("bob@example.net",)


@pytest.mark.parametrize("empty", [[], (), {}, iter(())])
def test_no_recipients(empty):
    with pytest.raises(NoRecipients):
        check_recipients(empty)


@pytest.mark.parametrize(
    "bad", ["", b"", None, 7, object(), [""], [None], ["a@b.org", ""], bytearray(b"a@b.org")]
)
def test_bad_recipients(bad):
    with pytest.raises((InvalidAddress, NoRecipients)):
        check_recipients(bad)


@pytest.mark.parametrize(
    ("host", "ascii_"),
    [
        ("smtp.example.org", "smtp.example.org"),
        ("SMTP.Example.ORG.", "smtp.example.org"),
        (" smtp.example.org\n", "smtp.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("例え.jp", "xn--r8jz45g.jp"),
        ("192.0.2.1", "192.0.2.1"),
        ("[192.0.2.1]", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("localhost", "localhost"),
    ],
)
def test_hosts(host, ascii_):
    assert ascii_host(host) == ascii_


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        ".",
        "a..",
        None,
        7,
        b"example.org",
        "exa mple.org",
        "example.org\r\nX: y",
        "fe80::1%a\r\nX-Zope-Mailbox: x",
        "fe80::1%a b",
        "fe80::1%",
        "[example.org]",
        "[::1",
        "smtp.example.org:25",
        "smtp://example.org",
        "user@example.org",
        "-a.org",
        "a-.org",
        "x" * 64,
        ".".join(["x" * 60] * 5),
        "a/b",
        "é" * 300,
        "\u3002",
        "e\u0000.org",
        "x" * 10_000_000,
    ],
    ids=lambda host: ascii(host)[:30],
)
def test_bad_hosts(host):
    with pytest.raises(InvalidAddress):
        ascii_host(host)


@given(st.text(max_size=40))
def test_any_host(text):
    try:
        host = ascii_host(text)
    except InvalidAddress:
        return
    assert ascii_host(host) == host
    assert host.isascii()
    assert not set(host) & set("\r\n\0 <>@,")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "a.localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["127.0.0.1.example.org", "localhost.example.org", "notlocalhost", "10.0.0.1", "", "0"]
)
def test_not_loopback(host):
    assert not is_loopback(host)
