"""What runs in the process that renders chat templates: limits first, then one answer after each request.

Both sides send the number of a request and a length, eight bytes each, and then so many bytes (`refllm.apart`, which
this process does not import). A request is marshalled by the parent: seconds, template, variables (plain data). An
answer is a byte that says what it is, a byte that says whether this process is fit for another request, and a text in
UTF-8: it comes from where a template ran, so there is nothing in it to be unpacked. The first answer, to no request,
says which limits hold here.

Importing this module imports neither jinja2 nor anything that only some platforms have; running it does.
"""

from __future__ import annotations

import marshal
import mmap
import os
import signal
import struct
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from refllm.text.template_sandbox import ChatTemplateEnvironment

TEXT, FAULT = b"T", b"F"
LIMITED, METERED = b"L", b"M"
REUSABLE, USED_UP = b"+", b"-"
EXIT_NO_MEMORY = 3
_HEAD = struct.Struct("<QQ")
_GRACE = 1.25  # CPU time at which the process ends, over the one at which the template is interrupted


def main(channel: int, memory: int, text: int) -> None:
    """Answers until there are no more requests. channel: the number of the socket. memory: bytes of address space.
    text: most bytes of an answer."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what the parent had blocked or ignored is inherited
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limited = _limit_memory(memory)
    environment = _environment(limited)
    with open(channel, "rb") as requests, open(channel, "wb", closefd=False) as answers:
        _send(answers, 0, LIMITED if limited else METERED)
        try:
            while head := requests.read(_HEAD.size):
                number, length = _HEAD.unpack(head)
                kind, said = _answer(environment, requests.read(length), memory, text)
                _send(answers, number, kind + (REUSABLE if _there_is(memory // 2) else USED_UP) + said)
        except MemoryError:  # there was not even enough to say so
            os._exit(EXIT_NO_MEMORY)


def _send(answers: BinaryIO, number: int, message: bytes) -> None:
    answers.write(_HEAD.pack(number, len(message)))
    answers.write(message)
    answers.flush()


def _limit_memory(memory: int) -> bool:
    """True if the limit holds: on some systems it can be set and has no effect."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (OSError, ValueError):
        return False
    return not _there_is(memory)


def _there_is(memory: int) -> bool:
    try:
        mmap.mmap(-1, memory, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return False
    return True


def _environment(limited: bool) -> type[ChatTemplateEnvironment]:
    if limited:
        from refllm.text.template_sandbox import ChatTemplateEnvironment

        return ChatTemplateEnvironment
    from refllm.text.template_meter import MeteredEnvironment

    return MeteredEnvironment


def _answer(environment: type[ChatTemplateEnvironment], request: bytes, memory: int, most: int) -> tuple[bytes, bytes]:
    from refllm.text.template_sandbox import OverLimitError, rendered, sentence

    seconds, template, variables = marshal.loads(request)

    def interrupt(_: int, __: FrameType | None) -> None:
        raise OverLimitError(f"it takes more than {seconds:g} s of CPU time")

    signal.signal(signal.SIGVTALRM, interrupt)
    try:
        # Two clocks. The first is Python's to handle, so that the line of the template is known; the second ends the
        # process, wherever in C it is.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds * _GRACE)
        try:
            text = rendered(environment, template, variables)
            encoded = text.encode("utf-8", "surrogatepass") if len(text) <= most else b""
            if max(len(text), len(encoded)) > most:
                raise OverLimitError(f"it makes more than {most // 1_000_000} MB of text")
            return TEXT, encoded
        except MemoryError as error:
            too_much = OverLimitError(f"it needs more than {memory // 1_000_000} MB of memory")
            raise too_much.with_traceback(error.__traceback__) from None
        except Exception as error:  # to say it takes time too: its message may be of any size
            return FAULT, sentence(error).encode("utf-8", "surrogatepass")
    except OverLimitError as error:
        return FAULT, sentence(error).encode("utf-8", "surrogatepass")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
