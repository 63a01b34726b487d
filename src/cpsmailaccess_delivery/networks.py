"""In which networks a relay may be: for accounts that somebody else than the site has made.

A name is looked up at each connection, and each time it may be another address: so what an
account may reach is asked of the address that is connected to, never of the name.  Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

#: Every address that is reached over the Internet: not private, loopback or link-local, not
#: shared, reserved or multicast.
PUBLIC: Final = "public"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Reaches the IPv4 address in the last 32 bits (RFC 6052).
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

#: What the Internet has of IPv6 (RFC 4291 section 2.4, IANA).  Python takes more for global:
#: site-local addresses (RFC 3879), IPv4 in ::/96 and ::ffff:0:0:0/96, NAT64 within a site
#: (RFC 8215), and documentation (RFC 9637).
_ASSIGNED: Final = ipaddress.IPv6Network("2000::/3")
_DOCUMENTATION: Final = ipaddress.IPv6Network("3fff::/20")


def check_networks(networks: Iterable[str]) -> tuple[str, ...]:
    """Return the networks, each ``public`` or an address range, as `ipaddress` writes it.

    Raises ValueError, which names the value.
    """
    found = []
    for network in networks:
        text = network.strip()
        if text != PUBLIC:
            try:
                text = str(ipaddress.ip_network(text))
            except ValueError as error:
                rule = f"is neither {PUBLIC!r} nor a network"
                raise ValueError(f"{network!r} {rule}: {error}") from None
        found.append(text)
    return tuple(dict.fromkeys(found))


def is_within(address: str, networks: Iterable[str]) -> bool:
    """Tell whether an IP address is in one of the networks of `check_networks`."""
    meant = _meant(ipaddress.ip_address(address))
    return any(
        _is_public(meant) if network == PUBLIC else meant in ipaddress.ip_network(network)
        for network in networks
    )


def _meant(address: _Address) -> _Address:
    """Return the IPv4 address that an IPv6 address only wraps, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else address)


def _is_public(address: _Address) -> bool:
    if address.version == 6 and (address not in _ASSIGNED or address in _DOCUMENTATION):
        return False
    return address.is_global and not address.is_multicast
