"""The embedded checkpoints are what golden/README.md says, load in Transformers, and are made again byte for byte."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from refllm import golden, load
from refllm.check.run import folders_to_check
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.golden import train_checkpoints
from refllm.storage.checkpoint import Checkpoint
from refllm.text.tokenizer import AutoTokenizer

NAMES = sorted(golden.checkpoints())
TRAINED = sorted(golden.trained())
MEGABYTE = 1_000_000


def config_of(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arcee-tiny: its yarn factor is odd on purpose
        return AutoConfig.from_pretrained(golden.path(name))


@cache
def theirs(name: str) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        golden.path(name), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@cache
def outputs(name: str) -> Any:
    """Transformers' outputs on 128 tokens of the corpus, in float32."""
    ids = AutoTokenizer.from_pretrained(golden.path(name)).encode(golden.corpus(), truncation=True, max_length=128)
    with torch.no_grad():
        return theirs(name)(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)


def test_there_is_one_of_every_family() -> None:
    assert {config_of(name).model_type for name in NAMES} == {"helium", "llama", "stablelm", "arcee"}


@pytest.mark.parametrize("name", NAMES + TRAINED)
def test_transformers_loads_every_tensor(name: str) -> None:
    config = transformers.AutoConfig.from_pretrained(golden.path(name))
    assert config.architectures == [type(theirs(name)).__name__]
    assert str(config.dtype).removeprefix("torch.") == config_of(name).dtype


@pytest.mark.parametrize("name", NAMES + TRAINED)
def test_tokenizer_fits_the_model(name: str) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(golden.path(name)), config_of(name)
    assert len(tokenizer) <= config.vocab_size
    assert max(tokenizer.get_vocab().values()) < config.vocab_size
    assert tokenizer.bos_token_id == config.bos_token_id
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert tokenizer.eos_token_id in stops
    assert tokenizer.pad_token_id == config.pad_token_id
    ids = tokenizer.encode(golden.corpus(), verbose=False)
    assert len(golden.corpus()) / len(ids) > 1.9, "the tokenizer compresses its own training text"
    assert set(range(len(tokenizer))) - set(ids), "not every token occurs"
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_features_are_as_the_table_says() -> None:
    helium, llama, sequential, parallel, arcee = (
        config_of(name)
        for name in ("helium-tiny", "llama-tiny", "stablelm-tiny-sequential", "stablelm-tiny-parallel", "arcee-tiny")
    )
    assert helium.attention_bias
    assert helium.mlp_bias
    assert helium.rms_norm_eps == 1e-8
    assert helium.num_attention_heads // helium.num_key_value_heads == 3
    assert llama.rope_parameters["rope_type"] == "llama3"
    assert llama.tie_word_embeddings
    assert len(llama.eos_token_id) == 2
    assert (sequential.head_dim, sequential.rotary_dim) == (80, 20)
    assert not sequential.use_parallel_residual
    assert sequential.vocab_size > len(AutoTokenizer.from_pretrained(golden.path("stablelm-tiny-sequential")))
    assert parallel.use_parallel_residual
    assert parallel.qk_layernorm
    assert parallel.use_qkv_bias
    assert parallel.num_attention_heads // parallel.num_key_value_heads == 2
    assert (parallel.head_dim, parallel.rotary_dim) == (32, 8)
    rope = arcee.rope_parameters
    assert rope["rope_type"] == "yarn"
    assert rope["factor"] != arcee.max_position_embeddings / rope["original_max_position_embeddings"]
    assert arcee.num_attention_heads // arcee.num_key_value_heads == 5
    assert arcee.num_attention_heads * arcee.head_dim != arcee.hidden_size
    assert arcee.attention_bias
    assert arcee.mlp_bias
    dtypes = {config_of(name).dtype for name in NAMES}
    assert dtypes == {"bfloat16", "float16", "float32"}
    assert len(list(golden.path("arcee-tiny").glob("*.safetensors"))) == 3
    assert (golden.path("arcee-tiny") / "model.safetensors.index.json").exists()


