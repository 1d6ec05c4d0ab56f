"""llama.cpp, by the library that REFLLM_LLAMA_LIBRARY names: right files hold, and bugs that are planted in a file are
named, in float32 and in the formats that the library has: of what its products read, float16, bfloat16 and int8. The
planted bugs are those of converters: llama.cpp is not ours to change."""

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import write_gguf
from harness import Bug, Checks, must_be_named, must_hold
from tiny import tiny_model

import refllm
from refllm import golden
from refllm.check import compare
from refllm.check.adapters.llama_library import LlamaLibrary, Settings
from refllm.check.candidates import open_candidate, record
from refllm.check.inputs import Inputs
from refllm.check.oracle import judge
from refllm.check.stacks import Opening
from refllm.errors import InputError
from refllm.storage.checkpoint import Checkpoint, save_checkpoint

LIBRARY = "REFLLM_LLAMA_LIBRARY"
CHECKS = Checks(
    "gguf", ("llama-tiny", "stablelm-tiny-parallel", "stablelm-tiny-sequential", "arcee-tiny"), ("float32",)
)
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""How the matrices of a file are stored."""
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def library() -> Path:
    assert LIBRARY in os.environ, f"{LIBRARY} names libllama.so of a build of llama.cpp"
    return Path(os.environ[LIBRARY])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The embedded checkpoint; of arcee without biases, which llama.cpp has not there."""

    def found(name: str) -> Path:
        source = golden.path(name)
        if name != "arcee-tiny":
            return source
        folder = tmp_path_factory.mktemp(name)
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mlp_bias": False, "attention_bias": False}))
        with Checkpoint.open(source) as checkpoint:
            tensors = {name: checkpoint.read(name) for name in checkpoint.names if not name.endswith("bias")}
            save_checkpoint(folder, tensors, "bfloat16")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, folder / file)
        return folder

    return found


pytestmark = pytest.mark.filterwarnings("ignore:.*factor=20")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_right_models_hold(
    checkpoint: str, dtype: str, kind: str, library: Path, folder_of: Any, tmp_path: Path
) -> None:
    folder = folder_of(checkpoint)
    file = write_gguf(folder, tmp_path / "m.gguf", kind)
    how = {"folder": folder, "library": library, "stress": True, "isolate": False}
    reports = must_hold(CHECKS, checkpoint, dtype, f"gguf:{file}", port=kind, **how)
    assert len(reports) == 5  # batches, padding, far positions and a cache as well
    assert any("reads its input" in str(habit) for habit in reports[0].habits) == (kind != "F32")
    assert max(tap.isolated.ratio for tap in reports[0].taps if tap.isolated) < 1.3  # as sharp as in float32


FILE_TYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ3_S": 26, "IQ4_NL": 25, "IQ4_XS": 30}
"""Names of llama.cpp's mixtures of formats -> `llama_ftype`."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    plain = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    folder = tmp_path_factory.mktemp("wide")
    tiny_model("LlamaForCausalLM", **sizes, **heads, **plain).save_pretrained(folder, dtype="float32")
    return folder


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_what_llama_cpp_quantises_itself_holds(kind: str, wide: Path, library: Path, tmp_path: Path) -> None:
    file = quantised(library, write_gguf(wide, tmp_path / "m.gguf"), tmp_path / "q.gguf", FILE_TYPES[kind])
    ids = np.random.default_rng(0).integers(0, 97, 48)
    (report,) = compare(wide, f"gguf:{file}", library=library, input_ids=ids, isolate=False)
    assert report.verdict == "holds", report.first_failure
    assert max(tap.isolated.ratio for tap in report.taps if tap.isolated) < 1.3
    assert report.format_error is not None


def quantised(library: Path, source: Path, file: Path, kind: int) -> Path:
    """The file that the library makes of another. kind: of `llama_ftype`, the second field of its settings."""
    calls = LlamaLibrary.open(library).calls
    calls.llama_model_quantize_default_params.restype = Settings
    calls.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Settings)]
    settings = calls.llama_model_quantize_default_params()
    ctypes.c_int.from_buffer(settings, 4).value = kind
    assert calls.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(settings)) == 0
    return file


def test_a_format_that_is_not_known_is_one_sentence(wide: Path, library: Path, tmp_path: Path) -> None:
    file = quantised(library, write_gguf(wide, tmp_path / "m.gguf"), tmp_path / "q.gguf", 3)
    with pytest.raises(InputError, match=r"q\.gguf: tensors are in Q4_1, and what .* read is not known here"):
        compare(wide, f"gguf:{file}", library=library, isolate=False)


def test_a_cache_in_float16_is_recognised_from_the_logits_alone(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is llama.cpp's default; queries and weights are rounded to float16 as well, to be multiplied by it."""
    from refllm.check.adapters import llama_library

    monkeypatch.setattr(llama_library, "_F32", llama_library._F16)
    folder = golden.path("llama-tiny")
    file, model = write_gguf(folder, tmp_path / "m.gguf"), refllm.load(folder, head="causal_lm", dtype="float32")
    candidate = open_candidate(Opening(f"gguf:{file}", folder, library=library))
    trace = record(candidate, model, Inputs(np.arange(3, 67)[None]))
    trace.taps = {"lm_head": trace.taps["lm_head"]}
    found = judge(model, trace, explain=True).explanation
    assert found is not None
    assert [cause.name for cause in found.causes] == ["attention by a cache in float16"]


