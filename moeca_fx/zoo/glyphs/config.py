"""Size of the glyph model and where its weights live."""

from pathlib import Path

from moeca_fx.zoo.dsmoe_config import DSMoEConfig
from moeca_fx.zoo.glyphs.data import CLASSES, IMAGE_SIZE

# Outside the package, so that the wheel stays small: a clone of the repository has it.
WEIGHTS = Path(__file__).parents[3] / "weights" / "glyphs.safetensors"
JUDGE = Path(__file__).with_name("judge.safetensors")

GLYPHS = DSMoEConfig(
    input_size=IMAGE_SIZE,
    patch_size=2,
    in_channels=1,
    hidden_size=128,
    depth=6,
    num_heads=2,
    num_experts=48,
    top_k=5,
    expert_width=128,
    routed_scale=2.5,
    num_classes=len(CLASSES),
    learn_sigma=False,
    class_dropout=0.1,
)
"""256 tokens, the routing of DSMoE-S-E48 (48 experts, top-5, scale 2.5); 8.7 M parameters."""
