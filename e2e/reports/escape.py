"""Text in tables of other formats. Names of classes and slides come from anywhere."""

from __future__ import annotations

import re

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "%_&#${}"},
}
"""Character -> what LaTeX prints it by."""


def escape_latex(text: str) -> str:
    r"""Return the text as LaTeX prints it: no command of it is run.

    Examples
    --------
    >>> escape_latex("auc_a & b"), escape_latex(r"\input{x}")
    ('auc\\_a \\& b', '\\textbackslash{}input\\{x\\}')
    """
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))


def escape_markdown(text: str) -> str:
    r"""Return the text as a cell of a Markdown table shows it: no cell, line or tag of its own.

    Examples
    --------
    >>> escape_markdown("a|b"), escape_markdown("<b>")
    ('a\\|b', '\\<b\\>')
    """
    return re.sub(r"([\\`|<>])", r"\\\1", " ".join(text.split()))
