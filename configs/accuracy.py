"""Models of the accuracy benchmark: small CLIPs on CIFAR-10 or emoji, for each quantizer, distilled or not.

    python -m benchmarks.accuracy --out runs/accuracy

trains and compares all models. To train one of them, on the data that the benchmark wrote to runs/accuracy/data:

    tclip train --config accuracy:cifar10,teacher --workdir runs/teacher
    tclip train --config accuracy:cifar10,lsq --config.teacher=runs/teacher --workdir runs/lsq

After the data and the variant, `,plain` trains without distillation, and `,runlocal` is a test that takes seconds.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from tclip_jax.runs.config import base_config


def _faster(factor: float) -> dict[str, Any]:
    """Raise the learning rate of latent weights, because a trit changes only after a large change of its weight."""
    latent = r"clip/(image|text)/(blocks/.*/kernel|token_embedding/embedding)"
    return {"optimizer.groups": ((latent, {"learning_rate": factor}),)}


# Variant -> changes of the default quantizer (factor 2, groups of 256) and schedule.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"ternary": "none"},
    "full_twice": {"ternary": "none", **_faster(2.0)},
    "full_fourfold": {"ternary": "none", **_faster(4.0)},
    "full_eightfold": {"ternary": "none", **_faster(8.0)},
    "ternaryclip": {},
    "bitnet": {"quantizer.factor": 1.0, "quantizer.group": "tensor"},
    "twn": {"quantizer.kind": "twn"},
    "least_squares": {"quantizer.kind": "least_squares"},
    "lsq": {"quantizer.kind": "lsq"},
    "seq": {"quantizer.kind": "seq", "quantizer.group": "channel"},
    # The default quantizer with one change of the recipe.
    "twice": _faster(2.0),
    "fourfold": _faster(4.0),
    "eightfold": _faster(8.0),
    "group64": {"quantizer.group": 64},
    "gradual": {"ternary_warmup_steps": 0.2},
    "recovery": {"optimizer.recovery_steps": 0.1, "optimizer.recovery_learning_rate": 2e-5},
    "hidden": {"loss.hidden": 1.0},
    "relations": {"loss.relations": 1.0},
    "average": {"optimizer.ema_decay": 0.998},
    "patches": {"ternary": "all"},
}
DATA = ("cifar10", "emoji")


def get_config(arg: str = "cifar10,ternaryclip") -> ml_collections.ConfigDict:
    """Return the configuration; `arg` is DATA,VARIANT[,plain][,runlocal], where "teacher" is also a variant."""
    data, who, *modes = f"{arg},teacher".split(",")[: max(arg.count(",") + 1, 2)]
    if data not in DATA or who not in ("teacher", *VARIANTS) or set(modes) - {"plain", "runlocal"}:
        raise ValueError(f"accuracy:{arg}: write DATA,VARIANT: {', '.join(DATA)}; teacher, {', '.join(VARIANTS)}")
    local = "runlocal" in modes
    config = base_config()
    width, layers = (128, 4) if who == "teacher" else (64, 3)  # minutes on a CPU; --width of the benchmark sets others
    if local:
        width, layers = 32, 1
    config.model.embed_dim = width
    config.model.vision_cfg.update({"image_size": 32, "patch_size": 8, "width": width, "layers": layers})
    config.model.vision_cfg.head_width = min(32, width // 2)
    config.model.text_cfg.update({"width": width, "heads": max(width // 64, 2), "layers": max(layers // 2, 1)})
    config.model.text_cfg.context_length = 16
    labelled = data == "cifar10"
    config.data.update({"source": f"folder:runs/accuracy/data/{data}", "batch_size": 128})
    config.data.templates = "cifar10" if labelled else ""
    config.data.update({"augment": "random_resized_crop" if labelled else "affine"})
    config.loss.positives = "equal_text"
    config.steps = 2000 if labelled else 1000
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": config.steps // 20, "clip_norm": 1.0})
    config.checkpoint.update({"every": 500, "keep": 1})
    if labelled:
        config.eval.update({"source": config.data.source, "split": "test", "templates": "cifar10", "every": 1000})
    if local:
        config.steps, config.data.batch_size, config.optimizer.warmup_steps = 4, 16, 1
    if who == "teacher":
        return config
    config.ternary = "Q-ALL"
    if "plain" not in modes:
        config.loss.update({"crd": 1.0, "icl": 1.0, "fd": 1.0, "fd_kind": "cosine"})
    for key, value in VARIANTS[who].items():
        if key.endswith("_steps"):  # a fraction of all steps
            value = max(int(value * config.steps), 1)
        if value == "all":
            value = [("(image|text)/(blocks|token|patch).*", {})]
        config.update_from_flattened_dict({key: value})
    return config
