"""The goldens of single operators: three to eight calls each, the edges of the contract included."""

from collections.abc import Callable
from typing import Any

import numpy as np

from refllm.golden.cases import DTYPES, Case, Draw, OperatorCall, OperatorCase

E, H, K, D, R, S, T, V = 96, 6, 2, 16, 12, 7, 11, 200
FLOAT32 = ("float32",)
Make = Callable[[Draw], OperatorCall]


def cases() -> list[Case]:
    """All of them, in the order of the contract."""
    return [*_norms(), *_rotations(), *_projections(), *_attention(), *_decoding(), *_activations(), *_losses()]


def _rows(draw: Draw, kind: str, n: int = E) -> np.ndarray:
    """[5, n] of one kind of values."""
    x = draw.normal(5, n, scale=1e-3 if kind == "tiny" else 1.0, mean=1000.0 if kind == "mean" else 0.0)
    if kind == "outlier":
        x[:, 3] = draw.on_grid(x[:, 3] * 1e4)
    if kind == "zeros":
        x[1] = 0
    return x


def _norms() -> list[Case]:
    def rms(kind: str, eps: float = 1e-6, n: int = E) -> Make:
        return lambda draw: OperatorCall((_rows(draw, kind, n), draw.weight(n), eps))

    def layer(kind: str, bias: bool, eps: float = 1e-5, n: int = E) -> Make:
        return lambda draw: OperatorCall((_rows(draw, kind, n), draw.weight(n), draw.normal(n) if bias else None, eps))

    def sums(kind: str, layer: bool, bias: bool = False) -> Make:
        def make(draw: Draw) -> OperatorCall:
            x, residual = _rows(draw, kind), draw.normal(5, E, scale=8.0)
            if kind == "cancels":
                residual = draw.on_grid(draw.normal(5, E, scale=0.125) - x)
            weights = (draw.weight(E), draw.normal(E) if bias else None) if layer else (draw.weight(E),)
            return OperatorCall((x, residual, *weights, 1e-5))

        return make

    return [
        _case("rms_norm/plain", "five rows", rms("normal")),
        _case("rms_norm/ragged", "a width that no tile divides", rms("normal", n=77)),
        _case("rms_norm/outlier", "one channel times 1e4", rms("outlier")),
        _case("rms_norm/mean-1000", "all values near 1000", rms("mean")),
        _case("rms_norm/zero-row", "a row of zeros and tiny rows, so that eps counts", rms("zeros", eps=0.5)),
        _case("rms_norm/float32", "values with 24 digits", rms("normal"), FLOAT32),
        _case("add_rms_norm/plain", "a residual eight times as large", sums("normal", layer=False)),
        _case("add_rms_norm/cancels", "a sum much smaller than its parts", sums("cancels", layer=False)),
        _case("add_rms_norm/float32", "values with 24 digits", sums("normal", layer=False), FLOAT32),
        _case("layer_norm/bias", "weight and bias", layer("normal", bias=True)),
        _case("layer_norm/no-bias", "weight alone", layer("normal", bias=False)),
        _case(
            "layer_norm/ragged",
            "a width that no tile divides: padding must not count in the variance",
            layer("normal", bias=True, n=77),
        ),
        _case(
            "layer_norm/mean-1000", "all values near 1000: E[x^2] - E[x]^2 loses everything", layer("mean", bias=False)
        ),
        _case("layer_norm/zero-row", "a constant row, whose variance is 0", layer("zeros", bias=True, eps=0.01)),
        _case("layer_norm/float32", "values near 1000 with 24 digits", layer("mean", bias=True), FLOAT32),
        _case("add_layer_norm/bias", "weight and bias", sums("normal", layer=True, bias=True)),
        _case("add_layer_norm/no-bias", "weight alone", sums("normal", layer=True)),
        _case("add_layer_norm/cancels", "a sum much smaller than its parts", sums("cancels", layer=True)),
    ]


