from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from capnas.data.images import Augment, as_images, as_labels, mean_std, normalise, resize, shift_and_flip, shifts_and_flips, to_channels
from capnas.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 9), (5, 1, 8, 9)),
        ((5, 8, 9, 3), (5, 3, 8, 9)),
        ((5, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 1, 8, 8), (5, 1, 8, 8)),
        ((5, 3, 6, 3), None),
        ((5, 3, 3, 3), None),
        ((5, 2, 8, 8), (5, 2, 8, 8)),
        ((5, 8, 8, 6), (5, 6, 8, 8)),
    ],
)
def test_layouts(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for given in (array, torch.from_numpy(array)):
        if expected is None:
            with pytest.raises(DataError, match=r"permute to \(N, C, H, W\)"):
                as_images(given)
        else:
            assert as_images(given).shape == expected
    if expected == (5, 3, 8, 9) and shape[-1] == 3:
        assert as_images(array)[2, 1, 4, 5] == array[2, 4, 5, 1]


def test_floats_that_are_bytes_become_bytes_and_others_stay() -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(as_images(stored.float() / 255), stored)
    assert torch.equal(as_images(stored.double().numpy() / 255), stored)
    other = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    assert torch.equal(as_images(other), other)
    assert as_images(stored.numpy().astype(np.uint16)).dtype == torch.uint8
    assert as_images(stored.numpy() > 3).max() == 1
    for kind in (">u2", ">f4"):  # the other order of bytes, as in FITS files
        assert torch.equal(as_images(stored.numpy().astype(kind)), as_images(stored.numpy().astype(kind[1:])))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.full((3, 4, 4), np.nan), "NaN or infinity in 3 of 3 images"),
        (np.full((3, 4, 4), 300), r"integer pixels in 0..255, found 300..300"),
        (np.full((3, 4, 4), 256), "found 256..256"),
        (np.full((3, 4, 4), -1), "found -1..-1"),
        (np.zeros((3, 4)), r"found shape \(3, 4\)"),
        (np.zeros((0, 4, 4)), r"nothing empty, found shape \(0, 1, 4, 4\)"),
        (np.array(["a", "b"]), "expected numbers, found dtype"),
        ([np.zeros((3, 3)), np.zeros((4, 4))], "one array of images of one size"),
        (torch.zeros(2, 4, 4, dtype=torch.complex64), "expected real numbers"),
    ],
)
def test_unusable_arrays(array: object, text: str) -> None:
    with pytest.raises(DataError, match=text):
        as_images(array)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.eye(3), r"no one-hot rows, no text\), found shape \(3, 3\)"),
        (np.array(["cat", "dog"]), "no text"),
        (np.array([0, -1]), "integers from 0, found values such as .*-1"),
        (np.array([0.0, 1.5]), "found values such as .*1.5"),
        (np.array([0.0, np.nan]), "found values such as .*nan"),
    ],
)
def test_unusable_labels(labels: np.ndarray, text: str) -> None:
    with pytest.raises(DataError, match=text):
        as_labels(labels)


def test_column_of_labels_is_taken() -> None:
    assert as_labels(np.array([[1], [0]], np.uint8)).tolist() == [1, 0]


def test_resize_agrees_with_pillow_and_keeps_dtype() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 40, 40), dtype=np.uint8)
    ours = resize(torch.from_numpy(pixels), 16)[0].permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(pixels[0].transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BILINEAR))
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - pillow).max() <= 1
    assert abs((ours.astype(int) - pillow).mean()) < 0.1  # rounded, not cut off
    assert resize(torch.rand(2, 1, 10, 10), 12).dtype == torch.float32


def test_resize_crops_the_middle_of_the_long_side() -> None:
    wide = torch.zeros(1, 1, 4, 10, dtype=torch.uint8)
    wide[..., 3:7] = 200
    assert resize(wide, 4).eq(200).all()
    assert resize(wide.transpose(2, 3), 2).eq(200).all()


