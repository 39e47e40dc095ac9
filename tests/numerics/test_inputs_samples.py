from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tclip_jax.data.tokenizer import EOT
from tclip_jax.inference.model import Model
from tclip_jax.numerics.inputs import sample_batch, sample_images, sample_texts


def test_always_the_same_and_varied() -> None:
    texts = sample_texts(300)
    assert texts == sample_texts(300) and texts[:5] == sample_texts(5)
    assert len(set(texts)) > 290 and "" in texts and max(map(len, texts)) > 300
    images = sample_images(40)
    assert [np.asarray(a).tobytes() for a in images] == [np.asarray(b).tobytes() for b in sample_images(40)]
    assert {"RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"} <= {image.mode for image in images}
    assert any(image.getexif() for image in images)
    assert {min(image.size) for image in images} >= {1} and any(image.width > image.height for image in images)


def test_a_batch_reaches_the_last_position(model: Model) -> None:
    pixels, tokens = sample_batch(model, 6)
    assert pixels.shape == (6, 16, 16, 3) and pixels.dtype == np.float32
    ends = tokens.argmax(axis=-1)
    assert tokens.shape == (6, 12) and (ends == 11).sum() >= 3 and ends.min() < 11
    assert (tokens.max(axis=-1) == EOT).all()


def test_refuses_a_model_that_no_sample_fits(model: Model) -> None:
    with pytest.raises(ValueError, match="a batch of 0"):
        sample_batch(model, 0)
    text = dataclasses.replace(model.config.text, vocab_size=50)
    with pytest.raises(ValueError, match="vocab_size is 50: sample texts need CLIP's 49408"):
        sample_batch(dataclasses.replace(model, config=dataclasses.replace(model.config, text=text)), 1)
