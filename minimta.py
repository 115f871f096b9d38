#!/bin/sh
""":"

# The shell reads as far as exec; to Python these lines are text. -I keeps the
# current directory and PYTHON* out of a program that root runs, -S saves a
# search for site packages. Byte code is kept in rooms (a function, a class, a
# table), and used where nobody else can write: the daemon has those that serve
# mail, a program those that it enters, each when its name is first asked for.
# That takes 3 ms where the whole house takes 9, and a megabyte less.
pinned=
# A directory on standard input would end Python before a word of ours.
[ -d /dev/stdin ] && exec <&-
for python in $pinned /usr/bin/python3 /usr/local/bin/python3 python3; do
    command -v "$python" >/dev/null 2>&1 && exec "$python" -IS -c '
import builtins, marshal, os, sys
from _frozen_importlib_external import MAGIC_NUMBER
def private(place):
    if not os.path.exists(place): return True
    seen = os.stat(place)
    return seen.st_uid in (0, os.geteuid()) and not seen.st_mode & 0o022
class Rooms(dict):
    def __missing__(self, name):
        enter(name)
        return house[name]
def enter(name):
    start, size = index[name]
    exec(marshal.loads(os.pread(house["ROOMS_FD"], size, start)), house)
def find_rooms():
    try: fds = [os.open(rooms, os.O_RDONLY | os.O_CLOEXEC)]
    except OSError: return -1, None
    while fds[-1] < 3: fds.append(os.dup(fds[-1]))  # no standard file
    for low in fds[:-1]: os.close(low)
    try:
        if private(fds[-1]) and os.read(fds[-1], len(mark)) == mark:
            size, index = marshal.loads(os.read(fds[-1], 1 << 17))
            if os.fstat(fds[-1]).st_size == size: return fds[-1], index
    except (EOFError, ValueError, TypeError): pass
    os.close(fds[-1])  # of another source, torn, or not ours
    return -1, None
def whole():
    module = sys.modules["minimta"] = type(sys)("minimta")
    module.__file__ = path
    with open(path, "rb") as file: code = compile(file.read(), path, "exec")
    exec(code, vars(module))
    return vars(module)
sys.argv = sys.argv[1:]
path = os.path.realpath(sys.argv[0])
home = os.path.dirname(path)
kept = home + "/__pycache__"
safe = private(home) and private(kept)
rooms = f"{kept}/minimta.{sys.implementation.cache_tag}.rooms"
seen = os.stat(path)
mark = MAGIC_NUMBER + b"%d %d." % (seen.st_mtime_ns, seen.st_size)
fd, index = find_rooms() if safe else (-1, None)
place = kept if os.path.exists(kept) else home
if safe and not index and os.access(place, os.W_OK):
    try:
        pid = os.fork()  # who compiles takes 50 MB for good: let it end
        if pid == 0:
            try: whole()["write_rooms"](path, rooms, mark)
            finally: os._exit(0)
        os.waitpid(pid, 0)
    except OSError: pass
    fd, index = find_rooms()
if index:
    # Builtins are here too: to fail to find one in the house is slow.
    house = {**vars(builtins), "__name__": "minimta", "__file__": path}
    house.update(__builtins__=vars(builtins), ROOMS_FD=fd)
    if any(w == "serve" or w[:3] in ("-bd", "-bD") for w in sys.argv):
        for name in list(index):
            if name == "IGNORED_FIELDS": break  # mail(1) begins there
            if name not in house: enter(name)
            del index[name]
    house["__builtins__"] = Rooms(vars(builtins))
else: house = whole()
code = eval("main", house)(sys.argv)
try:
    for file in (sys.stdout, sys.stderr): file and file.flush()
finally: os._exit(code)  # to take the house down again costs 2 ms
' "$0" "$@"
done
echo "$0: there is no python3 here: install Python 3.9 or newer" >&2
exit 69

minimta - the whole mail system of a small host in one file.

It is sendmail, newaliases, mailq and mail by the name it is called by, and
the daemon as `minimta.py serve`. It is not a mailbox server, a filter or a
mass mailer. The way of a message (the boxes are names in this file):

  sendmail, mail --> submit socket --.
                `--> Maildrop ---.   |
                                 v   v
  SmtpServer -----------------> Spool --> QueueRunner --> Delivery --> Mailbox,
                                 ^             |           FileBox, MaildirBox
                                 |             |-> Lanes --> PipeJob
                                 |             `-> Outgoing --> Outbox, Relay
                                 `-- Reporter <-- a recipient was bounced

CONTENTS

  WORDS  text in, values out; no file, socket, clock or print
     1 Failures
     2 Settings
     3 Addresses
     4 Messages
     5 Aliases
     6 Queue words
     7 Queue selection
     8 Dialogue
     9 Reports
    10 Trees
    11 Names
    12 Routes
    13 Conversion
  HANDS  each owns one thing outside the program
    14 Log
    15 Users
    16 Maps
    17 Spool
    18 Alias database
    19 Mailboxes
    20 Folders
    21 Commands
    22 Resolver
    23 Relay
  WORK   what is done with them
    24 Routing
    25 Delivery
    26 Outbox
    27 Queue runner
    28 SMTP server
    29 Submission
    30 Daemon
    31 Mail text
    32 Mail sender
    33 Mail reader
  DOORS  the programs
    34 Queue programs
    35 Programs
    36 Moving in
    37 Doctor
    38 Installation
    39 Dispatch

LAWS

A name uses only names above it. WORDS touch nothing outside. Inside, lines
end in LF; on the wire in CRLF; a bare CR or LF from the network is refused.
A recipient is pending until it is sent, deferred (pending still) or bounced:
those are the words in the code, the log, the queue and the README.

THE QUEUE, and what a crash leaves in each state (spare/ has files of messages
that are done with, to be written over; corrupt/ what nobody wants; trace/ what
happened lately, and what waits, in brief)

  incoming/ID  queue/ID  journal/ID  meaning; who goes on after a crash
      +           -          -       being written, nobody was told 250;
                                     the runner sweeps it when it is old
      -           +          -       accepted: fsynced, renamed, directory
                                     fsynced; the runner delivers it
      -           +          +       tried: the journal has a line for each
                                     attempt; recipients it calls sent or
                                     bounced are not tried again, nor the
                                     members of a list that it calls sent
      -           -          +       done: the journal is removed last

A queue file never changes after its rename. Its mtime is its next attempt.
When a runner starts, whatever it finds in queue/ may have been appended to a
mailbox already, so that mailbox is searched for the queue id first.

    arrived: 1795433527.25          envelope: name: value, unknown ones ignored
    sender: alice@host.example
    origin: uid 1000
    recipient: bob@host.example     one line each
                                    an empty line, then the message as it was
    Received: by host.example ...   received, with our own Received on top

To understand everything else, start at main(), the last function.
"""

from __future__ import annotations

import os
import stat
import sys
import time

__version__ = "0.1"


# =============================================================================
# WORDS: text in, values out. No file, no socket, no clock, no print.
# =============================================================================

# == 1 Failures: Value, ProgramError, MailError, exit codes ===================
# What can go wrong is a value, made once: an enhanced status code (RFC 3463)
# and a sentence for mail, an exit code (sysexits.h) and a sentence for the
# programs. Only main() turns either into a line on stderr.

EX_OK = 0
EX_USAGE = 64  # the command was used wrongly
EX_DATAERR = 65  # the input was bad: an address, a header, an aliases line
EX_NOINPUT = 66  # the input could not be read
EX_NOUSER = 67  # no such user here
EX_NOHOST = 68  # no such host
EX_UNAVAILABLE = 69  # something that is needed is not there
EX_SOFTWARE = 70  # a fault in this program
EX_OSERR = 71  # the system refused: fork, bind
EX_CANTCREAT = 73  # a file could not be made
EX_IOERR = 74  # reading or writing failed
EX_TEMPFAIL = 75  # try again later
EX_NOPERM = 77  # not allowed
EX_CONFIG = 78  # the settings are wrong

# Enhanced status, longest prefix first -> what `sendmail` exits with.
EXIT_CODES = (
    ("4", EX_TEMPFAIL),
    ("5.1.3", EX_DATAERR),
    ("5.1.7", EX_DATAERR),
    ("5.1", EX_NOUSER),
    ("5.2.3", EX_DATAERR),
    ("5.3.4", EX_DATAERR),
    ("5.4.6", EX_CONFIG),
    ("5.5", EX_DATAERR),
    ("5.6", EX_DATAERR),
    ("5.7", EX_NOPERM),
    ("", EX_UNAVAILABLE),
)


class Value:
    """A record: its fields are its slots, equal when all of them are equal.

    In place of namedtuple and dataclass, whose modules cost 3 and 15 ms of a
    `sendmail` that takes 15.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.fields() == other.fields()

    def __hash__(self) -> int:
        return hash(self.fields())

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.fields()!r}"

    def fields(self) -> tuple:
        """The values of the slots, in their order."""
        return tuple(getattr(self, name) for name in self.__slots__)


class ProgramError(Exception):
    """Ends a program: an exit code, and what is wrong: what to do about it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class MailError(Exception):
    """Why a recipient or a message fails: enhanced status and one sentence.

    `status` is "4.x.y" (try again) or "5.x.y" (never), RFC 3463; `relay` says
    who refused, as the log's relay= shows it; `code` is the SMTP reply's,
    0 where the status decides.
    """

    def __init__(
        self, status: str, text: str, relay: str = "local", code: int = 0
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.relay = relay
        self.code = code

    def fields(self) -> tuple:
        """Status, text and reply code."""
        return self.status, self.text, self.code

    @property
    def is_temporary(self) -> bool:
        """Whether another attempt may succeed."""
        return self.status.startswith("4")

    @property
    def exit_code(self) -> int:
        """What `sendmail` exits with for it."""
        return next(c for prefix, c in EXIT_CODES if self.status.startswith(prefix))


def is_number(text: str) -> bool:
    """Whether `text` is a number of up to three decimal digits."""
    return text.isascii() and text.isdigit() and len(text) <= 3


def is_status(text: str) -> bool:
    """Whether `text` is an enhanced status code, RFC 3463 section 2.

    >>> is_status("5.7.1"), is_status("5.7")
    (True, False)
    """
    parts = text.split(".")
    is_class = parts[0] in ("2", "4", "5")
    return len(parts) == 3 and is_class and all(map(is_number, parts))


def read_refusal(text: str, code: int) -> MailError:
    """The failure that `[550] [5.7.1] text` spells; `code` where none is said.

    `code` 0 leaves it to the status.

    >>> read_refusal("550 5.7.1 no entry", 0).fields()
    ('5.7.1', 'no entry', 550)
    """
    word, _, rest = text.partition(" ")
    if is_number(word) and len(word) == 3 and word[0] in "45":
        code, text = int(word), rest.strip()
    word, _, rest = text.partition(" ")
    code = code or (450 if word.startswith("4.") else 550)
    status = f"{code // 100}.0.0"
    if is_status(word):
        # Where the two contradict each other, the code says what is meant.
        status, text = status[0] + word[1:], rest.strip()
    return MailError(status, text or "mail is not accepted here", code=code)


MANY_NAMES = 5000  # to find one that is like another takes 15 ms


def nearest(name: str, names: object) -> str:
    """`did you mean X?` for the one of a few names that is like it, or ""."""
    import difflib  # 12 ms; only a mistake needs it

    few = list(names)
    if len(few) > MANY_NAMES:
        return ""
    near = difflib.get_close_matches(name, few, 1, 0.6)
    return f"did you mean {near[0]}?" if near else ""


def counted(count: int, noun: str = "message") -> str:
    """`1 message`, `2 messages`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(text: str, limit: int = 1000) -> str:
    """`text` on one line of at most `limit` characters, controls shown as `?`.

    For logs, reports and reasons: what came from outside can end no line and
    drive no terminal.
    """
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return shown if len(text) <= limit else shown + "..."


# == 2 Settings: Setting, SETTINGS, Settings ==================================
# minimta.conf: `name = value`, `#` comments, a line that begins with white
# space continues the one before, `$name` stands for another setting. Names are
# Postfix's wherever Postfix has the thing.
# Failures: ProgramError EX_CONFIG, naming file and line.

MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds
TIME_UNITS = {"s": 1, "m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
NO_LIMIT = 1 << 60  # bytes
SIZE_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


SYSTEM_NAME = "the system's name"  # where myhostname comes from unless it is set


class Setting(Value):
    """One row of SETTINGS; `kind` says how its text is read (see READERS)."""

    __slots__ = ("name", "kind", "default", "meaning")

    def __init__(self, name: str, kind: str, default: str, meaning: str) -> None:
        self.name = name
        self.kind = kind
        self.default = default
        self.meaning = meaning


SETTINGS = (
    Setting("myhostname", "text", "", "this host's full name; default: the system's"),
    Setting("mydomain", "text", "", "its domain; default: myhostname less one label"),
    Setting("myorigin", "text", "$myhostname", "what follows a bare user's @"),
    Setting(
        "mydestination",
        "list",
        "$myhostname, localhost.$mydomain, localhost",
        "domains whose mail is delivered here",
    ),
    Setting("mynetworks", "list", "127.0.0.0/8, [::1]/128", "clients that may relay"),
    Setting("relay_domains", "list", "", "domains that anyone may relay to"),
    Setting("inet_interfaces", "list", "127.0.0.1, [::1]", "addresses to listen on"),
    Setting("smtpd_port", "port", "25", "port to listen on"),
    Setting("relayhost", "list", "", "where remote mail goes: [host]:port, in order"),
    Setting("transport_maps", "list", "", "files with routes by recipient"),
    Setting("smtp_generic_maps", "list", "", "files with senders for other hosts"),
    Setting(
        "smtp_tls_security_level",
        "level",
        "",
        "none, may, encrypt, verify; default: may to MX, verify to relayhost",
    ),
    Setting("smtp_tls_CAfile", "text", "", "certificates to trust; or the system's"),
    Setting("smtp_sasl_password_maps", "list", "", "files with passwords for relays"),
    Setting("smtp_sasl_password_command", "command", "", "prints the relay's password"),
    Setting("smtpd_tls_cert_file", "text", "", "the listener's certificate: STARTTLS"),
    Setting("smtpd_tls_key_file", "text", "", "its key, if not in the same file"),
    Setting(
        "smtpd_tls_port", "port", "0", "port with TLS from the start: 465; 0: none"
    ),
    Setting("smtpd_sasl_password_file", "text", "", "who may authenticate, over TLS"),
    Setting("alias_maps", "list", "/etc/aliases", "the aliases files"),
    Setting("recipient_delimiter", "text", "+", "user+detail is user's mail"),
    Setting("luser_relay", "text", "", "who gets mail for unknown local users"),
    Setting("capture", "flag", "no", "keep mail for any address; nothing leaves"),
    Setting("mailbox_transport", "text", "", "lmtp: another mail store"),
    Setting("home_mailbox", "text", "", "mailbox below the home; Maildir with / last"),
    Setting("mail_spool_directory", "path", "/var/mail", "where mailboxes are"),
    Setting("queue_directory", "path", "/var/spool/minimta", "the queue"),
    Setting("message_size_limit", "limit", "50M", "bytes of one message; 0: any"),
    Setting("mailbox_size_limit", "size", "0", "bytes of a mailbox; 0: no limit"),
    Setting("queue_minfree", "size", "16M", "bytes that stay free on the queue's disk"),
    Setting("smtpd_recipient_limit", "count", "1000", "recipients of one message"),
    Setting(
        "smtpd_client_connection_count_limit",
        "count",
        "50",
        "sessions of one client or user at once",
    ),
    Setting("default_process_limit", "count", "4000", "SMTP sessions at once"),
    Setting("command_time_limit", "time", "1000s", "how long a pipe may run"),
    Setting("minimal_backoff_time", "time", "300s", "shortest wait between attempts"),
    Setting("maximal_backoff_time", "time", "4000s", "longest wait between attempts"),
    Setting("maximal_queue_lifetime", "time", "5d", "then mail is bounced"),
    Setting("bounce_queue_lifetime", "time", "5d", "then a bounce is given up"),
    Setting("delay_warning_time", "time", "4h", "then the sender is warned; 0: never"),
    Setting("hopcount_limit", "count", "50", "Received lines of a looping message"),
    Setting("mail_owner", "text", "", "user of the queue: minimta, daemon or nobody"),
    Setting("default_privs", "text", "nobody", "user of commands in aliases"),
    Setting("maillog_file", "text", "", "file, - (stdout), json:...; default: syslog"),
    Setting("syslog_facility", "text", "mail", "syslog facility"),
    Setting("syslog_name", "text", "minimta", "first word of each log line"),
)

# What a private instance has in place of the default.
PRIVATE_DEFAULTS = {
    "inet_interfaces": "127.0.0.1",
    "smtpd_port": "2525",
    "maillog_file": "/var/log/mail.log",
}
BELOW_ROOT = ("alias_maps", "mail_spool_directory", "queue_directory", "maillog_file")
# Kinds of map that Postfix makes of a text file; here all are that file.
ALIAS_KINDS = ("hash", "btree", "dbm", "sdbm", "cdb", "lmdb", "texthash")
# How much TLS a host must have; check: verify, but a host without it will do
# on this very host.
TLS_LEVELS = ("none", "may", "encrypt", "check", "verify")


def read_amount(text: str, units: dict[str, int]) -> int:
    """`"1h30m"` or `"50M"` in the smallest unit. Raises ValueError.

    >>> read_amount("1h30m", TIME_UNITS), read_amount("10", SIZE_UNITS)
    (5400, 10)
    """
    total, digits = 0, ""
    for char in text.strip().lower():
        if char in units and digits:
            total, digits = total + int(digits) * units[char], ""
        elif char.isascii() and char.isdigit():
            digits += char
        else:
            raise ValueError(text)
    if not text.strip():
        raise ValueError(text)
    return total + int(digits or 0)


def read_list(text: str) -> tuple[str, ...]:
    r"""The words of `text`, which commas or white space set apart.

    A blank behind a backslash is one of a word.

    >>> read_list(r"/a, /b\ c /d")
    ('/a', '/b c', '/d')
    """
    words = text.replace("\\ ", "\0").replace(",", " ").split()
    return tuple(word.replace("\0", " ") for word in words)


def read_count(text: str) -> int:
    """A number from 1 up. Raises ValueError."""
    return int(read_amount(text, {}) or "none at all")


def read_flag(text: str) -> bool:
    """`yes` or `no`. Raises ValueError."""
    return ("no", "yes").index(text.lower()) == 1


def read_level(text: str) -> str:
    """A level of TLS, "" for the usual ones. Raises ValueError."""
    level = {"secure": "verify"}.get(text, text)
    if level and level not in TLS_LEVELS:
        raise ValueError(text)
    return level


def read_path(text: str) -> str:
    """An absolute path. Raises ValueError."""
    if not text.startswith("/"):
        raise ValueError(text)
    return text.rstrip("/") or "/"


READERS = {
    "text": lambda text: text,
    "command": lambda text: text,
    "path": read_path,
    "flag": read_flag,
    "level": read_level,
    "list": read_list,
    "number": lambda text: read_amount(text, {}),
    "count": read_count,
    "limit": lambda text: read_amount(text, SIZE_UNITS) or NO_LIMIT,
    "port": lambda text: range(1 << 16).index(read_amount(text, {})),
    "size": lambda text: read_amount(text, SIZE_UNITS),
    "time": lambda text: read_amount(text, TIME_UNITS),
}


def strip_comment(line: str) -> str:
    """`line` without what a `#` at the start of a word begins.

    >>> strip_comment('a: "b # c"  # d')
    'a: "b # c"  '
    """
    if "#" not in line:
        return line
    is_quoted = is_escaped = False
    for place, char in enumerate(line):
        if is_escaped:
            is_escaped = False
        elif char == "\\":
            is_escaped = True
        elif char == '"':
            is_quoted = not is_quoted
        elif char == "#" and not is_quoted and line[:place].rstrip() == "":
            return ""
        elif char == "#" and not is_quoted and line[place - 1] in " \t":
            return line[:place]
    return line


def logical_lines(text: str) -> object:
    """(number of the first line, text) of each entry; comments are gone.

    A `#` begins a comment where a word could begin, also behind a value; not
    inside double quotes. A line that begins with white space continues the
    one before; if it is the first it is handed over as it is, indented. One
    by one, for the text may be a list of many members.
    """
    first = entry = None
    for number, line in enumerate(text.split("\n"), 1):
        bare = (strip_comment(line) if "#" in line else line).rstrip()
        if not bare:
            continue
        if bare[0] in " \t" and entry:
            entry.append(bare.strip())
            continue
        if entry:
            yield first, " ".join(entry)
        first, entry = number, [bare]
    if entry:
        yield first, " ".join(entry)


def host_defaults(host: str, root: str) -> tuple[dict, dict]:
    """Defaults that hang on the host and the instance: texts, sources."""
    texts: dict[str, str] = {"myhostname": host}
    sources = {"myhostname": SYSTEM_NAME}
    if root:
        texts.update(PRIVATE_DEFAULTS)
        for row in SETTINGS:
            if row.name in BELOW_ROOT:
                place = root.replace(" ", "\\ ") if row.kind == "list" else root
                texts[row.name] = place + texts.get(row.name, row.default)
        names = (*PRIVATE_DEFAULTS, *BELOW_ROOT)
        sources.update(dict.fromkeys(names, "private instance"))
    return texts, sources


def complete(texts: dict) -> dict:
    """`texts`, myhostname qualified, mydomain and mydestination filled."""
    host, domain = texts["myhostname"], texts.get("mydomain", "")
    if "." not in host:
        host = f"{host}.{domain or 'localdomain'}"
    if "mydestination" not in texts:
        # A host's own short name is local too: mutt qualifies with it.
        short = host.partition(".")[0]
        texts["mydestination"] = f"$myhostname, {short}, localhost.$mydomain, localhost"
    return {**texts, "myhostname": host, "mydomain": domain or host.partition(".")[2]}


def unknown_setting(where: str, name: str, names: list[str]) -> ProgramError:
    """The error for a name that is not a setting; names the nearest one."""
    hint = nearest(name, names) or "see minimta.py config"
    return ProgramError(
        EX_CONFIG, f"{where}: unknown setting {printable(name, 60)}: {hint}"
    )


def named_values(text: str, path: str) -> list[tuple[str, str, str]]:
    """(where, setting, value) of each entry of a file. Raises ProgramError."""
    names = {row.name.lower(): row.name for row in SETTINGS}
    found = []
    for number, line in logical_lines(text):
        name, equals, value = line.partition("=")
        where = f"{path}, line {number}"
        if not equals or line[0] in " \t":
            raise ProgramError(EX_CONFIG, f"{where}: need name = value")
        known = names.get(name.strip().lower())
        if known is None:
            raise unknown_setting(where, name.strip(), list(names.values()))
        found.append((where, known, value.strip()))
    return found


class Settings:
    """Every setting's value, read once in main() and passed on; never changed.

    `settings.myhostname` reads a value in its kind's type; `sources` says
    where each came from; `root` is the private instance's directory or "".
    """

    def __init__(self, texts: dict, sources: dict, root: str = "") -> None:
        self.root = root
        self.sources = sources
        self.texts = {row.name: texts.get(row.name, row.default) for row in SETTINGS}
        self.__dict__.update({row.name: self.read(row) for row in SETTINGS})
        if self.capture and not root:
            why = "capture: not for a host's own mail: set MINIMTA_ROOT"
            raise ProgramError(EX_CONFIG, f"{sources['capture']}: {why}")
        self.local_domains = frozenset(name.lower() for name in self.mydestination)
        ours = (f"[{address}]" for address in self.listen_on)
        self.local_literals = frozenset({*ours, "[127.0.0.1]", "[::1]"})
        # What follows a bare recipient's @: myorigin, if that is local. A bare
        # name is a user or an alias of this host, also where senders are to
        # look like somebody else's.
        names = (self.myorigin, self.myhostname, *self.mydestination)
        self.local_origin = next(filter(self.is_local, names), self.myorigin)

    @classmethod
    def parse(
        cls, text: str, environ: dict, host: str, root: str = "", path: str = ""
    ) -> Settings:
        """Settings from a file's text, MINIMTA_<NAME> of `environ` and `host`.

        Raises ProgramError EX_CONFIG.
        """
        texts, sources = host_defaults(host, root)
        for where, name, value in named_values(text, path):
            texts[name], sources[name] = value, where
        for row in SETTINGS:
            variable = f"MINIMTA_{row.name.upper()}"
            if variable in environ:
                texts[row.name] = environ[variable].strip()
                sources[row.name] = f"environment, {variable}"
        return cls(complete(texts), sources, root)

    def read(self, row: Setting) -> object:
        """The value of a row in its kind's type. Raises ProgramError."""
        text, is_command = self.texts[row.name], row.kind == "command"
        text = text if is_command else self.expand(text)
        where = self.sources.get(row.name, "settings")
        if "$" in text and not is_command:
            why = f"{where}: {row.name} = {text}: there is no such setting"
            raise ProgramError(EX_CONFIG, why)
        try:
            return READERS[row.kind](text)
        except ValueError:
            raise ProgramError(
                EX_CONFIG, f"{where}: {row.name} = {text} is not a {row.kind}"
            ) from None

    def expand(self, text: str, depth: int = 0) -> str:
        """`text` with each $name and ${name} replaced by that setting."""
        if "$" not in text or depth > 10:
            return text
        for row in sorted(SETTINGS, key=lambda row: -len(row.name)):
            for spelling in ("${" + row.name + "}", "$" + row.name):
                if spelling in text:
                    text = text.replace(spelling, self.texts[row.name])
        return self.expand(text, depth + 1)

    def map_paths(self, name: str) -> list[str]:
        """The files that a setting names, in order; `hash:` is taken off.

        Raises ProgramError for a kind of map that is no file.
        """
        found = []
        for word in getattr(self, name):
            kind, colon, path = word.partition(":")
            if not colon or "/" in kind:
                kind, path = "texthash", word
            if kind not in ALIAS_KINDS or not path.startswith("/"):
                why = f"{name}: {printable(word, 100)}: need an absolute path"
                raise ProgramError(EX_CONFIG, why)
            found.append(path)
        return found

    def split_detail(self, local: str) -> tuple[str, str]:
        """(user, `+detail`) of a local part, cut at the first delimiter.

        Each character of recipient_delimiter is one, as in Postfix, which
        leaves owner-LIST and LIST-request whole where that is a hyphen.
        """
        delimiters = self.recipient_delimiter
        is_list = local.startswith("owner-") or local.endswith("-request")
        if not ("-" in delimiters and is_list):
            for place, char in enumerate(local):
                if place and char in delimiters:
                    return local[:place], local[place:]
        return local, ""

    def keeps(self, domain: str) -> bool:
        """Whether mail for a domain stays here: it is ours, or captured."""
        return self.capture or self.is_local(domain)

    @property
    def listen_on(self) -> list[str]:
        """The addresses to listen on, without brackets."""
        words = {"all": ("0.0.0.0", "::"), "loopback-only": ("127.0.0.1", "::1")}
        words["localhost"] = words["loopback-only"]
        return [
            address.strip("[]")
            for name in self.inet_interfaces
            for address in words.get(name, (name,))
        ]

    def is_local(self, domain: str) -> bool:
        """Whether mail for `domain` (or our literal) is delivered here."""
        domain = domain.lower().rstrip(".")
        if domain.startswith("["):
            return domain.replace("[ipv6:", "[") in self.local_literals
        return not domain or domain in self.local_domains

    def may_relay_to(self, domain: str) -> bool:
        """Whether anyone may send mail for `domain` through this host."""
        domain = domain.lower().rstrip(".")
        return any(
            domain == name or domain.endswith("." + name.lstrip("."))
            for name in (name.lower() for name in self.relay_domains)
        )


# == 3 Addresses: Address, parse_path, header_addresses =======================
# What may stand between < and > in MAIL and RCPT, and in a To: field.
# Source: RFC 5321 section 4.1.2, RFC 5322 section 3.4, RFC 6531 section 3.3.
# Failures: MailError 5.1.3 with the text that could not be read.

MAX_LOCAL = 64  # octets, RFC 5321 section 4.5.3.1.1
MAX_DOMAIN = 255  # octets, section 4.5.3.1.2
MAX_PATH = 254  # octets without the brackets, section 4.5.3.1.3
MAX_LABEL = 63  # octets, RFC 1035 section 2.3.4
SPECIALS = frozenset('()<>[]:;@\\,"')


def bad_address(text: str, why: str = "bad address syntax") -> MailError:
    """The failure for an address that cannot be read."""
    return MailError("5.1.3", f"<{printable(text, 100)}>: {why}")


def os_bytes(text: str) -> bytes:
    """`text` as the bytes it came from (UTF-8, anything else unchanged)."""
    return text.encode("utf-8", "surrogateescape")


def os_text(data: bytes) -> str:
    """`data` as text that os_bytes() turns back into the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def quoted(text: str) -> str:
    """`text` as a quoted string, RFC 5322 section 3.2.4."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# What nearly all addresses are made of; anything else is looked at closely.
COMMON = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_+="
)


def is_atom_char(char: str) -> bool:
    """Whether `char` may stand unquoted in a local part (atext, or UTF-8)."""
    return char not in SPECIALS and char != " " and char.isprintable()


def read_local(text: str) -> tuple[str, int]:
    """(local part unquoted, place behind it). Raises MailError."""
    if not text.startswith('"'):
        head = text.partition("@")[0]
        if head and COMMON.issuperset(head):
            return head, len(head)
        place = 0
        while place < len(text) and is_atom_char(text[place]):
            place += 1
        if place == 0:
            raise bad_address(text)
        return text[:place], place
    chars, place = [], 1
    while place < len(text) and text[place] != '"':
        place += text[place] == "\\"
        if place >= len(text) or not text[place].isprintable():
            raise bad_address(text)
        chars.append(text[place])
        place += 1
    if place >= len(text):
        raise bad_address(text, "unbalanced quotation mark")
    return "".join(chars), place + 1


def is_octet(text: str) -> bool:
    """Whether `text` is 0 to 255 in decimal, without leading zeros."""
    digits = text.isascii() and text.isdigit() and len(text) < 4
    return digits and str(int(text)) == text and int(text) < 256


def is_literal(text: str) -> bool:
    """Whether `text` is [a.b.c.d] or [IPv6:...], numbers strictly decimal."""
    inner = text[1:-1]
    if not text.endswith("]") or not inner:
        return False
    if inner.lower().startswith("ipv6:"):
        import ipaddress  # 5 ms; hardly anybody writes these

        try:
            return bool(ipaddress.IPv6Address(inner[5:]))
        except ValueError:
            return False
    parts = inner.split(".")
    return len(parts) == 4 and all(is_octet(part) for part in parts)


def is_label(text: str) -> bool:
    """Whether `text` may stand between the dots of a host name."""
    fits = 0 < len(os_bytes(text)) <= MAX_LABEL and text.isprintable()
    plain = text.isalnum() or all(
        c.isalnum() or c in "-_" or not c.isascii() for c in text
    )
    return fits and plain and text[0] != "-" != text[-1]


def is_domain(text: str) -> bool:
    """Whether `text` is a host name or an address literal, RFC 5321 4.1.2."""
    if text.startswith("["):
        return is_literal(text)
    labels = text[:-1].split(".") if text.endswith(".") else text.split(".")
    return len(os_bytes(text)) <= MAX_DOMAIN and all(map(is_label, labels))


class Address(Value):
    """A mailbox or the null sender (both parts empty).

    `local` is unquoted, its case kept; `domain` is "" for a bare user name,
    else a name or a literal in brackets.
    """

    __slots__ = ("local", "domain")

    def __init__(self, local: str, domain: str = "") -> None:
        self.local = local
        self.domain = domain

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `text` spells, nothing before or behind it.

        >>> Address.parse('"a b"@x.org')
        Address('a b', 'x.org')
        """
        if not text:
            return cls("")
        local, place = read_local(text)
        domain = text[place + 1 :]
        if text[place : place + 1] not in ("", "@") or (place < len(text)) != (
            domain != ""
        ):
            raise bad_address(text)
        if domain and not is_domain(domain):
            raise bad_address(text, "bad domain name")
        if len(os_bytes(local)) > MAX_LOCAL or len(os_bytes(text)) > MAX_PATH:
            raise bad_address(text, "too long")
        return cls(local, domain)

    def __str__(self) -> str:
        local = self.local
        plain = local and (
            COMMON.issuperset(local) or all(is_atom_char(c) or c == "." for c in local)
        )
        if not plain and (local or self.domain):
            local = quoted(local)
        return f"{local}@{self.domain}" if self.domain else local

    def qualified(self, domain: str) -> Address:
        """Itself without a dot at its end; a bare user name with `domain`."""
        if not self.domain:
            return Address(self.local, domain) if self.local else self
        is_rooted = self.domain[-1] == "."
        return Address(self.local, self.domain[:-1]) if is_rooted else self

    @property
    def is_ascii(self) -> bool:
        """Whether it can be sent without SMTPUTF8."""
        return self.local.isascii() and self.domain.isascii()


def path_end(text: str) -> int:
    """Where the > of a path is that `text` begins with. Raises MailError."""
    is_quoted, place = False, 1
    if '"' not in text and ">" in text:
        return text.index(">")
    while place < len(text) and (is_quoted or text[place] != ">"):
        if text[place] == '"':
            is_quoted = not is_quoted
        place += 2 if is_quoted and text[place] == "\\" else 1
    if place >= len(text):
        raise bad_address(text, "unbalanced angle bracket")
    return place


def parse_path(text: str) -> tuple[Address, str]:
    """(address, what follows) of a path `<...>`; a source route is dropped.

    Brackets may be missing, as many clients forget them.
    """
    text = text.lstrip(" ")
    if not text.startswith("<"):
        word, _, rest = text.partition(" ")
        if rest and "=" not in rest:
            raise bad_address(text)
        return Address.parse(word), rest
    place = path_end(text)
    inner = text[1:place]
    if inner.startswith("@"):  # source route, RFC 5321 appendix C: ignored
        route, colon, inner = inner.partition(":")
        hops = route.split(",")
        if not colon or not all(h[:1] == "@" and is_domain(h[1:]) for h in hops):
            raise bad_address(text)
    return Address.parse(inner), text[place + 1 :]


class AddressScanner:
    """Finds the addresses of a To: field: groups, comments, names, routes.

    One pass, no recursion: what an attacker nests costs no more than its
    length. `found` has an address's text each, brackets and names taken off.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.found: list[str] = []
        self.plain: list[str] = []
        self.angle: list[str] | None = None

    def scan(self) -> list[str]:
        """All of them, in their order."""
        actions = {
            "(": self.comment,
            '"': self.quoted,
            "[": self.literal,
            "<": self.open_angle,
            ">": self.close_angle,
            ",": self.flush,
            ";": self.flush,
            ":": self.colon,
        }
        while self.place < len(self.text):
            char = self.text[self.place]
            self.place += 1
            actions.get(char, self.keep)(char)
        self.flush("")
        return self.found

    def keep(self, text: str) -> None:
        """Adds to what is being read: the angle's inside or plain text."""
        (self.plain if self.angle is None else self.angle).append(text)

    def comment(self, _: str) -> None:
        """Skips a comment, which may hold comments."""
        depth = 1
        while depth and self.place < len(self.text):
            char = self.text[self.place]
            self.place += 2 if char == "\\" else 1
            depth += (char == "(") - (char == ")")

    def quoted(self, _: str) -> None:
        """Keeps a quoted string whole."""
        start = self.place
        while self.place < len(self.text) and self.text[self.place] != '"':
            self.place += 2 if self.text[self.place] == "\\" else 1
        if self.place >= len(self.text):
            raise bad_address(self.text, "unbalanced quotation mark")
        self.place += 1
        self.keep(self.text[start - 1 : self.place])

    def literal(self, _: str) -> None:
        """Keeps a domain literal whole: it may hold a colon."""
        end = self.text.find("]", self.place)
        if end < 0:
            raise bad_address(self.text, "unbalanced square bracket")
        self.keep(f"[{self.text[self.place : end]}]")
        self.place = end + 1

    def open_angle(self, _: str) -> None:
        """Begins the address proper; what came before was a name."""
        self.angle = []

    def close_angle(self, _: str) -> None:
        """Ends the address; nothing but a comment may follow."""
        if self.angle is None:
            raise bad_address(self.text, "unbalanced angle bracket")
        self.found.append(self.joined(self.angle))
        self.angle, self.plain = None, []
        end = self.place
        while end < len(self.text) and self.text[end] not in ",;(":
            end += 1
        if self.text[self.place : end].strip():
            raise bad_address(self.text, "there is no comma behind >")
        self.place = end

    def colon(self, char: str) -> None:
        """Ends a group's name, or a route inside an angle."""
        if self.angle is None:
            self.plain = []
        else:
            self.keep(char)

    def flush(self, char: str) -> None:
        """Ends one address of the list; a comma in a route does not."""
        if self.angle is not None and char:
            return self.keep(char)
        if self.angle is not None:
            raise bad_address(self.text, "unbalanced angle bracket")
        text = self.joined(self.plain)
        if text:
            self.found.append(text)
        self.angle, self.plain = None, []
        return None

    def joined(self, pieces: list[str]) -> str:
        """What was kept, without blanks round an @ (RFC 5322 section 4.4)."""
        text = "".join(pieces).strip()
        if "@" not in text or '"' in text or " " not in text:
            return text
        return "@".join(part.strip() for part in text.split("@"))


def magic_words(local: str) -> tuple[str, int]:
    """(fail, defer or slow, its number) of a magic local part, else ("", 0).

    Where mail is captured, fail-550 and defer-451 are refused with that code,
    slow-30 is taken after so many seconds.
    """
    word, _, number = local.lower().partition("-")
    head = {"fail": "5", "defer": "4"}.get(word, "")
    is_code = len(number) == 3 and number[0] == head
    if not is_number(number) or not (is_code or word == "slow"):
        return "", 0
    return word, int(number)


def magic_failure(address: Address) -> MailError | None:
    """What a magic recipient is refused with, if it is."""
    word, code = magic_words(address.local)
    if word not in ("fail", "defer"):
        return None
    status = f"{code // 100}.0.0"
    return MailError(status, f"{address.local} is to {word}", code=code)


def header_addresses(text: str) -> list[Address]:
    """The addresses in a header field's value. Raises MailError.

    >>> header_addresses('team: "B, B" <b@x>, a (c) ;, d@y')
    [Address('b', 'x'), Address('a', ''), Address('d', 'y')]
    """
    found = []
    for spelling in AddressScanner(text).scan():
        if spelling.startswith("@") and ":" in spelling:
            spelling = spelling.partition(":")[2]
        found.append(Address.parse(spelling))
    return found


# == 4 Messages: WireReader, InputReader, Header, received_field, mbox_quoted =
# A message is bytes and is never decoded. Inside, lines end in LF.
# Source: RFC 5321 sections 4.4 and 4.5.2, RFC 5322, RFC 4155 (mboxrd).

MAX_HEADER = 1 << 20  # bytes; what `sendmail -t` is willing to search
FIELD_BYTES = bytes(range(33, 127))  # what a field's name is made of
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()


def rfc_date(seconds: float) -> str:
    """`"Wed, 19 Feb 2025 05:10:01 -0500 (EST)"`, RFC 5322 section 3.3."""
    t = time.localtime(seconds)
    minutes = abs(t.tm_gmtoff) // 60
    sign = "-" if t.tm_gmtoff < 0 else "+"
    return (
        f"{DAYS[t.tm_wday]}, {t.tm_mday} {MONTHS[t.tm_mon - 1]} {t.tm_year} "
        f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} "
        f"{sign}{minutes // 60:02}{minutes % 60:02} ({printable(t.tm_zone, 20)})"
    )


class WireReader:
    """What a client sends as a message, turned into ours: line ends LF.

    `fault` is a MailError for a bare CR or LF (SMTP smuggling, CVE-2023-51764)
    or more than `limit` bytes. Whatever is wrong, reading goes on to the real
    end, so that nothing in the message can be taken for a command.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0  # bytes as RFC 1870 counts: CRLF, dots taken off
        self.fault: MailError | None = None
        self.ended = False
        self.rest = b""  # what followed the end

    def clean(self, text: bytes) -> bytes:
        """CRLF to LF; notes a fault, and then is b""."""
        self.size += len(text)
        pairs = text.count(b"\r\n")
        for byte, name in ((b"\n", "LF"), (b"\r", "CR")):
            if text.count(byte) != pairs and self.fault is None:
                self.fault = MailError(
                    "5.5.2", f"Error: bare <{name}> received; lines end in CRLF"
                )
        if self.size > self.limit and self.fault is None:
            self.fault = MailError("5.3.4", "Message size exceeds fixed limit")
        return b"" if self.fault else text.replace(b"\r\n", b"\n")


class ChunkReader(WireReader):
    """What follows BDAT, RFC 3030: so many bytes, in which a dot is a dot.

    One reader serves all chunks of a message; expect() announces each.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.wanted = 0  # bytes of this chunk that are to come
        self.is_last = False
        self.held = b""

    def expect(self, size: int, is_last: bool) -> None:
        """A chunk of `size` bytes follows."""
        self.wanted, self.is_last, self.ended = size, is_last, False

    def feed(self, data: bytes) -> bytes:
        """Message bytes that `data` completes; `ended` at a chunk's end."""
        text, self.rest = data[: self.wanted], data[self.wanted :]
        self.wanted -= len(text)
        self.ended = not self.wanted
        text = self.held + text
        # A CR's LF may be still to come, but not behind the last chunk.
        is_open = text.endswith(b"\r") and not (self.ended and self.is_last)
        self.held = b"\r" if is_open else b""
        return self.clean(text[:-1] if is_open else text)


class DotReader(WireReader):
    """What follows 354: dots taken off; only CRLF.CRLF ends it.

    feed() takes bytes as they come from the wire, cut anywhere.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.held = b"\r\n"  # a dot in the first line is at a line's start too
        self.has_begun = False

    def feed(self, data: bytes) -> bytes:
        """Message bytes that `data` completes; b"" once there is a fault."""
        text = self.held + data
        end = text.find(b"\r\n.\r\n")
        if end >= 0:
            self.ended, self.held = True, b""
            text, self.rest = text[: end + 2], text[end + 5 :]
        else:
            # Keep back what could be the start of CRLF.CRLF or of CRLF-dot.
            cut = text.rfind(b"\r\n", max(0, len(text) - 4))
            if cut < 0:
                cut = len(text) - text.endswith(b"\r")
            text, self.held = text[:cut], text[cut:]
        text = text.replace(b"\r\n.", b"\r\n")
        if not self.has_begun and text:
            self.has_begun, text = True, text[2:]  # the CRLF that was put first
        return self.clean(text)


class InputReader:
    """What a program gives `sendmail` on standard input, as a message.

    CRLF becomes LF, another CR a blank, NUL is dropped. With `dot_ends` a
    line with only a dot ends the message (without -i, as sendmail does).
    """

    def __init__(self, dot_ends: bool) -> None:
        self.dot_ends = dot_ends
        self.held = b"\n"  # a dot in the first line is at a line's start too
        self.has_begun = False
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """Message bytes that `data` completes; b"" as data is the end."""
        text = self.held + data
        self.held = b""
        if data and text.endswith(b"\r"):
            text, self.held = text[:-1], b"\r"
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b" ").replace(b"\0", b"")
        text = self.cut(text, data == b"")
        if text and not self.has_begun:
            self.has_begun, text = True, text[1:]  # the LF that was put first
        return text

    def cut(self, text: bytes, is_last: bool) -> bytes:
        """`text` up to the dot that ends it, or to where one may begin."""
        if self.dot_ends:
            end = (text + b"\n" if is_last else text).find(b"\n.\n")
            if end >= 0:
                self.ended, text = True, text[: end + 1]
            elif not is_last:
                cut = text.rfind(b"\n", max(0, len(text) - 2))
                if cut >= 0:
                    text, self.held = text[:cut], text[cut:] + self.held
        return text


def is_field(line: bytes) -> bool:
    """Whether `line` begins a header field: name, perhaps blanks, colon."""
    name, colon, _ = line.partition(b":")
    name = name.rstrip(b" \t")
    return bool(colon and name) and not name.translate(None, FIELD_BYTES)


class Header:
    """The header of a message as a list of (name, raw text with its LF).

    `parse(block)` splits at the first line that is no field; `rest` is what
    follows the header, without the empty line between.
    """

    def __init__(self, fields: list[tuple[str, bytes]], rest: bytes = b"") -> None:
        self.fields = fields
        self.rest = rest

    @classmethod
    def parse(cls, block: bytes) -> Header:
        """The header at the start of `block` (bytes, LF line ends)."""
        found: list[tuple[str, int]] = []  # names, and where they begin
        place = 0
        while place < len(block):
            end = block.find(b"\n", place) + 1 or len(block)
            line = block[place:end]
            if is_field(line):
                name = line.partition(b":")[0].rstrip(b" \t")
                found.append((os_text(name).lower(), place))
            elif line[:1] not in b" \t" or not found:
                break
            place = end
        ends = [start for _, start in found[1:]] + [place]
        fields = [(name, block[a:b]) for (name, a), b in zip(found, ends)]
        rest = block[place:]
        return cls(fields, rest[1:] if rest.startswith(b"\n") else rest)

    def values(self, name: str) -> list[str]:
        """The unfolded values of every field of that name (in lower case)."""
        return [
            os_text(raw.partition(b":")[2]).replace("\n", "").strip()
            for key, raw in self.fields
            if key == name
        ]

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return any(key == name for key, _ in self.fields)

    def without(self, *names: str) -> Header:
        """A copy without the fields of these names."""
        kept = [(key, raw) for key, raw in self.fields if key not in names]
        return Header(kept, self.rest)

    def added(self, name: str, value: str) -> Header:
        """A copy with one more field at its end."""
        raw = os_bytes(f"{name}: {value}\n")
        return Header([*self.fields, (name.lower(), raw)], self.rest)

    def __bytes__(self) -> bytes:
        return b"".join(
            raw if raw.endswith(b"\n") else raw + b"\n" for _, raw in self.fields
        )


def drop_from_lines(block: bytes) -> bytes:
    """`block` without leading `From ` and `>From ` lines, as in Postfix."""
    while block.lstrip(b">").startswith(b"From "):
        block = block.partition(b"\n")[2]
    return block


def uucp_sender(block: bytes) -> str:
    """The sender that leading From_ lines name, as rmail(8) reads them, or "".

    >>> uucp_sender(b">From bob Tue Nov 24 10:00:00 2026 remote from far")
    'bob@far'
    """
    found = ""
    while block.lstrip(b">").startswith(b"From "):
        line, _, block = block.partition(b"\n")
        words = os_text(line).split()
        path, _, user = words[1].rpartition("!") if words[1:] else ("", "", "")
        host = words[-1] if words[-3:-1] == ["remote", "from"] else ""
        host = path.rpartition("!")[2] or host
        is_whole = not host or "@" in user or user == "<>"
        found = user if is_whole else f"{user}@{host}"
    return found


def encoded_word(text: str, used: int = 0) -> str:
    """`text` as RFC 2047 encoded words of at most 75 characters each.

    `used` are characters that stand before the first in its line.
    """
    import binascii  # a C module, needed for non-ASCII only

    words, piece = [], b""
    room = 45 - used
    for char in text:
        data = char.encode("utf-8", "replace")
        if len(piece) + len(data) > room:
            words.append(piece)
            piece, room = b"", 45
        piece += data
    words.append(piece)
    coded = (binascii.b2a_base64(word, newline=False).decode() for word in words)
    return "\n ".join(f"=?utf-8?B?{word}?=" for word in coded)


def any_text(data: bytes) -> str:
    """Bytes of which nobody said what they are: UTF-8, else Latin-1."""
    try:
        return data.decode()
    except ValueError:
        return data.decode("latin-1")


def display_name(text: str) -> str:
    """`text` as the phrase before an address: bare, quoted, or RFC 2047.

    >>> display_name("J. Doe")
    '"J. Doe"'
    """
    text = any_text(os_bytes(text))
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not clean.isascii():
        return encoded_word(clean, len("Resent-From: "))
    if all(is_atom_char(c) and c != "." or c == " " for c in clean):
        return clean
    return quoted(clean)


def gecos_name(gecos: str, login: str) -> str:
    """The full name in a passwd entry: up to the comma, & is the login."""
    for char in ",;%":
        gecos = gecos.partition(char)[0]
    return gecos.replace("&", login[:1].upper() + login[1:]).strip()


def received_field(fields: dict, host: str, queue_id: str, when: float) -> bytes:
    """Our own Received field, RFC 5321 section 4.4, in Postfix's shape.

    `fields`: helo, client ("name [address]"), proto, cipher of TLS, recipient
    (only if there is exactly one, so that Bcc does not leak), or uid for a
    local submission.
    """
    if fields.get("uid") is not None:
        head = f"Received: by {host} (minimta, from userid {fields['uid']})\n\tid "
        return os_bytes(f"{head}{queue_id}; {rfc_date(when)}\n")
    lines = [f"Received: by {host} (minimta)\n\tid {queue_id}"]
    if fields.get("client"):
        lines = [
            f"Received: from {fields['helo']} ({fields['client']})",
            f"\tby {host} (minimta) with {fields['proto']} id {queue_id}",
        ]
    if fields.get("cipher"):
        lines.insert(1, f"\t(using {fields['cipher']})")
    if fields.get("recipient"):
        lines.append(f"\tfor <{fields['recipient']}>")
    text = "\n".join(lines)
    return os_bytes(f"{text}; {rfc_date(when)}\n")


def begin_body(first: bytes) -> bytes:
    """`first` (the message's first bytes), set off where it has no header."""
    line = first.partition(b"\n")[0]
    is_header = not first or first.startswith(b"\n") or is_field(line)
    return first if is_header else b"\n" + first


def whole_lines(chunks: object) -> object:
    """`chunks` cut anew so that each but the last ends in LF if it can."""
    held = b""
    for chunk in chunks:
        text = held + chunk
        cut = text.rfind(b"\n") + 1
        if cut or len(text) > MAX_HEADER:
            yield text[: cut or len(text)]
            held = text[cut or len(text) :]
        else:
            held = text
    if held:
        yield held


def take_head(chunks: object) -> bytes:
    """As much of `chunks` as has the header in it, or MAX_HEADER of it."""
    block = b""
    for chunk in chunks:
        block += chunk
        if b"\n\n" in block or len(block) > MAX_HEADER:
            break
    return block


def peeked(items: object) -> tuple[bool, object]:
    """(whether there is anything, the same items), one read ahead."""
    import itertools

    items = iter(items)
    first = list(itertools.islice(items, 1))
    return bool(first), itertools.chain(first, items)


def even_blocks(chunks: object, size: int) -> object:
    """`chunks` put together, and cut into pieces of `size` bytes.

    What goes out in two packets waits for the first to be acknowledged.
    """
    held = b""
    for chunk in chunks:
        held += chunk
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held


def mbox_quoted(chunks: object) -> object:
    """`chunks` as the text of an mboxrd message: `>*From ` gets one more >.

    Ends in LF and an empty line, whatever the message ends in.
    """
    import re  # 8 ms; sendmail needs none of this

    line_start = re.compile(rb"^(>*From )", re.MULTILINE)
    at_start, last = True, b"\n"
    for text in whole_lines(chunks):
        if b"From " in text:
            head = b"" if at_start else b"\0"  # a line's middle is no line start
            text = line_start.sub(rb">\1", head + text)[len(head) :]
        at_start, last = text.endswith(b"\n"), text[-1:]
        yield text
    yield b"\n" if last == b"\n" else b"\n\n"


def dot_stuffed(chunks: object) -> object:
    """`chunks` (LF) as the wire wants them: CRLF, dots doubled, end included.

    A CR that is not part of a line end becomes a blank: never sent bare.
    """
    at_start = True
    for text in whole_lines(chunks):
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b" ")
        head = b"\n" if at_start else b""
        text = (head + text).replace(b"\n.", b"\n..")[len(head) :]
        at_start = text.endswith(b"\n")
        yield text.replace(b"\n", b"\r\n")
    yield b".\r\n" if at_start else b"\r\n.\r\n"


SECRETS = ("bcc", "resent-bcc", "return-path", "content-length")


def without_secrets(header: Header) -> Header:
    """A submitted message's header without what is not for its readers."""
    return header.without(*SECRETS)


def tight(raw: bytes) -> bytes:
    """A field without blanks before its colon: `From : x` is no From line."""
    name, colon, rest = raw.partition(b":")
    return name.rstrip(b" \t") + colon + rest


def complete_header(header: Header, origin: dict) -> Header:
    """A submitted message's header, with what it lacks and without secrets.

    `origin`: address, name (full name), host, unique (a word nobody else
    has), now. What is there stays, however malformed. Source: RFC 5322
    section 3.6; the order of additions is Postfix's.
    """
    header = without_secrets(header)
    header = Header([(key, tight(raw)) for key, raw in header.fields], header.rest)
    prefix = (
        "Resent-" if any(key.startswith("resent-") for key, _ in header.fields) else ""
    )
    if not header.has(f"{prefix}message-id".lower()):
        message_id = f"<{origin['unique']}@{origin['host']}>"
        header = header.added(f"{prefix}Message-ID", message_id)
    if not header.has(f"{prefix}date".lower()):
        header = header.added(f"{prefix}Date", rfc_date(origin["now"]))
    if not header.has(f"{prefix}from".lower()):
        name = display_name(origin["name"])
        address = origin["address"]
        shown = f"{name} <{address}>" if name else address
        header = header.added(f"{prefix}From", shown)
    return header


def recipient_fields(header: Header) -> list[str]:
    """Values of To, Cc, Bcc, or of the Resent- ones if there are any."""
    names = ("resent-to", "resent-cc", "resent-bcc")
    if not any(map(header.has, names)):
        names = ("to", "cc", "bcc")
    return [value for name in names for value in header.values(name)]


def header_recipients(header: Header) -> list[Address]:
    """Whom a message is for, as its header says. Raises MailError."""
    fields = recipient_fields(header)
    return [address for value in fields for address in header_addresses(value)]


# Bytes that drive a terminal are shown as pictures; what turns the direction
# of writing is left out; joiners stay, for Persian needs them.
TERMINAL_SAFE = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    127: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A))),
}


def terminal_text(text: str) -> str:
    """`text` as it may go to a terminal: no control sequence survives."""
    clean = text.translate(TERMINAL_SAFE)
    return clean.encode("utf-8", "replace").decode("utf-8")


# == 5 Aliases: Target, AliasTable, split_items ===============================
# What may stand to the right of a colon in aliases(5), and in ~/.forward.
# Source: aliases(5) of sendmail, Postfix and OpenSMTPD; Exim's redirect data.
# Failures: ValueError with a reason for one line; the table keeps them all.

BUILT_IN_ALIASES = {"postmaster": "root", "mailer-daemon": "root", "abuse": "root"}
MAX_DEPTH = 20  # aliases and forwards behind one another

# How a target that is no address begins -> its kind.
TARGET_PREFIXES = (
    ("|", "pipe"),
    (":include:", "include"),
    ("/", "file"),
    ("~/", "file"),  # below the home of whose .forward it is
    ("error:", "error"),  # OpenSMTPD's
    (":fail:", "error"),  # Exim's, as are the next two
    (":defer:", "error"),
    (":blackhole:", "null"),
)
# What follows these is a sentence: no comma ends it. Exim reads them so too.
SENTENCES = ("error:", ":fail:", ":defer:")


def unescaped(text: str) -> str:
    """The inside of a quoted string, each backslash taken for what follows."""
    chars, rest = [], iter(text)
    for char in rest:
        chars.append(next(rest, "") if char == "\\" else char)
    return "".join(chars)


class Target(Value):
    """One destination in an alias or .forward.

    `kind`: address (text is an address, may be bare), user (a name behind
    a backslash: not aliased further), null (/dev/null), file, pipe, include,
    error (text is `550 5.7.1 why`, see read_refusal).
    """

    __slots__ = ("kind", "text")

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text

    @classmethod
    def parse(cls, item: str) -> Target:
        """The target that `item` spells. Raises ValueError with the reason."""
        bare = cls.without_quotes(item)
        if bare == "/dev/null":
            return cls("null", bare)
        for prefix, kind in TARGET_PREFIXES:
            if bare.lower().startswith(prefix):
                return cls.parse_special(kind, prefix, bare[len(prefix) :].strip())
        return cls.parse_address(bare)

    @classmethod
    def without_quotes(cls, item: str) -> str:
        """`item`, without quotes around the whole of what is no address."""
        inside = item[1:-1].lower()
        if not (len(item) > 2 and item[0] == item[-1] == '"'):
            return item
        if inside.startswith("\\"):
            return item[1:-1]
        is_special = any(inside.startswith(prefix) for prefix, _ in TARGET_PREFIXES)
        return unescaped(item[1:-1]) if is_special else item

    @classmethod
    def parse_special(cls, kind: str, prefix: str, text: str) -> Target:
        """The target of that kind behind its prefix. Raises ValueError."""
        if kind == "null":
            return cls("null", "/dev/null")
        if kind == "error":
            code = {":fail:": 550, ":defer:": 450}.get(prefix, 0)
            status, why, code = read_refusal(text, code).fields()
            return cls("error", f"{code} {status} {why}")
        if kind == "pipe" and len(text) > 1 and text[0] == text[-1] == '"':
            text = unescaped(text[1:-1])  # |"command args", Postfix's other form
        if text in ("", "/"):
            raise ValueError(f"nothing behind {prefix}")
        if "\0" in text:
            raise ValueError("a NUL in the name of a file or command")
        if kind == "include" and text[0] != "/":
            raise ValueError(f":include:{printable(text, 60)}: need an absolute path")
        return cls(kind, prefix + text if kind == "file" else text)

    @classmethod
    def parse_address(cls, bare: str) -> Target:
        """The address, or user behind a backslash. Raises ValueError."""
        kind = "user" if bare.startswith("\\") else "address"
        if ":" in bare.partition("<")[0].partition('"')[0]:
            raise ValueError(f"not an address: {printable(bare, 100)}")
        try:
            found = header_addresses(bare[1:] if kind == "user" else bare)
        except MailError as error:
            raise ValueError(error.text) from None
        if len(found) != 1 or found[0].local[:1] in ("", "|", "/", ":", "\\"):
            raise ValueError(f"not an address: {printable(bare, 100)}")
        return cls(kind, str(found[0]))

    def __str__(self) -> str:
        prefixes = {"pipe": "|", "include": ":include:", "user": "\\"}
        whole = {"error": "error:"}.get(self.kind, "") + (
            prefixes.get(self.kind, "") + self.text
        )
        return whole if self.kind in ("address", "user", "null") else quoted(whole)


def item_end(text: str, start: int, stops: str) -> int:
    """Where the item that begins at `start` ends; quotes, <> and () are whole.

    Raises ValueError for a quotation mark that is not closed.
    """
    depth, is_quoted, place = 0, False, start
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 1
        elif char == '"':
            is_quoted = not is_quoted
        elif not is_quoted:
            depth = max(0, depth + (char in "(<") - (char in ")>"))
            if char in stops and not depth:
                return place
        place += 1
    if is_quoted:
        raise ValueError("unbalanced quotation mark")
    return len(text)


def command_end(text: str, start: int) -> int:
    """Where a command without quotes around it ends.

    At a comma and a blank, if what follows looks like a target: else the
    comma is the command's own, and it goes to the end of the line.
    """
    end = item_end(text, start, ",")
    after = text[end + 1 : item_end(text, min(end + 1, len(text)), ",")]
    word = after.strip()
    is_list = after[:1].isspace() and (
        word[:1] in ('"', "\\", "|", "/", ":") or "@" in word or " " not in word
    )
    return end if is_list else len(text)


def split_items(text: str, stops: str = ",") -> list[str]:
    """The items of `text` between commas; quotes, <> and () are kept whole.

    >>> split_items('a, "|cmd x, y", "B, B" <b@x>, :fail: no, never')
    ['a', '"|cmd x, y"', '"B, B" <b@x>', ':fail: no, never']
    """
    items, place = [], 0
    while place < len(text):
        while text[place : place + 1].isspace():
            place += 1
        if text[place : place + 10].lower().startswith(SENTENCES):
            end = len(text)
        elif text.startswith("|", place):
            end = command_end(text, place)
        else:
            end = item_end(text, place, stops)
        items.append(text[place:end].strip())
        place = end + 1
    return [item for item in items if item]


def loose_items(text: str) -> list[str]:
    """`text` as Postfix reads it: semicolons and blanks set apart as well.

    Blanks only between bare addresses: of anything else they are a part.
    """
    found = []
    for item in split_items(text, ",;"):
        is_bare = not any(char in '"<(\\|~' for char in item) and item[0] not in "/:"
        found += item.split() if is_bare and not item.startswith("error:") else [item]
    return found


def is_simple(text: str) -> bool:
    """Whether a target is a simple address, as most are."""
    local, at, domain = text.partition("@")
    is_common = local and len(text) <= MAX_LOCAL and COMMON.issuperset(local + domain)
    return bool(is_common) and text[0] not in "-=" and (not at or is_domain(domain))


def simple_targets(text: str) -> tuple[Target, ...]:
    """Targets between commas, if all are simple: 2 microseconds, not 40."""
    parts = [part.strip() for part in text.split(",")]
    simple = all(map(is_simple, parts))
    return tuple(Target("address", part) for part in parts) if simple else ()


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets of an alias's value or a .forward line. Raises ValueError."""
    return simple_targets(text) or tuple(
        Target.parse(item) for item in loose_items(text)
    )


def split_key(line: str) -> tuple[str, str]:
    """(name, value) of an aliases line; the name folded and unquoted."""
    end = line.find('"', 1) + 1 if line.startswith('"') else 0
    colon = line.find(":", end)
    if colon < 0:
        raise ValueError("need name: value")
    name = line[:colon].strip()
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = name[1:-1].replace("\\", "")
    if not name:
        raise ValueError("there is no name before the colon")
    return name.lower(), line[colon + 1 :].strip()


def trailing_comment(text: str) -> list[tuple[int, str]]:
    """(line, reason) of the first comment behind an alias, if there is one.

    Sendmail and Postfix take its words for recipients.
    """
    why = "what stands behind # is a comment here, but not for other mail systems"
    if "#" not in text:
        return []
    for number, line in enumerate(text.split("\n"), 1):
        bare = strip_comment(line) if "#" in line else line
        if bare != line and bare.strip():
            return [(number, why)]
    return []


def alias_lines(text: str) -> object:
    """(number of the first line, text) of each entry of an aliases file."""
    # A backslash at a line's end continues it too, says sendmail.
    return logical_lines(text.replace("\\\n", "\n "))


class AliasTable:
    """An aliases file as name -> (line, targets), with what is wrong in it.

    `problems` are lines that say nothing usable, `warnings` lines that may
    not do what was meant; both are (line, reason).
    """

    def __init__(self) -> None:
        self.entries: dict[str, tuple[int, tuple[Target, ...]]] = {}
        self.problems: list[tuple[int, str]] = []
        self.warnings: list[tuple[int, str]] = []
        self.plain: dict[str, tuple[Target, ...]] = {}  # values read before

    @classmethod
    def parse(cls, text: str) -> AliasTable:
        """The table of an aliases file's text."""
        table = cls()
        for _ in table.read(text):
            pass
        return table

    def read(self, text: str) -> object:
        """Takes up an aliases file's text; the names as they come."""
        self.warnings += trailing_comment(text)
        for line, entry in alias_lines(text):
            try:
                name = self.add(line, entry)
            except ValueError as error:
                self.problems.append((line, str(error)))
                continue
            if name:
                yield name

    def add(self, line: int, entry: str) -> str:
        """Adds one entry; its name, "" if it was there. Raises ValueError."""
        name, _, value = entry.partition(":")
        name, value = name.lower(), value.strip()
        is_plain = name and value in self.plain and COMMON.issuperset(name)
        if is_plain and name not in self.entries:
            self.entries[name] = (line, self.plain[value])
            return name
        if entry[0] in " \t":
            raise ValueError("the first line begins with white space")
        name, value = split_key(entry)
        simple = simple_targets(value)
        targets = simple or parse_targets(value)
        shown = printable(name, 60)
        if not targets:
            raise ValueError(f"{shown}: missing value for alias")
        if name in self.entries:
            first = self.entries[name][0]
            text = f"duplicate alias {shown}; line {first} counts"
            self.warnings.append((line, text))
            return ""
        if len(name.split()) > 1 and not entry.startswith('"'):
            self.warnings.append((line, f"{shown}: a name of two words: quote it"))
        if not simple and len(targets) != len(split_items(value)):
            self.warnings.append((line, f"{shown}: write commas between targets"))
        elif len(targets) == 1 and name:
            self.plain[value] = targets
        self.entries[name] = (line, targets)
        return name

    def told(self, text: str, check: object) -> object:
        """(name, value) of each entry of a text as it is taken up, in bytes.

        Last (b"", fields of an AliasReport); `check(table)` are its warnings.
        """
        known: dict[int, bytes] = {}  # many names may have the same targets
        longest = total = 0
        for name in self.read(text):
            targets = self.entries[name][1]
            value = known.get(id(targets))
            if value is None:
                value = known[id(targets)] = os_bytes(", ".join(map(str, targets)))
                longest = max(longest, len(value))
            key = os_bytes(name)
            total += len(key) + len(value)
            yield key, value
        yield b"", (self.problems, check(self), len(self.entries), longest, total)

    def loops(self) -> list[tuple[int, str]]:
        """(line, reason) of each alias that leads back to itself.

        `root: root` is no loop: it is the mailbox. One walk, any depth.
        """
        state: dict[str, int] = {}  # 1: on the way down, 2: done
        found = []
        for start, (_, targets) in self.entries.items():
            if len(targets) == 1 and targets[0].text.lower() not in self.entries:
                state[start] = 2  # it leads out at once
                continue
            way = [] if start in state else [(start, iter(self.names(start)))]
            state.setdefault(start, 1)
            while way:
                name, rest = way[-1]
                step = next(rest, None)
                if step is None:
                    state[name] = 2
                    way.pop()
                elif state.get(step) == 1 and step != name:
                    chain = [n for n, _ in way]
                    loop = " -> ".join([*chain[chain.index(step) :], step])
                    found.append((self.entries[step][0], f"alias loop: {loop}"))
                elif step in self.entries and step not in state:
                    state[step] = 1
                    way.append((step, iter(self.names(step))))
        return found

    def value(self, name: str) -> str | None:
        """The targets of alias `name` as the database keeps them."""
        entry = self.entries.get(name)
        return None if entry is None else ", ".join(map(str, entry[1]))

    def names(self, name: str) -> list[str]:
        """The bare names that alias `name` leads to."""
        targets = self.entries[name][1]
        return [t.text.lower() for t in targets if t.kind == "address"]

    def dangling(self, problem: object) -> list[tuple[int, str]]:
        """(line, reason) of each target that does not exist.

        `problem(target)` says why, or "" where there is nothing wrong; each
        target is asked for once, and a name of the table's own never.
        """
        found = []
        asked: dict[tuple, str] = {}
        for name, (line, targets) in self.entries.items():
            for target in targets:
                key = target.kind, target.text
                if not asked.get(key, "?"):
                    continue  # it is all right, as it was before
                other = target.text.lower()
                is_own = other in self.entries and other != name
                if target.kind == "address" and is_own:
                    continue
                if key not in asked:
                    asked[key] = problem(target)
                if asked[key]:
                    shown = f"{printable(name, 60)}: {printable(str(target), 100)}"
                    found.append((line, f"{shown}: {asked[key]}"))
        return found


class AliasReport(Value):
    """What newaliases says of a text.

    (line, reason) of what is wrong and of what may be; how many aliases there
    are, the bytes of the longest value, and of all.
    """

    __slots__ = ("problems", "warnings", "count", "longest", "total")

    def __init__(self, *fields: object) -> None:
        for name, value in zip(self.__slots__, fields):
            setattr(self, name, value)


# == 6 Queue words: Wishes, Envelope, Attempt, new_id, retry_delay ============
# A queue file's first lines and a journal's lines, as values.
# Failures: ValueError for what is not a queue file or a journal line.

OUTCOMES = SENT, DEFERRED, BOUNCED = "sent", "deferred", "bounced"
ID_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # no I L O U: said aloud
ID_SET, REPORT_SET = frozenset(ID_LETTERS), frozenset("BDS0123456789")
ID_BITS = 50  # 41 of milliseconds, 9 of chance: ten letters until the year 2039


def new_id(now: float, chance: int) -> str:
    """A queue id: ten letters that sort by time. `chance` is 9 random bits."""
    number = (int(now * 1000) << 9 | chance & 511) & (1 << ID_BITS) - 1
    shifts = range(ID_BITS - 5, -1, -5)
    return "".join(ID_LETTERS[number >> shift & 31] for shift in shifts)


def is_id(name: str) -> bool:
    """Whether `name` can be a queue id, ours or a report's.

    A report's is that of its message, a letter (bounce, delay, success) and a
    number.
    """
    if len(name) == 10:
        return ID_SET.issuperset(name)
    head, tail = name[:10], name[10:]
    is_head = len(head) == 10 and ID_SET.issuperset(head)
    return is_head and len(tail) < 30 and REPORT_SET.issuperset(tail)


def parent_id(report_id: str) -> str:
    """The id of the message that a report is about, "" if it is none's."""
    place = max(report_id.rfind(letter, 10) for letter in "BDS")
    return report_id[: max(0, place)]


def checksum(text: str) -> int:
    """32 bits that are the same for the same text, always (FNV-1a)."""
    number = 0x811C9DC5
    for byte in os_bytes(text):
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    return number


def retry_delay(age: float, shortest: int, longest: int, chance: float) -> float:
    """Seconds until the next attempt for mail `age` seconds old.

    As old as the mail is, within the limits, give or take a tenth by `chance`
    (0 to 1). Source: Postfix; RFC 5321 section 4.5.4.1 leaves it open.

    >>> retry_delay(0, 300, 4000, 0.5)
    300.0
    """
    return min(max(age, shortest), longest) * (0.9 + 0.2 * chance)


def is_xtext(text: str, longest: int = 500) -> bool:
    """Whether `text` is RFC 3461 section 4's xtext: printable, or +HH."""
    for piece in text.split("+")[1:]:
        if len(piece) < 2 or not all(c in "0123456789ABCDEF" for c in piece[:2]):
            return False
    plain = all("!" <= char <= "~" and char != "=" for char in text)
    return plain and 0 < len(text) <= longest


def plain_xtext(text: str) -> str:
    """What an xtext stands for, in one line.

    >>> plain_xtext("a+2Bb")
    'a+b'
    """
    head, *pieces = text.split("+")
    found = [chr(int(piece[:2], 16)) + piece[2:] for piece in pieces]
    return printable(head + "".join(found), 500)


def is_notify(text: str) -> bool:
    """Whether `text` is a NOTIFY= value, RFC 3461 section 4.1."""
    words = text.upper().split(",")
    known = {"SUCCESS", "FAILURE", "DELAY"}
    return words == ["NEVER"] or set(words) <= known and len(set(words)) == len(words)


def is_original(text: str) -> bool:
    """Whether `text` is an ORCPT= value, RFC 3461 section 4.2."""
    kind, semicolon, address = text.partition(";")
    plain = kind.isascii() and kind.replace("-", "").isalnum()
    return plain and bool(semicolon) and is_xtext(address)


class Wishes(Value):
    """What a recipient's sender wants to be told: NOTIFY and ORCPT of RCPT.

    RFC 3461 section 4; both "" where nothing was said.
    """

    __slots__ = ("notify", "original")

    def __init__(self, notify: str = "", original: str = "") -> None:
        self.notify = notify.upper()
        self.original = original

    def want(self, what: str) -> bool:
        """Whether a report of SUCCESS, FAILURE or DELAY is wanted."""
        return what in (self.notify or "FAILURE,DELAY").split(",")

    def parameters(self) -> str:
        """As parameters of RCPT, with a blank before each."""
        notify = f" NOTIFY={self.notify}" if self.notify else ""
        return notify + (f" ORCPT={self.original}" if self.original else "")


NO_WISHES = Wishes()

# Line behind a recipient's in the envelope -> (field of Wishes, its check).
WISH_LINES = {"notify": is_notify, "original": is_original}
# Line of the envelope for the whole message -> what it may be.
MESSAGE_LINES = {
    "origin": lambda text: True,
    "kind": lambda text: text in ("message", "report", "notice"),
    "body": lambda text: True,
    "ret": lambda text: text in ("FULL", "HDRS"),
    "envid": lambda text: is_xtext(text, 100),
}


def arrival_time(text: str) -> float:
    """When a message came, Unix time. Raises ValueError."""
    when = float(text)
    if not 0 <= when < 1e11:
        raise ValueError("no arrival time")
    return when


class Envelope:
    """Who sent a message and to whom: the first lines of its queue file.

    `sender` and `recipients` are addresses as text, "" the null sender;
    `origin` says where it came from: `uid 1000` or `[192.0.2.1] ESMTP name`;
    `kind` is message, report (a bounce) or notice (a bounce's bounce, for
    postmaster). `ret` and `envid` are RET and ENVID of MAIL, `wishes` maps a
    recipient to its Wishes.
    """

    arrived = 0.0
    kind = "message"
    origin = body = ret = envid = ""

    def __init__(self, sender: str, recipients: list[str], **more: object) -> None:
        self.sender = sender
        self.recipients = recipients
        self.wishes: dict[str, Wishes] = {}
        vars(self).update(more)

    def wishes_of(self, recipient: str) -> Wishes:
        """What is to be told of one recipient."""
        return self.wishes.get(recipient, NO_WISHES)

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) of its lines."""
        rows = [("arrived", repr(self.arrived)), ("sender", self.sender)]
        for name in MESSAGE_LINES:
            value = getattr(self, name)
            if value or name in ("origin", "kind", "body"):
                rows.append((name, value))
        for recipient in self.recipients:
            rows.append(("recipient", recipient))
            if recipient in self.wishes:
                wishes = self.wishes[recipient]
                pairs = zip(WISH_LINES, wishes.fields())
                rows += [(name, value) for name, value in pairs if value]
        return rows

    def __bytes__(self) -> bytes:
        rows = self.rows()
        text = "".join(f"{name}: {value}\n" for name, value in rows)
        if text.count("\n") != len(rows) or "\r" in text or "\0" in text:
            raise ValueError("a line end in the envelope")
        return os_bytes(text) + b"\n"

    @classmethod
    def parse(cls, block: bytes) -> Envelope:
        """The envelope at the start of `block`, up to the empty line."""
        return cls.of(cls.split(block))

    @classmethod
    def of(cls, pairs: list[list[str]]) -> Envelope:
        """The envelope of these lines, among others. Raises ValueError."""
        rows = dict(pairs)
        recipients = [value for name, value in pairs if name == "recipient"]
        if "sender" not in rows or "arrived" not in rows or not recipients:
            raise ValueError("no sender, recipient or arrival time")
        found = cls(rows["sender"], recipients)
        found.arrived = arrival_time(rows["arrived"])
        for name, is_good in MESSAGE_LINES.items():
            value = rows.get(name)
            if value and is_good(value):
                setattr(found, name, value)
        if not WISH_LINES.keys().isdisjoint(rows):
            found.wishes = cls.find_wishes(pairs)
        return found

    @classmethod
    def split(cls, block: bytes) -> list[list[str]]:
        """[name, value] of each line up to the empty one."""
        end = block.find(b"\n\n")
        if end < 0:
            raise ValueError("no empty line behind the envelope")
        pairs = [line.split(": ", 1) for line in os_text(block[:end]).split("\n")]
        for pair in pairs:
            if len(pair) == 1:
                if not pair[0].endswith(":"):
                    shown = printable(pair[0], 60)
                    raise ValueError(f"not an envelope line: {shown}")
                pair[:] = pair[0][:-1], ""
        return pairs

    @classmethod
    def find_wishes(cls, pairs: list[list[str]]) -> dict[str, Wishes]:
        """Recipient -> what stands in the lines behind it."""
        recipient, said = "", {}
        for name, value in pairs:
            if name == "recipient":
                recipient = value
            elif name in WISH_LINES and WISH_LINES[name](value):
                said.setdefault(recipient, {})[name] = value
        return {name: Wishes(**words) for name, words in said.items()}


class Attempt(Value):
    """One line of a journal: what became of one recipient at one destination.

    `destination` names the final target ("mailbox bob", "remote a@b"); it is
    not tried again once it is sent or bounced.
    """

    __slots__ = (
        "when", "outcome", "status", "recipient", "destination", "relay", "text",
    )  # fmt: skip

    def __init__(self, when: float, outcome: str, status: str, *words: str) -> None:
        self.when = when
        self.outcome = outcome
        self.status = status
        self.recipient, self.destination, self.relay, self.text = words

    @property
    def is_final(self) -> bool:
        """Whether this destination is done with."""
        return self.outcome != DEFERRED

    def __bytes__(self) -> bytes:
        words = (repr(self.when), *self.fields()[1:])
        return os_bytes("\t".join(w.replace("\t", " ") for w in words) + "\n")

    @classmethod
    def parse(cls, line: str) -> Attempt:
        """The attempt that a line of a journal spells."""
        words = line.split("\t")
        if len(words) != 7 or words[1] not in OUTCOMES:
            raise ValueError(f"not a journal line: {printable(line, 60)}")
        return cls(float(words[0]), *words[1:])


def parse_journal(text: bytes) -> list[Attempt]:
    """A journal's attempts; a torn last line (a crash) does not count."""
    found = []
    for line in os_text(text).split("\n")[:-1]:
        try:
            found.append(Attempt.parse(line))
        except ValueError:
            continue  # half a line that a later one was appended to
    return found


def last_round(attempts: list[Attempt]) -> list[Attempt]:
    """The lines of each recipient's last attempt: all that was open then."""
    if len(attempts) == 1:
        return attempts
    when = {attempt.recipient: attempt.when for attempt in attempts}
    latest = {
        (attempt.recipient, attempt.destination): attempt
        for attempt in attempts
        if attempt.when == when[attempt.recipient]
    }
    return list(latest.values())


def progress(attempts: list[Attempt]) -> tuple[int, dict[str, str], set[str]]:
    """What a journal says: tries, who is deferred and why, who is done."""
    waiting: dict[str, str] = {}
    for attempt in last_round(attempts):
        if not attempt.is_final:
            waiting.setdefault(attempt.recipient, attempt.text)
    done = {attempt.recipient for attempt in attempts} - waiting.keys()
    return len({attempt.when for attempt in attempts}), waiting, done


FLAGS = {"active": "*", "hold": "!"}  # behind an id in mailq
SHORT_LINE = 1 << 12  # characters of the longest line in the overview


class QueueEntry:
    """A message in the queue as mailq shows it, and as the daemon sends it.

    `state` is active, deferred or hold; `reasons` maps a recipient to why it
    is deferred.
    """

    def __init__(self, queue_id: str, size: int, envelope: Envelope) -> None:
        self.queue_id = queue_id
        self.size = size
        self.envelope = envelope
        self.state = "active"
        self.reasons: dict[str, str] = {}
        self.done: set[str] = set()
        self.due = 0.0  # its next attempt
        self.tries = 0  # attempts so far
        self.is_given_up = False  # whether it is returned at the next one

    @property
    def pending(self) -> list[str]:
        """The recipients that are neither sent nor bounced."""
        return [r for r in self.envelope.recipients if r not in self.done]

    def note(self, tries: int, reasons: dict[str, str], done: set[str]) -> None:
        """Takes up what the journal says: progress()."""
        self.tries, self.reasons, self.done = tries, reasons, done
        if reasons:
            self.state = "deferred"

    def __bytes__(self) -> bytes:
        rows = [("id", self.queue_id), ("size", str(self.size)), ("state", self.state)]
        rows += [("due", repr(self.due)), ("tries", str(self.tries))]
        rows += [("given-up", "yes")] if self.is_given_up else []
        rows += [("reason", f"{r}\t{why}") for r, why in self.reasons.items()]
        rows += [("done", recipient) for recipient in self.done]
        head = "".join(f"{name}: {value}\n" for name, value in rows)
        return os_bytes(head) + bytes(self.envelope)

    @classmethod
    def parse(cls, block: bytes) -> QueueEntry:
        """The entry that bytes() wrote."""
        pairs = Envelope.split(block)
        first = dict(pairs)
        entry = cls(first["id"], int(first["size"]), Envelope.of(pairs))
        entry.state = first["state"]
        entry.due, entry.tries = float(first["due"]), int(first["tries"])
        entry.is_given_up = "given-up" in first
        for name, value in pairs:
            if name == "reason":
                recipient, _, why = value.partition("\t")
                entry.reasons[recipient] = why
            elif name == "done":
                entry.done.add(value)
        return entry

    def line(self) -> str:
        """Itself on one line of the overview; "" where it does not fit."""
        envelope = self.envelope
        words = [self.queue_id, repr(self.due), str(self.size), str(self.tries)]
        words += [repr(envelope.arrived), envelope.sender, envelope.origin]
        for name in envelope.recipients:
            mark = DEFERRED if name in self.reasons else ""
            mark = "done" if name in self.done else mark
            words += [name, mark, self.reasons.get(name, "")]
        line = "\t".join([*words, "."])
        fits = len(line) < SHORT_LINE and line.count("\t") == len(words)
        return line if fits else ""

    @classmethod
    def recall(cls, line: str, due: float) -> QueueEntry | None:
        """The entry of a line of the overview, for whoever only looks at it.

        None if the line is torn, or tells of an earlier time than `due`.
        """
        words = line.split("\t")
        is_whole = words.pop() == "." and len(words) % 3 == 1
        if not is_whole or len(words) < 10 or words[1] != repr(due):
            return None
        queue_id, _, size, tries, arrived, sender, origin = words[:7]
        rows = list(zip(words[7::3], words[8::3], words[9::3]))
        envelope = Envelope(sender, words[7::3])
        envelope.origin = origin
        try:
            envelope.arrived = arrival_time(arrived)
            entry, number = cls(queue_id, int(size), envelope), int(tries)
        except ValueError:
            return None
        waiting = {name: why for name, mark, why in rows if mark == DEFERRED}
        done = {name for name, mark, _ in rows if mark == "done"}
        entry.note(number, waiting, done)
        return entry

    def tree(self) -> dict:
        """Itself for JSON: the keys of `postqueue -j`, then our own."""
        recipients = []
        for name in self.pending:
            why = self.reasons.get(name, "")
            recipients.append(
                {"address": name, **({"delay_reason": why} if why else {})}
            )
        return {
            "queue_name": self.state,
            "queue_id": self.queue_id,
            "arrival_time": int(self.envelope.arrived),
            "message_size": self.size,
            "forced_expire": self.is_given_up,
            "sender": self.envelope.sender or "MAILER-DAEMON",
            "recipients": recipients,
            "next_attempt": int(self.due),
            "attempts": self.tries,
        }

    def rows(self, is_long: bool = False) -> str:
        """Its lines in mailq, as in Postfix; `is_long` tells of tries."""
        flag = FLAGS.get(self.state, "") + ("#" if self.is_given_up else "")
        sender = printable(self.envelope.sender or "MAILER-DAEMON")
        when = time.ctime(self.envelope.arrived)[:20]
        row = "%-10s%1s %7d %20.20s %s\n"
        lines = [row % (self.queue_id, flag, self.size, when, sender)]
        last = ""
        for recipient in self.pending:
            reason = printable(self.reasons.get(recipient, ""))
            if reason != last:
                reason = reason or "reason unavailable"
                lines.append(f"{f'({reason})':>78}\n")
            last = reason
            lines.append(f"{'':41}{printable(recipient)}\n")
        if is_long and self.tries:
            when = "on hold" if self.state == "hold" else time.ctime(self.due)
            lines.append(f"{'':41}attempts: {self.tries}, next: {when}\n")
        return "".join(lines)


def message_rows(
    envelope: Envelope, size: int, message_id: str, attempts: list[Attempt]
) -> list[str]:
    """What `trace` needs to know of a message, lines `name: value`."""
    rows = [f"{name}: {value}" for name, value in envelope.rows()]
    rows += [f"size: {size}", f"message-id: {message_id}"]
    lines = (os_text(bytes(attempt)).rstrip("\n") for attempt in attempts)
    return rows + [f"attempt: {line}" for line in lines]


class Trace:
    """What happened to a message, from records (kind, lines `name: value`).

    A `queue` or `hold` record says that it is there still, `message` that it
    is done with, `dialogue` what was said to another host, last one last.
    """

    def __init__(self, queue_id: str, records: list[tuple[str, list[str]]]) -> None:
        self.queue_id = queue_id
        self.records = records
        self.state, self.rows = "", []
        self.dialogues = [rows for kind, rows in records if kind == "dialogue"]
        for kind, rows in records:
            if kind in ("queue", "hold", "message") and self.state in ("", "done"):
                self.state, self.rows = {"message": "done"}.get(kind, kind), rows

    def values(self, name: str) -> list[str]:
        """The values of its lines of that name."""
        head = f"{name}: "
        return [row[len(head) :] for row in self.rows if row.startswith(head)]

    def value(self, name: str) -> str:
        """The first of them, or ""."""
        return next(iter(self.values(name)), "")

    @property
    def attempts(self) -> list[Attempt]:
        """Every attempt, in the order of time.

        What is done while others are on their way is noted twice.
        """
        found = []
        for line in dict.fromkeys(self.values("attempt")):
            try:
                found.append(Attempt.parse(line))
            except ValueError:
                continue
        return [a for a in found if a.destination != "more"]

    def is_settled(self, since: float = 0.0) -> bool:
        """Whether each recipient had an attempt since, or is done with."""
        tried = {a.recipient for a in self.attempts if a.is_final or a.when >= since}
        return self.state == "done" or tried >= set(self.values("recipient"))

    def __str__(self) -> str:
        rows = [f"{self.queue_id}  {self.state or 'unknown'}"]
        if self.rows:
            when = rfc_date(float(self.value("arrived") or 0))
            rows.append(
                f"arrived    {when}, {self.value('origin') or 'origin unknown'}"
            )
            rows.append(f"sender     <{self.value('sender')}>")
            size, name = self.value("size"), self.value("message-id")
            rows.append(f"message    {size} bytes, Message-ID {name or 'none'}")
        for recipient in self.values("recipient"):
            rows.append(f"recipient  <{recipient}>")
            rows += [f"  {line}" for line in self.outcomes(recipient)]
        if self.value("next"):
            rows.append(f"next try   {rfc_date(float(self.value('next')))}")
        for dialogue in self.latest():
            rows += self.dialogue(dialogue)
        return "".join(f"{printable(row)}\n" for row in rows)

    def outcomes(self, recipient: str) -> list[str]:
        """A line for each attempt at a recipient."""
        found = []
        for one in self.attempts:
            if one.recipient == recipient:
                target = one.destination.partition(" ")[2]
                by_way = f" <{target}>" if target not in ("", recipient) else ""
                tls = self.tls(one)
                where = f"{one.relay}{', ' if tls else ''}{tls}"
                found.append(
                    f"{time.ctime(one.when)}  {one.outcome} {one.status}{by_way} "
                    f"({where}): {one.text}"
                )
        return found or ["not tried yet"]

    def tls(self, attempt: Attempt) -> str:
        """The TLS of an attempt, as far as its dialogue is still there."""
        for rows in reversed(self.dialogues):
            if f"relay: {attempt.relay}" in rows:
                found = [row[5:] for row in rows if row.startswith("tls: ")]
                return f"TLS {found[0]}" if found else ""
        return ""

    def latest(self) -> list[list[str]]:
        """The last dialogue with each host, the last one last."""
        found: dict[str, list[str]] = {}
        for rows in self.dialogues:
            relay = next((row for row in rows if row.startswith("relay: ")), "")
            found.pop(relay, None)
            found[relay] = rows
        return list(found.values())

    def dialogue(self, rows: list[str]) -> list[str]:
        """A dialogue as lines, with where it was held."""
        words = dict(row.partition(": ")[::2] for row in rows)
        said = [row for row in rows if row[:3] in ("C: ", "S: ", "-: ")]
        earlier = [row[9:] for row in rows if row.startswith("earlier: ")]
        head = f"dialogue   {words.get('relay', '')}, route {words.get('route', '')}"
        return [
            *(f"earlier    {text}" for text in earlier),
            f"{head}, TLS {words.get('tls', 'none')}",
            *(f"  {row}" for row in said),
        ]

    def tree(self) -> dict:
        """Itself for JSON."""
        found: dict = {"queue_id": self.queue_id, "state": self.state}
        for name in ("arrived", "sender", "origin", "size", "message-id", "next"):
            found[name.replace("-", "_")] = self.value(name)
        found["recipients"] = self.values("recipient")
        names = Attempt.__slots__
        found["attempts"] = [dict(zip(names, one.fields())) for one in self.attempts]
        found["dialogue"] = self.dialogues[-1] if self.dialogues else []
        found["dialogues"] = self.latest()
        return found


MAILQ_TITLE = "-Queue ID-  --Size-- ----Arrival Time---- -Sender/Recipient-------\n"


def mailq_text(messages: object) -> object:
    """mailq's text in pieces, for (rows, size) of each message."""
    count = size = 0
    for rows, more in messages:
        yield ("\n" if count else MAILQ_TITLE) + rows
        count, size = count + 1, size + more
    yield (
        f"\n-- {size // 1024} Kbytes in {counted(count, 'Request')}.\n"
        if count
        else "Mail queue is empty\n"
    )


# == 7 Queue selection: Selector, ACTIONS, summary_text =======================
# Which messages a queue command means, and what it does with them.
# Source: exiqgrep(8), postsuper(1), Postfix's wording.
# Failures: ValueError for a selector that is none.

# Action -> (what is said of a message, what of all of them).
ACTIONS = {
    "hold": ("placed on hold", "Placed on hold"),
    "release": ("released from hold", "Released from hold"),
    "remove": ("removed", "Deleted"),
    "requeue": ("requeued", "Requeued"),
    "bounce": ("expired", "Force-expired"),
    "expire": ("expired", "Force-expired"),  # but what is on hold stays there
    "run": ("due now", "Due now"),
}
# Other names for them, as other mail systems have them.
ACTION_NAMES = {
    **{name: name for name in ACTIONS},
    "delete": "remove",
    "rm": "remove",
    "flush": "run",
    "retry": "run",
    "thaw": "release",
    "freeze": "hold",
}
STATES = {"held": "hold", "hold": "hold", "deferred": "deferred", "active": "active"}


def address_matches(pattern: str, address: str) -> bool:
    """Whether an address has `pattern` in it, in any case; <> is nobody."""
    if pattern == "<>":
        return not address
    return pattern.lower() in address.lower()


def domain_of(name: str) -> str:
    """The domain of an address, in lower case."""
    return name.rpartition("@")[2].lower()


class Selector:
    """One condition on a message in the queue, perhaps negated by `!`.

    An id or the beginning of one, `all`, a state, to:PART, from:PART,
    host:DOMAIN, reason:REGEX, older:TIME, younger:TIME.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_negated = text.startswith("!")
        word = text.lstrip("!")
        self.kind, colon, self.value = word.partition(":")
        if not colon:
            self.kind, self.value = self.plain_kind(word), word
        is_plain = self.kind in ("all", "state", "id")
        is_known = self.kind in self.CHECKS and is_plain != bool(colon)
        try:
            if not is_known or not self.value:
                raise ValueError("there is none like that")
            if self.kind in ("older", "younger"):
                self.seconds = read_amount(self.value, TIME_UNITS)
            if self.kind == "reason":
                self.regex = self.compiled()
        except ValueError as error:
            why = f"not a selector: {printable(text, 60)}: {error}"
            raise ValueError(why) from None

    def compiled(self) -> object:
        """The regular expression of reason:. Raises ValueError."""
        import re  # 8 ms; only this one needs it

        try:
            return re.compile(self.value, re.IGNORECASE)
        except re.error as error:
            raise ValueError(str(error)) from None

    def plain_kind(self, word: str) -> str:
        """What a word without a colon means."""
        if word == "all":
            return "all"
        if word in STATES:
            return "state"
        is_start = word and all(char in ID_LETTERS + "BDS" for char in word)
        return "id" if is_start else ""

    def matches(self, entry: QueueEntry, now: float) -> bool:
        """Whether a message is meant."""
        return self.CHECKS[self.kind](self, entry, now) != self.is_negated

    def by_all(self, entry: QueueEntry, now: float) -> bool:
        """Every message."""
        return True

    def by_state(self, entry: QueueEntry, now: float) -> bool:
        """held, deferred, active."""
        return entry.state == STATES[self.value]

    def by_id(self, entry: QueueEntry, now: float) -> bool:
        """Its id, or how it begins."""
        return entry.queue_id.startswith(self.value)

    def by_recipient(self, entry: QueueEntry, now: float) -> bool:
        """to: a part of a recipient that is pending."""
        return any(address_matches(self.value, name) for name in entry.pending)

    def by_sender(self, entry: QueueEntry, now: float) -> bool:
        """from: a part of the sender; <> is the null sender."""
        return address_matches(self.value, entry.envelope.sender)

    def by_host(self, entry: QueueEntry, now: float) -> bool:
        """host: the domain of a recipient, or one above it."""
        wanted = self.value.lower().lstrip("@")
        domains = map(domain_of, entry.pending)
        return any(one == wanted or one.endswith(f".{wanted}") for one in domains)

    def by_reason(self, entry: QueueEntry, now: float) -> bool:
        """reason: a regular expression."""
        return any(self.regex.search(why) for why in entry.reasons.values())

    def by_age(self, entry: QueueEntry, now: float) -> bool:
        """older, younger: how long ago it came."""
        is_older = now - entry.envelope.arrived > self.seconds
        return is_older == (self.kind == "older")

    CHECKS = {
        "all": by_all,
        "state": by_state,
        "id": by_id,
        "to": by_recipient,
        "from": by_sender,
        "host": by_host,
        "reason": by_reason,
        "older": by_age,
        "younger": by_age,
    }


def chooser(selectors: list[Selector], now: float) -> object:
    """Whether an entry is meant: of ids one must fit, of the rest each."""
    ids = [one for one in selectors if one.kind == "id" and not one.is_negated]
    rest = [one for one in selectors if one not in ids]

    def is_wanted(entry: QueueEntry) -> bool:
        is_named = not ids or any(one.matches(entry, now) for one in ids)
        return is_named and all(one.matches(entry, now) for one in rest)

    return is_wanted


def shown_age(seconds: float) -> str:
    """An age as exim shows it: `5m`, `26h`, `4d`."""
    minutes = int(seconds / 60)
    if minutes <= 90:
        return f"{minutes}m"
    return f"{minutes // 60}h" if minutes <= 72 * 60 else f"{minutes // 1440}d"


def shown_size(size: int) -> str:
    """A size as exim shows it: `355`, `2.9K`, `17K`, `1.2M`."""
    for unit in ("", "K", "M", "G"):
        if size < 1024 or unit == "G":
            break
        size /= 1024
    return f"{size:.0f}" if not unit else f"{size:.{1 if size < 10 else 0}f}{unit}"


def summary_text(entries: object, now: float) -> str:
    """Messages by recipient's domain, as exiqsumm has them, with a reason."""
    rows: dict[str, list] = {}
    for entry in entries:
        reasons = {
            domain_of(name): entry.reasons.get(name, "") for name in entry.pending
        }
        for domain, why in reasons.items():
            row = rows.setdefault(domain, [0, 0, now, 0.0, {}])
            arrived = entry.envelope.arrived
            row[0], row[1] = row[0] + 1, row[1] + entry.size
            row[2], row[3] = min(row[2], arrived), max(row[3], arrived)
            row[4][why] = row[4].get(why, 0) + 1
    lines = ["Count  Volume  Oldest  Newest  Domain"]
    for domain, (count, size, oldest, newest, reasons) in sorted(
        rows.items(), key=lambda item: (-item[1][0], item[0])
    ):
        ages = (shown_age(now - oldest), shown_age(now - newest))
        head = f"{count:5}  {shown_size(size):>6}  {ages[0]:>6}  {ages[1]:>6}  "
        lines.append(head + printable(domain))
        why = max(reasons, key=reasons.get)
        lines += [f"{'':31}({printable(why, 200)})"] if why else []
    return "".join(f"{line}\n" for line in lines)


# == 8 Dialogue: Reply, Client, Transaction, Session ==========================
# The SMTP server's side of a conversation, without a socket: a line goes in,
# a Reply comes out. The same Session serves TCP, the submit socket and -bs.
# Source: RFC 5321; 1870 SIZE, 2034 status codes, 2920, 3030 BDAT, 3207 TLS,
# 4954 AUTH, 6152, 6531. Failures: never raises; every error is a Reply.

MAX_COMMAND = 1024  # bytes with CRLF; RFC 5321 4.5.3.1.4 wants at least 512
MAX_AUTH_LINE = 12288  # the same in an AUTH exchange, RFC 4954 section 4
MAX_ERRORS = 20  # Postfix smtpd_hard_error_limit
MAX_GUESSES = 3  # wrong passwords of one session
CONTROLS = bytes(byte for byte in range(128) if byte < 32 and byte != 9 or byte == 127)
# What the log counts of a session when it ends, in Postfix's order.
COUNTED = (
    "helo ehlo starttls auth mail rcpt bdat data rset noop vrfy expn help quit"
).split()


def is_absent(value: str | None) -> bool:
    """Whether a parameter was given without a value."""
    return value is None


def is_size(text: str) -> bool:
    """Whether `text` is a SIZE= value, RFC 1870 section 5."""
    return text.isascii() and text.isdigit() and len(text) <= 20


# Parameter of MAIL -> whether its value (None if it has none) is right.
MAIL_PARAMETERS = {
    "SIZE": lambda value: bool(value) and is_size(value),
    "BODY": lambda value: bool(value) and value.upper() in ("7BIT", "8BITMIME"),
    "SMTPUTF8": is_absent,
    "AUTH": bool,  # read and given no weight, RFC 4954 section 5
    "RET": lambda value: bool(value) and value.upper() in ("FULL", "HDRS"),
    "ENVID": lambda value: bool(value) and is_xtext(value, 100),
}
# The same for RCPT, RFC 3461 section 4.
RCPT_PARAMETERS = {
    "NOTIFY": lambda value: bool(value) and is_notify(value),
    "ORCPT": lambda value: bool(value) and is_original(value),
}
# A local submitter that has good recipients too may hand over an unknown one
# to be bounced: its exit code cannot tell of both.
LOCAL_RCPT_PARAMETERS = {**RCPT_PARAMETERS, "XBOUNCE": is_absent}
# What came by another host (rmail) is not completed here; -odq lets a message
# wait as one that was deferred.
LOCAL_MAIL_PARAMETERS = {**MAIL_PARAMETERS, "XASIS": is_absent, "XLATER": is_absent}


def read_parameters(text: str, known: dict) -> dict[str, str | None]:
    """ESMTP parameters as keyword -> value (None without `=`).

    `known` maps a keyword to a check of its value. Raises KeyError for one
    that is not known, ValueError for a bad or doubled one.
    """
    found: dict[str, str | None] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        name = name.upper()
        if not known[name](value if equals else None) or name in found:
            raise ValueError(word)
        found[name] = value if equals else None
    return found


def printable_bytes(line: bytes) -> bool:
    """Whether a command line is free of control bytes (a tab may pass)."""
    return len(line.translate(None, CONTROLS)) == len(line)


class Reply(Value):
    """One reply: three digits, enhanced status ("" for none), lines of text.

    `action` is what the connection does after it: "" goes on, "close" hangs
    up; "data" and "chunk" read a message or a part of it, "tls" secures the
    connection, "auth" checks a password, "queue" lists the queue, "flush" runs
    it. With code 0 nothing is said before that is done.
    """

    __slots__ = ("code", "status", "lines", "action")

    def __init__(self, code: int, status: str, *lines: str, action: str = "") -> None:
        self.code = code
        self.status = status
        self.lines = lines
        self.action = action

    def __bytes__(self) -> bytes:
        if not self.code:
            return b""
        status = f"{self.status} " if self.status else ""
        last = len(self.lines) - 1
        return b"".join(
            os_bytes(f"{self.code}{' ' if n == last else '-'}{status}{line}\r\n")
            for n, line in enumerate(self.lines)
        )

    @property
    def is_error(self) -> bool:
        """Whether it refuses something."""
        return self.code >= 400

    @classmethod
    def refusal(cls, error: MailError) -> Reply:
        """The reply for a failure: its status, a code of the same class."""
        codes = {"5.3.4": 552, "4.3.1": 452, "5.1.3": 501, "5.7.1": 554}
        usual = 451 if error.is_temporary else 550
        code = error.code or codes.get(error.status, usual)
        return cls(code, error.status, printable(error.text, 400))


OK = Reply(250, "2.0.0", "Ok")
SENDER_OK = Reply(250, "2.1.0", "Ok")
RECIPIENT_OK = Reply(250, "2.1.5", "Ok")
QUEUE_IS_RUN = Reply(250, "2.0.0", "Ok: queue is run")
SEND_MESSAGE = Reply(354, "", "End data with <CR><LF>.<CR><LF>", action="data")
BYE = Reply(221, "2.0.0", "Bye", action="close")
CANNOT_VERIFY = Reply(252, "2.0.0", "Send some mail, I will try my best")
UNKNOWN_COMMAND = Reply(500, "5.5.2", "Error: command not recognized")
NOT_IMPLEMENTED = Reply(502, "5.5.1", "Error: command not implemented")
BARE_LF = Reply(500, "5.5.2", "Error: bare <LF> received; lines end in CRLF")
LINE_TOO_LONG = Reply(500, "5.5.2", "Error: line too long")
BAD_BYTES = Reply(500, "5.5.2", "Error: bad character in command")
NEED_HELO = Reply(503, "5.5.1", "Error: send HELO/EHLO first")
NEED_NAME = Reply(501, "5.5.4", "Syntax: EHLO hostname")
NEED_MAIL = Reply(503, "5.5.1", "Error: need MAIL command")
NEED_RCPT = Reply(503, "5.5.1", "Error: need RCPT command")
NO_RECIPIENTS = Reply(554, "5.5.1", "Error: no valid recipients")
NESTED_MAIL = Reply(503, "5.5.1", "Error: nested MAIL command")
MAIL_SYNTAX = Reply(501, "5.5.4", "Syntax: MAIL FROM:<address>")
RCPT_SYNTAX = Reply(501, "5.5.4", "Syntax: RCPT TO:<address>")
NO_PARAMETER = Reply(501, "5.5.4", "Syntax: no parameters allowed")
BAD_PARAMETER = Reply(501, "5.5.4", "Error: bad parameter value")
UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Unsupported option")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Error: too many recipients")
TOO_BIG = Reply(552, "5.3.4", "Message size exceeds fixed limit")
NEEDS_UTF8 = Reply(553, "5.6.7", "Error: address needs SMTPUTF8")
TOO_MANY_ERRORS = Reply(421, "4.7.0", "Error: too many errors", action="close")
TOO_MANY_SESSIONS = Reply(421, "4.7.0", "Error: too many connections", action="close")
TIMED_OUT = Reply(421, "4.4.2", "Error: timeout exceeded", action="close")
CLOSING_DOWN = Reply(421, "4.3.2", "Service going down", action="close")
NOT_SMTP = Reply(500, "5.5.2", "Error: this is SMTP", action="close")
TOO_EARLY = Reply(554, "5.5.0", "Error: you spoke before the greeting", action="close")
START_TLS = Reply(220, "2.0.0", "Ready to start TLS", action="tls")
NO_TLS = Reply(502, "5.5.1", "Error: TLS is not offered here")
HAS_TLS = Reply(503, "5.5.1", "Error: TLS is there already")
NO_AUTH = Reply(503, "5.5.1", "Error: authentication not enabled")
NOT_NOW = Reply(503, "5.5.1", "Error: not in the middle of that")
NEED_TLS = Reply(538, "5.7.11", "Error: use STARTTLS before a password")
NO_SUCH_METHOD = Reply(504, "5.5.4", "Error: PLAIN and LOGIN are offered")
AUTH_ABORTED = Reply(501, "5.7.0", "Authentication aborted")
NOT_BASE64 = Reply(501, "5.5.2", "Error: that is no base64")
AUTH_FAILED = Reply(535, "5.7.8", "Error: authentication failed")
AUTH_LATER = Reply(454, "4.7.0", "Temporary authentication failure")
AUTH_OK = Reply(235, "2.7.0", "Authentication successful")
CHECK_PASSWORD = Reply(0, "", "", action="auth")
ASK_USER = Reply(334, "", "VXNlcm5hbWU6")  # "Username:"
ASK_PASSWORD = Reply(334, "", "UGFzc3dvcmQ6")  # "Password:"
ASK_PLAIN = Reply(334, "", "")
CHUNK = Reply(0, "", "", action="chunk")
CHUNK_SYNTAX = Reply(501, "5.5.4", "Syntax: BDAT size [LAST]", action="close")


class Refusal(Exception):
    """Ends a command with a reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.lines[0])
        self.reply = reply


class Client(Value):
    """Who is at the other end: address, log name, whether it may relay.

    `uid` is the kernel's word for a local submission, else None.
    """

    __slots__ = ("address", "may_relay", "uid")

    def __init__(self, address: str, may_relay: bool, uid: int | None = None) -> None:
        self.address = address
        self.may_relay = may_relay
        self.uid = uid

    def __str__(self) -> str:
        if self.is_local:
            return f"uid={self.uid}"
        name = "localhost" if self.address in ("127.0.0.1", "::1") else "unknown"
        return f"{name}[{self.address}]"

    @property
    def is_local(self) -> bool:
        """Whether it came through the submit socket or -bs."""
        return self.uid is not None


class Transaction:
    """What MAIL and RCPT have said: one message's envelope in the making."""

    def __init__(self, sender: Address, options: dict) -> None:
        self.sender = sender
        self.body = (options.get("BODY") or "").upper()
        self.is_utf8 = "SMTPUTF8" in options
        self.ret = (options.get("RET") or "").upper()
        self.envid = options.get("ENVID") or ""
        self.is_as_it_is = "XASIS" in options
        self.is_for_later = "XLATER" in options
        self.recipients: list[str] = []
        self.wishes: dict[str, Wishes] = {}
        self.was_refused = False

    def add(self, recipient: str, options: dict) -> None:
        """One more recipient, with its parameters."""
        self.was_refused = False
        self.recipients.append(recipient)
        wishes = Wishes(options.get("NOTIFY") or "", options.get("ORCPT") or "")
        if wishes != NO_WISHES:
            self.wishes[recipient] = wishes


class Session:
    """One client's conversation: feed() takes a line and returns a Reply.

    `verify(address)` raises MailError for a local recipient that cannot be
    delivered to; `room()` returns the bytes the queue's disk still has. After
    a reply with action "data" the caller reads the message and then calls
    stored() or failed() for the last reply; after "chunk" also chunk_taken(),
    after "tls" secured(), after "auth" authenticated(). `notes` are lines for
    the log.
    """

    def __init__(
        self, settings: Settings, client: Client, verify: object, room: object
    ) -> None:
        self.settings = settings
        self.client = client
        self.verify = verify
        self.room = room
        self.helo = ""
        self.is_extended = False
        self.transaction: Transaction | None = None
        self.errors = 0
        self.sender: Address | str = ""  # whom MAIL names, for the log
        self.target = ""  # whom RCPT names
        self.notes: list[str] = []
        self.cipher = ""  # of TLS, as Received tells it
        self.user = ""  # who has authenticated
        self.method = ""  # the AUTH that goes on
        self.is_asked = False  # whether the next line answers a challenge
        self.answers: list[bytes] = []
        self.guesses = 0
        self.chunk = (0, False)  # size of BDAT, whether it is the last
        self.chunk_error: Reply | None = None
        self.is_chunking = False
        self.last_verb = "CONNECT"
        self.tally: dict[str, list[int]] = {}  # verb -> good ones, all

    def greeting(self) -> Reply:
        """The first thing that is said."""
        return Reply(220, "", f"{self.settings.myhostname} ESMTP minimta")

    @property
    def longest_line(self) -> int:
        """Bytes that the next line may have."""
        return MAX_AUTH_LINE if self.is_asked else MAX_COMMAND

    def feed(self, line: bytes) -> Reply:
        """The reply to one command line, its line end taken off."""
        if self.is_asked:
            return self.counted(self.take_answer(line), "AUTH")
        verb, _, rest = line.partition(b" ")
        verb = verb.upper().rstrip()
        command = self.COMMANDS.get(verb)
        try:
            text = rest.decode("utf-8").strip(" ")
        except UnicodeDecodeError:
            command, text = None, ""
        if verb in (b"GET", b"POST", b"CONNECT") or line[:1] == b"\x16":
            # A browser or a TLS hello: nothing to talk about.
            said = printable(os_text(line), 100)
            self.notes.append(f"warning: non-SMTP command from {self.client}: {said}")
            reply = NOT_SMTP
        elif not printable_bytes(line):
            reply = BAD_BYTES
        elif command is None or (
            command in self.LOCAL_COMMANDS and not self.client.is_local
        ):
            reply = UNKNOWN_COMMAND
        else:
            reply = self.carry_out(command, text)
        return self.counted(reply, os_text(verb) if command else "UNKNOWN")

    def carry_out(self, command: object, text: str) -> Reply:
        """One command; what it raises is its reply too."""
        try:
            return command(self, text)
        except Refusal as refusal:
            return refusal.reply
        except MailError as error:
            return Reply.refusal(error)

    def counted(self, reply: Reply, verb: str) -> Reply:
        """`reply`, unless it is one error too many; notes refusals."""
        self.last_verb = verb
        if not reply.code or reply.code in (334, 354):
            return reply  # how it ends is still to come
        tally = self.tally.setdefault(verb, [0, 0])
        tally[1] += 1
        if not reply.is_error:
            tally[0] += 1
            return reply
        self.errors += not self.client.is_local
        if verb in ("MAIL", "RCPT", "DATA", "BDAT") and reply.code != 503:
            self.notes.append(self.rejection(verb, reply))
        if self.errors <= MAX_ERRORS:
            return reply
        self.notes.append(f"too many errors after {verb} from {self.client}")
        return TOO_MANY_ERRORS

    def summary(self) -> str:
        """What was said, as Postfix counts it: `ehlo=1 rcpt=1/2 commands=2/3`.

        Of the commands of a kind those that went well, if not all of them.
        """
        counts = {verb.lower(): pair for verb, pair in self.tally.items()}
        counts["commands"] = [sum(pair[n] for pair in counts.values()) for n in (0, 1)]
        names = [name for name in (*COUNTED, "unknown", "commands") if name in counts]
        return " ".join(
            f"{name}={good}" if good == total else f"{name}={good}/{total}"
            for name, (good, total) in ((name, counts[name]) for name in names)
        )

    def rejection(self, verb: str, reply: Reply) -> str:
        """Postfix's log line for a refusal."""
        sender = self.transaction.sender if self.transaction else self.sender
        verb = "DATA" if verb == "BDAT" else verb  # the word that readers know
        proto = "ESMTP" if self.is_extended else "SMTP"
        said = f"{reply.code} {reply.status} {reply.lines[0]}"
        target = f" to=<{self.target}>" if verb == "RCPT" else ""
        return (
            f"NOQUEUE: reject: {verb} from {self.client}: {said}; "
            f"from=<{sender}>{target} proto={proto} helo=<{self.helo}>"
        )

    def reset(self) -> None:
        """Forgets the transaction: after every end of data, RSET, EHLO."""
        self.transaction = None
        self.is_chunking = False

    def helo_(self, name: str) -> Reply:
        """HELO: the client's name, no extensions. RFC 5321 section 4.1.1.1."""
        if not name or " " in name or not name.isascii():
            return NEED_NAME
        self.reset()
        self.helo, self.is_extended = name, False
        return Reply(250, "", self.settings.myhostname)

    def ehlo(self, name: str) -> Reply:
        """EHLO: the client's name; answers with the extensions."""
        reply = self.helo_(name)
        if reply.is_error:
            return reply
        self.is_extended = True
        size = f"SIZE {self.settings.message_size_limit}"
        words = ["PIPELINING", size, "8BITMIME", "ENHANCEDSTATUSCODES", "SMTPUTF8"]
        words += ["DSN", "CHUNKING"]
        words += ["STARTTLS"] if self.offers_tls and not self.cipher else []
        words += ["AUTH PLAIN LOGIN"] if self.offers_auth and self.cipher else []
        return Reply(250, "", self.settings.myhostname, *words, "HELP")

    @property
    def offers_tls(self) -> bool:
        """Whether there is a certificate to show."""
        return bool(self.settings.smtpd_tls_cert_file) and not self.client.is_local

    @property
    def offers_auth(self) -> bool:
        """Whether there are passwords to check."""
        has_file = bool(self.settings.smtpd_sasl_password_file)
        return has_file and not self.client.is_local

    def starttls(self, text: str) -> Reply:
        """STARTTLS: the connection is secured next. RFC 3207."""
        if not self.offers_tls:
            return NO_TLS
        if self.cipher:
            return HAS_TLS
        return NO_PARAMETER if text else START_TLS

    def secured(self, cipher: str) -> None:
        """TLS is there: nothing that was said before counts any more."""
        self.cipher = cipher
        self.helo, self.is_extended = "", False
        self.reset()

    def auth(self, text: str) -> Reply:
        """AUTH method [first answer]. RFC 4954 section 4."""
        method, _, first = text.partition(" ")
        refusals = (
            (not self.offers_auth, NO_AUTH),
            (not self.is_extended, NEED_HELO),
            (self.user or self.transaction, NOT_NOW),
            (not self.cipher, NEED_TLS),
            (method.upper() not in ("PLAIN", "LOGIN"), NO_SUCH_METHOD),
        )
        for is_so, refusal in refusals:
            if is_so:
                return refusal
        self.method, self.answers = method.upper(), []
        if first:
            return self.take_answer(os_bytes("" if first == "=" else first))
        self.is_asked = True
        return ASK_PLAIN if self.method == "PLAIN" else ASK_USER

    def take_answer(self, line: bytes) -> Reply:
        """A line of an AUTH exchange; at its end the password is checked."""
        import base64  # the daemon only: a local program does not authenticate

        self.is_asked = False
        if line == b"*":
            return AUTH_ABORTED
        try:
            self.answers.append(base64.b64decode(line, validate=True))
        except ValueError:
            return NOT_BASE64
        if self.method == "LOGIN" and len(self.answers) == 1:
            self.is_asked = True
            return ASK_PASSWORD
        return CHECK_PASSWORD

    @property
    def credentials(self) -> tuple[str, bytes]:
        """(user, password) of an AUTH exchange; a user "" is nobody."""
        if self.method == "LOGIN":
            return os_text(self.answers[0]), self.answers[1]
        words = self.answers[0].split(b"\0")  # acting for, user, password
        if len(words) != 3 or words[0] not in (b"", words[1]):
            return "", b""
        return os_text(words[1]), words[2]

    def authenticated(self, is_right: bool) -> Reply:
        """The reply to a password; one guess too many ends the session."""
        user = self.credentials[0]
        self.answers = []
        if is_right:
            self.user = user
            return self.counted(AUTH_OK, "AUTH")
        self.guesses += 1
        name = printable(user, 100)
        self.notes.append(
            f"warning: {self.client}: SASL {self.method} authentication failed: "
            f"wrong user or password, sasl_username={name}"
        )
        reply = self.counted(AUTH_FAILED, "AUTH")
        return TOO_MANY_ERRORS if self.guesses >= MAX_GUESSES else reply

    def mail(self, text: str) -> Reply:
        """MAIL FROM:<reverse-path> [parameters]. RFC 5321 section 4.1.1.2."""
        if not self.helo and not self.client.is_local:
            return NEED_HELO
        if self.transaction:
            return NESTED_MAIL
        known = LOCAL_MAIL_PARAMETERS if self.client.is_local else MAIL_PARAMETERS
        sender, options = self.read_path(text, "FROM:", MAIL_SYNTAX, known)
        self.sender = sender
        size = int(options.get("SIZE") or 0)
        if size > self.settings.message_size_limit:
            return TOO_BIG
        if not sender.is_ascii and "SMTPUTF8" not in options:
            return NEEDS_UTF8
        if self.room() - size < self.settings.queue_minfree:
            raise MailError("4.3.1", "Insufficient system storage")
        self.transaction = Transaction(sender, options)
        return SENDER_OK

    def rcpt(self, text: str) -> Reply:
        """RCPT TO:<forward-path>. RFC 5321 section 4.1.1.3."""
        transaction = self.transaction
        if not transaction:
            return NEED_MAIL
        if self.is_chunking:
            return NOT_NOW
        self.target = printable(text[3:].strip(" <>"), 100)
        limit = self.settings.smtpd_recipient_limit
        if len(transaction.recipients) >= limit and not self.client.is_local:
            return TOO_MANY_RECIPIENTS
        transaction.was_refused = True  # until it is not
        known = LOCAL_RCPT_PARAMETERS if self.client.is_local else RCPT_PARAMETERS
        recipient, options = self.read_path(text, "TO:", RCPT_SYNTAX, known)
        if not recipient.is_ascii and not transaction.is_utf8:
            return NEEDS_UTF8
        self.check(recipient, "XBOUNCE" in options)
        name = str(recipient.qualified(self.settings.local_origin))
        transaction.add(name, options)
        word, number = (
            magic_words(recipient.local) if self.settings.capture else ("", 0)
        )
        if word == "slow":
            self.sought = str(number)
            return Reply(0, "", "", action="pause")
        return RECIPIENT_OK

    def read_path(
        self, text: str, prefix: str, syntax: Reply, known: dict
    ) -> tuple[Address, dict]:
        """(address, parameters) of MAIL or RCPT. Raises Refusal, MailError."""
        if text[: len(prefix)].upper() != prefix:
            raise Refusal(syntax)
        address, rest = parse_path(text[len(prefix) :])
        if address.local.startswith("-"):  # an option, to some program; Postfix
            raise bad_address(str(address), "a leading hyphen")
        try:
            return address, read_parameters(rest, known)
        except KeyError:
            raise Refusal(UNKNOWN_PARAMETER) from None
        except ValueError:
            raise Refusal(BAD_PARAMETER) from None

    def check(self, recipient: Address, may_bounce: bool) -> None:
        """Raises MailError if mail to `recipient` is not taken."""
        if not recipient.local:
            raise bad_address("", "an address is needed")
        domain = recipient.qualified(self.settings.local_origin).domain
        if self.settings.keeps(domain):
            try:
                self.verify(recipient)
            except MailError as error:
                # A local program may have nobody to try again for it: what
                # cannot be told now waits in the queue.
                may_wait = error.is_temporary and self.client.is_local
                if not (may_bounce or may_wait):
                    raise self.rejected(recipient, error) from None
        elif not (
            self.client.may_relay
            or self.user
            or self.settings.may_relay_to(recipient.domain)
        ):
            raise MailError("5.7.1", f"<{recipient}>: Relay access denied")

    def rejected(self, recipient: Address, error: MailError) -> MailError:
        """`error` in the words that fail2ban and log readers look for."""
        why = error.text
        if error.status == "5.1.1":
            why = "User unknown in local recipient table"
        text = f"<{recipient}>: Recipient address rejected: {why}"
        return MailError(error.status, text, code=error.code)

    def data(self, text: str) -> Reply:
        """DATA: the message follows. RFC 5321 section 4.1.1.4."""
        if text:
            return NO_PARAMETER
        return NOT_NOW if self.is_chunking else self.not_ready() or SEND_MESSAGE

    def not_ready(self) -> Reply | None:
        """Why no message can follow now."""
        if not self.transaction:
            return NEED_MAIL
        if self.transaction.recipients:
            return None
        return NO_RECIPIENTS if self.transaction.was_refused else NEED_RCPT

    def bdat(self, text: str) -> Reply:
        """BDAT size [LAST]: so many bytes follow. RFC 3030 section 2.

        They follow whatever the answer will be, and must not be taken for
        commands.
        """
        size, _, last = text.partition(" ")
        if not is_size(size) or last.strip().upper() not in ("", "LAST"):
            return CHUNK_SYNTAX
        self.chunk = (int(size), bool(last.strip()))
        self.chunk_error = self.not_ready()
        self.is_chunking = self.chunk_error is None
        return CHUNK

    def chunk_taken(self) -> Reply:
        """The reply to a chunk that is not the last."""
        reply = self.chunk_error or Reply(250, "2.0.0", f"Ok: {self.chunk[0]} bytes")
        return self.counted(reply, "BDAT")

    def envelope(self, now: float) -> Envelope:
        """The envelope of the message that follows DATA."""
        said = self.transaction
        sender = said.sender.qualified(self.settings.myorigin)
        origin = f"[{self.client.address}] {self.protocol} {self.helo}".rstrip()
        if self.client.is_local:
            origin = f"uid {self.client.uid}"
        body = said.body + (" SMTPUTF8" if said.is_utf8 else "")
        more = {"origin": origin, "body": body, "ret": said.ret, "envid": said.envid}
        more["wishes"] = said.wishes
        return Envelope(str(sender), said.recipients, arrived=now, **more)

    @property
    def protocol(self) -> str:
        """What Received calls it, RFC 3848 and RFC 6531 section 4.3."""
        proto = "ESMTP" if self.is_extended else "SMTP"
        if self.is_extended:
            proto += ("S" if self.cipher else "") + ("A" if self.user else "")
        is_utf8 = self.transaction and self.transaction.is_utf8
        return f"UTF8{proto[1:]}" if is_utf8 else proto

    @property
    def who(self) -> str:
        """The client, as the log tells of it: with its user, if it has one."""
        if not self.user:
            return str(self.client)
        name = printable(self.user, 100)
        return f"{self.client}, sasl_method={self.method}, sasl_username={name}"

    def received(self, queue_id: str, now: float) -> bytes:
        """Our Received field for that message."""
        recipients = self.transaction.recipients
        fields = {
            "uid": self.client.uid,
            "helo": self.helo,
            "client": str(self.client).replace("[", " ["),
            "proto": self.protocol,
            "cipher": self.cipher,
            "recipient": recipients[0] if len(recipients) == 1 else "",
        }
        return received_field(fields, self.settings.myhostname, queue_id, now)

    def stored(self, queue_id: str) -> Reply:
        """The reply once the message is safe; only then."""
        verb = "BDAT" if self.is_chunking else "DATA"
        self.reset()
        return self.counted(Reply(250, "2.0.0", f"Ok: queued as {queue_id}"), verb)

    def failed(self, error: MailError) -> Reply:
        """The reply when it is not: nothing of it is in the queue."""
        verb = "BDAT" if self.is_chunking else "DATA"
        reply = self.counted(Reply.refusal(error), verb)
        self.reset()
        return reply

    def rset(self, text: str) -> Reply:
        """RSET: forgets the transaction."""
        if text:
            return NO_PARAMETER
        self.reset()
        return OK

    def noop(self, _: str) -> Reply:
        """NOOP: nothing."""
        return OK

    def vrfy(self, text: str) -> Reply:
        """VRFY: never tells; RCPT does. RFC 5321 sections 3.5.3 and 7.3."""
        return CANNOT_VERIFY if text else Reply(501, "5.5.4", "Syntax: VRFY address")

    def help(self, _: str) -> Reply:
        """HELP: the commands."""
        hidden = {b"EXPN"}
        hidden |= set() if self.offers_tls else {b"STARTTLS"}
        hidden |= set() if self.offers_auth else {b"AUTH"}
        verbs = [v for v in self.COMMANDS if v not in hidden and v[:1] != b"X"]
        words = " ".join(map(os_text, verbs))
        return Reply(214, "2.0.0", f"Commands: {words}")

    def expn(self, _: str) -> Reply:
        """EXPN and what else is known but not offered."""
        return NOT_IMPLEMENTED

    def quit(self, _: str) -> Reply:
        """QUIT: the end."""
        self.reset()
        return BYE

    def list_queue(self, _: str) -> Reply:
        """XQUEUE: the queue, for mailq of those who may not read it."""
        return Reply(250, "2.0.0", "Queue follows", action="queue")

    def health(self, _: str) -> Reply:
        """XHEALTH: whether anything ails the daemon."""
        return Reply(0, "", "", action="health")

    def flush_queue(self, _: str) -> Reply:
        """XFLUSH: tries everything now, of a user what the user sent."""
        return Reply(0, "", "", action="flush")

    def act(self, text: str) -> Reply:
        """XDO: a queue command on one message."""
        self.sought = text.strip()
        action, _, queue_id = self.sought.partition(" ")
        if action not in ACTIONS or not is_id(queue_id):
            raise Refusal(Reply(501, "5.5.4", "Syntax: XDO action id"))
        return Reply(0, "", "", action="act")

    def trace(self, text: str) -> Reply:
        """XTRACE: what happened to a message, for the user who sent it."""
        self.sought = text.strip()
        return Reply(250, "2.0.0", "Trace follows", action="trace")

    COMMANDS = {
        b"HELO": helo_,
        b"EHLO": ehlo,
        b"MAIL": mail,
        b"RCPT": rcpt,
        b"DATA": data,
        b"BDAT": bdat,
        b"STARTTLS": starttls,
        b"AUTH": auth,
        b"RSET": rset,
        b"NOOP": noop,
        b"VRFY": vrfy,
        b"HELP": help,
        b"QUIT": quit,
        b"EXPN": expn,
        b"XQUEUE": list_queue,
        b"XFLUSH": flush_queue,
        b"XHEALTH": health,
        b"XTRACE": trace,
        b"XDO": act,
    }
    LOCAL_COMMANDS = (list_queue, flush_queue, health, trace, act)


# == 9 Reports: ReportKind, Event, Report =====================================
# What the sender of a message is told of its recipients: bounced, delayed, or
# delivered. Source: RFC 3464 and 6522 (form), 3834 (Auto-Submitted), 3461.
# Shapes and words are Postfix's, so that programs which read those read ours.

BOUNCE_SIZE = 50_000  # bytes of a message that come back whole; Postfix's limit
REPORT_WIDTH = 79  # columns

FAILED_TEXT = """\
I'm sorry to have to inform you that your message could not
be delivered to one or more recipients. It's attached below.

For further assistance, please send mail to postmaster.

If you do so, please include this problem report. You can
delete your own text from the attached returned message.
"""
DELAYED_TEXT = """\
####################################################################
# THIS IS A WARNING ONLY.  YOU DO NOT NEED TO RESEND YOUR MESSAGE. #
####################################################################

Your message could not be delivered yet. It will be retried
until {until}.

For further assistance, please send mail to postmaster.
"""
DELIVERED_TEXT = """\
Your message was successfully delivered to the destination(s)
listed below. If the message was delivered to mailbox you will
receive no further notifications. Otherwise you may still receive
notifications of mail delivery errors from other systems.
"""


class ReportKind(Value):
    """One kind of report: what it is called and what it begins with.

    `letter` stands in its queue id, `wish` in NOTIFY=, `action` in its fields,
    `note` in the log.
    """

    __slots__ = ("letter", "wish", "action", "subject", "note", "text")

    def __init__(self, letter: str, wish: str, action: str, *texts: str) -> None:
        self.letter = letter
        self.wish = wish
        self.action = action
        self.subject, self.note, self.text = texts


FAILED = ReportKind(
    *("B", "FAILURE", "failed", "Undelivered Mail Returned to Sender"),
    *("sender non-delivery notification", FAILED_TEXT),
)
DELAYED = ReportKind(
    *("D", "DELAY", "delayed", "Delayed Mail (still being retried)"),
    *("sender delay notification", DELAYED_TEXT),
)
DELIVERED = ReportKind(
    *("S", "SUCCESS", "delivered", "Successful Mail Delivery Report"),
    *("sender delivery status notification", DELIVERED_TEXT),
)


def address_type(address: str) -> str:
    """What a report calls that kind of address, RFC 6533 section 3."""
    return "rfc822" if address.isascii() else "utf-8"


class Event(Value):
    """What a report says of one recipient.

    `recipient` is whom the sender named, `target` where its mail went;
    `action` is failed, delayed, delivered, relayed or expanded; `original` is
    ORCPT or "".
    """

    __slots__ = ("recipient", "target", "action", "status", "relay", "text", "original")

    def __init__(self, recipient: str, target: str, *words: str) -> None:
        self.recipient = recipient
        self.target = target
        self.action, self.status, self.relay, self.text, self.original = words

    def sentence(self) -> str:
        """It for people: `<bob@x> (expanded from <team@x>): why`."""
        from textwrap import fill

        via = f" (expanded from <{self.recipient}>)"
        via = "" if self.target == self.recipient else via
        text = printable(f"<{self.target}>{via}: {self.text}")
        how = {"break_long_words": False, "break_on_hyphens": False}
        return fill(text, REPORT_WIDTH, subsequent_indent="    ", **how)

    def rows(self) -> list[tuple[str, str]]:
        """It for programs: the fields of RFC 3464 section 2.3."""
        host = self.relay.partition("[")[0]
        is_remote = self.relay not in ("local", "none", "") and host
        said = self.text.partition(" said: ")[2].rpartition(" (in reply to ")[0]
        why = f"smtp; {said}" if is_remote and said else f"X-Minimta; {self.text}"
        usual = f"{address_type(self.recipient)};{self.recipient}"
        return [
            ("Final-Recipient", f"{address_type(self.target)}; {self.target}"),
            ("Original-Recipient", plain_xtext(self.original) or usual),
            ("Action", self.action),
            ("Status", self.status),
            ("Remote-MTA", f"dns; {host}" if is_remote else ""),
            ("Diagnostic-Code", why),
        ]


def field_lines(rows: list[tuple[str, str]]) -> str:
    """Header lines of (name, value), none for an empty value."""
    return "".join(f"{n}: {printable(v)}\n" for n, v in rows if v)


class Report:
    """A multipart/report: text for people, fields for programs, the message.

    `about`: queue_id, host, envelope, message_id (of the message it is about)
    and expires (when it is given up, seconds since the epoch).
    """

    def __init__(self, kind: ReportKind, to: str, events: list, about: dict) -> None:
        self.kind = kind
        self.to = to
        self.events = events
        self.about = about
        self.host = about["host"]

    def chunks(
        self, report_id: str, now: float, is_whole: bool, copy: object
    ) -> object:
        """It in pieces; `copy` is the message or its header, in bytes."""
        boundary = f"{report_id}.{int(now)}/{self.host}"
        yield os_bytes(self.header(report_id, now, boundary))
        kind = "message/rfc822" if is_whole else "text/rfc822-headers"
        name = "Undelivered Message" if self.kind is FAILED else "Message"
        name += "" if is_whole else " Headers"
        parts = (
            ("Notification", "text/plain; charset=utf-8", self.text()),
            ("Delivery report", "message/delivery-status", self.status()),
            (name, kind, f"Return-Path: <{self.about['envelope'].sender}>\n"),
        )
        for description, content_type, text in parts:
            yield os_bytes(
                f"\n--{boundary}\nContent-Description: {description}\n"
                f"Content-Type: {content_type}\nContent-Transfer-Encoding: 8bit\n\n"
                + text
            )
        yield from copy
        yield os_bytes(f"\n--{boundary}--\n")

    def header(self, report_id: str, now: float, boundary: str) -> str:
        """Its own header, and what a reader without MIME sees first."""
        failed = [event.recipient for event in self.events if event.action == "failed"]
        rows = [
            ("Date", rfc_date(now)),
            ("From", f"Mail Delivery System <MAILER-DAEMON@{self.host}>"),
            ("Subject", self.kind.subject),
            ("To", self.to),
            ("Auto-Submitted", self.about.get("auto", "auto-replied")),
            ("Message-ID", f"<{report_id}.report@{self.host}>"),
            ("References", printable(self.about["message_id"], 300)),
            ("X-Failed-Recipients", ",\n ".join(dict.fromkeys(failed))),
            ("MIME-Version", "1.0"),
            ("Content-Transfer-Encoding", "8bit"),
        ]
        text = "".join(f"{name}: {value}\n" for name, value in rows if value)
        return (
            f"{text}Content-Type: multipart/report; report-type=delivery-status;\n"
            f'\tboundary="{boundary}"\n\nThis is a MIME-encapsulated message.\n'
        )

    def text(self) -> str:
        """What people read."""
        until = rfc_date(self.about["expires"])
        sentences = "\n\n".join(event.sentence() for event in self.events)
        return (
            f"This is the mail system at host {self.host}.\n\n"
            + self.kind.text.replace("{until}", until)
            + f"\n                   The mail system\n\n{sentences}\n"
        )

    def status(self) -> str:
        """What programs read, RFC 3464 section 2: message, then recipients."""
        envelope = self.about["envelope"]
        sender = f"{address_type(envelope.sender)}; {envelope.sender}"
        rows = [
            ("Reporting-MTA", f"dns; {self.host}"),
            ("Original-Envelope-Id", plain_xtext(envelope.envid)),
            ("X-Minimta-Queue-ID", self.about["queue_id"]),
            ("X-Minimta-Sender", sender),
            ("Arrival-Date", rfc_date(envelope.arrived)),
        ]
        retry = ("Will-Retry-Until", rfc_date(self.about["expires"]))
        more = [retry] if self.kind is DELAYED else []
        blocks = [rows, *(event.rows() + more for event in self.events)]
        return "\n".join(map(field_lines, blocks))


# == 10 Trees: Branch =========================================================
# What `explain` draws: a line, where it is written, and what follows from it.

MAX_BRANCHES = 100  # of one line that are drawn
MAX_COLUMN = 60  # where a rule's file and line are written


class Branch:
    """One line of an explanation, and those that hang from it.

    `where` is file and line of the rule; `detail` stands in brackets behind.
    """

    def __init__(self, text: str, where: str = "", detail: str = "") -> None:
        self.text = printable(text, 300)
        self.where = where
        self.detail = detail
        self.branches: list[Branch] = []

    def grow(self, text: str, where: str = "", detail: str = "") -> Branch:
        """A new branch of this one."""
        branch = Branch(text, where, detail)
        self.branches.append(branch)
        return branch

    def leaves(self) -> object:
        """The branches without branches, in their order."""
        if not self.branches:
            yield self
        for branch in self.branches:
            yield from branch.leaves()

    def lines(self, indent: str = "", joint: str = "") -> object:
        """(text with the tree's lines, branch) of itself and all below."""
        yield indent + joint + self.text, self
        if joint:
            indent += "│  " if joint.startswith("├") else "   "
        shown = self.branches[:MAX_BRANCHES]
        hidden = len(self.branches) - len(shown)
        if hidden:
            shown = [*shown, Branch(f"... and {hidden} more")]
        for number, branch in enumerate(shown, 1):
            corner = "└─ " if number == len(shown) else "├─ "
            yield from branch.lines(indent, corner)

    def __str__(self) -> str:
        rows = list(self.lines())
        width = min(MAX_COLUMN, max(len(text) for text, _ in rows) + 1)
        found = []
        for text, branch in rows:
            gap = " " * max(2, width - len(text))
            line = f"{text}{gap}{branch.where}" if branch.where else text
            found.append(line + (f"  ({branch.detail})" if branch.detail else ""))
        return "".join(line + "\n" for line in found)

    def tree(self) -> dict:
        """Itself for JSON: text, where, detail, and the list `then`."""
        pairs = (("text", self.text), ("where", self.where), ("detail", self.detail))
        found: dict = {name: value for name, value in pairs if value}
        if self.branches:
            found["then"] = [branch.tree() for branch in self.branches]
        return found


# == 11 Names: Record, encode_question, decode_answer =========================
# DNS packets: a question out, records in. Source: RFC 1035 section 4, RFC
# 2181, RFC 6891 (EDNS0), RFC 5452 (what an answer must match).
# Failures: ValueError for a packet that is none, or no answer to the question.

DNS_TYPES = {"A": 1, "CNAME": 5, "MX": 15, "AAAA": 28}
DNS_SIZE = 1232  # bytes of an answer by UDP that no network cuts in pieces
MAX_CNAMES = 10  # names behind one another; Postfix and BIND allow about as many
MAX_HOPS = 2000  # pointers in one packet; an honest one has one a record
FORMERR, NXDOMAIN = 1, 3  # codes: what was asked is not understood; no such name
NO_EDNS = (FORMERR, 4)  # what servers say that do not know EDNS0
ODD_NAME = "?"  # in place of a name that no host can have


class Record(Value):
    """One answer: owner's name, type, seconds it may be kept, and its data.

    `data` is an address, a host name, or (preference, host name) of an MX.
    """

    __slots__ = ("name", "kind", "ttl", "data")

    def __init__(self, name: str, kind: str, ttl: int, data: object) -> None:
        self.name = name
        self.kind = kind
        self.ttl = ttl
        self.data = data


def encode_name(name: str) -> bytes:
    """A domain name on the wire. Raises ValueError."""
    labels = name.rstrip(".").encode("idna").split(b".")
    if not all(0 < len(label) <= MAX_LABEL for label in labels):
        raise ValueError(f"not a domain name: {printable(name, 100)}")
    wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    if len(wire) > MAX_DOMAIN:
        raise ValueError(f"too long for a domain name: {printable(name, 100)}")
    return wire


def encode_question(number: int, name: str, kind: str, has_edns: bool = True) -> bytes:
    """A question for one name; `number` is its id, 16 random bits."""
    counts = bytes((0, 1, 0, 0, 0, 0, 0, has_edns))
    head = number.to_bytes(2, "big") + b"\x01\x00" + counts  # recurse, please
    question = encode_name(name) + DNS_TYPES[kind].to_bytes(2, "big") + b"\0\1"
    size = b"\0\0\x29" + DNS_SIZE.to_bytes(2, "big") + bytes(6)
    return head + question + (size if has_edns else b"")


class OddName(ValueError):
    """A name that no host can have."""


class PacketReader:
    """Reads a packet from its start to its end; whatever is short, raises."""

    def __init__(self, packet: bytes) -> None:
        self.packet = packet
        self.place = 0
        self.hops = 0  # pointers that were followed, all names together

    def take(self, size: int) -> bytes:
        """The next bytes."""
        data = self.packet[self.place : self.place + size]
        if len(data) != size:
            raise ValueError("the packet ends too early")
        self.place += size
        return data

    def number(self, size: int = 2) -> int:
        """The next number."""
        return int.from_bytes(self.take(size), "big")

    def name(self) -> str:
        """The next name, in lower case; "" is the root.

        A pointer must lead back: then none can go round (CVE-2026-40684).
        """
        labels, limit, after = [], self.place, -1
        while len(labels) < 128:  # no name that fits has more, nor more hops
            length = self.number(1)
            if length >= 0xC0:
                target = (length & 0x3F) << 8 | self.number(1)
                after = self.place if after < 0 else after
                self.hops += 1
                if target >= limit or self.hops > MAX_HOPS:
                    raise ValueError("a pointer that does not lead back")
                self.place = limit = target
            elif length > MAX_LABEL:
                raise ValueError("a label of an unknown kind")
            elif length:
                labels.append(self.label(length))
            else:
                break
        if after >= 0:
            self.place = after
        name = ".".join(labels)
        if len(name) > MAX_DOMAIN:
            raise ValueError("a name that is too long")
        return name

    def label(self, length: int) -> str:
        """The next label: of host names only what may stand in one."""
        text = self.take(length).decode("ascii", "replace").lower()
        if not all(char.isascii() and char.isalnum() or char in "-_" for char in text):
            raise OddName("a name with odd characters")
        return text

    def record(self) -> Record | None:
        """The next record; None for one of another type or class."""
        name, kind, group = self.name(), self.number(), self.number()
        ttl, size = self.number(4), self.number()
        end = self.place + size
        if end > len(self.packet):
            raise ValueError("the packet ends too early")
        names = {code: word for word, code in DNS_TYPES.items()}
        word = names.get(kind, "") if group == 1 else ""
        data: object = None
        if word == "MX":
            data = self.number(), self.exchange(end)
        elif word == "CNAME":
            data = self.name()
        elif word in ("A", "AAAA"):
            data = self.address(size)
        if word and self.place != end:
            raise ValueError("a record of the wrong size")
        self.place = end
        return Record(name, word, ttl & 0x7FFFFFFF, data) if word else None

    def exchange(self, end: int) -> str:
        """The name of a mail host; an odd one does not spoil the others."""
        try:
            return self.name()
        except OddName:
            self.place = end
            return ODD_NAME

    def address(self, size: int) -> str:
        """The next address, as text."""
        from ipaddress import ip_address

        if size not in (4, 16):
            raise ValueError("an address of the wrong size")
        return str(ip_address(self.take(size)))


class Answer(Value):
    """What a server says: response code, whether it was cut, the records."""

    __slots__ = ("code", "is_cut", "records")

    def __init__(self, code: int, is_cut: bool, records: list[Record]) -> None:
        self.code = code
        self.is_cut = is_cut
        self.records = records

    def follow(self, name: str, kind: str) -> tuple[list[Record], str]:
        """(records of that kind for `name` or what it stands for, that name).

        Raises ValueError for aliases that lead nowhere.
        """
        name = PacketReader(encode_name(name)).name()
        for _ in range(MAX_CNAMES):
            own = [one for one in self.records if one.name == name]
            found = [one for one in own if one.kind == kind]
            names = [one.data for one in own if one.kind == "CNAME"]
            if found or not names:
                return found, name
            name = names[0]
        raise ValueError("too many CNAMEs behind one another")


def decode_answer(packet: bytes, number: int, name: str, kind: str) -> Answer:
    """The answer to that question. Raises ValueError for anything else."""
    reader = PacketReader(packet)
    if reader.number() != number:
        raise ValueError("the answer to another question")
    flags, questions, answers, _, _ = (reader.number() for _ in range(5))
    if not flags & 0x8000 or flags & 0x7800:
        raise ValueError("no answer")
    if questions == 0 and flags & 15 in NO_EDNS:  # it does not say to what
        return Answer(FORMERR, False, [])
    if questions != 1:
        raise ValueError("no answer")
    asked = reader.name(), reader.number(), reader.number()
    if asked != (PacketReader(encode_name(name)).name(), DNS_TYPES[kind], 1):
        raise ValueError("the answer to another question")
    is_cut = bool(flags & 0x0200)
    if is_cut:
        return Answer(flags & 15, True, [])
    found = [reader.record() for _ in range(answers)]
    return Answer(flags & 15, False, [record for record in found if record])


def der_items(data: bytes) -> list[tuple[int, bytes]]:
    """(tag, content) of the values in a DER sequence's content, X.690.

    Raises ValueError.
    """
    found, place = [], 0
    while place < len(data):
        tag, size = data[place], data[place + 1] if place + 1 < len(data) else 0
        place += 2
        if size & 0x80:
            count = size & 0x7F
            size = int.from_bytes(data[place : place + count], "big")
            place += count
        if place + size > len(data):
            raise ValueError("cut off")
        found.append((tag, data[place : place + size]))
        place += size
    return found


def common_name(name: bytes) -> str:
    """The CN in a distinguished name, or ""."""
    for _, group in der_items(name):
        for _, pair in der_items(group):
            (_, kind), (_, value) = der_items(pair)[:2]
            if kind == b"\x55\x04\x03":  # 2.5.4.3
                return value.decode("utf-8", "replace")
    return ""


def der_date(text: str) -> str:
    """`2026-11-24` for a UTCTime or GeneralizedTime, RFC 5280 4.1.2.5."""
    if len(text) < 15:
        text = ("19" if text[:2] >= "50" else "20") + text
    return f"{text[:4]}-{text[4:6]}-{text[6:8]}"


def certificate_facts(data: bytes) -> str:
    """What a certificate says of itself: names, who issued it, until when.

    In DER, RFC 5280 section 4.1. Raises ValueError.
    """
    try:
        body = der_items(der_items(der_items(data)[0][1])[0][1])
        body = body[1:] if body[0][0] == 0xA0 else body  # without its version
        issuer, validity, subject = (body[n][1] for n in (2, 3, 4))
        start, end = (text.decode() for _, text in der_items(validity))
        names = []
        for _, extensions in (item for item in body if item[0] == 0xA3):
            for _, one in der_items(der_items(extensions)[0][1]):
                fields = der_items(one)
                if fields[0][1] == b"\x55\x1d\x11":  # subjectAltName, 2.5.29.17
                    found = der_items(der_items(fields[-1][1])[0][1])
                    names += [text.decode() for tag, text in found if tag == 0x82]
    except (IndexError, UnicodeDecodeError):
        raise ValueError("not a certificate") from None
    shown = f"CN={common_name(subject)}" + (f" for {' '.join(names)}" if names else "")
    dates = f"valid from {der_date(start)} to {der_date(end)}"
    return printable(f"{shown}, issued by CN={common_name(issuer)}, {dates}", 400)


# == 12 Routes: NextHop, MapLine, Rewriter ====================================
# Where mail leaves to and under which name: relayhost, transport_maps,
# smtp_generic_maps, smtp_sasl_password_maps. Lines are tried in their order.
# Source: Postfix's transport(5), generic(5).
# Failures: MailError 4.3.5 that names the setting; mail waits meanwhile.

PORTS = {"smtp": 25, "smtps": 465, "lmtp": 24, "mx": 25}
SERVICES = {"smtp": 25, "submission": 587, "submissions": 465, "smtps": 465}
HOP_KINDS = {**{word: word for word in PORTS}, "relay": "smtp"}
# Level of TLS -> what an explanation says of it.
TLS_WORDS = {
    "": "if it is offered; checked where a password is sent",
    "none": "none",
    "may": "if it is offered",
    "encrypt": "needed",
    "check": "needed and checked",
    "verify": "needed and checked",
}
# Fields whose addresses are completed, and of the first four rewritten.
SENDER_FIELDS = ("from", "sender", "resent-from", "resent-sender")
ADDRESS_FIELDS = SENDER_FIELDS + tuple("reply-to to cc resent-to resent-cc".split())


def split_host(text: str, usual: int) -> tuple[str, int]:
    """(host, port) of `host`, `host:port`, `[host]` or `[host]:port`.

    Raises ValueError.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        if not bracket or colon not in ("", ":"):
            raise ValueError(text)
    elif text.count(":") > 1:  # a bare IPv6 address
        host, colon, port = text, "", ""
    else:
        host, colon, port = text.partition(":")
    port = port if colon else str(usual)
    port = str(SERVICES.get(port.lower(), port))
    if not (port.isascii() and port.isdigit() and len(port) < 6):
        raise ValueError(text)
    is_address = ":" in host and is_literal(f"[ipv6:{host}]")
    if not is_address and not is_domain(host):
        raise ValueError(text)
    return host, range(65536).index(int(port) or -1)


class NextHop(Value):
    """Where mail is handed over: protocol, host, port, and what TLS it needs.

    `by_mx` says that the host's MX are to be asked for; kind `mx` is a domain
    that the mail itself names. For LMTP over a Unix socket `host` is its path
    and `port` 0. `level` is "" where the relay decides.
    """

    __slots__ = ("kind", "host", "port", "by_mx", "level")

    def __init__(
        self, kind: str, host: str, port: int, by_mx: bool = False, level: str = ""
    ) -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self.by_mx = by_mx
        self.level = level

    @classmethod
    def parse(cls, text: str, setting: str, kind: str = "smtp") -> NextHop:
        """`host`, `[host]:port`, with smtp:, smtps: or lmtp: before it.

        Without brackets the host's MX are meant. Behind lmtp: also /socket,
        unix:/socket and inet:host:port; behind it all a level of TLS. Raises
        MailError naming the setting.
        """
        rest, _, level = text.strip().partition(" ")
        word, colon, behind = rest.partition(":")
        word = word.lower()
        if colon and word in HOP_KINDS:
            kind, rest = HOP_KINDS[word], behind.removeprefix("//")
        level = level.strip()
        if kind == "lmtp":
            rest = rest.removeprefix("unix:").removeprefix("inet:")
            if rest.startswith("/"):
                return cls(kind, rest, 0)
        try:
            host, port = split_host(rest, PORTS[kind])
            is_name = ":" not in host and not is_literal(f"[{host}]")
            by_mx = kind != "lmtp" and not rest.startswith("[") and is_name
            if level and level not in TLS_LEVELS:
                raise ValueError(level)
        except ValueError:
            why = f"{setting} {printable(text, 100)}: need [host]:port"
            raise MailError("4.3.5", why, "none") from None
        return cls(kind, host, port, by_mx, level)

    def __str__(self) -> str:
        prefix = "" if self.kind == "smtp" else f"{self.kind}:"
        host = self.host if self.by_mx else f"[{self.host}]"
        where = f"{host}:{self.port}" if self.port else self.host
        return f"{prefix}{where}{' ' if self.level else ''}{self.level}"

    def with_level(self, level: str) -> NextHop:
        """A copy with another level of TLS."""
        return NextHop(self.kind, self.host, self.port, self.by_mx, level)

    def names(self) -> tuple[str, ...]:
        """What a line of smtp_sasl_password_maps may call it."""
        host, port = self.host.lower(), self.port
        return f"[{host}]:{port}", f"{host}:{port}", f"[{host}]", host


def relay_words(words: tuple[str, ...]) -> list[str]:
    """The hosts of relayhost, each with the level of TLS that follows it."""
    found: list[str] = []
    for word in words:
        if word in TLS_LEVELS and found:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def parse_route(text: str, setting: str) -> list[NextHop]:
    """The hops of a route, `a, b`: tried in that order. Raises MailError."""
    return [NextHop.parse(part, setting) for part in text.split(",") if part.strip()]


class MapLine(Value):
    """One line of a map: file and line, the key in lower case, the value."""

    __slots__ = ("where", "key", "value")

    def __init__(self, where: str, key: str, value: str) -> None:
        self.where = where
        self.key = key
        self.value = value


def parse_map(text: str, path: str, is_secret: bool = False) -> list[MapLine]:
    """The lines of a map, in their order; a `#` may stand in a secret."""
    pairs = enumerate(text.split("\n"), 1) if is_secret else logical_lines(text)
    found = []
    for number, line in pairs:
        key, *rest = line.split(None, 1)[:2] or ["#"]
        if key[0] != "#":
            value = "".join(rest).strip()
            found.append(MapLine(f"{path}:{number}", key.lower(), value))
    return found


def is_named(target: str) -> bool:
    """Whether a target of transport_maps names a host: not the usual way."""
    return target.partition(" ")[0] not in ("", ":", "smtp:", "relay:")


def read_transport(line: MapLine) -> tuple[str, str]:
    """(error, retry, discard or local, the rest), or ("", next hop).

    Raises MailError for a line of transport_maps that is none of these.
    """
    kind, colon, rest = line.value.partition(":")
    kind = "smtp" if kind.startswith("[") else kind.strip().lower()
    if colon and kind in ("", *HOP_KINDS):
        return "", line.value
    if kind not in ("error", "retry", "discard", "local"):
        why = f"transport_maps: {line.where}: {printable(line.value, 100)}: "
        raise MailError("4.3.5", f"{why}need smtp:[host]:port or its like", "none")
    return kind, rest.strip()


def find_transport(lines: list[MapLine], address: Address) -> MapLine | None:
    """The first line of transport_maps that an address matches."""
    full, domain = str(address).lower(), address.domain.lower().rstrip(".")
    names = {"*", full, domain, f"@{domain}"}
    for line in lines:
        if line.key in names or line.key[:1] == "." and domain.endswith(line.key):
            return line
    return None


def find_secret(lines: list[MapLine], hop: NextHop) -> MapLine | None:
    """The line `host user:password` for a host.

    The password is "" where the line leaves it to a command.
    """
    names = hop.names()
    found = (line for line in lines if line.key.removeprefix("smtps://") in names)
    return next(found, None)


def check_secret(line: MapLine, has_command: bool) -> None:
    """Raises MailError for a line of a password file without a login."""
    user, _, password = line.value.partition(":")
    if not user or not (password or has_command):
        what = "password" if user else "user"
        why = f"smtp_sasl_password_maps: {line.where}: no {what}: need user:password"
        raise MailError("4.7.8", why, "none")


def skip_token(text: str, place: int) -> int:
    """The place behind a comment, quoted string, literal or one character."""
    close = {"(": ")", '"': '"', "[": "]"}.get(text[place])
    if close is None:
        return place + 1
    opener, depth, place = text[place], 1, place + 1
    while depth and place < len(text):
        char = text[place]
        place += 2 if char == "\\" else 1
        if char == close:
            depth -= 1
        elif char == opener:
            depth += 1
    return min(place, len(text))


def address_spans(text: str) -> list[tuple[int, int]]:
    """Where the addresses are in a header field's value; of <...> the inside.

    >>> address_spans('"A, B" <a@x>, b (c)')
    [(8, 11), (14, 15)]
    """
    spans: list[tuple[int, int]] = []
    start = end = angle = -1
    place, has_angle = 0, False
    while place < len(text):
        here, char = place, text[place]
        place = skip_token(text, place)
        if angle >= 0:
            if char == ">":
                spans.append((angle, here))
                angle, has_angle = -1, True
        elif char == "<":
            angle = place
        elif char in ",;:":  # what stands before a colon is a group's name
            if char != ":" and not has_angle and start >= 0:
                spans.append((start, end))
            start, has_angle = -1, False
        elif char not in " \t\n(":
            start, end = (here if start < 0 else start), place
    if angle < 0 and not has_angle and start >= 0:
        spans.append((start, end))
    return spans


class Rewriter:
    """How addresses look to other hosts: smtp_generic_maps, and myorigin.

    `settings` tell our own domains, of which a bare key speaks.
    """

    def __init__(self, lines: list[MapLine], origin: str, settings: Settings) -> None:
        self.keys: dict[str, MapLine] = {}
        for line in lines:
            self.keys.setdefault(line.key, line)
        self.origin = origin
        self.settings = settings

    def find(self, address: Address) -> MapLine | None:
        """The line for an address: the whole one, user, @domain, *.

        A user's name is looked for with +detail and without, generic(5).
        """
        domain = address.domain.lower().rstrip(".")
        local = address.local.lower()
        locals_ = dict.fromkeys((local, self.settings.split_detail(local)[0]))
        names = [str(Address(name, domain)) for name in locals_]
        if self.settings.is_local(domain):
            names += locals_
        names += [f"@{domain}", "*"]
        return next((self.keys[name] for name in names if name in self.keys), None)

    def change(self, address: Address) -> tuple[str, Address]:
        """(display name that is set, or "", the address) for other hosts."""
        address = address.qualified(self.origin)
        line = self.find(address) if address.local and self.keys else None
        if line is None:
            return "", address
        name, less, rest = line.value.rpartition("<")
        value = rest.partition(">")[0].strip() if less else line.value
        if value.startswith("@") and is_domain(value[1:]):
            value = str(Address(address.local, value[1:]))
        try:
            new = Address.parse(value).qualified(self.origin)
            if not new.local:
                raise bad_address(line.value)
        except MailError as error:
            why = f"smtp_generic_maps: {line.where}: {error.text}"
            raise MailError("4.3.5", why, "none") from None
        return name.strip().strip('"'), new

    def sender(self, text: str) -> str:
        """A reverse-path for other hosts; the null sender stays. MailError."""
        return str(self.change(Address.parse(text))[1]) if text else ""

    def header(self, header: Header) -> Header:
        """A header for other hosts: senders changed, bare names completed."""
        fields = [
            (name, self.field(name, raw) if name in ADDRESS_FIELDS else raw)
            for name, raw in header.fields
        ]
        return Header(fields, header.rest)

    def field(self, name: str, raw: bytes) -> bytes:
        """One field; comments, names and folding stay as they are."""
        head, colon, value = os_text(raw).partition(":")
        spans = address_spans(value)
        for start, end in reversed(spans):
            try:
                old = Address.parse(value[start:end].strip())
            except MailError:
                continue  # whatever it is, it is not ours to mend
            shown, new = "", old.qualified(self.origin)
            if name in SENDER_FIELDS:
                shown, new = self.change(old)
            if shown and len(spans) == 1:
                value = f" {display_name(shown)} <{new}>\n"
            elif new != old:
                value = value[:start] + str(new) + value[end:]
        return os_bytes(head + colon + value)


# == 13 Conversion: Survey, MimeReader, Plan, Converter =======================
# What a message must become for a host that takes no more than SMTP allows:
# lines of 998 bytes (RFC 5321 section 4.5.3.1.6), and without 8BITMIME seven
# bits (RFC 6152 section 3). Parts are encoded anew, never cut; what is signed
# is left alone, and then cannot be sent.

LONGEST_LINE = 998  # bytes without the line end
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
# Fields of names and dates, in which no word may be encoded.
OPAQUE_FIELDS = tuple(
    "received return-path message-id in-reply-to references date resent-date "
    "resent-message-id delivered-to mime-version dkim-signature".split()
)


class Survey(Value):
    """What is in a message: longest line, whether 8-bit, size on the wire."""

    __slots__ = ("longest", "is_ascii", "size")

    def __init__(self, longest: int, is_ascii: bool, size: int) -> None:
        self.longest = longest
        self.is_ascii = is_ascii
        self.size = size


def survey(chunks: object) -> Survey:
    """Looks through a message, in chunks (LF line ends)."""
    longest, is_ascii, size, held = 0, True, 0, 0
    for chunk in chunks:
        lengths = list(map(len, chunk.split(b"\n")))
        size += len(chunk) + len(lengths) - 1
        lengths[0] += held
        held = lengths[-1]
        longest = max(longest, *lengths)
        is_ascii = is_ascii and chunk.isascii()
    return Survey(longest, is_ascii, size)


def field_parameter(value: str, name: str) -> str:
    """A parameter of a Content-Type's value, or "".

    >>> field_parameter('multipart/mixed; boundary="a;b"', "boundary")
    'a;b'
    """
    rest = value
    while rest:
        _, _, rest = rest.partition(";")
        key, equals, rest = rest.partition("=")
        if not equals:
            return ""
        rest = rest.lstrip()
        if rest.startswith('"'):
            end = skip_token(rest, 0)
            found, rest = rest[1 : end - 1].replace("\\", ""), rest[end:]
        else:
            found = rest.partition(";")[0].strip()
        if key.strip().lower() == name:
            return found
    return ""


class Entity:
    """A MIME part's header, as far as it matters here; each has its number.

    `usual` is its type where it names none; `is_message` says that it is a
    whole message, RFC 5322's and not a part's.
    """

    def __init__(self, block: bytes, number: int, usual: str, is_message: bool):
        self.block = block
        self.header = Header.parse(block)
        self.number = number
        self.is_message = is_message
        kinds = self.header.values("content-type")
        self.type = kinds[0] if kinds else ""
        self.kind = self.type.partition(";")[0].strip().lower() or usual
        codes = self.header.values("content-transfer-encoding")
        words = codes[0].replace("(", " ").split() if codes else []
        self.encoding = words[0].lower() if words else ""
        is_plain = self.encoding not in ("base64", "quoted-printable")
        is_multipart = self.kind.startswith("multipart/") and is_plain
        self.boundary = field_parameter(self.type, "boundary") if is_multipart else ""
        self.is_mail = self.kind == "message/rfc822" and is_plain
        self.is_leaf = not self.boundary and not self.is_mail

    @property
    def is_signed(self) -> bool:
        """Whether a change would break a signature."""
        is_top = not self.number and self.header.has("dkim-signature")
        return self.kind == "multipart/signed" or is_top


def lf_lines(text: bytes) -> list[bytes]:
    """The lines of `text`, where LF alone is a line end."""
    lines = [line + b"\n" for line in text.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def single_lines(chunks: object) -> object:
    """Each line with its LF, cut where it is longer than a megabyte."""
    for text in whole_lines(chunks):
        yield from text.splitlines(True) if b"\r" not in text else lf_lines(text)


class MimeReader:
    """Walks through a message; read() is its door.

    It yields (entity, None) where one begins and (entity, line) for its
    content, and for what stands before its parts; what belongs to none has
    the entity None. A line of more than a megabyte comes in pieces. `bare`
    are entities whose boundary never comes: all of them is content.
    """

    def __init__(self, bare: frozenset = frozenset()) -> None:
        self.bare = bare
        self.closed: set[int] = set()  # entities whose boundary has not come yet
        # Boundary, usual type behind it, number of the entity.
        self.edges: list[tuple[bytes, str, int]] = []
        self.block = b""  # the header that is being read
        self.count = 0
        self.entity: Entity | None = None
        self.in_header = self.is_message = True
        self.usual = "text/plain"

    def read(self, chunks: object) -> object:
        """The walk."""
        for line in single_lines(chunks):
            edge = self.find_edge(line)
            if edge >= 0:
                if self.in_header and self.block:
                    yield self.begin(b""), None
                self.cross(edge, line)
                yield None, line
            elif not self.in_header:
                yield self.entity, line
            elif self.is_header(line):
                self.block += line
            else:
                is_blank = line == b"\n"  # else the empty line is missing
                yield self.begin(line if is_blank else b""), None
                if not is_blank and self.in_header:
                    self.block += line
                elif not is_blank:
                    yield self.entity, line
        if self.in_header and self.block:
            yield self.begin(b""), None

    def find_edge(self, line: bytes) -> int:
        """Which open boundary a line is, the innermost first, or -1."""
        place = len(self.edges) - 1 if line[:2] == b"--" else -1
        bare = line.rstrip()
        while place >= 0:
            edge = self.edges[place][0]
            if bare in (edge, edge + b"--"):
                break
            place -= 1
        return place

    def is_header(self, line: bytes) -> bool:
        """Whether a line goes on with a header."""
        goes_on = is_field(line) or bool(self.block) and line[:1] in (b" ", b"\t")
        return goes_on and len(self.block) <= MAX_HEADER

    def begin(self, end: bytes) -> Entity:
        """An entity, as its header has been read; `end` is the empty line."""
        found = Entity(self.block + end, self.count, self.usual, self.is_message)
        self.count, self.block = self.count + 1, b""
        self.in_header = self.is_message = found.is_mail
        self.usual, self.entity = "text/plain", found
        if found.number in self.bare:
            found.is_leaf = True
        elif found.boundary:
            is_digest = found.kind == "multipart/digest"
            usual = "message/rfc822" if is_digest else "text/plain"
            edge = b"--" + os_bytes(found.boundary)
            self.edges.append((edge, usual, found.number))
            self.closed.add(found.number)
        return found

    def cross(self, place: int, line: bytes) -> None:
        """Goes on behind a boundary: in the next part, or outside of them."""
        edge, self.usual, number = self.edges[place]
        self.closed.discard(number)
        self.in_header = line.rstrip() == edge
        del self.edges[place + self.in_header :]
        self.block, self.entity, self.is_message = b"", None, False


class Plan:
    """What is to be encoded anew in a message: found in a first reading.

    `leaves` are the numbers of entities, `bare` of those whose boundary never
    comes; `is_utf8` says whether all 8-bit text can be called UTF-8.
    """

    def __init__(self, chunks: object, is_7bit: bool) -> None:
        self.is_7bit = is_7bit
        self.leaves: set[int] = set()
        self.is_signed = False
        self.is_utf8 = True
        reader = MimeReader()
        for entity, line in reader.read(chunks):
            if entity and line is None:
                self.is_signed |= entity.is_signed
            elif entity:
                self.look(entity, line)
        self.bare = frozenset(reader.closed)

    def is_bad(self, line: bytes) -> bool:
        """Whether a line cannot be sent as it is."""
        is_long = len(line) - line.endswith(b"\n") > LONGEST_LINE
        return is_long or self.is_7bit and not line.isascii()

    def look(self, entity: Entity, line: bytes) -> None:
        """Notes what one line of content asks for."""
        if self.is_bad(line):
            self.leaves.add(entity.number)
        if not line.isascii():
            try:
                line.decode()
            except UnicodeDecodeError:
                self.is_utf8 = False


def quoted_printable(line: bytes) -> bytes:
    """A line in quoted-printable, RFC 2045 section 6.7."""
    import binascii  # a C module, needed where a message must be encoded only

    ends = line.endswith(b"\n")
    text = line[: len(line) - ends - line.endswith(b"\r\n")]
    coded = binascii.b2a_qp(text, istext=False)
    return coded + (b"\n" if ends else b"=\n")


def broken_anew(text: bytes) -> bytes:
    """A line that is quoted-printable already, in lines that are short."""
    import re  # 8 ms; only conversion needs it

    odd = re.compile(rb"[\x80-\xff\0]")
    text = odd.sub(lambda found: b"=%02X" % found.group()[0], text)
    rows = []
    while len(text) > 76:
        cut = 75 - (2 if text[73:74] == b"=" else 1 if text[74:75] == b"=" else 0)
        rows.append(text[:cut] + b"=\n")
        text = text[cut:]
    return b"".join(rows) + text


def guessed_text(text: str) -> str:
    """8-bit text of a header: UTF-8, or else most probably Latin-1."""
    data = os_bytes(text)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def is_coded(word: str) -> bool:
    """Whether a word is one of RFC 2047's."""
    return word.startswith("=?") and word.endswith("?=") and word.count("?") >= 4


def header_words(value: str) -> object:
    """The words of a field's value; a quoted string or comment is not cut."""
    start = place = 0
    while place < len(value):
        if value[place] in " \t\n":
            if place > start:
                yield value[start:place]
            start = place = place + 1
        else:
            place = skip_token(value, place)
    if place > start:
        yield value[start:place]


def is_odd_word(word: str, is_7bit: bool) -> bool:
    """Whether a word of a header must be encoded."""
    is_long = len(os_bytes(word)) > LONGEST_LINE - 80
    return is_long or is_7bit and not word.isascii()


def plain_words(value: str, is_7bit: bool) -> object:
    """The words of unstructured text, odd ones encoded, RFC 2047 section 5.

    Neighbours are encoded together, and a blank beside a word that is encoded
    already with them: between encoded words blanks are nothing.
    """
    run, last = "", ""
    for word in value.split():
        if is_odd_word(word, is_7bit):
            run += (" " if run or is_coded(last) else "") + guessed_text(word)
            continue
        if run:
            yield encoded_word(run + (" " if is_coded(word) else ""))
        run, last = "", word
        yield word
    if run:
        yield encoded_word(run)


def phrase_words(value: str, is_7bit: bool) -> object:
    """The words of a list of addresses, odd names encoded."""
    run: list[str] = []
    for word in header_words(value):
        bare = word.lstrip("(<").rstrip(",;:)>")
        lead, _, trail = word.partition(bare) if bare else ("", "", word)
        is_odd = bool(bare) and is_odd_word(word, is_7bit)
        if run and (not is_odd or lead):
            yield encoded_word(" ".join(run))
            run = []
        if not is_odd:
            yield word
            continue
        if bare.startswith('"'):
            bare = bare.strip('"').replace("\\", "")
        run.append(guessed_text(bare))
        if lead or trail:
            yield lead + encoded_word(" ".join(run)) + trail
            run = []
    if run:
        yield encoded_word(" ".join(run))


def parameter_words(value: str, is_7bit: bool) -> object:
    """The words of a Content- field, odd parameters as RFC 2231 has them."""
    for word in header_words(value):
        name, equals, text = word.partition("=")
        if equals and is_odd_word(word, is_7bit):
            end = ";" if text.endswith(";") else ""
            data = guessed_text(text.rstrip(";").strip('"')).encode()
            plain = FIELD_BYTES.translate(None, b"\"%'()*,/:;<=>?@[\\]")
            shown = "".join(chr(c) if c in plain else f"%{c:02X}" for c in data)
            word = f"{name}*=utf-8''{shown}{end}"
        yield word


def fitting_field(name: str, raw: bytes, is_7bit: bool) -> bytes:
    """A header field whose lines fit: folded anew, where they do not."""
    is_odd = is_7bit and not raw.isascii()
    if not is_odd and max(map(len, raw.split(b"\n"))) <= LONGEST_LINE:
        return raw
    head, colon, value = os_text(raw).partition(":")
    if name in OPAQUE_FIELDS:
        words = header_words(value)
    elif name.startswith("content-"):
        words = parameter_words(value, is_7bit)
    else:
        way = phrase_words if name in ADDRESS_FIELDS else plain_words
        words = way(value, is_7bit)
    line, lines = head + colon, []
    for word in words:
        for piece in word.split("\n "):
            if line and len(os_bytes(line)) + len(os_bytes(piece)) > 77:
                lines.append(line)
                line = ""
            line += f" {piece}"
    return os_bytes("\n".join([*lines, line]) + "\n")


PIECE_TO_CODE = 1 << 16  # bytes of a line without end; it grows to the triple


class Converter:
    """Writes a message anew as a plan says; convert() is its door."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.held = b""  # the rest of a row of base64, of a line cut in pieces
        self.tail = b""  # what ends it, if anything is held

    def convert(self, chunks: object) -> object:
        """The message in chunks."""
        for entity, line in MimeReader(self.plan.bare).read(chunks):
            if entity is None or line is None or not entity.is_leaf:
                yield self.flush()
                yield self.header(entity) if line is None else self.fit(line)
            elif entity.number not in self.plan.leaves:
                yield line
            else:
                way = self.WAYS.get(entity.encoding, Converter.encode)
                for place in range(0, len(line), PIECE_TO_CODE):
                    yield way(self, line[place : place + PIECE_TO_CODE])
        yield self.flush()

    def flush(self) -> bytes:
        """What was held back."""
        found, self.held = (self.held + self.tail if self.held else b""), b""
        return found

    def fit(self, line: bytes) -> bytes:
        """A line that is no content, in lines that can be sent."""
        return quoted_printable(line) if self.plan.is_bad(line) else line

    def encode(self, line: bytes) -> bytes:
        """A line of plain content."""
        return quoted_printable(line)

    def rewrap(self, line: bytes) -> bytes:
        """Base64 in rows of 76; what else stands there means nothing."""
        text = b"".join(line.split())
        if text.translate(None, BASE64):
            text = bytes(byte if byte < 128 else 63 for byte in text)  # ?
        self.held, self.tail = self.held + text, b"\n"
        whole = len(self.held) // 76 * 76
        rows = (self.held[n : n + 76] + b"\n" for n in range(0, whole, 76))
        found, self.held = b"".join(rows), self.held[whole:]
        return found

    def rebreak(self, line: bytes) -> bytes:
        """Quoted-printable in shorter lines; no =XX is cut."""
        line, self.held, self.tail = self.held + line, b"", b""
        if line.endswith(b"\n"):
            return broken_anew(line[:-1]) + b"\n"
        cut = line.rfind(b"=", max(0, len(line) - 2))
        if cut >= 0:
            line, self.held = line[:cut], line[cut:]
        return broken_anew(line) + b"=\n"

    WAYS = {"base64": rewrap, "quoted-printable": rebreak}

    def header(self, entity: Entity) -> bytes:
        """The header of a part that is encoded anew, or only made to fit."""
        plan, header = self.plan, entity.header
        is_new = entity.number in plan.leaves and entity.encoding not in self.WAYS
        is_new = is_new and entity.is_leaf
        size = sum(len(raw) for _, raw in header.fields)
        added, end = b"", entity.block[size:]
        if is_new or plan.is_7bit and entity.encoding in ("8bit", "binary"):
            header = header.without("content-transfer-encoding")
            added = self.new_fields(entity, is_new)
            end = end or b"\n"
        raws = [fitting_field(name, raw, plan.is_7bit) for name, raw in header.fields]
        return b"".join(raws) + added + end

    def new_fields(self, entity: Entity, is_new: bool) -> bytes:
        """What the header of a changed part says of it."""
        text = ""
        if entity.is_message and not entity.header.has("mime-version"):
            text += "MIME-Version: 1.0\n"
        if is_new and not entity.type and entity.kind == "text/plain":
            charset = "utf-8" if self.plan.is_utf8 else "unknown-8bit"
            text += f"Content-Type: text/plain; charset={charset}\n"
        encoding = "quoted-printable" if is_new else "7bit"
        return os_bytes(f"{text}Content-Transfer-Encoding: {encoding}\n")


# =============================================================================
# HANDS: each owns one thing outside the program.
# =============================================================================

# == 14 Log: Log ==============================================================
# One method an event, in Postfix's shapes, so that its log readers serve.
# Failures: none; mail is never held up by a log that cannot be written.


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`: a disk that fills up takes less than that."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# Destinations that an address names; of others the log says the recipient.
ADDRESS_KINDS = ("mailbox", "lmtp", "remote", "error")


def shown_delay(seconds: float) -> str:
    """Seconds with two digits, as Postfix shows them: `0.02`, `1.5`, `432`."""
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"


# What a JSON log has as keys of their own, of the words `name=value`.
LOG_KEYS = (
    *("from", "to", "orig_to", "relay", "delay", "delays", "dsn", "status"),
    *("size", "nrcpt", "client", "uid", "sasl_method", "sasl_username"),
)


def log_words(text: str) -> dict[str, str]:
    """The queue id of a log line and its `name=value` words.

    Only those at its beginning: what others said may look the same.

    >>> log_words("T1: to=<a@b>, relay=local, status=sent (x=y)")
    {'to': 'a@b', 'relay': 'local', 'status': 'sent'}
    """
    import re

    found = {}
    queue_id, colon, rest = text.partition(": ")
    if colon and is_id(queue_id):
        found["queue_id"] = queue_id
    if rest.startswith("message-id="):
        return {**found, "message-id": rest[11:].strip("<>")}
    word = re.compile(r'([a-z_]+)=(<(?:"(?:\\.|[^"\\])*"|[^<>"])*>|[^ ,]*)(?:, | |$)')
    one = word.match(rest)
    while one and one.group(1) in LOG_KEYS:
        value = one.group(2)
        found.setdefault(one.group(1), value.strip("<>"))
        one = word.match(rest, one.end())
    return found


class Log:
    """Where log lines go: maillog_file, else syslog, else the journal.

    With `json:` before its name the file has an object in each line.

    A daemon in the foreground repeats them on stderr (`echo`), but not where
    they would be in the journal or on the same output twice. Under systemd,
    where there is no /dev/log, stderr has them in the form of sd-daemon(3).
    """

    def __init__(self, settings: Settings, echo: bool = False) -> None:
        self.name = settings.syslog_name
        self.path = settings.maillog_file.removeprefix("json:")
        self.is_json = self.path != settings.maillog_file
        self.facility = settings.syslog_facility
        has_syslog = not self.path and os.path.exists("/dev/log")
        self.echo = echo and self.path != "-" and (not has_syslog or os.isatty(2))
        self.is_journal = echo and not self.path and "JOURNAL_STREAM" in os.environ
        self.host = settings.myhostname.partition(".")[0]
        self.fd = -1
        self.opened: tuple[int, int] | None = None
        self.second = 0  # the one that `stamp` and `has_syslog` are of
        self.stamp = ""
        self.has_syslog = has_syslog

    def line(self, component: str, text: str) -> None:
        """Writes `minimta/COMPONENT[PID]: text`, on one line."""
        self.tell(component, printable(text), 6)

    def warning(self, component: str, text: str) -> None:
        """Something that an administrator should mend."""
        self.tell(component, printable(f"warning: {text}"), 4)

    def tell(self, component: str, text: str, level: int) -> None:
        """Writes a line of a syslog level: 6 informs, 4 warns."""
        self.look_around(time.time())
        head = f"{self.name}/{component}[{os.getpid()}]"
        data = os_bytes(f"{self.stamp} {self.host} {head}: {text}\n")
        if self.is_json:
            data = self.as_json(component, text, level)
        try:
            if self.path == "-":
                os.write(1, data)
            elif self.path:
                self.append(data)
            elif self.has_syslog:
                self.to_syslog(component, text, level)
            elif self.is_journal:
                os.write(2, os_bytes(f"<{level}>{head}: {text}\n"))
                return
            if self.echo:
                os.write(2, data)
        except OSError:
            pass  # a full disk must not stop mail

    def as_json(self, component: str, text: str, level: int) -> bytes:
        """A line as an object, its queue id and `name=value` words as keys."""
        import json  # 5 ms; only where it is asked for

        found = {"time": time.time(), "host": self.host, "name": self.name}
        found.update(component=component, pid=os.getpid(), message=text)
        found["level"] = "warning" if level < 6 else "info"
        found.update(log_words(text))
        return os_bytes(json.dumps(found) + "\n")

    def look_around(self, now: float) -> None:
        """Notices, once a second, what time it is and whether syslog is up."""
        if int(now) != self.second:
            self.second = int(now)
            self.stamp = time.ctime(now)[4:19]
            self.has_syslog = not self.path and os.path.exists("/dev/log")

    def append(self, data: bytes) -> None:
        """Appends to the log file; notices when it was rotated away."""
        self.open()
        os.write(self.fd, data)

    def open(self) -> None:
        """Opens the log file, unless it is open and still there.

        The daemon does so before rights are dropped; a process that then may
        not open the file that took its place goes on with the old one.
        """
        try:
            seen = os.stat(self.path)
            if (seen.st_dev, seen.st_ino) == self.opened:
                return
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags, 0o640)
        except OSError:
            if self.fd < 0:
                raise
            return
        if self.fd >= 0:
            os.close(self.fd)
        seen = os.fstat(fd)
        self.fd, self.opened = fd, (seen.st_dev, seen.st_ino)

    def to_syslog(self, component: str, text: str, level: int) -> None:
        """Hands a line to syslog under the component's name."""
        import syslog  # a C module, used where /dev/log is

        facility = getattr(syslog, f"LOG_{self.facility.upper()}", syslog.LOG_MAIL)
        syslog.openlog(f"{self.name}/{component}", syslog.LOG_PID, facility)
        syslog.syslog(level, text.encode("ascii", "backslashreplace").decode())

    def accepted(
        self, queue_id: str, client: Client, envelope: Envelope, who: str = ""
    ) -> None:
        """A message gets its id: from whom it comes; `who` says more of it."""
        if client.is_local:
            text = f"{queue_id}: uid={client.uid} from=<{envelope.sender}>"
            self.line("pickup", text)
        else:
            self.line("smtpd", f"{queue_id}: client={who or client}")

    def active(self, message: object) -> None:
        """The runner takes up a message for the first time."""
        queue_id, envelope = message.queue_id, message.file.envelope
        ids = message.header.values("message-id")
        self.line("cleanup", f"{queue_id}: message-id={ids[0] if ids else '<>'}")
        count = len(envelope.recipients)
        size = message.file.size
        text = f"from=<{envelope.sender}>, size={size}, nrcpt={count} (queue active)"
        self.line("qmgr", f"{queue_id}: {text}")

    def attempt(
        self, queue_id: str, attempt: Attempt, arrived: float, taken: float = 0
    ) -> None:
        """What became of a recipient; `taken` is when the runner began."""
        delay = max(0.0, attempt.when - arrived)
        before = max(0.0, min(taken or attempt.when, attempt.when) - arrived)
        shown = shown_delay(delay)
        delays = f"{shown_delay(before)}/0/0/{shown_delay(delay - before)}"
        kind, _, target = attempt.destination.partition(" ")
        kind = kind.partition("/")[0]
        component = {"remote": "smtp", "lmtp": "lmtp"}.get(kind, "local")
        if kind not in ADDRESS_KINDS:
            target = attempt.recipient
        first = (
            "" if target == attempt.recipient else f" orig_to=<{attempt.recipient}>,"
        )
        self.line(
            component,
            f"{queue_id}: to=<{target}>,{first} relay={attempt.relay}, "
            f"delay={shown}, delays={delays}, dsn={attempt.status}, "
            f"status={attempt.outcome} ({attempt.text})",
        )

    def reported(self, queue_id: str, note: str, report_id: str) -> None:
        """A report was queued."""
        self.line("bounce", f"{queue_id}: {note}: {report_id}")

    def changed(self, queue_id: str, action: str, uid: int) -> None:
        """A queue command on a message, and whose."""
        self.line("postsuper", f"{queue_id}: {ACTIONS[action][0]}, uid={uid}")

    def removed(self, queue_id: str) -> None:
        """A message is done with."""
        self.line("qmgr", f"{queue_id}: removed")


# == 15 Users: User, Users, Passwords, Rights, find_root, read_settings =======
# Who is who on this host or in this private instance, and acting as them.
# Failures: MailError 4.3.0 when the user database cannot be read.


USER_FRESH = 1  # seconds that a user who was found is believed to be there


class User(Value):
    """One line of passwd(5), less the password."""

    __slots__ = ("name", "uid", "gid", "gecos", "home")

    def __init__(self, name: str, uid: int, gid: int, gecos: str, home: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.gecos = gecos
        self.home = home

    @classmethod
    def of(cls, entry: tuple) -> User:
        """The user of one entry of pwd."""
        name, _, uid, gid, gecos, home, _ = entry
        return cls(name, uid, gid, gecos, home)


class Users:
    """The user database: the system's, or `ROOT/etc/passwd` if it exists."""

    def __init__(self, root: str = "") -> None:
        path = f"{root}/etc/passwd"
        self.path = path if root and os.path.exists(path) else ""
        self.seen: tuple | None = None
        self.known: list[User] = []
        self.fresh: dict[str, tuple[float, User]] = {}  # those just looked up

    def rows(self) -> list[User]:
        """Every user of a private instance's own passwd file."""
        try:
            now = os.stat(self.path)
            seen = now.st_ino, now.st_mtime_ns, now.st_size
            if seen != self.seen:
                with open(
                    self.path, encoding="utf-8", errors="surrogateescape"
                ) as file:
                    self.known = self.parse(file.read())
                self.seen = seen
        except OSError as error:
            raise MailError("4.3.0", f"{self.path}: {error.strerror}") from None
        return self.known

    def parse(self, text: str) -> list[User]:
        """The users of a passwd file's text."""
        found = []
        for line in text.split("\n"):
            words = line.split(":")
            if len(words) == 7 and words[2].isdigit() and words[3].isdigit():
                name, _, uid, gid, gecos, home, _ = words
                found.append(User(name, int(uid), int(gid), gecos, home))
        return found

    def lookup(self, name: str) -> User | None:
        """The user of that name, or of that name in lower case."""
        if not name or "/" in name or "\0" in name or not name.isprintable():
            return None
        return self.exact(name) or (
            self.exact(name.lower()) if name.lower() != name else None
        )

    def exact(self, name: str) -> User | None:
        """The user of exactly that name."""
        if self.path:
            return next((user for user in self.rows() if user.name == name), None)
        now = time.monotonic()
        until, user = self.fresh.get(name, (0.0, None))
        if until > now:
            return user
        import pwd  # here, for there are hosts (and tests) without it

        try:
            user = User.of(pwd.getpwnam(name))
        except (KeyError, UnicodeError, ValueError):
            return None
        if len(self.fresh) > 1000:
            self.fresh.clear()
        self.fresh[name] = now + USER_FRESH, user
        return user

    def names(self) -> list[str]:
        """The names of all users, as far as the system tells them."""
        if self.path:
            return [user.name for user in self.rows()]
        import pwd

        return [entry.pw_name for entry in pwd.getpwall()]

    def by_uid(self, uid: int) -> User:
        """The user of that uid; a made-up one where passwd has none."""
        if self.path:
            found = next((user for user in self.rows() if user.uid == uid), None)
            if found:
                return found
        import pwd

        try:
            return User.of(pwd.getpwuid(uid))
        except (KeyError, OverflowError):
            # Group 65534 is nobody's: that of the same number may be shadow's.
            gid = os.getgid() if uid == os.getuid() else 65534
            return User(f"uid{uid}", uid, gid, "", "/")

    def caller(self, environ: dict, uid: int) -> User:
        """Who runs this program: the uid decides, not what HOME or USER say.

        LOGNAME and USER choose among the names of that uid; in a private
        instance with its own passwd file, where anybody may be played, they
        choose among all of its users.
        """
        for variable in ("LOGNAME", "USER"):
            named = (
                self.exact(environ.get(variable, "")) if environ.get(variable) else None
            )
            if named and (self.path or named.uid == uid):
                return named
        return self.by_uid(uid)


def hash_password(password: bytes, salt: bytes, cost: int = 14) -> str:
    """`$scrypt$ln=14,r=8,p=1$SALT$HASH`: 16 MB and 50 ms for each guess."""
    import base64
    import hashlib

    made = hashlib.scrypt(password, salt=salt, n=1 << cost, r=8, p=1, maxmem=1 << 26)
    parts = [base64.b64encode(data).decode().rstrip("=") for data in (salt, made)]
    return f"$scrypt$ln={cost},r=8,p=1${parts[0]}${parts[1]}"


class Passwords:
    """smtpd_sasl_password_file: a line `USER:HASH` for who may authenticate.

    Read at each check, so that a change counts at once.
    """

    def __init__(self, path: str) -> None:
        import threading  # the daemon's threads check one at a time: 16 MB each

        self.path = path
        self.guard = threading.Lock()

    def rows(self) -> dict[str, str]:
        """User -> hash. Raises OSError."""
        with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().split("\n")
        pairs = (line.strip().partition(":") for line in lines if line[:1] != "#")
        return {user: shown for user, colon, shown in pairs if colon}

    def check(self, user: str, password: bytes) -> bool:
        """Whether that is the user's password; an unknown user takes as long.

        Raises MailError when the file cannot be read.
        """
        import base64
        import hmac

        try:
            shown = self.rows().get(user, "") if user else ""
        except OSError as error:
            why = f"smtpd_sasl_password_file {self.path}: {error.strerror}"
            raise MailError("4.3.0", why) from None
        words = shown.split("$")
        is_known = len(words) == 5 and words[1] == "scrypt"
        salt, cost = b"nobody", 14
        if is_known:
            salt = base64.b64decode(words[3] + "==")
            cost = min(int(words[2].partition(",")[0].rpartition("=")[2]), 15)
        with self.guard:
            made = hash_password(password, salt, cost)
        return is_known and hmac.compare_digest(made.encode(), shown.encode())

    def change(self, user: str, password: bytes, gid: int) -> None:
        """Gives a user a password: in one step, for root and the daemon only.

        Raises OSError.
        """
        try:
            rows = self.rows()
        except FileNotFoundError:
            rows = {}
        rows[user] = hash_password(password, os.urandom(16))
        aside = f"{self.path}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(aside, flags, 0o600)
        try:
            text = "".join(f"{name}:{shown}\n" for name, shown in rows.items())
            write_all(fd, os_bytes(text))
            if os.geteuid() == 0:
                os.fchown(fd, 0, gid)
                os.fchmod(fd, 0o640)
            os.fsync(fd)
            os.rename(aside, self.path)
        except OSError:
            os.unlink(aside)
            raise
        finally:
            os.close(fd)


class Rights:
    """Acts as a user in a `with` block: effective uid, gid and groups.

    Does nothing where the process is not root. Only in processes with one
    thread, for the effective uid is the whole process's. `gid` stands in for
    the user's group where a directory is written by its group (/var/mail).
    """

    def __init__(self, user: User, gid: int | None = None) -> None:
        self.user = user
        self.gid = user.gid if gid is None else gid
        self.is_root = os.geteuid() == 0

    def __enter__(self) -> Rights:
        if self.is_root:
            self.before = os.getegid(), os.getgroups()
            try:
                os.setgroups([self.user.gid])
                os.setegid(self.gid)
                os.seteuid(self.user.uid)
            except (OSError, OverflowError, ValueError) as error:
                self.__exit__()
                raise MailError(
                    "4.3.0", f"cannot act as {self.user.name}: {error}"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_root:
            os.seteuid(0)
            os.setegid(self.before[0])
            os.setgroups(self.before[1])

    @property
    def owner(self) -> int:
        """The uid that files of this user are expected to have."""
        return self.user.uid if self.is_root else os.geteuid()


def drop_rights(user: User) -> None:
    """Becomes `user` for good. Does nothing where the process is not root."""
    if os.geteuid() == 0 and user.uid != 0:
        os.setgroups([user.gid])
        os.setgid(user.gid)
        os.setuid(user.uid)


def preload(*names: str) -> None:
    """Imports modules before rights are dropped, while they can be read.

    What is missing here shows where it is used.
    """
    for name in names:
        try:
            __import__(name)
        except Exception:  # noqa: BLE001, S112 tempfile raises NameError on Debian
            continue


def queue_owner(settings: Settings, users: Users) -> User:
    """mail_owner: who owns the queue. Raises ProgramError.

    Never root, and never group mail, which could write mailboxes.
    """
    if os.geteuid() != 0:
        return users.by_uid(os.geteuid())
    names = (
        [settings.mail_owner]
        if settings.mail_owner
        else ["minimta", "daemon", "nobody"]
    )
    for name in names:
        # Not the private instance's: a user of the system, for processes.
        user = Users().exact(name)
        if user and user.uid != 0:
            return user
    shown = printable(", ".join(names), 100)
    raise ProgramError(
        EX_CONFIG, f"mail_owner: no user {shown} that is not root: make one"
    )


def command_user(settings: Settings, users: Users) -> User:
    """default_privs: who runs commands and appends to files of aliases.

    Never root. Raises MailError 4.3.5.
    """
    if os.geteuid() != 0:
        return users.by_uid(os.geteuid())
    name = settings.default_privs
    user = users.exact(name) or Users().exact(name)
    if user is None or user.uid == 0:
        why = f"default_privs: no user {printable(name, 60)} that is not root"
        raise MailError("4.3.5", why)
    if user.uid == queue_owner(settings, users).uid:
        why = f"default_privs: {user.name} owns the queue: name another user"
        raise MailError("4.3.5", why)
    return user


def find_root(environ: dict) -> str:
    """The private instance's directory, or "" for the host's own system."""
    if environ.get("MINIMTA_ROOT"):
        return os.path.abspath(environ["MINIMTA_ROOT"])
    if os.geteuid() == 0 or os.path.isdir("/var/spool/minimta"):
        return ""
    home = Users().by_uid(os.getuid()).home
    if home == "/" and environ.get("HOME"):
        home = environ["HOME"]
    return os.path.join(home, ".minimta")


def from_files(environ: dict) -> dict:
    """`environ`, a MINIMTA_<NAME> read from the file in MINIMTA_<NAME>_FILE.

    As containers hand over secrets. Raises ProgramError EX_CONFIG.
    """
    found = dict(environ)
    for row in SETTINGS:
        variable = f"MINIMTA_{row.name.upper()}"
        path = environ.get(f"{variable}_FILE", "")
        if not path or variable in environ:
            continue
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                found[variable] = file.read().strip()
        except OSError as error:
            why = f"{variable}_FILE: {path}: {error.strerror}: make it readable"
            raise ProgramError(EX_CONFIG, why) from None
    return found


HOSTS_SIZE = 1 << 20  # characters of /etc/hosts that are read


def full_name(host: str, path: str) -> str:
    """A host's name with its domain, as a hosts file has it, or as it is.

    As `hostname -f` tells it, but without asking a name server.
    """
    if "." in host:
        return host
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(HOSTS_SIZE)
    except OSError:
        return host
    for line in text.split("\n"):
        names = line.partition("#")[0].split()[1:]
        if host in names:
            return next((n for n in names if n.startswith(f"{host}.")), host)
    return host


def read_settings(environ: dict, path: str = "") -> Settings:
    """The settings of this process. Raises ProgramError EX_CONFIG."""
    root = find_root(environ)
    name = path or f"{root}/etc/minimta.conf"
    text = ""
    try:
        with open(name, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except FileNotFoundError:
        if path:
            raise ProgramError(EX_CONFIG, f"{name}: no such file") from None
    except OSError as error:
        why = f"{name}: {error.strerror}: make it readable"
        raise ProgramError(EX_CONFIG, why) from None
    host = full_name(os.uname().nodename or "localhost", f"{root}/etc/hosts")
    return Settings.parse(text, from_files(environ), host, root, name)


# == 16 Maps: MapFiles, Secrets, read_secrets =================================
# Files of lines that settings name: transport_maps and its like.
# Failures: MailError 4.3.5 that names setting and file; 4.7.8 for a password
# file that others may read.

MAX_MAP = 1 << 24  # bytes of one file
SECRET_TIME = 30  # seconds that smtp_sasl_password_command may take
# What the relay works with: it begins anew when one of them changes.
PASSWORDS = "smtp_sasl_password_maps"
RELAY_MAPS = ("smtp_generic_maps", PASSWORDS)


class MapFiles:
    """The lines of a setting's files, read anew when they change."""

    def __init__(self, settings: Settings, setting: str) -> None:
        self.setting = setting
        self.paths = settings.map_paths(setting)
        self.seen: tuple | None = None
        self.found: list[MapLine] = []

    def mark(self) -> tuple:
        """What changes when a file does."""
        found = []
        for path in self.paths:
            try:
                seen = os.stat(path)
                found.append((seen.st_ctime_ns, seen.st_size, seen.st_ino))
            except OSError:
                found.append(())
        return tuple(found)

    def lines(self) -> list[MapLine]:
        """All lines, in their order. Raises MailError."""
        mark = self.mark() if self.paths else ()
        if mark != self.seen:
            is_secret = self.setting == PASSWORDS
            self.found = [
                line
                for path in self.paths
                for line in parse_map(self.read(path), path, is_secret)
            ]
            self.seen = mark
        return self.found

    def read(self, path: str) -> str:
        """One file's text. Raises MailError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, encoding="utf-8", errors="surrogateescape") as file:
                self.check(path, os.fstat(fd))
                return file.read(MAX_MAP)
        except OSError as error:
            why = f"{self.setting}: {path}: {error.strerror}: mend it"
            raise MailError("4.3.5", why, "none") from None

    def check(self, path: str, seen: os.stat_result) -> None:
        """Refuses a password file that others may read. Raises MailError."""
        if self.setting == PASSWORDS and seen.st_mode & 0o077:
            why = f"{self.setting}: {path}: others can read it: chmod 600 {path}"
            raise MailError("4.7.8", why, "none")


class Secrets:
    """Passwords for relays, as they were when the relay process began.

    `failure` is why there are none; `printed` what the command printed, for
    `relayhosts` unless a line says for whom.
    """

    def __init__(self) -> None:
        self.lines: list[MapLine] = []
        self.printed = ""
        self.relayhosts: set[str] = set()
        self.failure: MailError | None = None

    def find(self, hop: NextHop) -> tuple[str, str] | None:
        """(user, password) for a host, or None. Raises MailError."""
        if self.failure:
            raise self.failure
        line = find_secret(self.lines, hop)
        user, _, password = line.value.partition(":") if line else ("", "", "")
        if not password and self.printed:
            if not user and str(hop.with_level("")) not in self.relayhosts:
                return None  # a password for the smarthost is nobody else's
            user, password = self.from_command(user)
        return (user, password) if user else None

    def from_command(self, user: str) -> tuple[str, str]:
        """What the command printed: `user`'s password, or user:password."""
        if user:
            return user, self.printed
        user, colon, password = self.printed.partition(":")
        if not colon:
            why = "smtp_sasl_password_command: it must print user:password"
            raise MailError("4.7.8", why, "none")
        return user, password


def ask_command(command: str) -> str:
    """The first line that smtp_sasl_password_command prints. MailError."""
    import signal
    import subprocess

    name, files = "smtp_sasl_password_command", ("stdout", "stderr")
    how = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    how.update(dict.fromkeys(files, subprocess.PIPE))
    try:
        # noqa: S602 the administrator's own shell line
        with subprocess.Popen(command, shell=True, **how) as process:
            try:
                out, err = process.communicate(timeout=SECRET_TIME)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    except (OSError, subprocess.SubprocessError) as error:
        why = f"{name}: {printable(str(error), 200)}"
        raise MailError("4.7.8", why, "none") from None
    found = os_text(out.partition(b"\n")[0]).strip()
    if process.returncode or not found:
        said = printable(os_text(err).strip().replace("\n", " "), 200)
        said = said or "it printed nothing"
        why = f"{name}: exit code {process.returncode}: {said}"
        raise MailError("4.7.8", why, "none")
    return found


def read_secrets(settings: Settings) -> Secrets:
    """Reads the password files and runs the command, as who we are now."""
    secrets = Secrets()
    try:
        secrets.lines = MapFiles(settings, PASSWORDS).lines()
        texts = relay_words(settings.relayhost)
        hops = (NextHop.parse(text, "relayhost") for text in texts)
        secrets.relayhosts = {str(hop.with_level("")) for hop in hops}
        if settings.smtp_sasl_password_command:
            secrets.printed = ask_command(settings.smtp_sasl_password_command)
    except MailError as error:
        secrets.failure = error
    return secrets


# == 17 Spool: Spool, Draft, QueueFile, Maildrop, Overview, History ===========
# The queue's directories and files. See the front page for their states.
# Failures: MailError 4.3.1 (no room) or 4.3.0 (cannot be stored).

FOLDERS = (  # name, mode; all but maildrop belong to mail_owner
    ("maildrop", 0o1733),
    ("incoming", 0o700),
    ("queue", 0o700),
    ("journal", 0o700),
    ("hold", 0o700),
    ("corrupt", 0o700),
    ("spare", 0o700),
    ("trace", 0o700),
)
MAX_HISTORY = 1 << 22  # bytes of each file in trace/, about
MAX_RECORD = 1 << 15  # characters of what is told of one message at once
BLOCK = 1 << 18  # bytes read or written at once
AHEAD = 100  # items that one process hands over to another at once

ENVELOPE_PIECE = 1 << 10  # bytes that most envelopes are shorter than
QUEUE_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
JOURNAL_PIECE = 1 << 12  # bytes that most journals are shorter than
OLD_DRAFT = HOUR  # seconds until what was never finished is swept away
CREW = 8  # threads of the SMTP server that write messages
SPARES = 64  # files that are kept to be written over
SPARE_SIZE = 1 << 16  # bytes of the largest of them
MAX_ENVELOPE = 1 << 24  # bytes: 10,000 recipients and more
MAX_DROP = 1 << 40  # bytes of a drop that is only listed: any size


def storage_error(error: OSError) -> MailError:
    """The failure for an error of the queue's disk."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return MailError("4.3.1", f"Insufficient system storage: {error.strerror}")
    return MailError("4.3.0", f"Cannot store the message: {error.strerror}")


def is_passing(error: OSError) -> bool:
    """Whether what an error says may pass: no room, no descriptors."""
    import errno

    words = "ENOSPC EDQUOT EFBIG EIO EMFILE ENFILE ENOMEM EAGAIN ESTALE EROFS"
    return error.errno in {getattr(errno, word) for word in words.split()}


def close_quietly(fd: int) -> None:
    """Closes what is not needed any more, whatever the system says to it."""
    try:
        os.close(fd)
    except OSError:
        pass  # what matters was synced, and that went well


def is_unlinked(path: str) -> bool:
    """Removes a file; whether that went well."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def sync_files(fds: list[int]) -> dict[int, OSError]:
    """Makes files durable, one after the other: descriptor -> what failed.

    An fsync that failed is never tried again on the same file: the kernel has
    marked the pages clean and would lie.
    """
    failures = {}
    for fd in fds:
        try:
            os.fsync(fd)
        except OSError as error:
            failures[fd] = error
    return failures


def sync_folder(path: str) -> None:
    """Makes the names in a directory durable: fsync of a file does not."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_file(fd: int, is_ours: bool) -> bool:
    """Locks a message's file, to change it or to deliver it (not `is_ours`).

    False if another process is at work on it. The lock is the process's, so
    that none of our own descriptors can be in the way; it ends with it, or
    when the file is closed.
    """
    import fcntl

    kind = fcntl.LOCK_EX if is_ours else fcntl.LOCK_SH
    try:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_given_up(seen: os.stat_result) -> bool:
    """Whether a queue file's mode says that its message is to be returned."""
    return bool(seen.st_mode & 0o100)


def hand_over(fd: int, items: object) -> None:
    """Writes items in blocks behind their sizes; an empty one is the end."""
    import itertools
    import marshal

    block = None
    while block != []:
        block = list(itertools.islice(items, AHEAD))
        data = marshal.dumps(block)
        write_all(fd, len(data).to_bytes(8, "big") + data)


def start_maker(items: object) -> tuple[int, int]:
    """(pid, descriptor) of a child that hands items over. Raises OSError."""
    out, into = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(out)
        os.close(into)
        raise
    if not child:
        try:
            os.close(out)  # else it would never see that nobody listens
            hand_over(into, items)
        finally:
            os._exit(0)
    os.close(into)
    return child, out


def made_blocks(items: object) -> object:
    """The items in blocks that a child makes; an empty one when it is done."""
    import marshal

    try:
        child, out = start_maker(items)
    except OSError:
        return  # no more processes
    try:
        with open(out, "rb") as pipe:
            while True:
                size = int.from_bytes(pipe.read(8), "big")
                yield marshal.loads(pipe.read(size))
    except (EOFError, ValueError, TypeError):
        return  # it was ended in the middle
    finally:
        try:
            os.waitpid(child, 0)
        except ChildProcessError:
            pass  # whoever started us has none waited for


def ahead(items: object) -> object:
    """The same items of a generator, made by a child while we work on others.

    Plain values only, marshal's; not where there are threads. What a child
    that was ended did not hand over is made here.
    """
    import itertools

    yield from itertools.islice(items, AHEAD)
    has_more, items = peeked(items)
    count = 0
    for block in made_blocks(items) if has_more and os.cpu_count() != 1 else ():
        if not block:
            return
        yield from block
        count += len(block)
    yield from itertools.islice(items, count, None)


def halved(work: object, items: list) -> object:
    """work(item) of each item, in their order; a child does every other block.

    Plain values only, marshal's; not where there are threads. What a child
    that was ended did not hand over is made here.
    """
    blocks = [items[n : n + AHEAD] for n in range(0, len(items), AHEAD)]
    child = made_blocks(work(item) for block in blocks[1::2] for item in block)
    for number, block in enumerate(blocks):
        made = next(child, []) if number % 2 and os.cpu_count() != 1 else []
        yield from made or map(work, block)
    child.close()


class Draft:
    """A message being written, in incoming/; commit() makes it mail.

    Used in a `with` block: what is not committed when it ends is removed.
    """

    due = 0.0  # its first attempt, if that is not at once

    def __init__(self, spool: object, queue_id: str, envelope: Envelope) -> None:
        self.spool = spool
        self.queue_id = queue_id
        self.path = spool.path("incoming", queue_id)
        self.is_open = False
        self.pending = bytearray()
        self.size = 0  # bytes written
        self.is_spare = False
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.pending += bytes(envelope)
            if len(self.pending) >= MAX_ENVELOPE:
                raise MailError("5.5.3", "Too many recipients for one message")
            self.is_spare = spool.take_spare(self.path)
            made = 0 if self.is_spare else os.O_CREAT | os.O_EXCL
            self.fd = os.open(self.path, flags | made, 0o600)
        except FileExistsError:
            raise
        except OSError as error:
            if self.is_spare:
                os.unlink(self.path)  # it has the text of another message
            raise storage_error(error) from None
        except ValueError as error:
            raise MailError("5.1.3", str(error)) from None
        self.is_open = True

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_open:
            self.discard()

    def write(self, data: bytes) -> None:
        """Adds message bytes (LF line ends). Raises MailError."""
        self.pending += data
        if len(self.pending) >= BLOCK:
            self.flush()

    def flush(self) -> None:
        """Hands what is pending to the system."""
        try:
            write_all(self.fd, self.pending)
        except OSError as error:
            raise storage_error(error) from None
        self.size += len(self.pending)
        self.pending.clear()

    def commit(self) -> str:
        """Makes the message durable and returns its id. Raises MailError."""
        failure = Draft.commit_together([self]).get(self)
        if failure:
            raise failure
        return self.queue_id  # From here on the mail is safe.

    @staticmethod
    def commit_together(drafts: list, sync: object = sync_files) -> dict:
        """Makes messages durable: draft -> what could not be done, or None.

        The order is the promise: write, fsync, rename, fsync of the directory.
        All are written before the first fsync, and share the last: a file
        system's journal then is written for them together. `sync(fds)` is
        sync_files(), or does the same.
        """
        failures = {draft: draft.attempt(Draft.complete) for draft in drafts}
        good = [draft for draft in drafts if not failures[draft]]
        errors = sync([draft.fd for draft in good])
        for draft in good:
            failures[draft] = draft.attempt(Draft.publish, errors.get(draft.fd))
        good = [draft for draft in good if not failures[draft]]
        try:
            if good:
                good[0].spool.sync()
        except OSError as error:
            failures.update(dict.fromkeys(good, storage_error(error)))
        for draft in drafts:
            # Before anyone hears of it: what is told 4xx is never delivered.
            draft.discard() if failures[draft] else draft.close()
        return failures

    def attempt(self, step: object, *args: object) -> MailError | None:
        """Does a step of the commit; why it could not be done."""
        try:
            step(self, *args)
        except MailError as error:
            return error
        except OSError as error:
            return storage_error(error)
        return None

    def complete(self) -> None:
        """Hands the last of it to the system. Raises MailError, OSError."""
        self.flush()
        if self.is_spare:
            os.ftruncate(self.fd, self.size)  # what is behind is another's
        if os.geteuid() == 0:
            os.fchown(self.fd, self.spool.uid, self.spool.gid)
        if self.due:
            os.utime(self.fd, (self.due, self.due))

    def publish(self, error: OSError | None) -> None:
        """Gives the file its name, unless its fsync failed. Raises OSError."""
        if error:
            raise error
        final = self.spool.path("queue", self.queue_id)
        os.rename(self.path, final)
        self.path = final

    def close(self) -> None:
        """Nothing more is to be done with it."""
        self.is_open = False
        close_quietly(self.fd)

    def discard(self) -> None:
        """Removes what was written; not at the first try, on a failing disk.

        An incoming file that stays is swept later; one that has its name
        already is spoilt, so that nobody takes it for mail.
        """
        self.is_open = False
        if not any(is_unlinked(self.path) for _ in range(3)):
            try:
                os.pwrite(self.fd, b"\0" * 16, 0)
            except OSError:
                pass  # nothing works any more
        close_quietly(self.fd)


def read_envelope(fd: int, size: int) -> bytes:
    """The first `size` bytes of a queue file, and more for a long envelope."""
    first = os.read(fd, size)
    if b"\n\n" in first:
        return first
    longer, end = bytearray(first), -1
    while end < 0 and len(longer) < MAX_ENVELOPE:
        more, start = os.read(fd, BLOCK), max(0, len(longer) - 1)
        if not more:
            break
        longer += more
        end = longer.find(b"\n\n", start)
    return bytes(longer)


class QueueFile:
    """A message in the queue, open for reading. Raises ValueError, OSError."""

    def __init__(self, queue_id: str, fd: int) -> None:
        self.queue_id = queue_id
        self.fd = fd
        self.seen = os.fstat(fd)
        self.first = read_envelope(fd, min(self.seen.st_size, BLOCK >> 2))
        self.envelope = Envelope.parse(self.first)
        self.start = self.first.index(b"\n\n") + 2
        self.size = self.seen.st_size - self.start

    def __enter__(self) -> QueueFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def header(self) -> Header:
        """The message's header, as far as it is searched."""
        return Header.parse(take_head(self.chunks()))

    def chunks(self) -> object:
        """The message in blocks of bytes, LF line ends."""
        yield self.first[self.start :]
        place = len(self.first)
        while True:
            block = os.pread(self.fd, BLOCK, place)
            if not block:
                return
            place += len(block)
            yield block


# (action, where a message is) that do not go together -> why.
OUT_OF_PLACE = {
    ("hold", "hold"): "it is on hold already",
    ("release", "queue"): "it is not on hold",
    ("run", "hold"): "it is on hold: release it first",
}


class Maildrop:
    """Where a user without rights leaves mail while no daemon is up.

    Write-only and sticky: files are made under a dot name, and renamed when
    they are complete. The runner trusts nothing in them but the owner.
    """

    def __init__(self, directory: str) -> None:
        self.directory = f"{directory}/maildrop"

    def sync(self) -> None:
        """Makes a new name durable; nobody may open the directory to fsync."""
        os.sync()

    def take_spare(self, path: str) -> bool:
        """There are none here."""
        return False

    def path(self, folder: str, name: str = "") -> str:
        """incoming/ID is a dot name, queue/ID the name without the dot."""
        if not name:
            return self.directory
        return f"{self.directory}/{'.' if folder == 'incoming' else ''}{name}"

    def create(self, envelope: Envelope) -> Draft:
        """A draft in the maildrop. Raises MailError."""
        name = new_id(time.time(), int.from_bytes(os.urandom(2), "big"))
        try:
            return Draft(self, name, envelope)
        except FileExistsError as error:
            raise storage_error(error) from None

    def names(self) -> list[str]:
        """What is complete there; [] where one may not look."""
        try:
            found = sorted(filter(is_id, os.listdir(self.directory)))
        except OSError:
            return []
        return [name for name in found if len(name) == 10]  # no report's id

    def entries(self) -> object:
        """Each drop that may be read as a QueueEntry."""
        for name in self.names():
            try:
                uid, file = self.take(name, MAX_DROP)
                with file:
                    entry = QueueEntry(name, file.size, file.envelope)
            except (OSError, ValueError):
                continue  # whatever a user wrote there
            # Only its owner is believed, not what it says.
            entry.envelope.arrived = entry.due = file.seen.st_mtime
            entry.envelope.origin, entry.state = f"uid {uid}", "maildrop"
            yield entry

    def free(self) -> int:
        """Not known; a full disk shows in writing."""
        return sys.maxsize

    def take(self, name: str, limit: int) -> tuple[int, QueueFile]:
        """(its owner's uid, the file) of one drop. Raises ValueError, OSError.

        Hostile until shown otherwise: no link, no device, one name, complete.
        """
        fd = os.open(f"{self.directory}/{name}", QUEUE_FILE)
        seen = os.fstat(fd)
        regular = stat.S_ISREG(seen.st_mode)
        try:
            if not regular or seen.st_nlink != 1 or seen.st_size > limit:
                raise ValueError("not a regular file of one name and a sane size")
            return seen.st_uid, QueueFile(name, fd)
        except (OSError, ValueError):
            os.close(fd)
            raise


class RollingFile:
    """Text that grows in trace/: two files, the older one thrown away."""

    def __init__(self, spool: object, name: str, older: str) -> None:
        self.spool = spool
        self.now = spool.path("trace", name)
        self.before = spool.path("trace", older)
        self.fd = -1
        self.opened: tuple[int, int] | None = None

    def append(self, text: str) -> None:
        """Adds text; what cannot be written is lost."""
        try:
            self.open()
            os.write(self.fd, os_bytes(text))
        except OSError:
            self.opened = None  # the disk is full: the mail matters more

    def open(self) -> None:
        """Opens the younger file; makes it the older one when it is full."""
        try:
            seen = os.stat(self.now)
            if seen.st_size > MAX_HISTORY:
                os.rename(self.now, self.before)
            elif (seen.st_dev, seen.st_ino) == self.opened:
                return
        except FileNotFoundError:
            pass
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(self.now, flags | os.O_NONBLOCK, 0o600)
        seen = os.fstat(self.fd)
        if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
            raise OSError(22, "not a regular file of one name", self.now)
        if os.geteuid() == 0 and not seen.st_size:
            os.fchown(self.fd, self.spool.uid, self.spool.gid)
        self.opened = seen.st_dev, seen.st_ino

    def texts(self) -> list[str]:
        """The older text and the younger one."""
        found = []
        for path in (self.before, self.now):
            try:
                fd = os.open(path, QUEUE_FILE)
            except OSError:
                continue
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    found.append(os_text(os.read(fd, 2 * MAX_HISTORY)))
            finally:
                os.close(fd)
        return found


class Overview:
    """What mailq shows of messages that wait, a line each.

    True as long as a message's file has the time that its line names: who
    changes anything changes that. To open each and its journal instead takes
    mailq twice as long (0.2 s for 10,000).
    """

    def __init__(self, spool: object) -> None:
        self.file = RollingFile(spool, "overview", "overview.before")

    def add(self, entry: QueueEntry) -> None:
        """Notes a message that waits from now on."""
        self.file.append(f"\n{entry.line()}")  # a torn line ends here

    def lines(self) -> dict[str, str]:
        """Id -> the last line about it."""
        texts = self.file.texts()
        return {line[: line.find("\t")]: line for t in texts for line in t.split("\n")}


class Spool:
    """The queue directory. `uid` and `gid` are mail_owner's.

    create() and Draft.commit() take a message in; ids(), open(), journal()
    and entries() look at it; note(), wait_until(), remove() and set_aside()
    are the runner's.
    """

    def __init__(self, directory: str, owner: User) -> None:
        self.directory = directory
        self.uid, self.gid = owner.uid, owner.gid
        self.safe: set[str] = set()  # spare files that may be written over
        self.keeps_spares = False
        self.spare_room = 0  # how many more are kept
        self.has_retired = False
        self.overview = Overview(self)

    def path(self, folder: str, name: str = "") -> str:
        """The path of a folder in it, or of something there."""
        return f"{self.directory}/{folder}{name and '/'}{name}"

    def make(self) -> None:
        """Makes the directories with their modes. Raises ProgramError."""
        mask = os.umask(0o022)  # whoever may submit must be able to pass
        try:
            os.makedirs(self.directory, exist_ok=True)
            for name, mode in FOLDERS:
                self.make_folder(self.path(name), mode)
        except OSError as error:
            why = f"{error.filename}: {error.strerror}: the queue cannot be made there"
            raise ProgramError(EX_CANTCREAT, why) from None
        finally:
            os.umask(mask)

    def make_folder(self, path: str, mode: int) -> None:
        """Makes one directory, or mends the mode of the one that is there."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        seen = os.lstat(path)
        if os.path.islink(path) or not os.path.isdir(path):
            raise NotADirectoryError(20, "not a directory", path)
        if os.geteuid() == 0:
            uid = 0 if mode & 0o1000 else self.uid
            if (seen.st_uid, seen.st_gid) != (uid, self.gid if uid else 0):
                if uid not in (0, seen.st_uid):
                    self.hand_over(path, seen.st_uid)
                os.chown(path, uid, self.gid if uid else 0)
        if seen.st_mode & 0o7777 != mode:
            os.chmod(path, mode)

    def hand_over(self, folder: str, before: int) -> None:
        """Gives files of one mail_owner to the next, when that has changed.

        Only plain files of one name that are that owner's: it may have put
        other things there.
        """
        for entry in os.scandir(folder):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                fd = os.open(entry.path, flags)
            except OSError:
                continue
            seen = os.fstat(fd)
            is_plain = stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1
            if is_plain and seen.st_uid == before:
                os.fchown(fd, self.uid, self.gid)
            os.close(fd)

    def sync(self) -> None:
        """Makes a new name in queue/ durable, and that others are gone.

        Only then is a spare file safe to be written over: a power cut must
        not bring back its old name, with the text of another's message.
        """
        found = [] if len(self.safe) > CREW else self.spares()
        sync_folder(self.path("queue"))
        self.safe.update(found)

    def spares(self) -> list[str]:
        """The files that messages which are done with have left."""
        try:
            return os.listdir(self.path("spare"))
        except OSError:
            return []  # there is no such directory yet

    def take_spare(self, path: str) -> bool:
        """Gives a spare file the name `path`; False if there is none.

        To make a file costs 0.05 ms, on ext4 up to 0.8 where thousands were
        removed a minute ago (its inodes are looked through), to remove it 0.1;
        to rename one 0.02. Raises FileExistsError.
        """
        while self.safe:
            spare = self.path("spare", self.safe.pop())
            try:
                os.link(spare, path)
                os.unlink(spare)
            except FileNotFoundError:
                continue  # somebody else took it
            return True
        return False

    def retire(self, queue_id: str) -> None:
        """Takes a file that is done with out of queue/."""
        path = self.path("queue", queue_id)
        if self.keeps_spares and self.spare_room <= 0:
            self.spare_room = SPARES - len(self.spares())
        self.spare_room -= 1
        seen = os.stat(path)
        is_plain = seen.st_size <= SPARE_SIZE and not is_given_up(seen)
        if self.spare_room >= 0 and is_plain:
            os.rename(path, self.path("spare", queue_id))
            self.has_retired = True
        else:
            os.unlink(path)

    def drop_spares(self) -> None:
        """Removes spare files, unless there was use for them just now."""
        was_used, self.has_retired = self.has_retired, False
        if not was_used:
            self.spare_room = 0
            for name in self.spares():
                try:
                    os.unlink(self.path("spare", name))
                except OSError:
                    continue  # it was taken meanwhile

    def create(self, envelope: Envelope, queue_id: str = "") -> Draft:
        """A draft for a new message. Raises MailError."""
        for _ in range(1000):
            # The id is ours as long as incoming/ID is: nobody else can rename
            # to queue/ID meanwhile. A clock set back finds its old ids taken.
            name = queue_id or new_id(time.time(), int.from_bytes(os.urandom(2), "big"))
            try:
                draft = Draft(self, name, envelope)
            except FileExistsError:
                if queue_id:
                    self.sweep_draft(name)
                continue
            if not self.has(name):
                return draft
            draft.discard()
        raise MailError("4.3.0", "Cannot store the message: no queue id is free")

    def sweep_draft(self, name: str) -> None:
        """Removes a draft that a crash left behind."""
        try:
            os.unlink(self.path("incoming", name))
        except OSError:
            pass

    def ids(self, folder: str = "queue") -> list[str]:
        """The ids of all messages, oldest first."""
        return sorted(name for name in os.listdir(self.path(folder)) if is_id(name))

    def open(self, queue_id: str, folder: str = "queue") -> QueueFile:
        """Opens a message. Raises FileNotFoundError, ValueError (is none)."""
        fd = os.open(self.path(folder, queue_id), QUEUE_FILE)
        try:
            return QueueFile(queue_id, fd)
        except (OSError, ValueError):
            os.close(fd)
            raise

    def find(self, queue_id: str) -> QueueFile:
        """Opens a message, on hold or not; raises as open() does."""
        return self.open(queue_id, self.folder_of(queue_id))

    def folder_of(self, queue_id: str) -> str:
        """Where a message is, if it is anywhere: "queue" or "hold"."""
        return "queue" if self.has(queue_id) else "hold"

    def has(self, queue_id: str) -> bool:
        """Whether there is such a message, not on hold."""
        return os.path.exists(self.path("queue", queue_id))

    def due(self, queue_id: str) -> float:
        """When its next attempt is: the mtime. Raises FileNotFoundError."""
        return os.stat(self.path("queue", queue_id)).st_mtime

    def wait_until(self, queue_id: str, when: float) -> None:
        """Sets its next attempt."""
        try:
            os.utime(self.path("queue", queue_id), (when, when))
        except OSError:
            pass  # then it is tried sooner: nothing is lost

    def defer(self, file: QueueFile, when: float) -> None:
        """Sets the next attempt at a message that waits from now on.

        Its file is not opened anew: to close that were to end the lock on it.
        """
        self.wait_until(file.queue_id, when)
        entry = QueueEntry(file.queue_id, file.size, file.envelope)
        try:
            entry.due = self.due(file.queue_id)
            entry.note(*progress(self.journal(file.queue_id)))
        except OSError:
            return  # then mailq opens it
        self.overview.add(entry)

    def journal(self, queue_id: str) -> list[Attempt]:
        """What happened to it so far."""
        try:
            fd = os.open(self.path("journal", queue_id), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            text = os.read(fd, JOURNAL_PIECE)
            if len(text) == JOURNAL_PIECE:
                text += b"".join(iter(lambda: os.read(fd, BLOCK), b""))
        finally:
            os.close(fd)
        return parse_journal(text)

    def note(self, queue_id: str, attempts: list[Attempt]) -> None:
        """Appends to the journal; durably, where to repeat were to double."""
        path = self.path("journal", queue_id)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if os.geteuid() == 0 and size == 0:
                os.fchown(fd, self.uid, self.gid)
            torn = size and os.pread(fd, 1, size - 1) != b"\n"
            # What is still to do first: torn in the middle, the journal must
            # not call a recipient done that is not.
            lines = b"".join(map(bytes, sorted(attempts, key=lambda a: a.is_final)))
            try:
                write_all(fd, b"\n" + lines if torn else lines)
            except OSError:
                os.ftruncate(fd, size)
                raise
            if any(attempt.is_final for attempt in attempts):
                os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, queue_id: str) -> None:
        """Removes a message that is done with: the message first."""
        self.retire(queue_id)
        self.forget(queue_id)

    def set_aside(self, queue_id: str) -> str:
        """Moves a file that is no message, or nobody wants, to corrupt/."""
        path = self.path("corrupt", queue_id)
        os.rename(self.path("queue", queue_id), path)
        return path

    def sweep(self, now: float) -> None:
        """Removes old drafts, and journals whose message is gone."""
        for name in os.listdir(self.path("incoming")):
            try:
                if os.stat(self.path("incoming", name)).st_mtime < now - OLD_DRAFT:
                    os.unlink(self.path("incoming", name))
            except OSError:
                continue
        folders = ("queue", "hold", "corrupt")
        alive = {name for folder in folders for name in os.listdir(self.path(folder))}
        for name in os.listdir(self.path("journal")):
            if name not in alive:
                try:
                    os.unlink(self.path("journal", name))
                except OSError:
                    continue

    def act(self, action: str, queue_id: str) -> None:
        """What a queue command wants of one message, see ACTIONS.

        Raises MailError if it is being delivered, FileNotFoundError if it is
        not there. A lock on its file keeps the runner from taking it up.
        """
        folder = self.folder_of(queue_id)
        path, kept = self.path(folder, queue_id), self.path("hold", queue_id)
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if action != "run" and not lock_file(fd, True):
                raise MailError("4.2.0", "it is being delivered: try again")
            if os.fstat(fd).st_ino != os.stat(path).st_ino:
                raise FileNotFoundError(2, "it is delivered", path)
            if (action, folder) in OUT_OF_PLACE:
                raise MailError("5.5.1", OUT_OF_PLACE[action, folder])
            if action == "remove":
                os.unlink(path)
                self.forget(queue_id)
            elif action == "hold":
                os.rename(path, kept)
                sync_folder(self.path("hold"))
                sync_folder(self.path("queue"))
            else:
                if action in ("bounce", "expire"):
                    os.fchmod(fd, 0o700)
                os.utime(fd)
                if folder == "hold" and action not in ("run", "expire"):
                    os.rename(kept, self.path("queue", queue_id))
        finally:
            os.close(fd)

    def forget(self, queue_id: str) -> None:
        """Removes the journal of a message that is gone."""
        try:
            os.unlink(self.path("journal", queue_id))
        except FileNotFoundError:
            pass

    def free(self) -> int:
        """Bytes that are free on its disk."""
        try:
            seen = os.statvfs(self.directory)
        except OSError:
            return 0
        return seen.f_bavail * seen.f_frsize

    def entries(self, known: dict[str, str] | None = None) -> object:
        """Every message as a QueueEntry: Postfix's order, then oldest first.

        What users left in the maildrop, as far as it may be read; what was
        not tried yet; what is deferred; what is on hold. With `known`, the
        overview's lines, twice as fast, but that takes memory.
        """
        yield from Maildrop(self.directory).entries()
        for place in self.places():
            entry = self.entry(place, known or {})
            if entry:
                yield entry

    def told(self, tell: object) -> object:
        """tell(entry) of each of entries(), but None: halved()."""
        known = self.overview.lines()

        def told_of(place: tuple[str, str, bool]) -> object:
            entry = self.entry(place, known)
            return entry and tell(entry)

        yield from filter(None, map(tell, Maildrop(self.directory).entries()))
        yield from filter(None, halved(told_of, self.places()))

    def places(self) -> list[tuple[str, str, bool]]:
        """(its folder, its id, whether it was tried) of each message."""
        tried = set(os.listdir(self.path("journal")))
        ids = self.ids()
        places = [("queue", name, False) for name in ids if name not in tried]
        places += [("queue", name, True) for name in ids if name in tried]
        return places + [("hold", name, name in tried) for name in self.ids("hold")]

    def entry(
        self, place: tuple[str, str, bool], known: dict[str, str]
    ) -> QueueEntry | None:
        """The message at one of places(); None if there is none any more.

        `known` is what the overview has, id -> line.
        """
        folder, queue_id, was_tried = place
        path = self.path(folder, queue_id)
        try:
            entry = None
            if queue_id in known:
                seen = os.lstat(path)
                entry = QueueEntry.recall(known[queue_id], seen.st_mtime)
            if not entry:
                entry, seen = self.read_entry(path, queue_id)
                if was_tried:
                    entry.note(*progress(self.journal(queue_id)))
        except (OSError, ValueError):
            return None  # delivered meanwhile, or set aside at the next attempt
        entry.due, entry.is_given_up = seen.st_mtime, is_given_up(seen)
        if folder == "hold":
            entry.state = folder
        return entry

    def read_entry(self, path: str, queue_id: str) -> tuple:
        """(QueueEntry, stat_result) of a message's file. Raises as open()."""
        fd = os.open(path, QUEUE_FILE)
        try:
            seen, first = os.fstat(fd), read_envelope(fd, ENVELOPE_PIECE)
        finally:
            os.close(fd)
        size = seen.st_size - first.find(b"\n\n") - 2
        return QueueEntry(queue_id, size, Envelope.parse(first)), seen


def tabbed(line: str) -> str:
    """A line that ends no other, its tabs kept."""
    return "\t".join(printable(word) for word in line.split("\t"))


def record_text(queue_id: str, kind: str, lines: list[str]) -> str:
    """A record: a line `ID kind`, then lines that begin with a tab."""
    return f"{queue_id} {kind}\n" + "".join(f"\t{tabbed(line)}\n" for line in lines)


class History:
    """What happened to messages lately, for `trace`; no mail depends on it.

    A record is a line `ID kind`, then lines that begin with a tab.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.file = RollingFile(spool, "now", "before")

    def add(self, queue_id: str, kind: str, lines: list[str]) -> None:
        """Appends a record; what cannot be written is not told."""
        text = record_text(queue_id, kind, lines)
        if len(text) > MAX_RECORD:
            text = text[: text.rindex("\n", 0, MAX_RECORD) + 1]
        self.file.append(text)

    def find(self, queue_id: str) -> list[tuple[str, list[str]]]:
        """(kind, lines) of each record of a message, oldest first."""
        found = []
        for text in self.file.texts():
            text = f"\n{text}"
            place = text.find(f"\n{queue_id} ")
            while place >= 0:
                end = text.find("\n", place + 1)
                while text[end + 1 : end + 2] == "\t":
                    end = text.find("\n", end + 1)
                head, *rows = text[place + 1 : end].split("\n\t")
                found.append((head.partition(" ")[2], rows))
                place = text.find(f"\n{queue_id} ", end)
        return found

    def trace(self, key: str, uid: int) -> Trace | None:
        """What is known of a message: by id, Message-ID, or `last`.

        Of a user (uid not 0) only what that user sent.
        """
        done = {} if is_id(key) else dict(self.done())
        for queue_id in self.search(key, done):
            if uid and self.origin(queue_id, done) != f"uid {uid}":
                continue
            trace = Trace(queue_id, self.records(queue_id))
            if trace.rows:
                return trace
        return None

    def origin(self, queue_id: str, past: dict[str, list[str]]) -> str:
        """Where a message came from, "" if that is not known."""
        try:
            with self.spool.find(queue_id) as file:
                return file.envelope.origin
        except (OSError, ValueError):
            pass  # it is gone, but what happened is kept
        rows = past.get(queue_id) or Trace(queue_id, self.find(queue_id)).rows
        found = (row[8:] for row in rows if row.startswith("origin: "))
        return next(found, "")

    def records(self, queue_id: str) -> list[tuple[str, list[str]]]:
        """All that is known of one id: the queue first, then the past."""
        try:
            folder = self.spool.folder_of(queue_id)
            with self.spool.open(queue_id, folder) as file:
                ids = file.header().values("message-id")
                journal = self.spool.journal(queue_id)
                first = ids[0] if ids else ""
                rows = message_rows(file.envelope, file.size, first, journal)
                due = os.fstat(file.fd).st_mtime
        except (OSError, ValueError):
            return self.find(queue_id)
        return [(folder, [*rows, f"next: {due}"]), *self.find(queue_id)]

    def search(self, key: str, past: dict[str, list[str]]) -> object:
        """The ids that a key may mean, newest first; `past` is done()."""
        if is_id(key):
            yield key
            return
        wanted = "" if key == "last" else f"message-id: <{key.strip('<>')}>"
        queued = {*self.spool.ids(), *self.spool.ids("hold")}
        done = {name: key == "last" or wanted in rows for name, rows in past.items()}
        for name in sorted({*queued, *done}, reverse=True):
            is_it = done.get(name, False)
            if key == "last":
                is_it = not parent_id(name)  # a report is not what is meant
            elif not is_it and name in queued:
                is_it = self.has_message_id(name, key)
            if is_it:
                yield name

    def has_message_id(self, queue_id: str, key: str) -> bool:
        """Whether a message in the queue has that Message-ID."""
        try:
            with self.spool.find(queue_id) as file:
                ids = file.header().values("message-id")
        except (OSError, ValueError):
            return False
        return ids[:1] == [f"<{key.strip('<>')}>"]

    def done(self) -> object:
        """(id, lines) of messages that are done with."""
        for text in self.file.texts():
            for block in text.replace("\n\t", "\0").split("\n"):
                head, *rows = block.split("\0")
                name, _, kind = head.partition(" ")
                if kind == "message":
                    yield name, rows


# == 18 Alias database: AliasDatabase, AliasMaps, TargetFiles =================
# The aliases files, the dbm databases that newaliases makes of them, and what
# they and users refer to: :include: lists and ~/.forward.
# Failures: MailError 4.3.0 when something cannot be read, 4.3.5 when it must
# not be trusted; ProgramError for a database that cannot be built: then the
# old one stays as it was.


# What dbm.open() may make a database with, in the order in which it tries, and
# what that imports when it opens one.
DBM_MODULES = {
    "dbm.sqlite3": "urllib.parse",
    "dbm.gnu": "",
    "dbm.ndbm": "",
    "dbm.dumb": "encodings.latin_1",
}


def preload_databases(paths: list[str]) -> None:
    """Imports what reads the aliases' databases as they are, and new ones."""
    import dbm

    kinds = [dbm.whichdb(f"{path}.db") for path in paths]
    for name, more in DBM_MODULES.items():
        is_new = not any(known in sys.modules for known in DBM_MODULES)
        if is_new or name in kinds or name == "dbm.ndbm":
            preload(name, *filter(None, [more]))


def signature(paths: list[str]) -> tuple:
    """What changes when one of the files is written or replaced."""
    found = []
    for path in paths:
        try:
            seen = os.stat(path)
            found.append((seen.st_ino, seen.st_mtime_ns, seen.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


class AliasDatabase:
    """`/etc/aliases` and what dbm makes for the name `/etc/aliases.db`.

    Where there is a database it rules, also when the text is newer (then the
    log says so); where there is none, or none that this Python can read, the
    text is used. lookup(), where() and rebuild() are all there is to it.
    """

    # What the backends make of a name. dbm.dumb writes three files: its .dir
    # is what makes it visible, so it is taken away first and put back last.
    ENDINGS = (".dir", ".dat", ".bak", ".pag", ".db", "")
    LEFTOVERS = ("-wal", "-shm")  # of SQLite; readers make them, so they tell nothing
    MAX_KNOWN = 10_000  # names remembered between two changes of the files

    def __init__(self, path: str, warn: object = None) -> None:
        self.path = path
        self.name = f"{path}.db"
        self.files = [path, *(self.name + ending for ending in self.ENDINGS)]
        self.warn = warn or (lambda text: None)
        self.watched: list[str] = []  # what a change of any of them shows in
        self.seen: tuple | None = None
        self.handle: object = None  # the open database
        self.has_database = False
        self.known: dict[str, str | None] = {}
        self.text: AliasTable | None = None
        self.problem = ""  # why the database may not say what the text does

    def lookup(self, names: list[str]) -> tuple[str, str] | None:
        """(name, its targets as text) of the first of these aliases, or None.

        Names are in lower case. What it knows is as old as the last renew().
        """
        if self.seen is None:
            self.renew()
        for name in names:
            value = self.known[name] if name in self.known else self.learn(name)
            if value is not None:
                return name, value
        return None

    def renew(self) -> None:
        """Looks whether the files have changed since."""
        if self.seen is None or signature(self.watched) != self.seen:
            self.refresh()

    def learn(self, name: str) -> str | None:
        """Reads one name, and remembers it. Raises MailError."""
        for _ in range(5):
            was_open = self.handle is not None and not self.is_by_name
            value = self.fetch(name)
            # Not replaced meanwhile; what is open is the old one, and whole.
            if was_open or signature(self.watched) == self.seen:
                if len(self.known) < self.MAX_KNOWN:
                    self.known[name] = value
                return value
            self.refresh()
        raise MailError("4.3.0", f"{self.path}: alias database keeps changing")

    @property
    def is_shared(self) -> bool:
        """Whether others than root and ourselves may write any of the files.

        Or may put others in their place. What stands there is then a name: no
        command, no file, no list.
        """
        ways = (os.path.abspath(self.path), os.path.realpath(self.path))
        folders = {os.path.dirname(way) for way in ways}
        for path in (*folders, *self.files):
            try:
                seen = os.stat(path)
            except OSError:
                continue
            is_open = seen.st_mode & 0o022
            if path in folders and seen.st_mode & stat.S_ISVTX:
                is_open = 0  # only its owner replaces a file there
            if is_open or seen.st_uid not in (0, os.geteuid()):
                return True
        return False

    @property
    def is_by_name(self) -> bool:
        """Whether its backend opens files anew for each value: dbm.dumb."""
        return type(self.handle).__module__ == "dbm.dumb"

    def refresh(self) -> None:
        """Forgets what was known: the files have changed."""
        self.close()
        self.known = {}
        self.text = None
        self.problem = ""
        there = [path for path in self.files if os.path.exists(path)]
        # A file that comes shows in its directory.
        self.watched = [os.path.dirname(self.path) or ".", *there]
        self.seen = signature(self.watched)
        seen = dict(zip(self.watched, self.seen))
        text = seen.pop(self.path, None)
        times = [entry[1] for path, entry in seen.items() if entry and path in there]
        self.has_database = bool(times)
        if text and times and max(times) < text[1]:
            self.note(
                f"database {self.name} is older than source file {self.path}; "
                "run newaliases"
            )

    def note(self, problem: str) -> None:
        """Something that an administrator should mend."""
        self.problem = problem
        self.warn(problem)

    def fetch(self, name: str) -> str | None:
        """Reads one name from the database, else from the text."""
        if self.text is None and self.has_database:
            try:
                return self.fetch_from_database(name)
            except Exception as error:  # noqa: BLE001 each backend has its own
                self.close()
                why = f"{self.name} cannot be read ({printable(str(error), 100)})"
                self.note(why)
                if not os.path.exists(self.path):  # and the text cannot stand in
                    raise MailError("4.3.0", f"alias database: {why}") from None
        if self.text is None:
            table = self.read_text()
            for line, reason in table.problems:
                self.warn(f"{self.path}, line {line}: {reason}")
            self.text = table
        return self.text.value(name)

    def fetch_from_database(self, name: str) -> str | None:
        """One name from the database; keys may carry a NUL (Postfix's do)."""
        key = os_bytes(name)
        if self.handle is None:
            self.handle = self.open()
        for spelling in (key, key + b"\0"):
            if spelling in self.handle:
                return os_text(self.handle[spelling].rstrip(b"\0"))
        return None

    def close(self) -> None:
        """Closes the database, if it is open."""
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.close()

    def open(self) -> object:
        """The database for reading, also one of Postfix's or sendmail's.

        They write Berkeley DB to /etc/aliases.db: so does dbm.ndbm on Debian,
        which is told the name without its ending.
        """
        import dbm  # 3 ms and more; only a look-up needs it

        if dbm.whichdb(self.name) == "":
            import dbm.ndbm

            return dbm.ndbm.open(self.path, "r")
        return dbm.open(self.name, "r")

    def source(self) -> str:
        """The text file's text. Raises OSError."""
        with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().removeprefix("\ufeff")  # Windows editors put it there

    def read_text(self) -> AliasTable:
        """The text file's aliases. Raises MailError."""
        try:
            return AliasTable.parse(self.source())
        except FileNotFoundError:
            return AliasTable()
        except OSError as error:
            raise MailError(
                "4.3.0", f"alias database unavailable: {self.path}: {error.strerror}"
            ) from None

    def where(self, name: str) -> str:
        """Where an alias is written: file and line, else the database."""
        try:
            line = self.text.entries[name][0] if self.text else self.line_of(name)
        except (OSError, LookupError):
            return self.name
        return f"{self.path}:{line}"

    def line_of(self, name: str) -> int:
        """The line of an alias in the text. Raises LookupError, OSError."""
        for line, entry in alias_lines(self.source()):
            # Only where it may be a closer look is worth its time.
            if name in entry.lower() and name in AliasTable.parse(entry).entries:
                return line
        raise LookupError(name)

    def rebuild(self, check: object = lambda table: table.warnings) -> AliasReport:
        """Builds the database from the text, in one atomic step.

        `check(table)` is a list of (line, reason) to warn of. Raises
        ProgramError. When the text has problems, the database stays.
        """
        try:
            text = self.source()
        except OSError as error:
            raise ProgramError(
                EX_NOINPUT, f"{self.path}: {error.strerror}: make it a text file"
            ) from None
        # A child reads and checks the text while the database is written.
        try:
            return self.replace(ahead(AliasTable().told(text, check)))
        except OSError as error:
            table = AliasTable.parse(text)
            if table.problems:  # they come first, written or not
                return AliasReport(table.problems, check(table))
            why = f"{error.strerror or error}: the database is as it was"
            raise ProgramError(EX_CANTCREAT, f"{self.name}: {why}") from None

    def replace(self, told: object) -> AliasReport:
        """Builds beside the database and moves that into its place.

        Of what AliasTable.told() tells; not if that ends in problems.
        """
        import dbm
        import tempfile

        folder, base = os.path.split(os.path.abspath(self.name))
        self.sweep(folder, f".{base}.")
        with tempfile.TemporaryDirectory(prefix=f".{base}.", dir=folder) as aside:
            with dbm.open(f"{aside}/{base}", "n") as database:
                for name, value in told:
                    if name:
                        database[name] = value
            report = AliasReport(*value)
            if report.problems:
                return report
            self.end_journal(f"{aside}/{base}")
            built = sorted(os.listdir(aside))
            for name in built:
                os.chmod(f"{aside}/{name}", 0o644)
                self.sync_file(f"{aside}/{name}")
            self.move(aside, folder, base, built)
        sync_folder(folder)
        return report

    def sweep(self, folder: str, prefix: str) -> None:
        """Removes what builds that were killed have left."""
        import shutil

        for entry in os.scandir(folder):
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                seen = entry.stat(follow_symlinks=False)
                if seen.st_mtime < time.time() - OLD_DRAFT:
                    shutil.rmtree(entry.path, ignore_errors=True)

    def end_journal(self, path: str) -> None:
        """Makes an SQLite database one file, which anybody may read.

        dbm.sqlite3 leaves it in a mode whose readers have to write beside it.
        """
        import dbm

        if dbm.whichdb(path) == "dbm.sqlite3":
            import sqlite3

            connection = sqlite3.connect(path)
            connection.execute("PRAGMA journal_mode = delete")
            connection.close()

    def move(self, aside: str, folder: str, base: str, built: list[str]) -> None:
        """Puts the built files in place; what makes it visible comes last."""
        endings = (*self.ENDINGS, *self.LEFTOVERS)
        stale = [base + e for e in endings if base + e not in built]
        visible = [name for name in built if name.endswith(".dir")]
        for name in [*stale, *(visible if len(built) > 1 else [])]:
            if os.path.lexists(f"{folder}/{name}"):
                os.unlink(f"{folder}/{name}")
        for name in [n for n in built if n not in visible] + visible:
            os.rename(f"{aside}/{name}", f"{folder}/{name}")

    def sync_file(self, path: str) -> None:
        """fsync of a file that somebody else's code wrote."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class AliasMaps:
    """Several aliases files: of a name the first file that has it counts."""

    def __init__(self, databases: list[AliasDatabase]) -> None:
        self.databases = databases

    def renew(self) -> None:
        """Looks whether the files have changed since the last time."""
        for database in self.databases:
            database.renew()

    def lookup(self, names: list[str]) -> tuple[str, str, AliasDatabase] | None:
        """(name, its targets as text, whose it is) of the first of the names.

        Raises MailError.
        """
        groups = [names] if len(self.databases) == 1 else [[name] for name in names]
        for group in groups:
            for database in self.databases:
                found = database.lookup(group)
                if found:
                    return (*found, database)
        return None

    def names(self) -> object:
        """The names in the files' texts, for a suggestion."""
        for database in self.databases:
            try:
                yield from (database.text or database.read_text()).entries
            except MailError:
                continue


def alias_maps(settings: Settings, warn: object = None) -> AliasMaps:
    """The aliases of a host, as the settings name them."""
    return AliasMaps(
        [AliasDatabase(path, warn) for path in settings.map_paths("alias_maps")]
    )


class ListFile(Value):
    """What was read: its text, whose it is, whether others may write it.

    `identity` is the same for the same file, whatever path leads there.
    """

    __slots__ = ("text", "owner", "is_shared", "identity")

    def __init__(self, text: str, owner: User, is_shared: bool, identity: tuple = ()):
        self.text = text
        self.owner = owner
        self.is_shared = is_shared
        self.identity = identity


# Homes of users that have none; no .forward is waited for there.
NO_HOMES = ("", "/", "/nonexistent", "/var/empty", "/dev/null", "/proc")
FIRST_PERSON = 1000  # uid; those below are the system's, many without a home
FILTERS = ("# exim filter", "# sieve filter", "#exim filter", "#sieve filter")


class TargetFiles:
    """Reads ~/.forward and :include: files, each with its owner's rights.

    Never follows a link or waits for a FIFO; what others could have written is
    not believed.
    """

    MAX_FORWARD = 1 << 16  # bytes
    MAX_INCLUDE = 1 << 24  # bytes; a list of 10,000 members has 300 kB
    USER_INCLUDE = 1 << 20  # bytes of one that a .forward names

    def __init__(self, users: Users) -> None:
        self.users = users

    def forward(self, user: User, detail: str) -> tuple[str, str, list[str]]:
        """(path, text, what is ignored and why) of a user's .forward file.

        ~/.forward+detail before ~/.forward; path and text are "" without one.
        Raises MailError when the home is not there yet.
        """
        names = [".forward"]
        if len(detail) > 1 and "/" not in detail and detail.isprintable():
            names.insert(0, f".forward{detail}")
        ignored = []
        with Rights(user) as rights:
            owners = (rights.owner, user.uid, 0)
            if not self.has_home(user):
                return "", "", []
            for name in names:
                path = f"{user.home}/{name}"
                text, why = self.read_forward(path, user.home, owners)
                if why:
                    ignored.append(f"{path}{why}")
                elif text is not None:
                    return path, text, ignored
        return "", "", ignored

    def has_home(self, user: User) -> bool:
        """Whether a user has a home. Raises MailError for one that may come.

        A home that is not mounted yet may hold a .forward. Sticky means that
        its owner is at work on it, says qmail.
        """
        try:
            seen = os.stat(user.home or "/nonexistent")
        except OSError as error:
            if user.home in NO_HOMES or 0 < user.uid < FIRST_PERSON:
                return False
            if isinstance(error, PermissionError):
                return True
            why = f"home {user.home} of {user.name} is not there: {error.strerror}"
            raise MailError("4.3.0", why) from None
        if seen.st_mode & stat.S_ISVTX and seen.st_uid == user.uid != 0:
            why = f"home {user.home} is sticky: its owner is at work on it"
            raise MailError("4.3.0", why)
        return True

    def read_forward(self, path: str, home: str, owners: tuple) -> tuple:
        """(text or None, why it is ignored or "")."""
        try:
            fd = self.open(path)
        except (FileNotFoundError, NotADirectoryError):
            return None, ""
        except OSError as error:
            return None, self.unreadable(path, error)
        try:
            seen = os.fstat(fd)
            why = self.problem(seen, owners, self.MAX_FORWARD) or self.home_problem(
                os.stat(home), owners
            )
            text = "" if why else os_text(self.read_all(fd))
        except OSError as error:
            return None, self.unreadable(path, error)
        finally:
            os.close(fd)
        if text[:20].lower().startswith(FILTERS):
            why = "is a filter, which minimta does not run"
        return text, f" {why}" if why else ""

    def unreadable(self, path: str, error: OSError) -> str:
        """Why a file is not read. Raises MailError for what may pass."""
        if is_passing(error):
            raise MailError("4.3.0", f"{path}: {error.strerror}")
        return " is a symbolic link" if os.path.islink(path) else f": {error.strerror}"

    def include(self, path: str, reader: User | None) -> ListFile:
        """An :include: file, read as `reader`, or as its owner if it is None.

        A list of root's is read as root only where nobody else could have put
        it. Raises MailError.
        """
        limit = self.USER_INCLUDE if reader else self.MAX_INCLUDE
        try:
            owners = os.lstat(path).st_uid if reader is None else None
            with Rights(reader or self.owner_of(path)):
                fd = self.open(path)
                try:
                    seen = os.fstat(fd)
                    owners = (seen.st_uid,) if owners is None else (owners,)
                    why = self.problem(seen, owners, limit, 0o002)
                    if why:
                        raise MailError("4.3.5", f":include: {path} {why}")
                    text = os_text(self.read_all(fd))
                finally:
                    os.close(fd)
        except OSError as error:
            why = "is a symbolic link" if os.path.islink(path) else error.strerror
            raise MailError("4.3.5", f":include: {path}: {why}") from None
        owner, identity = self.users.by_uid(seen.st_uid), (seen.st_dev, seen.st_ino)
        return ListFile(text, owner, bool(seen.st_mode & 0o020), identity)

    def owner_of(self, path: str) -> User:
        """Whose rights a list in /etc/aliases is read with. Raises OSError."""
        uid = os.lstat(path).st_uid
        place = os.path.dirname(path)
        while place not in ("/", ""):
            seen = os.lstat(place)
            # Nobody but root and the owner may have put it there, or led here.
            is_open = seen.st_mode & 0o022 and not seen.st_mode & stat.S_ISVTX
            if seen.st_uid not in (0, uid) or is_open or stat.S_ISLNK(seen.st_mode):
                return self.users.by_uid(65534)  # as anybody could read it
            place = os.path.dirname(place)
        return self.users.by_uid(uid)

    def open(self, path: str) -> int:
        """A descriptor for reading. Raises OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        return os.open(path, flags | os.O_CLOEXEC)

    def read_all(self, fd: int) -> bytes:
        """The file to its end, no more than its size now may be."""
        blocks = []
        while len(blocks) <= self.MAX_INCLUDE // BLOCK:
            block = os.read(fd, BLOCK)
            if not block:
                break
            blocks.append(block)
        return b"".join(blocks)

    def problem(
        self, seen: os.stat_result, owners: tuple, limit: int, mask: int = 0o022
    ) -> str:
        """Why a file must not be trusted, or ""."""
        checks = (
            (not stat.S_ISREG(seen.st_mode), "is not a regular file"),
            (seen.st_nlink != 1, "has more than one name"),
            (seen.st_uid not in owners, "does not belong to its user"),
            (seen.st_mode & mask, "is writable by others"),
            (seen.st_size > limit, "is too large"),
        )
        return next((text for is_wrong, text in checks if is_wrong), "")

    def home_problem(self, home: os.stat_result, owners: tuple) -> str:
        """Why the home that a .forward is in must not be trusted, or ""."""
        if home.st_mode & 0o022:
            return "is in a home that is writable by others"
        if home.st_uid not in owners:
            return "is in a home that belongs to somebody else"
        return ""


# == 19 Mailboxes: MailboxLock, Mailbox, FileBox, MaildirBox ==================
# Adding to mbox files and Maildirs: opened as their owner, locked both ways,
# synced. Source: RFC 4155 (mboxrd), Debian policy 11.6 (fcntl, then dotlock).
# Failures: MailError 4.2.x, 5.2.0 for a file that an alias names; a mailbox
# that is in use raises Busy.

MAX_NULS = 1 << 26  # bytes at a mailbox's end that are cut off as torn
SEARCH = 1 << 22  # bytes of a mailbox searched at once
HEADER_SLACK = 1 << 12  # bytes that a reader may have added to a message
OVERLAP = 1 << 16  # bytes of them searched again: the head of one message
CLOCK_SLACK = 60  # seconds that a mailbox may seem older than a message in it
STALE_LOCK = 500  # seconds until anybody's dotlock is broken; Postfix


class Busy(Exception):
    """The mailbox is locked by another program: try again in a moment."""


class MailboxLock:
    """fcntl and dotlock on a mailbox, neither waiting for anybody.

    In place of mailbox.mbox's own, whose dotlock says nothing about its
    maker, so that after a kill it stands for good, and which removes a lock
    it never made. Ours holds our pid; a dead minimta's is broken at once.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = f"{path}.lock"
        self.fd = fd
        self.has_dotlock = False

    def acquire(self) -> None:
        """Takes both locks. Raises Busy."""
        import fcntl

        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(self.path) from None
        try:
            self.has_dotlock = self.make_dotlock() or (
                self.break_stale() and self.make_dotlock()
            )
        except PermissionError:
            return  # a directory that we may not write: fcntl has to do
        except OSError as error:
            if error.errno == 30:  # EROFS
                return
            raise
        if not self.has_dotlock:
            fcntl.lockf(self.fd, fcntl.LOCK_UN)
            raise Busy(self.path)

    def make_dotlock(self) -> bool:
        """Makes PATH.lock, pid inside, in one step; False if there is one.

        A link of a file that is complete: a kill leaves no lock without pid.
        Only the holder of the fcntl lock comes here, so one name serves all.
        """
        aside = f"{self.path}.minimta"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(aside, flags, 0o644)
        except FileExistsError:  # what a kill left
            os.unlink(aside)
            fd = os.open(aside, flags, 0o644)
        try:
            try:
                write_all(fd, b"%d minimta\n" % os.getpid())
            except OSError:
                pass  # a full disk: a lock all the same, and mail can be deleted
            os.link(aside, self.path)
        except FileExistsError:
            return False
        finally:
            os.close(fd)
            os.unlink(aside)
        return True

    def break_stale(self) -> bool:
        """Removes the lock of a dead minimta, or a very old one."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self.path, flags)
            words, age = os.read(fd, 64).split(), time.time() - os.fstat(fd).st_mtime
            os.close(fd)
            # A living minimta would hold the fcntl lock, which is ours now.
            if age <= STALE_LOCK and words[1:] != [b"minimta"]:
                return False
            os.unlink(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Gives both back."""
        import fcntl

        self.drop()
        fcntl.lockf(self.fd, fcntl.LOCK_UN)

    def drop(self) -> None:
        """Gives back the dotlock; never one that is not ours."""
        if self.has_dotlock:
            self.has_dotlock = False
            try:
                os.unlink(self.path)
            except OSError:
                pass  # the directory changed under us; the lock goes stale


class AppendOnly:
    """What makes a mailbox.mbox an append-only one; see append_only_mbox().

    mailbox.mbox.add() reads the whole mailbox first, to number its messages:
    700 ms for 18 MB. Here the table of contents is empty, and a message is an
    iterable of bytes, written past Python's buffer: what a buffer held back
    at a full disk would be written later, behind what was cut. It is given
    the open file, which has been looked at, and does not open it again.
    """

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._factory = None
        self._file = open(fd, "rb+", 0)  # noqa: SIM115 closed by close()
        self._toc = None
        self._next_key = 0
        self._pending = self._pending_sync = self._locked = False
        self._file_length = None

    def _generate_toc(self) -> None:
        self._toc: dict = {}
        self._next_key = 0
        self._file_length = os.fstat(self._file.fileno()).st_size

    def _install_message(self, message: object) -> tuple[int, int]:
        fd = self._file.fileno()
        start = os.lseek(fd, 0, os.SEEK_END)
        held = bytearray()  # one write for all of a small message: never torn
        try:
            for chunk in message:
                held += chunk
                if len(held) >= BLOCK:
                    write_all(fd, held)
                    held.clear()
            write_all(fd, held)
        except BaseException:
            os.ftruncate(fd, start)  # half a message is no message
            raise
        return start, os.lseek(fd, 0, os.SEEK_CUR)

    def _post_message_hook(self, file: object) -> None:
        """Nothing: the message brings its own empty line."""

    def flush(self) -> None:
        """Makes what was added durable."""
        os.fsync(self._file.fileno())


def append_only_mbox(path: str, fd: int, made: list = []) -> object:  # noqa: B006
    """A mailbox.mbox of an open file, made append-only.

    `made` keeps the class, once it is made.
    """
    if not made:
        import mailbox  # 25 ms; only delivery needs it

        made.append(type("Mbox", (AppendOnly, mailbox.mbox), {}))
    return made[0](path, fd)


class Mailbox:
    """One user's mbox file, opened and locked in a `with` block for a batch.

    append() adds a message, sync() makes all of them durable. The caller has
    taken the user's Rights. Raises MailError, Busy.
    """

    WHAT = "mailbox"
    HAS_OWNER = True  # whether it must belong to who appends

    def __init__(self, path: str, owner: int, limit: int = 0) -> None:
        self.path = path
        self.owner = owner
        self.limit = limit

    def __enter__(self) -> Mailbox:
        try:
            self.fd, self.is_new = self.open()
        except OSError as error:
            raise self.failure(error) from None
        self.start = -1
        self.lock = MailboxLock(self.path, self.fd)
        try:
            # Before the lock, for that makes a file beside it, and after it.
            self.inspect(os.fstat(self.fd))
            self.lock.acquire()
            seen = os.fstat(self.fd)
            self.modified = seen.st_mtime
            self.inspect(seen)
            self.cut_nuls()
            self.mbox = append_only_mbox(self.path, self.fd)
        except OSError as error:
            self.give_back()
            raise self.failure(error) from None
        except BaseException:
            self.give_back()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.mbox._file.close()

    def give_back(self) -> None:
        """Closes what was not to be had; with it the fcntl lock ends."""
        self.lock.drop()
        os.close(self.fd)

    def failure(self, error: OSError) -> MailError:
        """The failure for an error of the mailbox's disk or directory."""
        why = f": {error.strerror}"
        try:
            seen = os.lstat(self.path)
            if stat.S_ISLNK(seen.st_mode):
                why = " is a symbolic link"
            elif self.HAS_OWNER and seen.st_uid != self.owner:
                why = " does not belong to its user"
        except OSError:
            pass  # it is not there, or not to be seen
        return MailError(self.status(error), f"{self.WHAT} {self.path}{why}")

    def status(self, error: OSError) -> str:
        """The status of such an error: mail for a mailbox waits."""
        return "4.2.0"

    def open(self) -> tuple[int, bool]:
        """(descriptor, whether the file was made): opened, or made.

        Never follows a link, never waits for a FIFO.
        """
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(self.path, flags), False
        except FileNotFoundError:
            return os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600), True

    def inspect(self, seen: os.stat_result) -> None:
        """Raises MailError unless the open file is the user's own mailbox."""
        at_path = os.lstat(self.path)
        same = (at_path.st_dev, at_path.st_ino) == (seen.st_dev, seen.st_ino)
        self.judge(seen, same)

    def judge(self, seen: os.stat_result, same: bool) -> None:
        """Raises MailError for a file that is not touched."""
        for is_wrong, status, text in self.problems(seen, same):
            if is_wrong:
                raise MailError(status, f"{self.WHAT} {self.path} {text}")
        if self.limit and seen.st_size >= self.limit:
            raise MailError("4.2.2", f"{self.WHAT} {self.path} is full")

    def look(self) -> None:
        """Raises MailError for what delivery would refuse; opens nothing."""
        try:
            self.judge(os.lstat(self.path), True)
        except OSError:
            return  # it is not there yet, or not to be seen

    def problems(self, seen: os.stat_result, same: bool) -> tuple:
        """(whether it is so, status, text) of what must not be."""
        return (
            (not stat.S_ISREG(seen.st_mode), "4.2.0", "is not a regular file"),
            (not same, "4.2.0", "was replaced while it was opened"),
            (seen.st_nlink != 1, "4.2.0", "has more than one name"),
            (seen.st_uid != self.owner, "4.2.0", "does not belong to its user"),
        )

    def cut_nuls(self) -> None:
        """Cuts NULs off the end: a size was written without its data."""
        size = end = os.fstat(self.fd).st_size
        while end and size - end < MAX_NULS and os.pread(self.fd, 1, end - 1) == b"\0":
            start = max(0, end - BLOCK)
            end = start + len(os.pread(self.fd, end - start, start).rstrip(b"\0"))
        if size - end >= MAX_NULS:
            raise MailError("4.2.0", f"mailbox {self.path} ends in a hole")
        if end != size:
            os.ftruncate(self.fd, end)

    def pad(self) -> None:
        """Ends a foreign half message with an empty line: ours is seen."""
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, 3, max(0, size - 3))
        if size and not tail.endswith((b"\n\n", b"\n\r\n")):
            os.lseek(self.fd, 0, os.SEEK_END)
            write_all(self.fd, b"\n" if tail.endswith(b"\n") else b"\n\n")
        self.start = os.fstat(self.fd).st_size

    def append(self, chunks: object) -> None:
        """Adds one message, whole or not at all. Raises MailError."""
        try:
            if self.start < 0:
                self.pad()
            self.mbox.add(chunks)
        except OSError as error:
            raise self.failure(error) from None

    def sync(self) -> None:
        """Makes what was appended durable, or takes it back: MailError."""
        try:
            self.mbox.flush()
            if self.is_new:
                sync_folder(os.path.dirname(self.path))
        except OSError as error:
            os.ftruncate(self.fd, self.start)
            raise self.failure(error) from None

    def find(self, wanted: set[str]) -> dict[str, int]:
        """Where messages with these queue ids begin: id -> offset of `From `.

        One pass over the file, for the messages that a crash may have left
        delivered. Only our own Received counts: the first, in the header.
        """
        import re

        # By blocks, not mmap: who owns the file may truncate it meanwhile.
        pattern = re.compile(rb"\n\t(?:by [^\n]* )?id (\w+)[;\n]")
        found: dict[str, int] = {}
        text, base = b"", 0
        while wanted:
            skipped = self.skip_hole(base + len(text))
            if skipped != base + len(text):
                base, text = skipped, b""
            block = os.pread(self.fd, SEARCH, base + len(text))
            text += block
            for match in pattern.finditer(text):
                queue_id = os_text(match[1])
                if queue_id not in wanted:
                    continue
                near = max(0, match.start() - OVERLAP)
                begin = text.rfind(b"\nFrom ", near, match.start()) + 1
                above = text[begin : match.start()]
                is_own = above.count(b"\nReceived:") == 1 and b"\n\n" not in above
                if queue_id in wanted and is_own and above.startswith(b"From "):
                    found[queue_id] = base + begin
            if not block:
                break
            base, text = base + max(0, len(text) - OVERLAP), text[-OVERLAP:]
        return found

    def skip_hole(self, place: int) -> int:
        """Where the next data is: a file may be made of holes, and vast."""
        if not hasattr(os, "SEEK_DATA"):
            return place
        try:
            return os.lseek(self.fd, place, os.SEEK_DATA)
        except OSError:
            return place  # there is none, or the file system does not tell

    def already_has(self, offset: int | None, render: object) -> bool:
        """Whether a message is there already; a torn copy is cut off first.

        `offset` is what find() said of it (None: its id is not there), and
        `render()` gives the text that it should have, From_ line first.
        """
        place = self.last_from() if offset is None else offset
        state = self.compare(place, render())
        if state == "torn":
            os.ftruncate(self.fd, place)
        if offset is None or state != "changed":
            return state == "whole" and offset is not None
        return self.has_end(offset, render())

    def has_end(self, offset: int, chunks: object) -> bool:
        """Whether a message that was changed is all there, its end included.

        Readers add a line to the header. If it is shorter than it should be,
        or ends otherwise, it was torn, and something was appended behind it.
        """
        tail, size = b"", 0
        for chunk in chunks:
            tail, size = (tail + chunk)[-200:], size + len(chunk)
        blank = len(tail) - len(tail.rstrip())
        # The last paragraph only: what is above may be the header.
        tail = tail.rstrip().rpartition(b"\n\n")[2]
        text = os.pread(self.fd, size + HEADER_SLACK, offset)
        end = text.find(b"\nFrom ")
        entry = (text if end < 0 else text[:end]).rstrip()
        return len(entry) >= size - blank and entry.endswith(tail)

    def compare(self, offset: int, chunks: object) -> str:
        """What stands at `offset`, held against the text it should have.

        whole; torn: the file ends in the middle of it; damaged: with NULs in
        it; changed: otherwise different, so its reader had it.
        """
        end, place = os.fstat(self.fd).st_size, offset
        for chunk in chunks:
            there = os.pread(self.fd, len(chunk), place)
            if place == offset:  # the date of a From_ line is not held against it
                dated = len(chunk) - len("Wed Feb 19 05:10:01 2025\n")
                there = there[:dated] + chunk[dated : len(there)]
            if place + len(there) == end and len(there) < len(chunk):
                return "torn" if chunk.startswith(there) else "changed"
            if there != chunk:
                nuls = b"\0" in there and b"\0" not in chunk
                return "damaged" if nuls else "changed"
            place += len(chunk)
        return "whole"

    def last_from(self) -> int:
        """Where the last message begins (0 if none is near the end)."""
        size = os.fstat(self.fd).st_size
        start = max(0, size - BLOCK)
        return start + os.pread(self.fd, BLOCK, start).rfind(b"\nFrom ") + 1


class FileBox(Mailbox):
    """A file that an alias or .forward names, in mbox format.

    It may be another's: the rights of who appends decide. What is wrong with
    it is wrong for good, as in Postfix, and the sender is told.
    """

    WHAT = "file"
    HAS_OWNER = False

    def status(self, error: OSError) -> str:
        """A full disk passes; a file that may not be written does not."""
        return "4.2.0" if is_passing(error) else "5.2.0"

    def look(self) -> None:
        """Raises MailError for what delivery would refuse; opens nothing."""
        super().look()
        is_there = os.path.lexists(self.path)
        place = self.path if is_there else os.path.dirname(self.path)
        mode = os.W_OK if is_there else os.W_OK | os.X_OK
        if not os.access(
            place, mode, effective_ids=os.access in os.supports_effective_ids
        ):
            raise MailError("5.2.0", f"{self.WHAT} {self.path} may not be written")

    def problems(self, seen: os.stat_result, same: bool) -> tuple:
        """(whether it is so, status, text) of what must not be."""
        is_program = stat.S_ISREG(seen.st_mode) and seen.st_mode & 0o111
        return (
            (not stat.S_ISREG(seen.st_mode), "5.2.0", "is not a regular file"),
            (not same, "4.2.0", "was replaced while it was opened"),
            (seen.st_nlink != 1, "5.2.0", "has more than one name"),
            (is_program, "5.7.1", "is executable"),
        )


class NamedMaildir:
    """What makes a mailbox.Maildir write pieces of bytes under a given name.

    Its own names say nothing of the message, so that after a crash nobody
    could tell whether it is there; and it would split a message into lines.
    """

    unique = ""

    def _create_tmp(self) -> object:
        path = os.path.join(self._path, "tmp", self.unique)
        try:
            os.unlink(path)  # what a crash left
        except FileNotFoundError:
            pass
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(path, "wb", opener=lambda name, _: os.open(name, flags, 0o600))

    def _dump_message(self, message: object, target: object, *_: object) -> None:
        for chunk in message:
            target.write(chunk)


class MaildirBox:
    """A Maildir; add() puts messages into new/, sync() makes them durable.

    The caller has taken the owner's Rights. Raises MailError: `status` for
    what does not pass by itself.
    """

    def __init__(self, path: str, owner: int, status: str) -> None:
        self.path = path.rstrip("/")
        self.owner = owner
        self.status = status
        try:
            self.make_sure()
        except OSError as error:
            raise self.failure(error) from None

    def failure(self, error: OSError) -> MailError:
        """The failure for an error of the Maildir's disk or directory."""
        status = "4.2.0" if is_passing(error) else self.status
        return MailError(status, f"maildir {self.path}: {error.strerror}")

    def make_sure(self) -> None:
        """Makes the directories that are missing; none may be a link."""
        os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
        for name in ("", "/tmp", "/new", "/cur"):
            path = self.path + name
            try:
                os.mkdir(path, 0o700)
                sync_folder(os.path.dirname(path))
            except FileExistsError:
                pass
            seen = os.lstat(path)
            if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != self.owner:
                why = f"maildir {self.path}: {path} is no directory of its user"
                raise MailError(self.status, why)

    def has(self, name: str) -> bool:
        """Whether a message of that name is there, perhaps read already."""
        there = os.listdir(f"{self.path}/new") + os.listdir(f"{self.path}/cur")
        return any(found.partition(":")[0] == name for found in there)

    def add(self, name: str, chunks: object) -> None:
        """Adds one message, whole or not at all. Raises MailError."""
        import mailbox  # 25 ms; only delivery needs it

        box = type("Maildir", (NamedMaildir, mailbox.Maildir), {"unique": name})
        try:
            box(self.path, create=False).add(chunks)
        except OSError as error:
            raise self.failure(error) from None
        except mailbox.ExternalClashError:
            return  # it is there already

    def sync(self) -> None:
        """Makes the names in new/ durable. Raises MailError."""
        try:
            sync_folder(f"{self.path}/new")
        except OSError as error:
            raise self.failure(error) from None


# == 20 Folders: Folder, MaildirFolder, FolderMessage =========================
# A mailbox as mail(1) reads and rewrites it; the mail stays in the file.
# Failures: ProgramError, in the words of Heirloom mailx.


MAX_FROM_LINE = 1000  # bytes of a From_ line that are looked at
HEAD_PIECE = 1 << 14  # bytes that are read to find the end of a header
MAX_HEAD = 1 << 18  # bytes of a header that lists and searches look at
SEEN_AT_ONCE = 1 << 24  # bytes of a folder that are in memory while it is read
MARKS = {"saved": "*", "deleted": "*", "held": "H", "mbox": "M"}


class FolderMessage:
    """One message of a folder: where it is, and what its reader did with it.

    `status` and `flags` are the letters of Status and X-Status; `state` is
    "", deleted, saved, held or mbox.
    """

    __slots__ = (
        *("start", "end", "status", "flags", "written"),
        *("state", "was_read", "was_touched", "place"),
    )

    def __init__(self, start: int, end: int, status: str, flags: str = "") -> None:
        self.start = start
        self.end = end
        self.status = status
        self.flags = flags
        self.written = status, flags  # as the file has them
        self.state = ""
        self.was_read = False
        self.was_touched = False
        self.place = ""  # its file, where each has one

    @classmethod
    def found(cls, view: object, start: int, end: int) -> FolderMessage:
        """The message at that place of a file."""
        head_end = view.find(b"\n\n", start, end) + 1 or end
        head_end = view.find(b"\n\r\n", start, head_end) + 1 or head_end
        head, words = view[start:head_end].lower(), []
        for name in (b"\nstatus:", b"\nx-status:"):
            rest = head.rpartition(name)[2] if name in head else b""
            words.append(os_text(rest.partition(b"\n")[0].strip().upper()))
        status, flags = (word if word.isalpha() else "" for word in words)
        return cls(start, end, status, flags)

    def extend(self, end: int) -> None:
        """Takes in what stands behind it and begins no message.

        Whatever its reader has decided was not of that: it stays.
        """
        self.end = end
        self.state = ""

    @property
    def flag(self) -> str:
        """The letter in the header list."""
        letter = " "
        for is_so, found in (
            ("A" in self.flags, "A"),
            (self.is_unread, "U"),
            (self.is_unread and self.is_new, "N"),
            (self.state in MARKS, MARKS.get(self.state, "")),
            ("F" in self.flags, "F"),
        ):
            letter = found if is_so else letter
        return letter

    @property
    def is_new(self) -> bool:
        """Whether it came since the last session."""
        return not self.status

    @property
    def is_unread(self) -> bool:
        """Whether nobody has read it, now or before."""
        return "R" not in self.status and not self.was_read

    def next_status(self) -> str:
        """Its Status once this session is over."""
        return "O" if self.is_unread else "RO"

    @property
    def is_changed(self) -> bool:
        """Whether the file has something else than it will have."""
        return bool(self.state) or self.written != (self.next_status(), self.flags)


def forget(view: object, end: int) -> int:
    """Gives back the memory of a mapped file's beginning; returns `end`.

    What was looked at would be in memory as a whole, a mailbox of 1 GB too.
    """
    import mmap

    if hasattr(view, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        view.madvise(mmap.MADV_DONTNEED, 0, end - end % mmap.PAGESIZE)
    return end


def find_starts(view: object, start: int) -> object:
    """Where messages begin: a From_ line with a date, behind an empty line.

    At `start` none is needed: the file had ended there, as it was.
    """
    import re

    pattern = re.compile(rb"From [^\n]*\d\d:\d\d[^\n]*\d{4}")
    head = b"" if start else view[:BLOCK]
    first = len(head) - len(head.lstrip(b"\r\n"))
    place = max(start, first) - 1
    while place >= -1:
        begin = place + 1
        line = view[begin : begin + MAX_FROM_LINE].partition(b"\n")[0]
        is_behind = begin in (first, start) or view[max(0, begin - 3) : begin].endswith(
            (b"\n\n", b"\n\r\n")
        )
        if is_behind and pattern.match(line):
            yield begin
        place = view.find(b"\nFrom ", begin)
        if place < 0:
            return


def with_status(first: bytes, header: Header, message: FolderMessage) -> bytes:
    """A message's text with its new Status, an empty line behind it."""
    header, body = header.without("status", "x-status"), header.rest
    header = header.added("Status", message.next_status())
    if message.flags:
        header = header.added("X-Status", message.flags)
    text = first + b"\n" + bytes(header) + b"\n" + body
    return text if text.endswith(b"\n\n") else text.rstrip(b"\n") + b"\n\n"


def lock_patiently(lock: MailboxLock) -> None:
    """Waits for a mailbox, thirty seconds at the most. BlockingIOError."""
    for _ in range(300):
        try:
            return lock.acquire()
        except Busy:
            time.sleep(0.1)
    raise BlockingIOError(11, "locked by another program", lock.path)


class Folder:
    """An mbox file: messages are found once, read when asked for.

    Read with the reader's own rights; write() keeps mail that came meanwhile.
    """

    def __init__(self, path: str, home: str = "", is_read_only: bool = False) -> None:
        self.name = path  # as it was given
        self.path = os.path.abspath(path)  # whatever `cd` does
        self.home = home  # the reader's, for what needs a place for a moment
        self.messages: list[FolderMessage] = []
        self.size = 0  # bytes that were looked at
        self.sum = 0  # and their CRC-32
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            try:
                self.fd = os.open(path, os.O_RDONLY if is_read_only else flags)
                self.is_read_only = is_read_only
            except OSError:  # not ours to write, or the disk is read-only
                self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self.is_read_only = True
        except OSError as error:
            raise ProgramError(1, f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise ProgramError(1, f"{path}: not a regular file")
        self.lock = MailboxLock(self.path, self.fd)
        if self.is_read_only:
            self.find_messages()
            return
        self.lock_patiently()  # or half a message might be taken for a whole one
        try:
            try:
                self.recover()
            except OSError:
                pass  # no room: another time
            self.find_messages()
        finally:
            self.lock.release()

    def find_messages(self) -> None:
        """Notes the messages behind those that are known already.

        What is in front of the first of them belongs to the last one known:
        that had not ended yet.
        """
        import mmap  # a C module

        seen = os.fstat(self.fd)
        size = seen.st_size
        if size > self.size:
            with mmap.mmap(self.fd, size, access=mmap.ACCESS_READ) as view:
                starts = find_starts(view, self.size)
                start = next(starts, size)
                is_mail = start < min(size, BLOCK) and not view[:start].strip()
                if not (self.messages or is_mail):
                    raise ProgramError(1, f"{self.name}: not a mailbox")
                self.take_rest(start)
                forgotten = start
                while start < size:
                    end = next(starts, size)
                    self.messages.append(FolderMessage.found(view, start, end))
                    start = end
                    if start - forgotten > SEEN_AT_ONCE:
                        forgotten = forget(view, start)
        self.note_size(size)
        self.looked_at = seen.st_ino, size, seen.st_ctime_ns

    def take_rest(self, end: int) -> None:
        """Makes what stands in front of `end` the last message's."""
        if self.messages and end > self.size:
            self.messages[-1].extend(end)

    def lines(self, message: FolderMessage) -> int:
        """How many lines a message has, its From_ line too."""
        return sum(b.count(b"\n") for b in self.blocks(message.start, message.end))

    def note_size(self, size: int) -> None:
        """So far the file is known now."""
        self.sum = self.checked(self.size, size, self.sum)
        self.size = size
        self.seen = os.fstat(self.fd).st_ino, self.sum

    def has_grown(self) -> bool:
        """Whether mail has come since it was last looked at."""
        return os.fstat(self.fd).st_size > self.size

    def is_changed(self) -> bool:
        """Whether more than the file's end is not as it was.

        What a reader changed can make the file longer, like mail that came:
        its sum tells, and that is asked for only if the file was touched.
        """
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        touched = now.st_ino, now.st_size, now.st_ctime_ns
        if touched == self.looked_at:
            return False
        is_shorter = now.st_ino != self.seen[0] or now.st_size < self.size
        if is_shorter or self.fingerprint() != self.seen:
            return True
        self.looked_at = touched
        return False

    def take_new(self) -> int:
        """Finds the mail that has come; how many. Raises ProgramError."""
        known = len(self.messages)
        if self.has_grown() and not self.is_read_only:
            self.lock_patiently()
            try:
                if self.fingerprint() == self.seen:
                    self.find_messages()
            finally:
                self.lock.release()
        return len(self.messages) - known

    def read_at(self, start: int, size: int) -> bytes:
        """A part of the file; never by another descriptor.

        To close that one would give up the fcntl lock, POSIX says.
        """
        blocks, place = [], start
        while place < start + size:
            block = os.pread(self.fd, min(SEARCH, start + size - place), place)
            if not block:
                break
            blocks.append(block)
            place += len(block)
        return b"".join(blocks)

    def read(self, message: FolderMessage) -> tuple[bytes, Header]:
        """(From_ line, header with the body as its rest) of one message."""
        return self.parsed(self.read_at(message.start, message.end - message.start))

    def head(self, message: FolderMessage) -> tuple[bytes, Header]:
        """The same, but the body may be missing: for lists and searches."""
        text, size = b"", message.end - message.start
        size = min(size, MAX_HEAD)
        while len(text) < size and not (b"\n\n" in text or b"\n\r\n" in text):
            left = min(HEAD_PIECE, size - len(text))
            text += self.read_at(message.start + len(text), left) or b"\n\n"
        return self.parsed(text)

    def parsed(self, text: bytes) -> tuple[bytes, Header]:
        """The From_ line of a text, and what follows."""
        first, _, rest = text.partition(b"\n")
        if first.endswith(b"\r"):  # from another system
            first, rest = first[:-1], rest.replace(b"\r\n", b"\n")
        return first, Header.parse(rest)

    def rewritten(self, message: FolderMessage) -> bytes:
        """The message's text with its new Status."""
        return with_status(*self.read(message), message)

    def write(self) -> int:
        """Drops what is deleted or saved, writes each Status; how many stay.

        In place, so that owner, mode and inode stay. Raises ProgramError.
        """
        self.lock_patiently()
        try:
            self.check_unchanged()
            self.complete_last()
            kept = [message for message in self.messages if not message.state]
            self.replace_tail(self.first_change(), kept)
        except OSError as error:
            raise ProgramError(EX_IOERR, f"{self.path}: {error.strerror}") from None
        finally:
            self.lock.release()
        return len(kept)

    def complete_last(self) -> None:
        """Takes in what came meanwhile, up to the next message.

        That one and those behind it are nobody's yet: they stay as they are.
        """
        import mmap

        size = os.fstat(self.fd).st_size
        if self.messages and size > self.size:
            with mmap.mmap(self.fd, size, access=mmap.ACCESS_READ) as view:
                first = next(find_starts(view, self.size), size)
            self.take_rest(first)
            self.note_size(first)

    def remove_if_empty(self) -> bool:
        """Removes the file if nothing is in it; whether it did."""
        self.lock_patiently()
        try:
            seen = os.fstat(self.fd)
            is_same = seen.st_ino == os.stat(self.path).st_ino
            if seen.st_size or not is_same:
                return False
            os.unlink(self.path)
        finally:
            self.lock.release()
        return True

    def check_unchanged(self) -> None:
        """Raises ProgramError if more than the file's end is not as it was."""
        if self.fingerprint() != self.seen:
            why = f"{self.name}: another program changed it: x leaves it so"
            raise ProgramError(1, why)

    def fingerprint(self) -> tuple[int, int]:
        """What differs if anything but the file's end was changed since."""
        return os.stat(self.path).st_ino, self.checked(0, self.size, 0)

    def checked(self, start: int, end: int, before: int) -> int:
        """The CRC-32 of a part of the file, behind one that gave `before`."""
        import zlib  # a C module

        for block in self.blocks(start, end):
            before = zlib.crc32(block, before)
        return before

    def lock_patiently(self) -> None:
        """Waits for a deliverer to finish. Raises ProgramError."""
        try:
            lock_patiently(self.lock)
        except BlockingIOError as error:
            why = f"{self.path}: {error.strerror}"
            raise ProgramError(EX_TEMPFAIL, why) from None

    def first_change(self) -> int:
        """Where the file begins to differ from what it should be."""
        for message in self.messages:
            if message.is_changed:
                return message.start
        return self.size

    def replace_tail(self, offset: int, kept: list[FolderMessage]) -> None:
        """Writes the file anew from `offset`; it is the old one or the new.

        The new end is kept aside, whole, before the old one is touched: who
        opens the mailbox after a kill finishes what was begun.
        """
        if offset == self.size:
            return
        end = os.fstat(self.fd).st_size

        def pieces() -> object:
            """The new end; mail that came meanwhile is the last of it."""
            yield from (self.rewritten(m) for m in kept if m.start >= offset)
            yield from self.blocks(self.size, end)

        aside = self.keep_aside(offset, end, pieces)
        try:
            self.put_tail(aside, offset, end)
        except OSError:
            is_same = self.fingerprint() == self.seen
            if is_same and os.fstat(self.fd).st_size == end:
                os.unlink(aside)  # nothing was begun: nothing is to be finished
            raise

    def blocks(self, start: int, end: int) -> object:
        """A part of the file, a block at a time."""
        for place in range(start, end, BLOCK):
            yield self.read_at(place, min(BLOCK, end - place))

    def rescue_folders(self) -> list[str]:
        """Where the new end may be kept for a moment, best first."""
        near = os.path.dirname(self.path) or "."
        return [folder for folder in (near, self.home, "/var/tmp") if folder]

    def keep_aside(self, offset: int, end: int, pieces: object) -> str:
        """Writes the new end to a file of its own, durably; its path.

        Its name says what it is for: the mailbox's inode, where the new end
        begins, a sum of what stays before it, how long the mailbox is, and a
        sum of what is cut off. Raises ProgramError.
        """
        import tempfile

        why = f"no place for a copy of {self.path}: make {self.home} writable"
        inode, stays = os.fstat(self.fd).st_ino, self.checked(0, offset, 0)
        for folder in self.rescue_folders():
            try:
                fd, path = tempfile.mkstemp(".new", f".mail-{inode}-", folder)
            except OSError:
                continue  # not ours to write
            try:
                for piece in pieces():
                    write_all(fd, piece)
                os.fsync(fd)
                new_end = offset + os.fstat(fd).st_size
                cut = self.checked(new_end, end, 0)
                name = f".mail-{inode}-{offset}-{stays}-{end}-{cut}.rescued"
                whole = os.path.join(folder, name)
                os.rename(path, whole)
                sync_folder(folder)
                return whole
            except OSError as error:
                os.unlink(path)
                why = f"{folder}: {error.strerror}: {self.path} stays as it was"
            finally:
                os.close(fd)
        raise ProgramError(EX_CANTCREAT, why)

    def put_tail(self, aside: str, offset: int, end: int) -> None:
        """Copies a new end into the file, durably; then it is no more."""
        with open(aside, "rb") as source:
            new_end = offset + os.fstat(source.fileno()).st_size
            before = os.fstat(self.fd)
            if new_end > end:  # a full disk shows here
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self.fd, offset, new_end - offset)
                else:
                    os.ftruncate(self.fd, new_end)
            os.lseek(self.fd, offset, os.SEEK_SET)
            for block in iter(lambda: source.read(BLOCK), b""):
                write_all(self.fd, block)
        os.ftruncate(self.fd, new_end)
        if os.utime in os.supports_fd:  # or the shell would announce new mail
            os.utime(self.fd, ns=(time.time_ns(), before.st_mtime_ns))
        os.fsync(self.fd)
        os.unlink(aside)

    def recover(self) -> None:
        """Finishes what a mail that was killed had begun to write."""
        head = f".mail-{os.fstat(self.fd).st_ino}-"
        found = []
        for folder in self.rescue_folders():
            try:
                names = os.listdir(folder)
            except OSError:
                continue
            for name in names:
                numbers = name[len(head) :].removesuffix(".rescued").split("-")
                is_ours = name.startswith(head) and name.endswith(".rescued")
                if is_ours and len(numbers) == 4 and all(map(str.isdigit, numbers)):
                    path = os.path.join(folder, name)
                    offset, stays, end, cut = map(int, numbers)
                    if self.is_for_us(path, offset, stays):
                        found.append((end, path, offset, cut))
        for end, path, offset, cut in sorted(found)[-1:]:
            self.finish(path, offset, end, cut)
        for _, path, _, _ in sorted(found)[:-1]:
            os.unlink(path)  # of the same end, before more mail came

    def is_for_us(self, path: str, offset: int, stays: int) -> bool:
        """Whether what was kept aside belongs to us and this mailbox."""
        seen = os.lstat(path)
        is_plain = stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1
        is_own = is_plain and seen.st_uid == os.geteuid()
        return is_own and self.checked(0, offset, 0) == stays

    def finish(self, aside: str, offset: int, end: int, cut: int) -> None:
        """Puts in place what was kept aside, and mail since then behind it."""
        size, new_end = os.fstat(self.fd).st_size, offset + os.stat(aside).st_size
        came = self.behind(new_end, end, cut)
        if came < size:
            old = aside

            def pieces() -> object:
                """The same end, and what came since."""
                with open(old, "rb") as source:
                    yield from iter(lambda: source.read(BLOCK), b"")
                yield from self.blocks(came, size)

            aside, end = self.keep_aside(offset, size, pieces), size
            os.unlink(old)
        self.put_tail(aside, offset, end)

    def behind(self, new_end: int, end: int, cut: int) -> int:
        """Where mail begins that came after a kill: after which end."""
        size = os.fstat(self.fd).st_size
        if new_end <= end:  # was it cut off already?
            is_whole = size >= end and self.checked(new_end, end, 0) == cut
            return end if is_whole else new_end
        is_grown = size >= new_end and self.read_at(end, 5) != b"From "
        return new_end if is_grown else min(size, end)


def maildir_age(name: str) -> tuple:
    """What a Maildir is sorted by: seconds that begin a name, the name."""
    base = name.rpartition("/")[2]
    seconds = base.partition(".")[0]
    is_number = seconds.isascii() and seconds.isdigit()
    return int(seconds) if is_number else 0, base


def maildir_name(message: FolderMessage) -> str:
    """`cur/NAME:2,FLAGS` for what a message is now; flags of others stay."""
    base, _, before = message.place.rpartition("/")[2].partition(":2,")
    letters = set(before) - set("SRF")
    letters |= set() if message.is_unread else {"S"}
    letters |= {new for old, new in (("A", "R"), ("F", "F")) if old in message.flags}
    return f"cur/{base}:2,{''.join(sorted(letters))}"


class MaildirFolder:
    """A Maildir as mail(1) reads it: what Folder is for an mbox.

    A message is a file, so nothing has to be written anew: what is deleted is
    unlinked, and what was read gets its flags by a new name in cur/. Source:
    Bernstein's maildir(5); flags S (seen), R (replied), F (flagged).
    """

    size = 1  # for those who ask where the first change is

    def __init__(self, path: str, is_read_only: bool = False) -> None:
        self.name = path
        self.path = os.path.abspath(path)
        self.is_read_only = is_read_only
        self.messages: list[FolderMessage] = []
        self.take_new()

    def names(self) -> list[str]:
        """The messages there are, `new/NAME` or `cur/NAME`, oldest first."""
        found = []
        for folder in ("new", "cur"):
            try:
                names = os.listdir(f"{self.path}/{folder}")
            except OSError as error:
                why = f"{self.name}: {error.strerror}: not a Maildir"
                raise ProgramError(1, why) from None
            found += [f"{folder}/{name}" for name in names if name[0] != "."]
        return sorted(found, key=maildir_age)

    def unknown(self) -> list[str]:
        """Those that came since the last look."""
        known = {message.place for message in self.messages}
        return [name for name in self.names() if name not in known]

    def take_new(self) -> int:
        """Takes in what has come; how many. Raises ProgramError."""
        count = len(self.messages)
        for name in self.unknown():
            try:
                text = self.text_of(name)
            except OSError:
                continue  # another reader was faster, or it is no mail
            letters = name.rpartition(":2,")[2] if ":2," in name else ""
            status = "RO" if "S" in letters else "O" if name[0] == "c" else ""
            flags = "A" * ("R" in letters) + "F" * ("F" in letters)
            one = FolderMessage(0, len(text), status, flags)
            one.place = name
            self.messages.append(one)
        return len(self.messages) - count

    def has_grown(self) -> bool:
        """Whether mail has come since it was last looked at."""
        return bool(self.unknown())

    def is_changed(self) -> bool:
        """Whether another reader has moved or deleted what is known here."""
        return not {one.place for one in self.messages} <= set(self.names())

    def check_unchanged(self) -> None:
        """Nothing: each message is looked for by itself."""

    def text_of(self, name: str) -> bytes:
        """A message's file, with a From_ line. Raises OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(f"{self.path}/{name}", flags), "rb") as file:
            seen = os.fstat(file.fileno())
            if not stat.S_ISREG(seen.st_mode):
                raise OSError(22, "not a regular file")
            when, text = time.ctime(seen.st_mtime), file.read()
        header = Header.parse(text)
        sender = "".join(header.values("return-path")[:1]).strip("<> ")
        first = os_bytes(f"From {sender or 'MAILER-DAEMON'}  {when}\n")
        return first + b"".join(mbox_quoted([text]))

    def read(self, message: FolderMessage) -> tuple[bytes, Header]:
        """(From_ line, header with the body as its rest) of one message."""
        try:
            text = self.text_of(message.place)
        except OSError as error:
            why = f"{message.place}: {error.strerror}: another program has it"
            raise ValueError(why) from None
        first, _, rest = text.partition(b"\n")
        return first, Header.parse(rest.replace(b"\r\n", b"\n"))

    head = read

    def lines(self, message: FolderMessage) -> int:
        """How many lines a message has, its From_ line too."""
        return self.text_of(message.place).count(b"\n")

    def rewritten(self, message: FolderMessage) -> bytes:
        """The message's text as an mbox has it, with its Status."""
        return with_status(*self.read(message), message)

    def first_change(self) -> int:
        """0 if anything is to be done at the end, else `size`."""
        return 1 - any(message.is_changed for message in self.messages)

    def write(self) -> int:
        """Does with each file what was decided; how many messages stay."""
        kept = 0
        for message in self.messages:
            path = f"{self.path}/{message.place}"
            try:
                if message.state:
                    os.unlink(path)
                    continue
                kept += 1
                place = f"{self.path}/{maildir_name(message)}"
                if message.is_changed and not os.path.lexists(place):
                    os.rename(path, place)
            except FileNotFoundError:
                continue  # another reader was faster
            except OSError as error:
                raise ProgramError(EX_IOERR, f"{path}: {error.strerror}") from None
        for folder in ("new", "cur"):
            sync_folder(f"{self.path}/{folder}")
        return kept

    def remove_if_empty(self) -> bool:
        """Never: a Maildir stays."""
        return False


def open_folder(path: str, home: str = "", is_read_only: bool = False) -> object:
    """An mbox file or a Maildir. Raises ProgramError."""
    if os.path.isdir(path):
        return MaildirFolder(path, is_read_only)
    return Folder(path, home, is_read_only)


# == 21 Commands: Command, verdict, command_environment =======================
# Runs one command of an alias or .forward with a message on its standard
# input. Source: Postfix's local(8); sysexits.h; qmail-command(8).
# Failures: a MailError that is returned: 4.3.0 where another run may do.

SHELL = "/bin/sh"
COMMAND_PATH = "/usr/local/bin:/usr/bin:/bin"
MAX_OUTPUT = 4096  # bytes of what a command prints that are kept for the bounce
TICK = 0.05  # seconds between looks at a process, where the system tells nothing
# What may stand in the environment of what came from outside; Postfix's
# command_expansion_filter. A shell script that forgets its quotes survives it.
PLAIN = frozenset(
    "1234567890!@%-_=+:,./abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

# Exit code -> status and what Postfix says of it; any other bounces.
VERDICTS = {
    64: ("5.3.0", "command line usage error"),
    65: ("5.6.0", "data format error"),
    66: ("5.3.0", "cannot open input"),
    67: ("5.1.1", "user unknown"),
    68: ("5.1.2", "host name unknown"),
    69: ("5.3.0", "service unavailable"),
    70: ("5.3.0", "internal software error"),
    71: ("4.3.0", "system resource problem"),
    72: ("5.3.0", "critical OS file missing"),
    73: ("5.2.0", "can't create user output file"),
    74: ("4.3.0", "input/output error"),
    75: ("4.3.0", "temporary failure"),
    76: ("5.5.0", "remote error in protocol"),
    77: ("5.7.0", "permission denied"),
    78: ("5.3.5", "local configuration error"),
    111: ("4.3.0", "temporary failure (qmail's 111)"),
    126: ("4.3.0", "command cannot be run"),
    127: ("4.3.0", "command not found"),
}
DONE = (0, 99)  # 99: qmail's "done, and no more lines"; the other lines are done too


def verdict(command: str, code: int, output: str) -> MailError | None:
    """The failure that a command's exit code means, None for success.

    `code` is negative for a signal. What it printed goes into the bounce; an
    enhanced status at its start counts more than the code, as in Postfix.
    """
    if code in DONE:
        return None
    usual = ("5.3.0", f'Command died with status {code}: "{command}"')
    status, text = VERDICTS.get(code, usual)
    if code < 0:
        status, text = "4.3.0", f'Command died with signal {-code}: "{command}"'
    output = " ".join(output.split())
    word, _, rest = output.partition(" ")
    if is_status(word) and word[0] != "2":
        return MailError(word, rest or text)
    return MailError(status, text + (f". Command output: {output}" if output else ""))


def command_environment(fixed: dict[str, str], mail: dict[str, str]) -> dict[str, str]:
    """A command's whole environment; values of `mail` are made harmless."""
    found = {"PATH": COMMAND_PATH, "SHELL": SHELL, "LANG": "C", "AGENT": "sendmail"}
    found.update(fixed)
    for name, value in mail.items():
        if value or name == "SENDER":  # "" is the null sender
            plain = "".join(char if char in PLAIN else "_" for char in value)
            # What begins with a dash could be taken for an option.
            found[name] = "_" + plain[1:] if plain.startswith("-") else plain
    return found


class Command:
    """One command, run by whoever this process is; run() is its life.

    In a session of its own, so that all it starts can be ended with it.
    """

    def __init__(self, text: str, folder: str, environ: dict, limit: int) -> None:
        self.text = text
        self.folder = folder
        self.environ = environ
        self.limit = limit
        self.output = bytearray()

    def start(self) -> object:
        """The process. Raises OSError."""
        from subprocess import PIPE, STDOUT, Popen

        return Popen(
            [SHELL, "-c", self.text],
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            env=self.environ,
            cwd=self.folder,
            umask=0o077,
            start_new_session=True,
        )

    def run(self, chunks: object, asker: int) -> MailError | None:
        """Feeds it the message and waits; the failure, None for success.

        `asker` is a pipe that this process writes to: when nobody reads it any
        more, the command is ended, for nobody would know that it was done.
        """
        try:
            process = self.start()
        except OSError as error:
            why = f'cannot run "{self.text}" in {self.folder}: {error.strerror}'
            return MailError("4.3.0", why)
        try:
            return self.watch(process, iter(chunks), asker)
        finally:
            self.end(process)

    def watch(self, process: object, chunks: object, asker: int) -> MailError | None:
        """Writes, reads, and looks at the clock until the process ends."""
        import select

        poll = select.poll()
        into, out = process.stdin.fileno(), process.stdout.fileno()
        for fd, events in ((into, select.POLLOUT), (out, select.POLLIN), (asker, 0)):
            os.set_blocking(fd, False)
            poll.register(fd, events)
        tick = self.limit
        if hasattr(os, "pidfd_open"):
            ended = os.pidfd_open(process.pid)
            poll.register(ended, select.POLLIN)
        else:
            tick = TICK
        give_up = time.monotonic() + self.limit
        rest = memoryview(b"")
        while process.poll() is None:
            left = give_up - time.monotonic()
            if left <= 0:
                why = f'Command time limit exceeded: "{self.text}"'
                return MailError("4.3.0", why)
            ready = dict(poll.poll(max(1, 1000 * min(left, tick))))
            if asker in ready:
                return MailError("4.3.0", "nobody waits for the command any more")
            if into in ready:
                rest = self.feed(into, rest, chunks)
                if rest is None:
                    poll.unregister(into)
                    process.stdin.close()
            if out in ready and not self.listen(out):
                poll.unregister(out)
        self.listen(out)
        return verdict(self.text, process.returncode, os_text(bytes(self.output)))

    def feed(self, fd: int, rest: memoryview, chunks: object) -> memoryview | None:
        """Writes a piece of the message; its rest, None at the end."""
        try:
            rest = rest or memoryview(next(chunks, b""))
            if not rest:
                return None
            return rest[os.write(fd, rest) :]
        except BlockingIOError:
            return rest
        except OSError:
            return None  # it has read enough: no failure, says Postfix

    def listen(self, fd: int) -> bool:
        """Keeps the beginning of what it prints; False at the end."""
        try:
            data = os.read(fd, BLOCK)
        except BlockingIOError:
            return True
        self.output += data[: MAX_OUTPUT - len(self.output)]
        return bool(data)

    def end(self, process: object) -> None:
        """Ends it with all that it started, unless it has ended by itself."""
        import signal

        if process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except OSError:
                process.kill()
            process.wait()


# == 22 Resolver: MailHost, Resolver ==========================================
# Asks the name servers of resolv.conf, and reads hosts(5).
# Failures: MailError, in Postfix's words: 5.4.4 for a name that is not there,
# 5.1.10 for a domain that takes no mail, 4.4.3 for what cannot be told now.

DNS_PORT = 53
MAX_KEPT = 86400  # seconds that an answer is believed, whatever it says
MAX_HOSTS = 20  # mail hosts of a domain, and addresses of a host, that are asked
MAX_ANSWERS = 10_000  # that are kept at once


def shuffled(items: list) -> list:
    """The same in any order."""
    return sorted(items, key=lambda _: os.urandom(4))


class MailHost(Value):
    """A host that takes mail: preference (-1: no MX), name, addresses."""

    __slots__ = ("preference", "name", "addresses")

    def __init__(self, preference: int, name: str, addresses: list[str]) -> None:
        self.preference = preference
        self.name = name
        self.addresses = addresses

    def __str__(self) -> str:
        rank = f"MX {self.preference} " if self.preference >= 0 else ""
        where = " ".join(f"[{address}]" for address in self.addresses)
        return f"{rank}{self.name} {where or 'has no address'}"


def read_server(text: str) -> tuple[str, int] | None:
    """(address, port) of `192.0.2.1`, or OpenBSD's `[127.0.0.1]:5353`."""
    try:
        return split_host(text, DNS_PORT) if text[0] == "[" else (text, DNS_PORT)
    except ValueError:
        return None


class Resolver:
    """Looks up names: mail_hosts() and addresses() are its doors.

    A private instance has its own etc/resolv.conf and etc/hosts, where they
    exist. Answers are kept as long as they say.
    """

    def __init__(self, root: str = "") -> None:
        self.files = {}
        for name in ("resolv.conf", "hosts"):
            own = f"{root}/etc/{name}"
            self.files[name] = own if root and os.path.exists(own) else f"/etc/{name}"
        self.servers: list[tuple[str, int]] = []
        self.kept: dict[tuple, tuple[float, list[Record]]] = {}
        self.mark: tuple = ()
        self.asked = 0
        self.renew()

    def renew(self) -> None:
        """Reads resolv.conf, if it has changed: a laptop moves about."""
        try:
            seen = os.stat(self.files["resolv.conf"])
            mark = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
        except OSError:
            mark = (0,)
        if mark != self.mark:
            self.mark = mark
            self.timeout, self.attempts, self.options = 5, 2, set()  # resolv.conf(5)
            lines = self.lines("resolv.conf")
            found = [
                words[1] for words in lines if words[0] == "nameserver" and words[1:]
            ]
            self.servers = [server for server in map(read_server, found) if server]
            for words in lines:
                self.read_option(words)

    def lines(self, name: str) -> list[list[str]]:
        """The words of each line of a file; none where it cannot be read."""
        try:
            with open(self.files[name], encoding="utf-8", errors="replace") as file:
                lines = file.read(1 << 20).split("\n")
        except OSError:
            return []
        found = (line.partition("#")[0].partition(";")[0].split() for line in lines)
        return [words for words in found if words]

    def read_option(self, words: list[str]) -> None:
        """The options of a line of resolv.conf(5) that mean something here."""
        for word in words[1:] if words[0] == "options" else []:
            name, _, value = word.partition(":")
            if name in ("timeout", "attempts") and is_number(value):
                setattr(self, name, max(1, min(30, int(value))))
            self.options.add(name)

    def mail_hosts(self, domain: str) -> list[MailHost]:
        """The hosts that take mail for a domain, best first, RFC 5321 5.1.

        Raises MailError.
        """
        self.renew()
        try:
            records = self.lookup(domain, "MX")
        except MailError:
            if not self.from_hosts(domain):
                raise
            records = []  # a name that this host alone knows
        if not records:
            return [MailHost(0, domain, self.first_of(domain))]
        pairs = [record.data for record in records]
        if pairs == [(0, "")]:  # RFC 7505
            why = f"Domain {domain} does not accept mail (nullMX)"
            raise MailError("5.1.10", why, "none")
        pairs = [pair for pair in pairs if pair[1] != ODD_NAME]
        if not pairs:
            why = "Malformed or unexpected name server reply"
            raise self.failure("5.4.4", domain, "MX", why)
        # Equals in any order: each takes its share.
        pairs.sort(key=lambda pair: (pair[0], os.urandom(2)))
        found, failure = [], None
        for preference, name in pairs[:MAX_HOSTS]:
            try:
                addresses = self.addresses(name)
            except MailError as error:
                addresses, failure = [], error
            found.append(MailHost(preference, name, addresses))
        if failure and not any(host.addresses for host in found):
            raise failure
        return found

    def host(self, name: str) -> list[MailHost]:
        """The one host of that name, or address. Raises MailError."""
        self.renew()
        is_address = ":" in name or is_literal(f"[{name}]")
        return [MailHost(-1, name, [name] if is_address else self.addresses(name))]

    def first_of(self, domain: str) -> list[str]:
        """The addresses of a domain without MX: none at all is for good."""
        found = self.addresses(domain)
        if not found:
            why = "Host found but no data record of requested type"
            raise self.failure("5.4.4", domain, "A", why)
        return found

    def addresses(self, name: str) -> list[str]:
        """The addresses of a host; [] for one that has none or is not there.

        Raises MailError for what cannot be told now.
        """
        found, failure = self.from_hosts(name), None
        for kind in () if found else ("A", "AAAA"):
            try:
                found += [record.data for record in self.lookup(name, kind)]
            except MailError as error:
                failure = error if error.is_temporary else failure
        if failure and not found:
            raise failure
        return found[:MAX_HOSTS]

    def from_hosts(self, name: str) -> list[str]:
        """The addresses that the hosts file has for a name."""
        return [
            words[0]
            for words in self.lines("hosts")
            if name.lower() in (word.lower() for word in words[1:])
        ]

    def failure(self, status: str, name: str, kind: str, why: str) -> MailError:
        """A failure in Postfix's words."""
        text = f"Host or domain name not found. Name service error for name={name}"
        return MailError(status, f"{text} type={kind}: {why}", "none")

    def lookup(self, name: str, kind: str, aliases: int = 0) -> list[Record]:
        """The records of that kind for a name. Raises MailError.

        What an alias stands for may have to be asked for by itself.
        """
        key = name.lower().rstrip("."), kind
        expires, found = self.kept.get(key, (0.0, []))
        if expires > time.monotonic():
            return found
        try:
            answer = self.ask(name, kind)
            found, last = answer.follow(key[0], kind) if answer else ([], "")
            if aliases > MAX_CNAMES:
                raise ValueError(name)
        except ValueError:
            raise self.failure("5.4.4", name, kind, "Malformed name") from None
        if answer is None or answer.code not in (0, NXDOMAIN):
            raise self.failure("4.4.3", name, kind, "Host not found, try again")
        if answer.code == NXDOMAIN:
            raise self.failure("5.4.4", name, kind, "Host not found")
        if not found and last != key[0]:
            return self.lookup(last, kind, aliases + 1)
        ttl = min([record.ttl for record in found] or [0])
        if len(self.kept) >= MAX_ANSWERS:
            self.kept.clear()
        self.kept[key] = time.monotonic() + min(ttl, MAX_KEPT), found
        return found

    def ask(self, name: str, kind: str) -> Answer | None:
        """The first answer of a server that knows; None if there is none."""
        last = None
        servers = self.servers or [("127.0.0.1", DNS_PORT)]
        first = self.asked % len(servers) if "rotate" in self.options else 0
        self.asked += 1
        for _ in range(self.attempts):
            for server in servers[first:] + servers[:first]:
                answer = self.ask_server(server, name, kind, True)
                if answer and answer.code in NO_EDNS:  # RFC 6891 section 7
                    answer = self.ask_server(server, name, kind, False)
                if answer and answer.code in (0, NXDOMAIN):
                    return answer
                last = answer or last
        return last

    def ask_server(
        self, server: tuple, name: str, kind: str, has_edns: bool
    ) -> Answer | None:
        """One server's answer, by TCP where UDP had no room; None for none.

        A fresh socket has a port of the kernel's choice, and takes packets of
        that server only; the id is of our own dice (RFC 5452 section 9.2).
        """
        import socket

        number = int.from_bytes(os.urandom(2), "big")
        packet = encode_question(number, name, kind, has_edns)
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        end = time.monotonic() + self.timeout
        forms = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
        for form in forms[1:] if "use-vc" in self.options else forms:
            try:
                with socket.socket(family, form) as connection:
                    connection.settimeout(self.timeout)
                    connection.connect(server)
                    answer = self.exchange(connection, form, packet, (name, kind), end)
            except OSError:
                return None
            if answer is None or not answer.is_cut:
                return answer
        return None

    def exchange(
        self, connection: object, form: int, packet: bytes, asked: tuple, end: float
    ) -> Answer | None:
        """Sends the question, reads until its answer comes. Raises OSError."""
        import socket

        is_stream = form == socket.SOCK_STREAM
        size = len(packet).to_bytes(2, "big") if is_stream else b""
        connection.sendall(size + packet)
        number = int.from_bytes(packet[:2], "big")
        while time.monotonic() < end:
            connection.settimeout(max(0.01, end - time.monotonic()))
            try:
                # What is longer by UDP than was asked for is no answer.
                read = self.read_stream if is_stream else self.read_packet
                return decode_answer(read(connection), number, *asked)
            except ValueError:
                if is_stream:
                    return None
        return None  # forged or broken packets only

    def read_packet(self, connection: object) -> bytes:
        """One packet by UDP. Raises OSError."""
        return connection.recv(DNS_SIZE)

    def read_stream(self, connection: object) -> bytes:
        """One packet with its length before it, RFC 7766. Raises OSError."""
        data, wanted = b"", 2
        while len(data) < wanted:
            more = connection.recv(65537 - len(data))
            if not more:
                raise ConnectionError("the name server hung up")
            data += more
            if len(data) >= 2:
                wanted = 2 + int.from_bytes(data[:2], "big")
        return data[2:wanted]


# == 23 Relay: Parcel, FarHost, Dialogue, Relay ===============================
# Hands mail to another host by SMTP or LMTP, with smtplib, without rights.
# Source: RFC 5321 section 4.5.3.2 (time-outs), 2920, 1870, 6152, 6531, 3207,
# 4954, 3461.
# Failures: MailError with the host's own words, as Postfix puts them.

CONNECT_TIMEOUT = 30  # seconds
REPLY_TIMEOUT = 300  # the greeting, EHLO, MAIL, RCPT
DATA_TIMEOUT = 120  # the reply to DATA
BLOCK_TIMEOUT = 180  # until a block of the message is taken
FINAL_TIMEOUT = 600  # the reply to the message's end
GOODBYE_TIMEOUT = 5  # QUIT: what is said to it does not matter
WIRE_BLOCK = 1 << 16  # bytes that are sent at once
MAX_REPLY_LINES = 100
MAX_REPLY_LINE = 2000  # bytes
MAX_SAID = 400  # lines of a dialogue that are kept
# Replies to these are about the host, and not about any mail.
NOT_FOR_GOOD = ("initial connection", "STARTTLS command")
LOST_AT_END = "sending end of data -- message may be sent more than once"
# Names that no other host can look up: EHLO needs another one.
NO_NAMES = ("localdomain", "localhost", "invalid")
LOCAL_NAMES = (*NO_NAMES, "local", "internal", "lan")


def is_loopback(address: str) -> bool:
    """Whether an address, "" for a socket's path, is of this very host."""
    return address.startswith("127.") or address in ("::1", "")


class FarHost(Value):
    """A host to connect to: its hop, its name, its address."""

    __slots__ = ("hop", "host", "address")

    def __init__(self, hop: NextHop, host: str, address: str) -> None:
        self.hop = hop
        self.host = host
        self.address = address

    def __str__(self) -> str:
        return f"{self.host}[{self.address}]:{self.hop.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent there stays on the host."""
        return is_loopback(self.address)


class Parcel:
    """What goes to one host in one transaction.

    `head` is put before the message (Delivered-To of a forward); `wishes` maps
    each recipient to its Wishes; `rewriter` is None where addresses stay.
    """

    def __init__(
        self, message: QueueFile, sender: str, head: bytes, rewriter: Rewriter | None
    ) -> None:
        self.message = message
        self.head = head
        self.rewriter = rewriter
        self.sender = rewriter.sender(sender) if rewriter else sender
        self.wishes: dict[str, Wishes] = {}
        self.survey = survey(self.chunks())

    def chunks(self) -> object:
        """The message as other hosts see it (LF), in pieces."""
        if self.head:
            yield self.head
        chunks = self.message.chunks()
        if self.rewriter:
            block = take_head(chunks)
            if b"\n\n" in block or len(block) <= MAX_HEADER:
                header = Header.parse(block)
                size = sum(len(raw) for _, raw in header.fields)
                block = bytes(self.rewriter.header(header)) + block[size:]
            yield block
        yield from chunks

    @property
    def needs_utf8(self) -> bool:
        """Whether an address or the header is not ASCII, RFC 6531."""
        if not all(name.isascii() for name in (self.sender, *self.wishes)):
            return True
        return not take_head(self.chunks()).partition(b"\n\n")[0].isascii()

    def fitting(self, has: object) -> object:
        """The message as a host with these extensions can take it.

        Raises MailError where that would break a signature.
        """
        is_7bit = not has("8bitmime") and not self.survey.is_ascii
        is_long = self.survey.longest > LONGEST_LINE
        if not is_7bit and not is_long or self.rewriter is None:
            return self.chunks()
        plan = Plan(self.chunks(), is_7bit)
        if plan.is_signed:
            why, status = "has lines over 998 bytes", "5.6.1"
            if not is_long:
                why, status = "is 8-bit, which the next host does not take", "5.6.3"
            text = f"the message {why}, and is signed: it cannot be encoded anew"
            raise MailError(status, text, "none")
        return Converter(plan).convert(self.chunks())

    def mail_options(self, has: object) -> str:
        """Parameters of MAIL that the host knows. RFC 3461 section 4."""
        envelope = self.message.envelope
        ret = f" RET={envelope.ret}" if envelope.ret else ""
        envid = f" ENVID={envelope.envid}" if envelope.envid else ""
        offers = (
            ("size", f" SIZE={self.survey.size}"),
            ("8bitmime", "" if self.survey.is_ascii else " BODY=8BITMIME"),
            ("smtputf8", " SMTPUTF8" if "SMTPUTF8" in envelope.body else ""),
            ("dsn", ret + envid),
        )
        return "".join(text for word, text in offers if has(word))


class BadReply(Exception):
    """A reply that is none: no code, too long, two codes in one."""


class Stale(Exception):
    """The host has hung up since the last message: nothing was sent yet."""


class Dialogue:
    """smtplib's client that remembers what was said and trusts no reply.

    One connection; `said` is the dialogue, secrets starred. See make_client.
    """

    def __init__(self, name: str) -> None:
        self.said: list[str] = []
        self.held = b""
        self.patience = REPLY_TIMEOUT
        self.secrets: list[str] = []  # what must not be told
        super().__init__(local_hostname=name)

    def starred(self, line: str) -> str:
        """A line with stars for secrets, whoever says them."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            if len(secret) > 3:
                line = line.replace(secret, "****")
        return line

    def note(self, who: str, line: str) -> None:
        """Keeps one line of the dialogue."""
        if len(self.said) < MAX_SAID:
            self.said.append(f"{who}: {printable(self.starred(line), 300)}")

    def send(self, s: str | bytes) -> None:
        """Sends commands."""
        data = s if isinstance(s, bytes) else os_bytes(s)
        for line in os_text(data).split("\r\n")[:-1]:
            self.note("C", line)
        self.sock.settimeout(self.patience)
        self.sock.sendall(data)

    def getreply(self) -> tuple[int, bytes]:
        """(code, text) of one reply. Raises BadReply, OSError.

        One deadline for all of it: who sends it byte by byte gains nothing.
        """
        end = time.monotonic() + self.patience
        codes, texts = set(), []
        while True:
            line = self.read_line(end)
            self.note("S", os_text(line))
            codes.add(line[:3])
            texts.append(os_bytes(self.starred(os_text(line[4:]))))
            is_code = len(line) > 2 and line[:3].isdigit() and b"2" <= line < b"6"
            if not is_code or line[3:4] not in (b"", b" ", b"-") or len(codes) > 1:
                raise BadReply(self.starred(os_text(line)))
            if line[3:4] != b"-":
                return int(line[:3]), b"\n".join(texts)
            if len(texts) >= MAX_REPLY_LINES:
                raise BadReply("a reply without end")

    def read_line(self, end: float) -> bytes:
        """One line, without its end."""
        while b"\n" not in self.held:
            if len(self.held) > MAX_REPLY_LINE:
                raise BadReply("a line without end")
            self.sock.settimeout(max(0.01, end - time.monotonic()))
            data = self.sock.recv(4096)
            if not data:
                raise ConnectionError("lost connection")
            self.held += data
        line, _, self.held = self.held.partition(b"\n")
        if len(line) > MAX_REPLY_LINE:
            raise BadReply("a line without end")
        return line.rstrip(b"\r")


def make_client(is_lmtp: bool, name: str) -> object:
    """A client that says hello as `name`; smtplib costs 30 ms: not before."""
    import smtplib

    words = {"ehlo_msg": "LHLO" if is_lmtp else "EHLO"}
    return type("Client", (Dialogue, smtplib.SMTP), words)(name)


def base64_text(data: bytes) -> str:
    """`data` in base64, on one line; nothing is `=`, RFC 4954 section 4."""
    import binascii

    return binascii.b2a_base64(data, newline=False).decode() if data else "="


def unbase64(text: bytes) -> bytes:
    """What a challenge says; one that says nothing readable says nothing."""
    import binascii

    try:
        return binascii.a2b_base64(text)
    except ValueError:
        return b""


# How a password is shown: a generator that is sent the host's challenges. The
# first answer goes with AUTH; None: the host speaks first.


def auth_plain(user: str, password: str) -> object:
    """RFC 4616."""
    yield b"\0" + os_bytes(user) + b"\0" + os_bytes(password)


def auth_login(user: str, password: str) -> object:
    """draft-murchison-sasl-login."""
    yield None
    yield os_bytes(user)
    yield os_bytes(password)


def auth_cram(user: str, password: str) -> object:
    """CRAM-MD5, RFC 2195."""
    import hmac

    challenge = yield None
    digest = hmac.new(os_bytes(password), challenge, "md5").hexdigest()
    yield os_bytes(f"{user} {digest}")


def auth_token(user: str, password: str) -> object:
    """XOAUTH2, as Google has it; a refusal wants an empty line."""
    token = password.removeprefix("Bearer ").strip()
    yield os_bytes(f"user={user}\x01auth=Bearer {token}\x01\x01")
    yield b""


MECHANISMS = {
    "PLAIN": auth_plain,
    "LOGIN": auth_login,
    "CRAM-MD5": auth_cram,
    "XOAUTH2": auth_token,
}


def secret_forms(user: str, password: str) -> list[str]:
    """A password as a host may say it back: plain, a bare token, in base64."""
    forms = {password, password.removeprefix("Bearer ").strip()}
    wire = [os_bytes(text) for text in (*forms, f"\0{user}\0{password}")]
    return [*forms, *(base64_text(data).rstrip("=") for data in wire)]


def choose_mechanism(offered: list[str], is_secure: bool, password: str) -> str:
    """The mechanism for a password, "" if none will do.

    In clear only what does not show it; XOAUTH2 for what looks like a token,
    or where nothing else is offered.
    """
    known = [name for name in MECHANISMS if name in offered]
    if not is_secure:
        return "CRAM-MD5" if "CRAM-MD5" in known else ""
    is_token = password.startswith(("ya29.", "eyJ", "Bearer "))
    if is_token and "XOAUTH2" in known:
        return "XOAUTH2"
    return known[0] if known else ""


def has_tls() -> bool:
    """Whether this Python was built with TLS."""
    try:
        import ssl  # noqa: F401
    except ImportError:
        return False
    return True


class Contexts:
    """TLS contexts, each made once: one that checks, one that does not."""

    def __init__(self, authorities: str) -> None:
        self.authorities = authorities
        self.made: dict[bool, object] = {}

    def get(self, checks: bool) -> object:
        """The context for a handshake. Raises MailError."""
        if not has_tls():
            why = "TLS is required, but this Python has none: install its ssl module"
            raise MailError("4.7.4", why, "none")
        import ssl

        if checks not in self.made:
            try:
                context = ssl.create_default_context(cafile=self.authorities or None)
            except OSError as error:
                why = f"smtp_tls_CAfile: {self.authorities}: {error.strerror or error}"
                raise MailError("4.3.5", why, "none") from None
            # 3.13 is stricter: a private CA as openssl makes it is none.
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
            if not checks:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self.made[checks] = context
        return self.made[checks]


# =============================================================================
# WORK: what is done with them.
# =============================================================================


class Relay:
    """One connection to one host: connect(), send(), quit().

    `level` is the TLS that is wanted, `secret` (user, password) or None,
    `contexts` makes TLS contexts. Raises MailError for what concerns all mail
    for this host; then the next one may be tried.
    """

    def __init__(self, settings: Settings, target: FarHost, level: str) -> None:
        self.settings = settings
        self.target = target
        self.name = str(target)
        if not target.hop.port:
            self.name = f"{settings.myhostname}[{target.hop.host}]"
        self.level = level
        self.stage = "connecting"
        self.tls = ""  # what was agreed on, for the trace
        self.is_good = False  # whether another message may be sent
        self.is_used = False
        self.offers_dsn = False
        self.crowded: list[str] = []  # for whom there was no room just now
        self.missed: list[MailError] = []  # why those tried before it did not do
        self.smtp: object = None

    def said(self) -> list[str]:
        """The dialogue of the last transaction."""
        return list(self.smtp.said) if self.smtp else []

    # Connecting

    def connect(self, contexts: Contexts, secret: tuple | None) -> None:
        """Connects, says hello, agrees on TLS, logs in. Raises MailError."""
        try:
            self.open(contexts)
            self.hello()
            self.secure(contexts, secret)
            if secret:
                self.log_in(secret)
        except (OSError, BadReply) as error:
            failure = self.lost(error)
            if self.is_tls_refused(error):
                why = getattr(error, "reason", "") or "it hung up after the handshake"
                why = f"TLS with {self.name} failed: {why}"
                raise MailError("4.7.5", why, "none") from None
            raise MailError("4.4.1", failure.text, "none") from None
        except MailError:
            self.quit()
            raise
        self.offers_dsn = self.smtp.has_extn("dsn")
        self.is_good = True

    def open(self, contexts: Contexts) -> None:
        """Connects and reads the greeting. Raises OSError, MailError."""
        import socket

        hop, target = self.target.hop, self.target
        self.smtp = make_client(hop.kind == "lmtp", self.hello_name(None))
        if hop.port:
            place = (target.address, hop.port)
            sock = socket.create_connection(place, CONNECT_TIMEOUT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.smtp.local_hostname = self.hello_name(sock)
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(CONNECT_TIMEOUT)
            self.smtp.sock = sock
            sock.connect(target.hop.host)
        self.smtp.sock = sock
        sock.settimeout(REPLY_TIMEOUT)
        if hop.kind == "smtps":
            self.start_tls(contexts)
        self.stage = "receiving the initial server greeting"
        code, text = self.smtp.getreply()
        if code // 100 != 2:  # a host that lets nobody in today: try it again
            raise self.refusal("initial connection", code, text)

    def hello_name(self, sock: object) -> str:
        """Our name for EHLO, RFC 5321 section 4.1.4; an address if need be."""
        name, source = self.settings.myhostname, self.settings.sources["myhostname"]
        name = name.rstrip(".")
        # What somebody has set is meant, also where nobody can look it up.
        strange = LOCAL_NAMES if source == SYSTEM_NAME else NO_NAMES
        is_meant = name.rpartition(".")[2] not in strange
        if sock is None or "." in name and is_meant and not is_literal(f"[{name}]"):
            return name
        address = sock.getsockname()[0]
        return f"[IPv6:{address}]" if ":" in address else f"[{address}]"

    def hello(self) -> None:
        """EHLO, or HELO where that is not known. Raises MailError."""
        self.stage = "performing the EHLO handshake"
        code, text = self.smtp.ehlo()
        if 500 <= code < 600 and self.target.hop.kind != "lmtp":
            code, text = self.smtp.helo()
        if code // 100 != 2:
            raise self.refusal("EHLO command", code, text)

    def secure(self, contexts: Contexts, secret: tuple | None) -> None:
        """STARTTLS, as the level says. Raises MailError, OSError."""
        is_offered = self.smtp.has_extn("starttls")
        is_near = self.level == "check" and self.target.is_loopback
        if self.tls or self.level == "none":
            return
        if not is_offered or self.level == "may" and not has_tls():
            if self.level == "may" or is_near:
                return
            why = f"TLS is required, but was not offered by host {self.name}"
            raise MailError("4.7.4", why, "none")
        self.stage = "performing the STARTTLS handshake"
        code, text = self.smtp.docmd("STARTTLS")
        if code != 220:
            if self.level == "may":
                return
            raise self.refusal("STARTTLS command", code, text)
        self.smtp.held = b""  # what came before the handshake is nobody's word
        self.smtp.esmtp_features = {}
        self.start_tls(contexts)
        self.hello()

    def start_tls(self, contexts: Contexts) -> None:
        """The handshake. Raises MailError."""
        checks = self.level in ("check", "verify")
        context, name = contexts.get(checks), self.target.host
        try:
            sock = context.wrap_socket(self.smtp.sock, server_hostname=name)
        except OSError as error:  # TLS's own, or it hung up, or was silent
            self.drop()
            if hasattr(error, "verify_message"):
                raise self.distrust(contexts, error) from None
            why = getattr(error, "reason", "") or error.strerror or error
            why = f"TLS with {self.name} failed: {why}"
            raise MailError("4.7.5", why, "none") from None
        self.smtp.sock = sock
        cipher, protocol, _ = sock.cipher()
        self.tls = f"{protocol} {cipher}, {'verified' if checks else 'not verified'}"
        self.smtp.note("-", self.tls)

    def is_tls_refused(self, error: Exception) -> bool:
        """Whether the host hung up before its first word over TLS.

        So late does TLS 1.3 refuse; what it says of why can get lost.
        """
        if not self.tls or isinstance(error, BadReply) or "timed out" in str(error):
            return False
        said = self.said()
        said = said[said.index(f"-: {self.tls}") :]
        return hasattr(error, "library") or not any(line[0] == "S" for line in said)

    def distrust(self, contexts: Contexts, error: object) -> MailError:
        """The failure for a certificate: which, for which name, until when.

        The handshake ended before it could be seen: it is asked for again.
        """
        name, why = self.target.host, error.verify_message or str(error.reason)
        other = Relay(self.settings, self.target, "encrypt")
        shown = "it could not be read"
        try:
            other.open(contexts)
            other.hello()
            other.secure(contexts, None)
            shown = certificate_facts(other.smtp.sock.getpeercert(True))
        except (OSError, ValueError, BadReply, MailError):
            pass  # then it is not told
        other.quit()
        text = f"certificate of {self.name} is not trusted for {name}: {why} ({shown})"
        return MailError("4.7.5", text, "none")

    def log_in(self, secret: tuple[str, str]) -> None:
        """AUTH, with the best mechanism there is. Raises MailError."""
        offered = self.smtp.esmtp_features.get("auth", "").upper().split()
        name = choose_mechanism(offered, bool(self.tls), secret[1])
        if not name:
            why = "no way to log in"
            if not self.tls:
                why = "it offers no TLS, and a password is not sent in clear"
            raise MailError("4.7.8", f"host {self.name}: {why}", self.name)
        self.stage = f"authenticating by {name}"
        answers = MECHANISMS[name](*secret)
        first = next(answers)
        word = f" {base64_text(first)}" if first is not None else ""
        self.smtp.secrets = [*secret_forms(*secret), word.strip()]
        try:
            code, text = self.smtp.docmd(f"AUTH {name}{word}")
            while code == 334:
                answer = answers.send(unbase64(text))
                shown = base64_text(answer)
                digest = os_text(answer.rpartition(b" ")[2])
                self.smtp.secrets += [shown, digest if name == "CRAM-MD5" else ""]
                code, text = self.smtp.docmd(shown)
        except StopIteration:
            raise MailError("4.7.0", f"{self.name} asks too much", self.name) from None
        if code != 235:
            failure = self.refusal("AUTH command", code, text)
            status = "4.7.8" if code >= 500 else f"4.7{failure.status[3:]}"
            raise MailError(status, failure.text, self.name)

    # Sending

    def send(self, parcel: Parcel) -> dict:
        """Sends one message; recipient -> (status, text) or MailError.

        Raises Stale if the host had hung up before.
        """
        import select

        if self.is_used:
            self.smtp.said[:] = ["-: the connection was used before"]
            if self.smtp.held or select.select([self.smtp.sock], [], [], 0)[0]:
                self.drop()  # it has said more than it was asked, or has hung up
                raise Stale
        self.check(parcel)
        chunks = parcel.fitting(self.smtp.has_extn)
        results: dict = {}
        try:
            good = self.offer(parcel, results)
            self.is_used = True
            if good:
                self.send_text(parcel, chunks, good, results)
        except (OSError, BadReply) as error:
            failure = self.lost(error)
            for recipient in parcel.wishes:
                results.setdefault(recipient, failure)
        return results

    def check(self, parcel: Parcel) -> None:
        """Raises MailError for what this host does not take at all."""
        body, has = parcel.message.envelope.body, self.smtp.has_extn
        if "SMTPUTF8" in body and not has("smtputf8") and parcel.needs_utf8:
            raise MailError("5.6.7", f"{self.name} does not offer SMTPUTF8", self.name)
        limit = self.smtp.esmtp_features.get("size", "") if has("size") else ""
        size = parcel.survey.size
        if limit.isascii() and limit.isdigit() and 0 < int(limit) < size:
            why = f"message size {size} exceeds size limit {limit} of server"
            raise MailError("5.3.4", f"{why} {self.name}", self.name)

    def offer(self, parcel: Parcel, results: dict) -> list[str]:
        """MAIL, RCPT, DATA: who is taken. Raises MailError, OSError, Stale."""
        is_group, good = self.smtp.has_extn("pipelining"), []
        replies = self.converse(self.commands(parcel))
        if self.is_used:
            self.take_reset(replies)
        mail = self.hear("MAIL FROM", replies, 2)
        if mail and mail.is_temporary and self.is_used:
            self.drop()  # so many over one connection are too many for it
            raise Stale
        if mail:
            results.update(dict.fromkeys(parcel.wishes, mail))
        for name in parcel.wishes if is_group or not mail else ():
            refusal = self.hear("RCPT TO", replies, 2)
            if refusal:
                results.setdefault(name, refusal)
            elif not mail:
                good.append(name)
        self.crowded = [name for name in results if results[name].code in (452, 552)]
        if good or is_group:
            refusal = self.hear("DATA", replies, 3, DATA_TIMEOUT)
            if refusal:
                results.update(dict.fromkeys(good, refusal))
                return []
            if not good:
                self.drop()  # nobody is to get even an empty message
        return good

    def commands(self, parcel: Parcel) -> list[str]:
        """The commands of a transaction; RSET asks whether it lives."""
        options = parcel.mail_options(self.smtp.has_extn)
        found = ["RSET"] if self.is_used else []
        found.append(f"MAIL FROM:<{parcel.sender}>{options}")
        for name, wishes in parcel.wishes.items():
            options = wishes.parameters() if self.offers_dsn else ""
            found.append(f"RCPT TO:<{name}>{options}")
        return [*found, "DATA"]

    def hear(
        self, verb: str, replies: object, wanted: int, patience: int = REPLY_TIMEOUT
    ) -> MailError | None:
        """The refusal in the next reply, None for one of the wanted hundred.

        The first digit decides, RFC 5321 section 4.3.2.
        """
        self.stage, self.smtp.patience = f"sending {verb}", patience
        code, text = next(replies)
        return (
            None
            if code // 100 == wanted
            else self.refusal(f"{verb} command", code, text)
        )

    def converse(self, commands: list[str]) -> object:
        """The replies to commands, sent at once where they may be."""
        if any("\r" in command or "\n" in command for command in commands):
            raise MailError("5.1.3", "a line end in an address", "none")
        is_group = self.smtp.has_extn("pipelining")
        if is_group:
            self.smtp.send("".join(f"{command}\r\n" for command in commands))
        for command in commands:
            if not is_group:
                self.smtp.send(f"{command}\r\n")
            yield self.smtp.getreply()

    def take_reset(self, replies: object) -> None:
        """The reply to RSET. Raises Stale: nothing is lost, nothing sent."""
        try:
            code, _ = next(replies)
        except (OSError, BadReply):
            code = 421
        if code != 250:
            self.drop()
            raise Stale

    def send_text(
        self, parcel: Parcel, chunks: object, good: list[str], results: dict
    ) -> None:
        """The message itself, streamed; then what the host says of each.

        LMTP has a reply for each recipient, RFC 2033 section 4.2.
        """
        self.stage = "sending message body"
        self.smtp.note("C", f"... {parcel.survey.size} bytes of message")
        try:
            for block in even_blocks(dot_stuffed(chunks), WIRE_BLOCK):
                self.smtp.sock.settimeout(BLOCK_TIMEOUT)
                self.smtp.sock.sendall(block)
        except OSError as error:
            results.update(dict.fromkeys(good, self.early_reply(error)))
            return
        self.stage, self.smtp.patience = LOST_AT_END, FINAL_TIMEOUT
        if self.target.hop.kind == "lmtp":
            for name in good:
                results[name] = self.final_reply()
        else:
            results.update(dict.fromkeys(good, self.final_reply()))
        self.smtp.patience = REPLY_TIMEOUT
        if self.smtp.held:  # it has said more than it was asked
            self.drop()

    def early_reply(self, error: OSError) -> MailError:
        """Why the host takes no more of a message; it may have said so."""
        self.smtp.patience = GOODBYE_TIMEOUT
        try:
            code, text = self.smtp.getreply()
        except (OSError, BadReply):
            return self.lost(error)
        failure = self.refusal("message body", code, text)
        self.drop()
        return failure

    def final_reply(self) -> tuple[str, str] | MailError:
        """(status, the host's words) behind the message's end, or why not."""
        if self.smtp.sock is None:
            return MailError("4.4.2", f"lost connection with {self.name}", self.name)
        try:
            code, text = self.smtp.getreply()
        except (OSError, BadReply) as error:
            return self.lost(error)
        if 300 <= code < 400:  # whatever it waits for: we are out of step
            self.drop()
        if not 200 <= code < 300:
            return self.refusal("end of DATA command", code, text)
        return "2.0.0", printable(f"{code} {os_text(text)}".replace("\n", " "), 300)

    # Failing

    def refusal(self, stage: str, code: int, text: bytes) -> MailError:
        """The failure for a reply; anything but 5xx may succeed later."""
        words = printable(os_text(text).replace("\n", " "), 500)
        status = words.partition(" ")[0]
        # RFC 5321 section 4.5.3.1.10: 552 to RCPT is too many of them.
        is_later = code == 552 and stage.startswith("RCPT") or stage in NOT_FOR_GOOD
        # It wants a password: that is for us to mend.
        is_later |= code in (530, 534, 538) and self.target.hop.kind != "mx"
        kind = "5" if 500 <= code < 600 and not is_later else "4"
        is_like_code = is_status(status) and status[0] == str(code)[0]
        status = f"{kind}{status[1:]}" if is_like_code else f"{kind}.0.0"
        if code == 421:
            self.is_good = False
        said = f"host {self.name} said: {code} {words} (in reply to {stage})"
        return MailError(status, said, self.name, code)

    def lost(self, error: Exception) -> MailError:
        """The failure for a connection that is no more."""
        self.drop()
        if isinstance(error, BadReply):
            why = f"{printable(str(error), 200)!r} is no reply"
            text = f"protocol error of {self.name} while {self.stage}: {why}"
            return MailError("4.5.0", text, self.name)
        if self.stage == "connecting":
            why = getattr(error, "strerror", None) or str(error) or "lost connection"
            why = "Connection timed out" if "timed out" in why else why
            return MailError("4.4.1", f"connect to {self.name}: {why}", "none")
        what = "lost connection with"
        if "timed out" in str(error):
            what = "timed out: conversation with"
        text = f"{what} {self.name} while {self.stage}"
        return MailError("4.4.2", text, self.name)

    def drop(self) -> None:
        """Hangs up without a word."""
        self.is_good = False
        if self.smtp is not None:
            self.smtp.close()

    def quit(self) -> None:
        """Says goodbye; what the host says to that does not matter."""
        if self.smtp is None or self.smtp.sock is None:
            return
        self.smtp.patience = GOODBYE_TIMEOUT
        try:
            self.smtp.docmd("QUIT")
        except (OSError, BadReply):
            pass
        self.drop()


# == 24 Routing: Destination, Trail, Router, TargetCheck ======================
# Where mail for an address goes, decided anew for each attempt; what `explain`
# draws is drawn on the way.
# Failures: a Destination of kind error; verify() raises MailError.

MAX_DESTINATIONS = 200_000  # of one recipient, or it is deferred
MAX_LINES = 250_000  # of all lists that one recipient leads to
USER_LINES = 20_000  # of those that a user's .forward leads to
MAX_COMPLAINTS = 10  # lines of one list that the log names
MAX_LOOKUPS = 20  # domains whose mail hosts one explanation asks for


class Destination(Value):
    """One final target of a recipient.

    `kind`: mailbox, maildir, file, pipe, lmtp, remote, null, include (a list
    that was not read) or error. `target` is the address it was reached by,
    `place` a path, a command or a next hop, `user` whose rights it takes.
    `forwarders` are those it went through, last one first; `sender` is the
    owner of a list, or "". `detail` is what followed the user's name.
    """

    __slots__ = (
        *("kind", "target", "place", "user", "folder"),
        *("detail", "forwarders", "sender", "error"),
    )

    def __init__(self, kind: str, target: str, place: str = "", **more: object) -> None:
        self.kind = kind
        self.target = target
        self.place = place
        self.user: User | None = more.get("user")
        self.folder: str = more.get("folder", "/")
        self.detail: str = more.get("detail", "")
        self.forwarders: tuple[str, ...] = more.get("forwarders", ())
        self.sender: str = more.get("sender", "")
        self.error: MailError | None = more.get("error")

    @property
    def key(self) -> str:
        """What the journal calls it; the same target gets one copy."""
        if self.kind == "error":  # of one address there may be several
            return f"error/{checksum(self.error.status + self.place):x} {self.target}"
        if self.kind in ADDRESS_KINDS:
            return f"{self.kind} {self.target}"
        uid = f"{self.user.uid} " if self.user else ""
        # As a journal line keeps it, or it would not be found there again.
        return f"{self.kind} {uid}{self.place}".replace("\t", " ")

    def shown(self) -> tuple[str, str]:
        """(what it is, in which way) for an explanation."""
        whose = f"as uid {self.user.uid}" if self.user else ""
        return {
            "mailbox": (f"mailbox {self.place}", f"mbox, {whose}"),
            "maildir": (f"maildir {self.place}", whose),
            "file": (f"file {self.place}", whose),
            "pipe": (f"command {self.place}", f"{whose}, in {self.folder}"),
            "lmtp": (f"mail store {self.place}", f"for <{self.target}>"),
            "null": ("/dev/null: thrown away", ""),
            "include": (f"list {self.place}", "only the daemon and root may read it"),
        }[self.kind]


class Trail:
    """How an address was come by while a recipient is expanded.

    `steps` are ("alias", name), ("user", name) and ("include", path) in order;
    `passed` the names of the message's Delivered-To fields. What one step
    leads to is expanded once for the whole recipient, however often it is
    named. `rights` is whose commands and files these are (None: of aliases),
    `reader` who reads lists (None: their owners), `branch` what is drawn.
    """

    def __init__(self, passed: frozenset, branch: Branch | None = None) -> None:
        self.steps: tuple = ()
        self.passed = passed
        self.visited: set = set()
        self.lines = [0]  # of lists that were read, shared by all that follows
        self.branch = branch
        self.recipient = Address("")
        self.rights: User | None = None
        self.reader: User | None = None
        self.may_run = True
        self.sender = ""

    def changed(self, **changes: object) -> Trail:
        """A copy with these fields changed."""
        trail = Trail.__new__(Trail)
        trail.__dict__.update(self.__dict__, **changes)
        return trail

    def then(self, kind: str, name: str, **changes: object) -> Trail:
        """The trail with one step more."""
        return self.changed(steps=(*self.steps, (kind, name)), **changes)

    def draw(self, text: str, where: str = "", detail: str = "") -> Trail:
        """The trail behind one more line of the drawing, if one is drawn."""
        if self.branch is None:
            return self
        return self.changed(branch=self.branch.grow(text, where, detail))

    def names(self, kind: str) -> list[str]:
        """The names of its steps of one kind."""
        return [name for step, name in self.steps if step == kind]

    @property
    def is_users(self) -> bool:
        """Whether it is a user's .forward that leads here, not an alias."""
        kinds = [kind for kind, _ in self.steps if kind != "include"]
        return kinds[-1:] == ["user"]

    def is_first(self, *place: object) -> bool:
        """Whether `place` is come to for the first time; notes it."""
        is_first = place not in self.visited
        self.visited.add(place)
        return is_first


class Router:
    """Expands recipients by aliases, users, ~/.forward: resolve().

    `files` reads .forward and lists, or is None where that is not allowed (the
    SMTP server's process, a user's `sendmail`).
    """

    def __init__(
        self,
        settings: Settings,
        aliases: AliasMaps,
        users: Users,
        files: TargetFiles | None = None,
        warn: object = None,
    ) -> None:
        self.settings = settings
        self.aliases = aliases
        self.users = users
        self.files = files
        self.warn = warn or (lambda text: None)
        self.transports = MapFiles(settings, "transport_maps")
        self.resolver: Resolver | None = None  # for explanations only
        self.asked: set[str] = set()  # whom it was asked about

    def verify(self, address: Address) -> None:
        """Raises MailError unless mail to a local address can be delivered.

        One good destination is enough; what cannot be told now is no refusal.
        """
        errors = []
        for found in self.resolve(address, frozenset()):
            if found.kind != "error":
                return
            errors.append(found.error)
        if errors:
            raise next(filter(lambda error: error.is_temporary, errors), errors[0])

    def passed(self, texts: list[str]) -> frozenset[str]:
        """Whom a message has been through, by its Delivered-To fields."""
        found = set()
        for text in dict.fromkeys(texts):
            try:
                address = Address.parse(text)
            except MailError:
                continue
            if self.settings.is_local(address.domain):
                found |= {address.local, self.settings.split_detail(address.local)[0]}
        return frozenset(found)

    def resolve(
        self, address: Address, passed: frozenset, branch: Branch | None = None
    ) -> object:
        """The destinations of one recipient, each once, one by one.

        `passed` are those that the message has been through already; on
        `branch` the way to each is drawn.
        """
        seen = set()
        trail = Trail(passed, branch)
        self.aliases.renew()
        for found in self.expand(address, trail):
            if len(seen) >= MAX_DESTINATIONS:
                why = "more destinations than can be remembered"
                yield self.failed(trail, address, "4.3.0", why)
                return
            if found.key not in seen:
                seen.add(found.key)
                yield found
        if not seen:  # an empty list: mail for it must not vanish
            yield self.failed(trail, address, "4.3.5", "it leads to nobody")

    def expand(self, address: Address, trail: Trail) -> object:
        """Destinations of `address`, nothing where it was expanded before."""
        if not trail.is_first(str(address), trail.steps[-1:]):
            return
        failure = magic_failure(address) if self.settings.capture else None
        if failure:
            yield self.refused(trail, address, failure)
            return
        if not self.settings.is_local(address.domain):
            expand = self.expand_remote
            if self.settings.capture:
                expand = self.expand_stranger
            yield from expand(address, trail.draw(f"{address} is elsewhere"))
            return
        route = self.route_of(address)
        if route:
            full = address.qualified(self.settings.local_origin)
            yield from self.expand_route(full, route, trail)
            return
        if not trail.steps:
            trail = trail.draw(self.why_local(address.domain))
        if len(trail.steps) > MAX_DEPTH:
            yield self.failed(trail, address, "5.4.6", "aliases nested too deeply")
            return
        try:
            alias = self.find_alias(address, trail)
        except MailError as error:
            yield self.refused(trail, address, error)
            return
        if alias is None:
            yield from self.expand_user(address, trail)
        else:
            yield from self.expand_alias(address, alias, trail)

    def route_of(self, address: Address) -> MapLine | None:
        """The line of transport_maps that sends local mail elsewhere.

        Not `*`, and a map that cannot be read holds up no local mail.
        """
        try:
            lines = [line for line in self.transports.lines() if line.key != "*"]
            full = address.qualified(self.settings.local_origin)
            line = find_transport(lines, full) if lines else None
            return line if line and read_transport(line)[0] != "local" else None
        except MailError:
            return None

    def why_local(self, domain: str) -> str:
        """For an explanation: why mail for a domain is delivered here."""
        if not domain:
            return "local name"
        if domain.startswith("["):
            return f"local address (inet_interfaces: {domain})"
        return f"local domain (mydestination: {domain})"

    def alias_names(self, address: Address) -> list[str]:
        """The names that an alias for a local address may have, best first."""
        local, domain = address.local.lower(), address.domain.lower().rstrip(".")
        user, detail = self.settings.split_detail(local)
        names = [local, f"{user}{detail[0]}*", user] if detail else [local]
        plain = [local, user] if detail else [local]
        return [f"{name}@{domain}" for name in plain if domain] + names

    def find_alias(self, address: Address, trail: Trail) -> tuple | None:
        """(name, value, its database or None) for an address, or None.

        An alias or .forward that names itself means the next best thing, in
        the end the mailbox. Raises MailError.
        """
        last = trail.steps[-1] if trail.steps else ("", "")
        own = last[1] if last[0] in ("alias", "user") else ""
        names = [name for name in self.alias_names(address) if name != own]
        found = self.aliases.lookup(names)
        if found is None:
            for name in names:
                if name in BUILT_IN_ALIASES and self.users.lookup(name) is None:
                    return name, BUILT_IN_ALIASES[name], None
        return found

    def expand_alias(self, address: Address, alias: tuple, trail: Trail) -> object:
        """Destinations of an alias: (name, value, its database or None)."""
        name, value, source = alias
        if ("alias", name) in trail.steps:
            why = f"alias database loop for {printable(name, 100)}"
            yield self.failed(trail, address, "5.4.6", why)
            return
        if name in trail.passed:
            why = f"mail forwarding loop for {printable(name, 100)}"
            yield self.failed(trail, address, "5.4.6", why)
            return
        try:
            sender = self.list_owner(name) or trail.sender
        except MailError as error:
            yield self.refused(trail, address, error)
            return
        if trail.branch:
            where = source.where(name) if source else "built in"
            detail = f"sender is {sender}" if sender != trail.sender else ""
            trail = trail.draw(f"alias {name} -> {value}", where, detail)
            if source and source.problem:
                trail.draw(source.problem)
        changes = {"recipient": address, "rights": None, "reader": None}
        is_plain = source is None or not set("|/:") & set(value)
        changes.update(sender=sender, may_run=is_plain or not source.is_shared)
        yield from self.expand_targets(value, trail.then("alias", name, **changes))

    def list_owner(self, name: str) -> str:
        """The address of owner-LIST where there is one, or "".

        It becomes the sender of what LIST expands to, as in sendmail.
        """
        owner = f"owner-{name}"
        if name.startswith(("owner-", "@")) or not self.aliases.lookup([owner]):
            return ""
        return owner if "@" in owner else f"{owner}@{self.settings.local_origin}"

    def expand_targets(self, value: str, trail: Trail) -> object:
        """Destinations of an alias's value, or of a line of a file."""
        try:
            targets = parse_targets(value)
        except ValueError as error:
            address = Address(trail.steps[-1][1])
            yield self.failed(trail, address, "4.3.5", str(error))
            return
        yield from self.expand_each(targets, trail)

    def expand_each(self, targets: tuple[Target, ...], trail: Trail) -> object:
        """Destinations of several targets."""
        for target in targets:
            yield from self.TARGETS[target.kind](self, target, trail)

    def expand_address(self, target: Target, trail: Trail) -> object:
        """Destinations of an address or a bare name."""
        yield from self.expand(Address.parse(target.text), trail)

    def expand_plain(self, target: Target, trail: Trail) -> object:
        r"""Destinations of \user: neither aliases nor .forward."""
        yield from self.expand_user(Address.parse(target.text), trail, True)

    def discard(self, target: Target, trail: Trail) -> object:
        """/dev/null."""
        yield self.drawn(Destination("null", target.text, "/dev/null"), trail)

    def refuse(self, target: Target, trail: Trail) -> object:
        """error:550 text and its like."""
        error = read_refusal(target.text, 0)
        yield self.refused(trail, trail.recipient, error)

    def to_place(self, target: Target, trail: Trail) -> object:
        """A file, a Maildir or a command, with the rights of whose it is."""
        what = {"pipe": "command"}.get(target.kind, "file")
        kind, place = target.kind, target.text
        if not trail.may_run:
            why = f"mail to {what} is restricted: others may write the list"
            yield self.failed(trail, trail.recipient, "5.7.1", why)
            return
        if kind == "file" and place.startswith("~/"):
            if trail.steps[-1][0] != "user":
                why = f"{place}: ~ is nobody's home here"
                yield self.failed(trail, trail.recipient, "5.3.5", why)
                return
            place = trail.rights.home + place[1:]
        kind = "maildir" if kind == "file" and place.endswith("/") else kind
        try:
            user = self.rights(trail)
        except MailError as error:
            yield self.refused(trail, trail.recipient, error)
            return
        yield self.drawn(self.destination(kind, place, user, trail), trail)

    def rights(self, trail: Trail) -> User:
        """Who runs a command: whose .forward or list it is, or default_privs.

        Never root. Raises MailError.
        """
        user = trail.rights
        if user is None or user.uid == 0 and os.geteuid() == 0:
            return command_user(self.settings, self.users)
        return user

    def destination(
        self, kind: str, place: str, user: User | None, trail: Trail
    ) -> Destination:
        """A destination on this host, reached by this trail."""
        recipient = trail.recipient
        name, detail = self.settings.split_detail(recipient.local)
        more = {"user": user, "detail": detail[1:], "sender": trail.sender}
        more["forwarders"] = self.forwarders(trail, "user")
        if kind == "pipe" and trail.rights and user == trail.rights:
            more["folder"] = user.home
        target = str(recipient.qualified(self.settings.local_origin))
        if kind in ("mailbox", "lmtp"):  # the user's one address, however reached
            target = f"{user.name}@{self.settings.local_origin}"
        return Destination(kind, target, place, **more)

    def drawn(self, found: Destination, trail: Trail) -> Destination:
        """`found`, drawn."""
        if trail.branch:
            text, detail = found.shown()
            trail.draw(text, "", detail)
        return found

    def expand_include(self, target: Target, trail: Trail) -> object:
        """Destinations of the lines of an :include: file."""
        path = target.text
        if trail.steps[-1][0] == "alias" and not trail.may_run:
            why = "mail to list is restricted: others may write the aliases"
            yield self.failed(trail, trail.recipient, "5.7.1", why)
            return
        if self.files is None:
            yield self.drawn(Destination("include", path, path), trail)
            return
        whose = trail.reader.uid if trail.reader else None
        is_first = trail.is_first("include", path, whose)
        if len(trail.steps) > MAX_DEPTH or not is_first:
            trail.draw(f":include: {path}: not again")
            return
        try:
            listing = self.files.include(path, trail.reader)
        except MailError as error:
            self.warn(error.text)
            yield self.refused(trail, trail.recipient, error, place=path)
            return
        if not trail.is_first("file", listing.identity, whose):
            trail.draw(f":include: {path}: not again, by another name")
            return
        trail = trail.draw(f"list {path}", detail=f"of uid {listing.owner.uid}")
        changes = self.list_rights(listing, trail)
        trail = trail.then("include", path, **changes)
        yield from self.expand_lines(listing.text, path, trail)

    def list_rights(self, listing: ListFile, trail: Trail) -> dict:
        """What changes on the trail behind a list: whose rights, and which.

        A list of /etc/aliases has its owner's rights; one that a user named
        has that user's and no more, whosever it is.
        """
        owner, reader = listing.owner, trail.reader
        may_run = trail.may_run and not listing.is_shared
        if reader and os.geteuid() == 0:  # a stranger's text is no program
            may_run = may_run and owner.uid in (reader.uid, 0)
        if reader:
            return {"may_run": may_run}
        reader = owner if owner.uid else None
        return {"may_run": may_run, "rights": owner, "reader": reader}

    def expand_lines(self, text: str, path: str, trail: Trail) -> object:
        """Destinations of a file's lines; one that cannot be read is left out.

        A generator, so that a list of any length is never there as a whole.
        """
        complaints = 0
        for number, line in logical_lines(text):
            trail.lines[0] += 1
            if trail.lines[0] > (USER_LINES if trail.is_users else MAX_LINES):
                why = f"list {path} is too long"
                yield self.failed(trail, trail.recipient, "4.3.0", why)
                return
            try:
                targets = parse_targets(line)
            except ValueError:
                # What stands there may be a secret: it is not repeated.
                complaints += 1
                if complaints <= MAX_COMPLAINTS:
                    self.warn(f"{path}, line {number}: not a target")
                trail.draw("not a target", f"{path}:{number}")
                continue
            yield from self.expand_each(targets, trail)

    def expand_user(
        self, address: Address, trail: Trail, is_plain: bool = False
    ) -> object:
        """Destinations of a user: what ~/.forward says, or the mailbox."""
        user = self.find_user(address.local)
        if user is None:
            yield from self.expand_stranger(address, trail)
            return
        trail = trail.changed(recipient=address)
        on_the_way = trail.names("user")
        if is_plain or on_the_way[-1:] == [user.name]:
            # its own name in its .forward means the mailbox
            yield self.mailbox(user, trail.draw(f"user {user.name}, as it is"))
            return
        loop = f"mail forwarding loop for {user.name}@{self.settings.local_origin}"
        if user.name in on_the_way:
            yield self.failed(trail, address, "5.4.6", loop)
            return
        if not trail.is_first("user", user.name):
            return  # under another spelling: user+detail
        try:
            path, text, trail = self.read_forward(user, trail)
        except MailError as error:
            yield self.refused(trail, address, error)
            return
        if not text:
            yield self.mailbox(user, trail)
        elif user.name in trail.passed:
            yield self.failed(trail, address, "5.4.6", loop)
        else:
            reader = user if user.uid else None  # root's list is checked as aliases'
            changes = {"rights": user, "reader": reader, "may_run": True}
            trail = trail.then("user", user.name, **changes)
            yield from self.expand_forward(user, path, text, trail)

    def find_user(self, local: str) -> User | None:
        """The user of a local part, with or without +detail."""
        names = dict.fromkeys((local, self.settings.split_detail(local)[0]))
        return next(filter(None, map(self.users.lookup, names)), None)

    def expand_stranger(self, address: Address, trail: Trail) -> object:
        """Destinations of a local part that nobody has."""
        catch_all = f"@{address.domain.lower()}"
        try:
            alias = self.aliases.lookup([catch_all]) if address.domain else None
        except MailError as error:
            yield self.refused(trail, address, error)
            return
        if alias and ("alias", catch_all) not in trail.steps:
            yield from self.expand_alias(address, alias, trail)
            return
        way_out = self.settings.luser_relay
        if way_out and "luser_relay" not in trail.names("alias"):
            trail = trail.draw(f"luser_relay -> {way_out}")
            trail = trail.then("alias", "luser_relay")
            yield from self.expand(Address.parse(way_out), trail)
            return
        if self.settings.capture:
            user = self.users.by_uid(os.stat(self.settings.root).st_uid)
            is_first = "capture" not in trail.names("alias")
            trail = trail.draw(f"captured for {user.name}").then("alias", "capture")
            if is_first and self.users.lookup(user.name):
                yield from self.expand(Address(user.name), trail)
            else:
                yield self.mailbox(user, trail)
            return
        yield self.failed(trail, address, "5.1.1", f'unknown user: "{address.local}"')

    def near(self, local: str) -> str:
        """`did you mean X?` for a local part that nobody has, or ""."""
        names = dict.fromkeys([*self.users.names(), *self.aliases.names()])
        names.pop(local.lower(), None)
        return nearest(local.lower(), names)

    def read_forward(self, user: User, trail: Trail) -> tuple[str, str, Trail]:
        """(path, text without comments, trail) of a user's .forward.

        "" for text means the mailbox. Raises MailError.
        """
        if self.files is None:
            return "", "", trail.draw(f"user {user.name}")
        detail = self.settings.split_detail(trail.recipient.local)[1]
        path, text, ignored = self.files.forward(user, detail)
        for why in ignored:
            self.warn(f"{why}: ignored, mail for {user.name} goes to the mailbox")
        text = "\n".join(line for _, line in logical_lines(text))
        what = "~/.forward" if text else "empty ~/.forward" if path else ""
        what = what or ("~/.forward not used" if ignored else "no ~/.forward")
        trail = trail.draw(f"user {user.name}, {what}", path)
        for why in ignored:
            trail.draw(f"ignored: {why}")
        return path, text, trail

    def expand_forward(self, user: User, path: str, text: str, trail: Trail) -> object:
        """Destinations of a .forward; a line that is none means the mailbox.

        For the user's typo the sender is not to blame.
        """
        problems = []
        for line in text.split("\n"):
            try:
                parse_targets(line)
            except ValueError as error:
                problems.append(str(error))
                trail.draw(f"cannot be read: {error}")
                continue
            yield from self.expand_targets(line, trail)
        if problems:
            self.warn(f"{path}: {problems[0]}: a copy is kept in the mailbox")
            yield self.mailbox(user, trail)

    def mailbox(self, user: User, trail: Trail) -> Destination:
        """Where a user's mail is kept."""
        settings = self.settings
        kind, place = "mailbox", f"{settings.mail_spool_directory}/{user.name}"
        if settings.home_mailbox:
            place = f"{user.home}/{settings.home_mailbox}"
            kind = "maildir" if place.endswith("/") else kind
        if settings.mailbox_transport:
            kind, name = "lmtp", "mailbox_transport"
            try:
                hop = NextHop.parse(settings.mailbox_transport, name, "lmtp")
            except MailError as error:
                return self.refused(trail, trail.recipient, error)
            place = str(hop)
        return self.drawn(self.destination(kind, place, user, trail), trail)

    def expand_remote(self, address: Address, trail: Trail) -> object:
        """Destinations of an address elsewhere, by transport_maps or not."""
        try:
            line = find_transport(self.transports.lines(), address)
        except MailError as error:
            yield self.refused(trail, address, error)
            return
        if line:
            yield from self.expand_route(address, line, trail)
        else:
            yield self.remote(address, "", trail)

    def expand_route(self, address: Address, line: MapLine, trail: Trail) -> object:
        """Destinations by a line of transport_maps."""
        trail = trail.draw(f"transport {line.key} -> {line.value}", line.where)
        try:
            kind, rest = read_transport(line)
        except MailError as error:
            yield self.refused(trail, address, error)
            return
        if kind in ("error", "retry"):
            error = read_refusal(rest, 450 if kind == "retry" else 0)
            yield self.refused(trail, address, error)
        elif kind == "discard":
            yield self.drawn(Destination("null", str(address), "/dev/null"), trail)
        elif kind == "local":
            yield from self.expand_user(address, trail)
        else:
            yield self.remote(address, rest, trail)

    def remote(self, address: Address, target: str, trail: Trail) -> Destination:
        """Where mail for another host goes; `target` "" is the usual way."""
        forwarders = self.forwarders(trail, "user", "alias")
        more: dict = {"forwarders": forwarders, "sender": trail.sender}
        try:
            hops = self.hops(address, target)
        except MailError as error:
            return self.refused(trail, address, error)
        if trail.branch:
            failures = [self.draw_hop(hop, target, trail) for hop in hops]
            more["error"] = failures[-1] if all(failures) else None
        place = ", ".join(map(str, hops))
        return Destination("remote", str(address), place, **more)

    def hops(self, address: Address, target: str) -> list[NextHop]:
        """The hosts that remote mail goes to, by name. Raises MailError."""
        settings = self.settings
        level = settings.smtp_tls_security_level
        wanted = target.partition(" ")[2]
        if is_named(target):
            hop = NextHop.parse(target.removeprefix(":"), "transport_maps")
            return [hop.with_level(hop.level or level)]
        try:
            level = read_level(wanted.strip()) or level
        except ValueError:
            why = f"transport_maps {printable(target, 100)}: no such level of TLS"
            raise MailError("4.3.5", why, "none") from None
        if settings.relayhost:
            texts = relay_words(settings.relayhost)
            every = [NextHop.parse(text, "relayhost") for text in texts]
            return [hop.with_level(hop.level or level or "check") for hop in every]
        level = level or "may"
        domain = address.domain.lower().rstrip(".")
        if domain.startswith("["):  # RFC 5321 section 4.1.3
            host = domain[1:-1].removeprefix("ipv6:")
            return [NextHop("smtp", host, PORTS["smtp"], False, level)]
        return [NextHop("mx", domain, PORTS["mx"], True, level)]

    def draw_hop(self, hop: NextHop, target: str, trail: Trail) -> MailError | None:
        """Draws a next hop, and its hosts where name servers may be asked.

        What they say that keeps mail from getting there, or None.
        """
        what, name, source = "next host", str(hop.with_level("")), ""
        if hop.kind == "mx":
            what, name = "MX of", hop.host
        elif not is_named(target):
            what, source = "relayhost", self.settings.sources.get("relayhost", "")
        hosts, failure = self.hosts_of(hop, name)
        every = [address for host in hosts for address in host.addresses]
        is_near = all(map(is_loopback, every or [hop.host]))
        level = "may" if hop.level == "check" and is_near else hop.level
        tls = "no TLS" if hop.kind == "lmtp" else f"TLS: {TLS_WORDS[level]}"
        trail = trail.draw(f"{what} {name}", source, tls)
        for host in hosts:
            trail.draw(str(host))
        try:
            if hosts:
                self.draw_login(hop, trail)
        except MailError as error:
            failure = error
        if failure:
            trail.draw(failure.text, "", failure.status)
        return failure

    def hosts_of(self, hop: NextHop, name: str) -> tuple[list, MailError | None]:
        """(hosts behind a hop, why there are none), asked for once."""
        if not self.resolver or name in self.asked or not hop.port:
            return [], None
        self.asked.add(name)
        if len(self.asked) > MAX_LOOKUPS:
            return [], None
        ask = self.resolver.mail_hosts if hop.by_mx else self.resolver.host
        try:
            return list(ask(hop.host)), None
        except MailError as error:
            return [], error

    def draw_login(self, hop: NextHop, trail: Trail) -> None:
        """Draws as whom we log in there, as far as we may know. MailError."""
        is_private = not self.settings.root and os.geteuid() != 0
        if hop.kind not in ("smtp", "smtps") or is_private:
            return
        line = find_secret(MapFiles(self.settings, PASSWORDS).lines(), hop)
        if line:
            check_secret(line, bool(self.settings.smtp_sasl_password_command))
            trail.draw(f"log in as {line.value.partition(':')[0]}", line.where)

    def forwarders(self, trail: Trail, *kinds: str) -> tuple[str, ...]:
        """Through whom a trail went, last one first."""
        names = [name for kind, name in reversed(trail.steps) if kind in kinds]
        origin = self.settings.local_origin
        return tuple(
            name if "@" in name else f"{name}@{origin}"
            for name in names
            if name[0] != "@" and name not in ("luser_relay", "capture")
        )

    def failed(
        self, trail: Trail, address: Address, status: str, text: str
    ) -> Destination:
        """A destination that is none."""
        hint = ""
        if trail.branch and status == "5.1.1":
            hint = self.near(self.settings.split_detail(address.local)[0])
        return self.refused(trail, address, MailError(status, text), hint)

    def refused(
        self,
        trail: Trail,
        address: Address,
        error: MailError,
        hint: str = "",
        place: str = "",
    ) -> Destination:
        """A destination that is none, with the failure that says why."""
        if trail.branch:
            outcome = DEFERRED if error.is_temporary else BOUNCED
            detail = ", ".join(filter(None, (error.status, hint)))
            trail.draw(f"{outcome}: {error.text}", "", detail)
        target = str(address.qualified(self.settings.local_origin))
        more: dict = {"error": error, "sender": trail.sender}
        return Destination("error", target, place or error.text, **more)

    TARGETS = {
        "address": expand_address,
        "user": expand_plain,
        "null": discard,
        "error": refuse,
        "file": to_place,
        "pipe": to_place,
        "include": expand_include,
    }


class TargetCheck:
    """What newaliases warns of: targets that do not exist; problem()."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def problem(self, target: Target) -> str:
        """Why mail to a target would not arrive, as far as that is plain."""
        try:
            return self.CHECKS.get(target.kind, TargetCheck.nothing)(self, target)
        except MailError as error:
            return error.text

    def keys(self, table: AliasTable) -> list[tuple[int, str]]:
        """(line, reason) of names in a domain that is not this host's."""
        is_local = self.router.settings.is_local
        return [
            (line, f"{printable(name, 60)}: the domain is not in mydestination")
            for name, (line, _) in table.entries.items()
            if "@" in name and not is_local(name.rpartition("@")[2])
        ]

    def nothing(self, _: Target) -> str:
        """There is nothing to check."""
        return ""

    def address(self, target: Target) -> str:
        """A local name must be an alias or a user."""
        address, router = Address.parse(target.text), self.router
        is_local = router.settings.is_local(address.domain)
        if not is_local or router.settings.luser_relay or self.is_alias(target):
            return ""
        catch_all = f"@{address.domain.lower()}"
        if router.find_user(address.local) or router.aliases.lookup([catch_all]):
            return ""
        hint = router.near(router.settings.split_detail(address.local)[0])
        return f"no such user or alias{': ' if hint else ''}{hint}"

    def is_alias(self, target: Target) -> bool:
        """Whether it is an alias; one that names itself is the user."""
        address = Address.parse(target.text)
        alias = self.router.find_alias(address, Trail(frozenset()))
        if target.kind != "address" or alias is None:
            return False
        return target.text not in [other.text for other in parse_targets(alias[1])]

    def file(self, target: Target) -> str:
        """The directory must be there."""
        if target.text.startswith("~"):
            return "~ is nobody's home here"
        folder = os.path.dirname(target.text.rstrip("/"))
        return "" if os.path.isdir(folder or "/") else f"there is no {folder}"

    def pipe(self, target: Target) -> str:
        """A program that is named by its path must be there."""
        program = target.text.split()[0].strip("\"'")
        is_there = not program.startswith("/") or os.access(program, os.X_OK)
        return "" if is_there else f"there is no program {program}"

    def include(self, target: Target) -> str:
        """The list must be readable."""
        if self.router.files:
            self.router.files.include(target.text, None)
        return ""

    CHECKS = {
        "address": address,
        "user": address,
        "file": file,
        "pipe": pipe,
        "include": include,
    }


# == 25 Delivery: Task, ActiveMessage, Delivery, Job, PipeJob =================
# Takes messages to their destinations, in batches: one lock and one fsync for
# all that goes to one mailbox, one connection for all that goes to one host.
# What may take long is done by child processes, each without root's rights.
# Failures: recorded in the Task, never raised.

GRACE = 5  # seconds that sessions and children have when they are to end
TASKS = 1000  # destinations of one message that are at work at once
MORE = "more"  # what the journal calls those that are to come


class Task:
    """One destination of one message; `recipients` are those who led to it.

    Done when `error` or `done` (status, text) is set.
    """

    def __init__(self, message: object, destination: Destination) -> None:
        self.message = message
        self.destination = destination
        self.recipients: list[str] = []
        self.error = destination.error
        self.done: tuple[str, str] | None = None
        self.pause = 0  # seconds after which it may go where it may not go now
        self.relay = "local"
        self.is_passed_on = False  # whether the next host reports success
        self.is_noted = False
        if destination.kind == "null":
            self.done = ("2.0.0", "discarded")

    @property
    def is_over(self) -> bool:
        """Whether something has become of it."""
        return bool(self.done or self.error)

    @property
    def sender(self) -> str:
        """The reverse-path: a list's owner, else whom the message names.

        The null sender stays, or bounces could go round.
        """
        sender = self.message.file.envelope.sender
        return self.destination.sender or sender if sender else ""

    def attempts(self, now: float) -> list[Attempt]:
        """What became of it, as a journal line for each recipient."""
        error, key = self.error, self.destination.key
        outcome = SENT if not error else DEFERRED if error.is_temporary else BOUNCED
        status, text = (error.status, error.text) if error else self.done
        relay = error.relay if error else self.relay
        return [
            Attempt(now, outcome, status, recipient, key, relay, printable(text))
            for recipient in self.recipients
        ]

    def head(self) -> bytes:
        """The trace fields that a delivery puts on top of the message."""
        forwarders = self.destination.forwarders
        return os_bytes("".join(f"Delivered-To: {name}\n" for name in forwarders))

    def trace(self) -> bytes:
        """The trace fields of a final delivery, RFC 5321 section 4.4."""
        fields = (
            f"Return-Path: <{self.sender}>\n"
            + "".join(f"X-Original-To: {name}\n" for name in self.recipients)
            + f"Delivered-To: {self.destination.target}\n"
        )
        own = os_bytes(f"Delivered-To: {self.destination.target}\n")
        return os_bytes(fields) + self.head().replace(own, b"", 1)

    def from_line(self) -> bytes:
        """The first line of a message in an mbox."""
        sender = self.sender.replace(" ", "_") or "MAILER-DAEMON"
        return os_bytes(f"From {sender}  {time.ctime(self.message.now)}\n")

    def render(self) -> object:
        """The message as an mbox has it, From_ line first, in chunks."""
        yield self.from_line()
        yield self.trace()
        yield from mbox_quoted(self.message.file.chunks())

    def bare(self) -> object:
        """The message as a Maildir has it, in chunks."""
        yield self.trace()
        yield from self.message.file.chunks()

    def environment(self) -> dict[str, str]:
        """What a command is told of the mail, by Postfix's names: local(8)."""
        envelope, destination = self.message.file.envelope, self.destination
        local, _, domain = destination.target.rpartition("@")
        client, protocol, helo = (envelope.origin.split(" ", 2) + ["", "", ""])[:3]
        is_remote = client.startswith("[")
        return {
            "SENDER": self.sender,
            "RECIPIENT": destination.target,
            "ORIGINAL_RECIPIENT": self.recipients[0],
            "LOCAL": local,
            "DOMAIN": domain,
            "EXTENSION": destination.detail,
            "ENVID": envelope.envid,
            "CLIENT_ADDRESS": client.strip("[]") if is_remote else "",
            "CLIENT_HOSTNAME": "unknown" if is_remote else "",
            "CLIENT_PROTOCOL": protocol if is_remote else "",
            "CLIENT_HELO": helo if is_remote else "",
        }


class ActiveMessage:
    """A message that is being delivered: its file, its past, its tasks."""

    def __init__(self, file: QueueFile, journal: list[Attempt], now: float) -> None:
        self.file = file
        self.queue_id = file.queue_id
        self.journal = journal
        self.now = now
        self.header = file.header()
        self.hops = len(self.header.values("received"))
        self.tasks: dict[str, Task] = {}
        self.ways: object = None  # (recipient, destination) of what is to come
        self.held: tuple | None = None  # one that had no place among the tasks
        self.finished: set[tuple] = set()  # (recipient, key) of the journal's
        self.reached: set[str] = set()  # keys that have their copy
        self.opened: set[str] = set()  # recipients that the journal keeps open
        self.unwell: set[str] = set()  # those with a destination that failed
        self.has_deferred = False
        self.is_given_up = is_given_up(os.fstat(file.fd))
        self.reports: list[str] = []
        self.is_settled = False
        self.is_set_aside = False

    @property
    def age(self) -> float:
        """Seconds since it arrived."""
        return max(0.0, self.now - self.file.envelope.arrived)

    def plan(self, router: Router, hopcount_limit: int) -> list[Task]:
        """Its next tasks: a destination each, without those that are done.

        No more than TASKS at a time: a list is never in memory as a whole, and
        what is done of it is noted before the rest is begun.
        """
        if self.ways is None:
            latest = {(a.recipient, a.destination): a for a in self.journal}
            self.finished = {pair for pair, a in latest.items() if a.is_final}
            self.reached = {p[1] for p in self.finished if latest[p].outcome == SENT}
            self.ways = self.find_ways(router, hopcount_limit)
        self.tasks = {}
        while self.held or len(self.tasks) < TASKS:
            pair, self.held = self.held or next(self.ways, None), None
            if pair is None:
                self.ways = iter(())
                break
            self.add_task(*pair)
        else:
            self.held = next(self.ways, None)
        return list(self.tasks.values())

    def add_task(self, recipient: str, destination: Destination) -> None:
        """Notes that a recipient led to a destination."""
        key = destination.key
        task = self.tasks.setdefault(key, Task(self, destination))
        task.recipients.append(recipient)
        if key in self.reached:
            task.done = ("2.0.0", "delivered already")

    def find_ways(self, router: Router, hopcount_limit: int) -> object:
        """(recipient, destination) of all that is to be done, one by one."""
        _, _, done = progress(self.journal)
        seen = router.passed(self.header.values("delivered-to"))
        for recipient in self.file.envelope.recipients:
            if recipient in done:
                continue  # wherever the aliases may lead by now
            for destination in self.resolve(router, recipient, seen, hopcount_limit):
                if (recipient, destination.key) not in self.finished:
                    yield recipient, destination

    def resolve(
        self, router: Router, recipient: str, seen: frozenset, hopcount_limit: int
    ) -> object:
        """The destinations of one recipient of the envelope, one by one.

        Whatever goes wrong with one recipient is that one's failure.
        """
        try:
            if self.is_given_up:
                raise MailError("5.0.0", "cancelled by the administrator")
            if self.hops > hopcount_limit:
                raise MailError("5.4.6", "too many hops")
            yield from router.resolve(Address.parse(recipient), seen)
        except MailError as error:
            yield Destination("error", recipient, error=error)
        except Exception as error:  # noqa: BLE001 one recipient must not stop the others
            text = f"cannot be routed: {type(error).__name__}: {error}"
            failure = MailError("4.3.0", printable(text))
            yield Destination("error", recipient, error=failure)

    @property
    def has_more(self) -> bool:
        """Whether destinations are to come, after the tasks there are."""
        return self.held is not None

    def attempts(self, when: float) -> list[Attempt]:
        """What became of every task, as journal lines."""
        tasks = self.tasks.values()
        return [attempt for task in tasks for attempt in task.attempts(when)]

    def take_new(self) -> list[Attempt]:
        """The lines of tasks that were done while others are on their way.

        A bounce is noted only when its report is safe: see Reporter.
        """
        new = [t for t in self.tasks.values() if t.done and not t.is_noted]
        for task in new:
            task.is_noted = True
        lines = [line for task in new for line in task.attempts(self.now)]
        return self.keep_open({line.recipient for line in lines}) + lines

    def forget_notes(self) -> None:
        """What was to be noted is not: it is written with the next lines."""
        self.opened.clear()
        for task in self.tasks.values():
            task.is_noted = False

    def keep_open(self, names: set[str]) -> list[Attempt]:
        """A line for each recipient that must not seem done before its time.

        All lines of one round have one time: together they say what is open.
        """
        new = sorted(names - self.opened)
        self.opened |= names
        return [self.more(name, DEFERRED) for name in new]

    def close(self) -> list[Attempt]:
        """What takes the lines of keep_open() back, at the round's end."""
        return [self.more(name, SENT) for name in sorted(self.opened)]

    def more(self, name: str, outcome: str) -> Attempt:
        """The line that says whether a recipient has more to come."""
        status = "2.0.0" if outcome == SENT else "4.4.7"
        text = "no more destinations" if outcome == SENT else "more are to come"
        return Attempt(self.now, outcome, status, name, MORE, "none", text)

    def look_back(self) -> None:
        """Takes in what became of the tasks, before the next are planned."""
        for task in self.tasks.values():
            if task.done:
                self.reached.add(task.destination.key)
            else:
                self.unwell.update(task.recipients)
                self.has_deferred |= task.error.is_temporary

    @property
    def is_waiting(self) -> bool:
        """Whether a task is still on its way."""
        return any(not task.is_over for task in self.tasks.values())


class Delivery:
    """Local couriers; `suspects` are ids that may be delivered already."""

    def __init__(self, settings: Settings, suspects: set[str]) -> None:
        self.settings = settings
        self.suspects = suspects

    def deliver(self, tasks: list[Task]) -> None:
        """Takes a batch to its one mailbox, Maildir or file, as its owner."""
        destination = tasks[0].destination
        what = f"{destination.kind} {destination.place}"
        try:
            self.COURIERS[destination.kind](self, destination, tasks)
        except Busy:
            self.fail(tasks, MailError("4.2.0", f"{what} is locked"))
            for task in tasks:
                task.pause = 1
        except MailError as error:
            self.fail(tasks, error)
        except OSError as error:
            owner = destination.user.uid if os.geteuid() == 0 else os.geteuid()
            self.fail(tasks, Mailbox(destination.place, owner).failure(error))
        except Exception as error:  # noqa: BLE001 one mailbox must not stop the others
            why = f"{type(error).__name__}: {error}"
            self.fail(tasks, MailError("4.2.0", f"{what}: {why}"))

    def to_mailbox(self, destination: Destination, tasks: list[Task]) -> None:
        """Appends to a user's mailbox, in the spool or below the home."""
        user, path = destination.user, destination.place
        spool = self.settings.mail_spool_directory
        gid = None
        if os.path.dirname(path) == spool:
            gid = self.prepare_folder(spool, path, user)
        with Rights(user, gid) as rights:
            limit = self.settings.mailbox_size_limit
            with Mailbox(path, rights.owner, limit) as mailbox:
                self.append(mailbox, tasks, "delivered to mailbox")

    def to_file(self, destination: Destination, tasks: list[Task]) -> None:
        """Appends to a file that an alias or .forward names."""
        path = destination.place
        with Rights(destination.user) as rights, FileBox(path, rights.owner) as file:
            self.append(file, tasks, f"delivered to file: {path}")

    def to_maildir(self, destination: Destination, tasks: list[Task]) -> None:
        """Adds to a Maildir; what a crash left there is found by its name."""
        is_own = destination.place == f"{destination.user.home}/" + (
            self.settings.home_mailbox
        )
        status = "4.2.0" if is_own else "5.2.0"  # as for a mailbox, as for a file
        with Rights(destination.user) as rights:
            box = MaildirBox(destination.place, rights.owner, status)
            added = []
            for task in tasks:
                queue_id, envelope = task.message.queue_id, task.message.file.envelope
                host = self.settings.myhostname.replace("/", "_").replace(":", "_")
                name = f"{int(envelope.arrived)}.Q{queue_id}.{host}"
                try:
                    if not (queue_id in self.suspects and box.has(name)):
                        box.add(name, task.bare())
                    added.append(task)
                except MailError as error:
                    task.error = error
            box.sync()
        for task in added:
            task.done = ("2.0.0", "delivered to maildir")

    def append(self, mailbox: Mailbox, tasks: list[Task], text: str) -> None:
        """The batch itself, inside the lock."""
        wanted = {
            task.message.queue_id
            for task in tasks
            if task.message.queue_id in self.suspects
            and mailbox.modified > task.message.file.envelope.arrived - CLOCK_SLACK
        }
        # All looked for before the first is added: only the last message of
        # the file can be a torn one, and is cut off then.
        offsets = mailbox.find(wanted)
        present = {
            task
            for task in tasks
            if task.message.queue_id in wanted
            and mailbox.already_has(offsets.get(task.message.queue_id), task.render)
        }
        added = []
        for task in tasks:
            try:
                if task not in present:
                    mailbox.append(task.render())
                added.append(task)
            except MailError as error:
                self.suspects.add(task.message.queue_id)
                task.error = error
        try:
            mailbox.sync()
        except BaseException:
            # It may be there, or not: that is looked for the next time.
            self.suspects.update(task.message.queue_id for task in added)
            raise
        for task in added:
            task.done = ("2.0.0", text)

    def fail(self, tasks: list[Task], error: MailError) -> None:
        """The same failure for all that are not settled."""
        for task in tasks:
            if not task.is_over:
                task.error = error

    def prepare_folder(self, folder: str, path: str, user: User) -> int | None:
        """The group to deliver with, for the directory that mailboxes are in.

        /var/mail is 2775 root:mail on many hosts: only its group may make
        files there. Where nobody but root may, root makes the empty file.
        """
        if os.geteuid() != 0:
            os.makedirs(folder, 0o755, exist_ok=True)
            return None
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o755)
        seen = os.stat(folder)
        if seen.st_mode & 0o002:
            return None
        if seen.st_mode & 0o020:
            return seen.st_gid
        if seen.st_uid == 0:
            self.make_mailbox(path, user)
        return None

    def make_mailbox(self, path: str, user: User) -> None:
        """Makes an empty mailbox, or gives away what a kill left root's."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            seen = os.fstat(fd)
            if seen.st_uid == 0 and seen.st_size == 0 and seen.st_nlink == 1:
                os.fchmod(fd, 0o600)
                os.fchown(fd, user.uid, user.gid)
                sync_folder(os.path.dirname(path))
        finally:
            os.close(fd)

    COURIERS = {"mailbox": to_mailbox, "maildir": to_maildir, "file": to_file}


# The descriptor that byte code is read from, where the start has set it.
ROOMS_FD = -1


def close_others(kept: set[int]) -> None:
    """Closes every descriptor but these and the standard ones.

    A child that lives on must not hold the queue's lock, nor other mail.
    """
    kept = {*kept, ROOMS_FD}
    try:
        fds = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        fds = list(range(3, 1024))
    for fd in fds:
        if fd > 2 and fd not in kept:
            try:
                os.close(fd)
            except OSError:
                continue  # the directory's own, or a gap


def is_result(words: list[str]) -> bool:
    """Whether a child's line is one: number, word, status, relay, text."""
    if len(words) != 5 or not is_status(words[2]):
        return False
    number = words[0].removeprefix("-")
    return number.isascii() and number.isdigit() and len(number) < 10


class Job:
    """A child process that does tasks without root's rights, in work().

    The parent reads `fd` to its end and calls take(). Each line there is a
    result: task number, sent, passed (sent, and the next host will report) or
    failed, status, relay, text.
    """

    MODULES: tuple[str, ...] = ()  # imported while they can be read

    def __init__(self, settings: Settings, owner: User, tasks: dict) -> None:
        self.settings = settings
        self.owner = owner
        self.tasks: dict[int, Task] = tasks
        self.text = b""
        self.due = time.monotonic() + self.patience  # then it is ended
        preload(*self.MODULES)
        self.fd, self.results = os.pipe()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(self.fd)
            os.close(self.results)
            raise
        if self.pid == 0:
            try:
                self.run_child()
            finally:
                os._exit(0)
        os.close(self.results)

    def run_child(self) -> None:
        """The child's whole life."""
        import signal

        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        close_others(self.kept())
        try:
            self.prepare()
            drop_rights(self.owner)
            self.work()
        except Exception as error:  # noqa: BLE001 whatever it is, mail is kept
            text = f"{type(self).__name__}: {type(error).__name__}: {error}"
            failure = MailError("4.3.0", text, "none")
            # Where there was a result already, the first one counts.
            self.report_failure(self.tasks, failure)

    def kept(self) -> set[int]:
        """The descriptors that the child needs."""
        return {self.results, *(task.message.file.fd for task in self.tasks.values())}

    def prepare(self) -> None:
        """What is to be done before rights are dropped."""

    @property
    def patience(self) -> float:
        """Seconds that it may take."""
        return NO_LIMIT

    def end(self) -> None:
        """Kills it: it may be stopped by its own user, and then never ends."""
        import signal

        try:
            os.kill(self.pid, signal.SIGKILL)
        except OSError:
            return  # it is gone, and not buried yet

    def work(self) -> None:
        """Does the tasks and reports each."""
        raise NotImplementedError

    def report_failure(self, numbers: object, error: MailError) -> None:
        """The same failure for several tasks."""
        for number in numbers:
            self.report(number, "failed", error.status, error.relay, error.text)

    def report(self, number: int, *words: str) -> None:
        """One result line for the parent."""
        shown = (printable(word).replace("\t", " ") for word in words)
        write_all(self.results, os_bytes("\t".join((str(number), *shown)) + "\n"))

    def take(self, data: bytes) -> list[Task]:
        """The tasks that the child's words settle; b"" is its end."""
        *lines, self.text = (self.text + data).split(b"\n")
        rows = (os_text(line).split("\t") for line in lines)
        # The child has fewer rights than we: what makes no sense is no result.
        settled = [self.settle(*row) for row in rows if is_result(row)]
        if not data:
            settled += self.finish()
        return [task for task in settled if task]

    def settle(
        self, number: str, outcome: str, status: str, relay: str, text: str
    ) -> Task | None:
        """Takes in one result line; the first about a task counts."""
        task = self.tasks.pop(int(number), None)
        if task is None:
            return None
        if outcome == "failed":
            task.error = MailError(status, text, relay)
        else:
            task.done, task.relay = (status, text), relay
            task.is_passed_on = outcome == "passed"
        return task

    def finish(self) -> list[Task]:
        """Buries the child; what it said nothing of is tried again."""
        os.close(self.fd)
        os.waitpid(self.pid, 0)
        left = list(self.tasks.values())
        self.tasks.clear()
        for task in left:
            text = "the process that was to do it ended without a result"
            task.error = MailError("4.3.0", text, "none")
        return left


class PipeJob(Job):
    """Runs one command for one message, as whoever's command it is."""

    MODULES = ("subprocess", "select")

    def __init__(self, settings: Settings, lane: tuple, task: Task) -> None:
        self.lane = lane
        super().__init__(settings, task.destination.user, {0: task})

    @property
    def patience(self) -> float:
        """The command's time, and some to end it."""
        return self.settings.command_time_limit + GRACE

    def work(self) -> None:
        """Feeds the message to the command; its exit code is the result."""
        (task,) = self.tasks.values()
        user, root = self.owner, self.settings.root
        if os.geteuid() == 0:
            raise PermissionError("no command is run as root")
        fixed = {"HOME": user.home, "USER": user.name, "LOGNAME": user.name}
        fixed.update({"MINIMTA_ROOT": root} if root else {})
        zone = os.environ.get("TZ")
        fixed.update({"TZ": zone} if zone else {})
        environ = command_environment(fixed, task.environment())
        text, folder = task.destination.place, task.destination.folder
        command = Command(text, folder, environ, self.settings.command_time_limit)
        failure = command.run(self.chunks(task), self.results)
        os.set_blocking(self.results, True)
        if failure:
            self.report_failure([0], failure)
        else:
            self.report(0, SENT, "2.0.0", "local", f"delivered to command: {text}")

    def chunks(self, task: Task) -> object:
        """The message as commands get it: From_ line, trace, no quoting."""
        yield task.from_line() + task.trace()
        yield from task.message.file.chunks()


# == 26 Outbox: Errand, Line, Outbox, RelayJob, Outgoing, Lanes ===============
# The relay process: all mail for other hosts, a thread for each connection.
# The runner gives it errands, it answers with what became of each recipient.
# Failures: told to the runner, never raised.

MAX_LINE = 20  # connections to one destination
MAX_CONNECTIONS = 100  # of all destinations together
MAX_TARGETS = 5  # addresses that are tried for one message; Postfix's limit
MAX_RCPTS = 100  # recipients of one transaction, RFC 5321 section 4.5.3.1.8
# Where mail comes from whose bare addresses are our users; others' are theirs.
OWN_ORIGINS = ("uid ", "report ", "[127.", "[::1]")
KEEP_OPEN = 2  # seconds that a connection waits for more mail
GROW_AFTER = 0.5  # seconds that mail waits until there is one connection more
LONG_LINE = 4  # messages in line for each connection: the same
RELAY_IDLE = 15  # seconds without mail until the relay process ends
# Seconds without any result until it is ended: a hundred recipients, each of
# them with the patience of RFC 5321 section 4.5.3.2, take half a day.
RELAY_PATIENCE = 24 * HOUR
STOP = b"stop"  # in place of an errand: begin nothing more
RELAY_MODULES = (
    *("smtplib", "ssl", "threading", "select", "socket", "ipaddress", "hmac"),
    *("encodings.idna", "stringprep", "binascii", "subprocess"),
)


def is_own_address(address: str) -> bool:
    """Whether an address is this host's, or none of another host at all."""
    import ipaddress
    import socket

    seen = ipaddress.ip_address(address)
    if seen.is_loopback or seen.is_multicast or seen.is_unspecified:
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return address.startswith("0.")
    return True


def softened(error: MailError, hop: NextHop) -> MailError:
    """Why a host cannot be used; with a smarthost, it is never for good.

    It is our settings that are wrong then, not the mail.
    """
    if hop.kind == "mx" or error.is_temporary:
        return error
    return MailError("4" + error.status[1:], error.text, error.relay)


def is_about_us(status: str) -> bool:
    """Whether a password was refused, or a certificate: read them anew."""
    return status in ("4.7.5", "4.7.8")


class Errand:
    """One transaction: a message's recipients at one destination.

    `recipients` maps an address to (task number, Wishes); `place` is the
    route, `forwarders` whom the message went through.
    """

    def __init__(self, queue_id: str, place: str, sender: str, forwarders: tuple):
        self.queue_id = queue_id
        self.place = place
        self.sender = sender
        self.forwarders = forwarders
        self.recipients: dict[str, tuple[int, Wishes]] = {}
        self.since = 0.0

    def __bytes__(self) -> bytes:
        head = (self.queue_id, self.place, self.sender, *self.forwarders)
        rows = ["\t".join(head)]
        for name, (number, wishes) in self.recipients.items():
            rows.append("\t".join((str(number), name, *wishes.fields())))
        return os_bytes("\n".join(rows) + "\n\n")

    @classmethod
    def parse(cls, block: bytes) -> Errand:
        """The errand that bytes() wrote."""
        first, *rows = (row.split("\t") for row in os_text(block).split("\n"))
        errand = cls(first[0], first[1], first[2], tuple(first[3:]))
        for number, name, notify, original in rows:
            errand.recipients[name] = int(number), Wishes(notify, original)
        return errand

    def head(self) -> bytes:
        """The trace fields of a forward."""
        return os_bytes("".join(f"Delivered-To: {name}\n" for name in self.forwarders))


class Line:
    """Errands for one destination, and the connections that do them."""

    def __init__(self, place: str, changed: object) -> None:
        self.place = place
        self.changed = changed  # a condition: there is something to do
        self.waiting: list[Errand] = []
        self.workers = 0
        self.idle = 0  # of them, those that wait for more
        self.is_up = False  # whether it ever let us in
        self.limit = MAX_LINE


class Outbox:
    """All lines of the relay process; run() is its life.

    `teller` is told what becomes of tasks and of hosts: report(),
    report_dead(), report_missed().
    """

    def __init__(
        self, teller: object, settings: Settings, spool: Spool, secrets: Secrets
    ) -> None:
        import threading

        self.teller = teller
        self.settings = settings
        self.spool = spool
        self.secrets = secrets
        self.history = History(spool)
        self.contexts = Contexts(settings.smtp_tls_CAfile)
        self.generic = MapFiles(settings, "smtp_generic_maps")
        self.resolver = Resolver(settings.root)
        self.lines: dict[str, Line] = {}
        self.down: dict[str, float] = {}  # hosts, until when they come last
        self.pause = 0.8 * settings.minimal_backoff_time
        self.workers = 0
        self.is_closing = False
        self.lock = threading.Lock()

    def run(self, fd: int) -> None:
        """Takes errands from `fd` to its end; then finishes what there is."""
        import select
        import threading

        runner, held = os.getppid(), b""
        while True:
            if select.select([fd], [], [], GROW_AFTER / 2)[0]:
                data = os.read(fd, BLOCK)
                if not data:
                    break
                *blocks, held = (held + data).split(b"\n\n")
                for block in blocks:
                    self.forget() if block == STOP else self.add(Errand.parse(block))
            with self.lock:
                for line in self.lines.values():
                    self.grow(line)
        with self.lock:
            self.is_closing = True
            for line in self.lines.values():
                line.changed.notify_all()
        for thread in threading.enumerate():
            while thread is not threading.current_thread() and thread.is_alive():
                # Who dies hangs up first, and only then is nobody's parent.
                if os.getppid() != runner:
                    os._exit(1)  # nobody is left to be told of anything
                thread.join(GROW_AFTER / 2)

    def forget(self) -> None:
        """Begins nothing more: the runner is told to end."""
        with self.lock:
            for line in self.lines.values():
                line.waiting.clear()

    def add(self, errand: Errand) -> None:
        """Puts an errand in line."""
        import threading

        errand.since = time.monotonic()
        with self.lock:
            line = self.lines.get(errand.place)
            if line is None:
                changed = threading.Condition(self.lock)
                line = self.lines[errand.place] = Line(errand.place, changed)
            line.waiting.append(errand)
            if line.idle:
                line.changed.notify()
            elif not line.workers:
                self.start(line)

    def grow(self, line: Line) -> None:
        """Starts connections for what has waited long; few for a fast host."""
        if not line.waiting or line.idle:
            return
        is_late = line.waiting[0].since < time.monotonic() - GROW_AFTER
        is_long = len(line.waiting) >= LONG_LINE * line.workers
        if not line.workers or line.is_up and (is_late or is_long):
            for _ in range(1 + line.workers // 2):
                self.start(line)

    def start(self, line: Line) -> None:
        """Starts a connection's thread, if there may be one more."""
        import threading

        is_free = line.workers < min(line.limit, len(line.waiting) + line.workers)
        if is_free and self.workers < MAX_CONNECTIONS:
            line.workers, self.workers = line.workers + 1, self.workers + 1
            thread = threading.Thread(target=self.work, args=(line,), daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more: those there are go on
                line.workers, self.workers = line.workers - 1, self.workers - 1
                line.limit = max(1, line.workers)

    def work(self, line: Line) -> None:
        """A connection's life: one errand after the other."""
        relay = None
        while True:
            errand = self.next(line, relay is not None and relay.is_good)
            if errand is None:
                break
            try:
                relay = self.do(line, errand, relay)
            except Exception as error:  # noqa: BLE001 whatever it is, mail is kept
                relay = None
                text = f"relay: {type(error).__name__}: {error}"
                self.fail(errand, MailError("4.3.0", text, "none"))
        if relay is not None:
            relay.quit()

    def next(self, line: Line, may_wait: bool) -> Errand | None:
        """The next errand of a line, or None: then the worker is no more."""
        with self.lock:
            end = time.monotonic() + (KEEP_OPEN if may_wait else 0)
            while not line.waiting and not self.is_closing:
                left = end - time.monotonic()
                if left <= 0:
                    break
                line.idle += 1
                line.changed.wait(left)
                line.idle -= 1
            if line.waiting and line.workers <= line.limit:
                errand = line.waiting.pop(0)
                self.grow(line)
                return errand
            line.workers, self.workers = line.workers - 1, self.workers - 1
            if not line.workers:
                self.lines.pop(line.place, None)
            return None

    def do(self, line: Line, errand: Errand, relay: Relay | None) -> Relay | None:
        """One errand; the connection, if it is good for more."""
        try:
            with self.spool.open(errand.queue_id) as message:
                parcel = self.parcel(errand, message)
                for _ in range(2):  # a connection that was kept may be gone
                    if relay is None or not relay.is_good:
                        relay = self.connect(line, errand)
                        if relay is None:
                            return None
                    try:
                        self.send(relay, parcel, errand)
                        break
                    except Stale:
                        continue
                else:
                    why = f"lost connection with {relay.name} before anything was sent"
                    self.fail(errand, MailError("4.4.2", why, relay.name))
        except MailError as error:
            self.fail(errand, error)
        except (OSError, ValueError) as error:
            text = f"the message cannot be read: {error}"
            self.fail(errand, MailError("4.3.0", text, "none"))
        return relay

    def parcel(self, errand: Errand, message: QueueFile) -> Parcel:
        """What is sent: to a mail store nothing is rewritten."""
        settings, rewriter = self.settings, None
        if not errand.place.startswith("lmtp:"):
            lines, came = self.generic.lines(), message.envelope.origin
            is_ours = came.startswith(OWN_ORIGINS) or not came
            origin = settings.myorigin if is_ours else ""
            rewriter = Rewriter(lines, origin, settings)
        parcel = Parcel(message, errand.sender, errand.head(), rewriter)
        parcel.wishes = {name: pair[1] for name, pair in errand.recipients.items()}
        return parcel

    def send(self, relay: Relay, parcel: Parcel, errand: Errand) -> None:
        """Has each recipient answered for, also by other hosts. Raises Stale.

        Whom one host puts off is offered to the next, RFC 5321 section 5.1.
        """
        seen: set[str] = set()
        left = self.settle(errand, self.transact(relay, parcel, errand), relay)
        while left and len(seen) < MAX_TARGETS:
            seen.add(str(relay.target))
            parcel.wishes = {name: errand.recipients[name][1] for name in left}
            other = None
            try:
                other = self.reach(errand.place, [], [], seen)
                results = self.transact(other, parcel, errand)
            except (MailError, Stale):
                break
            finally:
                if other:
                    other.quit()
            relay = other
            left = self.settle(errand, {**left, **results}, relay)
        for name, error in left.items():
            self.tell(errand, name, error)

    def settle(self, errand: Errand, results: dict, relay: Relay) -> dict:
        """Reports what is final; recipient -> MailError of whom another
        host of the destination may take.
        """
        left, word = {}, "passed" if relay.offers_dsn else SENT
        for name, result in results.items():
            if not isinstance(result, MailError):
                number = errand.recipients[name][0]
                self.teller.report(number, word, result[0], relay.name, result[1])
            elif result.is_temporary and LOST_AT_END not in result.text:
                left[name] = result
            else:
                self.tell(errand, name, result)
        return left

    def transact(self, relay: Relay, parcel: Parcel, errand: Errand) -> dict:
        """Transactions until each recipient has an answer. Raises Stale."""
        results: dict = {}
        while True:
            try:
                found = relay.send(parcel)
            except Stale:
                if not results:
                    raise
                break  # who was served stays served; the rest is to wait
            results.update(found)
            crowd = [name for name in relay.crowded if name in parcel.wishes]
            is_some = any(not isinstance(one, MailError) for one in found.values())
            if not (crowd and is_some and relay.is_good):
                break
            # Too many at once, RFC 5321 section 4.5.3.1.10: the rest follows.
            parcel.wishes = {name: parcel.wishes[name] for name in crowd}
        self.remember(relay, errand, results)
        return results

    def connect(self, line: Line, errand: Errand) -> Relay | None:
        """A connection to the first host that lets us in, or None.

        Then all that waits for it has failed: nobody else tries in vain.
        """
        tried: list[Relay] = []
        missed: list[MailError] = []
        try:
            relay = self.reach(line.place, tried, missed)
        except MailError as error:
            relay = None
            for one in tried:
                one.missed = missed
                self.remember(one, errand, errand.recipients)
            self.give_up(line, errand, error)
        else:
            line.is_up, relay.missed = True, missed
        for failure in missed:
            self.teller.report_missed(line.place, failure)
        return relay

    def give_up(self, line: Line, errand: Errand, error: MailError) -> None:
        """No connection: the others go on, or all mail of the line waits."""
        with self.lock:
            if line.workers > 1 and line.is_up:
                line.limit = line.workers - 1  # it takes no more than these
                line.waiting.insert(0, errand)
                return
            failed, line.waiting = [errand, *line.waiting], []
            line.is_up = False
        if error.is_temporary:
            self.teller.report_dead(line.place, error)
        for one in failed:
            self.fail(one, error)

    def reach(
        self,
        place: str,
        tried: list[Relay],
        missed: list[MailError],
        seen: frozenset | set = frozenset(),
    ) -> Relay:
        """A connection by a route: its hops in order. Raises MailError.

        What it tried, and why those before did not do, is added to the lists.
        Hosts in `seen` are left out; those that were down lately come last.
        """
        asked = set(seen)
        for is_last in (False, True):
            for hop in parse_route(place, "next hop"):
                left = MAX_TARGETS
                try:
                    targets = self.targets(hop)
                except MailError as error:
                    missed += [] if is_last else [softened(error, hop)]
                    continue
                for target in targets:
                    name = str(target)
                    if name in asked or self.is_down(name) != is_last or not left:
                        continue
                    asked.add(name)
                    left -= 1
                    try:
                        relay = self.open(target, tried, missed)
                    except MailError as error:
                        self.down[name] = time.monotonic() + self.pause
                        missed.append(softened(error, hop))
                        continue
                    self.down.pop(name, None)
                    return relay
        if not missed:
            raise MailError("4.4.4", f"no host to hand over to: {place}", "none")
        raise missed.pop()

    def is_down(self, name: str) -> bool:
        """Whether a host did not let us in a moment ago."""
        return self.down.get(name, 0.0) > time.monotonic()

    def open(
        self, target: FarHost, tried: list[Relay], missed: list[MailError]
    ) -> Relay:
        """A connection to one address. Raises MailError."""
        hop = target.hop
        secret = None
        if hop.kind in ("smtp", "smtps"):
            secret = self.secrets.find(hop)
        level = hop.level or ("check" if secret else "may")
        level = "none" if hop.kind == "lmtp" else level
        tried.append(Relay(self.settings, target, level))
        try:
            tried[-1].connect(self.contexts, secret)
        except MailError as error:
            if level != "may" or error.status != "4.7.5":
                raise
            missed.append(error)
            tried.append(Relay(self.settings, target, "none"))  # as if without TLS
            tried[-1].connect(self.contexts, secret)
        return tried[-1]

    def targets(self, hop: NextHop) -> list[FarHost]:
        """The addresses behind a hop, in the order of trying. MailError."""
        if not hop.port:
            return [FarHost(hop, hop.host, "")]
        if not hop.by_mx:
            hosts = self.resolver.host(hop.host)
        else:
            hosts = self.resolver.mail_hosts(hop.host)
        found = [
            FarHost(hop, host.name.rstrip("."), address)
            for host in self.without_us(hosts, hop)
            for address in shuffled(host.addresses)
        ]
        if not found:
            text = (
                f"Host or domain name not found. Name service error for name={hop.host}"
            )
            why = f"{text} type=A: no host there has an address"
            raise MailError("5.4.4", why, "none")
        return found

    def without_us(self, hosts: list[MailHost], hop: NextHop) -> list[MailHost]:
        """Hosts without ourselves and what is no better, RFC 5321 section 5.1.

        Raises MailError where nobody is left: mail would come back.
        """
        if not hop.by_mx:
            return hosts
        ours = [host.preference for host in hosts if self.is_us(host, hop.port)]
        left = [one for one in hosts if not ours or one.preference < min(ours)]
        if ours and not left:
            why = f"mail for {hop.host} loops back to myself"
            raise MailError("5.4.6", why, "none")
        return left

    def is_us(self, host: MailHost, port: int) -> bool:
        """Whether a mail host is this one: by name, or by an address."""
        if port not in (PORTS["smtp"], self.settings.smtpd_port):
            return False
        name = host.name.lower().rstrip(".")
        if name == self.settings.myhostname.lower() or self.settings.is_local(name):
            return True
        if self.settings.root:  # such instances share a host
            is_port = port == self.settings.smtpd_port
            return is_port and not set(host.addresses).isdisjoint(
                self.settings.listen_on
            )
        return any(map(is_own_address, host.addresses))

    def remember(self, relay: Relay, errand: Errand, names: object) -> None:
        """What was said, and who was tried before in vain, for the trace."""
        rows = [f"when: {time.time():.3f}", f"route: {relay.target.hop.with_level('')}"]
        rows += [f"relay: {relay.name}", f"tls: {relay.tls or 'none'}"]
        rows += [f"earlier: {printable(failure.text)}" for failure in relay.missed]
        rows += [f"recipient: {name}" for name in names]
        with self.lock:
            self.history.add(errand.queue_id, "dialogue", rows + relay.said())

    def fail(self, errand: Errand, error: MailError) -> None:
        """The same failure for all recipients of an errand."""
        for name in errand.recipients:
            self.tell(errand, name, error)

    def tell(self, errand: Errand, name: str, error: MailError) -> None:
        """The failure of one recipient."""
        number = errand.recipients[name][0]
        self.teller.report(number, "failed", error.status, error.relay, error.text)


class RelayJob(Job):
    """The relay process, as mail_owner: it lives while there is mail for it.

    give() hands it tasks. Its passwords are as old as itself: when the files
    change it is retired, and another one takes its place.
    """

    def __init__(self, settings: Settings, owner: User, spool: Spool) -> None:
        self.spool = spool
        self.orders, self.writer = os.pipe()
        self.count = 0
        self.unsent = b""
        self.dead: list[tuple[str, MailError]] = []  # what was found out
        self.missed: list[str] = []  # sentences for the log
        self.served: set[str] = set()  # places that have taken mail from it
        self.is_stopped = False
        self.idle_since = time.monotonic()
        self.maps = [MapFiles(settings, name) for name in RELAY_MAPS]
        self.marks = [one.mark() for one in self.maps]
        try:
            super().__init__(settings, owner, {})
        except OSError:
            os.close(self.writer)
            os.close(self.orders)
            raise
        os.close(self.orders)
        os.set_blocking(self.writer, False)

    @property
    def patience(self) -> float:
        """Seconds without any result until it is ended."""
        return RELAY_PATIENCE

    def kept(self) -> set[int]:
        """The descriptors that the child needs."""
        return {self.results, self.orders}

    def prepare(self) -> None:
        """Reads what only root may read; the runner needs none of it."""
        preload(*RELAY_MODULES)
        self.secrets = read_secrets(self.settings)
        self.generic = MapFiles(self.settings, "smtp_generic_maps")
        try:
            self.generic.lines()
        except MailError:
            return  # who asks for them hears so

    def work(self) -> None:
        """Does errands until the runner hangs up."""
        import threading

        self.lock = threading.Lock()
        outbox = Outbox(self, self.settings, self.spool, self.secrets)
        outbox.generic = self.generic
        outbox.run(self.orders)

    def report(self, number: int, *words: str) -> None:
        """One result line; if nobody reads it, there is nothing left to do."""
        try:
            with self.lock:
                super().report(number, *words)
        except OSError:
            os._exit(1)

    def report_dead(self, place: str, error: MailError) -> None:
        """That a destination cannot be reached now."""
        self.report(-1, place, error.status, error.relay, error.text)

    def report_missed(self, place: str, error: MailError) -> None:
        """Why a host of a destination did not do, though a later one may."""
        self.report(-2, place, error.status, error.relay, error.text)

    def settle(
        self, number: str, outcome: str, status: str, relay: str, text: str
    ) -> Task | None:
        """Takes in one result line, or what is said of a destination."""
        self.due = time.monotonic() + self.patience
        self.idle_since = time.monotonic()
        if number == "-2":
            self.missed.append(text)
            return None
        if number == "-1":
            self.dead.append((outcome, MailError(status, text, relay)))
            if is_about_us(status):
                self.marks = []  # the next one reads its passwords anew
            return None
        task = super().settle(number, outcome, status, relay, text)
        if task and task.done:
            self.served.add(task.destination.place)
        return task

    def give(self, tasks: list[Task]) -> None:
        """Puts tasks in line: one transaction for one message's recipients."""
        errands: dict[tuple, Errand] = {}
        full: list[Errand] = []
        for task in tasks:
            found, message = task.destination, task.message
            key = (message.queue_id, found.place, task.sender, found.forwarders)
            errand = errands.setdefault(key, Errand(*key))
            errand.recipients[found.target] = self.count, self.wishes(task)
            self.tasks[self.count] = task
            self.count += 1
            if len(errand.recipients) == MAX_RCPTS:
                full.append(errands.pop(key))
        self.unsent += b"".join(map(bytes, [*full, *errands.values()]))
        self.flush()

    def wishes(self, task: Task) -> Wishes:
        """What the next host is asked to report; of a list, what is usual."""
        if task.destination.sender:
            return NO_WISHES
        return task.message.file.envelope.wishes_of(task.recipients[0])

    def flush(self) -> None:
        """Hands on what the pipe takes; the rest follows."""
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.writer, self.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self.unsent = b""  # it is dead: finish() says so of its tasks

    @property
    def is_outdated(self) -> bool:
        """Whether its files have changed since it began."""
        return self.marks != [one.mark() for one in self.maps]

    def retire(self) -> None:
        """Has it end when it is done; its results are still heard."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def stop(self) -> None:
        """Has it end with what is on its way; the rest is due at once."""
        self.unsent += STOP + b"\n\n"
        self.flush()
        self.is_stopped = True
        self.retire()

    def finish(self) -> list[Task]:
        """Buries it; what was not begun has had no attempt."""
        if self.is_stopped:
            self.tasks.clear()
        return super().finish()


class Outgoing:
    """Tasks for other hosts: add() takes one, start() hands them on.

    Those on their way keep their message open, so only so many may be; who is
    turned away is told of by waiting() when there is room. `dead` are
    destinations that are not tried again by all the mail behind the first;
    when one answers again, all the mail that waits for it goes.
    """

    LINE = 256  # messages on their way to one destination
    UNKNOWN = 20  # the same, until it has taken one
    EVERYBODY = 600  # to all of them, as far as there are descriptors
    PLACES = 1000  # destinations of which something is remembered, about

    def __init__(
        self, settings: Settings, owner: User, spool: Spool, jobs: dict
    ) -> None:
        import resource  # a C module

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY:
            self.EVERYBODY = min(self.EVERYBODY, max(8, files // 2))
        self.settings = settings
        self.owner = owner
        self.spool = spool
        self.jobs = jobs
        self.job: RelayJob | None = None
        self.fresh: list[Task] = []
        self.under_way: dict[str, dict[int, int]] = {}  # place -> message -> tasks
        self.turned_away: dict[str, list[str]] = {}
        self.dead: dict[str, tuple[float, MailError]] = {}
        self.put_off: dict[str, dict[str, bool]] = {}  # place -> ids, for the dead
        self.answered: set[str] = set()  # places that have settled something
        self.missed: list[str] = []  # why hosts did not do, for the log

    def add(self, task: Task) -> bool:
        """Puts a task in line; False if the line is full."""
        place, message = task.destination.place, id(task.message)
        until, error = self.dead.get(place, (0.0, None))
        if until > time.monotonic():
            task.error = error
            self.put_off[place][task.message.queue_id] = True
            return True
        here = self.under_way.get(place, {})
        total = sum(map(len, self.under_way.values()))
        # A host that is silent must not have the places of all the others.
        room = self.LINE if place in self.answered else self.UNKNOWN
        is_full = len(here) >= room or total >= self.EVERYBODY and len(here) >= 2
        if is_full and message not in here:
            line = self.turned_away.setdefault(place, [])
            line.append(task.message.queue_id)
            return False
        self.under_way.setdefault(place, here)[message] = here.get(message, 0) + 1
        self.fresh.append(task)
        return True

    def start(self) -> None:
        """Hands on what is new. Raises OSError."""
        job = self.job
        is_idle = not (job and job.tasks) and not self.fresh
        if job and (is_idle and self.is_idle(job) or self.fresh and job.is_outdated):
            job.retire()
            self.job = job = None
        if self.fresh:
            if job is None:
                self.job = job = RelayJob(self.settings, self.owner, self.spool)
                self.jobs[job.fd] = job
            fresh, self.fresh = self.fresh, []
            job.give(fresh)
        elif job:
            job.flush()

    def is_idle(self, job: RelayJob) -> bool:
        """Whether a relay process has had nothing to do for long."""
        return job.idle_since < time.monotonic() - RELAY_IDLE

    def heard(self, job: RelayJob, settled: list[Task], is_over: bool) -> None:
        """What follows from a relay process's word, or from its end."""
        pause = 0.8 * self.settings.minimal_backoff_time
        for place, error in job.dead:
            # What did before has expired: the next one has the new password.
            if not (is_about_us(error.status) and place in job.served):
                self.dead[place] = (time.monotonic() + pause, error)
            self.put_off.setdefault(place, {})
        job.dead.clear()
        self.missed += job.missed
        job.missed.clear()
        self.forget()
        for task in settled:
            place, message = task.destination.place, id(task.message)
            here = self.under_way[place]
            here[message] -= 1
            if not here[message]:
                del here[message]
            if not here:
                del self.under_way[place]
            self.look_back(place, task)
        if is_over:
            job.retire()
            if job is self.job:
                self.job = None

    def forget(self) -> None:
        """Drops what is known of places that no mail has gone to for long."""
        old = time.monotonic() - 2 * self.settings.maximal_backoff_time
        if len(self.put_off) > self.PLACES:
            for place in list(self.put_off):
                if place not in self.dead or self.dead[place][0] < old:
                    self.dead.pop(place, None)
                    del self.put_off[place]
        if len(self.answered) > self.PLACES:
            self.answered.clear()  # they have to show it once more

    def revive(self) -> None:
        """Has each host tried once more, though it was found dead."""
        over = -float("inf")
        self.dead = {place: (over, error) for place, (_, error) in self.dead.items()}

    def look_back(self, place: str, task: Task) -> None:
        """Notes who waits for a dead host, and that one lives again."""
        if not task.error or task.error.relay != "none":
            self.answered.add(place)
        else:
            self.answered.discard(place)
        if place not in self.put_off:
            return
        error = task.error
        if error and (error.relay == "none" or is_about_us(error.status)):
            self.put_off[place][task.message.queue_id] = True
        elif task.done:
            self.dead.pop(place, None)
            waiting = self.put_off.pop(place)
            self.turned_away.setdefault(place, []).extend(waiting)

    def waiting(self) -> list[str]:
        """Ids of messages that were turned away, as there is room for them."""
        found = []
        for place, line in list(self.turned_away.items()):
            most = self.LINE if place in self.answered else self.UNKNOWN
            room = most - len(self.under_way.get(place, ()))
            if room >= most // 2:
                found += line[:room]
                del line[:room]
            if not line:
                del self.turned_away[place]
        return found


class Lanes:
    """Tasks in line for child processes: a lane for each user's command.

    A slow one holds up its own lane only. Those who wait keep their message
    open, so only so many may: add() says no to the others. What goes to other
    hosts is `outgoing`'s.
    """

    MAX_JOBS = 16  # processes at once
    LANE_JOBS = 2  # of them in one lane
    USER_JOBS = 4  # of one user, whatever the commands
    LANE_WAITING = 64  # messages that wait for one user's commands
    MAX_WAITING = 192  # messages that wait at all

    def __init__(self, settings: Settings, owner: User, spool: Spool) -> None:
        self.settings = settings
        self.lanes: dict[tuple, list[Task]] = {}
        # Beginning of a lane's name -> message -> its tasks that wait there.
        self.counts: dict[tuple, dict[int, int]] = {}
        self.jobs: dict[int, Job] = {}
        self.outgoing = Outgoing(settings, owner, spool, self.jobs)

    def name(self, task: Task) -> tuple[str, str]:
        """The lane of a task: whose it is, and which command."""
        destination = task.destination
        return str(destination.user.uid), destination.place

    def add(self, task: Task) -> bool:
        """Puts a task in line; False if the line is full."""
        if task.destination.kind != "pipe":
            return self.outgoing.add(task)
        name = self.name(task)
        line = self.lanes.get(name, [])
        if not (line and line[-1].message is task.message):
            mine = len(self.counts.get(name[:1], ()))
            everybodys = len(self.counts.get((), ()))
            if mine >= self.LANE_WAITING or everybodys >= self.MAX_WAITING:
                return False
        self.lanes.setdefault(name, line).append(task)
        self.count(name, task, 1)
        return True

    def count(self, name: tuple, task: Task, change: int) -> None:
        """Notes that a task waits in a lane (1), or no longer does (-1)."""
        for head in ((), name[:1]):
            messages = self.counts.setdefault(head, {})
            key = id(task.message)
            messages[key] = messages.get(key, 0) + change
            if not messages[key]:
                del messages[key]
            if not messages:
                del self.counts[head]

    def running(self, head: tuple) -> int:
        """How many processes work for lanes whose names begin like this."""
        jobs = (job for job in self.jobs.values() if isinstance(job, PipeJob))
        return sum(job.lane[: len(head)] == head for job in jobs)

    def has_room(self, name: tuple) -> bool:
        """Whether one more process may be started for a lane."""
        return (
            self.running(name) < self.LANE_JOBS
            and self.running(name[:1]) < self.USER_JOBS
            and self.running(()) < self.MAX_JOBS
        )

    def start(self) -> None:
        """Starts processes for those in line. Raises OSError."""
        self.outgoing.start()
        for name, line in list(self.lanes.items()):
            while line and self.has_room(name):
                job = PipeJob(self.settings, name, line[0])
                self.jobs[job.fd] = job
                self.count(name, line.pop(0), -1)
            # Whoever is at the end of the dictionary is asked last: turns.
            del self.lanes[name]
            if line:
                self.lanes[name] = line

    @property
    def is_working(self) -> bool:
        """Whether a task is still to be done."""
        return bool(self.lanes) or any(job.tasks for job in self.jobs.values())

    def stop(self) -> None:
        """Nothing new is begun; what is on its way is heard out."""
        self.lanes.clear()
        if self.outgoing.job:
            self.outgoing.job.stop()

    def end_late(self) -> None:
        """Ends processes that take longer than they may."""
        now = time.monotonic()
        for job in self.jobs.values():
            if job.due < now:
                job.end()

    def hear(self, fd: int) -> list[ActiveMessage]:
        """Reads what a process says; the messages that it was about."""
        job = self.jobs[fd]
        data = os.read(fd, BLOCK)
        settled = job.take(data)
        if not data:
            del self.jobs[fd]
        if isinstance(job, RelayJob):
            self.outgoing.heard(job, settled, not data)
        return list({id(task.message): task.message for task in settled}.values())


# == 27 Queue runner: Pickup, QueueRunner, take_lock ==========================
# The schedule: which message is tried when, and what follows from it.
# Failures: MailError for a queue that cannot be read; a message that cannot
# is set aside.

RESCAN = 10  # seconds between looks at the directories, should a wake-up be lost
BATCH = 64  # messages that are open at once
BUSY_TRIES = 30  # seconds that a locked mailbox is waited for before it counts

JOURNAL_ROOM = 1 << 20  # bytes free, or nothing is handed to a child
EARLY_TRIES = 50  # fifths of a second that `sendmail -q` waits for its reports
# Seconds until it is durable that what was relayed is gone. A power cut has
# what was relayed in them relayed again; to sync for each message takes a
# third of the runner's time, and holds up those who accept.
SYNC_AFTER = 0.1
LANE_PAUSE = 5  # seconds until one that found no place in the line asks again
LINE_PAUSE = 60  # the same, where it is told when there is one
# What is imported on the way of a message, some of it with a user's rights.
RUNNER_MODULES = ("fcntl", "heapq", "select")
DELIVERY_MODULES = ("mailbox", "re")  # 2 MB, which may wait for the first message


def take_lock(spool: Spool, patience: float, name: str = "queue") -> int | None:
    """Locks the queue against other runners: a descriptor, or None if taken.

    Waits up to `patience` seconds. The lock is the open directory's; it ends
    with the last process that has it, however that ends. One that was killed
    has it until the kernel is done with it. The daemon's master locks `hold`:
    that keeps out a second daemon, and tells `sendmail` not to wait.
    """
    import fcntl

    give_up = time.monotonic() + patience
    fd = os.open(spool.path(name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError:
            if time.monotonic() > give_up:
                os.close(fd)
                return None
            time.sleep(0.05)


def has_daemon(spool: Spool) -> bool:
    """Whether a daemon serves the queue."""
    lock = take_lock(spool, 0, "hold")
    if lock is None:
        return True
    os.close(lock)
    return False


def is_bounced(task: Task) -> bool:
    """Whether a task failed for good."""
    return bool(task.error) and not task.error.is_temporary


class Reporter:
    """Queues what senders are to be told of a message: report() is its door.

    A report's id derives from the message's: after a crash before the journal
    was written it is found, and not written twice. The null sender gets none
    (RFC 5321 section 4.5.5): its failures go to postmaster once.
    """

    def __init__(self, settings: Settings, spool: Spool, log: Log) -> None:
        self.settings = settings
        self.spool = spool
        self.log = log

    def report(self, message: ActiveMessage) -> list[str]:
        """The ids of the reports of this attempt, queued. Raises MailError."""
        about = self.about(message)
        by_sender: dict[str, list[Task]] = {}
        for task in filter(is_bounced, message.tasks.values()):
            by_sender.setdefault(task.sender, []).append(task)
        # One for all that failed; the owner of a list has one of his own.
        found = [
            Report(FAILED, to, self.events(message, tasks, FAILED), about)
            for to, tasks in by_sender.items()
        ]
        sender = message.file.envelope.sender
        if sender:
            late = self.events(message, self.late(message), DELAYED)
            well = self.successes(message)
            found.append(Report(DELAYED, sender, late, about))
            # One each, so that after a crash none is told of twice.
            found += [Report(DELIVERED, sender, [event], about) for event in well]
        return [self.post(message, report) for report in found if report.events]

    def late(self, message: ActiveMessage) -> list[Task]:
        """What is late, once: at the first attempt that finds it so old."""
        patience, now = self.settings.delay_warning_time, message.now
        due = message.file.envelope.arrived + patience
        if not patience or now < due or any(a.when >= due for a in message.journal):
            return []
        errors = (task for task in message.tasks.values() if task.error)
        return [task for task in errors if task.error.is_temporary]

    def successes(self, message: ActiveMessage) -> list[Event]:
        """Of those who asked: recipients that are done with now, and well.

        What the next host will report is not reported here.
        """
        wishes = message.file.envelope.wishes
        failed = {a.recipient for a in message.journal if a.outcome == BOUNCED}
        found = []
        for name in wishes:
            is_open = message.has_more and message.held[0] == name
            bad = is_open or name in failed | message.unwell
            if wishes[name].want("SUCCESS") and not bad:
                tasks = [t for t in message.tasks.values() if name in t.recipients]
                found += self.success(name, tasks, wishes[name].original)
        return found

    def success(self, name: str, tasks: list[Task], original: str) -> list[Event]:
        """The event of a recipient whose tasks all went well."""
        told = [task for task in tasks if not task.is_passed_on]
        if not told:
            return []
        target, (status, text) = told[0].destination.target, told[0].done
        kinds = {task.destination.kind for task in told}
        action = "relayed" if "remote" in kinds else "delivered"
        if len(tasks) > 1:  # who is behind it, is nobody's business
            action, target, text = "expanded", name, "delivered to its members"
        target = target if "@" in target else name
        return [Event(name, target, action, status, told[0].relay, text, original)]

    def events(
        self, message: ActiveMessage, tasks: list[Task], kind: ReportKind
    ) -> list[Event]:
        """What became of tasks that failed, for who wants to be told."""
        found = []
        for task in tasks:
            error, target = task.error, task.destination.target
            is_list = bool(task.destination.sender) and kind is FAILED
            for name in task.recipients:
                wishes = message.file.envelope.wishes_of(name)
                if (NO_WISHES if is_list else wishes).want(kind.wish):
                    to = target if "@" in target else name
                    words = (kind.action, error.status, error.relay, error.text)
                    found.append(Event(name, to, *words, wishes.original))
        return found

    def post(self, message: ActiveMessage, report: Report) -> str:
        """Puts one report into the queue; its id."""
        now, queue_id = time.time(), message.queue_id
        report_id, origin = self.identify(queue_id, report)
        if self.origin_of(report_id) == origin:
            return report_id  # from before a crash
        role, note = "report", report.kind.note
        if not report.to:
            report.to = f"postmaster@{self.settings.local_origin}"
            report.about = {**report.about, "auto": "auto-generated"}
            role, note = "notice", "postmaster non-delivery notification"
        body = "8BITMIME" + ("" if report.to.isascii() else " SMTPUTF8")
        # Its time is that of the attempt: so is_early() knows what was noted.
        more = {"arrived": message.now, "origin": origin, "kind": role, "body": body}
        is_whole = self.is_whole(report.kind, message)
        copy = message.file.chunks() if is_whole else [bytes(message.header)]
        with self.spool.create(Envelope("", [report.to], **more), report_id) as draft:
            host = self.settings.myhostname
            draft.write(received_field({}, host, report_id, now))
            for chunk in report.chunks(report_id, now, is_whole, copy):
                draft.write(chunk)
            draft.commit()  # the report is safe
        self.log.reported(queue_id, note, report_id)
        return report_id

    def identify(self, queue_id: str, report: Report) -> tuple[str, str]:
        """(id, origin) of a report: the same for the same news, always.

        What is told of a recipient decides, not how often something was told:
        a crash may come between the report and the note of it.
        """
        news = [(event.recipient, event.target) for event in report.events]
        if report.kind is DELAYED:
            news = []  # there is but one
        number = checksum(repr((report.to, sorted(news))))
        report_id = f"{queue_id}{report.kind.letter}{number % 1_000_000}"
        origin = f"report on {queue_id} {number:08x}"
        while self.origin_of(report_id) not in ("", origin):
            report_id += "0"  # others' news, once in a million
        return report_id, origin

    def about(self, message: ActiveMessage) -> dict:
        """What a report says of the message."""
        envelope = message.file.envelope
        ids = message.header.values("message-id")
        lifetime = self.settings.maximal_queue_lifetime
        return {
            "queue_id": message.queue_id,
            "host": self.settings.myhostname,
            "envelope": envelope,
            "message_id": ids[0] if ids else "",
            "expires": envelope.arrived + lifetime,
        }

    def is_whole(self, kind: ReportKind, message: ActiveMessage) -> bool:
        """Whether the message comes back whole: RET or its size may say no."""
        ret = message.file.envelope.ret
        is_small = message.file.size <= BOUNCE_SIZE
        return kind is FAILED and ret != "HDRS" and is_small

    def origin_of(self, report_id: str) -> str:
        """What a report in the queue is about, "" where there is none."""
        try:
            with self.spool.open(report_id) as file:
                return file.envelope.origin
        except FileNotFoundError:
            return ""


class Pickup:
    """Takes in what users left in the maildrop; run() is its door."""

    def __init__(self, settings: Settings, spool: Spool, log: Log) -> None:
        self.settings = settings
        self.spool = spool
        self.log = log
        self.drop = Maildrop(spool.directory)

    def run(self) -> None:
        """Copies what users left in maildrop/ into the queue."""
        import errno

        short = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
        for name in self.drop.names()[:1000]:
            try:
                self.take(name)
            except MailError as error:
                self.log.warning("pickup", f"maildrop/{name}: {error.text}")
                if error.is_temporary:
                    return  # no room: it stays where it is
                self.put_away(name)
            except Exception as error:  # noqa: BLE001 whatever a user wrote there
                if getattr(error, "errno", None) in short:
                    return  # our own trouble, not the drop's
                self.log.warning("pickup", f"maildrop/{name}: {error}")
                self.put_away(name)

    def put_away(self, name: str) -> None:
        """Moves a drop that is no message away, never following it.

        Under a name of its own, so that nothing in corrupt/ is lost.
        """
        path = self.spool.path("corrupt", f"{name}.{os.urandom(6).hex()}")
        try:
            os.rename(f"{self.drop.directory}/{name}", path)
        except OSError:
            return

    def take(self, name: str) -> None:
        """Copies one drop; only its owner is believed, not what it says."""
        limit = self.settings.message_size_limit + MAX_ENVELOPE
        uid, file = self.drop.take(name, limit)
        with file:
            now = time.time()
            sender = str(Address.parse(file.envelope.sender))
            recipients = [str(Address.parse(r)) for r in file.envelope.recipients]
            given = file.envelope
            more: dict = {"arrived": now, "origin": f"uid {uid}"}
            if "SMTPUTF8" in given.body:
                more["body"] = "8BITMIME SMTPUTF8"
            more.update(ret=given.ret, envid=given.envid, wishes=given.wishes)
            envelope = Envelope(sender, recipients, **more)
            # The same id again after a crash: the same message, not a second.
            if not self.spool.has(name):
                with self.spool.create(envelope, name) as draft:
                    host = self.settings.myhostname
                    draft.write(received_field({"uid": uid}, host, name, now))
                    for chunk in file.chunks():
                        draft.write(chunk)
                    draft.commit()
                self.log.accepted(name, Client("local", True, uid), envelope)
        os.unlink(f"{self.drop.directory}/{name}")


class QueueRunner:
    """Delivers what is due. One thread; needs the queue's lock.

    add() and scan() fill the schedule, run_due() makes one pass, run_forever()
    is the daemon's, run_once() that of `sendmail -q`.
    """

    def __init__(
        self,
        settings: Settings,
        spool: Spool,
        log: Log,
        users: Users,
    ) -> None:
        self.settings = settings
        self.spool = spool
        self.log = log
        self.users = users
        preload(*RUNNER_MODULES)
        preload_databases(settings.map_paths("alias_maps"))
        self.pickup = Pickup(settings, spool, log)
        self.schedule: list[tuple[float, str]] = []
        self.known: dict[str, float] = {}  # when each is due; the rest is stale
        self.busy: dict[str, int] = {}
        self.early: set[str] = set()  # reports that wait for their messages
        self.unsynced = 0.0  # since when what was relayed may come back, or 0
        self.unsettled = set(spool.ids())
        self.partial: list[ActiveMessage] = []  # lists that are not at their end
        self.lanes = Lanes(settings, queue_owner(settings, users), spool)
        self.history = History(spool)
        self.delivery = Delivery(settings, set(self.unsettled))
        self.reporter = Reporter(settings, spool, log)
        aliases = alias_maps(settings, self.warn)
        files = TargetFiles(users)
        self.router = Router(settings, aliases, users, files, self.warn)

    def warn(self, text: str) -> None:
        """A warning of the local delivery."""
        self.log.warning("local", text)

    def add(self, queue_id: str, when: float) -> None:
        """Puts a message on the schedule, unless it is there."""
        import heapq

        if queue_id not in self.known:
            self.known[queue_id] = when
            heapq.heappush(self.schedule, (when, queue_id))

    def hasten(self, queue_id: str, now: float) -> None:
        """Makes a message due that waits for room in a line."""
        if self.known.get(queue_id, 0.0) > now:
            del self.known[queue_id]
            self.add(queue_id, now)

    def scan(self) -> None:
        """Finds messages that nobody announced, in queue/ and maildrop/."""
        self.pickup.run()
        try:
            found = self.spool.ids()
        except OSError as error:  # it is looked at again
            self.log.warning("qmgr", f"the queue cannot be listed: {error.strerror}")
            return
        for queue_id in found:
            if queue_id not in self.known:
                try:
                    self.add(queue_id, self.spool.due(queue_id))
                except FileNotFoundError:
                    continue

    def flush(self) -> None:
        """Makes everything due now."""
        self.scan()
        self.lanes.outgoing.revive()
        due = [name for when, name in sorted(self.schedule) if self.is_due(when, name)]
        self.schedule = [(0.0, queue_id) for queue_id in due]
        self.known.update(dict.fromkeys(due, 0.0))

    def is_due(self, when: float, queue_id: str) -> bool:
        """Whether a line of the schedule still counts."""
        return self.known.get(queue_id) == when

    def run_due(self, now: float) -> bool:
        """Tries up to BATCH messages that are due; whether there were any."""
        import heapq

        batch = [self.partial.pop(0)] if self.partial else []
        while self.schedule and self.schedule[0][0] <= now and len(batch) < BATCH:
            when, queue_id = heapq.heappop(self.schedule)
            if not self.is_due(when, queue_id):
                continue
            self.known[queue_id] = -1.0  # under way
            message = self.take_up(queue_id, now)
            if message:
                batch.append(message)
        if not batch:
            return False
        preload(*DELIVERY_MODULES)
        self.deliver(batch)
        for message in batch:
            if not message.is_waiting:
                self.go_on(message)
        return True

    def take_up(self, queue_id: str, now: float) -> ActiveMessage | None:
        """Opens a message; one that is none is set aside."""
        file = None
        self.early.discard(queue_id)
        try:
            file = self.spool.open(queue_id)
            if not lock_file(file.fd, False) or not self.spool.has(queue_id):
                close_quietly(file.fd)  # a queue command is at it
                return self.retry(queue_id, now + 1)
            journal = self.spool.journal(queue_id)
            if journal or file.seen.st_mtime > now:
                # The overview holds no longer, also where times are whole
                # seconds, or two. After a crash flushed mail comes before
                # what is newer.
                self.spool.wait_until(queue_id, min(now, file.seen.st_mtime - 2))
            if self.is_early(queue_id, file.envelope.arrived):
                close_quietly(file.fd)
                self.early.add(queue_id)
                return self.retry(queue_id, now + 0.5)
            message = ActiveMessage(file, journal, now)
        except FileNotFoundError:
            self.drop(queue_id)
            return None
        except ValueError as error:
            self.drop(queue_id)
            self.set_aside(queue_id, str(error))
            return None
        except OSError as error:
            if file:
                close_quietly(file.fd)
            self.log.warning("qmgr", f"{queue_id}: {error.strerror}")
            self.drop(queue_id)
            return None
        if not message.journal and queue_id not in self.busy:
            self.log.active(message)
        return message

    def drop(self, queue_id: str) -> None:
        """Forgets a message that is not there, or cannot be opened now."""
        self.known.pop(queue_id, None)
        self.busy.pop(queue_id, None)

    def is_early(self, report_id: str, arrived: float) -> bool:
        """Whether a crash came between a report and the note of it.

        Its message is settled first, and then finds it still here.
        """
        parent = parent_id(report_id)
        if not {parent, report_id} <= self.unsettled or not self.spool.has(parent):
            return False
        return all(a.when != arrived for a in self.spool.journal(parent))

    def set_aside(self, queue_id: str, why: str) -> None:
        """Keeps a message that cannot go anywhere, in corrupt/."""
        self.known.pop(queue_id, None)
        try:
            path = self.spool.set_aside(queue_id)
        except OSError as error:
            path = f"queue/{queue_id} ({error.strerror})"
        self.log.warning("qmgr", f"{queue_id}: {why}: kept as {path}")

    def deliver(self, batch: list[ActiveMessage]) -> None:
        """Makes the tasks of a batch and does them, by mailbox and by host."""
        boxes: dict[str, list[Task]] = {}
        for message in batch:
            for task in self.plan(message):
                if task.destination.kind in Delivery.COURIERS:
                    boxes.setdefault(task.destination.key, []).append(task)
                else:
                    self.put_in_line(task)
        for tasks in boxes.values():
            self.delivery.deliver(tasks)
        self.start_jobs()

    def plan(self, message: ActiveMessage) -> list[Task]:
        """What is left to do of a message; one that makes no sense waits."""
        try:
            tasks = message.plan(self.router, self.settings.hopcount_limit)
        except Exception as error:  # noqa: BLE001 one message must not stop the others
            text = f"{type(error).__name__}: {error}"
            message.tasks, message.held = {}, None
            for name in message.file.envelope.recipients:
                failure = MailError("4.3.0", f"cannot be routed: {text}")
                message.add_task(name, Destination("error", name, error=failure))
            return []
        return [task for task in tasks if not task.is_over]

    def put_in_line(self, task: Task) -> None:
        """Has a child process do a task, when it is its turn."""
        if self.spool.free() < JOURNAL_ROOM:
            # What cannot be noted would be sent again at each attempt.
            task.error = MailError("4.3.1", "the queue's disk is full")
        elif not self.lanes.add(task):  # each that waits keeps a file open
            task.error = MailError("4.4.5", "more mail goes there than can at once")
            is_pipe = task.destination.kind == "pipe"
            task.pause = LANE_PAUSE if is_pipe else LINE_PAUSE

    def start_jobs(self) -> None:
        """Starts processes for the tasks in line."""
        try:
            self.lanes.start()
        except OSError as error:  # the next pass tries again
            self.log.warning("qmgr", f"no process for mail in line: {error.strerror}")

    def hear(self, fd: int) -> None:
        """Reads what a process says; settles the messages that it ends."""
        for message in self.lanes.hear(fd):
            if message.is_settled:
                continue
            if message.is_waiting:
                self.checkpoint(message)
            else:
                self.go_on(message)
        now, outgoing = time.time(), self.lanes.outgoing
        for sentence in outgoing.missed:
            self.log.line("smtp", sentence)
        outgoing.missed.clear()
        for queue_id in outgoing.waiting():
            self.hasten(queue_id, now)
        self.start_jobs()

    def sync_queue(self) -> None:
        """Makes durable that messages are gone."""
        try:
            self.spool.sync()
            self.unsynced = 0.0
        except OSError as error:
            self.log.warning("qmgr", f"queue: {error.strerror}")
            self.unsynced = time.monotonic()

    def go_on(self, message: ActiveMessage) -> None:
        """What follows when all tasks are over: the end, or the next ones."""
        if message in self.partial:
            return  # another child's last word, about tasks before these
        if not message.has_more:
            self.settle(message)
            return
        try:
            self.conclude_part(message)
        except Exception as error:  # noqa: BLE001 one message must not stop the others
            self.give_back(message, error)
            return
        if len(self.partial) < BATCH:
            self.partial.append(message)
            return
        # Each keeps a file open: this one's turn comes later, as a new round.
        message.is_settled = True
        close_quietly(message.file.fd)
        self.retry(message.queue_id, time.time() + LANE_PAUSE)

    def conclude_part(self, message: ActiveMessage) -> None:
        """Reports, logs, notes a part of a list. Raises OSError, MailError."""
        if self.is_expired(message):
            self.expire(message)
        message.look_back()
        self.report(message)
        self.log_attempts(message)
        lines = message.attempts(message.now)
        opened = message.keep_open({line.recipient for line in lines})
        self.spool.note(message.queue_id, opened + lines)

    def checkpoint(self, message: ActiveMessage) -> None:
        """Notes what is done of a message whose other part is on its way.

        A crash then repeats what was in flight, not all that went before.
        """
        new = message.take_new()
        try:
            if new:
                self.spool.note(message.queue_id, new)
        except OSError as error:
            message.forget_notes()
            self.log.warning("qmgr", f"{message.queue_id}: {error.strerror}")

    def settle(self, message: ActiveMessage) -> None:
        """Draws the consequences of an attempt: report, journal, next time."""
        message.is_settled = True
        self.unsettled.discard(message.queue_id)
        try:
            self.conclude(message)
        except Exception as error:  # noqa: BLE001 one message must not stop the others
            self.give_back(message, error)
        else:
            close_quietly(message.file.fd)

    def give_back(self, message: ActiveMessage, error: Exception) -> None:
        """The queue's disk fails: the message stays, and is tried again.

        What was delivered could not be noted: look before the next time. A
        report that is in the queue waits for the note of it, see is_early().
        """
        message.is_settled = True
        close_quietly(message.file.fd)
        self.busy.pop(message.queue_id, None)
        self.checkpoint(message)  # if that goes, what was done is not repeated
        self.delivery.suspects.add(message.queue_id)
        self.unsettled.update([message.queue_id, *message.reports])
        self.log.warning("qmgr", f"{message.queue_id}: {error}")
        when = message.now + self.settings.minimal_backoff_time
        self.retry(message.queue_id, when)

    def log_attempts(self, message: ActiveMessage) -> None:
        """What became of each task, in the log."""
        arrived = message.file.envelope.arrived
        for attempt in message.attempts(time.time()):
            self.log.attempt(message.queue_id, attempt, arrived, message.now)

    def conclude(self, message: ActiveMessage) -> None:
        """What settle() does if all goes well. Raises OSError, MailError."""
        queue_id, now = message.queue_id, time.time()
        later = self.put_off(message)
        if self.is_expired(message):
            self.expire(message)
        message.look_back()
        for task in later:
            message.unwell.update(task.recipients)
        self.report(message)
        self.log_attempts(message)
        if not later and not message.has_deferred:
            self.finish(message)
            return
        lines = message.attempts(message.now)
        lines += [line for task in later for line in task.attempts(message.now)]
        if message.tasks or message.opened:
            self.spool.note(queue_id, lines + message.close())
        if later:
            self.retry(queue_id, now + max(task.pause for task in later))
        else:
            self.back_off(message, now)

    def put_off(self, message: ActiveMessage) -> list[Task]:
        """Takes out tasks that can wait a moment, which is no deferral yet.

        A reader holds a lock for a second; relays are busy for some.
        """
        tasks = [task for task in message.tasks.values() if task.pause]
        tries = self.busy.pop(message.queue_id, 0)
        failed = (t.error for t in message.tasks.values() if t.error and not t.pause)
        # What was deferred would be tried again with them, second by second.
        is_late = message.has_deferred or any(error.is_temporary for error in failed)
        if not tasks or tries >= BUSY_TRIES or is_late:
            for task in tasks:
                task.pause = 0  # it counts as deferred
            return []
        self.busy[message.queue_id] = tries + 1
        for task in tasks:
            del message.tasks[task.destination.key]
        return tasks

    def remember(self, message: ActiveMessage) -> None:
        """Leaves a trace of a message that is done with."""
        file, ids = message.file, message.header.values("message-id")
        journal = message.journal
        if message.opened:  # parts of it were noted since
            journal = self.spool.journal(message.queue_id)
        attempts = journal + message.attempts(message.now)
        rows = message_rows(file.envelope, file.size, ids[0] if ids else "", attempts)
        self.history.add(message.queue_id, "message", rows)

    def finish(self, message: ActiveMessage) -> None:
        """Removes a message that every recipient is done with."""
        self.remember(message)
        self.known.pop(message.queue_id, None)
        self.delivery.suspects.discard(message.queue_id)
        if not message.is_set_aside:
            self.spool.remove(message.queue_id)
            self.log.removed(message.queue_id)
        # A power cut must not have another host told again.
        kinds = {task.destination.kind for task in message.tasks.values()}
        if not self.unsynced and not kinds.isdisjoint(("remote", "lmtp", "pipe")):
            self.unsynced = time.monotonic()

    def retry(self, queue_id: str, when: float) -> None:
        """Puts a message back on the schedule."""
        self.known.pop(queue_id, None)
        self.add(queue_id, when)

    def back_off(self, message: ActiveMessage, now: float) -> None:
        """Sets the next attempt, by age and chance."""
        chance = os.urandom(1)[0] / 255
        shortest = self.settings.minimal_backoff_time
        longest = self.settings.maximal_backoff_time
        when = now + max(1.0, retry_delay(message.age, shortest, longest, chance))
        self.spool.defer(message.file, when)
        self.retry(message.queue_id, when)

    def is_expired(self, message: ActiveMessage) -> bool:
        """Whether what cannot be delivered now has had its time."""
        sender = message.file.envelope.sender
        lifetime = (
            self.settings.maximal_queue_lifetime
            if sender
            else self.settings.bounce_queue_lifetime
        )
        return message.age > lifetime

    def expire(self, message: ActiveMessage) -> None:
        """Turns what is deferred into bounced."""
        for task in message.tasks.values():
            if task.error and task.error.is_temporary and not task.pause:
                status = "5" + task.error.status[1:]
                task.error = MailError(status, task.error.text, task.error.relay)
        sender = message.file.envelope.sender
        what = "returned to sender" if sender else "given up"
        text = f"{message.queue_id}: from=<{sender}>, status=expired, {what}"
        self.log.line("qmgr", text)

    def report(self, message: ActiveMessage) -> None:
        """Has the sender told, before anything is noted in the journal.

        The failure of a notice is nobody's any more: it is kept.
        """
        if message.file.envelope.kind == "notice":
            if any(map(is_bounced, message.tasks.values())):
                self.set_aside(message.queue_id, "nobody is left to tell of a failure")
                message.is_set_aside = True
            return
        for report_id in self.reporter.report(message):
            message.reports.append(report_id)
            self.add(report_id, time.time())

    def run_once(self, is_flush: bool = True) -> None:
        """Tries everything once, or what is due; waits for the children."""
        import select

        self.flush() if is_flush else self.scan()
        jobs, idle, next_scan = self.lanes.jobs, 0, 0.0
        while idle <= EARLY_TRIES:  # a report may wait for what the disk refuses
            has_run = self.run_due(time.time())
            is_busy = has_run or self.lanes.is_working or self.busy
            if not (is_busy or self.early):
                break
            idle = 0 if is_busy else idle + 1
            self.start_jobs()
            self.lanes.end_late()
            pause = 0 if has_run else 0.2
            for fd in select.select(list(jobs), [], [], pause)[0]:
                self.hear(fd)
            if time.monotonic() > next_scan:
                self.scan()  # what came meanwhile has nobody else
                next_scan = time.monotonic() + 1
        self.wait_for_jobs(GRACE)
        if self.unsynced:
            self.sync_queue()

    def run_forever(self, wake: int, ends: tuple[int, ...], beat: object) -> None:
        """Runs until one of `ends` becomes readable: a signal, or no master.

        `wake` brings what the SMTP server announces: ids and `flush`; beat()
        is called each time round.
        """
        import select

        self.sweep_and_scan()
        self.spool.keeps_spares = True
        next_scan = time.time() + RESCAN
        while True:
            beat()
            now = time.time()
            if now >= next_scan:
                self.scan()
                self.spool.drop_spares()
                next_scan = now + RESCAN
            has_more = self.run_due(now)
            self.start_jobs()
            self.lanes.end_late()
            pause = 0 if has_more else min(self.pause(now), next_scan - now)
            fds = [wake, *ends, *self.lanes.jobs]
            if self.unsynced:
                pause = min(pause, self.unsynced + SYNC_AFTER - time.monotonic())
            ready = select.select(fds, [], [], max(0, pause))[0]
            if self.unsynced and self.unsynced + SYNC_AFTER <= time.monotonic():
                self.sync_queue()
            if any(fd in ready for fd in ends):
                self.spool.keeps_spares = self.spool.has_retired = False
                self.wait_for_jobs(GRACE)
                return self.spool.drop_spares()
            for fd in ready:
                self.listen(wake) if fd == wake else self.hear(fd)

    def wait_for_jobs(self, seconds: float) -> None:
        """Hears out the children: what they do unheard is done twice."""
        import select

        end = time.monotonic() + seconds
        self.lanes.stop()
        jobs = self.lanes.jobs
        while jobs and time.monotonic() < end:
            for fd in select.select(list(jobs), [], [], 0.5)[0]:
                self.hear(fd)
        for job in jobs.values():
            if isinstance(job, RelayJob):
                job.end()  # or it would send what the next runner sends, too

    def sweep_and_scan(self) -> None:
        """What a runner does first."""
        self.spool.sweep(time.time())
        self.scan()

    def pause(self, now: float) -> float:
        """Seconds until the next message is due."""
        return self.schedule[0][0] - now if self.schedule else RESCAN

    def listen(self, wake: int) -> None:
        """Takes up what the SMTP server announces."""
        for word in dict.fromkeys(os_text(os.read(wake, 1 << 16)).split("\n")):
            if word == "flush":
                self.flush()
            elif word.startswith("now "):  # a person wants it tried
                self.lanes.outgoing.revive()
                self.add(word[4:], time.time())
                self.hasten(word[4:], time.time())
            elif is_id(word):
                self.add(word, time.time())


# == 28 SMTP server: Arrival, Conversation, Crew, SmtpServer ==================
# Sessions over sockets: TCP, the submit socket, and -bs on standard input. One
# thread talks with all clients and waits for none; what may take long (a disk,
# a password) is a chore, done by a few others. With a thread a client the same
# dialogue costs four times the CPU (0.51 ms against 0.13), all of it turns.
# Failures: a reply to the client; whatever else goes wrong ends one session.

LINGER = 1  # seconds that a client has to take in why we hang up
READ_TIMEOUT = 300  # seconds a client may be silent, RFC 5321 section 4.5.3.2.7
SLOWEST = 500  # bytes a second of a message, on average; Postfix smtpd_min_data_rate
GREET_WAIT = 0.5  # seconds in which a stranger must not speak
PIECE = 1 << 16  # bytes read at once

ACCEPTS = 64  # connections accepted in a row
SPARE_FILES = 96  # descriptors that are not for connections
SYNCERS = 4  # files that are made durable at the same time
READ, WRITE = 1, 2  # selectors.EVENT_READ and EVENT_WRITE


QUEUE_FAILURES = (b"451 4.3.", b"452 4.3.")  # storage_error()'s replies


class PipeStream:
    """Standard input and output as a stream, for -bs; LF may end lines.

    `note(side, data)` hears what C, the client, and S, the server, say.
    """

    def __init__(self, note: object = lambda side, data: None) -> None:
        self.held = b""
        self.note = note
        self.has_failed = False  # the queue did not take a message

    def recv(self, size: int) -> bytes:
        """Some bytes, each LF made CRLF; b"" at the end."""
        data = os.read(0, size)
        self.note("C", data)
        data = self.held + data
        if data.endswith(b"\r") and data != self.held:
            self.held, data = b"\r", data[:-1]  # its LF may be still to come
            return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") or self.recv(
                size
            )
        self.held = b""
        return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")

    def sendall(self, data: bytes) -> None:
        """All of `data`."""
        self.note("S", data)
        lines = data.split(b"\n") if b" 4.3." in data else ()
        self.has_failed |= any(line[:8] in QUEUE_FAILURES for line in lines)
        write_all(1, data)


class Desk:
    """What a conversation needs of the house: one for each server process.

    `announce(word)` tells the queue runner of a new message or a flush;
    `ails()` says what is wrong with the daemon, or "".
    """

    def __init__(
        self,
        settings: Settings,
        spool: Spool,
        log: Log,
        router: Router,
        announce: object,
    ) -> None:
        self.settings = settings
        self.spool = spool
        self.log = log
        self.router = router
        self.announce = announce
        self.ails: object = str
        self.passwords = Passwords(settings.smtpd_sasl_password_file)


# What the header of a message from this host has, and has not.
COMPLETE_FIELDS = (b"\nfrom:", b"\ndate:", b"\nmessage-id:")
SECRET_FIELDS = tuple(b"\n%s:" % os_bytes(name) for name in SECRETS)


def unique_word(now: float) -> str:
    """The left side of a Message-ID."""
    t = time.gmtime(now)
    stamp = time.strftime("%Y%m%d%H%M%S", t)  # digits only: no locale in them
    return f"{stamp}.{os.urandom(6).hex().upper()}"


def message_origin(
    settings: Settings, user: User, sender: str, full_name: str = ""
) -> dict:
    """What complete_header() wants to know of who sends a message."""
    now = time.time()
    return {
        "address": sender or str(Address(user.name, settings.myorigin)),
        "name": full_name or gecos_name(user.gecos, user.name),
        "host": settings.myhostname,
        "unique": unique_word(now),
        "now": now,
    }


class Arrival:
    """A message on its way from the wire into the spool.

    take() only holds what comes; flush() and finish() write it, and may take
    long. After a failure the rest is read, and thrown away.
    """

    def __init__(self, desk: Desk, session: Session, reader: WireReader) -> None:
        self.desk = desk
        self.session = session
        self.reader = reader
        self.now = time.time()
        self.text = bytearray()
        self.last = b""  # the last byte written
        self.draft: Draft | None = None
        self.failure: MailError | None = None

    def take(self, data: bytes) -> None:
        """Some bytes as they came."""
        text = self.reader.feed(data)
        if not (self.failure or self.reader.fault):
            self.text += text

    @property
    def is_full(self) -> bool:
        """Whether more is held than should be."""
        return len(self.text) >= 2 * PIECE

    def flush(self) -> None:
        """Writes what is held; what fails is told at the end."""
        try:
            self.write()
        except MailError as error:
            self.failure = error
            self.drop()
        self.text.clear()

    def write(self) -> None:
        """Writes what is held, behind our Received. Raises MailError."""
        if self.draft is None:
            session = self.session
            envelope = session.envelope(self.now)
            self.draft = draft = self.desk.spool.create(envelope)
            if session.transaction.is_for_later:
                draft.due = self.now + self.desk.settings.minimal_backoff_time
            who = session.who
            self.desk.log.accepted(draft.queue_id, session.client, envelope, who)
            draft.write(session.received(draft.queue_id, self.now))
            text = bytes(self.text)
            if session.client.is_local and not session.transaction.is_as_it_is:
                text = self.completed(text, envelope)
            self.text = bytearray(begin_body(text))
        self.last = self.text[-1:] or self.last
        self.draft.write(self.text)

    def completed(self, text: bytes, envelope: Envelope) -> bytes:
        """Local mail with what its header lacks, and without its secrets.

        sendmail sees to that itself: a look tells; -bs has it done here.
        """
        head = b"\n" + text[: text.find(b"\n\n") + 1 or len(text)].lower()
        is_whole = all(name in head for name in COMPLETE_FIELDS)
        is_open = b"\n\n" not in text and self.is_full  # more of it is to come
        if is_open or is_whole and not any(name in head for name in SECRET_FIELDS):
            return text
        user = self.desk.router.users.by_uid(self.session.client.uid)
        origin = message_origin(self.desk.settings, user, envelope.sender)
        header = complete_header(Header.parse(drop_from_lines(text)), origin)
        return bytes(header) + b"\n" + header.rest

    @property
    def is_small(self) -> bool:
        """Whether it can be written with others, without keeping them."""
        return self.draft is None and len(self.text) <= SPARE_SIZE

    def finish(self) -> Draft:
        """Writes the last of it: the draft, to commit. Raises MailError."""
        error = self.failure or self.reader.fault
        if error:
            self.drop()
            raise error
        try:
            self.write()
            if self.last not in (b"", b"\n"):
                self.draft.write(b"\n")  # BDAT may end in the middle of a line
        except BaseException:
            self.drop()
            raise
        return self.draft

    def drop(self) -> None:
        """Removes what was written: nobody was told that it is safe."""
        draft, self.draft = self.draft, None
        if draft and draft.is_open:
            draft.discard()


class Conversation:
    """One client's session: take() is given what comes, `output` has replies.

    `chore` is what has to be done before it goes on, and may take long: call
    do_chore(), in any thread, once `output` is sent. `wish` is what the caller
    is to do then: "close" hangs up, "tls" secures the connection.
    """

    def __init__(self, desk: Desk, client: Client) -> None:
        self.desk = desk
        room = desk.spool.free
        self.session = Session(desk.settings, client, desk.router.verify, room)
        self.buffer = b""
        self.output = bytearray()
        self.chore: object = None
        self.wish = ""
        self.pause_until = 0.0  # when a slow recipient is answered
        self.news: list[str] = []  # what the runner is to hear
        self.arrival: Arrival | None = None
        self.is_reading = False  # whether a message's bytes come, no commands
        self.is_skipping = False
        self.has_quit = False
        self.entries: object = iter(())
        self.since = time.monotonic()  # when the present command began

    @property
    def deadline(self) -> float:
        """When a client has been slow or silent for too long (monotonic)."""
        since = self.since
        if self.is_reading:
            since += self.arrival.reader.size / SLOWEST
            since = min(since, time.monotonic())
        return since + READ_TIMEOUT

    def say(self, reply: Reply) -> None:
        """One more reply to be sent."""
        self.output += bytes(reply)
        self.since = time.monotonic()

    def greet(self) -> None:
        """The first thing that is said."""
        self.say(self.session.greeting())

    def take(self, data: bytes) -> None:
        """Some bytes of the client's: answers what is complete."""
        self.buffer += data
        self.go_on()

    def go_on(self) -> None:
        """Answers what has come, up to a chore or a wish.

        The replies of a pipelined group go out in one piece (RFC 2920).
        """
        while not (self.chore or self.wish):
            is_more = self.read_message() if self.is_reading else self.read_command()
            if not is_more:
                return

    def read_command(self) -> bool:
        """Answers a line; False if none is complete."""
        line, newline, rest = self.buffer.partition(b"\n")
        if not newline:
            if len(line) > self.session.longest_line:
                self.is_skipping, self.buffer = True, b""  # the rest is no command
            return False
        self.buffer = rest
        reply = self.answer(line)
        self.say(reply)
        if reply.action:
            self.ACTIONS[reply.action](self)
        if self.arrival and not (self.is_reading or self.session.is_chunking):
            self.drop_arrival()  # RSET or EHLO between chunks
        return True

    def answer(self, line: bytes) -> Reply:
        """The reply to one line, as it came up to its LF."""
        was_skipping, self.is_skipping = self.is_skipping, False
        session = self.session
        is_long = was_skipping or len(line) > session.longest_line
        if is_long or not line.endswith(b"\r"):
            session.is_asked = False  # an AUTH that goes on ends with it
            reply = session.counted(LINE_TOO_LONG if is_long else BARE_LF, "UNKNOWN")
        else:
            reply = session.feed(line[:-1])
        self.write_notes()
        return reply

    def write_notes(self) -> None:
        """Logs what the session refused."""
        for note in self.session.notes:
            self.desk.log.line("smtpd", note)
        self.session.notes.clear()

    def begin_message(self) -> None:
        """DATA: a message follows, up to its dot."""
        reader = DotReader(self.desk.settings.message_size_limit)
        self.arrival = Arrival(self.desk, self.session, reader)
        self.is_reading = True

    def begin_chunk(self) -> None:
        """BDAT: so many bytes follow, whether they are wanted or not."""
        if self.arrival is None:
            reader = ChunkReader(self.desk.settings.message_size_limit)
            self.arrival = Arrival(self.desk, self.session, reader)
        if self.session.chunk_error:
            self.arrival.failure = MailError("5.5.1", "not wanted")
        self.arrival.reader.expect(*self.session.chunk)
        self.is_reading = True

    def read_message(self) -> bool:
        """Takes in what has come of a message; False if nothing has."""
        arrival, reader = self.arrival, self.arrival.reader
        is_empty_chunk = isinstance(reader, ChunkReader) and not reader.wanted
        if not self.buffer and not is_empty_chunk:
            return False
        data, self.buffer = self.buffer, b""
        arrival.take(data)
        if reader.ended:
            self.buffer, self.is_reading = reader.rest, False
            self.end_part()
        elif arrival.is_full:
            self.chore = arrival.flush
        return True

    def end_part(self) -> None:
        """What follows a chunk, or the message's end."""
        is_chunk = isinstance(self.arrival.reader, ChunkReader)
        if is_chunk and self.session.chunk_error:
            self.drop_arrival()
            self.say(self.session.chunk_taken())
        elif is_chunk and not self.session.chunk[1]:
            self.say(self.session.chunk_taken())
        else:
            self.chore = self.finish_message

    def finish_message(self) -> None:
        """Makes a message mail, and says so."""
        draft = self.finish_draft()
        if draft:
            self.end_message(Draft.commit_together([draft]).get(draft))

    def finish_draft(self) -> Draft | None:
        """Writes a message to its end; says so if that fails."""
        try:
            return self.arrival.finish()
        except MailError as error:
            self.end_message(error)
        except Exception as error:  # noqa: BLE001 one message must not stop the others
            text = f"{type(error).__name__}: {error}"
            self.desk.log.warning("smtpd", text)
            self.end_message(MailError("4.3.0", "Cannot store the message"))
        return None

    def end_message(self, failure: MailError | None) -> None:
        """The last word on a message.

        Nothing that can fail or takes long stands between the commit and this
        reply (RFC 1047).
        """
        arrival, self.arrival = self.arrival, None
        if failure:
            reply = self.session.failed(failure)
        else:
            queue_id = arrival.draft.queue_id
            reply = self.session.stored(queue_id)
            if not arrival.draft.due:
                self.news.append(queue_id)
        self.write_notes()
        self.say(reply)

    @property
    def has_small_message(self) -> bool:
        """Whether what is to be done is to make mail of a small message."""
        is_end = self.arrival and not self.is_reading
        return bool(is_end and self.arrival.is_small)

    def drop_arrival(self) -> None:
        """Forgets a message that will not be finished."""
        if self.arrival:
            self.arrival.drop()
        self.arrival = None

    def check_password(self) -> None:
        """AUTH: a chore, for a password takes 50 ms to check."""
        self.chore = self.finish_auth

    def finish_auth(self) -> None:
        """Says whether the password was right."""
        try:
            is_right = self.desk.passwords.check(*self.session.credentials)
            reply = self.session.authenticated(is_right)
        except Exception as error:  # noqa: BLE001 a file that is wrong, a part of Python
            self.desk.log.warning("smtpd", f"AUTH: {error}")
            self.session.answers = []
            reply = self.session.counted(AUTH_LATER, "AUTH")
        self.write_notes()
        self.say(reply)
        self.wish = "close" if reply.action else ""

    def begin_tls(self) -> None:
        """STARTTLS: what came with it is forgotten (CVE-2011-0411)."""
        self.buffer, self.wish = b"", "tls"

    def secure(self, cipher: str) -> None:
        """TLS is there."""
        self.session.secured(cipher)
        self.wish, self.since = "", time.monotonic()

    def list_queue(self) -> None:
        """XQUEUE: the queue follows, a piece at a time."""
        self.entries = self.desk.spool.entries()
        self.chore = self.list_some

    def list_some(self) -> None:
        """Some of the queue."""
        for entry in self.entries:
            self.output += bytes(entry)
            if len(self.output) > PIECE:
                self.chore = self.list_some
                return
        self.output += b".\n\n"

    def flush_queue(self) -> None:
        """XFLUSH: the runner is told when this is sent."""
        if self.session.client.uid in (0, os.geteuid()):
            self.news.append("flush")
            self.say(QUEUE_IS_RUN)
        else:
            self.chore = self.flush_own

    def flush_own(self) -> None:
        """A user has what the user sent tried now."""
        own = f"uid {self.session.client.uid}"
        for entry in self.desk.spool.entries():
            if entry.envelope.origin == own and entry.state not in ("hold", "maildrop"):
                self.news.append(f"now {entry.queue_id}")
        self.say(QUEUE_IS_RUN)

    def trace(self) -> None:
        """XTRACE: a chore, for the past is read through."""
        self.chore = self.tell_trace

    def tell_trace(self) -> None:
        """What happened to a message; nothing where it is not the user's."""
        history = History(self.desk.spool)
        try:
            found = history.trace(self.session.sought, self.session.client.uid)
        except OSError:
            found = None
        for kind, rows in found.records if found else ():
            self.output += os_bytes(record_text(found.queue_id, kind, rows))
        self.output += b".\n"
        self.wish = ""

    def dawdle(self) -> None:
        """RCPT to slow-SECONDS, where mail is captured: a chore that waits."""
        self.pause_until = time.monotonic() + int(self.session.sought)
        self.chore = self.finish_pause

    def finish_pause(self) -> None:
        """Says after a while that the recipient is fine; others have turns."""
        left = self.pause_until - time.monotonic()
        if left > 0:
            time.sleep(min(left, 0.01))
            self.chore = self.finish_pause
            return
        self.pause_until = 0.0
        self.say(RECIPIENT_OK)

    def act(self) -> None:
        """XDO: a chore, for it syncs the disk."""
        self.chore = self.finish_act

    def finish_act(self) -> None:
        """A queue command on one message: root's, or of whoever sent it."""
        spool, uid = self.desk.spool, self.session.client.uid
        action, _, queue_id = self.session.sought.partition(" ")
        try:
            with spool.find(queue_id) as file:
                if uid and file.envelope.origin != f"uid {uid}":
                    raise MailError("5.7.1", "somebody else sent it: ask root")
            spool.act(action, queue_id)
            self.desk.log.changed(queue_id, action, uid)
            if action not in ("hold", "remove") and spool.has(queue_id):
                self.news.append(f"now {queue_id}")
            self.say(Reply(250, "2.0.0", ACTIONS[action][0]))
        except MailError as error:
            self.say(Reply.refusal(error))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no message"
            self.say(Reply(550, "5.1.1", why))
        self.wish = ""

    def tell_health(self) -> None:
        """XHEALTH: what ails the daemon."""
        why = self.desk.ails()
        self.say(Reply(451, "4.3.0", why) if why else Reply(250, "2.0.0", "Ok"))

    def close(self) -> None:
        """What was said is the last word."""
        self.wish = "close"
        self.has_quit = self.session.last_verb == "QUIT"

    ACTIONS = {
        "data": begin_message,
        "chunk": begin_chunk,
        "tls": begin_tls,
        "pause": dawdle,
        "auth": check_password,
        "queue": list_queue,
        "flush": flush_queue,
        "health": tell_health,
        "trace": trace,
        "act": act,
        "close": close,
    }

    def do_chore(self) -> None:
        """Does what may take long, and goes on."""
        chore, self.chore = self.chore, None
        chore()
        self.go_on()

    def tell_news(self) -> None:
        """Tells the runner what it is to hear: after the client knows."""
        while self.news:
            self.desk.announce(self.news.pop(0))

    def lose(self, why: str) -> None:
        """The client is gone, or has been silent for too long."""
        session, where = self.session, self.session.last_verb
        if self.is_reading:
            where += f" ({self.arrival.reader.size} bytes)"
        self.drop_arrival()
        if not session.client.is_local:
            text = f"{why} after {where} from {session.client}"
            self.desk.log.line("smtpd", text)

    def run(self, stream: object) -> None:
        """The whole of it on a stream that may be waited for."""
        self.greet()
        while True:
            if self.output:
                stream.sendall(bytes(self.output))
                self.output.clear()
            self.tell_news()
            if self.chore:
                self.do_chore()
            elif self.wish:
                return
            else:
                data = stream.recv(PIECE)
                if not data:
                    self.lose("lost connection")
                    return
                self.take(data)


class Crew:
    """A few threads that do one thing for whatever they are handed.

    They are started as they are needed, and kept: none for a message.
    """

    def __init__(self, limit: int, work: object) -> None:
        import queue
        import threading

        self.limit = limit
        self.work = work
        self.waiting = queue.SimpleQueue()
        self.guard = threading.Lock()
        self.threads = 0
        self.busy = 0

    def submit(self, item: object) -> None:
        """Has a thread work on `item`; does it itself if there is none."""
        with self.guard:
            self.busy += 1
            is_short = self.busy > self.threads < self.limit
        if is_short:
            self.start_thread()
        if self.threads:
            self.waiting.put(item)
        else:
            self.serve(item)

    def start_thread(self) -> None:
        """One thread more, if the system has one for us."""
        import threading

        try:
            threading.Thread(target=self.live, daemon=True).start()
        except RuntimeError:
            return
        self.threads += 1

    def live(self) -> None:
        """One thread's life."""
        while True:
            self.serve(self.waiting.get())

    def serve(self, item: object) -> None:
        """One item."""
        try:
            self.work(item)
        finally:
            with self.guard:
                self.busy -= 1


class Syncers:
    """sync_files() by a few threads, at the same time.

    The file system then writes its journal once for many: 921 messages a
    second of ten clients against 809 (medians of eight pairs of runs).
    """

    def __init__(self) -> None:
        self.crew = Crew(SYNCERS, self.sync)

    def __call__(self, fds: list[int]) -> dict[int, OSError]:
        """As sync_files(): descriptor -> what failed."""
        import queue

        if len(fds) < 2:
            return sync_files(fds)
        done = queue.SimpleQueue()
        for fd in fds:
            self.crew.submit((fd, done))
        failures = {}
        for _ in fds:
            failures.update(done.get())
        return failures

    def sync(self, job: tuple) -> None:
        """A thread's part: one file."""
        fd, done = job
        done.put(sync_files([fd]))


def peer_uid(connection: object) -> int:
    """The uid at the other end of a Unix socket, from the kernel.

    -1 where the system does not say (SO_PEERCRED is Linux's).
    """
    import socket
    import struct

    if not hasattr(socket, "SO_PEERCRED"):
        return -1
    size = struct.calcsize("3i")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return struct.unpack("3i", data)[1]


class Networks:
    """mynetworks: who may relay. Raises ProgramError for a bad one."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        import ipaddress

        self.networks = []
        self.known: dict[str, bool] = {}
        for text in texts:
            bare = text.replace("[", "").replace("]", "")
            try:
                self.networks.append(ipaddress.ip_network(bare, False))
            except ValueError as error:
                why = f"mynetworks: {error}: write 192.0.2.0/24 or [2001:db8::]/32"
                raise ProgramError(EX_CONFIG, why) from None

    def __contains__(self, address: str) -> bool:
        if address not in self.known:
            if len(self.known) > 1000:
                self.known.clear()
            self.known[address] = self.find(address)
        return self.known[address]

    def find(self, address: str) -> bool:
        """Whether an address is in one of them."""
        import ipaddress

        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip.version == n.version and ip in n for n in self.networks)


def is_unready(error: OSError) -> bool:
    """Whether TLS only waits for the other side."""
    return type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")


class Connection:
    """A client's socket and its conversation, and whose turn it is.

    It is the server's one thread that reads and answers, but while `is_busy`
    a thread of the crew has it. `state` is greet (a stranger, who must not
    speak yet), tls (hands are being shaken), talk or drain (all is said).
    """

    __slots__ = (
        *("socket", "client", "whose", "conversation", "state", "deadline"),
        *("is_busy", "is_paused", "is_broken", "events", "ready"),
    )

    def __init__(self, connection: object, client: Client, whose: str) -> None:
        self.socket = connection
        self.client = client
        self.whose = whose
        self.conversation: Conversation | None = None
        self.state = "talk"
        self.deadline = 0.0
        self.is_busy = self.is_paused = self.is_broken = False
        self.events = 0
        self.ready: object = None  # what the selector calls

    @property
    def is_secure(self) -> bool:
        """Whether it speaks TLS."""
        return bool(self.conversation.session.cipher)

    @property
    def has_more(self) -> bool:
        """Whether TLS has deciphered more, of which no selector tells.

        Only while what its client says may be read.
        """
        may_read = self.events == READ and not self.is_busy
        return may_read and self.is_secure and bool(self.socket.pending())

    def send(self) -> bool:
        """Sends what it can of what is to be said; whether that was all.

        Raises OSError for a client that is gone.
        """
        output = self.conversation.output
        while output:
            try:
                count = self.socket.send(output)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if is_unready(error):
                    return False
                raise
            del output[:count]
        self.conversation.tell_news()
        return True


class Group:
    """Connections whose messages are made mail together."""

    def __init__(self, connections: list[Connection]) -> None:
        self.connections = connections
        self.drafts: dict[Connection, Draft] = {}
        self.failures: dict[Draft, MailError | None] = {}
        for connection in connections:
            connection.conversation.chore = None
            draft = connection.conversation.finish_draft()
            if draft:
                self.drafts[connection] = draft

    def commit(self, sync: object) -> None:
        """Makes them durable; `sync(fds)` is for their files."""
        drafts = list(self.drafts.values())
        try:
            self.failures = Draft.commit_together(drafts, sync)
        except Exception as error:  # noqa: BLE001 nobody is told that they are safe
            failure = MailError("4.3.0", f"{type(error).__name__}: {error}")
            self.failures = dict.fromkeys(drafts, failure)


def raise_file_limit() -> None:
    """As many descriptors as the system lets this process have."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 1 << 16 if most == resource.RLIM_INFINITY else min(most, 1 << 16)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def connection_limit(wanted: int) -> int:
    """How many connections this process may have, `wanted` at most."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return wanted
    return max(8, min(wanted, most - SPARE_FILES))


def tls_context(settings: Settings) -> object:
    """The listener's certificate, ready to be shown; None if there is none.

    Raises ProgramError.
    """
    cert = settings.smtpd_tls_cert_file
    if not cert:
        return None
    import ssl  # 20 ms and 4 MB; only where there is a certificate

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    key = settings.smtpd_tls_key_file or None
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        why = f"smtpd_tls_cert_file {cert}, smtpd_tls_key_file {key or cert}: {error}"
        todo = "they must be a PEM certificate and its key, without a password"
        raise ProgramError(EX_CONFIG, f"{printable(why)}: {todo}") from None
    return context


class Listener:
    """A bound socket; `is_tls` for one that speaks TLS from the first byte."""

    def __init__(self, bound: object, is_tls: bool = False) -> None:
        self.bound = bound
        self.is_tls = is_tls

    def server(self) -> object:
        """The socketserver.TCPServer that accepts on it."""
        import socketserver  # 10 ms; only the daemon needs it

        made = socketserver.TCPServer(self.bound.getsockname(), None, False)
        made.socket.close()
        made.socket = self.bound
        self.bound.setblocking(False)
        return made


class SmtpServer:
    """The server process: one thread for all clients, a crew for chores.

    `listeners` are bound by the master before rights are dropped. serve()
    returns when it has been told to end.
    """

    def __init__(self, desk: Desk, listeners: list, tls: object = None) -> None:
        import collections
        import selectors

        self.desk = desk
        self.tls = tls
        self.servers = [(made.server(), made.is_tls) for made in listeners]
        self.accepting = {server for server, _ in self.servers}
        self.crew = Crew(CREW, self.work)
        self.networks = Networks(desk.settings.mynetworks)
        self.limit = connection_limit(desk.settings.default_process_limit)
        self.connections: set[Connection] = set()
        self.strangers: list[Connection] = []  # who wait for their greeting
        self.shares: dict[str, int] = {}  # client -> its connections
        self.group: list[Connection] = []  # whose messages are all here
        self.is_committing = False
        self.committer = Crew(1, self.commit_group)
        self.syncers = Syncers()
        self.selector = selectors.DefaultSelector()
        self.returned = collections.deque()  # what the crew hands back
        self.wake, self.waker = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self.waker, False)
        self.accepts_at = 0.0  # when accepting goes on, 0 if it does
        self.next_look = 0.0
        self.next_warning = 0.0
        self.is_closing = False
        self.must_go = False  # every client, with 421

    def serve(self, ends: tuple, decide: object, beat: object = None) -> None:
        """Serves until one of `ends` is readable and what follows is done.

        decide() then says how long open sessions may go on, in seconds; 0
        ends them with 421. `beat()` is called now and then.
        """
        self.listen()
        self.selector.register(self.wake, READ, self.collect)
        for fd in ends:
            self.selector.register(fd, READ)
        give_up = NO_LIMIT
        while time.monotonic() < give_up:
            ready = self.selector.select(self.pause())
            # Those who have gone make room for those who have come.
            ready.sort(key=lambda pair: pair[0].fileobj in self.accepting)
            for key, mask in ready:
                if key.data:
                    key.data(mask)
                elif not self.must_go:
                    give_up = self.close_down(decide())
            if self.group and not self.is_committing:
                self.commit()
            self.look_after(time.monotonic())
            if beat:
                beat()
            if self.is_closing and not self.connections:
                return
        self.hang_up()

    def pause(self) -> float:
        """Seconds until something may be overdue."""
        if self.strangers:
            return 0.1
        return 1.0 if self.connections or self.accepts_at else 5.0

    def listen(self) -> None:
        """Accepts connections, from now on."""
        self.accepts_at = 0.0
        for server, is_tls in self.servers:
            self.selector.register(server, READ, self.acceptor(server, is_tls))

    def rest(self) -> None:
        """Accepts none for a moment: they wait in the kernel's queue."""
        for server, _ in self.servers:
            self.selector.unregister(server)

    def acceptor(self, server: object, is_tls: bool) -> object:
        """What is called when somebody has connected."""
        return lambda mask: self.accept(server, is_tls)

    def accept(self, server: object, is_tls: bool) -> None:
        """Takes in who has connected."""
        for _ in range(ACCEPTS):
            try:
                connection, address = server.get_request()
            except (BlockingIOError, ConnectionError, InterruptedError):
                return
            except OSError as error:  # no descriptor, no memory
                self.desk.log.warning("smtpd", f"accept: {error.strerror}")
                self.rest()
                self.accepts_at = time.monotonic() + 1
                return
            try:
                self.admit(connection, address, is_tls)
            except Exception as error:  # noqa: BLE001 one client's end, not the server's
                text = f"session ended by {type(error).__name__}: {error}"
                self.desk.log.warning("smtpd", text)
                connection.close()

    def admit(self, made: object, address: object, is_tls: bool) -> None:
        """Begins with a client, or turns it away."""
        client = self.client_of(made, address)
        is_trusted = client.uid == 0 or (not client.is_local and client.may_relay)
        whose = "" if is_trusted else str(client)
        limit = self.limit if is_trusted else self.limit - self.limit // 10
        share = self.desk.settings.smtpd_client_connection_count_limit
        mine = self.shares.get(whose, 0)
        if len(self.connections) >= limit or whose and mine >= share:
            self.refuse(made, client, mine)
            return
        made.setblocking(False)
        connection = Connection(made, client, whose)
        connection.conversation = Conversation(self.desk, client)
        connection.ready = lambda mask: self.guard(connection, self.ready)
        self.connections.add(connection)
        self.shares[whose] = mine + 1
        if not client.is_local:
            self.desk.log.line("smtpd", f"connect from {client}")
        if is_tls:
            self.guard(connection, self.begin_tls)
        elif is_trusted or client.is_local:
            self.guard(connection, self.greet)
        else:
            connection.state = "greet"
            connection.deadline = time.monotonic() + GREET_WAIT
            self.strangers.append(connection)
            self.watch(connection, READ)

    def client_of(self, made: object, address: object) -> Client:
        """Who has connected, by the word of the kernel."""
        import socket

        if made.family == socket.AF_UNIX:
            return Client("local", True, peer_uid(made))
        return Client(address[0].replace("::ffff:", ""), address[0] in self.networks)

    def refuse(self, made: object, client: Client, count: int) -> None:
        """421 for one connection too many."""
        try:
            made.setblocking(False)
            made.send(bytes(TOO_MANY_SESSIONS))
        except OSError:
            pass  # it is closed anyway
        made.close()
        now = time.monotonic()
        if now > self.next_warning:  # a flood must not fill the log too
            self.next_warning = now + 1
            what = f"{count} of {len(self.connections)} from {client}"
            text = f"Connection concurrency limit exceeded: {what} for service smtp"
            self.desk.log.warning("smtpd", text)

    def greet(self, connection: Connection) -> None:
        """The greeting; a client that has spoken already gets none."""
        import socket

        connection.state = "talk"
        if not connection.client.is_local and not connection.is_secure:
            try:
                said = connection.socket.recv(100, socket.MSG_PEEK)
            except OSError:
                said = b""
            if said:
                self.refuse_early(connection, said)
                return
        connection.conversation.greet()
        self.advance(connection)

    def refuse_early(self, connection: Connection, said: bytes) -> None:
        """Ends it with a client that does not wait: no mail server is so."""
        client, shown = connection.client, printable(os_text(said))
        self.desk.log.line("smtpd", f"PREGREET {len(said)} from {client}: {shown}")
        connection.state = "talk"
        connection.conversation.say(TOO_EARLY)
        connection.conversation.wish = "close"
        self.advance(connection)

    def watch(self, connection: Connection, events: int) -> None:
        """Has ready() called when a connection can be read, or written."""
        if events == connection.events:
            return
        if not connection.events:
            self.selector.register(connection.socket, events, connection.ready)
        elif not events:
            self.selector.unregister(connection.socket)
        else:
            self.selector.modify(connection.socket, events, connection.ready)
        connection.events = events

    def ready(self, connection: Connection) -> None:
        """A client has said something, or can hear us again."""
        if connection.is_busy:
            self.watch(connection, 0)
            connection.is_paused = True
            # The crew has not seen that if it was done with it just now.
            if not connection.is_busy:
                self.resume(connection)
        elif connection.state == "tls":
            self.shake_hands(connection)
        elif connection.events == WRITE:
            self.advance(connection)
        else:
            self.read(connection)

    def guard(self, connection: Connection, action: object) -> None:
        """Does something for one client: what goes wrong is that one's end."""
        try:
            action(connection)
        except Exception as error:  # noqa: BLE001 one session's end, not the server's
            text = f"session ended by {type(error).__name__}: {error}"
            self.desk.log.warning("smtpd", text)
            self.close(connection)

    def read(self, connection: Connection) -> None:
        """Takes in what a client says, as long as there is something."""
        while True:
            try:
                data = connection.socket.recv(PIECE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if not is_unready(error):
                    self.lose(connection, "lost connection")
                return
            if not data:
                self.lose(connection, "lost connection")
                return
            if connection.state == "greet":
                self.refuse_early(connection, data[:100])
                return
            if connection.state == "drain":
                return
            connection.conversation.take(data)
            self.advance(connection)
            if not connection.has_more:
                return

    def advance(self, connection: Connection) -> None:
        """Sends what there is to be said; then does what comes next."""
        if connection.state != "talk":
            return
        conversation = connection.conversation
        connection.deadline = conversation.deadline
        try:
            is_sent = connection.send()
        except OSError:
            self.lose(connection, "lost connection")
            return
        if not is_sent:
            self.watch(connection, WRITE)
        elif conversation.chore and conversation.has_small_message:
            connection.is_busy = True
            self.group.append(connection)
        elif conversation.chore:
            connection.is_busy = True
            self.crew.submit(connection)
        elif conversation.wish == "tls":
            self.begin_tls(connection)
        elif conversation.wish:
            self.part(connection)
        else:
            self.watch(connection, READ)

    def commit(self) -> None:
        """Makes mail of the messages that have come meanwhile, together.

        One thread waits for the disk, while this one goes on with other
        clients: to hand it each message by itself would cost as much as all
        the rest (30 switches between threads). A client that is alone is
        served without it.
        """
        connections, self.group = self.group, []
        group = Group(connections)
        if len(self.connections) == 1:
            group.commit(sync_files)
            self.end_group(group)
        else:
            self.is_committing = True
            self.committer.submit(group)

    def commit_group(self, group: Group) -> None:
        """The committing thread: a group's messages, until they are safe."""
        group.commit(self.syncers)
        self.hand_back(group)

    def end_group(self, group: Group) -> None:
        """Tells each client of a group what became of its message."""
        for connection in group.connections:
            conversation = connection.conversation
            draft = group.drafts.get(connection)
            if draft:
                conversation.end_message(group.failures.get(draft))
            connection.is_busy = False
            self.guard(connection, self.resume)

    def work(self, connection: Connection) -> None:
        """A crew's thread: chores, one after the other, and their replies."""
        conversation = connection.conversation
        try:
            is_sent = True
            while conversation.chore and is_sent:
                conversation.do_chore()
                is_sent = connection.send()
                if conversation.pause_until:
                    break  # it only waits: others have a turn
            connection.deadline = conversation.deadline
        except OSError:
            connection.is_broken = True
        except Exception as error:  # noqa: BLE001 one session's end, not the server's
            text = f"session ended by {type(error).__name__}: {error}"
            self.desk.log.warning("smtpd", text)
            connection.is_broken = True
        needs_more = bool(
            connection.is_broken
            or conversation.wish
            or conversation.chore
            or conversation.output
            or connection.is_secure
        )
        connection.is_busy = False  # from here on it is the server's again
        if needs_more or connection.is_paused:
            self.hand_back(connection)

    def hand_back(self, item: object) -> None:
        """Another thread is done with a group or a connection."""
        self.returned.append(item)
        try:
            os.write(self.waker, b"!")
        except BlockingIOError:
            pass  # the server has enough to wake it

    def collect(self, _: int) -> None:
        """Goes on with what other threads have handed back."""
        os.read(self.wake, PIECE)
        while self.returned:
            item = self.returned.popleft()
            if isinstance(item, Group):
                self.is_committing = False
                self.end_group(item)
            elif item in self.connections and not item.is_busy:
                self.guard(item, self.resume)

    def resume(self, connection: Connection) -> None:
        """Goes on with a connection that was busy."""
        connection.is_paused = False
        if connection.is_broken:
            self.lose(connection, "lost connection")
        elif self.must_go:
            self.dismiss(connection)
        else:
            connection.conversation.go_on()
            self.go_on(connection)

    def begin_tls(self, connection: Connection) -> None:
        """Has the client shake hands."""
        connection.state = "tls"
        connection.conversation.wish = ""
        connection.deadline = time.monotonic() + READ_TIMEOUT
        self.watch(connection, 0)
        try:
            connection.socket = self.tls.wrap_socket(
                connection.socket, server_side=True, do_handshake_on_connect=False
            )
        except (OSError, ValueError):  # it has gone meanwhile
            self.lose(connection, "lost connection")
            return
        self.shake_hands(connection)

    def shake_hands(self, connection: Connection) -> None:
        """A step of the TLS handshake; it never waits."""
        made = connection.socket
        try:
            made.do_handshake()
        except OSError as error:
            if is_unready(error):
                is_reading = type(error).__name__ == "SSLWantReadError"
                self.watch(connection, READ if is_reading else WRITE)
                return
            why = f"SSL_accept error from {connection.client}: {error.strerror}"
            self.desk.log.line("smtpd", why)
            self.close(connection)
            return
        name, version, bits = made.cipher()
        cipher = f"{made.version() or version} with cipher {name} ({bits} bits)"
        text = f"Anonymous TLS connection established from {connection.client}: "
        self.desk.log.line("smtpd", text + cipher)
        is_new = not connection.conversation.session.tally
        connection.conversation.secure(cipher)
        connection.state = "talk"
        if is_new:
            connection.conversation.greet()
        self.go_on(connection)

    def go_on(self, connection: Connection) -> None:
        """Sends what there is to be said, and reads on where there is more."""
        self.advance(connection)
        if connection.has_more:
            self.read(connection)

    def part(self, connection: Connection) -> None:
        """Hangs up when all is said.

        Whoever did not say QUIT may be sending still: that is read for a
        moment, for a reset could overtake our last reply.
        """
        import socket

        if connection.conversation.has_quit or connection.is_secure:
            self.close(connection)
            return
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(connection)
            return
        connection.state = "drain"
        connection.deadline = time.monotonic() + LINGER
        self.watch(connection, READ)

    def dismiss(self, connection: Connection) -> None:
        """421: the server ends."""
        connection.conversation.say(CLOSING_DOWN)
        try:
            connection.send()
        except OSError:
            pass  # it has gone before
        self.close(connection)

    def lose(self, connection: Connection, why: str) -> None:
        """The client is gone, or has been silent for too long."""
        if connection.state != "drain":
            connection.conversation.lose(why)
        self.close(connection)

    def close(self, connection: Connection) -> None:
        """The end of a connection."""
        if connection not in self.connections:
            return
        connection.state = "closed"
        self.watch(connection, 0)
        conversation, client = connection.conversation, connection.client
        conversation.drop_arrival()
        if connection.is_secure:
            try:
                connection.socket.unwrap()  # says goodbye, waits for nobody
            except (OSError, ValueError):
                pass
        connection.socket.close()
        self.connections.discard(connection)
        left = self.shares.pop(connection.whose, 1) - 1
        if left:
            self.shares[connection.whose] = left
        if not client.is_local:
            text = f"disconnect from {client} {conversation.session.summary()}"
            self.desk.log.line("smtpd", text)

    def look_after(self, now: float) -> None:
        """Greets who has waited, ends who waits too long, accepts again."""
        while self.strangers and self.strangers[0].deadline <= now:
            connection = self.strangers.pop(0)
            if connection.state == "greet":
                self.guard(connection, self.greet)
        if self.accepts_at and now >= self.accepts_at and not self.is_closing:
            self.listen()
        if now < self.next_look:
            return
        self.next_look = now + 1
        for connection in list(self.connections):
            if connection.deadline < now and not connection.is_busy:
                self.guard(connection, self.end_late)

    def end_late(self, connection: Connection) -> None:
        """Ends it with a client that was silent for too long."""
        if connection.state == "talk":
            connection.conversation.output += bytes(TIMED_OUT)
            try:
                connection.send()
            except OSError:
                pass  # it has gone before
        self.lose(connection, "timeout")

    def close_down(self, patience: float) -> float:
        """Accepts no more; until when open sessions may go on (monotonic)."""
        if not self.is_closing and not self.accepts_at:
            self.rest()
        self.is_closing = True
        for server, _ in self.servers:
            server.server_close()
        if not patience:
            self.hang_up()
        return time.monotonic() + (patience or GRACE)

    def hang_up(self) -> None:
        """421 for everybody; who is busy gets the reply to that first."""
        self.must_go = True
        for connection in list(self.connections):
            connection.is_paused = True  # a busy one comes back to us
            if not connection.is_busy:
                self.guard(connection, self.dismiss)


# == 29 Submission: House, SubmitSocket, Letter, Submission ===================
# The client's side: how mail gets from a command into the queue.
# Failures: MailError when nothing is in the queue.

SUBMIT_TIMEOUT = 300  # seconds for a reply of the daemon
HEALTH_TIMEOUT = 10  # the same, where all that is asked is whether it answers
RUN_PATIENCE = 60  # seconds until a queue that somebody else runs is left to them
RCPT_GROUP = 100  # recipients sent before their replies are read


class House:
    """What a program works with; each part is made when it is asked for."""

    def __init__(self, environ: dict, path: str = "", echo: bool = False) -> None:
        self.settings = read_settings(environ, path)
        self.users = Users(self.settings.root)
        self.user = self.users.caller(environ, os.getuid())
        self.log = Log(self.settings, echo)

    def spool(self) -> Spool:
        """The queue."""
        owner = queue_owner(self.settings, self.users)
        return Spool(self.settings.queue_directory, owner)

    def router(self, files: TargetFiles | None = None) -> Router:
        """A router; without `files` it reads no .forward and no list."""
        aliases = alias_maps(self.settings, self.warn)
        return Router(self.settings, aliases, self.users, files, self.warn)

    def warn(self, text: str) -> None:
        """A warning of the routing."""
        self.log.warning("local", text)

    def owns_queue(self) -> bool:
        """Whether this process may write the queue itself."""
        if os.geteuid() == 0:
            return True
        if not self.settings.root:
            return False
        place = self.settings.queue_directory
        while not os.path.exists(place):
            place = os.path.dirname(place)
        if not os.path.exists(self.settings.root):  # made on first use
            return os.access(place, os.W_OK)
        return os.stat(place).st_uid == os.geteuid()


class SubmitSocket:
    """The daemon's submit socket: SMTP; the kernel says who is calling."""

    def __init__(self, directory: str, patience: float = SUBMIT_TIMEOUT) -> None:
        self.directory = directory
        self.patience = patience
        self.buffer = b""
        self.held: list[str] = []  # command lines that go out with the next

    def connect(self) -> bool:
        """Whether a daemon listens; reads its greeting."""
        # socket.py costs 8 ms, as much as Python's whole start; its C half
        # has all that is needed here.
        import _socket

        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self.socket.settimeout(self.patience)
        try:
            self.socket.connect(self.address())
        except OSError:
            self.socket.close()
            return False
        return self.reply()[0] == 220

    def greet(self) -> bool:
        """Whether a daemon listens; says hello. Raises MailError."""
        if not self.connect():
            return False
        self.send("EHLO localhost")
        self.expect(250)
        return True

    def address(self) -> str:
        """A name for the socket that fits into its address (107 bytes).

        A longer path is entered; `sendmail` opens nothing relative afterwards.
        """
        path = f"{self.directory}/submit"
        if len(os.fsencode(path)) < 104:
            return path
        os.chdir(self.directory)
        return "submit"

    def send(self, *lines: str) -> None:
        """Sends command lines, together."""
        self.socket.sendall(os_bytes("".join(f"{line}\r\n" for line in lines)))

    def receive(self) -> None:
        """Takes more of what the daemon says. Raises MailError."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise MailError("4.4.2", "the daemon hung up")
        self.buffer += data

    def read_line(self) -> bytes:
        """One line, without its end. Raises MailError."""
        while b"\n" not in self.buffer:
            self.receive()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def reply(self) -> tuple[int, str, str]:
        """(code, enhanced status, text) of one reply."""
        line = self.read_line()
        while line[3:4] == b"-":
            line = self.read_line()
        status, _, text = os_text(line[4:]).partition(" ")
        return int(line[:3]), status, text

    def expect(self, wanted: int) -> str:
        """The text of a reply that must have this code. Raises MailError."""
        code, status, text = self.reply()
        if code != wanted:
            raise MailError(status if "." in status else "4.3.0", text)
        return text

    def offer(self, sender: str, options: str) -> None:
        """MAIL; its reply is read with those of the first recipients."""
        self.held = ["EHLO localhost", f"MAIL FROM:<{sender}>{options}"]

    def offer_recipients(self, recipients: list[str], options: str) -> dict:
        """RCPT for each; recipient -> MailError for each that is refused.

        Raises MailError where it is the sender that is refused.
        """
        refused = {}
        for start in range(0, len(recipients), RCPT_GROUP):
            group = recipients[start : start + RCPT_GROUP]
            held, self.held = self.held, []
            self.send(*held, *(f"RCPT TO:<{name}>{options}" for name in group))
            for _ in held:
                self.expect(250)
            for name in group:
                try:
                    self.expect(250)
                except MailError as error:
                    refused[name] = error
        return refused

    def transmit(self, chunks: object) -> str:
        """DATA and the message; the queue id."""
        self.send("DATA")
        self.expect(354)
        for block in dot_stuffed(chunks):
            self.socket.sendall(block)
        return self.expect(250).rpartition(" ")[2]

    def entries(self) -> object:
        """The queue, as XQUEUE lists it."""
        self.send("XQUEUE")
        self.expect(250)
        while True:
            *blocks, self.buffer = self.buffer.split(b"\n\n")
            for block in blocks:
                if block == b".":
                    return
                yield QueueEntry.parse(block + b"\n\n")
            self.receive()

    def flush(self) -> None:
        """Has everything in the queue tried now."""
        self.send("XFLUSH")
        self.expect(250)

    def trace(self, key: str) -> Trace | None:
        """What happened to a message, as XTRACE tells it."""
        self.send(f"XTRACE {key}")
        self.expect(250)
        name, records = "", []
        for line in iter(self.read_line, b"."):
            if line[:1] == b"\t":
                records[-1][1].append(os_text(line[1:]))
            else:
                name, _, kind = os_text(line).partition(" ")
                records.append((kind, []))
        return Trace(name, records) if records else None

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()


class Letter:
    """A message to submit: envelope, header, and the rest as chunks.

    `notify`, `ret` and `envid` are what -N, -R and -V of sendmail ask for.
    """

    notify = ret = envid = ""
    is_as_it_is = False  # whether its header is another host's business
    failures: tuple | list = ()  # why others that were meant are no recipients

    def __init__(
        self, sender: Address, recipients: list[Address], header: Header, body: object
    ) -> None:
        self.sender = sender
        # <> is nobody: a message for nobody would be no message.
        self.recipients = [address for address in recipients if address.local]
        self.header = header
        self.body = body

    def chunks(self) -> object:
        """The whole message, LF line ends, ending in one."""
        last = b"\n"
        head = bytes(self.header) + b"\n" + self.header.rest
        yield head
        last = head[-1:]
        for chunk in self.body:
            yield chunk
            last = chunk[-1:] or last
        if last != b"\n":
            yield b"\n"

    @property
    def is_ascii(self) -> bool:
        """Whether its addresses can be sent without SMTPUTF8."""
        return all(a.is_ascii for a in (self.sender, *self.recipients))

    def options(self) -> str:
        """MAIL parameters."""
        words = [" BODY=8BITMIME", "" if self.is_ascii else " SMTPUTF8"]
        words.append(f" RET={self.ret}" if self.ret else "")
        words.append(f" ENVID={self.envid}" if self.envid else "")
        words.append(" XASIS" if self.is_as_it_is else "")
        return "".join(words)


def run_queue(house: House, spool: Spool, is_flush: bool) -> bool:
    """Tries everything in the queue, or what is due, once.

    False if somebody else is at it.
    """
    give_up = time.monotonic() + RUN_PATIENCE
    lock = take_lock(spool, 0)
    while lock is None:
        # A daemon that is up, or coming up, does it.
        if has_daemon(spool) or time.monotonic() > give_up:
            return False
        lock = take_lock(spool, 0.2)
    try:
        runner = QueueRunner(house.settings, spool, house.log, house.users)
        runner.run_once(is_flush)
    finally:
        os.close(lock)
    return True


def take_in(house: House, spool: Spool) -> None:
    """Takes in what is in the maildrop, unless somebody runs the queue."""
    if not os.path.isdir(spool.path("queue")):
        return
    lock = take_lock(spool, 0)
    if lock is not None:
        Pickup(house.settings, spool, house.log).run()
        os.close(lock)


def detach() -> None:
    """Leaves the terminal and the caller's files behind."""
    os.setsid()
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)


def reason(error: MailError) -> str:
    """Why a recipient is refused, in the words of sendmail."""
    return "User unknown" if error.status == "5.1.1" else error.text


class Submission:
    """Takes a Letter the best way there is; submit() is the door.

    The daemon's submit socket; else the queue itself, where this process may
    write it; else the maildrop. `delivery` is what follows: the first attempt
    in the background (b, with a daemon i too), at once (i), later (q).
    """

    def __init__(self, house: House, delivery: str = "b") -> None:
        self.house = house
        self.settings = house.settings
        self.delivery = delivery
        self.refused: dict[str, MailError] = {}

    def submit(self, letter: Letter) -> str:
        """The queue id, once the message is safe. Raises MailError.

        `refused` then has the recipients that will be bounced.
        """
        if not letter.recipients:
            raise MailError("5.1.3", "no recipients: name somebody")
        daemon = SubmitSocket(self.settings.queue_directory)
        try:
            if daemon.connect():
                return self.by_daemon(daemon, letter)
        except OSError as error:
            why = error.strerror or str(error)
            raise MailError("4.3.0", f"cannot hand over to the daemon: {why}") from None
        self.check(letter)
        if self.house.owns_queue():
            return self.by_hand(letter)
        return self.by_maildrop(letter)

    def by_daemon(self, daemon: SubmitSocket, letter: Letter) -> str:
        """Over the submit socket: 250 means that it is on disk."""
        recipients = [str(address) for address in letter.recipients]
        options = Wishes(letter.notify).parameters()
        later = " XLATER" if self.delivery == "q" else ""
        try:
            daemon.offer(str(letter.sender), letter.options() + later)
            refused = daemon.offer_recipients(recipients, options)
            self.judge(recipients, refused)
            daemon.offer_recipients(list(refused), f"{options} XBOUNCE")
            return daemon.transmit(letter.chunks())
        finally:
            daemon.close()

    def judge(self, recipients: list[str], refused: dict[str, MailError]) -> None:
        """Raises MailError if no recipient is good, or one must wait."""
        waiting = [error for error in refused.values() if error.is_temporary]
        if waiting:
            raise waiting[0]
        if refused and len(refused) == len(set(recipients)):
            name, error = next(iter(refused.items()))
            names = printable(", ".join(refused), 200)
            why = reason(error).removeprefix(f"<{name}>: ")  # the daemon's words
            raise MailError(error.status, f"{names}: {why}")
        self.refused = refused

    def check(self, letter: Letter) -> None:
        """What the daemon would say to the recipients, without a daemon."""
        router = self.house.router()
        refused = {}
        for address in letter.recipients:
            if self.settings.keeps(address.domain):
                try:
                    router.verify(address)
                except MailError as error:
                    if not error.is_temporary:
                        refused[str(address)] = error
        self.judge([str(address) for address in letter.recipients], refused)

    def envelope(self, letter: Letter) -> Envelope:
        """The envelope for the queue."""
        recipients = [str(address) for address in letter.recipients]
        more: dict = {"arrived": time.time(), "origin": f"uid {os.getuid()}"}
        more["body"] = "8BITMIME" + ("" if letter.is_ascii else " SMTPUTF8")
        more.update(ret=letter.ret, envid=letter.envid)
        if letter.notify:
            more["wishes"] = dict.fromkeys(recipients, Wishes(letter.notify))
        return Envelope(str(letter.sender), recipients, **more)

    def by_hand(self, letter: Letter) -> str:
        """Straight into the queue, which then is run."""
        spool = self.house.spool()
        try:
            if not os.path.isdir(spool.path("queue")):
                spool.make()
        except ProgramError as error:
            raise MailError("4.3.0", str(error)) from None
        if spool.free() < self.settings.queue_minfree:
            raise MailError("4.3.1", "Insufficient system storage")
        envelope = self.envelope(letter)
        with spool.create(envelope) as draft:
            host, now = self.settings.myhostname, envelope.arrived
            fields = {"uid": os.getuid()}
            draft.write(received_field(fields, host, draft.queue_id, now))
            self.copy(letter, draft)
            queue_id = draft.commit()
        self.house.log.accepted(queue_id, Client("local", True, os.getuid()), envelope)
        self.run_queue(spool)
        return queue_id

    def by_maildrop(self, letter: Letter) -> str:
        """Into the maildrop, where a daemon or root's `sendmail -q` looks."""
        drop = Maildrop(self.settings.queue_directory)
        try:
            with drop.create(self.envelope(letter)) as draft:
                self.copy(letter, draft)
                return draft.commit()
        except MailError as error:
            if not error.is_temporary:
                raise
            text = f"no daemon, and the maildrop cannot be written: {error.text}"
            if os.path.isdir(drop.directory) and not os.access(drop.directory, 3):
                text += ": as root, minimta.py install puts it right"
                raise ProgramError(EX_CANTCREAT, text) from None
            raise MailError("4.3.0", text) from None

    def copy(self, letter: Letter, draft: Draft) -> None:
        """The message into a draft, within the limit. Raises MailError."""
        room = self.settings.message_size_limit
        for chunk in letter.chunks():
            room -= len(chunk)
            if room < 0:
                raise MailError("5.3.4", "Message size exceeds fixed limit")
            draft.write(chunk)

    def run_queue(self, spool: Spool) -> None:
        """Has a message delivered that no daemon will deliver."""
        import signal

        if self.delivery == "q":
            return
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is detached
        try:
            if self.delivery == "b" and os.fork():
                signal.signal(signal.SIGHUP, before)
                return
        except OSError:
            return  # the mail is safe; the next run takes it along
        try:
            if self.delivery == "b":
                detach()
            # Another's run may have begun before our message was there.
            run_queue(self.house, spool, False)
        except Exception as error:  # noqa: BLE001 the mail is safe, whatever it is
            self.house.log.warning("qmgr", str(error))
        finally:
            if self.delivery == "b":
                os._exit(EX_OK)


# == 30 Daemon: Daemon, SignalPipe ============================================
# The master: binds, starts the others and starts them again. Parses no mail.
# Failures: ProgramError before it is up; afterwards a line in the log.

BACKLOG = 512  # connections that wait to be accepted
LOCK_PATIENCE = 2  # seconds
LONGEST_REST = 60  # seconds before a process that keeps dying is started again
SMTPS = 465  # a socket of that port that is handed to us speaks TLS, RFC 8314
STUCK = 300  # seconds until a process that does not beat is said to hang
SERVER_MODULES = ("socketserver", "queue", "ipaddress", "struct", "resource", "mmap")


class SignalPipe:
    """Signals as something to select() on; `came` has those not yet seen."""

    def __init__(self, *numbers: int) -> None:
        import signal

        self.came: set[int] = set()
        self.fd, write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, self.note)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        # What came between the fork and now was held back, and comes now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def note(self, number: int, _: object) -> None:
        """Remembers a signal; the wakeup descriptor has woken select()."""
        self.came.add(number)

    def take(self) -> set[int]:
        """The signals that came since the last call."""
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass  # none came
        came, self.came = self.came, set()
        return came


class Pulse:
    """When each process last went round its loop, in memory they share."""

    PLACES = {"smtpd": 0, "qmgr": 8}

    def __init__(self) -> None:
        import mmap

        self.memory = mmap.mmap(-1, 16)
        for name in self.PLACES:
            self.beat(name)

    def beat(self, name: str) -> None:
        """That process is alive."""
        import struct

        struct.pack_into("d", self.memory, self.PLACES[name], time.monotonic())

    def age(self, name: str) -> float:
        """Seconds since its last beat."""
        import struct

        (last,) = struct.unpack_from("d", self.memory, self.PLACES[name])
        return time.monotonic() - last

    def ails(self) -> str:
        """Which process hangs, or ""."""
        late = [name for name in self.PLACES if self.age(name) > STUCK]
        return f"process {late[0]} does not answer" if late else ""


class Supervisor:
    """systemd, or who speaks as it does: sd_notify(3), sd_listen_fds(3)."""

    def __init__(self, environ: dict) -> None:
        self.path = environ.get("NOTIFY_SOCKET", "")
        mine = environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        usec = environ.get("WATCHDOG_USEC", "")
        # Twice as often as is wanted: half of the time is ours.
        self.pause = int(usec) / 2e6 if mine and usec.isdigit() else 0.0
        is_ours = environ.get("LISTEN_PID") == str(os.getpid())
        count = environ.get("LISTEN_FDS", "") if is_ours else ""
        self.fds = range(3, 3 + int(count)) if count.isdigit() else range(0)

    def tell(self, *words: str) -> None:
        """Says `READY=1` and the like; whoever does not listen misses it."""
        if not self.path:
            return
        import socket

        path = "\0" + self.path[1:] if self.path.startswith("@") else self.path
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
                speaker.connect(path)
                speaker.send(os_bytes("\n".join(words)))
        except OSError:
            return

    def sockets(self) -> dict[tuple, object]:
        """(host, port) -> a listening socket that is handed to us.

        Raises ProgramError.
        """
        import socket

        found = {}
        for fd in self.fds:
            try:
                os.set_inheritable(fd, False)
                made = socket.socket(fileno=fd)
            except OSError as error:
                why = f"LISTEN_FDS: descriptor {fd}: {error.strerror}: not a socket"
                raise ProgramError(EX_CONFIG, why) from None
            if made.family in (socket.AF_INET, socket.AF_INET6):
                found[made.getsockname()[:2]] = made
        return found


class Child:
    """One process of the daemon: how it is started, and when again."""

    def __init__(self, name: str, start: object) -> None:
        self.name = name
        self.start = start
        self.pid = 0
        self.began = 0.0
        self.rest = 0.0
        self.due = 0.0

    def died(self, now: float, was_asked: bool) -> None:
        """Plans the next start: at once, or later the faster it died."""
        self.pid = 0
        long_lived = now - self.began > 10
        self.rest = (
            0.0 if was_asked or long_lived else min(self.rest * 2 + 1, LONGEST_REST)
        )
        self.due = now + self.rest


def bad_lines(files: MapFiles, check: object) -> list[str]:
    """What check(line) raises for lines of a map, or reading raises."""
    try:
        lines = files.lines()
    except MailError as error:
        return [error.text]
    found = []
    for line in lines:
        try:
            check(line)
        except MailError as error:
            is_told = line.where in error.text
            found.append(error.text if is_told else f"{line.where}: {error.text}")
    return found


def map_problems(house: House) -> list[str]:
    """Why mail will wait: maps and password files that are to be mended."""
    settings, router = house.settings, house.router()
    anyone = Address("anyone", "example.com")

    def check_generic(line: MapLine) -> None:
        any_line = MapLine(line.where, "*", line.value)
        Rewriter([any_line], settings.myorigin, settings).change(anyone)

    def check_transport(line: MapLine) -> None:
        if not read_transport(line)[0]:
            router.hops(anyone, line.value)

    def check_login(line: MapLine) -> None:
        check_secret(line, bool(settings.smtp_sasl_password_command))

    found = []
    for name, check in (
        ("transport_maps", check_transport),
        ("smtp_generic_maps", check_generic),
        (PASSWORDS, check_login),
    ):
        found += bad_lines(MapFiles(settings, name), check)
    for path in settings.map_paths("alias_maps"):
        if os.path.isdir(path):
            found.append(f"alias_maps: {path} is a directory")
    return found


def check_settings(house: House) -> list[str]:
    """Raises ProgramError for settings that the children could not use.

    What only has mail wait is returned, to be warned of.
    """
    settings = house.settings
    Networks(settings.mynetworks)
    queue_owner(settings, house.users)
    if not tls_context(settings) and settings.smtpd_tls_port:
        raise ProgramError(EX_CONFIG, "smtpd_tls_port: set smtpd_tls_cert_file, too")
    try:
        for text in relay_words(settings.relayhost):
            NextHop.parse(text, "relayhost")
        if settings.mailbox_transport:
            NextHop.parse(settings.mailbox_transport, "mailbox_transport", "lmtp")
    except MailError as error:
        raise ProgramError(EX_CONFIG, error.text) from None
    return map_problems(house)


class Daemon:
    """The master process; run() is its life.

    `lifeline` is a pipe that only the master can write to: when its end
    comes, the master is gone, however it went, and its children go too.
    """

    def __init__(self, house: House, environ: dict, path: str = "") -> None:
        self.house = house
        self.environ = environ
        self.path = path
        self.spool = house.spool()
        self.pid = 0
        self.supervisor = Supervisor(environ)
        self.listeners: dict[tuple, object] = {}
        self.asked: set[int] = set()
        self.children = [
            Child("smtpd", self.run_server),
            Child("qmgr", self.run_runner),
        ]

    def open(self) -> None:
        """Makes the queue, locks it, binds sockets. Raises ProgramError."""
        import signal

        self.warn(check_settings(self.house))  # before anything is opened
        self.spool.make()
        self.lock = take_lock(self.spool, LOCK_PATIENCE, "hold")
        if self.lock is None:
            where = self.spool.directory
            why = f"another minimta runs the queue {where}: stop that one first"
            raise ProgramError(EX_TEMPFAIL, why)
        self.given = self.supervisor.sockets()
        self.bind_all()
        self.submit = self.bind_submit()
        self.pulse = Pulse()
        self.lifeline, self.lifeline_end = os.pipe()
        self.wake, self.announce_end = os.pipe()
        os.set_blocking(self.announce_end, False)
        os.chdir("/")
        self.signals = SignalPipe(
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD
        )

    def bind_all(self) -> None:
        """Binds the settings' addresses, keeping those that are bound.

        Who is handed sockets listens on those, and on no others.
        """
        if self.given:
            self.listeners = self.given
            return
        settings = self.house.settings
        ports = [settings.smtpd_port, settings.smtpd_tls_port]
        ports = ports if settings.smtpd_tls_port else ports[:1]
        wanted = [(name, port) for name in settings.listen_on for port in ports]
        bound = {}
        for address in wanted:
            listener = self.listeners.get(address) or self.bind(*address)
            if listener:
                bound[address] = listener
        for address, listener in self.listeners.items():
            if address not in bound:
                listener.close()
        self.listeners = bound

    def bind(self, host: str, port: int) -> object:
        """A listening socket, None for IPv6 on a host that has none.

        Raises ProgramError. An address in use may be a killed daemon's, for
        as long as the kernel is not done with it.
        """
        import errno

        give_up = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return self.bind_once(host, port)
            except OSError as error:
                if ":" in host and error.errno in (
                    errno.EADDRNOTAVAIL,
                    errno.EAFNOSUPPORT,
                ):
                    return None
                in_use = error.errno == errno.EADDRINUSE
                if not in_use or time.monotonic() > give_up:
                    raise self.bind_failure(f"{host}:{port}", error) from None
            time.sleep(0.05)

    def bind_once(self, host: str, port: int) -> object:
        """A listening socket. Raises OSError."""
        import socket

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Sessions inherit it: no reply waits for what a client has to say.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    def bind_failure(self, place: str, error: OSError) -> ProgramError:
        """What to tell about an address that cannot be listened on."""
        import errno

        code, todo = EX_OSERR, "stop the other mail server, or set smtpd_port"
        if error.errno != errno.EADDRINUSE:
            todo = "set inet_interfaces to addresses of this host"
        if isinstance(error, PermissionError):
            code, todo = EX_NOPERM, "run as root, or set smtpd_port above 1023"
        return ProgramError(code, f"{place}: {error.strerror}: {todo}")

    def bind_submit(self) -> object:
        """The submit socket. The queue is locked: an old one is nobody's."""
        import socket

        listener = socket.socket(socket.AF_UNIX)
        try:
            os.chdir(self.spool.directory)  # its path may be too long to bind to
            if os.path.lexists("submit"):
                os.unlink("submit")
            listener.bind("submit")
            os.chmod("submit", 0o666)
        except OSError as error:
            why = f"{self.spool.directory}/submit: {error.strerror}"
            raise ProgramError(EX_CANTCREAT, why) from None
        listener.listen(BACKLOG)
        return listener

    def run(self) -> int:
        """Keeps the children running until a signal ends it. The exit code."""
        import select
        import signal

        self.pid = os.getpid()
        self.house.log.line("master", f"daemon started -- version {__version__}")
        self.share_memory()
        self.start_children()
        self.supervisor.tell("READY=1", f"MAINPID={self.pid}", "STATUS=serving")
        while True:
            self.start_children()
            waits = [
                child.due - time.time() for child in self.children if not child.pid
            ]
            if self.supervisor.pause:
                waits.append(self.supervisor.pause)
                if not self.pulse.ails():
                    self.supervisor.tell("WATCHDOG=1")
            pause = max(0, min(waits)) if waits else None
            select.select([self.signals.fd], [], [], pause)
            came = self.signals.take()
            if signal.SIGTERM in came or signal.SIGINT in came:
                return self.stop()
            if signal.SIGHUP in came:
                self.reload()
            self.bury()

    def share_memory(self) -> None:
        """Loads what the children need, and leaves it to them as it is.

        They share the pages that nobody writes: 25 MB for all without this.
        The collector writes to whatever it looks at, so it is told not to.
        """
        import gc

        preload(*SERVER_MODULES, *RUNNER_MODULES)
        preload_databases(self.house.settings.map_paths("alias_maps"))
        gc.collect()
        gc.freeze()

    def start_children(self) -> None:
        """Starts whichever is not running and has rested."""
        import signal

        now = time.time()
        ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for child in self.children:
            if child.pid or child.due > now:
                continue
            child.began = now
            # A signal to a child that is not ready for it must not get lost.
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)
            try:
                child.pid = os.fork()
            except OSError as error:
                self.house.log.warning("master", f"fork {child.name}: {error.strerror}")
                child.died(now, False)
            if child.pid == 0 and os.getpid() != self.pid:
                self.be_child(child)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)

    def be_child(self, child: Child) -> None:
        """A child's whole life; never returns."""
        code = EX_OK
        try:
            os.close(self.lifeline_end)
            child.start()
        except Exception as error:  # noqa: BLE001 the master starts it again
            text = f"{child.name} ended by {type(error).__name__}: {error}"
            self.house.log.warning("master", text)
            code = EX_OSERR
        finally:
            os._exit(code)

    def run_server(self) -> None:
        """The SMTP server's process: no rights, no lock."""
        import signal

        os.close(self.lock)
        os.close(self.wake)
        signals = SignalPipe(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        house = self.house
        preload(*SERVER_MODULES)
        preload_databases(house.settings.map_paths("alias_maps"))
        if house.settings.smtpd_sasl_password_file:
            preload("base64", "hashlib", "hmac")
        tls = tls_context(house.settings)  # while the key can be read
        raise_file_limit()
        drop_rights(queue_owner(house.settings, house.users))
        desk = Desk(
            house.settings, self.spool, house.log, house.router(), self.announce
        )
        desk.ails = self.ails
        tls_port = house.settings.smtpd_tls_port
        listeners = [
            Listener(bound, bool(tls) and port in (tls_port, SMTPS))
            for (_, port), bound in self.listeners.items()
        ]
        server = SmtpServer(desk, [*listeners, Listener(self.submit)], tls)
        ends = (self.lifeline, signals.fd)
        pulse = self.pulse
        decide, beat = lambda: self.patience(signals), lambda: pulse.beat("smtpd")
        server.serve(ends, decide, beat)

    def ails(self) -> str:
        """What ails the daemon, for `health`; "" if nothing does."""
        if self.spool.free() < self.house.settings.queue_minfree:
            return "the queue's disk is full: make room"
        return self.pulse.ails()

    def patience(self, signals: SignalPipe) -> float:
        """Seconds that open sessions may take, now that the server is to end.

        SIGHUP: others take over with new settings, sessions may finish.
        """
        import select
        import signal

        is_orphan = bool(select.select([self.lifeline], [], [], 0)[0])
        only_reload = not is_orphan and signals.take() == {signal.SIGHUP}
        return READ_TIMEOUT if only_reload else 0

    def announce(self, word: str) -> None:
        """Tells the runner an id, or to flush; a full pipe may drop it."""
        try:
            os.write(self.announce_end, os_bytes(word + "\n"))
        except OSError:
            return  # the runner looks by itself in a few seconds

    def run_runner(self) -> None:
        """The queue runner's process: root, to become each recipient."""
        import select
        import signal

        os.close(self.lock)
        for listener in (*self.listeners.values(), self.submit):
            listener.close()
        signals = SignalPipe(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # relays end all the time
        house = self.house
        ends = (self.lifeline, signals.fd)
        # A `sendmail` may be at it, or one that was killed just now.
        while take_lock(self.spool, 0.2) is None:
            self.pulse.beat("qmgr")
            if select.select(ends, [], [], 0)[0]:
                return
        runner = QueueRunner(house.settings, self.spool, house.log, house.users)
        runner.run_forever(self.wake, ends, lambda: self.pulse.beat("qmgr"))

    def bury(self) -> None:
        """Takes note of children that ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            was_asked = pid in self.asked
            self.asked.discard(pid)
            for child in self.children:
                if child.pid == pid:
                    child.died(time.time(), was_asked)
                    if not was_asked:
                        text = f"process {child.name}[{pid}] ended with {status}"
                        self.house.log.warning("master", text)

    def warn(self, texts: list[str]) -> None:
        """Says what has mail wait until it is mended."""
        for text in texts:
            self.house.log.warning("master", text)

    def reload(self) -> None:
        """Reads the settings again; bad ones change nothing."""
        import signal

        before = self.house
        now = int(time.monotonic() * 1e6)
        self.supervisor.tell("RELOADING=1", f"MONOTONIC_USEC={now}")
        try:
            self.house = House(self.environ, self.path, before.log.echo)
            warnings = check_settings(self.house)
            if self.house.settings.queue_directory != self.spool.directory:
                raise ProgramError(EX_CONFIG, "queue_directory: needs a restart")
            self.bind_all()
        except ProgramError as error:
            self.house = before
            self.house.log.warning("master", f"settings not read: {error}")
            self.supervisor.tell("READY=1", "STATUS=the new settings are wrong")
            return
        self.supervisor.tell("READY=1", "STATUS=serving")
        self.house.log.line("master", "settings read again")
        self.warn(warnings)
        for child in self.children:
            if child.pid:
                self.asked.add(child.pid)
                os.kill(child.pid, signal.SIGHUP)
                if child.name == "smtpd":
                    child.died(time.time(), True)  # the next one takes over now

    def send_signal(self, pid: int, number: int) -> None:
        """Signals a child that may be gone."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    def has_ended(self, pid: int) -> bool:
        """Whether a child has ended; buries it."""
        try:
            return os.waitpid(pid, os.WNOHANG)[0] == pid
        except ChildProcessError:
            return True

    def stop(self) -> int:
        """Ends the children, waits for them, and is done."""
        import signal

        self.supervisor.tell("STOPPING=1")
        pids = {child.pid for child in self.children if child.pid} | self.asked
        for number, patience in ((signal.SIGTERM, 2 * GRACE), (signal.SIGKILL, GRACE)):
            for pid in pids:
                self.send_signal(pid, number)
            give_up = time.monotonic() + patience
            while pids and time.monotonic() < give_up:
                pids -= {pid for pid in pids if self.has_ended(pid)}
                time.sleep(0.01)
        self.house.log.line("master", "daemon stopped")
        return EX_OK


# == 31 Mail text: Variables, body_text, MailPart =============================
# What mail(1) shows of a message, and what its lines and variables mean.
# Source: POSIX mailx; where it is silent, Heirloom mailx; RFC 2045, 2047.
# Failures: none; hostile mail is shown as it came, made harmless.

IGNORED_FIELDS = (
    "received in-reply-to message-id references mime-version "
    "content-transfer-encoding status x-status"
).split()

# What a person finds set; the value of one that is only on or off is "".
MAIL_DEFAULTS = {
    **dict.fromkeys("append ask crt dot header hold keep markanswered".split(), ""),
    **dict.fromkeys("quote save showname showto".split(), ""),
    "escape": "~",
    "indentprefix": "> ",
    "prompt": "& ",
    "toplines": "5",
}
VARIABLE_NAMES = {"asksub": "ask", "color": "colour"}  # what is the same
# Variables that the environment may set.
MAIL_ENVIRONMENT = ("DEAD", "EDITOR", "LISTER", "MBOX", "PAGER", "SHELL", "VISUAL")
# What ends the word of a command: a list or an argument begins there.
LIST_LETTERS = " \t0123456789$^.:/-+*'\",;&(`"


def split_command(line: str) -> tuple[str, str]:
    """(command, rest) of a line: `d1-3`, `p$`, `z-`, `f:u`, `!ls`, `|cat`.

    >>> split_command("d1-3")
    ('d', '1-3')
    """
    line = line.strip()
    if line[:1] in tuple("!#|=?"):
        return line[:1], line[1:].strip()
    end = 0
    while end < len(line) and line[end] not in LIST_LETTERS + "|":
        end += 1
    if not end and line[:1] in tuple("+-"):
        return line[0], line[1:].strip()
    return line[:end], line[end:].strip()


def split_words(text: str) -> list[str]:
    """The words of a line, quotes and backslashes taken off.

    >>> split_words("a 'b c' d")
    ['a', 'b c', 'd']
    """
    words, word, quote, is_open = [], "", "", False
    chars = iter(text)
    for char in chars:
        if char == "\\" and quote != "'":
            behind = next(chars, "\\")
            # Inside "..." it is one itself, as in set sign="one\ntwo".
            is_kept = bool(quote) and behind not in '"\\'
            word, is_open = word + char * is_kept + behind, True
        elif quote:
            quote = "" if char == quote else quote
            word += char if quote else ""
        elif char in "'\"":
            quote, is_open = char, True
        elif char in " \t":
            words += [word] if is_open or word else []
            word, is_open = "", False
        else:
            word += char
    return words + ([word] if is_open or word else [])


class Variables:
    """What `set` sets, and what `alias` and its like collect.

    Any name may be set; the ones that mean something are POSIX's and
    Heirloom's. `aliases` maps a name to addresses.
    """

    def __init__(self, environ: dict) -> None:
        self.values = dict(MAIL_DEFAULTS)
        for name in MAIL_ENVIRONMENT:
            if environ.get(name):
                self.values[name] = environ[name]
        self.aliases: dict[str, list[str]] = {}
        self.alternates: list[str] = []
        self.ignored = set(IGNORED_FIELDS)
        self.retained: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether a variable is set."""
        return name in self.values

    def get(self, name: str, usual: str = "") -> str:
        """Its value, or `usual` where it has none."""
        return self.values.get(name) or usual

    def number(self, name: str, usual: int) -> int:
        """Its value as a number."""
        value = self.get(name)
        return int(value) if value.isdigit() and value.isascii() else usual

    def set(self, word: str) -> None:
        """Takes `name`, `name=value` or `noname`."""
        name, equals, value = word.partition("=")
        is_off = name.startswith("no") and not equals and len(name) > 2
        name = name[2:] if is_off else name
        name = VARIABLE_NAMES.get(name, name)
        if is_off:
            self.values.pop(name, None)
            return
        self.values[name] = value
        if name in MAIL_ENVIRONMENT and value:
            os.environ[name] = value  # for what is run from here

    def is_shown(self, name: str) -> bool:
        """Whether a header field is printed: retain wins over ignore."""
        if self.retained:
            return name in self.retained
        return name not in self.ignored

    def expand(self, words: list[str], depth: int = 0) -> list[str]:
        """Addresses, with names of aliases replaced by whom they mean."""
        found = []
        for word in words:
            if word in self.aliases and depth < MAX_DEPTH:
                names = [name for name in self.aliases[word] if name != word]
                is_own = word in self.aliases[word]
                found += [word] if is_own else []
                found += self.expand(names, depth + 1)
            else:
                found.append(word)
        return list(dict.fromkeys(found))


# Charsets that are named by one name and written in a larger one.
LARGER_CHARSETS = {
    **dict.fromkeys(("gb2312", "gbk", "x-gbk"), "gb18030"),
    **dict.fromkeys(("shift_jis", "shift-jis", "x-sjis", "sjis"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987"), "cp949"),
    "windows-874": "cp874",
    "iso-8859-8-i": "iso-8859-8",
}


def readable(data: bytes, charset: str) -> str:
    """Text in a charset; where that is wrong, UTF-8, else Latin-1."""
    try:
        return data.decode(LARGER_CHARSETS.get(charset.lower(), charset))
    except (LookupError, ValueError):
        return any_text(data)


def decoded_words(found: object) -> str:
    """What encoded words mean that follow one another.

    A character may begin in one of them and end in the next; the charset may
    have a language behind a star (RFC 2231 section 5).
    """
    import binascii
    import codecs
    import re

    pieces: list[tuple[str, bytes]] = []
    for one in re.finditer(r"=\?([^?]+)\?(.)\?([^?]*)\?=", found[0]):
        charset, coding, text = one.groups()
        charset = charset.partition("*")[0].lower()
        try:
            codecs.lookup(LARGER_CHARSETS.get(charset, charset))
            if coding in "qQ":
                data = binascii.a2b_qp(text, header=True)
            else:
                data = binascii.a2b_base64(text + "==")
        except (LookupError, ValueError):  # it stays as it came
            charset, data = "utf-8", os_bytes(f"{one[0]} ")
        if pieces and pieces[-1][0] == charset:
            data = pieces.pop()[1] + data
        pieces.append((charset, data))
    return "".join(readable(data, charset) for charset, data in pieces)


def decoded(value: str) -> str:
    """A header field's value with its RFC 2047 words decoded, safe to show.

    >>> decoded("gr=?utf-8?q?=C3=BC=C3=9Fe?=")
    'grüße'
    """
    import re

    value = any_text(os_bytes(value))
    if "=?" in value:
        word = r"=\?[^?\s]+\?[bBqQ]\?[^?]*\?="
        value = re.sub(rf"{word}(?:\s*{word})*", decoded_words, value)
    return terminal_text(" ".join(value.split()))


def shown_field(raw: bytes) -> str:
    """A field as it is printed: decoded, or else folded as it came."""
    name, _, value = os_text(raw).partition(":")
    if "=?" in value:
        return f"{terminal_text(name)}: {decoded(value)}"
    return terminal_text(f"{name}: {value.strip()}")


def char_width(char: str) -> int:
    """Columns of a terminal that a character takes: 0, 1 or 2."""
    from unicodedata import category, east_asian_width  # a C module

    if category(char) in ("Mn", "Me", "Cf"):  # accents, joiners
        return 0
    return 1 + (east_asian_width(char) in "WF")


def columns(text: str, width: int) -> str:
    """`text` cut or filled to so many columns of a terminal."""
    used, kept = 0, []
    for char in text:
        if used + char_width(char) > width:
            break
        used += char_width(char)
        kept.append(char)
    return "".join(kept) + " " * (width - used)


def sender_name(header: Header, from_line: bytes) -> str:
    """The name of a message's author as the header list shows it."""
    value = (header.values("from") or [""])[0]
    name, angle, _ = value.partition("<")
    if not angle and value.endswith(")"):  # user@host (A Name)
        name = value.partition("(")[2][:-1]
    if (angle or name != value) and name.strip():
        return decoded(name.strip().strip('"'))
    try:
        found = AddressScanner(value).scan()
    except MailError:
        found = [value]
    words = os_text(from_line).split()
    return decoded(found[0] if found else words[1] if len(words) > 1 else "")


MAX_HIDDEN = 100  # tags in one another of what is not shown


class HtmlText:
    """Makes text of HTML by html.parser: words, paragraphs, [n] for links."""

    BREAKS = frozenset("br div h1 h2 h3 h4 h5 h6 hr li ol p pre table tr ul".split())
    SILENT = frozenset("script style title".split())  # </head> may be left out
    VOID = frozenset("area base br col hr img input link meta wbr".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.links: list[str] = []
        self.silent: list[str] = []  # open tags of what is not shown
        self.lists: list[int] = []  # numbers of open lists; -1 for none
        self.is_kept = False  # whether blanks and line ends count: pre
        self.open_link = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """A tag begins something."""
        values = {name: value or "" for name, value in attrs}
        if tag == "body":
            self.silent.clear()  # somebody forgot </title>
        style = values.get("style", "").replace(" ", "").lower()
        is_hidden = "hidden" in values or "display:none" in style
        if tag in self.SILENT or self.silent or is_hidden:
            is_kept = tag not in self.VOID and len(self.silent) < MAX_HIDDEN
            self.silent += [tag] if is_kept else []
        elif tag in self.BREAKS:
            self.begin_block(tag)
        elif tag in ("td", "th"):
            self.pieces.append(" ")
        elif tag == "img" and values.get("alt", "").strip():
            self.pieces.append(f" [{values['alt'].strip()}] ")
        elif tag == "a" and values.get("href"):
            self.links.append(values["href"])
            self.open_link = len(self.links)

    def begin_block(self, tag: str) -> None:
        """What stands in lines of its own."""
        if tag in ("ol", "ul"):
            self.lists.append(0 if tag == "ol" else -1)
        self.is_kept |= tag == "pre"
        mark = ""
        if tag == "li":
            number = self.lists[-1] if self.lists else -1
            mark = f"{number + 1}. " if number >= 0 else "* "
            self.lists[-1:] = [number + (number >= 0)] if self.lists else []
        self.pieces.append(f"\n{mark}")

    def handle_endtag(self, tag: str) -> None:
        """A tag ends something."""
        if tag in self.silent:
            while self.silent.pop() != tag:
                pass
        elif tag == "a" and self.open_link:
            self.pieces.append(f" [{self.open_link}]")
            self.open_link = 0
        elif tag in self.BREAKS and tag != "li":
            self.is_kept &= tag != "pre"
            self.lists[-1:] = self.lists[-1:] if tag not in ("ol", "ul") else []
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        """Text, whose line ends mean nothing, but in pre."""
        data = data.replace("\0", "")
        if self.silent:
            return
        if self.is_kept:  # NUL: a blank that stays
            self.pieces.append(data.expandtabs().replace(" ", "\0"))
        else:
            self.pieces.append(" ".join(f"|{data}|".split())[1:-1])

    def lines(self) -> object:
        """Its lines, none much wider than 76 columns."""
        import textwrap

        for line in "".join(self.pieces).split("\n"):
            if "\0" in line or len(line) < 77:
                yield " ".join(line.split()).replace("\0", " ").rstrip()
            else:
                yield from textwrap.wrap(
                    line, 76, break_long_words=False, break_on_hyphens=False
                )

    def text(self) -> str:
        """All of it."""
        found: list[str] = []
        for line in self.lines():
            if line or found and found[-1]:
                found.append(line)
        links = [f"[{number}] {link}" for number, link in enumerate(self.links, 1)]
        body = "\n".join(found).strip("\n")
        return body + "\n" + ("\n" + "\n".join(links) + "\n" if links else "")


HTML_BLOCK = 1 << 12  # characters that are parsed at once
HTML_OPEN = 1 << 14  # characters of a tag or a comment that has no end


def parsed_html(text: str) -> str:
    """The same by html.parser, as far as that understands it."""
    from html.parser import HTMLParser

    reader = type("Reader", (HtmlText, HTMLParser), {})()
    try:
        for place in range(0, len(text), HTML_BLOCK):
            reader.feed(text[place : place + HTML_BLOCK])
            if len(reader.rawdata) > HTML_OPEN:
                # Is no HTML, and each `<` in it would be looked for anew.
                reader.handle_data(reader.rawdata + text[place + HTML_BLOCK :])
                return reader.text()
        reader.close()
    except (AssertionError, ValueError, RecursionError, NotImplementedError):
        return text  # some Pythons give up on what is no HTML
    return reader.text()


def html_text(text: str) -> str:
    """HTML reduced to what can be read; its links stand at the end.

    Where that is nothing, although there are words, what is left of them
    without their tags.
    """
    import re

    found = parsed_html(text)
    if found.strip() or re.search("(?i)<(script|style)", text):
        return found
    text = re.sub(r"<[^<>]*>", " ", text)
    return " ".join(text.split()) + "\n" if text.strip() else found


def safe_name(name: str) -> str:
    """A file's name that leads nowhere else: no folder, no leading dot."""
    name = name.replace("\\", "/").rpartition("/")[2].strip().lstrip(".")
    return "".join(char for char in name if char.isprintable())[:200]


# Parts that are messages, or look like the head of one.
MESSAGE_KINDS = (
    "message/rfc822",
    *("message/delivery-status", "message/disposition-notification"),
    *("message/global", "message/global-delivery-status", "message/global-headers"),
)
SUMMARY_FIELDS = ("from", "to", "cc", "date", "subject")  # of a message in a part


def message_bytes(message: object) -> bytes:
    """A message of the email package as bytes, as it came."""
    import io
    from email.generator import BytesGenerator

    text = io.BytesIO()
    BytesGenerator(text, mangle_from_=False, maxheaderlen=0).flatten(message)
    return text.getvalue()


def usual_ending(kind: str) -> str:
    """How the name of a file of that type ends: `.png`; .bin for others."""
    from mimetypes import guess_extension  # only for parts without a name

    return guess_extension(kind) or ".bin"


def is_text(part: object) -> bool:
    """Whether a part is text, plain or not."""
    return part.get_content_maintype() == "text"


class MailPart:
    """A part of a message, a message in it too: its number, type and name.

    `is_shown`: whether it is printed, and not another form of what is.
    """

    def __init__(self, number: int, part: object) -> None:
        self.number = number
        self.part = part
        self.kind = part.get_content_type()
        self.is_shown = is_text(part) or self.kind in MESSAGE_KINDS
        try:
            self.name = safe_name(decoded(part.get_filename("")))
        except (ValueError, TypeError, LookupError):
            self.name = ""
        if not self.name and not self.is_shown:
            self.name = f"part-{number}{usual_ending(self.kind)}"

    @property
    def is_own(self) -> bool:
        """Whether it is the message's own text, and not attached."""
        return self.is_shown and not self.name

    @property
    def data(self) -> bytes:
        """What it holds, decoded, byte for byte."""
        try:
            if self.part.is_multipart():
                return b"".join(map(message_bytes, self.part.get_payload()))
            return self.part.get_payload(decode=True) or b""
        except Exception:  # noqa: BLE001 hostile mail: errors of email, recursion
            return b""

    @property
    def words(self) -> str:
        """What it says; of a message the head that counts."""
        data = self.data
        if self.kind == "message/rfc822":
            header = Header.parse(data)
            kept = [raw for name, raw in header.fields if name in SUMMARY_FIELDS]
            return "".join(f"{shown_field(raw)}\n" for raw in kept)
        text = readable(data, self.part.get_content_charset("utf-8"))
        if self.kind == "text/html":
            text = html_text(text)
        return text.replace("\r\n", "\n")

    @property
    def text(self) -> str:
        """The same, safe to show."""
        return terminal_text(self.words)

    def head(self) -> str:
        """What is said of it before its text."""
        lines = [f"Part {self.number}:"]
        for name in ("Content-Type", "Content-Disposition"):
            if self.part[name]:
                lines.append(f"{name}: {decoded(str(self.part[name]))}")
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        return f"{self.number} {self.kind}{name} {shown_size(len(self.data))}"


def best_form(parts: list) -> object:
    """Which of several forms of the same text a person is shown.

    Plain text, if there is any; else the last one that has text at all.
    """
    plain = [part for part in parts if part.get_content_type() == "text/plain"]
    plain = [part for part in plain if MailPart(0, part).data.strip()]
    texts = [part for part in parts if any(map(is_text, part.walk()))]
    return (plain or texts[-1:] or parts[-1:])[0]


def mail_parts(header: Header) -> list[MailPart]:
    """The parts of a message, as the email package sees them."""
    import email  # 20 ms; plain mail does without
    import email.policy

    raw = bytes(header) + b"\n" + header.rest
    found: list[MailPart] = []

    def walk(part: object, depth: int, is_shown: bool) -> None:
        subparts = part.get_payload() if part.is_multipart() else None
        is_message = part.get_content_maintype() == "message"
        has_parts = isinstance(subparts, list) and depth <= MAX_DEPTH
        if is_message or not has_parts:
            found.append(MailPart(len(found) + 1, part))
            found[-1].is_shown &= is_shown
        if not has_parts or is_message and part.get_content_type() != "message/rfc822":
            return
        best = None
        if part.get_content_type() == "multipart/alternative" and subparts:
            best = best_form(subparts)
        for sub in subparts:
            walk(sub, depth + 1, is_shown and best in (None, sub))

    try:
        walk(email.message_from_bytes(raw, policy=email.policy.compat32), 0, True)
    except (RecursionError, ValueError, LookupError):  # hostile: shown as it came
        plain = email.message_from_bytes(b"\n" + header.rest)
        found[:] = [MailPart(1, plain)]
    return found


def mime_text(header: Header) -> str:
    """The text of a MIME message: of several parts each with its head."""
    parts = [part for part in mail_parts(header) if part.is_shown or part.name]
    if len(parts) == 1 and parts[0].is_shown:
        text = parts[0].text
        return text if text.endswith("\n") or not text else f"{text}\n"
    pieces = [
        f"{part.head()}\n{part.text if part.is_shown else f'[{part}: w saves it]'}"
        for part in parts
    ]
    return "\n".join(
        piece if piece.endswith("\n") else piece + "\n" for piece in pieces
    )


def is_plain(header: Header) -> bool:
    """Whether a message's text can be read as it stands there."""
    kind = " ".join(header.values("content-type")).lower()
    coding = " ".join(header.values("content-transfer-encoding")).lower()
    main, _, rest = kind.partition(";")
    charset = rest.partition("charset=")[2].partition(";")[0].strip(' "')
    return (
        main.strip() in ("", "text/plain", "text")
        and charset in ("", "utf-8", "us-ascii", "ascii", "unknown-8bit")
        and coding not in ("quoted-printable", "base64")
    )


def body_text(header: Header) -> str:
    """The readable text of a message: its text/plain part, decoded."""
    if is_plain(header):
        return terminal_text(any_text(header.rest))
    return mime_text(header)


def own_text(header: Header) -> str:
    """The text of a message without what is attached."""
    kind = " ".join(header.values("content-type")).lower()
    if "multipart/" not in kind:
        return body_text(header)
    return "".join(part.text for part in mail_parts(header) if part.is_own)


def unquoted(text: str) -> str:
    """`text` with one > taken off each quoted `>From `, as mboxrd has it."""
    if ">From " not in text:
        return text
    lines = text.split("\n")
    return "\n".join(
        line[1:]
        if line.startswith(">") and line.lstrip(">").startswith("From ")
        else line
        for line in lines
    )


def written_text(header: Header) -> bytes:
    """The text of a message as `write` puts it into a file.

    Its bytes as they are, or UTF-8; of one that has no text what it holds.
    """
    if is_plain(header):
        return os_bytes(unquoted(os_text(header.rest)))
    parts = mail_parts(header)
    texts = [part for part in parts if part.is_own]
    if not texts and len(parts) == 1:
        return parts[0].data
    text = "".join(unquoted(part.words) for part in texts)
    return text.encode("utf-8", "replace")


# == 32 Mail sender: Terminal, Sheet, Composer, ESCAPES =======================
# mail(1) writes: what is typed, with its tilde escapes, becomes a letter.
# Failures: Killed when the person gives up; ProgramError and MailError, and
# then the text is in ~/dead.letter.

GIVE_UP_HINT = "\n(Interrupt -- one more to kill letter)\n"
CHARSETS = (("ascii", "us-ascii"), ("utf-8", "utf-8"))


class Killed(Exception):
    """The person does not want the letter any more."""


def run_shell(command: str, text: bytes = b"", wants_output: bool = False) -> bytes:
    """Runs a person's own shell line on `text`; what it prints, if wanted.

    Raises ValueError where it fails and its output was wanted.
    """
    import signal
    import subprocess

    shell = os.environ.get("SHELL") or SHELL
    how = {"input": text} if text or wants_output else {}
    output = subprocess.PIPE if wants_output else None
    # Ctrl-C is for the program that runs: an editor goes on, and so do we.
    # A handler and not SIG_IGN, for that would be handed down.
    before = signal.getsignal(signal.SIGINT)
    if callable(before):
        signal.signal(signal.SIGINT, lambda *_: None)
    try:
        done = subprocess.run([shell, "-c", command], stdout=output, check=False, **how)
    except OSError as error:
        raise ValueError(f"{shell}: {error.strerror}") from None
    finally:
        if callable(before):
            signal.signal(signal.SIGINT, before)
    if wants_output and done.returncode:
        raise ValueError(f'"{command}" failed: exit code {done.returncode}')
    return done.stdout or b""


def banged(text: str, last: str) -> str:
    """A command with the one before it for each `!` without a backslash."""
    parts = text.split("\\!")
    return "!".join(part.replace("!", last) for part in parts)


class Terminal:
    """Standard input and output; prompts only where a person is."""

    def __init__(self) -> None:
        self.is_interactive = os.isatty(0)
        self.buffer = b""
        self.last_command = ""  # what was given to the shell last

    def say(self, text: str) -> None:
        """Prints text as it is."""
        write_all(1, text.encode("utf-8", "replace"))

    def complain(self, text: str) -> None:
        """A line on standard error."""
        write_all(2, f"{printable(text)}\n".encode("utf-8", "replace"))

    @property
    def rows(self) -> int:
        """How high the terminal is; 24 where nobody knows."""
        return self.size()[1]

    @property
    def width(self) -> int:
        """How wide it is; 80 where nobody knows."""
        return self.size()[0]

    def size(self) -> tuple[int, int]:
        """(columns, lines): COLUMNS and LINES, else what the terminal has."""
        import shutil

        return tuple(shutil.get_terminal_size((80, 24)))

    @property
    def has_colours(self) -> bool:
        """Whether output goes to a terminal that has them (no-color.org)."""
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return os.isatty(1) and not is_plain

    def page(self, text: str, pager: str, limit: int) -> None:
        """Prints, by a pager where a person could not read it all at once."""
        is_long = limit and self.is_interactive and text.count("\n") > limit
        if not is_long or not os.isatty(1):
            self.say(text)
            return
        import shutil

        usual = next((name for name in ("more", "less") if shutil.which(name)), "cat")
        run_shell(pager or usual, text.encode("utf-8", "replace"))

    def run(self, command: str, variables: Variables) -> None:
        """Runs a command, or a shell; with `bang` ! in it is the last one."""
        if command and variables.has("bang"):
            command = banged(command, self.last_command)
        self.last_command = command or self.last_command
        run_shell(command or os.environ.get("SHELL") or SHELL)

    def read(self) -> bytes:
        """Some bytes of standard input. Raises ProgramError."""
        try:
            return os.read(0, BLOCK)
        except OSError as error:
            why = f"standard input cannot be read: {error.strerror}: give it some"
            raise ProgramError(EX_NOINPUT, why) from None

    def read_line(self, prompt: str) -> bytes | None:
        """A line without its end, None at the end of the input."""
        if prompt and self.is_interactive:
            self.say(prompt)
        while b"\n" not in self.buffer:
            data = self.read()
            if not data:
                line, self.buffer = self.buffer, b""
                return line or None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def ask(self, prompt: str, usual: str = "") -> str:
        """An answer, with `usual` to begin from; that where nobody is."""
        if not self.is_interactive:
            return usual
        if usual and self.can_edit():
            return (self.edit_line(prompt, usual, is_kept=False) or "").strip()
        shown = f"{prompt}[{terminal_text(usual)}] " if usual else prompt
        return os_text(self.read_line(shown) or b"").strip() or usual

    def can_edit(self) -> bool:
        """Whether readline is there, and a terminal on both ends."""
        if self.buffer or not (os.isatty(0) and os.isatty(1)):
            return False
        try:
            import readline
        except ImportError:
            return False
        readline.parse_and_bind("set enable-bracketed-paste off")
        return True

    def edit_line(
        self, prompt: str, usual: str = "", is_kept: bool = True
    ) -> str | None:
        """A line that may be edited while it is typed; None at the end.

        `is_kept`: whether it may be called up again, as a command may.
        """
        import readline

        readline.set_auto_history(is_kept)
        readline.set_startup_hook(lambda: readline.insert_text(usual))
        try:
            return input(prompt)
        except EOFError:
            return None
        finally:
            readline.set_startup_hook(None)

    def read_command(self, prompt: str, names: object) -> bytes | None:
        """A command line: with history, and Tab for the names of things.

        `names(line, word)` are those that may stand for `word` behind `line`.
        """
        is_plain = os.environ.get("TERM", "dumb") == "dumb"
        if is_plain or not self.is_interactive or not self.can_edit():
            return self.read_line(prompt)
        import readline

        found: list[str] = []

        def complete(text: str, state: int) -> str | None:
            if not state:  # asked anew; the next ones are of the same word
                line = readline.get_line_buffer()[: readline.get_begidx()]
                found[:] = [one for one in names(line, text) if one.startswith(text)]
            return found[state] if state < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \t")
        readline.parse_and_bind("tab: complete")
        line = self.edit_line(prompt)
        return None if line is None else os_bytes(line)

    def read_all(self) -> bytes:
        """Everything that is left, ending in LF."""
        blocks = [self.buffer]
        self.buffer = b""
        while blocks[-1] or len(blocks) == 1:
            blocks.append(self.read())
        text = b"".join(blocks).replace(b"\r\n", b"\n")
        return text if not text or text.endswith(b"\n") else text + b"\n"


def edit_text(editor: str, text: bytes) -> bytes:
    """What an editor makes of a text, in a file that nobody else can read."""
    import shlex
    import tempfile

    with tempfile.NamedTemporaryFile("wb", prefix="mail-", delete=False) as file:
        file.write(text)
    try:
        run_shell(f"{editor} {shlex.quote(file.name)}")
        with open(file.name, "rb") as edited:
            return edited.read()
    finally:
        os.unlink(file.name)


def settings_address(house: House) -> str:
    """The caller's own address."""
    return str(Address(house.user.name, house.settings.myorigin))


def quoted_spans(text: str) -> list[tuple[int, int]]:
    """Where quoted strings, comments and literals are."""
    found, place = [], 0
    while place < len(text):
        after = skip_token(text, place)
        if after > place + 1:
            found.append((place, after))
        place = after
    return found


def split_addresses(text: str) -> list[str]:
    """The addresses of a line, apart by commas or blanks, names kept."""
    spans = address_spans(text)
    if "<" in text or '"' in text or "(" in text:
        pieces, start = [], 0
        for place in [*(i for i, c in enumerate(text) if c == ","), len(text)]:
            inside = any(low <= place < high for low, high in quoted_spans(text))
            if not inside:
                pieces.append(text[start:place].strip())
                start = place + 1
        return [piece for piece in pieces if piece]
    words = [text[low:high] for low, high in spans]
    return [name for word in words for name in word.split()]


# Fields that a letter has once, RFC 5322 section 3.6, and those of MIME.
SINGLE_FIELDS = (
    "from sender reply-to date message-id in-reply-to references mime-version "
    "content-type content-transfer-encoding content-disposition"
).split()


def coded_person(text: str) -> str:
    """`Name <address>` or `address (Name)`, the name coded by RFC 2047."""
    import re

    shape = r"\s*(.*?)\s*<([^<>]*)>\s*|\s*(\S+)\s*\((.*)\)\s*"
    found = None if text.isascii() else re.fullmatch(shape, text)
    if not found:
        return text
    name = found.group(1) or found.group(4) or ""
    if name[:1] == '"' == name[-1:]:
        name = name[1:-1]
    name = re.sub(r"\\(.)", r"\1", name)
    address = found.group(2) or found.group(3)
    return f"{display_name(name)} <{address}>" if name else text


def folded(line: str) -> str:
    """A header field in lines of 78 columns, where it has blanks."""
    found = []
    for row in line.split("\n "):
        while len(row) > 77:  # a blank comes before all but the first
            place = row.rfind(" ", 30, 77)
            place = place if place > 0 else row.find(" ", 77)
            if place < 0:
                break
            found.append(row[:place])
            row = row[place + 1 :]
        found.append(row)
    return "\n ".join(found)


class Sheet:
    """A letter while it is written: addresses, subject, text, files to attach.

    `more` are further header fields; `sender` is what -r or -a From says.
    """

    def __init__(self, to: list[str], subject: str = "") -> None:
        self.people: dict[str, list[str]] = {"To": list(to), "Cc": [], "Bcc": []}
        self.subject = subject
        self.more: list[tuple[str, str]] = []
        self.text = b""
        self.attached: list[str] = []
        self.enclosed: list[bytes] = []  # parts of other letters, as they came
        self.is_answer = False  # whether others wrote whom it is for
        self.sender = ""
        self.record = ""  # the file for a copy, in place of `record`
        self.boundary = f"=_{os.urandom(12).hex()}"  # of its parts

    def add(self, name: str, text: str) -> None:
        """More people for To, Cc or Bcc."""
        self.people[name] += split_addresses(text)

    def set_field(self, name: str, value: str) -> None:
        """A header field of -a; of one that there is once, the last counts."""
        key = name.lower()
        if key in ("to", "cc", "bcc"):
            self.add(key.capitalize(), value)
        elif key == "subject":
            self.subject = value
        else:
            if key in SINGLE_FIELDS:
                self.more = [(n, v) for n, v in self.more if n.lower() != key]
            self.more.append((name, value))
            if key == "from":
                self.sender = value

    def has_field(self, key: str) -> bool:
        """Whether a field, in lower case, was given."""
        return any(name.lower() == key for name, _ in self.more)

    @property
    def has_parts(self) -> bool:
        """Whether there is more than the text."""
        return bool(self.attached or self.enclosed)

    def own_type(self) -> str:
        """The Content-Type that the text was given, or ""."""
        return next((v for n, v in self.more if n.lower() == "content-type"), "")

    def fields(self) -> list[tuple[str, str]]:
        """(name, value) of its header fields, in the order of Heirloom."""
        found = [("From", coded_person(self.sender))] if self.sender else []
        rows = {
            name: ", ".join(map(coded_person, people))
            for name, people in self.people.items()
        }
        found += [("To", rows["To"]), ("Subject", self.subject)]
        found += [("Cc", rows["Cc"]), ("Bcc", rows["Bcc"])]
        hidden = ("from", "content-type") if self.has_parts else ("from",)
        found += [pair for pair in self.more if pair[0].lower() not in hidden]
        return [(name, value) for name, value in found if value.strip()]


def re_lines(value: str) -> list[str]:
    """The lines of a value, CR, LF and NUL being ends alike."""
    for end in "\r\0":
        value = value.replace(end, "\n")
    return [line for line in value.split("\n") if line]


APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


def open_mailbox(path: str, mode: int = 0o600) -> tuple[int, MailboxLock | None]:
    """(descriptor, lock) of a mailbox of the person's own, made if need be.

    It is the file that has the name once the lock is ours: another one may
    have been put in its place meanwhile. What is no regular file has no lock.
    Raises OSError.
    """
    while True:
        fd = os.open(path, APPENDING, mode)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return fd, None
        lock = MailboxLock(path, fd)
        try:
            lock_patiently(lock)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd, lock
            lock.release()
        except FileNotFoundError:
            lock.release()
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def append_mail(path: str, text: bytes, mode: int = 0o600) -> str:
    """Appends to a file of the person's own, durably; its path.

    A mailbox gets an empty line first, if it ends without. Raises OSError.
    """
    lock = None
    if text.startswith(b"From "):
        fd, lock = open_mailbox(path, mode)
    else:
        fd = os.open(path, APPENDING, mode)
    try:
        seen = os.fstat(fd)
        if lock and seen.st_size:
            end = os.pread(fd, 2, max(0, seen.st_size - 2))
            text = (b"" if end == b"\n\n" else b"\n\n"[end.endswith(b"\n") :]) + text
        try:
            write_all(fd, text)
            if stat.S_ISREG(seen.st_mode):
                os.fsync(fd)
        except OSError:
            if stat.S_ISREG(seen.st_mode):
                os.ftruncate(fd, seen.st_size)
            raise
    finally:
        if lock:
            lock.release()
        os.close(fd)
    return path


def prepend_mail(path: str, text: bytes) -> str:
    """Puts mail before what a mailbox of the person's own has; its path.

    The file is the old one or the new one, whole. Raises OSError.
    """
    import shutil
    import tempfile

    path = os.path.realpath(path)
    fd, lock = open_mailbox(path)
    if not lock:
        os.close(fd)
        return append_mail(path, text)
    with open(fd, "rb") as old:
        try:
            aside_fd, aside = tempfile.mkstemp(".new", ".mail-", os.path.dirname(path))
            try:
                with open(aside_fd, "wb") as new:
                    new.write(text)
                    shutil.copyfileobj(old, new)
                    new.flush()
                    os.fchmod(aside_fd, os.fstat(fd).st_mode & 0o777)
                    os.fsync(aside_fd)
                os.rename(aside, path)
            except BaseException:
                os.unlink(aside)
                raise
            sync_folder(os.path.dirname(path))
        finally:
            lock.release()
    return path


def folder_path(name: str, variables: Variables, home: str) -> str:
    """The file that a folder's name means: `+x` is below `folder`."""
    if name.startswith("+") and variables.get("folder"):
        name = os.path.join(variables.get("folder"), name[1:])
        path = os.path.join(home, os.path.expanduser(name))
    else:
        path = os.path.expandvars(os.path.expanduser(name))
    if not os.path.lexists(path) and set("*?[") & set(path):
        import glob

        found = glob.glob(path)
        path = found[0] if len(found) == 1 else path
    return path


def text_form(text: bytes) -> tuple[str, str]:
    """(type, transfer encoding) of a text; decided by its bytes."""
    if b"\0" in text:
        return "application/octet-stream", "base64"
    charset = "unknown-8bit"
    for codec, name in CHARSETS:
        try:
            text.decode(codec)
        except UnicodeDecodeError:
            continue
        charset = name
        break
    is_long = any(len(line) > LONGEST_LINE for line in text.split(b"\n"))
    coding = "quoted-printable" if is_long else "8bit"
    coding = "7bit" if text.isascii() and not is_long else coding
    return f"text/plain; charset={charset}", coding


def coded_text(text: bytes) -> bytes:
    """A text in the encoding that text_form() chose."""
    import binascii

    coding = text_form(text)[1]
    if coding == "base64":
        import base64

        return base64.encodebytes(text)
    return binascii.b2a_qp(text, istext=True) if coding[0] == "q" else text


def mime_fields(sheet: Sheet) -> list[tuple[str, str]]:
    """What says how a letter is to be read."""
    kind, coding = text_form(sheet.text)
    if sheet.has_parts:
        kind = f'multipart/mixed; boundary="{sheet.boundary}"'
        is_plain = coding != "8bit" and all(map(bytes.isascii, sheet.enclosed))
        coding = "7bit" if is_plain else "8bit"
    return [
        ("MIME-Version", "1.0"),
        ("Content-Type", kind),
        ("Content-Transfer-Encoding", coding),
    ]


# What a file is that was packed, by what mimetypes says of it.
PACKED_TYPES = {
    "gzip": "application/gzip",
    "bzip2": "application/x-bzip2",
    "xz": "application/x-xz",
}


def file_type(path: str, data: bytes) -> str:
    """The Content-Type of a file, with a charset if it is text."""
    from mimetypes import guess_type

    kind, packed = guess_type(path)
    if packed:
        return PACKED_TYPES.get(packed, "application/octet-stream")
    if kind and kind.startswith("text/"):
        charset = text_form(data)[0].partition("charset=")[2]
        return f"{kind}; charset={charset}" if charset else kind
    return kind or "application/octet-stream"


def attachment(path: str) -> bytes:
    """A file as a part: head and base64. Raises ProgramError."""
    from base64 import encodebytes

    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ProgramError(1, f"{path}: {error.strerror}") from None
    kind = file_type(path, data)
    name = os.path.basename(path)
    shown = f'filename="{name}"'
    is_plain = name.isascii() and name.isprintable()
    if not is_plain or '"' in name or "\\" in name:
        from urllib.parse import quote

        shown = f"filename*=utf-8''{quote(os_bytes(name))}"  # RFC 2231
    head = f"Content-Type: {kind}\nContent-Disposition: attachment; {shown}\n"
    return os_bytes(f"{head}Content-Transfer-Encoding: base64\n\n") + encodebytes(data)


def mail_body(sheet: Sheet) -> bytes:
    """The text, with what is attached behind it. Raises ProgramError."""
    if not sheet.has_parts:
        return coded_text(sheet.text)
    kind, coding = text_form(sheet.text)
    kind = sheet.own_type() or kind
    head = f"Content-Type: {kind}\nContent-Transfer-Encoding: {coding}\n\n"
    line = f"--{sheet.boundary}"
    parts = [os_bytes(f"{line}\n{head}") + coded_text(sheet.text)]
    more = [*map(attachment, sheet.attached), *sheet.enclosed]
    parts += [os_bytes(f"\n{line}\n") + part for part in more]
    return b"".join([*parts, os_bytes(f"\n{line}--\n")])


def is_place(name: str, variables: Variables) -> bool:
    """Whether a recipient is a file or a command: only with `expandaddr`."""
    starts = ("|", "/", "+", "./", "~/")
    return name.startswith(starts) and variables.has("expandaddr")


class Composer:
    """Makes a message out of what is typed, and submits it.

    `reader` is the session that the letter was begun in, for escapes that
    mean its messages.
    """

    def __init__(
        self, house: House, terminal: Terminal, variables: Variables, reader: object
    ) -> None:
        self.house = house
        self.terminal = terminal
        self.variables = variables
        self.reader = reader
        self.sheet = Sheet([])
        self.is_finished = False
        self.answered: set[str] = set()  # fields that were asked for

    def ask_late(self) -> None:
        """What askcc, askbcc and their like ask for behind the text, once."""
        for variable, name in (("askcc", "Cc"), ("askbcc", "Bcc")):
            if self.variables.has(variable) and name not in self.answered:
                self.sheet.add(name, self.terminal.ask(f"{name}: "))
                self.answered.add(name)

    def ask_first(self, sheet: Sheet) -> None:
        """The subject, where a person is to be asked for it."""
        wants = self.variables.has("ask")
        if not (wants and self.terminal.is_interactive) or sheet.subject:
            return
        try:
            sheet.subject = self.terminal.ask("Subject: ")
        except KeyboardInterrupt:
            self.terminal.say(GIVE_UP_HINT)
            sheet.subject = self.terminal.ask("Subject: ")

    def kill(self) -> None:
        """Ends it without sending; the text is kept if `save` is set."""
        if self.variables.has("save") and self.sheet.text:
            self.rescue(self.sheet.text, is_whole=False)
        raise Killed

    def send(self, sheet: Sheet) -> str:
        """Submits a letter; its queue id. Raises MailError, ProgramError."""
        variables, body = self.variables, sheet.text
        for name in ("Cc", "Bcc"):
            sheet.add(name, variables.get(f"auto{name.lower()}"))
        if variables.get("replyto") and not sheet.has_field("reply-to"):
            sheet.set_field("Reply-To", variables.get("replyto"))
        places: list[str] = []
        for name, people in sheet.people.items():
            found = variables.expand(people)
            if not sheet.is_answer:  # or a stranger's From would be a command
                places += [one for one in found if is_place(one, variables)]
            sheet.people[name] = [one for one in found if one not in places]
        sheet.sender = sheet.sender or variables.get("from")
        header = self.header(sheet)
        try:
            body = mail_body(sheet)
            letter = self.letter(header, sheet.sender, body)
            is_all = places and not letter.recipients
            queue_id = "" if is_all else self.dispatch(letter)
            self.put(places, bytes(letter.header) + b"\n" + body)
        except (MailError, ProgramError):
            self.rescue(bytes(header) + b"\n" + body)
            raise
        self.record(sheet.record, bytes(letter.header) + b"\n" + body)
        return queue_id

    def letter(self, header: Header, author: str, body: bytes) -> Letter:
        """What is submitted. Raises MailError."""
        settings = self.house.settings
        first = header_addresses(author) if author else []
        sender = first[0] if first else Address.parse(settings_address(self.house))
        sender = sender.qualified(settings.myorigin)
        recipients = [
            found.qualified(settings.local_origin)
            for found in header_recipients(header)
        ]
        known = message_origin(settings, self.house.user, str(sender))
        known["name"] = ""  # mailx leaves it to -r and the variable `from`
        header = complete_header(header, {**known, "address": str(sender)})
        return Letter(sender, recipients, header, [body])

    def put(self, places: list[str], text: bytes) -> None:
        """A letter for files and commands. Raises MailError."""
        for name in places:
            if name.startswith("|"):
                try:
                    run_shell(name[1:], self.as_mail(text))
                except ValueError as error:
                    raise MailError("4.3.0", str(error)) from None
                continue
            path = folder_path(name, self.variables, self.house.user.home)
            try:
                append_mail(path, self.as_mail(text))
            except OSError as error:
                raise MailError("4.3.0", f"{path}: {error.strerror}") from None

    def dispatch(self, letter: Letter) -> str:
        """Sends a letter by whoever is to do that; its id. MailError."""
        has_other = self.variables.get("sendmail")
        return self.hand_over(letter) if has_other else self.submit(letter)

    def submit(self, letter: Letter) -> str:
        """Submits a letter by ourselves; its queue id. MailError."""
        submission = Submission(self.house)
        queue_id = submission.submit(letter)
        for name, error in submission.refused.items():
            self.terminal.complain(f"{name}: {reason(error)}: it will be bounced")
        return queue_id

    def hand_over(self, letter: Letter) -> str:
        """The same by the program that `sendmail` names; "". MailError."""
        import subprocess

        words = split_words(self.variables.get("sendmail"))
        names = [str(name) for name in letter.recipients]
        words += ["-i", "-f", str(letter.sender), "--", *names]
        text = b"".join(letter.chunks())
        try:
            code = subprocess.run(words, input=text, check=False).returncode
        except OSError as error:
            raise MailError("4.3.0", f"{words[0]}: {error.strerror}") from None
        if code:
            raise MailError("4.3.0", f"{words[0]} failed with exit code {code}")
        return ""

    def header(self, sheet: Sheet) -> Header:
        """Its fields, fit for a header; line ends in them are blanks."""
        header = Header([])
        given = {name.lower() for name, _ in sheet.fields()}
        pairs = sheet.fields()
        pairs += [pair for pair in mime_fields(sheet) if pair[0].lower() not in given]
        for name, value in pairs:
            clean = " ".join(re_lines(value))
            is_plain = clean.isascii() or name in ("To", "Cc", "Bcc", "From")
            clean = clean if is_plain else encoded_word(clean, len(name) + 2)
            header = header.added(name, folded(f"{name}: {clean}")[len(name) + 2 :])
        return header

    def record(self, name: str, text: bytes) -> None:
        """A copy for the file `name`, else for the one that `record` names."""
        name = name or self.variables.get("record")
        if name:
            if self.variables.has("outfolder") and name[0] not in "/~+%#&":
                name = f"+{name}"
            path = folder_path(name, self.variables, self.house.user.home)
            try:
                append_mail(path, self.as_mail(text))
            except OSError as error:
                why = f"{path}: {error.strerror}: it is sent, but no copy is kept"
                self.terminal.complain(why)

    def as_mail(self, text: bytes) -> bytes:
        """A letter as it stands in an mbox."""
        text = text.rstrip(b"\n") + b"\n"
        return self.from_line() + b"".join(mbox_quoted([text]))

    def dead_paths(self) -> list[str]:
        """Where letters go that were not sent, and where else."""
        home = self.house.user.home
        usual = os.path.join(home, "dead.letter")
        own = folder_path(self.variables.get("DEAD", usual), self.variables, home)
        found = list(dict.fromkeys((own, usual)))
        spare = f"/var/tmp/dead.letter.{os.getuid()}"
        try:
            seen = os.lstat(spare)
            is_safe = stat.S_ISREG(seen.st_mode) and seen.st_uid == os.getuid()
        except OSError:
            is_safe = True  # there is none yet
        return [*found, spare] if is_safe else found

    def from_line(self) -> bytes:
        """The From_ line of a copy."""
        return os_bytes(f"From {self.house.user.name}  {time.ctime(time.time())}\n")

    def rescue(self, text: bytes, is_whole: bool = True) -> None:
        """Appends what was not sent to ~/dead.letter, and says so."""
        size, said = f"{len(text.splitlines())}/{len(text)}", ""
        if not is_whole:
            text = bytes(self.header(self.sheet)) + b"\n" + text
        for path in self.dead_paths():
            try:
                said = append_mail(path, self.as_mail(text))
                break
            except OSError as error:
                self.terminal.complain(f"{path}: {error.strerror}")
        if not said:
            self.terminal.complain("the text is lost: it follows")
            self.terminal.say(terminal_text(os_text(text)))
        elif is_whole:
            self.terminal.complain(f"the text is kept in {said}")
        else:
            self.terminal.say(f'"{terminal_text(said)}" {size}\n')


# Tilde escapes: each takes what stands behind its letter.


def escape_end(composer: Composer, _: str) -> None:
    """~. ends the letter and sends it"""
    composer.terminal.say("EOT\n")
    composer.is_finished = True


def escape_kill(composer: Composer, _: str) -> None:
    """~q gives up; the text is kept in dead.letter"""
    composer.kill()


def escape_exit(_: Composer, __: str) -> None:
    """~x gives up, and keeps nothing"""
    raise Killed


def escape_subject(composer: Composer, rest: str) -> None:
    """~s TEXT sets the subject"""
    composer.sheet.subject = rest


def escape_people(name: str) -> object:
    """An escape that adds to To, Cc or Bcc."""
    return lambda composer, rest: composer.sheet.add(name, rest)


def escape_heads(composer: Composer, _: str) -> None:
    """~h asks for all of these"""
    for name, people in composer.sheet.people.items():
        answer = composer.terminal.ask(f"{name}: ", ", ".join(people))
        composer.sheet.people[name] = split_addresses(answer)
    subject = composer.terminal.ask("Subject: ", composer.sheet.subject)
    composer.sheet.subject = subject


def escape_read(composer: Composer, rest: str) -> None:
    """~r FILE, ~r !COMMAND puts in what it says"""
    if rest.startswith("!"):
        text = run_shell(rest[1:], wants_output=True)
    else:
        path = folder_path(rest, composer.variables, composer.house.user.home)
        with open(path, "rb") as file:
            text = file.read(composer.house.settings.message_size_limit)
    composer.sheet.text += text + (b"" if text.endswith(b"\n") or not text else b"\n")
    lines = text.count(b"\n")
    composer.terminal.say(f'"{terminal_text(rest)}" {lines}/{len(text)}\n')


def escape_dead(composer: Composer, _: str) -> None:
    """~d puts in dead.letter"""
    escape_read(composer, composer.dead_paths()[0])


def escape_write(composer: Composer, rest: str) -> None:
    """~w FILE appends the text to it"""
    path = folder_path(rest, composer.variables, composer.house.user.home)
    text = composer.sheet.text
    append_mail(path, text, 0o666)
    lines = text.count(b"\n")
    composer.terminal.say(f'"{terminal_text(rest)}" {lines}/{len(text)}\n')


def escape_shell(composer: Composer, rest: str) -> None:
    """~!COMMAND runs it"""
    composer.terminal.run(rest, composer.variables)
    composer.terminal.say("!\n")


def escape_pipe(composer: Composer, rest: str) -> None:
    """~|COMMAND puts the text through it"""
    text = run_shell(rest, composer.sheet.text, wants_output=True)
    composer.sheet.text = text or composer.sheet.text
    composer.terminal.say("(continue)\n")


def escape_edit(name: str, usual: str) -> object:
    """An escape that edits the text with the editor that a variable names."""

    def escape(composer: Composer, _: str) -> None:
        editor = composer.variables.get(name, usual)
        composer.sheet.text = edit_text(editor, composer.sheet.text)
        composer.terminal.say("(continue)\n")

    return escape


def escape_print(composer: Composer, _: str) -> None:
    """~p shows the letter"""
    sheet = composer.sheet
    rows = "".join(f"{name}: {value}\n" for name, value in sheet.fields())
    text = terminal_text(rows) + "\n"
    text += terminal_text(sheet.text.decode("utf-8", "replace"))
    composer.terminal.say(f"-------\nMessage contains:\n{text}(continue)\n")


def escape_attach(composer: Composer, rest: str) -> None:
    """~@ FILE attaches it"""
    for name in split_words(rest):
        path = folder_path(name, composer.variables, composer.house.user.home)
        with open(path, "rb"):
            composer.sheet.attached.append(path)


def escape_messages(is_quoted: bool, has_all: bool) -> object:
    """An escape that puts messages of the session in."""

    def escape(composer: Composer, rest: str) -> None:
        if composer.reader is None:
            raise ValueError("No messages to send from.")
        numbers = composer.reader.numbers(rest)
        composer.terminal.say(f"Interpolating: {' '.join(map(str, numbers))}\n")
        prefix = composer.variables.get("indentprefix") if is_quoted else ""
        for number in numbers:
            text = composer.reader.message_text(number, has_all)
            lines = [f"{prefix}{line}\n" for line in text.rstrip("\n").split("\n")]
            composer.sheet.text += "".join(lines).encode("utf-8", "replace")
        composer.terminal.say("(continue)\n")

    return escape


def escape_insert(composer: Composer, rest: str) -> None:
    """~i NAME puts the value of a variable in; ~a: sign, ~A: Sign"""
    value = composer.variables.get(rest)
    if value:
        text = value.replace("\\n", "\n").replace("\\t", "\t")
        composer.sheet.text += os_bytes(text) + b"\n"
        composer.terminal.say(terminal_text(text) + "\n")


def escape_command(composer: Composer, rest: str) -> None:
    """~:COMMAND does a command of mail"""
    if composer.reader is None:
        raise ValueError("The ~: escape is only for who reads mail.")
    composer.reader.obey_aside(rest)
    composer.terminal.say("(continue)\n")


ESCAPE_HELP = """\
~. ends the letter and sends it
~q gives up; the text is kept in dead.letter
~x gives up, and keeps nothing
~s TEXT sets the subject
~t ADDR ... more recipients
~c ADDR ... copies
~b ADDR ... blind copies
~h asks for all of these
~r FILE, ~r !COMMAND puts in what it says
~d puts in dead.letter
~w FILE appends the text to it
~!COMMAND runs it
~|COMMAND puts the text through it
~e edits the text (EDITOR)
~v edits the text (VISUAL)
~p shows the letter
~@ FILE attaches it
~f [LIST] puts messages in
~F [LIST] puts messages in, with all of their header
~m [LIST] puts messages in, each line behind indentprefix
~M [LIST] the same with all of their header
~i NAME puts the value of a variable in
~:COMMAND does a command of mail
~a, ~A the same for sign, Sign
~~ a line that begins with a tilde
"""
ESCAPES = {
    ".": escape_end,
    "q": escape_kill,
    "x": escape_exit,
    "s": escape_subject,
    "t": escape_people("To"),
    "c": escape_people("Cc"),
    "b": escape_people("Bcc"),
    "h": escape_heads,
    "r": escape_read,
    "<": escape_read,
    "d": escape_dead,
    "w": escape_write,
    "!": escape_shell,
    "|": escape_pipe,
    "e": escape_edit("EDITOR", "ed"),
    "v": escape_edit("VISUAL", "vi"),
    "p": escape_print,
    "@": escape_attach,
    "+": escape_attach,
    "f": escape_messages(False, False),
    "F": escape_messages(False, True),
    "m": escape_messages(True, False),
    "M": escape_messages(True, True),
    "i": escape_insert,
    "a": lambda composer, _: escape_insert(composer, "sign"),
    "A": lambda composer, _: escape_insert(composer, "Sign"),
    ":": escape_command,
    "_": escape_command,
}


def do_escape(composer: Composer, text: str, mark: str) -> None:
    """A tilde escape, or a line that begins with the mark itself."""
    letter, rest = text[:1], text[1:].strip()
    say = composer.terminal.say
    if letter == mark:
        composer.sheet.text += os_bytes(text) + b"\n"
    elif letter == "?":
        say(ESCAPE_HELP)
    elif letter not in ESCAPES:
        say("Unknown tilde escape.\n")
    else:
        try:
            ESCAPES[letter](composer, rest)
        except ValueError as error:
            say(f"{terminal_text(str(error))}\n")
        except OSError as error:
            name = terminal_text(str(error.filename or rest))
            say(f"{name}: {error.strerror}\n")


def take_line(composer: Composer, line: bytes | None) -> None:
    """One line that was typed."""
    has, escape = composer.variables.has, composer.variables.get("escape")
    if line is None and has("ignoreeof"):
        composer.terminal.say('Use "." to terminate letter\n')
    elif line is None or line == b"." and (has("dot") or has("ignoreeof")):
        composer.terminal.say("EOT\n")
        composer.is_finished = True
    elif escape and line[:1] == os_bytes(escape[:1]):
        do_escape(composer, os_text(line[1:]), escape[:1])
    else:
        composer.sheet.text += line + b"\n"


class Rescue:
    """Keeps a letter if the terminal goes away, or somebody ends us."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer

    def __enter__(self) -> None:
        import signal

        self.before = {
            number: signal.signal(number, self.give_up)
            for number in (signal.SIGHUP, signal.SIGTERM)
        }

    def give_up(self, number: int, _: object) -> None:
        """The signal: as two interrupts, but nobody is there to be told."""
        try:
            self.composer.kill()
        except (Killed, OSError):
            os._exit(128 + number)

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self.before.items():
            signal.signal(number, handler)


def write_letter(composer: Composer, sheet: Sheet) -> None:
    """Reads the text: to the end of file, a lone dot, or `~.`.

    Raises Killed.
    """
    composer.sheet, terminal = sheet, composer.terminal
    if not terminal.is_interactive:
        sheet.text += terminal.read_all()
        return
    composer.is_finished, was_interrupted = False, False
    with Rescue(composer):
        while True:
            try:
                if composer.is_finished:
                    composer.ask_late()
                    return
                take_line(composer, terminal.read_line(""))
                was_interrupted = False
            except KeyboardInterrupt:
                terminal.buffer = b""
                if composer.variables.has("ignore"):
                    terminal.say("@\n")
                    continue
                if was_interrupted:
                    composer.kill()
                was_interrupted = True
                terminal.say(GIVE_UP_HINT)


# == 33 Mail reader: MailReader, MAIL_COMMANDS ================================
# mail(1) reads: a session on a folder, a command a line. Commands are rows of
# MAIL_COMMANDS, which ? prints. What becomes of the mail is settled by quit.
# Source: POSIX mailx; where it is silent, Heirloom mailx.
# Failures: a line on the terminal and the next prompt; ProgramError to end.


IF_WORDS = ("i", "if", "el", "els", "else", "en", "end", "endi", "endif")


class MailSession:
    """What commands work on: variables, terminal, and lines of start-up files.

    A command is a function of the session and of the rest of its line; it may
    raise ValueError with what is wrong.
    """

    is_ready = False  # whether the start-up files are done with

    def __init__(
        self, house: House, terminal: Terminal, variables: Variables, commands: tuple
    ) -> None:
        self.house = house
        self.terminal = terminal
        self.variables = variables
        self.commands = commands  # rows of (names, function, help)
        self.wants: list[bool] = []  # of `if`: whether its lines count
        self.sources: list[str] = []  # files whose lines are being obeyed
        self.is_reading = True
        self.own_path = ""  # the mailbox that mail is delivered to
        self.previous = ""  # the folder before this one

    def find_command(self, word: str) -> object:
        """The command of a name or an unfinished one; next for none."""
        rows = [(names.split(), command) for names, command, _ in self.commands]
        for names, command in rows:
            if (word or "n") in names:
                return command
        for names, command in rows:
            if any(name.startswith(word) for name in names):
                return command
        return None

    def obey(self, line: str) -> bool:
        """One command line; whether it went well."""
        word, rest = split_command(line)
        command = self.find_command(word)
        if not all(self.wants) and word not in IF_WORDS:
            return True
        try:
            if command is None:
                raise ValueError(f'Unknown command: "{word}"')
            command(self, rest)
        except ValueError as error:
            self.tell(str(error))
        except Killed:
            return True  # the letter, not the session
        except (MailError, ProgramError) as error:
            self.terminal.complain(getattr(error, "text", str(error)))
        except OSError as error:
            self.terminal.complain(f"{error.filename or word}: {error.strerror}")
        else:
            return True
        return False

    def tell(self, text: str) -> None:
        """Says what was wrong with a command."""
        if self.is_ready:
            self.terminal.say(f"{terminal_text(text)}\n")
        else:
            self.terminal.complain(text)

    def source(self, path: str) -> None:
        """Obeys the lines of a file. Raises OSError, ValueError."""
        if len(self.sources) >= MAX_DEPTH:
            raise ValueError(f"{path}: too many files that name one another")
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(MAX_MAP).replace("\\\n", " ")
        self.sources.append(path)
        try:
            for line in text.split("\n"):
                if line.strip() and not self.obey(line) and not self.is_ready:
                    return  # POSIX: an error ends a start-up file
        finally:
            self.sources.pop()

    def source_if_there(self, path: str) -> None:
        """The same for a file that need not be there."""
        try:
            self.source(path)
        except FileNotFoundError:
            return
        except OSError as error:
            self.terminal.complain(f"{path}: {error.strerror}")
        self.wants.clear()

    def file_path(self, name: str) -> str:
        """A path that a person wrote."""
        return folder_path(name, self.variables, self.house.user.home)

    def path_of(self, name: str) -> str:
        """The file of a folder's name: `%`, `%user`, `#`, `&`, `+x`."""
        if name == "%":
            return self.own_path
        if name[:1] == "%":
            spool = self.house.settings.mail_spool_directory
            return f"{spool}/{os.path.basename(name[1:])}"
        if name == "#":
            if not self.previous:
                raise ValueError("No previous file")
            return self.previous
        return self.mbox_path() if name == "&" else self.file_path(name)

    def mbox_path(self) -> str:
        """Where mail goes that was read: MBOX, or ~/mbox."""
        usual = os.path.join(self.house.user.home, "mbox")
        return self.file_path(self.variables.get("MBOX", usual))


# Letter behind a colon -> which messages it means.
KINDS = {
    "n": lambda message: message.is_new,
    "u": lambda message: message.is_unread,
    "o": lambda message: not message.is_new,
    "r": lambda message: not message.is_unread,
    "d": lambda message: message.state == "deleted",
    "f": lambda message: "F" in message.flags,
    "a": lambda message: "A" in message.flags,
}


# What may not be done in the middle of a letter: it would begin another one,
# or change what its escapes mean.
NOT_WHILE_WRITING = frozenset(
    ("enter_folder", "follow_up", "follow_up_to_author", "forward", "leave", "mail")
    + ("quit_session", "reply", "reply_to_author", "take_news")
)


def quoted_word(word: str) -> str:
    """A word as split_words() reads it back."""
    return "'" + word.replace("'", "'\\''") + "'" if " " in word else word


class MailReader(MailSession):
    """A session on one folder: a line is a command and its messages.

    `dot` is the current message's number, from 1; `own_path` the mailbox that
    mail is delivered to.
    """

    is_ready = True

    def __init__(self, session: MailSession, folder: Folder, commands: tuple) -> None:
        super().__init__(session.house, session.terminal, session.variables, commands)
        self.own_path = session.own_path or folder.path
        self.is_system = True  # whether the folder is where mail is delivered
        self.sought = ""  # what /TEXT looked for last
        self.is_over = False
        self.enter(folder)

    def enter(self, folder: Folder) -> None:
        """Takes up a folder."""
        self.folder = folder
        self.messages = folder.messages
        self.was_printed = False
        self.dot = self.first_dot()

    def first_dot(self) -> int:
        """The first new message, else the first unread one, else the first."""
        for wanted in ("is_new", "is_unread"):
            for number, message in enumerate(self.messages, 1):
                if getattr(message, wanted):
                    return number
        return min(1, len(self.messages))

    # The session

    def banner(self) -> str:
        """`"/var/mail/bob": 2 messages 1 new 2 unread`."""
        total = len(self.messages)
        counts = (
            ("new", sum(message.is_new for message in self.messages)),
            ("unread", sum(message.is_unread for message in self.messages)),
            ("deleted", sum(m.state == "deleted" for m in self.messages)),
            ("saved", sum(m.state == "saved" for m in self.messages)),
        )
        text = f'"{self.shown_path()}": {counted(total)}'
        for word, count in counts:
            is_news = word != "unread" or count > counts[0][1]
            text += f" {count} {word}" if count and is_news else ""
        return text + (" [Read only]" if self.folder.is_read_only else "")

    def shown_path(self) -> str:
        """The folder's name."""
        return terminal_text(self.folder.name)

    def is_overtaken(self) -> bool:
        """Whether the folder had to be read anew: its numbers are others."""
        if not self.folder.is_changed():
            return False
        self.terminal.say("Another program has changed the folder: read anew\n")
        is_read_only = self.folder.is_read_only
        path, home = self.folder.path, self.house.user.home
        self.enter(open_folder(path, home, is_read_only))
        return True

    def look_for_mail(self) -> None:
        """Takes in what came since the last look."""
        self.is_overtaken()
        if self.folder.has_grown() and self.terminal.is_interactive:
            count = self.folder.take_new()
            if count:
                self.terminal.say("New mail has arrived.\n")
                self.terminal.say(f"Loaded {counted(count, 'new message')}\n")

    # Messages

    def read(self, number: int) -> tuple[bytes, Header]:
        """(From_ line, header with the body as its rest) of one message."""
        return self.folder.read(self.messages[number - 1])

    def head(self, number: int) -> tuple[bytes, Header]:
        """The same without what may be large."""
        return self.folder.head(self.messages[number - 1])

    def answered_header(self, number: int) -> Header:
        """The header of a message that is answered.

        Who has no From field is known by the envelope.
        """
        from_line, header = self.read(number)
        words = os_text(from_line).split()
        if " ".join(header.values("from")).strip() or len(words) < 2:
            return header
        return header.without("from").added("From", words[1])

    def obey_aside(self, line: str) -> None:
        """A command of somebody who writes a letter. Raises ValueError."""
        word = split_command(line)[0]
        command = self.find_command(word)
        if command and command.__name__ in NOT_WHILE_WRITING:
            raise ValueError(f'"{word}": not while a letter is written')
        self.obey(line)

    def is_gone(self, number: int) -> bool:
        """Whether a message is deleted."""
        return number > 0 and self.messages[number - 1].state == "deleted"

    def is_own(self, address: Address) -> bool:
        """Whether an address is the reader's own."""
        name, settings = self.house.user.name, self.house.settings
        is_near = self.variables.has("allnet") or settings.is_local(address.domain)
        known = [one.lower() for one in self.variables.alternates]
        if self.variables.has("allnet"):
            known += [one.partition("@")[0] for one in known]
        is_mine = address.local == name and is_near
        full = str(address).lower()
        return is_mine or full in known or address.local.lower() in known

    def summary(self, number: int, indent: int = 0) -> str:
        """One line of the header list, as wide as the terminal at the most."""
        import re

        message = self.messages[number - 1]
        from_line, header = self.head(number)
        mark = ">" if number == self.dot else " "
        found = re.search(rb"\w{3} \w{3} [ \d]\d \d\d:\d\d", from_line)
        words = os_text(found[0] if found else from_line[-24:]).strip()
        date, size = terminal_text(words[:16]), message.end - message.start
        name = columns(self.shown_name(header, from_line), 20)
        head = f"{mark}{message.flag}{number:3} "
        tail = f"  {date:16} {self.folder.lines(message):3}/{size:<5} "
        room = self.terminal.width - 4 - (len(head) + 20 + len(tail) + indent)
        if not header.has("subject") or room < 1:
            return f"{head}{name}{tail}".rstrip()
        subject = decoded(" ".join(header.values("subject")[:1]))
        return f'{head}{name}{tail}"{columns(subject, room).rstrip()}"'

    def painted(self, number: int, indent: int = 0) -> str:
        """The same in colours, where they are wanted and there are any."""
        text, message = self.summary(number, indent), self.messages[number - 1]
        if not self.variables.has("colour") or not self.terminal.has_colours:
            return text
        code = "33" if "F" in message.flags else "1" if message.is_unread else ""
        return f"\x1b[{code}m{text}\x1b[m" if code else text

    def shown_name(self, header: Header, from_line: bytes) -> str:
        """Who wrote it; to whom, if it was the reader, and showto is set."""
        if self.variables.has("showto"):
            try:
                found = header_addresses((header.values("from") or [""])[0])
            except MailError:
                found = []
            if found and self.is_own(found[0]) and header.has("to"):
                to = Header([("from", b"From:" + os_bytes(header.values("to")[0]))])
                return f"To {sender_name(to, b'')}"
        return sender_name(header, from_line)

    def message_text(self, number: int, has_all: bool = False) -> str:
        """A message as it is printed: the fields that are shown, its text."""
        _, header = self.read(number)
        variables = self.variables
        lines = [
            shown_field(raw)
            for name, raw in header.fields
            if name not in ("status", "x-status")
            and (has_all or variables.is_shown(name))
        ]
        return "\n".join(lines) + "\n\n" + unquoted(body_text(header))

    # Message lists

    def numbers(self, text: str, is_deleted: bool = False) -> list[int]:
        """The messages that a list names; the current one for an empty list.

        Numbers and ranges say which; of them, or of all, who is named, what
        is sought and which kinds. Raises ValueError in mailx's words.
        """
        words = split_words(text.replace(",", " ")) or [str(self.dot)]
        tests = [(self.test_of(word), word) for word in words]
        found: list[int] = []
        for test, word in tests:
            if test is None:
                found += [n for n in self.range(word, is_deleted) if n not in found]
        chosen = [(test, word) for test, word in tests if test]
        if chosen and len(chosen) == len(tests):
            found = [n for n in self.every() if self.is_gone(n) == is_deleted]
        for kind in (":", "/", ""):
            same = [test for test, word in chosen if self.kind_of(word) == kind]
            if same:
                found = [n for n in found if any(test(n) for test in same)]
        if not found:
            raise ValueError(self.nothing(words))
        return found

    def every(self) -> object:
        """The numbers of all messages."""
        return range(1, len(self.messages) + 1)

    def nothing(self, words: list[str]) -> str:
        """What is said when a list names none."""
        people = [w for w in words if self.test_of(w) and self.kind_of(w) == ""]
        kinds = [w for w in words if w[:1] == ":"]
        if kinds:
            return f"No messages satisfy {' '.join(kinds)}"
        if people:
            return f"No applicable messages from {{{' '.join(people)}}}"
        return "No applicable messages"

    def kind_of(self, word: str) -> str:
        """`:`, `/`, or "" for a name."""
        return word[0] if word[:1] in tuple(":/") else ""

    def test_of(self, word: str) -> object:
        """What a word asks of a message; None for numbers and ranges."""
        if word[:1] == ":" and len(word) > 1:
            letters = word[1:]
            if not all(letter in KINDS for letter in letters):
                raise ValueError(f"{word}: Invalid message list")
            return lambda n: any(KINDS[c](self.messages[n - 1]) for c in letters)
        if word[:1] == "/":
            self.sought = word[1:] or self.sought
            return self.search_of(self.sought.lower())
        is_number = word.strip("0123456789^$.+-*") == ""
        if is_number or not word.isprintable():
            return None
        if self.variables.has("allnet"):
            word = word.partition("@")[0]
        return lambda n: word.lower() in self.author(n).lower()

    def search_of(self, text: str) -> object:
        """A test for text in the subject, or `/field:text`, `/body:text`."""
        name, colon, value = text.partition(":")
        if colon and name in ("from", "to", "cc", "subject", "body"):
            return lambda n: value in self.searched(n, name)
        return lambda n: text in self.searched(n, "subject")

    def searched(self, number: int, name: str) -> str:
        """What a search looks at, in lower case."""
        if name == "body":
            return body_text(self.read(number)[1]).lower()
        return decoded(" ".join(self.head(number)[1].values(name))).lower()

    def author(self, number: int) -> str:
        """Name and address of who wrote a message."""
        from_line, header = self.head(number)
        values = " ".join(header.values("from")) or os_text(from_line)
        return f"{decoded(values)} {sender_name(header, from_line)}"

    def range(self, word: str, is_deleted: bool = False) -> list[int]:
        """The numbers that one word of a list names: `3`, `2-4`, `*`."""
        if word == "*":
            return [n for n in self.every() if self.is_gone(n) == is_deleted]
        low, dash, high = word.partition("-")
        if not dash or not low:
            return [self.checked(self.number(word, is_deleted), is_deleted)]
        if not high:
            raise ValueError(f"{word}: Invalid message list")
        ends = sorted((self.number(low), self.number(high)))
        if ends[1] > len(self.messages):
            raise ValueError(f"{high}: Invalid message number")
        return [n for n in range(ends[0], ends[1] + 1) if self.is_gone(n) == is_deleted]

    def number(self, word: str, is_deleted: bool = False) -> int:
        """One message's number: digits, `.`, `$`, `^`, `+`, `-`.

        The first, the next and the one before are of those that are not
        deleted, or of those that are.
        """
        if word.isascii() and word.isdigit():
            return int(word[:9])
        if word in (".", "$"):
            return self.dot if word == "." else len(self.messages)
        count = len(self.messages)
        ways = {  # where to look, and what there is if nothing fits
            "^": (range(1, count + 1), 1),
            "+": (range(self.dot + 1, count + 1), self.dot + 1),
            "-": (range(self.dot - 1, 0, -1), self.dot - 1),
        }
        if word not in ways:
            raise ValueError(f"{word}: Invalid message list")
        places, usual = ways[word]
        return next((n for n in places if self.is_gone(n) == is_deleted), usual)

    def checked(self, number: int, is_deleted: bool = False) -> int:
        """A number that there is, deleted or not as wanted."""
        if not 0 < number <= len(self.messages):
            raise ValueError(f"{number}: Invalid message number")
        if self.is_gone(number) != is_deleted:
            raise ValueError(f"{number}: Inappropriate message")
        return number

    def split_file(self, rest: str, usual: str = "") -> tuple[list[int], str]:
        """(messages, file) of `[list] file`. Raises ValueError."""
        words = split_words(rest)
        if not words and not usual:
            raise ValueError("No file specified")
        name = words.pop() if words else usual
        return self.numbers(" ".join(map(quoted_word, words))), self.path_of(name)

    def page(self, text: str) -> None:
        """Prints, by the pager if that is more than `crt` lines."""
        limit = self.variables.number("crt", self.terminal.rows)
        limit = limit if self.variables.has("crt") else 0
        self.terminal.page(text, self.variables.get("PAGER"), limit)

    def composer(self) -> Composer:
        """Who writes letters in this session."""
        return Composer(self.house, self.terminal, self.variables, self)

    def raw_text(self, numbers: list[int]) -> bytes:
        """Messages as an mbox has them."""
        pieces = []
        for number in numbers:
            from_line, header = self.read(number)
            text = from_line + b"\n" + bytes(header) + b"\n" + header.rest
            pieces.append(text.rstrip(b"\n") + b"\n\n")
        return b"".join(pieces)

    def append_to(self, path: str, text: bytes, mode: int, name: str) -> None:
        """Appends to a file of the reader's, durably, and says so."""
        is_new = not os.path.exists(path)
        append_mail(path, text, mode)
        what = "[New file]" if is_new else "[Appended]"
        size = f"{text.count(10)}/{len(text)}"
        self.terminal.say(f'"{terminal_text(name)}" {what} {size}\n')


def others_in(header: Header, reader: MailReader, *names: str) -> list[str]:
    """The addresses in these fields that are not the caller's own."""
    found: list[str] = []
    for value in (value for name in names for value in header.values(name)):
        for address in header_addresses(value):
            is_own = reader.is_own(address) and not reader.variables.has("metoo")
            if not is_own and str(address) not in found:
                found.append(str(address))
    return found


def answer_subject(header: Header) -> str:
    """`Re: ` and the subject of what is answered."""
    subject = decoded(" ".join(header.values("subject")[:1]))
    return subject if subject.lower().startswith("re:") else f"Re: {subject}"


def reply_fields(header: Header, reader: MailReader) -> list[tuple[str, str]]:
    """The header of an answer to everybody but oneself."""
    author = "reply-to" if header.has("reply-to") else "from"
    to = others_in(header, reader, author, "to") or [settings_address(reader.house)]
    copies = [name for name in others_in(header, reader, "cc") if name not in to]
    ids = header.values("message-id")[:1]
    chain = [*" ".join(header.values("references")).split(), *ids]
    return [
        ("To", ", ".join(to)),
        ("Cc", ", ".join(copies)),
        ("Subject", answer_subject(header)),
        ("In-Reply-To", " ".join(ids)),
        ("References", " ".join(chain)),
    ]


def screen_size(reader: MailReader) -> int:
    """Header lines on a screen."""
    usual = max(1, reader.terminal.rows - 4)
    return max(1, reader.variables.number("screen", usual))


def show_screen(reader: MailReader, start: int) -> None:
    """The header lines from a place on."""
    end = min(start + screen_size(reader), len(reader.messages))
    for number in range(start + 1, end + 1):
        if not reader.is_gone(number):
            reader.terminal.say(reader.painted(number) + "\n")


# Commands that show


def list_headers(reader: MailReader, rest: str) -> None:
    """lists the screen of headers with that message"""
    if not reader.messages:
        return
    number = reader.numbers(rest)[0] if rest else max(1, reader.dot)
    screen = screen_size(reader)
    start = (number - 1) // screen * screen
    if rest:
        reader.dot = start + 1
    show_screen(reader, start)


def scroll(reader: MailReader, rest: str) -> None:
    """z, z-, z+2: another screen of headers"""
    screen = screen_size(reader)
    count = len(reader.messages)
    here, last = (max(1, reader.dot) - 1) // screen, max(0, count - 1) // screen
    sign, value = (rest[:1], rest[1:]) if rest[:1] in tuple("+-") else ("", rest)
    if value == "$":
        there = last
    elif value and not (value.isascii() and value.isdigit()):
        raise ValueError(f'"{rest}": unrecognized scrolling command')
    else:
        steps = int(value[:9]) if value else 1
        there = here - steps if sign == "-" else here + steps
        there = steps if value and not sign else there
    if there > last:
        reader.terminal.say("On last screenful of messages\n")
    if there < 0:
        reader.terminal.say("On first screenful of messages\n")
    there = max(0, min(there, last))
    if there != here:
        reader.dot, reader.was_printed = there * screen + 1, False
    show_screen(reader, there * screen)


def list_from(reader: MailReader, rest: str) -> None:
    """lists the headers of messages"""
    numbers = reader.numbers(rest)
    for number in numbers:
        reader.terminal.say(reader.painted(number) + "\n")
    reader.dot = numbers[-1]


def show(reader: MailReader, rest: str, has_all: bool = False) -> None:
    """prints messages"""
    for number in reader.numbers(rest):
        message = reader.messages[number - 1]
        from_line, _ = reader.read(number)
        head, _, body = reader.message_text(number, has_all).partition("\n\n")
        message.was_read = True
        status = message.next_status() if message.status else "R"
        first = f"Message {number:2}:\n{terminal_text(os_text(from_line))}\n"
        text = f"{first}{head}\nStatus: {status}\n\n{body}"
        reader.page(text)
        reader.dot, reader.was_printed = number, True


def print_next(reader: MailReader, rest: str) -> None:
    """prints the next message, or the first of the list"""
    if rest:
        return show(reader, str(reader.numbers(rest)[0]))
    number = reader.dot
    if reader.was_printed or number and reader.is_gone(number):
        number += 1
        while number <= len(reader.messages) and reader.is_gone(number):
            number += 1
    if not 0 < number <= len(reader.messages):
        raise ValueError("At EOF")
    return show(reader, str(number))


def print_at(reader: MailReader, rest: str, step: int, why: str) -> None:
    """Prints the message so many undeleted ones away. Raises ValueError."""
    left = int(rest) if rest.isascii() and rest.isdigit() else 1
    number, last = reader.dot, len(reader.messages)
    while left and 0 <= number <= last:
        number += step
        left -= 0 < number <= last and not reader.is_gone(number)
    if not 0 < number <= last:
        raise ValueError(why)
    show(reader, str(number))


def print_previous(reader: MailReader, rest: str) -> None:
    """prints a message before: -, -2"""
    print_at(reader, rest, -1, "Referencing before 1")


def print_following(reader: MailReader, rest: str) -> None:
    """prints a message behind: +, +2"""
    print_at(reader, rest, 1, "Referencing beyond EOF")


def show_all(reader: MailReader, rest: str) -> None:
    """prints messages with all of their header"""
    show(reader, rest, True)


def show_raw(reader: MailReader, rest: str) -> None:
    """prints messages as they are in the folder"""
    for number in reader.numbers(rest):
        text = reader.raw_text([number]).decode("utf-8", "replace")
        reader.terminal.say(terminal_text(text))
        reader.messages[number - 1].was_read = True
        reader.dot, reader.was_printed = number, True


def show_top(reader: MailReader, rest: str) -> None:
    """prints the first lines of messages (toplines)"""
    for number in reader.numbers(rest):
        lines = reader.raw_text([number]).decode("utf-8", "replace").split("\n")
        count = reader.variables.number("toplines", 5)
        text = "\n".join(lines[: count + 1])
        reader.terminal.say(f"Message {number:2}:\n{terminal_text(text)}\n")
        reader.messages[number - 1].was_read = True
        reader.dot, reader.was_printed = number, True


def show_size(reader: MailReader, rest: str) -> None:
    """says how many lines and bytes messages have"""
    for number in reader.numbers(rest):
        message = reader.messages[number - 1]
        size = message.end - message.start
        reader.terminal.say(f"{number}: {reader.folder.lines(message)}/{size}\n")


def show_number(reader: MailReader, rest: str) -> None:
    """says which message is the current one"""
    reader.terminal.say(f"{reader.numbers(rest)[0] if rest else reader.dot}\n")


def show_parts(reader: MailReader, rest: str) -> None:
    """lists the parts of messages; w LIST.PART FILE writes one"""
    for number in reader.numbers(rest):
        for part in mail_parts(reader.read(number)[1]):
            reader.terminal.say(f"{number}.{part}\n")


def search(reader: MailReader, rest: str) -> None:
    """lists what has these words: from:x to:x subject:x body:x"""
    tests = [reader.search_of(word.lower()) for word in split_words(rest)]
    found = [n for n in reader.every() if not reader.is_gone(n)]
    found = [n for n in found if all(test(n) for test in tests)]
    if not found:
        raise ValueError("No applicable messages")
    for number in found:
        reader.terminal.say(reader.painted(number) + "\n")


def thread_subject(subject: str) -> str:
    """A subject without what answers put before it."""
    while subject[:3] in ("re:", "aw:", "fw:"):
        subject = subject[3:].strip()
    return subject


def date_of(reader: MailReader, number: int) -> tuple[float, int]:
    """When a message was written, by its Date; else where it stands."""
    from email.utils import mktime_tz, parsedate_tz  # only for sorting

    value = (reader.head(number)[1].values("date") or [""])[0]
    try:
        return float(mktime_tz(parsedate_tz(value))), number
    except (TypeError, ValueError, OverflowError):
        return float("inf"), number


def list_sorted(reader: MailReader, rest: str) -> None:
    """lists the headers by date, from, size or subject"""
    keys = {
        "date": lambda n: date_of(reader, n),
        "from": lambda n: reader.author(n).lower(),
        "size": lambda n: reader.messages[n - 1].end - reader.messages[n - 1].start,
        "subject": lambda n: thread_subject(reader.searched(n, "subject")),
    }
    if (rest or "date") not in keys:
        raise ValueError(f"{rest}: sort by {', '.join(keys)}")
    alive = [n for n in reader.every() if not reader.is_gone(n)]
    for number in sorted(alive, key=keys[rest or "date"]):
        reader.terminal.say(reader.painted(number) + "\n")


def thread_parents(reader: MailReader, numbers: list[int]) -> dict[int, int]:
    """Message -> the one that it answers, wherever that stands; 0 for none."""
    known: dict[str, int] = {}
    chains: dict[int, list[str]] = {}
    for number in numbers:
        header = reader.head(number)[1]
        chain = header.values("references") + header.values("in-reply-to")
        chains[number] = " ".join(chain).split()
        for name in header.values("message-id")[:1]:
            known.setdefault(name, number)
    parents: dict[int, int] = {}
    for number, chain in chains.items():
        found = [known[name] for name in chain if name in known]
        above = parent = found[-1] if found else 0
        while above and above != number:
            above = parents.get(above, 0)
        parents[number] = 0 if above else parent  # none that answers itself
    return parents


def list_threads(reader: MailReader, _: str) -> None:
    """lists the headers, answers below what they answer"""
    answers: dict[int, list[int]] = {0: []}
    alive = [n for n in reader.every() if not reader.is_gone(n)]
    for number, parent in thread_parents(reader, alive).items():
        answers.setdefault(parent, []).append(number)
    line = [(number, 0) for number in answers[0]]
    while line:
        number, depth = line.pop(0)
        mark = " " * min(depth, 8) + ("`-" if depth else "")
        reader.terminal.say(f"{mark}{reader.painted(number, len(mark))}\n")
        line[:0] = [(n, depth + 1) for n in answers.get(number, [])]


# Commands that change messages


def delete(reader: MailReader, rest: str) -> None:
    """deletes messages; u brings them back until q"""
    for number in reader.numbers(rest):
        reader.messages[number - 1].state = "deleted"
        reader.dot = number
    alive = [n for n in reader.every() if not reader.is_gone(n)]
    after = [number for number in alive if number > reader.dot]
    reader.dot = (after or alive[-1:] or [0])[0]
    reader.was_printed = False
    if reader.variables.has("autoprint") and reader.dot:
        show(reader, str(reader.dot))


def delete_and_print(reader: MailReader, rest: str) -> None:
    """deletes a message and prints the next"""
    last = max(reader.numbers(rest))
    delete(reader, rest)
    if reader.dot > last:
        show(reader, str(reader.dot))
    else:
        reader.terminal.say("At EOF\n")


def undelete(reader: MailReader, rest: str) -> None:
    """brings deleted messages back"""
    deleted = [n for n in reader.every() if reader.is_gone(n)]
    if not deleted:
        raise ValueError("No messages to undelete")
    if not rest:
        behind = [number for number in deleted if number >= reader.dot]
        rest = str((behind or deleted[-1:] or [0])[0])
    for number in reader.numbers(rest, True):
        message = reader.messages[number - 1]
        message.state, message.was_read = "", True
        reader.dot = number
    if reader.variables.has("autoprint"):
        show(reader, str(reader.dot))


def marker(state: str, **changes: object) -> object:
    """A command that only notes something about messages."""

    def command(reader: MailReader, rest: str) -> None:
        for number in reader.numbers(rest):
            message = reader.messages[number - 1]
            if state is not None:
                message.state = state
            for name, value in changes.items():
                setattr(message, name, value)
            reader.dot = number

    return command


def hold(reader: MailReader, rest: str) -> None:
    """keeps messages in the mailbox, whatever is done with them"""
    if not reader.is_system:
        raise ValueError('Cannot "preserve" in edit mode')
    marker("held")(reader, rest)


touch = marker(None, was_touched=True)
to_mbox = marker("mbox", was_touched=True)
seen = marker(None, was_read=True)


def unread(reader: MailReader, rest: str) -> None:
    """marks messages as not read"""
    for number in reader.numbers(rest):
        message = reader.messages[number - 1]
        message.was_read, message.status = False, "O"
        reader.dot = number


def flag_with(letter: str, is_on: bool) -> object:
    """A command that sets a letter of X-Status, or takes it away."""

    def command(reader: MailReader, rest: str) -> None:
        for number in reader.numbers(rest):
            message = reader.messages[number - 1]
            message.flags = message.flags.replace(letter, "") + letter * is_on

    return command


flag, unflag = flag_with("F", True), flag_with("F", False)
answered, unanswered = flag_with("A", True), flag_with("A", False)


def save(reader: MailReader, rest: str, state: str = "saved") -> None:
    """appends messages to a file: s [list] file; they leave at q"""
    words = split_words(rest)
    name = words[-1] if words else "&"
    numbers, path = reader.split_file(rest, "&")
    reader.append_to(path, reader.raw_text(numbers), 0o600, name)
    for number in numbers:
        message = reader.messages[number - 1]
        message.state = state or message.state
        message.was_read = True
        reader.dot = number


def copy(reader: MailReader, rest: str) -> None:
    """appends messages to a file, and keeps them"""
    save(reader, rest, "")


def author_name(reader: MailReader, rest: str) -> str:
    """The file that is named after the first message's author."""
    number = reader.numbers(rest)[0]
    from_line, header = reader.read(number)
    try:
        found = AddressScanner((header.values("from") or [""])[0]).scan()
    except MailError:
        found = []
    words = os_text(from_line).split()
    address = found[0] if found else words[1] if words[1:] else "unknown"
    name = safe_name(address.partition("@")[0]).lstrip("+%#&~|") or "unknown"
    is_below = reader.variables.has("outfolder") and reader.variables.get("folder")
    return f"{'+' if is_below else ''}{name}"


def author_file(reader: MailReader, rest: str) -> str:
    """`LIST FILE` of that file."""
    return f"{rest} {quoted_word(author_name(reader, rest))}"


def save_by_author(reader: MailReader, rest: str) -> None:
    """saves messages in a file named after the author"""
    save(reader, author_file(reader, rest))


def copy_by_author(reader: MailReader, rest: str) -> None:
    """copies messages to a file named after the author"""
    copy(reader, author_file(reader, rest))


def free_name(name: str) -> str:
    """`a-1.png` for `a.png`: a name that no file has yet."""
    stem, ending = os.path.splitext(name)
    number = 1
    while os.path.lexists(f"{stem}-{number}{ending}"):
        number += 1
    return f"{stem}-{number}{ending}"


def put_part(reader: MailReader, part: MailPart, name: str) -> None:
    """Writes an attachment, byte for byte, to a new file."""
    # The name that a message gives is one in this folder, and nothing more.
    path = name if name == part.name else reader.file_path(name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o666)
    except FileExistsError:
        raise ValueError(f"{name}: File exists") from None
    with open(fd, "wb") as file:
        file.write(part.data)


def offer_part(reader: MailReader, part: MailPart) -> None:
    """Asks where an attachment is to go, and writes it; never over a file."""
    prompt = f"Enter filename for part {part.number} ({terminal_text(part.kind)}): "
    name = reader.terminal.ask(prompt, part.name)
    if not name:
        return
    try:
        put_part(reader, part, name)
    except ValueError as error:
        free = free_name(name)
        reader.terminal.say(f"{terminal_text(f'{error}: written to {free}')}\n")
        put_part(reader, part, free)


def write_part(reader: MailReader, number: int, wanted: int, name: str) -> None:
    """w 4.2 file."""
    parts = mail_parts(reader.read(number)[1])
    if not 0 < wanted <= len(parts):
        raise ValueError(f"{number}.{wanted}: there is no such part")
    put_part(reader, parts[wanted - 1], name)
    reader.messages[number - 1].was_read = True


def write(reader: MailReader, rest: str) -> None:
    """writes the text of messages, and what is attached, to files"""
    if not split_words(rest):
        raise ValueError("No file specified")
    words = split_words(rest)
    place, dot, part = words[0].partition(".")
    if dot and part.isdigit() and place.isdigit() and len(words) > 1:
        return write_part(reader, reader.numbers(place)[0], int(part), words[-1])
    numbers, path = reader.split_file(rest)
    texts = [reader.read(number)[1] for number in numbers]
    for number, header in zip(numbers, texts):
        kind = " ".join(header.values("content-type")).lower()
        parts = mail_parts(header) if "multipart/" in kind else []
        for one in parts:
            if one.name:
                offer_part(reader, one)
        reader.messages[number - 1].was_read = True
    text = b"".join(map(written_text, texts))
    return reader.append_to(path, text, 0o666, words[-1])


def send_sheet(reader: MailReader, sheet: Sheet) -> None:
    """Has a letter written, and sends it."""
    composer = reader.composer()
    composer.ask_first(sheet)
    write_letter(composer, sheet)
    composer.send(sheet)


# Commands that send


def mail(reader: MailReader, rest: str) -> None:
    """writes a letter"""
    sheet = Sheet(split_addresses(rest))
    if not sheet.people["To"]:
        raise ValueError("You must specify direct recipients.")
    send_sheet(reader, sheet)


def quoted_text(reader: MailReader, number: int) -> bytes:
    """What an answer begins with: who wrote what, behind indentprefix."""
    _, header = reader.read(number)
    who = decoded((header.values("from") or ["somebody"])[0])
    prefix = reader.variables.get("indentprefix")
    lines = unquoted(own_text(header)).rstrip("\n").split("\n")
    text = f"{who} wrote:\n\n" + "".join(f"{prefix}{line}\n" for line in lines)
    return (text + "\n").encode("utf-8", "replace")


def answer(reader: MailReader, number: int, fields: list, record: str = "") -> None:
    """Writes an answer: its header is shown, the text may be quoted."""
    rows = dict(fields)
    sheet = Sheet(split_addresses(rows["To"]), rows["Subject"])
    sheet.record, sheet.is_answer = record, True
    sheet.people["Cc"] = split_addresses(rows.get("Cc", ""))
    sheet.more = [(n, rows[n]) for n in ("In-Reply-To", "References") if rows.get(n)]
    for name, value in (*fields[:1], ("Subject", rows["Subject"]), *fields[1:2]):
        if value and name != "References" and name != "In-Reply-To":
            reader.terminal.say(f"{name}: {terminal_text(value)}\n")
    reader.terminal.say("\n")
    if reader.variables.has("quote") and reader.terminal.is_interactive:
        sheet.text = quoted_text(reader, number)
    send_sheet(reader, sheet)
    if reader.variables.has("markanswered"):
        answered(reader, str(number))


def reply_to_all(reader: MailReader, rest: str, record: str = "") -> None:
    """Answers everybody."""
    number = reader.numbers(rest)[0]
    fields = reply_fields(reader.answered_header(number), reader)
    answer(reader, number, fields, record)


def reply_to_author(
    reader: MailReader, rest: str, is_flipped: bool = False, record: str = ""
) -> None:
    """answers the senders only"""
    if reader.variables.has("flipr") and not is_flipped:
        return reply_to_all(reader, rest, record)
    numbers = reader.numbers(rest)
    headers = [reader.answered_header(number) for number in numbers]
    people: list[str] = []
    for header in headers:
        name = "reply-to" if header.has("reply-to") else "from"
        people += others_in(header, reader, name) or [settings_address(reader.house)]
    rows = dict(reply_fields(headers[0], reader))
    rows.update({"To": ", ".join(dict.fromkeys(people)), "Cc": ""})
    return answer(reader, numbers[0], list(rows.items()), record)


def reply(reader: MailReader, rest: str, record: str = "") -> None:
    """answers the sender and all who got it"""
    words = rest.split()
    rest = " ".join(words[1:] if words[:1] == ["all"] else words)
    if reader.variables.has("flipr") or reader.variables.has("Replyall"):
        return reply_to_author(reader, rest, True, record)
    return reply_to_all(reader, rest, record)


def follow_up(reader: MailReader, rest: str) -> None:
    """as reply; the answer is kept in a file named after the author"""
    reply(reader, rest, author_name(reader, rest))


def follow_up_to_author(reader: MailReader, rest: str) -> None:
    """as Reply; the answer is kept in a file named after the author"""
    reply_to_author(reader, rest, record=author_name(reader, rest))


def forward(reader: MailReader, rest: str) -> None:
    """sends a message on in a letter: fwd [list] address"""
    words = split_words(rest)
    if not words:
        raise ValueError("No recipient specified")
    number = reader.numbers(" ".join(words[:-1]))[0]
    _, header = reader.read(number)
    subject = decoded(" ".join(header.values("subject")[:1]))
    sheet = Sheet(split_addresses(words[-1]), f"Fwd: {subject}")
    head = reader.message_text(number).partition("\n\n")[0]
    text = f"-------- Original Message --------\n{head}\n\n{unquoted(own_text(header))}"
    sheet.text = text.encode("utf-8", "replace")
    parts = [] if is_plain(header) else mail_parts(header)
    sheet.enclosed = [message_bytes(part.part) for part in parts if part.name]
    send_sheet(reader, sheet)


def resend(reader: MailReader, rest: str) -> None:
    """sends messages on as they are: resend [list] address"""
    words = split_words(rest)
    if not words:
        raise ValueError("No recipient specified")
    house = reader.house
    for number in reader.numbers(" ".join(words[:-1])):
        _, header = reader.read(number)
        header = header.without("status", "x-status", "return-path", "x-original-to")
        people = reader.variables.expand(split_addresses(words[-1]))
        found = [one for text in people for one in header_addresses(text)]
        found = [one.qualified(house.settings.local_origin) for one in found]
        sender = Address.parse(settings_address(house))
        text = os_bytes(unquoted(os_text(header.rest)))
        text = text[:-1] if text.endswith(b"\n\n") else text  # the mailbox's own
        fields = [
            ("Resent-From", str(sender)),
            ("Resent-To", ", ".join(map(str, found))),
        ]
        head = Header([])
        for name, value in fields:
            head = head.added(name, value)
        head = Header([*head.fields, *header.fields], b"")
        origin = message_origin(house.settings, house.user, str(sender))
        head = complete_header(head, origin)
        reader.composer().dispatch(Letter(sender, found, head, [text]))


def pipe(reader: MailReader, rest: str) -> None:
    """puts messages through a command: | [list] command"""
    words = split_words(rest)
    command = words[-1] if words else reader.variables.get("cmd")
    if not command:
        raise ValueError("variable cmd not set")
    numbers = reader.numbers(" ".join(words[:-1]))
    reader.terminal.say(f'Pipe to: "{terminal_text(command)}"\n')
    end = b"\f" if reader.variables.has("page") else b""
    run_shell(command, b"".join(reader.raw_text([n]) + end for n in numbers))
    for number in numbers:
        reader.messages[number - 1].was_read = True
        reader.dot = number


def edit_with(name: str, usual: str) -> object:
    """A command that shows messages in an editor; the mailbox stays."""

    def command(reader: MailReader, rest: str) -> None:
        for number in reader.numbers(rest):
            text = reader.raw_text([number])
            edit_text(reader.variables.get(name, usual), text)
            reader.messages[number - 1].was_read = True
            reader.dot = number

    return command


edit, visual = edit_with("EDITOR", "ed"), edit_with("VISUAL", "vi")


# Commands of the session


def shell(reader: MailReader, rest: str) -> None:
    """runs a command, or a shell"""
    reader.terminal.run(rest, reader.variables)
    if rest:
        reader.terminal.say("!\n")


def change_folder(reader: MailReader, rest: str) -> None:
    """cd: goes to another directory"""
    os.chdir(reader.file_path(rest) if rest else reader.house.user.home)


def echo(reader: MailReader, rest: str) -> None:
    """prints its words"""
    words = [os.path.expandvars(word) for word in split_words(rest)]
    reader.terminal.say(terminal_text(" ".join(words)) + "\n")


def set_variables(reader: MailReader, rest: str) -> None:
    """set [name[=value] ...] sets variables, or lists them"""
    words = split_words(rest)
    if not words:
        rows = sorted(reader.variables.values.items())
        text = "".join(f'{n}="{v}"\n' if v else f"{n}\n" for n, v in rows)
        reader.terminal.say(terminal_text(text))
    for word in words:
        reader.variables.set(word)


def unset_variables(reader: MailReader, rest: str) -> None:
    """unset name ..."""
    for name in split_words(rest):
        known = VARIABLE_NAMES.get(name, name)
        if known in reader.variables.values:
            del reader.variables.values[known]
        elif reader.is_ready:  # in a start-up file it is as it is wanted
            reader.tell(f'"{name}": undefined variable')


def alias(reader: MailReader, rest: str) -> None:
    """alias [name [address ...]] names a group, or shows it"""
    words, known = split_words(rest), reader.variables.aliases
    if len(words) > 1:
        known.setdefault(words[0], []).extend(split_addresses(" ".join(words[1:])))
        return
    for name in words or sorted(known):
        if name not in known:
            raise ValueError(f'"{name}": no such alias')
        reader.terminal.say(terminal_text(f"{name}\t{' '.join(known[name])}\n"))


def unalias(reader: MailReader, rest: str) -> None:
    """forgets groups"""
    for name in split_words(rest):
        if reader.variables.aliases.pop(name, None) is None:
            raise ValueError(f'"{name}": no such alias')


def alternates(reader: MailReader, rest: str) -> None:
    """other names of yours, which replies leave out"""
    words = split_words(rest)
    if words:
        reader.variables.alternates = words
    else:
        reader.terminal.say(terminal_text(" ".join(reader.variables.alternates)) + "\n")


def field_command(name: str) -> object:
    """A command that adds to a set of field names, or lists it."""

    def command(reader: MailReader, rest: str) -> None:
        known = getattr(reader.variables, name)
        words = [word.lower() for word in split_words(rest)]
        known.update(words)
        if not words:
            shown = " ".join(sorted(known)) or f"No fields currently being {name}"
            reader.terminal.say(terminal_text(shown) + "\n")

    return command


ignore, retain = field_command("ignored"), field_command("retained")


def source(reader: MailReader, rest: str) -> None:
    """does the commands in a file"""
    reader.source(reader.file_path("".join(split_words(rest)[:1])))


def begin_if(reader: MailReader, rest: str) -> None:
    """if r|s|t: lines for who reads, who sends, who has a terminal"""
    known = {"r": reader.is_reading, "s": not reader.is_reading}
    known["t"] = reader.terminal.is_interactive
    reader.wants.append(known.get(rest[:1].lower(), False))


def turn_if(reader: MailReader, _: str) -> None:
    """else: the other lines of if"""
    if not reader.wants:
        raise ValueError('"else" without matching "if"')
    reader.wants[-1] = not reader.wants[-1]


def end_if(reader: MailReader, _: str) -> None:
    """endif: the end of if"""
    if not reader.wants:
        raise ValueError('"endif" without matching "if"')
    reader.wants.pop()


def drop_if_empty(reader: MailReader) -> None:
    """Removes a mailbox that is empty now, unless `keep` is set."""
    if reader.variables.has("keep") or reader.folder.is_read_only:
        return
    try:
        if reader.folder.remove_if_empty():
            reader.terminal.say(f'"{reader.shown_path()}" removed\n')
    except OSError:
        return  # a directory that only root may change: it stays, empty


def settle_folder(reader: MailReader) -> None:
    """The same for any other folder: only what is deleted leaves it."""
    folder = reader.folder
    for message in reader.messages:
        if message.state != "deleted":
            message.state = ""
    is_changed = folder.first_change() < folder.size
    folder.write()
    if is_changed:
        reader.terminal.say(f'"{reader.shown_path()}" updated.\n')
    drop_if_empty(reader)


def move_to_mbox(reader: MailReader, moved: list[FolderMessage]) -> None:
    """Appends messages to mbox, durably."""
    texts = [reader.folder.rewritten(message) for message in moved]
    path = reader.mbox_path()
    put = append_mail if reader.variables.has("append") else prepend_mail
    put(path, b"".join(text.rstrip(b"\n") + b"\n\n" for text in texts))
    name = terminal_text(os.path.basename(path))
    reader.terminal.say(f"Saved {counted(len(moved))} in {name}\n")


def is_kept_saved(message: FolderMessage, variables: Variables) -> bool:
    """Whether a message stays although it was saved."""
    return message.state == "saved" and variables.has("keepsave")


def is_for_mbox(message: FolderMessage, variables: Variables) -> bool:
    """Whether a message goes to mbox: asked for, or read without hold."""
    if message.state == "mbox":
        return True
    if variables.has("hold") or message.state in ("deleted", "held"):
        return False
    if message.state == "saved" and not variables.has("keepsave"):
        return False
    return message.was_read or message.was_touched


def settle(reader: MailReader) -> None:
    """Does with each message what the session decided; POSIX's rules.

    What goes to mbox is there, durably, before it leaves the mailbox.
    """
    if reader.folder.is_read_only:
        return
    if not reader.is_system:
        settle_folder(reader)
        return
    variables = reader.variables
    moved = [one for one in reader.messages if is_for_mbox(one, variables)]
    if moved:
        reader.folder.check_unchanged()  # or it would go there at each try
        move_to_mbox(reader, moved)
    for message in reader.messages:
        if message.state == "held" or is_kept_saved(message, variables):
            message.state = ""
    for message in moved:
        message.state = "mbox"
    kept = reader.folder.write()
    if kept:
        reader.terminal.say(f"Held {counted(kept)} in {reader.shown_path()}\n")
    drop_if_empty(reader)


def enter_folder(reader: MailReader, rest: str) -> None:
    """goes to another folder: + name, % user, # the one before, & mbox"""
    names = split_words(rest)
    if not names:
        reader.terminal.say(reader.banner() + "\n")
        return
    path = reader.path_of(names[0])
    folder = open_folder(path, reader.house.user.home)
    before = reader.folder.path
    settle(reader)
    if folder.path == before:  # it was written meanwhile
        folder = open_folder(path, reader.house.user.home)
    reader.previous, reader.is_system = before, folder.path == reader.own_path
    reader.enter(folder)
    reader.terminal.say(reader.banner() + "\n")


def folder_names(reader: MailReader) -> list[str]:
    """The folders below `folder`; none where that is not set."""
    if not reader.variables.get("folder"):
        return []
    try:
        return sorted(os.listdir(reader.file_path("+")))
    except OSError:
        return []


def list_folders(reader: MailReader, _: str) -> None:
    """lists the folders below `folder`, by the program LISTER if it is set"""
    if not reader.variables.get("folder"):
        raise ValueError('No value set for "folder"')
    if reader.variables.get("LISTER"):
        import shlex

        path = shlex.quote(reader.file_path("+"))
        run_shell(f"{reader.variables.get('LISTER')} {path}")
        return
    for name in folder_names(reader):
        reader.terminal.say(terminal_text(name) + "\n")


def take_news(reader: MailReader, _: str) -> None:
    """takes in mail that came meanwhile"""
    count = reader.folder.take_new()
    text = f"Loaded {counted(count, 'new message')}" if count else "No new mail."
    reader.terminal.say(text + "\n")


def command_names(reader: MailReader) -> list[str]:
    """The names of all commands, short ones too."""
    return [name for words, _, _ in reader.commands for name in words.split()]


def list_commands(reader: MailReader, _: str) -> None:
    """lists the names of the commands"""
    import textwrap

    text = ", ".join(command_names(reader))
    rows = textwrap.wrap(text, reader.terminal.width - 1, break_on_hyphens=False)
    reader.terminal.say("Commands are:\n" + "\n".join(rows) + "\n")


def say_version(reader: MailReader, _: str) -> None:
    """says which program this is"""
    reader.terminal.say(f"minimta mail {__version__}\n")


def comment(_: MailReader, __: str) -> None:
    """a remark"""


def give_help(reader: MailReader, rest: str) -> None:
    """this list; ? NAME tells of one command"""
    import textwrap

    wanted = reader.find_command(rest) if rest else None
    if rest and not wanted:
        raise ValueError(f'Unknown command: "{rest}"')
    width, rows = max(40, reader.terminal.width - 1), []
    for names, command, summary in reader.commands:
        if wanted in (None, command):
            text = f"{names:23} {summary}"
            rows += textwrap.wrap(text, width, subsequent_indent=" " * 24)
    reader.page("\n".join(rows) + "\n")


def leave(reader: MailReader, _: str) -> None:
    """leaves; the mailbox stays as it was"""
    reader.is_over = True


def quit_session(reader: MailReader, _: str) -> None:
    """leaves; what is deleted or saved is gone from the mailbox"""
    settle(reader)
    reader.is_over = True


# Commands whose last word is a file.
TAKES_FILE = frozenset((copy, enter_folder, save, source, write))


def fitting_names(reader: MailReader, before: str, word: str) -> list[str]:
    """What Tab offers for a word: commands, files and folders, or people."""
    import glob

    command = reader.find_command(split_command(before)[0])
    if not before.strip():
        return command_names(reader)
    if command not in TAKES_FILE:
        return [*reader.variables.aliases]
    found = [quoted_word(f"+{name}") for name in folder_names(reader)]
    places = glob.glob(glob.escape(os.path.expanduser(word)) + "*")
    if word.startswith("~"):
        home = reader.house.user.home
        places = [place.replace(home, "~", 1) for place in places]
    slashes = ["/" * os.path.isdir(os.path.expanduser(place)) for place in places]
    files = [quoted_word(place + slash) for place, slash in zip(places, slashes)]
    return sorted(found + files)


def take_command(reader: MailReader) -> None:
    """One prompt and one command."""
    reader.look_for_mail()

    def names(before: str, word: str) -> list[str]:
        return fitting_names(reader, before, word)

    line = reader.terminal.read_command(reader.variables.get("prompt"), names)
    is_person = reader.terminal.is_interactive
    if line is not None and reader.is_overtaken():
        return  # its numbers may mean others now
    if line is not None:
        reader.obey(os_text(line))
    elif is_person and reader.variables.has("ignoreeof"):
        reader.terminal.say('Use "quit" to quit.\n')
    else:
        reader.terminal.say("\n" * is_person)
        quit_session(reader, "")


def run_session(reader: MailReader) -> int:
    """The session. The exit code."""
    say, variables = reader.terminal.say, reader.variables
    if variables.has("header"):
        if not variables.has("quiet"):
            say(f"minimta mail {__version__}.  Type ? for help.\n")
        say(f"{reader.banner()}\n")
        list_headers(reader, "")
    while not reader.is_over:
        try:
            take_command(reader)
        except KeyboardInterrupt:
            reader.terminal.buffer = b""
            say("\n")
    return EX_OK


# Abbreviation and name, what does it, what ? says of it. Of what begins alike,
# the first is meant.
MAIL_COMMANDS = (
    ("n next", print_next, "prints the next message, or the first of the list"),
    ("p t print type more page", show, "prints messages"),
    ("P T Print Type More Page", show_all, "prints messages with all of their header"),
    ("h headers", list_headers, "lists the screen of headers with that message"),
    ("z", scroll, "z, z-, z+2: another screen of headers"),
    ("f from", list_from, "lists the headers of messages"),
    ("d delete", delete, "deletes messages; u brings them back until q"),
    ("dp dt", delete_and_print, "deletes a message and prints the next"),
    ("u undelete", undelete, "brings deleted messages back"),
    ("r reply respond replyall", reply, "answers the sender and all who got it"),
    ("R Reply Respond replysender", reply_to_author, "answers the senders only"),
    ("m mail", mail, "writes a letter"),
    ("fo followup", follow_up, "as reply; kept in a file named after the author"),
    ("F Followup", follow_up_to_author, "as Reply; kept in such a file"),
    ("fwd forward", forward, "sends a message on in a letter: fwd [list] address"),
    (
        "resend Resend redirect bounce",
        resend,
        "sends messages on as they are: resend [list] address",
    ),
    ("s save move", save, "appends messages to a file: s [list] file; they leave at q"),
    ("S Save", save_by_author, "saves messages in a file named after the author"),
    ("c copy", copy, "appends messages to a file, and keeps them"),
    ("C Copy", copy_by_author, "copies messages to a file named after the author"),
    ("w write", write, "writes the text of messages, and what is attached, to files"),
    (
        "parts attachments",
        show_parts,
        "lists the parts of messages; w LIST.PART FILE writes one",
    ),
    (
        "q quit",
        quit_session,
        "leaves; what is deleted or saved is gone from the mailbox",
    ),
    ("x ex exit xit", leave, "leaves; the mailbox stays as it was"),
    ("+", print_following, "prints a message behind: +, +2"),
    ("-", print_previous, "prints a message before: -, -2"),
    ("=", show_number, "says which message is the current one"),
    ("to top", show_top, "prints the first lines of messages (toplines)"),
    ("si size", show_size, "says how many lines and bytes messages have"),
    ("show", show_raw, "prints messages as they are in the folder"),
    ("search", search, "lists what has these words: from:x to:x subject:x body:x"),
    ("sort", list_sorted, "lists the headers by date, from, size or subject"),
    ("thread", list_threads, "lists the headers, answers below what they answer"),
    (
        "ho hold pre preserve",
        hold,
        "keeps messages in the mailbox, whatever is done with them",
    ),
    ("mb mbox", to_mbox, "moves messages to mbox when you quit"),
    ("tou touch", touch, "marks messages for mbox, as if they were read"),
    ("U new unread", unread, "marks messages as not read"),
    ("seen", seen, "marks messages as read"),
    ("flag", flag, "flags messages"),
    ("unflag", unflag, "takes the flag away"),
    ("answered", answered, "marks messages as answered"),
    ("unanswered", unanswered, "marks them as not answered"),
    ("| pi pipe", pipe, "puts messages through a command: | [list] command"),
    ("e edit", edit, "shows messages in the editor EDITOR"),
    ("v visual", visual, "shows messages in the editor VISUAL"),
    ("! sh shell", shell, "runs a command, or a shell"),
    (
        "fi fold file folder",
        enter_folder,
        "goes to another folder: + name, % user, # the one before, & mbox",
    ),
    ("folders", list_folders, "lists the folders below `folder`"),
    ("inc newmail", take_news, "takes in mail that came meanwhile"),
    ("a g alias group", alias, "alias [name [address ...]] names a group, or shows it"),
    ("una unalias", unalias, "forgets groups"),
    ("alt alternates", alternates, "other names of yours, which replies leave out"),
    ("di ig discard ignore", ignore, "fields of the header that are not printed"),
    ("ret retain", retain, "the only fields that are printed"),
    ("se set", set_variables, "set [name[=value] ...] sets variables, or lists them"),
    ("uns unset", unset_variables, "unset name ..."),
    ("so source", source, "does the commands in a file"),
    ("i if", begin_if, "if r|s|t: lines for who reads, who sends, who has a terminal"),
    ("el else", turn_if, "else: the other lines of if"),
    ("en endif", end_if, "endif: the end of if"),
    ("ec echo", echo, "prints its words"),
    ("cd ch chdir", change_folder, "cd: goes to another directory"),
    ("l list", list_commands, "lists the names of the commands"),
    ("version", say_version, "says which program this is"),
    ("#", comment, "a remark"),
    ("? hel help", give_help, "this list"),
)
# What a start-up file may say.
START_COMMANDS = frozenset(
    (alias, alternates, begin_if, change_folder, comment, echo, end_if, ignore)
    + (retain, set_variables, source, turn_if, unalias, unset_variables)
)


# =============================================================================
# DOORS: the programs.
# =============================================================================

# == 34 Queue programs: cmd_queue, cmd_postsuper, exim_queue ... ==============
# Queue commands: our own, and those that fingers know from other systems.
# Failures: ProgramError and MailError, which main() turns into a line.

MAX_IDS = 1 << 24  # bytes of ids on standard input
WATCH_PATIENCE = 60  # seconds that -v waits for the first attempt
FIRST_PAUSE, WATCH_PAUSE = 0.01, 0.16  # seconds between its looks
NOBODY_READS = "the daemon is down, and only root may read the queue: start it"


def complain(name: str, text: str) -> None:
    """One line on standard error: NAME: what is wrong: what to do about it."""
    try:
        write_all(2, os_bytes(f"{name}: {printable(text)}\n"))
    except OSError:
        return  # nobody listens


def print_version() -> int:
    """--version."""
    write_all(1, os_bytes(f"minimta {__version__}\n"))
    return EX_OK


def read_flags(args: list[str], flags: str, words: list[str]) -> tuple[dict, list[str]]:
    """(option -> value, arguments) of a command line. Raises ProgramError."""
    import getopt  # small; argparse costs 10 ms

    try:
        pairs, rest = getopt.gnu_getopt(args, flags, words)
    except getopt.GetoptError as error:
        raise ProgramError(EX_USAGE, f"{error.msg}: see --help") from None
    return dict(pairs), rest


def config_option(name: str, args: list[str]) -> str:
    """The FILE of [-C FILE], all that some programs take."""
    if args[:1] == ["-C"] and len(args) == 2:
        return args[1]
    if args:
        raise ProgramError(
            EX_USAGE, f"unknown argument {printable(args[0])}: see --help"
        )
    return ""


def queue_entries(house: House) -> object:
    """Every message in the queue. Raises ProgramError EX_UNAVAILABLE."""
    if house.owns_queue():
        spool = house.spool()
        if os.path.isdir(spool.path("queue")):
            yield from spool.entries(spool.overview.lines())
        return
    daemon = SubmitSocket(house.settings.queue_directory)
    if not daemon.greet():
        raise ProgramError(EX_UNAVAILABLE, NOBODY_READS)
    yield from daemon.entries()
    daemon.close()


def queue_told(house: House, tell: object) -> object:
    """tell(entry) of every message in the queue, but None: Spool.told()."""
    if house.owns_queue():
        spool = house.spool()
        return spool.told(tell) if os.path.isdir(spool.path("queue")) else iter(())
    return filter(None, map(tell, queue_entries(house)))


def find_trace(house: House, key: str) -> Trace | None:
    """What happened to a message, as far as the caller may know."""
    if house.owns_queue():
        return History(house.spool()).trace(key, 0)
    daemon = SubmitSocket(house.settings.queue_directory)
    if not daemon.greet():
        raise ProgramError(EX_UNAVAILABLE, NOBODY_READS)
    try:
        return daemon.trace(key)
    finally:
        daemon.close()


def dialogue_time(rows: list[str]) -> float:
    """When a dialogue was over, as its rows say."""
    return next((float(row[6:]) for row in rows if row.startswith("when: ")), 0.0)


def tell(fds: tuple, text: str) -> None:
    """Text for whoever watches; the mail is safe, whether they can or not."""
    for fd in fds:
        try:
            write_all(fd, os_bytes(text))
        except OSError:
            continue


def watch_delivery(
    house: House, queue_id: str, delivery: str, fds: tuple, since: float = 0.0
) -> None:
    """-v: what is said to other hosts as it happens, and what came of it.

    Until each recipient was tried `since` then, or for a minute; it costs no
    mail.
    """
    give_up = time.monotonic() + WATCH_PATIENCE
    trace, told, pause = None, [], FIRST_PAUSE
    while delivery != "q" and time.monotonic() < give_up:
        try:
            trace = find_trace(house, queue_id) or trace
        except (ProgramError, MailError, OSError):
            return  # nobody is there to tell
        for rows in trace.dialogues if trace else ():
            if dialogue_time(rows) >= since and rows not in told:
                tell(fds, "".join(f"{row}\n" for row in trace.dialogue(rows)))
                told.append(rows)
        if trace and trace.is_settled(since):
            break
        time.sleep(pause)
        pause = min(2 * pause, WATCH_PAUSE)
    for attempt in trace.attempts if trace else ():
        if attempt.when >= since:
            outcome = f"{attempt.outcome} ({attempt.text})"
            tell(fds, f"<{attempt.recipient}>: {outcome}\n")


def watch_entries(house: House, entries: list[QueueEntry], since: float) -> None:
    """queue run -v: what comes of messages that are tried now."""
    for entry in entries:
        tell((1,), f"{entry.queue_id}:\n")
        watch_delivery(house, entry.queue_id, "b", (1,), since)


def flush_all(house: House) -> int:
    """Tries everything in the queue now. Raises ProgramError."""
    daemon = SubmitSocket(house.settings.queue_directory)
    if daemon.greet():
        daemon.flush()
        return EX_OK
    if not house.owns_queue():
        raise ProgramError(EX_UNAVAILABLE, "the daemon is down: root can run the queue")
    spool = house.spool()
    spool.make()
    if not run_queue(house, spool, True):
        raise ProgramError(EX_TEMPFAIL, "another minimta runs the queue already")
    return EX_OK


def read_all(fd: int) -> bytes:
    """All that a descriptor has to give, up to 16 MB."""
    data = b""
    for block in iter(lambda: os.read(fd, BLOCK), b""):
        data += block
        if len(data) > MAX_IDS:
            break
    return data


def read_selectors(words: list[str]) -> list[Selector]:
    """The selectors on a command line; `-` is ids on standard input.

    Raises ProgramError.
    """
    found = []
    for word in words:
        many = [word]
        if word == "-":
            many = list(filter(is_id, os_text(read_all(0)).split())) or ["!all"]
        try:
            found += [Selector(one) for one in many]
        except ValueError as error:
            why = f"{error}: see minimta.py queue --help"
            raise ProgramError(EX_USAGE, why) from None
    return found


def selected(house: House, selectors: list[Selector]) -> object:
    """The entries of the queue that are meant."""
    return filter(chooser(selectors, time.time()), queue_entries(house))


def none_matches(selectors: list, name: str = "queue") -> int:
    """Exit code 1, or a complaint where nothing was named."""
    if not selectors:
        why = "name messages: an id, to:..., from:..., or all"
        raise ProgramError(EX_USAGE, why)
    complain(name, "no such message: see mailq")
    return 1


def print_pieces(pieces: object) -> None:
    """Text on standard output, some pieces at a time."""
    import itertools

    for block in iter(lambda: "".join(itertools.islice(pieces, AHEAD)), ""):
        write_all(1, os_bytes(block))


def list_some(house: House, is_wanted: object, name: str, is_long: bool) -> int:
    """Messages as mailq shows them; 1 if there are none, though there were
    to be: with a name for the complaint.
    """

    def row(entry: QueueEntry) -> tuple[str, int] | None:
        return (entry.rows(is_long), entry.size) if is_wanted(entry) else None

    has_any, messages = peeked(queue_told(house, row))
    if name and not has_any:
        return none_matches(["chosen"], name)
    print_pieces(mailq_text(messages))
    return EX_OK


def list_entries(house: House, selectors: list[Selector], _: dict) -> int:
    """queue list: as mailq shows them."""
    name = "queue" if selectors else ""
    return list_some(house, chooser(selectors, time.time()), name, False)


def print_json(house: House, is_wanted: object) -> bool:
    """Messages as `postqueue -j` shows them; False if there are none."""
    import json  # 5 ms; only this needs it

    settings = house.settings

    def line(entry: QueueEntry) -> str:
        if not is_wanted(entry):
            return ""
        is_report = not entry.envelope.sender
        lifetime = settings.maximal_queue_lifetime
        if is_report:
            lifetime = settings.bounce_queue_lifetime
        expires = int(entry.envelope.arrived + lifetime)
        tree = {**entry.tree(), "expires": expires}
        text = json.dumps(tree, ensure_ascii=False)
        if not text.isprintable():  # what would drive a terminal is spelt
            text = json.dumps(tree)
        return f"{text}\n"

    has_any, lines = peeked(queue_told(house, line))
    print_pieces(lines)
    return has_any


def list_json(house: House, selectors: list[Selector], _: dict) -> int:
    """queue json: as `postqueue -j` shows them, an object a line."""
    has_any = print_json(house, chooser(selectors, time.time()))
    return EX_OK if has_any or not selectors else none_matches(selectors)


def count_entries(house: House, selectors: list[Selector], _: dict) -> int:
    """queue count: how many."""
    count = sum(1 for _ in queue_told(house, chooser(selectors, time.time())))
    write_all(1, os_bytes(f"{count}\n"))
    return EX_OK if count or not selectors else 1


def sum_entries(house: House, selectors: list[Selector], _: dict) -> int:
    """queue summary: by domain."""
    has_any, found = peeked(selected(house, selectors))
    if not has_any and selectors:
        return none_matches(selectors)
    write_all(1, os_bytes(summary_text(found, time.time())))
    return EX_OK


def open_queued(spool: Spool, queue_id: str) -> QueueFile:
    """A message in the queue or the maildrop. Raises OSError, ValueError."""
    try:
        return spool.find(queue_id)
    except FileNotFoundError:
        return Maildrop(spool.directory).take(queue_id, MAX_DROP)[1]


def show_text(house: House, queue_id: str, options: dict) -> None:
    """A message's header, its body, or the whole file. Raises ProgramError."""
    if not house.owns_queue():
        if {"--body", "--raw"} & set(options):
            why = "only root may read mail in the queue: ask root"
            raise ProgramError(EX_NOPERM, why)
        return
    try:
        with open_queued(house.spool(), queue_id) as file:
            header = bytes(file.header())
            if "--raw" in options:
                write_all(1, bytes(file.envelope))
            if "--body" not in options:
                write_all(1, header + b"\n")
            if {"--body", "--raw"} & set(options):
                left = len(header) + 1
                for chunk in file.chunks():
                    write_all(1, chunk[min(left, len(chunk)) :])
                    left = max(0, left - len(chunk))
    except FileNotFoundError:
        return  # delivered meanwhile


def show_entries(house: House, selectors: list[Selector], options: dict) -> int:
    """queue show: what is known of each, and its header, body, or file."""
    found = list(selected(house, selectors)) if selectors else []
    owns, hidden = house.owns_queue(), 0
    for entry in found:
        if not {"--body", "--raw"} & set(options):
            trace = find_trace(house, entry.queue_id)
            hidden += trace is None and not owns
            write_all(1, os_bytes(str(trace) if trace else ""))
        show_text(house, entry.queue_id, options)
    if hidden and hidden == len(found):
        why = f"{found[0].queue_id}: somebody else sent it: ask root"
        raise ProgramError(EX_NOPERM, why)
    return EX_OK if found else none_matches(selectors)


class QueueHand:
    """Does what queue commands want: by the daemon, or by ourselves.

    It speaks on standard error, as the program `name`; without a name on
    standard output. Raises ProgramError where neither may do it.
    """

    def __init__(self, house: House, name: str = "") -> None:
        self.house = house
        self.daemon = SubmitSocket(house.settings.queue_directory)
        self.spool: Spool | None = None
        if not self.daemon.greet():
            if not house.owns_queue():
                why = "the daemon is down, and only root may change the queue: start it"
                raise ProgramError(EX_UNAVAILABLE, why)
            self.spool = house.spool()
            take_in(house, self.spool)
        self.name = name
        self.counts: dict[str, int] = {}  # action -> messages it was done with
        self.is_forbidden = False  # whether somebody else's mail was meant

    def do(self, action: str, queue_id: str) -> None:
        """One action on one message. Raises MailError, OSError."""
        if self.spool:
            self.spool.act(action, queue_id)
            self.house.log.changed(queue_id, action, os.getuid())
        else:
            self.daemon.send(f"XDO {action} {queue_id}")
            self.daemon.expect(250)
        self.counts[action] = self.counts.get(action, 0) + 1

    def say(self, text: str) -> None:
        """One line, as the program that it works for would say it."""
        fd, head = (2, f"{self.name}: ") if self.name else (1, "")
        write_all(fd, os_bytes(f"{head}{text}\n"))

    def change(self, action: str, entries: list[QueueEntry], is_quiet: bool) -> None:
        """One action on each; who cannot be changed is named."""
        self.counts.setdefault(action, 0)
        for entry in entries:
            try:
                self.do(action, entry.queue_id)
            except (MailError, OSError) as error:
                self.is_forbidden |= getattr(error, "status", "") == "5.7.1"
                why = getattr(error, "text", None) or getattr(error, "strerror", error)
                complain(self.name or "queue", f"{entry.queue_id}: {why}")
                continue
            if not is_quiet:
                self.say(f"{entry.queue_id}: {ACTIONS[action][0]}")

    def finish(self) -> int:
        """What was done in all, and the attempts that follow; an exit code."""
        for action, count in self.counts.items():
            if count or not self.is_forbidden:
                self.say(f"{ACTIONS[action][1]}: {counted(count)}")
        self.run_due()
        if any(self.counts.values()):
            return EX_OK
        return EX_NOPERM if self.is_forbidden else 1

    def run_due(self) -> None:
        """Without a daemon we try what is due now."""
        if self.spool and any(map(self.counts.get, ("run", "bounce", "expire"))):
            run_queue(self.house, self.spool, False)


def can_be(action: str, entry: QueueEntry) -> bool:
    """Whether an action makes sense for a message as it is."""
    return (action, "hold" if entry.state == "hold" else "queue") not in OUT_OF_PLACE


def is_meant(action: str, count: int, options: dict) -> bool:
    """Asks, at a terminal, before a whole queue is removed."""
    is_grave = action in ("remove", "bounce", "expire")
    if not is_grave or "-y" in options or not os.isatty(0):
        return True
    write_all(2, os_bytes(f"{action} all {counted(count)}? [y/N] "))
    return os.read(0, 100).strip().lower() in (b"y", b"yes")


QUEUE_VIEWS = {
    "list": list_entries,
    "json": list_json,
    "count": count_entries,
    "summary": sum_entries,
    "show": show_entries,
}


def is_action(word: str) -> bool:
    """Whether a word is what to do with the queue, not a selector."""
    return word in QUEUE_VIEWS or word in ACTION_NAMES


def cmd_queue(args: list[str], environ: dict) -> int:
    """usage: minimta.py queue [-C FILE] [-v] [-y] [ACTION] [SELECTOR ...]

    list (as mailq), json, count, summary, show [--body] [--raw];
    run (try now; -v: shows what comes of it), hold, release, remove, requeue,
    bounce (return now), expire (the same, but what is on hold stays there).
    A selector is an id or its beginning, - (ids on standard input), all,
    held, deferred, active, to:PART, from:PART, host:DOMAIN, reason:REGEX,
    older:TIME, younger:TIME; ! negates; all of them must fit. Exit 1 if
    nothing does. Users may change the mail that they sent.
    """
    options, words = read_flags(args, "C:vy", ["body", "raw"])
    house = House(environ, options.get("-C", ""))
    action = words.pop(0) if words[:1] and is_action(words[0]) else "list"
    selectors = read_selectors(words)
    if action in QUEUE_VIEWS:
        return QUEUE_VIEWS[action](house, selectors, options)
    action = ACTION_NAMES[action]
    found = list(selected(house, selectors)) if selectors else []
    if not found:
        return none_matches(selectors)
    for one in selectors:
        alike = [entry for entry in found if entry.queue_id.startswith(one.value)]
        if one.kind == "id" and len(alike) > 1 and not is_id(one.value):
            why = f"{one.value}: {len(alike)} ids begin so: name the whole id"
            raise ProgramError(EX_USAGE, why)
    if not any(one.kind == "id" for one in selectors):
        found = [entry for entry in found if can_be(action, entry)]
    is_all = any(one.kind == "all" for one in selectors)
    if is_all and not is_meant(action, len(found), options):
        return EX_OK
    hand, since = QueueHand(house), time.time()
    found.sort(key=lambda entry: entry.queue_id)
    hand.change(action, found, False)
    code = hand.finish()
    if "-v" in options and action == "run":
        watch_entries(house, found, since)
    return code


def act_on_ids(hand: QueueHand, action: str, ids: list[str], states: list[str]) -> None:
    """The same as postsuper has it: ids, or ALL; unknown ones are none."""
    found = [e for e in queue_entries(hand.house) if not states or e.state in states]
    if "ALL" in ids:
        hand.change(action, [entry for entry in found if can_be(action, entry)], True)
    else:
        known = {entry.queue_id: entry for entry in found}
        hand.change(action, [known[name] for name in ids if name in known], False)


POSTFIX_QUEUES = ("hold", "incoming", "active", "deferred")
POSTSUPER = {
    "d": "remove",
    "h": "hold",
    "H": "release",
    "r": "requeue",
    "e": "expire",
    "f": "bounce",
}


def cmd_postsuper(args: list[str], environ: dict) -> int:
    """usage: postsuper [-d ID] [-h ID] [-H ID] [-r ID] [-e ID] [-f ID] [QUEUE]

    Removes, holds, releases, requeues, returns messages; ID may be ALL, or -
    for ids on standard input; QUEUE is hold, active, deferred, incoming. As
    Postfix's; see also minimta.py queue.
    """
    import getopt

    try:
        pairs, words = getopt.getopt(args, "c:C:d:h:H:r:e:f:psSv")
    except getopt.GetoptError as error:
        raise ProgramError(EX_USAGE, f"{error.msg}: see --help") from None
    house = House(environ, dict(pairs).get("-C", ""))
    if not house.owns_queue():
        why = "fatal: use of this command is reserved for the superuser"
        raise ProgramError(1, why)
    strange = [word for word in words if word not in POSTFIX_QUEUES]
    if strange:
        why = f"unknown queue {printable(strange[0], 60)}: see postsuper --help"
        raise ProgramError(EX_USAGE, why)
    orders = []  # all of them, before there is a connection that would wait
    for flag, value in pairs:
        if flag[1] in POSTSUPER:
            ids = [value]
            if value == "-":
                ids = list(filter(is_id, os_text(read_all(0)).split()))
            orders.append((POSTSUPER[flag[1]], ids))
    hand = QueueHand(house, "postsuper")
    for action, ids in orders:
        act_on_ids(hand, action, ids, words)
    hand.finish()
    return EX_OK


def run_entries(house: House, entries: list[QueueEntry]) -> int:
    """Tries some messages now, silently."""
    hand, forbidden = QueueHand(house), []
    for entry in entries:
        try:
            hand.do("run", entry.queue_id)
        except (MailError, OSError) as error:
            if getattr(error, "status", "") == "5.7.1":
                forbidden.append(entry.queue_id)
    if forbidden and not hand.counts:
        why = f"{forbidden[0]}: somebody else sent it: ask root"
        raise ProgramError(EX_NOPERM, why)
    if hand.spool and entries and not run_queue(house, hand.spool, False):
        raise ProgramError(EX_TEMPFAIL, "another minimta runs the queue already")
    return EX_OK


def cmd_postqueue(args: list[str], environ: dict) -> int:
    """usage: postqueue [-C FILE] -p | -j | -f | -i ID | -s DOMAIN

    Shows the queue, as text or JSON; tries all of it, a message, a domain's.
    """
    options, _ = read_flags(args, "c:C:fi:jps:v", [])
    house = House(environ, options.get("-C", ""))
    if "-f" in options:
        return flush_all(house)
    for flag, kind in (("-i", ""), ("-s", "host:")):
        if flag in options:
            value = options[flag]
            chosen = read_selectors([kind + value]) if kind or is_id(value) else []
            found = selected(house, chosen) if chosen else []
            return run_entries(house, [one for one in found if can_be("run", one)])
    view = "json" if "-j" in options else "list" if "-p" in options else ""
    if not view:
        raise ProgramError(EX_USAGE, "what is to be done: see postqueue --help")
    return QUEUE_VIEWS[view](house, [], options)


def print_parts(file: QueueFile, wanted: set[str]) -> None:
    """Envelope, header and body of a message, as far as they are wanted."""
    header = bytes(file.header())
    if "-e" in wanted:
        head = f"*** ENVELOPE RECORDS {file.queue_id} ***\n"
        write_all(1, os_bytes(head) + bytes(file.envelope).rstrip(b"\n") + b"\n")
        write_all(1, os_bytes(f"*** MESSAGE CONTENTS {file.queue_id} ***\n"))
    left = 0 if "-h" in wanted else len(header) + 1
    room = NO_LIMIT if "-b" in wanted else len(header)
    for chunk in file.chunks() if {"-h", "-b"} & wanted else ():
        part = chunk[min(left, len(chunk)) : max(0, room)]
        write_all(1, part)
        left, room = max(0, left - len(chunk)), room - len(chunk)
    if "-e" in wanted:
        write_all(1, os_bytes(f"*** MESSAGE FILE END {file.queue_id} ***\n"))


def cmd_postcat(args: list[str], environ: dict) -> int:
    """usage: postcat [-C FILE] [-q] [-e] [-h] [-b] ID ...

    Prints messages in the queue: envelope, header, body, or all of them.
    """
    options, words = read_flags(args, "c:C:bdefhnoqsv", [])
    spool = House(environ, options.get("-C", "")).spool()
    wanted = {flag for flag in options if flag in ("-e", "-h", "-b")} or None
    for name in words:
        try:
            if not is_id(name):
                raise FileNotFoundError(2, "No such file or directory")
            with open_queued(spool, name) as file:
                print_parts(file, wanted or {"-e", "-h", "-b"})
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            text = f"fatal: open queue file {printable(name, 60)}: {why}"
            raise ProgramError(1, text) from None
    if not words:
        raise ProgramError(EX_USAGE, "name a message: see postcat --help")
    return EX_OK


# exim's option -> (action, what it says of a message, and if that cannot be).
EXIM_ACTIONS = {
    "-M": ("run", "", ""),
    "-Mrm": ("remove", "has been removed", ""),
    "-Mf": ("hold", "is now frozen", "is already frozen"),
    "-Mt": ("release", "is no longer frozen", "is not frozen"),
    "-Mg": ("bounce", "", ""),
}
EXIM_VIEWS = {"-Mvh": {"-h"}, "-Mvb": {"-b"}, "-Mvc": {"-h", "-b"}}


def exim_row(entry: QueueEntry, now: float, is_open: bool = False) -> str:
    """A message as `exim -bp` shows it; -bpu: whom it is still for."""
    age, size = shown_age(now - entry.envelope.arrived), shown_size(entry.size)
    frozen = " *** frozen ***" if entry.state == "hold" else ""
    sender = printable(entry.envelope.sender)
    head = f"{age:>3} {size:>5} {entry.queue_id} <{sender}>{frozen}\n"
    rows = [
        f"        {'D' if name in entry.done else ' '} {printable(name)}\n"
        for name in (entry.pending if is_open else entry.envelope.recipients)
    ]
    return head + "".join(rows) + "\n"


def exim_list(house: House, word: str, ids: list[str]) -> int:
    """exim -bp, -bpc, -bpu, -bpi and their like: the queue, or some of it."""
    now = time.time()
    if word == "c":
        return count_entries(house, [], {})
    for entry in sorted(queue_entries(house), key=lambda entry: entry.queue_id):
        if ids and entry.queue_id not in ids:
            continue
        row = (
            f"{entry.queue_id}\n" if "i" in word else exim_row(entry, now, "u" in word)
        )
        write_all(1, os_bytes(row))
    return EX_OK


def check_ids(word: str, ids: list[str]) -> None:
    """Raises ProgramError, in exim's words, unless these are queue ids."""
    if not ids:
        raise ProgramError(EX_USAGE, f"no message ids given after {word} option")
    for name in ids:
        if not is_id(name):
            why = f"malformed message id {printable(name, 60)} after {word} option"
            raise ProgramError(1, why)


def thaw(hand: QueueHand, queue_id: str) -> None:
    """Releases a message, if it is on hold. Raises MailError, OSError."""
    try:
        hand.do("release", queue_id)
    except MailError as error:
        if error.status != "5.5.1":  # it is not on hold
            raise


def exim_act(house: House, word: str, ids: list[str]) -> int:
    """exim -Mrm and its like."""
    action, said, unfit = EXIM_ACTIONS[word]
    hand, code = QueueHand(house), EX_OK
    for name in ids:
        try:
            if word == "-M":
                thaw(hand, name)
            hand.do(action, name)
        except (MailError, OSError) as error:
            why = getattr(error, "text", None) or getattr(error, "strerror", "")
            if unfit and getattr(error, "status", "") == "5.5.1":
                complain("exim", f"Message {name} {unfit}")
            else:
                complain("exim", f"message {name}: {why}")
            code = 1
            continue
        if said:
            write_all(1, os_bytes(f"Message {name} {said}\n"))
    hand.run_due()
    return code


def cmd_trace(args: list[str], environ: dict) -> int:
    """usage: minimta.py trace [-C FILE] [--json] ID | MESSAGE-ID | --last

    Says what happened to a message: when it came and from whom, each attempt
    at each recipient, what was last said to each host, and the next attempt;
    for a while also when it is gone. A user sees the mail that the user sent.
    """
    options, words = read_flags(args, "C:", ["json", "last"])
    house = House(environ, options.get("-C", ""))
    if len(words) + ("--last" in options) != 1:
        raise ProgramError(EX_USAGE, "name one message: its id, or --last")
    key = words[0] if words else "last"
    if not key.isprintable() or " " in key:
        raise ProgramError(EX_USAGE, f"not an id: {printable(key, 100)}: see mailq")
    found = find_trace(house, key)
    if found is None:
        hint = "" if house.owns_queue() else ", or another user's"
        why = f"{printable(key, 100)}: no such message: it may be too long ago{hint}"
        raise ProgramError(EX_NOINPUT, why)
    text = str(found)
    if "--json" in options:
        import json  # 5 ms; only --json needs it

        text = json.dumps(found.tree()) + "\n"
    write_all(1, os_bytes(text))
    return EX_OK


def exim_queue(args: list[str], environ: dict) -> int:
    """What exim does with its queue. Raises ProgramError."""
    config, args = (args[1], args[2:]) if args[:1] == ["-C"] else ("", args)
    is_verbose, args = "-v" in args, [word for word in args if word != "-v"]
    if not args:
        raise ProgramError(EX_USAGE, "what is to be done: see exim --help")
    word, ids = args[0], args[1:]
    house, since = House(environ, config), time.time()
    settings = ["-C", config] if config else []
    if word == "-bV":
        return print_version()
    if word[:3] == "-bp":
        return exim_list(house, word[3:], ids)
    if word in EXIM_ACTIONS:
        check_ids(word, ids)
        code = exim_act(house, word, ids)
        for name in ids if is_verbose and word == "-M" else ():
            watch_delivery(house, name, "b", (1,), since)
        return code
    if word in EXIM_VIEWS:
        return cmd_postcat([*settings, *EXIM_VIEWS[word], *ids], environ)
    if word == "-Mvl":
        check_ids(word, ids)
        return max(cmd_trace([*settings, name], environ) for name in ids)
    if word[:2] != "-q":
        why = f"{printable(word, 60)} is no option of exim's queue: see exim --help"
        raise ProgramError(EX_USAGE, why)
    if word.startswith("-qff"):
        held = [one for one in queue_entries(house) if can_be("release", one)]
        hand = QueueHand(house)
        hand.change("release", held, True)
    return flush_all(house)


def cmd_qread(args: list[str], environ: dict) -> int:
    """usage: qmail-qread

    The queue in qmail's format.
    """
    house = House(environ)
    for entry in sorted(queue_entries(house), key=lambda entry: entry.queue_id):
        when = time.strftime(
            "%d %b %Y %H:%M:%S GMT", time.gmtime(entry.envelope.arrived)
        )
        sender = printable(entry.envelope.sender)
        text = f"{when}  #{entry.queue_id}  {entry.size}  <{sender}>\n"
        for name in entry.envelope.recipients:
            done = "  done" if name in entry.done else ""
            is_ours = house.settings.is_local(domain_of(name))
            way = "local" if is_ours else "remote"
            text += f"{done}\t{way}\t{printable(name)}\n"
        write_all(1, os_bytes(text))
    return EX_OK


def cmd_qstat(args: list[str], environ: dict) -> int:
    """usage: qmail-qstat

    How many messages are in the queue, in qmail's words.
    """
    count = sum(1 for _ in queue_told(House(environ), lambda entry: True))
    text = (
        f"messages in queue: {count}\nmessages in queue but not yet preprocessed: 0\n"
    )
    write_all(1, os_bytes(text))
    return EX_OK


# == 35 Programs: SendmailOptions, cmd_sendmail, cmd_mail, cmd_serve ... ======
# A program is a function from arguments to an exit code; its docstring is what
# --help prints.
# Failures: ProgramError and MailError, which main() turns into a line.

WATCH_QUEUE = 2  # seconds between the pictures of mailq --watch
# Names of sendmail -> the option that each stands for.
SENDMAIL_NAMES = {
    "runq": ["-q"],
    "smtpd": ["-bd"],
    "hoststat": ["-bh"],
    "purgestat": ["-bH"],
    "rmail": ["-i", "-oee", "-G"],
}


class SendmailOptions:
    """sendmail's command line: options in any order, recipients anywhere.

    OPTIONS has a row for every letter of any sendmail; those that mean nothing
    here are ignored. Raises ProgramError EX_USAGE for one that nobody had,
    and for those that would do something else than was asked for.
    """

    def __init__(self, args: list[str]) -> None:
        self.mode = "m"
        self.sender: str | None = None
        self.full_name = ""
        self.reads_header = False
        self.dot_ends = True
        self.is_verbose = False
        self.is_debugged = False
        self.delivery = "b"
        self.errors = "p"  # how they are told: -oem and its like
        self.config = ""
        self.alias_file = ""
        self.tag = ""  # that the log calls us
        self.transcript = ""
        self.notify = ""
        self.ret = ""
        self.envid = ""
        self.hops = 0
        self.is_gateway = False
        self.exim = ""  # -Mrm and its like
        self.chosen: list[tuple[str, str, bool]] = []  # -qI, -qR, -qS; negated
        self.recipients: list[str] = []
        self.read(list(args))

    @property
    def is_letter(self) -> bool:
        """Whether what was said is about a message."""
        return self.reads_header or self.sender is not None or bool(self.full_name)

    def read(self, args: list[str]) -> None:
        """Takes the arguments one by one."""
        while args:
            word = args.pop(0)
            if word == "--":
                self.recipients += args
                return
            if len(word) < 2 or word[0] != "-":
                self.recipients.append(word)
            else:
                self.read_letters(word[1:], args)

    def read_letters(self, letters: str, args: list[str]) -> None:
        """Takes a word of options, `-ti` or `-fADDR`, perhaps the next too."""
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter not in self.OPTIONS:
                text = f"illegal option -- {printable(letter)}: see --help"
                raise ProgramError(EX_USAGE, text)
            kind, take, *more = self.OPTIONS[letter]
            value = ""
            if kind:
                value, letters = self.argument(letter, kind, letters, args), ""
            take(self, value, *more)

    def argument(self, letter: str, kind: str, glued: str, args: list[str]) -> str:
        """What an option says: the rest of its word, or the next one."""
        is_mode = letter + glued == "e" and args[:1] and args[0] in tuple("mpqwe")
        if letter + glued == "oA" and not args:
            raise ProgramError(
                EX_USAGE, "option requires an argument -- oA: see --help"
            )
        if letter + glued == "oA" or is_mode:
            return glued + args.pop(0)
        if glued or kind == "?":
            return glued
        if not args:
            text = f"option requires an argument -- {letter}: see --help"
            raise ProgramError(EX_USAGE, text)
        return args.pop(0)

    def bad(self, letter: str, value: str) -> ProgramError:
        """The error for a value that makes no sense."""
        text = f"bad value for -{letter}: {printable(value, 60)}: see --help"
        return ProgramError(EX_USAGE, text)

    def ignore(self, value: str) -> None:
        """An option that means nothing here."""

    def refuse(self, _: str, hint: str) -> None:
        """An option that something else is there for. Raises ProgramError."""
        raise ProgramError(EX_USAGE, f"no such option here: {hint}")

    def keep(self, value: str, name: str) -> None:
        """An option whose value is what counts."""
        setattr(self, name, value)

    def turn(self, _: str, name: str, value: object) -> None:
        """An option that says it all by being there."""
        setattr(self, name, value)

    def take_body(self, value: str) -> None:
        """-B: what the message is made of, which we see."""
        if value.lower() not in ("7bit", "8bitmime"):
            raise self.bad("B", value)

    def take_notify(self, value: str) -> None:
        """-N: what is to be reported."""
        words = ",".join(dict.fromkeys(value.lower().replace(" ", "").split(",")))
        if not is_notify(words):
            raise self.bad("N", value)
        self.notify = words

    def take_ret(self, value: str) -> None:
        """-R: how much of the message comes back."""
        if value.lower() not in ("full", "hdrs", "headers"):
            raise self.bad("R", value)
        self.ret = value

    def take_envid(self, value: str) -> None:
        """-V: the envelope's id."""
        if not is_xtext(value, 100):
            raise self.bad("V", value)
        self.envid = value

    def take_hops(self, value: str) -> None:
        """-h: hops so far."""
        if not (value.isascii() and value.isdigit() and len(value) < 7):
            text = f"Bad hop count ({printable(value, 60)}): give a number"
            raise ProgramError(EX_USAGE, text)
        self.hops = int(value)

    def take_exim(self, value: str) -> None:
        """-M...: exim's commands for messages in the queue."""
        self.mode, self.exim = "M", f"-M{value}"
        if self.exim not in (*EXIM_ACTIONS, *EXIM_VIEWS, "-Mvl"):
            raise self.bad("M", value)

    def take_errors(self, value: str) -> None:
        """-e: how errors are told."""
        if value[:1] in tuple("mpqwe"):
            self.errors = value[0]

    def take_debug(self, value: str) -> None:
        """-d: as -v, and which program this is."""
        self.is_verbose = self.is_debugged = True

    def take_mode(self, value: str) -> None:
        """-bX: what to be."""
        if value == "q":
            self.delivery = "q"
        elif value in self.MODES:
            self.mode = self.MODES[value]
        else:
            text = f"Invalid operation mode {printable(value, 60)}: see --help"
            raise ProgramError(EX_USAGE, text)

    def take_option(self, value: str) -> None:
        """-oX: sendmail's options by letter."""
        letter, rest = value[:1], value[1:]
        if value in ("i", "itrue"):
            self.dot_ends = False
        elif letter == "d" and rest:
            self.delivery = {"i": "i", "f": "i", "q": "q", "d": "q"}.get(rest[0], "b")
        elif letter == "A":
            self.alias_file = rest
        elif letter == "e":
            self.take_errors(rest)

    def take_long_option(self, value: str) -> None:
        """-O Name=value: sendmail's options by name."""
        name, _, text = value.partition("=")
        short = {"deliverymode": "d", "ignoredots": "i", "aliasfile": "A"}
        letter = {**short, "errormode": "e"}.get(name.strip().lower())
        if letter == "i" and text.strip().lower()[:1] in ("t", "y", "1", ""):
            self.take_option("i")
        elif letter and letter != "i":
            self.take_option(letter + text.strip())

    def take_queue(self, value: str) -> None:
        """-q: run the queue, or some of it; with -bd the interval."""
        is_not, kind = value[:1] == "!", value.lstrip("!")[:1]
        if kind in tuple("IRS"):
            self.chosen.append((kind, value.lstrip("!")[1:], is_not))
        elif value and value not in ("f", "ff") and not self.is_time(value):
            raise self.bad("q", value)
        if self.mode not in ("d", "D", "l", "p"):
            self.mode = "q"

    def is_time(self, value: str) -> bool:
        """Whether a value is an interval, which is not needed here."""
        try:
            return read_amount(value, TIME_UNITS) >= 0
        except ValueError:
            return False

    # Letter of -bX -> what is done; a row of MODES in cmd_sendmail.
    MODES = {**{mode: mode for mode in "mspivtdDlVChHP"}, "pc": "P", "df": "D"}
    # Letter -> "" (no argument), ":" (glued or separate), "?" (glued or none);
    # what is done with it; what that needs to know.
    OPTIONS = {
        "A": (":", ignore),
        "B": (":", take_body),
        "C": (":", keep, "config"),
        "E": ("?", ignore),
        "F": (":", keep, "full_name"),
        "G": ("", turn, "is_gateway", True),
        "I": ("", turn, "mode", "i"),
        "J": ("?", ignore),
        "L": (":", keep, "tag"),
        "M": ("?", take_exim),
        "N": (":", take_notify),
        "O": (":", take_long_option),
        "Q": ("?", refuse, "minimta.py queue hold and release do that"),
        "R": (":", take_ret),
        "U": ("", ignore),
        "V": (":", take_envid),
        "X": (":", keep, "transcript"),
        "b": (":", take_mode),
        "c": ("", ignore),
        "d": ("?", take_debug),
        "e": ("?", take_errors),
        "f": (":", keep, "sender"),
        "h": (":", take_hops),
        "i": ("", turn, "dot_ends", False),
        "m": ("", ignore),
        "n": ("", ignore),
        "o": (":", take_option),
        "p": (":", ignore),
        "q": ("?", take_queue),
        "r": (":", keep, "sender"),
        "s": ("", ignore),
        "t": ("", turn, "reads_header", True),
        "v": ("", turn, "is_verbose", True),
        "x": ("", ignore),
    }


def read_sender(house: House, text: str | None) -> Address:
    """The sender that -f gives, or the caller's. Raises ProgramError."""
    origin = house.settings.myorigin
    if text is None:
        return Address(house.user.name, origin)
    try:
        found = (
            header_addresses(text) if text.strip() not in ("", "<>") else [Address("")]
        )
    except MailError as error:
        raise ProgramError(EX_DATAERR, f"-f: {error.text}") from None
    head = text.partition("@")[0].partition("<")[0]
    is_group = ":" in head and '"' not in head
    if len(found) != 1 or is_group or not text.isprintable():
        raise ProgramError(EX_DATAERR, f"-f: not an address: {printable(text, 100)}")
    return found[0].qualified(origin)


def read_recipients(house: House, words: list[str]) -> list[Address]:
    """The recipients on a command line. Raises ProgramError.

    They are addresses and nothing else: no |, no /file, no option.
    """
    found = []
    for word in words:
        if word.startswith("-") or not word.isprintable():
            raise ProgramError(
                EX_USAGE, f"not a recipient: {printable(word, 100)}: give an address"
            )
        if word.startswith(":"):  # :include:LIST is nobody, and no group
            found.append(Address(word))
            continue
        try:
            found += header_addresses(word.removeprefix("\\"))
        except MailError as error:
            raise ProgramError(EX_DATAERR, error.text) from None
    origin = house.settings.local_origin
    return [address.qualified(origin) for address in found if address.local]


def read_input(dot_ends: bool) -> object:
    """Standard input as message chunks (LF). Raises ProgramError."""
    reader = InputReader(dot_ends)
    while not reader.ended:
        try:
            data = os.read(0, BLOCK)
        except OSError as error:
            why = (
                f"standard input cannot be read: {error.strerror}: pipe the message in"
            )
            raise ProgramError(EX_NOINPUT, why) from None
        yield reader.feed(data)
        if not data:
            return


def read_header(chunks: object) -> Header:
    """The header at the start of `chunks`; `rest` was read beyond it."""
    block = take_head(chunks)
    if len(block) <= MAX_HEADER or b"\n\n" in block:
        return Header.parse(drop_from_lines(block))
    end = block.rfind(b"\n") + 1  # what is behind is half a line
    header = Header.parse(drop_from_lines(block[:end]))
    if not (header.fields or is_field(block.partition(b"\n")[0])):
        return Header([], block)  # no header at all
    if not header.rest:
        raise ProgramError(EX_DATAERR, "the header is over 1 MB: shorten it")
    return Header(header.fields, header.rest + block[end:])


def find_recipients(house: House, header: Header) -> tuple[list, list[str]]:
    """(the recipients that -t finds, what is wrong with the others)."""
    found, failures = [], []
    for value in recipient_fields(header):
        try:
            found += header_addresses(value)
        except MailError:
            for start, end in address_spans(value):
                try:
                    found += header_addresses(value[start:end])
                except MailError as error:
                    failures.append(error.text)
    strange = [address for address in found if address.local.startswith("-")]
    failures += [bad_address(str(one), "a leading hyphen").text for one in strange]
    found = [address for address in found if address not in strange]
    origin = house.settings.local_origin
    return [one.qualified(origin) for one in found if one.local], failures


def with_copy(chunks: object, kept: bytearray) -> object:
    """`chunks`, the beginning of which is also put into `kept`."""
    for chunk in chunks:
        kept += chunk[: max(0, BOUNCE_SIZE - len(kept))]
        yield chunk


def open_transcript(options: SendmailOptions) -> tuple:
    """The descriptors for -v and for -X FILE. Raises ProgramError."""
    path, fds = options.transcript, (2,) * options.is_verbose
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        return (*fds, os.open(path, flags, 0o600)) if path else fds
    except OSError as error:
        why = f"-X {path}: {error.strerror}: nothing was queued"
        raise ProgramError(EX_CANTCREAT, why) from None


def gateway_sender(house: House, text: bytes) -> Address | None:
    """The sender that rmail's From_ lines name, if they name one."""
    try:
        found = uucp_sender(text)
        return read_sender(house, found) if found else None
    except ProgramError:
        return None  # whatever it is, it is no address


UNSENT_TEXT = """\
From: Mail Delivery System <MAILER-DAEMON>
To: {name}
Subject: Returned mail: it was not sent
Auto-Submitted: auto-replied

This message was not taken for delivery:

    {why}

    --- what was to be sent ---

"""


MAX_DRAINED = 1 << 26  # bytes of a message that is refused, or more by its limit


def drain(house: House, chunks: object) -> None:
    """Reads what is left of a message that will not be taken."""
    left = max(house.settings.message_size_limit, MAX_DRAINED)
    try:
        while left > 0 and (chunk := next(chunks, None)):
            left -= len(chunk)
    except (ProgramError, OSError):
        return


def mail_error(house: House, why: str, kept: bytearray) -> bool:
    """Tells the caller by mail; whether that could be done."""
    name = Address(house.user.name, house.settings.myorigin)
    text = os_bytes(UNSENT_TEXT.format(name=name, why=printable(why, 400)))
    try:
        origin = message_origin(house.settings, house.user, "")
        header = complete_header(Header.parse(text), origin)
        Submission(house, "b").submit(Letter(Address(""), [name], header, [kept]))
    except (ProgramError, MailError, OSError):
        return False  # the exit code says it all
    return True


def read_letter(
    house: House, options: SendmailOptions, chunks: object, kept: bytearray
) -> Letter:
    """The message that `chunks` are, of which `kept` has the beginning.

    Raises ProgramError, MailError.
    """
    if not (options.recipients or options.reads_header):
        raise ProgramError(EX_USAGE, "no recipients: name them, or use -t")
    recipients = read_recipients(house, options.recipients)
    header = read_header(chunks)
    sender = read_sender(house, options.sender)
    if options.sender is None and options.is_gateway:
        sender = gateway_sender(house, bytes(kept)) or sender
    failures: list[str] = []
    if options.reads_header:
        found, failures = find_recipients(house, header)
        recipients += found
    unique: dict[str, Address] = {}
    for recipient in recipients:  # of a@b and A@B the first counts
        unique.setdefault(str(recipient).lower(), recipient)
    if failures and not unique:
        raise ProgramError(EX_DATAERR, failures[0])
    if not unique:
        why = "no recipients in the header or the arguments: name somebody"
        raise ProgramError(EX_USAGE, why)
    hops = options.hops + len(header.values("received"))
    if options.hops and hops > house.settings.hopcount_limit:
        raise ProgramError(EX_UNAVAILABLE, f"too many hops ({hops}): mail goes round")
    if options.is_gateway:  # another host has done that
        header = without_secrets(header)
    else:
        settings, user = house.settings, house.user
        origin = message_origin(settings, user, str(sender), options.full_name)
        header = complete_header(header, origin)
    letter = Letter(sender, list(unique.values()), header, chunks)
    letter.is_as_it_is = options.is_gateway
    letter.failures = failures
    letter.notify, letter.envid = options.notify.upper(), options.envid
    letter.ret = {"": "", "full": "FULL"}.get(options.ret.lower(), "HDRS")
    return letter


def is_mailed(
    house: House,
    options: SendmailOptions,
    error: ProgramError | MailError,
    chunks: object,
    kept: bytearray,
) -> bool:
    """What follows when a message is not taken; whether that ends well.

    -oem tells the caller by mail, too; -oee then exits as if it were sent.
    """
    is_for_good = not getattr(error, "is_temporary", error.code == EX_TEMPFAIL)
    wants_mail = options.errors in "em" and is_for_good
    if (wants_mail or isinstance(error, MailError)) and not os.isatty(0):
        drain(house, chunks)  # whoever writes it is not to be stopped half-way
    why = getattr(error, "text", str(error))
    is_told = wants_mail and mail_error(house, why, kept)
    return is_told and options.errors == "e"


def prospect(letter: Letter) -> str:
    """What follows from a recipient that there is not."""
    if not Wishes(letter.notify).want("FAILURE"):
        return "no report was asked for"
    return "it will be bounced" if letter.sender.local else "postmaster will be told"


def report_failures(house: House, letter: Letter, queue_id: str, kept: bytes) -> None:
    """Tells the sender of a message about those of -t that are no recipients.

    In the form of every report; `kept` is the message's beginning.
    """
    sender, now = str(letter.sender), time.time()
    events = []
    for text in letter.failures:
        name = text.partition("<")[2].partition(">: ")[0]
        why = text.rpartition(">: ")[2]
        events.append(Event(name, name, "failed", "5.1.3", "none", why, ""))
    about = {"queue_id": queue_id, "host": house.settings.myhostname}
    about["envelope"] = Submission(house).envelope(letter)
    about["message_id"] = "".join(letter.header.values("message-id")[:1])
    about["expires"] = now
    report = Report(FAILED, sender, events, about)
    is_whole = len(kept) < BOUNCE_SIZE
    copy = [bytes(letter.header)]
    copy += [b"\n", kept.partition(b"\n\n")[2]] if is_whole else []
    header = Header.parse(b"".join(report.chunks(f"{queue_id}B", now, is_whole, copy)))
    try:
        Submission(house).submit(Letter(Address(""), [letter.sender], header, []))
    except (ProgramError, MailError, OSError) as error:
        complain("sendmail", f"<{sender}> could not be told: {error}")


def send_stdin(options: SendmailOptions, environ: dict) -> int:
    """Submits the message on standard input."""
    house, kept = House(environ, options.config), bytearray()
    watchers = open_transcript(options)
    submission = Submission(house, options.delivery)
    chunks = with_copy(read_input(options.dot_ends), kept)
    try:
        letter = read_letter(house, options, chunks, kept)
        queue_id = submission.submit(letter)
    except (ProgramError, MailError) as error:
        if is_mailed(house, options, error, chunks, kept):
            return EX_OK
        raise
    for name, error in submission.refused.items():
        complain("sendmail", f"{name}: {reason(error)}: {prospect(letter)}")
    for text in letter.failures:
        complain("sendmail", f"{text}: nothing is sent there")
    if letter.failures and letter.sender.local:
        report_failures(house, letter, queue_id, bytes(kept))
    if watchers:
        tell(watchers, f"sendmail: queued as {queue_id}\n")
    if watchers or options.delivery == "i":
        watch_delivery(house, queue_id, options.delivery, watchers)
    return EX_OK


class Transcript:
    """What both sides of -bs say, in lines, for the file of -X."""

    def __init__(self, fds: tuple) -> None:
        self.fds = fds
        self.held = {"C": b"", "S": b""}

    def note(self, side: str, data: bytes) -> None:
        """Writes the lines that `data` ends; a very long one in pieces."""
        *lines, rest = (self.held[side] + data).split(b"\n")
        if len(rest) > BLOCK or not data:
            lines, rest = [*lines, *filter(None, [rest])], b""
        self.held[side] = rest
        shown = (os_text(line).rstrip("\r") for line in lines)
        tell(self.fds, "".join(f"{side}: {line}\n" for line in shown))


def pass_through(daemon: SubmitSocket, house: House, stream: PipeStream) -> None:
    """Carries bytes between the daemon and standard input and output."""
    import select

    greeting = f"220 {house.settings.myhostname} ESMTP minimta\r\n"
    stream.sendall(os_bytes(greeting) + daemon.buffer)
    ends = [0, daemon.socket.fileno()]
    while True:
        ready = select.select(ends, [], [])[0]
        if ends[-1] in ready:
            data = daemon.socket.recv(BLOCK)
            if not data:
                return
            stream.sendall(data)
        elif 0 in ready:
            data = stream.recv(BLOCK)
            if data:
                daemon.socket.sendall(data)
            else:
                daemon.socket.shutdown(1)  # SHUT_WR: what is owed still comes
                ends.remove(0)


def serve_stdin(options: SendmailOptions, environ: dict) -> int:
    """-bs: SMTP on standard input, by the daemon or by this process."""
    house = House(environ, options.config)
    daemon = SubmitSocket(house.settings.queue_directory)
    stream = PipeStream()
    if options.transcript:
        stream.note = Transcript(open_transcript(options)[-1:]).note
    if daemon.connect():
        pass_through(daemon, house, stream)
        return EX_TEMPFAIL if stream.has_failed else EX_OK
    owns = house.owns_queue()
    spool = house.spool() if owns else Maildrop(house.settings.queue_directory)
    if owns:
        spool.make()
    stored: list[str] = []
    desk = Desk(house.settings, spool, house.log, house.router(), stored.append)
    Conversation(desk, Client("local", True, os.getuid())).run(stream)
    if owns and stored and options.delivery != "q":
        run_queue(house, spool, False)
    return EX_TEMPFAIL if stream.has_failed else EX_OK


# What sendmail calls the ways that mail is handed over.
MAILERS = {
    "error": "error",
    "mailbox": "local",
    "maildir": "*file*",
    "lmtp": "lmtp",
    "remote": "esmtp",
    "pipe": "prog",
    "file": "*file*",
    "null": "*file*",
    "include": "*include*",
}


def routing_code(found: list[Destination]) -> int:
    """0 where mail arrives, 75 where it waits, 67 where it never does."""
    errors = [one.error for one in found if one.error]
    if any(not error.is_temporary for error in errors):
        return EX_NOUSER
    return EX_TEMPFAIL if errors else EX_OK


NO_HOST = {"5.1.2", "5.1.10", "5.4.4"}  # statuses that are about a host

MAX_COUNTED = 1 << 28  # bytes of a mailbox that are read to count its messages


def count_messages(path: str, user: User) -> str:
    """`12 messages`, where the mailbox may be read; else ""."""
    count, size, last = 0, 0, b"\n"
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with Rights(user), open(os.open(path, flags), "rb") as file:
            for block in iter(lambda: file.read(BLOCK), b""):
                text = last + block
                count, size = count + text.count(b"\nFrom "), size + len(block)
                last = text[-5:]
                if size > MAX_COUNTED:
                    return f"more than {count} messages"
    except FileNotFoundError:
        return "empty"
    except (OSError, MailError):
        return ""
    return counted(count)


def courier_problem(found: Destination) -> MailError | None:
    """What a mailbox or file is now that delivery would not touch."""
    boxes = {"mailbox": Mailbox, "file": FileBox}
    if found.kind not in boxes or os.geteuid() not in (0, found.user.uid):
        return None  # nothing to see, or not for us
    try:
        with Rights(found.user) as rights:
            boxes[found.kind](found.place, rights.owner).look()
    except MailError as error:
        return error
    return None


def verdict_line(found: Destination) -> str:
    """What -bv says of a destination: sendmail's words."""
    shown, text = found.target, f"deliverable: mailer {MAILERS[found.kind]}"
    if found.error:
        text = reason(found.error)
    elif found.kind in ("mailbox", "lmtp"):
        text += f", user {found.user.name}"
    elif found.kind != "remote":
        shown = f'"|{found.place}"' if found.kind == "pipe" else found.place
    return f"{shown}... {text}"


def explaining_router(house: House) -> Router:
    """A router that reads .forward and asks name servers."""
    router = house.router(TargetFiles(house.users))
    router.resolver = Resolver(house.settings.root)
    return router


def verify_recipients(options: SendmailOptions, environ: dict) -> int:
    """-bv: says of each recipient where it leads, in sendmail's words.

    0, 67 no such user, 68 no such host, 75 if that cannot be told now, or 78
    if it leads back to itself.
    """
    house = House(environ, options.config)
    router = explaining_router(house)
    every = []
    for address in read_recipients(house, options.recipients):
        for found in router.resolve(address, frozenset(), Branch(str(address))):
            found.error = found.error or courier_problem(found)
            every.append(found)
            write_all(1, os_bytes(printable(verdict_line(found)) + "\n"))
    if not every:
        raise ProgramError(EX_USAGE, "no recipients to check: name one")
    code = routing_code(every)
    statuses = {one.error.status for one in every if one.error}
    if statuses == {"5.4.6"}:
        return EX_CONFIG
    return EX_NOHOST if statuses and statuses <= NO_HOST else code


def explain(house: House, address: Address) -> tuple[Branch, list]:
    """(the tree of what would be done with mail for an address, its ends).

    Drawn by the code that delivers; changes nothing.
    """
    tree, router = Branch(str(address)), explaining_router(house)
    found = list(router.resolve(address, frozenset(), tree))
    by_text = {one.shown()[0]: one for one in found if one.kind in ("mailbox", "file")}
    for branch in list(tree.leaves())[:MAX_BRANCHES]:
        one = by_text.get(branch.text)
        problem = courier_problem(one) if one else None
        if problem:
            outcome = DEFERRED if problem.is_temporary else BOUNCED
            branch.grow(f"{outcome}: {problem.text}", "", problem.status)
            one.error = problem
        elif one and one.kind == "mailbox":
            form, _, rest = branch.detail.partition(", ")
            count = count_messages(one.place, one.user)
            branch.detail = ", ".join(filter(None, (form, count, rest)))
    return tree, found


def draw_sender(house: House, sender: Address, tree: Branch) -> None:
    """What another host sees as a message's sender: before and after."""
    settings = house.settings
    lines = MapFiles(settings, "smtp_generic_maps").lines()
    rewriter = Rewriter(lines, settings.myorigin, settings)
    line = rewriter.find(sender) if sender.local else None
    new = rewriter.sender(str(sender))
    where = line.where if line else ""
    detail = "" if line else "no line of smtp_generic_maps"
    tree.grow(f"sender <{sender}> -> <{new}>", where, detail)
    user = house.users.lookup(sender.local) if sender.local else None
    name = display_name(gecos_name(user.gecos, user.name)) if user else ""
    shown = f"From: {name} <{sender}>" if name else f"From: {sender}"
    after = os_text(rewriter.field("from", os_bytes(f"{shown}\n"))).rstrip("\n")
    tree.grow(f"{shown} -> {after}", where)


def print_explanations(
    house: House, words: list[str], as_json: bool, sender: Address | None = None
) -> int:
    """Explains each address. 0, 67 or 75."""
    every = []
    for address in read_recipients(house, words):
        tree, found = explain(house, address)
        every += found
        if sender and any(one.kind == "remote" for one in found):
            draw_sender(house, sender, tree)
        text = str(tree)
        if as_json:
            import json  # 5 ms; only --json needs it

            text = json.dumps({**tree.tree(), "exit": routing_code(found)}) + "\n"
        write_all(1, os_bytes(text))
    if not every:
        raise ProgramError(EX_USAGE, "no address to explain: name one")
    return routing_code(every)


def explain_recipients(options: SendmailOptions, environ: dict) -> int:
    """-bt: minimta's explain."""
    house = House(environ, options.config)
    return print_explanations(house, options.recipients, False)


def run_daemon(environ: dict, path: str, in_background: bool) -> int:
    """Starts the daemon; in the background, returns once it listens."""
    house = House(environ, path, echo=not in_background)
    if os.geteuid() != 0 and not house.owns_queue():
        where = house.settings.queue_directory
        why = f"{where} is not yours: run as root, or set MINIMTA_ROOT for your own"
        raise ProgramError(EX_NOPERM, why)
    daemon = Daemon(house, environ, path)
    daemon.open()
    if in_background:
        # Everything that can go wrong has been tried: the sockets listen.
        if os.fork():
            os._exit(EX_OK)
        detach()
    return daemon.run()


def start_daemon(options: SendmailOptions, environ: dict) -> int:
    """-bD in the foreground, -bd in the background, -bl for this host only."""
    if options.mode == "l":
        environ = {**environ, "MINIMTA_INET_INTERFACES": "loopback-only"}
    return run_daemon(environ, options.config, options.mode != "D")


def is_chosen(entry: QueueEntry, options: SendmailOptions) -> bool:
    """Whether -qI, -qR and -qS mean a message, and the ids that are named."""
    words = {"I": [entry.queue_id], "S": [entry.envelope.sender], "R": entry.pending}
    for kind, part, is_not in options.chosen:
        if any(part.lower() in word.lower() for word in words[kind]) == is_not:
            return False
    return not options.recipients or entry.queue_id in options.recipients


def show_queue(options: SendmailOptions, environ: dict) -> int:
    """-bp: the queue, read by ourselves if we may, else by the daemon."""
    for name in options.recipients:
        if not is_id(name):
            why = f"{printable(name, 60)}: not a queue id: see mailq --help"
            raise ProgramError(EX_USAGE, why)
    house = House(environ, options.config)
    name = "mailq" if options.chosen or options.recipients else ""
    return list_some(
        house, lambda entry: is_chosen(entry, options), name, options.is_verbose
    )


def flush_queue(options: SendmailOptions, environ: dict) -> int:
    """-q: tries everything in the queue now, or what -qI and its like mean."""
    house, since = House(environ, options.config), time.time()
    found: list[QueueEntry] = []
    if options.chosen or options.is_verbose:
        found = [one for one in queue_entries(house) if is_chosen(one, options)]
        found = [one for one in found if can_be("run", one)]
    code = run_entries(house, found) if options.chosen else flush_all(house)
    if options.is_verbose:
        watch_entries(house, found, since)
    return code


def tell_version(_: SendmailOptions, __: dict) -> int:
    """-bV."""
    return print_version()


def count_queue(options: SendmailOptions, environ: dict) -> int:
    """-bP: how many messages there are."""
    return count_entries(House(environ, options.config), [], {})


def tell_hosts(options: SendmailOptions, environ: dict) -> int:
    """-bh: the hosts that mail waits for, and why."""
    return sum_entries(House(environ, options.config), [], {})


def forget_hosts(options: SendmailOptions, environ: dict) -> int:
    """-bH: which of them are dead is forgotten: all are tried."""
    return flush_all(House(environ, options.config))


def check_config(options: SendmailOptions, environ: dict) -> int:
    """-bC: whether a daemon could work with the settings."""
    problems = check_settings(House(environ, options.config))
    for text in problems:
        complain("sendmail", text)
    return EX_CONFIG if problems else EX_OK


MAX_WARNINGS = 100  # that newaliases prints of one file


def alias_warnings(house: House, path: str, table: AliasTable) -> list:
    """(line, reason) of what may not do what was meant; line 0: the file."""
    # Other files may have what this one names: all are looked up.
    check = TargetCheck(house.router(TargetFiles(house.users)))
    found = table.warnings + table.loops() + table.dangling(check.problem)
    found += check.keys(table)
    seen = os.stat(path)
    if seen.st_mode & 0o022:
        found.append((0, "others may write the file: chmod go-w"))
    if seen.st_uid not in (0, os.geteuid()):
        found.append((0, f"uid {seen.st_uid} owns the file: chown root"))
    return found


def build_one(house: House, path: str) -> int:
    """Builds the database of one aliases file. The exit code."""
    report = AliasDatabase(path).rebuild(
        lambda table: alias_warnings(house, path, table)
    )
    for line, reason in report.problems:
        complain("newaliases", f"{path}, line {line}: {reason}")
    for line, reason in sorted(report.warnings)[:MAX_WARNINGS]:
        where = f", line {line}" if line else ""
        complain("newaliases", f"{path}{where}: warning: {reason}")
    if len(report.warnings) > MAX_WARNINGS:
        count = len(report.warnings) - MAX_WARNINGS
        complain("newaliases", f"{path}: warning: {count} more of this kind")
    if report.problems:
        return EX_DATAERR
    text = (
        f"{path}: {report.count} aliases, longest {report.longest} bytes, "
        f"{report.total} bytes total\n"
    )
    write_all(1, os_bytes(text))
    return EX_OK


def untyped(path: str) -> str:
    """The FILE of TYPE:FILE, as Postfix names a map."""
    return path.partition(":")[2] if path[:1] != "/" and ":" in path else path


def build_aliases(options: SendmailOptions, environ: dict) -> int:
    """-bi: newaliases."""
    if options.recipients or options.mode not in "mi" or options.is_letter:
        raise ProgramError(EX_USAGE, "no such argument here: see newaliases --help")
    house = House(environ, options.config)
    paths = house.settings.map_paths("alias_maps")
    if options.alias_file:
        paths = [untyped(options.alias_file)]
    codes = [build_one(house, path) for path in paths]
    return max(codes, default=EX_OK)


# -bX -> what sendmail is then.
def act_as_exim(options: SendmailOptions, environ: dict) -> int:
    """-Mrm and its like."""
    settings = ["-C", options.config] if options.config else []
    return exim_queue([*settings, options.exim, *options.recipients], environ)


NOT_FOR_MAIL, SERVERS = "qPhH", "sdDl"  # modes that want no recipients
SENDMAIL_MODES = {
    "M": act_as_exim,
    "m": send_stdin,
    "d": start_daemon,
    "D": start_daemon,
    "l": start_daemon,
    "s": serve_stdin,
    "p": show_queue,
    "P": count_queue,
    "q": flush_queue,
    "i": build_aliases,
    "v": verify_recipients,
    "t": explain_recipients,
    "C": check_config,
    "V": tell_version,
    "h": tell_hosts,
    "H": forget_hosts,
}


def cmd_sendmail(args: list[str], environ: dict) -> int:
    """usage: sendmail [options] [recipient ...]      reads a message on stdin

    -t           recipients from To, Cc and Bcc too; Bcc is removed
    -f ADDR      envelope sender (also -r); '<>' is the null sender
    -F NAME      full name, for a From field that is missing
    -i, -oi      a line with only a dot does not end the message
    -v, -d       shows what is said to other hosts, and what comes of it
    -X FILE      adds the same to FILE
    -odb -odi -odq   deliver behind; return after the first attempt; later
    -bs          SMTP on standard input and output
    -bp, -bP     the queue (mailq), how many are in it
    -q           tries all of it now; -qI -qR -qS PART: ids, recipients,
                 senders that have PART in them, ! before the letter: not
    -bi          the aliases (newaliases)   -bv  check recipients
    -bt          explain where they lead    -N WORDS -R full|hdrs -V ID  DSN
    -bd, -bD     the daemon, in the background or the foreground
    -bC          check the settings         -bh, -bH  hosts that mail waits for
    -oem, -oee   errors are mailed to the caller too; -oee: exit 0 then
    -C FILE      settings                   -oA FILE  the aliases file (-bi)
    -Mrm ID ...  and the rest of exim's -M  -h N   hops until now
    -L TAG       what the log calls us, for root
    """
    options = SendmailOptions(args)
    is_message = options.reads_header and options.mode in NOT_FOR_MAIL
    if is_message or options.recipients and options.mode in (*NOT_FOR_MAIL, *SERVERS):
        why = f"-{options.mode}: this sends no mail: nothing was queued: see --help"
        raise ProgramError(EX_USAGE, why)
    if options.is_debugged:
        tell((2,), f"minimta {__version__}\n")
    if options.tag and os.getuid() == 0:
        environ = {**environ, "MINIMTA_SYSLOG_NAME": options.tag}
    return SENDMAIL_MODES[options.mode](options, environ)


def cmd_exim(args: list[str], environ: dict) -> int:
    """usage: exim [-v] -bp[iu] [ID ...] | -bpc | -bV | -M ID ... | -q[ff]
       exim -Mrm | -Mf | -Mt | -Mg | -Mvh | -Mvb | -Mvc | -Mvl ID ...

    What fingers know of exim's queue: list, count; try, remove, freeze, thaw,
    give up messages; show header, body, both, what happened to one; -R PART
    and -S PART try those to or from PART. With other options it is sendmail.
    """
    if len(args) == 2 and args[0] in ("-R", "-S"):
        return cmd_sendmail([f"-q{args[0][1]}{args[1]}"], environ)
    words = [word for word in args[2 * (args[:1] == ["-C"]) :] if word != "-v"]
    is_queue = not words or words[0].startswith(("-bp", "-bV", "-M", "-q"))
    return (exim_queue if is_queue else cmd_sendmail)(args, environ)


def named(name: str) -> object:
    """sendmail by another name, which stands for an option of its."""

    def program(args: list[str], environ: dict) -> int:
        return cmd_sendmail([*SENDMAIL_NAMES[name], *args], environ)

    words = " ".join(SENDMAIL_NAMES[name])
    program.__doc__ = f"usage: {name} ...\n\n    sendmail {words}.\n"
    return program


def cmd_serve(args: list[str], environ: dict) -> int:
    """usage: minimta.py serve [-C FILE]

    Runs the daemon in the foreground: SMTP server and queue runner.
    SIGTERM ends it, SIGHUP reads the settings again.
    """
    return run_daemon(environ, config_option("serve", args), False)


def watch_queue(options: SendmailOptions, environ: dict) -> int:
    """mailq --watch: the queue on the terminal, until Ctrl-C."""
    if not os.isatty(1):
        raise ProgramError(EX_USAGE, "--watch needs a terminal: use mailq")
    while True:
        write_all(1, b"\x1b[H\x1b[2J")  # home, and clear
        show_queue(options, environ)
        time.sleep(WATCH_QUEUE)


def cmd_mailq(args: list[str], environ: dict) -> int:
    """usage: mailq [-C FILE] [-v] [--json] [--watch] [-qI -qR -qS PART] [ID]

    Shows the queue in Postfix's format; * is active, ! is on hold, # is to be
    returned; -v tells of attempts, --json has an object a line, --watch shows
    it anew every two seconds. Anyone may ask while the daemon runs; without
    it, only who may read the queue. -q alone tries everything now.
    """
    own = {"-j", "--json", "--watch"}
    options = SendmailOptions([word for word in args if word not in own])
    if options.mode == "q" and not options.chosen:
        return flush_queue(options, environ)
    if options.mode not in ("m", "q", "p") or options.is_letter:
        raise ProgramError(EX_USAGE, "that is no option of mailq: see --help")
    if {"-j", "--json"} & set(args):
        house = House(environ, options.config)
        print_json(house, lambda entry: is_chosen(entry, options))
        return EX_OK
    if "--watch" in args:
        return watch_queue(options, environ)
    return show_queue(options, environ)


def cmd_newaliases(args: list[str], environ: dict) -> int:
    """usage: newaliases [-C FILE] [-oA FILE]

    Builds the database from the aliases file, in one step: with a bad line
    nothing is changed. Says how many aliases there are, and warns of loops.
    """
    return build_aliases(SendmailOptions(args), environ)


def print_aliases(path: str, name: str) -> int:
    """One alias of a file, those of standard input (-), or all of them.

    1 if there is none.
    """
    try:
        table = AliasDatabase(path).read_text()
    except MailError as error:
        why = f"{error.text}: name a text file"
        raise ProgramError(EX_NOINPUT, why) from None
    if name and name != "-":
        value = table.value(name.lower())
        write_all(1, os_bytes(f"{value}\n" if value is not None else ""))
        return 1 if value is None else EX_OK
    wanted = table.entries
    if name:
        wanted = [line.strip().lower() for line in os_text(read_all(0)).split("\n")]
    found = [(key, table.value(key)) for key in wanted if table.value(key)]
    text = "".join(f"{key}:\t{value}\n" for key, value in found)
    write_all(1, os_bytes(text))
    return EX_OK if found else 1


def cmd_postalias(args: list[str], environ: dict) -> int:
    """usage: postalias [-c DIR] [TYPE:]FILE ... | -q NAME FILE | -s FILE

    Builds the databases of aliases files, silently; -q prints an alias (exit 1
    without one), -s all of them. Without a file it is newaliases.
    """
    options, words = read_flags(args, "c:C:finopq:rsuvwNW", [])
    is_question = bool({"-q", "-s"} & set(options))
    if not words and not is_question:
        return cmd_newaliases([], environ)
    house = House(environ, options.get("-C", ""))
    code = 1 if is_question else EX_OK
    for word in words or house.settings.map_paths("alias_maps"):
        path = untyped(word)
        if is_question:  # one file that has it is enough
            code = min(code, print_aliases(path, options.get("-q", "")))
            continue
        for line, reason in AliasDatabase(path).rebuild().problems:
            complain("postalias", f"{path}, line {line}: {reason}")
            code = EX_DATAERR
    return code


def mailbox_path(house: House, options: dict, environ: dict) -> str:
    """The mailbox that mail is delivered to: of -u USER, $MAIL, one's own."""
    settings = house.settings
    if "-u" in options:
        user = house.users.lookup(options["-u"][-1])
        if user is None:
            name = printable(options["-u"][-1], 60)
            raise ProgramError(1, f'"{name}" is not a user of this system')
    else:
        user, chosen = house.user, environ.get("MAIL", "")
        if chosen and (not settings.root or chosen.startswith(settings.root + "/")):
            return chosen
    if settings.home_mailbox:
        return f"{user.home}/{settings.home_mailbox.rstrip('/')}"
    return f"{settings.mail_spool_directory}/{user.name}"


def start_session(
    house: House, options: dict, environ: dict, is_reading: bool
) -> MailSession:
    """A session with its variables: /etc/mail.rc, ~/.mailrc, then -S."""
    terminal = Terminal()
    terminal.is_interactive |= bool({"-I", "-~"} & set(options))
    commands = tuple(row for row in MAIL_COMMANDS if row[1] in START_COMMANDS)
    session = MailSession(house, terminal, Variables(environ), commands)
    session.is_reading = is_reading
    own = environ.get("MAILRC") or os.path.join(house.user.home, ".mailrc")
    for path in [] if "-n" in options else [f"{house.settings.root}/etc/mail.rc"]:
        session.source_if_there(path)
    session.source_if_there(own)
    for word in options.get("-S", []):
        session.variables.set(word)
    if "-N" in options:
        session.variables.values.pop("header", None)
    if "-i" in options:
        session.variables.set("ignore")
    if not os.isatty(0):  # escapes are wanted, not questions
        session.variables.set("noask")
    return session


def add_header(sheet: Sheet, text: str) -> None:
    """-a: a file to attach, or a header field. Raises ProgramError."""
    import re

    if os.path.isfile(text):
        sheet.attached.append(text)
    elif re.match(r"[!-9;-~]+:[ \t]*\S", text):
        name, _, value = text.partition(":")
        sheet.set_field(name, value.strip())
    else:
        raise ProgramError(1, f"{printable(text, 100)}: No such file or directory")


def people_of(house: House, session: MailSession, words: list[str]) -> list[str]:
    """Recipients as To: names them: aliases expanded. Raises ProgramError."""
    every, variables = [], session.variables
    for word in words:
        is_whole = is_place(word, variables)
        every += [word] if is_whole else split_addresses(word) or [word]
    found = []
    for text in variables.expand(every):
        is_one = is_place(text, variables) or read_recipients(house, [text])
        found += [text] if is_one else []
    return found


def new_sheet(house: House, session: MailSession, options: dict, words: list) -> Sheet:
    """A letter as the command line begins it. Raises ProgramError."""
    sheet = Sheet(people_of(house, session, words), "".join(options.get("-s", [])[-1:]))
    for flag, name in (("-c", "Cc"), ("-b", "Bcc")):
        for text in options.get(flag, []):
            sheet.add(name, text)
    sheet.sender = "".join(options.get("-r", [])[-1:])
    if "-F" in options and sheet.people["To"]:
        first = header_addresses(sheet.people["To"][0])
        sheet.record = safe_name(first[0].local if first else "")
    for text in options.get("-a", []):
        add_header(sheet, text)
    for text in options.get("-C", []):
        name, _, value = text.partition(":")
        sheet.set_field(name, value.strip())
    for path in options.get("-A", []):
        add_header(sheet, path)
    if "-M" in options:
        sheet.set_field("Content-Type", options["-M"][-1])
    for path in options.get("-q", []):
        try:
            with open(path, "rb") as file:
                sheet.text += file.read()
        except OSError as error:
            raise ProgramError(1, f"{path}: {error.strerror}") from None
    return sheet


def take_header(sheet: Sheet) -> None:
    """-t: the text begins with a header, which says who gets it."""
    header = Header.parse(drop_from_lines(sheet.text))
    for _, raw in header.fields:
        name, _, value = os_text(raw).partition(":")
        sheet.set_field(name, " ".join(value.split()))
    sheet.text = header.rest


def send_mail(house: House, session: MailSession, options: dict, words: list) -> int:
    """mail with recipients: composes and submits."""
    terminal, sheet = session.terminal, new_sheet(house, session, options, words)
    composer = Composer(house, terminal, session.variables, None)
    try:
        if "-s" not in options:
            composer.ask_first(sheet)
        write_letter(composer, sheet)
    except (Killed, KeyboardInterrupt):
        return 1
    if "-t" in options:
        take_header(sheet)
    if not sheet.text.strip() and not sheet.attached:
        if "-E" in options or session.variables.has("skipempty"):
            return EX_OK
        what = "body" if sheet.subject or not terminal.is_interactive else ""
        terminal.complain(
            f"{'Null message body' if what else 'No message, no subject'}"
            "; hope that's ok"
        )
    if "-d" in options:
        terminal.say(os_text(bytes(composer.header(sheet)) + b"\n" + mail_body(sheet)))
        return EX_OK
    queue_id = composer.send(sheet)
    if "-v" in options:
        terminal.complain(f"mail: queued as {queue_id}")
    return EX_OK


def has_mail(path: str) -> bool:
    """Whether there is anything in a mailbox. Raises OSError."""
    if os.path.isdir(path):  # one that is no Maildir is told of later
        folders = [f"{path}/{name}" for name in ("new", "cur")]
        return not all(map(os.path.isdir, folders)) or any(map(os.listdir, folders))
    return bool(os.stat(path).st_size)


def is_mailbox(path: str) -> bool:
    """Whether a file begins as an mbox does, or is a Maildir."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 12).lstrip(b"\r\n").startswith(b"From ")
    except IsADirectoryError:
        return os.path.isdir(f"{path}/new")
    except OSError:
        return True  # it is not for us to say


def read_mail(house: House, session: MailSession, options: dict, words: list) -> int:
    """mail without recipients: reads a mailbox."""
    name = options.get("-u", [house.user.name])[-1]
    session.own_path = path = mailbox_path(house, options, os.environ)
    if "-f" in options:
        try:
            path = session.path_of(words[0] if words else "&")
        except ValueError as error:
            raise ProgramError(1, str(error)) from None
    try:
        is_empty = not has_mail(path)
    except FileNotFoundError:
        is_empty = True
        if "-f" in options and "-e" not in options:
            raise ProgramError(1, f"{path}: No such file or directory") from None
    except OSError as error:
        raise ProgramError(1, f"{path}: {error.strerror}") from None
    if "-e" in options:
        return 1 if is_empty or not is_mailbox(path) else EX_OK
    if is_empty and "-f" not in options:
        write_all(2, os_bytes(f"No mail for {printable(name)}\n"))
        return 1
    folder = open_folder(path, house.user.home, "-R" in options)
    reader = MailReader(session, folder, MAIL_COMMANDS)
    reader.is_system = folder.path == os.path.abspath(session.own_path)
    if "-H" in options:
        for number in reader.every():
            reader.terminal.say(reader.painted(number) + "\n")
        return EX_OK if folder.messages else 1
    return run_session(reader)


MAIL_FLAGS = "s:a:A:c:b:r:S:q:u:C:M:feEHNniIRBFtTvdV~"
# The long names that s-nail and mailutils have for them; = wants a value.
MAIL_LONG_FLAGS = {
    "subject=": "-s",
    "attach=": "-a",
    "append=": "-a",
    "cc=": "-c",
    "bcc=": "-b",
    "from-address=": "-r",
    "return-address=": "-r",
    "set=": "-S",
    "quote-file=": "-q",
    "inbox-of=": "-u",
    "user=": "-u",
    "file": "-f",
    "check-and-exit": "-e",
    "exist": "-e",
    "header-summary": "-H",
    "headers": "-H",
    "no-header-summary": "-N",
    "nosum": "-N",
    "norc": "-n",
    "ignore": "-i",
    "read-only": "-R",
    "batch-mode": "-B",
    "byname": "-F",
    "template": "-t",
    "discard-empty-messages": "-E",
    "verbose": "-v",
    "debug": "-d",
}


def mail_options(args: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(option -> its values, words) of mail's command line. ProgramError.

    Options of sendmail may stand behind `--`, if recipients stand before it.
    """
    import getopt  # small; argparse costs 10 ms

    place = args.index("--") if "--" in args else len(args)
    args, more = args[:place], args[place + 1 :]
    try:
        pairs, words = getopt.gnu_getopt(args, MAIL_FLAGS, list(MAIL_LONG_FLAGS))
    except getopt.GetoptError as error:
        raise ProgramError(EX_USAGE, f"{error.msg}: see --help") from None
    options: dict[str, list[str]] = {}
    for flag, value in pairs:
        name = flag[2:] if flag[:2] == "--" else ""
        flag = MAIL_LONG_FLAGS.get(name) or MAIL_LONG_FLAGS.get(f"{name}=") or flag
        options.setdefault(flag, []).append(value)
    if words and more[:1] and more[0].startswith("-"):
        theirs = SendmailOptions(more)
        words += theirs.recipients
        if theirs.sender:
            options.setdefault("-r", []).append(theirs.sender)
    else:
        words += more
    return options, words


def cmd_mail(args: list[str], environ: dict) -> int:
    """usage: mail [-s SUBJECT] [-c ADDR] [-b ADDR] [-r FROM] recipient ...
           mail [-f [FILE]] [-u USER] [-e] [-H] [-N] [-R]

    With recipients it sends: the text comes from standard input, or is typed
    up to Ctrl-D; ~? lists what can be done meanwhile. Without, it reads your
    mail: a number or Return prints, ? lists the commands. -e only tells by
    its exit code whether there is mail, -H lists the headers.
    -a FILE attaches, -a 'Name: value' adds a header field, -q FILE begins the
    text, -t takes recipients from the text's header, -E sends no empty text,
    -F keeps a copy in a file named after the first recipient, -S NAME[=VALUE]
    sets a variable, -n reads no /etc/mail.rc, -d only shows. s-nail's long
    options are known, and sendmail's options behind recipients and --.
    """
    options, words = mail_options(args)
    if "-V" in options:
        return print_version()
    house = House(environ)
    is_sending = not {"-f", "-u"} & set(options) and (words or "-t" in options)
    session = start_session(house, options, environ, not is_sending)
    if is_sending:
        return send_mail(house, session, options, words)
    if {"-s", "-c", "-b", "-r"} & set(options):
        why = "You must specify to-addr recipients when using -s, -c, -b, or -r"
        raise ProgramError(EX_USAGE, why)
    return read_mail(house, session, options, words)


def cmd_explain(args: list[str], environ: dict) -> int:
    """usage: minimta.py explain [-C FILE] [--from SENDER] [--json] ADDRESS ...

    Says where mail to an address goes, by which rule and as which user, and
    what was looked at in vain; with --from also what another host sees as
    its sender. Changes nothing. Exit 0 if it arrives, 67 if it never does, 75
    if it has to wait.
    """
    options, words = read_flags(args, "C:", ["json", "from="])
    house = House(environ, options.get("-C", ""))
    sender = None
    if "--from" in options:
        sender = read_sender(house, options["--from"])
    return print_explanations(house, words, "--json" in options, sender)


def set_password(names: list[str], house: House) -> int:
    """config passwd USER. Raises ProgramError."""
    path = house.settings.smtpd_sasl_password_file
    if not path:
        raise ProgramError(EX_CONFIG, "smtpd_sasl_password_file is not set: set it")
    if not names or ":" in names[0] or not names[0].isprintable():
        raise ProgramError(EX_USAGE, "config passwd: need the name of a user")
    if os.isatty(0):
        import getpass

        first, again = (getpass.getpass(text) for text in ("Password: ", "Again: "))
        if first != again:
            raise ProgramError(EX_DATAERR, "the two passwords differ: try again")
    else:
        first = os_text(os.read(0, MAX_COMMAND).partition(b"\n")[0].rstrip(b"\r"))
    if not first:
        raise ProgramError(EX_DATAERR, "an empty password: nothing was changed")
    owner = queue_owner(house.settings, house.users)
    try:
        Passwords(path).change(names[0], os_bytes(first), owner.gid)
    except OSError as error:
        why = f"{path}: {error.strerror}: nothing was changed"
        raise ProgramError(EX_CANTCREAT, why) from None
    return EX_OK


def cmd_config(args: list[str], environ: dict) -> int:
    """usage: minimta.py config [-C FILE]
       minimta.py config passwd USER [-C FILE]

    Prints every setting with its value, its default and where it came from.
    With passwd: asks for USER's password (or reads it, a line on standard
    input) and writes its hash to smtpd_sasl_password_file.
    """
    if args[:1] == ["passwd"]:
        return set_password(
            args[1:2], House(environ, config_option("config", args[2:]))
        )
    settings = House(environ, config_option("config", args)).settings
    for row in SETTINGS:
        where = settings.sources.get(row.name, "default")
        value = settings.texts[row.name]
        value = value if row.kind == "command" else settings.expand(value)
        text = f"{row.name} = {value}"
        write_all(
            1, os_bytes(f"{text:50} # {where}; default: {row.default or 'empty'}\n")
        )
    return EX_OK


def daemon_ails(settings: Settings) -> str:
    """What ails the daemon, "" if it is well."""
    daemon = SubmitSocket(settings.queue_directory, HEALTH_TIMEOUT)
    try:
        if daemon.connect():
            daemon.send("XHEALTH")
            daemon.expect(250)
            return ""
    except MailError as error:
        return error.text
    except OSError:
        pass  # it does not answer in time
    return "the daemon does not answer"


def cmd_health(args: list[str], environ: dict) -> int:
    """usage: minimta.py health [-C FILE]

    Says whether the daemon answers, its runner runs and its disk has room:
    exit 0 if all is well, 1 if not. For a container's HEALTHCHECK.
    """
    why = daemon_ails(House(environ, config_option("health", args)).settings)
    write_all(1, os_bytes(f"{why or 'ok: the daemon answers'}\n"))
    return 1 if why else EX_OK


def print_help(program: object) -> None:
    """A program's docstring, as it stands in this file."""
    lines = (program.__doc__ or "").rstrip().split("\n")
    write_all(
        1, os_bytes("\n".join(line.removeprefix("    ") for line in lines) + "\n")
    )


def cmd_help(args: list[str], environ: dict) -> int:
    """usage: minimta.py COMMAND [arguments]; COMMAND --help says more

    sendmail    takes a message on standard input
    newaliases  builds the alias database
    mailq       shows the queue
    mail        sends and reads mail
    serve       the daemon, in the foreground
    queue       shows the queue, and changes what is in it
    explain     says where mail to an address goes
    trace       says what happened to a message
    config      prints the settings
    health      says whether the daemon answers
    doctor      says what is wrong with this host's mail, and what mends it
    import      says in our settings what other mail programs were told
    install     puts minimta onto this host; uninstall takes it away

    Linked as sendmail, newaliases, mailq, mail or mailx it is that program;
    so it is as postqueue, postsuper, postcat, exim, qmail-qread and others.
    """
    if args and args[0] not in ("help", "--help", "-h"):
        text = f"unknown command {printable(args[0], 60)}: see minimta.py --help"
        raise ProgramError(EX_USAGE, text)
    print_help(cmd_help)
    return EX_OK


# == 36 Moving in: Foreign, cmd_import ========================================
# The settings of other mail programs, said in ours. Source: ssmtp.conf(5),
# msmtp(1), dma(8), nullmailer-send(8), Postfix's postconf(5).
# Failures: ProgramError EX_NOINPUT, EX_DATAERR; what has no counterpart is
# named, and so is each password, which is not shown.

OWN_FILES = {  # what a line is for, in the order of printing
    "/etc/minimta.generic": "senders, as other hosts see them",
    "/etc/minimta.passwords": "chmod 600; put each password in yourself",
    "/etc/aliases": "then run newaliases",
}


def word_table(text: str) -> dict[str, str]:
    """`theirs=ours` words as a dictionary."""
    return dict(pair.split("=") for pair in text.split())


# Names of theirs -> a setting of ours, or a word that Foreign knows; nothing
# for what needs no setting here.
SSMTP_WORDS = word_table(
    """mailhub=host usetls=tls usestarttls=starttls authuser=user
    authpass=password hostname=myhostname rewritedomain=myorigin
    tls_ca_file=smtp_tls_CAfile root=root fromlineoverride="""
)
MSMTP_WORDS = word_table(
    """host=host port=port tls=tls tls_starttls=starttls user=user
    password=password passwordeval=smtp_sasl_password_command from=from auth=
    domain=myhostname maildomain=myorigin tls_trust_file=smtp_tls_CAfile
    aliases=alias_maps syslog= logfile= auto_from="""
)
DMA_WORDS = word_table(
    """smarthost=host port=port aliases=alias_maps securetransfer=tls
    starttls=starttls masquerade=from mailname=myorigin authpath= spooldir=
    fullbounce="""
)
NULLMAILER_WORDS = word_table(
    """host=host --port=port --user=user --pass=password --ssl=tls
    --starttls=starttls --x509cafile=smtp_tls_CAfile --auth-login= smtp="""
)
# Postfix's names that we have too, but with another meaning.
NOT_POSTFIX = ("default_process_limit", "mail_owner", "queue_directory", "capture")
# What says nothing about where mail goes.
POSTFIX_QUIET = (
    *("compatibility_level", "alias_database", "biff", "readme_directory"),
    *("append_dot_mydomain", "inet_protocols", "smtpd_banner", "mail_version"),
    *("command_directory", "daemon_directory", "data_directory", "config_directory"),
    *("sendmail_path", "newaliases_path", "mailq_path", "setgid_group"),
    *("html_directory", "manpage_directory", "sample_directory", "debug_peer_level"),
    *("smtp_tls_session_cache_database", "smtpd_tls_session_cache_database"),
    *("smtp_sasl_auth_enable", "smtp_sasl_security_options", "smtpd_use_tls"),
    *("smtp_use_tls", "smtp_sasl_tls_security_options", "shlib_directory"),
    *("meta_directory", "unknown_local_recipient_reject_code", "debugger_command"),
)


# Words that are about one relay, or about names; the last of each counts.
RELAY_WORDS = ("host", "port", "tls", "starttls", "user", "password", "from", "root")
FOREIGN_SECRETS = ("authpass", "password", "--pass", "smtp_sasl_password_maps")


class Fact(Value):
    """One thing that a foreign file says: where, its name there, the value."""

    __slots__ = ("where", "name", "value")

    def __init__(self, where: str, name: str, value: str) -> None:
        self.where = where
        self.name = name
        self.value = value


def is_on(text: str) -> bool:
    """Whether a switch of ssmtp, msmtp or dma is on; its mere name is."""
    return text.lower() not in ("no", "off", "0", "false")


class Foreign:
    """What foreign files say, as settings and lines of ours; str() prints it.

    `settings` by name, `files` lines by path, `left` what could not be taken.
    """

    def __init__(self) -> None:
        self.settings: dict[str, str] = {}
        self.files: dict[str, list[str]] = {path: [] for path in OWN_FILES}
        self.left: list[str] = []

    def leave(self, fact: Fact, why: str = "no counterpart") -> None:
        """Something that could not be taken."""
        # A line that is not understood may well have a password in it.
        plain = fact.name.replace("_", "").replace("-", "")
        is_known = plain.isascii() and plain.isalnum() and "pass" not in plain.lower()
        shown = f"{fact.name} {fact.value}".rstrip() if is_known else "a line"
        if not is_known and fact.name.lower() in FOREIGN_SECRETS:
            shown = fact.name
        self.left.append(f"{fact.where}: {printable(shown, 100)}: {why}")

    def take(self, facts: list[Fact], words: dict[str, str]) -> None:
        """The facts about one relay, and what else stands among them."""
        known: dict[str, Fact] = {}
        for fact in facts:
            word = words.get(fact.name.lower())
            if word is None:
                self.leave(fact)
            elif word in RELAY_WORDS:
                known[word] = fact
                if word == "from" and fact.value:
                    self.settings["smtp_generic_maps"] = "/etc/minimta.generic"
            elif word and fact.value:
                self.set(word, fact)
        self.take_names(known)
        if "host" in known and known["host"].value:
            self.take_relay(known)

    def take_names(self, known: dict[str, Fact]) -> None:
        """Who we are elsewhere, and who is root here."""
        sender = known["from"].value.rstrip("@") if "from" in known else ""
        if sender:
            value = sender if "@" in sender else f"@{sender}"  # the user stays
            self.files["/etc/minimta.generic"].append(f"* {value}")
        if "root" in known and known["root"].value:
            self.files["/etc/aliases"].append(f"root: {known['root'].value}")

    def set(self, name: str, fact: Fact) -> None:
        """A setting, if it can be one of ours."""
        row = next(row for row in SETTINGS if row.name == name)
        words = read_list(fact.value)
        kinds = [word.partition(":")[0] for word in words if "/" not in word]
        if name == "myorigin" and fact.value.startswith("/"):
            self.leave(fact, "a file: set the name that is in it")
        elif name == "mydestination" and any("/" in word for word in words):
            self.leave(fact, "a file: set the names that are in it")
        elif name.endswith("_maps") and kinds:
            self.leave(Fact(fact.where, fact.name, ""), "no file: write one")
        else:
            try:
                READERS[row.kind](fact.value)
                self.settings[name] = fact.value
            except ValueError:
                self.leave(fact, f"not a {row.kind}")

    def take_relay(self, known: dict[str, Fact]) -> None:
        """One relay: relayhost, and where its password goes."""
        fact = known["host"]
        is_tls, is_later = (
            is_on(known[word].value) if word in known else None
            for word in ("tls", "starttls")
        )
        is_wrapped = bool(is_tls) and is_later is False
        try:
            port = known["port"].value if "port" in known else ""
            host, usual = split_host(fact.value, 465 if is_wrapped else 25)
            port = range(1 << 16).index(int(port or usual) or -1)
        except ValueError:
            self.leave(fact, "not a host and a port")
            return
        hop = f"[{host}]:{port}"
        every = [self.settings.get("relayhost", ""), f"{'smtps://' * is_wrapped}{hop}"]
        self.settings["relayhost"] = ", ".join(filter(None, every))
        if "user" in known:
            password = known.get("password")
            self.take_login(hop, known["user"].value, password and password.where)
            if is_tls is False:
                self.leave(known["tls"], "a password is never sent in clear")

    def take_login(self, hop: str, user: str, where: str | None) -> None:
        """A line for the password file, with where the password is."""
        self.settings["smtp_sasl_password_maps"] = "/etc/minimta.passwords"
        command = self.settings.get("smtp_sasl_password_command")
        if where or not command:
            hint = f" (it stands in {where})" if where else ""
            self.files["/etc/minimta.passwords"].append(f"{hop} {user}:PASSWORD{hint}")
        else:
            self.files["/etc/minimta.passwords"].append(f"{hop} {user}")

    def __str__(self) -> str:
        rows = ["# /etc/minimta.conf"]
        rows += [f"{name} = {value}" for name, value in self.settings.items()]
        for path, lines in self.files.items():
            if lines:
                rows += ["", f"# {path}: {OWN_FILES[path]}"]
                rows += [f"#   {line}" for line in dict.fromkeys(lines)]
        if self.left:
            rows += ["", "# not taken:", *(f"#   {line}" for line in self.left)]
        return "".join(f"{printable(row)}\n" for row in rows)


def read_facts(text: str, path: str, sign: str) -> list[Fact]:
    """The facts of a file of lines `name SIGN value`, comments gone."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and line[0] not in "#;":
            name, _, value = line.replace("\t", " ").partition(sign)
            value = value.partition(" #")[0].strip()
            if value[:1] in ("'", '"') and value[:1] == value[-1:]:
                value = value[1:-1]
            found.append(Fact(f"{path}, line {number}", name.strip(), value))
    return found


def without_variables(facts: list[Fact], found: Foreign) -> list[Fact]:
    """The facts without `$name`, which would mean a setting of ours."""
    safe = ("pass", "user")
    kept = []
    for fact in facts:
        if "$" in fact.value and not any(word in fact.name.lower() for word in safe):
            found.leave(fact, "a $ has another meaning here")
        else:
            kept.append(fact)
    return kept


def completed(facts: list[Fact], name: str, usual: str) -> list[Fact]:
    """The facts, with what a program does where its file does not say."""
    if not facts or any(fact.name.lower() == name.lower() for fact in facts):
        return facts
    return [*facts, Fact(facts[0].where, name, usual)]


def read_ssmtp(text: str, path: str, found: Foreign) -> None:
    """ssmtp.conf: `name=value`."""
    facts = completed(read_facts(text, path, "="), "UseSTARTTLS", "no")
    found.take(without_variables(facts, found), SSMTP_WORDS)


def read_msmtp(text: str, path: str, found: Foreign) -> None:
    """msmtprc: accounts; the default one is taken, or the first."""
    accounts: dict[str, list[Fact]] = {}
    defaults: list[Fact] = []
    here, chosen = defaults, ""
    for fact in read_facts(text, path, " "):
        name, _, base = (part.strip() for part in fact.value.partition(":"))
        if fact.name == "defaults":
            here = defaults = []
        elif fact.name == "account":
            bases = [accounts.get(one.strip(), defaults) for one in base.split(",")]
            here = accounts[name] = [fact for facts in bases for fact in facts]
            chosen = name if name == "default" else chosen or name
        else:
            here.append(fact)
    facts = accounts.get(chosen, defaults)
    for name, others in accounts.items():
        if others != facts:
            found.leave(Fact(path, "account", name), "only one account is used")
    facts = completed(facts, "tls_starttls", "on")
    found.take(without_variables(facts, found), MSMTP_WORDS)


def read_dma(text: str, path: str, found: Foreign) -> None:
    """dma.conf: `NAME value`, or a name alone."""
    facts = completed(read_facts(text, path, " "), "STARTTLS", "off")
    found.take(without_variables(facts, found), DMA_WORDS)


def read_dma_auth(text: str, path: str, found: Foreign) -> None:
    """dma's auth.conf: `user|host:password`."""
    relays = {}
    for word in read_list(found.settings.get("relayhost", "")):
        hop = word.removeprefix("smtps://")
        relays[hop[1:].partition("]")[0]] = hop
    for fact in read_facts(text, path, "|"):
        host, colon, _ = fact.value.partition(":")
        if not (fact.name and host and colon):
            found.leave(Fact(fact.where, "|", ""), "need user|host:password")
            continue
        found.take_login(relays.get(host, f"[{host}]"), fact.name, fact.where)


def read_remotes(text: str, path: str, found: Foreign) -> None:
    """nullmailer's remotes: a relay in each line, with options."""
    for fact in read_facts(text, path, " "):
        facts = [Fact(fact.where, "host", fact.name)]
        for word in fact.value.split():
            name, _, value = word.partition("=")
            is_option = name.startswith("--") or name == "smtp"
            name = name if is_option else "(a word)"
            facts.append(Fact(fact.where, name, value.strip("\"'")))
        facts = completed(facts, "--starttls", "off")
        found.take(without_variables(facts, found), NULLMAILER_WORDS)


def variables(text: str) -> list[str]:
    """The names of `$name` and `${name}` in a value."""
    found = []
    for part in text.split("$")[1:]:
        word = part.lstrip("{(")
        end = next(
            (n for n, c in enumerate(word) if not (c.isalnum() or c == "_")), None
        )
        found.append(word[:end])
    return found


def take_postfix(fact: Fact, found: Foreign) -> None:
    """One parameter of Postfix's."""
    names = {row.name for row in SETTINGS}
    strange = [word for word in variables(fact.value) if word not in names]
    if fact.name not in names or fact.name in NOT_POSTFIX:
        if fact.value:
            found.leave(fact)
    elif fact.name in variables(fact.value):
        found.leave(fact, "it names itself")
    elif strange:
        found.leave(fact, f"${strange[0]} is no setting here")
    elif fact.value or fact.name in ("mydestination", "relayhost"):
        found.set(fact.name, fact)


def read_postfix(text: str, path: str, found: Foreign) -> None:
    """Postfix's main.cf: what has our names, and the TLS wrapper mode."""
    is_wrapped = False
    for number, line in logical_lines(text):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            fact = Fact(f"{path}, line {number}", name, "")
            found.leave(fact, "not name = value")
        elif name == "smtp_tls_wrappermode":
            is_wrapped = value == "yes"
        elif name not in POSTFIX_QUIET:
            take_postfix(Fact(f"{path}, line {number}", name, value), found)
    relay = found.settings.get("relayhost", "")
    if is_wrapped and relay:
        found.settings["relayhost"] = f"smtps://{relay}"


# How a file's name ends -> who reads it.
FOREIGN_FILES = {
    "ssmtp.conf": read_ssmtp,
    "msmtprc": read_msmtp,
    "dma.conf": read_dma,
    "auth.conf": read_dma_auth,
    "remotes": read_remotes,
    "main.cf": read_postfix,
}


def cmd_import(args: list[str], environ: dict) -> int:
    """usage: minimta.py import FILE ...

    Says in minimta's settings what other programs' files say: ssmtp.conf,
    msmtprc, dma.conf with auth.conf, nullmailer's remotes, Postfix's main.cf.
    Prints /etc/minimta.conf; as comments what goes into other files, and what
    could not be taken. Passwords are not shown. Changes nothing.
    """
    _, paths = read_flags(args, "", [])
    if not paths:
        why = "no file to read: name one, as /etc/ssmtp/ssmtp.conf"
        raise ProgramError(EX_USAGE, why)
    order = list(FOREIGN_FILES)
    chosen = []
    for path in paths:
        kind = next((end for end in order if path.endswith(end)), None)
        if kind is None:
            why = f"{path}: its name tells nothing: need one of {', '.join(order)}"
            raise ProgramError(EX_USAGE, why)
        chosen.append((order.index(kind), path))
    found = Foreign()
    for number, path in sorted(chosen):  # auth.conf behind dma.conf
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                text = file.read(MAX_MAP)
        except OSError as error:
            why = f"{path}: {error.strerror}: name a file that can be read"
            raise ProgramError(EX_NOINPUT, why) from None
        FOREIGN_FILES[order[number]](text, path, found)
    write_all(1, os_bytes(str(found)))
    return EX_OK


# == 37 Doctor: Finding, CHECKS, cmd_doctor ===================================
# What can be wrong with a host's mail, looked at as it is now, by the code
# that works with it, and what mends it. Nothing is changed, nothing is sent.
# Failures: none; what cannot be looked at is a finding that says so.

# The names that a host calls its mail system by.
LINKS = (
    *("/usr/sbin/sendmail", "/usr/lib/sendmail", "/usr/bin/newaliases"),
    *("/usr/bin/mailq", "/usr/bin/mail", "/usr/bin/mailx"),
)
MANIFEST = "/var/lib/minimta/manifest"
MODULES = (
    *("dbm", "email.message", "getpass", "hashlib", "html.parser", "json"),
    *("mailbox", "readline", "selectors", "smtplib", "ssl", "subprocess"),
)
CRON_PATH = "/usr/bin:/bin"
OLD_MAIL = DAY  # seconds that mail waits before it is worth a word
MANY_LETTERS = 100  # an hour, in a queue that grows
FEW_INODES = 1000
MAX_FINDINGS = 20  # of one check
KNOWN_DOMAIN = "gmail.com"  # whose hosts tell whether port 25 is open outwards
TRY_TIMEOUT = 5  # seconds
AS_ROOT = "run as root"


class Finding(Value):
    """What a check found: ok, warning or wrong; what mends it, or ""."""

    __slots__ = ("state", "text", "todo")

    def __init__(self, state: str, text: str, todo: str = "") -> None:
        self.state = state
        self.text = text
        self.todo = todo


def own_command(house: House, words: str) -> str:
    """How this very program is called for something."""
    root = house.settings.root
    head = f"MINIMTA_ROOT={root} " if root else ""
    return f"{head}{os.path.realpath(__file__)} {words}"


def check_python(_: House) -> object:
    """Whether Python has the modules that minimta uses."""
    missing = []
    for name in MODULES:
        try:
            __import__(name)
        except Exception:  # noqa: BLE001 a module in parts fails in any way
            missing.append(name)
    version = ".".join(map(str, sys.version_info[:3]))
    if not missing:
        yield Finding("ok", f"Python {version}, {sys.executable}")
        return
    state = "warning" if missing == ["readline"] else "wrong"
    todo = "install all of Python's standard library"
    if os.path.exists("/etc/debian_version"):
        todo = "apt-get install python3"
    elif os.path.exists("/etc/openwrt_release"):
        todo = "opkg install python3"
    yield Finding(state, f"Python {version} has no {', '.join(missing)}", todo)


def check_links(house: House) -> object:
    """Whether the host's names for its mail system lead to us."""
    if house.settings.root:
        yield Finding("ok", "a private instance has none")
        return
    todo, is_installed = own_command(house, "install"), os.path.exists(MANIFEST)
    for path in LINKS:
        real = os.path.realpath(path)
        if not os.path.lexists(path):
            yield Finding("warning", f"{path} is not there", todo)
        elif not os.path.exists(path):
            yield Finding("wrong", f"{path} leads to {real}, which is gone", todo)
        elif os.path.basename(real) != "minimta.py":
            state = "wrong" if is_installed else "warning"
            yield Finding(state, f"{path} is another program, {real}", todo)
        else:
            yield Finding("ok", f"{path} is minimta")


def check_cron(house: House) -> object:
    """Whether cron, with its small PATH, finds a sendmail that works."""
    import subprocess

    if house.settings.root:
        yield Finding("ok", "not for a private instance")
        return
    path = LINKS[0]
    try:
        done = subprocess.run(
            [path, "-bP"],
            env={"PATH": CRON_PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=TRY_TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "strerror", None) or "it takes too long"
        yield Finding("wrong", f"{path}: {why}", own_command(house, "install"))
        return
    if done.returncode:
        why = printable(os_text(done.stderr).strip(), 200)
        yield Finding("wrong", f"{path} fails for cron: {why}", "see the line above")
    else:
        yield Finding("ok", f"{path} works with PATH={CRON_PATH}")


def check_spool(house: House) -> object:
    """Whether the queue's directories have their owners and modes."""
    spool, owner = house.spool(), queue_owner(house.settings, house.users)
    if not os.path.isdir(spool.path("queue")):
        why = f"{spool.directory} is not there yet: the daemon makes it"
        yield Finding("warning", why, own_command(house, "serve"))
        return
    bad = 0
    for name, mode in FOLDERS:
        path = spool.path(name)
        try:
            seen = os.lstat(path)
        except OSError as error:
            bad += 1
            yield Finding("wrong", f"{path}: {error.strerror}", "restart the daemon")
            continue
        uid = owner.uid
        if os.geteuid() == 0 and name == "maildrop":
            uid = 0
        if seen.st_mode & 0o7777 != mode:
            bad += 1
            shown = f"mode {seen.st_mode & 0o7777:04o}, not {mode:04o}"
            yield Finding("wrong", f"{path} has {shown}", f"chmod {mode:04o} {path}")
        if seen.st_uid != uid and os.geteuid() == 0:
            bad += 1
            yield Finding(
                "wrong", f"{path} belongs to uid {seen.st_uid}", f"chown {uid} {path}"
            )
    if not bad:
        yield Finding("ok", f"{spool.directory} is as it should be")


def check_daemon(house: House) -> object:
    """Whether the daemon answers, and is well."""
    why = daemon_ails(house.settings)
    todo = own_command(house, "serve")
    has_unit = os.path.exists("/etc/systemd/system/minimta.service")
    if has_unit and not house.settings.root:
        todo = "systemctl restart minimta"
    yield Finding("wrong", why, todo) if why else Finding("ok", "it answers")


def check_port(house: House) -> object:
    """Whether the listening addresses are ours, or free."""
    import socket

    settings = house.settings
    for address in settings.listen_on:
        shown = f"[{address}]" if ":" in address else address
        place = f"{shown}:{settings.smtpd_port}"
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        try:
            there = (near, settings.smtpd_port)
            connection = socket.create_connection(there, TRY_TIMEOUT)
        except OSError:
            yield Finding("ok", f"{place}: nobody listens")
            continue
        with connection:
            try:
                greeting = os_text(connection.recv(512))
            except OSError:
                greeting = "it says nothing"
        if greeting.startswith(f"220 {settings.myhostname} ") and "minimta" in greeting:
            yield Finding("ok", f"{place} is ours")
        else:
            why = f"{place} is another's: {printable(greeting.strip(), 100)}"
            yield Finding("wrong", why, "stop it, or set smtpd_port")


def check_settings_files(house: House) -> object:
    """Whether the settings, maps and password files can be used."""
    settings = house.settings
    problems = check_settings(house)
    for text in problems:
        _, _, todo = text.rpartition(": ")
        if os.geteuid() and "Permission denied" in text:
            yield Finding("warning", text, AS_ROOT)
            continue
        yield Finding("wrong", text, todo if todo.startswith("chmod") else "mend it")
    path = settings.smtpd_sasl_password_file
    if path and os.path.exists(path) and os.stat(path).st_mode & 0o007:
        yield Finding("wrong", f"{path}: anybody can read it", f"chmod o= {path}")
    elif not problems:
        yield Finding("ok", "they can be used")


def check_alias_files(house: House) -> object:
    """Whether the aliases files are valid, their databases current."""
    for path in house.settings.map_paths("alias_maps"):
        if not os.path.exists(path):
            yield Finding("ok", f"{path} is not there, nor needed")
            continue
        said: list[str] = []
        database = AliasDatabase(path, said.append)
        table = database.read_text()
        found = [(line, reason, "wrong") for line, reason in table.problems]
        for line, reason in alias_warnings(house, path, table):
            found.append((line, reason, "warning"))
        for line, reason, state in sorted(found):
            where = f"{path}, line {line}" if line else path
            todo = f"edit {path}, then newaliases"
            yield Finding(state, f"{where}: {reason}", todo)
        database.lookup(["postmaster"])
        for text in said:
            yield Finding("warning", text, "newaliases")
        if not found and not said:
            state = "its database" if database.has_database else "no database: its text"
            yield Finding("ok", f"{path} is valid; {state} is used")


def check_root(house: House) -> object:
    """Whether what is written to root gets to a person."""
    for name in ("root", "postmaster"):
        _, found = explain(house, Address(name))
        errors = [one.error for one in found if one.error]
        todo = "put 'root: you' into the aliases file, then newaliases"
        if errors:
            yield Finding("wrong", f"mail for {name}: {errors[0].text}", todo)
        elif any(one.user and one.user.uid == 0 for one in found):
            text = f"mail for {name} stays in root's mailbox"
            yield Finding("warning", text, todo)
        else:
            where = ", ".join(one.target for one in found)
            yield Finding("ok", f"mail for {name} goes to {printable(where, 100)}")


def check_name(house: House) -> object:
    """Whether this host has a name that others can believe."""
    name = house.settings.myhostname
    if "." in name and name.rpartition(".")[2] not in LOCAL_NAMES:
        yield Finding("ok", name)
    else:
        todo = "set myhostname = host.example.com in /etc/minimta.conf"
        yield Finding("warning", f"{name} is no name in the world", todo)


def check_names(house: House) -> object:
    """Whether a name server answers."""
    resolver = Resolver(house.settings.root)
    path = resolver.files["resolv.conf"]
    if not resolver.servers:
        yield Finding("warning", f"{path} names no server", f"edit {path}")
        return
    try:
        resolver.mail_hosts(KNOWN_DOMAIN)
    except MailError as error:
        if error.is_temporary:
            yield Finding("wrong", f"{path}: {error.text}", f"edit {path}")
            return
    yield Finding("ok", f"the servers of {path} answer")


def try_port(outbox: Outbox) -> Finding:
    """Whether port 25 of another network can be reached."""
    import socket

    try:
        hosts = outbox.resolver.mail_hosts(KNOWN_DOMAIN)
        address = next(address for host in hosts for address in host.addresses)
        with socket.create_connection((address, PORTS["smtp"]), TRY_TIMEOUT):
            return Finding("ok", "port 25 of other hosts can be reached")
    except (MailError, StopIteration):
        return Finding("warning", "whether mail can leave cannot be told: no DNS")
    except OSError:
        todo = "set relayhost = [smarthost]:587 in /etc/minimta.conf"
        return Finding("warning", "port 25 of other hosts is closed to us", todo)


def check_way_out(house: House) -> object:
    """Whether mail can leave: the relayhosts let us in, or port 25 is open."""
    settings = house.settings
    if settings.capture:
        yield Finding("ok", "nothing leaves: capture is on")
        return
    outbox = Outbox(None, settings, house.spool(), read_secrets(settings))
    if not settings.relayhost:
        yield try_port(outbox)
        return
    for hop in house.router().hops(Address("anyone", KNOWN_DOMAIN), ""):
        try:
            relay = outbox.reach(str(hop), [], [])
        except MailError as error:
            todo = "mend relayhost or what it names, see explain --from root ADDRESS"
            if error.status == "4.7.8" and "TLS" not in error.text:
                todo = "mend the login: smtp_sasl_password_maps or _command"
            yield Finding("wrong", error.text, todo)
            continue
        login = outbox.secrets.find(hop)
        relay.quit()
        who = f", as {login[0]}" if login else ""
        yield Finding("ok", f"{relay.name} lets us in{who}; {relay.tls or 'no TLS'}")


def check_clock(house: House) -> object:
    """Whether the clock is not behind what it has seen."""
    newest, path = 0.0, ""
    for name in (__file__, house.settings.queue_directory, "/etc/passwd"):
        try:
            when = os.stat(name).st_mtime
        except OSError:
            continue
        newest, path = max((newest, path), (when, name))
    if time.time() < newest - MINUTE:
        todo = "set it: timedatectl set-ntp true, or date"
        yield Finding("wrong", f"the clock is behind: {path} is of the future", todo)
    else:
        yield Finding("ok", f"it is {rfc_date(time.time())}")


def check_disk(house: House) -> object:
    """Whether the disks of queue and mailboxes have room."""
    settings = house.settings
    for path in (settings.queue_directory, settings.mail_spool_directory):
        if not os.path.isdir(path):
            yield Finding("ok", f"{path} is not there yet")
            continue
        try:
            seen = os.statvfs(path)
        except OSError as error:
            yield Finding("warning", f"{path}: {error.strerror}")
            continue
        free, least = seen.f_bavail * seen.f_frsize, settings.queue_minfree
        if free < least:
            why = f"{path}: {free >> 20} MB free, {least >> 20} are needed"
            yield Finding("wrong", why, f"make room, see df -h {path}")
        elif seen.f_files and seen.f_favail < FEW_INODES:
            why = f"{path}: {counted(seen.f_favail, 'inode')} left"
            yield Finding("wrong", why, f"remove files, see df -i {path}")
        else:
            yield Finding("ok", f"{path}: {free >> 20} MB free")


def check_queue(house: House) -> object:
    """Whether mail waits long, or piles up."""
    now, count, fresh, oldest = time.time(), 0, 0, time.time()
    for entry in queue_entries(house):
        count += 1
        arrived = entry.envelope.arrived
        fresh += arrived > now - HOUR
        oldest = min(oldest, arrived)
    text = f"{counted(count)} in it, {fresh} of the last hour"
    if count and oldest < now - OLD_MAIL:
        text += f", one since {rfc_date(oldest)}"
        yield Finding("warning", text, "mailq, then minimta.py trace ID")
    elif fresh > MANY_LETTERS:
        yield Finding("warning", text, "minimta.py queue summary")
    else:
        yield Finding("ok", text)


def check_mailboxes(house: House) -> object:
    """Whether each mailbox is its user's, and nobody else's."""
    folder, bad = house.settings.mail_spool_directory, 0
    if not os.path.isdir(folder):
        yield Finding("ok", f"{folder} is not there yet")
        return
    for name in sorted(os.listdir(folder)):
        path, user = f"{folder}/{name}", house.users.exact(name)
        seen = os.lstat(path)
        if user is None:
            continue  # a lock, or of a user who is no more
        if not stat.S_ISREG(seen.st_mode) and not stat.S_ISDIR(seen.st_mode):
            todo = f"move {path} away"
            yield Finding("wrong", f"{path} is no mailbox: mail waits", todo)
        elif seen.st_uid != user.uid:
            why = f"{path} belongs to uid {seen.st_uid}"
            yield Finding("wrong", why, f"chown {user.uid} {path}")
        elif stat.S_ISREG(seen.st_mode) and seen.st_nlink != 1:
            why = f"{path} has more than one name: mail waits"
            yield Finding("wrong", why, "remove the other: find -samefile shows it")
        elif seen.st_mode & 0o007:
            yield Finding("warning", f"{path}: anybody may use it", f"chmod o= {path}")
        else:
            continue
        bad += 1
    if not bad:
        yield Finding("ok", f"those in {folder} are their users'")


def check_forwards(house: House) -> object:
    """Whether a .forward is ignored."""
    if os.geteuid():
        yield Finding("warning", "only root can look at all of them", AS_ROOT)
        return
    files, bad, homes = TargetFiles(house.users), 0, set()
    for name in house.users.names():
        user = house.users.lookup(name)
        if user is None or user.home in homes:
            continue
        homes.add(user.home)
        try:
            ignored = files.forward(user, "")[2]
        except MailError:
            continue  # a home that is not there
        for why in ignored:
            bad += 1
            path = f"{user.home}/.forward"
            todo = f"chown {name} {path}; chmod go-w {path} {user.home}"
            yield Finding("warning", f"{why}: not used, mail goes to the mailbox", todo)
    if not bad:
        yield Finding("ok", "none is ignored")


CHECKS = {
    "python": check_python,
    "links": check_links,
    "cron": check_cron,
    "settings": check_settings_files,
    "spool": check_spool,
    "daemon": check_daemon,
    "port": check_port,
    "aliases": check_alias_files,
    "root": check_root,
    "name": check_name,
    "resolver": check_names,
    "way out": check_way_out,
    "clock": check_clock,
    "disk": check_disk,
    "queue": check_queue,
    "mailboxes": check_mailboxes,
    "forward": check_forwards,
}


def look_at(check: object, house: House) -> list[Finding]:
    """What a check finds, the first of it; that it fails is a finding too."""
    found = []
    try:
        for finding in check(house):
            found.append(finding)
            if len(found) == MAX_FINDINGS:
                found.append(Finding(finding.state, "and more of this kind"))
                break
    except ImportError as error:
        why = f"cannot be looked at: Python has no {error.name}"
        found.append(Finding("wrong", why, "install all of Python's library"))
    except (MailError, ProgramError, OSError) as error:
        why = getattr(error, "text", None) or str(error)
        found.append(Finding("wrong", why, "mend that, or run as root"))
    return found


def cmd_doctor(args: list[str], environ: dict) -> int:
    """usage: minimta.py doctor [-C FILE] [--json]

    Looks at everything that mail on this host needs: each thing is ok, a
    warning or wrong, with the command that mends it. Sends nothing, changes
    nothing. Exit 0, or 1 if something is wrong.
    """
    options, words = read_flags(args, "C:", ["json"])
    if words:
        why = f"{printable(words[0], 60)}: no such argument: see doctor --help"
        raise ProgramError(EX_USAGE, why)
    house, is_wrong = House(environ, options.get("-C", "")), False
    for name, check in CHECKS.items():
        for one in look_at(check, house):
            is_wrong |= one.state == "wrong"
            text = f"{one.state:<8} {name}: {printable(one.text)}\n"
            text += f"{'':8} -> {printable(one.todo)}\n" if one.todo else ""
            if "--json" in options:
                import json  # 5 ms; only --json needs it

                row = dict(zip(("check", *Finding.__slots__), (name, *one.fields())))
                text = json.dumps(row) + "\n"
            write_all(1, os_bytes(text))
    return 1 if is_wrong else EX_OK


# == 38 Installation: Manifest, Installer, cmd_install, cmd_uninstall =========
# From nothing to a host whose mail works, and back. What is done is written
# into the manifest before it is done, so that whatever was cut short can be
# done again, or undone. Source: dpkg-divert(1), alternatives(8),
# mailwrapper(8).
# Failures: ProgramError EX_NOPERM, EX_CANTCREAT, EX_OSERR.

ROOTS_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
ASIDE = ".minimta-new"  # what follows the name of a file that is being written
SAVED = ".minimta-saved"  # what follows the name of a file that is moved away
MAILER_CONF = "/etc/mail/mailer.conf"  # of BSD's mailwrapper
MAILERS_WRAPPED = ("sendmail", "newaliases", "mailq")
FIRST_ALIASES = """\
# Who gets whose mail; see newaliases(1). After a change run newaliases.
postmaster: root
# root: you
"""
CRONTAB = "*/5 * * * * root /usr/sbin/sendmail -q"

# The service for systemd; {program} is where minimta.py is.
UNIT = """\
[Unit]
Description=minimta, the mail system of this host
Documentation=man:minimta(8)
After=network.target nss-lookup.target

[Service]
Type=notify
ExecStart={program} serve
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
UMask=0077
TasksMax=4096
LimitNOFILE=8192
CapabilityBoundingSet=CAP_NET_BIND_SERVICE CAP_SETUID CAP_SETGID CAP_CHOWN
CapabilityBoundingSet=CAP_FOWNER CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_KILL
NoNewPrivileges=yes
ProtectSystem=full
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictRealtime=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""
# The same for OpenRC.
OPENRC = """\
#!/sbin/openrc-run
description="minimta, the mail system of this host"
command="{program}"
command_args="serve"
command_background="yes"
pidfile="/run/minimta.pid"
extra_started_commands="reload"

depend() {{
    need localmount
    use net dns logger
    provide mta
}}

reload() {{
    start-stop-daemon --signal HUP --pidfile "$pidfile"
}}
"""


def man_page(programs: dict) -> str:
    """The manual page: name -> program, in the programs' own words."""
    rows = ['.TH MINIMTA 8 "" "minimta ' + __version__ + '"', ".SH NAME"]
    rows += ["minimta \\- the whole mail system of a small host", ".SH SYNOPSIS"]
    rows += [".nf", "minimta COMMAND [arguments]", ".fi", ".SH COMMANDS"]
    for name, program in programs.items():
        text = (program.__doc__ or "").strip("\n").replace("\\", "\\e")
        rows += [f".SS {name}", ".nf"]
        rows += [f"\\&{line.removeprefix('    ')}" for line in text.split("\n")]
        rows.append(".fi")
    rows += [".SH FILES", ".nf", "/etc/minimta.conf, /etc/aliases, ~/.forward"]
    rows += ["/var/spool/minimta, /var/mail", ".fi", ".SH SETTINGS"]
    for row in SETTINGS:
        rows += [".TP", f".B {row.name} = {row.default}", f"\\&{row.meaning}"]
    return "\n".join(rows) + "\n"


def stub_package() -> bytes:
    """A Debian package of nothing, that provides mail-transport-agent."""
    import gzip
    import io
    import tarfile

    control = f"""\
Package: minimta-stub
Version: {__version__}
Architecture: all
Maintainer: root <root@localhost>
Section: mail
Priority: optional
Provides: default-mta, mail-transport-agent
Description: stands for minimta, which is installed without a package
 Has nothing in it. It keeps apt from installing another mail system where
 a package wants one. Made by `minimta install --stub-deb`.
"""

    def packed(files: dict[str, bytes]) -> bytes:
        """A tar of some files, compressed; the same each time."""
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return gzip.compress(raw.getvalue(), mtime=0)

    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": packed({"./control": os_bytes(control)}),
        "data.tar.gz": packed({}),
    }
    found = b"!<arch>\n"
    for name, data in parts.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(data):<10}`\n"
        found += os_bytes(head) + data + b"\n" * (len(data) % 2)
    return found


def remove(path: str) -> None:
    """Removes a file or a link, if it is there. OSError."""
    if os.path.lexists(path):
        os.unlink(path)


def put_file(path: str, data: bytes, mode: int) -> None:
    """Writes a file that is either the old one or the new one. OSError."""
    aside = path + ASIDE
    remove(aside)  # what a kill left, or somebody put there
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(aside, path)
    sync_folder(os.path.dirname(path))


class Manifest:
    """What was done to a host, oldest first: lines of a kind and its words."""

    def __init__(self, path: str) -> None:
        self.path = path

    def rows(self) -> list[list[str]]:
        """The lines, as words. Raises ProgramError."""
        try:
            with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().split("\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ProgramError(EX_NOPERM, f"{self.path}: {error.strerror}") from None
        # A crash may have left half a line: what it was about was not begun.
        return [line.split("\t") for line in lines[:-1] if line]

    def marks(self, path: str) -> list[str]:
        """The digests of what was ever written to a file."""
        return [row[2] for row in self.rows() if row[:2] == ["file", path]]

    def add(self, *words: str) -> None:
        """A line, durable before what it says is done; once."""
        rows = self.rows()
        if list(words) not in rows:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self.write([*rows, list(words)])

    def write(self, rows: list[list[str]]) -> None:
        """All lines anew; without any the file goes, and its folder."""
        if rows:
            text = "".join("\t".join(row) + "\n" for row in rows)
            put_file(self.path, os_bytes(text), 0o644)
            return
        for path in (self.path, self.path + ASIDE):
            remove(path)
        try:
            os.rmdir(os.path.dirname(self.path))
        except OSError:
            return  # something else is in it


def content(path: str) -> bytes:
    """What a file has in it; b"" for one that is not there. OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def digest(data: bytes) -> str:
    """What tells whether a file is still as we made it."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


class Installer:
    """Puts minimta onto a host, or takes it away; says each thing it does.

    Below `destdir` only files are made, for packagers. `is_dry` only says.
    """

    def __init__(self, environ: dict, destdir: str, prefix: str, is_dry: bool) -> None:
        self.environ = environ
        self.manual = ""
        path = f"{environ.get('PATH', '')}:{ROOTS_PATH}"  # su gives less
        self.env = {**environ, "PATH": path.lstrip(":")}
        self.destdir = destdir.rstrip("/")
        self.home = f"{prefix.rstrip('/')}/lib/minimta"
        self.share = f"{prefix.rstrip('/')}/share"
        self.command = f"{prefix.rstrip('/')}/sbin/minimta"
        self.program = f"{self.home}/minimta.py"
        self.is_dry = is_dry
        self.manifest = Manifest(self.destdir + MANIFEST)
        self.count = 0  # things that were to be done
        self.is_kept = False  # whether what was to be undone stays
        self.gone: set[str] = set()  # folders that are removed, or would be

    def begins(self, text: str) -> bool:
        """Says what is done, or would be; whether it is to be done."""
        self.count += 1
        self.tell(f"{'would ' * self.is_dry}{text}")
        return not self.is_dry

    def tell(self, text: str) -> None:
        """A line; that nobody reads it any more stops no half of the work."""
        try:
            write_all(1, os_bytes(f"{text}\n"))
        except BrokenPipeError:
            return

    def run(self, *words: str) -> bool:
        """Runs a program of the system's, silently; whether it succeeded."""
        import subprocess

        try:
            done = subprocess.run(words, capture_output=True, check=False, env=self.env)
        except OSError:
            return False
        return done.returncode == 0

    def has(self, program: str) -> bool:
        """Whether the host has a program, and may be changed by it."""
        import shutil

        found = shutil.which(program, path=self.env["PATH"])
        return not self.destdir and found is not None

    # There

    def install(self) -> None:
        """Everything, in the order in which it is needed."""
        os.umask(0o022)  # it is for everybody
        self.put_program()
        for path in (*LINKS, self.command):
            self.link(path)
        self.wrap()
        self.put(f"{self.share}/man/man8/minimta.8", os_bytes(self.manual))
        if not self.destdir:
            self.make_user()
            if not os.path.exists("/etc/aliases"):
                self.put("/etc/aliases", os_bytes(FIRST_ALIASES))
            self.make_queue()
        self.make_service()

    def put_program(self) -> None:
        """The file, with the Python that reads it now; and its byte code."""
        text = content(os.path.realpath(__file__))
        # From here on no PATH decides which Python it is.
        head, pin, rest = text.partition(b"\npinned=")
        python = os_bytes(sys.executable or "")
        text = head + pin + python + rest[rest.index(b"\n") :]
        self.put(self.program, text, 0o755)
        folder = f"{self.home}/__pycache__"
        if not (self.destdir or self.is_dry):
            self.manifest.add("tree", folder)
            self.run(self.program, "--version")

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A file of ours, if it is not there as it should be."""
        place = self.destdir + path
        old = content(place)
        if old == data and os.stat(place).st_mode & 0o777 == mode:
            return
        marks = self.manifest.marks(path)
        if old and marks and digest(old) not in marks and path != self.program:
            self.keep(path, "it was changed")
            return
        if self.begins(f"write {path}"):
            self.make_folders(os.path.dirname(path))
            self.manifest.add("file", path, digest(data))
            put_file(place, data, mode)

    def make_folders(self, path: str) -> None:
        """A folder and those above it, each in the manifest if it is new."""
        if not path.strip("/") or os.path.isdir(self.destdir + path):
            return
        self.make_folders(os.path.dirname(path))
        self.manifest.add("folder", path)
        os.makedirs(self.destdir + path, exist_ok=True)
        os.chmod(self.destdir + path, 0o755)

    def is_ours(self, path: str) -> bool:
        """Whether a path is a link to our program."""
        return self.leads_to(path) == self.program

    def leads_to(self, path: str) -> str:
        """Where a link leads, "" for what is none."""
        place = self.destdir + path
        return os.readlink(place) if os.path.islink(place) else ""

    def link(self, path: str) -> None:
        """A name of the program's; what has it now is moved away."""
        if self.is_ours(path):
            return
        if self.is_alternative(path):
            self.take_alternative(path)
            return
        if ["link", path, self.leads_to(path)] not in self.manifest.rows():
            self.move_away(path)  # it is not ours of another prefix
        if self.begins(f"link {path} to {self.program}"):
            self.make_folders(os.path.dirname(path))
            self.manifest.add("link", path, self.program)
            aside = f"{self.destdir}{path}{ASIDE}"
            remove(aside)
            os.symlink(self.program, aside)
            os.replace(aside, self.destdir + path)

    def move_away(self, path: str) -> None:
        """Makes room: by dpkg, for good, or by renaming."""
        saved = path + SAVED
        if self.has("dpkg-divert") and path in LINKS:
            if self.begins(f"divert {path} to {saved}, for any package"):
                self.manifest.add("diverted", path)
                words = ("--local", "--rename", "--divert", saved, "--add", path)
                if not self.run("dpkg-divert", *words):
                    why = f"dpkg-divert {path} failed: run it by hand, then install"
                    raise ProgramError(EX_OSERR, why)
            return
        is_there = os.path.lexists(self.destdir + path)
        if is_there and self.begins(f"move {path} to {saved}"):
            self.manifest.add("moved", path)
            os.rename(self.destdir + path, self.destdir + saved)

    def is_diverted(self, path: str) -> bool:
        """Whether dpkg still knows of our diversion."""
        import subprocess

        words = ["dpkg-divert", "--truename", path]
        found = subprocess.run(words, capture_output=True, check=False, env=self.env)
        return os_text(found.stdout).strip() == path + SAVED

    def is_alternative(self, path: str) -> bool:
        """Whether `alternatives` rules a path, and not dpkg."""
        is_ruled = "/alternatives/mta" in self.leads_to(path)
        return is_ruled and self.has("alternatives") and not self.has("dpkg-divert")

    def take_alternative(self, path: str) -> None:
        """Ours becomes the alternative; the other names follow the first."""
        if path != LINKS[0] or self.is_chosen():
            return
        if not self.begins("make minimta the alternative for mta"):
            return
        words = []
        for link in LINKS:
            place = self.leads_to(link)
            if "/alternatives/mta" in place:
                own = f"{self.home}/{os.path.basename(link)}"
                self.manifest.add("link", own, self.program)
                if not os.path.lexists(own):
                    os.symlink(self.program, own)
                kind = "--slave" if words else "--install"
                name = os.path.basename(place)
                words += [kind, link, name, own] + ([] if words else ["1000"])
        own = f"{self.home}/sendmail"
        self.manifest.add("alternative", own)
        self.run("alternatives", *words)
        self.run("alternatives", "--set", "mta", own)
        if not self.is_chosen():
            raise ProgramError(EX_OSERR, "alternatives --install mta failed")

    def is_chosen(self) -> bool:
        """Whether the alternative for mta is ours."""
        return os.path.realpath(LINKS[0]) == os.path.realpath(self.program)

    def wrap(self) -> None:
        """On a BSD: mailwrapper calls us, by its own file."""
        if self.destdir or not os.path.exists(MAILER_CONF):
            return
        rows = [f"{name}\t{self.program}\n" for name in MAILERS_WRAPPED]
        data = os_bytes("".join(rows))
        if content(MAILER_CONF) != data:
            self.move_away(MAILER_CONF)
            self.put(MAILER_CONF, data)

    def make_user(self) -> None:
        """A user for the queue; where that fails, daemon will do."""
        if Users().exact("minimta"):
            return
        ways = (
            ("useradd", "--system", "--no-create-home", "--user-group"),
            ("adduser", "-S", "-D", "-H"),
        )
        for name, *words in ways:
            if self.has(name):
                shell = ("-d", "/nonexistent", "-s", "/usr/sbin/nologin")
                if name == "adduser":
                    shell = ("-h", "/nonexistent", "-s", "/sbin/nologin")
                if self.begins("make the user minimta"):
                    self.manifest.add("user", "minimta")
                    self.run(name, *words, *shell, "minimta")
                return

    def make_queue(self) -> None:
        """The queue's directories."""
        house = House(self.environ)
        directory = house.settings.queue_directory
        folders = [f"{directory}/{name}" for name, _ in FOLDERS]
        if all(map(os.path.isdir, folders)):
            owner = queue_owner(house.settings, house.users)
            if os.stat(f"{directory}/queue").st_uid == owner.uid:
                return
        if self.begins(f"make the queue {directory}"):
            self.make_folders(os.path.dirname(directory))
            self.manifest.add("queue", directory)
            house.spool().make()

    def make_service(self) -> None:
        """Has the daemon start with the host; where nothing does, a hint."""
        unit = os_bytes(UNIT.format(program=self.program))
        if self.destdir:
            folder = f"{os.path.dirname(os.path.dirname(self.home))}/lib/systemd/system"
            self.put(f"{folder}/minimta.service", unit)
        elif os.path.isdir("/run/systemd/system"):
            self.put("/etc/systemd/system/minimta.service", unit)
            self.start("systemctl", ("daemon-reload",), ("enable", "minimta"))
        elif os.path.exists("/sbin/openrc-run"):
            script = os_bytes(OPENRC.format(program=self.program))
            self.put("/etc/init.d/minimta", script, 0o755)
            self.start("rc-update", ("add", "minimta"))
        else:
            text = f"no systemd and no OpenRC here: run {self.program} serve, or add"
            self.tell(f"{text} to /etc/crontab:\n{CRONTAB}")

    def start(self, program: str, *orders: tuple) -> None:
        """The service, from now on and at each start of the host."""
        done = ["started", program] in self.manifest.rows()
        if self.is_dry or done and not self.count:
            return
        self.manifest.add("service", program)
        for order in orders:
            self.run(program, *order)
        self.begins("start the daemon")
        words = ("systemctl", "restart", "minimta")
        if program != "systemctl":
            words = ("rc-service", "minimta", "restart")
        if not self.run(*words):
            self.tell("the daemon did not start: see minimta doctor")
        self.manifest.add("started", program)

    # And back

    def uninstall(self) -> None:
        """Undoes what the manifest says, the last thing first."""
        rows = self.manifest.rows()
        if not rows and not os.path.lexists(self.manifest.path + ASIDE):
            why = "it is not installed here: there is nothing to do"
            raise ProgramError(EX_UNAVAILABLE, why)
        left = []
        for kind, *words in reversed(rows):
            self.is_kept = False
            self.UNDO[kind](self, *words)
            if self.is_kept:
                left.insert(0, [kind, *words])
        if not self.is_dry:
            self.manifest.write(left)

    def keep(self, path: str, why: str) -> None:
        """Something that stays, and may go another time."""
        self.is_kept = True
        self.tell(f"kept {path}: {why}")

    def undo_file(self, path: str, _: str) -> None:
        """A file of ours goes, unless somebody has changed it."""
        place = self.destdir + path
        self.remove_aside(path)
        if not os.path.lexists(place):
            return
        if digest(content(place)) not in self.manifest.marks(path):
            self.keep(path, "it was changed")
            return
        if not self.begins(f"remove {path}"):
            return
        os.unlink(place)
        if path == "/etc/aliases":
            for name in AliasDatabase(path).files:
                remove(name)
        if path.endswith(".service"):
            self.run("systemctl", "daemon-reload")

    def remove_aside(self, path: str) -> None:
        """What was half written when somebody killed us."""
        if not self.is_dry:
            remove(self.destdir + path + ASIDE)

    def undo_folder(self, path: str) -> None:
        """A folder of ours goes, if nothing is in it."""
        if not self.is_dry:
            try:
                os.rmdir(self.destdir + path)
            except OSError:
                return

    def undo_tree(self, path: str) -> None:
        """Byte code goes."""
        import shutil

        if not self.is_dry:
            shutil.rmtree(self.destdir + path, ignore_errors=True)

    def undo_link(self, path: str, program: str) -> None:
        """A link of ours goes, not what took its place."""
        self.remove_aside(path)
        if self.leads_to(path) == program and self.begins(f"remove {path}"):
            os.unlink(self.destdir + path)

    def undo_move(self, path: str) -> None:
        """What was moved away comes back."""
        place = self.destdir + path
        if not os.path.lexists(place + SAVED):
            return
        if os.path.lexists(place) and not self.is_dry:
            self.keep(path + SAVED, f"{path} is somebody's")
            return
        if self.begins(f"move {path}{SAVED} back to {path}"):
            os.rename(place + SAVED, place)

    def undo_diversion(self, path: str) -> None:
        """dpkg puts the file back that it diverted."""
        if not self.is_diverted(path):
            return
        if os.path.lexists(path) and not self.is_dry:
            self.keep(path + SAVED, f"{path} is somebody's")
            return
        if self.begins(f"divert {path} no more"):
            words = ("--local", "--rename", "--divert", path + SAVED, "--remove", path)
            self.run("dpkg-divert", *words)

    def undo_alternative(self, own: str) -> None:
        """Another alternative for mta takes over."""
        if self.begins("leave the alternatives for mta"):
            self.run("alternatives", "--remove", "mta", own)

    def undo_user(self, name: str) -> None:
        """The user goes, unless mail is left that belongs to it."""
        directory = House(self.environ).settings.queue_directory
        if os.path.isdir(directory) and directory not in self.gone:
            self.keep(f"the user {name}", "the queue is there")
            return
        if self.begins(f"remove the user {name}"):
            self.run("userdel", name) or self.run("deluser", name)

    def undo_queue(self, directory: str) -> None:
        """The queue goes if it is empty; mail is never removed."""
        import shutil

        if SubmitSocket(directory).connect():
            self.keep(directory, "its daemon runs: stop it, then uninstall again")
            return
        count = 0
        for folder in ("queue", "hold", "maildrop", "corrupt", "incoming"):
            try:
                count += len(os.listdir(f"{directory}/{folder}"))
            except OSError:
                continue
        if count:
            self.keep(directory, f"{counted(count)} in it")
            return
        self.gone.add(directory)
        if self.begins(f"remove the queue {directory}, it is empty"):
            shutil.rmtree(directory, ignore_errors=True)

    def undo_service(self, program: str) -> None:
        """The daemon stops, and does not come back."""
        if not self.begins("stop the daemon"):
            return
        if program == "systemctl":
            self.run("systemctl", "disable", "--now", "minimta")
        else:
            self.run("rc-service", "minimta", "stop")
            self.run("rc-update", "del", "minimta")

    def undo_nothing(self, _: str) -> None:
        """A line that only says how far an install came."""

    UNDO = {
        "started": undo_nothing,
        "file": undo_file,
        "folder": undo_folder,
        "tree": undo_tree,
        "link": undo_link,
        "moved": undo_move,
        "diverted": undo_diversion,
        "alternative": undo_alternative,
        "user": undo_user,
        "queue": undo_queue,
        "service": undo_service,
    }


# What the manual page has, in this order.
MANUAL = {
    "sendmail": cmd_sendmail,
    "newaliases": cmd_newaliases,
    "mailq": cmd_mailq,
    "mail": cmd_mail,
    "serve": cmd_serve,
    "queue": cmd_queue,
    "explain": cmd_explain,
    "trace": cmd_trace,
    "config": cmd_config,
    "health": cmd_health,
    "import": cmd_import,
    "doctor": cmd_doctor,
}
# --print WORD -> what is printed.
PRINTED = {
    "man": lambda installer: installer.manual,
    "unit": lambda installer: UNIT.format(program=installer.program),
    "openrc": lambda installer: OPENRC.format(program=installer.program),
    "crontab": lambda installer: CRONTAB + "\n",
}


def read_installer(args: list[str], environ: dict, more: list[str]) -> tuple:
    """(Installer, options) of a command line. Raises ProgramError."""
    options, words = read_flags(args, "n", ["dry-run", "destdir=", "prefix=", *more])
    if words:
        why = f"{printable(words[0], 60)}: no such argument: see install --help"
        raise ProgramError(EX_USAGE, why)
    destdir, prefix = options.get("--destdir", ""), options.get("--prefix", "")
    for path in (destdir, prefix):
        if path and not path.startswith("/"):
            why = f"{printable(path, 100)}: not an absolute path: begin it with /"
            raise ProgramError(EX_USAGE, why)
    is_dry = "--dry-run" in options or "-n" in options
    installer = Installer(environ, destdir, prefix or "/usr/local", is_dry)
    return installer, options


def change_host(installer: Installer, change: object, nothing: str) -> int:
    """Does what an installer is for. Raises ProgramError."""
    if os.geteuid() and not installer.destdir and not installer.is_dry:
        raise ProgramError(EX_NOPERM, "this changes the host: run as root")
    if installer.environ.get("MINIMTA_ROOT"):
        why = "a private instance needs nothing installed: unset MINIMTA_ROOT"
        raise ProgramError(EX_USAGE, why)
    try:
        change()
    except OSError as error:
        why = f"{error.filename}: {error.strerror}: mend that and run it again"
        raise ProgramError(EX_CANTCREAT, why) from None
    if not installer.count:
        write_all(1, os_bytes(f"{nothing}\n"))
    return EX_OK


def cmd_uninstall(args: list[str], environ: dict) -> int:
    """usage: minimta.py uninstall [--dry-run] [--destdir DIR]

    Takes away what install has put there and puts back what it moved away.
    Mailboxes and mail in the queue stay; what was changed since, too.
    """
    installer, _ = read_installer(args, environ, [])
    return change_host(installer, installer.uninstall, "nothing to do")


def cmd_install(args: list[str], environ: dict) -> int:
    """usage: minimta.py install [--dry-run] [--destdir DIR] [--prefix DIR]
       minimta.py install --print man|unit|openrc|crontab | --stub-deb FILE

    Puts minimta onto this host, for root: the file below PREFIX (/usr/local)
    with its Python pinned, links for sendmail, newaliases, mailq, mail and
    mailx, the queue, a user for it, /etc/aliases if there is none, the
    service. What is replaced is moved away, see uninstall. Says what it does;
    --dry-run only says it. Once more is an update. --destdir is for packagers.
    --stub-deb writes a Debian package that stands for a mail system in apt.
    """
    installer, options = read_installer(args, environ, ["print=", "stub-deb="])
    programs = {**MANUAL, "install": cmd_install, "uninstall": cmd_uninstall}
    installer.manual = man_page(programs)
    if "--print" in options:
        word = options["--print"]
        if word not in PRINTED:
            why = f"{printable(word, 60)}: not to be printed: {', '.join(PRINTED)}"
            raise ProgramError(EX_USAGE, why)
        write_all(1, os_bytes(PRINTED[word](installer)))
        return EX_OK
    if "--stub-deb" in options:
        path = os.path.abspath(options["--stub-deb"])
        try:
            put_file(path, stub_package(), 0o644)
        except OSError as error:
            why = f"{path}: {error.strerror}: name a file that can be made"
            raise ProgramError(EX_CANTCREAT, why) from None
        write_all(1, os_bytes(f"write {path}: apt-get install {path}\n"))
        return EX_OK
    return change_host(installer, installer.install, "everything is in place")


# == 39 Dispatch: PROGRAMS, main ==============================================
# By what name it was called; and the one place that ends in words.

PROGRAMS = {
    "sendmail": cmd_sendmail,
    "newaliases": cmd_newaliases,
    "mailq": cmd_mailq,
    "mail": cmd_mail,
    "mailx": cmd_mail,
    "Mail": cmd_mail,
    "send-mail": cmd_sendmail,
    "serve": cmd_serve,
    "explain": cmd_explain,
    "trace": cmd_trace,
    "config": cmd_config,
    "health": cmd_health,
    "import": cmd_import,
    "doctor": cmd_doctor,
    "install": cmd_install,
    "uninstall": cmd_uninstall,
    "queue": cmd_queue,
    "postqueue": cmd_postqueue,
    "postsuper": cmd_postsuper,
    "postcat": cmd_postcat,
    "postalias": cmd_postalias,
    "exim": cmd_exim,
    "exim4": cmd_exim,
    "qmail-qread": cmd_qread,
    "qmail-qstat": cmd_qstat,
    **{name: named(name) for name in SENDMAIL_NAMES},
}

# What to do about a message that was not taken, by whether it may be later.
ADVICE = {True: "nothing was queued, try again later", False: "nothing was queued"}


def open_standard_files() -> bool:
    """Opens /dev/null for each of 0, 1 and 2 that is closed; whether 0 was.

    Else the queue file would become standard error, and the log its text.
    """
    was_closed = False
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            was_closed |= fd == 0
            # Write-only for 0: reading it fails, as it should.
            os.open(os.devnull, os.O_RDWR if fd else os.O_WRONLY)
    return was_closed


def fault(error: Exception) -> str:
    """The words for what no program expected."""
    if isinstance(error, ImportError):
        what = f"this Python has no module {error.name}"
        return f"{what}: install the whole of python3, not a part of it"
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror}: mend that first"
    return f"{type(error).__name__}: {error}: a fault of minimta's, please report it"


ROOMS_INDEX = 1 << 17  # bytes of the index in front of the rooms' byte code


def bound_names(node: object) -> list[str]:
    """The names that a statement of this file gives to something."""
    if hasattr(node, "name"):
        return [node.name]
    if hasattr(node, "names"):
        return [alias.asname or alias.name for alias in node.names]
    found = []
    for target in getattr(node, "targets", None) or [getattr(node, "target", None)]:
        for name in getattr(target, "elts", [target]):
            found += [name.id] if hasattr(name, "id") else []
    return found


def write_rooms(path: str, target: str, mark: bytes) -> None:
    """Keeps each room's byte code by itself, for whoever enters only a few.

    `target`: the mark of this very source, then marshalled its size and where
    each name's code is, padded to a round size, and the code. Only usage texts
    keep their docstrings. Where it cannot be written, it is not.
    """
    import __future__

    import ast  # these only when byte code is made
    import marshal

    flags = __future__.annotations.compiler_flag
    with open(path, "rb") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):  # annotations are for readers
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    path = sys.intern(path)  # once in memory, not once a room
    index, blob = {}, b""
    for node in tree.body:
        names, room = bound_names(node), ast.Module([node], [])
        bare = 0 if names and names[0].startswith("cmd_") else 2
        code = marshal.dumps(compile(room, path, "exec", flags, True, bare))
        for name in names:
            index[name] = len(mark) + ROOMS_INDEX + len(blob), len(code)
        blob += code
    head = marshal.dumps((len(mark) + ROOMS_INDEX + len(blob), index))
    folder, aside = os.path.dirname(target), f"{target}.{os.getpid()}"
    try:
        if not os.path.exists(folder):
            os.mkdir(folder, 0o755)
            os.chmod(folder, 0o755)  # for everybody to read, whatever the umask
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(aside, flags, 0o644), "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(mark + head.ljust(ROOMS_INDEX, b"\0") + blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError:
        is_unlinked(aside)


def run_program(program: object, args: list[str]) -> int:
    """Runs a program, or says what it is."""
    if "--version" in args[:1]:
        return print_version()
    if "--help" in args[:1]:
        print_help(program)
        return EX_OK
    return program(args, dict(os.environ))


def main(argv: list[str]) -> int:
    """Runs the program that argv[0] names, else argv[1]; its exit code.

    The only place that turns an error into a line on stderr.
    """
    open_standard_files()
    if sys.version_info < (3, 9):  # noqa: UP036 whoever links it finds out here
        complain("minimta", "Python 3.9 is needed: write a newer one behind pinned=")
        return EX_UNAVAILABLE
    name, args = os.path.basename(argv[0]), argv[1:]
    if name not in PROGRAMS and args and args[0] in PROGRAMS:
        name, args = args[0], args[1:]
    try:
        other = cmd_help if name.startswith("minimta") else cmd_sendmail
        return run_program(PROGRAMS.get(name, other), args)
    except ProgramError as error:
        complain(name, str(error))
        return error.code
    except MailError as error:
        complain(name, f"{error.text}: {ADVICE[error.is_temporary]}")
        return error.exit_code
    except BrokenPipeError:
        return EX_OK  # whoever read our output has seen enough
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    except Exception as error:  # noqa: BLE001 a traceback is nobody's message
        complain(name, fault(error))
        kinds = ((OSError, EX_OSERR), (ImportError, EX_UNAVAILABLE))
        return next((code for k, code in kinds if isinstance(error, k)), EX_SOFTWARE)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
