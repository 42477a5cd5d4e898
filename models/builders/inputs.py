"""Seeded inputs with the structure of real ones: smooth images, and padded Zipf-distributed token sequences."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.builders.graph import FloatArray, generator

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
PAD, CLS, SEP = 0, 101, 102
FIRST_WORD = 999


def images(count: int, *, size: int = 224, channels: int = 3, seed: int = 0) -> FloatArray:
    """Smooth random fields with a 1/f spectrum and correlated colours: float32 [count, channels, size, size].

    The pixels lie in 0..1 and are then normalized by ImageNet's mean and deviation (for three channels, else by 0.5
    and 0.25). Brightness, contrast, sharpness and noise differ between images, so that outputs do too.
    """
    rng = generator(seed, "images")
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    result = np.empty((count, channels, size, size), dtype=np.float32)
    mean = IMAGE_MEAN if channels == 3 else (0.5,) * channels
    std = IMAGE_STD if channels == 3 else (0.25,) * channels
    for index in range(count):
        spectrum = np.fft.rfft2(rng.standard_normal((channels + 1, size, size)))
        fields = np.fft.irfft2(spectrum / frequency ** rng.uniform(0.9, 1.3), s=(size, size))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        mixture = fields[:1] + rng.uniform(0.2, 0.8) * fields[1:]
        pixels: npt.NDArray[np.float64] = rng.uniform(0.35, 0.55, (channels, 1, 1)) + rng.uniform(0.14, 0.24) * mixture
        pixels += rng.uniform(0.005, 0.03) * rng.standard_normal(pixels.shape)
        pixels.clip(0.0, 1.0, out=pixels)
        result[index] = (pixels - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    return result


def tokens(
    count: int, *, length: int = 128, vocabulary: int = 30522, seed: int = 0
) -> dict[str, npt.NDArray[np.int64]]:
    """Batches for a BERT encoder: `input_ids`, `attention_mask` and `token_type_ids`, int64 [count, length].

    Each row is `[CLS] words [SEP]`, half of them with a second sentence, then padding; lengths vary from an eighth of
    `length` to all of it, and the words follow Zipf's law.
    """
    rng = generator(seed, "tokens")
    first = min(FIRST_WORD, vocabulary // 2)
    weights = 1.0 / np.arange(1, vocabulary - first + 1)
    ids = np.full((count, length), PAD, dtype=np.int64)
    mask = np.zeros_like(ids)
    types = np.zeros_like(ids)
    for row in range(count):
        used = int(rng.integers(max(4, length // 8), length + 1))
        ids[row, :used] = first + rng.choice(len(weights), size=used, p=weights / weights.sum())
        ids[row, 0], ids[row, used - 1] = CLS % vocabulary, SEP % vocabulary
        mask[row, :used] = 1
        if used >= 8 and rng.random() < 0.5:
            split = int(rng.integers(3, used - 3))
            ids[row, split] = SEP % vocabulary
            types[row, split + 1 : used] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
