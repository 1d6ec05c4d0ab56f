"""llama.cpp's shared library by ctypes: a model, a context with a callback, one pass.

Its structs change from version to version, so none is written down here but the batch. Those of the settings are taken
from the library's own `*_default_params`, and the few fields that are set are found by the defaults around them
(`Landmarks`); where these are not as in any version that is known, that is said and nothing is set.
"""

import ctypes
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from refllm.errors import InputError
from refllm.parallel import threads

_ROOM = 512
"""Bytes for a struct of settings: more than any version has. What is returned and passed by value may be larger."""
_LARGE = 1 << 28  # bytes of a file
_F32, _F16 = 0, 1  # numbers of ggml's types
_STEP = 256  # llama.cpp rounds the length of a cache up to multiples of it
_FIRST = ("libggml-base", "libggml-cpu", "libggml", "ggml-base", "ggml-cpu", "ggml")
_FORMATS: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}
_EVAL = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_NE, _NB, _DIMS = 16, 48, 4
"""Where a tensor has its lengths and strides, and how many: since 2023 behind its type and its buffer."""


class Settings(ctypes.Structure):
    """A struct of settings, of whatever version."""

    _fields_ = [("bytes", ctypes.c_ubyte * _ROOM)]


class Batch(ctypes.Structure):
    """llama_batch, filled by llama_batch_init."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


@dataclass(frozen=True)
class Landmarks:
    """Byte offsets of what is set in llama_context_params.

    callback: cb_eval and its user data. types: type_k and type_v. flash: flash_attn_type; None where flash attention is
    a flag that is off by default.
    """

    callback: int
    types: int
    flash: int | None

    @classmethod
    def find(cls, defaults: bytes, library: Path) -> Self:
        """The landmarks in the defaults of a library.

        They begin with n_ctx 512, n_batch 2048, n_ubatch 512, n_seq_max 1. Three or four enums of -1 (unspecified; the
        fourth is flash attention, automatic) stand before two floats 0 and one -1 (yarn_ext_factor). The callback and
        its data, both null, stand before the types of keys and values, float16 both. Raises InputError where that is
        not so, or so at two places.
        """
        if struct.unpack_from("<4I", defaults) == (512, 2048, 512, 1):
            enums = [
                (at, count)
                for at in range(16, 128, 4)
                for count in (3, 4)
                if defaults[at : at + 4 * count + 12] == struct.pack(f"<{count}i3f", *[-1] * count, 0.0, 0.0, -1.0)
                and defaults[at - 4 : at] != struct.pack("<i", -1)
            ]
            after = enums[0][0] + 4 * enums[0][1] + 12 if len(enums) == 1 else _ROOM
            nulls = struct.pack("<QQii", 0, 0, _F16, _F16)
            places = [at for at in range(-(-after // 8) * 8, after + 64, 8) if defaults[at : at + 24] == nulls]
            if len(enums) == 1 and len(places) == 1:
                at, count = enums[0]
                return cls(places[0], places[0] + 16, at + 12 if count == 4 else None)
        raise InputError(
            f"--library {library}: its llama_context_params are laid out as in no version of llama.cpp that is known, "
            "so nothing can be set in them; use a build of the years 2024 to 2026"
        )


@dataclass(frozen=True)
class Seen:
    """A node of the graph that was computed: its name, its operator, and a copy of its value, four axes, slowest
    first."""

    name: str
    operator: str
    value: np.ndarray


class LlamaLibrary:
    """The library at a path, loaded once."""

    def __init__(self, path: Path, calls: Any) -> None:
        """Use `LlamaLibrary.open`."""
        self.path, self.calls = path, calls
        self.said: list[str] = []
        self._log = _LOG(lambda level, text, _: self.said.append((text or b"").decode(errors="replace")))
        calls.llama_log_set(self._log, None)
        calls.llama_backend_init()
        defaults = bytes(calls.llama_context_default_params().bytes)
        self.landmarks = Landmarks.find(defaults, path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises InputError for what is no library of llama.cpp."""
        path = path.absolute()  # a name alone is looked for elsewhere
        if not path.is_file():
            raise InputError(f"--library {path}: there is no such file; expected llama.cpp's libllama.so")
        try:
            for name in _FIRST:  # where the library does not say that they lie beside it
                for beside in sorted(path.parent.glob(f"{name}{path.suffix}")):
                    ctypes.CDLL(str(beside), mode=ctypes.RTLD_GLOBAL)
            calls = ctypes.CDLL(str(path))
        except OSError as error:
            raise InputError(f"--library {path}: it cannot be loaded: {error}") from None
        try:
            return cls(path, _declared(calls))
        except AttributeError as error:
            raise InputError(
                f"--library {path}: it has not what llama.cpp's library has ({error}); expected libllama since 2025"
            ) from None

    def load(self, path: Path) -> "LlamaModel":
        """Raises InputError, with what the library said, for a file that it does not load."""
        self.said.clear()
        pointer = self.calls.llama_model_load_from_file(str(path).encode(), self.calls.llama_model_default_params())
        if not pointer:
            raise InputError(f"{path}: llama.cpp does not load it: {self.last_words()}")
        # Its threads wait for each other by spinning, node by node: with little to do, one is faster than several.
        count = threads() if path.stat().st_size > _LARGE else 1
        return LlamaModel(self, pointer, count)

    def last_words(self) -> str:
        """What it said last, in one line."""
        lines = [line.strip() for line in "".join(self.said).splitlines() if re.search("error|failed", line)]
        return lines[0] if lines else "it does not say why"

    def copied(self, tensor: int) -> np.ndarray:
        """The value of a tensor, wherever it lies."""
        calls = self.calls
        lengths = (ctypes.c_int64 * _DIMS).from_address(tensor + _NE)
        strides = (ctypes.c_size_t * _DIMS).from_address(tensor + _NB)
        kind = calls.ggml_type_name(ctypes.c_int.from_address(tensor).value).decode()
        if int(np.prod(list(lengths))) != calls.ggml_nelements(tensor) or kind not in _FORMATS:
            raise InputError(f"--library {self.path}: a tensor is laid out as in no version that is known ({kind})")
        raw = np.empty(calls.ggml_nbytes(tensor), np.uint8)
        calls.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.nbytes)
        shape, steps = tuple(lengths)[::-1], tuple(strides)[::-1]
        flat: np.ndarray = raw.view(_FORMATS[kind])
        return np.lib.stride_tricks.as_strided(flat, shape, steps).astype(np.float32)


