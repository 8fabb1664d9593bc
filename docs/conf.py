"""The documentation site: ``make docs`` builds it into build/docs, with warnings as errors and without network."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import mixfeat

project = "mixfeat"
version = release = mixfeat.__version__
html_title = f"mixfeat {version}"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["math.css"]
html_copy_source = html_show_sphinx = html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False

# Pages of the navigation, under the page that lists them. They are added here, as GitHub would show the directive.
_PAGES = {
    "index": {
        "To begin with": ("install", "status", "quickstart", "gallery", "coming-from"),
        "To look things up": ("operators", "backends", "api", "reference"),
        "To go further": (
            "check-and-bench", "reading-a-benchmark", "benchmarks", "gpu", "activations", "experiments", "distributed",
        ),
    },
    "operators": {
        "": (
            "patch_conv", "pairwise_mixup_loss", "gradient_descent", "mixup", "cutmix", "mixup_cross_entropy",
            "soft_target_cross_entropy", "mixup_binary_cross_entropy",
        ),
    },
}  # fmt: skip

# A name inside the package must lead somewhere; those of Python and of PyTorch have their pages elsewhere.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!mixfeat).*")]


def _mathml(translator, node: nodes.math | nodes.math_block) -> None:
    """Formulas as browsers show them by themselves: no script, no network, and one that is no TeX fails the build."""
    block = isinstance(node, nodes.math_block)
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s: %s", error, node.astext(), location=node)
        formula = ""
    for bracket in "⟨⟩":  # as low as round ones
        formula = formula.replace(f"<mo>{bracket}", f'<mo stretchy="false">{bracket}')
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def _add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    for caption, pages in _PAGES.get(page, {}).items():
        option = f":caption: {caption}\n" if caption else ""
        paths = "\n".join(pages if page == "index" else [f"{page}/{name}" for name in pages])
        source[0] += f"\n```{{toctree}}\n:hidden:\n{option}\n{paths}\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_navigation)
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
