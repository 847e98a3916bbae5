"""A temporary file without a name: it goes with whoever holds it, however that ends."""

import tempfile
import weakref
from typing import final

__all__ = ["Nameless"]


@final
class Nameless:
    """Bytes on disk that are written once, one after the other, and read from anywhere.

    The file is closed, and with that gone, when nobody holds it any more, or when the process ends in whatever way.

    Attributes:
        size: bytes written so far.

    Example:
        >>> file = Nameless()
        >>> file.write(b"some text")
        >>> file.read(5, 4), file.size
        (b'text', 9)
    """

    def __init__(self) -> None:
        self._stream = tempfile.TemporaryFile(prefix="tether-", buffering=0)  # noqa: SIM115 - it lives as long as this
        self.size = 0
        weakref.finalize(self, self._stream.close)

    def write(self, data: bytes | memoryview) -> None:
        """Put bytes at the end.

        Args:
            data: the bytes.

        Raises:
            OSError: there is no room for them.
        """  # noqa: DOC502 - raised by the system
        left = memoryview(data).cast("B")
        self._stream.seek(self.size)
        while left:
            # The system may take less than it is given.
            count = self._stream.write(left)
            self.size += count
            left = left[count:]

    def read(self, begin: int, size: int) -> bytes:
        """Read some bytes.

        Args:
            begin: of the first one.
            size: how many.

        Returns:
            The bytes, fewer where the file ends.
        """
        self._stream.seek(begin)
        parts = []
        while size and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    @staticmethod
    def folder() -> str:
        """Tell where such files lie.

        Returns:
            The system's folder for temporary files; TMPDIR names another one.
        """
        return tempfile.gettempdir()
