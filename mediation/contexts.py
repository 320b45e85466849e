"""Where latents and meta-latents fire: one pass over a corpus, in memory that its length does not change.

1. Texts are read in pieces, a piece of every file in turn; every other piece of a file belongs to the other half,
   so that what is learnt on one half can be judged on text of the same kinds that it has not seen.
2. One forward pass, stopped after the last site, serves all sites. A window's first token, BOS and attention sinks
   (a norm over ten times the window's median) are left out: latents fire there whatever the text says.
3. A dictionary's latents are encoded a few windows at a time; a meta-latent's activation is sum_i f_i z_ij.
4. Of every latent three things are kept: on how many tokens it is on, a histogram of its values in half octaves,
   and its `n` strongest contexts, one from a window at most, so that a single text cannot fill the list.

Contexts, density and histogram are those of Neuronpedia's and sae-dashboard's latent pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mediation.dictionaries import Dictionary, attention_sinks
from mediation.errors import MediationError
from mediation.metalatents import Decomposition
from mediation.subject import SubjectModel
from mediation.training.activations import windows

BEFORE, AFTER = 10, 5  # tokens of a context on either side of its peak
WINDOW = 128  # tokens read at a time
PIECE = 2_000  # characters of a file that stay in one half
EDGES = 2.0 ** torch.arange(-8, 16.5, 0.5)  # lower ends of the histogram's bins, but for the first: it starts at 0
MAX_VALUES = 2**24  # activations held at once (64 MiB)
BATCH = 32  # windows in a forward


def read_half(paths: Sequence[Path], half: int) -> Iterator[str]:
    """Every other piece of each file, files in turn; half 0 and half 1 share nothing and together are all text."""
    with ExitStack() as opened:
        try:
            files = [opened.enter_context(path.open(encoding="utf-8")) for path in paths]
        except OSError as error:
            raise MediationError(f"Cannot read the text in {error.filename}: {error.strerror}.") from error
        turn = 0
        while files:
            for file in list(files):
                try:
                    piece = file.read(PIECE) + file.readline(PIECE)
                except UnicodeDecodeError as error:
                    raise MediationError(f"{file.name} is not UTF-8 text; save it as UTF-8.") from error
                if not piece:
                    files.remove(file)
                elif turn % 2 == half:
                    yield piece
            turn += 1


def text_windows(model: SubjectModel, paths: Sequence[Path], half: int) -> Iterator[list[int]]:
    """One half of the files' text as windows of `window_length` tokens."""
    return windows(read_half(paths, half), model, window_length(model))


def window_length(model: SubjectModel) -> int:
    """`WINDOW`, or the longest text the model can take where that is less."""
    return min(WINDOW, model.module.config.get_text_config().max_position_embeddings)


class Reader:
    """What is read on every token: a dictionary's d_sae latents and, after them, its d_meta meta-latents.

    `width` is the number of both.
    """

    def __init__(self, dictionary: Dictionary, meta: Decomposition | None = None) -> None:
        self.dictionary, self.meta = dictionary, meta
        self.width = dictionary.d_sae + (0 if meta is None else len(meta.directions))
        self._codes: Tensor | None = None
        if meta is not None:
            codes = [meta.codes(rows).to_sparse() for rows in dictionary.decoder.split(1024)]
            self._codes = torch.cat(codes).T.coalesce()  # [d_meta, d_sae]

    def __call__(self, x: Tensor) -> Tensor:
        """Activations [n, width] of x [n, d_model]."""
        latents = self.dictionary.encode(x)
        if self._codes is None:
            return latents
        return torch.cat([latents, torch.sparse.mm(self._codes, latents.T).T], dim=1)

    def members(self, meta: int, n: int) -> list[tuple[int, float]]:
        """The members of a meta-latent: the `n` latents with the largest codes, and those codes."""
        if self._codes is None:
            raise ValueError("there is no meta-dictionary")
        row = self._codes[meta].coalesce()
        best = row.values().topk(min(n, len(row.values())))
        latents = row.indices()[0, best.indices]
        return [(i, v) for i, v in zip(latents.tolist(), best.values.tolist(), strict=True) if v > 0]


@dataclass
class Block:
    """Windows `tokens` [w, T], which positions are judged, `kept` [w, T], and `values` [w, T, width], 0 elsewhere."""

    reader: int
    tokens: Tensor
    kept: Tensor
    values: Tensor


