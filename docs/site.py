"""A server to try gpuckpt with: says who it is, and a random number that no clone shares with another."""

import http.server
import random
import socketserver
import sys

from gpuckpt_guest import lifecycle  # on PYTHONPATH in every container of gpuckpt


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        identity = lifecycle.identity()  # None while no replica was restored
        name = identity.replica if identity else "nobody yet"
        number = random.random() if self.path == "/number" else 0
        body = f"{name}: {number}\n".encode() if self.path in ("/who", "/number") else b"ok\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "a Unix socket"  # it has no address of its own


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


Server(sys.argv[1], Site).serve_forever()
