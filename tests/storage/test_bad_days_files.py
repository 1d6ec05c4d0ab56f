"""Bad days of files: kills in the middle of a save, full disks, two writers, and files that are none."""

import copy
import gc
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model

import refllm
from refllm import golden
from refllm.check.trace import Trace
from refllm.commands import cli
from refllm.config import AutoConfig
from refllm.errors import CheckpointError, ConfigError, InputError, RefllmError, TokenizerError
from refllm.forward.model import Model
from refllm.generation.config import GenerationConfig
from refllm.storage import input_file, output_file
from refllm.storage.checkpoint import Checkpoint, one_model
from refllm.storage.checkpoint_writer import save_checkpoint
from refllm.text.growth import LIMIT
from refllm.text.token_input import read_text
from refllm.text.tokenizer import AutoTokenizer

IDS = [[1, 2, 3, 4]]
VISIBLE = {"os.rename", "os.remove"}
ANY = VISIBLE | {"open", "os.mkdir", "os.chmod", "fcntl.flock"}


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, RefllmError) and bool(text) and "\n" not in text and len(text) < 400


def attempt(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the error that it raises, which must be one sentence."""
    try:
        found = call()
    except (RefllmError, OSError) as error:
        found = error
    if isinstance(found, Exception):
        assert one_sentence(found), found
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".refllm-*"))


def in_child(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> int:
    """The exit code of a process that runs `work`: 0, or 3 if it raises."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            before()
            work()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(work: Callable[[], Any], events: set[str] = VISIBLE) -> Iterator[int]:
    """Runs `work` in processes that end, without any cleaning up, before their first, second, ... use of a file."""
    for last in range(1000):

        def arm(last: int = last) -> None:
            seen = 0

            def hook(event: str, arguments: Any) -> None:
                nonlocal seen
                if event in events:
                    if seen == last:
                        os._exit(9)
                    seen += 1

            sys.addaudithook(hook)

        code = in_child(work, arm)
        assert code in (0, 9)
        yield last
        if code == 0:
            return
    raise AssertionError("the work never ends")


# ------------------------------------------------------------------------------------------------------------- kills


def model_of(seed: int) -> Model:
    """Two of different seeds have tensors of the same names and shapes, but other values and another rotation."""
    model = tiny_model("LlamaForCausalLM", seed=seed, dtype="float32", rope_parameters={"rope_theta": 100.0 + seed})
    model.generation_config.max_length = 10 + seed
    return model


def save(model: Model, folder: Path, max_shard_bytes: int) -> None:
    """`save_pretrained`, in shards of a given size."""
    texts = {
        "generation_config.json": model.generation_config.to_json_string(),
        "config.json": model.config.to_json_string(architectures=["LlamaForCausalLM"]),
    }
    weights = model.weights.renamed(model.prefix)
    save_checkpoint(folder, weights, "float32", texts=texts, max_shard_bytes=max_shard_bytes)


def logits(model: Model) -> np.ndarray:
    return np.asarray(model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("before", "after"), [(10**9, 10**9), (10**9, 12000), (12000, 10**9), (12000, 12000), (12000, 9000)]
)
def test_a_save_killed_at_any_file_operation_leaves_the_old_model_or_the_new_or_a_sentence(
    tmp_path: Path, before: int, after: int
) -> None:
    old, new = model_of(1), model_of(2)
    expected = {"old": logits(old), "new": logits(new)}
    save(old, tmp_path, before)
    found = []
    for _ in kills(lambda: save(new, tmp_path, after), ANY if before == after == 10**9 else VISIBLE):
        model = attempt(lambda: refllm.load(tmp_path))
        if isinstance(model, Exception):
            assert re.search("a save that was cut short|there are no weights", str(model))
            found.append("refused")
        else:
            found.append(next(name for name, value in expected.items() if np.array_equal(logits(model), value)))
            assert model.generation_config.max_length == (11 if found[-1] == "old" else 12)
        save(old, tmp_path, before)
        assert leftovers(tmp_path) == []  # what the killed writer left is swept
    assert found[0] == "old"
    assert found[-1] == "new"
    assert found == sorted(found, key=["old", "refused", "new"].index)


def test_save_pretrained_publishes_config_and_weights_together(tmp_path: Path) -> None:
    old, new = model_of(1), model_of(2)
    old.save_pretrained(tmp_path)
    for _ in kills(lambda: new.save_pretrained(tmp_path)):
        model = attempt(lambda: refllm.load(tmp_path))
        if not isinstance(model, Exception):
            expected = old if model.config.rope_parameters["rope_theta"] == 101 else new
            np.testing.assert_array_equal(logits(model), logits(expected))
        old.save_pretrained(tmp_path)


def test_a_process_that_is_killed_while_it_saves_leaves_one_of_the_models(tmp_path: Path) -> None:
    models = [model_of(1), model_of(2)]
    expected = [logits(model) for model in models]
    models[0].save_pretrained(tmp_path)
    for number in range(8):
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    model.save_pretrained(tmp_path)
        time.sleep(0.02 + 0.003 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        model = attempt(lambda: refllm.load(tmp_path))
        if isinstance(model, Exception):
            models[0].save_pretrained(tmp_path)
        else:
            assert any(np.array_equal(logits(model), value) for value in expected)
    models[0].save_pretrained(tmp_path)
    assert leftovers(tmp_path) == []


def test_a_tokenizer_that_is_killed_while_it_is_saved_is_the_old_one_or_the_new_or_a_sentence(tmp_path: Path) -> None:
    old, new = (AutoTokenizer.from_pretrained(golden.path(name)) for name in ("llama-tiny", "helium-tiny"))
    old.save_pretrained(tmp_path)
    texts = [t.backend_tokenizer.to_str() + str(t.special_tokens_map) + str(t.chat_template) for t in (old, new)]
    found = []
    for _ in kills(lambda: new.save_pretrained(tmp_path)):
        t = attempt(lambda: AutoTokenizer.from_pretrained(tmp_path))
        if isinstance(t, Exception):
            found.append(2)
        else:
            found.append(texts.index(t.backend_tokenizer.to_str() + str(t.special_tokens_map) + str(t.chat_template)))
        old.save_pretrained(tmp_path)
    assert {*found} == {0, 1, 2}


def test_a_golden_that_is_killed_while_it_is_replaced_is_seen_by_its_hash(tmp_path: Path) -> None:
    from refllm.golden import make_vectors, manifest, store

    (tmp_path / "vectors").mkdir()
    shutil.copy(golden.FOLDER / "vectors" / "relu2.safetensors", tmp_path / "vectors")
    told = json.loads((golden.FOLDER / "manifest.json").read_text())
    cases = {name: entry for name, entry in told["cases"].items() if name.startswith("relu2/")}
    store.write_manifest(tmp_path, {"files": {}, "cases": cases})
    before = (tmp_path / "manifest.json").read_bytes()
    goldens = list(store.load(tmp_path, manifest.read_manifest(tmp_path), "relu2").values())
    goldens[0].exact = {name: value + 1 for name, value in goldens[0].exact.items()}
    made = make_vectors.Made(tmp_path, {"files": {}, "cases": cases}, {"relu2": goldens}, [])
    outcomes = set()
    for _ in kills(made.replace):
        now = manifest.read_manifest(tmp_path)
        problems = [text for group, text in store.problems(tmp_path, now) if "vectors" in text]
        outcomes.add((bool(problems), (tmp_path / "manifest.json").read_bytes() == before))
    assert outcomes == {(False, True), (True, True), (False, False)}  # the old, the change found, the new


@pytest.mark.parametrize("change", ["config.json", "generation_config.json"])
def test_a_model_that_is_saved_while_it_is_read_is_not_read_as_a_mixture(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = model_of(1), model_of(2)
    old.save_pretrained(tmp_path)
    opened = Checkpoint.open

    def save_meanwhile(path: Any) -> Checkpoint:
        new.save_pretrained(tmp_path)
        return opened(path)

    monkeypatch.setattr(Checkpoint, "open", save_meanwhile)
    with pytest.raises(CheckpointError, match="another model was saved here while this one was read; load it again"):
        refllm.load(tmp_path)
    with one_model(tmp_path):
        (tmp_path / change).touch() if change != "config.json" else None


# ------------------------------------------------------------------------------------------------------------ writing

WRITERS: dict[str, Callable[[Path], Any]] = {
    "--json and the like": lambda path: output_file.write("--json", path, "new" * 1000),
    "replaced": lambda path: output_file.replace(path, "new" * 1000),
    "config": lambda path: AutoConfig.for_model("llama").save_pretrained(path.parent),
    "generation config": lambda path: GenerationConfig(
        eos_token_id=list(range(500)),
    ).save_pretrained(path.parent),
    "weights": lambda path: save_checkpoint(path.parent, {"a": np.ones(500)}, "float32"),
    "trace": lambda path: trace().save(path),
    "tokenizer": lambda path: AutoTokenizer.from_pretrained(golden.path("llama-tiny")).save_pretrained(path.parent),
}
NAMES = {
    "config": "config.json",
    "generation config": "generation_config.json",
    "weights": "model.safetensors",
    "tokenizer": "tokenizer.json",
}


def trace() -> Trace:
    from refllm.check.inputs import Inputs

    inputs = Inputs(np.array(IDS))
    return Trace({"model.norm": np.ones((1, 4, 64), np.float32)}, inputs, "numpy", "float32", "base", "0")


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o027)
    yield
    os.umask(old)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_takes_nothing_away(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands for the disk: the system refuses the write in the same place."""
    file = tmp_path / NAMES.get(name, "out")
    file.write_text("old")

    def write() -> None:
        with pytest.raises((RefllmError, OSError)) as caught:
            WRITERS[name](file)
        assert "\n" not in str(caught.value)

    def fill() -> None:
        AutoTokenizer.from_pretrained(golden.path("llama-tiny"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    assert in_child(write, fill) == 0
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_written_file_has_the_usual_mode_and_a_link_stays_one(tmp_path: Path, name: str, umask: None) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    target = elsewhere / "target"
    file = folder / NAMES.get(name, "out")
    file.symlink_to(target)
    WRITERS[name](file)
    assert file.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(0o604)
    WRITERS[name](file)
    assert stat.S_IMODE(target.stat().st_mode) == 0o604  # as writing into the file leaves it
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "tokenizer"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, kind: str, name: str) -> None:
    file = tmp_path / NAMES.get(name, "out")
    {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/null"),
        "loop": lambda: file.symlink_to(file.name),
        "folder": file.mkdir,
    }[kind]()
    before = os.lstat(file)
    with pytest.raises((RefllmError, OSError)) as caught:
        WRITERS[name](file)
    if name != "replaced":
        assert one_sentence(caught.value)
    with pytest.raises(InputError, match=r"^--json .* cannot be written: "):
        output_file.must_be_writable("--json", file)
    after = os.lstat(file)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_two_writers_leave_the_whole_of_one_and_nobody_elses_file_is_touched(tmp_path: Path) -> None:
    file, users = tmp_path / "F", tmp_path / "F.new"
    users.write_text("a user's file")
    contents = [f"{number}" * 5000 for number in range(4)]
    threads = [
        threading.Thread(target=lambda text=text: [output_file.replace(file, text) for _ in range(10)])
        for text in contents
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not file.exists() or file.read_text() in contents
    assert file.read_text() in contents
    assert users.read_text() == "a user's file"
    assert {path.name for path in tmp_path.iterdir()} == {"F", "F.new"}


def test_only_unfinished_files_of_writers_that_are_gone_are_swept(tmp_path: Path) -> None:
    mine = tmp_path / ".refllm-of-mine.txt"
    mine.write_text("mine")
    with output_file.NewFile(tmp_path / "a") as alive:
        in_child(lambda: output_file.NewFile(tmp_path / "b"))  # ends without a word
        assert len(leftovers(tmp_path)) == 3
        output_file.replace(tmp_path / "c", "c")
        assert sorted(leftovers(tmp_path)) == sorted([os.path.basename(alive.name), mine.name])
        alive.write("a").publish()
    assert (tmp_path / "a").read_text() == "a"


def test_a_link_or_a_pipe_with_the_name_of_an_unfinished_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a user's")
    (tmp_path / f"{output_file._PREFIX}link{output_file._SUFFIX}").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / f"{output_file._PREFIX}pipe{output_file._SUFFIX}")
    output_file.replace(tmp_path / "c", "c")
    assert len(leftovers(tmp_path)) == 2
    assert (tmp_path / "data").read_text() == "a user's"


def test_text_that_no_encoding_holds_is_written_as_json_escapes_it(tmp_path: Path) -> None:
    output_file.write("--json", tmp_path / "F", json.dumps({"text": "é\udcff"}, ensure_ascii=False))
    assert json.loads((tmp_path / "F").read_text(encoding="utf-8")) == {"text": "é\udcff"}


def test_a_tokenizer_without_a_template_does_not_get_that_of_the_one_before(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("llama-tiny"))
    tokenizer.chat_template = {"default": "a", "other": "b"}
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    assert (tmp_path / "mine.txt").exists()


# ------------------------------------------------------------------------------------------------------------ reading


def broken(folder: Path, file: str, kind: str) -> None:
    (folder / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "endless":
        (folder / file).symlink_to("/dev/zero")
    elif kind == "loop":
        (folder / file).symlink_to(file)
    else:
        (folder / file).mkdir()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of an embedded checkpoint with tokenizer, template and shards."""
    return Path(shutil.copytree(golden.path("arcee-tiny"), tmp_path / "checkpoint"))


READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": AutoConfig.from_pretrained,
    "generation_config.json": GenerationConfig.from_checkpoint,
    "model.safetensors.index.json": Checkpoint.open,
    "model-00002-of-00003.safetensors": Checkpoint.open,
    "tokenizer.json": AutoTokenizer.from_pretrained,
    "tokenizer_config.json": AutoTokenizer.from_pretrained,
    "chat_template.jinja": AutoTokenizer.from_pretrained,
    "ids.txt": lambda folder: read_text(folder / "ids.txt"),
    "a.trace": lambda folder: Trace.load(folder / "a.trace"),
}


@pytest.mark.parametrize("kind", ["pipe", "endless", "loop", "folder"])
@pytest.mark.parametrize("file", READERS)
def test_what_is_no_regular_file_is_not_read(checkpoint: Path, file: str, kind: str) -> None:
    broken(checkpoint, file, kind)
    with pytest.raises(RefllmError) as caught:
        READERS[file](checkpoint)
    assert one_sentence(caught.value)
    assert file in str(caught.value) or "chat template file" in str(caught.value)


@pytest.mark.parametrize("file", [name for name in READERS if name.endswith(("json", "jinja", "txt"))])
def test_text_beyond_the_limit_is_not_read(checkpoint: Path, file: str) -> None:
    with open(checkpoint / file, "wb") as large:
        large.write(b"[")
        large.truncate(1 << 31)  # a hole: it takes no room on the disk
    start = time.perf_counter()
    with pytest.raises(RefllmError, match="it has 2147483648 bytes, and at most") as caught:
        READERS[file](checkpoint)
    assert one_sentence(caught.value)
    assert time.perf_counter() - start < 2


def test_json_of_millions_of_values_is_counted_and_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" + "[]," * 4_000_001 + "[]]")
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="about 8000004 values, and at most 4000000 are read"):
        AutoConfig.from_pretrained(tmp_path)
    assert time.perf_counter() - start < 0.5
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        input_file.read_json(tmp_path / "deep.json")


