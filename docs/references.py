"""Links of the site: a public name in code leads to its entry in the API, a paper to arXiv."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "pdp_kernels" / "__init__.py"

LEFT_ALONE = re.compile(
    r"(<a\b.*?</a>|<pre\b.*?</pre>|<h\d\b.*?</h\d>|<math\b.*?</math>)", re.DOTALL
)
NAME = re.compile(r"<code>((?:pdp_kernels\.)?(\w+)((?:\.\w+)?)(?:\([^<]*\))?)</code>")
PAPER = re.compile(r"\barXiv (\d{4}\.\d{5})\b")


def public_names():
    for statement in ast.parse(PACKAGE.read_text()).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "__all__":
            return set(ast.literal_eval(statement.value))
    raise ValueError(f"{PACKAGE} must assign __all__")


PUBLIC = public_names()


def on_page_content(content, page, config, files):
    """Link names and papers, except in links, headings and blocks of code."""
    pieces = LEFT_ALONE.split(content)
    pieces[::2] = [PAPER.sub(to_paper, NAME.sub(to_entry, piece)) for piece in pieces[::2]]
    return "".join(pieces)


def to_entry(match):
    text, name, attribute = match.groups()
    if name not in PUBLIC:
        return match[0]
    path = f"pdp_kernels.{name}{attribute}"
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'


def to_paper(match):
    return f'<a href="https://arxiv.org/abs/{match[1]}">{match[0]}</a>'
