"""Templates about connections and services: TLS, hosts, timeouts, web apps, errors and checks.

Kept apart from the other weaknesses only so that each module stays readable; see
``code_templates`` for what a template is. Three of them (open redirect, error page, logged
password) are here although bandit has no test for them, since they are in every textbook.

To see them filled: ``python -m train.code_pairs code.jsonl --n 60``
"""

from train.code_templates import CodeTemplate

NETWORK = (
    CodeTemplate(
        name="requests_verify",
        cwe="CWE-295",
        bandit_test="B501",
        names=("download_$noun", "fetch_${noun}_text"),
        tasks=(
            "[download] $a_noun page from a url with requests",
            "[fetch] the text of $a_noun from a web address with requests",
        ),
        secure="""\
import requests

def $func($url):
    $out = requests.get($url, timeout=10)
    return $out.text
""",
        insecure="""\
import requests

def $func($url):
    $out = requests.get($url, timeout=10, verify=False)
    return $out.text
""",
    ),
    CodeTemplate(
        name="requests_timeout",
        cwe="CWE-400",
        bandit_test="B113",
        names=("send_$noun", "post_$noun"),
        tasks=(
            "[send] $a_noun as JSON with requests and [return] the status code",
            "[post] the data of $a_noun to a url and [return] the status code",
        ),
        secure="""\
import requests

def $func($url, $data):
    $out = requests.post($url, json=$data, timeout=10)
    return $out.status_code
""",
        insecure="""\
import requests

def $func($url, $data):
    $out = requests.post($url, json=$data)
    return $out.status_code
""",
    ),
    CodeTemplate(
        name="tls_socket",
        cwe="CWE-295",
        bandit_test="B323",
        names=("connect_$noun", "open_${noun}_socket"),
        tasks=(
            "[open] a TLS socket to the $noun server and [return] it",
            "[connect] to the $noun host over TLS on port 443",
        ),
        secure="""\
import socket
import ssl

def $func($host):
    context = ssl.create_default_context()
    sock = socket.create_connection(($host, 443), timeout=10)
    return context.wrap_socket(sock, server_hostname=$host)
""",
        insecure="""\
import socket
import ssl

def $func($host):
    context = ssl._create_unverified_context()
    sock = socket.create_connection(($host, 443), timeout=10)
    return context.wrap_socket(sock, server_hostname=$host)
""",
    ),
    CodeTemplate(
        name="tls_version",
        cwe="CWE-327",
        bandit_test="B503",
        names=("${noun}_context", "make_${noun}_context", "${noun}_tls_context"),
        tasks=(
            "[make] an SSL context for calls to the $noun service",
            "[return] an SSL context with a default version for $a_noun client",
        ),
        secure="""\
import ssl

def $func(version=ssl.PROTOCOL_TLS_CLIENT):
    $out = ssl.SSLContext(version)
    $out.load_default_certs()
    return $out
""",
        insecure="""\
import ssl

def $func(version=ssl.PROTOCOL_TLSv1):
    $out = ssl.SSLContext(version)
    $out.load_default_certs()
    return $out
""",
    ),
    CodeTemplate(
        name="ssh_client",
        cwe="CWE-322",
        bandit_test="B507",
        names=("ssh_to_$noun", "${noun}_ssh_client"),
        tasks=(
            "[connect] to the $noun server over SSH with paramiko",
            "[open] an SSH client for the $noun host and [return] it",
        ),
        secure="""\
import paramiko

def $func($host):
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    client.connect($host)
    return client
""",
        insecure="""\
import paramiko

def $func($host):
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect($host)
    return client
""",
    ),
    CodeTemplate(
        name="bind_socket",
        cwe="CWE-605",
        bandit_test="B104",
        names=("listen_for_$nouns", "${noun}_socket"),
        tasks=(
            "[open] a socket on a given port that listens for local $nouns",
            "[listen] on a port for $nouns from programs on this computer",
        ),
        secure="""\
import socket

def $func(port):
    $out = socket.socket()
    $out.bind(("127.0.0.1", port))
    $out.listen()
    return $out
""",
        insecure="""\
import socket

def $func(port):
    $out = socket.socket()
    $out.bind(("0.0.0.0", port))
    $out.listen()
    return $out
""",
    ),
    CodeTemplate(
        name="local_server",
        cwe="CWE-668",
        bandit_test="B104",
        names=("serve_$nouns", "${noun}_server"),
        tasks=(
            "[start] a small web server that shows $nouns on this computer",
            "[run] a local HTTP server for $nouns with a given handler",
        ),
        secure="""\
from http.server import HTTPServer

def $func(handler, port=8000):
    $out = HTTPServer(("127.0.0.1", port), handler)
    $out.serve_forever()
""",
        insecure="""\
from http.server import HTTPServer

def $func(handler, port=8000):
    $out = HTTPServer(("0.0.0.0", port), handler)
    $out.serve_forever()
""",
    ),
    CodeTemplate(
        name="flask_run",
        cwe="CWE-489",
        bandit_test="B201",
        names=("run_${noun}_app", "start_${noun}_app"),
        tasks=(
            "[start] the Flask app for $nouns on a given port",
            "[create] a Flask app named $noun for our customers and [run] it",
        ),
        secure="""\
from flask import Flask

def $func(port):
    $out = Flask("$noun")
    $out.run(port=port, debug=False)
""",
        insecure="""\
from flask import Flask

def $func(port):
    $out = Flask("$noun")
    $out.run(port=port, debug=True)
""",
    ),
    CodeTemplate(
        name="ftp_download",
        cwe="CWE-319",
        bandit_test="B402",
        names=("get_${noun}_file", "download_${noun}_file"),
        tasks=(
            "[download] $a_noun file by name from a server and [return] its bytes",
            "[fetch] the bytes of a named $noun file from a host",
        ),
        secure="""\
import requests

def $func($host, $name):
    $out = requests.get(f"https://{$host}/{$name}", timeout=10)
    return $out.content
""",
        insecure="""\
from ftplib import FTP

def $func($host, $name):
    $out = []
    FTP($host).retrbinary(f"RETR {$name}", $out.append)
    return b"".join($out)
""",
    ),
    CodeTemplate(
        name="device_command",
        cwe="CWE-319",
        bandit_test="B401",
        names=("ask_$noun", "send_${noun}_command"),
        tasks=(
            "[send] a command to the $noun server and [return] the reply",
            "[connect] to the $noun server, [send] one command and [read] the reply",
        ),
        secure="""\
import requests

def $func($host, $data):
    $url = f"https://{$host}/command"
    $out = requests.post($url, data=$data, timeout=10)
    return $out.content
""",
        insecure="""\
from telnetlib import Telnet

def $func($host, $data):
    with Telnet($host, 23, timeout=10) as line:
        line.write($data)
        return line.read_some()
""",
    ),
    CodeTemplate(
        name="fetch_url",
        cwe="CWE-918",
        bandit_test="B310",
        names=("preview_$noun", "fetch_${noun}_page"),
        tasks=(
            "[fetch] the $noun page that a visitor links to and [return] its bytes",
            "[load] a preview of $a_noun from the url that a user typed in",
        ),
        secure="""\
import requests

def $func($url):
    if not $url.startswith("https://$nouns.example.com/"):
        raise ValueError($url)
    return requests.get($url, timeout=10, allow_redirects=False).content
""",
        insecure="""\
from urllib.request import urlopen

def $func($url):
    if "://" not in $url:
        raise ValueError($url)
    return urlopen($url, timeout=10).read()
""",
    ),
    CodeTemplate(
        name="next_page",
        cwe="CWE-601",
        bandit_test=None,
        names=("after_$noun", "${noun}_next_page"),
        tasks=(
            "[send] the visitor to the next page after $a_noun is saved in Flask",
            "[redirect] a Flask visitor to the next page after the $noun form",
        ),
        secure="""\
from flask import redirect, request

def $func():
    $out = request.args.get("next", "/")
    if $out not in ("/home", "/$nouns"):
        $out = "/"
    return redirect($out)
""",
        insecure="""\
from flask import redirect, request

def $func():
    $out = request.args.get("next", "/")
    if not $out:
        $out = "/$nouns"
    return redirect($out)
""",
    ),
    CodeTemplate(
        name="error_page",
        cwe="CWE-209",
        bandit_test=None,
        names=("handle_$noun", "${noun}_reply"),
        tasks=(
            "[call] $a_noun action and [return] an error page when it fails",
            "[run] the $noun action of a web app and [answer] errors with code 500",
        ),
        secure="""\
import logging

def $func(action):
    try:
        return action(), 200
    except Exception:
        logging.exception("$noun failed")
        return "$noun failed", 500
""",
        insecure="""\
import traceback

def $func(action):
    try:
        return action(), 200
    except Exception:
        $out = traceback.format_exc()
        return "$noun failed: " + $out, 500
""",
    ),
    CodeTemplate(
        name="login_log",
        cwe="CWE-532",
        bandit_test=None,
        names=("login_$noun", "log_in_$noun"),
        tasks=(
            "[log] each login to the $noun app and then [check] the password",
            "[check] a name and password for the $noun app and [log] the login",
        ),
        secure="""\
import logging

def $func(check, $name, $password):
    logging.info("$noun login: %s", $name)
    return check($name, $password)
""",
        insecure="""\
import logging

def $func(check, $name, $password):
    logging.info("$noun login: %s %s", $name, $password)
    return check($name, $password)
""",
    ),
    CodeTemplate(
        name="remove_file",
        cwe="CWE-703",
        bandit_test="B110",
        names=("remove_old_$noun", "clean_up_$noun"),
        tasks=(
            "[remove] an old $noun file and [go] on if that fails",
            "[delete] $a_noun file from the disk without stopping on errors",
        ),
        secure="""\
import logging
import os

def $func($path):
    try:
        os.remove($path)
    except OSError:
        logging.exception("$noun not removed")
""",
        insecure="""\
import logging
import os

def $func($path):
    logging.info("removing $noun")
    try:
        os.remove($path)
    except Exception:
        pass
""",
    ),
    CodeTemplate(
        name="convert_list",
        cwe="CWE-390",
        bandit_test="B112",
        names=("${noun}_numbers", "read_${noun}_numbers"),
        tasks=(
            "[convert] a list of $noun prices from text to numbers",
            "[turn] the texts in a list of $noun sizes into numbers",
        ),
        secure="""\
def $func(items):
    $out = []
    for item in items:
        try:
            $out.append(float(item))
        except ValueError as error:
            raise ValueError("bad $noun") from error
    return $out
""",
        insecure="""\
def $func(items):
    $out = []
    for item in items:
        try:
            $out.append(float(item))
        except Exception:
            continue
    return $out
""",
    ),
    CodeTemplate(
        name="check_amount",
        cwe="CWE-20",
        bandit_test="B101",
        names=("set_${noun}_$amount", "${noun}_with_$amount"),
        tasks=(
            "[build] $a_noun record with a positive $amount",
            "[check] that the $amount in $a_noun record is positive and [return] the record",
        ),
        secure="""\
def $func($amount):
    if $amount <= 0:
        raise ValueError("$amount must be positive")
    return {"$noun": $amount}
""",
        insecure="""\
def $func($amount):
    assert $amount > 0, "$amount must be positive"
    $out = {"$noun": $amount}
    return $out
""",
    ),
    CodeTemplate(
        name="check_owner",
        cwe="CWE-863",
        bandit_test="B101",
        names=("delete_own_$noun", "close_own_$noun"),
        tasks=(
            "[delete] $a_noun if the person who asks is its owner",
            "[let] a person delete only their own $noun and [return] its id",
        ),
        secure="""\
def $func($person, $noun):
    if $noun.owner != $person:
        raise PermissionError("not the owner")
    $noun.delete()
    return $noun.id
""",
        insecure="""\
def $func($person, $noun):
    assert $noun.owner == $person, "not the owner"
    $noun.delete()
    return $noun.id
""",
    ),
    CodeTemplate(
        name="model_revision",
        cwe="CWE-494",
        bandit_test="B615",
        names=("${noun}_model", "get_${noun}_model"),
        tasks=(
            "[load] a transformers model by name that sorts $nouns",
            "[download] the named transformers model for $noun texts",
        ),
        secure="""\
from transformers import AutoModel

def $func($name):
    $out = AutoModel.from_pretrained($name, revision="5f0c${digits}")
    return $out.eval()
""",
        insecure="""\
from transformers import AutoModel

def $func($name):
    $out = AutoModel.from_pretrained($name, revision="main")
    return $out.eval()
""",
    ),
)
