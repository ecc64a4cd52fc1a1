"""Networks their authors never showed us: one stand-in a trait, against its own softmax."""

import copy
import io
import threading

import pytest
import torch
from conftest import assert_close
from test_recording import ALL_LEVELS, build, hooks
from torch import nn

import scfg
from scfg import evidence
from scfg.recording.blocks import find_blocks

WIDTH, HEADS, TOKENS = 16, 2, 7
CONFIG = scfg.SCFGConfig(map_reduction=4, coarsest_reduction=4)


class Attention(nn.Module):
    """Attention that remembers its probabilities, (b, n, m) float64, averaged over heads."""

    def __init__(self, context=WIDTH, scale=1.0):
        super().__init__()
        self.heads, self.scale = HEADS, scale * (WIDTH / HEADS) ** -0.5
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(width, WIDTH, bias=False) for width in (WIDTH, context, context)
        )

    def attend(self, x, keys, mask=None):
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2).double()
            for y in (self.to_q(x), self.to_k(keys), self.to_v(keys))
        )
        scores = q @ k.mT * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        probabilities = scores.softmax(-1)
        self.probabilities = probabilities.mean(1)
        return (probabilities @ v).transpose(1, 2).flatten(2).float()

    def forward(self, x, context=None, mask=None):
        return self.attend(x, x if context is None else context, mask)


class MaskedPixels(nn.Module):
    """The image is padded: its last pixels are hidden from the others."""

    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention(24)

    def forward(self, x, context):
        mask = (torch.arange(x.shape[1]) < x.shape[1] - 7).expand(len(x), -1)
        x = x + self.attn1(x, None, mask)
        return x + self.attn2(x, context)


class OtherKeyword(Attention):
    def forward(self, x, cond=None):
        return self.attend(x, x if cond is None else cond)


class TextAndImage(Attention):
    """The first TOKENS are text, the others an image's, which have keys of their own."""

    def forward(self, x, context=None, mask=None):
        image = context[:, TOKENS:]
        return self.attend(x, context[:, :TOKENS]) + image.mean(1, keepdim=True)[..., :1]


class Block(nn.Module):
    def __init__(self, text=None):
        super().__init__()
        self.attn1, self.attn2 = Attention(), text or Attention(24)

    def forward(self, x, context, *rest):
        x = x + self.attn1(x)
        return x + self.attn2(x, context, *rest)


class KeywordBlock(Block):
    def forward(self, x, context):
        x = x + self.attn1(x)
        return x + self.attn2(x, cond=context)


class NamedBlock(Block):
    def forward(self, x, context):
        x = x + self.attn1(x=x)
        return x + self.attn2(x=x, context=context)


class PairBlock(Block):
    """The text comes with something else, as hosts hand on that of an image."""

    def forward(self, x, context):
        x = x + self.attn1(x)
        return x + self.attn2(x, (context, context.mean(1)))


class FirstOfPair(Attention):
    def forward(self, x, context=None):
        return self.attend(x, context[0])


class MoreThanGiven(Attention):
    """The mask is its third argument of four."""

    def forward(self, x, context=None, mask=None, scale=None):
        return self.attend(x, x if context is None else context, mask)


class Merged(Block):
    """Both attentions (tokens merged), or only the first (tiles as rows), see fewer pixels."""

    def __init__(self, tiles):
        super().__init__()
        self.tiles = tiles

    def forward(self, x, context):
        if self.tiles:
            tiles = x.unflatten(1, (2, -1)).flatten(0, 1)
            x = x + self.attn1(tiles).unflatten(0, (-1, 2)).flatten(1, 2)
            return x + self.attn2(x, context)
        part = x[:, ::4]
        part = part + self.attn1(part)
        return x + (part + self.attn2(part, context)).repeat_interleave(4, dim=1)


class FourAxes(Block):
    """Features as (b, c, 1, n), projections as convolutions."""

    def __init__(self):
        super().__init__()
        for attention in (self.attn1, self.attn2):
            attention.to_q = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x, context):
        return self.attn1.to_q(x.mT[:, :, None]).flatten(2).mT


class TwoSelves(Block):
    def __init__(self):
        super().__init__()
        self.attn2 = Attention()

    def forward(self, x, context):
        return self.attn2(self.attn1(x))


class Control(Block):
    """With a control branch, which is left out at some steps."""

    def __init__(self):
        super().__init__()
        self.ctrl_attentions = nn.ModuleList([Block()])


class Net(nn.Module):
    def __init__(self, block, reduction=4):
        super().__init__()
        self.enter = nn.Conv2d(4, WIDTH, reduction, reduction)
        self.block, self.leave = block, nn.ConvTranspose2d(WIDTH, 4, reduction, reduction)

    def forward(self, x, t, context, *rest):
        h = self.enter(x)
        flat = self.block(h.flatten(2).mT, context, *rest)
        return self.leave(flat.mT.unflatten(2, h.shape[2:]))


class Delegate:
    """No module, but it has one."""

    def __init__(self, net):
        self.net = net

    def __call__(self, *args):
        return self.net(*args)

    def __getattr__(self, name):
        return getattr(self.net, name)


def make(block, reduction=4, tokens=TOKENS):
    torch.manual_seed(0)
    net = Net(block(), reduction).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, Attention):
            module.to_k.weight.mul_(6)  # peaked maps
    return net, (torch.randn(4, 4, 16, 24), torch.tensor(3), torch.randn(4, tokens, 24))


