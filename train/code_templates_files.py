"""Templates about stored data: deserialising, XML, paths, temporary files, permissions, uploads.

Kept apart from the other weaknesses only so that each module stays readable; see
``code_templates`` for what a template is. Three of them (path join, upload, check before create)
are here although bandit has no test for them, since they are in every textbook.

To see them filled: ``python -m train.code_pairs code.jsonl --n 60``
"""

from train.code_templates import CodeTemplate

FILES = (
    CodeTemplate(
        name="path_join",
        cwe="CWE-22",
        bandit_test=None,
        names=("read_${noun}_file", "open_$noun"),
        tasks=(
            "[read] a file with a given name from the $nouns folder",
            "[return] the text of the named file in the $nouns folder",
        ),
        secure="""\
import os

def $func($name):
    full = os.path.join("$nouns", os.path.basename($name))
    with open(full) as $handle:
        return $handle.read()
""",
        insecure="""\
import os

def $func($name):
    full = os.path.join("$nouns", $name)
    with open(full) as $handle:
        return $handle.read()
""",
    ),
    CodeTemplate(
        name="tar_extract",
        cwe="CWE-22",
        bandit_test="B202",
        names=("unpack_$nouns", "extract_$nouns"),
        tasks=(
            "[unpack] a tar archive of $nouns into a folder",
            "[extract] all files of $a_noun tar archive and [return] the folder",
        ),
        secure="""\
import tarfile

def $func($path, $folder):
    with tarfile.open($path) as archive:
        archive.extractall($folder, filter="data")
    return $folder
""",
        insecure="""\
import tarfile

def $func($path, $folder):
    with tarfile.open($path) as archive:
        archive.extractall($folder)
    return $folder
""",
    ),
    CodeTemplate(
        name="pickle_load",
        cwe="CWE-502",
        bandit_test="B301",
        names=("load_$noun", "restore_$noun"),
        tasks=(
            "[load] a saved $noun object back from a file",
            "[restore] the $noun that was saved to a file and [return] it",
        ),
        secure="""\
import json

def $func($path):
    with open($path, "rb") as $handle:
        return json.load($handle)
""",
        insecure="""\
import pickle

def $func($path):
    with open($path, "rb") as $handle:
        return pickle.load($handle)
""",
    ),
    CodeTemplate(
        name="yaml_load",
        cwe="CWE-502",
        bandit_test="B506",
        names=("load_${noun}_yaml", "${noun}_config"),
        tasks=(
            "[load] $a_noun config from a YAML file",
            "[read] a YAML file that describes $a_noun and [return] its values",
        ),
        secure="""\
import yaml

def $func($path):
    with open($path) as $handle:
        return yaml.load($handle, Loader=yaml.SafeLoader)
""",
        insecure="""\
import yaml

def $func($path):
    with open($path) as $handle:
        return yaml.load($handle, Loader=yaml.Loader)
""",
    ),
    CodeTemplate(
        name="marshal_loads",
        cwe="CWE-502",
        bandit_test="B302",
        names=("decode_$noun", "unpack_${noun}_bytes"),
        tasks=(
            "[decode] bytes from the network and [return] the $noun in them",
            "[take] the bytes that a client sent and [return] their $noun field",
        ),
        secure="""\
import json

def $func($data):
    $out = json.loads($data)
    return $out["$noun"]
""",
        insecure="""\
import marshal

def $func($data):
    $out = marshal.loads($data)
    return $out["$noun"]
""",
    ),
    CodeTemplate(
        name="pandas_table",
        cwe="CWE-502",
        bandit_test="B301",
        names=("load_${noun}_table", "first_$nouns"),
        tasks=(
            "[load] a saved table of $nouns with pandas and [return] its first rows",
            "[open] a pandas table of $nouns from a file and [show] the first rows",
        ),
        secure="""\
import pandas

def $func($path):
    table = pandas.read_csv($path)
    return table.head()
""",
        insecure="""\
import pandas

def $func($path):
    table = pandas.read_pickle($path)
    return table.head()
""",
    ),
    CodeTemplate(
        name="torch_load",
        cwe="CWE-502",
        bandit_test="B614",
        names=("load_${noun}_model", "${noun}_weights"),
        tasks=(
            "[load] the weights of $a_noun model from a file with torch",
            "[read] a torch file and [return] the $noun weights in it",
        ),
        secure="""\
import torch

def $func($path):
    model = torch.load($path, weights_only=True)
    return model["$noun"]
""",
        insecure="""\
import torch

def $func($path):
    model = torch.load($path, weights_only=False)
    return model["$noun"]
""",
    ),
    CodeTemplate(
        name="xml_parse",
        cwe="CWE-611",
        bandit_test="B405",
        names=("read_${noun}_xml", "parse_${noun}_xml"),
        tasks=(
            "[read] an XML file of $nouns and [return] the text of each item",
            "[parse] $a_noun XML file into a list of item texts",
        ),
        secure="""\
import defusedxml.ElementTree as tree

def $func($path):
    $out = tree.parse($path).getroot()
    return [item.text for item in $out]
""",
        insecure="""\
import xml.etree.ElementTree as tree

def $func($path):
    $out = tree.parse($path).getroot()
    return [item.text for item in $out]
""",
    ),
    CodeTemplate(
        name="xml_minidom",
        cwe="CWE-776",
        bandit_test="B408",
        names=("${noun}_elements", "find_${noun}_elements"),
        tasks=(
            "[find] all $noun elements in a text of XML",
            "[parse] XML text and [return] the list of its $noun elements",
        ),
        secure="""\
from defusedxml.minidom import parseString

def $func($text):
    page = parseString($text)
    return page.getElementsByTagName("$noun")
""",
        insecure="""\
from xml.dom.minidom import parseString

def $func($text):
    page = parseString($text)
    return page.getElementsByTagName("$noun")
""",
    ),
    CodeTemplate(
        name="temp_name",
        cwe="CWE-377",
        bandit_test="B306",
        names=("write_temp_$noun", "temp_${noun}_file"),
        tasks=(
            "[write] $a_noun to a temporary file and [return] the file name",
            "[store] the text of $a_noun in a new temporary file",
        ),
        secure="""\
import tempfile

def $func($text):
    with tempfile.NamedTemporaryFile("w", delete=False) as $handle:
        $handle.write($text)
    return $handle.name
""",
        insecure="""\
import tempfile

def $func($text):
    with open(tempfile.mktemp(), "w") as $handle:
        $handle.write($text)
    return $handle.name
""",
    ),
    CodeTemplate(
        name="temp_path",
        cwe="CWE-379",
        bandit_test="B108",
        names=("cache_$noun", "save_${noun}_cache"),
        tasks=(
            "[save] $a_noun text in a cache file for a short time",
            "[keep] the text of $a_noun in a temporary folder and [return] the path",
        ),
        secure="""\
import tempfile

def $func($text):
    $path = tempfile.mkdtemp() + "/$nouns.txt"
    with open($path, "w") as $handle:
        $handle.write($text)
    return $path
""",
        insecure="""\
import os

def $func($text):
    $path = os.path.join("/tmp", "$nouns.txt")
    with open($path, "w") as $handle:
        $handle.write($text)
    return $path
""",
    ),
    CodeTemplate(
        name="chmod_file",
        cwe="CWE-732",
        bandit_test="B103",
        names=("save_$noun", "write_${noun}_file"),
        tasks=(
            "[write] $a_noun text to a file and [set] its file mode",
            "[save] the text of $a_noun in a file and [set] the permissions",
        ),
        secure="""\
import os

def $func($path, $text):
    with open($path, "w") as $handle:
        $handle.write($text)
    os.chmod($path, 0o600)
""",
        insecure="""\
import os

def $func($path, $text):
    with open($path, "w") as $handle:
        $handle.write($text)
    os.chmod($path, 0o666)
""",
    ),
    CodeTemplate(
        name="chmod_folder",
        cwe="CWE-732",
        bandit_test="B103",
        names=("make_${noun}_folder", "create_${noun}_folder"),
        tasks=(
            "[create] a folder for $noun files and [set] its mode",
            "[make] a new $noun folder, [set] its permissions and [return] it",
        ),
        secure="""\
import os

def $func($folder):
    os.makedirs($folder, exist_ok=True)
    os.chmod($folder, 0o700)
    return $folder
""",
        insecure="""\
import os

def $func($folder):
    os.makedirs($folder, exist_ok=True)
    os.chmod($folder, 0o777)
    return $folder
""",
    ),
    CodeTemplate(
        name="file_upload",
        cwe="CWE-434",
        bandit_test=None,
        names=("save_${noun}_upload", "store_${noun}_picture"),
        tasks=(
            "[save] the uploaded $noun picture in a folder and [return] its path",
            "[store] a PNG picture of $a_noun that a visitor uploaded",
        ),
        secure="""\
import uuid

def $func(upload, $folder):
    $path = f"{$folder}/{uuid.uuid4().hex}.png"
    upload.save($path)
    return $path
""",
        insecure="""\
def $func(upload, $folder):
    $name = upload.filename
    $path = f"{$folder}/{$name}"
    upload.save($path)
    return $path
""",
    ),
    CodeTemplate(
        name="file_create",
        cwe="CWE-367",
        bandit_test=None,
        names=("create_$noun", "new_${noun}_file"),
        tasks=(
            "[create] a new $noun file and [fail] if it exists already",
            "[write] $a_noun text to a file only if there is no such file",
        ),
        secure="""\
import os

def $func($path, $text):
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open($path, flags, 0o644), "w") as $handle:
        $handle.write($text)
    return $path
""",
        insecure="""\
import os

def $func($path, $text):
    if os.path.exists($path):
        raise FileExistsError($path)
    with open($path, "w") as $handle:
        $handle.write($text)
    return $path
""",
    ),
)