def test_channels() -> None:
    colour = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert to_channels(colour, 1).item() == 76  # 0.299 * 255
    assert to_channels(to_channels(colour, 1), 3).flatten().tolist() == [76] * 3
    with pytest.raises(DataError, match="images of 3 channels can be read as 3 or 1 channels, not as 4"):
        to_channels(colour, 4)


def test_mean_and_std_against_numpy() -> None:
    x = torch.randint(0, 256, (3000, 3, 4, 4), dtype=torch.uint8)
    index = torch.arange(0, 3000, 2)
    mean, std = mean_std(x, index)
    reference = x[index].numpy() / 255
    np.testing.assert_allclose(mean, reference.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, reference.std((0, 2, 3)), rtol=1e-9)
    threads = torch.get_num_threads()
    many = 3 * torch.rand(1024, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + 0.7  # floats of one channel: bytes sum exactly
    found = set()
    for count in (1, 2, 3, 5):  # which a session of another number of workers has
        torch.set_num_threads(count)
        found.add(mean_std(many, torch.arange(1024)))
    torch.set_num_threads(threads)
    assert len(found) == 1
    y = normalise(x[index], mean, std)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0)


def test_statistics_of_a_constant_and_of_a_far_mean() -> None:
    assert mean_std(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), torch.arange(4)) == ((0.2,), (1.0,))
    far = torch.randn(500, 1, 8, 8) + 1e6
    _, std = mean_std(far, torch.arange(500))
    assert std[0] == pytest.approx(float(far.double().std(unbiased=False)), rel=1e-9)


def test_normalise_leaves_its_input() -> None:
    x = torch.ones(2, 1, 2, 2)
    normalise(x, (0.5,), (0.5,))
    assert x.eq(1).all()


def slow_shift_and_flip(x: np.ndarray, draws: np.ndarray, pad: int) -> np.ndarray:
    out = np.empty_like(x)
    for i, (dy, dx, mirror) in enumerate(draws):
        big = np.pad(x[i], ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        view = big[:, pad + dy : pad + dy + x.shape[2], pad + dx : pad + dx + x.shape[3]]
        out[i] = view[..., ::-1] if mirror else view
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_shift_and_flip_against_a_loop_of_padded_crops(channels: int) -> None:
    x = torch.randint(0, 256, (50, channels, 16, 16), dtype=torch.uint8)
    draws = shifts_and_flips(50, Augment(shift=5), 16, torch.Generator().manual_seed(3))
    assert set(draws[:, 2].tolist()) == {0, 1}
    assert draws[:, :2].abs().max() == 5
    np.testing.assert_array_equal(shift_and_flip(x, draws).numpy(), slow_shift_and_flip(x.numpy(), draws.numpy(), 5))


def test_augmentation_can_be_switched_off_by_part() -> None:
    draws = shifts_and_flips(100, Augment(flip=False, shift=0), 16, torch.Generator().manual_seed(0))
    assert not draws.any()
    with pytest.raises(UsageError, match="shift must be at least 0 and smaller than the image"):
        Augment(shift=16).pixels(16)


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_words_of_torch_are_bytes_if_they_fit(kind: torch.dtype) -> None:
    x = torch.tensor([[[0, 255], [1, 2]]]).to(kind)
    assert as_images(x).flatten().tolist() == [0, 255, 1, 2]
    with pytest.raises(DataError, match=r"integer pixels in 0\.\.255, found 3\.\.300"):
        as_images(torch.tensor([[[3, 300]]]).to(kind))


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_labels_that_are_no_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(DataError, match="expected integers from 0"):
        as_labels([0.0, wrong])
    with pytest.raises(DataError, match="expected integers from 0"):
        as_labels(torch.tensor([wrong]))


def test_floats_far_below_a_byte_stay_floats() -> None:
    x = torch.rand(3, 4, 4) * 1e-6
    assert torch.equal(as_images(x)[:, 0], x)
    assert as_images(torch.tensor([[[0.0, 1.0]]])).dtype == torch.uint8
