"""Block-fp8 as in Step3's release: e4m3 numbers with a float32 scale for each block of 128 by 128."""

import math

import torch


LARGEST = 448.0  # the largest e4m3 number
# Under a smaller scale, the smallest e4m3 number would stand for a subnormal float32.
SMALLEST_SCALE = 2.0**-117


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """The scale of every element of a matrix of `shape` (rows, columns)."""
    rows, columns = shape
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def quantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """
    The e4m3 numbers that, multiplied by their blocks' scales, are nearest to a matrix. Ties go to the even number.

    Args:
        weight: (rows, columns), float32.
        scale: (blocks of rows, blocks of columns), float32.
        block: Rows and columns of a block.
    """
    factors = spread(scale, block, weight.shape)
    ratio = (weight / factors).contiguous()
    # The division may round a ratio to the midpoint between two e4m3 numbers, which might then round to the wrong one.
    # Midpoints have at most five binary digits; move those ratios to the side of the exact ratio.
    short = (ratio.view(-1).view(torch.int32) & 0x7FFFF == 0).nonzero().squeeze(1)
    rounded = ratio.view(-1)[short]
    side = weight.reshape(-1)[short].double() - rounded.double() * factors.reshape(-1)[short].double()  # exact
    pushed = torch.nextafter(rounded, torch.copysign(torch.tensor(math.inf), side.float()))
    ratio.view(-1)[short] = torch.where(side == 0, rounded, pushed)
    return ratio.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def choose_scales(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """
    The scale of each block of a matrix: its largest absolute number, rounded to bfloat16, divided by 448, the largest
    e4m3 number; at least 2^-117.

    The largest number then survives quantising and dequantising in bfloat16, so the same scale is chosen again. A block
    that is exact under a power of two, but not under the scale above, was quantised with powers of two before; its
    scale is the smallest that fits.

    Args:
        weight: (rows, columns), float32, finite.
        block: Rows and columns of a block.

    Returns:
        (blocks of rows, blocks of columns), float32.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).transpose(1, 2)
    largest = torch.maximum(blocks.amax((2, 3)), -blocks.amin((2, 3)))
    largest = largest.clamp(max=torch.finfo(torch.bfloat16).max).bfloat16().float()
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    # A block can only be exact under a power of two if all its numbers have the four binary digits of e4m3.
    short = (blocks.view(torch.int32) & 0xFFFFF).amax((2, 3)) == 0
    if not short.any():
        return scale
    suspects, chosen = blocks[short], scale[short]
    fraction, exponent = torch.frexp(chosen)
    power = torch.ldexp(torch.ones_like(chosen), exponent - (fraction == 0.5).int())  # the next power of two

    def keeps(scales: torch.Tensor) -> torch.Tensor:
        """Which of the suspects are unchanged after quantising and dequantising in bfloat16."""
        matrices = zip(suspects, scales.view(-1, 1, 1), strict=True)
        restored = torch.stack([quantize(matrix, scale, block).float() * scale for matrix, scale in matrices])
        return (restored.bfloat16() == suspects).all(2).all(1)

    scale[short] = torch.where(keeps(power) & ~keeps(chosen), power, chosen)
    return scale
