#!/bin/sh
""":"

# The shell reads as far as exec; to Python these lines are text. -I keeps the
# current directory and PYTHON* out of a program that root runs, -S saves a
# search for site packages. Byte code is used only where nobody else can write.
pinned=
# A directory on standard input would end Python before a word of ours.
[ -d /dev/stdin ] && exec <&-
for python in $pinned /usr/bin/python3 /usr/local/bin/python3 python3; do
    command -v "$python" >/dev/null 2>&1 && exec "$python" -IS -c '
import os, sys
from _frozen_importlib_external import SourceFileLoader
def private(folder):
    if not os.path.exists(folder): return True
    seen = os.stat(folder)
    return seen.st_uid in (0, os.geteuid()) and not seen.st_mode & 0o022
sys.argv = sys.argv[1:]
path = os.path.realpath(sys.argv[0])
home = os.path.dirname(path)
loader = SourceFileLoader("minimta", path)
if private(home) and private(home + "/__pycache__"):
    code = loader.get_code("minimta")
else:
    code = loader.source_to_code(loader.get_data(path), path)
module = sys.modules["minimta"] = type(sys)("minimta")
module.__file__ = path
exec(code, vars(module))
sys.exit(module.main(sys.argv))
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
                                 |             `-> Lanes --> RelayJob, PipeJob
                                 `-- Reporter <-- a recipient was bounced

CONTENTS

  WORDS  text in, values out; no file, socket, clock or print
     1 Failures
     2 Settings
     3 Addresses
     4 Messages
     5 Aliases
     6 Queue words
     7 Dialogue
     8 Reports
     9 Trees
    10 Names
  HANDS  each owns one thing outside the program
    11 Log
    12 Users
    13 Spool
    14 Alias database
    15 Mailboxes
    16 Folders
    17 Commands
    18 Relay
    19 Resolver
  WORK   what is done with them
    20 Routing
    21 Delivery
    22 Queue runner
    23 SMTP server
    24 Submission
    25 Daemon
    26 Mail reader
  DOORS  the programs
    27 Programs
    28 Dispatch

LAWS

A name uses only names above it. WORDS touch nothing outside. Inside, lines
end in LF; on the wire in CRLF; a bare CR or LF from the network is refused.
A recipient is pending until it is sent, deferred (pending still) or bounced:
those are the words in the code, the log, the queue and the README.

THE QUEUE, and what a crash leaves in each state

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


def nearest(name: str, names: object) -> str:
    """`did you mean X?` for the one of `names` that is like `name`, or ""."""
    import difflib  # 12 ms; only a mistake needs it

    near = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"did you mean {near[0]}?" if near else ""


def printable(text: str, limit: int = 1000) -> str:
    """`text` on one line of at most `limit` characters, controls shown as `?`.

    For logs, reports and reasons: what came from outside can end no line and
    drive no terminal.
    """
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


class Setting(Value):
    """One row of SETTINGS; `kind` says how its text is read (see READERS)."""

    __slots__ = ("name", "kind", "default", "meaning")

    def __init__(self, name: str, kind: str, default: str, meaning: str) -> None:
        self.name = name
        self.kind = kind
        self.default = default
        self.meaning = meaning

    @property
    def is_used(self) -> bool:
        """Whether this version acts on it; if not, setting it is warned of."""
        return not self.meaning.startswith("(later)")


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
    Setting("relayhost", "text", "", "where remote mail goes: [host]:port"),
    Setting("transport_maps", "list", "", "(later) routes by recipient"),
    Setting("smtp_generic_maps", "list", "", "(later) sender rewriting"),
    Setting(
        "smtp_tls_security_level", "text", "", "(later) none, may, encrypt, verify"
    ),
    Setting("smtp_tls_CAfile", "text", "", "(later) certificates to trust"),
    Setting("smtp_sasl_password_maps", "text", "", "(later) passwords for relays"),
    Setting("smtp_sasl_password_command", "text", "", "(later) prints the password"),
    Setting("smtpd_tls_cert_file", "text", "", "(later) the listener's certificate"),
    Setting("smtpd_tls_key_file", "text", "", "(later) its key"),
    Setting("smtpd_sasl_password_file", "text", "", "(later) who may authenticate"),
    Setting("alias_maps", "list", "/etc/aliases", "the aliases files"),
    Setting("recipient_delimiter", "text", "+", "user+detail is user's mail"),
    Setting("luser_relay", "text", "", "who gets mail for unknown local users"),
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
    Setting("default_process_limit", "count", "100", "SMTP sessions at once"),
    Setting("command_time_limit", "time", "1000s", "how long a pipe may run"),
    Setting("minimal_backoff_time", "time", "300s", "shortest wait between attempts"),
    Setting("maximal_backoff_time", "time", "4000s", "longest wait between attempts"),
    Setting("maximal_queue_lifetime", "time", "5d", "then mail is bounced"),
    Setting("bounce_queue_lifetime", "time", "5d", "then a bounce is given up"),
    Setting("delay_warning_time", "time", "4h", "then the sender is warned; 0: never"),
    Setting("hopcount_limit", "count", "50", "Received lines of a looping message"),
    Setting("mail_owner", "text", "", "user of the queue: minimta, daemon or nobody"),
    Setting("default_privs", "text", "nobody", "user of commands in aliases"),
    Setting("maillog_file", "text", "", "log file; - is stdout; default: syslog"),
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
    """The words of `text`, which commas or white space set apart."""
    return tuple(text.replace(",", " ").split())


def read_count(text: str) -> int:
    """A number from 1 up. Raises ValueError."""
    return int(read_amount(text, {}) or "none at all")


def read_path(text: str) -> str:
    """An absolute path. Raises ValueError."""
    if not text.startswith("/"):
        raise ValueError(text)
    return text.rstrip("/") or "/"


READERS = {
    "text": lambda text: text,
    "path": read_path,
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
    first, pieces = 0, []
    for number, line in enumerate(text.split("\n"), 1):
        bare = strip_comment(line.rstrip("\r"))
        if not bare.strip():
            continue
        if bare[0] in " \t" and pieces:
            pieces.append(bare.strip())
            continue
        if pieces:
            yield first, " ".join(pieces)
        first, pieces = number, [bare.rstrip()]
    if pieces:
        yield first, " ".join(pieces)


def host_defaults(host: str, root: str) -> tuple[dict, dict]:
    """Defaults that hang on the host and the instance: texts, sources."""
    texts: dict[str, str] = {"myhostname": host}
    sources = {"myhostname": "the system's name"}
    if root:
        texts.update(PRIVATE_DEFAULTS)
        for row in SETTINGS:
            if row.name in BELOW_ROOT:
                texts[row.name] = root + texts.get(row.name, row.default)
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
        self.values = {row.name: self.read(row) for row in SETTINGS}

    def __getattr__(self, name: str) -> object:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

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
        text = self.expand(self.texts[row.name])
        where = self.sources.get(row.name, "settings")
        if "$" in text:
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

    @property
    def local_origin(self) -> str:
        """What follows a bare recipient's @: myorigin, if that is local.

        A bare name is a user or an alias of this host, also where senders
        are to look like somebody else's.
        """
        names = (self.myorigin, self.myhostname, *self.mydestination)
        return next(filter(self.is_local, names), self.myorigin)

    @property
    def alias_files(self) -> list[str]:
        """The aliases files, the first one first; `hash:` is taken off.

        Raises ProgramError for a kind of map that is no file.
        """
        found = []
        for word in self.alias_maps:
            kind, colon, path = word.partition(":")
            if not colon or "/" in kind:
                kind, path = "texthash", word
            if kind not in ALIAS_KINDS or not path.startswith("/"):
                why = f"alias_maps: {printable(word, 100)}: need an absolute path"
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
            ours = {f"[{address}]" for address in self.listen_on}
            return domain.replace("[ipv6:", "[") in ours | {"[127.0.0.1]", "[::1]"}
        return not domain or domain in {name.lower() for name in self.mydestination}

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


def is_atom_char(char: str) -> bool:
    """Whether `char` may stand unquoted in a local part (atext, or UTF-8)."""
    return char not in SPECIALS and char != " " and char.isprintable()


def read_local(text: str) -> tuple[str, int]:
    """(local part unquoted, place behind it). Raises MailError."""
    if not text.startswith('"'):
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
    plain = all(c.isalnum() or c in "-_" or not c.isascii() for c in text)
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
        plain = local and all(is_atom_char(c) or c == "." for c in local)
        if not plain and (local or self.domain):
            local = quoted(local)
        return f"{local}@{self.domain}" if self.domain else local

    def qualified(self, domain: str) -> Address:
        """Itself, a bare user name followed by `domain`."""
        bare = self.local and not self.domain
        return Address(self.local, domain) if bare else self

    @property
    def is_ascii(self) -> bool:
        """Whether it can be sent without SMTPUTF8."""
        return self.local.isascii() and self.domain.isascii()


def path_end(text: str) -> int:
    """Where the > of a path is that `text` begins with. Raises MailError."""
    is_quoted, place = False, 1
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
        self.found.append("".join(self.angle).strip())
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
        text = "".join(self.plain).strip()
        if text:
            self.found.append(text)
        self.angle, self.plain = None, []
        return None


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


# == 4 Messages: DotReader, InputReader, Header, received_field, mbox_quoted ==
# A message is bytes and is never decoded. Inside, lines end in LF.
# Source: RFC 5321 sections 4.4 and 4.5.2, RFC 5322, RFC 4155 (mboxrd).

MAX_HEADER = 1 << 20  # bytes; what `sendmail -t` is willing to search
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()


def asctime(seconds: float) -> str:
    """`"Wed Feb 19 05:10:01 2025"`, local time, in no locale's words."""
    t = time.localtime(seconds)
    return (
        f"{DAYS[t.tm_wday]} {MONTHS[t.tm_mon - 1]} {t.tm_mday:2} "
        f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} {t.tm_year}"
    )


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


class DotReader:
    """What follows 354 as a message: dots taken off, line ends LF.

    feed() takes bytes as they come from the wire, cut anywhere, and returns
    message bytes. Only CRLF.CRLF ends it: then `ended` is true and `rest` has
    what followed. `fault` is a MailError for a bare CR or LF (SMTP smuggling,
    CVE-2023-51764) or more than `limit` bytes; the reader goes on to the real
    end, so that nothing in the message can be taken for a command.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0  # bytes as RFC 1870 counts: CRLF, dots taken off
        self.fault: MailError | None = None
        self.ended = False
        self.rest = b""
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
        return self.clean(text)

    def clean(self, text: bytes) -> bytes:
        """Dots off, CRLF to LF; notes a fault."""
        text = text.replace(b"\r\n.", b"\r\n")
        if not self.has_begun and text:
            self.has_begun, text = True, text[2:]  # the CRLF that was put first
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
    return bool(colon and name) and all(32 < byte < 127 for byte in name)


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


def encoded_word(text: str) -> str:
    """`text` as RFC 2047 encoded words of at most 75 characters each."""
    import binascii  # a C module, needed for non-ASCII only

    words, piece = [], b""
    for char in text:
        data = char.encode("utf-8", "replace")
        if len(piece) + len(data) > 45:
            words.append(piece)
            piece = b""
        piece += data
    words.append(piece)
    coded = (binascii.b2a_base64(word, newline=False).decode() for word in words)
    return "\n ".join(f"=?utf-8?B?{word}?=" for word in coded)


def display_name(text: str) -> str:
    """`text` as the phrase before an address: bare, quoted, or RFC 2047.

    >>> display_name("J. Doe")
    '"J. Doe"'
    """
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not clean.isascii():
        return encoded_word(clean)
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

    `fields`: helo, client ("name [address]"), proto, recipient (only if there
    is exactly one, so that Bcc does not leak), or uid for a local submission.
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


def complete_header(header: Header, origin: dict) -> Header:
    """A submitted message's header, with what it lacks and without secrets.

    `origin`: address, name (full name), host, unique (a word nobody else
    has), now. What is there stays, however malformed. Source: RFC 5322
    section 3.6; the order of additions is Postfix's.
    """
    header = header.without("bcc", "resent-bcc", "return-path", "content-length")
    prefix = (
        "Resent-" if any(key.startswith("resent-") for key, _ in header.fields) else ""
    )
    if not header.has(f"{prefix}message-id".lower()):
        message_id = f"<{origin['unique']}@{origin['host']}>"
        header = header.added(f"{prefix}Message-ID", message_id)
    if not header.has(f"{prefix}date".lower()):
        header = header.added(f"{prefix}Date", rfc_date(origin["now"]))
    if not header.has("from"):
        name = display_name(origin["name"])
        address = origin["address"]
        header = header.added("From", f"{name} <{address}>" if name else address)
    return header


def header_recipients(header: Header) -> list[Address]:
    """Whom `sendmail -t` sends to: To, Cc, Bcc, or the Resent- ones if any.

    Raises MailError.
    """
    names = ("resent-to", "resent-cc", "resent-bcc")
    if not any(map(header.has, names)):
        names = ("to", "cc", "bcc")
    fields = [value for name in names for value in header.values(name)]
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


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets of an alias's value or a .forward line. Raises ValueError."""
    return tuple(Target.parse(item) for item in loose_items(text))


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


class AliasTable:
    """An aliases file as name -> (line, targets), with what is wrong in it.

    `problems` are lines that say nothing usable, `warnings` lines that may
    not do what was meant; both are (line, reason).
    """

    def __init__(self) -> None:
        self.entries: dict[str, tuple[int, tuple[Target, ...]]] = {}
        self.problems: list[tuple[int, str]] = []
        self.warnings: list[tuple[int, str]] = []

    @classmethod
    def parse(cls, text: str) -> AliasTable:
        """The table of an aliases file's text."""
        table = cls()
        text = text.removeprefix("\ufeff")  # what Windows editors put there
        # A backslash at a line's end continues it too, says sendmail.
        for line, entry in logical_lines(text.replace("\\\n", "\n ")):
            try:
                table.add(line, entry)
            except ValueError as error:
                table.problems.append((line, str(error)))
        return table

    def add(self, line: int, entry: str) -> None:
        """Adds one entry. Raises ValueError."""
        if entry[0] in " \t":
            raise ValueError("the first line begins with white space")
        name, value = split_key(entry)
        targets = parse_targets(value)
        shown = printable(name, 60)
        if not targets:
            raise ValueError(f"{shown}: missing value for alias")
        if name in self.entries:
            first = self.entries[name][0]
            text = f"duplicate alias {shown}; line {first} counts"
            self.warnings.append((line, text))
            return
        if len(name.split()) > 1 and not entry.startswith('"'):
            self.warnings.append((line, f"{shown}: a name of two words: quote it"))
        if len(targets) != len(split_items(value)):
            self.warnings.append((line, f"{shown}: write commas between targets"))
        self.entries[name] = (line, targets)

    def items(self) -> list[tuple[str, str]]:
        """(name, value) of every entry, as the database keeps them."""
        return [
            (name, ", ".join(map(str, targets)))
            for name, (_, targets) in self.entries.items()
        ]

    def loops(self) -> list[tuple[int, str]]:
        """(line, reason) of each alias that leads back to itself.

        `root: root` is no loop: it is the mailbox. One walk, any depth.
        """
        state: dict[str, int] = {}  # 1: on the way down, 2: done
        found = []
        for start in self.entries:
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
        asked: dict[Target, str] = {}
        for name, (line, targets) in self.entries.items():
            for target in targets:
                other = target.text.lower()
                is_own = other in self.entries and other != name
                if target.kind == "address" and is_own:
                    continue
                if target not in asked:
                    asked[target] = problem(target)
                if asked[target]:
                    shown = f"{printable(name, 60)}: {printable(str(target), 100)}"
                    found.append((line, f"{shown}: {asked[target]}"))
        return found


# == 6 Queue words: Wishes, Envelope, Attempt, new_id, retry_delay ============
# A queue file's first lines and a journal's lines, as values.
# Failures: ValueError for what is not a queue file or a journal line.

SENT, DEFERRED, BOUNCED = "sent", "deferred", "bounced"
ID_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # no I L O U: said aloud
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
    head, tail = name[:10], name[10:]
    return (
        len(head) == 10
        and all(c in ID_LETTERS for c in head)
        and (all(c in "BDS0123456789" for c in tail) and len(tail) < 30)
    )


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


class Envelope:
    """Who sent a message and to whom: the first lines of its queue file.

    `sender` and `recipients` are addresses as text, "" the null sender;
    `origin` says where it came from: `uid 1000` or `[192.0.2.1] ESMTP name`;
    `kind` is message, report (a bounce) or notice (a bounce's bounce, for
    postmaster). `ret` and `envid` are RET and ENVID of MAIL, `wishes` maps a
    recipient to its Wishes.
    """

    def __init__(self, sender: str, recipients: list[str], **more: object) -> None:
        self.sender = sender
        self.recipients = recipients
        self.arrived = float(more.get("arrived", 0.0))
        self.origin = str(more.get("origin", ""))
        self.kind = str(more.get("kind", "message"))
        self.body = str(more.get("body", ""))
        self.ret = str(more.get("ret", ""))
        self.envid = str(more.get("envid", ""))
        self.wishes: dict[str, Wishes] = more.get("wishes", {})

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
        pairs = cls.split(block)
        rows, recipients = dict(pairs), [v for n, v in pairs if n == "recipient"]
        if "sender" not in rows or "arrived" not in rows or not recipients:
            raise ValueError("no sender, recipient or arrival time")
        if not 0 <= float(rows["arrived"]) < 1e11:
            raise ValueError("no arrival time")
        more: dict[str, object] = {"arrived": rows["arrived"]}
        for name, is_right in MESSAGE_LINES.items():
            if rows.get(name) and is_right(rows[name]):
                more[name] = rows[name]
        more["wishes"] = cls.find_wishes(pairs)
        return cls(rows["sender"], recipients, **more)

    @classmethod
    def split(cls, block: bytes) -> list[tuple[str, str]]:
        """(name, value) of each line up to the empty one."""
        end = block.find(b"\n\n")
        if end < 0:
            raise ValueError("no empty line behind the envelope")
        pairs = []
        for line in os_text(block[:end]).split("\n"):
            name, colon, value = line.partition(": ")
            if not colon and not line.endswith(":"):
                raise ValueError(f"not an envelope line: {printable(line, 60)}")
            pairs.append((name.rstrip(":"), value))
        return pairs

    @classmethod
    def find_wishes(cls, pairs: list[tuple[str, str]]) -> dict[str, Wishes]:
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
        if len(words) != 7 or words[1] not in (SENT, DEFERRED, BOUNCED):
            raise ValueError(f"not a journal line: {printable(line, 60)}")
        return cls(float(words[0]), *words[1:])


