"""Entry <-> file name, both ways, for any entry and any name."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.interfaces import NORMAL_PRIORITY, Entry, State
from cpsmailaccess_delivery.spool import names

IN_SPOOL = [State.QUEUED, State.DEFERRED, State.HELD, State.UNCLEAR, State.REFUSED]

hexes = st.text("0123456789abcdef", min_size=16, max_size=16)
own_ids = st.builds(
    names.new_id,
    st.floats(0, 9_999_999_999),
    st.text("0123456789abcdef", min_size=6, max_size=6),
    st.text(),
)
foreign_ids = st.from_regex(r"[A-Za-z0-9_=+@-][A-Za-z0-9._=+@-]{0,179}", fullmatch=True)
entries = st.builds(
    Entry,
    id=own_ids,
    lane=hexes,
    state=st.sampled_from(IN_SPOOL),
    due=st.floats(-10, 1e12) | st.integers(0, 4_000_000_000).map(float),
    attempts=st.integers(-1, 2_000_000),
    priority=st.integers(0, 9),
    expires=st.just(0.0) | st.floats(0, 1e12),
) | st.builds(
    Entry,
    id=foreign_ids,
    lane=st.just(""),
    state=st.sampled_from(IN_SPOOL),
    due=st.floats(0, 1e10),
    attempts=st.integers(0, 1000),
    priority=st.just(NORMAL_PRIORITY),
    expires=st.just(0.0),
)


@given(entries)
def test_every_entry_reads_back(entry):
    entry = names.normal(entry)
    name = names.file_name(entry)
    assert names.parse(name, names.folder(entry.state)) == entry
    assert len(name.encode()) <= 255
    assert "/" not in name
    assert not name.startswith(".")


@given(entries)
def test_normal_is_normal(entry):
    once = names.normal(entry)
    assert names.normal(once) == once
    assert once.due >= min(max(entry.due, 0), 99_999_999_999)


@given(st.text() | st.from_regex(r"[a-z]{1,4}:1,\w{4,8},[0-9.]{1,5},[0-9]{1,3}"))
@example("1732369200.M123456Ra1b2c3.0123456789abcdef,L=89abcdef01234567:1,deferred,01,0")
@example("foo:1,queued,0,0")
@example("1732369200.M123456Ra1b2c3.0123456789abcdef,L=89abcdef01234567,P=8")
@example("1732369200.M123456Ra1b2c3.0123456789abcdef,L=89abcdef01234567,P=5")
@example("1732369200.M123456Ra1b2c3.0123456789abcdef,L=89abcdef01234567,P=8:1,queued,9.5,0")
@example("foo:1,deferred,1.50,0")
@example("1732369200.M123456Ra1b2c3.0123456789abcdef,L=89abcdef01234567,E=0.5")
@example("1732369200.M123456Ra1b2c3.0123456789abcdef,L=89abcdef01234567,E=01")
@example("foo:2,S")
@example("foo\n")
def test_only_canonical_names_are_entries(name):
    for where in ("new", "cur"):
        entry = names.parse(name, where)
        if entry is not None:
            assert names.file_name(entry) == name
            assert names.folder(entry.state) == where


@given(st.text(max_size=50))
def test_find_knows_its_ids(message_id):
    entry_id = names.new_id(1.0, "abcdef", message_id)
    assert names.digest_of(entry_id) == digest(message_id)


def test_when_it_expires_in_the_name():
    entry_id, lane = names.new_id(1.0, "abcdef", "x"), "0" * 16
    entry = Entry(entry_id, lane, expires=9.5)
    assert names.file_name(entry) == f"{entry_id},L={lane},E=9.5"
    later = entry._replace(priority=8, state=State.DEFERRED, due=2.0, attempts=1)
    assert names.file_name(later) == f"{entry_id},L={lane},P=8,E=9.5:1,deferred,2,1"
    for other in ("0", "9.50", "09"):  # nobody's name: not ours, for we would not say so
        assert names.parse(f"{entry_id},L={lane},E={other}", "new").lane == ""


def test_priority_and_due_time_in_the_name():
    entry_id, lane = names.new_id(1.0, "abcdef", "x"), "0" * 16
    plain = Entry(entry_id, lane)
    assert names.file_name(plain) == f"{entry_id},L={lane}"
    assert names.file_name(plain._replace(priority=8)) == f"{entry_id},L={lane},P=8"
    later = plain._replace(priority=0, due=9.5)
    assert names.file_name(later) == f"{entry_id},L={lane},P=0:1,queued,9.5,0"
    assert names.folder(later.state) == "new"


def test_ids_sort_by_time():
    times = [0.0, 0.000001, 1.5, 999.999999, 1_000_000_000.0, 1_732_369_200.25]
    ids = [names.new_id(time, "000000", "x") for time in times]
    assert ids == sorted(ids)
    assert ids[-1].startswith("1732369200.M250000R000000.")


@pytest.mark.parametrize("now", [-5.0, 1e11, 1e20])
def test_a_clock_gone_mad_still_gives_an_id(now):
    entry = Entry(names.new_id(now, "000000", "x"), "0" * 16)
    assert names.parse(names.file_name(entry), "new") == entry


@given(
    own_ids,
    hexes,
    st.integers(0, 2**40),
    st.integers(0, 2**32 - 1),
    hexes,
    st.floats(0, 1e10),
    st.integers(0, 9),
    st.floats(0, 1e10),
)
def test_staged_names_read_back(entry_id, lane, size, check, presence, due, priority, expires):
    entry = names.normal(Entry(entry_id, lane, due=due, priority=priority, expires=expires))
    name = names.staged_name(entry, size=size, check=check, presence=presence)
    assert names.parse_staged(name) == (entry, size, check)
    assert names.presence_of(name) == presence
    key = names.key_name(entry_id, digest="0f" * 16, presence=presence)
    assert names.key_of(key) == (entry_id, "0f" * 16)
    assert names.presence_of(key) == presence
    assert names.parse_staged(key) is None
    assert names.key_of(name) == ("", "")
    scrap = names.scrap_name(entry_id, chance="ab", presence=presence)
    assert names.parse_staged(scrap) is None
    assert names.presence_of(scrap) == presence


@given(st.text())
def test_no_name_in_tmp_is_taken_for_ours_by_chance(name):
    if not re.search(r",P=[0-9a-f]{16}\Z", name):
        assert names.presence_of(name) is None
        assert names.parse_staged(name) is None
