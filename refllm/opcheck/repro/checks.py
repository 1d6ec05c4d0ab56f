"""The lines that check: one way per property. They find `arguments`, `keywords` and `candidate`."""

from refllm.accuracy.expected import remembered
from refllm.opcheck.poison import FILLINGS
from refllm.opcheck.repro import by_autograd
from refllm.opcheck.repro.shown import Shown, indented, listed, made, number
from refllm.opcheck.repro.unread import between_changed, unread_changed
from refllm.opcheck.repro.values import values


def check(shown: Shown) -> list[str]:
    """Lines that print what is wrong and exit with 1 if it is."""
    ways = {
        "outright": _outright,
        "pair": _pair,
        "hangs": _hangs,
        "crashes": _crashes,
        "purity": _purity,
        "reuse": _reuse,
        "result": _result,
    } | dict.fromkeys(by_autograd.FURTHER, by_autograd.further)
    return ways.get(shown.way, values)(shown)


def _outright(shown: Shown) -> list[str]:
    return [
        "try:",
        *indented(shown.called()),
        "except BaseException as error:",
        '    print(f"{type(error).__name__}: {error}")',
        "    sys.exit(1)",
        'print("nothing was raised")',
    ]


def _hangs(shown: Shown) -> list[str]:
    seconds = max(1, round(shown.limit))
    return [
        f"faulthandler.dump_traceback_later({seconds}, exit=True)  # exits with 1, and says where it was",
        *shown.called(),
        'print("it returned")',
    ]


def _crashes(shown: Shown) -> list[str]:
    # Its process may end with exit code 0 as well: what counts is that it said so when the candidate had returned.
    return [
        "read, write = os.pipe()",
        "child = os.fork()",
        "if child == 0:",
        *indented([*made(shown), *shown.called()]),
        '    os.write(write, b"returned")',
        "    os._exit(0)",
        "os.close(write)",
        "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])",
        "returned = bool(os.read(read, 8))",
        'print("it returned" if returned else f"its process ended before it returned, with {status}")',
        "sys.exit(int(not returned))",
    ]


def _pair(shown: Shown) -> list[str]:
    if shown.finding.property == "determinism":
        return [
            f"runs = [run(*make()) for _ in range({20 if 'now and then' not in shown.finding.text else 200})]",
            "different = [max(int((a != b).sum()) for b in outputs) for a, *outputs in zip(*runs)]",
            'print("elements that differ between runs on the same input, by output:", different)',
            "sys.exit(int(any(different)))",
        ]
    changes: list[str] = []
    if not shown.fills:
        between = "between the elements" in shown.finding.text
        changes = between_changed(shown.numpy) if between else unread_changed(shown.call, shown.numpy)
    fillings = ([f"filling, integer = {number(x)}, {n}"] for x, n in zip(FILLINGS, (100, 3), strict=True))
    first, second = fillings if shown.fills else ([], [])
    unread = "memory that nobody wrote" if shown.fills else "what is not read"
    return [
        *first,
        "first = run(*make())",
        *second,
        "arguments, keywords = make()",
        *changes,
        "second = run(arguments, keywords)",
        "different = [int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum()) for a, b in zip(first, second)]",
        f'print("elements that differ between two runs that differ in {unread}:", different)',
        "sys.exit(int(any(different)))",
    ]


_MEMORY = """
tensors = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]


def memory(x):
    if x.untyped_storage().nbytes() >= 2**24:
        return x.clone().nan_to_num()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()


before = [memory(x) for x in tensors]
""".strip().splitlines()


_MEMORY_NUMPY = """
arrays = [x for x in (*arguments, *keywords.values()) if isinstance(x, np.ndarray)]


def memory(x):
    whole = isinstance(x.base, np.ndarray) and x.base.nbytes < 2**24
    return (x.base if whole else x).tobytes()


before = [memory(x) for x in arrays]
""".strip().splitlines()


def _purity(shown: Shown) -> list[str]:
    pairs = (
        "arrays, before)) if memory(x) != b" if shown.numpy else "tensors, before)) if not torch.equal(memory(x), b)"
    )
    return [
        *(_MEMORY_NUMPY if shown.numpy else _MEMORY),
        *shown.called(),
        f"changed = [i for i, (x, b) in enumerate(zip({pairs}]",
        'print("inputs that changed, counted from 0:", changed)',
        "sys.exit(int(bool(changed)))",
    ]


def _reuse(shown: Shown) -> list[str]:
    other = "(x * (i + 2)).astype(x.dtype)" if shown.numpy else "x * (i + 2)"
    floats = 'x.dtype.kind not in "biu"' if shown.numpy else "x.is_floating_point()"
    return [
        *shown.called(),
        f"held, before = got, [{shown.read('x')}.copy() for x in got]",
        "arguments = [  # other numbers",
        f"    {other} if isinstance(x, {'np.ndarray' if shown.numpy else 'torch.Tensor'}) and {floats} else x",
        "    for i, x in enumerate(arguments)",
        "]",
        *shown.called(),
        f"now = [{shown.read('x')} for x in held]",
        "changed = [i for i, (a, b) in enumerate(zip(now, before)) if not np.array_equal(a, b, equal_nan=True)]",
        'print("results that a later call overwrote, counted from 0:", changed)',
        "sys.exit(int(bool(changed)))",
    ]


_SEEN_NUMPY = """
given = [a for a in arguments if isinstance(a, np.ndarray)]
arrays = [x for x in got if isinstance(x, np.ndarray)]
shared = [any(np.shares_memory(x, a) for a in given) for x in arrays]
got = [(x.shape, x.dtype.name) if isinstance(x, (np.ndarray, np.generic)) else type(x) for x in got]
""".strip().splitlines()
_SEEN_TORCH = """
given = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
places = [x.untyped_storage().data_ptr() for x in given]
tensors = [x for x in got if isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.is_nested]
shared = [x.untyped_storage().data_ptr() in places for x in tensors if x.numel()]
devices = {x.device.type for x in tensors}
dense = [any(x is y for y in tensors) for x in got]
got = [(tuple(x.shape), str(x.dtype)[6:]) if d else getattr(x, "layout", type(x)) for x, d in zip(got, dense)]
""".strip().splitlines()


def _result(shown: Shown) -> list[str]:
    expected = [repr((tuple(e.exact.shape), e.dtype)) for e in remembered(shown.call, shown.policy)]
    place = "" if shown.numpy else ", on {devices}"
    wrong = "" if shown.numpy else f" or devices != {{{shown.candidate.device.partition(':')[0]!r}}}"
    return [
        *shown.called(),
        *(_SEEN_NUMPY if shown.numpy else _SEEN_TORCH),
        *listed("expected", expected),
        f'print(f"returned {{got}}\\nexpected {{expected}}\\nshares memory with an input: {{shared}}{place}")',
        f"sys.exit(int(got != expected or any(shared){wrong}))",
    ]
