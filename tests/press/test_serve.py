"""The built site on a port of this machine."""

import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from paperbook.errors import MACHINE, USAGE, PressError
from paperbook.serve import server


@pytest.fixture
def html(tiny_book):
    folder = tiny_book / "_build" / "html"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text("a book")
    return folder


def get(port):
    # No proxy: the address is this machine's.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/")


def test_a_free_port_on_this_machine_only(html):
    with server(html) as running, server(html) as another:
        assert running.server_port != another.server_port
        assert running.server_address[0] == "127.0.0.1"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with get(running.server_port) as answer:
            assert answer.read() == b"a book"
            assert answer.headers["Cache-Control"] == "no-cache"
        running.shutdown()


def test_a_port_that_is_taken(html):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PressError, match=rf"port {port} .*in use.*--port, or none") as caught:
            server(html, port)
    assert caught.value.code == MACHINE


def test_no_site_yet(tmp_path):
    with pytest.raises(PressError, match="paperbook build") as caught:
        server(tmp_path)
    assert caught.value.code == USAGE


def test_the_command_says_where_and_ends_with_ctrl_c(html, tiny_book):
    command = [sys.executable, "-m", "paperbook", "serve"]
    with subprocess.Popen(command, cwd=tiny_book, stdout=subprocess.PIPE, text=True) as running:
        port = re.match(r"http://127\.0\.0\.1:(\d+)/", running.stdout.readline())[1]
        with get(port) as answer:
            assert answer.read() == b"a book"
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
