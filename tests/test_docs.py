"""The documentation: links lead somewhere, both READMEs say the same, flags.md is what the dataclasses say."""

import re
import runpy
from pathlib import Path

import pytest

from ms_diffusion import __version__

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "zh").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    local = [target for target in targets if not target.startswith("http")]
    for path, _, anchor in (target.partition("#") for target in local):
        linked = page.parent / path if path else page
        assert linked.exists(), path
        titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], anchor


def without_code(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_of(text: str) -> list[str]:
    """The programs and commands of a page, without their comments, which may be in the page's language."""
    fenced = re.findall(r"^```(?:bash|python)$.*?^```$", text, re.MULTILINE | re.DOTALL)
    blocks = fenced + re.findall(r"^ {4}\S.*", without_code(text), re.MULTILINE)
    return [re.sub(r" *# .*", "", block) for block in blocks]


def outline(text: str) -> list[str]:
    """What each heading, item of a list and row of a table begins with."""
    return re.findall(r"^(?:#+|\*|\d+\.|\|)(?= )", without_code(text), re.MULTILINE)


def test_both_readmes_have_the_same_figures_commands_and_pictures():
    english, chinese = ((ROOT / name).read_text().replace("docs/zh/", "docs/") for name in ("README.md", "README_zh.md"))
    for pattern in (r"(?<![\w.])\d[\d,.]*\d", r"docs/[\w.-]+", r"`[^`\n]*[./-][^`\n]*`"):
        assert set(re.findall(pattern, english)) == set(re.findall(pattern, chinese))
    assert code_of(chinese) == code_of(english)
    assert outline(chinese) == outline(english)
    assert max(text.count("\n") for text in (english, chinese)) <= 150


@pytest.mark.parametrize("page", [*(ROOT / "docs" / "zh").glob("*.md")], ids=lambda page: page.name)
def test_chinese_pages_have_the_outline_code_figures_and_formulas_of_the_english(page):
    english, chinese = ((ROOT / "docs" / page.name).read_text(), page.read_text())
    assert code_of(chinese) == code_of(english)
    assert outline(chinese) == outline(english)
    for pattern in (r"(?<![\w.])\d[\d,.]*\d", r"`([^`]+)`", r"^\$\$\n[^$]*\$\$$"):
        found = [re.findall(pattern, without_code(text), re.MULTILINE) for text in (chinese, english)]
        translated, known = ({" ".join(each.split()) for each in part if re.search(r"[\d./-]", each)} for part in found)
        assert translated == known


def test_flags_are_those_of_the_dataclasses():
    made = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))["render"]()
    assert made == (ROOT / "docs" / "flags.md").read_text(), "run python -m docs.make_flags"


def test_the_newest_release_is_this_version():
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [title.split()[0] for title in titles if title != "Unreleased"]
    assert released[0] == __version__
