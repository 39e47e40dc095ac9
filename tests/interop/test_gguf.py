from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.checkpoints import open_checkpoint, resize_positions
from tclip_jax.interop.gguf import read_gguf, verify_gguf, write_gguf
from tclip_jax.interop.gguf_file import KINDS, Tensor, read_header, write_file
from tclip_jax.interop.open_clip import to_open_clip
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.ternary import TernaryTensor
from tests.object_store import Bucket

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

CONFIG = CLIPConfig(
    embed_dim=40,
    vision=VisionConfig(image_size=(32, 32), patch_size=16, width=256, layers=2, mlp_ratio=3.0),
    text=TextConfig(context_length=8, vocab_size=300, width=256, heads=2, layers=1, mlp_ratio=2.0),
    quick_gelu=True,
)
PIXELS = Preprocess(32)
# Every granularity that GGUF can hold: weights along the inputs that share a scale, and whether all outputs do.
GROUPS = {
    "image/blocks/attention/qkv/kernel": 256,
    "image/blocks/attention/out/kernel": "channel",
    "image/blocks/mlp/fc1/kernel": "tensor",
    "image/blocks/mlp/fc2/kernel": 256,
    "image/projection/kernel": 256,
    "text/blocks/attention/qkv/kernel": "tensor",
    "text/blocks/attention/out/kernel": 256,
    "text/blocks/mlp/fc1/kernel": "channel",
    "text/blocks/mlp/fc2/kernel": 512,
    "text/projection/kernel": "channel",
    "text/token_embedding/embedding": 256,
}

