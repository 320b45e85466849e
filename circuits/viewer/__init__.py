"""The page that `mediation inspect` opens: one self-contained HTML file."""

from circuits.viewer.page import render

__all__ = ["render"]