@torch.no_grad()
def blocks(
    model: SubjectModel,
    sequences: Iterable[Sequence[int]],
    readers: Sequence[Reader],
    *,
    n_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Block]:
    """Steps 2 and 3 over sequences of one length, until `n_tokens` have been read; every window meets every reader."""
    sites = [reader.dictionary.reads for reader in readers]
    source, done = iter(sequences), 0
    while done < n_tokens and (rows := list(islice(source, BATCH))):
        rows = rows[: max(1, -(-(n_tokens - done) // len(rows[0])))]
        tokens = torch.tensor(rows, device=model.device)
        forward = model.forward(tokens, read=sites, logits=False)
        for index, (reader, site) in enumerate(zip(readers, sites, strict=True)):
            x = forward.sites[site].to(reader.dictionary.decoder)
            kept = judged(x, tokens.to(x.device), model.bos_id)
            size = max(1, MAX_VALUES // (reader.width * tokens.shape[1]))
            for part in torch.arange(len(rows), device=x.device).split(size):
                values = reader(x[part].flatten(0, 1)).unflatten(0, (len(part), -1))
                yield Block(index, tokens[part].to(x.device), kept[part], values * kept[part, :, None])
        done += tokens.numel()
        progress(done)


def judged(x: Tensor, tokens: Tensor, bos: int | None) -> Tensor:
    """Positions [w, T] that count: not the first, not BOS, no attention sink; x [w, T, d_model]."""
    kept = ~attention_sinks(x, torch.ones_like(tokens, dtype=torch.bool))
    kept[:, 0] = False
    return kept if bos is None else kept & (tokens != bos)


@dataclass
class Context:
    """Token ids around a peak, the latent's values on them, and where among them the peak is."""

    tokens: list[int]
    values: list[float]
    position: int


class Statistics:
    """Step 4 for all `width` latents of a reader.

    seen: tokens judged; on [width]: tokens on which each latent is on; histogram [width, bins]: how many of its
    values lie in each bin of `EDGES`, the last one open; vocabulary [vocab]: tokens judged, by id.
    """

    def __init__(self, width: int, vocabulary: int, n: int) -> None:
        self.seen = 0
        self.on = torch.zeros(width, dtype=torch.long)
        self.histogram = torch.zeros(width, len(EDGES), dtype=torch.long)
        self.vocabulary = torch.zeros(vocabulary, dtype=torch.long)
        self._peak = torch.zeros(n, width)
        self._tokens = torch.full((n, width, BEFORE + 1 + AFTER), -1, dtype=torch.int32)
        self._values = torch.zeros(n, width, BEFORE + 1 + AFTER)

    def add(self, block: Block) -> None:
        """Count a block's windows in."""
        tokens, kept, values = block.tokens.cpu(), block.kept.cpu(), block.values.cpu().float()
        self.seen += int(kept.sum())
        self.vocabulary += tokens[kept].bincount(minlength=len(self.vocabulary))
        entries = (values > 0).nonzero(as_tuple=True)
        self.on += entries[2].bincount(minlength=len(self.on))
        bins = torch.bucketize(values[entries], EDGES, right=True).sub(1).clamp(min=0)
        places = entries[2] * len(EDGES) + bins
        self.histogram.view(-1).index_add_(0, places, torch.ones_like(places))
        self._merge(tokens, values)

    def _merge(self, tokens: Tensor, values: Tensor) -> None:
        n = len(self._peak)
        peaks = values.max(dim=1)  # over a window's positions: [w, width]
        self._peak, order = torch.cat([self._peak, peaks.values]).topk(n, dim=0)
        held = order.clamp(max=n - 1)[..., None].expand_as(self._tokens)
        self._tokens, self._values = self._tokens.gather(0, held), self._values.gather(0, held)
        slot, latent = ((order >= n) & (self._peak > 0)).nonzero(as_tuple=True)
        window = order[slot, latent] - n
        around = peaks.indices[window, latent][:, None] + torch.arange(-BEFORE, AFTER + 1)
        inside = (around >= 0) & (around < tokens.shape[1])
        around = around.clamp(0, tokens.shape[1] - 1)
        self._tokens[slot, latent] = torch.where(inside, tokens[window[:, None], around], -1).int()
        self._values[slot, latent] = torch.where(inside, values[window[:, None], around, latent[:, None]], 0.0)

    def density(self) -> Tensor:
        """Share of tokens on which each latent is on, [width]."""
        return self.on / max(self.seen, 1)

    def contexts(self, latent: int) -> list[Context]:
        """The strongest contexts, strongest first."""
        found = []
        for peak, tokens, values in zip(
            self._peak[:, latent].tolist(), self._tokens[:, latent].tolist(), self._values[:, latent].tolist(),
            strict=True,
        ):  # fmt: skip
            if peak > 0:
                inside = [k for k, token in enumerate(tokens) if token >= 0]
                shown = slice(inside[0], inside[-1] + 1)
                found.append(Context(tokens[shown], values[shown], BEFORE - inside[0]))
        return found
