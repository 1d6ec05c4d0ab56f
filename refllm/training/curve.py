"""The loss of every step as a picture."""

from collections.abc import Sequence

WIDTH, HEIGHT, EDGE = 640, 320, 48
MOST_POINTS = 400


def loss_curve(losses: Sequence[float]) -> str:
    """SVG: the loss over steps, of long runs the mean of as many as share a point; the axes go from 0."""
    group = -(-len(losses) // MOST_POINTS)
    parts = [losses[at : at + group] for at in range(0, len(losses), group)] if losses else []
    means = [sum(part) / len(part) for part in parts]
    top = max([*means, 1e-9])
    x = [EDGE + (WIDTH - 2 * EDGE) * (n + 1) / max(1, len(means)) for n in range(len(means))]
    y = [HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * mean / top for mean in means]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    left, right, low, high = EDGE, WIDTH - EDGE, HEIGHT - EDGE, EDGE
    last = f"{means[-1]:.3f}" if means else ""
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {box}>
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<path d="M{left} {high}V{low}H{right}" fill="none" stroke="#888"/>
<polyline points="{points}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>
<text x="{left}" y="{high - 8}">loss, nats per token, at most {top:.3f}; last {last}</text>
<text x="{right}" y="{low + 18}" text-anchor="end">{len(losses)} steps</text>
<text x="{left}" y="{low + 18}">0</text>
</svg>
"""