# clip.cpp's name for each name of open_clip, with the index of the third (q, k, v) and whether it is transposed.
OUTSIDE = {
    "v.patch_embd.weight": "visual.conv1.weight",
    "v.class_embd": "visual.class_embedding",
    "v.position_embd.weight": "visual.positional_embedding",
    "v.pre_ln": "visual.ln_pre",
    "v.post_ln": "visual.ln_post",
    "t.token_embd.weight": "token_embedding.weight",
    "t.position_embd.weight": "positional_embedding",
    "t.post_ln": "ln_final",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
INSIDE = {
    "ln1": "ln_1",
    "ln2": "ln_2",
    "attn_q": "attn.in_proj_",
    "attn_k": "attn.in_proj_",
    "attn_v": "attn.in_proj_",
    "attn_out": "attn.out_proj",
    "ffn_down": "mlp.c_fc",
    "ffn_up": "mlp.c_proj",
}


def from_open_clip_state(name: str, state: dict[str, np.ndarray]) -> np.ndarray:
    """Return the expected values of the tensor with this name."""
    if match := re.fullmatch(r"([vt])\.blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        tower, layer, part, kind = match.groups()
        key = f"{'visual.' if tower == 'v' else ''}transformer.resblocks.{layer}.{INSIDE[part]}"
        value = state[f"{key}{kind}" if key.endswith("_") else f"{key}.{kind}"]
        return np.split(value, 3)["qkv".index(part[-1])] if part in ("attn_q", "attn_k", "attn_v") else value
    if name in OUTSIDE:
        return state[OUTSIDE[name]].T if name.endswith("projection.weight") else state[OUTSIDE[name]]
    stem, _, kind = name.rpartition(".")
    return state[f"{OUTSIDE[stem]}.{kind}"]


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


@pytest.fixture(scope="module")
def params(random_params: Draw) -> Params:
    """Return scales of 11 significant bits, down to the smallest of float16."""
    leaves, rng = flatten_dict(random_params(CONFIG), sep="/"), np.random.default_rng(1)
    for path, group in GROUPS.items():
        axis = -1 if path.endswith("embedding") else -2
        trits: Any = rng.integers(-1, 2, leaves[path].shape, np.int8)
        length = trits.shape[axis]
        shape = list(trits.shape)
        shape[axis] = length // group if isinstance(group, int) else 1
        shape[-1] = 1 if group == "tensor" else shape[-1]
        scale: Any = rng.integers(1024, 2048, shape) * np.exp2(rng.choice([-24.0, -20.0, -12.0], shape))
        leaves[path] = TernaryTensor(trits, scale.astype(np.float32), group if isinstance(group, int) else length, axis)
    return unflatten_dict(leaves, sep="/")


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, params: Params, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    write_gguf(path, config=CONFIG, preprocess=PIXELS, params=params, kind=request.param)
    return path


def replaced(params: Params, path: str, leaf: Any) -> Params:
    return unflatten_dict({**flatten_dict(params, sep="/"), path: leaf}, sep="/")


def test_the_gguf_package_reads_every_tensor_to_the_bit(file: pathlib.Path, params: Params) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    state = to_open_clip(params, CONFIG)
    assert len(tensors) == 14 - 1 + 3 * 16
    for name, tensor in tensors.items():
        expected = from_open_clip_state(name, state)
        assert tensor.shape.tolist() == list(reversed(expected.shape))
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        assert_same_bits(np.ascontiguousarray(decoded), np.ascontiguousarray(expected))
    ternary = {name for name, tensor in tensors.items() if tensor.tensor_type.name == file.stem.upper()}
    assert len(ternary) == 3 * 6 + 3
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if name not in ternary} == {"F32"}


def test_metadata_are_those_of_clip_cpp(file: pathlib.Path, params: Params) -> None:
    reader = gguf.GGUFReader(file)
    expected = {
        "general.architecture": "clip",
        "general.file_type": gguf.LlamaFileType[f"MOSTLY_{file.stem.upper()}"],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "clip.has_text_encoder": True,
        "clip.has_vision_encoder": True,
        "clip.use_gelu": False,
        "clip.logit_scale": float(params["logit_scale"]),
        "clip.text.embedding_length": 256,
        "clip.text.feed_forward_length": 512,
        "clip.text.projection_dim": 40,
        "clip.text.attention.head_count": 2,
        "clip.text.attention.layer_norm_epsilon": float(np.float32(1e-5)),
        "clip.text.block_count": 1,
        "clip.text.context_length": 8,
        "clip.vision.embedding_length": 256,
        "clip.vision.feed_forward_length": 768,
        "clip.vision.projection_dim": 40,
        "clip.vision.attention.head_count": 4,
        "clip.vision.attention.layer_norm_epsilon": float(np.float32(1e-5)),
        "clip.vision.block_count": 2,
        "clip.vision.image_size": 32,
        "clip.vision.patch_size": 16,
        "clip.vision.image_mean": np.float32(PIXELS.mean).tolist(),
        "clip.vision.image_std": np.float32(PIXELS.std).tolist(),
    }
    assert {key: reader.get_field(key).contents() for key in expected} == expected
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == 300 and tokens[0] == "!" and tokens[256] == "!</w>"


def test_it_is_read_as_it_was_written(file: pathlib.Path, params: Params) -> None:
    config, preprocess, decoded = read_gguf(file)
    assert (config, preprocess) == (CONFIG, PIXELS)
    leaves, expected = flatten(decoded), flatten(params)
    assert leaves.keys() == expected.keys()
    for path, leaf in expected.items():
        assert isinstance(leaves[path], TernaryTensor) == isinstance(leaf, TernaryTensor)
        if isinstance(leaf, TernaryTensor):
            assert leaves[path].group == 256 and leaves[path].axis == leaf.axis
            assert_same_bits(leaves[path].trits, leaf.trits)
            assert_same_bits(leaves[path].dequantize(), leaf.dequantize())
        else:
            assert_same_bits(leaves[path], np.asarray(leaf))
    verify_gguf(file, params)


def test_export_of_an_import_is_identical_to_the_byte(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config, preprocess, params = read_gguf(file)
    write_gguf(tmp_path / "again", config=config, preprocess=preprocess, params=params, kind=file.stem)  # type: ignore
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_bytes_per_weight(file: pathlib.Path, params: Params) -> None:
    ternary = [tensor for tensor in gguf.GGUFReader(file).tensors if tensor.tensor_type.name == file.stem.upper()]
    weights = sum(leaf.trits.size for leaf in flatten(params).values() if isinstance(leaf, TernaryTensor))
    assert sum(int(tensor.n_elements) for tensor in ternary) == weights
    assert sum(int(tensor.n_bytes) for tensor in ternary) == weights // 256 * {"tq1_0": 54, "tq2_0": 66}[file.stem]


def other_trit(leaf: Any) -> Any:
    trits = leaf.trits.copy()
    trits[-1, -1, -1] = trits[-1, -1, -1] % 3 - 1
    return dataclasses.replace(leaf, trits=trits)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("image/blocks/attention/qkv/kernel", other_trit),
        ("text/blocks/mlp/fc2/kernel", lambda leaf: dataclasses.replace(leaf, scale=leaf.scale * 2)),
        ("text/blocks/mlp/fc1/kernel", lambda leaf: np.asarray(leaf.dequantize())),
        ("image/ln_pre/bias", lambda leaf: np.nextafter(leaf, np.float32(9))),
        ("image/blocks/attention/out/bias", np.negative),
        ("logit_scale", lambda leaf: leaf + np.float32(1)),
    ],
)
def test_verify_names_what_differs(path: str, change: Callable[[Any], Any], file: pathlib.Path, params: Params) -> None:
    other = replaced(params, path, change(flatten(params)[path]))
    with pytest.raises(ValueError, match=rf"{file.name}: {path} differs from the given parameters"):
        verify_gguf(file, other)


