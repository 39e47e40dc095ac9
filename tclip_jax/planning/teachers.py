"""The architecture of a run's teacher, found without its weights and without network access."""

from __future__ import annotations

from etils import epath

from tclip_jax.data.embedding_store import MANIFEST as CACHE_MANIFEST
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.inference.load import Architecture, find_architecture
from tclip_jax.interop.checkpoints import HUB_PREFIX
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS, model_cfg
from tclip_jax.runs.config import RunConfig
from tclip_jax.training.teacher_cache import describe_inputs, open_cache

# repository on the Hugging Face hub -> preset, for common teachers
HUB = {
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": "ViT-L-14",
    "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": "ViT-L-14",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "ViT-B-16",
    "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K": "ViT-B-16",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "ViT-B-32",
}


def find_teacher(run: RunConfig, preset: str = "") -> Architecture | TeacherCache | None:
    """Return the architecture or the cache of a run's teacher, or None without a teacher.

    Args:
      run: the run; its `teacher` is a preset, a run, an artifact, a checkpoint or a key of `HUB`.
      preset: name of `PRESETS` or path of an open_clip JSON file, in place of the teacher or the cache of the run.

    Raises:
      ValueError: the architecture of the teacher is unknown.
    """
    if run.data.teacher_cache:
        if (epath.Path(run.data.teacher_cache) / CACHE_MANIFEST).exists():
            return open_cache(run)
        width = _architecture(run, preset, run.data.teacher_cache).config.embed_dim
        return TeacherCache(
            run.data.teacher_cache, preset, run.data.source, width, 100.0, 1, 1, run.seed, 1, describe_inputs(run)
        )
    return _architecture(run, preset, run.teacher) if run.teacher else None


def _architecture(run: RunConfig, preset: str, teacher: str) -> Architecture:
    preset = preset or HUB.get(teacher.removeprefix(HUB_PREFIX), teacher if teacher in PRESETS else "")
    if preset:
        return Architecture(CLIPConfig.from_open_clip(model_cfg(preset)), run.preprocess)
    reason = ""
    if not teacher.startswith(HUB_PREFIX):  # no network here
        try:
            return find_architecture(teacher)
        except FileNotFoundError as error:
            reason = f" ({error})"
    raise ValueError(
        f"the architecture of the teacher {teacher!r} is unknown: it is not a preset, not a run, artifact or checkpoint"
        f" on this machine{reason}, and not one of {', '.join(HUB)}; add --teacher-preset with the path of an open_clip"
        f" JSON file or one of {', '.join(PRESETS)}"
    )
