"""Sphinx configuration: MyST pages, API from docstrings, warnings are errors (``make docs``)."""

import re

from docutils import nodes
from latex2mathml.converter import convert

import echo

project = "ECHO"
author = "the ECHO developers"
copyright = "2026, the ECHO developers; Apache-2.0"
version = release = echo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
doctest_test_doctest_blocks = ""  # docstring examples run in the tests
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
html_theme = "furo"
html_title = "ECHO"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]


def formula(translator, node):
    """MathML, which browsers draw by themselves: the site loads nothing from elsewhere."""
    translator.body.append(
        convert(node.astext(), display="block" if isinstance(node, nodes.math_block) else "inline")
    )
    raise nodes.SkipNode


def joined(app, what, name, obj, options, lines):
    """Several attributes of one description: Sphinx takes what stands before a space for a type."""
    for number, line in enumerate(lines):
        if names := re.match(r":ivar ([\w, ]+):", line):
            lines[number] = line.replace(names[1], names[1].replace(", ", ",\u200b"), 1)


def setup(app):
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", joined, priority=900)  # after napoleon
