"""Log-probabilities of a trainer and of a rollout: rounding is no finding, and of two that differ the wrong one is
named."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import VOCAB, tiny_model

import refllm
from refllm.check import check_logprobs, logprobs
from refllm.check.inputs import Inputs
from refllm.check.logprobs import Found, expect
from refllm.check.logprobs_file import LogProbs
from refllm.commands import cli
from refllm.errors import InputError
from refllm.forward.model import Model
from refllm.precision import FUSED

CONFIG: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
IDS = np.random.default_rng(5).integers(0, VOCAB, (3, 40))
LENGTHS = (40, 31, 17)
MASK = (np.arange(40) < np.array(LENGTHS)[:, None]).astype(np.int64)
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("LlamaForCausalLM", **CONFIG).save_pretrained(folder, dtype="float32")
    return folder


def log_softmax(z: np.ndarray) -> np.ndarray:
    """In float32, as trainers do it."""
    z = z.astype(np.float32)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def run(model: Model, temperature: float = 1.0, moved: int = 0) -> np.ndarray:
    """Log-probabilities [B, S], the first NaN. moved: how far the positions of the second half are off."""
    positions = np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape) + moved * (np.arange(IDS.shape[1]) >= 8)
    logits = np.asarray(model(IDS, attention_mask=MASK, position_ids=positions).logits)
    found = np.full(IDS.shape, np.nan)
    log_p = log_softmax(logits / np.float32(temperature))
    found[:, 1:] = np.take_along_axis(log_p[:, :-1], IDS[:, 1:, None], axis=-1)[..., 0]
    return found


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for dtype in DTYPES:
        model = refllm.load(folder, dtype=dtype, policy=None if dtype == "float32" else "hf-eager")
        found |= {dtype: run(model), f"{dtype} moved": run(model, moved=1), f"{dtype} 0.7": run(model, 0.7)}
    fused = refllm.load(folder, dtype="bfloat16", policy="fused")
    return found | {"fused": run(fused), "fused moved": run(fused, moved=1)}


def write(path: Path, logprobs: np.ndarray, ids: np.ndarray = IDS, mask: Any = MASK, **about: Any) -> Path:
    if path.suffix == ".safetensors":
        values = {"ids": ids, "logprobs": np.ascontiguousarray(logprobs, np.float32)}
        values |= {} if mask is None else {"mask": mask}
        save_file(values, path, {key: str(value) for key, value in about.items()})
        return path
    lines = []
    for row, said, at in zip(ids, logprobs, mask, strict=True):
        shown = [None if np.isnan(x) else float(x) for x in said[at != 0]]
        lines.append(json.dumps({"ids": row[at != 0].tolist(), "logprobs": shown, **about}))
    path.write_text("\n".join(lines) + "\n")
    return path


def check(folder: Path, *files: Any, **options: Any) -> Found:
    found = check_logprobs(folder, *files, **options)
    schema = json.loads((Path(__file__).parents[2] / "docs/schema/logprobs.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(found.to_dict())
    assert set(found.to_dict()["reports"][0]) == set(schema["$defs"]["report"]["properties"])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".jsonl", ".safetensors"])
def test_rounding_is_no_finding_and_a_moved_position_is(
    dtype: str, suffix: str, folder: Path, runs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    right = check(folder, write(tmp_path / f"a{suffix}", runs[dtype], dtype=dtype))
    assert right.verdict == "holds", right
    assert right.reports[0].tokens == sum(LENGTHS) - len(LENGTHS)
    assert right.reports[0].carried
    wrong = check(folder, write(tmp_path / f"b{suffix}", runs[f"{dtype} moved"], dtype=dtype))
    assert wrong.verdict == "fails"
    assert wrong.reports[0].worst[1] >= 8


@pytest.mark.parametrize(("trainer", "rollout", "fault"), [
    ("bfloat16", "fused", ()),
    ("bfloat16 moved", "fused", ("trainer",)),
    ("bfloat16", "fused moved", ("rollout",)),
    ("bfloat16 moved", "fused moved", ("trainer", "rollout")),
    ("float32", "fused moved", ("rollout",)),
    ("float32 moved", "bfloat16", ("trainer",)),
])  # fmt: skip
def test_of_trainer_and_rollout_the_one_that_is_wrong_is_blamed(
    trainer: str, rollout: str, fault: tuple[str, ...], folder: Path, runs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    dtype = trainer.split()[0]
    first = write(tmp_path / "trainer.safetensors", runs[trainer], dtype=dtype, source="trainer")
    second = write(tmp_path / "rollout.jsonl", runs[rollout], dtype="bfloat16", source="rollout")
    found = check(folder, first, second)
    assert found.difference is not None
    assert found.difference.fault == fault
    assert (found.verdict == "fails") == bool(fault)
    assert not fault or fault[0] in found.difference.in_words or len(fault) == 2


def test_temperature_divides_the_logits(folder: Path, runs: dict[str, np.ndarray], tmp_path: Path) -> None:
    said = runs["bfloat16 0.7"]
    assert check(folder, write(tmp_path / "a.jsonl", said, dtype="bfloat16", temperature=0.7)).verdict == "holds"
    assert check(folder, write(tmp_path / "b.jsonl", said, dtype="bfloat16")).verdict == "fails"


def test_every_dtype_and_temperature_in_a_file_is_judged_by_itself(
    folder: Path, runs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """A wrong float32 sequence would drown in the rounding of those in bfloat16."""

    def lines(name: str, *each: tuple[str, str, float]) -> Path:
        texts = []
        for b, (run, dtype, temperature) in enumerate(each):
            file = write(tmp_path / "one.jsonl", runs[run][b : b + 1], IDS[b : b + 1], MASK[b : b + 1], dtype=dtype)
            texts.append(json.dumps(json.loads(file.read_text()) | {"temperature": temperature, "source": name}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
        return tmp_path / f"{name}.jsonl"

    right = lines("trainer", ("float32", "float32", 1), ("bfloat16", "bfloat16", 1), ("bfloat16 0.7", "bfloat16", 0.7))
    wrong = lines("rollout", ("bfloat16", "float32", 1), ("bfloat16", "bfloat16", 1), ("bfloat16", "bfloat16", 1))
    found = check(folder, right, wrong)
    said = [(r.source, r.dtype, r.temperature, r.sequences, r.verdict) for r in found.reports]
    assert said == [
        ("trainer", "float32", 1, (0,), "holds"),
        ("trainer", "bfloat16", 1, (1,), "holds"),
        ("trainer", "bfloat16", 0.7, (2,), "holds"),
        ("rollout", "float32", 1, (0,), "fails"),
        ("rollout", "bfloat16", 1, (1, 2), "holds"),
    ]
    assert found.difference is not None
    assert (found.difference.fault, found.difference.tokens) == (("rollout",), sum(LENGTHS) - len(LENGTHS))
    assert found.reports[3].worst[0] == 0


def test_arrays_are_judged_as_a_file_of_them_is(folder: Path, runs: dict[str, np.ndarray], tmp_path: Path) -> None:
    said, lists = runs["bfloat16"], [[None if np.isnan(x) else x for x in row] for row in runs["bfloat16"]]
    (filed,) = check(folder, write(tmp_path / "a.jsonl", said, dtype="bfloat16")).reports
    arrays = {"ids": torch.from_numpy(IDS), "logprobs": torch.from_numpy(said), "mask": MASK}
    for given in (arrays | {"temperature": np.ones(3)}, {"ids": IDS.tolist(), "logprobs": lists, "mask": MASK}):
        (report,) = check(folder, given, dtype="bf16").reports
        assert (report.source, report.verdict) == ("arrays", "holds")
        assert (report.ratio, report.tokens) == (filed.ratio, filed.tokens)
    two = check(folder, arrays, arrays, dtype=("bf16", "float32"))
    assert [r.dtype for r in two.reports] == ["bfloat16", "float32"]
    assert two.difference is not None
    assert two.difference.fault == ("arrays (the second)",)
    with pytest.raises(InputError, match="'logits' is unknown"):
        check(folder, arrays | {"logits": 1})
    with pytest.raises(InputError, match="of 0 programs"):
        check(folder)


def test_padding_on_the_left_is_taken_off(folder: Path, runs: dict[str, np.ndarray], tmp_path: Path) -> None:
    ids, said, mask = (np.zeros_like(x) for x in (IDS, runs["float32"], MASK))
    for b, n in enumerate(LENGTHS):
        ids[b, -n:], said[b, -n:], mask[b, -n:] = IDS[b, :n], runs["float32"][b, :n], 1
    file = write(tmp_path / "left.safetensors", said, ids, mask, dtype="float32")
    found = check(folder, file)
    assert (found.verdict, found.reports[0].tokens) == ("holds", sum(LENGTHS) - len(LENGTHS))


def test_one_wrong_token_among_many_is_found(folder: Path, runs: dict[str, np.ndarray], tmp_path: Path) -> None:
    said = runs["bfloat16"].copy()
    right = check(folder, write(tmp_path / "a.jsonl", said, dtype="bfloat16")).reports[0]
    said[1, 20] -= 1.0
    (report,) = check(folder, write(tmp_path / "b.jsonl", said, dtype="bfloat16")).reports
    assert (report.verdict, report.worst, report.unexplained) == ("fails", (1, 20), 1)
    assert report.exact == right.exact or report.sigmas > right.sigmas


def test_predicted_error_is_that_of_a_moved_head_input(folder: Path) -> None:
    """The formula against draws: errors of the predicted sizes at the head's input and at the logits."""
    model, ids = refllm.load(folder, dtype="bfloat16"), IDS[:1, :12]
    kept: dict[str, Any] = {}
    from refllm.check.oracle import predict

    logits = predict(model, Inputs(ids), "bfloat16", FUSED, lambda name, x: kept.setdefault(name, x))
    head, inner = np.asarray(model.weights["lm_head.weight"], np.float64), kept["model.norm"].variance[0]
    own = np.maximum(logits.variance[0] - inner @ np.square(head).T, 0)
    expected = expect(model, Inputs(ids), "bfloat16", FUSED, 0.5)
    rng, small, errors = np.random.default_rng(0), 1e-3, []
    for _ in range(1500):
        moved = rng.standard_normal(inner.shape) * np.sqrt(inner) @ head.T
        moved = moved + rng.standard_normal(own.shape) * np.sqrt(own)
        z = (logits.value[0] + small * moved) / 0.5
        log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        errors.append((log_p[np.arange(11), ids[0, 1:]] - expected.exact[0, 1:]) / small)
    drawn = np.square(errors).mean(axis=0)
    np.testing.assert_allclose(drawn, expected.variance[0, 1:], rtol=0.2)


