"""Examples of every command, which its help prints."""

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "demo": ("", "--out cat.pdf", "--json --no-figure"),
    "explain": (
        "photo.jpg",
        "photos/ --model google/vit-base-patch16-224 --out maps/",
        "photo.jpg --method libra,attn_lrp,lime --target cat",
        "photos/ --region tumour=masks/,border --group-by folder",
    ),
    "attention": (
        "photo.jpg",
        "photo.jpg --layer -1 --query 3,5",
        "photo.jpg --model swin-nano --layer 2 --query 5,6 --shifted",
    ),
    "rollout": (
        "photo.jpg",
        "photo.jpg --evolution --head-fusion max --discard-ratio 0.9",
        "photo.jpg --model swin-nano --stages",
        "photos/ --region border --group-by folder --out maps/",
    ),
    "heads": (
        "photo.jpg --target cat",
        "photo.jpg --by gradient --contrast dog",
    ),
    "registers": (
        "photos/ --model facebook/dinov2-large --out maps/",
        "photos/ --model facebook/dinov2-large --count 1 --out maps/",
    ),
    "lime": (
        "photo.jpg --target cat",
        "photo.jpg --num-samples auto --segments slic --hide blur",
        "photo.jpg --region tumour=40,60,30,30",
        "photo.jpg --model vit-nano,swin-nano",
    ),
    "compose": (
        "photo.jpg --object dog=76,12,90,136",
        "photo.jpg --object dog=76,12,90,136 --target dog,cat",
        "photo.jpg --annotations photo.toml --model swin-nano",
    ),
    "data": ("photos/", "brain-mri --threshold 0.95 --out leaks.png"),
    "finetune": (
        "photos/",
        "photos/ --model swin-nano --tuning lora --out run/",
        "photos/ --recipe report --epochs 5 --seed 1",
    ),
    "compare": (
        "photos/ --model vit-nano,swin-nano --tuning head,lora",
        "photos/ --model vit-nano --tuning head --seeds 5",
    ),
    "models": ("", "--json"),
    "methods": ("", "--json"),
}