def test_a_header_of_a_million_empty_tensors_is_refused_at_once(tmp_path: Path) -> None:
    one = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(one % number for number in range(150_000)) + "}").encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="values, and at most 1000000 are read"):
        Checkpoint.open(tmp_path)
    with pytest.raises(InputError, match="values, and at most 1000000 are read"):
        Trace.load(file)
    assert time.perf_counter() - start < 0.5


def test_a_billion_layers_are_a_mistake_in_the_file() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers=1000000000 must be an integer from 1 to 10000"):
        AutoConfig.for_model("llama", num_hidden_layers=10**9)


def grown(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
NINE: dict[str, dict[str, Any]] = {
    "normalizer": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 9}},
    "nested": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 3}] * 3}
    },
    "regular expression": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": "x*"}, "content": "a" * 30}] * 6,
        }
    },
    "prepend": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 99}, *[REPLACE] * 8]}
    },
    "decoder": {"decoder": {"type": "Sequence", "decoders": [REPLACE] * 9}},
    "bytes of bytes": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            ]
            * 30,
        }
    },
}


@pytest.mark.parametrize("name", NINE)
def test_a_tokenizer_whose_rules_make_a_text_a_billion_times_as_long_is_refused(checkpoint: Path, name: str) -> None:
    grown(checkpoint, **NINE[name])
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(InputError, match=r"times as long by the rules of this tokenizer\.json"):
        tokenizer.decode([5, 6, 7]) if name == "decoder" else tokenizer.encode("ab\u00e9")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("behind", [False, True])
