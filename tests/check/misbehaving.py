"""Candidates of `refllm check` that misbehave, and some that only look like it. They need NumPy alone.

What each must be told is beside it: the kind of the finding, "" for one that holds, and what its sentence says.
"""

import os
import signal
import sys
from typing import Any

import numpy as np

TOLD: dict[str, tuple[str, str]] = {}


def told(kind: str, text: str = "") -> Any:
    def note(function: Any) -> Any:
        TOLD[function.__name__] = (kind, text)
        return function

    return note


@told("")
def right(checkpoint: str, input_ids: Any, attention_mask: Any, position_ids: Any, tap: Any) -> Any:
    import refllm

    return refllm.load(checkpoint, dtype="float32")(input_ids=input_ids).logits


@told("purity", "it changes its input input_ids in place")
def wrong_and_changes_its_input(checkpoint: str, input_ids: Any, *rest: Any) -> Any:
    input_ids -= 1
    np.maximum(input_ids, 0, out=input_ids)
    return right(checkpoint, input_ids, *rest)


@told("purity", "it changes its inputs attention_mask, position_ids in place")
def changes_two_inputs(checkpoint: str, input_ids: Any, attention_mask: Any, position_ids: Any, tap: Any) -> Any:
    attention_mask[:] = 7
    position_ids[:] = 7
    return right(checkpoint, input_ids, attention_mask, position_ids, tap)


# -- raising -----------------------------------------------------------------------------------------------------------


@told("raises", "it raises ValueError: boom (misbehaving.py:LINE)")
def raises(*_: Any) -> Any:
    raise ValueError("boom")


@told("raises", "it raises OSError (misbehaving.py:LINE)")
def raises_without_a_word(*_: Any) -> Any:
    raise OSError("")


@told("raises", "it raises StopIteration (misbehaving.py:LINE)")
def stops(*_: Any) -> Any:
    return next(iter(()))


@told("raises", "it raises RecursionError: maximum recursion depth exceeded")
def recurses(*given: Any) -> Any:
    return recurses(*given)


@told("raises", "it raises KeyboardInterrupt (misbehaving.py:LINE)")
def interrupts(*_: Any) -> Any:
    raise KeyboardInterrupt


@told("raises", "it raises MemoryError: Unable to allocate")
def asks_for_too_much(*_: Any) -> Any:
    return np.ones(1 << 60, np.float32)


@told(
    "raises", "it raises FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/w.npz' (misbehaving.py:LINE)"
)
def opens_a_missing_file(*_: Any) -> Any:
    return open("/nowhere/w.npz")


@told(
    "raises", "it raises FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/w.npz' (misbehaving.py:LINE)"
)
def opens_it_in_a_library(*_: Any) -> Any:
    return np.load("/nowhere/w.npz")


@told("raises", "it raises BrokenPipeError (misbehaving.py:LINE)")
def breaks_a_pipe(*_: Any) -> Any:
    raise BrokenPipeError


@told("raises", "it raises EOFError: EOF when reading a line (misbehaving.py:LINE)")
def asks_the_user(*_: Any) -> Any:
    return input()


@told("raises", "it raises InputError: of ours (misbehaving.py:LINE)")
def raises_what_refllm_raises(*_: Any) -> Any:
    from refllm.errors import InputError

    raise InputError("of ours")


@told(
    "raises",
    "it raises InputError: 'nowhere' is no embedded checkpoint; there are arcee-tiny, arcee-trained, helium-tiny, "
    "helium-trained, llama-tiny, llama-trained, stablelm-tiny-parallel, stablelm-tiny-sequential, stablelm-trained "
    "(misbehaving.py:LINE)",
)
def raises_in_a_part_of_refllm_that_lies_beside_it(*_: Any) -> Any:
    from refllm import golden

    return golden.path("nowhere")


class UnsayableError(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


@told("raises", "it raises UnsayableError (misbehaving.py:LINE)")
def raises_what_cannot_be_said(*_: Any) -> Any:
    raise UnsayableError


@told("crashes", "it ends the process: SystemExit: 0 (misbehaving.py:LINE)")
def exits(*_: Any) -> Any:
    sys.exit(0)


# -- returning what is no logits ---------------------------------------------------------------------------------------


@told("result", "it returns nothing (None) and names no value")
def returns_nothing(*_: Any) -> Any:
    return None


@told("result", "lm_head is a list; expected an array or a tensor of floats")
def returns_a_list(*given: Any) -> Any:
    return right(*given).tolist()


@told("result", "lm_head is a str; expected")
def returns_text(*_: Any) -> Any:
    return "logits"


@told("result", "lm_head is complex64; expected float32, bfloat16, float16 or float64")
def returns_complex_numbers(*given: Any) -> Any:
    return right(*given).astype(np.complex64)


@told("result", "lm_head is object; expected")
def returns_objects(*given: Any) -> Any:
    return right(*given).astype(object)


@told("result", "lm_head is int64; expected")
def returns_integers(*given: Any) -> Any:
    return right(*given).astype(np.int64)


@told("result", "model.norm is a tuple; expected")
def names_a_tuple_and_hides_the_answer(*given: Any) -> Any:
    try:
        given[-1]("model.norm", (1.0, 2.0))
    except Exception:
        return right(*given)


# -- what is none of the check's business ------------------------------------------------------------------------------


@told("")
def closes_its_output(*given: Any) -> Any:
    sys.stdout.close()
    os.close(1)
    return right(*given)


@told("")
def prints_much(*given: Any) -> Any:
    for _ in range(32):
        os.write(2, b"x" * (1 << 20))
    return right(*given)


@told("")
def forks(*given: Any) -> Any:
    os.fork()
    return right(*given)


# -- ending the process, each of which costs another start -------------------------------------------------------------


@told("crashes", "it ends the process: exit code 0")
def ends_quietly(*_: Any) -> Any:
    os._exit(0)


@told("crashes", "it ends the process: SIGSEGV (misbehaving.py:LINE)")
def crashes(*_: Any) -> Any:
    import ctypes

    return ctypes.string_at(0)


@told("crashes", "it ends the process: SIGKILL")
def is_killed(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@told("hangs", "it did not return within 1 s (misbehaving.py:LINE); --time-limit gives it more")
def never_returns(*_: Any) -> Any:
    while True:
        pass
