"""The site builds without a warning, its links and anchors lead somewhere, its search finds names.

It needs no server and nothing from other hosts.
"""

import html
import json
import os
import re
import subprocess
import sys
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from tests.docs.blocks import ROOT
from tests.docs.test_api import PATHS
from tests.docs.test_readme import REPOSITORY, SITE, named_file

pytest.importorskip("mkdocs", reason="a tool of `make docs`, absent beside the CPU-only torch")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """The HTML of each page, by its path."""
    return {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}


def references(text, attribute="href|src"):
    return [html.unescape(each) for each in re.findall(rf'\b(?:{attribute})="([^"]*)"', text)]


def test_links_and_anchors_lead_somewhere(site, pages):
    """Those that mkdocs checks, and those that it does not: in HTML, docstrings and the theme."""
    anchors = {path: set(references(text, "id|name")) for path, text in pages.items()}
    broken = []
    for path, text in pages.items():
        for link in references(text):
            target, anchor = urldefrag(link)
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            found = path if not target else (path.parent / unquote(target)).resolve()
            leads = found.exists() and (not anchor or unquote(anchor) in anchors[found])
            if not leads:
                broken.append((str(path.relative_to(site)), link))
    assert broken == []


def test_links_into_the_repository_name_files_that_exist(pages):
    links = {link for text in pages.values() for link in references(text) if REPOSITORY in link}
    assert len(links) > 3
    missing = []
    for link in links:
        path = named_file(link.rstrip("/")) if link.startswith(REPOSITORY) else None
        if path is not None and not path.exists():
            missing.append(link)
    assert missing == []


def test_nothing_comes_from_other_hosts(pages):
    """No script, style, font or picture, so that a page opened as a file is whole."""
    for path, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]*)\"", text)
        tags = re.findall(r"<link\b[^>]*>", text)
        loaded += [ref for tag in tags if 'rel="canonical"' not in tag for ref in references(tag)]
        outside = [each for each in loaded if urlsplit(each).scheme or each.startswith("//")]
        assert outside == [], path


def test_equations_are_drawn_without_a_script(pages):
    assert any("<math" in text for text in pages.values())
    for path, text in pages.items():
        assert 'class="arithmatex"' not in text, path


def test_a_search_finds_the_page_of_each_public_name(site):
    """A word of a title counts most. The API has a title for each name, and the name is a word."""
    index = json.loads((site / "search" / "search_index.json").read_text())
    titles = {entry["location"]: html.unescape(entry["title"]) for entry in index["docs"]}
    for path in PATHS:
        found = [
            location
            for location, title in titles.items()
            if location.startswith("api/") and re.search(rf"(?<![\w.]){re.escape(path)}\b", title)
        ]
        assert found, path
        page, anchor = urldefrag(found[0])
        assert f'id="{anchor}"' in (site / page).read_text()
        words = re.split(index["config"]["separator"], titles[found[0]])
        assert path.rpartition(".")[2] in words


def test_the_search_works_without_a_server(site):
    """The offline plugin writes the index as a script, which a page opened as a file may load."""
    script = (site / "search" / "search_index.js").read_text()
    assert script.startswith("var __index = ") and "pdp_mask" in script


def test_the_site_has_the_address_that_the_readme_links_to():
    assert f"site_url: {SITE}" in (ROOT / "mkdocs.yml").read_text()
