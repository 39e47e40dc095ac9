"""Models of the accuracy benchmark: small CLIPs on CIFAR-10 or emoji, by quantizer and methods, distilled or not.

    python -m benchmarks.accuracy --out runs/accuracy

trains and compares all models. To train one of them, on the data that the benchmark wrote to runs/accuracy/data:

    tclip train --config accuracy:cifar10,teacher --workdir runs/teacher
    tclip train --config accuracy:cifar10,ternaryclip+soft+x4 --config.teacher=runs/teacher --workdir runs/soft

A variant is a quantizer and methods, such as ternaryclip+soft+x4; x4 raises the learning rate of the matrices by 4, w96
makes the student 96 wide. The captions of cifar10_words are those of cifar10, with a vocabulary of their words alone.
After the data and the variant, `,plain` trains without distillation, `,siglip` trains SigLIPs, teacher and students of
one shape, with the sigmoid loss, and `,runlocal` is a test that takes seconds.
"""

from __future__ import annotations

import re
from typing import Any

import ml_collections

from tclip_jax import keys
from tclip_jax.data.prompts import captions
from tclip_jax.runs.config import base_config

# Changes of the configuration. Keys "steps" and "..._steps" are factors of all steps, so that those of "added" come on
# top. "latent.KEY" is a key of an optimizer group: the matrices that ternary students quantize (with `patches` also the
# patch embedding).
Changes = dict[str, Any]

QUANTIZERS: dict[str, Changes] = {
    "full": {"ternary": "none"},
    "ternaryclip": {},  # factor 2, groups of 256
    "bitnet": {"quantizer.factor": 1.0, "quantizer.group": "tensor"},
    "twn": {"quantizer.kind": "twn"},
    "least_squares": {"quantizer.kind": "least_squares"},
    "lsq": {"quantizer.kind": "lsq"},
    "seq": {"quantizer.kind": "seq", "quantizer.group": "channel"},
    "sherry": {"quantizer.kind": "sherry"},  # 3 of 4 nonzero, arXiv 2601.07892
    "group64": {"quantizer.group": 64},
    "factor1.5": {"quantizer.factor": 1.5},  # about as many zeros as TWN
    "patches": {"ternary": "all"},
    # The baselines of the frontier, for the same weights as Q-ALL.
    "int8": {"quantizer.kind": "uniform", "quantizer.bits": 8, "quantizer.group": "channel"},
    "int4": {"quantizer.kind": "uniform", "quantizer.bits": 4, "quantizer.group": 128},
}
NOT_TERNARY = ("full", "int8", "int4")

