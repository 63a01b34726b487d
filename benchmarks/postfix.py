"""Postfix: an instance of its own, as Debian ships it, below the directory of the run.

Nothing of the system's instance is read or changed but its master.cf, which is the model of
ours.  Mails are queued with the queue manager switched off, then Postfix is started with it.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from .mails import message, password_of, recipient_of, sender_of

NAME = "Postfix"

_TICK = os.sysconf("SC_CLK_TCK")
_MASTER = Path("/usr/share/postfix/master.cf.dist")


def available() -> str:
    """Return why Postfix cannot take part, or ""."""
    if not shutil.which("postfix", path="/usr/sbin:/usr/bin:/sbin"):
        return "the package postfix is not installed: benchmarks/install-postfix"
    return "" if os.geteuid() == 0 else "Postfix needs root"


class Contender:
    """See `ours.Contender`."""

    def __init__(
        self,
        place: Path,
        *,
        ports: list[int],
        size: int = 4096,
        ca_file: str = "",
        connections: int | None = None,
        **_: Any,
    ) -> None:
        self.place = place
        self._size = size
        self._port = _free_port()
        self._config = place / "etc"
        for name in ("etc", "queue", "data"):
            (place / name).mkdir()
        shutil.chown(place / "data", "postfix")
        self._write_main(ports, ca_file, connections)

    def fill(self, mails: list[tuple[int, int]], connections: int = 8) -> None:
        self._write_master(queue_manager=False)
        self._run("start")
        parts = [mails[at::connections] for at in range(connections)]
        threads = [threading.Thread(target=self._submit, args=(part,)) for part in parts if part]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._run("stop")
        if self._left() != len(mails):
            raise RuntimeError(f"Postfix has {self._left()} of {len(mails)} mails")

    def start(self) -> float:
        self._write_master(queue_manager=True)
        begun = time.monotonic()
        self._run("start")
        return begun

    def commit_slowly(self, count: int, gap: float) -> dict[int, list[float]]:
        times: dict[int, list[float]] = {}
        chance = random.Random(1)
        with _Client(self._port) as client:
            for number in range(count):
                time.sleep(gap * (0.5 + chance.random()))
                begun = time.monotonic()
                client.send(number, 0, self._size)
                times[number] = [begun, time.monotonic()]
        return times

    def commit_quickly(self, count: int) -> float:
        """Return mails per second that one connection hands over."""
        with _Client(self._port) as client:
            begun = time.perf_counter()
            for number in range(count):
                client.send(number, 0, self._size)
            return count / (time.perf_counter() - begun)

    def start_without_manager(self) -> None:
        self._write_master(queue_manager=False)
        self._run("start")

    def finish(self) -> dict[str, Any]:
        cpu = self._cpu()
        time.sleep(0.5)  # a stop may come between acceptance and removal
        self._run("stop")
        return {"cpu": cpu, "left": self._left()}

    def _submit(self, mails: list[tuple[int, int]]) -> None:
        with _Client(self._port) as client:
            for number, lane in mails:
                client.send(number, lane, self._size)

    def _run(self, command: str) -> None:
        subprocess.run(
            ["/usr/sbin/postfix", "-c", self._config, command],
            check=True,
            capture_output=True,
            timeout=60,
        )
        if command == "stop":
            return
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("Postfix does not listen")

    def _write_main(self, ports: list[int], ca_file: str, connections: int | None) -> None:
        place = self.place
        settings = {
            "compatibility_level": "3.6",
            "queue_directory": place / "queue",
            "data_directory": place / "data",
            "command_directory": "/usr/sbin",
            "daemon_directory": "/usr/lib/postfix/sbin",
            "mail_owner": "postfix",
            "setgid_group": "postdrop",
            "myhostname": "postfix.example",
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "mydestination": "",
            "mynetworks": "127.0.0.0/8",
            "alias_maps": "",
            "smtpd_relay_restrictions": "permit_mynetworks, reject",
            "sender_dependent_relayhost_maps": f"texthash:{place}/etc/relayhosts",
            "maillog_file": "/dev/null",
            "maillog_file_prefixes": "/dev",
            "message_size_limit": "100000000",
            "mailbox_size_limit": "0",
        }
        relays = [f"[127.0.0.1]:{port}" for port in ports]
        _write_map(place / "etc/relayhosts", zip(_senders(ports), relays, strict=True))
        if ca_file:
            passwords = [f"user{lane}:{password_of(lane)}" for lane in range(len(ports))]
            _write_map(place / "etc/passwords", zip(_senders(ports), passwords, strict=True))
            settings |= {
                "smtp_tls_wrappermode": "yes",
                "smtp_tls_security_level": "secure",
                "smtp_tls_secure_cert_match": "127.0.0.1",
                "smtp_tls_CAfile": ca_file,
                "smtp_sender_dependent_authentication": "yes",
                "smtp_sasl_auth_enable": "yes",
                "smtp_sasl_password_maps": f"texthash:{place}/etc/passwords",
                "smtp_sasl_security_options": "noanonymous",
                "smtp_sasl_tls_security_options": "noanonymous",
            }
        if connections:
            settings |= {
                "smtp_destination_concurrency_limit": connections,
                "initial_destination_concurrency": connections,
            }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (self._config / "main.cf").write_text("".join(lines))

    def _write_master(self, *, queue_manager: bool) -> None:
        model = _MASTER if _MASTER.exists() else Path("/etc/postfix/master.cf")
        lines = []
        for line in model.read_text().splitlines():
            if re.match(r"smtp\s+inet", line):
                line = f"127.0.0.1:{self._port} inet n - n - - smtpd"
                if not queue_manager:  # else mails come in as slowly as they leave
                    line += "\n  -o in_flow_delay=0"
            elif re.match(r"cleanup\s", line) and not queue_manager:
                line += "\n  -o in_flow_delay=0"
            elif re.match(r"qmgr\s", line) and not queue_manager:
                continue
            lines.append(re.sub(r"^(\w\S*\s+\S+\s+\S+\s+\S+\s+)[y-](\s)", r"\1n\2", line))
        (self._config / "master.cf").write_text("\n".join(lines) + "\n")

    def _left(self) -> int:
        queues = ("maildrop", "incoming", "active", "deferred", "hold", "corrupt")
        return sum(
            len(files) for queue in queues for _, _, files in os.walk(self.place / "queue" / queue)
        )

    def _cpu(self) -> float:
        """Return CPU seconds of the master, its living children, and those that have ended."""
        master = (self.place / "queue/pid/master.pid").read_text().strip()
        total = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if path.parent.name == master:
                total += sum(map(int, fields[11:15]))
            elif fields[1] == master:
                total += sum(map(int, fields[11:13]))
        return total / _TICK


class _Client:
    """A connection to smtpd that hands mails over, one at a time, in two groups."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> _Client:
        self._socket = socket.create_connection(("127.0.0.1", self._port), 60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        self._expect(b"220")
        self._socket.sendall(b"EHLO bench\r\n")
        self._expect(b"250")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, number: int, lane: int, size: int) -> None:
        envelope = f"MAIL FROM:<{sender_of(lane)}>\r\nRCPT TO:<{recipient_of(number)}>\r\nDATA\r\n"
        self._socket.sendall(envelope.encode())
        for code in (b"250", b"250", b"354"):
            self._expect(code)
        data = message(number, lane, size).replace(b"\n", b"\r\n").replace(b"\r\n.", b"\r\n..")
        self._socket.sendall(data + b".\r\n")
        self._expect(b"250")

    def _expect(self, code: bytes) -> None:
        while (line := self._file.readline())[3:4] == b"-":
            pass
        if not line.startswith(code):
            raise RuntimeError(f"Postfix says {line!r}")


def _senders(ports: list[int]) -> list[str]:
    return [sender_of(lane) for lane in range(len(ports))]


def _write_map(path: Path, pairs: Any) -> None:
    path.write_text("".join(f"{key} {value}\n" for key, value in pairs))
    path.chmod(0o600)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
