"""What the site takes besides its pages: equations as MathML, and the figures of the studies."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_files(files, config):
    """Add every figure of studies/results/NAME as studies/NAME, beside the pages."""
    results = ROOT / "studies" / "results"
    for figure in sorted(results.glob("*/*.png")):
        uri = f"assets/studies/{figure.relative_to(results).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(figure)))
    return files


def on_page_content(content, page, config, files):
    """Write each equation as MathML, which browsers draw without a script."""
    return EQUATION.sub(as_mathml, content)


def as_mathml(equation):
    display = "block" if equation["tag"] == "div" else "inline"
    return convert(html.unescape(equation["latex"]), display=display)
