"""Processors for Step3-VL: cut images into patches, and expand image placeholders in prompts to tokens."""

# Copyright 2026 The Step3-VL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0

import base64
import json
import math
import os
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import nn
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from .configuration_step3 import num_image_tokens, set_on_package


logger = logging.get_logger(__name__)

# An image with a side below MIN_SIDE and an aspect ratio above MAX_PADDED_RATIO is padded to a square.
MIN_SIDE, MAX_PADDED_RATIO = 32, 4
# An image no larger than the global view is cut only above this aspect ratio.
MAX_WHOLE_RATIO = 1.5
# Above this aspect ratio, a larger image is cut into windows no larger than its shorter side.
MAX_WINDOW_RATIO = 4
# If more than this fraction of a window remains of a side, the side gets another window.
MAX_REST = 0.2
# The factor by which an image with too many patches is scaled down until it has few enough.
SHRINK = 0.95

# How far the floats of a resized image may overshoot their range, as a fraction of it; and the lowest maximum of an
# image in [0, 255], as smaller values could be in [0, 1] or already normalised.
OVERSHOOT, AMBIGUOUS = 0.1, 3

# Key in an image's `info`: its 8 bits represent [0, 1], and `do_rescale` is off.
UNIT_RANGE = "step3_unit_range"

# Errors that PIL's plugins raise for broken files and metadata, besides the documented OSError and ValueError.
BROKEN_FILE = (SyntaxError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError, RuntimeError)
BROKEN_FILE += (AssertionError, struct.error)

# The `torch.nn.functional.interpolate` mode of each PIL filter.
INTERPOLATION_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}

# The chat format of the released model, for checkpoints without a template.
CHAT_TEMPLATE = """\
{{- bos_token if bos_token is defined and bos_token else '' }}
{%- macro text_of(content) %}
{%- if content is string %}{{ content }}
{%- elif content is not defined or content is not iterable or content is mapping %}
{{- raise_exception('The content of a message must be a string or a list of parts.') }}
{%- else %}
{%- for part in content %}
{%- if part['type'] in ('image', 'image_url') %}{{ '<im_patch>' }}
{%- elif part['type'] == 'text' %}{{ part['text'] }}
{%- else %}
{{- raise_exception('A part of a message must be of type text or image, not ' ~ (part['type'] or part) ~ '.') }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endmacro %}
{%- macro quoted(name) %}
{%- if name is not string or '"' in name %}
{{- raise_exception('The name of a tool or argument must be a string without a quotation mark, not ' ~ name ~ '.') }}
{%- endif %}
{{- '"' ~ name ~ '"' }}
{%- endmacro %}
{%- macro steps(call) %}
{%- set call = call.function if call.function is defined else call %}
{{- '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=' ~ quoted(call.name) ~ '>' }}
{%- set arguments = call.arguments or {} %}
{%- if arguments is not mapping %}
{{- raise_exception('The arguments of a tool call must be a mapping, not ' ~ arguments ~ '.') }}
{%- endif %}
{%- for key, value in arguments | items %}
{%- set value = value if value is string else value | tojson %}
{%- if '</steptml:parameter>' in value %}
{{- raise_exception('The argument ' ~ key ~ ' of a tool call holds the mark of its own end.') }}
{%- endif %}
{{- '<steptml:parameter name=' ~ quoted(key) ~ '>' ~ value ~ '</steptml:parameter>' }}
{%- endfor %}
{{- '</steptml:invoke><｜tool_call_end｜>' }}
{%- endmacro %}
{%- macro answer(message) %}
{%- if message.function_call %}{{ raise_exception('Give calls as tool_calls, not as function_call.') }}{% endif %}
{%- set reasoning = message.reasoning_content or message.reasoning %}
{%- if reasoning %}{{ '<think>' ~ reasoning ~ '</think>' }}{% endif %}
{%- if (message.content is defined and message.content is not none) or not (reasoning or message.tool_calls) %}
{{- text_of(message.content) }}
{%- endif %}
{%- if message.tool_calls %}
{{- '<｜tool_calls_begin｜>' }}
{%- for call in message.tool_calls %}{{ steps(call) }}{% endfor %}
{{- '<｜tool_calls_end｜>' }}
{%- endif %}
{%- endmacro %}
{%- if messages and messages[0].role in ('system', 'developer') %}{{ text_of(messages[0].content) }}{% endif %}
{%- if tools %}
{{- '\\n\\n' if messages and messages[0].role in ('system', 'developer') else '' }}
{{- 'You can call these functions, described in JSON:\\n' }}
{%- for tool in tools %}{{ tool | tojson ~ '\\n' }}{% endfor %}
{{- 'A call is written like this, with one parameter element for each argument:\\n' }}
{{- '<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="FUNCTION">' }}
{{- '<steptml:parameter name="ARGUMENT">VALUE</steptml:parameter>' }}
{{- '</steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>' }}
{%- endif %}
{%- for message in messages %}
{%- set role = 'system' if message.role == 'developer' else message.role %}
{%- if role == 'assistant' %}
{{- '<|BOT|>assistant\\n' }}
{%- generation %}{{ answer(message) }}{{ '<|EOT|>' }}{% endgeneration %}
{%- elif role not in ('system', 'user', 'tool') %}
{{- raise_exception('A message is of the system, user, assistant or tool, not of ' ~ role ~ '.') }}
{%- elif role != 'system' or not loop.first %}
{{- '<|BOT|>' ~ role ~ '\\n' ~ text_of(message.content) ~ '<|EOT|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|BOT|>assistant\\n' ~ ('<think>' if enable_thinking is defined and enable_thinking else '') }}
{%- endif %}
"""
# Parses answers by the marks of the template above, which are those of the released model.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|BOT|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*(?:<｜tool_calls_begin｜>\s*)?<｜tool_call_begin｜>\s*function\s*<｜tool_sep｜>\s*"
            r'<steptml:invoke name="(?P<name>[^"]+)">',
            "close_pattern": r"</steptml:invoke>\s*<｜tool_call_end｜>",
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r'<steptml:parameter name="(?P<key>[^"]+)">(?P<value>.*?)</steptml:parameter>'
            },
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {
            "close_pattern": r"\s*(?:<｜tool_calls_end｜>|<\|EOT\|>|<｜end▁of▁sentence｜>)",
            "repeats": True,
            "join": "",
        },
    },
}
# For complete answers, whose reasoning may lack its opening mark; a stream would have to wait for the closing one.
REASONING = {"reasoning_content": {"open_pattern": r"<think>|\A(?=.*?</think>)", "close": "</think>"}}
WHOLE_RESPONSE_TEMPLATE = {**RESPONSE_TEMPLATE, "fields": {**RESPONSE_TEMPLATE["fields"], **REASONING}}


