"""What a relay says it can do: the reply to EHLO (RFC 5321 section 4.1.1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The keywords of an EHLO reply, in capitals, with their parameters; none after HELO.

    ``size``: octets that the relay takes (RFC 1870); None: it named no limit.
    ``auth``: mechanisms of RFC 4954.
    """

    keywords: Mapping[str, str] = field(default_factory=dict)
    pipelining: bool = False  # RFC 2920
    chunking: bool = False  # RFC 3030
    eightbit: bool = False  # RFC 6152
    smtputf8: bool = False  # RFC 6531, which builds on 8BITMIME
    starttls: bool = False  # RFC 3207
    size: int | None = None
    auth: frozenset[str] = frozenset()


def parse_ehlo(raw: bytes) -> Capabilities:
    """Return what an EHLO reply offers; its first line is a greeting and offers nothing."""
    keywords: dict[str, str] = {}
    for line in raw.split(b"\n")[1:]:
        text = line[4:].decode("ascii", "replace").strip()
        if text[:5].upper() == "AUTH=":  # before RFC 2554
            text = "AUTH " + text[5:]
        name, _, parameters = text.partition(" ")
        name = name.upper()
        if name == "AUTH" and name in keywords:
            parameters = f"{keywords[name]} {parameters}"
        keywords[name] = parameters.strip()
    size = keywords.get("SIZE", "")
    eightbit = "8BITMIME" in keywords
    return Capabilities(
        keywords=keywords,
        pipelining="PIPELINING" in keywords,
        chunking="CHUNKING" in keywords,
        eightbit=eightbit,
        smtputf8="SMTPUTF8" in keywords and eightbit,
        starttls="STARTTLS" in keywords,
        size=(int(size) or None) if size.isdecimal() and len(size) < 20 else None,
        auth=frozenset(keywords.get("AUTH", "").upper().split()),
    )