def test_such_rules_are_not_run_over_the_tokenizers_own_tokens_either(checkpoint: Path, behind: bool) -> None:
    """Wherever they stand in the file, and however the name is spelled."""
    file = checkpoint / "tokenizer.json"
    table = json.loads(file.read_text())
    table["added_tokens"].append(table["added_tokens"][0] | {"id": 640, "content": "a", "normalized": True})
    del table["normalizer"]
    rules = {"normalizer": REPLACE | {"content": "a" * 2 * LIMIT} if behind else NINE["normalizer"]["normalizer"]}
    text = json.dumps(table | rules if behind else rules | table)
    file.write_text(text.replace('"normalizer"', '"normali\\u007aer"') if behind else text)
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=r"an added token of .* times as long"):
        AutoTokenizer.from_pretrained(checkpoint)
    assert time.perf_counter() - start < 1


def test_rules_that_lengthen_a_little_are_used(checkpoint: Path) -> None:
    grown(checkpoint, **{"normalizer": {"type": "Sequence", "normalizers": [REPLACE, REPLACE]}})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer.encode("ab")).count("a") == 100


# --------------------------------------------------------------------------------------------------------- open files


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_low_memory_model_is_freed_when_it_is_dropped(tmp_path: Path) -> None:
    folder = golden.path("llama-tiny")
    refllm.load(folder, low_memory=True)(input_ids=IDS)
    gc.collect()
    gc.disable()
    try:
        before = open_files()
        for _ in range(5):
            model = refllm.load(folder, low_memory=True)
            model.generate(IDS, max_new_tokens=2)
            model.weights.layer(0)["self_attn.q_proj.weight"]
            gone = weakref.ref(model.weights)
            del model
            assert gone() is None
        assert open_files() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["other bytes", "shorter", "longer"])
