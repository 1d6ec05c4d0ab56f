"""Goldens: every backend holds, every kind of damage is named in one sentence, a wrong operator is found."""

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refllm import golden, ops
from refllm.commands import cli
from refllm.errors import InputError
from refllm.golden import cases, exact, make_vectors, manifest, model_cases, run, store, verify
from refllm.golden.cases import OperatorCase
from refllm.golden.exact import Golden
from refllm.golden.model_cases import ModelCase
from refllm.kernels import OPERATORS
from refllm.models import families
from refllm.precision import rounding

FOLDER = golden.FOLDER
MANIFEST = manifest.read_manifest(FOLDER)
MEGABYTE = 1_000_000
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refllm", "golden", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return command


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the manifest and the vectors, to be damaged."""
    shutil.copytree(FOLDER / store.VECTORS, tmp_path / store.VECTORS)
    shutil.copy(FOLDER / manifest.MANIFEST, tmp_path)
    return tmp_path


def of(name: str) -> Golden:
    (one,) = verify.goldens_of(FOLDER, MANIFEST, [name])
    return one


# ------------------------------------------------------------------------------------------------------- what there is


def test_every_operator_family_head_and_rope_type_has_goldens() -> None:
    groups = cases.groups()
    assert list(groups) == [*OPERATORS, *model_cases.families_in_order()]
    assert all(len(groups[operator]) >= 3 for operator in OPERATORS)
    models = [case for case in cases.all_cases().values() if isinstance(case, ModelCase)]
    assert {case.model for case in models} >= set(golden.checkpoints())
    for family in model_cases.families_in_order():
        heads = {cls.head for cls in families.CLASSES.values() if cls.config_class.model_type == family} - {"base"}
        assert {case.head for case in models if case.group == family} == heads
        assert any(case.chunks for case in models if case.group == family)
    with cases.quiet():
        configs = [model_cases.config_of(case.model) for case in models]
    found = {config.rope_parameters["rope_type"] for config in configs}
    assert found == {"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}
    assert {config.rotary_dim / config.head_dim for config in configs} >= {0.25, 0.5, 1.0}


def test_inputs_lie_on_every_grid_that_they_serve() -> None:
    goldens = list(verify.goldens_of(FOLDER, MANIFEST))
    assert len(goldens) == len(MANIFEST["cases"])
    for one in goldens:
        floats = [x for x in [*one.inputs.values(), *one.weights.values()] if x.dtype == np.float32]
        for dtype in one.case.dtypes if floats else ():
            for x in floats:
                np.testing.assert_array_equal(rounding(dtype)(x), x, err_msg=f"{one.case.name} {dtype}")


def test_goldens_follow_from_their_names() -> None:
    for name in ("attention/masked-nan", "cross_entropy/none"):
        case = cases.all_cases()[name]
        assert isinstance(case, OperatorCase)
        drawn = exact.compute(case).inputs
        assert drawn.keys() == of(name).inputs.keys()
        for key, x in of(name).inputs.items():
            np.testing.assert_array_equal(x, drawn[key])
    one = of("arcee/question-answering")
    assert isinstance(one.case, ModelCase)
    drawn_weights = exact.small_weights(one.case)
    assert drawn_weights.keys() == one.weights.keys()
    assert all(np.array_equal(drawn_weights[name], x) for name, x in one.weights.items())


def nearly(new: np.ndarray, old: np.ndarray, tolerance: float) -> bool:
    return new.shape == old.shape and np.allclose(new, old, rtol=tolerance, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*is used, although", "ignore:.*positions reach beyond")
@pytest.mark.parametrize("group", sorted({name.split("/")[0] for name in MANIFEST["cases"]}))
def test_every_golden_and_its_sigma_are_made_again(group: str) -> None:
    """As `golden make` would: what is on disk is what the definitions and the prediction say today."""
    goldens = [one for one in verify.goldens_of(FOLDER, MANIFEST) if one.case.name.split("/")[0] == group]
    assert goldens
    for old in goldens:
        new = exact.compute(old.case)
        assert new.exact.keys() == old.exact.keys(), old.case.name
        assert [n for n in old.exact if not nearly(new.exact[n], old.exact[n], 1e-9)] == [], old.case.name
        assert new.sigma.keys() == old.sigma.keys(), old.case.name
        for which, sigma in old.sigma.items():
            assert [n for n in sigma if not nearly(new.sigma[which][n], sigma[n], 1e-3)] == [], (old.case.name, which)


def test_nothing_verified_has_no_error() -> None:
    done = verify.verify(iter([]), "numpy", "bfloat16")
    assert (done.cases, done.ratio, done.largest, done.worst, done.findings) == (0, 0.0, 0.0, "", [])


def test_sizes() -> None:
    everything = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    vectors = sum(f.stat().st_size for f in (FOLDER / store.VECTORS).iterdir())
    assert everything < 20 * MEGABYTE
    assert vectors < 7 * MEGABYTE


def test_a_file_written_again_is_the_same_bytes(tmp_path: Path) -> None:
    for group in ("relu2", "helium"):
        store.write(tmp_path, group, list(store.load(FOLDER, MANIFEST, group).values()))
        written = (tmp_path / store.VECTORS / f"{group}.safetensors").read_bytes()
        assert written == (FOLDER / store.VECTORS / f"{group}.safetensors").read_bytes()


def test_readme_program_needs_no_refllm(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (FOLDER / "README.md").read_text()
    program, stated = re.findall(r"```python\n(.*?)```\n+    (rms error.*?)\n", readme, re.DOTALL)[0]
    assert "refllm" not in program
    monkeypatch.chdir(FOLDER.parent)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(program, {})
    found, expected = ([float(x) for x in re.findall(r"\d+\.\d+", text)] for text in (shown.getvalue(), stated))
    assert found == pytest.approx(expected, rel=0.1)
    assert f"{len(MANIFEST['cases'])} goldens" in readme


# ------------------------------------------------------------------------------------------------------------- holding


def test_the_reference_gives_every_golden_again(refllm: Run) -> None:
    code, out, err = refllm("verify")
    assert code == 0, out + err
    assert "every file is as the manifest says, and every golden holds" in out
    assert re.search(rf"numpy +float64 +{len(cases.all_cases())} ", out)
    assert not err


def test_the_manifest_tells_the_weights_of_every_small_model() -> None:
    small = [name for name, entry in MANIFEST["cases"].items() if entry.get("model", "").endswith("-small")]
    assert len(small) > 3
    for one in map(of, small):
        assert store.weights_hash(one) == one.about["weights_sha256"], one.case.name
        name, weight = next(iter(one.weights.items()))
        one.weights = {**one.weights, name: weight[::-1]}
        assert store.weights_hash(one) != one.about["weights_sha256"], one.case.name


def test_a_golden_that_cannot_be_computed_is_a_finding_and_the_next_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = run.evaluate

    def broken(one: Golden, *rest: Any) -> Any:
        if one.case.name == "rms_norm/plain":
            raise ZeroDivisionError("of a kernel")
        return evaluate(one, *rest)

    monkeypatch.setattr(run, "evaluate", broken)
    done = verify.verify(iter([of("rms_norm/plain"), of("swiglu/plain")]), "numpy", "bfloat16")
    assert done.cases == 2
    assert [(f.name, f.problem) for f in done.findings] == [
        ("rms_norm/plain", "numpy, bfloat16: ZeroDivisionError: of a kernel")
    ]


def test_a_golden_that_is_not_of_the_dtype_ends_nothing() -> None:
    done = verify.verify(iter([of("rms_norm/float32"), of("swiglu/plain")]), "numpy", "bfloat16")
    assert (done.cases, done.findings) == (1, [])


def test_a_result_of_another_shape_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda gate, up, **how: right(gate, up, **how)[:-1])
    done = verify.verify(iter([of("swiglu/plain")]), "numpy", "bfloat16")
    assert [f.problem for f in done.findings] == ["numpy, bfloat16, output y: shape [4, 77], expected [5, 77]"]
    assert (done.cases, done.largest) == (1, 0.0)


def test_figures_of_float64_count_what_float64_allows() -> None:
    one = of("rms_norm/plain")
    one.exact["y"][2, 5] += 3 * verify.FLOAT64_SIGMA * one.sigma["float32.fused"]["y"][2, 5]
    done = verify.verify(iter([one]), "numpy", "float64")
    assert done.ratio == done.largest == pytest.approx(3, rel=0.1)
    assert done.worst == "rms_norm/plain y"


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_torch_holds(dtype: str) -> None:
    done = verify.verify(verify.goldens_of(FOLDER, MANIFEST), "torch", dtype)
    assert not done.findings
    assert done.cases == sum(dtype in case.dtypes for case in cases.all_cases().values())
    assert 0.8 < done.ratio < 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("group", cases.groups())
def test_triton_holds(group: str, dtype: str) -> None:
    """Every golden that `refllm golden verify --backend triton` runs, in parts that test processes can share."""
    done = verify.verify(verify.goldens_of(FOLDER, MANIFEST, [group]), "triton", dtype)
    assert not done.findings
    assert done.cases == sum(dtype in case.dtypes for case in cases.groups()[group])


def test_the_reference_is_within_the_predicted_error_of_every_golden() -> None:
    """Also what the manifest says of it, which raises limits where it is above 1."""
    ratios = [
        ratio
        for name, entry in MANIFEST["cases"].items()
        for dtype, outputs in entry["reference"].items()
        for output, (ratio, largest) in outputs.items()
        if np.prod(entry["outputs"][output]) > 32
    ]
    assert len(ratios) > 300
    assert max(ratios) < 1.5
    assert 0.7 < np.median(ratios) < 1.1


# ------------------------------------------------------------------------------------------------------------- witness


def test_the_witness_agrees_with_every_golden() -> None:
    for name, entry in MANIFEST["cases"].items():
        known = set(entry["witness"]["max_abs"])
        assert set(entry["outputs"]) - known <= {n for n in entry["outputs"] if n.endswith("_rope")}, name
        for output, sigma in entry["witness"]["max_sigma_float32"].items():
            # Transformers takes the loss of a model in float32, whatever the dtype of its logits.
            limit = 8.0 if output == "loss" and entry["kind"] == "model" else 1e-5
            assert sigma < limit, (name, output)


@pytest.mark.parametrize(
    "name",
    [
        "norm_rope/rms-interleaved-partial",
        "norm_rope/layer-half-split-partial",
        "attention/no-keys",
        "layer_norm/bias",
        "add_rms_norm/plain",
        "add_layer_norm/no-bias",
        "rms_norm_qkv_rope/bias",
        "decode_attention/eight-tokens",
        "linear_cross_entropy/none",
        "llama/rope-longrope",
        "stablelm/tiny-parallel-packed",
        "helium/tiny-prompt",
    ],
)
def test_the_witness_asked_again_says_the_same(name: str) -> None:
    from refllm.golden.witness import witness

    one = of(name)
    with cases.quiet():
        who, values = witness(one)
    assert who == one.about["witness"]["who"]
    assert values
    for output, y in values.items():
        inside, _ = make_vectors.distance_in_sigma(
            y, one.exact[output], one.sigma["float32.fused"][output], make_vectors.float64_bound(one, output)
        )
        assert inside, output


def test_a_witness_that_disagrees_would_show() -> None:
    one = of("attention/aligned-at-the-end")
    small, large = (make_vectors.difference(one, "o", one.exact["o"] + error)[1] for error in (1e-15, 1e-3))
    assert small < 1e-5
    assert large > 1000


# -------------------------------------------------------------------------------------------------------------- damage


def one_finding(refllm: Run, folder: Path, *names: str) -> str:
    """The sentence about the only finding, after checking that the exit code is 1."""
    code, out, err = refllm("verify", *names, "--dtype", "float64", "--folder", folder)
    assert code == 1, out + err
    sentences = [line for line in out.splitlines() if str(folder) in line]
    assert len(sentences) == 1, out
    assert "fails: 1 files or cases are not as the manifest says" in out
    return sentences[0]


def test_a_changed_byte_is_named(copy: Path, refllm: Run) -> None:
    path = copy / store.VECTORS / "swiglu.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    sentence = one_finding(refllm, copy)
    assert sentence.startswith(f"{path}: changed; its sha256 is ")
    assert MANIFEST["files"]["vectors/swiglu.safetensors"]["sha256"][:16] in sentence


def test_a_missing_and_an_extra_file_are_named(copy: Path, refllm: Run) -> None:
    path = copy / store.VECTORS / "rope.safetensors"
    path.rename(path.with_name("rope2.safetensors"))
    assert refllm("verify", "--dtype", "float64", "--folder", copy, "--json", copy / "found.json")[0] == 1
    files = json.loads((copy / "found.json").read_text())["files"]
    size = MANIFEST["files"]["vectors/rope.safetensors"]["bytes"]
    assert [f["problem"] for f in files] == [
        f"{path}: missing; the manifest lists it with {size} bytes",
        f"{path.with_name('rope2.safetensors')}: not in the manifest; remove it, or make it again with: "
        "refllm golden make",
    ]
    assert refllm("verify", "attention", "--dtype", "float64", "--folder", copy)[0] == 0  # which is not concerned


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
    """Changes the manifest. seal: and its hash, as if it had been written so."""
    path = folder / manifest.MANIFEST
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(manifest.sealed(told) if seal else told))


def test_another_format_is_wrong_use(copy: Path, refllm: Run) -> None:
    edit(copy, lambda told: told.update(format="refllm golden 2"), seal=False)
    for command in ("verify", "show"):
        code, out, err = refllm(command, "--folder", copy)
        assert code == 2
        assert not out
        assert err == (
            f"refllm: {copy / manifest.MANIFEST}: its format is 'refllm golden 2', this refllm reads "
            "'refllm golden 1'; make it again with: refllm golden make\n"
        )


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 3}'])
def test_a_manifest_that_is_none_is_wrong_use(copy: Path, refllm: Run, content: str) -> None:
    (copy / manifest.MANIFEST).write_text(content)
    code, out, err = refllm("verify", "--folder", copy)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


def every_entry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda told: [entry.update(values) for entry in told["cases"].values()]


def generous(told: dict[str, Any]) -> None:
    """The ratios that limits are multiplied by become a million."""
    for entry in told["cases"].values():
        for outputs in entry["reference"].values():
            outputs.update({name: [1e6, 1e6] for name in outputs})


@pytest.mark.parametrize(
    "change",
    [generous, every_entry(versions={}), every_entry(sigma=[]), every_entry(what="")],
    ids=["reference", "versions", "sigma", "what"],
)
def test_a_changed_manifest_is_named_and_nothing_counts_that_it_says(
    copy: Path, refllm: Run, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit(copy, change, seal=False)
    sentence = one_finding(refllm, copy, "swiglu")
    assert sentence.startswith(f"{copy / manifest.MANIFEST}: changed; the sha256 of its content is ")
    code, out, _ = refllm("verify", "--dtype", "bfloat16", "--folder", copy, "--json", "-")
    told = json.loads(out)
    assert (told["schema"], told["verdict"]) == (2, "fails")
    (result,) = told["results"]
    assert (code, result["cases"]) == (1, 0)
    code, out, err = refllm("make", "relu2", "--folder", copy, "--yes")
    assert (code, out) == (2, "")
    assert "restore it, or make all goldens again" in err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda told: told.pop("cases"), "cases is missing"),
        (lambda told: told.update(cases=[]), "cases cannot be []"),
        (lambda told: told["cases"]["relu2/plain"].pop("seed"), "relu2/plain: seed is missing"),
        (lambda told: told["cases"].update({"relu2/plain": 3}), "relu2/plain: expected names and values, found 3"),
        (every_entry(witness={}), "rms_norm/plain: witness: who is missing"),
        (every_entry(reference={}), "rms_norm/plain: reference bfloat16: expected names and values, found null"),
        (every_entry(kind="tensor"), "rms_norm/plain: its kind is 'tensor', expected operator or model"),
        (lambda told: told["files"]["vectors/rope.safetensors"].pop("bytes"), "rope.safetensors: bytes is missing"),
    ],
)
def test_a_manifest_that_lacks_something_is_wrong_use(
    copy: Path, refllm: Run, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    edit(copy, change, seal=False)
    for command in ("verify", "show"):
        code, out, err = refllm(command, "--folder", copy)
        assert (code, out) == (2, "")
        assert err.startswith(f"refllm: {copy / manifest.MANIFEST}: ")
        assert sentence in err
        assert len(err.splitlines()) == 1


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_PACKAGES", ("numpy", "no-such-package"))
    assert {**manifest.versions(), "refllm": ""} == {
        "refllm": "", "numpy": np.__version__, "no-such-package": "not installed",
    }  # fmt: skip


def test_other_versions_are_named_and_what_holds_holds(copy: Path, refllm: Run) -> None:
    assert not manifest.other_versions({"cases": {"a": {"versions": manifest.versions()}}})

    def by_others(told: dict[str, Any]) -> None:
        for entry in told["cases"].values():
            entry["versions"] = manifest.versions()
        told["cases"]["relu2/plain"]["versions"] = manifest.versions() | {"numpy": "1.2.3", "torch": "2.1+rocm"}

    edit(copy, by_others)
    code, out, _ = refllm("verify", "relu2", "--folder", copy)
    assert code == 0
    here = manifest.versions()["numpy"]
    assert f"made with numpy 1.2.3 (here {here}), torch 2.1+rocm (here " in out


@pytest.mark.parametrize(
    ("values", "sentence"),
    [({"dtypes": ["float32"]}, "it is told as 'gates"), ({"what": ""}, "it is told as ''")],
)
def test_a_manifest_that_tells_of_another_case_is_named(
    copy: Path, refllm: Run, values: dict[str, Any], sentence: str
) -> None:
    edit(copy, lambda told: told["cases"]["swiglu/plain"].update(values))
    assert f"{copy / manifest.MANIFEST}: swiglu/plain: {sentence}" in one_finding(refllm, copy)


def test_sigmas_are_those_that_the_manifest_lists(copy: Path, refllm: Run) -> None:
    edit(copy, lambda told: told["cases"]["swiglu/plain"].update(sigma=[]))
    code, _, err = refllm("verify", "swiglu", "--folder", copy)
    assert code == 2
    assert "swiglu/plain has the sigma of ['bfloat16.fused'" in err


@pytest.mark.parametrize(
    ("name", "key", "value", "sentence"),
    [
        ("helium/tiny-cache", "config_hash", "0123", "made with config 0123, that of helium-tiny is now "),
        ("llama/rope-yarn", "config_hash", "0123", "made with config 0123, that of llama-yarn is now "),
        (
            "arcee/tiny-packed",
            "weights_sha256",
            "f" * 64,
            "made with weights ffffffffffffffff..., those of arcee-tiny",
        ),
        ("rms_norm/plain", "seed", 7, "its seed is 7, expected "),
    ],
)
def test_another_config_weight_or_seed_is_named(
    copy: Path, refllm: Run, name: str, key: str, value: Any, sentence: str
) -> None:
    edit(copy, lambda told: told["cases"][name].update({key: value}))
    assert one_finding(refllm, copy).startswith(f"{copy / manifest.MANIFEST}: {name}: {sentence}")


def test_a_case_missing_or_unknown_is_named(copy: Path, refllm: Run) -> None:
    edit(copy, lambda told: told["cases"].pop("relu2/plain"))
    assert "relu2/plain is missing; make it again with: refllm golden make relu2/plain" in one_finding(refllm, copy)
    edit(copy, lambda m: m["cases"].update({"relu2/plain": MANIFEST["cases"]["relu2/plain"]}))
    edit(copy, lambda m: m["cases"].update({"relu2/other": MANIFEST["cases"]["relu2/plain"]}))
    assert "relu2/other: this refllm has no such case" in one_finding(refllm, copy)


def test_a_file_that_is_no_safetensors_is_wrong_use(copy: Path, refllm: Run) -> None:
    path = copy / store.VECTORS / "relu2.safetensors"
    path.write_bytes(b"nothing")
    edit(copy, lambda m: m["files"]["vectors/relu2.safetensors"].update(sha256=store.sha256(path)))
    code, _, err = refllm("verify", "relu2", "--folder", copy)
    assert code == 2
    assert err.startswith(f"refllm: {path}: not readable as safetensors")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("verify", "gelu"), "no golden is called 'gelu'; there are rms_norm, "),
        (("show", "rms_norm/none"), "no golden is called 'rms_norm/none'"),
        (("make", "gelu"), "no golden is called 'gelu'"),
        (("verify", "--backend", "jax"), "--backend jax is not known: use numpy, torch, triton"),
        (("verify", "--dtype", "int8"), "--dtype int8 cannot be verified with numpy"),
        (("verify", "--backend", "torch", "--dtype", "float64"), "--dtype float64 cannot be verified with torch: "),
        (("verify", "--folder", "nowhere"), "--folder nowhere: no such folder"),
        (("verify", "--device", "cuda"), "--device cuda: numpy runs on the CPU"),
        (("verify", "--backend", "torch", "--device", "tpu"), "--device tpu: "),
    ],
)
def test_wrong_use_is_one_sentence(refllm: Run, arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = refllm(*arguments)
    assert code == 2
    assert not out
    assert err.startswith(f"refllm: {sentence}")
    assert len(err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------- bugs


def _eps_outside(x: Any, weight: Any, eps: float, *, ar: Any = ops.rms_norm.__kwdefaults__["ar"]) -> Any:
    x = ar.array(x)
    return ar.round(weight * (x / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps)), "rms_norm")


def _other_pairs(rope: Callable[..., Any], *arguments: Any, interleaved: bool, **more: Any) -> Any:
    return rope(*arguments, interleaved=not interleaved, **more)


def _aligned_at_the_start(attention: Callable[..., Any], q: Any, k: Any, v: Any, **more: Any) -> Any:
    S, T = q.shape[2], k.shape[2]
    if more.pop("causal", True) and T > S:
        return attention(q, k[:, :, :S], v[:, :, :S], **{**more, "key_mask": None})
    return attention(q, k, v, **more)


def _times(factor: float, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    return factor * function(*arguments, **more)


@pytest.mark.parametrize(
    ("operator", "wrong", "name", "dtype"),
    [
        ("rms_norm", lambda right: _eps_outside, "rms_norm/zero-row", "float32"),
        ("rms_norm", lambda right: partial(_times, 1.01, right), "rms_norm/plain", "bfloat16"),
        ("rope", lambda right: partial(_other_pairs, right), "rope/half-split", "float16"),
        ("rope", lambda right: partial(_other_pairs, right), "llama/rope-default", "bfloat16"),
        ("attention", lambda right: partial(_aligned_at_the_start, right), "attention/aligned-at-the-end", "bfloat16"),
        ("cross_entropy", lambda right: partial(right, ignore_index=-7), "cross_entropy/mean", "float32"),
        ("swiglu", lambda right: lambda gate, up, **how: right(up, gate, **how), "swiglu/plain", "float64"),
        ("swiglu", lambda right: partial(_times, 1 + 1e-9, right), "swiglu/plain", "float64"),
        ("layer_norm", lambda right: partial(_times, 1.02, right), "stablelm/tiny-sequential-prompt", "bfloat16"),
        ("relu2", lambda right: lambda x, **how: 1 / 0, "relu2/plain", "float32"),
    ],
)
def test_a_wrong_operator_is_found(
    monkeypatch: pytest.MonkeyPatch, operator: str, wrong: Callable[[Any], Any], name: str, dtype: str
) -> None:
    assert not verify.verify(iter([of(name)]), "numpy", dtype).findings
    monkeypatch.setattr(ops, operator, wrong(getattr(ops, operator)))
    findings = verify.verify(iter([of(name)]), "numpy", dtype).findings
    assert findings
    assert findings[0].name == name
    assert findings[0].problem.startswith(f"numpy, {dtype}")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_wrong_backend_is_found_by_the_command(monkeypatch: pytest.MonkeyPatch, refllm: Run, backend: str) -> None:
    from refllm import kernels

    forms: Any = kernels if backend == "triton" else kernels.plain
    right = forms.swiglu
    monkeypatch.setattr(forms, "swiglu", lambda gate, up: right(gate, up) * 1.0078125, raising=False)
    code, out, _ = refllm("verify", "swiglu/plain", "--backend", backend, "--dtype", "bfloat16")
    assert code == 1
    assert re.search(rf"swiglu/plain: {backend}, bfloat16, output y: rms error .* sigma, limit 1\.", out)
    assert "fails: 1 outputs do not hold" in out


@pytest.mark.parametrize(
    ("name", "output", "damage", "sentence"),
    [
        ("attention/no-keys", "o", lambda y: np.where(y == 0, 1e-30, y), "expected exactly 0"),
        ("attention/no-keys", "lse", lambda y: np.where(np.isneginf(y), -1e30, y), "expected -inf"),
        ("rope/half-split-partial", "q", lambda y: y + 1e-12 * (np.arange(16) > 12), "expected exactly"),
        ("relu2/overflow", "y", lambda y: np.minimum(y, 65504), "expected inf"),
        ("rms_norm/plain", "y", lambda y: y + 0.06 * (np.arange(480).reshape(5, 96) == 7), "sigma, limit"),
        (
            "helium/rope-default",
            "logits",
            lambda y: y + 0.1 * (np.arange(64) == 5) * np.eye(12, 1),
            "one element is off",
        ),
    ],
)
def test_what_a_mean_would_hide_is_found(
    name: str, output: str, damage: Callable[[np.ndarray], np.ndarray], sentence: str
) -> None:
    one, dtype = of(name), "float16"
    right = one.exact[output]
    inside = np.where(np.abs(right) > 65504, np.copysign(np.inf, right), right)
    assert not verify.judged(one, output, inside, dtype)[2]
    assert sentence in verify.judged(one, output, damage(inside), dtype)[2]


# -------------------------------------------------------------------------------------------------------------- making


def with_exact(folder: Path, name: str, change: Callable[[Golden], None]) -> None:
    """Damages a golden and its hash alike, as if it had been made with other code."""
    told = manifest.read_manifest(folder)
    group = name.split("/")[0]
    goldens = store.load(folder, told, group)
    change(goldens[name])
    store.write(folder, group, list(goldens.values()))
    store.write_manifest(folder, told)


def test_make_prints_the_change_in_sigma_and_replaces_only_if_told(copy: Path, refllm: Run) -> None:
    def three_sigma(one: Golden) -> None:
        one.exact["y"][2, 5] += 3 * one.sigma["float32.fused"]["y"][2, 5]

    with_exact(copy, "rms_norm/plain", three_sigma)
    before = {f.name: f.read_bytes() for f in (copy / store.VECTORS).iterdir()}
    code, out, _ = refllm("make", "rms_norm", "--folder", copy, "--json", copy / "made.json")
    assert code == 1
    assert re.search(r"^rms_norm/plain +changed +3 +0\.0%", out, re.MULTILINE), out
    assert "6 goldens made, 5 of them as they were" in out
    assert "nothing was replaced; --yes does it" in out
    assert "rms_norm/ragged" not in out
    changes = {c["name"]: c for c in json.loads((copy / "made.json").read_text())["changes"]}
    assert changes["rms_norm/plain"]["sigma"] == pytest.approx(3)
    assert changes["rms_norm/outlier"]["kind"] == "same"
    assert {f.name: f.read_bytes() for f in (copy / store.VECTORS).iterdir()} == before
    code, out, _ = refllm("make", "rms_norm", "--folder", copy, "--yes")
    assert (code, f"{copy}: replaced" in out) == (0, True)
    assert refllm("verify", "rms_norm", "--folder", copy)[0] == 0
    code, out, _ = refllm("make", "rms_norm", "--folder", copy, "--yes")
    assert "6 goldens made, 6 of them as they were" in out
    assert "replaced" not in out


def test_make_says_what_else_changed(copy: Path) -> None:
    def other_sigma(one: Golden) -> None:
        one.sigma["bfloat16.fused"]["y"] *= 1.25

    def other_input(one: Golden) -> None:
        one.inputs["x"][0, 0] += 1

    with_exact(copy, "relu2/plain", other_sigma)
    with_exact(copy, "relu2/overflow", other_input)
    changes = {change.name: change for change in make_vectors.make(copy, ["relu2"]).changes}
    assert changes["relu2/plain"].kind == changes["relu2/overflow"].kind == "changed"
    assert changes["relu2/plain"].sigma == 0
    assert changes["relu2/plain"].expected == pytest.approx(0.2)
    assert changes["relu2/overflow"].sigma == np.inf
    assert changes["relu2/float32"].kind == "same"


def test_make_into_an_empty_folder(tmp_path: Path, refllm: Run) -> None:
    code, out, _ = refllm("make", "relu2", "--folder", tmp_path, "--yes")
    assert code == 0
    assert re.search(r"^relu2/plain +new", out, re.MULTILINE)
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["manifest.json", "relu2.safetensors"]
    assert refllm("verify", "relu2", "--folder", tmp_path)[0] == 0
    assert refllm("verify", "--dtype", "float64", "--folder", tmp_path)[0] == 1  # the others are missing


def test_nothing_is_left_of_a_write_that_fails(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    made = make_vectors.make(copy, ["relu2"])

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        made.replace()
    assert {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()} == before


# ------------------------------------------------------------------------------------------------------------- showing


def test_show_lists_and_describes(refllm: Run) -> None:
    code, out, _ = refllm("show", "swiglu")
    assert code == 0
    assert re.search(r"^swiglu/plain +gates of a few units +y \[5, 77\] +bf16, f16, f32", out, re.MULTILINE)
    assert "made with refllm" in out
    code, out, _ = refllm("show", "helium/tiny-cache")
    assert code == 0
    assert "fed in:   pieces of 5, 1, 2 tokens with a cache" in out
    assert "witness:  Transformers HeliumForCausalLM, float64 throughout" in out
    assert re.search(r"^-> logits +\[8, 768\] +float64", out, re.MULTILINE)
    code, out, _ = refllm("show", "rms_norm/outlier", "--json", "-")
    assert json.loads(out)["rms_norm/outlier"]["arguments"][-1] == 1e-6


def test_what_a_run_returns_at_the_positions_that_count() -> None:
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    rows = run.valid_rows({"input_ids": mask, "attention_mask": mask})
    values = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(run.by_position(values, rows), values.reshape(6, 4)[1:])
    heads = values.reshape(2, 3, 2, 2).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(run.by_position(heads, rows), values.reshape(6, 2, 2)[1:])


@pytest.mark.parametrize(("dtype", "also"), [("float64", r" \(float64 is numpy's alone\)$"), ("int8", "float32$")])
def test_a_dtype_that_a_backend_lacks_is_refused_with_those_that_it_has(dtype: str, also: str) -> None:
    with pytest.raises(InputError, match=f"--dtype {dtype} cannot be verified with torch: use .*{also}"):
        run.check("torch", dtype)
