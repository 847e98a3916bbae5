"""Ed25519 signatures with keys from files: who vouches for content, which a hash over it does not say."""

import base64
import binascii
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from tether.errors import ConfigError
from tether.files import read_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["check", "private_key", "public_key", "sign"]

KEY_BYTES = 16 * 2**10
"""Size of a key file at most."""


def private_key(path: str | Path) -> "Ed25519PrivateKey":
    """Read a key to sign with.

    Args:
        path: of `openssl genpkey -algorithm ed25519` (PEM) or `ssh-keygen -t ed25519`, without a passphrase.

    Returns:
        The key.

    Raises:
        ConfigError: the file is missing or holds no such key, or the package cryptography is not installed.
    """
    _check_installed()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    text = read_bytes(path, KEY_BYTES, error=ConfigError)
    load = serialization.load_ssh_private_key if b"OPENSSH" in text else serialization.load_pem_private_key
    try:
        key = load(text, None)
    except Exception as error:
        # The library has an error of its own for every way in which a file is damaged, the cipher's own among them.
        raise ConfigError(
            f"{path}: no private key without a passphrase ({_line(error)}); expected one of Ed25519, as "
            "'openssl genpkey -algorithm ed25519 -out KEY' writes it"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: a private key of another kind; expected one of Ed25519")
    return key


def public_key(path: str | Path) -> "Ed25519PublicKey":
    """Read a key to check signatures with.

    Args:
        path: of `openssl pkey -in KEY -pubout` (PEM), or the `.pub` file of `ssh-keygen -t ed25519`.

    Returns:
        The key.

    Raises:
        ConfigError: the file is missing or holds no such key, or the package cryptography is not installed.
    """
    _check_installed()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    text = read_bytes(path, KEY_BYTES, error=ConfigError)
    load = (
        serialization.load_ssh_public_key if text.startswith(b"ssh-") else serialization.load_pem_public_key
    )
    try:
        key = load(text)
    except Exception as error:
        raise ConfigError(
            f"{path}: no public key ({_line(error)}); expected one of Ed25519, as 'openssl pkey -in KEY -pubout' "
            "writes it"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: a public key of another kind; expected one of Ed25519")
    return key


def sign(key: "Ed25519PrivateKey", content: bytes) -> str:
    """Sign content.

    Args:
        key: from `private_key`.
        content: what is vouched for.

    Returns:
        The signature, base64 of 64 bytes.
    """
    return base64.b64encode(key.sign(content)).decode()


def check(key: "Ed25519PublicKey", signature: str, content: bytes) -> bool:
    """Tell whether a signature over content is of a key.

    Args:
        key: from `public_key`.
        signature: from `sign`, or anything.
        content: what it should be over.

    Returns:
        Whether it is.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _check_installed() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigError("signatures need the package cryptography; install 'tether[sign]'")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
