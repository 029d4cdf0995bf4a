"""Crop boxes by their properties; crop and scale compared with PyAV's own conversion."""

import av
import numpy as np
import pytest

from wmjax.data.media.transforms import FULL_BOX, Box, centre_box, crop_and_scale, random_box


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(box, height, width):
    edges = np.array([box.top * height, box.left * width, box.height * height, box.width * width])
    np.testing.assert_allclose(edges, edges.round(), atol=1e-9)
    return edges.round().astype(int)


@pytest.mark.parametrize("out_aspect", [1.0, 16 / 9])
def test_random_boxes_keep_to_area_and_aspect(out_aspect):
    rng = np.random.default_rng(0)
    areas, log_aspects, places = [], [], []
    for _ in range(4000):
        box = random_box(rng, 480, 640, (0.2, 0.4), (0.75, 1.35), out_aspect)
        top, left, height, width = pixels(box, 480, 640)
        assert top >= 0
        assert left >= 0
        assert top + height <= 480
        assert left + width <= 640
        areas.append(height * width / (480 * 640))
        log_aspects.append(np.log(width / height / out_aspect))
        places.append(left / max(640 - width, 1))
    # Uniform in area and position, log-uniform in aspect, within the rounding to pixels.
    assert 0.195 < min(areas) < 0.21
    assert 0.39 < max(areas) < 0.405
    assert abs(np.mean(areas) - 0.3) < 0.005
    assert np.log(0.74) < min(log_aspects) < np.log(0.77)
    assert np.log(1.32) < max(log_aspects) < np.log(1.37)
    assert abs(np.mean(log_aspects) - np.log(0.75 * 1.35) / 2) < 0.01
    assert abs(np.mean(places) - 0.5) < 0.02


def test_random_box_falls_back_to_the_centre():
    box = random_box(np.random.default_rng(0), 10, 1000, scale=(0.9, 1.0))
    assert pixels(box, 10, 1000).tolist() == [0, 493, 10, 14]
    assert random_box(np.random.default_rng(0), 48, 48, scale=(4, 5)) == FULL_BOX


def test_random_box_follows_its_generator():
    boxes = [random_box(np.random.default_rng(seed), 480, 640) for seed in (1, 1, 2)]
    assert boxes[0] == boxes[1] != boxes[2]


def test_centre_box():
    assert pixels(centre_box(480, 640), 480, 640).tolist() == [0, 80, 480, 480]
    assert pixels(centre_box(640, 480), 640, 480).tolist() == [80, 0, 480, 480]
    assert centre_box(480, 640, out_aspect=4 / 3) == FULL_BOX
    assert pixels(centre_box(480, 640, out_aspect=2), 480, 640).tolist() == [80, 0, 320, 640]


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "rgb24"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_full_box_at_the_same_size_is_the_plain_conversion(pixel_format, size):
    frames = [
        av.VideoFrame.from_ndarray(picture(*size, seed), format="rgb24").reformat(
            format=pixel_format
        )
        for seed in range(3)
    ]
    video_THWC = crop_and_scale(frames, FULL_BOX, *size)
    assert video_THWC.dtype == np.uint8
    np.testing.assert_array_equal(
        video_THWC, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    )


def test_arrays_pass_untouched_or_are_cropped():
    frames = [picture(24, 32, seed) for seed in range(2)]
    np.testing.assert_array_equal(crop_and_scale(frames, FULL_BOX, 24, 32), np.stack(frames))
    box = Box(6 / 24, 9 / 32, 11 / 24, 15 / 32)
    np.testing.assert_array_equal(
        crop_and_scale(frames, box, 11, 15), np.stack(frames)[:, 6:17, 9:24]
    )


def test_crop_of_a_decoded_frame_is_where_the_box_says():
    blocks_HWC = np.kron(picture(6, 8), np.ones((8, 8, 1), np.uint8))
    frame = av.VideoFrame.from_ndarray(blocks_HWC, format="rgb24").reformat(format="yuv420p")
    box = Box(8 / 48, 16 / 64, 24 / 48, 32 / 64)
    np.testing.assert_array_equal(
        crop_and_scale([frame], box, 24, 32)[0], frame.to_ndarray(format="rgb24")[8:32, 16:48]
    )


def test_scaling_down_averages_all_pixels():
    checks_HWC = np.indices((64, 64)).sum(0)[..., None] % 2 * np.full(3, 255)
    video_THWC = crop_and_scale([checks_HWC.astype(np.uint8)], FULL_BOX, 16, 8)
    assert video_THWC.shape == (1, 16, 8, 3)
    assert np.abs(video_THWC[0, 2:-2, 2:-2].astype(int) - 127).max() <= 3