def parse_journal(text: bytes) -> list[Attempt]:
    """A journal's attempts; a torn last line (a crash) does not count."""
    found = []
    for line in text.split(b"\n")[:-1]:
        try:
            found.append(Attempt.parse(os_text(line)))
        except ValueError:
            continue  # half a line that a later one was appended to
    return found


def last_round(attempts: list[Attempt]) -> list[Attempt]:
    """The lines of each recipient's last attempt: all that was open then."""
    when = {attempt.recipient: attempt.when for attempt in attempts}
    latest = {
        (attempt.recipient, attempt.destination): attempt
        for attempt in attempts
        if attempt.when == when[attempt.recipient]
    }
    return list(latest.values())


def open_recipients(attempts: list[Attempt]) -> set[str]:
    """Those whose last attempt left something to do."""
    return {a.recipient for a in last_round(attempts) if not a.is_final}


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

    @property
    def pending(self) -> list[str]:
        """The recipients that are neither sent nor bounced."""
        return [r for r in self.envelope.recipients if r not in self.done]

    def note(self, attempts: list[Attempt]) -> None:
        """Takes up what the journal says; a later line wins."""
        self.done = {a.recipient for a in attempts} - open_recipients(attempts)
        for attempt in last_round(attempts):
            if not attempt.is_final:
                self.reasons.setdefault(attempt.recipient, attempt.text)
                self.state = "deferred"

    def __bytes__(self) -> bytes:
        rows = [("id", self.queue_id), ("size", str(self.size)), ("state", self.state)]
        rows += [("reason", f"{r}\t{why}") for r, why in self.reasons.items()]
        rows += [("done", recipient) for recipient in self.done]
        head = "".join(f"{name}: {value}\n" for name, value in rows)
        return os_bytes(head) + bytes(self.envelope)

    @classmethod
    def parse(cls, block: bytes) -> QueueEntry:
        """The entry that bytes() wrote."""
        rows = [line.partition(": ")[::2] for line in os_text(block).split("\n")]
        first = dict(rows)
        entry = cls(first["id"], int(first["size"]), Envelope.parse(block))
        entry.state = first["state"]
        for name, value in rows:
            if name == "reason":
                recipient, _, why = value.partition("\t")
                entry.reasons[recipient] = why
            elif name == "done":
                entry.done.add(value)
        return entry

    def rows(self) -> str:
        """Its lines in mailq, in Postfix's format."""
        flag = {"active": "*", "hold": "!"}.get(self.state, "")
        sender = printable(self.envelope.sender or "MAILER-DAEMON")
        when = asctime(self.envelope.arrived)[:20]
        row = "%-10s%1s %7d %20.20s %s\n"
        lines = [row % (self.queue_id, flag, self.size, when, sender)]
        last = None
        for recipient in self.pending:
            reason = self.reasons.get(recipient, "")
            if reason and reason != last:
                shown = f"({printable(reason)})"
                lines.append(" " * max(0, 76 - len(reason)) + shown + "\n")
            last = reason
            lines.append(" " * 41 + printable(recipient) + "\n")
        return "".join(lines)


MAILQ_TITLE = "-Queue ID- --Size-- ----Arrival Time---- -Sender/Recipient-------\n"


def mailq_text(entries: object) -> object:
    """mailq's text in pieces, for an iterable of QueueEntry."""
    count = size = 0
    for entry in entries:
        yield ("\n" if count else MAILQ_TITLE) + entry.rows()
        count, size = count + 1, size + entry.size
    plural = "" if count == 1 else "s"
    yield (
        f"\n-- {size // 1024} Kbytes in {count} Request{plural}.\n"
        if count
        else "Mail queue is empty\n"
    )


# == 7 Dialogue: Reply, Client, Transaction, Session ==========================
# The SMTP server's side of a conversation, without a socket: a line goes in,
# a Reply comes out. The same Session serves TCP, the submit socket and -bs.
# Source: RFC 5321; 1870 SIZE, 2034 status codes, 2920, 6152, 6531.
# Failures: never raises; every error is a Reply.

MAX_COMMAND = 1024  # bytes with CRLF; RFC 5321 4.5.3.1.4 wants at least 512
MAX_ERRORS = 20  # Postfix smtpd_hard_error_limit


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
    return all(byte > 31 and byte != 127 or byte == 9 for byte in line)


class Reply(Value):
    """One reply: three digits, enhanced status ("" for none), lines of text.

    `action` is what the connection does after it: "" goes on, "close" hangs
    up, "data" reads a message, "queue" lists the queue, "flush" runs it.
    """

    __slots__ = ("code", "status", "lines", "action")

    def __init__(self, code: int, status: str, *lines: str, action: str = "") -> None:
        self.code = code
        self.status = status
        self.lines = lines
        self.action = action

    def __bytes__(self) -> bytes:
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
    stored() or failed() for the last reply. `notes` are lines for the log.
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

    def greeting(self) -> Reply:
        """The first thing that is said."""
        return Reply(220, "", f"{self.settings.myhostname} ESMTP minimta")

    def feed(self, line: bytes) -> Reply:
        """The reply to one command line, its line end taken off."""
        verb, _, rest = line.partition(b" ")
        command = self.COMMANDS.get(verb.upper().rstrip())
        try:
            text = rest.decode("utf-8").strip(" ")
        except UnicodeDecodeError:
            command, text = None, ""
        if verb.upper() in (b"GET", b"POST", b"CONNECT") or line[:1] == b"\x16":
            reply = NOT_SMTP  # a browser or a TLS hello: nothing to talk about
        elif not printable_bytes(line):
            reply = BAD_BYTES
        elif command is None or (
            command in self.LOCAL_COMMANDS and not self.client.is_local
        ):
            reply = UNKNOWN_COMMAND
        else:
            reply = self.carry_out(command, text)
        return self.counted(reply, os_text(verb).upper())

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
        if not reply.is_error:
            return reply
        self.errors += not self.client.is_local
        if verb in ("MAIL", "RCPT", "DATA") and reply.code != 503:
            self.notes.append(self.rejection(verb, reply))
        return TOO_MANY_ERRORS if self.errors > MAX_ERRORS else reply

    def rejection(self, verb: str, reply: Reply) -> str:
        """Postfix's log line for a refusal."""
        sender = self.transaction.sender if self.transaction else self.sender
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
        words = ("PIPELINING", size, "8BITMIME", "ENHANCEDSTATUSCODES", "SMTPUTF8")
        return Reply(250, "", self.settings.myhostname, *words, "DSN", "HELP")

    def mail(self, text: str) -> Reply:
        """MAIL FROM:<reverse-path> [parameters]. RFC 5321 section 4.1.1.2."""
        if not self.helo and not self.client.is_local:
            return NEED_HELO
        if self.transaction:
            return NESTED_MAIL
        sender, options = self.read_path(text, "FROM:", MAIL_SYNTAX, MAIL_PARAMETERS)
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
        if self.settings.is_local(
            recipient.qualified(self.settings.local_origin).domain
        ):
            try:
                self.verify(recipient)
            except MailError as error:
                # A local program may have nobody to try again for it: what
                # cannot be told now waits in the queue.
                may_wait = error.is_temporary and self.client.is_local
                if not (may_bounce or may_wait):
                    raise self.rejected(recipient, error) from None
        elif not (
            self.client.may_relay or self.settings.may_relay_to(recipient.domain)
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
        if not self.transaction:
            return NEED_MAIL
        if self.transaction.recipients:
            return SEND_MESSAGE
        return NO_RECIPIENTS if self.transaction.was_refused else NEED_RCPT

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
        is_utf8 = self.transaction and self.transaction.is_utf8
        return f"UTF8{proto[1:]}" if is_utf8 else proto

    def received(self, queue_id: str, now: float) -> bytes:
        """Our Received field for that message."""
        recipients = self.transaction.recipients
        fields = {
            "uid": self.client.uid,
            "helo": self.helo,
            "client": str(self.client).replace("[", " ["),
            "proto": self.protocol,
            "recipient": recipients[0] if len(recipients) == 1 else "",
        }
        return received_field(fields, self.settings.myhostname, queue_id, now)

    def stored(self, queue_id: str) -> Reply:
        """The reply once the message is safe; only then."""
        self.reset()
        return Reply(250, "2.0.0", f"Ok: queued as {queue_id}")

    def failed(self, error: MailError) -> Reply:
        """The reply when it is not: nothing of it is in the queue."""
        reply = self.counted(Reply.refusal(error), "DATA")
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
        words = (os_text(verb) for verb in self.COMMANDS if not verb.startswith(b"X"))
        return Reply(214, "2.0.0", "Commands: " + " ".join(words))

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

    def flush_queue(self, _: str) -> Reply:
        """XFLUSH: tries everything now."""
        return Reply(250, "2.0.0", "Ok: queue is run", action="flush")

    COMMANDS = {
        b"HELO": helo_,
        b"EHLO": ehlo,
        b"MAIL": mail,
        b"RCPT": rcpt,
        b"DATA": data,
        b"RSET": rset,
        b"NOOP": noop,
        b"VRFY": vrfy,
        b"HELP": help,
        b"QUIT": quit,
        b"EXPN": expn,
        b"XQUEUE": list_queue,
        b"XFLUSH": flush_queue,
    }
    LOCAL_COMMANDS = (list_queue, flush_queue)


# == 8 Reports: ReportKind, Event, Report =====================================
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


# == 9 Trees: Branch ==========================================================
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


# == 10 Names: Record, encode_question, decode_answer =========================
# DNS packets: a question out, records in. Source: RFC 1035 section 4, RFC
# 2181, RFC 6891 (EDNS0), RFC 5452 (what an answer must match).
# Failures: ValueError for a packet that is none, or no answer to the question.

DNS_TYPES = {"A": 1, "CNAME": 5, "MX": 15, "AAAA": 28}
DNS_SIZE = 1232  # bytes of an answer by UDP that no network cuts in pieces
MAX_CNAMES = 10  # names behind one another; Postfix and BIND allow about as many
MAX_HOPS = 2000  # pointers in one packet; an honest one has one a record
NXDOMAIN = 3  # response code: there is no such name


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


def encode_question(number: int, name: str, kind: str) -> bytes:
    """A question for one name; `number` is its id, 16 random bits."""
    head = number.to_bytes(2, "big") + b"\x01\x00\0\1\0\0\0\0\0\1"  # recurse, please
    question = encode_name(name) + DNS_TYPES[kind].to_bytes(2, "big") + b"\0\1"
    return head + question + b"\0\0\x29" + DNS_SIZE.to_bytes(2, "big") + bytes(6)


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
            raise ValueError("a name with odd characters")
        return text

    def record(self) -> Record | None:
        """The next record; None for one of another type or class."""
        name, kind, group = self.name(), self.number(), self.number()
        ttl, size = self.number(4), self.number()
        end = self.place + size
        names = {code: word for word, code in DNS_TYPES.items()}
        word = names.get(kind, "") if group == 1 else ""
        data: object = None
        if word == "MX":
            data = self.number(), self.name()
        elif word == "CNAME":
            data = self.name()
        elif word in ("A", "AAAA"):
            data = self.address(size)
        if word and self.place != end:
            raise ValueError("a record of the wrong size")
        self.place = end
        return Record(name, word, ttl & 0x7FFFFFFF, data) if word else None

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

    def follow(self, name: str, kind: str) -> list[Record]:
        """The records of that kind for `name`, or for what it stands for.

        Raises ValueError for aliases that lead nowhere.
        """
        name = PacketReader(encode_name(name)).name()
        for _ in range(MAX_CNAMES):
            own = [one for one in self.records if one.name == name]
            found = [one for one in own if one.kind == kind]
            names = [one.data for one in own if one.kind == "CNAME"]
            if found or not names:
                return found
            name = names[0]
        raise ValueError("too many CNAMEs behind one another")


def decode_answer(packet: bytes, number: int, name: str, kind: str) -> Answer:
    """The answer to that question. Raises ValueError for anything else."""
    reader = PacketReader(packet)
    if reader.number() != number:
        raise ValueError("the answer to another question")
    flags, questions, answers, _, _ = (reader.number() for _ in range(5))
    if not flags & 0x8000 or flags & 0x7800 or questions != 1:
        raise ValueError("no answer")
    asked = reader.name(), reader.number(), reader.number()
    if asked != (PacketReader(encode_name(name)).name(), DNS_TYPES[kind], 1):
        raise ValueError("the answer to another question")
    is_cut = bool(flags & 0x0200)
    if is_cut:
        return Answer(flags & 15, True, [])
    found = [reader.record() for _ in range(answers)]
    return Answer(flags & 15, False, [record for record in found if record])


# =============================================================================
# HANDS: each owns one thing outside the program.
# =============================================================================

# == 11 Log: Log ==============================================================
# One method an event, in Postfix's shapes, so that its log readers serve.
# Failures: none; mail is never held up by a log that cannot be written.


# Destinations that an address names; of others the log says the recipient.
ADDRESS_KINDS = ("mailbox", "lmtp", "remote", "error")


class Log:
    """Where log lines go: maillog_file, else syslog.

    A daemon in the foreground repeats them on stderr (`echo`), but not where
    they would be in the journal or on the same output twice.
    """

    def __init__(self, settings: Settings, echo: bool = False) -> None:
        self.name = settings.syslog_name
        self.path = settings.maillog_file
        self.facility = settings.syslog_facility
        has_syslog = not self.path and os.path.exists("/dev/log")
        self.echo = echo and self.path != "-" and (not has_syslog or os.isatty(2))
        self.host = settings.myhostname.partition(".")[0]
        self.fd = -1
        self.opened: tuple[int, int] | None = None

    def line(self, component: str, text: str) -> None:
        """Writes `minimta/COMPONENT[PID]: text`, on one line."""
        text = printable(text)
        pid = os.getpid()
        stamp = asctime(time.time())[4:19]
        whole = f"{stamp} {self.host} {self.name}/{component}[{pid}]: {text}\n"
        data = whole.encode("utf-8", "backslashreplace")
        try:
            if self.path == "-":
                os.write(1, data)
            elif self.path:
                self.append(data)
            elif os.path.exists("/dev/log"):
                self.to_syslog(component, text)
            if self.echo:
                os.write(2, data)
        except OSError:
            pass  # a full disk must not stop mail

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

    def to_syslog(self, component: str, text: str) -> None:
        """Hands a line to syslog under the component's name."""
        import syslog  # a C module, used where /dev/log is

        facility = getattr(syslog, f"LOG_{self.facility.upper()}", syslog.LOG_MAIL)
        syslog.openlog(f"{self.name}/{component}", syslog.LOG_PID, facility)
        syslog.syslog(
            syslog.LOG_INFO, text.encode("ascii", "backslashreplace").decode()
        )

    def warning(self, component: str, text: str) -> None:
        """Something that an administrator should mend."""
        self.line(component, f"warning: {text}")

    def accepted(self, queue_id: str, client: Client, envelope: Envelope) -> None:
        """A message gets its id: from whom it comes."""
        if client.is_local:
            text = f"{queue_id}: uid={client.uid} from=<{envelope.sender}>"
            self.line("pickup", text)
        else:
            self.line("smtpd", f"{queue_id}: client={client}")

    def active(self, queue_id: str, size: int, envelope: Envelope) -> None:
        """The runner takes up a message for the first time."""
        count = len(envelope.recipients)
        text = f"from=<{envelope.sender}>, size={size}, nrcpt={count} (queue active)"
        self.line("qmgr", f"{queue_id}: {text}")

    def attempt(self, queue_id: str, attempt: Attempt, arrived: float) -> None:
        """What became of one recipient."""
        delay = max(0.0, attempt.when - arrived)
        shown = f"{delay:.2g}" if delay < 10 else f"{delay:.0f}"
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
            f"delay={shown}, dsn={attempt.status}, "
            f"status={attempt.outcome} ({attempt.text})",
        )

    def reported(self, queue_id: str, note: str, report_id: str) -> None:
        """A report was queued."""
        self.line("bounce", f"{queue_id}: {note}: {report_id}")

    def removed(self, queue_id: str) -> None:
        """A message is done with."""
        self.line("qmgr", f"{queue_id}: removed")


# == 12 Users: User, Users, Rights, find_root, read_settings ==================
# Who is who on this host or in this private instance, and acting as them.
# Failures: MailError 4.3.0 when the user database cannot be read.


