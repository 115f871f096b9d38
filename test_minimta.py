"""Tests of minimta.py, in the order of its sections; the program comes last.

    python3 -m pytest test_minimta.py

Test names are claims.  Dialogues are written with C: for what the client says
and S: for how the server's answer begins.  Nothing here needs an account, a
port below 1024 or the network: every test has its own private instance under
a temporary directory.  What needs root, and is skipped without, says so.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import email.header
import email.utils
import fcntl
import importlib
import itertools
import os
import pty
import pwd
import random
import re
import resource
import select
import shutil
import signal
import smtplib
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from email import message_from_bytes
from pathlib import Path

import pytest

import minimta

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "minimta.py"
CRASHES = int(os.environ.get("MINIMTA_TEST_CRASHES", "3"))
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
            timeout=PATIENCE,
            **how,
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


class SinkHandler(socketserver.StreamRequestHandler):
    """One connection to a SmtpSink; answers what the sink's table says."""

    timeout = PATIENCE

    def handle(self):
        self.say("CONNECT")
        self.sender, self.recipients, self.is_lmtp = None, [], False
        while True:
            line = self.rfile.readline().decode().strip()
            verb = line[:4].upper()
            if not verb:
                return
            self.is_lmtp |= verb == "LHLO"
            self.say(line, verb)
            if verb == "QUIT":
                return

    def say(self, line, verb=None):
        answer = self.server.answer(line, verb or line)
        if verb == "DATA" and not self.recipients:
            answer = "554 5.5.1 No recipients"
        self.wfile.write(answer.replace("\n", "\r\n").encode() + b"\r\n")
        if answer.startswith("354"):
            self.take_message()
        elif verb == "MAIL" and answer.startswith("2"):
            self.sender, self.recipients = line, []
        elif verb == "RCPT" and answer.startswith("2"):
            self.recipients.append(re.search("<(.*)>", line).group(1))
            self.server.commands.append(line)

    def take_message(self):
        text = b""
        while not text.endswith(b"\r\n.\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            text += line
        each = [f"END {name}" for name in self.recipients]  # RFC 2033
        ends = each if self.is_lmtp else ["END"]
        answers = [self.server.answer(end, "END") for end in ends]
        if any(answer.startswith("2") for answer in answers):
            self.server.received.append((self.sender, self.recipients, text))
        self.wfile.write("".join(f"{answer}\r\n" for answer in answers).encode())


SINK_ANSWERS = {
    "CONNECT": "220 sink.example ESMTP",
    "EHLO": "250-sink.example\n250-PIPELINING\n250-8BITMIME\n250 SIZE 99999999",
    "HELO": "250 sink.example",
    "LHLO": "250-store.example\n250-PIPELINING\n250 8BITMIME",
    "DATA": "354 Go on",
    "END": "250 2.0.0 Kept",
    "QUIT": "221 2.0.0 Bye",
}


class Sink:
    """A real SMTP server that answers from a table and keeps what it accepts.

    A row is a whole command or a verb; CONNECT is the greeting, END the answer
    to the end of the message.  A list is used up until its last element.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, place=("127.0.0.1", 0), **answers):
        self.answers = {**SINK_ANSWERS, **answers}
        self.received = []
        self.commands = []
        super().__init__(place, SinkHandler)
        self.port = self.server_address[1]
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, line, verb):
        row = self.answers.get(line, self.answers.get(verb, "250 2.0.0 Ok"))
        if isinstance(row, list):
            return row.pop(0) if len(row) > 1 else row[0]
        return row

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

    def __init__(self, instance, program, *args, user="payam"):
        self.shown = ""
        self.end, theirs = pty.openpty()
        self.child = subprocess.Popen(
            [instance.bin / program, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=instance.env(user),
            cwd=instance.home(user),
            start_new_session=True,
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
    ("relayhost = [mx.example]:587", "[mx.example]:587"),
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


# == 4 Messages: DotReader, InputReader, Header, received_field, mbox_quoted ==


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


# == 7 Dialogue: Reply, Client, Transaction, Session ==========================


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
            *("250-ENHANCEDSTATUSCODES", "250-SMTPUTF8", "250-DSN", "250 HELP"),
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


# == 8 Reports: ReportKind, Event, Report =====================================


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


# == 9 Trees: Branch ==========================================================


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


# == 10 Names: Record, encode_question, decode_answer =========================


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
        QUESTION, wire_record("x.example", "MX", (1, "a\nb.example"))
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
        assert [one.data for one in answer.follow("x.example", "MX")] == wanted

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

    @pytest.mark.parametrize("name", ["a..b", "", ".", "x" * 64, "a." * 130 + "b"])
    def test_what_is_no_name_is_not_asked_for(self, name):
        with pytest.raises(ValueError, match="."):
            minimta.encode_name(name)


# == 11 Log: Log ==============================================================


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
        lambda log: log.active("ID", 321, LETTER),
        "minimta/qmgr ID: from=<alice@far.example>, size=321, nrcpt=1 (queue active)",
    ),
    (
        lambda log: log.attempt("ID", delivered("mailbox bob@host.example"), 0.0),
        "minimta/local ID: to=<bob@host.example>, relay=local, delay=1.5, "
        "dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("mailbox bob@x", "team@x"), 0.0),
        "minimta/local ID: to=<bob@x>, orig_to=<team@x>, relay=local, delay=1.5, "
        "dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("remote a@b", "a@b"), 0.0),
        "minimta/smtp ID: to=<a@b>, relay=local, delay=1.5, "
        "dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("pipe 65534 cat x", "a@b"), 0.0),
        "minimta/local ID: to=<a@b>, relay=local, delay=1.5, "
        "dsn=2.0.0, status=sent (delivered to mailbox)",
    ),
    (
        lambda log: log.attempt("ID", delivered("lmtp a@b", "a@b"), 0.0),
        "minimta/lmtp ID: to=<a@b>, relay=local, delay=1.5, "
        "dsn=2.0.0, status=sent (delivered to mailbox)",
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
        assert logged(tmp_path / "log") == [wanted]

    @pytest.mark.parametrize(
        ("delay", "wanted"),
        [(0, "0"), (1.5, "1.5"), (12, "12"), (432, "432"), (86400, "86400")],
    )
    def test_a_delay_is_a_plain_number(self, tmp_path, delay, wanted):
        attempt = delivered("mailbox bob@x", when=1000.0 + delay)
        make_log(tmp_path / "log").attempt("ID", attempt, 1000.0)
        assert f", delay={wanted}, dsn=" in logged(tmp_path / "log")[0]

    def test_a_clock_that_was_set_back_makes_no_negative_delay(self, tmp_path):
        make_log(tmp_path / "log").attempt("ID", delivered("mailbox bob@x"), 1000.0)
        assert ", delay=0, dsn=" in logged(tmp_path / "log")[0]

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


# == 12 Users: User, Users, Rights, find_root, read_settings ==================


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


# == 13 Spool: Spool, Draft, QueueFile, Maildrop ==============================


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
    return sorted(str(p.relative_to(top)) for p in top.glob("*/*"))


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


# == 14 Alias database: AliasDatabase, AliasMaps, TargetFiles =================


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


# == 15 Mailboxes: MailboxLock, Mailbox, FileBox, MaildirBox ==================


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


# == 16 Folders: Folder, FolderMessage ========================================


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


# == 18 Relay: NextHop, Parcel, Relay =========================================


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


class TestRelayReplies:
    """What a relay host's answers mean."""

    @pytest.mark.parametrize(("text", "wanted"), HOST_ROWS)
    def test_a_host_is_read(self, text, wanted):
        hop = minimta.NextHop.parse(text, "relayhost")
        assert (hop.host, hop.port) == wanted

    @pytest.mark.parametrize(("text", "wanted"), STORE_ROWS)
    def test_a_mail_store_is_read(self, text, wanted):
        hop = minimta.NextHop.parse(text, "mailbox_transport", "lmtp")
        assert hop.fields() == wanted
        assert minimta.NextHop.parse(str(hop), "x") == hop

    @pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "\u0662"])
    def test_a_bad_port_is_refused(self, port):
        with pytest.raises(minimta.MailError) as caught:
            minimta.NextHop.parse(f"[mx.example]:{port}", "relayhost")
        assert caught.value.status == "4.3.5"

    @pytest.mark.parametrize(("code", "text", "status"), REPLY_ROWS)
    def test_a_reply_has_its_status(self, code, text, status):
        hop = minimta.NextHop.parse("[mx.example]:587", "relayhost")
        relay = minimta.Relay(make_settings(), hop)
        assert relay.refusal("DATA command", code, text).status == status

    def test_a_refusal_is_told_in_the_hosts_words(self):
        hop = minimta.NextHop.parse("[mx.example]:587", "relayhost")
        relay = minimta.Relay(make_settings(), hop)
        error = relay.refusal("RCPT TO command", 550, b"5.1.1 no\nsuch \x1buser")
        assert error.text == (
            "host mx.example[mx.example]:587 said: 550 5.1.1 no such ?user "
            "(in reply to RCPT TO command)"
        )


