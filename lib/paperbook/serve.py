"""Serve the built site on this machine, and only to it."""

import functools
import http.server
from pathlib import Path

from paperbook.errors import MACHINE, USAGE, PressError


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Says nothing about each file, and lets browsers ask again after a rebuild."""

    def log_message(self, *args: object) -> None:
        """Keep the terminal for what matters."""

    def end_headers(self) -> None:
        """Without this a browser shows yesterday's page."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def server(html: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server on the loopback interface, at ``port`` or any free one; it listens already.

    Raises:
        PressError: there is no site yet, or the port cannot be had.
    """
    if not (html / "index.html").is_file():
        raise PressError(f"no site in {html}: run `python -m paperbook build` first", USAGE)
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=html))
    except OSError as error:
        raise PressError(
            f"port {port} cannot be used ({error.strerror}): choose another with --port, or none to get a free one",
            MACHINE,
        ) from None


def serve(html: Path, port: int = 0) -> None:
    """Serve until Ctrl-C."""
    with server(html, port) as running:
        print(f"http://127.0.0.1:{running.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()