@dataclass(frozen=True)
class PicturePlan:
    """
    How an image is padded, resized and cut into patches. All sizes are `(width, height)` in pixels.

    Args:
        padded_size: Size after any padding to a square, with the image at the top left.
        view_size: Size after any downscaling that follows; the global view is made from it.
        cut_size: Size from which patches are cut.
        window: Side of the square patches when cut, or 0 if there are none.
        rows, columns: Grid of patches.
    """

    padded_size: tuple[int, int]
    view_size: tuple[int, int]
    cut_size: tuple[int, int]
    window: int
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    @property
    def num_newlines(self) -> int:
        return max(self.rows - 1, 0)

    @property
    def newline_mask(self) -> list[bool]:
        """Whether a newline token follows each patch: after the last patch of every row but the last row."""
        return ([False] * (self.columns - 1) + [True]) * (self.rows - 1) + [False] * self.columns


def plan_picture(
    width: int,
    height: int,
    view_side: int,
    patch_side: int,
    max_side: int,
    max_pixels: int | None = None,
    max_patches: int | None = None,
) -> PicturePlan:
    """
    Plans how to process an image of `width` × `height` pixels. It is scaled down to at most `max_side` pixels a side
    and `max_pixels` in all. The global view has `view_side`² pixels and each patch `patch_side`² pixels. If there were
    more than `max_patches`, they are cut from a smaller copy; an image too elongated for that has none. Raises a
    `ValueError` if the image has no pixels.
    """
    if min(width, height) < 1:
        raise ValueError(f"A picture must have at least one pixel a side, got {width} x {height}.")
    if min(width, height) < MIN_SIDE and max(width, height) / min(width, height) > MAX_PADDED_RATIO:
        width = height = max(width, height)
    padded_size = (width, height)

    scale = min(max_side / max(padded_size), math.sqrt(max_pixels / (width * height)) if max_pixels else 1)
    if scale < 1:
        # After the padding above, a side can only fall below one pixel if the limits are tiny.
        width, height = max(int(width * scale), 1), max(int(height * scale), 1)
    view_size = (width, height)

    while True:
        shorter, longer = sorted((width, height))
        if longer <= view_side:
            window = shorter if longer / shorter > MAX_WHOLE_RATIO else 0
        else:
            window = min(shorter, patch_side) if longer / shorter > MAX_WINDOW_RATIO else patch_side
        if window == 0:
            return PicturePlan(padded_size, view_size, view_size, window=0, rows=0, columns=0)

        cut_size = tuple(snap(side, window) for side in (width, height))
        columns, rows = (math.ceil(side / window) for side in cut_size)
        if max_patches is None or rows * columns <= max_patches:
            return PicturePlan(padded_size, view_size, cut_size, window, rows, columns)
        if window < patch_side or max_patches == 0:  # smaller copies have as many
            return PicturePlan(padded_size, view_size, view_size, window=0, rows=0, columns=0)
        width, height = max(int(width * SHRINK), 1), max(int(height * SHRINK), 1)


