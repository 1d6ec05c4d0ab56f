"""A name of the Hugging Face hub is looked for in the local cache, laid out as huggingface_hub lays it out."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refllm import AutoConfig, AutoModelForCausalLM, AutoTokenizer, golden, load, pipeline
from refllm.check.run import folders_to_check
from refllm.errors import ConfigError, InputError, TokenizerError
from refllm.storage.hub_cache import cache_folder, local_folder

NAME, COMMIT, OLDER = "arcee-ai/tiny", "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model in shards, whose files are links to blobs, and an older one that is its config alone."""
    for variable in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "home" / "hub" / "models--arcee-ai--tiny"
    shutil.copytree(golden.path("arcee-tiny"), repository / "blobs")
    for commit, reference in ((COMMIT, "main"), (OLDER, "refs-of/one")):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in (repository / "blobs").iterdir():
            if file.is_file() and (commit == COMMIT or file.name == "config.json"):
                (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
        (repository / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    return tmp_path / "home" / "hub"


@pytest.mark.filterwarnings("ignore:.*factor=")
def test_everything_that_takes_a_folder_takes_a_name_that_is_cached(cache: Path) -> None:
    folder = golden.path("arcee-tiny")
    assert AutoConfig.from_pretrained(NAME) == AutoConfig.from_pretrained(folder)
    assert (
        AutoTokenizer.from_pretrained(NAME)("a b").input_ids == AutoTokenizer.from_pretrained(folder)("a b").input_ids
    )
    models = [AutoModelForCausalLM.from_pretrained(NAME, token=None), load(NAME), pipeline(model=NAME).model]
    assert all(np.array_equal(model([[1, 2]]).logits, load(folder)([[1, 2]]).logits) for model in models)
    assert models[0].generation_config == load(folder).generation_config
    assert folders_to_check(Path(NAME)) == [cache / "models--arcee-ai--tiny" / "snapshots" / COMMIT]


@pytest.mark.parametrize(
    ("name", "keywords", "commit"),
    [
        (NAME, {}, COMMIT),
        (f"https://huggingface.co/{NAME}", {"revision": None}, COMMIT),
        (NAME, {"revision": "refs-of/one"}, OLDER),
        (NAME, {"revision": OLDER}, OLDER),
    ],
)
def test_a_revision_is_a_branch_or_a_commit(cache: Path, name: str, keywords: dict[str, Any], commit: str) -> None:
    found = cache / "models--arcee-ai--tiny" / "snapshots" / commit
    assert local_folder(name, keywords) == found
    assert local_folder(name, {**keywords, "cache_dir": str(cache), "subfolder": "onnx"}) == found / "onnx"


@pytest.mark.parametrize(
    "keywords", [{"revision": "v2"}, {"revision": "c" * 40}, {"revision": "../refs/main"}, {"cache_dir": "elsewhere"}]
)
def test_what_is_not_cached_is_not_found(cache: Path, keywords: dict[str, Any]) -> None:
    escaped = keywords.get("revision") == "../refs/main"
    if escaped:  # its dots are dropped: nothing outside of refs is read
        (cache / "models--arcee-ai--tiny" / "refs" / "refs").mkdir()
    assert local_folder(NAME, keywords) == Path(NAME)


def test_a_folder_of_that_name_comes_first(cache: Path) -> None:
    (cache.parents[1] / NAME).mkdir(parents=True)
    assert local_folder(NAME) == Path(NAME)
    assert local_folder("arcee-ai/other") == Path("arcee-ai/other")


@pytest.mark.parametrize("read", [AutoConfig, AutoTokenizer, AutoModelForCausalLM])
def test_a_name_that_is_not_cached_is_a_sentence_that_names_the_cache(cache: Path, read: Any) -> None:
    with pytest.raises((ConfigError, TokenizerError)) as caught:
        read.from_pretrained("arcee-ai/AFM-4.5B")
    assert str(caught.value) == (
        f"arcee-ai/AFM-4.5B: there is no such folder, it is not in the Hugging Face cache ({cache}), and nothing is "
        "downloaded: if this is a model of the hub, 'hf download arcee-ai/AFM-4.5B' puts it into the cache"
    )
    with pytest.raises(InputError, match="nothing is downloaded"):
        folders_to_check(Path("arcee-ai/AFM-4.5B"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert cache_folder() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert cache_folder() == Path("/c")
