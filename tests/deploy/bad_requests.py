"""Requests that a gateway must not pass on."""

from __future__ import annotations

# With the status that each is refused with.
PATHS = [
    ("/v2/repository/index", 403),
    ("/v2/models/stats", 403),
    ("/v2/models/tile_classifier/stats", 403),
    ("/v2/models/tile_classifier/trace/setting", 403),
    ("/v2/trace/setting", 403),
    ("/v2/logging", 403),
    ("/v2/systemsharedmemory/status", 403),
    ("/v2/models/tile_classifier/generate", 403),
    ("/v2/models/../repository/index", 403),
    ("/v2/models/tile_classifier/../../repository/index", 403),
    ("/v2/health/../models/tile_classifier", 403),
    ("/v2/models/%2e%2e/repository/index", 403),
    ("/v2/models/..%2frepository%2findex", 403),
    ("/v2/models/%252e%252e/repository/index", 403),
    ("/v2//models/tile_classifier", 403),
    ("//v2/models/tile_classifier", 403),
    ("/v2/models/tile_classifier?x=1", 403),
    ("/v2/models/tile_classifier%0d%0aX: y", 400),
    ("/v2/models/tile_classifier%00", 400),
    ("/v2/models/../../../../etc/passwd", 400),
    ("/v2/../../etc/passwd", 400),
    ("/v2\\models", 403),
    ("/metrics", 404),
    ("/", 404),
    ("/V2/models/tile_classifier", 404),
    ("/gateway/health/../supervisor", 404),
    ("http://localhost/v2/repository/index", 403),
    ("http://127.0.0.1:8002/metrics", 404),
    ("*", 400),
    ("/v2/" + 9000 * "a", 414),
]

# What follows the request line, Host and key of a POST.
SMUGGLED = [
    "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v2/repository/index HTTP/1.1\r\n\r\n",
    "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n",
    "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "Content-Length: +5\r\n\r\nhello",
    "Content-Length: 5, 5\r\n\r\nhello",
    "Content-Length: 0x5\r\n\r\nhello",
    "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "Host: other\r\nContent-Length: 0\r\n\r\n",
    "Content-Length : 5\r\n\r\nhello",
    " Content-Length: 5\r\n\r\nhello",
]
