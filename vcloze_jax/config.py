"""Sizes and presets as frozen dataclasses; Recipe, train.py's flags; and the user's mistake.

Defaults are those of FLUX.1-Fill-dev (black-forest-labs/flux:src/flux/util.py, `flux-dev-fill`).
Dtypes are strings: no JAX is imported here.
"""

from dataclasses import dataclass, field, replace

from vcloze_jax.placement import FILL, Placement

REMAT = ("none", "light", "full")


class UserError(Exception):
    """A mistake of the user's: its message is one line that names the offender and the remedy."""


@dataclass(frozen=True)
class FluxConfig:
    """The MMDiT. `remat` is what a backward pass computes again: nothing, all but matrix products
    and attention, or each block."""

    in_channels: int = 384  # 64 noisy latent | 64 condition latent | 256 mask
    out_channels: int = 64
    width: int = 3072
    heads: int = 24
    mlp_ratio: int = 4
    double_blocks: int = 19
    single_blocks: int = 38
    text_width: int = 4096  # T5
    vec_width: int = 768  # CLIP, pooled
    axes_dim: tuple[int, ...] = (16, 56, 56)  # RoPE: grid row, y, x
    theta: int = 10_000
    guidance_embed: bool = True
    rank: int = 0  # of the LoRA branch in every Dense; 0: none; learnt is Preset.learning's
    remat: str = "full"
    placement: Placement = FILL  # of cells in the sequence; it says how many in_channels

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder: z = (encode(x) - shift) * scale."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks per encoder level; the decoder has one more
    latent_channels: int = 16
    groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159


