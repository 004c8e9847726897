"""No special address is public: each range of IANA's registries, at both ends, and each way to wrap an IPv4 address."""

from __future__ import annotations

import ipaddress

import pytest

from clip_batch.storage.addresses import is_public

REGISTRIES = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29
192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.0.192/32 192.0.2.0/24 192.31.196.0/24
192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4
240.0.0.0/4 255.255.255.255/32 168.63.129.16/32 100.100.100.200/32 169.254.169.254/32
::1/128 ::/128 ::/96 ::ffff:0:0/96 ::ffff:0:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23
2001::/32 2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28
2001:30::/28 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8
fd00:ec2::254/128 4000::/3 6000::/3 8000::/3 a000::/3 c000::/3 e000::/4
"""

PUBLIC = """1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 168.63.129.15
168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.31.195.255
192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 203.0.114.0 223.255.255.255 2001:200::1
2001:4860:4860::8888 2001:db7:ffff::1 2001:db9::1 2003::1 2606:4700::1111 2620:4f:7fff::1 2a00:1450::1 3ffe:ffff::1"""


@pytest.mark.parametrize("network", REGISTRIES.split())
def test_special_ranges(network: str) -> None:
    ends = ipaddress.ip_network(network)
    for address in (ends[0], ends[ends.num_addresses // 2], ends[-1]):
        assert not is_public(str(address)), address
        if address.version == 4:
            assert not any(map(is_public, wrapped(address)))


@pytest.mark.parametrize("address", PUBLIC.split())
def test_the_internet(address: str) -> None:
    assert is_public(address)


def test_no_wrapped_address_is_public_whatever_it_wraps() -> None:
    assert not any(map(is_public, wrapped(ipaddress.IPv4Address("8.8.8.8"))))


def wrapped(address: ipaddress.IPv4Address) -> list[str]:
    """Return the IPv6 addresses that routers, or systems, take for an IPv4 address."""
    number = int(address)
    half = f"{number >> 16:x}:{number & 0xFFFF:x}"
    prefixes = ("::", "::ffff:", "::ffff:0:", "64:ff9b::", "64:ff9b:1::", "64:ff9b:1:2:3:4:")
    teredo = ipaddress.IPv6Address((0x20010000 << 96) | (number ^ 0xFFFFFFFF))
    return [prefix + half for prefix in prefixes] + [f"2002:{half}::1", f"2001:0:{half}::1", str(teredo)]
