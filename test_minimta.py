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
import fcntl
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
        self.sender, self.recipients = None, []
        while True:
            line = self.rfile.readline().decode().strip()
            verb = line[:4].upper()
            if not verb:
                return
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

    def take_message(self):
        text = b""
        while not text.endswith(b"\r\n.\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            text += line
        answer = self.server.answer("END", "END")
        if answer.startswith("2"):
            self.server.received.append((self.sender, self.recipients, text))
        self.wfile.write(answer.encode() + b"\r\n")


SINK_ANSWERS = {
    "CONNECT": "220 sink.example ESMTP",
    "EHLO": "250-sink.example\n250-PIPELINING\n250-8BITMIME\n250 SIZE 99999999",
    "HELO": "250 sink.example",
    "DATA": "354 Go on",
    "END": "250 2.0.0 Kept",
    "QUIT": "221 2.0.0 Bye",
}


class SmtpSink(socketserver.ThreadingTCPServer):
    """A real SMTP server that answers from a table and keeps what it accepts.

    A row is a whole command or a verb; CONNECT is the greeting, END the answer
    to the end of the message.  A list is used up until its last element.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port=0, **answers):
        self.answers = {**SINK_ANSWERS, **answers}
        self.received = []
        super().__init__(("127.0.0.1", port), SinkHandler)
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


@pytest.fixture
def make_sink():
    """Makes SmtpSinks, and closes them."""
    made = []

    def make(**how):
        made.append(SmtpSink(**how))
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

    def test_sighup_with_bad_settings_keeps_the_old_ones(self, server):
        server.write("etc/minimta.conf", "no_such_setting = 1\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "no_such_setting" in server.log())
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
    def test_a_stdin_that_cannot_be_read_is_66(self, shared, redirection):
        result = shared.run_by_shell(redirection, "sendmail", "payam")
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
        sink = make_sink(port=port)
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

    @pytest.mark.parametrize("target", ["|cat", "/tmp/never", ":include:/tmp/never"])
    def test_a_target_that_comes_later_is_deferred(self, server, target):
        server.aliases(f'news: "{target}"\n')
        server.run("newaliases")
        server.sendmail("news", stdin=letter("later"))
        assert ")\n" in server.wait_reason(")\n")
        assert not Path("/tmp/never").exists()


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

    @pytest.mark.parametrize("target", ["|cat", "/tmp/never", ":include:/tmp/never"])
    def test_what_comes_later_is_deferred_with_a_reason(self, server, target):
        server.forward("user1", f'"{target}"\n')
        server.send("user1@localhost", letter("later"))
        server.wait_reason(")\n")
        assert not Path("/tmp/never").exists()
        assert server.messages("user1") == []

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
