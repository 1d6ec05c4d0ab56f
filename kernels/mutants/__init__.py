"""Known bugs on purpose: every operator with one mistake planted, to ask a test what it sees.

    from refllm.kernels.mutants import catalogue
    for mutant in catalogue("rms_norm"):
        wrong = mutant.function()       # takes and returns what refllm.kernels.rms_norm does

Each mutant names where the bug comes from: a real one by its issue, or the class of one-line mistakes it belongs to.
The modules `reference_*` hold those of the plain Torch forms, `triton_*` those of the Triton kernels, and those that
begin with `backward_` the same of gradients: `catalogue("rms_norm_backward")`. Every one is also a function of
`refllm.kernels.mutants.built`, so that a command can name it.
"""

import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

FORMS = ("torch", "triton")
"""Written in plain Torch (runs anywhere, fast), or a Triton kernel of this project with its source changed."""
_PREFIX = {"torch": "reference_", "triton": "triton_"}
"""What the names of the modules of a form begin with."""
_BACKWARD = "_backward"


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    name: short, unique among those of one operator and form: "no eps". operator: which contract it breaks. form: one of
        `FORMS`.
    what: the kind of bug in one clause, as a report says it: "the padding lanes of a ragged row count in the variance".
    source: "Dao-AILab/quack 9310d47", or "one-line: norm".
    build: makes the function, with the signature of the operator in `refllm.kernels`. A Triton one runs inside
        `refllm.kernels.interpreted()` or on a GPU.
    dtypes: the dtypes in which it differs from the contract.
    place: where it rounds that honest code may round too, in words: it breaks no contract, only a policy that somebody
        named. "" for a defect.
    equivalent: why no test can tell it from the right operator; "" for a real bug.
    corner: the kind of the fixed call that shows it, where that is not among the first few; to be tried first.
    autograd: the function has the signature of the forward operator, and the mistake is in what torch.autograd finds.
    """

    name: str
    operator: str
    form: str
    what: str
    source: str
    build: Callable[[], Callable[..., Any]]
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    equivalent: str = ""
    corner: str = ""
    place: str = ""
    autograd: bool = False

    @property
    def slug(self) -> str:
        """Its name as a function of `refllm.kernels.mutants.built`: rms_norm_no_eps, triton_rms_norm_no_eps."""
        words = re.sub(r"\W+", "_", f"{self.operator}_{self.name}").strip("_")
        return words if self.form == "torch" else f"{self.form}_{words}"

    def function(self) -> Callable[..., Any]:
        """The function, by a name under which a program of its own can import it again."""
        made = self.build()
        made.__module__, made.__qualname__, made.__name__ = f"{__name__}.built", self.slug, self.slug
        made.uses_triton = self.form == "triton"  # type: ignore[attr-defined]
        return made


def catalogue(operator: str | None = None, form: str | None = None, backward: bool | None = None) -> list[Mutant]:
    """All mutants, or those of one operator, or of one form.

    backward: those of gradients, and not those of forward operators; None: as the name of the operator says.
    """
    backward = (operator or "").endswith(_BACKWARD) if backward is None else backward
    prefixes = tuple(
        f"backward_{prefix}" if backward else prefix for name, prefix in _PREFIX.items() if form in (None, name)
    )
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name.startswith(prefixes))
    mutants = (m for name in names for m in import_module(f"{__name__}.{name}").MUTANTS)
    return [m for m in mutants if operator in (None, m.operator)]
