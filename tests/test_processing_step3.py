import base64
import functools
import http.server
import importlib
import io
import json
import operator
import threading
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from benchmark import plain_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.chat_parsing import ResponseParser

import step3_vl.processing_step3
from step3_vl import Step3VLImageProcessor, Step3VLProcessor
from step3_vl.processing_step3 import RESPONSE_TEMPLATE, plan_picture


pytestmark = pytest.mark.releases


RAMP = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
NORMALISED = np.linspace(-1.79, 2.14, 243).reshape(9, 9, 3)
GOLDENS = json.loads((Path(__file__).parent / "goldens" / "processor.json").read_text())


def png(picture: Image.Image, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with further chunks before the pixels."""
    file = io.BytesIO()
    picture.save(file, "png")
    head, data = file.getvalue()[:33], file.getvalue()[33:]
    for kind, body in chunks:
        head += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return head + data


@functools.cache
def served(folder: Path) -> str:
    """The address at which a folder's files are there until the tests end."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(("size", "view", "window", "columns", "rows"), [
    # The shorter side below 32 and more than 4:1: padded.
    ((125, 31), (125, 125), 0, 0, 0), ((124, 31), (124, 31), 31, 4, 1), ((192, 32), (192, 32), 32, 6, 1),
    # Beyond 3024 pixels: scaled down.
    ((3024, 1000), (3024, 1000), 504, 6, 2), ((3025, 1000), (3024, 999), 504, 6, 2),
    # Up to 728 pixels: cut if more than 3:2, which photographs have.
    ((600, 400), (600, 400), 0, 0, 0), ((601, 400), (601, 400), 400, 2, 1), ((400, 600), (400, 600), 0, 0, 0),
    ((728, 400), (728, 400), 400, 2, 1), ((728, 728), (728, 728), 0, 0, 0),
    # Beyond: windows of 504 pixels, or of the shorter side if more than 4:1.
    ((729, 400), (729, 400), 504, 2, 1), ((1200, 800), (1200, 800), 504, 3, 2),
    ((800, 200), (800, 200), 504, 2, 1), ((801, 200), (801, 200), 200, 4, 1),
    # A rest of more than 0.2 windows is another one, in floats: 6 / 5 - 1 is below 0.2, 11 / 5 - 2 above.
    ((604, 1000), (604, 1000), 504, 1, 2), ((605, 1000), (605, 1000), 504, 2, 2),
    ((219, 100), (219, 100), 100, 2, 1), ((220, 100), (220, 100), 100, 3, 1),
])  # fmt: skip
def test_plans_where_a_rule_begins(released, size, view, window, columns, rows):
    plan = released.plan(*size)
    assert (plan.view_size, plan.window, plan.columns, plan.rows) == (view, window, columns, rows)
    assert plan.padded_size == ((125, 125) if size == (125, 31) else size)
    small = Step3VLImageProcessor(size={"height": 240, "width": 240}, patch_size=160)
    assert [small.plan(side, 300).columns for side in (192, 193, 352)] == [1, 2, 3]


