"""Pages from outside: those of docs/pages against Transformers' own models, planted bugs, faults of pages."""

import json
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_model

import refllm
from refllm import golden
from refllm.check import compare
from refllm.check.adapters.transformers import TransformersCandidate, quiet_transformers
from refllm.check.candidates import record
from refllm.check.formulas import formula
from refllm.check.inputs import Inputs
from refllm.check.oracle import Report, judge
from refllm.commands import cli
from refllm.config import AutoConfig
from refllm.errors import ConfigError, InputError
from refllm.forward.model import Model
from refllm.models.own_page import in_use
from refllm.mutants.in_pages import planted, possible
from refllm.mutants.models import of_own_pages
from refllm.mutants.validation import sharpness
from refllm.storage.checkpoint import Checkpoint, save_checkpoint

PAGES = Path(__file__).parents[2] / "docs" / "pages"
WINDOW = 9
IDS = np.random.default_rng(0).integers(3, 96, (1, 40))
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "mistral without a window": {"sliding_window": None},
    "qwen2": {},
    "qwen2 with a window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
}


def page_of(kind: str) -> Path:
    return PAGES / f"{kind.split()[0]}.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a small checkpoint of Transformers' own class, every tensor random."""
    quiet_transformers()

    @cache
    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind.split()[0], **SIZES, **KINDS[kind])
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if tensor.ndim == 2:
                    tensor.normal_(0, 1.0 if "embed" in name else tensor.shape[1] ** -0.5)
                else:
                    tensor.copy_((0.3 if name.endswith("bias") else 0.2) * torch.randn_like(tensor))
                    tensor += 0.0 if name.endswith("bias") else 1.0
        model.to(torch.bfloat16).save_pretrained(path)
        return path

    return make


def theirs(folder: Path, dtype: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def told(report: Report) -> str:
    return "\n".join(f"{report.inputs}: {tap.name} {tap.broken} {tap.untested}" for tap in report.taps if tap.broken)


# ----------------------------------------------------------------------------------------------- right ones, wrong ones


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen2 with a window", "olmo2"])
def test_the_page_is_what_transformers_computes(kind: str, folder: Callable[[str], Path]) -> None:
    ours = refllm.load(folder(kind), dtype="float64", page=page_of(kind))
    cache, pieces = ours.new_cache(), []
    with torch.inference_mode():
        expected = theirs(folder(kind), torch.float64)(torch.from_numpy(IDS)).logits.numpy()
    for part in (IDS[:, :23], IDS[:, 23:24], IDS[:, 24:]):
        pieces.append(ours(input_ids=part, past_key_values=cache).logits)
    assert np.abs(ours(IDS).logits - expected).max() < 1e-5  # its tables and norms are float32
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), ours(IDS).logits, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "dtype", "stress"),
    [
        ("mistral", "float32", False),
        ("mistral", "bfloat16", True),
        ("qwen2", "float32", True),
        ("qwen2", "bfloat16", False),
        ("qwen2 with a window", "bfloat16", False),
        ("olmo2", "bfloat16", False),
        ("olmo2", "float32", False),
    ],
)
def test_transformers_own_model_holds(kind: str, dtype: str, stress: bool, folder: Callable[[str], Path]) -> None:
    candidate = TransformersCandidate(theirs(folder(kind), getattr(torch, dtype)))
    for report in compare(folder(kind), candidate, dtype=dtype, input_ids=IDS, stress=stress, page=page_of(kind)):
        assert report.verdict == "holds", told(report)
        assert not [habit for habit in report.habits if habit.expected]  # it rounds as Transformers does


@pytest.mark.parametrize(
    ("kind", "mistake", "named"),
    [("mistral", "window", "window ignored"), ("qwen2", "bias", "biases of q, k and v dropped")],
)
def test_a_wrong_run_of_logits_alone_is_explained(
    kind: str, mistake: str, named: str, folder: Callable[[str], Path]
) -> None:
    model = theirs(folder(kind), torch.float32)
    if mistake == "window":
        model.config.sliding_window = None
    for name, tensor in model.named_parameters():
        tensor.data *= 0.0 if name.endswith(mistake) else 1.0

    def forward(checkpoint: str, input_ids: Any, attention_mask: Any, position_ids: Any, tap: Any) -> None:
        with torch.inference_mode():
            tap("lm_head", model(torch.from_numpy(input_ids)).logits.numpy())

    (report,) = compare(folder(kind), forward, input_ids=IDS, page=page_of(kind), explain=True)
    assert report.explanation is not None
    assert named in {cause.name for cause in report.explanation.causes}, report.explanation


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_bugs_in_transformers_model_are_named_first_at_the_right_operator(
    kind: str, folder: Callable[[str], Path]
) -> None:
    names = {
        "mistral": ["window one too wide", "window one too narrow", "window ignored", "theta times 10", "wrong eps"],
        "qwen2": ["q_proj bias dropped", "k_proj bias used for v", "gate and up swapped", "the other pairing of dims"],
    }[kind]
    with in_use(page_of(kind)):
        cases = sharpness({kind: folder(kind)}, [mutant for mutant in of_own_pages() if mutant.name in names])
    assert sorted(case.mutant for case in cases) == sorted(names)
    assert [(case.mutant, case.plain.reported) for case in cases if not case.plain.right] == []