# == 19 Resolver: MailHost, Resolver ==========================================


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

    def test_resolv_conf_has_its_forms(self, make_resolver):
        more = "nameserver 192.0.2.53 ; x\nnameserver\nsearch a b\noptions timeout:3 x"
        resolver, _ = make_resolver({}, more)
        assert resolver.servers[1:] == [("192.0.2.53", 53)]
        assert (resolver.timeout, resolver.attempts) == (3, 2)


# == 20 Routing: Destination, Trail, Router, TargetCheck ======================


class FakeAliases:
    """An alias database in memory; one name cannot be looked up."""

    def __init__(self, rows):
        self.rows = rows

    problem = ""

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


# == 21 Delivery: Task, ActiveMessage, Delivery, RelayJob, PipeJob, Lanes =====


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


# == 22 Queue runner: QueueRunner, take_lock ==================================


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
        text = f"myhostname = host.example\nrelayhost =\n{settings}\n"
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
        assert (attempt.outcome, attempt.status) == ("deferred", "4.4.4")

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
        assert f"<{UNREACHABLE}>: no route to far.example" in report
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
        quiet.commit("bob@host.example")
        quiet.run()
        queue_id = quiet.commit("bob@host.example", UNREACHABLE)
        runner = quiet.runner()
        runner.scan()
        with locked(quiet.place / "var/mail/bob"):
            for _ in range(5):
                runner.run_due(time.time() + 60)
        found = [a.recipient for a in quiet.spool.journal(queue_id)]
        assert found.count(UNREACHABLE) == 1

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