def golden_picture(width, height) -> Image.Image:
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((7 * x + 13 * y + 29 * c + (x * y) // 17) % 256).astype(np.uint8))


def noise(width, height, channels=3, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@pytest.fixture(scope="module")
def released() -> Step3VLImageProcessor:
    return Step3VLImageProcessor()


def test_counts_of_the_goldens(released, processor):
    released_processor = Step3VLProcessor(released, processor.tokenizer)
    sizes = [(golden["height"], golden["width"]) for golden in GOLDENS["sizes"]]
    counts = released_processor._get_num_multimodal_tokens(sizes)
    for i, golden in enumerate(GOLDENS["sizes"]):
        plan = released.plan(golden["width"], golden["height"])
        assert (plan.num_patches, plan.num_newlines) == (golden["num_patches"], golden["num_newlines"]), golden
        assert counts["num_image_tokens"][i] == golden["num_tokens"], golden
        assert counts["num_image_patches"][i] == golden["num_patches"], golden


sizes = st.integers(1, 6000)


@settings(max_examples=300, deadline=None)
@given(width=sizes, height=sizes, view=st.integers(14, 900), patch=st.integers(14, 900), longest=st.integers(100, 4000))
def test_every_patch_lies_in_the_plan(width, height, view, patch, longest):
    plan = plan_picture(width, height, view, min(patch, view), longest)
    assert max(plan.view_size) <= max(longest, 1) and min(plan.view_size) >= 1
    assert plan.num_newlines == sum(plan.newline_mask) == max(plan.rows - 1, 0)
    assert len(plan.newline_mask) == plan.num_patches == plan.rows * plan.columns
    if plan.num_patches:
        assert 0 < plan.window <= max(plan.view_size)
        for side, count in zip(plan.cut_size, (plan.columns, plan.rows), strict=True):
            assert (count - 1) * plan.window < side <= count * plan.window  # each square has something of the picture


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_what_is_counted_is_what_is_made(width, height):
    processor = Step3VLImageProcessor(size={"height": 56, "width": 56}, patch_size=42, max_image_size=210)
    plan = processor.plan(width, height)
    output = processor([Image.new("RGB", (width, height), "white")], return_tensors="pt")
    assert output["num_patches"].tolist() == [plan.num_patches]
    assert output["pixel_values"].shape == (1, 3, 56, 56)
    if plan.num_patches:
        assert output["patch_pixel_values"].shape == (plan.num_patches, 3, 42, 42)
        mean, std = np.array(processor.image_mean), np.array(processor.image_std)
        black, white = (torch.tensor((value - mean) / std) for value in (0, 1))
        pixels = output["patch_pixel_values"].movedim(1, -1)
        assert (pixels <= white + 1e-4).all() and (pixels >= black - 1e-4).all()


def test_pixels_of_the_goldens(released):
    goldens = GOLDENS["pixels"]
    output = released([golden_picture(g["width"], g["height"]) for g in goldens], return_tensors="pt")
    assert output["num_patches"].tolist() == [g["num_patches"] for g in goldens]
    assert output["patch_newline_mask"].tolist() == [newline for g in goldens for newline in g["patch_newline_mask"]]
    patch = 0
    for i, golden in enumerate(goldens):
        views = [(output["pixel_values"][i], golden["pixel_values"][0])]
        for expected in golden["patch_pixel_values"]:
            views.append((output["patch_pixel_values"][patch], expected))
            patch += 1
        for pixels, expected in views:
            sampled = pixels.flatten()[expected["at"]]
            torch.testing.assert_close(sampled, torch.tensor(expected["values"]), atol=1e-5, rtol=0)
            assert abs(pixels.mean().item() - expected["mean"]) < 1e-5
            assert abs(pixels.std().item() - expected["std"]) < 1e-5


def test_a_batch_is_its_pictures_one_by_one():
    image_processor = Step3VLImageProcessor(size={"height": 112, "width": 112}, patch_size=56, max_image_size=336)
    pictures = [noise(*size, seed=i) for i, size in enumerate([(90, 90), (300, 80), (90, 90), (20, 100), (401, 333)])]
    together = image_processor(pictures, return_tensors="pt")
    alone = [image_processor(picture, return_tensors="pt") for picture in pictures]
    for name in ("pixel_values", "num_patches", "patch_pixel_values"):
        assert torch.equal(together[name], torch.cat([one[name] for one in alone if name in one])), name
    # One resize for the view and one for all patches, if they have another size.
    calls = []
    resize = torch.nn.functional.interpolate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "interpolate", lambda x, **k: calls.append(x.shape) or resize(x, **k))
        output = image_processor([noise(100, 40), noise(300, 80)])
        assert output["num_patches"] == [3, 12]
        assert [shape[0] for shape in calls] == [1, 3, 1]


@pytest.mark.parametrize("size", [
    (3024, 3024), (3100, 500), (1000, 700), (1008, 700), (1008, 1512), (800, 300), (504, 504), (728, 300),
    (20, 100), (1, 300),
])  # fmt: skip
def test_pixels_are_those_of_the_plain_path_bit_by_bit(size):
    processor, picture = Step3VLImageProcessor(), noise(*size)
    output = processor([picture], return_tensors="pt")
    view, patches = plain_pixels(processor, picture)
    assert torch.equal(output["pixel_values"], view)
    assert (not patches) == ("patch_pixel_values" not in output)
    assert not patches or torch.equal(output["patch_pixel_values"], torch.cat(patches))


def test_every_way_to_give_a_picture(tmp_path):
    image_processor = Step3VLImageProcessor()
    picture = noise(90, 61)
    pixels = np.asarray(picture)
    expected = image_processor(picture, return_tensors="pt")["pixel_values"]
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture))
    encoded, lines = base64.b64encode(png(picture)).decode(), base64.encodebytes(png(picture)).decode()

    ways = {
        "array": pixels,
        "channels first": pixels.transpose(2, 0, 1),
        "floats": pixels / 255,
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "whole bfloat16": torch.from_numpy(pixels.astype(np.float32)).bfloat16(),
        "path": str(path),
        "Path": path,
        "url": f"{served(tmp_path)}/picture.png",
        "URL": f"{served(tmp_path)}/picture.png".replace("http", "HTTP"),
        "base64": encoded,
        "base64 in lines": lines,
        "data url": f"data:image/png;base64,{encoded}",
        "DATA URL in lines": f"DATA:image/png;base64,{lines}",
        "quoted data url": f"data:image/png;base64,{quote(lines)}",
    }
    for way, form in ways.items():
        fetched = image_processor.fetch_images([[form]])
        assert torch.equal(image_processor(fetched, return_tensors="pt")["pixel_values"], expected), way
        assert torch.equal(image_processor(form, return_tensors="pt")["pixel_values"], expected), way


