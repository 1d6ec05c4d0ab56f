"""Mutants of the norm, projection and rotation in one kernel: kernels/triton/rms_norm_qkv_rope.py."""

from functools import partial

from refllm.kernels.mutants import Mutant
from refllm.kernels.mutants.changed_source import planted

_B_S = "b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)"
_TURNED = "turned = (i < HALF) & (head < num_heads + num_kv_heads)"
_PRODUCT = "a = (a * norm[None, :]).to(w.dtype)"
_BIAS = "qkv += tl.load(b_ptr + weight_row, mask=column < width, other=0.0).to(tl.float32)[None, :]"
_LOOP = "    for start in range(0, E, BLOCK_E):\n        within = start + e < E"
_CHOICE = "u, v = tl.where(mask, u * cos - v * sin, u), tl.where(mask, v * cos + u * sin, v)"

_qkv = partial(planted, "rms_norm_qkv_rope", "rms_norm_qkv_rope")
MUTANTS: tuple[Mutant, ...] = (
    _qkv("token offset in 32 bits", "the offset of a token in x is formed in int32, which ends at 2^31 elements",
         "linkedin/Liger-Kernel#804", (_B_S, "b, s = token // S, token % S"),
         corner="x past 2^31"),
    _qkv("weight row offset in 32 bits", "the offset of a row of the projection is formed in int32",
         "flashinfer-ai/flashinfer#3392",
         ("weight_row = (column // HEAD_DIM * HEAD_DIM + dim).to(tl.int64)",
          "weight_row = column // HEAD_DIM * HEAD_DIM + dim"),
         corner="weights past 2^31"),
    _qkv("v rotated too", "the heads of v are turned as those of q and k are", "one-line: RoPE",
         (_TURNED, "turned = (i < HALF) & (head < num_heads + 2 * num_kv_heads)")),
    _qkv("rest rotated too", "a partial rotation takes all dims, and reads the tables past their end",
         "vllm-project/vllm#16904", (_TURNED, "turned = head < num_heads + num_kv_heads")),
    _qkv("k not rotated", "only the heads of q are turned", "one-line: RoPE",
         (_TURNED, "turned = (i < HALF) & (head < num_heads)")),
    _qkv("wrong pairs", "interleaved pairs are taken for halves and the reverse", "sgl-project/sglang#30342",
         ('"INTERLEAVED": interleaved', '"INTERLEAVED": not interleaved')),
    _qkv("norm weight left out", "x is scaled and not multiplied with the weight of the norm", "one-line: norm",
         (_PRODUCT, "a = a.to(w.dtype)")),
    _qkv("scale left out", "the product is that of x and its weight, without 1 / rms", "one-line: norm",
         ("        qkv *= _scale(squares, E, eps)[:, None]", "        qkv *= 1.0"), dtypes=("bfloat16", "float32")),
    _qkv("scale after the product in float16", "x times its weight goes into the product unscaled: past 65504 it ends",
         "one-line: overflow",
         ('"SCALE_FIRST": x_BSE.dtype == torch.float16', '"SCALE_FIRST": False'), dtypes=("float16",),
         corner="large rows and norm weights"),
    _qkv("scale of the padded row", "the sum of squares is divided by E rounded up to 16", "one-line: norm",
         ("tl.div_rn(tl.sum(squares, 1), tl.maximum(E, 1) * 1.0)",
          "tl.div_rn(tl.sum(squares, 1), tl.cdiv(tl.maximum(E, 1), 16) * 16.0)")),
    _qkv("tail of E dropped", "what is left of E after whole steps takes no part in the product",
         "triton-lang/triton#621",
         (_LOOP, _LOOP.replace("range(0, E, BLOCK_E)", "range(0, tl.maximum(E // BLOCK_E, 1) * BLOCK_E, BLOCK_E)")),
         corner="weights not dense"),
    _qkv("bias dropped", "the bias is read and not added", "one-line: block", (_BIAS, _BIAS.replace("+=", "+= 0.0 *"))),
    _qkv("bias by column", "the bias is taken in the kernel's own order of columns, in which pairs are neighbours",
         "one-line: block", (_BIAS, _BIAS.replace("weight_row", "column"))),
    _qkv("unturned dims times 1 and 0", "what is not rotated passes as u * 1 - v * 0: NaN beside an infinity",
         "Dao-AILab/flash-attention#2374",
         (_CHOICE, "cos, sin = tl.where(mask, cos, 1.0), tl.where(mask, sin, 0.0)\n"
                   "    u, v = u * cos - v * sin, v * cos + u * sin"),
         corner="infinite bias in dims past R"),
    _qkv("one table for all sequences", "the batch stride of cos and sin is ignored: right for one sequence",
         "linkedin/Liger-Kernel#477",
         ("b * cos_stride_b + s * cos_stride_s", "s * cos_stride_s"),
         ("b * sin_stride_b + s * sin_stride_s", "s * sin_stride_s")),
    _qkv("q in the rows of the projection", "q is stored as if its rows still held k and v: they are (H + 2K) D apart",
         "flagos-ai/FlagGems#5235",
         ("(token * (num_heads * HEAD_DIM))[:, None]",
          "(token * ((num_heads + 2 * num_kv_heads) * HEAD_DIM))[:, None]")),
    _qkv("batch stride of x from its rows", "sequence b is looked for S rows further on, whatever the batch stride is",
         "Dao-AILab/flash-attention#818", ('"x_stride_b": x_BSE.stride(0)', '"x_stride_b": S * x_BSE.stride(1)'),
         corner="one token for all sequences"),
    _qkv("tokens past the end", "the mask of the last tile of tokens is missing where q is stored",
         "fla-org/flash-linear-attention#795",
         ("mask=exists[:, None] & (head < num_heads)[None, :]", "mask=(head < num_heads)[None, :]")),
    _qkv("products in tf32", "float32 is multiplied on tensor cores, which read 10 bits of it", "one-line: precision",
         ('qkv = tl.dot(w, tl.trans(a), qkv, input_precision="ieee")', "qkv = tl.dot(w, tl.trans(a), qkv)"),
         dtypes=("float32",)),
)  # fmt: skip