# Methods of training, which full precision gets too.
METHODS: dict[str, Changes] = {
    # FTerViT, arXiv 2605.21171: a tenth of the rate again, by a second cosine, 10 % of the steps, which are added.
    "added": {
        "steps": 1.1,
        "optimizer.recovery_steps": 0.1,
        "optimizer.recovery_learning_rate": 1e-4,
        "optimizer.recovery_decay": "cosine",
    },
    "recovery": {"optimizer.recovery_steps": 0.1, "optimizer.recovery_learning_rate": 2e-5},  # taken out of the steps
    "longer": {"steps": 1.25},
    "longest": {"steps": 1.6},
    "relational": {"loss.vrd": 1.0, "loss.xrd": 1.0},  # CLIP-RD, arXiv 2603.25383
    "hidden": {"loss.hidden": 1.0},
    "relations": {"loss.relations": 1.0},
    "in_step": {},  # the teacher runs in the step; its embeddings are not those of a cache
    "int8_teacher": {"teacher_int8": True},
    "average": {"optimizer.ema_decay": 0.998},
    "undecayed": {"latent.weight_decay": 0.0},
    "decayed": {"latent.weight_decay": 0.3},
    "inherit": {"init": "teacher"},  # which has the student's shape with ",siglip"
    "muon": {"optimizer.name": "muon"},  # arXiv 2502.16982, for the matrices of blocks; at AdamW's rates
    "warm": {"optimizer.warmup_steps": 0.15},  # instead of a twentieth
    "pretrained": {"init": "full"},  # the full-precision student of the same seed, methods and rate
}
# Methods of ternary students.
TERNARY_METHODS: dict[str, Changes] = {
    "gradual": {"ternary_warmup_steps": 0.2},
    "soft": {"ternary_warmup_steps": 0.2, "ternary_anneal_steps": 0.7},  # Hestia, arXiv 2601.20745
    "dead_zone": {"quantizer.dead_zone_bias": 1e-3},  # Tequila, arXiv 2509.23809
    "clipped": {"optimizer.latent_clip": 1.0},  # BinaryConnect, arXiv 1511.00363
    "embedding4": {  # the token embedding in 4 bits, as in EdgeRazor
        "ternary": [
            ("text/token_embedding/embedding", {"kind": "uniform", "bits": 4, "dead_zone_bias": 0.0}),
            ("(image|text)/(blocks|pool)/.*", {}),
        ]
    },
    # The same for the matrices whose ternarization costs a trained student most, by `tclip sensitivity`.
    "sensitive4": {
        "ternary": [
            ("image/blocks/attention/qkv/kernel", {"kind": "uniform", "bits": 4, "dead_zone_bias": 0.0}),
            ("(image|text)/(blocks|pool|token).*", {}),
        ]
    },
    "text4": {  # the text tower in 4 bits
        "ternary": [
            ("text/(blocks|pool|token).*", {"kind": "uniform", "bits": 4, "dead_zone_bias": 0.0}),
            ("image/(blocks|pool)/.*", {}),
        ]
    },
}
# Methods of ternary students, int4 and int8.
QUANTIZED_METHODS: dict[str, Changes] = {
    "edges8": {  # what Q-ALL leaves in floats, patch embedding and projections, in 8 bits
        "ternary": [
            ("(image|text)/(patch_embedding|projection)/kernel", {"kind": "uniform", "bits": 8, "group": "channel"}),
            ("(image|text)/(blocks|token|pool).*", {}),
        ]
    },
}
DATA = ("cifar10", "cifar10_words", "emoji")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # of CIFAR-10
PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
_WIDTH, _RATE = re.compile(r"w(\d+)"), re.compile(r"x(\d+(?:\.\d+)?)")


def vocabulary() -> list[str]:
    """Return the tokens of cifar10_words by their ids. END has the largest, by which CLIP finds the end of a text."""
    texts = " ".join(caption for name in CLASSES for caption in captions(name, "cifar10"))
    return [PAD, UNKNOWN, *sorted(set(re.findall(r"\w+|[^\w\s]+", texts.lower()))), END]


def changes_of(variant: str) -> Changes:
    """Return the changes of a variant, QUANTIZER[+METHOD...].

    Raises:
      ValueError: a part has no meaning, is a method of ternary students in another one, or sets a key that another
        part sets to another value.
    """
    quantizer, *methods = variant.split("+")
    if quantizer not in QUANTIZERS:
        raise ValueError(f"{variant}: {quantizer!r} is no quantizer: there are {', '.join(QUANTIZERS)}")
    allowed = METHODS if quantizer == "full" else METHODS | QUANTIZED_METHODS
    allowed |= {} if quantizer in NOT_TERNARY else TERNARY_METHODS
    changes = dict(QUANTIZERS[quantizer])
    setters = dict.fromkeys(changes, quantizer)
    for method in methods:
        if factor := _RATE.fullmatch(method):
            changed: Changes = {"latent.learning_rate": float(factor[1])}
        elif width := _WIDTH.fullmatch(method):
            changed = {"width": int(width[1])}
        elif method in allowed:
            changed = allowed[method]
        else:
            names = f"{', '.join(allowed)}, x and a factor of the learning rate, or w and a width"
            raise ValueError(f"{variant}: {method!r} is no method of {quantizer}: there are {names}")
        for key, value in changed.items():
            if changes.setdefault(key, value) != value:
                raise ValueError(f"{variant}: {setters[key]} and {method} both set {key}: leave one of them out")
            setters.setdefault(key, method)
    return changes


def full_precision_of(variant: str) -> str:
    """Return the full-precision variant with the same methods, as far as they apply."""
    of_ternary = QUANTIZED_METHODS | TERNARY_METHODS
    return "+".join(["full", *(method for method in variant.split("+")[1:] if method not in of_ternary)])


