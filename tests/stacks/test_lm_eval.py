"""lm-evaluation-harness on tasks of local files: our numbers beside those of its own adapter of Transformers."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from refllm import golden
from refllm.errors import InputError
from refllm.evaluation.harness import RefllmLM, register
from refllm.evaluation.margins import Choice, predicted_variance

TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "written": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
SOFTMAX = ",softmax_dtype=float32"
"""Else the adapter of Transformers rounds log-probabilities to the format of the logits."""
Samples = dict[tuple[str, int], list[Any]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """A multiple choice, whole texts, and texts to write, from the introduction that the goldens ship."""
    folder = tmp_path_factory.mktemp("tasks")
    text = (Path(golden.path("llama-trained")).parents[1] / "corpus.txt").read_text()
    sentences = [s for s in re.split(r"(?<=\.)\s+", text) if len(s.split()) > 12]
    rng = np.random.default_rng(0)

    def some() -> list[str]:
        return sentences[int(rng.integers(len(sentences)))].split()

    files: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for _ in range(8):
        words = some()
        choices = [" ".join(words[6:9]), *(" ".join(some()[2:5]) for _ in range(2))]
        files["choice"].append({"question": " ".join(words[:6]), "choices": [*choices, choices[0]], "answer": 0})
    files["rolling"] = [{"text": " ".join(" ".join(some()) for _ in range(20))} for _ in range(2)]  # beyond a window
    files["written"] = [{"question": " ".join(some()[:6]), "answer": "none"} for _ in range(3)]
    for name, rows in files.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: refllm_{name}\n{where}{TASKS[name]}")
    return TaskManager(include_path=str(folder), include_defaults=False)


def samples(tasks: TaskManager, model: str, arguments: str) -> Samples:
    """(task, question) -> what the model answered."""
    register()
    names = [f"refllm_{name}" for name in TASKS]
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=tasks,
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )
    return {(task, s["doc_id"]): s["resps"] for task, every in found["samples"].items() for s in every}


def numbers(answers: list[Any]) -> Iterator[tuple[float, Any]]:
    """(log-likelihood, whether it is greedy, if that was asked)."""
    for (answer,) in answers:
        yield (answer[0], answer[1]) if isinstance(answer, (tuple, list)) else (answer, None)


@pytest.mark.parametrize("checkpoint", ["helium-trained", "llama-trained", "arcee-trained", "stablelm-trained"])
def test_the_numbers_are_those_of_transformers(tasks: TaskManager, checkpoint: str) -> None:
    how = f"pretrained={golden.path(checkpoint)},dtype=float32,max_length=64"
    theirs = samples(tasks, "hf", how)
    assert len(theirs) == 8 + 2 + 3
    for backend in ("torch", "numpy"):
        ours = samples(tasks, "refllm", f"{how},backend={backend}")
        assert ours.keys() == theirs.keys()
        for key in theirs:
            if key[0] == "refllm_written":
                assert ours[key] == theirs[key]
                continue
            for (a, greedy), (b, as_greedy) in zip(numbers(ours[key]), numbers(theirs[key]), strict=True):
                assert math.isclose(a, b, rel_tol=2e-6, abs_tol=2e-5), key
                assert greedy == as_greedy


def test_in_bfloat16_they_differ_by_what_rounding_explains_and_what_hangs_on_it_is_said(
    tasks: TaskManager, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden.path("llama-tiny")
    how = f"pretrained={folder},dtype=bfloat16,max_length=64"
    file = tmp_path / "margins.json"
    ours = samples(tasks, "refllm", f"{how},backend=torch,margins={file}")
    theirs = samples(tasks, "hf", how + SOFTMAX)
    said = json.loads(file.read_text())
    assert (said["dtype"], len(said["margins"])) == ("bfloat16", 16)
    # The right choice stands twice in every question, so where it wins nothing is between the two.
    twice = [m for m in said["margins"] if {m["best"], m["next"]} == {0, 3}]
    assert twice
    assert all(m["hangs"] and m["margin"] == 0 for m in twice)
    assert "hang on rounding in bfloat16" in capsys.readouterr().out
    assert not all(m["hangs"] for m in said["margins"])
    model = RefllmLM(folder, backend="numpy", dtype="bfloat16")
    variance = predicted_variance(folder, "bfloat16")
    sigmas = []
    for (task, question), answers in ours.items():
        if task != "refllm_choice":
            continue
        document = tasks.load(["refllm_choice"])["tasks"]["refllm_choice"].dataset["test"][question]
        pairs = zip(document["choices"], numbers(answers), numbers(theirs[task, question]), strict=True)
        for text, (a, _), (b, _) in pairs:
            before, after = model._pair(document["question"], " " + text)
            choice = Choice((*before, *after), len(after), a, len(text))
            sigmas.append((a - b) / math.sqrt(2 * variance(choice)))
    assert len(sigmas) == 32
    assert 0.2 < math.sqrt(np.mean(np.square(sigmas))) < 1.3
    assert max(map(abs, sigmas)) < 5


def test_wrong_arguments_are_one_sentence() -> None:
    folder = golden.path("llama-tiny")
    with pytest.raises(InputError, match="batch_size=auto: expected a number"):
        RefllmLM(folder, batch_size="auto")
    with pytest.raises(InputError, match="margins"):
        RefllmLM(folder, backend="numpy", margins="/nowhere/margins.json")
    with pytest.raises(InputError, match="backend"):
        RefllmLM(folder, backend="fast")