def test_llama3_frequencies_are_in_all_three_bands() -> None:
    config = config_of("llama-tiny")
    rope, d = config.rope_parameters, config.head_dim
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, d, 2) / d)
    original = rope["original_max_position_embeddings"]
    kept = wavelengths < original / rope["high_freq_factor"]
    slowed = wavelengths > original / rope["low_freq_factor"]
    assert kept.any()
    assert slowed.any()
    assert (~kept & ~slowed).any()


def test_yarn_has_pairs_that_are_kept_and_pairs_that_are_slowed() -> None:
    frequencies = theirs("arcee-tiny").model.rotary_emb.inv_freq.numpy().astype(float)
    config = config_of("arcee-tiny")
    plain = 10000.0 ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    ratio = plain / frequencies
    assert np.isclose(ratio, 1.0, rtol=1e-5).any()
    assert np.isclose(ratio, 20.0, rtol=1e-5).any()
    assert ((ratio > 1.5) & (ratio < 19)).any()


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_trivial(name: str) -> None:
    with Checkpoint.open(golden.path(name)) as checkpoint:
        assert {checkpoint.dtype(tensor) for tensor in checkpoint.names} == {config_of(name).dtype}
        for tensor in checkpoint.names:
            values = checkpoint.read(tensor)
            assert np.isfinite(values).all()
            assert values.std() > 0.02, tensor
            assert (values == 0).mean() < 0.01, tensor
            if tensor.endswith("norm.weight") or ".norms." in tensor:
                assert abs(values.mean() - 1) < 0.7, tensor
                assert np.unique(values).size > 0.6 * values.size, tensor


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_lively(name: str) -> None:
    """Every layer moves the stream, attention chooses, the next token is neither certain nor uniform."""
    out = outputs(name)
    logits = out.logits[0].numpy()
    assert 2.0 < logits.std() < 4.0
    ordered = np.sort(logits, axis=-1)
    assert 0.2 < np.median(ordered[:, -1] - ordered[:, -2]) < 3.0
    assert len(set(logits.argmax(-1).tolist())) > 20, "the answer depends on the position"
    before = out.hidden_states[0]
    for after in out.hidden_states[1:-1]:
        assert 0.3 < ((after - before).std() / before.std()).item() < 10.0
        before = after
    for probabilities in out.attentions:
        late = probabilities[0, :, 60:].numpy()
        entropy = -(late * np.log(late + 1e-30)).sum(-1)
        assert 2.0 < np.exp(entropy.mean()) < 35.0, "attends to a few of about a hundred positions"


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_prompt_matters(name: str) -> None:
    ids = AutoTokenizer.from_pretrained(golden.path(name)).encode(golden.corpus(), truncation=True, max_length=128)
    shuffled = [*np.random.default_rng(0).permutation(ids[:-1]).tolist(), ids[-1]]
    with torch.no_grad():
        other = theirs(name)(torch.tensor([shuffled])).logits[0, -1]
    assert (other - outputs(name).logits[0, -1]).std() > 0.5


def test_sizes_stay_small() -> None:
    for name in NAMES:
        assert size_of(golden.path(name)) < 1.5 * MEGABYTE, name
    for name in TRAINED:
        assert size_of(golden.path(name)) < 1.2 * MEGABYTE, name
    assert size_of(golden.FOLDER) < 20 * MEGABYTE


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


