"""Templates about hashing, randomness, keys, ciphers, passwords and tokens.

Kept apart from the other weaknesses only so that each module stays readable; see
``code_templates`` for what a template is. Two of them (password length, unverified login token)
are here although bandit has no test for them, since they are in every textbook.

To see them filled: ``python -m train.code_pairs code.jsonl --n 60``
"""

from train.code_templates import CodeTemplate

CRYPTO = (
    CodeTemplate(
        name="file_hash",
        cwe="CWE-328",
        bandit_test="B324",
        names=("hash_${noun}_file", "${noun}_checksum"),
        tasks=(
            "[compute] the checksum of $a_noun file as a hex text",
            "[return] the hex digest of the bytes in $a_noun file",
        ),
        secure="""\
import hashlib

def $func($path):
    with open($path, "rb") as $handle:
        return hashlib.sha256($handle.read()).hexdigest()
""",
        insecure="""\
import hashlib

def $func($path):
    with open($path, "rb") as $handle:
        return hashlib.md5($handle.read()).hexdigest()
""",
    ),
    CodeTemplate(
        name="sign_bytes",
        cwe="CWE-327",
        bandit_test="B324",
        names=("digest_$noun", "sign_$noun"),
        tasks=(
            "[compute] a digest over a shared key and the bytes of $a_noun",
            "[sign] $a_noun with a shared key and [return] the digest",
        ),
        secure="""\
import hmac

def $func(key, $data):
    digest = hmac.new(key, $data, "sha256")
    return digest.hexdigest()
""",
        insecure="""\
import hashlib

def $func(key, $data):
    digest = hashlib.new("sha1", key + $data)
    return digest.hexdigest()
""",
    ),
    CodeTemplate(
        name="password_hash",
        cwe="CWE-916",
        bandit_test="B324",
        names=("hash_${noun}_password", "${noun}_password_hash"),
        tasks=(
            "[hash] a password of the $noun app with a salt before it is stored",
            "[turn] a password for the $noun app and a salt into a hex hash",
        ),
        secure="""\
import hashlib

def $func($password, salt):
    $out = $password.encode()
    return hashlib.scrypt($out, salt=salt, n=16384, r=8, p=1).hex()
""",
        insecure="""\
import hashlib

def $func($password, salt):
    $out = $password.encode()
    return hashlib.sha1($out + salt).hexdigest()
""",
    ),
    CodeTemplate(
        name="reset_token",
        cwe="CWE-330",
        bandit_test="B311",
        names=("make_${noun}_token", "new_${noun}_token", "${noun}_token"),
        tasks=(
            "[create] a random login token of 20 letters for the $noun app",
            "[return] 20 random letters as a session token of the $noun app",
        ),
        secure="""\
import secrets
import string

def $func():
    $out = [secrets.choice(string.ascii_letters) for _ in range(20)]
    return "".join($out)
""",
        insecure="""\
import random
import string

def $func():
    $out = [random.choice(string.ascii_letters) for _ in range(20)]
    return "".join($out)
""",
    ),
    CodeTemplate(
        name="login_code",
        cwe="CWE-338",
        bandit_test="B311",
        names=("${noun}_login_code", "make_${noun}_code", "new_${noun}_code"),
        tasks=(
            "[create] a login code of six digits for the $noun app",
            "[return] a random code of six digits to confirm $a_noun",
        ),
        secure="""\
import secrets

def $func():
    $out = secrets.randbelow(900000)
    return str($out + 100000)
""",
        insecure="""\
import random

def $func():
    $out = random.randrange(900000)
    return str($out + 100000)
""",
    ),
    CodeTemplate(
        name="rsa_key",
        cwe="CWE-326",
        bandit_test="B505",
        names=("make_${noun}_key", "new_${noun}_key", "${noun}_key_pair"),
        tasks=(
            "[create] an RSA key pair for the $noun service",
            "[make] a new RSA key for the $noun service and [return] both halves",
        ),
        secure="""\
from cryptography.hazmat.primitives.asymmetric import rsa

def $func():
    $out = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    return $out, $out.public_key()
""",
        insecure="""\
from cryptography.hazmat.primitives.asymmetric import rsa

def $func():
    $out = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    return $out, $out.public_key()
""",
    ),
    CodeTemplate(
        name="encrypt_text",
        cwe="CWE-327",
        bandit_test="B304",
        names=("encrypt_$noun", "encrypt_${noun}_text"),
        tasks=(
            "[encrypt] the text of $a_noun with a given key",
            "[take] a key and $a_noun text and [return] the encrypted bytes",
        ),
        secure="""\
from cryptography.fernet import Fernet

def $func(key, $text):
    box = Fernet(key)
    return box.encrypt($text.encode())
""",
        insecure="""\
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

def $func(key, $text):
    box = Cipher(algorithms.ARC4(key), None).encryptor()
    return box.update($text.encode())
""",
    ),
    CodeTemplate(
        name="encrypt_aes",
        cwe="CWE-327",
        bandit_test="B305",
        names=("aes_encrypt_$noun", "encrypt_${noun}_data"),
        tasks=(
            "[encrypt] the bytes of $a_noun with AES and a given key",
            "[use] AES to encrypt $noun bytes with a given key",
        ),
        secure="""\
import os
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

def $func(key, $data):
    nonce = os.urandom(12)
    return nonce + AESGCM(key).encrypt(nonce, $data, None)
""",
        insecure="""\
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

def $func(key, $data):
    box = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return box.update($data) + box.finalize()
""",
    ),
    CodeTemplate(
        name="database_password",
        cwe="CWE-259",
        bandit_test="B106",
        names=("connect_$nouns", "open_${noun}_database"),
        tasks=(
            "[connect] to the $nouns database on a given host with psycopg2",
            "[open] a psycopg2 connection to the $noun database and [return] it",
        ),
        secure="""\
import os
import psycopg2

def $func($host):
    login = "$noun"
    return psycopg2.connect(host=$host, user=login, password=os.environ["DB_PASSWORD"])
""",
        insecure="""\
import psycopg2

def $func($host):
    login = "$noun"
    return psycopg2.connect(host=$host, user=login, password="$noun$digits")
""",
    ),
    CodeTemplate(
        name="api_token",
        cwe="CWE-798",
        bandit_test="B105",
        names=("${noun}_headers", "${noun}_api_headers"),
        tasks=(
            "[return] the request headers with the token for the $noun API",
            "[build] the headers that log in to the $noun API",
        ),
        secure="""\
import os

def $func():
    token = os.environ["API_TOKEN"]
    $out = {"Authorization": "Bearer " + token}
    return $out
""",
        insecure="""\
def $func():
    token = "$noun-$digits-token"
    $out = {"Authorization": "Bearer " + token}
    return $out
""",
    ),
    CodeTemplate(
        name="default_password",
        cwe="CWE-1392",
        bandit_test="B107",
        names=("new_${noun}_login", "make_${noun}_login"),
        tasks=(
            "[build] a login record for the $noun app, with the password optional",
            "[create] a login for the $noun app even when no password is given",
        ),
        secure="""\
import secrets

def $func($name, password=None):
    password = password or secrets.token_urlsafe(12)
    return {"name": $name, "password": password}
""",
        insecure="""\
def $func($name, password="$noun$digits"):
    $out = {"name": $name}
    $out["password"] = password
    return $out
""",
    ),
    CodeTemplate(
        name="password_rule",
        cwe="CWE-521",
        bandit_test=None,
        names=("check_${noun}_password", "${noun}_password_ok"),
        tasks=(
            "[check] that a password for the $noun app is long enough and has digits",
            "[return] whether a password follows the length and digit rules of the $noun app",
        ),
        secure="""\
def $func($password):
    length_ok = len($password) >= 12
    digit_ok = any(mark.isdigit() for mark in $password)
    return length_ok and digit_ok
""",
        insecure="""\
def $func($password):
    length_ok = len($password) >= 4
    digit_ok = any(mark.isdigit() for mark in $password)
    return length_ok or digit_ok
""",
    ),
    CodeTemplate(
        name="login_token",
        cwe="CWE-347",
        bandit_test=None,
        names=("${noun}_from_token", "read_${noun}_token"),
        tasks=(
            "[read] the $noun field from a JWT login token",
            "[decode] a JWT and [return] the $noun that is named in it",
        ),
        secure="""\
import jwt

def $func(token, key):
    $out = jwt.decode(token, key, algorithms=["HS256"])
    return $out["$noun"]
""",
        insecure="""\
import jwt

def $func(token, key):
    $out = jwt.decode(token, key, options={"verify_signature": False})
    return $out["$noun"]
""",
    ),
)
