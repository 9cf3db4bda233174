"""Other ways with conditions than FILL, as tables: a Placement each, whose name --placement takes.

A table says where it differs from what placement.py has as the default, and whose paper or code
says so.
"""

from dataclasses import replace

from vcloze_jax.placement import FILL, Placement

# AnyRefill (arXiv 2502.11158): FLUX.1-Fill's own canvas, a reference on the left and on the right
# what is painted, whole or in part. Its rank, rate and steps are not known here.
ANYREFILL = replace(FILL, name="anyrefill", axis0="page")

# fmt: off
# VisualCloze on FLUX.1-dev (its appendix B): all but the target stays clean, and is told time 0. No
# code of it is public: that text is told t is as in Yuanshi9815/OminiControl.
DEV = Placement(
    "dev",
    #         text    example  its target  query    target
    enters=  ("text", "clean", "clean",    "clean", "noise"),
    time=    ("t",    "0",     "0",        "0",     "t"),
)

# FLUX.1-Kontext: pictures apart, and all told t. It knows one target, at 0; that more stand at -1,
# -2, … is ours. huggingface/diffusers:src/diffusers/pipelines/flux/pipeline_flux_kontext.py
KONTEXT = Placement(
    "kontext",
    enters=  ("text", "clean", "clean",    "clean", "noise"),
    axis0=   "reference",
)

# RealGeneral (arXiv 2503.10406), on a video model: pictures are frames, text and conditions do not
# see each other. That conditions see the target is as its figure shows it; in single blocks, which
# it has not, text shares the target's modulation, as in FLUX. Its vector of a named subject is left
# out: what stands for none is not said.
FRAMES = Placement(
    "frames",
    enters=  ("text", "clean",    "clean",    "clean",    "noise"),
    branch=  ("mod",  "cond_mod", "cond_mod", "cond_mod", "mod"),
    attends= ("10001", "01111",   "01111",    "01111",    "11111"),
    axis0=   "frame",
    embeds=  True,
)

# FLUX.2's klein: references see each other alone, and are told time 0, so that they are computed
# once for all steps (references.py). FLUX.2 itself numbers them 10, 20, …, has a fourth axis for
# text, and no pooled text; here, on bases of FLUX.1, the pooled text is told to references, too.
# huggingface/diffusers:src/diffusers/pipelines/flux2/pipeline_flux2_klein_kv.py
KLEIN = Placement(
    "klein",
    enters=  ("text",  "clean", "clean",    "clean", "noise"),
    time=    ("t",     "0",     "0",        "0",     "t"),
    attends= ("11111", "01110", "01110",    "01110", "11111"),
    axis0=   "reference",
)
# fmt: on

PLACEMENTS = {each.name: each for each in (FILL, ANYREFILL, DEV, KONTEXT, FRAMES, KLEIN)}
