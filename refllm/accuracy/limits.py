"""Every number of a verdict, with its reason: the one table that every judge of values reads. None is tuned to a model.

`refllm.accuracy.judge` has the rules that these numbers belong to. Whoever else decides whether a value is right
(`refllm.kernels.verify`, the goldens, a loss, a next token) reads its numbers here as well.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.ops.contracts import contract_of

if TYPE_CHECKING:
    from refllm.accuracy.measure import Measure

# ---------------------------------------------------------------------------------------------------- errors as a whole

ONE_ROUNDING_MORE = 1.25
"""How many times the error of a result that rounds where it should one may have, in a narrow format. A second, hidden
rounding of the same size makes it sqrt(2) = 1.41."""

PIECE_OF_A_RANK = 2.0
"""How many times the predicted error a rank's piece of a wrong value may have and not be named: it has few numbers."""

SUM_OF_RANKS = 4.0
"""A sum over ranks is explained by its parts if what is left is so many roundings of all of them at most."""

ISOLATED = {"bfloat16": ONE_ROUNDING_MORE, "float16": ONE_ROUNDING_MORE, "float32": 1.8}
"""The limit of rms(error) / rms(sigma) over one operator's result, on its own inputs. With narrow formats the only
error is the rounding of the result, which is known exactly. In float32 the order of additions counts, which is not."""

END_TO_END = 2.0
"""The same after all that came before: independence of errors is an approximation there."""

ELEMENTWISE_LIMIT, PRODUCT_LIMIT = 1.1, ONE_ROUNDING_MORE
"""How many times the RMS error of the contract in the same precision that of a result may be. Where nothing is rounded
but the result, both errors are nearly the same numbers. A product rounds inside as well (`Contract.product`), at a
place of its choosing."""

ROW = {"bfloat16": 3.0, "float16": 3.0, "float32": 6.0}
"""The limit of the worst row (isolated), to which is added what chance allows for the number of independent errors that
the row is made of: among a million rows of softmax weights some have their weight on two keys, and one error. The
errors of a row share the sums of its norm or softmax, which in float32 count as much as the rest."""

ROW_FLOOR = 0.05
"""A row whose predicted variance is far below the tensor's (its values happen to be tiny) is judged by this part of the
tensor's, and an element by this part of its row's or tensor's: a hidden rounding elsewhere is of that size."""

SHARED, SHARED_BESIDES, SHARED_FLOOR = 1.3, 0.3, 1e-3
"""What errors of a row or column have in common is a fault from this factor on, and this number more, over the largest
value that any admissible profile's own prediction has: honest errors are not independent in a format of 128 mantissas.
Measured over 286 honest runs. An element's variance counts as at least this part of the mean."""

NAMED_VOTES, NAMED_SHARE, NAMED_LEFT = 10, 0.8, 0.5
"""A defect is named to the bit if, where it and the best habit differ, it is right in so many elements more, in at
least this share of them, and leaves at most this part of the habit's mismatches."""

ANY_PROFILE = 4.0
"""An error of attention larger by this than the limits allow for eager code is that of no admissible profile. Over 42
fixed calls the farthest of 25 profiles scored 0.89 of those limits."""

CONTEXT_EXACTLY, CONTEXT_NEARLY, CONTEXT_FAR_WORSE = 0.01, 0.03, 0.1
"""Shares of a context that a profile does not explain. What attention computes is known to the bit only where there are
neither tiles nor approximate exponentials; a profile that fits so well in most layers is the candidate's in all."""

ATTENTION_KNOWN, NEAR_RECORD, CLEARLY, AS_GOOD = 0.5, 0.03, 0.02, 0.005
"""Shares of the elements of a context: which a profile explains at least, or says nothing; which it may explain less
than `MISROUNDED` asks where earlier layers had it; by which one that reads unrounded values has to be better than one
that reads what is shown; and by which profiles are equally good."""

PERHAPS = 0.1
"""The share of a few rows, besides `MISROUNDED`, that a way to split a product may miss and is yet looked at in all of
the sample. Wrong ways miss 15 % and more."""

FLOAT32_INSIDE = 2.0**-16
"""What float32 arithmetic may move a result by that is not rounded, beside the size of its row."""

TF32_AT_LEAST = 0.2
"""Sigma of products of 11-bit factors: what errs less has other reasons."""

TABLES_WITHIN = 16
"""Float32 ulp around the exact frequency in which honest ones lie. Of the stacks that were measured (float32 powers and
exponentials of three libraries, exp2, repeated products) the farthest is 12.6 x 2^-24 off, 7 ulp."""

TABLES_NEARLY_ALL, TABLES_NO_FEWER, TABLES_NO_WORSE = 0.998, 0.0005, 6.0
"""A table with a name explains at least this share of the elements to the bit, at most so much less than the best; and
of N errors its fit is at most so many parts of N worse than the best: another has to be better than by chance."""

