"""A server whose memory is on a toy GPU: ``gpu_server.py SOCKET GPUS MIB``; its child holds as much.

A toy GPU is a folder, what a process holds there a file. What NVIDIA's driver does to a process when it is asked to,
signals do here (tests/integration/toy_gpu.py sends them): afterwards the file is gone, its bytes are memory of the
process, and /dev/nvidiactl is closed. Requests wait while the process is locked, as CUDA calls would.
"""

import contextlib
import hashlib
import http.server
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from typing import IO

STATES = {1: "locked", 2: "checkpointed", 3: "locked", 4: "running"}


class Holder:
    """Device memory of this process."""

    def __init__(self, gpus: str, mib: int) -> None:
        self.gpus, self.gpu = gpus, sorted(os.listdir(gpus))[0]
        self.state, self.kept, self.answers = "running", b"", 0
        self.control = os.open("/dev/nvidiactl", os.O_RDONLY)
        self.unlocked = threading.Event()
        self.unlocked.set()
        with open(self.path(), "wb") as file:
            seed = hashlib.sha256(str(os.getpid()).encode()).digest()
            file.write(seed * (mib * (1 << 20) // len(seed)))
        for number in range(1, 6):
            signal.signal(signal.SIGRTMIN + number, self.asked)

    def path(self) -> str:
        # The driver's handles are the process' own; here a name stands for them that no two replicas share.
        return f"{self.gpus}/{self.gpu}/{socket.gethostname()}-{os.getpid()}"

    def asked(self, number: int, frame: object) -> None:
        step = number - signal.SIGRTMIN
        if step == 1:
            self.unlocked.clear()
        elif step == 2:
            with open(self.path(), "rb") as file:
                self.kept = file.read()
            os.unlink(self.path())
            os.close(self.control)
        elif step == 3:
            with contextlib.suppress(FileNotFoundError), open(f"/run/gpuckpt/toy-{os.getpid()}.map") as file:
                self.gpu = json.load(file).get(self.gpu, self.gpu)
            self.control = os.open("/dev/nvidiactl", os.O_RDONLY)
            with open(self.path(), "wb") as file:
                file.write(self.kept)
            self.kept = b""
        elif step == 4:
            self.unlocked.set()
        self.state = STATES.get(step, self.state)
        self.answers += 1
        fresh = f"/run/gpuckpt/toy-{os.getpid()}.new"
        with open(fresh, "w") as file:
            json.dump({"state": self.state, "gpu": self.gpu, "number": self.answers}, file)
        os.rename(fresh, fresh.replace(".new", ".json"))

    def digest(self) -> str:
        self.unlocked.wait()
        with open(self.path(), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def wait_for_signals() -> None:
    """The main thread runs their handlers; one that comes just before a pause would wait for the next."""
    while True:
        time.sleep(0.01)


def answer_parent(holder: Holder) -> None:
    for _ in sys.stdin:
        print(holder.digest(), flush=True)
    os._exit(0)


def main() -> None:
    gpus, mib = sys.argv[2], int(sys.argv[3])
    holder = Holder(gpus, mib)
    if sys.argv[1] == "child":
        threading.Thread(target=answer_parent, args=(holder,), daemon=True).start()
        wait_for_signals()
    child = subprocess.Popen(
        [sys.executable, __file__, "child", gpus, str(mib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    assert child.stdin is not None and child.stdout is not None
    asking: IO[str] = child.stdin
    answering: IO[str] = child.stdout

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = "well"
            if self.path == "/digest":
                asking.write("digest\n")
                asking.flush()
                answer = f"{holder.digest()} {answering.readline().strip()}"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def address_string(self) -> str:
            return "somebody"

    server = Server(sys.argv[1], Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wait_for_signals()


main()
