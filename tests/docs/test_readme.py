"""README.md is short, reads well on a package index, and its links name what exists."""

import re

from tests.docs.blocks import ROOT

README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)\s]+)\)", README)

REPOSITORY = "https://github.com/pdp-kernels/pdp_kernels"
RAW = "https://raw.githubusercontent.com/pdp-kernels/pdp_kernels/main/"
SITE = "https://pdp-kernels.github.io/pdp_kernels/"


def test_it_is_short():
    assert len(README.encode()) <= 6 * 1024


def test_the_two_commands_come_first():
    assert README.index("make bench") < README.index("make test") < README.index("\n## ")


def test_links_are_absolute():
    assert len(LINKS) > 10
    assert [link for link in LINKS if not link.startswith("https://")] == []
    assert not re.search(r"<(a|img)\b|^\[[^]]+\]:", README, re.MULTILINE)  # the other ways to link


def test_links_into_the_repository_and_the_site_name_files_that_exist():
    for link in LINKS:
        path = named_file(link)
        assert path is None or path.exists(), link


def named_file(link):
    """Return the file of the tree that a link of the project names, or None for other links."""
    if link.startswith(RAW):
        return ROOT / link.removeprefix(RAW)
    if match := re.fullmatch(rf"{REPOSITORY}/(?:blob|tree)/main/([^#]+)(?:#.*)?", link):
        return ROOT / match[1]
    if link.startswith(SITE):
        page, _, anchor = link.removeprefix(SITE).partition("#")
        source = ROOT / "docs" / re.sub(r"\.html$", ".md", page or "index.md")
        if anchor:
            headings = re.findall(r"^#+ (.*)", source.read_text(), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link
        return source
    assert not link.startswith(REPOSITORY) or link == REPOSITORY, link
    return None
