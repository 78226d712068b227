"""Templates in which text becomes code, a command, a query or a page: the injection weaknesses.

Kept apart from the other weaknesses only so that each module stays readable; see
``code_templates`` for what a template is. The secure answer to a shell task mostly calls the
standard library instead, because bandit reports even a bare ``import subprocess``; the one
template that keeps ``subprocess`` is there since ``shell=True`` is the best-known case of all.

To see them filled: ``python -m train.code_pairs code.jsonl --n 60``
"""

from train.code_templates import CodeTemplate

INJECTION = (
    CodeTemplate(
        name="shell_line_count",
        cwe="CWE-78",
        bandit_test="B602",
        names=("count_${noun}_lines", "${noun}_line_count"),
        tasks=(
            "[run] the wc command on $a_noun log and [return] its output",
            "[count] the lines of $a_noun file with the wc command",
        ),
        secure="""\
import subprocess

def $func($path):
    command = ["wc", "-l", "--", $path]
    return subprocess.check_output(command, text=True)
""",
        insecure="""\
import subprocess

def $func($path):
    command = f"wc -l -- {$path}"
    return subprocess.check_output(command, shell=True, text=True)
""",
    ),
    CodeTemplate(
        name="shell_copy",
        cwe="CWE-78",
        bandit_test="B605",
        names=("copy_${noun}_file", "backup_$noun"),
        tasks=(
            "[copy] $a_noun file into a backup folder",
            "[put] a copy of $a_noun file into another folder and [return] that folder",
        ),
        secure="""\
import shutil

def $func($path, $folder):
    shutil.copy($path, $folder)
    return $folder
""",
        insecure="""\
import os

def $func($path, $folder):
    os.system(f"cp {$path} {$folder}")
    return $folder
""",
    ),
    CodeTemplate(
        name="shell_list",
        cwe="CWE-78",
        bandit_test="B605",
        names=("list_${noun}_files", "${noun}_file_names"),
        tasks=(
            "[list] the $noun files in a folder in sorted order",
            "[return] the sorted names of all $noun files in a folder",
        ),
        secure="""\
import os

def $func($folder):
    $out = os.listdir($folder)
    return sorted($out)
""",
        insecure="""\
import os

def $func($folder):
    $out = os.popen("ls " + $folder).read()
    return sorted($out.split())
""",
    ),
    CodeTemplate(
        name="sql_select",
        cwe="CWE-89",
        bandit_test="B608",
        names=("find_$nouns", "get_${nouns}_by_$column"),
        tasks=(
            "[find] all $nouns with a given $column in the database",
            "[return] the rows of the $nouns table that have a given $column",
        ),
        secure="""\
def $func($conn, $value):
    query = "SELECT * FROM $nouns WHERE $column = ?"
    return $conn.execute(query, ($value,)).fetchall()
""",
        insecure="""\
def $func($conn, $value):
    query = f"SELECT * FROM $nouns WHERE $column = '{$value}'"
    return $conn.execute(query).fetchall()
""",
    ),
    CodeTemplate(
        name="sql_delete",
        cwe="CWE-89",
        bandit_test="B608",
        names=("delete_$noun", "remove_$noun"),
        tasks=(
            "[delete] $a_noun from the database by its id",
            "[remove] the row with a given id from the $nouns table",
        ),
        secure="""\
def $func($conn, $ident):
    query = "DELETE FROM $nouns WHERE id = ?"
    $conn.execute(query, ($ident,))
    $conn.commit()
""",
        insecure="""\
def $func($conn, $ident):
    query = "DELETE FROM $nouns WHERE id = '%s'" % $ident
    $conn.execute(query)
    $conn.commit()
""",
    ),
    CodeTemplate(
        name="sql_insert",
        cwe="CWE-89",
        bandit_test="B608",
        names=("add_$noun", "insert_$noun"),
        tasks=(
            "[add] a row with a given $column to the $nouns table",
            "[insert] a new $noun with its $column into the database",
        ),
        secure="""\
def $func($conn, $value):
    query = "INSERT INTO $nouns ($column) VALUES (?)"
    $conn.execute(query, ($value,))
    $conn.commit()
""",
        insecure="""\
def $func($conn, $value):
    query = "INSERT INTO $nouns ($column) VALUES ('{}')".format($value)
    $conn.execute(query)
    $conn.commit()
""",
    ),
    CodeTemplate(
        name="sql_update",
        cwe="CWE-89",
        bandit_test="B608",
        names=("update_${noun}_$column", "set_${noun}_$column"),
        tasks=(
            "[change] the $column of all $nouns in the database",
            "[set] a new $column on every row of the $nouns table",
        ),
        secure="""\
def $func($conn, $value):
    query = "UPDATE $nouns SET $column = ?"
    $conn.execute(query, ($value,))
    $conn.commit()
""",
        insecure="""\
def $func($conn, $value):
    query = "UPDATE $nouns SET $column = '" + $value + "'"
    $conn.execute(query)
    $conn.commit()
""",
    ),
    CodeTemplate(
        name="django_extra",
        cwe="CWE-89",
        bandit_test="B610",
        names=("filter_$nouns", "${nouns}_with_$column"),
        tasks=(
            "[filter] the Django $noun model by $column and [sort] by id",
            "[return] all Django $noun objects with a given $column sorted by id",
        ),
        secure="""\
def $func(model, $value):
    $out = model.objects.filter($column=$value)
    return $out.order_by("id")
""",
        insecure="""\
def $func(model, $value):
    $out = model.objects.extra(where=[f"$column = '{$value}'"])
    return $out.order_by("id")
""",
    ),
    CodeTemplate(
        name="eval_list",
        cwe="CWE-95",
        bandit_test="B307",
        names=("parse_${noun}_list", "read_${noun}_list"),
        tasks=(
            "[turn] the text of a Python list of $nouns into a sorted list",
            "[parse] a text that holds a Python list of $noun numbers and [sort] it",
        ),
        secure="""\
import ast

def $func($text):
    $out = ast.literal_eval($text)
    return sorted($out)
""",
        insecure="""\
def $func($text):
    $text = $text.strip()
    $out = eval($text)
    return sorted($out)
""",
    ),
    CodeTemplate(
        name="exec_settings",
        cwe="CWE-94",
        bandit_test="B102",
        names=("load_${noun}_settings", "${noun}_settings"),
        tasks=(
            "[load] the $noun settings from a file into a dictionary",
            "[read] a file of $noun settings and [return] them as a dictionary",
        ),
        secure="""\
import json

def $func($path):
    with open($path) as $handle:
        settings = json.loads($handle.read())
    return settings
""",
        insecure="""\
def $func($path):
    settings = {}
    with open($path) as $handle:
        exec($handle.read(), settings)
    return settings
""",
    ),
    CodeTemplate(
        name="jinja_page",
        cwe="CWE-79",
        bandit_test="B701",
        names=("render_${noun}_page", "${noun}_page"),
        tasks=(
            "[render] $a_noun web page from a Jinja template text",
            "[fill] the name of $a_noun into a Jinja template for a web page",
        ),
        secure="""\
from jinja2 import Environment

def $func($text, $name):
    page = Environment(autoescape=True).from_string($text)
    return page.render($noun=$name)
""",
        insecure="""\
from jinja2 import Environment

def $func($text, $name):
    page = Environment(autoescape=False).from_string($text)
    return page.render($noun=$name)
""",
    ),
    CodeTemplate(
        name="markup_heading",
        cwe="CWE-79",
        bandit_test="B704",
        names=("${noun}_heading", "make_${noun}_heading"),
        tasks=(
            "[build] a Markup heading that shows the name of $a_noun",
            "[return] an HTML heading for the page of $a_noun as Markup",
        ),
        secure="""\
from markupsafe import Markup

def $func($name):
    return Markup("<h1>$Noun {}</h1>").format($name)
""",
        insecure="""\
from markupsafe import Markup

def $func($name):
    return Markup(f"<h1>$Noun {$name}</h1>")
""",
    ),
    CodeTemplate(
        name="django_list_item",
        cwe="CWE-79",
        bandit_test="B308",
        names=("${noun}_list_item", "show_${noun}_item"),
        tasks=(
            "[build] an HTML list item for $a_noun in a Django app",
            "[return] the HTML list item that shows $a_noun name with Django",
        ),
        secure="""\
from django.utils.html import format_html

def $func($name):
    return format_html("<li>$Noun {}</li>", $name)
""",
        insecure="""\
from django.utils.safestring import mark_safe

def $func($name):
    return mark_safe(f"<li>$Noun {$name}</li>")
""",
    ),
)
