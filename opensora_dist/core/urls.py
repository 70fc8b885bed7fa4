"""Names of remote things: what is a URL, what in one must not be shown, and the shards that one pattern names."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterator

from opensora_dist.core.errors import ConfigError, DataError

PIPE = "pipe:"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]+)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(?<=[^\s?])\?[^\s'\"]+")
_FRAGMENT = re.compile(r"(?<=[^\s#'\"])#[^\s'\"]+")
_WORDS = re.compile(r"\w*(secret|token|key|passw(or)?d)\w*[=: ]+[^\s$'\"]|\b(bearer|basic)\s+[^\s$'\"]{8}", re.IGNORECASE)
_LOGIN = re.compile(r"(?<!\S)(-u|--user)[= ]?['\"]?[^\s:'\"]+:[^\s$'\"]")
_NAME = re.compile(r"[A-Za-z0-9._=+][A-Za-z0-9._=+-]*(/[A-Za-z0-9._=+][A-Za-z0-9._=+-]*)*")
_PLACE = "{}"
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_SHELL_WORDS = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>&1", "2>"}


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a pipe rather than a place on this machine."""
    return path.startswith(PIPE) or (_SCHEME.match(path) is not None and not path.startswith("file://"))


def redact(text: str) -> str:
    """A URL, a command or a message for a log: users, passwords and query strings are left out, as secrets are kept there.

    Of a command nothing is shown but the program and the words that say which shard, since any of its words may be a secret.
    """
    if text.startswith(PIPE):
        words = text.removeprefix(PIPE).split()
        shown = [word for word in words[1:] if _BRACES.search(word) or "{}" in word or word.endswith(".tar")]
        text = " ".join([PIPE + (words[0] if words else ""), "...", *shown])
    text = _QUERY.sub("?...", _USER.sub("...@", text))
    return _FRAGMENT.sub("#...", text) if "://" in text else text


def secret_in(url: str) -> str | None:
    """Why a URL or command of a config can't stay there: it would go into every dump of the config. None where it can.

    What ``$NAME`` stands for is read from the environment when it is used, so that a config holds the name only. Of a command nobody
    knows which words are secret: those are found that a list of words announces, and no others.
    """
    user, query = _USER.search(url), _QUERY.search(url)
    fragment = _FRAGMENT.search(url) if is_remote(url) else None
    bare = _VARIABLE.sub("$", url)  # names of variables announce nothing
    found = "a user or password" if user and not _VARIABLE.search(user[0]) else None
    if found is None and query is not None and not _VARIABLE.search(query[0]):
        found = "a query string, which may be a signature"
    if found is None and fragment is not None and not _VARIABLE.search(fragment[0]):
        found = "a fragment (#...), which may be a signature"
    if found is None and url.startswith(PIPE) and (_WORDS.search(bare) or _LOGIN.search(bare)):
        found = "what looks like a secret"
    if found is None and re.search(r"(authorization|bearer|token|password|secret)[ :=]+[^\s$'\"]{8}", bare, re.IGNORECASE):
        found = "what looks like a secret"
    if found is None:
        return None
    return (
        f"{redact(url)!r} holds {found}, and would show it in every dump of the config; put it into an environment variable and write "
        "$NAME in its place, or use the variables that the store itself reads (docs/remote.md)"
    )


def plain_name(name: str, *, where: str) -> str:
    """A file's name that an index or a listing made elsewhere gives, before it becomes part of a URL, a command or a path here.

    Nothing in it has a meaning to any of them: not to the environment ($), a shell's words (spaces, quotes), a program (a leading -),
    a URL (?, #, %, :) or a file system (.., a leading slash).

    Args:
        where: What gave it, for the message.
    Raises:
        DataError: It is not letters, digits and ``._=+-`` in parts with ``/`` between them.
    """
    if _NAME.fullmatch(name) is None or any(part in (".", "..") for part in name.split("/")):
        raise DataError(
            f"{where} names a file {name!r}; a name is made of letters, digits and ._=+- (with / between folders, no .. and no leading -) "
            "and stays in the data set's folder; rename it where it was made"
        )
    return name


def from_environment(text: str) -> str:
    """``text`` with every ``$NAME`` replaced.

    Raises:
        ConfigError: A variable isn't set.
    """
    for name in _VARIABLE.findall(text):
        if name.strip("{}") not in os.environ:
            raise ConfigError(
                f"{redact(text)}: the environment variable {name.strip('{}')} isn't set; export it where ranks start"
            )
    return os.path.expandvars(text)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, in order: ``{000..127}`` counts, ``{a,b}`` lists, ``{}`` and ``${NAME}`` are left alone.

    As the braceexpand package, which webdataset uses, without nesting.

    Raises:
        ConfigError: Braces inside braces, or a range that runs backwards.
    """
    parts: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(pattern):
        if match.start() and pattern[match.start() - 1] == "$":
            continue
        parts += [[pattern[end : match.start()]], list(_alternatives(match[1], pattern))]
        end = match.end()
    parts.append([pattern[end:]])
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def pipe_arguments(command: str, *, name: str = _PLACE) -> list[str]:
    """The argument vector of ``pipe:COMMAND``, which no shell sees; environment variables are filled in after it was split.

    Args:
        name: What stands for ``{}``: put into its word last, so that it is neither split nor looked into.
    Raises:
        ConfigError: Nothing to run, quotes that don't close, or words that only a shell gives a meaning to.
    """
    try:
        words = shlex.split(command.removeprefix(PIPE))
    except ValueError as error:
        raise ConfigError(f"{redact(command)}: can't be split into words ({error}); close its quotes") from error
    if not words:
        raise ConfigError("pipe: names no command; write pipe:PROGRAM ARGUMENT ...")
    shell = [word for word in words if word in _SHELL_WORDS or "$(" in word or "`" in word]
    if shell:
        raise ConfigError(
            f"{redact(command)}: {shell[0]!r} has a meaning to a shell only, and commands of pipe: run without one; put the line into a "
            "script and name the script"
        )
    return [name.join(from_environment(part) for part in word.split(_PLACE)) for word in words]


def _alternatives(inside: str, pattern: str) -> Iterator[str]:
    counted = _RANGE.fullmatch(inside)
    if counted is None:
        yield from inside.split(",")
        return
    first, last = counted[1], counted[2]
    if int(last) < int(first):
        raise ConfigError(f"{redact(pattern)}: {{{inside}}} runs backwards; write {{{last}..{first}}}")
    width = len(first) if first.startswith("0") or last.startswith("0") else 0
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{width}d}"
