"""Labels from a corpus, for all latents and meta-latents of all sites at once.

1. On one half of the text: strongest contexts, density and histogram (mediation.contexts), and from them and from the
   tokens its direction raises a name for every latent, which says where it is on (mediation.names).
2. On the other half, score the name as a prediction of that.
3. A meta-latent also gets its members, the latents with the largest codes, and the words that several of them have
   among their strongest contexts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from mediation.contexts import EDGES, WINDOW, Context, Reader, Statistics, blocks, text_windows
from mediation.errors import MediationError
from mediation.labels import OWN, logit_effects
from mediation.names import Name, Trial, find_name, plain_words
from mediation.subject import SubjectModel

CONTEXTS, STORED = 20, 5  # strongest contexts that a name is made from, and those kept in the file
TOKENS = 8  # promoted, and suppressed, that the file lists
MEMBERS = 10  # of a meta-latent


@torch.no_grad()
def label_readers(
    model: SubjectModel,
    readers: Sequence[Reader],
    texts: Sequence[Path],
    *,
    n_tokens: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[tuple[pl.DataFrame, pl.DataFrame | None]]:
    """Label the latents, and the meta-latents if it has any, of every reader, from `n_tokens` of the text files.

    Each table has the columns index, label (null for a latent that is never on), score, density, histogram, contexts,
    logits_up, logits_down and source; that of meta-latents also members and shared.
    """
    for reader in readers:
        reader.dictionary.check(model)
    half = n_tokens // 2
    statistics = [Statistics(reader.width, model.vocab_size, CONTEXTS) for reader in readers]
    for block in blocks(
        model, text_windows(model, texts, 0), readers, n_tokens=half, progress=lambda done: progress(done, n_tokens)
    ):
        statistics[block.reader].add(block)
    words = plain_words(model.tokenizer.decode, model.vocab_size)
    effects, names = [], []
    for reader, seen in zip(readers, statistics, strict=True):
        if not seen.seen:
            raise MediationError("There is too little text to label from; give longer or more files.")
        directions = [reader.dictionary.decoder] + ([] if reader.meta is None else [reader.meta.directions])
        effects.append(logit_effects(model, torch.cat(directions), TOKENS))
        frequency = _frequency(seen.vocabulary, words)
        names.append([find_name(seen.contexts(i), words, frequency, up) for i, up in enumerate(effects[-1][0])])
    trials = [Trial(each, words) for each in names]
    for block in blocks(
        model,
        text_windows(model, texts, 1),
        readers,
        n_tokens=half,
        progress=lambda done: progress(half + done, n_tokens),
    ):
        trials[block.reader].add(block)
    found = []
    for reader, seen, lens, named, trial in zip(readers, statistics, effects, names, trials, strict=True):
        table = _table(model, seen, lens, named, trial.scores())
        d_sae = reader.dictionary.d_sae
        metas = None if reader.meta is None else _with_members(reader, table, seen, words)
        found.append((table.head(d_sae), metas))
    return found


def label_seconds(model: SubjectModel, readers: Sequence[Reader], texts: Sequence[Path], n_tokens: int) -> float:
    """What the reading of `label_readers` will take, from four windows."""
    few = list(islice(text_windows(model, texts, 0), 4))
    statistics = [Statistics(reader.width, model.vocab_size, CONTEXTS) for reader in readers]
    start = time.perf_counter()
    for block in blocks(model, few, readers, n_tokens=4 * WINDOW):
        statistics[block.reader].add(block)
    return (time.perf_counter() - start) * n_tokens / max(sum(map(len, few)), 1)


def _frequency(vocabulary: Tensor, words: Sequence[str]) -> Counter[str]:
    frequency: Counter[str] = Counter()
    for word, count in zip(words, vocabulary.tolist(), strict=True):
        frequency[word] += count
    return frequency


def _table(
    model: SubjectModel,
    seen: Statistics,
    effects: tuple[list[list[str]], list[list[str]]],
    names: Sequence[Name | None],
    scores: Tensor,
) -> pl.DataFrame:
    decode = model.tokenizer.decode
    floors = [0.0, *EDGES[1:].tolist()]

    def shown(context: Context) -> dict[str, Any]:
        return {
            "tokens": [decode([token]) for token in context.tokens],
            "values": context.values,
            "position": context.position,
        }

    counts = [[(k, n) for k, n in enumerate(row) if n] for row in seen.histogram.tolist()]
    return pl.DataFrame(
        {
            "index": range(len(names)),
            "label": [None if name is None else str(name) for name in names],
            "score": scores.double().tolist(),
            "density": seen.density().double().tolist(),
            "histogram": [[{"from": floors[k], "count": n} for k, n in row] for row in counts],
            "contexts": [[shown(c) for c in seen.contexts(i)[:STORED]] for i in range(len(names))],
            "logits_up": effects[0],
            "logits_down": effects[1],
            "source": OWN,
        },
        schema_overrides={
            "histogram": pl.List(pl.Struct({"from": pl.Float64, "count": pl.Int64})),
            "contexts": pl.List(
                pl.Struct({"tokens": pl.List(pl.String), "values": pl.List(pl.Float32), "position": pl.Int64})
            ),
            "label": pl.String,
        },
    ).with_columns(pl.col("score").fill_nan(None))


def _with_members(reader: Reader, table: pl.DataFrame, seen: Statistics, words: Sequence[str]) -> pl.DataFrame:
    """Step 3: the meta-latents' rows, numbered from 0, with their members and the words these share."""
    d_sae = reader.dictionary.d_sae
    metas = table.slice(d_sae).with_columns(pl.col("index") - d_sae)
    labels = table["label"].to_list()
    members, shared = [], []
    for meta in metas["index"]:
        latents = reader.members(meta, MEMBERS)
        members.append([{"latent": i, "code": code, "label": labels[i]} for i, code in latents])
        peaks = [{words[c.tokens[c.position]] for c in seen.contexts(i)} for i, _ in latents]
        common = Counter(word for each in peaks for word in sorted(each)).most_common(TOKENS)
        shared.append([word for word, count in common if count > 1])
    kind = pl.List(pl.Struct({"latent": pl.Int64, "code": pl.Float64, "label": pl.String}))
    return metas.with_columns(
        pl.Series("members", members, dtype=kind), pl.Series("shared", shared, dtype=pl.List(pl.String))
    )
