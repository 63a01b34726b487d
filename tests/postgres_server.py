"""A real PostgreSQL server, for tests and `make bench`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psycopg

from cpsmailaccess_delivery.pg.connections import Connections
from cpsmailaccess_delivery.pg.schema import upgrade

DEADLINE = 60.0  # seconds until somebody gives up waiting

_BINARIES = (Path("/usr/lib/postgresql/15/bin"), *Path("/usr/lib/postgresql").glob("*/bin"))

#: Nothing of a test outlives the machine, so nothing waits for its disk; the death of the server's
#: processes loses nothing all the same.
FOR_TESTS = {"fsync": "off", "shared_buffers": "32MB", "autovacuum": "off"}


def why_none() -> str:
    """Return why no server can be started here; "": one can."""
    if not any((path / "initdb").exists() for path in _BINARIES):
        return "PostgreSQL is not installed (Debian: postgresql-15)"
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return "PostgreSQL does not run as root, and there is no runuser"
    return ""


class Server:
    """A cluster of its own on a free port, run by a user who is not root.

    `settings`: of postgresql.conf.  `parent`: where its directory is made.  `namespace`: the
    network namespace it listens in, at all addresses; its socket is there for everybody.
    """

    def __init__(
        self,
        settings: Mapping[str, str] = FOR_TESTS,
        *,
        parent: Path | None = None,
        namespace: str = "",
    ) -> None:
        self._binaries = next(path for path in _BINARIES if (path / "initdb").exists())
        self.directory = Path(tempfile.mkdtemp(prefix="cpsmail-postgres-", dir=parent))
        self.port = _free_port()
        self._as_user = ["ip", "netns", "exec", namespace] if namespace else []
        if os.geteuid() == 0:
            self._as_user += ["runuser", "-u", "postgres", "--"]
            shutil.chown(self.directory, "postgres")
        self._databases = 0
        self._clean: list[str] = []  # databases with the schema and nothing in it
        data = str(self.directory / "data")
        self._call("initdb", "-D", data, "-U", "cpsmail", "--auth=trust", "-E", "UTF8", "--no-sync")
        with self.psql_settings().open("a") as stream:
            stream.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
            stream.write(f"port = {self.port}\nunix_socket_directories = '{self.directory}'\n")
            stream.write(f"listen_addresses = '{'*' if namespace else '127.0.0.1'}'\n")
            stream.write("max_connections = 200\n")
        if namespace:
            with (self.directory / "data" / "pg_hba.conf").open("a") as stream:
                stream.write("host all all 10.0.0.0/8 trust\n")
        self.start()
        connections = Connections(self.local_url("postgres"))
        upgrade(connections)
        connections.close()
        self._do('ALTER DATABASE postgres RENAME TO "template"', "template1")

    def psql_settings(self) -> Path:
        return self.directory / "data" / "postgresql.conf"

    def url(self, database: str, host: str = "127.0.0.1") -> str:
        return f"postgresql://cpsmail@{host}:{self.port}/{database}"

    def local_url(self, database: str) -> str:
        """Return a URL that reaches it from any namespace of this machine."""
        return f"postgresql://cpsmail@/{database}?host={self.directory}&port={self.port}"

    def new_database(self, *, empty: bool = False) -> str:
        """Return the URL of a new database, with the schema unless it shall be empty."""
        if self._clean and not empty:
            return self._clean.pop()
        self._databases += 1
        name = f"test{self._databases}"
        self._do(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else 'template'}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        self._do(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def clean(self, url: str) -> None:
        """Empty a database, for the next test: many times faster than to make one."""
        name = url.rpartition("/")[2]
        self._do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{name}' AND pid <> pg_backend_pid()"
        )
        with psycopg.connect(self.local_url(name)) as connection:
            tables = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'cpsmail'"
                " AND tablename <> 'version'"
            ).fetchall()
            for (table,) in tables:
                connection.execute(f"DELETE FROM cpsmail.{table}")
        self._clean.append(url)

    def start(self) -> None:
        log = str(self.directory / "log")
        self._call("pg_ctl", "-D", str(self.directory / "data"), "-w", "-l", log, "start")

    def kill(self) -> None:
        """Let the server die at once, as in an accident."""
        process = self._process()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + DEADLINE
        while any(map(_is_there, (process, *map(int, children)))):  # else none can be started
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill_one(self) -> None:
        """Let one of its processes die: all others end with it, and it begins anew by itself."""
        query = (
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
        )
        with psycopg.connect(self.local_url("template1"), autocommit=True) as connection:
            found = connection.execute(query).fetchone()
            if found is None:
                return
            os.kill(found[0], signal.SIGKILL)
            try:
                connection.execute("SELECT pg_sleep(%s)", [DEADLINE])
            except psycopg.OperationalError:
                pass

    def recover(self) -> None:
        """Be there again, however it died."""
        if not _is_there(self._process()):
            self.start()
        deadline = time.monotonic() + DEADLINE
        while not self.is_running():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _process(self) -> int:
        """Return the id of the first of its processes; 0: it was stopped."""
        path = self.directory / "data" / "postmaster.pid"
        return int(path.read_text().splitlines()[0]) if path.exists() else 0

    def is_running(self) -> bool:
        try:
            psycopg.connect(self.local_url("template1"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        self._call("pg_ctl", "-D", str(self.directory / "data"), "-m", "immediate", "-w", "stop")

    def standby(self) -> Standby:
        """Start one that has all this server has, before a commit returns."""
        made = Standby(self)
        self._do("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self._do("SELECT pg_reload_conf()")
        deadline = time.monotonic() + DEADLINE
        with psycopg.connect(self.local_url("template1"), autocommit=True) as connection:
            query = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            while connection.execute(query).fetchone() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        return made

    def remove(self) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _do(self, statement: str, database: str = "template1") -> None:
        with psycopg.connect(self.local_url(database), autocommit=True) as connection:
            connection.execute(statement)

    def _call(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._as_user, str(self._binaries / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            timeout=DEADLINE,
            cwd="/",
            check=False,
        )
        assert done.returncode == 0, (program, done.stdout, done.stderr)


class Standby(Server):
    """Follows another server, from a copy of it, until it is promoted."""

    def __init__(self, primary: Server) -> None:
        self._binaries = primary._binaries
        self._as_user = primary._as_user
        self.directory = Path(tempfile.mkdtemp(prefix="cpsmail-postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self.directory, "postgres")
        self.port = _free_port()
        source = primary.local_url("template1")
        data = str(self.directory / "data")
        self._call("pg_basebackup", "-D", data, "-d", source, "-R", "-c", "fast", "--no-sync")
        with self.psql_settings().open("a") as stream:
            stream.write(f"port = {self.port}\nunix_socket_directories = '{self.directory}'\n")
        self.start()

    def promote(self) -> None:
        """Be the primary from now on."""
        self._call("pg_ctl", "-D", str(self.directory / "data"), "-w", "promote")


def _is_there(process: int) -> bool:
    if not process:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
