"""Size of the digits model and where its weights live."""

from pathlib import Path

from moeca_fx.zoo.dsmoe_config import DSMoEConfig

WEIGHTS = Path(__file__).with_name("digits.safetensors")
JUDGE = Path(__file__).with_name("judge.safetensors")

IMAGE_SIZE = 8
CLASSES = 10

DIGITS = DSMoEConfig(
    input_size=IMAGE_SIZE,
    patch_size=1,
    in_channels=1,
    hidden_size=128,
    depth=6,
    num_heads=4,
    num_experts=16,
    top_k=4,
    expert_width=64,
    routed_scale=2.0,
    num_classes=CLASSES,
    learn_sigma=False,
    class_dropout=0.1,
)
