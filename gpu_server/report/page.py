"""index.html: one file that shows everything, without JavaScript and without a request to anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .colours import AT_NIGHT
from .tables import Table

__all__ = ["GENERATOR_TAG", "Figure", "page"]

GENERATOR_TAG = '<meta name="generator" content="splitlora-server report">'
"""By which a page is known as a report's."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture on the page."""

    name: str
    """Of its files, without a suffix."""
    title: str
    svg: str
    """See `pictures.for_page`."""
    table: Table | None = None
    """The same in numbers, where these are few."""


def page(
    title: str,
    *,
    results: Table,
    words_on_results: str,
    differences: Table | None,
    alike: Table,
    figures: Sequence[tuple[str, Sequence[str], Sequence[Figure]]],
    left_out: Sequence[str],
) -> str:
    """
    Args:
        alike: settings that all runs have alike; one row each.
        figures: of each section the heading, what to know about it, and the pictures.
        left_out: sentences about runs that the report does not have.
    """
    about_results = f"<p>{escape(words_on_results)}</p>"
    sections = [_section("Results", _table("What came of each run", results) + about_results + _links("results", ("csv",)))]
    for heading, words, pictures in figures:
        shown = "".join(map(_figure, pictures))
        paragraphs = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in words)
        sections.append(_section(heading, paragraphs + (f'<div class="pictures">{shown}</div>' if shown else "")))
    settings = ""
    if differences is not None:
        settings = _table("Settings that differ", differences) + _links("settings", ("csv",))
    summary = "Settings that all runs have alike" if differences is not None else "Settings"
    is_open = "" if differences is not None else " open"
    settings += f"<details{is_open}><summary>{summary}</summary>{_table(summary, alike)}</details>"
    sections.append(_section("Settings", settings))
    missing = f'<div class="left-out" role="note"><p>Left out:</p>{_list(left_out)}</div>' if left_out else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{GENERATOR_TAG}
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_style()}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{missing}
{"".join(sections)}
</main>
</body>
</html>
"""


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>\n"


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _table(caption: str, table: Table) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in table.rows
    )
    # Who uses the keyboard can scroll what has the focus.
    caption = escape(caption)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>\n{rows}</tbody></table></div>\n"
    )


def _figure(figure: Figure) -> str:
    table = f"<details><summary>In numbers</summary>{_table(figure.title, figure.table)}</details>" if figure.table else ""
    caption = f"<figcaption>{_links(figure.name, ('svg', 'png', 'csv'))}</figcaption>"
    return f'<figure class="{figure.name}">\n{figure.svg}\n{caption}{table}</figure>\n'


def _links(name: str, suffixes: Sequence[str]) -> str:
    links = " · ".join(f'<a href="{name}.{suffix}" download>{name}.{suffix}</a>' for suffix in suffixes)
    return f'<p class="files">{links}</p>'


def _style() -> str:
    by_day = "".join(f"--c{place}:{colour};" for place, colour in enumerate(AT_NIGHT))
    by_night = "".join(f"--c{place}:{colour};" for place, colour in enumerate(AT_NIGHT.values()))
    return f"""
:root {{ {by_day} --link: #0058a0; --band: #f4f6f8; }}
@media (prefers-color-scheme: dark) {{ :root {{ {by_night} --link: #7cc0ff; --band: #1f242a; }} }}
@media print {{ :root {{ {by_day} }} .files, summary {{ display: none; }} }}
{CSS}"""


CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--c0); color: var(--c1); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, ul { max-width: 46rem; margin: .4rem 0; }
a { color: var(--link); }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--c3); white-space: nowrap; }
th { font-weight: 600; }
thead th { color: var(--c2); font-weight: 500; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--c0); }
tbody tr:nth-child(even) > * { background: var(--band); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 33rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; min-width: 0; max-width: 40rem; }
figure.time { max-width: 52rem; }
figure svg { display: block; width: 100%; height: auto; }
.files { font-size: .85rem; color: var(--c2); }
details { margin: .75rem 0; }
summary { cursor: pointer; }
.left-out { border-left: 4px solid #d9822b; padding: .2rem 1rem; background: var(--band); }
"""
