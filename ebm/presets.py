"""The flags of published and shipped training runs by name, for `python train.py --preset=NAME`.

Flags on the command line override those of the preset. The first rows are the published commands. The presets that end
in _cpu train in minutes on two CPU cores; the models in `pretrained/` were trained with them. Their runs have the names
of the presets, not of the shipped models.
"""

from __future__ import annotations

from ebm.readers.dsprites import CONCEPTS

CIFAR10 = "--dataset=cifar10 --num_steps=60 --batch_size=128 --step_lr=10 --proj_norm=0.01 --zero_kl --replay_batch"
IMAGENET = "--exp=imagenet_cond --replay_batch --cclass --zero_kl"
SPRITES = "--dataset=dsprites --cclass --zero_kl --replay_batch --step_lr=500"
# On a CPU: a hundred times the published learning rate, half the steps, leaky ReLU (see docs/concepts.md).
SPRITES_CPU = f"{SPRITES} --num_steps=10 --batch_size=16 --lr=3e-2 --ema_decay=0.99"
# Short chains from a normal distribution of the images, or of each class (see docs/recipes.md).
GAUSS_CPU = "--zero_kl --datasource=gauss --num_steps=20 --sample_steps=20 --num_filters=32 --lr_schedule=cosine"
SMALL_CPU = f"{GAUSS_CPU} --cclass --lr=1e-2 --ema_decay=0.99"
REPLAY_HALF = "--replay_batch --replay_rate=0.5"

PRESETS = {
    "cifar10_uncond": f"--exp=cifar10_uncond {CIFAR10} --large_model",
    "cifar10_cond": f"--exp=cifar10_cond {CIFAR10} --cclass",
    "imagenet32_cond": f"{IMAGENET} --dataset=imagenet --wider_model --num_steps=60 --batch_size=32 --step_lr=10 "
    "--proj_norm=0.01",
    "imagenet128_cond": f"{IMAGENET} --dataset=imagenetfull --swish_act --num_steps=50 --batch_size=16 --step_lr=100",
    **{f"dsprites_{c}": f"--exp=dsprites_cond_{c} --cond_{c} {SPRITES} --num_steps=20 --swish_act" for c in CONCEPTS},
    **{f"dsprites_{c}_cpu": f"--exp=dsprites_{c}_cpu --cond_{c} {SPRITES_CPU}" for c in CONCEPTS},
    # Twice as many images as chains: the additional ones cost the time of their classification only.
    "fashion_cpu": f"--exp=fashion_cpu --dataset=fashion_mnist {SMALL_CPU} --step_lr=10 --batch_size=64 "
    "--num_chains=32 --noise_rate=0.1 --classify=0.03 --classify_scale=300 --max_iter=4500",
    "mnist_cpu": f"--exp=mnist_cpu --dataset=mnist {SMALL_CPU} --step_lr=30 --batch_size=32 {REPLAY_HALF} "
    "--max_iter=600",
    # image_size and channels count for --dataset=folder, whose images then become 32x32 in colour.
    "colour_cpu": f"--exp=colour_cpu --dataset=cifar10 --image_size=32 --channels=3 {GAUSS_CPU} --step_lr=10 --lr=2e-3 "
    "--batch_size=32 --noise_rate=0.1 --ema_decay=0.995 --max_iter=1500",
    "digits_cpu": f"--exp=digits_cpu --dataset=digits {SMALL_CPU} --step_lr=30 --batch_size=32 {REPLAY_HALF} "
    "--classify=0.1 --max_iter=500",
}
