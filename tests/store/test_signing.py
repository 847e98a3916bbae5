"""Signatures against the test vectors of the standard, and keys as other programs write them."""

import base64
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tether.errors import ConfigError
from tether.store.signing import check, private_key, public_key, sign

# RFC 8032, section 7.1, test 3: secret key, public key, message, signature.
SECRET = "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"
PUBLIC = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
MESSAGE = "af82"
SIGNATURE = (
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)
# RFC 8410: what goes before the 32 bytes of a key in its file.
BEFORE_SECRET, BEFORE_PUBLIC = "302e020100300506032b657004220420", "302a300506032b6570032100"


def pem(kind, content):
    text = base64.encodebytes(bytes.fromhex(content)).decode()
    return f"-----BEGIN {kind} KEY-----\n{text}-----END {kind} KEY-----\n"


def test_signatures_are_those_of_the_standard(tmp_path):
    (tmp_path / "key").write_text(pem("PRIVATE", BEFORE_SECRET + SECRET))
    (tmp_path / "pub").write_text(pem("PUBLIC", BEFORE_PUBLIC + PUBLIC))
    made = sign(private_key(tmp_path / "key"), bytes.fromhex(MESSAGE))
    assert base64.b64decode(made).hex() == SIGNATURE
    key = public_key(tmp_path / "pub")
    assert check(key, made, bytes.fromhex(MESSAGE))
    assert not check(key, made, bytes.fromhex("af83"))
    for at in range(0, len(made) - 2, 7):
        other = made[:at] + ("A" if made[at] != "A" else "B") + made[at + 1 :]
        assert not check(key, other, bytes.fromhex(MESSAGE))
    for no_signature in ("", "?", made + "\n", made[:-4], "\u00e9" * 8):
        assert not check(key, no_signature, bytes.fromhex(MESSAGE))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_keys_of_openssl_are_read(tmp_path):
    run = {"cwd": tmp_path, "check": True, "capture_output": True}
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", "key"], **run)
    subprocess.run(["openssl", "pkey", "-in", "key", "-pubout", "-out", "pub"], **run)
    made = sign(private_key(tmp_path / "key"), b"content")
    assert check(public_key(tmp_path / "pub"), made, b"content")
    (tmp_path / "content").write_bytes(b"content")
    (tmp_path / "signature").write_bytes(base64.b64decode(made))
    subprocess.run(
        [
            *("openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "pub", "-rawin"),
            *("-in", "content", "-sigfile", "signature"),
        ],
        **run,
    )


def test_keys_of_ssh_are_read(tmp_path):
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "id").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    )
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "id.pub").write_bytes(line + b" somebody@somewhere\n")
    made = sign(private_key(tmp_path / "id"), b"content")
    assert check(public_key(tmp_path / "id.pub"), made, b"content")


def test_what_is_no_such_key_is_refused_with_what_to_do(tmp_path):
    secret = ed25519.Ed25519PrivateKey.generate()
    locked = serialization.BestAvailableEncryption(b"secret")
    pem_form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    plain = serialization.NoEncryption()
    files = {
        "empty": b"",
        "noise": b"\x00\xff" * 40,
        "locked": secret.private_bytes(*pem_form, locked),
        "other": ec.generate_private_key(ec.SECP256R1()).private_bytes(*pem_form, plain),
        "private": secret.private_bytes(*pem_form, plain),
        "public": secret.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        "large": b"-----BEGIN PRIVATE KEY-----\n" * 4000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "absent", "."):
        if name != "private":
            with pytest.raises(ConfigError, match=name if name != "." else "folder"):
                private_key(tmp_path / name)
        if name != "public":
            with pytest.raises(ConfigError, match=name if name != "." else "folder"):
                public_key(tmp_path / name)