# == 23 SMTP server: Stream, Conversation, WorkerPool, SmtpServer =============


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
    minimta.Conversation(desk, stream, client).run()
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


class TestWorkerPool:
    """A bounded number of threads."""

    def test_it_serves_so_many_and_no_more(self):
        gate, names = threading.Event(), ["one", "two", "three"]
        pool = minimta.WorkerPool(2, lambda name, address: gate.wait(PATIENCE))
        assert [pool.submit((name, None)) for name in names] == [True, True, False]
        gate.set()
        assert pool.wait(PATIENCE)

    def test_one_client_gets_no_more_than_its_share(self):
        gate = threading.Event()
        pool = minimta.WorkerPool(5, lambda name, address: gate.wait(PATIENCE))
        got = [pool.submit((name, None), "uid=7", 2) for name in "abc"]
        others = [pool.submit((name, None), "uid=8", 2) for name in "de"]
        assert (got, others) == ([True, True, False], [True, True])
        gate.set()
        assert pool.wait(PATIENCE)

    def test_who_is_trusted_has_no_share(self):
        gate = threading.Event()
        pool = minimta.WorkerPool(3, lambda name, address: gate.wait(PATIENCE))
        assert all(pool.submit((name, None), "", 1) for name in "abc")
        gate.set()
        assert pool.wait(PATIENCE)

    def test_a_thread_serves_one_connection_after_the_other(self):
        served = []
        pool = minimta.WorkerPool(1, lambda name, address: served.append(name))
        for name in range(5):
            assert pool.submit((name, None))
            assert pool.wait(PATIENCE)
        assert (served, pool.threads) == ([0, 1, 2, 3, 4], 1)

    def test_to_hang_up_ends_reading(self):
        ours, theirs = socket.socketpair()
        pool = minimta.WorkerPool(1, lambda connection, address: connection.recv(1))
        pool.submit((ours, None))
        pool.hang_up()
        assert pool.wait(PATIENCE)
        ours.close()
        theirs.close()


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


# == 24 Submission: House, SubmitSocket, Letter, Submission ===================


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
        minimta.Conversation(desk, connection, LOCAL).run()

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


# == 25 Daemon: Daemon, SignalPipe ============================================


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


# == 26 Mail reader: Terminal, Composer, MailReader ===========================


class FakeTerminal:
    """A terminal where these lines are typed; `shown` is what it shows."""

    is_interactive = False

    def __init__(self, *lines):
        self.lines = list(lines)
        self.shown = ""
        self.complaints = []

    def say(self, text):
        self.shown += text

    def complain(self, text):
        self.complaints.append(text)

    def read_line(self, prompt):
        return self.lines.pop(0).encode() if self.lines else None


