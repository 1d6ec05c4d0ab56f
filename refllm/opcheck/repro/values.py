"""The lines that check values: one element, the whole result, or the bits of a row alone."""

import ml_dtypes
import numpy as np

from refllm.accuracy import limits
from refllm.accuracy.expected import Expected, remembered
from refllm.accuracy.judge import Judgement, rms
from refllm.opcheck.repro.shown import Shown, number
from refllm.ops.contracts import contract_of


def values(shown: Shown) -> list[str]:
    """Lines that compare values."""
    i = list(contract_of(shown.call.operator).outputs).index(shown.finding.output)
    judgement = shown.finding.judgement
    if judgement is None:
        return _bits(shown, i)
    lines = [*shown.called(), f"y = {shown.read(f'got[{i}]')}"]
    if shown.whole:
        return [*lines, *_whole(shown, judgement, i)]
    return [*lines, *_element(judgement)]


def _element(judgement: Judgement) -> list[str]:
    at = judgement.worst
    if any(f.rule == "not finite" for f in judgement.faults):
        return [
            f"at, expected = {at}, {number(judgement.contract)}",
            "right = np.array_equal(y[at], expected, equal_nan=True) or np.isfinite([y[at], expected]).all()",
            'print(f"{at}: {y[at]}, expected {expected}")',
            "sys.exit(int(not right))",
        ]
    allowed = limits.ELEMENT_LIMIT * abs(judgement.value - judgement.exact) / judgement.sigma
    return [
        f"at, exact, allowed = {at}, {judgement.exact!r}, {allowed:.3g}",
        "error = abs(y[at] - exact)",
        f'print(f"{judgement.name}, at {{at}}: {{y[at]:.7g}}, exact {{exact:.7g}}; "',
        '      f"off by {error:.3g}, right code at most by {allowed:.3g}")',
        "sys.exit(int(not error <= allowed))",
    ]


_EXACT = """
values = [x.double().cpu().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point()
          else x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in arguments]
named = {n: x.cpu().numpy() if isinstance(x, torch.Tensor) else x for n, x in keywords.items()}
""".strip().splitlines()


_EXACT_NUMPY = """
values = [np.array(x, np.float64) if isinstance(x, np.ndarray) and x.dtype.kind in "fV" else x for x in arguments]
named = keywords
""".strip().splitlines()


def _whole(shown: Shown, judgement: Judgement, i: int) -> list[str]:
    e = remembered(shown.call, shown.policy)[i]
    rules = {f.rule for f in judgement.faults}
    lines = [
        *(_EXACT_NUMPY if shown.numpy else _EXACT),
        f"exact = definition(*values, **named)[{i}]",
        "finite = np.isfinite(y) & np.isfinite(exact)",
        "error = np.abs(y - exact)[finite]",
    ]
    if "rms" in rules or "row" in rules:
        size = rms(_error(shown.finding.results[i].value, e))
        allowed = size * judgement.limit / judgement.ratio if "rms" in rules else 0.999 * size
        return [
            *lines,
            f"rms, allowed = np.sqrt(np.mean(error**2)), {allowed:.4g}",
            'print(f"RMS error {rms:.3g}; that of right code is at most {allowed:.3g}")',
            "sys.exit(int(not rms <= allowed))",
        ]
    share = limits.misrounded_limit(judgement.wrong.size)
    return [
        *lines,
        f"rounded = {_rounded(shown, e.dtype)}",
        "share = np.mean((y != rounded)[finite])",
        "binade = np.floor(np.log2(np.maximum(np.abs(exact[finite]), 1e-45)))",
        f"worst = (error / (2.0**binade * {float(ml_dtypes.finfo(e.dtype).eps)!r})).max()",
        'print(f"{share:.2%} of the elements are not the exact value rounded once; "',
        '      f"the worst is {worst:.3g} ulp off, and 0.5 is what one rounding makes")',
        f"sys.exit(int(share > {share:.3g} or worst > 0.501))",
    ]


def _rounded(shown: Shown, dtype: str) -> str:
    """An expression for the exact values, rounded once."""
    if not shown.numpy:
        return f"torch.from_numpy(np.array(exact)).float().to(torch.{dtype}).double().numpy()"
    kind = "ml_dtypes.bfloat16" if dtype == "bfloat16" else f"np.{dtype}"
    return f"np.array(exact, np.float32).astype({kind}).astype(np.float64)"


def _bits(shown: Shown, i: int) -> list[str]:
    """The lines that compare the bits of a row alone with those that it has in its batch."""
    assert shown.finding.row_alone is not None
    part = f"{shown.finding.row_alone}:{shown.finding.row_alone + 1}"
    masked = any(name == "key_mask" for name, _ in shown.call.keywords)
    return [
        *shown.called(),
        f"alone = {shown.read(f'got[{i}]')}",
        "arguments = whole",
        *(['keywords = {**keywords, "key_mask": key_mask}'] if masked else []),
        *shown.called(),
        f"batch = {shown.read(f'got[{i}]')}",
        f"different = alone != batch[{part}]",
        'print("elements with other bits:", int(different.sum()))',
        "sys.exit(int(different.any()))",
    ]


def _error(value: np.ndarray, e: Expected) -> np.ndarray:
    """|value - exact| where both are finite; of the last row alone, if value is no more than that."""
    exact = e.exact if value.shape == e.exact.shape else e.exact[-value.shape[0] :]
    finite = np.isfinite(value) & np.isfinite(exact)
    return np.abs(value.astype(np.float64) - exact)[finite]