def _declared(calls: Any) -> Any:
    """The library with the types of what is called. Raises AttributeError for what it has not."""
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (Settings, []),
        "llama_context_default_params": (Settings, []),
        "llama_model_load_from_file": (pointer, [text, Settings]),
        "llama_init_from_model": (pointer, [pointer, Settings]),
        "llama_free": (None, [pointer]),
        "llama_set_n_threads": (None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        "llama_batch_init": (Batch, [ctypes.c_int32] * 3),
        "llama_batch_free": (None, [Batch]),
        "llama_decode": (ctypes.c_int32, [pointer, Batch]),
        "ggml_get_name": (text, [pointer]),
        "ggml_op_desc": (text, [pointer]),
        "ggml_type_name": (text, [ctypes.c_int]),
        "ggml_nelements": (ctypes.c_int64, [pointer]),
        "ggml_nbytes": (ctypes.c_size_t, [pointer]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(calls, name)
        function.restype, function.argtypes = result, arguments
    return calls


class LlamaModel:
    """A loaded file."""

    def __init__(self, library: LlamaLibrary, pointer: int, threads: int) -> None:
        self.library, self.pointer, self.threads = library, pointer, threads

    @contextmanager
    def context(self, rows: int, tokens: int) -> "Iterator[LlamaContext]":
        """An empty cache in float32 for so many rows of so many tokens, and what runs a pass."""
        calls, at = self.library.calls, self.library.landmarks
        settings = calls.llama_context_default_params()
        data = bytearray(bytes(settings.bytes))
        length = -(-tokens // _STEP) * _STEP
        context = LlamaContext(self.library)
        struct.pack_into("<4I", data, 0, rows * length, max(tokens, 32), max(tokens, 32), rows)
        struct.pack_into("<Q", data, at.callback, ctypes.cast(context.callback, ctypes.c_void_p).value or 0)
        struct.pack_into("<2i", data, at.types, _F32, _F32)
        if at.flash is not None:
            struct.pack_into("<i", data, at.flash, 0)
        settings.bytes[:] = data
        self.library.said.clear()
        context.pointer = calls.llama_init_from_model(self.pointer, settings)
        if not context.pointer:
            raise InputError(f"llama.cpp makes no context: {self.library.last_words()}")
        calls.llama_set_n_threads(context.pointer, self.threads, self.threads)
        try:
            yield context
        finally:
            calls.llama_free(context.pointer)


class LlamaContext:
    """A cache, and a callback that hands nodes on as they are computed."""

    def __init__(self, library: LlamaLibrary) -> None:
        self._library, self.pointer = library, 0
        self._see: Callable[[Seen], None] = lambda node: None
        self._error: BaseException | None = None
        self.callback = _EVAL(self._called)

    def decode(self, row: int, ids: np.ndarray, positions: np.ndarray, see: Callable[[Seen], None]) -> None:
        """One pass over tokens of a row, after those that it had before. see: gets every node that has a name of its
        own. Raises InputError where the library fails, and what `see` raises."""
        calls, self._see, self._error = self._library.calls, see, None
        batch = calls.llama_batch_init(len(ids), 0, 1)
        if not batch.token or batch.embd:
            raise InputError(
                f"--library {self._library.path}: its llama_batch is laid out as in no version that is known"
            )
        for i, (token, position) in enumerate(zip(ids.tolist(), positions.tolist(), strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        batch.n_tokens = len(ids)
        try:
            failed = calls.llama_decode(self.pointer, batch)
        finally:
            calls.llama_batch_free(batch)
        if self._error is not None:
            raise self._error
        if failed:
            raise InputError(f"llama.cpp fails to decode (code {failed}): {self._library.last_words()}")

    def _called(self, tensor: int, ask: bool, _: Any) -> bool:
        """ggml_backend_sched_eval_callback: whether a node is wanted, then the node."""
        if ask:
            return True
        try:
            calls = self._library.calls
            name, operator = calls.ggml_get_name(tensor).decode(), calls.ggml_op_desc(tensor).decode()
            self._see(Seen(name, operator, self._library.copied(tensor)))
        except BaseException as error:  # nothing may be raised through the library
            self._error = error
            return False
        return True
