"""Absorption measured on a real model: first letters, other concepts, paraphrases, anomalies.

contexts: one-token words in a context, open to surgery; letters: both published definitions of absorption on first
letters, and the label-free flag against them; concepts: the concepts beyond spelling and their members; beyond: how
often a concept's own latents are silent while it is used; coordination: what carries a latent that fires for one
wording and not for another; relatedness: is a latent about a task, by the contexts it fires in; anomalies: are latents
that look out of place explained by a part they share?; bench: all.
"""
