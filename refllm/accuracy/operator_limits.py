"""When one result of an operator is wrong. Every number of that verdict is here, with its reason.

Used by `refllm.accuracy.judge` and by `refllm.kernels.verify`.
"""

import numpy as np

from refllm.accuracy.limits import MISROUNDED
from refllm.ops.contracts import contract_of

ELEMENTWISE_LIMIT, PRODUCT_LIMIT = 1.1, 1.25
"""How many times the RMS error of the contract in the same precision that of a result may be. Where nothing is rounded
but the result, both errors are nearly the same numbers. A product rounds inside as well (`Contract.product`)."""

ELEMENT_LIMIT = 8.0
"""Sigmas of a single element. The last rounding is uniform and at most sqrt(3) of its sigma; the errors before it add
up to something Gaussian, of which the largest of 1e9 elements has 6.1 sigma. Both together reach at most
sqrt(3 + 6.1^2) = 6.4, and an implementation that rounds elsewhere inside may have 1.25 times the error: 7.9. (The
largest measured over a million elements of right implementations is 5.5.)"""

INNER = 4.0
"""Float32 roundings inside count as if the inputs were moved by this many of their own (backward stability): a handful
of sums, products, a root or an exponential, of which the approximate ones of a GPU err by 2 ulp."""

SHARED = 8
"""Elements of a row that share the rounding of one weight or one term of a product, and so count as one."""

SUMMED = ("E", "F", "V", "D")
"""Axes along which operators have sums, those that have any (`Contract.sums`)."""

CHAIN = 0.4
"""A sum of n numbers of one sign in one float32 chain has a relative error of CHAIN sqrt(n / 3) roundings of 2^-24: the
k-th addition rounds a partial sum of k / n, uniformly, to sqrt(1/3) of a rounding; on average over a binade that is
3/4 of what it is at its end."""

FEW = 64
"""Up to so many independent errors the contract's own may be small by luck: the predicted sigma counts as well then."""

BORDER = 4.0
"""Within so many ulp of the largest finite number an infinity and a finite value are the same result."""


def rms_limit(operator: str) -> float:
    """Up to which RMS error / RMS error of the contract a result holds, before what chance allows."""
    return PRODUCT_LIMIT if contract_of(operator).product else ELEMENTWISE_LIMIT


def chance(rows: int) -> float:
    """How much larger one of two equal RMS errors may come out by chance: 5 standard deviations of their ratio.

    rows: how many independent errors there are. Each RMS of n errors has a relative spread of 1 / sqrt(2 n).
    """
    return 1 + 5 / float(np.sqrt(max(1, rows)))


def misrounded_limit(elements: int, near: float) -> float:
    """The share of elements that may differ from the contract's bits where the result alone is rounded.

    near: the share that float32 arithmetic inside moves across a boundary between two numbers of the format.
    """
    return MISROUNDED + 2 / max(1, elements) + near
