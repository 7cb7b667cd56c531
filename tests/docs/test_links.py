"""Links of the Markdown files outside the site; those inside are checked when it is built."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PAGES = [*PROJECT.glob("*.md"), PROJECT / "cluster" / "deploy" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 200


def test_files_of_the_code_that_pages_name_are_there() -> None:
    named = {
        path
        for page in (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"))
        for path in re.findall(r"`((?:cluster|mining|vdg|cir|tests)/[\w./-]+\.py)`", page.read_text())
    }
    written_by_the_page = {"mining/thin.py"}  # what docs/extending.md adds
    assert len(named) > 30
    assert not [path for path in named - written_by_the_page if not (PROJECT / path).is_file()]