def snap(side: int, window: int) -> int:
    """The side from which patches of `window` pixels are cut."""
    if side < window:
        return side
    windows = side // window
    return window * (windows + (side / window - windows > MAX_REST))


def upright(image: Image.Image) -> Image.Image:
    """Loads an image and applies its EXIF orientation, if it can be read. Raises an `OSError` or `ValueError` if the
    image cannot be."""
    try:
        image.load()
    except BROKEN_FILE as error:
        raise OSError(f"The picture's file is closed or broken: {error!r}.") from error
    try:
        # Transpose only if needed, because it makes a copy.
        is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if is_upright else ImageOps.exif_transpose(image)
    except (OSError, ValueError, *BROKEN_FILE):
        return image


def download(url: str, max_bytes: int) -> BytesIO:
    """Downloads a file over HTTP. Raises an `OSError` if it cannot be fetched or has more than `max_bytes`."""
    file = BytesIO()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=60) as response:
            for chunk in response.raise_for_status().iter_bytes():
                file.write(chunk)
                if file.tell() > max_bytes:
                    raise OSError(f"The file at {url[:80]!r} has more than {max_bytes} bytes (`max_download_bytes`).")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"The picture at {url[:80]!r} cannot be fetched: {error}.") from error
    file.seek(0)
    return file


def to_8_bit(pixels: np.ndarray, do_rescale: bool | None) -> tuple[np.ndarray, bool]:
    """
    Converts pixel values to `uint8`. Integers up to 255 are kept, `uint16` keeps its upper byte, and booleans become 0
    or 255. Floats are in [0, 1] or [0, 255], and may overshoot by a tenth, as after resizing; this is clipped. Also
    returns whether they are floats that `do_rescale=False` declares to be in [0, 1]. Raises a `ValueError` if values
    are in neither range, or floats could be in either.
    """
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels, False
    if kind == "b":
        return pixels.astype(np.uint8) * 255, False
    if kind == "u" and pixels.dtype.itemsize == 2:  # of either byte order
        return (pixels >> 8).astype(np.uint8), False
    lowest, highest = pixels.min(), pixels.max()
    if kind == "f":
        is_declared = do_rescale is False
        if -OVERSHOOT <= lowest and (highest < AMBIGUOUS if is_declared else highest <= 1 + OVERSHOOT):
            return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8), is_declared
        fits = -OVERSHOOT * highest <= lowest and AMBIGUOUS <= highest <= 255 * (1 + OVERSHOOT)
    else:
        fits = kind in "iu" and 0 <= lowest and highest <= 255
    if not fits:
        raise ValueError(
            "Pixel values must lie in [0, 1] or [0, 255] as floats, in [0, 255] as integers, or in [0, 65535] as "
            f"uint16, got {pixels.dtype} values from {lowest} to {highest}. `do_rescale=False` says that floats lie in "
            "[0, 1]."
        )
    return np.rint(pixels.clip(0, 255)).astype(np.uint8), False


