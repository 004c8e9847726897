"""Which IP addresses belong to the internet, for whoever fetches what strangers name.

Python's `is_global` is not enough: what it says depends on the version, and it takes for public what routers translate
to private addresses. `SPECIAL` has all of IANA's special-purpose registries (RFC 6890, as of 2025-10), also what they
call globally reachable, as none of it is where images are.
"""

from __future__ import annotations

import ipaddress

SPECIAL_V4 = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # shared by carriers' customers; Alibaba's metadata service
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # Azure's own service in each of its machines; in no registry
    "169.254.0.0/16",  # link-local; metadata services
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
    "192.0.2.0/24",  # documentation
    "192.31.196.0/24",  # AS112
    "192.52.193.0/24",  # AMT relays
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",  # private
    "192.175.48.0/24",  # AS112
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
)

SPECIAL_V6 = (
    "::/3",  # loopback, discard-only, and IPv4 addresses as compatible, mapped, translated or NAT64 ones
    "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4
    "2620:4f:8000::/48",  # AS112
    "3fff::/20",  # documentation
    "4000::/2",  # not assigned; segment routing
    "8000::/1",  # not assigned; unique local, link-local, site-local, multicast
)
"""All but 2000::/3, from which alone addresses are assigned, and what is special in it."""

_SPECIAL = {version: tuple(map(ipaddress.ip_network, ranges)) for version, ranges in ((4, SPECIAL_V4), (6, SPECIAL_V6))}


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and is neither special nor a wrapped IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.is_global and not any(ip in network for network in _SPECIAL[ip.version])
