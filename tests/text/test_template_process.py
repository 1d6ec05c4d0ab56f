"""Templates of strangers are bounded in time and memory, and the process that bounds them is nobody's worry."""

import ast
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from refllm.apart import LateError, Process
from refllm.errors import InputError, TokenizerError
from refllm.text import chat_template, template_process, template_worker
from refllm.text.template_process import Limits, NoProcessError, TemplateProcess

BUSY = "\n{% for i in range(99999) %}\n{% for j in range(99999) %}{% endfor %}{% endfor %}"
HELLO = "{% for m in messages %}{{ m.content }}{% endfor %}"


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def pid_of(process: TemplateProcess) -> int:
    assert process._worker is not None
    return process._worker.pid


@pytest.fixture
def make() -> Iterator[Callable[..., TemplateProcess]]:
    """Template processes that end with the test."""
    made = []

    def one(**limits: Any) -> TemplateProcess:
        made.append(TemplateProcess(Limits(**limits)))
        return made[-1]

    yield one
    for process in made:
        process.end()


@pytest.fixture(scope="module")
def shared() -> Iterator[TemplateProcess]:
    """One for the tests that leave it as it was."""
    process = TemplateProcess()
    process.render("x", {})
    yield process
    process.end()


# --- a hundred bombs --------------------------------------------------------------------------------------------------

# In a Python of its own: its only children are then those that render, and that it does not end can be seen.
_ALL_BOMBS = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from template_bombs import BOMBS, CRASH
from refllm.errors import TokenizerError
from refllm.text.template_process import Limits, TemplateProcess

def peak():
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

def tried(process, names):
    told = {}
    for name in names:
        start = time.perf_counter()
        try:
            said = f"done, {len(process.render(BOMBS[name], {'messages': [{'role': 'user', 'content': 'Hi'}]}))}"
        except TokenizerError as error:
            said = str(error)
        told[name] = (round(time.perf_counter() - start, 3), said)
    process.end()
    return told

