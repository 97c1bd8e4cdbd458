"""Sphinx configuration: MyST pages, API from docstrings, warnings are errors (``make docs``)."""

import echo

project = "ECHO"
author = "the ECHO developers"
copyright = "2026, the ECHO developers; Apache-2.0"
version = release = echo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest", "sphinx.ext.mathjax"]
doctest_test_doctest_blocks = ""  # docstring examples run in the tests
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
html_theme = "furo"
html_title = "ECHO"
exclude_patterns = ["_build"]