def test_every_mode_becomes_rgb(tmp_path):
    image_processor = Step3VLImageProcessor()

    def pixels(image):
        return image_processor(image, return_tensors="pt")["pixel_values"]

    grey, colour = noise(50, 40, channels=1), noise(50, 40)
    wide = np.asarray(grey).astype(np.uint16) * 257  # 16 bits: 255 becomes 65535
    for same_as_grey in (
        grey.convert("RGB"), grey.convert("LA"), Image.fromarray(wide), Image.fromarray(wide.astype(np.int32)),
        Image.fromarray(np.asarray(grey).astype(np.float32)), wide[None], np.asarray(grey)[..., None],
    ):  # fmt: skip
        assert torch.equal(pixels(same_as_grey), pixels(grey))
    for mode in ("RGBA", "CMYK", "P", "YCbCr", "1"):
        image = colour.convert(mode)
        assert torch.equal(pixels(image), pixels(image.convert("RGB"))), mode
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert torch.equal(pixels(tmp_path / "wide.png"), pixels(grey))

    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: rotated by 270 degrees to be seen
    colour.save(tmp_path / "turned.png", exif=exif)
    upright = colour.transpose(Image.Transpose.ROTATE_270)
    for turned in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert torch.equal(pixels(turned), pixels(upright))


def test_several_samples_with_different_numbers_of_pictures(processor):
    a, b, c = noise(224, 224), noise(500, 200, seed=1), noise(300, 300, seed=2)
    text = ["no picture", "one: <im_patch>!", "two: <im_patch> and <im_patch>"]
    nested = processor(text=text, images=[[], [a], [b, c]], padding=True, return_tensors="pt")
    flat = processor(text=text, images=[a, b, c], padding=True, return_tensors="pt")
    for name in nested:
        assert torch.equal(nested[name], flat[name]), name
    assert nested["num_patches"].tolist() == [processor.image_processor.plan(*i.size).num_patches for i in (a, b, c)]
    image_tokens = (nested["input_ids"] == processor.image_token_id).sum(-1).tolist()
    patches = nested["num_patches"].tolist()
    assert image_tokens == [0, 4 * patches[0] + 16, 4 * (patches[1] + patches[2]) + 32]
    assert nested["attention_mask"][:, -1].all() and not nested["attention_mask"][0, 0]  # padded on the left
    assert "patch_newline_mask" not in nested

    # Tokens in the order of the description: patches in rows, newlines between rows, the global view last.
    rows = processor(text="<im_patch>", images=b)["input_ids"][0]
    plan = processor.image_processor.plan(*b.size)
    assert plan.rows > 1
    patch = "<patch_start>" + 4 * "<im_patch>" + "<patch_end>"
    expected = (
        "<patch_newline>".join([patch * plan.columns] * plan.rows) + "<im_start>" + 16 * "<im_patch>" + "<im_end>"
    )
    assert processor.decode(rows) == expected


