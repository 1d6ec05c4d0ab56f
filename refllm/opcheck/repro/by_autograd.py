"""The lines about gradients: how autograd makes them of a forward function, and what else may be wrong there."""

from refllm.opcheck.repro.shown import Shown
from refllm.ops.backward_contracts import BACKWARD, BackwardContract
from refllm.ops.contracts import without_axes

FURTHER = (
    "missing gradient",
    "frozen tensor",
    "needless gradient",
    "shared tensor",
    "second backward",
    "recomputation",
)
"""Properties that are shown by lines of their own."""


def gradients_code(operator: str) -> list[str]:
    """Lines that turn `candidate`, a function of the forward operator, into its backward operator; it stays as
    `forward`."""
    known = BACKWARD[operator]
    parameters = known.forward.parameters.values()
    positional = [without_axes(p.name) for p in parameters if p.kind is not p.KEYWORD_ONLY]
    names = [without_axes(p.name) for p in known.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    lines = [
        "forward = candidate",
        "",
        "",
        "def prepared(arguments, keywords, frozen=None):",
        f"    given = dict(zip({names!r}, arguments)) | keywords",
        *[f"    given[{name!r}] = {made}" for name, made in _stand_ins(known)],
        f"    tensors = {{n: given[n] for n in {_leaves(known)!r} if given.get(n) is not None}}",
        "    given |= {n: x.detach().requires_grad_(n != frozen) for n, x in tensors.items()}",
        f"    d = [given[n] for n in {list(known.incoming)!r} if given.get(n) is not None]",
        "    return given, d, {n: x for n, x in keywords.items() if n != 'dlse'}",
        "",
        "",
        "def backward(given, d, how, again=1):",
        "    if given.get('dlse') is not None:",
        "        how = {**how, 'return_lse': True}",
        "    with torch.enable_grad():",
        f"        y = forward(*(given[n] for n in {positional!r} if n in given), **how)",
        "    y = y if isinstance(y, (tuple, list)) else (y,)",
        f"    leaves = [given[n] for n in {_leaves(known)!r} if given.get(n) is not None and given[n].requires_grad]",
        "    d = [a.to(b.dtype) for a, b in zip(d, y)]",
        "    for left in reversed(range(again)):",
        "        got = torch.autograd.grad(y, leaves, d, allow_unused=True, retain_graph=left > 0)",
        "    return got",
        "",
        "",
        "def candidate(*arguments, **keywords):",
        "    return backward(*prepared(arguments, keywords))",
    ]
    return lines


def _tried(line: str) -> list[str]:
    """The line, whose error is what is wrong."""
    return [
        "try:",
        f"    {line}",
        "except Exception as error:",
        '    print(f"{type(error).__name__}: {error}")',
        "    sys.exit(1)",
    ]


def _leaves(known: BackwardContract) -> list[str]:
    return list(known.gradient_of.values())


def _stand_ins(known: BackwardContract) -> list[tuple[str, str]]:
    if "p" in known.arguments:
        return [("x", 'given["p"].log()')]
    there = zip(known.forward.arguments, known.incoming, strict=False)
    return [(name, f"torch.ones_like(given[{d!r}])") for name, d in there if name not in known.arguments]


def further(shown: Shown) -> list[str]:
    """Lines that show what is wrong beside the values."""
    known, text = BACKWARD[shown.call.operator], shown.finding.text
    leaves = _leaves(known)
    if shown.finding.property == "missing gradient":
        asked = list(known.asked(*shown.call.placed()))
        return [
            *shown.called(),
            f"missing = [name for name, x in zip({asked!r}, got) if x is None]",
            'print("gradients that are not there:", missing)',
            "sys.exit(int(bool(missing)))",
        ]
    compare = [
        "pairs = enumerate(zip(first, second))",
        "known = lambda a, b: a is not None and b is not None and torch.equal(a.nan_to_num(), b.nan_to_num())",
        "different = [n for n, (a, b) in pairs if not known(a, b)]",
        'print("gradients that differ, counted from 0:", different)',
        "sys.exit(int(bool(different)))",
    ]
    first = ["first = backward(*prepared(arguments, keywords))"]
    if shown.finding.property == "second backward":
        return [*first, *_tried("second = backward(*prepared(arguments, keywords), again=2)"), *compare]
    if shown.finding.property == "recomputation":
        return [
            *first,
            "from torch.utils.checkpoint import checkpoint",
            "plain = forward",
            "forward = lambda *a, **k: checkpoint(plain, *a, use_reentrant=False, **k)",
            *_tried("second = backward(*prepared(arguments, keywords))"),
            *compare,
        ]
    named = [
        n for n in leaves if f"{n} frozen" in text or f"where {n} is frozen" in text or f"of {n} is computed" in text
    ]
    if shown.finding.property == "frozen tensor" and named:
        there = [n for n in leaves if f"d{n}" in known.asked(*shown.call.placed())]
        return [
            *first,
            f"first = [x for n, x in zip({there!r}, first) if n != {named[0]!r}]",
            *_tried(f"second = backward(*prepared(arguments, keywords, frozen={named[0]!r}))"),
            *compare,
        ]
    if shown.finding.property == "needless gradient" and named:
        return [
            "from torch.utils.flop_counter import FlopCounterMode",
            "counted = []",
            f"for frozen in (None, {named[0]!r}):",
            "    with FlopCounterMode(display=False) as counter:",
            "        backward(*prepared(arguments, keywords, frozen))",
            "    counted.append(counter.get_total_flops())",
            f'print("flops of all gradients, and with {named[0]} frozen:", counted)',
            "sys.exit(int(counted[0] <= counted[1]))",
        ]
    one, two = (word for word in text.replace(",", " ").split() if word in leaves)
    return [
        "given, d, how = prepared(arguments, keywords)",
        f"given[{two!r}] = given[{one!r}].detach().clone().requires_grad_()",
        f"names = [n for n in {leaves!r} if given.get(n) is not None]",
        "apart = dict(zip(names, backward(given, d, how)))",
        "given, d, how = prepared(arguments, keywords)",
        f"given[{two!r}] = given[{one!r}]",
        "together = dict(zip(names, backward(given, d, how)))",
        f"error = (together[{one!r}].double() - apart[{one!r}].double() - apart[{two!r}].double()).abs().max()",
        f'print("one tensor as {one} and {two}: its gradient is off by", float(error))',
        "size = max(x.abs().max() for x in apart.values())",
        f"allowed = 8 * torch.finfo(given[{one!r}].dtype).eps * size",
        "sys.exit(int(not error <= allowed))",
    ]
