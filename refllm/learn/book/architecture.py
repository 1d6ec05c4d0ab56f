"""A layer of a family as a drawing, made by running its page on shapes and writing down who reads whose result."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from refllm.forward.cache import NoCache
from refllm.forward.dry_run import DryOperators, DryWeights
from refllm.learn.book.drawing import CHARACTER, Drawing

_WIDTH, _HEIGHT, _ROW, _GAP = 186.0, 42.0, 78.0, 18.0
_MOVES = ("split_heads", "merge_heads")  # nothing is computed, so nothing is drawn


class Step:
    """One operator that a page calls. name: of its value. reads: the steps whose results it takes. says: its choices;
    depth: how many steps come before it at least; x: where it is drawn."""

    def __init__(self, operator: str, reads: list["Step"], says: str = "", name: str = "") -> None:
        self.operator, self.reads, self.says, self.name = operator, reads, says, name
        self.depth: int = 1 + max(step.depth for step in reads) if reads else 0
        self.x = 0.0


class _Writing(DryOperators):
    """The operators of a page on shapes, which write down every call."""

    def __init__(self, steps: list[Step], made: dict[int, tuple[Any, Step]]) -> None:
        super().__init__()
        self._steps, self._made = steps, made

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        public = not name.startswith("_") and name not in ("tap", "within", "scope", "called", "names")
        return self._writing(name, found) if public else found

    def tap(self, name: str, x: Any) -> Any:
        named = super().tap(name, x)
        step = self._made[id(x)][1]
        step.name = name if not step.name else step.name.rpartition(".")[0] + ".q_rope, k_rope"
        self._made[id(named)] = named, step
        return named

    def _writing(self, operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            sources = [self._made[id(x)][1] for x in arguments if id(x) in self._made]
            out = function(*arguments, **keywords)
            if operator in _MOVES:
                self._made[id(out)] = out, sources[0]
                return out
            step = Step(operator, _once(sources), _says(operator, arguments, keywords))
            self._steps.append(step)
            for one in out if isinstance(out, tuple) else (out,):
                self._made[id(one)] = one, step
            return out

        return called


def _once(steps: list[Step]) -> list[Step]:
    return [step for i, step in enumerate(steps) if all(step is not other for other in steps[:i])]


def _says(operator: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What a box says below its name."""
    match operator:
        case "linear":
            return f"{arguments[1].shape[1]} to {arguments[1].shape[0]}"
        case "rope":
            pairs = "pairs 2i, 2i+1" if keywords["interleaved"] else "pairs i, i+R/2"
            return f"{2 * arguments[2].shape[-1]} of {arguments[0].shape[-1]}, {pairs}"
        case "attention":
            return f"{arguments[0].shape[1]} heads on {arguments[1].shape[1]} k/v heads"
        case "glu":
            return f"{arguments[2]}(gate) up"
        case "activation":
            return str(arguments[1])
    return ""


def layer(page: Any, config: Any) -> list[Step]:
    """The steps of one layer in order, the first of them the stream that it reads."""
    x = np.broadcast_to(np.float32(0), (1, 3, config.hidden_size)).view(np.ndarray)
    table = np.broadcast_to(np.float32(0), (1, 3, config.rotary_dim // 2))
    stream = Step("", [], "residual stream", "x")
    steps = [stream]
    op = _Writing(steps, {id(x): (x, stream)})
    weights = DryWeights(page.tensors(config)).layer(0)
    page.block(op, config, weights, x, table, table, {"causal": True}, NoCache())
    return steps


def drawn(page: Any, config: Any, title: str) -> str:
    """The layer as SVG: the stream runs down at the left, what is added to it goes beside it."""
    steps = layer(page, config)
    rows: dict[int, list[Step]] = {}
    for step in steps:
        rows.setdefault(step.depth, []).append(step)
    for depth in sorted(rows):
        _place(rows[depth])
    drawing = Drawing(title)
    last = steps[-1]
    for step in steps:
        for source in step.reads:
            drawing.line(_way(source, step))
    for step in steps:
        _box(drawing, step)
    drawing.line([(last.x, _top(last) + _HEIGHT), (last.x, _top(last) + _HEIGHT + 26)])
    drawing.words(last.x, _top(last) + _HEIGHT + 42, "to the next layer")
    return drawing.svg()


def _on_stream(step: Step) -> bool:
    return step.operator in ("", "add")


def _place(row: list[Step]) -> None:
    """Puts boxes below what they read, side by side where they would overlap; the stream stays at the left."""
    left = 8 + _WIDTH / 2
    beside = [step for step in row if not _on_stream(step)]
    for step in row:
        step.x = left
    first = left + _WIDTH + 3 * _GAP
    for step in beside:
        above = [source.x for source in step.reads if not _on_stream(source)]
        step.x = sum(above) / len(above) if above else first + 1.0 * (_WIDTH + _GAP)
    middle = sum(step.x for step in beside) / len(beside) if beside else 0
    wide = _WIDTH + _GAP
    if any(b.x - a.x < wide for a, b in pairwise(beside)):
        start = max(first, middle - wide * (len(beside) - 1) / 2)
        for i, step in enumerate(beside):
            step.x = start + wide * i


def _top(step: Step) -> float:
    return 10 + _ROW * step.depth


def _way(source: Step, step: Step) -> list[tuple[float, float]]:
    """Where a line runs from one box to the next: along the stream straight down; onto the stream from the side."""
    end = _top(step)
    if _on_stream(source) and _on_stream(step):
        return [(source.x, _top(source) + _HEIGHT), (step.x, end)]
    if _on_stream(step):
        return [
            (source.x, _top(source) + _HEIGHT),
            (source.x, end + _HEIGHT / 2),
            (step.x + _WIDTH / 2, end + _HEIGHT / 2),
        ]
    turn = end - 14
    if _on_stream(source):
        return [(source.x, _top(source) + _HEIGHT), (source.x, turn), (step.x, turn), (step.x, end)]
    if source.x == step.x:
        return [(source.x, _top(source) + _HEIGHT), (step.x, end)]
    return [(source.x, _top(source) + _HEIGHT), (source.x, turn), (step.x, turn), (step.x, end)]


def _box(drawing: Drawing, step: Step) -> None:
    x, y = step.x - _WIDTH / 2, _top(step)
    name = step.name.rpartition(".")[2] if "," not in step.name else "q_rope, k_rope"
    if step.operator == "add":
        name = step.name.rpartition(".")[2] or "x"
    kind = "box" if _on_stream(step) else "weights" if step.operator == "linear" or "norm" in step.operator else "step"
    drawing.box(x, y, _WIDTH, _HEIGHT, kind)
    drawing.words(step.x, y + 17, _short(name), kind="strong")
    drawing.words(step.x, y + 33, _short(step.says or step.operator))


def _short(text: str) -> str:
    most = int(_WIDTH / CHARACTER)
    return text if len(text) <= most else text[: most - 1] + "."