@pytest.mark.parametrize(("lines", "said"), [
    ("", "no tokens"),
    ("[1]", "not an object"),
    ("{", "line 1 is not JSON"),
    ('{"ids": [1, 2]}', "expected ids"),
    ('{"ids": [1, 2], "logprobs": [0]}', "[1, 1]"),
    ('{"ids": [1, 2.5], "logprobs": [null, -1]}', "integers"),
    ('{"ids": [1, 2], "logprobs": [null, 0.5]}', "above 0"),
    ('{"ids": [1, 2], "logprobs": [null, null]}', "says no log-probability"),
    ('{"ids": [1, 2, 3], "logprobs": [0, 0, 0], "mask": [1, 0, 1]}', "inside a sequence"),
    ('{"ids": [1, 2], "logprobs": [0, -1], "temperature": 0}', "temperature is 0"),
    ('{"ids": [1, 99], "logprobs": [0, -1], "dtype": "float32"}', "outside the vocabulary"),
    ('{"ids": [1, 2], "logprobs": [0, -1]}', "say --dtype"),
    ('{"ids": [1, 2], "logprobs": [0, -1], "dtype": "int4"}', "'int4' cannot be checked"),
    ('{"ids": [1, 2], "logprobs": [0, -1], "source": "a"}\n{"ids": [1, 2], "logprobs": [0, -1]}', "use two files"),
    ('{"ids": [[1, 2]], "logprobs": [[0, -1]], "temperature": [1, 2]}', "expected one number, or [1]"),
    ('{"ids": ["a", 2], "logprobs": [0, -1]}', "not readable"),
])  # fmt: skip
def test_bad_file_is_one_sentence(lines: str, said: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError) as refused:
        check_logprobs(folder, path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_of_other_tokens_are_refused(folder: Path, runs: dict[str, np.ndarray], tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", runs["float32"], dtype="float32")
    second = write(tmp_path / "b.jsonl", runs["float32"], (IDS + 1) % VOCAB, dtype="float32")
    with pytest.raises(InputError, match="its tokens are others"):
        check(folder, first, second)
    assert LogProbs.load(first).source == "a.jsonl"


def test_command_says_whose_fault_it_is(
    folder: Path,
    runs: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [
        write(tmp_path / "trainer.safetensors", runs["bfloat16"], source="trainer"),
        write(tmp_path / "rollout.jsonl", runs["fused moved"], source="rollout"),
    ]
    command = ["refllm", "check", folder, "--dtype", "bf16", "--logprobs", files[0], "--logprobs", files[1]]

    def run(*more: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*command, *more)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), " ".join(shown.out.split()), shown.err

    code, out, err = run()
    assert (code, err) == (1, "")
    assert "rollout is wrong: rounding explains what trainer says, and not what it says" in out
    xml, page = tmp_path / "f.xml", tmp_path / "f.html"
    known = tmp_path / "known.json"
    entry = {"value": "log-probabilities", "candidate": "rollout", "reason": "its cache", "until": "9999-12-31"}
    known.write_text(json.dumps({"known": [entry]}))
    code, out, err = run("--junit", xml, "--html", page, "--json", tmp_path / "f.json", "--known", known)
    assert (code, err) == (0, ""), out
    assert "known until 9999-12-31: log-probabilities, candidate rollout (its cache)" in out
    cases = {case.get("name"): case for case in ET.parse(xml).iter("testcase")}
    assert set(cases) == {f"{source}, bfloat16, log-probabilities" for source in ("trainer", "rollout")}
    assert [[child.tag for child in case] for case in cases.values()] == [[], ["skipped"]]
    text, values = page.read_text(), json.loads((tmp_path / "f.json").read_text())
    assert "rollout is wrong: rounding explains what trainer says" in text
    assert (text.count("</table>"), 'class="verdict">fails' in text) == (2, True)
    assert (values["verdict"], values["known"][0]["state"], values["interrupted"]) == ("fails", "seen", False)
    schema = json.loads((Path(__file__).parents[2] / "docs/schema/logprobs.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(values)
    assert set(values) | {"ended"} == set(schema["properties"])
    known.write_text(json.dumps({"known": [entry | {"candidate": "trainer"}]}))
    assert run("--junit", xml, "--known", known)[0] == 1
    assert "sequence" in str(next(ET.parse(xml).iter("failure")).get("message"))
    code, out, err = run("--tf32")
    assert (code, out, err) == (2, "", "refllm: --logprobs judges what a file says, so leave out --tf32\n")


def test_end_of_the_time_leaves_the_reports_so_far(
    folder: Path, runs: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, files = logprobs.judged, [tmp_path / name for name in ("trainer.jsonl", "rollout.jsonl")]
    for file in files:
        write(file, runs["bfloat16"], dtype="bfloat16")

    def the_first(*arguments: Any) -> Iterator[Any]:
        yield next(judged(*arguments))
        (timer,) = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
        threading.Thread(target=timer.function).start()
        time.sleep(60)

    monkeypatch.setattr(logprobs, "judged", the_first)
    command = ["refllm", "check", folder, "--logprobs", files[0], "--logprobs", files[1], "--time", "600"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--json", str(tmp_path / "f.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    values = json.loads((tmp_path / "f.json").read_text())
    assert (ended.value.code, values["verdict"], values["difference"]) == (1, "incomplete", None)
    assert values["ended"].startswith("the time of 600 s was up at")
    assert [report["source"] for report in values["reports"]] == ["trainer.jsonl"]
    schema = json.loads((Path(__file__).parents[2] / "docs/schema/logprobs.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(values)