@pytest.fixture(scope="module")
def made_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "-W", "ignore", "-m", "refllm.golden.make_checkpoints", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_making_them_again_gives_the_same_bytes(name: str, made_again: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    stored, made = files(golden.path(name)), files(made_again / name)
    assert stored.keys() == made.keys()
    assert [file for file in stored if stored[file] != made[file]] == []


def test_readme_lists_every_checkpoint_with_its_dtype() -> None:
    readme = (golden.FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"| {name} | {config_of(name).dtype}" in readme
    assert {config_of(name).dtype for name in TRAINED} == {train_checkpoints.DTYPE}
    assert all(f"| {name} |" in readme for name in TRAINED)


# -- those that have learnt the corpus ---------------------------------------------------------------------------------


def test_one_of_every_family_was_trained_and_none_is_checked_by_default() -> None:
    assert {config_of(name).model_type for name in TRAINED} == {"helium", "llama", "stablelm", "arcee"}
    assert set(train_checkpoints.recipes()) == set(TRAINED)
    assert not set(TRAINED) & set(NAMES)
    assert not {folder.name for folder in folders_to_check(None)} & set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_checkpoint_has_the_loss_that_readme_says_and_speaks_as_the_corpus(name: str) -> None:
    """From the first words of several paragraphs, most greedy continuations are the corpus'."""
    readme = (golden.FOLDER / "README.md").read_text()
    (stated,) = re.findall(rf"\| {name} \|.*\| (\d\.\d+) \|", readme)
    assert train_checkpoints.corpus_loss(golden.path(name)) == pytest.approx(float(stated), abs=6e-4)
    model, tokenizer = load(golden.path(name)), AutoTokenizer.from_pretrained(golden.path(name))
    paragraphs = [text for text in golden.corpus().split("\n\n") if len(text) > 200][:20:4]
    same = 0
    for text in paragraphs:
        begun = tokenizer(text[:60].rpartition(" ")[0], return_tensors="np")
        ids = model.generate(**begun, max_new_tokens=12, do_sample=False)[0]
        same += text.startswith(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert same > len(paragraphs) / 2


def test_readme_quotes_what_is_said() -> None:
    readme = (golden.FOLDER.parent / "README.md").read_text()
    command = (
        r"refllm generate golden/checkpoints/([\w-]+) --prompt \"(.*)\" --max-new-tokens (\d+) --greedy\n\n    (.*)\n"
    )
    ((name, prompt, tokens, stated),) = re.findall(command, readme)
    tokenizer = AutoTokenizer.from_pretrained(golden.path(name))
    begun = tokenizer(prompt, return_tensors="np")
    ids = load(golden.path(name)).generate(**begun, max_new_tokens=int(tokens), do_sample=False)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{prompt} {stated}"
    assert f"{prompt} {stated}" in golden.corpus()


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_makes_what_is_stored_but_for_the_numbers(name: str, tmp_path: Path) -> None:
    """A few steps of it: the same texts, tensors of the same shapes and dtypes, and it learns."""
    recipe = replace(train_checkpoints.recipes()[name], phases=((3, 2e-3), (1, 2e-4)))
    train_checkpoints.train(name, recipe, tmp_path)
    made, stored = ({str(f.relative_to(where)): f for f in where.rglob("*") if f.is_file()}
                    for where in (tmp_path, golden.path(name)))  # fmt: skip
    assert made.keys() == stored.keys()
    for file in stored.keys() - {"model.safetensors"}:
        assert made[file].read_bytes() == stored[file].read_bytes(), file
    with Checkpoint.open(tmp_path) as one, Checkpoint.open(golden.path(name)) as other:
        tensors = [{n: (c.shape(n), c.dtype(n)) for n in c.names} for c in (one, other)]
    assert tensors[0] == tensors[1]
    uniform = np.log(config_of(name).vocab_size)
    assert train_checkpoints.corpus_loss(tmp_path) < uniform - 0.1


def test_the_command_says_how_far_the_loss_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    short = replace(train_checkpoints.recipes()["llama-trained"], phases=((1, 1e-3),))
    monkeypatch.setattr(train_checkpoints, "recipes", lambda: {"llama-trained": short})
    monkeypatch.setattr("sys.argv", ["train_checkpoints", "--folder", str(tmp_path)])
    assert train_checkpoints.main() == 1
    assert "farther than 10% from what is stored: llama-trained" in capsys.readouterr().out


def test_json_files_are_standard_json() -> None:
    files = list(golden.FOLDER.rglob("*.json"))
    assert len(files) > len(NAMES)
    for file in files:
        json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # NaN and Infinity


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(
        InputError, match="'gpt2' is no embedded checkpoint; there are arcee-tiny, arcee-trained, helium-tiny"
    ):
        golden.path("gpt2")
