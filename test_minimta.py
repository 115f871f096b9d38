"""Tests of minimta.py, in the order of its sections; the program comes last.

    python3 -m pytest test_minimta.py

Test names are claims.  Dialogues are written with C: for what the client says
and S: for how the server's answer begins.  Nothing here needs an account, a
port below 1024 or the network: every test has its own private instance under
a temporary directory.  What needs root, and is skipped without, says so.
"""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import doctest
import email.header
import email.utils
import fcntl
import hmac
import importlib
import itertools
import json
import os
import pty
import pwd
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tracemalloc
import types
from email import message_from_bytes, message_from_string
from mailbox import mbox
from pathlib import Path

import pytest

import minimta

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "minimta.py"
CRASHES = int(os.environ.get("MINIMTA_TEST_CRASHES", "3"))  # kills
CUTS = int(os.environ.get("MINIMTA_TEST_CUTS", "2"))  # of each file system
SEED = os.environ.get("MINIMTA_TEST_SEED", str(random.randrange(1_000_000)))
AS_ROOT = os.getuid() == 0
PATIENCE = 30  # seconds until a test gives up on something that must happen
HOST = "centos7-1.localdomain"

needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can set this up")


# == 0 The instance: Instance, wait_for, Wire, SmtpSink, Terminal =============
# One private instance for a test, and the things that a test talks to.


def wait_for(predicate, seconds=PATIENCE):
    """The first true value of `predicate()`; fails when it takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = predicate()
        if value:
            return value
        time.sleep(0.02)
    return pytest.fail(f"waited {seconds} s in vain")


_tokens = itertools.count(1)


def new_token():
    """A word that no other message holds."""
    return f"token{os.getpid()}x{next(_tokens)}"


def free_port():
    """A TCP port of 127.0.0.1 that nobody listens on.

    Below the ports that the kernel gives to clients: who calls one of those
    while its server is down can be connected to himself, and hold the port.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(10_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


def open_directory(prefix):
    """A temporary directory that other users may pass through."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    path.chmod(0o755)
    return path


LINKS = ("sendmail", "newaliases", "mailq", "mail", "mailx", "Mail")


def install(python):
    """A directory with minimta.py, pinned to `python`, and its symlinks."""
    path = open_directory("minimta-bin-")
    text = SCRIPT.read_text(encoding="utf-8")
    pinned, count = re.subn(r"(?m)^pinned=$", f"pinned={python}", text, count=1)
    assert count == 1, "minimta.py has no line `pinned=`"
    (path / "minimta.py").write_text(pinned, encoding="utf-8")
    (path / "minimta.py").chmod(0o755)
    for name in LINKS:
        (path / name).symlink_to("minimta.py")
    return path


@pytest.fixture(scope="session")
def bin_dir():
    """minimta.py installed for the Python that runs the tests."""
    path = install(os.path.realpath(sys.executable))
    yield path
    shutil.rmtree(path)


def python_for_everyone():
    """A Python 3.9 or newer that any user may run, or None."""
    check = "import sys, smtplib, dbm, mailbox; sys.exit(sys.version_info < (3, 9))"
    for python in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(python, os.X_OK) and not subprocess.call(
            [python, "-IS", "-c", check]
        ):
            return python
    return None


@pytest.fixture(scope="session")
def public_bin():
    """minimta.py installed for a Python that users other than root can run."""
    python = python_for_everyone()
    if not python:
        pytest.skip("no Python >= 3.9 here that every user may run")
    path = install(python)
    yield path
    shutil.rmtree(path)


def become(user):
    """What a child does first, to run as `user` of an instance's passwd."""

    def drop():
        os.setgroups([])
        os.setgid(UIDS[user])
        os.setuid(UIDS[user])

    return drop


class Result:
    """What a program left: exit code, stdout and stderr as text."""

    def __init__(self, code, out, err):
        self.code = code
        self.out = out.decode("utf-8", "surrogateescape")
        self.err = err.decode("utf-8", "surrogateescape")

    def __repr__(self):
        return f"Result({self.code}, out={self.out!r}, err={self.err!r})"


def assert_one_clear_line(result, code):
    """It failed with `code` and one line `NAME: what is wrong: what to do`."""
    assert result.code == code, result
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) == 1, result
    assert re.match(r"[\w.-]+: .+: .+\n\Z", result.err), result


def read_mbox(data):
    """The messages of a mailbox, with their From_ lines, by our own rules."""
    parts = re.split(r"(?m)^From (?=\S)", data.decode("utf-8", "surrogateescape"))
    assert parts[0] == "", f"the mailbox begins with {parts[0][:60]!r}"
    return ["From " + part for part in parts[1:]]


def head_and_body(message):
    """The header of a mailbox message, unfolded, and its body."""
    head, _, body = message.partition("\n\n")
    return re.sub(r"\n[ \t]+", " ", head), body


def fields(message, name):
    """The values of every header field called `name`."""
    head, _ = head_and_body(message)
    return re.findall(rf"(?im)^{re.escape(name)}:[ \t]*(.*)$", head)


LOCAL_USERS = ("user1", "user2", "payam")
UIDS = {"user1": 5001, "user2": 5002, "payam": 5003}


class Instance:
    """A private instance: a whole mail system under a temporary directory."""

    def __init__(self, bin_dir, below="", **settings):
        self.bin = bin_dir
        self.top = open_directory("minimta-test-")
        self.root = self.top / below
        self.port = free_port()
        self.process = None
        self.sender = "payam"
        self.write_users()
        # No name server of the world is asked: nobody listens there.
        self.write("etc/resolv.conf", "nameserver [127.0.0.1]:9\n")
        self.configure(**settings)
        self.aliases("# none\n")

    # What stands in etc/

    def write_users(self):
        me = pwd.getpwuid(os.getuid()).pw_name
        rows = []
        for name in dict.fromkeys(("root", *LOCAL_USERS, me)):
            home = self.home(name)
            home.mkdir(parents=True)
            uid = UIDS.get(name, 0) if AS_ROOT else os.getuid()
            gid = uid if AS_ROOT else os.getgid()
            os.chown(home, uid, gid)
            rows.append(f"{name}:x:{uid}:{gid}:{name}:{home}:/bin/sh\n")
        self.write("etc/passwd", "".join(rows))

    def configure(self, **settings):
        """Write etc/minimta.conf: what every test has, and `settings`."""
        self.settings = {
            "smtpd_port": self.port,
            "inet_interfaces": "127.0.0.1",
            "myhostname": HOST,
            "mydomain": "localdomain",
            **settings,
        }
        rows = (f"{name} = {value}\n" for name, value in self.settings.items())
        self.write("etc/minimta.conf", "".join(rows))

    def aliases_text(self):
        return (self.root / "etc/aliases").read_text(encoding="utf-8")

    def aliases(self, text):
        """Write etc/aliases, without newaliases."""
        self.write("etc/aliases", text)

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def forward(self, user, text, mode=0o644):
        """Write the user's ~/.forward, owned by the user."""
        path = self.home(user) / ".forward"
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        self.give(path, user)
        return path

    def give(self, path, user):
        """Make `user` the owner, as far as that can be told apart here."""
        if AS_ROOT:
            os.chown(path, UIDS[user], UIDS[user])

    def home(self, user):
        return self.root / "root" if user == "root" else self.root / "home" / user

    # Programs

    def env(self, user=None, **more):
        user = user or self.sender
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home(user)),
            "LOGNAME": user,
            "USER": user,
            "TZ": "UTC",
            "TERM": "dumb",
            "MINIMTA_ROOT": str(self.root),
            **more,
        }

    def run(self, program, *args, stdin="", user=None, env=(), bin_dir=None, **how):
        """Run a program to its end and return its Result."""
        if isinstance(stdin, str):
            stdin = stdin.encode("utf-8", "surrogateescape")
        done = subprocess.run(
            [(bin_dir or self.bin) / program, *map(str, args)],
            input=stdin,
            capture_output=True,
            env=self.env(user, **dict(env)),
            cwd=self.root,
            **{"timeout": PATIENCE, **how},
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def run_by_shell(self, redirection, program, *args):
        """Run a program as a shell does with that redirection."""
        script = f'exec "$0" "$@" {redirection}'
        done = subprocess.run(
            ["/bin/sh", "-c", script, self.bin / program, *args],
            capture_output=True,
            env=self.env(),
            timeout=PATIENCE,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def sendmail(self, *args, stdin="", user=None):
        """Run sendmail, which must succeed in silence."""
        result = self.run("sendmail", *args, stdin=stdin, user=user)
        assert (result.code, result.out, result.err) == (0, "", ""), result

    def mailq(self):
        """What mailq prints."""
        result = self.run("mailq")
        assert result.code == 0, result
        return result.out

    # The daemon

    def start(self, *words, limits=(), env=()):
        """Start `minimta.py serve` in its own process group, until ready."""

        def set_limits():
            for name, value in limits:
                resource.setrlimit(name, (value, value))

        with open(self.root / "serve.stderr", "ab") as stderr:
            self.process = subprocess.Popen(
                [self.bin / "minimta.py", *(words or ("serve",))],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=self.env("root", **dict(env)),
                cwd="/",
                start_new_session=True,
                preexec_fn=set_limits if limits else None,
            )
        wait_for(self.is_ready)
        return self

    def is_ready(self):
        if self.process and self.process.poll() is not None:
            pytest.fail("the daemon ended: " + self.stderr()[-2000:])
        with contextlib.suppress(OSError, AssertionError), Wire(self.port) as wire:
            return wire.answer().startswith("220") and self.submit.exists()
        return False

    def pids(self):
        """Every process that has this instance in its environment."""
        mark = os.fsencode(f"MINIMTA_ROOT={self.root}")
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(int(name))
        return found

    def kill(self):
        """kill -9 of everything, until it is gone."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        wait_for(self.is_swept)

    def is_swept(self):
        found = self.pids()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    def stop(self):
        """SIGTERM to the master; its exit code."""
        self.process.terminate()
        code = self.process.wait(PATIENCE)
        self.process = None
        return code

    def hang_up(self):
        """SIGHUP to the master, and wait until it has read its settings."""
        before = self.log().count("settings read again")
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.log().count("settings read again") > before)

    def close(self):
        self.kill()
        shutil.rmtree(self.top)

    # What is left behind

    @property
    def queue(self):
        return self.root / "var/spool/minimta"

    @property
    def submit(self):
        return self.queue / "submit"

    def queued(self):
        """The names of the accepted messages that are not finished."""
        found = []
        for part in ("maildrop", "queue"):
            if (self.queue / part).is_dir():
                found += os.listdir(self.queue / part)
        return sorted(found)

    def wait_empty(self):
        wait_for(lambda: not self.queued())

    def mailbox(self, user):
        return self.root / "var/mail" / user

    def make_mailbox(self, user, text, mode=0o600):
        """Put a mailbox of the user in place."""
        path = self.mailbox(user)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        self.give(path, user)
        return path

    def messages(self, user):
        """What is in the user's mailbox; nothing if there is none."""
        try:
            return read_mbox(self.mailbox(user).read_bytes())
        except FileNotFoundError:
            return []

    def with_token(self, user, token):
        return [text for text in self.messages(user) if token in text]

    def wait_message(self, user, token):
        """The one message with `token`, as soon as it is there and whole."""
        wait_for(lambda: self.with_token(user, token))
        self.wait_empty()
        (message,) = self.with_token(user, token)
        return message

    def wait_message_only(self, user, token):
        """The one message with `token`, though others may wait."""
        wait_for(lambda: self.with_token(user, token))

    def wait_reason(self, text):
        """mailq's answer, as soon as it holds `text`."""

        def shown():
            answer = self.mailq()
            return answer if text in answer else None

        return wait_for(shown)

    def log(self):
        path = self.root / "var/log/mail.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def stderr(self):
        return (self.root / "serve.stderr").read_text(encoding="utf-8")

    # SMTP

    def smtp(self):
        return smtplib.SMTP("127.0.0.1", self.port, "client.example", PATIENCE)

    def send(self, recipients, text, sender="friend@example.com"):
        """Send a message through the SMTP server."""
        with self.smtp() as client:
            client.sendmail(sender, recipients, text)


@pytest.fixture
def make_instance(bin_dir):
    """Makes instances, and clears them away."""
    made = []

    def make(**how):
        made.append(Instance(bin_dir, **how))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def instance(make_instance):
    """An instance of the test's own, without a daemon."""
    return make_instance()


@pytest.fixture
def server(instance):
    """An instance of the test's own, with a daemon."""
    return instance.start()


@pytest.fixture(scope="module")
def shared(bin_dir):
    """A running instance for tests that leave no trace but their messages."""
    one = Instance(bin_dir, message_size_limit=50000)
    one.aliases("alias1: payam\n")
    yield one.start()
    one.close()


class Wire:
    """A client's end of an SMTP connection, for dialogues and worse."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lines = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lines.close()
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def whole_answer(self):
        """All lines of the next reply."""
        found = []
        while not found or found[-1][3:4] == "-":
            line = self.lines.readline()
            assert line.endswith(b"\r\n"), f"the connection ended: {line!r}"
            found.append(line[:-2].decode())
        return found

    def answer(self):
        """The last line of the next reply."""
        return self.whole_answer()[-1]


def play(peer, dialogue):
    """Say the C: lines to `peer`, and hold its answers to the S: lines."""
    for number, line in enumerate(dialogue.strip().splitlines(), 1):
        who, _, text = line.strip().partition(": ")
        if who == "C":
            peer.send(text.encode() + b"\r\n")
        elif who == "C:":
            peer.send(b"\r\n")
        else:
            answer = peer.answer()
            assert answer.startswith(text), f"line {number}: {text} is {answer}"


class HangUp(Exception):
    """The sink has nothing more to say on this connection."""


def hang_up(session, _):
    """A row: the connection ends in place of the reply."""
    raise HangUp


def reset(session, _):
    """A row: the connection is reset in place of the reply."""
    end_hard(session.connection)
    raise ConnectionResetError


def end_hard(connection):
    """Has the connection end with a reset when it is closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def last_words(text):
    """A row: the connection ends behind the reply."""

    def answer(session, _):
        session.put(text.encode() + b"\r\n")
        raise HangUp

    return answer


def endless(piece):
    """A row: a reply that goes on until the client has had enough."""

    def answer(session, _):
        while True:
            session.put(piece)

    return answer


def hello(*words):
    """A row for EHLO that offers `words`."""
    return many_lines(250, ["sink.example", *words])


def many_lines(code, words):
    """One reply of many lines."""
    return "\n".join(
        [*(f"{code}-{word}" for word in words[:-1]), f"{code} {words[-1]}"]
    )


def coded(text):
    """base64, as AUTH has it."""
    return base64.b64encode(text.encode()).decode()


Login = collections.namedtuple("Login", "mechanism user secret is_secure")


class SinkHandler(socketserver.StreamRequestHandler):
    """One connection to a Sink; answers what the sink's table says."""

    timeout = PATIENCE
    CHALLENGE = "<1896.697170952@sink.example>"

    def handle(self):
        self.sender, self.recipients, self.text = None, [], b""
        self.is_lmtp = self.is_secure = False
        self.number = self.server.begin(self.client_address)
        try:
            if self.server.is_wrapped:
                self.secure()
            self.say("CONNECT")
            while self.take_command():
                pass
        except HangUp:
            self.part()
        except ssl.SSLError as error:
            self.server.failures.append(str(error))
        finally:
            self.server.end(self.number)

    def finish(self):
        super().finish()
        self.connection.close()

    def part(self):
        """Closes so that the client reads all that was said."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                pass

    def take_command(self):
        line = self.rfile.readline().decode("utf-8", "replace").strip()
        verb = line[:4].upper()
        if not verb:
            return False
        self.server.log.append((self.number, line))
        if not self.is_secure:
            self.server.clear.append(line)
            if self.has_more():
                self.server.ahead.append(line)
        self.is_lmtp |= verb == "LHLO"
        if verb == "AUTH":
            self.take_login(line.split())
        if verb == "QUIT":
            self.server.end(self.number)
        self.say(line, verb)
        return verb != "QUIT"

    def has_more(self):
        """Whether the client did not wait for the reply."""
        self.connection.settimeout(0)
        try:
            return bool(self.rfile.peek(1))
        finally:
            self.connection.settimeout(self.timeout)

    def put(self, data):
        pieces = [data]
        if self.server.is_dripping:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pieces = [data[place : place + 1] for place in range(len(data))]
        for piece in pieces:
            self.connection.sendall(piece)

    def row(self, line, verb):
        """The answer that the table has, or makes now."""
        row = self.server.answer(line, verb)
        return row(self, line) if callable(row) else row

    def say(self, line, verb=None):
        answer = self.row(line, verb or line)
        if isinstance(answer, bytes):
            self.put(answer)
            return
        is_sequence = self.recipients if verb == "DATA" else self.sender is not None
        if verb in ("DATA", "RCPT") and not is_sequence and answer[0] in "23":
            answer = "554 5.5.1 No recipients" if verb == "DATA" else "503 5.5.1 MAIL?"
        if verb == "MAIL" and self.sender is not None:
            answer = "503 5.5.1 Nested"
        if verb == "EHLO" and answer.startswith("250"):
            words = [line[4:] for line in answer.split("\n")]
            answer = many_lines(250, words + self.offers())
        self.put(answer.replace("\n", "\r\n").encode() + b"\r\n")
        self.act(line, verb, answer)

    def offers(self):
        """What EHLO lists besides the table's row."""
        sink, found = self.server, []
        if sink.certificate and not self.is_secure and not sink.is_wrapped:
            found.append("STARTTLS")
        if sink.mechanisms and (self.is_secure or sink.is_careless):
            found.append(f"AUTH {sink.mechanisms}")
        return found

    def act(self, line, verb, answer):
        """What follows from an answer."""
        if verb == "DATA" and answer.startswith("354"):
            self.take_message()
        elif verb in ("RSET", "EHLO", "HELO", "LHLO"):
            self.sender, self.recipients = None, []
        elif verb == "STAR" and answer.startswith("220"):
            self.secure()
        elif verb == "MAIL" and answer.startswith("2"):
            self.sender, self.recipients = line, []
        elif verb == "RCPT" and answer.startswith("2"):
            self.recipients.append(re.search("<(.*)>", line).group(1))
            self.server.commands.append(line)

    def secure(self):
        """TLS from here on; what was sent ahead is dropped."""
        self.rfile.close()
        context = self.server.context
        self.connection = context.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.is_secure = True

    def ask(self, text):
        """The client's answer to a challenge of AUTH."""
        self.put(f"334 {coded(text)}\r\n".encode())
        answer = self.rfile.readline().decode().strip()
        self.server.log.append((self.number, answer))
        if not self.is_secure:
            self.server.clear.append(answer)
        return base64.b64decode(answer).decode()

    def take_login(self, words):
        """The dialogue of AUTH, but for the final reply."""
        mechanism = words[1].upper()
        first = base64.b64decode(words[2]).decode() if words[2:] else None
        if mechanism == "LOGIN":
            user = first or self.ask("Username:")
            secret = self.ask("Password:")
        elif mechanism == "CRAM-MD5":
            user, _, secret = self.ask(self.CHALLENGE).rpartition(" ")
        elif mechanism == "XOAUTH2":
            shape = "user=(.*)\1auth=Bearer (.*)\1\1"
            user, secret = re.fullmatch(shape, first or self.ask("")).groups()
            if not str(self.server.answers["AUTH"]).startswith("2"):
                self.ask('{"status":"401"}')
        else:
            _, user, secret = (first or self.ask("")).split("\0")
        self.server.logins.append(Login(mechanism, user, secret, self.is_secure))

    def take_message(self):
        lines = [b"\r\n"]
        while lines[-1] != b".\r\n" or not lines[-2].endswith(b"\r\n"):
            lines.append(self.rfile.readline())
            if not lines[-1]:
                return
        self.text = b"".join(lines[1:])
        each = [f"END {name}" for name in self.recipients]  # RFC 2033
        ends = each if self.is_lmtp else ["END"]
        answers = [self.row(end, "END") for end in ends]
        if any(re.match("2[0-9][0-9] ", str(answer)) for answer in answers):
            self.keep()
        self.sender, self.recipients = None, []
        for answer in answers:
            raw = isinstance(answer, bytes)
            self.put(answer if raw else f"{answer}\r\n".encode())

    def keep(self):
        """Has the sink take the message in."""
        self.server.received.append((self.sender, self.recipients, self.text))


SINK_ANSWERS = {
    "CONNECT": "220 sink.example ESMTP",
    "EHLO": hello("PIPELINING", "8BITMIME", "SIZE 99999999"),
    "HELO": "250 sink.example",
    "LHLO": "250-store.example\n250-PIPELINING\n250 8BITMIME",
    "AUTH": "235 2.7.0 Welcome",
    "DATA": "354 Go on",
    "END": "250 2.0.0 Kept",
    "QUIT": "221 2.0.0 Bye",
}


class Sink:
    """A real SMTP server that answers from a table and keeps what it accepts.

    A row is a whole command or a verb; CONNECT is the greeting, END the answer
    to the end of the message, AUTH the one to a whole login. A list is used up
    until its last element. Bytes are sent as they are and change nothing; a
    function of the session and the line makes the answer, or raises HangUp.
    With a certificate there is STARTTLS, or TLS from the start (is_wrapped);
    is_careless offers AUTH also without.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    certificate = None
    mechanisms = ""
    is_wrapped = is_careless = is_dripping = False

    def __init__(self, place=("127.0.0.1", 0), **how):
        features = {name: how.pop(name) for name in list(how) if name.islower()}
        vars(self).update(features)
        ready = "220 2.0.0 Ready" if self.certificate else "502 5.5.1 What?"
        self.answers = {**SINK_ANSWERS, "STARTTLS": ready, **how}
        self.received = []  # (MAIL command, recipients, text) of each message
        self.commands = []  # RCPT, those that were answered 2xx
        self.log = []  # (connection, command)
        self.clear = []  # what was said without TLS
        self.ahead = []  # commands behind which others came without waiting
        self.names = []  # that clients asked for in TLS
        self.failures = []  # of TLS
        self.logins = []
        self.clients = []  # the address of each connection
        self.open = set()
        self.most_open = 0
        self.lock = threading.Lock()
        if self.certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(self.certificate)
            self.context.sni_callback = lambda _, name, __: self.names.append(name)
        super().__init__(place, SinkHandler)
        self.port = self.server_address[1]
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def begin(self, client):
        """The number of a new connection."""
        with self.lock:
            self.clients.append(client)
            self.open.add(len(self.clients))
            self.most_open = max(self.most_open, len(self.open))
            return len(self.clients)

    def end(self, number):
        with self.lock:
            self.open.discard(number)

    def verbs(self, number=None):
        """The verbs that a connection brought, or all did."""
        said = [line for one, line in self.log if number in (None, one)]
        return [line.split(" ")[0].upper() for line in said]

    def answer(self, line, verb):
        row = self.answers.get(line, self.answers.get(verb, "250 2.0.0 Ok"))
        if isinstance(row, list):
            return row.pop(0) if len(row) > 1 else row[0]
        return row

    def handle_error(self, request, client_address):
        """A client that was killed is no fault of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class SmtpSink(Sink, socketserver.ThreadingTCPServer):
    """A sink on a TCP port."""


class UnixSink(Sink, socketserver.ThreadingUnixStreamServer):
    """A sink on a Unix socket."""


@pytest.fixture
def make_sink():
    """Makes sinks, and closes them."""
    made = []

    def make(kind=SmtpSink, **how):
        made.append(kind(**how))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def relayed(instance, sink, **settings):
    """The instance, started with the sink as its relayhost."""
    instance.configure(relayhost=f"[127.0.0.1]:{sink.port}", **settings)
    return instance.start()


class Terminal:
    """A person at a terminal: types, and waits for what must appear."""

    def __init__(self, instance, program, *args, user="payam", rows=24, env=()):
        self.shown = ""
        self.end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, 80, 0, 0))
        self.name = os.ttyname(theirs)
        self.child = subprocess.Popen(
            [instance.bin / program, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=instance.env(user, **dict(env)),
            cwd=instance.home(user),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # for Ctrl-C
        )
        os.close(theirs)

    def expect(self, text):
        """Everything shown up to and including `text`, which must come."""
        while text not in self.shown:
            ready, _, _ = select.select([self.end], [], [], PATIENCE)
            chunk = b""
            if ready:
                with contextlib.suppress(OSError):  # EIO: the program has ended
                    chunk = os.read(self.end, 4096)
            if not chunk:
                pytest.fail(f"no {text!r} after {self.shown!r}")
            self.shown += chunk.decode().replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, text):
        os.write(self.end, text.encode())

    def interrupt(self):
        """Ctrl-C, once what was echoed is taken: it drops the rest."""
        wait_for(self.has_taken_all)
        self.type("\x03")

    def has_taken_all(self):
        """Whether the program waits for more."""
        theirs = os.open(self.name, os.O_RDONLY | os.O_NOCTTY)
        (waiting,) = struct.unpack("i", fcntl.ioctl(theirs, termios.FIONREAD, b"1234"))
        os.close(theirs)
        state = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(") ")[2]
        return not waiting and state.startswith("S")

    def rest(self):
        """What is shown up to the end of the program."""
        with contextlib.suppress(OSError):  # EIO: the program has ended
            while select.select([self.end], [], [], PATIENCE)[0]:
                self.shown += os.read(self.end, 4096).decode().replace("\r\n", "\n")
        return self.shown

    def close(self):
        """The exit code, when the program has ended."""
        code = self.child.wait(PATIENCE)
        os.close(self.end)
        return code


@contextlib.contextmanager
def read_only(path):
    """Nothing can be written below `path` meanwhile."""
    if not AS_ROOT:
        parts = [path, *filter(Path.is_dir, path.iterdir())]
        modes = [part.stat().st_mode for part in parts]
        for part in parts:
            part.chmod(0o555)
        try:
            yield
        finally:
            for part, mode in zip(parts, modes):
                part.chmod(mode)
        return
    with mounted("--bind", path, path):
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield


@contextlib.contextmanager
def mounted(*words):
    """`mount WORDS` onto the last of them, for as long as the block lasts."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", words[-1]], check=True)


# == 1 Failures: Value, ProgramError, MailError, exit codes ===================


class TestExamples:
    """What the docstrings show."""

    def test_every_example_in_a_docstring_is_true(self):
        failed, tried = doctest.testmod(minimta)
        assert failed == 0
        assert tried >= 7


class TestValue:
    """Records that are equal when their fields are."""

    def test_equal_fields_make_equal_values(self):
        assert minimta.Address("a", "b") == minimta.Address("a", "b")

    def test_a_differing_field_makes_a_different_value(self):
        assert minimta.Address("a", "b") != minimta.Address("a", "c")

    def test_values_of_two_kinds_are_never_equal(self):
        assert minimta.Address("a", "b") != minimta.Target("a", "b")

    def test_equal_values_are_one_key(self):
        assert len({minimta.Address("a", "b"), minimta.Address("a", "b")}) == 1

    def test_a_value_shows_its_fields(self):
        assert repr(minimta.Address("a", "b")) == "Address('a', 'b')"


EXIT_CODE_ROWS = [
    # whatever may succeed later
    ("4.0.0", 75),
    ("4.3.1", 75),
    ("4.4.1", 75),
    # an address that cannot be read, as recipient or sender
    ("5.1.3", 65),
    ("5.1.7", 65),
    # an address that nobody has
    ("5.1.0", 67),
    ("5.1.1", 67),
    ("5.1.2", 67),
    # a message that is too big or malformed
    ("5.2.3", 65),
    ("5.3.4", 65),
    ("5.5.2", 65),
    ("5.6.7", 65),
    # a loop
    ("5.4.6", 78),
    # not allowed
    ("5.7.1", 77),
    # everything else
    ("5.0.0", 69),
    ("5.2.0", 69),
    ("5.4.4", 69),
]


class TestMailError:
    """A failure: status, sentence, and what `sendmail` exits with."""

    @pytest.mark.parametrize(("status", "code"), EXIT_CODE_ROWS)
    def test_a_status_has_its_exit_code(self, status, code):
        assert minimta.MailError(status, "why").exit_code == code

    @pytest.mark.parametrize(("status", "code"), EXIT_CODE_ROWS)
    def test_temporary_means_exit_75(self, status, code):
        assert minimta.MailError(status, "why").is_temporary == (code == 75)


PRINTABLE_ROWS = [
    # text passes
    ("plain, ümlaut", "plain, ümlaut"),
    # what ends a line, anywhere
    ("a\nb\rc\x0bd\x85e\u2028f", "a?b?c?d?e?f"),
    # what drives a terminal
    ("\x1b[2J\x9bm\x7f", "?[2J?m?"),
    # what is no character
    ("\udcff\0", "??"),
]


class TestPrintable:
    """Text from outside on one line."""

    @pytest.mark.parametrize(("given", "wanted"), PRINTABLE_ROWS)
    def test_controls_become_question_marks(self, given, wanted):
        assert minimta.printable(given) == wanted

    def test_text_as_long_as_the_limit_is_whole(self):
        assert minimta.printable("x" * 10, 10) == "x" * 10

    def test_longer_text_is_cut_and_says_so(self):
        assert minimta.printable("x" * 11, 10) == "x" * 10 + "..."


# == 2 Settings: Setting, SETTINGS, Settings ==================================


def make_settings(text="", root="", host="host.example", **environ):
    """Settings as a file with that text gives them."""
    return minimta.Settings.parse(text, environ, host, root, "/etc/minimta.conf")


def settings_error(text, **how):
    """What is wrong with a settings file."""
    with pytest.raises(minimta.ProgramError) as caught:
        make_settings(text, **how)
    assert caught.value.code == 78
    return str(caught.value)


GOOD_VALUES = [
    # numbers
    ("smtpd_port = 26", 26),
    ("smtpd_port=26", 26),
    # sizes: bytes, or a unit of 1024
    ("message_size_limit = 10", 10),
    ("message_size_limit = 0", minimta.NO_LIMIT),
    ("mailbox_size_limit = 0", 0),
    ("message_size_limit = 2k", 2 << 10),
    ("message_size_limit = 50M", 50 << 20),
    ("message_size_limit = 1g", 1 << 30),
    # times: seconds, or units, one behind the other
    ("minimal_backoff_time = 90", 90),
    ("minimal_backoff_time = 90s", 90),
    ("minimal_backoff_time = 2m", 120),
    ("minimal_backoff_time = 1h30m", 5400),
    ("minimal_backoff_time = 5d", 432000),
    ("minimal_backoff_time = 1W", 604800),
    # a list has commas or blanks between its words
    ("mydestination = a, b c,d", ("a", "b", "c", "d")),
    ("mydestination =", ()),
    # paths: without the last slash
    ("queue_directory = /q/", "/q"),
    ("queue_directory = /", "/"),
    # text: as it is
    ("relayhost = [mx.example]:587", ("[mx.example]:587",)),
    # the case of a name does not count
    ("SMTPD_Port = 26", 26),
    # the later of two lines counts
    ("smtpd_port = 26\nsmtpd_port = 27", 27),
    # DOS line ends
    ("smtpd_port = 26\r\n", 26),
]

BAD_VALUES = [
    # no number
    *("smtpd_port = ", "smtpd_port = x", "smtpd_port = -1", "smtpd_port = 1k"),
    "smtpd_port = 2 5",
    # no port
    "smtpd_port = 65536",
    # no unit, or nothing before it
    *("message_size_limit = 1x", "message_size_limit = M", "message_size_limit = k5"),
    *("minimal_backoff_time = 5y", "minimal_backoff_time = 1.5h"),
    # digits of another script
    "smtpd_port = \u0662\u0665",
]

COMMENT_ROWS = [
    # a # where a word could begin
    ("# all", ""),
    ("  # all", ""),
    ("a # b", "a "),
    ("a\t# b", "a\t"),
    # inside a word it is a letter
    ("a#b", "a#b"),
    # inside double quotes, or behind a backslash, too
    ('"a # b" # c', '"a # b" '),
    ("a \\# b", "a \\# b"),
    ('"a \\" # b" # c', '"a \\" # b" '),
]

LINE_ROWS = [
    ("a\nb", [(1, "a"), (2, "b")]),
    # empty lines and comments are nothing, but counted
    ("\n# c\n \na", [(4, "a")]),
    # white space in front continues the line before
    ("a\n  b\n\tc\nd", [(1, "a b c"), (4, "d")]),
    # also across a comment and an empty line
    ("a\n# c\n\n  b", [(1, "a b")]),
    # the first line has nothing to continue
    ("  a", [(1, "  a")]),
]


class TestSettings:
    """minimta.conf, the environment and the host as values."""

    @pytest.mark.parametrize(("line", "wanted"), GOOD_VALUES)
    def test_a_value_has_the_type_of_its_kind(self, line, wanted):
        name = line.partition("=")[0].strip().lower()
        assert getattr(make_settings(line), name) == wanted

    @pytest.mark.parametrize("line", BAD_VALUES)
    def test_a_bad_value_names_file_line_and_setting(self, line):
        name = line.partition("=")[0].strip()
        why = settings_error(f"# one\n\n{line}\n")
        assert why.startswith(f"/etc/minimta.conf, line 3: {name}")

    @pytest.mark.parametrize(("given", "wanted"), COMMENT_ROWS)
    def test_a_comment_begins_where_a_word_could(self, given, wanted):
        assert minimta.strip_comment(given) == wanted

    @pytest.mark.parametrize(("given", "wanted"), LINE_ROWS)
    def test_lines_are_joined_and_numbered(self, given, wanted):
        assert list(minimta.logical_lines(given)) == wanted

    def test_a_value_goes_on_in_the_next_line(self):
        assert make_settings("mydestination = a,\n  b").mydestination == ("a", "b")

    @pytest.mark.parametrize("line", ["smtpd_port", "  smtpd_port = 1"])
    def test_a_line_that_is_no_setting_is_named(self, line):
        assert settings_error(line).startswith("/etc/minimta.conf, line 1: need name")

    def test_an_unknown_name_is_told_the_nearest(self):
        why = settings_error("mesage_size_limit = 1")
        assert why == (
            "/etc/minimta.conf, line 1: unknown setting mesage_size_limit: "
            "did you mean message_size_limit?"
        )

    def test_a_name_like_no_other_is_told_where_names_are(self):
        assert settings_error("qqq = 1").endswith("see minimta.py config")

    @pytest.mark.parametrize("spelling", ["$mydomain", "${mydomain}"])
    def test_a_name_behind_a_dollar_is_that_setting(self, spelling):
        assert make_settings(f"myorigin = x.{spelling}").myorigin == "x.example"

    @pytest.mark.parametrize(
        "text",
        ["myorigin = $myorigin", "relayhost = $nosuch", "queue_directory = rel/q"],
    )
    def test_what_leads_nowhere_is_an_error(self, text):
        assert text.partition(" ")[0] in settings_error(text)

    def test_the_environment_beats_the_file(self):
        settings = make_settings("smtpd_port = 26", MINIMTA_SMTPD_PORT=" 27 ")
        assert settings.smtpd_port == 27

    def test_a_bad_value_in_the_environment_names_the_variable(self):
        why = settings_error("", MINIMTA_SMTPD_PORT="x")
        assert why.startswith("environment, MINIMTA_SMTPD_PORT: smtpd_port = x")

    def test_a_value_knows_where_it_came_from(self):
        sources = make_settings("\nsmtpd_port = 26").sources
        assert sources["smtpd_port"] == "/etc/minimta.conf, line 2"

    def test_the_systems_places_are_the_default(self):
        settings = make_settings()
        assert settings.queue_directory == "/var/spool/minimta"
        assert settings.mail_spool_directory == "/var/mail"
        assert settings.alias_maps == ("/etc/aliases",)

    def test_a_private_instance_has_everything_below_its_root(self):
        settings = make_settings(root="/r")
        assert settings.queue_directory == "/r/var/spool/minimta"
        assert settings.mail_spool_directory == "/r/var/mail"
        assert settings.alias_maps == ("/r/etc/aliases",)
        assert settings.maillog_file == "/r/var/log/mail.log"

    def test_a_private_instance_listens_near_and_without_root(self):
        settings = make_settings(root="/r")
        assert settings.inet_interfaces == ("127.0.0.1",)
        assert settings.smtpd_port == 2525

    @pytest.mark.parametrize(
        ("host", "text", "wanted"),
        [
            ("a.b.example", "", ("a.b.example", "b.example")),
            # a short name gets the domain
            ("box", "mydomain = d.example", ("box.d.example", "d.example")),
            ("box", "", ("box.localdomain", "localdomain")),
            # the file beats the system
            ("box", "myhostname = x.example", ("x.example", "example")),
        ],
    )
    def test_host_and_domain_complete_each_other(self, host, text, wanted):
        settings = make_settings(text, host=host)
        assert (settings.myhostname, settings.mydomain) == wanted

    def test_there_is_no_setting_of_another_name(self):
        with pytest.raises(AttributeError):
            make_settings().no_such_setting  # noqa: B018 reading it is the test

    @pytest.mark.parametrize(
        ("domain", "is_local"),
        [
            # mydestination, in any case, with or without the last dot
            *[("host.example", True), ("HOST.Example", True), ("localhost.", True)],
            *[("localhost.example", True), ("host", True)],
            # a bare user is ours
            ("", True),
            # literals of the interfaces and of loopback
            *[("[127.0.0.1]", True), ("[IPv6:::1]", True), ("[192.0.2.1]", True)],
            *[("[192.0.2.2]", False), ("192.0.2.1", False)],
            *[("example", False), ("other.example", False), ("xhost.example", False)],
        ],
    )
    def test_a_domain_is_local_if_it_is_a_destination(self, domain, is_local):
        settings = make_settings("inet_interfaces = 192.0.2.1, [::1]")
        assert settings.is_local(domain) == is_local

    @pytest.mark.parametrize(
        ("domain", "may_relay"),
        [
            # the domain and what is below it
            *[("a.example", True), ("b.A.example.", True)],
            # only what is below a dot
            *[("x.c.example", True), ("c.example", False)],
            *[("xa.example", False), ("example", False), ("", False)],
        ],
    )
    def test_anyone_may_relay_to_relay_domains(self, domain, may_relay):
        settings = make_settings("relay_domains = A.example, .c.example")
        assert settings.may_relay_to(domain) == may_relay


# == 3 Addresses: Address, parse_path, header_addresses =======================


PATH_254 = f"{'l' * 64}@{'a' * 63}.{'b' * 63}.{'c' * 61}"

GOOD_ADDRESSES = [
    ("", ("", "")),
    ("a", ("a", "")),
    ("a@b", ("a", "b")),
    ("a.b@c.example", ("a.b", "c.example")),
    # every character of an atom
    ("!#$%&'*+-/=?^_`{|}~@b", ("!#$%&'*+-/=?^_`{|}~", "b")),
    # quoted: blanks, brackets, the at sign, escapes, nothing
    ('"a b"@c', ("a b", "c")),
    ('"<@>"@c', ("<@>", "c")),
    ('"a\\"b\\\\c"@d', ('a"b\\c', "d")),
    ('""@c', ("", "c")),
    # a quoted string is the same as the atom
    ('"a"@b', ("a", "b")),
    # case is kept
    ("Bob@Example", ("Bob", "Example")),
    # literals
    ("a@[192.0.2.1]", ("a", "[192.0.2.1]")),
    ("a@[IPv6:2001:db8::1]", ("a", "[IPv6:2001:db8::1]")),
    # UTF-8 on both sides
    ("jörg@bücher.example", ("jörg", "bücher.example")),
    # the root's dot, underscores
    ("a@b.c.", ("a", "b.c.")),
    ("a@b_c.example", ("a", "b_c.example")),
    # limits, in octets
    ("l" * 64 + "@b", ("l" * 64, "b")),
    ("ü" * 32 + "@b", ("ü" * 32, "b")),
    ("a@" + "d" * 63, ("a", "d" * 63)),
    (PATH_254, tuple(PATH_254.split("@"))),
]

BAD_ADDRESSES = [
    # a side is missing
    *("@b", "a@", "@"),
    # blanks and specials outside quotes
    *("a b@c", "a@b c", " a@b", "a@b ", "a,b@c", "a;b@c", "(a)b@c", "a@b(c)"),
    *("<a@b>", "a@b@c", "a:b@c", "a\\b@c"),
    # quotes that do not end, or end early
    *('"a@b', '"a"b@c', '"a\\', '"a\\"', '"'),
    # control characters, quoted or not
    *("a\nb@c", "a@b\r", '"a\nb"@c', '"a\\\nb"@c', "a\0@b", "\x7f@b"),
    # bytes that are no UTF-8
    *("\udcff@b", "a@\udcff"),
    # labels
    *("a@.b", "a@b..c", "a@-b", "a@b-", "a@.", "a@b!c", "a@b:25"),
    # literals that are no address
    *("a@[]", "a@[", "a@[192.0.2.1", "a@[192.0.2]", "a@[192.0.2.1.1]"),
    *("a@[192.0.2.256]", "a@[192.0.2.01]", "a@[192.0.2.+1]", "a@[192.0.2.\u0661]"),
    *("a@[0x7f.0.0.1]", "a@[2130706433]", "a@[IPv6:]", "a@[IPv6:192.0.2.1]"),
    *("a@[IPv6:xyz::1]", "a@[192.0.2.1]b", "a@[::1]"),
    # one octet too many
    *("l" * 65 + "@b", "ü" * 33 + "@b", "a@" + "d" * 64, PATH_254 + "c"),
]

ROUND_TRIPS = [
    *[("a", ""), ("a", "b"), ("a.b", "c"), ("a b", ""), ("a b", "c"), ("", "c")],
    *[('a"b', "c"), ("a\\", "c"), ("\\\\", "c"), ("a@b", "c"), ("a,b", ""), ("<>", "")],
    *[("ü", "ü"), ("..", "c"), ("a", "[192.0.2.1]"), ("", "")],
]


class TestAddress:
    """A mailbox as local part and domain."""

    @pytest.mark.parametrize(("text", "wanted"), GOOD_ADDRESSES)
    def test_reads(self, text, wanted):
        assert minimta.Address.parse(text).fields() == wanted

    @pytest.mark.parametrize("text", BAD_ADDRESSES)
    def test_refuses(self, text):
        with pytest.raises(minimta.MailError) as caught:
            minimta.Address.parse(text)
        assert caught.value.status == "5.1.3"

    @pytest.mark.parametrize("parts", ROUND_TRIPS)
    def test_what_is_written_is_read_back(self, parts):
        address = minimta.Address(*parts)
        assert minimta.Address.parse(str(address)) == address

    def test_any_text_is_refused_or_written_and_read_back(self):
        wrong = []
        for size in range(1, 6):
            for letters in itertools.product('a."\\@[ü<', repeat=size):
                text = "".join(letters)
                with contextlib.suppress(minimta.MailError):
                    address = minimta.Address.parse(text)
                    if minimta.Address.parse(str(address)) != address:
                        wrong.append(text)
        assert wrong == []

    @pytest.mark.parametrize(
        ("text", "wanted"), [("a", "a@x"), ("a@b", "a@b"), ("", ""), ('""@b', '""@b')]
    )
    def test_only_a_bare_user_is_qualified(self, text, wanted):
        assert str(minimta.Address.parse(text).qualified("x")) == wanted

    @pytest.mark.parametrize(
        ("text", "wanted"), [("a@b", True), ("ü@b", False), ("a@ü", False)]
    )
    def test_ascii_means_both_sides(self, text, wanted):
        assert minimta.Address.parse(text).is_ascii == wanted


GOOD_PATHS = [
    ("<a@b>", ("a@b", "")),
    ("<>", ("", "")),
    ("<a>", ("a", "")),
    # blanks in front, parameters behind
    (" <a@b> SIZE=1", ("a@b", " SIZE=1")),
    ("<>BODY=7BIT", ("", "BODY=7BIT")),
    # brackets that were forgotten
    ("a@b", ("a@b", "")),
    ("a@b SIZE=1", ("a@b", "SIZE=1")),
    # a bracket inside quotes does not end it
    ('<"a>b"@c>', ('"a>b"@c', "")),
    ('<"a\\">b"@c> X=1', ('"a\\">b"@c', " X=1")),
    # source routes are dropped
    ("<@r:a@b>", ("a@b", "")),
    ("<@r.example,@s:a@b>", ("a@b", "")),
]

BAD_PATHS = [
    # a bracket is missing
    *("<a@b", "<", '<"a>b', '<"a@b>'),
    # more than one word
    *("a b", "a@b c"),
    # routes without an end, with empty hops, with hops that have no @
    *("<@r>", "<@:a@b>", "<@r,:a@b>", "<@r,@:a@b>", "<@r,st:a@b>"),
    # an address that is none
    *("<a b>", "<<a@b>>", "<a@b@c>", "< a@b>"),
]


class TestParsePath:
    """What follows MAIL FROM: and RCPT TO:."""

    @pytest.mark.parametrize(("text", "wanted"), GOOD_PATHS)
    def test_reads(self, text, wanted):
        address, rest = minimta.parse_path(text)
        assert (str(address), rest) == wanted

    @pytest.mark.parametrize("text", BAD_PATHS)
    def test_refuses(self, text):
        with pytest.raises(minimta.MailError) as caught:
            minimta.parse_path(text)
        assert caught.value.status == "5.1.3"


GOOD_LISTS = [
    ("", []),
    ("a@b", ["a@b"]),
    ("a@b, c@d", ["a@b", "c@d"]),
    # names, bare and quoted, with commas in the quotes
    ("A B <a@b>", ["a@b"]),
    ('"B, A" <a@b>, c@d', ["a@b", "c@d"]),
    ('"B \\", A" <a@b>', ["a@b"]),
    ("A.B <a@b>", ["a@b"]),
    # a quoted local part
    ('"a b"@c', ['"a b"@c']),
    ('<"a,b"@c>', ['"a,b"@c']),
    # comments, nested, escaped, anywhere
    ("a@b (c)", ["a@b"]),
    ("(c) a@b", ["a@b"]),
    ("a@b (c (d, e) f), g@h", ["a@b", "g@h"]),
    ("a@b (c \\) d), g@h", ["a@b", "g@h"]),
    ("A (c, d) <a@b>", ["a@b"]),
    # groups, also empty ones
    ("team: a@b, c@d;", ["a@b", "c@d"]),
    ("undisclosed-recipients:;", []),
    ("team: A <a@b>;, e@f", ["a@b", "e@f"]),
    # semicolons for commas, empty places
    ("a@b; c@d", ["a@b", "c@d"]),
    (", a@b,, ", ["a@b"]),
    # routes and literals, whose colons begin no group
    ("<@r,@s:a@b>", ["a@b"]),
    ("a@[IPv6:::1], b@c", ["a@[IPv6:::1]", "b@c"]),
    # the null address
    ("<>", [""]),
]

BAD_LISTS = [
    # a bracket is missing on one side
    *("<a@b", "A <a@b, c@d", "a@b>", "a@b>, c@d"),
    # a quote is
    *('"a@b', 'a@b, "c'),
    # words without an address
    *("A B", "A B, a@b"),
]

BOMBS = [
    *("(", ")", "<", ">", "[", '"', "\\", ",", ";", ":", "a", " "),
    *("()", "(\\", "<>", "><", "[]", '""', "a,", "a:", "<a>", '>"', ">(", "([<"),
]


def lines_run(function, *arguments):
    """How many lines of Python a call takes; its failures do not count."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(minimta.MailError):
            function(*arguments)
    finally:
        sys.settrace(before)
    return count


class TestHeaderAddresses:
    """The addresses in To: and Cc:."""

    @pytest.mark.parametrize(("text", "wanted"), GOOD_LISTS)
    def test_finds(self, text, wanted):
        assert list(map(str, minimta.header_addresses(text))) == wanted

    @pytest.mark.parametrize("text", BAD_LISTS)
    def test_refuses(self, text):
        with pytest.raises(minimta.MailError) as caught:
            minimta.header_addresses(text)
        assert caught.value.status == "5.1.3"

    @pytest.mark.parametrize("bomb", BOMBS)
    def test_twice_the_text_is_at_most_twice_the_work(self, bomb):
        small = lines_run(minimta.AddressScanner(bomb * 2000).scan)
        large = lines_run(minimta.AddressScanner(bomb * 4000).scan)
        assert large <= 2 * small + 100

    def test_100_000_nested_comments_are_one_comment(self):
        text = f"a@b {'(' * 100_000}{')' * 100_000}, c@d"
        assert list(map(str, minimta.header_addresses(text))) == ["a@b", "c@d"]

    def test_100_000_addresses_are_100_000_addresses(self):
        assert len(minimta.header_addresses("a@b," * 100_000)) == 100_000


# == 4 Messages: WireReader, InputReader, Header, received_field, mbox_quoted =


def cuts(data, pieces=3):
    """`data` in up to three pieces, cut at every place."""
    places = range(len(data) + 1)
    for some in itertools.combinations_with_replacement(places, pieces - 1):
        ends = [0, *some, len(data)]
        yield [data[a:b] for a, b in zip(ends, ends[1:])]


def feed_dots(limit, pieces):
    """(message, reader) after the pieces came; what is over is its rest."""
    reader, text = minimta.DotReader(limit), b""
    for piece in pieces:
        if reader.ended:
            reader.rest += piece
        else:
            text += reader.feed(piece)
    return text, reader


def plain_dots(data):
    """(message, rest) of wire bytes without faults, the simple way."""
    lines = []
    while not data.startswith(b".\r\n"):
        line, _, data = data.partition(b"\r\n")
        lines.append(line[line.startswith(b".") :] + b"\n")
    return b"".join(lines), data[3:]


WIRE_MESSAGES = [
    # nothing, an empty line, one line
    *(b".\r\n", b"\r\n.\r\n", b"a\r\n.\r\n"),
    # what follows the end
    *(b"a\r\n.\r\nQUIT\r\n", b".\r\n.\r\n", b"a\r\n.\r\n\r\n.\r\n"),
    # dots that were doubled, in the first line too
    *(b"..\r\n.\r\n", b"..a\r\nb\r\n..\r\n...\r\n.\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
    # a dot that should have been doubled, and dots in a line
    *(b".a\r\n.b\r\n.\r\n", b"a.\r\n b .\r\n.\r\nx"),
    # dots before empty lines
    b"\r\n..\r\n\r\n\r\n.\r\n",
]

WIRE_FALSE_ENDS = [
    # each way to write the end without CRLF on both sides
    *(b"a\n.\nb", b"a\n.\r\nb", b"a\r\n.\nb", b"a\r.\rb", b"a\r.\r\nb", b"a\r\n.\rb"),
    *(b"a\n\r.\r\nb", b"a\r\n.\r\rb", b"a\r\r\n.\n\nb", b"\n.\r\nb", b"\r.\r\nb"),
    # and bare ones far from it
    *(b"a\nb", b"a\rb", b"\n", b"\r", b"a\r\n\nb", b"a\r", b"a\r\n.\r"),
]


class TestDotReader:
    """What follows 354, cut anywhere by the network."""

    @pytest.mark.parametrize("data", WIRE_MESSAGES)
    def test_every_cut_gives_the_same_message_and_rest(self, data):
        found = set()
        for pieces in cuts(data):
            text, reader = feed_dots(1000, pieces)
            found.add((text, reader.rest, reader.ended, reader.fault))
        assert found == {(*plain_dots(data), True, None)}

    @pytest.mark.parametrize("data", WIRE_MESSAGES)
    def test_byte_by_byte_gives_the_same_message(self, data):
        pieces = [data[n : n + 1] for n in range(len(data))]
        text, reader = feed_dots(1000, pieces)
        assert (text, reader.rest) == plain_dots(data)

    @pytest.mark.parametrize("data", WIRE_FALSE_ENDS)
    def test_a_bare_cr_or_lf_is_a_fault_at_every_cut(self, data):
        faults = set()
        for pieces in cuts(data + b"\r\n.\r\n"):
            _, reader = feed_dots(1000, pieces)
            faults.add(reader.fault and reader.fault.status)
        assert faults == {"5.5.2"}

    @pytest.mark.parametrize("data", WIRE_FALSE_ENDS)
    def test_a_false_end_is_no_end_at_any_cut(self, data):
        rests = set()
        for pieces in cuts(data + b"\r\n.\r\nrest"):
            _, reader = feed_dots(1000, pieces)
            rests.add((reader.ended, reader.rest))
        assert rests == {(True, b"rest")}

    @pytest.mark.parametrize("data", WIRE_MESSAGES)
    def test_nothing_ends_before_its_end(self, data):
        end = len(data) - len(plain_dots(data)[1])
        _, reader = feed_dots(1000, [data[: end - 1]])
        assert not reader.ended

    @pytest.mark.parametrize(("limit", "status"), [(11, None), (10, "5.3.4")])
    def test_a_message_may_be_as_long_as_the_limit(self, limit, status):
        found = set()
        for pieces in cuts(b"..bc\r\n\r\nde\r\n.\r\n"):  # 5 + 2 + 4 bytes
            _, reader = feed_dots(limit, pieces)
            found.add(reader.fault and reader.fault.status)
        assert found == {status}

    def test_the_size_is_counted_with_crlf_and_without_stuffed_dots(self):
        assert feed_dots(99, [b"..bc\r\n\r\nde\r\n.\r\n"])[1].size == 11

    def test_nothing_is_kept_behind_a_fault(self):
        reader = minimta.DotReader(4)
        assert reader.feed(b"abcdef\r\n" * 9) == b""
        assert reader.feed(b"abcdef\r\n" * 9) == b""


def feed_chunks(limit, chunks):
    """(message, reader) after these chunks, the last of them LAST."""
    reader, text = minimta.ChunkReader(limit), b""
    for number, chunk in enumerate(chunks, 1):
        reader.expect(len(chunk), number == len(chunks))
        text += reader.feed(chunk)
    return text, reader


class TestChunkReader:
    """What follows BDAT: so many bytes."""

    @pytest.mark.parametrize("text", [b"", b"a\n", b"a\n\nbc\n", b".\n..\n\n"])
    def test_every_cut_gives_what_dots_give(self, text):
        wire = text.replace(b"\n", b"\r\n")
        dots = b"".join(b"." * (row[:1] == b".") + row for row in wire.splitlines(True))
        wanted, _ = feed_dots(99, [dots + b".\r\n"])
        for chunks in cuts(wire):
            found, reader = feed_chunks(99, chunks)
            assert (found, reader.fault, reader.ended) == (wanted, None, True)

    @pytest.mark.parametrize("data", [b"a\nb", b"a\rb", b"a\r", b"\n", b"\r\r\n"])
    def test_a_bare_cr_or_lf_is_a_fault_at_every_cut(self, data):
        for chunks in cuts(data):
            assert feed_chunks(99, chunks)[1].fault.status == "5.5.2"

    def test_what_follows_a_chunk_is_its_rest(self):
        reader = minimta.ChunkReader(99)
        reader.expect(3, False)
        assert (reader.feed(b"a\r\nQUIT"), reader.rest) == (b"a\n", b"QUIT")

    @pytest.mark.parametrize(("limit", "status"), [(6, None), (5, "5.3.4")])
    def test_all_chunks_together_may_be_as_long_as_the_limit(self, limit, status):
        fault = feed_chunks(limit, [b"a\r\n", b"b\r\n"])[1].fault
        assert (fault and fault.status) == status


def plain_input(data, dot_ends):
    """What InputReader should make of `data`, the simple way."""
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b" ").replace(b"\0", b"")
    lines = data.split(b"\n")
    if dot_ends and b"." in lines:
        lines = [*lines[: lines.index(b".")], b""]
    return b"\n".join(lines)


INPUTS = [
    *(b"", b"a", b"a\n", b"\n", b"\n\n"),
    # a lone dot: first, in the middle, last, without its LF
    *(b".\n", b"a\n.\nb\n", b"a\n.\n", b"a\n.", b".", b"\n.\nb"),
    # dots that are not alone
    *(b"..\n", b".a\n", b"a.\n", b"a\n..\nb", b"a\n. \nb", b"a .\nb"),
    # CRLF, CR, both
    *(
        b"a\r\nb\r\n",
        b"a\rb",
        b"a\r",
        b"a\r\r\nb",
        b"a\r\n.\r\nb",
        b"\r\n.\r\n",
        b".\r",
    ),
    # NUL, also between LF and dot
    *(b"a\0b\n", b"\0", b"a\n\0.\nb", b"\0.\n", b"a\n.\0\nb"),
]


class TestInputReader:
    """What a program hands to `sendmail`."""

    @pytest.mark.parametrize("dot_ends", [True, False])
    @pytest.mark.parametrize("data", INPUTS)
    def test_every_cut_gives_the_same_message(self, data, dot_ends):
        found = set()
        for pieces in cuts(data):
            reader = minimta.InputReader(dot_ends)
            # an empty piece would be the end of the input
            text = [reader.feed(p) for p in pieces if p and not reader.ended]
            text += [] if reader.ended else [reader.feed(b"")]
            found.add(b"".join(text))
        assert found == {plain_input(data, dot_ends)}

    def test_a_lone_dot_ends_it(self):
        reader = minimta.InputReader(True)
        reader.feed(b"a\n.\n")
        assert reader.ended

    def test_with_i_a_lone_dot_is_text(self):
        reader = minimta.InputReader(False)
        reader.feed(b"a\n.\n")
        assert not reader.ended


HEADER_ROWS = [
    # fields, then an empty line
    (b"A: 1\nB: 2\n\nbody\n", ["a", "b"], b"body\n"),
    (b"A: 1\n\n", ["a"], b""),
    (b"A: 1\n", ["a"], b""),
    (b"A: 1", ["a"], b""),
    (b"", [], b""),
    # only a body
    (b"\nA: 1\n", [], b"A: 1\n"),
    (b"text\nA: 1\n", [], b"text\nA: 1\n"),
    # a line that is no field ends it and is kept
    (b"A: 1\ntext\nB: 2\n", ["a"], b"text\nB: 2\n"),
    (b"A: 1\n: 2\n", ["a"], b": 2\n"),
    (b"A: 1\nB c: 2\n", ["a"], b"B c: 2\n"),
    (b"A: 1\n\xff: 2\n", ["a"], b"\xff: 2\n"),
    # folded lines belong to the field above; there is none above the first
    (b"A: 1\n 2\n\t3\nB: 4\n", ["a", "b"], b""),
    (b" A: 1\nB: 2\n", [], b" A: 1\nB: 2\n"),
    # blanks before the colon
    (b"A : 1\n", ["a"], b""),
]


class TestHeader:
    """The header as a list of fields."""

    @pytest.mark.parametrize(("block", "names", "rest"), HEADER_ROWS)
    def test_splits_fields_from_the_rest(self, block, names, rest):
        header = minimta.Header.parse(block)
        assert ([name for name, _ in header.fields], header.rest) == (names, rest)

    @pytest.mark.parametrize(
        "fields", [b"", b"A: 1\n", b"A :1\nb:\n 2\n\t3\n", b"A: \xff\xfe\n"]
    )
    def test_its_bytes_are_the_bytes_it_came_from(self, fields):
        assert bytes(minimta.Header.parse(fields + b"\nbody")) == fields

    def test_its_bytes_end_in_a_line_end(self):
        assert bytes(minimta.Header.parse(b"A: 1")) == b"A: 1\n"

    def test_values_are_unfolded(self):
        header = minimta.Header.parse(b"To: a,\n b\nCc: c\nTo:d\n")
        assert header.values("to") == ["a, b", "d"]

    @pytest.mark.parametrize(("name", "wanted"), [("to", True), ("cc", False)])
    def test_has_a_field_in_any_case(self, name, wanted):
        assert minimta.Header.parse(b"TO: a\n").has(name) == wanted

    def test_without_is_a_copy_without_every_such_field(self):
        header = minimta.Header.parse(b"A: 1\nB: 2\na: 3\n\nrest")
        copy = header.without("a", "x")
        assert (bytes(copy), copy.rest) == (b"B: 2\n", b"rest")
        assert bytes(header) == b"A: 1\nB: 2\na: 3\n"

    def test_added_is_a_copy_with_the_field_last(self):
        header = minimta.Header.parse(b"A: 1\n")
        assert bytes(header.added("B", "ü")) == "A: 1\nB: ü\n".encode()
        assert bytes(header) == b"A: 1\n"


FROM_LINE_ROWS = [
    (b"From a\nA: 1\n", b"A: 1\n"),
    (b">From a\nFrom b\n>>From c\nA: 1\n", b"A: 1\n"),
    (b"From a", b""),
    # a field, and what is not in front
    (b"From: a\n", b"From: a\n"),
    (b"A: 1\nFrom b\n", b"A: 1\nFrom b\n"),
    (b"\nFrom b\n", b"\nFrom b\n"),
    (b"", b""),
]

NAME_ROWS = [
    ("", ""),
    ("Jane Doe", "Jane Doe"),
    # specials and dots are quoted
    ("J. Doe", '"J. Doe"'),
    ("Doe, Jane", '"Doe, Jane"'),
    ('Jane "J" Doe', '"Jane \\"J\\" Doe"'),
    ("a\\b", '"a\\\\b"'),
    # no line end gets in
    ("Jane\r\nBcc: x@y", '"Jane Bcc: x@y"'),
    ("  Jane \t Doe ", "Jane Doe"),
    ("Jörg", "=?utf-8?B?SsO2cmc=?="),
]

GECOS_ROWS = [
    ("Jane Doe", "Jane Doe"),
    ("Jane Doe,Room 1,555", "Jane Doe"),
    ("& Doe", "Jane Doe"),
    ("Jane;x", "Jane"),
    ("Jane%x", "Jane"),
    ("", ""),
]

MOMENTS = [0, 86399, 951782400, 1739959801, 1782864000]


class TestFields:
    """Small things that stand in headers."""

    @pytest.mark.parametrize(("given", "wanted"), FROM_LINE_ROWS)
    def test_from_lines_in_front_are_dropped(self, given, wanted):
        assert minimta.drop_from_lines(given) == wanted

    @pytest.mark.parametrize(("given", "wanted"), NAME_ROWS)
    def test_a_display_name_is_a_phrase(self, given, wanted):
        assert minimta.display_name(given) == wanted

    @pytest.mark.parametrize("text", ["ü", "Jörg Müller " * 20, "日本" * 50, "😀" * 40])
    def test_encoded_words_are_decoded_to_the_same(self, text):
        pairs = email.header.decode_header(minimta.encoded_word(text))
        assert str(email.header.make_header(pairs)) == text

    @pytest.mark.parametrize("text", ["Jörg Müller " * 20, "日本" * 50, "😀" * 40])
    def test_an_encoded_word_has_at_most_75_characters(self, text):
        assert max(map(len, minimta.encoded_word(text).split("\n "))) <= 75

    @pytest.mark.parametrize(("gecos", "wanted"), GECOS_ROWS)
    def test_a_full_name_is_the_first_word_of_gecos(self, gecos, wanted):
        assert minimta.gecos_name(gecos, "jane") == wanted

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_a_date_field_is_that_moment(self, moment):
        date = email.utils.parsedate_to_datetime(minimta.rfc_date(moment))
        assert date.timestamp() == moment

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_asctime_is_the_c_librarys(self, moment):
        assert minimta.asctime(moment) == time.asctime(time.localtime(moment))


REMOTE = {"helo": "c.example", "client": "unknown [192.0.2.1]", "proto": "ESMTP"}

RECEIVED_ROWS = [
    (
        {**REMOTE, "recipient": "bob@x"},
        b"Received: from c.example (unknown [192.0.2.1])\n"
        b"\tby host (minimta) with ESMTP id ID\n"
        b"\tfor <bob@x>; ",
    ),
    (
        {**REMOTE, "recipient": ""},
        b"Received: from c.example (unknown [192.0.2.1])\n"
        b"\tby host (minimta) with ESMTP id ID; ",
    ),
    ({"uid": 0}, b"Received: by host (minimta, from userid 0)\n\tid ID; "),
    ({}, b"Received: by host (minimta)\n\tid ID; "),
]


class TestReceivedField:
    """Our trace field."""

    @pytest.mark.parametrize(("fields", "wanted"), RECEIVED_ROWS)
    def test_says_from_whom_by_whom_and_when(self, fields, wanted):
        field = minimta.received_field(fields, "host", "ID", 1.5)
        assert field == wanted + f"{minimta.rfc_date(1.5)}\n".encode()

    @pytest.mark.parametrize(("fields", "wanted"), RECEIVED_ROWS)
    def test_is_one_field(self, fields, wanted):
        field = minimta.received_field(fields, "host", "ID", 1.5)
        header = minimta.Header.parse(field)
        assert ([name for name, _ in header.fields], header.rest) == (["received"], b"")


def plain_mbox(text):
    """`text` as mboxrd, line by line."""
    lines = text.split(b"\n")
    lines = [
        b">" + line if line.lstrip(b">").startswith(b"From ") else line
        for line in lines
    ]
    return b"\n".join(lines) + (b"\n" if text.endswith(b"\n") or not text else b"\n\n")


FROM_TEXTS = [
    *(b"", b"a", b"a\n", b"\n", b"From a\n", b"From a", b">From a\n", b"a\nFrom b\n"),
    *(b">>From a\n>a\n", b"xFrom a\n From b\n", b"From\nFrom:\nfrom a\n", b"a\n\n\n"),
    b"From a\nFrom b\n>From c\nFrom d",
]

DOT_TEXTS = [
    *(
        b"",
        b"a\n",
        b"\n",
        b".\n",
        b"..\n.a\n",
        b"a\n.\n\n.\n",
        b".",
        b"a",
        b"a\r\nb\r\n",
    ),
    *(b"a\rb\n", b"\r\n.\r\n", b"a\r.\rb\n"),
]


class TestBody:
    """A message on its way into a mailbox, onto the wire."""

    @pytest.mark.parametrize("text", FROM_TEXTS)
    def test_every_cut_is_quoted_as_the_whole_is(self, text):
        found = {b"".join(minimta.mbox_quoted(pieces)) for pieces in cuts(text)}
        assert found == {plain_mbox(text)}

    def test_from_in_the_middle_of_an_endless_line_is_not_quoted(self):
        pieces = [b"x" * (minimta.MAX_HEADER + 1), b"From a\n", b"From b\n"]
        found = b"".join(minimta.mbox_quoted(pieces))
        assert found == plain_mbox(b"".join(pieces))

    @pytest.mark.parametrize("text", DOT_TEXTS)
    def test_what_is_dot_stuffed_is_read_back(self, text):
        wanted = text.replace(b"\r\n", b"\n").replace(b"\r", b" ")
        wanted += b"" if wanted.endswith(b"\n") or not wanted else b"\n"
        found = set()
        for pieces in cuts(text):
            message, reader = feed_dots(1000, minimta.dot_stuffed(pieces))
            found.add((message, reader.ended, reader.rest, reader.fault))
        assert found == {(wanted, True, b"", None)}

    def test_a_dot_in_the_middle_of_an_endless_line_is_not_doubled(self):
        pieces = [b"x" * (minimta.MAX_HEADER + 1), b".\n", b".\n"]
        found = b"".join(minimta.dot_stuffed(pieces))
        assert found.endswith(b"x.\r\n..\r\n.\r\n")

    @pytest.mark.parametrize(
        ("first", "wanted"),
        [
            (b"A: 1\ntext\n", b"A: 1\ntext\n"),
            (b"\ntext\n", b"\ntext\n"),
            (b"text\n", b"\ntext\n"),
            (b" text\n", b"\n text\n"),
            (b"", b""),
        ],
    )
    def test_a_message_without_header_gets_an_empty_line(self, first, wanted):
        assert minimta.begin_body(first) == wanted


ORIGIN = {
    "address": "bob@host.example",
    "name": "Bob B",
    "host": "host.example",
    "unique": "U",
    "now": 0,
}
ADDED = (
    f"Message-ID: <U@host.example>\nDate: {minimta.rfc_date(0)}\n"
    "From: Bob B <bob@host.example>\n"
).encode()

COMPLETE_ROWS = [
    # what is missing is added, in this order
    (b"", ADDED),
    (b"To: a\n", b"To: a\n" + ADDED),
    # what is there stays, however malformed
    (b"From: x\nDate: y\nMessage-ID: z\n", b"From: x\nDate: y\nMessage-ID: z\n"),
    (b"FROM :\n" + ADDED, b"FROM :\n" + ADDED),
    # secrets and what delivery writes are taken out
    (b"Bcc: a\nBCC: b\nReturn-Path: <c>\nContent-Length: 1\n" + ADDED, ADDED),
    # of a message that is sent again, Resent- fields are what is missing
    (
        b"Resent-To: a\nResent-Bcc: b\n" + ADDED,
        b"Resent-To: a\n" + ADDED + b"Resent-Message-ID: <U@host.example>\n"
        b"Resent-" + ADDED.split(b"\n")[1] + b"\n",
    ),
]

RECIPIENT_ROWS = [
    (b"To: a\nCc: b, c\nBcc: d\n", ["a", "b", "c", "d"]),
    (b"To: a\nTo: b\n", ["a", "b"]),
    # Resent- ones, and then only those
    (b"To: a\nResent-Cc: b\nResent-Bcc: c\n", ["b", "c"]),
    (b"From: a\nReply-To: b\n", []),
    # folded
    (b"To: a,\n\tb\n", ["a", "b"]),
]


class TestSubmittedHeader:
    """What a submitted message's header gets, loses and says."""

    @pytest.mark.parametrize(("given", "wanted"), COMPLETE_ROWS)
    def test_is_completed(self, given, wanted):
        header = minimta.Header.parse(given)
        assert bytes(minimta.complete_header(header, ORIGIN)) == wanted

    def test_without_a_full_name_from_is_the_address(self):
        header = minimta.Header.parse(b"")
        done = minimta.complete_header(header, {**ORIGIN, "name": ""})
        assert done.values("from") == ["bob@host.example"]

    @pytest.mark.parametrize(("given", "wanted"), RECIPIENT_ROWS)
    def test_names_the_recipients(self, given, wanted):
        header = minimta.Header.parse(given)
        assert list(map(str, minimta.header_recipients(header))) == wanted


TERMINAL_ROWS = [
    ("plain ü\ttab\nline\n", "plain ü\ttab\nline\n"),
    # controls are shown as pictures
    ("\x1b[2J\r\x07\x7f\0", "␛[2J␍␇␡␀"),
    # the second set of controls
    ("\x9b2J\x85", "\ufffd2J\ufffd"),
    # what turns the direction of writing
    ("a\u202eb\u2066c\u2069", "abc"),
    # Persian needs its joiners
    ("می\u200cروم", "می\u200cروم"),
    # what is no character
    ("\udcff", "?"),
]


class TestTerminalText:
    """What may go to a terminal."""

    @pytest.mark.parametrize(("given", "wanted"), TERMINAL_ROWS)
    def test_no_control_survives(self, given, wanted):
        assert minimta.terminal_text(given) == wanted


# == 5 Aliases: Target, AliasTable, split_items ===============================


TARGET_ROWS = [
    ("bob", ("address", "bob")),
    ("bob@x.example", ("address", "bob@x.example")),
    ("B <bob@x>", ("address", "bob@x")),
    ('"B, B" <bob@x>', ("address", "bob@x")),
    ('"a b"@x', ("address", '"a b"@x')),
    # a user behind a backslash
    ("\\bob", ("user", "bob")),
    ('"\\bob"', ("user", "bob")),
    # a file, and the one that is none
    ("/var/x", ("file", "/var/x")),
    ('"/a b"', ("file", "/a b")),
    ("/dev/null", ("null", "/dev/null")),
    # a command, bare or in quotes
    ("|cmd", ("pipe", "cmd")),
    ('"|cmd a, b"', ("pipe", "cmd a, b")),
    ('"|cmd \\"a b\\" c"', ("pipe", 'cmd "a b" c')),
    ("|/dev/null", ("pipe", "/dev/null")),
    # a list in a file
    (":include:/x", ("include", "/x")),
    (":include: /x", ("include", "/x")),
    ('":include:/x y"', ("include", "/x y")),
    # a Maildir, a file below the home
    ("/home/bob/Maildir/", ("file", "/home/bob/Maildir/")),
    ("~/outbox", ("file", "~/outbox")),
    # Postfix's other way to quote a command; a quoted # is no comment
    ('|"cmd a, b"', ("pipe", "cmd a, b")),
    ('"|exec procmail #bob"', ("pipe", "exec procmail #bob")),
    # refusals of OpenSMTPD and Exim
    ("error:550 5.7.1 no", ("error", "550 5.7.1 no")),
    ("error:550 no", ("error", "550 5.0.0 no")),
    ("error:450 4.7.1 later", ("error", "450 4.7.1 later")),
    ("error:4.7.1 later", ("error", "450 4.7.1 later")),
    ("error:5.7.1 no", ("error", "550 5.7.1 no")),
    ("error:no", ("error", "550 5.0.0 no")),
    ('"error:550 no, sir"', ("error", "550 5.0.0 no, sir")),
    # a code and a status that contradict each other: the code says it
    ("error:550 4.7.1 no", ("error", "550 5.7.1 no")),
    (":fail: gone, for good", ("error", "550 5.0.0 gone, for good")),
    (":FAIL: gone", ("error", "550 5.0.0 gone")),
    (":defer: later", ("error", "450 4.0.0 later")),
    (":fail:", ("error", "550 5.0.0 mail is not accepted here")),
    (":blackhole:", ("null", "/dev/null")),
]

BAD_TARGETS = [
    *(
        "|",
        '"|"',
        ":include:",
        ":include:x",
        ":unknown:",
        "a b",
        "a@b@c",
        "@x",
        "\\",
        '"',
        "<>",
        "bob@",
    ),
    *("\\a b", "a, b", "(c)", ""),
]


class TestTarget:
    """One destination in an alias or .forward."""

    @pytest.mark.parametrize(("item", "wanted"), TARGET_ROWS)
    def test_reads(self, item, wanted):
        assert minimta.Target.parse(item).fields() == wanted

    @pytest.mark.parametrize("item", BAD_TARGETS)
    def test_refuses_with_a_reason(self, item):
        with pytest.raises(ValueError, match="."):
            minimta.Target.parse(item)

    @pytest.mark.parametrize(
        "item",
        [
            *[item for item, _ in TARGET_ROWS],
            # what would be taken for two items, or for an escape
            *('"/a, b"', '":include:/a, b"', "|printf a\\\\b", '"|printf a\\\\\\\\b"'),
        ],
    )
    def test_what_is_written_is_read_back(self, item):
        target = minimta.Target.parse(item)
        assert minimta.parse_targets(str(target)) == (target,)


ITEM_ROWS = [
    ("", []),
    ("a", ["a"]),
    ("a, b,c", ["a", "b", "c"]),
    (" a ,, b, ", ["a", "b"]),
    # commas in quotes, brackets and comments
    ('"|a, b", c', ['"|a, b"', "c"]),
    ('"|a \\", b", c', ['"|a \\", b"', "c"]),
    ("<@r,@s:a@b>, c", ["<@r,@s:a@b>", "c"]),
    ("a (b, (c, d)), e", ["a (b, (c, d))", "e"]),
    # brackets in quotes are letters; closing ones close nothing
    ('"(", a', ['"("', "a"]),
    ("a), b", ["a)", "b"]),
    # a backslash takes the meaning off
    ("a\\,b, c", ["a\\,b", "c"]),
    # a sentence goes to the end
    ("a, :fail: no, never", ["a", ":fail: no, never"]),
    ("error:550 no, sir", ["error:550 no, sir"]),
]

LOOSE_ROWS = [
    ("a; b", ["a", "b"]),
    ("a b\tc", ["a", "b", "c"]),
    ("a b; c, d", ["a", "b", "c", "d"]),
    # what has blanks of its own keeps them
    ("B. <b@x>; c", ["B. <b@x>", "c"]),
    ('"|x y"', ['"|x y"']),
    ("|cd x; y z", ["|cd x; y z"]),
    ("/a b", ["/a b"]),
    ("error:550 a b; c", ["error:550 a b; c"]),
]

ALIAS_TEXTS = [
    ("a: b", {"a": "b"}),
    ("A: B", {"a": "B"}),
    ("a:b,c", {"a": "b, c"}),
    ("a : b", {"a": "b"}),
    # quoted names
    ('"a b": c', {"a b": "c"}),
    ('"a:b": c', {"a:b": "c"}),
    # comments, also behind values, not in quotes
    ("# x\n\na: b # c", {"a": "b"}),
    ('a: "|b # c" # d', {"a": '"|b # c"'}),
    # lines that go on
    ("a: b,\n  c\n\td\ne: f", {"a": "b, c, d", "e": "f"}),
    ("a: b, \\\nc\ne: f", {"a": "b, c", "e": "f"}),
    ("a: b,\n  c,\n\td\ne: f", {"a": "b, c, d", "e": "f"}),
    ("a:\n b", {"a": "b"}),
    # DOS line ends
    ("a: b\r\nc: d\r\n", {"a": "b", "c": "d"}),
    # the first of two counts
    ("a: b\nA: c", {"a": "b"}),
]

BAD_ALIAS_LINES = [
    ("bob", "need name: value"),
    (": bob", "there is no name before the colon"),
    ("a:", "a: missing value for alias"),
    ("a: ,", "a: missing value for alias"),
    (' a: "b', "the first line begins with white space"),
    ('a: "b', "unbalanced quotation mark"),
    ("a: b@c@d", "<b@c@d>: bad domain name"),
    ("a: |", "nothing behind |"),
]

LOOP_ROWS = [
    # a name that leads to itself is the mailbox
    ("root: root", []),
    ("a: b\nb: b", []),
    # so is one behind a backslash
    ("a: b\nb: \\a", []),
    # the line is that of the name that the loop comes back to
    ("a: b\nb: a", [(1, "alias loop: a -> b -> a")]),
    ("x: a\na: b\nb: c\nc: A", [(2, "alias loop: a -> b -> c -> a")]),
    # behind other targets
    ("a: x@y, b\nb: z, a", [(1, "alias loop: a -> b -> a")]),
    # two ways to one place are none
    ("a: b, c\nb: d\nc: d\nd: e", []),
    # a domain makes it another address
    ("a: b\nb: a@far.example", []),
]


class TestAliasTable:
    """The aliases file."""

    @pytest.mark.parametrize(("text", "wanted"), ITEM_ROWS)
    def test_a_value_is_split_at_its_commas(self, text, wanted):
        assert minimta.split_items(text) == wanted

    @pytest.mark.parametrize(("text", "wanted"), ALIAS_TEXTS)
    def test_reads(self, text, wanted):
        assert dict(minimta.AliasTable.parse(text).items()) == wanted

    @pytest.mark.parametrize(("line", "why"), BAD_ALIAS_LINES)
    def test_a_bad_line_has_its_number_and_reason(self, line, why):
        # the first line is another, but for the rule about first lines
        text, number = (line, 1) if line[0] == " " else (f"x: y\n{line}\nz: y", 2)
        assert minimta.AliasTable.parse(text).problems == [(number, why)]

    def test_a_bad_line_spoils_no_other(self):
        table = minimta.AliasTable.parse("a: b\nbad\nc: d")
        assert table.items() == [("a", "b"), ("c", "d")]

    @pytest.mark.parametrize(("text", "wanted"), LOOSE_ROWS)
    def test_postfixs_looser_separators_are_read_too(self, text, wanted):
        assert minimta.loose_items(text) == wanted

    def test_looser_separators_are_warned_of(self):
        table = minimta.AliasTable.parse("a: b\nc: d e\nf: g; h")
        assert table.warnings == [
            (2, "c: write commas between targets"),
            (3, "f: write commas between targets"),
        ]

    def test_a_target_that_does_not_exist_is_named_with_its_line(self):
        table = minimta.AliasTable.parse("a: b, x\nb: y@far, x\nc: c")
        asked = []

        def problem(target):
            asked.append(target.text)
            return "no such user" if target.text == "x" else ""

        assert table.dangling(problem) == [
            (1, "a: x: no such user"),
            (2, "b: x: no such user"),
        ]
        assert sorted(asked) == ["c", "x", "y@far"]  # once each, others' names never

    def test_a_duplicate_is_warned_of(self):
        table = minimta.AliasTable.parse("a: b\n\nA: c")
        assert table.warnings == [(3, "duplicate alias a; line 1 counts")]

    @pytest.mark.parametrize(("text", "wanted"), LOOP_ROWS)
    def test_finds_loops(self, text, wanted):
        assert minimta.AliasTable.parse(text).loops() == wanted

    def test_a_chain_of_50_000_is_no_loop(self):
        text = "".join(f"a{n}: a{n + 1}\n" for n in range(50_000))
        assert minimta.AliasTable.parse(text).loops() == []

    def test_a_loop_of_50_000_is_one(self):
        text = "".join(f"a{n}: a{(n + 1) % 50_000}\n" for n in range(50_000))
        assert len(minimta.AliasTable.parse(text).loops()) == 1

    def test_what_the_database_keeps_means_the_same(self):
        text = 'a: "|b \\"c, d\\"", "/e f", \\g, "H, I" <j@k>\nl: "/m, n"'
        table = minimta.AliasTable.parse(text)
        kept = [minimta.parse_targets(value) for _, value in table.items()]
        assert kept == [targets for _, targets in table.entries.values()]


# == 6 Queue words: Wishes, Envelope, Attempt, new_id, retry_delay ============


class TestQueueId:
    """Names of queue files."""

    @pytest.mark.parametrize("chance", [0, 511, 65535, -1])
    @pytest.mark.parametrize("now", [0, 1.0005, 1795433527.25, 2199023255.5])
    def test_has_ten_letters_and_is_an_id(self, now, chance):
        queue_id = minimta.new_id(now, chance)
        assert len(queue_id) == 10
        assert minimta.is_id(queue_id)

    def test_ids_sort_by_time_whatever_the_chance(self):
        times = [0, 0.001, 1, 1795433527.25, 1795433527.252, 1900000000, 2199000000]
        ids = [minimta.new_id(now, 511 * (n % 2)) for n, now in enumerate(times, 1)]
        assert ids == sorted(ids)

    def test_another_chance_is_another_id(self):
        assert len({minimta.new_id(1.0, chance) for chance in range(512)}) == 512

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("0123456789", True),
            # a report, a report's report
            ("0123456789B1", True),
            ("0123456789B1B12", True),
            # too short, other letters, a path, too long
            *[("", False), ("012345678", False), ("012345678I", False)],
            *[("012345678a", False), ("../../../x", False), (".123456789", False)],
            *[("0123456789X1", False), ("0123456789" + "1" * 30, False)],
            # digits of another script
            *[("012345678\u0661", False), ("0123456789B\u0661", False)],
        ],
    )
    def test_what_can_be_an_id(self, name, wanted):
        assert minimta.is_id(name) == wanted


class TestWishes:
    """NOTIFY and ORCPT, RET and ENVID: RFC 3461."""

    @pytest.mark.parametrize(
        ("notify", "wanted"),
        [
            ("", {"FAILURE", "DELAY"}),
            ("never", set()),
            ("SUCCESS", {"SUCCESS"}),
            ("success,delay", {"SUCCESS", "DELAY"}),
        ],
    )
    def test_says_what_is_wanted(self, notify, wanted):
        wishes = minimta.Wishes(notify)
        words = {"SUCCESS", "FAILURE", "DELAY"}
        assert {word for word in words if wishes.want(word)} == wanted

    @pytest.mark.parametrize(
        ("text", "is_right"),
        [
            *[("NEVER", True), ("success,failure,delay", True), ("", False)],
            *[("NEVER,DELAY", False), ("DELAY,DELAY", False), ("x", False)],
        ],
    )
    def test_notify_has_its_words(self, text, is_right):
        assert minimta.is_notify(text) == is_right

    @pytest.mark.parametrize(
        ("text", "is_right"),
        [
            *[("abc", True), ("a+2Bb", True), ("a+2b", False), ("a+", False)],
            *[
                ("a b", False),
                ("a=b", False),
                ("", False),
                ("ü", False),
                ("a\n", False),
            ],
            *[("x" * 100, True), ("x" * 101, False)],
        ],
    )
    def test_xtext_is_printable(self, text, is_right):
        assert minimta.is_xtext(text, 100) == is_right

    @pytest.mark.parametrize(
        ("text", "is_right"),
        [("rfc822;a@b", True), ("x-my;a", True), ("a@b", False), (";a", False)],
    )
    def test_an_original_recipient_has_a_type(self, text, is_right):
        assert minimta.is_original(text) == is_right

    def test_they_are_kept_in_the_envelope(self):
        wishes = {"b@x": minimta.Wishes("NEVER", "rfc822;c@x")}
        more = {"ret": "HDRS", "envid": "e1", "wishes": wishes}
        envelope = minimta.Envelope("a@x", ["b@x", "d@x"], **more)
        again = minimta.Envelope.parse(bytes(envelope))
        assert (again.ret, again.envid, again.wishes) == ("HDRS", "e1", wishes)
        assert again.wishes_of("d@x") == minimta.NO_WISHES

    @pytest.mark.parametrize(
        "line", ["ret: X", "envid: a b", "notify: X", "original: x", "kind: lie"]
    )
    def test_what_makes_no_sense_is_left_out(self, line):
        text = f"arrived: 1\nsender: a@x\nrecipient: b@x\n{line}\n\n".encode()
        found = minimta.Envelope.parse(text)
        assert (found.ret, found.envid, found.wishes, found.kind) == (
            *("", "", {}, "message"),
        )


class TestRetryDelay:
    """When the next attempt is."""

    @pytest.mark.parametrize(
        ("age", "wanted"),
        # as old as the mail is, but within the limits
        [(0, 300), (299, 300), (1000, 1000), (4000, 4000), (10**6, 4000)],
    )
    def test_grows_with_the_age_within_the_limits(self, age, wanted):
        assert minimta.retry_delay(age, 300, 4000, 0.5) == wanted

    @pytest.mark.parametrize(("chance", "wanted"), [(0, 900), (1, 1100)])
    def test_chance_gives_or_takes_a_tenth(self, chance, wanted):
        assert minimta.retry_delay(1000, 300, 4000, chance) == pytest.approx(wanted)


ENVELOPES = [
    ("a@b", ["c@d"], {}),
    ("", ["c@d", "e@f"], {"kind": "report", "origin": "bounce of X"}),
    ("ü@b", ['"a: b"@c'], {"arrived": 1795433527.25, "body": "8BITMIME SMTPUTF8"}),
]

BAD_ENVELOPES = [
    *(b"", b"garbage", b"sender: a\n", b"\n\n", b"\0" * 100),
    # no empty line; no sender; no recipient; no time
    b"arrived: 1\nsender: a\nrecipient: b\n",
    b"arrived: 1\nrecipient: b\n\n",
    b"arrived: 1\nsender: a\n\n",
    b"sender: a\nrecipient: b\n\n",
    # a time that is none, a line that is none
    b"arrived: x\nsender: a\nrecipient: b\n\n",
    b"arrived: 1\nsender: a\nrecipient b\n\n",
]


class TestEnvelope:
    """The first lines of a queue file."""

    @pytest.mark.parametrize(("sender", "recipients", "more"), ENVELOPES)
    def test_what_is_written_is_read_back(self, sender, recipients, more):
        envelope = minimta.Envelope(sender, recipients, **more)
        read = minimta.Envelope.parse(bytes(envelope) + b"Subject: x\n\nbody")
        assert vars(read) == vars(envelope)

    @pytest.mark.parametrize("letter", ["\n", "\r", "\0"])
    @pytest.mark.parametrize("place", ["sender", "recipient", "origin"])
    def test_no_line_end_gets_in(self, place, letter):
        words = {**dict.fromkeys(("sender", "recipient", "origin"), "a")}
        words[place] += f"{letter}recipient: root"
        envelope = minimta.Envelope(
            words["sender"], [words["recipient"]], origin=words["origin"]
        )
        with pytest.raises(ValueError, match="line end"):
            bytes(envelope)

    @pytest.mark.parametrize("name", ["priority", "self", "cls", "recipients", "more"])
    def test_an_unknown_name_is_ignored(self, name):
        block = f"arrived: 1\nsender: a\n{name}: x\nrecipient: b\n\n".encode()
        assert minimta.Envelope.parse(block).recipients == ["b"]

    @pytest.mark.parametrize("block", BAD_ENVELOPES)
    def test_refuses_what_is_no_queue_file(self, block):
        with pytest.raises(ValueError, match="."):
            minimta.Envelope.parse(block)


def make_attempt(outcome="deferred", recipient="bob@x", where="mailbox bob@x", why="w"):
    """A journal line's value."""
    return minimta.Attempt(1.5, outcome, "4.2.0", recipient, where, "local", why)


class TestAttempt:
    """One line of a journal."""

    @pytest.mark.parametrize("outcome", ["sent", "deferred", "bounced"])
    def test_what_is_written_is_read_back(self, outcome):
        attempt = make_attempt(outcome, why="why: ü")
        assert minimta.parse_journal(bytes(attempt)) == [attempt]

    def test_a_tab_in_a_word_makes_no_other_word(self):
        (read,) = minimta.parse_journal(bytes(make_attempt(why="a\tb")))
        assert read.text == "a b"

    @pytest.mark.parametrize(
        ("outcome", "is_final"),
        [("sent", True), ("bounced", True), ("deferred", False)],
    )
    def test_only_deferred_is_tried_again(self, outcome, is_final):
        assert make_attempt(outcome).is_final == is_final

    def test_a_torn_last_line_does_not_count(self):
        line = bytes(make_attempt())
        for end in range(len(line)):
            assert minimta.parse_journal(line + line[:end]) == [make_attempt()]

    def test_a_torn_line_in_the_middle_does_not_count(self):
        line = bytes(make_attempt())
        for end in range(1, len(line) - 10):
            torn = line[:end] + b"\n"
            assert minimta.parse_journal(torn + line) == [make_attempt()]


ARRIVED = time.mktime((2025, 2, 19, 6, 39, 7, 0, 0, -1))
REASON = "(Host or domain name not found, try again)"
LONG_REASON = (
    "Host or domain name not found. Name service error for name=gmail.com "
    "type=MX: Host not found, try again"
)


def make_entry(queue_id="0123456789", size=473, recipients=("test@gmail.com",)):
    """A message in the queue, on the day of the transcript."""
    sender = "payam@centos7-1.localdomain"
    envelope = minimta.Envelope(sender, list(recipients), arrived=ARRIVED)
    return minimta.QueueEntry(queue_id, size, envelope)


class TestQueueEntry:
    """A message as mailq shows it."""

    def test_what_is_written_is_read_back(self):
        entry = make_entry(recipients=["a@b", "c@d", "e@f"])
        entry.state, entry.reasons, entry.done = "deferred", {"a@b": "why: x"}, {"e@f"}
        read = minimta.QueueEntry.parse(bytes(entry))
        assert vars(read.envelope) == vars(entry.envelope)
        assert {**vars(read), "envelope": 0} == {**vars(entry), "envelope": 0}

    def test_a_deferred_row_is_postfixs(self):
        entry = make_entry()
        entry.note([make_attempt(recipient="test@gmail.com", why=LONG_REASON)])
        assert entry.rows() == (
            "0123456789      473 Wed Feb 19 06:39:07  payam@centos7-1.localdomain\n"
            f"({LONG_REASON})\n" + " " * 41 + "test@gmail.com\n"
        )

    def test_a_long_id_has_the_columns_of_the_transcript(self):
        row = "E085461E470C      473 Wed Feb 19 06:39:07  payam@centos7-1.localdomain\n"
        entry = make_entry("E085461E470C")
        entry.note([make_attempt(recipient="test@gmail.com")])
        assert entry.rows().splitlines(True)[0] == row

    @pytest.mark.parametrize(
        ("state", "flag"), [("active", "*"), ("deferred", " "), ("hold", "!")]
    )
    def test_a_state_is_one_letter_behind_the_id(self, state, flag):
        entry = make_entry()
        entry.state = state
        assert entry.rows().startswith(f"0123456789{flag}     473 Wed")

    def test_a_short_reason_ends_at_column_78(self):
        entry = make_entry()
        entry.note([make_attempt(recipient="test@gmail.com", why="x" * 20)])
        assert entry.rows().splitlines()[1] == " " * 56 + f"({'x' * 20})"

    def test_the_null_sender_is_mailer_daemon(self):
        entry = make_entry()
        entry.envelope.sender = ""
        assert entry.rows().splitlines()[0].endswith(" MAILER-DAEMON")

    def test_a_reason_is_said_once_for_its_recipients(self):
        entry = make_entry(recipients=["a@b", "c@d", "e@f"])
        entry.note([make_attempt(recipient=r, why="w") for r in ("a@b", "c@d")])
        assert [line.strip() for line in entry.rows().splitlines()[1:]] == [
            *("(w)", "a@b", "c@d", "e@f"),
        ]

    def test_who_is_done_is_not_shown(self):
        entry = make_entry(recipients=["a@b", "c@d"])
        entry.note([make_attempt("sent", "a@b")])
        assert entry.pending == ["c@d"]

    def test_a_later_attempt_wins(self):
        entry = make_entry(recipients=["a@b"])
        entry.note([make_attempt(recipient="a@b"), make_attempt("sent", "a@b")])
        assert entry.pending == []

    def test_a_recipient_with_one_open_target_is_pending(self):
        entry = make_entry(recipients=["a@b"])
        entry.note(
            [make_attempt("sent", "a@b"), make_attempt("deferred", "a@b", "x y")]
        )
        assert (entry.pending, entry.state) == (["a@b"], "deferred")

    def test_what_a_sender_wrote_is_one_line(self):
        entry = make_entry(recipients=["a\x1b[2J@b"])
        assert "\x1b" not in entry.rows()


class TestMailqText:
    """mailq's whole answer."""

    def test_an_empty_queue_is_said_to_be(self):
        assert "".join(minimta.mailq_text([])) == "Mail queue is empty\n"

    def test_title_row_and_total_are_postfixs(self):
        entry = make_entry()
        assert "".join(minimta.mailq_text([entry])) == (
            "-Queue ID- --Size-- ----Arrival Time---- -Sender/Recipient-------\n"
            f"{entry.rows()}\n-- 0 Kbytes in 1 Request.\n"
        )

    def test_an_empty_line_stands_between_two(self):
        entry = make_entry()
        text = "".join(minimta.mailq_text([entry, entry]))
        assert f"{entry.rows()}\n{entry.rows()}\n-- " in text

    @pytest.mark.parametrize(
        ("sizes", "wanted"),
        [([1023], "0 Kbytes in 1 Request"), ([1024, 1024], "2 Kbytes in 2 Requests")],
    )
    def test_the_total_is_in_whole_kbytes(self, sizes, wanted):
        entries = [make_entry(size=size) for size in sizes]
        assert list(minimta.mailq_text(entries))[-1] == f"\n-- {wanted}.\n"


# A message of each kind: id, sender, recipients, age, state, reasons.
STOCK = (
    ("0AAAAAAAAA", "alice@far.example", ["a@one.example"], 3 * 3600, "deferred"),
    ("0BBBBBBBBB", "", ["b@two.example", "c@sub.one.example"], 3 * 86400, "deferred"),
    ("0CCCCCCCCC", f"payam@{HOST}", ["d@two.example"], 0, "active"),
    ("0DDDDDDDDD", "bob@far.example", ["e@three.example"], 3600, "hold"),
)
STOCK_REASONS = {
    "a@one.example": "connect to one.example: Connection refused",
    "b@two.example": "Host not found",
    "c@sub.one.example": "Greylisted, see you later",
}


def stock_entries():
    """STOCK as entries of the queue, at the second 1,000,000."""
    found = []
    for queue_id, sender, recipients, age, state in STOCK:
        envelope = minimta.Envelope(sender, recipients, arrived=1e6 - age)
        entry = minimta.QueueEntry(queue_id, 1000, envelope)
        entry.state = state
        if state == "deferred":
            entry.reasons = {name: STOCK_REASONS[name] for name in recipients}
        found.append(entry)
    return found


# Selectors -> the second letters of the ids that they choose from STOCK.
CHOICES = {
    "all": "ABCD",
    "!all": "",
    "0A": "A",
    "0AAAAAAAAA": "A",
    "0AAAAAAAAA1": "",
    "0A 0C": "AC",
    "!0A": "BCD",
    "!0A !0B": "CD",
    "0": "ABCD",
    "to:ONE.example": "AB",
    "to:d@": "C",
    "to:<>": "",
    "!to:one.example": "CD",
    "from:alice": "A",
    "from:<>": "B",
    "!from:<>": "ACD",
    "from:far.example": "AD",
    "host:one.example": "AB",
    "host:@one.example": "AB",
    "host:sub.One.Example": "B",
    "host:ne.example": "",
    "host:two.example": "BC",
    "host:far.example": "",
    "reason:REFUSED$": "A",
    "reason:^(host|connect)": "AB",
    "reason:.": "AB",
    "!reason:refused": "BCD",
    "older:1d": "B",
    "older:2h": "AB",
    "older:1d12h": "B",
    "younger:7201": "CD",
    "younger:1w": "ABCD",
    "held": "D",
    "hold": "D",
    "deferred": "AB",
    "active": "C",
    "!held": "ABC",
    "to:one.example !from:<>": "A",
    "deferred younger:1d": "A",
    "deferred held": "",
    "all !held !active": "AB",
    "0A 0B older:1d": "B",
    "0A !deferred": "",
}


def chosen(text, entries=None):
    """The second letters of the ids that selectors choose."""
    selectors = [minimta.Selector(word) for word in text.split()]
    entries = stock_entries() if entries is None else entries
    found = minimta.select_entries(entries, selectors, 1e6)
    return "".join(entry.queue_id[1] for entry in found)


class TestSelector:
    """Which messages a queue command means."""

    @pytest.mark.parametrize(("text", "letters"), CHOICES.items(), ids=CHOICES)
    def test_it_means_the_messages_that_fit(self, text, letters):
        assert chosen(text) == letters

    def test_none_at_all_means_every_message(self):
        assert chosen("") == "ABCD"

    def test_who_has_it_already_is_no_recipient_any_more(self):
        entries = stock_entries()
        entries[1].done.add("c@sub.one.example")
        assert chosen("to:one.example", entries) == "A"
        assert chosen("host:one.example", entries) == "A"

    def test_the_id_of_a_report_is_one(self):
        entries = stock_entries()
        entries[2].queue_id = "0CCCCCCCCCB1"
        assert chosen("0CCCCCCCCCB1", entries) == "C"

    def test_the_queue_is_not_read_to_its_end_before_the_first(self):
        endless = itertools.cycle(stock_entries())
        found = minimta.select_entries(endless, [minimta.Selector("0C")], 1e6)
        assert next(found).queue_id == "0CCCCCCCCC"

    @pytest.mark.parametrize(
        "text",
        [
            *("", "!", "nonsense", "0a", "ALL ", "a@b", "*", "../0AAAAAAAAA", "-"),
            *("to:", "from:", "host:", "reason:", "older:", "younger:", ":", ":x"),
            *("all:x", "id:", "subject:x", "state:nothing", "older:soon", "older:-1d"),
            *("younger:1y", "reason:(", "reason:[", "!older:x", "0\n", "0A,0B"),
        ],
    )
    def test_what_is_none_is_named(self, text):
        with pytest.raises(ValueError, match=".") as failure:
            minimta.Selector(text)
        assert minimta.printable(text, 60) in str(failure.value)
        assert "\n" not in str(failure.value)

    def test_a_word_that_drives_terminals_is_not_repeated_as_it_is(self):
        with pytest.raises(ValueError, match="not a selector") as failure:
            minimta.Selector("\x1b[2J")
        assert "\x1b" not in str(failure.value)


class TestShownQueue:
    """Ages, sizes and sums as exim shows them."""

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            *((0, "0m"), (59, "0m"), (60, "1m"), (25 * 60, "25m"), (5459, "90m")),
            *((91 * 60, "1h"), (119 * 60, "1h"), (26 * 3600, "26h")),
            *((72 * 3600, "72h"), (73 * 3600, "3d"), (96 * 3600, "4d")),
        ],
    )
    def test_an_age_has_exims_unit(self, seconds, text):
        assert minimta.shown_age(seconds) == text

    @pytest.mark.parametrize(
        ("size", "text"),
        [
            *((1, "1"), (355, "355"), (1023, "1023"), (1024, "1.0K"), (2970, "2.9K")),
            *((10 * 1024, "10K"), (17000, "17K"), (1023 * 1024, "1023K")),
            *((1 << 20, "1.0M"), (1258291, "1.2M"), (50 << 20, "50M")),
        ],
    )
    def test_a_size_has_exims_unit(self, size, text):
        assert minimta.shown_size(size) == text

    def test_a_sum_has_a_row_for_each_domain_the_fullest_first(self):
        rows = minimta.summary_text(stock_entries(), 1e6).splitlines()
        assert rows[0].split() == ["Count", "Volume", "Oldest", "Newest", "Domain"]
        assert [row.split() for row in rows[1:] if "(" not in row] == [
            ["2", "2.0K", "72h", "0m", "two.example"],
            ["1", "1000", "3h", "3h", "one.example"],
            ["1", "1000", "72h", "72h", "sub.one.example"],
            ["1", "1000", "60m", "60m", "three.example"],
        ]

    def test_a_sum_tells_a_domains_own_reason(self):
        text = minimta.summary_text(stock_entries(), 1e6)
        for domain, why in (
            ("one.example", "connect to one.example: Connection refused"),
            ("sub.one.example", "Greylisted, see you later"),
        ):
            row = text[text.index(f"  {domain}\n") :].splitlines()[1]
            assert row.strip() == f"({why})"

    def test_two_recipients_of_a_domain_are_one_message(self):
        entry = make_entry(recipients=["a@x.example", "b@X.Example"])
        rows = minimta.summary_text([entry], ARRIVED).splitlines()
        assert rows[1].split() == ["1", "473", "0m", "0m", "x.example"]

    def test_an_empty_queue_has_the_title_only(self):
        assert minimta.summary_text([], 0.0).count("\n") == 1

    def test_what_a_host_said_is_one_line_of_a_sum(self):
        entry = make_entry()
        entry.reasons = {"test@gmail.com": "a\x1b[2J\nb"}
        text = minimta.summary_text([entry], ARRIVED)
        assert text.count("\n") == 3
        assert "\x1b" not in text


class TestQueueTree:
    """A message as `postqueue -j` shows it, and as the daemon sends it."""

    KEYS = (
        *("queue_name", "queue_id", "arrival_time", "message_size"),
        *("forced_expire", "sender", "recipients"),
    )

    def test_keys_stand_in_postqueues_order_and_ours_behind(self):
        keys = list(make_entry().tree())
        assert keys[: len(self.KEYS)] == list(self.KEYS)
        assert keys[len(self.KEYS) :] == ["next_attempt", "attempts"]

    def test_values_have_postqueues_types(self):
        first, second, third, fourth = (entry.tree() for entry in stock_entries())
        assert first == {
            "queue_name": "deferred",
            "queue_id": "0AAAAAAAAA",
            "arrival_time": 1_000_000 - 3 * 3600,
            "message_size": 1000,
            "forced_expire": False,
            "sender": "alice@far.example",
            "recipients": [
                {
                    "address": "a@one.example",
                    "delay_reason": STOCK_REASONS["a@one.example"],
                }
            ],
            "next_attempt": 0,
            "attempts": 0,
        }
        assert type(first["arrival_time"]) is int
        assert second["sender"] == "MAILER-DAEMON"
        assert third["recipients"] == [{"address": "d@two.example"}]
        assert (third["queue_name"], fourth["queue_name"]) == ("active", "hold")

    def test_who_has_it_is_not_listed(self):
        entry = make_entry(recipients=["a@x", "b@x"])
        entry.done = {"a@x"}
        assert entry.tree()["recipients"] == [{"address": "b@x"}]

    def test_what_is_to_be_returned_says_so(self):
        entry = make_entry()
        entry.is_given_up = True
        assert entry.tree()["forced_expire"] is True
        for state, flags in (("active", "*#"), ("deferred", "#"), ("hold", "!#")):
            entry.state = state
            assert entry.rows().startswith(f"0123456789{flags}     473 Wed")

    @pytest.mark.parametrize("state", ["active", "deferred", "hold"])
    def test_each_field_is_read_back(self, state):
        entry = make_entry(recipients=["a@b", "ü@d", '"x y"@f'])
        entry.state, entry.reasons = state, {"a@b": "why: x\ty", "ü@d": "späth"}
        entry.done, entry.due, entry.tries = {'"x y"@f'}, 1.25e9 + 0.5, 7
        entry.is_given_up = state == "hold"
        entry.envelope.sender = "" if state == "hold" else "s@t"
        read = minimta.QueueEntry.parse(bytes(entry))
        assert vars(read.envelope) == vars(entry.envelope)
        assert {**vars(read), "envelope": 0} == {**vars(entry), "envelope": 0}
        assert read.tree() == entry.tree()


# == 8 Dialogue: Reply, Client, Transaction, Session ==========================


class SessionPeer:
    """A Session as the other end of a dialogue, as Wire is a server.

    Messages are not kept: what follows 354 is taken up to the dot, and
    answered as stored, or as failed if there is an `error`.
    """

    def __init__(self, session, error=None):
        self.session = session
        self.error = error
        self.in_data = False
        self.replies = [session.greeting()]

    def send(self, line):
        if not self.in_data:
            self.replies.append(self.session.feed(line[:-2]))
            self.in_data = self.replies[-1].action == "data"
        elif line == b".\r\n":
            self.in_data = False
            done = self.session.stored("0123456789")
            self.replies.append(self.session.failed(self.error) if self.error else done)

    def answer(self):
        return bytes(self.replies.pop(0)).decode().splitlines()[-1]


NEAR = minimta.Client("127.0.0.1", True)
FAR = minimta.Client("192.0.2.1", False)
LOCAL = minimta.Client("local", True, 1000)


def make_session(client=NEAR, text="", verify=lambda address: None, room=1 << 40):
    """A Session whose house is all right, unless it is said to be not."""
    return minimta.Session(make_settings(text), client, verify, lambda: room)


def refuse(status):
    """A verify() that knows nobody."""

    def verify(address):
        raise minimta.MailError(status, "no such one")

    return verify


HELLO = "S: 220\nC: EHLO c.example\nS: 250\n"
MAIL = f"{HELLO}C: MAIL FROM:<a@far.example>\nS: 250 2.1.0\n"
RCPT = f"{MAIL}C: RCPT TO:<bob@host.example>\nS: 250 2.1.5\n"

ORDER = {
    "the greeting comes first": "S: 220 host.example ESMTP",
    "HELO answers with the host": "S: 220\nC: HELO c\nS: 250 host.example",
    "HELO needs a name": "S: 220\nC: HELO\nS: 501 5.5.4",
    "MAIL needs EHLO": "S: 220\nC: MAIL FROM:<a@b>\nS: 503 5.5.1",
    "RCPT needs MAIL": f"{HELLO}C: RCPT TO:<a@b>\nS: 503 5.5.1",
    "DATA needs MAIL": f"{HELLO}C: DATA\nS: 503 5.5.1",
    "DATA needs RCPT": f"{MAIL}C: DATA\nS: 503 5.5.1",
    "DATA without a good RCPT is no transaction": (
        f"{MAIL}C: RCPT TO:<a b>\nS: 501 5.1.3\nC: DATA\nS: 554 5.5.1"
    ),
    "one bad RCPT does not spoil a good one": (
        f"{RCPT}C: RCPT TO:<a b>\nS: 501\nC: DATA\nS: 354"
    ),
    "MAIL comes once": f"{MAIL}C: MAIL FROM:<a@b>\nS: 503 5.5.1",
    "RSET forgets": f"{RCPT}C: RSET\nS: 250 2.0.0\nC: DATA\nS: 503",
    "EHLO forgets": f"{RCPT}C: EHLO d\nS: 250\nC: DATA\nS: 503",
    "a refused EHLO forgets nothing": f"{RCPT}C: EHLO\nS: 501\nC: DATA\nS: 354",
    "NOOP forgets nothing": f"{RCPT}C: NOOP\nS: 250\nC: DATA\nS: 354",
    "a message is followed by the next": (
        f"{RCPT}C: DATA\nS: 354\nC: text\nC: .\nS: 250 2.0.0 Ok: queued as 0123456789\n"
        "C: DATA\nS: 503\nC: MAIL FROM:<a@b>\nS: 250"
    ),
    "QUIT says goodbye": f"{HELLO}C: QUIT\nS: 221 2.0.0",
}

SYNTAX = {
    "case of verbs does not count": f"{HELLO}C: mail from:<a@b>\nS: 250",
    "blanks around a path do not count": f"{HELLO}C: MAIL FROM: <a@b> \nS: 250",
    "brackets may be missing": f"{HELLO}C: MAIL FROM:a@b\nS: 250",
    "the null sender": f"{HELLO}C: MAIL FROM:<>\nS: 250",
    "no null recipient": f"{MAIL}C: RCPT TO:<>\nS: 501 5.1.3",
    "MAIL TO": f"{HELLO}C: MAIL TO:<a@b>\nS: 501 5.5.4",
    "RCPT FROM": f"{MAIL}C: RCPT FROM:<a@b>\nS: 501 5.5.4",
    "a bad address": f"{HELLO}C: MAIL FROM:<a@b@c>\nS: 501 5.1.3",
    "an unknown verb": "S: 220\nC: XYZZY\nS: 500 5.5.2",
    "an empty line": "S: 220\nC:\nS: 500 5.5.2",
    "DATA takes nothing": f"{RCPT}C: DATA x\nS: 501 5.5.4",
    "RSET takes nothing": f"{HELLO}C: RSET x\nS: 501 5.5.4",
    "NOOP takes anything": f"{HELLO}C: NOOP x y\nS: 250",
    "VRFY never tells": f"{HELLO}C: VRFY bob\nS: 252",
    "VRFY needs a name": f"{HELLO}C: VRFY\nS: 501",
    "a leading hyphen in a sender": f"{HELLO}C: MAIL FROM:<-x@b>\nS: 501 5.1.3",
    "a leading hyphen": f"{MAIL}C: RCPT TO:<-x@host.example>\nS: 501 5.1.3",
    "EXPN is not there": f"{HELLO}C: EXPN x\nS: 502",
    "HELP names the commands": f"{HELLO}C: HELP\nS: 214 2.0.0 Commands: HELO EHLO",
}

PARAMETERS = {
    "SIZE of the limit": f"{HELLO}C: MAIL FROM:<a@b> SIZE=1000\nS: 250",
    "SIZE beyond the limit": f"{HELLO}C: MAIL FROM:<a@b> SIZE=1001\nS: 552 5.3.4",
    "SIZE that is no number": f"{HELLO}C: MAIL FROM:<a@b> SIZE=x\nS: 501 5.5.4",
    "SIZE without a number": f"{HELLO}C: MAIL FROM:<a@b> SIZE\nS: 501",
    "SIZE below nothing": f"{HELLO}C: MAIL FROM:<a@b> SIZE=-1\nS: 501",
    "SIZE of 21 digits": f"{HELLO}C: MAIL FROM:<a@b> SIZE={'1' * 21}\nS: 501",
    "SIZE twice": f"{HELLO}C: MAIL FROM:<a@b> SIZE=1 SIZE=1\nS: 501",
    "BODY": f"{HELLO}C: MAIL FROM:<a@b> body=8bitmime\nS: 250",
    "BODY of another kind": f"{HELLO}C: MAIL FROM:<a@b> BODY=x\nS: 501",
    "AUTH": f"{HELLO}C: MAIL FROM:<a@b> AUTH=<>\nS: 250",
    "an unknown one": f"{HELLO}C: MAIL FROM:<a@b> XYZZY=1\nS: 555 5.5.4",
    "one at RCPT": f"{MAIL}C: RCPT TO:<bob@host.example> RET=FULL\nS: 555",
    "RET and ENVID": f"{HELLO}C: MAIL FROM:<a@b> RET=hdrs ENVID=a+2Bb\nS: 250",
    "RET of another kind": f"{HELLO}C: MAIL FROM:<a@b> RET=X\nS: 501",
    "ENVID that is no xtext": f"{HELLO}C: MAIL FROM:<a@b> ENVID=a+\nS: 501",
    "NOTIFY": f"{MAIL}C: RCPT TO:<bob> NOTIFY=SUCCESS,DELAY\nS: 250",
    "NOTIFY=NEVER alone": f"{MAIL}C: RCPT TO:<bob> NOTIFY=NEVER,DELAY\nS: 501",
    "NOTIFY twice": f"{MAIL}C: RCPT TO:<bob> NOTIFY=DELAY NOTIFY=DELAY\nS: 501",
    "ORCPT": f"{MAIL}C: RCPT TO:<bob@host.example> ORCPT=rfc822;a@b\nS: 250",
    "ORCPT without a type": f"{MAIL}C: RCPT TO:<bob@host.example> ORCPT=a@b\nS: 501",
    "UTF-8 that was not announced": f"{HELLO}C: MAIL FROM:<ü@b>\nS: 553 5.6.7",
    "UTF-8 that was": f"{HELLO}C: MAIL FROM:<ü@b> SMTPUTF8\nS: 250",
    "SMTPUTF8 with a value": f"{HELLO}C: MAIL FROM:<a@b> SMTPUTF8=1\nS: 501",
    "UTF-8 in a recipient": f"{MAIL}C: RCPT TO:<ü@host.example>\nS: 553 5.6.7",
}

HERE_AND_THERE = [
    # who may relay does; mail for us, or for relay_domains, is taken from all
    (NEAR, "a@other.example", "250 2.1.5"),
    (FAR, "a@other.example", "554 5.7.1 <a@other.example>: Relay access denied"),
    (FAR, "a@relayed.example", "250 2.1.5"),
    (FAR, "a@b.relayed.example", "250 2.1.5"),
    (FAR, "bob@host.example", "250 2.1.5"),
    (FAR, "bob", "250 2.1.5"),
    (FAR, "bob@[127.0.0.1]", "250 2.1.5"),
    # no way around by a route, a percent or a bang
    (FAR, "@host.example:a@other.example", "554 5.7.1"),
    (LOCAL, "a@other.example", "250 2.1.5"),
]

REFUSALS = [
    # who cannot get mail: for good, or for now
    (NEAR, "5.1.1", "", "550 5.1.1 <bob@host.example>: Recipient address rejected: "),
    (NEAR, "4.3.0", "", "451 4.3.0"),
    # what cannot be told now waits in the queue of a local program
    (LOCAL, "4.3.0", "", "250 2.1.5"),
    (LOCAL, "5.1.1", "", "550 5.1.1"),
    # which may have an unknown one bounced; nobody else may
    (LOCAL, "5.1.1", " XBOUNCE", "250 2.1.5"),
    (LOCAL, "5.1.1", " XBOUNCE=1", "501 5.5.4"),
    (NEAR, "5.1.1", " XBOUNCE", "555 5.5.4"),
    (FAR, "5.1.1", " XBOUNCE", "555 5.5.4"),
]


def by_name(dialogues):
    """Dialogues as parameters, called by their names."""
    return [pytest.param(text, id=name) for name, text in dialogues.items()]


class TestSession:
    """The server's side of SMTP, without a socket."""

    @pytest.mark.parametrize("dialogue", by_name(ORDER))
    def test_commands_have_their_order(self, dialogue):
        play(SessionPeer(make_session()), dialogue)

    @pytest.mark.parametrize("dialogue", by_name(SYNTAX))
    def test_commands_have_their_syntax(self, dialogue):
        play(SessionPeer(make_session()), dialogue)

    @pytest.mark.parametrize("dialogue", by_name(PARAMETERS))
    def test_parameters_have_their_rules(self, dialogue):
        play(SessionPeer(make_session(text="message_size_limit = 1000")), dialogue)

    def test_ehlo_names_the_extensions(self):
        reply = make_session(text="message_size_limit = 1000").feed(b"EHLO c.example")
        assert bytes(reply).decode().splitlines() == [
            *("250-host.example", "250-PIPELINING", "250-SIZE 1000", "250-8BITMIME"),
            *("250-ENHANCEDSTATUSCODES", "250-SMTPUTF8", "250-DSN", "250-CHUNKING"),
            "250 HELP",
        ]

    @pytest.mark.parametrize(("client", "recipient", "wanted"), HERE_AND_THERE)
    def test_mail_is_relayed_for_whom_it_may_be(self, client, recipient, wanted):
        session = make_session(client, "relay_domains = relayed.example")
        dialogue = f"{MAIL}C: RCPT TO:<{recipient}>\nS: {wanted}"
        play(SessionPeer(session), dialogue)

    @pytest.mark.parametrize(("client", "status", "option", "wanted"), REFUSALS)
    def test_a_recipient_is_refused_at_once(self, client, status, option, wanted):
        session = make_session(client, verify=refuse(status))
        dialogue = f"{MAIL}C: RCPT TO:<bob@host.example>{option}\nS: {wanted}"
        play(SessionPeer(session), dialogue)

    def test_a_local_program_need_not_say_hello(self):
        play(SessionPeer(make_session(LOCAL)), "S: 220\nC: MAIL FROM:<a@b>\nS: 250")

    @pytest.mark.parametrize("word", ["XQUEUE", "XFLUSH"])
    def test_the_queue_is_no_business_of_the_network(self, word):
        play(SessionPeer(make_session(NEAR)), f"{HELLO}C: {word}\nS: 500 5.5.2")

    @pytest.mark.parametrize(
        ("word", "action"), [("XQUEUE", "queue"), ("XFLUSH", "flush")]
    )
    def test_a_local_program_may_ask_for_the_queue(self, word, action):
        reply = make_session(LOCAL).feed(word.encode())
        assert (reply.code, reply.action) == (250, action)

    @pytest.mark.parametrize(
        ("option", "wanted"),
        # SIZE counts before the first byte comes
        [("", "250"), (" SIZE=1000", "250"), (" SIZE=1001", "452 4.3.1")],
    )
    def test_no_mail_is_taken_that_finds_no_room(self, option, wanted):
        session = make_session(text="queue_minfree = 1000", room=2000)
        play(SessionPeer(session), f"{HELLO}C: MAIL FROM:<a@b>{option}\nS: {wanted}")

    def test_there_are_only_so_many_recipients(self):
        session = make_session(text="smtpd_recipient_limit = 1")
        again = "C: RCPT TO:<bob@host.example>\nS: 452 4.5.3\nC: DATA\nS: 354"
        play(SessionPeer(session), RCPT + again)

    def test_one_error_too_many_ends_it(self):
        session = make_session(FAR)
        errors = "C: XYZZY\nS: 500\n" * 20
        play(SessionPeer(session), f"{HELLO}{errors}C: XYZZY\nS: 421 4.7.0")

    def test_a_local_program_may_err_as_it_likes(self):
        errors = "C: XYZZY\nS: 500\n" * 50
        play(SessionPeer(make_session(LOCAL)), f"{HELLO}{errors}C: NOOP\nS: 250")

    @pytest.mark.parametrize(
        ("line", "wanted"),
        [
            # a browser, a TLS hello
            *[(b"GET / HTTP/1.1", "close"), (b"\x16\x03\x01", "close")],
            (b"POST / HTTP/1.1", "close"),
            # control bytes, bytes that are no UTF-8
            *[(b"NOOP \0", ""), (b"EHLO a\x7f", ""), (b"NOOP \xff", "")],
        ],
    )
    def test_what_is_not_smtp_is_refused(self, line, wanted):
        reply = make_session().feed(line)
        assert (reply.code, reply.action) == (500, wanted)

    def test_a_failed_message_is_forgotten(self):
        error = minimta.MailError("4.3.1", "Insufficient system storage")
        play(
            SessionPeer(make_session(), error),
            f"{RCPT}C: DATA\nS: 354\nC: .\nS: 452 4.3.1\nC: DATA\nS: 503",
        )

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            # codes that a status has, then those of its class
            *[("5.3.4", 552), ("4.3.1", 452), ("5.1.3", 501), ("5.7.1", 554)],
            *[("4.3.0", 451), ("5.1.1", 550)],
        ],
    )
    def test_a_failure_has_its_code(self, status, code):
        reply = minimta.Reply.refusal(minimta.MailError(status, "a\nb"))
        assert bytes(reply) == f"{code} {status} a?b\r\n".encode()

    def test_a_refusal_is_logged_as_postfix_does(self):
        session = make_session(FAR)
        play(SessionPeer(session), f"{MAIL}C: RCPT TO:<a@b>\nS: 554")
        assert session.notes == [
            "NOQUEUE: reject: RCPT from unknown[192.0.2.1]: 554 5.7.1 "
            "<a@b>: Relay access denied; from=<a@far.example> to=<a@b> "
            "proto=ESMTP helo=<c.example>"
        ]

    def test_a_refusal_names_no_earlier_recipient(self):
        session = make_session()
        play(SessionPeer(session), f"{RCPT}C: RCPT TO:<a b>\nS: 501")
        assert "bob@host.example" not in session.notes[-1]

    @pytest.mark.parametrize(
        ("client", "origin"),
        [(FAR, "[192.0.2.1] ESMTP c.example"), (LOCAL, "uid 1000")],
    )
    def test_the_envelope_says_where_mail_came_from(self, client, origin):
        session = make_session(client)
        play(
            SessionPeer(session), f"{HELLO}C: MAIL FROM:<a>\nS: 2\nC: RCPT TO:<b>\nS: 2"
        )
        envelope = session.envelope(1.5)
        assert (envelope.origin, envelope.arrived) == (origin, 1.5)
        assert envelope.sender == "a@host.example"
        assert envelope.recipients == ["b@host.example"]

    def test_the_envelope_has_what_was_wished_for(self):
        session = make_session()
        dialogue = (
            f"{HELLO}C: MAIL FROM:<a@b> RET=HDRS ENVID=e1\nS: 250\n"
            "C: RCPT TO:<bob> NOTIFY=NEVER ORCPT=rfc822;c@d\nS: 250"
        )
        play(SessionPeer(session), dialogue)
        envelope = session.envelope(1.5)
        assert (envelope.ret, envelope.envid) == ("HDRS", "e1")
        wanted = minimta.Wishes("NEVER", "rfc822;c@d")
        assert envelope.wishes_of("bob@host.example") == wanted

    def test_a_refusal_may_bring_its_own_code(self):
        error = minimta.MailError("5.7.1", "no entry", code=550)
        assert bytes(minimta.Reply.refusal(error)) == b"550 5.7.1 no entry\r\n"

    def test_one_recipient_is_named_in_received(self):
        session = make_session()
        play(SessionPeer(session), RCPT)
        assert b"\n\tfor <bob@host.example>;" in session.received("ID", 1.5)

    def test_of_several_recipients_none_is_named(self):
        session = make_session()
        play(SessionPeer(session), f"{RCPT}C: RCPT TO:<carol@host.example>\nS: 250")
        assert b"for <" not in session.received("ID", 1.5)

    @pytest.mark.parametrize(
        ("hello", "option", "proto"),
        [
            ("HELO", "", "SMTP"),
            ("EHLO", "", "ESMTP"),
            ("EHLO", " SMTPUTF8", "UTF8SMTP"),
        ],
    )
    def test_received_names_the_protocol(self, hello, option, proto):
        session = make_session()
        start = f"S: 220\nC: {hello} c\nS: 250\nC: MAIL FROM:<a@b>{option}\nS: 250"
        play(SessionPeer(session), start)
        assert f" with {proto} id ID".encode() in session.received("ID", 1.5)


SECURE = "smtpd_tls_cert_file = /cert\nsmtpd_sasl_password_file = /passwords"


def sasl(*words):
    """`words` as AUTH PLAIN says them."""
    return base64.b64encode(b"\0".join(word.encode() for word in words)).decode()


class SecurePeer(SessionPeer):
    """One that shakes hands at once, and whose only password is `right`."""

    def send(self, line):
        super().send(line)
        action = self.replies[-1].action
        if action == "tls":
            self.session.secured("TLSv1.3")
        elif action == "auth":
            is_right = self.session.credentials == ("bob", b"right")
            self.replies[-1] = self.session.authenticated(is_right)
        elif action == "chunk":
            is_end = self.session.chunk[1] and not self.session.chunk_error
            done = self.session.stored if is_end else self.session.chunk_taken
            self.replies[-1] = done("ID") if is_end else done()


TLS = f"{HELLO}C: STARTTLS\nS: 220 2.0.0\nC: EHLO c\nS: 250\n"
RIGHT, WRONG = sasl("", "bob", "right"), sasl("", "bob", "wrong")
USER, WORD = sasl("bob"), sasl("right")
FAILS = f"C: AUTH PLAIN {WRONG}\nS: 535 5.7.8\n"
SECURED = {
    "TLS comes once": f"{TLS}C: STARTTLS\nS: 503 5.5.1",
    "STARTTLS takes nothing": f"{HELLO}C: STARTTLS x\nS: 501",
    "TLS forgets the name": f"{HELLO}C: STARTTLS\nS: 220\nC: MAIL FROM:<a@b>\nS: 503",
    "TLS forgets the mail": (
        f"{MAIL}C: STARTTLS\nS: 220\nC: EHLO c\nS: 250\nC: DATA\nS: 503"
    ),
    "AUTH needs TLS": f"{HELLO}C: AUTH PLAIN {RIGHT}\nS: 538 5.7.11",
    "AUTH needs EHLO": "S: 220\nC: HELO c\nS: 250\nC: AUTH PLAIN\nS: 503",
    "AUTH PLAIN at once": f"{TLS}C: AUTH PLAIN {RIGHT}\nS: 235 2.7.0",
    "AUTH plain when asked": f"{TLS}C: auth plain\nS: 334\nC: {RIGHT}\nS: 235",
    "AUTH LOGIN": (
        f"{TLS}C: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: {USER}\n"
        f"S: 334 UGFzc3dvcmQ6\nC: {WORD}\nS: 235"
    ),
    "AUTH LOGIN with a name": f"{TLS}C: AUTH LOGIN {USER}\nS: 334\nC: {WORD}\nS: 235",
    "= is an empty answer": f"{TLS}C: AUTH PLAIN =\nS: 535",
    "= is an empty name": f"{TLS}C: AUTH LOGIN =\nS: 334 UGFz\nC: {WORD}\nS: 535",
    "* ends it": f"{TLS}C: AUTH LOGIN\nS: 334\nC: *\nS: 501 5.7.0\nC: NOOP\nS: 250",
    "* ends it later": (
        f"{TLS}C: AUTH LOGIN {USER}\nS: 334\nC: *\nS: 501\nC: NOOP\nS: 250"
    ),
    "no base64": f"{TLS}C: AUTH PLAIN !\nS: 501 5.5.2\nC: NOOP\nS: 250",
    "an unknown method": f"{TLS}C: AUTH CRAM-MD5\nS: 504 5.5.4",
    "once is enough": (
        f"{TLS}C: AUTH PLAIN {RIGHT}\nS: 235\nC: AUTH PLAIN {RIGHT}\nS: 503"
    ),
    "not in a transaction": (
        f"{TLS}C: MAIL FROM:<a@b>\nS: 250\nC: AUTH PLAIN {RIGHT}\nS: 503"
    ),
    "three guesses": f"{TLS}{FAILS}{FAILS}C: AUTH PLAIN {WRONG}\nS: 421 4.7.0",
    "acting for another": f"{TLS}C: AUTH PLAIN {sasl('eve', 'bob', 'right')}\nS: 535",
    "acting for oneself": f"{TLS}C: AUTH PLAIN {sasl('bob', 'bob', 'right')}\nS: 235",
    "two words": f"{TLS}C: AUTH PLAIN {sasl('bob', 'right')}\nS: 535",
}

CHUNKS = {
    "BDAT needs MAIL": f"{HELLO}C: BDAT 3\nS: 503 5.5.1\nC: NOOP\nS: 250",
    "BDAT needs RCPT": f"{MAIL}C: BDAT 3 LAST\nS: 503 5.5.1",
    "one chunk": f"{RCPT}C: BDAT 3 LAST\nS: 250 2.0.0 Ok: queued\nC: DATA\nS: 503",
    "several": (
        f"{RCPT}C: BDAT 3\nS: 250 2.0.0 Ok: 3 b\nC: bdat 0 last\nS: 250 2.0.0 Ok: q"
    ),
    "no DATA behind BDAT": f"{RCPT}C: BDAT 3\nS: 250\nC: DATA\nS: 503",
    "no RCPT behind BDAT": f"{RCPT}C: BDAT 3\nS: 250\nC: RCPT TO:<bob>\nS: 503",
    "no MAIL behind BDAT": f"{RCPT}C: BDAT 3\nS: 250\nC: MAIL FROM:<a@b>\nS: 503",
    "RSET behind BDAT": f"{RCPT}C: BDAT 3\nS: 250\nC: RSET\nS: 250\nC: BDAT 3\nS: 503",
    "no size": f"{RCPT}C: BDAT\nS: 501 5.5.4",
    "a bad size": f"{RCPT}C: BDAT -1\nS: 501 5.5.4",
    "another word": f"{RCPT}C: BDAT 1 FIRST\nS: 501 5.5.4",
}


class TestSecureSession:
    """STARTTLS, AUTH and BDAT, without a socket."""

    @pytest.mark.parametrize("dialogue", by_name({**SECURED, **CHUNKS}))
    def test_commands_have_their_order(self, dialogue):
        play(SecurePeer(make_session(FAR, SECURE)), dialogue)

    @pytest.mark.parametrize("client", [FAR, LOCAL])
    def test_nothing_is_offered_that_is_not_there(self, client):
        session = make_session(client, SECURE if client is LOCAL else "")
        play(SessionPeer(session), f"{HELLO}C: STARTTLS\nS: 502\nC: AUTH PLAIN\nS: 503")

    def test_auth_is_offered_under_tls_only(self):
        session = make_session(FAR, SECURE)
        assert {"STARTTLS"} == {"STARTTLS", "AUTH PLAIN LOGIN"} & set(
            session.feed(b"EHLO c").lines
        )
        session.secured("TLSv1.3")
        assert {"AUTH PLAIN LOGIN"} == {"STARTTLS", "AUTH PLAIN LOGIN"} & set(
            session.feed(b"EHLO c").lines
        )

    def test_who_has_authenticated_may_relay(self):
        end = "C: MAIL FROM:<a@b>\nS: 250\nC: RCPT TO:<a@other.example>\nS: 250"
        dialogue = f"{TLS}C: AUTH PLAIN {RIGHT}\nS: 235\n{end}"
        session = make_session(FAR, SECURE)
        play(SecurePeer(session), dialogue)
        received = session.received("ID", 1.5)
        assert b" with ESMTPSA id ID" in received
        assert b"(using TLSv1.3)" in received
        assert b"bob" not in received

    def test_received_tells_of_tls_without_auth(self):
        session = make_session(FAR, SECURE)
        play(SecurePeer(session), f"{TLS}C: MAIL FROM:<a@b>\nS: 250")
        assert session.protocol == "ESMTPS"

    def test_the_summary_counts_good_ones_and_all(self):
        session = make_session(FAR, SECURE)
        play(SecurePeer(session), f"{RCPT}C: RCPT TO:<a b>\nS: 501\nC: X\nS: 500")
        wanted = "ehlo=1 mail=1 rcpt=1/2 unknown=0/1 commands=3/5"
        assert session.summary() == wanted

    def test_the_summary_counts_a_message_once(self):
        session = make_session(FAR)
        play(SecurePeer(session), f"{RCPT}C: BDAT 1\nS: 250\nC: BDAT 0 LAST\nS: 250")
        assert session.summary() == "ehlo=1 mail=1 rcpt=1 bdat=2 commands=5"


# == 9 Reports: ReportKind, Event, Report =====================================


def make_report(*events, kind=None, **about):
    """A report to alice, as a message that was read."""
    envelope = minimta.Envelope(
        "alice@far.example", ["bob@x"], arrived=1.5, envid="e1", kind="message"
    )
    about = {
        "queue_id": "ID",
        "host": "host.example",
        "envelope": envelope,
        "message_id": "<m@x>",
        "expires": 86400.0,
        **about,
    }
    kind = kind or minimta.FAILED
    report = minimta.Report(kind, "alice@far.example", list(events), about)
    copy = [b"Subject: hello\n", b"\nbody\n"]
    text = b"".join(report.chunks("IDB1", 1.5, kind is minimta.FAILED, copy))
    parsed = message_from_bytes(text)
    assert parsed.defects == []
    return parsed


def event(recipient="bob@x", target="", **how):
    """What became of one recipient."""
    words = {
        "action": "failed",
        "status": "5.1.1",
        "relay": "local",
        "text": 'unknown user: "bob"',
        "original": "",
        **how,
    }
    return minimta.Event(recipient, target or recipient, *words.values())


def statuses(report):
    """The blocks of fields for programs."""
    return report.get_payload()[1].get_payload()


class TestReport:
    """What the sender is told."""

    def test_is_a_multipart_report_of_three_parts(self):
        report = make_report(event())
        assert report.get_content_type() == "multipart/report"
        assert report.get_param("report-type") == "delivery-status"
        assert [part.get_content_type() for part in report.get_payload()] == [
            *("text/plain", "message/delivery-status", "message/rfc822"),
        ]

    def test_its_header_says_from_whom_to_whom_and_that_none_should_answer(self):
        report = make_report(event(), event("eve@x"))
        assert report["From"] == "Mail Delivery System <MAILER-DAEMON@host.example>"
        assert report["To"] == "alice@far.example"
        assert report["Auto-Submitted"] == "auto-replied"
        assert report["References"] == "<m@x>"
        assert report["Message-ID"] == "<IDB1.report@host.example>"
        assert report["X-Failed-Recipients"].split() == ["bob@x,", "eve@x"]

    def test_people_read_who_was_not_reached_and_why(self):
        text = make_report(event(), event("team@x", "eve@x")).get_payload()[0]
        body = text.get_payload(decode=True).decode()
        assert "This is the mail system at host host.example.\n" in body
        assert '\n<bob@x>: unknown user: "bob"\n' in body
        assert "\n<eve@x> (expanded from <team@x>): unknown user" in body

    def test_programs_read_it_in_fields(self):
        message, recipient = statuses(make_report(event()))
        assert message["Reporting-MTA"] == "dns; host.example"
        assert message["Original-Envelope-Id"] == "e1"
        assert message["Arrival-Date"] == minimta.rfc_date(1.5)
        assert dict(recipient) == {
            "Final-Recipient": "rfc822; bob@x",
            "Original-Recipient": "rfc822;bob@x",
            "Action": "failed",
            "Status": "5.1.1",
            "Diagnostic-Code": 'X-Minimta; unknown user: "bob"',
        }

    def test_what_a_host_said_is_quoted(self):
        text = (
            "host mx.x[192.0.2.1]:25 said: 550 5.1.1 no (in reply to RCPT TO command)"
        )
        one = event(relay="mx.x[192.0.2.1]:25", text=text, original="rfc822;b@x")
        fields = statuses(make_report(one))[1]
        assert fields["Remote-MTA"] == "dns; mx.x"
        assert fields["Diagnostic-Code"] == "smtp; 550 5.1.1 no"
        assert fields["Original-Recipient"] == "rfc822;b@x"

    def test_an_address_that_is_not_ascii_says_so(self):
        fields = dict(event("ü@x").rows())
        assert fields["Final-Recipient"] == "utf-8; ü@x"
        assert fields["Original-Recipient"] == "utf-8;ü@x"

    def test_a_warning_says_until_when(self):
        one = event(action="delayed", status="4.4.1")
        report = make_report(one, kind=minimta.DELAYED)
        assert report["Subject"] == "Delayed Mail (still being retried)"
        assert report["X-Failed-Recipients"] is None
        body = report.get_payload()[0].get_payload(decode=True).decode()
        assert "THIS IS A WARNING ONLY.  YOU DO NOT NEED TO RESEND" in body
        assert statuses(report)[1]["Will-Retry-Until"] == minimta.rfc_date(86400)
        assert report.get_payload()[2].get_content_type() == "text/rfc822-headers"

    def test_the_message_comes_back_in_it(self):
        original = make_report(event()).get_payload()[2].get_payload()[0]
        assert original["Return-Path"] == "<alice@far.example>"
        assert (original["Subject"], original.get_payload()) == ("hello", "body\n")

    def test_a_reason_can_add_no_line(self):
        one = event(text="a\nX: y\x1b[2J", recipient="b@x")
        fields = statuses(make_report(one))[1]
        assert fields["Diagnostic-Code"] == "X-Minimta; a?X: y?[2J"


# == 10 Trees: Branch =========================================================


class TestBranch:
    """What explain draws."""

    def test_is_drawn_as_a_tree(self):
        tree = minimta.Branch("lpic1@localhost")
        domain = tree.grow("local domain (mydestination: localhost)")
        alias = domain.grow("alias lpic1 -> root", "/etc/aliases:31")
        again = alias.grow("alias root -> payam, bob", "/etc/aliases:38")
        again.grow("user payam, no ~/.forward").grow(
            "mailbox /var/mail/payam", "", "mbox"
        )
        again.grow("user bob, no ~/.forward").grow("mailbox /var/mail/bob")
        assert str(tree).splitlines() == [
            "lpic1@localhost",
            "└─ local domain (mydestination: localhost)",
            "   └─ alias lpic1 -> root                  /etc/aliases:31",
            "      └─ alias root -> payam, bob          /etc/aliases:38",
            "         ├─ user payam, no ~/.forward",
            "         │  └─ mailbox /var/mail/payam  (mbox)",
            "         └─ user bob, no ~/.forward",
            "            └─ mailbox /var/mail/bob",
        ]

    def test_is_a_dictionary_for_programs(self):
        tree = minimta.Branch("a")
        tree.grow("b", "c:1", "d")
        wanted = {"text": "a", "then": [{"text": "b", "where": "c:1", "detail": "d"}]}
        assert tree.tree() == wanted

    def test_of_very_many_branches_the_first_are_drawn(self):
        tree = minimta.Branch("a")
        for number in range(10_000):
            tree.grow(f"b{number}")
        lines = str(tree).splitlines()
        assert len(lines) == 102
        assert lines[-1] == "└─ ... and 9900 more"

    def test_no_line_can_be_made_two(self):
        assert minimta.Branch("a\nb\x1b").text == "a?b?"


# == 11 Names: Record, encode_question, decode_answer =========================


def wire_name(name):
    """A name on the wire, by our own rules."""
    labels = [label.encode() for label in name.split(".") if label]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def wire_data(kind, data):
    """A record's data on the wire."""
    if kind == "MX":
        return data[0].to_bytes(2, "big") + wire_name(data[1])
    if kind == "CNAME":
        return wire_name(data)
    return socket.inet_pton(socket.AF_INET6 if ":" in data else socket.AF_INET, data)


DNS_CODES = {"A": 1, "CNAME": 5, "MX": 15, "AAAA": 28, "TXT": 16}


def wire_record(name, kind, data, ttl=60):
    """A whole record."""
    raw = data if isinstance(data, bytes) else wire_data(kind, data)
    kind = DNS_CODES[kind].to_bytes(2, "big")
    size = len(raw).to_bytes(2, "big")
    return wire_name(name) + kind + b"\0\1" + ttl.to_bytes(4, "big") + size + raw


def wire_answer(question, *records, flags=0x8180, count=None):
    """The packet that answers a question packet."""
    body = question[12 : question.index(b"\0", 12) + 5]
    count = len(records) if count is None else count
    head = question[:2] + flags.to_bytes(2, "big") + b"\0\1"
    return head + count.to_bytes(2, "big") + bytes(4) + body + b"".join(records)


QUESTION = minimta.encode_question(0x1234, "x.example", "MX")
MX_RECORD = wire_record("x.example", "MX", (10, "mx.x.example"))
POINTED = b"\xc0\x0c"  # the name in the question

ANSWERS = [
    ([MX_RECORD], [(10, "mx.x.example")]),
    ([], []),
    # of several names and types those that were asked for
    (
        [wire_record("y.example", "MX", (1, "evil.example")), MX_RECORD],
        [(10, "mx.x.example")],
    ),
    ([wire_record("x.example", "TXT", b"\3abc"), MX_RECORD], [(10, "mx.x.example")]),
    # another spelling is the same name
    ([wire_record("X.Example", "MX", (10, "MX.X.example"))], [(10, "mx.x.example")]),
    # a pointer
    ([POINTED + MX_RECORD[11:]], [(10, "mx.x.example")]),
    # null MX, RFC 7505
    ([wire_record("x.example", "MX", (0, ""))], [(0, "")]),
    # an alias
    (
        [
            wire_record("x.example", "CNAME", "y.example"),
            wire_record("y.example", "MX", (5, "mx.y.example")),
        ],
        [(5, "mx.y.example")],
    ),
]

BAD_PACKETS = {
    "nothing": b"",
    "half a head": QUESTION[:7],
    "another id": wire_answer(b"\0\0" + QUESTION[2:], MX_RECORD),
    "a question": QUESTION,
    "another opcode": wire_answer(QUESTION, MX_RECORD, flags=0xA180),
    "another name": wire_answer(minimta.encode_question(0x1234, "y.example", "MX")),
    "another type": wire_answer(minimta.encode_question(0x1234, "x.example", "A")),
    "a record too few": wire_answer(QUESTION, MX_RECORD, count=2),
    "half a record": wire_answer(QUESTION, MX_RECORD[:-3], count=1),
    "a pointer to itself": wire_answer(QUESTION, b"\xc0\x1b" + MX_RECORD[11:], count=1),
    "a pointer forward": wire_answer(QUESTION, b"\xc0\x40" + MX_RECORD[11:], count=1),
    "a label of 64": wire_answer(QUESTION, b"\x40" + MX_RECORD, count=1),
    "a line end in a name": wire_answer(
        QUESTION, wire_record("x.example", "CNAME", "a\nb.example")
    ),
    "an odd size": wire_answer(QUESTION, wire_record("x.example", "A", b"\1\2\3")),
}


class TestNames:
    """DNS packets."""

    def test_a_question_is_one_that_servers_know(self):
        head = b"\x12\x34\x01\x00\0\1\0\0\0\0\0\1"
        options = b"\0\0\x29\x04\xd0" + bytes(6)
        body = wire_name("x.example") + b"\0\x0f\0\1"
        assert head + body + options == QUESTION

    @pytest.mark.parametrize(("records", "wanted"), ANSWERS)
    def test_an_answer_is_read(self, records, wanted):
        packet = wire_answer(QUESTION, *records)
        answer = minimta.decode_answer(packet, 0x1234, "x.example", "MX")
        assert [one.data for one in answer.follow("x.example", "MX")[0]] == wanted

    @pytest.mark.parametrize("packet", BAD_PACKETS.values(), ids=BAD_PACKETS)
    def test_what_is_no_answer_is_refused(self, packet):
        with pytest.raises(ValueError, match="."):
            minimta.decode_answer(packet, 0x1234, "x.example", "MX")

    def test_a_packet_cut_anywhere_is_refused_or_short(self):
        packet = wire_answer(QUESTION, MX_RECORD)
        for end in range(len(packet)):
            with pytest.raises(ValueError, match="."):
                minimta.decode_answer(packet[:end], 0x1234, "x.example", "MX")

    def test_noise_is_refused_or_read_but_never_more(self):
        dice = random.Random(7)
        packet = wire_answer(QUESTION, MX_RECORD)
        for _ in range(3000):
            noisy = bytearray(packet)
            for _ in range(dice.randrange(1, 4)):
                noisy[dice.randrange(len(noisy))] = dice.randrange(256)
            with contextlib.suppress(ValueError):
                minimta.decode_answer(bytes(noisy), 0x1234, "x.example", "MX")

    def test_aliases_in_a_ring_end(self):
        ring = [
            wire_record("x.example", "CNAME", "y.example"),
            wire_record("y.example", "CNAME", "x.example"),
        ]
        answer = minimta.decode_answer(
            wire_answer(QUESTION, *ring), 0x1234, "x.example", "MX"
        )
        with pytest.raises(ValueError, match="CNAME"):
            answer.follow("x.example", "MX")

    @pytest.mark.parametrize("kind", ["A", "AAAA", "MX", "CNAME"])
    def test_whatever_is_changed_cut_or_added_is_refused_or_read(self, kind):
        dice = random.Random(kind)
        question = minimta.encode_question(0x1234, "x.example", kind)
        data = {"A": "192.0.2.1", "AAAA": "::1", "MX": (1, "a.b"), "CNAME": "a.b"}[kind]
        packet = wire_answer(
            question,
            *[POINTED + wire_record("", kind, data)[1:]] * 3,
            wire_record("x.example", "CNAME", "y.example"),
        )
        pointers = [b"\xc0" + bytes([place]) for place in range(0, len(packet), 3)]
        for _ in range(3000):
            noisy = bytearray(packet[: dice.randrange(20, len(packet) + 40)])
            for _ in range(dice.randrange(4)):
                place = dice.randrange(12, len(noisy))
                noisy[place : place + dice.randrange(3)] = dice.choice(
                    (dice.randbytes(1), dice.randbytes(2), b"\xff", *pointers)
                )
            with contextlib.suppress(ValueError):
                answer = minimta.decode_answer(bytes(noisy), 0x1234, "x.example", kind)
                answer.follow("x.example", kind)

    @pytest.mark.parametrize(
        ("flags", "is_answer"),
        [
            (0x8180, True),
            (0x8000, True),
            (0x0180, False),  # a question
            (0x8980, False),  # other opcodes
            (0xA180, False),
            (0xF980, False),
        ],
    )
    def test_only_the_answer_to_a_query_is_one(self, flags, is_answer):
        packet = wire_answer(QUESTION, MX_RECORD, flags=flags)
        wanted = contextlib.nullcontext() if is_answer else pytest.raises(ValueError)
        with wanted:
            minimta.decode_answer(packet, 0x1234, "x.example", "MX")

    @pytest.mark.parametrize("number", [0x1233, 0x3412, 0, 0xFFFF])
    def test_another_id_is_another_question(self, number):
        with pytest.raises(ValueError, match="another question"):
            minimta.decode_answer(
                wire_answer(QUESTION, MX_RECORD), number, "x.example", "MX"
            )

    def test_what_is_told_unasked_is_not_heard(self):
        evil = wire_record("x.example", "MX", (0, "evil.example"))
        packet = bytearray(wire_answer(QUESTION, MX_RECORD) + evil * 2)
        packet[9] = packet[11] = 1  # authority, additional
        answer = minimta.decode_answer(bytes(packet), 0x1234, "x.example", "MX")
        assert [one.data for one in answer.records] == [(10, "mx.x.example")]

    def test_an_answer_that_was_cut_says_so_whatever_follows(self):
        packet = wire_answer(QUESTION, MX_RECORD[:5], flags=0x8380, count=9)
        answer = minimta.decode_answer(packet, 0x1234, "x.example", "MX")
        assert (answer.is_cut, answer.records) == (True, [])

    def test_a_chain_of_pointers_ends(self):
        # In the data of another record, each leads to the one before.
        start = 12 + 15 + 11 + 10
        places = [12, *(start + 2 * n for n in range(3000))]
        chain = b"".join((0xC000 | place).to_bytes(2, "big") for place in places[:-1])
        last = (0xC000 | places[-1]).to_bytes(2, "big")
        records = wire_record("x.example", "TXT", chain), last + MX_RECORD[11:]
        packet = wire_answer(QUESTION, *records)
        with pytest.raises(ValueError, match="pointer"):
            minimta.decode_answer(packet, 0x1234, "x.example", "MX")

    @pytest.mark.parametrize(
        "text", ["a b", "a.b c", "a\0b", "a/b", "a\\b", "a;b", "\xe4"]
    )
    def test_a_host_with_an_odd_name_is_none_and_spoils_no_other(self, text):
        label = text.encode("latin-1")
        name = bytes([len(label)]) + label + b"\0"
        record = wire_record("x.example", "MX", b"\0\1" + name)
        packet = wire_answer(QUESTION, record, MX_RECORD)
        answer = minimta.decode_answer(packet, 0x1234, "x.example", "MX")
        found = [one.data for one in answer.follow("x.example", "MX")[0]]
        assert found == [(1, minimta.ODD_NAME), (10, "mx.x.example")]

    def test_a_name_with_a_dot_in_a_label_is_not_another_name(self):
        record = wire_record("x.example", "CNAME", b"\x04mx.x\x07example\0")
        with pytest.raises(ValueError, match="odd characters"):
            minimta.decode_answer(
                wire_answer(QUESTION, record), 0x1234, "x.example", "MX"
            )

    @pytest.mark.parametrize(("count", "is_read"), [(1, True), (9, True), (20, False)])
    def test_aliases_behind_one_another_are_followed_so_far(self, count, is_read):
        names = ["x.example", *(f"n{n}.example" for n in range(count))]
        links = [wire_record(old, "CNAME", new) for old, new in zip(names, names[1:])]
        end = wire_record(names[-1], "MX", (10, "mx.x.example"))
        packet = wire_answer(QUESTION, end, *reversed(links))
        answer = minimta.decode_answer(packet, 0x1234, "x.example", "MX")
        if is_read:
            ((record,), _) = answer.follow("x.example", "MX")
            assert record.data == (10, "mx.x.example")
        else:
            with pytest.raises(ValueError, match="CNAME"):
                answer.follow("x.example", "MX")

    @pytest.mark.parametrize("name", ["a..b", "", ".", "x" * 64, "a." * 130 + "b"])
    def test_what_is_no_name_is_not_asked_for(self, name):
        with pytest.raises(ValueError, match="."):
            minimta.encode_name(name)


def certify(folder, subject, *options):
    """A certificate, as DER, that openssl made."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl")
    path = folder / "cert.der"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    rest = ("-keyout", "/dev/null", "-outform", "DER", "-out", path, "-days", "30")
    subprocess.run(
        [*words.split(), "-subj", subject, *rest, *options],
        check=True,
        capture_output=True,
    )
    return path.read_bytes()


class TestCertificates:
    """What a certificate says of itself."""

    @pytest.mark.parametrize(
        ("subject", "names", "wanted"),
        [
            ("/CN=mx.example", (), "CN=mx.example, issued by CN=mx.example, "),
            (
                "/C=DE/O=Org, Inc./CN=a.example/emailAddress=x@y",
                ("DNS:a.example", "IP:192.0.2.1", "DNS:*.b.example"),
                "CN=a.example for a.example *.b.example, issued by CN=a.example, ",
            ),
            ("/O=nobody", ("DNS:c.example",), "CN= for c.example, issued by CN=, "),
            ("/CN=Grüße", (), "CN=Grüße, issued by CN=Grüße, "),
            ("/CN=a\nb", (), "CN=a?b, issued by CN=a?b, "),
        ],
    )
    def test_its_names_and_dates_are_told(self, tmp_path, subject, names, wanted):
        more = ("-addext", "subjectAltName=" + ",".join(names)) if names else ()
        data = certify(tmp_path, subject, "-utf8", *more)
        facts = minimta.certificate_facts(data)
        day = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 30 * 86400))
        assert facts.startswith(f"{wanted}valid from 20")
        assert facts.endswith(f" to {day}")

    def test_a_date_behind_2049_is_told(self, tmp_path):
        data = certify(tmp_path, "/CN=x", "-days", "20000")
        end = time.gmtime(time.time() + 20000 * 86400)
        assert minimta.certificate_facts(data).endswith(time.strftime("%Y-%m-%d", end))

    def test_noise_is_no_certificate_and_nothing_worse(self, tmp_path):
        dice = random.Random(10)
        data = certify(
            tmp_path, "/CN=mx.example", "-addext", "subjectAltName=DNS:mx.example"
        )
        for _ in range(5000):
            noisy = bytearray(
                data[: dice.choice((len(data), dice.randrange(len(data))))]
            )
            for _ in range(dice.randrange(1, 4)):
                if noisy:
                    noisy[dice.randrange(len(noisy))] = dice.choice((0, 0x80, 255, 4))
            with contextlib.suppress(ValueError):
                facts = minimta.certificate_facts(bytes(noisy))
                assert facts.isprintable()
                assert len(facts) <= 410
        for size in range(40):
            with contextlib.suppress(ValueError):
                minimta.certificate_facts(dice.randbytes(size))


# == 12 Routes: NextHop, MapLine, Rewriter ====================================


# text -> kind, host, port, by_mx, level; and how it is written
HOPS = [
    ("mx.example", ("smtp", "mx.example", 25, True, ""), "mx.example:25"),
    ("mx.example:587", ("smtp", "mx.example", 587, True, ""), "mx.example:587"),
    ("[mx.example]", ("smtp", "mx.example", 25, False, ""), "[mx.example]:25"),
    ("[mx.example]:587", ("smtp", "mx.example", 587, False, ""), "[mx.example]:587"),
    ("smtp:[mx.example]", ("smtp", "mx.example", 25, False, ""), "[mx.example]:25"),
    ("smtp://mx.example", ("smtp", "mx.example", 25, True, ""), "mx.example:25"),
    ("relay:[mx.example]:26", ("smtp", "mx.example", 26, False, ""), "[mx.example]:26"),
    (
        "smtps://mx.example",
        ("smtps", "mx.example", 465, True, ""),
        "smtps:mx.example:465",
    ),
    (
        "smtps://[mx.example]:466",
        ("smtps", "mx.example", 466, False, ""),
        "smtps:[mx.example]:466",
    ),
    (
        "smtps:[mx.example]:465",
        ("smtps", "mx.example", 465, False, ""),
        "smtps:[mx.example]:465",
    ),
    (
        "lmtp:[s.example]:24",
        ("lmtp", "s.example", 24, False, ""),
        "lmtp:[s.example]:24",
    ),
    ("lmtp:/run/lmtp", ("lmtp", "/run/lmtp", 0, False, ""), "lmtp:/run/lmtp"),
    ("lmtp:unix:/run/lmtp", ("lmtp", "/run/lmtp", 0, False, ""), "lmtp:/run/lmtp"),
    # a port by its name, a kind in capitals
    (
        "[mx.example]:submission",
        ("smtp", "mx.example", 587, False, ""),
        "[mx.example]:587",
    ),
    ("mx.example:SMTP", ("smtp", "mx.example", 25, True, ""), "mx.example:25"),
    (
        "SMTPS:[mx.example]:submissions",
        ("smtps", "mx.example", 465, False, ""),
        "smtps:[mx.example]:465",
    ),
    # an address has no MX
    ("192.0.2.1", ("smtp", "192.0.2.1", 25, False, ""), "[192.0.2.1]:25"),
    ("192.0.2.1:26", ("smtp", "192.0.2.1", 26, False, ""), "[192.0.2.1]:26"),
    ("[2001:db8::1]:26", ("smtp", "2001:db8::1", 26, False, ""), "[2001:db8::1]:26"),
    ("[::1]", ("smtp", "::1", 25, False, ""), "[::1]:25"),
    # a name that ends in a digit has
    ("mx1.example2", ("smtp", "mx1.example2", 25, True, ""), "mx1.example2:25"),
    # a level of TLS
    (
        "[mx.example]:26 encrypt",
        ("smtp", "mx.example", 26, False, "encrypt"),
        "[mx.example]:26 encrypt",
    ),
    (
        "smtps:mx.example   verify",
        ("smtps", "mx.example", 465, True, "verify"),
        "smtps:mx.example:465 verify",
    ),
    (
        "mx:x.example:25 may",
        ("mx", "x.example", 25, True, "may"),
        "mx:x.example:25 may",
    ),
]

BAD_HOPS = [
    *("", "[]", ":25", "[mx.example]:", "[mx.example]:0", "mx.example:nosuch"),
    *("[mx.example]x", "a[mx.example]", "[a]b:25", "uucp:[mx.example]:25"),
    *("mx.example:65536", "uucp:mx.example", "mx/example", "smtp:", "lmtp:"),
    *("mx.example sometimes", "mx.example may verify"),
]

MAPS = [
    ("a b\n", [("m:1", "a", "b")]),
    (
        "# x\n\n  # y\nA.Example  smtp:[B]:25 # why\n",
        [("m:4", "a.example", "smtp:[B]:25")],
    ),
    ("a\t\tb c\n", [("m:1", "a", "b c")]),
    ("a b\n  c\n# between\n\td\n", [("m:1", "a", "b c d")]),
    ("a\nb c", [("m:1", "a", ""), ("m:2", "b", "c")]),
    ("a b\r\nc d\r\n", [("m:1", "a", "b"), ("m:2", "c", "d")]),
    ("a Name <b@c>\na later\n", [("m:1", "a", "Name <b@c>"), ("m:2", "a", "later")]),
    ("", []),
]

TRANSPORTS = """\
boss@x.example      1
x.example           2
.x.example          3
late@x.example      4
@at.example         5
[192.0.2.1]         6
"""

TRANSPORT_ROWS = [
    ("boss@x.example", "1"),
    ("BOSS@X.Example", "1"),
    ("other@x.example", "2"),
    ("other@x.example.", "2"),
    ("a@sub.x.example", "3"),
    ("a@deep.sub.x.example", "3"),
    # first match, not best match
    ("late@x.example", "2"),
    ("boss@sub.x.example", "3"),
    ("a@at.example", "5"),
    ("a@[192.0.2.1]", "6"),
    # no part of a label
    ("a@notx.example", None),
    ("a@example", None),
    ("a@sub.at.example", None),
]

SPANS = [
    ("a@x", ["a@x"]),
    (" a@x , b@y", ["a@x", "b@y"]),
    ("A B <a@x>", ["a@x"]),
    ("<a@x>, <b@y>", ["a@x", "b@y"]),
    ("a@x (me), (you) b@y (he)", ["a@x", "b@y"]),
    ("a@x (a (nested, one) <c@d>)", ["a@x"]),
    ('"A, <b@c>" <a@x>', ["a@x"]),
    ('"a, b"@x, c', ['"a, b"@x', "c"]),
    ('"a \\" , b" <a@x>', ["a@x"]),
    ('<"a>b"@x>', ['"a>b"@x']),
    ("team: a, B <b@y>;, c", ["a", "b@y", "c"]),
    ("undisclosed-recipients:;", []),
    ("undisclosed-recipients: ;, a", ["a"]),
    ("<@r,@s:a@x>", ["@r,@s:a@x"]),
    ("a@[192.0.2.1], b@[IPv6:::1]", ["a@[192.0.2.1]", "b@[IPv6:::1]"]),
    ("a,,b,", ["a", "b"]),
    ("\n A\n <a@x>,\n b", ["a@x", "b"]),
    ("<>", [""]),
    ("", []),
    ("(only a comment)", []),
    ("root (Cron Daemon)", ["root"]),
]

GENERIC = """\
payam                 chief@x.example
boss@host.example     The Boss <boss@x.example>
quiet@host.example    bare
@other.example        @x.example
@host.example         all@x.example
*                     rest@x.example
"""

GENERIC_ROWS = [
    # user@domain before user before @domain before *
    ("boss@host.example", ("The Boss", "boss@x.example")),
    ("BOSS@Host.Example", ("The Boss", "boss@x.example")),
    ("payam@host.example", ("", "chief@x.example")),
    ("payam@localhost", ("", "chief@x.example")),
    ("else@host.example", ("", "all@x.example")),
    ("else@localhost", ("", "rest@x.example")),
    ("a@far.example", ("", "rest@x.example")),
    ("a@other.example", ("", "a@x.example")),
    # a bare key means a user of ours
    ("payam@other.example", ("", "payam@x.example")),
    ("payam@far.example", ("", "rest@x.example")),
    # bare addresses, old and new, are completed first
    ("payam", ("", "chief@x.example")),
    ("boss", ("The Boss", "boss@x.example")),
    ("quiet", ("", "bare@host.example")),
]

GENERIC_FIELDS = [
    ("From: payam\n", "From: chief@x.example\n"),
    ("From: payam@host.example\n", "From: chief@x.example\n"),
    ("From: Payam G. <payam@host.example>\n", "From: Payam G. <chief@x.example>\n"),
    ("From: payam (Payam, <x>)\n", "From: chief@x.example (Payam, <x>)\n"),
    ("From:payam\n", "From:chief@x.example\n"),
    ("from :\tpayam\n", "from :\tchief@x.example\n"),
    (
        'From: "Payam, the <first>"\n\t(a comment)\n <payam> (end)\n',
        'From: "Payam, the <first>"\n\t(a comment)\n <chief@x.example> (end)\n',
    ),
    ("Sender: payam\n", "Sender: chief@x.example\n"),
    ("Resent-From: payam\n", "Resent-From: chief@x.example\n"),
    ("Resent-Sender: payam\n", "Resent-Sender: chief@x.example\n"),
    # a name that is set takes the place of the old one
    ("From: boss\n", "From: The Boss <boss@x.example>\n"),
    ("From: B <boss@host.example>\n", "From: The Boss <boss@x.example>\n"),
    # of several each
    (
        "From: payam, Else <else@host.example>\n",
        "From: chief@x.example, Else <all@x.example>\n",
    ),
    ("From: boss, payam\n", "From: boss@x.example, chief@x.example\n"),
    # others' addresses are only completed
    ("To: payam\n", "To: payam@host.example\n"),
    ("To: payam@host.example\n", "To: payam@host.example\n"),
    ("Cc: A <a>, b (c),\n  d@far.example\n",) * 2,
    ("Reply-To: payam\n", "Reply-To: payam@host.example\n"),
    ("Resent-To: a, b\n", "Resent-To: a@host.example, b@host.example\n"),
    ("To: team: a, b@y.example;\n", "To: team: a@host.example, b@y.example;\n"),
    ("To: undisclosed-recipients:;\n",) * 2,
    # what is no address list, or no address field, stays
    ("To: Payam the Great\n",) * 2,
    ("From: <payam\n",) * 2,
    ("From: payam@\n",) * 2,
    ("From: <>\n",) * 2,
    ("From:\n",) * 2,
    ("To: @r:a@x, ,, (\n",) * 2,
    ("Subject: payam\n",) * 2,
    ("X-From: payam\n",) * 2,
    ("From: Gr\udcfc\udcdf <payam>\n", "From: Gr\udcfc\udcdf <chief@x.example>\n"),
]
GENERIC_FIELDS[16] = (
    GENERIC_FIELDS[16][0],
    "Cc: A <a@host.example>, b@host.example (c),\n  d@far.example\n",
)


# Best first, generic(5): each is found when those before it are not there.
DETAIL_LINES = [
    "Payam+News@host.example one@x.example\n",
    "payam@host.example two@x.example\n",
    "payam+news three@x.example\n",
    "payam four@x.example\n",
    "@host.example five@x.example\n",
    "* six@x.example\n",
]


def make_rewriter(text, origin="host.example"):
    """A rewriter with that map; two domains are ours."""
    ours = ("host.example", "localhost")
    ours = make_settings(f"mydestination = {' '.join(ours)}")
    return minimta.Rewriter(minimta.parse_map(text, "g"), origin, ours)


class TestRoutes:
    """Next hops, and lines of maps."""

    @pytest.mark.parametrize(("text", "wanted", "shown"), HOPS)
    def test_a_hop_is_read_and_written(self, text, wanted, shown):
        hop = minimta.NextHop.parse(text, "relayhost")
        assert hop.fields() == wanted
        assert str(hop) == shown
        assert minimta.NextHop.parse(shown, "relayhost") == hop

    @pytest.mark.parametrize("text", BAD_HOPS)
    def test_a_bad_hop_is_deferred_and_names_its_setting(self, text):
        with pytest.raises(minimta.MailError, match="transport_maps") as caught:
            minimta.NextHop.parse(text, "transport_maps")
        assert caught.value.status == "4.3.5"

    def test_noise_is_a_hop_or_a_mail_error_and_never_more(self):
        dice = random.Random(11)
        for _ in range(3000):
            kind = dice.choice(("", "", "smtp:", "smtps://", "lmtp:", "lmtp:unix:"))
            text = kind + "".join(dice.choices("[]: .-a1/\u0661\udce4", k=6))
            with contextlib.suppress(minimta.MailError):
                hop = minimta.NextHop.parse(text, "x")
                if hop.host.startswith("//"):
                    continue  # no path that anybody has
                assert minimta.NextHop.parse(str(hop), "x") == hop, text

    def test_a_route_has_its_hops_in_order(self):
        route = minimta.parse_route("[a]:26 may, smtps:b,, lmtp:/c , mx:d:25", "x")
        shown = ["[a]:26 may", "smtps:b:465", "lmtp:/c", "mx:d:25"]
        assert list(map(str, route)) == shown
        assert minimta.parse_route(", ".join(shown), "x") == route
        assert minimta.parse_route("", "x") == []

    @pytest.mark.parametrize(("text", "wanted"), MAPS)
    def test_a_map_has_its_lines_in_order(self, text, wanted):
        assert [one.fields() for one in minimta.parse_map(text, "m")] == wanted

    @pytest.mark.parametrize(("address", "wanted"), TRANSPORT_ROWS)
    def test_the_first_line_that_matches_is_the_transport(self, address, wanted):
        lines = minimta.parse_map(TRANSPORTS, "t")
        found = minimta.find_transport(lines, minimta.Address.parse(address))
        assert (found.value if found else None) == wanted

    def test_a_star_matches_whatever_comes_that_far(self):
        lines = minimta.parse_map("x.example 1\n* 2\ny.example 3\n", "t")
        found = [
            minimta.find_transport(lines, minimta.Address.parse(text)).value
            for text in ("a@x.example", "a@y.example", "a@z.example")
        ]
        assert found == ["1", "2", "2"]

    @pytest.mark.parametrize(
        ("key", "hop", "wanted"),
        [
            ("[Mx.Example]:587", "[mx.example]:587", True),
            ("mx.example:587", "[mx.example]:587", True),
            ("[mx.example]", "[mx.example]:587", True),
            ("mx.example", "[mx.example]:587", True),
            ("mx.example", "smtps://MX.example", True),
            ("[mx.example]:587", "mx.example:587", True),
            ("[mx.example]:587", "[mx.example]:25", False),
            ("mx.example:25", "[mx.example]:587", False),
            ("example", "[mx.example]:587", False),
            (".example", "[mx.example]:587", False),
        ],
    )
    def test_a_secret_is_found_by_the_names_of_its_hop(self, key, hop, wanted):
        lines = minimta.parse_map(f"other x:y\n{key} me:pass:word\n", "s")
        found = minimta.find_secret(lines, minimta.NextHop.parse(hop, "relayhost"))
        assert found == (lines[1] if wanted else None)
        assert lines[1].value == "me:pass:word"

    def test_a_secret_may_leave_the_password_to_a_command(self):
        lines = minimta.parse_map("mx.example me@x.example\n", "s")
        hop = minimta.NextHop.parse("mx.example", "relayhost")
        assert minimta.find_secret(lines, hop) == lines[0]
        minimta.check_secret(lines[0], True)
        with pytest.raises(minimta.MailError, match="s:1: no password: need"):
            minimta.check_secret(lines[0], False)


class TestRewriter:
    """Addresses as other hosts see them."""

    @pytest.mark.parametrize(("text", "wanted"), SPANS)
    def test_addresses_are_found_where_they_are(self, text, wanted):
        spans = minimta.address_spans(text)
        assert [text[start:end] for start, end in spans] == wanted

    def test_spans_of_noise_are_inside_it_and_in_order(self):
        dice = random.Random(12)
        for _ in range(5000):
            text = "".join(
                dice.choices('()<>[]"\\,;:@ab \n\t\udce4', k=dice.randrange(25))
            )
            places = [place for span in minimta.address_spans(text) for place in span]
            assert places == sorted(places), text
            assert all(0 <= place <= len(text) for place in places), text

    @pytest.mark.parametrize("char", ["(", '"', "<", "[", "\\"])
    def test_what_is_nested_costs_no_more_than_its_length(self, char):
        before = time.process_time()
        minimta.address_spans(char * 50_001)
        assert time.process_time() - before < 1

    @pytest.mark.parametrize(("address", "wanted"), GENERIC_ROWS)
    def test_the_best_line_is_used(self, address, wanted):
        rewriter = make_rewriter(GENERIC)
        name, new = rewriter.change(minimta.Address.parse(address))
        assert (name, str(new)) == wanted

    def test_without_a_line_an_address_stays(self):
        rewriter = make_rewriter("@x.example a@y.example\n")
        assert rewriter.sender("a@host.example") == "a@host.example"
        assert rewriter.sender("a") == "a@host.example"

    def test_of_equal_keys_the_first_is_used(self):
        rewriter = make_rewriter("a one@x.example\nA two@x.example\n")
        assert rewriter.sender("a") == "one@x.example"

    def test_the_null_sender_stays(self):
        assert make_rewriter("* all@x.example\n").sender("") == ""

    @pytest.mark.parametrize("value", ["", "b c", "b@", "@", "@@", "@b c", "<>"])
    def test_a_bad_line_is_deferred_and_named(self, value):
        with pytest.raises(minimta.MailError, match="g:2") as caught:
            make_rewriter(f"x y\na {value}\n").sender("a@host.example")
        assert caught.value.status == "4.3.5"

    @pytest.mark.parametrize(("old", "new"), GENERIC_FIELDS)
    def test_a_field_is_changed_where_it_must_be(self, old, new):
        header = minimta.Header.parse(minimta.os_bytes(old))
        assert bytes(make_rewriter(GENERIC).header(header)) == minimta.os_bytes(new)

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("Payam", "Payam"),
            ('"Payam"', "Payam"),
            ("Payam G.", '"Payam G."'),
            ('"G., Payam"', '"G., Payam"'),
            ("Grüße", "=?utf-8?B?R3LDvMOfZQ==?="),
        ],
    )
    def test_a_name_that_is_set_is_written_as_it_must_be(self, name, shown):
        header = minimta.Header.parse(b"From: old <payam>\n")
        found = make_rewriter(f"payam {name} <p@x.example>\n").header(header)
        assert bytes(found) == f"From: {shown} <p@x.example>\n".encode()

    def test_without_a_map_nothing_but_bare_addresses_changes(self):
        text = (
            b"Received: from payam (payam)\nFrom: A (b) <c@host.example>\n"
            b"To: d\nSubject: payam\n\tfolded\n"
        )
        found = make_rewriter("").header(minimta.Header.parse(text))
        assert bytes(found) == text.replace(b"To: d\n", b"To: d@host.example\n")

    def test_noise_in_a_field_never_raises_and_keeps_its_lines(self):
        dice = random.Random(13)
        for _ in range(3000):
            noise = "".join(
                dice.choices('()<>[]"\\,;:@ab \t\udce4', k=dice.randrange(25))
            )
            raw = minimta.os_bytes(f"From: {noise}\n")
            (pair,) = (
                make_rewriter(GENERIC).header(minimta.Header([("from", raw)])).fields
            )
            assert pair[1].startswith(b"From:"), noise
            assert pair[1].count(b"\n") == 1, noise
            assert pair[1].endswith(b"\n"), noise

    @pytest.mark.parametrize("place", range(len(DETAIL_LINES)))
    def test_an_address_with_a_detail_has_lines_in_an_order(self, place):
        lines = DETAIL_LINES[place:]
        wanted = lines[0].split()[1]
        for text in ("".join(lines), "".join(reversed(lines))):
            assert make_rewriter(text).sender("payam+news@host.example") == wanted

    def test_a_detail_is_not_looked_for_where_there_is_none(self):
        rewriter = make_rewriter("payam+news a@x.example\npayam+@host.example b@x.y\n")
        assert rewriter.sender("payam@host.example") == "payam@host.example"
        assert rewriter.sender("payam+old@host.example") == "payam+old@host.example"

    def test_a_bare_name_with_a_detail_is_a_user_of_ours(self):
        rewriter = make_rewriter("payam a@x.example\n")
        assert rewriter.sender("payam+news@localhost") == "a@x.example"
        assert rewriter.sender("payam+news@far.example") == "payam+news@far.example"


# == 13 Conversion: Survey, survey, converted =================================


WIDE = "word " * 300  # 1,500 bytes, blank at the end
GREETING = "Grüße an Jörg"


def in_chunks(data, size):
    """`data` in pieces of `size` bytes."""
    return [data[place : place + size] for place in range(0, len(data), size)]


def convert(data, is_7bit=False, size=1 << 16):
    """A message as it is sent, if it is not signed."""
    plan = minimta.Plan(in_chunks(data, size), is_7bit)
    assert not plan.is_signed
    return b"".join(minimta.Converter(plan).convert(in_chunks(data, size)))


def on_the_wire(data):
    """Content as a host gets it, with LF: a bare CR is never sent."""
    return data.replace(b"\r\n", b"\n").replace(b"\r", b" ")


def meaning(message):
    """A message's parts as stdlib has them: (type, parts or decoded bytes)."""
    if message.is_multipart():
        return message.get_content_type(), [meaning(p) for p in message.get_payload()]
    data = message.get_payload(decode=True)
    return message.get_content_type(), on_the_wire(data)


def assert_fits(data, is_7bit):
    """Whether every host takes these lines."""
    lines = data.split(b"\n")
    assert max(map(len, lines)) <= 998
    if is_7bit:
        assert [line for line in lines if not line.isascii()] == []


def assert_converted(data, is_7bit):
    """It fits when converted, and says the same; what came out."""
    found = convert(data, is_7bit)
    assert_fits(found, is_7bit)
    assert meaning(message_from_bytes(on_the_wire(found))) == meaning(
        message_from_bytes(on_the_wire(data))
    )
    return found


def two_parts(first, second="\nshort\n", head="", before="", after=""):
    """A multipart of two, each with its header; b begins like bb."""
    return (
        f"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n{head}\n"
        f"{before}--b\n{first}\n--bb\n--b\n{second}\n--b--\n{after}"
    )


BASE64 = base64.b64encode(GREETING.encode() * 200).decode()
HARD_QP = "=C3=A4" * 400

MESSAGES = {
    "a long line": f"Subject: x\n\n{WIDE}\nshort\n",
    "a long line without end": f"Subject: x\n\nshort\n{WIDE}",
    "999 bytes": f"Subject: x\n\n{'a' * 999}\n",
    "999 bytes without end": f"Subject: x\n\n{'a' * 999}",
    "8-bit": f"Subject: x\n\n{GREETING}\n",
    "8-bit and long": f"Subject: x\n\n{GREETING * 100}\n.\n..\nFrom x\n=20\n \t\n",
    "no header": f"\n{WIDE}\n",
    "8-bit and no header": f"\n{GREETING}\n",
    "a header only": "Subject: x\n",
    "an 8-bit header only": f"Subject: {GREETING}",
    "an 8-bit header of 8-bit text without end": (
        f"Subject: {GREETING}\nContent-Transfer-Encoding: 8bit\nX-Last: a"
    ),
    "a charset": f"Content-Type: text/html; charset=latin1\n\n{WIDE}\udce4\n",
    "binary": f"Content-Transfer-Encoding: binary\n\n{WIDE}{GREETING}\r\nx\n",
    "CR inside": f"Subject: x\n\na\rb\r\n{GREETING}\rc {WIDE}\r\n",
    "no CR but its other names": f"Subject: x\n\n{GREETING}\x0b\x0c\x1c\x85\n{WIDE}\n",
    "base64 in one line": f"Content-Transfer-Encoding: BASE64\n\n{BASE64}\n",
    "base64 in odd lines": (
        f"Content-Transfer-Encoding: base64\n\n{BASE64[:999]}\n{BASE64[999:]}"
    ),
    "quoted-printable in one line": (
        f"Content-Transfer-Encoding: Quoted-Printable\n\n{HARD_QP}\nx=\ny\n"
    ),
    "quoted-printable with 8-bit": (
        f"Content-Transfer-Encoding: quoted-printable\n\n{GREETING} =C3=A4\n"
    ),
    "quoted-printable with a coded line end": (
        "Content-Transfer-Encoding: quoted-printable\n\n"
        f"{HARD_QP}=0A\n=0A=0A\nx=0A=\ny\n"
    ),
    "quoted-printable with a coded CR": (
        "Content-Type: image/png\nContent-Transfer-Encoding: quoted-printable\n\n"
        f"{HARD_QP}=0D=0A=0D\n"
    ),
    "an encoding nobody knows": (
        f"Content-Transfer-Encoding: 8-bit\n\n{GREETING} {WIDE}\n"
    ),
    "an encoding with a comment": (
        f"Content-Transfer-Encoding: 8bit (as it is)\n\n{GREETING} {WIDE}\n"
    ),
    "a broken type": f"Content-Type: text\n\n{GREETING} {WIDE}\n",
    "a multipart without boundary": (
        f"Content-Type: multipart/mixed\n\n{GREETING} {WIDE}\n"
    ),
    "a boundary that never comes": (
        f"Content-Type: multipart/mixed; boundary=b\n\n{GREETING} {WIDE}\n"
    ),
    "a long first part": two_parts(f"\n{WIDE}"),
    "an 8-bit second part": two_parts(
        "\nx", f"Content-Type: text/html\n\n{GREETING}\n"
    ),
    "an 8-bit multipart": two_parts(
        f"Content-Transfer-Encoding: 8bit\n\n{GREETING}",
        head="Content-Transfer-Encoding: 8bit\n",
    ),
    "a long preamble": two_parts("\nx", before=f"{WIDE}\n"),
    "an 8-bit preamble": two_parts("\nx", before=f"{GREETING}\n"),
    "a long epilogue": two_parts("\nx", after=f"{WIDE}\n"),
    "an 8-bit epilogue": two_parts("\nx", after=f"{GREETING}"),
    "a part without header and empty line": two_parts(f"{GREETING} {WIDE}\nmore"),
    "an empty part": two_parts("", f"\n{GREETING}"),
    "a header-only part before an 8-bit one": two_parts("X-A: b\n", f"\n{GREETING}"),
    "no end": two_parts("\nx", f"\n{WIDE}").replace("--b--\n", ""),
    "an odd boundary": (
        'Content-Type: multipart/mixed;\n\tcharset=x; BOUNDARY="a; b \\"="\n\n'
        f'--a; b "=  \n\n{GREETING} {WIDE}\n--a; b "=--\n'
    ),
    "a boundary inside a boundary": two_parts(
        "Content-Type: multipart/alternative; boundary=b--\n\n"
        f"--b--\n\n{GREETING} {WIDE}\n--b----\n"
    ),
    "an inner one without end": two_parts(
        f"Content-Type: multipart/mixed; boundary=c\n\n--c\n\n{GREETING} {WIDE}"
    ),
    "a digest": (
        "Content-Type: multipart/digest; boundary=b\n\n"
        f"--b\n\nSubject: x\n\n{GREETING} {WIDE}\n--b--\n"
    ),
    "a message": f"Content-Type: message/rfc822\n\nSubject: in\n\n{GREETING} {WIDE}\n",
    "a message in a multipart in a message": (
        "Content-Type: message/rfc822\n\n"
        + two_parts(
            f"Content-Type: Message/RFC822; x=y\n\nSubject: z\n\n{GREETING} {WIDE}"
        )
    ),
    "a message with a long header": (
        f"Content-Type: message/rfc822\n\nSubject: {WIDE}{GREETING}\n\nx\n"
    ),
    "base64 with a footer": (
        f"Content-Transfer-Encoding: base64\n\n{BASE64[:76]}\n\n-- \n{GREETING}\n"
    ),
    "a latin-1 text": "Subject: x\n\nGr\udcfc\udcdfe\n",
}


def random_text(dice):
    """Lines as a part may have them, those that are odd among them."""
    lines = (
        *("", ".", "..", "From x", "--", "--bx", "-- ", "=", "=20", "a\tb ", " c\t"),
        *(
            WIDE,
            GREETING,
            GREETING * 90,
            "x" * 998,
            "x" * 1000,
            "Gr\udcfc\udcdfe",
            "a\rb",
        ),
        *("ends in CR\r", "a: b", "\0", "plain text"),
    )
    text = "\n".join(dice.choices(lines, k=dice.randrange(5)))
    return text + dice.choice(("", "\n", "\n\n"))


def random_leaf(dice):
    """A part that has no parts."""
    kind = dice.choice(
        ("", "text/plain", "text/html; charset=latin1", "image/png", "text", "x/y;=;")
    )
    code = dice.choice(("", "7bit", "8BIT", "binary", "base64", "quoted-printable"))
    body = random_text(dice)
    if code == "base64":
        body = base64.b64encode(minimta.os_bytes(body)).decode()
        width = dice.choice((76, 60, 1000, 10_000))
        body = "\n".join(body[n : n + width] for n in range(0, len(body), width))
    elif code == "quoted-printable":
        width = dice.choice((76, 30, 10_000))
        codes = [f"={byte:02X}" for byte in minimta.os_bytes(body.replace("\r", ""))]
        codes = [word if word != "=0A" else "\n" for word in codes]
        body = "".join(
            word
            + ("=\n" if n % (width // 3) == width // 3 - 1 and word != "\n" else "")
            for n, word in enumerate(codes)
        )
    head = f"Content-Type: {kind}\n" if kind else dice.choice(("", "X-Odd: 1\n"))
    return head + (f"Content-Transfer-Encoding: {code}\n" if code else "") + "\n" + body


def random_entity(dice, depth=0):
    """A part, with parts down to a depth."""
    form = dice.choice(("leaf", "multipart", "multipart", "message"))
    if form == "leaf" or depth > 3:
        return random_leaf(dice)
    if form == "message":
        head = dice.choice(("", "Content-Transfer-Encoding: 8bit\n"))
        inner = random_entity(dice, depth + 1)
        return f"Content-Type: message/rfc822\n{head}\nSubject: in\n{inner}"
    edge = f"b{'b' * depth}{dice.choice(('', '=', '--'))}"
    parts = [random_entity(dice, depth + 1) for _ in range(dice.randrange(1, 4))]
    end = dice.choice((f"--{edge}--\n", f"--{edge}--  \nafter\n", f"--{edge}--", ""))
    before = dice.choice(("", "before\n", "\n"))
    kind = dice.choice(("mixed", "alternative", "related"))
    head = f'Content-Type: multipart/{kind};\n boundary="{edge}"\n'
    middle = "".join(f"--{edge}\n{part}\n" for part in parts)
    return f"{head}\n{before}{middle}{end}"


LONG_FIELDS = [
    ("Subject", WIDE),
    ("Subject", "x" * 3000),
    ("Subject", "x" * 3000 + " short " + "ä" * 900),
    ("Subject", f"{WIDE}\n {WIDE}\n\t{GREETING}"),
    ("References", " ".join(f"<{n}@x.example>" for n in range(200))),
    ("To", ", ".join(f'"A, {n}" <a{n}@x.example>' for n in range(100))),
    ("X-Odd", f"({WIDE}) {WIDE}"),
]

ODD_FIELDS = [
    ("Subject", GREETING, GREETING),
    ("Subject", f"{GREETING}, {GREETING}", f"{GREETING}, {GREETING}"),
    ("Subject", "plain ä plain ö ü end", "plain ä plain ö ü end"),
    ("Subject", "=?utf-8?q?=C3=A4?= ö", "ä ö"),
    ("Subject", "日本語" * 100, "日本語" * 100),
    ("Subject", "ä\n ö\n\tü", "ä ö ü"),
    ("Subject", 'das "schöne" Wort', 'das "schöne" Wort'),
    ("From", "Jörg <j@x.example>", "Jörg <j@x.example>"),
    ("From", '"Müller, Jörg" <j@x.example>', "Müller, Jörg <j@x.example>"),
    ("From", "j@x.example (Jörg)", "j@x.example (Jörg)"),
    ("From", "j@x.example (der Jörg (selbst))", "j@x.example (der Jörg (selbst))"),
    ("To", "Ä <a@x>, b@y, Ö Ü <o@z>", "Ä <a@x>, b@y, Ö Ü <o@z>"),
]


def shown(value):
    """A field's value as a reader shows it, blanks made equal."""
    text = str(email.header.make_header(email.header.decode_header(value)))
    return " ".join(text.split()).replace("( ", "(").replace(" )", ")")


class TestSurvey:
    """What a message needs of a host."""

    @pytest.mark.parametrize("size", [1, 2, 7, 1000])
    @pytest.mark.parametrize(
        ("data", "wanted"),
        [
            (b"", (0, True, 0)),
            (b"\n", (0, True, 2)),
            (b"abc\nd\n", (3, True, 8)),
            (b"a\nbcde", (4, True, 7)),
            ("ä\n".encode(), (2, False, 4)),
            (b"a" * 999 + b"\n" + b"b" * 998, (999, True, 1999)),
        ],
    )
    def test_it_is_the_same_however_it_is_read(self, data, wanted, size):
        assert minimta.survey(in_chunks(data, size)).fields() == wanted


class TestConversion:
    """Messages that hosts cannot take as they are."""

    @pytest.mark.parametrize("is_7bit", [False, True])
    @pytest.mark.parametrize("text", MESSAGES.values(), ids=MESSAGES)
    def test_it_fits_and_says_the_same(self, text, is_7bit):
        data = minimta.os_bytes(text)
        found = assert_converted(data, is_7bit)
        for size in (1, 7):
            assert convert(data, is_7bit, size) == found

    @pytest.mark.parametrize("text", MESSAGES.values(), ids=MESSAGES)
    def test_what_fits_already_stays_as_it_is(self, text):
        once = convert(minimta.os_bytes(text), True)
        assert convert(once, True) == once
        assert convert(once, False) == once

    @pytest.mark.parametrize("seed", range(5))
    def test_whatever_is_nested_fits_and_says_the_same(self, seed):
        dice = random.Random(seed)
        for _ in range(30):
            text = f"Subject: x\n{random_entity(dice)}"
            data = minimta.os_bytes(text)
            is_7bit = dice.random() < 0.7
            found = assert_converted(data, is_7bit)
            for size in (1, 7):
                assert convert(data, is_7bit, size) == found
            if minimta.survey([data]).longest <= 998:
                assert convert(data) == data

    def test_only_what_must_be_is_encoded(self):
        head = "Content-Type: text/plain; charset=utf-8\n"
        text = two_parts(f"{head}\nkeep = this", f"{head}\n{GREETING}")
        found = convert(text.encode(), True).decode()
        assert found == two_parts(
            f"{head}\nkeep = this",
            f"{head}Content-Transfer-Encoding: quoted-printable\n\n"
            "Gr=C3=BC=C3=9Fe an J=C3=B6rg",
        )

    def test_a_plain_message_becomes_mime(self):
        found = convert(f"Subject: x\n\n{GREETING}\n".encode(), True).decode()
        assert found == (
            "Subject: x\nMIME-Version: 1.0\n"
            "Content-Type: text/plain; charset=utf-8\n"
            "Content-Transfer-Encoding: quoted-printable\n\n"
            "Gr=C3=BC=C3=9Fe an J=C3=B6rg\n"
        )

    def test_text_that_is_not_utf_8_is_not_called_so(self):
        found = message_from_bytes(convert(b"Subject: x\n\nGr\xfc\xdfe\n", True))
        assert found.get_content_charset() not in ("utf-8", "us-ascii")
        assert found.get_payload(decode=True) == b"Gr\xfc\xdfe\n"

    def test_a_message_in_a_message_becomes_mime_too(self):
        text = f"Content-Type: message/rfc822\n\nSubject: x\n\n{GREETING}\n"
        found = message_from_bytes(convert(text.encode(), True))
        assert found.get_payload()[0]["MIME-Version"] == "1.0"

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("DKIM-Signature: x\n\nx\n", True),
            ("Content-Type: multipart/signed; boundary=b\n\n--b\n\nx\n--b--\n", True),
            (two_parts("Content-Type: Multipart/Signed; boundary=c\n\n--c\n"), True),
            ("Subject: x\n\nDKIM-Signature: x\n", False),
            ("Content-Type: message/rfc822\n\nDKIM-Signature: x\n\nx\n", False),
            (two_parts("DKIM-Signature: x\n\nx"), False),
            (two_parts("\nx", "DKIM-Signature: x\n\nx"), False),
        ],
    )
    def test_what_a_change_would_break_is_known(self, text, wanted):
        assert minimta.Plan([text.encode()], True).is_signed == wanted

    @pytest.mark.parametrize("is_cut", [False, True])
    @pytest.mark.parametrize(
        ("code", "unit"),
        [
            ("", b"lorem ipsum "),
            ("8bit", "äö€".encode()),
            ("base64", b"TWFu"),
            ("quoted-printable", b"=C3=A4=3D"),
        ],
    )
    def test_a_line_of_megabytes_is_sent(self, code, unit, is_cut):
        head = f"Content-Transfer-Encoding: {code}\n" if code else ""
        data = (
            f"Subject: x\n{head}\n".encode() + unit * (3_000_000 // len(unit)) + b"\n"
        )
        found = convert(data, True, 65_537 if is_cut else len(data))
        assert_fits(found, True)
        wanted, got = map(meaning, map(message_from_bytes, (data, found)))
        is_same = got == wanted  # a difference of megabytes takes minutes to show
        assert is_same

    def test_a_large_message_needs_little_memory(self):
        block = (WIDE + "\n" + GREETING + "\n").encode() * 43

        def chunks():
            yield b"Subject: x\n\n"
            for _ in range(10_000_000 // len(block)):
                yield block

        tracemalloc.start()
        try:
            plan = minimta.Plan(chunks(), True)
            size = sum(
                len(piece) for piece in minimta.Converter(plan).convert(chunks())
            )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert size > 10_000_000
        assert peak < 5_000_000

    @pytest.mark.parametrize("is_7bit", [False, True])
    @pytest.mark.parametrize(
        ("name", "value"), LONG_FIELDS, ids=range(len(LONG_FIELDS))
    )
    def test_a_long_field_is_folded_and_has_the_same_words(self, name, value, is_7bit):
        found = convert(f"{name}: {value}\nX-Next: y\n\nx\n".encode(), is_7bit)
        assert_fits(found, is_7bit)
        message = message_from_string(found.decode())
        assert shown(message[name]).split() == shown(value).split()
        assert message["X-Next"] == "y"
        assert message.get_payload() == "x\n"

    @pytest.mark.parametrize(("name", "value", "wanted"), ODD_FIELDS)
    def test_odd_words_are_encoded_where_they_must_be(self, name, value, wanted):
        data = f"{name}: {value}\n\nx\n".encode()
        assert convert(data) == data
        found = convert(data, True)
        assert_fits(found, True)
        assert max(map(len, found.split(b"\n"))) <= 78
        assert shown(message_from_bytes(found)[name]) == wanted

    @pytest.mark.parametrize("text", ["Grüße, Jörg!", "(äh) so; ä: b", "<ä> ,ö"])
    def test_an_encoded_word_of_a_subject_stands_alone(self, text):
        found = convert(f"Subject: {text}\n\nx\n".encode(), True).decode()
        words = message_from_bytes(found.encode())["Subject"].split()
        assert [word for word in words if "=?" in word] != []
        for word in words:  # RFC 2047 section 5
            assert "=?" not in word or re.fullmatch(r"=\?[^?]+\?[BbQq]\?[^?]+\?=", word)

    def test_the_addresses_of_a_field_stay_what_they_are(self):
        value = "Jörg <j@x.example>, k@y.example (Käthe), team: Ö <o@z.example>;"
        found = message_from_bytes(convert(f"To: {value}\n\nx\n".encode(), True))
        pairs = email.utils.getaddresses([found["To"]])
        assert [address for _, address in pairs if address] == [
            *("j@x.example", "k@y.example", "o@z.example"),
        ]


# == 14 Log: Log ==============================================================


@pytest.fixture
def place():
    """A directory of the test's own that every user may pass through."""
    path = open_directory("minimta-unit-")
    yield path
    shutil.rmtree(path)


def make_log(path):
    """A log that is written to a file."""
    return minimta.Log(make_settings(f"maillog_file = {path}"))


def logged(path):
    """The lines of a log file, without date and pid."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = rf"[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d host (\S+)\[{os.getpid()}\]: "
    return [re.sub(f"^{start}", r"\1 ", line) for line in lines]


LETTER = minimta.Envelope("alice@far.example", ["bob@host.example"])


def delivered(where, recipient="bob@host.example", when=1.5, outcome="sent"):
    """The attempt to deliver to `where`."""
    words = (recipient, where, "local", "delivered to mailbox")
    return minimta.Attempt(when, outcome, "2.0.0", *words)


def taken_up(header):
    """A message that the runner has taken up, as far as the log looks."""
    file = types.SimpleNamespace(envelope=LETTER, size=321)
    parsed = minimta.Header.parse(header.encode())
    return types.SimpleNamespace(queue_id="ID", file=file, header=parsed)


LOG_ROWS = [
    (
        lambda log: log.accepted("ID", FAR, LETTER),
        "minimta/smtpd ID: client=unknown[192.0.2.1]",
    ),
    (
        lambda log: log.accepted("ID", NEAR, LETTER),
        "minimta/smtpd ID: client=localhost[127.0.0.1]",
    ),
    (
        lambda log: log.accepted("ID", LOCAL, LETTER),
        "minimta/pickup ID: uid=1000 from=<alice@far.example>",
    ),
    (
        lambda log: log.active(taken_up("")),
        "minimta/cleanup ID: message-id=<>\n"
        "minimta/qmgr ID: from=<alice@far.example>, size=321, nrcpt=1 (queue active)",
    ),
    (
        lambda log: log.active(taken_up("Message-ID: <1@far.example>\n")),
        "minimta/cleanup ID: message-id=<1@far.example>\n"
        "minimta/qmgr ID: from=<alice@far.example>, size=321, nrcpt=1 (queue active)",
    ),
    (
        lambda log: log.attempt("ID", delivered("mailbox bob@host.example"), 0.0),
        "minimta/local ID: to=<bob@host.example>, relay=local, "
        "delay=1.5, delays=1.5/0/0/0, dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("mailbox bob@x", "team@x"), 0.0),
        "minimta/local ID: to=<bob@x>, orig_to=<team@x>, relay=local, "
        "delay=1.5, delays=1.5/0/0/0, dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("remote a@b", "a@b"), 0.0),
        "minimta/smtp ID: to=<a@b>, relay=local, "
        "delay=1.5, delays=1.5/0/0/0, dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("pipe 65534 cat x", "a@b"), 0.0),
        "minimta/local ID: to=<a@b>, relay=local, "
        "delay=1.5, delays=1.5/0/0/0, dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("lmtp a@b", "a@b"), 0.0),
        "minimta/lmtp ID: to=<a@b>, relay=local, "
        "delay=1.5, delays=1.5/0/0/0, dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.reported("ID", "sender non-delivery notification", "IDB1"),
        "minimta/bounce ID: sender non-delivery notification: IDB1",
    ),
    (lambda log: log.removed("ID"), "minimta/qmgr ID: removed"),
    (lambda log: log.warning("qmgr", "text"), "minimta/qmgr warning: text"),
]


class TestLog:
    """Lines in Postfix's shapes."""

    @pytest.mark.parametrize(("event", "wanted"), LOG_ROWS)
    def test_an_event_has_its_line(self, tmp_path, event, wanted):
        event(make_log(tmp_path / "log"))
        assert logged(tmp_path / "log") == wanted.split("\n")

    @pytest.mark.parametrize(
        ("delay", "wanted"),
        [(0, "0"), (1.5, "1.5"), (12, "12"), (432, "432"), (86400, "86400")],
    )
    def test_a_delay_is_a_plain_number(self, tmp_path, delay, wanted):
        attempt = delivered("mailbox bob@x", when=1000.0 + delay)
        make_log(tmp_path / "log").attempt("ID", attempt, 1000.0)
        assert f", delay={wanted}, delays=" in logged(tmp_path / "log")[0]

    def test_a_clock_that_was_set_back_makes_no_negative_delay(self, tmp_path):
        make_log(tmp_path / "log").attempt("ID", delivered("mailbox bob@x"), 1000.0)
        assert ", delay=0, delays=0/0/0/0, dsn=" in logged(tmp_path / "log")[0]

    @pytest.mark.parametrize(
        "end", ["\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\0"]
    )
    def test_one_event_cannot_be_made_two_lines(self, tmp_path, end):
        make_log(tmp_path / "log").line("smtpd", f"a{end}b")
        assert logged(tmp_path / "log") == ["minimta/smtpd a?b"]

    def test_a_line_goes_to_the_file_that_took_the_old_ones_place(self, tmp_path):
        log = make_log(tmp_path / "log")
        log.line("a", "first")
        (tmp_path / "log").rename(tmp_path / "log.1")
        log.line("a", "second")
        assert logged(tmp_path / "log.1") == ["minimta/a first"]
        assert logged(tmp_path / "log") == ["minimta/a second"]

    def test_lines_are_appended(self, tmp_path):
        make_log(tmp_path / "log").line("a", "first")
        make_log(tmp_path / "log").line("a", "second")
        assert logged(tmp_path / "log") == ["minimta/a first", "minimta/a second"]

    def test_its_directory_is_made(self, tmp_path):
        make_log(tmp_path / "a/b/log").line("a", "first")
        assert logged(tmp_path / "a/b/log") == ["minimta/a first"]

    def test_a_log_that_cannot_be_written_stops_nothing(self, tmp_path):
        assert make_log(tmp_path).line("a", "text") is None

    def test_a_link_is_not_followed(self, tmp_path):
        (tmp_path / "log").symlink_to(tmp_path / "victim")
        make_log(tmp_path / "log").line("a", "text")
        assert not (tmp_path / "victim").exists()

    def test_others_cannot_read_it(self, tmp_path):
        make_log(tmp_path / "log").line("a", "text")
        assert (tmp_path / "log").stat().st_mode & 0o137 == 0


# == 15 Users: User, Users, Passwords, Rights, find_root, read_settings =======


PASSWD = """root:x:0:0:root:/root:/bin/sh
# a comment, then what is no line of passwd
short:x:1
word:x:one:1::/:
bob:x:5001:5001:Bob B,,,:/home/bob:/bin/sh
Eve:x:5002:5002::/home/eve:/bin/sh
eve:x:5003:5003::/home/eve2:/bin/sh
"""


@pytest.fixture
def users(tmp_path):
    """A private instance's users."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    return minimta.Users(str(tmp_path))


class TestUsers:
    """The user database."""

    def test_a_line_is_a_user(self, users):
        wanted = minimta.User("bob", 5001, 5001, "Bob B,,,", "/home/bob")
        assert users.lookup("bob") == wanted

    @pytest.mark.parametrize(
        ("name", "uid"),
        # as it is written first, then in lower case
        [("Eve", 5002), ("eve", 5003), ("EVE", 5003), ("BOB", 5001)],
    )
    def test_a_name_is_looked_up_in_lower_case_too(self, users, name, uid):
        assert users.lookup(name).uid == uid

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "nobody-here",
            "short",
            "word",
            "#",
            "bo",
            "bob:x",
            "../bob",
            "b\0b",
            "a\nb",
        ],
    )
    def test_nobody_has_another_name(self, users, name):
        assert users.lookup(name) is None

    @pytest.mark.parametrize(
        "name", ["", "a/b", "\0", "\udcff", "no such user", "x" * 999]
    )
    def test_the_system_has_no_such_user_either(self, name):
        assert minimta.Users().lookup(name) is None

    def test_the_system_knows_root(self):
        assert minimta.Users().lookup("root").uid == 0

    def test_a_database_that_cannot_be_read_is_a_failure_for_now(self, users):
        os.unlink(users.path)
        with pytest.raises(minimta.MailError) as caught:
            users.lookup("bob")
        assert caught.value.status == "4.3.0"

    def test_a_uid_without_a_line_is_a_user_too(self, users):
        assert users.by_uid(54321).name == "uid54321"

    @pytest.mark.parametrize(
        ("environ", "wanted"),
        # in a private instance anybody may be played
        [
            ({"LOGNAME": "bob"}, "bob"),
            ({"USER": "bob"}, "bob"),
            ({"LOGNAME": "eve", "USER": "bob"}, "eve"),
            ({"LOGNAME": "nobody-here", "USER": "bob"}, "bob"),
            ({}, "Eve"),
        ],
    )
    def test_the_environment_says_who_is_played(self, users, environ, wanted):
        assert users.caller(environ, 5002).name == wanted

    @pytest.mark.parametrize("environ", [{"LOGNAME": "root"}, {"USER": "root"}, {}])
    def test_on_the_system_only_the_uid_counts(self, environ):
        assert minimta.Users().caller(environ, 54321).uid == 54321


class TestPasswords:
    """Who may authenticate."""

    @pytest.fixture
    def passwords(self, tmp_path):
        made = minimta.Passwords(str(tmp_path / "passwords"))
        made.change("bob", b"right", os.getgid())
        return made

    @pytest.mark.parametrize(
        ("user", "word", "wanted"),
        [
            ("bob", b"right", True),
            ("bob", b"wrong", False),
            ("bob", b"", False),
            ("eve", b"right", False),
            ("", b"", False),
            ("Bob", b"right", False),
        ],
    )
    def test_a_user_has_one_password(self, passwords, user, word, wanted):
        assert passwords.check(user, word) is wanted

    def test_a_change_counts_at_once_and_for_one_user(self, passwords):
        passwords.change("eve", b"apple", os.getgid())
        passwords.change("bob", b"new", os.getgid())
        found = [passwords.check("bob", word) for word in (b"right", b"new")]
        assert (found, passwords.check("eve", b"apple")) == ([False, True], True)

    def test_the_file_is_no_business_of_others(self, passwords):
        assert os.stat(passwords.path).st_mode & 0o007 == 0
        assert os.listdir(os.path.dirname(passwords.path)) == ["passwords"]

    @pytest.mark.parametrize(
        "row", ["bob", "bob:", "bob:right", "#bob:right", "bob:$5$a$b", "\udcff:\udcff"]
    )
    def test_what_is_no_hash_opens_nothing(self, passwords, row):
        Path(passwords.path).write_bytes(os.fsencode(row) + b"\n")
        assert not passwords.check("bob", b"right")

    def test_a_file_that_is_not_there_is_a_failure_for_now(self, tmp_path):
        with pytest.raises(minimta.MailError) as caught:
            minimta.Passwords(str(tmp_path / "none")).check("bob", b"right")
        assert caught.value.status == "4.3.0"


@pytest.fixture
def stranger():
    """A user of no name, whom only root can become."""
    return minimta.User("stranger", 54321, 54322, "", "/")


@needs_root
class TestRights:
    """Acting as a user."""

    def test_the_block_runs_as_the_user(self, stranger):
        with minimta.Rights(stranger):
            seen = os.geteuid(), os.getegid(), os.getgroups()
        assert seen == (54321, 54322, [54322])

    def test_another_group_may_stand_in(self, stranger):
        with minimta.Rights(stranger, 54323):
            assert os.getegid() == 54323

    def test_an_exception_leaves_the_rights_as_they_were(self, stranger):
        before = os.geteuid(), os.getegid(), os.getgroups()
        with pytest.raises(ZeroDivisionError), minimta.Rights(stranger):
            raise ZeroDivisionError
        assert (os.geteuid(), os.getegid(), os.getgroups()) == before

    def test_files_are_the_users(self, stranger, place):
        place.chmod(0o777)
        with minimta.Rights(stranger) as rights:
            (place / "file").touch()
        assert (place / "file").stat().st_uid == rights.owner == 54321


class TestQueueOwner:
    """mail_owner."""

    @needs_root
    @pytest.mark.parametrize("text", ["", "mail_owner = nobody"])
    def test_the_queue_is_never_roots(self, text):
        settings = make_settings(text)
        assert minimta.queue_owner(settings, minimta.Users()).uid != 0

    @needs_root
    @pytest.mark.parametrize("name", ["root", "no-such-user"])
    def test_a_user_that_cannot_own_it_is_refused(self, name):
        settings = make_settings(f"mail_owner = {name}")
        with pytest.raises(minimta.ProgramError, match=name) as caught:
            minimta.queue_owner(settings, minimta.Users())
        assert caught.value.code == 78

    @pytest.mark.skipif(AS_ROOT, reason="root has a queue for everybody")
    def test_who_is_not_root_owns_the_queue(self):
        owner = minimta.queue_owner(make_settings(), minimta.Users())
        assert owner.uid == os.geteuid()


class TestReadSettings:
    """Where the settings are."""

    def test_minimta_root_is_the_instance(self):
        assert minimta.find_root({"MINIMTA_ROOT": "/a/../b"}) == "/b"

    @needs_root
    def test_roots_instance_is_the_systems(self):
        assert minimta.find_root({"HOME": "/x"}) == ""

    def test_the_instances_file_is_read(self, tmp_path):
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/minimta.conf").write_text("smtpd_port = 26")
        settings = minimta.read_settings({"MINIMTA_ROOT": str(tmp_path)})
        assert (settings.smtpd_port, settings.root) == (26, str(tmp_path))

    def test_without_a_file_there_are_defaults(self, tmp_path):
        settings = minimta.read_settings({"MINIMTA_ROOT": str(tmp_path)})
        assert settings.smtpd_port == 2525

    @pytest.mark.parametrize("name", ["no-such-file", "."])
    def test_a_named_file_must_be_readable(self, tmp_path, name):
        path = f"{tmp_path}/{name}"
        with pytest.raises(minimta.ProgramError, match=re.escape(path)) as caught:
            minimta.read_settings({"MINIMTA_ROOT": str(tmp_path)}, path)
        assert caught.value.code == 78


# == 16 Maps: MapFiles, Secrets, read_secrets =================================


def map_settings(root, **values):
    """Settings of a private instance with these maps."""
    rows = (f"{name} = {value}\n" for name, value in values.items())
    return make_settings("".join(rows), str(root))


def map_error(call, status):
    """What a map's failure says."""
    with pytest.raises(minimta.MailError) as caught:
        call()
    assert caught.value.status == status
    return caught.value.text


class TestMapFiles:
    """Files of lines that settings name."""

    @pytest.fixture
    def files(self, tmp_path):
        """transport_maps of two files, and both paths."""
        one, two = tmp_path / "one", tmp_path / "two"
        one.write_text("a 1\nb 2\n")
        two.write_text("a 3\n")
        settings = map_settings(tmp_path, transport_maps=f"{one}, hash:{two}")
        return minimta.MapFiles(settings, "transport_maps"), one, two

    def test_all_files_are_read_in_their_order(self, files):
        maps, one, two = files
        assert [line.fields() for line in maps.lines()] == [
            (f"{one}:1", "a", "1"),
            (f"{one}:2", "b", "2"),
            (f"{two}:1", "a", "3"),
        ]

    @pytest.mark.parametrize("kind", ["", "hash:", "texthash:", "lmdb:", "btree:"])
    def test_every_kind_of_map_is_the_text_file(self, tmp_path, kind):
        path = tmp_path / "map"
        path.write_text("a 1\n")
        settings = map_settings(tmp_path, smtp_generic_maps=f"{kind}{path}")
        (line,) = minimta.MapFiles(settings, "smtp_generic_maps").lines()
        assert (line.where, line.value) == (f"{path}:1", "1")

    def test_without_a_map_there_are_no_lines(self, tmp_path):
        maps = minimta.MapFiles(map_settings(tmp_path), "transport_maps")
        assert maps.lines() == []

    @pytest.mark.parametrize("way", ["written", "replaced", "same size and time"])
    def test_a_file_that_changes_is_read_again(self, files, way):
        maps, one, _ = files
        maps.lines()
        before = one.stat()
        path = one if way == "written" else one.with_suffix(".new")
        path.write_text("a 9\nb 2\n")
        if way == "same size and time":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        path.replace(one)
        assert maps.lines()[0].value == "9"

    def test_a_file_that_stays_is_not_read_again(self, files):
        maps, _, _ = files
        assert maps.lines() is maps.lines()

    def test_a_file_that_goes_and_comes_is_noticed(self, files):
        maps, one, two = files
        maps.lines()
        two.unlink()
        for _ in range(2):
            text = map_error(maps.lines, "4.3.5")
            assert text.startswith(f"transport_maps: {two}: No such file")
        two.write_text("c 4\n")
        assert maps.lines()[-1].value == "4"
        assert str(one) not in text

    def test_what_is_no_file_is_named(self, tmp_path):
        settings = map_settings(tmp_path, transport_maps=str(tmp_path))
        text = map_error(minimta.MapFiles(settings, "transport_maps").lines, "4.3.5")
        assert str(tmp_path) in text

    def test_a_fifo_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "map")
        settings = map_settings(tmp_path, transport_maps=tmp_path / "map")
        with contextlib.suppress(minimta.MailError):
            assert minimta.MapFiles(settings, "transport_maps").lines() == []

    @pytest.mark.skipif(AS_ROOT, reason="root reads everything")
    def test_a_file_that_may_not_be_read_is_named(self, files):
        maps, one, _ = files
        one.chmod(0)
        assert f"{one}: Permission denied" in map_error(maps.lines, "4.3.5")

    def test_bytes_that_are_no_utf_8_are_kept(self, tmp_path):
        (tmp_path / "map").write_bytes(b"a Gr\xfc\xdfe <a@x>\n")
        settings = map_settings(tmp_path, smtp_generic_maps=tmp_path / "map")
        (line,) = minimta.MapFiles(settings, "smtp_generic_maps").lines()
        assert minimta.os_bytes(line.value) == b"Gr\xfc\xdfe <a@x>"


HOP = minimta.NextHop.parse("[mx.example]:587", "relayhost")

SECRET_ROWS = [
    # what the map says, what the command prints -> who logs in, or None
    ("", "me:pass", ("me", "pass")),
    ("", "me:pa:ss\nmore", ("me", "pa:ss")),
    ("mx.example me", "pass", ("me", "pass")),
    ("mx.example me", "ya29.token", ("me", "ya29.token")),
    ("mx.example me", "pa:ss", ("me", "pa:ss")),
    ("mx.example me:own", "pass", ("me", "own")),
    ("mx.example me", "  pass\t", ("me", "pass")),
    ("other.example you", "me:pass", ("me", "pass")),
    # the file alone
    ("mx.example me:own", None, ("me", "own")),
    ("mx.example me:", None, ("me", "")),
    ("other.example you:own", None, None),
    ("", None, None),
]


class TestSecrets:
    """Passwords of relays."""

    @pytest.fixture
    def read(self, tmp_path):
        """Reads the secrets of a map's text and a command."""

        def read(text, command, mode=0o600):
            path = tmp_path / "secrets"
            path.write_text(text)
            path.chmod(mode)
            values = {"smtp_sasl_password_maps": path, "relayhost": "[mx.example]:587"}
            if command is not None:
                values["smtp_sasl_password_command"] = command
            return minimta.read_secrets(map_settings(tmp_path, **values))

        return read

    @pytest.mark.parametrize(("text", "printed", "wanted"), SECRET_ROWS)
    def test_file_and_command_together_say_who_logs_in(
        self, read, tmp_path, text, printed, wanted
    ):
        command = None
        if printed is not None:
            (tmp_path / "printed").write_text(printed)
            command = f"cat {tmp_path}/printed"
        assert read(text, command).find(HOP) == wanted

    @pytest.mark.parametrize(
        ("line", "wanted"), [("", None), ("else.example you", ("you", "me:pass"))]
    )
    @pytest.mark.parametrize("text", ["else.example", "mx.example", "[mx.example]:25"])
    def test_a_command_is_for_the_relayhosts_unless_a_line_says_so(
        self, read, text, line, wanted
    ):
        hop = minimta.NextHop.parse(text, "transport_maps")
        wanted = wanted if hop.host == "else.example" else None
        assert read(line, "echo me:pass").find(hop) == wanted

    def test_a_password_may_have_anything_in_it(self, read):
        text = '# ours\n\nmx.example\tme:a #b" c\td\n'
        assert read(text, None).find(HOP) == ("me", 'a #b" c\td')

    def test_the_command_is_the_shells(self, read):
        secrets = read("", "printf 'me:%s\\n' \"a b\" | tr a x; true")
        assert secrets.find(HOP) == ("me", "x b")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601])
    def test_a_file_that_others_can_read_is_not_used(self, read, tmp_path, mode):
        secrets = read("mx.example me:own", None, mode)
        text = map_error(lambda: secrets.find(HOP), "4.7.8")
        assert f"chmod 600 {tmp_path}/secrets" in text
        assert "own" not in text

    @pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
    def test_a_file_of_ones_own_is_used(self, read, mode):
        assert read("mx.example me:own", None, mode).find(HOP) == ("me", "own")

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            ("echo me:pass; echo no such key >&2; exit 3", "exit code 3: no such key"),
            ("exit 1", "exit code 1"),
            ("true", "printed nothing"),
            ("echo", "printed nothing"),
            ("echo; echo me:pass", "printed nothing"),
            ("/nosuch/program", "exit code 127"),
            ("kill -9 0", "exit code -9"),
        ],
    )
    def test_a_command_that_fails_says_why(self, read, command, words):
        secrets = read("", command)
        text = map_error(lambda: secrets.find(HOP), "4.7.8")
        assert "smtp_sasl_password_command" in text
        assert words in text
        assert "me:pass" not in text

    def test_a_password_without_user_is_refused_and_not_shown(self, read):
        secrets = read("", "echo hunter2")
        text = map_error(lambda: secrets.find(HOP), "4.7.8")
        assert "user:password" in text
        assert "hunter2" not in text

    def test_a_command_is_not_waited_for_too_long(self, read, tmp_path, monkeypatch):
        monkeypatch.setattr(minimta, "SECRET_TIME", 0.5)
        script = tmp_path / "script"
        script.write_text(f"echo me:pass; echo $$ >{tmp_path}/pid; sleep 60; true")
        before = time.monotonic()
        secrets = read("", f". {script}")
        assert time.monotonic() - before < 10
        text = map_error(lambda: secrets.find(HOP), "4.7.8")
        assert "smtp_sasl_password_command" in text
        group = (tmp_path / "pid").read_text().strip()
        try:
            wait_for(lambda: not members(group), 2)
        finally:
            for pid in members(group):
                os.kill(int(pid), signal.SIGKILL)

    def test_a_failure_holds_for_every_host(self, read):
        secrets = read("other.example you:own", "exit 1")
        map_error(lambda: secrets.find(HOP), "4.7.8")


def members(group):
    """The processes of a process group that still run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, rest = (
                Path("/proc", pid, "stat").read_text().rpartition(") ")[2].split(" ", 2)
            )
            if rest.split()[0] == group and state != "Z":
                found.append(pid)
    return found


# == 17 Spool: Spool, Draft, QueueFile, Maildrop ==============================


ME = minimta.User("me", os.getuid(), os.getgid(), "", "/")
MESSAGE = b"Subject: hello\n\nsome text\n"


@pytest.fixture
def spool(tmp_path):
    """An empty queue."""
    made = minimta.Spool(str(tmp_path / "queue-dir"), ME)
    made.make()
    return made


def commit(spool, text=MESSAGE, queue_id="", **envelope):
    """Put a message into a queue; its id."""
    words = {"sender": "alice@far.example", "recipients": ["bob@host.example"]}
    with spool.create(minimta.Envelope(**{**words, **envelope}), queue_id) as draft:
        draft.write(text)
        return draft.commit()


def content(spool, queue_id):
    """A message of the queue, without its envelope."""
    with spool.open(queue_id) as file:
        return b"".join(file.chunks())


def left_in(spool):
    """The files in a queue directory, as folder/name."""
    top = Path(spool.directory)
    found = (str(p.relative_to(top)) for p in top.glob("*/*"))
    return sorted(name for name in found if not name.startswith("trace/"))


def open_files():
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


COMMIT_ONE = """
import sys
sys.path.insert(0, sys.argv[1])
import minimta
spool = minimta.Spool(sys.argv[2], minimta.User("", int(sys.argv[3]), 0, "", "/"))
with spool.create(minimta.Envelope("a", ["b"])) as draft:
    draft.write(b"Subject: x\\n\\ntext\\n")
    draft.commit()
"""


def traced(program, *words):
    """(call, its first path or its descriptor's) of what a child does."""
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("there is no strace here")
    calls = "trace=write,fsync,rename,renameat,renameat2,unlink"
    line = [
        strace,
        "-f",
        "-y",
        "-qq",
        "-e",
        calls,
        sys.executable,
        "-IS",
        "-c",
        program,
    ]
    done = subprocess.run([*line, *words], capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    return re.findall(r'(\w+)\((?:AT_FDCWD[^,]*, )?(?:\d+<|")([^">]*)', done.stderr)


class TestSpool:
    """The queue's files."""

    def test_a_journal_torn_anywhere_forgets_nothing(self, spool):
        # One recipient, sent to one target and deferred at two.
        outcomes = {
            "mailbox a": "sent",
            "remote b@x": "deferred",
            "error c": "deferred",
        }
        spool.note(
            "0000000000",
            [make_attempt(outcome, where=where) for where, outcome in outcomes.items()],
        )
        data = Path(spool.path("journal", "0000000000")).read_bytes()
        for end in range(len(data)):
            attempts = minimta.parse_journal(data[:end])
            names = {attempt.recipient for attempt in attempts}
            assert minimta.open_recipients(attempts) == names

    def test_a_commit_is_write_fsync_rename_fsync_of_the_directory(self, spool):
        calls = traced(COMMIT_ONE, str(HERE), spool.directory, str(os.getuid()))
        top = re.escape(spool.directory)
        seen = [
            (call, re.sub(r"[0-9A-Z]{10}$", "ID", path[len(spool.directory) + 1 :]))
            for call, path in calls
            if re.match(top, path)
        ]
        assert [(re.sub("rename.*", "rename", call), path) for call, path in seen] == [
            *[("write", "incoming/ID"), ("fsync", "incoming/ID")],
            *[("rename", "incoming/ID"), ("fsync", "queue")],
        ]

    def test_a_committed_message_is_read_back(self, spool):
        assert content(spool, commit(spool)) == MESSAGE

    def test_a_large_message_is_read_back(self, spool):
        text = b"Subject: x\n\n" + b"0123456789abcde\n" * 60_000
        assert content(spool, commit(spool, text)) == text

    def test_a_large_envelope_is_read_back(self, spool):
        names = [f"user{n}@host.example" for n in range(20_000)]
        queue_id = commit(spool, recipients=names)
        with spool.open(queue_id) as file:
            assert file.envelope.recipients == names
        assert content(spool, queue_id) == MESSAGE

    def test_its_size_is_that_of_the_message(self, spool):
        with spool.open(commit(spool)) as file:
            assert file.size == len(MESSAGE)

    def test_nobody_else_may_read_it(self, spool):
        path = spool.path("queue", commit(spool))
        assert os.stat(path).st_mode & 0o777 == 0o600

    def test_what_is_not_committed_leaves_nothing(self, spool):
        with spool.create(LETTER) as draft:
            draft.write(MESSAGE * 20_000)
        assert left_in(spool) == []

    def test_what_fails_leaves_nothing_and_no_descriptor(self, spool):
        before = open_files()
        with pytest.raises(ZeroDivisionError), spool.create(LETTER) as draft:
            draft.write(MESSAGE)
            raise ZeroDivisionError
        assert (left_in(spool), open_files()) == ([], before)

    def test_a_commit_leaves_no_descriptor(self, spool):
        before = open_files()
        commit(spool)
        assert open_files() == before

    def test_an_envelope_with_a_line_end_is_refused_and_leaves_nothing(self, spool):
        with pytest.raises(minimta.MailError) as caught:
            spool.create(minimta.Envelope("a\nb", ["c"]))
        assert (caught.value.status, left_in(spool)) == ("5.1.3", [])

    def test_an_id_may_be_asked_for(self, spool):
        assert commit(spool, queue_id="0123456789B1") == "0123456789B1"

    def test_a_draft_that_a_crash_left_is_written_anew(self, spool):
        Path(spool.path("incoming", "0123456789")).write_bytes(b"torn")
        assert content(spool, commit(spool, queue_id="0123456789")) == MESSAGE

    def test_ids_are_those_of_messages_oldest_first(self, spool):
        for name in ("0000000002", "0000000001B1", "0000000001", "note", ".0000000003"):
            Path(spool.path("queue", name)).touch()
        assert spool.ids() == ["0000000001", "0000000001B1", "0000000002"]

    def test_every_message_has_an_id_of_its_own(self, spool):
        assert len({commit(spool) for _ in range(50)}) == 50

    @pytest.mark.parametrize("text", BAD_ENVELOPES)
    def test_a_file_that_is_no_message_leaves_no_descriptor(self, spool, text):
        Path(spool.path("queue", "0123456789")).write_bytes(text)
        before = open_files()
        with pytest.raises(ValueError, match="."):
            spool.open("0123456789")
        assert open_files() == before

    def test_a_directory_that_is_no_message_leaves_no_descriptor(self, spool):
        os.mkdir(spool.path("queue", "0123456789"))
        before = open_files()
        with pytest.raises((OSError, ValueError)):
            spool.open("0123456789")
        assert open_files() == before

    def test_a_link_in_the_queue_is_not_followed(self, spool):
        os.symlink(
            spool.path("queue", commit(spool)), spool.path("queue", "0123456789")
        )
        with pytest.raises(OSError, match="ymbolic"):
            spool.open("0123456789")

    def test_the_next_attempt_is_kept(self, spool):
        queue_id = commit(spool)
        spool.wait_until(queue_id, 1234.0)
        assert spool.due(queue_id) == 1234.0

    def test_the_journal_is_read_back(self, spool):
        spool.note("ID", [make_attempt()])
        spool.note("ID", [make_attempt("sent")])
        assert spool.journal("ID") == [make_attempt(), make_attempt("sent")]

    def test_without_a_journal_nothing_was_tried(self, spool):
        assert spool.journal("ID") == []

    def test_a_note_behind_a_torn_line_is_whole(self, spool):
        path = Path(spool.path("journal", "ID"))
        line = bytes(make_attempt())
        for end in range(len(line)):
            path.write_bytes(line + line[:end])
            spool.note("ID", [make_attempt("sent")])
            assert spool.journal("ID")[-1] == make_attempt("sent")
            assert spool.journal("ID")[0] == make_attempt()

    def test_remove_takes_message_and_journal(self, spool):
        queue_id = commit(spool)
        spool.note(queue_id, [make_attempt()])
        spool.remove(queue_id)
        assert left_in(spool) == []

    def test_what_is_set_aside_is_in_corrupt(self, spool):
        queue_id = commit(spool)
        assert spool.set_aside(queue_id) == spool.path("corrupt", queue_id)
        assert left_in(spool) == [f"corrupt/{queue_id}"]

    def test_sweeping_takes_old_drafts_and_lonely_journals(self, spool):
        queue_id = commit(spool)
        for name in (queue_id, "0000000001"):
            Path(spool.path("journal", name)).touch()
        for name, moment in (("0000000002", 1000), ("0000000003", 100_000)):
            Path(spool.path("incoming", name)).touch()
            os.utime(spool.path("incoming", name), (moment, moment))
        spool.sweep(100_001)
        assert left_in(spool) == [
            *("incoming/0000000003", f"journal/{queue_id}", f"queue/{queue_id}"),
        ]

    def test_entries_are_what_mailq_shows(self, spool):
        ids = [commit(spool), commit(spool, recipients=["x@y"])]
        spool.note(ids[1], [make_attempt(recipient="x@y", why="why")])
        entries = {entry.queue_id: entry for entry in spool.entries()}
        assert sorted(entries) == sorted(ids)
        assert entries[ids[1]].reasons == {"x@y": "why"}

    @pytest.mark.parametrize(("name", "mode"), minimta.FOLDERS)
    def test_a_folder_has_its_mode_whatever_it_was(self, spool, name, mode):
        os.chmod(spool.path(name), 0o755)
        spool.make()
        assert os.stat(spool.path(name)).st_mode & 0o7777 == mode

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_a_folder_that_is_none_is_refused(self, spool, kind):
        os.rmdir(spool.path("hold"))
        path = Path(spool.path("hold"))
        path.symlink_to(spool.path("queue")) if kind == "link" else path.touch()
        with pytest.raises(minimta.ProgramError, match=str(path)) as caught:
            spool.make()
        assert caught.value.code == 73

    def test_where_there_is_no_directory_nothing_is_free(self, tmp_path):
        assert minimta.Spool(str(tmp_path / "none"), ME).free() == 0

    @needs_root
    def test_a_full_disk_is_a_failure_for_now_and_leaves_nothing(self, tmp_path):
        with mounted("-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path):
            small = minimta.Spool(str(tmp_path), ME)
            small.make()
            with pytest.raises(minimta.MailError) as caught:
                commit(small, b"x" * (1 << 20))
            assert (caught.value.status, left_in(small)) == ("4.3.1", [])
            assert content(small, commit(small)) == MESSAGE


LOCK_MESSAGE = """
import fcntl, os, sys
try:
    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_SH | fcntl.LOCK_NB)
    print("locked", flush=True)
except OSError:
    print("refused", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def lock_elsewhere(path):
    """Another process locks a message to deliver it; what became of that."""
    words = [sys.executable, "-IS", "-c", LOCK_MESSAGE, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes) as other:
        yield other.stdout.readline().decode().strip()
        other.stdin.close()


def spool_entry(spool):
    """The one message of a queue, as mailq has it."""
    (entry,) = spool.entries()
    return entry


class TestSpoolActs:
    """What a queue command does with one file of the queue."""

    def place_of(self, spool, queue_id):
        found = left_in(spool)
        return [name.partition("/")[0] for name in found if name.endswith(queue_id)]

    def test_what_is_held_is_in_another_folder_and_comes_back(self, spool):
        queue_id = commit(spool)
        spool.act("hold", queue_id)
        assert self.place_of(spool, queue_id) == ["hold"]
        assert [entry.state for entry in spool.entries()] == ["hold"]
        spool.act("release", queue_id)
        assert self.place_of(spool, queue_id) == ["queue"]
        assert content(spool, queue_id) == MESSAGE

    def test_a_held_messages_past_is_kept(self, spool):
        queue_id = commit(spool)
        spool.note(queue_id, [make_attempt(recipient="bob@host.example")])
        spool.act("hold", queue_id)
        spool.sweep(time.time() + 1e6)
        entry = spool_entry(spool)
        assert entry.reasons == {"bob@host.example": "w"}

    @pytest.mark.parametrize("folder", ["queue", "hold"])
    def test_what_is_removed_leaves_nothing(self, spool, folder):
        queue_id = commit(spool)
        spool.note(queue_id, [make_attempt()])
        if folder == "hold":
            spool.act("hold", queue_id)
        spool.act("remove", queue_id)
        assert left_in(spool) == []

    @pytest.mark.parametrize("action", ["run", "requeue", "bounce"])
    def test_it_is_due_now(self, spool, action):
        queue_id = commit(spool)
        spool.wait_until(queue_id, time.time() + 5000)
        spool.act(action, queue_id)
        assert spool.due(queue_id) <= time.time()

    @pytest.mark.parametrize("is_held", [False, True])
    def test_what_is_given_up_is_marked_and_due(self, spool, is_held):
        queue_id = commit(spool)
        if is_held:
            spool.act("hold", queue_id)
        spool.act("bounce", queue_id)
        entry = spool_entry(spool)
        assert (entry.is_given_up, entry.state) == (True, "active")
        assert self.place_of(spool, queue_id) == ["queue"]

    @pytest.mark.parametrize("action", minimta.ACTIONS)
    def test_what_is_not_there_is_said(self, spool, action):
        with pytest.raises(FileNotFoundError):
            spool.act(action, "0AAAAAAAAA")
        assert left_in(spool) == []

    @pytest.mark.parametrize("action", minimta.ACTIONS)
    def test_no_descriptor_stays_open(self, spool, action):
        queue_id = commit(spool)
        before = open_files()
        with contextlib.suppress(minimta.MailError):  # it is not on hold
            spool.act(action, queue_id)
        assert open_files() == before

    @pytest.mark.parametrize("action", ["hold", "remove", "requeue", "bounce"])
    def test_what_is_being_delivered_is_left_alone(self, spool, action):
        queue_id = commit(spool)
        before = left_in(spool)
        with lock_elsewhere(spool.path("queue", queue_id)):
            with pytest.raises(minimta.MailError, match="being delivered"):
                spool.act(action, queue_id)
            assert left_in(spool) == before
            assert not spool_entry(spool).is_given_up
        spool.act(action, queue_id)

    def test_an_attempt_can_be_asked_for_meanwhile(self, spool):
        queue_id = commit(spool)
        with lock_elsewhere(spool.path("queue", queue_id)):
            spool.act("run", queue_id)

    def test_a_lock_ends_with_its_file(self, spool):
        path = spool.path("queue", commit(spool))
        fd = os.open(path, os.O_RDWR)
        assert minimta.lock_file(fd, True)
        with lock_elsewhere(path) as said:
            assert said == "refused"
        os.close(fd)
        with lock_elsewhere(path) as said:
            assert said == "locked"

    @pytest.mark.parametrize("action", ["bounce", "requeue", "release"])
    def test_a_command_that_is_late_leaves_the_next_message_alone(
        self, spool, action, monkeypatch
    ):
        """The message is delivered between the look at it and the lock."""
        spool.keeps_spares = True
        first = commit(spool)

        def deliver_first(fd, is_ours):
            spool.remove(first)
            return True

        monkeypatch.setattr(minimta, "lock_file", deliver_first)
        with contextlib.suppress(minimta.MailError, OSError):
            spool.act(action, first)
        commit(spool, b"Subject: other\n\n")
        commit(spool, b"Subject: next\n\n")
        assert [entry.is_given_up for entry in spool.entries()] == [False, False]


def make_drop(kind, folder):
    """Leave something in a maildrop, and return its name."""
    path, target = Path(folder, "0123456789"), Path(folder, ".target")
    target.write_bytes(bytes(LETTER) + MESSAGE)
    if kind == "symlink":
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(target, path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(kind)
    return path.name


HOSTILE_DROPS = [
    *("symlink", "fifo", "hard link", "directory", b"", b"garbage\n\n"),
    # not complete, too large
    *(b"arrived: 1\nsender: a\n", bytes(LETTER) + b"x" * 5000),
    # a time that is none
    b"arrived: x\nsender: a\nrecipient: b\n\n",
]


class TestMaildrop:
    """Mail of users without rights."""

    def test_what_is_dropped_is_taken(self, spool):
        drop = minimta.Maildrop(spool.directory)
        name = make_drop(bytes(LETTER) + MESSAGE, drop.directory)
        uid, file = drop.take(name, 4096)
        with file:
            assert (uid, b"".join(file.chunks())) == (os.getuid(), MESSAGE)

    def test_what_is_not_complete_has_a_dot_name(self, spool):
        with minimta.Maildrop(spool.directory).create(LETTER) as draft:
            wanted = f"{spool.directory}/maildrop/.{draft.queue_id}"
            assert draft.path == wanted
            assert os.path.exists(wanted)

    @pytest.mark.parametrize("kind", HOSTILE_DROPS)
    def test_what_is_no_honest_file_is_refused(self, spool, kind):
        drop = minimta.Maildrop(spool.directory)
        name = make_drop(kind, drop.directory)
        before = open_files()
        with pytest.raises((OSError, ValueError)):
            drop.take(name, 4096)
        assert open_files() == before


# == 18 Alias database: AliasDatabase, AliasMaps, TargetFiles =================


def backends():
    """The dbm modules that this Python has."""
    for name in ("dumb", "gnu", "ndbm", "sqlite3"):
        with contextlib.suppress(ImportError):
            yield pytest.param(importlib.import_module(f"dbm.{name}"), id=name)


BACKENDS = list(backends())


def build(backend, path, pairs):
    """A database of that backend, as another program may make it."""
    database = backend.open(str(path), "n")
    for name, value in pairs:
        database[name] = value
    database.close()


@pytest.fixture
def aliases(tmp_path):
    """A database whose text says `a: old`; `.warned` has its warnings."""
    (tmp_path / "aliases").write_text("a: old\n")
    warned = []
    made = minimta.AliasDatabase(str(tmp_path / "aliases"), warned.append)
    made.warned = warned
    return made


def value_of(database, name):
    """The value of one alias, or None."""
    database.renew()
    found = database.lookup([name.lower()])
    return found and found[1]


class TestAliasDatabase:
    """The aliases file and what newaliases makes of it."""

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_database_rules_whatever_wrote_it(self, aliases, backend):
        build(backend, aliases.name, [(b"a", b"new")])
        assert (value_of(aliases, "a"), value_of(aliases, "b")) == ("new", None)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_nul_behind_name_and_value_does_not_count(self, aliases, backend):
        build(backend, aliases.name, [(b"a\0", b"new\0")])
        assert value_of(aliases, "a") == "new"

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_rebuilt_database_replaces_any_other(self, aliases, backend):
        build(backend, aliases.name, [(b"a", b"new"), (b"b", b"gone")])
        assert value_of(aliases, "b") == "gone"
        aliases.rebuild()
        assert (value_of(aliases, "a"), value_of(aliases, "b")) == ("old", None)

    @pytest.mark.parametrize("after", BACKENDS)
    @pytest.mark.parametrize("before", BACKENDS)
    def test_any_backend_takes_the_place_of_any_other(
        self, aliases, tmp_path, before, after
    ):
        build(before, aliases.name, [(b"a", b"first")])
        assert value_of(aliases, "a") == "first"
        aside = tmp_path / "aside"
        aside.mkdir()
        build(after, aside / "aliases.db", [(b"a", b"second")])
        built = sorted(os.listdir(aside))
        aliases.move(str(aside), str(tmp_path), "aliases.db", built)
        assert value_of(aliases, "a") == "second"
        left = [n for n in os.listdir(tmp_path) if not n.endswith(("-wal", "-shm"))]
        assert sorted(left) == sorted(["aliases", "aside", *built])

    @pytest.mark.parametrize("value", ["bob", "jörg", "\udcff", "b, " * 2000 + "c"])
    def test_what_is_built_is_read_back(self, aliases, value):
        aliases.replace([("a", value)])
        assert value_of(aliases, "a") == value

    def test_a_text_is_built_and_read_back(self, aliases):
        Path(aliases.path).write_text('A: b, "|c, d" # e\n"f g": h\n')
        assert aliases.rebuild().problems == []
        assert value_of(aliases, "a") == 'b, "|c, d"'
        assert value_of(aliases, "F G") == "h"

    def test_an_empty_text_makes_an_empty_database(self, aliases):
        Path(aliases.path).write_text("")
        aliases.rebuild()
        Path(aliases.path).write_text("a: b\n")
        assert value_of(aliases, "a") is None

    def test_building_leaves_nothing_but_the_database(self, aliases, tmp_path):
        aliases.rebuild()
        names = {name.split(".")[0] for name in os.listdir(tmp_path)}
        assert names == {"aliases"}

    def test_everybody_may_read_the_database(self, aliases, tmp_path):
        aliases.rebuild()
        modes = {path.stat().st_mode & 0o777 for path in tmp_path.glob("aliases.db*")}
        assert modes == {0o644}

    def test_a_text_with_a_problem_leaves_the_database_as_it_was(
        self, aliases, tmp_path
    ):
        aliases.rebuild()
        before = {p: p.read_bytes() for p in tmp_path.glob("aliases.db*")}
        Path(aliases.path).write_text("a: b\nbad line\n")
        assert aliases.rebuild().problems != []
        assert {p: p.read_bytes() for p in tmp_path.glob("aliases.db*")} == before

    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_text_that_is_none_cannot_be_built(self, aliases, is_there):
        os.unlink(aliases.path)
        if is_there:
            os.mkdir(aliases.path)
        with pytest.raises(minimta.ProgramError, match=aliases.path) as caught:
            aliases.rebuild()
        assert caught.value.code == 66

    def test_a_database_older_than_its_text_rules_and_is_warned_of(self, aliases):
        aliases.replace([("a", "new")])
        later = time.time() + 100
        os.utime(aliases.path, (later, later))
        assert value_of(aliases, "a") == "new"
        assert ["older than source file" in text for text in aliases.warned] == [True]

    def test_a_newer_database_is_not_warned_of(self, aliases):
        os.utime(aliases.path, (1000, 1000))
        aliases.rebuild()
        value_of(aliases, "a")
        assert aliases.warned == []

    def test_a_database_that_cannot_be_read_is_warned_of_and_the_text_used(
        self, aliases
    ):
        Path(aliases.name).write_bytes(b"no database at all\n" * 99)
        assert value_of(aliases, "a") == "old"
        assert "cannot be read" in aliases.warned[-1]

    def test_without_a_database_the_text_is_used(self, aliases):
        assert (value_of(aliases, "A"), value_of(aliases, "b")) == ("old", None)

    def test_a_changed_text_counts_at_the_next_look(self, aliases):
        assert value_of(aliases, "a") == "old"
        Path(aliases.path).write_text("a: newer\n")
        assert value_of(aliases, "a") == "newer"

    def test_without_either_nobody_has_an_alias(self, tmp_path):
        nobody = minimta.AliasDatabase(str(tmp_path / "none"))
        assert value_of(nobody, "a") is None

    def test_a_text_that_cannot_be_read_is_a_failure_for_now(self, aliases):
        os.unlink(aliases.path)
        os.mkdir(aliases.path)
        with pytest.raises(minimta.MailError) as caught:
            value_of(aliases, "a")
        assert caught.value.status == "4.3.0"

    def test_a_bad_line_of_the_text_is_warned_of(self, aliases):
        Path(aliases.path).write_text("bad\na: b\n")
        assert value_of(aliases, "a") == "b"
        assert aliases.warned == [f"{aliases.path}, line 1: need name: value"]


@pytest.fixture
def owner(place):
    """A user with a home; anybody but root, where that can be told apart."""
    uid = 54321 if AS_ROOT else os.getuid()
    gid = 54321 if AS_ROOT else os.getgid()
    (place / "home").mkdir(mode=0o755)
    os.chown(place / "home", uid, gid)
    return minimta.User("bob", uid, gid, "", str(place / "home"))


def write_as(user, path, data=b"", mode=0o644):
    """A file that belongs to a user."""
    Path(path).write_bytes(data)
    os.chmod(path, mode)
    os.chown(path, user.uid, user.gid)
    return Path(path)


FORWARD_PROBLEMS = [
    ("link", "loop|Too many|symbolic"),
    ("fifo", "is not a regular file"),
    ("directory", "is not a regular file"),
    ("group-writable", "is writable by others"),
    ("writable", "is writable by others"),
    ("open home", "is in a home that is writable by others"),
    ("large", "is too large"),
    ("hard link", "has more than one name"),
    ("filter", "is a filter"),
]


def spoil_forward(kind, user):
    """A ~/.forward that must not be trusted."""
    path = Path(user.home, ".forward")
    makers = {
        "link": lambda: path.symlink_to(write_as(user, f"{user.home}/x", b"carol\n")),
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "group-writable": lambda: write_as(user, path, b"carol\n", 0o664),
        "writable": lambda: write_as(user, path, b"carol\n", 0o646),
        "open home": lambda: write_as(user, path, b"carol\n"),
        "large": lambda: write_as(user, path, b"carol\n" * 20_000),
        "hard link": lambda: os.link(
            write_as(user, f"{user.home}/x", b"carol\n"), path
        ),
        "filter": lambda: write_as(user, path, b"# Exim filter\ndeliver carol\n"),
    }
    makers[kind]()
    os.chown(path, user.uid, user.gid, follow_symlinks=False)
    os.chmod(user.home, 0o777 if kind == "open home" else 0o755)


def read_forward(user):
    """(what ~/.forward says, why it is ignored)."""
    _, text, ignored = minimta.TargetFiles(minimta.Users()).forward(user, "")
    return text, "".join(ignored)


class TestTargetFiles:
    """~/.forward and lists, each read as its owner."""

    def test_a_users_file_is_read(self, owner):
        write_as(owner, f"{owner.home}/.forward", b"carol\n", 0o600)
        assert read_forward(owner) == ("carol\n", "")

    def test_without_a_file_nothing_is_said(self, owner):
        assert read_forward(owner) == ("", "")

    def test_without_a_home_nothing_is_said(self):
        nobody = minimta.User("x", os.getuid(), os.getgid(), "", "/nonexistent")
        assert read_forward(nobody) == ("", "")

    def test_a_home_that_is_not_there_yet_is_waited_for(self, owner):
        absent = minimta.User("bob", owner.uid, owner.gid, "", f"{owner.home}/not/yet")
        with pytest.raises(minimta.MailError, match="is not there") as caught:
            read_forward(absent)
        assert caught.value.status == "4.3.0"

    def test_a_system_user_without_a_home_is_not_waited_for(self):
        daemon = minimta.User("www", 33, 33, "", "/no/such/home")
        assert read_forward(daemon) == ("", "")

    @needs_root
    def test_a_sticky_home_is_being_worked_on(self, owner):
        os.chmod(owner.home, 0o1755)
        with pytest.raises(minimta.MailError, match="is sticky"):
            read_forward(owner)

    def test_detail_has_a_file_of_its_own_before_the_other(self, owner):
        write_as(owner, f"{owner.home}/.forward", b"carol\n")
        write_as(owner, f"{owner.home}/.forward+lists", b"eve\n")
        files = minimta.TargetFiles(minimta.Users())
        assert files.forward(owner, "+lists")[1] == "eve\n"
        assert files.forward(owner, "+other")[1] == "carol\n"

    @pytest.mark.parametrize("detail", ["+", "+../x", "+a/b", "+\n"])
    def test_detail_is_never_a_way_out_of_the_home(self, owner, detail):
        write_as(owner, f"{owner.home}/.forward", b"carol\n")
        files = minimta.TargetFiles(minimta.Users())
        assert files.forward(owner, detail)[0] == f"{owner.home}/.forward"

    def test_a_list_is_read_as_its_owner(self, owner):
        path = write_as(owner, f"{owner.home}/list", b"bob\n", 0o600)
        found = minimta.TargetFiles(minimta.Users()).include(str(path), None)
        assert (found.text, found.owner.uid) == ("bob\n", owner.uid)
        assert not found.is_shared

    def test_a_list_that_its_group_may_write_is_shared(self, owner):
        path = write_as(owner, f"{owner.home}/list", b"bob\n", 0o664)
        assert minimta.TargetFiles(minimta.Users()).include(str(path), None).is_shared

    @pytest.mark.parametrize(
        ("kind", "why"),
        [row for row in FORWARD_PROBLEMS if row[0] not in ("open home", "filter")],
    )
    def test_a_list_that_others_could_have_put_there_waits(self, owner, kind, why):
        if kind == "group-writable":
            pytest.skip("addresses may stand there")
        spoil_forward(kind, owner)
        path = f"{owner.home}/.forward"
        if kind == "large":
            os.truncate(path, minimta.TargetFiles.MAX_INCLUDE + 1)
        before = open_files()
        with pytest.raises(minimta.MailError, match=why) as caught:
            minimta.TargetFiles(minimta.Users()).include(path, None)
        assert caught.value.status == "4.3.5"
        assert open_files() == before

    @needs_root
    def test_a_list_is_not_read_with_more_rights_than_its_readers(self, owner):
        path = write_as(owner, f"{owner.home}/secret", b"root\n", 0o600)
        os.chown(path, 0, 0)
        with pytest.raises(minimta.MailError, match="Permission denied"):
            minimta.TargetFiles(minimta.Users()).include(str(path), owner)

    @needs_root
    def test_a_file_of_roots_that_a_user_could_have_linked_to_is_not_read(self, owner):
        secret = write_as(owner, f"{owner.home}/secret", b"root\n", 0o600)
        os.chown(secret, 0, 0)
        with pytest.raises(minimta.MailError, match="Permission denied"):
            minimta.TargetFiles(minimta.Users()).include(str(secret), None)

    @pytest.mark.parametrize(("kind", "why"), FORWARD_PROBLEMS)
    def test_what_others_could_have_written_is_ignored(self, owner, kind, why):
        spoil_forward(kind, owner)
        before = open_files()
        text, said = read_forward(owner)
        assert text == ""
        assert re.search(why, said)
        assert open_files() == before

    @needs_root
    def test_somebody_elses_file_is_ignored(self, owner):
        path = write_as(owner, f"{owner.home}/.forward", b"carol\n")
        os.chown(path, 54399, 54399)
        text, why = read_forward(owner)
        assert (text, why) == ("", f"{path} does not belong to its user")

    @needs_root
    def test_a_file_that_only_root_may_read_is_not_read(self, owner):
        path = write_as(owner, f"{owner.home}/.forward", b"carol\n", 0o600)
        os.chown(path, 0, 0)
        text, why = read_forward(owner)
        assert (text, why) == ("", f"{path}: Permission denied")


# == 19 Mailboxes: MailboxLock, Mailbox, FileBox, MaildirBox ==================


HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked(path):
    """Another process has the fcntl lock of a file for the block."""
    line = [sys.executable, "-IS", "-c", HOLD_LOCK, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe) as child:
        assert child.stdout.readline() == b"locked\n"
        yield
        child.stdin.close()


def can_lock(path):
    """Whether another process gets the fcntl lock of a file."""
    line = [sys.executable, "-IS", "-c", HOLD_LOCK, str(path)]
    return subprocess.run(line, input=b"", capture_output=True).returncode == 0


def dead_pid():
    """The pid of a process that is no more."""
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    return child.pid


@pytest.fixture
def box(tmp_path):
    """A lock on an empty mailbox, not taken yet."""
    path = tmp_path / "box"
    path.touch()
    with open(path, "r+b") as file:
        yield minimta.MailboxLock(str(path), file.fileno())


class TestMailboxLock:
    """fcntl lock and dotlock."""

    def test_a_taken_lock_is_a_dotlock_with_our_pid(self, box):
        box.acquire()
        assert Path(box.path).read_bytes() == b"%d minimta\n" % os.getpid()

    def test_a_taken_lock_keeps_other_processes_out(self, box, tmp_path):
        box.acquire()
        assert not can_lock(tmp_path / "box")

    def test_a_released_lock_leaves_nothing(self, box, tmp_path):
        box.acquire()
        box.release()
        assert os.listdir(tmp_path) == ["box"]
        assert can_lock(tmp_path / "box")

    def test_a_lock_of_another_process_is_respected(self, box, tmp_path):
        with locked(tmp_path / "box"), pytest.raises(minimta.Busy):
            box.acquire()
        assert os.listdir(tmp_path) == ["box"]

    @pytest.mark.parametrize(
        "text", ["", "12345\n", "0\n", "host:12345", "12345 another\n"]
    )
    def test_a_dotlock_of_another_program_is_respected(self, box, tmp_path, text):
        Path(box.path).write_text(text)
        with pytest.raises(minimta.Busy):
            box.acquire()
        box.release()
        assert Path(box.path).read_text() == text
        assert can_lock(tmp_path / "box")

    def test_a_dotlock_that_a_killed_minimta_left_is_broken(self, box):
        Path(box.path).write_text(f"{dead_pid()} minimta\n")
        box.acquire()
        assert Path(box.path).read_bytes() == b"%d minimta\n" % os.getpid()

    @pytest.mark.parametrize("text", ["", "12345\n"])
    def test_a_very_old_dotlock_is_broken(self, box, text):
        Path(box.path).write_text(text)
        os.utime(box.path, (1000, 1000))
        box.acquire()
        assert Path(box.path).read_bytes() == b"%d minimta\n" % os.getpid()

    def test_what_a_kill_left_beside_it_does_not_count(self, box):
        Path(f"{box.path}.minimta").write_bytes(b"torn")
        box.acquire()
        assert box.has_dotlock


@pytest.fixture
def boxes(tmp_path):
    """A path for mailboxes of one's own."""
    return tmp_path / "bob"


def opened(path, **how):
    """A mailbox of this process's user."""
    return minimta.Mailbox(str(path), os.geteuid(), **how)


OLD_MAIL = (
    b"From eve@far.example  Wed Feb 19 05:10:00 2020\nSubject: old\n\nold text\n\n"
)
NEW_MAIL = [b"From a@b  Wed Feb 19 05:10:01 2025\n", b"Subject: new\n\nnew text\n\n"]


class TestMailboxFile:
    """Appending to an mbox file."""

    def test_a_mailbox_is_made_for_its_owner_alone(self, boxes):
        with opened(boxes) as mailbox:
            mailbox.append(NEW_MAIL)
            mailbox.sync()
        assert boxes.stat().st_mode & 0o777 == 0o600
        assert boxes.read_bytes() == b"".join(NEW_MAIL)

    @pytest.mark.parametrize(
        ("there", "between"),
        [
            # a whole message, one without its empty line, half a line
            *[(OLD_MAIL, b""), (OLD_MAIL[:-1], b"\n"), (OLD_MAIL[:-2], b"\n\n")],
            (OLD_MAIL[:-9], b"\n\n"),
            # DOS line ends, nothing
            *[(OLD_MAIL.replace(b"\n", b"\r\n"), b""), (b"", b"")],
        ],
    )
    def test_a_message_begins_behind_an_empty_line(self, boxes, there, between):
        boxes.write_bytes(there)
        with opened(boxes) as mailbox:
            mailbox.append(NEW_MAIL)
        assert boxes.read_bytes() == there + between + b"".join(NEW_MAIL)

    def test_nuls_at_the_end_are_cut_off(self, boxes):
        boxes.write_bytes(OLD_MAIL + b"\0" * 300_000)
        with opened(boxes) as mailbox:
            mailbox.append(NEW_MAIL)
        assert boxes.read_bytes() == OLD_MAIL + b"".join(NEW_MAIL)

    def test_half_a_message_is_taken_back(self, boxes):
        def half():
            yield from NEW_MAIL
            yield b"x" * (1 << 20)
            raise OSError(5, "Input/output error")

        boxes.write_bytes(OLD_MAIL)
        with opened(boxes) as mailbox, pytest.raises(minimta.MailError) as caught:
            mailbox.append(half())
        assert (caught.value.status, boxes.read_bytes()) == ("4.2.0", OLD_MAIL)

    def test_the_lock_is_given_back(self, boxes, tmp_path):
        with opened(boxes):
            assert not can_lock(boxes)
        assert os.listdir(tmp_path) == ["bob"]

    def test_a_busy_mailbox_is_left_alone(self, boxes):
        boxes.write_bytes(OLD_MAIL)
        before = open_files()
        with locked(boxes), pytest.raises(minimta.Busy), opened(boxes):
            pass
        assert (boxes.read_bytes(), open_files()) == (OLD_MAIL, before)

    @pytest.mark.parametrize(
        ("kind", "why"),
        [
            ("symlink", "symbolic link"),
            ("dangling", "symbolic link"),
            ("fifo", "is not a regular file"),
            ("directory", "directory"),
            ("hard link", "has more than one name"),
        ],
    )
    def test_what_is_no_mailbox_is_refused(self, boxes, tmp_path, kind, why):
        other = tmp_path / "other"
        other.write_bytes(b"precious")
        makers = {
            "symlink": lambda: boxes.symlink_to(other),
            "dangling": lambda: boxes.symlink_to(tmp_path / "none"),
            "fifo": lambda: os.mkfifo(boxes),
            "directory": boxes.mkdir,
            "hard link": lambda: os.link(other, boxes),
        }
        makers[kind]()
        with pytest.raises(minimta.MailError, match=f"(?i){why}"), opened(boxes):
            pass
        assert other.read_bytes() == b"precious"
        assert not (tmp_path / "none").exists()

    @needs_root
    def test_somebody_elses_mailbox_is_refused(self, boxes):
        boxes.touch()
        os.chown(boxes, 54321, 54321)
        with pytest.raises(minimta.MailError, match="not belong"), opened(boxes):
            pass

    @pytest.mark.parametrize(
        ("limit", "is_full"), [(76, True), (77, False), (0, False)]
    )
    def test_a_mailbox_as_large_as_the_limit_is_full(self, boxes, limit, is_full):
        boxes.write_bytes(b"x" * 76)
        status = ""
        try:
            with opened(boxes, limit=limit):
                pass
        except minimta.MailError as error:
            status = error.status
        assert status == ("4.2.2" if is_full else "")


def make_task(spool, queue_id, now):
    """A message of the queue on its way to bob's mailbox."""
    message = minimta.ActiveMessage(spool.open(queue_id), [], now)
    user = minimta.User("bob", os.getuid(), os.getgid(), "", "/")
    where = minimta.Destination("mailbox", "bob@host.example", user=user)
    task = minimta.Task(message, where)
    task.recipients.append("bob@host.example")
    return task


def own_received(queue_id, client=""):
    """Our Received field, as it is on top of a message in the queue."""
    fields = {"helo": "c", "client": client, "proto": "SMTP"} if client else {"uid": 0}
    return minimta.received_field(fields, "host.example", queue_id, 1.5)


QUEUE_ID = "0123456789"
OTHER_ID = "9876543210"


@pytest.fixture
def torn(spool):
    """(the first try, the second), at another time, of one delivery."""
    commit(spool, own_received(QUEUE_ID) + MESSAGE, QUEUE_ID)
    first, second = (make_task(spool, QUEUE_ID, now) for now in (1e9, 1.1e9))
    yield first.render, second.render
    for task in (first, second):
        os.close(task.message.file.fd)


def deliver_again(path, render):
    """What a runner does with a message that may be there already."""
    with opened(path) as mailbox:
        offset = mailbox.find({QUEUE_ID}).get(QUEUE_ID)
        if not mailbox.already_has(offset, render):
            mailbox.append(render())


class TestRedelivery:
    """A message that a crash may have left in the mailbox."""

    @pytest.mark.parametrize("before", [OLD_MAIL, b""])
    def test_a_copy_torn_at_any_byte_is_replaced_by_a_whole_one(
        self, boxes, torn, before
    ):
        first, second = (b"".join(render()) for render in torn)
        wrong = []
        for end in range(len(b"From "), len(first)):
            boxes.write_bytes(before + first[:end])
            deliver_again(boxes, torn[1])
            if boxes.read_bytes() != before + second:
                wrong.append(first[:end])
        assert wrong == []

    def test_a_torn_from_leaves_one_whole_copy_too(self, boxes, torn):
        for end in range(len(b"From ")):
            boxes.write_bytes(OLD_MAIL + b"From "[:end])
            deliver_again(boxes, torn[1])
            assert boxes.read_bytes().endswith(b"\n\n" + b"".join(torn[1]()))
            assert boxes.read_bytes().startswith(OLD_MAIL)

    @pytest.mark.parametrize("behind", [b"", OLD_MAIL])
    def test_a_whole_copy_stays_the_only_one(self, boxes, torn, behind):
        there = OLD_MAIL + b"".join(torn[0]()) + behind
        boxes.write_bytes(there)
        deliver_again(boxes, torn[1])
        assert boxes.read_bytes() == there

    def test_a_copy_that_its_reader_changed_stays_the_only_one(self, boxes, torn):
        there = b"".join(torn[0]()).replace(b"\n\n", b"\nStatus: RO\n\n", 1)
        boxes.write_bytes(there)
        deliver_again(boxes, torn[1])
        assert boxes.read_bytes() == there

    def test_half_a_copy_with_mail_behind_it_does_not_count(self, boxes, torn):
        first, second = (b"".join(render()) for render in torn)
        for cut in (first.index(b"some text"), len(first) - 4):
            there = first[:cut] + b"\n\n" + OLD_MAIL
            boxes.write_bytes(there)
            deliver_again(boxes, torn[1])
            assert boxes.read_bytes() == there + second

    def test_a_copy_with_nuls_in_it_does_not_count(self, boxes, torn):
        there = b"".join(torn[0]()).replace(b"some text", b"\0" * 9) + OLD_MAIL
        boxes.write_bytes(there)
        deliver_again(boxes, torn[1])
        assert boxes.read_bytes() == there + b"".join(torn[1]())

    def test_another_torn_message_stays(self, boxes, torn):
        boxes.write_bytes(OLD_MAIL[:-9])
        deliver_again(boxes, torn[1])
        assert boxes.read_bytes().startswith(OLD_MAIL[:-9] + b"\n\nFrom ")

    @pytest.mark.parametrize("client", ["", "unknown [192.0.2.1]"])
    def test_our_own_received_is_found(self, boxes, client):
        mail = b"From a\n" + own_received(QUEUE_ID, client) + MESSAGE + b"\n"
        boxes.write_bytes(OLD_MAIL + mail)
        with opened(boxes) as mailbox:
            assert mailbox.find({QUEUE_ID}) == {QUEUE_ID: len(OLD_MAIL)}

    @pytest.mark.parametrize(
        "text",
        [
            # in a body, in the header that a report quotes in its body
            MESSAGE + b"\n" + own_received(QUEUE_ID),
            own_received(OTHER_ID) + MESSAGE + b"--- The header:\n\n"
            b"Return-Path: <a>\n" + own_received(QUEUE_ID),
            # of a message that came here twice, the earlier time
            own_received(OTHER_ID) + own_received(QUEUE_ID) + MESSAGE,
            # in another field
            b"Subject: x\n\tid " + QUEUE_ID.encode() + b";\n\ntext\n",
            # another id
            own_received(OTHER_ID) + MESSAGE,
        ],
    )
    def test_an_id_elsewhere_is_not_found(self, boxes, text):
        boxes.write_bytes(OLD_MAIL + b"From a\n" + text + b"\n")
        with opened(boxes) as mailbox:
            assert mailbox.find({QUEUE_ID}) == {}


# == 20 Folders: Folder, FolderMessage ========================================


def mail(subject, *lines, status=""):
    """A message in a mailbox; what `status` says is its Status field."""
    field = f"Status: {status}\n" if status else ""
    text = "\n".join(("", *(lines or ("text",)), "", ""))
    date = "Wed Feb 19 05:10:01 2025"
    return f"From eve@far.example  {date}\nSubject: {subject}\n{field}{text}"


@pytest.fixture
def folder(tmp_path):
    """Opens a mailbox with that text."""
    made = []

    def make(*texts):
        (tmp_path / "box").write_text("".join(texts))
        made.append(minimta.Folder(str(tmp_path / "box")))
        return made[-1]

    yield make
    for one in made:
        os.close(one.fd)


FOLDER_ROWS = [
    ("", 0),
    (mail("a"), 1),
    (mail("a") + mail("b"), 2),
    # a From_ line needs an empty line above it, and a date
    (mail("a", "text", "From eve  Wed Feb 19 05:10:01 2025", "text"), 1),
    (mail("a", "", "From here to there", "text"), 1),
    (mail("a", "", ">From eve  Wed Feb 19 05:10:01 2025", "text"), 1),
    # any zone, without seconds
    (mail("a") + "From eve Wed Feb 19 05:10 CET 2025\n\n", 2),
    # DOS line ends
    ((mail("a") + mail("b")).replace("\n", "\r\n"), 2),
    # the last message lost its end
    (mail("a") + mail("b")[:-3], 2),
]


class TestFolder:
    """A mailbox as its reader sees it."""

    @pytest.mark.parametrize(("text", "count"), FOLDER_ROWS)
    def test_finds_messages(self, folder, text, count):
        assert len(folder(text).messages) == count

    def test_a_message_is_read_as_it_is(self, folder):
        box = folder(mail("a"), mail("b", "one", "two"))
        from_line, header = box.read(box.messages[1])
        assert from_line.startswith(b"From eve@far.example  Wed")
        assert header.values("subject") == ["b"]
        assert header.rest == b"one\ntwo\n\n"

    @pytest.mark.parametrize(
        ("status", "seen"),
        # is it new, is it unread
        [("", (True, True)), ("O", (False, True)), ("RO", (False, False))],
    )
    def test_status_says_what_is_new_and_unread(self, folder, status, seen):
        (message,) = folder(mail("a", status=status)).messages
        assert (message.is_new, message.is_unread) == seen

    @pytest.mark.parametrize(
        ("status", "was_read", "wanted"),
        [("", False, "O"), ("", True, "RO"), ("O", True, "RO"), ("RO", False, "RO")],
    )
    def test_status_is_written(self, folder, tmp_path, status, was_read, wanted):
        box = folder(mail("a", status=status), mail("b"))
        box.messages[0].was_read = was_read
        assert box.write() == 2
        text = mail("a", status=wanted) + mail("b", status="O")
        assert (tmp_path / "box").read_text() == text

    def test_what_is_deleted_or_saved_goes(self, folder, tmp_path):
        box = folder(*(mail(name, status="O") for name in "abcd"))
        box.messages[1].state, box.messages[2].state = "deleted", "saved"
        assert box.write() == 2
        text = mail("a", status="O") + mail("d", status="O")
        assert (tmp_path / "box").read_text() == text

    def test_mail_that_came_meanwhile_stays(self, folder, tmp_path):
        box = folder(mail("a"), mail("b"))
        with open(tmp_path / "box", "a") as file:
            file.write(mail("c"))
        box.messages[0].state = "deleted"
        box.write()
        wanted = mail("b", status="O") + mail("c")
        assert (tmp_path / "box").read_text() == wanted

    def test_when_nothing_changed_nothing_is_written(self, folder, tmp_path):
        box = folder(mail("a", status="O"))
        os.utime(tmp_path / "box", (1000, 1000))
        box.write()
        assert (tmp_path / "box").stat().st_mtime == 1000

    def test_the_file_stays_the_same_file(self, folder, tmp_path):
        box = folder(mail("a"), mail("b"))
        os.chmod(tmp_path / "box", 0o640)
        before = (tmp_path / "box").stat()
        box.messages[0].state = "deleted"
        box.write()
        after = (tmp_path / "box").stat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)

    def test_writing_leaves_nothing_beside_it(self, folder, tmp_path):
        box = folder(mail("a"))
        box.write()
        assert os.listdir(tmp_path) == ["box"]

    def test_a_file_that_shrank_is_not_written(self, folder, tmp_path):
        box = folder(mail("a"), mail("b"))
        (tmp_path / "box").write_text(mail("c"))
        with pytest.raises(minimta.ProgramError, match="another program"):
            box.write()
        assert (tmp_path / "box").read_text() == mail("c")

    def test_a_file_that_is_no_mailbox_is_refused(self, folder):
        with pytest.raises(minimta.ProgramError, match="not a mailbox"):
            folder("no mail at all\n")

    @pytest.mark.parametrize("kind", ["none", "directory", "fifo"])
    def test_what_is_no_file_is_refused(self, tmp_path, kind):
        path = tmp_path / kind
        if kind != "none":
            {"directory": os.mkdir, "fifo": os.mkfifo}[kind](path)
        with pytest.raises(minimta.ProgramError, match=re.escape(str(path))):
            minimta.Folder(str(path))

    @pytest.mark.skipif(AS_ROOT, reason="root may write everything")
    def test_a_file_that_may_not_be_written_is_read_only(self, tmp_path):
        (tmp_path / "box").write_text(mail("a"))
        (tmp_path / "box").chmod(0o400)
        assert minimta.Folder(str(tmp_path / "box")).is_read_only

    @needs_root
    def test_a_file_on_a_read_only_disk_is_read_only(self, tmp_path):
        (tmp_path / "box").write_text(mail("a"))
        with mounted("--bind", tmp_path, tmp_path):
            words = ["mount", "-o", "remount,bind,ro", tmp_path]
            subprocess.run(words, check=True)
            box = minimta.Folder(str(tmp_path / "box"))
            os.close(box.fd)
            assert (box.is_read_only, len(box.messages)) == (True, 1)


# == 23 Relay: NextHop, Parcel, Relay =========================================


HOST_ROWS = [
    ("mx.example", ("mx.example", 25)),
    ("[mx.example]", ("mx.example", 25)),
    ("mx.example:587", ("mx.example", 587)),
    ("[mx.example]:587", ("mx.example", 587)),
    (" [192.0.2.1]:2525 ", ("192.0.2.1", 2525)),
    # colons in brackets belong to the address
    ("[2001:db8::1]", ("2001:db8::1", 25)),
    ("[::1]:26", ("::1", 26)),
]

STORE_ROWS = [
    ("lmtp:store.example:2003", ("lmtp", "store.example", 2003)),
    ("lmtp:[127.0.0.1]:2003", ("lmtp", "127.0.0.1", 2003)),
    ("lmtp:inet:store.example", ("lmtp", "store.example", 24)),
    ("lmtp:/run/dovecot/lmtp", ("lmtp", "/run/dovecot/lmtp", 0)),
    ("lmtp:unix:/run/dovecot/lmtp", ("lmtp", "/run/dovecot/lmtp", 0)),
]

REPLY_ROWS = [
    # the host's own status, if it is of the reply's class
    (550, b"5.1.1 no such user", "5.1.1"),
    (450, b"4.2.0 greylisted", "4.2.0"),
    (552, b"5.2.2", "5.2.2"),
    (550, b"4.1.1 no", "5.0.0"),
    (451, b"5.1.1 no", "4.0.0"),
    # without one, that of the class
    (550, b"no such user", "5.0.0"),
    (550, b"5.x.1 no", "5.0.0"),
    (550, b"5.1 no", "5.0.0"),
    (550, b"", "5.0.0"),
    (421, b"go away", "4.0.0"),
    # anything that is no refusal is no success either
    (250, b"2.0.0 Ok", "4.0.0"),
    (354, b"go on", "4.0.0"),
    (-1, b"", "4.0.0"),
]


def make_relay():
    """A relay to mx.example that is not connected."""
    hop = minimta.NextHop.parse("[mx.example]:587", "relayhost")
    host = minimta.FarHost(hop, "mx.example", "192.0.2.1")
    return minimta.Relay(make_settings(), host, "none")


class TestRelayReplies:
    """What a relay host's answers mean."""

    @pytest.mark.parametrize(("text", "wanted"), HOST_ROWS)
    def test_a_host_is_read(self, text, wanted):
        hop = minimta.NextHop.parse(text, "relayhost")
        assert (hop.host, hop.port) == wanted

    @pytest.mark.parametrize(("text", "wanted"), STORE_ROWS)
    def test_a_mail_store_is_read(self, text, wanted):
        hop = minimta.NextHop.parse(text, "mailbox_transport", "lmtp")
        assert hop.fields()[:3] == wanted
        assert minimta.NextHop.parse(str(hop), "x") == hop

    @pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "\u0662"])
    def test_a_bad_port_is_refused(self, port):
        with pytest.raises(minimta.MailError) as caught:
            minimta.NextHop.parse(f"[mx.example]:{port}", "relayhost")
        assert caught.value.status == "4.3.5"

    @pytest.mark.parametrize(("code", "text", "status"), REPLY_ROWS)
    def test_a_reply_has_its_status(self, code, text, status):
        relay = make_relay()
        assert relay.refusal("DATA command", code, text).status == status

    def test_a_refusal_is_told_in_the_hosts_words(self):
        relay = make_relay()
        error = relay.refusal("RCPT TO command", 550, b"5.1.1 no\nsuch \x1buser")
        assert error.text == (
            "host mx.example[192.0.2.1]:587 said: 550 5.1.1 no such ?user "
            "(in reply to RCPT TO command)"
        )


class FakeMessage:
    """A queue file in memory, read in blocks."""

    def __init__(self, data, block):
        self.data = data
        self.block = block

    def chunks(self):
        return iter(in_chunks(self.data, self.block))


MANY_FIELDS = "".join(f"X-{n}: {'x' * 990}\n\tfolded\n" for n in range(2500))


class TestParcel:
    """A message as other hosts see it."""

    @pytest.mark.parametrize("block", [1, 7, 1 << 18])
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            (
                "From: payam\nTo: b\n\nFrom: payam\n",
                "From: c@x.y\nTo: b@h.z\n\nFrom: payam\n",
            ),
            ("From: payam\n", "From: c@x.y\n"),
            ("\nFrom: payam\n", "\nFrom: payam\n"),
            ("Subject: x\nno field\nFrom: payam\n\nx\n",) * 2,
            ("X: y\n\n\n\nx", "X: y\n\n\n\nx"),
            ("", ""),
        ],
    )
    def test_only_the_header_is_rewritten(self, text, wanted, block):
        lines = minimta.parse_map("payam c@x.y\n", "g")
        rewriter = minimta.Rewriter(lines, "h.z", make_settings("mydestination = h.z"))
        message = FakeMessage(text.encode(), block)
        parcel = minimta.Parcel(message, "payam@h.z", b"", rewriter)
        assert b"".join(parcel.chunks()) == wanted.encode()
        assert parcel.sender == "c@x.y"
        assert parcel.survey.size == len(wanted) + wanted.count("\n")

    def test_a_header_of_any_length_is_sent_whole(self):
        rewriter = minimta.Rewriter([], "h.z", make_settings("mydestination = h.z"))
        data = f"{MANY_FIELDS}From: a@x.y\n\nbody\n".encode()
        parcel = minimta.Parcel(FakeMessage(data, 1 << 18), "a@x.y", b"", rewriter)
        is_same = b"".join(parcel.chunks()) == data
        assert is_same

    def test_without_a_rewriter_nothing_changes(self):
        data = b"From: payam\n\nx\n"
        parcel = minimta.Parcel(
            FakeMessage(data, 4), "payam", b"Delivered-To: a\n", None
        )
        assert b"".join(parcel.chunks()) == b"Delivered-To: a\n" + data
        assert parcel.sender == "payam"


# == 22 Resolver: MailHost, Resolver ==========================================


class NameServer:
    """A real DNS server on a port of 127.0.0.1 that answers from a table.

    (name, type) -> records as (type, data), or a response code, or a function
    of the question packet that returns packets to send.
    """

    def __init__(self, rows):
        self.rows = rows
        self.asked = []
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp = socket.socket()
        while True:
            port = free_port()
            with contextlib.suppress(OSError):
                self.udp.bind(("127.0.0.1", port))
                self.tcp.bind(("127.0.0.1", port))
                break
        self.port = port
        self.tcp.listen(5)
        self.end, self.stop = socket.socketpair()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while True:
            ready = select.select([self.udp, self.tcp, self.end], [], [])[0]
            if self.end in ready:
                return
            if self.udp in ready:
                packet, address = self.udp.recvfrom(4096)
                for answer in self.answers(packet, "udp"):
                    self.udp.sendto(answer, address)
            if self.tcp in ready:
                connection, _ = self.tcp.accept()
                with connection:
                    packet = connection.recv(4096)[2:]
                    for answer in self.answers(packet, "tcp"):
                        for byte in len(answer).to_bytes(2, "big") + answer:
                            connection.send(bytes([byte]))

    def answers(self, packet, way):
        reader = minimta.PacketReader(packet)
        reader.place = 12
        name, code = reader.name(), reader.number()
        kind = {number: word for word, number in DNS_CODES.items()}[code]
        self.asked.append((name, kind, way))
        row = self.rows.get((name, kind), 3)
        if callable(row):
            return row(packet, way)
        if isinstance(row, int):
            return [wire_answer(packet, flags=0x8180 | row)]
        return [wire_answer(packet, *(wire_record(name, *one) for one in row))]

    def close(self):
        self.stop.send(b"x")
        self.thread.join()
        for one in (self.udp, self.tcp, self.end, self.stop):
            one.close()


@pytest.fixture
def make_names():
    """Has an instance ask a NameServer, and read a hosts file of its own."""
    made = []

    def make(instance, rows, hosts=""):
        made.append(NameServer(rows))
        text = f"nameserver [127.0.0.1]:{made[-1].port}\noptions timeout:1 attempts:1\n"
        instance.write("etc/resolv.conf", text)
        instance.write("etc/hosts", hosts)
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def make_resolver(tmp_path):
    """Makes a resolver that asks a NameServer; both as a pair."""
    made = []

    def make(rows, more="", hosts=""):
        server = NameServer(rows)
        made.append(server)
        (tmp_path / "etc").mkdir(exist_ok=True)
        text = f"# ours\nnameserver [127.0.0.1]:{server.port}\n{more}\n"
        (tmp_path / "etc/resolv.conf").write_text(text)
        (tmp_path / "etc/hosts").write_text(hosts)
        return minimta.Resolver(str(tmp_path)), server

    yield make
    for server in made:
        server.close()


def cut_by_udp(*records):
    """An answer that UDP has no room for."""

    def answer(packet, way):
        if way == "udp":
            return [wire_answer(packet, flags=0x8380)]
        return [wire_answer(packet, *records)]

    return answer


def forged_first(packet, way):
    """Answers with another id and another name come before the right one."""
    wrong = minimta.encode_question(0x1234, "y.example", "MX")
    evil = wire_record("x.example", "MX", (1, "evil.example"))
    number = int.from_bytes(packet[:2], "big") ^ 1
    return [
        wire_answer(number.to_bytes(2, "big") + packet[2:], evil),
        wire_answer(packet[:2] + wrong[2:], evil),
        b"noise",
        wire_answer(packet, MX_RECORD),
    ]


class TestResolver:
    """Name servers, over real sockets."""

    def test_mail_hosts_come_in_their_order_with_their_addresses(self, make_resolver):
        rows = {
            ("x.example", "MX"): [("MX", (20, "b.example")), ("MX", (10, "a.example"))],
            ("a.example", "A"): [("A", "192.0.2.1")],
            ("a.example", "AAAA"): [("AAAA", "2001:db8::1")],
            ("b.example", "A"): [("A", "192.0.2.2")],
        }
        resolver, _ = make_resolver(rows)
        assert [host.fields() for host in resolver.mail_hosts("X.example")] == [
            (10, "a.example", ["192.0.2.1", "2001:db8::1"]),
            (20, "b.example", ["192.0.2.2"]),
        ]

    def test_without_mx_the_domain_is_its_own_host(self, make_resolver):
        rows = {("x.example", "MX"): [], ("x.example", "A"): [("A", "192.0.2.1")]}
        resolver, _ = make_resolver(rows)
        (host,) = resolver.mail_hosts("x.example")
        assert host.fields() == (0, "x.example", ["192.0.2.1"])

    @pytest.mark.parametrize(
        ("rows", "status", "why"),
        [
            ({}, "5.4.4", "type=MX: Host not found$"),
            ({("x.example", "MX"): 2}, "4.4.3", "Host not found, try again$"),
            ({("x.example", "MX"): 5}, "4.4.3", "Host not found, try again$"),
            ({("x.example", "MX"): []}, "5.4.4", "no data record of requested type"),
            (
                {("x.example", "MX"): [("MX", (0, ""))]},
                "5.1.10",
                "does not accept mail",
            ),
        ],
    )
    def test_a_failure_has_postfixs_words(self, make_resolver, rows, status, why):
        resolver, _ = make_resolver(rows)
        with pytest.raises(minimta.MailError, match=why) as caught:
            resolver.mail_hosts("x.example")
        assert caught.value.status == status

    def test_a_server_that_is_silent_is_a_failure_for_now(self, make_resolver):
        rows = {("x.example", "MX"): lambda packet, way: []}
        resolver, server = make_resolver(rows, "options timeout:1 attempts:1")
        with pytest.raises(minimta.MailError) as caught:
            resolver.lookup("x.example", "MX")
        assert caught.value.status == "4.4.3"
        assert len(server.asked) == 1

    def test_of_mail_hosts_those_with_odd_names_are_left_out(self, make_resolver):
        odd = wire_record("x.example", "MX", b"\0\1\x03a b\0")
        rows = {
            ("x.example", "MX"): lambda packet, way: [wire_answer(packet, odd, good)],
            ("mx.x.example", "A"): [("A", "192.0.2.1")],
            ("y.example", "MX"): lambda packet, way: [wire_answer(packet, other)],
        }
        good, other = MX_RECORD, wire_record("y.example", "MX", b"\0\1\x03a b\0")
        resolver, _ = make_resolver(rows)
        assert [host.name for host in resolver.mail_hosts("x.example")] == [
            "mx.x.example"
        ]
        with pytest.raises(minimta.MailError, match="unexpected name server reply"):
            resolver.mail_hosts("y.example")

    @pytest.mark.parametrize("code", [1, 4])  # FORMERR, NOTIMP
    @pytest.mark.parametrize("has_question", [True, False])
    def test_a_server_without_edns_is_asked_in_the_old_way(
        self, make_resolver, has_question, code
    ):
        def old(packet, way):
            if packet[11]:  # RFC 6891 section 7
                answer = wire_answer(packet, flags=0x8180 | code)
                return [answer if has_question else answer[:4] + bytes(8)]
            return [wire_answer(packet, MX_RECORD)]

        resolver, server = make_resolver({("x.example", "MX"): old})
        assert len(resolver.lookup("x.example", "MX")) == 1
        assert [way for _, _, way in server.asked] == ["udp", "udp"]

    def test_use_vc_asks_by_tcp_only(self, make_resolver):
        rows = {("x.example", "MX"): [("MX", (1, "a"))]}
        resolver, server = make_resolver(rows, "options use-vc")
        assert len(resolver.lookup("x.example", "MX")) == 1
        assert [way for _, _, way in server.asked] == ["tcp"]

    @pytest.mark.parametrize(("options", "wanted"), [("rotate", 2), ("ndots:1", 4)])
    def test_rotate_asks_the_servers_by_turns(self, make_resolver, options, wanted):
        rows = {(f"{name}.example", "MX"): [("MX", (1, "a"))] for name in "abcd"}
        resolver, one = make_resolver(rows)
        _, other = make_resolver(rows, f"options {options}")
        servers = "".join(f"nameserver [127.0.0.1]:{s.port}\n" for s in (one, other))
        path = Path(resolver.files["resolv.conf"])
        path.write_text(f"{servers}options {options}\n")
        for name in "abcd":
            resolver.renew()
            resolver.lookup(f"{name}.example", "MX")
        assert (len(one.asked), len(other.asked)) == (wanted, 4 - wanted)

    def test_what_is_kept_is_bounded(self, make_resolver, monkeypatch):
        monkeypatch.setattr(minimta, "MAX_ANSWERS", 3)
        names = [f"n{number}.example" for number in range(10)]
        resolver, _ = make_resolver({(name, "MX"): [] for name in names})
        for name in names:
            resolver.lookup(name, "MX")
        assert len(resolver.kept) <= 3

    def test_a_server_that_is_not_there_is_passed_over(self, make_resolver):
        resolver, _ = make_resolver({("x.example", "MX"): [("MX", (1, "a"))]})
        resolver.servers.insert(0, ("127.0.0.1", free_port()))
        assert len(resolver.lookup("x.example", "MX")) == 1

    def test_an_answer_that_was_cut_is_asked_for_by_tcp(self, make_resolver):
        resolver, server = make_resolver({("x.example", "MX"): cut_by_udp(MX_RECORD)})
        assert len(resolver.lookup("x.example", "MX")) == 1
        assert [way for _, _, way in server.asked] == ["udp", "tcp"]

    def test_forged_answers_are_passed_over(self, make_resolver):
        resolver, _ = make_resolver({("x.example", "MX"): forged_first})
        (record,) = resolver.lookup("x.example", "MX")
        assert record.data == (10, "mx.x.example")

    def test_an_answer_is_kept_as_long_as_it_says(self, make_resolver):
        rows = {
            ("x.example", "MX"): [("MX", (1, "a.example"), 60)],
            ("y.example", "MX"): [("MX", (1, "a.example"), 0)],
        }
        resolver, server = make_resolver(rows)
        for name in ("x.example", "y.example") * 2:
            resolver.lookup(name, "MX")
        names = [name for name, _, _ in server.asked]
        assert names == ["x.example", "y.example", "y.example"]

    def test_the_hosts_file_comes_first(self, make_resolver):
        hosts = "192.0.2.7 near.example near # ours\n"
        resolver, server = make_resolver({}, hosts=hosts)
        assert resolver.addresses("NEAR") == ["192.0.2.7"]
        assert server.asked == []

    def test_equals_come_in_varying_order_behind_the_better_ones(self, make_resolver):
        hosts = [f"h{n}.example" for n in range(6)]
        records = [("MX", (10 if n else 5, name), 9) for n, name in enumerate(hosts)]
        rows = {(name, "A"): [("A", "192.0.2.1", 9)] for name in hosts}
        rows.update({(name, "AAAA"): [("AAAA", "::1", 9)] for name in hosts})
        resolver, _ = make_resolver({**rows, ("x.example", "MX"): records})
        seen = set()
        for _ in range(20):
            names = [host.name for host in resolver.mail_hosts("x.example")]
            assert names[0] == hosts[0]
            assert sorted(names) == hosts
            seen.add(tuple(names))
        assert len(seen) > 5
        assert len({names[1] for names in seen}) > 1

    @pytest.mark.parametrize("code", [2, 3, 5, 4])
    def test_a_host_that_cannot_be_found_spoils_no_other(self, make_resolver, code):
        rows = {
            ("x.example", "MX"): [("MX", (1, "a.example")), ("MX", (2, "b.example"))],
            ("a.example", "A"): code,
            ("a.example", "AAAA"): code,
            ("b.example", "A"): [("A", "192.0.2.2")],
        }
        resolver, _ = make_resolver(rows)
        hosts = resolver.mail_hosts("x.example")
        assert [(one.name, one.addresses) for one in hosts] == [
            ("a.example", []),
            ("b.example", ["192.0.2.2"]),
        ]

    @pytest.mark.parametrize("other", [2, 3, []])
    def test_one_failure_for_now_among_failures_is_for_now(self, make_resolver, other):
        rows = {
            ("x.example", "MX"): [("MX", (1, "a.example")), ("MX", (2, "b.example"))],
            ("a.example", "A"): other,
            ("b.example", "A"): 2,
        }
        resolver, _ = make_resolver(rows)
        with pytest.raises(minimta.MailError, match="name=[ab].example") as caught:
            resolver.mail_hosts("x.example")
        assert caught.value.status == "4.4.3"

    def test_an_address_of_one_kind_is_enough(self, make_resolver):
        rows = {("a.example", "A"): [("A", "192.0.2.1")], ("a.example", "AAAA"): 3}
        rows.update({("b.example", "A"): [], ("b.example", "AAAA"): [("AAAA", "::2")]})
        resolver, _ = make_resolver(rows)
        assert resolver.addresses("a.example") == ["192.0.2.1"]
        assert resolver.addresses("b.example") == ["::2"]

    def test_an_answer_about_ipv6_that_fails_does_not_spoil_ipv4(self, make_resolver):
        rows = {("a.example", "A"): [("A", "192.0.2.1")], ("a.example", "AAAA"): 2}
        resolver, _ = make_resolver(rows)
        assert resolver.addresses("a.example") == ["192.0.2.1"]

    def test_ipv4_is_asked_for_first(self, make_resolver):
        rows = {("a.example", "A"): [("A", "192.0.2.1")]}
        rows["a.example", "AAAA"] = [("AAAA", "2001:db8::1")]
        resolver, server = make_resolver(rows)
        assert resolver.addresses("a.example") == ["192.0.2.1", "2001:db8::1"]
        assert [kind for _, kind, _ in server.asked] == ["A", "AAAA"]

    def test_a_host_in_brackets_is_asked_for_by_address_only(self, make_resolver):
        resolver, server = make_resolver({("a.example", "A"): [("A", "192.0.2.1")]})
        (host,) = resolver.host("a.example")
        assert host.fields() == (-1, "a.example", ["192.0.2.1"])
        assert "MX" not in [kind for _, kind, _ in server.asked]
        for address in ("192.0.2.9", "2001:db8::9"):
            (host,) = resolver.host(address)
            assert host.addresses == [address]
        assert len(server.asked) == 2

    def test_what_is_endless_is_cut(self, make_resolver):
        hosts = [f"h{n}.example" for n in range(100)]
        many = [wire_record("x.example", "MX", (n, one)) for n, one in enumerate(hosts)]
        rows = {
            (name, "A"): cut_by_udp(
                *(wire_record(name, "A", f"10.0.{n}.{m}") for m in range(100))
            )
            for n, name in enumerate(hosts)
        }
        resolver, server = make_resolver(
            {**rows, ("x.example", "MX"): cut_by_udp(*many)}
        )
        found = resolver.mail_hosts("x.example")
        assert [one.name for one in found] == hosts[: len(found)]
        assert 5 <= len(found) <= 20
        assert all(5 <= len(one.addresses) <= 20 for one in found)
        assert len(server.asked) < 100

    def test_a_refusal_makes_the_next_server_asked(self, make_resolver):
        for code in (2, 4, 5, 9):
            resolver, first = make_resolver({("x.example", "MX"): code})
            _, second = make_resolver({("x.example", "MX"): [("MX", (1, "a"))]})
            resolver.servers = [("127.0.0.1", one.port) for one in (first, second)]
            assert len(resolver.lookup("x.example", "MX")) == 1
            # Who knows no EDNS0 is asked once more, without.
            assert len(first.asked) == 1 + (code == 4)
            assert len(second.asked) == 1

    def test_a_server_that_says_no_such_name_is_believed(self, make_resolver):
        resolver, first = make_resolver({})
        _, second = make_resolver({("x.example", "MX"): [("MX", (1, "a"))]})
        resolver.servers = [("127.0.0.1", one.port) for one in (first, second)]
        with pytest.raises(minimta.MailError, match="Host not found$"):
            resolver.lookup("x.example", "MX")
        assert second.asked == []

    def test_an_answer_larger_than_was_asked_for_is_none(self, make_resolver):
        filler = [wire_record("x.example", "TXT", b"\xff" + b"x" * 255)] * 5

        def oversized(packet, way):
            return [wire_answer(packet, MX_RECORD, *filler)]

        more = "options timeout:1 attempts:1"
        resolver, server = make_resolver({("x.example", "MX"): oversized}, more)
        with pytest.raises(minimta.MailError) as caught:
            resolver.lookup("x.example", "MX")
        assert caught.value.status == "4.4.3"
        assert len(server.asked) == 1

    def test_a_tcp_answer_of_any_size_is_read(self, make_resolver):
        filler = [wire_record("x.example", "TXT", b"\xff" + b"x" * 255)] * 200
        resolver, _ = make_resolver(
            {("x.example", "MX"): cut_by_udp(*filler, MX_RECORD)}
        )
        (record,) = resolver.lookup("x.example", "MX")
        assert record.data == (10, "mx.x.example")

    def test_an_answer_that_is_cut_by_tcp_too_is_none(self, make_resolver):
        def cut(packet, way):
            return [wire_answer(packet, flags=0x8380)]

        more = "options timeout:1 attempts:1"
        resolver, server = make_resolver({("x.example", "MX"): cut}, more)
        with pytest.raises(minimta.MailError) as caught:
            resolver.lookup("x.example", "MX")
        assert caught.value.status == "4.4.3"
        assert len(server.asked) == 2

    def test_questions_have_ids_and_ports_of_no_pattern(self, make_resolver):
        seen = []

        def notice(packet, way):
            seen.append(int.from_bytes(packet[:2], "big"))
            return [wire_answer(packet)]

        resolver, _ = make_resolver({("x.example", "MX"): notice})
        for _ in range(20):
            resolver.lookup("x.example", "MX")
        assert len(set(seen)) > 15
        steps = [b - a for a, b in zip(seen, seen[1:])]
        assert len(set(steps)) > 15

    def test_aliases_in_a_ring_are_a_failure(self, make_resolver):
        rows = {("x.example", kind): [("CNAME", "x.example")] for kind in ("MX", "A")}
        resolver, _ = make_resolver(rows)
        with pytest.raises(minimta.MailError):
            resolver.mail_hosts("x.example")

    def test_an_alias_for_a_mail_host_is_followed(self, make_resolver):
        answer = [
            wire_record("mx.example", "CNAME", "real.example"),
            wire_record("real.example", "A", "192.0.2.1"),
        ]
        rows = {
            ("x.example", "MX"): [("MX", (1, "mx.example"))],
            ("mx.example", "A"): lambda packet, way: [wire_answer(packet, *answer)],
        }
        resolver, _ = make_resolver(rows)
        (host,) = resolver.mail_hosts("x.example")
        assert host.addresses == ["192.0.2.1"]

    @pytest.mark.parametrize(
        "name", ["a..b", "x" * 64 + ".example", ".example", "xn--\udce4", "a." * 130]
    )
    def test_no_server_is_asked_for_what_is_no_name(self, make_resolver, name):
        resolver, server = make_resolver({})
        with pytest.raises(minimta.MailError) as caught:
            resolver.mail_hosts(name)
        assert not caught.value.is_temporary
        assert server.asked == []

    def test_an_international_name_is_asked_for_in_ascii(self, make_resolver):
        rows = {("xn--bcher-kva.example", "MX"): [("MX", (1, "a.example"))]}
        resolver, _ = make_resolver({**rows, ("a.example", "A"): [("A", "192.0.2.1")]})
        assert resolver.mail_hosts("BÜCHER.example.")[0].name == "a.example"

    @pytest.mark.parametrize("ask", ["mail_hosts", "host"])
    def test_resolv_conf_that_changes_is_read_again(self, make_resolver, ask):
        rows = {("x.example", "A"): [("A", "192.0.2.1")], ("x.example", "MX"): []}
        resolver, first = make_resolver(dict.fromkeys(rows, 5), "options attempts:1")
        with pytest.raises(minimta.MailError):
            getattr(resolver, ask)("x.example")
        _, second = make_resolver(rows)  # writes another resolv.conf
        (host,) = getattr(resolver, ask)("x.example")
        assert host.addresses == ["192.0.2.1"]
        assert second.asked != []
        assert resolver.attempts == 2  # what the new one does not say is as usual

    def test_a_hosts_file_that_changes_is_read_again(self, make_resolver, tmp_path):
        resolver, server = make_resolver({}, hosts="192.0.2.1 a.example\n")
        assert resolver.addresses("a.example") == ["192.0.2.1"]
        hosts = "192.0.2.2 b a.example\n::3 A.EXAMPLE # x\n192.0.2.4 #a.example\n"
        (tmp_path / "etc/hosts").write_text(hosts)
        assert resolver.addresses("a.example") == ["192.0.2.2", "::3"]
        assert server.asked == []

    def test_resolv_conf_has_its_forms(self, make_resolver):
        more = "nameserver 192.0.2.53 ; x\nnameserver\nsearch a b\noptions timeout:3 x"
        resolver, _ = make_resolver({}, more)
        assert resolver.servers[1:] == [("192.0.2.53", 53)]
        assert (resolver.timeout, resolver.attempts) == (3, 2)


# == 24 Routing: Destination, Trail, Router, TargetCheck ======================


class FakeAliases:
    """An alias database in memory; one name cannot be looked up."""

    def __init__(self, rows):
        self.rows = rows

    problem = ""

    def renew(self):
        """Nothing changes."""

    def lookup(self, names):
        if "broken" in names:
            raise minimta.MailError("4.3.0", "alias database unavailable")
        found = [name for name in names if self.rows.get(name) is not None]
        return (found[0], self.rows[found[0]], self) if found else None

    def names(self):
        return self.rows

    def where(self, name):
        return f"/etc/aliases:{list(self.rows).index(name) + 1}"


class FakeUsers:
    """Users with these names."""

    def __init__(self, names):
        self.known = names

    def lookup(self, name):
        found = [word for word in (name, name.lower()) if word in self.known]
        return minimta.User(found[0], 1, 1, "", f"/home/{found[0]}") if found else None

    def exact(self, name):
        return minimta.User(name, 2, 2, "", "/") if name == "nobody" else None

    def by_uid(self, uid):
        return minimta.User("nobody", 2, 2, "", "/")

    def names(self):
        return self.known


class FakeForwards:
    """.forward files in memory; `why` makes each one untrustworthy."""

    def __init__(self, rows, why=""):
        self.rows = rows
        self.why = why

    def forward(self, user, detail):
        for name in (user.name + detail, user.name):
            if name in self.rows:
                path = f"{user.home}/.forward{name.removeprefix(user.name)}"
                return path, self.rows[name], []
        return "", "", [self.why] if self.why else []

    def include(self, path, reader):
        path = path.replace("./", "")
        if path not in self.rows:
            raise minimta.MailError("4.3.5", f":include: {path}: No such file")
        owner = minimta.User("lister", 7, 7, "", "/home/lister")
        identity = (1, path)
        return minimta.ListFile(self.rows[path], owner, "shared" in path, identity)


def make_router(aliases=(), forwards=(), text="", warn=None, why=""):
    """A router of users root, bob, carol, Eve."""
    return minimta.Router(
        make_settings(f"relayhost = [mx.example]\n{text}"),
        FakeAliases(dict(aliases)),
        FakeUsers(["root", "bob", "carol", "Eve"]),
        FakeForwards({**LISTS, **dict(forwards)}, why),
        warn,
    )


def routed(router, address, *seen):
    """Where mail for an address goes: kinds and targets, or statuses."""
    found = router.resolve(minimta.Address.parse(address), router.passed(list(seen)))
    return [
        (f"{one.error.status} {one.target}" if one.error else one.key).replace(
            "@host.example", ""
        )
        for one in found
    ]


ALIAS_ROUTES = [
    # users, in any case, with detail, at any of our names
    ("bob", {}, ["mailbox bob"]),
    ("BOB@Host.Example", {}, ["mailbox bob"]),
    ("Eve@localhost", {}, ["mailbox Eve"]),
    ("bob+lists@host.example", {}, ["mailbox bob"]),
    # elsewhere
    ("bob@far.example", {"bob": "carol"}, ["remote bob@far.example"]),
    # nobody
    ("noone@host.example", {}, ["5.1.1 noone"]),
    ("eve@host.example", {}, ["5.1.1 eve"]),
    # one behind the other, several, each once
    ("lpic1", {"lpic1": "root", "root": "bob"}, ["mailbox bob"]),
    (
        "team",
        {"team": "bob, x@y.z, carol"},
        ["mailbox bob", "remote x@y.z", "mailbox carol"],
    ),
    ("team", {"team": "bob, boss", "boss": "bob"}, ["mailbox bob"]),
    ("TEAM@localhost", {"team": "bob"}, ["mailbox bob"]),
    # an alias beats a user; its own name is the mailbox
    ("bob", {"bob": "carol"}, ["mailbox carol"]),
    ("bob", {"bob": "bob, carol"}, ["mailbox bob", "mailbox carol"]),
    ("bob", {"bob": "bob@localhost"}, ["mailbox bob"]),
    # a backslash ends it
    ("team", {"team": "\\bob", "bob": "carol"}, ["mailbox bob"]),
    # detail: its own alias first
    ("team+x", {"team": "bob", "team+x": "carol"}, ["mailbox carol"]),
    ("team+y", {"team": "bob", "team+x": "carol"}, ["mailbox bob"]),
    # built in, unless the file says otherwise
    ("postmaster", {}, ["mailbox root"]),
    ("MAILER-DAEMON", {"root": "bob"}, ["mailbox bob"]),
    ("abuse", {"abuse": "carol"}, ["mailbox carol"]),
    # nowhere
    ("void", {"void": "/dev/null"}, ["null /dev/null"]),
    # commands, files, Maildirs: as default_privs
    ("cmd", {"cmd": '"|cat x"'}, ["pipe 2 cat x"]),
    ("file", {"file": "/var/x"}, ["file 2 /var/x"]),
    ("file", {"file": "/var/x/"}, ["maildir 2 /var/x/"]),
    ("home", {"home": "~/x"}, ["5.3.5 home"]),
    # refusals
    ("no", {"no": "error:550 5.7.1 no"}, ["5.7.1 no"]),
    ("no", {"no": ":defer: later"}, ["4.0.0 no"]),
    ("no", {"no": ":blackhole:"}, ["null /dev/null"]),
    # lists: each line a value; what nobody can read is left out
    ("list", {"list": ":include:/list"}, ["mailbox bob", "remote x@y.z"]),
    ("list", {"list": ":include:/none"}, ["4.3.5 list"]),
    ("list", {"list": ":include:/self"}, ["mailbox bob"]),
    ("list", {"list": ":include:/bad"}, ["mailbox bob"]),
    # a list's commands run as its owner, unless others may write it
    ("list", {"list": ":include:/prog"}, ["pipe 7 cat", "file 7 /var/x"]),
    ("list", {"list": ":include:/shared"}, ["mailbox bob", "5.7.1 list"]),
    # keys of a domain, the whole address first; a catch-all last
    ("bob@localhost", {"bob@localhost": "carol"}, ["mailbox carol"]),
    ("bob@host.example", {"bob@localhost": "carol"}, ["mailbox bob"]),
    ("BOB+x@localhost", {"bob@localhost": "carol"}, ["mailbox carol"]),
    ("bob@localhost", {"bob@localhost": "bob@localhost"}, ["mailbox bob"]),
    ("any@localhost", {"@localhost": "carol"}, ["mailbox carol"]),
    ("bob@localhost", {"@localhost": "carol"}, ["mailbox bob"]),
    ("any@localhost", {"@localhost": "any@localhost"}, ["5.1.1 any@localhost"]),
    # detail of any kind
    ("team+z", {"team": "bob", "team+*": "carol"}, ["mailbox carol"]),
    ("team", {"team": "bob", "team+*": "carol"}, ["mailbox bob"]),
    # loops, dead ends
    ("a", {"a": "b", "b": "a"}, ["5.4.6 a"]),
    ("a", {"a": "b, bob", "b": "a"}, ["5.4.6 a", "mailbox bob"]),
    ("a", {"a": "noone"}, ["5.1.1 noone"]),
    # what another program wrote into the database
    ("a", {"a": "b@c@d, bob"}, ["4.3.5 a"]),
    ("a", {"a": '"bob'}, ["4.3.5 a"]),
    ("a", {"a": ""}, ["4.3.5 a"]),
    ("list", {"list": ":include:/empty"}, ["4.3.5 list"]),
    ("list", {"list": ":include:/empty, bob"}, ["mailbox bob"]),
    # a database that cannot be read
    ("broken", {}, ["4.3.0 broken"]),
    ("a", {"a": "broken, bob"}, ["4.3.0 broken", "mailbox bob"]),
]

FORWARD_ROUTES = [
    # users, addresses, several, over lines and comments
    ("carol", ["mailbox carol"]),
    ("x@y.z\n", ["remote x@y.z"]),
    (
        "# me\ncarol, x@y.z # both\nroot\n",
        ["mailbox carol", "remote x@y.z", "mailbox root"],
    ),
    # oneself: the mailbox
    ("\\bob, carol", ["mailbox bob", "mailbox carol"]),
    ("bob, carol", ["mailbox bob", "mailbox carol"]),
    ("bob@host.example", ["mailbox bob"]),
    # nothing in it
    ("", ["mailbox bob"]),
    ("\n# nothing\n", ["mailbox bob"]),
    # thrown away
    ("/dev/null", ["null /dev/null"]),
    # an alias
    ("postmaster", ["mailbox root"]),
    # a typo is not the sender's fault
    ("x@y@z", ["mailbox bob"]),
    ('"carol', ["mailbox bob"]),
    ("x@y@z\ncarol", ["mailbox carol", "mailbox bob"]),
    # commands and files: as the user
    ("|cat", ["pipe 1 cat"]),
    ('\\bob, "|cat x"', ["mailbox bob", "pipe 1 cat x"]),
    ("/home/bob/x", ["file 1 /home/bob/x"]),
    ("~/x", ["file 1 /home/bob/x"]),
    ("~/Mail/", ["maildir 1 /home/bob/Mail/"]),
    (":include:/list", ["mailbox bob", "remote x@y.z"]),
    ("error:550 5.7.1 no", ["5.7.1 bob"]),
]


# What stands in :include: files.
LISTS = {
    "/list": "# a comment\nbob\nx@y.z, bob\n",
    "/self": ":include:/self\n:include:/./self\nbob\n",
    "/empty": "# nobody\na@b@c\n",
    "/bad": "a@b@c\nbob\n",
    "/prog": "|cat\n/var/x\n",
    "/shared": "bob\n|cat\n",
}


class TestRouter:
    """Where mail goes."""

    @pytest.mark.parametrize(("address", "aliases", "wanted"), ALIAS_ROUTES)
    def test_aliases_are_followed(self, address, aliases, wanted):
        assert routed(make_router(aliases), address) == wanted

    @pytest.mark.parametrize(("text", "wanted"), FORWARD_ROUTES)
    def test_forward_files_are_followed(self, text, wanted):
        assert routed(make_router(forwards={"bob": text}), "bob") == wanted

    def test_two_who_forward_to_each_other_are_a_loop(self):
        router = make_router(forwards={"bob": "carol", "carol": "bob"})
        assert [text[:5] for text in routed(router, "bob")] == ["5.4.6"]

    def test_mail_that_passed_here_before_is_a_loop(self):
        router = make_router(forwards={"bob": "x@y.z"})
        assert [text[:5] for text in routed(router, "bob", "bob@host.example")] == [
            "5.4.6"
        ]

    def test_mail_that_passed_elsewhere_is_none(self):
        router = make_router(forwards={"bob": "x@y.z"})
        seen = ("bob@far.example", "carol@host.example", "no address")
        assert routed(router, "bob", *seen) == ["remote x@y.z"]

    def test_an_alias_says_through_whom_it_was_forwarded(self):
        router = make_router({"team": "bob"}, {"bob": "carol", "carol": "x@y.z"})
        (found,) = router.resolve(minimta.Address("team"), ())
        assert found.forwarders == (
            *("carol@host.example", "bob@host.example", "team@host.example"),
        )

    def test_mail_that_an_alias_sent_away_and_that_came_back_is_a_loop(self):
        router = make_router({"team": "x@y.z"})
        assert [text[:5] for text in routed(router, "team", "team@host.example")] == [
            "5.4.6"
        ]

    def test_the_owner_of_a_list_becomes_the_sender(self):
        rows = {"list": "bob, x@y.z", "owner-list": "carol", "plain": "bob"}
        router = make_router(rows)
        for name, sender in (("list", "owner-list@host.example"), ("plain", "")):
            found = router.resolve(minimta.Address(name), ())
            assert {one.sender for one in found} == {sender}

    def test_detail_is_told_to_commands(self):
        router = make_router({"prog": "|cat"})
        (found,) = router.resolve(minimta.Address("prog", "localhost"), ())
        assert (found.target, found.detail) == ("prog@localhost", "")
        (found,) = router.resolve(minimta.Address("prog+x", "localhost"), ())
        assert (found.target, found.detail) == ("prog+x@localhost", "x")

    def test_a_command_of_a_user_runs_in_the_home_and_others_in_the_root(self):
        router = make_router({"prog": "|cat"}, {"bob": "|cat"})
        folders = [
            next(router.resolve(minimta.Address(name), ())).folder
            for name in ("prog", "bob")
        ]
        assert folders == ["/", "/home/bob"]

    def test_detail_has_a_forward_file_of_its_own(self):
        router = make_router(forwards={"bob": "carol", "bob+x": "root"})
        assert routed(router, "bob+x") == ["mailbox root"]
        assert routed(router, "bob+y") == ["mailbox carol"]

    def test_each_character_is_a_delimiter(self):
        router = make_router(text="recipient_delimiter = +-")
        assert routed(router, "bob-x") == routed(router, "bob+x") == ["mailbox bob"]
        assert routed(router, "owner-bob") == ["5.1.1 owner-bob"]

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("home_mailbox = Maildir/", "maildir 1 /home/bob/Maildir/"),
            ("home_mailbox = mbox", "mailbox bob"),
            ("mailbox_transport = lmtp:[127.0.0.1]:2003", "lmtp bob"),
            ("mailbox_transport = lmtp:x:y", "4.3.5 bob"),
        ],
    )
    def test_the_settings_say_where_mail_is_kept(self, text, wanted):
        assert routed(make_router(text=text), "bob") == [wanted]

    def test_where_lists_may_not_be_read_they_are_taken_for_good(self):
        router = make_router({"list": ":include:/none"})
        router.files = None
        assert routed(router, "list") == ["include /none"]
        assert router.verify(minimta.Address("list")) is None

    def test_a_list_of_100_000_is_never_there_as_a_whole(self):
        text = "".join(f"u{n}@y.z\n" for n in range(100_000))
        router = make_router({"list": ":include:/big"}, {"/big": text})
        found = router.resolve(minimta.Address("list"), ())
        assert next(found).key == "remote u0@y.z"
        assert sum(1 for _ in found) == 99_999

    @pytest.mark.parametrize(("depth", "wanted"), [(20, "mailbo"), (22, "5.4.6 ")])
    def test_aliases_are_nested_so_deep_and_no_deeper(self, depth, wanted):
        rows = {f"a{n}": f"a{n + 1}" for n in range(depth - 1)}
        rows[f"a{depth - 1}"] = "bob"
        assert [text[:6] for text in routed(make_router(rows), "a0")] == [wanted]

    def test_luser_relay_gets_what_nobody_gets(self):
        router = make_router(text="luser_relay = carol")
        assert routed(router, "noone") == ["mailbox carol"]

    def test_a_luser_relay_that_is_nobody_is_no_loop(self):
        router = make_router(text="luser_relay = noone2")
        assert routed(router, "noone") == ["5.1.1 noone2"]

    def test_without_a_delimiter_there_is_no_detail(self):
        router = make_router(text="recipient_delimiter =")
        assert routed(router, "bob+x") == ["5.1.1 bob+x"]

    def test_a_forward_file_that_is_not_trusted_is_warned_of(self):
        warned = []
        router = make_router(warn=warned.append, why="x is writable by others")
        assert routed(router, "bob") == ["mailbox bob"]
        assert warned == [
            "x is writable by others: ignored, mail for bob goes to the mailbox"
        ]

    @pytest.mark.parametrize(
        ("name", "status"),
        [
            ("bob", None),
            ("noone", "5.1.1"),
            # one good target is enough
            ("half", None),
            ("none", "5.1.1"),
            # what cannot be told now
            ("broken", "4.3.0"),
            # what waits in the queue is taken
            ("cmd", None),
            ("loop", "5.4.6"),
            ("empty", "4.3.5"),
            ("no", "5.7.1"),
            ("later", "4.0.0"),
            ("mixed", None),
        ],
    )
    def test_a_recipient_is_verified(self, name, status):
        rows = {"half": "noone, bob", "none": "noone, x1", "cmd": "|cat", "empty": ""}
        rows.update({"no": "error:5.7.1 no", "later": ":defer: x", "mixed": "no, bob"})
        router = make_router({**rows, "loop": "pool", "pool": "loop"})
        found = None
        try:
            router.verify(minimta.Address(name))
        except minimta.MailError as error:
            found = error.status
        assert found == status


TRANSPORT_MAP = """\
boss@map.example    error:5.7.1 not by mail
map.example         smtp:[a.example]:26
.map.example        smtp:b.example encrypt
lmtp.example        lmtp:unix:/run/lmtp
smtps.example       smtps:[a.example]
local.example       local:
usual.example       smtp:
colon.example       :
level.example       smtp: encrypt
upper.example       SMTP:[a.example]:25
named.example       smtp:[a.example]:submission
bare.example        [a.example]:26
word.example        a.example
uucp.example        uucp:a.example
port.example        smtp:[a.example]:0
odd.example         smtp:[a.example] perhaps
gone.example        discard:
later.example       retry:4.3.2 wait
no.example          error:gone away
empty.example
"""

HOP_ROWS = [
    ("x@map.example", ["remote x@map.example"], "[a.example]:26"),
    ("x@sub.map.example", ["remote x@sub.map.example"], "b.example:25 encrypt"),
    ("boss@map.example", ["5.7.1 boss@map.example"], "not by mail"),
    ("x@lmtp.example", ["remote x@lmtp.example"], "lmtp:/run/lmtp"),
    ("x@smtps.example", ["remote x@smtps.example"], "smtps:[a.example]:465"),
    ("x@usual.example", ["remote x@usual.example"], "[mx.example]:25 check"),
    ("x@colon.example", ["remote x@colon.example"], "[mx.example]:25 check"),
    ("x@level.example", ["remote x@level.example"], "[mx.example]:25 encrypt"),
    ("x@bare.example", ["remote x@bare.example"], "[a.example]:26"),
    ("x@else.example", ["remote x@else.example"], "[mx.example]:25 check"),
    ("bob@local.example", ["mailbox bob"], None),
    ("noone@local.example", ["5.1.1 noone@local.example"], None),
    ("x@gone.example", ["null /dev/null"], None),
    ("x@later.example", ["4.3.2 x@later.example"], "wait"),
    ("x@no.example", ["5.0.0 x@no.example"], "gone away"),
    # what cannot be meant is deferred, and named
    ("x@word.example", ["4.3.5 x@word.example"], "transport_maps"),
    ("x@uucp.example", ["4.3.5 x@uucp.example"], "transport_maps"),
    ("x@port.example", ["4.3.5 x@port.example"], "transport_maps"),
    ("x@odd.example", ["4.3.5 x@odd.example"], "transport_maps"),
    ("x@empty.example", ["4.3.5 x@empty.example"], "transport_maps"),
    # also of our own addresses and domains
    ("carol@host.example", ["remote carol"], "[a.example]:27"),
    ("carol", ["remote carol"], "[a.example]:27"),
    ("bob@host.example", ["5.1.2 bob"], "never"),
    ("bob@localhost", ["mailbox bob"], None),
    # a kind in capitals, a port by its name
    ("x@upper.example", ["remote x@upper.example"], "[a.example]:25"),
    ("x@named.example", ["remote x@named.example"], "[a.example]:587"),
]


class TestTransports:
    """Where mail for other hosts is handed over."""

    @pytest.fixture
    def path(self, tmp_path):
        """The map's file."""
        path = tmp_path / "transport"
        ours = (
            "carol@host.example smtp:[a.example]:27\nhost.example error:5.1.2 never\n"
        )
        path.write_text(TRANSPORT_MAP + ours)
        return path

    @pytest.mark.parametrize(("address", "wanted", "place"), HOP_ROWS)
    def test_a_line_says_where_to(self, path, address, wanted, place):
        router = make_router(text=f"transport_maps = {path}")
        assert routed(router, address) == wanted
        (found,) = router.resolve(minimta.Address.parse(address), frozenset())
        if place is not None:
            assert place in (found.error.text if found.error else found.place)

    def test_a_map_that_cannot_be_read_is_deferred_and_named(self, path):
        router = make_router(text=f"transport_maps = {path}")
        path.unlink()
        (found,) = router.resolve(minimta.Address.parse("x@y.example"), frozenset())
        assert found.error.status == "4.3.5"
        assert f"transport_maps: {path}" in found.error.text
        assert routed(router, "bob@host.example") == ["mailbox bob"]

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("", "mx:x.example:25 may"),
            ("smtp_tls_security_level = none", "mx:x.example:25 none"),
            ("smtp_tls_security_level = secure", "mx:x.example:25 verify"),
            (
                "relayhost = a, [b]:587, smtps://c, lmtp:[d]",
                "a:25 check, [b]:587 check, smtps:c:465 check, lmtp:[d]:24 check",
            ),
            ("relayhost = a\nsmtp_tls_security_level = may", "a:25 may"),
            # each host may have a level of its own
            ("relayhost = [a]:587 none", "[a]:587 none"),
            ("relayhost = [a]:submission encrypt", "[a]:587 encrypt"),
            (
                "relayhost = [a]:587 none, b, [c] encrypt d",
                "[a]:587 none, b:25 check, [c]:25 encrypt, d:25 check",
            ),
            (
                "relayhost = [a] none, b\nsmtp_tls_security_level = encrypt",
                "[a]:25 none, b:25 encrypt",
            ),
        ],
    )
    def test_without_a_line_it_is_relayhost_or_mx(self, text, wanted):
        router = make_router()
        router.settings = make_settings(text)
        hops = router.hops(minimta.Address.parse("a@X.example."), "")
        assert ", ".join(map(str, hops)) == wanted
        assert minimta.parse_route(wanted, "x") == hops

    @pytest.mark.parametrize(
        ("domain", "wanted"),
        [("[192.0.2.1]", "[192.0.2.1]:25 may"), ("[IPv6:::2]", "[::2]:25 may")],
    )
    def test_an_address_literal_is_its_own_host(self, domain, wanted):
        router = make_router()
        router.settings = make_settings("")
        (hop,) = router.hops(minimta.Address.parse(f"a@{domain}"), "")
        assert str(hop) == wanted

    def test_a_star_is_not_for_our_own_mail(self, path):
        path.write_text("* smtp:[a.example]:26\n")
        router = make_router(text=f"transport_maps = {path}")
        assert routed(router, "bob") == ["mailbox bob"]
        assert routed(router, "bob@host.example") == ["mailbox bob"]
        assert routed(router, "x@y.example") == ["remote x@y.example"]


# == 25 Delivery: Task, ActiveMessage, Delivery, RelayJob, PipeJob, Lanes =====


def planned(spool, *recipients, journal=(), text=MESSAGE, aliases=()):
    """(the message, its tasks) for recipients, after what the journal says."""
    queue_id = commit(spool, text, recipients=list(recipients))
    with spool.open(queue_id) as file:
        message = minimta.ActiveMessage(file, list(journal), 1e9)
        message.plan(make_router(aliases), 50)
    return message, message.tasks


class TestTask:
    """One destination of one message."""

    def test_trace_fields_stand_on_top_in_postfixs_order(self, spool):
        task = make_task(spool, commit(spool), 1e9)
        task.destination.forwarders = ("carol@host.example",)
        task.recipients[0] = "team@host.example"
        text = b"".join(task.render()).decode()
        os.close(task.message.file.fd)
        assert text == (
            f"From alice@far.example  {minimta.asctime(1e9)}\n"
            "Return-Path: <alice@far.example>\nX-Original-To: team@host.example\n"
            "Delivered-To: bob@host.example\nDelivered-To: carol@host.example\n"
            f"{MESSAGE.decode()}\n"
        )

    @pytest.mark.parametrize(
        ("sender", "wanted"), [("", "MAILER-DAEMON"), ('"a b"@c', '"a_b"@c')]
    )
    def test_from_line_has_one_word_for_the_sender(self, spool, sender, wanted):
        task = make_task(spool, commit(spool, sender=sender), 1e9)
        first = next(iter(task.render())).decode()
        os.close(task.message.file.fd)
        assert first == f"From {wanted}  {minimta.asctime(1e9)}\n"

    def test_what_is_thrown_away_is_done(self):
        task = minimta.Task(None, minimta.Destination("null", "/dev/null"))
        assert task.done == ("2.0.0", "discarded")


class TestActiveMessage:
    """A message and what is to be done for it."""

    def test_two_ways_to_one_mailbox_are_one_task(self, spool):
        _, tasks = planned(spool, "bob@host.example", "team", aliases={"team": "bob"})
        (task,) = tasks.values()
        assert task.recipients == ["bob@host.example", "team"]

    def test_what_the_journal_calls_final_is_not_tried_again(self, spool):
        journal = [make_attempt("sent", "bob", "mailbox bob@host.example")]
        _, tasks = planned(spool, "bob", "carol", journal=journal)
        assert list(tasks) == ["mailbox carol@host.example"]

    def test_what_was_deferred_is_tried_again(self, spool):
        journal = [make_attempt("deferred", "bob", "mailbox bob@host.example")]
        _, tasks = planned(spool, "bob", journal=journal)
        assert list(tasks) == ["mailbox bob@host.example"]

    def test_a_mailbox_reached_for_another_recipient_gets_no_second_copy(self, spool):
        journal = [make_attempt("sent", "bob", "mailbox bob@host.example")]
        aliases = {"team": "bob"}
        _, tasks = planned(spool, "bob", "team", journal=journal, aliases=aliases)
        (task,) = tasks.values()
        assert (task.recipients, task.done) == (
            ["team"],
            ("2.0.0", "delivered already"),
        )

    @pytest.mark.parametrize(("hops", "is_bounced"), [(50, False), (51, True)])
    def test_a_message_with_too_many_hops_is_bounced(self, spool, hops, is_bounced):
        text = b"Received: x\n" * hops + MESSAGE
        _, tasks = planned(spool, "bob", text=text)
        (task,) = tasks.values()
        assert minimta.is_bounced(task) == is_bounced

    def test_attempts_say_what_became_of_each_recipient(self, spool):
        message, tasks = planned(spool, "bob", "nobody", "broken")
        tasks["mailbox bob@host.example"].done = ("2.0.0", "delivered to mailbox")
        found = [(a.recipient, a.outcome, a.status) for a in message.attempts(1.5)]
        assert found == [
            *[("bob", "sent", "2.0.0"), ("nobody", "bounced", "5.1.1")],
            ("broken", "deferred", "4.3.0"),
        ]


# == 26 Outbox: Errand, Line, Outbox, RelayJob, Outgoing, Lanes ===============


class FakeResolver:
    """Names in memory: a domain's MX as (preference, name, address)."""

    def __init__(self, rows):
        self.rows = rows

    def mail_hosts(self, domain):
        return [
            minimta.MailHost(rank, name, [address] if address else [])
            for rank, name, address in self.rows
        ]

    def host(self, name):
        return [minimta.MailHost(-1, name, [name])]


def make_outbox(rows, text="", root=""):
    """An outbox of mail.x.example that has these mail hosts."""
    settings = make_settings(
        f"myhostname = mail.x.example\nmydestination = x.example\n{text}", root
    )
    spool = minimta.Spool("/nosuch", minimta.User("nobody", 2, 2, "", "/"))
    outbox = minimta.Outbox(None, settings, spool, None)
    outbox.resolver = FakeResolver(rows)
    return outbox


BEST, BACKUP = (10, "a.example", "192.0.2.1"), (30, "c.example", "192.0.2.3")
PRIVATE = "smtpd_port = 25\ninet_interfaces = 127.0.0.2"

WAY_ROWS = [
    ([BEST, BACKUP], "192.0.2.1 192.0.2.3"),
    # by name
    ([BEST, (20, "mail.x.example", "192.0.2.2"), BACKUP], "192.0.2.1"),
    ([BEST, (20, "MAIL.x.example.", "192.0.2.2"), BACKUP], "192.0.2.1"),
    ([BEST, (20, "x.example", "192.0.2.2"), BACKUP], "192.0.2.1"),
    ([(10, "mail.x.example", ""), BACKUP], None),
    # equals of ours are no better
    ([(10, "mail.x.example", "192.0.2.2"), BEST], None),
    ([(10, "mail.x.example", "192.0.2.2"), BACKUP], None),
    ([(10, "mail.x.example", "192.0.2.2"), (9, "b", "192.0.2.4")], "192.0.2.4"),
    # by address
    ([BEST, (20, "b.example", "127.0.0.1"), BACKUP], "192.0.2.1"),
    ([(5, "b.example", "127.0.0.1"), BEST, BACKUP], None),
    ([(5, "b.example", "::1"), BEST], None),
    ([(5, "b.example", "0.0.0.0"), BEST], None),
    ([(5, "b.example", "0.1.2.3"), BEST], None),
    ([(5, "b.example", "::"), BEST], None),
    ([(5, "b.example", "224.0.0.1"), BEST], None),
    ([(5, "b.example", "ff02::1"), BEST], None),
    ([(5, "b.example", "::ffff:127.0.0.1"), BEST], None),
    ([(5, "b.example", "255.255.255.255"), BEST], None),
    ([(0, "x.other.example", "127.9.9.9")], None),
    # a host without address spoils nothing
    ([(5, "b.example", ""), BEST], "192.0.2.1"),
]


class TestTargets:
    """The addresses that are tried for a hop."""

    @pytest.mark.parametrize(("rows", "wanted"), WAY_ROWS)
    def test_ourselves_and_what_is_no_better_is_cut(self, rows, wanted):
        outbox = make_outbox(sorted(rows))
        hop = minimta.NextHop.parse("mx:far.example:25", "x")
        if wanted is None:
            with pytest.raises(minimta.MailError, match="far.example loops") as caught:
                outbox.targets(hop)
            assert caught.value.status == "5.4.6"
        else:
            found = [target.address for target in outbox.targets(hop)]
            assert found == wanted.split()

    def test_what_is_our_own_address_is_asked_of_the_system(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                pytest.skip("this host has no other address")
            address = probe.getsockname()[0]
        assert minimta.is_own_address(address)
        assert not minimta.is_own_address("192.0.2.1")

    @pytest.mark.parametrize(
        ("text", "port", "address", "is_cut"),
        [
            (PRIVATE, 25, "127.0.0.2", True),
            (PRIVATE, 25, "127.0.0.3", False),
            (PRIVATE, 26, "127.0.0.2", False),
            ("smtpd_port = 2525", 25, "127.0.0.1", False),
            ("smtpd_port = 25", 25, "127.0.0.1", True),
        ],
    )
    def test_private_instances_share_a_host(
        self, tmp_path, text, port, address, is_cut
    ):
        outbox = make_outbox([(5, "b.example", address)], text, str(tmp_path))
        hop = minimta.NextHop.parse(f"mx:far.example:{port}", "x")
        wanted = (
            pytest.raises(minimta.MailError) if is_cut else contextlib.nullcontext()
        )
        with wanted:
            assert [one.address for one in outbox.targets(hop)] == [address]

    def test_a_host_in_brackets_is_what_was_asked_for(self):
        hop = minimta.NextHop.parse("[127.0.0.1]:2525", "relayhost")
        (target,) = make_outbox([]).targets(hop)
        assert str(target) == "127.0.0.1[127.0.0.1]:2525"

    def test_without_any_address_there_is_no_target(self):
        outbox = make_outbox([(5, "b.example", ""), (6, "c.example", "")])
        with pytest.raises(minimta.MailError, match="far.example") as caught:
            outbox.targets(minimta.NextHop.parse("mx:far.example:25", "x"))
        assert caught.value.status == "5.4.4"


@pytest.fixture
def outgoing():
    """Tasks for other hosts, 600 at most, that no process takes."""
    made = minimta.Outgoing(make_settings(), ME, None, {})
    made.EVERYBODY = 600
    return made


def tasks_for(place, count=300):
    """Tasks for one destination, each of a message of its own."""
    messages = [types.SimpleNamespace(queue_id=str(number)) for number in range(count)]
    where = types.SimpleNamespace(place=place)
    return [
        types.SimpleNamespace(destination=where, message=message, error=None)
        for message in messages
    ]


class TestOutgoing:
    """Who has a place in the line of a destination."""

    def placed(self, outgoing, place):
        return sum(map(outgoing.add, tasks_for(place)))

    def test_a_host_that_has_never_answered_has_20_places(self, outgoing):
        assert self.placed(outgoing, "silent") == 20

    def test_a_host_that_has_answered_has_256(self, outgoing):
        outgoing.look_back("known", tasks_for("known")[0])
        assert self.placed(outgoing, "known") == 256

    def test_a_host_that_answers_no_more_has_20_again(self, outgoing):
        (task,) = tasks_for("known", 1)
        outgoing.look_back("known", task)
        task.error = minimta.MailError("4.4.1", "no answer", "none")
        outgoing.look_back("known", task)
        assert self.placed(outgoing, "known") == 20

    def test_when_all_places_are_taken_each_host_has_2(self, outgoing):
        for number in range(30):
            assert self.placed(outgoing, f"silent {number}") == 20
        assert [self.placed(outgoing, name) for name in ("one", "other")] == [2, 2]

    def test_of_very_many_dead_hosts_the_oldest_are_forgotten(self, outgoing):
        error = minimta.MailError("4.4.1", "no answer", "none")
        job = types.SimpleNamespace(
            served=set(), missed=[], dead=[(f"h{n}", error) for n in range(2000)]
        )
        outgoing.heard(job, [], False)
        assert len(outgoing.dead) == len(outgoing.put_off) == 2000
        outgoing.revive()  # none counts as dead now
        assert outgoing.add(tasks_for("h0", 1)[0])
        assert outgoing.fresh
        job.dead = [("late", error)]
        outgoing.heard(job, [], False)
        assert list(outgoing.dead) == list(outgoing.put_off) == ["late"]


# == 27 Queue runner: QueueRunner, take_lock ==================================


class QuietHouse:
    """A private instance without a daemon, in this process."""

    def __init__(self, place, settings=""):
        self.place = place
        rows = []
        for name in ("root", "bob", "carol"):
            uid = {"bob": 5001, "carol": 5002}.get(name, 0) if AS_ROOT else os.getuid()
            gid = uid if AS_ROOT else os.getgid()
            rows.append(f"{name}:x:{uid}:{gid}::{place}/home/{name}:/bin/sh\n")
            (place / "home" / name).mkdir(parents=True)
            os.chown(place / "home" / name, uid, gid)
        (place / "etc").mkdir()
        (place / "etc/passwd").write_text("".join(rows))
        text = f"myhostname = host.example\nrelayhost = [127.0.0.1]:9\n{settings}\n"
        (place / "etc/minimta.conf").write_text(text)
        environ = {"MINIMTA_ROOT": str(place), "LOGNAME": "bob"}
        self.house = minimta.House(environ)
        self.spool = self.house.spool()
        self.spool.make()

    def runner(self):
        """A runner that has just been started."""
        house = self.house
        return minimta.QueueRunner(house.settings, self.spool, house.log, house.users)

    def run(self):
        """Try everything once."""
        self.runner().run_once()

    def commit(self, *recipients, sender="bob@host.example", age=0, **how):
        """Put a message into the queue; its id."""
        words = {"sender": sender, "arrived": time.time() - age, **how}
        return commit(self.spool, recipients=list(recipients), **words)

    def box(self, name):
        """The messages in a user's mailbox."""
        path = self.place / "var/mail" / name
        return read_mbox(path.read_bytes()) if path.exists() else []


@pytest.fixture
def quiet(place):
    """A private instance without a daemon."""
    return QuietHouse(place)


UNREACHABLE = "x@far.example"
NOWHERE = "nobody@host.example"


class TestQueueRunner:
    """What becomes of messages in the queue."""

    def test_what_is_delivered_leaves_the_queue(self, quiet):
        quiet.commit("bob@host.example")
        quiet.run()
        assert len(quiet.box("bob")) == 1
        assert left_in(quiet.spool) == []

    def test_what_is_deferred_is_in_the_journal(self, quiet):
        queue_id = quiet.commit(UNREACHABLE)
        quiet.run()
        (attempt,) = quiet.spool.journal(queue_id)
        assert (attempt.outcome, attempt.status) == ("deferred", "4.4.1")

    def test_what_is_deferred_is_due_after_the_shortest_wait(self, quiet):
        before = time.time()
        queue_id = quiet.commit(UNREACHABLE)
        quiet.run()
        due = quiet.spool.due(queue_id)
        assert before + 269 < due < time.time() + 331

    def test_a_recipient_that_was_sent_is_not_sent_again(self, quiet):
        quiet.commit("bob@host.example", UNREACHABLE)
        quiet.run()
        quiet.run()
        assert len(quiet.box("bob")) == 1

    def test_a_message_whose_delivery_was_not_noted_is_not_doubled(self, quiet):
        queue_id = quiet.commit("bob@host.example")
        path = Path(quiet.spool.path("queue", queue_id))
        received = own_received(queue_id)
        path.write_bytes(path.read_bytes().replace(MESSAGE, received + MESSAGE))
        there = path.read_bytes()
        quiet.run()
        path.write_bytes(there)
        quiet.run()
        assert len(quiet.box("bob")) == 1

    def test_what_expired_is_reported_to_its_sender(self, quiet):
        queue_id = quiet.commit(UNREACHABLE, age=6 * 86400)
        quiet.run()
        quiet.run()
        (report,) = quiet.box("bob")
        assert f"<{UNREACHABLE}>: connect to 127.0.0.1[127.0.0.1]:9:" in report
        assert "Subject: hello" in report
        assert re.search(rf"Message-ID: <{queue_id}B\d+\.report@host", report)
        assert left_in(quiet.spool) == []

    def test_what_has_not_expired_is_kept(self, quiet):
        queue_id = quiet.commit(UNREACHABLE, age=4 * 86400)
        quiet.run()
        assert quiet.spool.ids() == [queue_id]

    def test_the_same_news_has_the_same_report_and_other_news_another(self, quiet):
        words = ("failed", "5.1.1", "local", "unknown", "")
        one, two = (minimta.Event(name, name, *words) for name in ("a@x", "b@x"))

        def named(*events, to="bob@host.example"):
            report = minimta.Report(minimta.FAILED, to, list(events), {"host": "h"})
            return quiet.runner().reporter.identify("0123456789", report)

        assert named(one, two) == named(two, one)
        assert len({named(one), named(two), named(one, two), named(one, to="c@x")}) == 4
        assert minimta.is_id(named(one)[0])
        assert minimta.parent_id(named(one)[0]) == "0123456789"

    def test_without_a_flush_only_what_is_due_is_tried(self, quiet):
        queue_id = quiet.commit(UNREACHABLE)
        quiet.run()
        before = len(quiet.spool.journal(queue_id))
        quiet.runner().run_once(False)
        assert len(quiet.spool.journal(queue_id)) == before
        quiet.runner().run_once(True)
        assert len(quiet.spool.journal(queue_id)) == before + 1

    def test_a_note_that_failed_is_made_with_the_next(self, quiet):
        queue_id = quiet.commit("bob", "carol")
        with quiet.spool.open(queue_id) as file:
            message = minimta.ActiveMessage(file, [], 1e9)
            message.plan(make_router(), 50)
            first, second = message.tasks.values()
            first.done = ("2.0.0", "delivered to mailbox")
            lost = message.take_new()
            message.forget_notes()
            second.done = first.done
            lines = message.take_new()
        assert {(a.recipient, a.outcome) for a in lost} < {
            (a.recipient, a.outcome) for a in lines
        }

    def test_a_report_that_is_there_is_not_written_twice(self, quiet):
        queue_id = quiet.commit(NOWHERE)
        to = "bob@host.example"
        text = b"Subject: the first report\n\ntext\n"
        how = {"sender": "", "recipients": [to], "kind": "report"}
        runner = quiet.runner()
        words = ("failed", "5.1.1", "local", "unknown", "")
        news = [minimta.Event(NOWHERE, NOWHERE, *words)]
        report = minimta.Report(minimta.FAILED, to, news, {"host": "host.example"})
        report_id, origin = runner.reporter.identify(queue_id, report)
        how.update(origin=origin, arrived=time.time())
        commit(quiet.spool, text, report_id, **how)
        quiet.run()
        quiet.run()
        (report,) = quiet.box("bob")
        assert "the first report" in report

    def test_what_was_reported_is_not_reported_again(self, quiet):
        quiet.commit(NOWHERE, UNREACHABLE)
        for _ in range(3):
            quiet.run()
        assert len(quiet.box("bob")) == 1

    def test_a_second_failure_has_a_report_of_its_own(self, quiet):
        queue_id = quiet.commit(NOWHERE, UNREACHABLE)
        quiet.run()
        path = Path(quiet.spool.path("queue", queue_id))
        path.write_bytes(re.sub(rb"arrived: .*", b"arrived: 1.0", path.read_bytes()))
        quiet.run()
        quiet.run()
        assert [NOWHERE in text.partition("---")[0] for text in quiet.box("bob")] == [
            *(True, False),
        ]

    def test_a_report_that_fails_is_told_to_postmaster(self, quiet):
        quiet.commit(NOWHERE, sender="")
        quiet.run()
        quiet.run()
        (notice,) = quiet.box("root")
        assert f"<{NOWHERE}>" in notice
        assert left_in(quiet.spool) == []

    def test_a_notice_that_fails_is_kept_and_ends_there(self, quiet):
        queue_id = quiet.commit(NOWHERE, sender="", kind="notice")
        quiet.run()
        quiet.run()
        assert left_in(quiet.spool) == [f"corrupt/{queue_id}"]

    def test_a_busy_mailbox_is_no_deferral(self, quiet):
        quiet.commit("bob@host.example")
        quiet.run()
        queue_id = quiet.commit("bob@host.example")
        runner = quiet.runner()
        runner.scan()
        with locked(quiet.place / "var/mail/bob"):
            runner.run_due(time.time() + 1)
        assert (len(quiet.box("bob")), quiet.spool.ids()) == (1, [queue_id])
        assert [a for a in quiet.spool.journal(queue_id) if not a.is_final] == []

    def test_a_busy_mailbox_has_no_other_recipient_tried_again_and_again(self, quiet):
        (quiet.place / "etc/aliases").write_text("late: error:450 4.2.0 not now\n")
        quiet.commit("bob@host.example")
        quiet.run()
        queue_id = quiet.commit("bob@host.example", "late@host.example")
        runner = quiet.runner()
        runner.scan()
        with locked(quiet.place / "var/mail/bob"):
            for _ in range(5):
                runner.run_due(time.time() + 60)
        found = [a.recipient for a in quiet.spool.journal(queue_id)]
        assert found.count("late@host.example") == 1

    def test_a_report_whose_note_fails_keeps_no_run_waiting(self, quiet):
        queue_id = quiet.commit(NOWHERE, UNREACHABLE)
        # The journal cannot be written: a link to nowhere is in its place.
        os.symlink("/nonexistent/x", quiet.spool.path("journal", queue_id))
        runner = quiet.runner()
        runner.run_once()
        assert [name for name in quiet.spool.ids() if name != queue_id] != []
        assert quiet.box("bob") == []
        os.unlink(quiet.spool.path("journal", queue_id))
        quiet.run()
        quiet.run()
        assert len(quiet.box("bob")) == 1

    def test_a_mailbox_that_is_free_again_gets_its_mail(self, quiet):
        quiet.commit("bob@host.example")
        quiet.run()
        quiet.commit("bob@host.example")
        runner = quiet.runner()
        runner.scan()
        with locked(quiet.place / "var/mail/bob"):
            runner.run_due(time.time() + 1)
        runner.run_due(time.time() + 60)
        assert (len(quiet.box("bob")), quiet.spool.ids()) == (2, [])

    def test_a_mailbox_that_stays_busy_is_a_deferral(self, quiet):
        quiet.commit("bob@host.example")
        quiet.run()
        queue_id = quiet.commit("bob@host.example")
        runner = quiet.runner()
        runner.scan()
        with locked(quiet.place / "var/mail/bob"):
            for _ in range(minimta.BUSY_TRIES + 1):
                runner.run_due(time.time() + 60)
        assert [a.status for a in quiet.spool.journal(queue_id)] == ["4.2.0"]

    @pytest.mark.parametrize("text", BAD_ENVELOPES)
    def test_a_file_that_is_no_message_is_set_aside_and_stops_nobody(self, quiet, text):
        Path(quiet.spool.path("queue", "0000000001")).write_bytes(text)
        quiet.commit("bob@host.example")
        quiet.run()
        assert left_in(quiet.spool) == ["corrupt/0000000001"]
        assert len(quiet.box("bob")) == 1

    def test_what_users_dropped_is_delivered_as_theirs(self, quiet):
        envelope = minimta.Envelope("carol@host.example", ["bob"], origin="uid 0")
        drop = f"{quiet.spool.directory}/maildrop"
        make_drop(bytes(envelope) + MESSAGE, drop)
        quiet.run()
        (text,) = quiet.box("bob")
        assert "Return-Path: <carol@host.example>" in text
        assert f"(minimta, from userid {os.getuid()})" in text

    @pytest.mark.parametrize(
        "kind",
        [
            *("symlink", "fifo", "hard link", "directory", b"", b"garbage\n\n"),
            # addresses that are none
            b"arrived: 1\nsender: a b\nrecipient: bob\n\n",
            b"arrived: 1\nsender: a\nrecipient: b b\n\n",
            # names that nobody knows
            b"arrived: 1\nsender: a\nself: x\nrecipient: bob\n\n",
            b"arrived: 1\nsender: a\nrecipients: x\nrecipient: bob\n\n",
        ],
    )
    def test_a_hostile_drop_stops_no_other(self, quiet, kind):
        folder = Path(quiet.spool.path("maildrop"))
        make_drop(kind, folder)
        honest = minimta.Envelope("carol@host.example", ["bob"])
        (folder / "1111111111").write_bytes(bytes(honest) + b"Subject: honest\n\n")
        quiet.run()
        assert [text for text in quiet.box("bob") if "Subject: honest" in text] != []
        assert not os.path.lexists(folder / "0123456789")

    def test_only_one_runner_has_the_lock(self, quiet):
        lock = minimta.take_lock(quiet.spool, 0)
        assert minimta.take_lock(quiet.spool, 0) is None
        os.close(lock)

    def test_a_lock_that_was_given_back_can_be_taken(self, quiet):
        os.close(minimta.take_lock(quiet.spool, 0))
        lock = minimta.take_lock(quiet.spool, 0)
        os.close(lock)
        assert lock > 2


# == 28 SMTP server: Arrival, Conversation, Crew, SmtpServer ==================


class FakeStream:
    """A connection whose client has said everything, in these pieces."""

    def __init__(self, pieces):
        self.pieces = list(pieces)
        self.sent = []

    def recv(self, size):
        return self.pieces.pop(0) if self.pieces else b""

    def sendall(self, data):
        self.sent.append(data)


@pytest.fixture
def desk(spool, tmp_path):
    """A conversation's house; `.announced` has what the runner was told."""
    announced = []
    settings = make_settings("message_size_limit = 2000\nqueue_minfree = 0")
    log = make_log(tmp_path / "log")
    made = minimta.Desk(settings, spool, log, make_router(), announced.append)
    made.announced = announced
    return made


def converse(desk, pieces, client=NEAR):
    """(what the server sent, the texts of the messages it took)."""
    stream = FakeStream(pieces)
    minimta.Conversation(desk, client).run(stream)
    texts = [content(desk.spool, queue_id) for queue_id in desk.spool.ids()]
    return stream.sent, texts


def codes(sent):
    """The codes of all replies, greeting first."""
    lines = b"".join(sent).decode().splitlines()
    return [int(line[:3]) for line in lines if line[3:4] == " "]


ENVELOPE = b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<bob>\r\nDATA\r\n"
WHOLE = ENVELOPE + b"Subject: hello\r\n\r\n..dot\r\n.\r\nQUIT\r\n"
LINES = WHOLE.splitlines(True)


def single(data):
    """Each byte for itself."""
    return [data[n : n + 1] for n in range(len(data))]


class TestConversation:
    """A session on a stream."""

    @pytest.mark.parametrize(
        "pieces",
        [[WHOLE], LINES, single(WHOLE), [WHOLE[:70], WHOLE[70:]]],
        ids=["in one", "by line", "by byte", "cut"],
    )
    def test_a_message_is_taken_however_it_comes(self, desk, pieces):
        sent, (text,) = converse(desk, pieces)
        assert codes(sent) == [220, 250, 250, 250, 354, 250, 221]
        assert text.endswith(b"\nSubject: hello\n\n.dot\n")
        assert b"\n\nSubject" not in text

    def test_a_message_is_taken_wherever_it_is_cut(self, desk):
        wrong = []
        for place in range(len(ENVELOPE), len(WHOLE)):
            _, texts = converse(desk, [WHOLE[:place], WHOLE[place:]])
            header = minimta.Header.parse(texts[-1])
            if (header.values("subject"), header.rest) != (["hello"], b".dot\n"):
                wrong.append(WHOLE[len(ENVELOPE) : place])
        assert wrong == []

    def test_a_message_that_was_taken_is_announced(self, desk):
        converse(desk, [WHOLE])
        assert desk.announced == desk.spool.ids()

    def test_a_message_without_header_is_a_body(self, desk):
        _, (text,) = converse(desk, [ENVELOPE + b"just text\r\n.\r\n"])
        assert minimta.Header.parse(text).rest == b"just text\n"

    def test_pipelined_commands_have_one_answer_each_in_one_piece(self, desk):
        sent, _ = converse(desk, [b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<x y>\r\n"])
        assert [len(codes([piece])) for piece in sent[:2]] == [1, 3]

    @pytest.mark.parametrize("size", [1025, 5000, 100_000])
    @pytest.mark.parametrize("pieces", [lambda data: [data], single])
    def test_a_long_line_is_one_error(self, desk, size, pieces):
        line = b"NOOP " + b"x" * size + b"\r\nNOOP\r\n"
        assert codes(converse(desk, pieces(line))[0])[:3] == [220, 500, 250]

    def test_what_a_long_line_ends_in_is_no_command(self, desk):
        sent, _ = converse(desk, [b"x" * 2000, b"QUIT\r\nNOOP\r\n"])
        assert codes(sent)[:3] == [220, 500, 250]

    def test_a_line_without_cr_is_refused(self, desk):
        assert codes(converse(desk, [b"NOOP\nNOOP\r\n"])[0])[:3] == [220, 500, 250]

    @pytest.mark.parametrize("end", WIRE_FALSE_ENDS)
    def test_nothing_smuggled_behind_a_false_end_is_done(self, desk, end):
        smuggled = end + b"\r\nMAIL FROM:<x@y>\r\nRCPT TO:<bob>\r\nDATA\r\nx\r\n.\r\n"
        sent, texts = converse(desk, [ENVELOPE + smuggled + b"NOOP\r\n"])
        assert codes(sent)[:7] == [220, 250, 250, 250, 354, 550, 250]
        assert (texts, left_in(desk.spool)) == ([], [])

    def test_a_message_that_is_too_long_is_refused_at_its_end(self, desk):
        text = b"x" * 70 + b"\r\n"
        sent, texts = converse(desk, [ENVELOPE, *[text] * 100, b".\r\nNOOP\r\n"])
        assert codes(sent)[:7] == [220, 250, 250, 250, 354, 552, 250]
        assert (texts, left_in(desk.spool)) == ([], [])

    @pytest.mark.parametrize("size", range(len(ENVELOPE), len(WHOLE) - 7, 5))
    def test_a_client_that_goes_away_leaves_nothing(self, desk, size):
        _, texts = converse(desk, [WHOLE[:size]])
        assert (texts, left_in(desk.spool), desk.announced) == ([], [], [])

    def test_nothing_is_done_behind_quit(self, desk):
        sent, _ = converse(desk, [b"QUIT\r\nNOOP\r\n"])
        assert codes(sent) == [220, 221]

    def test_a_local_program_sees_the_queue(self, desk):
        commit(desk.spool)
        sent, _ = converse(desk, [b"XQUEUE\r\nQUIT\r\n"], LOCAL)
        entries = b"".join(sent).split(b"Queue follows\r\n")[1]
        assert entries.startswith(b"id: " + desk.spool.ids()[0].encode() + b"\n")
        assert b"\n\n.\n\n221 " in entries

    def test_a_local_program_flushes_the_queue(self, desk):
        converse(desk, [b"XFLUSH\r\n"], LOCAL)
        assert desk.announced == ["flush"]

    def test_a_refusal_is_logged(self, desk, tmp_path):
        converse(desk, [b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<x@y>\r\nQUIT\r\n"], FAR)
        (line,) = logged(tmp_path / "log")
        assert line.startswith("minimta/smtpd NOQUEUE: reject: RCPT from unknown[")

    @pytest.mark.parametrize("size", [200_000, 262_144, 300_000, 900_000])
    @pytest.mark.parametrize("by_chunk", [False, True])
    def test_no_line_is_added_to_a_long_message(self, desk, size, by_chunk):
        desk.settings = make_settings("message_size_limit = 9M\nqueue_minfree = 0")
        text = b"Subject: x\r\n\r\n" + b"y" * (size - 18) + b"\r\n"
        data = ENVELOPE + text + b".\r\n"
        if by_chunk:
            data = ENVELOPE[:-6] + b"BDAT %d LAST\r\n" % len(text) + text
        _, (found,) = converse(desk, [data])
        assert found.endswith(b"y\n")
        assert not found.endswith(b"\n\n")

    def test_a_line_too_long_ends_auth(self, desk):
        desk.settings = make_settings(SECURE)
        talk = minimta.Conversation(desk, FAR)
        talk.session.secured("TLSv1.3")
        talk.take(b"EHLO c\r\nAUTH PLAIN\r\n" + b"x" * 13000 + b"\r\nNOOP\r\n")
        assert codes([bytes(talk.output)]) == [250, 334, 500, 250]


class TestCrew:
    """A few threads for what may take long."""

    def test_no_more_than_so_many_work_at_once(self):
        gate, at_work = threading.Event(), queue.SimpleQueue()

        def work(item):
            at_work.put(item)
            gate.wait(PATIENCE)

        crew = minimta.Crew(2, work)
        for item in range(5):
            crew.submit(item)
        assert {at_work.get(timeout=PATIENCE) for _ in range(2)} == {0, 1}
        assert (crew.threads, at_work.empty()) == (2, True)
        gate.set()
        assert {at_work.get(timeout=PATIENCE) for _ in range(3)} == {2, 3, 4}

    def test_a_thread_does_one_thing_after_the_other(self):
        done = queue.SimpleQueue()
        crew = minimta.Crew(8, done.put)
        for item in range(5):
            crew.submit(item)
            assert done.get(timeout=PATIENCE) == item
            wait_for(lambda: crew.busy == 0)
        assert crew.threads == 1

    def test_without_threads_the_work_is_done_nevertheless(self, monkeypatch):
        def start(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        done = []
        minimta.Crew(2, done.append).submit("item")
        assert done == ["item"]


NETWORK_ROWS = [
    ("127.0.0.1", ["127.0.0.0/8"], True),
    ("128.0.0.1", ["127.0.0.0/8"], False),
    ("192.0.2.1", ["192.0.2.1"], True),
    ("192.0.2.2", ["192.0.2.1"], False),
    # bits behind the mask do not count
    ("192.0.2.9", ["192.0.2.1/24"], True),
    # the second of two; none
    ("10.1.2.3", ["127.0.0.0/8", "10.0.0.0/8"], True),
    ("10.1.2.3", [], False),
    # IPv6, with and without brackets, with a zone
    ("::1", ["[::1]/128"], True),
    ("::1", ["::1"], True),
    ("2001:db8::5", ["[2001:db8::]/32"], True),
    ("2001:db9::5", ["[2001:db8::]/32"], False),
    ("fe80::1%lo", ["[fe80::]/10"], True),
    # IPv4 in IPv6 is IPv4; nothing else crosses
    ("::ffff:127.0.0.1", ["127.0.0.0/8"], True),
    ("127.0.0.1", ["::/0"], False),
    ("::1", ["0.0.0.0/0"], False),
]


class TestNetworks:
    """mynetworks."""

    @pytest.mark.parametrize(("address", "networks", "wanted"), NETWORK_ROWS)
    def test_a_client_is_in_a_network(self, address, networks, wanted):
        assert (address in minimta.Networks(tuple(networks))) == wanted

    @pytest.mark.parametrize("text", ["nonsense", "127.0.0.0/99"])
    def test_what_is_no_network_is_refused(self, text):
        with pytest.raises(minimta.ProgramError, match="mynetworks") as caught:
            minimta.Networks(("127.0.0.0/8", text))
        assert caught.value.code == 78


# == 29 Submission: House, SubmitSocket, Letter, Submission ===================


def make_letter(*recipients, body=b"text\n"):
    """A letter of bob's."""
    addresses = list(map(minimta.Address.parse, recipients))
    header = minimta.Header.parse(b"Subject: hello\n")
    return minimta.Letter(
        minimta.Address("bob", "host.example"), addresses, header, [body]
    )


@contextlib.contextmanager
def daemon_of(quiet):
    """A thread that answers one call at the submit socket."""
    path = f"{quiet.spool.directory}/submit"
    users = FakeUsers(["bob"])
    settings = quiet.house.settings
    router = minimta.Router(settings, FakeAliases({}), users)
    desk = minimta.Desk(
        settings, quiet.spool, quiet.house.log, router, lambda word: None
    )

    def answer():
        connection, _ = listener.accept()
        calls.append(connection)
        connection.settimeout(PATIENCE)
        minimta.Conversation(desk, LOCAL).run(connection)

    calls = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            for connection in calls:  # a caller that was refused may not hang up
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in calls:
                connection.close()
    os.unlink(path)


class TestLetter:
    """A message to submit."""

    @pytest.mark.parametrize(
        ("body", "wanted"),
        [
            ([b"a\n"], b"a\n"),
            ([b"a", b"b"], b"ab\n"),
            ([b"a\n", b""], b"a\n"),
            ([], b""),
        ],
    )
    def test_ends_in_a_line_end(self, body, wanted):
        header = minimta.Header.parse(b"A: 1\n")
        letter = minimta.Letter(minimta.Address("a"), [], header, body)
        assert b"".join(letter.chunks()) == b"A: 1\n\n" + wanted

    @pytest.mark.parametrize(
        ("name", "wanted"), [("a@b", ""), ("ü@b", " SMTPUTF8"), ("a@ü", " SMTPUTF8")]
    )
    def test_asks_for_smtputf8_if_it_must(self, name, wanted):
        assert make_letter(name).options() == f" BODY=8BITMIME{wanted}"


class TestSubmission:
    """How mail gets from a command into the queue."""

    def test_without_a_daemon_it_is_written_by_hand(self, quiet):
        submission = minimta.Submission(quiet.house, "q")
        queue_id = submission.submit(make_letter("bob@host.example"))
        text = content(quiet.spool, queue_id)
        assert text.startswith(
            f"Received: by host.example (minimta, from userid {os.getuid()})".encode()
        )
        assert text.endswith(b"\nSubject: hello\n\ntext\n")

    def test_with_a_daemon_it_goes_through_its_socket(self, quiet):
        with daemon_of(quiet):
            submission = minimta.Submission(quiet.house, "q")
            queue_id = submission.submit(make_letter("bob@host.example"))
        text = content(quiet.spool, queue_id)
        assert text.startswith(b"Received: by host.example (minimta, from userid 1000)")
        assert text.endswith(b"\nSubject: hello\n\ntext\n")

    @pytest.mark.skipif(AS_ROOT, reason="root writes the queue itself")
    def test_without_either_it_waits_in_the_maildrop(self, quiet):
        submission = minimta.Submission(quiet.house, "q")
        name = submission.by_maildrop(make_letter("bob@host.example"))
        assert left_in(quiet.spool) == [f"maildrop/{name}"]

    @pytest.mark.parametrize("has_daemon", [True, False])
    def test_when_nobody_can_get_it_nothing_is_queued(self, quiet, has_daemon):
        way = daemon_of(quiet) if has_daemon else contextlib.nullcontext()
        submission = minimta.Submission(quiet.house, "q")
        with way, pytest.raises(minimta.MailError) as caught:
            submission.submit(make_letter(NOWHERE))
        assert (caught.value.status, caught.value.exit_code) == ("5.1.1", 67)
        assert left_in(quiet.spool) == []

    @pytest.mark.parametrize("has_daemon", [True, False])
    def test_when_somebody_can_the_others_are_told(self, quiet, has_daemon):
        way = daemon_of(quiet) if has_daemon else contextlib.nullcontext()
        submission = minimta.Submission(quiet.house, "q")
        with way:
            queue_id = submission.submit(make_letter("bob@host.example", NOWHERE))
        assert list(submission.refused) == [NOWHERE]
        with quiet.spool.open(queue_id) as file:
            assert sorted(file.envelope.recipients) == ["bob@host.example", NOWHERE]

    def test_what_is_too_long_is_not_queued(self, place):
        quiet = QuietHouse(place, "message_size_limit = 1000")
        submission = minimta.Submission(quiet.house, "q")
        with pytest.raises(minimta.MailError) as caught:
            submission.submit(make_letter("bob@host.example", body=b"x" * 1000))
        assert (caught.value.status, left_in(quiet.spool)) == ("5.3.4", [])

    def test_300_recipients_go_through_the_socket(self, quiet):
        names = [f"u{n}@far.example" for n in range(300)]
        with daemon_of(quiet):
            submission = minimta.Submission(quiet.house, "q")
            queue_id = submission.submit(make_letter(*names))
        with quiet.spool.open(queue_id) as file:
            assert file.envelope.recipients == names

    def test_mailq_reads_the_queue_through_the_socket(self, quiet):
        ids = [quiet.commit(UNREACHABLE), quiet.commit("bob@host.example")]
        with daemon_of(quiet):
            daemon = minimta.SubmitSocket(quiet.spool.directory)
            assert daemon.connect()
            found = [entry.queue_id for entry in daemon.entries()]
            daemon.close()
        assert found == sorted(ids)

    def test_without_a_socket_there_is_no_daemon(self, quiet):
        assert not minimta.SubmitSocket(quiet.spool.directory).connect()


# == 30 Daemon: Daemon, SignalPipe ============================================


class TestChild:
    """A process of the daemon, and when it is started again."""

    def test_one_that_keeps_dying_rests_longer_and_longer(self):
        child = minimta.Child("smtpd", None)
        rests = []
        for _ in range(8):
            child.died(0.0, False)
            rests.append(child.due)
        assert rests == [1, 3, 7, 15, 31, 60, 60, 60]

    def test_one_that_lived_is_started_at_once(self):
        child = minimta.Child("smtpd", None)
        child.died(0.0, False)
        child.died(100.0, False)
        assert (child.due, child.pid) == (100.0, 0)

    def test_one_that_was_asked_to_go_is_replaced_at_once(self):
        child = minimta.Child("smtpd", None)
        child.died(1.0, True)
        assert child.due == 1.0


# == 33 Mail reader: MailReader, MAIL_COMMANDS ================================


class FakeTerminal:
    """A terminal where these lines are typed; `shown` is what it shows."""

    is_interactive = False

    def __init__(self, *lines):
        self.lines = list(lines)
        self.shown = ""
        self.complaints = []

    rows = 24

    def say(self, text):
        self.shown += text

    def page(self, text, pager, limit):
        self.say(text)

    def complain(self, text):
        self.complaints.append(text)

    def read_line(self, prompt):
        return self.lines.pop(0).encode() if self.lines else None

    def read_command(self, prompt, names):
        return self.read_line(prompt)

    def read_all(self):
        return "".join(f"{self.lines.pop(0)}\n" for _ in self.lines[:]).encode()

    def ask(self, prompt, usual=""):
        return usual


@pytest.fixture
def session(folder, quiet):
    """Makes a MailReader of five messages, the first two read."""

    def make(*lines, texts=None):
        status = ["RO", "RO", "O", "", ""]
        texts = texts or [mail(f"s{n}", status=s) for n, s in enumerate(status, 1)]
        terminal = FakeTerminal(*lines)
        variables = minimta.Variables({})
        rows = minimta.MAIL_COMMANDS
        begun = minimta.MailSession(quiet.house, terminal, variables, rows)
        return minimta.MailReader(begun, folder(*texts), rows)

    return make


LIST_ROWS = [
    # an empty list is the current message: the first new one
    ("", [4]),
    (".", [4]),
    ("2", [2]),
    ("1 3", [1, 3]),
    ("1,3", [1, 3]),
    ("3 1 3", [3, 1]),
    ("2-4", [2, 3, 4]),
    ("4-$", [4, 5]),
    ("^-2", [1, 2]),
    ("*", [1, 2, 3, 4, 5]),
    ("$", [5]),
    ("^", [1]),
    ("+", [5]),
    ("-", [3]),
    ("4-2", [2, 3, 4]),
    (":n", [4, 5]),
    (":u", [3, 4, 5]),
    (":o", [1, 2, 3]),
    (":r", [1, 2]),
    (":rn", [1, 2, 4, 5]),
    ("1-4 :u", [3, 4]),
    ("/S3", [3]),
    ("/subject:s3", [3]),
    ("/body:text", [1, 2, 3, 4, 5]),
    ("EVE", [1, 2, 3, 4, 5]),
    ("2 3 eve", [2, 3]),
]

BAD_LIST_ROWS = [
    ("0", "0: Invalid message number"),
    ("6", "6: Invalid message number"),
    ("4-6", "6: Invalid message number"),
    ("1-99999999999", "99999999999: Invalid message number"),
    ("zz", "No applicable messages from {zz}"),
    ("\u0662", "No applicable messages from {\u0662}"),
    ("2-", "2-: Invalid message list"),
    (":d", "No messages satisfy :d"),
    (":x", ":x: Invalid message list"),
    ("/nothing", "No applicable messages"),
]

COMMAND_ROWS = [
    # what is typed, what is then deleted or saved, the current message
    (["d"], {4: "deleted"}, 5),
    (["d 1 2"], {1: "deleted", 2: "deleted"}, 3),
    (["d 5"], {5: "deleted"}, 4),
    (["d *"], dict.fromkeys(range(1, 6), "deleted"), 0),
    (["d 1", "u"], {}, 1),
    (["d 1 2", "u 2"], {1: "deleted"}, 2),
    (["d*", "u *"], {}, 5),
    (["delete 1"], {1: "deleted"}, 2),
    # printing makes a message the current one
    (["2"], {}, 2),
    (["p 3"], {}, 3),
    ([""], {}, 4),
    (["", ""], {}, 5),
    (["n"], {}, 4),
    (["1", "n"], {}, 2),
    # what cannot be done changes nothing
    (["d 9"], {}, 4),
    (["xyzzy"], {}, 4),
    (["d 1", "d 1"], {1: "deleted"}, 2),
]

REPLY_FIELD_ROWS = [
    # to the author and everybody else, not to oneself
    ("From: A <a@x>\nTo: bob@host.example, c@x\n", {"To": "a@x, c@x"}),
    ("From: a@x\nTo: b@x\nCc: c@x, bob\n", {"To": "a@x, b@x", "Cc": "c@x"}),
    ("From: a@x\nReply-To: r@x\n", {"To": "r@x"}),
    # each once
    ("From: a@x\nTo: a@x\nCc: a@x\n", {"To": "a@x"}),
    # a note to oneself
    ("From: bob@host.example\n", {"To": "bob@host.example"}),
    # the subject gets one Re:
    ("From: a@x\nSubject: s\n", {"To": "a@x", "Subject": "Re: s"}),
    ("From: a@x\nSubject: RE: s\n", {"To": "a@x", "Subject": "RE: s"}),
    # the thread goes on
    (
        "From: a@x\nMessage-ID: <2>\nReferences: <0>\n <1>\n",
        {"To": "a@x", "In-Reply-To": "<2>", "References": "<0> <1> <2>"},
    ),
]


class TestMailReader:
    """mail(1) on a mailbox."""

    @pytest.mark.parametrize(("text", "wanted"), LIST_ROWS)
    def test_a_list_names_messages(self, session, text, wanted):
        assert session().numbers(text) == wanted

    @pytest.mark.parametrize(("text", "why"), BAD_LIST_ROWS)
    def test_a_list_that_names_none_is_refused(self, session, text, why):
        with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
            session().numbers(text)

    @pytest.mark.parametrize(("lines", "states", "dot"), COMMAND_ROWS)
    def test_a_command_does_its_work(self, session, lines, states, dot):
        reader = session()
        for line in lines:
            reader.obey(line)
        found = {n: m.state for n, m in enumerate(reader.messages, 1) if m.state}
        assert (found, reader.dot) == (states, dot)

    @pytest.mark.parametrize(
        ("line", "shown"),
        [
            ("xyzzy", 'Unknown command: "xyzzy"\n'),
            ("d 9", "9: Invalid message number\n"),
            ("u", "0: Invalid message number\n"),
            ("w", "No file specified\n"),
            ("\x1b[2J", 'Unknown command: "␛["\n'),
        ],
    )
    def test_a_mistake_is_told_in_mailxs_words(self, session, line, shown):
        reader = session()
        reader.obey(line)
        assert reader.terminal.shown == shown

    @pytest.mark.parametrize(
        ("word", "name"),
        [
            *[
                ("", "print_next"),
                ("n", "print_next"),
                ("ne", "print_next"),
                ("p", "show"),
                ("t", "show"),
            ],
            *[("hea", "list_headers"), ("del", "delete"), ("?", "give_help")],
            *[("u", "undelete"), ("r", "reply"), ("s", "save"), ("w", "write")],
            *[
                ("q", "quit_session"),
                ("x", "leave"),
                ("ex", "leave"),
                ("exit", "leave"),
            ],
        ],
    )
    def test_a_command_may_be_cut_short(self, session, word, name):
        assert session().find_command(word).__name__ == name

    def test_the_banner_counts(self, session, tmp_path):
        banner = f'"{tmp_path}/box": 5 messages 2 new 3 unread'
        assert session().banner() == banner

    def test_one_message_is_one(self, session, tmp_path):
        reader = session(texts=[mail("s")])
        assert reader.banner() == f'"{tmp_path}/box": 1 message 1 new'

    def test_a_row_has_heirlooms_columns(self, session):
        text = mail("test lpic1").replace("Subject", "From: bob@host.example\nSubject")
        reader = session(texts=[text])
        assert reader.summary(1) == (
            f">N  1 {'bob@host.example':20}  Wed Feb 19 05:10   "
            f'6/{len(text):<5} "test lpic1"'
        )

    @pytest.mark.parametrize(
        ("number", "start"), [(1, "    1"), (3, " U  3"), (4, ">N  4"), (5, " N  5")]
    )
    def test_a_row_is_marked(self, session, number, start):
        assert session().summary(number).startswith(start)

    def test_no_row_is_wider_than_80(self, session):
        reader = session(texts=[mail("subject " * 50)])
        assert len(reader.summary(1)) <= 80

    def test_a_message_is_shown_with_its_fields(self, session):
        reader = session(
            texts=[mail("s", "one", ">From two").replace("s\n", "s\nX: y\n")]
        )
        reader.obey("1")
        assert reader.terminal.shown.startswith(
            "Message  1:\nFrom eve@far.example  Wed"
        )
        assert (
            "\nSubject: s\nX: y\nStatus: R\n\none\nFrom two\n" in reader.terminal.shown
        )

    def test_no_control_reaches_the_terminal(self, session):
        reader = session(texts=[mail("s\x1b[2J", "\x1b]0;x\x07")])
        minimta.list_headers(reader, "")
        reader.obey("1")
        assert not set("\x1b\x07") & set(reader.terminal.shown)

    def test_quit_drops_what_is_deleted(self, session, tmp_path):
        reader = session("d 1-3", "q")
        assert minimta.run_session(reader) == 0
        assert (tmp_path / "box").read_text() == mail("s4", status="O") + mail(
            "s5", status="O"
        )
        assert reader.terminal.shown.endswith(f"Held 2 messages in {tmp_path}/box\n")

    def test_the_end_of_the_input_is_quit(self, session, tmp_path):
        minimta.run_session(session("d *"))
        assert (tmp_path / "box").read_text() == ""

    def test_exit_leaves_everything_as_it_was(self, session, tmp_path):
        reader = session("d *", "x")
        before = (tmp_path / "box").read_text()
        minimta.run_session(reader)
        assert (tmp_path / "box").read_text() == before

    def test_a_saved_message_is_whole_and_leaves(self, session, tmp_path):
        minimta.run_session(session(f"s 4 {tmp_path}/saved", "q"))
        assert (tmp_path / "saved").read_text() == mail("s4")
        assert "s4" not in (tmp_path / "box").read_text()

    def test_a_written_message_has_no_header_and_stays(self, session, tmp_path):
        minimta.run_session(session(f"w 4 {tmp_path}/written", "q"))
        assert (tmp_path / "written").read_text().strip() == "text"
        assert "s4" in (tmp_path / "box").read_text()

    @pytest.mark.parametrize(("header", "wanted"), REPLY_FIELD_ROWS)
    def test_an_answer_goes_to_everybody_else(self, session, header, wanted):
        parsed = minimta.Header.parse(header.encode())
        found = {k: v for k, v in minimta.reply_fields(parsed, session()) if v}
        assert found == {"Subject": "Re: ", **wanted}


# What is typed -> text, subject, recipients, what is shown.
ESCAPE_ROWS = [
    (["a", "."], "a\n", {}, "EOT\n"),
    (["a", "~."], "a\n", {}, "EOT\n"),
    (["~~a"], "~a\n", {}, "EOT\n"),
    (["~s new subject"], "", {"Subject": "new subject"}, "EOT\n"),
    (["~t b@x c@x"], "", {"To": "a@x, b@x, c@x"}, "EOT\n"),
    (["~c b@x", "~b c@x"], "", {"Cc": "b@x", "Bcc": "c@x"}, "EOT\n"),
    (["~r FILE"], "one\ntwo\n", {}, '"FILE" 2/8\nEOT\n'),
    (["~< FILE"], "one\ntwo\n", {}, '"FILE" 2/8\nEOT\n'),
    (["~r !echo x"], "x\n", {}, '"!echo x" 1/2\nEOT\n'),
    (["~d"], "dead\n", {}, '"DEAD" 1/5\nEOT\n'),
    (["a", "~| tr a b"], "b\n", {}, "(continue)\nEOT\n"),
    (["a", "~| false"], "a\n", {}, '"false" failed: exit code 1\nEOT\n'),
    (["a", "~| true"], "a\n", {}, "(continue)\nEOT\n"),
    (["~! true"], "", {}, "!\nEOT\n"),
    (["a", "~w OUT"], "a\n", {}, '"OUT" 1/2\nEOT\n'),
    (["~e"], "edited\n", {}, "(continue)\nEOT\n"),
    (["~v"], "edited\n", {}, "(continue)\nEOT\n"),
    (["~i sign"], "yours\n", {}, "yours\nEOT\n"),
    (["~a"], "yours\n", {}, "yours\nEOT\n"),
    (["~zz"], "", {}, "Unknown tilde escape.\nEOT\n"),
    (["~r /no/such"], "", {}, "/no/such: No such file or directory\nEOT\n"),
    (["~f 1"], "", {}, "No messages to send from.\nEOT\n"),
    (
        ["a", "~p"],
        "a\n",
        {},
        "-------\nMessage contains:\nTo: a@x\nSubject: s\n\na\n(continue)\nEOT\n",
    ),
]


class TestComposer:
    """Letters as they are typed."""

    @pytest.fixture
    def composer(self, quiet, tmp_path):
        """Makes a composer for somebody who types these lines."""

        def make(*lines, reader=None):
            (tmp_path / "FILE").write_text("one\ntwo\n")
            (tmp_path / "DEAD").write_text("dead\n")
            editor = tmp_path / "editor"
            editor.write_text('#!/bin/sh\necho edited >"$1"\n')
            editor.chmod(0o755)
            dead = {"DEAD": f"{tmp_path}/DEAD"}
            names = {"EDITOR": str(editor), "VISUAL": str(editor)}
            variables = minimta.Variables({**dead, **names})
            variables.set("sign=yours")
            terminal = FakeTerminal(*lines)
            terminal.is_interactive = True
            return minimta.Composer(quiet.house, terminal, variables, reader)

        return make

    @pytest.mark.parametrize(("lines", "text", "rows", "shown"), ESCAPE_ROWS)
    def test_an_escape_does_its_work(
        self, composer, tmp_path, lines, text, rows, shown
    ):
        for name in ("FILE", "OUT"):
            lines = [line.replace(name, f"{tmp_path}/{name}") for line in lines]
        one, sheet = composer(*lines), minimta.Sheet(["a@x"], "s")
        minimta.write_letter(one, sheet)
        assert sheet.text.decode() == text
        assert dict(sheet.fields()) == {"To": "a@x", "Subject": "s", **rows}
        assert one.terminal.shown.replace(f"{tmp_path}/", "") == shown
        if lines[-1].startswith("~w"):
            assert (tmp_path / "OUT").read_text() == text

    @pytest.mark.parametrize(("word", "is_kept"), [("~q", True), ("~x", False)])
    def test_who_gives_up_sends_nothing(self, composer, tmp_path, word, is_kept):
        one = composer("text", word)
        with pytest.raises(minimta.Killed):
            minimta.write_letter(one, minimta.Sheet(["a@x"], "s"))
        kept = (tmp_path / "DEAD").read_text()
        assert ("Subject: s\n" in kept and kept.endswith("text\n\n")) == is_kept
        assert kept.startswith("dead\n")

    def test_messages_are_put_in(self, composer, session):
        one = composer("~m 1", "~f 2", reader=session())
        sheet = minimta.Sheet(["a@x"])
        minimta.write_letter(one, sheet)
        text = sheet.text.decode()
        assert text == "> Subject: s1\n> \n> text\nSubject: s2\n\ntext\n"
        assert "Interpolating: 1\n(continue)\n" in one.terminal.shown

    def test_commands_of_the_session_may_be_given(self, composer, session):
        reader = session()
        one = composer("~: d 1", reader=reader)
        minimta.write_letter(one, minimta.Sheet(["a@x"]))
        assert reader.messages[0].state == "deleted"

    def test_the_list_of_escapes_is_shown(self, composer):
        one = composer("~?")
        minimta.write_letter(one, minimta.Sheet(["a@x"]))
        for letter in "qxstcbhrdwep@fFmMi:":
            assert f"~{letter}" in one.terminal.shown

    def test_an_attachment_comes_out_byte_for_byte(self, composer, tmp_path):
        (tmp_path / "d\u00e4ta.bin").write_bytes(bytes(range(256)) * 99)
        one, sheet = composer(f"~@ {tmp_path}/d\u00e4ta.bin"), minimta.Sheet(["a@x"])
        minimta.write_letter(one, sheet)
        header = one.header(sheet)
        raw = bytes(header) + b"\n" + minimta.mail_body(sheet)
        text, part = email.message_from_bytes(raw).get_payload()
        assert part.get_payload(decode=True) == bytes(range(256)) * 99
        assert part.get_filename() == "d\u00e4ta.bin"
        assert text.get_content_type() == "text/plain"


DECODED_ROWS = [
    ("plain", "plain"),
    ("=?utf-8?B?SsO2cmc=?= x", "Jörg x"),
    ("=?iso-8859-1?Q?J=F6rg?=", "Jörg"),
    # what is none stays
    ("=?nonsense?B?SsO2cmc=?=", "=?nonsense?B?SsO2cmc=?="),
    # a control that was hidden in it
    ("=?utf-8?B?GzJK?=", "␛2J"),
]

BODY_ROWS = [
    (b"\ntext \xc3\xbc\n", "text ü\n"),
    (b"Content-Transfer-Encoding: quoted-printable\n\nJ=C3=B6rg\n", "Jörg\n"),
    (b"Content-Transfer-Encoding: base64\n\nSsO2cmcK\n", "Jörg\n"),
    (b"\n\x1b[2J\xff\n", "␛[2J\ufffd\n"),
    (
        b'Content-Type: multipart/alternative; boundary="b"\n\n--b\n'
        b"Content-Type: text/html\n\n<p>\n--b\n"
        b"Content-Type: text/plain\n\nplain\n--b--\n",
        "plain",
    ),
]


class TestShown:
    """What a message's header and text look like."""

    @pytest.mark.parametrize(("given", "wanted"), DECODED_ROWS)
    def test_encoded_words_are_decoded(self, given, wanted):
        assert minimta.decoded(given) == wanted

    @pytest.mark.parametrize(("given", "wanted"), BODY_ROWS)
    def test_a_body_is_decoded(self, given, wanted):
        assert minimta.body_text(minimta.Header.parse(given)) == wanted

    @pytest.mark.parametrize(
        ("field", "wanted"),
        [
            ("From: A B <a@x>", "A B"),
            ('From: "A, B" <a@x>', "A, B"),
            ("From: a@x (A)", "A"),
            ("From: <a@x>", "a@x"),
            ("From: =?utf-8?B?SsO2cmc=?= <a@x>", "Jörg"),
            # without one, the envelope's sender
            ("To: b@x", "eve@far.example"),
        ],
    )
    def test_an_author_has_a_name(self, field, wanted):
        header = minimta.Header.parse(field.encode())
        line = b"From eve@far.example  Wed Feb 19 05:10:01 2025"
        assert minimta.sender_name(header, line) == wanted


# == 35 Programs: SendmailOptions, cmd_sendmail, cmd_mail, cmd_serve ... ======


def letters_of(kind):
    """sendmail's letters of one kind, each with a value that makes sense."""
    values = {"B": "8bitmime", "N": "never", "R": "full", "b": "m", "h": "5"}
    values.update({"q": "30m", "M": "rm"})
    options = minimta.SendmailOptions.OPTIONS
    rows = sorted((letter, row[0]) for letter, row in options.items())
    return [(letter, values.get(letter, "x")) for letter, k in rows if k == kind]


OPTION_ROWS = [
    # who sends
    (["-f", "a@b"], "sender", "a@b"),
    (["-fa@b"], "sender", "a@b"),
    (["-r", "a@b"], "sender", "a@b"),
    (["-f", ""], "sender", ""),
    ([], "sender", None),
    (["-F", "A B"], "full_name", "A B"),
    # recipients anywhere
    (["a", "-i", "b"], "recipients", ["a", "b"]),
    (["-t", "--", "-i", "b"], "recipients", ["-i", "b"]),
    (["-"], "recipients", ["-"]),
    # flags, glued together
    (["-t"], "reads_header", True),
    (["-it"], "reads_header", True),
    (["-ti"], "dot_ends", False),
    (["-tfa@b"], "sender", "a@b"),
    (["-i"], "dot_ends", False),
    (["-oi"], "dot_ends", False),
    (["-oitrue"], "dot_ends", False),
    (["-o", "i"], "dot_ends", False),
    (["-OIgnoreDots=true"], "dot_ends", False),
    (["-OIgnoreDots=false"], "dot_ends", True),
    ([], "dot_ends", True),
    (["-v"], "is_verbose", True),
    # how it is delivered
    ([], "delivery", "b"),
    (["-odi"], "delivery", "i"),
    (["-odf"], "delivery", "i"),
    (["-odq"], "delivery", "q"),
    (["-odd"], "delivery", "q"),
    (["-odb"], "delivery", "b"),
    (["-O", "DeliveryMode=queue"], "delivery", "q"),
    (["-bq"], "delivery", "q"),
    # what to be
    ([], "mode", "m"),
    (["-bs"], "mode", "s"),
    (["-b", "s"], "mode", "s"),
    (["-bl"], "mode", "l"),
    (["-I"], "mode", "i"),
    (["-q"], "mode", "q"),
    (["-q30m"], "mode", "q"),
    (["-bd", "-q30m"], "mode", "d"),
    (["-q30m", "-bd"], "mode", "d"),
    # what is to be told
    (["-N", "success,delay"], "notify", "success,delay"),
    (["-Rhdrs"], "ret", "hdrs"),
    (["-V", "a+2Bb"], "envid", "a+2Bb"),
    (["-bt"], "mode", "t"),
    # files
    (["-C", "/x"], "config", "/x"),
    (["-oA/x"], "alias_file", "/x"),
    (["-OAliasFile=/x"], "alias_file", "/x"),
]

BAD_OPTIONS = [
    *(["-Z"], ["-iZ"], ["--help-me"], ["-\x1b"]),
    # an argument is missing
    *(["-f"], ["-F"], ["-b"], ["-tf"]),
    # a value that makes no sense
    *(["-V", "a b"], ["-V", "a+"], ["-Nnever,delay"]),
    *(["-bX"], ["-bss"], ["-Bx"], ["-Nx"], ["-Nnever,x"], ["-Rx"], ["-hx"], ["-h-1"]),
]


class TestSendmailOptions:
    """sendmail's command line."""

    @pytest.mark.parametrize(("args", "name", "wanted"), OPTION_ROWS)
    def test_an_option_is_taken(self, args, name, wanted):
        assert getattr(minimta.SendmailOptions(args), name) == wanted

    @pytest.mark.parametrize(("letter", "_"), letters_of(""))
    def test_a_letter_without_argument_leaves_the_next_word(self, letter, _):
        assert minimta.SendmailOptions([f"-{letter}", "bob"]).recipients == ["bob"]

    @pytest.mark.parametrize(("letter", "value"), letters_of(":"))
    def test_a_letter_with_argument_takes_it_glued(self, letter, value):
        args = [f"-{letter}{value}", "bob"]
        assert minimta.SendmailOptions(args).recipients == ["bob"]

    @pytest.mark.parametrize(("letter", "value"), letters_of(":"))
    def test_a_letter_with_argument_takes_it_from_the_next_word(self, letter, value):
        args = [f"-{letter}", value, "bob"]
        assert minimta.SendmailOptions(args).recipients == ["bob"]

    @pytest.mark.parametrize(("letter", "value"), letters_of("?"))
    def test_a_letter_that_may_have_one_takes_it_only_glued(self, letter, value):
        for word in (f"-{letter}", f"-{letter}{value}"):
            assert minimta.SendmailOptions([word, "bob"]).recipients == ["bob"]

    @pytest.mark.parametrize("args", BAD_OPTIONS)
    def test_what_makes_no_sense_is_a_usage_error(self, args):
        with pytest.raises(minimta.ProgramError) as caught:
            minimta.SendmailOptions(args)
        assert caught.value.code == 64
        assert str(caught.value).isprintable()

    def test_the_arguments_stay_as_they_were(self):
        args = ["-f", "a", "b"]
        minimta.SendmailOptions(args)
        assert args == ["-f", "a", "b"]


SENDER_ROWS = [
    # without -f, the caller
    (None, "bob@host.example"),
    ("a@b", "a@b"),
    ("a", "a@host.example"),
    ("A B <a@b>", "a@b"),
    # the null sender
    ("", ""),
    ("<>", ""),
]

WORD_ROWS = [
    (["a@b", "c"], ["a@b", "c@host.example"]),
    (["a@b, c@d"], ["a@b", "c@d"]),
    (["A B <a@b>"], ["a@b"]),
    (["\\bob"], ["bob@host.example"]),
    # no command, no file: names
    (["|cat"], ["|cat@host.example"]),
    (["/etc/passwd"], ["/etc/passwd@host.example"]),
    ([":include:/x"], ["/x@host.example"]),
]


class TestPeople:
    """Who is named on a command line."""

    @pytest.mark.parametrize(("text", "wanted"), SENDER_ROWS)
    def test_a_sender_is_read(self, quiet, text, wanted):
        assert str(minimta.read_sender(quiet.house, text)) == wanted

    @pytest.mark.parametrize("text", ["a b", "a@b, c@d", "a@b@c", "(x)"])
    def test_a_bad_sender_is_bad_data(self, quiet, text):
        with pytest.raises(minimta.ProgramError, match="-f: ") as caught:
            minimta.read_sender(quiet.house, text)
        assert caught.value.code == 65

    @pytest.mark.parametrize(("words", "wanted"), WORD_ROWS)
    def test_recipients_are_read(self, quiet, words, wanted):
        found = minimta.read_recipients(quiet.house, words)
        assert list(map(str, found)) == wanted

    @pytest.mark.parametrize(
        ("word", "code"), [("-x", 64), ("a\nb", 64), ("a b", 65), ("a@b@c", 65)]
    )
    def test_a_bad_recipient_is_refused(self, quiet, word, code):
        with pytest.raises(minimta.ProgramError) as caught:
            minimta.read_recipients(quiet.house, ["bob", word])
        assert caught.value.code == code


# == 34 Dispatch: PROGRAMS, main ==============================================


VERSION = f"minimta {minimta.__version__}\n"

MAIN_ROWS = [
    # by its own name, by the first word
    (["/usr/sbin/sendmail", "--version"], 0, VERSION, ""),
    (["minimta.py", "mailq", "--version"], 0, VERSION, ""),
    (["minimta.py", "--version"], 0, VERSION, ""),
    (["/usr/bin/mailq", "--help"], 0, "usage: mailq", ""),
    (["minimta.py", "newaliases", "--help"], 0, "usage: newaliases", ""),
    (["minimta.py"], 0, "usage: minimta.py", ""),
    (["minimta.py", "help"], 0, "usage: minimta.py", ""),
    # a program's name is not looked for behind a program
    (["sendmail", "mailq", "-Z"], 64, "", "sendmail: illegal option -- Z: "),
    # mistakes
    (["minimta.py", "sendmial"], 64, "", "minimta.py: unknown command sendmial: "),
    (["minimta.py", "sendmail", "-Z"], 64, "", "sendmail: illegal option -- Z: "),
    (["mail", "-Z"], 64, "", "mail: option -Z not recognized: "),
    (["sendmail"], 64, "", "sendmail: no recipients: "),
    (["mailq", "x\n"], 64, "", "mailq: x?: not a queue id: "),
    (["serve", "-C"], 64, "", "serve: unknown argument -C: "),
    (["config", "-C", "/no/such"], 78, "", "config: /no/such: no such file"),
]


class TestMain:
    """The one place that ends in words."""

    def test_a_python_without_a_module_is_told_so(self, instance):
        instance.aliases("a: b\n")
        code = (
            "import sys; sys.modules['dbm'] = None; sys.path.insert(0, sys.argv[1]);"
            "import minimta; sys.exit(minimta.main(['newaliases']))"
        )
        done = subprocess.run(
            [sys.executable, "-IS", "-c", code, HERE],
            capture_output=True,
            env=instance.env(),
        )
        assert_one_clear_line(Result(done.returncode, done.stdout, done.stderr), 69)
        assert b"no module dbm" in done.stderr

    @pytest.mark.parametrize(("argv", "code", "out", "err"), MAIN_ROWS)
    def test_a_program_ends_in_a_code_and_a_line(self, capfd, argv, code, out, err):
        assert minimta.main(argv) == code
        said = capfd.readouterr()
        assert said.out.startswith(out)
        assert said.err.startswith(err)
        assert bool(said.err) == bool(err)
        assert said.err.count("\n") == bool(err)

    @pytest.mark.parametrize("name", sorted(minimta.PROGRAMS))
    def test_every_program_has_a_usage(self, name):
        assert minimta.PROGRAMS[name].__doc__.startswith("usage: ")


# == The whole program ========================================================
# End to end, from outside: the programs as a user calls them, over real
# sockets, files and processes.


ASCTIME = r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d"
LOREM = "A line of text that is about as long as lines of mail are.\n"


def letter(token, *lines):
    """A small message whose Subject is the token."""
    return "\n".join((f"Subject: {token}", "", *(lines or ("text",)), ""))


class TestPrograms:
    """One file is every program, by symlink or by word."""

    @pytest.mark.parametrize("name", LINKS)
    @pytest.mark.parametrize("flag", ["--version", "--help"])
    def test_a_symlink_is_the_program_of_its_name(self, instance, name, flag):
        result = instance.run(name, flag)
        assert (result.code, result.err) == (0, "")
        assert ("minimta" if flag == "--version" else name.lower()[:4]) in result.out

    @pytest.mark.parametrize("name", [*LINKS, "serve"])
    @pytest.mark.parametrize("flag", ["--version", "--help"])
    def test_a_first_word_is_the_program_of_its_name(self, instance, name, flag):
        result = instance.run("minimta.py", name, flag)
        assert (result.code, result.err) == (0, "")
        assert ("minimta" if flag == "--version" else name.lower()[:4]) in result.out

    def test_word_and_symlink_do_the_same(self, instance):
        assert instance.run("mailq").out == instance.run("minimta.py", "mailq").out

    @pytest.mark.parametrize("flag", ["--version", "--help"])
    def test_minimta_itself_has_version_and_help(self, instance, flag):
        result = instance.run("minimta.py", flag)
        assert (result.code, result.err) == (0, "")
        assert "minimta" in result.out

    def test_the_help_names_every_program(self, instance):
        shown = instance.run("minimta.py", "--help").out
        for name in ("sendmail", "newaliases", "mailq", "mail", "serve"):
            assert re.search(rf"\b{name}\b", shown), name

    def test_an_unknown_program_is_a_usage_error(self, instance):
        assert_one_clear_line(instance.run("minimta.py", "sendmial"), 64)

    @pytest.mark.parametrize("name", ["sendmail", "mailq", "newaliases", "mail"])
    def test_an_unknown_setting_is_named_with_its_line_and_the_nearest(
        self, instance, name
    ):
        path = instance.write("etc/minimta.conf", "# one\n\nmesage_size_limit = 1k\n")
        words = ("payam",) if name in ("sendmail", "mail") else ()
        result = instance.run(name, *words)
        assert_one_clear_line(result, 78)
        assert str(path) in result.err
        assert re.search(r"\b3\b", result.err)
        assert "mesage_size_limit" in result.err
        assert re.search(r"\bmessage_size_limit\b", result.err)

    def test_a_setting_comes_from_the_environment(self, instance):
        env = {"MINIMTA_MESSAGE_SIZE_LIMIT": "12345"}
        instance.start(env=env)
        with Wire(instance.port) as wire:
            play(wire, "S: 220\nC: EHLO client.example")
            assert any("SIZE 12345" in line for line in wire.whole_answer())

    def test_local_mail_flows_without_settings_and_aliases(self, instance):
        (instance.root / "etc/minimta.conf").unlink()
        (instance.root / "etc/aliases").unlink()
        instance.start(env={"MINIMTA_SMTPD_PORT": str(instance.port)})
        instance.sendmail("user1", stdin=letter("bare"))
        assert "Subject: bare" in instance.wait_message("user1", "bare")

    def test_a_spool_path_longer_than_a_socket_address_works(self, make_instance):
        far = make_instance(below="long/" * 40).start()
        far.sendmail("user1", stdin=letter("far"))
        far.wait_message("user1", "far")
        assert far.mailq() == "Mail queue is empty\n"


HEAVY = """re socket email smtplib mailbox dbm ssl json logging typing dataclasses
    subprocess threading socketserver collections argparse selectors""".split()


class TestStart:
    """Programs start fast because they load little."""

    def test_sendmail_starts_from_cached_byte_code(self, instance, record_property):
        env = instance.env()
        commands = {
            "sendmail": [instance.bin / "sendmail", "--version"],
            "python": [os.path.realpath(sys.executable), "-IS", "-c", "pass"],
        }
        best = dict.fromkeys(commands, float("inf"))
        for _ in range(20):
            for name, command in commands.items():
                begin = time.perf_counter()
                done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL)
                best[name] = min(best[name], time.perf_counter() - begin)
                assert done.returncode == 0
        ratio = best["sendmail"] / best["python"]
        record_property("start_ratio", round(ratio, 2))
        print(
            f"sendmail --version takes {ratio:.2f} times as long as python -IS -c pass"
        )
        assert list((instance.bin / "__pycache__").iterdir())

    def test_sendmail_version_loads_no_heavy_module(self, instance):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import minimta\n"
            "code = minimta.main(['sendmail', '--version'])\n"
            "print(code, *sys.modules)"
        )
        python = os.path.realpath(sys.executable)
        shown = subprocess.run(
            [python, "-IS", "-c", code, instance.bin],
            env=instance.env(),
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout.splitlines()
        code, *loaded = shown[-1].split()
        assert code == "0"
        assert "minimta" in loaded
        assert sorted(set(loaded) & set(HEAVY)) == []

    def test_byte_code_from_a_directory_of_others_is_not_used(self, instance):
        cache = instance.bin / "__pycache__"
        instance.run("sendmail", "--version")
        mode = cache.stat().st_mode
        stamp = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
        for path in stamp:
            path.rename(f"{path}.kept")
        cache.chmod(0o777)
        try:
            assert instance.run("sendmail", "--version").code == 0
            assert {path.suffix for path in cache.iterdir()} <= {".kept"}
        finally:
            cache.chmod(mode)
            for path in stamp:
                Path(f"{path}.kept").rename(path)


class TestServe:
    """The daemon starts, stops and reads its settings again."""

    def test_serve_prints_nothing_but_its_log(self, server):
        server.send("payam@localhost", letter("one"))
        server.wait_message("payam", "one")
        shape = r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ minimta/\w+\[\d+\]: .+"
        for line in server.stderr().splitlines():
            assert re.fullmatch(shape, line), line

    def test_a_delivery_is_logged_in_the_shape_of_postfix(self, server):
        server.send("payam@localhost", letter("one"))
        server.wait_message("payam", "one")
        shape = (
            r"(?m)^[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ minimta/\w+\[\d+\]: "
            r"[0-9A-Z]{10}: to=<payam@\S+>, .*relay=\S+, delay=[\d.]+, .*"
            r"dsn=2\.0\.0, status=sent \(.*delivered to mailbox.*\)$"
        )
        assert re.search(shape, server.log()), server.log()

    def test_sendmail_with_b_and_capital_d_is_serve(self, instance):
        instance.start("sendmail", "-bD")
        instance.send("payam@localhost", letter("one"))
        instance.wait_message("payam", "one")

    def test_sendmail_bd_returns_when_the_daemon_listens(self, instance):
        result = instance.run("sendmail", "-bd", user="root")
        assert (result.code, result.out) == (0, ""), result
        assert instance.pids()
        instance.send("payam@localhost", letter("one"))
        instance.wait_message("payam", "one")

    def test_sigterm_ends_every_process_with_exit_0(self, server):
        assert len(server.pids()) >= 2
        assert server.stop() == 0
        wait_for(lambda: not server.pids())
        with pytest.raises(ConnectionRefusedError):
            Wire(server.port)

    def test_sigterm_tells_an_open_session_421(self, server):
        with Wire(server.port) as wire:
            play(wire, "S: 220\nC: EHLO client.example\nS: 250")
            server.process.terminate()
            assert wire.answer().startswith("421 4.3.2")
        assert server.stop() == 0

    def test_sighup_takes_a_new_size_limit(self, server):
        server.configure(message_size_limit=23456)
        server.hang_up()

        def announced():
            with Wire(server.port) as wire:
                play(wire, "S: 220\nC: EHLO client.example")
                return any("SIZE 23456" in line for line in wire.whole_answer())

        wait_for(announced)

    @pytest.mark.parametrize(
        "text",
        [
            "no_such_setting = 1",
            "default_process_limit = 0",
            "mynetworks = everybody",
            "queue_directory = /elsewhere",
            pytest.param("mail_owner = nobody-here", marks=needs_root),
        ],
    )
    def test_sighup_with_bad_settings_keeps_the_old_ones(self, server, text):
        server.write("etc/minimta.conf", f"{text}\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "settings not read" in server.log())
        server.send("payam@localhost", letter("still"))
        server.wait_message("payam", "still")

    def test_a_port_in_use_is_an_os_error(self, instance):
        with socket.socket() as other:
            other.bind(("127.0.0.1", instance.port))
            other.listen()
            result = instance.run("minimta.py", "serve", user="root")
        assert_one_clear_line(result, 71)
        assert str(instance.port) in result.err

    def test_a_second_daemon_on_the_same_queue_is_refused(self, server):
        env = {"MINIMTA_SMTPD_PORT": str(free_port())}
        result = server.run("minimta.py", "serve", user="root", env=env)
        assert_one_clear_line(result, 75)
        server.send("payam@localhost", letter("first"))
        server.wait_message("payam", "first")

    def test_serve_with_an_unknown_setting_is_refused(self, instance):
        instance.configure(relay_host="[127.0.0.1]")
        result = instance.run("minimta.py", "serve", user="root")
        assert_one_clear_line(result, 78)
        assert "relayhost" in result.err

    def test_a_killed_child_is_started_again(self, server):
        children = [pid for pid in server.pids() if pid != server.process.pid]
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: set(server.pids()) - {server.process.pid, *children})
        wait_for(server.is_ready)
        server.send("payam@localhost", letter("again"))
        server.wait_message("payam", "again")

    def test_20_megabytes_pass_without_filling_memory(self, instance):
        instance.configure(message_size_limit="30M")
        instance.start()
        text = LOREM * (20_000_000 // len(LOREM))
        instance.send("payam@localhost", letter("big", text))
        wait_for(lambda: not instance.queued())
        assert instance.pids()
        for pid in instance.pids():
            status = Path(f"/proc/{pid}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
            assert peak < 60_000, status
        (message,) = instance.messages("payam")
        assert message.count(LOREM) == text.count("\n")


@pytest.fixture
def notified():
    """A socket on which a supervisor hears of the daemon."""
    place = open_directory("minimta-notify-")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(place / "notify"))
        listener.settimeout(PATIENCE)
        yield types.SimpleNamespace(path=str(place / "notify"), recv=listener.recv)
    shutil.rmtree(place)


def hear(notified, word):
    """What the daemon says next that has this word in it."""
    said = notified.recv(1000).decode()
    while word not in said:
        said = notified.recv(1000).decode()
    return said.split("\n")


HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


class TestControl:
    """Supervisors, health, passwords."""

    def test_a_supervisor_hears_of_start_reload_and_stop(self, instance, notified):
        instance.start(env={"NOTIFY_SOCKET": notified.path}.items())
        pid = instance.process.pid
        assert f"MAINPID={pid}" in hear(notified, "READY=1")
        instance.process.send_signal(signal.SIGHUP)
        usec = hear(notified, "RELOADING=1")[1].partition("MONOTONIC_USEC=")[2]
        assert 0 <= time.monotonic() - int(usec) / 1e6 < PATIENCE
        hear(notified, "READY=1")
        instance.stop()
        hear(notified, "STOPPING=1")

    def test_a_supervisor_hears_of_bad_settings(self, instance, notified):
        instance.start(env={"NOTIFY_SOCKET": notified.path}.items())
        instance.write("etc/minimta.conf", "nonsense = 1\n")
        instance.process.send_signal(signal.SIGHUP)
        hear(notified, "RELOADING=1")
        assert "STATUS=the new settings are wrong" in hear(notified, "READY=1")

    def test_the_watchdog_hears_of_life(self, instance, notified):
        env = {"NOTIFY_SOCKET": notified.path, "WATCHDOG_USEC": "500000"}
        instance.start(env=env.items())
        for _ in range(3):
            hear(notified, "WATCHDOG=1")

    def test_a_socket_that_is_handed_over_is_listened_on(self, instance):
        with socket.create_server(("127.0.0.1", 0)) as given:
            port = given.getsockname()[1]
            words = [sys.executable, "-c", HAND_OVER, str(given.fileno())]
            instance.process = subprocess.Popen(
                [*words, instance.bin / "minimta.py", "serve"],
                env=instance.env("root"),
                pass_fds=[given.fileno()],
                stderr=(instance.root / "serve.stderr").open("wb"),
                start_new_session=True,
            )
        instance.port = port
        wait_for(instance.is_ready)
        token = new_token()
        instance.send(["payam"], letter(token))
        instance.wait_message("payam", token)

    def test_what_is_handed_over_and_no_socket_is_refused(self, instance):
        script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "{instance.bin}/minimta.py" serve'
        result = subprocess.run(
            ["sh", "-c", f"exec 3</dev/null; {script}"],
            env=instance.env("root"),
            capture_output=True,
            check=False,
        )
        assert result.returncode == 78
        assert b"descriptor 3" in result.stderr

    @needs_root
    def test_as_process_1_it_buries_strangers_and_ends_when_told(self, instance):
        unshare = shutil.which("unshare")
        probe = [unshare or "false", "--pid", "--fork", "--mount-proc", "true"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("no process namespace can be made here")
        mark = open_folder(instance) / "told"
        orphan = f"(sh -c 'echo end >>{mark}' &) & exit 0"
        instance.aliases(f'prog: "|{orphan}"\n')
        instance.process = subprocess.Popen(
            [*probe[:-1], instance.bin / "minimta.py", "serve"],
            env=instance.env("root"),
            stdin=subprocess.DEVNULL,
            stderr=(instance.root / "serve.stderr").open("wb"),
            start_new_session=True,
        )
        wait_for(instance.is_ready)
        instance.send("prog@localhost", letter("orphans"))
        wait_text(mark)
        instance.wait_empty()

        def status(pid):
            text = Path("/proc", pid, "status").read_text()
            return dict(
                line.split(":\t") for line in text.splitlines() if ":\t" in line
            )

        children = Path(f"/proc/{instance.process.pid}/task/{instance.process.pid}")
        (first,) = (children / "children").read_text().split()
        assert status(first)["NSpid"].split()[-1] == "1"
        kids = Path(f"/proc/{first}/task/{first}/children")
        wait_for(
            lambda: (
                not [
                    pid
                    for pid in kids.read_text().split()
                    if status(pid)["State"][0] == "Z"
                ]
            )
        )
        os.kill(int(first), signal.SIGTERM)
        assert instance.process.wait(PATIENCE) == 0

    @pytest.mark.skipif(os.path.exists("/dev/log"), reason="syslog takes the lines")
    def test_the_journal_gets_levels_and_no_times(self, instance):
        instance.configure(maillog_file="")
        instance.start(env={"JOURNAL_STREAM": "8:1"}.items())
        instance.sendmail("user1", stdin=letter("x"))
        instance.wait_message("user1", "x")
        instance.stop()
        lines = instance.stderr().splitlines()
        assert re.match(r"<6>minimta/master\[\d+\]: daemon started", lines[0])
        assert [line for line in lines if not re.match(r"<[46]>minimta/", line)] == []

    def test_health_says_that_all_is_well_and_logs_nothing(self, server):
        before = server.log()
        result = server.run("minimta.py", "health")
        assert (result.code, result.out) == (0, "ok: the daemon answers\n")
        # The fixture has connected too, from localhost.
        new = server.log()[len(before) :].splitlines()
        assert [line for line in new if "from localhost" not in line] == []

    def test_health_says_that_nobody_answers(self, instance):
        result = instance.run("minimta.py", "health")
        assert (result.code, result.out) == (1, "the daemon does not answer\n")

    def test_health_says_that_the_disk_is_full(self, instance):
        instance.configure(queue_minfree="1000000G")
        result = instance.start().run("minimta.py", "health")
        assert (result.code, "disk is full" in result.out) == (1, True)

    def test_a_process_that_does_not_beat_is_named(self):
        pulse = minimta.Pulse()
        assert pulse.ails() == ""
        pulse.memory[8:16] = struct.pack("d", time.monotonic() - 1000)
        assert pulse.ails() == "process qmgr does not answer"

    def test_a_password_is_kept_as_a_hash(self, instance):
        path = instance.root / "etc/passwords"
        instance.configure(smtpd_sasl_password_file=path)
        for user in ("payam", "other"):
            words = ("config", "passwd", user)
            result = instance.run("minimta.py", *words, stdin="secret\n")
            assert (result.code, result.out, result.err) == (0, "", "")
        passwords = minimta.Passwords(str(path))
        assert passwords.check("payam", b"secret")
        assert not passwords.check("payam", b"other")
        assert b"secret" not in path.read_bytes()
        assert path.stat().st_mode & 0o007 == 0

    def test_a_password_needs_a_file(self, instance):
        result = instance.run("minimta.py", "config", "passwd", "u", stdin="x\n")
        assert_one_clear_line(result, 78)

    @pytest.mark.parametrize("stdin", ["", "\n"])
    def test_no_password_is_none(self, instance, stdin):
        instance.configure(smtpd_sasl_password_file=instance.root / "etc/passwords")
        result = instance.run("minimta.py", "config", "passwd", "u", stdin=stdin)
        assert_one_clear_line(result, 65)


class TestWalkThrough:
    """What this program's users do first."""

    def test_the_walk_through(self, server):
        server.aliases("lpic1: root\nroot: payam\n")
        assert server.run("newaliases").code == 0

        typing = Terminal(server, "mail", "lpic1@localhost", user="user1")
        typing.expect("Subject: ")
        typing.type("test lpic1\n")
        typing.type("line one\nline two\n\x04")
        typing.expect("EOT\n")
        assert typing.close() == 0
        wait_for(lambda: server.messages("payam"))
        server.wait_empty()

        reading = Terminal(server, "mail", user="payam")
        shown = reading.expect("& ")
        box = server.mailbox("payam")
        banner, count, row, *_ = shown.splitlines()
        assert re.fullmatch(r"minimta mail \S+  Type \? for help\.", banner)
        assert count == f'"{box}": 1 message 1 new'
        assert re.fullmatch(
            r">N  1 user1@centos7-1\.loca  \w{3} \w{3} [ \d]\d \d\d:\d\d"
            r" +\d+/\d+ +\"test lpic1\"",
            row,
        )
        reading.type("1\n")
        shown = reading.expect("line two\n")
        assert "Message  1:\nFrom user1@centos7-1.localdomain  " in shown
        for name in ("Return-Path", "X-Original-To", "Delivered-To", "Subject"):
            assert re.search(rf"(?m)^{name}: .*\S", shown), name
        reading.expect("& ")
        reading.type("d\n")
        reading.expect("& ")
        reading.type("q\n")
        assert reading.close() == 0

        again = server.run("mail", user="payam")
        assert (again.code, again.out, again.err) == (1, "", "No mail for payam\n")
        assert not server.messages("root")

    def test_a_row_counts_the_lines_and_bytes_of_the_message(self, server):
        server.send("payam@localhost", letter("count"))
        message = server.wait_message("payam", "count")
        text = message.rstrip("\n") + "\n"
        shown = server.run("mail", "-u", "payam", stdin="x\n").out
        lines, size = map(int, re.search(r" (\d+)/(\d+) +\"count\"", shown).groups())
        assert abs(lines - text.count("\n")) <= 1
        assert abs(size - len(text)) <= 1

    def test_dot_forward_moves_the_mail_on(self, server):
        server.forward("user1", "user2\n")
        server.run("mail", "-s", "moved", "user1", stdin="text\n")
        message = server.wait_message("user2", "moved")
        delivered = " ".join(fields(message, "Delivered-To"))
        assert "user1@" in delivered
        assert "user2@" in delivered
        assert server.messages("user1") == []

    def test_mail_with_no_route_waits_in_the_queue(self, server):
        result = server.run(
            "mail",
            "-s",
            "email subject",
            "someone@example.com",
            stdin="email content\n",
            user="payam",
        )
        assert (result.code, result.out, result.err) == (0, "", "")
        shown = server.wait_reason(")\n")
        header, row, reason, recipient, empty, total = shown.splitlines()
        assert header == (
            "-Queue ID- --Size-- ----Arrival Time---- -Sender/Recipient-------"
        )
        assert re.fullmatch(
            rf"[0-9A-Z]{{10}}  [ \d]{{6}}\d {ASCTIME}  payam@centos7-1\.localdomain",
            row,
        )
        inner = reason.strip()
        assert re.fullmatch(r"\(.+\)", inner)
        assert reason == " " * max(0, 76 - (len(inner) - 2)) + inner
        assert recipient == " " * 41 + "someone@example.com"
        assert empty == ""
        assert re.fullmatch(r"-- \d+ Kbytes in 1 Request\.", total)

    def test_an_empty_queue_says_so(self, server):
        assert server.mailq() == "Mail queue is empty\n"
        assert server.run("sendmail", "-bp").out == "Mail queue is empty\n"


# Flags that sendmail has had somewhere, and that change nothing that arrives.
HISTORICAL = """
    -i|-oi|-oem|-oee|-oeq|-em|-odi|-odb|-odf|-oo|-om|-m|-bm|-U|-G|-n|-Ac|-Am
    -B8BITMIME|-B 8BITMIME|-B7BIT|-N never|-Nnever|-N success,failure,delay
    -R hdrs|-Rfull|-V id|-L tag|-Ltag|-h 3|-O DeliveryMode=b|-OErrorMode=m
    -v|-i -oi -oem -odb|-FCronDaemon -i -B8BITMIME -oem|-oem -oi -f user1
""".strip().replace("\n", "|")

# What a caller says -> what arrives.  Each row: the arguments, what stands in
# the message that arrives at payam, and what does not.
FLAGS = {
    "the sender is the user": (
        "payam",
        [rf"^Return-Path: <user1@{HOST}>$", rf"^From: .*user1@{HOST}"],
        [],
    ),
    "-f sets the sender": (
        "-f other@example.com payam",
        [r"^From other@example\.com  ", r"^Return-Path: <other@example\.com>$"],
        [r"^Return-Path: .*user1"],
    ),
    "-f glued": (
        "-fother@example.com payam",
        [r"^Return-Path: <other@example\.com>$"],
        [],
    ),
    "-r sets the sender": (
        "-r other@example.com payam",
        [r"^Return-Path: <other@example\.com>$"],
        [],
    ),
    "the last -f wins": (
        "-f a@example.com -f b@example.com payam",
        [r"^Return-Path: <b@example\.com>$"],
        [],
    ),
    "-f of a local user is qualified": (
        "-f user2 payam",
        [rf"^Return-Path: <user2@{HOST}>$"],
        [],
    ),
    "-f <> is the null sender": (
        "-f <> payam",
        [r"^Return-Path: <>$", r"^From MAILER-DAEMON  "],
        [],
    ),
    "-F sets the name": ("-FCronDaemon payam", [r"^From: .*CronDaemon"], []),
    "-F apart": ("-F Cron payam", [r"^From: .*Cron.*user1@"], []),
    "-- ends the flags": ("-i -- payam", [r"^Delivered-To: payam@"], []),
    "an address": ("payam@localhost", [r"^X-Original-To: payam@localhost$"], []),
    "an upper-case address": ("PAYAM", [r"^Delivered-To: (?i:payam)@"], []),
    "what is missing is added": (
        "payam",
        [
            r"^From: ",
            r"^Date: \w{3}, [ \d]?\d \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4} \(UTC\)$",
            rf"^Message-I[dD]: <\S+@{HOST}>$",
            rf"^Received: .*\b{HOST}\b",
        ],
        [],
    ),
    "an alias": ("alias1", [r"^X-Original-To: alias1@", r"^Delivered-To: "], []),
}


class TestSendmail:
    """The submission command that every script knows."""

    @pytest.mark.parametrize("flags", HISTORICAL.split("|"), ids=str.strip)
    def test_a_historical_flag_is_accepted(self, shared, flags):
        token = new_token()
        words = (*flags.split(), "payam")
        result = shared.run("sendmail", *words, stdin=letter(token), user="user1")
        assert result.code == 0, result
        assert shared.wait_message("payam", token).count("\ntext\n") == 1

    @pytest.mark.parametrize("words, wanted, unwanted", FLAGS.values(), ids=FLAGS)
    def test_what_arrives(self, shared, words, wanted, unwanted):
        token = new_token()
        shared.sendmail(*words.split(), stdin=letter(token), user="user1")
        message = shared.wait_message("payam", token)
        for pattern in wanted:
            assert re.search("(?m)" + pattern, message), (pattern, message)
        for pattern in unwanted:
            assert not re.search("(?m)" + pattern, message), (pattern, message)

    def test_header_fields_that_are_there_are_kept(self, shared):
        token = new_token()
        kept = {
            "From": "Somebody <somebody@example.com>",
            "Date": "Wed, 19 Feb 2020 05:10:00 +0000",
            "Message-ID": f"<{token}@example.com>",
        }
        text = "".join(f"{name}: {value}\n" for name, value in kept.items())
        shared.sendmail("payam", stdin=text + "\nbody\n")
        message = shared.wait_message("payam", token)
        for name, value in kept.items():
            assert fields(message, name) == [value]

    @pytest.mark.parametrize(
        ("words", "code"),
        [
            (["-oem", "a b@@c"], 65),
            (["-oem"], 64),
            (["-oee", "a b@@c"], 0),
            (["-e", "-oem", "-t"], 64),
            (["-h", "99", "-O", "ErrorMode=m", "payam"], 69),
        ],
        ids=str,
    )
    def test_an_error_is_mailed_to_the_caller_who_wants_it(self, shared, words, code):
        token = new_token()
        text = f"Subject: {token}\n\nunsent text\n"
        result = shared.run("sendmail", *words, stdin=text, user="payam")
        assert result.code == code
        assert bool(result.err) == bool(code)
        message = shared.wait_message("payam", token)
        assert message.startswith("From MAILER-DAEMON ")
        assert fields(message, "Subject") == ["Returned mail: it was not sent"]
        assert f"Subject: {token}\n\n" in message
        assert message.rstrip().endswith("unsent text")

    @pytest.mark.parametrize("flags", [[], ["-oep"], ["-oeq"], ["-oew"]], ids=str)
    def test_an_error_is_else_told_on_standard_error_only(self, instance, flags):
        result = instance.run("sendmail", *flags, "a b@@c", stdin=letter("unsent"))
        assert_one_clear_line(result, 65)
        assert instance.queued() == []

    @pytest.mark.parametrize(
        ("lines", "sender"),
        [
            ("From bob Tue Nov 24 10:00:00 2026 remote from far.example\n", "bob@far"),
            ("From far.example!bob Tue Nov 24 10:00:00 2026\n", "bob@far"),
            (
                "From uucp Tue Nov 24 10:00 2026 remote from hub\n"
                ">From eve Tue Nov 24 09:00 2026 remote from far.example\n",
                "eve@far",
            ),
            ("From bob@far.example Tue Nov 24 10:00 2026 remote from hub\n", "bob@far"),
            ("From hub!bob@far.example Tue Nov 24 10:00 2026\n", "bob@far"),
        ],
    )
    def test_rmail_takes_the_sender_from_its_lines(self, shared, lines, sender):
        token = new_token()
        text = lines + letter(token)
        result = shared.run("minimta.py", "rmail", "payam", stdin=text)
        assert (result.code, result.err) == (0, "")
        message = shared.wait_message("payam", token)
        assert message.startswith(f"From {sender}.example ")
        assert "remote from" not in message

    @pytest.mark.parametrize("path", ["<>", "a!b@@c", "!", "far!"])
    def test_rmail_takes_mail_whatever_its_lines_name(self, shared, path):
        token = new_token()
        text = f"From {path} Tue Nov 24 10:00 2026 remote from far\n{letter(token)}"
        result = shared.run("minimta.py", "rmail", "payam", stdin=text)
        assert (result.code, result.err) == (0, "")
        assert shared.wait_message("payam", token)

    def test_what_may_succeed_later_is_no_error_to_mail(self, instance):
        def small():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        text = letter("full", LOREM * 4000)
        for words in (
            ["sendmail", "-oee"],
            ["sendmail", "-oem"],
            ["minimta.py", "rmail"],
        ):
            result = instance.run(*words, "payam", stdin=text, preexec_fn=small)
            assert_one_clear_line(result, 75)
        assert instance.queued() == []

    @pytest.mark.parametrize("flag", ["-oem", "-oee", "-oep"])
    def test_the_dot_ends_a_message_that_is_refused_too(self, shared, flag):
        words = [shared.bin / "sendmail", flag, "nosuch"]
        how = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(words, env=shared.env("payam"), **how) as client:
            client.stdin.write(letter("dot").encode() + b".\n")
            client.stdin.flush()
            assert client.wait(PATIENCE) == (0 if flag == "-oee" else 67)

    def test_of_the_headers_recipients_the_good_get_it(self, shared):
        token = new_token()
        text = f"To: payam, foo@, a b c\nSubject: {token}\n\nx\n"
        result = shared.run("sendmail", "-t", stdin=text)
        assert result.code == 0
        assert len(result.err.splitlines()) == 2
        assert shared.wait_message("payam", token)

    @pytest.mark.parametrize("extra", range(6))
    def test_a_header_that_is_too_long_is_refused(self, instance, extra):
        head = "X-P: p\n" * extra + "To: payam\n" + "X-A: y\n" * 200_000
        result = instance.run("sendmail", "-t", stdin=head + "Bcc: user2\n\nb\n")
        assert_one_clear_line(result, 65)
        assert instance.queued() == []

    def test_a_transcript_that_cannot_be_made_is_told_first(self, instance):
        result = instance.run("sendmail", "-X", "/no/such", "payam", stdin=letter("x"))
        assert_one_clear_line(result, 73)
        assert instance.queued() == []

    def test_by_any_other_name_it_is_sendmail(self, instance):
        os.symlink(instance.bin / "sendmail", instance.root / "smail")
        words = [instance.root / "smail", "payam"]
        text = letter("smail").encode()
        subprocess.run(words, input=text, env=instance.env("payam"), check=True)
        assert len(instance.queued()) + len(instance.messages("payam")) == 1

    def test_without_an_id_exims_commands_do_nothing(self, instance):
        put_stock(instance)
        for flag in ("-M", "-Mrm", "-Mt", "-Mg"):
            assert instance.run("sendmail", flag).code == 64
        assert in_queue(instance) == "ABC D"

    @pytest.mark.parametrize("words", [["payam"], ["-t"]], ids=str)
    def test_a_bare_recipient_is_local_whatever_the_origin(self, make_instance, words):
        one = make_instance(myorigin="elsewhere.example")
        text = f"To: payam\n{letter('bare')}"
        one.sendmail(*words, stdin=text)
        message = one.wait_message("payam", "bare")
        assert message.startswith("From payam@elsewhere.example ")

    def test_hops_that_are_few_hinder_nothing(self, shared):
        token = new_token()
        shared.sendmail("-h", "3", "payam", stdin=letter(token))
        assert shared.wait_message("payam", token)

    def test_exims_commands_are_known_to_sendmail(self, instance):
        put_stock(instance)
        result = instance.run("sendmail", "-Mrm", "0AAAAAAAAA")
        assert result.out == "Message 0AAAAAAAAA has been removed\n"
        assert in_queue(instance) == "BC D"
        assert instance.run("sendmail", "-Mx", "0BBBBBBBBB").code == 64

    def test_text_without_a_header_is_a_body(self, shared):
        token = new_token()
        shared.sendmail("payam", stdin=f"just {token}\nmore\n")
        _, body = head_and_body(shared.wait_message("payam", token))
        assert body == f"just {token}\nmore\n\n"

    @pytest.mark.parametrize(
        "flags, kept",
        [("", False), ("-i", True), ("-oi", True), ("-t -i", True), ("-ti", True)],
    )
    def test_a_lone_dot_ends_the_message_unless_i(self, shared, flags, kept):
        token = new_token()
        text = f"To: payam\nSubject: {token}\n\nbefore\n.\nafter\n"
        words = flags.split() if "t" in flags else [*flags.split(), "payam"]
        shared.sendmail(*words, stdin=text)
        _, body = head_and_body(shared.wait_message("payam", token))
        assert body == ("before\n.\nafter\n\n" if kept else "before\n\n")

    def test_several_recipients_each_get_one(self, shared):
        token = new_token()
        words = ("user1", "payam", "user1@localhost", "user2")
        shared.sendmail(*words, stdin=letter(token))
        for user in LOCAL_USERS:
            shared.wait_message(user, token)

    def test_lines_that_begin_with_from_are_quoted(self, shared):
        token = new_token()
        text = letter(token, "From here", ">From there", " From", "Frommer")
        shared.sendmail("payam", stdin=text)
        _, body = head_and_body(shared.wait_message("payam", token))
        assert body == ">From here\n>>From there\n From\nFrommer\n\n"

    def test_bytes_of_any_kind_arrive_unchanged(self, shared):
        token = new_token()
        raw = bytes(range(128, 256))
        shared.sendmail("payam", stdin=letter(token).encode() + raw + b"\n")
        assert raw.decode("utf-8", "surrogateescape") in shared.wait_message(
            "payam", token
        )

    def test_line_ends_of_a_dos_file_become_line_feeds(self, shared):
        token = new_token()
        text = letter(token, "one", "two").replace("\n", "\r\n")
        shared.sendmail("payam", stdin=text)
        assert "\r" not in shared.wait_message("payam", token)

    def test_a_last_line_without_an_end_gets_one(self, shared):
        token = new_token()
        shared.sendmail("payam", stdin=f"Subject: {token}\n\nno end")
        assert shared.wait_message("payam", token).endswith("\nno end\n\n")

    @pytest.mark.parametrize("words", ["nosuchuser", "nosuchuser neither"])
    def test_an_unknown_user_is_refused_and_nothing_queued(self, shared, words):
        result = shared.run("sendmail", *words.split(), stdin=letter(new_token()))
        assert_one_clear_line(result, 67)
        assert "nosuchuser" in result.err
        assert shared.queued() == []

    def test_an_unknown_user_among_known_ones_is_named_and_bounced(self, shared):
        token = new_token()
        words = ("user2", "nosuchuser")
        result = shared.run("sendmail", *words, stdin=letter(token), user="payam")
        assert_one_clear_line(result, 0)
        assert "nosuchuser" in result.err
        shared.wait_message("user2", token)
        report = shared.wait_message("payam", token)
        assert fields(report, "Return-Path") == ["<>"]
        assert "nosuchuser" in report

    @pytest.mark.parametrize("words", ["", "-t", "-Z payam", "-f", "--no-such payam"])
    def test_wrong_usage_is_64(self, shared, words):
        token = new_token()
        result = shared.run("sendmail", *words.split(), stdin=letter(token))
        assert_one_clear_line(result, 64)
        shared.wait_empty()
        assert shared.with_token("payam", token) == []

    @pytest.mark.parametrize("redirection", ["<&-", "</"])
    @pytest.mark.parametrize("words", ["sendmail payam", "mail -s x payam"])
    def test_a_stdin_that_cannot_be_read_is_66(self, shared, redirection, words):
        result = shared.run_by_shell(redirection, *words.split())
        assert_one_clear_line(result, 66)
        assert shared.queued() == []

    def test_a_message_over_the_limit_is_65(self, shared):
        text = letter("huge", LOREM * 2000)
        assert_one_clear_line(shared.run("sendmail", "payam", stdin=text), 65)
        assert shared.queued() == []

    def test_bv_says_where_mail_would_go_and_sends_nothing(self, shared):
        before = shared.messages("payam")
        result = shared.run("sendmail", "-bv", "alias1")
        assert result.code == 0
        assert "payam" in result.out
        shared.wait_empty()
        assert shared.messages("payam") == before

    def test_bv_of_an_unknown_user_is_67(self, shared):
        result = shared.run("sendmail", "-bv", "nosuchuser")
        assert result.code == 67
        assert "nosuchuser" in result.out + result.err

    def test_bp_is_mailq(self, shared):
        shared.wait_empty()
        assert shared.run("sendmail", "-bp").out == shared.mailq()

    def test_bi_is_newaliases(self, instance):
        instance.aliases("one: payam\n")
        by_flag = instance.run("sendmail", "-bi")
        assert by_flag.code == 0
        assert by_flag.out == instance.run("newaliases").out

    def test_bs_speaks_smtp_on_stdin(self, shared):
        token = new_token()
        dialogue = f"""EHLO client.example
            MAIL FROM:<friend@example.com>
            RCPT TO:<payam@localhost>
            DATA
            Subject: {token}

            text
            .
            QUIT""".replace(" " * 12, "").replace("\n", "\r\n")
        result = shared.run("sendmail", "-bs", stdin=dialogue + "\r\n")
        assert (result.code, result.err) == (0, "")
        lines = result.out.split("\r\n")
        ends = [line[:3] for line in lines if line[3:4] == " "]
        assert ends == "220 250 250 250 354 250 221".split()
        shared.wait_message("payam", token)

    def test_bs_takes_several_messages(self, shared):
        token = new_token()
        one = (
            "MAIL FROM:<>\r\nRCPT TO:<payam>\r\nDATA\r\n"
            f"Subject: {token}\r\n\r\ntext\r\n.\r\n"
        )
        text = "EHLO client.example\r\n" + one + one + "QUIT\r\n"
        assert shared.run("sendmail", "-bs", stdin=text).code == 0
        wait_for(lambda: len(shared.with_token("payam", token)) == 2)

    def test_q_with_an_empty_queue_is_fine(self, shared):
        result = shared.run("sendmail", "-q", user="root")
        assert (result.code, result.err) == (0, "")

    def test_q_tries_what_waits_at_once(self, instance, make_sink):
        port = free_port()
        instance.configure(relayhost=f"[127.0.0.1]:{port}", minimal_backoff_time="1h")
        instance.start()
        instance.sendmail("friend@example.com", stdin=letter("late"))
        instance.wait_reason("friend@example.com")
        wait_for(lambda: "status=deferred" in instance.log())
        sink = make_sink(place=("127.0.0.1", port))
        result = instance.run("sendmail", "-q", user="root")
        assert result.code == 0, result
        instance.wait_empty()
        assert len(sink.received) == 1

    def test_without_a_daemon_the_mail_is_delivered(self, instance):
        instance.sendmail("user1", stdin=letter("alone"))
        instance.wait_message("user1", "alone")

    def test_without_a_daemon_odi_delivers_before_it_returns(self, instance):
        instance.sendmail("-odi", "user1", stdin=letter("now"))
        assert len(instance.with_token("user1", "now")) == 1
        assert instance.queued() == []


# The header that -t reads, and who gets the message.
HEADERS = {
    "To": ("To: user1", "user1"),
    "Cc": ("Cc: user1", "user1"),
    "Bcc": ("Bcc: user1", "user1"),
    "all three": ("To: user1\nCc: user2\nBcc: payam", "user1 user2 payam"),
    "lower case": ("to: user1", "user1"),
    "a list": ("To: user1, user2", "user1 user2"),
    "names": ('To: "Last, First" <user1@localhost>, User Two <user2>', "user1 user2"),
    "comments": ("To: user1 (not, payam), user2", "user1 user2"),
    "a group": ("To: friends: user1, user2;", "user1 user2"),
    "folded": ("To: user1,\n user2", "user1 user2"),
    "twice the same": ("To: user1\nCc: user1@localhost", "user1"),
    "Resent-To wins": ("To: user1\nResent-To: user2", "user2"),
    "Resent-Cc": ("To: user1\nResent-To: user2\nResent-Cc: payam", "user2 payam"),
    "Resent-Bcc": ("To: user1\nResent-To: user2\nResent-Bcc: payam", "user2 payam"),
}


class TestSendmailT:
    """Recipients from the header."""

    @pytest.mark.parametrize("header, wanted", HEADERS.values(), ids=HEADERS)
    def test_who_gets_it(self, shared, header, wanted):
        token = new_token()
        text = f"{header}\nSubject: {token}\n\nTo: root\ntext\n"
        shared.sendmail("-t", stdin=text)
        for user in wanted.split():
            shared.wait_message(user, token)
        for user in {"root", *LOCAL_USERS} - set(wanted.split()):
            assert shared.with_token(user, token) == []

    @pytest.mark.parametrize("name", ["Bcc", "bcc", "Resent-Bcc"])
    def test_bcc_is_removed(self, shared, name):
        token = new_token()
        first = "Resent-To: user1" if "Resent" in name else "To: user1"
        text = f"{first}\n{name}: user2,\n payam\nSubject: {token}\n\ntext\n"
        shared.sendmail("-t", stdin=text)
        for user in LOCAL_USERS:
            head, _ = head_and_body(shared.wait_message(user, token))
            assert not re.search(r"(?im)^(resent-)?bcc:", head)
            assert f"Subject: {token}" in head

    def test_an_unknown_recipient_is_67(self, shared):
        text = "To: nosuchuser\nSubject: x\n\ntext\n"
        result = shared.run("sendmail", "-t", stdin=text)
        assert_one_clear_line(result, 67)
        assert "nosuchuser" in result.err


# Options that change nothing that arrives, beside those of HISTORICAL.
IGNORED = """
    -A c|-B 8bitmime|-B7bit|-c|-d|-d0.1|-E|-Ex|-J|-Jx|-ez|-oez|-oep|-oew|-s|-psmtp
    -p smtp:host|-O Foo=bar|-OFoo=bar|-ODeliveryMode=i|-o7|-o8|-or1h|-oQ/x|-oT3d
    -os|-odd|-odqs|-bq|-Rheaders|-R full|-Vabc+2B|-Nsuccess,failure,delay
    -h5|-OIgnoreDots
""".strip().replace("\n", "|")

# Options that do what another sendmail would do, and this one does not.
REFUSED = """
    -ba|-be|-bem|-bfx|-bF|-bI:x|-bmalware|-bnq|-brt|-brw|-bS|-bw|-bx|-bz|-bpa|-D x|-D
    -Q|-Qx|-S|-Sx|-T 1h|-x|-qp|-qp1h|-qG|-qGx|-qQ|-qL|-Mx|-Bfoo|-hfoo|-h -1|-Nfoo
    -N payam|-Rx|-Vx+|-Z|-iZ
""".strip().replace("\n", "|")

# What is typed -> exit code and stdout; nothing is read, nothing is sent.
OPTION_ANSWERS = {
    "sendmail -bC": (0, ""),
    "sendmail -bV": (0, VERSION),
    "sendmail -bP": (0, "0\n"),
    "sendmail -bpc": (0, "0\n"),
    "sendmail -bp": (0, "Mail queue is empty\n"),
    "sendmail -bp -Ac": (0, "Mail queue is empty\n"),
    "sendmail -bh": (0, "Count  Volume  Oldest  Newest  Domain\n"),
    "hoststat": (0, "Count  Volume  Oldest  Newest  Domain\n"),
    "sendmail -bH": (0, ""),
    "purgestat": (0, ""),
    **{f"sendmail -q{arg}": (0, "") for arg in ("", "f", "ff", "30m", "1h30m")},
    **{f"sendmail -q{arg}": (0, "") for arg in ("Ix", "Rx", "Sx", "!Ix", "!Rx", "!Sx")},
    "runq": (0, ""),
    "mailq": (0, "Mail queue is empty\n"),
    "mailq -v": (0, "Mail queue is empty\n"),
    "mailq -Ac": (0, "Mail queue is empty\n"),
    "mailq -qRx": (0, "Mail queue is empty\n"),
    "mailq -q": (0, ""),
    "mailq -j": (0, ""),
    "mailq --json": (0, ""),
    "mailq word": (64, ""),
    "mailq -bs": (64, ""),
    "mailq --watch": (64, ""),
    "newaliases -q": (64, ""),
    "newaliases -bp": (64, ""),
    "newaliases word": (64, ""),
    "sendmail -bi word": (64, ""),
    "sendmail -bv": (64, ""),
    "sendmail -bt": (64, ""),
    "sendmail -C /no/such -bC": (78, ""),
    "newaliases -oA/no/such": (66, ""),
    "sendmail -bi -oA /no/such": (66, ""),
}

# A header that -t reads -> exit code, and who gets the message.
MORE_HEADERS = {
    "a semicolon between": ("To: payam; user2", 0, "payam user2"),
    "several fields": ("To: payam\nTo: user2", 0, "payam user2"),
    "a first line that is empty": ("Cc:  \n payam", 0, "payam"),
    "a blank before the colon": ("To : payam", 0, "payam"),
    "a quoted ; in a group": ('To: x: "b; c" <user2>; , user1', 0, "user1 user2"),
    "a coded name": ("To: =?utf-8?q?J=C3=B6rg=2C?= <payam>", 0, "payam"),
    "an empty group beside Bcc": (
        "To: undisclosed-recipients:;\nBcc: payam",
        0,
        "payam",
    ),
    "Resent-From alone": ("Resent-From: x@y.example\nTo: payam", 0, "payam"),
    "an empty group": ("To: undisclosed-recipients:;", 64, ""),
    "an empty field": ("To:", 64, ""),
    "a comma": ("To: ,", 64, ""),
    "Apparently-To": ("Apparently-To: payam", 64, ""),
    "To in the body": ("Bcc:\n\nTo: payam", 64, ""),
    "two words": ("To: payam user2", 65, ""),
    "no domain": ("To: foo@", 65, ""),
    "two domains": ("To: a@b@c", 65, ""),
    "an empty part of a domain": ("To: foo@bar..com", 65, ""),
}

# -F -> what stands before the address in From.
FULL_NAMES = {
    "Full Name": "Full Name",
    "A & B": "A & B",
    "J. Doe": '"J. Doe"',
    "a,b": '"a,b"',
    'A "q" B': r'"A \"q\" B"',
    "Joe (x) y": '"Joe (x) y"',
    r"back\slash": r'"back\\slash"',
    "Jörg": "=?utf-8?B?SsO2cmc=?=",
    "a\nBcc: user2": '"a Bcc: user2"',
}

# A full name in the passwd file -> the same, of a user who is called user2.
GECOS = {
    "A B,room,1": "A B",
    '& Q. "Zed" Public;x': r'"User2 Q. \"Zed\" Public"',
    "A%x": "A",
    "J. Doe": '"J. Doe"',
    "Jörg": "=?utf-8?B?SsO2cmc=?=",
}

# -f -> Return-Path, or exit code.
SENDERS = {
    "Bob <b@x.example>": "<b@x.example>",
    "b@x.example (Bob)": "<b@x.example>",
    "<b@x.example>": "<b@x.example>",
    "": "<>",
    "bob smith": 65,
    "bob@@x": 65,
    "root@": 65,
    "a@b, c@d": 65,
}

# What is on standard input -> the header field X-A, and the body.
OPTION_INPUTS = {
    "From_ lines": ("From a\n>From b\n>>From c\nX-A: x\n\nb\n", "x", "b\n"),
    "a quoted From_ line": (">From a\nX-A: x\n\nb\n", "x", "b\n"),
    "a carriage return within": ("X-A: x\n\na\rb\n", "x", "a b\n"),
    "NUL": ("X-\0A: x\0y\n\na\0b\n", "xy", "ab\n"),
    "a dot in the header": ("X-A: x\n.\nTo: y\n\nb\n", "x", ""),
    "a dot with CRLF": ("X-A: x\r\n\r\na\r\n.\r\nb\r\n", "x", "a\n"),
    "a dot without an end": ("X-A: x\n\nb\n.", "x", "b\n"),
    "other dots": ("X-A: x\n\n..x\n...\n..\n.y\n", "x", "..x\n...\n..\n.y\n"),
    "an address of the web": ("http://x.example/ y\nX-A: x\n\nb\n", "x", "b\n"),
    "no field in the middle": ("X-A: x\nno field\nTo: y\n", "x", "no field\nTo: y\n"),
    "white space first": (" a\nX-A: x\n\nb\n", None, " a\nX-A: x\n\nb\n"),
    "an empty line first": ("\nX-A: x\n\nb\n", None, "X-A: x\n\nb\n"),
    "a colon first": (": v\nX-A: x\n\nb\n", None, ": v\nX-A: x\n\nb\n"),
    "a header without an end": ("X-A: x", "x", ""),
    "an empty field": ("X-A:\n\nb\n", "", "b\n"),
    "a long line": (f"X-A: x\n\n{'l' * 3000}\n", "x", f"{'l' * 3000}\n"),
    "a long field": (f"X-A: {'y ' * 2000}z\n\nb\n", f"{'y ' * 2000}z", "b\n"),
    "nothing": ("", None, ""),
}

# A recipient on the command line -> exit code.
WORDS = {
    **dict.fromkeys(("", "<>", "-", "-x"), 64),
    **dict.fromkeys(("foo@", "@bar", "a@b@c", "foo@bar..com", "a b"), 65),
    **dict.fromkeys(("<a", "a>", '"a'), 65),
    **dict.fromkeys(("a%b@localhost", "h!u", "|cat", "/etc/passwd"), 67),
    ":include:/etc/passwd": 67,
    **dict.fromkeys((r"\payam", "payam (x)", "payam@[127.0.0.1]", "payam+x"), 0),
}

# What -bs reads -> the codes of its answers.
SESSIONS = {
    "nothing": ("", "220"),
    "QUIT": ("QUIT\r\n", "220 221"),
    "an end within DATA": (
        "MAIL FROM:<a@b>\r\nRCPT TO:<payam>\r\nDATA\r\nSubject: TOKEN\r\n",
        "220 250 250 354",
    ),
    "an unknown user": (
        "HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<nosuch>\r\nFOO\r\nQUIT\r\n",
        "220 250 250 550 500 221",
    ),
    "a relay": ("MAIL FROM:<a@b>\r\nRCPT TO:<a@far.example>\r\n", "220 250 250"),
    "a size over the limit": ("MAIL FROM:<a@b> SIZE=999999\r\n", "220 552"),
}

# What -bv is asked -> exit code and what it prints.
DELIVERABLE = "deliverable: mailer local, user"
VERDICTS = {
    "alias1": (0, f"payam@{HOST}... {DELIVERABLE} payam\n"),
    "PAYAM": (0, f"payam@{HOST}... {DELIVERABLE} payam\n"),
    "nosuch payam": (
        67,
        f"nosuch@{HOST}... User unknown\npayam@{HOST}... {DELIVERABLE} payam\n",
    ),
}

# An aliases file -> exit code, stdout, and what stderr says behind "line ".
ALIAS_FILES = {
    "a: user1\na: payam\n": (0, "1 aliases, longest 5", "2: warning: duplicate"),
    "a: payam; user2\n": (0, "1 aliases, longest 12", "1: warning: a: write commas"),
    "a: payam user2\n": (0, "1 aliases, longest 12", "1: warning: a: write commas"),
    "a b: payam\n": (0, "1 aliases, longest 5", "1: warning: a b: a name of two"),
    "a@b: payam\n": (0, "1 aliases, longest 5", "1: warning: a@b: the domain is"),
    "a: nosuch\n": (0, "1 aliases, longest 6", "1: warning: a: nosuch: no such"),
    "a: :include:/no/x\n": (0, "1 aliases, longest 16", "1: warning: a: "),
    "a@localhost: payam\n@localhost: user1\n": (0, "2 aliases, longest 5", ""),
    "  # x\na: payam # y\r\nb: user2\r\n": (0, "2 aliases, longest 5", ""),
    "a: |cat x 0\n": (0, "1 aliases, longest 10 bytes, 11 bytes", ""),
    "a: :fail: no\nb: :defer: x\nc: :blackhole:\n": (0, "3 aliases, ", ""),
    "d: error:550 x\n": (0, "1 aliases, ", ""),
    "": (0, "0 aliases, longest 0 bytes, 0 bytes total", ""),
    'a: ""\n': (65, "", '1: not an address: ""'),
    "a: ,\n": (65, "", "1: a: missing value"),
}

# In what a user's process finds itself, by setpriv and sh.
SURROUNDINGS = {
    "umask 0": ("--reuid=5001", "umask 0"),
    "umask 777": ("--reuid=5001", "umask 777"),
    "no new privileges": ("--reuid=5001 --no-new-privs", ":"),
    "a uid without a name": ("--reuid=7777", ":"),
    "a directory that it cannot read": ("--reuid=5001", ":"),
    "a wrong HOME": ("--reuid=5001", "HOME=/no/such"),
    "a wrong name": ("--reuid=5001", "USER=zz LOGNAME=zz"),
    "no variables": ("--reuid=5001", "unset HOME USER LOGNAME PATH TZ TERM"),
    "an empty PATH": ("--reuid=5001", "PATH="),
}


class TestOptionTable:
    """sendmail's options and input, row by row of what is promised of them."""

    @pytest.mark.parametrize("words", IGNORED.split("|"), ids=str.strip)
    def test_an_option_is_ignored(self, shared, words):
        token = new_token()
        words = (*words.split(), "payam")
        shared.sendmail(*words, stdin=letter(token), user="user1")
        assert shared.wait_message("payam", token).count("\ntext\n") == 1

    @pytest.mark.parametrize("words", REFUSED.split("|"), ids=str.strip)
    def test_an_option_is_refused(self, shared, words):
        token = new_token()
        words = (*words.split(), "payam")
        assert_one_clear_line(shared.run("sendmail", *words, stdin=letter(token)), 64)
        shared.wait_empty()
        assert shared.with_token("payam", token) == []

    def test_a_check_of_settings_names_what_has_mail_wait(self, instance):
        texts = {
            "transport_maps": "a.example smtp:[b]:25\nc.example smtps=b\n",
            "smtp_generic_maps": "payam p@x.example\nuser1 two words\n",
            "smtp_sasl_password_maps": "a.example me\n",
        }
        paths = {
            name: instance.write(f"etc/{name}", text) for name, text in texts.items()
        }
        paths["smtp_sasl_password_maps"].chmod(0o600)
        instance.configure(**{name: str(path) for name, path in paths.items()})
        result = instance.run("sendmail", "-bC", user="root")
        assert (result.code, result.out) == (78, "")
        told = [line.partition(":")[2] for line in result.err.splitlines()]
        for name, number in zip(texts, (2, 2, 1)):
            assert told.pop(0).startswith(f" {name}: {paths[name]}:{number}: ")
        instance.start()
        for name, path in paths.items():
            shape = rf"minimta/master\[\d+\]: warning: {name}: {path}:\d: "
            assert re.search(shape, instance.log())
        paths["smtp_sasl_password_maps"].chmod(0o644)
        paths["transport_maps"].unlink()
        err = instance.run("sendmail", "-bC", user="root").err
        assert "transport_maps: " in err and "others can read it: chmod 600 " in err

    @pytest.mark.parametrize("line", OPTION_ANSWERS)
    def test_what_reads_no_message_answers(self, instance, line):
        code, out = OPTION_ANSWERS[line]
        result = instance.run("minimta.py", *line.split(), user="root")
        assert (result.code, result.out) == (code, out)
        if code:
            assert_one_clear_line(result, code)
        else:
            assert result.err == ""

    @pytest.mark.parametrize("name", MORE_HEADERS)
    def test_who_is_named_in_a_header_gets_it(self, shared, name):
        header, code, wanted = MORE_HEADERS[name]
        token = new_token()
        result = shared.run("sendmail", "-t", stdin=f"{header}\nX-T: {token}\n\nb\n")
        if code:
            assert_one_clear_line(result, code)
        else:
            assert (result.code, result.err) == (0, "")
        shared.wait_empty()
        got = [user for user in LOCAL_USERS if shared.with_token(user, token)]
        assert sorted(got) == sorted(wanted.split())

    def test_arguments_are_added_to_those_of_the_header(self, shared):
        token = new_token()
        shared.sendmail("-t", "payam", stdin=f"To: user2\n{letter(token)}")
        for user in ("payam", "user2"):
            assert shared.wait_message(user, token)

    def test_fields_that_are_the_mailers_go_without_t_too(self, shared):
        token = new_token()
        gone = "Bcc: user2\nResent-Bcc: a@b\nReturn-Path: <a@b>\nContent-Length: 5\n"
        shared.sendmail("payam", stdin=gone + letter(token))
        message = shared.wait_message("payam", token)
        assert [fields(message, one) for one in ("Bcc", "Resent-Bcc")] == [[], []]
        assert fields(message, "Content-Length") == []
        assert fields(message, "Return-Path") == [f"<payam@{HOST}>"]
        assert shared.with_token("user2", token) == []

    def test_malformed_and_foreign_fields_stay(self, shared):
        token = new_token()
        kept = (
            "Date: junk\nMessage-ID: junk\nSender: s@x.example\nFull-Name: q\n"
            "Envelope-to: e@x.example\nDelivered-To: f@x.example\nStatus: RO\n"
        )
        shared.sendmail("payam", stdin=kept + letter(token))
        assert kept in shared.wait_message("payam", token)

    def test_what_is_missing_comes_behind_the_header(self, shared):
        token = new_token()
        shared.sendmail("payam", stdin=letter(token))
        head, _ = head_and_body(shared.wait_message("payam", token))
        names = [line.split(":")[0] for line in head.splitlines()]
        assert names[-4:] == ["Subject", "Message-ID", "Date", "From"]

    def test_a_resent_message_gets_resent_fields(self, shared):
        token = new_token()
        given = "Resent-To: payam\nFrom: a@b.example\nDate: d\nMessage-ID: <m>\n"
        shared.sendmail("-t", stdin=given + letter(token))
        head, _ = head_and_body(shared.wait_message("payam", token))
        names = [line.split(":")[0] for line in head.splitlines()]
        assert names[-3:] == ["Subject", "Resent-Message-ID", "Resent-Date"]

    @pytest.mark.parametrize("name", FULL_NAMES)
    def test_a_full_name_is_quoted_where_it_must_be(self, shared, name):
        token = new_token()
        shared.sendmail("-F", name, "payam", stdin=letter(token), user="user1")
        message = shared.wait_message("payam", token)
        assert fields(message, "From") == [f"{FULL_NAMES[name]} <user1@{HOST}>"]
        assert fields(message, "Bcc") == []

    @pytest.mark.parametrize("gecos", GECOS)
    def test_a_full_name_comes_from_the_passwd_file(self, instance, gecos):
        rows = (instance.root / "etc/passwd").read_text(encoding="utf-8")
        rows = rows.replace(":user2:", f":{gecos}:")
        instance.write("etc/passwd", rows)
        instance.sendmail("-odi", "payam", stdin=letter("named"), user="user2")
        (message,) = instance.with_token("payam", "named")
        assert fields(message, "From") == [f"{GECOS[gecos]} <user2@{HOST}>"]

    @pytest.mark.parametrize("sender", SENDERS)
    def test_a_sender_is_an_address_or_nobody(self, shared, sender):
        token, wanted = new_token(), SENDERS[sender]
        words = ("-f", sender, "payam")
        result = shared.run("sendmail", *words, stdin=letter(token))
        if wanted == 65:
            assert_one_clear_line(result, wanted)
        else:
            message = shared.wait_message("payam", token)
            assert fields(message, "Return-Path") == [wanted]

    @pytest.mark.parametrize("name", OPTION_INPUTS)
    def test_input_of_any_shape_is_a_message(self, instance, name):
        text, value, wanted = OPTION_INPUTS[name]
        instance.sendmail("-odi", "payam", stdin=text)
        (message,) = instance.messages("payam")
        _, body = head_and_body(message)
        assert fields(message, "X-A") == ([] if value is None else [value])
        assert body == wanted + "\n"

    @pytest.mark.parametrize("word", WORDS)
    def test_a_recipient_is_an_address_and_nothing_else(self, shared, word):
        token, code = new_token(), WORDS[word]
        result = shared.run("sendmail", "--", word, stdin=letter(token))
        if code:
            assert_one_clear_line(result, code)
            assert shared.queued() == []
        else:
            assert (result.code, result.err) == (0, "")
            assert shared.wait_message("payam", token)

    def test_one_who_is_named_in_many_ways_gets_one(self, shared):
        token = new_token()
        words = ("payam", "payam", "PAYAM", f"payam@{HOST}", "payam@localhost")
        shared.sendmail(*words, stdin=letter(token))
        assert shared.wait_message("payam", token)

    @pytest.mark.parametrize("reads_header", [False, True], ids=["words", "-t"])
    def test_10_000_recipients_are_taken(self, instance, reads_header):
        names = [f"u{number}@far.example" for number in range(10_000)]
        header = f"To: {','.join(names)}\n".replace(",", ",\n ")
        words = ["-t"] if reads_header else names
        text = (header if reads_header else "") + letter("many")
        instance.sendmail("-odq", *words, stdin=text)
        shown = instance.mailq()
        assert shown.count("@far.example\n") == 10_000
        assert shown.endswith("in 1 Request.\n")

    def test_51_received_fields_are_a_loop_that_bounces(self, server):
        text = "Received: by x.example\n" * 51 + letter("round")
        server.sendmail("user1", stdin=text, user="payam")
        report = server.wait_message("payam", "Status: 5.4.6")
        assert fields(report, "Return-Path") == ["<>"]
        assert server.messages("user1") == []

    @pytest.mark.parametrize("end", ["\r\n", "\n"], ids=["CRLF", "LF"])
    @pytest.mark.parametrize("is_up", [False, True], ids=["no daemon", "daemon"])
    def test_bs_takes_a_message(self, instance, is_up, end):
        if is_up:
            instance.start()
        lines = ("MAIL FROM:<a@b>", "RCPT TO:<payam>", "DATA", "X-A: x", "", "one", ".")
        text = end.join((*lines, "QUIT", ""))
        result = instance.run("sendmail", "-bs", stdin=text)
        assert (result.code, result.err) == (0, "")
        codes = [line[:3] for line in result.out.splitlines()]
        assert codes == "220 250 250 354 250 221".split()
        _, body = head_and_body(instance.wait_message("payam", "X-A: x"))
        assert body == "one\n\n"

    @pytest.mark.parametrize("name", SESSIONS)
    def test_bs_answers_and_ends_well(self, shared, name):
        text, codes = SESSIONS[name]
        token = new_token()
        result = shared.run("sendmail", "-bs", stdin=text.replace("TOKEN", token))
        assert (result.code, result.err) == (0, "")
        assert [line[:3] for line in result.out.splitlines()] == codes.split()
        shared.wait_empty()
        assert shared.with_token("payam", token) == []

    @needs_root
    def test_root_may_say_what_the_log_calls_us(self, instance):
        words = ("sendmail", "-odq", "-Lbackup", "user1")
        instance.run(*words, stdin="x\n", user="root")
        instance.start()
        instance.run(*words, stdin="x\n", user="payam", preexec_fn=become("payam"))
        found = re.findall(r" (\S+)/pickup\[\d+\]: .*uid=(\d+)", instance.log())
        assert found == [("backup", "0"), ("minimta", str(uid_of("payam")))]

    @pytest.mark.parametrize("words", VERDICTS)
    def test_bv_prints_sendmails_words(self, shared, words):
        result = shared.run("sendmail", "-bv", *words.split())
        assert (result.code, result.out) == VERDICTS[words]

    @pytest.mark.parametrize("text", ALIAS_FILES)
    @pytest.mark.parametrize("program", ["newaliases", "sendmail -bi"])
    def test_newaliases_says_what_it_made_of_a_file(self, instance, program, text):
        code, out, err = ALIAS_FILES[text]
        path = instance.root / "etc/aliases"
        path.write_bytes(text.encode())
        result = instance.run(*program.split())
        assert result.code == code
        assert result.out.startswith(f"{path}: {out}" if out else "")
        assert bool(result.out) == bool(out)
        assert (f"{path}, line {err}" in result.err) if err else not result.err

    @pytest.mark.parametrize("words", ["-oA{}", "-oA {}", "-OAliasFile={}"])
    def test_bi_builds_the_file_that_is_named(self, instance, words):
        path = instance.write("etc/others", "z: payam\n")
        result = instance.run("sendmail", "-bi", *words.format(path).split())
        assert (result.code, result.err) == (0, "")
        assert result.out == f"{path}: 1 aliases, longest 5 bytes, 6 bytes total\n"

    @pytest.mark.parametrize("words", ["sendmail -bd", "sendmail -bD", "smtpd"])
    @needs_root
    def test_a_user_is_no_daemon(self, instance, public_bin, words):
        how = {"user": "user1", "preexec_fn": become("user1"), "bin_dir": public_bin}
        result = instance.run("minimta.py", *words.split(), **how)
        assert_one_clear_line(result, 77)

    @pytest.mark.parametrize("words", ["mailq", "mailq -j", "sendmail -q"])
    @needs_root
    def test_without_a_daemon_a_user_learns_that_it_is_down(
        self, server, public_bin, words
    ):
        assert server.stop() == 0
        how = {"user": "user1", "preexec_fn": become("user1"), "bin_dir": public_bin}
        assert_one_clear_line(server.run("minimta.py", *words.split(), **how), 69)

    @pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here")
    @pytest.mark.parametrize("name", SURROUNDINGS)
    @needs_root
    def test_mail_goes_out_of_any_surroundings(self, server, public_bin, name):
        flags, first = SURROUNDINGS[name]
        folder = server.root / "closed"
        folder.mkdir(mode=0o700)
        command = f'{first}; exec "$0" payam'
        words = ["setpriv", *flags.split(), "--regid=5001", "--clear-groups"]
        done = subprocess.run(
            [*words, "/bin/sh", "-c", command, public_bin / "sendmail"],
            input=letter("out").encode(),
            capture_output=True,
            env=server.env("user1"),
            cwd=folder if "directory" in name else "/",
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        uid = re.search(r"=(\d+)", flags).group(1)
        message = server.wait_message("payam", "out")
        assert f"from userid {uid})" in fields(message, "Received")[0]
        assert f": uid={uid} from=<" in server.log()


# A few names of every kind that aliases(5) knows, and who gets their mail.
ALIASES = r"""
# A comment, and a line that looks like one in the middle of an entry.
plain: payam
commented: user1      # like this, payam
UPPER: payam
spaced  :   user1
continued: user1,
    user2
broken: user1,
# a comment between
    user2
tab:	user1
"quoted name": user2
"hash#name": user2
several: user1, user2,payam
address: user1@localhost
chain1: chain2
chain2: chain3, user2
chain3: payam
backslash: \user1
both: chain3, payam
root: user2
"""

EXPANDED = {
    "plain": "payam",
    "commented": "user1",
    "upper": "payam",
    "PLAIN": "payam",
    "spaced": "user1",
    "continued": "user1 user2",
    "broken": "user1 user2",
    "tab": "user1",
    '"quoted name"': "user2",
    '"hash#name"': "user2",
    "several": "user1 user2 payam",
    "address": "user1",
    "chain1": "user2 payam",
    "backslash": "user1",
    "both": "payam",
    "root": "user2",
    "postmaster": "user2",
    "mailer-daemon": "user2",
    "MAILER-DAEMON": "user2",
    "abuse": "user2",
    "plain@localhost": "payam",
    f"plain@{HOST}": "payam",
}

# A line that newaliases refuses, after one that is well.
BAD_ALIASES = {
    "no colon": "no colon here",
    "no target": "empty:",
    "no name": ": payam",
    "an open quote": 'open: "payam',
    "a continuation of nothing": None,
}


@pytest.fixture(scope="class")
def aliased(bin_dir):
    """A running instance with ALIASES, after newaliases."""
    one = Instance(bin_dir)
    one.aliases(ALIASES)
    assert one.run("newaliases").code == 0
    yield one.start()
    one.close()


def database(instance):
    """The files of the alias database, with what is in them."""
    found = sorted((instance.root / "etc").rglob("aliases.db*"))
    return {path: path.read_bytes() for path in found if path.is_file()}


class TestAliases:
    """The aliases file, its database, and what each name comes to."""

    @pytest.mark.parametrize("name, wanted", EXPANDED.items(), ids=EXPANDED)
    def test_who_gets_the_mail(self, aliased, name, wanted):
        token = new_token()
        aliased.sendmail("--", name, stdin=letter(token))
        for user in wanted.split():
            aliased.wait_message(user, token)
        for user in {"root", *LOCAL_USERS} - set(wanted.split()):
            assert aliased.with_token(user, token) == []

    @pytest.mark.parametrize("name", ["postmaster", "mailer-daemon", "abuse"])
    def test_a_built_in_alias_goes_to_root(self, shared, name):
        token = new_token()
        shared.sendmail(name, stdin=letter(token))
        shared.wait_message("root", token)

    def test_the_file_overrules_a_built_in_alias(self, server):
        server.aliases("postmaster: payam\n")
        assert server.run("newaliases").code == 0
        server.sendmail("postmaster", stdin=letter("mine"))
        server.wait_message("payam", "mine")
        assert server.messages("root") == []

    def test_newaliases_says_what_it_built(self, instance):
        instance.aliases("# comment\nlpic1: root\nroot: payam # me\n")
        result = instance.run("newaliases")
        path = instance.root / "etc/aliases"
        assert (result.code, result.err) == (0, "")
        shape = r": 2 aliases, longest 5 bytes, \d+ bytes total\n"
        assert re.fullmatch(re.escape(str(path)) + shape, result.out)
        assert database(instance)

    @pytest.mark.parametrize("line", BAD_ALIASES.values(), ids=BAD_ALIASES)
    def test_a_bad_line_is_named_and_the_old_database_stays(self, instance, line):
        instance.aliases("good: payam\n")
        assert instance.run("newaliases").code == 0
        before = database(instance)
        text = f"good: user1\n{line}\n" if line else "\n    user1\ngood: user1\n"
        instance.aliases(text)
        result = instance.run("newaliases")
        path = instance.root / "etc/aliases"
        assert (result.code, result.out) == (65, "")
        shape = re.escape(str(path)) + r", line 2: \S.*\n"
        assert re.search(shape, result.err), result
        assert "Traceback" not in result.err
        assert database(instance) == before
        instance.sendmail("-odi", "good", stdin=letter("old"))
        assert len(instance.with_token("payam", "old")) == 1

    def test_a_loop_is_a_warning_and_the_rest_works(self, server):
        server.aliases("good: payam\nping: pong\npong: ping\n")
        result = server.run("newaliases")
        assert result.code == 0, result
        assert "3 aliases" in result.out
        assert re.search(r"line [23]\b.*loop|loop.*line [23]\b", result.err), result
        server.sendmail("good", stdin=letter("fine"))
        server.wait_message("payam", "fine")

    def test_mail_into_a_loop_is_refused(self, server):
        server.aliases("ping: pong\npong: ping\n")
        server.run("newaliases")
        result = server.run("sendmail", "ping", stdin=letter("round"))
        assert_one_clear_line(result, 78)
        assert "loop" in result.err
        assert server.queued() == []

    def test_mail_into_a_loop_among_others_bounces(self, server):
        server.aliases("ping: pong\npong: ping\nall: ping, user2\n")
        server.run("newaliases")
        server.sendmail("all", stdin=letter("round"), user="payam")
        server.wait_message("user2", "round")
        report = server.wait_message("payam", "round")
        assert fields(report, "Return-Path") == ["<>"]
        assert "5.4.6" in report

    def test_an_alias_to_nobody_is_refused(self, server):
        server.aliases("ghost: nosuchuser\n")
        server.run("newaliases")
        result = server.run("sendmail", "ghost", stdin=letter("boo"))
        assert_one_clear_line(result, 67)
        assert server.queued() == []

    def test_a_missing_file_is_66(self, instance):
        (instance.root / "etc/aliases").unlink()
        assert_one_clear_line(instance.run("newaliases"), 66)

    def test_a_directory_is_66(self, instance):
        (instance.root / "etc/aliases").unlink()
        (instance.root / "etc/aliases").mkdir()
        assert_one_clear_line(instance.run("newaliases"), 66)

    def test_mail_still_flows_when_the_file_is_a_directory(self, instance):
        (instance.root / "etc/aliases").unlink()
        (instance.root / "etc/aliases").mkdir()
        instance.start()
        with (
            instance.smtp() as client,
            pytest.raises(smtplib.SMTPRecipientsRefused) as e,
        ):
            client.sendmail("a@example.com", "payam@localhost", letter("not yet"))
        assert e.value.recipients["payam@localhost"][0] == 451
        instance.sendmail("payam", stdin=letter("even so"))
        instance.wait_reason("etc/aliases: Is a directory")
        (instance.root / "etc/aliases").rmdir()
        assert instance.run("sendmail", "-q", user="root").code == 0
        instance.wait_message("payam", "even so")

    def test_an_older_database_rules_and_the_log_says_so(self, server):
        server.aliases("news: user1\n")
        server.run("newaliases")
        server.aliases("news: user2\n")
        later = time.time() + 60
        os.utime(server.root / "etc/aliases", (later, later))
        server.sendmail("news", stdin=letter("stale"))
        server.wait_message("user1", "stale")
        assert server.messages("user2") == []
        assert re.search(r"aliases.* older ", server.log())

    def test_newaliases_takes_effect_at_once(self, server):
        for user in ("user1", "user2"):
            server.aliases(f"news: {user}\n")
            assert server.run("newaliases").code == 0
            server.sendmail("news", stdin=letter(f"for {user}"))
            server.wait_message(user, f"for {user}")

    def test_without_a_database_the_text_rules(self, server):
        server.aliases("news: user1\n")
        server.sendmail("news", stdin=letter("text"))
        server.wait_message("user1", "text")
        server.aliases("news: user2\n")
        server.sendmail("news", stdin=letter("edited"))
        server.wait_message("user2", "edited")

    def test_an_unreadable_database_is_ignored_for_the_text(self, server):
        server.aliases("news: user1\n")
        server.run("newaliases")
        for path in database(server):
            path.write_bytes(b"not a database of any kind\n")
        server.aliases("news: user2\n")
        server.sendmail("news", stdin=letter("text"))
        server.wait_message("user2", "text")


# A .forward of user1 -> who gets mail to user1.
FORWARDS = {
    "a user": ("user2\n", "user2"),
    "an address": ("user2@localhost\n", "user2"),
    "several": ("user2, payam\n", "user2 payam"),
    "several lines": ("user2\npayam\n", "user2 payam"),
    "a comment": ("# home\nuser2\n", "user2"),
    "oneself with a backslash": ("\\user1\n", "user1"),
    "a copy": ("\\user1, user2\n", "user1 user2"),
    "nothing": ("", "user1"),
}


class TestForward:
    """~/.forward"""

    @pytest.mark.parametrize("text, wanted", FORWARDS.values(), ids=FORWARDS)
    def test_who_gets_the_mail(self, server, text, wanted):
        server.forward("user1", text)
        server.send("user1@localhost", letter("on"))
        for user in wanted.split():
            server.wait_message(user, "on")
        for user in set(LOCAL_USERS) - set(wanted.split()):
            assert server.messages(user) == []

    def test_an_alias_and_a_forward_that_name_oneself_are_no_loop(self, server):
        server.aliases("user1: user1, user2\n")
        server.run("newaliases")
        server.forward("user1", "user1, payam\n")
        server.send("user1@localhost", letter("self"))
        for user in LOCAL_USERS:
            server.wait_message(user, "self")

    def test_one_users_many_spellings_are_read_once(self, server):
        server.forward("user1", ", ".join(f"user2+{n}" for n in range(500)))
        server.forward("user2", ", ".join(f"payam+{n}" for n in range(500)))
        server.send("user1@localhost", letter("many"))
        server.wait_message("payam", "many")

    def test_a_chain_is_followed(self, server):
        server.forward("user1", "user2\n")
        server.forward("user2", "payam\n")
        server.send("user1@localhost", letter("on"))
        message = server.wait_message("payam", "on")
        delivered = " ".join(fields(message, "Delivered-To"))
        for user in LOCAL_USERS:
            assert f"{user}@" in delivered
        assert server.messages("user2") == []

    @pytest.mark.parametrize("second", ["user1\n", "user1@localhost\n"])
    def test_a_loop_bounces_and_ends(self, server, second):
        server.forward("user1", "user2\n")
        server.forward("user2", second)
        server.sendmail("user1", stdin=letter("round"), user="payam")
        report = server.wait_message("payam", "round")
        assert fields(report, "Return-Path") == ["<>"]
        assert "loop" in report
        server.wait_empty()

    @pytest.mark.parametrize("mode", [0o666, 0o664])
    def test_one_that_others_can_write_is_not_followed(self, server, mode):
        server.forward("user1", "user2\n", mode)
        server.send("user1@localhost", letter("trap"))
        wait_for(lambda: server.messages("user1") or ")\n" in server.mailq())
        assert server.messages("user2") == []

    @needs_root
    def test_one_of_somebody_else_is_not_followed(self, server):
        path = server.forward("user1", "user2\n")
        os.chown(path, UIDS["user2"], UIDS["user2"])
        server.send("user1@localhost", letter("trap"))
        wait_for(lambda: server.messages("user1") or ")\n" in server.mailq())
        assert server.messages("user2") == []

    @needs_root
    def test_a_file_that_only_root_can_read_is_not_read_for_a_user(self, server):
        secret = server.write("secret", "user2\n")
        secret.chmod(0o600)
        (server.home("user1") / ".forward").symlink_to(secret)
        server.send("user1@localhost", letter("trap"))
        wait_for(lambda: server.messages("user1") or ")\n" in server.mailq())
        assert server.messages("user2") == []


# What the client says, and how each answer begins.
DIALOGUES = {
    "a message in order": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250 2.1.0
        C: RCPT TO:<payam@localhost>
        S: 250 2.1.5
        C: DATA
        S: 354
        C: Subject: hello
        C:
        C: text
        C: .
        S: 250 2.0.0
        C: QUIT
        S: 221 2.0.0
    """,
    "HELO is enough": """
        S: 220
        C: HELO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: RCPT TO:<payam@localhost>
        S: 250
    """,
    "verbs may be small letters": """
        S: 220
        C: ehlo client.example
        S: 250
        C: mail from:<friend@example.com>
        S: 250
        C: rcpt to:<payam@localhost>
        S: 250
    """,
    "DATA needs a sender": """
        S: 220
        C: EHLO client.example
        S: 250
        C: DATA
        S: 503 5.5.1
    """,
    "DATA needs a recipient": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: DATA
        S: 503 5.5.1
    """,
    "RCPT needs a sender": """
        S: 220
        C: EHLO client.example
        S: 250
        C: RCPT TO:<payam@localhost>
        S: 503 5.5.1
    """,
    "one sender at a time": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: MAIL FROM:<other@example.com>
        S: 503 5.5.1
    """,
    "RSET forgets the sender": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: RSET
        S: 250 2.0.0
        C: RCPT TO:<payam@localhost>
        S: 503 5.5.1
    """,
    "EHLO again forgets the sender": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: EHLO client.example
        S: 250
        C: RCPT TO:<payam@localhost>
        S: 503 5.5.1
    """,
    "EHLO needs a name": """
        S: 220
        C: EHLO
        S: 501 5.5.4
    """,
    "an unknown local user is refused": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: RCPT TO:<nosuchuser@localhost>
        S: 550 5.1.1
        C: RCPT TO:<nosuchuser>
        S: 550 5.1.1
        C: RCPT TO:<payam@localhost>
        S: 250
    """,
    "an address never becomes a file, a command or an include": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: RCPT TO:<"/tmp/never"@localhost>
        S: 550 5.1.1
        C: RCPT TO:<"|cat"@localhost>
        S: 550 5.1.1
        C: RCPT TO:<":include:/etc/passwd"@localhost>
        S: 550 5.1.1
        C: RCPT TO:<../payam@localhost>
        S: 5
    """,
    "aliases and postmaster without a domain are known": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<>
        S: 250
        C: RCPT TO:<alias1@localhost>
        S: 250
        C: RCPT TO:<postmaster>
        S: 250
        C: RCPT TO:<Postmaster>
        S: 250
    """,
    "broken addresses are refused": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:friend at example
        S: 501 5.
        C: MAIL FROM:<friend@example.com
        S: 501 5.
        C: MAIL FROM:<friend@example.com>
        S: 250
        C: RCPT TO:<>
        S: 501 5.
        C: RCPT TO:<payam@localhost
        S: 501 5.
        C: RCPT payam@localhost
        S: 501 5.
    """,
    "unknown parameters are refused": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com> COLOUR=blue
        S: 555 5.5.4
        C: MAIL FROM:<friend@example.com> SIZE=100 BODY=8BITMIME SMTPUTF8
        S: 250
        C: RCPT TO:<payam@localhost> COLOUR=blue
        S: 555 5.5.4
    """,
    "a size over the limit is refused at MAIL": """
        S: 220
        C: EHLO client.example
        S: 250
        C: MAIL FROM:<friend@example.com> SIZE=50001
        S: 552 5.3.4
        C: MAIL FROM:<friend@example.com> SIZE=49000
        S: 250
    """,
    "unknown commands are counted and refused": """
        S: 220
        C: FROBNICATE
        S: 50
        C: NOOP
        S: 250
        C: GET / HTTP/1.1
        S: 500 5.5.2
    """,
    "VRFY tells nothing": """
        S: 220
        C: EHLO client.example
        S: 250
        C: VRFY payam
        S: 252
        C: VRFY nosuchuser
        S: 252
    """,
    "HELP, NOOP and QUIT answer at any time": """
        S: 220
        C: HELP
        S: 214
        C: NOOP
        S: 250 2.0.0
        C: QUIT
        S: 221 2.0.0
    """,
}

BEGIN = """
    S: 220
    C: EHLO client.example
    S: 250
    C: MAIL FROM:<friend@example.com>
    S: 250
    C: RCPT TO:<payam@localhost>
    S: 250
    C: DATA
    S: 354
"""

# What some servers take for the end of DATA, and this one must not.
FALSE_ENDS = {
    "LF.LF": b"\n.\n",
    "LF.CRLF": b"\n.\r\n",
    "CR.CRLF": b"\r.\r\n",
    "CR.CR": b"\r.\r",
    "CR.LF": b"\r.\n",
    "LF.CR": b"\n.\r",
    "CRLF.LF": b"\r\n.\n",
    "CRLF.CR": b"\r\n.\r",
    "CRLF.CRCRLF": b"\r\n.\r\r\n",
    "a bare LF": b"\n",
    "a bare CR": b"\r",
}


def in_one(wire, data):
    wire.send(data)


def byte_by_byte(wire, data):
    for byte in data:
        wire.send(bytes((byte,)))


class TestSmtp:
    """The SMTP server."""

    @pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
    def test_dialogue(self, shared, dialogue):
        with Wire(shared.port) as wire:
            play(wire, dialogue)

    def test_ehlo_lists_what_can_be_done(self, shared):
        with Wire(shared.port) as wire:
            play(wire, "S: 220\nC: EHLO client.example")
            words = {line[4:] for line in wire.whole_answer()[1:]}
        assert words == {
            "PIPELINING",
            "SIZE 50000",
            "8BITMIME",
            "ENHANCEDSTATUSCODES",
            "SMTPUTF8",
            "DSN",
            "CHUNKING",
            "HELP",
        }

    def test_the_greeting_is_the_host_name(self, shared):
        with Wire(shared.port) as wire:
            assert wire.answer().startswith(f"220 {HOST} ESMTP")

    def test_quit_closes_the_connection(self, shared):
        with Wire(shared.port) as wire:
            play(wire, "S: 220\nC: QUIT\nS: 221")
            assert wire.lines.readline() == b""

    def test_what_arrives(self, shared):
        token = new_token()
        shared.send("payam@localhost", f"Subject: {token}\r\n\r\none\r\n..two\r\n")
        message = shared.wait_message("payam", token)
        assert re.match(rf"From friend@example\.com  {ASCTIME} \d{{4}}\n", message)
        assert fields(message, "Return-Path") == ["<friend@example.com>"]
        assert fields(message, "X-Original-To") == ["payam@localhost"]
        (delivered,) = fields(message, "Delivered-To")
        assert delivered.startswith("payam@")
        (received,) = fields(message, "Received")
        assert re.search(r"from client\.example .*127\.0\.0\.1.* by \S+ ", received)
        assert re.search(r" with ESMTP id [0-9A-Z]{10}\b", received)
        assert head_and_body(message)[1] == "one\n..two\n\n"
        assert message.index("Return-Path") < message.index("Received")

    @pytest.mark.parametrize("cut", [in_one, byte_by_byte])
    def test_pipelined_commands_are_answered_in_order(self, shared, cut):
        token = new_token()
        with Wire(shared.port) as wire:
            play(wire, "S: 220\nC: EHLO client.example\nS: 250")
            cut(
                wire,
                b"MAIL FROM:<friend@example.com>\r\n"
                b"RCPT TO:<nosuchuser@localhost>\r\n"
                b"RCPT TO:<payam@localhost>\r\n"
                b"DATA\r\n",
            )
            assert [wire.answer()[:3] for _ in range(4)] == "250 550 250 354".split()
            cut(wire, letter(token).replace("\n", "\r\n").encode())
            cut(wire, b".\r\nNOOP\r\nQUIT\r\n")
            assert [wire.answer()[:3] for _ in range(3)] == "250 250 221".split()
        shared.wait_message("payam", token)

    def test_two_messages_in_one_packet(self, shared):
        token = new_token()
        one = letter(token).replace("\n", "\r\n").encode() + b".\r\n"
        start = b"MAIL FROM:<>\r\nRCPT TO:<payam>\r\nDATA\r\n"
        with Wire(shared.port) as wire:
            assert wire.answer()[:3] == "220"
            wire.send(b"EHLO client.example\r\n" + (start + one) * 2 + b"QUIT\r\n")
            codes = [wire.answer()[:3] for _ in range(10)]
        assert codes == "250 250 250 354 250 250 250 354 250 221".split()
        wait_for(lambda: len(shared.with_token("payam", token)) == 2)

    @pytest.mark.parametrize("cut", [in_one, byte_by_byte])
    @pytest.mark.parametrize("end", FALSE_ENDS.values(), ids=FALSE_ENDS)
    def test_a_bare_cr_or_lf_refuses_the_message_whole(self, shared, end, cut):
        token = new_token()
        smuggled = (
            b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<payam@localhost>\r\nDATA\r\n"
            b"Subject: smuggled\r\n\r\ntext"
        )
        first = letter(token).strip().replace("\n", "\r\n").encode()
        with Wire(shared.port) as wire:
            play(wire, BEGIN)
            cut(wire, first + end + smuggled + b"\r\n.\r\nNOOP\r\n")
            play(wire, "S: 550 5.5.2\nS: 250 2.0.0\nC: QUIT\nS: 221")
        shared.wait_empty()
        assert shared.with_token("payam", token) == []
        assert shared.with_token("payam", "smuggled") == []

    def test_a_command_that_ends_with_a_bare_lf_is_refused(self, shared):
        with Wire(shared.port) as wire:
            play(wire, "S: 220")
            wire.send(b"EHLO client.example\n")
            play(wire, "S: 500 5.5.2")

    @pytest.mark.parametrize("size", [2000, 100_000])
    def test_a_line_that_is_too_long_is_one_error(self, shared, size):
        with Wire(shared.port) as wire:
            play(wire, "S: 220")
            wire.send(b"NOOP " + b"x" * size + b"\r\nNOOP\r\n")
            play(wire, "S: 500 5.5.\nS: 250\nC: QUIT\nS: 221")

    def test_a_message_over_the_limit_is_refused_and_the_session_goes_on(self, shared):
        with Wire(shared.port) as wire:
            play(wire, BEGIN)
            wire.send(LOREM.replace("\n", "\r\n").encode() * 2000 + b".\r\n")
            play(wire, "S: 552 5.3.4\nC: NOOP\nS: 250\nC: QUIT\nS: 221")
        assert shared.queued() == []

    def test_a_message_without_its_end_is_not_kept(self, shared):
        token = new_token()
        with Wire(shared.port) as wire:
            play(wire, BEGIN)
            wire.send(letter(token).replace("\n", "\r\n").encode())
        shared.send("payam@localhost", letter("whole" + token))
        shared.wait_message("payam", "whole" + token)
        assert len(shared.with_token("payam", token)) == 1
        wait_for(lambda: not os.listdir(shared.queue / "incoming"))

    def test_eight_bits_arrive_unchanged(self, shared):
        token = new_token()
        raw = bytes(range(128, 256))
        with shared.smtp() as client:
            client.sendmail(
                "friend@example.com",
                "payam@localhost",
                (letter(token).encode() + raw + b"\n").replace(b"\n", b"\r\n"),
                ["BODY=8BITMIME"],
            )
        text = raw.decode("utf-8", "surrogateescape")
        assert text in shared.wait_message("payam", token)

    def test_an_address_may_be_utf_8(self, shared):
        token = new_token()
        with shared.smtp() as client:
            client.sendmail(
                "пользователь@example.com",
                "payam@localhost",
                letter(token),
                ["SMTPUTF8", "BODY=8BITMIME"],
            )
        message = shared.wait_message("payam", token)
        assert fields(message, "Return-Path") == ["<пользователь@example.com>"]

    def test_relaying_is_for_mynetworks(self, instance):
        instance.configure(mynetworks="192.0.2.0/24")
        instance.start()
        with Wire(instance.port) as wire:
            play(
                wire,
                """
                S: 220
                C: EHLO client.example
                S: 250
                C: MAIL FROM:<friend@example.com>
                S: 250
                C: RCPT TO:<other@example.com>
                S: 554 5.7.1
                C: RCPT TO:<other%example.com@localhost>
                S: 55
                C: RCPT TO:<@localhost:other@example.com>
                S: 55
                C: RCPT TO:<payam@localhost>
                S: 250
                """,
            )

    def test_mynetworks_may_relay(self, shared):
        with Wire(shared.port) as wire:
            play(wire, "S: 220\nC: EHLO client.example\nS: 250")
            play(wire, "C: MAIL FROM:<friend@example.com>\nS: 250")
            play(wire, "C: RCPT TO:<other@example.com>\nS: 250\nC: RSET\nS: 250")

    def test_many_connections_at_once_all_get_through(self, shared):
        token = new_token()
        errors = []

        def client(number):
            try:
                shared.send("payam@localhost", letter(f"{token}.{number}."))
            except (OSError, smtplib.SMTPException) as error:
                errors.append(error)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        for number in range(40):
            shared.wait_message("payam", f"{token}.{number}.")


@pytest.fixture(scope="session")
def certificate():
    """The path of a certificate with its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    folder = open_directory("minimta-cert-")
    path = folder / "cert.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=localhost".split()
    made = ["openssl", *words, "-keyout", folder / "key", "-out", folder / "cert"]
    subprocess.run(made, check=True, capture_output=True)
    path.write_text((folder / "key").read_text() + (folder / "cert").read_text())
    yield path
    shutil.rmtree(folder)


CERTIFICATES = {
    # name: (subject, names, year of its end)
    "good": ("mx.far.example", "DNS:*.far.example,DNS:localhost,IP:127.0.0.1", 2049),
    "expired": ("mx.far.example", "DNS:*.far.example,DNS:localhost", 2021),
    "wrong name": ("other.example", "DNS:other.example", 2049),
}
AUTHORITY = """
[ca]
default_ca = ours
[ours]
database = index
new_certs_dir = .
serial = serial
default_md = sha256
unique_subject = no
policy = any
[any]
commonName = supplied
"""


@pytest.fixture(scope="session")
def certificates():
    """Paths of certificates by name, each with its key; `ca` is who signed."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    folder = open_directory("minimta-certs-")
    for name, text in (("ca.cnf", AUTHORITY), ("index", ""), ("serial", "01\n")):
        (folder / name).write_text(text)

    def openssl(*words):
        subprocess.run(
            ["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60
        )

    def request(name, subject, *words):
        key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes".split()
        files = ("-keyout", f"{name}.key", "-out", name, "-subj", f"/CN={subject}")
        openssl("req", "-new", *key, *files, *words)

    request("ca", "minimta tests", "-x509", "-days", "9")
    request("self-signed", "mx.far.example", "-x509", "-days", "9")
    for name, (subject, names, year) in CERTIFICATES.items():
        request(f"{name}.req", subject)
        (folder / "names").write_text(f"subjectAltName = {names}\n")
        words = "ca -batch -notext -config ca.cnf -cert ca -keyfile ca.key"
        dates = f"-startdate 20200102000000Z -enddate {year}0203000000Z"
        files = ("-in", f"{name}.req", "-out", name, "-extfile", "names")
        openssl(*words.split(), *dates.split(), *files)
        (folder / f"{name}.req.key").rename(folder / f"{name}.key")
    paths = {"ca": folder / "ca"}
    for name in ("self-signed", *CERTIFICATES):
        paths[name] = folder / f"{name}.pem"
        both = (folder / f"{name}.key").read_text() + (folder / name).read_text()
        paths[name].write_text(both)
    yield paths
    shutil.rmtree(folder)


def trusting():
    """A TLS context that asks for no names."""
    return ssl._create_unverified_context()


@pytest.fixture
def secure(make_instance, certificate):
    """A daemon with TLS and a password, to whom this host is a stranger."""
    made = make_instance()
    made.tls_port = free_port()
    passwords = made.root / "etc/passwords"
    owner = pwd.getpwnam("nobody").pw_gid
    minimta.Passwords(str(passwords)).change("bob", b"right", owner)
    made.configure(
        mynetworks="192.0.2.0/24",
        smtpd_tls_cert_file=certificate,
        smtpd_tls_port=made.tls_port,
        smtpd_sasl_password_file=passwords,
    )
    passwords.chmod(0o644)
    return made.start()


def hang_up_hard(wire):
    """Ends a connection with a reset."""
    end_hard(wire.socket)
    wire.lines.close()
    wire.socket.close()


class TestSecureSmtp:
    """TLS and passwords, over real sockets."""

    def test_mail_arrives_after_starttls(self, secure):
        with secure.smtp() as client:
            client.starttls(context=trusting())
            client.sendmail("a@far.example", "payam@localhost", letter("one"))
        assert " with ESMTPS id " in secure.wait_message("payam", "one")

    def test_mail_arrives_at_the_tls_port(self, secure):
        place = ("127.0.0.1", secure.tls_port, "c.example")
        with smtplib.SMTP_SSL(*place, timeout=9, context=trusting()) as client:
            client.sendmail("a@far.example", "payam@localhost", letter("one"))
        assert "(using TLSv1.3 with cipher" in secure.wait_message("payam", "one")

    def test_who_has_authenticated_may_relay_and_nobody_else(self, secure):
        with secure.smtp() as client:
            client.starttls(context=trusting())
            client.ehlo()
            client.mail("a@far.example")
            assert client.rcpt("b@other.example")[0] == 554
            client.rset()
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.login("bob", "wrong")
            assert client.login("bob", "right")[0] == 235
            client.mail("a@far.example")
            assert client.rcpt("b@other.example")[0] == 250

    def test_what_comes_with_starttls_is_dropped(self, secure):
        with Wire(secure.port) as wire:
            play(wire, "S: 220\nC: EHLO c\nS: 250")
            wire.send(b"STARTTLS\r\nRSET\r\nNOOP\r\n")
            play(wire, "S: 220")
            with trusting().wrap_socket(wire.socket) as made:
                made.sendall(b"MAIL FROM:<a@b>\r\n")
                assert made.recv(999).startswith(b"503 ")

    def test_silent_handshakes_stop_nobody(self, secure):
        wires = [Wire(secure.tls_port) for _ in range(20)]
        secure.send("payam@localhost", letter("one"))
        secure.wait_message("payam", "one")
        for wire in wires:
            wire.__exit__()

    def test_garbage_in_a_handshake_ends_one_session(self, secure):
        for port in (secure.tls_port, secure.port):
            with Wire(port) as wire:
                if port == secure.port:
                    play(wire, "S: 220\nC: STARTTLS\nS: 220")
                wire.send(b"\x16\x03\x01garbage" * 99)
                with contextlib.suppress(ConnectionError):
                    while wire.socket.recv(999):
                        pass
        secure.send("payam@localhost", letter("one"))
        secure.wait_message("payam", "one")

    def test_resets_at_the_tls_port_leave_no_connection(self, secure):
        for _ in range(100):
            wire = Wire(secure.tls_port)
            wire.send(b"x")
            hang_up_hard(wire)
        secure.send("payam@localhost", letter("one"))
        secure.wait_message("payam", "one")
        with Wire(secure.port) as wire:
            play(wire, "S: 220")


def chunked(*chunks):
    """A message in BDAT chunks."""
    rows = [b"BDAT %d\r\n%s" % (len(chunk), chunk) for chunk in chunks[:-1]]
    return b"".join(rows) + b"BDAT %d LAST\r\n%s" % (len(chunks[-1]), chunks[-1])


def held(port, count):
    """`count` greeted connections."""
    wires = [Wire(port) for _ in range(count)]
    for wire in wires:
        play(wire, "S: 220")
    return wires


class TestManyClients:
    """Chunks, strangers, limits, and clients that are slow or deaf."""

    @pytest.mark.parametrize("cut", [in_one, byte_by_byte])
    def test_chunks_arrive_byte_by_byte_as_they_were(self, shared, cut):
        token = new_token()
        text = [b"Subject: %s\r" % token.encode(), b"\n\r\n.\r", b"\n..x\r\n"]
        with Wire(shared.port) as wire:
            play(wire, BEGIN.replace("C: DATA\n    S: 354", ""))
            cut(wire, chunked(*text) + b"NOOP\r\n")
            assert [wire.answer()[:3] for _ in range(4)] == ["250"] * 4
        assert head_and_body(shared.wait_message("payam", token))[1] == ".\n..x\n\n"

    @pytest.mark.parametrize("size", [262_144, 300_000, 900_000, 2_000_000])
    def test_a_long_message_arrives_without_one_line_more(self, server, size):
        token = new_token()
        server.send("payam@localhost", letter(token, "y" * size))
        body = head_and_body(server.wait_message("payam", token))[1]
        assert body == "y" * size + "\n\n"

    def test_rset_between_chunks_forgets_them(self, server):
        with Wire(server.port) as wire:
            play(wire, BEGIN.replace("C: DATA\n    S: 354", ""))
            wire.send(b"BDAT 300000\r\n" + b"x" * 300_000 + b"RSET\r\n")
            play(wire, "S: 250\nS: 250\nC: BDAT 0 LAST\nS: 503\nC: QUIT\nS: 221")
        assert os.listdir(server.queue / "incoming") == []

    def test_a_stranger_who_does_not_wait_gets_no_transaction(self, make_instance):
        one = make_instance(mynetworks="192.0.2.0/24").start()
        with Wire(one.port) as wire:
            wire.send(b"EHLO c\r\nMAIL FROM:<a@b>\r\n")
            assert wire.answer().startswith("554 5.5.0")
            assert wire.lines.readline() == b""
        assert "PREGREET" in one.log()

    @pytest.mark.parametrize(("network", "is_free"), [("192.0.2.0/24", 0), ("", 1)])
    def test_a_stranger_has_so_many_connections(self, make_instance, network, is_free):
        how = {"mynetworks": network or "127.0.0.0/8"}
        one = make_instance(smtpd_client_connection_count_limit=5, **how).start()
        wait_for(lambda: one.log().count("disconnect from") == 1)
        wires = held(one.port, 5)
        with Wire(one.port) as wire:
            play(wire, "S: 220" if is_free else "S: 421 4.7.0")
        for wire in wires:
            wire.__exit__()

    def test_beyond_the_limit_is_421_until_there_is_room(self, make_instance):
        one = make_instance(default_process_limit=20).start()
        wait_for(lambda: one.log().count("disconnect from") == 1)
        wires = held(one.port, 20)
        with Wire(one.port) as wire:
            play(wire, "S: 421 4.7.0")
        for wire in wires:
            hang_up_hard(wire)
        wait_for(lambda: one.log().count("disconnect from") == 21)
        one.send("payam@localhost", letter("one"))
        one.wait_message("payam", "one")

    def test_300_idle_connections_take_little_memory(self, server):
        _, pid, _ = parts(server)
        before = memory_of(pid)
        wires = held(server.port, 300)
        server.send("payam@localhost", letter("one"))
        server.wait_message("payam", "one")
        each = (memory_of(pid) - before) / 300
        for wire in wires:
            wire.__exit__()
        assert each < 64 << 10

    def test_a_client_that_reads_no_replies_stops_nobody(self, server):
        with Wire(server.port) as wire:
            play(wire, "S: 220")
            wire.socket.settimeout(1)
            with pytest.raises(socket.timeout):  # noqa: UP041 none before 3.10
                while True:
                    wire.send(b"EHLO c\r\n" * 1000)
            server.send("payam@localhost", letter("one"))
            server.wait_message("payam", "one")

    def test_a_slow_sender_stops_nobody(self, server):
        with Wire(server.port) as wire:
            play(wire, BEGIN)
            wire.send(b"Subject: slow\r\n")
            server.send("payam@localhost", letter("one"))
            server.wait_message("payam", "one")
            server.hang_up()
            server.send("payam@localhost", letter("two"))
            server.wait_message_only("payam", "two")
            play(wire, "C:\nC: .\nS: 250 2.0.0")
        server.wait_message("payam", "slow")

    def test_a_reset_in_the_middle_leaves_nothing(self, server):
        for _ in range(30):
            wire = Wire(server.port)
            play(wire, BEGIN)
            wire.send(b"x" * 70_000)
            hang_up_hard(wire)
        wait_for(lambda: server.log().count("lost connection after DATA") == 30)
        assert os.listdir(server.queue / "incoming") == []


def identity(pid):
    """(uids, gids, groups) of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    rows = (re.search(rf"(?m)^{name}:(.*)", text) for name in ("Uid", "Gid", "Groups"))
    return [[int(word) for word in row.group(1).split()] for row in rows]


@needs_root
class TestIdentities:
    """Whose the daemon's processes are."""

    def test_each_process_has_the_rights_it_needs(self, public_bin):
        one = Instance(public_bin, mail_owner="nobody")
        try:
            master, server, runner = parts(one.start())
            who = pwd.getpwnam("nobody")
            assert identity(master)[0] == [0] * 4
            assert identity(runner)[0][0] == 0
            uids, gids, groups = identity(server)
            assert (uids, gids) == ([who.pw_uid] * 4, [who.pw_gid] * 4)
            assert set(groups) <= {who.pw_gid}
        finally:
            one.close()


# The end of a mailbox that a crash has left.
TORN = {
    "half a line": "half a li",
    "no empty line": "whole line\n",
    "a run of NULs": "whole line\n\n" + "\0" * 3000,
    "half a line and NULs": "half a li" + "\0" * 5000,
    "half a From_ line": "whole line\n\nFrom user2@exam",
    "a bare From": "whole line\n\nFrom ",
}
FIRST = "From user2@example.com  Wed Feb 19 05:10:00 2020\nSubject: first\n\n"


def wait_deferred(server, token):
    """A message to payam that is deferred; mailq's answer with the reason."""
    server.send("payam@localhost", letter(token))
    shown = server.wait_reason(")\n")
    assert "status=deferred" in server.log()
    return shown


class TestMailbox:
    """Delivery into the mailbox of a user."""

    def test_a_new_mailbox_is_private_and_the_users(self, server):
        server.send("payam@localhost", letter("new"))
        server.wait_message("payam", "new")
        found = server.mailbox("payam").stat()
        assert oct(found.st_mode & 0o777) == "0o600"
        assert found.st_uid == (UIDS["payam"] if AS_ROOT else os.getuid())

    def test_messages_end_with_one_empty_line(self, server):
        for number in range(3):
            server.send("payam@localhost", letter(f"no {number}", "text", "", ""))
            server.wait_message("payam", f"no {number}")
        data = server.mailbox("payam").read_text()
        assert len(read_mbox(data.encode())) == 3
        assert re.search(r"\n\n\Z", data)

    def test_no_lock_is_left_behind(self, server):
        server.send("payam@localhost", letter("new"))
        server.wait_message("payam", "new")
        wait_for(lambda: os.listdir(server.root / "var/mail") == ["payam"])

    def test_a_mailbox_that_is_a_symlink_is_deferred(self, server):
        target = server.write("precious", "precious\n")
        server.give(target, "payam")
        box = server.mailbox("payam")
        box.parent.mkdir(parents=True, exist_ok=True)
        box.symlink_to(target)
        wait_deferred(server, "trap")
        assert "is a symbolic link" in server.mailq()
        assert target.read_text() == "precious\n"
        assert box.is_symlink()

    def test_a_mailbox_that_is_a_directory_is_deferred(self, server):
        box = server.mailbox("payam")
        box.mkdir(parents=True)
        server.give(box, "payam")
        wait_deferred(server, "trap")
        assert os.listdir(box) == []

    def test_a_mailbox_that_is_a_fifo_is_deferred(self, server):
        server.mailbox("payam").parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(server.mailbox("payam"))
        server.give(server.mailbox("payam"), "payam")
        wait_deferred(server, "trap")

    def test_a_mailbox_with_a_second_name_is_deferred(self, server):
        box = server.make_mailbox("payam", "")
        os.link(box, server.root / "other-name")
        wait_deferred(server, "trap")
        assert box.read_text() == ""

    @needs_root
    def test_a_mailbox_of_somebody_else_is_deferred(self, server):
        box = server.make_mailbox("payam", "")
        os.chown(box, UIDS["user2"], UIDS["user2"])
        wait_deferred(server, "trap")
        assert "does not belong to its user" in server.mailq()
        assert box.read_text() == ""

    def test_deferred_mail_is_delivered_when_the_reason_is_gone(self, instance):
        instance.configure(minimal_backoff_time="1s", maximal_backoff_time="1s")
        instance.start()
        instance.mailbox("payam").mkdir(parents=True)
        wait_deferred(instance, "patience")
        instance.mailbox("payam").rmdir()
        instance.wait_message("payam", "patience")

    def test_one_bad_mailbox_does_not_hold_up_the_others(self, server):
        server.mailbox("user1").mkdir(parents=True)
        server.sendmail("user1", "payam", stdin=letter("both"))
        wait_for(lambda: server.with_token("payam", "both"))
        shown = server.wait_reason(")\n")
        assert "user1@" in shown
        assert "payam@localhost\n" not in shown.split(")\n")[-1]
        assert len(server.with_token("payam", "both")) == 1

    def test_a_partial_append_is_cut_back(self, instance):
        old = FIRST + LOREM * 4000 + "\n"
        limit = len(old) + 20_000
        instance.start(limits=[(resource.RLIMIT_FSIZE, limit)])
        box = instance.make_mailbox("payam", old)
        instance.send("payam@localhost", letter("cut", LOREM * 1000))
        instance.wait_reason(")\n")
        assert box.read_text() == old
        assert instance.stop() == 0
        instance.start()
        instance.run("sendmail", "-q", user="root")
        instance.wait_message("payam", "cut")
        assert box.read_text().startswith(old)

    @pytest.mark.parametrize("tail", TORN.values(), ids=TORN)
    def test_a_torn_tail_does_not_hide_the_next_message(self, server, tail):
        server.make_mailbox("payam", FIRST + tail)
        server.send("payam@localhost", letter("second"))
        wait_for(lambda: not server.queued())
        data = server.mailbox("payam").read_bytes()
        messages = read_mbox(data)
        assert b"\0" not in data
        assert "Subject: first" in messages[0]
        assert fields(messages[-1], "Subject") == ["second"]
        assert re.search(r"\n\n\Z", "".join(messages[:-1]))
        if "half a li" in tail:
            assert "half a li" in messages[0]

    @pytest.mark.parametrize("tail", ["", "half a li", "\0" * 700])
    def test_every_reader_sees_what_comes_behind_a_torn_tail(self, instance, tail):
        box = instance.make_mailbox("payam", f"{FIRST}whole line\n\n{FIRST}{tail}")
        instance.start()
        instance.send("payam@localhost", letter("second"))
        instance.wait_message("payam", "second")
        seen = mbox(box, create=False)
        assert [text["Subject"] for text in seen] == ["first", "first", "second"]
        assert "whole line" in seen[0].get_payload()
        assert tail.strip("\0") in seen[1].get_payload()
        assert b"\0" not in box.read_bytes()

    def test_an_old_dotlock_of_a_dead_process_is_broken(self, server):
        dead = subprocess.Popen(["true"])
        dead.wait()
        lock = server.make_mailbox("payam", "").with_name("payam.lock")
        lock.write_text(f"{dead.pid}\n")
        server.give(lock, "payam")
        old = time.time() - 3600
        os.utime(lock, (old, old))
        server.send("payam@localhost", letter("free"))
        server.wait_message("payam", "free")

    def test_a_locked_mailbox_waits_for_its_lock(self, instance):
        instance.configure(minimal_backoff_time="1s", maximal_backoff_time="1s")
        instance.start()
        box = instance.make_mailbox("payam", "")
        with open(box, "r+b") as held:
            fcntl.lockf(held, fcntl.LOCK_EX)
            instance.send("payam@localhost", letter("locked"))
            instance.send("user1@localhost", letter("free"))
            wait_for(lambda: instance.with_token("user1", "free"))
            assert box.stat().st_size == 0  # to read and close it would unlock it
            wait_for(lambda: len(instance.queued()) == 1)
        instance.wait_message("payam", "locked")


class TestRelay:
    """Mail for other hosts, through a relayhost."""

    def test_remote_mail_goes_to_the_relayhost(self, instance, make_sink):
        sink = make_sink()
        relayed(instance, sink)
        text = letter("far", ".", "..", "From here", "grüße")
        instance.sendmail("-i", "friend@example.com", stdin=text, user="payam")
        instance.wait_empty()
        ((sender, recipients, data),) = sink.received
        assert f"<payam@{HOST}>" in sender
        assert recipients == ["friend@example.com"]
        assert b"\r\n\r\n..\r\n...\r\nFrom here\r\n" in data
        assert "grüße".encode() in data
        assert not re.search(rb"(?<!\r)\n", data)
        assert b"Return-Path:" not in data
        assert instance.mailq() == "Mail queue is empty\n"
        shape = r"to=<friend@example\.com>, relay=\S*127\.0\.0\.1\S*, .*status=sent"
        assert re.search(shape, instance.log())

    def test_a_server_without_esmtp_is_spoken_to_in_smtp(self, instance, make_sink):
        sink = make_sink(EHLO="502 5.5.1 What?")
        relayed(instance, sink)
        instance.sendmail("friend@example.com", stdin=letter("old"))
        instance.wait_empty()
        assert len(sink.received) == 1

    def test_recipients_of_one_message_go_together(self, instance, make_sink):
        sink = make_sink()
        relayed(instance, sink)
        words = ("a@example.com", "b@example.com", "c@example.net")
        instance.sendmail(*words, stdin=letter("all"))
        instance.wait_empty()
        ((_, recipients, _),) = sink.received
        assert sorted(recipients) == sorted(words)

    @pytest.mark.parametrize(
        "verb, answer",
        [
            ("CONNECT", "421 4.3.2 Not now, dear"),
            ("CONNECT", "554 5.3.2 Not now, dear"),
            ("MAIL", "451 4.3.0 Not now, dear"),
            ("RCPT", "450 4.2.1 Not now, dear"),
            ("DATA", "451 4.3.0 Not now, dear"),
            ("END", "452 4.3.1 Not now, dear"),
        ],
    )
    def test_not_now_is_deferred_with_what_was_said(
        self, instance, make_sink, verb, answer
    ):
        sink = make_sink(**{verb: answer})
        relayed(instance, sink)
        instance.sendmail("friend@example.com", stdin=letter("later"), user="payam")
        shown = instance.wait_reason("Not now, dear")
        assert "friend@example.com" in shown
        assert sink.received == []
        assert instance.messages("payam") == []
        assert "status=deferred" in instance.log()

    def test_deferred_mail_is_tried_again(self, instance, make_sink):
        sink = make_sink(MAIL=["451 4.3.0 Not now", "250 2.1.0 Ok"])
        times = {"minimal_backoff_time": "1s", "maximal_backoff_time": "1s"}
        relayed(instance, sink, **times)
        instance.sendmail("friend@example.com", stdin=letter("later"))
        instance.wait_empty()
        assert len(sink.received) == 1

    def test_a_dead_relayhost_defers(self, instance):
        instance.configure(relayhost=f"[127.0.0.1]:{free_port()}")
        instance.start()
        instance.sendmail("friend@example.com", stdin=letter("later"))
        assert "refused" in instance.wait_reason(")\n").lower()

    @pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "END"])
    def test_never_is_bounced_to_the_sender(self, instance, make_sink, verb):
        sink = make_sink(**{verb: "550 5.7.99 Never, dear"})
        relayed(instance, sink)
        text = letter("unwanted")
        instance.sendmail("friend@example.com", stdin=text, user="payam")
        report = instance.wait_message("payam", "unwanted")
        assert "550 5.7.99 Never, dear" in re.sub(r"\s+", " ", report)
        assert "status=bounced" in instance.log()
        assert sink.received == []

    def test_each_recipient_ends_on_its_own(self, instance, make_sink):
        sink = make_sink(
            **{
                "RCPT TO:<bad@example.com>": "550 5.1.1 Never",
                "RCPT TO:<late@example.com>": "450 4.2.0 Not now",
            }
        )
        relayed(instance, sink)
        words = ("good@example.com", "bad@example.com", "late@example.com", "user1")
        instance.sendmail(*words, stdin=letter("each"), user="payam")
        wait_for(lambda: instance.with_token("payam", "each"))
        wait_for(lambda: instance.with_token("user1", "each"))
        shown = instance.wait_reason("Not now")
        assert "late@example.com" in shown
        assert "good@example.com" not in shown
        assert "bad@example.com" not in shown
        (report,) = instance.with_token("payam", "each")
        assert "bad@example.com" in report
        assert "good@example.com" not in report.split("Subject: each")[0]
        assert [recipients for _, recipients, _ in sink.received] == [
            ["good@example.com"]
        ]

    def test_a_sent_recipient_is_not_sent_again(self, instance, make_sink):
        sink = make_sink(
            **{"RCPT TO:<late@example.com>": ["450 4.2.0 Not now", "250 2.1.5 Ok"]}
        )
        times = {"minimal_backoff_time": "1s", "maximal_backoff_time": "1s"}
        relayed(instance, sink, **times)
        words = ("good@example.com", "late@example.com")
        instance.sendmail(*words, stdin=letter("each"))
        instance.wait_empty()
        found = [recipients for _, recipients, _ in sink.received]
        assert found == [["good@example.com"], ["late@example.com"]]

    def test_mail_from_the_network_is_relayed_for_mynetworks(self, instance, make_sink):
        sink = make_sink()
        relayed(instance, sink)
        instance.send("friend@example.com", letter("through"))
        instance.wait_empty()
        assert len(sink.received) == 1


# Addresses of this host that nobody else uses: a far side each, on one port.
FAR_NET = f"127.{random.randrange(1, 250)}.{random.randrange(250)}"
LEVELS = ("none", "may", "encrypt", "verify")
FAR_SIDES = 254


def start_hub(bin_dir, **settings):
    """A daemon that knows many far sides, each by its own domain.

    Mail for caseN.far.example goes to [FAR_NET.N], that for LEVEL.caseN to
    [hN.far.example] with that level of TLS.
    """
    one = Instance(bin_dir)
    one.far_port, one.cases = free_port(), itertools.count(1)
    hosts, routes = [], []
    for number in range(1, FAR_SIDES):
        hosts.append(f"{FAR_NET}.{number} h{number}.far.example\n")
        domain, port = f"case{number}.far.example", one.far_port
        routes.append(f"{domain} smtp:[{FAR_NET}.{number}]:{port}\n")
        hop = f"smtp:[h{number}.far.example]:{port}"
        routes += [f"{level}.{domain} {hop} {level}\n" for level in LEVELS]
    one.write("etc/hosts", "".join(hosts))
    routes = one.write("etc/transport", "".join(routes))
    one.configure(transport_maps=routes, **settings)
    return one.start()


@pytest.fixture(scope="class")
def hub(bin_dir):
    """A daemon that knows many far sides."""
    one = start_hub(bin_dir)
    yield one
    one.close()


@pytest.fixture
def far(hub, make_sink):
    """Makes a far side: its domain, and the sink that answers there."""

    def make(**how):
        number = next(hub.cases)
        sink = make_sink(place=(f"{FAR_NET}.{number}", hub.far_port), **how)
        return f"case{number}.far.example", sink

    return make


def wire_text(text):
    """Text as it is sent."""
    return re.sub("\r?\n", "\r\n", text).encode()


def post(instance, names, text):
    """Has payam send a message by SMTP."""
    data = text if isinstance(text, bytes) else wire_text(text)
    instance.send(names, data, sender=f"payam@{HOST}")


def told(instance, name):
    """What the log says of a recipient, as soon as it does."""
    shape = rf"to=<{re.escape(name)}>, .*status=.*\n"
    return wait_for(lambda: (re.findall(shape, instance.log()) or [""])[-1])


def outcomes(instance, *names):
    """What became of each recipient, as soon as that is known."""
    return [re.search(r"status=(\w+)", told(instance, name)).group(1) for name in names]


def arrived(data):
    """What was sent, without the dots that SMTP adds."""
    assert data.endswith(b"\r\n.\r\n")
    return re.sub(rb"(?m)^\.", b"", data[:-3])


def for_one(name, row):
    """A row for RCPT that is for one recipient only."""

    def answer(session, line):
        if f"<{name}@" not in line:
            return "250 2.1.5 Ok"
        return row(session, line) if callable(row) else row

    return answer


def after_354(session, _):
    """A row for DATA: goes when the message could come."""
    session.put(b"354 Go on\r\n")
    raise HangUp


def eager(session, _):
    """A row for DATA: takes a message though there is no recipient."""
    session.put(b"354 Go on\r\n")
    session.take_message()
    return b""


def in_the_middle(session, line):
    """A row for DATA: goes while the message comes."""
    session.put(b"354 Go on\r\n")
    session.rfile.read(20_000)
    reset(session, line)


def half_a_line(session, _):
    """A row: goes while the reply comes."""
    session.put(b"250 O")
    raise HangUp


def no_handshake(session, _):
    """A row for STARTTLS: says something else than TLS."""
    session.put(b"220 Go\r\n")
    session.rfile.read(1)
    session.put(b"What?\r\n")
    raise HangUp


def reset_handshake(session, line):
    """A row for STARTTLS: resets when the handshake begins."""
    session.put(b"220 Go\r\n")
    session.rfile.read(1)
    reset(session, line)


def kept_and_gone(session, _):
    """A row for END: keeps the message, and goes without a word."""
    session.keep()
    raise HangUp


BAD_ANSWERS = {
    "not now": "451 4.3.0 Not now",
    "never": "550 5.7.1 Never",
    "going": last_words("421 4.3.2 Going"),
    "gone": hang_up,
    "reset": reset,
    "another class": "354 Go on",
    "no class": "999 x",
    "two digits": "25 x",
    "no code": "abc",
    "two codes": b"250-a\r\n550 b\r\n",
}
STAGES = ("CONNECT", "EHLO", "MAIL", "a", "b", "c", "DATA", "END")
ODD_LIMITS = {
    "a superscript": b" \xb2",
    "superscripts behind a digit": b" 1\xb2\xb3",
    "Arabic digits": " \u0663".encode(),
    "nothing": b"",
    "a space": b" ",
    "a word": b" much",
    "less than nothing": b" -1",
    "a fraction": b" 1.5",
    "nil": b" 0",
    "very many digits": b" " + b"9" * 1900,
}

HOSTILE = {
    "a reply without end": endless(b"250-more\r\n" * 99),
    "a line without end": endless(b"2" * 9999),
    "a line of a megabyte": b"250 " + b"x" * (1 << 20) + b"\r\n",
    "NULs": b"\0" * 999 + b"\r\n",
    "half a line": half_a_line,
    "binary": bytes(range(128, 256)) + b"\r\n",
}


def fate(stage, kind):
    """What must become of a, b and c."""
    is_of_one = stage in ("a", "b", "c")
    is_reply = kind in ("not now", "never", "another class")
    if (stage, kind) == ("EHLO", "never"):  # then there is HELO
        return ["sent"] * 3
    if is_of_one and is_reply:
        bad = "bounced" if kind == "never" else "deferred"
        return [bad if name == stage else "sent" for name in "abc"]
    is_final = kind == "never" and stage != "CONNECT" and not is_of_one
    return ["bounced" if is_final else "deferred"] * 3


class TestRelayReplyTable:
    """Every answer at every stage, and what becomes of whom."""

    @pytest.mark.parametrize("kind", BAD_ANSWERS)
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_bad_answer_has_its_outcome(self, hub, far, stage, kind):
        row = BAD_ANSWERS[kind]
        if (stage, kind) == ("DATA", "another class"):
            row = "250 2.0.0 Ok"
        rows = {stage: row}
        if stage == "EHLO" and kind != "never":
            rows["HELO"] = row
        if stage in "abc":
            rows = {"RCPT": for_one(stage, row)}
        domain, sink = far(**rows)
        names = [f"{name}@{domain}" for name in "abc"]
        post(hub, names, letter("table"))
        wanted = fate(stage, kind)
        assert outcomes(hub, *names) == wanted
        sent = [name for name, how in zip(names, wanted) if how == "sent"]
        assert [recipients for _, recipients, _ in sink.received] == [sent] * bool(sent)

    def test_with_commands_one_by_one_it_is_the_same(self, hub, far):
        for kind in BAD_ANSWERS:
            row = BAD_ANSWERS[kind]
            domain, sink = far(RCPT=for_one("b", row), EHLO=hello("8BITMIME"))
            names = [f"{name}@{domain}" for name in "abc"]
            post(hub, names, letter("table"))
            assert outcomes(hub, *names) == fate("b", kind), kind
            assert sink.ahead == []

    @pytest.mark.parametrize("row", [after_354, in_the_middle])
    def test_who_goes_while_the_message_comes_gets_it_later(self, hub, far, row):
        domain, sink = far(DATA=[row, "354 Go on"])
        post(hub, [f"a@{domain}"], letter("cut", LOREM * 30_000))
        line = told(hub, f"a@{domain}")
        assert "status=deferred" in line
        assert "dsn=4.4.2" in line
        assert sink.received == []

    def test_who_goes_behind_the_dot_may_get_it_twice_and_that_is_said(self, hub, far):
        domain, sink = far(END=kept_and_gone)
        post(hub, [f"a@{domain}"], letter("twice"))
        line = told(hub, f"a@{domain}")
        assert "dsn=4.4.2" in line
        assert "status=deferred" in line
        assert "message may be sent more than once" in line
        assert len(sink.received) == 1

    @pytest.mark.parametrize(
        ("row", "outcome"),
        [("354 Go on", "deferred"), ("250 2.0.0 Ok\n250 2.0.0 And more", "sent")],
    )
    def test_who_says_too_much_or_waits_for_more_is_left(self, hub, far, row, outcome):
        domain, sink = far(END=[row, "250 2.0.0 Ok"])
        post(hub, [f"a@{domain}"], letter("out of step"))
        assert outcomes(hub, f"a@{domain}") == [outcome]
        post(hub, [f"b@{domain}"], letter("in step"))
        assert outcomes(hub, f"b@{domain}") == ["sent"]
        assert len(sink.clients) == 2

    def test_a_late_word_is_not_the_answer_to_the_next_question(self, hub, far):
        said = threading.Event()

        def late(session, _):
            def say():
                session.put(b"250 2.0.0 And more\r\n")
                said.set()

            threading.Timer(0.2, say).start()
            return "250 2.0.0 Ok"

        refuse = for_one("a", "550 5.1.1 Nobody")
        domain, sink = far(END=[late, "250 2.0.0 Ok"], RCPT=refuse)
        post(hub, [f"c@{domain}"], letter("first"))
        assert said.wait(PATIENCE)
        post(hub, [f"a@{domain}", f"b@{domain}"], letter("second"))
        assert outcomes(hub, f"a@{domain}", f"b@{domain}") == ["bounced", "sent"]

    def test_a_greeting_that_refuses_is_told_as_it_was_said(self, hub, far):
        domain, _ = far(CONNECT="554 5.7.1 Not today")
        post(hub, [f"a@{domain}"], letter("refused"))
        line = told(hub, f"a@{domain}")
        assert "status=deferred" in line
        assert "said: 554 5.7.1 Not today" in line

    def test_who_was_refused_stays_so_when_the_connection_ends(self, hub, far):
        refuse = for_one("a", "550 5.1.1 Nobody")
        gone = for_one("b", hang_up)
        domain, _ = far(
            RCPT=lambda session, line: (gone if "<b@" in line else refuse)(
                session, line
            )
        )
        names = [f"{name}@{domain}" for name in "abc"]
        post(hub, names, letter("refused"))
        assert outcomes(hub, *names) == ["bounced", "deferred", "deferred"]

    def test_354_for_nobody_gets_no_mail_and_no_command(self, hub, far):
        domain, sink = far(RCPT=for_one("a", "550 5.1.1 Nobody"), DATA=eager)
        post(hub, [f"a@{domain}"], letter("nobody"))
        assert outcomes(hub, f"a@{domain}") == ["bounced"]
        post(hub, [f"b@{domain}"], letter("somebody"))
        assert outcomes(hub, f"b@{domain}") == ["sent"]
        texts = [text for _, _, text in sink.received if text != b".\r\n"]
        assert len(texts) == 1
        assert b"Subject: somebody" in texts[0]

    def test_a_bad_answer_to_rset_costs_nobody_anything(self, hub, far):
        sides = [far(RSET=row) for row in BAD_ANSWERS.values()]
        for token in ("first", "second"):
            for domain, _ in sides:
                post(hub, [f"{token}@{domain}"], letter(token))
            for domain, _ in sides:
                assert outcomes(hub, f"{token}@{domain}") == ["sent"]
        for domain, sink in sides:
            found = [recipients for _, recipients, _ in sink.received]
            assert found == [[f"first@{domain}"], [f"second@{domain}"]]
        assert any("RSET" in sink.verbs() for _, sink in sides)

    def test_a_bad_answer_to_quit_has_nothing_sent_again(self, hub, far):
        sides = [far(QUIT=row) for row in BAD_ANSWERS.values()]
        for count in (1, 2):
            for domain, _ in sides:
                post(hub, [f"{count}@{domain}"], letter("quit"))
            for domain, sink in sides:
                assert outcomes(hub, f"{count}@{domain}") == ["sent"]
                wait_for(lambda one=sink, n=count: one.verbs().count("QUIT") >= n)
        for domain, sink in sides:
            found = [recipients for _, recipients, _ in sink.received]
            assert found == [[f"1@{domain}"], [f"2@{domain}"]]

    @pytest.mark.parametrize("kind", HOSTILE)
    @pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "RCPT", "END"])
    def test_who_answers_nonsense_without_end_is_left(self, hub, far, stage, kind):
        rows = {stage: HOSTILE[kind]}
        rows.update({"HELO": HOSTILE[kind]} if stage == "EHLO" else {})
        domain, sink = far(**rows)
        post(hub, [f"a@{domain}"], letter("hostile"))
        line = told(hub, f"a@{domain}")
        assert "status=deferred" in line
        assert len(line) < 2000
        wait_for(lambda: not sink.open)

    def test_what_a_host_says_can_do_nothing_to_the_reader(self, hub, far):
        domain, _ = far(RCPT=b"450 4.2.0 \0\x1b[31mred\x07\xff\r\n")
        post(hub, [f"a@{domain}"], letter("red"))
        assert "red" in told(hub, f"a@{domain}")
        assert not re.search(r"[\0-\x08\x0b-\x1f\x7f]", hub.log() + hub.mailq())

    def test_a_greeting_with_a_reply_too_many_has_nothing_lost(self, hub, far):
        domain, sink = far(CONNECT="220 sink.example ESMTP\n250 2.0.0 Kept")
        post(hub, [f"a@{domain}"], letter("too many"))
        (how,) = outcomes(hub, f"a@{domain}")
        assert how == ("sent" if sink.received else "deferred")

    def test_replies_that_drip_are_read(self, hub, far):
        domain, sink = far(is_dripping=True)
        post(hub, [f"a@{domain}"], letter("drip"))
        assert outcomes(hub, f"a@{domain}") == ["sent"]
        assert len(sink.received) == 1

    def test_extensions_that_make_no_sense_do_no_harm(self, hub, far):
        odd = (
            "SIZE",
            "SIZE x y",
            "AUTH",
            "AUTH=",
            "\x01\x02",
            "8BITMIME\x07",
            "=",
            "x" * 900,
        )
        domain, sink = far(EHLO=hello(*odd))
        post(hub, [f"a@{domain}"], letter("odd"))
        assert outcomes(hub, f"a@{domain}") == ["sent"]

    @pytest.mark.parametrize("limit", ODD_LIMITS.values(), ids=ODD_LIMITS)
    def test_a_size_that_is_no_number_is_no_limit(self, hub, far, limit):
        domain, sink = far(EHLO=b"250-sink.example\r\n250 SIZE" + limit + b"\r\n")
        post(hub, [f"a@{domain}"], letter("size"))
        assert "status=sent" in told(hub, f"a@{domain}")
        assert len(sink.received) == 1

    @pytest.mark.parametrize("code", ["530 5.7.0", "534 5.7.9", "538 5.7.11"])
    @pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA", "END"])
    def test_a_host_of_ours_that_wants_a_password_has_mail_wait(
        self, hub, far, stage, code
    ):
        domain, sink = far(**{stage: f"{code} Log in first"})
        post(hub, [f"a@{domain}"], letter("password"))
        assert outcomes(hub, f"a@{domain}") == ["deferred"]
        assert sink.received == []

    @pytest.mark.parametrize("row", ["530 5.7.0 Log in first", "554 5.7.1 No"])
    def test_a_relayhost_that_refuses_us_has_mail_wait(self, instance, make_sink, row):
        sink = make_sink(EHLO=row, HELO=row)
        post(relayed(instance, sink), ["a@far.example"], letter("refused"))
        assert outcomes(instance, "a@far.example") == ["deferred"]
        assert instance.messages("payam") == []

    @pytest.mark.parametrize(
        ("stage", "row", "status"),
        [
            ("CONNECT", "554 5.7.1 Not you", "4.7.1"),
            ("CONNECT", "554 Not you", "4.0.0"),
            ("MAIL", "530 5.7.0 Log in first", "4.7.0"),
            ("MAIL", "538 5.7.11 TLS first", "4.7.11"),
            ("RCPT", "552 5.5.3 Too many", "4.5.3"),
            ("MAIL", "450 4.7.1 Greylisted", "4.7.1"),
            # for good
            ("MAIL", "550 5.7.1 Never", "5.7.1"),
            # of another class than its code it says nothing
            ("MAIL", "450 5.7.1 Odd", "4.0.0"),
            ("MAIL", "550 4.7.1 Odd", "5.0.0"),
            ("MAIL", "530 4.7.0 Odd", "4.0.0"),
        ],
    )
    def test_what_is_softened_keeps_its_reason(self, hub, far, stage, row, status):
        domain, _ = far(**{stage: row})
        post(hub, [f"a@{domain}"], letter("softened"))
        word = "bounced" if status[0] == "5" else "deferred"
        line = told(hub, f"a@{domain}")
        assert f"dsn={status}, status={word}" in line
        assert row in line


# certificate, level -> whether mail goes, and whether with TLS
TLS_ROWS = [
    *((name, "none", "in clear") for name in ("good", "self-signed")),
    *((name, "may", "with TLS") for name in ("good", "expired", "self-signed")),
    *((name, "encrypt", "with TLS") for name in ("good", "wrong name", "self-signed")),
    ("good", "verify", "with TLS"),
    *((name, "verify", "not") for name in ("expired", "wrong name", "self-signed")),
    (None, "none", "in clear"),
    (None, "may", "in clear"),
    (None, "encrypt", "not"),
    (None, "verify", "not"),
]
NO_TLS_YET = ["EHLO", "STARTTLS"]


def way_of(sink):
    """How a sink got its one message, if it did."""
    if not sink.received:
        return "not"
    return "in clear" if any(line[:4] == "RCPT" for line in sink.clear) else "with TLS"


class TestRelayTls:
    """TLS to other hosts: when, with whom, and what is said when not."""

    @pytest.fixture(scope="class")
    def hub(self, bin_dir, certificates):
        one = start_hub(bin_dir, smtp_tls_CAfile=certificates["ca"])
        yield one
        one.close()

    @pytest.fixture
    def relay(self, make_instance, make_names, certificates):
        """Starts an instance with a relayhost, and localhost in its hosts."""

        def start(relayhost, **settings):
            one = make_instance()
            hosts = "127.0.0.1 localhost smart.far.example\n"
            make_names(one, {("smart.far.example", "MX"): []}, hosts)
            settings.setdefault("smtp_tls_CAfile", certificates["ca"])
            one.configure(relayhost=relayhost, **settings)
            return one.start()

        return start

    @pytest.mark.parametrize(("name", "level", "wanted"), TLS_ROWS)
    def test_a_level_has_its_way(self, hub, far, certificates, name, level, wanted):
        domain, sink = far(certificate=certificates.get(name))
        recipient = f"a@{level}.{domain}"
        post(hub, [recipient], letter("level"))
        how = "deferred" if wanted == "not" else "sent"
        assert outcomes(hub, recipient) == [how]
        assert way_of(sink) == wanted
        if wanted == "not":
            assert not {"MAIL", "RCPT"} & set(sink.verbs())

    @pytest.mark.parametrize("level", ["may", "encrypt", "check", "verify"])
    def test_a_python_without_ssl_has_no_tls(
        self, make_sink, certificates, monkeypatch, level
    ):
        sink = make_sink(certificate=certificates["good"])
        hop = minimta.NextHop("smtp", "localhost", sink.port)
        target = minimta.FarHost(hop, "localhost", "127.0.0.1")
        relay = minimta.Relay(make_settings(), target, level)
        monkeypatch.setitem(sys.modules, "ssl", None)
        contexts = minimta.Contexts("")
        if level == "may":
            relay.connect(contexts, None)
            assert relay.tls == ""
            relay.quit()
        else:
            with pytest.raises(minimta.MailError, match="ssl module") as caught:
                relay.connect(contexts, None)
            assert caught.value.status == "4.7.4"

    def test_who_wants_our_certificate_gets_may_in_clear(self, hub, far, certificates):
        domain, sink = far(certificate=certificates["good"])
        sink.context.verify_mode = ssl.CERT_REQUIRED
        sink.context.load_verify_locations(certificates["ca"])
        names = [f"a@encrypt.{domain}", f"a@{domain}"]
        for name in names:
            post(hub, [name], letter("certificate"))
        assert outcomes(hub, *names) == ["deferred", "sent"]
        assert "TLS with" in told(hub, names[0])

    def test_who_hangs_up_after_the_handshake_gets_may_in_clear(
        self, hub, far, certificates
    ):
        def no_word_over_tls(session, line):
            if session.is_secure:
                raise HangUp
            return "250 mx.far.example"

        domain, _ = far(certificate=certificates["good"], EHLO=no_word_over_tls)
        names = [f"a@encrypt.{domain}", f"a@{domain}"]
        for name in names:
            post(hub, [name], letter("hangs up"))
        assert outcomes(hub, *names) == ["deferred", "sent"]
        assert "TLS with" in told(hub, names[0])

    def test_a_route_without_a_level_is_may(self, hub, far, certificates):
        domain, sink = far(certificate=certificates["self-signed"])
        post(hub, [f"a@{domain}"], letter("route"))
        assert outcomes(hub, f"a@{domain}") == ["sent"]
        assert way_of(sink) == "with TLS"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("expired", ("mx.far.example", "2021", "expired")),
            ("wrong name", ("other.example", "2049")),
            ("self-signed", ("mx.far.example", "self")),
        ],
    )
    def test_a_failed_check_says_which_certificate_and_name_and_date(
        self, hub, far, certificates, name, words
    ):
        domain, _ = far(certificate=certificates[name])
        recipient = f"a@verify.{domain}"
        post(hub, [recipient], letter("check"))
        line = told(hub, recipient)
        assert "dsn=4.7.5" in line
        number = re.search("case([0-9]+)", domain).group(1)
        for word in (*words, f"h{number}.far.example"):
            assert word in line
        assert words[0] in hub.wait_reason(recipient)

    def test_the_host_hears_which_name_is_wanted(self, hub, far, certificates):
        domain, sink = far(certificate=certificates["good"])
        post(hub, [f"a@verify.{domain}"], letter("name"))
        assert outcomes(hub, f"a@verify.{domain}") == ["sent"]
        number = re.search("case([0-9]+)", domain).group(1)
        assert sink.names == [f"h{number}.far.example"]

    def test_what_was_offered_without_tls_counts_no_more(self, hub, far, certificates):
        domain, sink = far(
            certificate=certificates["good"],
            EHLO=lambda session, _: hello(
                "8BITMIME" if session.is_secure else "SIZE 9"
            ),
        )
        post(hub, [f"a@verify.{domain}"], letter("again"))
        assert outcomes(hub, f"a@verify.{domain}") == ["sent"]
        assert sink.verbs()[:4] == ["EHLO", "STARTTLS", "EHLO", "MAIL"]
        assert sink.ahead == []

    def test_replies_before_the_handshake_are_dropped(self, hub, far, certificates):
        domain, sink = far(
            certificate=certificates["good"],
            STARTTLS="220 2.0.0 Ready\n250-sink.example\n250 SIZE 9",
        )
        post(hub, [f"a@verify.{domain}"], letter("ahead"))
        assert outcomes(hub, f"a@verify.{domain}") == ["sent"]
        assert way_of(sink) == "with TLS"
        assert sink.verbs()[:4] == ["EHLO", "STARTTLS", "EHLO", "MAIL"]

    @pytest.mark.parametrize(
        "row",
        [
            "454 4.7.0 Not now",
            "502 5.5.1 What?",
            last_words("220 Go"),
            no_handshake,
            reset_handshake,
        ],
        ids=["later", "unknown", "gone", "garbage", "reset"],
    )
    @pytest.mark.parametrize(
        ("level", "how"), [("may", "sent"), ("encrypt", "deferred")]
    )
    def test_without_a_handshake_mail_goes_where_it_may(
        self, hub, far, row, level, how
    ):
        domain, sink = far(EHLO=hello("STARTTLS", "8BITMIME"), STARTTLS=row)
        recipient = f"a@{level}.{domain}"
        post(hub, [recipient], letter("handshake"))
        assert outcomes(hub, recipient) == [how]
        assert way_of(sink) == ("in clear" if how == "sent" else "not")

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("good", "with TLS"),
            ("expired", "not"),
            ("wrong name", "not"),
            ("self-signed", "not"),
            (None, "in clear"),  # on this host nobody listens in
        ],
    )
    def test_a_relayhost_is_checked(self, relay, make_sink, certificates, name, wanted):
        sink = make_sink(certificate=certificates.get(name))
        one = relay(f"[localhost]:{sink.port}")
        post(one, ["a@far.example"], letter("checked"))
        how = "deferred" if wanted == "not" else "sent"
        assert outcomes(one, "a@far.example") == [how]
        assert way_of(sink) == wanted
        if wanted == "not":
            assert [line.split()[0] for line in sink.clear[:2]] == NO_TLS_YET

    def test_an_address_is_checked_too(self, relay, make_sink, certificates):
        good = make_sink(certificate=certificates["good"])
        bad = make_sink(certificate=certificates["expired"])
        one = relay(f"[127.0.0.1]:{bad.port}, [127.0.0.1]:{good.port}")
        post(one, ["a@far.example"], letter("address"))
        assert outcomes(one, "a@far.example") == ["sent"]
        assert (way_of(bad), way_of(good)) == ("not", "with TLS")
        assert good.names == [None]

    def test_a_relayhost_elsewhere_must_have_tls(self, relay, make_sink):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                pytest.skip("this host has no other address")
            address = probe.getsockname()[0]
        sink = make_sink(place=(address, 0))
        one = relay(f"[{address}]:{sink.port}")
        post(one, ["a@far.example"], letter("elsewhere"))
        line = told(one, "a@far.example")
        assert "status=deferred" in line
        assert "TLS is required" in line
        assert "MAIL" not in sink.verbs()

    @pytest.mark.parametrize(
        ("name", "level", "wanted"),
        [
            ("self-signed", "none", "in clear"),
            ("self-signed", "encrypt", "with TLS"),
            ("wrong name", "may", "with TLS"),
            ("wrong name", "secure", "not"),
            (None, "verify", "not"),
            (None, "encrypt", "not"),
        ],
    )
    def test_the_setting_is_for_a_relayhost_too(
        self, relay, make_sink, certificates, name, level, wanted
    ):
        sink = make_sink(certificate=certificates.get(name))
        one = relay(f"[localhost]:{sink.port}", smtp_tls_security_level=level)
        post(one, ["a@far.example"], letter("setting"))
        how = "deferred" if wanted == "not" else "sent"
        assert outcomes(one, "a@far.example") == [how]
        assert way_of(sink) == wanted

    @pytest.mark.parametrize(
        ("name", "wanted"), [("good", True), ("wrong name", False)]
    )
    @pytest.mark.parametrize(
        "host", ["//smart.far.example", "//[smart.far.example]", "[smart.far.example]"]
    )
    def test_smtps_is_tls_from_the_start(
        self, relay, make_sink, certificates, name, wanted, host
    ):
        sink = make_sink(certificate=certificates[name], is_wrapped=True)
        one = relay(f"smtps:{host}:{sink.port}")
        post(one, ["a@far.example"], letter("start"))
        assert outcomes(one, "a@far.example") == ["sent" if wanted else "deferred"]
        assert sink.clear == []
        assert len(sink.received) == wanted
        assert sink.names[0] == "smart.far.example"

    def test_who_goes_behind_the_dot_is_no_success_with_tls_either(
        self, hub, far, certificates
    ):
        domain, sink = far(certificate=certificates["good"], END=kept_and_gone)
        post(hub, [f"a@verify.{domain}"], letter("dot"))
        line = told(hub, f"a@verify.{domain}")
        assert "dsn=4.4.2, status=deferred" in line
        assert "message may be sent more than once" in line

    def test_an_authority_nobody_told_of_is_not_trusted(
        self, relay, make_sink, certificates
    ):
        sink = make_sink(certificate=certificates["good"])
        one = relay(f"[localhost]:{sink.port}", smtp_tls_CAfile="")
        post(one, ["a@far.example"], letter("stranger"))
        assert "dsn=4.7.5" in told(one, "a@far.example")
        assert sink.received == []

    def test_without_its_authorities_nothing_is_sent(
        self, relay, make_sink, certificates
    ):
        sink = make_sink(certificate=certificates["good"])
        one = relay(f"[localhost]:{sink.port}", smtp_tls_CAfile="/nonexistent/ca")
        post(one, ["a@far.example"], letter("stranger"))
        line = told(one, "a@far.example")
        assert "status=deferred" in line
        assert "/nonexistent/ca" in line

    @needs_root
    def test_mail_hosts_of_a_domain_need_no_checked_certificate(
        self, make_instance, make_names, make_sink, certificates
    ):
        one, address = make_instance(), f"{FAR_NET}.200"
        rows = {
            ("far.example", "MX"): [("MX", (10, "mx.far.example"))],
            ("mx.far.example", "A"): [("A", address)],
        }
        make_names(one, rows)
        sink = make_sink(place=(address, 25), certificate=certificates["self-signed"])
        post(one.start(), ["a@far.example"], letter("domain"))
        assert outcomes(one, "a@far.example") == ["sent"]
        assert way_of(sink) == "with TLS"
        assert sink.names == ["mx.far.example"]

    @pytest.mark.parametrize(
        ("level", "name", "wanted"),
        [
            ("none", "good", "in clear"),
            ("none", None, "in clear"),
            ("encrypt", "self-signed", "with TLS"),
            ("encrypt", None, "not"),
            ("verify", "self-signed", "not"),
        ],
    )
    def test_a_relayhost_may_have_its_own_level(
        self, relay, make_sink, certificates, level, name, wanted
    ):
        sink = make_sink(certificate=certificates.get(name))
        one = relay(f"[smart.far.example]:{sink.port} {level}")
        post(one, ["a@x.example"], letter("level"))
        how = "deferred" if wanted == "not" else "sent"
        assert outcomes(one, "a@x.example") == [how]
        assert way_of(sink) == wanted

    def test_of_several_relayhosts_each_has_its_level(self, relay, make_sink):
        sinks = [make_sink(), make_sink()]
        hops = zip((f"[smart.far.example]:{one.port}" for one in sinks), LEVELS[2::-2])
        one = relay(", ".join(" ".join(hop) for hop in hops))
        post(one, ["a@x.example"], letter("levels"))
        assert outcomes(one, "a@x.example") == ["sent"]
        assert [len(sink.received) for sink in sinks] == [0, 1]
        assert way_of(sinks[0]) == "not"


SECRET = "s:e#c=ret"
ANY_MECHANISM = "PLAIN LOGIN CRAM-MD5 XOAUTH2"


def digest(secret):
    """The answer of CRAM-MD5 to the sink's challenge."""
    return hmac.new(secret.encode(), SinkHandler.CHALLENGE.encode(), "md5").hexdigest()


def disguises(secret, user="joe"):
    """A secret in every form in which it is sent."""
    token = f"user={user}\1auth=Bearer {secret}\1\1"
    keyed = f"{user} {digest(secret)}"
    sent = (secret, f"\0{user}\0{secret}", token, keyed)
    return (secret, digest(secret), *map(coded, sent))


SENT_AS = {
    "PLAIN": coded(f"\0joe\0{SECRET}"),
    "LOGIN": coded(SECRET),
    "CRAM-MD5": coded(f"joe {digest(SECRET)}"),
    "XOAUTH2": coded(f"user=joe\1auth=Bearer {SECRET}\1\1"),
}


class TestRelayAuth:
    """Passwords for other hosts."""

    @pytest.fixture
    def account(self, make_instance, make_names, make_sink, certificates):
        """Starts an instance with a password for its relayhost; as a pair."""

        def start(line=f"[localhost] joe:{SECRET}", settings=(), **how):
            mode, scheme = how.pop("mode", 0o600), how.pop("scheme", "")
            how.setdefault("mechanisms", ANY_MECHANISM)
            how.setdefault("certificate", certificates["good"])
            sink, one = make_sink(**how), make_instance()
            make_names(one, {}, "127.0.0.1 localhost\n")
            one.passwords = one.write("etc/sasl", line.format(sink.port) + "\n")
            one.passwords.chmod(mode)
            one.configure(
                relayhost=f"{scheme}[localhost]:{sink.port}",
                smtp_tls_CAfile=certificates["ca"],
                smtp_sasl_password_maps=one.passwords,
                **dict(settings),
            )
            return one.start(), sink

        return start

    @staticmethod
    def outcome(one):
        post(one, ["a@far.example"], letter("account"))
        return told(one, "a@far.example")

    @pytest.mark.parametrize("mechanism", ANY_MECHANISM.split())
    def test_every_mechanism_is_known(self, account, mechanism):
        one, sink = account(mechanisms=mechanism)
        assert "status=sent" in self.outcome(one)
        secret = digest(SECRET) if mechanism == "CRAM-MD5" else SECRET
        assert sink.logins == [Login(mechanism, "joe", secret, True)]

    @pytest.mark.parametrize(
        ("offered", "taken"),
        [
            (ANY_MECHANISM, "PLAIN"),
            ("CRAM-MD5 LOGIN", "LOGIN"),
            ("GSSAPI NTLM CRAM-MD5", "CRAM-MD5"),
            ("plain", "PLAIN"),
        ],
    )
    def test_of_several_mechanisms_the_simplest_is_taken(self, account, offered, taken):
        one, sink = account(mechanisms=offered)
        assert "status=sent" in self.outcome(one)
        assert [login.mechanism for login in sink.logins] == [taken]

    @pytest.mark.parametrize(
        ("secret", "token"),
        [
            ("ya29.a0AfB_by", "ya29.a0AfB_by"),
            ("eyJhbGciOi.J9.x-y", "eyJhbGciOi.J9.x-y"),
            ("Bearer abc.def", "abc.def"),
        ],
    )
    def test_a_token_is_no_password(self, account, secret, token):
        one, sink = account(f"[localhost] joe@gmail.example:{secret}")
        assert "status=sent" in self.outcome(one)
        assert sink.logins == [Login("XOAUTH2", "joe@gmail.example", token, True)]

    @pytest.mark.parametrize(
        "key", ["[localhost]:{}", "[localhost]", "localhost:{}", "localhost"]
    )
    def test_a_host_has_its_password(self, account, key):
        one, sink = account(f"other.example eve:wrong\n{key} joe:{SECRET}")
        assert "status=sent" in self.outcome(one)
        assert sink.logins == [Login("PLAIN", "joe", SECRET, True)]

    def test_a_password_that_has_expired_is_read_anew_with_the_next_mail(
        self, account, tmp_path
    ):
        (tmp_path / "token").write_text("old")
        command = {"smtp_sasl_password_command": f"cat {tmp_path}/token"}

        def login(session, line):
            _, _, secret = base64.b64decode(line.split()[2]).split(b"\0")
            is_known = secret == (tmp_path / "token").read_bytes()
            return "235 2.7.0 Yes" if is_known else "535 5.7.8 It has expired"

        one, sink = account("localhost joe", command, mechanisms="PLAIN", AUTH=login)
        post(one, ["a@far.example"], letter("before"))
        wait_for(lambda: sink.received)
        (tmp_path / "token").write_text("new")
        wait_for(lambda: not sink.open, 8)
        post(one, ["b@far.example"], letter("meets the old one"))
        assert "status=deferred" in told(one, "b@far.example")
        post(one, ["c@far.example"], letter("has the new one"))
        wait_for(lambda: len(sink.received) == 3)
        one.wait_empty()

    def test_an_echo_that_is_no_reply_shows_no_secret(self, account):
        def echo(session, line):
            return f"{SECRET}\r\n{line}\r\n".encode()

        one, _ = account(mechanisms="PLAIN", AUTH=echo)
        line = self.outcome(one)
        assert "'****' is no reply" in line
        for text in (one.log(), one.mailq()):
            assert [secret for secret in disguises(SECRET) if secret in text] == []

    def test_who_has_logged_in_sends_more_mail(self, account):
        one, sink = account()
        for count in (1, 2, 3):
            post(one, ["a@far.example"], letter("more"))
            wait_for(lambda n=count: len(sink.received) == n)
        assert (len(sink.clients), len(sink.logins)) == (1, 1)

    def test_with_tls_from_the_start_it_is_the_same(self, account):
        one, sink = account(scheme="smtps:", is_wrapped=True)
        assert "status=sent" in self.outcome(one)
        assert sink.logins == [Login("PLAIN", "joe", SECRET, True)]
        assert sink.clear == []

    def test_no_host_gets_the_password_of_another(self, account):
        one, sink = account(f"[localhost]:1 joe:{SECRET}\nother.example joe:{SECRET}")
        assert "status=sent" in self.outcome(one)
        assert sink.logins == []

    @pytest.mark.parametrize("level", ["", "none", "may", "encrypt"])
    @pytest.mark.parametrize("mechanism", ["PLAIN LOGIN", "XOAUTH2"])
    def test_no_password_goes_in_clear(self, account, level, mechanism):
        one, sink = account(
            certificate=None,
            is_careless=True,
            mechanisms=mechanism,
            settings={"smtp_tls_security_level": level},
        )
        line = self.outcome(one)
        assert "status=deferred" in line
        assert "dsn=4.7" in line
        assert sink.logins == []
        assert sink.received == []

    def test_no_password_goes_in_clear_when_tls_fails(self, account):
        one, sink = account(
            certificate=None,
            is_careless=True,
            mechanisms="PLAIN LOGIN XOAUTH2",
            EHLO=hello("STARTTLS"),
            STARTTLS=no_handshake,
            settings={"smtp_tls_security_level": "may"},
        )
        assert "status=deferred" in self.outcome(one)
        assert sink.verbs().count("EHLO") == 2
        assert (sink.logins, sink.received) == ([], [])

    def test_a_digest_may_go_in_clear(self, account):
        one, sink = account(
            certificate=None,
            is_careless=True,
            settings={"smtp_tls_security_level": "none"},
        )
        assert "status=sent" in self.outcome(one)
        assert sink.logins == [Login("CRAM-MD5", "joe", digest(SECRET), False)]

    def test_no_password_goes_to_a_stranger(self, account, certificates):
        one, sink = account(certificate=certificates["wrong name"])
        line = self.outcome(one)
        assert "dsn=4.7.5, status=deferred" in line
        assert sink.logins == []

    def test_without_auth_mail_waits(self, account):
        one, sink = account(mechanisms="")
        assert "dsn=4.7.8, status=deferred" in self.outcome(one)
        assert sink.received == []

    def test_the_password_may_come_from_a_command(self, account):
        command = f"printf 'joe:{SECRET}\\n'"
        one, sink = account("", settings={"smtp_sasl_password_command": command})
        assert "status=sent" in self.outcome(one)
        assert sink.logins == [Login("PLAIN", "joe", SECRET, True)]

    def test_a_command_may_have_the_password_of_a_named_user(self, account):
        command = f"printf 'ya29.{SECRET}\\n'"
        settings = {"smtp_sasl_password_command": command}
        one, sink = account("[localhost] joe", settings=settings)
        assert "status=sent" in self.outcome(one)
        assert sink.logins == [Login("XOAUTH2", "joe", f"ya29.{SECRET}", True)]

    @pytest.mark.parametrize("command", ["echo joe:x; exit 3", "true", "/nonexistent"])
    def test_a_command_that_fails_has_mail_wait(self, account, command):
        settings = {"smtp_sasl_password_command": command}
        one, sink = account("[localhost] joe", settings=settings)
        assert "status=deferred" in self.outcome(one)
        assert (sink.logins, sink.received) == ([], [])

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
    def test_a_file_that_others_can_read_is_refused(self, account, mode):
        one, sink = account(mode=mode)
        line = self.outcome(one)
        assert "dsn=4.7.8, status=deferred" in line
        assert f"chmod 600 {one.passwords}" in line
        assert sink.logins == []
        one.passwords.chmod(0o600)
        one.run("sendmail", "-q", user="root")
        wait_for(lambda: sink.received)

    @pytest.mark.parametrize("mechanism", ANY_MECHANISM.split())
    def test_a_refused_password_has_mail_wait_for_the_right_one(
        self, account, mechanism
    ):
        answers = ["535 5.7.8 No", "235 2.7.0 Welcome"]
        one, sink = account("[localhost] joe:wrong", mechanisms=mechanism, AUTH=answers)
        assert "dsn=4.7.8, status=deferred" in self.outcome(one)
        assert sink.received == []
        one.passwords.write_text(f"[localhost] joe:{SECRET}\n")
        one.run("sendmail", "-q", user="root")
        wait_for(lambda: sink.received)
        secret = digest(SECRET) if mechanism == "CRAM-MD5" else SECRET
        assert sink.logins[-1] == Login(mechanism, "joe", secret, True)
        assert one.messages("payam") == []

    @pytest.mark.parametrize(
        "code", ["454 4.7.0", "530 5.7.0", "534 5.7.9", "500 5.5.2"]
    )
    def test_no_answer_to_auth_bounces_mail(self, account, code):
        one, sink = account(AUTH=f"{code} No")
        assert "status=deferred" in self.outcome(one)
        assert sink.received == []

    @pytest.mark.parametrize("mechanism", ANY_MECHANISM.split())
    @pytest.mark.parametrize(
        "row",
        [
            "235 2.7.0 Welcome",
            "535 5.7.8 No",
            lambda session, line: f"535 5.7.8 Unknown: {line}",
        ],
        ids=["accepted", "refused", "said back"],
    )
    def test_no_secret_is_shown_to_anybody(self, account, mechanism, row):
        one, sink = account(mechanisms=mechanism, AUTH=row, END="450 4.2.0 Not now")
        assert "status=deferred" in self.outcome(one)
        shown = [
            one.run("minimta.py", *words)
            for words in (
                ("trace", "--last"),
                ("trace", "--last", "--json"),
                ("trace", *one.queued()),
            )
        ]
        assert [result.code for result in shown] == [0, 0, 0]
        assert f"AUTH {mechanism}" in shown[0].out
        texts = [one.log(), one.stderr(), one.mailq()]
        texts += [result.out + result.err for result in shown]
        for secret in disguises(SECRET):
            assert [text for text in texts if secret in text] == []

    @pytest.mark.parametrize("mechanism", ANY_MECHANISM.split())
    @pytest.mark.parametrize("stage", ["MAIL", "RCPT", "END"])
    @pytest.mark.parametrize("code", ["450 4.7.1", "550 5.7.1"])
    def test_a_secret_in_a_later_reply_is_shown_to_nobody(
        self, account, mechanism, stage, code
    ):
        row = f"{code} To {SECRET} or {SENT_AS[mechanism]}: no"
        one, _ = account(mechanisms=mechanism, **{stage: row})
        assert f"{code} To **** or ****: no" in self.outcome(one)
        if code.startswith("5"):
            one.wait_message("payam", "account")
        shown = one.run("minimta.py", "trace", "--last")
        assert f"\n  S: {code} To **** or ****: no\n" in shown.out
        texts = [one.log(), one.stderr(), one.mailq(), *one.messages("payam")]
        texts += [shown.out, one.run("minimta.py", "trace", "--last", "--json").out]
        joined = re.sub(r"\s", "", "\n".join(texts))  # a report has short lines
        assert joined.count("To****or****:no") > 3
        assert [secret for secret in disguises(SECRET) if secret in joined] == []

    @pytest.mark.parametrize("key", ["smtps://[localhost]:{}", "[localhost]:{}"])
    @pytest.mark.parametrize("scheme", ["smtps:", "smtps://"])
    def test_a_line_may_say_that_it_is_for_tls(self, account, key, scheme):
        one, sink = account(f"{key} joe:{SECRET}", scheme=scheme, is_wrapped=True)
        assert "status=sent" in self.outcome(one)
        assert sink.logins == [Login("PLAIN", "joe", SECRET, True)]

    def test_a_relayhost_with_a_level_has_the_password_of_its_host(
        self, make_instance, make_names, make_sink, certificates
    ):
        sink, one = (
            make_sink(mechanisms=ANY_MECHANISM, certificate=certificates["good"]),
            make_instance(),
        )
        make_names(one, {}, "127.0.0.1 localhost\n")
        one.configure(
            relayhost=f"[localhost]:{sink.port} encrypt",
            smtp_tls_CAfile=certificates["ca"],
            smtp_sasl_password_command=f"echo joe:{SECRET}",
        )
        assert "status=sent" in self.outcome(one.start())
        assert sink.logins == [Login("PLAIN", "joe", SECRET, True)]


def gated(gate, free=0):
    """A row for END that keeps the client waiting, but for the first few."""
    count = itertools.count(1)

    def answer(*_):
        if next(count) > free:
            assert gate.wait(PATIENCE)
        return "250 2.0.0 Kept"

    return answer


def held_messages(pid):
    """How many messages of the queue a process has open."""
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "/queue/" in os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def first_three(row):
    """A row for CONNECT: whoever comes while three are there has another."""

    def answer(session, line):
        is_late = len(session.server.open) > 3
        return row(session, line) if is_late else SINK_ANSWERS["CONNECT"]

    return answer


def behind_the_second(row):
    """A row for RSET: another behind the second message."""

    def answer(session, line):
        is_it = len(session.server.received) == 2
        return row(session, line) if is_it else "250 2.0.0 Ok"

    return answer


class TestRelayConnections:
    """How many connections there are, to whom, and what goes over them."""

    def test_more_mail_goes_over_the_same_connection(self, hub, far):
        domain, sink = far()
        for name in "abc":
            post(hub, [f"{name}@{domain}"], letter("more"))
            wait_for(lambda name=name: len(sink.received) == "abc".index(name) + 1)
        assert len(sink.clients) == 1
        again = ["RSET", "MAIL", "RCPT", "DATA"]
        assert sink.verbs() == ["EHLO", "MAIL", "RCPT", "DATA", *again, *again]

    def test_a_connection_is_not_kept_for_long(self, hub, far):
        domain, sink = far()
        post(hub, [f"a@{domain}"], letter("short"))
        wait_for(lambda: sink.received)
        wait_for(lambda: not sink.open, 8)
        assert sink.verbs()[-1] == "QUIT"

    def test_much_mail_goes_over_few_connections_once_each(self, hub, far):
        domain, sink = far()
        with hub.smtp() as client:
            for number in range(100):
                text = wire_text(letter("much"))
                client.sendmail(f"payam@{HOST}", [f"n{number}@{domain}"], text)
        wait_for(lambda: len(sink.received) >= 100)
        found = sorted(name for _, (name,), _ in sink.received)
        assert found == sorted(f"n{number}@{domain}" for number in range(100))
        assert len(sink.clients) <= 20

    def test_when_a_dead_host_answers_again_all_its_mail_goes(
        self, instance, make_sink
    ):
        port = free_port()
        instance.configure(relayhost=f"[127.0.0.1]:{port}", minimal_backoff_time="1s")
        spool = minimta.House({"MINIMTA_ROOT": str(instance.root)}).spool()
        spool.make()
        old = time.time() - 3600  # what is so old is tried again in an hour
        for number in range(10):
            commit(spool, recipients=[f"r{number}@far.example"], arrived=old)
        instance.start()
        wait_for(lambda: instance.log().count("status=deferred") == 10)
        sink = make_sink(place=("127.0.0.1", port))
        instance.sendmail("new@far.example", stdin=letter("fresh"))
        instance.wait_empty()
        assert len(sink.received) == 11
        assert len(sink.clients) <= 4

    def test_one_host_gets_20_at_once_and_others_theirs_meanwhile(self, hub, far):
        gate = threading.Event()
        domain, sink = far(END=gated(gate, free=25))
        try:
            with hub.smtp() as client:
                for number in range(70):
                    text = wire_text(letter("many"))
                    client.sendmail(f"payam@{HOST}", [f"n{number}@{domain}"], text)
            wait_for(lambda: len(sink.open) >= 20)
            other, other_sink = far()
            post(hub, [f"a@{other}"], letter("other"))
            wait_for(lambda: other_sink.received)
        finally:
            gate.set()
        wait_for(lambda: len(sink.received) >= 70)
        assert sink.most_open == 20
        assert len(sink.received) == 70

    def test_all_hosts_together_get_100_at_once(self, hub, far):
        gate = threading.Event()
        sides = [far(END=gated(gate, free=20)) for _ in range(6)]
        text = wire_text(letter("very many"))
        try:
            with hub.smtp() as client:
                for number in range(45):
                    for domain, _ in sides:
                        names = [f"n{number}@{domain}"]
                        client.sendmail(f"payam@{HOST}", names, text)
            wait_for(lambda: sum(len(sink.open) for _, sink in sides) >= 100)
            post(hub, ["user1@localhost"], letter("meanwhile"))
            hub.wait_message_only("user1", "meanwhile")
            assert sum(len(sink.open) for _, sink in sides) == 100
        finally:
            gate.set()
        wait_for(lambda: sum(len(sink.received) for _, sink in sides) >= 6 * 45)

    def test_a_silent_host_holds_nobody_up(self, hub, far):
        gate = threading.Event()
        silent, silent_sink = far(CONNECT=gated(gate))
        domain, sink = far()
        try:
            for number in range(5):
                post(hub, [f"n{number}@{silent}"], letter("silent"))
            wait_for(lambda: silent_sink.clients)
            post(hub, [f"a@{domain}"], letter("quick"))
            wait_for(lambda: sink.received)
        finally:
            gate.set()

    @pytest.mark.parametrize(
        "row", [last_words("421 4.3.2 Closed"), hang_up, "554 5.3.2 Closed"]
    )
    def test_a_dead_host_is_not_tried_by_every_message(self, hub, far, row):
        domain, sink = far(CONNECT=row)
        names = [f"n{number}@{domain}" for number in range(30)]
        for name in names:
            post(hub, [name], letter("dead"))
        lines = [told(hub, name) for name in names]
        assert len(sink.clients) <= 3
        reasons = {line.partition("status=deferred ")[2] for line in lines}
        assert len(reasons) == 1
        assert reasons != {""}

    def test_when_it_lives_again_all_its_mail_goes_over_few_connections(self, hub, far):
        domain, sink = far(CONNECT=last_words("421 4.3.2 Closed"))
        names = [f"n{number}@{domain}" for number in range(30)]
        for name in names:
            post(hub, [name], letter("dead"))
        for name in names:
            assert "status=deferred" in told(hub, name)
        sink.answers["CONNECT"], tried = "220 sink.example ESMTP", len(sink.clients)
        hub.run("sendmail", "-q", user="root")
        wait_for(lambda: len(sink.received) >= 30)
        assert sorted(name for _, (name,), _ in sink.received) == sorted(names)
        assert len(sink.clients) - tried <= 10

    def test_who_runs_one_message_has_a_dead_host_tried(self, hub, far):
        domain, sink = far(CONNECT=last_words("421 4.3.2 Closed"))
        post(hub, [f"a@{domain}"], letter("one"))
        assert outcomes(hub, f"a@{domain}") == ["deferred"]
        tried = len(sink.clients)
        hub.run("minimta.py", "queue", "run", f"to:{domain}", user="root")
        wait_for(lambda: len(sink.clients) > tried)
        sink.answers["CONNECT"] = "220 sink.example ESMTP"
        hub.run("minimta.py", "queue", "run", f"to:{domain}", user="root")
        wait_for(lambda: sink.received)

    def test_four_silent_hosts_with_much_mail_hold_nobody_up(self, instance, make_sink):
        gate = threading.Event()
        silent, sink = [make_sink(CONNECT=gated(gate)) for _ in range(4)], make_sink()
        rows = [
            f"far{number}.example smtp:[127.0.0.1]:{one.port}\n"
            for number, one in enumerate([*silent, sink])
        ]
        routes = instance.write("etc/transport", "".join(rows))
        instance.configure(transport_maps=routes)
        spool = minimta.House({"MINIMTA_ROOT": str(instance.root)}).spool()
        spool.make()
        numbers = [*itertools.chain(*[range(4)] * 170), *[4] * 5]
        for number in numbers:  # 680 are more than may be on their way
            commit(spool, recipients=[f"r@far{number}.example"])
        instance.start()
        try:
            wait_for(lambda: len(sink.received) == 5)
            wait_for(lambda: all(one.clients for one in silent))
            assert held_messages(parts(instance)[2]) <= 4 * 20 + minimta.BATCH
        finally:
            gate.set()

    @pytest.mark.parametrize("row", [last_words("421 4.3.2 Busy"), hang_up])
    def test_a_host_that_takes_three_connections_is_asked_for_few_more(
        self, hub, far, row
    ):
        gate = threading.Event()
        domain, sink = far(CONNECT=first_three(row), END=gated(gate))
        other, other_sink = far()
        names = [f"n{number}@{domain}" for number in range(40)]
        try:
            for name in names:
                post(hub, [name], letter("few"))
            wait_for(lambda: len(sink.clients) > 3)
            for count in range(1, 6):  # those who ask again have time to
                post(hub, [f"n{count}@{other}"], letter("meanwhile"))
                wait_for(lambda n=count: len(other_sink.received) == n)
        finally:
            gate.set()
        wait_for(lambda: len(sink.received) >= len(names))
        assert sorted(name for _, (name,), _ in sink.received) == sorted(names)
        assert len(sink.clients) <= 10

    @pytest.mark.parametrize("row", [hang_up, reset])
    def test_who_was_served_stays_so_when_the_host_goes_before_the_others(
        self, instance, make_sink, row
    ):
        late = "b@far.example"
        crowded = {f"RCPT TO:<{late}>": ["452 4.5.3 Too many", "250 2.1.5 Ok"]}
        sink = make_sink(RSET=behind_the_second(row), **crowded)
        relayed(instance, sink, minimal_backoff_time="1h")
        post(instance, ["first@far.example"], letter("first"))
        wait_for(lambda: sink.received)
        post(instance, ["a@far.example", late], letter("second"))
        assert outcomes(instance, "a@far.example", late) == ["sent", "deferred"]
        (queue_id,) = instance.queued()
        assert f"{queue_id} " in instance.wait_reason("Too many")
        assert instance.stop() == 0
        assert instance.start().run("sendmail", "-q", user="root").code == 0
        instance.wait_empty()
        found = [names for _, names, _ in sink.received]
        assert found == [["first@far.example"], ["a@far.example"], [late]]

    @pytest.mark.parametrize(
        "row",
        [None, last_words("421 4.3.2 Closed"), hang_up, "554 5.3.2 Closed"],
        ids=["not there", "closed", "gone", "refusing"],
    )
    def test_the_hosts_of_a_list_are_tried_in_order(self, instance, make_sink, row):
        sinks = [
            make_sink(**({"CONNECT": row} if row else {})),
            make_sink(),
            make_sink(),
        ]
        if row is None:
            sinks[0].close()
            sinks[0].close = lambda: None
        ports = [sink.port for sink in sinks]
        instance.configure(relayhost=", ".join(f"[127.0.0.1]:{port}" for port in ports))
        post(instance.start(), ["a@far.example"], letter("order"))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert [len(sink.received) for sink in sinks] == [0, 1, 0]
        instance.wait_empty()
        shown = instance.run("minimta.py", "trace", "--last").out
        first, last = shown[shown.index("\nearlier ") :].split("\ndialogue ")
        assert f":{ports[0]}" in first and f":{ports[1]}" in last
        why = first.split(maxsplit=1)[1]
        assert re.search(rf"minimta/smtp\[\d+\]: {re.escape(why)}\n", instance.log())

    @pytest.mark.parametrize(
        "rows",
        [
            {"RCPT": "450 4.2.0 Not now"},
            {"MAIL": "452 4.3.1 Disk full"},
            {"DATA": "451 4.3.0 Later"},
            {"END": "451 4.3.0 Later"},
            {"MAIL": hang_up},
            {"DATA": hang_up},
        ],
        ids=["rcpt", "mail", "data", "end", "gone at mail", "gone at data"],
    )
    def test_whom_a_host_puts_off_the_next_one_takes(self, instance, make_sink, rows):
        sinks = [make_sink(**rows), make_sink()]
        instance.configure(
            relayhost=", ".join(f"[127.0.0.1]:{sink.port}" for sink in sinks)
        )
        names = ["a@far.example", "b@far.example"]
        post(instance.start(), names, letter("next"))
        assert outcomes(instance, *names) == ["sent", "sent"]
        assert [len(sink.received) for sink in sinks] == [0, 1]
        assert sinks[1].received[0][1] == names

    def test_what_one_host_refuses_no_other_is_asked(self, instance, make_sink):
        row = for_one("b", "550 5.1.1 Never")
        sinks = [make_sink(RCPT=row), make_sink()]
        instance.configure(
            relayhost=", ".join(f"[127.0.0.1]:{sink.port}" for sink in sinks)
        )
        names = ["a@far.example", "b@far.example"]
        post(instance.start(), names, letter("never"))
        assert outcomes(instance, *names) == ["sent", "bounced"]
        assert sinks[1].received == []

    def test_a_host_that_wants_fewer_over_one_connection_gets_them(
        self, instance, make_sink
    ):
        def mail(session, line):
            taken = len([1 for n, said in session.server.log if n == session.number])
            is_first = taken <= 2  # EHLO, MAIL
            return "250 2.1.0 Ok" if is_first else "421 4.7.0 Too many here"

        sink = make_sink(MAIL=mail)
        relayed(instance, sink)
        names = [f"n{number}@far.example" for number in range(5)]
        for name in names:
            post(instance, [name], letter("many"))
        assert outcomes(instance, *names) == ["sent"] * 5

    def test_a_dead_host_is_asked_last(self, instance, make_sink):
        dead, good = make_sink(CONNECT=hang_up), make_sink(QUIT=last_words("221 Bye"))
        instance.configure(
            relayhost=", ".join(f"[127.0.0.1]:{one.port}" for one in (dead, good))
        )
        instance.start()
        for number in range(3):
            name = f"n{number}@far.example"
            post(instance, [name], letter("dead"))
            assert outcomes(instance, name) == ["sent"]
        assert len(dead.clients) == 1

    @pytest.mark.parametrize(
        ("verb", "row"),
        [
            ("RCPT", "252 2.1.5 Perhaps"),
            ("MAIL", "251 2.1.0 Ok"),
            ("CONNECT", "200 sink.example"),
            ("EHLO", "200 sink.example"),
            ("END", "251 2.0.0 Kept"),
        ],
    )
    def test_the_first_digit_of_a_reply_decides(self, instance, make_sink, verb, row):
        relayed(instance, make_sink(**{verb: row}))
        post(instance, ["a@far.example"], letter("digit"))
        assert outcomes(instance, "a@far.example") == ["sent"]

    def test_the_hosts_behind_one_with_many_dead_addresses_are_tried(
        self, instance, make_names, make_sink
    ):
        port, sink = free_port(), make_sink()
        addresses = [("A", f"{FAR_NET}.{number}") for number in range(220, 230)]
        make_names(instance, {("many.example", "A"): addresses})
        hops = f"[many.example]:{port}, [127.0.0.1]:{sink.port}"
        instance.configure(relayhost=hops)
        post(instance.start(), ["a@x.example"], letter("many"))
        assert outcomes(instance, "a@x.example") == ["sent"]

    def test_an_alias_without_its_target_is_asked_for(
        self, instance, make_names, make_sink
    ):
        port = free_port()
        sink = make_sink(place=(f"{FAR_NET}.231", port))
        rows = {
            ("far.example", "MX"): [("CNAME", "real.example")],
            ("real.example", "MX"): [("MX", (10, "mx.example"))],
            ("mx.example", "A"): [("CNAME", "h.example")],
            ("h.example", "A"): [("A", f"{FAR_NET}.231")],
        }
        make_names(instance, rows)
        instance.configure(relayhost=f"far.example:{port}")
        post(instance.start(), ["a@x.example"], letter("alias"))
        assert outcomes(instance, "a@x.example") == ["sent"]
        assert len(sink.received) == 1

    def test_mail_hosts_are_tried_in_order(self, instance, make_names, make_sink):
        port = free_port()
        sinks = [
            make_sink(place=(f"{FAR_NET}.{number}", port), CONNECT=row)
            for number, row in ((201, hang_up), (202, "220 Hi"), (203, "220 Hi"))
        ]
        rows = {
            ("far.example", "MX"): [
                ("MX", (pref, f"mx{number}.far.example"))
                for pref, number in ((30, 203), (10, 201), (20, 202))
            ]
        }
        for number in (201, 202, 203):
            rows[f"mx{number}.far.example", "A"] = [("A", f"{FAR_NET}.{number}")]
        make_names(instance, rows)
        instance.configure(relayhost=f"far.example:{port}")
        post(instance.start(), ["a@x.example"], letter("order"))
        assert outcomes(instance, "a@x.example") == ["sent"]
        assert [len(sink.received) for sink in sinks] == [0, 1, 0]
        assert len(sinks[0].clients) == 1

    def test_of_very_many_addresses_five_are_tried(
        self, instance, make_names, make_sink
    ):
        port, numbers = free_port(), range(204, 214)
        places = [(f"{FAR_NET}.{number}", port) for number in numbers]
        sinks = [make_sink(place=place, CONNECT=hang_up) for place in places]
        addresses = [("A", address) for address, _ in places]
        make_names(
            instance, {("far.example", "MX"): [], ("far.example", "A"): addresses}
        )
        instance.configure(relayhost=f"far.example:{port}")
        post(instance.start(), ["a@x.example"], letter("many"))
        assert outcomes(instance, "a@x.example") == ["deferred"]
        assert sum(len(sink.clients) for sink in sinks) == 5

    def test_who_took_it_perhaps_is_the_last_to_be_offered_it(
        self, instance, make_sink
    ):
        sinks = [make_sink(END=kept_and_gone), make_sink()]
        instance.configure(
            relayhost=", ".join(f"[127.0.0.1]:{sink.port}" for sink in sinks)
        )
        post(instance.start(), ["a@far.example"], letter("twice"))
        line = told(instance, "a@far.example")
        assert "status=deferred" in line
        assert "may be sent more than once" in line
        assert [len(sink.received) for sink in sinks] == [1, 0]
        assert sinks[1].clients == []

    def test_the_addresses_of_a_host_share_its_mail(
        self, instance, make_names, make_sink
    ):
        port, numbers = free_port(), (241, 242, 243)
        sinks = [
            make_sink(place=(f"{FAR_NET}.{number}", port), RSET=hang_up)
            for number in numbers
        ]
        rows = [("A", f"{FAR_NET}.{number}") for number in numbers]
        make_names(instance, {("many.example", "A"): rows})
        instance.configure(relayhost=f"[many.example]:{port}")
        instance.start()
        names = [f"n{number}@x.example" for number in range(60)]
        for name in names:
            post(instance, [name], letter("share"))
        assert outcomes(instance, *names) == ["sent"] * 60
        assert all(sink.received for sink in sinks)
        assert sum(len(sink.received) for sink in sinks) == 60


RESULT_ROWS = [
    ("0\tsent\t2.0.0\thost\ttext", True),
    ("-1\thost\t4.4.1\tnone\ttext", True),
    ("999999999\tsent\t2.0.0\thost\t", True),
    ("", False),
    ("\0", False),
    ("\x1b[2J\xff\udcff", False),
    ("0", False),
    ("0\tsent\t2.0.0\thost", False),
    ("0\tsent\t2.0.0\thost\ttext\tmore", False),
    ("0\tsent\t\thost\ttext", False),
    ("0\tsent\t2.0\thost\ttext", False),
    ("\tsent\t2.0.0\thost\ttext", False),
    ("-\tsent\t2.0.0\thost\ttext", False),
    ("--0\tsent\t2.0.0\thost\ttext", False),
    ("+0\tsent\t2.0.0\thost\ttext", False),
    (" 0\tsent\t2.0.0\thost\ttext", False),
    ("0_0\tsent\t2.0.0\thost\ttext", False),
    ("0x0\tsent\t2.0.0\thost\ttext", False),
    ("\u00b2\tsent\t2.0.0\thost\ttext", False),
    ("\u0660\tsent\t2.0.0\thost\ttext", False),
    ("0" * 5000 + "\tsent\t2.0.0\thost\ttext", False),
    ("9" * 5000 + "\tsent\t2.0.0\thost\ttext", False),
]


def results_of(pid):
    """The pipe by which a child tells the runner its results, for writing."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        flags = Path(f"/proc/{pid}/fdinfo/{name}").read_text().split()[3]
        path = f"/proc/{pid}/fd/{name}"
        if os.readlink(path).startswith("pipe:") and int(flags, 8) & os.O_WRONLY:
            return open(path, "wb", buffering=0)
    return pytest.fail("it has no pipe")


def relay_of(instance):
    """The pid of the relay process, as soon as there is one."""
    runner = parts(instance)[2]
    (pid,) = wait_for(lambda: children(runner))
    return pid


def start_again(instance):
    """Stops the daemon, sees that nothing of it is left, and starts it."""
    assert instance.stop() == 0
    wait_for(lambda: not instance.pids())
    instance.start()


NEW_RUNNERS = {
    "stop": start_again,
    "hang up": Instance.hang_up,
    "kill": lambda instance: os.kill(parts(instance)[2], signal.SIGKILL),
}


class TestRelayProcess:
    """The relay process: what it tells the runner, and its end."""

    @pytest.mark.parametrize(
        ("line", "wanted"), RESULT_ROWS, ids=[ascii(row[0])[:30] for row in RESULT_ROWS]
    )
    def test_a_line_is_a_result_or_nothing(self, line, wanted):
        assert minimta.is_result(line.split("\t")) == wanted

    def test_lines_that_make_no_sense_change_nothing(self, instance, make_sink):
        gate = threading.Event()
        sink = make_sink(END=gated(gate))
        relayed(instance, sink)
        try:
            post(instance, ["a@far.example"], letter("sense"))
            wait_for(lambda: "DATA" in sink.verbs())
            before = relay_of(instance)
            runner = parts(instance)[2]
            with results_of(before) as pipe:
                for line, is_result in RESULT_ROWS:
                    if not is_result:
                        data = f"{line}\n".encode("utf-8", "surrogateescape")
                        assert pipe.write(data) == len(data)
            post(instance, ["user1@localhost"], letter("meanwhile"))
            instance.wait_message_only("user1", "meanwhile")
        finally:
            gate.set()
        assert "250 2.0.0 Kept" in told(instance, "a@far.example")
        assert (parts(instance)[2], relay_of(instance)) == (runner, before)
        assert len(sink.received) == 1

    @pytest.mark.parametrize("how", NEW_RUNNERS)
    def test_it_ends_with_its_runner_and_nothing_goes_twice(
        self, instance, make_sink, how
    ):
        gate, greeting = threading.Event(), SINK_ANSWERS["CONNECT"]

        def outlast(*_):  # whoever waits for it to end
            return greeting if gate.wait(9 * PATIENCE) else "421 4.3.2 Late"

        sink = make_sink(CONNECT=[outlast, greeting])
        relayed(instance, sink)
        names = [f"n{number}@far.example" for number in range(5)]
        try:
            for name in names:
                post(instance, [name], letter("once"))
            wait_for(lambda: sink.clients)
            old = relay_of(instance)
            NEW_RUNNERS[how](instance)
            wait_for(lambda: old not in instance.pids())
        finally:
            gate.set()
        instance.wait_empty()
        wait_for(lambda: not sink.open)
        assert sorted(name for _, (name,), _ in sink.received) == names

    def test_what_is_on_its_way_when_the_daemon_stops_is_heard_out(
        self, instance, make_sink
    ):
        gate = threading.Event()
        sink = make_sink(END=gated(gate))
        relayed(instance, sink)
        try:
            post(instance, ["a@far.example"], letter("once"))
            wait_for(lambda: "DATA" in sink.verbs())
            instance.process.terminate()
            wait_for(lambda: len(instance.pids()) < 4)  # the others have ended
        finally:
            gate.set()
        assert instance.process.wait(PATIENCE) == 0
        assert instance.queued() == []
        assert len(sink.received) == 1

    def test_an_errand_waits_for_a_thread(self, spool, make_sink, monkeypatch):
        def refuse(_):
            raise RuntimeError("can't start new thread")

        sink, heard = make_sink(), queue.SimpleQueue()
        teller = types.SimpleNamespace(report=lambda *words: heard.put(words))
        secrets = types.SimpleNamespace(find=lambda _: None)
        outbox = minimta.Outbox(teller, make_settings(), spool, secrets)
        place = f"[127.0.0.1]:{sink.port}"
        errand = minimta.Errand(commit(spool), place, "a@far.example", ())
        errand.recipients["b@far.example"] = 7, minimta.NO_WISHES
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            outbox.add(errand)
            with outbox.lock:
                outbox.grow(outbox.lines[place])
        assert (outbox.workers, sink.clients) == (0, [])
        with outbox.lock:
            outbox.grow(outbox.lines[place])
        assert heard.get(timeout=PATIENCE)[:2] == (7, "sent")
        wait_for(lambda: not outbox.workers)

    def test_with_few_threads_mail_goes_over_few_connections(self, instance, make_sink):
        gate = threading.Event()
        sink = make_sink(END=gated(gate))
        instance.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        # Each thread has its stack, and there is no room for many.
        room = [(resource.RLIMIT_STACK, 1 << 28), (resource.RLIMIT_AS, 5 << 28)]
        instance.start(limits=room)
        names = [f"n{number:02}@far.example" for number in range(40)]
        try:
            for name in names:
                post(instance, [name], letter("few"))
            wait_for(lambda: len(sink.open) > 1)
            old = relay_of(instance)
            for count in range(1, 6):  # more threads have time to be tried
                post(instance, ["user1@localhost"], letter(f"{count}"))
                wait_for(lambda n=count: len(instance.messages("user1")) == n)
        finally:
            gate.set()
        instance.wait_empty()
        assert sorted(name for _, (name,), _ in sink.received) == names
        assert (relay_of(instance), sink.most_open < 10) == (old, True)


LONG = "grüße " * 300  # 1,800 characters, 2,400 bytes
UMLAUTS = "ä" * 3000


def mime(kind, body, encoding="8bit", more=""):
    """A part of that type."""
    return (
        f"MIME-Version: 1.0\nContent-Type: {kind}\n{more}"
        f"Content-Transfer-Encoding: {encoding}\n\n{body}"
    )


def split(*parts):
    """multipart/mixed of `parts`."""
    middle = "".join(f"--cut\n{part}\n" for part in parts)
    head = "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=cut"
    return f"{head}\n\n{middle}--cut--\n"


PLAIN = "text/plain; charset=utf-8"
TOO_LONG = {
    "one line": mime(PLAIN, "x" * 5000 + "\n", "7bit"),
    "8-bit": mime(PLAIN, f"short\n{UMLAUTS}\n.\n..\n{LONG}\nFrom me\n"),
    "999": mime(PLAIN, "x" * 999 + "\n.\n", "7bit"),
    "another charset": mime("text/html; charset=us-ascii", "<p>" * 999 + "\n", "7bit"),
    "no MIME": "\n" + "y " * 2000 + "\nend\n",
    "a part": split(mime(PLAIN, LONG), mime(PLAIN, "short\n")),
    "a part of a part": split(split(mime(PLAIN, LONG)).replace("cut", "in")),
    "a message": split(
        "Content-Type: message/rfc822\n\nSubject: in\n" + mime(PLAIN, LONG)
    ),
    "base64": mime(
        "image/png", base64.b64encode(bytes(range(256)) * 20).decode(), "base64"
    ),
    "quoted-printable": mime(
        PLAIN, "=C3=A4" * 500 + "=\n" + "end\n", "quoted-printable"
    ),
    "a binary part": mime("application/octet-stream", "z" * 3000 + "\n", "8bit"),
}
EIGHT_BIT = {
    "text": mime(PLAIN, "grüße\n.\n=20\nFrom me  \n"),
    "latin-1": mime("text/plain; charset=iso-8859-1", "gr\udcfc\udcdfe\n"),
    "no MIME": "\ngrüße\n",
    "a part": split(mime(PLAIN, "grüße\n"), mime(PLAIN, "short\n", "7bit")),
    "a message": split(
        "Content-Type: message/rfc822\n\nSubject: in\n" + mime(PLAIN, "ü\n")
    ),
    "no text": mime("application/octet-stream", "\udc80\udcff\n"),
    "a subject": "Subject: grüße an alle\n" + mime(PLAIN, "short\n", "7bit"),
    "a name": "X-From: Jürgen Groß <j@far.example>\n" + mime(PLAIN, "short\n", "7bit"),
}
SIGNED = {
    "DKIM": "DKIM-Signature: v=1; b=abc\n" + mime(PLAIN, "{}\n"),
    "multipart/signed": split(mime(PLAIN, "{}\n")).replace("/mixed", "/signed"),
}
NASTY = {
    "dots": ".\n..\n...\n.x\nx.\n.\n",
    "a dot first": ".",
    "no end": "text without an end",
    "empty lines": "\n\n\n\n",
    "From lines": "From me\n>From me\n",
    "998 bytes": "x" * 998 + "\n" + "." * 998 + "\n",
    "what looks like an end": "\n.\n\nQUIT\nRSET\n",
    "blanks": " \t \n\t\n x \n",
    "a mebibyte": "".join("x" * (n % 97) + "\n.\n" for n in range(20_000)),
    "anything": "".join(random.Random(5).choices("\n\n..ax ", k=300_000)),
}


def leaves_of(data):
    """The content of each part of a message, decoded."""
    return [
        part.get_payload(decode=True).replace(b"\r\n", b"\n").rstrip(b"\n")
        for part in message_from_bytes(data).walk()
        if not part.is_multipart()
    ]


def decoded(value):
    """A header field without its encoding."""
    return str(email.header.make_header(email.header.decode_header(value)))


def raw(text):
    """Text that may hold single bytes, as it is sent."""
    return text.replace("\n", "\r\n").encode("utf-8", "surrogateescape")


class TestRelayOut:
    """What goes over the wire, for what the host can take."""

    @staticmethod
    def passed(hub, side, data):
        """What arrives of a message, which must be sent."""
        domain, sink = side
        post(hub, [f"a@{domain}"], data)
        assert outcomes(hub, f"a@{domain}") == ["sent"]
        ((_, _, text),) = sink.received
        return arrived(text)

    @pytest.mark.parametrize("kind", NASTY)
    def test_every_content_arrives_as_it_was(self, hub, far, kind):
        body = raw(NASTY[kind])
        data = self.passed(hub, far(), b"Subject: nasty\r\n\r\n" + body)
        body += b"" if body.endswith(b"\r\n") else b"\r\n"
        assert data.partition(b"\r\n\r\n")[2] == body

    def test_only_whole_line_ends_go_out(self, hub, far):
        domain, sink = far()
        text = letter("ends", "a\r\nb\rc\r", "\r", ".\r")
        hub.sendmail("-i", f"a@{domain}", stdin=text)
        assert outcomes(hub, f"a@{domain}") == ["sent"]
        ((_, _, data),) = sink.received
        assert not re.search(rb"\r(?!\n)|(?<!\r)\n", data)

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [(HOST, "[127."), ("mail.host.example", "mail.host.example")],
    )
    def test_the_name_in_ehlo_is_one_that_others_know(
        self, instance, make_sink, name, wanted
    ):
        sink = make_sink()
        instance.configure(myhostname=name, relayhost=f"[127.0.0.1]:{sink.port}")
        post(instance.start(), ["a@far.example"], letter("name"))
        wait_for(lambda: sink.received)
        (said,) = [line for _, line in sink.log if line[:4].upper() == "EHLO"]
        assert said.split()[1].startswith(wanted)

    def test_commands_go_together_only_where_that_is_offered(self, hub, far):
        names = [f"n{number}" for number in range(5)]
        for words, is_offered in ((["PIPELINING"], True), ([], False)):
            domain, sink = far(EHLO=hello(*words, "8BITMIME"))
            post(hub, [f"{name}@{domain}" for name in names], letter("together"))
            wait_for(lambda sink=sink: sink.received)
            ahead = {line[:4].upper() for line in sink.ahead}
            assert ahead == ({"MAIL", "RCPT"} if is_offered else set())

    def test_the_size_is_announced(self, hub, far):
        domain, sink = far()
        post(hub, [f"a@{domain}"], letter("size", LOREM * 50))
        wait_for(lambda: sink.received)
        ((command, _, text),) = sink.received
        size = int(re.search("SIZE=([0-9]+)", command).group(1))
        assert len(arrived(text)) * 0.9 <= size <= len(arrived(text)) * 1.1

    def test_what_is_too_large_for_the_host_is_not_tried(self, hub, far):
        domain, sink = far(EHLO=hello("SIZE 1000", "8BITMIME"))
        post(hub, [f"a@{domain}"], letter("large", LOREM * 50))
        assert "dsn=5.3.4, status=bounced" in told(hub, f"a@{domain}")
        assert "MAIL" not in sink.verbs()

    def test_a_size_of_0_is_no_limit(self, hub, far):
        self.passed(hub, far(EHLO=hello("SIZE 0", "8BITMIME")), letter("size"))

    @pytest.mark.parametrize("kind", TOO_LONG)
    @pytest.mark.parametrize("words", [["8BITMIME"], []], ids=["8-bit", "7-bit"])
    def test_long_lines_are_encoded_and_none_is_cut(self, hub, far, kind, words):
        data = raw(TOO_LONG[kind])
        out = self.passed(hub, far(EHLO=hello(*words)), data)
        assert max(map(len, out.split(b"\r\n"))) <= 998
        assert words or out.isascii()
        assert leaves_of(out) == leaves_of(data)
        assert message_from_bytes(out).defects == []

    def test_lines_that_fit_are_left_alone(self, hub, far):
        data = raw(split(mime(PLAIN, "ü" * 499 + "\n"), mime(PLAIN, "short  \n")))
        out = self.passed(hub, far(), data)
        assert out.partition(b"\r\n\r\n")[2] == data.partition(b"\r\n\r\n")[2]

    @pytest.mark.parametrize("kind", EIGHT_BIT)
    def test_a_7_bit_host_gets_7_bits(self, hub, far, kind):
        data = raw(EIGHT_BIT[kind])
        out = self.passed(hub, far(EHLO=hello("PIPELINING")), data)
        assert out.isascii()
        assert leaves_of(out) == leaves_of(data)

    def test_headers_of_a_7_bit_host_read_the_same(self, hub, far):
        for kind, name in (("a subject", "Subject"), ("a name", "X-From")):
            data = raw(EIGHT_BIT[kind])
            out = self.passed(hub, far(EHLO=hello("PIPELINING")), data)
            text = decoded(message_from_bytes(out)[name])
            assert text == EIGHT_BIT[kind].partition(": ")[2].partition("\n")[0]

    def test_an_8_bit_host_gets_it_as_it_is(self, hub, far):
        domain, sink = far()
        post(hub, [f"a@{domain}"], raw(EIGHT_BIT["text"]))
        wait_for(lambda: sink.received)
        ((command, _, text),) = sink.received
        assert " BODY=8BITMIME" in command
        assert "\r\n\r\ngrüße\r\n.\r\n=20\r\nFrom me  \r\n".encode() in arrived(text)

    @pytest.mark.parametrize("kind", SIGNED)
    @pytest.mark.parametrize(
        ("text", "words", "status"),
        [("x" * 1500, ["8BITMIME"], "5.6.1"), ("grüße", [], "5.6.3")],
    )
    def test_what_is_signed_comes_back_instead(
        self, hub, far, kind, text, words, status
    ):
        domain, sink = far(EHLO=hello(*words))
        post(hub, [f"a@{domain}"], raw(SIGNED[kind].replace("{}", text)))
        assert f"dsn={status}, status=bounced" in told(hub, f"a@{domain}")
        assert "MAIL" not in sink.verbs()

    @pytest.mark.parametrize("kind", SIGNED)
    def test_what_is_signed_and_fits_is_not_touched(self, hub, far, kind):
        data = raw(SIGNED[kind].replace("{}", "grüße"))
        assert self.passed(hub, far(), data).endswith(data.partition(b"\r\n\r\n")[2])

    def test_long_header_lines_are_folded(self, hub, far):
        names = " ".join(f"<{number}@far.example>" for number in range(300))
        data = f"Subject: fold\r\nReferences: {names}\r\n\r\ntext\r\n".encode()
        out = self.passed(hub, far(), data)
        assert max(map(len, out.split(b"\r\n"))) <= 998
        found = message_from_bytes(out)["References"]
        assert re.sub(r"\r\n(?=\s)", "", found) == names

    def test_a_header_line_without_a_blank_is_not_cut(self, hub, far):
        data = f"Subject: fold\r\nX-Long: {'y' * 3000}\r\n\r\ntext\r\n".encode()
        out = self.passed(hub, far(), data)
        assert max(map(len, out.split(b"\r\n"))) <= 998
        assert decoded(message_from_bytes(out)["X-Long"]).strip() == "y" * 3000

    def test_an_address_in_utf_8_needs_a_host_that_knows_it(self, hub, far):
        domain, sink = far()
        hub.sendmail(f"grüße@{domain}", stdin=letter("utf-8"))
        assert "dsn=5.6.7, status=bounced" in told(hub, f"grüße@{domain}")
        assert "MAIL" not in sink.verbs()
        domain, sink = far(EHLO=hello("8BITMIME", "SMTPUTF8"))
        hub.sendmail(f"grüße@{domain}", stdin=letter("utf-8"))
        wait_for(lambda: sink.received)
        ((command, recipients, _),) = sink.received
        assert " SMTPUTF8" in command
        assert recipients == [f"grüße@{domain}"]

    @pytest.mark.parametrize("code", ["452 4.5.3", "552 5.5.3"])
    def test_whom_the_host_has_no_room_for_it_gets_next(self, hub, far, code):
        def few(session, _):
            is_full = len(session.recipients) >= 3
            return f"{code} Too many" if is_full else "250 2.1.5 Ok"

        domain, sink = far(RCPT=few)
        names = [f"n{number}@{domain}" for number in range(10)]
        post(hub, names, letter("few"))
        assert outcomes(hub, *names) == ["sent"] * 10
        found = [recipients for _, recipients, _ in sink.received]
        assert [len(recipients) for recipients in found] == [3, 3, 3, 1]
        assert sorted(itertools.chain(*found)) == sorted(names)
        assert all("status=deferred" not in told(hub, name) for name in names)

    @pytest.mark.parametrize("code", ["452 4.5.3", "552 5.5.3"])
    def test_a_host_that_has_room_for_nobody_is_asked_once(self, hub, far, code):
        domain, sink = far(RCPT=f"{code} Full")
        names = [f"{name}@{domain}" for name in "abc"]
        post(hub, names, letter("full"))
        assert outcomes(hub, *names) == ["deferred"] * 3
        assert sink.verbs().count("RCPT") == 3

    def test_of_many_recipients_100_go_at_a_time(self, hub, far):
        domain, sink = far()
        names = [f"n{number}@{domain}" for number in range(150)]
        post(hub, names, letter("all"))
        assert outcomes(hub, *names) == ["sent"] * 150
        found = [recipients for _, recipients, _ in sink.received]
        assert sorted(map(len, found)) == [50, 100]
        assert sorted(itertools.chain(*found)) == sorted(names)

    def test_a_large_message_needs_little_memory(self, instance, make_sink):
        sink = make_sink()
        relayed(instance, sink)
        post(instance, ["a@far.example"], letter("large", LOREM * 400_000))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert len(sink.received[0][2]) > 20_000_000
        assert max(most_memory(instance)) < 40

    @pytest.mark.parametrize(
        ("name", "text", "outcome"),
        [
            ("a", "Subject: plain\n\ntext\n", "sent"),
            ("a", "Subject: plain\n\ngrüße\n", "sent"),
            ("a", "Subject: grüße\n\ntext\n", "bounced"),
            ("a", "X-Long: " + "x" * 70_000 + "\nX: ü\n\ntext\n", "bounced"),
            ("ä", "Subject: plain\n\ntext\n", "bounced"),
        ],
        ids=["ascii", "text", "header", "a long header", "address"],
    )
    @pytest.mark.parametrize("words", [[], ["SMTPUTF8"]])
    def test_smtputf8_is_asked_for_where_it_is_needed(
        self, hub, far, name, text, outcome, words
    ):
        domain, sink = far(EHLO=hello("8BITMIME", *words))
        options = ["SMTPUTF8", "BODY=8BITMIME"]
        with hub.smtp() as client:
            client.sendmail(
                f"payam@{HOST}", [f"{name}@{domain}"], wire_text(text), options
            )
        line = told(hub, f"{name}@{domain}")
        if words:
            assert "status=sent" in line
            return
        assert f"status={outcome}" in line
        assert ("dsn=5.6.7" in line) == (outcome == "bounced")
        assert not any("SMTPUTF8" in said for _, said in sink.log)
        assert len(sink.received) == (outcome == "sent")


class AioSink:
    """A server of aiosmtpd in a thread; it answers from a table, like a Sink.

    A row is EHLO, MAIL, the local part of a recipient, DATA for the reply
    behind the dot, END and the local part for one of LMTP's. It is a reply,
    or an exception that the handler raises.
    """

    def __init__(self, library, place, rows=(), kind="controller", **how):
        self.rows, self.stages = dict(rows), []
        self.received = []  # (recipients, content, whether by TLS)
        self.logins = []
        self.is_lmtp = kind == "lmtp"
        hooks = types.SimpleNamespace(
            handle_EHLO=self.greet,
            handle_MAIL=self.take_sender,
            handle_RCPT=self.take_recipient,
            handle_DATA=self.take_message,
        )
        self.controller = library.controller.Controller(
            hooks, *place, authenticator=self.check, **how
        )
        if self.is_lmtp:
            options = self.controller.SMTP_kwargs
            self.controller.factory = lambda: library.lmtp.LMTP(hooks, **options)
        self.result = library.smtp.AuthResult
        self.controller.start()
        self.port = place[1]

    def reply(self, stage, usual="250 2.0.0 Ok"):
        self.stages.append(stage)
        row = self.rows.get(stage, usual)
        if isinstance(row, Exception):
            raise row
        return row

    async def greet(self, server, session, envelope, name, usual):
        row = self.reply("EHLO", None)
        session.host_name = name
        return [row] if row else usual

    async def take_sender(self, server, session, envelope, address, options):
        answer = self.reply("MAIL")
        envelope.mail_from = address
        return answer

    async def take_recipient(self, server, session, envelope, address, options):
        answer = self.reply(address.partition("@")[0])
        if answer.startswith("2"):
            envelope.rcpt_tos.append(address)
        return answer

    async def take_message(self, server, session, envelope):
        names = [name.partition("@")[0] for name in envelope.rcpt_tos]
        stages = [f"END {name}" for name in names] if self.is_lmtp else ["DATA"]
        answers = [self.reply(stage) for stage in stages]
        if any(answer.startswith("2") for answer in answers):
            content, is_secure = envelope.original_content, session.ssl is not None
            self.received.append((envelope.rcpt_tos, content, is_secure))
        return "\r\n".join(answers)

    def check(self, server, session, envelope, mechanism, data):
        """What aiosmtpd asks when somebody logs in."""
        user, secret = data.login.decode(), data.password.decode()
        self.logins.append(Login(mechanism, user, secret, session.ssl is not None))
        return self.result(success=(user, secret) == ("joe", SECRET), handled=False)


AIO_ANSWERS = {
    "not now": "451 4.3.0 Not now",
    "never": "550 5.7.1 Never",
    "going": "421 4.3.2 Going",
    "a fault": ValueError("a fault of the handler"),
}
# aiosmtpd says 421 and stays, and answers 500 when its handler fails.
AIO_MEANS = {"going": "not now", "a fault": "never"}
AIO_MAIL = {
    **{f"long, {kind}": text for kind, text in TOO_LONG.items()},
    **{f"8-bit, {kind}": text for kind, text in EIGHT_BIT.items()},
    **{f"nasty, {kind}": f"Subject: nasty\n\n{text}" for kind, text in NASTY.items()},
}
AIO_ASCII = {"decode_data": True, "enable_SMTPUTF8": False}  # and no 8BITMIME


class TestRelayToAiosmtpd:
    """aiosmtpd as the far side: a server that knows nothing of minimta."""

    @pytest.fixture
    def serve(self):
        """Starts servers of aiosmtpd at a place."""
        for name in ("controller", "lmtp", "smtp"):
            module = f"aiosmtpd.{name}"
            pytest.importorskip(module, reason="aiosmtpd is not installed")
        made = []

        def start(place=None, **how):
            place = place or ("127.0.0.1", free_port())
            made.append(AioSink(sys.modules["aiosmtpd"], place, **how))
            return made[-1]

        yield start
        for one in made:
            one.controller.stop()

    @pytest.fixture
    def side(self, hub, serve):
        """Makes a far side: its domain, and the server there."""

        def make(*rows, **how):
            number = next(hub.cases)
            place = (f"{FAR_NET}.{number}", hub.far_port)
            return f"case{number}.far.example", serve(place, rows=rows, **how)

        return make

    @pytest.fixture
    def smarthost(self, serve, make_instance, make_names, certificates):
        """Starts an instance with a relayhost, where joe must log in."""

        def start(name="good", secret=SECRET, **how):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates[name])
            needs = {"require_starttls": True, "auth_required": True}
            sink, one = serve(tls_context=context, **needs, **how), make_instance()
            make_names(one, {}, "127.0.0.1 localhost\n")
            passwords = one.write("etc/sasl", f"[localhost] joe:{secret}\n")
            passwords.chmod(0o600)
            one.configure(
                relayhost=f"[localhost]:{sink.port}",
                smtp_tls_CAfile=certificates["ca"],
                smtp_sasl_password_maps=passwords,
            )
            post(one.start(), ["a@far.example"], letter("smarthost"))
            return told(one, "a@far.example"), sink

        return start

    @pytest.mark.parametrize("kind", AIO_ANSWERS)
    @pytest.mark.parametrize("stage", ["EHLO", "MAIL", "a", "b", "c", "DATA"])
    def test_a_bad_answer_has_its_outcome(self, hub, side, stage, kind):
        domain, sink = side((stage, AIO_ANSWERS[kind]))
        names = [f"{name}@{domain}" for name in "abc"]
        post(hub, names, letter("scripted"))
        wanted = fate(stage, AIO_MEANS.get(kind, kind))
        assert outcomes(hub, *names) == wanted
        sent = [name for name, how in zip(names, wanted) if how == "sent"]
        assert [recipients for recipients, _, _ in sink.received] == [sent] * bool(sent)

    @pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
    def test_who_must_use_tls_and_log_in_does(self, smarthost, mechanism):
        others = {"PLAIN", "LOGIN"} - {mechanism}
        line, sink = smarthost(auth_exclude_mechanism=others)
        assert "status=sent" in line
        assert sink.logins == [Login(mechanism, "joe", SECRET, True)]
        assert [is_secure for _, _, is_secure in sink.received] == [True]

    @pytest.mark.parametrize("name", ["expired", "wrong name", "self-signed"])
    def test_a_bad_certificate_gets_no_password(self, smarthost, name):
        line, sink = smarthost(name)
        assert "dsn=4.7.5, status=deferred" in line
        assert (sink.logins, sink.received) == ([], [])

    def test_a_wrong_password_is_waited_with(self, smarthost):
        line, sink = smarthost(secret="wrong")
        assert re.search(r"dsn=4\.7\.\d, status=deferred", line)
        assert "535" in line
        assert "MAIL" not in sink.stages

    @pytest.mark.parametrize("is_offered", [True, False])
    def test_an_address_in_utf_8_goes_where_it_may(self, hub, side, is_offered):
        domain, sink = side(enable_SMTPUTF8=is_offered)
        hub.sendmail(f"grüße@{domain}", stdin=letter("utf-8"))
        line = told(hub, f"grüße@{domain}")
        assert ("status=sent" if is_offered else "dsn=5.6.7, status=bounced") in line
        found = [recipients for recipients, _, _ in sink.received]
        assert found == [[f"grüße@{domain}"]] * is_offered
        assert ("MAIL" in sink.stages) == is_offered

    def test_what_is_too_large_for_it_is_not_tried(self, hub, side):
        domain, sink = side(data_size_limit=2000)
        post(hub, [f"a@{domain}"], letter("large", LOREM * 50))
        assert "dsn=5.3.4, status=bounced" in told(hub, f"a@{domain}")
        assert "MAIL" not in sink.stages

    @pytest.mark.parametrize("how", [{}, AIO_ASCII], ids=["8-bit", "7-bit"])
    @pytest.mark.parametrize("kind", AIO_MAIL)
    def test_every_content_arrives_as_it_was(self, hub, side, kind, how):
        domain, sink = side(**how)
        data = raw(AIO_MAIL[kind])
        post(hub, [f"a@{domain}"], data)
        assert outcomes(hub, f"a@{domain}") == ["sent"]
        ((_, content, _),) = sink.received
        assert not how or content.isascii()
        assert leaves_of(content) == leaves_of(data)

    def test_by_lmtp_each_mailbox_has_its_own_reply(self, instance, serve):
        rows = {"END user2": "552 5.2.2 Full", "END payam": "451 4.3.0 Not now"}
        store = serve(kind="lmtp", rows=rows)
        instance.configure(mailbox_transport=f"lmtp:127.0.0.1:{store.port}")
        names = [f"{name}@{HOST}" for name in LOCAL_USERS]
        instance.start().send(names, letter("store", ".", "end"))
        assert outcomes(instance, *names) == ["sent", "bounced", "deferred"]
        ((recipients, content, _),) = store.received
        assert sorted(recipients) == sorted(names)
        assert content.endswith(b"\r\n.\r\nend\r\n")

    def test_much_mail_arrives_once_each(self, hub, side):
        domain, sink = side()
        names = [f"n{number}@{domain}" for number in range(100)]
        with hub.smtp() as client:
            for name in names:
                text = wire_text(letter(name))
                client.sendmail(f"payam@{HOST}", [name], text)
        assert outcomes(hub, *names) == ["sent"] * 100
        found = [(name, name.encode() in text) for (name,), text, _ in sink.received]
        assert sorted(found) == sorted((name, True) for name in names)


SINK_FLAGS = {
    # flags: what a dump must say of how the mail came
    "": "X-Client-Proto: ESMTP",
    "-8": "X-Client-Proto: ESMTP",
    "-a": "X-Client-Proto: ESMTP",
    "-e": "X-Client-Proto: SMTP",
    "-E": "X-Client-Proto: ESMTP",
    "-N": "X-Client-Proto: ESMTP",
    "-p": "X-Client-Proto: ESMTP",
    "-P": "X-Client-Proto: SMTP",
    "-h mx.sink.example": "by mx.sink.example",
    "-W .:1": "X-Client-Proto: ESMTP",
}
SINK_STAGES = ("CONNECT", "EHLO", "MAIL", "RCPT", "DATA", ".")
SINK_REFUSALS = {"-f": "never", "-r": "not now", "-q": "gone", "-Q": "going"}


class SmtpSinkProgram:
    """Postfix's smtp-sink with flags, and the mail that it took."""

    def __init__(self, program, folder, place, flags):
        self.folder = folder
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        user = ("-u", "nobody") if AS_ROOT else ()
        words = [program, *user, "-d", f"{folder}/%Y.", *flags]
        self.process = subprocess.Popen([*words, f"{place[0]}:{place[1]}", "100"])
        wait_for(lambda: self.is_open(place))

    def is_open(self, place):
        assert self.process.poll() is None
        with contextlib.suppress(OSError):
            socket.create_connection(place, PATIENCE).close()
            return True
        return False

    def dumps(self):
        return [path.read_bytes() for path in self.folder.iterdir()]

    def recipients(self):
        """The recipients of each message that came."""
        shape = rb"(?m)^X-Rcpt-Args: <(.*)>"
        return sorted(re.findall(shape, dump) for dump in self.dumps())

    def close(self):
        self.process.kill()
        self.process.wait()


class TestRelayToSmtpSink:
    """Postfix's smtp-sink as the far side, each flag of its own."""

    @pytest.fixture
    def sink(self, hub):
        """Starts smtp-sink with flags: its domain, its place, and itself."""
        program, made = tool("smtp-sink"), []

        def start(*flags):
            number = next(hub.cases)
            place = (f"{FAR_NET}.{number}", hub.far_port)
            folder = hub.root / "sinks" / str(number)
            made.append(SmtpSinkProgram(program, folder, place, flags))
            return f"case{number}.far.example", place, made[-1]

        yield start
        for one in made:
            one.close()

    @pytest.mark.parametrize("flags", SINK_FLAGS)
    def test_mail_arrives_whatever_it_can_and_says(self, hub, sink, flags):
        domain, _, sink = sink(*flags.split())
        data = raw(EIGHT_BIT["text"])
        post(hub, [f"a@{domain}", f"b@{domain}"], data)
        assert outcomes(hub, f"a@{domain}", f"b@{domain}") == ["sent"] * 2
        (dump,) = sink.dumps()
        assert SINK_FLAGS[flags].encode() in dump
        assert dump.count(b"X-Rcpt-Args: ") == 2
        assert dump.isascii() == (flags in ("-8", "-e", "-P"))
        assert leaves_of(dump) == leaves_of(data)

    @pytest.mark.parametrize("flag", SINK_REFUSALS)
    @pytest.mark.parametrize("stage", SINK_STAGES)
    def test_a_bad_answer_has_its_outcome(self, hub, sink, stage, flag):
        domain, _, sink = sink(flag, stage)
        names = [f"{name}@{domain}" for name in "ab"]
        post(hub, names, letter("flag"))
        wanted = fate({".": "END"}.get(stage, stage), SINK_REFUSALS[flag])[:2]
        assert outcomes(hub, *names) == wanted
        if wanted == ["sent"] * 2:  # it dumps what it refuses, too
            assert sink.recipients() == [[name.encode() for name in names]]

    @pytest.mark.parametrize("flag", SINK_REFUSALS)
    @pytest.mark.parametrize("stage", ["RSET", "QUIT"])
    def test_a_bad_answer_between_messages_costs_nobody_anything(
        self, hub, sink, stage, flag
    ):
        domain, _, sink = sink(flag, stage)
        names = [f"{name}@{domain}" for name in "abc"]
        for name in names:
            post(hub, [name], letter("flag"))
            assert outcomes(hub, name) == ["sent"]
        assert sink.recipients() == [[name.encode()] for name in names]

    def test_its_own_words_and_status_are_told(self, hub, sink):
        domain, _, _ = sink("-f", "RCPT", "-B", "550 5.1.1 Nobody here")
        post(hub, [f"a@{domain}"], letter("words"))
        line = told(hub, f"a@{domain}")
        assert "dsn=5.1.1, status=bounced" in line
        assert "Nobody here" in line

    def test_who_hangs_up_behind_the_dot_may_get_it_twice(self, hub, sink):
        domain, _, _ = sink("-q", ".")
        post(hub, [f"a@{domain}"], letter("twice"))
        line = told(hub, f"a@{domain}")
        assert "dsn=4.4.2, status=deferred" in line
        assert "message may be sent more than once" in line

    @pytest.mark.parametrize("size", [1, 30_000])
    def test_who_refuses_before_the_message_and_goes_is_heard(self, hub, sink, size):
        domain, _, _ = sink("-A", "0")
        post(hub, [f"a@{domain}"], letter("refused", LOREM * size))
        line = told(hub, f"a@{domain}")
        assert "status=bounced" in line
        assert "550 This violates SMTP" in line

    def test_a_mailbox_store_takes_mail_by_lmtp(self, instance, sink):
        _, (host, port), sink = sink("-L")
        instance.configure(mailbox_transport=f"lmtp:{host}:{port}")
        names = [f"{name}@{HOST}" for name in LOCAL_USERS]
        instance.start().send(names, letter("store"))
        assert outcomes(instance, *names) == ["sent"] * 3
        (dump,) = sink.dumps()
        assert b"X-Client-Proto: LMTP" in dump
        assert dump.count(b"X-Rcpt-Args: ") == 3

    def test_much_mail_arrives_once_each(self, hub, sink):
        domain, _, sink = sink()
        names = [f"n{number}@{domain}" for number in range(300)]
        with hub.smtp() as client:
            for name in names:
                client.sendmail(f"payam@{HOST}", [name], wire_text(letter(name)))
        shape = rf"to=<.*@{domain}>, .*status=sent"
        wait_for(lambda: len(re.findall(shape, hub.log())) == 300)
        assert sink.recipients() == sorted([name.encode()] for name in names)


ROUTE_ROWS = [
    # address, what explain says, its exit code, the sink or the outcome
    ("a@smtp.example", "next host [127.0.0.1]:{one}", 0, "one"),
    ("a@sub.smtp.example", "next host [127.0.0.1]:{two}", 0, "two"),
    ("boss@smtp.example", "next host [127.0.0.1]:{two}", 0, "two"),
    ("a@relay.example", "next host [127.0.0.1]:{one}", 0, "one"),
    ("a@encrypt.example", "TLS: needed", 0, "deferred"),
    ("a@none.example", "TLS: none", 0, "one"),
    ("a@lmtp.example", "next host lmtp:[127.0.0.1]:{store}", 0, "store"),
    ("a@unix.example", "next host lmtp:{path}", 0, "unix"),
    ("payam@local.example", "user payam", 0, "sent"),
    ("nobody@local.example", "unknown user", 67, "bounced"),
    ("a@error.example", "bounced: no such place", 67, "bounced"),
    ("a@retry.example", "deferred: come again", 75, "deferred"),
    ("a@discard.example", "thrown away", 0, "sent"),
    ("a@usual.example", "relayhost [127.0.0.1]:{usual}", 0, "usual"),
    ("a@colon.example", "relayhost [127.0.0.1]:{usual}", 0, "usual"),
    ("a@bad.example", "deferred: transport_maps", 75, "deferred"),
    ("a@uucp.example", "deferred: transport_maps", 75, "deferred"),
    ("a@bare.example", "next host [127.0.0.1]:{one}", 0, "one"),
    # of our own mail
    (f"user1@{HOST}", "next host [127.0.0.1]:{one}", 0, "one"),
    ("a@lists.localdomain", "next host [127.0.0.1]:{two}", 0, "two"),
    ("a@other.example", "relayhost [127.0.0.1]:{usual}", 0, "usual"),
]

ROUTE_MAP = """\
boss@smtp.example smtp:[127.0.0.1]:{two}
smtp.example      smtp:[127.0.0.1]:{one}
.smtp.example     smtp:[127.0.0.1]:{two}
relay.example     relay:[127.0.0.1]:{one}
encrypt.example   smtp:[127.0.0.1]:{one} encrypt
none.example      smtp:[127.0.0.1]:{one} none
lmtp.example      lmtp:[127.0.0.1]:{store}
unix.example      lmtp:unix:{path}
local.example     local:
error.example     error:5.1.2 no such place
retry.example     retry:4.3.2 come again
discard.example   discard:
usual.example     smtp:
colon.example     :
bad.example       smtp:[127.0.0.1]:nosuch
uucp.example      uucp:[127.0.0.1]:25
bare.example      [127.0.0.1]:{one}
user1@{host} smtp:[127.0.0.1]:{one}
lists.localdomain SMTP:[127.0.0.1]:{two}
"""


class TestTransportMaps:
    """transport_maps, by a daemon."""

    @pytest.fixture(scope="class")
    def ways(self, bin_dir):
        """A daemon with sinks by name, and its map's places."""
        one = Instance(bin_dir)
        sinks = {name: SmtpSink() for name in ("one", "two", "store", "usual")}
        path = str(one.root / "socket")
        sinks["unix"] = UnixSink(place=path)
        os.chmod(path, 0o777)
        places = {name: sink.port for name, sink in sinks.items()}
        places["path"] = path
        routes = one.write("etc/transport", ROUTE_MAP.format(host=HOST, **places))
        relayhost = f"[127.0.0.1]:{places['usual']}"
        one.configure(
            transport_maps=f"hash:{routes}",
            relayhost=relayhost,
            mydestination=f"{HOST}, localhost, lists.localdomain",
        )
        one.start()
        yield one, sinks, places
        one.close()
        for sink in sinks.values():
            sink.close()

    @pytest.mark.parametrize(("address", "said", "code", "end"), ROUTE_ROWS)
    def test_mail_goes_where_explain_says(self, ways, address, said, code, end):
        one, sinks, places = ways
        result = one.run("minimta.py", "explain", address)
        assert (result.code, result.err) == (code, "")
        assert said.format(**places) in result.out
        if address != "a@other.example":
            assert str(one.root / "etc/transport") in result.out
        post(one, [address], letter("route"))
        assert outcomes(one, address) == ["sent" if end in sinks else end]
        found = [
            name
            for name, sink in sinks.items()
            if any([address] == names for _, names, _ in sink.received)
        ]
        assert found == ([end] if end in sinks else [])

    def test_recipients_of_one_message_go_each_their_way(self, ways):
        one, sinks, _ = ways
        token = new_token()
        names = ["x@smtp.example", "y@sub.smtp.example", "z@other.example"]
        post(one, [*names, "payam@local.example"], letter(token))
        one.wait_message_only("payam", token)
        for name, address in zip(("one", "two", "usual"), names):
            found = wait_for(
                lambda sink=sinks[name]: [
                    names for _, names, data in sink.received if token.encode() in data
                ]
            )
            assert found == [[address]]

    def test_a_map_that_is_missing_is_named_and_waited_for(self, instance, make_sink):
        sink, path = make_sink(), instance.root / "etc/transport"
        instance.configure(transport_maps=path)
        instance.start()
        post(instance, ["a@far.example", "payam"], letter("early"))
        shown = instance.wait_reason(f"transport_maps: {path}: No such file")
        assert "a@far.example" in shown
        assert "dsn=4.3.5, status=deferred" in told(instance, "a@far.example")
        assert len(instance.messages("payam")) == 1
        path.write_text(f"far.example smtp:[127.0.0.1]:{sink.port}\n")
        assert instance.run("sendmail", "-q").code == 0
        instance.wait_empty()
        assert len(sink.received) == 1

    def test_a_map_that_changes_is_used_at_once(self, instance, make_sink):
        sinks = [make_sink(), make_sink()]
        path = instance.root / "etc/transport"
        instance.configure(transport_maps=path)
        path.write_text("")
        instance.start()
        for sink in sinks:
            path.write_text(f"* smtp:[127.0.0.1]:{sink.port}\n")
            post(instance, ["a@far.example"], letter("change"))
            wait_for(lambda sink=sink: sink.received)
        assert [len(sink.received) for sink in sinks] == [1, 1]

    def test_what_explain_says_of_a_local_address_names_the_line(self, ways):
        one, _, places = ways
        shown = one.run("minimta.py", "explain", f"user1@{HOST}", "user2").out
        line = f"transport user1@{HOST} -> smtp:[127.0.0.1]:{places['one']}"
        assert re.search(rf"{re.escape(line)} +{one.root}/etc/transport:\d+\n", shown)
        assert f"mailbox {one.mailbox('user2')}" in shown

    @pytest.mark.parametrize("text", ["*", "* smtp:[127.0.0.1]:9\n", "user1 uucp:x\n"])
    def test_a_map_that_is_no_good_holds_no_local_mail_up(self, instance, text):
        path = instance.root / "etc/transport"
        if text == "*":
            path.mkdir()
        else:
            path.write_text(text)
        instance.configure(transport_maps=path)
        instance.start()
        for name in ("payam", f"user1@{HOST}"):
            post(instance, [name], letter("held"))
            instance.wait_message_only(name.partition("@")[0], "held")

    @pytest.mark.parametrize("name", ["user1", "user1@localhost", "user1+x"])
    def test_our_own_name_goes_there_whole(self, instance, make_sink, name):
        sink = make_sink()
        text = "user1@{0} smtp:[127.0.0.1]:{1}\nuser1+x@{0} smtp:[127.0.0.1]:{1}\n"
        instance.write("etc/transport", text.format(HOST, sink.port))
        instance.configure(transport_maps=instance.root / "etc/transport")
        instance.start().sendmail(name, stdin=letter("own"))
        instance.wait_empty()
        if name in ("user1", "user1+x"):
            assert [names for _, names, _ in sink.received] == [[f"{name}@{HOST}"]]
            assert instance.messages("user1") == []
        else:
            assert sink.received == []
            assert len(instance.messages("user1")) == 1

    @pytest.mark.parametrize(
        "target", [f"user1@{HOST}", "user1", "a@lists.localdomain"]
    )
    @pytest.mark.parametrize("way", ["alias", "forward"])
    def test_what_an_alias_or_a_forward_leads_there_goes_there(
        self, instance, make_sink, way, target
    ):
        sink, name = make_sink(), "user2" if way == "forward" else "team"
        keys = (f"user1@{HOST}", "lists.localdomain")
        rows = [f"{key} smtp:[127.0.0.1]:{sink.port}\n" for key in keys]
        instance.configure(
            transport_maps=instance.write("etc/transport", "".join(rows)),
            mydestination=f"{HOST}, localhost, lists.localdomain",
        )
        instance.aliases(f"team: {target}\n")
        instance.forward("user2", f"{target}\n")
        assert instance.run("newaliases").code == 0
        shown = instance.run("minimta.py", "explain", name, user="root").out
        assert "transport " in shown, shown
        instance.start().sendmail(name, stdin=letter("led"))
        instance.wait_empty()
        full = target if "@" in target else f"{target}@{HOST}"
        assert [names for _, names, _ in sink.received] == [[full]]


class Neighbour(Instance):
    """An instance that listens on an address of its own, not on 127.0.0.1."""

    address = "127.0.0.1"

    def is_ready(self):
        if self.process.poll() is not None:
            pytest.fail("the daemon ended: " + self.stderr()[-2000:])
        with contextlib.suppress(OSError):
            place = (self.address, self.port)
            with socket.create_connection(place, 5) as peer:
                return peer.recv(3) == b"220" and self.submit.exists()
        return False


NOT_FOUND = "Host or domain name not found. Name service error for name=far.example"


@needs_root
class TestMailHosts:
    """Mail that goes by MX, to port 25 of addresses of this host."""

    @pytest.fixture
    def net(self):
        """The first bytes of addresses whose port 25 is free."""
        net = f"127.{random.randrange(1, 255)}.{random.randrange(256)}"
        with socket.socket() as probe:
            try:
                probe.bind((f"{net}.2", 25))
            except OSError as error:
                pytest.skip(f"port 25: {error}")
        return net

    @pytest.fixture
    def named(self, instance, make_names, net):
        """Gives the instance names, MX rows of far.example, and its start."""

        def named(rows, mx=None, **settings):
            rows = dict(rows)
            for number in range(2, 8):
                rows[f"mx{number}.example", "A"] = [("A", f"{net}.{number}")]
            if mx is not None:
                rows["far.example", "MX"] = [("MX", one) for one in mx]
            server = make_names(instance, rows)
            instance.configure(**settings)
            instance.start()
            return server

        return named

    @pytest.fixture
    def far25(self, make_sink, net):
        """Makes the sink of a number."""
        return lambda number, **how: make_sink(place=(f"{net}.{number}", 25), **how)

    def test_the_best_host_gets_it(self, instance, named, far25):
        sinks = [far25(number) for number in (2, 3, 4)]
        named({}, [(20, "mx2.example"), (10, "mx3.example"), (30, "mx4.example")])
        post(instance, ["a@far.example"], letter("best"))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert [len(sink.clients) for sink in sinks] == [0, 1, 0]
        assert "relay=mx3.example[127." in told(instance, "a@far.example")

    @pytest.mark.parametrize("row", [None, hang_up, "421 4.3.2 Closed", "554 5.3.2 No"])
    def test_when_the_best_lets_nobody_in_the_next_gets_it(
        self, instance, named, far25, row
    ):
        first = far25(2, CONNECT=row) if row else None
        second = far25(3)
        named({}, [(10, "mx2.example"), (20, "mx3.example")])
        post(instance, ["a@far.example"], letter("next"))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert len(second.received) == 1
        assert first is None or len(first.clients) == 1

    def test_equals_share_the_mail(self, make_instance, make_names, far25, net):
        sinks = [far25(number) for number in (2, 3)]
        rows = {("far.example", "MX"): [("MX", (10, f"mx{n}.example")) for n in (2, 3)]}
        for number in (2, 3):
            rows[f"mx{number}.example", "A"] = [("A", f"{net}.{number}")]
        one = make_instance()
        make_names(one, rows)
        one.start()
        gate = len(sinks)
        for count in range(60):
            post(one, [f"n{count}@far.example"], letter("share"))
            if sum(bool(sink.clients) for sink in sinks) == gate:
                break
            # A connection is used again: the next message waits for another.
            wait_for(lambda: not any(sink.open for sink in sinks), 8)
        assert all(sink.clients for sink in sinks)

    def test_a_host_that_is_not_found_is_passed_over(self, instance, named, far25):
        sink = far25(3)
        named(
            {("gone.example", "A"): 3, ("lost.example", "A"): 2},
            [(1, "gone.example"), (2, "lost.example"), (10, "mx3.example")],
        )
        post(instance, ["a@far.example"], letter("over"))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert len(sink.received) == 1

    def test_without_mx_the_domains_address_gets_it(self, instance, named, far25, net):
        sink = far25(2)
        named({("far.example", "MX"): [], ("far.example", "A"): [("A", f"{net}.2")]})
        post(instance, ["a@far.example"], letter("none"))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert len(sink.received) == 1

    def test_an_address_literal_is_its_own_host(self, instance, named, far25, net):
        sink = far25(2)
        server = named({})
        post(instance, [f"a@[{net}.2]"], letter("literal"))
        assert outcomes(instance, f"a@[{net}.2]") == ["sent"]
        assert len(sink.received) == 1
        assert server.asked == []

    @pytest.mark.parametrize(
        ("rows", "mx", "end", "words"),
        [
            ({}, [(0, "")], "5.1.10, status=bounced", "does not accept mail"),
            ({}, None, "5.4.4, status=bounced", f"{NOT_FOUND} type=MX: Host not found"),
            (
                {("far.example", "MX"): []},
                None,
                "5.4.4, status=bounced",
                "no data record of requested type",
            ),
            (
                {("far.example", "MX"): 2},
                None,
                "4.4.3, status=deferred",
                f"{NOT_FOUND} type=MX: Host not found, try again",
            ),
            (
                {("far.example", "MX"): lambda packet, way: []},
                None,
                "4.4.3, status=deferred",
                f"{NOT_FOUND} type=MX: Host not found, try again",
            ),
            ({}, [(5, HOST)], "5.4.6, status=bounced", "loops back to myself"),
            (
                {},
                [(5, HOST), (9, "mx2.example")],
                "5.4.6, status=bounced",
                "mail for far.example loops back to myself",
            ),
            ({}, [(5, "localhost")], "5.4.6, status=bounced", "loops back to myself"),
        ],
    )
    def test_what_names_say_is_told(self, instance, named, rows, mx, end, words):
        named(rows, mx)
        post(instance, ["a@far.example"], letter("names"))
        line = told(instance, "a@far.example")
        assert f"dsn={end}" in line
        assert words in line
        if "deferred" in end:
            assert words in re.sub(r"\s+", " ", instance.mailq())
        else:
            instance.wait_empty()
            (report,) = instance.messages("payam")
            assert words in re.sub(r"\s+", " ", report)

    def test_a_backup_hands_on_to_better_hosts_only(self, instance, named, far25):
        better, worse = far25(2), far25(4)
        mx = [(10, "mx2.example"), (20, HOST), (30, "mx4.example")]
        times = {"minimal_backoff_time": "1h"}
        named({}, mx, **times)
        post(instance, ["a@far.example"], letter("backup"))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert (len(better.received), len(worse.clients)) == (1, 0)

    def test_a_backup_keeps_mail_while_the_better_host_is_down(
        self, instance, named, far25
    ):
        worse = far25(4)
        mx = [(10, "mx2.example"), (20, HOST), (30, "mx4.example")]
        named({}, mx, minimal_backoff_time="1h")
        post(instance, ["a@far.example"], letter("backup"))
        assert outcomes(instance, "a@far.example") == ["deferred"]
        assert worse.clients == []
        better = far25(2)
        assert instance.run("sendmail", "-q").code == 0
        instance.wait_empty()
        assert len(better.received) == 1

    @pytest.mark.parametrize("code", ["530 5.7.0", "534 5.7.9", "538 5.7.11"])
    def test_a_mail_host_that_wants_a_password_never_gets_it(
        self, instance, named, far25, code
    ):
        far25(2, MAIL=f"{code} Log in first")
        named({}, [(10, "mx2.example")])
        post(instance, ["a@far.example"], letter("password"))
        assert outcomes(instance, "a@far.example") == ["bounced"]
        assert "Log in first" in instance.wait_message("payam", "password")

    def test_a_mail_host_that_refuses_us_never_gets_it(self, instance, named, far25):
        far25(2, EHLO="554 5.7.1 No", HELO="554 5.7.1 No")
        named({}, [(10, "mx2.example")])
        post(instance, ["a@far.example"], letter("refused"))
        assert outcomes(instance, "a@far.example") == ["bounced"]

    def test_mx_can_be_reached_by_transport(self, instance, named, far25, net):
        sink = far25(2)
        path = instance.write("etc/transport", "else.example smtp:far.example\n")
        named({}, [(10, "mx2.example")], transport_maps=path)
        post(instance, ["a@else.example"], letter("by"))
        assert outcomes(instance, "a@else.example") == ["sent"]
        assert len(sink.received) == 1

    @pytest.fixture
    def cluster(self, bin_dir, make_names, net):
        """Three instances on three addresses; each has its own domain too.

        The first two take shared.example, the third is its backup.
        """
        made, rows = [], {}
        for number in (2, 3, 4):
            host = f"mx{number}.shared.example"
            rows[host, "A"] = [("A", f"{net}.{number}")]
            rows[f"own{number}.example", "MX"] = [("MX", (10, host))]
        rows["shared.example", "MX"] = [
            ("MX", (rank, f"mx{number}.shared.example"))
            for number, rank in ((2, 10), (3, 10), (4, 20))
        ]
        for number in (2, 3, 4):
            one = Neighbour(bin_dir)
            one.address, one.port = f"{net}.{number}", 25
            make_names(one, rows)
            host, own = f"mx{number}.shared.example", f"own{number}.example"
            shared = "" if number == 4 else ", shared.example"
            one.configure(
                inet_interfaces=one.address,
                myhostname=host,
                mydestination=f"{host}, {own}, localhost{shared}",
                relay_domains="shared.example",
            )
            made.append(one.start())
        yield made
        for one in made:
            one.close()

    def test_hosts_that_share_a_domain_deliver_each_others_mail(self, cluster):
        for one, other in itertools.permutations(cluster, 2):
            number = other.address.rpartition(".")[2]
            token = new_token()
            one.sendmail(f"user1@own{number}.example", stdin=letter(token))
            message = other.wait_message("user1", token)
            host = f"mx{one.address.rpartition('.')[2]}.shared.example"
            assert len(fields(message, "Received")) == 2
            assert f"from {host} (" in fields(message, "Received")[0]

    def test_a_backup_hands_mail_to_a_host_that_keeps_it(self, cluster):
        first, second, backup = cluster
        token = new_token()
        with smtplib.SMTP(backup.address, 25, "client.example", PATIENCE) as client:
            client.sendmail("a@client.example", "user1@shared.example", letter(token))
        backup.wait_empty()
        wait_for(lambda: any(one.with_token("user1", token) for one in (first, second)))
        found = [len(one.with_token("user1", token)) for one in (first, second)]
        assert sorted(found) == [0, 1]
        assert backup.messages("user1") == []

    def test_a_backup_alone_keeps_mail_and_sends_it_to_nobody(self, cluster):
        first, second, backup = cluster
        first.kill()
        second.kill()
        token = new_token()
        backup.sendmail("user1@shared.example", stdin=letter(token))
        shown = backup.wait_reason("Connection refused")
        assert "user1@shared.example" in shown
        first.start()
        assert backup.run("sendmail", "-q").code == 0
        first.wait_message_only("user1", token)

    def test_mail_that_only_we_could_take_but_do_not_comes_back(
        self, bin_dir, make_names, net
    ):
        one = Neighbour(bin_dir)
        try:
            one.address, one.port = f"{net}.2", 25
            rows = {
                ("far.example", "MX"): [("MX", (10, "other.example"))],
                ("other.example", "A"): [("A", f"{net}.2")],
            }
            make_names(one, rows)
            one.configure(inet_interfaces=one.address)
            one.start()
            one.sendmail("a@far.example", stdin=letter("loop"))
            assert "dsn=5.4.6, status=bounced" in told(one, "a@far.example")
        finally:
            one.close()


SENDER_MAP = """\
payam              The Boss <boss@x.example>
user1@{host}       one@x.example
root               @roots.example
*                  rest@x.example
"""


class TestSenderRewriting:
    """smtp_generic_maps: other hosts see other senders than we do."""

    @pytest.fixture(scope="class")
    def outward(self, bin_dir):
        """A daemon that rewrites, its relayhost, and a mail store."""
        one, sink, store = Instance(bin_dir), SmtpSink(), SmtpSink()
        senders = one.write("etc/senders", SENDER_MAP.format(host=HOST))
        routes = f"store.example lmtp:[127.0.0.1]:{store.port}\n"
        one.configure(
            smtp_generic_maps=senders,
            relayhost=f"[127.0.0.1]:{sink.port}",
            transport_maps=one.write("etc/transport", routes),
        )
        yield one.start(), sink, store
        one.close()
        sink.close()
        store.close()

    def sent(self, outward, *words, stdin=None, user="payam", to="far@far.example"):
        """(MAIL command, header and body) of what the relayhost gets."""
        one, sink, store = outward
        token = new_token()
        text = stdin or "To: far@far.example\nSubject: x\n\nx\n"
        result = one.run(
            "sendmail", *words, to, stdin=f"X-Token: {token}\n{text}", user=user
        )
        assert (result.code, result.err) == (0, ""), result

        def found():
            received = sink.received + store.received
            return [one for one in received if token.encode() in one[2]]

        ((sender, _, data),) = wait_for(found)
        return sender, arrived(data).decode().replace("\r\n", "\n")

    @pytest.mark.parametrize(
        ("words", "user", "sender", "shown"),
        [
            ((), "payam", "boss@x.example", "The Boss <boss@x.example>"),
            ((), "user1", "one@x.example", "user1 <one@x.example>"),
            ((), "user2", "rest@x.example", "user2 <rest@x.example>"),
            # also over what the user set
            (("-f", "payam"), "payam", "boss@x.example", "The Boss <boss@x.example>"),
            (
                ("-f", "a@b.example"),
                "payam",
                "rest@x.example",
                "payam <rest@x.example>",
            ),
            (
                ("-F", "Some Name"),
                "user1",
                "one@x.example",
                "Some Name <one@x.example>",
            ),
        ],
    )
    def test_envelope_and_from_are_rewritten(self, outward, words, user, sender, shown):
        command, text = self.sent(outward, *words, user=user)
        assert command.split()[1] == f"FROM:<{sender}>"
        assert fields(text, "From") == [shown]

    def test_the_null_sender_stays(self, outward):
        command, text = self.sent(outward, "-f", "<>", stdin="From: payam\n\nx\n")
        assert command.split()[1] == "FROM:<>"
        assert fields(text, "From") == ["The Boss <boss@x.example>"]

    def test_who_is_kept_by_user_changes_the_domain_only(self, outward):
        command, text = self.sent(outward, stdin=f"From: R <root@{HOST}>\n\nx\n")
        assert fields(text, "From") == ["R <root@roots.example>"]

    def test_every_other_field_is_only_completed(self, outward):
        text = (
            "Received: from payam\nTo: payam, B <user1> (b), c@far.example\n"
            f"Cc: payam@{HOST}\nReply-To: payam\nSender: user1\nX-From: payam\n"
            "Subject: payam\n\nFrom: payam\n"
        )
        _, found = self.sent(outward, stdin=text)
        for name, value in (
            ("To", f"payam@{HOST}, B <user1@{HOST}> (b), c@far.example"),
            ("Cc", f"payam@{HOST}"),
            ("Reply-To", f"payam@{HOST}"),
            ("Sender", "one@x.example"),
            ("X-From", "payam"),
            ("Subject", "payam"),
        ):
            assert fields(found, name) == [value]
        assert found.endswith("\n\nFrom: payam\n")

    def test_local_mail_is_left_as_it_is(self, outward):
        one, _, _ = outward
        token = new_token()
        text = f"To: payam\nFrom: payam\nX-Token: {token}\n\nx\n"
        one.sendmail("payam", "far@far.example", stdin=text)
        message = one.wait_message("payam", token)
        assert message.startswith(f"From payam@{HOST} ")
        assert fields(message, "From") == ["payam"]
        assert fields(message, "To") == ["payam"]
        assert "x.example" not in message

    def test_mail_for_a_store_is_left_as_it_is(self, outward):
        command, text = self.sent(
            outward, stdin="From: payam\n\nx\n", to="a@store.example"
        )
        assert command.split()[1] == f"FROM:<payam@{HOST}>"
        assert fields(text, "From") == ["payam"]

    def test_explain_says_what_then_happens(self, outward):
        one, _, _ = outward
        command, text = self.sent(outward)
        out = one.run("minimta.py", "explain", "--from", "payam", "far@far.example").out
        sender = command.split()[1].removeprefix("FROM:")
        assert f"sender <payam@{HOST}> -> {sender}" in out
        assert f"-> From: {fields(text, 'From')[0]}" in out
        assert f"{one.root}/etc/senders:1" in out

    def test_a_map_that_changes_is_used_for_the_next_mail(self, instance, make_sink):
        sink, path = make_sink(), instance.root / "etc/senders"
        path.write_text("* one@x.example\n")
        relayed(instance, sink, smtp_generic_maps=path)
        for count, name in enumerate(("one", "two"), 1):
            path.write_text(f"* {name}@x.example\n")
            post(instance, ["a@far.example"], letter("change"))
            wait_for(lambda count=count: len(sink.received) == count)
            assert f"FROM:<{name}@x.example>" in sink.received[-1][0]

    @pytest.mark.parametrize("line", ["* @@\n", "* \n", "* a b@c\n"])
    def test_a_bad_line_is_deferred_and_named(self, instance, make_sink, line):
        sink = make_sink()
        path = instance.write("etc/senders", f"# x\n{line}")
        relayed(instance, sink, smtp_generic_maps=path)
        post(instance, ["a@far.example"], letter("bad"))
        end = told(instance, "a@far.example")
        assert "dsn=4.3.5, status=deferred" in end
        assert f"{path}:2" in end
        assert sink.received == []

    def test_a_map_that_is_missing_is_deferred_and_named(self, instance, make_sink):
        path = instance.root / "etc/senders"
        relayed(instance, make_sink(), smtp_generic_maps=path)
        post(instance, ["a@far.example"], letter("missing"))
        end = told(instance, "a@far.example")
        assert "dsn=4.3.5, status=deferred" in end
        assert f"smtp_generic_maps: {path}: No such file" in end

    @pytest.mark.parametrize("name", ["host.local", "host.lan", "a.internal", "a.b."])
    def test_a_name_that_was_set_is_the_hello(self, instance, make_sink, name):
        sink = make_sink()
        instance.configure(myhostname=name, relayhost=f"[127.0.0.1]:{sink.port}")
        post(instance.start(), ["a@far.example"], letter("hello"))
        wait_for(lambda: sink.received)
        assert sink.log[0][1] == f"EHLO {name.rstrip('.')}"

    @pytest.mark.parametrize("name", ["host", "host.localdomain"])
    def test_a_name_that_nobody_knows_is_no_hello(self, instance, make_sink, name):
        sink = make_sink()
        instance.configure(myhostname=name, relayhost=f"[127.0.0.1]:{sink.port}")
        instance.start().sendmail("a@far.example", stdin=letter("hello"))
        wait_for(lambda: sink.received)
        (said,) = [line for _, line in sink.log if line.startswith("EHLO")]
        assert said == "EHLO [127.0.0.1]"

    @needs_root
    def test_a_map_that_only_root_reads_is_used_by_roots_daemon(
        self, instance, make_sink
    ):
        sink = make_sink()
        path = instance.write("etc/senders", "* one@x.example\n")
        path.chmod(0o600)
        relayed(instance, sink, smtp_generic_maps=path)
        post(instance, ["a@far.example"], letter("root"))
        assert outcomes(instance, "a@far.example") == ["sent"]
        assert "FROM:<one@x.example>" in sink.received[0][0]


class TestBounce:
    """The report that a sender gets."""

    @pytest.fixture
    def report(self, instance, make_sink):
        relayed(instance, make_sink(RCPT="550 5.1.1 No such person"))
        text = letter("my letter", "my secret text")
        instance.sendmail("friend@example.com", stdin=text, user="payam")
        return instance.wait_message("payam", "my letter")

    def test_it_is_from_nobody_to_the_sender(self, report):
        assert report.startswith("From MAILER-DAEMON  ")
        assert fields(report, "Return-Path") == ["<>"]
        assert "MAILER-DAEMON@" in fields(report, "From")[0].upper()
        assert f"payam@{HOST}" in fields(report, "To")[0]
        assert fields(report, "Auto-Submitted") == ["auto-replied"]
        for name in ("Date", "Message-ID", "Subject"):
            assert len(fields(report, name)) >= 1, name

    def test_it_says_who_was_not_reached_and_why(self, report):
        _, body = head_and_body(report)
        assert "friend@example.com" in body
        assert "550 5.1.1 No such person" in re.sub(r"\s+", " ", body)

    def test_it_is_a_message_that_programs_can_read(self, report):
        text = report.partition("\n")[2]
        parsed = message_from_bytes(text.encode())
        assert parsed.defects == []
        assert parsed["Subject"] != "my letter"

    def test_a_bounce_that_bounces_goes_to_postmaster_once(self, instance, make_sink):
        relayed(instance, make_sink(RCPT="550 5.1.1 No such person"))
        words = ("-f", "ghost@example.com", "friend@example.com")
        instance.sendmail(*words, stdin=letter("doomed"))
        wait_for(lambda: instance.with_token("root", "doomed"))
        instance.wait_empty()
        assert len(instance.messages("root")) == 1

    def test_mail_of_nobody_that_bounces_ends_at_postmaster(self, instance, make_sink):
        relayed(instance, make_sink(RCPT="550 5.1.1 No such person"))
        instance.sendmail("-f", "<>", "friend@example.com", stdin=letter("doomed"))
        wait_for(lambda: instance.with_token("root", "doomed"))
        instance.wait_empty()
        assert len(instance.messages("root")) == 1

    def test_mail_that_waited_too_long_comes_back(self, instance):
        instance.configure(
            relayhost=f"[127.0.0.1]:{free_port()}",
            minimal_backoff_time="1s",
            maximal_backoff_time="1s",
            maximal_queue_lifetime="2s",
        )
        instance.start()
        instance.sendmail("friend@example.com", stdin=letter("tired"), user="payam")
        report = instance.wait_message("payam", "tired")
        assert "friend@example.com" in report


def nobody_uid():
    """Whose rights commands of /etc/aliases have."""
    return pwd.getpwnam("nobody").pw_uid if AS_ROOT else os.getuid()


def open_folder(instance, name="drop"):
    """A directory of an instance that everybody may write to."""
    path = instance.root / name
    path.mkdir()
    path.chmod(0o777)
    return path


def uid_of(user):
    return UIDS[user] if AS_ROOT else os.getuid()


def wait_text(path):
    """What a command wrote, once it is there as a whole."""
    wait_for(lambda: path.exists() and path.read_text().endswith("end\n"))
    return path.read_text()


# A command's whole surroundings; the last line says that they are written.
TELL = (
    "(env; echo cwd=$PWD uid=$(id -u) groups=$(id -G) mask=$(umask); cat) >{}; "
    "echo end >>{}"
)


def alive(group):
    """The processes of a process group that have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            if int(words[2]) == group and words[0] != "Z":
                found.append(name)
    return found


class TestCommands:
    """Pipes in aliases and .forward."""

    def tell(self, instance, name="told"):
        """(the command that writes down its surroundings, where to)."""
        path = open_folder(instance) / name
        return "|" + TELL.format(path, path), path

    def test_a_command_of_an_alias_runs_as_default_privs(self, server):
        command, path = self.tell(server)
        server.aliases(f'prog: "{command}"\n')
        server.send("prog+x@localhost", letter("through", "From me", ".dot"))
        told = wait_text(path)
        where, _, message = told.partition("mask=0077\n")
        words = dict(line.split("=", 1) for line in where.splitlines() if "=" in line)
        assert f"cwd=/ uid={nobody_uid()}" in where
        assert path.stat().st_mode & 0o777 == 0o600
        assert (words["SENDER"], words["RECIPIENT"]) == (
            *("friend@example.com", "prog+x@localhost"),
        )
        assert (words["LOCAL"], words["DOMAIN"], words["EXTENSION"]) == (
            *("prog+x", "localhost", "x"),
        )
        assert (words["CLIENT_ADDRESS"], words["CLIENT_PROTOCOL"]) == (
            *("127.0.0.1", "ESMTP"),
        )
        assert words["ORIGINAL_RECIPIENT"] == "prog+x@localhost"
        assert message.startswith("From friend@example.com  ")
        assert "\nReturn-Path: <friend@example.com>\nX-Original-To: prog+x@" in message
        assert "\nDelivered-To: prog+x@localhost\n" in message
        assert "\nFrom me\n.dot\nend\n" in message  # not quoted, nothing behind it
        server.wait_empty()
        assert "status=sent (delivered to command: (env; echo" in server.log()

    def test_its_environment_is_made_for_it(self, instance):
        command, path = self.tell(instance)
        instance.aliases(f'prog: "{command}"\n')
        instance.start(env={"LD_LIBRARY_PATH": "/x", "BASH_ENV": "/x", "SECRET": "1"})
        instance.send("prog@localhost", letter("through"))
        where = wait_text(path).partition("mask=")[0]
        names = {line.partition("=")[0] for line in where.splitlines()}
        assert names <= set(
            "PATH SHELL LANG AGENT HOME USER LOGNAME MINIMTA_ROOT TZ SENDER RECIPIENT "
            "ORIGINAL_RECIPIENT LOCAL DOMAIN EXTENSION CLIENT_ADDRESS CLIENT_HOSTNAME "
            "CLIENT_PROTOCOL CLIENT_HELO ENVID PWD OLDPWD SHLVL _ cwd".split()
        )

    def test_a_command_of_a_user_runs_as_the_user_in_the_home(self, server):
        command, path = self.tell(server)
        server.forward("user1", f'\\user1, "{command}"\n')
        server.send("user1@localhost", letter("both"))
        where = wait_text(path)
        uid, home = uid_of("user1"), server.home("user1")
        assert f"cwd={home} uid={uid} groups={uid if AS_ROOT else ''}" in where
        assert f"HOME={home}\n" in where
        assert "USER=user1\n" in where
        server.wait_message("user1", "both")

    @needs_root
    def test_a_command_of_a_list_runs_as_its_owner(self, server):
        command, path = self.tell(server)
        listed = server.write("list", f"{command}\nuser2\n")
        server.give(listed, "user1")
        server.aliases(f"all: :include:{listed}\n")
        server.send("all@localhost", letter("listed"))
        assert f"uid={UIDS['user1']}" in wait_text(path)
        server.wait_message("user2", "listed")

    @needs_root
    def test_no_command_is_run_as_root(self, server):
        command, path = self.tell(server)
        (server.home("root") / ".forward").write_text(f'"{command}"\n')
        server.send("root@localhost", letter("root"))
        assert f"uid={nobody_uid()}" in wait_text(path)

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            *[(64, "5.3.0"), (65, "5.6.0"), (66, "5.3.0"), (67, "5.1.1")],
            *[(68, "5.1.2"), (69, "5.3.0"), (70, "5.3.0"), (71, "4.3.0")],
            *[(73, "5.2.0"), (74, "4.3.0"), (75, "4.3.0"), (76, "5.5.0")],
            *[(77, "5.7.0"), (78, "5.3.5"), (99, None), (100, "5.3.0")],
            *[(111, "4.3.0"), (0, None), (1, "5.3.0"), (126, "4.3.0"), (127, "4.3.0")],
            *[(-9, "4.3.0"), (-15, "4.3.0")],
        ],
    )
    def test_an_exit_code_has_its_verdict(self, code, status):
        failure = minimta.verdict("cmd", code, "")
        assert (failure and failure.status) == status

    def test_what_a_command_says_comes_back_in_the_bounce(self, server):
        server.aliases('prog: "|echo so sorry; exit 67"\n')
        server.sendmail("prog", stdin=letter("unwanted"), user="payam")
        report = server.wait_message("payam", "unwanted")
        text = re.sub(r"\s+", " ", report)
        assert (
            "<prog@centos7-1.localdomain>: user unknown. Command output: so sorry"
            in text
        )
        assert "Status: 5.1.1" in report

    def test_a_status_that_a_command_prints_counts_more_than_its_code(self, server):
        server.aliases('prog: "|echo 5.7.99 not for you; exit 1"\n')
        server.sendmail("prog", stdin=letter("unwanted"), user="payam")
        report = server.wait_message("payam", "unwanted")
        assert "Status: 5.7.99" in report
        assert "not for you" in report

    @pytest.mark.parametrize(
        ("command", "why"),
        [
            ("exit 75", "temporary failure"),
            ("kill -9 $$", "Command died with signal 9"),
            ("/no/such/program", "command not found"),
            ("echo full up; exit 111", "Command output: full up"),
        ],
    )
    def test_what_may_do_later_is_deferred(self, server, command, why):
        server.aliases(f'prog: "|{command}"\n')
        server.send("prog@localhost", letter("later"))
        assert why in server.wait_reason(")\n")

    def test_a_command_has_only_so_much_time(self, instance):
        instance.configure(command_time_limit="1s")
        path = open_folder(instance) / "pid"
        instance.aliases(f'prog: "|echo $$ >{path}; sleep 600 & sleep 600"\n')
        instance.start()
        instance.send("prog@localhost", letter("slow"))
        assert "Command time limit exceeded" in instance.wait_reason(")\n")
        wait_for(lambda: not alive(int(path.read_text())))

    def test_a_slow_command_holds_up_nobody(self, instance):
        gate = open_folder(instance) / "gate"
        os.mkfifo(gate)
        gate.chmod(0o666)
        instance.aliases(f'slow: "|read line <{gate}"\n')
        instance.start()
        for _ in range(10):
            instance.send("slow@localhost", letter("slow"))
        instance.send("payam@localhost", letter("fast"))
        instance.aliases(f'slow: "|read line <{gate}"\nquick: "|true"\n')
        instance.send("quick@localhost", letter("quick"))
        wait_for(lambda: instance.with_token("payam", "fast"))
        wait_for(lambda: "delivered to command: true" in instance.log())
        assert len(instance.queued()) == 10

    @needs_root
    def test_one_users_commands_take_no_more_than_their_share(
        self, instance, make_sink
    ):
        lines = "".join(f'"|sleep 600; : {number}"\n' for number in range(30))
        instance.forward("user1", lines)
        instance.aliases('quick: "|true"\n')
        relayed(instance, make_sink())
        instance.send("user1@localhost", letter("greedy"))
        instance.wait_reason("user1@")
        instance.send("far@example.com", letter("out"))
        instance.send("quick@localhost", letter("quick"))
        wait_for(lambda: "delivered to command: true" in instance.log())
        wait_for(lambda: "to=<far@example.com>" in instance.log())
        assert len(instance.queued()) == 1

    @needs_root
    def test_a_command_that_stops_its_supervisor_is_ended(self, instance):
        instance.configure(command_time_limit="1s")
        instance.forward("user1", '"|kill -STOP $PPID"\n')
        instance.start()
        instance.send("user1@localhost", letter("stopped"))
        assert "ended without a result" in instance.wait_reason(")\n")

    def test_a_command_need_not_read(self, server):
        server.aliases('prog: "|true"\n')
        server.send("prog@localhost", letter("unread", LOREM * 20_000))
        server.wait_empty()
        assert "delivered to command: true" in server.log()

    def test_a_command_that_prints_without_end_is_cut(self, instance):
        instance.configure(command_time_limit="1s")
        instance.aliases('prog: "|yes"\n')
        instance.start()
        instance.send("prog@localhost", letter("loud"))
        instance.wait_reason("time limit exceeded")

    @pytest.mark.parametrize(
        "sender", ["$(touch${IFS}T)@x.example", "`id`@x.example", "() { :;}; x"]
    )
    def test_an_address_is_no_shell_text(self, server, sender):
        command, path = self.tell(server)
        server.aliases(f'prog: "{command}; eval echo $SENDER >/dev/null"\n')
        server.send("prog@localhost", letter("tricky"), f'"{sender}"@example.com')
        where = wait_text(path)
        (said,) = re.findall("(?m)^SENDER=(.*)$", where)
        assert not set("$`(){}; ") & set(said)
        assert not list(server.root.rglob("T"))

    def test_a_command_ends_with_the_daemon(self, instance):
        path = open_folder(instance) / "pid"
        instance.aliases(f'prog: "|echo $$ >{path}; exec sleep 600"\n')
        instance.start()
        instance.send("prog@localhost", letter("orphan"))
        wait_for(lambda: path.exists() and path.read_text().strip())
        os.kill(instance.process.pid, signal.SIGKILL)
        instance.process.wait()
        instance.process = None
        wait_for(lambda: not alive(int(path.read_text())))
        assert len(instance.queued()) == 1


class TestFiles:
    """Files and Maildirs in aliases, in .forward, and as mailboxes."""

    def test_a_file_of_an_alias_is_an_mbox_of_default_privs(self, server):
        path = open_folder(server) / "archive"
        server.aliases(f"arch: {path}\n")
        for word in ("first", "second"):
            server.send("arch@localhost", letter(word, "From here"))
            server.wait_empty()
        texts = read_mbox(path.read_bytes())
        assert [fields(text, "Subject") for text in texts] == [["first"], ["second"]]
        assert fields(texts[0], "Delivered-To") == ["arch@localhost"]
        assert "\n>From here\n" in texts[0]
        seen = path.stat()
        assert (seen.st_mode & 0o777, seen.st_uid) == (0o600, nobody_uid())
        assert f"status=sent (delivered to file: {path})" in server.log()

    def test_a_file_of_a_user_is_the_users(self, server):
        server.forward("user1", "~/outbox\n")
        server.send("user1@localhost", letter("kept"))
        server.wait_empty()
        path = server.home("user1") / "outbox"
        assert len(read_mbox(path.read_bytes())) == 1
        assert path.stat().st_uid == uid_of("user1")

    def test_dev_null_takes_everything(self, server):
        server.aliases("void: /dev/null\n")
        server.send("void@localhost", letter("gone"))
        server.wait_empty()
        assert "status=sent (discarded)" in server.log()

    @pytest.mark.parametrize(
        ("kind", "why", "status"),
        [
            ("symlink", "is a symbolic link", "5.2.0"),
            ("hard link", "has more than one name", "5.2.0"),
            ("fifo", "is not a regular file", "5.2.0"),
            ("directory", "Is a directory", "5.2.0"),
            ("executable", "is executable", "5.7.1"),
            ("no directory", "No such file or directory", "5.2.0"),
        ],
    )
    def test_what_is_no_plain_file_is_bounced(self, server, kind, why, status):
        folder = open_folder(server)
        precious, path = folder / "precious", folder / "archive"
        precious.write_text("precious\n")
        precious.chmod(0o666)
        makers = {
            "symlink": lambda: path.symlink_to(precious),
            "hard link": lambda: os.link(precious, path),
            "fifo": lambda: os.mkfifo(path) or path.chmod(0o666),
            "directory": lambda: path.mkdir(),
            "executable": lambda: path.touch() or path.chmod(0o777),
            "no directory": lambda: None,
        }
        makers[kind]()
        if kind == "no directory":
            path = folder / "none/archive"
        server.aliases(f"arch: {path}\n")
        server.sendmail("arch", stdin=letter("trap"), user="payam")
        report = server.wait_message("payam", "trap")
        assert why in re.sub(r"\s+", " ", report)
        assert f"Status: {status}" in report
        assert precious.read_text() == "precious\n"

    @needs_root
    def test_a_file_that_default_privs_may_not_write_is_bounced(self, server):
        secret = server.write("secret", "secret\n")
        secret.chmod(0o644)
        server.aliases(f"arch: {secret}\n")
        server.sendmail("arch", stdin=letter("trap"), user="payam")
        report = server.wait_message("payam", "trap")
        assert "Permission denied" in re.sub(r"\s+", " ", report)
        assert secret.read_text() == "secret\n"

    @needs_root
    def test_a_file_of_a_users_forward_has_no_more_rights_than_the_user(self, server):
        box = server.make_mailbox("user2", "")
        server.forward("user1", f"{box}\n")
        server.sendmail("user1", stdin=letter("trap"), user="payam")
        report = server.wait_message("payam", "trap")
        assert "Permission denied" in re.sub(r"\s+", " ", report)
        assert box.read_text() == ""

    def test_a_maildir_gets_a_file_for_each_message(self, instance):
        instance.configure(home_mailbox="Maildir/")
        instance.start()
        for word in ("first", "second"):
            instance.send("user1@localhost", letter(word, "From here"))
            instance.wait_empty()
        box = instance.home("user1") / "Maildir"
        assert sorted(path.name for path in box.iterdir()) == ["cur", "new", "tmp"]
        files = sorted((box / "new").iterdir())
        texts = [path.read_text() for path in files]
        assert [fields(text, "Subject") for text in texts] == [["first"], ["second"]]
        assert texts[0].startswith("Return-Path: <friend@example.com>\nX-Original-To: ")
        assert texts[0].endswith("\nFrom here\n")
        assert {path.stat().st_uid for path in (box, *files)} == {uid_of("user1")}
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        assert not list((box / "tmp").iterdir())
        assert "status=sent (delivered to maildir)" in instance.log()

    def test_a_maildir_is_read_by_pythons_own(self, instance):
        import mailbox

        instance.configure(home_mailbox="Maildir/")
        instance.sendmail("-odi", "user1", stdin=letter("read"))
        (message,) = mailbox.Maildir(instance.home("user1") / "Maildir", create=False)
        assert message["Subject"] == "read"

    def test_a_mailbox_below_the_home_is_an_mbox(self, instance):
        instance.configure(home_mailbox="mbox")
        instance.sendmail("-odi", "user1", stdin=letter("home"))
        path = instance.home("user1") / "mbox"
        assert len(read_mbox(path.read_bytes())) == 1
        assert path.stat().st_uid == uid_of("user1")
        assert not instance.mailbox("user1").exists()

    @pytest.mark.parametrize("kind", ["symlink", "symlink inside", "file", "fifo"])
    def test_what_is_no_maildir_is_not_followed(self, instance, kind):
        instance.configure(home_mailbox="Maildir/")
        other = instance.root / "other"
        for name in ("", "cur", "new", "tmp"):
            (other / name).mkdir()
            instance.give(other / name, "user1")
        box = instance.home("user1") / "Maildir"
        if kind == "symlink":
            box.symlink_to(other)
        elif kind == "symlink inside":
            box.mkdir()
            instance.give(box, "user1")
            (box / "new").symlink_to(other / "new")
        elif kind == "file":
            box.write_text("")
        else:
            os.mkfifo(box)
        instance.start()
        instance.send("user1@localhost", letter("trap"))
        assert "Maildir" in instance.wait_reason(")\n")
        assert not any((other / "new").iterdir())

    def test_a_message_that_is_in_the_maildir_is_not_added_again(self, quiet):
        text = quiet.place / "etc/minimta.conf"
        text.write_text(text.read_text() + "home_mailbox = Maildir/\n")
        quiet.house = minimta.House({"MINIMTA_ROOT": str(quiet.place)})
        queue_id = quiet.commit("bob@host.example")
        path = Path(quiet.spool.path("queue", queue_id))
        there = path.read_bytes()
        box = quiet.place / "home/bob/Maildir"
        quiet.run()
        (first,) = (box / "new").iterdir()
        first.rename(box / "cur" / f"{first.name}:2,S")  # its reader has read it
        path.write_bytes(there)
        quiet.run()
        assert list((box / "new").iterdir()) == []
        assert left_in(quiet.spool) == []


class TestStore:
    """mailbox_transport: another program keeps the mail, over LMTP."""

    def test_mail_goes_there_by_tcp(self, instance, make_sink):
        store = make_sink()
        instance.configure(mailbox_transport=f"lmtp:127.0.0.1:{store.port}")
        instance.start()
        instance.sendmail("user1", "user2", stdin=letter("stored", "."), user="payam")
        instance.wait_empty()
        ((_, recipients, text),) = store.received
        assert sorted(recipients) == [f"user1@{HOST}", f"user2@{HOST}"]
        assert b"\r\n..\r\n" not in text  # sendmail without -i: the dot ended it
        assert instance.messages("user1") == []
        assert re.search(
            r"minimta/lmtp\[\d+\]: \S+: to=<user1@.*status=sent", instance.log()
        )

    def test_mail_goes_there_by_a_unix_socket(self, instance, make_sink):
        path = open_folder(instance, "s") / "lmtp"
        store = make_sink(UnixSink, place=str(path))
        path.chmod(0o666)
        instance.configure(mailbox_transport=f"lmtp:{path}")
        instance.start()
        instance.send("user1+x@localhost", letter("stored"))
        instance.wait_empty()
        assert [recipients for _, recipients, _ in store.received] == [
            [f"user1@{HOST}"]
        ]

    def test_each_recipient_has_its_own_reply(self, instance, make_sink):
        bad, late = f"END user2@{HOST}", f"END payam@{HOST}"
        answers = {bad: "552 5.2.2 Mailbox full", late: "451 4.3.0 Not now"}
        store = make_sink(**answers)
        instance.configure(mailbox_transport=f"lmtp:127.0.0.1:{store.port}")
        instance.start()
        words = ("-f", "friend@example.com", "user1", "user2", "payam")
        instance.sendmail(*words, stdin=letter("each"))
        shown = instance.wait_reason("Not now")
        assert f"payam@{HOST}" in shown
        wait_for(lambda: "status=bounced" in instance.log())
        log = instance.log()
        assert re.search(r"to=<user1@.*status=sent", log)
        assert re.search(r"to=<user2@.*dsn=5.2.2, status=bounced", log)

    def test_aliases_and_forward_files_come_first(self, instance, make_sink):
        store = make_sink()
        instance.configure(mailbox_transport=f"lmtp:127.0.0.1:{store.port}")
        instance.aliases("team: user1\n")
        instance.forward("user1", "user2\n")
        instance.start()
        instance.send("team@localhost", letter("stored"))
        instance.wait_empty()
        ((_, recipients, text),) = store.received
        assert recipients == [f"user2@{HOST}"]
        assert f"Delivered-To: user1@{HOST}".encode() in text


class TestLists:
    """Lists: owners, members in files, many of them."""

    def test_the_owner_is_the_sender_and_gets_the_bounces(self, instance, make_sink):
        sink = make_sink(**{"RCPT TO:<bad@example.com>": "550 5.1.1 No such person"})
        members = instance.write("members", "user1\nfar@example.com\nbad@example.com\n")
        instance.aliases(f"list: :include:{members}\nowner-list: user2\n")
        relayed(instance, sink)
        instance.sendmail("list", stdin=letter("news"), user="payam")
        wait_for(lambda: instance.with_token("user2", "news"))
        instance.wait_empty()
        ((sender, recipients, _),) = sink.received
        assert f"<owner-list@{HOST}>" in sender
        assert recipients == ["far@example.com"]
        (copy,) = instance.with_token("user1", "news")
        assert fields(copy, "Return-Path") == [f"<owner-list@{HOST}>"]
        (report,) = instance.with_token("user2", "news")
        assert "550 5.1.1 No such person" in re.sub(r"\s+", " ", report)
        assert instance.with_token("payam", "news") == []

    def test_the_null_sender_stays(self, instance):
        instance.aliases("list: user1\nowner-list: user2\n")
        instance.sendmail("-odi", "-f", "<>", "list", stdin=letter("report"))
        (copy,) = instance.with_token("user1", "report")
        assert fields(copy, "Return-Path") == ["<>"]

    def test_a_missing_list_waits(self, server):
        server.aliases(f"list: :include:{server.root}/none, user1\n")
        server.send("list@localhost", letter("news"))
        assert "No such file" in server.wait_reason(")\n")
        assert len(server.with_token("user1", "news")) == 1
        server.write("none", "user2\n")
        server.run("sendmail", "-q", user="root")
        server.wait_message("user2", "news")
        assert len(server.with_token("user1", "news")) == 1

    @pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "directory"])
    def test_what_is_no_list_is_not_followed(self, server, kind):
        secret = server.write("secret", "user2\n")
        path = server.root / "list"
        makers = {
            "symlink": lambda: path.symlink_to(secret),
            "hard link": lambda: os.link(secret, path),
            "fifo": lambda: os.mkfifo(path),
            "directory": path.mkdir,
        }
        makers[kind]()
        server.aliases(f"list: :include:{path}\n")
        server.send("list@localhost", letter("trap"))
        assert ":include:" in server.wait_reason(")\n")
        assert server.messages("user2") == []

    def test_each_of_1_500_members_is_tried_once_a_round(self, instance):
        names = [f"m{number}@example.com" for number in range(1500)]
        members = instance.write("members", "\n".join(names) + "\n")
        instance.aliases(f"list: :include:{members}\n")
        instance.start()
        instance.sendmail("list", "payam", stdin=letter("news"))
        instance.wait_message_only("payam", "news")
        wait_for(lambda: instance.log().count("status=deferred") >= 1500)
        instance.send("user1@localhost", letter("after"))
        instance.wait_message_only("user1", "after")
        assert instance.log().count("status=deferred") == 1500
        wait_for(lambda: len(instance.queued()) == 1)

    @pytest.mark.parametrize("how", ["stop", "kill"])
    def test_what_was_deferred_beside_a_slow_one_is_not_lost(self, instance, how):
        gate = open_folder(instance) / "gate"
        os.mkfifo(gate)
        gate.chmod(0o666)
        instance.aliases(
            f'slow: "|read x <{gate}"\nteam: "|true", user1\nbad: "|true", nosuchuser\n'
        )
        instance.mailbox("user1").mkdir(parents=True)  # deferred
        instance.start()
        words = ("team", "bad", "slow")
        instance.sendmail(*words, stdin=letter("kept"), user="payam")
        wait_for(lambda: len(list((instance.queue / "journal").iterdir())) == 1)
        (journal,) = (instance.queue / "journal").iterdir()
        wait_for(lambda: journal.read_text().count("delivered to command") == 2)
        getattr(instance, how)()
        instance.mailbox("user1").rmdir()
        instance.aliases(instance.aliases_text().replace(f"read x <{gate}", "true"))
        instance.start()
        instance.wait_empty()
        assert len(instance.with_token("user1", "kept")) == 1
        (report,) = instance.with_token("payam", "kept")
        assert "nosuchuser" in report

    def test_two_failures_of_one_recipient_are_both_told(self, server):
        members = server.write("members", "|cat\n:include:/no/such/list\nuser1\n")
        members.chmod(0o664)
        server.give(members, "user2")
        server.aliases(f"list: :include:{members}\n")
        server.sendmail("list", stdin=letter("both"), user="payam")
        assert "No such file" in server.wait_reason(")\n")
        wait_for(lambda: server.with_token("payam", "both"))
        (report,) = server.with_token("payam", "both")
        assert "mail to command is restricted" in re.sub(r"\s+", " ", report)
        assert len(server.queued()) == 1

    def test_a_list_that_names_nobody_waits(self, server):
        members = server.write("members", "# nobody yet\nroot:*:secret:x y z\n")
        server.aliases(f"list: :include:{members}\n")
        server.send("list@localhost", letter("empty"))
        assert "leads to nobody" in server.wait_reason(")\n")
        assert "line 2: not a target" in server.log()
        assert "secret" not in server.log()

    @needs_root
    def test_a_users_list_has_the_users_rights_whosever_it_is(self, server):
        drop = open_folder(server)
        theirs = server.write("theirs", f"|id -u >{drop}/uid\n{drop}/victim\n")
        server.give(theirs, "user2")
        victim = drop / "victim"
        victim.write_text("precious\n")
        victim.chmod(0o600)
        server.give(victim, "user2")
        server.forward("user1", f":include:{theirs}\n")
        server.sendmail("user1", stdin=letter("trap"), user="payam")
        report = server.wait_message("payam", "trap")
        assert "is restricted" in re.sub(r"\s+", " ", report)
        assert victim.read_text() == "precious\n"
        assert not (drop / "uid").exists()

    @needs_root
    def test_a_member_who_reads_the_list_too_blocks_nobody(self, server):
        members = server.write("members", "user1\nuser2\n")
        members.chmod(0o600)
        server.forward("user1", f":include:{members}\n\\user1\n")
        server.aliases(f"team: user1, :include:{members}\n")
        server.send("team@localhost", letter("news"))
        wait_for(lambda: server.with_token("user2", "news"))

    @needs_root
    def test_a_list_that_a_user_could_have_led_to_is_read_as_nobody(self, server):
        secret = server.home("user1") / "paths"
        secret.write_text("user1\n")
        secret.chmod(0o600)
        server.give(secret, "user1")
        (server.home("user2") / "link").symlink_to(server.home("user1"))
        path = server.home("user2") / "link/paths"
        server.aliases(f"list: :include:{path}\n")
        server.send("list@localhost", letter("trap"))
        assert "Permission denied" in server.wait_reason(")\n")
        assert server.messages("user1") == []

    @pytest.mark.parametrize(
        "line", [":include:/tmp/x\0y", "/tmp/x\0y", "|x\0y", "\0", ":include:\ud800"]
    )
    def test_a_hostile_forward_holds_up_no_other_recipient(self, server, line):
        path = server.forward("user1", "")
        path.write_bytes(line.encode("utf-8", "surrogatepass"))
        server.sendmail("user2", "user1", stdin=letter("both"))
        wait_for(lambda: server.with_token("user2", "both"))
        wait_for(lambda: not server.queued() or ")\n" in server.mailq())

    def test_a_list_that_names_itself_in_many_ways_ends(self, server):
        path = server.home("user1") / "list"
        names = (f":include:{path.parent}/{'./' * n}list\n" for n in range(500))
        path.write_text("".join(names) + "user2\n")
        server.give(path, "user1")
        server.forward("user1", f":include:{path}\n")
        server.send("user1@localhost", letter("round"))
        server.wait_message("user2", "round")

    def test_10_000_members_survive_a_kill_with_few_second_copies(
        self, instance, make_sink
    ):
        names = [f"m{number}@example.com" for number in range(10_000)]
        members = instance.write("members", "\n".join(names) + "\n")
        instance.aliases(f"list: :include:{members}\n")
        sink = make_sink()
        relayed(instance, sink)

        def got():
            return [name for _, some, _ in sink.received for name in some]

        instance.sendmail("list", stdin=letter("news"))
        wait_for(lambda: len(got()) > 3000)
        most = max(memory_of(pid) for pid in instance.pids())
        instance.kill()
        before = len(got())
        assert before < 9000
        instance.start()
        wait_for(lambda: not instance.queued(), 120)
        count = dict.fromkeys(names, 0)
        for name in got():
            count[name] += 1
        doubled = sum(number - 1 for number in count.values())
        assert min(count.values()) == 1
        # at most what was in flight: 20 connections, a transaction of 100 each
        assert doubled <= 20 * 100
        assert most < 100 << 20


def memory_of(pid):
    """The most memory that a process has had, in bytes."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        found = re.findall(r"VmHWM:\s+(\d+)", text)  # none of one that ended
        return int(found[0]) << 10 if found else 0
    return 0


class TestReports:
    """What senders ask to be told: RFC 3461, and warnings."""

    def submit(
        self, instance, recipient, options="", mail="", sender="payam@localhost"
    ):
        """A message by SMTP, with parameters."""
        with instance.smtp() as client:
            client.ehlo()
            assert client.docmd("MAIL", f"FROM:<{sender}> {mail}".strip())[0] == 250
            assert client.docmd("RCPT", f"TO:<{recipient}> {options}".strip())[0] == 250
            client.data(letter("asked", LOREM))

    def bouncing(self, instance):
        instance.aliases('prog: "|exit 1"\n')
        return instance.start()

    def parsed(self, instance, user="payam"):
        """The one report in a mailbox: (text, status blocks, the copy)."""
        wait_for(lambda: instance.messages(user))
        instance.wait_empty()
        (text,) = instance.messages(user)
        report = message_from_bytes(text.partition("\n")[2].encode())
        assert report.get_content_type() == "multipart/report"
        return report.get_payload()

    def test_a_bounce_names_envid_and_orcpt(self, instance):
        self.bouncing(instance)
        words = "ORCPT=rfc822;old@x.example", "ENVID=e+2B1"
        self.submit(instance, "prog@localhost", *words)
        _, status, copy = self.parsed(instance)
        message, recipient = status.get_payload()
        assert message["Original-Envelope-Id"] == "e+1"
        assert recipient["Original-Recipient"] == "rfc822;old@x.example"
        assert (recipient["Action"], recipient["Status"]) == ("failed", "5.3.0")
        assert LOREM in copy.as_string()

    def test_ret_hdrs_brings_back_the_header_only(self, instance):
        self.bouncing(instance)
        self.submit(instance, "prog@localhost", mail="RET=HDRS")
        copy = self.parsed(instance)[2]
        assert copy.get_content_type() == "text/rfc822-headers"
        assert "Subject: asked" in copy.get_payload()
        assert LOREM not in copy.as_string()

    @pytest.mark.parametrize("notify", ["NEVER", "SUCCESS", "DELAY"])
    def test_who_does_not_want_a_bounce_gets_none(self, instance, notify):
        self.bouncing(instance)
        self.submit(instance, "prog@localhost", f"NOTIFY={notify}")
        wait_for(lambda: "status=bounced" in instance.log())
        instance.wait_empty()
        assert instance.messages("payam") == []

    def test_one_bounce_tells_of_all_who_failed(self, instance):
        instance.aliases('p1: "|exit 1"\np2: "|exit 67"\np3: "|exit 0"\n')
        instance.start()
        instance.sendmail("p1", "p2", "p3", stdin=letter("all"), user="payam")
        _, status, _ = self.parsed(instance)
        found = {block["Final-Recipient"] for block in status.get_payload()[1:]}
        assert found == {f"rfc822; p1@{HOST}", f"rfc822; p2@{HOST}"}

    def test_success_is_told_to_who_asked(self, server):
        self.submit(server, "user1@localhost", "NOTIFY=SUCCESS")
        text, status, copy = self.parsed(server)
        assert status.get_payload()[1]["Action"] == "delivered"
        assert status.get_payload()[1]["Status"] == "2.0.0"
        assert copy.get_content_type() == "text/rfc822-headers"
        assert "successfully delivered" in text.get_payload()
        assert "sender delivery status notification" in server.log()

    def test_a_host_that_knows_dsn_is_asked_to_report(self, instance, make_sink):
        sink = make_sink(EHLO="250-sink.example\n250 DSN")
        relayed(instance, sink)
        options = "NOTIFY=SUCCESS ORCPT=rfc822;old@x.example"
        self.submit(instance, "far@example.com", options, "RET=HDRS ENVID=e1")
        instance.wait_empty()
        (command,) = sink.commands
        assert command.endswith("> NOTIFY=SUCCESS ORCPT=rfc822;old@x.example")
        assert sink.received[0][0].endswith(" RET=HDRS ENVID=e1")
        assert instance.messages("payam") == []

    def test_of_a_host_that_does_not_it_is_told_that_mail_was_relayed(
        self, instance, make_sink
    ):
        relayed(instance, make_sink())
        self.submit(instance, "far@example.com", "NOTIFY=SUCCESS")
        _, status, _ = self.parsed(instance)
        assert status.get_payload()[1]["Action"] == "relayed"

    def test_sendmail_asks_with_options(self, server):
        words = ("-N", "success", "-R", "hdrs", "-V", "e1", "user1")
        server.sendmail(*words, stdin=letter("asked"), user="payam")
        _, status, _ = self.parsed(server)
        message, recipient = status.get_payload()
        assert message["Original-Envelope-Id"] == "e1"
        assert recipient["Action"] == "delivered"

    def test_the_sender_of_late_mail_is_warned_once(self, instance):
        times = {"minimal_backoff_time": "1s", "maximal_backoff_time": "1s"}
        instance.configure(delay_warning_time="1s", **times)
        instance.aliases('prog: "|exit 75"\n')
        instance.start()
        instance.sendmail("prog", stdin=letter("late"), user="payam")
        wait_for(lambda: instance.messages("payam"))
        count = instance.log().count("status=deferred")
        wait_for(lambda: instance.log().count("status=deferred") > count + 2)
        (text,) = instance.messages("payam")
        assert fields(text, "Subject")[0] == "Delayed Mail (still being retried)"
        assert "Action: delayed" in text
        assert "Will-Retry-Until: " in text
        assert "sender delay notification" in instance.log()

    def test_no_warning_goes_to_the_null_sender_or_to_who_wants_none(self, instance):
        times = {"minimal_backoff_time": "1s", "maximal_backoff_time": "1s"}
        instance.configure(delay_warning_time="1s", **times)
        instance.aliases('prog: "|exit 75"\n')
        instance.start()
        instance.sendmail("-f", "<>", "prog", stdin=letter("late"))
        self.submit(instance, "prog@localhost", "NOTIFY=FAILURE")
        wait_for(lambda: instance.log().count("status=deferred") > 8)
        assert "delay notification" not in instance.log()

    def test_a_large_message_comes_back_as_its_header(self, instance):
        self.bouncing(instance)
        instance.sendmail("prog", stdin=letter("big", LOREM * 1000), user="payam")
        copy = self.parsed(instance)[2]
        assert copy.get_content_type() == "text/rfc822-headers"


class TestRefusals:
    """error: and its like, and what nobody can deliver to."""

    @pytest.mark.parametrize(
        ("target", "reply", "code"),
        [
            ("error:550 5.7.1 go away", (550, b"5.7.1 "), 77),
            (":fail: moved to the moon", (550, b"5.0.0 "), 69),
            ("nosuchuser", (550, b"5.1.1 "), 67),
        ],
    )
    def test_mail_is_refused_at_once(self, server, target, reply, code):
        server.aliases(f"no: {target}\n")
        with server.smtp() as client:
            client.ehlo()
            client.mail("a@example.com")
            answer = client.rcpt("no@localhost")
        assert (answer[0], answer[1][: len(reply[1])]) == reply
        result = server.run("sendmail", "no", stdin=letter("no"))
        assert_one_clear_line(result, code)
        assert server.queued() == []

    def test_defer_is_a_reply_for_now_and_waits_for_local_programs(self, server):
        server.aliases("later: :defer: come back at noon\n")
        with server.smtp() as client:
            client.ehlo()
            client.mail("a@example.com")
            code, text = client.rcpt("later@localhost")
        assert (code, b"come back at noon" in text) == (450, True)
        server.sendmail("later", stdin=letter("noon"))
        server.wait_reason("come back at noon")

    # What looks like something else than an address, from wherever it comes.
    TRICKS = (
        *("|id", "|touch /tmp/minimta-trap", "/etc/passwd", ":include:/etc/shadow"),
        *("../x", "../../etc/passwd", "-froot", "/dev/null", "~root", "a/b", "."),
        *("error:550 x", ":fail: x", "\\root\\", "$(id)", "`id`", "${HOME}", "%s"),
    )

    @pytest.mark.parametrize("trick", TRICKS)
    def test_nothing_else_comes_of_an_address_from_the_network(self, shared, trick):
        before = len(shared.queued())
        with shared.smtp() as client:
            client.ehlo()
            client.mail("a@example.com")
            name = trick.replace("\\", "\\\\")
            for form in (f'"{name}"@localhost', f'"{name}"', f"{trick}@localhost"):
                code, text = client.docmd("RCPT", f"TO:<{form}>")
                assert code in (501, 550), (form, code, text)
        assert len(shared.queued()) == before
        assert not Path("/tmp/minimta-trap").exists()

    @pytest.mark.parametrize("trick", [*TRICKS, "a\0b", "a\nb"])
    def test_nor_of_one_from_a_program(self, shared, trick):
        before = len(shared.queued())
        if "\0" in trick:
            text = f"To: {trick}\n\ntext\n"
            result = shared.run("sendmail", "-t", stdin=text)
        else:
            result = shared.run("sendmail", "--", trick, stdin=letter("trap"))
        assert result.code in (64, 65, 67), result
        assert "Traceback" not in result.err
        assert len(shared.queued()) == before
        assert not Path("/tmp/minimta-trap").exists()


# The kinds of lines that the aliases files of systems are made of.
SYSTEM_ALIASES = {
    "Debian": "# /etc/aliases\nmailer-daemon: postmaster\npostmaster: root\n"
    "nobody: root\nhostmaster: root\nwww: root\nftp: root\nabuse: root\n"
    "security: root\nroot: user1\n",
    "RHEL": "#\n#  >>>>>>>>>>      The program newaliases must be run\n#\n\n"
    "# Basic system aliases -- these MUST be present.\n"
    "mailer-daemon:\tpostmaster\npostmaster:\troot\n\n# General redirections.\n"
    "bin:\t\troot\ndaemon:\t\troot\ningres:\t\troot\nsystem:\t\troot\n"
    "toor:\t\troot\nusenet:\t\tnews\nnews:\t\troot\nwebmaster:\troot\n"
    "decode:\t\troot\n\n# Person who should get root's mail\n#root:\t\tmarc\n",
    "FreeBSD": "# $FreeBSD$\n#\nroot:\tuser1@localhost\n\n"
    "MAILER-DAEMON: postmaster\npostmaster: root\n\n_dhcp:  root\nauditdistd: root\n"
    "bin:\troot\nabuse:\troot\n# ftp: root\nbit-bucket: /dev/null\n"
    "dev-null: bit-bucket\n",
    "OpenBSD": "#\n#\t$OpenBSD$\n#\nMAILER-DAEMON: postmaster\npostmaster: root\n"
    "daemon: root\nnobody: /dev/null\nwww: root\n_bgpd: /dev/null\n"
    "_sshd: /dev/null\nuucp: root\n\nmanager: root\ndumper: root\n"
    "abuse: root\nsecurity: root\nnoc: root\n",
    "sendmail": 'vacation: "|/usr/bin/true vacation", \\user1\n'
    "all: user1,\n\tuser2, \\\nuser1\nlist: :include:/dev/null\n"
    "owner-list: user1\narchive: /var/tmp/none\n",
    "Postfix": "team: user1 user2\nnames: user1; user2\n"
    'named: "One, User" <user1@localhost>, user2 (the second)\n',
    "exim": "gone: :fail: there is nobody, not any more\nlater: :defer: wait\n"
    "hole: :blackhole:\n",
    "OpenSMTPD": 'no: "error:550 5.7.1 no"\nno2: error:550 5.7.1 no, never\n',
}


class TestAliasFiles:
    """aliases(5) as a whole: what systems ship, several files, databases."""

    @pytest.mark.parametrize("text", SYSTEM_ALIASES.values(), ids=SYSTEM_ALIASES)
    def test_what_systems_ship_is_built(self, instance, text):
        instance.aliases(text)
        result = instance.run("newaliases")
        assert result.code == 0, result
        count = len(re.findall(r"(?m)^[\w-]+:", text))
        assert f": {count} aliases, " in result.out

    def test_what_does_not_exist_is_named_with_its_line(self, instance):
        instance.aliases(
            "root: payam\nteam: payan, user1\nprog: |/no/such/program x\n"
            "list: :include:/no/such/list\nfile: /no/such/folder/file\n"
        )
        result = instance.run("newaliases")
        path = instance.root / "etc/aliases"
        assert result.code == 0
        assert ": 5 aliases, " in result.out
        assert result.err.splitlines() == [
            f"newaliases: {path}, line 2: warning: team: payan: "
            "no such user or alias: did you mean payam?",
            f'newaliases: {path}, line 3: warning: prog: "|/no/such/program x": '
            "there is no program /no/such/program",
            f'newaliases: {path}, line 4: warning: list: ":include:/no/such/list": '
            ":include: /no/such/list: No such file or directory",
            f'newaliases: {path}, line 5: warning: file: "/no/such/folder/file": '
            "there is no /no/such/folder",
        ]

    def test_of_several_files_the_first_that_knows_a_name_counts(self, instance):
        first, second = instance.root / "etc/aliases", instance.root / "etc/more"
        instance.configure(alias_maps=f"hash:{first}, {second}")
        instance.aliases("one: user1\n")
        instance.write("etc/more", "one: user2\ntwo: user2\n")
        result = instance.run("newaliases")
        assert (result.code, result.err) == (0, "")
        assert [line.partition(": ")[0] for line in result.out.splitlines()] == [
            *(str(first), str(second)),
        ]
        instance.sendmail("-odi", "one", "two", stdin=letter("both"))
        assert len(instance.with_token("user1", "both")) == 1
        assert len(instance.with_token("user2", "both")) == 1

    def test_a_map_that_is_no_file_is_a_settings_error(self, instance):
        instance.configure(alias_maps="nis:mail.aliases")
        assert_one_clear_line(instance.run("newaliases"), 78)
        assert_one_clear_line(instance.run("minimta.py", "serve"), 78)

    def test_keys_of_a_domain(self, instance):
        instance.configure(mydestination=f"{HOST}, localhost, shop.example")
        instance.aliases(
            "info@shop.example: user1\n@shop.example: user2\ninfo: payam\n"
        )
        assert instance.run("newaliases").code == 0
        words = ("info@shop.example", "any@shop.example", "info@localhost")
        instance.sendmail("-odi", *words, stdin=letter("shop"))
        for user in LOCAL_USERS:
            assert len(instance.with_token(user, "shop")) == 1

    def test_100_000_aliases_are_built_and_found(self, instance):
        text = "".join(f"a{n}: user1\n" for n in range(100_000))
        instance.aliases(text)
        result = instance.run("newaliases", timeout=20 * PATIENCE)  # SQLite is slow
        assert (result.code, result.err) == (0, "")
        assert "100000 aliases" in result.out
        instance.sendmail("-odi", "a99999", stdin=letter("last"))
        assert len(instance.with_token("user1", "last")) == 1


def can_make_berkeley():
    """Whether a Python and a Postfix are here that both know Berkeley DB."""
    python = python_for_everyone()
    check = "import dbm.ndbm; raise SystemExit('Berkeley' not in dbm.ndbm.library)"
    return bool(
        shutil.which("postalias")
        and python
        and not subprocess.call([python, "-IS", "-c", check])
    )


@pytest.mark.skipif(
    not can_make_berkeley(), reason="no postalias, or no dbm.ndbm of Berkeley DB, here"
)
class TestPostalias:
    """The database and Postfix: each reads the other's."""

    def ndbm(self, script, *words):
        """Runs a script in the Python that has dbm.ndbm, minimta imported."""
        head = f"import sys; sys.path.insert(0, {str(HERE)!r}); import minimta\n"
        words = (python_for_everyone(), "-c", head + script, *map(str, words))
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def test_postfix_reads_what_newaliases_makes(self, tmp_path):
        path = tmp_path / "aliases"
        path.write_text('root: bob\nteam: "Bob, B." <bob@x>, "|cmd a"\n')
        script = (
            "import dbm\ndbm._defaultmod = __import__('dbm.ndbm').ndbm\n"
            "dbm._modules['dbm.ndbm'] = dbm._defaultmod\n"
            "minimta.AliasDatabase(sys.argv[1]).rebuild()\n"
        )
        self.ndbm(script, path)
        assert (tmp_path / "aliases.db.db").exists()
        found = [
            subprocess.run(
                ["postalias", "-q", name, f"hash:{path}.db"],
                capture_output=True,
                text=True,
            ).stdout
            for name in ("root", "team", "nobody")
        ]
        assert found == ["bob\n", 'bob@x, "|cmd a"\n', ""]

    def test_we_read_what_postalias_makes(self, tmp_path):
        path = tmp_path / "aliases"
        path.write_text("root: bob\nteam: bob, carol\n")
        subprocess.run(["postalias", f"hash:{path}"], check=True)
        path.write_text("root: eve\n")
        os.utime(path, (1000, 1000))
        script = "print(minimta.AliasDatabase(sys.argv[1]).lookup([sys.argv[2]]))"
        assert self.ndbm(script, path, "team") == "('team', 'bob, carol')\n"
        assert self.ndbm(script, path, "root") == "('root', 'bob')\n"
        assert self.ndbm(script, path, "eve") == "None\n"


class TestExplain:
    """explain, sendmail -bt and -bv: where mail goes, and why."""

    @pytest.fixture
    def explained(self, instance):
        instance.aliases("# us\nlpic1: root\nroot: payam\n")
        assert instance.run("newaliases").code == 0
        return instance

    def test_the_way_of_a_chain_is_drawn(self, explained):
        text = FIRST + "\n" + FIRST.replace("first", "second") + "\n"
        explained.make_mailbox("payam", text)
        where, box = explained.root / "etc/aliases", explained.mailbox("payam")
        uid = uid_of("payam")
        result = explained.run("minimta.py", "explain", "lpic1@localhost")
        assert (result.code, result.err) == (0, "")
        lines = [
            re.sub(r" {2,}(?=[(/])", "  ", line) for line in result.out.splitlines()
        ]
        assert lines == [
            "lpic1@localhost",
            "└─ local domain (mydestination: localhost)",
            f"   └─ alias lpic1 -> root  {where}:2",
            f"      └─ alias root -> payam  {where}:3",
            "         └─ user payam, no ~/.forward",
            f"            └─ mailbox {box}  (mbox, 2 messages, as uid {uid})",
        ]
        assert explained.run("sendmail", "-bt", "lpic1@localhost").out == result.out

    @pytest.mark.parametrize(
        ("name", "code", "words"),
        [
            ("payam", 0, "user payam"),
            (
                "payan",
                67,
                'bounced: unknown user: "payan"  (5.1.1, did you mean payam?)',
            ),
            ("lpic", 67, "did you mean lpic1?"),
            ("payam+x", 0, "user payam"),
            ("far@example.com", 75, "far@example.com is elsewhere"),
        ],
    )
    def test_exit_codes_and_hints(self, explained, name, code, words):
        result = explained.run("minimta.py", "explain", name)
        assert result.code == code, result
        assert words in result.out

    def test_what_is_deferred_is_75(self, explained):
        explained.aliases("later: :defer: wait\n")
        explained.run("newaliases")
        assert explained.run("minimta.py", "explain", "later").code == 75
        result = explained.run("sendmail", "-bv", "later")
        assert (result.code, result.out) == (75, f"later@{HOST}... wait\n")

    def test_it_changes_nothing(self, explained):
        before = sorted(explained.root.rglob("*"))
        explained.run("minimta.py", "explain", "lpic1")
        after = [path for path in explained.root.rglob("*") if "log" not in str(path)]
        assert sorted(after) == [path for path in before if "log" not in str(path)]

    def test_a_forward_that_is_not_used_is_named(self, explained):
        path = explained.forward("payam", "user1\n", 0o666)
        out = explained.run("minimta.py", "explain", "payam").out
        assert "user payam, ~/.forward not used" in out
        assert f"ignored: {path} is writable by others" in out
        assert f"mailbox {explained.mailbox('payam')}" in out

    def test_a_forward_that_is_used_is_named(self, explained):
        path = explained.forward("payam", 'user1\n"|cat"\n')
        result = explained.run("minimta.py", "explain", "payam", user="root")
        assert re.search(f"user payam, ~/.forward +{path}\n", result.out)
        assert f"command cat  (as uid {uid_of('payam')}, in " in result.out
        assert f"mailbox {explained.mailbox('user1')}" in result.out

    def test_a_database_that_is_out_of_date_is_named(self, explained):
        explained.aliases("root: user1\n")
        later = time.time() + 60
        os.utime(explained.root / "etc/aliases", (later, later))
        out = explained.run("minimta.py", "explain", "root").out
        assert "is older than source file" in out
        assert "alias root -> payam" in out  # as delivery has it

    @pytest.mark.parametrize(
        ("text", "mode", "shown", "code"),
        [
            ("mail.example:587 me:key\n", 0o600, "log in as me  {}:1", 0),
            (
                "mail.example:587 me:key\n",
                0o644,
                "4.7.8  {}: others can read it: chmod 600 {}",
                75,
            ),
            ("# none\nmail.example:587 me\n", 0o600, "4.7.8  {}:2: no password", 75),
        ],
        ids=["good", "open to all", "no password"],
    )
    def test_the_login_is_drawn_and_a_bad_password_file(
        self, explained, text, mode, shown, code
    ):
        explained.write("etc/hosts", "127.0.0.9 mail.example\n")
        path = explained.write("etc/secrets", text)
        path.chmod(mode)
        explained.configure(
            relayhost="[mail.example]:587", smtp_sasl_password_maps=str(path)
        )
        result = explained.run("minimta.py", "explain", "a@far.example", user="root")
        assert result.code == code, result
        for word in shown.replace("{}", str(path)).split("  "):
            assert word in result.out
        assert "me:key" not in result.out

    def test_a_relayhost_and_its_setting_are_named(self, explained):
        explained.configure(relayhost="[mail.example.com]:587")
        out = explained.run("minimta.py", "explain", "far@example.net").out
        assert "relayhost [mail.example.com]:587" in out
        assert "etc/minimta.conf, line 5" in out
        assert "TLS" in out

    def test_bv_tells_a_host_that_is_not_there(self, explained, make_names):
        rows = {
            ("far.example", "MX"): [("MX", (10, "mx.far.example"))],
            ("mx.far.example", "A"): [("A", "192.0.2.1")],
            ("null.example", "MX"): [("MX", (0, ""))],
        }
        make_names(explained, rows)
        for words, code, told in (
            (["a@far.example"], 0, "deliverable: mailer esmtp"),
            (["a@nosuch.example", "a@far.example"], 68, "nosuch.example"),
            (["a@null.example"], 68, "null.example"),
            (["a@nosuch.example", "nobody-here"], 67, "User unknown"),
        ):
            result = explained.run("sendmail", "-bv", *words)
            assert result.code == code, result
            assert told in result.out

    def test_the_mail_hosts_of_a_domain_are_named(self, explained):
        rows = {
            ("far.example", "MX"): [("MX", (10, "mx.far.example"))],
            ("mx.far.example", "A"): [("A", "192.0.2.1")],
        }
        server = NameServer(rows)
        explained.write("etc/resolv.conf", f"nameserver [127.0.0.1]:{server.port}\n")
        try:
            result = explained.run("minimta.py", "explain", "x@far.example")
        finally:
            server.close()
        assert result.code == 0
        assert "└─ MX 10 mx.far.example [192.0.2.1]\n" in result.out

    @pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
    def test_a_mailbox_that_would_be_refused_is_named(self, explained, kind):
        box = explained.mailbox("payam")
        box.parent.mkdir(parents=True)
        makers = {
            "symlink": lambda: box.symlink_to("/etc/hostname"),
            "directory": box.mkdir,
            "fifo": lambda: os.mkfifo(box),
        }
        makers[kind]()
        result = explained.run("minimta.py", "explain", "payam")
        assert result.code == 75
        assert "deferred: mailbox" in result.out
        assert explained.run("sendmail", "-bv", "payam").code == 75

    @needs_root
    def test_a_file_that_may_not_be_written_is_named(self, explained):
        explained.aliases("arch: /etc/no-such-file\n")
        explained.run("newaliases")
        result = explained.run("minimta.py", "explain", "arch", user="root")
        assert (result.code, "may not be written" in result.out) == (67, True)

    def test_json_has_the_same_tree(self, explained):
        import json

        result = explained.run("minimta.py", "explain", "--json", "lpic1", "nosuch")
        first, second = map(json.loads, result.out.splitlines())
        assert (first["exit"], second["exit"], result.code) == (0, 67, 67)
        (domain,) = first["then"]
        assert domain["then"][0]["text"] == "alias lpic1 -> root"

    def test_bv_says_it_in_sendmails_words(self, explained):
        explained.aliases('all: user1, far@example.com, /dev/null, "|cat x"\n')
        explained.run("newaliases")
        explained.configure(relayhost="[127.0.0.1]:9")
        result = explained.run("sendmail", "-bv", "all", "nosuch")
        assert (result.code, result.err) == (67, "")
        assert result.out.splitlines() == [
            f"user1@{HOST}... deliverable: mailer local, user user1",
            "far@example.com... deliverable: mailer esmtp",
            "/dev/null... deliverable: mailer *file*",
            '"|cat x"... deliverable: mailer prog',
            f"nosuch@{HOST}... User unknown",
        ]

    @pytest.mark.parametrize(
        "words", [("explain",), ("sendmail", "-bt"), ("explain", ""), ("explain", " ")]
    )
    def test_it_needs_an_address(self, explained, words):
        assert_one_clear_line(explained.run("minimta.py", *words), 64)

    def test_what_it_says_is_what_is_done(self, instance, make_sink):
        sink = make_sink()
        drop = open_folder(instance)
        instance.aliases(
            f'all: user1, far@example.com, {drop}/file, "|cat >{drop}/out"\n'
        )
        instance.forward("user1", "\\user1, user2\n")
        relayed(instance, sink)
        instance.run("newaliases")
        said = instance.run("minimta.py", "explain", "--json", "all", user="root").out
        instance.sendmail("all", stdin=letter("proof"))
        instance.wait_empty()
        for words in (
            *(f"mailbox {instance.mailbox(user)}" for user in ("user1", "user2")),
            *(f"file {drop}/file", f"command cat >{drop}/out", "far@example.com is"),
        ):
            assert words in said
        assert len(instance.with_token("user1", "proof")) == 1
        assert len(instance.with_token("user2", "proof")) == 1
        assert len(sink.received) == 1
        assert "proof" in (drop / "file").read_text()
        assert "proof" in (drop / "out").read_text()

    @pytest.mark.parametrize(
        ("host", "wanted"),
        [
            ("[127.0.0.1]:25", "TLS: if it is offered"),
            ("[::1]:25", "TLS: if it is offered"),
            ("[192.0.2.1]:25", "TLS: needed and checked"),
            ("[127.0.0.1]:25 none", "TLS: none"),
            ("[127.0.0.1]:25 encrypt", "TLS: needed"),
        ],
    )
    def test_the_tls_of_a_relayhost_is_named(self, explained, host, wanted):
        explained.configure(relayhost=host)
        out = explained.run("minimta.py", "explain", "a@far.example").out
        (line,) = [line for line in out.splitlines() if "relayhost" in line]
        assert re.search(rf"\b{wanted}\)?$", line), line

    def test_a_relayhost_that_is_this_host_is_one_whatever_its_name(
        self, explained, make_sink
    ):
        sink = make_sink()
        explained.write("etc/hosts", "127.0.0.1 localhost near.example\n")
        for name in ("localhost", "near.example", "127.0.0.1"):
            explained.configure(relayhost=f"[{name}]:{sink.port}")
            out = explained.run("minimta.py", "explain", "a@far.example").out
            explained.sendmail("-odi", "a@far.example", stdin=letter(name))
            assert any(name.encode() in text for _, _, text in sink.received), name
            assert "TLS: if it is offered)" in out, name


def new_spool(place):
    """An empty queue directory, of whoever runs the tests."""
    me = minimta.User("me", os.getuid(), os.getgid(), "", "/")
    spool = minimta.Spool(str(place), me)
    spool.make()
    return spool


def odd_fifo(path, _):
    """A FIFO that somebody has open, at both of its ends."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def close():
        with pytest.raises(BlockingIOError):
            os.read(fd, 1)  # nobody has written into it
        os.close(fd)

    return close


ODD_FILES = {
    "a FIFO": lambda path, _: os.mkfifo(path) or bool,
    "an open FIFO": odd_fifo,
    "a directory": lambda path, _: path.mkdir() or bool,
    "a symlink": lambda path, target: path.symlink_to(target) or bool,
    "a symlink to nowhere": lambda path, _: path.symlink_to("nowhere") or bool,
    "a symlink to itself": lambda path, _: path.symlink_to(path) or bool,
}


class TestTrace:
    """What happened to a message."""

    def traced(self, instance, *words, **how):
        """What trace prints of one message."""
        result = instance.run("minimta.py", "trace", *words, **how)
        assert (result.code, result.err) == (0, ""), result
        return result.out

    def test_a_deferred_message_has_its_attempt_dialogue_and_next_try(
        self, instance, make_sink
    ):
        relayed(instance, make_sink(RCPT="450 4.2.0 Not now, dear"))
        words = ("-f", "me@example.org", "friend@example.com")
        instance.sendmail(*words, stdin=letter("later"))
        instance.wait_reason("Not now, dear")
        (queue_id,) = instance.queued()
        shown = self.traced(instance, queue_id)
        assert shown.startswith(f"{queue_id}  queue\narrived    ")
        assert "\nsender     <me@example.org>\n" in shown
        assert "\nrecipient  <friend@example.com>\n" in shown
        assert re.search(r"\n  .*  deferred 4\.2\.0 \(127\.0\.0\.1\[.*Not now", shown)
        assert re.search(r"\nnext try   \w\w\w, ", shown)
        dialogue = shown.partition("\ndialogue ")[2]
        assert "\n  S: 220 sink.example ESMTP\n  C: EHLO " in dialogue
        assert "\n  C: RCPT TO:<friend@example.com>\n" in dialogue
        assert "\n  S: 450 4.2.0 Not now, dear\n" in dialogue

    def test_each_attempt_is_told_once(self, instance, make_sink):
        sinks = [make_sink(), make_sink(RCPT="450 4.2.0 Not now, dear")]
        lines = [f"{n}.example smtp:[127.0.0.1]:{s.port}" for n, s in enumerate(sinks)]
        instance.write("etc/transport", "\n".join(lines) + "\n")
        instance.configure(transport_maps=f"hash:{instance.root}/etc/transport")
        names = ["a@0.example", "b@1.example", "user1"]
        instance.start().sendmail(*names, stdin=letter("once"))
        instance.wait_reason("Not now, dear")
        shown = self.traced(instance, "--last")
        for name, outcome in zip(names, ("sent", "deferred", "sent")):
            recipient = name if "@" in name else f"{name}@{HOST}"
            rows = shown.partition(f"\nrecipient  <{recipient}>\n")[2]
            found = rows.partition("\nrecipient ")[0].partition("\nnext try")[0]
            assert found.count("\n") == 0 and outcome in found, shown

    def test_a_message_that_is_gone_is_found_by_each_of_its_names(
        self, instance, make_sink
    ):
        relayed(instance, make_sink())
        text = "Message-ID: <odd.one@example.org>\n" + letter("gone")
        instance.sendmail("friend@example.com", "user1", stdin=text)
        instance.wait_empty()
        first = self.traced(instance, "<odd.one@example.org>")
        queue_id = first.partition(" ")[0]
        assert first.startswith(f"{queue_id}  done\n")
        assert re.search(r"sent 2\.0\.0 .*: 250 2\.0\.0 Kept\n", first)
        assert "sent 2.0.0 (local): delivered to mailbox\n" in first
        for name in (queue_id, "odd.one@example.org", "--last"):
            assert self.traced(instance, name) == first

    def test_the_last_one_is_the_newest(self, instance):
        instance.start()
        for number in range(3):
            instance.sendmail("user1", stdin=letter(f"number {number}"))
        wait_for(lambda: len(instance.messages("user1")) == 3)
        instance.wait_empty()
        ids = re.findall(r"cleanup\[\d+\]: (\w+): message-id", instance.log())
        assert self.traced(instance, "--last").startswith(f"{max(ids)}  done\n")

    def test_json_has_what_the_text_has(self, instance, make_sink):
        relayed(instance, make_sink(DATA="554 5.7.1 Never"))
        instance.sendmail("friend@example.com", stdin=letter("never"))
        instance.wait_message("payam", "never")
        instance.wait_empty()
        queue_id = re.search(r"(\w+): to=<friend@example", instance.log()).group(1)
        found = json.loads(self.traced(instance, "--json", queue_id))
        assert found["queue_id"] == queue_id
        assert found["state"] == "done"
        assert found["recipients"] == ["friend@example.com"]
        (attempt,) = found["attempts"]
        assert (attempt["outcome"], attempt["status"]) == ("bounced", "5.7.1")
        assert "S: 554 5.7.1 Never" in found["dialogue"]

    def test_a_host_that_is_not_there_is_told_of(self, instance):
        port = free_port()
        instance.configure(relayhost=f"[127.0.0.1]:{port}")
        instance.start()
        instance.sendmail("friend@example.com", stdin=letter("later"))
        instance.wait_reason("refused")
        shown = self.traced(instance, "--last")
        assert f"connect to 127.0.0.1[127.0.0.1]:{port}: Connection refused" in shown
        assert f"\ndialogue   127.0.0.1[127.0.0.1]:{port}, route " in shown

    def test_what_nobody_knows_is_not_found(self, instance):
        instance.start()
        result = instance.run("minimta.py", "trace", "T43N939QKX")
        assert_one_clear_line(result, 66)

    @pytest.mark.parametrize("words", [(), ("--last", "X"), ("a b",), ("a\nb",)])
    def test_one_message_is_to_be_named(self, instance, words):
        assert_one_clear_line(instance.run("minimta.py", "trace", *words), 64)

    def test_its_files_stay_small(self, tmp_path, monkeypatch):
        monkeypatch.setattr(minimta, "MAX_HISTORY", 2000)
        history = minimta.History(new_spool(tmp_path))
        for number in range(100):
            history.add(minimta.new_id(number, 0), "message", ["x" * 50])
        sizes = [path.stat().st_size for path in (tmp_path / "trace").iterdir()]
        assert len(sizes) == 2
        assert max(sizes) < 2200
        assert history.find(minimta.new_id(99, 0)) == [("message", ["x" * 50])]
        assert history.find(minimta.new_id(0, 0)) == []

    @pytest.mark.parametrize(
        ("key", "uid", "wanted"),
        [
            ("last", 0, 299),
            ("last", 7, 3),
            ("last", 9, None),
            ("<number.5@x>", 0, 5),
            ("<number.3@x>", 7, 3),
            ("<number.5@x>", 7, None),
        ],
    )
    def test_its_files_are_read_no_more_often_for_more_messages(
        self, tmp_path, monkeypatch, key, uid, wanted
    ):
        history = minimta.History(new_spool(tmp_path))
        names = [minimta.new_id(number, 0) for number in range(300)]
        for number, name in enumerate(names):
            origin = f"origin: uid {7 if number == 3 else 8}"
            rows = [f"message-id: <number.{number}@x>", origin]
            history.add(name, "message", rows)
        reads, read = [], history.texts
        monkeypatch.setattr(history, "texts", lambda: reads.append(1) or read())
        found = history.trace(key, uid)
        assert (found and found.queue_id) == (wanted and names[wanted])
        assert 1 <= len(reads) <= 2

    @pytest.mark.parametrize("name", ["now", "before", "other"])
    @pytest.mark.parametrize("kind", ODD_FILES)
    def test_what_is_no_file_in_its_place_holds_nobody_up(
        self, instance, make_sink, kind, name
    ):
        precious = instance.write("precious", f"{minimta.new_id(1, 1)} message\n")
        relayed(instance, make_sink())
        runner = parts(instance)[2]
        with contextlib.ExitStack() as stack:
            stack.callback(ODD_FILES[kind](instance.queue / "trace" / name, precious))
            instance.sendmail("user1", "friend@example.com", stdin=letter("odd"))
            instance.wait_message("user1", "odd")
            result = instance.run("minimta.py", "trace", "--last")
            assert result.code == (66 if name == "now" else 0), result
            assert "Traceback" not in result.err
            assert instance.mailq() == "Mail queue is empty\n"
            daemon = minimta.SubmitSocket(str(instance.queue))
            assert daemon.connect()
            daemon.send("EHLO localhost")
            daemon.expect(250)
            assert (daemon.trace("last") is None) == (name == "now")
            daemon.close()
            instance.sendmail("user1", stdin=letter("again"))
            instance.wait_message("user1", "again")
        assert precious.read_text() == f"{minimta.new_id(1, 1)} message\n"
        assert parts(instance)[2] == runner

    def test_a_huge_record_is_cut_at_a_line(self, tmp_path):
        history = minimta.History(new_spool(tmp_path))
        name = minimta.new_id(1, 1)
        history.add(name, "message", ["odd\x1b\n line\tkept"] + ["y" * 900] * 100)
        ((_, rows),) = history.find(name)
        assert rows[0] == "odd?? line\tkept"
        assert set(rows[1:]) == {"y" * 900}
        assert len(rows) < 50

    def test_verbose_sendmail_shows_what_is_said_and_what_came_of_it(
        self, instance, make_sink
    ):
        relayed(instance, make_sink(RCPT="550 5.1.1 Never heard of"))
        words = ("-v", "friend@example.com", "user1")
        result = instance.run("sendmail", *words, stdin=letter("loud"))
        assert result.code == 0
        assert re.match(r"sendmail: queued as \w{10}\n", result.err)
        assert "\n  C: RCPT TO:<friend@example.com>\n" in result.err
        assert "\n  S: 550 5.1.1 Never heard of\n" in result.err
        assert re.search(r"\n<friend@example.com>: bounced \(.*Never heard", result.err)
        assert "\n<user1@centos7-1.localdomain>: sent (" in result.err

    def test_verbose_sendmail_without_a_daemon_shows_the_same(
        self, instance, make_sink
    ):
        sink = make_sink()
        instance.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        words = ("-v", "friend@example.com")
        result = instance.run("sendmail", *words, stdin=letter("loud"))
        assert (result.code, result.out) == (0, "")
        assert "\n  S: 250 2.0.0 Kept\n<friend@example.com>: sent (" in result.err
        assert len(sink.received) == 1

    @needs_root
    def test_a_user_sees_only_the_mail_that_the_user_sent(
        self, public_bin, make_instance
    ):
        instance = make_instance()
        instance.bin = public_bin
        instance.root.chmod(0o755)
        instance.start()
        for user in ("user1", "user2"):
            words = (public_bin / "sendmail", "payam")
            text = f"Message-ID: <of.{user}@x>\n" + letter("mine")
            how = {"env": instance.env(user), "preexec_fn": become(user)}
            subprocess.run(words, input=text.encode(), check=True, **how)
        wait_for(lambda: len(instance.messages("payam")) == 2)
        instance.wait_empty()
        for user, code in (("user1", 0), ("user2", 66), ("root", 0)):
            how = {"preexec_fn": become(user)} if user != "root" else {}
            words = ("trace", "<of.user1@x>")
            result = instance.run("minimta.py", *words, user=user, **how)
            assert result.code == code, (user, result)
            assert ("<of.user1@x>" in result.out) == (code == 0)
        result = instance.run(
            "minimta.py", "trace", "--last", user="user1", preexec_fn=become("user1")
        )
        assert "<of.user1@x>" in result.out


class TestOutgrown:
    """The settings with which the README hands over to other hosts."""

    def settings(self, title, **hosts):
        """The README's settings under `# title`, our sinks as its hosts."""
        manual = (HERE / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"(?s)```ini\n(.*?)```", manual)
        (block,) = [block for block in blocks if block.startswith(f"# {title}")]
        for host, sink in hosts.items():
            name = re.escape(host.replace("_", "."))
            block = re.sub(rf"\[?{name}\]?(:\d+)?", f"[127.0.0.1]:{sink}", block)
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        return dict(line.split(" = ") for line in lines)

    def test_mail_goes_to_the_first_smarthost_that_lets_us_in(
        self, instance, make_sink
    ):
        busy, good = make_sink(CONNECT="421 4.3.2 Not now"), make_sink()
        ports = {"out1_example_com": free_port(), "out2_example_com": busy.port}
        found = self.settings("many smarthosts", **ports)
        found["relayhost"] = found["relayhost"].replace(
            "smtps://out3.example.com", f"[127.0.0.1]:{good.port}"
        )
        assert found["relayhost"].count("127.0.0.1") == 3
        instance.configure(**found)
        instance.start()
        instance.sendmail("friend@example.com", stdin=letter("pool"))
        instance.wait_empty()
        assert len(good.received) == 1

    def test_another_program_keeps_the_mail(self, instance, make_sink):
        store = make_sink()
        found = self.settings("another program", store_example_com=store.port)
        instance.configure(**found)
        instance.start()
        instance.sendmail("user1", stdin=letter("stored"))
        instance.wait_empty()
        assert [recipients for _, recipients, _ in store.received] == [
            [f"user1@{HOST}"]
        ]

    def test_several_hosts_take_mail_for_one_domain(self, make_instance, make_sink):
        store = make_sink()
        found = self.settings("several minimta", store_example_com=store.port)
        hosts = [make_instance(**found) for _ in range(3)]
        for number, host in enumerate(hosts):
            host.start()
            host.send("user1@example.com", letter(f"by {number}"))
        for host in hosts:
            host.wait_empty()
        assert [names for _, names, _ in store.received] == [["user1@example.com"]] * 3


class TestQueueCommands:
    """The queue's commands, beside a running daemon and without one."""

    @pytest.fixture(params=[True, False], ids=["daemon", "no daemon"])
    def host(self, instance, request):
        """Six messages that wait: r0 to r5 at x0.example and x1.example."""
        instance.configure(relayhost=f"[127.0.0.1]:{free_port()}")
        if request.param:
            instance.start()
        for number in range(6):
            words = ("-odq", f"r{number}@x{number % 2}.example")
            instance.run("sendmail", *words, stdin=letter(f"m{number}"), user="payam")
        if request.param:
            wait_for(lambda: instance.log().count("status=deferred") == 6)
        else:
            assert instance.run("sendmail", "-q").code == 0
        return instance

    def queue(self, host, *words, code=0, **how):
        """What `minimta.py queue` prints."""
        result = host.run("minimta.py", "queue", *words, **how)
        assert (result.code, result.err) == (code, ""), result
        return result.out

    def test_what_is_meant_is_shown(self, host):
        assert self.queue(host, "count") == "6\n"
        assert self.queue(host, "count", "host:x1.example", "!to:r1@") == "2\n"
        assert self.queue(host, "count", "reason:refused", "younger:1h") == "6\n"
        assert self.queue(host, "count", "older:1h") == "0\n"
        first = json.loads(self.queue(host, "json", "to:r3").splitlines()[0])
        assert first["recipients"][0]["address"] == "r3@x1.example"
        assert list(first)[:6] == [
            *("queue_name", "queue_id", "arrival_time", "message_size"),
            *("forced_expire", "sender"),
        ]
        assert self.queue(host, "to:r3").count("r3@x1.example") == 1
        summary = self.queue(host, "summary").splitlines()
        assert summary[1].split()[0::4] == ["3", "x0.example"]
        shown = self.queue(host, "show", first["queue_id"], "--body")
        assert shown == "text\n"

    def test_what_is_held_waits_until_it_is_released(self, host):
        (queue_id,) = re.findall(r"(?m)^\w{10}", self.queue(host, "to:r2"))
        said = f"{queue_id}: placed on hold\nPlaced on hold: 1 message\n"
        assert self.queue(host, "hold", queue_id) == said
        told = f": {queue_id}: placed on hold, uid={os.getuid()}\n"
        assert host.log().count(told) == 1
        assert f"\n{queue_id}!" in "\n" + host.mailq()
        assert host.run("sendmail", "-q").code == 0
        assert self.queue(host, "count", "held") == "1\n"
        assert "released from hold" in self.queue(host, "release", "held")
        assert self.queue(host, "count", "held") == "0\n"
        assert self.queue(host, "count") == "6\n"

    def test_what_is_removed_is_gone_without_a_word(self, host):
        assert self.queue(host, "remove", "host:x0.example").count(": removed\n") == 3
        assert self.queue(host, "count") == "3\n"
        assert self.queue(host, "remove", "all").endswith("Deleted: 3 messages\n")
        assert host.mailq() == "Mail queue is empty\n"
        assert host.messages("payam") == []

    def test_what_is_given_up_comes_back(self, host):
        assert "Force-expired: 1 message" in self.queue(host, "bounce", "to:r4")
        host.run("sendmail", "-q")
        (report,) = wait_for(lambda: host.with_token("payam", "m4"))
        assert "<r4@x0.example>: cancelled by the administrator" in report
        assert self.queue(host, "count") == "5\n"

    def test_what_is_tried_now_goes(self, host, make_sink):
        sink = make_sink()
        host.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        if host.process:
            host.process.send_signal(signal.SIGHUP)
            wait_for(lambda: "settings read again" in host.log())
        self.queue(host, "run", "to:r1")
        if not host.process:
            host.run("sendmail", "-q")
        wait_for(lambda: sink.received)
        names = [name for _, (name,), _ in sink.received]
        assert "r1@x1.example" in names

    @pytest.mark.parametrize(
        ("words", "code"),
        [(("remove",), 64), (("hold", "older:x"), 64), (("remove", "to:nobody"), 1)],
    )
    def test_what_means_nothing_changes_nothing(self, host, words, code):
        result = host.run("minimta.py", "queue", *words)
        assert result.code == code
        assert self.queue(host, "count") == "6\n"

    def test_ids_come_on_standard_input(self, host):
        ids = re.findall(r"(?m)^\w{10}", host.mailq())
        self.queue(host, "remove", "-", stdin="\n".join(ids[:4]))
        assert self.queue(host, "count") == "2\n"

    def test_postfixs_and_exims_names_do_the_same(self, host):
        def said(*words, stdin=""):
            result = host.run("minimta.py", *words, stdin=stdin)
            assert result.code == 0, result
            return result.out + result.err

        ids = re.findall(r"(?m)^\w{10}", said("postqueue", "-p"))
        assert said("postqueue", "-j").count("\n") == 6
        assert said("postsuper", "-h", "ALL") == (
            "postsuper: Placed on hold: 6 messages\n"
        )
        assert said("postsuper", "-H", ids[0]) == (
            f"postsuper: {ids[0]}: released from hold\n"
            "postsuper: Released from hold: 1 message\n"
        )
        assert said("postsuper", "-d", "-", stdin=ids[1]).endswith("1 message\n")
        assert said("postsuper", "-d", "NONESUCH00") == (
            "postsuper: Deleted: 0 messages\n"
        )
        assert said("exim", "-bpc") == "5\n"
        assert said("exim", "-Mt", ids[2]) == f"Message {ids[2]} is no longer frozen\n"
        assert said("exim", "-Mf", ids[2]) == f"Message {ids[2]} is now frozen\n"
        assert said("exim", "-bp").count("*** frozen ***") == 4
        assert said("exim", "-Mrm", ids[2]) == f"Message {ids[2]} has been removed\n"
        assert said("exim", "-Mvb", ids[0]) == "text\n"
        assert "*** MESSAGE CONTENTS" in said("postcat", "-q", ids[0])
        assert said("qmail-qstat").startswith("messages in queue: 4\n")
        assert said("qmail-qread").count("\tremote\t") == 4

    def test_a_message_on_its_way_is_left_alone(self, instance, make_sink):
        gate = threading.Event()
        sink = make_sink(MAIL=lambda *_: gate.wait(PATIENCE) and "250 2.1.0 Ok")
        relayed(instance, sink)
        instance.sendmail("friend@example.com", stdin=letter("slow"))
        wait_for(lambda: sink.clients)
        wait_for(lambda: [line for line in sink.log if "MAIL" in str(line)])
        try:
            for action in ("remove", "hold", "bounce"):
                result = instance.run("minimta.py", "queue", action, "all")
                assert result.code == 1
                assert "it is being delivered: try again" in result.err
        finally:
            gate.set()
        instance.wait_empty()
        assert len(sink.received) == 1

    @needs_root
    def test_users_change_the_mail_that_they_sent(self, public_bin, make_instance):
        host = make_instance(relayhost=f"[127.0.0.1]:{free_port()}")
        host.bin = public_bin
        host.root.chmod(0o755)
        host.start()
        for user in ("user1", "user2"):
            words = [public_bin / "sendmail", f"of-{user}@x.example"]
            how = {"env": host.env(user), "preexec_fn": become(user)}
            subprocess.run(words, input=letter("x").encode(), check=True, **how)
        wait_for(lambda: host.log().count("status=deferred") == 2)
        how = {"user": "user1", "preexec_fn": become("user1")}
        other = host.run("minimta.py", "queue", "remove", "to:of-user2", **how)
        assert other.code == 77
        assert "somebody else sent it" in other.err
        own = host.run("minimta.py", "queue", "remove", "to:of-user1", **how)
        assert own.code == 0, own
        assert host.mailq().count("@x.example\n") == 1


class TestMailq:
    """The queue, as Postfix shows it."""

    def test_every_message_is_shown_with_its_reason(self, server):
        for number in range(3):
            words = (f"a{number}@example.com", f"b{number}@example.com")
            server.sendmail(*words, stdin=letter("wait"), user=LOCAL_USERS[number])
        wait_for(lambda: server.mailq().count(")\n") >= 3)
        *_, total = shown = server.mailq().splitlines()
        assert re.fullmatch(r"-- \d+ Kbytes in 3 Requests\.", total)
        rows = [line for line in shown if re.match(r"[0-9A-Z]{10}[ *!] ", line)]
        assert len(rows) == 3
        for number, user in enumerate(LOCAL_USERS):
            assert any(row.endswith(f"  {user}@{HOST}") for row in rows)
            assert " " * 41 + f"a{number}@example.com" in shown
            assert " " * 41 + f"b{number}@example.com" in shown

    def test_the_size_is_that_of_the_message(self, server):
        server.sendmail("a@example.com", stdin=letter("wait", LOREM * 100))
        (row,) = [
            line
            for line in server.wait_reason(")\n").splitlines()
            if re.match(r"[0-9A-Z]{10}[ *!] ", line)
        ]
        size = int(row[11:].split()[0])
        assert len(LOREM) * 100 < size < len(LOREM) * 100 + 1000

    def test_the_null_sender_is_shown_as_mailer_daemon(self, server):
        server.sendmail("-f", "<>", "a@example.com", stdin=letter("wait"))
        assert "  MAILER-DAEMON\n" in server.wait_reason(")\n")

    def test_it_works_without_a_daemon(self, instance):
        instance.sendmail("-odi", "a@example.com", stdin=letter("wait"))
        assert "a@example.com" in instance.mailq()

    def test_an_unknown_flag_is_a_usage_error(self, instance):
        assert_one_clear_line(instance.run("mailq", "-Z"), 64)


def put(instance, queue_id, *recipients, why="", state="", age=0, text=MESSAGE, **more):
    """A message in the queue, of which nothing is due for a day; its id."""
    spool = minimta.House({"MINIMTA_ROOT": str(instance.root)}).spool()
    spool.make()
    now = time.time()
    words = {"sender": f"payam@{HOST}", "arrived": now - age, "origin": "uid 0", **more}
    commit(spool, text, queue_id, recipients=list(recipients), **words)
    if why:
        rows = [
            minimta.Attempt(
                now, "deferred", "4.4.1", name, f"remote {name}", "none", why
            )
            for name in recipients
        ]
        spool.note(queue_id, rows)
    spool.wait_until(queue_id, now + 86400)
    if state == "hold":
        spool.act("hold", queue_id)
    return queue_id


def put_stock(instance):
    """STOCK in the instance's queue."""
    for queue_id, sender, recipients, age, state in STOCK:
        why = STOCK_REASONS[recipients[0]] if state == "deferred" else ""
        how = {"sender": sender, "age": age, "state": state, "why": why}
        put(instance, queue_id, *recipients, **how)


def where_is(instance, queue_id):
    """The folders of the queue that hold a message."""
    folders = ("queue", "hold", "corrupt")
    return [one for one in folders if (instance.queue / one / queue_id).exists()]


def state_of(path):
    """What a queue command may change of a file."""
    seen = path.stat()
    return seen.st_ino, seen.st_mode, seen.st_mtime_ns


def in_queue(instance):
    """The second letters of the ids in queue/, then of those in hold/."""
    names = (sorted(os.listdir(instance.queue / one)) for one in ("queue", "hold"))
    return " ".join("".join(name[1] for name in each) for each in names)


def queue_run(instance, *words, **how):
    """minimta.py queue, as root."""
    return instance.run("minimta.py", "queue", *words, user="root", **how)


def queue_done(instance, *words, **how):
    """What minimta.py queue prints when all goes well."""
    result = queue_run(instance, *words, **how)
    assert (result.code, result.err) == (0, ""), result
    return result.out


def sink_tokens(sink):
    """The subjects of what a sink took in, in order."""
    return sorted(
        re.search(rb"(?m)^Subject: (\S+)", text).group(1).decode()
        for _, _, text in sink.received
    )


@pytest.fixture(params=["without a daemon", "beside a daemon"])
def stocked(request, instance):
    """An instance whose queue holds STOCK, of which nothing is due."""
    put_stock(instance)
    if request.param == "beside a daemon":
        instance.start()
    return instance


class TestQueue:
    """minimta.py queue: what it shows, what it changes, what it refuses."""

    def test_without_an_action_it_lists_as_mailq_does(self, stocked):
        shown = queue_done(stocked)
        assert shown == queue_done(stocked, "list") == stocked.mailq()
        assert shown.endswith("\n-- 0 Kbytes in 4 Requests.\n")
        for queue_id, sender, recipients, _, state in STOCK:
            flag = {"active": "*", "hold": "!"}.get(state, " ")
            who = sender or "MAILER-DAEMON"
            row = rf"(?m)^{queue_id}{re.escape(flag)} +\d+ .{{20}} {who}$"
            assert re.search(row, shown)
            for name in recipients:
                assert f"\n{'':41}{name}\n" in shown
        why = STOCK_REASONS["a@one.example"]
        assert f"\n{' ' * (76 - len(why))}({why})\n" in shown

    def test_an_empty_queue_is_nothing_to_be_shown(self, instance):
        assert queue_done(instance) == "Mail queue is empty\n"
        assert queue_done(instance, "json") == ""
        assert queue_done(instance, "count") == "0\n"

    def test_a_line_of_json_is_one_message(self, stocked):
        rows = [json.loads(line) for line in queue_done(stocked, "json").splitlines()]
        assert [row["queue_id"] for row in rows] == [row[0] for row in STOCK]
        keys = [*TestQueueTree.KEYS, "next_attempt", "attempts", "expires"]
        assert [list(row) for row in rows] == [keys] * 4
        assert [row["queue_name"] for row in rows] == [row[4] for row in STOCK]
        assert rows[0]["recipients"][0]["delay_reason"].endswith("Connection refused")
        assert rows[0]["next_attempt"] > time.time() + 86000
        first = rows[0]["expires"] - rows[0]["arrival_time"]
        assert first == 5 * 86400

    def test_selectors_choose_what_is_counted(self, stocked):
        for words in ("0A", "to:one.example !from:<>", "older:2h", "held", "!held"):
            count = len(CHOICES[words])
            assert queue_done(stocked, "count", *words.split()) == f"{count}\n"

    def test_a_list_of_some_is_of_those_only(self, stocked):
        shown = queue_done(stocked, "reason:REFUSED$")
        assert shown.endswith("\n-- 0 Kbytes in 1 Request.\n")
        assert "0AAAAAAAAA " in shown
        assert queue_done(stocked, "from:nobody") == "Mail queue is empty\n"

    def test_a_sum_is_by_domain(self, stocked):
        title, first, *rest = queue_done(stocked, "summary").splitlines()
        assert title.split() == ["Count", "Volume", "Oldest", "Newest", "Domain"]
        assert first.split() == ["2", "52", "72h", "0m", "two.example"]
        assert any(line.endswith("Connection refused)") for line in rest)

    def test_a_message_is_shown_with_its_past_and_its_header(self, stocked):
        shown = queue_done(stocked, "show", "0A")
        assert shown.startswith("0AAAAAAAAA  queue\n")
        for piece in ("<a@one.example>", "Connection refused", "Subject: hello\n"):
            assert piece in shown
        assert "some text" not in shown
        assert queue_done(stocked, "show", "0D").startswith("0DDDDDDDDD  hold\n")

    def test_its_body_or_its_whole_file_is_shown_alone(self, stocked):
        assert queue_done(stocked, "show", "--body", "0A") == "some text\n"
        file = stocked.queue / "queue/0AAAAAAAAA"
        assert queue_done(stocked, "show", "--raw", "0A") == file.read_text()

    def test_a_large_message_is_shown_as_it_is(self, instance):
        body = "".join(f"line {number} of many\n" for number in range(50_000))
        text = f"Subject: much\nX-Odd:folded\n\there\n\n{body}".encode()
        put(instance, "0AAAAAAAAA", "far@far.example", text=text)
        assert queue_done(instance, "show", "--body", "0A") == body
        raw = queue_done(instance, "show", "--raw", "0A")
        assert raw == (instance.queue / "queue/0AAAAAAAAA").read_text()

    @pytest.mark.parametrize(
        ("action", "said", "total", "left"),
        [
            ("hold", "placed on hold", "Placed on hold", "BC AD"),
            ("remove", "removed", "Deleted", "BC D"),
        ],
    )
    def test_what_is_done_is_said_of_each_and_of_all(
        self, stocked, action, said, total, left
    ):
        out = queue_done(stocked, action, "0AAAAAAAAA")
        assert out == f"0AAAAAAAAA: {said}\n{total}: 1 message\n"
        assert in_queue(stocked) == left
        out = queue_done(stocked, action, "deferred" if left[0] == "A" else "0B", "0C")
        assert out == f"0BBBBBBBBB: {said}\n0CCCCCCCCC: {said}\n{total}: 2 messages\n"

    @pytest.mark.parametrize(
        ("name", "total"),
        [
            *(("delete", "Deleted"), ("rm", "Deleted"), ("flush", "Due now")),
            *(("retry", "Due now"), ("freeze", "Placed on hold")),
            ("thaw", "Released from hold"),
        ],
    )
    def test_an_action_has_the_names_of_other_systems_too(self, instance, name, total):
        put_stock(instance)
        words = ("0D",) if name == "thaw" else ("0A",)
        assert queue_done(instance, name, *words).endswith(f"{total}: 1 message\n")

    def test_released_is_what_was_on_hold(self, stocked):
        out = queue_done(stocked, "release", "0D")
        assert out == "0DDDDDDDDD: released from hold\nReleased from hold: 1 message\n"
        assert "0DDDDDDDDD!" not in stocked.mailq()

    def test_what_is_not_on_hold_is_not_released(self, stocked):
        due = (stocked.queue / "queue/0AAAAAAAAA").stat().st_mtime
        out = queue_run(stocked, "release", "all").out
        assert "0AAAAAAAAA: released from hold\n" not in out
        assert (stocked.queue / "queue/0AAAAAAAAA").stat().st_mtime == due

    def test_what_is_on_hold_is_not_said_to_be_due(self, stocked):
        out = queue_run(stocked, "run", "0D").out
        assert (where_is(stocked, "0DDDDDDDDD"), "due now" in out) != (["hold"], True)

    def test_ids_come_on_standard_input_too(self, stocked):
        ids = "0AAAAAAAAA\n0CCCCCCCCC 0ZZZZZZZZZ\n"
        out = queue_done(stocked, "hold", "-", stdin=ids)
        assert out.endswith("Placed on hold: 2 messages\n")
        assert in_queue(stocked) == "B ACD"

    def test_no_ids_on_standard_input_are_no_messages(self, instance):
        put_stock(instance)
        result = queue_run(instance, "remove", "-", stdin="\n")
        assert (result.code, result.out) == (1, "")
        assert in_queue(instance) == "ABC D"

    def test_all_on_standard_input_is_no_id(self, instance):
        put_stock(instance)
        result = queue_run(instance, "remove", "-", stdin="0AAAAAAAAA\nall\n")
        assert result.code == 0
        assert in_queue(instance) == "BC D"
        assert queue_run(instance, "remove", "-", stdin="all\n").code == 1
        assert in_queue(instance) == "BC D"

    def test_the_beginning_of_several_ids_changes_none(self, instance):
        put_stock(instance)
        result = queue_run(instance, "remove", "0")
        assert result.code in (1, 64)
        assert in_queue(instance) == "ABC D"

    def test_what_fits_nothing_is_exit_code_1(self, stocked):
        for action in ("hold", "remove", "show", "run", "bounce"):
            result = queue_run(stocked, action, "0ZZZ")
            assert (result.code, result.out) == (1, ""), action
        assert in_queue(stocked) == "ABC D"

    @pytest.mark.parametrize(
        "words",
        [
            *(["remove"], ["hold"], ["show"], ["remove", "nonsense"], ["remove", "!"]),
            *(["remove", "older:soon"], ["remove", "reason:("], ["remove", "-Z"]),
            *(["remove", "all:x"], ["remove", "state:x"], ["nonsense"], ["--nonsense"]),
        ],
        ids=" ".join,
    )
    def test_what_makes_no_sense_is_exit_code_64(self, instance, words):
        put_stock(instance)
        result = queue_run(instance, *words)
        assert_one_clear_line(result, 64)
        assert (result.out, in_queue(instance)) == ("", "ABC D")

    def test_its_help_names_each_action_and_selector(self, instance):
        shown = queue_done(instance, "--help")
        words = (
            *("list", "json", "count", "summary", "show", "run", "hold", "release"),
            *("remove", "requeue", "bounce", "all", "held", "deferred", "active"),
            *("to:", "from:", "host:", "reason:", "older:", "younger:", "!", "-y"),
        )
        assert [word for word in words if word not in shown] == []

    @pytest.mark.parametrize("action", ["remove", "bounce"])
    def test_at_a_terminal_no_is_what_it_takes_for_an_answer(self, stocked, action):
        for answer in ("n\n", "\n", "\x04"):
            person = Terminal(stocked, "minimta.py", "queue", action, "all")
            person.expect(f"{action} all 4 messages? [y/N] ")
            person.type(answer)
            person.close()
        assert in_queue(stocked) == "ABC D"

    def test_at_a_terminal_yes_removes_all(self, stocked):
        person = Terminal(stocked, "minimta.py", "queue", "remove", "all")
        person.expect("[y/N] ")
        person.type("y\n")
        person.expect("Deleted: 4 messages\n")
        assert person.close() == 0
        assert in_queue(stocked) == " "

    def test_y_does_not_ask(self, instance):
        for words in (["remove", "-y", "all"], ["-y", "remove", "all"]):
            put_stock(instance)
            person = Terminal(instance, "minimta.py", "queue", *words)
            assert "?" not in person.expect("Deleted: 4 messages\n")
            assert person.close() == 0

    def test_who_names_one_is_not_asked(self, instance):
        put_stock(instance)
        person = Terminal(instance, "minimta.py", "queue", "remove", "0A")
        assert "?" not in person.expect("Deleted: 1 message\n")
        assert person.close() == 0

    def test_what_is_removed_is_gone_with_its_past(self, stocked):
        queue_done(stocked, "remove", "all")
        for folder in ("queue", "hold", "journal", "incoming"):
            assert os.listdir(stocked.queue / folder) == []
        assert queue_done(stocked) == "Mail queue is empty\n"


@needs_root
class TestQueueOfUsers:
    """What a user who is not root may do with the queue."""

    @pytest.fixture
    def host(self, public_bin):
        """An instance with a message of user1 and one of user2."""
        one = Instance(public_bin)
        for name, user in (("0AAAAAAAAA", "user1"), ("0BBBBBBBBB", "user2")):
            origin = f"uid {UIDS[user]}"
            put(one, name, "far@far.example", origin=origin, why="not yet")
        yield one
        one.close()

    def by(self, user, host, *words, **how):
        """minimta.py queue, as a user."""
        how["preexec_fn"] = become(user)
        return host.run("minimta.py", "queue", *words, user=user, **how)

    @pytest.mark.parametrize("action", ["hold", "remove", "requeue", "bounce", "run"])
    def test_ones_own_mail_may_be_changed(self, host, action):
        result = self.by("user1", host.start(), action, "0A")
        assert (result.code, result.err) == (0, ""), result
        assert result.out.endswith(": 1 message\n")

    @pytest.mark.parametrize("action", minimta.ACTIONS)
    def test_the_mail_of_others_may_not(self, host, action):
        host.start()
        before = state_of(host.queue / "queue/0BBBBBBBBB")
        result = self.by("user1", host, action, "0B")
        assert_one_clear_line(result, 77)
        assert "0BBBBBBBBB" in result.err
        assert state_of(host.queue / "queue/0BBBBBBBBB") == before

    def test_of_all_mail_a_user_removes_the_own(self, host):
        result = self.by("user1", host.start(), "remove", "all")
        assert result.code == 0
        assert "0AAAAAAAAA: removed\nDeleted: 1 message\n" in result.out
        assert in_queue(host) == "B "

    def test_no_user_puts_a_message_of_root_on_hold(self, host):
        put(host, "0CCCCCCCCC", "far@far.example")
        assert self.by("user1", host.start(), "hold", "0C").code == 77

    @pytest.mark.parametrize("option", ["--body", "--raw"])
    def test_no_user_reads_what_waits(self, host, option):
        result = self.by("user2", host.start(), "show", option, "0A")
        assert_one_clear_line(result, 77)
        assert "some text" not in result.out

    def test_what_others_sent_is_not_shown(self, host):
        result = self.by("user2", host.start(), "show", "0A")
        assert result.code == 77
        assert "Subject" not in result.out

    @pytest.mark.parametrize("words", [["list"], ["remove", "0A"]], ids=" ".join)
    def test_without_a_daemon_that_is_exit_code_69(self, host, words):
        assert_one_clear_line(self.by("user1", host, *words), 69)
        assert in_queue(host) == "AB "

    @pytest.mark.parametrize(
        "words",
        [
            *(["postsuper", "-d", "0BBBBBBBBB"], ["postsuper", "-d", "ALL"]),
            *(["postcat", "-q", "0BBBBBBBBB"], ["exim", "-Mrm", "0BBBBBBBBB"]),
            *(["exim", "-Mvb", "0BBBBBBBBB"], ["exim", "-Mf", "0BBBBBBBBB"]),
        ],
        ids=" ".join,
    )
    def test_other_names_open_no_other_door(self, host, words):
        how = {"user": "user1", "preexec_fn": become("user1")}
        result = host.start().run("minimta.py", *words, **how)
        assert (result.code, result.out) == (1, "")
        assert len(result.err.splitlines()) == 1
        assert in_queue(host) == "AB "


CHANGES = ("hold", "release", "remove", "requeue", "bounce")


class TestQueueBesideDelivery:
    """Queue commands and deliveries do not get into each other's way."""

    @pytest.fixture
    def under_way(self, instance, make_sink):
        """(the id of a message whose host does not answer yet, end, sink)."""
        gate = threading.Event()
        sink = make_sink(END=gated(gate))
        relayed(instance, sink)
        instance.sendmail("far@far.example", stdin=letter("slow"))
        wait_for(lambda: "DATA" in sink.verbs())
        (queue_id,) = instance.queued()
        yield queue_id, gate.set, sink
        gate.set()

    @pytest.fixture
    def command(self, instance):
        """(the id of a message whose command goes on, end, its output)."""
        folder = open_folder(instance)
        os.mkfifo(folder / "go")
        (folder / "go").chmod(0o666)
        script = (
            f"echo begun >>{folder}/told; cat {folder}/go; echo end >>{folder}/told"
        )
        instance.aliases(f'prog: "|{script}"\n')
        instance.start()
        instance.sendmail("prog", stdin=letter("slow"))
        wait_for((folder / "told").exists)
        (queue_id,) = instance.queued()
        go = os.open(folder / "go", os.O_RDWR)
        yield queue_id, lambda: os.close(go), folder / "told"
        with contextlib.suppress(OSError):
            os.close(go)

    def refused(self, instance, queue_id):
        """Each change is refused with a line and leaves all as it is."""
        before = state_of(instance.queue / "queue" / queue_id)
        for action in CHANGES:
            result = queue_run(instance, action, queue_id)
            assert_one_clear_line(result, 1)
            assert result.err.startswith(f"queue: {queue_id}: it is being delivered: ")
            assert result.out.endswith(": 0 messages\n")
        assert state_of(instance.queue / "queue" / queue_id) == before

    def test_what_a_host_is_being_told_is_refused(self, instance, under_way):
        queue_id, end, sink = under_way
        self.refused(instance, queue_id)
        queue_done(instance, "run", queue_id)
        end()
        instance.wait_empty()
        assert sink_tokens(sink) == ["slow"]
        assert instance.messages("payam") == []

    def test_what_a_command_is_being_told_is_refused(self, instance, command):
        queue_id, end, told = command
        self.refused(instance, queue_id)
        end()
        instance.wait_empty()
        assert told.read_text() == "begun\nend\n"

    def test_a_listing_does_not_end_the_lock(self, instance, under_way):
        queue_id, end, sink = under_way
        for words in (["list"], ["json"], ["show", queue_id], ["show", "--raw", "all"]):
            queue_done(instance, *words)
        self.refused(instance, queue_id)
        end()
        instance.wait_empty()
        assert sink_tokens(sink) == ["slow"]

    def test_others_can_be_changed_meanwhile(self, instance, under_way):
        queue_id, end, sink = under_way
        put(instance, "0AAAAAAAAA", "other@other.example")
        result = queue_run(instance, "-y", "remove", "all")
        assert (result.code, "0AAAAAAAAA: removed\n" in result.out) == (0, True)
        assert f"queue: {queue_id}: it is being delivered" in result.err
        end()
        instance.wait_empty()
        assert sink_tokens(sink) == ["slow"]

    def test_the_delivery_of_a_queue_run_without_a_daemon_is_safe_too(
        self, instance, make_sink
    ):
        gate = threading.Event()
        sink = make_sink(END=gated(gate))
        instance.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        queue_id = put(instance, "0AAAAAAAAA", "far@far.example")
        words = [instance.bin / "sendmail", "-q"]
        with subprocess.Popen(words, env=instance.env("root")) as run:
            try:
                wait_for(lambda: "DATA" in sink.verbs())
                self.refused(instance, queue_id)
            finally:
                gate.set()
            assert run.wait(PATIENCE) == 0
        assert len(sink.received) == 1
        assert instance.queued() == []

    @pytest.mark.parametrize("folder", ["queue", "hold"])
    def test_what_is_on_hold_stays_until_it_is_released(
        self, instance, make_sink, folder
    ):
        sink = make_sink()
        put(instance, "0AAAAAAAAA", "far@far.example", text=letter("kept").encode())
        if folder == "hold":
            queue_done(instance, "hold", "0A")
        relayed(instance, sink)
        if folder == "queue":
            queue_done(instance, "hold", "0A")
        assert instance.run("sendmail", "-q").code == 0
        instance.sendmail("far@far.example", stdin=letter("new"))
        wait_for(lambda: sink.received)
        instance.wait_empty()
        assert (sink_tokens(sink), in_queue(instance)) == (["new"], " A")
        assert "\n0AAAAAAAAA! " in instance.mailq()
        queue_done(instance, "release", "0A")
        instance.wait_empty()
        assert (sink_tokens(sink), in_queue(instance)) == (["kept", "new"], " ")

    def test_what_is_on_hold_outlives_a_restart(self, instance, make_sink):
        sink = make_sink()
        put(instance, "0AAAAAAAAA", "far@far.example", text=letter("kept").encode())
        relayed(instance, sink)
        queue_done(instance, "hold", "0A")
        instance.kill()
        instance.start()
        instance.run("sendmail", "-q")
        queue_done(instance, "release", "0A")
        wait_for(lambda: sink.received)
        instance.wait_empty()
        assert sink_tokens(sink) == ["kept"]

    def test_what_is_removed_while_it_waits_is_not_sent(self, instance, make_sink):
        sink = make_sink(RCPT=["450 4.2.0 Later", "250 2.1.5 Ok"])
        relayed(instance, sink)
        instance.sendmail("far@far.example", stdin=letter("unwanted"))
        instance.wait_reason("Later")
        out = queue_done(instance, "remove", "deferred")
        assert out.endswith(": removed\nDeleted: 1 message\n")
        assert instance.run("sendmail", "-q").code == 0
        instance.sendmail("far@far.example", stdin=letter("new"))
        wait_for(lambda: sink.received)
        instance.wait_empty()
        assert sink_tokens(sink) == ["new"]
        assert os.listdir(instance.queue / "journal") == []

    def test_what_is_run_is_tried_now_and_others_are_not(self, instance, make_sink):
        sink = make_sink()
        for name in "AB":
            text = letter(f"of{name}").encode()
            put(instance, f"0{name * 9}", "far@far.example", text=text)
        relayed(instance, sink)
        assert queue_done(instance, "run", "0A").endswith("Due now: 1 message\n")
        wait_for(lambda: in_queue(instance) == "B ")
        assert sink_tokens(sink) == ["ofA"]

    def test_without_a_daemon_a_run_is_an_attempt(self, instance, make_sink):
        sink = make_sink()
        instance.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        for name in "AB":
            text = letter(f"of{name}").encode()
            put(instance, f"0{name * 9}", "far@far.example", text=text)
        queue_done(instance, "run", "0A")
        assert (sink_tokens(sink), in_queue(instance)) == (["ofA"], "B ")

    @pytest.mark.parametrize("is_up", [False, True], ids=["no daemon", "daemon"])
    @pytest.mark.parametrize("state", ["", "hold"])
    def test_what_is_given_up_is_with_its_sender_now(self, instance, state, is_up):
        words = {"text": letter("tired").encode(), "state": state, "why": "not yet"}
        put(instance, "0AAAAAAAAA", "far@far.example", **words)
        if is_up:
            instance.start()
        out = queue_done(instance, "bounce", "0A")
        assert out == "0AAAAAAAAA: expired\nForce-expired: 1 message\n"
        if not is_up:
            assert instance.with_token("payam", "tired")
        report = instance.wait_message("payam", "tired")
        assert fields(report, "Return-Path") == ["<>"]
        assert "far@far.example" in report
        assert "cancelled by the administrator" in report
        assert len(instance.messages("payam")) == 1
        assert in_queue(instance) == " "

    def test_who_has_it_is_not_told_that_it_is_returned(self, instance):
        put(instance, "0AAAAAAAAA", "had@far.example", "far@far.example")
        spool = minimta.House({"MINIMTA_ROOT": str(instance.root)}).spool()
        done = make_attempt("sent", "had@far.example", "remote had@far.example")
        spool.note("0AAAAAAAAA", [done])
        instance.start()
        queue_done(instance, "bounce", "0A")
        wait_for(lambda: instance.messages("payam"))
        instance.wait_empty()
        (report,) = instance.messages("payam")
        assert "had@far.example" not in report
        assert "far@far.example" in report

    def test_what_is_requeued_follows_a_changed_alias(self, server):
        server.aliases("team: payam\n")
        server.mailbox("payam").mkdir(parents=True)
        server.sendmail("team", stdin=letter("moved"))
        server.wait_reason(")\n")
        server.aliases("team: user1\n")
        out = queue_done(server, "requeue", "deferred")
        assert out.endswith(": requeued\nRequeued: 1 message\n")
        server.wait_message("user1", "moved")
        assert os.listdir(server.mailbox("payam")) == []

    def test_what_is_requeued_follows_a_changed_relayhost(self, instance, make_sink):
        instance.configure(relayhost=f"[127.0.0.1]:{free_port()}")
        instance.start()
        instance.sendmail("far@far.example", stdin=letter("moved"))
        instance.wait_reason("Connection refused")
        sink = make_sink()
        instance.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        instance.hang_up()
        queue_done(instance, "requeue", "all")
        instance.wait_empty()
        assert sink_tokens(sink) == ["moved"]

    @pytest.mark.parametrize("way", ["relay", "mailbox"])
    def test_200_commands_in_any_order_neither_lose_nor_double(
        self, instance, make_sink, way
    ):
        dice = random.Random(SEED)
        print(f"MINIMTA_TEST_SEED={SEED}")

        def often_later(*_):
            return dice.choice(["450 4.2.0 Later", "250 2.1.5 Ok", "250 2.1.5 Ok"])

        sink = make_sink(RCPT=often_later)
        relayed(instance, sink)
        whom = {"relay": "far@far.example", "mailbox": "user1@localhost"}[way]
        tokens = [f"token{number:03}" for number in range(200)]

        def send_all():
            with instance.smtp() as client:
                for token in tokens:
                    client.sendmail("friend@example.com", [whom], letter(token))

        sender = threading.Thread(target=send_all)
        with locked(instance.make_mailbox("user1", "")):  # some wait for a moment
            sender.start()
            wait_for(lambda: len(instance.queued()) > 20)
            said = self.meddle(instance, dice, 100)
        said += self.meddle(instance, dice, 100)
        sender.join()
        print(dict(said))
        if os.listdir(instance.queue / "hold"):
            queue_done(instance, "release", "held")

        def is_delivered():
            instance.run("sendmail", "-q")
            return not instance.queued()

        wait_for(is_delivered)
        assert os.listdir(instance.queue / "hold") == []
        found = [fields(text, "Subject")[0] for text in instance.messages("user1")]
        assert (sorted(found) or sink_tokens(sink)) == tokens
        assert said["hold", 250]

    def meddle(self, instance, dice, count):
        """Commands at random on what is there; how they were answered.

        Each is for one of three messages, the first of them that it fits.
        """
        daemon, said = minimta.SubmitSocket(str(instance.queue)), collections.Counter()
        assert daemon.connect()
        daemon.send("EHLO localhost")
        daemon.expect(250)
        for _ in range(count):
            action = dice.choice(["hold", "release", "requeue", "run"])
            folders = [instance.queue / "queue", instance.queue / "hold"]
            names = [name for folder in folders for name in os.listdir(folder)]
            for name in dice.sample(names, min(3, len(names))):
                daemon.send(f"XDO {action} {name}")
                code = daemon.reply()[0]
                said[action, code] += 1
                if code == 250:
                    break
        daemon.close()
        return said

    def test_commands_at_once_neither_lose_nor_double(self, instance, make_sink):
        sink = make_sink()
        for number in range(20):
            text = letter(f"token{number:03}").encode()
            put(instance, f"0AAAAAAA{number:02}", "far@far.example", text=text)
        relayed(instance, sink)
        actions = ("hold", "release", "requeue", "run") * 2
        script = [instance.bin / "minimta.py", "queue"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        children = [
            subprocess.Popen(
                [*script, action, "all"], env=instance.env("root"), **quiet
            )
            for action in actions
        ]
        assert {child.wait(PATIENCE) for child in children} <= {0, 1}
        if os.listdir(instance.queue / "hold"):
            queue_done(instance, "release", "held")
        instance.run("sendmail", "-q")
        instance.wait_empty()
        assert sink_tokens(sink) == [f"token{number:03}" for number in range(20)]


FINGERS = (
    *("postqueue", "postsuper", "postcat", "postalias", "exim", "exim4"),
    *("qmail-qread", "qmail-qstat"),
)


@pytest.fixture(scope="session")
def fingers_dir(bin_dir):
    """A directory of links to minimta.py by the names of other systems."""
    path = open_directory("minimta-names-")
    for name in (*FINGERS, *LINKS):
        (path / name).symlink_to(bin_dir / "minimta.py")
    yield path
    shutil.rmtree(path)


class TestFingers:
    """Queue commands by the names that they have on other systems."""

    @pytest.fixture(params=["by a link", "as first word"])
    def call(self, request, fingers_dir, stocked):
        """Runs such a command on STOCK, in one of the two ways."""

        def run(name, *words, **how):
            if request.param == "by a link":
                return stocked.run(name, *words, bin_dir=fingers_dir, **how)
            return stocked.run("minimta.py", name, *words, **how)

        return run

    def told(self, result, code=0):
        """What it printed, where it has nothing to complain of."""
        assert (result.code, result.err) == (code, ""), result
        return result.out

    @pytest.mark.parametrize("name", FINGERS)
    def test_each_says_what_it_is(self, instance, fingers_dir, name):
        by_link = instance.run(name, "--help", bin_dir=fingers_dir)
        by_word = instance.run("minimta.py", name, "--help")
        assert (by_link.code, by_link.err) == (0, "")
        assert by_link.out == by_word.out
        assert by_link.out.startswith("usage: ")

    @pytest.mark.parametrize("name", ["postqueue", "postsuper", "postcat", "exim"])
    def test_each_says_that_it_does_not_know_an_option(
        self, instance, fingers_dir, name
    ):
        result = instance.run(name, "-Z", bin_dir=fingers_dir)
        assert_one_clear_line(result, 64)
        assert result.err.startswith(f"{name}: ")

    def test_postqueue_shows_the_queue(self, call, stocked):
        assert self.told(call("postqueue", "-p")) == stocked.mailq()
        assert self.told(call("postqueue", "-j")) == queue_done(stocked, "json")

    def test_postsuper_says_each_on_standard_error(self, call, stocked):
        result = call("postsuper", "-d", "0AAAAAAAAA")
        assert (result.code, result.out) == (0, "")
        assert result.err == (
            "postsuper: 0AAAAAAAAA: removed\npostsuper: Deleted: 1 message\n"
        )
        assert in_queue(stocked) == "BC D"

    def test_postsuper_says_of_all_how_many(self, call, stocked):
        result = call("postsuper", "-d", "ALL")
        assert (result.code, result.out) == (0, "")
        assert result.err == "postsuper: Deleted: 4 messages\n"
        assert in_queue(stocked) == " "

    def test_exim_lists_its_own_way(self, call):
        assert self.told(call("exim", "-bp")) == (
            " 3h    26 0AAAAAAAAA <alice@far.example>\n          a@one.example\n\n"
            "72h    26 0BBBBBBBBB <>\n"
            "          b@two.example\n          c@sub.one.example\n\n"
            f" 0m    26 0CCCCCCCCC <payam@{HOST}>\n          d@two.example\n\n"
            "60m    26 0DDDDDDDDD <bob@far.example> *** frozen ***\n"
            "          e@three.example\n\n"
        )
        assert self.told(call("exim", "-bpc")) == "4\n"

    def test_qmail_has_its_own_words(self, call):
        assert self.told(call("qmail-qstat")) == (
            "messages in queue: 4\nmessages in queue but not yet preprocessed: 0\n"
        )
        shown = self.told(call("qmail-qread"))
        zone = r"\d+ [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT  "
        blocks = re.split(r"\n(?=\d)", shown.rstrip("\n"))
        for block, (queue_id, sender, recipients, *_) in zip(blocks, STOCK):
            head, *rows = block.split("\n")
            assert re.fullmatch(rf"{zone}#{queue_id}  26  <{sender}>", head)
            assert rows == [f"\tremote\t{name}" for name in recipients]
        assert len(blocks) == 4


class TestPostfixNames:
    """postqueue, postsuper, postcat, beside a daemon and without."""

    @pytest.fixture
    def by(self, stocked, fingers_dir):
        """Runs one of them, as root."""
        how = {"bin_dir": fingers_dir, "user": "root"}
        return lambda *words, **more: stocked.run(*words, **how, **more)

    @pytest.mark.parametrize(
        ("flag", "said", "total", "left"),
        [
            ("-d", "removed", "Deleted", "BC D"),
            ("-h", "placed on hold", "Placed on hold", "BC AD"),
        ],
    )
    def test_postsupers_words_are_postfixs(self, stocked, by, flag, said, total, left):
        result = by("postsuper", flag, "0AAAAAAAAA")
        assert result.err == (
            f"postsuper: 0AAAAAAAAA: {said}\npostsuper: {total}: 1 message\n"
        )
        assert (result.code, result.out, in_queue(stocked)) == (0, "", left)

    @pytest.mark.parametrize(
        ("flag", "said", "total"),
        [
            ("-H", "released from hold", "Released from hold"),
            ("-r", "requeued", "Requeued"),
            ("-e", "expired", "Force-expired"),
            ("-f", "expired", "Force-expired"),
        ],
    )
    def test_postsuper_takes_what_is_on_hold(self, stocked, by, flag, said, total):
        result = by("postsuper", flag, "0DDDDDDDDD")
        assert result.err == (
            f"postsuper: 0DDDDDDDDD: {said}\npostsuper: {total}: 1 message\n"
        )
        assert (result.code, result.out) == (0, "")
        if flag != "-e":
            assert os.listdir(stocked.queue / "hold") == []

    def test_postsuper_releases_only_what_is_on_hold(self, stocked, by):
        assert by("postsuper", "-H", "ALL").err == (
            "postsuper: Released from hold: 1 message\n"
        )

    def test_postsuper_holds_only_what_is_not_on_hold(self, stocked, by):
        assert by("postsuper", "-h", "ALL").err == (
            "postsuper: Placed on hold: 3 messages\n"
        )
        assert in_queue(stocked) == " ABCD"

    def test_postsuper_takes_ids_from_standard_input(self, stocked, by):
        result = by("postsuper", "-d", "-", stdin="0AAAAAAAAA\n0CCCCCCCCC\n--\n\n")
        assert result.err == (
            "postsuper: 0AAAAAAAAA: removed\npostsuper: 0CCCCCCCCC: removed\n"
            "postsuper: Deleted: 2 messages\n"
        )
        assert in_queue(stocked) == "B D"

    def test_postsuper_says_the_sum_of_its_options_once(self, stocked, by):
        result = by("postsuper", "-d", "0AAAAAAAAA", "-d", "0BBBBBBBBB")
        assert result.err.endswith("postsuper: Deleted: 2 messages\n")
        assert in_queue(stocked) == "C D"

    def test_postsuper_may_be_told_two_things(self, stocked, by):
        result = by("postsuper", "-h", "0AAAAAAAAA", "-d", "0BBBBBBBBB")
        assert "postsuper: Placed on hold: 1 message\n" in result.err
        assert "postsuper: Deleted: 1 message\n" in result.err
        assert in_queue(stocked) == "C AD"

    def test_postsuper_takes_the_names_of_queues(self, stocked, by):
        result = by("postsuper", "-d", "ALL", "deferred")
        assert result.err == "postsuper: Deleted: 2 messages\n"
        assert in_queue(stocked) == "C D"

    def test_postsuper_knows_no_such_id(self, stocked, by):
        for name in ("0ZZZZZZZZZ", "0A", "all", "../queue/0AAAAAAAAA"):
            result = by("postsuper", "-d", name)
            assert (result.code, result.out) == (0, "")
            assert result.err == "postsuper: Deleted: 0 messages\n"
        assert in_queue(stocked) == "ABC D"

    @pytest.mark.parametrize(
        ("words", "pieces"),
        [
            (["-q"], ["recipient: a@one.example", "Subject: hello\n", "some text\n"]),
            (["-qe"], ["recipient: a@one.example", "sender: alice@far.example"]),
            (["-qh"], ["Subject: hello\n"]),
            (["-qb"], ["some text\n"]),
            (["-qbh"], ["Subject: hello\n\nsome text\n"]),
            (["-bh", "-q"], ["Subject: hello\n\nsome text\n"]),
        ],
    )
    def test_postcat_prints_the_parts_that_are_wanted(self, by, words, pieces):
        result = by("postcat", *words, "0AAAAAAAAA")
        assert (result.code, result.err) == (0, "")
        every = {"recipient: a@one.example", "Subject: hello\n", "some text\n"}
        assert [one for one in pieces if one not in result.out] == []
        whole = "".join(pieces)
        assert [one for one in every if one not in whole and one in result.out] == []

    def test_postcat_marks_the_parts(self, by):
        result = by("postcat", "-q", "0DDDDDDDDD")
        marks = [line for line in result.out.splitlines() if line.startswith("***")]
        assert [re.sub(r" \S*0DDDDDDDDD", "", line) for line in marks] == [
            *("*** ENVELOPE RECORDS ***", "*** MESSAGE CONTENTS ***"),
            "*** MESSAGE FILE END ***",
        ]

    def test_postcat_prints_a_message_as_it_is(self, stocked, by):
        body = "".join(f"line {number} of many\n" for number in range(50_000))
        head = "Subject:much\nX-Odd: folded\n\t here\nno field\n"
        text = f"{head}\n{body}"
        put(stocked, "0EEEEEEEEE", "far@far.example", text=text.encode())
        assert by("postcat", "-hbq", "0EEEEEEEEE").out == text
        assert by("postcat", "-bq", "0EEEEEEEEE").out.endswith(body)

    def test_postcat_knows_no_such_file(self, by):
        result = by("postcat", "-q", "0ZZZZZZZZZ")
        assert (result.code, result.out) == (1, "")
        assert "open queue file 0ZZZZZZZZZ: No such file or directory" in result.err

    def test_the_recipe_of_the_manual_empties_the_queue(self, stocked, fingers_dir):
        recipe = (
            "mailq | tail -n +2 | grep -v '^ *(' | awk 'BEGIN{RS=\"\"} {print $1}'"
            " | tr -d '*!' | postsuper -d -"
        )
        env = stocked.env("root")
        env["PATH"] = f"{fingers_dir}:{env['PATH']}"
        done = subprocess.run(
            ["/bin/sh", "-c", recipe], env=env, capture_output=True, timeout=PATIENCE
        )
        assert b"postsuper: Deleted: 4 messages\n" in done.stderr
        assert in_queue(stocked) == " "

    @pytest.mark.parametrize(
        ("words", "sent"),
        [
            (["-f"], ["ofA", "ofB"]),
            (["-i", "0AAAAAAAAA"], ["ofA"]),
            (["-s", "b.example"], ["ofB"]),
            (["-i", "0ZZZZZZZZZ"], []),
            (["-s", "other.example"], []),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("is_up", [False, True], ids=["no daemon", "daemon"])
    def test_postqueue_tries_what_it_is_told_to(
        self, instance, fingers_dir, make_sink, words, sent, is_up
    ):
        sink = make_sink()
        for name in "ABC":
            how = {"text": letter(f"of{name}").encode(), "why": "not yet"}
            how["state"] = "hold" if name == "C" else ""
            put(instance, f"0{name * 9}", f"far@{name.lower()}.example", **how)
        instance.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        if is_up:
            instance.start()
        result = instance.run("postqueue", *words, bin_dir=fingers_dir)
        assert (result.code, result.out, result.err) == (0, "", "")
        left = "".join(one for one in "AB" if f"of{one}" not in sent) + " C"
        if is_up:
            wait_for(lambda: in_queue(instance) == left)
        assert (sink_tokens(sink), in_queue(instance)) == (sent, left)

    def test_without_an_option_postqueue_says_what_it_needs(self, by):
        assert_one_clear_line(by("postqueue"), 64)


class TestEximNames:
    """exim's queue commands, beside a daemon and without."""

    @pytest.fixture
    def exim(self, stocked, fingers_dir):
        """Runs exim, as root."""
        how = {"bin_dir": fingers_dir, "user": "root"}
        return lambda *words, **more: stocked.run("exim", *words, **how, **more)

    @pytest.mark.parametrize(
        ("flag", "queue_id", "said", "left"),
        [
            ("-Mrm", "0AAAAAAAAA", "has been removed", "BC D"),
            ("-Mrm", "0DDDDDDDDD", "has been removed", "ABC "),
            ("-Mf", "0AAAAAAAAA", "is now frozen", "BC AD"),
        ],
    )
    def test_what_is_done_is_said_of_each(
        self, stocked, exim, flag, queue_id, said, left
    ):
        result = exim(flag, queue_id)
        assert (result.code, result.err) == (0, "")
        assert result.out == f"Message {queue_id} {said}\n"
        assert in_queue(stocked) == left

    def test_several_are_done_one_by_one(self, stocked, exim):
        assert exim("-Mrm", "0AAAAAAAAA", "0BBBBBBBBB").out == (
            "Message 0AAAAAAAAA has been removed\nMessage 0BBBBBBBBB has been removed\n"
        )
        assert in_queue(stocked) == "C D"

    def test_what_is_thawed_is_said(self, stocked, exim):
        result = exim("-Mt", "0DDDDDDDDD")
        assert (result.code, result.err) == (0, "")
        assert result.out == "Message 0DDDDDDDDD is no longer frozen\n"
        assert os.listdir(stocked.queue / "hold") == []

    def test_what_is_frozen_is_not_frozen_again(self, exim):
        result = exim("-Mf", "0DDDDDDDDD")
        assert result.code == 1
        assert "is already frozen" in result.out + result.err

    @pytest.mark.parametrize("flag", ["-M", "-Mrm", "-Mf", "-Mt", "-Mg"])
    def test_what_is_no_id_is_named(self, instance, fingers_dir, flag):
        put_stock(instance)
        for name in ("0A", "../0AAAAAAAAA", "0ZZZZZZZZZ"):
            result = instance.run("exim", flag, name, bin_dir=fingers_dir)
            assert (result.code, result.out) == (1, "")
            said = f"malformed message id {name} after {flag} option"
            assert (said if name != "0ZZZZZZZZZ" else name) in result.err
        assert in_queue(instance) == "ABC D"

    @pytest.mark.parametrize(
        ("flag", "text"),
        [
            ("-Mvh", "Subject: hello\n"),
            ("-Mvb", "some text\n"),
            ("-Mvc", "Subject: hello\n\nsome text\n"),
        ],
    )
    @pytest.mark.parametrize("queue_id", ["0AAAAAAAAA", "0DDDDDDDDD"])
    def test_parts_of_a_message_are_shown(self, exim, flag, text, queue_id):
        result = exim(flag, queue_id)
        assert (result.code, result.err) == (0, "")
        assert result.out.rstrip("\n") == text.rstrip("\n")

    def test_what_happened_to_a_message_is_shown(self, exim):
        result = exim("-Mvl", "0AAAAAAAAA")
        assert (result.code, result.err) == (0, "")
        assert "deferred" in result.out
        assert STOCK_REASONS["a@one.example"] in result.out

    @pytest.mark.parametrize("is_up", [False, True], ids=["no daemon", "daemon"])
    @pytest.mark.parametrize(
        ("words", "sent"),
        [
            (["-M", "0AAAAAAAAA"], ["ofA"]),
            (["-M", "0AAAAAAAAA", "0BBBBBBBBB"], ["ofA", "ofB"]),
            (["-M", "0CCCCCCCCC"], ["ofC"]),
            (["-q"], ["ofA", "ofB"]),
            (["-qff"], ["ofA", "ofB", "ofC"]),
        ],
        ids=str,
    )
    def test_exim_tries_what_it_is_told_to(
        self, instance, fingers_dir, make_sink, words, sent, is_up
    ):
        sink = make_sink()
        for name in "ABC":
            how = {"text": letter(f"of{name}").encode(), "why": "not yet"}
            how["state"] = "hold" if name == "C" else ""
            put(instance, f"0{name * 9}", f"far@{name.lower()}.example", **how)
        instance.configure(relayhost=f"[127.0.0.1]:{sink.port}")
        if is_up:
            instance.start()
        result = instance.run("exim", *words, bin_dir=fingers_dir)
        assert (result.code, result.out, result.err) == (0, "", "")
        if is_up:
            wait_for(lambda: len(sink.received) >= len(sent), 5)
        assert sink_tokens(sink) == sent

    @pytest.mark.parametrize("is_up", [False, True], ids=["no daemon", "daemon"])
    @pytest.mark.parametrize("state", ["", "hold"])
    def test_what_is_given_up_is_returned(self, instance, fingers_dir, is_up, state):
        words = {"text": letter("tired").encode(), "state": state}
        put(instance, "0AAAAAAAAA", "far@far.example", **words)
        if is_up:
            instance.start()
        result = instance.run("exim", "-Mg", "0AAAAAAAAA", bin_dir=fingers_dir)
        assert (result.code, result.out, result.err) == (0, "", "")
        report = instance.wait_message("payam", "tired")
        assert "cancelled by the administrator" in report
        assert in_queue(instance) == " "

    def test_who_has_it_is_marked(self, instance, fingers_dir):
        put(instance, "0AAAAAAAAA", "had@x.example", "far@x.example")
        spool = minimta.House({"MINIMTA_ROOT": str(instance.root)}).spool()
        done = make_attempt("sent", "had@x.example", "remote had@x.example")
        spool.note("0AAAAAAAAA", [done])
        shown = instance.run("exim", "-bp", bin_dir=fingers_dir).out
        assert "\n        D had@x.example\n          far@x.example\n\n" in shown
        shown = instance.run("qmail-qread", bin_dir=fingers_dir).out
        assert "\n  done\tremote\thad@x.example\n\tremote\tfar@x.example\n" in shown


class TestMailSends:
    """mail(1) with recipients."""

    @pytest.mark.parametrize("name", ["", " ", ",", "<>", "undisclosed:;"])
    def test_mail_for_nobody_is_refused_and_its_text_is_kept(self, instance, name):
        result = instance.run("mail", "-s", "s", name, stdin="precious\n", user="payam")
        assert result.code == 65, result
        assert "no recipients: name somebody" in result.err
        assert "precious" in (instance.home("payam") / "dead.letter").read_text()
        assert instance.queued() == []

    def test_subject_and_body_from_stdin(self, shared):
        token = new_token()
        result = shared.run(
            "mail", "-s", token, "payam", stdin="one\ntwo\n", user="user1"
        )
        assert (result.code, result.out, result.err) == (0, "", "")
        message = shared.wait_message("payam", token)
        assert fields(message, "Subject") == [token]
        assert "user1@" in fields(message, "From")[0]
        assert "payam" in fields(message, "To")[0]
        assert head_and_body(message)[1] == "one\ntwo\n\n"

    def test_copies_and_blind_copies(self, shared):
        token = new_token()
        words = ("-s", token, "-c", "user1", "-b", "user2", "payam")
        assert shared.run("mail", *words, stdin="text\n").code == 0
        for user in LOCAL_USERS:
            message = shared.wait_message(user, token)
            assert "user1" in fields(message, "Cc")[0]
            assert fields(message, "Bcc") == []
            assert "user2" not in " ".join(fields(message, "To"))

    def test_r_sets_the_sender(self, shared):
        token = new_token()
        words = ("-s", token, "-r", "boss@example.com", "payam")
        assert shared.run("mail", *words, stdin="text\n").code == 0
        message = shared.wait_message("payam", token)
        assert fields(message, "Return-Path") == ["<boss@example.com>"]
        assert "boss@example.com" in fields(message, "From")[0]

    def test_a_subject_may_be_anything_but_a_second_field(self, shared):
        token = new_token()
        words = ("-s", f"{token}\nBcc: user2", "payam")
        shared.run("mail", *words, stdin="text\n")
        shared.wait_empty()
        assert shared.with_token("user2", token) == []

    def test_a_subject_and_text_of_utf_8_are_declared(self, shared):
        token = new_token()
        words = ("-s", "grüße", "payam")
        assert shared.run("mail", *words, stdin=f"schöne grüße {token}\n").code == 0
        message = shared.wait_message("payam", token)
        assert "utf-8" in fields(message, "Content-Type")[0].lower()

    def test_a_lone_dot_in_stdin_is_text(self, shared):
        token = new_token()
        shared.run("mail", "-s", token, "payam", stdin="one\n.\ntwo\n")
        assert "one\n.\ntwo\n" in shared.wait_message("payam", token)

    def test_an_unknown_user_is_told(self, shared):
        result = shared.run("mail", "-s", "x", "nosuchuser", stdin="text\n")
        assert result.code == 67
        assert "nosuchuser" in result.err
        assert "Traceback" not in result.err

    def test_at_a_terminal_it_asks_for_the_subject(self, shared):
        token = new_token()
        typing = Terminal(shared, "mail", "payam", user="user1")
        typing.expect("Subject: ")
        typing.type(f"{token}\n")
        typing.type("typed\n\x04")
        typing.expect("EOT\n")
        assert typing.close() == 0
        message = shared.wait_message("payam", token)
        assert head_and_body(message)[1] == "typed\n\n"

    def test_at_a_terminal_s_spares_the_question(self, shared):
        token = new_token()
        typing = Terminal(shared, "mail", "-s", token, "payam", user="user1")
        typing.type("typed\n\x04")
        assert "Subject: " not in typing.expect("EOT\n")
        assert typing.close() == 0
        shared.wait_message("payam", token)


@pytest.fixture
def reader(server):
    """A running instance where payam has three messages."""
    for number in (1, 2, 3):
        server.send(
            "payam@localhost",
            f"From: user{number % 2 + 1}@localhost\nSubject: subject {number}\n"
            f"Message-ID: <{number}@localhost>\n\ntext {number}\n",
            sender=f"user{number % 2 + 1}@localhost",
        )
        server.wait_message("payam", f"subject {number}")
    return server


# What is typed -> what is shown, what is not, and the messages that stay.
READING = {
    "the headers come first": ("x", ["3 messages 3 new", ">N  1 user2@"], [], "123"),
    "a number prints": ("2\nx", ["Message  2:\n", "\ntext 2\n"], ["text 1"], "123"),
    "return prints the next": ("\n\nx", ["text 1\n", "text 2\n"], ["text 3"], "123"),
    "n prints the next": ("1\nn\nx", ["text 1\n", "text 2\n"], ["text 3"], "123"),
    "p prints": ("p 3\nx", ["Message  3:\n", "text 3\n"], ["text 2"], "123"),
    "p prints a list": ("p 1-2\nx", ["text 1\n", "text 2\n"], ["text 3"], "123"),
    "d deletes": ("d 2\nq", [], [], "13"),
    "d deletes a list": ("d 1 3\nq", [], [], "2"),
    "d * deletes all": ("d *\nq", [], [], ""),
    "what is deleted is not printed": ("d 2\n2\nx", [], ["text 2"], "123"),
    "u takes it back": ("d 2\nu 2\n2\nx", ["text 2\n"], [], "123"),
    "x leaves all as it was": ("d *\nx", [], [], "123"),
    "the end of stdin is q": ("d 1", [], [], "23"),
    "? helps": ("?\nx", ["delete", "quit"], [], "123"),
    "an unknown command is told": ("frobnicate\nx", ["frobnicate"], [], "123"),
    "a number too high is told": ("9\nx", ["9: "], ["Message  9"], "123"),
}


# What was recorded of Heirloom mailx 12.5 as the course shows it, on 50 rows
# of a terminal: what was typed, what was shown, and what was left behind.
GOLDEN = json.loads((HERE / ".golden/mailx.json").read_text(encoding="utf-8"))
GOLDEN_BOX = (HERE / ".golden/sample.mbox").read_text(encoding="utf-8")
RAW_HTML = (
    "<html><head><title>x</title></head><body><h1>News</h1><p>Hello <b>lpic1</b> "
    '&amp; friends, see\n<a href="http://example.com/a?b=1&amp;c=2">this link</a>'
    ".</p><ul><li>one</li><li>two</li></ul></body></html>\n"
)
READ_HTML = (
    "News\n\nHello lpic1 & friends, see this link [1].\n\n* one\n* two\n\n"
    "[1] http://example.com/a?b=1&c=2\n"
)
KEPT = "the text is kept in /home/lpic1/dead.letter\n"
NO_USER1 = "user1@centos7-1.localdomain: User unknown: nothing was queued"
HOPE = "Null message body; hope that's ok\n"
# Scenario -> what is different on purpose.
GOLDEN_CHANGES = {
    # HTML can be read
    "read every message": {"output": (RAW_HTML, READ_HTML)},
    "delete undelete dp": {"output": (RAW_HTML, READ_HTML)},
    # -e only tells by its exit code
    "-e without mail": {"stderr": ("No mail for lpic1\n", "")},
    # a complaint begins with the name of who complains
    "-f missing": {"stderr": ("nosuch: ", "mail: nosuch: ")},
    # what is attached is written byte for byte
    "write attachment": {"report.csv": ("\n", "\r\n")},
    # a remark is no output
    "send empty body": {"output": (HOPE, ""), "stderr": ("", HOPE)},
    # a letter that was not sent is told of, and kept
    "send MTA fails": {"exit": 67, "stderr": ("", f"{KEPT}mail: {NO_USER1}\n")},
    # nothing was sent
    "send ^C ^C": {"exit": 1},
}


def golden_spool(data):
    """The lines of a mailbox that a golden row holds."""
    if data is None:
        return None
    found = []
    for text in re.split(r"(?m)^(?=From \S+  \w{3} \w{3} )", data)[1:]:
        head = text.partition("\n\n")[0]
        found += re.findall(r"(?m)^(?:From |Subject: |Status: ).*", head)
    return found


class TestGolden:
    """mail(1) beside the recorded sessions of Heirloom mailx."""

    @pytest.fixture
    def course(self, instance):
        """An instance with the user of the sessions."""
        home = instance.home("lpic1")
        home.mkdir()
        row = f"lpic1:x:{os.getuid()}:{os.getgid()}::{home}:/bin/sh\n"
        with open(instance.root / "etc/passwd", "a") as file:
            file.write(row)
        return instance

    def here(self, course, row, kind):
        """What row `kind` has to be in this instance."""
        old, new = GOLDEN_CHANGES.get(row["name"], {}).get(kind, ("", ""))
        text = row.get(kind, "")
        text = text.replace(old, new) if old else new or text
        version = f"minimta mail {minimta.__version__}."
        for word, ours in (
            ("Heirloom Mail version 12.5 7/5/10.", version),
            ("/var/spool/mail/lpic1", course.mailbox("lpic1")),
            ("/home/lpic1/", f"{course.home('lpic1')}/"),
        ):
            text = text.replace(word, str(ours))
        return text

    def type_all(self, course, row, env):
        """Plays a session at a terminal: what was shown, the exit code."""
        wanted, seen, place = self.here(course, row, "output"), 0, 0
        person = Terminal(course, "mail", *row["args"], user="lpic1", rows=50, env=env)
        shown = ""
        for line in row["input"]:
            echo = {"\x03": "^C", "\x04": ""}.get(line, line)
            prompt = "& " if wanted.find("& " + echo, place) >= 0 else ""
            echoed = wanted.index(prompt + echo, place) + len(prompt)
            if seen < echoed:
                shown += person.expect(wanted[seen:echoed])
            seen, place = echoed, echoed + len(echo)
            if line == "\x03":
                person.interrupt()
            else:
                person.type(line)
        return shown + person.rest(), person.close()

    @pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["name"])
    def test_a_session_is_as_recorded(self, course, row):
        name, env = row["name"], {"LC_ALL": "C.UTF-8", "PAGER": "cat"}
        if row["spool"] is not None:
            course.write("var/mail/lpic1", GOLDEN_BOX)
        names = set() if name == "send MTA fails" else {"b1", "c1", "user1"}
        changed = GOLDEN_CHANGES.get(name, {})
        if name == "send MTA fails":
            text = (course.root / "etc/passwd").read_text()
            course.write("etc/passwd", text.replace("user1:", "nobody1:"))
        course.aliases("".join(f"{one}: root\n" for one in names - {"user1"}))
        course.run("newaliases")
        if row["tty"]:
            shown, code = self.type_all(course, row, env)
            error = ""
        else:
            result = course.run(
                "mail", *row["args"], stdin=row["input"], user="lpic1", env=env
            )
            shown, error, code = result.out, result.err, result.code
        assert shown == self.here(course, row, "output")
        assert error == self.here(course, row, "stderr")
        assert code == changed.get("exit", row["exit"])
        self.check_files(course, row)
        self.check_sent(course, row)

    def check_files(self, course, row):
        """The mailbox, and what is in the home."""
        path = course.mailbox("lpic1")
        data = path.read_text() if path.exists() else None
        assert golden_spool(data) == row["spool"]
        left = {one.name: one for one in course.home("lpic1").iterdir()}
        kept = left.pop("dead.letter", None)
        if "dead.letter" in row["home"] or row["name"] == "send MTA fails":
            # a letter: with its From_ line and its header
            head, _, body = kept.read_text().partition("\n\n")
            assert head.startswith("From lpic1  ")
            assert "\nTo: user1" in head
            wanted = row["home"].get("dead.letter", {"text": row["input"]})
            assert (body, kept.stat().st_mode & 0o777) == (wanted["text"] + "\n", 0o600)
        for name, wanted in row["home"].items():
            if name != "dead.letter":
                text = wanted["text"]
                text = text.replace(*GOLDEN_CHANGES[row["name"]].get(name, ("", "")))
                path = left.pop(name)
                assert path.read_bytes().decode() == text
                assert path.stat().st_mode & 0o777 == int(wanted["mode"], 8)
        assert left == {}

    def check_sent(self, course, row):
        """The letter that was queued, delivered to who stands for all."""
        wanted = [one["message"] for one in row["sent"]]
        if row["name"] == "send MTA fails":
            wanted = []
        course.run("sendmail", "-q", user="root")
        course.wait_empty()
        user = "lpic1" if row["name"] == "send interactive" else "user1"
        assert len(course.messages(user)) == len(wanted)
        for recorded, (letter,) in zip(wanted, [course.messages(user)]):
            recorded = f"From x\n{recorded}"
            for name in ("To", "Cc"):
                assert fields(letter, name) == fields(recorded, name)
            assert fields(letter, "Bcc") == []
            for name in ("Subject", "From"):
                if fields(recorded, name):
                    was, now = fields(recorded, name), fields(letter, name)
                    assert list(map(minimta.decoded, now)) == list(
                        map(minimta.decoded, was)
                    )
            _, body = head_and_body(recorded)
            body = body.replace("\\xe9", "\xe9").replace("=\n", "")
            assert head_and_body(letter)[1].strip() == body.strip()


# What is typed before q -> where message 1, new at first, ends, with its
# Status: without hold, and with it.
QUIT_ROWS = {
    "nothing": ([], "box O", "box O"),
    "f": (["f 1"], "box O", "box O"),
    "h": (["h 1"], "box O", "box O"),
    "size": (["size 1"], "box O", "box O"),
    "p": (["p 1"], "mbox RO", "box RO"),
    "n": (["n"], "mbox RO", "box RO"),
    "top": (["top 1"], "mbox RO", "box RO"),
    "pipe": (["pipe 1 'cat >/dev/null'"], "mbox RO", "box RO"),
    "s": (["s 1 out"], "gone", "gone"),
    "s with keepsave": (["set keepsave", "s 1 out"], "mbox RO", "box RO"),
    "c": (["c 1 out"], "mbox RO", "box RO"),
    "w": (["w 1 out"], "mbox RO", "box RO"),
    "d": (["d 1"], "gone", "gone"),
    "d, u": (["d 1", "u 1"], "mbox RO", "box RO"),
    "touch": (["touch 1"], "mbox O", "box O"),
    "mbox": (["mbox 1"], "mbox O", "mbox O"),
    "p, pre": (["p 1", "pre 1"], "box RO", "box RO"),
    "d, pre": (["d 1", "pre 1"], "gone", "gone"),
    "pre, d": (["pre 1", "d 1"], "gone", "gone"),
    "mbox, d": (["mbox 1", "d 1"], "gone", "gone"),
    "p, unread": (["p 1", "unread 1"], "box O", "box O"),
    "p, U": (["p 1", "U 1"], "box O", "box O"),
    "d, x": (["d 1", "x"], "box new", "box new"),
    "p, x": (["p 1", "x"], "box new", "box new"),
    "mbox, x": (["mbox 1", "x"], "box new", "box new"),
}


def ends_in(place, subject):
    """Where a message is after the session: `box O`, `mbox RO`, `gone`."""
    found = []
    for name, path in (("box", place / "box"), ("mbox", place / "mbox")):
        for text in read_mbox(path.read_bytes()) if path.exists() else []:
            if fields(text, "Subject") == [subject]:
                found.append(f"{name} {''.join(fields(text, 'Status')) or 'new'}")
    return " and ".join(found) or "gone"


class TestMailQuits:
    """What becomes of the mail when a session is over."""

    @pytest.fixture
    def box(self, session, tmp_path, monkeypatch):
        """Makes a session where mbox is beside the mailbox."""
        monkeypatch.chdir(tmp_path)

        def make(*lines, texts=None):
            reader = session(*lines, texts=texts)
            reader.variables.values["MBOX"] = str(tmp_path / "mbox")
            return reader

        return make

    @pytest.mark.parametrize("variable", ["nohold", "hold"])
    @pytest.mark.parametrize("row", QUIT_ROWS.values(), ids=QUIT_ROWS)
    def test_a_message_ends_where_posix_says(self, box, tmp_path, row, variable):
        lines, without, with_hold = row
        texts = [mail("first"), mail("other")]
        reader = box(f"set {variable}", *lines, "q", texts=texts)
        assert minimta.run_session(reader) == 0
        wanted = with_hold if variable == "hold" else without
        assert ends_in(tmp_path, "first") == wanted
        assert ends_in(tmp_path, "other") == ("box new" if "x" in lines else "box O")

    def test_two_that_were_read_go_to_mbox_in_order(self, box, tmp_path):
        texts = [mail(name) for name in "abc"]
        reader = box("set nohold", "n", "n", "q", texts=texts)
        minimta.run_session(reader)
        wanted = mail("a", status="RO") + mail("b", status="RO")
        assert (tmp_path / "mbox").read_text() == wanted
        assert (tmp_path / "box").read_text() == mail("c", status="O")
        assert "Saved 2 messages in mbox\n" in reader.terminal.shown
        assert f"Held 1 message in {tmp_path}/box\n" in reader.terminal.shown

    def test_what_was_read_in_an_earlier_session_stays(self, box, tmp_path):
        minimta.run_session(box("set nohold", "d 2", "q", texts=None))
        assert ends_in(tmp_path, "s1") == "box RO"

    def test_mbox_is_for_its_owner_alone(self, box, tmp_path):
        minimta.run_session(box("mbox 1", "q"))
        assert (tmp_path / "mbox").stat().st_mode & 0o777 == 0o600

    def test_mbox_is_appended_to(self, box, tmp_path):
        (tmp_path / "mbox").write_text(mail("older"))
        minimta.run_session(box("mbox 4", "q"))
        wanted = mail("older") + mail("s4", status="O")
        assert (tmp_path / "mbox").read_text() == wanted

    def test_nothing_is_said_of_an_empty_mailbox_and_the_file_stays(
        self, box, tmp_path
    ):
        reader = box("d *", "q")
        before = (tmp_path / "box").stat()
        minimta.run_session(reader)
        after = (tmp_path / "box").stat()
        assert "Held" not in reader.terminal.shown
        assert (after.st_size, after.st_ino) == (0, before.st_ino)
        assert after.st_mode == before.st_mode

    def test_another_folder_keeps_what_was_saved_or_read(self, box, tmp_path):
        reader = box("set nohold", "p 4", "s 4 out", "d 5", "q")
        reader.is_system = False
        minimta.run_session(reader)
        assert ends_in(tmp_path, "s4") == "box RO"
        assert ends_in(tmp_path, "s5") == "gone"
        assert not (tmp_path / "mbox").exists()
        assert f'"{tmp_path}/box" updated.\n' in reader.terminal.shown

    def test_another_folder_holds_nothing(self, box):
        reader = box()
        reader.is_system = False
        reader.obey("pre 4")
        assert 'Cannot "preserve" in edit mode\n' in reader.terminal.shown

    def test_mail_that_came_meanwhile_is_new_still(self, box, tmp_path):
        reader = box("d *", "q")
        with open(tmp_path / "box", "a") as file:
            file.write(mail("late"))
        minimta.run_session(reader)
        assert (tmp_path / "box").read_text() == mail("late")

    def test_mail_that_inc_took_in_is_old_next_time(self, box, tmp_path):
        reader = box("inc", "q")
        with open(tmp_path / "box", "a") as file:
            file.write(mail("late"))
        minimta.run_session(reader)
        assert "Loaded 1 new message\n" in reader.terminal.shown
        assert ends_in(tmp_path, "late") == "box O"


@pytest.mark.skipif(not shutil.which("strace"), reason="there is no strace here")
class TestMailIsKilled:
    """A kill -9 of q at every system call that changes a file."""

    BEFORE = [mail("a", "one"), mail("b", "two"), mail("c", "three")]

    def killed_at(self, instance, call, count, typed):
        """Run mail, killed at that call; whether it came so far."""
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        command += ["-e", f"inject={call}:signal=SIGKILL:when={count}"]
        command += [instance.bin / "mail", "-N"]
        done = subprocess.run(
            command,
            input=typed.encode(),
            capture_output=True,
            env=instance.env("payam"),
            cwd=instance.home("payam"),
            timeout=PATIENCE,
        )
        return done.returncode != 0

    def left(self, instance):
        """The text of each file with mail."""
        places = (instance.mailbox("payam").parent, instance.home("payam"))
        paths = [path for place in places for path in place.iterdir()]
        return {path.name: path.read_text() for path in paths if path.is_file()}

    def assert_old_or_new(self, instance, box, bodies, late):
        """The next mail finds the mailbox as it was, or as it should be."""
        read = instance.run("mail", "-N", stdin="x\n", user="payam")
        assert read.code == 0 or not box.read_text(), read
        found = re.findall(r"(?m)^From .*\n(?:.+\n)+\n(\w+)\n", box.read_text())
        words = [body.strip() for body in bodies]
        after = found[:-1] if late else found
        assert found[len(after) :] == ["late"] * late
        assert [word for word in words if word in after] == after
        assert len(box.read_text().split("\nFrom ")) == max(1, len(found))
        assert not any(name.endswith(".rescued") for name in self.left(instance))

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize(
        "call", ["write", "fsync", "?rename", "ftruncate", "?unlink,unlinkat"]
    )
    @pytest.mark.parametrize(
        "typed", ["d 1\nq\n", "p 2\nq\n", "set nohold\np 1\nd 3\nq\n", "s 2 out\nq\n"]
    )
    def test_no_message_is_lost(self, make_instance, call, typed, late):
        bodies = [f"\n\n{word}\n\n" for word in ("one", "two", "three")]
        for count in itertools.count(1):
            instance = make_instance()
            box = instance.make_mailbox("payam", "".join(self.BEFORE))
            was_killed = self.killed_at(instance, call, count, typed)
            left = self.left(instance)
            everything = "".join(left.values())
            gone = {"d 1": bodies[:1], "d 3": bodies[2:]}
            may_go = [b for word, texts in gone.items() if word in typed for b in texts]
            for body in bodies:
                assert body in everything or body in may_go, (count, left)
            if was_killed and box.read_text() == "".join(self.BEFORE):
                assert all(body in left["payam"] for body in bodies)
            if late:
                box.write_text(box.read_text() + mail("d", "late"))
            self.assert_old_or_new(instance, box, bodies, late)
            if not was_killed:
                assert not any(name.endswith(".rescued") for name in left)
                assert count > 1
                return


def letter_sent(instance):
    """The one letter that was sent, as the first of who got it has it."""
    instance.run("sendmail", "-q", user="root")
    instance.wait_empty()
    found = next(filter(None, map(instance.messages, LOCAL_USERS)))
    (letter,) = found
    return letter


def nothing_sent(instance):
    """Whether no letter is in the queue or was in it."""
    return not instance.queued() and not any(map(instance.messages, LOCAL_USERS[:2]))


def is_refused(result, code, why):
    """Whether it ended so, and said why in one line."""
    return result.code == code and why in result.err and "Traceback" not in result.err


# Options and operands, stdin -> what the letter has, what it has not.
# Patterns of whole lines; {file} is a file with the text `data`.
LETTER_ROWS = {
    "-s": (["-s", "x", "user1"], "text\n", ["Subject: x", "To: user1", "text"], []),
    "-s behind": (["user1", "-s", "x"], "text\n", ["Subject: x", "To: user1"], []),
    "-sX": (["-sx y", "user1"], "text\n", ["Subject: x y"], []),
    "-s with line ends": (
        ["-s", "x\nBcc: user2\r\nC: d", "user1"],
        "text\n",
        ["Subject: x Bcc: user2 C: d"],
        ["Bcc:.*", "C: d"],
    ),
    "-s of utf-8": (
        ["-s", "ü", "user1"],
        "text\n",
        [r"Subject: =\?utf-8\?B\?w7w=\?="],
        [],
    ),
    "no -s": (["user1"], "text\n", ["To: user1"], ["Subject:.*"]),
    "-c list": (["-c", "user2,payam", "user1"], "text\n", ["Cc: user2, payam"], []),
    "-c blanks": (["-c", "user2 payam", "user1"], "text\n", ["Cc: user2, payam"], []),
    "-c twice": (
        ["-c", "user2", "-c", "payam", "user1"],
        "t\n",
        ["Cc: user2, payam"],
        [],
    ),
    "-c of nobody": (["-c", "", "user1"], "text\n", ["To: user1"], ["Cc:.*"]),
    "-b": (["-b", "user2", "user1"], "text\n", ["To: user1"], ["Bcc:.*", ".*user2.*"]),
    "in order": (["user2", "user1"], "text\n", ["To: user2, user1"], []),
    "at a comma": (["user2,user1"], "text\n", ["To: user2, user1"], []),
    "with a name": (
        ["User One <user1@localhost>"],
        "text\n",
        ["To: User One <user1@localhost>"],
        [],
    ),
    "-r": (["-r", "b@example.com", "user1"], "t\n", ["From: b@example.com"], []),
    "-r with a name": (
        ["-r", "The Boss <b@example.com>", "user1"],
        "text\n",
        ["From: The Boss <b@example.com>"],
        [],
    ),
    "-S from": (
        ["-S", "from=b@example.com", "user1"],
        "t\n",
        ["From: b@example.com"],
        [],
    ),
    "-S smtp": (["-S", "smtp=smtp.example:25", "user1"], "text\n", ["text"], []),
    "-a field": (["-a", "X-Test: yes", "user1"], "text\n", ["X-Test: yes"], []),
    "-a Content-Type": (
        ["-a", "Content-Type: text/html", "user1"],
        "<p>\n",
        ["Content-Type: text/html"],
        ["Content-Type: text/plain.*"],
    ),
    "-a Subject": (
        ["-s", "x", "-a", "Subject: y", "user1"],
        "t\n",
        ["Subject: y"],
        ["Subject: x"],
    ),
    "-a From": (
        ["-a", "From: B <b@example.com>", "user1"],
        "text\n",
        ["From: B <b@example.com>"],
        ["From: (?!B).*"],
    ),
    "-a file": (
        ["-a", "{file}", "user1"],
        "text\n",
        ["Content-Type: multipart/mixed;.*", "text", "ZGF0YQo="],
        [],
    ),
    "-a file twice": (
        ["-a", "{file}", "-a", "{file}", "user1"],
        "text\n",
        [r'Content-Disposition: attachment; filename="file.txt"'],
        [],
    ),
    "-a file and field": (
        ["-a", "{file}", "-a", "X-Test: yes", "user1"],
        "text\n",
        ["X-Test: yes", "ZGF0YQo="],
        [],
    ),
    "-A file": (["-A", "{file}", "user1"], "text\n", ["ZGF0YQo="], []),
    "-q": (["-q", "{file}", "user1"], "text\n", ["data", "text"], []),
    "-C": (["-C", "X-Test: yes", "user1"], "text\n", ["X-Test: yes"], []),
    "-M": (["-M", "text/html", "user1"], "<p>\n", ["Content-Type: text/html"], []),
    "-t": (
        ["-t"],
        "To: user1\nX-Own: 1\nBcc: user2\nSubject: x\n\ntext\n",
        ["To: user1", "X-Own: 1", "Subject: x", "text"],
        ["Bcc:.*", ".*user2.*"],
    ),
    "-t and recipients": (["-t", "user2"], "To: user1\n\ntext\n", ["text"], []),
    "-E": (["-E", "user1"], "text\n", ["text"], []),
    "-i": (["-i", "user1"], "text\n", ["text"], []),
    "-n": (["-n", "user1"], "text\n", ["text"], []),
    "-B": (["-B", "user1"], "text\n", ["text"], []),
    "--": (["-s", "x", "--", "user1"], "text\n", ["To: user1"], []),
    "no line end": (["user1"], "text", ["text"], []),
    "a dot": (["user1"], "one\n.\ntwo\n", [r"\.", "two"], []),
    "a tilde": (["user1"], "~s y\ntext\n", ["~s y"], ["Subject:.*"]),
    "ascii": (
        ["user1"],
        "text\n",
        [
            "Content-Type: text/plain; charset=us-ascii",
            "Content-Transfer-Encoding: 7bit",
        ],
        [],
    ),
    "utf-8": (["user1"], "ü\n", ["Content-Type: text/plain; charset=utf-8"], []),
    "latin-1": (
        ["user1"],
        b"\xfc\n",
        ["Content-Type: text/plain; charset=unknown-8bit"],
        [],
    ),
}

# What is refused -> the exit code, what is said.
REFUSED_LETTERS = {
    "a file that is missing": (
        ["-a", "nosuch", "user1"],
        1,
        "No such file or directory",
    ),
    "no recipient": (["-s", "x"], 64, "You must specify to-addr recipients"),
    "no recipient but a copy": (["-c", "user1"], 64, "You must specify to-addr"),
    "no such option": (["-%", "user1"], 64, "-%"),
    "an option without value": (["user1", "-s"], 64, "-s"),
    "a word that looks like an option": (["--", "-oQ/tmp"], 64, "-oQ/tmp"),
    "a command": (["|touch ran"], None, "touch"),
    "a file": (["/tmp/nosuch-file"], None, "/tmp/nosuch-file"),
    "no such user": (["nosuchuser"], 67, "nosuchuser"),
}


def naps(pid):
    """Whether a process waits for a while, as for a lock that another has."""
    return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()


@contextlib.contextmanager
def dot_locked(path):
    """Another process has the dotlock of a mailbox for the block."""
    lock = path.with_name(f"{path.name}.lock")
    lock.write_text(f"{os.getpid()}\n")
    yield
    lock.unlink()


def header_of(text):
    """The lines of a header as they stand, and its fields unfolded."""
    lines = text.partition("\n\n")[0].split("\n")
    return lines, message_from_string(re.sub(r"\n(?=[ \t])", "", text))


class TestMailOptions:
    """mail(1)'s command line."""

    def sent(self, instance, words, stdin, env=()):
        """The text of the one letter that was queued."""
        stdin = stdin.encode() if isinstance(stdin, str) else stdin
        text = stdin.decode("utf-8", "surrogateescape")
        result = instance.run("mail", *words, stdin=text, user="payam", env=env)
        assert (result.code, result.out) == (0, ""), result
        return letter_sent(instance)

    @pytest.mark.parametrize("row", LETTER_ROWS.values(), ids=LETTER_ROWS)
    def test_a_letter_is_made(self, instance, row):
        words, stdin, wanted, unwanted = row
        path = instance.write("file.txt", "data\n")
        words = [word.replace("{file}", str(path)) for word in words]
        text = self.sent(instance, words, stdin)
        for pattern in wanted:
            assert re.search(f"(?m)^{pattern}$", text), (pattern, text)
        for pattern in unwanted:
            assert not re.search(f"(?m)^{pattern}$", text), (pattern, text)

    @pytest.mark.parametrize("row", REFUSED_LETTERS.values(), ids=REFUSED_LETTERS)
    def test_what_cannot_be_is_refused(self, instance, row):
        words, code, why = row
        result = instance.run("mail", *words, stdin="text\n", user="payam")
        assert is_refused(result, code or result.code, why), result
        assert result.code != 0
        assert nothing_sent(instance)
        assert not (instance.root / "ran").exists()

    def test_a_language_changes_nothing(self, instance):
        text = self.sent(instance, ["-s", "ü", "user1"], "ü\n", {"LC_ALL": "C"})
        assert "charset=utf-8" in text

    def test_every_field_is_there_once(self, instance):
        words = ["-s", "x", "-a", "Reply-To: a@x", "-a", "Reply-To: b@x", "user1"]
        text = self.sent(instance, words, "text\n")
        for name in ("From", "To", "Subject", "Date", "Message-ID", "Content-Type"):
            assert len(re.findall(f"(?m)^{name}:", text)) == 1, (name, text)
        assert re.findall("(?m)^Reply-To: .*", text) == ["Reply-To: b@x"]

    def test_an_attachment_is_byte_for_byte(self, instance):
        data = bytes(range(256)) * 9 + b"\r\n"
        path = instance.root / "a b.bin"
        path.write_bytes(data)
        message = message_from_string(self.sent(instance, ["-a", path, "user1"], "t\n"))
        text, part = message.get_payload()
        assert part.get_payload(decode=True) == data
        assert part.get_filename() == "a b.bin"
        assert text.get_payload(decode=True) == b"t\n"

    @pytest.mark.parametrize("option", ["-E", "-Sskipempty"])
    def test_an_empty_letter_is_not_sent_if_so_asked(self, instance, option):
        result = instance.run("mail", option, "-s", "x", "user1", user="payam")
        assert (result.code, result.out, result.err) == (0, "", "")
        assert nothing_sent(instance)

    def test_d_only_shows(self, instance):
        result = instance.run("mail", "-d", "-s", "x", "user1", stdin="text\n")
        assert "Subject: x\n" in result.out
        assert result.out.endswith("\n\ntext\n")
        assert nothing_sent(instance)

    def test_v_names_the_queue_id(self, instance):
        result = instance.run("mail", "-v", "-s", "x", "user1", stdin="text\n")
        assert result.code == 0
        assert re.search(r"queued as \w{10}\n", result.err)

    def test_r_and_a_from_set_the_envelope(self, server):
        for token, words in (
            ("one", ["-r", "The Boss <b@example.com>"]),
            ("two", ["-a", "From: The Boss <b@example.com>"]),
        ):
            server.run("mail", *words, "-s", token, "user1", stdin="text\n")
            message = server.wait_message("user1", token)
            assert fields(message, "Return-Path") == ["<b@example.com>"]

    def test_options_behind_operands_may_be_stopped(self, instance):
        env = {"POSIXLY_CORRECT": "1"}
        words = ("user1", "-s", "x")
        result = instance.run("mail", *words, stdin="text\n", env=env)
        assert result.code != 0
        assert nothing_sent(instance)

    @pytest.mark.parametrize("words", [["-V"], ["--version"], ["--help"]])
    def test_it_tells_of_itself(self, instance, words):
        result = instance.run("mail", *words)
        assert result.code == 0
        assert "m" in result.out

    def test_a_letter_that_is_not_sent_is_kept_whole(self, instance):
        instance.run("mail", "-s", "x", "nosuch", stdin="precious\n", user="payam")
        kept = (instance.home("payam") / "dead.letter").read_text()
        assert kept.startswith("From payam  ")
        assert "\nSubject: x\n" in kept
        assert kept.endswith("\n\nprecious\n\n")

    def test_dead_letter_keeps_older_ones(self, instance):
        for word in ("older", "newer"):
            instance.run("mail", "-s", word, "nosuch", stdin="text\n", user="payam")
        kept = read_mbox((instance.home("payam") / "dead.letter").read_bytes())
        assert [fields(one, "Subject") for one in kept] == [["older"], ["newer"]]

    def test_dead_may_be_nowhere(self, instance):
        env = {"DEAD": "/dev/null"}
        instance.run("mail", "nosuch", stdin="text\n", user="payam", env=env)
        assert not (instance.home("payam") / "dead.letter").exists()

    @pytest.mark.parametrize(
        "words",
        [["-c", "bad <x"], ["-b", "bad <x"], ["-r", "bad <x"], ["-c", "a b <c d>"]],
    )
    def test_a_letter_with_a_bad_address_is_kept_whole(self, instance, words):
        result = instance.run(
            "mail", "-s", "x", *words, "user1", stdin="precious\n", user="payam"
        )
        assert result.code == 65, result
        assert "dead.letter" in result.err
        (kept,) = read_mbox((instance.home("payam") / "dead.letter").read_bytes())
        assert "\nSubject: x\n" in kept
        assert "\nTo: user1\n" in kept
        assert words[0] != "-c" or "\nCc: " in kept
        assert kept.endswith("\n\nprecious\n\n")
        assert nothing_sent(instance)

    def test_dead_may_begin_with_a_tilde(self, instance):
        home, env = instance.home("payam"), {"DEAD": "~/dl"}
        result = instance.run(
            "mail", "nosuch", stdin="precious\n", user="payam", env=env
        )
        assert f"the text is kept in {home}/dl\n" in result.err
        assert "precious" in (home / "dl").read_text()
        assert not (home / "dead.letter").exists()

    @pytest.mark.parametrize("name", ["/nosuch/dl", "~/nosuch/dl", "/"])
    def test_where_dead_cannot_be_the_usual_file_is_used(self, instance, name):
        home, env = instance.home("payam"), {"DEAD": name}
        result = instance.run(
            "mail", "nosuch", stdin="precious\n", user="payam", env=env
        )
        assert f"the text is kept in {home}/dead.letter\n" in result.err
        assert f"{name.replace('~', str(home))}: " in result.err
        assert "precious" in (home / "dead.letter").read_text()

    @pytest.mark.parametrize(("name", "code"), [("user1", 0), ("nosuch", 67)])
    def test_a_copy_is_one_message_whatever_its_text_is(self, instance, name, code):
        path = instance.home("payam") / "copies"
        text = "one\n\nFrom two  Wed Feb 19 05:10:01 2025\n>From three\n"
        for word in ("first", "second"):
            result = instance.run(
                *("mail", "-S", f"record={path}", "-s", word, name),
                stdin=text,
                user="payam",
                env={"DEAD": str(path)},
            )
            assert result.code == code, result
        assert path.read_text().count("\n>From two ") == 2
        shown = instance.run("mail", "-f", path, "-H", user="payam").out
        assert [line.split()[-1] for line in shown.splitlines()] == [
            '"first"',
            '"second"',
        ]
        printed = instance.run("mail", "-Nf", path, user="payam", stdin="2\nx\n").out
        assert printed.endswith(f"\n\n{text}\n")

    @pytest.mark.parametrize("name", ["/nosuch/copy", "/", "{home}/nosuch/copy"])
    def test_a_copy_that_cannot_be_kept_stops_no_letter(self, instance, name):
        path = name.replace("{home}", str(instance.home("payam")))
        result = instance.run(
            "mail", "-S", f"record={path}", "-s", "x", "user1", stdin="text\n"
        )
        assert (result.code, result.out) == (0, ""), result
        assert len(result.err.splitlines()) == 1
        assert f"{path}: " in result.err
        assert "it is sent, but no copy is kept" in result.err
        assert "Subject: x\n" in letter_sent(instance)

    @pytest.mark.parametrize("lock", [locked, dot_locked])
    def test_a_copy_waits_for_whoever_has_the_mailbox_locked(self, instance, lock):
        path = instance.home("payam") / "copies"
        path.write_text(mail("older"))
        instance.give(path, "payam")
        words = ["mail", "-S", f"record={path}", "-s", "x", "user1"]
        with lock(path):
            child = subprocess.Popen(
                [instance.bin / words[0], *words[1:]],
                stdin=subprocess.PIPE,
                env=instance.env("payam"),
                cwd=instance.root,
            )
            child.stdin.write(b"text\n")
            child.stdin.close()
            wait_for(lambda: naps(child.pid))
            assert path.read_text() == mail("older")
        assert child.wait(PATIENCE) == 0
        found = read_mbox(path.read_bytes())
        assert [fields(one, "Subject") for one in found] == [["older"], ["x"]]
        assert not path.with_name("copies.lock").exists()

    def test_a_type_is_that_of_the_text_also_with_attachments(self, instance):
        path = instance.write("file.txt", "data\n")
        words = ["-a", "Content-Type: text/html; charset=utf-8", "-a", path, "user1"]
        message = message_from_string(self.sent(instance, words, "<p>\n"))
        assert message.get_content_type() == "multipart/mixed"
        assert len(message.get_all("Content-Type")) == 1
        text, part = message.get_payload()
        assert text["Content-Type"] == "text/html; charset=utf-8"
        assert text.get_payload() == "<p>\n"
        assert part.get_payload(decode=True) == b"data\n"

    @pytest.mark.parametrize("name", ["Jörg", "Jörg B.", '"Jörg, der Große"', "東京"])
    def test_names_are_coded(self, instance, name):
        words = ["-r", f"{name} <b@example.com>", "-c", f"{name} <user2@localhost>"]
        text = self.sent(instance, [*words, f"{name} <user1@localhost>"], "text\n")
        lines, header = header_of(text)
        assert "\n".join(lines).isascii()
        for field, address in (
            ("From", "b@example.com"),
            ("Cc", "user2@localhost"),
            ("To", "user1@localhost"),
        ):
            shown, found = email.utils.parseaddr(header[field])
            assert (decoded(shown), found) == (name.strip('"'), address)

    def test_long_lines_of_a_header_are_folded(self, instance):
        names = [f"user1+{number}@localhost" for number in range(99)]
        subject = " ".join(f"word{number}" for number in range(300))
        copies = [f"Grüße {number} <user2@localhost>" for number in range(30)]
        words = ["-s", subject, "-c", ", ".join(copies), *names]
        lines, header = header_of(self.sent(instance, words, "text\n"))
        assert max(map(len, lines)) <= 78
        assert header["Subject"] == subject
        assert header["To"] == ", ".join(names)
        found = email.utils.getaddresses([header["Cc"]])
        assert [decoded(name) for name, _ in found] == [
            f"Grüße {number}" for number in range(30)
        ]

    @pytest.mark.parametrize("subject", ["ü" * 900, "ü x" * 300, "x y" * 500])
    def test_a_long_subject_reads_as_it_was_given(self, instance, subject):
        text = self.sent(instance, ["-s", subject, "user1"], "text\n")
        lines, header = header_of(text)
        assert max(map(len, lines)) <= 78
        assert decoded(header["Subject"]) == subject

    def test_a_field_may_be_given_twice_unless_there_is_one(self, instance):
        words = ["-s", "s"]
        for name in ("X", "x", "Received", "Subject", "From", "Message-ID", "Date"):
            value = "{}@example.com" if name == "From" else "<{}@x>"
            for number in (1, 2):
                words += ["-a", f"{name}: {value.format(number)}"]
        text = self.sent(instance, [*words, "user1"], "text\n")
        head = text.partition("\n\n")[0]
        assert re.findall("(?im)^X: .*", head) == [
            *("X: <1@x>", "X: <2@x>", "x: <1@x>", "x: <2@x>")
        ]
        for name in ("Subject", "Message-ID", "Date"):
            assert re.findall(f"(?m)^{name}: .*", head) == [f"{name}: <2@x>"]
        assert re.findall("(?m)^From: .*", head) == ["From: 2@example.com"]

    def test_variables_add_copies_and_a_place_for_answers(self, instance):
        rc = "set autocc=user2 autobcc='payam root' replyto='R <r@example.com>'\n"
        (instance.home("payam") / ".mailrc").write_text(rc)
        text = self.sent(instance, ["-s", "x", "-c", "c@localhost", "user1"], "t\n")
        assert fields(text, "Cc") == ["c@localhost, user2"]
        assert fields(text, "Reply-To") == ["R <r@example.com>"]
        assert fields(text, "Bcc") == []
        for user in ("user1", "user2", "payam", "root"):
            assert fields(instance.messages(user)[0], "Subject") == ["x"]

    def test_a_reply_to_that_was_given_wins_over_the_variable(self, instance):
        words = ["-S", "replyto=r@x", "-a", "Reply-To: own@x", "user1"]
        assert fields(self.sent(instance, words, "t\n"), "Reply-To") == ["own@x"]

    @pytest.mark.parametrize(("name", "flag"), minimta.MAIL_LONG_FLAGS.items())
    def test_a_long_option_is_the_short_one(self, name, flag):
        long, equals, _ = name.partition("=")
        if equals:
            every = (["--" + name + "v", "w"], ["--" + long, "v", "w"])
            short = [flag, "v", "w"]
        else:
            every, short = (["--" + long, "w"],), [flag, "w"]
        for words in every:
            assert minimta.mail_options(words) == minimta.mail_options(short)
        assert minimta.mail_options(short)[1] == ["w"]

    def test_a_long_option_with_a_value_it_has_not_is_refused(self, instance):
        for words in (["--file=x"], ["--subject"], ["--nosuch"], ["--verbose=1"]):
            result = instance.run("mail", *words, user="payam")
            assert is_refused(result, 64, words[0].partition("=")[0].strip("-"))

    @pytest.mark.parametrize(
        ("more", "sender", "names"),
        [
            (["-f", "a@example.com"], "a@example.com", ["user1"]),
            (["-fa@example.com"], "a@example.com", ["user1"]),
            (["-r", "a@example.com", "user2"], "a@example.com", ["user1", "user2"]),
            (["-i", "-f", "<>"], "", ["user1"]),
            (["-oi", "user2"], f"payam@{HOST}", ["user1", "user2"]),
            (["user2"], f"payam@{HOST}", ["user1", "user2"]),
        ],
    )
    def test_options_of_sendmail_may_follow(self, server, more, sender, names):
        token = new_token()
        words = ("-s", token, "user1", "--", *more)
        result = server.run("mail", *words, stdin="text\n", user="payam")
        assert (result.code, result.out, result.err) == (0, "", ""), result
        for name in names:
            message = server.wait_message(name, token)
            assert fields(message, "Return-Path") == [f"<{sender}>"]
        assert server.with_token("user2", token) == [] or "user2" in names

    @pytest.mark.parametrize("option", ["-F", "--byname"])
    @pytest.mark.parametrize(
        "variables", [[], ["-S", "folder=kept", "-S", "outfolder"]]
    )
    def test_a_copy_may_be_named_after_the_first_recipient(
        self, instance, option, variables
    ):
        home = instance.home("payam")
        for folder in (home / "kept", instance.root):
            folder.mkdir(exist_ok=True)
        instance.give(home / "kept", "payam")
        words = [*variables, "-S", f"record={home}/other", option, "-s", "x"]
        self.sent(instance, [*words, "user1@localhost", "user2"], "text\n")
        path = home / "kept/user1" if variables else instance.root / "user1"
        (copy,) = read_mbox(path.read_bytes())
        assert fields(copy, "To") == ["user1@localhost, user2"]
        assert path.stat().st_mode & 0o777 == 0o600
        assert not (home / "other").exists()

    @pytest.mark.parametrize(
        ("name", "place"),
        [("sent", "kept/sent"), ("+sent", "kept/sent"), ("~/sent", "sent")],
    )
    def test_outfolder_keeps_copies_below_folder(self, instance, name, place):
        home = instance.home("payam")
        (home / "kept").mkdir()
        instance.give(home / "kept", "payam")
        words = ["-S", "folder=kept", "-S", "outfolder", "-S", f"record={name}"]
        self.sent(instance, [*words, "-s", "x", "user1"], "text\n")
        (copy,) = read_mbox((home / place).read_bytes())
        assert fields(copy, "Subject") == ["x"]

    @pytest.fixture
    def program(self, instance):
        """Makes a program that keeps its arguments and input, and ends so."""

        def make(code):
            path = instance.write(
                "program",
                f"#!/bin/sh\nprintf '%s\\n' \"$@\" >'{instance.root}/args'\n"
                f"cat >'{instance.root}/input'\nexit {code}\n",
            )
            path.chmod(0o755)
            return path

        return make

    def test_another_program_may_send(self, instance, program):
        words = ["-S", f"sendmail={program(0)} -x 'a b'", "-s", "x", "-b", "user2"]
        words += ["-r", "B <b@example.com>", "-c", "user1+c", "user1"]
        result = instance.run("mail", *words, stdin=".\ntext\n", user="payam")
        assert (result.code, result.out, result.err) == (0, "", ""), result
        given = (instance.root / "args").read_text().splitlines()
        assert given[:6] == ["-x", "a b", "-i", "-f", "b@example.com", "--"]
        names = [name.partition("@")[0] for name in given[6:]]
        assert sorted(names) == ["user1", "user1+c", "user2"]
        text = (instance.root / "input").read_text()
        assert "user2" not in text
        assert fields(text, "Bcc") == []
        assert fields(text, "From") == ["B <b@example.com>"]
        assert fields(text, "Subject") == ["x"]
        assert text.endswith("\n\n.\ntext\n")
        assert nothing_sent(instance)

    def test_a_program_that_fails_keeps_the_letter(self, instance, program):
        for name, why in (
            (program(75), "exit code 75"),
            ("/nosuch/program", "/nosuch/program: No such file"),
        ):
            words = ["-S", f"sendmail={name}", "-s", "x", "-b", "user2", "user1"]
            result = instance.run("mail", *words, stdin="precious\n", user="payam")
            assert result.code == 75, result
            assert why in result.err
            kept = instance.home("payam") / "dead.letter"
            assert kept.read_text().endswith("\n\nprecious\n\n")
            kept.unlink()
        assert nothing_sent(instance)

    @pytest.mark.parametrize(
        ("words", "code"),
        [
            (["-c", "bad <x", "user1"], 65),
            (["nosuch"], 67),
            (["-S", "sendmail=/bin/false", "user1"], 75),
        ],
        ids=["a bad address", "nobody", "another program"],
    )
    def test_what_is_kept_has_its_blind_copies_too(self, instance, words, code):
        words = ["mail", "-s", "x", "-b", "nobody2", *words]
        result = instance.run(*words, stdin="precious\n", user="payam")
        assert result.code == code, result
        (kept,) = read_mbox((instance.home("payam") / "dead.letter").read_bytes())
        assert fields(kept, "Bcc") == ["nobody2"]

    def test_our_own_sendmail_may_be_that_program(self, server):
        token = new_token()
        words = ["-S", f"sendmail={server.bin}/sendmail", "-s", token]
        words += ["-r", "B <b@example.com>", "-b", "user2", "user1"]
        result = server.run("mail", *words, stdin="text\n", user="payam")
        assert (result.code, result.out, result.err) == (0, "", ""), result
        for name in ("user1", "user2"):
            message = server.wait_message(name, token)
            assert fields(message, "Return-Path") == ["<b@example.com>"]
            assert fields(message, "Bcc") == []
            assert head_and_body(message)[1] == "text\n\n"

    @pytest.mark.parametrize("field", ["To", "Cc", "From"])
    def test_a_name_in_a_comment_is_coded(self, instance, field):
        name = "user1@localhost (Jörg B.)"
        words = {"To": [name], "Cc": ["-c", name, "user2"]}
        words["From"] = ["-r", name, "user2"]
        lines, header = header_of(self.sent(instance, words[field], "text\n"))
        assert "\n".join(lines).isascii()
        shown, address = email.utils.parseaddr(header[field])
        assert (decoded(shown), address) == ("Jörg B.", "user1@localhost")

    def test_quotes_inside_a_name_are_coded_as_what_they_mean(self, instance):
        words = ['"Jörg \\"Joe\\" B." <user1@localhost>']
        _, header = header_of(self.sent(instance, words, "text\n"))
        shown, _ = email.utils.parseaddr(header["To"])
        assert decoded(shown) == 'Jörg "Joe" B.'

    @pytest.mark.parametrize(
        "name", ["User One <user1@localhost>", "<user1@localhost>", "user1 (One)"]
    )
    def test_such_a_copy_is_named_after_the_address(self, instance, name):
        before = set(os.listdir(instance.root))
        self.sent(instance, ["-F", "-s", "x", name], "text\n")
        new = set(os.listdir(instance.root)) - before - {"var"}
        assert new == {"user1"}


# Options of who reads, the exit code, what is shown, what is not, whether
# there is mail. {box} is a mailbox of two messages.
READER_ROWS = {
    "-e": (["-e"], 0, [], ["."], True),
    "-e, none": (["-e"], 1, [], ["."], False),
    "-e -f": (["-e", "-f", "{box}"], 0, [], ["."], False),
    "-e -f, none": (["-e", "-f", "nosuch"], 1, [], ["."], False),
    "-e -u": (["-e", "-u", "payam"], 0, [], ["."], True),
    "-H": (["-H"], 0, ["^>N  1 ", "^ N  2 "], ["messages"], True),
    "-H, none": (["-H"], 1, ["No mail for payam"], [" N "], False),
    "-N": (["-N"], 0, [], ["messages", "N  1"], True),
    "-f": (["-f"], 0, ['mbox": 2 messages'], [], True),
    "-f file": (["-f", "{box}"], 0, ['folder": 2 messages'], [], False),
    "-fN file": (["-fN", "{box}"], 0, [], ["messages"], False),
    "-f -N file": (["-f", "-N", "{box}"], 0, [], ["messages"], False),
    "-f missing": (
        ["-f", "nosuch"],
        1,
        ["nosuch: No such file or directory"],
        [],
        True,
    ),
    "-f directory": (["-f", "/"], 1, ["/"], ["Traceback"], True),
    "-f no mailbox": (["-f", "{text}"], 1, ["not a mailbox"], ["Traceback"], True),
    "-u": (["-u", "payam"], 0, ["2 messages 2 new"], [], True),
    "-u nobody": (
        ["-u", "nosuch"],
        1,
        ['"nosuch" is not a user of this sys'],
        [],
        True,
    ),
    "-R": (["-R"], 0, [r"\[Read only\]"], [], True),
    "no mail": ([], 1, ["No mail for payam"], ["messages"], False),
}


class TestMailboxes:
    """mail(1)'s options for who reads."""

    @pytest.fixture
    def place(self, instance):
        """An instance with a folder, an mbox and a text in payam's home."""
        for name in ("folder", "mbox"):
            path = instance.home("payam") / name
            path.write_text(mail("a") + mail("b"))
            instance.give(path, "payam")
        (instance.home("payam") / "text").write_text("no mail\n")
        return instance

    @pytest.mark.parametrize("row", READER_ROWS.values(), ids=READER_ROWS)
    def test_a_mailbox_is_chosen(self, place, row):
        words, code, wanted, unwanted, has_mail = row
        if has_mail:
            place.make_mailbox("payam", mail("a") + mail("b"))
        for name in ("folder", "text"):
            key = {"folder": "{box}", "text": "{text}"}[name]
            path = str(place.home("payam") / name)
            words = [word.replace(key, path) for word in words]
        result = place.run("mail", *words, stdin="x\n", user="payam")
        shown = result.out + result.err
        assert result.code == code, result
        assert [one for one in wanted if not re.search(one, shown, re.M)] == [], shown
        assert [one for one in unwanted if re.search(one, shown, re.M)] == [], shown

    def test_r_writes_nothing(self, place):
        box = place.make_mailbox("payam", mail("a") + mail("b"))
        before = box.read_bytes()
        result = place.run("mail", "-R", stdin="p 1\nd 2\nq\n", user="payam")
        assert (result.code, box.read_bytes()) == (0, before)

    def test_mail_names_the_mailbox(self, place):
        path = place.home("payam") / "folder"
        result = place.run("mail", stdin="x\n", user="payam", env={"MAIL": path})
        assert f'"{path}": 2 messages' in result.out

    @pytest.mark.parametrize(
        "typed", ["d *", "d*\nq", "1", "p 1\nd 2", "quux\nd 99\nq", "q"]
    )
    def test_a_script_ends_well(self, place, typed):
        place.make_mailbox("payam", mail("a") + mail("b"))
        result = place.run("mail", "-N", stdin=f"{typed}\n", user="payam")
        assert (result.code, result.err) == (0, "")

    def test_a_letter_in_a_script_is_the_rest_of_it(self, place):
        place.make_mailbox("payam", mail("a"))
        typed = "m user1\ntext\n~s x\nx\n"
        result = place.run("mail", "-N", stdin=typed, user="payam")
        assert result.code == 0
        assert head_and_body(letter_sent(place))[1] == "text\n~s x\nx\n\n"


# Files of the start -> what mail -N then says to `set` or `alias`.
START_ROWS = {
    "the system's": ({"etc/mail.rc": "set one=1"}, [], {}, "set", ['one="1"'], []),
    "the person's": ({".mailrc": "set one=1"}, [], {}, "set", ['one="1"'], []),
    "-n leaves the system's out": (
        {"etc/mail.rc": "set one=1", ".mailrc": "set two=2"},
        ["-n"],
        {},
        "set",
        ['two="2"'],
        ["one"],
    ),
    "the person's comes last": (
        {"etc/mail.rc": "set one=1", ".mailrc": "set one=2"},
        [],
        {},
        "set",
        ['one="2"'],
        ['one="1"'],
    ),
    "MAILRC is instead": (
        {".mailrc": "set one=1", "other": "set two=2"},
        [],
        {"MAILRC": "{home}/other"},
        "set",
        ['two="2"'],
        ["one"],
    ),
    "MAILRC may be empty": (
        {".mailrc": "set one=1"},
        [],
        {"MAILRC": "/dev/null"},
        "set",
        [],
        ["one"],
    ),
    "-S wins": ({".mailrc": "set one=1"}, ["-S", "one=3"], {}, "set", ['one="3"'], []),
    "a file wins over the environment": (
        {".mailrc": "set PAGER=x"},
        [],
        {"PAGER": "y"},
        "set",
        ['PAGER="x"'],
        [],
    ),
    "the environment": (
        {},
        [],
        {"PAGER": "y", "ODD": "z"},
        "set",
        ['PAGER="y"'],
        ["ODD"],
    ),
    "aliases": ({".mailrc": "alias us a b"}, [], {}, "alias us", ["us\ta b"], []),
    "if reading": (
        {".mailrc": "if r\nset one=1\nelse\nset two=2\nendif\nset three=3"},
        [],
        {},
        "set",
        ['one="1"', 'three="3"'],
        ["two"],
    ),
    "if sending": ({".mailrc": "if s\nset one=1\nendif"}, [], {}, "set", [], ["one"]),
    "empty lines and remarks": (
        {".mailrc": "\n# set two=2\n\nset one=1\n"},
        [],
        {},
        "set",
        ['one="1"'],
        ["two"],
    ),
    "a long line": (
        {".mailrc": "set one=1 \\\n two=2"},
        [],
        {},
        "set",
        ['two="2"'],
        [],
    ),
    "unknown variables": (
        {".mailrc": "set smtp=x ssl-verify=ignore nss-config-dir=/x\nset one=1"},
        [],
        {},
        "set",
        ['one="1"'],
        ["nknown"],
    ),
}


class TestMailStart:
    """The start-up files of mail(1)."""

    @pytest.mark.parametrize("row", START_ROWS.values(), ids=START_ROWS)
    def test_start_up_files_are_obeyed(self, instance, row):
        files, words, env, command, wanted, unwanted = row
        instance.make_mailbox("payam", mail("a"))
        home = instance.home("payam")
        for name, text in files.items():
            path = instance.root / name if "/" in name else home / name
            path.write_text(f"{text}\n")
        env = {name: value.replace("{home}", str(home)) for name, value in env.items()}
        typed = f"{command}\nx\n"
        result = instance.run("mail", "-N", *words, stdin=typed, user="payam", env=env)
        lines = (result.out + result.err).split("\n")
        assert [one for one in wanted if one not in lines] == [], lines
        assert [one for one in unwanted if any(one in line for line in lines)] == []

    @pytest.mark.parametrize(
        "line", ["edit", "hold", "mail user1", "reply", "Reply", "visual", "!touch ran"]
    )
    def test_some_commands_are_not_for_start_up_files(self, instance, line):
        box = instance.make_mailbox("payam", mail("a"))
        (instance.home("payam") / ".mailrc").write_text(f"{line}\nset one=1\n")
        result = instance.run("mail", "-N", stdin="q\n", user="payam")
        assert result.code == 0
        assert result.out + result.err != ""
        assert nothing_sent(instance)
        assert not (instance.root / "ran").exists()
        assert box.read_text() == mail("a", status="O")

    def test_aliases_of_start_up_files_are_for_letters(self, instance):
        (instance.home("payam") / ".mailrc").write_text("alias us user1 user2\n")
        instance.run("mail", "-s", "x", "us", stdin="text\n", user="payam")
        instance.run("sendmail", "-q", user="root")
        for user in ("user1", "user2"):
            assert len(instance.messages(user)) == 1

    @pytest.fixture
    def wrong(self, instance):
        """An instance where start-up files have errors in their midst."""
        instance.make_mailbox("payam", mail("a"))
        instance.write("etc/mail.rc", "set one=1\nnosuch x\nset two=2\n")
        rc = instance.home("payam") / ".mailrc"
        rc.write_text("set three=3\nunset four\nset five=5\n")
        return instance

    def test_an_error_ends_its_start_up_file_and_is_told(self, wrong):
        result = wrong.run("mail", "-N", stdin="set\nx\n", user="payam")
        assert result.code == 0
        lines = result.out.splitlines()
        assert [one for one in lines if one.split("=")[0] in ("one", "three")] == [
            'one="1"',
            'three="3"',
        ]
        assert not {'two="2"', 'five="5"'} & set(lines)
        first, second = result.err.splitlines()
        assert "nosuch" in first
        assert "four" in second

    @pytest.mark.parametrize("words", [["-e"], ["-H"], ["-s", "x", "user1"]])
    def test_such_an_error_is_no_output(self, wrong, words):
        clean = wrong.run(
            *("mail", "-n", *words), user="payam", env={"MAILRC": "/dev/null"}
        )
        result = wrong.run("mail", *words, user="payam")
        assert (result.code, result.out) == (clean.code, clean.out)
        assert len(result.err.splitlines()) == 2 + len(clean.err.splitlines())


# What is typed, what is shown (in this order), what is not. Five messages,
# s1 to s5: two read, one old, two new; {top} is a directory.
SHOWN_ROWS = {
    "no command": (["frobnicate"], ['Unknown command: "frobnicate"\n'], []),
    "d *": (["d*", "p 1"], ["1: Inappropriate message\n"], ["text"]),
    "p list": (["p 1-2"], ["Message  1:\n", "Message  2:\n"], ["Message  3"]),
    "p$": (["p$"], ["Message  5:\n"], ["Message  4"]),
    "a bare list prints one": (["2-3"], ["Message  2:\n"], ["Message  3"]),
    "t": (["t 1"], ["Message  1:\n"], []),
    "type": (["type 1"], ["Message  1:\n"], []),
    "more": (["more 1"], ["Message  1:\n"], []),
    "page": (["page 1"], ["Message  1:\n"], []),
    "Print": (["ignore subject", "P 1"], ["Subject: s1"], []),
    "Type": (["ignore subject", "T 1"], ["Subject: s1"], []),
    "ignore": (["ignore subject", "p 1"], ["Message  1:\n"], ["Subject"]),
    "discard": (["discard Subject", "p 1"], ["Message  1:\n"], ["Subject"]),
    "retain": (["ignore subject", "retain subject", "p 1"], ["Subject: s1"], []),
    "retain alone": (["retain x", "p 1"], ["Message  1:\n"], ["Subject"]),
    "retained": (["retain x", "retain"], ["x"], []),
    "h": (["h"], ["    1 ", " U  3 ", ">N  4 ", " N  5 "], []),
    "h leaves d out": (["d 1", "h"], [">   2 "], ["    1 "]),
    "f": (["f 2-3"], ["    2 ", " U  3 "], ["  4 "]),
    "from": (["from $"], ["  5 "], ["  4 "]),
    "f moves the dot": (["f 2 3", "="], ["3\n"], []),
    "h moves none": (["h", "="], ["4\n"], []),
    "=": (["="], ["4\n"], []),
    "size": (["size 1"], ["1: 6/"], []),
    "si": (["si 1-2"], ["1: 6/", "2: 6/"], []),
    "top": (["top 1"], ["Message  1:\nFrom eve@far.example", "s1"], []),
    "to": (["to 1"], ["Message  1:\n"], []),
    "toplines": (["set toplines=1", "top 1"], ["Subject: s1"], ["Status"]),
    "show": (["show 1"], ["From eve@far.example", "Subject: s1\nStatus: RO\n"], []),
    "version": (["version"], ["minimta"], []),
    "l": (["l"], ["Commands are:\n", "delete", "undelete"], []),
    "list": (["list"], ["Commands are:\n"], []),
    "?": (["?"], ["delete", "quit"], []),
    "help": (["help"], ["delete", "quit"], []),
    "hel": (["hel"], ["delete", "quit"], []),
    "? of one": (["? delete"], ["delete"], ["undelete"]),
    "echo": (["echo a 'b  c'"], ["a b  c\n"], []),
    "ec": (["ec one"], ["one\n"], []),
    "a remark": (["# p 1"], [], ["Message", "Unknown"]),
    "set": (["set one=1", "set"], ['one="1"\n'], []),
    "se": (["se one=1", "se"], ['one="1"\n'], []),
    "set no": (["set one", "set noone", "set"], ["append"], ["one\n"]),
    "unset": (["set one", "unset one", "set"], ["append"], ["one\n"]),
    "unset of none": (["unset one"], ['"one": undefined variable\n'], []),
    "alias": (["alias us a b", "alias us"], ["us\ta b\n"], []),
    "group": (["g us a", "group us b", "a"], ["us\ta b\n"], []),
    "unalias": (["a us a", "una us", "a us"], ["us"], ["us\ta"]),
    "alternates": (["alt one two", "alternates"], ["one two\n"], []),
    "folders of none": (["folders"], ['No value set for "folder"\n'], []),
    "folders": (["set folder={top}", "folders"], ["box\n"], []),
    "cd": (["cd {top}", "!test -e box && echo here >seen", "ec x"], ["!\n", "x"], []),
    "chdir of none": (["chdir /nosuch"], [], []),
    "dp": (["dp 1"], ["Message  2:\n"], ["At EOF"]),
    "dt": (["dt 1"], ["Message  2:\n"], []),
    "dp at the end": (["dp 5"], ["At EOF\n"], ["Message"]),
    "autoprint": (["set autoprint", "d 1"], ["Message  2:\n"], []),
    "n at the end": (["5", "n"], ["At EOF\n"], []),
    "n of a list": (["n 2"], ["Message  2:\n"], []),
    "n with text": (["/s3"], ["Message  3:\n"], []),
    "Enter behind d": (["d 2", ""], ["Message  3:\n"], []),
    "+": (["1", "+"], ["Message  1", "Message  2:\n"], []),
    "+2": (["1", "+2"], ["Message  3:\n"], ["Message  2"]),
    "-": (["3", "-"], ["Message  3", "Message  2:\n"], []),
    "-2": (["3", "-2"], ["Message  1:\n"], ["Message  2"]),
    "+ too far": (["5", "+"], ["Referencing beyond EOF\n"], []),
    "- too far": (["1", "-"], ["Referencing before 1\n"], []),
    "pipe without a command": (["|"], ["variable cmd not set\n"], []),
    "pi": (["pi 1 'cat >{top}/piped'"], [], ["Unknown"]),
    "if": (["if s", "echo one", "else", "echo two", "endif"], ["two\n"], ["one"]),
    "if r": (["i r", "echo one", "el", "echo two", "en"], ["one\n"], ["two"]),
    "source": (["source {top}/rc"], ["from a file\n"], []),
    "so": (["so {top}/rc"], ["from a file\n"], []),
    "source of none": (["source {top}/nosuch", "="], ["4\n"], []),
    "s without a list": (["s {top}/out"], ['out" [New file] 5/'], []),
    "s twice": (["s 1 {top}/out", "s 2 {top}/out"], ["[New file]", "[Appended]"], []),
    "w without a file": (["w"], ["No file specified\n"], []),
    "m without a name": (["m"], ["recipient"], []),
    "z at the end": (["z"], ["On last screenful of messages\n"], []),
    "z- at the start": (["z-"], ["On first screenful of messages\n"], []),
    "file": (["file"], ['box": 5 messages 2 new 3 unread\n'], []),
    "fi": (["d 1", "s 2 {top}/out", "fi"], [" 1 deleted 1 saved\n"], []),
    "folder of none": (["folder {top}/nosuch", "="], ["4\n"], []),
    "folder": (["folder {top}/other"], ['other": 1 message 1 new\n'], []),
    "folder and back": (
        ["folder {top}/other", "file #", "="],
        ['box": 5 messages'],
        [],
    ),
    "fold %": (["folder {top}/other", "fold %"], ['box": 5 messages'], []),
    "folder +": (["set folder={top}", "fi +other"], ["1 message 1 new\n"], []),
    "folder &": (["set MBOX={top}/other", "fi &"], ['other": 1 message'], []),
    "inc of none": (["inc"], ["new mail"], []),
    "flags": (["flag 1", "h", "p :f"], ["F  1 ", "Message  1:\n"], []),
    "unread": (["p 1", "unread 1", "f 1"], ["U  1 "], []),
    "U": (["p 1", "U 1", "f 1"], ["U  1 "], []),
    "new": (["p 1", "new 1", "f 1"], ["U  1 "], []),
    "held": (["pre 1", "f 1"], ["H  1 "], []),
    "mboxed": (["mbox 1", "f 1"], ["M  1 "], []),
    "saved": (["s 1 {top}/out", "f 1"], ["*  1 "], []),
    "a list that is nothing": (["p :d"], ["No messages satisfy :d\n"], ["Message"]),
    "nobody": (["p carol"], ["No applicable messages from {carol}\n"], []),
    "a wrong number": (["p 99"], ["99: Invalid message number\n"], []),
    "a quoted word": (["set 'one=a b'", "set"], ['one="a b"\n'], []),
}


class TestMailCommands:
    """The commands of mail(1)."""

    @pytest.mark.parametrize("row", SHOWN_ROWS.values(), ids=SHOWN_ROWS)
    def test_a_command_shows(self, session, tmp_path, monkeypatch, row):
        monkeypatch.chdir(tmp_path)
        lines, wanted, unwanted = row
        (tmp_path / "rc").write_text("echo from a file\n")
        (tmp_path / "other").write_text(mail("other"))
        reader = session()
        for line in lines:
            reader.obey(line.replace("{top}", str(tmp_path)))
        shown, place = reader.terminal.shown, 0
        for text in wanted:
            assert text in shown[place:], shown
            place = shown.index(text, place) + len(text)
        assert [text for text in unwanted if text in shown] == [], shown

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            *[("a", "alias"), ("g", "alias"), ("alt", "alternates"), ("cd", "cd")],
            *[("ch", "cd"), ("c", "copy"), ("C", "Copy"), ("d", "delete")],
            *[("di", "discard"), ("ig", "discard"), ("ret", "retain"), ("dp", "dp")],
            *[("dt", "dp"), ("ec", "echo"), ("e", "edit"), ("v", "visual")],
            *[("ex", "exit"), ("x", "exit"), ("fi", "file"), ("fold", "file")],
            *[("folders", "folders"), ("f", "from"), ("h", "headers")],
            *[("hel", "help"), ("?", "help"), ("ho", "hold"), ("pre", "hold")],
            *[("i", "if"), ("el", "else"), ("en", "endif"), ("l", "list")],
            *[("m", "mail"), ("mb", "mbox"), ("n", "next"), ("pi", "pipe")],
            *[("|", "pipe"), ("P", "Print"), ("T", "Print"), ("p", "print")],
            *[("t", "print"), ("q", "quit"), ("r", "reply"), ("R", "Reply")],
            *[("s", "save"), ("S", "Save"), ("se", "set"), ("uns", "unset")],
            *[("sh", "shell"), ("si", "size"), ("so", "source"), ("to", "top")],
            *[("tou", "touch"), ("una", "unalias"), ("u", "undelete")],
            *[("w", "write"), ("z", "z"), ("=", "="), ("#", "#"), ("!", "shell")],
            *[],
            *[],
            *[("fwd", "forward"), ("redirect", "resend"), ("inc", "inc")],
            *[("newmail", "inc"), ("unread", "unread"), ("new", "unread")],
            *[("More", "Print"), ("Page", "Print"), ("more", "print")],
        ],
    )
    def test_posixs_abbreviations_are_known(self, session, name, wanted):
        reader = session()
        assert reader.find_command(name) is reader.find_command(wanted) is not None

    def test_a_copy_is_read_and_stays(self, session, tmp_path):
        reader = session(f"c 4 {tmp_path}/out", "q")
        minimta.run_session(reader)
        assert (tmp_path / "out").read_text() == mail("s4")
        assert mail("s4", status="RO") in (tmp_path / "box").read_text()

    def test_saved_mail_is_for_its_owner_alone(self, session, tmp_path):
        for command in ("s", "c"):
            session().obey(f"{command} 1 {tmp_path}/{command}")
            assert (tmp_path / command).stat().st_mode & 0o777 == 0o600

    def test_save_names_the_file_after_the_author(self, session, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        reader = session()
        reader.obey("S 1")
        reader.obey("C 2")
        assert (tmp_path / "eve").read_text() == mail("s1", status="RO") + mail(
            "s2", status="RO"
        )
        assert reader.messages[0].state == "saved"
        assert reader.messages[1].state == ""

    def test_pipe_gives_the_message_as_it_is(self, session, tmp_path):
        session().obey(f"pipe 4 'cat >{tmp_path}/piped'")
        assert (tmp_path / "piped").read_text() == mail("s4")

    def test_pipe_uses_cmd(self, session, tmp_path):
        reader = session()
        reader.variables.set(f"cmd=cat >{tmp_path}/piped")
        reader.obey("|")
        assert (tmp_path / "piped").read_text() == mail("s4")

    def test_an_editor_changes_no_mailbox(self, session, tmp_path):
        reader = session("q")
        reader.variables.set("EDITOR=echo changed >>")
        reader.obey("e 1")
        minimta.run_session(reader)
        assert mail("s1", status="RO") in (tmp_path / "box").read_text()
        assert "changed" not in (tmp_path / "box").read_text()

    def test_printing_alone_marks_as_read(self, session):
        reader = session()
        for line in ("f 4", "h 4", "size 4", "=", "parts 4"):
            reader.obey(line)
        assert reader.messages[3].is_new and reader.messages[3].is_unread
        reader.obey("p 4")
        assert not reader.messages[3].is_unread

    def test_another_folder_is_settled_first(self, session, tmp_path):
        (tmp_path / "other").write_text(mail("other"))
        reader = session()
        reader.obey("d 1-4")
        reader.obey(f"folder {tmp_path}/nosuch")
        assert "s1" in (tmp_path / "box").read_text()
        reader.obey(f"folder {tmp_path}/other")
        assert (tmp_path / "box").read_text() == mail("s5", status="O")

    def test_a_file_name_is_no_shell_line(self, session, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for line in ("folder $(touch ran)", "folder `touch ran`", "s 1 ';touch ran'"):
            session().obey(line)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("word", ["move", "s", "sav"])
    def test_what_is_moved_leaves(self, session, tmp_path, word):
        reader = session(f"{word} 4 {tmp_path}/out", "q")
        minimta.run_session(reader)
        assert (tmp_path / "out").read_text() == mail("s4")
        assert "s4" not in (tmp_path / "box").read_text()

    @pytest.mark.parametrize(
        ("lines", "wanted"),
        [
            (["set bang", "!echo a", "!!"], "a\na\n"),
            (["set bang", "!echo a", "!! b", "!!"], "a\na b\na b\n"),
            (["set bang", "!echo a", "!echo '\\!'"], "a\n!\n"),
            (["set bang", "!echo a", "!echo b; !"], "a\nb\na\n"),
            (["!echo a", "!echo '!'"], "a\n!\n"),
            (["set bang", "!!"], ""),
        ],
    )
    def test_bang_stands_for_the_command_before(
        self, session, tmp_path, monkeypatch, lines, wanted
    ):
        shell = tmp_path / "sh"
        shell.write_text(f'#!/bin/sh\nexec >>{tmp_path}/said\nexec /bin/sh "$@"\n')
        shell.chmod(0o755)
        (tmp_path / "said").write_text("")
        monkeypatch.setenv("SHELL", str(shell))
        monkeypatch.setattr(minimta, "SHELL", str(shell))
        reader = session()
        for line in lines:
            reader.obey(line)
        assert (tmp_path / "said").read_text() == wanted

    def test_with_allnet_a_name_is_one_on_every_host(self, session):
        texts = [
            mail(name).replace("\nSubject", f"\nFrom: {name}\nSubject")
            for name in ("eve@x.example", "Eve@y.example", "bob@x.example")
        ]
        reader = session(texts=texts)
        with pytest.raises(ValueError, match="No applicable"):
            reader.numbers("eve@z.example")
        reader.obey("set allnet")
        assert reader.numbers("eve@z.example") == [1, 2]
        assert reader.numbers("bob") == [3]


FIFTY = [
    mail(f"n{n}", status="RO" if n < 20 else "O" if n < 30 else "")
    for n in range(1, 51)
]
# What is typed -> the numbers that are shown, and the current one. The screen
# has 20 rows for them.
PAGE_ROWS = [
    (["h"], (21, 40), 30),
    (["z"], (41, 50), 41),
    (["z", "z"], (41, 50), 41),
    (["z-"], (1, 20), 1),
    (["z-", "z-"], (1, 20), 1),
    (["h 45"], (41, 50), 41),
    (["h 1"], (1, 20), 1),
    (["z 0"], (1, 20), 1),
    (["z $"], (41, 50), 41),
    (["z-", "z+2"], (41, 50), 41),
    (["z+"], (41, 50), 41),
]


class TestMailPages:
    """Fifty messages on a screen of twenty."""

    @pytest.mark.parametrize(("lines", "ends", "dot"), PAGE_ROWS)
    def test_a_screen_is_shown(self, session, lines, ends, dot):
        reader = session(texts=FIFTY)
        for line in lines:
            reader.terminal.shown = ""
            reader.obey(line)
        numbers = re.findall(r"(?m)^[> ]. +(\d+) ", reader.terminal.shown)
        first, last = ends
        assert list(map(int, numbers)) == list(range(first, last + 1))
        assert reader.dot == dot

    def test_screen_says_how_many(self, session):
        reader = session(texts=FIFTY)
        reader.obey("set screen=7")
        reader.obey("h 1")
        assert reader.terminal.shown.count("\n") == 7


ATTACHED = (
    "From eve@far.example  Wed Feb 19 05:10:01 2025\nSubject: s\n"
    'Content-Type: multipart/mixed; boundary="b"\n\n'
    "--b\nContent-Type: text/plain\n\nown text\n"
    "--b\nContent-Type: text/csv\nContent-Transfer-Encoding: base64\n"
    "Content-Disposition: attachment; filename=%s\n\nYQ0KYg0K\n--b--\n\n"
)


class TestMailParts:
    """What is attached."""

    @pytest.fixture
    def attached(self, session, tmp_path, monkeypatch):
        """Makes a session on a message with an attachment of that name."""
        monkeypatch.chdir(tmp_path)
        return lambda name: session(texts=[ATTACHED % name])

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("a.csv", "a.csv"),
            ('"../../up.csv"', "up.csv"),
            ('"/etc/up.csv"', "up.csv"),
            ('".hidden"', "hidden"),
            ('"a\x1bb.csv"', "a␛b.csv"),
            ('"..\\\\up.csv"', "up.csv"),
        ],
    )
    def test_a_part_goes_to_no_other_place(self, attached, tmp_path, name, wanted):
        attached(name).obey("w 1 text")
        names = set(os.listdir(tmp_path))
        assert names == {"box", "text", wanted} or "\x1b" in name
        assert (tmp_path / "text").read_text().strip() == "own text"
        (part,) = names - {"box", "text"}
        assert (tmp_path / part).read_bytes() == b"a\r\nb\r\n"
        assert not any(char < " " for char in part)

    def test_write_spoils_no_file(self, attached, tmp_path):
        (tmp_path / "a.csv").write_text("precious")
        attached("a.csv").obey("w 1 text")
        assert (tmp_path / "a.csv").read_text() == "precious"

    def test_one_part_may_be_written(self, attached, tmp_path):
        attached("a.csv").obey("w 1.2 other")
        assert (tmp_path / "other").read_bytes() == b"a\r\nb\r\n"

    def test_parts_are_listed(self, attached):
        reader = attached("a.csv")
        reader.obey("parts 1")
        assert "1.1 text/plain" in reader.terminal.shown
        assert "1.2 text/csv a.csv" in reader.terminal.shown

    def test_a_written_message_is_read_and_not_saved(self, attached, tmp_path):
        reader = attached("a.csv")
        reader.obey("w 1 text")
        assert (reader.messages[0].state, reader.messages[0].was_read) == ("", True)


# A header of what is answered, the command, what is set before -> To and Cc.
ANSWER_ROWS = {
    "r": ("From: a@x\nTo: bob, c@x\nCc: d@x\n", [], "r", ("a@x, c@x", "d@x")),
    "reply all": ("From: a@x\nTo: bob, c@x\n", [], "reply all", ("a@x, c@x", "")),
    "R": ("From: a@x\nTo: bob, c@x\nCc: d@x\n", [], "R", ("a@x", "")),
    "Reply-To": ("From: a@x\nReply-To: l@x\nTo: bob\n", [], "r", ("l@x", "")),
    "own host": ("From: a@x\nTo: bob@host.example\n", [], "r", ("a@x", "")),
    "localhost": ("From: a@x\nTo: bob@localhost\n", [], "r", ("a@x", "")),
    "metoo": (
        "From: a@x\nTo: bob@host.example\n",
        ["set metoo"],
        "r",
        ("a@x, bob@host.example", ""),
    ),
    "alternates": ("From: a@x\nTo: me@y, C@x\n", ["alt ME@Y"], "r", ("a@x, C@x", "")),
    "flipr": ("From: a@x\nTo: bob, c@x\n", ["set flipr"], "r", ("a@x", "")),
    "flipr R": ("From: a@x\nTo: bob, c@x\n", ["set flipr"], "R", ("a@x, c@x", "")),
    "Replyall": ("From: a@x\nTo: bob, c@x\n", ["set Replyall"], "r", ("a@x", "")),
    "elsewhere": ("From: a@x\nTo: bob@y\n", [], "r", ("a@x, bob@y", "")),
    "allnet": ("From: a@x\nTo: bob@y, c@x\n", ["set allnet"], "r", ("a@x, c@x", "")),
    "allnet and alternates": (
        "From: a@x\nTo: me@y, c@x\n",
        ["set allnet", "alt me@z"],
        "r",
        ("a@x, c@x", ""),
    ),
}


class TestMailAnswers:
    """Replies."""

    @pytest.fixture
    def sheets(self, monkeypatch):
        """The letters that were written, instead of sent."""
        written = []
        monkeypatch.setattr(
            minimta.Composer, "send", lambda _, one: written.append(one)
        )
        return written

    @pytest.mark.parametrize("row", ANSWER_ROWS.values(), ids=ANSWER_ROWS)
    def test_an_answer_is_for_whom_it_should(self, session, sheets, row):
        header, before, command, wanted = row
        text = f"From eve@far.example  Wed Feb 19 05:10:01 2025\n{header}\ntext\n\n"
        reader = session(texts=[text])
        for line in before:
            reader.obey(line)
        reader.obey(f"{command} 1")
        (sheet,) = sheets
        assert tuple(", ".join(sheet.people[n]) for n in ("To", "Cc")) == wanted

    def test_senders_of_all_messages_get_it(self, session, sheets):
        head = "From eve@far.example  Wed Feb 19 05:10:01 2025\nFrom: "
        reader = session("text", texts=[f"{head}{name}@x\n\nt\n\n" for name in "ab"])
        reader.obey("R *")
        assert sheets[0].people["To"] == ["a@x", "b@x"]

    def test_a_letter_that_is_answered_is_marked(self, session, sheets):
        reader = session("text")
        reader.obey("r 4")
        assert reader.messages[3].flags == "A"
        reader.obey("set nomarkanswered")
        reader.obey("r 5")
        assert reader.messages[4].flags == ""

    def test_an_answer_quotes_where_a_person_types(self, session, sheets):
        text = mail("s", "one", "two").replace("\nSub", "\nFrom: A <a@x>\nSub")
        reader = session(texts=[text])
        reader.terminal.is_interactive = True
        reader.obey("r 1")
        assert sheets[0].text == b"A <a@x> wrote:\n\n> one\n> two\n\n"

    def test_indentprefix_stands_before_quotes(self, session, sheets):
        reader = session()
        reader.terminal.is_interactive = True
        reader.obey("set indentprefix='| '")
        reader.obey("r 1")
        assert b"\n| text\n" in sheets[0].text
        reader.obey("set noquote")
        reader.obey("r 2")
        assert sheets[1].text == b""

    def test_an_alias_is_not_for_answers(self, session, sheets):
        text = mail("s").replace("\nSub", "\nFrom: us\nSub")
        reader = session("text", texts=[text])
        reader.obey("alias us a@x b@x")
        reader.obey("r 1")
        assert sheets[0].people["To"] in (["us"], ["us@host.example"])

    @pytest.mark.parametrize(
        ("command", "name", "to"),
        [
            ("followup", "user1", "user1@localhost, user2@localhost"),
            ("fo", "user1", "user1@localhost, user2@localhost"),
            ("Followup", "user1", "user1@localhost"),
            ("F", "user1", "user1@localhost"),
            ("reply", "sent", "user1@localhost, user2@localhost"),
            ("Reply", "sent", "user1@localhost"),
        ],
    )
    @pytest.mark.parametrize("has_folder", [True, False])
    def test_a_followup_is_kept_under_the_authors_name(
        self, instance, command, name, to, has_folder
    ):
        head = "\nFrom: A <user1@localhost>\nTo: payam, user2@localhost\nSubject"
        instance.make_mailbox("payam", mail("s").replace("\nSubject", head))
        home = instance.home("payam")
        place = home / "kept" if has_folder else home
        place.mkdir(exist_ok=True)
        instance.give(place, "payam")
        rc = "set record=sent\n" + "set folder=kept outfolder\n" * has_folder
        (home / ".mailrc").write_text(rc)
        result = instance.run(
            "mail", "-N", stdin=f"cd\n{command} 1\nanswer\n", user="payam"
        )
        assert (result.code, result.err) == (0, ""), result
        (copy,) = read_mbox((place / name).read_bytes())
        assert fields(copy, "To") == [to]
        assert head_and_body(copy)[1] == "answer\n\n"
        assert not (place / ("sent" if name != "sent" else "user1")).exists()
        assert fields(letter_sent(instance), "Subject") == ["Re: s"]


HOSTILE_MAIL = {
    "a title": "\x1b]0;title\x07",
    "a clear screen": "\x1b[2J",
    "a backspace": "a\x08b",
    "a carriage return": "a\rb",
    "a C1 control": "a\x9b2Jb",
    "DEL": "a\x7fb",
    "right to left": "a\u202eb\u2066c",
}


class TestMailIsSafe:
    """Nothing in a message does something to the terminal."""

    @pytest.mark.parametrize("text", HOSTILE_MAIL.values(), ids=HOSTILE_MAIL)
    def test_no_control_gets_through(self, session, text):
        head = "From eve@far.example  Wed Feb 19 05:10:01 2025\n"
        word = base64.b64encode(text.encode()).decode()
        encoded = f"Subject: =?utf-8?B?{word}?=\nFrom: =?utf-8?B?{word}?= <a@x>\n"
        plain = f"Subject: {text}\nFrom: {text} <a@x>\n".replace("\r", "")
        kind = 'Content-Type: multipart/mixed; boundary="b"\n\n--b\n\nx\n--b\n'
        name = text.replace("\r", "").replace("\x1b", "")
        part = (
            f'Content-Disposition: attachment; filename="{name}"\n\n{text}\n--b--\n\n'
        )
        reader = session(
            texts=[
                f"{head}{encoded}\n{text}\n\n",
                f"{head}{plain}\n{text}\n\n",
                f"{head}{encoded}{kind}{part}",
            ]
        )
        for line in ("h", "p *", "P *", "top *", "show *", "parts *", "f *"):
            reader.obey(line)
        shown = set(reader.terminal.shown) - set("\n\t")
        assert not {c for c in shown if c < " " or "\x7f" <= c < "\xa0"}
        assert not shown & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

    def test_what_persian_needs_stays(self, session):
        head = "From eve@far.example  Wed Feb 19 05:10:01 2025\n"
        reader = session(texts=[f"{head}Subject: می\u200cخواهم\n\nمی\u200cخواهم\n\n"])
        reader.obey("p 1")
        assert reader.terminal.shown.count("می\u200cخواهم") == 2


# What is typed -> what is then shown, and what is in the letter.
TYPED_ESCAPES = {
    "~s": ("~s other", None, "Subject: other\n"),
    "~t": ("~t user2", None, "To: user1, user2\n"),
    "~c": ("~c user2", None, "Cc: user2\n"),
    "~b": ("~b user2", None, "To: user1\n"),
    "~~": ("~~text", None, "\n~text\n"),
    "~r": ("~r {home}/file", '"{home}/file" 1/5\n', "\ndata\n"),
    "~<": ("~< {home}/file", '"{home}/file" 1/5\n', "\ndata\n"),
    "~r !": ("~r !echo out", "1/4\n", "\nout\n"),
    "~<!": ("~<!echo out", "1/4\n", "\nout\n"),
    "~r of none": ("~r {home}/nosuch", "No such file or directory\n", "\nline\n"),
    "~w": ("~w {home}/out", '"{home}/out" 1/5\n', "\nline\n"),
    "~!": ("~!echo a-word", "a-word\n!\n", "\nline\n"),
    "~|": ("~|tr a-z A-Z", "(continue)\n", "\nLINE\n"),
    "~| that fails": ("~|echo x; false", "failed", "\nline\n"),
    "~| that says nothing": ("~|true", "(continue)\n", "\nline\n"),
    "~e": ("~e", "(continue)\n", "\nline\nedited\n"),
    "~v": ("~v", "(continue)\n", "\nline\nedited\n"),
    "~p": (
        "~p",
        "-------\nMessage contains:\nTo: user1\nSubject: x\n\nline\n(c",
        "\nline\n",
    ),
    "~d": ("~d", "1/5\n", "\nline\ndead\n"),
    "~@": ("~@ {home}/file", None, "\nZGF0YQo=\n"),
    "~i": ("~i own", "own value\n", "\nown value\n"),
    "~a": ("~a", "a sign\n", "\na sign\n"),
    "~A": ("~A", "a Sign\n", "\na Sign\n"),
    "~zz": ("~zz", "Unknown tilde escape.\n", "\nline\n"),
    "~m": ("~m", "", "\nline\n"),
}


class TestMailTyping:
    """A letter that is typed at a terminal."""

    @pytest.fixture
    def home(self, instance):
        """The home of who types."""
        home = instance.home("payam")
        (home / "file").write_text("data\n")
        (home / "dead.letter").write_text("dead\n")
        editor = home / "editor"
        editor.write_text('#!/bin/sh\necho edited >>"$1"\n')
        editor.chmod(0o755)
        (home / ".mailrc").write_text(
            f"set own='own value' sign='a sign' Sign='a Sign'\n"
            f"set EDITOR={editor} VISUAL={editor}\n"
        )
        return home

    def letter(self, instance):
        """The one letter in the queue."""
        return letter_sent(instance)

    @pytest.mark.parametrize("row", TYPED_ESCAPES.values(), ids=TYPED_ESCAPES)
    def test_an_escape_does_its_work(self, instance, home, row):
        typed, shown, wanted = row
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type("line\n")
        person.expect("line\n")
        typed = typed.replace("{home}", str(home))
        person.type(f"{typed}\n")
        person.expect(f"{typed}\n")
        if shown:
            person.expect(shown.replace("{home}", str(home)))
        person.type("~.\n")
        person.expect("EOT\n")
        assert person.close() == 0
        assert wanted in self.letter(instance)

    def test_tilde_w_appends(self, instance, home):
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type(f"line\n~w {home}/file\n~.\n")
        person.expect("EOT\n")
        assert person.close() == 0
        assert (home / "file").read_text() == "data\nline\n"

    def test_tilde_h_asks_for_the_header(self, instance, home):
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type("~h\n")
        person.expect("To: user1")
        person.type(" user2\n")
        person.expect("Cc: ")
        person.type("payam\n")
        person.expect("Bcc: ")
        person.type("\n")
        person.expect("Subject: x")
        person.type("y\n")
        person.type("line\n~.\n")
        person.expect("EOT\n")
        assert person.close() == 0
        text = self.letter(instance)
        for field in ("To: user1, user2", "Cc: payam", "Subject: xy"):
            assert f"{field}\n" in text

    @pytest.mark.parametrize(("typed", "is_kept"), [("~q", True), ("~x", False)])
    def test_a_letter_may_be_given_up(self, instance, home, typed, is_kept):
        (home / "dead.letter").unlink()
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type(f"line\n{typed}\n")
        person.rest()
        assert person.close() == 1
        assert (home / "dead.letter").exists() == is_kept
        assert nothing_sent(instance)

    def test_messages_are_put_in(self, instance, home):
        instance.make_mailbox("payam", mail("s1", "first") + mail("s2", "second"))
        person = Terminal(instance, "mail", "-N")
        person.expect("& ")
        person.type("m user1\n")
        person.expect("Subject: ")
        person.type("x\n~f 1\n")
        person.expect("Interpolating: 1\n(continue)\n")
        person.type("~m 2\n")
        person.expect("Interpolating: 2\n(continue)\n")
        person.type("~:echo a-word\n")
        person.expect("\na-word\n")
        person.type("~.\n")
        person.expect("EOT\n")
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0
        text = self.letter(instance)
        assert "\nSubject: s1\n" in text
        assert "\nfirst\n" in text
        assert "\n> Subject: s2\n" in text
        assert "\n> second\n" in text

    def test_another_escape_may_be_set(self, instance, home):
        person = Terminal(instance, "mail", "-S", "escape=!", "-s", "x", "user1")
        person.type("~s y\n!s z\n!.\n")
        person.expect("EOT\n")
        assert person.close() == 0
        assert "Subject: z\n" in self.letter(instance)
        assert "\n~s y\n" in self.letter(instance)

    def test_no_escape_may_be_set(self, instance, home):
        person = Terminal(instance, "mail", "-S", "escape=", "-s", "x", "user1")
        person.type("~s y\n.\n")
        person.expect("EOT\n")
        assert person.close() == 0
        assert "\n~s y\n" in self.letter(instance)

    def test_ignoreeof_wants_a_dot(self, instance, home):
        person = Terminal(instance, "mail", "-S", "ignoreeof", "-s", "x", "user1")
        person.type("line\n\x04")
        person.expect('Use "." to terminate letter\n')
        person.type(".\n")
        person.expect("EOT\n")
        assert person.close() == 0

    def test_askcc_asks(self, instance, home):
        person = Terminal(instance, "mail", "-S", "askcc", "-s", "x", "user1")
        person.type("line\n\x04")
        person.expect("Cc: ")
        person.type("user2\n")
        person.rest()
        assert person.close() == 0
        assert "Cc: user2\n" in self.letter(instance)

    def test_noask_does_not_ask(self, instance, home):
        person = Terminal(instance, "mail", "-S", "noask", "user1")
        person.type("line\n\x04")
        assert "Subject: " not in person.expect("EOT\n")
        assert person.close() == 0

    def test_an_interrupt_is_told_and_drops_a_half_line(self, instance, home):
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type("line\n")
        person.expect("line\n")
        person.type("half")
        person.expect("half")
        person.interrupt()
        person.expect("(Interrupt -- one more to kill letter)\n")
        person.type("more\n")
        person.expect("more\n")
        person.interrupt()
        person.expect("(Interrupt -- one more to kill letter)\n")
        person.type(".\n")
        person.expect("EOT\n")
        assert person.close() == 0
        assert self.letter(instance).endswith("\n\nline\nmore\n\n")

    def test_the_second_interrupt_keeps_the_text(self, instance, home):
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type("line\n")
        person.expect("line\n")
        person.interrupt()
        person.expect("(Interrupt -- one more to kill letter)\n")
        person.interrupt()
        person.expect(f'"{home}/dead.letter" 1/5\n')
        assert person.close() == 1
        kept = (home / "dead.letter").read_text()
        assert kept.startswith("dead\n")
        assert kept.endswith("\n\nline\n\n")
        assert nothing_sent(instance)

    def test_nosave_keeps_nothing(self, instance, home):
        person = Terminal(instance, "mail", "-S", "nosave", "-s", "x", "user1")
        person.type("line\n")
        person.expect("line\n")
        for shown in ("(Interrupt -- one more to kill letter)\n", "^C"):
            person.interrupt()
            person.expect(shown)
        person.rest()
        assert person.close() == 1
        assert (home / "dead.letter").read_text() == "dead\n"

    @pytest.fixture
    def empty(self, home):
        """The same home without a dead.letter."""
        (home / "dead.letter").unlink()
        return home

    @staticmethod
    def kept(home):
        """The one letter that was kept."""
        (letter,) = read_mbox((home / "dead.letter").read_bytes())
        return letter

    def test_a_bad_address_does_not_cost_the_letter(self, instance, empty):
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type("line\n~c bad <x\n~.\n")
        person.expect("EOT\n")
        person.expect(f"the text is kept in {empty}/dead.letter\n")
        person.rest()
        assert person.close() == 65
        assert "\nSubject: x\n" in self.kept(empty)
        assert self.kept(empty).endswith("\n\nline\n\n")
        assert nothing_sent(instance)

    def test_an_attachment_that_is_gone_does_not_cost_the_letter(self, instance, empty):
        person = Terminal(instance, "mail", "-a", "file", "-s", "x", "user1")
        person.type("line\n~p\n")
        person.expect("(continue)\n")
        (empty / "file").unlink()
        person.type("~.\n")
        person.expect(f"the text is kept in {empty}/dead.letter\n")
        assert "file: No such file or directory" in person.rest()
        assert person.close() == 1
        assert "\nSubject: x\n" in self.kept(empty)
        assert "\nline\n" in self.kept(empty)
        assert nothing_sent(instance)

    @pytest.mark.parametrize("kind", ["address", "file"])
    def test_who_reads_keeps_such_a_letter_and_goes_on(self, instance, empty, kind):
        instance.make_mailbox("payam", mail("a"))
        person = Terminal(instance, "mail", "-N")
        person.expect("& ")
        person.type("m user1\n")
        person.expect("Subject: ")
        person.type("x\nline\n")
        person.expect("x\nline\n")
        if kind == "address":
            person.type("~c bad <x\n")
        else:
            person.type(f"~@ {empty}/file\n~!rm {empty}/file\n")
            person.expect("!\n")
        person.type("~.\n")
        person.expect(f"the text is kept in {empty}/dead.letter\n")
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0
        assert "\nSubject: x\n" in self.kept(empty)
        assert "\nline\n" in self.kept(empty)
        assert nothing_sent(instance)

    def test_tilde_h_keeps_people_apart(self, instance, home):
        names = ["User One <user1@localhost>", "user2"]
        person = Terminal(instance, "mail", "-s", "x", *names)
        person.type("~h\n")
        person.expect("To: User One <user1@localhost>, user2")
        person.type("\n")
        for prompt in ("Cc: ", "Bcc: ", "Subject: x"):
            person.expect(prompt)
            person.type("\n")
        person.type("line\n~.\n")
        person.expect("EOT\n")
        assert person.close() == 0
        letter = self.letter(instance)
        assert fields(letter, "To") == ["User One <user1@localhost>, user2"]
        assert len(instance.messages("user2")) == 1

    def asked(self, instance):
        """Someone who has typed a line and is asked for copies."""
        person = Terminal(instance, "mail", "-S", "askcc", "-s", "x", "user1")
        person.type("line\n\x04")
        person.expect("Cc: ")
        return person

    def test_an_interrupt_is_told_where_copies_are_asked_for(self, instance, empty):
        person = self.asked(instance)
        person.type("user")
        person.expect("user")
        person.interrupt()
        person.expect("(Interrupt -- one more to kill letter)\n")
        person.expect("Cc: ")
        person.type("user2\n")
        person.rest()
        assert person.close() == 0
        assert fields(self.letter(instance), "Cc") == ["user2"]
        assert not (empty / "dead.letter").exists()

    def test_the_second_interrupt_there_keeps_the_text(self, instance, empty):
        person = self.asked(instance)
        person.interrupt()
        person.expect("(Interrupt -- one more to kill letter)\n")
        person.expect("Cc: ")
        person.interrupt()
        person.expect(f'"{empty}/dead.letter" 1/5\n')
        assert person.close() == 1
        assert self.kept(empty).endswith("\n\nline\n\n")
        assert nothing_sent(instance)

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
    def test_who_is_hung_up_on_there_keeps_the_text(self, instance, empty, number):
        person = self.asked(instance)
        person.child.send_signal(number)
        assert person.close() == 128 + number
        assert "\nSubject: x\n" in self.kept(empty)
        assert self.kept(empty).endswith("\n\nline\n\n")
        assert nothing_sent(instance)

    @pytest.mark.parametrize("word", ["noasksub", "noask"])
    def test_noasksub_asks_nothing(self, instance, home, word):
        with open(home / ".mailrc", "a") as file:
            file.write(f"set {word}\n")
        person = Terminal(instance, "mail", "user1")
        person.type("line\n\x04")
        assert "Subject: " not in person.expect("EOT\n")
        assert person.close() == 0
        assert fields(self.letter(instance), "Subject") == []

    def test_asksub_asks_again(self, instance, home):
        with open(home / ".mailrc", "a") as file:
            file.write("set noask\nset asksub\n")
        person = Terminal(instance, "mail", "user1")
        person.expect("Subject: ")
        person.type("x\nline\n\x04")
        person.expect("EOT\n")
        assert person.close() == 0
        assert fields(self.letter(instance), "Subject") == ["x"]

    @pytest.mark.parametrize("quote", ['"', "'"])
    def test_a_sign_may_have_lines(self, instance, home, quote):
        (home / ".mailrc").write_text(f"set sign={quote}-- \\nyours\\tP{quote}\n")
        person = Terminal(instance, "mail", "-s", "x", "user1")
        person.type("line\n~a\n")
        person.expect("-- \nyours")
        person.type("~.\n")
        person.expect("EOT\n")
        assert person.close() == 0
        assert self.letter(instance).endswith("\n\nline\n-- \nyours\tP\n\n")


class TestMailAtPrompt:
    """A reader at a terminal."""

    @pytest.fixture
    def person(self, instance):
        """Someone with two messages, at the prompt."""
        instance.make_mailbox("payam", mail("a") + mail("b"))
        person = Terminal(instance, "mail")
        person.expect("& ")
        return person

    def test_an_interrupt_brings_another_prompt(self, person):
        person.interrupt()
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0

    def test_an_interrupt_ends_a_command(self, person):
        person.type("!exec sleep 1000\n")
        person.expect("1000\n")
        wait_for(lambda: children(person.child.pid))
        person.type("\x03")
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0

    def test_control_d_quits(self, person, instance):
        person.type("d 1\n")
        person.expect("& ")
        person.type("\x04")
        person.expect("Held 1 message in ")
        assert person.close() == 0
        assert len(instance.messages("payam")) == 1

    def test_ignoreeof_wants_quit(self, person):
        person.type("set ignoreeof\n")
        person.expect("& ")
        person.type("\x04")
        person.expect('Use "quit" to quit.\n')
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0

    def test_another_prompt_may_be_set(self, person):
        person.type("set prompt='what? '\n")
        person.expect("\nwhat? ")
        person.type("x\n")
        assert person.close() == 0

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
    def test_a_hang_up_changes_nothing(self, person, instance, number):
        before = instance.mailbox("payam").read_bytes()
        person.type("d *\n")
        person.expect("& ")
        person.child.send_signal(number)
        person.close()
        assert instance.mailbox("payam").read_bytes() == before

    def test_new_mail_is_told_at_the_prompt(self, person, instance):
        with open(instance.mailbox("payam"), "a") as file:
            file.write(mail("late"))
        person.type("=\n")
        person.expect("1\nNew mail has arrived.\nLoaded 1 new message\n& ")
        person.type("h 3\n")
        person.expect(" N  3 ")
        person.type("x\n")
        assert person.close() == 0

    def test_a_killed_letter_leaves_the_session(self, person, instance):
        person.type("m user1\n")
        person.expect("Subject: ")
        person.type("x\nline\n")
        person.expect("line\n")
        for shown in ("(Interrupt -- one more to kill letter)\n", "& "):
            person.interrupt()
            person.expect(shown)
        person.type("x\n")
        assert person.close() == 0
        assert nothing_sent(instance)

    def test_a_long_message_is_paged(self, instance):
        lines = [f"line {n}" for n in range(100)]
        instance.make_mailbox("payam", mail("a", *lines))
        env = {"PAGER": "sed s/line/paged/"}
        person = Terminal(instance, "mail", "-N", env=env)
        person.expect("& ")
        person.type("1\n")
        person.expect("paged 99\n")
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0

    def test_a_short_message_is_not_paged(self, instance):
        instance.make_mailbox("payam", mail("a", "line"))
        person = Terminal(instance, "mail", "-N", env={"PAGER": "sed s/line/paged/"})
        person.expect("& ")
        person.type("1\n")
        person.expect("\nline\n")
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0

    @pytest.mark.parametrize(
        ("word", "env", "wanted"),
        [
            ("colour", {"TERM": "xterm"}, True),
            ("color", {"TERM": "xterm"}, True),
            ("nocolour", {"TERM": "xterm"}, False),
            ("colour", {"TERM": "xterm", "NO_COLOR": "1"}, False),
            ("colour", {"TERM": "xterm", "NO_COLOR": ""}, True),
            ("colour", {"TERM": "dumb"}, False),
        ],
    )
    def test_colours_are_for_terminals_that_have_them(
        self, instance, word, env, wanted
    ):
        texts = [mail("a"), mail("b", status="RO"), mail("c")]
        texts[1] = texts[1].replace("RO\n", "RO\nX-Status: F\n")
        instance.make_mailbox("payam", "".join(texts))
        person = Terminal(instance, "mail", "-S", word, env=env)
        shown = person.expect('"c"')
        person.type("x\n")
        person.rest()
        assert person.close() == 0
        assert ("\x1b[1m>N  1 " in shown) == wanted
        assert ("\x1b[33m F  2 " in shown) == wanted
        assert ("\x1b[" in shown) == wanted

    def test_colours_are_not_for_pipes(self, instance):
        instance.make_mailbox("payam", mail("a"))
        for words in (["-H"], []):
            result = instance.run(
                *("mail", "-S", "colour", *words),
                stdin="h\nx\n",
                user="payam",
                env={"TERM": "xterm"},
            )
            assert '"a"' in result.out
            assert "\x1b" not in result.out

    def test_two_readers_move_a_message_to_mbox_once(self, instance):
        for path in (instance.make_mailbox("payam", mail("a") + mail("b")),):
            first = Terminal(instance, "mail", "-N", "-S", "nohold")
            first.expect("& ")
            first.type("p 1\n")
            first.expect("& ")
            other = instance.run("mail", "-N", "-Snohold", stdin="p 1\n", user="payam")
            assert other.code == 0, other
            for _ in range(2):
                first.type("q\n")
                first.expect(f"{path}: another program changed it: x leaves it so\n")
                first.expect("& ")
            first.type("x\n")
            assert first.close() == 0
            assert path.read_text() == mail("b", status="O")
            mbox_text = (instance.home("payam") / "mbox").read_text()
            assert mbox_text == mail("a", status="RO")


class TestMailReads:
    """mail(1) without recipients."""

    @pytest.mark.parametrize(
        "typed, wanted, unwanted, left", READING.values(), ids=READING
    )
    def test_reading(self, reader, typed, wanted, unwanted, left):
        result = reader.run("mail", user="payam", stdin=typed + "\n")
        shown = result.out + result.err
        assert "Traceback" not in shown
        for text in wanted:
            assert text in shown, shown
        for text in unwanted:
            assert text not in shown, shown
        texts = "".join(reader.messages("payam"))
        assert "".join(n for n in "123" if f"subject {n}" in texts) == left

    def test_h_shows_the_headers_again(self, reader):
        once = reader.run("mail", user="payam", stdin="x\n").out
        twice = reader.run("mail", user="payam", stdin="h\nx\n").out
        assert once.count('"subject 3"') == 1
        assert twice.count('"subject 3"') == 2

    def test_no_prompt_when_stdin_is_no_terminal(self, reader):
        assert "& " not in reader.run("mail", user="payam", stdin="1\nx\n").out

    def test_u_reads_the_mail_of_another(self, reader):
        shown = reader.run("mail", "-u", "payam", user="user1", stdin="x\n").out
        assert "3 messages" in shown

    def test_f_reads_another_file(self, reader):
        path = reader.home("payam") / "folder"
        shutil.copy(reader.mailbox("payam"), path)
        reader.give(path, "payam")
        shown = reader.run("mail", "-f", path, user="payam", stdin="1\nx\n").out
        assert f'"{path}": 3 messages' in shown

    def test_printing_shows_the_whole_message(self, reader):
        shown = reader.run("mail", user="payam", stdin="1\nx\n").out
        _, _, printed = shown.partition("Message  1:\n")
        assert re.match(rf"From user2@localhost  {ASCTIME} \d{{4}}\n", printed)
        for name in ("Return-Path", "X-Original-To", "Delivered-To", "Subject"):
            assert re.search(rf"(?m)^{name}: ", printed), name
        assert "\n\ntext 1\n" in printed

    def test_s_saves_the_message_with_its_from_line(self, reader):
        path = reader.home("payam") / "saved"
        reader.run("mail", user="payam", stdin=f"s 2 {path}\nx\n")
        (message,) = read_mbox(path.read_bytes())
        assert "Subject: subject 2" in message
        assert "text 2" in message

    def test_w_writes_the_text_alone(self, reader):
        path = reader.home("payam") / "written"
        reader.run("mail", user="payam", stdin=f"w 2 {path}\nx\n")
        assert path.read_text().strip() == "text 2"

    def test_r_replies_to_the_sender(self, reader):
        person = Terminal(reader, "mail", user="payam")
        person.expect("& ")
        person.type("r 1\n")
        person.expect("Subject: Re: subject 1")
        person.expect("\n")
        person.type("my answer\n\x04")
        person.expect("EOT\n")
        person.expect("& ")
        person.type("x\n")
        assert person.close() == 0
        message = reader.wait_message("user2", "my answer")
        assert fields(message, "Subject") == ["Re: subject 1"]
        assert fields(message, "In-Reply-To") != []

    def test_mail_that_comes_while_reading_is_kept(self, reader):
        person = Terminal(reader, "mail", user="payam")
        person.expect("& ")
        person.type("d *\n")
        person.expect("& ")
        reader.send("payam@localhost", letter("subject 4"))
        reader.wait_message("payam", "subject 4")
        person.type("q\n")
        assert person.close() == 0
        (message,) = reader.messages("payam")
        assert "subject 4" in message

    def test_the_mailbox_keeps_its_mode_and_owner(self, reader):
        before = reader.mailbox("payam").stat()
        reader.run("mail", user="payam", stdin="d 1\nq\n")
        after = reader.mailbox("payam").stat()
        assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)

    def test_without_mail_it_says_so_and_exits_1(self, instance):
        result = instance.run("mail", user="payam")
        assert (result.code, result.out, result.err) == (1, "", "No mail for payam\n")


class TestDisk:
    """A disk that is full or cannot be written."""

    LIMIT = 100_000

    def test_sendmail_on_a_full_disk_is_75_and_leaves_nothing(self, instance):
        def small():
            limits = (self.LIMIT, self.LIMIT)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        text = letter("full", LOREM * 4000)
        result = instance.run("sendmail", "payam", stdin=text, preexec_fn=small)
        assert_one_clear_line(result, 75)
        assert instance.queued() == []
        assert instance.messages("payam") == []

    def test_smtp_on_a_full_disk_is_452_and_the_daemon_lives(self, instance):
        instance.start(limits=[(resource.RLIMIT_FSIZE, self.LIMIT)])
        with pytest.raises(smtplib.SMTPDataError) as refused:
            instance.send("payam@localhost", letter("full", LOREM * 4000))
        assert refused.value.smtp_code == 452
        assert refused.value.smtp_error.startswith(b"4.3.1")
        instance.send("payam@localhost", letter("small"))
        instance.wait_message("payam", "small")
        assert instance.messages("payam")[0].count("Subject: ") == 1

    @needs_root
    def test_a_disk_without_space_takes_nothing_and_loses_nothing(self, instance):
        instance.queue.mkdir(parents=True)
        words = ("-t", "tmpfs", "-o", "size=256k", "none", instance.queue)
        with mounted(*words):
            instance.start()
            text = letter("full", LOREM * 20_000)
            with pytest.raises(smtplib.SMTPException) as refused:
                instance.send("payam@localhost", text)
            assert refused.value.smtp_code == 452
            assert_one_clear_line(instance.run("sendmail", "payam", stdin=text), 75)
            assert instance.queued() == []
            assert instance.is_ready()
            instance.kill()

    def test_sendmail_on_a_read_only_disk_is_75(self, instance):
        instance.sendmail("-odi", "payam", stdin=letter("first"))
        instance.wait_message("payam", "first")
        with read_only(instance.queue):
            result = instance.run("sendmail", "payam", stdin=letter("second"))
        assert_one_clear_line(result, 75)
        assert instance.with_token("payam", "second") == []

    def test_smtp_on_a_read_only_disk_is_4xx(self, server):
        with read_only(server.queue):
            with pytest.raises(smtplib.SMTPException) as refused:
                server.send("payam@localhost", letter("first"))
            assert 400 <= refused.value.smtp_code < 500
        server.send("payam@localhost", letter("second"))
        server.wait_message("payam", "second")
        assert server.with_token("payam", "first") == []

    @pytest.fixture
    def crammed(self, instance):
        """Puts a mailbox onto a disk that has room for so many pages more.

        It ends where a page does: not a byte more has room.
        """
        place = instance.mailbox("payam").parent
        place.mkdir(parents=True)
        filler = place / "filler"

        def make(pages):
            place.chmod(0o1777)
            texts = [mail(name, name) for name in "abc"]
            texts[2] = mail("c", "x" * (4097 - len("".join(texts))))
            box = instance.make_mailbox("payam", "".join(texts))
            assert box.stat().st_size == 4096
            with contextlib.suppress(OSError), open(filler, "wb", 0) as file:
                while file.write(bytes(4096)):
                    pass
            os.truncate(filler, filler.stat().st_size - pages * 4096)
            return instance, box, box.read_bytes()

        with mounted("-t", "tmpfs", "-o", "size=64k", "none", place):
            yield make

    @staticmethod
    def litter(instance):
        """What is beside the mailbox and in the home, but for mbox."""
        folders = (instance.mailbox("payam").parent, instance.home("payam"))
        names = [name for folder in folders for name in os.listdir(folder)]
        return sorted({*names} - {"payam", "filler", "mbox"})

    @needs_root
    @pytest.mark.parametrize("typed", ["d 1\nq\n", "set nohold\np 1\nq\n"])
    def test_what_leaves_a_mailbox_may_leave_a_full_disk(self, crammed, typed):
        instance, box, _ = crammed(1)  # a lock has room
        result = instance.run("mail", "-N", stdin=typed, user="payam")
        assert (result.code, result.err) == (0, ""), result
        left = [fields(one, "Subject") for one in read_mbox(box.read_bytes())]
        assert left == [["b"], ["c"]]
        assert self.litter(instance) == []
        assert (instance.home("payam") / "mbox").exists() == ("nohold" in typed)

    @needs_root
    def test_a_mailbox_that_a_full_disk_does_not_take_stays_as_it_was(self, crammed):
        instance, box, before = crammed(1)
        result = instance.run("mail", "-N", stdin="p 1\nq\n", user="payam")
        assert result.code == 74, result
        assert f"{box}: No space left on device" in result.err
        assert box.read_bytes() == before
        assert self.litter(instance) == []

    @needs_root
    def test_who_could_not_write_it_can_read_it_still(self, crammed):
        instance, box, before = crammed(1)
        instance.run("mail", "-N", stdin="p 1\nq\n", user="payam")
        result = instance.run("mail", "-N", stdin="p 1\nx\n", user="payam")
        assert (result.code, result.err) == (0, ""), result
        assert "Subject: a\n" in result.out
        assert box.read_bytes() == before

    @needs_root
    def test_a_mailbox_can_be_read_on_a_disk_without_any_room(self, crammed):
        instance, box, before = crammed(0)
        result = instance.run("mail", "-N", stdin="p 1\nx\n", user="payam")
        assert (result.code, result.err) == (0, ""), result
        assert "Subject: a\n" in result.out
        assert box.read_bytes() == before

    @needs_root
    def test_a_change_that_was_given_up_is_not_made_when_there_is_room(self, crammed):
        instance, box, before = crammed(1)
        typed = "p 1\nq\nx\n"
        result = instance.run("mail", "-N", stdin=typed, user="payam")
        assert (result.code, box.read_bytes()) == (0, before), result
        (box.parent / "filler").unlink()
        result = instance.run("mail", "-N", stdin="x\n", user="payam")
        assert (result.code, box.read_bytes()) == (0, before), result


def tool(name):
    """The path of a program of Debian's; skips the test where it is not."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    return found or pytest.skip(f"{name} is not installed")


def shown_by(*words):
    """What a program prints, which must end well."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done
    return done.stdout


def make_certificate(instance):
    """A file with a key and its certificate."""
    path = instance.root / "etc/cert.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    shown_by(tool("openssl"), *words, "-keyout", path, "-out", f"{path}.crt")
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def fill_log(instance):
    """One of each: by SMTP, by sendmail, two refused, deferred, bounced."""
    instance.mailbox("user1").mkdir(parents=True)
    instance.aliases('bad: "|exit 67"\n')
    instance.configure(syslog_name="postfix", mynetworks="192.0.2.0/24")
    instance.start()
    instance.send("payam@localhost", letter("by-smtp"))
    instance.sendmail("user2", stdin=letter("by-sendmail"), user="payam")
    for name in ("nosuchuser@localhost", "other@example.com"):
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            instance.send(name, letter("refused"))
    instance.send("user1@localhost", letter("deferred"))
    instance.sendmail("bad", stdin=letter("bounced"), user="payam")
    wait_for(lambda: instance.log().count("status=sent") == 3)
    wait_for(lambda: instance.log().count("status=deferred") == 1)
    wait_for(lambda: instance.log().count(": removed") >= 4)
    return instance.root / "var/log/mail.log"


class TestLogReaders:
    """Programs that read Postfix's log read ours."""

    FILTER = "/etc/fail2ban/filter.d/postfix.conf"

    def matches(self, log, mode):
        """How many lines fail2ban's filter finds in a mode."""
        program = tool("fail2ban-regex")
        shown = shown_by(program, str(log), f"{self.FILTER}[mode={mode}]")
        return int(re.search(r"Lines: .* (\d+) matched", shown).group(1))

    def test_pflogsumm_counts_each_message(self, instance):
        program = tool("pflogsumm")
        shown = shown_by(program, fill_log(instance))
        found = {name: int(n) for n, name in re.findall(r"(?m)^ +(\d+) +(\w+)", shown)}
        wanted = {"received": 4, "delivered": 3, "deferred": 1, "bounced": 1}
        wanted["rejected"] = 2
        assert {name: found[name] for name in wanted} == wanted, shown

    def test_fail2ban_finds_the_two_refusals(self, instance):
        tool("fail2ban-regex")
        assert self.matches(fill_log(instance), "normal") == 2

    def test_fail2ban_finds_a_wrong_password(self, instance):
        tool("fail2ban-regex")
        passwords = instance.write("etc/passwords", "")
        instance.configure(
            syslog_name="postfix",
            smtpd_tls_cert_file=make_certificate(instance),
            smtpd_sasl_password_file=passwords,
        )
        instance.start()
        with instance.smtp() as client:
            client.starttls()
            client.ehlo()
            code, _ = client.docmd("AUTH", "PLAIN AHBheWFtAHdyb25n")
            assert code == 535
        wait_for(lambda: "authentication failed" in instance.log())
        count = instance.log().count("authentication failed")
        assert self.matches(instance.root / "var/log/mail.log", "auth") == count > 0

    def test_fail2ban_finds_a_connection_that_is_dropped(self, instance):
        tool("fail2ban-regex")
        instance.configure(syslog_name="postfix")
        instance.start()
        log, lost = instance.root / "var/log/mail.log", "lost connection after "
        wait_for(lambda: lost in instance.log())
        before = self.matches(log, "ddos")
        with Wire(instance.port) as wire:
            play(wire, "S: 220\nC: EHLO client.example\nS: 250")
        wait_for(lambda: lost + "EHLO" in instance.log())
        with Wire(instance.port) as wire:
            play(wire, BEGIN)
        wait_for(lambda: lost + "DATA" in instance.log())
        assert self.matches(log, "ddos") == before + 1


# What programs are given to send, and what the mailbox then shows of it.
TEXT = "one\n.\nFrom here\nGrüße\n"
SHOWN = "one\n.\n>From here\nGrüße\n\n"
CODED = "one\n.\n=46rom here\nGr=C3=BC=C3=9Fe\n\n"
WITH_HEAD = f"""\
From: Payam <payam@example.com>
To: user1@localhost
Bcc: user2@localhost
Subject: {{token}}

{TEXT}"""

# A program that sends: its command and its stdin, with {sendmail} or {port}
# for where to; the argv of sendmail, none by SMTP; and what then arrives.
Sending = collections.namedtuple(
    "Sending",
    "command argv sender author to body stdin users",
    defaults=("user1", SHOWN, TEXT, "user1 user2"),
)

MUTT = (
    "mutt -n -F /dev/null -e 'set sendmail=\"{sendmail} -oem -oi\"'"
    " -e 'set hostname=centos7-1 from=payam@centos7-1 copy=no send_charset=utf-8'"
)
PHP = "mail('user1', '{token}', stream_get_contents(STDIN), "
SMTPLIB = (
    "import smtplib, sys\n"
    "text = sys.stdin.buffer.read().replace(b'\\n', b'\\r\\n')\n"
    "with smtplib.SMTP('127.0.0.1', {port}) as client:\n"
    "    names = ['user1@localhost', 'user2@localhost']\n"
    "    client.sendmail('friend@example.com', names, text)\n"
)
SENDINGS = {
    "mutt": Sending(
        MUTT + " -s {token} -b user2 -- user1",
        "-oem -oi -- user1@centos7-1 user2@centos7-1",
        f"{{me}}@{HOST}",
        "[^<]*<payam@centos7-1>",
        "user1@centos7-1",
    ),
    "mutt with all that it can ask for": Sending(
        MUTT + " -e 'set use_8bitmime use_envelope_from dsn_notify=failure'"
        " -e 'set dsn_return=hdrs' -s {token} -b user2 -- user1",
        "-oem -oi -B8BITMIME -f payam@centos7-1 -N failure -R hdrs --"
        " user1@centos7-1 user2@centos7-1",
        "payam@centos7-1",
        "[^<]*<payam@centos7-1>",
        "user1@centos7-1",
    ),
    "s-nail": Sending(
        "s-nail -:/ -S mta={sendmail} -s {token} -b user2 user1",
        "-i -- user1 user2",
        f"{{me}}@{HOST}",
        f".*{{me}}.*@{HOST}.*",
        body=CODED.replace(".", "=2E"),
    ),
    "s-nail -r": Sending(
        "s-nail -:/ -S mta={sendmail} -r payam@example.com -s {token} -b user2 user1",
        "-i -f payam@example.com -- user1 user2",
        "payam@example.com",
        "payam@example.com",
        body=CODED.replace(".", "=2E"),
    ),
    "php mail()": Sending(
        f"php -n -d 'sendmail_path={{sendmail}} -t -i' -r \"{PHP}'Bcc: user2');\"",
        "-t -i",
        f"{{me}}@{HOST}",
        f".*{{me}}@{HOST}.*",
        body=SHOWN + "\n",
    ),
    "php mail() with mixed line ends and -f": Sending(
        f"php -n -d 'sendmail_path={{sendmail}} -t -i' -r \"{PHP}"
        '\\"From: Web <web@example.com>\\r\\nBcc: user2\\nX-More: yes\\", '
        "'-fbounce@example.com');\"",
        "-t -i -fbounce@example.com",
        "bounce@example.com",
        "Web <web@example.com>",
        body=SHOWN + "\n",
    ),
    "perl open |sendmail -t": Sending(
        'perl -e \'open(my $mail, "|{sendmail} -t") or die; print $mail <STDIN>;'
        " close($mail) or die'",
        "-t",
        f"{{me}}@{HOST}",
        "Payam <payam@example.com>",
        "user1@localhost",
        body="one\n\n",
        stdin=WITH_HEAD,
    ),
    "mime-construct of logcheck": Sending(
        "mime-construct --subject {token} --to user1 --to user2"
        " --encoding quoted-printable --file -",
        "-oi user1 user2",
        f"{{me}}@{HOST}",
        f".*{{me}}@{HOST}.*",
        "user1, user2",
        body=CODED,
    ),
    "swaks": Sending(
        "swaks --hide-all --server 127.0.0.1:{port} --helo client.example"
        " --from friend@example.com --to user1@localhost,user2@localhost"
        " --header 'Subject: {token}' --body -",
        "",
        "friend@example.com",
        "friend@example.com",
        "user1@localhost,user2@localhost",
        body=SHOWN + "\n\n",
    ),
    "msmtp": Sending(
        "msmtp --host=127.0.0.1 --port={port} --from=friend@example.com"
        " user1@localhost user2@localhost",
        "",
        "friend@example.com",
        "Payam <payam@example.com>",
        "user1@localhost",
        stdin=WITH_HEAD,
    ),
    "msmtp -t": Sending(
        "msmtp --host=127.0.0.1 --port={port} --read-envelope-from -t",
        "",
        "payam@example.com",
        "Payam <payam@example.com>",
        "user1@localhost",
        stdin=WITH_HEAD,
    ),
    "python3 smtplib": Sending(
        f'{{python}} -c "{SMTPLIB}"',
        "",
        "friend@example.com",
        "Payam <payam@example.com>",
        "user1@localhost",
        stdin=WITH_HEAD.replace("Bcc: user2@localhost\n", ""),
    ),
}


class Caller:
    """A sendmail of an instance's that notes how it is called."""

    def __init__(self, instance):
        self.instance, self.token = instance, new_token()
        self.folder = open_folder(instance, self.token)
        self.note = self.folder / "argv"
        self.sendmail = self.folder / "sendmail"
        self.sendmail.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{self.note}\n"
            f'MINIMTA_ROOT={instance.root} exec {instance.bin}/sendmail "$@"\n'
        )
        self.sendmail.chmod(0o755)
        self.me = pwd.getpwuid(os.getuid()).pw_name

    def fill(self, text):
        """`text` with what is known by now in it."""
        return text.format(
            sendmail=self.sendmail,
            token=self.token,
            port=self.instance.port,
            me=self.me,
            python=sys.executable,
        )

    def env(self, **more):
        path = f"{self.folder}:/usr/sbin:/usr/bin:/sbin:/bin"
        return self.instance.env(self.me, PATH=path, LANG="C.UTF-8", **more)

    def run(self, words, stdin="", **how):
        """Run a program to its end and return its Result."""
        done = subprocess.run(
            words,
            input=stdin.encode(),
            capture_output=True,
            timeout=PATIENCE,
            **{"env": self.env(), "cwd": self.folder, **how},
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def argv(self):
        """How sendmail was called, if it was."""
        return self.note.read_text().splitlines() if self.note.exists() else []

    def send(self, row, **how):
        """Run the program of a row, which says nothing and succeeds."""
        words = shlex.split(self.fill(row.command))
        words[0] = tool(words[0])
        result = self.run(self.words(words), self.fill(row.stdin), **how)
        assert (result.code, result.out, result.err) == (0, "", ""), result
        self.assert_arrives(row)

    def words(self, words):
        return words

    def assert_arrives(self, row, subject="{token}"):
        """Each of the users has once what the row says; the body."""
        for user in row.users.split():
            message = self.instance.wait_message(user, self.token)
            _, body = head_and_body(message)
            sender = self.fill(row.sender)
            assert message.startswith(f"From {sender}  ")
            assert fields(message, "Return-Path") == [f"<{sender}>"]
            (author,) = fields(message, "From")
            assert re.fullmatch(self.fill(row.author), author)
            assert fields(message, "To") == [self.fill(row.to)]
            assert fields(message, "Subject") == [self.fill(subject)]
            assert fields(message, "Bcc") == []
            assert row.body in (None, body)
        assert self.argv() == self.fill(row.argv).split()
        return body


SHORT = HOST.partition(".")[0]
# What a user runs where minimta is /usr/sbin/sendmail, the path built in.
BUILT_IN = {
    "bsd-mailx": Sending(
        "bsd-mailx -s {token} -b user2 user1",
        "-i -t",
        f"payam@{HOST}",
        f"payam <payam@{HOST}>",
    ),
    "bsd-mailx -r": Sending(
        "bsd-mailx -r other@example.com -s {token} -b user2 user1",
        "-i -t -f other@example.com",
        "other@example.com",
        "other@example.com",
    ),
    "s-nail": Sending(
        "s-nail -:/ -s {token} -b user2 user1",
        "-i -- user1 user2",
        f"payam@{HOST}",
        f"payam <payam@{HOST}>",
        body=CODED.replace(".", "=2E"),
    ),
    "mutt": Sending(
        "mutt -n -F /dev/null -e 'set copy=no send_charset=utf-8'"
        " -s {token} -b user2 -- user1",
        f"-oem -oi -- user1@{HOST} user2@{HOST}",
        f"payam@{HOST}",
        f"payam@{HOST}",
        f"user1@{HOST}",
    ),
    "php mail()": Sending(
        f"php -n -r \"{PHP}'Bcc: user2');\"",
        "-t -i",
        f"payam@{HOST}",
        f"payam <payam@{HOST}>",
        body=SHOWN + "\n",
    ),
}

# The argv of programs that are not run here, and the sender of the envelope.
REPLAYED = {
    "systemd-cron": ("-i -B 8BITMIME user1", "{me}"),
    "cronie": ("-FCronDaemon -i -odi -oem -oi -t -f user2", "user2"),
    "busybox crond": ("-ti", "{me}"),
    "GNU mailutils mail": (f"-oi -f user2@{HOST} -t", "user2"),
    "unattended-upgrades": ("-oi -t", "{me}"),
    "reportbug": (f"-f payam@{HOST} -oi -oem user1", "payam"),
    "Ruby mail": (f"-i -f payam@{HOST} -- user1", "payam"),
    "nodemailer": (f"-i -f payam@{HOST} user1", "payam"),
    "PHPMailer": (f"-fpayam@{HOST} -i -t", "payam"),
}

# What at sends to the user whose job it is.
AT = Sending(
    "",
    "-i payam",
    f"payam@{HOST}",
    f"payam <payam@{HOST}>",
    "payam",
    users="payam",
)
SUDOERS = """
Defaults passwd_tries=1, mail_badpass, mailto=user1
payam ALL=(ALL) ALL
"""


class Repository:
    """A git repository in the folder of a caller."""

    NAMES = ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")

    def __init__(self, caller, name):
        self.caller, self.path = caller, caller.folder / name
        self.path.mkdir()
        names = (f"GIT_{name}" for name in self.NAMES)
        self.env = dict.fromkeys(names, "payam@example.com")
        self.git("init", "-q")

    def git(self, *words):
        """What git prints, which must succeed and not complain."""
        env = self.caller.env(GIT_CONFIG_NOSYSTEM="1", **self.env)
        done = self.caller.run([tool("git"), *words], env=env, cwd=self.path)
        assert (done.code, done.err) == (0, ""), done
        return done.out

    def send(self):
        """Has git send the last commit to user1 and user2."""
        words = "--quiet --confirm=never --suppress-cc=all --8bit-encoding=UTF-8"
        words += " --from=payam@example.com --envelope-sender=back@example.com"
        setting = f"sendemail.smtpServer={self.caller.sendmail}"
        words += " --to=user1 --bcc=user2 -1"
        self.git("-c", setting, "send-email", *words.split())


class Machine(Caller):
    """The same as /usr/sbin/sendmail of a host of its own, made of mounts."""

    def __init__(self, instance):
        super().__init__(instance)
        self.me = "payam"
        self.mounts = [f"--bind {self.sendmail} /usr/sbin/sendmail"]
        users = [Path("/etc/passwd").read_text()]
        for name, uid in UIDS.items():
            users.append(f"{name}:*:{uid}:{uid}::{instance.home(name)}:/bin/sh\n")
        self.lay("/etc/passwd", "".join(users))
        self.lay("/etc/hosts", f"127.0.0.1 {HOST} {SHORT} localhost\n")
        self.mounts.append("-t tmpfs none /run")

    def lay(self, place, text, mode=0o644):
        """Has who runs in here see `text` in that place."""
        path = self.folder / place.replace("/", "-")
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        self.mounts.append(f"--bind {path} {place}")

    def lay_spool(self):
        """Has cron and at see a spool of their own, and no PAM."""
        spool = self.folder / "spool"
        for name in ("crontabs", "atjobs", "atspool"):
            (spool / name).mkdir(parents=True)
            shutil.chown(spool / name, "daemon", "daemon")
            (spool / name).chmod(0o770)
        number = spool / "atjobs/.SEQ"
        number.write_text("0")
        shutil.chown(number, "daemon", "daemon")
        self.mounts.append(f"--bind {spool} /var/spool/cron")
        for name in ("cron", "atd"):
            if Path("/etc/pam.d", name).exists():
                kinds = ("auth", "account", "session")
                rows = (f"{kind} required pam_permit.so\n" for kind in kinds)
                self.lay(f"/etc/pam.d/{name}", "".join(rows))
        return spool

    def env(self):
        return {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/", "LANG": "C.UTF-8"}

    def words(self, words, user="payam"):
        uid = UIDS.get(user, 0)
        enter = f'setpriv --reuid={uid} --regid={uid} --clear-groups "$@"'
        steps = [f"hostname {SHORT}", *(f"mount {mount}" for mount in self.mounts)]
        script = " && ".join([*steps, f"exec {enter}"])
        return ["unshare", "--mount", "--uts", "sh", "-c", script, "sh", *words]

    def at(self, *words, stdin):
        """Run a job of the user's by at, and atd once."""
        tool("at")
        self.lay_spool()
        self.token = "Output from your job        1"
        done = self.run(self.words(["at", *words, "now"]), stdin)
        assert done.code == 0, done
        done = self.run(self.words(["atd", "-s"], "root"))
        assert (done.code, done.out, done.err) == (0, "", ""), done


@pytest.fixture
def machine(public_bin):
    """A host in which minimta is sendmail, for what has that path built in."""
    if not AS_ROOT:
        pytest.skip("only root can set this up")
    if not os.path.exists("/usr/sbin/sendmail"):
        pytest.skip("there is no /usr/sbin/sendmail to lay another over")
    one = Instance(public_bin, syslog_name="postfix")
    try:
        made = Machine(one)
        done = made.run(made.words(["true"]))
        if done.code:
            pytest.skip(f"no mount namespace can be made here: {done.err.strip()}")
        one.start()
        yield made
    finally:
        one.close()


@pytest.fixture
def crond(machine):
    """Starts a cron daemon in the machine."""
    started = []

    def start():
        words = machine.words([tool("cron"), "-f"], "root")
        how = {"env": machine.env(), "stdin": subprocess.DEVNULL}
        started.append(subprocess.Popen(words, start_new_session=True, **how))

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class TestRealPrograms:
    """What Debian's programs send arrives as they sent it."""

    @pytest.mark.parametrize("name", SENDINGS)
    def test_what_a_program_sends_arrives(self, shared, name):
        Caller(shared).send(SENDINGS[name])

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_what_a_user_sends_by_the_path_built_in_arrives(self, machine, name):
        machine.send(BUILT_IN[name])

    @pytest.mark.parametrize("name", REPLAYED)
    def test_the_argv_of_a_program_that_is_not_run_is_understood(self, shared, name):
        argv, sender = REPLAYED[name]
        author, to = "Payam <payam@example.com>", "user1@localhost"
        row = Sending("{sendmail} " + argv, argv, f"{sender}@{HOST}", author, to)
        text = WITH_HEAD.replace("Bcc: user2@localhost\n", "")
        Caller(shared).send(row._replace(stdin=text, users="user1"))

    def test_a_patch_that_git_sends_makes_the_same_tree(self, shared):
        caller = Caller(shared)
        source, target = Repository(caller, "source"), Repository(caller, "target")
        if not os.access(
            f"{source.git('--exec-path').strip()}/git-send-email", os.X_OK
        ):
            pytest.skip("git send-email is not installed")
        (source.path / "file").write_text(TEXT, encoding="utf-8")
        source.git("add", "file")
        message = f"{caller.token}\n\nFrom here\n.\n>From there\n"
        source.git("commit", "-q", "-m", message)
        source.send()
        argv, sender = "-f back@example.com -i user1 user2", "back@example.com"
        row = Sending("", argv, sender, "payam@example.com", body=None)
        caller.assert_arrives(row, "[PATCH] {token}")
        box = target.path / "box"
        box.write_text(shared.wait_message("user2", caller.token), encoding="utf-8")
        target.git("am", "-q", "--patch-format=mboxrd", "box")
        shown = ("log", "--format=%an %ae %T %B")
        assert target.git(*shown) == source.git(*shown)

    def test_sudo_reports_a_wrong_password(self, machine):
        tool("sudo")
        machine.lay("/etc/sudoers", SUDOERS, 0o440)
        words = machine.words(["sudo", "-S", "true", machine.token])
        done = machine.run(words, "wrong\n")
        assert (done.code, done.out) == (1, ""), done
        row = Sending("", "-t", f"payam@{HOST}", "payam", body=None, users="user1")
        subject = f"*** SECURITY information for {HOST} ***"
        body = machine.assert_arrives(row, subject)
        assert body.startswith(f"{HOST} : ")
        assert " : payam : 1 incorrect password attempt ; " in body
        assert body.endswith(f"COMMAND=/usr/bin/true {machine.token}\n\n\n")

    def test_logwatch_reports_what_minimta_did(self, machine):
        instance = machine.instance
        instance.send("user2@localhost", letter("first"))
        instance.wait_message("user2", "first")
        words = "logwatch --output mail --mailto user1 --range all --service postfix"
        words += f" --logdir {instance.root}/var/log --hostname {machine.token}"
        tool("logwatch")
        done = machine.run(machine.words(words.split(), "root"))
        assert (done.code, done.out, done.err) == (0, "", ""), done
        row = Sending("", "-t", f"root@{HOST}", "root", body=None, users="user1")
        body = machine.assert_arrives(row, "Logwatch for {token} (Linux)")
        assert re.search(r"(?m)^ +1 +Accepted ", body), body

    def test_at_mails_what_a_job_prints(self, machine):
        machine.at(stdin="echo one; echo .; echo From here; echo Grüße")
        machine.assert_arrives(AT, machine.token)

    def test_at_m_mails_an_empty_body(self, machine):
        machine.at("-m", stdin="true")
        machine.assert_arrives(AT._replace(body="\n"), machine.token)

    def test_cron_mails_what_a_job_prints(self, machine, crond):
        tool("cron")
        table = machine.lay_spool() / "crontabs/payam"
        job = f"echo one; echo .; echo From here; echo Grüße; : {machine.token}"
        table.write_text(f"MAILTO=user1\n@reboot {job}\n", encoding="utf-8")
        table.chmod(0o600)
        machine.instance.give(table, "payam")
        machine.lay("/etc/crontab", "")
        machine.mounts.append("-t tmpfs none /etc/cron.d")
        crond()
        argv = "-FCronDaemon -i -B8BITMIME -oem user1"
        author = re.escape("root (Cron Daemon)")
        row = Sending("", argv, f"payam@{HOST}", author, users="user1")
        machine.assert_arrives(row, f"Cron <payam@{SHORT}> {job}")


QUEUED = int(os.environ.get("MINIMTA_TEST_QUEUE", "20000"))


def fill_queue(instance, count):
    """Puts messages into queue/ that are not due for a day."""
    run = instance.run("minimta.py", "sendmail", "-q", user="root")
    assert run.code == 0, run
    folder = instance.queue / "queue"
    owner, later = folder.stat(), time.time() + 86400
    now = time.time()
    words = {"arrived": now, "origin": "uid 0"}
    far = minimta.Envelope("payam@far.example", ["far@far.example"], **words)
    text = bytes(far) + b"Subject: later\n\ntext\n"
    for number in range(count):
        path = folder / minimta.new_id(now - number * 0.001, number % 65536)
        path.write_bytes(text)
        os.utime(path, (later, later))
        if AS_ROOT:
            os.chown(path, owner.st_uid, owner.st_gid)
    assert len(os.listdir(folder)) == count


def most_memory(instance):
    """The most memory of each process of the daemon, in MB."""
    return [memory_of(pid) >> 20 for pid in instance.pids()]


class TestLoad:
    """Much mail, large mail, slow mail."""

    def test_a_long_queue_delays_neither_start_nor_mail(self, instance):
        fill_queue(instance, QUEUED)
        began = time.monotonic()
        instance.start()
        greeted = time.monotonic() - began
        instance.send("payam@localhost", letter("new"))
        sent = time.monotonic()
        instance.wait_message_only("payam", "new")
        took = time.monotonic() - sent
        memory = most_memory(instance)
        print(f"{QUEUED}: greeting {greeted:.1f} s, mail {took:.1f} s, {memory} MB")
        assert greeted < 5 * max(1, QUEUED / 100_000)
        assert took < 5
        assert max(memory) <= 60

    def test_50_megabytes_by_smtp_fit_into_40(self, instance):
        instance.configure(message_size_limit="60M")
        instance.start()
        instance.send("payam@localhost", letter("big", LOREM * (50_000_000 // 59)))
        instance.wait_message_only("payam", "big")
        instance.wait_empty()
        memory = most_memory(instance)
        print(f"50 MB by SMTP: {memory} MB")
        assert max(memory) < 40

    def test_50_megabytes_by_sendmail_fit_into_40(self, instance):
        instance.configure(message_size_limit="60M")
        instance.start()
        instance.sendmail("payam", stdin=letter("big", LOREM * (50_000_000 // 59)))
        instance.wait_message_only("payam", "big")
        instance.wait_empty()
        memory = most_memory(instance)
        print(f"50 MB by sendmail: {memory} MB")
        assert max(memory) < 40

    def test_a_locked_mailbox_delays_nobody_else(self, server):
        path = server.make_mailbox("user1", "")
        with locked(path):
            server.send("user1@localhost", letter("waits"))
            self.assert_prompt(server)

    def test_a_slow_command_delays_nobody_else(self, server):
        server.aliases('slow: "|sleep 5"\n')
        server.send("slow@localhost", letter("waits"))
        self.assert_prompt(server)

    def test_a_silent_host_delays_nobody_else(self, instance):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            instance.configure(relayhost=f"[127.0.0.1]:{port}")
            instance.start()
            instance.send("far@example.com", letter("waits"))
            with silent.accept()[0]:
                self.assert_prompt(instance)

    @staticmethod
    def assert_prompt(server):
        """Mail for another user arrives within two seconds."""
        server.send("user2@localhost", letter("prompt"))
        wait_for(lambda: server.with_token("user2", "prompt"), 2)


def cpu_time(pid):
    """Seconds of processor time that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def smtpd_pid(instance):
    """The process that the log's last line of smtpd is from."""
    wait_for(lambda: "/smtpd[" in instance.log())
    return int(re.findall(r"/smtpd\[(\d+)\]", instance.log())[-1])


class TestShortage:
    """Descriptors and space that run out."""

    def test_more_clients_than_descriptors_get_421_or_wait(self, instance):
        instance.start(limits=[(resource.RLIMIT_NOFILE, 60)])
        pid = smtpd_pid(instance)
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(instance.port)) for _ in range(80)]
            before, began = cpu_time(pid), time.monotonic()
            sockets = [wire.socket for wire in wires]
            heads = []
            while time.monotonic() < began + 2:
                ready, _, _ = select.select(sockets, [], [], 0.2)
                heads += [one.recv(3) for one in ready]
                sockets = [one for one in sockets if one not in ready]
            used = cpu_time(pid) - before
        print(f"{heads.count(b'220')} greeted, {heads.count(b'421')} 421, {used} s CPU")
        assert b"220" in heads
        assert set(heads) <= {b"220", b"421"}
        assert used < 0.5
        wait_for(instance.is_ready)
        assert smtpd_pid(instance) == pid
        instance.send("payam@localhost", letter("after"))
        instance.wait_message("payam", "after")

    def test_less_than_queue_minfree_is_452(self, instance):
        instance.configure(queue_minfree="1000000G")
        instance.start()
        with Wire(instance.port) as wire:
            play(wire, "S: 220\nC: EHLO client.example\nS: 250")
            play(wire, "C: MAIL FROM:<friend@example.com>\nS: 452 4.3.1")

    @needs_root
    def test_a_disk_is_never_filled_and_serves_again(self, instance):
        instance.queue.mkdir(parents=True)
        instance.configure(queue_minfree="1M")
        words = ("-t", "tmpfs", "-o", "size=3m", "none", instance.queue)
        with mounted(*words):
            instance.start()
            ballast = instance.queue / "ballast"
            ballast.write_bytes(bytes(2_500_000))
            with pytest.raises(smtplib.SMTPSenderRefused) as refused:
                instance.send("payam@localhost", letter("full"))
            assert refused.value.smtp_code == 452
            assert refused.value.smtp_error.startswith(b"4.3.1")
            ballast.unlink()
            instance.send("payam@localhost", letter("again"))
            instance.wait_message("payam", "again")
            instance.kill()


@needs_root
class TestPrivileges:
    """What a user who is not root can do."""

    def as_user(self, instance, public_bin, program, *words, user="payam", stdin=""):
        return instance.run(
            program,
            *words,
            stdin=stdin,
            user=user,
            bin_dir=public_bin,
            preexec_fn=become(user),
        )

    @pytest.fixture
    def host(self, public_bin):
        """A running instance whose Python every user may run."""
        one = Instance(public_bin)
        yield one.start()
        one.close()

    def test_the_daemon_is_not_root_where_it_need_not_be(self, host):
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in host.pids()]
        uids = [re.search(r"Uid:\s+(.+)", text).group(1).split() for text in texts]
        assert [row for row in uids if "0" not in row], "every process is root's"

    def test_a_user_sends_through_the_daemon(self, host, public_bin):
        text = letter("hello")
        done = self.as_user(host, public_bin, "sendmail", "user1", stdin=text)
        assert (done.code, done.out, done.err) == (0, "", "")
        message = host.wait_message("user1", "hello")
        assert fields(message, "Return-Path") == [f"<payam@{HOST}>"]

    def test_a_user_reads_and_deletes_whatever_home_says(self, host, public_bin):
        host.send("payam@localhost", letter("read me"))
        host.wait_message("payam", "read me")
        done = host.run(
            "mail",
            stdin="1\nd\nq\n",
            user="payam",
            bin_dir=public_bin,
            env={"HOME": "/nonexistent"},
            preexec_fn=become("payam"),
        )
        assert (done.code, done.err) == (0, "")
        assert host.messages("payam") == []

    def test_a_user_sees_the_queue_while_the_daemon_runs(self, host, public_bin):
        host.sendmail("someone@example.com", stdin=letter("wait"), user="user1")
        host.wait_reason(")\n")
        done = self.as_user(host, public_bin, "mailq")
        assert (done.code, done.err) == (0, "")
        assert done.out == host.mailq()

    def test_a_user_cannot_read_the_queue_itself(self, host, public_bin):
        host.sendmail("someone@example.com", stdin=letter("wait"), user="user1")
        host.wait_reason(")\n")
        for name in ("queue", "incoming", "journal"):
            listing = subprocess.run(
                ["ls", host.queue / name],
                preexec_fn=become("payam"),
                capture_output=True,
            )
            assert listing.returncode != 0, name

    def test_without_a_daemon_a_users_mail_waits_in_the_maildrop(
        self, host, public_bin
    ):
        assert host.stop() == 0
        text = letter("dropped")
        done = self.as_user(host, public_bin, "sendmail", "user1", stdin=text)
        assert (done.code, done.out, done.err) == (0, "", "")
        (name,) = os.listdir(host.queue / "maildrop")
        found = (host.queue / "maildrop" / name).stat()
        assert found.st_uid == UIDS["payam"]
        host.start()
        message = host.wait_message("user1", "dropped")
        assert fields(message, "Return-Path") == [f"<payam@{HOST}>"]

    def test_roots_sendmail_q_empties_the_maildrop(self, host, public_bin):
        assert host.stop() == 0
        text = letter("dropped")
        self.as_user(host, public_bin, "sendmail", "user1", stdin=text)
        assert host.run("sendmail", "-q", user="root").code == 0
        host.wait_message("user1", "dropped")

    def test_a_hostile_maildrop_does_no_harm(self, host, public_bin):
        drop = host.queue / "maildrop"
        secret = host.write("secret", "very secret\n")
        secret.chmod(0o600)
        (drop / "0000000001").symlink_to(secret)
        os.mkfifo(drop / "0000000002")
        (drop / "0000000003").write_bytes(b"\xff\0 not a message of ours")
        os.chown(drop / "0000000003", UIDS["payam"], UIDS["payam"])
        host.send("payam@localhost", letter("well"))
        wait_for(lambda: host.with_token("payam", "well"))
        assert secret.read_text() == "very secret\n"
        assert all("very secret" not in text for text in host.messages("payam"))

    def test_the_mail_of_another_cannot_be_read(self, host, public_bin):
        host.send("user1@localhost", letter("private"))
        host.wait_message("user1", "private")
        done = self.as_user(host, public_bin, "mail", "-u", "user1", stdin="1\nx\n")
        assert done.code != 0
        assert "private" not in done.out
        assert "Traceback" not in done.err


# Recipient -> the places that get a copy, see Landed.
WAYS = {
    "payam": ["payam"],
    "user1": ["user1"],
    "user2": ["user2", "copy"],  # by ~/.forward
    "trio": ["payam", "user1", "user2", "copy"],  # by an alias
    "prog": ["command"],
    "far@far.example": ["relay"],
}
# Where a copy cannot be looked for: kind of destination -> place.
OUTSIDE = {"pipe": "command", "remote": "relay"}


def furnish(instance, sink):
    """Has `instance` deliver in every way of WAYS; not started yet."""
    instance.out = open_folder(instance) / "out"
    instance.aliases(
        f'trio: {", ".join(LOCAL_USERS)}\nprog: "|grep ^Subject: >>{instance.out}"\n'
    )
    instance.forward("user2", "\\user2, ~/copy\n")
    instance.configure(
        minimal_backoff_time="1s",
        maximal_backoff_time="1s",
        relayhost=f"[127.0.0.1]:{sink.port}",
    )
    return instance


class Postman:
    """Clients that send by SMTP and by sendmail, whatever the server does.

    Every attempt is a message of its own, and is made once: what was accepted
    must arrive, what was refused or cut short may not arrive twice.
    """

    CLIENTS = 4
    PROGRAMS = 2

    def __init__(self, instance, seed):
        self.instance = instance
        self.tried = {}  # token -> recipients
        self.accepted = {}
        self.changed = threading.Condition()
        self.gate = threading.Lock()  # its holder lets nobody start a program
        self.is_over = False
        self.errors = []
        senders = [self.by_smtp] * self.CLIENTS + [self.by_sendmail] * self.PROGRAMS
        self.threads = [
            threading.Thread(
                target=self.send_all, args=(send, f"{seed} {number}"), daemon=True
            )
            for number, send in enumerate(senders)
        ]

    def send_all(self, send, seed):
        chance = random.Random(seed)
        try:
            while not self.is_over:
                send(chance)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 for judge()
            self.errors.append(error)

    def connect(self):
        with contextlib.suppress(OSError, smtplib.SMTPException):
            return self.instance.smtp()
        return None

    def by_smtp(self, chance):
        """One connection, as many messages as it lives for."""
        client = wait_for(lambda: self.is_over or self.connect(), 4 * PATIENCE)
        if self.is_over:
            return
        with contextlib.suppress(OSError, smtplib.SMTPException):
            for _ in range(chance.randint(1, 3)):
                token, to, text = self.write(chance)
                to = [name if "@" in name else f"{name}@localhost" for name in to]
                client.sendmail("friend@example.com", to, text)
                self.accept(token)
            client.quit()
        client.close()

    def by_sendmail(self, chance):
        token, to, text = self.write(chance)
        with self.gate:
            child = subprocess.Popen(
                [self.instance.bin / "sendmail", *to],
                stdin=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self.instance.env(),
            )
        child.communicate(text.encode(), PATIENCE)
        if child.returncode == 0:
            self.accept(token)

    def write(self, chance):
        """A new message: its token, recipients and text."""
        to = chance.sample(sorted(WAYS), chance.randint(1, 3))
        size = min(50_000, int(200 * chance.paretovariate(1)))
        with self.changed:
            token = f"attempt{len(self.tried) + 1}."
            self.tried[token] = to
        text = letter(token, LOREM * (size // len(LOREM)), f"END {token}")
        return token, to, text

    def accept(self, token):
        with self.changed:
            self.accepted[token] = self.tried[token]
            self.changed.notify_all()

    def start(self):
        for thread in self.threads:
            thread.start()
        return self

    def wait_accepted(self, more):
        """Until so many messages more are accepted."""
        with self.changed:
            count = len(self.accepted) + more
            assert self.changed.wait_for(
                lambda: len(self.accepted) >= count or self.errors, 4 * PATIENCE
            )

    def end(self):
        """No message more; what was begun is ended."""
        self.is_over = True
        for thread in self.threads:
            thread.join()


class Landed:
    """What arrived, held against what a postman sent.

    `lost`, `phantoms`, `doubled` and `repeated` (outside) hold (place, token);
    `hidden` are messages that a reader of the mailbox would not see, `torn`
    those without their end.
    """

    def __init__(self, instance, sink, postman):
        self.count = {}
        self.torn = []
        self.hidden = 0
        for user in LOCAL_USERS:
            self.read(user, instance.mailbox(user))
        self.read("copy", instance.home("user2") / "copy")
        if instance.out.exists():
            for line in instance.out.read_text().splitlines():
                self.add("command", line.partition(" ")[2])
        for _, _, text in list(sink.received):
            token = re.search(rb"(?m)^Subject: (.*)\r$", text).group(1).decode()
            self.add("relay", token)
        places = {
            token: {place for name in to for place in WAYS[name]}
            for token, to in postman.tried.items()
        }
        self.lost = sorted(
            (place, token)
            for token in postman.accepted
            for place in places[token]
            if (place, token) not in self.count
        )
        self.phantoms = [
            key for key in self.count if key[0] not in places.get(key[1], ())
        ]
        more = [key for key, count in self.count.items() for _ in range(count - 1)]
        self.doubled = [key for key in more if key[0] not in OUTSIDE.values()]
        self.repeated = [key for key in more if key[0] in OUTSIDE.values()]

    def add(self, place, token):
        self.count[place, token] = self.count.get((place, token), 0) + 1

    def read(self, place, path):
        data = path.read_bytes() if path.exists() else b""
        messages = read_mbox(data) if data else []
        self.hidden += data.count(b"\nSubject: ") - len(messages) + data.count(b"\0")
        for message in messages:
            (token,) = fields(message, "Subject")
            if message.endswith(f"\nEND {token}\n\n"):
                self.add(place, token)
            else:
                self.torn.append((place, token))


@pytest.fixture(scope="class")
def tally():
    """Figures of the tests of a class, printed at their end."""
    figures = collections.Counter()
    yield figures
    if figures:
        print(f"\n{figures_text(figures)} in all")


def figures_text(figures):
    return ", ".join(f"{count} {name}" for name, count in figures.items())


class Rack:
    """A furnished instance under load, and what is done to it."""

    KINDS = ("all", "master", "server", "runner", "courier")

    def __init__(self, instance, sink, seed):
        print(f"MINIMTA_TEST_SEED={SEED}: {seed}")
        self.instance = furnish(instance, sink)
        self.instance.start()
        self.sink = sink
        self.refused = 0  # starts, while sendmail was at the queue
        self.chance = random.Random(seed)
        self.postman = Postman(instance, seed).start()
        self.couriers = 0  # that were at work, at all kills
        self.unsettled = set()  # (place, token) not noted as done, at a kill

    def look(self, runner):
        """Notes what the death of the runner or a courier may repeat.

        What was handed to a courier, and is not in the journal, is in flight.
        """
        spool = minimta.Spool(str(self.instance.queue), minimta.User("", 0, 0, "", "/"))
        self.couriers += len(children(runner))
        for queue_id in spool.ids():
            kinds = {
                a.destination.split()[0] for a in spool.journal(queue_id) if a.is_final
            }
            try:
                text = Path(spool.path("queue", queue_id)).read_text()
            except FileNotFoundError:
                continue  # the runner was not stopped yet: it is done with it
            token = re.search(r"(?m)^Subject: (.*)$", text).group(1)
            self.unsettled |= {
                (place, token) for kind, place in OUTSIDE.items() if kind not in kinds
            }

    def kill(self, kind):
        """kill -9 of that part; returns when everything runs again."""
        master, server, runner = parts(self.instance)
        if kind != "server":
            os.kill(runner, signal.SIGSTOP)  # what is in flight now, stays it
            self.look(runner)
        if kind == "all":
            with self.postman.gate:
                self.instance.kill()
            self.start()
        elif kind == "master":
            os.kill(master, signal.SIGKILL)
            os.kill(runner, signal.SIGCONT)
            self.instance.process.wait()
            self.start()
        elif kind == "courier":
            for pid in children(runner)[:1]:
                os.kill(pid, signal.SIGKILL)
            os.kill(runner, signal.SIGCONT)
        else:
            victim = server if kind == "server" else runner
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in parts(self.instance))

    def start(self):
        """Starts the daemon; where sendmail keeps it from that, without it."""
        try:
            self.instance.start()
            parts(self.instance)  # another's server may have answered
        except pytest.fail.Exception as failure:
            if "another minimta runs the queue" not in str(failure):
                raise
            self.refused += 1
            with self.postman.gate:
                wait_for(self.is_idle, 4 * PATIENCE)
                self.instance.start()

    def is_idle(self):
        """Whether no program of the instance runs."""
        return not self.instance.pids()

    def crash(self, kind):
        """A kill at a random moment."""
        self.postman.wait_accepted(self.chance.randint(1, 60))
        self.kill(kind)

    def finish(self):
        """Ends the load, lets everything arrive; what did."""
        instance = self.instance
        self.postman.end()
        assert self.postman.errors == []
        assert instance.stop() == 0
        drafts = list((instance.queue / "incoming").iterdir())
        for path in drafts:  # two days later:
            os.utime(path, (0, time.time() - 2 * 24 * 3600))
        self.start()
        wait_for(lambda: not instance.queued(), 4 * PATIENCE)
        assert instance.stop() == 0
        found = (
            path.relative_to(instance.queue) for path in instance.queue.glob("*/*")
        )
        self.left = [str(path) for path in found if path.parts[0] != "trace"]
        mailboxes = instance.mailbox("payam").parent.iterdir()
        self.left += sorted({path.name for path in mailboxes} - {*LOCAL_USERS})
        return Landed(instance, self.sink, self.postman)

    def judge(self, found, tally):
        """Nothing is lost, hidden, torn, invented, doubled or left over."""
        figures = {
            "accepted": len(self.postman.accepted),
            "lost": len(found.lost),
            "hidden": found.hidden,
            "torn": len(found.torn),
            "phantoms": len(found.phantoms),
            "doubled": len(found.doubled),
            "couriers at the kills": self.couriers,
            "repeated by couriers": len(found.repeated),
            "left over": len(self.left),
            "starts refused": self.refused,
        }
        print(figures_text(figures))
        tally.update(figures)
        assert (found.lost, found.hidden, found.torn) == ([], 0, [])
        assert (found.phantoms, found.doubled, self.left) == ([], [], [])


@pytest.fixture
def make_rack(instance, make_sink):
    """Makes the rack of a test, and ends its load however the test ends."""
    made = []

    def make(seed):
        made.append(Rack(instance, make_sink(), f"{SEED} {seed}"))
        return made[-1]

    yield make
    for rack in made:
        rack.postman.end()


def children(pid):
    """The processes that `pid` has started, but for those that are dead."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            text = Path("/proc", name, "stat").read_text()
            state, parent = text.rpartition(")")[2].split()[:2]
            if parent == str(pid) and state not in "ZX":
                found.append(int(name))
    return sorted(found)


def parts(instance):
    """The pids of master, SMTP server and runner, once all of them run."""

    def sockets(pid):
        names = os.listdir(f"/proc/{pid}/fd")
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in names]
        return sum(link.startswith("socket:") for link in links)

    def is_complete():
        if instance.process.poll() is not None:
            pytest.fail("the daemon ended: " + instance.stderr()[-2000:])
        with contextlib.suppress(OSError):
            found = sorted(
                (sockets(pid), pid) for pid in children(instance.process.pid)
            )
            # The C library's may be left, where close() was made to fail.
            if len(found) == 2 and found[0][0] < 2 <= found[1][0]:
                return [pid for _, pid in found]
        return None

    runner, server = wait_for(is_complete, 4 * PATIENCE)
    return instance.process.pid, server, runner


class TestCrash:
    """kill -9 of any process, in the middle."""

    ROUND = 10  # kills of one instance

    @pytest.mark.parametrize("number", range(-(-CRASHES // ROUND)))
    def test_no_kill_loses_or_doubles_what_was_accepted(self, make_rack, tally, number):
        rack = make_rack(number)
        count = min(self.ROUND, CRASHES - number * self.ROUND)
        kinds = 2 * Rack.KINDS
        for kind in rack.chance.sample(kinds, len(kinds))[:count]:
            rack.crash(kind)
        found = rack.finish()
        tally["kills"] += count
        rack.judge(found, tally)
        assert set(found.repeated) <= rack.unsettled

    def test_a_daemon_starts_while_sendmail_still_delivers(self, instance):
        fifo = open_folder(instance) / "fifo"
        os.mkfifo(fifo)
        fifo.chmod(0o666)
        instance.aliases(f'slow: "|cat {fifo}"\n')
        instance.sendmail("slow", stdin=letter("slow"))  # and goes on behind us

        def began():
            with contextlib.suppress(OSError):
                return os.fdopen(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb")
            return None

        with wait_for(began):
            instance.start()
        instance.wait_empty()

    def test_a_kill_before_delivery_loses_nothing(self, instance):
        instance.start()
        instance.mailbox("payam").mkdir(parents=True)
        instance.send("payam@localhost", letter("kept"))
        instance.wait_reason(")\n")
        instance.kill()
        instance.mailbox("payam").rmdir()
        instance.start()
        assert instance.run("sendmail", "-q", user="root").code == 0
        instance.wait_message("payam", "kept")

    def test_a_second_kill_during_the_repair_loses_nothing(self, make_rack, tally):
        rack = make_rack("repair")
        rack.postman.wait_accepted(60)
        for _ in range(3):
            rack.kill("all")
        tally["kills"] += 3
        rack.judge(rack.finish(), tally)


class Disk:
    """A file system in a file, whose power can be cut."""

    SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, _IOR('X', 125, u32)
    NO_LOG_FLUSH = 2  # what is not in the journal on disk is gone

    def __init__(self, kind, image, place):
        self.image, self.place = image, place
        with open(image, "wb") as file:
            file.truncate(1 << 29)
        self.run(f"mkfs.{kind}", "-q", image)
        place.mkdir()
        self.is_mounted = False
        self.mount()

    def run(self, *words):
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip(f"there is no {words[0]} here")
        if done.returncode:
            pytest.skip(f"{words[0]}: {done.stderr.strip()}")

    def mount(self):
        self.run("mount", "-o", "loop", self.image, self.place)
        self.is_mounted = True

    def cut(self):
        """Power off, and on again: what the disk has not got is gone."""
        fd = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, self.SHUTDOWN, struct.pack("I", self.NO_LOG_FLUSH))
        finally:
            os.close(fd)
        self.close()
        self.mount()

    def close(self):
        """Unmounted, as soon as the kernel has buried who was killed."""
        if self.is_mounted:
            wait_for(lambda: not subprocess.call(["umount", "-q", self.place]))
        self.is_mounted = False


@needs_root
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
class TestPowerCut:
    """The disk with the queue, the mailboxes and the log has no power."""

    @pytest.fixture
    def disk(self, instance, kind):
        one = Disk(kind, instance.top / "image", instance.root / "var")
        yield one
        instance.kill()
        one.close()

    def test_a_power_cut_loses_or_doubles_nothing_that_was_accepted(
        self, instance, kind, disk, make_rack, tally
    ):
        rack = make_rack(kind)
        for _ in range(CUTS):
            rack.postman.wait_accepted(rack.chance.randint(1, 200))
            with rack.postman.gate:
                for pid in instance.pids():
                    with contextlib.suppress(ProcessLookupError):  # a courier's end
                        os.kill(pid, signal.SIGSTOP)
                instance.kill()
                disk.cut()
            rack.start()
        tally[f"cuts of {kind}"] += CUTS
        rack.judge(rack.finish(), tally)


# strace kills the process at the k-th call of each of these, for every k.
DEADLY_CALLS = ("write", "fsync", "rename", "link", "unlink", "ftruncate", "fchown")


@pytest.mark.skipif(not shutil.which("strace"), reason="there is no strace here")
class TestEveryInstant:
    """A kill -9 at every system call that matters, one after the other."""

    def killed_at(self, instance, call, count, *words, stdin=""):
        """Run sendmail, killed at that call; whether it came so far."""
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        command += ["-e", f"inject={call}:signal=SIGKILL:when={count}"]
        command += [instance.bin / "sendmail", *words]
        how = {"input": stdin.encode(), "capture_output": True, "env": instance.env()}
        return subprocess.run(command, timeout=PATIENCE, **how).returncode != 0

    def kills(self, make_instance, call, prepare, *words, stdin=""):
        """An instance for each count that kills, until none does."""
        for count in itertools.count(1):
            instance = make_instance()
            box = instance.mailbox("payam").parent
            box.mkdir(parents=True)
            box.chmod(0o1777)  # where a user may make locks
            prepare(instance)
            was_killed = self.killed_at(instance, call, count, *words, stdin=stdin)
            assert instance.run("sendmail", "-q").code == 0
            yield instance, was_killed
            if not was_killed:
                return

    @pytest.mark.parametrize("call", DEADLY_CALLS)
    def test_queued_mail_arrives_once(self, make_instance, call):
        def prepare(instance):
            words = ("-odq", "payam", "user1", "nosuchuser")
            instance.run("sendmail", *words, stdin=letter("fragile"), user="user2")

        for instance, _ in self.kills(make_instance, call, prepare, "-q"):
            for user in LOCAL_USERS:  # user2 gets the report
                assert len(instance.with_token(user, "fragile")) == 1
                assert len(instance.messages(user)) == 1
            assert instance.queued() == []
            left = {path.name for path in instance.mailbox("payam").parent.iterdir()}
            assert left == set(LOCAL_USERS)

    @pytest.mark.parametrize("call", DEADLY_CALLS)
    def test_mail_of_every_kind_arrives_once(self, make_instance, call):
        def prepare(instance):
            drop = open_folder(instance)
            members = instance.write("list", f"user1\n{drop}/listed\n")
            instance.give(members, "user1")
            instance.aliases(
                f"all: {drop}/file, {drop}/box/, :include:{members}\n"
                "owner-all: user2\nbad: error:550 5.7.1 no, user2\n"
            )
            instance.forward("user1", "\\user1, ~/copy\n")
            words = ("-odq", "all", "bad", "nosuchuser", "payam")
            result = instance.run("sendmail", *words, stdin=letter("frail"))
            assert result.code == 0, result

        for instance, _ in self.kills(make_instance, call, prepare, "-q"):
            drop, home = instance.root / "drop", instance.home("user1")
            texts = [path.read_text() for path in (drop / "box/new").iterdir()]
            places = (drop / "file", drop / "listed", home / "copy")
            texts += [path.read_text() for path in places]
            texts += instance.with_token("user1", "frail")
            assert [text.count("Subject: frail") for text in texts] == [1] * 5
            # payam's copy, and one report of what failed
            assert len(instance.with_token("payam", "frail")) == 2
            assert instance.messages("user2") == []
            assert instance.queued() == []

    @pytest.mark.parametrize("call", DEADLY_CALLS)
    def test_a_command_is_run_for_what_is_queued(self, make_instance, call):
        def prepare(instance):
            path = open_folder(instance) / "out"
            instance.aliases(f'prog: "|grep Subject >>{path}"\n')
            instance.run("sendmail", "-odq", "prog", stdin=letter("frail"))

        for instance, was_killed in self.kills(make_instance, call, prepare, "-q"):
            count = (instance.root / "drop/out").read_text().count("frail")
            assert count == 1 or was_killed and count == 2  # it was in flight
            assert instance.queued() == []

    @pytest.mark.parametrize("call", DEADLY_CALLS)
    def test_mail_that_is_handed_in_is_whole_or_not_there(self, make_instance, call):
        words = ("-odi", "payam")
        text = letter("handed in")
        kills = self.kills(make_instance, call, Instance.mailq, *words, stdin=text)
        for instance, was_killed in kills:
            found = instance.messages("payam")
            assert len(found) <= 1
            assert was_killed or len(found) == 1
            assert all(message.endswith("\ntext\n\n") for message in found)
            assert instance.queued() == []


# What fails -> the system calls that fail; ? for those not every machine has.
CALLS = {
    "fsync": "fsync",
    "rename": "?rename,?renameat,renameat2",
    "write": "write",
    "open": "?open,openat",
    "unlink": "?unlink,unlinkat",
    "close": "close",
    "ftruncate": "ftruncate",
    "fsync and ftruncate": "fsync,ftruncate",
    "every change": "fsync,ftruncate,?rename,?renameat,renameat2,?unlink,unlinkat",
}
FAULTS = [
    *itertools.product(("fsync", "rename", "write", "open"), ("EIO", "ENOSPC")),
    *itertools.product(("unlink", "close", "ftruncate"), ("EIO",)),
    *itertools.product(("fsync and ftruncate", "every change"), ("EIO",)),
    *[("write", "EDQUOT"), ("open", "EMFILE"), ("close", "ENOSPC")],
]
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=" ".join)
# The k-th call fails, or all from it on; all k where there is time for it.
SOME_INSTANTS = ("1", "2", "1+")


def instants():
    """1, 1+, 2, 2+ and so on, or some of them.

    The first makes the mailbox, whatever else fails.
    """
    if CRASHES < 100:
        return SOME_INSTANTS
    return (f"{k}{more}" for k in itertools.count(1) for more in ("", "+"))


class Fault:
    """System calls of a process and its children fail while a block lasts."""

    def __init__(self, instance, pid, fault, when):
        calls, error = CALLS[fault[0]], fault[1]
        self.pid = pid
        self.path = instance.top / "trace"
        self.line = ["strace", "-f", "-qq", "-o", self.path, "-p", str(pid)]
        self.line += ["-e", f"trace={calls},?select,pselect6"]
        self.line += ["-e", f"inject={calls}:error={error}:when={when}"]

    def __enter__(self):
        self.tracer = subprocess.Popen(self.line, stderr=subprocess.PIPE)
        wait_for(lambda: self.has_ended() or self.is_attached())
        why = self.has_ended() and self.tracer.stderr.read().decode().strip()
        if why:
            pytest.skip(why)
        return self

    def __exit__(self, *_):
        self.tracer.send_signal(signal.SIGINT)
        self.tracer.communicate()

    def is_attached(self):
        """Whether no thread of the process is left out."""
        texts = [
            path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/status")
        ]
        return all("\nTracerPid:\t0\n" not in text for text in texts)

    def has_ended(self):
        """Whether there is nothing more to trace."""
        return self.tracer.poll() is not None

    def lines(self):
        return self.path.read_text(errors="replace").splitlines()

    @property
    def was_met(self):
        """Whether a call failed."""
        return any(line.endswith("(INJECTED)") for line in self.lines())

    def is_over(self):
        """Whether the process waits for something new, or is gone."""
        own = [line for line in self.lines() if line.startswith(f"{self.pid} ")]
        return self.has_ended() or bool(own) and "select" in own[-1].partition("(")[0]


@pytest.mark.skipif(not shutil.which("strace"), reason="there is no strace here")
class TestFaults:
    """A disk that fails at any call, for once or from then on."""

    @pytest.fixture
    def server(self, instance):
        """A running instance; pair@ is two places, a mailbox and a file."""
        instance.out = open_folder(instance) / "file"
        instance.aliases(f"pair: payam, {instance.out}\n")
        instance.configure(minimal_backoff_time="1s", maximal_backoff_time="1s")
        instance.start()
        instance.send("user1@localhost", letter("first"))
        instance.wait_message("user1", "first")
        return instance

    def offer(self, server, token):
        """The code that a message gets; None where the server just goes."""
        try:
            client = smtplib.SMTP("127.0.0.1", server.port, "client.example", 10)
            client.sendmail("friend@example.com", "payam@localhost", letter(token))
        except smtplib.SMTPRecipientsRefused as error:
            return error.recipients["payam@localhost"][0]
        except smtplib.SMTPResponseException as error:
            return error.smtp_code
        except (OSError, smtplib.SMTPException):
            return None
        with contextlib.suppress(OSError, smtplib.SMTPException):
            client.quit()
        return 250

    @each_fault
    def test_what_is_accepted_arrives_once_and_nothing_else(self, server, fault):
        pids = parts(server)
        codes = {}
        for when in instants():
            with Fault(server, pids[1], fault, when) as met:
                token = new_token() + "."
                codes[token, f"the call {when}"] = self.offer(server, token)
            token = new_token() + "."
            codes[token, f"after {when}"] = self.offer(server, token)
            if not met.was_met and when not in SOME_INSTANTS:
                break
        server.wait_empty()
        wrong = []
        for (token, what), code in codes.items():
            count = len(server.with_token("payam", token))
            refused = code and code // 100 == 4 and "after" not in what
            if (code != 250 and not refused) or count != (code == 250):
                wrong.append(f"{what}: answer {code}, copies {count}")
        assert not wrong, "\n".join(wrong)
        if "unlink" not in CALLS[fault[0]]:  # else it is swept when it is old
            assert os.listdir(server.queue / "incoming") == []
        assert parts(server) == pids

    def deliver(self, server, pid, fault, when):
        """Has mail delivered meanwhile: (token, whether a call failed)."""
        token = new_token() + "."
        with Fault(server, pid, fault, when) as met:
            server.send("pair@localhost", letter(token))
            wait_for(lambda: met.is_over() and (met.was_met or not server.queued()))
        assert server.run("sendmail", "-q", user="root").code == 0
        return token, met.was_met

    @each_fault
    def test_what_was_accepted_is_delivered_once(self, server, fault):
        pids = parts(server)
        wrong = []
        for when in instants():
            token, was_met = self.deliver(server, pids[2], fault, when)
            with contextlib.suppress(pytest.fail.Exception):
                server.wait_empty()
            copies = [
                path.read_text().count(f"\nSubject: {token}\n\ntext\n\n")
                for path in (server.mailbox("payam"), server.out)
            ]
            if (copies, server.queued()) != ([1, 1], []):
                wrong.append(f"the call {when}: {copies}, queue {server.queued()}")
            if parts(server) != pids:
                wrong.append(f"the call {when}: {pids} are {parts(server)}")
                pids = parts(server)
            if not was_met and when not in SOME_INSTANTS or server.queued():
                break
        assert not wrong, "\n".join(wrong)
        for path in (server.mailbox("payam"), server.out):
            messages = read_mbox(path.read_bytes())
            assert len(messages) == path.read_text().count("\nSubject: ")
            assert all(text.endswith("\n\ntext\n\n") for text in messages)

    @pytest.mark.parametrize("error", ["EMFILE", "EIO"])
    def test_a_queue_that_cannot_be_listed_is_listed_later(self, server, error):
        pids = parts(server)
        with Fault(server, pids[2], ("open", error), "1+") as met:
            assert server.run("sendmail", "-q", user="root").code == 0
            wait_for(lambda: met.was_met and met.is_over())
        server.send("payam@localhost", letter("later"))
        server.wait_message("payam", "later")
        assert parts(server) == pids


# == House: the laws of the file ==============================================
# Read with ast: what minimta.py promises about itself.


SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
ROOMS = [
    node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
]
UNTOUCHED_BY_WORDS = {
    *("open", "print", "os", "sys", "socket", "subprocess", "fcntl", "random"),
    *("time.time", "time.sleep"),
}


def bound_names(node):
    """The names that a definition, assignment or import binds in place."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(item.asname or item.name).split(".")[0] for item in node.names]
    return [
        inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
    ]


def inner_names(room):
    """The names that are bound somewhere inside a definition."""
    names = {node.arg for node in ast.walk(room) if isinstance(node, ast.arg)}
    for node in ast.walk(room):
        if node is not room:
            names.update(bound_names(node))
    return names


def used_names(node):
    """Name -> line, for every name and every `a.b` that a node reads."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
            yield inner.id, inner.lineno
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            yield f"{inner.value.id}.{inner.attr}", inner.lineno


def storey(name):
    """The line where the storey `name` begins."""
    (line,) = (
        number
        for number, text in enumerate(SOURCE.splitlines(), 1)
        if re.match(rf"# {name}\b", text)
    )
    return line


class TestHouse:
    """The laws that the front page of minimta.py names."""

    def test_a_name_is_given_once_and_has_its_whole_value_there(self):
        # Byte code is kept by names: nothing else in the file is run.
        names = [name for node in TREE.body for name in minimta.bound_names(node)]
        assert sorted(name for name in set(names) if names.count(name) > 1) == []
        bare = [node.lineno for node in TREE.body[1:] if not minimta.bound_names(node)]
        assert bare == [TREE.body[-1].lineno]

    def test_a_name_uses_only_names_above_it(self):
        born = {}
        for node in TREE.body:
            for name in bound_names(node):
                born.setdefault(name, node.lineno)
        upward = []
        for room in ROOMS:
            inside = inner_names(room)
            for name, line in used_names(room):
                if name not in inside and born.get(name, 0) > room.end_lineno:
                    upward.append(f"line {line}: {room.name} uses {name}")
        assert upward == []

    def test_a_name_has_all_of_its_value_where_it_is_born(self):
        """Each is loaded by itself: a line that adds to it is not run."""
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        imports = (ast.Import, ast.ImportFrom)
        _, *nodes, main = TREE.body
        others = [node for node in nodes if not isinstance(node, kinds + imports)]
        assert isinstance(main, ast.If)
        assert [f"line {node.lineno}" for node in others] == []

    def test_the_banners_are_the_contents(self):
        banners = re.findall(r"(?m)^# == (\d+ [^:=\n]+?) *[:=]", SOURCE)
        _, _, contents = SOURCE.partition("\nCONTENTS")
        contents = re.split(r"\n(?=\S)", contents)[0]
        entries = [
            entry
            for line in contents.splitlines()
            for entry in re.split(r"\s{3,}", line.strip())
            if re.match(r"\d+ \S", entry)
        ]
        assert banners
        assert entries == banners

    def test_banners_are_numbered_and_reach_column_79(self):
        banners = re.findall(r"(?m)^# == .*$", SOURCE)
        numbers = [int(re.match(r"# == (\d+)", line).group(1)) for line in banners]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert [line for line in banners if len(line) != 79] == []

    def test_no_function_is_longer_than_45_lines(self):
        functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
        sizes = {
            f"{node.name}, line {node.lineno}": node.end_lineno - node.lineno + 1
            for node in functions
        }
        assert {name: size for name, size in sizes.items() if size > 45} == {}

    def test_every_room_says_what_it_is(self):
        assert [room.name for room in ROOMS if not ast.get_docstring(room)] == []

    def test_words_touch_nothing_outside(self):
        first, last = storey("WORDS"), storey("HANDS")
        found = [
            f"line {line}: {name}"
            for node in TREE.body
            if first < node.lineno < last
            for name, line in used_names(node)
            if name in UNTOUCHED_BY_WORDS
        ]
        assert first < last
        assert found == []

    def test_every_setting_is_in_the_manual(self):
        manual = (HERE / "README.md").read_text(encoding="utf-8")
        names = [getattr(row, "name", None) or row[0] for row in minimta.SETTINGS]
        assert len(names) > 20
        missing = [name for name in names if not re.search(rf"\b{name}\b", manual)]
        assert missing == []