@dataclass(frozen=True)
class T5Config:
    """T5 v1.1 encoder (gated GELU, no biases). `max_length` tokens, padded, padding attended."""

    vocab: int = 32_128
    width: int = 4096
    head_dim: int = 64
    heads: int = 64
    mlp: int = 10_240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    max_length: int = 512


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP text encoder, pooled at the first end token `eos`."""

    vocab: int = 49_408
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    layers: int = 12
    max_length: int = 77
    eos: int = 49_407


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow: how far times move towards noise, by a grid's tokens."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096


START, DATA, RUN = "start from", "data", "run (all of it may change when a run goes on)"
TRAINING = "training (defaults are the preset's, with --data of your own in part others)"


def setting(default, help, section=TRAINING, *, free=False, least=None, choices=None):
    """A field of Recipe: default, help and its part there; whether a resumed run may change it."""
    options = dict(help=help, section=section, free=free, least=least, choices=choices)
    return field(default=default, metadata=options)


@dataclass(frozen=True)
class Recipe:
    """Every value of a training run, each a flag of train.py and an entry of RUN/config.json.

    All but the free ones are the run's identity. Defaults are the paper's (section 4) and the
    authors' code's (lzyhha/VisualCloze:train.py); a preset brings its own.
    """

    preset: str = setting("flux-fill", "sizes and defaults (train.py: mini)", START)
    weights: str = setting("mini", "folder in diffusers' layout (default: mini's)", START)
    lora: str | None = setting(None, "an adapter to go on from", START)
    from_scratch: bool = setting(False, "random MMDiT and text encoders, all trained", START)
    placement: str = setting("fill", "of cells in the sequence", START)
    data: str = setting("graph200k", "graphemoji[:TASK] or -fill, graph200k[:TASKS], a path", DATA)
    data_dir: str = setting("", "where graph200k lies, or has moved to", DATA, free=True)
    resolution: int = setting(384, "a cell's area is its square", DATA, least=16)
    held_out: float = setting(0.1, "share of the user's own data that only previews show", DATA)
    reverse_masking: float = setting(0.5, "share of grids where any cell may be blank", DATA)
    reverse_held_out: bool = setting(False, "… even if it asks a held-out task (the paper's)", DATA)
    keep_order: bool = setting(False, "conditions stay in their order", DATA)
    task_sentence: float = setting(0.8, "share of grids whose text names the task", DATA)
    content_sentence: float = setting(0.8, "share whose text says what the last cell shows", DATA)
    fixed_templates: bool = setting(False, "sentences are worded as in sampling", DATA)
    caption_dropout: float = setting(0.1, "share of grids without any text", DATA)
    rank: int = setting(256, "of the adapter; 0 trains the MMDiT itself", least=0)
    lr: float = setting(1e-4, "learning rate", free=True)
    warmup: int = setting(0, "steps over which the rate rises to --lr", least=0)
    decay_steps: int = setting(0, "at which a cosine ends at lr / 100; 0: constant", least=0)
    optimizer: str = setting("adam", "or muon, for blocks at rank 0", choices=("adam", "muon"))
    weight_decay: float = setting(0.0, "decoupled, as AdamW's", least=0)
    clip: float = setting(2.0, "largest norm of a step's gradient")
    ema: float = setting(0.0, "decay of the average that is written; 0: what is learnt last")
    batch: int = setting(64, "grids per step", least=1)
    group: int = setting(8, "grids that are drawn with one shape; divides --batch", least=1)
    steps: int = setting(20_000, "optimizer steps in all", least=1, free=True)
    loss_region: str = setting("target", "masked pixels, or all rows", choices=("target", "grid"))
    time_mean: float = setting(0.0, "of the logit of a training time; above 0 is noisier")
    time_shift: bool = setting(False, "shift training times by a grid's tokens (the paper's)")
    guidance_range: tuple[float, float] = setting((1.0, 1.0), "what training draws guidance from")
    # The authors multiply by 1 - mask, hence 0, but sample with -1, a black cell.
    mask_fill: float = setting(0.0, "of masked pixels in the condition picture, in [-1, 1]")
    seed: int = setting(0, "of all that is drawn")
    mesh: str = setting("", "8 (fsdp=8), or data=2,tensor=4; state=8: base whole", RUN, free=True)
    cache: str = setting("", "encode your own data once, into this folder", RUN, free=True)
    offload: bool = setting(False, "text encoders' blocks wait in host memory", RUN, free=True)
    threads: int = setting(4, "that make grids ahead", RUN, least=1, free=True)
    micro_batch: int = setting(0, "grids at a time, of a group; 0: one", RUN, least=0, free=True)
    save_every: int = setting(500, "steps between checkpoints", RUN, least=1, free=True)
    save_minutes: float = setting(0.0, "minutes after which to save, too", RUN, least=0, free=True)
    preview_every: int = setting(500, "steps between previews", RUN, least=1, free=True)
    remat: str = setting("light", "full: less memory, more work", RUN, free=True, choices=REMAT)
    skip_nonfinite: int = setting(0, "steps that may be skipped for it", RUN, least=0, free=True)


@dataclass(frozen=True)
class Preset:
    """One complete system and its defaults; what a weights folder says of sizes wins."""

    name: str
    flux: FluxConfig = field(default_factory=FluxConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    t5: T5Config = field(default_factory=T5Config)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    recipe: Recipe = field(default_factory=Recipe)
    num_inference_steps: int = 30
    guidance_scale: float = 30.0

    @property
    def resolution(self) -> int:
        """A cell's area is its square, unless a spec says otherwise."""
        return self.recipe.resolution

    @property
    def learning(self) -> "Preset":
        """The same, with the MMDiT as training has it."""
        recipe = self.recipe
        return replace(self, flux=replace(self.flux, rank=recipe.rank, remat=recipe.remat))


FLUX_FILL = Preset("flux-fill")

# The true topology at a size that a laptop trains: every kind of layer and branch is there.
# fmt: off
MINI = Preset(
    "mini",
    flux=FluxConfig(
        width=192, heads=4, double_blocks=2, single_blocks=4, text_width=128, vec_width=64,
        axes_dim=(8, 20, 20), remat="none",
    ),
    # mini/vae says scale and shift, as measured; of 96 text tokens mini's folder has 32 read.
    vae=VAEConfig(channels=(8, 16, 32, 64), layers=1, groups=1, scale=1.0, shift=0.0),
    t5=T5Config(vocab=2048, width=128, head_dim=32, heads=4, mlp=256, layers=2, max_length=96),
    clip=CLIPConfig(vocab=2048, width=64, heads=2, mlp=256, layers=2, eos=2047),
    recipe=Recipe(
        preset="mini", data="graphemoji:gray->fluent_flat", resolution=64, mask_fill=-1.0,
        rank=32, lr=2e-3, warmup=50, batch=16, micro_batch=16, steps=150, remat="none",
        time_mean=1.0, guidance_range=(1.0, 50.0), save_every=50, preview_every=50,
    ),
)
# fmt: on

PRESETS = {preset.name: preset for preset in (MINI, FLUX_FILL)}
