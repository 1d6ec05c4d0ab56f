"""What a caller leaves out: a default is part of the interface, and a change of one is a change for everybody."""

import dataclasses
import inspect
from importlib import import_module
from typing import Any

import pytest

LOADING = {"dtype": "float32", "policy": None}
WHERE = {"backend": "numpy", "device": None}
SEARCH = {"max_examples": 100, "seed": 0, "time_limit": 10.0}
CHECKS: dict[str, Any] = {"bounds": True, "overflow": True, "races": True, "poison": True,
                          "masked": "nan", "tf32": True}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "refllm:load": {"head": None, **LOADING, **WHERE, "low_memory": False, "page": None},
    "refllm:pipeline": {
        "task": "text-generation", "model": None, "tokenizer": None, **LOADING, **WHERE, "low_memory": False,
    },
    "refllm.check:compare": {
        "candidate": "transformers", "dtype": None, "policy": None, "attention": "eager", "input_ids": None,
        "attention_mask": None, "position_ids": None, "prompt": None, "stress": False, "isolate": True,
        "time_limit": None, "splits": 1, "tf32": False, "names": None, "library": None, "trace": None, "layout": "",
        "against": None, "weights": None, "page": None, "explain": None, "backward": False, "frozen": (),
    },
    "refllm.check:check_logprobs": {"dtype": None, "policy": None},
    "refllm.check:check_op": {
        "dtype": "bfloat16", "policy": None, "device": "cpu", "arrays": "torch", "calls": None, "level": "contract",
        **SEARCH, "seconds": None, "isolate": True, "shrink": True, "deep": True, "keep_going": False, "bitwise": False,
        "without": (), "sizes": (), "convention": "", "configs": "first", "repro": None, "backward": False,
    },
    "refllm.opcheck.audit:audit": {
        "operator": None, "test": None, "form": None, "dtype": None, **SEARCH, "known_first": False,
    },
    "refllm.opcheck.report:show_report": {"with_repro": False},
    "refllm.check.run:Settings": {
        "candidate": "transformers", "dtypes": (), "attention": "eager", "policy": None, "stress": False,
        "seconds": None, "isolate": True, "splits": 1, "tf32": False, "names": None, "library": None,
        "layout": "", "against": None, "weights": None, "explain": None, "backward": False, "frozen": (),
        "layers": None, "last": None, "work": None,
    },
    "refllm.forward.model:Model.from_pretrained": {
        **LOADING, **WHERE, "low_memory": False, "progress": None, "seed": 0,
    },
    "refllm.forward.model:Model.from_config": {"seed": 0, **LOADING},
    "refllm.kernels.models.fast_model:FastModel.from_pretrained": {
        **LOADING, **WHERE, "low_memory": False, "progress": None, "seed": 0,
    },
    "refllm.kernels.models.fast_model:FastModel.fresh": {
        "seed": 0, "dtype": "float32", "backend": "torch", "device": None,
    },
    "refllm.kernels:cuda_stand_in": {"target": "sm_90"},
    "refllm.kernels:interpreted": {**CHECKS, "configs": "first"},
    "refllm.kernels:patch": {"backend": None, "fuse_qkv": False},
    "refllm.kernels.verify:assert_meets_contract": {"limit": None},
    "refllm.strategies:Array": {
        "values": "normal", "scale": 1.0, "mean": 0.0, "seed": 0, "planted": (), "layout": "dense",
    },
    "refllm.strategies:corners": {"dtype": "bfloat16", "policy": "fused"},
    "refllm.strategies:families": {"policy": "fused"},
    "refllm.text.template_process:Limits": {
        "cpu_seconds": 1.0, "wall_seconds": 10.0, "memory": 400_000_000, "text": 64_000_000,
    },
    "refllm.text.chat_template:render": {
        "tools": None, "documents": None, "add_generation_prompt": False, "continue_final_message": False,
    },
    "refllm.check.inputs:Inputs": {
        "attention_mask": None, "position_ids": None, "chunks": (), "embeds_scale": None, "label": "tokens",
        "until": "", "embeds": None, "learning": None,
    },
    "refllm.accuracy.measure:Measure": {"nonfinite_at": (), "misrounded": 0.0, "scatter": 0.0, "honest": 0.0},
    "refllm.golden.verify:Verified": {"cases": 0, "ratio": 0.0, "largest": 0.0, "worst": ""},
    "refllm.kernels.calls:call": {"bias": True},
    "refllm.kernels.launch:Launch": {
        "num_warps": 4, "num_stages": 3, "tensor_cores": False, "async_copies": False, "wide_loads": False,
        "wide_stores": False, "narrow": "",
    },
}  # fmt: skip
"""module:name -> what stands for each argument that is not given; functions and lists made anew are left out."""


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_not_given_is_what_it_was(name: str) -> None:
    if "kernels" in name or "opcheck" in name or "strategies" in name:
        for package in ("torch", "triton", "hypothesis"):
            pytest.importorskip(package)
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    made = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    anew = {field.name for field in made if field.default_factory is not dataclasses.MISSING}
    plain = {name: value for name, value in given.items() if name not in anew and not callable(value)}
    assert {name: plain.get(name) for name in DEFAULTS[name]} == DEFAULTS[name]
    assert set(plain) == set(DEFAULTS[name])