def test_a_file_that_is_changed_under_a_low_memory_model_is_noticed(tmp_path: Path, how: str) -> None:
    model_of(1).save_pretrained(tmp_path)
    model = refllm.load(tmp_path, low_memory=True)
    first = logits(model)
    model_of(2).save_pretrained(tmp_path)  # by a rename, which leaves the open file as it is
    np.testing.assert_array_equal(logits(model), first)
    model = refllm.load(tmp_path, low_memory=True)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    time.sleep(0.01)  # the clock of the file system has ticks
    with open(file, "r+b") as handle:
        if how == "shorter":
            handle.truncate(size - 4096)
        else:
            handle.seek(-4 if how == "other bytes" else 0, os.SEEK_END)
            handle.write(b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"model.safetensors: the file was changed after it was opened"):
        logits(model)
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        model.save_pretrained(tmp_path / "copy")


# ------------------------------------------------------------------------------------------- copies and other processes


def models() -> Iterator[Model]:
    for name in ("llama-tiny", "stablelm-tiny-parallel"):
        yield refllm.load(golden.path(name))
        yield refllm.load(golden.path(name), dtype="bfloat16")
    yield refllm.HeliumForCausalLM.from_config(tiny_model("HeliumForCausalLM").config)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_and_pickles_compute_the_same(how: Callable[[Any], Any]) -> None:
    for model in models():
        again = how(model)
        np.testing.assert_array_equal(logits(again), logits(model))
        assert again.config == model.config
        np.testing.assert_array_equal(
            again.generate(IDS, max_new_tokens=3, do_sample=False),
            model.generate(IDS, max_new_tokens=3, do_sample=False),
        )
    tokenizer = AutoTokenizer.from_pretrained(golden.path("arcee-tiny"))
    again = how(tokenizer)
    assert again.encode("Once upon a time") == tokenizer.encode("Once upon a time")
    assert again.chat_template == tokenizer.chat_template
    assert how(GenerationConfig(top_k=3)) == GenerationConfig(top_k=3)
    encoding = how(tokenizer("a b"))
    assert encoding.input_ids == tokenizer("a b").input_ids