print(json.dumps([
    (tried(TemplateProcess(Limits(cpu_seconds=0.03, memory=80_000_000)), BOMBS), peak()),
    (tried(TemplateProcess(), ["format: named width, many", "search: count", CRASH]), peak()),
]))
"""


@pytest.fixture(scope="module")
def bombs() -> Any:
    """What came of each, and the largest memory of a process: with a 30th of the time, and a few as usual."""
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", _ALL_BOMBS, here], capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_hundred_bombs_are_each_refused_in_one_sentence(bombs: Any) -> None:
    told, _ = bombs[0]
    assert len(told) == 100
    reasons = ("takes more than 0.03 s of CPU time", "needs more than 80 MB of memory", "recurses without end")
    reasons += ("crashes the interpreter (SIG", "has no attribute", "too many", "Exceeds the limit")
    for name, (seconds, said) in told.items():
        assert said.startswith("chat template"), (name, said)
        assert any(reason in said for reason in reasons), (name, said)
        assert "\n" not in said
        assert len(said) < 1100
        assert seconds < 2, (name, seconds)
    memory, time_ = (sum(reason in said for _, said in told.values()) for reason in reasons[1::-1])
    assert memory >= 20  # both limits are met: neither hides behind the other
    assert time_ >= 20


def test_no_bomb_takes_more_memory_than_it_may(bombs: Any) -> None:
    (_, low), (_, real) = bombs
    assert low <= 80_000_000
    assert real <= 400_000_000


def test_bombs_under_the_usual_limits_are_each_refused(bombs: Any) -> None:
    told, _ = bombs[1]
    reasons = ("400 MB of memory", "1 s of CPU time", "crashes the interpreter (SIGSEGV)")
    for (name, (seconds, said)), reason in zip(told.items(), reasons, strict=True):
        assert reason in said, (name, said)
        assert seconds < 8, (name, seconds)  # 2 on an idle machine: the clock that counts is that of the CPU


def test_limits_are_counted_in_cpu_time(make: Callable[..., TemplateProcess]) -> None:
    process = make(cpu_seconds=0.1)
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=r"^chat template, line 3: it takes more than 0\.1 s of CPU time$"):
        process.render(BUSY, {})
    assert time.perf_counter() - start >= 0.1
    for _ in range(30):  # each rendering has its own account: together these take more
        process.render("{{ range(20000)|map('string')|join|length }}", {})
    # in C, where no template can be interrupted
    with pytest.raises(TokenizerError, match=r"^chat template: it takes more than 0\.1 s of CPU time$"):
        process.render("{{ ([[1] * 999] * 99999)|sum(start=[]) }}", {})


def test_limits_are_counted_on_the_wall_too(make: Callable[..., TemplateProcess]) -> None:
    process = make(wall_seconds=0.4)
    process.render("x", {})
    stopped = pid_of(process)
    os.kill(stopped, signal.SIGSTOP)  # takes no CPU time, and gives no answer
    with pytest.raises(TokenizerError, match=r"^chat template: it was not done after 0\.4 s$"):
        process.render("x", {})
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    process.render("x", {})
    os.kill(pid_of(process), signal.SIGSTOP)
    with pytest.raises(TokenizerError, match=r"not done after 0\.4 s"):  # also while a long chat is being handed over
        process.render("x", chat("long " * 999_999))
    assert process.render("y", {}) == "y"


def test_the_line_that_needs_the_memory_is_named(shared: TemplateProcess) -> None:
    with pytest.raises(TokenizerError, match=r"^chat template, line 2: it needs more than 400 MB of memory$"):
        shared.render("a\n{{ 'x' * 10 ** 12 }}\nb", {})


def test_the_text_that_comes_back_is_limited(make: Callable[..., TemplateProcess]) -> None:
    process = make(text=1_000_000)
    assert len(process.render("{{ 'x' * 1000000 }}", {})) == 1_000_000
    for letter, times in (("x", 1_000_001), ("é", 500_001)):
        with pytest.raises(TokenizerError, match=r"^chat template: it makes more than 1 MB of text$"):
            process.render("{{ messages[0].content * times }}", {**chat(letter), "times": times})


def test_messages_of_any_length_do_not_come_back_whole(shared: TemplateProcess) -> None:
    with pytest.raises(TokenizerError) as caught:
        shared.render("\n{{ raise_exception('word ' * 9999999) }}", {})
    assert str(caught.value).startswith("chat template, line 2: word word word")
    assert len(str(caught.value)) < 1100


# --- what is rendered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\0", "a\r\nb", "\ud800", "é日🙂", "\ue000"])
def test_every_character_comes_through(text: str, shared: TemplateProcess) -> None:
    assert shared.render("{{ messages[0].content }}", chat(text)) == text


def test_data_keeps_its_types(shared: TemplateProcess) -> None:
    data = {"a": (1, [2.5, None, True]), 7: {"b": -(2**70)}, None: float("inf")}
    assert shared.render("{{ data }}", {"data": data}) == str(data)


def test_long_chats_render(shared: TemplateProcess) -> None:
    messages = [{"role": "user", "content": "日本 words " * 50}] * 10_000
    template = "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m['content'] | trim }}\n{% endfor %}"
    expected = "".join(f"<user>{m['content'].strip()}\n" for m in messages)
    assert len(expected) > 4_000_000
    assert shared.render(template, {"messages": messages}) == expected


@pytest.mark.parametrize("name", ["nested too deeply", "holds itself"])
def test_data_without_a_floor_is_said(name: str) -> None:
    content: list[Any] = []
    if name == "holds itself":
        content.append(content)
    for _ in range(100_000 if name == "nested too deeply" else 0):
        content = [content]
    with pytest.raises(InputError, match=f"^messages: .*{name}"):
        chat_template.render("x", [{"role": "user", "content": content}])


# --- the process ------------------------------------------------------------------------------------------------------


def test_one_process_answers_all_threads(make: Callable[..., TemplateProcess]) -> None:
    process, wrong, pids = make(), list[str](), set()

    def work(number: int) -> None:
        for i in range(40):
            text = f"{number}:{i}" * (1 + 5000 * (i % 3))
            got = process.render(HELLO, chat(text))
            pids.add(pid_of(process))
            if got != text:
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pids) == 1


def test_a_fork_has_a_process_of_its_own_even_while_one_is_busy(make: Callable[..., TemplateProcess]) -> None:
    process = make(cpu_seconds=0.3)
    process.render("x", {})
    before = pid_of(process)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def in_the_fork() -> None:
        results.put((process.render(HELLO, chat("fork")), pid_of(process)))
        process.end()

    def be_busy() -> None:
        with pytest.raises(TokenizerError):
            process.render(BUSY, {})

    busy = threading.Thread(target=be_busy)
    busy.start()
    while not process._lock.locked():
        time.sleep(0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside a thread is what is tried here
        fork = context.Process(target=in_the_fork)
        fork.start()
    fork.join(20)
    busy.join(20)
    assert fork.exitcode == 0
    text, other = results.get()
    assert text == "fork"
    assert other != before
    assert process.render(HELLO, chat("here")) == "here"
    assert pid_of(process) == before  # an interrupted template leaves it fit for the next


def test_a_process_that_somebody_ends_is_replaced(make: Callable[..., TemplateProcess]) -> None:
    process = make()
    process.render("x", {})
    for number in (signal.SIGKILL, signal.SIGTERM):
        os.kill(pid_of(process), number)
        assert process.render(HELLO, chat("again")) == "again"


def test_a_process_that_is_ended_again_and_again_is_said(
    make: Callable[..., TemplateProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make()
    ask = Process.ask

    def killed(worker: Process, request: bytes | None, limit: float, most: int) -> bytes:
        if request is not None:
            os.kill(worker.pid, signal.SIGKILL)
        return ask(worker, request, limit, most)

    monkeypatch.setattr(Process, "ask", killed)
    with pytest.raises(TokenizerError, match=r"^chat template: its process was ended \(SIGKILL\)$"):
        process.render("x", {})


def test_an_interrupted_call_does_not_leave_its_answer_to_the_next(make: Callable[..., TemplateProcess]) -> None:
    process = make()
    process.render("x", {})
    before = pid_of(process)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            process.render(BUSY, {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert process.render(HELLO, chat("next")) == "next"


def test_ctrl_c_in_the_terminal_is_not_for_the_process(shared: TemplateProcess) -> None:
    assert os.getpgid(pid_of(shared)) != os.getpgid(0)


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_is_left_behind(ending: str) -> None:
    program = (
        "import os, signal; from refllm.text import chat_template as c; c.render('x', [{'role': 'user'}]); "
        f"print(c._PROCESS._worker.pid, flush=True); {ending}"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    worker = int(result.stdout)
    until = time.monotonic() + 10
    while _runs(worker):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert result.stderr == ""


def _runs(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and that nobody asked for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_imports_next_to_nothing() -> None:
    program = (
        "import sys; import refllm.text.template_worker, refllm.text.template_sandbox; "
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = ast.literal_eval(result.stdout)
    assert not {"numpy", "tokenizers", "subprocess", "asyncio", "multiprocessing"} & set(imported)


# --- where there is no such process -----------------------------------------------------------------------------------


def test_without_a_process_work_is_counted_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(chat_template, "_PROCESS", TemplateProcess())
    monkeypatch.setattr(subprocess, "Popen", refuse)
    template_process.warn_of_weaker_limits.cache_clear()
    with pytest.warns(UserWarning, match=r"it does not start \(Operation not permitted\)\. Their work is counted"):
        assert chat_template.render(HELLO, chat("Hi")["messages"]) == "Hi"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TokenizerError, match="line 1: it computes an integer of more than 4096 bits"):
            chat_template.render("{{ 10 ** 99999 }}", chat("Hi")["messages"])


def test_a_program_that_is_no_python_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for _ in range(2):
        with pytest.raises(NoProcessError, match=r"Python does not start there \(its process ended: exit code 1"):
            process.render("x", {})
        monkeypatch.setattr(sys, "executable", "/bin/this-is-not-asked-for")


def test_it_waits_until_its_time_is_over_and_no_longer() -> None:
    process = object.__new__(Process)
    process._socket, process._output = object(), object()  # type: ignore[assignment]
    process._child = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
    for left, most in ((-1.0, 0.0), (0.05, 0.05)):
        waits: list[float] = []

        def select(seconds: float, waits: list[float] = waits) -> list[Any]:
            waits.append(seconds)
            time.sleep(seconds)
            return []

        process._selector = SimpleNamespace(select=select)  # type: ignore[assignment]
        with pytest.raises(LateError, match="no answer in time"):
            process._wait(time.monotonic() + left)
        assert waits
        assert all(0 <= seconds <= most for seconds in waits)


def test_a_limit_of_memory_that_the_system_refuses_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: int, _: Any) -> None:
        if what == resource.RLIMIT_AS:
            raise OSError("not here")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert not template_worker._limit_memory(1 << 30)


def test_where_memory_cannot_be_limited_work_is_counted_in_the_process(
    make: Callable[..., TemplateProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Process.program

    def without_limits(arguments: Callable[..., list[str]]) -> Process:
        def changed(*fds: int) -> list[str]:
            *options, program = arguments(*fds)
            return [*options, f"import resource; resource.setrlimit = lambda *_: None; {program}"]

        return start(changed)

    monkeypatch.setattr(Process, "program", without_limits)
    template_process.warn_of_weaker_limits.cache_clear()
    process = make()
    with pytest.warns(UserWarning, match="this system does not limit the memory of one"):
        assert process.render(HELLO, chat("Hi")) == "Hi"
    with pytest.raises(TokenizerError, match=r"line 1: it does too much work"):
        process.render("{{ 'x' * 999999999 }}", {})