TABLES_OF_ONE = 4.0
"""Times the least error of the angles of a layer's queries or keys which those of another layer may have and still be
asked for the tables. Layers that turn alike differ by their numbers of heads and by the sizes of their values, less
than twofold; one that is wrong is wrong by far more than a rounding."""

ANOTHER_TENSOR, STEPS_OF_A_ROW = 0.7, 3.5
"""What a row of a quantised tensor may be off by, as a part of its size, and still be the checkpoint's: in a format of
b bits a number, those of scales among them, 2^(`STEPS_OF_A_ROW` - b), but never more than the first. Half a step in
each of 31 numbers beside one that is 2^(b - 1) steps large is sqrt(31) / 2^b = 2^(2.5 - b) of it; scales take half a
bit, and as much is left for those that are rounded themselves. A row that is lost is off by 1, another one by sqrt(2),
and of what was measured the coarsest format, Q2_K, by 0.35."""

OF_ONE_ROUNDING, OF_THE_SMALLEST = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}, 2.0**-25
"""The same of a row that is rounded number by number: half a step of each; and half the smallest number of float16, as
what a number may be off by in any case."""

ALIKE_STEPS = 2.0
"""Times the predicted variance of gradients that are products and round at every step: rows that are alike have errors
that are alike, and those of a group of rows add up."""

CANCELS = 3
"""Mean over standard deviation of a row, from where a variance in one pass, the difference of two squares, is mostly
their error."""

NOTHING_LEFT, GATE_KNOWN = -25 * math.log(2), -64.0
"""The gate below which a sigmoid is less than 2^-25, the smallest step that a difference of float32 numbers up to 1 can
have; and the one down to which rounding it to bfloat16, by half an ulp of 0.5 at most, changes the sigmoid by less than
e^0.25 = 1.28 times: a result that is off by half of itself there was not made with it."""

EFFECT, EFFECT_OF_A_ROW = 0.5, 1.5
"""Rms sigma by which a hypothesis must change a value, or its most changed row, to say anything about it."""

SLOPE = {"bfloat16": 0.05, "float16": 0.05, "float32": 0.01}
"""How far from 1 the slope of the error along what a hypothesis changes may be, beside what chance allows, for the
hypothesis to explain it."""

FALLS = 3.0
"""How many times smaller the error must become under a hypothesis that explains it."""

AS_GOOD_AS_THE_BEST = 1.1
"""How many times the error that the best hypothesis leaves another one may leave that explains a run as well."""

BELOW_SLOPE, BELOW_OFF, BELOW_SIGMAS, ALIKE = 0.7, 0.1, 5.0, 0.9
"""The slope from which the shape of an error that is below its limit is a finding; how far from 1 it may be, beside
what chance allows; the standard errors by which it has to be above 0; and the cosine of the effects of two hypotheses
that may both be named. Of 100 right runs none had such a slope along anything that changes half a sigma."""

NEARLY = 0.15
"""The share of the error that a hypothesis may leave that explains nearly all of it."""

OUTSIDE_OF_THE_HEAD = 3.0
"""Sigma of the part of a head's error that no hidden state can make, from where the head or what follows is wrong."""

DEVIATIONS = 5.0
"""Standard deviations by which the size of an error may be larger than expected by chance."""

# ------------------------------------------------------------------------------------------------------ single elements

ELEMENT_LIMIT = 8.0
"""Sigmas of a single element of an operator, what float32 inside may do included. The last rounding is uniform and at
most sqrt(3) of its sigma; the errors before it add up to something Gaussian, of which the largest of 1e9 elements has
6.1 sigma. Both together reach at most sqrt(3 + 6.1^2) = 6.4, and an implementation that rounds elsewhere inside may
have `ONE_ROUNDING_MORE` times the error: 7.9. (The largest measured over a million elements of right implementations is
5.5.)"""

GOLDEN_ELEMENT = 12.0
"""Sigmas of a single element of a golden, whose sigma is the predicted one alone. Of 10 million elements of right
implementations none was beyond 9; those are float32 products with partial sums far larger than their result."""

MISROUNDED = 0.01
"""The share of the elements that may differ from what the policy's rounding points give, where that is known to the bit
(norms, RoPE, activations, sums of two in a narrow format). Float32 arithmetic inside an operator, exact to a few times
6e-8, moves an element across a rounding boundary of bfloat16 or float16 in at most 1 of 500 cases; one rounding point
too many or too few moves every fifth. This sees what the error's size cannot: a rounding that is missing."""

GRANTED = 2
"""So many elements more, so that no single one decides about a small value."""

