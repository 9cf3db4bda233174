"""How adapter files name what they change: a row per naming; its modules are a column of mmdit.py.

Sources: kohya-ss/sd-scripts:networks/{lora_flux,convert_flux_lora}.py;
lzyhha/VisualCloze:models/modules/lora.py, which is black-forest-labs/flux:src/flux/modules/lora.py
(FLUX.1-Depth-dev-lora and FLUX.1-Canny-dev-lora, which give norms in full besides);
huggingface/diffusers:src/diffusers/loaders/lora_conversion_utils.py for who writes which prefix.
"""

import re
from typing import NamedTuple

from vcloze_jax.ports.tables import Table, mmdit

LAYER = r"(\d{1,3})"  # no model has a thousand blocks, and a false number must not make one


class Naming(NamedTuple):
    """prefix + module, its dots written as `dot`, + suffix: of A, B, a bias on B, and alpha.

    A file has one of `prefixes` throughout; the first is the one that we write. A suffix is None
    where the naming cannot hold it; whole norms need dotted keys. We write files that end in
    `ending`, "" being of what is only read, and alpha goes where `alpha` says: into the "header",
    into a "tensor" or, where the naming has none, into "B".
    """

    title: str
    modules: Table
    dot: str
    suffixes: tuple[str | None, ...]
    prefixes: tuple[str, ...]
    alpha: str = ""
    ending: str = ""

    @property
    def linear(self) -> list[tuple[str, str]]:
        """The rows of linear layers: (our path, foreign name)."""
        return [row for row in self.modules.rows if not row[0].endswith("/scale")]

    @property
    def norms(self) -> list[tuple[str, str]]:
        """The rows of norms, which a file with dotted keys may give in full."""
        rows = self.modules.rows if self.dot == "." else ()
        return [row for row in rows if row[0].endswith("/scale")]

    def spell(self, module: str) -> str:
        """A module's key without its suffix, as we write it."""
        return self.prefixes[0] + module.replace(".", self.dot)

    def pattern(self, module: str, suffix: str = "") -> str:
        """The regular expression of a module's key; its group is the layer."""
        return re.escape(self.spell(module) + suffix).replace(r"\{i\}", LAYER)


AB = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".alpha"
DIFFERENCE = ".diff_b"  # of a bias of the base, read in place of one on B, and never written
DOWN = ".lora_down.weight", ".lora_up.weight", DIFFERENCE, ".alpha"
DOTTED = ".lora.down.weight", ".lora.up.weight", None, ".alpha"
LAYER_DOWN = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", None, ".alpha"
# What stands before modules where a trainer holds the transformer under a name of its own.
HOLDERS = "model.", "model.diffusion_model.", "diffusion_model.model.", "unet.", "dit.", "flux."
HOLDERS += "pipe.dit.", "pipe.transformer.", "pipeline.transformer.", "net.", "denoiser."
DOTS = "transformer.", "diffusion_model.", "", *HOLDERS
BARE = "", "diffusion_model.", "transformer.", *HOLDERS
UNET = ("lora_unet_",)
FLAT = "lora_transformer_", "lora_unet_", "lycoris_"  # of OneTrainer, InvokeAI, SimpleTuner

DIFFUSERS, BFL = mmdit.DIFFUSERS, mmdit.BFL
TENSORS, PICKLE = ".safetensors", ".pth"

# fmt: off
NAMINGS = {
    "diffusers":   Naming("diffusers'",            DIFFUSERS, ".", AB,   DOTS, "header", TENSORS),
    "kohya":       Naming("kohya's",               BFL,       "_", DOWN, UNET, "tensor", TENSORS),
    "visualcloze": Naming("VisualCloze's (BFL's)", BFL,       ".", AB,   BARE, "B",      PICKLE),
    "onetrainer":  Naming("OneTrainer's",          DIFFUSERS, "_", DOWN, FLAT),
    "old":         Naming("diffusers' old",        DIFFUSERS, ".", DOWN, DOTS),
    "older":       Naming("diffusers' older",      DIFFUSERS, ".", DOTTED, DOTS),
    "oldest":      Naming("diffusers' oldest",     DIFFUSERS, ".", LAYER_DOWN, DOTS),
    "comfyui":     Naming("ComfyUI's",             BFL,       ".", DOWN, DOTS),
}
# fmt: on
TARGETS = tuple(name for name, naming in NAMINGS.items() if naming.ending)
