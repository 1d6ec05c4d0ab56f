"""Known bugs and one-line mistakes that no mutant of a kernel stands for, and why."""

_BACKWARD = "a bug of a backward pass, where it is planted (docs/mutants-backward.md)"
_LOOP = "a mistake of a training loop around right gradients: `refllm check --backward` has it among its own mutants"

NOT_APPLICABLE: tuple[tuple[str, str], ...] = (
    ("ROCm/TransformerEngine#623", _BACKWARD),
    ("linkedin/Liger-Kernel#1298", _BACKWARD),
    ("linkedin/Liger-Kernel#1329", _BACKWARD),
    (
        "linkedin/Liger-Kernel#1350",
        "changes no result: in machine code `refllm kernels check-aot` fails on float64 instructions",
    ),
    (
        "triton-lang/triton#6547",
        "no kernel of this project is autotuned, or adds to memory that it did not write; for yours there is "
        'interpreted(configs="all")',
    ),
    (
        "triton-lang/triton#10821",
        "a bug of a compiler: the source is right, and the interpreter runs the source",
    ),
    ("vllm-project/vllm#39705", "no kernel of this project reads quantised weights"),
    (
        "flashinfer-ai/flashinfer#2716",
        "needs launches that overlap on a GPU; on the interpreter one program runs after the other",
    ),
    (
        "one-line: theta, exponent, attention factor, bfloat16 positions of RoPE",
        "cos and sin are arguments of an operator: a model makes them",
    ),
    (
        "one-line: cache before rotation, label shift, tied weight, layer or norm skipped, parallel residual",
        "a mistake of a model that calls right kernels: `refllm check` and its own mutants are for those",
    ),
    ("one-line: softcap", "no operator of the contract has one"),
)
"""(source, why not). The source of a known bug is its first reference in `known_bugs.py`."""

IN_NO_GRADIENT: tuple[tuple[str, str], ...] = (
    ("entrenar#314", _LOOP),
    ("pytorch/pytorch#190758", _LOOP),
    ("ServiceNow/Fast-LLM#550", _LOOP),
    ("NVIDIA/TransformerEngine#3216", "needs a mask of the scores that no operator of the contract takes"),
    (
        "sonic-moe#63",
        "a mixture of experts; small inputs, which hid it, are among the fixed calls of every operator",
    ),
    ("triton-lang/triton#6547", "no kernel of this project is autotuned, or adds to memory that it did not write"),
)
"""The same of bugs of gradients that no mutant of a backward operator stands for."""
