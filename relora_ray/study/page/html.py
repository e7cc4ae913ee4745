"""The page: one HTML file that asks nobody for anything.

All that comes from runs is escaped where it is put in. Besides, the page carries a policy by which a browser runs its
own two scripts, known by their digests, and nothing else, and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from importlib.util import find_spec

from relora_ray.cli import printable
from relora_ray.errors import ConfigError
from relora_ray.masking import masked
from relora_ray.study.page.chart import COLOURS, X_NAMES, Chart
from relora_ray.study.page.contents import Contents, Table


def render(page: Contents) -> str:
    scripts = [_plotly(), _own("page.js")]
    drawing = {
        "charts": [{"run": c.run, "variants": [figure for _, figure in c.variants]} for c in page.charts],
        "x_names": X_NAMES,
    }
    # With no `<` a text can neither end the element nor begin a comment in it.
    data = json.dumps(drawing, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    body = "\n".join(_body(page))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{_text(page.title)}</title>
<style>
{_own("page.css")}</style>
</head>
<body>
{body}
<script type="application/json" id="page-data">{data}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def _policy(scripts: Iterable[str]) -> str:
    known = " ".join(f"'sha256-{base64.b64encode(sha256(s.encode()).digest()).decode()}'" for s in scripts)
    # unsafe-eval: plotly compiles the drawing of parallel coordinates.
    return (
        f"default-src 'none'; script-src {known} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def find_plotly() -> None:
    """ConfigError if it is not installed: call it before anything is read."""
    if find_spec("plotly") is None:
        raise ConfigError("--html draws with plotly, which is not installed: pip install 'relora-ray[report]'.")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _own(name: str) -> str:
    return files("relora_ray.study.page").joinpath(name).read_text(encoding="utf-8")


def _text(text: object) -> str:
    return escape(printable(masked(str(text))))


def _body(page: Contents) -> Iterable[str]:
    yield f"<header><h1>{_text(page.title)}</h1>"
    yield (
        '<label class="theme">theme <select id="theme"><option value="">system</option><option>light</option>'
        "<option>dark</option></select></label></header>"
    )
    yield "<main>"
    for line in page.lead:
        yield f'<p class="lead">{_text(line)}</p>'
    if page.tiles:
        tiles = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in page.tiles)
        yield f'<dl class="tiles">{"".join(tiles)}</dl>'
    for line in page.warnings:
        yield f'<p class="warning">{_text(line)}</p>'
    for table in page.tables:
        yield from _table(table)
    yield from _controls(page)
    chosen = next((c.run for c in page.charts if c.run is not None), None)
    for number, chart in enumerate(page.charts):
        if chart.run is not None and chart.run == chosen and len(page.detailed) > 1:
            chosen = None
            options = (f'<option value="{i}">{_text(page.run_names[i])}</option>' for i in page.detailed)
            yield f'<label class="of">details of <select id="run">{"".join(options)}</select></label>'
        yield from _chart(number, chart)
    for table in page.details:
        yield from _table(table)
    for line in page.foot:
        yield f'<p class="foot">{_text(line)}</p>'
    yield "</main>"


def _controls(page: Contents) -> Iterable[str]:
    if not page.run_names:
        return
    yield '<nav class="controls">'
    options = "".join(f'<option value="{name}">{X_NAMES[name]}</option>' for name in page.x_names)
    yield f'<label>x axis <select id="x">{options}</select></label>'
    if len(page.run_names) > 1:
        for number, name in enumerate(page.run_names):
            colour = COLOURS[number % len(COLOURS)]
            yield (
                f'<button class="run" data-run="{number}" aria-pressed="true"><i style="background:{colour}"></i>'
                f"{_text(name)}</button>"
            )
    yield "</nav>"


def _chart(number: int, chart: Chart) -> Iterable[str]:
    run = "" if chart.run is None else f' data-run="{chart.run}"'
    yield f'<section class="chart"{run}><h2>{_text(chart.title)}</h2>'
    if len(chart.variants) > 1:
        options = (f'<option value="{i}">{_text(name)}</option>' for i, (name, _) in enumerate(chart.variants))
        yield f'<select class="variant" data-chart="{number}" aria-label="what is drawn">{"".join(options)}</select>'
    yield f'<div class="plot" id="chart-{number}" style="height:{chart.height}px"></div>'
    yield f'<p class="note">{_text(chart.note)}</p></section>'


def _table(table: Table) -> Iterable[str]:
    run = "" if table.run is None else f' data-run="{table.run}"'
    yield f"<section{run}><h2>{_text(table.title)}</h2>"
    if table.rows:
        yield '<div class="scroll"><table><thead><tr>'
        yield _cells("th", table.columns)
        yield "</tr></thead><tbody>"
        for row in table.rows:
            yield f"<tr>{_cells('td', row)}</tr>"
        yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{_text(table.note)}</p>'
    yield "</section>"


def _cells(tag: str, row: Sequence[object]) -> str:
    def cell(value: object) -> str:
        return f'<{tag} class="{"short" if len(str(value)) <= 24 else "long"}">{_text(value)}</{tag}>'

    return "".join(map(cell, row))