def _heads(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    return draw.normal(2, H, S, D), draw.normal(2, K, S, D)


def _rotations() -> list[Case]:
    def rope(interleaved: bool, dims: int, batch: bool = False) -> Make:
        def make(draw: Draw) -> OperatorCall:
            both = [draw.tables(S, dims, first) for first in (100, 3)]
            cos, sin = (np.stack(t) for t in zip(*both, strict=True)) if batch else both[0]
            return OperatorCall((*_heads(draw), cos, sin), {"interleaved": interleaved})

        return make

    def normed(norm: str, interleaved: bool, dims: int) -> Make:
        def make(draw: Draw) -> OperatorCall:
            weights = draw.weight(H, D), draw.weight(K, D)
            keywords = {"norm": norm, "interleaved": interleaved}
            return OperatorCall((*_heads(draw), *weights, *draw.tables(S, dims), 1e-5), keywords)

        return make

    return [
        _case("rope/interleaved", "pairs (2i, 2i + 1), all dims", rope(True, D)),
        _case("rope/half-split", "pairs (i, i + D/2), all dims", rope(False, D)),
        _case("rope/interleaved-partial", "12 of 16 dims", rope(True, R)),
        _case("rope/half-split-partial", "12 of 16 dims: the half is of 12, not of 16", rope(False, R)),
        _case("rope/batch-tables", "every sequence has positions of its own", rope(False, D, batch=True)),
        _case("rope/float32", "values with 24 digits", rope(False, R), FLOAT32),
        _case("norm_rope/rms-half-split", "RMSNorm of each head, then all dims", normed("rms", False, D)),
        _case("norm_rope/rms-interleaved-partial", "RMSNorm of each head, then 12 of 16 dims", normed("rms", True, R)),
        _case(
            "norm_rope/layer-half-split-partial",
            "LayerNorm of each head (StableLM-2-12B), then 12 of 16 dims",
            normed("layer", False, R),
        ),
        _case("norm_rope/float32", "values with 24 digits", normed("layer", False, R), FLOAT32),
    ]


def _projections() -> list[Case]:
    def project(interleaved: bool, bias: bool, tokens: int, dims: int) -> Make:
        def make(draw: Draw) -> OperatorCall:
            E, rows = 48, (H + 2 * K) * D
            w = draw.normal(rows, E, scale=E**-0.5)
            b = draw.normal(rows) if bias else None
            keywords = {"num_heads": H, "num_kv_heads": K, "interleaved": interleaved}
            x, weight = draw.normal(2, tokens, E), draw.weight(E)
            return OperatorCall((x, weight, w, b, *draw.tables(tokens, dims), 1e-6), keywords)

        return make

    return [
        _case(
            "rms_norm_qkv_rope/bias", "biases on q, k and v, three query heads per key head", project(False, True, S, D)
        ),
        _case("rms_norm_qkv_rope/interleaved", "no biases, interleaved pairs", project(True, False, S, D)),
        _case("rms_norm_qkv_rope/one-token", "a step of decoding, 12 of 16 dims", project(False, False, 1, R)),
        _case("rms_norm_qkv_rope/float32", "values with 24 digits: tf32 shows", project(False, True, S, D), FLOAT32),
    ]


def _attention() -> list[Case]:
    def attend(queries: int = S, keys: int = T, hide: str = "", sharp: float = 1.0, **keywords: Any) -> Make:
        def make(draw: Draw) -> OperatorCall:
            q, k, v = draw.normal(2, H, queries, D, scale=sharp), draw.normal(2, K, keys, D), draw.normal(2, K, keys, D)
            named = dict(keywords)
            if hide:
                mask = np.ones((2, keys), bool)
                mask[0, [2, 3, 7]] = False
                mask[1] = hide != "all"
                k[0, :, [2, 7]], v[0, :, [3, 7]] = np.nan, np.nan
                named["key_mask"] = mask
            return OperatorCall((q, k, v), named)

        return make

    lse: dict[str, Any] = {"return_lse": True}
    return [
        _case("attention/causal", "as many queries as keys", attend(keys=S)),
        _case("attention/aligned-at-the-end", "7 queries after 4 cached keys, three heads per key head", attend(**lse)),
        _case("attention/all-keys", "not causal, a scale of its own", attend(causal=False, scale=0.4)),
        _case(
            "attention/masked-nan",
            "NaN in masked keys and values must not be seen",
            attend(hide="some", **lse),
            eager=False,
        ),
        _case(
            "attention/no-keys",
            "a sequence with every key masked: 0, and lse -inf",
            attend(hide="all", **lse),
            eager=False,
        ),
        _case("attention/more-queries-than-keys", "the first queries see nothing", attend(keys=4, **lse), eager=False),
        _case("attention/confident", "large scores: nearly all weight on one key", attend(sharp=12.0, **lse)),
        _case("attention/float32", "values with 24 digits: tf32 shows", attend(keys=40, queries=19, **lse), FLOAT32),
    ]


def _decoding() -> list[Case]:
    def decode(tokens: int, lengths: tuple[int, int], poison: bool, **keywords: Any) -> Make:
        def make(draw: Draw) -> OperatorCall:
            q, k, v = draw.normal(2, H, tokens, D), draw.normal(2, K, 32, D), draw.normal(2, K, 32, D)
            for b, length in enumerate(lengths):
                if poison:
                    k[b, :, length:] = v[b, :, length:] = np.nan
            return OperatorCall((q, k, v, np.array(lengths)), dict(keywords))

        return make

    return [
        _case("decode_attention/one-token", "sequences of 32 and 5 of 32 slots", decode(1, (32, 5), False)),
        _case(
            "decode_attention/eight-tokens",
            "several tokens at once, a scale of its own",
            decode(8, (20, 8), False, scale=0.4),
        ),
        _case(
            "decode_attention/unread-slots",
            "NaN in the slots past the length, and a length of 0",
            decode(3, (17, 0), True),
            eager=False,
        ),
        _case("decode_attention/float32", "values with 24 digits", decode(2, (31, 9), False), FLOAT32),
    ]


def _activations() -> list[Case]:
    def glu(scale: float) -> Make:
        return lambda draw: OperatorCall((draw.normal(5, 77, scale=scale), draw.normal(5, 77)))

    def relu2(scale: float) -> Make:
        return lambda draw: OperatorCall((draw.normal(5, 77, scale=scale),))

    return [
        _case("swiglu/plain", "gates of a few units", glu(3.0)),
        _case("swiglu/far", "gates to -200 and 200, where the exponential overflows", glu(60.0)),
        _case("swiglu/float32", "values with 24 digits", glu(3.0), FLOAT32),
        _case("relu2/plain", "values of a few units", relu2(2.0)),
        _case("relu2/overflow", "values past 256, whose square float16 does not hold", relu2(150.0)),
        _case("relu2/float32", "values with 24 digits", relu2(2.0), FLOAT32),
    ]


def _losses() -> list[Case]:
    def loss(scale: float = 4.0, mean: float = 0.0, ignore_all: bool = False, **keywords: Any) -> Make:
        def make(draw: Draw) -> OperatorCall:
            ignored = keywords.get("ignore_index", -100)
            labels = np.full(13, -100) if ignore_all else draw.labels(13, V, ignored)
            return OperatorCall((draw.normal(13, V, scale=scale, mean=mean), labels), dict(keywords))

        return make

    def projected(rows: int = 13, **keywords: Any) -> Make:
        def make(draw: Draw) -> OperatorCall:
            labels = draw.labels(rows, 150)
            return OperatorCall((draw.normal(rows, 48), draw.normal(150, 48, scale=0.5), labels), dict(keywords))

        return make

    return [
        _case("cross_entropy/mean", "every fourth label ignored", loss()),
        _case("cross_entropy/none", "a loss for every row, 0 where ignored", loss(reduction="none")),
        _case("cross_entropy/sum", "another ignored label", loss(reduction="sum", ignore_index=-1)),
        _case(
            "cross_entropy/confident",
            "logits to 300: exp overflows unless shifted",
            loss(scale=100.0, reduction="none"),
        ),
        _case("cross_entropy/all-ignored", "no row counts: the mean is NaN", loss(ignore_all=True)),
        _case("cross_entropy/shifted", "logits near -1e5, 24 digits", loss(mean=-1e5, reduction="none"), FLOAT32),
        _case("linear_cross_entropy/mean", "every fourth label ignored", projected()),
        _case("linear_cross_entropy/none", "a loss for every row, 0 where ignored", projected(reduction="none")),
        _case("linear_cross_entropy/one-row", "the mean of one", projected(rows=1)),
        _case(
            "linear_cross_entropy/float32", "values with 24 digits: tf32 shows", projected(reduction="none"), FLOAT32
        ),
    ]


def _case(name: str, what: str, make: Make, dtypes: tuple[str, ...] = DTYPES, eager: bool = True) -> OperatorCase:
    return OperatorCase(name, what, dtypes, make=make, eager=eager)