@pytest.mark.parametrize(("kind", "dtype"), [("mistral", "bfloat16"), ("qwen2", "float32"), ("olmo2", "float32")])
def test_defects_planted_in_a_page_are_named_as_those_of_the_four_are(
    kind: str, dtype: str, folder: Callable[[str], Path]
) -> None:
    assert_named(refllm.load(folder(kind), dtype=dtype, policy="fused", page=page_of(kind)), least=12)


def assert_named(model: Model, least: int) -> None:
    defects = possible(model)
    assert len(defects) >= least
    for name, defect in defects.items():
        report = judge(
            model, record(planted(model, defect, layer=1), model, Inputs(IDS[:, :24] % model.config.vocab_size))
        )
        assert report.first_failure is not None, name
        assert report.first_failure.name in defect.reported_at(1), name


def test_defects_are_planted_in_the_pages_of_known_families_too() -> None:
    model = tiny_model("StableLmForCausalLM", dtype="float32", policy="fused", hidden_size=32, vocab_size=40)
    assert_named(model, least=14)
    with pytest.raises(InputError, match="without low_memory"):
        planted(refllm.load(golden.path("llama-tiny"), low_memory=True), possible(model)["sign of sin"], 1)


def test_a_formula_of_a_window_says_so_in_its_layers(folder: Callable[[str], Path]) -> None:
    config = refllm.load(folder("qwen2 with a window"), page=PAGES / "qwen2.py").config
    said = [
        f"the last {WINDOW} keys" in formula(f"model.layers.{i}.self_attn.probs", config).convention for i in (0, 1)
    ]
    assert said == [False, True]


