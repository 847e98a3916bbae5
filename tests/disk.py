"""A disk that is nearly full, for the few lines that shall meet it."""

import resource
from contextlib import contextmanager


@contextmanager
def nearly_full(size):
    """Let the kernel refuse to make any file of this process longer than `size` bytes.

    It holds for the standard streams too: wrap the one call that shall fail, not the whole test, since the
    test runner writes its own lines between tests and its output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
