"""The HTML report of a run: one file that needs no network, light or dark as the reader's system is."""

from __future__ import annotations

from html import escape
from typing import Any

from . import chart
from .environment import device_name
from .report import LEGEND, cells, conditions, groups, headings, not_timed, verdict

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --paper: #ffffff;
  --shade: #f6f8fa; --ours: #b3324a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --paper: #0d1117; --shade: #161b22; --ours: #ff7b91; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: 1rem; } a { color: inherit; } .soft { color: var(--soft); }
.verdict { font-weight: 600; } .warning { color: var(--ours); }
pre { background: var(--shade); padding: .6rem .8rem; overflow-x: auto; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; width: 100%; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th:not(:first-child) { width: 6.5rem; }
thead th { border-bottom: 1px solid var(--line); color: var(--soft); font-weight: 600; }
tbody th { padding-top: .7rem; } tr.ours td { color: var(--ours); font-weight: 600; }
tr.absent td { color: var(--soft); }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; } figure svg text { fill: currentColor !important; }
"""


def html(records: list[dict[str, Any]]) -> str:
    """A section a result: verdict, chart, tables, conditions and the command that repeats it."""
    title = f"tilewright bench: {', '.join(record['family'] for record in records)}"
    links = (
        "".join(f'<a href="#{r["family"]}">{r["family"]}</a>' for r in records) if len(records) > 1 else ""
    )
    sections = "\n".join(map(_section, records))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(device_name(records[0]))}, {records[0]['date'][:10]}</p>\n"
        f"<nav>{links}</nav>\n{sections}\n"
        f'<h2>How to read this</h2>\n<p>{escape(LEGEND[0].upper() + LEGEND[1:])}.</p>\n'
        "<p>All contenders of a case run in one process and take turns; times are medians. "
        "In the charts a dot is a contender&#8217;s time over ours, its bar the middle half of its samples; "
        "a hollow one does other work and is there for scale.</p>\n</body>\n</html>\n"
    )  # fmt: skip


def _section(record: dict[str, Any]) -> str:
    lines = [f'<h2 id="{record["family"]}">{escape(record["family"])}</h2>']
    if not record["complete"]:
        lines.append('<p class="warning">Interrupted: these are the cases that were finished.</p>')
    lines += [f'<p class="verdict">{escape(line)}.</p>' for line in verdict(record)]
    lines.append(_figure(record))
    for group, cases in groups(record["cases"]).items():
        lines.append(f"<h3>{escape(group[:1].upper() + group[1:])}</h3>")
        lines.append(_table(record, cases))
    lines += [f'<p class="soft">{escape(line)}</p>' for line in not_timed(record)]
    lines.append(f'<p class="soft">{escape(conditions(record))} To repeat it:</p>')
    lines.append(f"<pre>{escape(record['command'])}</pre>")
    return "\n".join(line for line in lines if line)


def _figure(record: dict[str, Any]) -> str:
    if not chart.shown(record):
        return ""
    try:
        return f"<figure>{chart.svg(record)}</figure>"
    except ImportError:
        return '<p class="soft">No chart: matplotlib was not installed (pip install matplotlib).</p>'


def _table(record: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    columns = headings(record)
    head = "".join(f'<th scope="col">{heading}</th>' for heading in columns)
    rows = []
    for case in cases:
        rows.append(f'<tr><th scope="rowgroup" colspan="{len(columns)}">{escape(case["title"])}</th></tr>')
        for name, row in case["contenders"].items():
            kind = "absent" if row["status"] != "ok" else "ours" if name == "tilewright" else ""
            values = "".join(f"<td>{escape(cell)}</td>" for cell in (name, *cells(name, row, record)))
            rows.append(f'<tr class="{kind}">{values}</tr>')
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