def test_a_patch_embedding_is_float16_only_where_that_is_exact(params: Params, tmp_path: pathlib.Path) -> None:
    path = "image/patch_embedding/kernel"
    exact = flatten(params)[path].astype(np.float16).astype(np.float32)
    half = replaced(params, path, exact)
    write_gguf(tmp_path / "half.gguf", config=CONFIG, preprocess=PIXELS, params=half, kind="tq1_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "half.gguf").tensors}
    assert [name for name, kind in types.items() if kind == "F16"] == ["v.patch_embd.weight"]
    verify_gguf(tmp_path / "half.gguf", half)
    assert_same_bits(flatten(read_gguf(tmp_path / "half.gguf")[2])[path], exact)


def test_a_file_of_the_gguf_package_is_read(file: pathlib.Path, params: Params, tmp_path: pathlib.Path) -> None:
    """Write the model as clip.cpp's converter does: gguf's writer and quantizer, and float16 for float weights."""
    ours, state = gguf.GGUFReader(file), to_open_clip(params, CONFIG)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "clip")
    for key, field in ours.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in reversed(ours.tensors):
        kind = tensor.tensor_type if tensor.tensor_type.name == file.stem.upper() else gguf.GGMLQuantizationType.F16
        value = np.ascontiguousarray(from_open_clip_state(tensor.name, state))
        writer.add_tensor(tensor.name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, preprocess, decoded = read_gguf(tmp_path / "theirs.gguf")
    assert (config, preprocess) == (CONFIG, PIXELS)
    leaves, expected = flatten(decoded), flatten(read_gguf(file)[2])
    assert leaves.keys() == expected.keys()
    for path, leaf in expected.items():
        if isinstance(leaf, TernaryTensor):
            assert_same_bits(leaves[path].trits, leaf.trits)
            assert_same_bits(leaves[path].scale, leaf.scale)
        else:
            half = leaf if path == "logit_scale" else leaf.astype(np.float16).astype(np.float32)
            assert_same_bits(leaves[path], half)


def rewrite(
    file: pathlib.Path,
    path: pathlib.Path,
    fields: dict[str, Any],
    tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray] | None],
) -> None:
    """Rewrite the file with changed fields, and with changed or without some tensors."""
    data = file.read_bytes()
    with file.open("rb") as opened:
        metadata, places = read_header(opened, len(data), "clip")
    pixels = {key: tuple(value.tolist()) for key, value in metadata.items() if isinstance(value, np.ndarray)}
    contents = {
        name: (place.type, place.shape, np.frombuffer(data[place.offset : place.offset + place.nbytes], np.uint8))
        for name, place in places.items()
    }
    for name, other in tensors.items():
        del contents[name]
        contents |= {name: other} if other else {}
    places_of = {name: Tensor(kind, shape) for name, (kind, shape, _) in contents.items()}
    write_file(path, metadata | pixels | fields, places_of, (array for _, _, array in contents.values()))


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"clip.has_text_encoder": False}, {}, "it has no text encoder: only a CLIP with two towers can be read"),
        ({"general.architecture": "llama"}, {}, "the architecture is 'llama': only 'clip' can be read"),
        ({"clip.text.block_count": 2}, {}, "the list of tensors does not fit the model: missing t.blk.1.attn_k.bias"),
        ({"clip.vision.block_count": 1}, {}, "unexpected v.blk.1.attn_k.bias"),
        (
            {"clip.vision.image_size": 64},
            {},
            r"v.position_embd.weight has shape \(5, 256\): the model's is \(17, 256\)",
        ),
        ({}, {"t.post_ln.bias": None}, "missing t.post_ln.bias"),
        ({}, {"t.post_ln.bias": ("F32", (256,), np.full(256, np.nan, np.float32))}, "tensor t.post_ln.bias holds NaN"),
        ({}, {"t.post_ln.bias": ("F16", (256,), np.full(256, np.inf, np.float16))}, "tensor t.post_ln.bias holds NaN"),
        (
            {},
            {"t.post_ln.bias": ("TQ1_0", (256,), np.zeros(54, np.uint8))},
            "tensor t.post_ln.bias has type TQ1_0: it must be F32 or F16",
        ),
        (
            {},
            {"v.blk.1.attn_k.weight": ("F32", (256, 256), np.zeros(256 * 256, np.float32))},
            "tensor v.blk.1.attn_k.weight has type F32, v.blk.0.attn_q.weight has TQ",
        ),
        (
            {},
            {"v.blk.0.ffn_up.weight": ("TQ2_0", (256, 768), np.full(256 * 198, 255, np.uint8))},
            "ffn_up.weight: a byte of a tq2_0",
        ),
        (
            {},
            {"v.blk.0.ffn_up.weight": ("TQ2_0", (256, 768), np.full(256 * 198, 0x9A, np.uint8))},
            "ffn_up.weight: a scale is",
        ),
    ],
)
def test_files_that_are_not_the_model_are_refused(
    fields: dict[str, Any], tensors: Any, message: str, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "other.gguf"
    rewrite(file, path, fields, tensors)
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_rewriting_alone_changes_nothing(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rewrite(file, tmp_path / "same", {}, {})
    assert (tmp_path / "same").read_bytes() == file.read_bytes()


def test_damaged_files_are_refused_or_read(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Random changes in the header give at most a ValueError, of one line with the file's name."""
    data, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    with file.open("rb") as opened:
        end = min(place.offset for place in read_header(opened, len(data), "clip")[1].values())
    tokens = data.index(b"tokenizer.ggml.tokens")
    for place in [*rng.integers(0, tokens + 40, 8), *rng.integers(tokens + 4000, end, 8)]:
        broken = bytearray(data)
        broken[place] ^= 1 << rng.integers(8)
        (tmp_path / "broken.gguf").write_bytes(broken)
        try:
            read_gguf(tmp_path / "broken.gguf")
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/broken.gguf: ") and "\n" not in str(error)
            refused += 1
    assert refused > 8


def test_a_gguf_is_opened_as_the_model_and_for_the_size_that_are_asked_for(file: pathlib.Path) -> None:
    larger = open_checkpoint(file, image_size=64)
    assert larger.config.vision.image_size == larger.preprocess.size == (64, 64)
    positions = read_gguf(file)[2]["image"]["position_embedding"]
    np.testing.assert_array_equal(larger.params["image"]["position_embedding"], resize_positions(positions, (4, 4)))
    with pytest.raises(ValueError, match=rf"{file.name}: its embed_dim is 40, but the given model's is 512"):
        open_checkpoint(file, like="ViT-B-16")


def test_an_object_store_holds_the_same_bytes(
    file: pathlib.Path, params: Params, bucket: type[Bucket], tmp_path: pathlib.Path
) -> None:
    path = epath.Path("gs://bucket/model.gguf")
    write_gguf(path, config=CONFIG, preprocess=PIXELS, params=params, kind=file.stem)  # type: ignore[arg-type]
    assert path.read_bytes() == file.read_bytes()
    verify_gguf(path, params)


def test_the_package_is_missing(file: pathlib.Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=rf"{file.name}: .*: GGUF files need pip install 'tclip-jax\[gguf\]'$"):
        read_gguf(file)
    with pytest.raises(ValueError, match=r"pip install 'tclip-jax\[gguf\]'$"):
        write_gguf(file.parent / "none.gguf", config=CONFIG, preprocess=PIXELS, params=params, kind="tq1_0")
    assert not list(file.parent.glob("none.gguf*"))


def test_there_is_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        read_gguf(tmp_path / "none.gguf")