def test_another_size_is_saved(processor, tmp_path):
    image_processor = Step3VLImageProcessor(size={"height": 336, "width": 336}, patch_size=168)
    assert (image_processor.num_image_tokens, image_processor.num_patch_tokens) == (36, 9)
    Step3VLProcessor(image_processor, processor.tokenizer).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    assert (saved["num_image_tokens"], saved["num_patch_tokens"]) == (36, 9)
    (tmp_path / "config.json").write_text('{"model_type": "step3_vl"}')
    again = AutoProcessor.from_pretrained(tmp_path)
    ids = again(text="<im_patch>", images=noise(100, 100))["input_ids"][0]
    assert ids.count(again.image_token_id) == 36
    assert again(text="<im_patch>", images=noise(100, 100))["pixel_values"].shape == (1, 3, 336, 336)

    # And so are sizes that are set later, by which serving engines count.
    again.image_processor.size, again.image_processor.patch_size = 504, 336
    assert (again.image_processor.num_image_tokens, again.image_processor.num_patch_tokens) == (81, 36)
    assert again._get_num_multimodal_tokens([(100, 100)])["num_image_tokens"] == [83]
    again.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    assert (saved["num_image_tokens"], saved["num_patch_tokens"]) == (81, 36)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.to_dict() == again.image_processor.to_dict()


@pytest.mark.parametrize("processor_config", [None, {"processor_class": "Step3VLProcessor"}])
def test_a_released_directory_describes_no_image_processor(processor, tmp_path, processor_config):
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "step3_vl"}')
    if processor_config is not None:
        (tmp_path / "processor_config.json").write_text(json.dumps(processor_config))
    released = AutoProcessor.from_pretrained(tmp_path)
    assert released.image_processor.to_dict() == Step3VLImageProcessor().to_dict()
    assert released(text="<im_patch>", images=noise(10, 10))["input_ids"][0].count(released.image_token_id) == 169


