"""Who may import whom (the contracts in pyproject.toml), the picture of it, and the public names."""

import re
from importlib import import_module
from pathlib import Path

import check_imports
import draw_house
import installed_layout
import pytest

import refllm
from refllm.config import CONFIG_CLASSES
from refllm.models.families import CLASSES
from refllm.ops.contracts import OPERATORS

ROOT = installed_layout.ROOT
MODULES = [*installed_layout.modules()]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PLANTED = {
    "refllm/ops/norm.py": "from refllm.storage import input_file",
    "refllm/kernels/launch.py": "import refllm.check.taps",
    "refllm/golden/cases.py": "import refllm.check.run as run",
    "refllm/storage/json_text.py": "from refllm import forward",
    "refllm/opcheck/search.py": "from refllm.commands import cli",
    "refllm/accuracy/judge.py": "from refllm.text import tokenizer",
    "refllm/ops/rope.py": "import refllm.terminal.streams",
}
"""Where it is installed -> an import that no contract allows."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    laid_out = tmp_path_factory.mktemp("installed")
    installed_layout.lay_out(laid_out)
    return laid_out


def test_every_room_imports_only_from_below(tree: Path) -> None:
    result = check_imports.check(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Analyzed {len(MODULES)} files" in result.stdout


def test_an_import_from_above_is_found_also_inside_a_function(tmp_path: Path) -> None:
    installed_layout.lay_out(tmp_path)
    for module, line in PLANTED.items():
        text = (tmp_path / module).read_text()
        (tmp_path / module).unlink()  # a link: the file itself stays as it is
        (tmp_path / module).write_text(f"{text}\n\ndef planted():\n    {line}\n")
    result = check_imports.check(tmp_path)
    assert result.returncode != 0
    assert " 0 kept, 3 broken" in result.stdout
    for module, line in PLANTED.items():
        name = module.removesuffix(".py").replace("/", ".")
        imported = line.split()[1] if line.startswith("import") else "refllm"
        assert f"{name} -> {imported}" in result.stdout, module


def test_a_room_without_a_storey_is_found(tmp_path: Path) -> None:
    installed_layout.lay_out(tmp_path)
    (tmp_path / "refllm" / "cellar.py").write_text('"""A new room."""\n')
    result = check_imports.check(tmp_path)
    assert result.returncode != 0
    assert "cellar" in result.stdout


def test_picture_of_the_house_is_up_to_date() -> None:
    assert draw_house.PICTURE.read_text() == draw_house.picture(), "make house draws it again"


def test_picture_draws_an_import_unless_a_longer_way_implies_it() -> None:
    edges = {("a", "b"), ("b", "c"), ("c", "d"), ("a", "c"), ("a", "d"), ("a", "e")}
    assert draw_house.needed(edges) == {("a", "b"), ("b", "c"), ("c", "d"), ("a", "e")}


def test_contributing_lists_every_room_by_storey() -> None:
    assert re.findall(r"^\| `(\w+)` \|", CONTRIBUTING, re.MULTILINE) == sum(draw_house.storeys(), [])  # noqa: RUF017


def test_contributing_lists_every_make_target() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^\| `make ([a-z-]+)` \|", CONTRIBUTING, re.MULTILINE) == targets


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_files_and_modules_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"\b(?:refllm|kernels|golden|tests|docs)/[\w./*-]*\w", text))
    modules = set(re.findall(r"\brefllm(?:\.[a-z_]+)+\b(?!\()", text))
    assert paths
    assert [path for path in paths if not [*ROOT.glob(path)]] == []
    assert modules
    assert [name for name in modules if not _found(name)] == []


def _found(name: str) -> bool:
    """Whether it is a module, or what follows a module that is one: `refllm.kernels.mutants.built`, `refllm.load`."""
    known = {".".join(installed.with_suffix("").parts).removesuffix(".__init__") for installed, _ in MODULES}
    parent, _, last = name.rpartition(".")
    return name in known or (parent in known and hasattr(import_module(parent), last))


PUBLIC = {
    "refllm": refllm.__all__,
    "refllm.check": ("assert_matches", "assert_operator", "check_op", "compare"),
    "refllm.config": [cls.__name__ for cls in CONFIG_CLASSES.values()],
    "refllm.golden": ("checkpoints", "corpus", "path", "trained"),
    "refllm.kernels": (*OPERATORS, "interpreted", "patch", "plain", "register", "unpatch"),
    "refllm.kernels.mutants": ("catalogue",),
    "refllm.kernels.mutants.built": ("rms_norm_no_eps",),
    "refllm.kernels.pytest_plugin": ("pytest_addoption", "triton_interpreter"),
    "refllm.kernels.transformers": ("patch", "register", "unpatch"),
    "refllm.kernels.verify": ("assert_meets_contract",),
    "refllm.ops": OPERATORS,
    "refllm.strategies": ("Array", "Call", "calls", "corners", "families"),
}
"""What the README and the docstrings of these modules show."""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay_importable(module: str) -> None:
    if module in ("refllm.kernels", "refllm.kernels.transformers", "refllm.kernels.verify"):
        pytest.importorskip("triton")
    names = [*PUBLIC[module]]
    assert names
    for name in names:
        assert getattr(import_module(module), name) is not None, name


CHANGED_LATER = {
    "refllm.check.adapters.torch_names.Names",
    "refllm.check.oracle.Report",
    "refllm.check.runs.Runs",
    "refllm.check.tap_report.TapReport",
    "refllm.check.trace.Trace",
    *(f"refllm.config.config.{name}" for name in ("ModelConfig", *(cls.__name__ for cls in CONFIG_CLASSES.values()))),
    "refllm.forward.outputs.ModelOutput",
    "refllm.generation.beam_search._Beams",
    "refllm.generation.config.GenerationConfig",
    "refllm.generation.decoding.Decoder",
    "refllm.generation.decoding.GenerateOutput",
    "refllm.generation.decoding.Recorder",
    "refllm.golden.exact.Golden",
    "refllm.golden.make_vectors.Made",
    "refllm.golden.verify.Verified",
    "refllm.kernels.interpreter.memory.Access",  # made at every load; a frozen one takes twice as long
    "refllm.kernels.interpreter.memory.Storage",
    "refllm.mutants.profiles.Planted",
    "refllm.mutants.runs.Outcome",
    "refllm.mutants.runs.Run",
    "refllm.mutants.validation.Case",
    "refllm.mutants.validation.Validation",
    "refllm.storage.load_report.LoadReport",
    "refllm.strategies.models.Ids",
    "refllm.strategies.models.WholeInput",
}
"""Records that are filled in, or that callers may change."""

NOT_IMPORTED = ("refllm.bench.", "refllm.kernels.transformers", "refllm.evaluation.harness")
"""The first two import Transformers as a whole, the last one a package that `make test` does not have."""


def test_a_record_is_frozen_unless_it_is_known_to_change() -> None:
    for package in ("torch", "triton", "hypothesis"):
        pytest.importorskip(package)
    names = {".".join(installed.with_suffix("").parts).removesuffix(".__init__") for installed, _ in MODULES}
    modules = [
        import_module(name) for name in names if not name.startswith(NOT_IMPORTED) and not name.endswith("__main__")
    ]
    classes = [cls for module in modules for cls in vars(module).values() if isinstance(cls, type)]
    records = [cls for cls in classes if "__dataclass_params__" in vars(cls) and cls.__module__ in names]
    changing = [cls for cls in records if not vars(cls)["__dataclass_params__"].frozen]
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in changing} == CHANGED_LATER


def test_refllm_has_load_the_tools_and_every_class_of_transformers() -> None:
    names = {"load", "pipeline", "AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "GenerationConfig"}
    assert {*names, *CLASSES, *(cls.__name__ for cls in CONFIG_CLASSES.values())} <= {*refllm.__all__}
