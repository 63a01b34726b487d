"""Where the relay of an account may be: the addresses, and that nobody else is connected to."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.errors import RelayNotAllowed
from cpsmailaccess_delivery.networks import PUBLIC, check_networks, is_within
from cpsmailaccess_delivery.outcome import Phase, Trouble, classify
from cpsmailaccess_delivery.smtp.check import check, check_async
from cpsmailaccess_delivery.testing import SMTPServer

INTERNAL = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",  # shared, RFC 6598
    "127.0.0.1",
    "169.254.169.254",  # where clouds tell their secrets
    "172.16.0.1",
    "192.168.1.1",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fd00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2001:0:808:808::f5ff:fffe",  # Teredo of 10.0.0.1
    "64:ff9b::7f00:1",  # NAT64 of 127.0.0.1
    "64:ff9b:1::808:808",
    "::127.0.0.1",
    "::ffff:0:127.0.0.1",
    "fec0::2",  # site-local: the host of many a virtual machine
    "3fff::1",
]


@pytest.mark.parametrize("address", INTERNAL)
def test_what_is_not_public(address):
    assert not is_within(address, (PUBLIC,))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_what_is_public(address):
    assert is_within(address, (PUBLIC,))
    assert not is_within(address, ("10.0.0.0/8",))


def test_ranges():
    networks = check_networks([" 10.0.0.0/8", "fd00::/8", PUBLIC, "10.0.0.0/8", "192.0.2.7"])
    assert networks == ("10.0.0.0/8", "fd00::/8", PUBLIC, "192.0.2.7/32")
    for address in ("10.255.0.1", "::ffff:10.0.0.1", "fd12::1", "192.0.2.7"):
        assert is_within(address, networks)
    assert not is_within("192.0.2.8", ("192.0.2.7/32",))


@pytest.mark.parametrize("wrong", ["", "private", "10.0.0.1/8", "10.0.0.0/33", "example.org"])
def test_what_is_no_network(wrong):
    with pytest.raises(ValueError, match="is neither 'public' nor a network"):
        check_networks([wrong])


def account(server: SMTPServer, **changes) -> Account:
    settings = {"mailbox": "*", "host": "127.0.0.1", "port": server.port, "security": "plain"}
    return Account(**{**settings, **changes})


def test_no_connection_is_made_to_what_is_not_allowed():
    with SMTPServer() as server:
        report = check(account(server, networks=("public",)), None, helo_name="a.example")
        assert not report.ok
        assert isinstance(report.failure.error, RelayNotAllowed)
        assert "in no network that this account may reach" in report.problem
        assert "administrator" in report.problem
        assert server.sessions == 0
        assert check(account(server, networks=("127.0.0.0/8",)), None, helo_name="a.example").ok


def test_the_account_is_in_trouble_not_the_mail():
    verdict = classify(Phase.CONNECT, error=RelayNotAllowed("x"))
    assert (str(verdict.state), verdict.trouble) == ("deferred", Trouble.ACCOUNT)


class Names:
    """A resolver whose every answer is another one."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), 0

    async def getaddrinfo(self, host, port, **kinds):
        self.asked += 1
        answer = self.answers.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in answer]


def check_with(names: Names, to_try: Account):
    async def run():
        loop = asyncio.get_running_loop()
        ask = loop.getaddrinfo

        async def getaddrinfo(host, port, **kinds):
            if host == to_try.host:
                return await names.getaddrinfo(host, port, **kinds)
            return await ask(host, port, **kinds)

        loop.getaddrinfo = getaddrinfo
        return await check_async(to_try, None, helo_name="a.example")

    return asyncio.run(run())


def test_a_name_that_moves_leads_nowhere_else():
    """The address that was looked at is the one that is connected to."""
    with SMTPServer() as server:
        moving = account(server, host="moving.example", networks=("127.0.0.1/32",))
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        assert check_with(names, moving).ok
        assert names.asked == 1
        report = check_with(names, moving)
        assert isinstance(report.failure.error, RelayNotAllowed)


def test_of_several_addresses_those_that_are_allowed_are_tried():
    with SMTPServer() as server:
        several = account(server, host="several.example", networks=("127.0.0.0/8",))
        # nothing listens at the second; the first must not be tried
        report = check_with(Names(["10.255.255.1", "127.0.0.9", "127.0.0.1"]), several)
        assert report.ok
        assert report.steps[0].startswith("connected to 127.0.0.1 ")
