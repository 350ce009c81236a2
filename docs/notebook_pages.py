"""Pages of the site from the notebooks in docs/notebooks, with the outputs that stand in them."""

import base64
import json
from pathlib import Path

from mkdocs.structure.files import File

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"


def on_files(files, config):
    """Add a page for each notebook, and its figures."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, figures = page_of(notebook)
        uri = f"notebooks/{notebook.stem}"
        files.append(File.generated(config, f"{uri}.md", content=text))
        for number, figure in enumerate(figures, start=1):
            files.append(File.generated(config, f"{uri}-{number}.png", content=figure))
    return files


def page_of(notebook):
    """Return the Markdown of a notebook, and the figures that it names."""
    parts, figures = [], []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append("```text\n" + "".join(output["text"]).rstrip() + "\n```")
            elif "image/png" in output["data"]:
                figures.append(base64.b64decode(output["data"]["image/png"]))
                parts.append(f"![Figure {len(figures)}]({notebook.stem}-{len(figures)}.png)")
    title, *rest = parts
    name = notebook.name
    return "\n\n".join([title, f"This page is the notebook [{name}]({name}).", *rest]), figures
