"""Planted facts in nine families: small organisms whose used facts are known, and the scores of the flags on them."""