def test_chat_template(processor, tmp_path):
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
    encoded = processor.apply_chat_template(
        [messages, messages[2:]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    assert encoded["pixel_values"].shape[0] == 1 and encoded["input_ids"].shape[0] == 2
    # As Arrow gives it back, and untouched.
    columns = dict.fromkeys(("image", "url", "path", "base64", "image_url", "text"))
    filled = [
        {**message, "tool_calls": None, "content": [{**columns, **part} for part in message["content"]]}
        for message in messages
        if isinstance(message["content"], list)
    ]
    content = filled[0]["content"]
    told = processor.apply_chat_template(filled, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(told["pixel_values"], encoded["pixel_values"])
    assert processor.decode(told["input_ids"][0]).count("What?") == 1
    assert filled[0]["content"] is content and content[0] == {**columns, "type": "image", "image": picture}

    # For the row with a picture the oldest supported transformers looks for the answer where it was before expansion.
    assistant_mask = torch.as_tensor(encoded["assistant_masks"][1]).bool()
    assert processor.decode(encoded["input_ids"][1, assistant_mask]) == "Noise.<|EOT|>"

    # A checkpoint's own template wins, wherever it is kept.
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "step3_vl"}')
    (tmp_path / "chat_template.jinja").write_text("mine: {{ messages[0]['content'] }}")
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template([messages[3]]) == "mine: Sure?"
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer_config["chat_template"] = "theirs: {{ messages[0]['content'] }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template([messages[3]]) == "theirs: Sure?"


def get_weather(city: str, days: int, options: dict, metric: bool = True):
    """
    Looks up the weather.

    Args:
        city: Where.
        days: How many.
        options: More.
        metric: Whether in degrees Celsius.
    """


def test_tools_and_reasoning_round_trip(processor):
    arguments = {"city": 'Paris <b> "é"', "days": 3, "options": {"hours": [6, 18]}, "metric": False}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    reply = {"role": "assistant", "reasoning_content": "So\nthen.", "content": "I look.", "tool_calls": [call, call]}
    result = {"role": "tool", "name": "get_weather", "content": "12 degrees"}

    prompt = processor.apply_chat_template(
        question, tools=[get_weather], add_generation_prompt=True, enable_thinking=True
    )
    assert '"name": "get_weather"' in prompt and prompt.startswith("<｜begin▁of▁sentence｜>Be brief.\n\n")
    told = processor.apply_chat_template([*question, reply, result], tools=[get_weather], add_generation_prompt=True)
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

    assert processor.parse_response(answer, prefix=prompt, tools=[get_weather]) == reply
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert processor.parse_response([ids], prefix=prompt, tools=[get_weather]) == [reply]
    # As a server reads it, however the pieces fall.
    for size in (1, 7):
        parser = ResponseParser(RESPONSE_TEMPLATE, prefix=prompt, tools=[get_weather])
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
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
    sent = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert written in processor.apply_chat_template([*question, sent])
    call["function"]["arguments"] = ""
    assert '<steptml:invoke name="get_weather"></steptml:invoke>' in processor.apply_chat_template([*question, sent])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "video", "video": "film.mp4"}]},
        {"role": "user", "content": ["What?"]},
        {"role": "user", "content": None},
        {"role": "user"},
        {"role": "narrator", "content": "Night falls."},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": "{"}]},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": [1]}]},
        {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": {"city": "</steptml:parameter>"}}]},
    ],
)
def test_what_the_fallback_template_cannot_write_is_refused(processor, message):
    with pytest.raises((TemplateError, ValueError), match="message|function_call|tool"):
        processor.apply_chat_template([message])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "no place", "images": [noise(9, 9)]}, r"should be the same"),
        ({"images": None}, r"no images were passed|found \[1\] tokens and 0 images"),
        ({"text": ["<im_patch>", "none"], "images": [[], [noise(9, 9)]]}, r"found \[1, 0\] tokens and \[0, 1\] images"),
        ({"text": None, "images": None}, "at least one input|got neither"),
        ({"text": ["a", 5]}, "`text` must be a string or list|'int' object has no attribute"),
        ({"images": noise(300, 300), "truncation": True, "max_length": 6}, "truncation"),
        ({"images": Image.new("RGB", (0, 5))}, "at least one pixel a side, got 0 x 5"),
        ({"images": np.zeros((0, 9, 3), np.uint8)}, "at least one pixel"),
        ({"images": Image.new("RGB", (30000, 20))}, "900000000 pixels.* exceeds limit"),  # padded to a square
        ({"images": np.zeros((9, 9, 5), np.uint8)}, "channel dimension"),
        ({"images": RAMP, "input_data_format": "channels_first"}, "Cannot handle this data type"),
        ({"images": RAMP, "size": {"height": 28, "width": 56}}, "`size` must be a square"),
        # Pixels that have no meaning, or could have two.
        ({"images": np.zeros((9, 9, 3), complex)}, "got complex128 values"),
        ({"images": np.full((9, 9, 3), np.nan)}, "Pixel values must lie in"),
        ({"images": np.full((9, 9, 3), 1.5)}, "`do_rescale=False` says that floats lie in"),
        ({"images": np.full((9, 9, 3), -0.5)}, "got float64 values from -0.5 to -0.5"),
        ({"images": np.full((9, 9, 3), 300.0)}, "from 300.0 to 300.0"),
        ({"images": np.full((9, 9, 3), 256)}, "as uint16, got int64 values from 256 to 256"),
        ({"images": np.full((9, 9, 3), -1)}, "from -1 to -1"),
        ({"images": NORMALISED}, "from -1.79 to 2.14"),
        ({"images": NORMALISED, "do_rescale": False}, "Pixel values must lie in"),
        ({"images": RAMP / 127.5 - 1, "do_rescale": False}, "Pixel values must lie in"),
    ],
)
def test_what_does_not_fit_is_refused(processor, call, message):
    with pytest.raises((ValueError, TypeError, AttributeError, Image.DecompressionBombError), match=message):
        processor(**{"text": "<im_patch>", **call})


