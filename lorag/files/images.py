"""Images that examples of a suite name: PNG and JPEG files inside its folder, judged by their first bytes, measured before decoding."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lorag.errors import ArtifactError, MissingDependencyError
from lorag.files.artifacts import looks_like, read_bounded, require_plain, resolve_inside
from lorag.files.atomic import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFile", "copy_images", "require_pillow"]

_MAX_BYTES = 32 * 2**20
_MAX_PIXELS = 50_000_000  # 150 MB once decoded
_STARTS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}


class ImageFile(str):
    """An example's input that is an image.

    As text it is the path relative to the suite's folder, so that a suite reads, compares and saves the same wherever it
    lies; `folder` says where that is.
    """

    folder: Path

    def __new__(cls, relative: str, folder: Path) -> ImageFile:  # noqa: D102 - the class says it
        image = super().__new__(cls, relative)
        image.folder = folder
        return image

    def __getnewargs__(self) -> tuple[str, Path]:  # type: ignore[override]  # copies keep the folder
        return str(self), self.folder

    def path(self) -> Path:
        """Where it lies: below the suite's folder, through no link, a file of at most 32 MiB.

        Raises:
            ArtifactError: If it is not.
        """
        path = resolve_inside(self.folder, str(self))
        require_plain(path, _MAX_BYTES)
        return path

    def open(self) -> Image:
        """Decodes it to RGB as it is stored; a rotation in its EXIF data is not applied, as data sets' boxes are not rotated.

        Raises:
            ArtifactError: If it is not a PNG or JPEG, whatever its name, is damaged, or has more than 50 million pixels, which
                its header tells before anything is decoded.
            MissingDependencyError: If Pillow is not installed.
        """
        path = self.path()
        require_pillow()
        from PIL import Image

        raw = read_bounded(path, _MAX_BYTES)
        kind = next((name for start, name in _STARTS.items() if raw.startswith(start)), None)
        if kind is None:
            raise ArtifactError(f"{path} cannot be used as an image", got=looks_like(raw[:64]), expected="a PNG or JPEG file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
                image = Image.open(io.BytesIO(raw), formats=(kind,))
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise ArtifactError(
                    f"{path} is too large once decoded", got=f"{width} x {height}", expected=f"{_MAX_PIXELS} pixels at most"
                )
            return image.convert("RGB")
        except ArtifactError:
            raise
        except (Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
            raise ArtifactError(f"{path} cannot be decoded", got=str(error)[:120], expected="a whole PNG or JPEG file") from error


def require_pillow() -> None:
    """Raises MissingDependencyError unless Pillow is there."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("images need Pillow", remedy='Install it: pip install "lorag[vision]".') from error


def copy_images(inputs: Iterable[str], folder: Path) -> None:
    """Copies the images among a suite's inputs below another folder, each under its own relative path.

    Raises:
        ArtifactError: If one is missing, or if two differ that would have one path.
    """
    taken: dict[str, ImageFile] = {}
    for image in inputs:
        if not isinstance(image, ImageFile):
            continue
        first = taken.setdefault(image, image)
        target = resolve_inside(folder, str(image))
        source = image.path()
        if first is image and not (target.exists() and target.samefile(source)):
            write_bytes(target, read_bounded(source, _MAX_BYTES))
        elif first.folder != image.folder and first.path().read_bytes() != source.read_bytes():
            raise ArtifactError("two different images of a suite have one path", got=str(image)[:80], remedy="Rename one.")