class User(Value):
    """One line of passwd(5), less the password."""

    __slots__ = ("name", "uid", "gid", "gecos", "home")

    def __init__(self, name: str, uid: int, gid: int, gecos: str, home: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.gecos = gecos
        self.home = home


class Users:
    """The user database: the system's, or `ROOT/etc/passwd` if it exists."""

    def __init__(self, root: str = "") -> None:
        path = f"{root}/etc/passwd"
        self.path = path if root and os.path.exists(path) else ""

    def rows(self) -> list[User]:
        """Every user of a private instance's own passwd file."""
        found = []
        try:
            with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().split("\n")
        except OSError as error:
            raise MailError("4.3.0", f"{self.path}: {error.strerror}") from None
        for line in lines:
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
        import pwd  # here, for there are hosts (and tests) without it

        try:
            return User(*(pwd.getpwnam(name)[n] for n in (0, 2, 3, 4, 5)))
        except (KeyError, UnicodeError, ValueError):
            return None

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
            return User(*(pwd.getpwuid(uid)[n] for n in (0, 2, 3, 4, 5)))
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
    return Settings.parse(text, environ, os.uname().nodename or "localhost", root, name)


# == 13 Spool: Spool, Draft, QueueFile, Maildrop ==============================
# The queue's directories and files. See the front page for their states.
# Failures: MailError 4.3.1 (no room) or 4.3.0 (cannot be stored).

FOLDERS = (  # name, mode; all but maildrop belong to mail_owner
    ("maildrop", 0o1733),
    ("incoming", 0o700),
    ("queue", 0o700),
    ("journal", 0o700),
    ("hold", 0o700),
    ("corrupt", 0o700),
)
BLOCK = 1 << 18  # bytes read or written at once
OLD_DRAFT = DAY  # seconds until what was never finished is swept away
MAX_ENVELOPE = 1 << 24  # bytes: 10,000 recipients and more


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


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`: a disk that fills up takes less than that."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(path: str) -> None:
    """Makes the names in a directory durable: fsync of a file does not."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Draft:
    """A message being written, in incoming/; commit() makes it mail.

    Used in a `with` block: what is not committed when it ends is removed.
    """

    def __init__(self, spool: object, queue_id: str, envelope: Envelope) -> None:
        self.spool = spool
        self.queue_id = queue_id
        self.path = spool.path("incoming", queue_id)
        self.is_open = False
        self.pending = bytearray()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.pending += bytes(envelope)
            if len(self.pending) >= MAX_ENVELOPE:
                raise MailError("5.5.3", "Too many recipients for one message")
            self.fd = os.open(self.path, flags, 0o600)
        except FileExistsError:
            raise
        except OSError as error:
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
        self.pending.clear()

    def commit(self) -> str:
        """Makes the message durable and returns its id. Raises MailError.

        The order is the promise: write, fsync, rename, fsync of the
        directory. An fsync that failed is never tried again on the same file:
        the kernel has marked the pages clean and would lie.
        """
        self.flush()
        final = self.spool.path("queue", self.queue_id)
        try:
            if os.geteuid() == 0:
                os.fchown(self.fd, self.spool.uid, self.spool.gid)
            os.fsync(self.fd)
            os.rename(self.path, final)
            self.path = final
            self.spool.sync()
        except OSError as error:
            self.discard()  # before anyone hears of it: a 4xx is never delivered
            raise storage_error(error) from None
        self.is_open = False
        os.close(self.fd)
        return self.queue_id  # From here on the mail is safe.

    def discard(self) -> None:
        """Removes what was written."""
        self.is_open = False
        os.close(self.fd)
        try:
            os.unlink(self.path)
        except OSError:
            pass  # a disk that fails: an incoming file is swept later


class QueueFile:
    """A message in the queue, open for reading. Raises ValueError, OSError."""

    def __init__(self, queue_id: str, fd: int) -> None:
        self.queue_id = queue_id
        self.fd = fd
        self.first = os.read(fd, BLOCK >> 2)  # most messages whole
        while b"\n\n" not in self.first and len(self.first) < MAX_ENVELOPE:
            more = os.read(fd, BLOCK)
            if not more:
                break
            self.first += more
        self.envelope = Envelope.parse(self.first)
        self.start = self.first.index(b"\n\n") + 2
        self.size = os.fstat(fd).st_size - self.start

    def __enter__(self) -> QueueFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def header(self) -> Header:
        """The message's header, as far as it is searched."""
        block = b""
        for chunk in self.chunks():
            block += chunk
            if b"\n\n" in block or len(block) > MAX_HEADER:
                break
        return Header.parse(block)

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


class Spool:
    """The queue directory. `uid` and `gid` are mail_owner's.

    create() and Draft.commit() take a message in; ids(), open(), journal()
    and entries() look at it; note(), wait_until(), remove() and set_aside()
    are the runner's.
    """

    def __init__(self, directory: str, owner: User) -> None:
        self.directory = directory
        self.uid, self.gid = owner.uid, owner.gid

    def path(self, *names: str) -> str:
        """The path of something in it."""
        return "/".join((self.directory, *names))

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
                os.chown(path, uid, self.gid if uid else 0)
        if seen.st_mode & 0o7777 != mode:
            os.chmod(path, mode)

    def sync(self) -> None:
        """Makes a new name in queue/ durable."""
        sync_folder(self.path("queue"))

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
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self.path(folder, queue_id), flags)
        try:
            return QueueFile(queue_id, fd)
        except (OSError, ValueError):
            os.close(fd)
            raise

    def has(self, queue_id: str) -> bool:
        """Whether there is such a message."""
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

    def journal(self, queue_id: str) -> list[Attempt]:
        """What happened to it so far."""
        try:
            with open(self.path("journal", queue_id), "rb") as file:
                return parse_journal(file.read())
        except FileNotFoundError:
            return []

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
        os.unlink(self.path("queue", queue_id))
        try:
            os.unlink(self.path("journal", queue_id))
        except FileNotFoundError:
            pass

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

    def free(self) -> int:
        """Bytes that are free on its disk."""
        try:
            seen = os.statvfs(self.directory)
        except OSError:
            return 0
        return seen.f_bavail * seen.f_frsize

    def entries(self) -> object:
        """Every message as a QueueEntry, oldest first."""
        for folder in ("queue", "hold"):
            for queue_id in self.ids(folder):
                try:
                    with self.open(queue_id, folder) as message:
                        entry = QueueEntry(queue_id, message.size, message.envelope)
                except (OSError, ValueError):
                    continue  # delivered meanwhile
                entry.note(self.journal(queue_id))
                if folder == "hold":
                    entry.state = folder
                yield entry


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

    def entries(self) -> list:
        """Nothing: who may only write here sees no queue."""
        return []

    def free(self) -> int:
        """Not known; a full disk shows in writing."""
        return sys.maxsize

    def take(self, name: str, limit: int) -> tuple[int, QueueFile]:
        """(its owner's uid, the file) of one drop. Raises ValueError, OSError.

        Hostile until shown otherwise: no link, no device, one name, complete.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(f"{self.directory}/{name}", flags)
        seen = os.fstat(fd)
        regular = stat.S_ISREG(seen.st_mode)
        try:
            if not regular or seen.st_nlink != 1 or seen.st_size > limit:
                raise ValueError("not a regular file of one name and a sane size")
            return seen.st_uid, QueueFile(name, fd)
        except ValueError:
            os.close(fd)
            raise


# == 14 Alias database: AliasDatabase, AliasMaps, TargetFiles =================
# The aliases files, the dbm databases that newaliases makes of them, and what
# they and users refer to: :include: lists and ~/.forward.
# Failures: MailError 4.3.0 when something cannot be read, 4.3.5 when it must
# not be trusted; ProgramError for a database that cannot be built: then the
# old one stays as it was.


ALIAS_MODULES = ("dbm", "dbm.dumb", "dbm.gnu", "dbm.ndbm", "dbm.sqlite3")


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
        self.seen: tuple | None = None
        self.known: dict[str, str | None] = {}
        self.text: AliasTable | None = None
        self.problem = ""  # why the database may not say what the text does

    def lookup(self, names: list[str]) -> tuple[str, str] | None:
        """(name, its targets as text) of the first of these aliases, or None.

        Names are in lower case. Threads share this: each goes on with the
        dictionary it began with.
        """
        for _ in range(5):
            seen = signature(self.files)
            if seen != self.seen:
                self.refresh(seen)
            known = self.known
            found = None
            for name in names:
                value = known[name] if name in known else self.fetch(name)
                if len(known) < self.MAX_KNOWN:
                    known[name] = value
                if value is not None:
                    found = name, value
                    break
            if signature(self.files) == seen:  # not replaced while it was read
                return found
        raise MailError("4.3.0", f"{self.path}: alias database keeps changing")

    def refresh(self, seen: tuple) -> None:
        """Forgets what was known: the files have changed."""
        self.known = {}
        self.text = None
        self.seen = seen
        self.problem = ""
        times = [entry[1] for entry in seen[1:] if entry]
        if seen[0] and times and max(times) < seen[0][1]:
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
        if self.text is None and any(self.seen[1:]):
            try:
                return self.fetch_from_database(name)
            except Exception as error:  # noqa: BLE001 each backend has its own
                why = printable(str(error), 100)
                self.note(f"{self.name} cannot be read ({why})")
        if self.text is None:
            table = self.read_text()
            for line, reason in table.problems:
                self.warn(f"{self.path}, line {line}: {reason}")
            self.text = table
        return self.text.value(name)

    def fetch_from_database(self, name: str) -> str | None:
        """One name from the database; keys may carry a NUL (Postfix's do)."""
        key = os_bytes(name)
        with self.open() as database:
            for spelling in (key, key + b"\0"):
                if spelling in database:
                    return os_text(database[spelling].rstrip(b"\0"))
        return None

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

    def read_text(self) -> AliasTable:
        """The text file's aliases. Raises MailError."""
        try:
            with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
                return AliasTable.parse(file.read())
        except FileNotFoundError:
            return AliasTable()
        except OSError as error:
            raise MailError(
                "4.3.0", f"alias database unavailable: {self.path}: {error.strerror}"
            ) from None

    def where(self, name: str) -> str:
        """Where an alias is written: file and line, else the database."""
        try:
            table = self.text or self.read_text()
        except MailError:
            return self.name
        return (
            f"{self.path}:{table.entries[name][0]}"
            if name in table.entries
            else (self.name)
        )

    def rebuild(self) -> AliasTable:
        """Builds the database from the text, in one atomic step.

        Raises ProgramError. When the table has problems, nothing is written.
        """
        try:
            with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
                table = AliasTable.parse(file.read())
        except OSError as error:
            raise ProgramError(
                EX_NOINPUT, f"{self.path}: {error.strerror}: make it a text file"
            ) from None
        if not table.problems:
            try:
                self.replace(table.items())
            except OSError as error:
                raise ProgramError(
                    EX_CANTCREAT,
                    f"{self.name}: {error.strerror}: the database is as it was",
                ) from None
        return table

    def replace(self, items: list[tuple[str, str]]) -> None:
        """Builds beside the database and moves that into its place."""
        import dbm
        import tempfile

        folder, base = os.path.split(self.name)
        with tempfile.TemporaryDirectory(prefix=f".{base}.", dir=folder) as aside:
            with dbm.open(f"{aside}/{base}", "n") as database:
                for name, value in items:
                    database[os_bytes(name)] = os_bytes(value)
            self.end_journal(f"{aside}/{base}")
            built = sorted(os.listdir(aside))
            for name in built:
                os.chmod(f"{aside}/{name}", 0o644)
                self.sync_file(f"{aside}/{name}")
            self.move(aside, folder, base, built)
        sync_folder(folder)

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
    return AliasMaps([AliasDatabase(path, warn) for path in settings.alias_files])


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


# == 15 Mailboxes: MailboxLock, Mailbox, FileBox, MaildirBox ==================
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
        try:
            os.unlink(aside)
        except FileNotFoundError:
            pass
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(aside, flags, 0o644)
        try:
            write_all(fd, b"%d minimta\n" % os.getpid())
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
        """Gives both back; never a dotlock that is not ours."""
        import fcntl

        if self.has_dotlock:
            self.has_dotlock = False
            try:
                os.unlink(self.path)
            except OSError:
                pass  # the directory changed under us; the lock goes stale
        fcntl.lockf(self.fd, fcntl.LOCK_UN)


class AppendOnly:
    """What makes a mailbox.mbox an append-only one; see append_only_mbox().

    mailbox.mbox.add() reads the whole mailbox first, to number its messages:
    700 ms for 18 MB. Here the table of contents is empty, and a message is an
    iterable of bytes, written past Python's buffer: what a buffer held back
    at a full disk would be written later, behind what was cut.
    """

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


def append_only_mbox(path: str) -> object:
    """A mailbox.mbox of an existing file, made append-only."""
    import mailbox  # 25 ms; only delivery needs it

    return type("Mbox", (AppendOnly, mailbox.mbox), {})(path, create=False)


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
            self.is_new = self.make_sure()
            self.mbox = append_only_mbox(self.path)
        except OSError as error:
            raise self.failure(error) from None
        self.fd = self.mbox._file.fileno()
        self.start = -1
        self.modified = os.fstat(self.fd).st_mtime
        self.lock = MailboxLock(self.path, self.fd)
        try:
            self.lock.acquire()
            self.inspect(os.fstat(self.fd))
            self.cut_nuls()
        except OSError as error:
            self.mbox._file.close()
            raise self.failure(error) from None
        except BaseException:
            self.mbox._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.mbox._file.close()

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

    def make_sure(self) -> bool:
        """Makes the file if there is none; looks at it if there is.

        Never follows a link, never waits for a FIFO, never opens a device.
        Returns whether it was made.
        """
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd, is_new = os.open(self.path, flags), False
        except FileNotFoundError:
            fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            is_new = True
        try:
            self.inspect(os.fstat(fd))
        finally:
            os.close(fd)
        return is_new

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


# == 16 Folders: Folder, FolderMessage ========================================
# A mailbox as mail(1) reads and rewrites it; the mail stays in the file.
# Failures: ProgramError, in the words of Heirloom mailx.


class FolderMessage:
    """One message of a folder: where it is, and what its reader did with it.

    `status` is the Status field's letters; `state` one of "", deleted, saved.
    """

    __slots__ = ("start", "end", "lines", "status", "state", "was_read")

    def __init__(self, start: int, end: int, lines: int, status: str) -> None:
        self.start = start
        self.end = end
        self.lines = lines
        self.status = status
        self.state = ""
        self.was_read = False

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


class Folder:
    """An mbox file: messages are found once, read when asked for.

    Read with the reader's own rights; write() keeps mail that came meanwhile.
    """

    def __init__(self, path: str, home: str = "") -> None:
        self.path = path
        self.home = home  # the reader's, for what needs a place for a moment
        self.messages: list[FolderMessage] = []
        self.size = 0
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            try:
                self.fd = os.open(path, flags)
                self.is_read_only = False
            except OSError:  # not ours to write, or the disk is read-only
                self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self.is_read_only = True
        except OSError as error:
            raise ProgramError(1, f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise ProgramError(1, f"{path}: not a regular file")
        self.lock = MailboxLock(path, self.fd)
        if self.is_read_only:
            self.find_messages()
            return
        self.lock_patiently()  # or half a message might be taken for a whole one
        try:
            self.find_messages()
        finally:
            self.lock.release()

    def find_messages(self) -> None:
        """Notes where messages begin: a From_ line behind an empty one."""
        import re

        pattern = re.compile(rb"^From [^\n]*\d\d:\d\d[^\n]*\d{4}", re.MULTILINE)
        text = self.read_at(0, os.fstat(self.fd).st_size)
        starts = (
            [
                match.start()
                for match in pattern.finditer(text)
                if match.start() == 0
                or text.endswith((b"\n\n", b"\n\r\n"), 0, match.start())
            ]
            if text.startswith(b"From ")
            else []
        )
        if text and not starts:
            raise ProgramError(1, f"{self.path}: not a mailbox")
        self.size = len(text)
        self.seen = (os.fstat(self.fd).st_ino, hash(text))
        for start, end in zip(starts, [*starts[1:], len(text)]):
            header = Header.parse(text[start:end].partition(b"\n")[2][:MAX_HEADER])
            status = "".join(header.values("status"))
            lines = text.count(b"\n", start, end)
            self.messages.append(FolderMessage(start, end, lines, status))

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
        text = self.read_at(message.start, message.end - message.start)
        first, _, rest = text.partition(b"\n")
        return first, Header.parse(rest)

    def rewritten(self, message: FolderMessage) -> bytes:
        """The message's text with its new Status."""
        first, header = self.read(message)
        header, body = header.without("status"), header.rest
        header = header.added("Status", message.next_status())
        return first + b"\n" + bytes(header) + b"\n" + body

    def write(self) -> int:
        """Drops what is deleted or saved, writes each Status; how many stay.

        In place, so that owner, mode and inode stay; the old end of the file
        is kept beside it until the new one is durable. Raises ProgramError.
        """
        self.lock_patiently()
        try:
            if self.fingerprint() != self.seen:
                raise ProgramError(
                    1, f"{self.path}: another program changed it: x leaves it so"
                )
            kept = [message for message in self.messages if not message.state]
            self.replace_tail(self.first_change(), kept)
        except OSError as error:
            raise ProgramError(EX_IOERR, f"{self.path}: {error.strerror}") from None
        finally:
            self.lock.release()
        return len(kept)

    def fingerprint(self) -> tuple[int, int]:
        """What differs if anything but the file's end was changed since."""
        now = os.stat(self.path)
        return now.st_ino, hash(self.read_at(0, self.size))

    def lock_patiently(self) -> None:
        """Waits for a deliverer to finish, thirty seconds at the most."""
        for _ in range(300):
            try:
                return self.lock.acquire()
            except Busy:
                time.sleep(0.1)
        raise ProgramError(EX_TEMPFAIL, f"{self.path}: locked by another program")

    def first_change(self) -> int:
        """Where the file begins to differ from what it should be."""
        for message in self.messages:
            if message.state or message.status != message.next_status():
                return message.start
        return self.size

    def replace_tail(self, offset: int, kept: list[FolderMessage]) -> None:
        """Writes the file anew from `offset`; a kill in between is safe."""
        end = os.fstat(self.fd).st_size
        if offset == self.size:
            return
        old = self.read_at(offset, end - offset)
        came = old[self.size - offset :]
        new = b"".join(self.rewritten(m) for m in kept if m.start >= offset) + came
        aside = self.keep_aside(old)
        if len(new) > len(old) and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fd, offset, len(new))  # a full disk shows here
        os.lseek(self.fd, offset, os.SEEK_SET)
        write_all(self.fd, new)
        os.ftruncate(self.fd, offset + len(new))
        os.fsync(self.fd)
        os.unlink(aside)

    def keep_aside(self, text: bytes) -> str:
        """Writes what is about to be replaced to a file of its own."""
        import tempfile

        for folder in (os.path.dirname(self.path), self.home, "/var/tmp", "/tmp"):
            try:
                fd, path = tempfile.mkstemp(".rescued", ".mail-", folder or None)
            except OSError:
                continue  # not ours to write
            try:
                write_all(fd, text)
                os.fsync(fd)
            finally:
                os.close(fd)
            return path
        why = f"no place for a copy of {self.path}: make {self.home} writable"
        raise ProgramError(EX_CANTCREAT, why)


# == 17 Commands: Command, verdict, command_environment =======================
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


# == 18 Relay: NextHop, Parcel, Relay =========================================
# Hands mail to another host by SMTP or LMTP, with smtplib, without rights.
# Failures: MailError with the host's own words, as Postfix puts them.

PORTS = {"smtp": 25, "lmtp": 24}
CONNECT_TIMEOUT = 30  # seconds; RFC 5321 section 4.5.3.2 for the rest:
REPLY_TIMEOUT = 300  # MAIL, RCPT
FINAL_TIMEOUT = 600  # the reply to the message's end


def split_host(text: str, usual: int) -> tuple[str, int]:
    """(host, port) of `host`, `[host]` or `[host]:port`. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or "]" in port:
        host, port = text, str(usual)
    host = host.strip("[]")
    if not host or "/" in host or not (port.isascii() and port.isdigit()):
        raise ValueError(text)
    return host, range(65536).index(int(port) or -1)


class NextHop(Value):
    """Where mail is handed over: protocol, host, port.

    For LMTP over a Unix socket `host` is its path and `port` 0.
    """

    __slots__ = ("kind", "host", "port")

    def __init__(self, kind: str, host: str, port: int) -> None:
        self.kind = kind
        self.host = host
        self.port = port

    @classmethod
    def parse(cls, text: str, setting: str, kind: str = "smtp") -> NextHop:
        """`host`, `[host]:port`, and `lmtp:` or `smtp:` before it.

        Behind lmtp: also /socket, unix:/socket and inet:host:port, as in
        Postfix. Raises MailError naming the setting.
        """
        rest = text.strip()
        word, colon, behind = rest.partition(":")
        if colon and word in PORTS:
            kind, rest = word, behind
        if kind == "lmtp":
            rest = rest.removeprefix("unix:").removeprefix("inet:")
            if rest.startswith("/"):
                return cls(kind, rest, 0)
        try:
            return cls(kind, *split_host(rest, PORTS[kind]))
        except ValueError:
            why = f"{setting} {printable(text, 100)}: need [host]:port"
            raise MailError("4.3.5", why, "none") from None

    def __str__(self) -> str:
        prefix = "lmtp:" if self.kind == "lmtp" else ""
        where = f"[{self.host}]:{self.port}" if self.port else self.host
        return prefix + where


class Parcel:
    """What goes to one host in one transaction.

    `head` is put before the message (Delivered-To of a forward); `wishes` maps
    each recipient to its Wishes.
    """

    def __init__(self, message: QueueFile, sender: str, head: bytes) -> None:
        self.message = message
        self.sender = sender
        self.head = head
        self.wishes: dict[str, Wishes] = {}

    def mail_options(self, has: object) -> str:
        """Parameters of MAIL that the host knows. RFC 3461 section 4."""
        envelope = self.message.envelope
        ret = f" RET={envelope.ret}" if envelope.ret else ""
        envid = f" ENVID={envelope.envid}" if envelope.envid else ""
        offers = (
            ("size", f" SIZE={len(self.head) + self.message.size}"),
            ("8bitmime", " BODY=8BITMIME"),
            ("smtputf8", " SMTPUTF8" if "SMTPUTF8" in envelope.body else ""),
            ("dsn", ret + envid),
        )
        return "".join(text for word, text in offers if has(word))

    def chunks(self) -> object:
        """The message as it goes out, in pieces."""
        yield self.head
        yield from self.message.chunks()


class Relay:
    """One connection to one host; send() hands over one message.

    Raises MailError for what concerns every recipient.
    """

    def __init__(self, settings: Settings, hop: NextHop) -> None:
        self.settings = settings
        self.hop = hop
        self.name = f"{hop.host}[{hop.host}]:{hop.port}"
        if not hop.port:
            self.name = f"{settings.myhostname}[{hop.host}]"
        self.offers_dsn = False

    def connect(self) -> None:
        """Connects and says hello. Raises MailError."""
        import smtplib  # 30 ms; only relaying needs it

        hop, hello = self.hop, self.settings.myhostname
        kinds = {"smtp": smtplib.SMTP, "lmtp": smtplib.LMTP}
        try:
            self.smtp = kinds[hop.kind](local_hostname=hello, timeout=CONNECT_TIMEOUT)
            code, text = self.smtp.connect(hop.host, hop.port)
            if hop.port:
                address = self.smtp.sock.getpeername()[0]
                self.name = f"{hop.host}[{address}]:{hop.port}"
            self.smtp.sock.settimeout(REPLY_TIMEOUT)
            if code != 220:  # a host that lets nobody in today: try it again
                raise self.refusal("initial connection", min(code, 499), text)
            self.smtp.ehlo_or_helo_if_needed()
            self.offers_dsn = self.smtp.has_extn("dsn")
        except smtplib.SMTPHeloError as error:
            raise self.refusal(
                "EHLO command", error.smtp_code, error.smtp_error
            ) from None
        except (OSError, smtplib.SMTPException) as error:
            why = getattr(error, "strerror", None) or printable(str(error), 200)
            text = f"connect to {self.name}: {why or 'lost connection'}"
            raise MailError("4.4.1", text, "none") from None

    def send(self, parcel: Parcel) -> dict:
        """Sends one message; recipient -> (status, text) or MailError."""
        import smtplib

        try:
            return self.transaction(parcel)
        except (OSError, smtplib.SMTPException) as error:
            raise self.lost(error) from None

    def lost(self, error: Exception) -> MailError:
        """The failure for a connection that is no more."""
        self.smtp.close()
        why = getattr(error, "strerror", None) or printable(str(error), 200)
        return MailError("4.4.2", f"lost connection with {self.name}: {why}", self.name)

    def transaction(self, parcel: Parcel) -> dict:
        """MAIL, RCPT, DATA, the message. Raises MailError, OSError."""
        body = parcel.message.envelope.body
        if "SMTPUTF8" in body and not self.smtp.has_extn("smtputf8"):
            raise MailError("5.6.7", f"{self.name} does not offer SMTPUTF8", self.name)
        self.smtp.command_encoding = "utf-8"
        options = parcel.mail_options(self.smtp.has_extn)
        words = f"FROM:<{parcel.sender}>{options}"
        self.expect("MAIL FROM command", *self.smtp.docmd("MAIL", words), 250)
        results: dict = {}
        for recipient, wishes in parcel.wishes.items():
            options = wishes.parameters() if self.offers_dsn else ""
            code, text = self.smtp.docmd("RCPT", f"TO:<{recipient}>{options}")
            if code not in (250, 251):
                results[recipient] = self.refusal("RCPT TO command", code, text)
        good = [recipient for recipient in parcel.wishes if recipient not in results]
        if good:
            self.expect("DATA command", *self.smtp.docmd("DATA"), 354)
            results.update(self.send_text(parcel, good))
        else:
            self.smtp.rset()
        return results

    def send_text(self, parcel: Parcel, good: list[str]) -> dict:
        """The message itself, streamed; what the host says of each recipient.

        LMTP has a reply for each of them, RFC 2033 section 4.2.
        """
        for block in dot_stuffed(parcel.chunks()):
            self.smtp.sock.sendall(block)
        self.smtp.sock.settimeout(FINAL_TIMEOUT)
        is_lmtp = self.hop.kind == "lmtp"
        replies = [self.final_reply() for _ in (good if is_lmtp else good[:1])]
        if self.smtp.sock:
            self.smtp.sock.settimeout(REPLY_TIMEOUT)
        return dict(zip(good, replies if is_lmtp else replies * len(good)))

    def final_reply(self) -> tuple[str, str] | MailError:
        """(status, the host's words) behind the message's end, or a failure.

        A lost connection is a failure too: what LMTP said before it counts.
        """
        import smtplib

        try:
            if self.smtp.sock is None:
                raise smtplib.SMTPServerDisconnected("no reply")
            code, text = self.smtp.getreply()
        except (OSError, smtplib.SMTPException) as error:
            return self.lost(error)
        if code != 250:
            return self.refusal("end of DATA command", code, text)
        return "2.0.0", printable(f"{code} {os_text(text)}".replace("\n", " "), 300)

    def expect(self, stage: str, code: int, text: bytes, wanted: int) -> None:
        """Raises MailError unless the reply is the wanted one."""
        if code != wanted:
            raise self.refusal(stage, code, text)

    def refusal(self, stage: str, code: int, text: bytes) -> MailError:
        """The failure for a reply; anything but 5xx may succeed later."""
        words = printable(os_text(text).replace("\n", " "), 500)
        status = words.partition(" ")[0]
        kind = "5" if 500 <= code < 600 else "4"
        if not is_status(status) or status[0] != kind:
            status = f"{kind}.0.0"
        said = f"host {self.name} said: {code} {words} (in reply to {stage})"
        return MailError(status, said, self.name)

    def reset(self) -> bool:
        """Makes ready for the next message; whether the host is there."""
        import smtplib

        if self.smtp.sock is None:
            return False
        try:
            self.smtp.rset()
        except (OSError, smtplib.SMTPException):
            return False
        return True

    def quit(self) -> None:
        """Says goodbye; what the host says to that does not matter."""
        import smtplib

        try:
            self.smtp.sock.settimeout(CONNECT_TIMEOUT)
            self.smtp.quit()
        except (OSError, smtplib.SMTPException, AttributeError):
            return


# == 19 Resolver: MailHost, Resolver ==========================================
# Asks the name servers of resolv.conf, and reads hosts(5).
# Failures: MailError, in Postfix's words: 5.4.4 for a name that is not there,
# 5.1.10 for a domain that takes no mail, 4.4.3 for what cannot be told now.

DNS_PORT = 53
MAX_KEPT = 86400  # seconds that an answer is believed, whatever it says
MAX_HOSTS = 20  # mail hosts of a domain, and addresses of a host, that are asked


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


def read_server(text: str) -> tuple[str, int]:
    """(address, port) of `192.0.2.1`, or OpenBSD's `[127.0.0.1]:5353`."""
    if text.startswith("["):
        return split_host(text, DNS_PORT)
    return text, DNS_PORT


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
        self.timeout, self.attempts = 5, 2  # resolv.conf(5)
        self.kept: dict[tuple, tuple[float, list[Record]]] = {}
        for words in self.lines("resolv.conf"):
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
        """One line of resolv.conf(5); what means nothing here is left out."""
        if words[0] == "nameserver" and len(words) > 1:
            try:
                self.servers.append(read_server(words[1]))
            except ValueError:
                return
        for word in words[1:] if words[0] == "options" else []:
            name, _, value = word.partition(":")
            if name in ("timeout", "attempts") and is_number(value):
                setattr(self, name, max(1, min(30, int(value))))

    def mail_hosts(self, domain: str) -> list[MailHost]:
        """The hosts that take mail for a domain, best first, RFC 5321 5.1.

        Raises MailError.
        """
        records = self.lookup(domain, "MX")
        pairs = sorted(record.data for record in records) or [(0, domain)]
        if pairs == [(0, "")]:  # RFC 7505
            why = f"Domain {domain} does not accept mail (nullMX)"
            raise MailError("5.1.10", why, "none")
        found = []
        for preference, name in pairs[:MAX_HOSTS]:
            addresses = self.addresses(name) if records else self.first_of(domain)
            found.append(MailHost(preference, name, addresses))
        return found

    def host(self, name: str) -> list[MailHost]:
        """The one host of that name, or address. Raises MailError."""
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
        found = [
            words[0]
            for words in self.lines("hosts")
            if name.lower() in (word.lower() for word in words[1:])
        ]
        for kind in () if found else ("A", "AAAA"):
            try:
                found += [record.data for record in self.lookup(name, kind)]
            except MailError as error:
                if error.is_temporary:
                    raise
        return found[:MAX_HOSTS]

    def failure(self, status: str, name: str, kind: str, why: str) -> MailError:
        """A failure in Postfix's words."""
        text = f"Host or domain name not found. Name service error for name={name}"
        return MailError(status, f"{text} type={kind}: {why}", "none")

    def lookup(self, name: str, kind: str) -> list[Record]:
        """The records of that kind for a name. Raises MailError."""
        key = name.lower().rstrip("."), kind
        expires, found = self.kept.get(key, (0.0, []))
        if expires > time.monotonic():
            return found
        try:
            answer = self.ask(name, kind)
            found = answer.follow(key[0], kind) if answer else []
        except ValueError:
            raise self.failure("5.4.4", name, kind, "Malformed name") from None
        if answer is None or answer.code not in (0, NXDOMAIN):
            raise self.failure("4.4.3", name, kind, "Host not found, try again")
        if answer.code == NXDOMAIN:
            raise self.failure("5.4.4", name, kind, "Host not found")
        ttl = min([record.ttl for record in found] or [0])
        self.kept[key] = time.monotonic() + min(ttl, MAX_KEPT), found
        return found

    def ask(self, name: str, kind: str) -> Answer | None:
        """The first answer of a server that knows; None if there is none."""
        last = None
        for _ in range(self.attempts):
            for server in self.servers or [("127.0.0.1", DNS_PORT)]:
                answer = self.ask_server(server, name, kind)
                if answer and answer.code in (0, NXDOMAIN):
                    return answer
                last = answer or last
        return last

    def ask_server(self, server: tuple, name: str, kind: str) -> Answer | None:
        """One server's answer, by TCP where UDP had no room; None for none.

        A fresh socket has a port of the kernel's choice, and takes packets of
        that server only; the id is of our own dice (RFC 5452 section 9.2).
        """
        import socket

        number = int.from_bytes(os.urandom(2), "big")
        packet = encode_question(number, name, kind)
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        end = time.monotonic() + self.timeout
        for form in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
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
                data = self.read_stream(connection) if is_stream else None
                return decode_answer(data or connection.recv(65535), number, *asked)
            except ValueError:
                if is_stream:
                    return None
        return None  # forged or broken packets only

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


# =============================================================================
# WORK: what is done with them.
# =============================================================================

# == 20 Routing: Destination, Trail, Router, TargetCheck ======================
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
        if not self.settings.is_local(address.domain):
            yield self.remote(address, trail.draw(f"{address} is elsewhere"))
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
        changes.update(sender=sender, may_run=True)
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

    def remote(self, address: Address, trail: Trail) -> Destination:
        """Where mail for another host is handed over."""
        forwarders = self.forwarders(trail, "user", "alias")
        more: dict = {"forwarders": forwarders, "sender": trail.sender}
        place = ""
        try:
            place = str(self.next_hop(address, trail))
        except MailError as error:
            trail.draw(f"{DEFERRED}: {error.text}", "", error.status)
            more["error"] = error
        return Destination("remote", str(address), place, **more)

    def next_hop(self, address: Address, trail: Trail) -> NextHop:
        """The host that remote mail goes to. Raises MailError."""
        settings = self.settings
        if not settings.relayhost:
            self.draw_hosts(trail, Resolver.mail_hosts, address.domain)
            why = "relayhost is not set, and mail by MX is not built yet"
            raise MailError("4.4.4", f"no route to {address.domain}: {why}", "none")
        hop = NextHop.parse(settings.relayhost, "relayhost")
        source = settings.sources.get("relayhost", "")
        trail = trail.draw(f"relayhost {hop}", source, "without TLS")
        self.draw_hosts(trail, Resolver.host, hop.host)
        return hop

    def draw_hosts(self, trail: Trail, ask: object, name: str) -> None:
        """Draws the hosts that the name servers tell of, if that is wanted."""
        if not (trail.branch and self.resolver) or name in self.asked:
            return
        self.asked.add(name)
        if len(self.asked) > MAX_LOOKUPS:
            return
        try:
            for host in ask(self.resolver, name):
                trail.draw(str(host))
        except MailError as error:
            trail.draw(error.text, "", error.status)

    def forwarders(self, trail: Trail, *kinds: str) -> tuple[str, ...]:
        """Through whom a trail went, last one first."""
        names = [name for kind, name in reversed(trail.steps) if kind in kinds]
        origin = self.settings.local_origin
        return tuple(
            name if "@" in name else f"{name}@{origin}"
            for name in names
            if name[0] != "@" and name != "luser_relay"
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


# == 21 Delivery: Task, ActiveMessage, Delivery, RelayJob, PipeJob, Lanes =====
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
            f"X-Original-To: {self.recipients[0]}\n"
            f"Delivered-To: {self.destination.target}\n"
        )
        own = os_bytes(f"Delivered-To: {self.destination.target}\n")
        return os_bytes(fields) + self.head().replace(own, b"", 1)

    def from_line(self) -> bytes:
        """The first line of a message in an mbox."""
        sender = self.sender.replace(" ", "_") or "MAILER-DAEMON"
        return os_bytes(f"From {sender}  {asctime(self.message.now)}\n")

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
        self.reports: list[str] = []
        self.is_settled = False

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
        done = {a.recipient for a in self.journal} - open_recipients(self.journal)
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
                task.error = error
        mailbox.sync()
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


def close_others(kept: set[int]) -> None:
    """Closes every descriptor but these and the standard ones.

    A child that lives on must not hold the queue's lock, nor other mail.
    """
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


class Job:
    """A child process that does tasks without root's rights, in work().

    The parent reads `fd` to its end and calls take(). Each line there is a
    result: task number, sent, passed (sent, and the next host will report) or
    failed, status, relay, text.
    """

    MODULES: tuple[str, ...] = ()  # imported while they can be read

    def __init__(self, settings: Settings, owner: User, tasks: list[Task]) -> None:
        self.settings = settings
        self.owner = owner
        self.tasks = tasks
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
        files = {task.message.file.fd for task in self.tasks}
        close_others({self.results, *files})
        try:
            drop_rights(self.owner)
            self.work()
        except Exception as error:  # noqa: BLE001 whatever it is, mail is kept
            text = f"{type(self).__name__}: {type(error).__name__}: {error}"
            failure = MailError("4.3.0", text, "none")
            # Where there was a result already, the first one counts.
            self.report_failure(range(len(self.tasks)), failure)

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

    def take(self, data: bytes) -> None:
        """Settles tasks by what the child says; b"" is its end."""
        *lines, self.text = (self.text + data).split(b"\n")
        for line in lines:
            number, outcome, status, relay, text = os_text(line).split("\t")
            task = self.tasks[int(number)]
            if task.is_over:
                continue
            if outcome == "failed":
                task.error = MailError(status, text, relay)
            else:
                task.done, task.relay = (status, text), relay
                task.is_passed_on = outcome == "passed"
        if not data:
            self.finish()

    def finish(self) -> None:
        """Buries the child; what it said nothing of is tried again."""
        os.close(self.fd)
        os.waitpid(self.pid, 0)
        for task in self.tasks:
            if not task.is_over:
                text = "the process that was to do it ended without a result"
                task.error = MailError("4.3.0", text, "none")

    def messages(self) -> list[ActiveMessage]:
        """The messages of its tasks."""
        return list({id(task.message): task.message for task in self.tasks}.values())


class RelayJob(Job):
    """Hands a batch to one host, over one connection, as mail_owner."""

    MODULES = ("smtplib", "encodings.idna", "stringprep")

    def work(self) -> None:
        """Sends one parcel after the other; results are the host's words."""
        rest = self.groups()
        try:
            where = self.tasks[0].destination.place
            relay = Relay(self.settings, NextHop.parse(where, "next hop"))
            relay.connect()
            while rest:
                if not self.send(relay, rest.pop(0)) and rest:
                    relay.connect()
            relay.quit()
        except MailError as error:
            for group in rest:
                self.report_failure(group.values(), error)

    def groups(self) -> list[dict[str, int]]:
        """Recipient -> task number, for tasks that go in one transaction."""
        found: dict[tuple, dict[str, int]] = {}
        for number, task in enumerate(self.tasks):
            key = (task.message.queue_id, task.head(), task.sender)
            found.setdefault(key, {})[task.destination.target] = number
        return list(found.values())

    def send(self, relay: Relay, group: dict[str, int]) -> bool:
        """One transaction; whether the connection is good for another."""
        task = self.tasks[next(iter(group.values()))]
        parcel = Parcel(task.message.file, task.sender, task.head())
        for recipient, number in group.items():
            parcel.wishes[recipient] = self.wishes(self.tasks[number])
        try:
            results = relay.send(parcel)
        except MailError as error:
            self.report_failure(group.values(), error)
            return error.status != "4.4.2" and relay.reset()
        word = "passed" if relay.offers_dsn else SENT
        for recipient, result in results.items():
            if isinstance(result, MailError):
                self.report_failure([group[recipient]], result)
            else:
                self.report(group[recipient], word, result[0], relay.name, result[1])
        return relay.reset()

    def wishes(self, task: Task) -> Wishes:
        """What the next host is asked to report; of a list, what is usual."""
        if task.destination.sender:
            return NO_WISHES
        return task.message.file.envelope.wishes_of(task.recipients[0])


class PipeJob(Job):
    """Runs one command for one message, as whoever's command it is."""

    MODULES = ("subprocess", "select")

    @property
    def patience(self) -> float:
        """The command's time, and some to end it."""
        return self.settings.command_time_limit + GRACE

    def work(self) -> None:
        """Feeds the message to the command; its exit code is the result."""
        (task,) = self.tasks
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


class Lanes:
    """Tasks in line for child processes: a lane for each host and command.

    A slow one holds up its own lane only. Those who wait keep their message
    open, so only so many may: add() says no to the others.
    """

    JOBS = {"remote": RelayJob, "lmtp": RelayJob, "pipe": PipeJob}
    MAX_JOBS = {"relay": 16, "pipe": 16}  # processes at once
    LANE_JOBS = {"remote": 4, "lmtp": 4, "pipe": 2}  # of them in one lane
    USER_JOBS = 4  # of one user, whatever the commands
    BATCH = {"remote": 64, "lmtp": 64, "pipe": 1}  # tasks of one process
    LANE_WAITING = 64  # messages that wait in one lane, or for one user
    MAX_WAITING = {"relay": 192, "pipe": 192}  # messages that wait at all

    def __init__(self, settings: Settings, owner: User) -> None:
        self.settings = settings
        self.owner = owner
        self.lanes: dict[tuple, list[Task]] = {}
        # Beginning of a lane's name -> message -> its tasks that wait there.
        self.counts: dict[tuple, dict[int, int]] = {}
        self.jobs: dict[int, Job] = {}

    def name(self, task: Task) -> tuple[str, str, str]:
        """The lane of a task: pipe or relay, whose it is, where it goes."""
        destination = task.destination
        if destination.kind == "pipe":
            return "pipe", str(destination.user.uid), destination.place
        return "relay", destination.place, ""

    def add(self, task: Task) -> bool:
        """Puts a task in line; False if the line is full."""
        name = self.name(task)
        line = self.lanes.get(name, [])
        if not (line and line[-1].message is task.message):
            mine = len(self.counts.get(name[:2], ()))
            everybodys = len(self.counts.get(name[:1], ()))
            if mine >= self.LANE_WAITING or everybodys >= self.MAX_WAITING[name[0]]:
                return False
        self.lanes.setdefault(name, line).append(task)
        self.count(name, task, 1)
        return True

    def count(self, name: tuple, task: Task, change: int) -> None:
        """Notes that a task waits in a lane (1), or no longer does (-1)."""
        for head in (name[:1], name[:2]):
            messages = self.counts.setdefault(head, {})
            key = id(task.message)
            messages[key] = messages.get(key, 0) + change
            if not messages[key]:
                del messages[key]
            if not messages:
                del self.counts[head]

    def running(self, head: tuple) -> int:
        """How many processes work for lanes whose names begin like this."""
        names = (self.name(job.tasks[0]) for job in self.jobs.values())
        return sum(name[: len(head)] == head for name in names)

    def has_room(self, name: tuple, kind: str) -> bool:
        """Whether one more process may be started for a lane."""
        is_pipe = kind == "pipe"
        return (
            self.running(name) < self.LANE_JOBS[kind]
            and self.running(name[:1]) < self.MAX_JOBS[name[0]]
            and not (is_pipe and self.running(name[:2]) >= self.USER_JOBS)
        )

    def start(self) -> None:
        """Starts processes for those in line. Raises OSError."""
        for name, line in list(self.lanes.items()):
            kind = line[0].destination.kind
            while line and self.has_room(name, kind):
                batch = line[: self.BATCH[kind]]
                owner = batch[0].destination.user if kind == "pipe" else self.owner
                job = self.JOBS[kind](self.settings, owner, batch)
                self.jobs[job.fd] = job
                del line[: len(batch)]
                for task in batch:
                    self.count(name, task, -1)
            # Whoever is at the end of the dictionary is asked last: turns.
            del self.lanes[name]
            if line:
                self.lanes[name] = line

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
        job.take(data)
        if not data:
            del self.jobs[fd]
        return job.messages()


# == 22 Queue runner: Pickup, QueueRunner, take_lock ==========================
# The schedule: which message is tried when, and what follows from it.
# Failures: MailError for a queue that cannot be read; a message that cannot
# is set aside.

RESCAN = 10  # seconds between looks at the directories, should a wake-up be lost
BATCH = 64  # messages that are open at once
BUSY_TRIES = 30  # seconds that a locked mailbox is waited for before it counts

JOURNAL_ROOM = 1 << 20  # bytes free, or nothing is handed to a child
EARLY_TRIES = 50  # fifths of a second that `sendmail -q` waits for its reports
LANE_PAUSE = 5  # seconds until one that found no place in the line asks again
# What is imported on the way of a message, some of it with a user's rights.
RUNNER_MODULES = ("mailbox", "fcntl", "re", "heapq", "select", "tempfile")


def take_lock(spool: Spool, patience: float) -> int | None:
    """Locks the queue against other runners: a descriptor, or None if taken.

    Waits up to `patience` seconds. The lock is the open directory's; it ends
    with the last process that has it, however that ends. One that was killed
    has it until the kernel is done with it.
    """
    import fcntl

    give_up = time.monotonic() + patience
    fd = os.open(spool.path("queue"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError:
            if time.monotonic() > give_up:
                os.close(fd)
                return None
            time.sleep(0.05)


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

        try:
            names = [name for name in os.listdir(self.drop.directory) if is_id(name)]
        except OSError:
            return
        names = [name for name in names if len(name) == 10]  # no report's id
        short = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
        for name in sorted(names)[:1000]:
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
        preload(*RUNNER_MODULES, *ALIAS_MODULES)
        self.pickup = Pickup(settings, spool, log)
        self.schedule: list[tuple[float, str]] = []
        self.known: set[str] = set()
        self.busy: dict[str, int] = {}
        self.early: set[str] = set()  # reports that wait for their messages
        self.unsettled = set(spool.ids())
        self.partial: list[ActiveMessage] = []  # lists that are not at their end
        self.lanes = Lanes(settings, queue_owner(settings, users))
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
            self.known.add(queue_id)
            heapq.heappush(self.schedule, (when, queue_id))

    def scan(self) -> None:
        """Finds messages that nobody announced, in queue/ and maildrop/."""
        self.pickup.run()
        for queue_id in self.spool.ids():
            if queue_id not in self.known:
                try:
                    self.add(queue_id, self.spool.due(queue_id))
                except FileNotFoundError:
                    continue

    def flush(self) -> None:
        """Makes everything due now."""
        self.scan()
        self.schedule = [(0.0, queue_id) for _, queue_id in sorted(self.schedule)]

    def run_due(self, now: float) -> bool:
        """Tries up to BATCH messages that are due; whether there were any."""
        import heapq

        batch = [self.partial.pop(0)] if self.partial else []
        while self.schedule and self.schedule[0][0] <= now and len(batch) < BATCH:
            message = self.take_up(heapq.heappop(self.schedule)[1], now)
            if message:
                batch.append(message)
        if not batch:
            return False
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
            if os.fstat(file.fd).st_mtime > now:
                # Flushed: after a crash it must come before what is newer.
                self.spool.wait_until(queue_id, now)
            if self.is_early(queue_id, file.envelope.arrived):
                os.close(file.fd)
                self.early.add(queue_id)
                return self.retry(queue_id, now + 0.5)
            message = ActiveMessage(file, self.spool.journal(queue_id), now)
        except FileNotFoundError:
            self.drop(queue_id)
            return None
        except ValueError as error:
            self.drop(queue_id)
            self.set_aside(queue_id, str(error))
            return None
        except OSError as error:
            if file:
                os.close(file.fd)
            self.log.warning("qmgr", f"{queue_id}: {error.strerror}")
            self.drop(queue_id)
            return None
        if not message.journal and queue_id not in self.busy:
            self.log.active(queue_id, file.size, file.envelope)
        return message

    def drop(self, queue_id: str) -> None:
        """Forgets a message that is not there, or cannot be opened now."""
        self.known.discard(queue_id)
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
        self.known.discard(queue_id)
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
            task.pause = LANE_PAUSE

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
        self.start_jobs()

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
        os.close(message.file.fd)
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
            os.close(message.file.fd)

    def give_back(self, message: ActiveMessage, error: Exception) -> None:
        """The queue's disk fails: the message stays, and is tried again.

        What was delivered could not be noted: look before the next time. A
        report that is in the queue waits for the note of it, see is_early().
        """
        message.is_settled = True
        os.close(message.file.fd)
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
            self.log.attempt(message.queue_id, attempt, arrived)

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

    def finish(self, message: ActiveMessage) -> None:
        """Removes a message that every recipient is done with."""
        self.known.discard(message.queue_id)
        self.delivery.suspects.discard(message.queue_id)
        if self.spool.has(message.queue_id):  # it may be set aside
            self.spool.remove(message.queue_id)
            self.log.removed(message.queue_id)

    def retry(self, queue_id: str, when: float) -> None:
        """Puts a message back on the schedule."""
        self.known.discard(queue_id)
        self.add(queue_id, when)

    def back_off(self, message: ActiveMessage, now: float) -> None:
        """Sets the next attempt, by age and chance."""
        chance = os.urandom(1)[0] / 255
        shortest = self.settings.minimal_backoff_time
        longest = self.settings.maximal_backoff_time
        when = now + max(1.0, retry_delay(message.age, shortest, longest, chance))
        self.spool.wait_until(message.queue_id, when)
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
            is_busy = has_run or jobs or self.busy
            if not (is_busy or self.early):
                return
            idle = 0 if is_busy else idle + 1
            self.start_jobs()
            self.lanes.end_late()
            pause = 0 if has_run else 0.2
            for fd in select.select(list(jobs), [], [], pause)[0]:
                self.hear(fd)
            if time.monotonic() > next_scan:
                self.scan()  # what came meanwhile has nobody else
                next_scan = time.monotonic() + 1

    def run_forever(self, wake: int, ends: tuple[int, ...]) -> None:
        """Runs until one of `ends` becomes readable: a signal, or no master.

        `wake` brings what the SMTP server announces: ids and `flush`.
        """
        import select

        self.sweep_and_scan()
        next_scan = time.time() + RESCAN
        while True:
            now = time.time()
            if now >= next_scan:
                self.scan()
                next_scan = now + RESCAN
            has_more = self.run_due(now)
            self.start_jobs()
            self.lanes.end_late()
            pause = 0 if has_more else min(self.pause(now), next_scan - now)
            fds = [wake, *ends, *self.lanes.jobs]
            ready = select.select(fds, [], [], max(0, pause))[0]
            if any(fd in ready for fd in ends):
                return self.wait_for_jobs(GRACE)
            for fd in ready:
                self.listen(wake) if fd == wake else self.hear(fd)

    def wait_for_jobs(self, seconds: float) -> None:
        """Hears out the children: what they do unheard is done twice."""
        import select

        end = time.monotonic() + seconds
        self.lanes.lanes.clear()
        jobs = self.lanes.jobs
        while jobs and time.monotonic() < end:
            for fd in select.select(list(jobs), [], [], 0.5)[0]:
                self.hear(fd)

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
            elif is_id(word):
                self.add(word, time.time())


# == 23 SMTP server: Stream, Conversation, WorkerPool, SmtpServer =============
# Sessions over sockets: TCP, the submit socket, and -bs on standard input.
# Failures: a reply to the client; whatever else goes wrong ends one session.

LINGER = 1  # seconds that a client has to take in why we hang up
READ_TIMEOUT = 300  # seconds a client may be silent, RFC 5321 section 4.5.3.2.7


class Gone(Exception):
    """The client is no longer there, or has been silent for too long."""

    def __init__(self, why: str, reply: Reply | None = None) -> None:
        super().__init__(why)
        self.reply = reply


class PipeStream:
    """Standard input and output as a stream, for -bs; LF may end lines."""

    def __init__(self) -> None:
        self.held = b""

    def recv(self, size: int) -> bytes:
        """Some bytes, each LF made CRLF; b"" at the end."""
        data = self.held + os.read(0, size)
        if data.endswith(b"\r") and data != self.held:
            self.held, data = b"\r", data[:-1]  # its LF may be still to come
            return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") or self.recv(
                size
            )
        self.held = b""
        return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")

    def sendall(self, data: bytes) -> None:
        """All of `data`."""
        write_all(1, data)


class Desk:
    """What a conversation needs of the house: one for each server process.

    `announce(word)` tells the queue runner of a new message or a flush.
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


class Conversation:
    """One client's session on a stream: reads, feeds Session, answers."""

    def __init__(self, desk: Desk, stream: object, client: Client) -> None:
        self.desk = desk
        self.stream = stream
        room = desk.spool.free
        self.session = Session(desk.settings, client, desk.router.verify, room)
        self.buffer = b""
        self.is_skipping = False
        self.has_quit = False

    def run(self) -> bool:
        """The whole conversation; whether the client said QUIT, or was gone.

        Never raises for what the client does.
        """
        client = self.session.client
        try:
            self.say(self.session.greeting())
            while self.exchange():
                pass
            return self.has_quit
        except Gone as gone:
            if not client.is_local:
                self.desk.log.line("smtpd", f"{gone} from {client}")
            self.say_last(gone.reply)
        except OSError:
            if not client.is_local:
                self.desk.log.line("smtpd", f"lost connection from {client}")
        return True

    def say(self, *replies: Reply) -> None:
        """Sends replies, all in one."""
        self.stream.sendall(b"".join(map(bytes, replies)))

    def say_last(self, reply: Reply | None) -> None:
        """Tries to send a reply to a client that may be gone."""
        try:
            if reply:
                self.say(reply)
        except OSError:
            return

    def receive(self) -> bytes:
        """Some bytes from the client. Raises Gone."""
        import socket  # loaded long ago, but for -bs

        try:
            data = self.stream.recv(BLOCK)
        except socket.timeout:  # noqa: UP041 no TimeoutError before Python 3.10
            raise Gone("timeout", TIMED_OUT) from None
        if not data:
            raise Gone("lost connection", CLOSING_DOWN)
        return data

    def exchange(self) -> bool:
        """Answers every command that is there; whether the session goes on.

        The replies of a pipelined group go out in one piece (RFC 2920).
        """
        if b"\n" not in self.buffer:
            self.buffer += self.receive()
        *lines, self.buffer = self.buffer.split(b"\n")
        replies = []
        for number, line in enumerate(lines, 1):
            reply = self.answer(line)
            replies.append(reply)
            if reply.action:
                self.say(*replies)
                self.buffer = b"\n".join([*lines[number:], self.buffer])
                self.act(reply.action)
                self.has_quit = reply == BYE
                return reply.action != "close"
        if len(self.buffer) > MAX_COMMAND:
            self.is_skipping, self.buffer = True, b""  # the rest is no command
        if replies:
            self.say(*replies)
        return True

    def answer(self, line: bytes) -> Reply:
        """The reply to one line, as it came up to its LF."""
        was_skipping, self.is_skipping = self.is_skipping, False
        if was_skipping or len(line) > MAX_COMMAND:
            reply = self.session.counted(LINE_TOO_LONG, "")
        elif not line.endswith(b"\r"):
            reply = self.session.counted(BARE_LF, "")
        else:
            reply = self.session.feed(line[:-1])
        self.write_notes()
        return reply

    def write_notes(self) -> None:
        """Logs what the session refused."""
        for note in self.session.notes:
            self.desk.log.line("smtpd", note)
        self.session.notes.clear()

    def act(self, action: str) -> None:
        """Does what a reply announced."""
        if action == "data":
            reply = self.take_message()
            self.write_notes()
            self.say(reply)
        elif action == "queue":
            for entry in self.desk.spool.entries():
                self.stream.sendall(bytes(entry))
            self.stream.sendall(b".\n\n")
        elif action == "flush":
            self.desk.announce("flush")

    def take_message(self) -> Reply:
        """Reads a message into the spool; the reply to its end.

        Whatever fails, it is read to its end: what follows the real end is a
        command, nothing before it. Nothing that can fail or takes long stands
        between commit() and the reply (RFC 1047).
        """
        now = time.time()
        envelope = self.session.envelope(now)
        reader = DotReader(self.desk.settings.message_size_limit)
        try:
            with self.desk.spool.create(envelope) as draft:
                client = self.session.client
                self.desk.log.accepted(draft.queue_id, client, envelope)
                draft.write(self.session.received(draft.queue_id, now))
                self.copy(reader, draft.write)
                if reader.fault:
                    raise reader.fault
                queue_id = draft.commit()
        except MailError as error:
            self.copy(reader, lambda chunk: None)
            return self.session.failed(error)
        reply = self.session.stored(queue_id)
        self.desk.announce(queue_id)
        return reply

    def copy(self, reader: DotReader, write: object) -> None:
        """Hands a message to `write`, to its end. Raises Gone, MailError."""
        first: bytes | None = b""  # the first line, which may come in pieces
        while not reader.ended:
            chunk = reader.feed(self.buffer or self.receive())
            self.buffer = b""
            if first is not None:
                first += chunk
                if b"\n" not in first and len(first) < MAX_COMMAND and not reader.ended:
                    continue
                chunk, first = begin_body(first), None
            write(chunk)
        self.buffer += reader.rest
        reader.rest = b""


class WorkerPool:
    """A bounded number of threads that serve connections handed to them.

    Threads are started as they are needed, and kept: none is started for a
    message. submit() says no when all of them are busy.
    """

    def __init__(self, limit: int, serve: object) -> None:
        import queue
        import threading

        self.limit = limit
        self.serve = serve
        self.waiting = queue.SimpleQueue()
        self.guard = threading.Lock()
        self.threads = 0
        self.open: dict = {}  # what is served -> whose it is

    @property
    def busy(self) -> int:
        """How many threads serve somebody."""
        return len(self.open)

    def submit(self, connection: tuple, whose: str = "", share: int = 0) -> bool:
        """Has a thread serve `connection`; False if there is none to spare.

        One client (`whose`, "" for those who are trusted) gets no more than
        its share of them.
        """
        with self.guard:
            taken = sum(other == whose for other in self.open.values()) if whose else 0
            if self.busy >= self.limit or whose and taken >= share:
                return False
            if self.busy >= self.threads and not self.start_thread():
                return False
            self.open[connection[0]] = whose
        self.waiting.put(connection)
        return True

    def start_thread(self) -> bool:
        """One thread more; False if the system has none for us."""
        import threading

        try:
            threading.Thread(target=self.work, daemon=True).start()
        except RuntimeError:
            return False
        self.threads += 1
        return True

    def work(self) -> None:
        """One thread's life: a connection after the other."""
        while True:
            connection = self.waiting.get()
            try:
                self.serve(*connection)
            finally:
                with self.guard:
                    del self.open[connection[0]]

    def hang_up(self) -> None:
        """Ends reading on every open connection: each says 421 and goes."""
        import socket

        with self.guard:
            for connection in self.open:
                try:
                    connection.shutdown(socket.SHUT_RD)
                except OSError:
                    continue

    def wait(self, seconds: float) -> bool:
        """Waits until no connection is served; whether that came to be."""
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            time.sleep(0.02)
        return not self.busy


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
        for text in texts:
            bare = text.replace("[", "").replace("]", "")
            try:
                self.networks.append(ipaddress.ip_network(bare, False))
            except ValueError as error:
                why = f"mynetworks: {error}: write 192.0.2.0/24 or [2001:db8::]/32"
                raise ProgramError(EX_CONFIG, why) from None

    def __contains__(self, address: str) -> bool:
        import ipaddress

        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip.version == n.version and ip in n for n in self.networks)


class SmtpServer:
    """The server process: socketserver listeners that share a pool.

    `listeners` are bound sockets, made by the master before rights are
    dropped. serve() returns when stop() was called.
    """

    def __init__(self, desk: Desk, listeners: list) -> None:
        self.desk = desk
        self.listeners = listeners
        self.pool = WorkerPool(desk.settings.default_process_limit, self.converse)
        self.networks = Networks(desk.settings.mynetworks)
        self.servers: list = []

    def serve(self, wait: object) -> None:
        """Accepts connections on every listener until wait() returns.

        wait() blocks in the process's main thread and returns how long open
        sessions may go on, in seconds; 0 ends them with 421.
        """
        import threading

        self.servers = [self.make_server(listener) for listener in self.listeners]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        patience = wait()
        ends = [threading.Thread(target=server.shutdown) for server in self.servers]
        for thread in ends:
            thread.start()  # each takes up to half a second
        for thread in ends:
            thread.join()
        if not patience:
            self.pool.hang_up()
        self.pool.wait(patience or GRACE)

    def make_server(self, listener: object) -> object:
        """A socketserver.TCPServer on a bound socket, feeding the pool."""
        import socketserver  # 10 ms; only the daemon needs it

        admit = self.admit

        class Server(socketserver.TCPServer):
            """Passes each connection on; a thread of the pool closes it."""

            def process_request(self, request: object, client_address: object) -> None:
                admit(request, client_address)

            def handle_error(self, request: object, client_address: object) -> None:
                """What goes wrong with one connection is that one's end."""

        server = Server(listener.getsockname(), None, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        return server

    def admit(self, connection: object, address: object) -> None:
        """Hands a connection to a thread of the pool, or turns it away."""
        client = self.client_of(connection, address)
        is_trusted = client.uid == 0 or (not client.is_local and client.may_relay)
        whose = "" if is_trusted else str(client)
        share = self.desk.settings.smtpd_client_connection_count_limit
        if not self.pool.submit((connection, client), whose, share):
            self.refuse(connection)

    def client_of(self, connection: object, address: object) -> Client:
        """Who has connected, by the word of the kernel."""
        import socket

        if connection.family == socket.AF_UNIX:
            return Client("local", True, peer_uid(connection))
        may_relay = address[0] in self.networks
        return Client(address[0].replace("::ffff:", ""), may_relay)

    def refuse(self, connection: object) -> None:
        """421 for one connection too many."""
        try:
            connection.setblocking(False)
            connection.send(bytes(TOO_MANY_SESSIONS))
        except OSError:
            pass  # it is closed anyway
        connection.close()

    def linger(self, connection: object) -> None:
        """Reads on for a moment: a reset could overtake the last reply."""
        import socket

        try:
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(LINGER)
            for _ in range(8):
                if not connection.recv(BLOCK):
                    return
        except OSError:
            return

    def converse(self, connection: object, client: Client) -> None:
        """One connection's life, in a thread of the pool."""
        import socket

        try:
            connection.settimeout(READ_TIMEOUT)
            if not client.is_local:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not Conversation(self.desk, connection, client).run():
                self.linger(connection)
        except Exception as error:  # noqa: BLE001 one session's end, not the server's
            text = f"session ended by {type(error).__name__}: {error}"
            self.desk.log.warning("smtpd", text)
        finally:
            connection.close()


# == 24 Submission: House, SubmitSocket, Letter, Submission ===================
# The client's side: how mail gets from a command into the queue.
# Failures: MailError when nothing is in the queue.

SUBMIT_TIMEOUT = 300  # seconds for a reply of the daemon
RUN_PATIENCE = 60  # seconds until a queue that somebody else runs is left to them
RCPT_GROUP = 100  # recipients sent before their replies are read


class House:
    """What a program works with; each part is made when it is asked for."""

    def __init__(self, environ: dict, path: str = "", echo: bool = False) -> None:
        self.settings = read_settings(environ, path)
        self.users = Users(self.settings.root)
        self.user = self.users.caller(environ, os.getuid())
        self.log = Log(self.settings, echo)
        for row in SETTINGS:
            if not row.is_used and self.settings.texts[row.name] != row.default:
                text = f"{row.name} is set, but this version does not use it yet"
                self.log.warning("minimta", text)

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

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.buffer = b""

    def connect(self) -> bool:
        """Whether a daemon listens; reads its greeting."""
        # socket.py costs 8 ms, as much as Python's whole start; its C half
        # has all that is needed here.
        import _socket

        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self.socket.settimeout(SUBMIT_TIMEOUT)
        try:
            self.socket.connect(self.address())
        except OSError:
            self.socket.close()
            return False
        return self.reply()[0] == 220

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

    def read_line(self) -> bytes:
        """One line, without its end. Raises MailError."""
        while b"\n" not in self.buffer:
            data = self.socket.recv(1 << 16)
            if not data:
                raise MailError("4.4.2", "the daemon hung up")
            self.buffer += data
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
        """MAIL. Raises MailError."""
        self.send("EHLO localhost", f"MAIL FROM:<{sender}>{options}")
        self.expect(250)
        self.expect(250)

    def offer_recipients(self, recipients: list[str], options: str) -> dict:
        """RCPT for each; recipient -> MailError for each that is refused."""
        refused = {}
        for start in range(0, len(recipients), RCPT_GROUP):
            group = recipients[start : start + RCPT_GROUP]
            self.send(*(f"RCPT TO:<{name}>{options}" for name in group))
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
        block = b""
        while True:
            line = self.read_line()
            if line == b"." and not block:
                return
            block += line + b"\n"
            if not line:
                yield QueueEntry.parse(block)
                block = b""

    def flush(self) -> None:
        """Has everything in the queue tried now."""
        self.send("XFLUSH")
        self.expect(250)

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()


class Letter:
    """A message to submit: envelope, header, and the rest as chunks.

    `notify`, `ret` and `envid` are what -N, -R and -V of sendmail ask for.
    """

    notify = ret = envid = ""

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
        return "".join(words)


def run_queue(house: House, spool: Spool, is_flush: bool) -> bool:
    """Tries everything in the queue, or what is due, once.

    False if somebody else is at it.
    """
    lock = take_lock(spool, RUN_PATIENCE)
    if lock is None:
        return False
    try:
        runner = QueueRunner(house.settings, spool, house.log, house.users)
        runner.run_once(is_flush)
    finally:
        os.close(lock)
    return True


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
    write it; else the maildrop. `delivery` says what happens to a queue that
    no daemon serves: b runs it in the background, i waits for it, q leaves it.
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
        try:
            daemon.offer(str(letter.sender), letter.options())
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
            error = next(iter(refused.values()))
            names = printable(", ".join(refused), 200)
            raise MailError(error.status, f"{names}: {reason(error)}")
        self.refused = refused

    def check(self, letter: Letter) -> None:
        """What the daemon would say to the recipients, without a daemon."""
        router = self.house.router()
        refused = {}
        for address in letter.recipients:
            if self.settings.is_local(address.domain):
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
            text = f"no daemon, and the maildrop cannot be written: {error.text}"
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
        if self.delivery == "q":
            return
        try:
            if self.delivery == "b" and os.fork():
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


# == 25 Daemon: Daemon, SignalPipe ============================================
# The master: binds, starts the others and starts them again. Parses no mail.
# Failures: ProgramError before it is up; afterwards a line in the log.

BACKLOG = 512  # connections that wait to be accepted
LOCK_PATIENCE = 2  # seconds
LONGEST_REST = 60  # seconds before a process that keeps dying is started again


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


def check_settings(house: House) -> None:
    """Raises ProgramError for settings that the children could not use."""
    settings = house.settings
    Networks(settings.mynetworks)
    queue_owner(settings, house.users)
    hops = (("relayhost", "smtp"), ("mailbox_transport", "lmtp"))
    try:
        for name, kind in hops:
            text = getattr(settings, name)
            if text:
                NextHop.parse(text, name, kind)
    except MailError as error:
        raise ProgramError(EX_CONFIG, error.text) from None
    for path in settings.alias_files:
        if os.path.isdir(path):
            house.log.warning("master", f"alias_maps: {path} is a directory")


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
        self.listeners: dict[tuple, object] = {}
        self.asked: set[int] = set()
        self.children = [
            Child("smtpd", self.run_server),
            Child("qmgr", self.run_runner),
        ]

    def open(self) -> None:
        """Makes the queue, locks it, binds sockets. Raises ProgramError."""
        import signal

        check_settings(self.house)  # before anything is opened
        self.spool.make()
        self.lock = take_lock(self.spool, LOCK_PATIENCE)
        if self.lock is None:
            where = self.spool.directory
            why = f"another minimta runs the queue {where}: stop that one first"
            raise ProgramError(EX_TEMPFAIL, why)
        self.bind_all()
        self.submit = self.bind_submit()
        self.lifeline, self.lifeline_end = os.pipe()
        self.wake, self.announce_end = os.pipe()
        os.set_blocking(self.announce_end, False)
        os.chdir("/")
        self.signals = SignalPipe(
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD
        )

    def bind_all(self) -> None:
        """Binds the settings' addresses, keeping those that are bound."""
        settings = self.house.settings
        wanted = [(name, settings.smtpd_port) for name in settings.listen_on]
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
        while True:
            self.start_children()
            waits = [child.due for child in self.children if not child.pid]
            pause = max(0, min(waits) - time.time()) if waits else None
            select.select([self.signals.fd], [], [], pause)
            came = self.signals.take()
            if signal.SIGTERM in came or signal.SIGINT in came:
                return self.stop()
            if signal.SIGHUP in came:
                self.reload()
            self.bury()

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
        preload("socketserver", "queue", "ipaddress", "struct", *ALIAS_MODULES)
        drop_rights(queue_owner(self.house.settings, self.house.users))
        house = self.house
        desk = Desk(
            house.settings, self.spool, house.log, house.router(), self.announce
        )
        server = SmtpServer(desk, [*self.listeners.values(), self.submit])
        server.serve(lambda: self.wait_for_end(signals))

    def wait_for_end(self, signals: SignalPipe) -> float:
        """Blocks until the process should end; seconds that sessions may take.

        SIGHUP: others take over with new settings, sessions may finish.
        """
        import select
        import signal

        ready = select.select([self.lifeline, signals.fd], [], [])[0]
        only_reload = self.lifeline not in ready and signals.take() == {signal.SIGHUP}
        return READ_TIMEOUT if only_reload else 0

    def announce(self, word: str) -> None:
        """Tells the runner an id, or to flush; a full pipe may drop it."""
        try:
            os.write(self.announce_end, os_bytes(word + "\n"))
        except OSError:
            return  # the runner looks by itself in a few seconds

    def run_runner(self) -> None:
        """The queue runner's process: root, to become each recipient."""
        import signal

        for listener in (*self.listeners.values(), self.submit):
            listener.close()
        signals = SignalPipe(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # relays end all the time
        house = self.house
        runner = QueueRunner(house.settings, self.spool, house.log, house.users)
        runner.run_forever(self.wake, (self.lifeline, signals.fd))

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

    def reload(self) -> None:
        """Reads the settings again; bad ones change nothing."""
        import signal

        before = self.house
        try:
            self.house = House(self.environ, self.path, before.log.echo)
            check_settings(self.house)
            if self.house.settings.queue_directory != self.spool.directory:
                raise ProgramError(EX_CONFIG, "queue_directory: needs a restart")
            self.bind_all()
        except ProgramError as error:
            self.house = before
            self.house.log.warning("master", f"settings not read: {error}")
            return
        self.house.log.line("master", "settings read again")
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


# == 26 Mail reader: Terminal, Composer, MailReader ===========================
# mail(1): what is typed, what is shown, what is left in the mailbox.
# Source: POSIX mailx; where it is silent, Heirloom mailx.
# Failures: a line on the terminal and the next prompt; ProgramError to end.

IGNORED_FIELDS = (
    "received in-reply-to message-id references mime-version "
    "content-transfer-encoding status"
).split()
SCREEN = 20  # header lines on one screen


def decoded(value: str) -> str:
    """A header field's value with its RFC 2047 words decoded, safe to show."""
    if "=?" in value:
        from email.header import decode_header, make_header  # 20 ms

        try:
            value = str(make_header(decode_header(value)))
        except Exception:  # noqa: BLE001, S110 hostile mail is shown as it came
            pass
    return terminal_text(" ".join(value.split()))


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


def mime_text(header: Header) -> str:
    """The text of a MIME message, by the email package."""
    import email  # 20 ms; plain mail does without
    import email.policy

    raw = bytes(header) + b"\n" + header.rest
    try:
        message = email.message_from_bytes(raw, policy=email.policy.default)
        part = message.get_body(("plain", "html")) or message
        data = part.get_payload(decode=True) or b""
        charset = part.get_content_charset("utf-8")
        text = data.decode(charset, "replace")
    except (LookupError, ValueError, RecursionError):
        text = header.rest.decode("utf-8", "replace")
    return terminal_text(text)


def body_text(header: Header, limit: int = 1 << 24) -> str:
    """The readable text of a message: its text/plain part, decoded."""
    kind = " ".join(header.values("content-type")).lower()
    coding = " ".join(header.values("content-transfer-encoding")).lower()
    if "multipart/" in kind or coding in ("quoted-printable", "base64"):
        return mime_text(header)
    return terminal_text(header.rest[:limit].decode("utf-8", "replace"))


class Terminal:
    """Standard input and output; prompts only where a person is."""

    def __init__(self) -> None:
        self.is_interactive = os.isatty(0)
        self.buffer = b""

    def say(self, text: str) -> None:
        """Prints text as it is."""
        write_all(1, text.encode("utf-8", "replace"))

    def complain(self, text: str) -> None:
        """A line on standard error."""
        write_all(2, f"{printable(text)}\n".encode("utf-8", "replace"))

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

    def read_all(self) -> bytes:
        """Everything that is left, ending in LF."""
        blocks = [self.buffer]
        self.buffer = b""
        while blocks[-1] or len(blocks) == 1:
            blocks.append(self.read())
        text = b"".join(blocks).replace(b"\r\n", b"\n")
        return text if not text or text.endswith(b"\n") else text + b"\n"


def settings_address(house: House) -> str:
    """The caller's own address."""
    return str(Address(house.user.name, house.settings.myorigin))


def unique_word(now: float) -> str:
    """The left side of a Message-ID."""
    t = time.gmtime(now)
    stamp = time.strftime("%Y%m%d%H%M%S", t)  # digits only: no locale in them
    return f"{stamp}.{os.urandom(6).hex().upper()}"


class Composer:
    """Makes a message out of what is typed, and submits it."""

    def __init__(self, house: House, terminal: Terminal) -> None:
        self.house = house
        self.terminal = terminal

    def read_body(self) -> bytes:
        """The text up to end of file, or a lone dot on a terminal."""
        if not self.terminal.is_interactive:
            return self.terminal.read_all()
        lines = []
        while True:
            line = self.terminal.read_line("")
            if line is None or line == b".":
                self.terminal.say("EOT\n")
                break
            lines.append(line + b"\n")
        return b"".join(lines)

    def send(self, sender: str, fields: list[tuple[str, str]], body: bytes) -> str:
        """Submits a message; its queue id. Raises MailError.

        `fields` are header fields; recipients are taken from To, Cc and Bcc.
        """
        house = self.house
        header = Header([])
        for name, value in fields:
            clean = " ".join(value.replace("\r", "\n").split("\n"))
            if clean.strip():
                header = header.added(name, self.coded(name, clean))
        for name, value in self.mime_fields(body):
            header = header.added(name, value)
        origin = settings_address(house)
        address = header_addresses(sender)[0] if sender else Address.parse(origin)
        recipients = [
            found.qualified(house.settings.local_origin)
            for found in header_recipients(header)
        ]
        now = time.time()
        header = complete_header(
            header,
            {
                "address": str(address.qualified(house.settings.myorigin)),
                "name": "",  # mailx leaves it to -r and the variable `from`
                "host": house.settings.myhostname,
                "unique": unique_word(now),
                "now": now,
            },
        )
        address = address.qualified(house.settings.myorigin)
        submission = Submission(house)
        try:
            queue_id = submission.submit(Letter(address, recipients, header, [body]))
        except MailError:
            self.rescue(bytes(header) + b"\n" + body)
            raise
        for name, error in submission.refused.items():
            self.terminal.complain(f"{name}: {reason(error)}: it will be bounced")
        return queue_id

    def rescue(self, text: bytes) -> None:
        """Appends what could not be sent to ~/dead.letter, and says so."""
        path = os.path.join(self.house.user.home, "dead.letter")
        from_line = f"From {self.house.user.name}  {asctime(time.time())}\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            self.terminal.complain(f"{path}: {error.strerror}: the text is lost")
            return
        try:
            write_all(fd, os_bytes(from_line) + text + b"\n")
        finally:
            os.close(fd)
        self.terminal.complain(f"the text is kept in {path}")

    def coded(self, name: str, value: str) -> str:
        """A value fit for a header: what is not ASCII is encoded."""
        if value.isascii() or name in ("To", "Cc", "Bcc", "From"):
            return value
        return encoded_word(value)

    def mime_fields(self, body: bytes) -> list[tuple[str, str]]:
        """What says how the text is to be read; decided by its bytes."""
        charset, coding = "us-ascii", "7bit"
        if not body.isascii():
            coding = "8bit"
            try:
                body.decode("utf-8")
                charset = "utf-8"
            except UnicodeDecodeError:
                charset = "unknown-8bit"
        return [
            ("MIME-Version", "1.0"),
            ("Content-Type", f"text/plain; charset={charset}"),
            ("Content-Transfer-Encoding", coding),
        ]


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


def others_in(header: Header, house: House, *names: str) -> list[str]:
    """The addresses in these fields that are not the caller's own."""
    found: list[str] = []
    for value in (value for name in names for value in header.values(name)):
        for address in header_addresses(value):
            is_own = address.local == house.user.name
            is_own = is_own and house.settings.is_local(address.domain)
            if not is_own and str(address) not in found:
                found.append(str(address))
    return found


def reply_fields(header: Header, house: House) -> list[tuple[str, str]]:
    """The header of an answer to everybody but oneself."""
    author = "reply-to" if header.has("reply-to") else "from"
    to = others_in(header, house, author, "to") or [settings_address(house)]
    copies = [name for name in others_in(header, house, "cc") if name not in to]
    subject = decoded(" ".join(header.values("subject")[:1]))
    if not subject.lower().startswith("re:"):
        subject = f"Re: {subject}"
    ids = header.values("message-id")[:1]
    chain = [*" ".join(header.values("references")).split(), *ids]
    return [
        ("To", ", ".join(to)),
        ("Cc", ", ".join(copies)),
        ("Subject", subject),
        ("In-Reply-To", " ".join(ids)),
        ("References", " ".join(chain)),
    ]


class MailReader:
    """A session on one folder: a line is a command and its messages.

    `dot` is the current message's number, from 1. Commands are methods in
    MAIL_COMMANDS; each takes the rest of the line and may raise ValueError
    with what is wrong with it.
    """

    def __init__(self, house: House, terminal: Terminal, folder: Folder) -> None:
        self.house = house
        self.terminal = terminal
        self.folder = folder
        self.messages = folder.messages
        self.is_over = False
        self.was_printed = False
        self.dot = self.first_dot()

    def first_dot(self) -> int:
        """The first new message, else the first unread one, else the first."""
        for wanted in ("is_new", "is_unread"):
            for number, message in enumerate(self.messages, 1):
                if getattr(message, wanted):
                    return number
        return min(1, len(self.messages))

    def run(self) -> int:
        """The session. The exit code."""
        say = self.terminal.say
        say(f"minimta mail {__version__}.  Type ? for help.\n{self.banner()}\n")
        self.headers("")
        while not self.is_over:
            line = self.terminal.read_line("& ")
            if line is None:
                if self.terminal.is_interactive:
                    say("\n")
                self.quit("")
            else:
                self.obey(os_text(line).strip())
        return EX_OK

    def banner(self) -> str:
        """`"/var/mail/bob": 2 messages 1 new 2 unread`."""
        total = len(self.messages)
        new = sum(message.is_new for message in self.messages)
        unread = sum(message.is_unread for message in self.messages)
        text = f'"{self.folder.path}": {total} message{"" if total == 1 else "s"}'
        text += f" {new} new" if new else ""
        text += f" {unread} unread" if unread > new else ""
        return text + (" [Read only]" if self.folder.is_read_only else "")

    def find_command(self, word: str) -> object:
        """The command of a name or an unfinished one; next for none."""
        if not word:
            return MailReader.next
        rows = [(names.split(), command) for names, command in self.COMMANDS]
        for names, command in rows:
            if word in names:
                return command
        for names, command in rows:
            if any(name.startswith(word) for name in names):
                return command
        return None

    def obey(self, line: str) -> None:
        """One command line."""
        end = 0
        while end < len(line) and (
            line[end].isalpha() or line[end] in "?=" and not end
        ):
            end += 1
        word, rest = line[:end], line[end:].strip()
        command = self.find_command(word)
        if command is None:
            self.terminal.say(f'Unknown command: "{terminal_text(word)}"\n')
            return
        try:
            command(self, rest)
        except ValueError as error:
            self.terminal.say(f"{terminal_text(str(error))}\n")
        except (MailError, ProgramError) as error:
            self.terminal.complain(str(error))
        except OSError as error:
            self.terminal.complain(f"{error.filename or word}: {error.strerror}")

    def numbers(self, text: str, is_deleted: bool = False) -> list[int]:
        """The messages that a list names; the current one for an empty list.

        Raises ValueError in mailx's words.
        """
        found: list[int] = []
        for word in text.replace(",", " ").split() or [str(self.dot)]:
            found += [n for n in self.range(word) if n not in found]
        for number in found:
            if not 0 < number <= len(self.messages):
                raise ValueError(f"{number}: Invalid message number")
            if self.is_gone(number) != is_deleted:
                raise ValueError(f"{number}: Inappropriate message")
        if not found:
            raise ValueError("No applicable messages")
        return found

    def range(self, word: str) -> list[int]:
        """The numbers that one word of a list names: `3`, `2-4`, `*`."""
        if word == "*":
            return [n for n, m in enumerate(self.messages, 1) if not m.state]
        low, dash, high = word.partition("-")
        if dash and low:
            last = min(self.number(high), len(self.messages) + 1)
            return list(range(self.number(low), last + 1))
        return [self.number(word)]

    def number(self, word: str) -> int:
        """One message's number: digits, `.`, `$`, `^`, `+`, `-`."""
        places = {".": self.dot, "$": len(self.messages), "^": 1}
        places.update({"+": self.dot + 1, "-": self.dot - 1})
        if word.isascii() and word.isdigit():
            return int(word[:9])
        if word not in places:
            raise ValueError(f"{word}: Invalid message list")
        return places[word]

    def headers(self, rest: str) -> None:
        """Lists the screen of headers that the current message is on."""
        if not self.messages:
            return
        number = self.numbers(rest)[0] if rest else max(1, self.dot)
        start = (number - 1) // SCREEN * SCREEN
        for place in range(start, min(start + SCREEN, len(self.messages))):
            if not self.is_gone(place + 1):
                self.terminal.say(self.summary(place + 1) + "\n")

    def summary(self, number: int) -> str:
        """One line of the header list, 80 columns at the most."""
        message = self.messages[number - 1]
        from_line, header = self.folder.read(message)
        mark = ">" if number == self.dot else " "
        flag = "*" if message.state else "N" if message.is_new else "U"
        if flag != "*" and not message.is_unread:
            flag = " "
        name = sender_name(header, from_line)[:20]
        words = os_text(from_line).split()
        date = terminal_text(" ".join(words[-5:])[:16])
        if len(words) > 4 and len(words[-3]) == 1:
            date = terminal_text(os_text(from_line).strip()[-24:][:16])
        size = message.end - message.start
        text = (
            f"{mark}{flag}{number:3} {name:20}  {date:16} {message.lines:3}/{size:<5} "
        )
        subject = " ".join(header.values("subject")[:1])
        return f'{text}"{decoded(subject)[: max(0, 76 - len(text))]}"'.rstrip()

    def next(self, rest: str) -> None:
        """Prints the next message, or the one named."""
        if rest:
            return self.show(str(self.numbers(rest)[0]))
        number = self.dot
        if self.was_printed or self.is_gone(number):
            number += 1
            while number <= len(self.messages) and self.is_gone(number):
                number += 1
        if not 0 < number <= len(self.messages):
            raise ValueError("At EOF")
        return self.show(str(number))

    def is_gone(self, number: int) -> bool:
        """Whether a message is deleted."""
        return number > 0 and self.messages[number - 1].state == "deleted"

    def show(self, rest: str) -> None:
        """Prints messages."""
        for number in self.numbers(rest):
            message = self.messages[number - 1]
            from_line, header = self.folder.read(message)
            lines = [f"Message {number:2}:", terminal_text(os_text(from_line))]
            for name, raw in header.fields:
                if name not in IGNORED_FIELDS:
                    label, _, value = os_text(raw).partition(":")
                    lines.append(f"{label}: {decoded(value)}")
            message.was_read = True
            status = message.next_status() if message.status else "R"
            lines.append(f"Status: {status}")
            text = unquoted(body_text(header))
            self.terminal.say("\n".join(lines) + "\n\n" + text)
            self.dot, self.was_printed = number, True

    def delete(self, rest: str) -> None:
        """Deletes messages; u brings them back until q."""
        for number in self.numbers(rest):
            self.messages[number - 1].state = "deleted"
            self.dot = number
        alive = [n for n, m in enumerate(self.messages, 1) if m.state != "deleted"]
        after = [number for number in alive if number > self.dot]
        self.dot = (after or alive[-1:] or [0])[0]
        self.was_printed = False

    def undelete(self, rest: str) -> None:
        """Brings deleted messages back."""
        deleted = [n for n, m in enumerate(self.messages, 1) if m.state == "deleted"]
        if not rest:
            behind = [number for number in deleted if number >= self.dot]
            rest = str((behind or deleted[-1:] or [0])[0])
        for number in self.numbers(rest, True):
            self.messages[number - 1].state = ""
            self.dot = number

    def reply(self, rest: str) -> None:
        """Answers the sender and all who got it."""
        number = self.numbers(rest)[0]
        _, header = self.folder.read(self.messages[number - 1])
        fields = reply_fields(header, self.house)
        for name, value in fields:
            if name in ("To", "Cc", "Subject") and value:
                self.terminal.say(f"{name}: {terminal_text(value)}\n")
        self.terminal.say("\n")
        composer = Composer(self.house, self.terminal)
        composer.send("", fields, composer.read_body())

    def save(self, rest: str) -> None:
        """Appends messages to a file: s [list] file; they leave at q."""
        numbers, path = self.split_file(rest)
        pieces = []
        for number in numbers:
            message = self.messages[number - 1]
            from_line, header = self.folder.read(message)
            pieces.append(from_line + b"\n" + bytes(header) + b"\n" + header.rest)
        self.append_to(path, b"".join(pieces), 0o600)
        for number in numbers:
            self.messages[number - 1].state = "saved"
            self.messages[number - 1].was_read = True

    def write(self, rest: str) -> None:
        """Appends the text of messages, without headers, to a file."""
        numbers, path = self.split_file(rest)
        bodies = [self.folder.read(self.messages[n - 1])[1] for n in numbers]
        text = "".join(unquoted(body_text(header)) for header in bodies)
        self.append_to(path, text.encode("utf-8", "replace"), 0o666)

    def split_file(self, rest: str) -> tuple[list[int], str]:
        """(messages, file) of `[list] file`. Raises ValueError."""
        words = rest.rsplit(None, 1)
        if not words:
            raise ValueError("No file specified")
        path = os.path.expandvars(os.path.expanduser(words[-1].strip("\"'")))
        return self.numbers(words[0] if len(words) > 1 else ""), path

    def append_to(self, path: str, text: bytes, mode: int) -> None:
        """Appends to a file of the reader's, durably, and says so."""
        is_new = not os.path.exists(path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(path, flags, mode)
        try:
            write_all(fd, text)
            os.fsync(fd)
        finally:
            os.close(fd)
        what = "[New file]" if is_new else "[Appended]"
        lines = text.count(b"\n")
        self.terminal.say(f'"{terminal_text(path)}" {what} {lines}/{len(text)}\n')

    def help(self, _: str) -> None:
        """This list."""
        rows = []
        for names, command in self.COMMANDS:
            summary = (command.__doc__ or "").partition("\n")[0]
            rows.append(f"{names:19} {summary}\n")
        self.terminal.say("".join(rows))

    def exit(self, _: str) -> None:
        """Leaves; the mailbox stays as it was."""
        self.is_over = True

    def quit(self, _: str) -> None:
        """Leaves; what is deleted or saved is gone from the mailbox."""
        kept = 0 if self.folder.is_read_only else self.folder.write()
        self.is_over = True
        if kept:
            plural = "" if kept == 1 else "s"
            self.terminal.say(f"Held {kept} message{plural} in {self.folder.path}\n")

    # Abbreviation and name -> what it does; ? prints it.
    COMMANDS = (
        ("n next", next),
        ("p t print type", show),
        ("h headers", headers),
        ("d delete", delete),
        ("u undelete", undelete),
        ("r reply respond", reply),
        ("s save", save),
        ("w write", write),
        ("q quit", quit),
        ("x ex exit xit", exit),
        ("? help", help),
    )


# =============================================================================
# DOORS: the programs.
# =============================================================================

# == 27 Programs: SendmailOptions, cmd_sendmail, cmd_mail, cmd_serve ... ======
# A program is a function from arguments to an exit code; its docstring is what
# --help prints.
# Failures: ProgramError and MailError, which main() turns into a line.

KNOWN_MODES = "m s p i v t d D l q V".split()  # of -bX

# sendmail's letters: "" takes nothing, ":" an argument (glued or separate),
# "?" one that is glued or none. What is done with it: see SendmailOptions.
SENDMAIL_FLAGS = {
    **dict.fromkeys("GIUcimnstv", ""),
    **dict.fromkeys("ABCFLNORVXbfhopr", ":"),
    **dict.fromkeys("EJMdeq", "?"),
}


class SendmailOptions:
    """sendmail's command line: options in any order, recipients anywhere.

    Every flag of any sendmail is taken; those with no meaning here are
    ignored. Raises ProgramError EX_USAGE for one that nobody ever had.
    """

    def __init__(self, args: list[str]) -> None:
        self.mode = "m"
        self.sender: str | None = None
        self.full_name = ""
        self.reads_header = False
        self.dot_ends = True
        self.is_verbose = False
        self.delivery = "b"
        self.config = ""
        self.alias_file = ""
        self.notify = ""
        self.ret = ""
        self.envid = ""
        self.hops = 0
        self.recipients: list[str] = []
        self.read(list(args))

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
            kind = SENDMAIL_FLAGS.get(letter)
            if kind is None:
                text = f"illegal option -- {printable(letter)}: see sendmail --help"
                raise ProgramError(EX_USAGE, text)
            value = ""
            if kind:
                value, letters = self.argument(letter, letters, args), ""
            self.take(letter, value)

    def argument(self, letter: str, glued: str, args: list[str]) -> str:
        """What an option says: the rest of its word, or the next one."""
        if letter + glued == "oA" and args:
            return glued + args.pop(0)
        if glued or SENDMAIL_FLAGS[letter] == "?":
            return glued
        if not args:
            text = f"option requires an argument -- {letter}: see --help"
            raise ProgramError(EX_USAGE, text)
        return args.pop(0)

    def take(self, letter: str, value: str) -> None:
        """One option; letters without a row here mean nothing to us."""
        rows = {
            "b": self.take_mode,
            "o": self.take_option,
            "O": self.take_long_option,
            "f": self.take_sender,
            "r": self.take_sender,
            "q": self.take_queue,
        }
        texts = {"F": "full_name", "C": "config", "N": "notify", "R": "ret"}
        texts["V"] = "envid"
        flags = {"t": ("reads_header", True), "i": ("dot_ends", False)}
        flags.update({"v": ("is_verbose", True), "I": ("mode", "i")})
        self.check(letter, value)
        if letter in rows:
            rows[letter](value)
        elif letter in texts:
            setattr(self, texts[letter], value)
        elif letter in flags:
            setattr(self, *flags[letter])

    def check(self, letter: str, value: str) -> None:
        """Options whose value must make sense. Raises ProgramError."""
        checks = {
            "B": lambda text: text.lower() in ("7bit", "8bitmime"),
            "N": is_notify,
            "R": lambda text: text.lower() in ("full", "hdrs", "headers"),
            "V": lambda text: is_xtext(text, 100),
        }
        if letter in checks and not checks[letter](value):
            raise ProgramError(
                EX_USAGE, f"bad value for -{letter}: {printable(value)}: see --help"
            )
        if letter == "h" and not value.isdigit():
            raise ProgramError(
                EX_USAGE, f"Bad hop count ({printable(value)}): give a number"
            )

    def take_mode(self, value: str) -> None:
        """-bX: what to be."""
        if value not in KNOWN_MODES:
            raise ProgramError(
                EX_USAGE, f"Invalid operation mode {printable(value)}: see --help"
            )
        if value == "q":
            self.delivery = "q"
        else:
            self.mode = {"l": "d"}.get(value, value)

    def take_option(self, value: str) -> None:
        """-oX: sendmail's options by letter."""
        if value in ("i", "itrue"):
            self.dot_ends = False
        elif value[:1] == "d" and value[1:2]:
            self.delivery = {"i": "i", "f": "i", "q": "q", "d": "q"}.get(value[1], "b")
        elif value[:1] == "A":
            self.alias_file = value[1:]

    def take_long_option(self, value: str) -> None:
        """-O Name=value: sendmail's options by name."""
        name, _, text = value.partition("=")
        short = {"deliverymode": "d", "ignoredots": "i", "aliasfile": "A"}
        letter = short.get(name.strip().lower())
        if letter == "i" and text.strip().lower()[:1] in ("t", "y", "1", ""):
            self.take_option("i")
        elif letter in ("d", "A"):
            self.take_option(letter + text.strip())

    def take_sender(self, value: str) -> None:
        """-f, -r: the envelope's sender; "" and <> are the null sender."""
        self.sender = value

    def take_queue(self, value: str) -> None:
        """-q: run the queue; with -bd the interval, which is not needed."""
        if self.mode not in ("d", "D"):
            self.mode = "q"


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
    if len(found) != 1:
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
        try:
            found += header_addresses(word.removeprefix("\\"))
        except MailError as error:
            raise ProgramError(EX_DATAERR, error.text) from None
    origin = house.settings.myorigin
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
    block = b""
    for chunk in chunks:
        block += chunk
        if b"\n\n" in block or len(block) > MAX_HEADER:
            break
    header = Header.parse(drop_from_lines(block))
    if len(block) > MAX_HEADER and not header.rest:
        raise ProgramError(EX_DATAERR, "the header is over 1 MB: shorten it")
    return header


def print_version() -> int:
    """--version."""
    write_all(1, os_bytes(f"minimta {__version__}\n"))
    return EX_OK


def complain(name: str, text: str) -> None:
    """One line on standard error: NAME: what is wrong: what to do about it."""
    try:
        write_all(2, os_bytes(f"{name}: {printable(text)}\n"))
    except OSError:
        return  # nobody listens


def find_recipients(house: House, header: Header) -> list[Address]:
    """The recipients that -t finds. Raises ProgramError."""
    try:
        found = header_recipients(header)
    except MailError as error:
        raise ProgramError(EX_DATAERR, error.text) from None
    origin = house.settings.myorigin
    return [address.qualified(origin) for address in found if address.local]


def send_stdin(options: SendmailOptions, environ: dict) -> int:
    """Submits the message on standard input."""
    if not (options.recipients or options.reads_header):
        raise ProgramError(EX_USAGE, "no recipients: name them, or use -t")
    house = House(environ, options.config)
    sender = read_sender(house, options.sender)
    recipients = read_recipients(house, options.recipients)
    chunks = read_input(options.dot_ends)
    header = read_header(chunks)
    if options.reads_header:
        recipients += find_recipients(house, header)
    unique = list(dict.fromkeys(recipients))
    if not unique:
        raise ProgramError(
            EX_USAGE, "no recipients in the header or the arguments: name somebody"
        )
    user, now = house.user, time.time()
    origin = {
        "address": str(sender) or str(Address(user.name, house.settings.myorigin)),
        "name": options.full_name or gecos_name(user.gecos, user.name),
        "host": house.settings.myhostname,
        "unique": unique_word(now),
        "now": now,
    }
    submission = Submission(house, options.delivery)
    letter = Letter(sender, unique, complete_header(header, origin), chunks)
    letter.notify, letter.envid = options.notify.upper(), options.envid
    letter.ret = {"": "", "full": "FULL"}.get(options.ret.lower(), "HDRS")
    queue_id = submission.submit(letter)
    for name, error in submission.refused.items():
        complain("sendmail", f"{name}: {reason(error)}: it will be bounced")
    if options.is_verbose:
        write_all(2, os_bytes(f"sendmail: queued as {queue_id}\n"))
    return EX_OK


def pass_through(daemon: SubmitSocket, house: House) -> int:
    """Carries bytes between the daemon and standard input and output."""
    import select

    stream = PipeStream()
    greeting = f"220 {house.settings.myhostname} ESMTP minimta\r\n"
    stream.sendall(os_bytes(greeting) + daemon.buffer)
    ends = [0, daemon.socket.fileno()]
    while True:
        ready = select.select(ends, [], [])[0]
        if ends[-1] in ready:
            data = daemon.socket.recv(BLOCK)
            if not data:
                return EX_OK
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
    if daemon.connect():
        return pass_through(daemon, house)
    owns = house.owns_queue()
    spool = house.spool() if owns else Maildrop(house.settings.queue_directory)
    if owns:
        spool.make()
    stored: list[str] = []
    desk = Desk(house.settings, spool, house.log, house.router(), stored.append)
    Conversation(desk, PipeStream(), Client("local", True, os.getuid())).run()
    if owns and stored and options.delivery != "q":
        run_queue(house, spool, False)
    return EX_OK


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
    return f"{count} message{'' if count == 1 else 's'}"


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


def verify_recipients(options: SendmailOptions, environ: dict) -> int:
    """-bv: says of each recipient where it leads, in sendmail's words."""
    house = House(environ, options.config)
    router = house.router(TargetFiles(house.users))
    every = []
    for address in read_recipients(house, options.recipients):
        for found in router.resolve(address, frozenset()):
            found.error = found.error or courier_problem(found)
            if found.kind == "remote":  # whether it can be reached, shows then
                found.error = None
            every.append(found)
            write_all(1, os_bytes(printable(verdict_line(found)) + "\n"))
    if not every:
        raise ProgramError(EX_USAGE, "no recipients to check: name one")
    return routing_code(every)


def explain(house: House, address: Address) -> tuple[Branch, list]:
    """(the tree of what would be done with mail for an address, its ends).

    Drawn by the code that delivers; changes nothing.
    """
    tree = Branch(str(address))
    router = house.router(TargetFiles(house.users))
    router.resolver = Resolver(house.settings.root)
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


def print_explanations(house: House, words: list[str], as_json: bool) -> int:
    """Explains each address. 0, 67 or 75."""
    every = []
    for address in read_recipients(house, words):
        tree, found = explain(house, address)
        every += found
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


def flush_queue(options: SendmailOptions, environ: dict) -> int:
    """-q: tries everything in the queue now."""
    house = House(environ, options.config)
    daemon = SubmitSocket(house.settings.queue_directory)
    if daemon.connect():
        daemon.send("EHLO localhost")
        daemon.expect(250)
        daemon.flush()
        return EX_OK
    if not house.owns_queue():
        raise ProgramError(EX_UNAVAILABLE, "the daemon is down: root can run the queue")
    spool = house.spool()
    spool.make()
    if not run_queue(house, spool, True):
        raise ProgramError(EX_TEMPFAIL, "another minimta runs the queue already")
    return EX_OK


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
    """-bD in the foreground, -bd in the background."""
    return run_daemon(environ, options.config, options.mode == "d")


def queue_entries(house: House) -> object:
    """Every message in the queue. Raises ProgramError EX_UNAVAILABLE."""
    if house.owns_queue():
        if os.path.isdir(house.spool().path("queue")):
            yield from house.spool().entries()
        return
    daemon = SubmitSocket(house.settings.queue_directory)
    if not daemon.connect():
        raise ProgramError(
            EX_UNAVAILABLE, "the daemon is down, and only root may read the queue"
        )
    daemon.send("EHLO localhost")
    daemon.expect(250)
    yield from daemon.entries()
    daemon.close()


def show_queue(options: SendmailOptions, environ: dict) -> int:
    """-bp: the queue, read by ourselves if we may, else by the daemon."""
    house = House(environ, options.config)
    for piece in mailq_text(queue_entries(house)):
        write_all(1, os_bytes(piece))
    return EX_OK


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
    table = AliasDatabase(path).rebuild()
    for line, reason in table.problems:
        complain("newaliases", f"{path}, line {line}: {reason}")
    warnings = alias_warnings(house, path, table)
    for line, reason in sorted(warnings)[:MAX_WARNINGS]:
        where = f", line {line}" if line else ""
        complain("newaliases", f"{path}{where}: warning: {reason}")
    if len(warnings) > MAX_WARNINGS:
        count = len(warnings) - MAX_WARNINGS
        complain("newaliases", f"{path}: warning: {count} more of this kind")
    if table.problems:
        return EX_DATAERR
    items = [
        (len(os_bytes(name)), len(os_bytes(value))) for name, value in table.items()
    ]
    longest = max((value for _, value in items), default=0)
    total = sum(name + value for name, value in items)
    text = f"{path}: {len(items)} aliases, longest {longest} bytes, {total} bytes total"
    write_all(1, os_bytes(text + "\n"))
    return EX_OK


def build_aliases(options: SendmailOptions, environ: dict) -> int:
    """-bi: newaliases."""
    if options.recipients or options.mode not in "mi":
        raise ProgramError(EX_USAGE, "no such argument here: see newaliases --help")
    house = House(environ, options.config)
    paths = [options.alias_file] if options.alias_file else house.settings.alias_files
    codes = [build_one(house, path) for path in paths]
    return max(codes, default=EX_OK)


def cmd_sendmail(args: list[str], environ: dict) -> int:
    """usage: sendmail [options] [recipient ...]      reads a message on stdin

    -t           recipients from To, Cc and Bcc too; Bcc is removed
    -f ADDR      envelope sender (also -r); '<>' is the null sender
    -F NAME      full name, for a From field that is missing
    -i, -oi      a line with only a dot does not end the message
    -v           says the queue id
    -odb -odi -odq   without a daemon: deliver behind, before, not at all
    -bs          SMTP on standard input and output
    -bp          the queue (mailq)          -q   try everything in it now
    -bi          the aliases (newaliases)   -bv  check recipients
    -bt          explain where they lead    -N WORDS -R full|hdrs -V ID  DSN
    -bd, -bD     the daemon, in the background or the foreground
    -C FILE      settings                   -oA FILE  the aliases file (-bi)
    """
    options = SendmailOptions(args)
    if options.mode == "V":
        return print_version()
    modes = {"d": start_daemon, "D": start_daemon, "p": show_queue, "i": build_aliases}
    modes.update({"s": serve_stdin, "v": verify_recipients, "q": flush_queue})
    modes["t"] = explain_recipients
    return modes.get(options.mode, send_stdin)(options, environ)


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


def cmd_serve(args: list[str], environ: dict) -> int:
    """usage: minimta.py serve [-C FILE]

    Runs the daemon in the foreground: SMTP server and queue runner.
    SIGTERM ends it, SIGHUP reads the settings again.
    """
    return run_daemon(environ, config_option("serve", args), False)


def cmd_mailq(args: list[str], environ: dict) -> int:
    """usage: mailq [-C FILE]

    Shows the queue in Postfix's format; * is active, ! is on hold. Anyone may
    ask while the daemon runs; without it, only who may read the queue.
    """
    if [word for word in args if word not in ("-v", "-Ac", "-Am")][:1] not in (
        [],
        ["-C"],
    ):
        raise ProgramError(
            EX_USAGE, f"unknown argument {printable(args[0])}: see --help"
        )
    return show_queue(SendmailOptions(args), environ)


def cmd_newaliases(args: list[str], environ: dict) -> int:
    """usage: newaliases [-C FILE] [-oA FILE]

    Builds the database from the aliases file, in one step: with a bad line
    nothing is changed. Says how many aliases there are, and warns of loops.
    """
    return build_aliases(SendmailOptions(args), environ)


def mailbox_path(house: House, options: dict, environ: dict, words: list[str]) -> str:
    """Which mailbox to read: -f FILE, -u USER, $MAIL, or one's own."""
    settings = house.settings
    if "-f" in options:
        return words[0] if words else os.path.join(house.user.home, "mbox")
    if "-u" in options:
        user = house.users.lookup(options["-u"])
        if user is None:
            name = printable(options["-u"], 60)
            raise ProgramError(1, f'"{name}" is not a user of this system')
        return f"{settings.mail_spool_directory}/{user.name}"
    chosen = environ.get("MAIL", "")
    if chosen and (not settings.root or chosen.startswith(settings.root + "/")):
        return chosen
    return f"{settings.mail_spool_directory}/{house.user.name}"


def send_mail(house: House, options: dict, words: list[str]) -> int:
    """mail with recipients: composes and submits."""
    terminal = Terminal()
    recipients = [str(address) for address in read_recipients(house, words)]
    subject = options.get("-s", "")
    if "-s" not in options and terminal.is_interactive:
        subject = os_text(terminal.read_line("Subject: ") or b"")
    composer = Composer(house, terminal)
    body = composer.read_body()
    if not body.strip():
        if "-E" in options:
            return EX_OK
        terminal.complain("Null message body; hope that's ok")
    fields = [("From", options["-r"])] if options.get("-r") else []
    fields += [
        ("To", ", ".join(recipients)),
        ("Subject", subject),
        ("Cc", options.get("-c", "")),
        ("Bcc", options.get("-b", "")),
    ]
    composer.send(options.get("-r", ""), fields, body)
    return EX_OK


def read_mail(house: House, options: dict, environ: dict, words: list[str]) -> int:
    """mail without recipients: reads a mailbox."""
    name = options.get("-u", house.user.name)
    path = mailbox_path(house, options, environ, words)
    try:
        is_empty = os.stat(path).st_size == 0
    except FileNotFoundError:
        is_empty = True
    except OSError as error:
        raise ProgramError(1, f"{path}: {error.strerror}") from None
    if "-e" in options:
        return 1 if is_empty else EX_OK
    if is_empty:
        where = f"{path}: no mail" if "-f" in options else f"No mail for {name}"
        write_all(2, os_bytes(printable(where) + "\n"))
        return 1
    reader = MailReader(house, Terminal(), Folder(path, house.user.home))
    if "-H" in options:
        for number in range(1, len(reader.messages) + 1):
            reader.terminal.say(reader.summary(number) + "\n")
        return EX_OK
    return reader.run()


def cmd_mail(args: list[str], environ: dict) -> int:
    """usage: mail [-s SUBJECT] [-c ADDR] [-b ADDR] [-r FROM] recipient ...
           mail [-f [FILE]] [-u USER] [-e] [-H] [-N]

    With recipients it sends: the text comes from standard input, or is typed
    up to Ctrl-D. Without, it reads your mail: a number or Return prints, ?
    lists the commands. -e only tells by its exit code whether there is mail.
    """
    import getopt  # small; argparse costs 10 ms

    try:
        pairs, words = getopt.gnu_getopt(
            args, "s:c:b:r:f::u:eHNniEv".replace("f::", "f")
        )
    except getopt.GetoptError as error:
        raise ProgramError(EX_USAGE, f"{error.msg}: see --help") from None
    options = {}
    for flag, value in pairs:
        joined = (
            f"{options[flag]}, {value}"
            if flag in ("-c", "-b") and flag in options
            else value
        )
        options[flag] = joined
    house = House(environ)
    if "-f" in options or "-u" in options:
        return read_mail(house, options, environ, words)
    if words:
        return send_mail(house, options, words)
    if any(flag in options for flag in ("-s", "-c", "-b", "-r")):
        raise ProgramError(EX_USAGE, "recipients are needed with -s, -c, -b or -r")
    return read_mail(house, options, environ, words)


def cmd_explain(args: list[str], environ: dict) -> int:
    """usage: minimta.py explain [-C FILE] [--json] ADDRESS ...

    Says where mail to an address goes, by which rule and as which user, and
    what was looked at in vain. Changes nothing. Exit 0 if it arrives, 67 if
    it never does, 75 if it has to wait.
    """
    options, words = read_flags(args, "C:", ["json"])
    return print_explanations(
        House(environ, options.get("-C", "")), words, "--json" in options
    )


def cmd_config(args: list[str], environ: dict) -> int:
    """usage: minimta.py config [-C FILE]

    Prints every setting with its value, its default and where it came from.
    """
    settings = House(environ, config_option("config", args)).settings
    for row in SETTINGS:
        where = settings.sources.get(row.name, "default")
        value = settings.expand(settings.texts[row.name])
        text = f"{row.name} = {value}"
        write_all(
            1, os_bytes(f"{text:50} # {where}; default: {row.default or 'none'}\n")
        )
    return EX_OK


def cmd_health(args: list[str], environ: dict) -> int:
    """usage: minimta.py health [-C FILE]

    Says whether the daemon answers: exit 0 if it does, 1 if not.
    """
    settings = House(environ, config_option("health", args)).settings
    is_up = SubmitSocket(settings.queue_directory).connect()
    write_all(
        1, b"ok: the daemon answers\n" if is_up else b"the daemon does not answer\n"
    )
    return EX_OK if is_up else 1


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
    explain     says where mail to an address goes
    config      prints the settings
    health      says whether the daemon answers

    Linked as sendmail, newaliases, mailq, mail or mailx it is that program.
    """
    if args and args[0] not in ("help", "--help", "-h"):
        text = f"unknown command {printable(args[0], 60)}: see minimta.py --help"
        raise ProgramError(EX_USAGE, text)
    print_help(cmd_help)
    return EX_OK


# == 28 Dispatch: PROGRAMS, main ==============================================
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
    "config": cmd_config,
    "health": cmd_health,
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
        return run_program(PROGRAMS.get(name, cmd_help), args)
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