def test_pictures_of_one_pixel_and_of_30000(processor):
    inputs = processor(
        text="<im_patch>" * 2, images=[Image.new("L", (1, 1)), Image.new("RGB", (30000, 3000))], return_tensors="pt"
    )
    assert inputs["num_patches"].tolist() == [0, 10]
    assert inputs["pixel_values"].isfinite().all()
    assert "pixel_values" not in processor(text="no picture", images=[])


def test_videos_and_sound_are_ignored_with_a_warning(processor, monkeypatch):
    warned = []
    monkeypatch.setattr(step3_vl.processing_step3.logger, "warning_once", warned.append)
    expected = processor(text="a", return_tensors="pt")
    for name, media in (("videos", [RAMP[None]]), ("audio", [np.zeros(9)])):
        got = processor(text="a", **{name: media}, return_tensors="pt")
        assert got.keys() == expected.keys() and torch.equal(got["input_ids"], expected["input_ids"])
        assert name in warned.pop()


def test_a_tokenizer_without_the_tokens_is_refused(released, processor):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"<im_patch>": 0}, merges=[])))
    with pytest.raises(ValueError, match="lacks <im_start>, <im_end>, <patch_start>"):
        Step3VLProcessor(released, bare)


def pixels_of(picture, **kwargs) -> torch.Tensor:
    return Step3VLImageProcessor(**kwargs)(picture, return_tensors="pt")["pixel_values"]


def test_one_mean_for_all_channels():
    for picture in (RAMP, RAMP[..., :1]):
        expected = pixels_of(picture, image_mean=[0.5] * 3, image_std=[0.25] * 3)
        for image_std in (0.25, [0.25] * 3):
            assert torch.equal(pixels_of(picture, image_mean=0.5, image_std=image_std), expected)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda floats: torch.from_numpy(floats).bfloat16()])
