"""Bugs that slipped through the tests of other projects, and which of them a mutant of this project stands for.

A mutant names in `source` the first place where its bug was found. Most of these issues are about more than one kernel;
what counts here is the kind of mistake. Some mutants plant in a forward kernel what was found in a backward one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownBug:
    """references: issues, pull requests or commits with this bug. trigger: what it takes to see it."""

    references: tuple[str, ...]
    trigger: str


def _bug(trigger: str, *references: str) -> KnownBug:
    return KnownBug(references, trigger)


_FLASH, _LIGER, _VLLM = "Dao-AILab/flash-attention", "linkedin/Liger-Kernel", "vllm-project/vllm"
_FLASHINFER, _FLA, _TRITON = "flashinfer-ai/flashinfer", "fla-org/flash-linear-attention", "triton-lang/triton"
_SGLANG, _AITER = "sgl-project/sglang", "ROCm/aiter"

KNOWN_BUGS = (
    _bug("program id times stride in int32, from a million rows of 4096 on", f"{_LIGER}#804", f"{_LIGER}#803"),
    _bug("few elements, but a stride or an offset beyond 2^31: a view of a fused QKV tensor",
         f"{_FLASHINFER}#3392", f"{_FLASHINFER}#3007"),
    _bug("offsets or sizes in bytes in int32, in long contexts",
         f"{_FLASH}#2662", f"{_FLASH}#2260", f"{_FLASH}#1500"),
    _bug("a tail that nobody writes: whole tiles only, or an offset chosen by the wrong size",
         f"{_AITER}#4244", f"{_AITER}#4673"),
    _bug("NaN in a value that no query sees: 0 times NaN is NaN",
         f"{_FLASH}#2374", f"{_FLASH}#1745", f"{_AITER}#5401", f"{_VLLM}#936", f"{_VLLM}#53856"),
    _bug("results allocated and not filled where a mask says so: left padding", f"{_FLA}#967"),
    _bug("two kernels disagree on where a row lies in their workspace: passes alone, NaN after other work",
         f"{_FLASH} VARLEN_PREPROCESS_TILE_BUG"),
    _bug("a row of 769 with mean 1000: padding lanes add (0 - mean)^2 to the variance", "Dao-AILab/quack 9310d47"),
    _bug("lanes past the last key count in the denominator of a softmax that is not causal", f"{_FLASHINFER}#3717"),
    _bug("scores below the finite number that stands for masked; rows without a key",
         f"{_FLASHINFER}#4401", f"{_FLASHINFER}#4267", f"{_FLASHINFER}#4450", f"{_FLASHINFER}#4452"),
    _bug("keys split between programs, some of which, or all, have none",
         f"{_FLASH} 26d7d92f", "tile-ai/tilelang#328", f"{_FLASHINFER}#3943"),
    _bug("a program that has no keys writes -inf where another row keeps its maximum", f"{_FLASH}#2842"),
    _bug("a result with another layout than the one that its offsets assume", "flagos-ai/FlagGems#5235"),
    _bug("a batch stride of 0: right for one sequence", "vllm-project/flash-attention#176"),
    _bug("the strides of one tensor used for another: right while both are laid out alike",
         f"{_FLASH}#355", f"{_FLASH}#818", f"{_FLASH} 9ee0ff1d", "pytorch/pytorch#194719", f"{_FLA}#871"),
    _bug("an upstream gradient expanded from one number, with strides of 0",
         "ROCm/TransformerEngine#623", "NVIDIA/TransformerEngine#2139"),
    _bug("losses not reduced: every row's gradient scaled by the first upstream gradient", f"{_LIGER}#1298"),
    _bug("the gradient at the label of a confident row, rounded before 1 is subtracted", f"{_LIGER}#1329"),
    _bug("a sum kept in bfloat16 from step to step", f"{_LIGER}#950"),
    _bug("1 / rms kept in bfloat16 between two passes", "pytorch/helion#2273"),
    _bug("a result written over an input that the caller still holds", f"{_LIGER}#1305", f"{_LIGER}#376"),
    _bug("a Python float becomes float64 in the compiled kernel: right, at half the speed",
         f"{_LIGER}#1350", f"{_LIGER}#1358", f"{_LIGER}#1364"),
    _bug("the weight of a norm before or after the rounding",
         f"{_VLLM}#42379", f"{_SGLANG}#22931", "InternLM/lmdeploy#4133"),
    _bug("a weight formed or rounded in bfloat16, as 1 + w near 1", f"{_LIGER}#1462", f"{_VLLM}#29810"),
    _bug("a partial rotation of many heads: those after the first tile are not what they were",
         f"{_VLLM}#51049", f"{_VLLM}#50903", f"{_VLLM}#57681"),
    _bug("a partial rotation that turns all dims and reads the tables past their end",
         f"{_VLLM}#43676", f"{_VLLM}#16904"),
    _bug("interleaved pairs for halves or the reverse: positions 0 and 1 look right",
         f"{_SGLANG}#30342", f"{_SGLANG}#30088", f"{_SGLANG}#30111"),
    _bug("a table of cos and sin per sequence, of which all read the first", f"{_LIGER}#477", f"{_FLA}#902"),
    _bug("a window over the keys, off by one or not asked for",
         "huggingface/transformers#39408", "NVIDIA-NeMo/Megatron-Bridge#2656", f"{_SGLANG}#34273",
         "microsoft/onnxruntime#25927"),
    _bug("an activation through exponentials that overflow for large inputs", f"{_VLLM}#56578"),
    _bug("lengths around a tile, no keys or no queries at all: NaN",
         "pytorch/pytorch#153799", f"{_FLASH} a4f148b6", f"{_FLASH} c65b5106", f"{_FLASH}#2421"),
    _bug("part of the dims is left out of a product", f"{_TRITON}#621", f"{_TRITON}#4541", f"{_TRITON}#2059"),
    _bug("more lanes or programs than rows: out of bounds, or two that store to one place",
         f"{_FLA}#795", f"{_FLA}#1033"),
    _bug("an autotuner that runs a kernel several times on results that add up",
         f"{_TRITON}#6547", f"{_TRITON}#9230", f"{_TRITON}#7181", f"{_FLA}#372"),
    _bug("two products chained through one accumulator, compiled for sm_103", f"{_TRITON}#10821"),
    _bug("quantised weights: groups, scales and tails of another size than the tile",
         f"{_VLLM}#39705", f"{_VLLM}#37329", f"{_VLLM}#52576", f"{_SGLANG}#39626", "pytorch/ao#4186"),
    _bug("the number of splits depends on the rest of the batch: so do the bits of a row",
         f"{_FLASH}#1897", f"{_FLASH}#2450", "deepseek-ai/FlashMLA#212", f"{_AITER}#4378"),
    _bug("barriers between dependent launches compiled to nothing: NaN under load", f"{_FLASHINFER}#2716"),
    _bug("the weight of q applied to k: right while all weights are alike", f"{_AITER}#4659"),
)  # fmt: skip