MASK = torch.arange(TOKENS)[None] < torch.tensor([[7], [7], [4], [5]])
TRAITS = {
    "plain": (Block, ()),
    "mask by position": (Block, (MASK,)),
    "mask by position, more to come": (lambda: Block(MoreThanGiven(24)), (MASK,)),
    "mask of its own pixels": (MaskedPixels, ()),
    "own scale": (lambda: Block(Attention(24, scale=2.0)), ()),
    "all by keyword": (NamedBlock, ()),
    "text with something else": (lambda: PairBlock(FirstOfPair(24)), ()),
    "text under another keyword": (lambda: KeywordBlock(OtherKeyword(24)), ()),
    "text and image tokens in one tensor": (lambda: Block(TextAndImage(24)), ()),
    "a control branch": (Control, ()),
}


@pytest.mark.parametrize("delegates", [False, True])
@pytest.mark.parametrize("trait", TRAITS)
def test_maps_are_those_of_the_networks_own_softmax(trait, delegates):
    block, extra = TRAITS[trait]
    net, args = make(block, tokens=TOKENS + 4 * ("image" in trait))
    plain = net(*args, *extra)
    host = Delegate(net) if delegates else net
    with scfg.UNetWrapper(host, CONFIG, keep_maps=True) as unet:
        output = unet(*args, *extra)
        (layer,) = unet.attention
        assert unet.guide(*output.chunk(2), 5.0).labels.unique().numel() > 1
    assert torch.equal(output, plain)
    own, text = net.block.attn1.probabilities, net.block.attn2.probabilities
    assert_close(actual=layer.self_map, expected=own, share=1e-5)
    assert_close(actual=layer.cross_map, expected=text, share=1e-5)
    assert hooks(net) == 0


REFUSED = {
    "attends from 24 of its 96 pixels": (lambda: Merged(tiles=False), 2),
    "attends from 12 of its 24 pixels": (lambda: Merged(tiles=True), 4),
    r"must read features \(b, n, c\), got shape \(4, 16, 1, 24\)": (FourAxes, 4),
    "1 blocks ran at reductions .* none attended to a text": (TwoSelves, 4),
    r"no attention layer at reductions .* attention ran on \[96\] pixels": (Block, 2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_read_is_refused_in_the_call_and_leaves_nothing(message):
    net, args = make(*REFUSED[message])
    plain = net(*args)
    with scfg.UNetWrapper(net, CONFIG) as unet, pytest.raises(RuntimeError, match=message):
        unet(*args)
    assert torch.equal(net(*args), plain) and hooks(net) == 0


def test_a_mask_of_pixels_that_cannot_be_kept_to_is_refused(monkeypatch):
    net, args = make(MaskedPixels)
    monkeypatch.setattr(evidence, "MAP_BUDGET", 1)
    with scfg.UNetWrapper(net, CONFIG) as unet:
        with pytest.raises(RuntimeError, match="'block' masks pixels of the image, .* 24 pixels"):
            unet(*args)


def test_what_is_no_network_for_it_is_refused_at_once():
    joint = Attention()
    joint.add_k_proj = joint.add_q_proj = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="in 'block.attn1' the text attends too"):
        scfg.UNetWrapper(_with(joint))
    joint = Attention()
    joint.add_k_proj, joint.to_k = nn.Linear(2, 2), None
    with pytest.raises(ValueError, match="'block.attn1' attends to the text only"):
        scfg.UNetWrapper(_with(joint))
    for wrong in (None, len, scfg.UNetWrapper(make(Block)[0])):
        with pytest.raises(TypeError, match=r"unet must be a torch\.nn\.Module, got"):
            scfg.UNetWrapper(wrong)
    host = make(Block)[0]
    host.block.attn2.processor, host.block.attn2.scale = object(), 0.1
    with pytest.raises(RuntimeError, match=r"scale of Attention must be 1/sqrt\(d\) = 0.3536"):
        scfg.UNetWrapper(host, CONFIG)(*make(Block)[1])


def _with(attention):
    net = make(Block)[0]
    net.block.attn1 = attention
    return net


def test_copies_and_pickles_are_free_of_it_and_the_removed_says_so():
    net, args, _ = build("sd15")
    plain = net(*args).sample
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        unet(*args)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        others = [copy.deepcopy(net), torch.load(file, weights_only=False)]
        for other in others:
            assert torch.equal(other(*args).sample, plain)
            with scfg.UNetWrapper(other, ALL_LEVELS) as wrapped:
                wrapped.guide(*wrapped(*args).sample.chunk(2), 6.0)
    with pytest.raises(RuntimeError, match="its wrapper was removed"):
        unet(*args)
    with pytest.raises(RuntimeError, match="its wrapper was removed"):
        copy.deepcopy(unet)(*args)


def test_threads_do_not_meet_and_sharing_one_wrapper_is_refused():
    net, args, _ = build("own")
    plain, inside, go = net(*args), threading.Event(), threading.Event()
    results, refused = [], []

    def hold(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(20)

    block = net.get_submodule(find_blocks(net)[0][0])
    handle = block.register_forward_hook(hold)
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        expected = unet.guide(*unet(*args).chunk(2), 6.0)
        thread = threading.Thread(target=lambda: results.append(unet(*args)))
        thread.start()
        inside.wait(20)
        assert torch.equal(net(*args), plain)  # the bare network, meanwhile
        try:
            unet(*args)
        except RuntimeError as error:
            refused.append(str(error))
        go.set()
        thread.join()
        out = unet.guide(*results[0].chunk(2), 6.0)
    handle.remove()
    assert refused == ["another thread is recording this U-Net; give each thread its own"]
    assert torch.equal(out.eps, expected.eps)
