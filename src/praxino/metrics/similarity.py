"""The structural similarity of planes, in float64: the window as products with a banded matrix.

Such a product does some two times the work of a convolution at many times its speed. The rest is to keep what one step
hands to the next in the cache: one plane at a time on a CPU, wide ones in strips, all buffers used again. Steps are too
short to be shared by threads, which would wait for each other, on a busy machine most of the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
MARGIN = WINDOW - 1
BLOCK = 16  # outputs of one product with the banded matrix; `MARGIN` at least
STRIP = 2**17  # pixels at a time on a CPU
BATCH = 2**24  # pixels at a time on a GPU


def similarity(x: Tensor, y: Tensor, luminance: bool = True) -> Tensor:
    """Return the mean SSIM of planes `(N, H, W)` in [-1, 1], `(N,)`; data range 1 after mapping to [0, 1].

    Args:
        luminance: false leaves the term of the means out: contrast and structure alone.
    """
    count, height, width = x.shape
    on_cpu = x.device.type in ("cpu", "mps")
    device = torch.device("cpu") if on_cpu else x.device
    planes = 1 if on_cpu else max(1, BATCH // (height * width))
    rows = max(BLOCK, STRIP // width // BLOCK * BLOCK) if on_cpu else height
    strip = cache(Strip)  # one for all of a size
    sums = torch.zeros(count, dtype=torch.float64, device=device)
    with one_thread():
        for top in range(0, height - MARGIN, rows):
            for first in range(0, count, planes):
                a, b = (v[first : first + planes, top : top + rows + MARGIN] for v in (x, y))
                sums[first : first + planes] += strip(*a.shape, device)(a, b, luminance)
    return sums / ((height - MARGIN) * (width - MARGIN))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Strip:
    """The sum of SSIM over strips `(N, H, W)` of planes.

    Values v of a plane are mapped to v + 1, the range 0 to 2, for which the constants are 4 C1 and 4 C2. Rows are cut
    into blocks at a stride of `BLOCK`, and so are columns; what they reach beyond a strip or a row is not counted.
    """

    def __init__(self, count: int, height: int, width: int, device: torch.device) -> None:
        self.valid = count, height - MARGIN, width - MARGIN
        down, across = (-(-size // BLOCK) for size in self.valid[1:])  # blocks
        blocks, reach = count * (down + 1) - 1, BLOCK + MARGIN  # blocks down all planes
        self.pitch, lines = (down + 1) * BLOCK, blocks * BLOCK  # rows of a plane, filtered rows in all
        # The constants of SSIM; those of the moments make up for what is subtracted with the means.
        constants = [2 * C1, 4 * C1, 2 * (C1 + C2), 4 * (C1 + C2)]
        self.constants = torch.tensor(constants, dtype=torch.float64, device=device).unbind()

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        planes, filtered = buffer(3, count, self.pitch, width), buffer(lines * width + BLOCK)
        self.x, self.y, self.moment = planes[:, :, :height]
        self.rows = [v.as_strided((blocks, reach, width), (BLOCK * width, width, 1)) for v in planes]
        self.filtered = filtered[: lines * width].view(blocks, BLOCK, width)
        self.columns = filtered.as_strided((across, lines, reach), (BLOCK, width, 1))
        self.means = buffer(4, across, lines, BLOCK).unbind()  # of x, y, x^2 + y^2, x y
        self.rest = torch.empty_like(self.means[0])
        band = window_band(device)  # (BLOCK, reach)
        self.down, self.across = band.expand(blocks, -1, -1), band.T.expand(across, -1, -1)

    def __call__(self, x: Tensor, y: Tensor, luminance: bool) -> Tensor:
        """Return the sums over the window's places, `(N,)`."""
        rows_x, rows_y, rows = self.rows
        mean_x, mean_y, squares, product = self.means
        small, large, for_product, for_squares = self.constants
        self.x.copy_(x).add_(1)
        self.y.copy_(y).add_(1)
        torch.addcmul(for_product, self.x, self.y, out=self.moment)
        self.blur(rows, product)
        torch.addcmul(for_squares, self.x, self.x, out=self.moment).addcmul_(self.y, self.y)
        self.blur(rows, squares)
        self.blur(rows_x, mean_x)
        self.blur(rows_y, mean_y)

        sum_of_squares = torch.addcmul(large, mean_x, mean_x, out=self.rest).addcmul_(mean_y, mean_y)  # + 4 C1
        twice = torch.addcmul(small, mean_x, mean_y, out=mean_x)  # half of 2 m_x m_y + 4 C1
        product.sub_(twice)  # half of 2 cov + 4 C2
        squares.sub_(sum_of_squares)  # var_x + var_y + 4 C2
        if luminance:
            product.mul_(twice)
            squares.mul_(sum_of_squares)
        return self.total(product.div_(squares)) * (4 if luminance else 2)

    def blur(self, rows: Tensor, out: Tensor) -> None:
        """Filter planes, given as overlapping blocks of rows, down and across; `out` holds columns in blocks."""
        torch.bmm(self.down, rows, out=self.filtered)
        torch.bmm(self.columns, self.across, out=out)

    def total(self, values: Tensor) -> Tensor:
        """Sum values `(across, lines, BLOCK)` over each plane but for what lies beyond it, `(N,)`."""
        count, height, width = self.valid
        size = (len(values), count, height, BLOCK)
        inside = values.as_strided(size, (values.stride(0), self.pitch * BLOCK, BLOCK, 1))
        last = inside[-1, ..., : width - (len(values) - 1) * BLOCK]
        return inside[:-1].sum(dim=(0, 2, 3)) + last.sum(dim=(1, 2))


def window_band(device: torch.device) -> Tensor:
    """Return the window as a matrix `(BLOCK, BLOCK + MARGIN)`: in every row one column further."""
    window = torch.exp(-torch.arange(-(WINDOW // 2), WINDOW // 2 + 1).double().square() / (2 * SIGMA**2))
    band = torch.zeros(BLOCK, BLOCK + MARGIN, dtype=torch.float64)
    for row in range(BLOCK):
        band[row, row : row + WINDOW] = window / window.sum()
    return band.to(device)