def test_floats_that_are_not_rescaled_give_what_the_8_bit_picture_gives(kind):
    unit = (RAMP / 255).astype(np.float32)
    tolerance = 3 if kind(unit).dtype == torch.bfloat16 else 0  # of 255; bfloat16 has no more digits
    expected = pixels_of(RAMP)
    step = 1 / 255 / 0.26
    for got in (
        pixels_of(kind(unit), do_rescale=False),
        Step3VLImageProcessor()(kind(unit), do_rescale=False, return_tensors="pt")["pixel_values"],
    ):
        torch.testing.assert_close(got, expected, atol=tolerance * step, rtol=0)
    grey = Image.fromarray(unit[..., 0])  # of mode F
    assert torch.equal(pixels_of(grey, do_rescale=False), pixels_of(Image.fromarray(RAMP[..., 0])))
    # 8 bits that are not rescaled stay what they are, as with any processor.
    torch.testing.assert_close(
        pixels_of(RAMP, do_rescale=False, do_normalize=False),
        255 * pixels_of(RAMP, do_normalize=False),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("do_rescale", [True, False])
def test_a_float_that_overshoots_is_clipped(do_rescale):
    unit = (RAMP / 255).astype(np.float64)
    expected = pixels_of(RAMP)
    for value in (1.0001, 1.0117, 1.09, -1e-6, -0.09):
        picture = unit.copy()
        place = (59, 89, 2) if value > 0 else (0, 0, 0)  # where the range ends
        picture[place] = value
        assert torch.equal(pixels_of(picture, do_rescale=do_rescale), expected), value
    if do_rescale:
        wide = RAMP.astype(np.float32)
        wide[59, 89, 2], wide[0, 0, 0] = 258.0, -3.0
        assert torch.equal(pixels_of(wide), expected)


def test_integers_mean_what_their_type_says():
    expected = pixels_of(RAMP)
    dark = np.zeros((9, 9, 3), np.uint16)
    assert torch.equal(pixels_of(RAMP.astype(np.int64)), expected)
    assert torch.equal(pixels_of(RAMP.astype(np.uint16) * 256 + 7), expected)
    assert torch.equal(pixels_of((RAMP.astype(np.uint16) * 256).astype(">u2")), expected)
    dark[0, 0] = 255  # which is next to nothing of 65535
    assert torch.equal(pixels_of(dark), pixels_of(np.zeros((9, 9, 3), np.uint8)))


def test_unreadable_metadata_do_not_stop_a_readable_picture(tmp_path):
    expected = pixels_of(RAMP)
    data = png(Image.fromarray(RAMP), (b"eXIf", b"no exif at all"))
    (tmp_path / "picture.png").write_bytes(data)
    assert torch.equal(pixels_of(Image.open(io.BytesIO(data))), expected)
    fetch = Step3VLImageProcessor().fetch_images
    for source in (str(tmp_path / "picture.png"), base64.b64encode(data).decode(), f"{served(tmp_path)}/picture.png"):
        assert torch.equal(pixels_of(fetch(source)), expected)


@pytest.mark.parametrize("broken", ["IDAT", "IHDR", "cut off", "text", "empty"])
def test_a_broken_picture_is_an_os_error(tmp_path, broken):
    data = png(noise(90, 61))
    data = {"cut off": data[:999], "text": b"no picture", "empty": b""}.get(
        broken, data.replace(broken.encode(), b"\0")
    )
    (tmp_path / "broken.png").write_bytes(data)
    fetch = Step3VLImageProcessor().fetch_images
    sources = [str(tmp_path / "broken.png"), *(f"{served(tmp_path)}/{name}.png" for name in ("broken", "nothing"))]
    for source in (*sources, base64.b64encode(data).decode()) if data else sources:
        with pytest.raises(OSError):
            fetch(source)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("http://127.0.0.1:port/picture.png", OSError, "http://127.0.0.1:port/picture.png.* cannot be"),
        ("nowhere/picture1", OSError, "nowhere/picture1.* cannot be"),
        ("data:image/png;base64,", OSError, "data:image/png;base64,.* cannot be"),
        ("nowhere.png", ValueError, "must be a URL, a path or base64, got 'nowhere.png'"),
    ],
)
def test_a_source_of_no_picture_is_named(source, error, message):
    with pytest.raises(error, match=message):
        Step3VLImageProcessor().fetch_images(source)