@pytest.fixture
def session(folder, quiet):
    """Makes a MailReader of five messages, the first two read."""

    def make(*lines, texts=None):
        status = ["RO", "RO", "O", "", ""]
        texts = texts or [mail(f"s{n}", status=s) for n, s in enumerate(status, 1)]
        terminal = FakeTerminal(*lines)
        return minimta.MailReader(quiet.house, terminal, folder(*texts))

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
]

BAD_LIST_ROWS = [
    ("0", "0: Invalid message number"),
    ("6", "6: Invalid message number"),
    ("4-6", "6: Invalid message number"),
    ("1-99999999999", "6: Invalid message number"),
    ("x", "x: Invalid message list"),
    ("\u0662", "\u0662: Invalid message list"),
    ("3-2", "No applicable messages"),
]

COMMAND_ROWS = [
    # what is typed, what is then deleted or saved, the current message
    (["d"], {4: "deleted"}, 5),
    (["d 1 2"], {1: "deleted", 2: "deleted"}, 3),
    (["d 5"], {5: "deleted"}, 4),
    (["d *"], dict.fromkeys(range(1, 6), "deleted"), 0),
    (["d 1", "u"], {}, 1),
    (["d 1 2", "u 2"], {1: "deleted"}, 2),
    (["d*", "u *"], dict.fromkeys(range(1, 6), "deleted"), 0),
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
            ("s", "No file specified\n"),
            ("\x1b[2J", "␛[2J: Invalid message list\n"),
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
                ("", "next"),
                ("n", "next"),
                ("ne", "next"),
                ("p", "show"),
                ("t", "show"),
            ],
            *[("hea", "headers"), ("d", "delete"), ("del", "delete"), ("?", "help")],
            *[("u", "undelete"), ("r", "reply"), ("s", "save"), ("w", "write")],
            *[("q", "quit"), ("x", "exit"), ("ex", "exit"), ("exit", "exit")],
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
        reader.headers("")
        reader.obey("1")
        assert not set("\x1b\x07") & set(reader.terminal.shown)

    def test_quit_drops_what_is_deleted(self, session, tmp_path):
        reader = session("d 1-3", "q")
        assert reader.run() == 0
        assert (tmp_path / "box").read_text() == mail("s4", status="O") + mail(
            "s5", status="O"
        )
        assert reader.terminal.shown.endswith(f"Held 2 messages in {tmp_path}/box\n")

    def test_the_end_of_the_input_is_quit(self, session, tmp_path):
        session("d *").run()
        assert (tmp_path / "box").read_text() == ""

    def test_exit_leaves_everything_as_it_was(self, session, tmp_path):
        reader = session("d *", "x")
        before = (tmp_path / "box").read_text()
        reader.run()
        assert (tmp_path / "box").read_text() == before

    def test_a_saved_message_is_whole_and_leaves(self, session, tmp_path):
        session(f"s 4 {tmp_path}/saved", "q").run()
        assert (tmp_path / "saved").read_text() == mail("s4")
        assert "s4" not in (tmp_path / "box").read_text()

    def test_a_written_message_has_no_header_and_stays(self, session, tmp_path):
        session(f"w 4 {tmp_path}/written", "q").run()
        assert (tmp_path / "written").read_text().strip() == "text"
        assert "s4" in (tmp_path / "box").read_text()

    @pytest.mark.parametrize(("header", "wanted"), REPLY_FIELD_ROWS)
    def test_an_answer_goes_to_everybody_else(self, quiet, header, wanted):
        parsed = minimta.Header.parse(header.encode())
        found = {k: v for k, v in minimta.reply_fields(parsed, quiet.house) if v}
        assert found == {"Subject": "Re: ", **wanted}


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


# == 27 Programs: SendmailOptions, cmd_sendmail, cmd_mail, cmd_serve ... ======


def letters_of(kind):
    """sendmail's letters of one kind, each with a value that makes sense."""
    values = {"B": "8bitmime", "N": "never", "R": "full", "b": "m", "h": "5"}
    rows = sorted(minimta.SENDMAIL_FLAGS.items())
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
    (["-bl"], "mode", "d"),
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