BORDER = 4.0
"""Within so many ulp of the largest finite number an infinity and a finite value are the same result."""

FLIP = 5.0
"""Sigmas of margin up to which a changed next token is explained by rounding."""

LOG_PROBABILITY = 10.0
"""Sigmas up to which the log-probability of one token is explained by rounding: 5, of which a million independent
errors have one, times `END_TO_END`; and times what an honest run has, if that is more."""

LOSS = 6.0
"""Sigmas up to which a loss is that of its logits. One number is compared, so its own scatter is allowed for."""

# --------------------------------------------------------------------------------------- what float32 inside may change

INNER = 4.0
"""Float32 roundings inside count as if the inputs were moved by this many of their own (backward stability): a handful
of sums, products, a root or an exponential, of which the approximate ones of a GPU err by 2 ulp."""

TILT = INNER * 2.0**-24
"""How far float32 may have put a value that is rounded at a point inside an operator, as a part of it: what lies nearer
to a boundary between two numbers of the format may fall to either side, and with numbers of few bits much lies there.
An operator of several steps is evaluated with everything so much smaller and so much larger besides."""

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

# ------------------------------------------------------------------------------------------- two evaluations in float64

FLOAT64_SIGMA = 2.0**-29 * np.sqrt(2)
"""Float64 arithmetic beside float32 arithmetic, of which it is the same with an ulp 2^-29 times as large; twice, since
both sides round."""

FLOAT64_LIMIT = 32.0
"""How many such sigma two float64 evaluations may differ: sums in another order have a few elements far out."""

# ------------------------------------------------------------------------------- which calls count at which level

LARGE_MEAN, EXTREME_MEAN = 100.0, 1e4
"""Means, over a scatter of about 1, from which a call is no beginner's (`refllm.strategies.levels`): a variance in one
pass, E x^2 - (E x)^2, loses 2 log2(mean) of float32's 24 bits. From 100 on it has 10.7 left, fewer than float16 has;
from 10,000 on none."""

FAR_POSITIONS = 4096.0
"""Positions past which a float32 angle, of which one rounding is position x 2^-24, is off by half an ulp of float16
below 1, 2^-12: a right table is one that was made with care."""

MANY_ROWS = 256
"""Rows from which a sum over them shows what it is kept in: added one by one in bfloat16, of 8 bits, 256 equal terms
are the most that count. Below it an honest library may do that (torch's CPU kernels of LayerNorm and embedding)."""

CONFIDENT = 4.0
"""A planted logit, or weight of one, from which a probability is near 1: among 20 it is 0.6 at 4 and 0.996 at 9."""

EXTREME_VALUE, VANISHING_SCALE = 250.0, 1e-10
"""A value from which its square is next to the largest float16, 65504 = 256^2; and a scale far below its smallest,
6e-8, at which every value is 0 there and every square is nothing beside any eps."""

# ----------------------------------------------------------------------------------------- limits that depend on a size


def chance(errors: Any, measured: int = 1) -> Any:
    """How far the RMS of `errors` independent errors over its expected value may be above 1 by chance.

    measured: 2 where what it is compared with is itself such an RMS, and no prediction. Each RMS of n errors has a
    relative spread of 1 / sqrt(2 n).
    """
    return DEVIATIONS / np.sqrt(2 / measured * np.maximum(1, errors))


def rms_limit(operator: str) -> float:
    """Up to which RMS error / RMS error of the contract a result holds, before what chance allows."""
    return PRODUCT_LIMIT if contract_of(operator).product else ELEMENTWISE_LIMIT


def isolated_limit(found: "Measure", dtype: str) -> float:
    """Up to which `found.ratio` an operator's result holds on its own inputs: as predicted, or as an honest run of the
    reference where that is more."""
    return float(ISOLATED[dtype] * max(1.0, found.honest) + chance(found.errors))


def row_limit(found: "Measure", dtype: str) -> float:
    """Up to which `found.row_ratio` does."""
    return float(ROW[dtype] * max(1.0, found.honest) + chance(found.row_errors))


def end_to_end_limit(found: "Measure") -> float:
    """Up to which `found.ratio` a value holds after all that came before: twice the prediction, or twice what an honest
    run reaches where that is more."""
    return float(END_TO_END * max(1.0, found.honest) + chance(found.errors))


def golden_element_limit(found: "Measure") -> float:
    """Up to which `found.largest` an output of a golden holds."""
    return GOLDEN_ELEMENT * max(1.0, found.honest)


def misrounded_limit(elements: int, near: float = 0.0) -> float:
    """The share of elements that may differ from the bits that the rounding points give.

    near: the share that float32 arithmetic inside moves across a boundary between two numbers of the format.
    """
    return MISROUNDED + GRANTED / max(1, elements) + near