def test_a_picture_of_too_many_pixels_is_not_decoded(processor, tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(png(noise(90, 61)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(Image.DecompressionBombError, match="5490 pixels.*exceeds limit"):
        processor(text="<im_patch>", images=str(tmp_path / "picture.png"))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
def test_a_picture_of_any_mode_is_left_as_it_is(mode):
    picture = Image.new(mode, (9, 9))
    before = (picture.mode, picture.size, picture.tobytes(), dict(picture.info))
    assert pixels_of(picture).isfinite().all() and pixels_of(picture).shape == (1, 3, 728, 728)
    Step3VLImageProcessor()(picture, do_rescale=False, do_normalize=False, do_convert_rgb=False)
    assert (picture.mode, picture.size, picture.tobytes(), dict(picture.info)) == before


@pytest.mark.parametrize(("shape", "size"), [
    # One end alone can be the channels.
    ((9, 8, 3), (8, 9)), ((3, 9, 8), (8, 9)), ((9, 8, 1), (8, 9)), ((1, 9, 8), (8, 9)), ((4, 9, 8), (8, 9)),
    # Three channels come before one and four.
    ((1, 1, 3), (1, 1)), ((1, 9, 3), (9, 1)), ((4, 9, 3), (9, 4)), ((3, 9, 1), (1, 9)), ((3, 9, 4), (4, 9)),
    # Else transformers takes the first, with a warning.
    ((3, 1, 3), (3, 1)), ((1, 9, 1), (1, 9)), ((4, 9, 4), (4, 9)),
])  # fmt: skip
def test_which_end_of_an_array_is_its_channels(shape, size):
    assert Step3VLImageProcessor().process_image(np.zeros(shape, np.uint8)).size == size


@pytest.mark.parametrize("form", ["png", "jpeg", "tiff"])
def test_a_closed_picture_is_an_error(tmp_path, form):
    path = tmp_path / f"picture.{form}"
    noise(9, 9).save(path)
    with Image.open(path) as unread:
        pass
    with path.open("rb") as file:
        without_file = Image.open(file)
    closed = noise(9, 9)
    closed.close()
    for picture in (unread, without_file, closed):
        with pytest.raises((OSError, ValueError), match="closed"):
            Step3VLImageProcessor()(picture)
    with Image.open(path) as read:
        read.load()
    removed = Image.open(path)
    path.unlink()
    assert torch.equal(pixels_of(removed), pixels_of(read))


def test_a_file_at_a_url_has_a_largest_size(tmp_path):
    size = (tmp_path / "picture.png").write_bytes(png(noise(90, 61)))
    processor = Step3VLImageProcessor()
    processor.max_download_bytes = size
    processor.fetch_images(f"{served(tmp_path)}/picture.png")
    processor.max_download_bytes = size - 1
    with pytest.raises(OSError, match=f"more than {size - 1} bytes"):
        processor.fetch_images(f"{served(tmp_path)}/picture.png")


STEP3_TINY = Path(__file__).parents[1] / "checkpoints" / "step3-tiny"


@pytest.mark.parametrize("name", ["Step3VLConfig", "Step3VLProcessor", "Step3VLForConditionalGeneration"])
def test_classes_of_remote_code_are_found_by_name(name):
    """As dill looks for them, which pickles all of a class that it does not find."""
    module = getattr(step3_vl, name).__module__.rpartition(".")[2]
    loaded = get_class_from_dynamic_module(f"{module}.{name}", STEP3_TINY)
    top, _, path = f"{loaded.__module__}.{loaded.__qualname__}".partition(".")
    assert operator.attrgetter(path)(importlib.import_module(top)) is loaded


def test_map_with_a_processor_of_remote_code():
    datasets = pytest.importorskip("datasets", reason="the extra `finetune` is not installed")
    processor_class = get_class_from_dynamic_module("processing_step3.Step3VLProcessor", STEP3_TINY)
    processor = processor_class.from_pretrained(STEP3_TINY)
    pictures = [noise(100, 100), noise(400, 200, seed=1)]

    def prepare(row):
        inputs = processor(text="<im_patch>", images=row["image"])
        return {"patch_pixel_values": None, **inputs}  # not every picture has them

    pixels = datasets.List(datasets.List(datasets.List(datasets.List(datasets.Value("float32")))))
    ids = datasets.List(datasets.List(datasets.Value("int64")))
    features = datasets.Features(
        pixel_values=pixels,
        patch_pixel_values=pixels,
        num_patches=datasets.List(datasets.Value("int64")),
        **dict.fromkeys(set(processor(text="a")), ids),
    )
    rows = datasets.Dataset.from_list([{"image": picture} for picture in pictures])
    options = {"features": features, "remove_columns": ["image"], "writer_batch_size": 1}
    mapped = rows.map(prepare, **options)
    assert mapped._fingerprint == rows.map(prepare, **options)._fingerprint
    expected = processor.image_processor(pictures, return_tensors="pt")
    for name in ("pixel_values", "patch_pixel_values", "num_patches"):
        assert torch.equal(torch.cat([torch.tensor(row[name]) for row in mapped if row[name]]), expected[name]), name