class Step3VLImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    patch_size (`int`, *optional*, defaults to 504):
        Side of a patch in pixels, after resizing.
    max_image_size (`int`, *optional*, defaults to 3024):
        Maximum side of an image in pixels; larger images are scaled down.
    max_pixels (`int`, *optional*):
        Maximum number of pixels of an image; larger images are scaled down.
    do_patch (`bool`, *optional*, defaults to `True`):
        Whether to cut images into patches.
    max_patches (`int`, *optional*):
        Maximum number of patches of an image; those of larger images are cut from a smaller copy.
    vision_patch_size (`int`, *optional*, defaults to 14):
        `patch_size` of the vision encoder.
    projector_stride (`int`, *optional*, defaults to 2):
        `understand_projector_stride` of the model.
    """

    patch_size: int
    max_image_size: int
    max_pixels: int | None
    do_patch: bool
    max_patches: int | None
    vision_patch_size: int
    projector_stride: int


class Step3VLImageProcessor(PilBackend):
    r"""
    Image processor of Step3-VL. Each image gives a global view and, if it is large or elongated, patches cut from it
    row by row. Both are normalised, then resized as floats.

    Args:
        size (`dict[str, int]`, defaults to `{"height": 728, "width": 728}`):
            Size of the global view in pixels; must be square.
        image_mean, image_std (`float` or `list[float]`): Normalisation of each channel; default to those of CLIP.
        do_convert_rgb, do_rescale, do_normalize (`bool`, defaults to `True`): Whether to take these steps.
        rescale_factor (`float`, defaults to 1/255): Factor by which pixel values are multiplied.
        resample (`PILImageResampling`, defaults to `BILINEAR`): `BILINEAR` or `BICUBIC`.

    and those of [`Step3VLImageProcessorKwargs`]. `num_image_tokens` and `num_patch_tokens`, the numbers of image tokens
    of a global view and of a patch, are computed from them and saved with them.

    `max_download_bytes` (`int`, defaults to 128 MiB) limits the size of files downloaded from URLs.
    """

    valid_kwargs = Step3VLImageProcessorKwargs
    model_input_names = ["pixel_values", "patch_pixel_values", "num_patches"]

    resample = PILImageResampling.BILINEAR
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 728, "width": 728}
    patch_size = 504
    max_image_size = 3024
    max_pixels = None
    do_patch = True
    max_patches = None
    vision_patch_size = 14
    projector_stride = 2
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    max_download_bytes = 2**27

    # Ignores the saved numbers of tokens, which follow from the sizes.
    def __init__(self, *, num_image_tokens=None, num_patch_tokens=None, **kwargs: Unpack[Step3VLImageProcessorKwargs]):
        super().__init__(**kwargs)

    @property
    def num_image_tokens(self) -> int:
        return self.num_tokens(get_size_dict(self.size)["height"])

    @property
    def num_patch_tokens(self) -> int:
        return self.num_tokens(self.patch_size)

    def to_dict(self) -> dict:
        numbers = {"num_image_tokens": self.num_image_tokens, "num_patch_tokens": self.num_patch_tokens}
        return {**super().to_dict(), "size": get_size_dict(self.size), **numbers}

    def num_tokens(self, side: int) -> int:
        """Number of image tokens for a square image of `side` pixels."""
        return num_image_tokens(side, self.vision_patch_size, self.projector_stride)

    def _validate_preprocess_kwargs(self, size=None, **kwargs):
        super()._validate_preprocess_kwargs(size=size, **kwargs)
        if not size.height or size.height != size.width:
            raise ValueError(f"`size` must be a square, as equal `height` and `width`, got {size}.")
        for name, least in (("max_pixels", 1), ("max_patches", 0)):
            if kwargs.get(name) is not None and kwargs[name] < least:
                raise ValueError(f"`{name}` must be at least {least}, got {kwargs[name]}.")

    def plan(self, width: int, height: int, **kwargs) -> PicturePlan:
        """Plans how to process an image of `width` × `height` pixels; `kwargs` override this processor's options."""

        def option(name: str):
            return getattr(self, name) if kwargs.get(name) is None else kwargs[name]

        return plan_picture(
            width,
            height,
            view_side=get_size_dict(option("size"))["height"],
            patch_side=option("patch_size"),
            max_side=option("max_image_size"),
            max_pixels=option("max_pixels"),
            max_patches=option("max_patches") if option("do_patch") else 0,
        )

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Number of patches of an image of `height` × `width` pixels, as serving engines ask for it."""
        return self.plan(width, height, **(images_kwargs or {})).num_patches

    def fetch_images(self, image_url_or_urls):
        """
        Opens images given as paths, URLs or base64 strings, in lists of any nesting. Images are returned as they are.

        Raises:
            `OSError`: if an image cannot be found or read, or a download exceeds `max_download_bytes`.
            `ValueError`: if a string is neither a URL nor the path of a file nor base64.
        """
        source = image_url_or_urls
        if not isinstance(source, (str, Path)):
            return super().fetch_images(source)
        if isinstance(source, Path) or os.path.isfile(source):
            file = source
        elif source[:8].lower().startswith(("http://", "https://")):
            file = download(source, self.max_download_bytes)
        else:
            is_data_url = source[:5].lower() == "data:"
            try:
                data = unquote_to_bytes(source.partition(",")[2]) if is_data_url else source.encode()
                file = BytesIO(base64.b64decode(b"".join(data.split()), validate=True))
            except ValueError as error:
                raise ValueError(f"A picture must be a URL, a file or base64, got {source[:80]!r}: {error}.") from error
        try:
            with Image.open(file) as image:
                return upright(image)
        except (UnidentifiedImageError, *BROKEN_FILE) as error:
            raise OSError(f"The picture {str(source)[:80]!r} cannot be read: {error}.") from error

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | None = None,
        image_mean: float | tuple[float, ...] | None = None,
        do_rescale: bool | None = None,
        **kwargs,
    ) -> Image.Image:
        """
        Converts a PIL image, an array or a tensor to an upright PIL image with 8 bits per channel. The result is RGB,
        unless `do_convert_rgb` is false or `image_mean` has a number of channels other than three.

        With `do_rescale=False`, floats in [0, 1] give the same pixel values as the 8-bit image does with rescaling.

        Raises:
            `ValueError`: if the input is none of these, or its shape or values are not those of an image.
            `OSError`: if the image's file is broken.
        """
        is_unit = False
        if isinstance(image, Image.Image):
            image = upright(image)
            if image.mode in ("La", "RGBa"):  # which PIL converts only to LA and RGBA
                image = image.convert(image.mode.upper())
            pixels = np.asarray(image) if image.mode.startswith(("I", "F")) else None
            if image.mode == "I" and pixels.max() > 255:  # PIL also stores 16-bit greyscale like this
                pixels = pixels.clip(0, 65535).astype(np.uint16)
        else:
            if isinstance(image, torch.Tensor):  # NumPy has no bfloat16
                image = image.detach().cpu().float() if image.is_floating_point() else image.cpu()
            image = np.asarray(image)
            if image.ndim == 3 and input_data_format is None:
                # If both ends could be channels, prefer three to one and four; transformers decides the rest.
                input_data_format = infer_channel_dimension_format(image, 3 if 3 in image.shape[::2] else (1, 4))
            pixels = np.moveaxis(super().process_image(image, False, input_data_format), 0, -1)
            pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        if pixels is not None:
            pixels, is_unit = to_8_bit(pixels, do_rescale)
            image = Image.fromarray(np.ascontiguousarray(pixels))
        wants_rgb = do_convert_rgb and np.shape(image_mean) in ((), (3,))
        image = image.convert("RGB") if wants_rgb and image.mode != "RGB" else image
        if is_unit:  # on our own image, never on the caller's
            image.info[UNIT_RANGE] = True
        return image

    def _preprocess(
        self,
        images: list[Image.Image],
        size: SizeDict,
        patch_size: int,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        # One image at a time: several together do not fit in the processor's caches, and take longer.
        def to_pixels(image: Image.Image) -> torch.Tensor:
            """Rescaled and normalised pixels (1, channels, height, width)."""
            tensor = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
            pixels = empty(1, *tensor.shape).copy_(tensor)
            if do_rescale:
                pixels.mul_(rescale_factor)
            elif image.info.get(UNIT_RANGE):
                pixels.mul_(1 / 255)
            if do_normalize:
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (image_mean, image_std))
                pixels.sub_(mean).div_(std)
            return pixels

        def resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
            if pixels.shape[-2:] == (side, side):
                return pixels
            mode = INTERPOLATION_MODES[resample]
            return nn.functional.interpolate(pixels, size=(side, side), mode=mode, antialias=True)

        plans = [self.plan(*image.size, size=size, patch_size=patch_size, **kwargs) for image in images]
        num_patches = [plan.num_patches for plan in plans]
        num_channels = len(images[0].getbands())
        pixel_values = empty(len(images), num_channels, size.height, size.height)
        patches = empty(sum(num_patches), num_channels, patch_size, patch_size)
        for image, plan, view, own_patches in zip(images, plans, pixel_values, patches.split(num_patches), strict=True):
            if plan.padded_size != image.size:
                image = image.crop((0, 0, *plan.padded_size))
            if plan.view_size != image.size:
                image = image.resize(plan.view_size, resample)
            pixels = to_pixels(image)
            view.copy_(resize(pixels, size.height)[0])
            if plan.num_patches == 0:
                continue
            covered = (plan.columns * plan.window, plan.rows * plan.window)
            if not plan.view_size == plan.cut_size == covered:  # otherwise reuse the view's pixels
                pixels = to_pixels(image.resize(plan.cut_size, resample).crop((0, 0, *covered)))
            squares = pixels[0].unflatten(2, (plan.columns, -1)).unflatten(1, (plan.rows, -1)).permute(1, 3, 0, 2, 4)
            if plan.window == patch_size:
                own_patches.unflatten(0, (plan.rows, plan.columns)).copy_(squares)
            else:
                own_patches.copy_(resize(squares.flatten(0, 1), patch_size))

        data = {"pixel_values": pixel_values, "num_patches": num_patches}
        if len(patches):
            data["patch_pixel_values"] = patches
            data["patch_newline_mask"] = [newline for plan in plans for newline in plan.newline_mask]
        return BatchFeature(data, tensor_type=return_tensors)


def empty(*shape: int) -> torch.Tensor:
    """Uninitialised float32 tensor in memory from NumPy, which allocates huge pages. Large images then take a third of
    the time, most of which the system would spend on allocating small pages."""
    return torch.from_numpy(np.empty(shape, np.float32))


def normalise(conversation):
    """
    Copies one or more conversations in the form that chat templates take. The arguments of past tool calls, which
    OpenAI clients send as JSON, become mappings; `None` values that Arrow adds to message parts are removed.
    """
    if isinstance(conversation, (list, tuple)):
        return [normalise(entry) for entry in conversation]
    if not isinstance(conversation, dict):
        return conversation

    def without_none(part):
        return {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part

    def parsed(call: dict) -> dict:
        if isinstance(call.get("function"), dict):
            return {**call, "function": parsed(call["function"])}
        if not isinstance(call.get("arguments"), str):
            return call
        try:
            return {**call, "arguments": json.loads(call["arguments"] or "{}")}
        except json.JSONDecodeError as error:
            raise ValueError(f"The arguments of the tool call {call.get('name')!r} are not JSON: {error}.") from error

    message = dict(conversation)
    if isinstance(message.get("content"), (list, tuple)):
        message["content"] = [without_none(part) for part in message["content"]]
    if message.get("tool_calls"):
        message["tool_calls"] = [parsed(call) for call in message["tool_calls"]]
    return message


class Step3VLProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: Step3VLImageProcessorKwargs
    _defaults = {}  # read by the oldest supported transformers


class Step3VLProcessor(ProcessorMixin):
    r"""
    Processor of Step3-VL: makes model inputs from text and images. Each `<im_patch>` in the text is the placeholder of
    one image and is expanded to its tokens: the patches row by row, then the global view.

    Args:
        image_processor ([`Step3VLImageProcessor`]): Makes the vision inputs.
        tokenizer ([`PreTrainedTokenizerBase`]): Must have the six image tokens.
        chat_template (`str`, *optional*): Jinja template of conversations. Defaults to the tokenizer's, or if it has
        none, to a built-in one in the released format.

    Raises:
        `ValueError`: if the tokenizer lacks an image token.
    """

    valid_processor_kwargs = Step3VLProcessorKwargs
    image_token = "<im_patch>"
    image_start_token, image_end_token = "<im_start>", "<im_end>"
    patch_start_token, patch_end_token, patch_newline_token = "<patch_start>", "<patch_end>", "<patch_newline>"

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.chat_template = chat_template or tokenizer.chat_template or CHAT_TEMPLATE
        self.auto_map = {"AutoProcessor": "processing_step3.Step3VLProcessor"}
        vocabulary = tokenizer.get_vocab()
        tokens = [self.image_token, self.image_start_token, self.image_end_token]
        tokens += [self.patch_start_token, self.patch_end_token, self.patch_newline_token]
        if missing := [token for token in tokens if token not in vocabulary]:
            raise ValueError(f"`tokenizer` must have Step3's image tokens, but it lacks {', '.join(missing)}.")
        self.image_token_id = vocabulary[self.image_token]
        # All tokens of an image in the text, which `mm_token_type_ids` marks and serving engines count.
        self.image_token_ids = [vocabulary[token] for token in tokens]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """As for any processor, but checkpoints without an image processor, like the released ones, get the default."""
        if "image_processor" not in (processor_dict or {}):
            options = {**kwargs, "_raise_exceptions_for_missing_entries": False}
            if cached_file(pretrained_model_name_or_path, IMAGE_PROCESSOR_NAME, **options) is None:
                return [Step3VLImageProcessor(), AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """
        As for any processor. Arguments of past tool calls may be mappings or JSON, and message parts may have keys that
        are `None`. The built-in template raises a `jinja2.TemplateError` for what it cannot format.
        """
        return super().apply_chat_template(normalise(conversation), *args, **kwargs)

    def parse_response(self, response, schema: dict | None = None, **kwargs):
        """As for any processor; defaults to the released format if the tokenizer has no `response_template`."""
        schema = schema or getattr(self.tokenizer, "response_template", None) or WHOLE_RESPONSE_TEMPLATE
        return super().parse_response(response, schema, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        return ["patch_newline_mask"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As for any processor. An empty list of images means no images. `videos` and `audio` are ignored, with a
        warning."""
        for name, given in (("videos", videos), ("audio", audio)):
            if given is not None:
                logger.warning_once(f"Step3-VL takes pictures and text; `{name}` are ignored.")
        if isinstance(images, (list, tuple)) and all(isinstance(x, (list, tuple)) and not x for x in images):
            images = None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        """Raises a `ValueError` unless the text has one `<im_patch>` per image, in each sample if images are nested."""
        super().validate_inputs(images=images, text=text, **kwargs)
        if text is None:
            return
        wanted = [sample.count(self.image_token) for sample in text]
        if isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images):
            given = [len(entry) if isinstance(entry, (list, tuple)) else 1 for entry in images]
        else:
            given = 0 if images is None else len(make_flat_list_of_images(images))
        if given != (wanted if isinstance(given, list) else sum(wanted)):
            raise ValueError(
                f"The number of {self.image_token} tokens in the prompts should be the same as the number of `images`, "
                f"sample by sample where these are nested: found {wanted} tokens and {given} images."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The tokens that replace the placeholder of image `image_idx` in the text."""
        counts = [int(count) for count in image_inputs["num_patches"]]
        first, patches = sum(counts[:image_idx]), image_inputs.get("patch_pixel_values")
        newlines = image_inputs["patch_newline_mask"][first : first + counts[image_idx]] if counts[image_idx] else []
        return self.text_of_image(
            newlines, image_inputs["pixel_values"].shape[-1], None if patches is None else patches.shape[-1]
        )

    def text_of_image(
        self, newline_mask: list[bool], view_side: int | None = None, patch_side: int | None = None
    ) -> str:
        """The tokens of an image whose plan has this `newline_mask`. Sides of the global view and the patches default
        to those of the image processor."""
        sizes = self.image_processor
        num_tokens = sizes.num_image_tokens if view_side is None else sizes.num_tokens(view_side)
        num_patch_tokens = sizes.num_patch_tokens if patch_side is None else sizes.num_tokens(patch_side)
        patch = self.patch_start_token + self.image_token * num_patch_tokens + self.patch_end_token
        patches = "".join(patch + self.patch_newline_token * bool(newline) for newline in newline_mask)
        return patches + self.image_start_token + self.image_token * num_tokens + self.image_end_token

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Numbers of tokens and patches for images of these sizes, `(height, width)` in pixels."""
        if image_sizes is None:
            return MultiModalData()
        image_processor = self.image_processor
        side = get_size_dict(kwargs.get("size") or image_processor.size)["height"]
        num_image_tokens = image_processor.num_tokens(side)
        num_patch_tokens = image_processor.num_tokens(kwargs.get("patch_size") or image_processor.patch_size)
        plans = [image_processor.plan(width, height, **kwargs) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[
                plan.num_patches * (num_patch_tokens + 2) + plan.num_newlines + num_image_tokens + 2 for plan in plans
            ],
            num_image_patches=[plan.num_patches for plan in plans],
        )


Step3VLImageProcessor.register_for_auto_class("AutoImageProcessor")
Step3VLProcessor.register_for_auto_class("AutoProcessor")
set_on_package(__name__)