def metadata(**changes: Any) -> dict[str, Any]:
    return {"metadata": {f"ARCH.{key}": value for key, value in changes.items()}}


def edited(edit: Callable[[Tensors], None]) -> dict[str, Any]:
    return {"edit": edit}


def swap(first: str, second: str) -> dict[str, Any]:
    def edit(tensors: Tensors) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return edited(edit)


def rows(name: str, order: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = order(tensors[name])

    return edited(edit)


LAYER = "model.layers.1."
BUGS = (
    Bug("rows of q and k as they are", {"rows_as_they_are": True}, ("self_attn.q_proj", "self_attn.k_proj")),
    Bug("gate and up swapped", swap(f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"), "1.mlp.gate_proj"),
    Bug(
        "k and v swapped",
        swap(f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight"),
        "1.self_attn.k_proj",
    ),
    Bug(
        "the two norms of a layer swapped",
        swap(f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"),
        "1.input_layernorm",
    ),
    Bug("o_proj transposed", rows(f"{LAYER}self_attn.o_proj.weight", lambda w: w.T.copy()), "1.self_attn.o_proj"),
    Bug(
        "heads of v in another order",
        rows(f"{LAYER}self_attn.v_proj.weight", lambda w: np.roll(w, 16, 0)),
        "1.self_attn.v_proj",
    ),
    Bug(
        "last row of down_proj zero",
        rows(f"{LAYER}mlp.down_proj.weight", lambda w: w * (np.arange(len(w)) < len(w) - 1)[:, None]),
        "1.mlp.down_proj",
    ),
    Bug("final norm times 1.01", rows("model.norm.weight", lambda w: w * np.float32(1.01)), "model.norm"),
    Bug("norm weight is one less", rows(f"{LAYER}input_layernorm.weight", lambda w: w - 1), "1.input_layernorm"),
    Bug("base of RoPE 1e6", metadata(**{"rope.freq_base": 1e6}), ("self_attn.q_rope", "self_attn.k_rope")),
    Bug("eps of the norms 1e-3", metadata(**{"attention.layer_norm_rms_epsilon": 1e-3}), "0.input_layernorm"),
    Bug("factors of llama3 left out", {"without": "rope_freqs"}, ("self_attn.q_rope", "self_attn.k_rope")),
    Bug(
        "bias of q left out",
        rows(f"{LAYER}self_attn.q_proj.bias", lambda b: b * 0),
        "1.self_attn.q_proj",
        "stablelm-tiny-parallel",
    ),
    Bug(
        "norms of the heads of q and k swapped",
        swap(f"{LAYER}self_attn.q_layernorm.norms.0.weight", f"{LAYER}self_attn.k_layernorm.norms.0.weight"),
        ("1.self_attn.q_layernorm", "1.self_attn.k_layernorm"),
        "stablelm-tiny-parallel",
    ),
    Bug(
        "a rotation of all dims",
        metadata(**{"rope.dimension_count": 80}),
        ("self_attn.q_rope", "self_attn.k_rope"),
        "stablelm-tiny-sequential",
    ),
    Bug(
        "yarn left out",
        metadata(**{"rope.scaling.factor": 1.0}),
        ("self_attn.q_rope", "self_attn.k_rope"),
        "arcee-tiny",
    ),
)


_IN_TURN = [(bug, KINDS[1:][i % (len(KINDS) - 1)]) for i, bug in enumerate(BUGS)]


@pytest.mark.parametrize(("bug", "kind"), [*((bug, "F32") for bug in BUGS), *_IN_TURN], ids=str)
def test_planted_bugs_are_named(bug: Bug, kind: str, library: Path, folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of(bug.checkpoint)
    file = write_gguf(folder, tmp_path / "m.gguf", kind, **bug.plant)
    how = {"folder": folder, "library": library, "isolate": False}
    report = must_be_named(CHECKS, bug, "float32", f"gguf:{file}", port=kind, **how)
    of_a_tensor = [note for note in report.notes if "is not the checkpoint's" in note]
    assert bool(of_a_tensor) == ("edit" in bug.plant or "rows_as_they_are" in bug.plant)


def test_what_is_no_library_is_one_sentence(tmp_path: Path) -> None:
    file = write_gguf(golden.path("llama-tiny"), tmp_path / "m.gguf")
    (tmp_path / "libllama.so").write_bytes(b"no library")
    for given, said in (
        (None, "needs llama.cpp's shared library, --library F"),
        (tmp_path / "none.so", "there is no such file"),
        (tmp_path / "libllama.so", "it cannot be loaded"),
        (Path(np._core._multiarray_umath.__file__), "it has not what llama.cpp's library has"),
    ):
        with pytest.raises(InputError, match=said):
            compare(golden.path("llama-tiny"), f"gguf:{file}", dtype="float32", library=given, isolate=False)


def test_a_file_of_another_model_is_one_sentence(library: Path, tmp_path: Path) -> None:
    file = write_gguf(golden.path("llama-tiny"), tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"general\.architecture is llama, the checkpoint .* has stablelm"):
        compare(golden.path("stablelm-tiny-parallel"), f"gguf:{file}", library=library, isolate=False)
