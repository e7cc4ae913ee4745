"""A page of the same for a browser: one HTML text, without scripts, that loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from relora_ray.study.live import View
from relora_ray.study.screen import fields, state_word

WIDTH, HEIGHT = 640, 120
MAX_POINTS = 1000

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h2{margin:1.5rem 0 .2rem}small{color:#666}table{border-collapse:collapse;margin:.5rem 0}
th{text-align:left;font-weight:normal;color:#666;padding-right:1rem;vertical-align:top;white-space:nowrap}
td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}progress{width:100%}svg{width:100%;height:auto}
polyline{fill:none;stroke:#1f77b4;stroke-width:1.5}.bad{color:#b00020}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}small,th{color:#999}}
"""


def page(rows: Sequence[tuple[str, View | str]], title: str, *, report: str) -> str:
    """`rows`: names of runs, and of each how it is or what is wrong. `report`: where all charts are."""
    body = "\n".join(_problem(name, found) if isinstance(found, str) else _run(found) for name, found in rows)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n"
        f'<p><a href="{escape(report)}">All charts and tables</a> of what is stored so far</p>\n</body></html>\n'
    )


def _run(view: View) -> str:
    rows = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in fields(view))
    return (
        f"<section><h2>{escape(view.name)} <small>{escape(view.kind)}, {escape(state_word(view))}</small></h2>"
        f'<small>{escape(view.url)}</small><br><progress max="{view.steps}" value="{view.step}"></progress>'
        f"{_curve(view.losses)}<table>{rows}</table></section>"
    )


def _problem(name: str, text: str) -> str:
    return f'<section><h2>{escape(name)}</h2><p class="bad">{escape(text)}</p></section>'


def _curve(losses: Sequence[float]) -> str:
    """Of at most `MAX_POINTS` of them, as a line."""
    every = max(1, -(-len(losses) // MAX_POINTS))
    shown = losses[::every]
    if len(shown) < 2:
        return ""
    low, span = min(shown), max(shown) - min(shown) or 1.0
    points = " ".join(
        f"{x * WIDTH / (len(shown) - 1):.1f},{HEIGHT - 4 - (loss - low) / span * (HEIGHT - 8):.1f}"
        for x, loss in enumerate(shown)
    )
    label = f"training loss, from {shown[0]:.4f} to {shown[-1]:.4f}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f'<polyline points="{points}"/></svg>'
    )
