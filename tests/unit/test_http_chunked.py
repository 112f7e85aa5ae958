"""The chunked transfer coding by itself (RFC 9112 section 7.1)."""

from __future__ import annotations

import pytest
from gunicorn.http.errors import (
    ChunkMissingTerminator,
    InvalidChunkSize,
    InvalidHeader,
    LimitRequestHeaders,
)

from gunicorn_passenger.http.chunked import (
    LAST_CHUNK,
    TRAILER_LIMIT,
    ChunkedDecoder,
    InvalidChunkExtension,
    chunk_line,
    encode_chunk,
    last_chunk,
)
from gunicorn_passenger.http.grammar import LENIENT_CHUNK_LINE_BYTES

LIMIT = 40


def decode(stream: bytes, size: int) -> tuple[bytes, ChunkedDecoder]:
    """Feed a stream in parts of this size."""
    decoder = ChunkedDecoder(LIMIT)
    content = b""
    for at in range(0, len(stream), size):
        content += decoder.feed(stream[at : at + size])
        if decoder.finished:
            break
    return content, decoder


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_what_is_encoded_is_decoded(size):
    stream = encode_chunk(b"hello") + chunk_line(6) + b" world\r\n" + last_chunk(b"X-A: 1\r\nX-B: 2\r\n")
    content, decoder = decode(stream, size)
    assert content == b"hello world"
    assert decoder.finished
    assert decoder.trailer_section == b"X-A: 1\r\nX-B: 2\r\n"
    assert decoder.rest == b""


def test_an_end_without_trailers():
    assert last_chunk(b"") == LAST_CHUNK
    content, decoder = decode(LAST_CHUNK + b"GET", 100)
    assert (content, decoder.finished, decoder.trailer_section, decoder.rest) == (b"", True, b"", b"GET")


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"5\nhello\r\n", InvalidChunkSize),
        (b"\r\n", InvalidChunkSize),
        (b"g\r\n", InvalidChunkSize),
        (b"0x5\r\n", InvalidChunkSize),
        (b"8000000000000000\r\n", InvalidChunkSize),
        (b"5;=\r\n", InvalidChunkExtension),
        (b'5;a="\r\n', InvalidChunkExtension),
        (b"5;" + b"a" * (LIMIT - 1) + b"\r\n", InvalidChunkSize),
        (b"5" * 1000, InvalidChunkSize),
        (b"1\r\naX\r\n", ChunkMissingTerminator),
        (b"1\r\na\n0\r\n", ChunkMissingTerminator),
        (b"0\r\nX: 1\n", InvalidHeader),
        (b"0\r\n\n", InvalidHeader),
        (b"0\r\nX: " + b"a" * TRAILER_LIMIT + b"\r\n\r\n", LimitRequestHeaders),
    ],
)
def test_malformed_framing_is_refused_however_it_arrives(stream, error, size):
    with pytest.raises(error):
        decode(stream, size)


@pytest.mark.parametrize("size", [1, 1000])
def test_a_chunk_line_of_the_limit_is_read(size):
    line = b"5;" + b"a" * (LIMIT - 2)
    assert len(line) == LIMIT
    content, decoder = decode(line + b"\r\nhello\r\n" + LAST_CHUNK, size)
    assert content == b"hello"
    assert decoder.finished


def test_the_extensions_of_servers_are_ignored():
    decoder = ChunkedDecoder(LIMIT, LENIENT_CHUNK_LINE_BYTES)
    assert decoder.feed(b"5; what ever=\r\nhello\r\n" + LAST_CHUNK) == b"hello"
    assert decoder.finished


def test_a_caller_that_takes_the_content_itself():
    stream = encode_chunk(b"hello") + LAST_CHUNK + b"GET"
    decoder = ChunkedDecoder(LIMIT)
    at = decoder.advance(stream, 0)
    assert (stream[at : at + 5], decoder.left) == (b"hello", 5)
    decoder.consume(2)
    assert decoder.advance(stream, at + 2) == at + 2
    decoder.consume(3)
    at = decoder.advance(stream, at + 5)
    assert decoder.finished
    assert stream[at:] == b"GET"