def test_a_page_with_names_of_its_own_is_judged_at_them(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Qwen3, of Qwen2's page: norms of heads instead of biases."""
    text = (PAGES / "qwen2.py").read_text().replace('Traits("qwen2", "Qwen2"', 'Traits("qwen3", "Qwen3"')
    text = text.replace("use_qkv_bias = True", "head_dim: int = 128").replace(
        '            layer + "self_attn.v_proj.bias": (KV,),\n', ""
    )
    for letter, size, heads in (("q", "Q", "num_attention_heads"), ("k", "KV", "num_key_value_heads")):
        text = text.replace(f'{letter}_proj.bias": ({size},)', f'{letter}_norm.weight": (c.head_dim,)')
        split = f'op.split_heads(linear("self_attn.{letter}_proj", a_BSE), c.{heads})'
        assert split in text
        text = text.replace(split, f'norm("self_attn.{letter}_norm", {split})')
    (page := tmp_path / "qwen3.py").write_text(text)
    for dtype in ("float32", "bfloat16"):
        candidate = TransformersCandidate(theirs(folder("qwen3"), getattr(torch, dtype)))
        (report,) = compare(folder("qwen3"), candidate, dtype=dtype, input_ids=IDS, page=page)
        assert report.verdict == "holds", told(report)
        assert formula("model.layers.0.self_attn.q_norm", report.config).operator == "rms_norm"
    model = refllm.load(folder("qwen3"), policy="fused", dtype="bfloat16", page=page)
    report = judge(model, record(planted(model, possible(model)["sign of sin"], 1), model, Inputs(IDS)))
    assert report.first_failure is not None
    assert report.first_failure.name == "model.layers.1.self_attn.q_rope"


@pytest.mark.usefixtures("warm_python")
def test_a_page_goes_with_a_candidate_into_its_process(folder: Callable[[str], Path]) -> None:
    (report,) = compare(folder("mistral"), "numpy", dtype="bfloat16", input_ids=IDS, page=PAGES / "mistral.py")
    assert report.verdict == "holds", told(report)


# ---------------------------------------------------------------------------------------------- another family's page


def test_a_mistral_without_a_window_is_read_as_llama(folder: Callable[[str], Path]) -> None:
    path = folder("mistral without a window")
    with pytest.raises(ConfigError, match=r"it is llama exactly.*--page llama"):
        refllm.load(path)
    candidate = TransformersCandidate(theirs(path, torch.bfloat16))
    (report,) = compare(path, candidate, dtype="bfloat16", input_ids=IDS, page="llama")
    assert report.verdict == "holds", told(report)
    model, own = refllm.load(path, page="llama"), refllm.load(path, page=PAGES / "mistral.py")
    assert type(model).__name__ == "LlamaForCausalLM"
    np.testing.assert_array_equal(model(IDS).logits, own(IDS).logits)
    with pytest.raises(ConfigError, match="cannot be read as llama: sliding_window=9"):
        refllm.load(folder("mistral"), page="llama")
    with pytest.raises(ConfigError, match="cannot be read as llama: of q, k, v and o only"):
        refllm.load(folder("qwen2"), page="llama")


def test_tensors_that_the_page_never_reads_are_no_pass(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", dtype="float32", attention_bias=False, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)

    def verdict(**more: tuple[int, ...]) -> tuple[str, list[str]]:
        with Checkpoint.open(tmp_path) as checkpoint:
            tensors = {name: checkpoint.read(name) for name in checkpoint.names}
        added = {name.replace("__", "."): np.ones(shape, np.float32) for name, shape in more.items()}
        save_checkpoint(tmp_path, tensors | added, "float32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that they are not used
            (report,) = compare(tmp_path, "numpy", dtype="float32", input_ids=IDS % 23, isolate=False)
        return report.verdict, report.unseen

    assert verdict() == ("holds", [])
    assert verdict(model__layers__0__self_attn__rotary_emb__inv_freq=(2,)) == ("holds", [])
    assert verdict(score__weight=(2, 16)) == ("holds", [])
    names = {f"model__layers__{i}__self_attn__{letter}_proj__bias": (1,) for i in range(2) for letter in "qk"}
    found, (sentence,) = verdict(**names)
    kinds = "model.layers.*.self_attn.q_proj.bias, model.layers.*.self_attn.k_proj.bias"
    assert (found, sentence) == (
        "incomplete",
        f"4 tensors of the checkpoint never read by the page of llama: {kinds}",
    )


# ------------------------------------------------------------------------------------------------- what a page may be


def test_the_pages_are_short_and_their_use_leaves_nothing_behind(folder: Callable[[str], Path]) -> None:
    assert all(len(page.read_text().splitlines()) <= 90 for page in PAGES.glob("*.py"))
    with in_use(PAGES / "mistral.py"):
        model: Any = refllm.AutoModelForCausalLM.from_pretrained(folder("mistral"))
    with pytest.raises(ConfigError, match="model_type='mistral' must be one of"):
        AutoConfig.from_pretrained(folder("mistral"))
    assert model.config.window(0) == WINDOW
    assert model.generate(IDS, max_new_tokens=3).shape == (1, 43)
    with pytest.raises(InputError, match="a page of your own runs on numpy"):
        refllm.load(folder("mistral"), page=PAGES / "mistral.py", backend="torch")


def test_nothing_of_a_checkpoint_is_executed(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for file in folder("mistral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_mistral.MistralForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "modeling_mistral.py").write_text("raise SystemExit('it ran')\n")
    assert refllm.load(tmp_path, page=PAGES / "mistral.py")(IDS).logits.shape == (1, 40, 96)


ATTENTION = "op.attention(q_BHSD, k_BKTD, v_BKTD, **masking)"
WRONG_PAGES = [
    (
        "import of what is not there",
        "from refllm.config import LlamaConfig",
        "import nothing_such",
        "raises ModuleNotF",
    ),
    ("no Python", "def tensors(c):", "def tensors(c:", "raises SyntaxError"),
    ("no tensors", "def tensors(c):", "def tensor(c):", "it has no tensors; a page has TRAITS, Config, tensors, "),
    (
        "traits of another kind",
        'TRAITS = Traits("mistral", "Mistral", rounds_before_weight=True)',
        "TRAITS = {}",
        "TRAITS must be",
    ),
    ("unknown norm", "rounds_before_weight=True)", "norm='batch')", "TRAITS: norm='batch' is not known"),
    ("unknown trait", "rounds_before_weight=True)", "sliding=True)", "raises TypeError"),
    ("unknown head", "rounds_before_weight=True)", "heads=('lm',))", "TRAITS: heads has 'lm'"),
    (
        "wrong trait",
        "rounds_before_weight=True)",
        "rounds_before_weight=True, gated=False)",
        "TRAITS: gated=False, but the page computes gated=True",
    ),
    ("wrong pairing", "interleaved=False)", "interleaved=True)", "TRAITS: interleaved=False, but the page computes"),
    (
        "arithmetic",
        "    a_BSE = norm",
        "    x_BSE = x_BSE * 2\n    a_BSE = norm",
        "multiply of a value of the model; every",
    ),
    (
        "a point",
        "\n\ndef tensors",
        "NOT_ROUNDED = {'norm'}\n\n\ndef tensors",
        "NOT_ROUNDED: 'norm' is no rounding point",
    ),
    (
        "rounding",
        ", rounds_before_weight=True",
        "",
        "rounds_before_weight=False means that NOT_ROUNDED has",
    ),
    ("no config", "class Config(LlamaConfig)", "class Config", "Config must be a class of refllm.config"),
    (
        "unknown annotation",
        "sliding_window: int | None = 4096",
        "sliding_window: complex = 4096",
        "is annotated complex; use one",
    ),
    ("no embedding", '"embed_tokens.weight": (V, E)', '"embed.weight": (V, E)', "it lists no embed_tokens.weight"),
    (
        "a tensor that is not listed",
        'norm("input_layernorm"',
        'norm("first_norm"',
        "reads the tensor 'layers.0.first_norm.weight'",
    ),
    (
        "a tensor that is never read",
        'b_BSE = norm("post_attention_layernorm", x_BSE)',
        "b_BSE = a_BSE",
        "which forward never reads",
    ),
    (
        "shapes",
        '"mlp.up_proj.weight": (F, E)',
        '"mlp.up_proj.weight": (F, F)',
        "linear: the shapes do not fit: x [1, 3, 64]",
    ),
    ("an unknown operator", ATTENTION, ATTENTION.replace("attention", "flash"), "refllm.ops has no operator 'flash'"),
    (
        "a result without a name",
        f'op.tap("self_attn.context", {ATTENTION})',
        ATTENTION,
        "merge_heads reads a result that has no name",
    ),
    ("a name twice", '"self_attn.k_rope"', '"self_attn.q_rope"', "self_attn.q_rope is named twice"),
    (
        "a layer without its name",
        "op.tap(layer, block(",
        'op.tap(layer + ".out", block(',
        "forward names no model.layers.0",
    ),
    (
        "an error of its own",
        "    a_BSE = norm",
        "    1 / 0\n    a_BSE = norm",
        "raises ZeroDivisionError: division by zero",
    ),
    ("an unknown key", "c.rms_norm_eps))\n\n\ndef block", "c.eps))\n\n\ndef block", "has no attribute 'eps'"),
    (
        "nothing returned",
        "    return op.add(x_BSE, linear(",
        "    op.add(x_BSE, linear(",
        "model.layers.0 is a NoneType",
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), [c[1:] for c in WRONG_PAGES], ids=[c[0] for c in WRONG_PAGES])
def test_what_is_wrong_with_a_page_is_one_sentence_with_its_line(
    old: str, new: str, said: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    text = (PAGES / "mistral.py").read_text()
    assert old in text
    (page := tmp_path / "mine.py").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        refllm.load(folder("mistral"), page=page)
    sentence = str(caught.value)
    assert isinstance(caught.value, InputError | ConfigError)
    assert said in sentence
    if new != "def tensor(c):":
        assert sentence.startswith(f"{page}:")
        assert 0 < int(sentence.removeprefix(f"{page}:").split(":")[0]) <= len(text.splitlines()) + 1


def test_the_line_is_the_one_that_is_wrong(folder: Callable[[str], Path], tmp_path: Path) -> None:
    lines = (PAGES / "mistral.py").read_text().splitlines()
    wrong = next(i for i, line in enumerate(lines) if "up_BSF = linear" in line)
    lines[wrong] = lines[wrong].replace("b_BSE", "a_BSE[..., :3]")
    (page := tmp_path / "mine.py").write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        refllm.load(folder("mistral"), page=page)
    assert str(caught.value).startswith(f"{page}:")
    assert f":{wrong + 1}:" in str(caught.value) or "linear" in str(caught.value)


@pytest.mark.parametrize("command", ["check --candidate numpy", "info", "score", "generate", "trace -o t"])
def test_every_command_that_reads_a_checkpoint_takes_a_page_and_says_what_is_wrong_with_it(
    command: str,
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (page := tmp_path / "mine.py").write_text((PAGES / "mistral.py").read_text().replace("def block", "def blok"))
    name, *more = command.split()
    ids = [] if name == "info" else ["--ids", "5,6,7"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["refllm", name, str(folder("mistral")), *more, *ids, "--page", str(page)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == f"refllm: {page}: it has no block; a page has TRAITS, Config, tensors, forward, block\n"
    )


@pytest.mark.parametrize(
    ("page", "said"), [("qwen", "No such file"), (".", "Is a directory"), ("b.py", "b.py: it raises")]
)
def test_what_is_no_page_is_one_sentence(page: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.py").write_bytes(b"\0\xff")
    with pytest.raises(InputError, match=r"^[^\n]+$") as caught:
        refllm.load(golden.path("llama-tiny"), page=page)
    assert said in str(caught.value)


def test_info_shows_what_a_page_has(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["refllm", "info", str(folder("qwen2 with a window")), "--page", str(PAGES / "qwen2.py")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert "in 2 of 3 layers a query sees the last 9 keys" in shown
    assert "all as expected" in shown
    assert "fused in the torch" not in shown
