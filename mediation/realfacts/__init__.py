"""Real facts: one entity, several questions, and which part of its residual answers each.

`questions` has the entities, the questions and the split of entities; `asking` runs them and patches the entity's
token; `reading` learns what questions read there; `ways` are the decompositions compared; `bench` is the benchmark.
"""