def test_a_changed_copy_leaves_the_original_alone() -> None:
    model = model_of(1)
    first, again = logits(model), copy.deepcopy(model)
    for name in again.weights:
        again.weights[name][...] = 0
    assert not logits(again).any()
    np.testing.assert_array_equal(logits(model), first)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_fast_models_are_copied_and_pickled(how: Callable[[Any], Any]) -> None:
    pytest.importorskip("torch")
    model = refllm.load(golden.path("llama-tiny"), backend="torch", device="cpu")
    np.testing.assert_array_equal(logits(how(model)), logits(model))


def test_a_low_memory_model_is_copied_and_says_why_it_cannot_be_pickled() -> None:
    model = refllm.load(golden.path("llama-tiny"), low_memory=True)
    np.testing.assert_array_equal(logits(copy.deepcopy(model)), logits(model))
    with pytest.raises(InputError, match="cannot be pickled, because it reads an open file; load the model again"):
        pickle.dumps(model)


def test_a_model_goes_to_a_spawned_process(tmp_path: Path) -> None:
    model = model_of(1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a Pool would start a process that ends at once for ever
        np.testing.assert_array_equal(pool.submit(logits_of_tiny, model).result(), logits(model))


def logits_of_tiny(model: Model) -> np.ndarray:
    return np.asarray(model(input_ids=IDS).logits)


# ------------------------------------------------------------------------------------------------------ contradictions

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9}
TWICE: dict[str, tuple[str, tuple[str, ...]]] = {
    "a key": ('"hidden_size": 64, "hidden_size": 128', ("hidden_size", "64 and 128", "the last one counts")),
    "inside": ('"rope_parameters": {"rope_theta": 5.0, "rope_theta": 6.0}', ("'rope_theta'", "5.0 and 6.0")),
    "theta": ('"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}', ("rope_theta=7.0", "rope_theta=5.0")),
    "scaling": (
        '"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}',
        ("rope_scaling=", "replaces rope_parameters="),
    ),
    "type": (
        '"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}',
        ("rope_type='linear'", "type='dynamic'", "rope_type is used"),
    ),
    "original": (
        '"original_max_position_embeddings": 16, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5.0, '
        '"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}',
        ("original_max_position_embeddings=16", "original_max_position_embeddings=32", "the former is used"),
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_setting_that_stands_twice_is_a_warning_that_names_both(tmp_path: Path, name: str) -> None:
    keys, parts = TWICE[name]
    rest = json.dumps({"model_type": "llama", **SMALL})[1:-1]
    (tmp_path / "config.json").write_text(
        f"{{{rest}, {keys}}}".replace('"hidden_size": 64, "num', '"num') if name == "a key" else f"{{{rest}, {keys}}}"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoConfig.from_pretrained(tmp_path)
    told = [str(warning.message) for warning in caught]
    assert any(all(part in text for part in (*parts, "config.json")) for text in told), told


def test_a_setting_that_stands_twice_with_one_value_is_no_warning(tmp_path: Path) -> None:
    values = {"model_type": "llama", **SMALL, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 5.0}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == 5.0


# --------------------------------------------------------------------------------------------------------------- texts


def test_half_a_surrogate_pair_is_a_users_sentence(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden.path("llama-tiny"))
    model = refllm.load(golden.path("llama-tiny"))
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer("a\udcff"),
        lambda: tokenizer(["a", "\udcff"]),
        lambda: tokenizer([["a", "\udcff"]], is_split_into_words=True),
        lambda: tokenizer("a", text_pair="\udcff"),
        lambda: tokenizer.convert_tokens_to_ids("\udcff"),
        lambda: tokenizer.convert_tokens_to_string(["\udcff"]),
        lambda: tokenizer.apply_chat_template([{"role": "user", "content": "\udcff"}]),
        lambda: model.generate(IDS, stop_strings="\udcff", tokenizer=tokenizer),
        lambda: GenerationConfig(stop_strings=["a", "\udcff"]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"is not Unicode text: .*half of a surrogate pair"):
            call()


@pytest.mark.parametrize("entry", ["bos_token", "additional_special_tokens", "image_token"])
def test_half_a_surrogate_pair_in_a_tokenizers_files_is_a_sentence(checkpoint: Path, entry: str) -> None:
    file = checkpoint / "tokenizer_config.json"
    (checkpoint / "special_tokens_map.json").unlink()
    value: Any = ["\ud800"] if entry.startswith("add") else "\ud800"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    with pytest.raises(TokenizerError, match="half a surrogate pair"):
        AutoTokenizer.from_pretrained(checkpoint)


# ------------------------------------------------------------------------------------------------------- command lines

LLAMA = str(golden.path("llama-tiny"))


@pytest.fixture
def refllm_command(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in a process of its own with these streams: exit code, standard output, standard error."""

    def run(*arguments: str, stdout: str = "", stderr: str = "", encoding: str = "utf-8") -> tuple[int, str, str]:
        out, err = tmp_path / "stdout", tmp_path / "stderr"

        def stream(number: int, name: str, where: str, file: Path) -> None:
            os.close(number)
            setattr(sys, name, None)
            if where != "closed":
                handle = os.open(where or file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                if where == "nobody":
                    reading, handle = os.pipe()
                    os.close(reading)
                if handle != number:
                    os.dup2(handle, number)
                    os.close(handle)
                errors = "backslashreplace" if name == "stderr" else "strict"
                setattr(sys, name, os.fdopen(number, "w", encoding=encoding, errors=errors))

        def work() -> None:
            os.chdir(tmp_path)
            stream(1, "stdout", stdout, out)
            stream(2, "stderr", stderr, err)
            sys.argv = ["refllm", *arguments]
            cli.main()

        return in_child(work), *(file.read_text(encoding) if file.exists() else "" for file in (out, err))

    return run


def test_a_reader_that_goes_away_is_no_finding(refllm_command: Any) -> None:
    assert refllm_command("info", LLAMA, stdout="nobody")[0] == 0
    assert refllm_command("score", LLAMA, "--ids", "1,2,3", "--json", "-", stdout="nobody")[0] == 0


def test_closed_streams_are_no_traceback(refllm_command: Any, tmp_path: Path) -> None:
    before = Path(LLAMA, "config.json").read_bytes()
    assert refllm_command("info", LLAMA, stdout="closed") == (0, "", "")
    assert refllm_command("info", "/nowhere", stdout="closed", stderr="closed")[0] == 2
    code, _, error = refllm_command(
        "generate", LLAMA, "--ids", "1,2,3", "--max-new-tokens", "2", "--json", "F", stdout="closed"
    )
    assert (code, error) == (0, "")
    assert len(json.loads((tmp_path / "F").read_text())["new_ids"]) == 2
    assert Path(LLAMA, "config.json").read_bytes() == before  # nothing was printed into a file that came to be number 1


def test_a_full_standard_output_is_a_sentence(refllm_command: Any) -> None:
    code, _, error = refllm_command("info", LLAMA, stdout="/dev/full")
    assert code == 2
    assert error.count("\n") == 1
    assert "No space left on device" in error


def test_what_the_encoding_of_the_terminal_does_not_have_is_replaced(refllm_command: Any) -> None:
    code, out, _ = refllm_command("score", LLAMA, "--prompt", "\u00e9 \u2014 ok", encoding="ascii")
    assert code == 0
    assert "?" in out
    code, out, _ = refllm_command("score", LLAMA, "--prompt", "\u00e9 ok", "--json", "-", encoding="ascii")
    assert code == 0
    _, expected, _ = refllm_command("score", LLAMA, "--prompt", "\u00e9 ok", "--json", "-")
    assert json.loads(out) == json.loads(expected)  # JSON has escapes for it


NUMBERS = {
    "--top-p 2": "top_p=2.0 must lie in [0, 1]",
    "--top-p -1": "top_p=-1.0 must lie in [0, 1]",
    "--top-p nan": "top_p=nan must be a finite number",
    "--temperature 5e-324": "temperature=5e-324 must lie in [1e-30, 1e+30]",
    "--temperature 0": "temperature=0.0 must be greater than 0",
    "--temperature inf": "temperature=inf must be a finite number",
    "--top-k -1": "top_k=-1 must be at least 0",
    "--max-new-tokens 0": "max_new_tokens=0 must be an integer from 1",
    "--num-beams 0": "num_beams=0 must be an integer from 1",
    "--seed -1": "--seed -1 must be at least 0",
    "--repetition-penalty 0": "repetition_penalty=0.0 must be greater than 0",
    "--repetition-penalty 1e-320": "repetition_penalty=1e-320 must lie in [1e-30, 1e+30]",
    "--stop \udcff": "stop_strings is not Unicode text",
}
WINDOWS = {
    "--context 0": "--context 0 leaves nothing to score: it must be at least 2",
    "--context 1": "--context 1 leaves nothing to score: it must be at least 2",
    "--stride 0": "--stride 0 must be in 1..511, below the context of 512",
    "--stride -1": "--stride -1 must be in 1..511",
    "--stride 512": "--stride 512 must be in 1..511",
}


@pytest.mark.parametrize(("options", "said"), [*NUMBERS.items(), *WINDOWS.items()])
def test_a_number_out_of_range_is_refused_before_the_model_is_loaded(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "score" if options in WINDOWS else "generate"
    monkeypatch.setattr(sys, "argv", ["refllm", command, LLAMA, "--ids", "1,2,3", *options.split()])
    monkeypatch.setattr(refllm, "load", None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"])
def test_probabilities_beyond_one_are_refused_of_a_caller_and_read_from_a_published_file(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}=1.5 must lie in \[0, 1\]"):
        GenerationConfig(**{name: 1.5})
    model = refllm.load(LLAMA)
    with pytest.raises(InputError, match=rf"{name}=1.5 must lie in"):
        model.generate(IDS, max_new_tokens=1, **{name: 1.5})
    published = GenerationConfig.from_dict({name: 1.5})  # loads, as in Transformers, and is not used without sampling
    model.generate(IDS, generation_config=published, max_new_tokens=1, do_sample=False)
    with pytest.raises(InputError, match=rf"{name}=1.5 must lie in"):
        model.generate(IDS, generation_config=published, max_new_tokens=1, do_sample=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_bias": {(3,): 1e39}},
        {"sequence_bias": {(3,): 10**400}},
        {"encoder_repetition_penalty": 1e300},
        {"repetition_penalty": 5e-324},
        {"do_sample": True, "temperature": 1e31},
    ],
)
def test_numbers_that_no_score_can_be_changed_by_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        refllm.load(LLAMA).generate(IDS, max_new_tokens=1, **settings)
    assert one_sentence(caught.value)


def test_a_decay_beyond_all_numbers_only_ends_the_text() -> None:
    model = refllm.load(LLAMA)
    out = model.generate(IDS, max_new_tokens=4, exponential_decay_length_penalty=(0, 1e300), eos_token_id=2)
    assert out.shape[1] <= 8
    model.generate(IDS, max_new_tokens=4, exponential_decay_length_penalty=(0, -1e300), eos_token_id=2)


def test_no_other_module_writes_a_file_of_the_users() -> None:
    """Except lines that are meant to be read while they come, and what lies in temporary folders."""
    allowed = {"refllm/storage/output_file.py", "refllm/bench/gpu_checks.py", "refllm/bench/pytest_rows.py"}
    allowed |= {"refllm/apart.py", "refllm/text/template_worker.py"}  # ends of pipes
    writing = re.compile(r"""\.write_text\(|\.write_bytes\(|\bsave_file\(|\bopen\([^)]*["'][wxa]\+?b?["']""")
    root = Path(__file__).parents[2]
    found = {
        str(path.relative_to(root))
        for folder in ("refllm", "kernels", "golden")
        for path in (root / folder).rglob("*.py")
        if writing.search(path.read_text(encoding="utf-8"))
    }
    assert found <= allowed, found - allowed
    assert "refllm/storage/output_file.py" in found
