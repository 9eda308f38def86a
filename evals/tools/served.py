"""A running `pykvc serve` and a few HTTP calls of it."""
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path


class Server:
    """`pykvc serve`, or another llama-server (program), on a free port of this machine; log is a file."""

    def __init__(self, log: Path, *args, env: dict[str, str] | None = None, program: str | Path | None = None) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = log
        command = [*([program] if program else [Path(sys.executable).parent/"pykvc", "serve"]), "--port", self.port,
                   "--host", "127.0.0.1", "--no-warmup", "-t", 2, *args]
        with open(log, "wb") as out:
            self.process = subprocess.Popen([str(arg) for arg in command], stdout=out, stderr=out,
                                            env={**os.environ, **(env or {})})

    def wait(self) -> "Server":
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                if self.get("/health")[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def request(self, method: str, path: str, body: bytes | None = None, timeout: float = 120):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def get(self, path: str):
        connection, response = self.request("GET", path)
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text[:1] in ("{", "[") else text

    def post(self, path: str, body) -> tuple[int, dict]:
        """(status, reply). body: JSON, or raw bytes."""
        connection, response = self.request("POST", path,
                                            body if isinstance(body, bytes) else json.dumps(body).encode())
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text)

    def ok(self, path: str, body=None) -> dict:
        status, reply = self.get(path) if body is None else self.post(path, body)
        assert status == 200, reply
        return reply

    def stream(self, path: str, body: dict):
        """(connection, its events as they come)."""
        connection, response = self.request("POST", path, json.dumps({**body, "stream": True}).encode())
        assert response.status == 200, response.read()

        def events():
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])
        return connection, events()

    def __enter__(self) -> "Server":
        return self.wait()

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Its exit status after SIGTERM."""
        self.process.terminate()
        return self.process.wait(timeout=30)
