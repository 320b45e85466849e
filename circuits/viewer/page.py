"""The page of a run: one HTML file of the payload and the prebuilt script and style of `viewer/` in the repository.

It needs no network and asks for none. Its content security policy allows no request, and no script or style but its
own two, by their hashes. The payload stands in a script element that is not run; `<` is escaped in it, so that no text
of a prompt, token or label can end the element.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 does not have
HOSTS = ("127.0.0.1", "localhost")


def render(payload: Mapping[str, Any]) -> str:
    """The whole page as HTML; `payload` as circuits.viewer.payload makes it."""
    dist = files("circuits.viewer").joinpath("dist")
    script, style = (dist.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(payload, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = SURROGATE.sub("\ufffd", text.replace("<", "\\u003c"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(SURROGATE.sub(chr(0xFFFD), str(payload['title'])))}</title>\n<style>{style}</style>\n"
        '</head>\n<body>\n<div id="app"></div>\n'
        "<noscript>This page draws with JavaScript, which is off; the run holds its numbers as Parquet.</noscript>\n"
        f'<script type="application/json" id="payload">{text}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def server(page: str, port: int = 0) -> ThreadingHTTPServer:
    """A server of this one page on loopback, not started yet; port 0 takes a free one.

    A request under another host's name is refused, so that no site open in the same browser can read the page.
    """
    body = page.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            status = HTTPStatus.OK if host in HOSTS and self.path == "/" else HTTPStatus.NOT_FOUND
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if status is HTTPStatus.OK:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is logged."""

    return ThreadingHTTPServer((HOSTS[0], port), Handler)
