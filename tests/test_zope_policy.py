"""What users may set up, and how often they may try: plain code of the ZMI."""

from __future__ import annotations

import pytest

from cpsmailaccess_delivery import HIDDEN, Account, InvalidAccount
from cpsmailaccess_delivery.zope.account_form import changed, shown
from cpsmailaccess_delivery.zope.policy import Policy
from cpsmailaccess_delivery.zope.throttle import Throttle

ALICE, OWNER = "alice@example.org", "/acl_users:alice"
SITE = Account(mailbox="*", host="10.0.0.1", port=587)
LOGIN = {"username": "alice", "password": "x"}


def of_alice(policy: Policy, chosen, existing=None, site=SITE) -> Account:
    return policy.account(ALICE, owner=OWNER, chosen=chosen, existing=existing, site=site)


def test_a_relay_of_his_own_is_bounded():
    made = of_alice(Policy(), {"host": "smtp.example.net", "mails_per_minute": 99, **LOGIN})
    assert (made.owner, made.host, made.networks) == (OWNER, "smtp.example.net", ("public",))
    assert made.mails_per_minute is None, "he may not choose it"
    limited = of_alice(Policy(mails_per_minute=5, connections=1), {"host": "smtp.example.net"})
    assert (limited.mails_per_minute, limited.connections) == (5, 1)


def test_the_site_s_relay_is_where_the_administrator_put_it():
    made = of_alice(Policy(fields=("username", "password")), {"host": "evil.example", **LOGIN})
    assert (made.relay, made.networks) == (SITE.relay, ())
    with pytest.raises(InvalidAccount, match="no default relay"):
        of_alice(Policy(fields=("username", "password")), LOGIN, site=None)


def test_an_account_that_was_given_keeps_its_relay():
    given = Account(mailbox=ALICE, host="10.0.0.9", owner=OWNER, username="a", password="y")
    kept = of_alice(Policy(), {"username": "alice", "password": "z"}, existing=given)
    assert (kept.host, kept.networks, kept.password.reveal()) == ("10.0.0.9", (), "z")
    moved = of_alice(Policy(), {"host": "smtp.example.org", **LOGIN}, existing=given)
    assert moved.networks == ("public",)
    own = of_alice(Policy(), {"connections": 1}, existing=given.without_secret())
    assert own.password is HIDDEN


def test_a_password_that_the_administrator_has_read_goes_nowhere_else():
    given = Account(
        mailbox=ALICE, host="smtp.example.org", owner=OWNER, username="a", password_from="env:X"
    )
    local = given.replace(host="127.0.0.1")
    for existing, chosen in (
        (given, {"host": "evil.example.net"}),
        (local, {"host": "127.0.0.1", "security": "plain"}),
    ):
        with pytest.raises(InvalidAccount, match="the password of env:X is for"):
            of_alice(Policy(), chosen, existing=existing)
    assert of_alice(Policy(), {"username": "b", "password": None}, existing=given) == given.replace(
        username="b"
    )
    own = of_alice(Policy(), {"host": "smtp.example.net", **LOGIN}, existing=given)
    assert (own.host, own.password.reveal(), own.password_from) == ("smtp.example.net", "x", None)
    without = of_alice(Policy(), {"username": None, "password": None}, existing=given)
    assert (without.username, without.password_from) == (None, None)


def test_a_certificate_that_is_not_verified_is_that_of_one_relay():
    given = Account(mailbox=ALICE, host="10.0.0.9", owner=OWNER, verify=False)
    near = Policy(networks=("public", "10.0.0.0/8"))
    assert of_alice(near, {"port": 2525}, existing=given).verify is False
    moved = of_alice(Policy(), {"host": "smtp.example.net", **LOGIN}, existing=given)
    assert moved.verify is not False
    back = of_alice(Policy(), {"host": SITE.host}, moved, site=SITE.replace(verify="/ca.pem"))
    assert back.verify == "/ca.pem"


def test_relays_that_may_be_chosen():
    policy = Policy(relays=("*.Example.net", "smtp.example.com"))
    for host in ("smtp.example.net", "a.b.example.net", "SMTP.example.com"):
        assert of_alice(policy, {"host": host})
    for host in ("example.net", "smtp.example.net.evil.example", "x.smtp.example.com", "8.8.8.8"):
        with pytest.raises(InvalidAccount, match="the administrator allows"):
            of_alice(policy, {"host": host})


def test_an_address_outside_the_networks_is_refused_at_once():
    """Of a name only a connection knows; see test_networks.py."""
    for host in ("10.0.0.10", "::1", "[fe80::1]"):
        with pytest.raises(InvalidAccount, match="in no network that the administrator allows"):
            of_alice(Policy(), {"host": host})
    assert of_alice(Policy(networks=("public", "10.0.0.0/8")), {"host": "10.0.0.10"})
    assert of_alice(Policy(), {"host": "localhost"})


def test_mailboxes_that_may_be_added():
    policy = Policy(domains=("example.org", "@Bücher.example"), accounts=2)
    policy.may_add("Alice@Example.org", 1)
    policy.may_add("x@bücher.example", 0)
    for mailbox, owned, words in (
        ("alice@example.net", 0, "lets you set up mailboxes in"),
        ("alice@sub.example.org", 0, "lets you set up mailboxes in"),
        ("@example.org", 0, "is an address"),
        ("*", 0, "is an address"),
        (ALICE, 2, "which is the limit"),
        ("NoReply@example.org", 0, "is an address of the site"),
        ('"postmaster"@example.org', 0, "is an address of the site"),
        ("info+x@example.org", 0, "is an address of the site"),
    ):
        with pytest.raises(InvalidAccount, match=words):
            policy.may_add(mailbox, owned)
    with pytest.raises(InvalidAccount, match="in: none"):
        Policy().may_add(ALICE, 0)


def test_a_policy_is_stored_in_plain_values():
    policy = Policy(domains=("example.org",), mails_per_minute=3)
    assert Policy.from_stored({**policy.stored(), "of a later release": 1}) == policy
    assert Policy.from_stored({}) == Policy()


def test_a_form_keeps_what_it_cannot_set():
    account = Account(
        mailbox=ALICE, host="h.example", username="a", password_from="env:X", verify="/ca.pem"
    )
    assert changed(account, shown(account), verify=True) == account
    texts = {**shown(account), "password": "new"}
    assert changed(account, texts, verify=True).password_from is None


def test_throttle():
    now = [0.0]
    throttle = Throttle(12, clock=lambda: now[0])
    assert [throttle.take("a"), throttle.take("a")] == [0.0, 0.0]
    assert throttle.take("a") == pytest.approx(5.0)
    assert throttle.take("b") == 0.0
    now[0] = 5.0
    assert throttle.take("a") == 0.0
