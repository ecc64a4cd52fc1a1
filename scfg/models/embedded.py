"""The embedded model: captions to context, noisy latents to eps, latents to images; its file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfg.config import SCFGConfig
from scfg.models import emoji
from scfg.models.emoji_words import WORDS
from scfg.models.files import read_tensors, write_whole
from scfg.models.text import TextEncoder, Tokenizer
from scfg.models.transformer import JointTransformer, TransformerConfig
from scfg.models.unet import UNet, UNetConfig
from scfg.names import NETWORKS
from scfg.sampling import Schedule, scaled_linear

FOLDER = Path(__file__).parent / "weights"
SHIPPED = {network: FOLDER / f"{network}-emoji.safetensors" for network in NETWORKS}
WEIGHTS = SHIPPED["unet"]
PATCH = 4  # pixels per side of a latent
CONFIG = SCFGConfig(map_reduction=1, coarsest_reduction=2)  # its grid is 16 x 16 and 8 x 8
SCALE = 0.5  # latent per pixel value: less signal left at the last timestep than with 1
UNET = UNetConfig(
    in_channels=3 * PATCH**2,
    out_channels=3 * PATCH**2,
    block_out_channels=(64, 128),
    transformer_depth=(1, 1),
    heads=(2, 2),
    layers_per_block=1,
    cross_attention_dim=96,
    norm_groups=16,
)


@dataclass(frozen=True)
class ModelConfig:
    """Topology of both networks and the words they know.

    Attributes:
        unet: The U-Net, or None.
        transformer: The transformer in its place, or None.
        text_layers: Layers of the text encoder.
        text_heads: Heads of each.
        words: As of `Tokenizer`.
        length: As of `Tokenizer`.
    """

    unet: UNetConfig | None = UNET
    transformer: TransformerConfig | None = None
    text_layers: int = 2
    text_heads: int = 4
    words: tuple[str, ...] = WORDS
    length: int = emoji.LENGTH

    def __post_init__(self) -> None:
        """Refuse none of the networks, and both."""
        if (self.unet is None) == (self.transformer is None):
            raise ValueError(f"one of unet and transformer must be given, got {self}")

    @property
    def network(self) -> str:
        """``"unet"`` or ``"transformer"``."""
        return "unet" if self.transformer is None else "transformer"

    @property
    def context_dim(self) -> int:
        """Features of a token of the context."""
        if self.transformer is None:
            return self.unet.cross_attention_dim
        return self.transformer.context_dim


TRANSFORMER = ModelConfig(unet=None, transformer=TransformerConfig())


def read_config(fields: dict) -> ModelConfig:
    """The config that `dataclasses.asdict` wrote, from JSON.

    Raises:
        ValueError: A value is out of range.
        TypeError: A field is not known.
        KeyError: The words are not there.
    """
    fields = dict(fields)
    for name, kind in (("unet", UNetConfig), ("transformer", TransformerConfig)):
        if fields.get(name) is not None:
            fields[name] = kind(**fields[name])
    fields["words"] = tuple(fields["words"])
    return ModelConfig(**fields)


class EpsPredictor(nn.Module):
    """The eps that goes with the x0 which a U-Net predicts.

    ``eps = (x - sqrt(abar_t) x0) / sqrt(1 - abar_t)``. Near t = 0 this divides by a small number
    (0.029 at t = 0), and so enlarges the errors of x0; going back to x0, as samplers do, undoes it.

    Args:
        unet: The network, ``(x, t, context) -> x0``.
        alphas_cumprod: abar, (train_steps,).
    """

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """Predict the noise in x.

        Args:
            x: (b, 48, 16, 16), ``sqrt(abar_t) x0 + sqrt(1 - abar_t) eps``.
            t: Timesteps, 0 to 999, integers: one or (b,).
            context: (b, t, c) from the text encoder.

        Returns:
            eps, (b, 48, 16, 16), dtype of x.
        """
        t = torch.as_tensor(t, device=x.device)
        abar = self.alphas_cumprod[t.long()].to(x.dtype).reshape(-1, 1, 1, 1)
        return (x - abar.sqrt() * self.unet(x, t, context)) / (1 - abar).sqrt()


class FlowPredictor(EpsPredictor):
    """The eps that goes with the x0 which a network of the straight path predicts.

    With ``a = sqrt(abar_t)`` and ``b = sqrt(1 - abar_t)``, ``x = a x0 + b eps`` is ``a + b`` times
    ``(1 - s) x0 + s eps`` at ``s = b / (a + b)``: every sampler of noise levels draws with it.
    """

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """As of `EpsPredictor`."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        abar = self.alphas_cumprod[t.long()].to(x.dtype)
        a, b = (y.reshape(-1, 1, 1, 1) for y in (abar.sqrt(), (1 - abar).sqrt()))
        s = (b / (a + b)).reshape(-1)
        return (x - a * self.unet(x / (a + b), s, context)) / b


