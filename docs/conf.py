"""The documentation site: sphinx-build -W --keep-going -c docs . docs/_build (CONTRIBUTING.md).

The pages are plain Markdown, which a repository shows as well. docs/index.md is the navigation. The reference is made from
the public names of `ms_diffusion`, and formulas become MathML here, so that a page needs nothing from another server.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import get_type_hints

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
import ms_diffusion as md  # noqa: E402

project, author, release = "ms_diffusion", "ms_diffusion", md.__version__
html_title = f"ms_diffusion {release}"
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "docs/reference/*.rst"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"] + ["docs/_build"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
myst_dmath_allow_space = myst_dmath_allow_digits = False  # a dollar sign in prose is no formula
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_theme_options = {"footer_icons": []}
html_css_files = ["site.css"]
html_static_path = ["static"]
html_show_copyright = html_show_sphinx = html_copy_source = False
html_math_renderer = "mathml"

# The navigation: each heading of docs/index.md and the links of its list


def tree(caption, pages):
    """A part of the sidebar, of "title </path>" lines."""
    return "\n".join(["", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *pages, "```", ""])


def navigation():
    text, trees = (DOCS / "index.md").read_text(), [tree("", ["Contents </docs/index>"])]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        links = re.findall(r"^\* \[([^]]+)\]\(([^)]+)\)", section, re.MULTILINE)
        pages = [f"{title} </{(DOCS / page).resolve().relative_to(ROOT).with_suffix('')}>" for title, page in links]
        trees.append(tree(section.splitlines()[0], pages))
    return "".join(trees)


def add_navigation(app, docname, source):
    if docname == root_doc:
        source[0] += navigation()
    elif docname == "docs/reference":
        names = {
            module: ", ".join(f"{{py:obj}}`~ms_diffusion.{name}`" for name in names) for module, names in MODULES.items()
        }
        source[0] += "".join(f"\n* [{module}](reference/{module}.rst): {listed}" for module, listed in names.items()) + "\n"
        source[0] += tree("", [f"/docs/reference/{module}" for module in names])


# The reference: a page for each module that has public names

MODULES = {home: [name for name in md.__all__ if md._HOME_OF[name] == home] for home in sorted(set(md._HOME_OF.values()))}


def write_reference(app):
    folder = DOCS / "reference"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.rst"):
        if stale.stem not in MODULES:
            stale.unlink()
    for module, names in MODULES.items():
        path, text = folder / f"{module}.rst", "\n".join([module, "=" * len(module), "", *map(entry, names)])
        if not path.exists() or path.read_text() != text:  # Sphinx reads again what is newer than its last build
            path.write_text(text)


def entry(name):
    """The directive that documents a public name."""
    value = getattr(md, name)
    strip_ranges(value)
    if isinstance(value, dict | tuple):
        names = ", ".join(f"``{each}``" for each in value)
        what = "A table, to which your own may be added" if isinstance(value, dict) else "The names"
        return f".. py:data:: {name}\n   :module: ms_diffusion\n\n   {what}: {names}.\n"
    kind = "function" if not isinstance(value, type) else "exception" if issubclass(value, Exception) else "class"
    return f".. auto{kind}:: ms_diffusion.{name}\n"


def strip_ranges(value):
    """Leave the ranges out of a dataclass's annotations: docs/flags.md has them."""
    if hasattr(value, "__dataclass_fields__"):
        hints = get_type_hints(value)
        for each in (value, value.__init__):
            each.__annotations__ = {name: hints.get(name, hint) for name, hint in each.__annotations__.items()}


def escape(app, what, name, obj, options, lines):
    """Docstrings are prose with names in backticks: make reStructuredText of them, before napoleon reads Args."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", "\n".join(lines))
    parts[::2] = [re.sub(r"([*|\\]|_(?![A-Za-z0-9]))", r"\\\1", prose) for prose in parts[::2]]
    parts[1::2] = [code(" ".join(each.strip("`").split())) for each in parts[1::2]]
    # Of an attribute, napoleon takes the words before a colon in the first line for its type: let that be an empty comment
    lines[:] = ["..", ""] * (what == "attribute") + "".join(parts).split("\n")


def code(text):
    return f":py:obj:`~ms_diffusion.{text}`" if text in md.__all__ else f"``{text}``"


# Formulas, as MathML


def mathml(node, display):
    made = convert(node.astext(), display=display)
    if unknown := re.findall(r"\\[A-Za-z]+", made):
        logging.getLogger(__name__).warning("unknown in a formula: %s", " ".join(unknown), location=node)
    return made


def inline_math(self, node):
    self.body.append(mathml(node, "inline"))
    raise SkipNode


def block_math(self, node):
    self.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise SkipNode


def join_lines(app, docname, source):
    """A line break between Chinese characters is no space."""
    wide = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
    source[0] = re.sub(f"(?<={wide})\n(?={wide})", "", source[0])


def name_language(app, pagename, templatename, context, doctree):
    """A Chinese page says so, for its fonts and for screen readers."""
    if pagename.startswith("docs/zh/") or pagename.endswith("_zh"):
        context["language"] = "zh-CN"


def write_front_page(app, exception):
    if exception is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app):
    app.connect("builder-inited", write_reference)
    app.connect("source-read", add_navigation)
    app.connect("source-read", join_lines)
    app.connect("autodoc-process-docstring", escape, priority=100)  # napoleon has 500
    app.connect("html-page-context", name_language)
    app.connect("build-finished", write_front_page)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
