"""Answers with bytes that clients may ask for in part, or only if they have changed (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastapi import Request, Response

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def unchanged(request: Request, tag: str) -> bool:
    """Whether a request's If-None-Match names the tag of what it would get."""
    given = request.headers.get("if-none-match", "")
    return any(one.strip().removeprefix("W/") in (tag, "*") for one in given.split(","))


def answer(request: Request, data: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    """Return the bytes, or the range of them that the request asks for; `headers` have their etag.

    Of several ranges, or of what is no range of bytes, all is answered. 416: the range begins behind the end.
    """
    size, all_headers = len(data), {**headers, "accept-ranges": "bytes"}
    match = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if (
        match is None
        or not (match[1] or match[2])
        or request.headers.get("if-range", headers["etag"]) != headers["etag"]
    ):
        return Response(data, media_type=media_type, headers=all_headers)
    first = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if match[1] and match[2] and int(match[2]) < first:
        return Response(data, media_type=media_type, headers=all_headers)
    if first >= size or (not match[1] and not int(match[2])):
        return Response(status_code=416, headers={**all_headers, "content-range": f"bytes */{size}"})
    all_headers["content-range"] = f"bytes {first}-{last}/{size}"
    return Response(data[first : last + 1], 206, media_type=media_type, headers=all_headers)
