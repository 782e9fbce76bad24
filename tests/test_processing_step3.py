import base64
import functools
import http.server
import importlib
import io
import json
import operator
import random
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from benchmark import plain_pixels
from conftest import ROOT
from jinja2 import TemplateError
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.chat_parsing import ResponseParser

import step3_vl.processing_step3
from step3_vl import Step3VLImageProcessor, Step3VLProcessor
from step3_vl.processing_step3 import RESPONSE_TEMPLATE, plan_picture


pytestmark = pytest.mark.releases


RAMP = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
NORMALISED = np.linspace(-1.79, 2.14, 243).reshape(9, 9, 3)
GOLDENS = json.loads((ROOT / "tests" / "goldens" / "processor.json").read_text())
STEP3_TINY = ROOT / "checkpoints" / "step3-tiny"


def noise(width, height, channels=3, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def png(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png", **options)
    return file.getvalue()


@functools.cache
def served(folder: Path) -> str:
    """The address at which a folder's files are there until the tests end."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def released() -> Step3VLImageProcessor:
    return Step3VLImageProcessor()


def pixels_of(picture, **kwargs) -> torch.Tensor:
    return Step3VLImageProcessor(**kwargs)(picture, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(("size", "view", "window", "columns", "rows"), [
    # The shorter side below 32 and more than 4:1: padded.
    ((125, 31), (125, 125), 0, 0, 0), ((124, 31), (124, 31), 31, 4, 1), ((192, 32), (192, 32), 32, 6, 1),
    # Beyond 3024 pixels: scaled down.
    ((3024, 1000), (3024, 1000), 504, 6, 2), ((3025, 1000), (3024, 999), 504, 6, 2),
    ((30000, 3000), (3024, 302), 302, 10, 1),
    # Up to 728 pixels: cut if more than 3:2, which photographs have.
    ((600, 400), (600, 400), 0, 0, 0), ((601, 400), (601, 400), 400, 2, 1), ((728, 728), (728, 728), 0, 0, 0),
    # Beyond: windows of 504 pixels, or of the shorter side if more than 4:1.
    ((729, 400), (729, 400), 504, 2, 1), ((800, 200), (800, 200), 504, 2, 1), ((801, 200), (801, 200), 200, 4, 1),
    # A rest of more than 0.2 windows is another one, in floats: 6 / 5 - 1 is below 0.2, 11 / 5 - 2 above.
    ((604, 1000), (604, 1000), 504, 1, 2), ((605, 1000), (605, 1000), 504, 2, 2),
    ((219, 100), (219, 100), 100, 2, 1), ((220, 100), (220, 100), 100, 3, 1),
])  # fmt: skip
def test_plans_where_a_rule_begins(released, size, view, window, columns, rows):
    plan = released.plan(*size)
    assert (plan.view_size, plan.window, plan.columns, plan.rows) == (view, window, columns, rows)
    assert plan.padded_size == ((125, 125) if size == (125, 31) else size)


def test_counts_of_the_goldens(released, processor):
    released_processor = Step3VLProcessor(released, processor.tokenizer)
    sizes = [(golden["height"], golden["width"]) for golden in GOLDENS["sizes"]]
    counts = released_processor._get_num_multimodal_tokens(sizes)
    for i, golden in enumerate(GOLDENS["sizes"]):
        plan = released.plan(golden["width"], golden["height"])
        assert (plan.num_patches, plan.num_newlines) == (golden["num_patches"], golden["num_newlines"]), golden
        assert counts["num_image_tokens"][i] == golden["num_tokens"], golden
        assert counts["num_image_patches"][i] == golden["num_patches"], golden


def test_pixels_of_the_goldens(released):
    def golden_picture(width, height) -> Image.Image:
        y, x, c = np.mgrid[:height, :width, :3]
        return Image.fromarray(((7 * x + 13 * y + 29 * c + (x * y) // 17) % 256).astype(np.uint8))

    goldens = GOLDENS["pixels"]
    output = released([golden_picture(g["width"], g["height"]) for g in goldens], return_tensors="pt")
    assert output["num_patches"].tolist() == [g["num_patches"] for g in goldens]
    assert output["patch_newline_mask"].tolist() == [newline for g in goldens for newline in g["patch_newline_mask"]]
    patches = iter(output["patch_pixel_values"])
    for view, golden in zip(output["pixel_values"], goldens, strict=True):
        pairs = [(view, golden["pixel_values"][0])]
        pairs += [(next(patches), expected) for expected in golden["patch_pixel_values"]]
        for pixels, expected in pairs:
            sampled = pixels.flatten()[expected["at"]]
            torch.testing.assert_close(sampled, torch.tensor(expected["values"]), atol=1e-5, rtol=0)
            assert abs(pixels.mean().item() - expected["mean"]) < 1e-5
            assert abs(pixels.std().item() - expected["std"]) < 1e-5


@pytest.mark.parametrize("seed", range(100))
def test_every_patch_lies_in_the_plan(seed):
    draw = random.Random(seed)
    width, height = (draw.randint(1, draw.choice([40, 800, 6000])) for _ in range(2))
    view, patch, longest = draw.randint(14, 900), draw.randint(14, 900), draw.randint(100, 4000)
    plan = plan_picture(width, height, view, min(patch, view), longest)
    assert max(plan.view_size) <= longest and min(plan.view_size) >= 1
    assert plan.num_newlines == sum(plan.newline_mask) == max(plan.rows - 1, 0)
    assert len(plan.newline_mask) == plan.num_patches == plan.rows * plan.columns
    if plan.num_patches:
        assert 0 < plan.window <= max(plan.view_size)
        for side, count in zip(plan.cut_size, (plan.columns, plan.rows), strict=True):
            assert (count - 1) * plan.window < side <= count * plan.window  # each square has something of the picture


@pytest.mark.parametrize(
    ("options", "patches"),
    [
        ({"do_patch": False}, [0, 0, 0, 0]),
        ({"max_patches": 4}, [4, 2, 0, 0]),
        ({"max_patches": 11}, [9, 6, 11, 0]),
        ({"max_pixels": 1000 * 1000}, [4, 6, 11, 0]),
        ({"max_pixels": 900 * 900, "max_patches": 2}, [0, 2, 0, 0]),
    ],
)
def test_limits_of_patches_hold_and_are_counted(processor, options, patches):
    """As options of the processor and of a call, and as serving engines ask; the last picture has no patches anyway."""
    sizes = [(1500, 1500), (800, 1500), (3000, 280), (700, 700)]
    pictures = [noise(*size) for size in sizes]
    image_processor = Step3VLImageProcessor()
    calls = [(Step3VLProcessor(image_processor, processor.tokenizer), options)]
    calls += [(Step3VLProcessor(Step3VLImageProcessor(**image_processor.to_dict() | options), processor.tokenizer), {})]
    for limited, given in calls:
        inputs = limited(text=[limited.image_token] * 4, images=[[p] for p in pictures], padding=True, **given)
        assert list(inputs["num_patches"]) == patches
        counts = limited._get_num_multimodal_tokens([size[::-1] for size in sizes], **given)
        assert counts["num_image_patches"] == patches
        assert counts["num_image_tokens"] == [sum(mask) for mask in inputs["attention_mask"]]
    ask = image_processor.get_number_of_image_patches
    assert [ask(height, width, options) for width, height in sizes] == patches
    with pytest.raises(ValueError, match="`max_patches` must be at least 0, got -1"):
        image_processor(pictures[0], max_patches=-1)


def test_a_batch_is_its_pictures_one_by_one():
    image_processor = Step3VLImageProcessor(size={"height": 112, "width": 112}, patch_size=56, max_image_size=336)
    pictures = [noise(*size, seed=i) for i, size in enumerate([(90, 90), (300, 80), (90, 90), (20, 100), (401, 333)])]
    together = image_processor(pictures, return_tensors="pt")
    alone = [image_processor(picture, return_tensors="pt") for picture in pictures]
    for name in ("pixel_values", "num_patches", "patch_pixel_values"):
        assert torch.equal(together[name], torch.cat([one[name] for one in alone if name in one])), name


@pytest.mark.parametrize("size", [
    (3024, 3024), (3100, 500), (1000, 700), (1008, 700), (1008, 1512), (800, 300), (504, 504), (728, 300),
    (1008, 400), (20, 100), (1, 300), (1, 1),
])  # fmt: skip
def test_pixels_are_those_of_the_plain_path_bit_by_bit(released, size):
    output = released([noise(*size)], return_tensors="pt")
    view, patches = plain_pixels(released, noise(*size))
    assert torch.equal(output["pixel_values"], view)
    assert (not patches) == ("patch_pixel_values" not in output)
    assert not patches or torch.equal(output["patch_pixel_values"], torch.cat(patches))


def test_every_way_to_give_a_picture(released, tmp_path):
    picture = noise(90, 61)
    pixels = np.asarray(picture)
    wide = pixels.astype(np.uint16) * 256  # 16 bits, of which the upper ones count
    encoded, lines = base64.b64encode(png(picture)).decode(), base64.encodebytes(png(picture)).decode()
    bad_exif = png(picture, exif=b"no exif at all")
    (tmp_path / "picture.png").write_bytes(png(picture))
    (tmp_path / "bad_exif.png").write_bytes(bad_exif)
    ways = {
        "array": pixels,
        "channels first": pixels.transpose(2, 0, 1),
        "int64": pixels.astype(np.int64),
        "uint16": wide + 7,
        "uint16, big-endian": wide.astype(">u2"),
        "floats": pixels / 255,
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "whole bfloat16": torch.from_numpy(pixels.astype(np.float32)).bfloat16(),
        "path": str(tmp_path / "picture.png"),
        "Path": tmp_path / "picture.png",
        "url": f"{served(tmp_path)}/picture.png",
        "URL": f"{served(tmp_path)}/picture.png".replace("http", "HTTP"),
        "base64": encoded,
        "base64 in lines": lines,
        "data url": f"data:image/png;base64,{encoded}",
        "DATA URL in lines": f"DATA:image/png;base64,{lines}",
        "quoted data url": f"data:image/png;base64,{quote(lines)}",
        "broken EXIF": Image.open(io.BytesIO(bad_exif)),
        "broken EXIF, path": tmp_path / "bad_exif.png",
        "broken EXIF, url": f"{served(tmp_path)}/bad_exif.png",
        "broken EXIF, base64": base64.b64encode(bad_exif).decode(),
    }
    expected = pixels_of(picture)
    for way, form in ways.items():
        for given_picture in (form, released.fetch_images([[form]])):
            assert torch.equal(released(given_picture, return_tensors="pt")["pixel_values"], expected), way


def test_every_mode_becomes_rgb(tmp_path):
    grey, colour = noise(50, 40, channels=1), noise(50, 40)
    wide = np.asarray(grey).astype(np.uint16) * 257  # 16 bits: 255 becomes 65535
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for same_as_grey in (
        grey.convert("RGB"), grey.convert("LA"), Image.fromarray(wide), Image.fromarray(wide.astype(np.int32)),
        Image.fromarray(np.asarray(grey).astype(np.float32)), wide[None], np.asarray(grey)[..., None],
        tmp_path / "wide.png",
    ):  # fmt: skip
        assert torch.equal(pixels_of(same_as_grey), pixels_of(grey))
    for mode in ("RGBA", "CMYK", "P", "YCbCr", "1"):
        image = colour.convert(mode)
        assert torch.equal(pixels_of(image), pixels_of(image.convert("RGB"))), mode

    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: rotated by 270 degrees to be seen
    colour.save(tmp_path / "turned.png", exif=exif)
    upright = colour.transpose(Image.Transpose.ROTATE_270)
    for turned in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert torch.equal(pixels_of(turned), pixels_of(upright))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
def test_a_picture_of_any_mode_is_left_as_it_is(released, mode):
    picture = Image.new(mode, (9, 9))
    before = (picture.mode, picture.size, picture.tobytes(), dict(picture.info))
    assert pixels_of(picture).isfinite().all() and pixels_of(picture).shape == (1, 3, 728, 728)
    released(picture, do_rescale=False, do_normalize=False, do_convert_rgb=False)
    assert (picture.mode, picture.size, picture.tobytes(), dict(picture.info)) == before


@pytest.mark.parametrize(("shape", "size"), [
    # One end alone can be the channels.
    ((9, 8, 3), (8, 9)), ((3, 9, 8), (8, 9)), ((9, 8, 1), (8, 9)), ((1, 9, 8), (8, 9)), ((4, 9, 8), (8, 9)),
    # Three channels come before one and four.
    ((1, 1, 3), (1, 1)), ((1, 9, 3), (9, 1)), ((4, 9, 3), (9, 4)), ((3, 9, 1), (1, 9)), ((3, 9, 4), (4, 9)),
])  # fmt: skip
def test_which_end_of_an_array_is_its_channels(released, shape, size):
    assert released.process_image(np.zeros(shape, np.uint8)).size == size


@pytest.mark.parametrize("kind", [np.asarray, lambda floats: torch.from_numpy(floats).bfloat16()])
def test_floats_that_are_not_rescaled_give_what_the_8_bit_picture_gives(released, kind):
    unit = (RAMP / 255).astype(np.float32)
    tolerance = 3 if isinstance(kind(unit), torch.Tensor) else 0  # of 255; bfloat16 has no more digits
    called = released(kind(unit), do_rescale=False, return_tensors="pt")["pixel_values"]
    for got in (pixels_of(kind(unit), do_rescale=False), called):
        torch.testing.assert_close(got, pixels_of(RAMP), atol=tolerance / 255 / 0.26, rtol=0)
    grey = Image.fromarray(unit[..., 0])  # of mode F
    assert torch.equal(pixels_of(grey, do_rescale=False), pixels_of(Image.fromarray(RAMP[..., 0])))
    # 8 bits that are not rescaled stay what they are, as with any processor.
    plain, rescaled = (pixels_of(RAMP, do_rescale=rescale, do_normalize=False) for rescale in (False, True))
    torch.testing.assert_close(plain, 255 * rescaled, atol=1e-3, rtol=0)


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("value", [1.0001, 1.09, -1e-6, -0.09])
def test_a_float_that_overshoots_is_clipped(do_rescale, value):
    for scale in (1, 255) if do_rescale else (1,):
        picture = RAMP / 255 * scale
        picture[(59, 89, 2) if value > 0 else (0, 0, 0)] = value * scale  # where the range ends
        assert torch.equal(pixels_of(picture, do_rescale=do_rescale), pixels_of(RAMP))


def test_one_mean_for_all_channels():
    for picture in (RAMP, RAMP[..., :1]):
        expected = pixels_of(picture, image_mean=[0.5] * 3, image_std=[0.25] * 3)
        for image_std in (0.25, [0.25] * 3):
            assert torch.equal(pixels_of(picture, image_mean=0.5, image_std=image_std), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "no place", "images": [noise(9, 9)]}, r"should be the same"),
        ({"images": None}, r"no images were passed|found \[1\] tokens and 0 images"),
        ({"text": ["<im_patch>", "none"], "images": [[], [noise(9, 9)]]}, r"found \[1, 0\] tokens and \[0, 1\] images"),
        ({"text": ["a", 5]}, "`text` must be a string or list|'int' object has no attribute"),
        ({"images": noise(300, 300), "truncation": True, "max_length": 6}, "truncation"),
        ({"images": Image.new("RGB", (0, 5))}, "at least one pixel a side, got 0 x 5"),
        ({"images": np.zeros((0, 9, 3), np.uint8)}, "at least one pixel"),
        ({"images": Image.new("RGB", (30000, 20))}, "900000000 pixels.* exceeds limit"),  # padded to a square
        ({"images": RAMP, "input_data_format": "channels_first"}, "Cannot handle this data type"),
        ({"images": RAMP, "size": {"height": 28, "width": 56}}, "`size` must be a square"),
        # Pixels that have no meaning, or could have two.
        ({"images": np.zeros((9, 9, 3), complex)}, "got complex128 values"),
        ({"images": np.full((9, 9, 3), np.nan)}, "Pixel values must lie in"),
        ({"images": np.full((9, 9, 3), 1.5)}, "`do_rescale=False` says that floats lie in"),
        ({"images": np.full((9, 9, 3), 300.0)}, "got float64 values from 300.0 to 300.0"),
        ({"images": np.full((9, 9, 3), 256)}, "as uint16, got int64 values from 256 to 256"),
        ({"images": NORMALISED}, "from -1.79 to 2.14"),
        ({"images": NORMALISED, "do_rescale": False}, "Pixel values must lie in"),
    ],
)
def test_what_does_not_fit_is_refused(processor, call, message):
    with pytest.raises((ValueError, TypeError, AttributeError, Image.DecompressionBombError), match=message):
        processor(**{"text": "<im_patch>", **call})


@pytest.mark.parametrize("pictures", [[], [[]]])
def test_no_pictures(processor, pictures):
    assert "pixel_values" not in processor(text="no picture", images=pictures)


DATA = png(noise(90, 61))


@pytest.mark.parametrize(
    "data", [DATA.replace(b"IDAT", b"\0"), DATA.replace(b"IHDR", b"\0"), DATA[:999], b"no picture", b""]
)
def test_a_broken_picture_is_an_os_error(released, tmp_path, data):
    (tmp_path / "broken.png").write_bytes(data)
    encoded = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for source in (str(tmp_path / "broken.png"), f"{served(tmp_path)}/broken.png", encoded):
        with pytest.raises(OSError):
            released.fetch_images(source)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("http://127.0.0.1:port/picture.png", OSError, "http://127.0.0.1:port/picture.png.* cannot be fetched"),
        ("nowhere/picture1", OSError, "nowhere/picture1.* cannot be read"),
        ("nowhere.png", ValueError, "must be a URL, a file or base64, got 'nowhere.png'"),
    ],
)
def test_a_source_of_no_picture_is_named(released, tmp_path, source, error, message):
    with pytest.raises(error, match=message):
        released.fetch_images(source)
    with pytest.raises(OSError, match="nothing.png.* cannot be fetched"):
        released.fetch_images(f"{served(tmp_path)}/nothing.png")


def test_a_file_and_its_picture_have_a_largest_size(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(DATA)
    processor, url = Step3VLImageProcessor(), f"{served(tmp_path)}/picture.png"
    processor.max_download_bytes = len(DATA)
    processor.fetch_images(url)
    processor.max_download_bytes -= 1
    with pytest.raises(OSError, match=f"more than {len(DATA) - 1} bytes"):
        processor.fetch_images(url)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(Image.DecompressionBombError, match="5490 pixels.*exceeds limit"):
        processor(str(tmp_path / "picture.png"))


def test_a_closed_picture_is_an_error(released, tmp_path):
    path = tmp_path / "picture.png"
    noise(9, 9).save(path)
    with Image.open(path) as unread:
        pass
    with path.open("rb") as file:
        without_file = Image.open(file)
    closed = noise(9, 9)
    closed.close()
    for picture in (unread, without_file, closed):
        with pytest.raises((OSError, ValueError), match="closed"):
            released(picture)


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_videos_and_sound_are_ignored_with_a_warning(processor, monkeypatch, name):
    warned = []
    monkeypatch.setattr(step3_vl.processing_step3.logger, "warning_once", warned.append)
    assert processor(text="a", **{name: [RAMP[None]]}).keys() == processor(text="a").keys()
    assert name in warned[0]


def test_a_tokenizer_without_the_tokens_is_refused(released):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"<im_patch>": 0}, merges=[])))
    with pytest.raises(ValueError, match="lacks <im_start>, <im_end>, <patch_start>"):
        Step3VLProcessor(released, bare)


def test_several_samples_with_different_numbers_of_pictures(processor):
    a, b, c = noise(224, 224), noise(500, 200, seed=1), noise(300, 300, seed=2)
    text = ["no picture", "one: <im_patch>!", "two: <im_patch> and <im_patch>"]
    nested = processor(text=text, images=[[], [a], [b, c]], padding=True, return_tensors="pt")
    flat = processor(text=text, images=[a, b, c], padding=True, return_tensors="pt")
    for name in nested:
        assert torch.equal(nested[name], flat[name]), name
    patches = nested["num_patches"].tolist()
    assert patches == [processor.image_processor.plan(*i.size).num_patches for i in (a, b, c)]
    image_tokens = (nested["input_ids"] == processor.image_token_id).sum(-1).tolist()
    assert image_tokens == [0, 4 * patches[0] + 16, 4 * (patches[1] + patches[2]) + 32]
    assert nested["attention_mask"][:, -1].all() and not nested["attention_mask"][0, 0]  # padded on the left
    assert "patch_newline_mask" not in nested

    # Tokens in the order of the description: patches in rows, newlines between rows, the global view last.
    plan = processor.image_processor.plan(*b.size)
    assert plan.rows > 1
    row = plan.columns * ("<patch_start>" + 4 * "<im_patch>" + "<patch_end>")
    expected = "<patch_newline>".join([row] * plan.rows) + "<im_start>" + 16 * "<im_patch>" + "<im_end>"
    assert processor.decode(processor(text="<im_patch>", images=b)["input_ids"][0]) == expected


def test_another_size_is_saved(processor, tmp_path):
    def saved_and_loaded(each):
        each.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "step3_vl"}')
        saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
        return AutoProcessor.from_pretrained(tmp_path), (saved["num_image_tokens"], saved["num_patch_tokens"])

    image_processor = Step3VLImageProcessor(size={"height": 336, "width": 336}, patch_size=168)
    again, saved = saved_and_loaded(Step3VLProcessor(image_processor, processor.tokenizer))
    assert (image_processor.num_image_tokens, image_processor.num_patch_tokens) == saved == (36, 9)
    inputs = again(text="<im_patch>", images=noise(100, 100))
    assert inputs["input_ids"][0].count(again.image_token_id) == 36
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)

    # And so are sizes that are set later, by which serving engines count.
    again.image_processor.size, again.image_processor.patch_size = 504, 336
    assert again._get_num_multimodal_tokens([(100, 100)])["num_image_tokens"] == [83]
    third, saved = saved_and_loaded(again)
    assert saved == (81, 36) and third.image_processor.to_dict() == again.image_processor.to_dict()


@pytest.mark.parametrize("processor_config", [None, {"processor_class": "Step3VLProcessor"}])
def test_a_released_directory_describes_no_image_processor(processor, tmp_path, processor_config):
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "step3_vl"}')
    if processor_config is not None:
        (tmp_path / "processor_config.json").write_text(json.dumps(processor_config))
    released = AutoProcessor.from_pretrained(tmp_path)
    assert released.image_processor.to_dict() == Step3VLImageProcessor().to_dict()
    assert released(text="<im_patch>", images=noise(10, 10))["input_ids"][0].count(released.image_token_id) == 169


def test_chat_template(processor):
    picture = noise(224, 224)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Noise."},
        {"role": "user", "content": "Sure?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<｜begin▁of▁sentence｜>Be brief.<|BOT|>user\n<im_patch>What?<|EOT|><|BOT|>assistant\nNoise.<|EOT|>"
        "<|BOT|>user\nSure?<|EOT|><|BOT|>assistant\n"
    )
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = [messages, messages[2:]]
    encoded = processor.apply_chat_template(
        batch, **options, return_assistant_tokens_mask=True, processor_kwargs={"padding": True}
    )
    assert encoded["pixel_values"].shape[0] == 1 and encoded["input_ids"].shape[0] == 2
    # For the row with a picture the oldest supported transformers looks for the answer where it was before expansion.
    assistant_mask = torch.as_tensor(encoded["assistant_masks"][1]).bool()
    assert processor.decode(encoded["input_ids"][1, assistant_mask]) == "Noise.<|EOT|>"

    # As Arrow gives it back, and untouched.
    columns = dict.fromkeys(("image", "url", "path", "base64", "image_url", "text"))
    content = [{**columns, **part} for part in messages[1]["content"]]
    filled = [{"role": "user", "tool_calls": None, "content": content}]
    told = processor.apply_chat_template(filled, **options)
    assert torch.equal(told["pixel_values"], encoded["pixel_values"])
    assert processor.decode(told["input_ids"][0]).count("What?") == 1
    assert filled[0]["content"] is content and content[0] == {**columns, "type": "image", "image": picture}


def test_a_checkpoints_own_template_wins_wherever_it_is_kept(processor, tmp_path):
    def written() -> str:
        return AutoProcessor.from_pretrained(tmp_path).apply_chat_template([{"role": "user", "content": "Sure?"}])

    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "step3_vl"}')
    (tmp_path / "chat_template.jinja").write_text("mine: {{ messages[0]['content'] }}")
    assert written() == "mine: Sure?"
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer_config["chat_template"] = "theirs: {{ messages[0]['content'] }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert written() == "theirs: Sure?"


TYPES = {"city": "string", "days": "integer", "options": "object", "metric": "boolean"}
PARAMETERS = {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}}
GET_WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


def test_tools_and_reasoning_round_trip(processor):
    arguments = {"city": 'Paris <b> "é"', "days": 3, "options": {"hours": [6, 18]}, "metric": False}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    reply = {"role": "assistant", "reasoning_content": "So\nthen.", "content": "I look.", "tool_calls": [call, call]}
    result = {"role": "tool", "name": "get_weather", "content": "12 degrees"}

    options = {"tools": [GET_WEATHER], "add_generation_prompt": True}
    prompt = processor.apply_chat_template(question, **options, enable_thinking=True)
    assert '"name": "get_weather"' in prompt and prompt.startswith("<｜begin▁of▁sentence｜>Be brief.\n\n")
    told = processor.apply_chat_template([*question, reply, result], **options)
    assert told.startswith(prompt) and told.endswith("<|BOT|>tool\n12 degrees<|EOT|><|BOT|>assistant\n")
    written = (
        "<｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="get_weather"><steptml:parameter name="city">Paris <b> "é"</steptml:parameter>'
        '<steptml:parameter name="days">3</steptml:parameter>'
        '<steptml:parameter name="options">{"hours": [6, 18]}</steptml:parameter>'
        '<steptml:parameter name="metric">false</steptml:parameter></steptml:invoke><｜tool_call_end｜>'
    )
    answer = told[len(prompt) :].split("<|BOT|>")[0]
    assert answer == f"So\nthen.</think>I look.<｜tool_calls_begin｜>{written}{written}<｜tool_calls_end｜><|EOT|>"

    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert processor.parse_response([ids], prefix=prompt, tools=[GET_WEATHER]) == [reply]
    # As a server reads it, however the pieces fall.
    for size in (1, 7):
        parser = ResponseParser(RESPONSE_TEMPLATE, prefix=prompt, tools=[GET_WEATHER])
        for start in range(0, len(answer), size):
            parser.feed(answer[start : start + size])
        assert parser.finalize()[0] == reply
    # Without types the values are the text that was written, and reasoning may end that nothing began.
    untyped = processor.parse_response(answer, prefix="")
    assert untyped["reasoning_content"] == "So\nthen." and untyped["content"] == "I look."
    assert untyped["tool_calls"][1]["function"]["arguments"]["days"] == "3"
    for end in ("", "<|EOT|>", "<｜end▁of▁sentence｜>"):
        assert processor.parse_response(f"Noise.{end}", prefix="") == {"role": "assistant", "content": "Noise."}

    # As OpenAI's clients send it.
    for sent, expected in (
        (json.dumps(arguments), written),
        ("", '<steptml:invoke name="get_weather"></steptml:invoke>'),
    ):
        call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": sent}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert expected in processor.apply_chat_template([*question, message])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "video", "video": "film.mp4"}]},
        {"role": "user", "content": ["What?"]},
        {"role": "user"},
        {"role": "narrator", "content": "Night falls."},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": "{"}]},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": [1]}]},
        {"role": "assistant", "tool_calls": [{"name": 'get_"weather"', "arguments": {}}]},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": {'"': "Rome"}}]},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": {"city": "</steptml:parameter>"}}]},
    ],
)
def test_what_the_fallback_template_cannot_write_is_refused(processor, message):
    with pytest.raises((TemplateError, ValueError), match="message|function_call|tool"):
        processor.apply_chat_template([message])


@pytest.mark.parametrize("name", ["Step3VLConfig", "Step3VLProcessor", "Step3VLForConditionalGeneration"])
def test_classes_of_remote_code_are_found_by_name(name):
    """As dill looks for them, which pickles all of a class that it does not find."""
    module = getattr(step3_vl, name).__module__.rpartition(".")[2]
    loaded = get_class_from_dynamic_module(f"{module}.{name}", STEP3_TINY)
    top, _, path = f"{loaded.__module__}.{loaded.__qualname__}".partition(".")
    assert operator.attrgetter(path)(importlib.import_module(top)) is loaded
