"""SimCLR on the shipped emoji: the loss beside its chance level, drawn, and what neighbours tell about groups.

python examples/simclr.py    # half a minute
"""

from dataclasses import replace

from twofold import Batches, Bundle, Optimizer, SimCLR, decoded, evaluate, fit, image_encoder, open_source
from twofold.views import SIMCLR_CIFAR

emoji = open_source("openmoji")
train = emoji.split("train")
pixels, kept, skipped = decoded(train, 32)  # uint8 [n, 3, 32, 32], memory-mapped

# Colour and left/right carry meaning here, so the views must not destroy them: no hue, no gray, no flip.
policy = replace(SIMCLR_CIFAR, area=(0.4, 1.0), hue=0.0, gray=0.0, flip=0.0)
method = SimCLR(image_encoder("timm:resnet18/16", size=32), policies=(policy, policy), temperature=0.2)
run = fit(
    method,
    Batches({"image": pixels}, batch=256, seed=0, apart=train.take(kept).meta["family"]),
    steps=60,
    out="runs/emoji",
    optimizer=Optimizer(lr=2e-3, warmup=6),
)
for line in run.log:
    bar = "█" * round(40 * line["loss"] / line["chance"])
    print(f"step {line['step']:>3}  loss {line['loss']:.2f} of {line['chance']:.2f} by chance {bar}")
print(evaluate(Bundle(method.towers()), replace(emoji, texts=None)).labels["trained"].knn.accuracy)
