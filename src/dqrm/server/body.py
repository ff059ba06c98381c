"""The body of a request: its bytes, within limits of size and time, and JSON that is strictly JSON."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from dqrm.server.errors import ClientGone, Refusal

Receive = Callable[[], Awaitable[Any]]
# Of a body that is too large, as much is read and thrown away before the answer: most clients read it only then.
_DISCARDED = 1 << 26


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, seconds: float) -> bytes:
    """All bytes of a request's body.

    Args:
        limit: bytes, at most. seconds: that the client has to send them.

    Raises:
        Refusal: more bytes (413), later (408), or compressed (415). ClientGone: it hung up.
    """
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if coding != "identity":
        raise Refusal(415, f"content-encoding is {coding[:40]!r}, expected a body that is not compressed", close=True)
    try:
        async with asyncio.timeout(seconds):
            return await _read(receive, limit)
    except TimeoutError:
        raise Refusal(
            408, f"the request's body was not complete after {seconds:g} seconds, expected it sooner", close=True
        ) from None


async def _read(receive: Receive, limit: int) -> bytes:
    pieces: list[bytes] = []
    total, more = 0, True
    while more and total <= limit + _DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        total += len(piece)
        more = message.get("more_body", False)
        if total <= limit:
            pieces.append(piece)
        else:
            pieces.clear()
    if total > limit:
        raise Refusal(413, f"the request's body has more than {limit} bytes, which is the most", close=True)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON, expected a finite one, or null where a value is missing")


_DECODER = json.JSONDecoder(parse_constant=_constant)


def parse_json(data: bytes, what: str = "the request's body") -> Any:
    """The value of JSON text in UTF-8.

    Raises:
        Refusal: it is not JSON: NaN and Infinity are not; nested too deeply; text that is no Unicode.
    """
    try:
        value = _DECODER.decode(data.decode())
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        why = "it is not UTF-8"
    except UnicodeEncodeError:
        why = "it holds half of a surrogate pair"
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos + 1}" if data else "it is empty"
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:
        digits = "digit" in str(error)
        why = "it holds a whole number with thousands of digits" if digits else str(error)
    else:
        return value
    raise Refusal(400, f"{what} is not valid JSON: {why}")