# == 28 Dispatch: PROGRAMS, main ==============================================


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
    (["mailq", "x\n"], 64, "", "mailq: unknown argument x?: "),
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
            path.rename(path.with_suffix(".kept"))
        cache.chmod(0o777)
        try:
            assert instance.run("sendmail", "--version").code == 0
            assert not list(cache.glob("*.pyc"))
        finally:
            cache.chmod(mode)
            for path in stamp:
                path.with_suffix(".kept").rename(path)


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
            wire.send(b"EHLO client.example\r\n" + (start + one) * 2 + b"QUIT\r\n")
            codes = [wire.answer()[:3] for _ in range(11)]
        assert codes == "220 250 250 250 354 250 250 250 354 250 221".split()
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
        assert len(instance.queued()) == 1

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

    def test_10_000_members_survive_a_kill_without_a_second_copy(
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
        # at most what was in flight: four connections, a transaction each
        assert doubled <= 4 * 64
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
        result = instance.run("newaliases")
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

    def test_a_relayhost_and_its_setting_are_named(self, explained):
        explained.configure(relayhost="[mail.example.com]:587")
        out = explained.run("minimta.py", "explain", "far@example.net").out
        assert "relayhost [mail.example.com]:587" in out
        assert "etc/minimta.conf, line 5" in out
        assert "TLS" in out

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
        assert result.code == 75  # for it is not sent there yet
        assert "├─ MX 10 mx.far.example [192.0.2.1]\n" in result.out
        assert "deferred: no route to far.example" in result.out

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


class Postman:
    """Clients that send until all is accepted, whatever the server does."""

    CONNECTIONS = 10
    MESSAGES = 200

    def __init__(self, instance):
        self.instance = instance
        self.accepted = {}  # token -> user
        self.tried = 0
        self.changed = threading.Condition()
        self.errors = []
        each = self.MESSAGES // self.CONNECTIONS
        self.threads = [
            threading.Thread(target=self.send_all, args=(number, each), daemon=True)
            for number in range(self.CONNECTIONS)
        ]

    def send_all(self, number, count):
        client = None
        try:
            for letter_number in range(count):
                user = LOCAL_USERS[(number + letter_number) % 3]
                while not (client and self.send_one(client, user)):
                    client = wait_for(self.connect)
        except (AssertionError, pytest.fail.Exception) as error:  # for finish()
            self.errors.append(error)

    def connect(self):
        with contextlib.suppress(OSError, smtplib.SMTPException):
            return self.instance.smtp()
        return None

    def send_one(self, client, user):
        """True when the message got its 250; every attempt is a new token."""
        with self.changed:
            self.tried += 1
            assert self.tried < 10 * self.MESSAGES, "the server refuses for ever"
            token = f"attempt{self.tried}."
        try:
            client.sendmail("friend@example.com", f"{user}@localhost", letter(token))
        except (OSError, smtplib.SMTPException):
            client.close()
            return False
        with self.changed:
            self.accepted[token] = user
            self.changed.notify_all()
        return True

    def start(self):
        for thread in self.threads:
            thread.start()

    def wait_accepted(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.accepted) >= count, PATIENCE)

    def finish(self):
        for thread in self.threads:
            thread.join()
        assert self.errors == []
        assert len(self.accepted) == self.MESSAGES


def copies(instance):
    """How often each attempt arrived: (user, token) -> count."""
    found = {}
    for user in LOCAL_USERS:
        for message in instance.messages(user):
            (token,) = fields(message, "Subject")
            found[user, token] = found.get((user, token), 0) + 1
    return found


class TestCrash:
    """kill -9 of every process, in the middle."""

    @pytest.mark.parametrize("cycle", range(CRASHES))
    def test_accepted_mail_survives_and_is_not_doubled(self, instance, cycle):
        instance.configure(minimal_backoff_time="1s", maximal_backoff_time="1s")
        instance.start()
        postman = Postman(instance)
        postman.start()
        postman.wait_accepted(10 + cycle * 67 % 170)
        instance.kill()
        instance.start()
        postman.finish()
        instance.wait_empty()
        found = copies(instance)
        wanted = {(user, token) for token, user in postman.accepted.items()}
        lost = sorted(wanted - set(found))
        doubled = sorted(key for key, count in found.items() if count > 1)
        assert (lost, doubled) == ([], [])

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

    def test_a_second_kill_during_the_repair_loses_nothing(self, instance):
        instance.start()
        postman = Postman(instance)
        postman.start()
        for count in (30, 60, 90):
            postman.wait_accepted(count)
            instance.kill()
            instance.start()
        postman.finish()
        instance.wait_empty()
        found = copies(instance)
        wanted = {(user, token) for token, user in postman.accepted.items()}
        assert wanted - set(found) == set()
        assert [key for key, count in found.items() if count > 1] == []


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