def plain_of(variant: str) -> str:
    """Return the variant without methods: `full` for full precision, else `ternaryclip`, of the same rate and width.

    That of Muon has Muon, and that of a teacher in int8 the same teacher in floats.
    """
    quantizer, *methods = variant.split("+")
    if "int8_teacher" in methods:
        return variant.replace("int8_teacher", "in_step")
    named = METHODS | QUANTIZED_METHODS | TERNARY_METHODS
    kept = (method for method in methods if method == "muon" or method not in named)
    return "+".join(["full" if quantizer == "full" else "ternaryclip", *kept])


def steps_of(variant: str, steps: int) -> int:
    """Return all training steps of a variant, where the recipe has `steps`; with those before `pretrained`."""
    changes = changes_of(variant)
    return _part(changes.get("steps", 1.0), steps) * (2 if changes.get("init") == "full" else 1)


def _part(factor: float, steps: int) -> int:
    return max(int(factor * steps), 1)


def get_config(arg: str = "cifar10,ternaryclip") -> ml_collections.ConfigDict:
    """Return the configuration; `arg` is DATA,VARIANT[,plain][,siglip][,runlocal]; "teacher" is also a variant."""
    data, who, *modes = f"{arg},teacher".split(",")[: max(arg.count(",") + 1, 2)]
    if data not in DATA or set(modes) - {"plain", "siglip", "runlocal"}:
        raise ValueError(f"accuracy:{arg}: write DATA,VARIANT[,plain][,siglip][,runlocal], with {' or '.join(DATA)}")
    try:
        changes = {} if who == "teacher" else changes_of(who)
    except ValueError as error:
        raise ValueError(f"accuracy:{arg}: write DATA,VARIANT: {error}") from None
    local = "runlocal" in modes
    config = base_config()
    siglip = "siglip" in modes
    # Minutes on a CPU; --width of the benchmark sets others.
    width, layers = (128, 4) if who == "teacher" and not siglip else (64, 3)
    if local:
        width, layers = 32, 1
    width = changes.pop("width", width)
    config.model.embed_dim = width
    config.model.vision_cfg.update({"image_size": 32, "patch_size": 8, "width": width, "layers": layers})
    config.model.vision_cfg.head_width = min(32, width // 2)
    config.model.text_cfg.update({"width": width, "heads": max(width // 64, 2), "layers": max(layers // 2, 1)})
    config.model.text_cfg.context_length = 16
    if siglip:
        image = {"class_token": False, "patch_bias": True, "projection": False, "pool_type": "map", "norm_eps": 1e-6}
        config.model.vision_cfg.update(image)
        text = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_eps": 1e-6}
        config.model.text_cfg.update(text)
        config.model.init_logit_bias = -10.0
        config.loss.task_kind = "sigmoid"
    labelled = data != "emoji"
    config.data.update({"source": f"folder:runs/accuracy/data/{data.removesuffix('_words')}", "batch_size": 128})
    if data == "cifar10_words":
        words = vocabulary()
        name = f"words-{keys.digest({'words': words})[:8]}"  # so that other words make another configuration
        config.model.text_cfg.update({"vocab_size": len(words), "hf_tokenizer_name": name})
        config.data.tokenizer = "runs/accuracy/data/words"
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
    steps, latent = config.steps, {}
    for key, value in changes.items():
        if key.endswith("steps"):
            value = _part(value, steps)
        if value == "all":
            value = [("(image|text)/(blocks|pool|token|patch).*", {})]
        if key.startswith("latent."):
            latent[key.removeprefix("latent.")] = value
        else:
            config.update_from_flattened_dict({key: value})
    if latent:
        matrices = ["blocks/.*/kernel", "token_embedding/embedding"]  # what the variant quantizes
        if siglip:
            matrices.append("pool/.*/kernel")
        if changes.get("ternary") == "all":
            matrices.append("patch_embedding/kernel")
        config.optimizer.groups = ((f"clip/(image|text)/({'|'.join(matrices)})", latent),)
    return config