@dataclass(frozen=True, eq=False)
class EmbeddedModel:
    """Everything between a caption and a picture.

    Attributes:
        unet: ``(x, t, context) -> eps``, an `nn.Module`: what guidance wraps. Its grid is
            16 x 16 with attention there and at 8 x 8.
        text_encoder: Tokens (b, t) to context (b, t, c).
        tokenizer: Captions to tokens.
        schedule: The noise levels it was trained on.
        config: The constants of S-CFG that suit its grid.
    """

    unet: EpsPredictor
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    config: SCFGConfig = CONFIG

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(48, 16, 16), the noise to start a picture from without its batch."""
        return (3 * PATCH**2, 64 // PATCH, 64 // PATCH)

    @property
    def network(self) -> UNet | JointTransformer:
        """What predicts x0 inside `unet`: its attention is recorded."""
        return self.unet.unet

    def words(self, captions: Sequence[str]) -> Tensor:
        """(b, t) int64, which columns of the context are words: their place; -1 for the others."""
        is_word = self.tokenizer(captions) >= 2  # after START and END
        return torch.where(is_word, torch.arange(self.tokenizer.length), -1)

    @torch.no_grad()
    def encode(self, captions: str | Sequence[str]) -> Tensor:
        """Context (b, t, c) of one caption or several; "" is the unconditional one.

        Raises:
            ValueError: A word is not known, or a caption is too long.
        """
        tokens = self.tokenizer(captions)
        return self.text_encoder(tokens.to(self.text_encoder.token.weight.device))

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        """Images (b, 3, 64, 64) in [-1, 1] of latents (b, 48, 16, 16)."""
        return F.pixel_shuffle(latents / SCALE, PATCH).clamp(-1, 1)


def to_latents(images: Tensor) -> Tensor:
    """Latents (b, 48, 16, 16) of images (b, 3, 64, 64): every 4 x 4 pixels, halved."""
    return F.pixel_unshuffle(images, PATCH) * SCALE


def networks(config: ModelConfig = ModelConfig()) -> nn.ModuleDict:
    """The network, which predicts x0, and the text encoder, with fresh weights."""
    tokenizer, width = Tokenizer(config.words, config.length), config.context_dim
    text_encoder = TextEncoder(
        len(tokenizer.vocabulary), tokenizer.length, width, config.text_layers, config.text_heads
    )
    transformer = config.network == "transformer"
    network = JointTransformer(config.transformer) if transformer else UNet(config.unet)
    return nn.ModuleDict({config.network: network, "text_encoder": text_encoder})


def assemble(parts: nn.ModuleDict, config: ModelConfig = ModelConfig()) -> EmbeddedModel:
    """The usable model around the two networks, which it shares."""
    schedule = scaled_linear()
    predictor = FlowPredictor if config.network == "transformer" else EpsPredictor
    unet = predictor(parts[config.network], schedule.alphas_cumprod)
    unet.to(next(parts.parameters()).device)
    tokenizer = Tokenizer(config.words, config.length)
    return EmbeddedModel(unet, parts["text_encoder"], tokenizer, schedule)


def save_weights(parts: nn.ModuleDict, config: ModelConfig, path: Path, **facts: str) -> None:
    """Write the networks in float16; the metadata holds their topology and any further facts."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise RuntimeError(
            "weights need safetensors: pip install 'semantic-cfg[generate]'"
        ) from error
    tensors = {name: p.detach().half().contiguous().cpu() for name, p in parts.state_dict().items()}
    metadata = {"config": json.dumps(asdict(config)), **facts}
    write_whole(path, lambda aside: save_file(tensors, aside, metadata))


def load_model(path: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> EmbeddedModel:
    """Load an embedded model, in float32 and for inference.

    Args:
        path: A file of `save_weights`.
        device: Where to put it.

    Returns:
        The model, without gradients.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds something else.
        RuntimeError: safetensors is not installed.
    """
    weights, metadata = read_tensors(path)
    for name, x in weights.items():
        if not x.is_floating_point():
            raise ValueError(f"{path} must hold floating point weights, got {x.dtype} in {name!r}")
    try:
        config = read_config(json.loads(metadata["config"]))
        parts = networks(config)
        parts.load_state_dict({name: x.float() for name, x in weights.items()})
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{path} is no embedded model: {error!r}") from error
    return assemble(parts.eval().requires_grad_(False).to(device), config)
