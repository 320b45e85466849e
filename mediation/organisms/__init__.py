"""Planted-fact model organisms: worlds with known answers and small models trained on them."""
